"""Where the nodes of a graph stand: in groups from left to right by what they are for, each in columns along the links,
so that the whole graph fills a screen and nothing is covered once the nodes show their texts and images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

WIDTHS = 300, 285, 270, 265  # of a column: the first with which the graph is large enough
GAP, BELOW = 20, 20  # between columns, and between the nodes of one
TITLE, SLOT, WIDGET = 30, 20, 24  # pixels of the host's: a title bar, a row of sockets, a widget
EDGE, HEAD, APART = 12, 84, 16  # of a group: around its nodes, above their title bars, to the next one
READABLE = 0.6  # the least zoom of the saved view at which the oldest host draws the letters on nodes
LETTERS = 8 / 14  # the same for the newest host, which draws no letters below 8 pixels
FILLED = 0.75  # share of the screen that it fills with a template's nodes, whatever view is saved
BACK = 0.01  # share of the zoom that one wire which runs back to the left may cost
WINDOW = 1920, 950  # what a browser leaves of a screen
SCREEN, LEFT, TOP, RIGHT, BOTTOM = (1920, 1080), 76, 100, 76, 88  # in pixels, and what the host's own bars cover

IN, SEEN, DRAWN, OUT = "What goes in", "What the model sees", "How it is drawn", "What comes out"
COLORS = {IN: "#3f789e", SEEN: "#3f8f6b", DRAWN: "#8f7a3f", OUT: "#7a4f8f"}
STAGES = {
    IN: "FeatInv_LoadTinyWorld FeatInv_Loader FeatInv_LoadBackbone FeatInv_LoadFeatInvControlNet FeatInv_LoadConcepts"
    " FeatInv_LoadFeatureDecoder FeatInv_TinyWorldScenes CheckpointLoaderSimple CLIPTextEncode LoadImage ImageFlip"
    " ImageBatch SolidMask MaskComposite",
    SEEN: "FeatInv_ExtractFeatures FeatInv_PreviewFeatures FeatInv_DiscoverConcepts FeatInv_ConceptMap"
    " FeatInv_ConceptAttenuate FeatInv_FeatureMix FeatInv_PairedLatents MaskToImage",
    DRAWN: "FeatInv_FeatureGuidance FeatInv_GuidanceSampler FeatInvControlNet FeatInv_ClosedLoop"
    " FeatInv_DecodeFeatures VAEEncode EmptyLatentImage"
    " RepeatLatentBatch KSampler KSamplerSelect CFGGuider DualCFGGuider BasicScheduler RandomNoise"
    " SamplerCustomAdvanced",
}
STAGE_OF = {kind: stage for stage, kinds in STAGES.items() for kind in kinds.split()}
#: pictures before models before what draws: short wires to what reads them
FIRST = ("LoadImage", "FeatInv_TinyWorldScenes", "ImageFlip", "ImageBatch", "SolidMask", "MaskComposite")
LAST = ("FeatInv_LoadTinyWorld", "CheckpointLoaderSimple", "CLIPTextEncode")
#: pixels inside a node besides sockets and widgets
INSIDE = {
    "LoadImage": 250,
    "PreviewImage": 260,
    "FeatInv_PreviewFeatures": 260,
    "CLIPTextEncode": 80,
    "PreviewAny": 110,
}
#: pixels by which a node grows once it shows its text or a picture
GROWS = {
    "FeatInv_Loader": 180,
    "FeatInv_LoadBackbone": 130,
    "FeatInv_LoadFeatInvControlNet": 180,
    "FeatInv_LoadFeatureDecoder": 90,
    "FeatInv_ExtractFeatures": 60,
    "FeatInv_DiscoverConcepts": 180,
    "FeatInv_ConceptAttenuate": 90,
    "FeatInv_ConceptMap": 20,
    "FeatInvControlNet": 100,
    "FeatInv_FeatureGuidance": 60,
    "FeatInv_GuidanceSampler": 60,
    "FeatInv_FeatureSimilarity": 180,
    "FeatInv_KeepMostSimilar": 60,
    "FeatInv_ClassifyImage": 140,
    "FeatInv_LoadConcepts": 140,
    "FeatInv_Viz": 130,
    "FeatInv_ClosedLoop": 340,
    "KSampler": 240,
    "SamplerCustomAdvanced": 240,
}
#: the same beside many lanes, each of which compares one picture and shows one line
GROWS_IN_LANES = GROWS | {"FeatInv_FeatureSimilarity": 100}
MANY = 3  # lanes from which on all is packed closer


class Way(NamedTuple):
    """A way to place a graph: columns at most `tall` and `column` wide, `wide` lanes beside each other."""

    tall: float
    wide: int
    column: int


@dataclass
class Box:
    """left, top, right, bottom of a group's nodes, title bars included."""

    left: float
    top: float
    right: float
    bottom: float


def size_of(kind: str, sockets: int, widgets: int) -> list[int]:
    """Width and height of a node before it has run, without its title bar."""
    return [WIDTHS[0], 6 + SLOT * sockets + (WIDGET * widgets + 8 if widgets else 0) + INSIDE.get(kind, 0)]


