"""The host's autoencoders as gradients pass through them: no more at once than memory has room for, and ended as soon
as the user cancels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import comfy.model_management as management
import comfy.sd
from comfy.ldm.modules.diffusionmodules.model import AttnBlock, Decoder, ResnetBlock, Upsample
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from comfy.taesd.taesd import TAESD
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..core.errors import FeatInvError
from ..core.guidance import leave_inference
from ..core.waiting import cancellable
from .models import in_gb, stop_if_cancelled

#: Memory of a decoding whose gradient is taken, in units of the host's memory_used_decode, with a reserve: the peak is
#: 2.8 for the decoder of Stable Diffusion and Flux, 1.0 where its blocks are computed again, 0.31 for TAESD. What the
#: backbone keeps comes to it.
KEPT, AGAIN, SMALL = 4.0, 1.5, 0.5
BLOCKS = (ResnetBlock, AttnBlock, Upsample)
HELP = (
    "Use a small decoder (Load VAE: taesd for SD 1.x, taesdxl for SDXL, taesd3 or taef1, with its files in"
    " models/vae_approx) for the guidance, smaller latents, or a smaller backbone"
)


class Decoding:
    """An autoencoder that decodes latents of a model's. patcher: loads its weights, whole. Raises FeatInvError for that
    of a checkpoint which has none: the host's loader gives an empty one."""

    def __init__(self, vae: comfy.sd.VAE) -> None:
        if getattr(vae, "first_stage_model", None) is None:
            raise FeatInvError("the checkpoint has no autoencoder; connect the VAE that belongs to it (Load VAE)")
        self.vae, self.patcher = vae, whole(vae.patcher)

    @property
    def blocks(self) -> list[nn.Module]:
        """What can be computed a second time on the way back instead of being kept: of the usual decoder only."""
        decoders = (m for m in self.patcher.model.modules() if isinstance(m, Decoder))
        return [m for decoder in decoders for m in decoder.modules() if isinstance(m, BLOCKS)]

    def need(self, latents: Tensor, again: bool, read: int) -> float:
        """Bytes that decoding one of the latents [B, C, H, W] and reading the picture takes with the gradient. again:
        blocks computed again. read: ManagedBackbone.kept_bytes."""
        factor = SMALL if isinstance(self.patcher.model, TAESD) else AGAIN if again else KEPT
        return factor * self.vae.memory_used_decode((1, *latents.shape[1:]), self.vae.vae_dtype) + read

    def least(self, latents: Tensor, read: int) -> float:
        """Bytes that this takes at least for one of the latents."""
        return self.need(latents, bool(self.blocks), read)

    def require_room(self, latents: Tensor, reader: ModelPatcher, read: int) -> None:
        """Raises FeatInvError where the device has too little memory for this, with nothing else on it. reader: the
        backbone's patcher."""
        weights = self.patcher.model_size() + reader.model_size()
        height, width = (side * self.vae.spacial_compression_decode() for side in latents.shape[2:])
        need, there = self.least(latents, read) + weights, management.get_total_memory(self.vae.device)
        if need > there:
            raise FeatInvError(
                f"the gradient of a decoded image of {width} x {height} pixels needs {in_gb(need)} of memory, and"
                f" {self.vae.device} has {in_gb(there)}. {HELP}"
            )

    def plan(self, latents: Tensor, read: int) -> tuple[int, bool]:
        """How many of the latents are decoded at once, and whether blocks are computed again on the way back: where
        there is too little free memory for keeping all of one row."""
        free = management.get_free_memory(self.vae.device)
        again = bool(self.blocks) and free < self.need(latents, False, read)
        return max(1, int(free / self.need(latents, again, read))), again

    def picture_of(self, latents: Tensor, process_out: Callable[[Tensor], Tensor]) -> Tensor:
        """Latents of the sampler's -> pictures [B, 3, h, w] in 0..1. process_out: of the model's latent format."""
        decoded = self.patcher.model.decode(process_out(latents).to(self.vae.device, self.vae.vae_dtype))
        return self.vae.process_output(decoded.float()).to(latents.device)

    @contextmanager
    def ready(self, again: bool) -> Iterator[None]:
        """The decoder ready for gradients, and cancellable. again: computes blocks again on the way back."""
        leave_inference(self.patcher.model)
        blocks = self.blocks if again else []
        for block in blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        try:
            with cancellable(stop_if_cancelled, self.patcher.model):
                yield
        finally:
            for block in blocks:
                del block.forward


def check_vae(model: BaseModel, vae: comfy.sd.VAE) -> None:
    """Raises FeatInvError for an autoencoder whose latents cannot be those of a host's model: by their channels,
    dimensions and, where the host knows it, pixels per cell. Two of the same shape are not told apart, such as those of
    SD 1.x and SDXL: their weights do not say at which scale a model has its latents."""
    form, way = model.latent_format, "connect the VAE that belongs to the model (Load Checkpoint's, or Load VAE)"
    if vae.latent_channels != form.latent_channels:
        raise FeatInvError(
            f"the autoencoder has {vae.latent_channels} latent channels, the model {form.latent_channels}; {way}"
        )
    if vae.latent_dim != form.latent_dimensions:
        raise FeatInvError(
            f"the autoencoder's latents have {vae.latent_dim} dimensions, the model's {form.latent_dimensions}; {way}"
        )
    there, expected = vae.spacial_compression_decode(), getattr(form, "spacial_downscale_ratio", None)
    if expected not in (None, there):  # hosts before 0.10 do not say
        raise FeatInvError(f"the autoencoder has {there} pixels per latent cell, the model {expected}; {way}")


def whole(patcher: ModelPatcher) -> ModelPatcher:
    """The patcher, or where the host would load its weights piece by piece as they are used, one that loads them all:
    such pieces know no gradients."""
    dynamic = getattr(patcher, "is_dynamic", None)  # hosts before 0.30 have none
    return patcher.get_non_dynamic_delegate() if dynamic and dynamic() else patcher
