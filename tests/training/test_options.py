"""What a user can choose: one process or two, whole batches or parts, what is logged, and what is said of a wrong
choice."""

import json
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import killed
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import AcceleratorState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from processes import exit_codes, free_port
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.metrics import cosine
from featinv_nodes.core.objective import min_snr_weight
from featinv_nodes.worlds import open_backbone
from featinv_nodes.worlds.drawn.scenes import draw
from training.config import CONFIGS, DEFAULT, read_config
from training.loop import log, panel
from training.loop.flops import step_gmac
from training.loop.objective import cast_frozen
from training.loop.optimizer import build_optimizer, fused_step
from training.loop.training import train
from training.models.base_model import load_base
from training.models.controlnet import FeatureControlNet

SMALL = killed.SMALL | {"max_images": "40", "save_every": "1000", "standardise": "true"}


def here(folder, **changes):
    return train(read_config(DEFAULT, SMALL | changes), folder)


def lines(folder):
    return [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of whole batches on one process."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, load_file(here(folder))


def close(result, expected):
    """Equal but for the order in which sums of float32 are rounded; AdamW makes whole steps of what is rounded near 0,
    so single weights may differ more than all together."""
    apart = sum((result[k] - expected[k]).square().sum() for k in expected) / sum(
        v.square().sum() for v in expected.values()
    )
    return apart.sqrt() < 1e-3


def test_two_processes_follow_the_loss_curve_of_one(whole, tmp_path):
    port, values = free_port(), SMALL | {"batch": "1"}
    assert exit_codes(killed.run_as, *((rank, 2, port, str(tmp_path), values) for rank in range(2))) == [0, 0]
    first, second = lines(whole[0]), lines(tmp_path)
    assert [(a["images"], a["lr"]) for a in first] == [(b["images"], b["lr"]) for b in second]
    assert all(a["loss"] == pytest.approx(b["loss"], rel=1e-5) for a, b in zip(first, second))
    assert close(load_file(tmp_path / "tiny_cnn_last.safetensors"), whole[1])


def test_a_batch_in_parts_and_with_checkpointing_learns_the_same(whole, tmp_path):
    assert close(load_file(here(tmp_path, batch="1", accumulate="2", checkpointing="true")), whole[1])
    assert lines(tmp_path)[0]["loss"] == pytest.approx(lines(whole[0])[0]["loss"], rel=1e-5)


def test_frozen_parts_in_bf16_change_the_loss_by_its_rounding(whole, tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    here(tmp_path, precision="bf16")
    assert lines(tmp_path)[0]["loss"] == pytest.approx(lines(whole[0])[0]["loss"], rel=2**-7)  # bf16 has eight bits
    base, backbone = load_base("tiny", ""), open_backbone("tiny-cnn")
    for precision in ("fp16", "fp32", "bf16"):  # each of them, in bf16 alone
        cast_frozen(read_config(DEFAULT, {"precision": precision}), base, backbone)
        kinds = {p.dtype for part in (base.unet, base.vae, backbone) for p in part.parameters()}
        assert kinds == {torch.bfloat16 if precision == "bf16" else torch.float32}
    assert base.decode(torch.zeros(1, 24, 8, 8, dtype=torch.bfloat16)).dtype == torch.float32


def test_the_encoder_alone_learns_first(tmp_path):
    given = here(tmp_path / "given", max_images="2", ema="0")
    start = load_file(given)
    first = load_file(here(tmp_path / "first", init_from=str(given), encoder_first="4", max_images="4", ema="0"))
    moved = {k for k in start if not torch.equal(start[k], first[k])}
    assert moved and all(k.startswith("controlnet_cond_embedding.block") for k in moved)
    further = load_file(here(tmp_path / "first", init_from=str(given), encoder_first="4", max_images="6", ema="0"))
    assert any(not torch.equal(start[k], further[k]) for k in start if not k.startswith("controlnet_cond_embedding"))


def test_weights_without_a_gradient_decay_as_the_configuration_says(monkeypatch):
    """AdamW (Loshchilov & Hutter 2019): by lr times the decay at each step, in both groups; and as bitsandbytes' is
    told."""
    base, config = load_base("tiny", ""), read_config(DEFAULT, {"lr": "0.5", "weight_decay": "0.2"})
    model = FeatureControlNet.start(base, open_backbone("tiny-cnn").source(), 16)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, config)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(torch.allclose(p, 0.9 * before[name]) for name, p in model.named_parameters())
    package = SimpleNamespace(AdamW8bit=lambda groups, **given: (len(groups), given))
    for name in ("bitsandbytes", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, name, package)
    small = build_optimizer(model, replace(config, optimizer="adamw8bit"))
    assert small == (2, {"lr": 0.5, "weight_decay": 0.2})


def test_a_step_clips_the_norm_of_all_gradients_together():
    """Against torch's own two functions. AdamW's first step knows no length, so it takes a second."""
    one, two = (torch.nn.Linear(3, 2) for _ in range(2))
    two.load_state_dict(one.state_dict())
    fused, plain = (torch.optim.AdamW(m.parameters(), lr=0.1, fused=f) for m, f in ((one, True), (two, False)))
    for length in (100.0, 0.3, 5.0):
        for p, q in zip(one.parameters(), two.parameters()):
            p.grad = length * torch.ones_like(p)
            q.grad = p.grad.clone()
        assert fused_step(fused)
        torch.nn.utils.clip_grad_norm_(two.parameters(), 1.0)
        plain.step()
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(one.parameters(), two.parameters()))


