"""Processes that the tests start: commands that end with all their children, and workers that do not hang."""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext, ForkServerProcess
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


def context() -> ForkServerContext:
    """Return the context whose workers come from a server without threads.

    A worker that is forked from the tests themselves can wait for ever for a lock that another thread of the tests
    held at that moment. The server imports what most workers need, as these imports take most of the time of a start.
    """
    served = get_context("forkserver")
    llama = "transformers.models.llama.modeling_llama"
    served.set_forkserver_preload(["torch", "lmms_mtv.methods", "lmms_mtv.fit.session", "lmms_mtv.hooks", llama])
    return served


def worker(work: Callable[..., None], *arguments: Any, limit: float = 120) -> ForkServerProcess:
    """Return a process, not yet started, that calls ``work``.

    Args:
        work: The function that the process calls, at the top level of a module.
        arguments: The arguments of ``work``; they are pickled.
        limit: The limit in seconds. A process that takes longer writes the stacks of its threads and ends.
    """
    return context().Process(target=_work, args=(work, limit, *arguments), daemon=True)


def in_ranks(work: Callable[..., None], count: int, *arguments: Any, limit: float = 240) -> None:
    """Run ``work(rank, *arguments)`` in ``count`` processes, and wait for all of them.

    Args:
        work: The function that each worker calls.
        count: The number of workers.
        arguments: The arguments of ``work`` after the rank; they are pickled.
        limit: The limit in seconds. A worker that takes longer writes the stacks of its threads and ends.

    Raises:
        torch.multiprocessing.ProcessRaisedException: ``work`` raised in a worker.
        torch.multiprocessing.ProcessExitedException: A worker ended otherwise, for example at the limit.
    """
    context()
    start_processes(  # type: ignore[no-untyped-call]
        _rank, (work, limit, *arguments), nprocs=count, daemon=True, start_method="forkserver"
    )


def _rank(rank: int, work: Callable[..., None], limit: float, *arguments: Any) -> None:
    _work(work, limit, rank, *arguments)


def _work(work: Callable[..., None], limit: float, *arguments: Any) -> None:
    faulthandler.dump_traceback_later(limit, exit=True)
    # All workers of one server share one lock of tqdm. A worker that is killed while it holds this lock would stop the
    # progress bars of the others for ever.
    tqdm.set_lock(threading.RLock())
    work(*arguments)
