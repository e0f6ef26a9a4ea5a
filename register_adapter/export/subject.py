"""What is exported: the model below PEFT's wrapper, its register layer, and the checks that all exports share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from ..data.images import check_pixels
from ..errors import AdapterFileError
from ..towers.anatomy import resolve
from ..tuner.layer import RegisterLayer
from ..tuner.registers import Segment
from ..utils.parameters import check_module

__all__ = ["OTHER_FORMS", "Subject", "call", "example_inputs", "plain_state"]

#: What a model without a native form is exported by.
OTHER_FORMS = "Use export_onnx(model, path) or export_program(model, path); in a command --format onnx or program."


@dataclass(frozen=True)
class Subject:
    """A model with active registers.

    Attributes:
        base: The model, PEFT's wrapper taken off.
        layer: The layer that holds its registers.
        path: Dotted name of the vision tower below ``base``, ``""`` if that is the tower itself.
    """

    base: nn.Module
    layer: RegisterLayer
    path: str

    @classmethod
    def of(cls, model: nn.Module) -> Subject:
        """Find the registers of a model.

        Raises:
            ValueError: No registers, registers on several towers, none of them active, or weights on the meta device.
            AdapterFileError: An active adapter still waits for its values.
        """
        check_module(model)
        base: nn.Module = model.get_base_model() if isinstance(model, PeftModel) else model
        layers = [(path, module) for path, module in base.named_modules() if isinstance(module, RegisterLayer)]
        if len(layers) != 1:
            places = f"{len(layers)} vision towers with registers: {[path for path, _ in layers]}" if layers else "none"
            raise ValueError(
                f"an export needs a model with the registers of one vision tower, {type(base).__name__} has {places}. "
                "Give the result of add_registers or PeftModel.from_pretrained, or one tower of a larger model."
            )
        path, layer = layers[0]
        active = [name for name in cast("list[str]", layer.active_adapters) if name in layer.names]
        if layer.disable_adapters or not active:
            state = "disabled" if layer.disable_adapters else "not active"
            raise ValueError(
                f"the register adapters {layer.names} are {state}, so there is nothing to export: leave "
                "disable_adapter(), or activate what shall be exported with set_adapter(...)."
            )
        if waiting := [name for name in active if layer.tokens(name).pending]:
            raise AdapterFileError(f"the adapters {waiting} got no values from their files; nothing can be exported")
        if absent := [name for name, tensor in base.state_dict().items() if tensor.is_meta]:
            raise ValueError(
                f"{len(absent)} weights, such as {absent[0]!r}, are not at hand (meta device or offloaded): load the "
                "model without offloading to export it."
            )
        return cls(base, layer, path.rpartition(".")[0])

    @property
    def tower(self) -> nn.Module:
        """The vision tower."""
        return self.layer.tower.module

    @property
    def segments(self) -> list[Segment]:
        """The active registers, in the order in which they stand in the sequence."""
        return self.layer.segments

    def registers(self, like: torch.Tensor) -> torch.Tensor:
        """All active registers, ``(R, D)``, a copy in the dtype and on the device of ``like``."""
        values = [tokens(like) for segment in self.segments for tokens in segment.tokens]
        return torch.cat(values).detach().clone()

    def check_native(self) -> None:
        """Check that the registers can be tokens of the model's own.

        Raises:
            ValueError: Another adapter is on the model, the weights are quantised, or the registers are not tokens that
                enter behind the embeddings.
        """
        others = sorted(
            {type(m).__name__ for m in self.base.modules() if isinstance(m, BaseTunerLayer) and m is not self.layer}
        )
        if others:
            raise ValueError(
                f"other adapters are on the model beside the registers (layers: {', '.join(others)}). Merge them "
                "first, with their merge_and_unload(), which leaves the registers, or take them off with unload()."
            )
        if getattr(self.base, "hf_quantizer", None) is not None:
            raise ValueError("the base model is quantised: load it without quantisation, add the adapter, and export")
        for segment in self.segments:
            place = segment.placement
            unlike = [name for name in ("insert_layer", "deep", "key_value") if getattr(place, name)]
            unlike += ["gate"] if any(tokens.gate is not None for tokens in segment.tokens) else []
            unlike += ["register_neurons"] if any(tokens.slices for tokens in segment.tokens) else []
            if unlike:
                raise ValueError(
                    f"native registers enter once, as tokens, behind the embeddings; these have {', '.join(unlike)}, "
                    f"which no native class has. {OTHER_FORMS}"
                )


def plain_state(subject: Subject) -> dict[str, torch.Tensor]:
    """The base's state-dict as if no adapter had ever been on it, trained heads in place of the base's.

    Returns:
        Copies, nothing shares memory with the base; buffers that are not saved (rotary frequencies) are among them.
    """
    own = f"{subject.path}." if subject.path else ""
    heads = {path: m for path, m in subject.base.named_modules() if isinstance(m, ModulesToSaveWrapper)}
    state = {}
    for key, value in (dict(subject.base.named_buffers()) | subject.base.state_dict()).items():
        if key.startswith(f"{own}registers."):
            continue
        head = next((path for path in heads if key.startswith(f"{path}.")), None)
        if head is not None:
            trained = f"{head}.modules_to_save.{heads[head].active_adapter}."
            if not key.startswith(trained):
                continue
            key = f"{head}.{key.removeprefix(trained)}"
        state[key] = value.detach().clone()
    return state


def example_inputs(subject: Subject, image_size: int | None = None, batch: int = 2) -> dict[str, torch.Tensor]:
    """A random batch of images under the name that the model's forward gives to it.

    Args:
        subject: What is exported.
        image_size: Side of the images in pixels; default the size that the model was made for.
        batch: Number of images; from 2 on a traced graph does not take the batch for a constant.

    Returns:
        ``{name: (batch, channels, height, width)}`` in the dtype and on the device of the patch embedding.

    Raises:
        ValueError: The size of an image is not known, less than a patch or far too large; or the model needs more than
            images.
    """
    tower = subject.layer.tower
    name = getattr(subject.base, "main_input_name", "x")
    size = image_size or tower.image_size
    if size is None or name not in ("pixel_values", "x"):
        raise ValueError(
            f"cannot make up inputs for {type(subject.base).__name__} (main input {name!r}, image size {size}): give "
            "example_inputs={'pixel_values': ..., ...}, the tensors of one forward pass by name, to export_onnx, "
            "export_program or export_native in Python. A command makes up images alone."
        )
    height, width = (size, size) if isinstance(size, int) else size
    weight: torch.Tensor = tower.part("patch_embedding").weight
    if isinstance(tower.patch_size, int) and min(height, width) < tower.patch_size:
        raise ValueError(f"image_size={size} is smaller than one patch of {tower.patch_size} pixels")
    try:
        check_pixels(width, height)
    except ValueError as error:
        raise ValueError(f"image_size={size} is too large: {error}") from error
    channels = resolve(tower.module, "config.num_channels") or weight.shape[1]
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(batch, channels, height, width, generator=generator).to(weight)}


def call(model: nn.Module, inputs: dict[str, torch.Tensor]) -> Any:
    """Run a model on inputs by name; ``x`` stands for the one argument of timm's and torchvision's models."""
    return model(*inputs.values()) if list(inputs) == ["x"] else model(**inputs)
