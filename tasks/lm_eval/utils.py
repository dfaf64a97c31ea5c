"""Word pairs for lm-evaluation-harness, which takes a data set from a function."""

from __future__ import annotations

from typing import Any

from datasets import DatasetDict

from lmms_mtv.data import SOURCES, documents
from lmms_mtv.harness.lmms.failure import fail_with_status


@fail_with_status
def pairs(data: str, **metadata: Any) -> DatasetDict:
    """All splits of ``data``. The harness passes the task's metadata along."""
    return DatasetDict({split: documents(data, split) for split in SOURCES[data].rows})
