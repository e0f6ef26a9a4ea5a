"""Reading images from the wild: any common file becomes an upright 8-bit RGB image, or an error that names it."""

from __future__ import annotations

import io
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import RegisterAdapterError

__all__ = ["ImageFileError", "check_image", "load_image", "to_rgb", "walk_files"]

# Raster formats only: Pillow's EPS reader, for one, runs Ghostscript on whatever carries its signature.
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "MPO", "JPEG2000", "AVIF", "ICO")


class ImageFileError(RegisterAdapterError, ValueError):
    """A file is not an image, or is not a whole one, or its colours are not defined."""


def load_image(source: Any, name: str | None = None) -> Image.Image:
    """Read an image and convert it with :func:`to_rgb`.

    Args:
        source: A path, the file's bytes, a PIL image, or an undecoded ``datasets`` image
            (``{"path": ..., "bytes": ...}``).
        name: What to call it in an error; the path by default.

    Returns:
        An RGB image, fully decoded.

    Raises:
        ImageFileError: The file is missing, empty, truncated, not an image, or cannot be converted.
    """
    name = name or image_name(source)
    try:
        with _open(source) as image:
            return to_rgb(image)
    except Exception as error:
        raise ImageFileError(f"{name}: {_reason(source, error)}") from error


def check_image(source: Any, decode: bool = True) -> str | None:
    """What is wrong with an image, ``None`` if nothing is.

    Args:
        source: As for :func:`load_image`.
        decode: Decode and convert it whole; ``False`` reads the header only, which misses most truncated files.
    """
    try:
        with _open(source) as image:
            if decode:
                to_rgb(image)
    except Exception as error:
        return _reason(source, error)
    return None


def image_name(source: Any) -> str:
    """A name for an image in messages: its path where it has one."""
    if isinstance(source, dict):
        return str(source.get("path") or "image without a name")
    if isinstance(source, str | Path):
        return str(source)
    return str(getattr(source, "filename", None) or "image without a name")


def walk_files(folder: str | Path) -> list[Path]:
    """All files of a folder and of those below it, sorted, but for hidden ones, whether they are images or not."""
    paths: list[Path] = []
    seen: set[str] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link to a folder above would be walked forever
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [Path(place, name) for name in files if not name.startswith(".")]
    return sorted(paths)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to RGB, as a viewer would show it.

    The first frame of an animation is taken, the EXIF orientation applied, transparency laid on white, and 16-bit grey
    divided by 257, so that 65535 becomes 255 (Pillow's own conversion clips at 255). Float images are taken as 0…1.
    CMYK is converted by Pillow's formula; colour profiles are not applied.

    Args:
        image: A PIL image of any mode.

    Returns:
        A decoded image of mode ``"RGB"``.

    Raises:
        ValueError: The image's values have no defined white point: 32-bit integers beyond 16 bits, or floats
            outside 0…1.
    """
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        return _from_wide(np.asarray(image)).convert("RGB")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _from_wide(values: np.ndarray[Any, Any]) -> Image.Image:
    """8-bit grey from 16-bit integers or floats, ``(H, W)``."""
    low, high = float(values.min()), float(values.max())
    integers = bool(np.issubdtype(values.dtype, np.integer))
    white = 65535.0 if integers else 1.0
    if not (low >= 0 and high <= white):
        kind = "integer" if integers else "float"
        raise ValueError(f"{kind} values from {low:g} to {high:g}, expected 0 to {white:g}; save it as 8 or 16 bits")
    return Image.fromarray(np.rint(values.astype(np.float64) * (255.0 / white)).astype(np.uint8))


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _open(source: Any) -> Image.Image:
    if isinstance(source, Image.Image):
        return source.copy()
    if isinstance(source, dict):
        source = source["bytes"] if source.get("bytes") is not None else source["path"]
    if isinstance(source, bytes):
        source = io.BytesIO(source)
    return Image.open(source, formats=_formats())


def _reason(source: Any, error: Exception) -> str:
    """Pillow's errors speak of buffers and streams; say what is wrong with the file instead."""
    data = source.get("bytes") if isinstance(source, dict) else source
    path = source.get("path") if isinstance(source, dict) else source
    try:
        empty = len(data) == 0 if isinstance(data, bytes) else Path(str(path)).stat().st_size == 0
    except OSError:
        empty = False
    if empty:
        return "the file is empty"
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError):
        return error.strerror or str(error)
    if isinstance(error, UnidentifiedImageError):
        return f"not an image, or its header is damaged (formats that are read: {', '.join(_formats())})"
    return f"damaged or not readable ({error or type(error).__name__})"
