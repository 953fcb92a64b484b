"""Foreign checkpoints open without anything in them being run, whatever their trainers wrote beside the weights."""

import argparse
import os
import sys
import threading
import types
from pathlib import Path
from threading import Event, Thread

import numpy as np
import pytest
import torch

from featinv_nodes.core.checkpoints import read_checkpoint
from featinv_nodes.core.errors import FeatInvError

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2)}
made = []


class ModelCheckpoint:
    """As Lightning's callback, whose class stands in checkpoints as a key, and in some as an object."""

    def __init__(self):
        self.best_model_score = torch.tensor(0.5)

    def __setstate__(self, state):
        made.append(state)


class AttributeDict(dict):
    """As Lightning's hyperparameters."""


@pytest.fixture
def lightning(monkeypatch):
    for module, own in (
        ("pytorch_lightning.callbacks.model_checkpoint", ModelCheckpoint),
        ("lightning.pytorch.utilities.parsing", AttributeDict),
    ):
        parts = module.split(".")
        for end in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
        monkeypatch.setattr(own, "__module__", module)
        setattr(sys.modules[module], own.__name__, own)


@pytest.mark.parametrize("zipped", [True, False])  # False: as before PyTorch 1.6
def test_what_lightning_and_timm_write_beside_the_weights_is_passed_over(tmp_path, lightning, zipped):
    made.clear()
    parameters = AttributeDict(lr=1e-4)
    parameters.name = "x"
    whole = {
        "epoch": 3,
        "state_dict": STATE,
        "callbacks": {ModelCheckpoint: {"best_model_score": np.float64(0.5)}, "own": ModelCheckpoint()},
        "hyper_parameters": parameters,
        "args": argparse.Namespace(data=Path("/data"), lr=0.1),
        "history": np.arange(3),
        "classes": ["cat", "dog"],
    }
    torch.save(whole, tmp_path / "last.ckpt", _use_new_zipfile_serialization=zipped)
    before = set(torch.serialization.get_safe_globals())
    result = read_checkpoint(tmp_path / "last.ckpt")
    assert result.keys() == STATE.keys() and all(torch.equal(result[k], STATE[k]) for k in STATE)
    assert result.entry == "state_dict" and "callbacks" in result.left and result.other["classes"] == ["cat", "dog"]
    assert "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint" in result.replaced and not made
    assert set(torch.serialization.get_safe_globals()) == before  # nothing stays allowed for others


def test_two_threads_leave_nothing_allowed(tmp_path, monkeypatch):
    """A page that lists layers opens a file while a node opens another one."""
    torch.save({"state_dict": STATE, "args": argparse.Namespace(lr=0.1)}, tmp_path / "last.ckpt")
    before, load, results = torch.serialization.get_safe_globals(), torch.load, []
    second_loads = Event()
    first, second = (Thread(target=lambda: results.append(read_checkpoint(tmp_path / "last.ckpt"))) for _ in range(2))

    def slow(*args, **kwargs):
        """The second thread would begin within the first one's load, and end after it."""
        if threading.current_thread() is second:
            second_loads.set()
            first.join()
        elif torch.serialization.get_safe_globals() and not second.ident:
            second.start()
            second_loads.wait(0.1)  # in vain, as it has to wait
        return load(*args, **kwargs)

    monkeypatch.setattr(torch, "load", slow)
    first.start()
    first.join()
    second.join()
    assert len(results) == 2 and torch.serialization.get_safe_globals() == before


@pytest.mark.parametrize("entry", ["", "model", "state_dict_ema"])
def test_the_weights_are_found_where_trainers_keep_them(tmp_path, entry):
    other = {"state_dict": {"a.weight": torch.zeros(2, 3)}, "optimizer": {"lr": 1}} if entry.endswith("ema") else {}
    torch.save({**other, entry: STATE} if entry else STATE, tmp_path / "w.pth")
    result = read_checkpoint(tmp_path / "w.pth")
    assert result.entry == entry and all(torch.equal(result[k], STATE[k]) for k in STATE)


class Foreign:
    def __reduce__(self):
        return (os.mkdir, ("ran",))


class Named:
    """Code under a name that looks harmless is not run either."""

    def __reduce__(self):
        return (Path.mkdir, (Path("ran"),))


@pytest.mark.parametrize("what", [Foreign(), Named(), np.random.default_rng(0)])
def test_foreign_code_is_refused_and_not_run(tmp_path, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": STATE, "callbacks": what}, "bad.ckpt")
    with pytest.raises(FeatInvError, match=r"bad\.ckpt was not opened.*could run foreign code"):
        read_checkpoint("bad.ckpt")
    assert [file.name for file in tmp_path.iterdir()] == ["bad.ckpt"]
    with pytest.raises(FeatInvError, match="none.ckpt does not exist"):
        read_checkpoint("none.ckpt")
