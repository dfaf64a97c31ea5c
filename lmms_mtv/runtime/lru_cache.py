"""A cache with a limit of memory: the least recently used value goes first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class LruCache(Generic[K, V]):
    """Values by key, of ``limit`` bytes at most together; the one put last is there whatever its size."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._entries: OrderedDict[K, tuple[V, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def size(self) -> int:
        """Bytes of all values together."""
        return sum(size for _, size in self._entries.values())

    def room(self, size: int) -> bool:
        """Return whether ``size`` more bytes fit without anything going."""
        return self.size + size <= self._limit

    def get(self, key: K) -> V | None:
        """Return the value of ``key``, or None if it is not there any more."""
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key][0]

    def put(self, key: K, value: V, size: int) -> None:
        """Keep ``value`` of ``size`` bytes, in place of one of the same key."""
        self._entries.pop(key, None)
        self._entries[key] = value, size
        while len(self._entries) > 1 and not self.room(0):
            self._entries.popitem(last=False)
