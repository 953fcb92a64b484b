"""The ablation's rows build on one another, and the program trains, measures and reports them, once."""

import json

import pytest
import yaml
from PIL import Image

from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.sampling import PAPER_SAMPLING, Sampling
from training.evaluation.metrics import RESAMPLES
from training.experiments import ablation, ablation_rows
from training.experiments.ablation_rows import (
    ABLATIONS,
    GUIDED,
    RECOMMENDED,
    chain,
    chosen_rows,
    config_of,
    sampling_of,
    weights_of,
)

ROWS = ["paper_1e-5", "steps_20", "gradient"]


def test_each_row_is_one_change_from_the_row_it_builds_on():
    drawn, rows = ABLATIONS["drawn"], ABLATIONS["drawn"].rows(1000)
    for name, row in rows.items():
        assert (
            name == row.name
            and row.change
            and (row.base is None or list(rows).index(row.base) < list(rows).index(name))
        )
        assert bool(row.config) != bool(row.sampling)
        made = [vars(config_of(drawn, rows, weights_of(rows, other), 1000)) for other in chain(rows, row)[-2:]]
        changed = {field for field in made[0] if made[0][field] != made[-1][field]}
        assert changed == (set(row.config) if row.base else set()), name
    paper = config_of(drawn, rows, rows["paper_1e-5"], 1000)
    assert (
        paper.batch,
        paper.lr,
        paper.dropout,
        paper.schedule,
        paper.warmup,
        paper.ema,
        paper.cycle,
        paper.standardise,
    ) == (8, 1e-5, 0.15, "constant", 0, 0, 0, False)
    assert all(vars(sampling_of(rows, row)).items() >= PAPER_SAMPLING.items() for row in rows.values() if row.config)
    assert config_of(drawn, rows, rows["cycle_late"], 1000).cycle_after == 750
    assert weights_of(rows, rows[RECOMMENDED]).name == "batch_8" and sampling_of(rows, rows[RECOMMENDED]) == Sampling(
        **(PAPER_SAMPLING | GUIDED)
    )
    assert [row.name for row in chosen_rows(rows, ["ema", "batch"])] == ["batch", "ema"]
    with pytest.raises(FeatInvError, match="--rows nothing: expected some of paper_1e-5"):
        chosen_rows(rows, ["nothing"])


