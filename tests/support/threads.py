"""Ranks that are threads of one process: what each rank does and passes on, without the start of processes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from lmms_mtv.runtime.distributed import Ranks

T = TypeVar("T")


@dataclass(frozen=True)
class ThreadRanks(Ranks):
    """One of several threads. ``parts`` has a place for what each thread passes on."""

    parts: tuple[list[Any], threading.Barrier] = ([], threading.Barrier(1))

    def _gather(self, own: Any) -> list[Any]:
        places, barrier = self.parts
        places[self.rank] = own
        barrier.wait(60)
        gathered = list(places)
        barrier.wait(60)
        return gathered

    def all_reduce(self, part: Tensor) -> Tensor:
        return torch.stack(self._gather(part.cpu())).sum(0)

    def broadcast(self, own: T | None, source: int) -> T:
        value: T = self._gather(own)[source]
        return value


def in_threads(work: Callable[[Ranks], T], count: int) -> list[T]:
    """Return what ``work`` returns on each of ``count`` ranks."""
    parts = [None] * count, threading.Barrier(count)
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, [ThreadRanks(rank, count, parts) for rank in range(count)]))
