"""A training run: its models, data, optimizer and files, the step, and the work between steps."""

from __future__ import annotations

import math
from contextlib import ExitStack, closing, nullcontext
from copy import deepcopy
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import broadcast_object_list, set_seed
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor
from tqdm import tqdm

from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.objective import latents_from
from featinv_nodes.core.weights import InversionInfo

from ..config import TrainConfig
from ..data.identity import what_changed
from ..data.latent_cache import open_pictures
from ..data.loader import loader
from ..data.stream import states
from ..models.channels_last import move
from ..models.controlnet import FeatureControlNet
from . import checkpoints, memory
from .ema import kept_at, update_average
from .faults import FaultTracker
from .flops import step_gmac
from .folder import check_room
from .graph import check_device, make_plain, set_lr, training_step
from .log import Pace, check_trackers, device_peak, open_log, show, start_trackers, write_line
from .objective import at_stage, cast_frozen, observe, sample_noise, training_loss
from .opening import opening, time_left
from .optimizer import build_optimizer, clip_and_step, weights_layout
from .panel import sample_panel
from .schedule import lr_at, step_seed
from .scope import check_scope_data, end_with_scope
from .setup import open_frozen, own_device, require_same_weights, standardise, start_from, with_precision


class Run:
    """One run of one process. config: decides everything. output: the run's folder. stack: closes what was opened.
    write: whether anything is written, which `train.py --check` does without.

    images_seen: so far, of all processes; per_step: images of a step. model: what is trained; average: its moving
    average, or None. Raises FeatInvError for what cannot be trained so, before any step.
    """

    def __init__(self, config: TrainConfig, output: Path, stack: ExitStack, write: bool = True) -> None:
        self._began = config.check_folder(output / "config.yaml")
        config, precision = with_precision(config, own_device(), self._began.get("precision"))
        check_trackers(config.trackers, output)
        check_scope_data(config, write)
        self.config, self.output, self.write = config, output, write
        self.accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            log_with=config.trackers if write and config.trackers else None,
            project_dir=output,
        )
        self.device, self.rank, self.processes = (
            self.accelerator.device,
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )
        self.main = self.accelerator.is_main_process
        if config.graph:
            check_device(self.device, self.processes)
        self.say = tqdm.write if self.main else lambda _: None
        self.shares_weights = self.accelerator.distributed_type == DistributedType.FSDP
        self.per_process = config.batch * config.accumulate
        self.per_step = self.per_process * self.processes
        set_seed(config.seed)
        self._open_models()
        drawing = self.device if config.workers == 0 else "cpu"
        self.pictures = open_pictures(config, self.base, self.backbone, drawing, self.rank, self.processes, write)
        self._identity = self.pictures.identity  # as the pictures are now
        self.say(
            f"{config.name}: inverts {self.model.source.describe()} with base model {self.base.name};"
            f" {self._parameters() / 1e6:.1f} M parameters"
        )
        self.say(precision)
        self._prepare(self._begin_or_resume())
        self._open_step(stack)

    def _open_models(self) -> None:
        """The frozen base model and backbone, and the model that is trained on them."""
        config = self.config
        self.base, self.backbone = open_frozen(config, self.device)
        self._weights = {"backbone": self.backbone.weights, "base model": self.base.weights}
        self.model = self._untrained()
        move(self.model, self.device, memory_format=weights_layout(config, self.device))
        cast_frozen(config, self.base, self.backbone)
        if config.checkpointing:
            self.base.unet.enable_gradient_checkpointing()
            self.model.controlnet.enable_gradient_checkpointing()
        frozen = [self.base.unet, self.base.vae, self.backbone]
        self.memory_parts = (
            self.device,
            self.model,
            frozen,
            bool(config.ema),
            memory.MOMENTS[config.optimizer],
            self.processes if self.shares_weights else 1,
        )
        memory.require(*self.memory_parts)

    def _untrained(self) -> FeatureControlNet:
        source = self.backbone.source(self.config.layer, self.config.pooled)
        return FeatureControlNet.start(self.base, source, self.config.encoder_width, self.config.encoder)

    def _parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def _begin_or_resume(self) -> dict | None:
        """The newest checkpoint of the folder; without one the model starts as the configuration says."""
        config = self.config
        self.checkpoint_bytes = self._parameters() * (4 + memory.MOMENTS[config.optimizer] + 4 * bool(config.ema))
        if self.main:
            check_room(self.output, self.checkpoint_bytes, config.keep, self.say)
        (file,) = broadcast_object_list([checkpoints.newest(self.output, self.say) if self.main else None])
        state = checkpoints.load(file) if file else {"seen": 0, "before": 0, "losses": [], "stream": None}
        require_same_weights(state.get("weights", {}), self._weights, self.output)
        if self.main and self.write:
            config.save(self.output / "config.yaml")
        self.images_seen, self.before, self._stream = state["seen"], state["before"], state["stream"]
        self.losses = [torch.tensor(x, device=self.device) for x in state["losses"]]
        new = not file
        if new and config.init_from:
            known = start_from(self.model, config.init_from, self.base)
            self.before, new = known or 0, known is None
        if new and config.standardise:
            first = next(loader(self.pictures, 0, 256, 0, 1, 0))  # not under autocast, which stacks no float16
            with self.accelerator.autocast():
                standardise(self.model, first.tensors, self.backbone, config, self.device)
        self._resumed_from = file
        return state if file else None

    def _prepare(self, state: dict | None) -> None:
        """Optimizer, average and what accelerate makes of them, filled from a checkpoint where there is one."""
        config, accelerator = self.config, self.accelerator
        stages = {at_stage(config, 0).cycle, config.cycle}
        self._gmac = {
            cycle: step_gmac(self.base, self.backbone, self.model, replace(config, cycle=cycle, cycle_after=0))
            for cycle in stages
        }
        self.pace = Pace(self._gmac[config.cycle], device_peak(self.device, self.processes))
        self.average = deepcopy(self.model) if config.ema else None
        self._trained, self.optimizer = accelerator.prepare(self.model, build_optimizer(self.model, config))
        if self.average is not None and self.shares_weights:
            # accelerator.prepare takes a model with its optimizer only
            self.average = fsdp2_prepare_model(accelerator, self.average)
        self.faults = FaultTracker(accelerator, self.output, config, self.pictures, self.per_step)
        if state:
            self._restore(state)
        if config.compile:
            self._trained = torch.compile(self._trained)

    def _restore(self, state: dict) -> None:
        config = self.config
        checkpoints.restore(state, self.model, self.optimizer.optimizer, self.average)
        make_plain(self.optimizer)
        self.faults.restore(state["faults"])
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.say(
            f"resumed at {self.images_seen} images from"
            f" {self._resumed_from}{', not from --init-from' if config.init_from else ''}"
        )
        if self.images_seen >= config.max_images:
            self.say(
                f"{self.images_seen} of {config.max_images} images are seen: nothing is left to train; begin anew with"
                " another --output, or go on with a larger --max-images"
            )
        before = state["data"]
        if isinstance(before, str):  # an older checkpoint knows the names alone
            before = self._identity | {next(iter(self._identity)): before}
        if changed := what_changed(before, self._identity):
            self.say(
                f"{config.data} holds other images than before, by their {changed}: the run continues, but not as if"
                " it had never stopped"
            )
        if (seed := state.get("seed", self._began.get("seed", config.seed))) != config.seed:
            self.say(
                f"the run began with seed {seed} and continues with seed {config.seed}: not as if it had never stopped"
            )

    def _open_step(self, stack: ExitStack) -> None:
        """The batches, the logs, and the step itself, which reads tensors that keep their place."""
        config = self.config
        state = self._stream and self._stream[self.rank % len(self._stream)]
        pin = self.device.type == "cuda" and config.workers > 0
        batches = loader(
            self.pictures, self.images_seen, self.per_process, self.rank, self.processes, config.workers, pin, state
        )
        self.batches = stack.enter_context(closing(batches))
        self._log = open_log(self.output / "stats.jsonl", self.images_seen) if self.main and self.write else None
        if self.write:
            start_trackers(self.accelerator, asdict(config))
        batch = next(self.batches)
        self.faults.unread(batch.skipped)
        # the later batches are copied into these
        self.images = {name: rows.to(self.device) for name, rows in batch.tensors.items()}
        if self.main:
            with self.accelerator.autocast():
                self.say("\n".join(opening(self)))
        update = partial(clip_and_step, self.accelerator, self.model, self.optimizer)
        self._untimed = True
        self._take_step = training_step(self._gradients, update, self.optimizer, config.graph)
        self._progress = tqdm(
            total=config.max_images,
            initial=self.images_seen,
            unit="img",
            desc=config.name,
            disable=not (self.main and self.write),
            smoothing=0.02,
            mininterval=2,
        )

    def _gradients(self) -> Tensor:
        """Gradients of a global batch, of which this process sees its own rows, in config.accumulate parts."""
        config, total, noise = self.config, 0.0, None
        for first in range(0, self.per_process, config.batch):
            with self.accelerator.no_sync(self._trained) if first + config.batch < self.per_process else nullcontext():
                with self.accelerator.autocast():
                    rows = {name: images[first : first + config.batch] for name, images in self.images.items()}
                    moments, features = observe(self.base, self.backbone, rows, config)
                    noise = noise or sample_noise(self.per_step, moments, self.base, config)
                    own = noise.rows(self.rank * self.per_process + first, config.batch)
                    latents, stage = latents_from(moments, own.latent), at_stage(config, self.images_seen)
                    loss = (
                        training_loss(self.base, self.backbone, self._trained, latents, features, stage, own)
                        / config.accumulate
                    )
                self.accelerator.backward(loss)
            total = total + loss.detach()
        return total

    def step(self) -> None:
        """Gradients and update on the current batch. Random numbers depend only on the seed and the images seen."""
        config = self.config
        torch.manual_seed(step_seed(config.seed, self.images_seen))
        set_lr(
            self.optimizer,
            lr_at(self.images_seen, config, self.per_step),
            1 if self.images_seen < config.encoder_first else None,
        )
        try:
            self.losses.append(self._take_step().clone())
        except torch.OutOfMemoryError as error:
            raise memory.explain(error, config.batch, *self.memory_parts) from error
        self.images_seen += self.per_step
        if self.average is not None:
            update_average(self.average, self.model, kept_at(config.ema, self.images_seen / self.per_step))

    def next_batch(self, at_end: bool = False) -> None:
        """Reads the next batch, unless the run is at its end, or `at_end` too. What was learned is saved before an
        error of the data ends the run; several processes would have to agree on that."""
        if self.images_seen < self.config.max_images or at_end:
            try:
                with self.pace.waiting():
                    batch = next(self.batches)
            except Exception:
                if self.processes == 1 and self.write:
                    self.save(must=False)
                raise
            self.faults.unread(batch.skipped)
            for name, rows in batch.tensors.items():
                self.images[name].copy_(rows, non_blocking=True)
        self.pace.step(self.per_step)
        self._progress.update(self.per_step)

    def report(self, signal: int, full: bool) -> int:
        """A line of stats.jsonl; the largest signal that any process got. full: the line's losses are all there."""
        self.pace.gmac = self._gmac[at_stage(self.config, self.images_seen - self.per_step).cycle]
        values, stop = self.faults.check(self.losses, self.images_seen, signal)
        self.losses, finite = [] if full else self.losses, [value for value in values if math.isfinite(value)]
        mean = {"loss": fmean(finite)} if finite else {}
        pace = self.pace.report()
        self._record(**mean, lr=lr_at(self.images_seen - self.per_step, self.config, self.per_step), **pace)
        if self._untimed and "images_per_second" in pace and self.images_seen < self.config.max_images:
            self._untimed = False
            self.say(time_left(self, pace["images_per_second"]))
        self._progress.set_postfix({name: f"{value:.4f}" for name, value in mean.items()})
        return stop

    def draw_panel(self) -> None:
        """The sample panel of the current weights. If it fails, the run continues."""
        with self.pace.elsewhere():
            latest, file = self._latest(), self.output / f"panel_{self.images_seen:09d}.png"
            if not self.main:
                return
            try:
                with self.accelerator.autocast():
                    image, cosine = sample_panel(self.base, self.backbone, latest, self.config)
            except FeatInvError as error:
                self.say(f"no panel at {self.images_seen} images: {error}")
                return
            self._record(cosine=cosine)
            show(self.accelerator, image, file, self.images_seen, self.say)
            self.say(f"{self.images_seen} images: cosine of the panel's images {cosine:.3f}, see {file.name}")

    def save(self, must: bool) -> None:
        """Writes a checkpoint. must: it is the last before the process ends, and an error is raised."""
        values, _ = self.faults.check(self.losses, self.images_seen)
        if self.faults.row(self.images_seen) and not must:
            self.say(f"no checkpoint at {self.images_seen} images, since the last step was left out")
            return
        state = {
            "seen": self.images_seen,
            "before": self.before,
            "losses": values,
            "data": self._identity,
            "seed": self.config.seed,
            "weights": self._weights,
            "faults": self.faults.state(),
        }
        state["stream"] = states(self.batches, in_hand=self.images_seen < self.config.max_images)
        state |= checkpoints.gather(self.model, self.optimizer.optimizer, self.average)
        state["scaler"] = self.accelerator.scaler and self.accelerator.scaler.state_dict()
        try:
            if self.main:
                checkpoints.save(self.output, self.images_seen, state, self.config.keep)
        except FeatInvError as error:
            if must:
                raise
            self.say(f"{error}; the run goes on")

    def finish(self) -> Path:
        """Writes the weights file, with scope statistics where the configuration asks for them."""
        config, file = self.config, self.output / f"{self.config.name}.safetensors"
        self._progress.close()
        latest = self._latest()
        if self.main:
            images_seen = self.before + self.images_seen
            info = InversionInfo(
                self.model.source,
                self.model.encoder.settings,
                self.base.describe(),
                config.prompt,
                config.recommended,
                images_seen,
                asdict(config),
            )
            latest.save(file, info)
            if config.scope:
                end_with_scope(file, config, self.device)
            self.say("\n".join(filter(None, (self.faults.summary(), f"wrote {file}"))))
        self.accelerator.end_training()
        return file

    def _latest(self) -> FeatureControlNet:
        """What is saved and sampled from: the average where there is one, whole on the main process."""
        return checkpoints.whole(
            self.average if self.average is not None else self.model, lambda: self._untrained().to(self.device)
        )

    def _record(self, **values: float) -> None:
        self.accelerator.log(values, self.images_seen)
        if self._log:
            write_line(self._log, {"images": self.images_seen} | values, self.say)
