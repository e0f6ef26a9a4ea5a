"""Which base model an adapter belongs to: an identity of the vision tower that can be compared later.

The fingerprint must survive whatever people do to the same weights (another dtype, device, quantisation of the linear
layers, another head around the tower, other adapters) and must change with the weights. A hash cannot do that, a sketch
can: the tensors that quantisers leave alone are multiplied by fixed signs and summed into a few buckets (count sketch,
Charikar et al. 2002), in units of the tensor's own norm. Rounding to bfloat16 moves a bucket by about 0.001.

Position embeddings are resampled for another image size, which makes no other base: their sketch decides only where
there is no other. Some quantisers take the patch embedding too (quanto does so with convolutions), and 4 bits move a
bucket by 0.1: then the biases decide.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..errors import UnsupportedModelError
from ..utils.text import one_line
from .anatomy import resolve
from .tower import Tower

__all__ = [
    "TowerIdentity",
    "brings_biases",
    "but_for_trained",
    "check_finite_base",
    "fingerprint",
    "identity_now",
    "is_finite",
    "trains_biases",
    "with_biases_of",
]

BUCKETS = 8
COLUMNS = 4096
TOLERANCE = 0.02
#: What wrappers call what they wrap: PEFT's, torch's.
_WRAPPERS = {
    "original_module",
    "base_layer",
    "module",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
}


def is_finite(number: float) -> bool:
    """Whether a number is a finite float; a whole number in a JSON file may be too large for one."""
    try:
        return math.isfinite(number)
    except OverflowError:
        return False


def _signs(count: int, device: torch.device) -> torch.Tensor:
    """``count`` fixed values of +1 and -1: one bit of an integer hash of the position, the same on every platform."""
    bits = torch.arange(1, count + 1, device=device) * 2654435761 & 0xFFFFFFFF
    # A multiplication alone gives a regular pattern, which smooth weights (position embeddings) would cancel in.
    bits = (bits ^ bits >> 15) * 1540483477 & 0xFFFFFFFF
    return ((bits ^ bits >> 13) & 1).to(torch.float32).mul_(2).sub_(1)


def _sketch(values: torch.Tensor) -> list[float]:
    """``BUCKETS`` signed sums of a flat float32 tensor, divided by its norm."""
    # Signs of rows times signs of columns: one pass over millions of weights, and no temporary of their size, whose
    # first touch would take longer than the sums.
    rows = values[: values.numel() // COLUMNS * COLUMNS].view(-1, COLUMNS)
    rest = values[rows.numel() :]
    sums = rows.T @ _signs(len(rows), values.device)
    sums[: len(rest)] -= rest
    sums *= _signs(COLUMNS, values.device)
    norm = torch.linalg.vector_norm(values).clamp_min(1e-12)
    buckets = sums.view(-1, BUCKETS).sum(0) / norm
    return [round(value, 4) for value in buckets.tolist()]


def _parts(blocks: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules by name, in one order: transformers 4 has the MLP of ViT and its kin before the norms, 5 behind."""
    for block, module in blocks.named_children():
        inside = module.named_modules(prefix=block)
        yield from sorted(inside, key=lambda part: _in_block(part[0]) in ("intermediate", "output"))


def _in_block(name: str) -> str:
    """The part of a block that a module belongs to, also where something is wrapped around the block."""
    return next((part for part in name.split(".")[1:] if part not in _WRAPPERS), "")


def _biases(blocks: nn.Module) -> Iterator[torch.Tensor]:
    """The biases of the base's own layers: wrapped by an adapter, or held by a quantised layer, they stay the same."""
    inside_adapter: tuple[str, ...] = ()
    seen: set[int] = set()
    for name, module in _parts(blocks):
        if isinstance(module, BaseTunerLayer):
            inside_adapter += tuple(f"{name}.{child}" for child, _ in module.named_children() if child != "base_layer")
        if isinstance(module, AuxiliaryTrainingWrapper):
            children = (child for child, _ in module.named_children() if child != "original_module")
            inside_adapter += tuple(f"{name}.{child}" for child in children)
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) or name.startswith(inside_adapter):
            continue
        bias = getattr(module, "bias", None)
        # torch's own quantised layers pack it, and give it by a method.
        bias = bias() if callable(bias) and not isinstance(bias, torch.Tensor) else bias
        if isinstance(bias, torch.Tensor) and id(bias) not in seen:
            seen.add(id(bias))
            yield bias


def trains_biases(tower: Tower) -> bool:
    """Whether biases of the base's own layers are trained; those that adapters have beside them do not count."""
    return any(bias.requires_grad for bias in _biases(tower.part("blocks")))


def brings_biases(model: nn.Module | None) -> bool:
    """Whether an adapter of a model trains biases of the base, and brings them along: they tell nothing of it."""
    configs = getattr(model, "peft_config", {}).values()
    return any(getattr(config, "bias", "none") not in ("none", None) for config in configs)


