"""The stages that make the embedded world run, stop and go on; at a few images each, for their wiring."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from sklearn.datasets import load_sample_image

from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.patch_autoencoder import PatchAutoencoder
from featinv_nodes.worlds.drawn import DRAWN
from featinv_nodes.worlds.drawn.scenes import draw
from training.models.base_model import load_base
from training.worlds import autoencoder, backbones, base, loop
from training.worlds.loop import read_images_seen, train_stage


def regress(work, **changes):
    """A line fitted to noisy points: everything random comes from the loop's own seeding."""
    torch.manual_seed(0)
    model = torch.nn.Linear(1, 1)

    def loss_of(indices):
        x = torch.randn(len(indices), 1)
        return (model(x) - 3 * x - 1).square().mean()

    return train_stage("line", model, loss_of, **{"images": 640, "batch": 8, "lr": 0.1, "work": work} | changes)


def test_a_stopped_stage_goes_on_as_if_never_stopped(tmp_path):
    regress(tmp_path / "two", stop=200)
    resumed, straight = regress(tmp_path / "two"), regress(tmp_path / "one")
    assert torch.equal(resumed.weight, straight.weight) and torch.equal(resumed.bias, straight.bias)
    assert abs(straight.weight.item() - 3) < 0.5
    assert [f.name for f in (tmp_path / "two").iterdir()] == ["line.pt"]


def test_a_run_of_graphs_goes_on_without_them(tmp_path):
    """What CUDA graphs need in the optimizer does not bind the next run."""
    regress(tmp_path, stop=200)
    state = torch.load(tmp_path / "line.pt", weights_only=True)
    for group in state["optimizer"]["param_groups"]:
        group["capturable"], group["lr"] = True, torch.tensor(group["lr"])
    torch.save(state, tmp_path / "line.pt")
    regress(tmp_path / "straight")
    assert torch.equal(regress(tmp_path).weight, regress(tmp_path / "straight").weight)


def test_a_stage_stopped_before_its_result_writes_it_when_asked_again(tmp_path):
    """Between the last checkpoint and the result: nothing is trained again, and the result is not missing."""

    def killed(average):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        regress(tmp_path, keep=killed)
    written = []
    again = regress(tmp_path, keep=lambda average: written.append(average.weight.clone()))
    assert read_images_seen(tmp_path, "line") == 640 and len(written) == 1 and torch.equal(written[0], again.weight)


def test_results_are_written_after_each_checkpoint_and_at_the_end(tmp_path, monkeypatch):
    """What is written at a checkpoint is the moving average that the checkpoint holds."""
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", -1)
    written = []

    def keep(average):
        state = torch.load(tmp_path / "line.pt", weights_only=True)
        assert torch.equal(state["average"]["weight"], average.weight)
        written.append(state["seen"])

    regress(tmp_path, images=40, keep=keep)
    assert written == [8, 16, 24, 32, 40]


def test_a_finished_stage_goes_on_with_more_images(tmp_path):
    regress(tmp_path, images=80)
    regress(tmp_path, images=640)
    assert read_images_seen(tmp_path, "line") == 640 and read_images_seen(tmp_path, "circle") == 0


def test_minutes_are_of_this_call_and_those_before(tmp_path, monkeypatch):
    """On a clock that every reading moves by a second."""
    now = iter(range(10_000))
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: next(now)))
    regress(tmp_path, images=None, minutes=2, stop=80)
    before = torch.load(tmp_path / "line.pt", weights_only=True)
    assert before["seen"] == 80 and 0 < before["spent"] < 100
    started = next(now)
    regress(tmp_path, images=None, minutes=2)
    after = torch.load(tmp_path / "line.pt", weights_only=True)
    assert after["seen"] > 80 and 120 <= after["spent"] < 130
    assert 0 < next(now) - started < 130 - before["spent"]


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    regress(tmp_path, images=80)
    before = (tmp_path / "line.pt").read_bytes()
    with pytest.raises(FeatInvError, match=r"line.pt is of a model of other sizes.*--work"):
        train_stage("line", torch.nn.Linear(2, 1), lambda indices: None, images=640, batch=8, lr=0.1, work=tmp_path)
    assert (tmp_path / "line.pt").read_bytes() == before


@pytest.fixture
def cnn():
    torch.manual_seed(0)
    return backbones.build("cnn").requires_grad_(False)


def test_backbone_stages(tmp_path, monkeypatch, cnn):
    monkeypatch.setattr(backbones, "RECIPES", {"cnn": (32, 16, 1e-3), "vit": (32, 16, 1e-3)})
    monkeypatch.setattr(backbones, "DISTIL_FROM", 16)
    for model in (backbones.train_cnn(tmp_path), backbones.train_vit(tmp_path, cnn)):
        assert backbones.accuracy(model, 100).keys() == backbones.GROUPS.keys()
    cells = backbones.token_targets(draw(0, torch.arange(50)))
    assert cells.shape == (50, 64, 28) and cells.sum(-1).max() == 4


