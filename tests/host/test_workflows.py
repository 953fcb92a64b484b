"""Every shipped workflow: its two forms agree, its graph is laid out well, and what it needs is named."""

import json
from pathlib import Path

import pytest
from graph import to_prompt
from layout import IN, LETTERS, OUT, READABLE, SEEN, TITLE, fitted, grows_with, takes
from make_workflows import EMBEDDED as NAMES
from make_workflows import graphs
from PIL import Image
from workflow_parts import RESULT

FOLDER = Path(__file__).resolve().parents[2] / "workflows"
FILES = sorted(FOLDER.glob("*.json"))
EMBEDDED = [f for f in FILES if f.name.startswith(NAMES)]
PICTURED = [f for f in EMBEDDED if f.with_suffix(".png").is_file()]


def id_of(path):
    return path.stem


@pytest.mark.parametrize("file", FILES, ids=id_of)
def test_is_what_its_source_builds(info, file):
    """The frontend's form, read as the frontend reads it, is the graph that was meant: none has gone stale."""
    workflow = json.loads(file.read_text())
    result, meant = to_prompt(workflow, info), graphs()[file.stem].prompt()
    assert result.keys() == meant.keys()
    for number, node in meant.items():
        assert result[number]["class_type"] == node["class_type"]
        for name, value in node["inputs"].items():
            assert result[number]["inputs"][name] == value, (node["class_type"], name)
    notes = [node for node in workflow["nodes"] if node["type"] == "MarkdownNote"]
    assert len(notes) == 2 and all(len(note["widgets_values"][0]) > 60 for note in notes)


@pytest.mark.parametrize("file", PICTURED, ids=id_of)
def test_the_picture_carries_the_workflow(info, file):
    with Image.open(file.with_suffix(".png")) as picture:
        assert json.loads(picture.text["workflow"]) == json.loads(file.read_text())
        assert json.loads(picture.text["prompt"]) == to_prompt(json.loads(file.read_text()), info)


@pytest.mark.parametrize("file", [f for f in FILES if f not in EMBEDDED], ids=id_of)
def test_only_files_are_missing_for_the_others(server, info, file):
    """A fresh host refuses the workflows of real models for their files alone; each download names its folder."""
    workflow = json.loads(file.read_text())
    _, answer = server.post("/prompt", {"prompt": to_prompt(workflow, info)})
    wrong = [
        (error["type"], error["extra_info"].get("input_name"))
        for node in answer["node_errors"].values()
        for error in node["errors"]
    ]
    missing = {name for _, name in wrong}
    named = [model for node in workflow["nodes"] for model in node["properties"].get("models", [])]
    needs = "".join(n["widgets_values"][0] for n in workflow["nodes"] if n.get("title") == "What it needs")
    if file.stem.startswith("rae"):  # folders, which one command fetches
        assert missing <= {"weights", "decoder"} and not named
        assert "python3 run.py download rae-dinov2-base" in needs
        return
    assert {"ckpt_name"} <= missing <= {"ckpt_name", "weights", "file"}, wrong
    assert {m["directory"] for m in named} == {"checkpoints", "backbones"} and all(
        m["url"].startswith("https://") for m in named
    )
    # the oldest hosts' dialog of missing models offers no other kind of file
    assert all(m["name"].endswith(".safetensors") and m["url"].endswith(".safetensors") for m in named)
    if file.stem.startswith("minisd"):
        assert "train it with `accelerate launch training/train.py --config" in needs
    else:  # nothing to train: what is already there, or one command away
        assert "choose yours in Load Checkpoint" in needs and "python3 run.py download" in needs
        assert "Empty Latent Image sets the size" in needs


def grows_of(workflow):
    return grows_with(sum(" sees" in g["title"] and g["title"] != SEEN for g in workflow["groups"]))


@pytest.mark.parametrize("file", FILES, ids=id_of)
def test_every_graph_opens_large_enough_to_read(file):
    """With letters on the nodes: in the saved view, and in the one that the newest host chooses for a template."""
    workflow = json.loads(file.read_text())
    assert workflow["extra"]["ds"]["scale"] >= READABLE
    assert fitted(workflow["nodes"]) > LETTERS


@pytest.mark.parametrize("file", FILES, ids=id_of)
def test_nothing_overlaps(file):
    """Nodes with their title bars and what they will show, and the notes."""
    workflow = json.loads(file.read_text())
    nodes, grows = workflow["nodes"], grows_of(workflow)
    boxes = [(x, y - TITLE, x + n["size"][0], y - TITLE + takes(n, grows)) for n in nodes for x, y in [n["pos"]]]
    for number, (left, top, right, bottom) in enumerate(boxes):
        for x0, y0, x1, y1 in boxes[:number]:
            assert right <= x0 or x1 <= left or bottom <= y0 or y1 <= top, nodes[number]


@pytest.mark.parametrize("file", FILES, ids=id_of)
def test_every_node_stands_in_a_group_with_a_title(file):
    workflow = json.loads(file.read_text())
    titles = [group["title"] for group in workflow["groups"]]
    assert titles[0] == IN and titles[-1] == OUT and any(" sees" in title for title in titles)
    for node in workflow["nodes"]:
        x, y, bottom = *node["pos"], node["pos"][1] - TITLE + takes(node, grows_of(workflow))
        inside = [
            group["title"]
            for group in workflow["groups"]
            for left, top, width, height in [group["bounding"]]
            if left < x and x + node["size"][0] < left + width and top < y - TITLE and bottom < top + height
        ]
        assert len(inside) == 1, (node["type"], node.get("title"), inside)


@pytest.mark.parametrize("file", FILES, ids=id_of)
def test_every_workflow_has_a_thumbnail(file):
    """Where the template browser looks for it."""
    with Image.open(file.with_suffix(".jpg")) as thumbnail:
        assert thumbnail.format == "JPEG" and thumbnail.width >= 256
    assert file.with_suffix(".jpg").stat().st_size < 100_000


@pytest.mark.parametrize("name", ["photo_reconstruct", "tiny_reconstruct"])
def test_a_first_picture_takes_few_nodes_of_the_pack(name):
    nodes = json.loads((FOLDER / f"{name}.json").read_text())["nodes"]
    ours = [node["type"] for node in nodes if node["type"].startswith("FeatInv")]
    assert len(ours) <= 6 and "FeatInv_Loader" in ours
    original, result = (
        next(node for node in nodes if node.get("title", "").startswith(title)) for title in ("Original", RESULT)
    )
    assert original["size"] == result["size"] and original["pos"][1] == result["pos"][1]  # side by side
