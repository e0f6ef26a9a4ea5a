"""Saving a model with adapters of several methods by the calls and arguments that PEFT and its users know."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import CommitInfo
from peft import PeftModel

from ...errors import AdapterFileError
from ...utils.adapter_file import check_plain, check_savable_values
from ...utils.hub import CONFIG_NAME, MANIFEST_NAME, check_folder, checked_token, hub_errors, upload
from ...utils.offloaded import state_with_values
from ...utils.parameters import trainable_by_part, trainable_in_words
from ...utils.readme import read_readme
from ..card import check_facts
from ..checks.copied_layers import check_own_layers
from ..fields import check_known, check_string
from ..layer import renew_bases
from ..positions.model import renew_base
from ..reading import check_method, naming, read_json
from ..saved_keys import check_copies
from ..undo import unchanged_if_refused, values_kept
from .card import write_card
from .class_names import classes_in_folder, given_classes, note_classes
from .folder import read_folder, write_folder
from .guards import check_unmerged, heads_given
from .methods import KNOW_THEIR_BASE
from .one_adapter import read_alone
from .relocate import relocated, tower_path
from .tensors import adapter_tensors, check_own, check_read
from .tuner import ComposedTuner

__all__ = ["INITS", "SavesAll", "write_adapters"]

#: Where methods' configs choose what to start from: by a word where it is made from the base's weights (PiSSA, OLoRA).
INITS = ("init_lora_weights", "init_weights")


def write_adapters(
    composed: SavesAll,
    folder: str | Path,
    selected_adapters: Iterable[str] | None = None,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write adapters into one folder; see :func:`register_adapter.save_adapters` for what is raised.

    Args:
        composed: The model.
        folder: The folder.
        selected_adapters: Names, default all.
        state_dict: The model's values by its own keys, where they were gathered from several processes.
    """
    names = list(composed.peft_config)
    if selected_adapters is not None:
        names = check_known(selected_adapters, composed.peft_config)
    if not names:
        raise ValueError(f"selected_adapters is empty; the model has {list(composed.peft_config)}")
    check_own_layers(composed.get_base_model(), names)
    check_unmerged(composed.get_base_model(), names)
    for name in names:
        check_copies(composed.get_base_model(), name)
    renew_bases(composed)
    for config in composed.peft_config.values():
        renew_base(composed.get_base_model(), config)
    note_classes(composed.get_base_model(), composed.peft_config)
    state = state_with_values(composed) if state_dict is None else state_dict
    adapters = {name: (composed.peft_config[name], adapter_tensors(composed, name, state)) for name in names}
    for name, (config, tensors) in adapters.items():
        check_plain([key for key in tensors if ".register_adapter_tokens." in key], name)
        check_savable_values(tensors, name, own=isinstance(config, KNOW_THEIR_BASE))
    active = [name for name in composed.active_adapters if name in names]
    write_folder(folder, adapters, active, tower_path(composed.get_base_model()))


@contextmanager
def _unchanged_if_refused(
    composed: SavesAll, names: list[str], folder: str | Path, subfolder: str | None = None
) -> Iterator[None]:
    """A context in which adapters are loaded; a refusal names the folder, and the model and their values are as before.

    Args:
        composed: The model.
        names: The adapters' names; one that the model lacks is put on it.
        folder: Folder or repository that they are read from.
        subfolder: The folder in it, if any.
    """
    check_unmerged(composed.get_base_model(), names)
    path = Path(folder, subfolder or "")
    config = path / CONFIG_NAME
    given = read_json(config) if config.is_file() and not set(names) <= set(composed.peft_config) else {}
    # Some methods begin by changing the base's weights, as an adapter that the model lacks is put on.
    changing = any(isinstance(given.get(field), str) for field in INITS)
    said = [given.get("bias"), *(getattr(composed.peft_config.get(name), "bias", None) for name in names)]
    # LoRA's are the base's own, which it writes over.
    biases = (".bias",) if any(bias not in (None, "none") for bias in said) else ()
    with (
        values_kept(composed, lambda key: key.endswith(biases) or not set(names).isdisjoint(key.split("."))),
        unchanged_if_refused(composed, values=changing),
        naming(path) if path.is_dir() else nullcontext(),
    ):
        yield


