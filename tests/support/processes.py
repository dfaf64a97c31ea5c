"""Processes that the tests start: commands that end with all their children, and forked workers that do not hang."""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

from torch.multiprocessing.spawn import start_processes
from tqdm import tqdm


def run(
    command: Sequence[str],
    *,
    timeout: float = 300,
    cwd: Path | str | None = None,
    env: Mapping[str, str] | None = None,
    merged: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run a command in a process group of its own, and return the status and the output of the command.

    Args:
        command: The program and its arguments.
        timeout: The limit in seconds. At the limit the command and all processes that the command started are killed.
        cwd: The working directory.
        env: The whole environment; without ``env`` that of the tests.
        merged: Write the standard error of the command to the standard output.

    Raises:
        subprocess.TimeoutExpired: The command took longer than ``timeout``.
    """
    errors = subprocess.STDOUT if merged else subprocess.PIPE
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=cwd, env=env, start_new_session=True
    ) as process:
        try:
            output, error = process.communicate(timeout=timeout)
        except BaseException:
            # A child of the command that lives on would keep the cores busy and the pipes open.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, process.returncode, output, error)


def forked(work: Callable[..., None], *arguments: Any, limit: float = 120) -> ForkProcess:
    """Return a worker, not yet started, that is forked from the tests and so finds everything imported.

    Args:
        work: The function that the worker calls.
        arguments: What ``work`` is handed.
        limit: The limit in seconds. A worker that takes longer writes the stacks of its threads and ends.
    """
    return get_context("fork").Process(target=_work, args=(work, limit, *arguments), daemon=True)


def in_ranks(work: Callable[..., None], count: int, *arguments: Any, limit: float = 240) -> None:
    """Run ``work(rank, *arguments)`` in ``count`` forked workers, and wait for all of them.

    Args:
        work: The function that each worker calls.
        count: The number of workers.
        arguments: What ``work`` is handed after the rank.
        limit: The limit in seconds. A worker that takes longer writes the stacks of its threads and ends.

    Raises:
        torch.multiprocessing.ProcessRaisedException: ``work`` raised in a worker.
        torch.multiprocessing.ProcessExitedException: A worker ended otherwise, for example at the limit.
    """
    start_processes(  # type: ignore[no-untyped-call]
        _rank, (work, limit, *arguments), nprocs=count, daemon=True, start_method="fork"
    )


def _rank(rank: int, work: Callable[..., None], limit: float, *arguments: Any) -> None:
    _work(work, limit, rank, *arguments)


def _work(work: Callable[..., None], limit: float, *arguments: Any) -> None:
    faulthandler.dump_traceback_later(limit, exit=True)
    # All forks share one lock of tqdm with the tests. A worker that was killed while it held this lock stopped the next
    # progress bar of the tests for ever.
    tqdm.set_lock(threading.RLock())
    work(*arguments)
