"""A training step, plain or as one CUDA graph: for small models, whose kernels take less time than launching them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from featinv_nodes.core.errors import FeatInvError

WARM_UP = 3


def check_device(device: torch.device | str, processes: int = 1) -> None:
    """Raises FeatInvError if there are no CUDA graphs on the device, or several processes share a step."""
    if torch.device(device).type != "cuda":
        raise FeatInvError(f"a step can become a CUDA graph on a CUDA device only, not on {device}; leave --graph out")
    if processes > 1:
        raise FeatInvError(f"a CUDA graph holds the step of one process, not of {processes}; leave --graph out")


def set_lr(optimizer: torch.optim.Optimizer, lr: float, groups: int | None = None) -> None:
    """The learning rate of the first `groups` groups (default: all), 0 for the others; a captured one keeps its
    tensor."""
    for number, group in enumerate(optimizer.param_groups):
        own = lr if groups is None or number < groups else 0.0
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(own)
        else:
            group["lr"] = own


def make_plain(optimizer: torch.optim.Optimizer) -> None:
    """Removes the traces of a CUDA graph from a checkpoint, so that the run continues with or without one."""
    for group in optimizer.param_groups:
        group["capturable"], group["lr"] = False, float(group["lr"])


def training_step(
    gradients: Callable[[], Tensor], update: Callable[[], Tensor | None], optimizer: torch.optim.Optimizer, graph: bool
) -> Callable[[], Tensor]:
    """One step: gradients() runs forward and backward and returns the loss, update() clips and steps, and may return
    whether it did (a 0-d bool); the step returns the loss, NaN where it was left out.

    graph: as one CUDA graph, which the result replays. gradients then reads tensors that keep their place and runs
    WARM_UP times before, without a trace but in the moving statistics of normalisations; neither may wait for the
    device; random numbers follow torch.manual_seed at each replay, and the loss is overwritten by the next.
    """

    def plain() -> Tensor:
        loss = _marked(gradients(), update())
        optimizer.zero_grad(set_to_none=True)
        return loss

    return _capture(gradients, update, optimizer) if graph else plain


def _marked(loss: Tensor, done: Tensor | None) -> Tensor:
    return loss if done is None else loss.where(done, math.nan)


def _capture(
    gradients: Callable[[], Tensor], update: Callable[[], Tensor | None], optimizer: torch.optim.Optimizer
) -> Callable[[], Tensor]:
    _prepare(optimizer)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            gradients()
            optimizer.zero_grad(set_to_none=True)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.empty_cache()  # the graph keeps memory of its own
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = _marked(gradients(), update())

    def replay() -> Tensor:
        graph.replay()
        return loss

    return replay


def _prepare(optimizer: torch.optim.Optimizer) -> None:
    """Makes an AdamW fit for capture: its rate is a tensor, its state exists already. A fresh state stays as good as
    new."""
    for group in optimizer.param_groups:
        group["capturable"] = True
        group["lr"] = torch.tensor(float(group["lr"]), device=group["params"][0].device)
    if optimizer.state:
        return
    lrs = [group["lr"].clone() for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"].zero_()
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    for group, lr in zip(optimizer.param_groups, lrs):
        group["lr"].copy_(lr)
        for p in group["params"]:
            p.grad = None
            optimizer.state[p]["step"].zero_()
