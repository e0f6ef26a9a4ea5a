"""The README of a folder with several adapters: how to load it, what moved, on which data, and what was measured."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import PeftConfig

from ...utils.environment import version
from ...utils.files import checksum
from ...utils.hub import WEIGHTS_NAME
from ...utils.readme import find_block, read_readme, write_readme
from ...utils.text import where_it_is
from ..card import checked_metrics, neuron_strengths
from ..card_text import (
    INSTALL,
    base_name,
    classes_in_words,
    code,
    is_hub_name,
    line,
    loads_base,
    mend_trainers_card,
    plain,
    quoted,
    refused_bases,
    register_rows,
    results_table,
    what_they_are,
)
from ..config import RegisterConfig
from .class_names import classes_of

__all__ = ["write_card"]

_BEGIN, _END = "<!-- register-adapter: adapters", "<!-- register-adapter: end -->"
_HEAD = re.compile(rf"{_BEGIN} (?P<weights>\w+) -->")
_LOAD = """
```bash
{install}
```

```python
import register_adapter
{imports}

{base}
model = register_adapter.load_adapters(base, {adapter}
model.eval()  # every output has the shape of the base model's output
```

Each subfolder is an adapter of PEFT's, and can be loaded alone with `PeftModel.from_pretrained`."""


def write_card(
    path: Path,
    configs: dict[str, PeftConfig],
    base_class: type,
    base: str | None,
    *,
    adapter: str | None = None,
    sizes: dict[str, int] | None = None,
    training_data: str | None = None,
    evaluation_data: str | None = None,
    metrics: Mapping[str, Any] | None = None,
    run: dict[str, Any] | None = None,
    tags: Sequence[str] = (),
) -> None:
    """Write the README, or bring the generated part of one that is there up to date; other text stays.

    Args:
        path: The README.md.
        configs: Config by adapter name.
        base_class: Class of the base model.
        base: Its name.
        adapter: Name to load the folder by; default a placeholder.
        sizes: Number of trained parameters by part.
        training_data: What was trained on. Without it and ``run``, a card that was written for the same weights stays.
        evaluation_data: What ``metrics`` were measured on.
        metrics: Measured results.
        run: More to say of the run.
        tags: More tags for the metadata.
    """
    measured = checked_metrics(metrics)
    card = read_readme(path)
    if card is None:
        return
    mend_trainers_card(card)
    existing = card.data.get("tags")
    theirs = [existing] if isinstance(existing, str) else list(existing or [])
    methods = sorted({str(config.peft_type.value).lower() for config in configs.values()})
    card.data["library_name"] = "peft"
    card.data["tags"] = list(dict.fromkeys([*theirs, "peft", "register-adapter", *methods, *map(line, tags)]))
    if is_hub_name(base):
        card.data["base_model"] = card.data.get("base_model") or base
    written = find_block(card.text, _BEGIN, _HEAD, _END)
    told = training_data is not None or run is not None
    weights = _digest(path.parent)
    if written is None and card.text.strip() and not told:
        write_readme(card, path)
        return
    if written is None or told or written[0]["weights"] != weights:
        revision = next((config.revision for config in configs.values() if config.revision), None)
        imports, loads = loads_base(base, base_class, revision)
        named = adapter or "path/to/this/folder"
        named = f"{quoted(named)}){where_it_is(named)}"
        rows = {
            "Base model": f"{code(base_name(base) or 'not named')} (`{base_class.__name__}`)",
            **{
                key: value
                for name, config in configs.items()
                for key, value in _rows(name, config, path.parent).items()
            },
            **{f"Trained: {plain(part)}": f"{count:,} parameters" for part, count in (sizes or {}).items()},
            **{plain(str(key)): plain(str(value)) for key, value in (run or {}).items()},
            "Written by": f"register-adapter {version()}",
        }
        parts = [
            _LOAD.format(install=INSTALL, imports=imports, base=loads, adapter=named),
            *dict.fromkeys(refused_bases(config) for config in configs.values() if isinstance(config, RegisterConfig)),
            "\n## What it is\n\n| | |\n|---|---|",
            *(f"| {key} | {value} |" for key, value in rows.items()),
            f"\n## Training data\n\n{plain(training_data) if training_data else 'Not stated.'}\n\n## Results\n",
            *([f"Measured on {plain(evaluation_data)}.\n"] if evaluation_data and measured else []),
            *(results_table(measured) if measured else ["None recorded."]),
        ]
        block = f"{_BEGIN} {weights} -->\n" + "\n".join(parts) + f"\n{_END}"
        start, end = (written[0].start(), written[1]) if written else (len(card.text), len(card.text))
        if not card.text.strip():
            names = ", ".join(f"`{name}`" for name in configs)
            block = f"\n# Adapters of several PEFT methods: {names}\n\n{block}\n"
        card.text = card.text[:start] + block + card.text[end:]
    write_readme(card, path)


def _rows(name: str, config: PeftConfig, folder: Path) -> dict[str, str]:
    """What a table says of an adapter; of registers also where they are, their number, and the classes of a head."""
    kind = plain(str(config.peft_type.value))
    if not isinstance(config, RegisterConfig):
        classes = classes_of(config)
        return {
            f"Adapter `{name}`": kind,
            **({f"`{name}`: Classes of the head": classes_in_words(classes)} if classes else {}),
        }
    strengths = neuron_strengths(folder / name / WEIGHTS_NAME, config)
    rows = {f"`{name}`: {key}": value for key, value in register_rows(config, strengths).items()}
    return {f"Adapter `{name}`": f"{kind}: {what_they_are(config, strengths)}", **rows}


def _digest(folder: Path) -> str:
    """Of every adapter's weights in a folder."""
    files = sorted(folder.glob(f"*/{WEIGHTS_NAME}"))
    return hashlib.sha256("".join(f"{path.parent.name} {checksum(path)} " for path in files).encode()).hexdigest()
