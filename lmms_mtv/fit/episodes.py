"""Random draws of training queries and their demonstrations, with separate random numbers for each purpose."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from random import Random

import torch

from lmms_mtv.errors import DataError
from lmms_mtv.fit.examples import Episode


class EpisodeSampler:
    """Random queries and demonstrations from ``total`` training examples.

    Random draws depend only on ``seed`` and on the purpose of the draw, and so not on the order of calls.

    Attributes:
        remarks: a line for each repeated use of training examples that a larger training split would have avoided.
        used: indices of the examples that were drawn, as queries or as demonstrations.
    """

    def __init__(self, total: int, seed: int) -> None:
        self.remarks: list[str] = []
        self.used: set[int] = set()
        self._total = total
        self._seed = seed

    def random(self, purpose: str) -> Random:
        """Return a generator of random numbers for ``purpose``, independent of the generators for other purposes."""
        return Random(f"{self._seed}/{purpose}")

    def generator(self, purpose: str) -> torch.Generator:
        """Return a torch generator for ``purpose``, on the CPU."""
        return torch.Generator().manual_seed(self.random(purpose).getrandbits(63))

    def episodes(
        self, count: int, shots: int, purpose: str, pool: Sequence[int] | None, unlike: Iterable[Episode]
    ) -> list[Episode]:
        """Return ``count`` random queries, each with ``shots`` random demonstrations.

        A query is never among its own demonstrations. A query comes again only after all other queries.

        Args:
            count: the number of queries.
            shots: the number of demonstrations of each query.
            purpose: the name of the draw, which seeds the draw.
            pool: indices of the training examples that may be demonstrations; None allows all examples.
            unlike: episodes whose examples are not drawn as queries, if ``count`` other examples are left.

        Raises:
            DataError: the split has fewer than ``shots`` + 1 examples, or ``pool`` fewer than ``shots`` beside a query.
        """
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
        return self._noted(
            self._drawn(query, shots, rng) if pool is None else _from_pool(query, shots, pool, rng) for query in queries
        )

    def with_other_demonstrations(self, episodes: Iterable[Episode], shots: int, purpose: str) -> list[Episode]:
        """Return the queries of ``episodes``, each with ``shots`` new random demonstrations.

        Args:
            episodes: the episodes whose queries are kept.
            shots: the number of demonstrations of each query.
            purpose: the name of the draw, which seeds the draw.

        Raises:
            DataError: the training split has fewer than ``shots`` + 1 examples.
        """
        rng = self.random(purpose)
        self._check_enough(shots)
        return self._noted(self._drawn(episode.query, shots, rng) for episode in episodes)

    def order(self, queries: Sequence[Episode], steps: int) -> list[Episode]:
        """Return a random query out of ``queries`` for each step of a selection."""
        rng = self.random("order")
        return [queries[rng.randrange(len(queries))] for _ in range(steps)]

    def _drawn(self, query: int, shots: int, rng: Random) -> Episode:
        """Return an episode whose demonstrations may be any examples except the query."""
        drawn = rng.sample(range(self._total - 1), shots)
        return Episode(query, tuple(index + (index >= query) for index in drawn))

    def _noted(self, episodes: Iterable[Episode]) -> list[Episode]:
        """Return the episodes, whose examples are in ``used`` from now on."""
        drawn = list(episodes)
        self.used |= {index for episode in drawn for index in (episode.query, *episode.demonstrations)}
        return drawn

    def _check_enough(self, shots: int) -> None:
        if self._total < shots + 1:
            fewer = f", or fit_shots= (and shots=) of at most {self._total - 1}" if self._total > 1 else ""
            raise DataError(
                f"the training split has {self._total} examples, but prompts of {shots} demonstrations and a query "
                f"need at least {shots + 1}: pass more examples (in a harness, a larger split with demonstrations=)"
                f"{fewer}"
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
