"""Where a step spends its time, by torch's profiler: kinds of kernels, and the costliest ones."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

#: kind -> what its kernels (on a processor its operations) are named after; the first that fits counts
KINDS = {
    "upsampling": r"upsample",
    "attention": r"flash|fmha|attention|sdpa",
    "group normalisation": (
        r"group_?norm|RowwiseMoments|Compute(Backward)?FusedParams|ComputeInternalGradients|GammaBetaBackward.*Kernel[12]"
    ),
    "layer normalisation": r"layer_?norm|GammaBeta|cuComputeGrad",
    "copies, casts, layouts": r"copy|memcpy|nchwToNhwc|nhwcToNchw|CatArray|aten::cat|_to_copy",
    "optimizer": r"multi_tensor|adam|lpnorm",
    "convolutions and products": (
        r"conv|gemm|gemv|cutlass|cudnn|xmma|nvjet|splitK|wgrad|dgrad|fprop|aten::(add|b|bad)?b?mm|mkldnn|cublas"
    ),
}
OTHERS = "activations, sums and others"


class Kernel(NamedTuple):
    name: str
    calls: int
    ms: float  # of all calls

    @property
    def kind(self) -> str:
        return next((kind for kind, names in KINDS.items() if re.search(names, self.name, re.IGNORECASE)), OTHERS)


def kernels_of(step: Callable[[], object]) -> list[Kernel]:
    """What runs on the GPU in a step, on a processor its operations, the costliest first."""
    gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as profiler:
        step()
        if gpu:
            torch.cuda.synchronize()
    events = profiler.key_averages()
    if gpu:  # without what torch marks on the device around several kernels, such as the optimizer's step
        events = [
            e
            for e in events
            if e.device_type == torch.autograd.DeviceType.CUDA and not getattr(e, "is_user_annotation", False)
        ]
    kernels = [
        Kernel(e.key, e.count, (e.self_device_time_total if gpu else e.self_cpu_time_total) / 1000) for e in events
    ]
    return sorted((k for k in kernels if k.ms > 0), key=lambda k: -k.ms)


def by_kind(kernels: list[Kernel]) -> dict[str, float]:
    """kind -> ms, the costliest first."""
    times: dict[str, float] = {}
    for kernel in kernels:
        times[kernel.kind] = times.get(kernel.kind, 0.0) + kernel.ms
    return dict(sorted(times.items(), key=lambda item: -item[1]))
