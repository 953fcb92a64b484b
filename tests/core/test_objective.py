"""The objective in plain PyTorch: any callable that predicts, any scheduler that adds noise."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from featinv_nodes.core.objective import Cycle, NoiseSample, drop_jointly, latents_from, sample_noise, training_loss

ALPHA_BAR = torch.linspace(0.99, 0.01, 10)
TEXT, EMPTY = torch.ones(1, 2, 3), torch.zeros(1, 2, 3)


def scheduler(prediction_type):
    """The three equations by hand, with ten timesteps."""

    def scales(t):
        a = ALPHA_BAR[t][:, None, None, None]
        return a.sqrt(), (1 - a).sqrt()

    def add_noise(x, noise, t):
        signal, spread = scales(t)
        return signal * x + spread * noise

    def get_velocity(x, noise, t):
        signal, spread = scales(t)
        return signal * noise - spread * x

    config = SimpleNamespace(prediction_type=prediction_type, num_train_timesteps=10)
    return SimpleNamespace(config=config, alphas_cumprod=ALPHA_BAR, add_noise=add_noise, get_velocity=get_velocity)


@pytest.fixture
def batch():
    """Latents, features and a sample of which the second row is dropped."""
    torch.manual_seed(0)
    latents, features = torch.randn(4, 2, 3, 3), torch.randn(4, 5, 1, 1)
    return (
        latents,
        features,
        NoiseSample(
            torch.randn(4, 2, 3, 3),
            torch.tensor([0, 3, 6, 9]),
            torch.tensor([False, True, False, False]),
            torch.zeros(0),
        ),
    )


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("min_snr", [0.0, 5.0])
def test_a_perfect_prediction_costs_nothing_and_none_its_targets_square(batch, prediction_type, min_snr):
    latents, features, sample = batch
    s = scheduler(prediction_type)
    target = sample.noise if prediction_type == "epsilon" else s.get_velocity(latents, sample.noise, sample.t)
    assert training_loss(lambda *_: target, s, latents, features, TEXT, EMPTY, sample, min_snr) == 0
    snr = ALPHA_BAR[sample.t] / (1 - ALPHA_BAR[sample.t])
    weight = torch.ones(4) if not min_snr else snr.clamp(max=5) / (snr if prediction_type == "epsilon" else snr + 1)
    loss = training_loss(lambda *_: torch.zeros_like(latents), s, latents, features, TEXT, EMPTY, sample, min_snr)
    assert loss == pytest.approx((weight * target.square().mean((1, 2, 3))).mean().item(), rel=1e-5)


def test_features_and_text_are_dropped_together(batch):
    _, features, sample = batch
    cond, context = drop_jointly(features, TEXT, EMPTY, sample.dropped)
    assert cond[1].abs().max() == 0 and context[1].abs().max() == 0
    assert torch.equal(cond[[0, 2, 3]], features[[0, 2, 3]]) and (context[[0, 2, 3]] == 1).all()


def test_dropout_is_the_share_of_the_samples_and_rows_of_a_batch_are_those_of_the_whole():
    torch.manual_seed(0)
    sample = sample_noise((4000, 1, 1, 1), 10, 0.15, "cpu")
    assert abs(sample.dropped.float().mean() - 0.15) < 4 * (0.15 * 0.85 / 4000) ** 0.5 and set(
        sample.t.tolist()
    ) == set(range(10))
    assert all(torch.equal(part, whole[10:13]) for part, whole in zip(sample.rows(10, 3), sample))


def test_latents_have_the_posteriors_mean_and_deviation():
    moments = torch.cat([torch.full((1, 1, 2, 2), 3.0), torch.full((1, 1, 2, 2), 4.0).log() * 2], 1)  # N(3, 4^2)
    assert torch.allclose(latents_from(moments, torch.full((1, 1, 2, 2), -1.0)), torch.tensor(-1.0))


def test_the_cycle_counts_rows_that_see_features_below_its_timestep(batch):
    """Rows 0 and 2 of four: the second is dropped, the fourth beyond. The clean latents of a perfect prediction are the
    latents."""
    latents, features, sample = batch
    s, asked = scheduler("epsilon"), []

    def distance(clean, values):
        asked.append((clean, values))
        return values[:, 0, 0, 0]

    loss = training_loss(
        lambda *_: sample.noise, s, latents, features, TEXT, EMPTY, sample, cycle=Cycle(distance, 2.0, 7, 0.75)
    )
    assert loss.item() == pytest.approx(2 * features[[0, 2], 0].mean().item(), rel=1e-5)
    ((clean, values),) = asked
    assert (
        len(clean) == 3
        and torch.allclose(clean[:2], latents[[0, 2]], atol=1e-4)
        and torch.equal(values[:2], features[[0, 2]])
    )


def test_a_cycle_of_which_no_row_counts_adds_nothing(batch):
    """Where every row is dropped, a row is decoded all the same, and does not count."""
    latents, features, sample = batch
    sample = sample._replace(dropped=torch.ones_like(sample.dropped))
    seen = []
    cycle = Cycle(lambda clean, values: seen.append(len(clean)) or values[:, 0, 0, 0], 2.0, 7, 0.0)
    loss = training_loss(
        lambda *_: sample.noise, scheduler("epsilon"), latents, features, TEXT, EMPTY, sample, cycle=cycle
    )
    assert loss.item() == pytest.approx(0, abs=1e-6) and seen == [1]


def test_the_method_imports_neither_the_host_nor_diffusers():
    folder = Path(__file__).parents[2] / "featinv_nodes" / "core"
    names = [".".join(file.relative_to(folder.parents[1]).with_suffix("").parts) for file in folder.rglob("*.py")]
    code = (
        f"import importlib, sys; [importlib.import_module(name) for name in {names}]; print([m for m in sys.modules if"
        " m.split('.')[0] in ('comfy', 'diffusers', 'accelerate', 'training')])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=folder.parents[1], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )
