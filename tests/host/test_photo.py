"""The world of photographs inside a real ComfyUI's process: what photo.py measured there."""

from pathlib import Path

import pytest
from hosts import PACK
from test_inside import CLOSE


@pytest.fixture(scope="session")
def seen(host, tmp_path_factory):
    return host.run_inside(Path(__file__).with_name("photo.py"), PACK, tmp_path_factory.mktemp("photo"))


def test_the_same_photograph_as_the_command_line(seen):
    """Every depth of the shipped models, pooled too, from the same file, seed and steps."""
    assert len(seen["parity"]) == 4
    for name, found in seen["parity"].items():
        assert max(found["features"], found["latents"], found["pictures"]) <= CLOSE, (name, found)
        assert found["control matters"] > 0.01, (name, found)
        assert found["seen"] == [2, 160, 160, 3] and found["drawn"] == [2, 128, 128, 3], (name, found)


def test_a_world_s_latent_is_of_its_own_size(seen):
    """The stock Empty Latent Image, eight pixels to a cell, is right for one world only."""
    assert seen["latents"]["drawn"]["cells"] == [1, 24, 8, 8] and seen["latents"]["photo"]["cells"][2:] == [8, 8]
    for found in seen["latents"].values():
        assert found["empty"] and found["picture"] == [1, found["side"], found["side"], 3]


def test_weights_in_8_bits_draw_as_well(seen):
    found = seen["eight_bits"]
    assert found["stored"] and found["size"] < 0.6 and found["about"].startswith("inverts resnet10t.tiny_world")
    assert found["cosine"]["shipped"] > 0.9 and abs(found["cosine"]["8 bits"] - found["cosine"]["shipped"]) < 0.005
    assert 0 < found["moved"] < 0.1  # another file it is
