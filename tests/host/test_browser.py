"""The workflows in the host's real frontend: what browser.mjs saw there."""

import browser
import pytest

pytestmark = pytest.mark.skipif(
    not browser.AVAILABLE, reason="no browser: needs node, playwright-core (PLAYWRIGHT_CORE) and Chromium"
)


def test_every_workflow_opens_without_a_missing_node_a_red_box_or_an_error(seen):
    for name, state in seen.items():
        assert state["nodes"] > 5 and not state["unknown"] and not state["dialogs"] and not state["unlinked"], (
            name,
            state,
        )
        ours = [line for line in state["trouble"] if "404" not in line and "Content Security Policy" not in line]
        assert not ours, (name, ours)  # the frontend's own look-ups of help pages and downloads apart


def test_queueing_shows_progress_and_pictures(seen):
    for name, state in seen.items():
        if "ran" in state:
            # newer hosts leave out progress between the first and the last step where steps are fast
            assert state["ran"]["error"] is None and state["ran"]["progress"] > 1 and state["ran"]["pictures"] > 0, (
                name,
                state,
            )


def widgets(seen, kind, name):
    """(file, widget) of a kind of node, in the workflows that ran."""
    return [
        (file, widget)
        for file, state in seen.items()
        for widget in state.get("widgets", [])
        if (widget["node"], widget["name"]) == (kind, name)
    ]


def test_nodes_show_what_they_found(seen):
    """On themselves, as text that is no part of the saved workflow."""
    scope = ("inside", "outside", "at the edge", "no scope statistics")
    for kind, words in {
        "FeatInvControlNet": scope,
        "FeatInv_FeatureSimilarity": ("cosine 0.", "mean cosine 0."),
        "FeatInv_ExtractFeatures": ("channels",),
        "FeatInv_ConceptAttenuate": (*scope, "connect the inversion model"),
        "FeatInv_Viz": ("slope",),
    }.items():
        shown = widgets(seen, kind, "featinv_text")
        assert shown, kind
        for file, widget in shown:
            assert any(word in widget["value"] for word in words) and not widget["kept"], (file, widget)


def test_layer_is_a_list_of_the_connected_backbone(seen):
    for kind in ("FeatInv_ExtractFeatures", "FeatInv_DiscoverConcepts"):
        found = widgets(seen, kind, "layer")
        assert found, kind
        for file, widget in found:
            assert widget["list"] and {"last", widget["value"]} <= set(widget["list"]), (file, widget)
            assert len(widget["list"]) > 4, (file, widget)


def test_layer_follows_the_backbone_inside_a_subgraph(seen):
    state = seen["tiny_reconstruct.json"]["subgraph"]
    assert not state["trouble"]
    assert state["layers"]["FeatInv_Loader"] == ["blocks.2", "blocks.4", "last", "last, pooled"]
    assert {"last", "blocks.1", "blocks.6"} <= set(state["layers"]["FeatInv_ExtractFeatures"])


def test_the_view_shows_the_whole_graph(seen):
    """On a screen of 1920 x 1080 pixels, beside the frontend's own bars."""
    for name, state in seen.items():
        assert not state["covered"], (name, state["covered"])


def test_no_node_covers_another(seen):
    """Neither before a run, nor when the nodes show what they found."""
    for name, state in seen.items():
        for nodes in (state["opened"], state.get("ended", [])):
            for number, node in enumerate(nodes):
                left, top, right, bottom = node["box"]
                for other in nodes[:number]:
                    x0, y0, x1, y1 = other["box"]
                    assert right <= x0 or x1 <= left or bottom <= y0 or y1 <= top, (name, node, other)


def test_wires_have_colours_of_their_own(seen):
    """Also after another palette was chosen: browser.mjs chooses two."""
    colors = {kind: pair for state in seen.values() for kind, pair in state["colors"].items()}
    ours = {kind: pair for kind, pair in colors.items() if kind.startswith("FEATINV")}
    hosts_own = {color.lower() for kind, pair in colors.items() if kind not in ours for color in pair}
    assert len(ours) == 6
    for kind, (wire, socket) in ours.items():
        assert wire and wire == socket and wire.lower() not in hosts_own, (kind, wire, socket)
    assert len({wire for wire, _ in ours.values()}) == 6
