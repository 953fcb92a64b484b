"""A small checkpoint of the paper's own code at random weights, and that code's forward pass."""

import math

import torch
from torch.nn import functional as F

from training import convert

BACKBONE = "resnet10t"
CHANNELS, HIDDEN, CONTEXT, HEADS = 64, 24, 48, 8  # layer1 of that backbone has 64 channels
WIDTHS = (32, 64, 128, 128)
ARGUMENTS = ["--backbone", BACKBONE, "--layer", "layer1"]


def official_layout(widths, context, channels, hidden, latents=4):
    """{name: shape} of the official ControlNet: SD 1.x's levels of two blocks, attention in all but the last."""
    shapes = {}

    def layer(name, *shape):
        shapes[f"control_model.{name}.weight"], shapes[f"control_model.{name}.bias"] = shape, shape[:1]

    def residual(name, before, after):
        layer(f"{name}.in_layers.0", before)
        layer(f"{name}.in_layers.2", after, before, 3, 3)
        layer(f"{name}.emb_layers.1", after, widths[0] * 4)
        layer(f"{name}.out_layers.0", after)
        layer(f"{name}.out_layers.3", after, after, 3, 3)
        if before != after:
            layer(f"{name}.skip_connection", after, before, 1, 1)

    def transformer(name, width):
        layer(f"{name}.norm", width)
        layer(f"{name}.proj_in", width, width, 1, 1)
        block = f"{name}.transformer_blocks.0"
        for attention, other in (("attn1", width), ("attn2", context)):
            for part, size in (("to_q", width), ("to_k", other), ("to_v", other)):
                shapes[f"control_model.{block}.{attention}.{part}.weight"] = (width, size)
            layer(f"{block}.{attention}.to_out.0", width, width)
        layer(f"{block}.ff.net.0.proj", width * 8, width)
        layer(f"{block}.ff.net.2", width, width * 4)
        for norm in ("norm1", "norm2", "norm3"):
            layer(f"{block}.{norm}", width)
        layer(f"{name}.proj_out", width, width, 1, 1)

    layer("time_embed.0", widths[0] * 4, widths[0])
    layer("time_embed.2", widths[0] * 4, widths[0] * 4)
    layer("input_blocks.0.0", widths[0], latents, 3, 3)
    out, before, number = [widths[0]], widths[0], 1
    for level, width in enumerate(widths):
        for _ in range(2):
            residual(f"input_blocks.{number}.0", before, width)
            if level < len(widths) - 1:
                transformer(f"input_blocks.{number}.1", width)
            out, before, number = [*out, width], width, number + 1
        if level < len(widths) - 1:
            layer(f"input_blocks.{number}.0.op", width, width, 3, 3)
            out, number = [*out, width], number + 1
    for number, width in enumerate(out):
        layer(f"zero_convs.{number}.0", width, width, 1, 1)
    residual("middle_block.0", before, before)
    transformer("middle_block.1", before)
    residual("middle_block.2", before, before)
    layer("middle_block_out.0", before, before, 1, 1)
    for number, sizes in ((1, (hidden, channels)), (3, (hidden, hidden)), (5, (widths[0], hidden))):
        layer(f"input_hint_block.block.{number}", *sizes, 3, 3)
    return shapes


def random_tensor(name, shape):
    if len(shape) > 1:
        return torch.randn(shape) / math.sqrt(math.prod(shape[1:]))
    return torch.randn(shape) * 0.2 + (1 if name.endswith("weight") else 0)


