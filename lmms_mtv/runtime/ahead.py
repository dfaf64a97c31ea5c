"""Work for the next batch, done by one other thread while a batch runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

R = TypeVar("R")


@contextmanager
def computed_ahead(function: Callable[[Sequence[int]], R], count: int) -> Iterator[Callable[[Sequence[int]], R]]:
    """Yield a function with the results of ``function``, which one thread computes a batch ahead.

    The thread computes one batch after the other. So ``function`` may use what no two threads may use at once, if the
    block uses none of this. An exception of ``function`` is raised where its batch is asked for; a batch that nobody
    asks for raises nothing. The thread has ended when the block ends.

    Args:
        function: function of a batch: of positions that follow each other.
        count: the number of positions. The batches follow each other too, mostly in equal sizes.
    """
    futures: dict[range, Future[R]] = {}
    worker = ThreadPoolExecutor(1, "lmms_mtv-ahead")

    def result(batch: Sequence[int]) -> R:
        future = futures.pop(range(batch[0], batch[-1] + 1), None)
        # The size has changed: nobody will ask for the batch that was expected.
        for unused in futures.values():
            unused.cancel()
        futures.clear()
        future = future or worker.submit(function, batch)
        following = range(batch[-1] + 1, min(batch[-1] + 1 + len(batch), count))
        if following:
            futures[following] = worker.submit(function, following)
        return future.result()

    try:
        yield result
    finally:
        worker.shutdown(cancel_futures=True)
