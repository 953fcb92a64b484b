"""The stages that make the embedded world run, stop and go on; at a few pictures each, for their wiring."""

import pytest
import torch

from featinv_nodes.core.patch_autoencoder import PatchAutoencoder
from featinv_nodes.worlds.drawn.scenes import draw
from training.models.base_model import load_base
from training.worlds import autoencoder, backbones, base
from training.worlds.loop import train_stage


def regress(work, **changes):
    """A line fitted to noisy points: everything random comes from the loop's own seeding."""
    torch.manual_seed(0)
    model = torch.nn.Linear(1, 1)

    def loss_of(indices):
        x = torch.randn(len(indices), 1)
        return (model(x) - 3 * x - 1).square().mean()

    return train_stage("line", model, loss_of, **{"images": 640, "batch": 8, "rate": 0.1, "work": work} | changes)


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
    for name, value in {"IMAGES": 32, "STOP": 32, "BATCH": 16, "PERCEPTUAL_FROM": 16}.items():
        monkeypatch.setattr(autoencoder, name, value)
    vae = autoencoder.train_autoencoder(tmp_path, cnn, compile=False)
    z = vae.encode(backbones.normalise(draw(0, torch.arange(500)).image))
    assert z.mean((0, 2, 3)).abs().max() < 1e-3 and abs(z.std() - 1) < 0.01


def test_base_stage_caches_latents_once(tmp_path, monkeypatch):
    for name, value in {"CACHED": 200, "PART": 100}.items():
        monkeypatch.setattr(base, name, value)
    small = {"images": 600, "batch": 64, "compile": False}
    latents = base.cached_latents(tmp_path, PatchAutoencoder(), "cpu", 200)
    assert len(list((tmp_path / "latents").glob("*.pt"))) == 2 and latents.shape == (200, 24, 8, 8)
    unet = base.train_base(tmp_path, base.build(), lambda count: latents[torch.randint(200, (count,))].float(), **small)
    base.write_base(tmp_path / "base", unet, PatchAutoencoder(), "a prompt")
    assert torch.equal(load_base(tmp_path / "base", "a prompt").unet.conv_in.weight, unet.conv_in.weight.half().float())
