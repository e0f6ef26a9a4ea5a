"""Scripts of ``tests/scripts``, each in a process that has not imported this package."""

from __future__ import annotations

import atexit
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
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
    (done,) = _run_forks(name, arguments, cwd, [{}])
    assert done.returncode == 0, f"status {done.returncode}: {done.stderr[-4000:]}"
    return done


def run_module(name: str | Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """``python -m name``, or a script by its path, in such a fork; its status is as it is."""
    (done,) = _run_forks("module", (name, *arguments), None, [{}])
    return done


def run_two_processes(name: str | Path, *arguments: object) -> list[subprocess.CompletedProcess[str]]:
    """The same in two forks that find each other as those of ``accelerate launch`` on a CPU do."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    launched = {**place, "ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": "no"}
    ranks = [{**launched, "RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]
    return _run_forks("module", (name, *arguments), None, ranks)


def _run_forks(
    name: str, arguments: Sequence[object], cwd: Path | None, environments: Sequence[dict[str, str]]
) -> list[subprocess.CompletedProcess[str]]:
    """A script in as many forks of the server at once as there are environments."""
    script, given = str(SCRIPTS / f"{name}.py"), list(map(str, arguments))
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with ExitStack() as stack:
        files = [[stack.enter_context(tempfile.NamedTemporaryFile("r")) for _ in range(2)] for _ in environments]
        processes = [
            {"streams": [stream.name for stream in streams], "environment": environment}
            for streams, environment in zip(files, environments, strict=True)
        ]
        job = {"script": script, "arguments": given, "folder": str(cwd or Path.cwd()), "patience": PATIENCE}
        server.stdin.write(json.dumps({**job, "processes": processes}) + "\n")
        server.stdin.flush()
        statuses = json.loads(server.stdout.readline() or "[-1, -1]")
        return [
            subprocess.CompletedProcess([script, *given], status, *(stream.read() for stream in streams))
            for status, streams in zip(statuses, files, strict=False)
        ]
