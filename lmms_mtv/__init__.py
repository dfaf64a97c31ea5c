"""Multimodal Task Vectors as a plugin for lmms-eval: many demonstrations at the price of a zero-shot prompt."""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from lmms_mtv.errors import MtvError
    from lmms_mtv.fit.examples import Episode
    from lmms_mtv.fit.session import FitSession
    from lmms_mtv.hooks import Prefill, Site, Sites, applied, capture, find_sites, record, verify
    from lmms_mtv.models.fit import fit_vector
    from lmms_mtv.vectors import Edit, TaskVector, VectorCard
    from lmms_mtv.vectors.combine import combined, stacked
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
    "fit_vector",
    "record",
    "stacked",
    "verify",
]


_MODULES: Final = {
    "lmms_mtv.errors": ("MtvError",),
    "lmms_mtv.fit.examples": ("Episode",),
    "lmms_mtv.fit.session": ("FitSession",),
    "lmms_mtv.hooks": ("Prefill", "Site", "Sites", "applied", "capture", "find_sites", "record", "verify"),
    "lmms_mtv.models.fit": ("fit_vector",),
    "lmms_mtv.vectors": ("Edit", "TaskVector", "VectorCard"),
    "lmms_mtv.vectors.combine": ("combined", "stacked"),
    "lmms_mtv.vectors.library": ("Library",),
}
"""The modules of the public names."""


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for: torch and transformers take seconds to import."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
