"""Multimodal Task Vectors as a plugin for lmms-eval: many demonstrations at the price of a zero-shot prompt."""

from typing import TYPE_CHECKING, Any

from lmms_mtv.errors import MtvError
from lmms_mtv.fit.examples import Episode
from lmms_mtv.fit.session import FitSession
from lmms_mtv.hooks import Prefill, Site, Sites, applied, capture, find_sites, record, verify
from lmms_mtv.vectors import Edit, TaskVector, VectorCard
from lmms_mtv.vectors.combine import combined, stacked
from lmms_mtv.vectors.library import Library

if TYPE_CHECKING:
    from lmms_mtv.models.fit import fit_vector

__version__ = "0.2.0"

__all__ = [
    "Edit",
    "Episode",
    "FitSession",
    "Library",
    "MtvError",
    "Prefill",
    "Site",
    "Sites",
    "TaskVector",
    "VectorCard",
    "applied",
    "capture",
    "combined",
    "find_sites",
    "fit_vector",
    "record",
    "stacked",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Import ``fit_vector`` when it is asked for: transformers takes seconds to import."""
    if name == "fit_vector":
        from lmms_mtv.models.fit import fit_vector

        return fit_vector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
