"""Reading images from the wild: any common file becomes an upright 8-bit RGB image, or an error that names it."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

from ..errors import RegisterAdapterError
from ..utils.files import open_regular
from ..utils.text import printable
from .sources import no_image

__all__ = [
    "MAX_ASPECT",
    "ImageFileError",
    "check_image",
    "check_pixels",
    "image_name",
    "leads_up",
    "load_image",
    "named_folder",
    "refuse_word",
    "to_rgb",
    "walk_files",
]

#: Longest side over shortest: a processor that scales the short side to 224 would make 1 x 20,000 pixels 3 GB.
MAX_ASPECT = 100
# Raster formats only: Pillow's EPS reader, for one, runs Ghostscript on whatever carries its signature.
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "MPO", "JPEG2000", "AVIF", "ICO")
#: Pixels that are converted at once where that takes several copies.
_BAND = 2**21
_ADDRESS = "file://"


class ImageFileError(RegisterAdapterError, ValueError):
    """A file is not an image, or is not a whole one, or too large, or its colours are not defined."""


class _SizeError(ValueError):
    """An image has too many pixels, or is too thin."""


def load_image(source: Any, name: str | None = None) -> Image.Image:
    """Read an image and convert it with :func:`to_rgb`.

    Its size is looked at before it is decoded: it may have as many pixels as Pillow takes without a warning
    (``PIL.Image.MAX_IMAGE_PIXELS``, 89 million; ``None`` for any number), and sides of 1 to :data:`MAX_ASPECT`.

    Args:
        source: A path, the file's bytes, a PIL image, or an undecoded ``datasets`` image
            (``{"path": ..., "bytes": ...}``).
        name: What to call it in an error; the path by default.

    Returns:
        An RGB image, fully decoded.

    Raises:
        ImageFileError: The file is missing, no regular file, empty, truncated, not an image, too large, or cannot be
            converted.
    """
    name = name or image_name(source)
    try:
        with _opened(source) as image:
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
        with _opened(source) as image:
            if decode:
                to_rgb(image)
    except Exception as error:
        return _reason(source, error)
    return None


def image_name(source: Any) -> str:
    """A name for an image in messages: its path where it has one, with every character visible."""
    if isinstance(source, dict | str | os.PathLike):
        path = source.get("path") if isinstance(source, dict) else source
        return printable(_file_of(path)) if path else "image without a name"
    return printable(getattr(source, "filename", None) or "image without a name")


#: Words for images that the package draws, to what they are.
_DRAWN = {
    "scenes": "scenes that the package draws, with classes, masks, distances and boxes",
    "mosaics": "mosaics that the package draws, which have no classes",
    "tiles": "mosaics of tiles that the package draws, which have no classes",
}


def refuse_word(name: str | Path | None) -> None:
    """Say what a word for drawn images means, where it is given for a folder of images and there is no such folder.

    Raises:
        ValueError: ``name`` is such a word.
    """
    meaning = _DRAWN.get(os.fspath(name)) if name is not None else None
    if meaning is None or Path(str(name)).exists():
        return
    where = "eval, audit" if name == "scenes" else "audit"
    written = " (register_adapter.testbed.SceneDataset(512, seed=1).write(folder) makes one)"
    raise ValueError(
        f"there is no folder {name!r} here; as a word it stands for {meaning}. The commands {where}, probe, fit and "
        f"features take it. Here give a folder of images{written if name == 'scenes' else ''}, or where there are "
        "classes to learn or to tell, a data set that has them."
    )


def named_folder(folder: str | Path) -> Path:
    """A folder by its name, which may not be empty: that would be the one where the process happens to run.

    Raises:
        ValueError: It is, or is a word for drawn images where these cannot be used.
    """
    if not os.fspath(folder):
        raise ValueError("the name of the folder of images is empty; give one (. is the current folder)")
    refuse_word(folder)
    return Path(folder)


def walk_files(folder: str | Path) -> list[Path]:
    """All files of a folder and of those below it, sorted, but for hidden ones, whether they are images or not.

    Links to other folders are followed, but not those to one that they are in themselves. A folder that cannot be
    listed stands for its files, so that whoever reads them names it.
    """
    paths: list[Path] = []
    unlisted: list[OSError] = []
    seen: set[str] = set()
    for place, folders, files in os.walk(folder, followlinks=True, onerror=unlisted.append):
        real = os.path.realpath(place)
        if real in seen:  # a link to a folder above would be walked forever
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".") and not leads_up(Path(place, name))]
        paths += [Path(place, name) for name in files if not name.startswith(".")]
    return sorted([*paths, *(Path(error.filename) for error in unlisted)])


def leads_up(path: Path) -> bool:
    """Whether a path is a link to a folder that it is in itself."""
    if not path.is_symlink():
        return False
    target, place = Path(os.path.realpath(path)), Path(os.path.realpath(path.parent))
    return target == place or target in place.parents


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to RGB, as a viewer would show it.

    The first frame of an animation is taken, the EXIF orientation applied, transparency laid on white, and 16-bit grey
    divided by 257, so that 65535 becomes 255 (Pillow's own conversion clips at 255). Float images are taken as 0…1.
    CMYK is converted by Pillow's formula; colour profiles are not applied.

    Args:
        image: A PIL image of any mode.

    Returns:
        A decoded image of mode ``"RGB"``; the image itself if it is one already.

    Raises:
        ValueError: The image's values have no defined white point: 32-bit integers beyond 16 bits, or floats
            outside 0…1.
    """
    image.load()
    _check_size(*image.size)  # an icon's file may hold another size than its header says
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        return _from_wide(image)
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        return _in_bands(image, _on_white)
    return image if image.mode == "RGB" else image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _from_wide(image: Image.Image) -> Image.Image:
    """8-bit grey, as RGB, from 16-bit integers or floats."""
    extremes = [(values.min(), values.max()) for values in map(np.asarray, _bands(image))]
    lows, highs = zip(*extremes, strict=True)
    low, high = float(np.min(lows)), float(np.max(highs))
    integers = image.mode != "F"
    white = 65535.0 if integers else 1.0
    if not (low >= 0 and high <= white):
        kind = "integer" if integers else "float"
        raise ValueError(f"{kind} values from {low:g} to {high:g}, expected 0 to {white:g}; save it as 8 or 16 bits")

    def grey(band: Image.Image) -> Image.Image:
        values = np.asarray(band).astype(np.float64)
        return Image.fromarray(np.rint(values * (255.0 / white)).astype(np.uint8)).convert("RGB")

    return _in_bands(image, grey)


