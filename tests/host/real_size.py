"""In a host's environment: Stable Diffusion 1.5 at real size and random weights, guided toward feature maps of
ConvNeXt-Base by Feature Guidance Sampler, and cancelled on the way, on the device that the host chooses. Prints one
line of JSON.

python real_size.py HOST_ROOT PACK BASE_DIRECTORY PIXELS CANCELS WIDTH      latents' pixels; 320 is Stable Diffusion's
"""

import json
import os
import statistics
import sys
import time
from pathlib import Path
from threading import Timer

import timm
import torch
from safetensors.torch import save_file

sys.argv, (PIXELS, CANCELS, WIDTH) = sys.argv[:4], map(int, sys.argv[4:7])

os.environ["FEATINV_OWN_DEVICE"] = "1"
import opening  # before anything else of the host

BASE, SEED, error_of, run = opening.BASE, opening.SEED, opening.error_of, opening.run

import comfy.model_management as management
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.supported_models
from comfy.ldm.models.autoencoder import AutoencoderKL
from comfy_extras.nodes_custom_sampler import Guider_Basic

STEPS = 2
DEVICE = management.get_torch_device()
UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": WIDTH,
    "channel_mult": [1, 2, 4, 4],
    "num_res_blocks": [2, 2, 2, 2],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "context_dim": 768,
    "legacy": False,
    "num_heads": 8,
    "adm_in_channels": None,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
}
VAE = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": max(32, WIDTH * 2 // 5),
}
VAE |= {"ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0}


def filled(module: torch.nn.Module) -> torch.nn.Module:
    """Random weights of such a size that values neither grow nor vanish."""
    for name, p in module.named_parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=p[0].numel() ** -0.5)
        else:
            (torch.nn.init.zeros_ if name.endswith("bias") else torch.nn.init.ones_)(p)
    return module.eval()


def model() -> object:
    """The patcher of the diffusion model, in half precision on a graphics card, as the host chooses it."""
    described = type("SD15", (comfy.supported_models.SD15,), {"unet_config": {}, "unet_extra_config": {}})(dict(UNET))
    described.set_inference_dtype(torch.float16 if DEVICE.type == "cuda" else torch.float32, None)
    made = described.get_model({}, "")
    filled(made.diffusion_model)
    patcher = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    return patcher(made.eval(), load_device=DEVICE, offload_device=management.unet_offload_device())


def autoencoder() -> comfy.sd.VAE:
    params = {"ddconfig": VAE, "embed_dim": 4}
    return comfy.sd.VAE(sd=filled(AutoencoderKL(**params)).state_dict(), config={"params": params})


def backbone() -> object:
    """Load Backbone's of a file with random weights."""
    folder = Path(BASE, "models", "backbones")
    folder.mkdir(parents=True, exist_ok=True)
    name = "convnext_base" if WIDTH == 320 else "resnet10t"
    with torch.inference_mode(False):
        weights = timm.create_model(name).state_dict()
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / f"{name}.safetensors")
    return run("FeatInv_LoadBackbone", weights=f"{name}.safetensors", timm_name="", input_size=0)[0]


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def draws() -> object:
    """A function that draws, as SamplerCustomAdvanced does."""
    torch.manual_seed(SEED)
    reads, unet, vae = backbone(), model(), autoencoder()
    image = torch.rand(1, 256, 256, 3)
    features = run("FeatInv_ExtractFeatures", backbone=reads, image=image, layer="last", pooled=False, fit="crop")[0]
    settings = {"cost": "own settings", "moves": 2, "step": 0.1, "recurrence": 1, "start_percent": 0.0}
    settings |= {"end_percent": 1.0, "distance": "cosine"}
    guider = Guider_Basic(unet)
    guider.set_conds([[torch.randn(1, 77, 768), {"pooled_output": None}]])
    sigmas = comfy.samplers.calculate_sigmas(unet.get_model_object("model_sampling"), "simple", STEPS)
    latent = torch.zeros(1, 4, PIXELS // 8, PIXELS // 8)

    def draw() -> None:
        sampler = run("FeatInv_GuidanceSampler", vae=vae, backbone=reads, features=features, **settings)
        noise = comfy.sample.prepare_noise(latent, SEED)
        guider.sample(noise, latent, sampler, sigmas, disable_pbar=True, seed=SEED)
        wait()

    return draw


def goes_on(draw, delay: float) -> float | None:
    """Seconds from a cancel, `delay` seconds after the beginning, until the device is idle; None where drawing had
    ended before."""
    cancelled = []

    def cancel() -> None:
        cancelled.append(time.perf_counter())
        management.interrupt_current_processing()

    timer = Timer(delay, cancel)
    timer.start()
    message = error_of(draw)
    wait()
    ended = time.perf_counter()
    timer.cancel()
    timer.join()
    management.interrupt_current_processing(False)
    return ended - cancelled[0] if message.startswith("InterruptProcessingException") else None


with torch.inference_mode():
    draw = draws()
    draw()
    began = time.perf_counter()
    draw()
    whole = time.perf_counter() - began
    seconds = [goes_on(draw, whole * (number + 0.5) / CANCELS) for number in range(CANCELS)]
ended = [s for s in seconds if s is not None]
print(
    json.dumps(
        {
            "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "processor, one thread",
            "step": whole / STEPS,
            "cancelled": len(ended),
            "longest": max(ended, default=None),
            "median": statistics.median(ended) if ended else None,
        }
    )
)