def test_autoencoder_starts_from_patches_and_standardises(tmp_path, monkeypatch, cnn):
    x = backbones.normalise(draw(0, torch.arange(100)).image)
    plain = PatchAutoencoder()
    plain.start_from_patches(x)
    error = (plain.decode(plain.encode(x)) - x).square().mean()
    assert error < 0.15 * x.var()  # 24 of 192 components keep most of a drawn picture
    assert plain.encode(x).square().mean().item() == pytest.approx(
        1, rel=0.01
    )  # what networks that start at zero add to
    for name, value in {"IMAGES": 32, "STOP": 32, "BATCH": 16, "PERCEPTUAL_FROM": 16}.items():
        monkeypatch.setattr(autoencoder, name, value)
    vae = autoencoder.train_autoencoder(tmp_path, cnn, compile=False)
    z = vae.encode(backbones.normalise(draw(0, torch.arange(500)).image))
    assert z.mean((0, 2, 3)).abs().max() < 1e-3 and abs(z.std() - 1) < 0.01


def photograph_crops(count, side=128):
    """[count, 3, side, side] in -1..1: random crops of scikit-learn's two photographs, at half their size."""
    generator, crops = torch.Generator().manual_seed(0), []
    whole = [
        torch.from_numpy(load_sample_image(name).copy()).permute(2, 0, 1)[None] / 127.5 - 1
        for name in ("china.jpg", "flower.jpg")
    ]
    whole = [
        torch.nn.functional.interpolate(picture, scale_factor=0.5, mode="bilinear", antialias=True)[0]
        for picture in whole
    ]
    for number in range(count):
        picture = whole[number % 2]
        top, left = (torch.randint(length - side + 1, (), generator=generator) for length in picture.shape[1:])
        crops.append(picture[:, top : top + side, left : left + side])
    return torch.stack(crops)


@pytest.mark.parametrize("latents, kept", [(64, 0.95), (16, 0.85)])
def test_components_of_16_pixel_patches_keep_a_photograph(latents, kept):
    """Of the variance over pixels, the crops' mean removed; standardised latents are undone exactly."""
    x = photograph_crops(60)
    vae = PatchAutoencoder(16, latents)
    vae.start_from_patches(x[:40])
    with torch.no_grad():
        plain, spread = vae.decode(vae.encode(x[40:])), vae.encode(x[:40]).std((0, 2, 3))
        autoencoder.standardise(vae, x[:40])
        z, again = vae.encode(x), vae.decode(vae.encode(x[40:]))
    assert z.shape == (60, latents, 8, 8) and z[:40].mean((0, 2, 3)).abs().max() < 1e-3 and abs(z[:40].std() - 1) < 0.01
    ratios = z[:40].std((0, 2, 3)).square() / spread  # of the deviations their square root is kept
    assert ratios.max() < 1.001 * ratios.min()
    share = 1 - (again - x[40:]).square().mean() / x[40:].var()
    assert kept < share < 1 and torch.allclose(plain, again, atol=1e-4)
    vae.mean += torch.linspace(-1, 1, latents)[:, None, None]
    assert torch.allclose(vae.decode(vae.encode(x[40:])), again, atol=1e-4)


@pytest.mark.parametrize("patch, latents", [(4, 8), (8, 24), (16, 64)])
def test_an_autoencoder_comes_back_from_its_folder(tmp_path, patch, latents):
    torch.manual_seed(0)
    vae = PatchAutoencoder(patch, latents)
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.normal_(module.weight, std=0.05)
    base.write_base(tmp_path, None, vae, "a prompt", torch.float32)
    again, x = PatchAutoencoder.load(tmp_path / "vae"), torch.rand(1, 3, 32, 64)
    assert again.config == vae.config and not (tmp_path / "unet").exists()
    assert vae.encode(x).shape == (1, latents, 32 // patch, 64 // patch) and vae.decode(vae.encode(x)).shape == x.shape
    assert torch.equal(again.encode(x), vae.encode(x)) and torch.equal(
        again.decode(again.encode(x)), vae.decode(vae.encode(x))
    )


def test_an_autoencoder_from_before_patches_had_sizes_still_opens(tmp_path):
    """The drawn world's folder, with the config.json that it had: the class alone."""
    folder = shutil.copytree(DRAWN.base_folder / "vae", tmp_path / "vae")
    (folder / "config.json").write_text(json.dumps({"_class_name": "PatchAutoencoder"}))
    vae = PatchAutoencoder.load(folder)
    assert (vae.patch, vae.latents) == (8, 24)
    x = backbones.normalise(draw(0, torch.arange(20), "held-out").image)
    assert (vae.decode(vae.encode(x)) - x).square().mean() < 0.02 * x.var()


def test_base_stage_caches_latents_once(tmp_path, monkeypatch):
    for name, value in {"CACHED": 200, "PART": 100}.items():
        monkeypatch.setattr(base, name, value)
    small = {"images": 600, "batch": 64, "compile": False}
    latents = base.cached_latents(tmp_path, PatchAutoencoder(), "cpu", 200)
    assert len(list((tmp_path / "latents").glob("*.pt"))) == 2 and latents.shape == (200, 24, 8, 8)
    unet = base.train_base(tmp_path, base.build(), lambda count: latents[torch.randint(200, (count,))].float(), **small)
    base.write_base(tmp_path / "base", unet, PatchAutoencoder(), "a prompt")
    assert torch.equal(load_base(tmp_path / "base", "a prompt").unet.conv_in.weight, unet.conv_in.weight.half().float())
