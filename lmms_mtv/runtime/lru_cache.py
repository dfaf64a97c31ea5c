"""A cache with a memory limit, which drops the least recently used values first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class LruCache(Generic[K, V]):
    """Values by key with a limit of their total size. The last added value stays, even if it exceeds the limit.

    Args:
        limit: largest size of all values together, in bytes.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._entries: OrderedDict[K, tuple[V, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def size(self) -> int:
        """Size of all values together, in bytes."""
        return sum(size for _, size in self._entries.values())

    def room(self, size: int) -> bool:
        """Return whether a value of ``size`` bytes fits without dropping other values."""
        return self.size + size <= self._limit

    def get(self, key: K) -> V | None:
        """Return the value of ``key``, or None if the cache does not have the value."""
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key][0]

    def pop(self, key: K) -> V | None:
        """Remove the value of ``key`` and return it, or None if the cache does not have the value."""
        value, _ = self._entries.pop(key, (None, 0))
        return value

    def clear(self) -> None:
        """Drop all values."""
        self._entries.clear()

    def put(self, key: K, value: V, size: int) -> list[tuple[K, V]]:
        """Add a value, and drop the least recently used values while the limit is exceeded.

        Args:
            key: key of the value; an earlier value of this key is replaced.
            value: the value.
            size: size of the value in bytes.

        Returns:
            The dropped values with their keys, the least recently used first.
        """
        self._entries.pop(key, None)
        self._entries[key] = value, size
        dropped = []
        while len(self._entries) > 1 and not self.room(0):
            old, (unused, _) = self._entries.popitem(last=False)
            dropped.append((old, unused))
        return dropped
