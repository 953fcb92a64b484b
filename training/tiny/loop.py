"""The loop shared by the stages that make the embedded world: resumable, counted in images, with EMA."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from copy import deepcopy
from math import cos, pi
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from training.loop.ema import update_average
from training.loop.graph import check_device, make_plain, set_rate, training_step

CHECKPOINT_SECONDS = 120


def train_stage(
    name: str,
    model: nn.Module,
    loss_of: Callable[[Tensor], Tensor],
    *,
    images: int,
    batch: int,
    rate: float,
    work: Path,
    decay: float = 0.05,
    ema: float = 0.999,
    seed: int = 0,
    stop: int | None = None,
    device: torch.device | str = "cpu",
    graph: bool = False,
) -> nn.Module:
    """Trains `model` on scenes 0..images-1 and returns its moving average in evaluation mode.

    loss_of: picture indices [batch] -> scalar loss; it draws or looks up the pictures itself.
    images: pictures seen in all; stop: end earlier on the same schedule. rate: peak of a cosine schedule with 2 % warm-up (AdamW, bf16 autocast).
    work: folder of the checkpoint `name.pt`, written whole or not at all; a later call goes on from it, and a
    larger `images` continues a finished stage. device: where `model` is and the indices are made. Random numbers depend
    on (seed, images seen) alone. graph: the step as one CUDA graph; loss_of must then not read values back.
    """
    if graph:
        check_device(device)
    model.train()
    average = deepcopy(model).eval().requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=decay, betas=(0.9, 0.99), fused=True)
    seen, file = 0, work / f"{name}.pt"
    if file.exists():
        state = torch.load(file, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        make_plain(optimizer)
        seen = state["seen"]
    indices = torch.arange(seen, seen + batch, device=device)

    def gradients() -> Tensor:
        loss = loss_of(indices)
        loss.backward()
        return loss.detach()

    def update() -> None:
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

    take_step = training_step(gradients, update, optimizer, graph)
    saved, smooth = time.monotonic(), None
    progress = tqdm(total=images, initial=seen, desc=name, unit="img", smoothing=0.02, mininterval=5)
    while seen < min(images, stop or images):
        share = seen / images
        set_rate(optimizer, rate * min(1, share / 0.02 + 1e-3) * (0.02 + 0.98 * (0.5 + 0.5 * cos(pi * share))))
        torch.manual_seed(seed * 1_000_003 + seen)
        loss = take_step()
        seen += batch
        indices += batch
        update_average(average, model, min(ema, (1 + seen / batch) / (10 + seen / batch)))
        smooth = loss.clone() if smooth is None else smooth.lerp(loss, 0.02)
        progress.update(batch)
        if seen // batch % 50 == 0:  # reading the number waits for the device
            progress.set_postfix(loss=f"{smooth.item():.4f}", refresh=False)
        if time.monotonic() - saved > CHECKPOINT_SECONDS or seen >= min(images, stop or images):
            save_checkpoint(file, model, average, optimizer, seen)
            saved = time.monotonic()
    progress.close()
    return average


def save_checkpoint(file: Path, model: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer, seen: int) -> None:
    """Writes the state of a stage to a temporary name and renames it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    state = {"model": model.state_dict(), "average": average.state_dict()}
    torch.save({**state, "optimizer": optimizer.state_dict(), "seen": seen}, f"{file}.part")
    os.replace(f"{file}.part", file)
