"""The model a user holds: PEFT's own, saved all or nothing, with a card that says how to load it."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from .card import update_model_card
from .config import RegisterConfig

__all__ = ["RegisterPeftModel", "add_registers"]


class RegisterPeftModel(PeftModel):
    """A :class:`peft.PeftModel` whose ``save_pretrained`` replaces files as a whole and writes a register card.

    ``RegisterPeftModel.from_pretrained(base, "user/repo", revision=..., subfolder=..., token=...)`` loads an adapter as
    ``PeftModel.from_pretrained`` does.
    """

    def save_pretrained(
        self, save_directory: str | Path, safe_serialization: bool = True, is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """Save the adapter (weights, config, card) into a folder.

        The files are written beside the folder and moved into it when all are whole, so that a full disk or a killed
        process leaves an earlier adapter untouched.

        Args:
            save_directory: The folder, made if it does not exist.
            safe_serialization: Must be true; pickled weights are not written.
            is_main_process: Whether this process writes.
            **kwargs: ``selected_adapters`` and ``state_dict`` as in PEFT.

        Raises:
            ValueError: ``safe_serialization=False``, or the path is a file.
            OSError: The files could not be written; what was in the folder is as before.
        """
        if not safe_serialization:
            raise ValueError("register adapters are saved as safetensors only; leave safe_serialization=True")
        target = Path(save_directory)
        if target.is_file():
            raise ValueError(f"{target} is a file; save_pretrained needs a folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            if (target / "README.md").is_file():
                shutil.copyfile(target / "README.md", staging / "README.md")
            try:
                super().save_pretrained(str(staging), is_main_process=is_main_process, **kwargs)
            except Exception as error:
                raise OSError(
                    f"the adapter could not be saved to {target} ({error}); what was there before is untouched"
                ) from error
            for file in sorted(path for path in staging.rglob("*") if path.is_file()):
                place = target / file.relative_to(staging)
                place.parent.mkdir(parents=True, exist_ok=True)
                file.replace(place)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def create_or_update_model_card(self, output_dir: str) -> None:
        """Write the adapter's model card into ``output_dir``, keeping the text of one that is there."""
        config = self.peft_config[self.active_adapter]
        update_model_card(Path(output_dir) / "README.md", config, type(self.get_base_model()))


def add_registers(
    model: nn.Module, num_registers: int = 4, adapter_name: str = "default", **kwargs: Any
) -> RegisterPeftModel:
    """Give a frozen vision transformer trainable register tokens, in one call.

    Args:
        model: A model with a vision tower of a supported family; its parameters are frozen in place.
        num_registers: Number R of registers, default 4.
        adapter_name: Name of the adapter.
        **kwargs: The other arguments of :class:`RegisterConfig`.

    Returns:
        A :class:`peft.PeftModel` whose outputs have the base model's shapes.

    Raises:
        UnsupportedModelError: The model has no tower that registers can enter, or several and none is named.
        TypeError, ValueError: An argument is wrong; the model is unchanged.

    Example:
        >>> model = add_registers(AutoModel.from_pretrained("facebook/dinov2-base"), num_registers=4)
        >>> model.print_trainable_parameters()
    """
    config = RegisterConfig(num_registers=num_registers, **kwargs)
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = getattr(model, "name_or_path", None) or None
    return RegisterPeftModel(model, config, adapter_name)
