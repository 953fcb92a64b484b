"""Runs long work that the caller can stop: it calls the function of the caller, which raises to stop it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from threading import Thread
from time import perf_counter
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Check = Callable[[], object]  # may raise
Progress = Callable[[int, int], object]  # steps done, of how many; may raise, and is called again where nothing moved
Result = TypeVar("Result")

EVERY = 0.1  # seconds
#: seconds that a program may give a graphics card orders before it waits for it
AHEAD = 0.05


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
        except BaseException as error:  # the caller gets it
            outcome.set_exception(error)

    Thread(target=work, name="featinv-attended").start()
    while not wait([outcome], EVERY).done:
        check()
    return outcome.result()


def ask_after_layers(module: nn.Module, check: Check) -> list[RemovableHandle]:
    """Hooks that call check() after each layer with weights of its own, and on the way back before its gradient.

    A graphics card takes orders for whole passes in advance and cannot be made to drop them: so once in AHEAD seconds
    they wait until it has computed what it was told. They also let a program notice Ctrl-C, which a whole gradient
    would otherwise hold up.
    """
    waited = perf_counter()

    def ask(values: Tensor) -> None:
        nonlocal waited
        if perf_counter() - waited >= AHEAD and values.numel():
            values.detach()[(0,) * values.ndim].item()  # waits, on any kind of device
            waited = perf_counter()
        check()

    def after(layer: nn.Module, inputs: tuple, output: object) -> None:
        if isinstance(output, Tensor) and not torch.compiler.is_compiling():
            ask(output)
            if output.requires_grad:
                output.register_hook(ask)

    layers = [layer for layer in module.modules() if next(layer.parameters(recurse=False), None) is not None]
    return [layer.register_forward_hook(after) for layer in layers]


@contextmanager
def cancellable(check: Check, *modules: nn.Module) -> Iterator[None]:
    """ask_after_layers of each module while this is open."""
    hooks = [hook for module in modules for hook in ask_after_layers(module, check)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
