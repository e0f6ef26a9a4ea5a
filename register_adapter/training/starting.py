"""What a run starts from: new registers, those of an adapter with what was trained beside them, or fitted ones."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from accelerate import PartialState
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import nn

from ..data.datasets import PixelBatches, ProcessedDataset
from ..neurons import Start, fit_test_time_registers, start_from, start_from_outliers
from ..tuner.composed import load_adapters
from ..tuner.composed.folder import holds_several
from ..tuner.config import RegisterConfig
from ..tuner.layer import require_register_layer
from ..tuner.peft_model import RegisterPeftModel
from .bases import wrap
from .flags import ModelArguments
from .last_words import fit_advice
from .objectives import Objective

__all__ = ["registers_of", "start"]

logger = logging.getLogger(__name__)
#: Images, at most, on which neurons or outliers are looked for before the training.
_LOOKED_AT = 256
#: Classes, at most, that are named in a message.
_SHOWN = 10


def start(
    args: ModelArguments, objective: Objective, base: nn.Module, images: ProcessedDataset, progress: bool, seed: int
) -> PeftModel:
    """New registers, or those of an adapter, or fitted ones, or some that start at the base's outliers.

    Args:
        args: What is asked for.
        objective: What is trained on.
        base: The model, which the result is on.
        images: Those that are looked at where something is fitted.
        progress: Whether the fit shows a bar.
        seed: For what is drawn.

    Raises:
        ValueError: The adapter says itself what moves, or lacks a head that the objective trains.
    """
    adapter = args.adapter_name_or_path
    if adapter is None and args.init not in ("test_time", "outliers"):
        return wrap(base, objective, **args.moving, **args.registers)
    if adapter is not None and holds_several(adapter):
        return _go_on(args, objective, base)
    device = PartialState().device
    base.to(device)
    beside = _Beside(adapter, base)
    if adapter is not None:
        source = RegisterPeftModel.from_pretrained(base, adapter)
        beside.keep(source)
        begun = _begin(args, source, images)
    elif args.init == "outliers":
        few = list(PixelBatches(images, limit=_LOOKED_AT))
        options = {name: value for name, value in args.registers.items() if name not in ("init", "key_value")}
        begun = start_from_outliers(base, [batch.to(device) for batch in few], **options, seed=seed)
    else:
        with fit_advice():
            source = fit_test_time_registers(
                base,
                PixelBatches(images),
                num_registers=args.num_registers,
                max_images=_LOOKED_AT,
                progress=progress,
                shared=True,
            )
        begun = _begin(args, source, images)
    model = wrap(base, objective, **args.moving, **begun.options)
    (name,) = registers_of(model)
    begun.fill(require_register_layer(model).tokens(name))
    beside.fill(model)
    return model


def _begin(args: ModelArguments, source: RegisterPeftModel, images: ProcessedDataset) -> Start:
    """What an adapter's registers are, which is taken off its base."""
    few, dropped = range(min(len(images), 64)), args.neurons == "drop"
    device = PartialState().device
    batches = [torch.stack([images[index]["pixel_values"] for index in few]).to(device)] if dropped else []
    begun = start_from(source, args.neurons, batches)
    source.unload()
    return begun


class _Beside:
    """What an adapter has trained beside its registers, such as a head, carried over where the run trains it too.

    Args:
        adapter: The adapter's name, for warnings.
        base: The model as it was loaded.
    """

    def __init__(self, adapter: str | None, base: nn.Module) -> None:
        self.adapter, self.classes = adapter, _classes(base)
        self.other_classes: list[str] | None = None
        self.states: dict[str, dict[str, torch.Tensor]] = {}

    def keep(self, source: RegisterPeftModel) -> None:
        """Copy it from the model with the adapter."""
        for path, copies in _copies(source):
            for module in copies:
                self.states[path] = {key: value.detach().clone() for key, value in module.state_dict().items()}
        classes = _classes(source.get_base_model())
        self.other_classes = classes if classes != self.classes else None

    def fill(self, model: PeftModel) -> None:
        """Write it into the model that is trained; what does not fit is named in a warning."""
        trained = dict(_copies(model))
        for path, state in self.states.items():
            reason = self._misfit(path, state, trained)
            if reason is None:
                for module in trained[path]:
                    module.load_state_dict(state)
            else:
                logger.warning(
                    "%s has %r trained beside its registers, which is left out: %s", self.adapter, path, reason
                )

    def _misfit(self, path: str, state: dict[str, torch.Tensor], trained: dict[str, list[nn.Module]]) -> str | None:
        if path not in trained:
            return "this run does not train it, and keeps the base's own"
        if self.other_classes is not None:
            theirs, here = _shown(self.other_classes), _shown(self.classes)
            return f"its classes are {theirs}, here they are {here}; a new one is trained"
        for module in trained[path]:
            shapes = {key: value.shape for key, value in module.state_dict().items()}
            if shapes != {key: value.shape for key, value in state.items()}:
                return "it has other shapes here; a new one is trained"
        return None


def _copies(model: PeftModel) -> Iterator[tuple[str, list[nn.Module]]]:
    """Path in the base, and what adapters train in its place."""
    for path, module in model.get_base_model().named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            yield path, list(module.modules_to_save.values())


def _classes(model: nn.Module) -> list[str] | None:
    labels = getattr(getattr(model, "config", None), "id2label", None)
    return [str(name) for _, name in sorted(labels.items())] if isinstance(labels, dict) else None


def _shown(classes: list[str] | None) -> str:
    """The first of them, with how many there are where it is not all."""
    names = classes or []
    more = f" … ({len(names)})" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more


def _go_on(args: ModelArguments, objective: Objective, base: nn.Module) -> PeftModel:
    """The adapters of a folder of several, all of which are trained.

    Raises:
        ValueError: Flags say what moves, which the folder does, or its head is none that the objective trains: there is
            none, it is for other classes, or it is to be frozen.
    """
    if args.train != "registers" or args.neurons != "keep":
        raise ValueError(f"{args.adapter_name_or_path} says itself what moves; leave out --train and --neurons")
    objective.check_base(base)
    here = _classes(base)
    model = load_adapters(base, str(args.adapter_name_or_path), is_trainable=True)
    if (theirs := _classes(model.get_base_model())) != here:
        raise ValueError(
            f"{args.adapter_name_or_path} has a head for the classes {_shown(theirs)}, here they are {_shown(here)}; "
            "go on with the same classes, or with a new head and its registers alone: their sub-folder as "
            "--adapter-name-or-path"
        )
    saved = {name for config in model.peft_config.values() for name in getattr(config, "modules_to_save", None) or []}
    if lacking := [name for name in objective.heads if name not in saved]:
        raise ValueError(
            f"{args.adapter_name_or_path} was trained without {lacking}, which --objective {objective.name} trains; "
            "add --freeze-head, or train a new one beside its registers: their sub-folder as --adapter-name-or-path"
        )
    if not objective.heads and (head := getattr(objective, "head", None)) in saved:
        raise ValueError(
            f"{args.adapter_name_or_path} was trained with {head!r}, and trains it; leave out --freeze-head"
        )
    return model


def registers_of(model: PeftModel) -> dict[str, int]:
    """Number of registers by adapter name."""
    return {name: c.num_registers for name, c in model.peft_config.items() if isinstance(c, RegisterConfig)}
