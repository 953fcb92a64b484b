"""Graphs in both of the host's forms: what the server runs, and what the frontend opens."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import layout

WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}


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
    stage: str | None = None  # title of the group that it stands in, if not the one of its type
    folded: bool = False  # only its title bar shows

    def read(self) -> list[Ref]:
        """What it is connected to."""
        return [value for value in self.inputs.values() if isinstance(value, Ref)]

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
    """Nodes in the order they are added, each input a value or another node's output. note: what to look at. needs:
    what to load or change. lanes: title of a group -> number of nodes before it, see lane."""

    GIVEN = ("Original", "Outside", "Inside", "Mask")  # titles of the pictures that a result is made from

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.note, self.needs = "", ""
        self.lanes: dict[str, int] = {}

    def add(
        self,
        kind: str,
        title: str | None = None,
        models: list | None = None,
        stage: str | None = None,
        folded: bool = False,
        **inputs,
    ) -> Node:
        node = Node(len(self.nodes) + 1, kind, inputs, title, models or [], stage, folded)
        self.nodes.append(node)
        return node

    def prominence(self, title: str | None) -> int:
        """The order of pictures: what was given, what came of it, the others."""
        return 0 if (title or "").startswith(self.GIVEN) else 1 if (title or "").startswith("Result") else 2

    def lane(self, title: str) -> None:
        """What is added from here on stands in a group of its own, up to the next lane."""
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
        nodes = {node.id: self._entry(node, info[node.type]) for node in self.nodes}
        links = self._links(nodes)
        texts = {layout.OUT: ("What to look at", self.note), layout.IN: ("What it needs", self.needs)}
        notes = {
            group: self._note(len(nodes) + number, title, text)
            for number, (group, (title, text)) in enumerate(texts.items(), 1)
        }
        groups, view = layout.place(self, nodes, notes)
        return {
            "last_node_id": len(nodes) + len(notes),
            "last_link_id": len(links),
            "nodes": [*nodes.values(), *notes.values()],
            "links": links,
            "groups": groups,
            "config": {},
            "extra": {"ds": view},
            "version": 0.4,
        }

    def _entry(self, node: Node, about: dict) -> dict:
        """A node without links and place; about: what the server says of its type."""
        inputs, values = [], []
        for name, kind, options in declared(about):
            if kind in WIDGETS and not options.get("forceInput"):
                values += [node.inputs.get(name, options.get("default")), *extra_widgets(kind, options)]
            else:
                inputs.append({"name": name, "type": kind, "link": None})
        outputs = [
            {"name": n, "type": t, "links": [], "slot_index": i}
            for i, (n, t) in enumerate(zip(about["output_name"], about["output"]))
        ]
        return {
            "id": node.id,
            "type": node.type,
            "pos": [0, 0],
            "size": layout.size_of(node.type, max(len(inputs), len(outputs)), len(values)),
            "flags": {"collapsed": True} if node.folded else {},
            "order": node.id - 1,
            "mode": 0,
            "inputs": inputs,
            "outputs": outputs,
            "properties": {"Node name for S&R": node.type} | ({"models": node.models} if node.models else {}),
            "widgets_values": values,
        } | ({"title": node.title} if node.title else {})

    def _links(self, nodes: dict[int, dict]) -> list[list]:
        """A row per link, which the nodes' sockets then name."""
        links: list[list] = []
        for node in self.nodes:
            inputs = nodes[node.id]["inputs"]
            for name, value in node.inputs.items():
                if isinstance(value, Ref):
                    slot = next(i for i, entry in enumerate(inputs) if entry["name"] == name)
                    number = len(links) + 1
                    links.append([number, value.node.id, value.slot, node.id, slot, inputs[slot]["type"]])
                    inputs[slot]["link"] = number
                    nodes[value.node.id]["outputs"][value.slot]["links"].append(number)
        return links

    def _note(self, number: int, title: str, text: str) -> dict:
        return {
            "id": number,
            "type": "MarkdownNote",
            "pos": [0, 0],
            "size": [0, 0],
            "flags": {},
            "order": number - 1,
            "mode": 0,
            "inputs": [],
            "outputs": [],
            "properties": {},
            "widgets_values": [text],
            "title": title,
            "color": "#432",
            "bgcolor": "#653",
        }


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
