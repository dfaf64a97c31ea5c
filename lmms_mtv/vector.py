"""The names of :mod:`lmms_mtv.vectors` where methods written for version 0.1 import them."""

from lmms_mtv.vectors import (
    ATTENTION,
    HEADS,
    MLP,
    RESIDUAL,
    STREAMS,
    Edit,
    Edits,
    Geometry,
    TaskVector,
    VectorCard,
    by_stream,
    rows_of,
    taken,
)

__all__ = [
    "ATTENTION",
    "HEADS",
    "MLP",
    "RESIDUAL",
    "STREAMS",
    "Edit",
    "Edits",
    "Geometry",
    "TaskVector",
    "VectorCard",
    "by_stream",
    "rows_of",
    "taken",
]
