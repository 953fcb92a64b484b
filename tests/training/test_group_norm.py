"""Group normalisation in channels_last: torch's values and gradients, by Triton's interpreter where there is no GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from training.models.group_norm import ChannelsLastGroupNorm, keep_channels_last

ROOT = Path(__file__).parents[2]


def test_the_kernels_equal_torch_with_every_gradient_and_keep_the_layout():
    pytest.importorskip("triton")
    env = os.environ | {"PYTHONPATH": str(ROOT)} | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "training" / "normed.py"], env=env, capture_output=True, text=True
    )
    assert done.stdout.strip() == "equal", done.stderr


def test_a_model_keeps_its_weights_and_what_it_computes_on_a_processor():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.SiLU())
    x = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    before, names = model(x), list(model.state_dict())
    keep_channels_last(model)
    assert (
        isinstance(model[1], ChannelsLastGroupNorm)
        and list(model.state_dict()) == names
        and torch.equal(model(x), before)
    )
