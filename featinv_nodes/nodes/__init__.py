"""The pack's nodes, thin V3 classes over core and host."""

from . import closed_loop, concepts, control, discover, features, guidance, loaders, preview, viz

ALL = [
    *loaders.NODES,
    *features.NODES,
    *control.NODES,
    *guidance.NODES,
    *concepts.NODES,
    *discover.NODES,
    *viz.NODES,
    *closed_loop.NODES,
    *preview.NODES,
]
