"""Imports the libraries below this package once, and runs scripts in forks of itself.

Reads a line of JSON for every script: its path, arguments, folder, the seconds it has, and for every process that is to
run it the files of its two streams and what its environment has besides. Writes their exit statuses.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401
import datasets  # noqa: F401
import peft  # noqa: F401
import torch  # noqa: F401
from transformers import AutoImageProcessor, AutoModel, ViTForImageClassification  # noqa: F401


def run(job: dict[str, Any], process: dict[str, Any]) -> None:
    for stream, file in enumerate([os.devnull, *process["streams"]]):
        os.dup2(os.open(file, os.O_RDWR), stream)
    os.environ.update(process["environment"])
    os.chdir(job["folder"])
    signal.alarm(job["patience"])
    sys.argv = [job["script"], *job["arguments"]]
    sys.path[0] = str(Path(job["script"]).parent)
    runpy.run_path(job["script"], run_name="__main__")


if __name__ == "__main__":
    assert "register_adapter" not in sys.modules
    for line in sys.stdin:
        job = json.loads(line)
        children = []
        for process in job["processes"]:
            children.append(os.fork())
            if not children[-1]:  # ends as the script does
                run(job, process)
                sys.exit()
        sys.stdout.write(f"{[os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]}\n")
        sys.stdout.flush()
