"""Who is drawn: training queries and their demonstrations, each purpose with random numbers of its own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from random import Random

import torch

from lmms_mtv.errors import DataError
from lmms_mtv.fit.examples import Episode


class EpisodeSampler:
    """Random queries and demonstrations of ``total`` training examples.

    All randomness comes from ``seed`` and the purpose it is drawn for, so that nothing depends on the order of calls.
    ``remarks`` has a line for each use of a training example that a larger training split would have spared.
    """

    def __init__(self, total: int, seed: int) -> None:
        self.remarks: list[str] = []
        self._total = total
        self._seed = seed

    def random(self, purpose: str) -> Random:
        """Return a generator for ``purpose``, independent of all others."""
        return Random(f"{self._seed}/{purpose}")

    def generator(self, purpose: str) -> torch.Generator:
        """Return the same for torch, on the CPU."""
        return torch.Generator().manual_seed(self.random(purpose).getrandbits(63))

    def episodes(
        self, count: int, shots: int, purpose: str, pool: Sequence[int] | None, unlike: Iterable[Episode]
    ) -> list[Episode]:
        """Return ``count`` random queries with demonstrations; see :meth:`FitSession.episodes`."""
        rng = self.random(purpose)
        self._check_enough(shots)
        used = {index for episode in unlike for index in (episode.query, *episode.demonstrations)}
        fresh = [index for index in range(self._total) if index not in used]
        candidates = fresh if len(fresh) >= count else range(self._total)
        if len(candidates) < count:
            self._remark(f"the {count} prompts for {purpose} ask {len(candidates)} different queries")
        if used and len(fresh) < count:
            self._remark(f"the {count} queries for {purpose} are not kept apart from the examples of earlier stages")
        queries: list[int] = []
        while len(queries) < count:
            queries += rng.sample(candidates, min(len(candidates), count - len(queries)))
        return [
            self._drawn(query, shots, rng) if pool is None else _from_pool(query, shots, pool, rng) for query in queries
        ]

    def with_other_demonstrations(self, episodes: Iterable[Episode], shots: int, purpose: str) -> list[Episode]:
        """Return the queries of ``episodes``, each with ``shots`` other demonstrations."""
        rng = self.random(purpose)
        self._check_enough(shots)
        return [self._drawn(episode.query, shots, rng) for episode in episodes]

    def order(self, queries: Sequence[Episode], steps: int) -> list[Episode]:
        """Return one of ``queries`` at random for each step of a selection."""
        rng = self.random("order")
        return [queries[rng.randrange(len(queries))] for _ in range(steps)]

    def _drawn(self, query: int, shots: int, rng: Random) -> Episode:
        """Return an episode whose demonstrations may be any example but the query."""
        drawn = rng.sample(range(self._total - 1), shots)
        return Episode(query, tuple(index + (index >= query) for index in drawn))

    def _check_enough(self, shots: int) -> None:
        if self._total < shots + 1:
            raise DataError(
                f"the training split has {self._total} examples, but prompts of {shots} demonstrations and a query "
                f"need at least {shots + 1}: pass fit_shots= (and shots=) of at most {max(self._total - 1, 0)}, or a "
                "larger split with demonstrations="
            )

    def _remark(self, reused: str) -> None:
        line = f"the training split has {self._total} examples: {reused}"
        if line not in self.remarks:
            self.remarks.append(line)


def _from_pool(query: int, shots: int, pool: Sequence[int], rng: Random) -> Episode:
    others = [index for index in pool if index != query]
    if len(others) < shots:
        raise DataError(
            f"{len(others)} training examples to draw {shots} demonstrations from: pass diverse= of at least "
            f"{shots + 1}, or a smaller fit_shots="
        )
    return Episode(query, tuple(rng.sample(others, shots)))
