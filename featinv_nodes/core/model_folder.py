"""The weights in a model folder of diffusers: one file, shards with an index, or an older .bin; listed before they are
read."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from .checkpoints import read_checkpoint
from .errors import FeatInvError
from .files import SCALE, opened, read_weights

STEM = "diffusion_pytorch_model"
WHOLE, INDEX, PICKLED = f"{STEM}.safetensors", f"{STEM}.safetensors.index.json", f"{STEM}.bin"


class WeightsFolder:
    """The tensors of a folder. shapes: by name, as `read` gives the tensors.

    Raises FeatInvError for a folder without weights, an index that names files which are not there, and damaged files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pickled: dict[str, Tensor] = {}
        self._files = self._found()
        if self._files:
            self.shapes = {name: shape for file in self._files for name, shape in stored_shapes(file).items()}
        else:
            self._pickled = dict(read_checkpoint(folder / PICKLED))
            self.shapes = {name: tuple(value.shape) for name, value in self._pickled.items()}

    def _found(self) -> list[Path]:
        if (self.folder / WHOLE).is_file():
            return [self.folder / WHOLE]
        if (self.folder / INDEX).is_file():
            return _shards(self.folder / INDEX)
        if not (self.folder / PICKLED).is_file():
            raise FeatInvError(f"{self.folder} is not complete: it has no {WHOLE}; download or copy the folder again")
        return []

    def read(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with `prefix`, floating-point ones in float32 on the CPU."""
        if not self._files:
            chosen = {name: value for name, value in self._pickled.items() if name.startswith(prefix)}
            return {name: value.float() if value.is_floating_point() else value for name, value in chosen.items()}
        return {name: value for file in self._files for name, value in read_weights(file, only=prefix).items()}


def stored_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Shapes by name of the tensors in a file, from its header alone; without the scales of those in 8 bits."""
    with opened(file, "weights file") as handle:
        names = set(handle.keys())
        own = [name for name in names if not (name.endswith(SCALE) and name.removesuffix(SCALE) in names)]
        return {name: tuple(handle.get_slice(name).get_shape()) for name in own}


def _shards(index: Path) -> list[Path]:
    try:
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        files = [index.parent / Path(name).name for name in sorted(named)]  # never outside of the folder
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FeatInvError(f"{index} cannot be read ({type(error).__name__}); download or copy it again") from error
    if missing := [file.name for file in files if not file.is_file()]:
        raise FeatInvError(
            f"{index.parent} is not complete: {index.name} names {', '.join(missing[:3])}, which"
            f" {'is' if len(missing) == 1 else 'are'} not there; download or copy the folder again"
        )
    return files
