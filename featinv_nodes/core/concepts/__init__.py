"""Concepts: subspaces of feature space that a feature map decomposes into (paper Sec. 4.3, Appendix D)."""

from .decomposition import REST, Concepts, completeness
from .discovery import METHODS, discover
from .files import load_concepts, save_concepts
from .sparse import SparseEncoder
from .user_directions import load_directions

__all__ = [
    "METHODS",
    "REST",
    "Concepts",
    "SparseEncoder",
    "completeness",
    "discover",
    "load_concepts",
    "load_directions",
    "save_concepts",
]
