"""The pack's nodes, thin V3 classes over core and host."""

from . import (
    closed_loop,
    concepts,
    control,
    decoder,
    discover,
    features,
    guidance,
    linear_maps,
    loaders,
    mix,
    pair,
    preview,
    saved,
    untrained,
    viz,
    worlds,
)

ALL = [
    *pair.NODES,
    *loaders.NODES,
    *worlds.NODES,
    *features.NODES,
    *mix.NODES,
    *linear_maps.NODES,
    *saved.NODES,
    *control.NODES,
    *guidance.NODES,
    *untrained.NODES,
    *decoder.NODES,
    *concepts.NODES,
    *discover.NODES,
    *viz.NODES,
    *closed_loop.NODES,
    *preview.NODES,
]
