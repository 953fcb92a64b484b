"""The drawn world: drawn scenes with known objects, masks and labels.

A scene is one object (four times in five) or two on one of six backgrounds, 64 pixels wide. It is a
pure function of (seed, split, index), drawn on the fly and in batches by signed distances; there is
no file and no state. Training and held-out scenes come from disjoint sets of random keys (the lowest
bit of a key is its split), so no index and no seed can make them overlap.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import pi

import torch
from torch import Tensor

from .shapes import SHAPES, signed_distance

SIZE = 64
TEXTURES = ("plain", "striped", "checked", "dotted")
PALETTE = {
    "red": (0.86, 0.14, 0.14),
    "orange": (0.98, 0.55, 0.08),
    "yellow": (0.98, 0.90, 0.16),
    "green": (0.10, 0.62, 0.20),
    "blue": (0.12, 0.25, 0.85),
    "purple": (0.52, 0.16, 0.70),
    "pink": (0.98, 0.55, 0.75),
    "white": (0.97, 0.97, 0.97),
}
COLOURS = tuple(PALETTE)
BACKGROUNDS = ("sky", "night", "grass", "water", "sand", "bricks")
#: The label groups in the order of a tiny backbone's logits, with the names of their classes.
GROUPS = {"shape": SHAPES, "texture": TEXTURES, "colour": COLOURS, "background": BACKGROUNDS}
SPLITS = ("train", "held-out")

_GOLDEN = -7046029254386353131  # 2^64 / golden ratio, the increment of splitmix64
_FIELDS_PER_OBJECT, _SCENE_FIELDS = 10, 40


@dataclass
class Scenes:
    """A batch of scenes.

    image: [B, 3, 64, 64] in 0..1. masks: [B, 2, 64, 64] in 0..1, coverage of each object (zero for an
    absent second one). shape, texture, colour: [B, 2] class numbers, -1 for an absent object.
    background: [B]. count: [B], 1 or 2. centre: [B, 2, 2] object centres (x, y) in pixels.
    """

    image: Tensor
    masks: Tensor
    shape: Tensor
    texture: Tensor
    colour: Tensor
    background: Tensor
    count: Tensor
    centre: Tensor

    def targets(self) -> Tensor:
        """[B, 28] probabilities, one distribution per label group; two objects share theirs equally."""
        parts = []
        for name, classes in GROUPS.items():
            label = getattr(self, name).reshape(len(self.count), -1)  # [B, 1 or 2]
            hot = torch.nn.functional.one_hot(label.clamp(min=0), len(classes)) * (label >= 0)[..., None]
            parts.append(hot.sum(1) / (label >= 0).sum(1, keepdim=True))
        return torch.cat(parts, 1)


def draw(seed: int, indices: Tensor, split: str = "train") -> Scenes:
    """Draws the scenes of `indices` ([B], int64, any non-negative numbers) of a split, on the device of `indices`.

    The same (seed, split, index) gives the same scene in any batch. Raises ValueError for an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: expected one of {SPLITS}")
    with indices.device:
        return _draw(seed, indices, split)


def _draw(seed: int, indices: Tensor, split: str) -> Scenes:
    batch = len(indices)
    u = _uniforms(seed, indices, SPLITS.index(split))
    two = u[:, 0] < 0.2
    background = _pick(u[:, 1], len(BACKGROUNDS))
    image = _backgrounds(background, u[:, 2:20])
    masks = torch.zeros(batch, 2, SIZE, SIZE)
    labels = torch.full((3, batch, 2), -1, dtype=torch.long)
    centre = torch.zeros(batch, 2, 2)
    for slot in range(2):
        here = torch.arange(batch) if slot == 0 else two.nonzero()[:, 0]
        if not len(here):
            continue
        o = u[here, 20 + slot * _FIELDS_PER_OBJECT :][:, :_FIELDS_PER_OBJECT]
        radius, centre[here, slot] = _place(o, two[here], slot, u[here, 19])
        own = torch.stack([_pick(o[:, i], len(names)) for i, names in enumerate((SHAPES, TEXTURES, COLOURS))])
        labels[:, here, slot] = own
        image[here], masks[here, slot] = _paint_object(image[here], o, own, radius, centre[here, slot])
    image = (image * (0.94 + 0.12 * u[:, 18, None, None, None])).clamp(0, 1)
    return Scenes(image, masks, *labels, background, 1 + two.long(), centre)


