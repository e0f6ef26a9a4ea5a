"""What an audit says about attention sinks, head by head, and what helps against which kind."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

__all__ = [
    "BROADCAST",
    "GIVEN",
    "LOW_RANK",
    "NO_OP",
    "SINK_DEFINITION",
    "TOKEN_NAMES",
    "HeadSinks",
    "SinkKind",
    "SinkReport",
    "SinkToken",
    "Sinks",
    "advise",
    "head_kind",
    "kind_of",
    "merge_sinks",
]

#: A token is a sink of a head in an image if 9 of 10 queries give it so much of their attention; a few together, if 3
#: of 4 do and the block gives them as much.
GIVEN = 0.5
#: Largest value ratio of a no-op sink, smallest one of a broadcast sink, and the largest stable rank of its head.
NO_OP, BROADCAST, LOW_RANK = 0.2, 0.5, 1.5
# A head has sinks if there are at least so many an image: 50 of 4,096 in the code of arXiv 2606.08105.
_FEW = 0.01

#: ``"unclear"``: neither of the two, or as many of one as of the other.
SinkKind = Literal["no-op", "broadcast", "unclear"]
#: Kinds of tokens that can be sinks; outliers by the norm and line where the block reads them.
SinkToken = Literal["cls", "register", "outlier", "other"]
#: What to call them.
TOKEN_NAMES = {"cls": "CLS", "register": "registers", "outlier": "outlier patches", "other": "other patches"}

#: What the figures of a :class:`SinkReport` are.
SINK_DEFINITION = (
    "After arXiv 2606.08105, where a token is a sink of a head in an image if at least 90 % of the queries (the token "
    f"itself among them) give it at least {GIVEN:g} of their attention. Besides, a few tokens can be a sink together: "
    "those that each receive at least 5 times an even share of the attention, both in the block (mean over heads and "
    "queries) and in the head, where they receive most of the block's attention in that image, and 75 % of the head's "
    "queries give all of them together at least 0.5. Value ratio: L2 norm of what the head writes "
    "of this token, its value through the output projection, over the median of the same of all tokens that are no "
    "sinks; the geometric mean over the sinks. Stable rank: of the head's whole update in that image, the attention "
    "map times the values (through the output projection, without biases), squared Frobenius over squared spectral "
    "norm: 1 where all tokens get multiples of one vector. (What a single token adds has rank one in any case.) A sink "
    f"is a no-op if its ratio is at most {NO_OP:g}, broadcast if it is at least {BROADCAST:g} and the stable rank at "
    f"most {LOW_RANK:g}; a head is what more than half of its sinks are. Outlier patches: by the line of the layer "
    "that the block reads."
)


@dataclass(frozen=True)
class Sinks:
    """The sinks of one head that are tokens of one kind.

    Attributes:
        number: How many, over all images.
        per_image: The same over the number of images. More than 1 where several tokens share the attention.
        attention: Share of the head's attention that such a token receives, mean over queries and tokens.
        value_ratio: Norm of what the head writes of a sink over the median of that of other tokens; geometric mean.
        stable_rank: Of the head's update in the images of these sinks, mean over the sinks.
        no_op: Share of these sinks that are no-op.
        broadcast: Share of these sinks that are broadcast.
    """

    number: int
    per_image: float
    attention: float
    value_ratio: float
    stable_rank: float
    no_op: float
    broadcast: float

    @property
    def kind(self) -> SinkKind:
        """What more than half of them are."""
        return kind_of(self.no_op, self.broadcast)


@dataclass(frozen=True)
class SinkRow:
    """The sinks of one block that are tokens of one kind.

    Attributes:
        block: Index of the block.
        token: Kind of token.
        heads: Number of heads that have such sinks, by the kind of these.
        sinks: All of them; ``per_image`` is the sum over the heads.
    """

    block: int
    token: str
    heads: dict[str, int]
    sinks: Sinks

    @property
    def words(self) -> str:
        """The heads, such as ``"3 no-op, 1 broadcast"``."""
        return ", ".join(f"{number} {kind}" for kind, number in self.heads.items())


@dataclass(frozen=True)
class HeadSinks:
    """One head.

    Attributes:
        block: Index of the block.
        head: Index of the head.
        kind: What more than half of its sinks are; ``None`` where fewer than 1 % of the images have one.
        stable_rank: Of its update, mean over all images, those without sinks too.
        tokens: By kind of token (:data:`SinkToken`), only those of which some are sinks.
    """

    block: int
    head: int
    kind: SinkKind | None
    stable_rank: float
    tokens: dict[str, Sinks]


@dataclass(frozen=True)
class SinkReport:
    """The sinks of a model.

    Attributes:
        heads: Every head of every block; empty where nothing was measured.
        advice: What follows, a sentence or two for each kind of sink and place.
        missing: Why nothing was measured, ``""`` where it was.
        projected: Whether values were taken through the output projection (its layer was known in all blocks).
    """

    heads: list[HeadSinks]
    advice: list[str]
    missing: str = ""
    projected: bool = True

    @property
    def summary(self) -> str:
        """How many heads have sinks of which kind."""
        if self.missing:
            return f"Sinks were not measured: {self.missing}"
        kinds = [head.kind for head in self.heads if head.kind is not None]
        if not kinds:
            return f"None of {len(self.heads)} heads has a sink."
        counts = [f"{kinds.count(kind)} {kind}" for kind in get_args(SinkKind) if kind in kinds]
        return f"{len(kinds)} of {len(self.heads)} heads have sinks: {', '.join(counts)}."

    def by_block(self) -> list[SinkRow]:
        """The heads of a block together: a row for each block and kind of token that has sinks."""
        rows = []
        for block in sorted({head.block for head in self.heads}):
            for token in get_args(SinkToken):
                parts = [h.tokens[token] for h in self.heads if h.block == block and token in h.tokens]
                kinds = [part.kind for part in parts]
                counts = {kind: kinds.count(kind) for kind in get_args(SinkKind) if kind in kinds}
                if parts:
                    rows.append(SinkRow(block, token, counts, merge_sinks(parts)))
        return rows

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SinkReport:
        """The inverse of ``dataclasses.asdict``.

        Raises:
            TypeError: A field is missing, or there is one too many.
        """
        heads = [
            HeadSinks(**{**head, "tokens": {token: Sinks(**sinks) for token, sinks in head["tokens"].items()}})
            for head in values["heads"]
        ]
        return cls(**{**values, "heads": heads})


def kind_of(no_op: float, broadcast: float) -> SinkKind:
    """The kind of sinks of which such shares are no-op and broadcast."""
    return "no-op" if no_op > 0.5 else "broadcast" if broadcast > 0.5 else "unclear"


def merge_sinks(parts: Sequence[Sinks]) -> Sinks:
    """Sinks of several heads, or several kinds of tokens, together; ``per_image`` is their sum."""
    number = sum(part.number for part in parts)

    def mean(name: str) -> float:
        return float(sum(getattr(part, name) * part.number for part in parts)) / number

    ratio = 1.0
    for part in parts:
        ratio *= part.value_ratio ** (part.number / number)
    return Sinks(
        number=number,
        per_image=sum(part.per_image for part in parts),
        attention=mean("attention"),
        value_ratio=ratio,
        stable_rank=mean("stable_rank"),
        no_op=mean("no_op"),
        broadcast=mean("broadcast"),
    )


def head_kind(tokens: dict[str, Sinks]) -> SinkKind | None:
    """The kind of a head with such sinks; ``None`` where hardly an image has one."""
    if not tokens:
        return None
    together = merge_sinks(list(tokens.values()))
    return together.kind if together.per_image >= _FEW else None


_PLACES = {"cls": "CLS", "register": "registers", "outlier": "patches", "other": "patches"}
_HELP = {
    ("no-op", "patches"): "these heads park attention where nothing is read, and the patch pays for it. Gates help "
    "this kind: a gate on a head's output lets it do nothing without a sink, but has to be learned by the model. On a "
    "frozen model a spare token is another place to park: fit a register, and compare with an untrained one.",
    ("broadcast", "patches"): "all tokens read what these patches hold, and nearly the same of it. Registers help "
    "this kind: they give it a place of its own. Gates do not, and can make more of it.",
    ("unclear", "patches"): "neither parked attention nor one vector for all. Try registers, and measure the task "
    "before and after.",
    ("no-op", "CLS"): "attention is parked there, which costs no patch: nothing to repair.",
    ("broadcast", "CLS"): "it tells all tokens the same, which costs no patch: nothing to repair.",
    ("unclear", "CLS"): "no patch is lost: nothing to repair.",
    ("no-op", "registers"): "attention is parked there instead of on patches: nothing to repair.",
    ("broadcast", "registers"): "they tell all tokens the same: what registers are for.",
    ("unclear", "registers"): "no patch is lost: nothing to repair.",
}


def advise(heads: Iterable[HeadSinks]) -> list[str]:
    """What follows from the sinks of a model: for each kind of sink and place where they are, and what helps."""
    where: dict[tuple[str, str], set[tuple[int, int]]] = {}
    for head in heads:
        if head.kind is None:
            continue
        for token, sinks in head.tokens.items():
            if sinks.per_image >= _FEW:
                where.setdefault((sinks.kind, _PLACES[token]), set()).add((head.block, head.head))
    said = []
    for key, helps in _HELP.items():
        if some := where.get(key):
            blocks = ", ".join(str(block) for block in sorted({block for block, _ in some}))
            count = "one head" if len(some) == 1 else f"{len(some)} heads"
            kind, place = key
            said.append(f"{kind.capitalize()} sinks on {place} in {count} (block {blocks}): {helps}")
    return said
