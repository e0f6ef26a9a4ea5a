"""The text of an adapter's model card: what the adapter is, how it is loaded, what it was made from and measured at."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import RepoCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from ..errors import install_command
from ..utils.environment import version
from ..utils.shipped import is_shipped, shipped_name
from ..utils.text import printable, where_it_is
from .config import RegisterConfig
from .neuron_shift import count_neurons

__all__ = [
    "INSTALL",
    "OFF",
    "base_name",
    "body",
    "classes_in_words",
    "code",
    "is_hub_name",
    "line",
    "loads_base",
    "mend_trainers_card",
    "named",
    "plain",
    "quoted",
    "refused_bases",
    "register_rows",
    "results_table",
    "transformers_class",
    "what_they_are",
]

INSTALL = install_command()
#: Prefix of what was measured again with the registers switched off, all else the same (LoRA, a head).
OFF = "eval_registers_off_"
_SHOWN = 20
#: Library to how its users get a model; AutoPeftModel imports none of these.
_BUILT = {
    "timm": 'timm.create_model("...", pretrained=True)',
    "open_clip": 'open_clip.create_model("...", pretrained="...")',
    "torchvision": 'torchvision.models.get_model("...", weights="DEFAULT")',
}
_LEARNED = (
    "Register tokens ([Vision Transformers Need Registers](https://arxiv.org/abs/2309.16588)) retrofitted onto a "
    "frozen vision transformer: {what}. The base model's weights are not changed."
)
_FITTED = (
    "Registers with register neurons ([Vision Transformers Don't Need Trained "
    "Registers](https://arxiv.org/abs/2506.08010)) on a frozen vision transformer: what a few hidden units of its MLPs "
    "write into patches is moved, as they are computed, to {what}. The base model's weights are not changed."
)


def mend_trainers_card(card: RepoCard) -> None:
    """Take out of a card's metadata what transformers' Trainer puts there, and what is wrong of an adapter.

    That is a ``base_model`` that is a place on this machine, which the Hub refuses, and the library's name: with
    another one than PEFT's, the Trainer does not let the model complete the card at the next push.
    """
    if card.data.get("library_name") == "transformers":
        card.data.pop("library_name")
    base = card.data.get("base_model")
    if isinstance(base, str) and not _is_repo_id(base):
        card.data.pop("base_model")


def is_hub_name(name: str | None) -> bool:
    """Whether a base model's or data set's name is ``user/repo`` on the Hub, not a local folder or a description."""
    if not name or name.count("/") != 1:
        return False
    return _is_repo_id(name)


def _is_repo_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def transformers_class(base_class: type) -> type | None:
    """The class of transformers' that a base model's class is or derives from."""
    return next((kind for kind in base_class.__mro__ if kind.__module__.startswith("transformers.models.")), None)


def base_name(name: str | None) -> str | None:
    """The base model's name on the Hub, or the last part of its local path."""
    name = shipped_name(name)
    return name if not name or is_hub_name(name) or is_shipped(name) else Path(name).absolute().name


def line(text: str) -> str:
    """A name or a sentence of somebody else's as one line in which every character shows."""
    return printable(" ".join(text.split()))


def named(text: str) -> str:
    """:func:`line`; of a local path, the last part."""
    try:
        local = Path(text).is_absolute() or Path(text).exists()
    except (OSError, ValueError):  # too long for a file's name, or none for other reasons
        local = False
    return line(Path(text).absolute().name if local else text)


def plain(text: str) -> str:
    """:func:`named`, as Markdown that shows it as it is."""
    return _escaped(named(text))


def code(text: str) -> str:
    """:func:`line`, as a code span, or escaped where it would end one."""
    text = line(text)
    return _escaped(text) if not text or any(char in text for char in "`<|\\") else f"`{text}`"


