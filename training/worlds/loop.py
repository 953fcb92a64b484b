"""The loop shared by the stages that make a world: resumable, counted in images or minutes, with a moving average."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.files import written_whole
from training.loop.ema import kept_at, update_average
from training.loop.graph import check_device, make_plain, set_lr, training_step

CHECKPOINT_SECONDS = 60
WARM_UP, LAST = 0.02, 0.02  # shares: of a stage in which the learning rate grows, and of its peak at the end


def train_stage(
    name: str,
    model: nn.Module,
    loss_of: Callable[[Tensor], Tensor],
    *,
    batch: int,
    lr: float,
    work: Path,
    images: int | None = None,
    minutes: float | None = None,
    decay: float = 0.05,
    ema: float = 0.999,
    seed: int = 0,
    stop: int | None = None,
    device: torch.device | str = "cpu",
    graph: bool = False,
    keep: Callable[[nn.Module], object] = lambda average: None,
) -> nn.Module:
    """Trains `model` and returns its moving average in evaluation mode.

    loss_of: picture indices [batch] -> scalar loss; it draws or looks up the pictures itself.
    images: pictures seen in all, or minutes: of training in all, of this call and those before. stop: end earlier,
    after so many images, on the same schedule. lr: peak of a cosine schedule with 2 % warm-up (AdamW). work: folder of
    the checkpoint `name.pt`, written whole or not at all every minute; a later call goes on from it, and a larger
    `images` or `minutes` continues a finished stage. keep: called with the average after each checkpoint, and for a
    finished stage.
    device: where `model` is and the indices are made. Random numbers depend on (seed, images seen) alone. graph: the
    step as one CUDA graph; loss_of must then not read values back.
    """
    if graph:
        check_device(device)
    model.train()
    average = deepcopy(model).eval().requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=decay, betas=(0.9, 0.99), fused=True)
    file = work / f"{name}.pt"
    images_seen, spent = load_checkpoint(file, model, average, optimizer, device)
    indices = torch.arange(images_seen, images_seen + batch, device=device)

    def gradients() -> Tensor:
        loss = loss_of(indices)
        loss.backward()
        return loss.detach()

    def update() -> None:
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

    take_step = training_step(gradients, update, optimizer, graph)

    def share() -> float:
        """How much of the stage is done."""
        elapsed = spent + time.monotonic() - began
        return elapsed / (60 * minutes) if minutes else images_seen / images

    began = saved = time.monotonic()
    smooth, done = None, share()
    if done >= 1:  # it may have been stopped between its last checkpoint and its result
        keep(average)
    progress = tqdm(total=images, initial=images_seen, desc=name, unit="img", smoothing=0.02, mininterval=5)
    while done < 1 and images_seen < (stop or math.inf):
        set_lr(optimizer, lr_at(done, lr))
        torch.manual_seed(seed * 1_000_003 + images_seen)
        loss = take_step()
        images_seen += batch
        indices += batch
        update_average(average, model, kept_at(ema, images_seen / batch))
        smooth = loss.clone() if smooth is None else smooth.lerp(loss, 0.02)
        if images_seen // batch % 50 == 0:  # reading the number waits for the device
            progress.set_postfix(loss=f"{smooth.item():.4f}", refresh=False)
        done = share()
        if minutes:  # as many as there will be at this speed
            progress.total = max(images_seen, round(images_seen / done))
        progress.update(batch)
        if time.monotonic() - saved > CHECKPOINT_SECONDS or done >= 1 or images_seen >= (stop or math.inf):
            save_checkpoint(file, model, average, optimizer, images_seen, spent + time.monotonic() - began)
            keep(average)
            saved = time.monotonic()
    progress.close()
    return average


def lr_at(done: float, peak: float) -> float:
    """Learning rate when a share of a stage is done: a warm-up of WARM_UP, then a half cosine to LAST of the peak."""
    falling = 0.5 + 0.5 * math.cos(math.pi * done)
    return peak * min(1, done / WARM_UP + 1e-3) * (LAST + (1 - LAST) * falling)


def load_checkpoint(
    file: Path,
    model: nn.Module,
    average: nn.Module,
    optimizer: torch.optim.Optimizer,
    device: torch.device | str,
) -> tuple[int, float]:
    """Puts back what save_checkpoint wrote: (images seen, seconds of training), 0 without a file. Raises FeatInvError
    for a checkpoint of another model."""
    if not file.exists():
        return 0, 0.0
    state = torch.load(file, map_location=device, weights_only=True)
    try:
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError) as error:
        raise FeatInvError(
            f"{file} is of a model of other sizes or of another backbone; go on with those, or give another --work"
        ) from error
    make_plain(optimizer)
    return state["seen"], state.get("spent", 0.0)


def save_checkpoint(
    file: Path, model: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer, images_seen: int, spent: float
) -> None:
    """Writes the state of a stage to a temporary name and renames it. spent: seconds of training."""
    file.parent.mkdir(parents=True, exist_ok=True)
    state = {"model": model.state_dict(), "average": average.state_dict(), "seen": images_seen, "spent": spent}
    content = io.BytesIO()
    torch.save({**state, "optimizer": optimizer.state_dict()}, content)  # which hides the error of a full disk
    with written_whole(file) as part:
        part.write_bytes(content.getbuffer())


def read_images_seen(work: Path, name: str) -> int:
    """How many images a stage has seen, by its checkpoint; 0 without one."""
    file = work / f"{name}.pt"
    return torch.load(file, map_location="cpu", weights_only=True, mmap=True)["seen"] if file.exists() else 0
