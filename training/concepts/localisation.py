"""Where is a concept? Heat maps by other methods than FeatInv-Viz, and how well a heat map finds a true mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from featinv_nodes.core.backbones import Backbone
from featinv_nodes.core.concepts import Concepts
from featinv_nodes.core.feature_map import FeatureMap
from featinv_nodes.core.viz import THRESHOLD, normalised

TOLERANCE = 2  # pixels, of the boundary
PATCH, STRIDE = 12, 4  # occlusion, in pixels of a 64 pixel picture
RADIUS, SMOOTHING = 6, 1e-3  # guided filter
STEPS = 16  # of the deletion and insertion curves


def activation(concepts: Concepts, name: str, features: FeatureMap, size: Sequence[int]) -> Tensor:
    """[H, W] |phi_c| of one map, bilinearly enlarged (paper Appendix D): the map that FeatInv-Viz is to refine."""
    return F.interpolate(concepts.part(features, name).norm(dim=1, keepdim=True), tuple(size), mode="bilinear")[0, 0]


def guided(heat: Tensor, picture: Tensor) -> Tensor:
    """[H, W] a heat map drawn to the edges of the picture [3, H, W] in grey: He et al. 2013, guided filter."""
    side = 2 * RADIUS + 1

    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x[None, None], side, 1, RADIUS, count_include_pad=False)[0, 0]

    guide = picture.mean(0)
    slope = (mean(guide * heat) - mean(guide) * mean(heat)) / (mean(guide * guide) - mean(guide).square() + SMOOTHING)
    return mean(slope) * guide + mean(mean(heat) - slope * mean(guide))


def grad_cam(backbone: Backbone, features: FeatureMap, logit: int, size: Sequence[int]) -> Tensor:
    """[H, W] Selvaraju et al. 2017 at the last layer, for one logit of one map, bilinearly enlarged."""
    values = features.values.detach().clone().requires_grad_(True)
    with torch.enable_grad():
        backbone.logits(FeatureMap(values, features.source, features.prefix))[0, logit].backward()
    weights = values.grad.mean((2, 3), keepdim=True)
    return F.interpolate((weights * values.detach()).sum(1, keepdim=True).relu(), tuple(size), mode="bilinear")[0, 0]


def occlusion(backbone: Backbone, concepts: Concepts, name: str, picture: Tensor, layer: str) -> Tensor:
    """[H, W] how much of the concept, summed |phi_c| of the map, is lost where a grey patch covers the picture
    [3, H, W] (Zeiler and Fergus 2014); each pixel the mean over the patches that cover it."""
    height, width = picture.shape[1:]
    tops = range(STRIDE - PATCH, height, STRIDE)
    lefts = range(STRIDE - PATCH, width, STRIDE)
    indices = torch.zeros(len(tops) * len(lefts), 1, height, width)
    for index, (top, left) in zip(indices, ((t, x) for t in tops for x in lefts)):
        index[:, max(top, 0) : top + PATCH, max(left, 0) : left + PATCH] = 1
    covered = torch.cat([picture[None], picture * (1 - indices) + picture.mean((1, 2), keepdim=True) * indices])
    amount = concepts.part(backbone.extract(covered, layer), name).norm(dim=1).sum((1, 2))
    lost = amount[0] - amount[1:]
    return (lost[:, None, None] * indices[:, 0]).sum(0) / indices[:, 0].sum(0).clamp(min=1)


def edges(picture: Tensor) -> Tensor:
    """[H, W] Sobel's gradient length of the picture [3, H, W] in grey: what any drawing of the outlines would get."""
    kernel = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]])
    padded = F.pad(picture.mean(0)[None, None], (1, 1, 1, 1), "replicate")
    return F.conv2d(padded, torch.stack([kernel, kernel.T])[:, None])[0].norm(dim=0)


def random_subspace(concepts: Concepts, name: str, seed: int) -> Concepts:
    """A concept of the same dimension at random, alone: what an edit of no meaning would show."""
    size = len(concepts.bases[concepts.index(name)])
    rows = torch.randn(concepts.source.channels, size, generator=torch.Generator().manual_seed(seed))
    return Concepts([torch.linalg.qr(rows)[0].T.contiguous()], ["random"], concepts.source)


