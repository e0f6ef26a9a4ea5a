"""The model a user holds: PEFT's own, saved all or nothing, with a card that says how to load it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from torch import nn

from ..utils.adapter_file import check_savable
from ..utils.hub import CONFIG_NAME, WEIGHTS_NAME, check_folder, checked_token, hub_errors, upload
from ..utils.offloaded import state_with_values
from ..utils.parameters import check_module, trainable_in_words
from ..utils.readme import copy_readme
from ..utils.staging import staged
from .card import check_facts, check_passed_on, update_model_card, warn_of_local_base
from .config import RegisterConfig
from .fields import check_name, check_string
from .heads import heads_aside
from .hooks.choice import EVERYONE
from .layer import find_register_layer, register_layers, renew_bases
from .left_out import registers_left_out
from .reading import check_method, note_checksums
from .saved_keys import check_copies
from .undo import unchanged_if_refused

__all__ = ["RegisterPeftModel", "add_registers"]


class RegisterPeftModel(PeftModel):
    """A :class:`peft.PeftModel` whose ``save_pretrained`` replaces files as a whole and writes a register card."""

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        **kwargs: Any,
    ) -> RegisterPeftModel:
        """Load an adapter onto its base model, from a folder or from the Hub.

        The same as ``PeftModel.from_pretrained``, with errors that say what the Hub refused; PEFT's says only that it
        cannot find the config.

        Args:
            model: The base model.
            model_id: Folder, or repository on the Hub.
            adapter_name: Name of the adapter in the model.
            is_trainable: Whether the registers get gradients; default frozen.
            config: A config to use in place of the saved one.
            **kwargs: ``revision``, ``subfolder``, ``token``, ``cache_dir``… for the Hub; ``ignore_base_mismatch``.

        Raises:
            HubAccessError: The repository, the revision or the file is not there or not for this token, or the Hub
                cannot be reached.
            AdapterFileError: The weights are missing, pickled, damaged, or do not fit their config.
            BaseModelMismatchError: The adapter was made for another base model.
        """
        check_name(adapter_name)
        kwargs["token"] = checked_token(kwargs.get("token"))
        if config is None:
            config = RegisterConfig.from_pretrained(str(model_id), **kwargs)
        check_folder(model_id, kwargs.get("subfolder"))
        with hub_errors(str(model_id), kwargs.get("revision"), kwargs["token"]), unchanged_if_refused(model):
            loaded: RegisterPeftModel = super().from_pretrained(
                model, str(model_id), adapter_name, is_trainable=is_trainable, config=config, **kwargs
            )
        return loaded

    def load_adapter(self, model_id: str | Path, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """As in PEFT; an adapter that is refused leaves the model as it was.

        Raises:
            AdapterFileError, BaseModelMismatchError, HubAccessError: As for :meth:`from_pretrained`.
        """
        check_name(adapter_name)
        check_folder(model_id, kwargs.get("subfolder"))
        check_method(model_id, kwargs.get("subfolder"))
        with hub_errors(str(model_id), kwargs.get("revision"), kwargs.get("token")), unchanged_if_refused(self):
            return super().load_adapter(str(model_id), adapter_name, *args, **kwargs)

    def add_adapter(self, adapter_name: str, peft_config: PeftConfig, *args: Any, **kwargs: Any) -> None:
        """As in PEFT, and never over an adapter that is there, as PEFT 0.18 would have it.

        Raises:
            ValueError: The name is in use, or cannot be one.
            TypeError: It is not a string.
        """
        check_name(adapter_name)
        if adapter_name in self.peft_config:
            raise ValueError(f"the model has an adapter {adapter_name!r} already; choose another adapter_name")
        super().add_adapter(adapter_name, peft_config, *args, **kwargs)

    def set_adapter(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As in PEFT; ``TypeError`` for what is no string."""
        check_string(adapter_name)
        super().set_adapter(adapter_name, *args, **kwargs)

    def delete_adapter(self, adapter_name: str) -> None:
        """As in PEFT; ``TypeError`` for what is no string."""
        check_string(adapter_name)
        super().delete_adapter(adapter_name)
        active = self.active_adapters
        if self.__dict__["active_adapter"] not in self.peft_config and active:
            self.__dict__["active_adapter"] = active[0]  # PEFT's is out of date where several are active

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """As in PEFT, for the passes that this thread makes: other threads keep the registers.

        Modules of ``modules_to_save`` are PEFT's, whose switch is every thread's: they are the base's while any thread
        is in such a context.
        """
        with ExitStack() as stack:
            stack.enter_context(heads_aside(self))
            stack.enter_context(registers_left_out(self, [EVERYONE]))
            yield

    @property
    def has_active_enabled_adapter(self) -> bool:
        """As in PEFT, also when the last adapter was deleted."""
        aside = all(layer.disable_adapters for layer in register_layers(self))
        return bool(self.peft_config) and not aside and bool(super().has_active_enabled_adapter)

    def get_base_model(self) -> nn.Module:
        """The base model, registers on it; also when the last adapter was deleted."""
        model: nn.Module = self.base_model.model
        return model

    def print_trainable_parameters(self) -> None:
        """As in PEFT, and a line with the size of each part."""
        super().print_trainable_parameters()
        print(f"trained: {trainable_in_words(self)}")  # noqa: T201 - as PEFT's own does

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's forward pass; ``adapter_names`` as in PEFT; ``UnsupportedModelError`` without the tower."""
        # PEFT's nested contexts, which a short pass notices, where they have work.
        if self.special_peft_forward_args.isdisjoint(kwargs):
            return self.base_model.model(*args, **kwargs)
        return super().forward(*args, **kwargs)

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
            ValueError: ``safe_serialization=False`` or ``save_embedding_layers=True``, the path is a file, the last
                adapter was deleted, or a value is not finite, which no loader takes; nothing was written.
            OSError: The files could not be written; what was in the folder is as before.
        """
        if not safe_serialization:
            raise ValueError("register adapters are saved as safetensors only; leave safe_serialization=True")
        target = Path(save_directory)
        if target.is_file():
            raise ValueError(f"{target} is a file; save_pretrained needs a folder")
        if not self.peft_config:
            raise ValueError("the model has no adapters, so there is nothing to save; add one with add_adapter")
        if is_main_process:
            kwargs["state_dict"] = kwargs.get("state_dict") or state_with_values(self)
            for name in kwargs.get("selected_adapters") or self.peft_config:
                check_copies(self, name)
                check_savable(kwargs["state_dict"], name)
        try:
            # The config first, which has a checksum of the weights: cut short in between, the two do not fit together.
            with staged(save_directory, last=(CONFIG_NAME, WEIGHTS_NAME)) as staging:
                copy_readme(target, staging)
                self._save_each(staging, is_main_process, **kwargs)
                if is_main_process:
                    note_checksums(staging)
                    # PEFT has written the card before the weights; now it can tell whether they are new.
                    self._write_card(staging, adapter=target.absolute().name, names=kwargs.get("selected_adapters"))
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"the adapter could not be saved to {target} ({error}); what was there before is untouched"
            ) from error

    def _save_each(
        self,
        folder: Path,
        is_main_process: bool,
        selected_adapters: list[str] | None = None,
        state_dict: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """The adapters, from one state of the model with their values."""
        state = state_with_values(self) if state_dict is None else state_dict
        names = list(self.peft_config) if selected_adapters is None else selected_adapters
        renew_bases(self)
        super().save_pretrained(
            str(folder), is_main_process=is_main_process, selected_adapters=names, state_dict=state, **kwargs
        )

    def create_or_update_model_card(self, output_dir: str) -> None:
        """Write the adapter's model card into ``output_dir``, keeping the text of one that is there."""
        self._write_card(Path(output_dir))

    def _write_card(self, folder: Path, names: list[str] | None = None, **facts: Any) -> None:
        # A card describes one adapter: the active one, if it is among those that are saved.
        active = [name for name in self.active_adapters if not names or name in names]
        name = (active or names or list(self.peft_config))[0]
        config = self.peft_config[name]
        if not isinstance(config, RegisterConfig):
            return
        # PEFT saves an adapter of another name than "default" into a folder of that name.
        subfolder = None if name == "default" else name
        update_model_card(folder / "README.md", config, type(self.get_base_model()), subfolder=subfolder, **facts)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload register adapter",
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        tags: list[str] | None = None,
        training_data: str | None = None,
        evaluation_data: str | None = None,
        metrics: Mapping[str, Any] | None = None,
        run: dict[str, Any] | None = None,
        license: str | None = None,
        **kwargs: Any,
    ) -> CommitInfo:
        """Upload the adapter to a repository on the Hub, in one commit; it is made if it does not exist.

        The README that the repository has is fetched first: text and metadata that somebody wrote there are kept, and
        only the generated part of the card is brought up to date.

        Args:
            repo_id: The repository, ``"user/repo"``.
            commit_message: First line of the commit.
            commit_description: The rest of it.
            private: Make a new repository private; no effect on one that exists. ``None`` is the account's default.
            token: Access token; ``None`` uses the one of ``hf auth login`` or ``HF_TOKEN``.
            revision: Branch to commit to, made if it does not exist; default ``main``.
            create_pr: Open a pull request instead of committing.
            tags: More tags for the card.
            training_data: What the registers were trained on, for the card; see :func:`update_model_card`.
            evaluation_data: What ``metrics`` were measured on.
            metrics: Measured results for the card.
            run: More about the run for the card.
            license: Licence of the adapter for the card.
            **kwargs: For :meth:`save_pretrained`, such as ``selected_adapters``.

        Returns:
            The commit, with its ``oid`` and ``commit_url``.

        Raises:
            HubAccessError: The Hub refused it or cannot be reached, or somebody else has committed meanwhile; nothing,
                or an empty new repository, is left behind then.
            TypeError, ValueError: The token has characters that no token has, a keyword is unknown, a fact for the card
                is wrong, or the adapter cannot be saved; nothing was uploaded.
        """
        token = checked_token(token)
        check_passed_on(kwargs)
        facts: dict[str, Any] = {
            "training_data": training_data,
            "metrics": metrics,
            "license": license,
            "tags": tags or (),
        }
        facts |= {"evaluation_data": evaluation_data, "run": run}
        check_facts(**facts)
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch, "adapter")
            self.save_pretrained(folder, **kwargs)  # what cannot be saved makes no repository

            def write_card(name: str) -> None:
                self._write_card(folder, adapter=name, names=kwargs.get("selected_adapters"), **facts)
                warn_of_local_base(self.peft_config)

            return upload(
                folder,
                repo_id,
                write_card,
                commit_message=commit_message,
                commit_description=commit_description,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
            )


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
    check_module(model)
    check_name(adapter_name)
    config = RegisterConfig(num_registers=num_registers, **kwargs)
    if isinstance(model, PeftModel):
        raise ValueError(
            f"{type(model).__name__} carries a PEFT adapter already. Add registers to it with "
            + (
                "model.add_adapter(name, RegisterConfig(...))."
                if find_register_layer(model) is not None
                else 'compose(model, {"registers": RegisterConfig(...)}).'
            )
        )
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = getattr(model, "name_or_path", None) or None
    return RegisterPeftModel(model, config, adapter_name)