class Reference:
    """The forward pass of the official code, ldm's ControlNet with the feature encoder, on its state dict."""

    def __init__(self, state):
        self.state = {k.removeprefix("control_model."): v for k, v in state.items()}

    def pair(self, name):
        return self.state[f"{name}.weight"], self.state.get(f"{name}.bias")

    def conv(self, name, x, stride=1):
        return F.conv2d(x, *self.pair(name), stride, padding=self.state[f"{name}.weight"].shape[-1] // 2)

    def linear(self, name, x):
        return F.linear(x, *self.pair(name))

    def norm(self, name, x, eps=1e-5):
        return (
            F.group_norm(x, 32, *self.pair(name), eps)
            if x.ndim == 4
            else F.layer_norm(x, x.shape[-1:], *self.pair(name))
        )

    def residual(self, name, x, emb):
        h = self.conv(f"{name}.in_layers.2", F.silu(self.norm(f"{name}.in_layers.0", x)))
        h = h + self.linear(f"{name}.emb_layers.1", F.silu(emb))[:, :, None, None]
        h = self.conv(f"{name}.out_layers.3", F.silu(self.norm(f"{name}.out_layers.0", h)))
        return h + (self.conv(f"{name}.skip_connection", x) if f"{name}.skip_connection.weight" in self.state else x)

    def attention(self, name, x, context):
        q, k, v = (
            self.linear(f"{name}.{part}", y).unflatten(2, (HEADS, -1))
            for part, y in (("to_q", x), ("to_k", context), ("to_v", context))
        )
        weights = torch.einsum("bihd,bjhd->bhij", q, k).div(math.sqrt(q.shape[-1])).softmax(-1)
        return self.linear(f"{name}.to_out.0", torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2))

    def transformer(self, name, x, context):
        h = self.conv(f"{name}.proj_in", self.norm(f"{name}.norm", x, 1e-6)).flatten(2).transpose(1, 2)
        block = f"{name}.transformer_blocks.0"
        own = self.norm(f"{block}.norm1", h)
        h = h + self.attention(f"{block}.attn1", own, own)
        h = h + self.attention(f"{block}.attn2", self.norm(f"{block}.norm2", h), context)
        value, gate = self.linear(f"{block}.ff.net.0.proj", self.norm(f"{block}.norm3", h)).chunk(2, -1)
        h = h + self.linear(f"{block}.ff.net.2", value * F.gelu(gate))
        return x + self.conv(f"{name}.proj_out", h.transpose(1, 2).unflatten(2, x.shape[2:]))

    def hint(self, features, size):
        x = F.interpolate(features, size, mode="bilinear")
        x = F.silu(self.conv("input_hint_block.block.1", x))
        x = F.silu(self.conv("input_hint_block.block.3", x))
        return self.conv("input_hint_block.block.5", x)

    def block(self, name, x, emb, context):
        if f"{name}.0.op.weight" in self.state:
            return self.conv(f"{name}.0.op", x, stride=2)
        x = self.residual(f"{name}.0", x, emb)
        return self.transformer(f"{name}.1", x, context) if f"{name}.1.norm.weight" in self.state else x

    def __call__(self, x, t, context, features):
        width = self.state["time_embed.0.weight"].shape[1]
        angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(width // 2) / (width // 2))
        emb = torch.cat([angles.cos(), angles.sin()], 1)
        emb = self.linear("time_embed.2", F.silu(self.linear("time_embed.0", emb)))
        h, out = self.conv("input_blocks.0.0", x) + self.hint(features, x.shape[2:]), []
        for number in range(12):
            h = h if number == 0 else self.block(f"input_blocks.{number}", h, emb, context)
            out.append(self.conv(f"zero_convs.{number}.0", h))
        h = self.residual("middle_block.2", self.block("middle_block", h, emb, context), emb)
        return [*out, self.conv("middle_block_out.0", h)]


def random_state():
    torch.manual_seed(0)
    return {k: random_tensor(k, s) for k, s in official_layout(WIDTHS, CONTEXT, CHANNELS, HIDDEN).items()}


def save_checkpoint(state, file):
    """As Lightning writes it: the other models and the optimizer's state are in there too."""
    others = {
        "model.diffusion_model.input_blocks.0.0.weight": torch.randn(4, 4),
        "first_stage_model.a": torch.randn(4),
        "cond_stage_model.b": torch.zeros(4, dtype=torch.long),
        "betas": torch.rand(10),
    }
    optimizer = [{"state": {0: {"step": 5, "exp_avg": torch.randn(4)}}, "param_groups": [{"lr": 1e-5}]}]
    torch.save(
        {"state_dict": others | state, "optimizer_states": optimizer, "callbacks": {"ModelCheckpoint": {"best": None}}},
        file,
    )
    return file


def convert_here(checkpoint):
    """The checkpoint as a weights file beside it."""
    file = checkpoint.with_name("ours.safetensors")
    convert.main([str(checkpoint), str(file), *ARGUMENTS])
    return file
