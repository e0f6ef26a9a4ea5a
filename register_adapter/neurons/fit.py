"""Registers without training: find the register neurons on a few pictures, and shift their activations.

After "Vision Transformers Don't Need Trained Registers" (arXiv 2506.08010), with what its procedure leaves to the user
found by itself: which patches are outliers (the audit's rule), behind which block they appear, which hidden units write
them, and how many of those it takes. Pictures have three parts, so that nothing is chosen on what it was found on:
outliers are found on the first, units are ranked on the second, and their number is chosen on the third.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from tqdm.auto import tqdm

from ..artifacts.rules.cut import Cut
from ..artifacts.rules.rules import Rule, resolve_rule, rule_name
from ..data.batches import ImageBatches
from ..errors import NoArtifactsError, UnsupportedModelError
from ..features.running import place_of, source_of
from ..towers.modes import evaluating
from ..towers.tower import Tower, find_tower
from ..tuner.hooks.attention import reads_implementation
from ..tuner.layer import find_register_layer, require_register_layer
from ..tuner.peft_model import RegisterPeftModel, add_registers
from ..tuner.registers import RegisterTokens
from .constants import constant_pairs
from .parts import Parts
from .repair import Repair, order_by_block
from .scores import Neuron, NeuronScores, pool
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
    train_removal: bool = False,
    rule: str | Rule = "auto",
    threshold: float | None = None,
    top_layer: int | None = None,
    num_neurons: int | None = None,
    max_neurons: int = 64,
    max_images: int = 256,
    image_sizes: Sequence[int] | None = None,
    batch_size: int | None = None,
    adapter_name: str = "default",
    target_modules: str | None = None,
    strict: bool = False,
    progress: bool = True,
) -> RegisterPeftModel:
    """Repair a model with artifacts in seconds, without a gradient.

    Args:
        model: A base model with one vision tower; it gets a register adapter, as by ``add_registers``.
        images: What :func:`~register_adapter.artifacts.audit` takes: a folder, pictures, a data set, or batches
            ``(B, 3, H, W)``. About a hundred are enough; no labels are needed.
        image_processor: For pictures that are no batches; default the model's own.
        num_registers: Number R of registers that get the activations; more than one brings almost nothing.
        remove: What the other tokens keep, see :class:`RegisterConfig`.
        attention_bias: Have no token: the register's mean key and value in every block take its place, which needs
            transformers' attention interface.
        train_removal: Give each neuron a trainable strength, for training from here.
        rule: The audit's rule for outliers, by name or itself.
        threshold: L2 norm above which a patch is an outlier behind block ``top_layer``, in place of the rule.
        top_layer: Index of the last block with register neurons; default: the one behind which outliers appear.
        num_neurons: How many neurons; default: the fewest that repair the held-out pictures.
        max_neurons: The most to try.
        max_images: Use no more pictures.
        image_sizes: Sides in pixels, to which every batch is resized, pooling over all of them: neurons found at one
            resolution need not serve another. Default: as the pictures come.
        batch_size: Pictures a forward pass; default 32, and 8 on a CPU, whose caches hold no more.
        adapter_name: Name of the adapter.
        target_modules: Name of the vision tower, needed only where a model has several.
        strict: Refuse bad pictures instead of skipping them with a warning.
        progress: Show a progress bar.

    Returns:
        The model with the adapter; ``model.peft_config[adapter_name].test_time_fit`` says what was found: the block,
        the cuts, the share of outliers left by number of neurons on the held-out pictures (``curve``, behind the block
        where they appear), and before and after at the layer where it is largest (L2 norms before the final LayerNorm).

    Raises:
        NoArtifactsError: The rule finds no outliers; nothing is to be done, and nothing was changed.
        UnsupportedModelError: No single vision tower, or no MLPs that the table describes.
        ValueError: An argument is out of range, or there are fewer than three pictures.

    Example:
        >>> model = fit_test_time_registers(AutoModel.from_pretrained("facebook/dinov2-large"), "my_pictures")
        >>> model.save_pretrained("registers")
    """
    _check(model, num_neurons, max_neurons, threshold, top_layer)
    tower = find_tower(model, target_modules)
    blocks = len(tower.part("blocks"))
    if top_layer is not None and not 0 <= top_layer < blocks:
        raise ValueError(f"top_layer must be a block of the model, 0 to {blocks - 1}, got {top_layer}")
    if attention_bias and not reads_implementation(tower):
        raise UnsupportedModelError(
            "attention_bias needs a model whose attention goes through transformers' attention interface; the blocks "
            f"of {type(tower.module).__name__} do not. Use a register in the sequence (attention_bias=False)."
        )
    resolved = resolve_rule(rule)
    by_hand = {} if threshold is None or top_layer is None else {top_layer + 1: Cut("fixed", threshold, 0.0, True)}
    device, dtype = place_of(tower)
    source = ImageBatches(
        images,
        image_processor,
        model_name=source_of(model, tower),
        batch_size=batch_size or (8 if device.type == "cpu" else 32),
        max_images=max_images,
        strict=strict,
    )
    bar = tqdm(total=source.total, desc="fitting registers", unit="image", disable=not progress)
    with bar, evaluating(tower.module):
        parts = Parts(source.on(device, dtype, tower.module), bar)
        views = [View(size) for size in (image_sizes or (None,))]
        for view in views:
            view.detect(tower, parts.detect, resolved, by_hand)
        found = [view for view in views if view.cuts]
        if not found:
            raise NoArtifactsError(
                f"{type(tower.module).__name__} needs no registers: the rule {rule_name(rule)!r} finds no artifacts on "
                f"{parts.num_detect} pictures ({views[0].reason}). Nothing was changed. To go on all the same, give "
                "threshold= and top_layer=."
            )
        top = top_layer if top_layer is not None else max(min(view.cuts) for view in found) - 1
        candidates = _rank(tower, found, top, parts, num_neurons or max_neurons)
    neurons, ranks = order_by_block(candidates)
    options: dict[str, Any] = {"init": "test_time", "remove": remove, "target_modules": target_modules}
    states = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    tried = add_registers(model, num_registers, adapter_name, register_neurons=neurons, **options)
    try:
        layer = require_register_layer(tried)
        _set_usual(layer.tokens(adapter_name), candidates, ranks)
        pictures = [(view.cuts, [view.resized(batch) for batch in parts.held_out]) for view in found]
        with evaluating(tower.module):
            repair = Repair(layer, adapter_name, ranks, pictures)
            number = len(candidates)
            if num_neurons is None:
                number = repair.choose(ENOUGH, [neuron.score for neuron in candidates])
            before, after = repair.left(0), repair.left(number)
            pairs = None
            if attention_bias:
                repair.shift(number)
                pairs = constant_pairs(layer, adapter_name, [b for _, batches in pictures for b in batches])
    finally:
        tried.unload()
        for parameter, state in states:
            parameter.requires_grad_(state)
    chosen = candidates[:number]
    fit = {
        "rule": rule_name(rule) if not by_hand else "fixed",
        "verdict": found[0].verdict,
        "reason": found[0].reason,
        "top_layer": top,
        "num_neurons": number,
        "image_sizes": [view.size for view in found],
        "cuts": [{str(index): [cut.low, cut.high] for index, cut in view.cuts.items()} for view in found],
        "num_images": {"detect": parts.num_detect, "rank": parts.num_ranked, "held_out": parts.num_held_out},
        "share_before": before,
        "share_after": after,
        "curve": {str(count): share for count, share in sorted(repair.curve.items())},
        "scores": [round(neuron.score, 6) for neuron in chosen],
    }
    neurons, ranks = order_by_block(chosen)
    if pairs is not None:
        options["key_value"] = True
    fitted = add_registers(
        model,
        num_registers,
        adapter_name,
        register_neurons=neurons,
        train_removal=train_removal,
        test_time_fit=fit,
        **options,
    )
    layer = require_register_layer(fitted)
    _set_usual(layer.tokens(adapter_name), chosen, ranks)
    if pairs is not None:
        layer.tokens(adapter_name).weight.data.copy_(pairs)
    return fitted


def _check(
    model: nn.Module, num_neurons: int | None, max_neurons: int, threshold: float | None, top_layer: int | None
) -> None:
    for name, value in (("num_neurons", num_neurons), ("max_neurons", max_neurons)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if threshold is not None and (top_layer is None or not threshold > 0):
        raise ValueError(
            f"threshold is a norm behind one block: give top_layer too, and a number above 0 (got {threshold})"
        )
    if isinstance(model, PeftModel) or find_register_layer(model) is not None:
        raise ValueError(
            f"{type(model).__name__} carries an adapter already; fit on the base model (model.unload() gives it back), "
            "and load the result beside other adapters with load_adapters"
        )


def _rank(tower: Tower, views: list[View], top: int, parts: Parts, most: int) -> list[Neuron]:
    """The units that add most to the outliers, over all views."""
    scores = [NeuronScores(tower, view.cut_behind(top), top) for view in views]
    for batch in parts.ranking():
        for view, one in zip(views, scores, strict=True):
            one.add(view.resized(batch))
    if not any(one.num_outliers for one in scores):
        raise NoArtifactsError(
            f"no patch of {parts.num_ranked} pictures is an outlier behind block {top} ({views[0].cut_behind(top)}); "
            "give more pictures, or another threshold"
        )
    return pool([one.ranked(most) for one in scores if one.num_outliers], most)


def _set_usual(tokens: RegisterTokens, neurons: list[Neuron], ranks: torch.Tensor) -> None:
    """Write what usual patches have, in the order in which the tokens hold the neurons."""
    usual, limits = torch.zeros(len(neurons)), torch.zeros(len(neurons))
    usual[ranks] = torch.tensor([neuron.usual for neuron in neurons])
    limits[ranks] = torch.tensor([neuron.limit for neuron in neurons])
    tokens.set_usual(usual, limits)
