"""Export of a saved adapter, as the command line does it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import HFValidationError
from torch import nn
from transformers.utils import cached_file

from ..errors import AdapterFileError, MissingExtraError
from ..tuner.composed.folder import holds_several
from ..tuner.config import RegisterConfig
from ..tuner.peft_model import RegisterPeftModel
from ..utils.files import check_regular
from ..utils.hub import CONFIG_NAME, MANIFEST_NAME, HubAccessError
from ..utils.models import loading, require_model
from ..utils.shipped import full_name, local_folder
from ..utils.staging import check_target, real_path, staged
from .native import export_native, save_native
from .program import export_onnx, export_program
from .subject import Subject, example_inputs

__all__ = ["FORMATS", "export_saved"]


def _native(model: nn.Module, out: Path, image_size: int | None) -> str:
    plain = export_native(model, image_size=image_size)
    save_native(plain, out)
    return f"{type(plain).__name__} in {out}"


def _onnx(model: nn.Module, out: Path, image_size: int | None) -> str:
    path = out / "model.onnx"
    return f"{path} (outputs: {', '.join(export_onnx(model, path, example_inputs(Subject.of(model), image_size)))})"


def _program(model: nn.Module, out: Path, image_size: int | None) -> str:
    path = out / "model.pt2"
    return f"{path} (outputs: {', '.join(export_program(model, path, example_inputs(Subject.of(model), image_size)))})"


#: Name of a format -> what writes it into a folder and says what was written.
FORMATS: dict[str, Callable[[nn.Module, Path, int | None], str]] = {
    "native": _native,
    "onnx": _onnx,
    "program": _program,
}
#: What each writes, beside the image processor of a model of transformers.
_FILES = {"native": ("config.json", "model.safetensors"), "onnx": ("model.onnx",), "program": ("model.pt2",)}
_PROCESSOR = "preprocessor_config.json"


def export_saved(
    adapter: str | Path, out: str | Path, form: str = "native", base: str | None = None, image_size: int | None = None
) -> str:
    """Load a saved adapter on its base and export the two.

    Args:
        adapter: Folder of the adapter, or repository on the Hub.
        out: Folder for the result, made if it does not exist; it must not be the adapter's or the base's.
        form: One of :data:`FORMATS`.
        base: Folder or name of the base; default the one in the adapter's config. For timm what ``create_model`` takes,
            such as ``hf-hub:timm/…`` or ``local-dir:…``.
        image_size: Side of the images in pixels, see :func:`export_native`; for ``onnx`` and ``program`` the size
            that the graph is made for.

    Returns:
        One line on what was written where.

    Raises:
        ValueError: An unknown format, no base, or ``out`` is the folder of the adapter or the base.
        RegisterAdapterError, OSError: As for loading and for :func:`export_native`.
    """
    if form not in FORMATS:
        raise ValueError(f"unknown format {form!r}; there are {', '.join(FORMATS)}")
    if base == "":
        raise ValueError("base= is empty; give a name, or leave it out")
    check_target(out, files=(*_FILES[form], _PROCESSOR))
    if holds_several(adapter):
        then = (
            "merge the others with its merge_and_unload(), then register_adapter.export.export_native(model)"
            if form == "native"
            else f"then register_adapter.export.export_{form}(model, path)"
        )
        raise AdapterFileError(
            f"{str(adapter)!r} holds several adapters, and the command line exports one of registers alone. In Python: "
            f"load_adapters(base, folder), {then}."
        )
    given, config = base, RegisterConfig.from_pretrained(str(adapter))
    base = full_name(base) if base else config.base_model_name_or_path
    if not base:
        raise ValueError(f"the adapter {str(adapter)!r} does not name its base model: give it with --base")
    target = Path(out)
    if real_path(target) in map(real_path, (adapter, base.removeprefix("local-dir:"))):
        raise ValueError(f"{target} holds the adapter or its base; give another folder with --out")
    if form == "native" and any((target / name).exists() for name in (CONFIG_NAME, MANIFEST_NAME)):
        raise ValueError(
            f"{target} holds an adapter, which would be loaded in its place; give another folder with --out"
        )
    mapping = config.auto_mapping or {}
    library = mapping.get("parent_library", "transformers").partition(".")[0]
    load = _LOADERS.get(library)
    if load is None:
        raise ValueError(
            f"the adapter's base is a {mapping.get('base_model_class')} of {library!r}; the command line knows "
            f"{', '.join(_LOADERS)}. Load it in Python and use register_adapter.export.export_native."
        )
    try:
        loaded = load(base, mapping)
    except (OSError, HubAccessError) as error:
        if given:
            raise
        raise HubAccessError(
            f"the base of the adapter {str(adapter)!r} cannot be loaded by the name in its config: {error}; or name "
            "the base with --base"
        ) from error
    model = RegisterPeftModel.from_pretrained(loaded, adapter)
    processor = None
    if library == "transformers":
        # So that AutoImageProcessor works on the folder too; before anything is written.
        with loading(base, "image processor"):
            processor = cached_file(local_folder(base), _PROCESSOR, _raise_exceptions_for_missing_entries=False)
    try:
        said = FORMATS[form](model, target, image_size)
    except AssertionError as error:  # timm's, of a size that the model does not take
        raise ValueError(f"{type(model).__name__} cannot be run at image_size={image_size}: {error}") from error
    if processor is not None:
        with staged(target) as scratch:
            shutil.copyfile(processor, scratch / _PROCESSOR)
    return said


def _transformers(base: str, mapping: dict[str, str]) -> nn.Module:
    check_regular(base)
    kind: Any = getattr(transformers, mapping.get("base_model_class", ""), transformers.AutoModel)
    require_model(base)
    try:
        with loading(base):
            model: nn.Module = kind.from_pretrained(local_folder(base))
    except HFValidationError as error:  # newer transformers say something like this themselves
        raise OSError(f"the base {base!r} is neither a folder nor the name of a repository on the Hub") from error
    return model


def _timm(base: str, mapping: dict[str, str]) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise MissingExtraError("timm models", "timm", "timm") from error
    with loading(base):
        model: nn.Module = timm.create_model(base, pretrained=True)
    return model


# Top-level package of the base's class -> how it is loaded.
_LOADERS: dict[str, Callable[[str, dict[str, str]], nn.Module]] = {"transformers": _transformers, "timm": _timm}
