"""What a command prints: tables for people or JSON for programs, flags by their names, no messages of libraries."""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

import typer

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "collect_skipped",
    "echo",
    "make_console",
    "name_flags",
    "print_result",
    "print_skipped",
    "print_table",
    "silence_libraries",
]

#: Which logger names the images that were left out.
_LOGGER, _SHOWN = "register_adapter.data.batches", 20
#: Width of what is printed where the environment says that there is none.
_WIDTH = 80
_CALL = re.compile(r"\b\w+\([^()]*\)")
# An argument as Python has it, with the value if there is one, or a name that no English word is.
_ARGUMENT = re.compile(
    r"(?<![\w.\-/'\"])(?P<name>[a-z]+(?:_[a-z]+)*)(?:=(?P<value>'[^']*'|\"[^\"]*\"|[\w.:+-]*\w)?)?(?![\w=/(\[])"
)


def echo(text: str, *, err: bool = False) -> None:
    """Print a text that may hold names of files; nothing in it controls the terminal."""
    from ..utils.text import printable

    typer.echo(printable(text, keep="\n"), err=err)


def make_console() -> Console:
    """A console for texts with names of files and models: no markup, no emoji, no control characters from them."""
    from rich.console import Console
    from rich.text import Text

    from ..utils.text import printable

    class PlainConsole(Console):
        def render_str(self, text: str, **options: Any) -> Text:
            return super().render_str(printable(text, keep="\n"), **options)

    console = PlainConsole(markup=False, emoji=False)
    if console.width < 1:  # COLUMNS=0, with which nothing at all would be printed
        console.width = _WIDTH
    return console


@contextmanager
def collect_skipped() -> Iterator[list[str]]:
    """A list with a line for each image that is left out within, each once; no warning is printed of them.

    If the block ends with an error, those that were read until then are named on the standard error.
    """
    from ..errors import NoArtifactsError

    lines: dict[str, None] = {}
    collected: list[str] = []
    logger = logging.getLogger(_LOGGER)

    def keep(record: logging.LogRecord) -> bool:
        lines.update(dict.fromkeys(getattr(record, "skipped", ())))
        collected[:] = lines
        return not hasattr(record, "skipped")

    logger.addFilter(keep)
    try:
        yield collected
    except NoArtifactsError:  # a result like others
        raise
    except Exception:
        print_skipped(collected, "", early=True)
        raise
    finally:
        logger.removeFilter(keep)


def print_skipped(lines: Sequence[str], whole_list: str | None, early: bool = False) -> None:
    """Name the images that were left out, on the standard error.

    Args:
        lines: One for each: its name and what is wrong.
        whole_list: Where all of them are; ``None`` prints all, and an empty text says nowhere.
        early: Not all images were read.
    """
    if not lines:
        return
    shown = lines if whole_list is None else lines[:_SHOWN]
    counted = "1 image is bad and skipped" if len(lines) == 1 else f"{len(lines)} images are bad and skipped"
    echo(f"{counted}{', of those read before it ended' if early else ''}:", err=True)
    for line in shown:
        echo(f"  {line}", err=True)
    if len(shown) < len(lines):
        where = f"; all are named in {whole_list}" if whole_list else ""
        echo(f"  and {len(lines) - len(shown)} more{where}", err=True)


def print_result(result: Any, print_tables: Callable[[], None], *, as_json: bool, quiet: bool) -> None:
    """Print the result of a command on standard output.

    Args:
        result: What ``--json`` prints.
        print_tables: Prints the same for people.
        as_json: Print JSON, and nothing else.
        quiet: Print no tables.
    """
    if as_json:
        typer.echo(json.dumps(result, indent=1, allow_nan=False))
    elif not quiet:
        print_tables()


