"""Every shipped workflow: its two forms agree, it runs on a fresh host, and the result is what it promises."""

import json
from pathlib import Path

import pytest
from graph import to_prompt
from make_workflows import REPORT, RESULT, SIMILARITY, graphs
from PIL import Image

FOLDER = Path(__file__).resolve().parents[2] / "workflows"
FILES = sorted(FOLDER.glob("*.json"))
EMBEDDED = [f for f in FILES if not f.name.startswith("minisd")]
#: thumbnails of a world's workflows are made together
PICTURED = [f for f in EMBEDDED if any(FOLDER.glob(f"{f.stem.split('_')[0]}_*.png"))]
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
    "photo_reconstruct": 0.55,
    "photo_seeds": 0.55,
    "photo_interpolate": 0.35,
    "photo_compose": 0.35,
    "photo_viz": 0.35,
    "photo_depth": 0.25,
    "photo_concept": 0.35,
}


def id_of(path):
    return path.stem


@pytest.mark.parametrize("file", FILES, ids=id_of)
def test_is_what_its_source_builds(server, file):
    """The frontend's form, read as the frontend reads it, is the graph that was meant: none has gone stale."""
    info = server.get("/object_info")
    workflow = json.loads(file.read_text())
    result, meant = to_prompt(workflow, info), graphs()[file.stem].prompt()
    assert result.keys() == meant.keys()
    for number, node in meant.items():
        assert result[number]["class_type"] == node["class_type"]
        for name, value in node["inputs"].items():
            assert result[number]["inputs"][name] == value, (node["class_type"], name)
    notes = [node for node in workflow["nodes"] if node["type"] == "MarkdownNote"]
    assert len(notes) == 1 and len(notes[0]["widgets_values"][0]) > 80


@pytest.mark.parametrize("file", EMBEDDED, ids=id_of)
def test_runs_and_shows_what_it_promises(server, file):
    workflow = json.loads(file.read_text())
    outputs = server.run(to_prompt(workflow, server.get("/object_info")))
    numbers = [
        float(outputs[str(n["id"])]["text"][0]) for n in workflow["nodes"] if n.get("title", "").startswith(SIMILARITY)
    ]
    assert numbers and min(numbers) >= LEAST[file.stem], numbers
    results = [n for n in workflow["nodes"] if n.get("title", "").startswith(RESULT)]
    assert results and all(outputs[str(n["id"])]["images"] for n in results)


@pytest.mark.parametrize("file", ["tiny_attenuate", "tiny_viz"])
def test_the_closed_loop_reaches_what_was_asked(server, file):
    """It says so on the node, and in the report behind it."""
    workflow = json.loads((FOLDER / f"{file}.json").read_text())
    outputs = server.run(to_prompt(workflow, server.get("/object_info")))
    (node,) = [n for n in workflow["nodes"] if n["type"] == "FeatInv_ClosedLoop"]
    shown = outputs[str(node["id"])]
    said = shown["text"][0]
    assert shown["images"] and said.count("(as asked)") == len(said.splitlines()) == len(shown["images"])
    assert said in [outputs[str(n["id"])]["text"][0] for n in workflow["nodes"] if n["type"] == "PreviewAny"]


def test_the_shown_concepts_were_turned_down_as_asked(server):
    """FeatInv-Viz says so itself, a line per variant; and the scope of the changed maps is shown."""
    workflow = json.loads((FOLDER / "tiny_viz.json").read_text())
    outputs = server.run(to_prompt(workflow, server.get("/object_info")))
    report, scope = (
        outputs[str(n["id"])]["text"][0]
        for title in (REPORT, "Scope")
        for n in workflow["nodes"]
        if n.get("title") == title
    )
    assert [line.split(":")[0] for line in report.splitlines()] == ["object", "sky"] and report.count("(as asked)") == 2
    assert "of 2 maps inside" in scope


@pytest.mark.parametrize("file", PICTURED, ids=id_of)
def test_the_picture_carries_the_workflow(server, file):
    with Image.open(file.with_suffix(".png")) as picture:
        assert json.loads(picture.text["workflow"]) == json.loads(file.read_text())
        assert json.loads(picture.text["prompt"]) == to_prompt(json.loads(file.read_text()), server.get("/object_info"))
    with Image.open(file.with_suffix(".jpg")) as thumbnail:
        assert thumbnail.height >= 256


@pytest.mark.parametrize("file", [f for f in FILES if f not in EMBEDDED], ids=id_of)
def test_only_files_are_missing_for_the_others(server, file):
    """A fresh host refuses the workflows of real models for their files alone; each download names its folder."""
    workflow = json.loads(file.read_text())
    _, answer = server.post("/prompt", {"prompt": to_prompt(workflow, server.get("/object_info"))})
    wrong = [
        (error["type"], error["extra_info"].get("input_name"))
        for node in answer["node_errors"].values()
        for error in node["errors"]
    ]
    assert {"ckpt_name"} <= {name for _, name in wrong} <= {"ckpt_name", "weights", "file"}, wrong
    named = [model for node in workflow["nodes"] for model in node["properties"].get("models", [])]
    assert {m["directory"] for m in named} == {"checkpoints", "backbones"} and all(
        m["url"].startswith("https://") for m in named
    )


@pytest.mark.parametrize("file", [f for f in FILES if f.name.startswith("photo")], ids=id_of)
def test_nothing_overlaps(file):
    """Nodes with their title bars, and the note."""
    nodes = json.loads(file.read_text())["nodes"]
    boxes = [(n["pos"][0], n["pos"][1] - 30, n["pos"][0] + n["size"][0], n["pos"][1] + n["size"][1]) for n in nodes]
    for number, (left, top, right, bottom) in enumerate(boxes):
        for x0, y0, x1, y1 in boxes[:number]:
            assert right <= x0 or x1 <= left or bottom <= y0 or y1 <= top, nodes[number]