def grows_with(lanes: int) -> dict[str, int]:
    return GROWS_IN_LANES if lanes >= MANY else GROWS


def collapsed(entry: dict) -> bool:
    return bool(entry["flags"].get("collapsed"))


def takes(entry: dict, grows: dict[str, int] = GROWS) -> int:
    """Height of a node in its column, with title bar and all that it will show."""
    return TITLE if collapsed(entry) else TITLE + entry["size"][1] + grows.get(entry["type"], 0)


def depths(members: list) -> dict[int, int]:
    """Of each node: how many of the members stand before it along the links."""
    result: dict[int, int] = {}
    for node in members:  # a node is added after what it reads
        result[node.id] = max((result[r.node.id] + 1 for r in node.read() if r.node.id in result), default=0)
    return result


def columns(members: list, entries: dict[int, dict], tall: float) -> list[list]:
    """The members along their links, several steps in a column as long as it is not higher than tall."""
    depth = depths(members)
    rank = {node.id: (node.type not in FIRST) + (node.type in LAST) for node in members}
    result, filled = [], 0.0
    for node in sorted(members, key=lambda n: (n.folded, depth[n.id] + 0.5 * bool(rank[n.id]), rank[n.id], n.id)):
        height = takes(entries[node.id])
        if not result or filled + BELOW + height > tall:
            result.append([])
            filled = -BELOW
        result[-1].append(node)
        filled += BELOW + height
    return result


def packed(members: list, entries: dict[int, dict], tall: float) -> list[list]:
    """The members along their links, each in the last column, else in one before it that has room, else in a new
    one."""
    depth = depths(members)
    result: list[list] = []
    filled: list[float] = []
    for node in sorted(members, key=lambda n: (depth[n.id], n.id)):
        height = takes(entries[node.id], GROWS_IN_LANES) + BELOW
        place = next((i for i in reversed(range(len(result))) if filled[i] + height <= tall + BELOW), len(result))
        if place == len(result):
            result.append([])
            filled.append(0.0)
        result[place].append(node)
        filled[place] += height
    return result


def put(
    rows: list[list], entries: dict[int, dict], left: float, top: float, width: int, grows: dict[str, int] = GROWS
) -> Box:
    """Gives the columns' nodes their places; top: of the first title bar."""
    bottom = top
    for number, column in enumerate(rows):
        y = top
        for node in column:
            entries[node.id]["pos"] = [left + number * (width + GAP), y + TITLE]
            entries[node.id]["size"][0] = width
            y += takes(entries[node.id], grows) + BELOW
        bottom = max(bottom, y - BELOW)
    return Box(left, top, left + len(rows) * (width + GAP) - GAP, bottom)


def frame(shown: list, lanes: int) -> tuple[int, int, int]:
    """How many pictures stand beside each other, and their width and height."""
    if lanes >= MANY:
        return 2, 208, 350  # the host widens a picture to its title
    return 2, 290, 440 if len(shown) < 3 else 400 if len(shown) < 5 else 350


