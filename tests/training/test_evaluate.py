"""An evaluation: each image once whatever the processes, resumed where it was stopped, its settings and its
report."""

import errno
import json
import os
import shutil

import killed
import numpy as np
import pytest
import torch
from PIL import Image
from processes import exit_codes, free_port

from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.worlds.drawn.scenes import draw
from training import evaluate
from training.evaluation import shards
from training.evaluation.run import evaluate_in_memory, load_pictures
from training.models.pipeline import InversionPipeline

SMALL = ["--count", "8", "--steps", "1", "--batch", "2", "--device", "cpu"]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "SHARD", 2)


def results(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An evaluation that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD", 2)
        evaluate.main([*SMALL, "--out", str(folder)])
    return folder


def test_every_figure_has_its_count_interval_seeds_and_settings(whole):
    result = results(whole)
    for condition in ("reconstruction", "unconditional", "round trip"):
        for name, entry in result[condition].items():
            assert entry["n"] <= 8 and entry["few"], name
            assert entry["n"] == 1 or entry["low"] <= entry["value"] <= entry["high"], name
    assert result["reconstruction"]["cosine"]["n"] == 8 and result["sampling"]["reconstruction"]["steps"] == 1
    assert result["seeds"] and result["settings"]["files"]["tiny_cnn_last"]
    assert result["reconstruction"]["frechet_distance (resnet10t.tiny_world, pooled)"]["biased"]
    low, mid, high = (
        result[condition]["cosine"]["value"] for condition in ("unconditional", "reconstruction", "round trip")
    )
    assert result["gap_closed"] == pytest.approx((mid - low) / (high - low))
    text = (whole / "report.md").read_text()
    assert "| measure | unconditional | reconstruction | round trip |" in text and "biased" in text
    assert "data:image/png" in (whole / "index.html").read_text() and (whole / "panel.png").exists()


def test_the_records_give_the_figures_of_an_evaluation_in_memory(whole):
    from training.models.pipeline import load_pipeline

    pipeline = load_pipeline("tiny_cnn_last")
    pixel_values, counts = load_pictures(pipeline, "drawn", 8)
    result, _ = evaluate_in_memory(pipeline, pixel_values, pipeline.recommended(steps=1), counts == 1)
    kept = results(whole)
    for condition in result:
        for name, entry in result[condition].items():
            assert kept[condition][name]["value"] == pytest.approx(entry["value"], abs=1e-4), (
                name
            )  # float32 sums in other batches


def test_a_full_disk_keeps_what_is_done_and_the_rerun_goes_on(whole, tmp_path, monkeypatch):
    real, written = shards.write_checksummed, []

    def write(folder, *rest):
        if len(written) == 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(folder)
        return real(folder, *rest)

    monkeypatch.setattr(shards, "write_checksummed", write)
    with pytest.raises(FeatInvError, match="No space left.*What is done is kept"):
        evaluate.main([*SMALL, "--out", str(tmp_path)])
    assert not (tmp_path / "results.json").exists()
    monkeypatch.setattr(shards, "write_checksummed", real)
    (damaged := next(written[-1].iterdir())).write_bytes(damaged.read_bytes()[:-1])
    drawn, real_draw = [], InversionPipeline.draw
    monkeypatch.setattr(
        InversionPipeline,
        "draw",
        lambda self, features, *rest: (
            drawn.append(0 if features is None else len(features)) or real_draw(self, features, *rest)
        ),
    )
    evaluate.main([*SMALL, "--out", str(tmp_path)])
    assert sum(drawn) == 6  # of 8 reconstructions two shards were there, one of them damaged
    assert results(tmp_path) == results(whole)


def test_two_processes_find_what_one_does(whole, tmp_path):
    port, out = free_port(), str(tmp_path / "out")
    assert exit_codes(killed.evaluate_as, *((rank, port, out, SMALL) for rank in range(2))) == [0, 0]
    assert results(tmp_path / "out") == results(whole)
    done = [(tmp_path / f"out-{number}").read_text().splitlines() for number in range(2)]
    assert len(done[0]) == len(done[1]) == 8 and len({*done[0], *done[1]}) == 16  # 4 conditions, 4 shards, none twice


def test_another_evaluations_folder_is_left_alone(whole):
    with pytest.raises(FeatInvError, match="another evaluation.*steps: 1 there, 2 now"):
        evaluate.main([*SMALL, "--steps", "2", "--out", str(whole)])


def test_unreadable_pictures_are_in_the_report(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for k, scene in enumerate(draw(0, torch.arange(4), "held-out").image):
        Image.fromarray((scene * 255).byte().permute(1, 2, 0).numpy().astype(np.uint8)).save(folder / f"{k}.png")
    (folder / "1.png").write_bytes(b"no picture")
    evaluate.main(
        ["--data", str(folder), "--steps", "1", "--suite", "ood", "--device", "cpu", "--out", str(tmp_path / "out")]
    )
    result = results(tmp_path / "out")
    assert (
        list(result["skipped"]) == ["1.png"] and result["count"] == 3 and result["reconstruction"]["cosine"]["n"] == 3
    )
    assert "1 of 4 images could not be read and were left out: 1.png" in (tmp_path / "out" / "report.md").read_text()
    # mended, and the evaluation goes on with what it has of the originals
    next((tmp_path / "out" / "records" / "reconstruction").iterdir()).unlink()
    shutil.copy(folder / "0.png", folder / "1.png")
    evaluate.main(
        ["--data", str(folder), "--steps", "1", "--suite", "ood", "--device", "cpu", "--out", str(tmp_path / "out")]
    )
    assert results(tmp_path / "out")["reconstruction"] == result["reconstruction"] and list(
        results(tmp_path / "out")["skipped"]
    ) == ["1.png"]
    for file in folder.iterdir():
        file.write_bytes(b"no picture")
    with pytest.raises(FeatInvError, match="none of the 4 images .* can be read; the first, 0.png"):
        evaluate.main(["--data", str(folder), "--steps", "1", "--device", "cpu", "--out", str(tmp_path / "none")])


@pytest.mark.parametrize(
    "options, message",
    [
        (["--count", "0"], "--count 0"),
        (["--model", "none"], "no model 'none'"),
        (["--suite", "natural-adversarial"], "1000 classes"),
        (["--suite", "baseline"], "reads text"),
        (["--suite", "layers", "--models", "tiny_cnn_last"], "two or more"),
        (["--suite", "layers", "--models", "tiny_cnn_last", "tiny_vit_last"], "Use cross-model"),
        (["--suite", "cross-model", "--models", "tiny_cnn_last", "tiny_cnn_stage"], "Use layers"),
        (["--suite", "sweep", "--write-back"], "copy its file"),
        (["--suite", "variability", "--samples", "1"], "at least 2"),
        (["--device", "nonsense"], "--device nonsense"),
        (["--suite", "mixing", "--best-of", "4"], "suite mixing samples each image once"),
        (["--suite", "mixing", "--weights", "2"], "between 0 and 1"),
        (["--data", "/nowhere"], "neither"),
        (["--suite", "methods", "--start-share", "nan"], "--start-share nan"),
    ],
)
def test_bad_input_is_named_and_leaves_nothing(tmp_path, options, message):
    with pytest.raises(FeatInvError, match=message):
        evaluate.main([*SMALL, *options, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("negative, guidance", [("features", 2.0), ("text", 1.0)])
def test_drawing_one_at_a_time_gives_the_same_pictures(negative, guidance):
    from training.models.pipeline import load_pipeline
    from training.speed.sampling import one_by_one

    pipeline = load_pipeline("tiny_cnn_last")
    features = pipeline.features(pipeline.backbone.preprocess(draw(0, torch.arange(2), "held-out").image))
    sampling, start = (
        pipeline.recommended(steps=2, negative=negative, guidance=guidance, gradient=0.0),
        pipeline.noise(range(2)),
    )
    # 1e-4: float32 convolutions of one and of several pictures sum in another order
    assert (
        one_by_one(pipeline, features, sampling, start) - pipeline.draw(features, sampling, start)
    ).abs().max() < 1e-4
