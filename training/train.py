"""Trains an inversion model: a ControlNet and its conditional encoder on a frozen diffusion model.

    accelerate launch training/train.py                                    the drawn world's CNN
    accelerate launch training/train.py --config FILE --rate 1e-4 --output DIR

Stopped at any moment, the same command goes on where it was; SIGTERM and Ctrl-C save first and end with status 143 or
130. --help lists every field of the configuration, training/README.md tells the rest.
"""

from __future__ import annotations

import math
import sys
from contextlib import ExitStack, closing, nullcontext
from copy import deepcopy
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import broadcast_object_list, set_seed
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor
from tqdm import tqdm

from featinv_nodes.core.feature_map import FeatInvError
from featinv_nodes.core.objective import latents_from
from featinv_nodes.core.weights import InversionInfo
from training.cli import run
from training.config import TrainConfig, parse_arguments
from training.data.latent_cache import open_pictures
from training.data.loader import loader
from training.data.stream import states
from training.fit_scope import check_scope_data, end_with_scope
from training.loop import checkpoints, memory
from training.loop.beginning import open_frozen, standardise, start_from
from training.loop.ema import update_average
from training.loop.floor import floor_gmac
from training.loop.folder import check_room, only_run_in
from training.loop.graph import check_device, make_plain, set_rate, training_step
from training.loop.interrupts import Interrupts
from training.loop.log import Pace, check_trackers, device_peak, open_log, show, start_trackers, write_line
from training.loop.mishaps import Mishaps
from training.loop.objective import at_stage, lighten, observe, sample_noise, training_loss
from training.loop.optimizer import build_optimizer, clip_and_step, weights_layout
from training.loop.panel import sample_panel
from training.loop.schedule import due, rate_at
from training.models.pipeline import Inversion

EVERY = 20  # steps between two lines of stats.jsonl; between them nothing waits for the device


def train(config: TrainConfig, output: Path) -> Path:
    """Trains until config.max_images images are seen and returns the weights file, output/NAME.safetensors."""
    with only_run_in(output), ExitStack() as opened:
        return _train(config, output, opened)