def gallery(shown: list, entries: dict[int, dict], left: float, top: float, lanes: int) -> Box:
    """Pictures beside each other, all of one size, but the last as wide as what is left."""
    across, width, height = frame(shown, lanes)
    for number, node in enumerate(shown):
        x, y = left + (number % across) * (width + GAP), top + (number // across) * (height + TITLE + BELOW)
        entries[node.id] |= {"pos": [x, y + TITLE], "size": [width, height]}
    used = -(-len(shown) // across)
    entries[shown[-1].id]["size"] = [width + (used * across - len(shown)) * (width + GAP), height]
    return Box(left, top, left + across * (width + GAP) - GAP, top + used * (height + TITLE + BELOW) - BELOW)


def group(title: str, box: Box, color: str) -> dict:
    bounding = [box.left - EDGE, box.top - HEAD + TITLE, box.right - box.left + 2 * EDGE]
    bounding.append(box.bottom + EDGE - bounding[1])
    return {"id": 0, "title": title, "bounding": bounding, "color": color, "font_size": 28, "flags": {}}


def note_height(text: str, width: float) -> int:
    """Of a note that shows all of its text."""
    letters = (width - 40) / 5.8
    return 46 + 15 * sum(-(-len(line) // int(letters)) or 1 for line in text.split("\n"))


def zoom(groups: list[dict]) -> dict:
    """The view that shows all groups at the top of a screen, as the host saves it."""
    left, top = (min(g["bounding"][i] for g in groups) for i in (0, 1))
    right, bottom = (max(g["bounding"][i] + g["bounding"][i + 2] for g in groups) for i in (0, 1))
    room = SCREEN[0] - LEFT - RIGHT, SCREEN[1] - TOP - BOTTOM
    scale = min(room[0] / (right - left), room[1] / (bottom - top), 1.0)
    spare = room[0] - scale * (right - left)
    return {
        "scale": round(scale, 4),
        "offset": [round((LEFT + spare / 2) / scale - left, 1), round(TOP / scale - top, 1)],
    }


def fitted(nodes: Iterable[dict], page: tuple[int, int] = SCREEN) -> float:
    """The zoom at which the newest host shows these nodes when the workflow is opened from the template browser. page:
    in pixels."""
    boxes = [(x, y - TITLE, x + width, y + height) for n in nodes for x, y, width, height in [(*n["pos"], *n["size"])]]
    left, top = (min(box[i] for box in boxes) for i in (0, 1))
    right, bottom = (max(box[i] for box in boxes) for i in (2, 3))
    return FILLED * min(page[0] / (right - left + 20), page[1] / (bottom - top + 20))


def stages(graph) -> tuple[dict[str, list], list]:
    """The nodes by the title of their group, and the pictures that are shown at last."""
    starts, result = sorted((first, title) for title, first in graph.lanes.items()), {}
    shown = [n for n in graph.nodes if n.type == "PreviewImage" and n.stage in (None, OUT)]
    shown.sort(key=lambda n: graph.prominence(n.title))
    for title in (IN, *(title for _, title in starts), SEEN, DRAWN, OUT):
        result[title] = []
    for node in graph.nodes:
        lane = next((title for first, title in reversed(starts) if node.id > first), None)
        kept = node.stage or STAGE_OF.get(node.type, OUT)
        if node not in shown:
            result[lane if lane and not node.stage else kept].append(node)
    return {title: members for title, members in result.items() if members or title == OUT}, shown


def attempt(graph, entries: dict[int, dict], notes: dict[str, dict], way: Way) -> list[dict]:
    """Places everything in one way. Returns the groups."""
    members, shown = stages(graph)
    result, left = [], 0.0
    lanes = [title for title in members if title in graph.lanes]
    for title in members:
        if title in lanes[1:]:
            continue
        if title in lanes:
            boxes = put_lanes({t: members[t] for t in lanes}, entries, left, way)
            result += [group(t, box, COLORS[SEEN]) for t, box in boxes.items()]
            left = max(box.right for box in boxes.values()) + 2 * EDGE + APART
            continue
        note, top, x = notes.get(title), 0.0, left
        box = Box(left, 0, left, 0)
        if members[title]:
            below = note_height(note["widgets_values"][0], 2 * way.column) + TITLE + BELOW if title == IN else 0
            box = put(columns(members[title], entries, way.tall - below), entries, x, top, way.column)
            x = box.right + GAP
        if title == OUT:
            across, width, _ = frame(shown, len(lanes))
            width = max(across * (width + GAP) - GAP, 0 if len(lanes) >= MANY else 600)
            note["size"] = [width, note_height(note["widgets_values"][0], width)]
            note["pos"] = [x, TITLE]
            pictures = gallery(shown, entries, x, note["size"][1] + TITLE + BELOW, len(lanes))
            box = Box(left, 0, max(x + width, pictures.right), max(box.bottom, pictures.bottom))
        elif title == IN:
            width = box.right - box.left
            note["size"] = [width, note_height(note["widgets_values"][0], width)]
            note["pos"] = [left, box.bottom + BELOW + TITLE]
            box.bottom = note["pos"][1] + note["size"][1]
        result.append(group(title, box, COLORS[title]))
        left = box.right + 2 * EDGE + APART
    for number, entry in enumerate(result, 1):
        entry["id"] = number
    return result


def put_lanes(lanes: dict[str, list], entries: dict[int, dict], left: float, way: Way) -> dict[str, Box]:
    """Groups of the same kind, way.wide of them beside each other and the others below."""
    result, x, top, bottom = {}, left, 0.0, 0.0
    for number, (title, members) in enumerate(lanes.items()):
        if number and number % way.wide == 0:
            x, top = left, bottom + EDGE + HEAD + 16
        rows = (packed if len(lanes) >= MANY else columns)(members, entries, way.tall * 0.5)
        box = result[title] = put(rows, entries, x, top, way.column, grows_with(len(lanes)))
        x, bottom = box.right + 2 * EDGE + APART, max(bottom, box.bottom)
    return result


def place(graph, entries: dict[int, dict], notes: dict[str, dict]) -> tuple[list[dict], dict]:
    """Gives nodes and notes (by the title of their group) places; returns the groups and the view. Of all ways, one in
    which letters are drawn, columns are wide, the graph is large on a screen, and few wires run back."""

    def good(way: Way) -> tuple[int, int, float]:
        saved = zoom(attempt(graph, entries, notes, way))["scale"]
        opened, in_window = (fitted([*entries.values(), *notes.values()], page) for page in (SCREEN, WINDOW))
        back = sum(runs_back(entries, node.id, r.node.id) for node in graph.nodes for r in node.read())
        letters = (saved >= READABLE and opened > LETTERS) + (in_window > LETTERS)
        return letters, way.column, min(saved, opened / FILLED) * (1 - BACK * back)

    lanes = (1, 2) if graph.lanes else (1,)
    best = max((Way(*way) for way in product(range(600, 1700, 50), lanes, WIDTHS)), key=good)
    groups = attempt(graph, entries, notes, best)
    return groups, zoom(groups)


def runs_back(entries: dict[int, dict], reader: int, read: int) -> bool:
    return entries[reader]["pos"][0] <= entries[read]["pos"][0]
