"""The pack's nodes, thin V3 classes over core and host."""

from . import concepts, control, discover, features, guidance, loaders, preview, viz

ALL = [
    *loaders.NODES,
    *features.NODES,
    *control.NODES,
    *guidance.NODES,
    *concepts.NODES,
    *discover.NODES,
    *viz.NODES,
    *preview.NODES,
]
