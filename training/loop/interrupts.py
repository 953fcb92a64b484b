"""Records SIGTERM and Ctrl-C until the training loop handles them between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupts:
    """received: the number of the signal that came, 0 before. The second one ends the process at once."""

    def __init__(self, say: Callable[[str], object]) -> None:
        self.received, self._say = 0, say
        self._before = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():  # Python takes signals nowhere else
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = number
        for other in SIGNALS:
            signal.signal(other, signal.SIG_DFL)
        self._say(f"{signal.Signals(number).name}: saving after this step; once more to end at once")
