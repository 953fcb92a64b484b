"""RCDM (Bordes et al. 2022): a diffusion model in pixel space, conditioned on a pooled feature vector.

Its published checkpoints hold the UNet of Dhariwal and Nichol (2021) in that code's names, and one linear layer that
adds the vector to the timestep's embedding. Here it is diffusers' UNet of the same architecture, under diffusers'
names. The embedded world's small one (training/worlds/rcdm.py) is a safetensors file in these names, with a JSON text
under the key "rcdm": {"widths", "resolution", "source", "steps", "images_seen", "gmac_per_picture", "gmac"}.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from featinv_nodes.core.backbones import LAST, Backbone
from featinv_nodes.core.checkpoints import read_checkpoint
from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.feature_map import FeatureSource
from featinv_nodes.core.files import read_about, read_weights, write_weights
from featinv_nodes.core.metadata import Count, Fields, Source
from featinv_nodes.core.sampling import set_timesteps

#: the drawn world's, of the CNN's pooled last layer; not shipped, make_world.py makes it
EMBEDDED = Path(__file__).parent / "tiny_rcdm.safetensors"

#: the published models: 128 pixels, attention at 32, 16 and 8; widths by level
WIDTHS, LAYERS, HEADS, ATTENDING, RESOLUTION = (256, 256, 512, 768, 1024), 2, 4, (2, 3, 4), 128
#: diffusers' words for the noise that it was trained with
SCHEDULE = {
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "timestep_spacing": "trailing",
    "clip_sample": True,
}
RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


class RCDM(nn.Module):
    """The noise predictor; see load_rcdm.

    channels: length of the vectors. widths, resolution: where not the published ones. mean, std: what pictures were
    normalised with for the vectors that it was trained on; the published ones with -1..1, whatever the backbone's own.
    source: the features that it inverts, None where its file does not say. steps: of DDIM, where nobody says; 100 in
    the published code.
    """

    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    source: FeatureSource | None = None
    steps: int = 100

    def __init__(self, channels: int = 2048, widths: tuple[int, ...] = WIDTHS, resolution: int = RESOLUTION) -> None:
        super().__init__()
        attending = [level in ATTENDING for level in range(len(widths))]
        self.unet = UNet2DModel(
            sample_size=resolution,
            out_channels=6,
            freq_shift=0,
            block_out_channels=widths,
            layers_per_block=LAYERS,
            down_block_types=tuple("AttnDownBlock2D" if a else "ResnetDownsampleBlock2D" for a in attending),
            up_block_types=tuple("AttnUpBlock2D" if a else "ResnetUpsampleBlock2D" for a in reversed(attending)),
            downsample_type="resnet",
            upsample_type="resnet",
            resnet_time_scale_shift="scale_shift",
            class_embed_type="identity",
            attention_head_dim=widths[-1] // HEADS,
            attn_norm_num_groups=32,
        )
        for module in self.unet.modules():
            if isinstance(module, Attention):  # as many heads at every level, whatever its width
                module.heads = HEADS
        self.vector = nn.Linear(channels, 4 * widths[0])
        self.widths, self.resolution = tuple(widths), resolution

    @property
    def channels(self) -> int:
        return self.vector.in_features

    def forward(self, x: Tensor, t: Tensor, vectors: Tensor) -> Tensor:
        """The noise [B, 3, H, W] in pictures x in -1..1 at timesteps t [B], given vectors [B, C]. The other half of the
        published network's output, its variances, is left out: DDIM has no use for them."""
        return self.unet(x, t, self.vector(vectors)).sample[:, :3]

    @torch.inference_mode()
    def vectors(self, backbone: Backbone, pixel_values: Tensor) -> Tensor:
        """[B, C] its conditioning: the backbone's averaged last map of preprocessed pictures in 0..1."""
        own, used = ([torch.tensor(v)[:, None, None] for v in (m.mean, m.std)] for m in (backbone, self))
        return backbone.values((pixel_values.cpu() - used[0]) / used[1] * own[1] + own[0], LAST, True).flatten(1)

    @torch.inference_mode()
    def sample(self, vectors: Tensor, noise: Tensor, steps: int) -> Tensor:
        """Pictures [B, 3, H, W] in 0..1 by DDIM (eta 0), the linear schedule that the model was trained with."""
        scheduler = DDIMScheduler(**SCHEDULE)
        set_timesteps(scheduler, steps)
        device = self.vector.weight.device
        x, vectors = noise.to(device), vectors.to(device)
        for t in scheduler.timesteps:
            x = scheduler.step(self(x, t.to(device).expand(len(x)), vectors), t, x).prev_sample
        return (x / 2 + 0.5).clamp(0, 1).cpu()