def _escaped(text: str) -> str:
    """Markdown that shows a line as it is: no link, image, tag, emphasis, table cell or code span of its own."""
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    text = re.sub(r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", text)
    return re.sub(r"^(\d+(?=[.)])|(?=[#>+=-]))", r"\1\\", text)  # at the start of a line: a heading, a list


def quoted(text: str) -> str:
    """A string of Python's, which cannot end the comments around the generated text."""
    return json.dumps(text).replace("<", "\\u003c")


def loads_base(name: str | None, base_class: type, revision: str | None = None) -> tuple[str, str]:
    """Python code that loads a base model: an import, and a line that runs where the name leads somewhere."""
    library = base_class.__module__.partition(".")[0]
    name, kind = base_name(name), transformers_class(base_class)
    base, at = quoted(name or "path/to/base"), f", revision={quoted(revision or '')}"
    load = f"{base_class.__name__}.from_pretrained({base}{at if revision else ''})"
    if kind is None:
        load = _BUILT.get(library, f"{base_class.__name__}(...)") + "  # as it was built for the training"
    elif is_shipped(name):
        load = f"load_shipped({base})  # a small model that comes with the package"
    elif not is_hub_name(name):
        load += "  # a local folder: put its path here"
    known = getattr(transformers, base_class.__name__, None) is base_class
    imports = f"from {'transformers' if known else base_class.__module__} import {base_class.__name__}"
    if library in _BUILT:
        imports = f"import {library}"
    elif is_shipped(name):
        imports = "from register_adapter.testbed import load_shipped"
    elif base_class.__module__ == "__main__":
        imports = f"# {base_class.__name__} is the class of the base model, defined in the script that trained it"
    return imports, f"base = {load}"


def _snippet(config: RegisterConfig, base_class: type, adapter: str, subfolder: str | None) -> str:
    """Python code that loads the adapter; it runs where the two names lead somewhere."""
    imports, base = loads_base(config.base_model_name_or_path, base_class, config.revision)
    place = f", subfolder={quoted(subfolder)})" if subfolder else ")"
    place += where_it_is(adapter)
    return (
        "import register_adapter  # makes the method known to PEFT\n"
        "from peft import PeftModel\n"
        f"{imports}\n\n{base}\n"
        f"model = PeftModel.from_pretrained(base, {quoted(adapter)}{place}\n"
        "model.eval()  # every output has the shape of the base model's output"
    )


def body(
    config: RegisterConfig,
    base_class: type,
    training_data: str | None,
    metrics: Mapping[str, float | None] | None,
    adapter: str,
    subfolder: str | None,
    evaluation_data: str | None = None,
    run: dict[str, Any] | None = None,
    strengths: list[float] | None = None,
) -> str:
    """The generated text, in Markdown; see :func:`update_model_card`, and :func:`register_rows` for the strengths."""
    base = base_name(config.base_model_name_or_path)
    link = f"[{base}](https://huggingface.co/{base})" if is_hub_name(base) else f"{code(base or '')}, a local folder"
    link = f"`{base}`, which comes with the package" if is_shipped(base) else link
    tower = config.identity
    rows = {
        "Base model": f"{link if base else 'not named'} (`{base_class.__name__}`)",
        "Its vision tower": plain(str(tower)) if tower else "not recorded",
        **register_rows(config, strengths),
        **{plain(str(key)): plain(str(value)) for key, value in (run or {}).items()},
        "Written by": f"register-adapter {version()}, PEFT {plain(str(config.peft_version))}",
    }
    return "\n".join(
        [
            (_FITTED if _moves(config, strengths) else _LEARNED).format(what=what_they_are(config, strengths))
            + _replaced(config),
            "",
            "## Load it",
            "",
            f"```bash\n{INSTALL}\n```",
            "",
            f"```python\n{_snippet(config, base_class, adapter, subfolder)}\n```",
            "",
            refused_bases(config),
            "",
            "## What it is",
            "",
            "| | |\n|---|---|",
            *(f"| {key} | {value} |" for key, value in rows.items()),
            "",
            "## Training data",
            "",
            plain(training_data) if training_data else "Not stated.",
            "",
            "## Results",
            "",
            *([f"Measured on {plain(evaluation_data)}.", ""] if evaluation_data and metrics else []),
            *(results_table(metrics) if metrics else ["None recorded."]),
            "",
        ]
    )


def register_rows(config: RegisterConfig, strengths: list[float] | None = None) -> dict[str, str]:
    """What an adapter is, as rows of a table by their headings.

    Args:
        config: Its config.
        strengths: Those of its register neurons, 0 to 1; ``None`` if it has none, or they are not known.
    """
    return {
        "Registers": _registers(config),
        **({} if config.gate is None else {"Gate": f"a bias on the attention to registers, made as {config.gate:g}"}),
        **(_fit_rows(config, strengths) or {"Initial values": _initial_values(config)}),
        "Saved as a whole beside them": ", ".join(code(name) for name in config.modules_to_save or []) or "nothing",
        **({"Classes of the head": classes_in_words(config.id2label)} if config.id2label else {}),
    }


def _replaced(config: RegisterConfig) -> str:
    """Sentence on what takes the place of the base's own modules, empty if nothing does."""
    return " What is saved as a whole beside them takes the place of its own." if config.modules_to_save else ""


def refused_bases(config: RegisterConfig) -> str:
    """Sentence on which base models are refused."""
    if config.identity is None:
        return "The base model was not recorded: any that these registers fit takes them."
    if config.identity.fingerprint is None:
        return "A base model of another shape is refused; weights are not compared, since none were recorded."
    return "A base model of another shape, or whose vision tower's weights have another fingerprint, is refused."


def results_table(metrics: Mapping[str, float | None]) -> list[str]:
    """A table of the metrics; where registers were switched off for a second evaluation, beside each other."""
    if not any(name.startswith(OFF) for name in metrics):
        return [
            "| measured | value |\n|---|---|",
            *(f"| {plain(key)} | {_number(value)} |" for key, value in metrics.items()),
        ]
    rows = []
    for name, value in metrics.items():
        other = f"{OFF}{name.removeprefix('eval_')}"
        off, there = metrics.get(other), other in metrics
        if not name.startswith(OFF):
            rows.append(f"| {plain(name)} | {_number(value)} | {_number(off) if there else ''} |")
    return ["| measured | with the registers | registers off, all else the same |\n|---|---|---|", *rows]


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.6g}"


