"""The embedded default in the host's own classes: model, autoencoder and conditioning."""

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

from ..core.patch_autoencoder import LATENTS, PATCH, PatchAutoencoder
from ..tiny_world import FOLDER
from .models import Patcher, managed
from .unet import ldm_config, to_ldm

BASE = FOLDER / "base"


class TinyLatents(comfy.latent_formats.LatentFormat):
    """24 channels of unit variance; the sampler's previews show what the decoder's linear part draws of them."""

    latent_channels = LATENTS

    def show_by(self, vae: PatchAutoencoder) -> TinyLatents:
        linear = vae.expand.weight[:, :, 0, 0].unflatten(0, (3, PATCH**2)).mean(1)  # [3, 24] mean colour of a patch
        self.latent_rgb_factors = (linear * vae.deviation[:, 0, 0]).T.tolist()
        bias = vae.expand.bias.unflatten(0, (3, PATCH**2)).mean(1) + linear @ vae.mean[:, 0, 0]
        self.latent_rgb_factors_bias = bias.tolist()
        return self


class TinyWorld(comfy.supported_models.SD15):
    """An SD 1.x model of another size that predicts velocity."""

    unet_config: dict = {}
    unet_extra_config: dict = {}
    latent_format = TinyLatents

    def model_type(self, state_dict: dict, prefix: str = "") -> comfy.model_base.ModelType:
        return comfy.model_base.ModelType.V_PREDICTION

    def inpaint_model(self) -> bool:
        return False  # the host takes more than four channels for an inpainting model


def load_model(vae: PatchAutoencoder) -> ModelPatcher:
    """The base model in float32."""
    settings = json.loads((BASE / "unet" / "config.json").read_text())
    tensors = {k: v.float() for k, v in load_file(BASE / "unet" / "diffusion_pytorch_model.safetensors").items()}
    config = ldm_config(tensors, settings["attention_head_dim"])
    described = TinyWorld(config)
    described.latent_format.show_by(vae)
    described.set_inference_dtype(torch.float32, None)
    model = described.get_model({}, "")
    model.diffusion_model.load_state_dict(to_ldm(tensors, config), strict=True)
    return Patcher(model.eval(), load_device=management.get_torch_device(), offload_device=management.unet_offload_device())


def load_vae() -> PatchAutoencoder:
    return PatchAutoencoder.load(BASE / "vae" / "diffusion_pytorch_model.safetensors")


def as_host_vae(vae: PatchAutoencoder) -> comfy.sd.VAE:
    """The host's VAE object around our module. The host builds one only for architectures that it knows, so it is
    built for the simplest of these and given ours."""
    host = comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)})
    host.first_stage_model, host.patcher = vae, managed(vae, host.device)
    host.latent_channels, host.downscale_ratio, host.upscale_ratio = LATENTS, PATCH, PATCH
    host.vae_dtype = torch.float32
    host.memory_used_encode = lambda shape, dtype: 80 * shape[2] * shape[3]  # bytes, from the widest layers
    host.memory_used_decode = lambda shape, dtype: 12_000 * shape[2] * shape[3]
    return host


def load_conditioning() -> tuple[list, list]:
    """(positive, negative) in the host's form: the embedded prompt's embedding and the empty prompt's."""
    texts = load_file(BASE / "prompts.safetensors")
    positive = next(value for text, value in texts.items() if text)
    return tuple([[value.float(), {"pooled_output": None}]] for value in (positive, texts[""]))
