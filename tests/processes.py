"""Scripts of ``tests/scripts``, each in a process that has not imported this package."""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

#: Seconds after which a process hangs; no test is about time, and a busy machine takes minutes to import torch.
PATIENCE = 1800
SCRIPTS = Path(__file__).with_name("scripts")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run_script_alone(name: str, *arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The script ``name`` in a new interpreter, ended without an error, with what it printed."""
    command = [sys.executable, str(SCRIPTS / f"{name}.py"), *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env=ENVIRONMENT, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, f"status {done.returncode}: {done.stderr[-4000:]}"
    return done


@cache
def _server() -> subprocess.Popen[str]:
    script = str(Path(__file__).with_name("scripts_server.py"))
    server = subprocess.Popen(
        [sys.executable, script], env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    atexit.register(server.communicate)  # without further lines it ends
    return server


def run_script(name: str, *arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """As :func:`run_script_alone`, for a script that may have torch, transformers and PEFT imported already.

    Importing them takes longer than most scripts: one process does it, and the scripts run in forks of it.
    """
    if not hasattr(os, "fork"):
        return run_script_alone(name, *arguments, cwd=cwd)
    script, given = str(SCRIPTS / f"{name}.py"), list(map(str, arguments))
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
        job = {"script": script, "arguments": given, "folder": str(cwd or Path.cwd()), "patience": PATIENCE}
        server.stdin.write(json.dumps({**job, "streams": [out.name, err.name]}) + "\n")
        server.stdin.flush()
        status = server.stdout.readline().strip()
        done = subprocess.CompletedProcess([script, *given], int(status or -1), out.read(), err.read())
    assert done.returncode == 0, f"status {done.returncode}: {done.stderr[-4000:]}"
    return done
