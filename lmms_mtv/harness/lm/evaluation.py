"""The evaluation that a model of lm-eval takes part in. A fit needs the evaluation, and lm-eval does not pass it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager

from lmms_mtv.errors import DataError


class Tasks(TaskManager):  # type: ignore[misc]
    """A ``TaskManager`` that keeps its loaded tasks: ``Tasks().of`` returns exactly the evaluated tasks."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._loaded: dict[str, Any] = {}

    def load(self, task_list: Any) -> Any:
        loaded = super().load(task_list)
        self._loaded |= loaded["tasks"]
        return loaded

    def of(self, name: str) -> Any:
        """Return the task that was last loaded as ``name``.

        Raises:
            DataError: no task was loaded as ``name``.
        """
        if name not in self._loaded:
            raise DataError(f"task {name} was not loaded by the task manager that mtv was given: evaluate with it")
        return self._loaded[name]


@dataclass(frozen=True)
class Evaluation:
    """An evaluation by lm-eval.

    Attributes:
        task: function that returns the harness's task of a name.
        system_instruction: argument of ``simple_evaluate``.
        apply_chat_template: argument of ``simple_evaluate``.
        fewshot_as_multiturn: argument of ``simple_evaluate``.
        folder: the folder for fitted vectors; None for no folder.
        trackers: experiment trackers that the harness opened, ``wandb`` or ``trackio``, which get the fits.
    """

    task: Callable[[str], Any]
    system_instruction: str | None = None
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool = False
    folder: Path | None = None
    trackers: Sequence[str] = ()


_CURRENT: ContextVar[Evaluation | None] = ContextVar("evaluation", default=None)


@contextmanager
def evaluating(evaluation: Evaluation) -> Iterator[None]:
    """Make ``evaluation`` the evaluation of the models that lm-eval creates inside the block."""
    token = _CURRENT.set(evaluation)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def current() -> Evaluation | None:
    """Return the evaluation of the innermost :func:`evaluating` block, or None."""
    return _CURRENT.get()
