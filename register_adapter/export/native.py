"""Export to a plain model with native registers: no trace of this package is left.

For a Hugging Face tower the native class is a row of :data:`NATIVE`; a timm tower stays of its class, which has
``reg_tokens``. Every export is compared with the model it comes from before it is handed out.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..errors import UnsupportedModelError
from ..utils.arguments import check_whole
from .comparison import check_equal
from .subject import OTHER_FORMS, Subject, plain_state
from .subject import example_inputs as made_up
from .timm_native import export_timm, is_timm, save_timm
from .whole import model_folder

__all__ = ["NATIVE", "NativeClass", "export_native", "save_native"]


@dataclass(frozen=True)
class NativeClass:
    """The class with native registers that a Hugging Face class becomes.

    Attributes:
        name: Class of transformers.
        tower: Names of the tower below the old and below the new class, where they have a head.
        head: Name of the linear layer with one row a label, if there is one.
        registers: Name of the registers' parameter below the tower, ``(1, R, D)``.
        count: Attribute of the config with their number.
    """

    name: str
    tower: tuple[str, str] | None = None
    head: str | None = None
    registers: str = "embeddings.register_tokens"
    count: str = "num_register_tokens"


_REGISTERS = "dinov2_with_registers"
_CLASSIFIER = "Dinov2WithRegistersForImageClassification"
# These have registers already, and take more of them.
_TAKE_MORE = (
    *("Dinov2WithRegistersModel", "Dinov2WithRegistersBackbone", "DINOv3ViTModel", "DINOv3ViTBackbone"),
    *("Sapiens2Model", "Sapiens2Backbone", "Tipsv2VisionModel", "Tipsv2VisionBackbone"),
)

# Class of transformers -> what it becomes.
NATIVE: dict[str, NativeClass] = {
    "Dinov2Model": NativeClass("Dinov2WithRegistersModel"),
    "Dinov2Backbone": NativeClass("Dinov2WithRegistersBackbone"),
    "Dinov2ForImageClassification": NativeClass(_CLASSIFIER, ("dinov2", _REGISTERS), "classifier"),
    _CLASSIFIER: NativeClass(_CLASSIFIER, (_REGISTERS, _REGISTERS), "classifier"),
    **{name: NativeClass(name) for name in _TAKE_MORE},
}


def export_native(
    model: nn.Module, image_size: int | None = None, example_inputs: dict[str, torch.Tensor] | None = None
) -> Any:
    """Turn a model with a register adapter into a plain model whose registers are its own.

    DINOv2 becomes ``Dinov2WithRegisters…``, a model with k native registers (DINOv3, …) gets k + R, a timm model the
    same with ``reg_tokens``. CLS and patch tokens are the same numbers as before; a bare tower returns the registers
    too, between CLS (or its native registers) and the patches, as its class does. Several active adapters are joined in
    the order of activation. The result is in evaluation mode, shares no memory with ``model``, and all of it is
    trainable, as after ``from_pretrained``; ``model`` is not changed.

    Args:
        model: The result of ``add_registers`` or ``PeftModel.from_pretrained``, or a Hugging Face model with
            ``add_adapter``.
        image_size: Side of the images in pixels, default the config's. At any other size DINOv2 resizes its position
            embeddings without and DINOv2 with registers with antialiasing, so the numbers differ; given here, they are
            resized once, as DINOv2 does it, and the result is exact at this size. Not for timm, which has one way.
        example_inputs: Tensors by name for one forward pass, with which the result is compared with ``model``; needed
            where a model wants more than images.

    Returns:
        A transformers or timm model. Save it with :func:`save_native`, or with ``save_pretrained`` of its own.

    Raises:
        UnsupportedModelError: The family has no class with registers, or the model around the tower would read them.
        ValueError: No active registers, other adapters beside them (merge those first), a mode of registers that has no
            native equivalent, or no inputs could be made up.
        AdapterFileError: An active adapter still waits for its values.

    Example:
        >>> plain = export_native(PeftModel.from_pretrained(base, "me/dinov2-base-registers"), image_size=224)
        >>> plain.save_pretrained("dinov2-base-with-registers")
    """
    subject = Subject.of(model)
    with subject.layer.staying():  # whatever other threads set meanwhile
        subject.check_native()
        if is_timm(subject.tower):
            if image_size is not None:
                raise ValueError("image_size is for transformers' DINOv2 only; a timm model is exact at every size")
            plain = export_timm(subject)
        else:
            plain = _export_transformers(subject, image_size)
        check_equal(subject, plain, made_up(subject, image_size) if example_inputs is None else example_inputs)
    return plain


def save_native(model: nn.Module, folder: str | Path, model_args: dict[str, Any] | None = None) -> None:
    """Save what :func:`export_native` returned, for people who never installed this package.

    A transformers model is saved by its own ``save_pretrained``, a timm model as timm does it for the Hub: weights as
    safetensors and a config that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` reads.

    Args:
        model: The exported model.
        folder: The folder, made if it does not exist.
        model_args: For timm only: the arguments of ``timm.create_model`` that the model was made with. Recent releases
            of timm remember them; the number of registers is added in any case.

    Raises:
        ValueError: ``model`` is neither, or timm cannot make it again from the arguments.
        OSError: A file cannot be written; what was there before is untouched.
    """
    if isinstance(model, PreTrainedModel):
        with model_folder(folder) as scratch:
            model.save_pretrained(scratch)
    else:
        save_timm(model, Path(folder), model_args or {})


def _export_transformers(subject: Subject, image_size: int | None) -> PreTrainedModel:
    base = subject.base
    path = _native_part(subject)
    row = NATIVE[type(base.get_submodule(path)).__name__]
    new, old = f"{path}." if path else "", f"{subject.path}." if subject.path else ""
    state = plain_state(subject)
    if row.tower is not None:
        state = {_renamed(key, new, *row.tower): value for key, value in state.items()}
        old = f"{new}{row.tower[1]}."
    values = subject.registers(state[f"{old}embeddings.cls_token"])
    native = state.get(old + row.registers)
    values = values.unsqueeze(0) if native is None else torch.cat([native, values.unsqueeze(0)], dim=1)
    state[old + row.registers] = values
    options = {row.count: values.shape[1]}
    if image_size is not None:
        state[f"{old}embeddings.position_embeddings"] = _positions(subject, image_size)
        options["image_size"] = image_size
    if row.head is not None and f"{new}{row.head}.weight" in state:
        options["num_labels"] = len(state[f"{new}{row.head}.weight"])
    config = _native_config(base, path, row, options)
    with torch.random.fork_rng(devices=[]):  # the random weights below are replaced at once
        plain: PreTrainedModel = type(base)(config) if path else getattr(transformers, row.name)(config)
    mask = f"{old}embeddings.mask_token"
    if mask in plain.state_dict():  # a DINOv2 may be without one, which only masked patches read
        state.setdefault(mask, torch.zeros_like(values[:, 0]))
    _load(plain, state)
    plain.tie_weights()
    plain.config.dtype = values.dtype
    if hasattr(base, "generation_config"):
        plain.generation_config = copy.deepcopy(base.generation_config)
    return plain.requires_grad_(True).eval()


def _load(plain: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Give a model its weights; every one of them is there, and none is left over."""
    saved = plain.state_dict().keys()
    for name, _ in list(plain.named_buffers()):
        if name not in saved and name in state:
            # A cast of the base has gone through these too.
            owner, _, last = name.rpartition(".")
            setattr(plain.get_submodule(owner), last, state.pop(name))
    plain.load_state_dict(state, strict=True, assign=True)


def _native_part(subject: Subject) -> str:
    """Dotted name of the outermost module that holds the tower and has a row in :data:`NATIVE`.

    Raises:
        UnsupportedModelError: There is none, or the model around it cannot be built again from a config.
    """
    tower, base = subject.tower, subject.base
    parts = subject.path.split(".") if subject.path else []
    paths = [".".join(parts[:depth]) for depth in range(len(parts) + 1)]
    path = next((path for path in paths if type(base.get_submodule(path)).__name__ in NATIVE), None)
    if path is None:
        raise UnsupportedModelError(
            f"{type(tower).__name__} has no class with native registers. Those with one are {', '.join(NATIVE)}, and "
            f"timm's VisionTransformer and Eva. {OTHER_FORMS}"
        )
    if not isinstance(base, PreTrainedModel):
        raise UnsupportedModelError(
            f"{type(base).__name__} around the {type(tower).__name__} is not a transformers model and cannot be built "
            f"again from a config. Export the tower: export_native(model.{path}), and put it into your model."
        )
    return path


def _renamed(key: str, start: str, old: str, new: str) -> str:
    return f"{start}{new}.{key.removeprefix(f'{start}{old}.')}" if key.startswith(f"{start}{old}.") else key


def _native_config(base: nn.Module, path: str, row: NativeClass, options: dict[str, int]) -> PretrainedConfig:
    """The config of the whole model, with that of the native class in its place."""
    part: Any = base.get_submodule(path)
    kind = getattr(transformers, row.name).config_class
    given = part.config.to_dict()
    for key in ("model_type", "architectures", "transformers_version", "use_mask_token"):
        given.pop(key, None)
    if options.get("num_labels") == part.config.num_labels:
        options.pop("num_labels")
    elif "num_labels" in options:  # a trained head with classes of its own: the old names are not theirs
        given.pop("id2label", None)
        given.pop("label2id", None)
    config: PretrainedConfig = kind.from_dict({**given, **options})
    config._attn_implementation = part.config._attn_implementation
    if not path or type(base.config) is kind:  # a head may share the config of its tower
        return config
    whole: Any = copy.deepcopy(base.config)
    owners = _owners(whole, part.config)
    if len(owners) != 1:
        raise UnsupportedModelError(
            f"cannot tell where the config of {type(base).__name__} holds that of its {type(part).__name__} "
            f"({len(owners)} places). Export the tower: export_native(model.{path})."
        )
    setattr(*owners[0], config)
    return whole


def _owners(config: PretrainedConfig, part: PretrainedConfig) -> list[tuple[PretrainedConfig, str]]:
    """Where a config holds one of the class and shape of ``part``: pairs of its owner and the attribute."""
    owners: list[tuple[PretrainedConfig, str]] = []
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            same = type(value) is type(part) and value.num_hidden_layers == part.num_hidden_layers
            owners += [(config, name)] if same else _owners(value, part)
    return owners


def _positions(subject: Subject, image_size: int) -> torch.Tensor:
    """``(1, 1 + patches, D)`` position embeddings for another size, resized as the base itself does it."""
    embeddings: Any = subject.layer.tower.part("embeddings")
    positions = getattr(embeddings, "position_embeddings", None)
    size = subject.layer.tower.patch_size
    if positions is None or size is None:
        raise ValueError(f"{type(subject.tower).__name__} has no position embeddings to resize; leave out image_size")
    check_whole("image_size", image_size)
    patches = (max(image_size, 0) // size) ** 2
    if patches < 1:
        raise ValueError(f"image_size={image_size} is smaller than one patch of {size} pixels")
    with torch.no_grad():
        like = positions.new_zeros(1, 1 + patches, positions.shape[-1])
        resized: torch.Tensor = embeddings.interpolate_pos_encoding(like, image_size, image_size)
    return resized.detach().clone()
