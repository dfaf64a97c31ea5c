"""The evaluation that a model of lm-eval takes part in: lm-eval does not pass it, and a fit needs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager

from lmms_mtv.errors import DataError


class Tasks(TaskManager):  # type: ignore[misc]
    """A ``TaskManager`` that keeps what it loads: ``Tasks().of`` gives the very tasks that are evaluated."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._loaded: dict[str, Any] = {}

    def load(self, task_list: Any) -> Any:
        loaded = super().load(task_list)
        self._loaded |= loaded["tasks"]
        return loaded

    def of(self, name: str) -> Any:
        """Return the task that was last loaded as ``name``. Raises :class:`DataError` if none was."""
        if name not in self._loaded:
            raise DataError(f"task {name} was not loaded by the task manager that mtv was given: evaluate with it")
        return self._loaded[name]


@dataclass(frozen=True)
class Evaluation:
    """An evaluation by lm-eval.

    ``task`` gives the harness's task of a name. ``system_instruction``, ``apply_chat_template`` and
    ``fewshot_as_multiturn`` are those of ``simple_evaluate``. ``folder`` is where fitted vectors are saved.
    """

    task: Callable[[str], Any]
    system_instruction: str | None = None
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool = False
    folder: Path | None = None


_CURRENT: ContextVar[Evaluation | None] = ContextVar("evaluation", default=None)


@contextmanager
def evaluating(evaluation: Evaluation) -> Iterator[None]:
    """Let models that lm-eval itself creates inside the block belong to ``evaluation``."""
    token = _CURRENT.set(evaluation)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def current() -> Evaluation | None:
    """Return the evaluation of the innermost :func:`evaluating` block, if there is one."""
    return _CURRENT.get()
