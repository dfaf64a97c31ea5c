"""The documents and the scores of word pairs, for both harnesses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmms_mtv.harness.documents import documents

__all__ = ["documents"]

Doc = dict[str, Any]


def score(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    """Return 1 if the first line of the answer is the other word, in upper or lower case, else 0."""
    return {"exact_match": float(results[0].strip().split("\n")[0].strip().lower() == doc["output"].strip().lower())}


def score_cased(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    """Return 1 if the first line of the answer is the other word in the same case, else 0."""
    return {"exact_match": float(results[0].strip().split("\n")[0].strip() == doc["output"].strip())}


def score_colon(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    """Return the score of the answer up to its first comma, in upper or lower case."""
    return score(doc, [results[0].split(",")[0]])
