"""Concepts: subspaces of feature space that a feature map decomposes into (paper Sec. 4.3, Appendix D)."""

from .decomposition import REST, Concepts
from .discovery import METHODS, discover, own_directions
from .files import load_concepts, save_concepts

__all__ = ["METHODS", "REST", "Concepts", "discover", "load_concepts", "own_directions", "save_concepts"]
