"""What lmms-eval loads through its entry point: the model ``mtv``, and this package's tasks."""

from __future__ import annotations

import functools
import operator
from typing import Any

from lmms_eval.models.registry_v2 import ModelManifest

from lmms_mtv.harness.paths import LM_EVAL, tasks_folder

__all__ = ["manifest", "register_tasks", "tasks_folder"]


def manifest() -> ModelManifest:
    """The model, for the entry-point group ``lmms_eval.models``. Makes the tasks known on the way."""
    register_tasks()
    return ModelManifest(model_id="mtv", chat_class_path="lmms_mtv.harness.model.Mtv")


def register_tasks() -> None:
    """Let every ``TaskManager`` index this package's tasks.

    lmms-eval has entry points for models but none for tasks, so its index is extended here: the one place where this
    package changes another. The harness's own tasks and those of ``--include_path`` keep precedence.
    """
    from lmms_eval.tasks import TaskManager

    original = TaskManager.initialize_tasks
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def initialize_tasks(self: Any, include_path: Any = None, include_defaults: bool = True) -> dict[str, Any]:
        index: dict[str, Any] = original(self, include_path=include_path, include_defaults=include_defaults)
        if not include_defaults:
            return index
        ours = [self._get_task_and_group(str(path)) for path in tasks_folder().iterdir() if path.name != LM_EVAL]
        return functools.reduce(operator.or_, ours, {}) | index

    TaskManager.initialize_tasks = initialize_tasks
