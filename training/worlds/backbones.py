"""The two backbones of the drawn world: ordinary timm models, trained on what is in a scene."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from featinv_nodes.worlds.drawn.scenes import GROUPS, SIZE, Scenes, draw

from .loop import train_stage

CLASSES = [f"{group}: {name}" for group, names in GROUPS.items() for name in names]
TAG = "tiny_world"
MEAN = STD = (0.5, 0.5, 0.5)
#: timm architecture and its arguments. Both give an 8 x 8 grid of 128 channels at the last layer.
SPECS = {
    "cnn": ("resnet10t", {"channels": [32, 64, 96, 128], "stem_width": 16, "output_stride": 8}),
    "vit": (
        "vit_tiny_patch16_224",
        {
            "img_size": SIZE,
            "patch_size": 8,
            "embed_dim": 128,
            "depth": 4,
            "num_heads": 4,
            "mlp_ratio": 3.0,
            "global_pool": "avg",
            "class_token": True,
        },
    ),
}
DISTIL_FROM = 113_568  # pictures seen before the CNN's features join the transformer's loss
#: pictures seen, batch, peak learning rate
RECIPES = {"cnn": (320_000, 64, 4e-3), "vit": (600_000, 32, 1e-3)}


def build(kind: str) -> nn.Module:
    """The untrained timm model of `kind` ("cnn" or "vit") with one logit per class of every label group."""
    architecture, arguments = SPECS[kind]
    return timm.create_model(architecture, pretrained=False, num_classes=len(CLASSES), **arguments)


def normalise(image: Tensor) -> Tensor:
    return (image - MEAN[0]) / STD[0]


def group_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy per label group, summed: logits and targets [..., 28]; all-zero targets do not count."""
    sizes = [len(names) for names in GROUPS.values()]
    losses = 0.0
    for z, t in zip(logits.float().split(sizes, -1), targets.split(sizes, -1)):
        known = t.sum(-1) > 0
        losses = losses + F.cross_entropy(z[known], t[known])
    return losses


def token_targets(scenes: Scenes) -> Tensor:
    """[B, 64, 28] what each of the 8 x 8 cells shows (token labelling, Jiang et al. 2021).

    Object classes where an object covers at least a fifth of the cell, zeros elsewhere; the background
    class where it covers at least a fifth.
    """
    cover = F.avg_pool2d(scenes.masks, SIZE // 8).flatten(2)  # [B, 2, 64]
    top, slot = cover.max(1)  # [B, 64]
    parts = []
    for name, names in GROUPS.items():
        label = getattr(scenes, name)
        label = label[:, None].expand(-1, 64) if label.ndim == 1 else label.gather(1, slot)
        visible = (1 - cover.sum(1) >= 0.2) if name == "background" else (top >= 0.2)
        parts.append(F.one_hot(label.clamp(min=0), len(names)) * visible[..., None])
    return torch.cat(parts, -1).float()


def train_cnn(work: Path, device: str = "cpu", seed: int = 0) -> nn.Module:
    """Trains the CNN on training scenes drawn on the fly; returns its moving average."""
    torch.manual_seed(seed)
    images, batch, lr = RECIPES["cnn"]
    model = build("cnn").to(device, memory_format=torch.channels_last)

    def loss_of(indices: Tensor) -> Tensor:
        scenes = draw(seed, indices)
        with torch.autocast(device, torch.bfloat16):
            logits = model(normalise(scenes.image).to(memory_format=torch.channels_last))
        return group_losses(logits, scenes.targets())

    return train_stage("backbone_cnn", model, loss_of, images=images, batch=batch, lr=lr, work=work, device=device)


class Student(nn.Module):
    """The transformer and a linear map from its tokens to the CNN's feature vectors, dropped after training."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.vit, self.project = vit, nn.Linear(128, 128)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> logits [B, 28], logits per cell [B, 64, 28], projected tokens [B, 64, 128]."""
        tokens = self.vit.forward_features(x)
        cells = tokens[:, self.vit.num_prefix_tokens :]
        return self.vit.forward_head(tokens), self.vit.head(self.vit.fc_norm(cells)), self.project(cells)


def train_vit(work: Path, cnn: nn.Module, device: str = "cpu", seed: int = 0) -> nn.Module:
    """Trains the transformer: labels of the scene and of each cell, then the CNN's feature vectors as well (a small
    transformer learns shapes slowly from labels alone). Returns its moving average."""
    torch.manual_seed(seed)
    images, batch, lr = RECIPES["vit"]
    model, cnn = Student(build("vit")).to(device), cnn.eval().to(device, memory_format=torch.channels_last)

    def loss_of(indices: Tensor) -> Tensor:
        scenes = draw(seed, indices)
        x = normalise(scenes.image).to(memory_format=torch.channels_last)
        with torch.autocast(device, torch.bfloat16):
            logits, cells, vectors = model(x)
            with torch.no_grad():
                target = rearrange(cnn.forward_features(x), "b c h w -> b (h w) c")
        loss = group_losses(logits, scenes.targets()) + group_losses(cells, token_targets(scenes))
        if indices[0] >= DISTIL_FROM:
            loss = loss + 4 * (1 - F.cosine_similarity(vectors.float(), target.float(), dim=-1).mean())
        return loss

    return train_stage("backbone_vit", model, loss_of, images=images, batch=batch, lr=lr, work=work, device=device).vit


@torch.inference_mode()
def accuracy(model: nn.Module, count: int = 2000, seed: int = 0) -> dict[str, float]:
    """Share of held-out single-object scenes whose top class is right, per label group."""
    right, total = dict.fromkeys(GROUPS, 0), 0
    for start in range(0, count, 100):
        scenes = draw(seed, torch.arange(start, start + 100), "held-out")
        single = scenes.count == 1
        logits = model(normalise(scenes.image)).split([len(names) for names in GROUPS.values()], 1)
        for (name, _), z in zip(GROUPS.items(), logits):
            label = getattr(scenes, name).reshape(100, -1)[:, 0]
            right[name] += (z.argmax(1) == label)[single].sum().item()
        total += single.sum().item()
    return {name: value / total for name, value in right.items()}
