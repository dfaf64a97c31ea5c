"""Errors at the command line of the harness.

lmms-eval catches every exception of an evaluation, prints a traceback and exits with status 0, so that a script takes a
failed run for a good run. lmms-eval does not catch a ``SystemExit``, which prints one line and gives status 1.
:func:`fail_with_status` turns exceptions of the model into a ``SystemExit``. :func:`end_failed_runs` listens to the
errors that the harness logs itself, for example for a task or a metric.
"""

from __future__ import annotations

import functools
import os
import sys
import traceback
from collections.abc import Callable
from typing import Final, ParamSpec, TypeVar

from loguru import logger

from lmms_mtv.errors import MtvError

A = ParamSpec("A")
R = TypeVar("R")

COMMAND_LINE: Final = "lmms_eval.__main__"
"""The module that only the harness's command line imports."""

VERBOSITY: Final = "VERBOSITY"
"""The environment variable in which the harness's command line keeps the value of ``--verbosity``."""


def fail_with_status(function: Callable[A, R]) -> Callable[A, R]:
    """End the run with status 1 after an exception, if the harness was started from its command line.

    An :class:`MtvError` is printed as one line, any other exception with its traceback. The exception stays unchanged
    if the function is called from Python, or if ``--verbosity`` is ``DEBUG``: the harness raises the exception then
    too.
    """

    @functools.wraps(function)
    def guarded(*args: A.args, **kwargs: A.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            if COMMAND_LINE not in sys.modules or os.environ.get(VERBOSITY) == "DEBUG":
                raise
            if not isinstance(error, MtvError):
                traceback.print_exc()
            raise SystemExit(f"lmms-mtv: {type(error).__name__}: {error}") from error

    return guarded


@functools.cache
def end_failed_runs() -> None:
    """End the run with status 1 after an error that the harness's command line logs.

    Errors of other modules, and of a harness that was called from Python, end nothing. The harness's own handler comes
    first and prints the message.
    """
    if COMMAND_LINE not in sys.modules:
        return

    def end(_: object) -> None:
        raise SystemExit(1)

    logger.add(end, level="ERROR", filter=lambda record: record["name"] == COMMAND_LINE, catch=False)
