"""Trains an inversion model: a ControlNet and its conditional encoder on a frozen diffusion model.

    accelerate launch training/train.py                                    the embedded default
    accelerate launch training/train.py --config FILE --rate 1e-4 --output DIR

Stopped at any moment, the same command goes on where it was; SIGTERM and Ctrl-C save first and end with status 143 or
130. --help lists every field of the configuration, training/README.md tells the rest.
"""

from __future__ import annotations

import math
import sys
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import broadcast_object_list, set_seed
from torch import Tensor
from tqdm import tqdm

from featinv_nodes.core.backbones import Backbone
from featinv_nodes.core.feature_map import FeatInvError
from featinv_nodes.core.weights import InversionInfo
from featinv_nodes.tiny_world import open_backbone
from training import checkpoints, memory
from training.base_model import BaseModel, load_base
from training.cli import make_folder, run
from training.config import TrainConfig, parse_arguments
from training.data import loader
from training.ema import update_average
from training.fit_scope import end_with_scope
from training.floor import floor_gmac
from training.graph import check_device, make_plain, set_rate, training_step
from training.interrupts import Interrupts
from training.latent_cache import open_pictures
from training.log import Pace, check_trackers, device_peak, open_log, show, start_trackers, write_line
from training.mishaps import Mishaps
from training.objective import at_stage, draw_chance, latents_from, lighten, observe, training_loss
from training.optimizer import build_optimizer, clip_and_step, weights_layout
from training.panel import sample_panel
from training.pipeline import Inversion
from training.stream import states

EVERY = 20  # steps between two lines of stats.jsonl; between them nothing waits for the device


def rate_at(seen: int, config: TrainConfig, per_step: int) -> float:
    """Learning rate of the step after `seen` images: linear warm-up, then constant or a half cosine to zero."""
    ramp = min(1.0, (seen + per_step) / max(config.warmup, 1))
    falling = 0.5 + 0.5 * math.cos(math.pi * seen / config.max_images) if config.schedule == "cosine" else 1.0
    return config.rate * ramp * falling


def due(every: int, seen: int, per_step: int) -> bool:
    """Whether the step that ended at `seen` images went past a multiple of `every`."""
    return seen // every > (seen - per_step) // every


def start_from(model: Inversion, file: str, base: BaseModel) -> int:
    """Copies the ControlNet of a weights file, and its encoder if it inverts the same features; returns the images
    that such a model has seen, 0 for other features."""
    other, info = Inversion.load(file, base)
    model.controlnet.load_state_dict(other.controlnet.state_dict())
    if info.source != model.source or other.encoder.settings != model.encoder.settings:
        return 0
    model.encoder.load_state_dict(other.encoder.state_dict())
    return info.images_seen


def open_frozen(config: TrainConfig, device: torch.device) -> tuple[BaseModel, Backbone]:
    """The base model and the backbone, in float32."""
    base = load_base(config.base, config.prompt).to(device)
    return base, open_backbone(config.backbone, config.backbone_weights, config.input_size).to(device, memory_format=torch.channels_last)


