"""The folder of this package's task files."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from lmms_mtv.errors import DataError

LM_EVAL: Final = "lm_eval"
"""The folder of the tasks for lm-evaluation-harness; the other folders have tasks for lmms-eval."""


def tasks_folder() -> Path:
    """Return the folder of the task files: in an installed package, or at the root of an editable installation."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "tasks", package.parent / "tasks"):
        if folder.is_dir():
            return folder
    raise DataError(f"the task files of lmms-mtv are missing beside {package}: install lmms-mtv again")
