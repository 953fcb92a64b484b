"""Feature decoders as the host manages them."""

from __future__ import annotations

import comfy.model_management as management
import comfy.utils
from torch import Tensor

from ..core.feature_decoder import FeatureDecoder
from ..core.feature_map import FeatureMap, FeatureSource
from ..core.waiting import Progress, ask_after_layers, attended
from ..feature_decoders import find_decoder, open_feature_decoder
from ..worlds import DECODERS
from . import folders
from .models import ManagedBackbone, managed, require_memory, shown, stop_if_cancelled

ACTIVATIONS = 12  # of the decoder's width, that a token has at once in its widest layer; an estimate

ALLOW = "To go on with other weights, switch on other_weights in Load Feature Decoder"


class ManagedDecoder:
    """A feature decoder and its patcher. Where the user cancels, it stops after the layer that it is in."""

    BATCH = 16

    def __init__(self, decoder: FeatureDecoder) -> None:
        self.decoder = decoder
        self.patcher = managed(decoder)
        ask_after_layers(decoder, stop_if_cancelled)

    @property
    def source(self) -> FeatureSource:
        return self.decoder.source

    @property
    def picture_size(self) -> tuple[int, int]:
        return self.decoder.picture_size

    def decode(self, features: FeatureMap, progress: Progress | None = None) -> Tensor:
        """Pictures [B, 3, *picture_size] in 0..1 of a map each. progress: called with pictures done, of how many; the
        host's bar if None. Raises FeatInvError for maps of another source than the decoder's."""
        features.source.require(self.source, "the feature map", "the decoder", ALLOW)
        rows = min(self.BATCH, len(features))
        height, width = self.source.grid
        channels = max(value.shape[-1] for value in self.decoder.parameters())
        size = 4 * rows * height * width * channels * ACTIVATIONS
        management.load_models_gpu([self.patcher], memory_required=size)
        progress = progress or shown(comfy.utils.ProgressBar(len(features)))
        return self.decoder.decode(features, self.BATCH, progress).to(management.intermediate_device())

    def describe(self) -> str:
        """A line for the node."""
        return f"decodes {self.source.describe()} into {self.picture_size[1]} x {self.picture_size[0]} pixels"


def open_decoder(name: str, backbone: ManagedBackbone | None, other_weights: bool) -> ManagedDecoder:
    """The decoder of Load Feature Decoder's widgets. Raises FeatInvError as open_feature_decoder does, and for one that
    is larger than the memory."""
    files = find_decoder(folders.decoder(name))
    require_memory(f"the decoder {name}", files.bytes, _smaller)
    reads = backbone.backbone if backbone else None
    return ManagedDecoder(attended(lambda: open_feature_decoder(files, reads, other_weights), stop_if_cancelled))


def _smaller() -> str:
    embedded = f", such as the embedded {', '.join(DECODERS)}" if DECODERS else ""
    return f"Choose a smaller decoder{embedded}: the released ones are all about equally large"
