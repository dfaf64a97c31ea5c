"""Word pairs for lm-evaluation-harness, which loads a data set from a function."""

from __future__ import annotations

from typing import Any

from datasets import DatasetDict

from lmms_mtv.data import SOURCES, documents
from lmms_mtv.harness.lmms.failure import fail_with_status


@fail_with_status
def pairs(data: str, **metadata: Any) -> DatasetDict:
    """Return all splits of ``data``. The harness also passes the metadata of the task."""
    return DatasetDict({split: documents(data, split) for split in SOURCES[data].rows})
