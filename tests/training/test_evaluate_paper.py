"""evaluate.py --paper draws, cuts, counts and compares as the paper's tables were made."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from featinv_nodes.core.backbone_opening import untrained_backbone
from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.feature_map import FeatureSource
from featinv_nodes.core.sampling import Sampling
from featinv_nodes.core.weights import read_info
from featinv_nodes.worlds import model_file
from featinv_nodes.worlds.drawn.scenes import draw
from training import evaluate
from training.evaluation import paper, run
from training.evaluation.context import EvalContext
from training.evaluation.sources import open_source
from training.models.base_model import load_base
from training.models.pipeline import InversionPipeline
from training.models.sampling import solver_of


def test_timesteps_and_noise_levels_are_those_of_the_released_program():
    """ldm's "uniform" DDIM: every 20th timestep plus one, the level before the first that of timestep 0, eta 0."""
    known = read_info(model_file("tiny_cnn_last"))
    base = load_base(known.base["name"], known.prompt)
    solver = solver_of(base, paper.sampling(False))
    solver.set_timesteps(50)
    uniform = np.arange(0, 1000, 20) + 1
    assert solver.timesteps.tolist() == uniform[::-1].tolist()
    levels = solver.alphas_cumprod.double().numpy()
    before = np.concatenate([levels[:1], levels[uniform[:-1]]])
    x, noise = torch.randn(1, 4, 2, 2).double(), torch.randn(1, 4, 2, 2).double()
    for k in (0, 1, 49):
        a, b = levels[uniform[k]], before[k]
        clean = (x - (1 - a) ** 0.5 * noise) / a**0.5
        pred = noise if solver.config.prediction_type == "epsilon" else a**0.5 * noise - (1 - a) ** 0.5 * clean
        stepped = solver.step(pred, int(uniform[k]), x).prev_sample
        # 1e-5: the levels are float32
        assert torch.allclose(stepped, b**0.5 * clean + (1 - b) ** 0.5 * noise, atol=1e-5, rtol=1e-5)


def test_the_cut_is_the_whole_shorter_side_by_pillows_bilinear():
    backbone = untrained_backbone("resnet10t", 64)
    paper.set_cut(backbone)
    picture = draw(0, torch.arange(1), "held-out").image.repeat(1, 1, 2, 3)  # 128 x 192
    pillow = Image.fromarray((picture[0] * 255).byte().permute(1, 2, 0).numpy())
    expected = np.asarray(pillow.resize((96, 64), Image.Resampling.BILINEAR).crop((16, 0, 80, 64))) / 255
    result = backbone.preprocess(picture)[0].permute(1, 2, 0).numpy()
    # Pillow rounds to 8 bits twice; in the outer columns a picture that is cut last sees beyond the cut
    assert np.abs(result - expected)[:, 1:-1].max() < 1.5 / 255


def test_originals_are_compared_as_the_released_program_stores_them(tmp_path):
    picture = draw(0, torch.arange(1), "held-out").image
    Image.fromarray((picture[0] * 255).round().byte().permute(1, 2, 0).numpy()).save(tmp_path / "p.jpeg")
    expected = np.asarray(Image.open(tmp_path / "p.jpeg")) / 255
    stored = paper.stored(picture)[0].permute(1, 2, 0).numpy()
    assert np.allclose(stored, expected, atol=1e-6) and not np.allclose(stored, picture[0].permute(1, 2, 0), atol=0.01)


def test_the_sampling_is_the_papers_unless_the_user_says_otherwise():
    source = open_source("drawn", 1)
    context = EvalContext(source, changes={"strength": 1.2, "guidance": None}, papers=True)
    from training.evaluation.context import ModelSpec

    assert context.sampling(ModelSpec("tiny_cnn_last")) == Sampling(50, 1.2, 1.75, "text", timestep_spacing="leading")
    assert context.sampling(ModelSpec("tiny_cnn_pooled")) == Sampling(50, 1.2, 8.0, "text", timestep_spacing="leading")
    assert EvalContext(source, papers=True).sampling(ModelSpec("tiny_cnn_pooled")) == Sampling(
        50, 1.5, 8.0, "text", timestep_spacing="leading"
    )


