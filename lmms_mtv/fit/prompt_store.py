"""Store of prefilled prompts: in the memory of the model's device and, beyond a limit, in the memory of the host."""

from __future__ import annotations

from typing import Any, Final

import torch

from lmms_mtv.fit.context import Context
from lmms_mtv.fit.examples import Episode, Target
from lmms_mtv.hooks import Prefill
from lmms_mtv.runtime.devices import only_device
from lmms_mtv.runtime.lru_cache import LruCache
from lmms_mtv.runtime.memory import free_host_bytes

Prompted = tuple[Prefill, Target]
"""A prefilled prompt, and the target of the query of the prompt."""

_SHARE: Final = 4
"""Part of the host's free memory for prompts: one in so many. Pinned memory takes up to twice the bytes of a tensor."""


class PromptStore:
    """Prefilled prompts by their episodes. A prompt is on the device, or on the host, or dropped.

    A prompt that does not fit the device any more moves to the host: a GPU reads a cache back in a few milliseconds,
    and takes a hundred to compute the cache again.

    Args:
        device: the device to which prompts come back.
        limit: largest size in bytes of the caches on the device. The prompt that was used last stays, whatever its
            size.
        host_limit: largest size in bytes of the prompts on the host; 0 keeps no prompts there.
    """

    def __init__(self, device: torch.device, limit: int, host_limit: int) -> None:
        self._device = device
        self._host_limit = host_limit
        self._on_device: LruCache[Episode, Prompted] = LruCache(limit)
        self._on_host: LruCache[Episode, Prompted] = LruCache(host_limit)

    @classmethod
    def of(cls, context: Context[Any], limit: int, host_limit: int | None) -> PromptStore:
        """Return the store of a fit; ``host_limit`` None is a share of the free memory if the model is on one GPU."""
        device = only_device(context.model)
        if device is None:
            # The layers of a cache are on several devices, and would come back to one.
            return cls(torch.device("cpu"), limit, 0)
        if host_limit is None:
            host_limit = free_host_bytes() // (_SHARE * context.ranks.count) if device.type == "cuda" else 0
        return cls(device, limit, host_limit)

    @property
    def bytes(self) -> int:
        """Size of the caches on the device, in bytes."""
        return self._on_device.size

    @property
    def host_bytes(self) -> int:
        """Size of the prompts on the host, in bytes."""
        return self._on_host.size

    def room(self, size: int) -> bool:
        """Return whether a cache of ``size`` bytes fits the device without moving another cache."""
        return self._on_device.room(size)

    def on_device(self, episode: Episode) -> Prompted | None:
        """Return the prompt of an episode if it is on the device: the same prompts are there in all processes."""
        return self._on_device.get(episode)

    def get(self, episode: Episode) -> Prompted | None:
        """Return the prompt of an episode, moved to the device, or None if the store does not have the prompt."""
        if (on_device := self.on_device(episode)) is not None:
            return on_device
        if (on_host := self._on_host.pop(episode)) is None:
            return None
        prompted = on_host[0].to(self._device), on_host[1]
        self.put(episode, prompted)
        return prompted

    def put(self, episode: Episode, prompted: Prompted) -> None:
        """Add a prompt on the device; an earlier prompt of the episode is replaced."""
        self._on_host.pop(episode)
        for old, (prefill, target) in self._on_device.put(episode, prompted, prompted[0].bytes):
            if prefill.held <= self._host_limit:
                self._on_host.put(old, (prefill.on_host(), target), prefill.held)
