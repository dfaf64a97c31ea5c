"""Word pairs, and how an answer is scored. Both harnesses use this file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmms_mtv.harness.documents import documents

__all__ = ["documents"]

Doc = dict[str, Any]


def score(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    """Whether the first line of the answer is the other word, in either case."""
    return {"exact_match": float(results[0].strip().split("\n")[0].strip().lower() == doc["output"].strip().lower())}


def score_cased(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    """Return whether the first line of the answer is the other word, in the same case."""
    return {"exact_match": float(results[0].strip().split("\n")[0].strip() == doc["output"].strip())}


def score_colon(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    """The same for an answer that a comma ends."""
    return score(doc, [results[0].split(",")[0]])
