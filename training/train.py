"""Trains an inversion model: a ControlNet and its conditional encoder on a frozen diffusion model.

    accelerate launch training/train.py                                    the embedded default
    accelerate launch training/train.py --config FILE --rate 1e-4 --output DIR

Stopped at any moment, the same command goes on where it was. --help lists every field of the configuration.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from tqdm import tqdm

from featinv_nodes.core.weights import InversionInfo
from featinv_nodes.tiny_world import open_backbone
from training import memory
from training.base_model import BaseModel, load_base
from training.cli import make_folder, run
from training.config import TrainConfig, parse_arguments
from training.data import loader, open_source
from training.ema import update_average
from training.graph import check_device, make_plain, set_rate, training_step
from training.objective import observe, training_loss
from training.pipeline import Inversion
from training.report import sample_panel


def rate_at(seen: int, config: TrainConfig) -> float:
    """Learning rate after `seen` images: linear warm-up, then constant or a half cosine to zero."""
    ramp = min(1.0, (seen + config.batch) / max(config.warmup, 1))
    falling = 0.5 + 0.5 * math.cos(math.pi * seen / config.max_images) if config.schedule == "cosine" else 1.0
    return config.rate * ramp * falling


def start_from(model: Inversion, file: str, base: BaseModel) -> int:
    """Copies the ControlNet of a weights file, and its encoder if it inverts the same features; returns the images
    that such a model has seen, 0 for other features."""
    other, info = Inversion.load(file, base)
    model.controlnet.load_state_dict(other.controlnet.state_dict())
    if info.source != model.source or info.encoder != model.encoder.settings:
        return 0
    model.encoder.load_state_dict(other.encoder.state_dict())
    return info.images_seen


def save_checkpoint(folder: Path, state: dict) -> None:
    """Writes folder/checkpoint.pt whole or not at all."""
    torch.save(state, folder / "checkpoint.pt.part")
    os.replace(folder / "checkpoint.pt.part", folder / "checkpoint.pt")


def train(config: TrainConfig, output: Path) -> Path:
    """Trains until config.max_images images are seen and returns the weights file, output/NAME.safetensors."""
    # Set up: devices, frozen parts, the trained part, data
    accelerator = Accelerator(mixed_precision={"fp32": "no"}.get(config.precision, config.precision))
    device, processes = accelerator.device, accelerator.num_processes
    if config.graph:
        check_device(device)
    say = tqdm.write if accelerator.is_main_process else lambda _: None
    set_seed(config.seed)
    base = load_base(config.base, config.prompt).to(device)
    backbone = open_backbone(config.backbone, config.backbone_weights, config.input_size).to(device, memory_format=torch.channels_last)
    source = backbone.source(config.layer, config.pooled)
    model = Inversion.start(base, source, config.encoder_width, config.encoder).to(device, memory_format=torch.channels_last)
    parts = (model, [base.unet, base.vae, backbone], bool(config.ema), device)
    memory.require(*parts)
    pictures = open_source(config.data, max(base.resolution, *backbone.input_size), config.flips, config.seed, device if config.workers == 0 else "cpu")
    say(f"{config.name}: inverts {source.describe()} with base model {base.name}; {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")

    # Resume
    make_folder(output)
    if accelerator.is_main_process:
        config.save(output / "config.yaml")
    seen, before = 0, 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.rate, weight_decay=config.weight_decay, fused=True)
    checkpoint = output / "checkpoint.pt"
    state = torch.load(checkpoint, map_location="cpu", weights_only=True) if checkpoint.exists() else None
    if state:
        seen, before = state["seen"], state["before"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        make_plain(optimizer)
        say(f"resumed at {seen} images from {checkpoint}")
    elif config.init_from:
        before = start_from(model, config.init_from, base)
    if seen == before == 0 and config.standardise:
        first = loader(pictures, 0, 256, 0, 1, 0)
        with accelerator.autocast():
            model.encoder.standardise(observe(base, backbone, next(first).to(device), config)[1])
    average = deepcopy(model) if config.ema else None
    if average is not None and state:
        average.load_state_dict(state["average"])

    trained, optimizer = accelerator.prepare(model, optimizer)
    if config.compile:
        trained = torch.compile(trained)
    batches = loader(pictures, seen, config.batch, accelerator.process_index, processes, config.workers)

    def saved_model() -> Inversion:
        return average if average is not None else accelerator.unwrap_model(trained, keep_torch_compile=False)

    def save() -> None:
        raw = accelerator.unwrap_model(trained, keep_torch_compile=False)
        state = {"seen": seen, "before": before, "model": raw.state_dict(), "optimizer": optimizer.state_dict()}
        save_checkpoint(output, state | ({"average": average.state_dict()} if average is not None else {}))

    # Train
    images = next(batches).to(device)  # the later batches are copied here

    def gradients() -> Tensor:
        with accelerator.autocast():
            latents, features = observe(base, backbone, images, config)
            loss = training_loss(base, backbone, trained, latents, features, config)
        accelerator.backward(loss)
        return loss.detach()

    def update() -> None:
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    take_step = training_step(gradients, update, optimizer, config.graph)
    progress = tqdm(total=config.max_images, initial=seen, unit="img", desc=config.name, disable=not accelerator.is_main_process, smoothing=0.02, mininterval=2)
    log = open(output / "stats.jsonl", "a") if accelerator.is_main_process else None
    step, losses, since = 0, [], time.perf_counter()
    per_step = config.batch * processes
    while seen < config.max_images:
        torch.manual_seed(hash((config.seed, seen, accelerator.process_index)) % 2**63)
        set_rate(optimizer, rate_at(seen, config))
        try:
            losses.append(take_step().clone())
        except torch.OutOfMemoryError as error:
            raise memory.explain(error, *parts, config.batch) from error
        seen, step = seen + per_step, step + 1
        if seen < config.max_images:
            images.copy_(next(batches), non_blocking=True)
        if average is not None:
            update_average(average, model, min(config.ema, (1 + seen / per_step) / (10 + seen / per_step)))

        # Report, panel, checkpoint
        progress.update(per_step)
        if step % 20 == 0:
            value = accelerator.reduce(torch.stack(losses).mean(), "mean").item()
            now = time.perf_counter()
            line = {"images": seen, "loss": value, "rate": rate_at(seen, config), "images_per_second": 20 * per_step / (now - since)}
            losses, since = [], now
            progress.set_postfix(loss=f"{value:.4f}")
            if log:
                log.write(json.dumps(line) + "\n")
                log.flush()
        if accelerator.is_main_process:
            if seen // config.panel_every > (seen - per_step) // config.panel_every:
                cosine = sample_panel(output / f"panel_{seen:09d}.png", base, backbone, saved_model().eval(), config)
                say(f"{seen} images: cosine of 8 held-out pictures {cosine:.3f}, see panel_{seen:09d}.png")
            if seen // config.save_every > (seen - per_step) // config.save_every or seen >= config.max_images:
                save()
        accelerator.wait_for_everyone()
    progress.close()

    file = output / f"{config.name}.safetensors"
    if accelerator.is_main_process:
        encoder = model.encoder.settings
        info = InversionInfo(source, encoder, base.describe(), config.prompt, config.recommended, before + seen, asdict(config))
        saved_model().save(file, info)
        say(f"wrote {file}")
    return file


if __name__ == "__main__":
    run(lambda: train(*parse_arguments(__doc__)))
