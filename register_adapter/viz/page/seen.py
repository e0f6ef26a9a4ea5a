"""What there is to see on a map, in words, for those who cannot see it."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["colours_seen", "peak_seen"]

_ROWS, _COLUMNS = ("upper", "middle", "lower"), ("left", "middle", "right")
_COLOURS = ("red", "green", "blue")


def peak_seen(values: Any, form: str = ".3g") -> str:
    """Where a map ``(h, w)`` is brightest, how bright, and how bright its usual place is."""
    array = np.nan_to_num(np.asarray(values, np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    height, width = array.shape
    if not array.any():
        return f"{height} × {width} patches, all 0"
    row, column = np.unravel_index(int(array.argmax()), array.shape)
    return (
        f"{height} × {width} patches, largest {array.max():{form}} in row {row + 1}, column {column + 1} "
        f"({_place(int(row), int(column), height, width)}), median {np.median(array):{form}}"
    )


def _place(row: int, column: int, height: int, width: int) -> str:
    vertical, horizontal = _ROWS[3 * row // height], _COLUMNS[3 * column // width]
    return vertical if vertical == horizontal else f"{vertical} {horizontal}"


def colours_seen(colours: Any) -> str:
    """How much of an image ``(h, w, 3)`` is mostly red, green, and blue."""
    array = np.asarray(colours, np.float64)
    strongest = np.bincount(array.reshape(-1, 3).argmax(-1), minlength=3) / max(array.shape[0] * array.shape[1], 1)
    parts = [f"{share:.0%} mostly {name}" for name, share in zip(_COLOURS, strongest, strict=True) if share]
    return f"{array.shape[0]} × {array.shape[1]} patches, {', '.join(parts)}"
