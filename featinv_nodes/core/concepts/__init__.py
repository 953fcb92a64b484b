"""Concepts: subspaces of feature space that a feature map decomposes into (paper Sec. 4.3, Appendix D)."""

from .decomposition import REST, Concepts
from .files import load_concepts, save_concepts

__all__ = ["REST", "Concepts", "load_concepts", "save_concepts"]
