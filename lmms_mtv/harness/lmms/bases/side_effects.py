"""Side effects of a wrapper of lmms-eval that this package keeps out of a run."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator
from typing import Final

from lmms_eval.models.model_utils.gen_metrics import get_logged_metrics_history, log_metrics, reset_logged_metrics
from loguru import logger

_METRICS: Final = ("total_elapsed_time", "total_gen_tokens", "avg_speed")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide the progress bars and the figures of a wrapper inside the block, and show them if the block fails."""
    hidden = io.StringIO()
    logger.disable(log_metrics.__module__)
    try:
        with contextlib.redirect_stderr(hidden):
            yield
    except BaseException:
        sys.stderr.write(hidden.getvalue())
        raise
    finally:
        logger.enable(log_metrics.__module__)


@contextlib.contextmanager
def unmeasured() -> Iterator[None]:
    """Restore the harness's throughput after the block: a fit is no part of the evaluation."""
    before = get_logged_metrics_history()
    try:
        yield
    finally:
        reset_logged_metrics()
        for metrics in map(dict, before):
            own = {name: metrics.pop(name) for name in _METRICS}
            log_metrics(**own, additional_metrics=metrics)
