"""A user's own concepts: directions or the dictionary of a sparse autoencoder, from a safetensors file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import FeatInvError
from ..feature_map import FeatureSource
from ..files import opened
from .decomposition import Concepts
from .discovery import dependent, numbered
from .sparse import SparseEncoder

SINGLES = "directions"
DECODER, ENCODER = "decoder", "encoder"


def load_directions(file: str | Path, source: FeatureSource) -> Concepts:
    """Concepts from a safetensors file of vectors: each tensor, [C] or [d, C], is a concept and its key the label;
    "directions" [n, C] alone is n concepts of one direction each.

    A file with `decoder` [n, C] and `encoder` [n, C] is a sparse autoencoder: z = the k largest of relu((phi - mean)
    encoder^T + bias), phi = z decoder + mean and a rest. `bias` [n] and `mean` [C] are zero where they are missing;
    `k`, a tensor or an entry of the metadata, is n, a ReLU autoencoder. Rows are taken as they are.

    Raises FeatInvError for a file or tensors that are no such thing, and for directions that depend on one another.
    """
    with opened(file, "file of directions") as handle:
        tensors, metadata = {key: handle.get_tensor(key) for key in handle.keys()}, handle.metadata() or {}
    if {DECODER, ENCODER} <= set(tensors):
        return _own_autoencoder(Path(file), tensors, metadata, source)
    bases, labels = _own(tensors)
    for label, basis in zip(labels, bases):
        if (
            basis.ndim != 2
            or basis.shape[1] != source.channels
            or not basis.isfinite().all()
            or not basis.norm(dim=1).all()
        ):
            raise FeatInvError(
                f"{file}: {label!r} has the shape {tuple(basis.shape)}; expected [d, {source.channels}], finite, no row"
                f" zero, for {source.describe()}"
            )
    bases = [F.normalize(b.float()) for b in bases]
    bad = dependent(torch.cat(bases)) if bases else []
    if bad or not bases:
        raise FeatInvError(
            f"{file}: expected at least one direction, none in the span of those before it; of {sum(map(len, bases))}"
            f" rows these are: {bad[:8]}"
        )
    return Concepts(bases, labels, source, None, "own directions", {"file": Path(file).name})


def _own(tensors: dict[str, Tensor]) -> tuple[Sequence[Tensor], list[str]]:
    if list(tensors) == [SINGLES] and tensors[SINGLES].ndim == 2:
        return [row[None] for row in tensors[SINGLES]], numbered(len(tensors[SINGLES]))
    return [t[None] if t.ndim == 1 else t for t in tensors.values()], list(tensors)


def _own_autoencoder(
    file: Path, tensors: dict[str, Tensor], metadata: dict[str, str], source: FeatureSource
) -> Concepts:
    decoder, channels = tensors[DECODER], source.channels
    atoms = len(decoder) if decoder.ndim else 0
    given = {
        DECODER: decoder,
        ENCODER: tensors[ENCODER],
        "bias": tensors.get("bias", torch.zeros(atoms)),
        "mean": tensors.get("mean", torch.zeros(channels)),
    }
    expected = {DECODER: (atoms, channels), ENCODER: (atoms, channels), "bias": (atoms,), "mean": (channels,)}
    for name, tensor in given.items():
        if tuple(tensor.shape) != expected[name] or not atoms or not tensor.isfinite().all():
            raise FeatInvError(
                f"{file}: {name!r} has the shape {tuple(tensor.shape)}; expected {list(expected[name])}, finite, for"
                f" {source.describe()}"
            )
    try:
        active = int(tensors["k"] if "k" in tensors else metadata.get("k", atoms))
    except (ValueError, RuntimeError):
        active = 0
    if not 1 <= active <= atoms:
        raise FeatInvError(
            f"{file}: k, the number of active atoms, is {tensors.get('k', metadata.get('k'))}; expected a whole number"
            f" from 1 to {atoms}"
        )
    encoder = SparseEncoder(given[ENCODER].float(), given["bias"].float(), active)
    settings = {"file": file.name, "active": active}
    return Concepts(
        list(decoder.float()[:, None]),
        numbered(atoms),
        source,
        given["mean"].float(),
        "own autoencoder",
        settings,
        encoder,
    )