def _check_places(loaded: Any, name: str) -> None:
    """Refuse one adapter's values that were saved elsewhere in a model: PEFT reads nothing of them, without a word.

    Args:
        loaded: What ``load_adapter`` returns.
        name: The adapter's name.

    Raises:
        AdapterFileError: The file's keys are not the adapter's here.
    """
    lacking = [key for key in loaded.missing_keys if name in key.split(".")]
    if lacking and loaded.unexpected_keys:
        raise AdapterFileError(
            f"the tensors do not fit the model: it has no {loaded.unexpected_keys[0]!r}, and gets no {lacking[0]!r}. "
            "An adapter of another class of model, such as a backbone without a head, is loaded with the whole folder "
            "that save_adapters wrote"
        )


class SavesAll(PeftModel):
    """A :class:`peft.PeftModel` that is saved and loaded as one folder with an adapter in each subfolder."""

    base_model: ComposedTuner
    #: Saving does so itself; while PEFT gathers one adapter's tensors, the others' configs are out of sight.
    renews_bases = True

    def print_trainable_parameters(self) -> None:
        """As in PEFT, and a line with the size of each part."""
        super().print_trainable_parameters()
        print(f"trained: {trainable_in_words(self)}")  # noqa: T201 - as PEFT's own does

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: Iterable[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        state_dict: dict[str, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Save every adapter into one folder, with the arguments of PEFT's; see :func:`save_adapters`.

        Args:
            save_directory: The folder, made if it does not exist.
            safe_serialization: Must be true; pickled weights are not written.
            selected_adapters: Names of the adapters to save, default all.
            save_embedding_layers: Must not be true; embedding layers are not saved.
            is_main_process: Whether this process writes.
            path_initial_model_for_weight_conversion: Not offered; save that adapter from a model of its own.
            state_dict: The model's values, where they were gathered from several processes.
            **kwargs: ``save_function``, ``max_shard_size`` and others that PEFT takes and does not use.

        Raises:
            ValueError: An argument asks for what is not offered, an adapter is not there, or the path is a file.
            OSError: The files could not be written; what was in the folder is as before.
        """
        if not safe_serialization:
            raise ValueError("adapters are saved as safetensors only; leave safe_serialization=True")
        if save_embedding_layers is True or path_initial_model_for_weight_conversion is not None:
            raise ValueError(
                "save_embedding_layers=True and path_initial_model_for_weight_conversion= are not offered for adapters "
                "of several methods: save that adapter from a PeftModel of its own"
            )
        if is_main_process:
            write_adapters(self, save_directory, selected_adapters, state_dict)
            self.create_or_update_model_card(str(save_directory))

    def load_adapter(self, model_id: str | Path, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """As in PEFT; a folder of :func:`save_adapters` gives every adapter that the model has its values.

        Args:
            model_id: Folder or repository of one adapter, or a folder of several; ``subfolder=`` is the one in it.
            adapter_name: Name of the one adapter; of a folder of several all are loaded, by their own names.
            *args: As in PEFT.
            **kwargs: As in PEFT.

        Raises:
            AdapterFileError: Something in a folder is missing or damaged, does not fit the model, is saved anew
                meanwhile, or is of another method than the model's adapter of that name; nothing was loaded.
            HubAccessError: The repository cannot be read.
            ValueError: A folder of several has an adapter that the model lacks, or tuned layer norms of the adapter are
                merged.
        """
        check_string(adapter_name)
        place = Path(model_id, kwargs.get("subfolder") or "")
        if not (place / MANIFEST_NAME).is_file():
            check_folder(model_id, kwargs.get("subfolder"))
            check_method(model_id, kwargs.get("subfolder"), self.peft_config.get(adapter_name))
            hub = {key: value for key, value in self._split_kwargs(kwargs)[0].items() if value is not None}
            alone = read_alone(model_id, adapter_name, hub.pop("subfolder", None), hub)
            kept = _unchanged_if_refused(self, [adapter_name], model_id, kwargs.get("subfolder"))
            told = hub_errors(str(model_id), kwargs.get("revision"), kwargs.get("token"))
            names = given_classes(self.get_base_model(), {adapter_name: classes_in_folder(place)})
            with told, kept, names, heads_given(), relocated([alone], self.get_base_model()) as placed:
                moved = next(placed)
                if adapter_name in self.peft_config:
                    check_own(self, adapter_name, moved.keys, place)
                if moved.copied_to is not None:
                    model_id = moved.copied_to
                    kwargs.pop("subfolder", None)
                loaded = super().load_adapter(str(model_id), adapter_name, *args, **kwargs)
                _check_places(loaded, adapter_name)
                check_read(self, adapter_name, loaded, place)
                return loaded
        saved = read_folder(place)
        kwargs.pop("subfolder", None)  # it is in their paths
        if lacking := [adapter.name for adapter in saved if adapter.name not in self.peft_config]:
            raise ValueError(
                f"{place} holds the adapters {lacking}, which the model lacks; it has {list(self.peft_config)}. Put "
                "them on a base with load_adapters(base, folder)."
            )
        for adapter in saved:
            check_method(adapter.path, None, self.peft_config[adapter.name])
        result = None
        kept = _unchanged_if_refused(self, [adapter.name for adapter in saved], place)
        classes = {adapter.name: vars(adapter.config).get("saved_id2label") for adapter in saved}
        with (
            kept,
            given_classes(self.get_base_model(), classes),
            relocated(saved, self.get_base_model()) as placed,
        ):
            for adapter in placed:
                with naming(adapter.path):
                    check_own(self, adapter.name, adapter.keys, adapter.path)
                    result = super().load_adapter(str(adapter.copied_to or adapter.path), adapter.name, *args, **kwargs)
                    check_read(self, adapter.name, result, adapter.path)
        return result

    def create_or_update_model_card(self, output_dir: str, **facts: Any) -> None:
        """Write a README that says how to load the folder, and what moved; text that somebody wrote stays.

        Args:
            output_dir: The folder.
            **facts: ``adapter``, ``training_data``, ``evaluation_data``, ``metrics`` and ``run``, as for
                :func:`register_adapter.tuner.card.update_model_card`.
        """
        base = self.get_base_model()
        write_card(
            Path(output_dir, "README.md"),
            dict(self.peft_config),
            type(base),
            getattr(base, "name_or_path", None),
            sizes=trainable_by_part(self),
            **facts,
        )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str | None = None,
        tags: list[str] | None = None,
    ) -> CommitInfo:
        """As in PEFT, in one commit, with the README of the repository kept and brought up to date.

        Args:
            repo_id: The repository, ``"user/repo"``; it is made if it does not exist.
            commit_message: First line of the commit.
            commit_description: The rest of it.
            private: Make a new repository private.
            token: Access token; ``None`` uses the one of ``hf auth login`` or ``HF_TOKEN``.
            revision: Branch to commit to, made if it does not exist; default ``main``.
            create_pr: Open a pull request instead of committing.
            max_shard_size: Not used; adapters are one file each.
            tags: More tags for the card.

        Raises:
            HubAccessError: The Hub refused it or cannot be reached, or somebody else has committed meanwhile.
            TypeError, ValueError: The token has characters that no token has, the tags are no list of strings, or an
                adapter cannot be saved; nothing was uploaded.
        """
        token = checked_token(token)
        check_facts(tags=tags)
        with tempfile.TemporaryDirectory() as scratch:
            self.save_pretrained(Path(scratch, "adapters"))  # what cannot be saved makes no repository
        options = {
            "commit_message": commit_message,
            "commit_description": commit_description,
            "private": private,
            "token": token,
            "revision": revision,
            "create_pr": create_pr,
            "max_shard_size": max_shard_size,
            "tags": tags,
        }
        with hub_errors(repo_id, revision, token):
            pushed = super().push_to_hub(repo_id, **{key: value for key, value in options.items() if value is not None})
        return cast(CommitInfo, pushed)

    def _upload_modified_files(
        self,
        working_dir: str,
        repo_id: str,
        files_timestamps: Any = None,
        commit_message: str | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
        revision: str | None = None,
        commit_description: str | None = None,
    ) -> CommitInfo:
        """The last step of transformers' ``push_to_hub``, with a card that tells of the adapters.

        That of transformers is empty, or the repository's old one; the tags come from it.
        """
        card = read_readme(Path(working_dir, "README.md"))
        tags = card.data.get("tags") if card is not None else None
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch, "adapters")  # the working folder may be the user's own, with other files
            self.save_pretrained(folder)
            (folder / "README.md").unlink()  # it says how to load a folder of no name
            return upload(
                folder,
                repo_id,
                lambda name: self.create_or_update_model_card(str(folder), adapter=name, tags=tags or ()),
                commit_message=commit_message,
                commit_description=commit_description,
                private=None,
                token=token,
                revision=revision,
                create_pr=create_pr,
            )
