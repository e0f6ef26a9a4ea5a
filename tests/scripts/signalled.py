"""``module.py`` in a group that gets a signal: its number, for which checkpoint, and how many seconds later."""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time
from pathlib import Path


def number_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def send_when(number: int, checkpoint: Path, delay: float) -> None:
    while not any(number_of(path) >= number_of(checkpoint) for path in checkpoint.parent.glob("checkpoint-*")):
        time.sleep(0.002)
    time.sleep(delay)
    os.killpg(os.getpid(), number)


if __name__ == "__main__":
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    number, checkpoint, delay = (sys.argv.pop(1) for _ in range(3))
    threading.Thread(target=send_when, args=(int(number), Path(checkpoint), float(delay)), daemon=True).start()
    runpy.run_path(str(Path(__file__).with_name("module.py")), run_name="__main__")