def _held(holder: Any, name: str) -> Any:
    """An attribute; a parameter as it is held, where trained offsets are added to what the attribute gives."""
    held = holder._parameters.get(name) if isinstance(holder, nn.Module) else None
    return resolve(holder, name) if held is None else held


def _own(tower: Tower, field: str) -> Any:
    """The base's own part, where PEFT has put a trained copy beside it."""
    paths: Any = getattr(tower.anatomy, field)
    for path in (paths,) if isinstance(paths, str) else paths or ():
        part: Any = tower.module
        for name in path.split("."):
            part = _held(part, name)
            while isinstance(part, AuxiliaryTrainingWrapper):
                part = part.original_module
        if part is not None:
            return part
    return None


def _is_quantised(weight: Any) -> bool:
    """Whether a weight is of a class of somebody's own, as those of quantisers are."""
    return weight is not None and type(weight) not in (torch.Tensor, nn.Parameter)


def _groups(tower: Tower) -> list[list[torch.Tensor]]:
    """The weights of each of the three sketches; empty where the tower has none, or a module does not show them."""
    position, patch = _own(tower, "position_embedding"), resolve(_own(tower, "patch_embedding"), "weight")
    groups: list[Iterable[Any]] = [
        [] if _is_quantised(patch) and not hasattr(patch, "device_mesh") else [patch],
        [position if isinstance(position, torch.Tensor) else _held(position, "weight")],
        _biases(tower.part("blocks")),
    ]
    return [[value for value in group if isinstance(value, torch.Tensor)] for group in groups]


def but_for_trained(tower: Tower, identity: TowerIdentity, now: TowerIdentity) -> TowerIdentity:
    """An identity that a tower had earlier, with the sketches of now of those of its weights that are being trained."""
    groups, before, sketches = _groups(tower), identity.fingerprint, now.fingerprint
    if before is None or sketches is None:
        return identity
    trained = [any(tensor.requires_grad for tensor in group) for group in groups for _ in range(BUCKETS)]
    chosen = zip(before, sketches, trained, strict=False)  # one of them may say nothing of biases
    return replace(identity, fingerprint=[new if is_new else old for old, new, is_new in chosen])


def fingerprint(tower: Tower) -> list[float] | None:
    """A sketch of the tower's weights: patch embedding, position embeddings, biases of the blocks.

    Args:
        tower: The tower; adapters inside it do not count.

    Returns:
        ``3 * BUCKETS`` floats, or ``None`` where weights are not at hand (meta device, sharded parameters).
    """
    sketches: list[float] = []
    with torch.no_grad():
        for group in _groups(tower):
            tensors = [tensor.detach() for tensor in group]
            if any(tensor.is_meta or tensor.numel() == 0 or hasattr(tensor, "device_mesh") for tensor in tensors):
                return None
            flat = [tensor.flatten().to(torch.float32) for tensor in tensors if tensor.is_floating_point()]
            if len(flat) > 1:
                flat = [torch.cat([part.to(flat[0].device) for part in flat])]
            sketches += _sketch(flat[0]) if flat else [0.0] * BUCKETS
    return sketches


@dataclass(frozen=True)
class TowerIdentity:
    """What is written into an adapter's config about its base model's vision tower.

    Attributes:
        family: The row's family.
        hidden_size: Width D of a token.
        num_hidden_layers: Number of transformer blocks.
        patch_size: Side of a patch in pixels, if the tower says it.
        fingerprint: Sketch of the weights, ``None`` if they were not at hand; without that of biases, if another
            adapter had trained them when this was written.
    """

    family: str
    hidden_size: int
    num_hidden_layers: int
    patch_size: int | None = None
    fingerprint: list[float] | None = None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TowerIdentity:
        """The inverse of :meth:`to_dict`; keys of a newer release are ignored with a warning.

        Raises:
            TypeError: A key is missing, or a value has the wrong type.
        """
        known = {item.name for item in fields(cls)}
        if unknown := sorted(set(values) - known):
            warnings.warn(f"base_tower has keys that this release does not know: {unknown}; ignored", stacklevel=4)
        kinds = {"family": str, "hidden_size": int, "num_hidden_layers": int, "patch_size": int, "fingerprint": list}
        for name, kind in kinds.items():
            value = values.get(name)
            missing = value is None and name in ("patch_size", "fingerprint")
            if not missing and (not isinstance(value, kind) or isinstance(value, bool)):
                raise TypeError(f"base_tower[{name!r}] must be {kind.__name__}, got {value!r}")
        numbers = values.get("fingerprint") or []
        if not all(isinstance(number, int | float) and is_finite(number) for number in numbers):
            raise TypeError("base_tower['fingerprint'] must be a list of finite numbers")
        return cls(**{name: value for name, value in values.items() if name in known})

    @classmethod
    def of(cls, tower: Tower) -> TowerIdentity:
        """The identity of a tower."""
        blocks = len(tower.part("blocks"))
        return cls(tower.anatomy.family, tower.hidden_size, blocks, tower.patch_size, fingerprint(tower))

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)

    def without_biases(self) -> TowerIdentity:
        """The same without the sketch of biases, which tell nothing of the base once adapters have trained them."""
        return self if self.fingerprint is None else replace(self, fingerprint=self.fingerprint[: 2 * BUCKETS])

    def __str__(self) -> str:
        shape = f"{self.num_hidden_layers} blocks of width {self.hidden_size}"
        patch = f", patch {self.patch_size}" if self.patch_size else ""
        code = f", weights {abs(hash(tuple(self.fingerprint))) % 0xFFFFFF:06x}" if self.fingerprint else ""
        return f"{one_line(self.family, 100)} ({shape}{patch}{code})"

    def differences(self, other: TowerIdentity) -> list[str]:
        """Names of the fields in which two identities differ; empty if they can be the same weights."""
        names = ("family", "hidden_size", "num_hidden_layers", "patch_size")
        differing = [name for name in names if getattr(self, name) != getattr(other, name)]
        known = self.fingerprint and other.fingerprint
        if not differing and known and not _alike(self.fingerprint or [], other.fingerprint or []):
            differing.append("weights")
        return differing


