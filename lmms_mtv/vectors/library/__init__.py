"""The vector library: vectors kept in one place, found again by what they are, checked and shared."""

from lmms_mtv.vectors.library.entry import Entry, Problem
from lmms_mtv.vectors.library.library import Library

__all__ = ["Entry", "Library", "Problem"]
