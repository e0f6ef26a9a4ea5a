"""``--config run.yaml``: the flags of a run from a file, and the file that a run leaves behind."""

from __future__ import annotations

import re
from argparse import Action, ArgumentError, ArgumentParser
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped, unused-ignore]

from ...utils.files import open_regular

__all__ = ["config_value", "config_words", "did_you_mean", "render_config"]

#: Flags that are about one start of the program, not about the run.
_NOT_SETTINGS = ("help", "config", "json", "quiet", "resume_from_checkpoint", "overwrite_output_dir")
#: Bytes of a file, and collections in one another: a list as a value is refused with the name of its flag.
_MOST, _DEEPEST = 2**16, 2


def config_words(path: str | Path, parser: ArgumentParser, advice: Callable[[str, Any], str]) -> list[str]:
    """The flags of a YAML file as words of a command line, which stand before those that a user types.

    Keys are flags without the dashes in front, with hyphens or underscores. Values are taken as they are written, so
    that ``no`` and ``1e-3`` mean what they mean on a command line; ``null`` leaves a flag at its default.

    Args:
        path: The file.
        parser: Knows the flags.
        advice: Gets the name of an unknown flag, with dashes, and the parser; gives the end of the message about it.

    Raises:
        ValueError: The file is no mapping of single values, or a key or value is not one that a flag takes; the message
            names file, line and key, and the nearest flag.
        OSError: The file cannot be read.
    """
    node = _read(path)
    words: dict[str, list[str]] = {}
    for key, value in node.value:
        place = f"{path}, line {key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode):
            raise ValueError(f"{place}: the name of a flag must be a single value")
        name = str(key.value)
        action = _flags(parser).get(name.replace("_", "-"))
        if action is not None and action.dest in ("help", "config"):
            raise ValueError(f"{place}: {name} is no setting of a run; give it on the command line")
        if action is None:
            raise ValueError(f"{place}: there is no flag {name!r:.80}{advice(f'--{name}', parser)}")
        if action.dest in words:
            raise ValueError(f"{place}: {name} is given twice")
        if not isinstance(value, yaml.ScalarNode):
            raise ValueError(f"{place}: {name} must be a single value")
        words[action.dest] = [] if value.tag.endswith(":null") else _words(action, str(value.value), place, parser)
    return [word for group in words.values() for word in group]


def config_value(path: str | Path, name: str) -> str | None:
    """What a file says of one flag, as text, ``None`` if nothing; raises as :func:`config_words`."""
    for key, value in _read(path).value:
        if str(key.value).replace("-", "_") == name and isinstance(value, yaml.ScalarNode):
            return str(value.value)
    return None


def _read(path: str | Path) -> yaml.MappingNode:
    try:
        with open_regular(path) as file:
            data = file.read(_MOST + 1)
    except OSError as error:
        raise type(error)(f"{path} cannot be read: {error.strerror or error}") from error
    if len(data) > _MOST:
        raise ValueError(f"{path} is larger than a file of settings can be ({_MOST} bytes)")
    try:
        text = data.decode("utf-8")
        _refuse_nested(text, path)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML in UTF-8: {' '.join(str(error).split())}") from error
    if not isinstance(node, yaml.MappingNode):
        raise ValueError(f"{path} must have lines such as 'learning-rate: 0.01', one a flag")
    return node


def _refuse_nested(text: str, path: str | Path) -> None:
    """Stop at the first value in a value: the time to read such a file whole grows with the square of its length."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise ValueError(f"{path}, line {event.start_mark.line + 1}: a flag must have a single value")


def _flags(parser: ArgumentParser) -> dict[str, Action]:
    """Name with hyphens to flag."""
    return {
        option.lstrip("-").replace("_", "-"): action
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--")
    }


def _words(action: Action, text: str, place: str, parser: ArgumentParser) -> list[str]:
    flag = action.option_strings[-1]
    if action.nargs == 0:  # there or not
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{place}: {action.dest} must be true or false, got {text!r:.80}")
        return [flag] if text.lower() == "true" else []
    try:
        parser._check_value(action, parser._get_value(action, text))
    except ArgumentError as error:
        raise ValueError(f"{place}: {error}") from error
    return [f"{flag}={text}"]


def did_you_mean(name: str, parser: ArgumentParser) -> str:
    """The flag with the most similar name, as the end of a message; nothing if none is similar."""
    near = get_close_matches(name.lstrip("-").replace("_", "-").lower(), _flags(parser), 1)
    return f"; did you mean --{near[0]}?" if near else ""


def render_config(values: Mapping[str, Any]) -> str:
    """A run's settings as a YAML file that :func:`config_words` reads back.

    Args:
        values: Flag, with underscores, to value; ``None`` is left out, and so is what is about one start only.
    """
    kept = {name: value for name, value in values.items() if value is not None and name not in _NOT_SETTINGS}
    text = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)
    head = "# Settings of a training run. Start it again with --config FILE; flags on the command line win.\n"
    return head + re.sub(r"(?m)^\w+", lambda match: match[0].replace("_", "-"), text)
