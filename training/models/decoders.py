"""The feature decoder that goes with an inversion model."""

from __future__ import annotations

from featinv_nodes.core.backbones import Backbone
from featinv_nodes.core.feature_decoder import FeatureDecoder
from featinv_nodes.core.feature_map import FeatureSource
from featinv_nodes.feature_decoders import open_feature_decoder
from featinv_nodes.worlds import DECODERS


def decoder_of(
    source: FeatureSource, backbone: Backbone, name: str | None = None, other_weights: bool = False
) -> FeatureDecoder | None:
    """The named feature decoder (a folder, or an embedded one), or the embedded one of maps of this source; None where
    there is none. backbone: that makes the maps. Raises FeatInvError for a named one of other maps."""
    if name:
        decoder = open_feature_decoder(name, backbone, other_weights)
        decoder.source.require(source, f"the feature decoder {name}", "the inversion model")
        return decoder
    embedded = (open_feature_decoder(one, other_weights=other_weights) for one in DECODERS)
    return next((decoder for decoder in embedded if decoder.source.fits(source)), None)