def train(config: TrainConfig, output: Path) -> Path:
    """Trains until config.max_images images are seen and returns the weights file, output/NAME.safetensors."""
    # Set up: devices, frozen parts, the trained part, data
    check_trackers(config.trackers, output)
    accelerator = Accelerator(mixed_precision={"fp32": "no"}.get(config.precision, config.precision), log_with=config.trackers or None, project_dir=output)
    device, rank, processes, main = accelerator.device, accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
    if config.graph:
        check_device(device)
    say = tqdm.write if main else lambda _: None
    set_seed(config.seed)
    base, backbone = open_frozen(config, device)
    model = Inversion.start(base, backbone.source(config.layer, config.pooled), config.encoder_width, config.encoder)
    model.to(device, memory_format=weights_layout(config, device))
    lighten(config, base, backbone)
    if config.checkpointing:
        base.unet.enable_gradient_checkpointing()
        model.controlnet.enable_gradient_checkpointing()
    parts = (model, [base.unet, base.vae, backbone], bool(config.ema), memory.MOMENTS[config.optimizer], device)
    memory.require(*parts)
    pictures = open_pictures(config, base, backbone, device if config.workers == 0 else "cpu", rank, processes)
    say(f"{config.name}: inverts {model.source.describe()} with base model {base.name}; {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")

    # Resume
    if main:
        make_folder(output)
        config.save(output / "config.yaml")
    (file,) = broadcast_object_list([checkpoints.newest(output, say) if main else None])
    state = checkpoints.load(file) if file else {"seen": 0, "before": 0, "losses": [], "stream": None}
    seen, before, losses = state["seen"], state["before"], [torch.tensor(x, device=device) for x in state["losses"]]
    if not file and config.init_from:
        before = start_from(model, config.init_from, base)
    if seen == before == 0 and config.standardise:
        first = next(loader(pictures, 0, 256, 0, 1, 0)).tensors
        with accelerator.autocast():
            model.encoder.standardise(observe(base, backbone, {name: rows.to(device) for name, rows in first.items()}, config)[1])
    gmac = {cycle: floor_gmac(base, backbone, model, replace(config, cycle=cycle, cycle_after=0)) for cycle in {at_stage(config, 0).cycle, config.cycle}}
    pace = Pace(gmac[config.cycle], device_peak(device, processes))
    average = deepcopy(model) if config.ema else None
    trained, optimizer = accelerator.prepare(model, build_optimizer(model, config))
    if average is not None and accelerator.distributed_type == DistributedType.FSDP:
        average = accelerator.prepare(average)
    per_process, per_step = config.batch * config.accumulate, config.batch * config.accumulate * processes
    mishaps = Mishaps(accelerator, output, config, pictures, per_step)
    if file:
        checkpoints.restore(state, model, optimizer.optimizer, average)
        make_plain(optimizer)
        mishaps.restore(state["mishaps"])
        if accelerator.scaler and state["scaler"]:
            accelerator.scaler.load_state_dict(state["scaler"])
        say(f"resumed at {seen} images from {file}")
        if state["data"] != pictures.fingerprint:
            say(f"{config.data} holds other pictures than before: the run goes on, but not as if it had never stopped")
    if config.compile:
        trained = torch.compile(trained)
    place = state["stream"] and state["stream"][rank % len(state["stream"])]
    batches = loader(pictures, seen, per_process, rank, processes, config.workers, device.type == "cuda" and config.workers > 0, place)
    log = open_log(output / "stats.jsonl", seen) if main else None
    start_trackers(accelerator, asdict(config))

    def shown() -> Inversion:
        latest = average if average is not None else model
        return checkpoints.whole(latest, lambda: Inversion.start(base, model.source, config.encoder_width, config.encoder).to(device))

    def save(last: bool) -> None:
        values, _ = mishaps.check(losses, seen)
        state = {"seen": seen, "before": before, "losses": values, "data": pictures.fingerprint, "mishaps": mishaps.state()}
        state["stream"] = states(batches, in_hand=seen < config.max_images)
        state |= checkpoints.gather(model, optimizer.optimizer, average)
        state["scaler"] = accelerator.scaler and accelerator.scaler.state_dict()
        try:
            if main:
                checkpoints.save(output, seen, state, config.keep)
        except FeatInvError as error:
            if last:
                raise
            say(f"{error}; the run goes on")

    def record(**values: float) -> None:
        accelerator.log(values, seen)
        if log:
            write_line(log, {"images": seen} | values, say)

    # One step: gradients of a global batch, of which this process sees its own rows, in config.accumulate parts
    batch = next(batches)
    mishaps.unread(batch.skipped)
    images = {name: rows.to(device) for name, rows in batch.tensors.items()}  # the later batches are copied here

    def gradients() -> Tensor:
        total, chance = 0.0, None
        for first in range(0, per_process, config.batch):
            with accelerator.no_sync(trained) if first + config.batch < per_process else nullcontext():
                with accelerator.autocast():
                    moments, features = observe(base, backbone, {name: rows[first : first + config.batch] for name, rows in images.items()}, config)
                    chance = chance or draw_chance(per_step, moments, base, config)
                    own = chance.rows(rank * per_process + first, config.batch)
                    loss = training_loss(base, backbone, trained, latents_from(moments, own.latent), features, at_stage(config, seen), own) / config.accumulate
                accelerator.backward(loss)
            total = total + loss.detach()
        return total

    take_step = training_step(gradients, partial(clip_and_step, accelerator, model, optimizer), optimizer, config.graph)

    # Train
    progress = tqdm(total=config.max_images, initial=seen, unit="img", desc=config.name, disable=not main, smoothing=0.02, mininterval=2)
    with Interrupts(say) as interrupts:
        while seen < config.max_images:
            torch.manual_seed(hash((config.seed, seen)) % 2**63)
            set_rate(optimizer, rate_at(seen, config, per_step), 1 if seen < config.encoder_first else None)
            try:
                losses.append(take_step().clone())
            except torch.OutOfMemoryError as error:
                raise memory.explain(error, *parts, config.batch) from error
            seen += per_step
            if seen < config.max_images:
                with pace.waiting():
                    batch = next(batches)
                mishaps.unread(batch.skipped)
                for name, rows in batch.tensors.items():
                    images[name].copy_(rows, non_blocking=True)
            if average is not None:
                update_average(average, model, min(config.ema, (1 + seen / per_step) / (10 + seen / per_step)))
            progress.update(per_step)

            # Report, panel, checkpoint
            stop = interrupts.received if processes == 1 else 0
            if due(EVERY * per_step, seen, per_step):
                pace.gmac = gmac[at_stage(config, seen - per_step).cycle]
                values, stop = mishaps.check(losses, seen, interrupts.received)
                losses, loss = [], fmean(filter(math.isfinite, values))
                record(loss=loss, rate=rate_at(seen, config, per_step), **pace.report(EVERY * per_step))
                progress.set_postfix(loss=f"{loss:.4f}")
            if due(config.panel_every, seen, per_step):
                latest, panel = shown(), output / f"panel_{seen:09d}.png"
                if main:
                    with accelerator.autocast():
                        image, cosine = sample_panel(base, backbone, latest.eval(), config)
                    record(cosine=cosine)
                    show(accelerator, image, panel, seen, say)
                    say(f"{seen} images: cosine of held-out pictures {cosine:.3f}, see {panel.name}")
            if due(config.save_every, seen, per_step) or stop or seen >= config.max_images:
                save(last=stop or seen >= config.max_images)
            if stop:
                say(f"stopped at {seen} images; the same command goes on from there")
                sys.exit(128 + stop)
    progress.close()

    file, latest = output / f"{config.name}.safetensors", shown()
    if main:
        info = InversionInfo(model.source, model.encoder.settings, base.describe(), config.prompt, config.recommended, before + seen, asdict(config))
        latest.save(file, info)
        if config.scope:
            end_with_scope(file, config, device)
        say("\n".join(filter(None, (mishaps.summary(), f"wrote {file}"))))
    accelerator.end_training()
    return file


if __name__ == "__main__":
    run(lambda: train(*parse_arguments(__doc__)))
