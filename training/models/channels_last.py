"""Diffusers' blocks without their copies between layouts, for CUDA devices.

In channels_last, torch's group normalisation copies a map forth and back, and diffusers' blocks make maps contiguous
here and there (for old faults of torch's, and for gradients of several processes), which the next convolution takes
back. Under autocast torch normalises in float32 and writes it. The blocks here keep layout and dtype, and leave out
divisions by one.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from diffusers.models import resnet
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn import functional as F

from featinv_nodes.core.prediction import without_autocast


@cache
def has_kernels(device: torch.device) -> bool:
    """Whether Triton is there, which not every system with CUDA has, and makes code for the device."""
    new_enough = torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (7, 0)
    return find_spec("triton") is not None and new_enough


def fusible(x: Tensor) -> bool:
    """Whether the kernels take a tensor. A compiler makes its own."""
    return not torch.compiler.is_compiling() and x.is_cuda and has_kernels(x.device)


class ChannelsLastGroupNorm(nn.GroupNorm):
    """nn.GroupNorm whose result has the dtype and layout of maps [B, C, H, W] in channels_last on a CUDA device, under
    autocast too; for everything else nn.GroupNorm itself."""

    def forward(self, x: Tensor, silu: bool = False) -> Tensor:
        """silu: followed by SiLU, in one kernel."""
        laid_out = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and self.affine
        if not (laid_out and fusible(x)):
            y = super().forward(x)
            return F.silu(y) if silu else y
        from .group_norm_kernels import GroupNormFunction

        return GroupNormFunction.apply(x, self.weight, self.bias, self.num_groups, self.eps, silu)


class SameDtypeLayerNorm(nn.LayerNorm):
    """nn.LayerNorm whose result has its input's dtype, under autocast too."""

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x.device.type):
            return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)

    @staticmethod
    def fits(layer: nn.LayerNorm) -> bool:
        return layer.elementwise_affine and layer.bias is not None


class PointwiseConv(nn.Conv2d):
    """A 1 x 1 convolution of maps in channels_last as a matrix product, which adds the bias by itself."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or not x.is_contiguous(memory_format=torch.channels_last):
            return super().forward(x)
        return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)

    @staticmethod
    def fits(layer: nn.Conv2d) -> bool:
        return layer.kernel_size == layer.stride == (1, 1) and layer.padding == (0, 0) and layer.groups == 1


def geglu(x: Tensor) -> Tensor:
    """value * gelu(gate) [..., D] of x [..., 2 D], whose first half is value."""
    if not fusible(x):
        value, gate = x.chunk(2, -1)
        return value * F.gelu(gate)
    from .geglu_kernels import GegluFunction

    return GegluFunction.apply(x)


class FusedGEGLU(GEGLU):
    """GEGLU in one kernel on a CUDA device."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return geglu(self.proj(hidden_states))


class ResnetBlock2D(resnet.ResnetBlock2D):
    """Diffusers' block as Stable Diffusion has it: without scaling, its time embedding added if it has one. FSDP's
    configuration finds it by its name."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None) -> Tensor:
        x = F.conv2d(self.norm1(input_tensor, silu=True), self.conv1.weight, None, padding=1)
        shift = self.conv1.bias  # which torch adds by itself, too: with the time embedding it does so once
        if self.time_emb_proj is not None:
            shift = shift + self.time_emb_proj(self.nonlinearity(temb))  # [B, C]
        x = x + shift.to(x.dtype)[..., None, None]
        x = self.conv2(self.norm2(x, silu=True))
        return x + (input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor))

    @staticmethod
    def fits(block: resnet.ResnetBlock2D) -> bool:
        same_size = block.upsample is None and block.downsample is None
        added = block.time_embedding_norm == "default" or block.time_emb_proj is None
        return (
            same_size and added and not block.skip_time_act and block.output_scale_factor == 1 and not block.dropout.p
        )


class ChannelsLastTransformer(Transformer2DModel):
    """Transformer2DModel whose tokens become a map again as a view."""

    def _get_output_for_continuous_inputs(
        self, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
    ) -> Tensor:
        if self.use_linear_projection:
            hidden_states = self.proj_out(hidden_states)
        maps = hidden_states.unflatten(1, (height, width)).permute(0, 3, 1, 2)
        return residual + (maps if self.use_linear_projection else self.proj_out(maps))


class ChannelsLastUpsample(Upsample2D):
    """Upsample2D as Stable Diffusion has it: nearest neighbours, then a convolution."""

    def forward(self, hidden_states: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
        if 4 * hidden_states.numel() >= 2**31:  # more than torch's kernel for this layout can count
            return super().forward(hidden_states, output_size)
        scale = 2.0 if output_size is None else None
        return self.conv(F.interpolate(hidden_states, output_size, scale, mode="nearest"))

    @staticmethod
    def fits(block: Upsample2D) -> bool:
        return block.interpolate and block.norm is None and block.use_conv and block.name == "conv"


class PlainAttention:
    """Diffusers' attention processor of a transformer block: no mask, no division by one. Queries, keys and values are
    views of what the projections wrote."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        projected = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in projected)
        return attn.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    @staticmethod
    def fits(attn: Attention) -> bool:
        normed = (attn.group_norm, attn.spatial_norm, attn.norm_q, attn.norm_k, attn.norm_cross)
        plain = not any(normed) and not attn.residual_connection and attn.rescale_output_factor == 1
        return plain and not attn.to_out[1].p


#: diffusers' class -> what takes its place
BLOCKS = {
    nn.GroupNorm: ChannelsLastGroupNorm,
    nn.LayerNorm: SameDtypeLayerNorm,
    nn.Conv2d: PointwiseConv,
    GEGLU: FusedGEGLU,
    resnet.ResnetBlock2D: ResnetBlock2D,
    Transformer2DModel: ChannelsLastTransformer,
    Upsample2D: ChannelsLastUpsample,
}


def keep_channels_last(model: nn.Module) -> None:
    """Takes the blocks of this file into a model, in place, with its weights and their names."""
    for part in model.modules():
        block = BLOCKS.get(type(part))
        if block and getattr(block, "fits", lambda part: True)(part):
            part.__class__ = block
        elif type(part) is Attention and PlainAttention.fits(part):
            part.set_processor(PlainAttention())


def move(
    model: nn.Module,
    device: torch.device | str,
    memory_format: torch.memory_format = torch.channels_last,
) -> None:
    """model.to(...), in place, and the blocks of this file on a CUDA device."""
    model.to(device, memory_format=memory_format)
    if torch.device(device).type == "cuda":
        keep_channels_last(model)
