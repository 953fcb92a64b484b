"""Weights of the same name and other content in a real ComfyUI's process: what provenance.py was told there."""

import pytest


@pytest.fixture
def told(measured):
    return measured["provenance"]


def test_a_backbone_of_other_weights_is_refused_or_allowed(told):
    assert told["same"] == "no error", told["same"]
    message = told["features"]
    assert message.startswith("FeatInvError: the feature map and the inversion model are of resnet10t.tiny_world with")
    assert "(digest another against " in message and "switch on other_weights in Load FeatInv ControlNet" in message
    assert told["features allowed"] == "no error", told["features allowed"]
    assert "with other weights (digest " in told["similarity"] and "switch on" not in told["similarity"]


def test_a_base_model_of_other_weights_is_refused_or_allowed(told):
    """The host's copy of the base model has the digest that training writes, under its own names of the tensors."""
    message = told["base"]
    assert message.startswith("FeatInvError: the inversion model was trained on the base model tiny (digest ")
    assert "switch on other_weights in Load FeatInv ControlNet" in message
    for case in ("base allowed", "base of an older file", "patched"):  # a LoRA is the user's own change
        assert told[case] == "no error", told[case]


def test_the_node_says_which_weights_and_whether_others_are_allowed(told):
    assert told["about"].splitlines()[-1].startswith("weights: backbone ") and ", base model " in told["about"]
    assert (
        told["about allowed"].splitlines()[-1].endswith("other weights of the backbone and the base model are allowed")
    )
