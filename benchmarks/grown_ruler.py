"""What is measured of a grown model and its repairs, on held-out images; see ``grown_repair.py`` for what it means."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from register_adapter import audit, capture
from register_adapter.artifacts.norms import summarise_norms
from register_adapter.artifacts.sink_report import SinkReport, head_kind
from register_adapter.testbed.grown import GrownModel, MosaicTask, weighted_error

__all__ = ["TEST_SEED", "Ruler", "count_sinks", "say_sinks"]

#: Seeds of the images that probes are fitted on, and that are measured.
PROBE_SEED, TEST_SEED = 60_002, 60_003
_PLACES = {"patches": ("outlier", "other"), "registers": ("register",)}


def count_sinks(report: SinkReport) -> dict[str, dict[str, int]]:
    """How many heads have sinks on patches and on registers, by their kind; those on CLS are left out."""
    counts: dict[str, dict[str, int]] = {place: {} for place in _PLACES}
    for head in report.heads:
        for place, tokens in _PLACES.items():
            kind = head_kind({token: head.tokens[token] for token in tokens if token in head.tokens})
            if kind is not None:
                counts[place][kind] = counts[place].get(kind, 0) + 1
    return counts


def say_sinks(rows: list[dict[str, Any]], place: str) -> str:
    """The kinds of a place over the seeds, such as ``"no-op 4.3, unclear 0.7"``: heads a model, mean."""
    kinds = ("no-op", "broadcast", "unclear")
    means = {kind: sum(row["sinks"][place].get(kind, 0) for row in rows) / len(rows) for kind in kinds}
    return ", ".join(f"{kind} {mean:.1f}" for kind, mean in means.items() if mean) or "none"


class Ruler:
    """Measures models of one task against the model that grew and its twin."""

    def __init__(self, base: GrownModel, twin: GrownModel, task: MosaicTask, count: int) -> None:
        self.task = task
        self.test, self.other = task.draw(count, TEST_SEED), task.draw(count, PROBE_SEED)
        self.twin = [self._read(twin.backbone, drawn.pixel_values)[0] for drawn in (self.test, self.other)]
        norms = self._read(base.backbone, self.test.pixel_values)[1]
        worst = max(norms, key=lambda norm: summarise_norms(norm).share)
        self.places = worst > 3 * worst.median()

    @torch.no_grad()
    def _read(self, model: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
        """Tokens behind the norm ``(B, P, D)``, norms ``(B, P)`` and attention received ``(B, P)`` of every block."""
        tiles, last, norms, seen = self.task.num_patches, [], [], []
        for batch in torch.split(pixels, 32):
            with capture(model) as trace:
                last.append(model(pixel_values=batch).last_hidden_state[:, -tiles:])
            norms.append([hidden[:, -tiles:].norm(dim=-1) for hidden in trace.hidden_states[1:]])
            # Columns of key/value pairs stand behind those of the sequence.
            ends = [maps.shape[2] for maps in trace.attentions]
            seen.append(
                [
                    m[:, :, end - tiles :, end - tiles : end].mean((1, 2))
                    for m, end in zip(trace.attentions, ends, strict=True)
                ]
            )
        first, second = ([torch.cat(parts) for parts in zip(*batches, strict=True)] for batches in (norms, seen))
        return torch.cat(last), first, second

    @staticmethod
    def _fitted(inputs: torch.Tensor, wanted: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """A ridge regression, tokens ``(N, D)`` to ``(N, C)``."""
        ones = torch.ones(len(inputs), 1, dtype=torch.float64)
        design = torch.cat([inputs.double(), ones], 1)
        gram = design.T @ design + 1e-3 * len(design) * torch.eye(design.shape[1], dtype=torch.float64)
        weights = torch.linalg.solve(gram, design.T @ wanted.double())
        return lambda tokens: tokens.double() @ weights[:-1] + weights[-1]

    def measure(self, model: Any, head: torch.nn.Linear) -> dict[str, Any]:
        """The numbers of a row."""
        model.eval()
        patches, norms, seen = self._read(model, self.test.pixel_values)
        others, _, _ = self._read(model, self.other.pixel_values)
        summaries = [summarise_norms(norm) for norm in norms]
        loss = weighted_error(head(patches), self.test.targets, self.test.weights, (-1, -2))
        own = self.test.targets[..., : self.task.contents]
        probe = self._fitted(others.flatten(0, 1), self.other.targets[..., : self.task.contents].flatten(0, 1))
        left, _, right = torch.linalg.svd(others.flatten(0, 1).T @ self.twin[1].flatten(0, 1), full_matrices=False)
        cosine = F.cosine_similarity(patches @ (left @ right), self.twin[0], dim=-1)

        def explained(places: torch.Tensor) -> float:
            rest = (own[places].double() - probe(patches[places])).square().sum()
            return float(1 - rest / (own[places] - own[places].mean(0)).double().square().sum())

        report = audit(model, list(torch.split(self.test.pixel_values, 32)), sinks=True, progress=False)
        assert report.sinks is not None
        return {
            "task_loss": float(loss),
            "largest_ratio": max(summary.largest for summary in summaries),
            "largest_ratios": [round(summary.largest, 3) for summary in summaries],
            "outlier_share": max(summary.share for summary in summaries),
            "outlier_shares": [round(summary.share, 5) for summary in summaries],
            "attention_on_background": max(float((block * self.test.is_background).sum(-1).mean()) for block in seen),
            "contents_at_outliers": explained(self.places),
            "contents_elsewhere": explained(~self.places),
            "cosine_twin": float(cosine.mean()),
            "verdict": report.verdict,
            "sinks": count_sinks(report.sinks),
        }
