"""Errors at the command line of the harness.

lmms-eval catches every exception of an evaluation, prints a traceback and exits with status 0, so that a failed run
looks like a good one to a script. A ``SystemExit`` is not caught: it prints one line and gives status 1. Exceptions of
the model become one by :func:`fail_with_status`. :func:`end_failed_runs` listens to what the harness logs of all
others, as of a task or of a metric.
"""

from __future__ import annotations

import functools
import inspect
import sys
import traceback
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from loguru import logger

from lmms_mtv.errors import MtvError

A = ParamSpec("A")
R = TypeVar("R")

COMMAND_LINE = "lmms_eval.__main__"
"""The module that only the harness's command line imports."""

EVALUATOR = "lmms_eval.evaluator"


def fail_with_status(function: Callable[A, R]) -> Callable[A, R]:
    """Let an exception end the run when the harness was started from its command line.

    An :class:`MtvError` is one line, any other exception keeps its traceback. Called from Python, or with
    ``--verbosity DEBUG``, the exception goes on as it is.
    """

    @functools.wraps(function)
    def guarded(*args: A.args, **kwargs: A.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            if COMMAND_LINE not in sys.modules or any("DEBUG" in argument for argument in sys.argv):
                raise
            if not isinstance(error, MtvError):
                traceback.print_exc()
            raise SystemExit(f"lmms-mtv: {type(error).__name__}: {error}") from error

    return guarded


@functools.cache
def end_failed_runs() -> None:
    """Let an error that the harness's command line logs end the run with status 1.

    Only the module of the command line counts, and only where the harness was started from it. The message itself is
    printed by the harness's own handler, which comes first.
    """
    if COMMAND_LINE not in sys.modules:
        return

    def end(_: object) -> None:
        raise SystemExit(1)

    logger.add(end, level="ERROR", filter=lambda record: record["name"] == COMMAND_LINE, catch=False)


def caches_answers() -> bool:
    """Return whether the evaluation that called this keeps answers (``--use_cache``).

    lmms-eval tells its models nothing of the cache: ``simple_evaluate`` has to be looked for among the callers.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "simple_evaluate" and frame.f_globals.get("__name__") == EVALUATOR:
            return frame.f_locals.get("use_cache") is not None
        frame = frame.f_back
    return False
