"""Batch sizes: the number of rows in a forward, and smaller batches after an out-of-memory error."""

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
"""First number of rows of an automatic batch size."""


@dataclass
class BatchSize:
    """The number of rows in one forward.

    Attributes:
        rows: the number of rows.
        automatic: True to halve the number whenever the memory runs out. Later forwards use the halved number.
    """

    rows: int
    automatic: bool = False

    def copy(self) -> BatchSize:
        """Return an independent copy, for forwards of another length."""
        return BatchSize(self.rows, self.automatic)

    def run_batches(
        self, items: Sequence[T], run: Callable[[Sequence[T]], R], at_most: int | None = None
    ) -> Iterator[tuple[Sequence[T], R]]:
        """Yield each batch of ``items``, in order, with its result.

        A batch that ran out of memory runs again in halves if the batch size is automatic.

        Args:
            items: the items.
            run: function that returns the result of a batch. A call that raises must not leave effects.
            at_most: largest number of rows, None for no limit besides ``rows``.

        Raises:
            MemoryLimitError: the memory ran out with one row, or with a batch size that is not automatic.
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
            # After the handler, since its exception keeps the tensors of the forward in memory.
            self.rows = len(batch) // 2
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            logger.warning("out of memory with %d rows in a forward: going on with %d", len(batch), self.rows)


@contextmanager
def single_row() -> Iterator[None]:
    """Run forwards of one row inside the block, with a clear error if the memory runs out.

    Raises:
        MemoryLimitError: the memory ran out inside the block.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise _too_large(1) from error


def out_of_memory(error: BaseException) -> bool:
    """Return whether ``error`` is an out-of-memory error of a device or of the machine."""
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
