"""Where this package keeps its task files."""

from __future__ import annotations

from pathlib import Path

from lmms_mtv.errors import DataError


def tasks_folder() -> Path:
    """The folder of the task files: inside an installed package, at the repository's root in an editable one."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "tasks", package.parent / "tasks"):
        if folder.is_dir():
            return folder
    raise DataError(f"the task files of lmms-mtv are missing beside {package}: install lmms-mtv again")
