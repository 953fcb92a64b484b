"""The pack's nodes, thin V3 classes over core and host."""

from . import concepts, control, discover, faithful, features, loaders, look, viz

ALL = [*loaders.NODES, *features.NODES, *control.NODES, *faithful.NODES, *concepts.NODES, *discover.NODES, *viz.NODES, *look.NODES]