def print_table(
    console: Console,
    title: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    bold: Sequence[bool] | None = None,
) -> None:
    """Print a table whole: where it is too wide, its columns become rows, a few of its rows at a time beside them.

    Args:
        console: Where to.
        title: Above it.
        header: Headings; the first is that of the rows' names.
        rows: A cell for each heading.
        bold: Which rows stand out, where they are rows.
    """
    table = _table(title, header, rows, bold)
    if _width(console, table) <= console.width:
        console.print(table)
        return
    turned = list(zip(header, *rows, strict=True))
    start = 1
    while start < len(turned[0]):
        end = start + 1
        while end < len(turned[0]) and _width(console, _turned(title, turned, start, end + 1)) <= console.width:
            end += 1
        console.print(_turned(title if start == 1 else "", turned, start, end))
        start = end


def _turned(title: str, turned: Sequence[Sequence[str]], start: int, end: int) -> Any:
    head, *rest = ([line[0], *line[start:end]] for line in turned)
    return _table(title, head, rest)


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], bold: Sequence[bool] | None = None) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title) if title else None)
    for place, heading in enumerate(header):
        table.add_column(Text(heading), justify="right" if place else "left", overflow="fold")
    for place, row in enumerate(rows):
        table.add_row(*map(Text, row), style="bold" if bold and bold[place] else None)
    return table


def _width(console: Console, table: Any) -> int:
    """How wide a table is when no cell is broken."""
    from rich.measure import Measurement

    return Measurement.get(console, console.options.update(width=10_000), table).maximum


def name_flags(message: str, command: Callable[..., Any]) -> str:
    """A message about arguments of Python as one about a command's flags: ``give threshold=`` as ``give --threshold``.

    Args:
        message: Of an error or a result; what is no flag of the command stays as it is.
        command: The function of the command.
    """
    flags, negated = _flags(command)

    def flag(match: re.Match[str]) -> str:
        name, value = match["name"], match["value"]
        said = "=" in match[0]
        if name not in flags or not (said or "_" in name):
            return match[0]
        if value == "True" or value is None:
            return flags[name]
        if value == "False" or (value == "None" and name in negated):
            return flags[name].replace("--", "--no-", 1) if name in negated else f"without {flags[name]}"
        return match[0] if value == "None" else f"{flags[name]} {value}"

    # Calls stay as they are: they are code.
    return "".join(
        part if _CALL.fullmatch(part) else _ARGUMENT.sub(flag, part) for part in re.split(f"({_CALL.pattern})", message)
    )


def _flags(command: Callable[..., Any]) -> tuple[dict[str, str], set[str]]:
    """The names of a command's options in Python, each with its flag; and which of them have a flag with --no-."""
    flags: dict[str, str] = {}
    negated: set[str] = set()
    for name, hint in get_type_hints(command, include_extras=True).items():
        # Python 3.10 makes a union with None of what has the default None.
        hint = next((part for part in get_args(hint) if hasattr(part, "__metadata__")), hint)
        for option in getattr(hint, "__metadata__", ()):
            if isinstance(option, typer.models.OptionInfo):
                # typer takes the first name for a default until the command is built.
                words = (option.default, *(option.param_decls or ()))
                given = [word for word in words if isinstance(word, str) and word.startswith("--")]
                # One word can give both: "--sweep/--no-sweep".
                yes, _, no = (given[0] if given else f"--{name.replace('_', '-')}").partition("/")
                flags[name] = yes
                negated |= {name} if hint.__origin__ is bool and (no or not given) else set()
    return flags, negated


def silence_libraries(quiet: bool) -> None:
    """Turn off messages of other libraries that tell a user nothing, and with ``quiet`` the bars of downloads too."""
    from transformers.utils import logging

    from ..utils.progress import disable_progress_bars

    # PEFT reads an attribute that transformers has renamed.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
    # PEFT's, which takes the name of a model that this package ships for a folder.
    warnings.filterwarnings("ignore", message="Could not find a config file in register-adapter://")
    # Pillow's, of an image that is refused and named for the same reason.
    warnings.filterwarnings("ignore", message="Image size .* exceeds limit")
    logging.disable_progress_bar()
    if quiet:
        disable_progress_bars()