def test_photographs_rows_train_from_few_images_or_draw_with_shipped_weights():
    photo = ABLATIONS["photo"]
    rows = photo.rows(1000)
    trained = [row.name for row in rows.values() if row.config]
    assert trained == ["plain", "standardise", "cycle"] and all(
        rows[name].base == before for name, before in zip(trained, [None, *trained])
    )
    assert all(
        weights_of(rows, row).weights == "photo_lite0_blocks4" for row in rows.values() if row.name not in trained
    )
    first, last = (config_of(photo, rows, rows[name], 1000, "folder") for name in ("plain", "cycle"))
    assert (first.standardise, first.cycle, last.standardise, last.cycle, last.cycle_below) == (
        False,
        0,
        True,
        0.5,
        500,
    )
    assert (last.data, last.layer, last.max_images) == ("folder", photo.layer, 1000)
    for options in ([], ["--data", "a"], ["--photos", "b"]):
        with pytest.raises(FeatInvError, match="--world photo needs --data and --photos"):
            ablation.main(["--world", "photo", *options])
    with pytest.raises(FeatInvError, match="the drawn world takes neither"):
        ablation.main(["--data", "a", "--photos", "b"])
    with pytest.raises(FeatInvError, match="the drawn world takes neither"):
        ablation.main(["--data", "a"])


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Uncompiled, two steps of sampling, and a page of its own."""
    monkeypatch.setitem(ablation_rows.SHARED, "compile", "false")
    monkeypatch.setitem(PAPER_SAMPLING, "steps", 2)
    monkeypatch.setitem(ablation.PAGES, "drawn", tmp_path / "page.md")
    monkeypatch.setitem(RESAMPLES, 512, 2)
    (tmp_path / "page.md").write_text("before\n\n<!-- ablation: begin -->\nold\n<!-- ablation: end -->\n\nafter\n")
    out = tmp_path / "out"
    return out, ["--images", "64", "--count", "9", "--out", str(out)]


def test_it_trains_measures_and_reports_once(quick, tmp_path, monkeypatch):
    out, arguments = quick
    ablation.main([*arguments, "--rows", *ROWS])
    result = json.loads((out / "results.json").read_text())
    assert {"unconditional", "round trip", *ROWS} <= result.keys() and sorted(result["rows"]) == sorted(ROWS)
    measures = {"cosine", "cosine_centred", "top1_match", "independent: cosine", "independent: top1_match"}
    kid_names = {"kid (resnet10t.tiny_world, pooled)", "kid (vit_tiny_patch16_224.tiny_world, pooled)"}
    assert all(result[row].keys() >= measures | kid_names and result[row]["cosine"]["n"] == 9 for row in ROWS)
    low, mid, high = (result[condition]["cosine"]["value"] for condition in ("unconditional", "gradient", "round trip"))
    assert result["rows"]["gradient"]["gap_closed"] == pytest.approx((mid - low) / (high - low))
    assert result["rows"]["gradient"]["gain"]["value"] == pytest.approx(mid - result["steps_20"]["cosine"]["value"])
    assert result["rows"]["steps_20"]["gain"] is None  # the row that it builds on was not asked for
    apart = [1 - result[row]["cosine"]["value"] for row in ("paper_1e-5", "gradient")]
    assert (
        result["result"]["distance_ratio"]["value"] == pytest.approx(apart[0] / apart[1])
        and result["rows"]["gradient"]["evaluations"] == 40
    )
    paper, plain, guided = (result["rows"][row]["gmac"] for row in ROWS)
    assert (
        result["result"]["gmac"] == [paper, guided] and 5 < plain / paper < 10 and guided > 2 * plain
    )  # ten times the steps, and decoding
    assert Image.open(out / "panel.png").height > 6 * 144  # original, unconditional, three rows, round trip

    monkeypatch.setattr(ablation, "train", None)
    monkeypatch.setattr(ablation.ModelUnderTest, "reconstruction", lambda *_: None)
    ablation.main([*arguments, "--rows", *ROWS, "--page"])  # nothing is done twice
    text = (tmp_path / "page.md").read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "\n### By the inverted backbone" in text and "\n## " not in text  # the page has its own headings
    assert "| gradient |" in text and "](page.webp)" in text and (tmp_path / "page.webp").is_file()
    ablation.main([*arguments, "--rows", *ROWS, "--page"])
    assert (tmp_path / "page.md").read_text() == text
    with pytest.raises(FeatInvError, match=r"another run \(max_images: 64 there, 128 now"):
        ablation.main([*arguments, "--rows", *ROWS, "--images", "128"])


def test_a_finished_run_of_before_a_field_existed_is_taken_as_it_is(quick, monkeypatch):
    out, arguments = quick
    rows = ABLATIONS["drawn"].rows(64)
    config = config_of(ABLATIONS["drawn"], rows, rows["paper_1e-5"], 64)
    folder = out / "paper_1e-5"
    file = ablation.trained(config, folder)
    known = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(
        yaml.safe_dump({k: v for k, v in known.items() if k not in ("scope", "scope_data", "cycle_after")})
    )
    before = file.read_bytes()
    monkeypatch.setattr(ablation, "train", None)
    assert ablation.trained(config, folder) == file and file.read_bytes() == before
    (folder / "config.yaml").write_text(yaml.safe_dump(known | {"lr": 0.5}))
    with pytest.raises(FeatInvError, match="lr: 0.5 there, 1e-05 now"):
        ablation.trained(config, folder)
