"""Scripts of ``tests/scripts``, each in a fresh process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

#: Seconds after which a process hangs; no test is about time, and a busy machine takes minutes to import torch.
PATIENCE = 1800
SCRIPTS = Path(__file__).with_name("scripts")


def run_script(name: str, *arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The script ``name``, ended without an error, with what it printed."""
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / f"{name}.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done
