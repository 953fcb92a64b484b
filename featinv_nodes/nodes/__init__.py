"""The pack's nodes, thin V3 classes over core and host."""

from . import concepts, control, features, loaders, look

ALL = [*loaders.NODES, *features.NODES, *control.NODES, *concepts.NODES, *look.NODES]
