"""The search for vision towers in a model."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedModelError
from ..utils.parameters import check_module
from .anatomy import Anatomy, resolve
from .calls import as_named, unwrapped
from .families import FAMILIES, REFUSED
from .libraries import CONDITIONS, STACKS, VARIANTS

__all__ = ["ROWS", "Tower", "find_tower", "find_towers"]

#: The whole table: class name of a tower, or ``package.ClassName``, to its row.
ROWS: dict[str, Anatomy] = {**FAMILIES, **STACKS}

# Where towers of transformers, timm and OpenCLIP say the size of their images.
_IMAGE_SIZES = ("config.image_size", "patch_embed.img_size", "image_size")
# Where towers of the supported libraries say the width of a token.
_WIDTHS = ("config.hidden_size", "embed_dim", "hidden_dim", "transformer.width")


@dataclass(frozen=True)
class Tower:
    """A vision tower found in a model.

    Attributes:
        path: Dotted name below the model, ``""`` if the model is itself the tower.
        module: The tower.
        anatomy: Its row.
    """

    path: str
    module: nn.Module
    anatomy: Anatomy

    def part(self, field: str) -> Any:
        """What the anatomy's path ``field`` leads to, or ``None``."""
        part = resolve(self.module, getattr(self.anatomy, field))
        # FSDP may wrap the list itself.
        return unwrapped(part) if field == "blocks" and not hasattr(type(part), "__len__") else part

    def block_part(self, index: int, field: str) -> Any:
        """The same below block ``index``."""
        block = self.part("blocks")[index]
        part = resolve(block, getattr(self.anatomy, field))
        # DINOv3 calls the only layer into an MLP that is not gated "up".
        only = field == "mlp_up" and part is resolve(block, self.anatomy.mlp_in)
        return None if only else part

    def parts(self, field: str) -> Iterator[tuple[int | None, Any]]:
        """``(block, part)`` for every block that has what the path ``field`` names, ``(None, part)`` for the tower."""
        for index, block in enumerate(self.part("blocks")):
            if (part := resolve(block, getattr(self.anatomy, field))) is not None:
                yield index, part
        if (part := self.part(field)) is not None:
            yield None, part

    def normed(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What leaves the last block ``(B, N, D)``, behind the final LayerNorm if this model norms patch tokens."""
        norm = self.part("final_norm") if self.anatomy.norm_patches else None
        # Not through __call__: registers leave by a hook on this very module.
        return hidden_states if norm is None else norm.forward(hidden_states)

    def run(self, inputs: torch.Tensor | Mapping[str, Any]) -> Any:
        """Call the tower, at any image size that it can take.

        Args:
            inputs: Pixel values ``(B, 3, H, W)``, or the tower's own keywords, such as an image processor's output.
        """
        keywords = inspect.signature(self.module.forward).parameters
        extra = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in keywords else {}
        if isinstance(inputs, torch.Tensor):
            return self.module(inputs, **extra)
        return self.module(**{**extra, **as_named(inputs, keywords)})

    @property
    def config(self) -> Any:
        """The tower's own config, ``None`` for a plain module."""
        return getattr(self.module, "config", None)

    @property
    def prefix(self) -> int:
        """Number of tokens before the registers: CLS and the like, and native registers."""
        return self.anatomy.prefix + int(self.part("native_registers") or 0)

    @property
    def hidden_size(self) -> int:
        """Width D of a token.

        Raises:
            UnsupportedModelError: Neither the anatomy nor the tower's config says it.
        """
        size = self.anatomy.hidden_size or resolve(self.module, _WIDTHS)
        if not isinstance(size, int):
            raise UnsupportedModelError(
                f"cannot tell the hidden size of {type(self.module).__name__}: it has none of {', '.join(_WIDTHS)}. "
                "Give it in the Anatomy (hidden_size=...)."
            )
        return size

    @property
    def patch_size(self) -> int | None:
        """Side of a patch in pixels, where the tower's config or its patch embedding says it."""
        size = getattr(self.config, "patch_size", None)
        if size is None:
            # An adapter's layer around it (LoRA on the convolution) does not say.
            part = self.part("patch_embedding")
            size = getattr(getattr(part, "base_layer", part), "kernel_size", None)
        return size[0] if isinstance(size, list | tuple) else size

    @property
    def image_size(self) -> int | tuple[int, int] | None:
        """Side, or height and width, in pixels of the images that the tower was made for, where it says them."""
        size = resolve(self.module, _IMAGE_SIZES)
        if size is None and isinstance(self.config, Mapping):  # a module of the user's
            size = self.config.get("image_size")
        return tuple(size) if isinstance(size, list) else size

    @property
    def missing(self) -> list[str]:
        """Names of the hook points that the anatomy describes and the module does not have."""
        parts = {field: self.part(field) for field in ("embeddings", "remove", "blocks")}
        absent = [field for field, part in parts.items() if part is None or (field == "blocks" and not len(part))]
        if self.anatomy.method_counter and self.part("method_counter") is None:
            absent.append("method_counter")
        for field in ("pass_methods", "methods", "counted_methods"):
            if any(resolve(self.module, method) is None for method in getattr(self.anatomy, field)):
                absent.append(field)
        return absent


def find_towers(model: nn.Module) -> Iterator[Tower]:
    """Every vision tower of the table in ``model``, outermost first; subclasses of a listed class count."""
    check_module(model)
    for path, module in model.named_modules():
        anatomy = _row(type(module))
        if anatomy is not None and not (tower := Tower(path, module, _fitted(anatomy, module))).missing:
            yield tower


def _row(kind: type) -> Anatomy | None:
    """The row of a class or of the nearest class it derives from."""
    for base in kind.__mro__:
        package = base.__module__.partition(".")[0]
        for name in (f"{package}.{base.__name__}", base.__name__):
            if name in ROWS:
                return ROWS[name]
    return None


def _fitted(anatomy: Anatomy, module: nn.Module) -> Anatomy:
    """The row as it is for a module with such options."""
    for path, values in VARIANTS.get(anatomy.family, ()):
        if resolve(module, path):
            anatomy = replace(anatomy, **values)
    return anatomy


def _longest_list(module: nn.Module) -> str | None:
    """Name of the longest list of modules of one class: the blocks, where nobody says what they are called."""
    lists = [
        (len(part), name)
        for name, part in module.named_modules()
        if isinstance(part, nn.ModuleList | nn.Sequential) and len({type(item) for item in part}) == 1
    ]
    return max(lists)[1] if lists else None


def find_tower(model: nn.Module, name: str | None = None, anatomy: Anatomy | None = None) -> Tower:
    """The one vision tower that registers shall enter.

    Args:
        model: The base model, or anything that contains its tower.
        name: Dotted name of the tower, or the end of it; needed where there are several.
        anatomy: Description of a model that the table does not have.

    Raises:
        UnsupportedModelError: No tower, several and no ``name``, or an anatomy that does not fit.
    """
    if anatomy is not None:
        try:
            module = model.get_submodule(name or "")
        except AttributeError as error:
            raise UnsupportedModelError(f"{type(model).__name__} has no module {name!r} to describe") from error
        if resolve(module, anatomy.blocks) is None and (blocks := _longest_list(module)):
            anatomy = replace(anatomy, blocks=blocks)
        tower = Tower(name or "", module, anatomy)
        if tower.missing:
            wanted = {field: getattr(anatomy, field) for field in tower.missing}
            raise UnsupportedModelError(
                f"the anatomy {anatomy.family!r} does not fit {type(tower.module).__name__}: nothing at {wanted}. "
                f"Its children are {[child for child, _ in tower.module.named_children()]}."
            )
        return tower
    towers = list(find_towers(model))
    names = [tower.path or "the model itself" for tower in towers]
    if name is not None:
        chosen = [t for t in towers if t.path == name] or [t for t in towers if f".{t.path}".endswith(f".{name}")]
        if len(chosen) != 1:
            raise UnsupportedModelError(
                f"target_modules={name!r} names {len(chosen)} vision towers of {type(model).__name__}; "
                f"it has {names or 'none'}."
            )
        return _checked(chosen[0])
    if len(towers) > 1:
        raise UnsupportedModelError(
            f"{type(model).__name__} has {len(towers)} vision towers: {', '.join(names)}. "
            f"Choose one: add_registers(model, target_modules={towers[0].path!r})."
        )
    if not towers:
        supported = sorted({row.family for row in ROWS.values()})
        raise UnsupportedModelError(
            f"{type(model).__name__} has no vision tower that registers can enter. {_strangers(model)}Looked for "
            f"modules of class {', '.join(ROWS)} (families: {', '.join(supported)}) with embeddings, blocks and a "
            "place to take the registers out again. For a plain ViT of another class describe it by hand: "
            "add_registers(model, anatomy=Anatomy('mine', embeddings='...', blocks='...', remove='...'))."
        )
    return _checked(towers[0])


def _checked(tower: Tower) -> Tower:
    """The tower, if it has the attributes that its family needs."""
    for path, wanted, reason in CONDITIONS.get(tower.anatomy.family, ()):
        if (actual := resolve(tower.module, path)) != wanted:
            raise UnsupportedModelError(
                f"{type(tower.module).__name__} has {path}={actual!r}, and registers need {wanted!r}: {reason}"
            )
    return tower


def _strangers(model: nn.Module) -> str:
    """Modules of a class that is refused, or that lack what the table describes, as sentences for an error."""
    sentences = []
    for path, module in model.named_modules():
        if reason := REFUSED.get(type(module).__name__):
            return f"{path or 'the model itself'} is a {type(module).__name__}, which is refused: {reason}. "
        anatomy = _row(type(module))
        if anatomy is not None and (fields := Tower(path, module, anatomy).missing):
            lacks = {field: getattr(anatomy, field) for field in fields}
            sentences.append(f"{path or 'the model itself'} is a {type(module).__name__}, but without {lacks}. ")
    return "".join(sentences)
