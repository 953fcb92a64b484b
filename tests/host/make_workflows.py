"""Writes workflows/: every graph in the frontend's form, the images of the embedded worlds' drawn by a real host.

    python tests/host/make_workflows.py            with the first ComfyUI checkout that the tests find
    python tests/host/make_workflows.py photo      those whose names begin so
    python tests/host/make_workflows.py photo --graphs-only

NAME.json is the workflow, NAME.jpg its thumbnail, NAME.png the same image carrying the workflow for drag and drop. No
image of a host's own is shown: in thumbnails example.png is scikit-learn's china.jpg, the second image flower.jpg.
The thumbnail of a workflow that needs downloads is its graph.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from graph import Graph, dump, to_prompt
from hosts import PACK, Server, find_hosts
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from workflow_concepts import attenuate, concept, discover, viz
from workflow_decoders import DECODED
from workflow_parts import RESULT
from workflow_pictures import backbones, compose, depth, faithful, interpolate, reconstruct, seeds, two_guidances
from workflow_sketch import sketch
from workflow_untrained import untrained
from workflow_worlds import EXAMPLE, TURNED, Drawn, MiniSD, Photo, StableDiffusion15, StableDiffusionXL

FOLDER = PACK / "workflows"
SECOND = "flower.png"
HIGH = 200  # pixels of a thumbnail


COMMON = (reconstruct, seeds, interpolate, compose, viz)
WORKFLOWS = {
    Drawn: (*COMMON, attenuate, discover, backbones, two_guidances, faithful, untrained),
    Photo: (*COMMON, depth, concept, untrained),
    MiniSD: (*COMMON, attenuate, discover, backbones, two_guidances, faithful),
    StableDiffusion15: (untrained,),
    StableDiffusionXL: (untrained,),
    **DECODED,
}
#: beginnings of the names of those that run without downloads
EMBEDDED = tuple(kind.prefix for kind in WORKFLOWS if kind.embedded)


def graphs() -> dict[str, Graph]:
    """All workflows by name."""
    result = {}
    for kind, builders in WORKFLOWS.items():
        for build in builders:
            graph = Graph()
            world = kind(graph, build.__name__)
            graph.note = build(world)
            graph.needs = "\n\n".join(text for text in (world.note, graph.needs) if text)
            result[f"{world.prefix}_{build.__name__}"] = graph
    return result


def results(server: Server, workflow: dict, outputs: dict) -> Image.Image:
    """The pictures of the nodes titled Result (and those beside them that show an original), in a row."""
    previews = [
        n
        for n in workflow["nodes"]
        if n["type"] == "PreviewImage" and n["title"].startswith((RESULT, *Graph.GIVEN[:3]))
    ]
    previews.sort(key=lambda n: not n["title"].startswith(Graph.GIVEN))
    pictures = []
    for node in previews:
        for entry in outputs[str(node["id"])]["images"]:
            query = f"/view?filename={entry['filename']}&subfolder={entry['subfolder']}&type={entry['type']}"
            pictures.append(Image.open(io.BytesIO(server.file(query))).convert("RGB"))
    side = 256
    pictures = [
        p.resize((side, round(p.height * side / p.width)), Image.Resampling.NEAREST) if p.width != side else p
        for p in pictures
    ]
    sheet = Image.new(
        "RGB", (sum(p.width for p in pictures) + 8 * (len(pictures) - 1), max(p.height for p in pictures)), "white"
    )
    x = 0
    for p in pictures:
        sheet.paste(p, (x, 0))
        x += p.width + 8
    return sheet


def with_second_picture(prompt: dict, graph: Graph) -> dict:
    """The prompt as a user runs it who has a second picture and bypassed the flip that stood in for one."""
    instead = {str(node.id): prompt[str(node.id)]["inputs"]["image"] for node in graph.nodes if node.title == TURNED}
    changed = {}
    for number, node in prompt.items():
        inputs = {
            name: instead.get(value[0], value) if isinstance(value, list) else value
            for name, value in node["inputs"].items()
        }
        changed[number] = node | {"inputs": inputs}
    for number, _ in instead.values():
        changed[number]["inputs"]["image"] = SECOND
    return changed


def write(server: Server, name: str, graph: Graph, info: dict, pictures: bool) -> None:
    workflow = graph.frontend(info)
    (FOLDER / f"{name}.json").write_text(dump(workflow))
    thumbnail, carrier = FOLDER / f"{name}.jpg", FOLDER / f"{name}.png"
    if not name.startswith(EMBEDDED):
        sketch(workflow, info).save(thumbnail, quality=70, optimize=True)
        return
    prompt = to_prompt(workflow, info)
    if pictures:
        picture = results(server, workflow, server.run(with_second_picture(prompt, graph)))
        low = picture.resize((round(picture.width * HIGH / picture.height), HIGH), Image.Resampling.LANCZOS)
        low.save(thumbnail, quality=75, optimize=True, progressive=True)
        picture = picture.quantize(256, dither=Image.Dither.NONE)
    elif carrier.is_file():
        with Image.open(carrier) as before:
            picture = before.copy()
    else:
        return
    carried = PngInfo()
    carried.add_text("prompt", json.dumps(prompt))
    carried.add_text("workflow", json.dumps(workflow))
    picture.save(carrier, pnginfo=carried, optimize=True)
    print(f"wrote {name}: {picture.size}", flush=True)


def main() -> None:
    from sklearn.datasets import load_sample_image  # takes seconds; the tests import this file for its graphs

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=[""], help="beginnings of the workflows' names (default: all)")
    parser.add_argument("--graphs-only", action="store_true", help="draw nothing: the images stay as they are")
    options = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as base:
        server = Server(find_hosts()[0], Path(base))
        try:
            for file, picture in ((EXAMPLE, "china.jpg"), (SECOND, "flower.jpg")):
                Image.fromarray(load_sample_image(picture)).save(Path(base, "input", file))
            info = server.get("/object_info")
            for name, graph in graphs().items():
                if name.startswith(tuple(options.names)):
                    write(server, name, graph, info, not options.graphs_only)
        finally:
            server.stop()


if __name__ == "__main__":
    main()