def test_the_average_begins_near_the_weights(tmp_path):
    """After one step it keeps 2 of 11 parts of the start, whatever its decay: of a zero convolution, nothing."""
    here(tmp_path, max_images="2", ema="0.9999")
    state = torch.load(next(tmp_path.glob("checkpoint-*.pt")), weights_only=True)
    model, average = (state[name]["controlnet.controlnet_mid_block.weight"] for name in ("model", "average"))
    assert model.abs().max() > 0 and torch.allclose(average, 9 / 11 * model)


def test_min_snr_weights_are_those_of_the_paper():
    alpha_bar = torch.tensor([0.99, 0.9, 0.5, 0.1, 0.0])  # SNR 99, 9, 1, 1/9, 0
    assert torch.allclose(min_snr_weight(alpha_bar, 5, False), torch.tensor([5 / 99, 5 / 9, 1, 1, 1]))
    assert torch.allclose(min_snr_weight(alpha_bar, 5, True), torch.tensor([5 / 100, 5 / 10, 1 / 2, 1 / 10, 0]))


def test_min_snr_lowers_the_weight_of_small_noise(whole, tmp_path):
    here(tmp_path, min_snr="1.0", schedule="cosine", lr="1e-5")
    (line,) = lines(tmp_path)
    assert 0 < line["loss"] < 0.9 * lines(whole[0])[0]["loss"]
    assert line["lr"] == pytest.approx(1e-5 * (1 + math.cos(math.pi * 38 / 40)) / 2)  # that of the last step


def test_the_log_says_what_a_step_costs(whole):
    (line,) = lines(whole[0])
    assert {
        "images",
        "loss",
        "lr",
        "images_per_second",
        "gflops",
        "data_wait",
        "memory_gb",
    } == line.keys()  # the share of a CPU's peak is not known
    assert 0 <= line["data_wait"] <= 1 and line["memory_gb"] > 0.1
    base, backbone = load_base("tiny", "a drawing of the small world"), open_backbone("tiny-cnn")
    model = FeatureControlNet.start(base, backbone.source(), 16)
    config = read_config(DEFAULT, SMALL)
    assert line["gflops"] == pytest.approx(2 * step_gmac(base, backbone, model, config) * line["images_per_second"])
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        base.unet(torch.zeros(1, 24, 8, 8), torch.zeros(1, dtype=torch.long), base.text[""])
    # forward and the gradient through the decoder of the base model, and the ControlNet, about half of it, three times
    assert 2 < step_gmac(base, backbone, model, config) / (counter.get_total_flops() / 2e9) < 4


def test_speed_is_of_all_steps_since_the_last_report_without_the_first_and_what_is_done_elsewhere(monkeypatch):
    """By a clock that stands still but for what is told here."""
    now = [0.0]
    monkeypatch.setattr(log.time, "perf_counter", lambda: now[0])
    pace = log.Pace(5.0, 1e12)
    for seconds in (100, 1, 1):  # the first step compiles
        now[0] += seconds
        pace.step(8)
    with pace.waiting():
        now[0] += 0.5
    with pace.elsewhere():
        now[0] += 60
    now[0] += 1.5
    figures = pace.report()
    assert (figures["images_per_second"], figures["gflops"], figures["data_wait"]) == (4, 40, 0.125)
    assert figures["share_of_peak"] == pytest.approx(0.04) and pace.report().keys() == {"memory_gb"}


class Remembering(GeneralTracker):
    name, requires_logging_directory, main_process_only = "remembering", False, True
    seen = {}

    def __init__(self, run_name, **_):
        super().__init__()

    tracker = property(lambda self: self)

    def store_init_configuration(self, values):
        self.seen["config"] = values

    def log(self, values, step=None, **_):
        self.seen.setdefault("values", {})[step] = values

    def log_images(self, values, step=None, **_):
        self.seen["panel"] = step, values["panel"].shape


def test_trackers_get_numbers_and_panels(tmp_path, monkeypatch):
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "remembering", Remembering)
    here(tmp_path, trackers="[remembering]", panel_every="40")
    seen = Remembering.seen
    assert seen["config"]["batch"] == 2 and seen["panel"][0] == 40 and seen["panel"][1][3] == 3
    assert "cosine" in seen["values"][40] and [line.keys() & {"loss", "cosine"} for line in lines(tmp_path)] == [
        {"loss"},
        {"cosine"},
    ]


