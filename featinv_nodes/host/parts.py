"""Finds the part of the sampler's latents that a ControlNet call is for: a context window, or an area of the image.

The host hands a ControlNet a cut-out and does not say of what. Wrappers around its prediction and its batching write
that down in the options that reach the ControlNet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import comfy.hooks
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..core.errors import FeatInvError

WHOLE, AREAS = "featinv_whole", "featinv_areas"


def record_whole(executor, x: Tensor, timestep: Tensor, model_options: dict, seed: int | None = None):  # noqa: ANN001, ANN201
    """A wrapper around a step's prediction: keeps all latents, before the host parts them into context windows."""
    model_options.setdefault("transformer_options", {})[WHOLE] = x
    return executor(x, timestep, model_options, seed)


def record_areas(executor, model, conds: list, x: Tensor, timestep: Tensor, model_options: dict):  # noqa: ANN001, ANN201
    """A wrapper around the host's batching: keeps the area of each conditioning."""
    areas = {c["uuid"]: c.get("area") for group in conds if group for c in group}
    model_options.setdefault("transformer_options", {})[AREAS] = areas
    return executor(model, conds, x, timestep, model_options)


def recording() -> comfy.hooks.HookGroup:
    """The two wrappers, as hooks of a ControlNet."""
    group = comfy.hooks.HookGroup()
    wrappers = {
        WrappersMP.PREDICT_NOISE: {WHOLE: [record_whole]},
        WrappersMP.CALC_COND_BATCH: {AREAS: [record_areas]},
    }
    group.add(comfy.hooks.TransformerOptionsHook({"wrappers": wrappers}))
    return group


@dataclass(frozen=True)
class Part:
    """rows: each latent's number in the whole batch. size: (H, W) of the whole latents. cells: numbers of the rows (2)
    or columns (3) of cells in a context window along that dimension, None where there is none. areas: per conditioning
    its area (h, w, y, x) in latent cells, or None for all of them."""

    rows: Sequence[int]
    size: tuple[int, int]
    cells: tuple[int, list[int]] | None
    areas: list[Sequence[int] | None]

    def cut(self, x: Tensor, area: Sequence[int] | None) -> Tensor:
        """What lies over the part, of maps [M, C, *size] over the whole latents. The area is clipped as the host
        clips."""
        if self.cells is not None:
            x = x.index_select(self.cells[0], torch.tensor(self.cells[1], device=x.device))
        if area is not None:
            h, w, y, x0 = area
            x = x[:, :, y : y + h, x0 : x0 + w]
        return x


def find_part(rows: int, size: tuple[int, int], options: dict, shared: bool) -> Part:
    """The part that a ControlNet call is for.

    rows, size: how many latents a conditioning has there, and their (H, W). options: the host's transformer_options.
    shared: whether all latents have the same map, so that their numbers do not matter. Raises FeatInvError where the
    latents are some of the batch and the host does not say which.
    """
    whole = tuple(options[WHOLE].shape) if WHOLE in options else (rows, 0, *size)
    recorded = options.get(AREAS, {})
    areas = [recorded.get(uuid) for uuid in options["uuids"]]
    numbers = _window(options.get("context_window"))
    if numbers is not None and numbers[0] in (2, 3):
        return Part(range(rows), whole[2:], numbers, areas)
    batch = range(whole[0]) if numbers is None else numbers[1]
    if len(batch) == rows:
        return Part(batch, whole[2:], None, areas)
    if shared:
        return Part(range(rows), whole[2:], None, areas)
    raise FeatInvError(
        f"the sampler processes {rows} of {whole[0]} latents at a time, and this version of ComfyUI does not tell"
        " FeatInv ControlNet which. Use ComfyUI's own Context Windows, or sample the batch as a whole, or give a single"
        " feature map"
    )


class ContextWindow(Protocol):
    """The host's."""

    dim: int
    index_list: list[int]


def _window(window: ContextWindow | None) -> tuple[int, list[int]] | None:
    """(dimension, numbers along it) of the host's context window. A number before a window's first one is the one that
    newer hosts add in front and take away again."""
    if window is None:
        return None
    anchor = getattr(window, "causal_anchor_index", None)
    before = [anchor] if anchor is not None and anchor >= 0 else []
    return window.dim, before + list(window.index_list)


def in_turn(x: Tensor, rows: Sequence[int]) -> Tensor:
    """Row number `row` of a batch [M, ...] for each of the rows; a batch with fewer rows is repeated."""
    return x[[row % len(x) for row in rows]]
