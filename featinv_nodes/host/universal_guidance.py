"""Universal guidance as a sampler of the host's: features without a trained inversion model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import comfy.model_management as management
import comfy.sd
import comfy.utils
import torch
from comfy.samplers import KSAMPLER
from torch import Tensor
from tqdm.auto import tqdm

from ..core.errors import FeatInvError
from ..core.feature_map import FeatureMap
from ..core.universal_guidance import Level, NotFinite, UniversalGuidance, sample_toward
from ..core.waiting import cancellable
from .decoding import Decoding
from .guidance import moved, require_fit
from .models import ManagedBackbone, stop_if_cancelled
from .notices import executing_node, tell, tell_counts


class ModelSampling(Protocol):
    """A model's sampling, as the host's model_sampling has it."""

    def noise_scaling(self, sigma: Tensor, noise: Tensor, latent_image: Tensor) -> Tensor: ...


class Wrapped(Protocol):
    """What the host hands a sampler: calls the model, and holds it."""

    inner_model: Any

    def __call__(self, x: Tensor, sigma: Tensor, **options: Any) -> Tensor: ...


def guidance_sampler(
    vae: comfy.sd.VAE, backbone: ManagedBackbone, target: FeatureMap, guidance_of: Callable[[int], UniversalGuidance]
) -> KSAMPLER:
    """A sampler that moves each predicted x0_hat toward `target`. Since the host's models all give clean latents, it
    serves predictions of noise, velocity and flow alike. guidance_of: number of steps -> how to guide. Where latents
    become not finite, it gives the last finite ones, and the node that made it says what to lower.

    What it draws with raises FeatInvError for a map of another backbone, another model's autoencoder, latents of
    videos, a decoding that is too much for the device's memory, or a model whose noise it does not know."""
    decoding, node = Decoding(vae), executing_node()

    def sample(
        model: Wrapped,
        x: Tensor,
        sigmas: Tensor,
        extra_args: dict | None = None,
        callback: Callable[[dict], object] | None = None,
        disable: bool | None = None,
    ) -> Tensor:
        guider, extra_args = model.inner_model, extra_args or {}
        base = guider.inner_model
        require_fit(base, vae, backbone, target)
        if x.ndim != 4:
            raise FeatInvError(
                f"Feature Guidance Sampler: latents of shape {list(x.shape)}; expected images, [batch, channels,"
                " height, width]. Use it with a model of single images"
            )
        levels = levels_of(base.model_sampling, sigmas)
        management.load_models_gpu([backbone.patcher])  # which counts on its device what it keeps
        read = backbone.kept_bytes(target.source.layer)
        decoding.require_room(x, backbone.patcher, read)
        tell_counts(node, len(x), [(len(target), "feature map")])
        models = [guider.model_patcher, decoding.patcher, backbone.patcher]
        management.load_models_gpu(models, memory_required=decoding.least(x, read))
        mask, steps = extra_args.get("denoise_mask"), len(levels) - 1
        guidance = guidance_of(steps)
        bar = Bar(guidance.gradients(steps) + guidance.evaluations(steps), disable)
        # the seed after the starting noise's own, as the host's samplers take it
        generator = torch.Generator().manual_seed(int(extra_args.get("seed") or 0) + 1)

        def clean_of(x: Tensor, step: int) -> Tensor:
            stop_if_cancelled()
            return model(x, sigmas[step] * x.new_ones(len(x)), **extra_args)

        def toward(clean: Tensor) -> Tensor:
            new = moved(clean, base, decoding, backbone, target, guidance.step, guidance.distance)
            bar.advance()
            return new if mask is None else clean + (new - clean) * mask  # what is kept does not move

        def noise() -> Tensor:
            return torch.randn(x.shape, generator=generator).to(x)

        def report(step: int, x: Tensor, clean: Tensor) -> None:
            if callback is not None:  # the host's preview, and its bar, which knows whole steps only
                now = {"x": x, "i": step, "sigma": sigmas[step], "sigma_hat": sigmas[step], "denoised": clean}
                callback(now)
                bar.again()
            bar.advance()

        try:
            with bar.printed, cancellable(stop_if_cancelled, base):
                return sample_toward(clean_of, x, levels, guidance, toward, noise, report)
        except NotFinite as error:
            if error.latents is None:
                raise
            tell(node, [f"{error}. The image is the last finite one"], [], "")
            return error.latents

    return KSAMPLER(sample)


class Bar:
    """Progress by predictions and moves, on the node and in the terminal; raises once the user has cancelled."""

    def __init__(self, total: int, disable: bool | None) -> None:
        self.total, self.done, self.printed = total, 0, tqdm(total=total, disable=disable)
        self.again()

    def again(self) -> None:
        """A new progress bar on the node, which shows its state at once, after the host's own bar has shown
        another."""
        self.shown = comfy.utils.ProgressBar(self.total)

    def advance(self) -> None:
        stop_if_cancelled()
        self.done += 1
        self.shown.update_absolute(self.done)
        self.printed.update(1)


def levels_of(model_sampling: ModelSampling, sigmas: Tensor) -> list[Level]:
    """Signal and noise of latents at each of the sigmas, from what the model's own noise_scaling makes of clean latents
    and of noise: (1, sigma) for models of noise and velocity, (1 - sigma, sigma) for flows. Raises FeatInvError for a
    model that adds no noise."""
    one, none = sigmas.new_ones(1, 1, 1, 1), sigmas.new_zeros(1, 1, 1, 1)

    def scaled(sigma: Tensor, noise: Tensor, clean: Tensor) -> float:
        return float(model_sampling.noise_scaling(sigma.reshape(1), noise.clone(), clean.clone()).mean())

    levels = [(scaled(sigma, none, one), scaled(sigma, one, none)) for sigma in sigmas]
    if not all(spread > 0 for _, spread in levels[:-1]):
        raise FeatInvError(
            f"Feature Guidance Sampler: the model's sampling ({type(model_sampling).__name__}) adds no noise at"
            f" sigmas {[round(float(s), 3) for s in sigmas[:-1]]}; expected a diffusion or flow model, with sigmas that"
            " fall to zero at the end only"
        )
    return levels
