"""AutoencoderRAE folders of diffusers and their backbones, at random weights and few layers: what tests decode with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from diffusers import AutoencoderRAE
from diffusers.models.autoencoders.autoencoder_rae import RAEDecoder
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import SiglipVisionModel

from featinv_nodes.core.backbone_opening import load_backbone
from featinv_nodes.core.backbones import Backbone
from featinv_nodes.core.feature_map import FeatureSource
from featinv_nodes.core.files import write_weights

DEPTH = 1
#: family -> hidden size, patch, input size, timm's name
FAMILIES = {
    "dinov2": (384, 14, 224, "vit_small_patch14_reg4_dinov2.lvd142m"),
    "siglip2": (768, 16, 256, "vit_base_patch16_siglip_256.v2_webli"),
    "mae": (768, 16, 256, "vit_base_patch16_224.mae"),
}
if not hasattr(SiglipVisionModel, "vision_model"):  # transformers 5 has none any more, and diffusers 0.42 asks for it
    SiglipVisionModel.vision_model = property(lambda model: model)


@dataclass
class Trained:
    """rae: diffusers' model. folder: with it. transformers: the encoder's weights in transformers' layout, and the last
    normalisation's."""

    rae: AutoencoderRAE
    family: str
    name: str
    size: int
    folder: Path
    transformers: dict[str, Tensor]
    depth: int = DEPTH


def trained(family: str, folder: Path, depth: int = DEPTH, **sizes: int) -> Trained:
    """An AutoencoderRAE whose tokens have the variance of a trained network's, written to a folder: the encoder under
    the names of transformers 4, as in the released ones."""
    hidden, patch, size, name = FAMILIES[family]
    generator, grey = torch.Generator().manual_seed(0), [0.5] * 3 if family == "siglip2" else None
    rae = AutoencoderRAE(
        encoder_type=family,
        encoder_hidden_size=hidden,
        encoder_patch_size=patch,
        encoder_input_size=size,
        encoder_num_hidden_layers=depth,
        encoder_norm_mean=grey,
        encoder_norm_std=grey,
        latents_mean=torch.randn(hidden, 1, 1, generator=generator),
        latents_std=torch.rand(hidden, 1, 1, generator=generator) + 0.5,
        **{
            "decoder_hidden_size": 64,
            "decoder_num_hidden_layers": 1,
            "decoder_num_attention_heads": 4,
            "decoder_intermediate_size": 128,
            **sizes,
        },
    ).eval()
    for key, value in rae.named_parameters():
        if value.ndim > 1:  # tokens of the network's own variance, that the norms' tiny numbers do not touch
            spread = 1.0 if "token" in key or "position" in key else value[0].numel() ** -0.5
            torch.nn.init.normal_(value, std=spread, generator=generator)
        else:
            one = "lambda" in key or ("norm" in key and key.endswith("weight"))
            torch.nn.init.normal_(value, mean=float(one), std=0.2, generator=generator)
    last = "post_layernorm" if family == "siglip2" else "layernorm"
    state = {key: value.clone() for key, value in rae.encoder.state_dict().items()}
    state[f"{last}.weight"] = torch.rand(hidden, generator=generator) + 0.5
    state[f"{last}.bias"] = torch.randn(hidden, generator=generator)
    made = Trained(rae, family, name, size, folder, state, depth)
    rae.save_pretrained(folder)
    file = folder / "diffusion_pytorch_model.safetensors"
    encoder = in_transformers_4(made, {key: value for key, value in state.items() if not key.startswith(f"{last}.")})
    rest = {key: value for key, value in load_file(file).items() if not key.startswith("encoder.")}
    save_file(rest | {f"encoder.{key}": value for key, value in encoder.items()}, file)
    return made


def backbone_of(made: Trained, folder: Path, state: dict[str, Tensor], input_size: int | None = None) -> Backbone:
    """A timm-hub folder with these weights, opened."""
    known = timm.get_pretrained_cfg(made.name)
    about = {"architecture": known.architecture, "model_args": {"depth": made.depth}, "pretrained_cfg": known.to_dict()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(about))
    save_file({key: value.contiguous().clone() for key, value in state.items()}, folder / "model.safetensors")
    return load_backbone(str(folder), input_size=input_size or made.size)


def in_transformers_4(made: Trained, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the encoder under the names of transformers 4."""
    renamed = {}
    for name, value in state.items():
        if made.family == "mae":
            name = name.replace("layers.", "encoder.layer.").replace("mlp.fc1", "intermediate.dense")
            name = name.replace("mlp.fc2", "output.dense")
        for new, old in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
            name = name.replace(f".attention.{new}", f".attention.attention.{old}")
        name = name.replace(".attention.o_proj", ".attention.output.dense")
        renamed["vision_model." * (made.family == "siglip2") + name] = value
    return renamed


def published(made: Trained) -> dict[str, Tensor]:
    """The backbone's weights as facebook/vit-mae-base and its like have them: beside another part, where there is
    one."""
    state = in_transformers_4(made, made.transformers)
    if made.family == "mae":
        return {f"vit.{name}": value for name, value in state.items()} | {"decoder.mask_token": torch.zeros(1)}
    return state | ({"text_model.x": torch.zeros(1)} if made.family == "siglip2" else {})


def own_decoder(folder: Path, source: FeatureSource, dtype: torch.dtype = torch.float32) -> RAEDecoder:
    """A decoder of the pack's own kind for square maps that part the picture into cells, at random weights; its
    folder."""
    side, (cells, _) = source.input_size[0], source.grid
    sizes = {"decoder_hidden_size": 32, "decoder_num_attention_heads": 2, "decoder_intermediate_size": 64}
    sizes |= {"patch_size": side // cells, "decoder_num_hidden_layers": 2}
    torch.manual_seed(0)
    decoder = RAEDecoder(source.channels, **sizes, num_patches=cells**2, image_size=side).eval()
    about = {"_class_name": "AutoencoderRAE", "encoder_type": "timm", "encoder_hidden_size": source.channels, **sizes}
    about |= {"encoder_input_size": side, "encoder_patch_size": side // cells, "featinv_source": source.to_dict()}
    about |= {"encoder_norm_mean": [0.5] * 3, "encoder_norm_std": [0.5] * 3}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(about))
    tensors = {f"decoder.{name}": value for name, value in decoder.state_dict().items()}
    write_weights(folder / "diffusion_pytorch_model.safetensors", tensors, dtype)
    return decoder
