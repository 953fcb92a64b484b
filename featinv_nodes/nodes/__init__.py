"""The pack's nodes, thin V3 classes over core and host."""

from . import concepts, control, discover, features, loaders, look, viz

ALL = [*loaders.NODES, *features.NODES, *control.NODES, *concepts.NODES, *discover.NODES, *viz.NODES, *look.NODES]
