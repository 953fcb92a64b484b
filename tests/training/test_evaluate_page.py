"""The page of the drawn world's evaluation is made of what evaluate.py finds, and of nothing else."""

import json

import numpy as np
import pytest
from PIL import Image

from featinv_nodes.core.errors import FeatInvError
from training.evaluation.suites.guidances import PAPER
from training.experiments import evaluation_page
from training.experiments.page_tables import PANELS, TABLES
from training.report import save_image


def test_every_run_has_its_place_in_the_page():
    assert list(TABLES) and TABLES.keys() == evaluation_page.RUNS.keys()
    for name, one in evaluation_page.RUNS.items():
        text = one.page.read_text()
        again = evaluation_page.fill(text, name, "NEW")
        assert f"<!-- {name} -->\n\nNEW\n\n<!-- end {name} -->\n" in again
        assert evaluation_page.fill(again, name, "NEW") == again
        head, tail = text.split(f"<!-- {name} -->")[0], text.split(f"<!-- end {name} -->")[1]
        assert again.startswith(head) and again.endswith(tail)
    with pytest.raises(FeatInvError, match="no lines <!-- quality -->"):
        evaluation_page.fill("nothing", "quality", "NEW")


def test_a_page_shows_its_pictures_in_the_smaller_form(tmp_path):
    """Few colours come back exactly; noise, which a palette would spoil, within the coder's loss."""
    rng = np.random.default_rng(0)
    drawn = np.repeat(np.repeat(rng.integers(0, 100, (16, 16, 1), np.uint8), 9, 0), 9, 1) * np.uint8([1, 2, 0])
    rough = rng.normal(128, 25, (144, 144, 3)).clip(0, 255).astype(np.uint8)
    back = []
    for number, pixels in enumerate((drawn, rough)):
        file = tmp_path / f"{number}.webp"
        save_image(Image.fromarray(pixels), file)
        with Image.open(file) as picture:
            back.append(np.asarray(picture.convert("RGB")).astype(int))
    assert np.array_equal(back[0], drawn)
    assert 0 < np.abs(back[1] - rough).mean() < 25 and len(np.unique(back[1].reshape(-1, 3), axis=0)) > 256
    for name, panels in PANELS.items():
        text = evaluation_page.RUNS[name].page.read_text()
        assert all(f"]({here})" in text and (evaluation_page.PAGE.parent / here).is_file() for here in panels.values())


def test_tables_are_what_the_evaluation_found(tmp_path):
    """Two scenes, one step: quality's and the sweep's tables stand between their marks, all else is as it was."""
    page = tmp_path / "page.md"
    options = "--steps 1 --device cpu"
    evaluation_page.main(
        ["--only", "quality", "--count", "8", "--options", options, "--out", str(tmp_path / "out"), "--page", str(page)]
    )
    result, text = json.loads((tmp_path / "out" / "quality" / "results.json").read_text()), page.read_text()
    entry = result["reconstruction"]["cosine"]
    assert "`python training/evaluate.py --suite quality --count 8` (n = 8)" in text
    assert f"| {entry['value']:.3f} ({entry['low']:.3f} to {entry['high']:.3f}, few) |" in text
    own = evaluation_page.PAGE.read_text()
    assert text.split("<!-- end quality -->")[1] == own.split("<!-- end quality -->")[1]


def test_no_run_begins_for_a_page_without_its_place(tmp_path, monkeypatch):
    (tmp_path / "page.md").write_text("nothing")
    monkeypatch.setattr(evaluation_page, "run_suite", lambda args: pytest.fail("began"))
    with pytest.raises(FeatInvError, match="no lines"):
        evaluation_page.main(["--only", "layers", "--out", str(tmp_path), "--page", str(tmp_path / "page.md")])


def entry(value):
    return {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 500}


def measures_of(value):
    return {
        "cosine": entry(value),
        "independent: cosine": entry(value - 0.2),
        "top1_match": entry(value),
        "independent: top1_match": entry(value),
        "kid_paired (x, pooled)": entry(value / 10),
    }


def test_each_pair_of_scales_stands_in_its_row_and_column():
    conditions = {
        "features=1, text=0": 0.5,
        "features=1, text=2": 0.6,
        "features=3, text=0": 0.7,
        "features=3, text=2": 0.8,
        "against text=3": 0.65,
    }
    result = {
        condition: measures_of(value)
        for condition, value in (conditions | {"unconditional": 0.3, PAPER: 0.4, "round trip": 0.9}).items()
    }
    lines = TABLES["guidances"](
        result
        | {
            "settings": {"guidances": [3.0, 1.0], "text_guidances": [0.0, 2.0]},
            "best": {"cosine": "features=3, text=2"},
        }
    )
    assert "| 1 | 0.500 | 0.600 |  |" in lines and "| 3 | 0.700 | 0.800 | 0.650 |" in lines  # the cosine
    assert (
        "| 3 | 0.500 | 0.600 | 0.450 |" in lines and "| 3 | 0.0700 | 0.0800 | 0.0650 |" in lines
    )  # the independent backbone, KID
    assert [line.split(" |")[0] for line in lines[-4:]] == [
        "| unconditional",
        f"| {PAPER}",
        "| features=3, text=2",
        "| round trip",
    ]


def test_the_cost_of_a_setting_stands_beside_what_it_gives():
    conditions = {"ddim, 8 steps": 0.8, PAPER: 0.7}
    costs = {"ddim, 8 steps": {"evaluations": 16, "gmac": 1.46}, PAPER: {"evaluations": 100, "gmac": 7.96}}
    lines = TABLES["cost"](
        {condition: measures_of(value) for condition, value in (conditions | {"unconditional": 0.3}).items()}
        | {"costs": costs, "recommended": "ddim, 8 steps"}
    )
    assert lines[2].startswith("| ddim, 8 steps | 16 | 1.5 | 0.800 (0.700 to 0.900) | 0.600") and lines[3].startswith(
        f"| {PAPER} | 100 | 8.0 |"
    )
    assert lines[-1].endswith("cosine: ddim, 8 steps.")