def _moves(config: RegisterConfig, strengths: list[float] | None) -> bool:
    """Whether register neurons move anything; a run with ``--neurons anneal`` ends with a strength of zero."""
    return bool(config.register_neurons) and (not strengths or max(strengths) > 0)


def what_they_are(config: RegisterConfig, strengths: list[float] | None = None) -> str:
    """Where the registers are in the model, as the end of a sentence; see :func:`register_rows` for the arguments."""
    first = f"block {config.insert_layer}"
    blocks = f"every block from {first} on" if config.insert_layer else "every block"
    moves = _moves(config, strengths)
    if moves and config.key_value:
        return "one key and value in every block's attention, which stand for a register; no token enters the sequence"
    if moves:
        return "tokens that are removed from every output"
    if config.key_value:
        return f"learned pairs of a key and a value in the attention of {blocks}; no token enters the sequence"
    if config.deep:
        return f"learned tokens, fresh ones at {blocks}, that are removed from every output"
    place = f"before {first}" if config.insert_layer else "behind the embedding layer"
    return f"learned tokens that enter its sequence {place} and are removed from every output"


def _registers(config: RegisterConfig) -> str:
    """Their number and size, in every block where each has its own."""
    tower = config.identity
    size = f"{config.num_registers}" + (f" × {tower.hidden_size}" if tower else "")
    blocks = f"in each of {tower.num_hidden_layers - config.insert_layer} blocks" if tower else "in each block"
    if config.key_value:
        return f"{size} keys and as many values {blocks}"
    return f"{size} {blocks}" if config.deep else size


def _initial_values(config: RegisterConfig) -> str:
    """What learned registers started at."""
    if config.init in ("outliers", "zeros"):
        where = ", what the base's outlier patches are where registers enter"
        return code(config.init) + (where if config.init == "outliers" else "")
    if config.init == "normal" and config.test_time_fit:  # fitted ones whose neurons were dropped
        return "the mean of what register neurons had put into them, which were removed"
    return f"{code(config.init)}, standard deviation {config.init_std:g}"


def _fit_rows(config: RegisterConfig, strengths: list[float] | None) -> dict[str, str]:
    """How register neurons were found, empty without any."""
    if not config.register_neurons:
        return {}
    counts = count_neurons(config.register_neurons)
    blocks = ", ".join(f"block {block}: {number}" for block, number in counts.items())
    rows = {"Register neurons": f"{sum(counts.values())} hidden units of MLPs ({blocks}); remove {code(config.remove)}"}
    if strengths and min(strengths) < 1:
        moved = f"{min(strengths):.3g} to {max(strengths):.3g}" if any(strengths) else "0: they move nothing any more"
        rows["Strength of what they move"] = f"{moved} (1 as fitted)"
    fit = config.test_time_fit or {}
    images = fit.get("num_images")
    if isinstance(images, dict) and all(isinstance(number, int) for number in images.values()):
        parts = ", ".join(f"{plain(str(name))} {number}" for name, number in images.items())
        rows["Images they were found on"] = f"{max(images.values())} ({parts})"  # those of "detect" are all of them
    if "rule" in fit:
        rows["Rule for outliers"] = code(str(fit["rule"]))
    shares = [fit.get("share_before"), fit.get("share_after")]
    if all(isinstance(share, int | float) and math.isfinite(share) for share in shares):
        rows["Patches beyond the base's threshold, held-out images"] = f"{shares[0]:.3%} before, {shares[1]:.3%} after"
    return rows


def classes_in_words(labels: dict[int, str]) -> str:
    """Their number, and the names of the first."""
    return f"{len(labels)}: {', '.join(map(code, [*labels.values()][:_SHOWN]))}{' …' if len(labels) > _SHOWN else ''}"
