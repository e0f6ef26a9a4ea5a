"""Where registers enter and leave a vision tower: one frozen row a model family, and the search for towers in a model.

A new family is one row of :data:`FAMILIES`; nothing else in the package names a model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from torch import nn

from .errors import UnsupportedModelError

__all__ = ["FAMILIES", "Anatomy", "Tower", "find_tower", "find_towers", "resolve"]

Paths = str | tuple[str, ...]


@dataclass(frozen=True)
class Anatomy:
    """Where registers enter and leave one kind of vision tower; every path is relative to the tower.

    A path may be a tuple of alternatives (module names differ between versions of transformers); the first that exists
    is taken.

    Attributes:
        family: Name of the family, part of an adapter's identity.
        embeddings: Module whose output, ``(B, prefix + patches, D)``, gets the registers.
        remove: Module at which they are taken out again.
        remove_from: Whether they leave the ``"input"`` or the ``"output"`` of ``remove``.
        blocks: The list of transformer blocks.
        prefix: Number of tokens before the patches (CLS, distillation token), native registers not counted.
        native_registers: Attribute of the tower's config with the number of registers the model has already, if any.
        attention: Attention module of a block; its second output under the eager implementation is ``(B, H, N, N)``.
        mlp_in: Linear layer into the MLP of a block (the gate, for a gated MLP).
        mlp_up: The second linear layer into a gated MLP; ``None`` where the MLP is not gated.
        mlp_out: Linear layer out of the MLP of a block.
        mlp_scale: LayerScale of the MLP branch, ``(D,)``; resolves to nothing where there is none.
        patch_embedding: The convolution that embeds patches.
        position_embedding: Position embeddings, a parameter or an ``nn.Embedding``.
        cls_token: The CLS token's parameter, ``None`` where there is none.
        final_norm: The LayerNorm after the last block.
        norm_patches: Whether the returned patch tokens went through it (CLIP's went not, only its CLS).
        hidden_size: Width D of a token; ``None`` reads ``tower.config.hidden_size``.
    """

    family: str
    embeddings: Paths = "embeddings"
    remove: Paths = "layernorm"
    remove_from: Literal["input", "output"] = "input"
    blocks: Paths = ("layers", "encoder.layer")
    prefix: int = 1
    native_registers: str | None = None
    attention: Paths = "attention"
    mlp_in: Paths | None = ("mlp.fc1", "mlp.gate_proj", "intermediate.dense")
    mlp_up: Paths | None = "mlp.up_proj"
    mlp_out: Paths | None = ("mlp.fc2", "mlp.down_proj", "output.dense")
    mlp_scale: Paths | None = "layer_scale2.lambda1"
    patch_embedding: Paths | None = "embeddings.patch_embeddings.projection"
    position_embedding: Paths | None = "embeddings.position_embeddings"
    cls_token: Paths | None = "embeddings.cls_token"
    final_norm: Paths | None = "layernorm"
    norm_patches: bool = True
    hidden_size: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields that differ from their defaults, JSON-ready."""
        defaults = {field.name: field.default for field in fields(self)}
        return {key: value for key, value in asdict(self).items() if value != defaults[key]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Anatomy:
        """The inverse of :meth:`to_dict`.

        Raises:
            TypeError: A value has the wrong type.
            ValueError: ``values`` has a key that is no field, or no family.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown keys {unknown} in an anatomy; its fields are {sorted(known)}")
        if "family" not in values:
            raise ValueError("an anatomy needs a 'family', a name of your choice for the kind of model")
        paths: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        kinds: dict[str, type] = {"family": str, "remove_from": str, "prefix": int, "norm_patches": bool}
        for key, value in paths.items():
            kind = int if key == "hidden_size" and value is not None else kinds.get(key)
            names = value if isinstance(value, tuple) else () if value is None else (value,)
            if not all(isinstance(name, str) for name in names) if kind is None else not isinstance(value, kind):
                wanted = kind.__name__ if kind else "the name of a module"
                raise TypeError(f"{key!r} of an anatomy must be {wanted}, got {value!r}")
        return cls(**paths)


_CLIP = Anatomy(
    "clip",
    remove="encoder",
    remove_from="output",
    blocks="encoder.layers",
    attention="self_attn",
    patch_embedding="embeddings.patch_embedding",
    position_embedding="embeddings.position_embedding",
    cls_token="embeddings.class_embedding",
    final_norm="post_layernorm",
    norm_patches=False,
)
_SIGLIP = replace(_CLIP, family="siglip", prefix=0, cls_token=None, norm_patches=True)
_DINOV2 = Anatomy("dinov2", remove="encoder", remove_from="output", blocks=("encoder.layer", "layer"))
_DINOV2_REGISTERS = replace(_DINOV2, family="dinov2_with_registers", native_registers="num_register_tokens")

# Class name of a tower -> its row. Names, so that no model is imported before the user has done so.
FAMILIES: dict[str, Anatomy] = {
    "ViTModel": Anatomy("vit"),
    "DeiTModel": Anatomy("deit", prefix=2),
    "CLIPVisionModel": _CLIP,
    "CLIPVisionTransformer": _CLIP,  # transformers 4
    "Dinov2Model": _DINOV2,
    "Dinov2Backbone": _DINOV2,
    "Dinov2WithRegistersModel": _DINOV2_REGISTERS,
    "Dinov2WithRegistersBackbone": _DINOV2_REGISTERS,
    "SiglipVisionModel": _SIGLIP,
    "SiglipVisionTransformer": _SIGLIP,  # transformers 4
}


def resolve(root: Any, paths: Paths | None) -> Any:
    """The first of the dotted ``paths`` that exists below ``root``, or ``None``."""
    for path in (paths,) if isinstance(paths, str) else paths or ():
        found = root
        for name in path.split("."):
            found = getattr(found, name, None)
            if found is None:
                break
        else:
            return found
    return None


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
        return resolve(self.module, getattr(self.anatomy, field))

    def block_part(self, index: int, field: str) -> Any:
        """The same below block ``index``."""
        return resolve(self.part("blocks")[index], getattr(self.anatomy, field))

    @property
    def config(self) -> Any:
        """The tower's own config, ``None`` for a plain module."""
        return getattr(self.module, "config", None)

    @property
    def prefix(self) -> int:
        """Number of tokens before the registers: CLS and the like, and native registers."""
        native = self.anatomy.native_registers
        return self.anatomy.prefix + (int(getattr(self.config, native)) if native else 0)

    @property
    def hidden_size(self) -> int:
        """Width D of a token.

        Raises:
            UnsupportedModelError: Neither the anatomy nor the tower's config says it.
        """
        size = self.anatomy.hidden_size or getattr(self.config, "hidden_size", None)
        if not isinstance(size, int):
            raise UnsupportedModelError(
                f"cannot tell the hidden size of {type(self.module).__name__}: it has no config.hidden_size. "
                "Give it in the Anatomy (hidden_size=...)."
            )
        return size

    @property
    def patch_size(self) -> int | None:
        """Side of a patch in pixels, where the tower's config says it."""
        size = getattr(self.config, "patch_size", None)
        return size[0] if isinstance(size, list | tuple) else size

    @property
    def missing(self) -> list[str]:
        """Names of the hook points that the anatomy describes and the module does not have."""
        return [field for field in ("embeddings", "remove", "blocks") if self.part(field) is None]


def find_towers(model: nn.Module) -> Iterator[Tower]:
    """Every vision tower of the table in ``model``, outermost first; subclasses of a listed class count."""
    for path, module in model.named_modules():
        for kind in type(module).__mro__:
            if kind.__name__ in FAMILIES:
                tower = Tower(path, module, FAMILIES[kind.__name__])
                if not tower.missing:
                    yield tower
                break


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
            tower = Tower(name or "", model.get_submodule(name or ""), anatomy)
        except AttributeError as error:
            raise UnsupportedModelError(f"{type(model).__name__} has no module {name!r} to describe") from error
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
        return chosen[0]
    if len(towers) > 1:
        raise UnsupportedModelError(
            f"{type(model).__name__} has {len(towers)} vision towers: {', '.join(names)}. "
            f"Choose one: add_registers(model, target_modules={towers[0].path!r})."
        )
    if not towers:
        supported = sorted({row.family for row in FAMILIES.values()})
        raise UnsupportedModelError(
            f"{type(model).__name__} has no vision tower that registers can enter. Looked for modules of class "
            f"{', '.join(FAMILIES)} (families: {', '.join(supported)}) with embeddings, blocks and a place to take the "
            "registers out again. For a plain ViT of another class describe it by hand: "
            "add_registers(model, anatomy=Anatomy('mine', embeddings='...', blocks='...', remove='...'))."
        )
    return towers[0]
