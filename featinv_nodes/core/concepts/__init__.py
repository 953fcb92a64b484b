"""Concepts: subspaces of feature space that a feature map decomposes into (paper Sec. 4.3, Appendix D)."""

from .decomposition import REST, Concepts, completeness
from .discovery import METHODS, discover
from .files import load_concepts, save_concepts
from .own import own_directions
from .sparse import SparseEncoder

__all__ = ["METHODS", "REST", "Concepts", "SparseEncoder", "completeness", "discover", "load_concepts", "own_directions", "save_concepts"]
