"""Programs about feature spaces: linear maps fitted to changes of images, and backbones ranked by what they keep."""

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageOps
from torch.nn import functional as F

from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.linear_map_files import load_linear_map
from featinv_nodes.worlds import open_backbone
from featinv_nodes.worlds.drawn.scenes import draw
from training import fit_linear_map, rank_backbones
from training.spaces.changes import change_of
from training.spaces.parts import split
from training.spaces.probe import SIDE, assembled, fit_probe, inputs, ssim, targets
from training.spaces.ranking import probed

PICTURES = draw(0, torch.arange(16), "held-out").image


def test_changes_do_what_their_names_say():
    assert torch.equal(change_of("channels:bgr")(PICTURES), PICTURES.flip(1))
    grey = change_of("grayscale")(PICTURES)
    assert torch.equal(grey[:, 0], grey[:, 2]) and grey.shape == PICTURES.shape
    red = torch.tensor([0.8, 0.1, 0.1])[None, :, None, None].expand(1, 3, 4, 4)
    assert torch.allclose(change_of("hue:120")(red), red.roll(1, 1), atol=1e-5)  # red to green; a round trip by HSV
    assert torch.allclose(change_of("hue:-240")(red), red.roll(1, 1), atol=1e-5)
    blurred = change_of("blur:3")(PICTURES)
    assert blurred.var() < PICTURES.var() and torch.allclose(change_of("blur:3")(red), red, atol=1e-5)
    for wrong in ("hue", "hue:x", "hue:nan", "hue:999", "channels:rrg", "grayscale:1", "blur:0", "sepia", ""):
        with pytest.raises(FeatInvError, match="expected hue:DEGREES"):
            change_of(wrong)


def test_pictures_to_measure_on_are_never_fitted_to():
    fitted, held_out = split("drawn", 16, None, None)
    assert set(fitted.numbers) | set(held_out.numbers) == set(range(16)) and len(held_out) == 4
    assert not set(fitted.numbers) & set(held_out.numbers)
    for arguments, words in ((("drawn", 7, None, None), "at least 8"), (("drawn", 8, "drawn", 8), "the data itself")):
        with pytest.raises(FeatInvError, match=words):
            split(*arguments)


def test_cells_of_any_grid_make_the_picture_again():
    for grid in ((8, 8), (16, 4), (128, 128)):
        whole = assembled(targets(PICTURES, grid), grid)
        assert torch.allclose(whole, F.interpolate(PICTURES, (SIDE, SIDE), mode="area"), atol=1e-6)
    near = assembled(targets(PICTURES, (5, 5)), (5, 5))  # 65 pixels, averaged to 64
    assert (near - PICTURES).square().mean() < 0.01


def test_a_probe_finds_what_is_linear_in_either_form_and_chooses_its_ridge():
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(300, 40, generator=generator), torch.randn(40, 6, generator=generator)
    y = x @ weight + 1
    for count in (200, 30):  # more vectors than inputs, and fewer
        probe = fit_probe(x[:count], y[:count], x[200:], y[200:])
        error = (probe(x[200:]) - y[200:]).square().mean() / y.var()
        assert error < (1e-6 if count == 200 else 0.6)
    noisy = y + 30 * torch.randn(300, 6, generator=generator)
    assert probe.ridge < fit_probe(x[:45], noisy[:45], x[200:], noisy[200:]).ridge


def test_neighbours_stand_around_their_vector():
    values = torch.arange(2 * 12.0).view(1, 2, 3, 4)
    around = inputs(values, 3).view(3, 4, 2, 3, 3)
    assert torch.equal(around[1, 1], values[0, :, 0:3, 0:3]) and around[0, 0, :, 0].abs().sum() == 0
    assert torch.equal(inputs(values, 1)[0, 5], values[0, :, 1, 1])


def test_ssim_is_one_for_equal_pictures_and_falls_with_noise_and_blur():
    noise = torch.randn(PICTURES.shape, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(ssim(PICTURES, PICTURES), torch.ones(16), atol=1e-5)
    assert (ssim(PICTURES + 0.1 * noise, PICTURES) < ssim(PICTURES + 0.01 * noise, PICTURES)).all()
    flat = torch.full((1, 3, 16, 16), 0.25)
    expected = (2 * 0.25 * 0.75 + 1e-4) / (0.25**2 + 0.75**2 + 1e-4)  # by hand: no variance, means alone
    assert ssim(flat, 3 * flat).item() == pytest.approx(expected, abs=1e-6)


def test_maps_that_hold_the_pixels_keep_everything_and_noise_nothing():
    source = SimpleNamespace(names=[str(n) for n in range(16)], read=lambda n: (PICTURES[n], True))
    parts = split("drawn", 16, None, None)
    for part in parts:
        part.source = source

    def maps(pixel_values):
        pixels = F.pixel_unshuffle(pixel_values, 8)  # all 192 numbers of a cell of 8 x 8
        noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(1))
        return {"pixels": pixels.roll(1, 1), "noise": noise}

    result = probed(maps, lambda x: x, parts, 16, 1, "test")
    assert result["pixels"][0]["r2"]["value"] > 0.95 and result["noise"][0]["r2"]["value"] < 0.2
    assert result["pixels"][0]["psnr"]["n"] == 4