def published_names(levels: int) -> dict[str, str]:
    """Prefixes of the published layout -> prefixes of RCDM's own state dict, without the parts of residual and
    attention blocks."""
    names, down, up = dict(ENDS), 1, 0
    for level in range(levels):
        for layer in range(LAYERS):
            names[f"input_blocks.{down}.0"], names[f"input_blocks.{down}.1"] = (
                f"down_blocks.{level}.{kind}.{layer}" for kind in ("resnets", "attentions")
            )
            down += 1
        if level < levels - 1:
            names[f"input_blocks.{down}.0"] = f"down_blocks.{level}.downsamplers.0"
            down += 1
    for place, name in enumerate(("resnets.0", "attentions.0", "resnets.1")):
        names[f"middle_block.{place}"] = f"mid_block.{name}"
    for level in range(levels):
        attends = levels - 1 - level in ATTENDING
        for layer in range(LAYERS + 1):
            names[f"output_blocks.{up}.0"] = f"up_blocks.{level}.resnets.{layer}"
            if attends:
                names[f"output_blocks.{up}.1"] = f"up_blocks.{level}.attentions.{layer}"
            up += 1
        if level < levels - 1:
            names[f"output_blocks.{up - 1}.{1 + attends}"] = f"up_blocks.{level}.upsamplers.0"
    return names | {"ssl_emb": "vector"}


def translate(state: dict[str, Tensor], levels: int) -> dict[str, Tensor]:
    """A published state dict under RCDM's own names. Raises KeyError for a name that the layout does not have."""
    names, converted = published_names(levels), {}
    for key, value in state.items():
        prefix = re.match(
            r"(input_blocks|middle_block|output_blocks)(\.\d+){1,2}(?=\.)|(time_embed|out)\.\d|ssl_emb", key
        )[0]
        prefix = prefix if prefix in names else prefix.rpartition(".")[0]
        place, part, kind = names[prefix], key[len(prefix) + 1 :].rpartition(".")[0], key.rpartition(".")[2]
        place = place if place == "vector" else f"unet.{place}"
        if part == "qkv":  # head by head its queries, keys and values
            split = value.reshape(HEADS, 3, -1, *value.shape[1:2]).transpose(0, 1)
            for name, rows in zip(("to_q", "to_k", "to_v"), split):
                converted[f"{place}.{name}.{kind}"] = rows.reshape(-1, *value.shape[1:2]).contiguous()
        elif part == "proj_out":
            converted[f"{place}.to_out.0.{kind}"] = value.flatten(1) if kind == "weight" else value
        else:
            own = {"": "", "norm": ".group_norm"}.get(part) if part in ("", "norm") else f".{RESNET[part]}"
            converted[f"{place}{own}.{kind}"] = value
    return converted


class About(Fields):
    """The entry "rcdm" in this project's own layout, as far as loading needs it."""

    widths: list[Count]
    resolution: Count
    source: Source
    steps: Count


def save_rcdm(file: str | Path, model: RCDM, source: FeatureSource, about: dict) -> None:
    """Writes this project's own layout in fp16. about: the steps, and how it was trained; see the module."""
    about = {"widths": model.widths, "resolution": model.resolution, "source": source.to_dict()} | about
    write_weights(file, model.state_dict(), torch.float16, {"rcdm": json.dumps(about)})


def load_rcdm(file: str | Path) -> RCDM:
    """A published checkpoint, opened without running code from it, or a .safetensors file of this project. Raises
    FeatInvError for a file that is missing, damaged, or another architecture's."""
    return (
        (load_own(file) if Path(file).suffix == ".safetensors" else load_published(file)).eval().requires_grad_(False)
    )


def load_own(file: str | Path) -> RCDM:
    """A file that save_rcdm wrote."""
    about = read_about(file, "rcdm", About, "RCDM")
    source = about.source.made()
    try:
        model = RCDM(source.channels, tuple(about.widths), about.resolution)
        model.load_state_dict(read_weights(file))
    except (RuntimeError, ValueError) as error:
        raise FeatInvError(
            f"{file}: RCDM's tensors do not fit the widths {about.widths}: {str(error)[:300]}"
        ) from error
    model.source, model.mean, model.std, model.steps = source, source.mean, source.std, about.steps
    return model


def load_published(file: str | Path) -> RCDM:
    """A checkpoint in the layout of RCDM's own code."""
    if not Path(file).is_file():
        raise FeatInvError(
            f"RCDM checkpoint {file} does not exist; its authors publish rcdm_ema_supervised.pt for ResNet50"
        )
    state = read_checkpoint(file)
    vector = state.get("ssl_emb.weight")
    if not isinstance(vector, Tensor) or vector.ndim != 2:
        raise FeatInvError(f"{file} is no RCDM checkpoint: it has no layer ssl_emb, which takes the feature vector")
    try:
        model = RCDM(vector.shape[1])
        model.load_state_dict(translate({key: value.float() for key, value in state.items()}, len(WIDTHS)))
    except (RuntimeError, KeyError, TypeError) as error:
        raise FeatInvError(
            f"{file} is not of RCDM's published architecture (128 pixels, widths {WIDTHS}): {str(error)[:300]}"
        ) from error
    return model
