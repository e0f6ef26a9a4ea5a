"""Registers without training: find the register neurons on a few images, and shift their activations.

After "Vision Transformers Don't Need Trained Registers" (arXiv 2506.08010), with what its procedure leaves to the user
found by itself: which patches are outliers and behind which block they appear (the audit's answer, from all images),
which hidden units write them, and how many of those it takes. Units are ranked on some images, and their number is
chosen on others, so that it is not chosen on what they were found on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import nn

from ..artifacts.rules.rules import Rule, resolve_rule, rule_name
from ..artifacts.rules.threshold import Threshold
from ..data.images import check_pixels
from ..errors import UnsupportedModelError
from ..features.passes import PassOptions, place_of
from ..towers.modes import evaluating
from ..towers.tower import Tower, find_tower
from ..tuner.config import RegisterConfig
from ..tuner.fields import check_name
from ..tuner.hooks.attention import reads_implementation
from ..tuner.layer import RegisterLayer, find_register_layer, require_register_layer
from ..tuner.peft_model import RegisterPeftModel, add_registers
from ..tuner.registers import RegisterTokens
from ..utils.arguments import check_number, check_whole
from .constants import constant_pairs
from .parts import Parts
from .repair import Repair, order_by_block
from .scores import Neuron
from .search import Search
from .team import ImageSource, Team
from .views import View

__all__ = ["fit_test_time_registers"]

#: A repair that leaves at most this part of the outliers is one.
ENOUGH = 0.05


def fit_test_time_registers(
    model: nn.Module,
    images: Any,
    *,
    image_processor: Any = None,
    num_registers: int = 1,
    remove: str = "zero",
    attention_bias: bool = False,
    gate: float | None = None,
    train_removal: bool = False,
    rule: str | Rule = "auto",
    threshold: float | None = None,
    top_block: int | None = None,
    num_neurons: int | None = None,
    max_neurons: int = 64,
    max_images: int | None = None,
    image_sizes: Sequence[int] | None = None,
    batch_size: int | None = None,
    adapter_name: str = "default",
    target_modules: str | None = None,
    strict: bool = False,
    progress: bool = True,
    shared: bool = False,
) -> RegisterPeftModel:
    """Repair a model with artifacts in seconds, without a gradient.

    Args:
        model: A base model with one vision tower; it gets a register adapter, as by ``add_registers``.
        images: What :func:`~register_adapter.artifacts.audit` takes: a folder, image files, a data set, or batches
            ``(B, 3, H, W)``. About a hundred are enough; no labels are needed. On the same images the audit and the
            fit find the same outliers, at the same layers.
        image_processor: For images that are not ready batches; by default the model's own.
        num_registers: Number R of registers that get the activations; more than one brings almost nothing.
        remove: What the other tokens keep, see :class:`RegisterConfig`.
        attention_bias: Have no token: the register's mean key and value in every block take its place, which needs
            transformers' attention interface.
        gate: Bias on the attention logits of the registers' keys, see :class:`RegisterConfig`; ``-1e9`` hides them, and
            what their neurons wrote is gone. That repairs a model that never used it, and hurts one that does:
            zero-shot accuracy of OpenCLIP fell from 70.4 to 55.6 in the paper. It needs transformers' attention
            interface too.
        train_removal: Give each neuron a trainable strength, for training from here.
        rule: The audit's rule for outliers, by name or itself.
        threshold: L2 norm above which a patch is an outlier behind block ``top_block``, in place of the rule.
        top_block: Index of the last block with register neurons; default: the one behind which outliers appear.
        num_neurons: How many neurons; default: the fewest that repair the held-out images.
        max_neurons: The most to try.
        max_images: Use at most this many images, the first ones; default: all, as the audit does.
        image_sizes: Sides in pixels, to which every batch is resized, pooling over all of them: neurons found at one
            resolution need not serve another. By default images keep their sizes.
        batch_size: Images per forward pass; default 32, and 8 on a CPU, whose caches hold no more.
        adapter_name: Name of the adapter.
        target_modules: Name of the vision tower, needed only where a model has several.
        strict: Refuse bad images instead of skipping them with a warning.
        progress: Show a progress bar.
        shared: Called in every process of ``accelerate launch`` with the same model and images: each looks at a part of
            them, and all end with the same registers, which are one process's to the rounding of batches of another
            size. The first 88 images, which are kept, are read by all. Bars and warnings are the main one's.

    Returns:
        The model with the adapter; ``model.peft_config[adapter_name].test_time_fit`` says what was found: the block,
        the thresholds, the share of outliers left by number of neurons on the held-out images (``curve``, behind the
        block where they appear), and before and after at the layer where it is largest
        (L2 norms before the final LayerNorm), by the thresholds of the model without registers. An audit of the model
        with them applies the rule anew, and may find a smaller group that still stands apart.

    Raises:
        NoArtifactsError: The audit's verdict on these images is ``"none"``; nothing was changed. The message says so
            where a few patches draw most of the attention all the same.
        RegisterAdapterError: Outliers are so rare that the images on which units are ranked have none; or patches are
            artifacts by what they do in attention, and their norms do not tell them from others.
        UnsupportedModelError: No single vision tower, or no MLPs that the table describes.
        ValueError: An argument is out of range, or there are fewer than three images.
        TypeError: An argument is of another kind.

    Example:
        >>> model = fit_test_time_registers(AutoModel.from_pretrained("facebook/dinov2-large"), "my_images")
        >>> model.save_pretrained("registers")
    """
    team = Team.of_all() if shared else Team()
    resolved, given = resolve_rule(rule), {}
    if threshold is not None and top_block is not None:
        given = {top_block + 1: Threshold("fixed", threshold, 0.0, True)}

    def open_source() -> ImageSource:
        check_name(adapter_name)
        RegisterConfig(num_registers=num_registers, remove=remove, gate=gate)  # says what is out of range, before work
        _check(model, num_neurons, max_neurons, threshold, top_block)
        tower = find_tower(model, target_modules)
        forms = {"attention_bias": attention_bias, "gate": gate is not None}
        _check_tower(tower, top_block, [name for name, wanted in forms.items() if wanted])
        _check_sizes(tower, image_sizes or ())
        options = PassOptions(
            image_processor=image_processor,
            batch_size=batch_size or (8 if place_of(tower)[0].type == "cpu" else 32),
            max_images=max_images,
            strict=strict,
            progress=progress,
        )
        return ImageSource(model, images, options, team, target_modules)

    source = team.each(open_source)
    sizes, most = image_sizes or (None,), num_neurons or max_neurons
    with closing(source.opened) as opened, opened.attached():
        parts = team.each(lambda: Parts(source))
        search = Search(opened.tower, sizes, resolved, rule_name(rule), given, top_block, most, team)
        views, top, candidates = search.run(parts)
    if num_neurons is not None and len(candidates) < num_neurons:
        raise ValueError(
            f"num_neurons={num_neurons}, and up to block {top} there are {len(candidates)} neurons to choose from; "
            "give fewer, or leave it out for the fewest that repair the images"
        )
    adapter = _Adapter(
        model,
        num_registers,
        adapter_name,
        {"init": "test_time", "remove": remove, "gate": gate, "target_modules": target_modules},
    )
    trial = _try(adapter, candidates, views, parts, num_neurons, attention_bias)
    record = _record(trial, views, parts, search.num_ranked, top, "fixed" if given else rule_name(rule))
    return team.each(
        lambda: adapter.attach(trial.chosen, trial.pairs, train_removal=train_removal, test_time_fit=record)
    )


def _check(
    model: nn.Module, num_neurons: int | None, max_neurons: int, threshold: float | None, top_block: int | None
) -> None:
    for name, value in (("num_neurons", num_neurons), ("max_neurons", max_neurons)):
        if value is not None or name == "max_neurons":
            check_whole(name, value, least=1)
    if top_block is not None:
        check_whole("top_block", top_block)
    if threshold is not None:
        check_number("threshold", threshold)
    if threshold is not None and (top_block is None or not threshold > 0):
        raise ValueError(
            f"threshold is a norm behind one block: give top_block too, and a number above 0 (got {threshold})"
        )
    if isinstance(model, PeftModel) or find_register_layer(model) is not None:
        raise ValueError(
            f"{type(model).__name__} carries an adapter already; fit on the base model (model.unload() gives it back), "
            "and load the result beside other adapters with load_adapters"
        )


def _check_tower(tower: Tower, top_block: int | None, forms: Sequence[str]) -> None:
    blocks = len(tower.part("blocks"))
    if top_block is not None and not 0 <= top_block < blocks:
        raise ValueError(f"top_block must be a block of the model, 0 to {blocks - 1}, got {top_block}")
    if forms and not reads_implementation(tower):
        raise UnsupportedModelError(
            f"{forms[0]} needs a model whose attention goes through transformers' attention interface; the blocks of "
            f"{type(tower.module).__name__} do not. Use a plain register in the sequence: leave out {forms[0]}."
        )


def _check_sizes(tower: Tower, sizes: Sequence[int]) -> None:
    patch = tower.patch_size or 1
    if isinstance(sizes, int | str):
        raise TypeError(f"image_sizes must be one or more sizes, such as (224, 518), got {sizes!r}")
    for size in sizes:
        check_whole("a size of image_sizes", size)
        if size < patch:
            raise ValueError(f"image_sizes has {size}, and a patch of {type(tower.module).__name__} has {patch} pixels")
        try:
            check_pixels(size, size)
        except ValueError as error:
            raise ValueError(f"image_sizes has {size}: {error}") from error


class FitRecord(dict[str, Any]):
    """What a fit has found, as the config keeps it: a dictionary with a short text."""

    def __repr__(self) -> str:
        """How many neurons, on how many images, and what is left of the outliers; all of it is in the items."""
        neurons = (
            f"{self['num_neurons']} neuron{'' if self['num_neurons'] == 1 else 's'} up to block {self['top_block']}"
        )
        return (
            f"<fit of {neurons}, rule {self['rule']}, {self['num_images']['detect']} images: beyond the "
            f"base's threshold {self['share_before']:.2%} before, {self['share_after']:.2%} after, of held-out patches>"
        )


class _Trial(NamedTuple):
    """What the held-out images say about the candidates.

    Attributes:
        chosen: The neurons to shift, the best first.
        before: Share of outliers at the layer where it is largest, without a shift.
        after: The same with it.
        curve: Number of neurons to the share that is left behind the block where outliers appear.
        pairs: ``(blocks, 2, R, D)`` keys and values for the attention-bias form.
    """

    chosen: list[Neuron]
    before: float
    after: float
    curve: dict[int, float]
    pairs: torch.Tensor | None


def _try(
    adapter: _Adapter,
    candidates: list[Neuron],
    views: list[View],
    parts: Parts,
    num_neurons: int | None,
    attention_bias: bool,
) -> _Trial:
    """Third phase: how many neurons it takes, with all candidates on the model for as long as that is measured."""
    _, ranks = order_by_block(candidates)
    held_out = [(view.thresholds, [view.resized(batch) for batch in parts.held_out]) for view in views]
    team = parts.source.team
    with ExitStack() as stack:
        layer = team.each(lambda: stack.enter_context(adapter.attached(candidates)))
        stack.enter_context(evaluating(layer.tower.module))
        repair = Repair(layer, adapter.name, ranks, held_out, team)
        number = len(candidates)
        if num_neurons is None:
            number = repair.choose(ENOUGH, [neuron.score for neuron in candidates])
        before, after = repair.left(0), repair.left(number)
        pairs = None
        if attention_bias:
            repair.shift(number)
            pairs = constant_pairs(layer, adapter.name, [batch for _, batches in held_out for batch in batches], team)
    return _Trial(candidates[:number], before, after, repair.curve, pairs)


@dataclass
class _Adapter:
    """The adapter that is fitted: the model it goes onto, and the arguments of ``add_registers`` that are known."""

    model: nn.Module
    num_registers: int
    name: str
    options: dict[str, Any]

    def attach(self, neurons: list[Neuron], pairs: torch.Tensor | None = None, **options: Any) -> RegisterPeftModel:
        """Put the adapter onto the model, with these neurons."""
        units, ranks = order_by_block(neurons)
        form = {} if pairs is None else {"key_value": True}
        options = {**self.options, **form, **options}
        model = add_registers(self.model, self.num_registers, self.name, register_neurons=units, **options)
        tokens = require_register_layer(model).tokens(self.name)
        _set_usual(tokens, neurons, ranks)
        if pairs is not None:
            tokens.weight.data.copy_(pairs)
        return model

    @contextmanager
    def attached(self, neurons: list[Neuron]) -> Iterator[RegisterLayer]:
        """The adapter is on the model inside, and the model is as before afterwards."""
        states = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        model = self.attach(neurons)
        try:
            yield require_register_layer(model)
        finally:
            model.unload()
            for parameter, state in states:
                parameter.requires_grad_(state)


def _record(trial: _Trial, views: list[View], parts: Parts, num_ranked: int, top: int, rule: str) -> dict[str, Any]:
    """What the adapter's config says about the fit."""
    values = {
        "rule": rule,
        "verdict": views[0].verdict,
        "reason": views[0].reason,
        "top_block": top,
        "num_neurons": len(trial.chosen),
        "image_sizes": [view.size for view in views],
        "thresholds": [
            {str(index): [threshold.low, threshold.high] for index, threshold in view.thresholds.items()}
            for view in views
        ],
        "num_images": {"detect": parts.num_images, "rank": num_ranked, "held_out": parts.num_held_out},
        "share_before": trial.before,
        "share_after": trial.after,
        "curve": {str(count): share for count, share in sorted(trial.curve.items())},
        "scores": [round(neuron.score, 6) for neuron in trial.chosen],
    }
    return FitRecord(values)


def _set_usual(tokens: RegisterTokens, neurons: list[Neuron], ranks: torch.Tensor) -> None:
    """Write what usual patches have, in the order in which the tokens hold the neurons."""
    usual, limits = torch.zeros(len(neurons)), torch.zeros(len(neurons))
    usual[ranks] = torch.tensor([neuron.usual for neuron in neurons])
    limits[ranks] = torch.tensor([neuron.limit for neuron in neurons])
    tokens.set_usual(usual, limits)
