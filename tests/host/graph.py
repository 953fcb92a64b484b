"""Graphs in both of the host's forms: what the server runs, and what the frontend opens."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
COLUMN, GAP, TOP, ROW = 400, 40, 60, 24
TALL = 1000  # what ends a chain stands in the next column where one is longer than this
SHOWN, TEXTS = ("PreviewImage", "FeatInv_PreviewFeatures", "PreviewAny"), ("PreviewAny",)
GIVEN = ("Original", "Outside", "Inside", "Mask")  # titles of the pictures that a result is made from
LARGE = 420  # height of a picture that stands below
EDGE = 40  # of a group around its nodes, above them twice as much


@dataclass
class Ref:
    """Output `slot` of a node."""

    node: Node
    slot: int


@dataclass(eq=False)
class Node:
    id: int
    type: str
    inputs: dict
    title: str | None = None
    models: list = field(default_factory=list)

    def __getitem__(self, slot: int) -> Ref:
        return Ref(self, slot)


def declared(info: dict) -> list[tuple[str, str, dict]]:
    """(name, type, options) of a node's inputs in the server's own order; a list of choices is a COMBO."""
    result = []
    for group in ("required", "optional"):
        for name, entry in info["input"].get(group, {}).items():
            kind, options = entry[0], entry[1] if len(entry) > 1 else {}
            result.append((name, "COMBO" if isinstance(kind, list) else kind, options))
    return result


def extra_widgets(kind: str, options: dict) -> list:
    """Values of the widgets that the frontend adds behind one: what becomes of a seed, and the upload button."""
    if kind == "INT" and options.get("control_after_generate"):
        return ["fixed"]
    return ["image"] if options.get("image_upload") else []


class Graph:
    """Nodes in the order they are added, each input a value or another node's output. pictures_below: what is shown
    stands in a row of its own, what was given before the results. lanes: title of a group -> its first node, see
    lane."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.note, self.pictures_below = "", False
        self.lanes: dict[str, int] = {}

    def add(self, kind: str, title: str | None = None, models: list | None = None, **inputs) -> Node:
        node = Node(len(self.nodes) + 1, kind, inputs, title, models or [])
        self.nodes.append(node)
        return node

    def lane(self, title: str) -> None:
        """What is added from here on stands below all before it, in a group of its own, up to the next lane."""
        self.lanes[title] = len(self.nodes)

    def prompt(self) -> dict:
        """The form that POST /prompt takes."""
        return {
            str(n.id): {
                "class_type": n.type,
                "inputs": {k: [str(v.node.id), v.slot] if isinstance(v, Ref) else v for k, v in n.inputs.items()},
            }
            for n in self.nodes
        }

    def frontend(self, info: dict) -> dict:
        """The form that the frontend saves and opens; info: the server's /object_info."""
        links, nodes, height_of = [], {}, {}
        for node in self.nodes:
            about, inputs, values = info[node.type], [], []
            for name, kind, options in declared(about):
                if kind in WIDGETS and not options.get("forceInput"):
                    values += [node.inputs.get(name, options.get("default")), *extra_widgets(kind, options)]
                else:
                    inputs.append({"name": name, "type": kind, "link": None})
            outputs = [
                {"name": n, "type": t, "links": [], "slot_index": i}
                for i, (n, t) in enumerate(zip(about["output_name"], about["output"]))
            ]
            pictures = (
                230
                if node.type in ("PreviewImage", "LoadImage", "FeatInv_PreviewFeatures", "CLIPTextEncode")
                else 90
                if node.type == "PreviewAny"
                else 0
            )
            height_of[node.id] = 40 + ROW * (max(len(inputs), len(outputs)) + len(values)) + pictures
            properties = {"Node name for S&R": node.type} | ({"models": node.models} if node.models else {})
            nodes[node.id] = {
                "id": node.id,
                "type": node.type,
                "pos": [0, 0],
                "size": [COLUMN - GAP, height_of[node.id]],
                "flags": {},
                "order": node.id - 1,
                "mode": 0,
                "inputs": inputs,
                "outputs": outputs,
                "properties": properties,
                "widgets_values": values,
            } | ({"title": node.title} if node.title else {})
        for node in self.nodes:
            for name, value in node.inputs.items():
                if isinstance(value, Ref):
                    slot = next(i for i, entry in enumerate(nodes[node.id]["inputs"]) if entry["name"] == name)
                    links.append(
                        [
                            len(links) + 1,
                            value.node.id,
                            value.slot,
                            node.id,
                            slot,
                            nodes[node.id]["inputs"][slot]["type"],
                        ]
                    )
                    nodes[node.id]["inputs"][slot]["link"] = len(links)
                    nodes[value.node.id]["outputs"][value.slot]["links"].append(len(links))
        self._place(nodes, height_of)
        note = {
            "id": len(nodes) + 1,
            "type": "MarkdownNote",
            "pos": [0, -240],
            "size": [2 * COLUMN - GAP, 180],
            "flags": {},
            "order": len(nodes),
            "mode": 0,
            "inputs": [],
            "outputs": [],
            "properties": {},
            "widgets_values": [self.note],
            "title": "What to look at",
            "color": "#432",
            "bgcolor": "#653",
        }
        return {
            "last_node_id": len(nodes) + 1,
            "last_link_id": len(links),
            "nodes": [*nodes.values(), note],
            "links": links,
            "groups": self._groups(nodes),
            "config": {},
            "extra": {},
            "version": 0.4,
        }

    def _place(self, nodes: dict[int, dict], height_of: dict[int, int]) -> None:
        """Columns from left to right along the links, each node one column behind the last of what it reads."""
        column: dict[int, int] = {}
        for node in self.nodes:
            before = [column[v.node.id] + 1 for v in node.inputs.values() if isinstance(v, Ref)]
            column[node.id] = max(before, default=0)
        for node in reversed(self.nodes):  # sources stand beside their first reader
            readers = [
                column[n.id] for n in self.nodes for v in n.inputs.values() if isinstance(v, Ref) and v.node is node
            ]
            column[node.id] = (
                max(column[node.id], min(readers, default=column[node.id] + 1) - 1) if readers else column[node.id]
            )
        filled: dict[int, int] = {}
        for node in self.nodes[: min(self.lanes.values(), default=0)]:  # what all lanes share stands before them
            column[node.id] = 0
        previews = [node for node in self.nodes if self.pictures_below and node.type in SHOWN]
        for node in self.nodes:
            if node in previews:
                continue
            if node.id - 1 in self.lanes.values():
                bottom = max((y for place, y in filled.items() if place), default=-EDGE) + 2 * EDGE
                filled = {place: bottom for place in range(1, max(column.values()) + 1)} | {0: filled[0]}
            place = column[node.id]
            ends = not any(v.node is node for n in self.nodes for v in n.inputs.values() if isinstance(v, Ref))
            while ends and filled.get(place, 0) + height_of[node.id] > TALL:
                place += 1
            nodes[node.id]["pos"] = [place * COLUMN, filled.get(place, 0)]
            filled[place] = filled.get(place, 0) + height_of[node.id] + TOP
        self._place_below(nodes, previews, filled)

    def _place_below(self, nodes: dict[int, dict], previews: list[Node], filled: dict[int, int]) -> None:
        """A row of pictures that ends below the last column, and behind it the texts, one below the other."""
        if not previews:
            return
        pictures, texts = ([node for node in previews if (node.type in TEXTS) == texts] for texts in (False, True))
        pictures.sort(key=lambda node: not (node.title or "").startswith(GIVEN))
        first = max(0, max(filled) - len(pictures))
        top = max(bottom for place, bottom in filled.items() if place >= first) + TOP
        for place, node in enumerate(pictures, first):
            nodes[node.id] |= {"pos": [place * COLUMN, top], "size": [COLUMN - GAP, LARGE]}
        height = max((LARGE + TOP) // max(len(texts), 1) - TOP, 130)
        for number, node in enumerate(texts):
            nodes[node.id] |= {
                "pos": [(first + len(pictures)) * COLUMN, top + number * (height + TOP)],
                "size": [COLUMN - GAP, height],
            }

    def _groups(self, nodes: dict[int, dict]) -> list[dict]:
        """A group around each lane's nodes, what stands in the first column or below apart."""
        result, ends = [], [*list(self.lanes.values())[1:], len(self.nodes)]
        for (title, first), last in zip(self.lanes.items(), ends):
            inside = [nodes[n.id] for n in self.nodes[first:last] if n.type not in SHOWN and nodes[n.id]["pos"][0]]
            left, top = (min(n["pos"][i] for n in inside) for i in (0, 1))
            right, bottom = (max(n["pos"][i] + n["size"][i] for n in inside) for i in (0, 1))
            box = [left - EDGE // 2, top - 2 * EDGE, right - left + EDGE, bottom - top + 2.5 * EDGE]
            result.append(
                {
                    "id": len(result) + 1,
                    "title": title,
                    "bounding": box,
                    "color": "#3f789e",
                    "font_size": 24,
                    "flags": {},
                }
            )
        return result


def to_prompt(workflow: dict, info: dict) -> dict:
    """The server's form of a frontend file, as the frontend would send it: widget values by their place."""
    source = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] not in info:
            assert node["type"] in ("MarkdownNote", "Note"), f"the host does not know the node {node['type']}"
            continue
        values, inputs = list(node["widgets_values"]), {}
        linked = {entry["name"]: entry["link"] for entry in node["inputs"] if entry["link"] is not None}
        for name, kind, options in declared(info[node["type"]]):
            if kind in WIDGETS and not options.get("forceInput"):
                if not values:  # a widget appended since the file was saved: the node's own default
                    continue
                inputs[name] = values.pop(0)
                del values[: len(extra_widgets(kind, options))]
            elif name in linked:
                inputs[name] = source[linked[name]]
        assert not values, f"{node['type']} has widget values left over: {values}"
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def dump(workflow: dict) -> str:
    """JSON with a node or link per line, for readable differences."""
    parts = [
        f"{json.dumps(key)}: {json.dumps(value)}" for key, value in workflow.items() if key not in ("nodes", "links")
    ]
    for key in ("nodes", "links"):
        rows = ",\n".join("  " + json.dumps(row) for row in workflow[key])
        parts.append(f"{json.dumps(key)}: [\n{rows}\n ]")
    return "{\n " + ",\n ".join(parts) + "\n}\n"
