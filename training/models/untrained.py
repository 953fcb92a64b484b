"""Inversion without an inversion model: a base model and a backbone, by universal guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor

from featinv_nodes.core.backbones import LAST, Backbone
from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.feature_map import FeatureMap, FeatureSource
from featinv_nodes.core.guidance import guidance_weights, leave_inference, toward_features
from featinv_nodes.core.prediction import noised, predicted_clean, prediction
from featinv_nodes.core.sampling import PartWay, Sampling, set_timesteps
from featinv_nodes.core.universal_guidance import STEPS, Level, NotFinite, UniversalGuidance, at_cost, sample_toward
from featinv_nodes.core.waiting import cancellable, unchecked
from featinv_nodes.worlds import WORLDS, World, find_world, open_backbone

from .base_model import BaseModel, load_base
from .parts import load_small_decoder
from .pipeline import UNKNOWN, FeaturePipeline
from .sampling import noise, solver_of


@dataclass(frozen=True)
class UntrainedSampling(UniversalGuidance):
    """How to draw: universal guidance and, of the solver DDIM, steps. guidance: classifier-free guidance scale of the
    prompt, 1 for none."""

    steps: int = STEPS
    guidance: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        Sampling(steps=self.steps, guidance=self.guidance)  # refuses what it cannot be

    @classmethod
    def at_cost(cls, name: str, **changes) -> UntrainedSampling:
        """The settings of COSTS, with some of one's own."""
        steps = max(changes.get("steps", STEPS), 1)  # fewer are refused below
        return cls(**{**asdict(at_cost(name, steps)), **changes})


@dataclass
class UntrainedPipeline(FeaturePipeline):
    """What universal guidance needs; see load_untrained. small: decodes for the guidance in the autoencoder's place,
    which decodes the finished latents."""

    base: BaseModel
    backbone: Backbone
    prompt: str
    layer: str = LAST
    pooled: bool = False
    small: AutoencoderTiny | None = None

    @property
    def world(self) -> World | None:
        """The embedded world that the base model belongs to, if any."""
        return find_world(self.base.name)

    @property
    def source(self) -> FeatureSource:
        return self.backbone.source(self.layer, self.pooled)

    @property
    def digests(self) -> dict[str, str]:
        """Of the weights that are open."""
        return {"backbone": self.backbone.weights or UNKNOWN, "base model": self.base.weights or UNKNOWN}

    @property
    def allowed(self) -> list[str]:
        """No file says with which weights it was made, so none are other ones."""
        return []

    def guiding_picture(self, latents: Tensor) -> Tensor:
        """Scaled latents -> pictures [B, 3, h, w] in 0..1, as the backbone reads them for the guidance."""
        if self.small is None:
            return self.base.decode(latents)
        decoded = self.small.decode(latents / self.small.config.scaling_factor).sample
        return (decoded.float() / 2 + 0.5).clamp(0, 1)

    @torch.inference_mode()
    def draw(
        self,
        features: FeatureMap,
        sampling: UntrainedSampling,
        seed: int = 0,
        samples: int | None = None,
        batch: int = 16,
        report: Callable[[int], object] = lambda n: None,
        part_way: PartWay | None = None,
    ) -> Tensor:
        """Pictures [B, 3, h, w] in 0..1, one of each map [B, ...]. samples: the noise of so many rows is drawn and
        repeated (B is a multiple of it), B where None. batch bounds the memory and changes nothing else. report is
        called with each batch's size. part_way: pictures' latents [B, C, H, W] to begin from. Raises NotFinite, whose
        `latents` are the finished rows and then the last finite ones."""
        samples, finished = samples or len(features), []
        times = len(features) // samples
        start = noise(self.base, seed, samples).repeat(times, 1, 1, 1)
        for first in range(0, len(features), batch):
            rows = slice(first, first + batch)
            # the seed after the starting noise's own, as k-diffusion's samplers take it
            generator = torch.Generator().manual_seed(seed + 1)

            def again(rows: slice = rows, generator: torch.Generator = generator) -> Tensor:
                new = torch.randn((samples, *start.shape[1:]), generator=generator)
                return new.repeat(times, 1, 1, 1)[rows].to(self.base.unet.device)

            begin = part_way.select(rows) if part_way else None
            try:
                finished.append(self._latents(start[rows], features.select(rows), sampling, again, begin))
            except NotFinite as error:
                kept = [*finished, *([error.latents] if error.latents is not None else [])]
                raise NotFinite(str(error), torch.cat(kept) if kept else None) from error
            report(len(finished[-1]))
        return torch.cat([self.base.decode(latents).cpu() for part in finished for latents in part.split(batch)])

    @torch.inference_mode()
    def draw_each(
        self,
        features: FeatureMap,
        sampling: UntrainedSampling,
        seeds: Sequence[int],
        part_way: PartWay | None = None,
    ) -> Tensor:
        """Pictures [B, 3, h, w] in 0..1 of maps [B, ...] with a seed each, at once: row by row what draw gives of that
        map alone. part_way: pictures' latents [B, C, H, W] to begin from. Raises NotFinite."""
        start = torch.cat([noise(self.base, seed) for seed in seeds])
        generators = [torch.Generator().manual_seed(seed + 1) for seed in seeds]

        def again() -> Tensor:
            new = [torch.randn((1, *start.shape[1:]), generator=generator) for generator in generators]
            return torch.cat(new).to(self.base.unet.device)

        return self.base.decode(self._latents(start, features, sampling, again, part_way)).cpu()

    def _latents(
        self,
        start: Tensor,
        features: FeatureMap,
        sampling: UntrainedSampling,
        again: Callable[[], Tensor],
        part_way: PartWay | None = None,
    ) -> Tensor:
        """Latents [B, C, H, W] of starting noise [B, C, H, W] and a map per row."""
        base = self.base
        x, features = start.to(base.unet.device), features.to(base.unet.device)
        solver, levels = levels_of(base, sampling.steps)
        weights = guidance_weights(sampling.guidance, "features", controlled=False)
        context = {True: base.text[self.prompt], False: base.text[""]}
        context = torch.cat([context[prompted].expand(len(x), -1, -1) for _, prompted in weights])
        leave_inference(self.small or base.vae)

        def clean_of(x: Tensor, step: int) -> Tensor:
            t = solver.timesteps[step]
            parts = prediction(base.unet, x.repeat(len(weights), 1, 1, 1), t, context).float().split(len(x))
            pred = sum(weight * part for weight, part in zip(weights.values(), parts))
            return predicted_clean(solver, x, pred, t)

        toward = partial(
            toward_features,
            picture_of=self.guiding_picture,
            backbone=self.backbone,
            target=features,
            step=sampling.step,
            distance=sampling.distance,
        )
        first = part_way.first(sampling.steps) if part_way else 0
        if part_way and first:
            x = noised(solver, part_way.clean, x, solver.timesteps[first])
        with cancellable(unchecked, self.small or base.vae, self.backbone):
            return sample_toward(clean_of, x, levels, sampling, toward, again, first=first)


