"""The thumbnail of a workflow that cannot run here: its graph, drawn small."""

from __future__ import annotations

from layout import TITLE, collapsed
from PIL import Image, ImageDraw, ImageFont

SIDE, EDGE = 400, 8  # pixels: width of the picture, and around the graph
PAPER, BODY, BAR, INK = "#232323", "#3c3c3c", "#515151", "#e0e0e0"
#: as in featinv_nodes/web/js/colors.js, and the host's own
WIRES = {
    "FEATINV_BACKBONE": "#f4e9cd",
    "FEATINV_FEATURES": "#00e5a8",
    "FEATINV_CONTROL_NET": "#3d7bff",
    "FEATINV_FEATURE_DECODER": "#ff9f1c",
    "FEATINV_CONCEPTS": "#e040fb",
    "FEATINV_EDIT": "#c6ff00",
    "FEATINV_LINEAR_MAP": "#ff7043",
    "IMAGE": "#64b5f6",
    "LATENT": "#ff9cf9",
    "MODEL": "#b39ddb",
    "CONDITIONING": "#ffa931",
    "VAE": "#ff6e6e",
}


def sketch(workflow: dict, info: dict) -> Image.Image:
    """Groups, nodes and wires of a workflow in the frontend's form; info: the server's /object_info."""
    left, top = (min(g["bounding"][i] for g in workflow["groups"]) for i in (0, 1))
    right, bottom = (max(g["bounding"][i] + g["bounding"][i + 2] for g in workflow["groups"]) for i in (0, 1))
    scale = 2 * (SIDE - 2 * EDGE) / (right - left)  # drawn at twice the size, then made smaller
    picture = Image.new("RGB", (2 * SIDE, round(scale * (bottom - top)) + 4 * EDGE), PAPER)
    draw = ImageDraw.Draw(picture)

    def at(x: float, y: float) -> tuple[float, float]:
        return (x - left) * scale + 2 * EDGE, (y - top) * scale + 2 * EDGE

    def write(x: float, y: float, text: str, size: float) -> None:
        draw.text(at(x, y), text, INK, ImageFont.load_default(size * scale))

    for group in workflow["groups"]:
        x, y, width, height = group["bounding"]
        draw.rounded_rectangle((*at(x, y), *at(x + width, y + height)), 8, fill=group["color"], outline=BAR)
        draw.rounded_rectangle((*at(x + 6, y + 54), *at(x + width - 6, y + height - 6)), 6, fill="#2c2c2c")
        write(x + 16, y + 4, group["title"], 40)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for _, origin, slot, target, entry, kind in workflow["links"]:
        start, end = nodes[origin], nodes[target]
        a = start["pos"][0] + start["size"][0], start["pos"][1] + 14 + 20 * slot
        b = end["pos"][0], end["pos"][1] + (-TITLE / 2 if collapsed(end) else 14 + 20 * entry)
        draw.line([at(*p) for p in curve(a, b)], WIRES.get(kind, "#999999"), 3)
    for node in nodes.values():
        (x, y), (width, height) = node["pos"], node["size"]
        height = 0 if collapsed(node) else height
        draw.rounded_rectangle((*at(x, y - TITLE), *at(x + width, y + height)), 6, fill=node.get("bgcolor", BODY))
        draw.rounded_rectangle((*at(x, y - TITLE), *at(x + width, y)), 6, fill=node.get("color", BAR))
        write(x + 10, y - TITLE + 2, node.get("title") or info[node["type"]]["display_name"], 24)
    return picture.resize((SIDE, round(picture.height / 2)), Image.Resampling.LANCZOS)


def curve(a: tuple[float, float], b: tuple[float, float]) -> list[tuple[float, float]]:
    """Points of a wire that leaves to the right and arrives from the left."""
    bend = max(abs(b[0] - a[0]) / 2, 40)
    points = (a, (a[0] + bend, a[1]), (b[0] - bend, b[1]), b)
    result = []
    for step in range(21):
        t = step / 20
        weights = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3)
        result.append(tuple(sum(w * p[i] for w, p in zip(weights, points)) for i in (0, 1)))
    return result