def test_backbones_are_ranked_by_one_command(tmp_path, capsys):
    rank_backbones.main(
        ["--backbones", "tiny-cnn@layer2,last", "tiny-vit@blocks.0", "--count", "32", "--out", str(tmp_path)]
        + ["--models", "tiny_cnn_last", "--drawn", "2"]
    )
    results = json.loads((tmp_path / "results.json").read_text())
    shrunk = [results[f"image itself, shrunk {n} x {n}"]["r2"]["value"] for n in (4, 8, 16, 32)]
    assert shrunk == sorted(shrunk) and shrunk[-1] > 0.8
    last, vit = results["resnet10t.tiny_world last"], results["vit_tiny_patch16_224.tiny_world blocks.0"]
    assert last["channels"] == 128 and last["values_per_pixel_value"] == pytest.approx(128 * 64 / (3 * 64 * 64))
    assert 0 < results["resnet10t.tiny_world layer2"]["gmac"] < last["gmac"]
    assert vit["r2"]["value"] > last["r2"]["value"] and last["cosine"]["n"] == last["independent"]["n"] == 2
    printed = capsys.readouterr().out
    assert printed.index("blocks.0") < printed.index("resnet10t.tiny_world last") and "8 held-out images" in printed
    assert {f.name for f in tmp_path.iterdir()} == {"results.json", "report.md", "index.html", "ranking.png"}


def test_a_linear_map_is_fitted_measured_drawn_and_kept(tmp_path, capsys):
    file = tmp_path / "new" / "bgr.safetensors"
    fit_linear_map.main(["--change", "channels:bgr", "--count", "48", "--drawn", "2", "--out", str(file)])
    linear, about = load_linear_map(file), json.loads(file.with_suffix(".json").read_text())
    assert linear.kind == "affine" and linear.source == open_backbone("tiny-cnn").source() and linear.low == 0
    assert linear.settings["change"] == "channels:bgr" and linear.settings["maps"] == 36
    assert linear.measured == about["kinds"]["affine"] and linear.measured["explained"]["n"] == 12
    assert linear.measured["cosine_mapped"]["value"] > linear.measured["cosine_before"]["value"] + 0.02
    assert set(about["drawn"]) == {"unchanged map", "mapped map", "changed image's map"}
    assert about["drawn"]["changed image's map"]["cosine"]["value"] > 0.7
    page, printed = file.with_suffix(".html").read_text(), capsys.readouterr().out
    assert "data:image/png" in page and "share of the change" in page and "by tiny_cnn_last" in printed


def test_any_change_is_learned_from_two_folders_of_pictures(tmp_path):
    for n, picture in enumerate(PICTURES):
        image = Image.fromarray((picture * 255).byte().permute(1, 2, 0).numpy())
        for folder, one in (("before", image), ("after", ImageOps.invert(image))):
            (tmp_path / folder).mkdir(exist_ok=True)
            one.save(tmp_path / folder / f"{n}.png")
    (tmp_path / "before" / "3.png").write_text("no image")
    common = ["--data", str(tmp_path / "before"), "--changed", str(tmp_path / "after"), "--layer", "layer2"]
    common += ["--kind", "direction", "--model", "none", "--out", str(tmp_path / "map.safetensors")]
    fit_linear_map.main(common)
    linear = load_linear_map(tmp_path / "map.safetensors")
    assert linear.kind == "direction" and linear.settings["change"] == "as in after"
    assert "3.png" in (tmp_path / "map.json").read_text()
    (tmp_path / "after" / "5.png").unlink()
    with pytest.raises(FeatInvError, match="after has no 5.png"):
        fit_linear_map.main(common)


@pytest.mark.parametrize(
    "program, arguments, words",
    [
        (fit_linear_map, ["--change", "sepia"], "expected hue:DEGREES"),
        (fit_linear_map, ["--change", "grayscale", "--model", "none_such"], "no model 'none_such'"),
        (fit_linear_map, ["--change", "grayscale", "--data", "nowhere"], "neither 'drawn' nor a folder"),
        (fit_linear_map, ["--change", "grayscale", "--layer", "x", "--count", "8"], "no layer 'x'"),
        (rank_backbones, ["--backbones", "tiny-cnn@x", "--count", "8"], "no layer 'x'"),
        (rank_backbones, ["--backbones", "tiny-cnn@last", "--count", "8", "--around", "2"], "--around 2"),
        (rank_backbones, ["--per-picture", "0", "--backbones", "tiny-cnn@last", "--count", "8"], "--per-picture 0"),
        (
            rank_backbones,
            ["--backbones", "tiny-cnn@last", "--count", "8", "--models", "tiny_cnn_stage"],
            "layer2, 64 channels, 8x8, which is not among the ranked maps",
        ),
    ],
)
def test_bad_input_is_named(tmp_path, program, arguments, words):
    out = tmp_path / ("map.safetensors" if program is fit_linear_map else "out")
    with pytest.raises(FeatInvError, match=words):
        program.main([*arguments, "--out", str(out)])
    assert not out.is_file()