def levels_of(base: BaseModel, steps: int) -> tuple[object, list[Level]]:
    """A solver that has the timesteps from the last one on, and their levels with no noise at the end. Raises
    FeatInvError as set_timesteps does."""
    solver = solver_of(base, Sampling(steps=steps))
    set_timesteps(solver, steps)
    alpha_bar = [solver.alphas_cumprod[t].item() for t in solver.timesteps]
    return solver, [*((a**0.5, (1 - a) ** 0.5) for a in alpha_bar), (1.0, 0.0)]


def load_untrained(
    base: str | None = None,
    backbone: str | None = None,
    backbone_weights: str | None = None,
    layer: str = LAST,
    pooled: bool = False,
    prompt: str | None = None,
    device: str = "cpu",
    small_decoder: str | None = None,
    checkpointing: bool = False,
) -> UntrainedPipeline:
    """Opens a base model (as load_base, or an embedded world by its name; the drawn world's if None) and a backbone (as
    open_backbone; the world's first if None). prompt: the world's own if None, else "". small_decoder: folder of a
    diffusers AutoencoderTiny that decodes for the guidance. checkpointing: the decoder's blocks are computed again on
    the way back instead of being kept. Raises FeatInvError where a part is missing or does not fit."""
    world = WORLDS.get(base or "drawn") or find_world(base)
    if world is None and backbone is None:
        raise FeatInvError(
            f"base model {base} has no backbone of its own; name one with --backbone (a timm name or folder) and, for a"
            " name, --backbone-weights"
        )
    if prompt is None:
        prompt = world.prompt if world else ""
    source = open_backbone(backbone or next(iter(world.backbones)), backbone_weights, None, bool(backbone))
    source = source.to(device, memory_format=torch.channels_last)
    source.source(layer, pooled)  # names a layer that it does not have
    frozen = load_base(world.base if world else base, prompt).to(device)
    small = small_decoder_of(frozen, small_decoder).to(device) if small_decoder else None
    if checkpointing:
        decoder = small or frozen.vae
        if not isinstance(decoder, AutoencoderKL | AutoencoderTiny):
            raise FeatInvError(
                f"--checkpointing: the decoder of {frozen.name} is small and keeps little; leave the option out"
            )
        decoder.enable_gradient_checkpointing()
    return UntrainedPipeline(frozen, source, prompt, layer, pooled, small)


def small_decoder_of(base: BaseModel, folder: str) -> AutoencoderTiny:
    """A small decoder for a base model's latents. Raises FeatInvError for one of other channels or another scale, and
    as load_small_decoder does."""
    small = load_small_decoder(Path(folder))
    there = small.config.latent_channels, 2 ** (len(small.config.decoder_block_out_channels) - 1)
    expected = base.unet.config.in_channels, base.downscale
    if there != expected:
        raise FeatInvError(
            f"--small-decoder {folder} decodes latents of {there[0]} channels with {there[1]} pixels per cell; base"
            f" model {base.name} has {expected[0]} and {expected[1]}. Give the one that was made for it"
        )
    return small.eval().requires_grad_(False)