def _in_bands(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Convert pixel by pixel to RGB, a few rows at a time: the copies on the way are never of the whole image."""
    made, top = Image.new("RGB", image.size), 0
    for band in _bands(image):
        made.paste(convert(band), (0, top))
        top += band.height
    return made


def _bands(image: Image.Image) -> Iterator[Image.Image]:
    rows = max(_BAND // image.width, 1)
    for top in range(0, image.height, rows):
        yield image.crop((0, top, image.width, min(top + rows, image.height)))


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


@contextmanager
def _opened(source: Any) -> Iterator[Image.Image]:
    """The image that a source is or leads to, of a size that may be decoded; nothing is decoded yet.

    Raises:
        _SizeError: It has too many pixels, or is too thin.
        Exception: Whatever Pillow raises.
    """
    with ExitStack() as stack:
        image = _own(source, stack) if isinstance(source, Image.Image) else _open(source, stack)
        _check_size(*image.size)
        yield image


def _open(source: Any, stack: ExitStack) -> Image.Image:
    if isinstance(source, dict):
        source = source["bytes"] if source.get("bytes") is not None else source["path"]
    file = stack.enter_context(io.BytesIO(source) if isinstance(source, bytes) else open_regular(_file_of(source)))
    image: Image.Image = stack.enter_context(Image.open(file, formats=_formats()))
    return image


def _own(source: Image.Image, stack: ExitStack) -> Image.Image:
    """An image that may be decoded and changed: a copy, or the file anew where the caller's has not been decoded.

    Decoding the caller's would keep its pixels for as long as the caller keeps it, image after image.
    """
    _check_size(*source.size)
    if isinstance(source, ImageFile.ImageFile) and source.tile and source.filename and not source.tell():
        opened = ExitStack()
        try:
            again = _open(source.filename, opened)
        except Exception:  # of another format than those above, or gone: the caller's own has it open
            opened.close()
        else:
            stack.push(opened)
            if (again.size, again.mode) == (source.size, source.mode):  # but for a draft
                return again
    copied: Image.Image = source.copy()
    return copied


def check_pixels(width: int, height: int) -> None:
    """Refuse a size that an image must not have, whether it comes so or is to be resized to it.

    Raises:
        ValueError: It has more pixels than ``PIL.Image.MAX_IMAGE_PIXELS``.
    """
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise _SizeError(f"{width} × {height} pixels are more than {limit} (PIL.Image.MAX_IMAGE_PIXELS)")


def _check_size(width: int, height: int) -> None:
    check_pixels(width, height)
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise _SizeError(f"{width} × {height} pixels: one side is more than {MAX_ASPECT} times the other")


def _file_of(path: Any) -> str:
    """A path, also where it stands as an address because it is not UTF-8; see :func:`path_text`."""
    text = os.fsdecode(path)
    return os.fsdecode(unquote_to_bytes(text.removeprefix(_ADDRESS))) if text.startswith(_ADDRESS) else text


def _reason(source: Any, error: Exception) -> str:
    """Pillow's errors speak of buffers and streams; say what is wrong with the file instead."""
    data = source.get("bytes") if isinstance(source, dict) else source
    path = source.get("path") if isinstance(source, dict) else source
    if (wrong_kind := no_image(source)) is not None:
        return wrong_kind
    if data is None and path is None:
        return "there is no image"
    size, mode = len(data) if isinstance(data, bytes) else 1, stat.S_IFREG
    if not isinstance(data, bytes) and isinstance(path, str | os.PathLike):
        try:
            status = Path(_file_of(path)).stat()
            size, mode = status.st_size, status.st_mode
        except OSError as missing:
            return missing.strerror or printable(missing)
        except ValueError as wrong:  # a zero byte in the path
            return printable(wrong)
    return _odd_file(path, size, mode) or _fault(error)


def _odd_file(path: Any, size: int, mode: int) -> str | None:
    if stat.S_ISDIR(mode):
        try:
            os.scandir(_file_of(path)).close()
        except OSError as error:
            return f"a folder whose files cannot be listed ({error.strerror})"
        return "a folder and not a file"
    if not stat.S_ISREG(mode):
        return "not a regular file but a pipe, a socket or a device"
    return None if size else "the file is empty"


def _fault(error: Exception) -> str:
    if isinstance(error, PermissionError):
        return error.strerror or printable(error)
    if isinstance(error, _SizeError):
        return str(error)
    if isinstance(error, UnidentifiedImageError):
        return f"not an image, or its header is damaged (formats that are read: {', '.join(_formats())})"
    if isinstance(error, Image.DecompressionBombError):
        return f"too many pixels ({printable(error)})"
    if isinstance(error, MemoryError):
        return "not enough memory to decode it"
    return f"damaged or not readable ({printable(error) or type(error).__name__})"
