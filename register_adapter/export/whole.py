"""A folder of a model, written whole: never a part of one, nor weights of another one beside it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..utils.staging import staged

__all__ = ["model_folder"]

#: Files of weights, whole or in shards, as transformers and timm name them.
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


@contextmanager
def model_folder(folder: str | Path) -> Iterator[Path]:
    """A scratch folder whose files replace a model's in ``folder``, when the block ends without an exception.

    Yields:
        The scratch folder.

    Raises:
        OSError: A file cannot be written; what was there before is untouched.
        ValueError: ``folder`` is a file.
    """
    with staged(folder, last=("config.json",)) as scratch:
        yield scratch
        written = {path.name for path in scratch.iterdir()}
    for path in Path(folder).iterdir():  # an earlier model's, which would be read beside the new ones or instead
        if _WEIGHTS.fullmatch(path.name) and path.name not in written:
            path.unlink()
