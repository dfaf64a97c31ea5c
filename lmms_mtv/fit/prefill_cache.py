"""Cache of prompts that are prefilled once and used many times, within a limit of memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch

from lmms_mtv.errors import DataError
from lmms_mtv.fit.context import Context, counted
from lmms_mtv.fit.examples import Episode, Target
from lmms_mtv.fit.prompt_store import Prompted, PromptStore
from lmms_mtv.hooks import Prefill, capture
from lmms_mtv.runtime.batches import single_row
from lmms_mtv.runtime.devices import only_device
from lmms_mtv.runtime.lru_cache import LruCache

P = TypeVar("P")


class PrefillCache(Generic[P]):
    """Prefilled prompts of up to ``memory`` bytes, and prompts to learn from of up to half as many bytes.

    Prefilled prompts beyond ``memory`` stay on the host, see :class:`PromptStore` for ``host_memory``.
    """

    def __init__(self, context: Context[P], memory: int, host_memory: int | None) -> None:
        self._context = context
        self._prefills = PromptStore.of(context, memory, host_memory)
        self._learners: LruCache[Episode, Prompted] = LruCache(memory // 2)

    @property
    def bytes(self) -> int:
        """Memory of the prefilled prompts on the model's device, in bytes."""
        return self._prefills.bytes

    def prompted(self, episode: Episode) -> Prompted:
        """Run the prompt of an episode, and return the prefilled prompt and its target.

        Raises:
            DataError: the target has no tokens.
        """
        context = self._context
        prompt = context.examples.prompt(episode)
        lead, ids = context.runner.lead_ids(prompt), context.runner.target_ids(prompt)
        if not ids:
            raise DataError(f"the target of training example {episode.query} has no tokens: it cannot be learned from")
        with torch.no_grad(), capture(context.model, context.sites) as captured:
            context.runner.run([prompt])
        return captured.prefill(), Target([*lead, *ids], len(lead))

    def get(self, episode: Episode, lean: Callable[[Prefill], bool] | None) -> Prompted:
        """Return the prefilled prompt of an episode, and its target.

        Args:
            episode: the query and its demonstrations.
            lean: function that says whether a prompt needs only its replays; None if the prompt has to run whole.

        Raises:
            DataError: the target has no tokens.
        """
        cached = self._prefills.get(episode)
        if cached is not None and not (lean is None and cached[0].tokens_only):
            return cached
        prefill, target = self.prompted(episode)
        if lean is not None and lean(prefill):
            prefill = prefill.without_media()
        self._prefills.put(episode, (prefill, target))
        return prefill, target

    def learner(self, episode: Episode) -> Prompted:
        """Return the prompt of an episode to run whole, without its cache, and the target of the prompt."""
        cached = self._learners.get(episode)
        if cached is None:
            prefill, target = self.prompted(episode)
            cached = prefill.without_cache(), target
            self._learners.put(episode, cached, cached[0].held)
        return cached

    @counted
    def prefetch(self, episodes: Sequence[Episode], lean: Callable[[Prefill], bool]) -> None:
        """Prefill prompts for all processes, a share of the prompts in each process.

        Prompts are prefilled as long as there is room. Nothing is prefilled for a model that is spread over several
        devices, or with one process: a single process prefills a prompt when its losses are asked for.

        Args:
            episodes: the queries with their demonstrations.
            lean: function that says whether a prompt needs only its replays.
        """
        context, ranks = self._context, self._context.ranks
        device = only_device(context.model)
        if ranks.count == 1 or device is None:
            return
        missing = [episode for episode in dict.fromkeys(episodes) if self._prefills.on_device(episode) is None]
        for begin in range(0, len(missing), ranks.count):
            batch = missing[begin : begin + ranks.count]
            prompted: Prompted | None = None
            with ranks.raise_together(), single_row():
                if ranks.rank < len(batch):
                    prefill, target = self.prompted(batch[ranks.rank])
                    prefill = prefill.without_media() if lean(prefill) else prefill
                    prompted = prefill.to(torch.device("cpu")), target
            for source, episode in enumerate(batch):
                prefill, target = ranks.broadcast(prompted, source)
                if not self._prefills.room(prefill.bytes):
                    return
                self._prefills.put(episode, (prefill.to(device), target))
