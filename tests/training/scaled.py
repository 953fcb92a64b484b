"""A base model in which nothing is one or zero: what the embedded worlds' sizes, scales and variances would hide.

Its images have another side than the backbone's, its autoencoder a scale factor, a shift and a posterior with
variance, and its U-Net predicts noise.
"""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import save_file

from training.models.base_model import load_base

PROMPT = "a b"
FACTOR, SHIFT, SIDE = 0.18215, 2.0, 16


def save(folder, prediction_type="epsilon"):
    """A diffusers folder at random weights; pictures of 16 x 16 pixels, latents [4, 8, 8]."""
    torch.manual_seed(0)
    UNet2DConditionModel(
        sample_size=SIDE // 2,
        block_out_channels=(32, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=4,
    ).save_pretrained(folder / "unet")
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 32),
        scaling_factor=FACTOR,
    )
    with torch.no_grad():
        vae.quant_conv.bias[:4], vae.quant_conv.bias[4:] = SHIFT, -1.0  # mean and log-variance
        vae.post_quant_conv.bias.fill_(-SHIFT)
    vae.save_pretrained(folder / "vae")
    DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        clip_sample=False,
        prediction_type=prediction_type,
    ).save_pretrained(folder / "scheduler")
    save_file({"": torch.randn(1, 7, 16), PROMPT: torch.randn(1, 7, 16)}, folder / "prompts.safetensors")
    return folder


def opened(folder, prediction_type="epsilon"):
    return load_base(save(folder, prediction_type), PROMPT)


def posterior_of(base, pictures):
    """The autoencoder's own, unscaled, of pictures in 0..1."""
    with torch.no_grad():
        return base.vae.encode(pictures * 2 - 1).latent_dist


def picture_of(base, latents):
    """Pictures in 0..1 of scaled latents, by the autoencoder alone."""
    return (base.vae.decode(latents / FACTOR).sample / 2 + 0.5).clamp(0, 1)
