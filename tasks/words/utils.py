"""Word pairs, and how an answer is scored. Both harnesses use this file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmms_mtv.harness.documents import documents

__all__ = ["documents"]

Doc = dict[str, Any]


def score(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    """Whether the answer is the other word, in either case."""
    return {"exact_match": float(results[0].strip().lower() == doc["output"].strip().lower())}
