"""Multimodal Task Vectors as a plugin for lmms-eval: many demonstrations at the price of a zero-shot prompt."""

from lmms_mtv.errors import MtvError
from lmms_mtv.fit.examples import Episode
from lmms_mtv.fit.session import FitSession
from lmms_mtv.hooks import Prefill, Site, Sites, applied, capture, find_sites, record, verify
from lmms_mtv.vectors import Edit, TaskVector, VectorCard
from lmms_mtv.vectors.combine import combined
from lmms_mtv.vectors.library import Library

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
    "record",
    "verify",
]
