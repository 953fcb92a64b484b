"""The random crops and flips of training images (paper Sec. 2): as large, as placed and as turned as they are said
to be."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from training.config import DEFAULT, read_config
from training.data.loader import open_source, sides

SIDE, COUNT = 16, 600


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A folder with one square picture that says where its pixels are: red grows to the right, green downwards."""
    folder = tmp_path_factory.mktemp("places")
    ramp = torch.arange(256, dtype=torch.uint8).expand(256, 256)
    Image.fromarray(torch.stack([ramp, ramp.T, ramp * 0], 2).numpy()).save(folder / "places.png")
    return folder


def crops(folder, flips):
    """COUNT crops of the picture, one per epoch: left, top, right and bottom edge, [COUNT] each in 0..1, as shown: a
    picture that is turned has its left edge to the right."""
    source = open_source(read_config(DEFAULT, {"data": str(folder), "flips": flips}), {"pictures": SIDE})
    pictures = source.__getitems__(list(range(COUNT))).tensors["pictures"]
    red, green = pictures[:, 0, SIDE // 2], pictures[:, 1, :, SIDE // 2]  # [COUNT, SIDE]
    edges = []
    for line in (red, green):  # from pixels two from each end, which no filter bends, to the ends
        step = (line[:, -3] - line[:, 2]) / (SIDE - 5)
        edges.append((line[:, 2] - 2.5 * step, line[:, -3] + 2.5 * step))
    (left, right), (top, bottom) = edges
    return left, top, right, bottom


def test_areas_and_places_are_those_of_a_random_resized_crop(places):
    """8 to 100 % of the area, evenly but that ten tries are made of what does not fit, and anywhere in the picture."""
    left, top, right, bottom = crops(places, "none")
    width, height = right - left, bottom - top
    area, aspect = width * height, width / height
    assert 0.07 < area.min() < 0.12 and area.max() > 0.9  # the pictures' bytes give edges to 1 %
    below = (area < 0.5).float().mean().item()
    assert 0.4 < below < 0.62  # 0.46 before, and a little over a half after what does not fit is tried again
    assert 0.7 < aspect.min() < 0.8 and 1.25 < aspect.max() < 1.42
    for first, last in ((left, right), (top, bottom)):
        place = (first / (first + 1 - last).clamp(min=1e-3))[last - first < 0.8]  # 0 at one end, 1 at the other
        assert abs(place.mean() - 0.5) < 0.06 and place.min() < 0.1 and place.max() > 0.9


def test_crops_are_scaled_without_aliasing_and_a_panorama_gives_its_middle(tmp_path):
    """Squares of one pixel become grey; of 12 x 256 pixels no crop of 8 % of the area and a usual aspect can be had."""
    square = (torch.arange(256)[:, None] + torch.arange(256)) % 2 * 255
    ramp = torch.arange(256).expand(12, 256)
    for name, pixels in (("fine", square), ("long", ramp)):
        (tmp_path / name).mkdir()
        Image.fromarray(pixels.to(torch.uint8).numpy()).convert("RGB").save(tmp_path / name / "picture.png")
    fine, long = (
        open_source(read_config(DEFAULT, {"data": str(tmp_path / name), "flips": "none"}), {"pictures": SIDE})
        .__getitems__([0, 1, 2])
        .tensors["pictures"]
        for name in ("fine", "long")
    )
    assert (fine - 0.5).abs().max() < 0.1  # one pixel of a cell more or less on its edge
    assert long.mean((1, 2, 3)) == pytest.approx(0.5, abs=0.01) and (long.amax((1, 2, 3)) < 0.53).all()


def test_crops_have_the_longer_side_of_an_oblong_input():
    base, backbone = SimpleNamespace(resolution=64), SimpleNamespace(input_size=(64, 96))
    assert sides(base, backbone) == {"pictures": 96, "target": 64}


def test_another_seed_gives_another_order_and_other_crops(places, tmp_path):
    for name in "abcdefgh":
        shutil.copy(places / "places.png", tmp_path / f"{name}.png")

    def source(seed):
        return open_source(read_config(DEFAULT, {"data": str(tmp_path), "seed": seed}), {"pictures": SIDE})

    one, again, other = source("1"), source("1"), source("2")
    orders = [[s.entry(n) for n in range(8)] for s in (one, again, other)]
    assert orders[0] == orders[1] != orders[2]
    first, same, third = (s.render([(0, 0)])[0]["pictures"] for s in (one, again, other))
    assert torch.equal(first, same) and not torch.equal(first, third)


def test_a_photograph_is_turned_upright_before_it_is_cropped(tmp_path):
    """Its red grows to the right in the file, which says that it is to be seen a quarter turned: downwards."""
    exif = Image.Exif()
    exif[0x0112] = 6
    ramp = torch.arange(0, 200, 4, dtype=torch.uint8).expand(60, 50)
    Image.fromarray(torch.stack([ramp, ramp * 0, ramp * 0], 2).numpy()).save(tmp_path / "turned.png", exif=exif)
    source = open_source(read_config(DEFAULT, {"data": str(tmp_path), "flips": "none"}), {"pictures": SIDE})
    red = source.__getitems__([0, 1, 2]).tensors["pictures"][:, 0]
    assert (red[:, -1] > red[:, 0] + 0.1).all() and torch.allclose(red[:, :, -1], red[:, :, 0], atol=0.01)


@pytest.mark.parametrize(("flips", "across", "down"), [("none", 0, 0), ("horizontal", 0.5, 0), ("both", 0.5, 0.5)])
def test_half_of_the_pictures_are_turned_as_asked(places, flips, across, down):
    left, top, right, bottom = crops(places, flips)
    turned, upside_down = (right < left).float(), (bottom < top).float()
    error = 4 * (0.25 / COUNT) ** 0.5  # four standard errors, 0.08
    assert turned.mean().item() == pytest.approx(across, abs=error * bool(across))
    assert upside_down.mean().item() == pytest.approx(down, abs=error * bool(down))
    if down:
        assert (turned * upside_down).mean().item() == pytest.approx(0.25, abs=error)  # one says nothing of the other
