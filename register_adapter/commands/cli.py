"""The command line: ``register-adapter``."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module, metadata
from io import TextIOWrapper
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from ..errors import Farewell, RegisterAdapterError, install_command

if TYPE_CHECKING:
    import typer

__all__ = ["COMMANDS", "build_app", "main", "train_main"]

#: Modules of this package with a command each, in the order of the help.
COMMANDS = ("audit", "probe", "eval", "features", "fit", "train", "study", "export", "demo", "families")
#: What shells report of a process that Ctrl-C has ended, and of one that SIGTERM has.
_INTERRUPTED, _TERMINATED = 130, 128 + signal.SIGTERM


def main() -> None:
    """Run ``register-adapter``; an error that a user can mend ends as one line, without a traceback."""
    _bounded(_run)


def train_main() -> None:
    """The same for ``python -m register_adapter.train``, which needs no typer."""
    _bounded(_run_training)


def _bounded(run: Callable[[], None]) -> None:
    try:
        with _leaving_when_terminated():
            _report(run)
    except KeyboardInterrupt:  # before typer is there, which makes the exit below of it
        _say_interrupted()
        sys.exit(_INTERRUPTED)
    except SystemExit as stop:
        if stop.code in (_INTERRUPTED, _TERMINATED) and not isinstance(stop, Farewell):
            _say_interrupted(" by SIGTERM" if stop.code == _TERMINATED else "")
        raise


@contextmanager
def _leaving_when_terminated() -> Iterator[None]:
    """Have SIGTERM leave nothing half done, as Ctrl-C does; a second one ends the process at once."""

    def leave(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise SystemExit(_TERMINATED)

    mine = threading.current_thread() is threading.main_thread()
    if not mine or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:  # ignored, or somebody else's
        yield
        return
    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _run() -> None:
    try:
        import typer  # noqa: F401
    except ImportError:
        sys.exit(f"the command line needs typer and rich: {install_command('cli')}")
    build_app()()


def _run_training() -> None:
    from .. import testbed  # noqa: F401 - says how shipped models are made
    from ..training.launch import main as launch

    launch()


def _report(run: Callable[[], None]) -> None:
    try:
        Path.cwd()
    except FileNotFoundError:  # libraries end the process over it, or look for files without a name
        sys.exit("error: the folder that this was started in has been removed; go to another one (cd)")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal's encoding lacks
    try:
        run()
    except (RegisterAdapterError, ValueError, OSError) as error:
        from ..utils.text import printable, shortened, without_password

        lost = _is_output_lost(error)
        said = f"what is printed cannot be written ({error})" if lost else _with_flags(shortened(str(error)))
        sys.exit(printable(f"error: {without_password(said)}", keep="\n"))


def _is_output_lost(error: Exception) -> bool:
    """Whether an error is that of the standard output, such as of one into a file on a full disk."""
    if not isinstance(error, OSError) or error.filename is not None or error.errno is None:
        return False  # errors of other files have their names
    try:
        sys.stdout.write("\n")
        sys.stdout.flush()
    except (OSError, ValueError):
        # What is in the buffer would be tried again at the process's end, and end in a traceback.
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _say_interrupted(by: str = "") -> None:
    with suppress(OSError):
        sys.stderr.write(f"\nerror: interrupted{by}\n")


def _command() -> str | None:
    """The command that runs."""
    return next((word for word in sys.argv[1:] if word in COMMANDS), None)


def _with_flags(message: str) -> str:
    """A message with the flags of the command that runs, where it names arguments of Python."""
    from .output import name_flags

    if (name := _command()) is None:
        return message
    return name_flags(message, getattr(import_module(f"{__package__}.{name}"), f"{name}_command"))


def build_app() -> typer.Typer:
    """The application, with every command; no command's libraries are imported."""
    import typer

    app = typer.Typer(
        name="register-adapter",
        help="Register tokens for vision transformers.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        # Help as plain text: rich and what it imports take longer than everything else together.
        rich_markup_mode=None,
        # --batch_size is --batch-size, as in the scripts of transformers; commands inherit it.
        context_settings={"token_normalize_func": lambda name: name.replace("_", "-")},
    )

    @app.callback()
    def root(
        version: bool = typer.Option(
            False, "--version", is_eager=True, callback=_print_version, help="Print the version and stop."
        ),
    ) -> None:
        """Register tokens for vision transformers."""

    for name in COMMANDS:
        import_module(f"{__package__}.{name}").register(app)
    return app


def _print_version(wanted: bool) -> None:
    import typer

    if wanted:
        typer.echo(metadata.version("register-adapter"))
        raise typer.Exit