def _uniforms(seed: int, indices: Tensor, split_bit: int) -> Tensor:
    """[B, 40] uniform numbers in 0..1 per scene: splitmix64 in counter mode."""
    key = _mix(_mix(torch.tensor(seed, dtype=torch.int64)) + indices.long() * _GOLDEN)
    key = (key & ~1) | split_bit
    bits = _mix(_mix(key)[:, None] + torch.arange(1, _SCENE_FIELDS + 1) * _GOLDEN)
    return ((bits >> 40) & 0xFFFFFF).float() / 2**24


def _mix(z: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014), a bijection of 64-bit integers."""
    z = (z ^ (z >> 30 & 0x3FFFFFFFF)) * -4658895280553007687
    z = (z ^ (z >> 27 & 0x1FFFFFFFFF)) * -7723592293110705685
    return z ^ (z >> 31 & 0x1FFFFFFFF)


def _pick(u: Tensor, count: int) -> Tensor:
    return (u * count).long().clamp(max=count - 1)


def _place(o: Tensor, two: Tensor, slot: int, split_axis: Tensor) -> tuple[Tensor, Tensor]:
    """Radius [N] and centre [N, 2] in pixels; two objects take a half of the picture each."""
    radius = torch.where(two, 10 + 4 * o[:, 3], 14 + 7 * o[:, 3])
    low = radius + 1
    along = low + o[:, 4] * (SIZE - 2 * low)
    half = SIZE / 2
    within = slot * half + low + o[:, 5] * (half - 2 * low)
    x = torch.where(two & (split_axis < 0.5), within, along)
    y = torch.where(two & (split_axis >= 0.5), within, low + o[:, 5] * (SIZE - 2 * low))
    # the free axis of a pair is drawn from the field that the split axis does not use
    y = torch.where(two & (split_axis < 0.5), low + o[:, 4] * (SIZE - 2 * low), y)
    return radius, torch.stack([x, y], 1)


def _grid() -> tuple[Tensor, Tensor]:
    centre = torch.arange(SIZE) + 0.5
    return centre[None, None, :], centre[None, :, None]  # x [1, 1, W], y [1, H, 1]


def _paint_object(image: Tensor, o: Tensor, labels: Tensor, radius: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Paints one object per picture: a filled shape with a dark rim of two pixels; returns (image, mask).

    o: [N, 10] random numbers. labels: [3, N] shape, texture and colour. radius [N] and centre [N, 2] in pixels.
    """
    shape, texture, colour = labels
    x, y = _grid()
    dx, dy = x - centre[:, 0, None, None], y - centre[:, 1, None, None]
    tilt = ((o[:, 6] - 0.5) * pi / 6)[:, None, None]  # up to 15 degrees either way
    px = (dx * tilt.cos() + dy * tilt.sin()) / radius[:, None, None]
    py = (dy * tilt.cos() - dx * tilt.sin()) / radius[:, None, None]
    distance = signed_distance(shape, px, py) * radius[:, None, None]  # pixels, negative inside
    mask = (0.5 - distance).clamp(0, 1)
    rim = (distance + 2).clamp(0, 1)
    first = torch.tensor(list(PALETTE.values()))[colour][:, :, None, None]
    second = first * 0.42 + 0.02
    mix = _texture(texture, px * radius[:, None, None], py * radius[:, None, None], o[:, 7], o[:, 8])[:, None]
    fill = first * (1 - mix) + second * mix
    fill = fill * (1 - rim[:, None]) + 0.07 * rim[:, None]
    return image * (1 - mask[:, None]) + fill * mask[:, None], mask


def _texture(texture: Tensor, x: Tensor, y: Tensor, phase: Tensor, turn: Tensor) -> Tensor:
    """[N, H, W] share of the second tone; periods of 8 to 10 pixels, anti-aliased edges."""
    shift = (phase * 10)[:, None, None]
    diagonal = (turn < 0.5)[:, None, None]
    along = torch.where(diagonal, (x + y) * 0.7071, x) + shift
    wave_x, wave_y = torch.sin(2 * pi * (x + shift) / 14), torch.sin(2 * pi * (y + shift) / 14)
    striped = (0.5 + 4 * torch.sin(2 * pi * along / 8)).clamp(0, 1)
    checked = (0.5 + 5 * wave_x * wave_y).clamp(0, 1)
    gx, gy = (x + shift) % 9 - 4.5, (y + shift) % 9 - 4.5
    dotted = (3.0 - (gx * gx + gy * gy).sqrt()).clamp(0, 1)
    stack = torch.stack([torch.zeros_like(x), striped, checked, dotted], 1)
    return stack.gather(1, texture[:, None, None, None].expand(-1, 1, SIZE, SIZE))[:, 0]