def _train(config: TrainConfig, output: Path, opened: ExitStack) -> Path:
    # Set up: devices, frozen parts, the trained part, data
    check_trackers(config.trackers, output)
    check_scope_data(config)
    accelerator = Accelerator(mixed_precision=config.mixed_precision, log_with=config.trackers or None, project_dir=output)
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
    shares_out = accelerator.distributed_type == DistributedType.FSDP
    parts = (device, model, [base.unet, base.vae, backbone], bool(config.ema), memory.MOMENTS[config.optimizer], processes if shares_out else 1)
    memory.require(*parts)
    pictures = open_pictures(config, base, backbone, device if config.workers == 0 else "cpu", rank, processes)
    say(f"{config.name}: inverts {model.source.describe()} with base model {base.name}; {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")

    # Resume
    if main:
        config.save(output / "config.yaml")
        check_room(output, sum(p.numel() for p in model.parameters()) * (4 + memory.MOMENTS[config.optimizer] + 4 * bool(config.ema)), config.keep, say)
    (file,) = broadcast_object_list([checkpoints.newest(output, say) if main else None])
    state = checkpoints.load(file) if file else {"seen": 0, "before": 0, "losses": [], "stream": None}
    seen, before, losses = state["seen"], state["before"], [torch.tensor(x, device=device) for x in state["losses"]]
    new = not file
    if new and config.init_from:
        known = start_from(model, config.init_from, base)
        before, new = known or 0, known is None
    if new and config.standardise:
        with accelerator.autocast():
            standardise(model, next(loader(pictures, 0, 256, 0, 1, 0)).tensors, backbone, config, device)
    gmac = {cycle: floor_gmac(base, backbone, model, replace(config, cycle=cycle, cycle_after=0)) for cycle in {at_stage(config, 0).cycle, config.cycle}}
    pace = Pace(gmac[config.cycle], device_peak(device, processes))
    average = deepcopy(model) if config.ema else None
    trained, optimizer = accelerator.prepare(model, build_optimizer(model, config))
    if average is not None and shares_out:
        average = fsdp2_prepare_model(accelerator, average)  # accelerator.prepare takes a model with its optimizer only
    per_process, per_step = config.batch * config.accumulate, config.batch * config.accumulate * processes
    mishaps = Mishaps(accelerator, output, config, pictures, per_step)
    if file:
        checkpoints.restore(state, model, optimizer.optimizer, average)
        make_plain(optimizer)
        mishaps.restore(state["mishaps"])
        if accelerator.scaler and state["scaler"]:
            accelerator.scaler.load_state_dict(state["scaler"])
        say(f"resumed at {seen} images from {file}{', not from --init-from' if config.init_from else ''}")
        if seen >= config.max_images:
            say(f"{seen} of {config.max_images} images are seen: nothing is left to train; begin anew with another --output, or go on with a larger --max-images")
        if state["data"] != pictures.fingerprint:
            say(f"{config.data} holds other pictures than before: the run goes on, but not as if it had never stopped")
    if config.compile:
        trained = torch.compile(trained)
    place = state["stream"] and state["stream"][rank % len(state["stream"])]
    pin = device.type == "cuda" and config.workers > 0
    batches = opened.enter_context(closing(loader(pictures, seen, per_process, rank, processes, config.workers, pin, place)))
    log = open_log(output / "stats.jsonl", seen) if main else None
    start_trackers(accelerator, asdict(config))

    def shown() -> Inversion:
        latest = average if average is not None else model
        return checkpoints.whole(latest, lambda: Inversion.start(base, model.source, config.encoder_width, config.encoder).to(device))

    def save(must: bool) -> None:
        values, _ = mishaps.check(losses, seen)
        if mishaps.row(seen) and not must:
            say(f"no checkpoint at {seen} images, since the last step was left out")
            return
        state = {"seen": seen, "before": before, "losses": values, "data": pictures.fingerprint, "mishaps": mishaps.state()}
        state["stream"] = states(batches, in_hand=seen < config.max_images)
        state |= checkpoints.gather(model, optimizer.optimizer, average)
        state["scaler"] = accelerator.scaler and accelerator.scaler.state_dict()
        try:
            if main:
                checkpoints.save(output, seen, state, config.keep)
        except FeatInvError as error:
            if must:
                raise
            say(f"{error}; the run goes on")

    def record(**values: float) -> None:
        accelerator.log(values, seen)
        if log:
            write_line(log, {"images": seen} | values, say)

    def draw_panel(latest: Inversion, file: Path) -> None:
        try:
            with accelerator.autocast():
                image, cosine = sample_panel(base, backbone, latest, config)
        except FeatInvError as error:
            say(f"no panel at {seen} images: {error}")
            return
        record(cosine=cosine)
        show(accelerator, image, file, seen, say)
        say(f"{seen} images: cosine of the panel's pictures {cosine:.3f}, see {file.name}")

    # One step: gradients of a global batch, of which this process sees its own rows, in config.accumulate parts
    batch = next(batches)
    mishaps.unread(batch.skipped)
    images = {name: rows.to(device) for name, rows in batch.tensors.items()}  # the later batches are copied here

    def gradients() -> Tensor:
        total, sample = 0.0, None
        for first in range(0, per_process, config.batch):
            with accelerator.no_sync(trained) if first + config.batch < per_process else nullcontext():
                with accelerator.autocast():
                    moments, features = observe(base, backbone, {name: rows[first : first + config.batch] for name, rows in images.items()}, config)
                    sample = sample or sample_noise(per_step, moments, base, config)
                    own = sample.rows(rank * per_process + first, config.batch)
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
                raise memory.explain(error, config.batch, *parts) from error
            seen += per_step
            if average is not None:
                update_average(average, model, min(config.ema, (1 + seen / per_step) / (10 + seen / per_step)))
            if seen < config.max_images:
                try:
                    with pace.waiting():
                        batch = next(batches)
                except Exception:
                    if processes == 1:  # several would have to agree
                        save(must=False)
                    raise
                mishaps.unread(batch.skipped)
                for name, rows in batch.tensors.items():
                    images[name].copy_(rows, non_blocking=True)
            pace.step(per_step)
            progress.update(per_step)

            # Report, panel, checkpoint
            stop = interrupts.received if processes == 1 else 0
            if (full := due(EVERY * per_step, seen, per_step)) or seen >= config.max_images:
                pace.gmac = gmac[at_stage(config, seen - per_step).cycle]
                values, stop = mishaps.check(losses, seen, interrupts.received)
                losses, finite = [] if full else losses, [value for value in values if math.isfinite(value)]
                mean = {"loss": fmean(finite)} if finite else {}
                record(**mean, rate=rate_at(seen - per_step, config, per_step), **pace.report())
                progress.set_postfix({name: f"{value:.4f}" for name, value in mean.items()})
            if due(config.panel_every, seen, per_step):
                with pace.elsewhere():
                    latest = shown()
                    if main:
                        draw_panel(latest, output / f"panel_{seen:09d}.png")
            if due(config.save_every, seen, per_step) or stop or seen >= config.max_images:
                with pace.elsewhere():
                    save(must=bool(stop))
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
