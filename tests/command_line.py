"""The command line as a user runs it: the installed script, and its main in this process where that is enough."""

from __future__ import annotations

import io
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from register_adapter.commands import main

COMMAND = str(Path(sys.executable).parent / "register-adapter")
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "120"}


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str:
    """The exit status of a command in this process, or its message; what it prints is for ``capfd``."""
    monkeypatch.setattr(sys, "argv", ["register-adapter", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code or 0


def run_here(*arguments: str) -> str:
    """What a command that succeeds prints, on both streams, in this process: importing torch takes ten seconds."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said), redirect_stderr(said):
        patch.setenv("COLUMNS", "120")
        status = call(patch, *arguments)
    assert status == 0, f"{status} {said.getvalue()[-2000:]}"
    return said.getvalue()
