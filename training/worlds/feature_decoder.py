"""Trains a small decoder of a world's feature maps: the decoder of diffusers' AutoencoderRAE (Zheng et al. 2025,
arXiv 2510.11690), with the frozen backbone as its encoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
from diffusers.models.autoencoders.autoencoder_rae import RAEDecoder
from einops import rearrange
from torch import Tensor, nn

from featinv_nodes.core.backbones import LAST, Backbone
from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.feature_map import FeatureSource
from featinv_nodes.core.files import write_weights
from training.files import write_json

from .autoencoder import cosine_distance
from .loop import train_stage

LR = 1.5e-3
NOISE = 0.3  # largest standard deviation of the noise on the maps, in units of their own: RAE's decoders forgive so
FEATURES = 0.2  # weight of the backbone's stages in the loss
STATISTICS = 512  # pictures whose maps say what is standardised


@dataclass(frozen=True)
class Sizes:
    """Of the transformer: width, number of layers, heads of its attention."""

    width: int = 128
    layers: int = 2
    heads: int = 4


class Decoder(nn.Module):
    """Maps [B, C, H, W] -> pictures [B, 3, H patch, W patch] in -1..1, by RAEDecoder on standardised maps."""

    mean: Tensor
    std: Tensor

    def __init__(self, source: FeatureSource, sizes: Sizes) -> None:
        """Raises FeatInvError for a map or a picture that is no square of whole patches, and for sizes that do not fit
        together."""
        super().__init__()
        (rows, columns), (height, width) = source.grid, source.input_size
        if rows != columns or height != width or height % rows or source.pooled:
            raise FeatInvError(
                "a feature decoder reads square maps that part the image into whole cells; got"
                f" {source.describe()} of {height} x {width} pixels"
            )
        if sizes.width % (4 * sizes.heads):
            raise FeatInvError(
                f"--width {sizes.width} and --heads {sizes.heads}: expected a width that is a multiple of four times"
                " the heads"
            )
        self.source, self.patch = source, height // rows
        self.settings = {
            "decoder_hidden_size": sizes.width,
            "decoder_num_hidden_layers": sizes.layers,
            "decoder_num_attention_heads": sizes.heads,
            "decoder_intermediate_size": 4 * sizes.width,
            "patch_size": self.patch,
        }
        self.decoder = RAEDecoder(
            hidden_size=source.channels, num_patches=rows * columns, image_size=height, **self.settings
        )
        self.register_buffer("mean", torch.zeros(source.channels))
        self.register_buffer("std", torch.ones(source.channels))

    def standardise(self, values: Tensor) -> None:
        """Takes mean and standard deviation per channel from maps [B, C, H, W]."""
        self.mean.copy_(values.mean((0, 2, 3)))
        self.std.copy_(values.std((0, 2, 3)).clamp(min=1e-4))

    @torch.no_grad()
    def start_linear(self, values: Tensor, pictures: Tensor) -> None:
        """Fits the last layer to the pictures [B, 3, h, w] in -1..1 of the maps [B, C, H, W] by ridge regression on
        what the untrained layers before it give: training then begins at a blurred picture, not at a grey one."""
        hidden = []
        hook = self.decoder.decoder_pred.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0][:, 1:]))
        self(values)
        hook.remove()
        x = rearrange(hidden[0], "b n d -> (b n) d").double()
        y = rearrange(pictures, "b c (h p) (w q) -> (b h w) (p q c)", p=self.patch, q=self.patch).double()
        x_mean, y_mean = x.mean(0), y.mean(0)
        gram = (x - x_mean).T @ (x - x_mean)
        gram.diagonal().add_(1e-3 * gram.diagonal().mean())
        weight = torch.linalg.solve(gram, (x - x_mean).T @ (y - y_mean)).T
        self.decoder.decoder_pred.weight.copy_(weight)
        self.decoder.decoder_pred.bias.copy_(y_mean - weight @ x_mean)

    def forward(self, values: Tensor, noise: float = 0.0) -> Tensor:
        tokens = (rearrange(values, "b c h w -> b (h w) c") - self.mean) / self.std
        if noise:
            level = noise * torch.rand(len(tokens), 1, 1, device=tokens.device)
            tokens = tokens + level * torch.randn_like(tokens)
        return self.decoder.unpatchify(self.decoder(tokens).logits.float())

    @torch.no_grad()
    def folded(self) -> dict[str, Tensor]:
        """The weights of a decoder that reads the maps as they are: the standardisation is part of its first layer."""
        state = {f"decoder.{name}": value for name, value in self.decoder.state_dict().items()}
        weight, bias = state["decoder.decoder_embed.weight"], state["decoder.decoder_embed.bias"]
        state["decoder.decoder_embed.weight"] = weight / self.std
        state["decoder.decoder_embed.bias"] = bias - weight @ (self.mean / self.std)
        return state


def train_feature_decoder(
    work: Path,
    name: str,
    backbone: Backbone,
    layer: str,
    pictures: Callable[[Tensor], Tensor],
    sizes: Sizes = Sizes(),
    device: str = "cpu",
    later: int = 0,
    **stage,  # of train_stage
) -> Decoder:
    """Trains on pixels and on the backbone's own stages. pictures: image numbers [B] -> [B, 3, h, w] in 0..1, as the
    backbone reads them. later: images seen on pixels alone, at less cost, before the stages join."""
    torch.manual_seed(0)
    source = backbone.source(layer)
    decoder = Decoder(source, sizes)
    with torch.no_grad():
        some = pictures(torch.arange(STATISTICS, device=device))
        values = backbone.extract(some, layer).values.cpu()
        decoder.standardise(values)
        decoder.start_linear(values, some.cpu() * 2 - 1)
    decoder.to(device)

    def loss_of(indices: Tensor) -> Tensor:
        x = pictures(indices).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.partition(":")[0], torch.bfloat16):
            with torch.no_grad():
                target = maps_to(backbone, x, layer)
            drawn = decoder(target[-1].float(), NOISE)
            error = drawn - (x * 2 - 1)
            loss = error.abs().mean() + 0.5 * error.square().mean()
            if not later or indices[0] >= later:
                loss = loss + FEATURES * cosine_distance(target, maps_to(backbone, drawn / 2 + 0.5, layer))
            return loss

    return train_stage(name, decoder, loss_of, lr=LR, work=work, ema=0.998, decay=0.01, device=device, **stage)


def maps_to(backbone: Backbone, pixel_values: Tensor, layer: str) -> list[Tensor]:
    """The maps [B, C, H, W] of every stage before a layer, and the layer's own at the end."""
    stages = [name for name in backbone.layers if name != LAST]
    chosen = [*stages, LAST] if layer == LAST else stages[: stages.index(layer) + 1]
    maps = backbone.several(pixel_values, chosen)
    return [maps[name] for name in chosen]


def write_feature_decoder(folder: Path, decoder: Decoder) -> None:
    """A folder in the layout of AutoencoderRAE, without an encoder, whose weights are in 8 bits. config.json says whose
    maps it reads."""
    config = {
        "_class_name": "AutoencoderRAE",
        "_diffusers_version": diffusers.__version__,
        "encoder_type": "timm",
        "encoder_hidden_size": decoder.source.channels,
        "encoder_input_size": decoder.source.input_size[0],
        "encoder_patch_size": decoder.patch,
        **decoder.settings,
        "encoder_norm_mean": [0.5, 0.5, 0.5],
        "encoder_norm_std": [0.5, 0.5, 0.5],
        "featinv_source": decoder.source.to_dict(),
    }
    write_weights(folder / "diffusion_pytorch_model.safetensors", decoder.folded(), torch.int8)
    write_json(folder / "config.json", config)
