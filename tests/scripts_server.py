"""Imports the libraries below this package once, and runs scripts in forks of itself.

Reads a line of JSON for every script: its path, arguments, folder, the seconds it has, and for every process that is to
run it the files of its two streams and what its environment has besides. Writes their exit statuses.

The Hub's client reads its settings when it is imported: a script that has settings of its own is run before that, in a
fork of this process; the others in forks of a fork that has imported all.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
from collections.abc import Callable
from importlib import import_module
from io import TextIOWrapper
from pathlib import Path
from typing import Any

#: Libraries that most of the time of an import goes to; none of them imports the Hub's client.
FIRST = ("torch", "torch._dynamo", "torch.distributed.tensor", "torch.fx.experimental.symbolic_shapes")
FIRST += ("torchvision", "scipy", "sklearn", "pandas", "pyarrow")
REST = ("accelerate", "datasets", "peft", "transformers")


def run(job: dict[str, Any], process: dict[str, Any]) -> None:
    for stream, file in enumerate([os.devnull, *process["streams"]]):
        os.dup2(os.open(file, os.O_RDWR), stream)
    for name, value in process["environment"].items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    os.chdir(job["folder"])
    signal.alarm(job["patience"])
    sys.argv = [job["script"], *job["arguments"]]
    sys.path[0] = str(Path(job["script"]).parent)
    runpy.run_path(job["script"], run_name="__main__")


def statuses(job: dict[str, Any]) -> str:
    """Runs a job, and says how it ended, as a line."""
    children = []
    for process in job["processes"]:
        children.append(os.fork())
        if not children[-1]:  # ends as the script does
            run(job, process)
            sys.exit()
    return f"{[os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]}\n"


def serve(lines: TextIOWrapper, answers: TextIOWrapper, answer: Callable[[str], str]) -> None:
    for line in lines:
        answers.write(answer(line))
        answers.flush()


class Warm:
    """A fork that has imported everything, from the first line on that it is given."""

    def __init__(self) -> None:
        self.pipes: list[TextIOWrapper] = []

    def __call__(self, line: str) -> str:
        if not self.pipes:
            self._start()
        self.pipes[0].write(line)
        self.pipes[0].flush()
        return self.pipes[1].readline()

    def _start(self) -> None:
        (jobs, to), (back, results) = os.pipe(), os.pipe()
        if os.fork():
            os.close(jobs)
            os.close(results)
            self.pipes = [os.fdopen(to, "w"), os.fdopen(back)]
            return
        os.close(to)  # so that the lines end with the first process
        os.close(back)
        for name in REST:
            import_module(name)
        from transformers import AutoImageProcessor, AutoModel, ViTForImageClassification  # noqa: F401 - they are lazy

        serve(os.fdopen(jobs), os.fdopen(results, "w"), lambda line: statuses(json.loads(line)))
        sys.exit()


def main() -> None:
    for name in FIRST:
        import_module(name)
    assert not {"huggingface_hub", "register_adapter"} & set(sys.modules)
    warm = Warm()

    def answer(line: str) -> str:
        job = json.loads(line)
        return statuses(job) if job["before_the_hub"] else warm(line)

    serve(sys.stdin, sys.stdout, answer)


if __name__ == "__main__":
    main()
