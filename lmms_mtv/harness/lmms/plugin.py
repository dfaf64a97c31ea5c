"""The plugin of lmms-eval, loaded through its entry point: the model ``mtv`` and this package's tasks."""

from __future__ import annotations

import functools
import itertools
import operator
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import yaml
from loguru import logger

from lmms_mtv.harness.lmms.failure import end_failed_runs
from lmms_mtv.harness.paths import LM_EVAL, tasks_folder
from lmms_mtv.runtime import environment

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

__all__ = ["NAME", "manifest", "register_tasks", "tasks_folder"]

NAME: Final = "mtv"
"""The model's name in lmms-eval."""


def manifest() -> ModelManifest:
    """Return the model for the entry-point group ``lmms_eval.models``, and register the tasks.

    lmms-eval calls this function while it starts. If the command line asks for the model and a required library cannot
    work, the run ends here with one line and exit status 1. Other models of lmms-eval run on with a warning.
    """
    libraries, used = environment.libraries(), names_model(sys.argv[1:])
    if (line := environment.problem(libraries)) is not None:
        if used:
            raise SystemExit(f"lmms-mtv: {line}")
        logger.warning(line)
    elif used and (line := environment.newer(libraries)) is not None:
        logger.warning(line)
    register_tasks()
    # At the top it would be half imported: lmms-eval asks for this model while it is imported itself.
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=NAME, chat_class_path="lmms_mtv.harness.lmms.model.LmmsEvalMtv")


def names_model(arguments: Sequence[str]) -> bool:
    """Return whether a command line of lmms-eval asks for the model ``mtv``, directly or in its ``--config`` file."""
    joined = dict(argument.split("=", 1) for argument in arguments if argument.startswith("--") and "=" in argument)
    flags = joined | dict(itertools.pairwise(arguments))
    if flags.get("--model") == NAME:
        return True
    path = Path(flags.get("--config", ""))
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else []
    except (OSError, ValueError, yaml.YAMLError):
        # The harness reads the file again, and reports the error.
        return False
    entries = entries if isinstance(entries, list) else [entries]
    return any(isinstance(entry, dict) and entry.get("model") == NAME for entry in entries)


def register_tasks() -> None:
    """Add this package's tasks to the index of every ``TaskManager``.

    lmms-eval has entry points for models but none for tasks, so this function extends its index. This is the only place
    where this package changes another package. The harness's own tasks and the tasks of ``--include_path`` keep
    precedence. A manager made for the model ``mtv`` is the first sign of its evaluation: its model arguments are
    checked before the task files are read, and from then on an error of the harness ends the run.
    """
    from lmms_eval.tasks import TaskManager

    original = TaskManager.initialize_tasks
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def initialize_tasks(self: Any, include_path: Any = None, include_defaults: bool = True) -> dict[str, Any]:
        if getattr(self, "model_name", None) == NAME:
            end_failed_runs()
            # This import would be one of lmms-eval's models while lmms-eval collects them.
            from lmms_mtv.harness.lmms.command_line import check_evaluation

            check_evaluation()
        index: dict[str, Any] = original(self, include_path=include_path, include_defaults=include_defaults)
        if not include_defaults:
            return index
        ours = [self._get_task_and_group(str(path)) for path in tasks_folder().iterdir() if path.name != LM_EVAL]
        return functools.reduce(operator.or_, ours, {}) | index

    TaskManager.initialize_tasks = initialize_tasks
