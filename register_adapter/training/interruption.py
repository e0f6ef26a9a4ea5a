"""Ctrl-C and SIGTERM: a run that is asked to stop ends where it can be resumed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator

__all__ = ["Interrupted", "Interruption", "leave_signals_to_the_run"]

_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class Interrupted(KeyboardInterrupt):
    """A run was stopped by a signal.

    Attributes:
        number: The signal.
        place: How far the run was, for a message.
        checkpoint: What the run can be resumed from, if there is a checkpoint.
        saved: Whether training had ended and its adapter was saved: only the upload was stopped.
    """

    def __init__(self, number: int, place: str = "", checkpoint: Path | None = None) -> None:
        self.number, self.place, self.checkpoint, self.saved = number, place, checkpoint, False
        super().__init__(f"interrupted by {self.name} {place}".rstrip())

    @property
    def name(self) -> str:
        """What a user calls the signal."""
        return _NAMES.get(signal.Signals(self.number), signal.Signals(self.number).name)

    @property
    def exit_code(self) -> int:
        """What a shell reports of a process that such a signal has ended."""
        return 128 + self.number


class Interruption:
    """Listens for the two signals while it is entered: they raise :class:`Interrupted`, at once or when it is safe.

    Only the main thread can listen; entered in another one, it does nothing. A signal that the process ignores, as
    those behind ``nohup`` do, stays ignored.
    """

    def __init__(self) -> None:
        self._number: int | None = None
        self._deferred = False
        self._alone = True
        self._before: dict[int, Any] = {}
        self._wishes: torch.Tensor | None = None

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in _NAMES:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        # A second Ctrl-C means now. Launchers of several processes pass on what their processes got too.
        again = self._number == number == signal.SIGINT and self._alone
        self._number = self._number or number
        if again or not self._deferred:
            raise Interrupted(number)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within the context a signal waits for :meth:`is_due` to be asked; a second Ctrl-C does not."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def is_due(self, accelerator: Accelerator) -> bool:
        """Whether a signal has come, to any of the processes; all of them ask, at the same places, and hear the same.

        With several processes the answer is that of one question before, so that no process waits for the others'.
        """
        self._alone = accelerator.num_processes == 1
        if self._alone:
            return self._number is not None
        wish = torch.tensor(float(self._number is not None), device=accelerator.device)
        before, self._wishes = self._wishes, accelerator.reduce(wish, "sum")
        return before is not None and bool(before > 0)

    def stop(self, place: str = "", checkpoint: Path | None = None) -> Interrupted:
        """The exception to raise once the run is where it can be resumed."""
        return Interrupted(self._number or signal.SIGTERM, place, checkpoint)


def leave_signals_to_the_run(worker: int) -> None:
    """For a loader's workers: terminals and schedulers signal them too, and the run needs them to its next checkpoint.

    They end with the run, which tells them so or is gone; a second SIGTERM ends them in any case.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, _: signal.signal(number, signal.SIG_DFL))
