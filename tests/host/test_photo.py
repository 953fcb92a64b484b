"""The world of photographs inside a real ComfyUI's process: what photo.py measured there."""

import pytest
from test_inside import CLOSE


@pytest.fixture
def seen(measured):
    return measured["photo"]


def test_the_same_photograph_as_the_command_line(seen):
    """With locations and pooled, from the same file, seed and steps."""
    assert len(seen["parity"]) == 2
    for name, result in seen["parity"].items():
        assert max(result["features"], result["latents"], result["pictures"]) <= CLOSE, (name, result)
        assert result["control matters"] > 0.01, (name, result)
        assert result["seen"] == [2, 160, 160, 3] and result["drawn"] == [2, 128, 128, 3], (name, result)


def test_a_world_s_latent_is_of_its_own_size(seen):
    """The size that its models were trained at."""
    assert seen["latents"]["drawn"]["cells"] == [1, 24, 8, 8] and seen["latents"]["photo"]["cells"] == [1, 24, 16, 16]
    for result in seen["latents"].values():
        assert result["empty"] and result["picture"] == [1, result["side"], result["side"], 3]


def test_weights_in_8_bits_draw_as_well(seen):
    result = seen["eight_bits"]
    assert result["stored"] and result["size"] < 0.6 and result["about"].startswith("inverts resnet10t.tiny_world")
    assert "scheduler ddim_uniform" in result["about"] and "spacing" not in result["about"]
    assert result["cosine"]["shipped"] > 0.9 and abs(result["cosine"]["8 bits"] - result["cosine"]["shipped"]) < 0.005
    assert 0 < result["moved"] < 0.1  # another file it is
