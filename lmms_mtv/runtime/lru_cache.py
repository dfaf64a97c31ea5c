"""What is kept for another time within a limit: what was not used for longest goes first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Kept(Generic[K, V]):
    """Values by key, of ``limit`` bytes at most together; the one put last is there whatever its size."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._found: OrderedDict[K, tuple[V, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._found)

    def room(self, size: int) -> bool:
        """Whether ``size`` more bytes fit without anything going."""
        return sum(kept for _, kept in self._found.values()) + size <= self._limit

    def get(self, key: K) -> V | None:
        """The value of ``key`` if it is still there."""
        if key not in self._found:
            return None
        self._found.move_to_end(key)
        return self._found[key][0]

    def put(self, key: K, value: V, size: int) -> None:
        """Keep ``value`` of ``size`` bytes, in place of one of the same key."""
        self._found.pop(key, None)
        self._found[key] = value, size
        while len(self._found) > 1 and not self.room(0):
            self._found.popitem(last=False)
