"""The drawn world is deterministic, labelled truly, and its two splits never meet."""

import pytest
import torch

from featinv_nodes.worlds.drawn.scenes import GROUPS, PALETTE, _uniforms, draw
from featinv_nodes.worlds.drawn.shapes import SHAPES, signed_distance


def test_a_scene_depends_on_seed_and_index_alone():
    alone, among = draw(3, torch.tensor([11])), draw(3, torch.tensor([7, 11, 2]))
    assert torch.equal(alone.image[0], among.image[1]) and alone.shape[0].tolist() == among.shape[1].tolist()
    assert not torch.equal(alone.image, draw(4, torch.tensor([11])).image)
    assert not torch.equal(alone.image, draw(3, torch.tensor([11]), "held-out").image)
    with pytest.raises(ValueError, match="held-out"):
        draw(0, torch.tensor([0]), "test")


def test_splits_share_no_scene_for_any_seed():
    rows = {
        s: {tuple(r) for seed in range(4) for r in _uniforms(seed, torch.arange(5000), s)[:, :6].tolist()}
        for s in (0, 1)
    }
    assert len(rows[0]) == len(rows[1]) == 20_000 and not rows[0] & rows[1]


def test_uniforms_are_uniform_and_independent():
    u = _uniforms(0, torch.arange(20_000), 0)
    # standard deviation of a mean of 20,000 uniforms is 0.002; of a correlation 0.007
    assert (u.mean(0) - 0.5).abs().max() < 0.01
    assert (torch.corrcoef(u.T) - torch.eye(u.shape[1])).abs().max() < 0.035


def test_labels_counts_and_targets():
    scenes = draw(0, torch.arange(2000))
    assert 0.15 < (scenes.count == 2).float().mean() < 0.25
    assert ((scenes.shape[:, 1] == -1) == (scenes.count == 1)).all()
    for name, classes in GROUPS.items():
        label = getattr(scenes, name).reshape(2000, -1)[:, 0]
        assert set(label.tolist()) == set(range(len(classes)))
    start = 0
    for classes in GROUPS.values():
        assert torch.allclose(scenes.targets()[:, start : start + len(classes)].sum(1), torch.ones(2000))
        start += len(classes)


def test_objects_are_at_least_two_cells_wide_and_apart():
    masks = draw(0, torch.arange(1000)).masks
    present = masks.sum((2, 3)) > 0
    wide = (masks.amax(2) > 0.5).sum(2)
    tall = (masks.amax(3) > 0.5).sum(2)
    assert torch.maximum(wide, tall)[present].min() >= 16  # a feature cell is 8 pixels
    assert (masks[:, 0] * masks[:, 1]).max() == 0


def test_plain_object_shows_its_colour_inside_its_mask():
    scenes = draw(0, torch.arange(500))
    plain = ((scenes.texture[:, 0] == 0) & (scenes.count == 1)).nonzero()[:, 0]
    colours = torch.tensor(list(PALETTE.values()))
    for i in plain[:50].tolist():
        inner = torch.nn.functional.max_pool2d(1 - scenes.masks[i, :1], 7, 1, 3)[0] == 0  # away from the rim
        if inner.any():
            seen = scenes.image[i][:, inner].mean(1)
            assert (colours - seen).norm(dim=1).argmin() == scenes.colour[i, 0]


def test_signed_distance_matches_its_zero_line():
    """The distance changes sign where the filled shape ends, with slope one across it."""
    axis = torch.linspace(-1.5, 1.5, 301)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    for number in range(len(SHAPES)):
        d = signed_distance(torch.tensor([number]), x[None], y[None])[0]
        assert d[150, 0] > 0 and (d < 0).sum() > 5000
        slope = torch.hypot(*torch.gradient(d, spacing=0.01))
        assert 0.9 < slope[d.abs() < 0.05].median() < 1.1
