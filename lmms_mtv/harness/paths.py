"""Where this package keeps its task files."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from lmms_mtv.errors import DataError

LM_EVAL: Final = "lm_eval"
"""The folder, among the tasks, of those for lm-evaluation-harness; the others are for lmms-eval."""


def tasks_folder() -> Path:
    """Return the folder of the task files: inside an installed package, at the repository's root in an editable one."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "tasks", package.parent / "tasks"):
        if folder.is_dir():
            return folder
    raise DataError(f"the task files of lmms-mtv are missing beside {package}: install lmms-mtv again")