def _alike(numbers: list[float], others: list[float]) -> bool:
    """Whether two fingerprints can be those of the same weights."""
    if len(numbers) != len(others):
        if {len(numbers), len(others)} != {2 * BUCKETS, 3 * BUCKETS}:
            return False
        numbers, others = numbers[: 2 * BUCKETS], others[: 2 * BUCKETS]  # one of them says nothing of biases
    pairs = list(zip(numbers, others, strict=True))
    patches, positions, biases = pairs[:BUCKETS], pairs[BUCKETS : 2 * BUCKETS], pairs[2 * BUCKETS :]
    if not all(any(sketch) for sketch in zip(*patches, strict=True)):  # quantised, in one of the two
        patches = []
    deciding = patches + biases
    if not any(number or other for number, other in deciding):
        deciding = positions
    return all(abs(number - other) <= TOLERANCE for number, other in deciding)


def identity_now(tower: Tower, before: TowerIdentity, biases: bool = True) -> TowerIdentity | None:
    """The identity of a tower whose weights have changed since it had another one.

    Args:
        tower: The tower, adapters on it.
        before: The identity that it had.
        biases: Whether its biases tell anything; other adapters may train them, and bring them along.

    Returns:
        ``None`` if the weights are the same, or cannot be told: sharded, quantised, not shown, with adapters merged
        into them, or no longer finite.
    """
    if before.patch_size is not None and tower.patch_size is None:
        return None
    sketches = before.fingerprint or []
    known = [sketches[start : start + BUCKETS] for start in range(0, len(sketches), BUCKETS)]
    if any(any(sketch) and not group for sketch, group in zip(known, _groups(tower), strict=False)):
        return None  # a module in the place of the one that had them does not show its weights
    weight = resolve(_own(tower, "patch_embedding"), "weight")
    layers = [module for module in tower.module.modules() if isinstance(module, BaseTunerLayer)]
    if _is_quantised(weight) or any(getattr(layer, "merged", False) for layer in layers):
        return None
    now = TowerIdentity.of(tower)
    if now.fingerprint is None or not all(map(is_finite, now.fingerprint)):
        return None
    if before.fingerprint is None:
        return now
    compared = now if biases else with_biases_of(now, before)
    told = len(before.fingerprint) == len(now.fingerprint)  # otherwise its biases told nothing, those of an adapter
    if not compared.differences(before) and (told or not biases):
        return None
    return now if biases else now.without_biases()


def with_biases_of(identity: TowerIdentity, other: TowerIdentity) -> TowerIdentity:
    """An identity with the sketch of another one's biases, where these tell nothing of the base."""
    if identity.fingerprint is None or other.fingerprint is None:
        return identity
    return replace(identity, fingerprint=[*identity.fingerprint[: 2 * BUCKETS], *other.fingerprint[2 * BUCKETS :]])


def check_finite_base(tower: Tower, identity: TowerIdentity) -> None:
    """Refuse a base whose weights cannot be told from others', because they are not finite.

    Raises:
        UnsupportedModelError: A weight that its identity is made of is NaN or infinite.
    """
    if all(map(is_finite, identity.fingerprint or ())):
        return
    values = tower.module.named_parameters()
    broken = [name for name, value in values if value.is_floating_point() and not value.isfinite().all()]
    more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
    raise UnsupportedModelError(
        f"weights of the base {type(tower.module).__name__} are not finite (NaN or infinite): "
        f"{broken[0] if broken else 'a bias'}{more}. Load its checkpoint again, or the one before training diverged."
    )
