"""The configuration of trained position embeddings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig

from ...towers.identity import TowerIdentity
from ...utils.adapter_file import TensorInfo, check_adapter_file, read_header
from .._peft_compat import CHECKS_IMPORTS, POSITIONS, member
from ..fields import check_types, one_name
from ..heads import TASK_HEADS
from ..reading import SavedFolder, SavedWeights, naming, without_unlisted

__all__ = ["OFFSETS_KEY", "PositionConfig"]

#: The end of the offsets' key in a file.
OFFSETS_KEY = f"{POSITIONS}.{POSITIONS}_values.weight"
# Names of the modules that hold the offsets.
_OWN = {POSITIONS, f"{POSITIONS}_values"}


@dataclass
class PositionConfig(PeftConfig):
    """Configuration of offsets that are added to a vision tower's learned position embeddings, which stay frozen.

    Args:
        target_modules: Name of the vision tower, or the end of it; needed only where a model has several.
        modules_to_save: Modules trained and saved as a whole beside the offsets, such as ``["classifier"]``.
        base_tower: Identity of the base's vision tower; written on attaching, checked on loading.
        ignore_base_mismatch: Load the adapter although the base is another one. Never saved or read from a file.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: ``target_modules`` names several towers, or ``modules_to_save`` the offsets themselves.
    """

    target_modules: str | list[str] | None = field(
        default=None, metadata={"help": "Name of the vision tower, needed only where a model has several."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained and saved as a whole beside the offsets."}
    )
    base_tower: dict[str, Any] | None = field(
        default=None, metadata={"help": "Identity of the base's vision tower, checked at load."}
    )
    ignore_base_mismatch: bool = field(
        default=False, metadata={"help": "Load although the base model is another one. Never saved."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = member(POSITIONS)
        check_types(self)
        if self.modules_to_save is not None:
            self.modules_to_save = list(self.modules_to_save)
        if own := [name for name in self.modules_to_save or () if not _OWN.isdisjoint(name.split("."))]:
            raise ValueError(
                f"modules_to_save names {own[0]!r}, the offsets themselves, which are always saved: leave it out"
            )
        self.auto_mapping: dict[str, Any] | None = without_unlisted(self.auto_mapping, any_package=CHECKS_IMPORTS)
        self.from_file = self.base_tower is not None
        #: The base's identity when it was put on; another than ``base_tower`` where its caller said that it fits.
        self.attached_to: TowerIdentity | None = None
        #: What is beside the config in its file, which has been checked.
        self.saved_weights: SavedWeights | None = None
        #: Names of modules in that file that the model lacks.
        self.left_out: list[str] = []
        #: Whether the offsets in that file are other than zero.
        self.moves = False
        if self.base_tower is not None:
            self.base_tower = TowerIdentity.from_dict(self.base_tower).to_dict()
            # A file cannot waive the check of its own base; the loaders do, where their caller says so.
            self.ignore_base_mismatch = False

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> PositionConfig:
        """Read a config, and check the weights beside it, so that bad ones are refused before a model is changed.

        Args:
            pretrained_model_name_or_path: Folder, or repository on the Hub.
            subfolder: Folder below that.
            **kwargs: ``revision``, ``token``, ``cache_dir``… for the Hub; ``ignore_base_mismatch``, with which the
                adapter may be put on another base.

        Raises:
            AdapterFileError: There is no config, it is of another PEFT method or has wrong types or values, or the
                weights beside it are missing, pickled, damaged, or hold what is none of the adapter's.
            HubAccessError: The repository on the Hub cannot be read.
        """
        name = str(pretrained_model_name_or_path)
        saved = SavedFolder(cls, name, subfolder, kwargs, POSITIONS, "position embeddings")
        with naming(saved.path):
            config: PositionConfig = cls.from_peft_type(**saved.values)
        config.ignore_base_mismatch = bool(kwargs.get("ignore_base_mismatch", False))
        weights = saved.weights()
        if weights is not None:
            header = read_header(weights)
            shape = next((info.shape for key, info in header.items() if key.endswith(OFFSETS_KEY)), ())
            # PEFT adds a task's, which a model may lack.
            needed = [name for name in config.modules_to_save or [] if name not in config.task_heads]
            tensors = check_adapter_file(weights, {OFFSETS_KEY: shape}, config.modules_to_save, needed)
            layout = {key: TensorInfo(value.dtype, tuple(value.shape)) for key, value in tensors.items()}
            config.saved_weights = SavedWeights(weights, layout, None)
            config.moves = any(bool(value.any()) for key, value in tensors.items() if key.endswith(OFFSETS_KEY))
        return config

    @property
    def identity(self) -> TowerIdentity | None:
        """The base tower's identity, ``None`` before the adapter was attached."""
        return TowerIdentity.from_dict(self.base_tower) if self.base_tower else None

    @property
    def task_heads(self) -> tuple[str, ...]:
        """What PEFT adds to ``modules_to_save`` for the ``task_type``, whether or not a model has it."""
        return TASK_HEADS.get(self.task_type, ())

    @property
    def tower_name(self) -> str | None:
        """``target_modules`` as the name of one tower.

        Raises:
            ValueError: It names several.
        """
        return one_name(self.target_modules)

    def to_dict(self) -> dict[str, Any]:
        """The config as a JSON-ready dictionary."""
        values: dict[str, Any] = super().to_dict()
        values.pop("ignore_base_mismatch", None)
        return values
