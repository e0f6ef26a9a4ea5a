"""Where registers enter and leave a vision tower: the description of one family of models."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from .calls import unwrapped

__all__ = ["Anatomy", "Paths", "parent", "resolve"]

Paths = str | tuple[str, ...]


@dataclass(frozen=True)
class Anatomy:
    """Where registers enter and leave one kind of vision tower; every path is relative to the tower.

    A path may be a tuple of alternatives (module names differ between versions of transformers); the first that exists
    is taken. A number is a place in a list of modules; ``blocks.-1`` is the last block.

    Attributes:
        family: Name of the family, part of an adapter's identity.
        embeddings: Module whose output, ``(B, prefix + patches, D)``, gets the registers.
        insert_at: Whether they join the ``"output"`` or the ``"input"`` of ``embeddings``.
        remove: Module at which they are taken out again.
        remove_from: Whether they leave the ``"input"`` or the ``"output"`` of ``remove``.
        blocks: The list of transformer blocks.
        prefix: Number of tokens before the patches (CLS, distillation token), native registers not counted.
        native_registers: Attribute with the number of registers that the model has already, if any; it is added to
            ``prefix``.
        position_bias: Modules that return a relative position bias ``(..., N, N)``, below the tower or below a block.
        positions_between: Module that returns position embeddings ``(..., N, D)`` added between blocks.
        rotary: Argument of a block with rotary tables: ``(cos, sin)``, each ``(..., N, d)``, a row for every token of
            the sequence, or timm's ``(..., P, 2 d)`` for the tokens behind ``prefix``; registers are not turned.
        pass_methods: Methods that users call in place of the tower's ``forward``, and that go past every hook point.
        methods: Methods that users call past the tower's ``forward`` and that return whole sequences.
        counted_methods: Methods that take a sequence apart by the number of tokens before the patches.
        method_counter: Attribute of the tower with that number, which they read.
        attention: Attention module of a block.
        attention_maps: Where its maps ``(B, H, N, N)`` come from: ``"output"``, its second output under the eager
            implementation; ``"weights"``, an ``nn.MultiheadAttention`` asked for them; or ``"dropout"``, the dropout
            below it at ``attn_drop`` once ``fused_attn`` is off.
        mlp_in: Linear layer into the MLP of a block (the gate, for a gated MLP).
        mlp_up: The second linear layer into a gated MLP; ``None`` where the MLP is not gated.
        mlp_out: Linear layer out of the MLP of a block.
        mlp_scale: LayerScale of the MLP branch, ``(D,)``; resolves to nothing where there is none.
        patch_embedding: The convolution that embeds patches.
        position_embedding: Position embeddings, a parameter or an ``nn.Embedding``.
        cls_token: The CLS token's parameter, ``None`` where there is none.
        final_norm: The LayerNorm after the last block.
        norm_patches: Whether the returned patch tokens went through it (CLIP's went not, only its CLS).
        hidden_size: Width D of a token; ``None`` reads it off the tower (``config.hidden_size``, ``embed_dim``…).
        input_shape: Shape of one input, ``(C, H, W)``, for the dry run of an anatomy described by hand; ``None``
            derives it from the patch and position embeddings.
    """

    family: str
    embeddings: Paths = "embeddings"
    insert_at: Literal["input", "output"] = "output"
    remove: Paths = "layernorm"
    remove_from: Literal["input", "output"] = "input"
    blocks: Paths = ("layers", "encoder.layer")
    prefix: int = 1
    native_registers: Paths | None = None
    position_bias: Paths | None = None
    positions_between: Paths | None = None
    rotary: str | None = None
    pass_methods: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    counted_methods: tuple[str, ...] = ()
    method_counter: str | None = None
    attention: Paths = ("attention.attention", "attention")
    attention_maps: Literal["output", "weights", "dropout"] = "output"
    mlp_in: Paths | None = ("mlp.fc1", "mlp.gate_proj", "intermediate.dense", "mlp.weights_in")
    mlp_up: Paths | None = "mlp.up_proj"
    mlp_out: Paths | None = ("mlp.fc2", "mlp.down_proj", "output.dense", "mlp.weights_out")
    mlp_scale: Paths | None = "layer_scale2.lambda1"
    patch_embedding: Paths | None = "embeddings.patch_embeddings.projection"
    position_embedding: Paths | None = "embeddings.position_embeddings"
    cls_token: Paths | None = "embeddings.cls_token"
    final_norm: Paths | None = "layernorm"
    norm_patches: bool = True
    hidden_size: int | None = None
    input_shape: tuple[int, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields that differ from their defaults, JSON-ready."""
        defaults = {field.name: field.default for field in fields(self)}
        return {key: value for key, value in asdict(self).items() if value != defaults[key]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Anatomy:
        """The inverse of :meth:`to_dict`.

        Raises:
            TypeError: A value has the wrong type.
            ValueError: ``values`` has a key that is not a field, or no family.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown keys {unknown} in an anatomy; its fields are {sorted(known)}")
        if "family" not in values:
            raise ValueError("an anatomy needs a 'family', a name of your choice for the kind of model")
        paths: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        for key, value in paths.items():
            kind = _KINDS.get(key)
            items = value if isinstance(value, tuple) else () if value is None else (value,)
            fits = all(isinstance(item, kind or str) and not (kind is int and isinstance(item, bool)) for item in items)
            if not fits or (key in _SCALARS and (len(items) != 1 or isinstance(value, tuple))):
                wanted = kind.__name__ if kind else "str" if key in _SCALARS else "the name of a module"
                raise TypeError(f"{key!r} of an anatomy must be {wanted}, got {value!r}")
        for key, allowed in _CHOICES.items():
            if paths.get(key, allowed[0]) not in allowed:
                raise ValueError(f"{key!r} of an anatomy must be one of {', '.join(allowed)}, got {paths[key]!r}")
        return cls(**paths)


# Types of the fields that name no module; those of them that are one value, never None.
_KINDS: dict[str, type] = {"prefix": int, "norm_patches": bool, "hidden_size": int, "input_shape": int}
_SCALARS = ("family", "insert_at", "remove_from", "prefix", "attention_maps", "norm_patches")
_CHOICES = {
    "insert_at": ("output", "input"),
    "remove_from": ("input", "output"),
    "attention_maps": ("output", "weights", "dropout"),
}


def resolve(root: Any, paths: Paths | None) -> Any:
    """The first of the dotted ``paths`` that exists below ``root``, through wrappers on the way, or ``None``."""
    for path in (paths,) if isinstance(paths, str) else paths or ():
        value = root
        for name in path.split("."):
            step, value = value, _step(value, name)
            if value is None and (inner := unwrapped(step)) is not step:
                value = _step(inner, name)
            if value is None:
                break
        else:
            return value
    return None


def _step(value: Any, name: str) -> Any:
    # A list of modules has attributes for its places, but none that count from the end.
    from_end = name.startswith("-") and hasattr(value, "__getitem__")
    return value[int(name)] if from_end else getattr(value, name, None)


def parent(root: Any, paths: Paths) -> tuple[Any, str]:
    """Owner and name of the attribute that the first existing of ``paths`` leads to.

    Raises:
        AttributeError: There is none.
    """
    for path in (paths,) if isinstance(paths, str) else paths:
        place, _, name = path.rpartition(".")
        owner = resolve(root, place) if place else root
        owner = owner if hasattr(owner, name) else unwrapped(owner)
        if owner is not None and hasattr(owner, name):
            return owner, name
    raise AttributeError(f"{type(root).__name__} has nothing at {paths}")
