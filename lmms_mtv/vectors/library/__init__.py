"""The vector library: a folder in which vectors are stored, found by their recipe, checked and shared."""

from lmms_mtv.vectors.library.entry import Entry, Problem
from lmms_mtv.vectors.library.library import Library

__all__ = ["Entry", "Library", "Problem"]
