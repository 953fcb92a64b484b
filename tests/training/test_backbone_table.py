"""The table of backbones says what is so, also where the head's answer differs."""

import pytest

from featinv_nodes.core.backbones import Backbone
from training.experiments.backbone_table import FILE, TRIED, row


def test_row_says_whether_the_head_gives_the_models_own_output(monkeypatch):
    tried = "MobileNet v3", "mobilenetv3_small_050", {}
    assert "| 288 x 7 x 7 | 5: bn1 16 x 112 x 112, blocks.5 288 x 7 x 7 |" in row(*tried)
    assert row(*tried).endswith("| equal |\n")
    own = Backbone.logits
    monkeypatch.setattr(Backbone, "logits", lambda self, features: own(self, features) * (1 + 1e-4))
    assert row(*tried).endswith("| DIFFERENT |\n")


def test_row_of_a_head_without_one_map_gives_the_reason():
    assert "named layers only: the head reads 2 maps" in row("CrossViT", "crossvit_9_240", {})


@pytest.mark.parametrize("name", [name for _, name, _ in TRIED])
def test_the_written_table_has_every_model(name):
    assert f"`{name}`" in FILE.read_text()
