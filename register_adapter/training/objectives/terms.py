"""Label-free objectives: terms that compare tokens with what the frozen base says of the same image."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import nn

from .base import Batch, Objective
from .tokens import Tokens, base_alone, read_base, read_tokens, without_prefix

__all__ = ["Targets", "Teacher", "Term", "WeightedTerms", "target_key"]

#: What a term has learned from the frozen base, name to ``(B, ...)``.
Targets = Mapping[str, torch.Tensor]


def target_key(term: str, name: str) -> str:
    """Key in an item, a batch or a store, of a term's target."""
    return f"target.{term}.{name}"


class Teacher:
    """The frozen base, and its answer on one batch, computed once for all terms.

    Args:
        model: The model that is trained; its adapters are off while it is asked.
        batch: The batch.
        layers: Indices into ``hidden_states`` whose patch tokens are read.
    """

    def __init__(self, model: nn.Module, batch: Batch, layers: Collection[int] = ()) -> None:
        self.model, self.batch, self.layers = model, batch, layers
        self._tokens: Tokens | None = None
        self._alone: nn.Module | None = None

    @property
    def tokens(self) -> Tokens:
        """The base's tokens of the batch."""
        if self._tokens is None:
            self._tokens = self.run(self.batch["pixel_values"])
        return self._tokens

    def run(self, pixel_values: torch.Tensor) -> Tokens:
        """The base's tokens of other images ``(B, 3, H, W)``."""
        batch = {**self.batch, "pixel_values": pixel_values}
        if self._alone is not None:
            return read_tokens(self._alone, without_prefix(batch), self.layers)
        return read_base(self.model, batch, self.layers)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Adapters are off meanwhile, so that several passes do not switch them each by itself."""
        with base_alone(self.model) as self._alone:
            try:
                yield
            finally:
                self._alone = None


class Term(Objective):
    """One term of a label-free loss; an objective by itself, too.

    A subclass has :meth:`targets`, which asks the frozen base and whose result can be stored, and :meth:`measure`.
    """

    #: Whether ``targets`` depend on an image alone, so that they can be computed once and stored.
    storable: ClassVar[bool] = True

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices into ``hidden_states`` whose patch tokens it reads, beside those of the last."""
        return ()

    @abstractmethod
    def targets(self, teacher: Teacher) -> dict[str, torch.Tensor]:
        """What the term needs of the frozen base, name to ``(B, ...)``; without gradients."""

    @abstractmethod
    def measure(self, model: nn.Module, student: Tokens, targets: Targets, batch: Batch) -> torch.Tensor:
        """The term for each image, ``(B,)`` float32."""

    def encode(self, items: list[dict[str, Any]]) -> Batch:
        """What it adds to a batch, beside the tensors and numbers of the items; by default nothing."""
        return {}

    def metrics(self, student: Tokens, targets: Targets, batch: Batch) -> dict[str, torch.Tensor]:
        """More about each image ``(B,)`` for an evaluation; by default nothing."""
        return {}

    def collate(self, items: list[dict[str, Any]]) -> Batch:
        """As for any objective, with what it adds."""
        return WeightedTerms([(self, 1.0)]).collate(items)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The mean over the batch."""
        return WeightedTerms([(self, 1.0)]).loss(model, batch)

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """The term, and the largest patch norm over the median, of each image."""
        return WeightedTerms([(self, 1.0)]).evaluate(model, batch)


class WeightedTerms(Objective):
    """Several terms, weighted and summed; they share one forward pass of the student and one of the base.

    Args:
        terms: Terms and their weights.
    """

    name = "weighted"

    def __init__(self, terms: Sequence[tuple[Term, float]]) -> None:
        if not terms:
            raise ValueError("there must be at least one term")
        for term, weight in terms:
            if not 0 <= weight < math.inf:
                raise ValueError(f"the weight of {term.name} must be a finite number of at least 0, got {weight}")
        self.terms = list(terms)
        self.base = next((term.base for term, _ in terms if term.base != Term.base), Term.base)

    @property
    def storable(self) -> bool:
        """Whether all targets can be stored."""
        return all(term.storable for term, _ in self.terms)

    @property
    def layers(self) -> set[int]:
        """What any term reads."""
        return {layer for term, _ in self.terms for layer in term.layers}

    def prepare(self, model: nn.Module, images: Any) -> None:
        """As each of the terms."""
        for term, _ in self.terms:
            term.prepare(model, images)

    def collate(self, items: list[dict[str, Any]]) -> Batch:
        """What any term needs, and what all of them add."""
        for term, _ in self.terms:
            term.check_items(items)
        batch = super().collate(items)
        for term, _ in self.terms:
            batch |= term.encode(items)
        return batch

    def check_base(self, base: nn.Module) -> None:
        """As each of the terms."""
        for term, _ in self.terms:
            term.check_base(base)

    def targets(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """Every term's targets, computed now, under their keys; what a store is filled with."""
        teacher = Teacher(model, batch, self.layers)
        with torch.no_grad():
            return {
                target_key(term.name, name): value
                for term, _ in self.terms
                for name, value in term.targets(teacher).items()
            }

    def _measure(self, model: nn.Module, batch: Batch) -> tuple[Tokens, dict[str, torch.Tensor], list[Targets]]:
        teacher = Teacher(model, batch, self.layers)
        given: list[Targets] = []
        values: dict[str, torch.Tensor] = {}
        for term, _ in self.terms:  # the base first: its pass must not come between the student's and its backward
            start = target_key(term.name, "")
            stored = {key.removeprefix(start): value for key, value in batch.items() if key.startswith(start)}
            with torch.no_grad():
                given.append(stored or term.targets(teacher))
        student = read_tokens(model, batch, self.layers)
        for (term, _), targets in zip(self.terms, given, strict=True):
            values[term.name] = term.measure(model, student, targets, batch)
        return student, values, given

    def loss(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The weighted sum of the terms' means, and those means."""
        _, values, _ = self._measure(model, batch)
        means = {name: value.mean() for name, value in values.items()}
        total = torch.stack([means[term.name] * weight for term, weight in self.terms]).sum()
        return total, {name: mean.detach() for name, mean in means.items()}

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """``loss``, every term, and ``largest_norm`` (largest patch norm over the median) of each image, ``(B,)``.

        And what terms add to that.
        """
        student, values, given = self._measure(model, batch)
        norms = student.before_norm.float().norm(dim=-1)
        total = torch.stack([values[term.name] * weight for term, weight in self.terms]).sum(0)
        more = {"largest_norm": norms.amax(1) / norms.median(1).values.clamp_min(1e-12)}
        for (term, _), targets in zip(self.terms, given, strict=True):
            more |= term.metrics(student, targets, batch)
        return {"loss": total, **values, **more}

    def details(self) -> dict[str, Any]:
        """Name and weight of every term, and what each says of itself."""
        return {
            "name": "+".join(term.name for term, _ in self.terms),
            "terms": [{**term.details(), "weight": weight} for term, weight in self.terms],
        }
