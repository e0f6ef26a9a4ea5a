"""Scripts of ``tests/scripts``, each in a process that has not imported this package."""

from __future__ import annotations

import atexit
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
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


def run_module(
    name: str | Path, *arguments: object, cwd: Path | None = None, hub: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """``python -m name``, or a script by its path, in such a fork; its status is as it is.

    ``hub`` is what the environment has in place of this one's settings of the Hub: the fork has no client imported yet.
    """
    environment: dict[str, str | None] = {}
    if hub is not None:
        environment = {**{key: None for key in ENVIRONMENT if key.startswith(("HF_", "HUGGING"))}, **hub}
    (done,) = _run_forks("module", (name, *arguments), cwd, [environment], before_the_hub=hub is not None)
    return done


def run_signalled(
    number: int, checkpoint: Path, name: str | Path, *arguments: object, delay: float = 0.0
) -> subprocess.CompletedProcess[str]:
    """The same in a process group that gets a signal some seconds after this checkpoint, or a later one, is there."""
    (done,) = _run_forks("signalled", (int(number), checkpoint, delay, name, *arguments), None, [{}])
    return done


def run_killed(checkpoint: Path, name: str | Path, *arguments: object, delay: float = 0.0) -> None:
    done = run_signalled(signal.SIGKILL, checkpoint, name, *arguments, delay=delay)
    assert done.returncode == -signal.SIGKILL, f"status {done.returncode}: {done.stderr[-4000:]}"


def launched_as(port: int) -> list[dict[str, str]]:
    """What ``accelerate launch`` with ``examples/configs/cpu.yaml`` puts into the environments of its two processes."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    launched = {**place, "ACCELERATE_MIXED_PRECISION": "no"}
    return [{**launched, "RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]


def run_two_processes(
    name: str | Path, *arguments: object, more: Mapping[str, str] | None = None
) -> list[subprocess.CompletedProcess[str]]:
    """The same in two forks that find each other as those of ``accelerate launch`` do, on a CPU.

    ``more`` is what else stands in their environments.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ranks = [{**rank, "ACCELERATE_USE_CPU": "true", **(more or {})} for rank in launched_as(port)]
    done = _run_forks("module", (name, *arguments), None, ranks)
    for process in done:  # torch 2.8 prints a line from C++ of its own
        process.stdout = re.sub(r"^\[Gloo\] .*\n", "", process.stdout, flags=re.MULTILINE)
    return done


def _run_forks(
    name: str,
    arguments: Sequence[object],
    cwd: Path | None,
    environments: Sequence[Mapping[str, str | None]],
    before_the_hub: bool = False,
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
        job |= {"processes": processes, "before_the_hub": before_the_hub}
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        statuses = json.loads(server.stdout.readline() or "[-1, -1]")
        return [
            subprocess.CompletedProcess([script, *given], status, *(stream.read() for stream in streams))
            for status, streams in zip(statuses, files, strict=False)
        ]
