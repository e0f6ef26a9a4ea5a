"""The configuration of a register adapter."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from peft import PeftConfig

from ..errors import AdapterFileError, install_command
from ..towers.anatomy import Anatomy
from ..towers.identity import TowerIdentity
from ..towers.untrusted import check_fields
from ..utils.adapter_file import GATE_KEY, NEURON_KEYS, TOKENS_KEY, UNITS_KEY, TensorInfo, check_adapter_file
from ..utils.files import checksum
from ..utils.shipped import is_shipped, local_folder, shipped_name
from ._peft_compat import CHECKS_IMPORTS, METHOD, peft_type
from .fields import check_combinations, check_types, check_values, one_name
from .heads import TASK_HEADS, checked_labels
from .neuron_shift import checked_neurons, count_neurons
from .reading import SavedFolder, SavedWeights, naming, read_json, without_unlisted
from .registers import Placement

__all__ = ["FORMAT_VERSION", "RegisterConfig"]

#: Version of the config and tensor layout; a file with a larger one was written by a newer release.
FORMAT_VERSION = 2


@dataclass
class RegisterConfig(PeftConfig):
    """Configuration of register tokens retrofitted onto a frozen vision transformer.

    Registers are R learned tokens that enter the sequence behind the embedding layer, take part in every attention, and
    are removed from every output ("Vision Transformers Need Registers", arXiv 2309.16588; 4 is the paper's default).

    Args:
        num_registers: Number R of registers, at least 1.
        init: ``"normal"`` (mean 0, standard deviation ``init_std``), ``"zeros"`` (warns: equal registers get equal
            gradients and stay equal for ever), ``"cls"`` (a copy of the CLS token plus that noise), or ``"test_time"``
            (zero, filled by ``register_neurons``: what :func:`fit_test_time_registers` makes), or ``"outliers"`` (what
            :func:`register_adapter.neurons.start_from_outliers` makes).
        init_std: Standard deviation of the initial values, default 0.02.
        target_modules: Name of the vision tower, or the end of it; needed only where a model has several.
        modules_to_save: Modules trained and saved as a whole beside the registers, such as ``["classifier"]``.
        id2label: Number to name of the classes of such a head; default those of the base's config. Loaded with it,
            they stand in the model's config.
        insert_layer: Index k of the first block that has registers, default 0 (behind the embeddings). Blocks before it
            run without gradient, which saves their activations.
        deep: Fresh learned registers at every block from ``insert_layer`` on, in place of the ones that came through
            the block before ("Visual Prompt Tuning", deep, arXiv 2203.12119).
        key_value: Learned key/value pairs in the attention of every block from ``insert_layer`` on, instead of tokens
            in the sequence ("Prefix-Tuning", arXiv 2101.00190).
        gate: Initial value of a learned bias on the attention logits of the registers' keys, one per block and
            register; ``None``, the default, for no gate. At -5 to -10 registers hardly change a model at first.
        register_neurons: Block to its register neurons, hidden units of its MLP whose activations are moved from the
            other tokens to the registers ("Vision Transformers Don't Need Trained Registers", arXiv 2506.08010). A
            saved config has their numbers only; which ones they are is in the weights' file.
            :func:`fit_test_time_registers` finds them.
        remove: What the other tokens keep of those activations: ``"zero"`` nothing, ``"mean"`` the usual activation of
            a patch, ``"outliers"`` everything but what lies beyond the usual, which becomes the usual.
        train_removal: Train how far each neuron's activations are moved, a gate in 0…1 that starts at 1.
        test_time_fit: How the register neurons were found: see :func:`fit_test_time_registers`, which writes it.
        attentions: ``"slice"`` returns attention maps of the base's shape (their rows then sum to less than one),
            ``"full"`` returns them with the registers' rows and columns.
        anatomy: Description of a model that the table of families does not have. As a dictionary, which is what a file
            has, it can name modules and parameters only.
        base_tower: Identity of the base's vision tower; written on attaching, checked on loading. Registers of a config
            that is made with it wait for the values from its file; without them they take no part in the forward pass.
        weights_sha256: Checksum of the weights' file, written by ``save_pretrained``; without one none is compared.
        ignore_base_mismatch: Load the adapter although the base is another one. Never saved or read from a file.
        format_version: Version of the file layout.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument has a value outside the above.
    """

    num_registers: int = field(default=4, metadata={"help": "Number of register tokens, at least 1."})
    init: str = field(default="normal", metadata={"help": "Initial values: 'normal', 'zeros' or 'cls'."})
    init_std: float = field(default=0.02, metadata={"help": "Standard deviation of the initial values."})
    target_modules: str | list[str] | None = field(
        default=None, metadata={"help": "Name of the vision tower, needed only where a model has several."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained and saved as a whole beside the registers."}
    )
    id2label: dict[int, str] | None = field(
        default=None, metadata={"help": "Number to name of the classes of a head in modules_to_save."}
    )
    insert_layer: int = field(default=0, metadata={"help": "Index of the first block that has registers."})
    deep: bool = field(default=False, metadata={"help": "Fresh learned registers at every block."})
    key_value: bool = field(
        default=False, metadata={"help": "Learned key/value pairs in every block's attention instead of tokens."}
    )
    gate: float | None = field(
        default=None, metadata={"help": "Initial value of a learned bias on the registers' attention logits."}
    )
    register_neurons: dict[int, list[int] | int] | None = field(
        default=None, metadata={"help": "Block to its register neurons (hidden units of the MLP)."}
    )
    remove: str = field(
        default="zero", metadata={"help": "What other tokens keep of those: 'zero', 'mean' or 'outliers' only."}
    )
    train_removal: bool = field(
        default=False, metadata={"help": "Train how far each register neuron's activations are moved."}
    )
    test_time_fit: dict[str, Any] | None = field(
        default=None, metadata={"help": "How the register neurons were found; written by the fit."}
    )
    attentions: str = field(
        default="slice", metadata={"help": "Return attention maps of the base's shape ('slice') or whole ('full')."}
    )
    anatomy: Anatomy | dict[str, Any] | None = field(
        default=None, metadata={"help": "Description of a model that the table of families does not have."}
    )
    base_tower: dict[str, Any] | None = field(
        default=None, metadata={"help": "Identity of the base's vision tower, checked at load."}
    )
    weights_sha256: str | None = field(default=None, metadata={"help": "Checksum of the weights saved beside this."})
    ignore_base_mismatch: bool = field(
        default=False, metadata={"help": "Load although the base model is another one. Never saved."}
    )
    format_version: int = field(default=1, metadata={"help": "Version of the file layout."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type()
        name: str | None = getattr(self, "base_model_name_or_path", None)
        if name is not None and is_shipped(name):  # transformers wants a folder
            self.base_model_name_or_path = local_folder(name)
        # Only a saved config names its base from the start: the registers' values are in the file beside it.
        self.from_file = self.base_tower is not None
        # Where from_pretrained has read the config, and what it has found beside it.
        self.folder: Path | None = None
        self.saved_weights: SavedWeights | None = None
        if self.from_file:
            # A file cannot waive the check of its own base; from_pretrained does, where its caller says so.
            self.ignore_base_mismatch = False
        self.auto_mapping: dict[str, Any] | None = without_unlisted(self.auto_mapping, any_package=CHECKS_IMPORTS)
        #: Whether a model has it; names of modules_to_save that this model lacks.
        self.attached, self.left_out, self.made_for_inference = False, list[str](), self.inference_mode
        check_types(self)
        check_values(self)
        check_combinations(self)
        self._check_neurons()
        self._convert()
        self._warn_of_newer_format()

    def _convert(self) -> None:
        """Bring what a JSON file or a user gives into the types of the fields."""
        if self.modules_to_save is not None:
            self.modules_to_save = list(self.modules_to_save)
        #: A dictionary comes from a file, and says where modules are; an Anatomy made in code may say more.
        self.untrusted_anatomy = isinstance(self.anatomy, dict)
        if self.id2label is not None:
            self.id2label = checked_labels(self.id2label)
        self._first_labels = self.id2label
        if isinstance(self.anatomy, dict):
            self.anatomy = Anatomy.from_dict(self.anatomy)
            check_fields(self.anatomy)
        if self.base_tower is not None:
            self.base_tower = TowerIdentity.from_dict(self.base_tower).to_dict()

    def _warn_of_newer_format(self) -> None:
        if self.format_version > FORMAT_VERSION:
            warnings.warn(
                f"this adapter was written in format {self.format_version}, newer than {FORMAT_VERSION}, the newest "
                f"this release knows; loading goes on. Upgrade with: {install_command(upgrade=True)}",
                stacklevel=4,
            )

    def _check_neurons(self) -> None:
        """Settle ``register_neurons`` and what goes with it."""
        if not self.register_neurons:
            self.register_neurons = None
            if self.init == "test_time" or self.train_removal:
                raise ValueError(
                    "init='test_time' and train_removal need register neurons, which are found on images: call "
                    "fit_test_time_registers(model, images)"
                )
            return
        self.register_neurons = checked_neurons(self.register_neurons, numbers_only=self.from_file)
        if self.deep:
            raise ValueError("deep=True puts fresh registers at every block: what neurons gave them would be lost")
        first = min(self.register_neurons)
        if not self.key_value and first < self.insert_layer:
            raise ValueError(
                f"register_neurons has block {first}, before the registers start (insert_layer={self.insert_layer})"
            )
        # Older releases would leave the neurons out; they warn of a newer format.
        self.format_version = max(self.format_version, 2)

    @property
    def identity(self) -> TowerIdentity | None:
        """The base tower's identity, ``None`` before the adapter was attached."""
        return TowerIdentity.from_dict(self.base_tower) if self.base_tower else None

    @property
    def awaits_values(self) -> bool:
        """Whether the registers of an adapter with this config are to come from a file."""
        counts = any(isinstance(units, int) for units in (self.register_neurons or {}).values())
        return self.from_file and self.base_tower is not None and (counts or not self.attached)

    @property
    def labels_given(self) -> dict[int, str] | None:
        """``id2label`` as the user gave it; attaching fills in the base's."""
        return self._first_labels if self.attached else self.id2label

    @property
    def task_heads(self) -> tuple[str, ...]:
        """What PEFT adds to ``modules_to_save`` for the ``task_type``, whether or not a model has it."""
        return TASK_HEADS.get(self.task_type, ())

    def needs(self, name: str) -> bool:
        """Whether a model, and the adapter's file, must have the module of that name of ``modules_to_save``."""
        return name not in self.task_heads

    @property
    def placement(self) -> Placement:
        """Where and how the registers enter."""
        return Placement(self.num_registers, self.insert_layer, self.deep, self.key_value, self.attentions == "full")

    @property
    def expected_shapes(self) -> dict[str, tuple[int, ...]]:
        """End of a tensor's key to its shape in the adapter's file; sizes not known before attaching are -1."""
        identity = self.identity
        width, blocks = (identity.hidden_size, identity.num_hidden_layers) if identity else (-1, -1)
        started = blocks - self.insert_layer if identity else -1
        weight = self.placement.shape(width, blocks)
        if not identity and len(weight) > 2:
            weight = (started, *weight[1:])
        shapes = {TOKENS_KEY: weight}
        if self.gate is not None:
            shapes[GATE_KEY] = (started, self.num_registers)
        if self.register_neurons:
            shapes |= {key: (sum(count_neurons(self.register_neurons).values()),) for key in NEURON_KEYS}
        return shapes

    @property
    def tower_name(self) -> str | None:
        """``target_modules`` as the name of one tower.

        Raises:
            ValueError: It names several.
        """
        return one_name(self.target_modules)

    def to_dict(self) -> dict[str, Any]:
        """The config as a JSON-ready dictionary."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        del values["ignore_base_mismatch"]
        values["base_model_name_or_path"] = shipped_name(self.base_model_name_or_path)
        if self.modules_to_save:  # PEFT adds a task's at every load
            values["modules_to_save"] = list(dict.fromkeys(self.modules_to_save))
        if self.weights_sha256 is None:
            del values["weights_sha256"]
        if self.register_neurons:
            values["register_neurons"] = count_neurons(self.register_neurons)
        if isinstance(self.anatomy, Anatomy):
            values["anatomy"] = self.anatomy.to_dict()
        return values

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """PEFT's reader, with an error that names the file.

        Raises:
            AdapterFileError: The file is no JSON object in UTF-8.
        """
        return read_json(path_json_file)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> RegisterConfig:
        """Read a config, and check the weights beside it, so that bad ones are refused before a model is changed.

        Args:
            pretrained_model_name_or_path: Folder, or repository on the Hub.
            subfolder: Folder below that.
            **kwargs: ``revision``, ``token``, ``cache_dir``… for the Hub; ``ignore_base_mismatch``; ``anatomy``, to use
                in place of the one in the file.

        Raises:
            AdapterFileError: There is no config, it is of another PEFT method or has wrong types or values, or the
                weights beside it are missing, pickled, damaged, or do not fit it.
            HubAccessError: The repository on the Hub cannot be read.
        """
        saved = SavedFolder(cls, str(pretrained_model_name_or_path), subfolder, kwargs, METHOD, "registers")
        path, values = saved.path, saved.values
        if (anatomy := kwargs.get("anatomy")) is not None:
            values["anatomy"] = anatomy
        with naming(path):
            config: RegisterConfig = cls.from_peft_type(**values)
        config.ignore_base_mismatch = bool(kwargs.get("ignore_base_mismatch", False))
        weights = saved.weights()
        config.folder = path.parent
        if weights is not None:
            needed = [name for name in config.modules_to_save or [] if config.needs(name)]
            tensors = check_adapter_file(weights, config.expected_shapes, config.modules_to_save, needed)
            if config.weights_sha256 not in (None, checksum(weights)):
                raise AdapterFileError(
                    f"{weights} is not the file that {path} was saved with: a save was cut short, or one of the two is "
                    "of another save. Save or download the adapter again; if you have changed the weights yourself, "
                    "take 'weights_sha256' out of the config. Nothing was changed."
                )
            layout = {key: TensorInfo(value.dtype, tuple(value.shape)) for key, value in tensors.items()}
            units = next((value.tolist() for key, value in tensors.items() if key.endswith(UNITS_KEY)), None)
            config.saved_weights = SavedWeights(weights, layout, units)
        return config
