"""Runs long work that the caller can stop: it calls the function of the caller, which raises to stop it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, wait
from threading import Thread
from typing import TypeVar

import torch

Check = Callable[[], object]  # may raise
Progress = Callable[[int, int], object]  # steps done, of how many; may raise, and is called again where nothing moved
Result = TypeVar("Result")

EVERY = 0.1  # seconds


def unchecked(*_: int) -> None:
    """The check and the progress of a caller that gives none."""


def attended(call: Callable[[], Result], check: Check) -> Result:
    """call() in a thread of its own; check() before it and every tenth of a second until it is done.

    For calls of libraries that take seconds and cannot be asked to stop. When check raises, the call is left alone: it
    runs to its end behind the scenes and its result is thrown away; a program that ends waits for it, since libraries
    crash when torn down at work. So it must be one call, on the CPU, and change nothing that others see. Raises what
    check or the call raises.
    """
    check()
    outcome: Future[Result] = Future()
    inference = torch.is_inference_mode_enabled()  # each thread has a mode of its own

    def work() -> None:
        try:
            with torch.inference_mode(inference):
                outcome.set_result(call())
        except BaseException as error:  # noqa: BLE001 - told to the caller
            outcome.set_exception(error)

    Thread(target=work, name="featinv-attended").start()
    while not wait([outcome], EVERY).done:
        check()
    return outcome.result()
