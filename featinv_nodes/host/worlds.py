"""Embedded worlds in the host's own classes: model, autoencoder, conditioning and an empty latent."""

from __future__ import annotations

import json

import comfy.latent_formats
import comfy.model_base
import comfy.model_management as management
import comfy.sd
import comfy.supported_models
import torch
from comfy.model_patcher import ModelPatcher
from safetensors.torch import load_file

from ..core.files import read_weights
from ..core.patch_autoencoder import PatchAutoencoder
from ..worlds import World
from .models import Patcher, managed
from .unet import ldm_config, to_ldm


class Latents(comfy.latent_formats.LatentFormat):
    """Latents of unit variance; the sampler's previews show what the decoder's linear part draws of them."""

    def __init__(self, vae: PatchAutoencoder) -> None:
        self.latent_channels, self.spacial_downscale_ratio = vae.latents, vae.patch
        weight, offset = vae.expand.parameters()
        linear = weight[:, :, 0, 0].unflatten(0, (3, vae.patch**2)).mean(1)  # [3, C] mean colour of a patch
        self.latent_rgb_factors = (linear * vae.deviation[:, 0, 0]).T.tolist()
        bias = offset.unflatten(0, (3, vae.patch**2)).mean(1) + linear @ vae.mean[:, 0, 0]
        self.latent_rgb_factors_bias = bias.tolist()


class BaseModel(comfy.supported_models.SD15):
    """An SD 1.x model of another size that predicts velocity."""

    unet_config: dict = {}
    unet_extra_config: dict = {}

    def model_type(self, state_dict: dict, prefix: str = "") -> comfy.model_base.ModelType:
        return comfy.model_base.ModelType.V_PREDICTION

    def inpaint_model(self) -> bool:
        return False  # the host takes more than four channels for an inpainting model


def load_model(world: World, vae: PatchAutoencoder) -> ModelPatcher:
    """The base model in float32."""
    folder = world.base_folder / "unet"
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tensors = read_weights(folder / "diffusion_pytorch_model.safetensors")
    config = ldm_config(tensors, settings["attention_head_dim"])
    described = BaseModel(config)
    described.latent_format = Latents(vae)
    described.set_inference_dtype(torch.float32, None)
    model = described.get_model({}, "")
    model.diffusion_model.load_state_dict(to_ldm(tensors, config), strict=True)
    return Patcher(
        model.eval(), load_device=management.get_torch_device(), offload_device=management.unet_offload_device()
    )


def load_vae(world: World) -> PatchAutoencoder:
    return PatchAutoencoder.load(world.base_folder / "vae")


def as_host_vae(vae: PatchAutoencoder) -> comfy.sd.VAE:
    """The host's VAE object around our module. The host builds one only for architectures that it knows, so it is
    built for the simplest of these and given ours."""
    host = comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)})
    host.first_stage_model, host.patcher = vae, managed(vae, host.device)
    host.latent_channels, host.downscale_ratio, host.upscale_ratio = vae.latents, vae.patch, vae.patch
    host.vae_dtype = torch.float32
    host.memory_used_encode = lambda shape, dtype: 80 * shape[2] * shape[3]  # bytes, from the widest layers
    host.memory_used_decode = lambda shape, dtype: 190 * vae.patch**2 * shape[2] * shape[3]
    return host


def load_conditioning(world: World) -> tuple[list, list]:
    """(positive, negative) in the host's form: the embedding of the world's prompt and the empty prompt's."""
    texts = load_file(world.base_folder / "prompts.safetensors")
    prompt = next(value for text, value in texts.items() if text)
    positive, negative = ([[value.float(), {"pooled_output": None}]] for value in (prompt, texts[""]))
    return positive, negative


def empty_latent(world: World, vae: PatchAutoencoder) -> dict:
    """One empty latent of the world's own size. The stock node's would be of SD 1.x's pixels per cell."""
    side = world.side // vae.patch
    return {"samples": torch.zeros(1, vae.latents, side, side, device=management.intermediate_device())}
