"""The evaluation of lmms-eval that calls this package.

lmms-eval does not pass a model the arguments or the results of the evaluation, and its task manager nothing about the
model. This module finds the functions of lmms-eval among the callers, and reads their local variables.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

_EVALUATOR: Final = "lmms_eval.evaluator"
"""The module of ``simple_evaluate``."""


def evaluation() -> Mapping[str, Any]:
    """Return the local variables of the ``simple_evaluate`` that called this function, or an empty mapping."""
    return _locals_of("simple_evaluate", _EVALUATOR)


def options() -> Any:
    """Return the options of the evaluation that lmms-eval's command line has begun, or None."""
    return _locals_of("cli_evaluate_single").get("args")


def caches_answers() -> bool:
    """Return whether the evaluation caches answers (``--use_cache``)."""
    return evaluation().get("use_cache") is not None


def keeps_samples() -> bool:
    """Return whether the evaluation keeps samples, and caches no answers by the texts of its requests."""
    called = evaluation()
    return bool(called.get("log_samples") or called.get("predict_only")) and not caches_answers()


def results_file() -> Path | None:
    """Return the path of the harness's results without ``_results.json``, or None if the harness writes no results."""
    called = evaluation()
    tracker = called.get("evaluation_tracker")
    if tracker is None or not tracker.output_path:
        return None
    folder = Path(tracker.output_path, tracker.general_config_tracker.model_name_sanitized or "")
    return folder / str(called["datetime_str"]).replace(":", "-")


def tracks(flag: str) -> bool:
    """Return whether the command line has a ``flag`` such as ``wandb_args``, with a value."""
    return bool(getattr(evaluation().get("cli_args"), flag, None))


def _locals_of(function: str, module: str | None = None) -> Mapping[str, Any]:
    """Return the local variables of the nearest caller of a name, in ``module`` if given, or an empty mapping."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == function and module in (None, frame.f_globals.get("__name__")):
            return frame.f_locals
        frame = frame.f_back
    return {}
