"""The closed loop of FeatInv-Viz around the host's custom sampling: a guider samples, the backbone reads again."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Protocol

import comfy.model_management as management
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.utils
import latent_preview
from comfy.controlnet import ControlBase
from torch import Tensor

from ..core.errors import FeatInvError
from ..core.feature_map import FeatureMap
from ..core.viz import Edit, Visualization, VizSettings, visualize
from .controlnet import FeatureControl
from .latents import with_equal_noise
from .models import ManagedBackbone, stop_if_cancelled


class Noise(Protocol):
    """A NOISE of the host's."""

    seed: int

    def generate_noise(self, input_latent: dict, /) -> Tensor:
        """Noise of a LATENT's shape."""


@dataclass(frozen=True)
class CustomSampling:
    """What the host's SamplerCustomAdvanced takes, and the autoencoder. latent: a LATENT of one row per seed. The
    guider's conditionings come from FeatInv ControlNet, whatever its feature map."""

    noise: Noise
    guider: comfy.samplers.CFGGuider
    sampler: comfy.samplers.Sampler
    sigmas: Tensor
    latent: dict
    vae: comfy.sd.VAE


def search_factors(
    sampling: CustomSampling, backbone: ManagedBackbone, change: Edit, rounds: int
) -> list[Visualization]:
    """core.viz.visualize of an edit's groups, with up to this many factors for each; a bar over all of them.

    Raises FeatInvError if the edit is of several maps, or the guider steers towards no map of its kind.
    """
    change.paired(1)  # refuses several maps before anything is drawn
    seeds = len(sampling.latent["samples"])
    start = sampling.noise.generate_noise(ready(sampling, 1))
    bar = Bar(sampling, 1 + len(change.groups), len(change.groups) * (rounds - 1))

    def draw(maps: FeatureMap) -> tuple[Tensor, FeatureMap]:
        latent = ready(sampling, len(maps) // seeds)
        samples = steered(sampling.guider, maps).sample(
            start.repeat(len(maps) // seeds, *[1] * (start.ndim - 1)),
            latent["samples"],
            sampling.sampler,
            sampling.sigmas,
            denoise_mask=latent.get("noise_mask"),
            callback=bar.step,
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=sampling.noise.seed,
        )
        pictures = sampling.vae.decode(samples.to(management.intermediate_device())).movedim(-1, 1).cpu().float()
        reread = backbone.read_again(pictures, maps.source, stop_if_cancelled).to("cpu")
        bar.drawn(len(maps) // seeds)
        return pictures, reread

    settings = VizSettings(change.factor, seeds, keep_length=change.keep_length, rounds=rounds)
    return visualize(draw, change.original.to("cpu"), change.concepts, change.groups, settings, stop_if_cancelled)


def ready(sampling: CustomSampling, times: int) -> dict:
    """The latents repeated, with as many channels as the model has."""
    latent = with_equal_noise(sampling.latent, times)
    scales = {key: value for key, value in latent.items() if key.startswith("downscale_ratio")}  # of newer hosts
    samples = comfy.sample.fix_empty_latent_channels(sampling.guider.model_patcher, latent["samples"], **scales)
    return {**latent, "samples": samples}


def steered(guider: comfy.samplers.CFGGuider, maps: FeatureMap) -> comfy.samplers.CFGGuider:
    """A copy of the guider whose FeatInv ControlNets steer towards these maps instead of theirs. Raises FeatInvError if
    there is none for maps of this source."""
    copies: dict[ControlBase, ControlBase] = {}
    other = copy.copy(guider)
    other.original_conds = {
        name: [c | {"control": _towards(c["control"], maps, copies)} if c.get("control") else c for c in conds]
        for name, conds in guider.original_conds.items()
    }
    if not any(isinstance(c, FeatureControl) and c.steering.features is maps for c in copies.values()):
        raise FeatInvError(
            f"the guider steers towards no feature map of {maps.source.describe()}; connect the positive and the"
            " negative of FeatInv ControlNet, at a strength above 0, to the guider"
        )
    return other


def _towards(
    control: ControlBase | None, maps: FeatureMap, copies: dict[ControlBase, ControlBase]
) -> ControlBase | None:
    """A copy of a chain of ControlNets; the same for the same, so that conditionings stay one batch."""
    if control is None:
        return None
    if control not in copies:
        copies[control] = control.copy().set_previous_controlnet(_towards(control.previous_controlnet, maps, copies))
        if isinstance(control, FeatureControl) and control.info.source == maps.source:
            copies[control].steering = replace(control.steering, features=maps)
    return copies[control]


class Bar:
    """The host's progress bar and preview over all drawings. first: parts of the first drawing; more: those that may
    follow, a part each."""

    def __init__(self, sampling: CustomSampling, first: int, more: int) -> None:
        self.steps = len(sampling.sigmas) - 1
        model = sampling.guider.model_patcher
        self.previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)
        self.bar = comfy.utils.ProgressBar((first + more) * self.steps)
        self.done, self.now = 0, first

    def step(self, step: int, x0: Tensor, x: Tensor, total_steps: int) -> None:
        """The sampler's callback."""
        stop_if_cancelled()
        picture = self.previewer.decode_latent_to_preview_image("JPEG", x0) if self.previewer else None
        value = self.done * self.steps + self.now * self.steps * (step + 1) // total_steps
        self.bar.update_absolute(value, None, picture)

    def drawn(self, parts: int) -> None:
        self.done, self.now = self.done + parts, 1