def auroc(heat: Tensor, mask: Tensor) -> float:
    """Chance that a pixel of the mask is hotter than one outside, ties counting half; both [H, W], the mask bool."""
    _, index, count = heat.flatten().unique(return_inverse=True, return_counts=True)
    rank = (count.cumsum(0) - (count - 1) / 2.0)[index].double()
    inside = mask.flatten()
    positive, negative = inside.sum().double(), (~inside).sum().double()
    return float((rank[inside].sum() - positive * (positive + 1) / 2) / (positive * negative))


def iou(pred: Tensor, mask: Tensor) -> float:
    """Intersection over union of two bool masks [H, W]."""
    return float((pred & mask).sum() / (pred | mask).sum().clamp(min=1))


def boundary_f(pred: Tensor, mask: Tensor) -> float:
    """F score of the outlines of two bool masks [H, W]: pixels of either outline within TOLERANCE of the other
    (Martin et al. 2004, without their one-to-one matching). 0 if one has no outline."""
    own, true = _outline(pred), _outline(mask)
    near_own, near_true = (F.max_pool2d(x[None, None], 2 * TOLERANCE + 1, 1, TOLERANCE)[0, 0] for x in (own, true))
    precision = float((own * near_true).sum() / own.sum().clamp(min=1))
    recall = float((true * near_own).sum() / true.sum().clamp(min=1))
    return 2 * precision * recall / max(precision + recall, 1e-8)


def _outline(mask: Tensor) -> Tensor:
    """[H, W] 1.0 at pixels whose right or lower neighbour belongs to the other side."""
    edge = torch.zeros_like(mask)
    edge[:, :-1] |= mask[:, :-1] != mask[:, 1:]
    edge[:-1] |= mask[:-1] != mask[1:]
    return edge.float()


def deletion(
    backbone: Backbone, concepts: Concepts, name: str, picture: Tensor, heat: Tensor, layer: str
) -> tuple[float, float]:
    """(deletion, insertion), Petsiuk et al. 2018, with the concept's summed |phi_c| in place of a class probability:
    its mean share while the hottest pixels first are replaced by the mean colour (low is good) or put into a picture of
    the mean colour (high is good), 16 steps; shares are between that of the mean colour (0) and of the picture (1)."""
    order = heat.flatten().argsort(descending=True, stable=True).argsort().view_as(heat)
    shares = torch.linspace(0, 1, STEPS + 1)[:, None, None] * heat.numel()
    gone = (order < shares).float()[:, None]  # [17, 1, H, W]
    mean = picture.mean((1, 2), keepdim=True)
    both = torch.cat([picture * (1 - gone) + mean * gone, mean * (1 - gone) + picture * gone])
    amount = concepts.part(backbone.extract(both, layer), name).norm(dim=1).sum((1, 2))
    low, high = amount[STEPS], amount[0]
    share = ((amount - low) / (high - low).abs().clamp(min=1e-6) * (high - low).sign()).clamp(-1, 2)
    return float(share[: STEPS + 1].mean()), float(share[STEPS + 1 :].mean())


def measures(heat: Tensor, mask: Tensor, for_iou: float, for_boundary: float) -> dict[str, float]:
    """How well a heat map [H, W] finds a true mask [H, W] (bool). for_iou, for_boundary: thresholds of the normalised
    map, chosen elsewhere; 0.33 is the paper's."""
    scaled = normalised(heat)
    fixed = scaled >= THRESHOLD
    return {
        "AUROC": auroc(heat, mask),
        "pointing": float(mask.flatten()[heat.argmax()]),
        "IoU": iou(scaled >= for_iou, mask),
        "IoU at 0.33": iou(fixed, mask),
        "boundary F": boundary_f(scaled >= for_boundary, mask),
        "boundary F at 0.33": boundary_f(fixed, mask),
    }


def best_threshold(heats: Sequence[Tensor], masks: Sequence[Tensor], score: Callable[[Tensor, Tensor], float]) -> float:
    """The threshold of the normalised maps with the largest mean score(pred, mask)."""
    scaled = [normalised(h) for h in heats]
    tried = [i / 40 for i in range(1, 40)]
    return max(tried, key=lambda t: sum(score(h >= t, m) for h, m in zip(scaled, masks)))
