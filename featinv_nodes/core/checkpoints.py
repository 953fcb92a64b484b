"""Opens PyTorch checkpoints of other programs (.ckpt, .pth, .pt, .bin) with weights_only: no code in them runs."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from .errors import FeatInvError

SUFFIXES = (".ckpt", ".pth", ".pt", ".bin", ".tar")
#: Objects that trainers write beside the weights: Lightning's callbacks, timm's arguments, numpy's numbers. Something
#: that does nothing stands in for them.
HARMLESS = re.compile(
    r"(pytorch_lightning|lightning|lightning_fabric|omegaconf)\..+|argparse\.Namespace|pathlib\.\w+"
    r"|numpy\.(dtype|dtypes\.\w+|ndarray|_?core\.multiarray\.(scalar|_reconstruct))|_codecs\.encode|typing\.Any"
)
#: where trainers keep the weights, an average before the last ones, as timm chooses too
ENTRIES = ("state_dict_ema", "model_ema", "state_dict", "model")
MOST = 64  # kinds of objects
_ONE_AT_A_TIME = Lock()  # what torch's loader may make is one list for the whole process


class Checkpoint(dict[str, Tensor]):
    """The tensors of a checkpoint by name. entry: under which they stood, "" for a bare state dict. left: the names of
    the other entries. replaced: kinds of objects that were not made. other: the entries that are plain values."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        entry: str = "",
        left: tuple[str, ...] = (),
        replaced: tuple[str, ...] = (),
        other: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(tensors)
        self.entry, self.left, self.replaced, self.other = entry, left, replaced, dict(other or {})


def read_checkpoint(file: str | Path) -> Checkpoint:
    """The state dict of a foreign checkpoint, bare or as Lightning and timm keep it. Of other objects beside tensors,
    those in HARMLESS are passed over, and none is ever made.

    Raises FeatInvError for a file that is missing, damaged, holds further objects, or no state dict.
    """
    file = Path(file)
    if not file.is_file():
        raise FeatInvError(f"checkpoint {file} does not exist")
    loaded, replaced = _loaded(file)
    entries = loaded if isinstance(loaded, dict) else {}
    entry = next((name for name in ENTRIES if isinstance(entries.get(name), dict)), "")
    state = entries[entry] if entry else loaded
    if not isinstance(state, dict):
        raise FeatInvError(
            f"{file} holds a {type(state).__name__}; expected a state dict, or a checkpoint of Lightning or timm with"
            " one. Save model.state_dict() where the model was made"
        )
    tensors = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
    if not entry:
        return Checkpoint(tensors, replaced=replaced)
    left = tuple(str(name) for name in entries if name != entry)
    other = {str(name): value for name, value in entries.items() if isinstance(value, (str, list, dict))}
    return Checkpoint(tensors, entry, left, replaced, other)


def _loaded(file: Path) -> tuple[object, tuple[str, ...]]:
    """What the file holds, and which objects were replaced."""
    replaced: list[str] = []
    while True:
        try:
            with _ONE_AT_A_TIME, _allowed(replaced):
                # mapped, so that what is left behind is not read either; files of before PyTorch 1.6 are no zip
                mapped = zipfile.is_zipfile(file)
                return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped), tuple(replaced)
        except pickle.UnpicklingError as error:
            found = re.search(r"GLOBAL (\S+)", str(error))
            name = found[1] if found else ""
            if HARMLESS.fullmatch(name) and name not in replaced and len(replaced) < MOST:
                replaced.append(name)
                continue
            said = re.search(r"Unsupported (global: GLOBAL \S+|.*)", str(error))
            reason = said[0] if said else type(error).__name__
            raise FeatInvError(
                f"{file} was not opened, because it is damaged or holds objects besides tensors, which could run"
                f" foreign code ({reason}). If you trust its origin, save its state_dict alone where it was made:"
                " torch.save({'state_dict': model.state_dict()}, ...)"
            ) from error
        except Exception as error:  # of a file that is cut off, the reader raises whatever it stumbles over
            raise FeatInvError(
                f"{file} is not a complete PyTorch checkpoint ({type(error).__name__}: {str(error)[:120]}); download"
                " or copy it again"
            ) from error


@contextmanager
def _allowed(names: list[str]) -> Iterator[None]:
    """torch's loader takes stand-ins for objects of these names meanwhile, and no other ones."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()  # a host may have registered others of the same names
    torch.serialization.add_safe_globals([_stand_in(name) for name in names])
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _stand_in(name: str) -> type:
    """A class of this name that takes any arguments and any state, and keeps none. torch's loader fills no
    dictionaries but its own, so that Lightning's hyperparameters become one of these."""
    module, _, own = name.rpartition(".")
    made = OrderedDict if own == "AttributeDict" else object
    return type(
        own,
        (),
        {
            "__module__": module,
            "__qualname__": own,
            "__new__": lambda cls, *_, **__: made.__new__(made if made is OrderedDict else cls),
            "__init__": lambda self, *_, **__: None,
            "__setstate__": lambda self, _: None,
        },
    )
