"""A loaded model with the tasks of a run, outside of the harness's command line."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

from accelerate import Accelerator, InitProcessGroupKwargs
from lmms_eval.tasks import TaskManager, get_task_dict
from loguru import logger
from tenacity import RetryError

from lmms_mtv.errors import MtvError, unknown
from lmms_mtv.harness.arms import arm_arguments
from lmms_mtv.harness.lmms import bases
from lmms_mtv.harness.lmms.model import LmmsEvalMtv
from lmms_mtv.harness.lmms.plugin import register_tasks

_PATIENCE: Final = timedelta(hours=24)

_LISTING: Final = "lmms-eval --tasks list"


@dataclass(frozen=True)
class LoadedRun:
    """A loaded model with tasks.

    Attributes:
        model: the model.
        manager: the harness's index of tasks.
        tasks: the single tasks by their names.
        groups: the names of the single tasks in each group.
        arms: the arguments that :meth:`LmmsEvalMtv.arm` takes for each arm.
    """

    model: LmmsEvalMtv
    manager: TaskManager
    tasks: Mapping[str, Any]
    groups: Mapping[str, Sequence[str]]
    arms: Mapping[str, Mapping[str, Any]]


def load_run(
    names: Sequence[str],
    arguments: Mapping[str, Any],
    arms: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    batch_size: int | str,
    library: Path | None,
    reuse: bool,
    include_path: Sequence[str] = (),
) -> LoadedRun:
    """Load a model and tasks, and return them.

    Args:
        names: the names of tasks or of groups of tasks.
        arguments: the model arguments by name, without the arguments below.
        arms: further model arguments of each arm; a setting of a method in ``arguments`` applies to the arms whose
            method has the setting. None for a run without arms.
        batch_size: rows of a forward, or ``auto``.
        library: folder of the vector library; None is the default folder.
        reuse: True takes a vector of the same recipe from the library.
        include_path: folders of further task files.

    Raises:
        ArgumentError: a task or an argument is unknown.
        DataError: a data set of this package cannot be loaded.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # The processes find each other, as in lmms-eval's own command.
        Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)])
    own = {"batch_size": batch_size, "reuse": reuse, "library": None if library is None else str(library)}
    arguments = {**own, **arguments}
    # An error in an argument shows before the harness reads all of its task files.
    if arms is not None:
        parts = arm_arguments(arguments, arms, bases.names_of(arguments))
        arguments, arms = parts.shared, parts.arms
        for name, lacking in parts.left_out.items():
            logger.info(f"{name}= for all arms is no setting of {', '.join(lacking)}: left out there")
    bases.check(arguments)
    register_tasks()
    manager = TaskManager("ERROR", include_path=list(include_path))
    for name in names:
        if name not in manager.all_tasks:
            raise unknown("task", name, manager.all_tasks, _LISTING)
    model = LmmsEvalMtv(**arguments)
    kind = "simple" if model.is_simple else "chat"
    loaded = {name: _load(name, manager, kind) for name in names}
    return LoadedRun(
        model,
        manager,
        tasks={name: task for tasks in loaded.values() for name, task in tasks.items()},
        groups={name: list(tasks) for name, tasks in loaded.items() if list(tasks) != [name]},
        arms=arms or {},
    )


def _load(name: str, manager: TaskManager, kind: str) -> dict[str, Any]:
    """Return the single tasks of the name of a task or group, by their names."""
    try:
        return _single_tasks(get_task_dict([name], manager, kind))
    except RetryError as error:
        # The harness asks for a data set several times, and reports the number of attempts instead of the reason.
        if isinstance(reason := error.last_attempt.exception(), MtvError):
            raise reason from error
        raise


def _single_tasks(loaded: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the single tasks in the harness's result for a name: tasks, and groups of tasks or of groups."""
    single: dict[str, Any] = {}
    for task in loaded.values():
        single |= _single_tasks(task) if isinstance(task, Mapping) else {task.config.task: task}
    return single
