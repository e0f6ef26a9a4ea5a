"""Which crossings of models and options are tested: all of a few models, a few of every other."""

from __future__ import annotations

import itertools
import random
from collections.abc import Collection, Iterable
from typing import Any


def crossings(
    rows: Iterable[Any], *axes: Iterable[Any], whole: Collection[Any] = (), each: int = 1
) -> list[tuple[Any, ...]]:
    """Every row with every combination of options if it is in ``whole``, with ``each`` of them otherwise.

    What an option does depends on the kind of model, not on the model: ``whole`` has one of a kind. The others are
    dealt the combinations as from a pack of cards, the same at every call: none comes twice before all have come once.

    Args:
        rows: Models, or tuples that begin a case.
        axes: The values of one option each.
        whole: Rows that meet every combination.
        each: Number of combinations for any other row.
    """
    combinations = list(itertools.product(*axes))
    pack = random.Random(0).sample(combinations, len(combinations))
    dealt = itertools.cycle(pack)
    cases = []
    for row in rows:
        start = row if isinstance(row, tuple) else (row,)
        all_of_them = row in whole or each >= len(combinations)
        chosen = combinations if all_of_them else [next(dealt) for _ in range(each)]
        cases += [(*start, *combination) for combination in chosen]
    return cases
