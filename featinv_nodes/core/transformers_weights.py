"""Renames weights of vision transformers from the library transformers' names to timm's.

DINOv2 with and without registers (Dinov2WithRegistersModel, Dinov2Model), the vision tower of SigLIP
(SiglipVisionModel) and ViT with MAE's (ViTModel, ViTMAEModel), in the names of transformers 4 and 5. timm has one
matrix for queries, keys and values, and adds the class token's position to that token where there are registers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

PATCHES = re.compile(r"(.*)embeddings\.patch_embeddings?\.(?:projection\.)?weight")
#: not timm's: what pictures are masked with, numbers of positions
PASSED_OVER = re.compile(r"embeddings\.(mask_token|position_ids)|pooler\..+|classifier\..+")
LAYER = re.compile(r"(?:encoder\.)?layers?\.(\d+)\.(.+?)(\.weight|\.bias)?")
#: within a layer -> timm's name, and which third of its matrix for queries, keys and values
INSIDE = {
    **dict.fromkeys(("norm1", "layernorm_before", "layer_norm1"), ("norm1", 0)),
    **dict.fromkeys(("norm2", "layernorm_after", "layer_norm2"), ("norm2", 0)),
    **dict.fromkeys(("attention.output.dense", "attention.o_proj", "self_attn.out_proj"), ("attn.proj", 0)),
    **dict.fromkeys(("mlp.fc1", "intermediate.dense"), ("mlp.fc1", 0)),
    **dict.fromkeys(("mlp.fc2", "output.dense"), ("mlp.fc2", 0)),
    "layer_scale1.lambda1": ("ls1.gamma", 0),
    "layer_scale2.lambda1": ("ls2.gamma", 0),
    **{
        name: ("attn.qkv", third)
        for third, (old, new) in enumerate((("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")))
        for name in (f"attention.attention.{old}", f"attention.{new}", f"self_attn.{new}")
    },
}
#: outside of the layers, a part of a name each
OUTSIDE = (
    (r"embeddings\.patch_embeddings?\.(?:projection\.)?", "patch_embed.proj."),
    (r"embeddings\.cls_token", "cls_token"),
    (r"embeddings\.register_tokens", "reg_token"),
    (r"embeddings\.position_embeddings|embeddings\.position_embedding\.weight", "pos_embed"),
    (r"(?:post_)?layernorm\.", "norm."),
    (r"head\.probe", "attn_pool.latent"),
    (r"head\.attention\.in_proj_", "attn_pool.qkv."),
    (r"head\.attention\.out_proj\.", "attn_pool.proj."),
    (r"head\.layernorm\.", "attn_pool.norm."),
    (r"head\.mlp\.", "attn_pool.mlp."),
)
REGISTERS = "reg_token"


def prefix_of(names: Collection[str]) -> str | None:
    """What stands before the names of a vision transformer in transformers' layout, such as "vision_model." or ""; None
    where there is none of it."""
    found = [match[1] for name in names if (match := PATCHES.fullmatch(name))]
    return min(found, key=len) if found else None


def timm_parts(names: Collection[str], prefix: str = "") -> dict[str, list[str]]:
    """Which tensors make up each of timm's: timm's name -> the names that follow `prefix` in transformers' layout, in
    their order. A name that is none of such a model's stays as it is."""
    parts: dict[str, dict[int, str]] = {}
    for name in names:
        own = name.removeprefix(prefix)
        if not name.startswith(prefix) or PASSED_OVER.fullmatch(own):
            continue
        target, third = _timm_name(own)
        parts.setdefault(target, {})[third] = name
    return {target: [found[third] for third in sorted(found)] for target, found in parts.items()}


def _timm_name(name: str) -> tuple[str, int]:
    if (layer := LAYER.fullmatch(name)) and (inside := INSIDE.get(layer[2])):
        return f"blocks.{layer[1]}.{inside[0]}{layer[3] or ''}", inside[1]
    for pattern, target in OUTSIDE:
        if match := re.match(pattern, name):
            return target + name[match.end() :], 0
    return name, 0


def to_timm(names: Collection[str], read: Callable[[str], Tensor], prefix: str = "") -> dict[str, Tensor]:
    """timm's state dict. names: in transformers' layout, all tensors of the model among them. read: gives the tensor of
    a name. Tensors that lack stay out, so that whoever loads the result can name them."""
    parts = timm_parts(names, prefix)
    state = {
        target: torch.cat([read(name) for name in found]) if len(found) > 1 else read(found[0])
        for target, found in parts.items()
        if len(found) == 3 or ".attn.qkv." not in target
    }
    if (position := state.get("pos_embed")) is not None and position.ndim == 2:  # SigLIP's table
        state["pos_embed"] = position[None]
    if REGISTERS in state and {"pos_embed", "cls_token"} <= state.keys():
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:]
    for kind in ("weight", "bias"):  # SigLIP's attention pooling asks with one query
        if (fused := state.pop(f"attn_pool.qkv.{kind}", None)) is not None:
            queries = len(fused) // 3
            state[f"attn_pool.q.{kind}"], state[f"attn_pool.kv.{kind}"] = fused[:queries], fused[queries:]
    return state


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """A state dict in transformers' layout as timm's, without the tensors of other parts (a text tower, MAE's decoder);
    None for one that is in another layout."""
    prefix = prefix_of(state)
    if prefix is None:
        return None
    own = [name for name in state if name.startswith(prefix) and (prefix or not name.startswith("decoder."))]
    return to_timm(own, state.__getitem__, prefix)