def test_a_run_with_paper_says_what_still_differs(tmp_path, monkeypatch):
    noises, real = [], InversionPipeline.noise
    monkeypatch.setattr(InversionPipeline, "noise", lambda self, seeds: noises.append(list(seeds)) or real(self, seeds))
    evaluate.main(["--paper", "--steps", "1", "--count", "8", "--device", "cpu", "--out", str(tmp_path)])
    result, text = json.loads((tmp_path / "results.json").read_text()), (tmp_path / "report.md").read_text()
    assert {seed for seeds in noises for seed in seeds} == {100} and result["seeds"] == "100 for every image"
    drawn = result["sampling"]["reconstruction"]
    assert (drawn["guidance"], drawn["negative"], drawn["gradient"], drawn["steps"]) == (1.75, "text", 0.0, 1)
    assert result["sets"] == "compared at 64 x 64 pixels, bilinear, antialiased; the originals as JPEG"
    assert "steps is 1 here; --paper sets 50." in text and "strength is" not in text
    assert "8 images of drawn; the paper's are 10,000: the first ten of each class" in text
    assert "generates images of 64 pixels; the paper's, MiniSD, of 256" in text and "--paper" in result["command"]


@pytest.mark.parametrize(
    ("suite", "folders", "expected"),
    [
        ("quality", (12, 11), 20),  # ten of each class
        ("sweep", (12, 11), 2),  # one of each (Figs. 10 and 11)
        ("natural-adversarial", (3, 2), 5),  # all
        ("ood", (14,), 14),  # no classes, and fewer than the paper's 10,000
        ("ood", (0, 2), 2),
    ],
)
def test_each_suite_takes_the_papers_number_of_pictures(tmp_path, monkeypatch, suite, folders, expected):
    for k, count in enumerate(folders):
        folder = tmp_path / (f"n0144076{k}" if len(folders) > 1 else ".")
        folder.mkdir(exist_ok=True)
        for number in range(count):
            Image.new("RGB", (20, 20)).save(folder / f"{number}.png")
    real = run.open_source

    class Opened(Exception):
        pass

    def opened(*args):
        raise Opened(real(*args))

    monkeypatch.setattr(run, "open_source", opened)
    with pytest.raises(Opened) as caught:
        evaluate.main(["--paper", "--suite", suite, "--data", str(tmp_path), "--device", "cpu"])
    assert len(caught.value.args[0].names) == expected


def test_a_class_with_fewer_pictures_than_the_papers_is_named(tmp_path):
    (tmp_path / "n01440760").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "n01440760" / "0.png")
    with pytest.raises(FeatInvError, match="--per-class 10"):
        evaluate.main(["--paper", "--data", str(tmp_path), "--device", "cpu", "--out", str(tmp_path / "out")])


def test_no_more_than_the_papers_pictures_are_taken(tmp_path):
    for number in range(6):
        Image.new("RGB", (20, 20)).save(tmp_path / f"{number}.png")
    assert open_source(str(tmp_path), most=3).names == ["0.png", "2.png", "4.png"]  # evenly spread
    assert len(open_source(str(tmp_path), most=9).names) == 6


def entry(value):
    return {"value": value, "low": value, "high": value, "n": 10_000}


CONVNEXT = FeatureSource(paper.CONVNEXT, "last", False, 1024, (9, 9), (288, 288), (0.5,) * 3, (0.2,) * 3)


def test_a_models_row_stands_below_the_papers():
    own = {"cosine": entry(0.6), "top1_match": entry(0.75), "top5_match": entry(0.93), "fid": entry(8.5)}
    row = paper.published("quality", CONVNEXT)
    grid = paper.table(row, CONVNEXT, own)
    assert grid.header[1:] == ["cosine-sim", "top5(1) match", "FID", "pictures"] and grid.note == ""
    assert grid.rows[0][1:] == ["0.61", "94% (77%)", "8.20", "10,000"]  # Table 1
    assert grid.rows[1][1:] == ["0.60", "93% (75%)", "8.50", "10,000"]
    del own["fid"]
    assert paper.table(row, CONVNEXT, own).rows[1][3] == "-" and "--inception" in paper.table(row, CONVNEXT, own).note
    assert paper.published("quality", replace(CONVNEXT, layer="stages.1")) is None


def test_the_papers_row_is_that_of_the_suite_and_the_encoder():
    swin = replace(CONVNEXT, backbone=paper.SWINV2)
    assert paper.published("quality", swin, "conv_at_map").fid == 12.69
    assert paper.published("quality", swin, "perceiver").fid == 22.65  # Table 3
    assert paper.published("ood", CONVNEXT).cosine == 0.48 and paper.published("ood", swin) is None  # Sec. 4.2
    adversarial = paper.published("natural-adversarial", CONVNEXT)
    assert "Sec. 4.2" in paper.beside(adversarial) and "top-5 match 71 %, top-1 match 38 %" in paper.beside(adversarial)
    assert paper.table(adversarial, CONVNEXT, {"cosine": entry(0.5)}).rows[0][4] == "7,500"
    assert "match" not in paper.beside(paper.published("ood", CONVNEXT))
