"""Task vectors: edits of a model, the card with the origin of the edits, and the file that holds both."""

from lmms_mtv.vectors.card import Geometry, VectorCard
from lmms_mtv.vectors.edit import (
    ATTENTION,
    HEADS,
    MLP,
    RESIDUAL,
    STREAMS,
    Edit,
    Edits,
    by_stream,
    distinct,
    first_equal,
    rows_of,
    taken,
)
from lmms_mtv.vectors.vector import TaskVector, checksum

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
    "checksum",
    "distinct",
    "first_equal",
    "rows_of",
    "taken",
]
