"""The page of the embedded world's evaluation is made of what evaluate.py finds, and of nothing else."""

import json

import pytest

from featinv_nodes.core.feature_map import FeatInvError
from training import evaluate, evaluation_page
from training.evaluation.page import TABLES


def test_every_run_has_its_place_in_the_page():
    text = evaluation_page.PAGE.read_text()
    assert list(TABLES) and TABLES.keys() == evaluation_page.RUNS.keys()
    for name in evaluation_page.RUNS:
        again = evaluation_page.fill(text, name, "NEW")
        assert f"<!-- {name} -->\n\nNEW\n\n<!-- end {name} -->\n" in again
        assert evaluation_page.fill(again, name, "NEW") == again
        head, tail = text.split(f"<!-- {name} -->")[0], text.split(f"<!-- end {name} -->")[1]
        assert again.startswith(head) and again.endswith(tail)
    with pytest.raises(FeatInvError, match="no lines <!-- quality -->"):
        evaluation_page.fill("nothing", "quality", "NEW")


def test_tables_are_what_the_evaluation_found(tmp_path):
    """Two scenes, one step: quality's and the sweep's tables stand between their marks, all else is as it was."""
    page = tmp_path / "page.md"
    options = "--steps 1 --device cpu"
    evaluation_page.main(["--only", "quality", "--count", "8", "--options", options, "--out", str(tmp_path / "out"), "--page", str(page)])
    found, text = json.loads((tmp_path / "out" / "quality" / "results.json").read_text()), page.read_text()
    entry = found["reconstruction"]["cosine"]
    assert "`python training/evaluate.py --suite quality --count 8` (n = 8)" in text
    assert f"| {entry['value']:.3f} ({entry['low']:.3f} to {entry['high']:.3f}) |" in text
    own = evaluation_page.PAGE.read_text()
    assert text.split("<!-- end quality -->")[1] == own.split("<!-- end quality -->")[1]


def test_no_run_begins_for_a_page_without_its_place(tmp_path, monkeypatch):
    (tmp_path / "page.md").write_text("nothing")
    monkeypatch.setattr(evaluate, "main", lambda argv: pytest.fail("began"))
    with pytest.raises(FeatInvError, match="no lines"):
        evaluation_page.main(["--only", "layers", "--out", str(tmp_path), "--page", str(tmp_path / "page.md")])
