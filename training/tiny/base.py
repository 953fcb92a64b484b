"""The embedded world's base model: a diffusers UNet2DConditionModel with the SD 1.x noise schedule.

It predicts velocity (Salimans and Ho 2022): with noise prediction the loss hardly sees high noise, where the content
of a small picture is decided. Its "text" is a fixed embedding of the prompt and one of the empty prompt.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from featinv_nodes.core.patch_autoencoder import PatchAutoencoder
from featinv_nodes.tiny_world.scenes import draw

from .backbones import normalise
from .loop import train_stage

WIDTHS, TOKENS, CONTEXT = (64, 96), 4, 64
PROMPT = "a drawing of the small world"
IMAGES, BATCH, RATE = 1_000_000, 64, 1.5e-3
CACHED, PART = 2_000_000, 10_000  # scenes whose latents are kept at most; else each is used about three times
SCHEDULE = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
    "prediction_type": "v_prediction", "clip_sample": False, "set_alpha_to_one": True, "timestep_spacing": "trailing",
}


def build() -> UNet2DConditionModel:
    """The untrained base model: 8 x 8 x 24 latents, one halving, cross-attention at the lower resolution."""
    return UNet2DConditionModel(
        sample_size=8, in_channels=24, out_channels=24, block_out_channels=WIDTHS, layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=CONTEXT, attention_head_dim=4, norm_num_groups=32,
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
            torch.save(torch.cat(chunk), f"{file}.part")
            Path(f"{file}.part").rename(file)
        parts.append(torch.load(file, weights_only=True))
    return torch.cat(parts)[:count]


def train_base(
    work: Path,
    vae: PatchAutoencoder,
    device: str = "cpu",
    seed: int = 0,
    start: UNet2DConditionModel | None = None,
    images: int = IMAGES,
    batch: int = BATCH,
    rate: float = RATE,
    compile: bool = True,
    graph: bool = False,
) -> UNet2DConditionModel:
    """Trains the base model, `start` or a new one, on cached latents; one text in ten is empty."""
    torch.manual_seed(seed)
    latents = cached_latents(work, vae, device, min(CACHED, images // 3)).to(device)
    unet = (start or build()).to(device, memory_format=torch.channels_last)
    forward = torch.compile(unet) if compile else unet
    scheduler = DDIMScheduler(**SCHEDULE)
    text = {name: embedding.to(device) for name, embedding in prompt_embeddings().items()}

    def loss_of(indices: Tensor) -> Tensor:
        z = latents[torch.randint(len(latents), indices.shape, device=device)].float()
        t, noise = torch.randint(1000, (len(z),), device=device), torch.randn_like(z)
        context = torch.where(torch.rand(len(z), 1, 1, device=device) < 0.1, text["empty"], text["prompt"])
        noisy, wanted = scheduler.add_noise(z, noise, t), scheduler.get_velocity(z, noise, t)
        with torch.autocast(device, torch.bfloat16):
            found = forward(noisy.to(memory_format=torch.channels_last), t, context).sample
        return F.mse_loss(found.float(), wanted)

    return train_stage("base", unet, loss_of, images=images, batch=batch, rate=rate, work=work, ema=0.9995, decay=0.01, device=device, graph=graph)