def test_a_tracker_that_fails_does_not_end_a_run(tmp_path, monkeypatch, capsys):
    def fails(*_, **__):
        raise RuntimeError("no image of mine")

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "remembering", Remembering)
    monkeypatch.setattr(Remembering, "log_images", fails)
    assert here(tmp_path, trackers="[remembering]", panel_every="4", max_images="6").exists()
    assert "the tracker remembering did not take the panel: no image of mine" in capsys.readouterr().out


def test_a_panel_scores_whole_pictures_of_the_weights_alone_and_leaves_the_model_learning(monkeypatch):
    """Held-out scenes as the backbone is evaluated, here by their middle; no guidance by the gradient."""
    base, backbone = load_base("tiny", "a drawing of the small world"), open_backbone("tiny-cnn")
    backbone.crop_pct, asked = 0.5, []
    model = FeatureControlNet.start(base, backbone.source(), 16)
    latents = base.encode(draw(1, torch.arange(8)).image)
    monkeypatch.setattr(panel, "sample", lambda *given: asked.append((*given, model.training)) or latents)
    config = read_config(DEFAULT, SMALL | {"recommended": "{steps: 1, gradient: 0.5}"})
    _, score = panel.sample_panel(base, backbone, model, config)
    (_, _, features, _, sampling, _, learning), shown = asked[0], base.decode(latents)
    assert torch.equal(features.values, backbone(backbone.preprocess(panel.held_out(config))).values)
    assert score == pytest.approx(cosine(features, backbone(backbone.preprocess(shown, "stretch"))).mean().item())
    assert not learning and model.training and (sampling.steps, sampling.gradient) == (1, 0)


def test_tensorboard_gets_numbers_and_panels(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    here(tmp_path, trackers="[tensorboard]", panel_every="20", max_images="20")
    events = EventAccumulator(str(tmp_path / "featinv"), size_guidance={"images": 0}).Reload()
    (tag,) = events.Tags()["images"]
    (image,) = events.Images(tag)
    assert image.step == 20 and image.width > image.height > 100
    assert {"loss", "cosine"} <= set(events.Tags()["scalars"])


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("training.loop.log.filter_trackers", lambda *_: [])
    with pytest.raises(FeatInvError, match="'tensorboard' is not installed: pip install tensorboard"):
        here(tmp_path, trackers="[tensorboard]")
    monkeypatch.undo()
    with pytest.raises(FeatInvError, match="trackers: .*paper"):
        here(tmp_path, trackers="[paper]")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(FeatInvError, match="pip install bitsandbytes"):
        here(tmp_path, optimizer="adamw8bit")


def test_shipped_launch_configurations_are_read():
    files = list((CONFIGS / "accelerate").glob("*.yaml"))
    kinds = {file.stem: load_config_from_file(str(file)).distributed_type for file in files}
    assert kinds == {"ddp": "MULTI_GPU", "fsdp": "FSDP", "multi_node": "MULTI_GPU"}


@pytest.mark.parametrize("changes", [{}, {"ema": "0", "standardise": "false", "checkpointing": "true"}])
def test_processes_that_share_out_the_weights_train_as_one(whole, tmp_path, changes):
    """FSDP through accelerate, with a panel, an average and a checkpoint from which one process goes on."""
    port, values = free_port(), SMALL | {"batch": "1", "panel_every": "40"} | changes
    assert exit_codes(killed.run_shared_out, *((rank, port, str(tmp_path), values) for rank in range(2))) == [0, 0]
    alone = load_file(here(tmp_path / "alone", **changes)) if changes else whole[1]
    assert close(load_file(tmp_path / "tiny_cnn_last.safetensors"), alone) and list(tmp_path.glob("panel_*.png"))
    here(tmp_path, max_images="44", **changes)
    assert len(list(tmp_path.glob("checkpoint-*.pt"))) == 2


def test_weights_that_processes_share_out_are_saved_whole(tmp_path):
    """FSDP: what one process has, two that share out the weights save, restore and average alike."""
    port = free_port()
    assert exit_codes(killed.shared_out, *((rank, port, str(tmp_path)) for rank in range(2))) == [0, 0]
    alone, shared = killed.learned(lambda module: module), torch.load(tmp_path / "state.pt")
    for part in ("model", "average"):
        assert all(torch.allclose(shared[part][k], alone[part][k]) for k in alone[part])
    assert all(torch.equal(shared["average"][k], shared["whole"][k]) for k in shared["whole"])
    assert torch.allclose(
        shared["optimizer"]["state"]["weight"]["exp_avg"], alone["optimizer"]["state"]["weight"]["exp_avg"]
    )
