"""A world's base model: a diffusers UNet2DConditionModel with the SD 1.x noise schedule.

It predicts velocity (Salimans and Ho 2022): with noise prediction the loss hardly sees high noise, where the content
of a small image is decided. Its "text" is a fixed embedding of the prompt and one of the empty prompt.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from featinv_nodes.core.files import write_safetensors, write_weights, written_whole
from featinv_nodes.core.patch_autoencoder import PatchAutoencoder
from featinv_nodes.worlds.drawn import DRAWN
from featinv_nodes.worlds.drawn.scenes import draw
from training.files import write_json
from training.models import stable_diffusion

from .backbones import normalise
from .loop import train_stage

WIDTHS, HEADS, TOKENS, CONTEXT = (64, 96), 4, 4, 64
PROMPT = DRAWN.prompt
IMAGES, BATCH, LR = 1_000_000, 64, 1.5e-3
CACHED, PART = 2_000_000, 10_000  # scenes whose latents are kept at most; else each is used about three times
SCHEDULE = stable_diffusion.SCHEDULE | {"prediction_type": "v_prediction", "steps_offset": 0}


def build(side: int = 8, channels: int = 24, widths: tuple[int, ...] = WIDTHS) -> UNet2DConditionModel:
    """The untrained base model: side x side x channels latents, a level per width, cross-attention below the first."""
    below = len(widths) - 1
    return UNet2DConditionModel(
        sample_size=side,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=widths,
        layers_per_block=1,
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * below),
        up_block_types=(*["CrossAttnUpBlock2D"] * below, "UpBlock2D"),
        cross_attention_dim=CONTEXT,
        attention_head_dim=HEADS,
        norm_num_groups=32,
    )


def prompt_embeddings() -> dict[str, Tensor]:
    """{"prompt", "empty"}: fixed random tokens [1, 4, 64]; the base model has no text encoder."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(1, TOKENS, CONTEXT, generator=generator) for name in ("prompt", "empty")}


@torch.inference_mode()
def cached_latents(work: Path, vae: PatchAutoencoder, device: str, count: int, seed: int = 0) -> Tensor:
    """fp16 [count, 24, 8, 8] latents of training scenes, encoded once in parts that survive an interruption."""
    parts, vae = [], vae.to(device, memory_format=torch.channels_last)
    for start in tqdm(range(0, count, PART), desc="latents", unit="part"):
        file = work / "latents" / f"{start}.pt"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            chunk = []
            for numbers in torch.arange(start, start + PART, device=device).split(100 if device == "cpu" else 5000):
                x = normalise(draw(seed, numbers).image).to(memory_format=torch.channels_last)
                with torch.autocast(device, torch.bfloat16):
                    chunk.append(vae.encode(x).half().cpu())
            with written_whole(file) as part:
                torch.save(torch.cat(chunk), part)
        parts.append(torch.load(file, weights_only=True))
    return torch.cat(parts)[:count]


def train_base(
    work: Path,
    unet: UNet2DConditionModel,
    latents: Callable[[int], Tensor],
    device: str = "cpu",
    batch: int = BATCH,
    lr: float = LR,
    compile: bool = True,
    **stage,  # of train_stage
) -> UNet2DConditionModel:
    """Trains the base model to predict velocity; one text in ten is empty. latents: a number -> so many random ones."""
    unet = unet.to(device, memory_format=torch.channels_last)
    forward = torch.compile(unet) if compile else unet
    scheduler = DDIMScheduler(**SCHEDULE)
    text = {name: embedding.to(device) for name, embedding in prompt_embeddings().items()}

    def loss_of(indices: Tensor) -> Tensor:
        z = latents(len(indices))
        t, noise = torch.randint(1000, (len(z),), device=device), torch.randn_like(z)
        context = torch.where(torch.rand(len(z), 1, 1, device=device) < 0.1, text["empty"], text["prompt"])
        noisy, target = scheduler.add_noise(z, noise, t), scheduler.get_velocity(z, noise, t)
        with torch.autocast(device, torch.bfloat16):
            pred = forward(noisy.to(memory_format=torch.channels_last), t, context).sample
        return F.mse_loss(pred.float(), target)

    return train_stage(
        "base", unet, loss_of, batch=batch, lr=lr, work=work, ema=0.9995, decay=0.01, device=device, **stage
    )


def write_base(
    folder: Path,
    unet: UNet2DConditionModel | None,
    vae: PatchAutoencoder,
    prompt: str,
    dtype: torch.dtype = torch.float16,
) -> None:
    """A folder in diffusers' layout, its weights as write_weights stores them; prompts.safetensors in place of a
    text encoder. unet: None keeps an existing one."""
    for part, module in (("unet", unet), ("vae", vae)):
        if module is None:
            continue
        write_weights(folder / part / "diffusion_pytorch_model.safetensors", module.state_dict(), dtype)
        config = vae.config if part == "vae" else json.loads(unet.to_json_string())
        write_json(folder / part / "config.json", config)
    DDIMScheduler(**SCHEDULE).save_pretrained(folder / "scheduler")
    text = prompt_embeddings()
    write_safetensors(folder / "prompts.safetensors", {prompt: text["prompt"], "": text["empty"]}, {"format": "pt"})
