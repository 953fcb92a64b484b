"""Every workflow that needs no download: it runs on a fresh host, queued by the frontend where there is a browser, and
its result is what it promises."""

import json

import pytest
from make_workflows import EMBEDDED, FOLDER
from workflow_parts import REPORT, RESULT, SIMILARITY

#: least cosine similarity that each shows: of the map asked for, or of the mixed one, which no picture may have
LEAST = {
    "tiny_reconstruct": 0.9,
    "tiny_seeds": 0.9,
    "tiny_interpolate": 0.8,
    "tiny_compose": 0.65,
    "tiny_attenuate": 0.7,
    "tiny_viz": 0.7,
    "tiny_discover": 0.65,
    "tiny_backbones": 0.6,
    "tiny_two_guidances": 0.95,
    "tiny_faithful": 0.98,
    "tiny_untrained": 0.7,
    "photo_reconstruct": 0.55,
    "photo_seeds": 0.55,
    "photo_interpolate": 0.35,
    "photo_compose": 0.35,
    "photo_viz": 0.35,
    "photo_depth": 0.25,
    "photo_concept": 0.35,
    "photo_untrained": 0.4,
    "photo_rae_reconstruct": 0.3,
    "photo_rae_mix": 0.25,
    "photo_rae_attenuate": 0.25,
    "photo_rae_guide": 0.5,
}


def read(name):
    return json.loads((FOLDER / f"{name}.json").read_text())


def test_every_such_workflow_is_here():
    assert {file.stem for file in FOLDER.glob("*.json") if file.stem.startswith(EMBEDDED)} == LEAST.keys()


@pytest.mark.parametrize("name", LEAST)
def test_runs_and_shows_what_it_promises(outputs, name):
    workflow, shown = read(name), outputs[name]
    numbers = [
        float(shown[str(n["id"])]["text"][0].split()[-1])
        for n in workflow["nodes"]
        if n.get("title", "").startswith(SIMILARITY)
    ]
    assert numbers and min(numbers) >= LEAST[name], numbers
    results = [n for n in workflow["nodes"] if n.get("title", "").startswith(RESULT)]
    assert results and all(shown[str(n["id"])]["images"] for n in results)


@pytest.mark.parametrize("name", ["tiny_attenuate", "tiny_viz"])
def test_the_closed_loop_reaches_what_was_asked(outputs, name):
    """It says so on the node, and in the report behind it."""
    workflow, outputs = read(name), outputs[name]
    (node,) = [n for n in workflow["nodes"] if n["type"] == "FeatInv_ClosedLoop"]
    shown = outputs[str(node["id"])]
    said = shown["text"][0]
    assert shown["images"] and said.count("(as requested)") == len(said.splitlines()) == len(shown["images"])
    assert said in [outputs[str(n["id"])]["text"][0] for n in workflow["nodes"] if n["type"] == "PreviewAny"]


def test_the_shown_concepts_were_turned_down_as_asked(outputs):
    """FeatInv-Viz says so itself, a line per variant; and the scope of the changed maps is shown."""
    workflow = read("tiny_viz")
    report, scope = (
        outputs["tiny_viz"][str(n["id"])]["text"][0]
        for title in (REPORT, "Scope")
        for n in workflow["nodes"]
        if n.get("title") == title
    )
    assert [line.split(":")[0] for line in report.splitlines()] == ["object", "sky"] and report.count(
        "(as requested)"
    ) == 2
    assert "of 2 maps inside" in scope