def _backgrounds(kind: Tensor, u: Tensor) -> Tensor:
    image = torch.empty(len(kind), 3, SIZE, SIZE)
    for number, paint in enumerate((_sky, _night, _grass, _water, _sand, _bricks)):
        here = (kind == number).nonzero()[:, 0]
        if len(here):
            image[here] = paint(u[here])
    return image


def _blend(a: tuple, b: tuple, share: Tensor) -> Tensor:
    """Colours a to b by a share [N, H, W] in 0..1 -> [N, 3, H, W]."""
    first, second = (torch.tensor(c)[None, :, None, None] for c in (a, b))
    return first + (second - first) * share.clamp(0, 1)[:, None]


def _blobs(u: Tensor, count: int, wide: float, high: float) -> Tensor:
    """[N, H, W] soft spots of the given half axes in pixels."""
    x, y = _grid()
    total = torch.zeros(len(u), SIZE, SIZE)
    for k in range(count):
        cx, cy = (u[:, 2 * k + i, None, None] * SIZE for i in (0, 1))
        total += torch.exp(-(((x - cx) / wide) ** 2) - ((y - cy) / high) ** 2)
    return total


def _sky(u: Tensor) -> Tensor:
    y = _grid()[1] / SIZE
    sky = _blend((0.36, 0.62, 0.93), (0.75, 0.88, 0.98), (y + 0 * u[:, :1, None]).expand(-1, SIZE, SIZE))
    cloud = (_blobs(u, 3, 13, 5) * 0.95).clamp(0, 1)[:, None]
    return sky * (1 - cloud) + 0.98 * cloud


def _night(u: Tensor) -> Tensor:
    y = _grid()[1] / SIZE
    night = _blend((0.03, 0.04, 0.14), (0.15, 0.10, 0.32), (y + 0 * u[:, :1, None]).expand(-1, SIZE, SIZE))
    return (night + 0.9 * _blobs(u, 7, 1.5, 1.5)[:, None]).clamp(0, 1)


def _grass(u: Tensor) -> Tensor:
    x, y = _grid()
    a, b, c = (u[:, i, None, None] * 2 * pi for i in range(3))
    blades = torch.sin(x * 0.9 + 1.3 * torch.sin(y * 0.35 + a) + b)
    return _blend((0.28, 0.50, 0.12), (0.55, 0.75, 0.25), 0.5 + 0.35 * blades + 0.2 * torch.sin(y * 0.12 + c))


def _water(u: Tensor) -> Tensor:
    x, y = _grid()
    a, b = (u[:, i, None, None] * 2 * pi for i in range(2))
    waves = torch.sin(y * 0.62 + 1.2 * torch.sin(x * 0.22 + a) + b)
    return _blend((0.05, 0.38, 0.50), (0.35, 0.78, 0.80), 0.5 + 0.45 * waves)


def _sand(u: Tensor) -> Tensor:
    x, y = _grid()
    a, b, tilt = u[:, 0, None, None] * 2 * pi, u[:, 1, None, None] * 2 * pi, 0.1 + 0.15 * u[:, 2, None, None]
    dunes = torch.sin(y * 0.28 + x * tilt + 0.8 * torch.sin(x * 0.13 + a) + b)
    return _blend((0.78, 0.66, 0.46), (0.94, 0.86, 0.68), 0.5 + 0.4 * dunes)


def _bricks(u: Tensor) -> Tensor:
    x, y = _grid()
    sx, sy = (u[:, i, None, None] * 24 for i in range(2))
    row = ((y + sy) / 10).floor()
    edge_y = ((y + sy) % 10 - 5).abs()
    edge_x = ((x + sx + row * 10) % 20 - 10).abs()
    mortar = torch.maximum((edge_y - 3.8).clamp(0, 1), (edge_x - 8.8).clamp(0, 1))
    return _blend((0.60, 0.30, 0.22), (0.80, 0.76, 0.70), mortar)
