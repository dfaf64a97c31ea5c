"""How many rows go into one forward, and what happens when they do not fit the memory."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, TypeVar

import torch

from lmms_mtv.errors import MemoryLimitError

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

AUTO: Final = 16
"""Rows with which an automatic batch size begins."""


@dataclass
class BatchSize:
    """Rows in one forward. An ``automatic`` number is halved each time the memory runs out, and stays so."""

    rows: int
    automatic: bool = False

    def copy(self) -> BatchSize:
        """Return the same to begin with, for forwards of another length."""
        return BatchSize(self.rows, self.automatic)

    def run_batches(
        self, items: Sequence[T], run: Callable[[Sequence[T]], R], at_most: int | None = None
    ) -> Iterator[tuple[Sequence[T], R]]:
        """Yield each batch of ``items``, in their order, and the result of ``run`` for it.

        What ran out of memory runs again in halves, so ``run`` must not leave anything behind when it raises. Raises
        :class:`MemoryLimitError` where there is nothing to halve.
        """
        done = 0
        while done < len(items):
            size = self.rows if at_most is None else min(self.rows, max(at_most, 1))
            batch = items[done : done + size]
            try:
                result = run(batch)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                if len(batch) == 1 or not self.automatic:
                    raise _too_large(len(batch)) from error
            else:
                done += len(batch)
                yield batch, result
                continue
            # Outside of the handler, where the exception no longer holds on to the tensors of the forward.
            self.rows = len(batch) // 2
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            logger.warning("out of memory with %d rows in a forward: going on with %d", len(batch), self.rows)


@contextmanager
def single_row() -> Iterator[None]:
    """Run forwards of one row inside the block. Raises :class:`MemoryLimitError` when the memory runs out in it."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise _too_large(1) from error


def out_of_memory(error: BaseException) -> bool:
    """Return whether ``error`` says that a device, or the machine, has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return "out of memory" in text or "can't allocate memory" in text


def _too_large(rows: int) -> MemoryLimitError:
    if rows > 1:
        return MemoryLimitError(
            f"{rows} rows in a forward do not fit the memory: pass a smaller batch_size=, or batch_size=auto"
        )
    return MemoryLimitError(
        "one prompt alone does not fit the memory: pass dtype=bfloat16, device_map=auto, a smaller cache_gb=, fewer "
        "fit_shots= (or shots=), or smaller images (max_pixels=)"
    )
