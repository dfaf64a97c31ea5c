"""One fit: what every method needs of a model and a training split."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from random import Random
from typing import Generic, TypeVar

import torch
from torch import Tensor

from lmms_mtv.fit.activations import ActivationReader
from lmms_mtv.fit.calibration import Replay
from lmms_mtv.fit.context import Context
from lmms_mtv.fit.episodes import EpisodeSampler
from lmms_mtv.fit.examples import Episode, Examples, Runner, Tokens
from lmms_mtv.fit.gradients import Answer, GradientRunner
from lmms_mtv.fit.prefill_cache import PrefillCache
from lmms_mtv.fit.replay import Replayer
from lmms_mtv.hooks import Sites
from lmms_mtv.runtime.batches import BatchSize
from lmms_mtv.runtime.distributed import Ranks
from lmms_mtv.vectors import HEADS, Edit, Edits

P = TypeVar("P")
T = TypeVar("T")


class FitSession(Generic[P]):
    """One fit: a model, the training examples of one task, a seed.

    ``shots`` is the number of demonstrations in the prompts that the vector will be used with: losses are of such
    prompts. ``batch_size`` is the rows of an extracting forward. ``memory`` is how many bytes of prefilled prompts
    are kept (of prompts and answers that are learned from, half of it each), and how many the copies of one may take in
    a replay. ``ranks`` are the processes that fit together, each with a session of its own: prompts and edits are
    shared out among them, and all get the same results. All randomness comes from ``seed`` and the purpose it is drawn
    for, so that nothing depends on the order of calls, on ``batch_size`` or on ``ranks``. ``replay`` is how losses of
    edits are computed; None takes the fastest way that is found to be exact. ``stages`` has the seconds that each
    :meth:`stage` of the fit took so far.
    """

    def __init__(
        self,
        runner: Runner[P],
        sites: Sites,
        examples: Examples[P],
        *,
        seed: int,
        shots: int = 0,
        batch_size: int | BatchSize = 1,
        memory: int = 4 << 30,
        progress: bool = True,
        ranks: Ranks | None = None,
        replay: Replay | None = None,
    ) -> None:
        self.sites = sites
        self.seed = seed
        self.shots = shots
        self.stages: dict[str, float] = {}
        rows = BatchSize(batch_size) if isinstance(batch_size, int) else batch_size.copy()
        self._context = Context(runner, sites, examples, ranks or Ranks(), progress)
        self._sampler = EpisodeSampler(len(examples), seed)
        self._prefills = PrefillCache(self._context, memory)
        self._reader = ActivationReader(self._context, self._prefills, rows)
        self._replayer = Replayer(self._context, self._prefills, memory, replay)
        self._gradients = GradientRunner(self._context, self._prefills, self._replayer, memory // 2)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Layers, heads, size of a head."""
        return self.sites.shape

    @property
    def examples(self) -> int:
        """Number of training examples."""
        return len(self._context.examples)

    @property
    def forwards(self) -> int:
        """Completed forwards of the model in this session's calls, its checks and probes among them."""
        return self._context.counter.count

    @property
    def remarks(self) -> list[str]:
        """A line for each use of a training example that a larger training split would have spared."""
        return self._sampler.remarks

    @property
    def replays(self) -> bool | None:
        """Whether losses come from replays; None before the first loss."""
        return self._replayer.replays

    @property
    def replay(self) -> Replay | None:
        """How the losses of several edits are computed: side by side, in rows, or by full forwards.

        The first is the fastest, the last the slowest. None before the first loss.
        """
        return self._replayer.way

    @property
    def prefilled_bytes(self) -> int:
        """Memory of the prefilled prompts that are kept."""
        return self._prefills.bytes

    def random(self, purpose: str) -> Random:
        """Return a generator for ``purpose``, independent of all others."""
        return self._sampler.random(purpose)

    def generator(self, purpose: str) -> torch.Generator:
        """Return the same for torch, on the CPU."""
        return self._sampler.generator(purpose)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A part of the fit: the wall-clock seconds of the block are added to ``stages[name]``."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.stages[name] = self.stages.get(name, 0.0) + time.perf_counter() - began

    def bar(self, items: Iterable[T], description: str) -> Iterable[T]:
        """Return ``items`` with a progress bar."""
        return self._context.bar(items, description)

    def episodes(
        self,
        count: int,
        shots: int,
        purpose: str,
        pool: Sequence[int] | None = None,
        unlike: Iterable[Episode] = (),
    ) -> list[Episode]:
        """Return ``count`` random queries, each with ``shots`` random demonstrations, the query never among them.

        A query returns only after all others had their turn. Demonstrations come from the training examples in
        ``pool``, or from all of them. Examples that are in ``unlike`` are no queries, if ``count`` others are left.
        Raises :class:`DataError` when the training split has fewer than ``shots`` + 1 examples, or ``pool`` has fewer
        than ``shots`` beside the query.
        """
        return self._sampler.episodes(count, shots, purpose, pool, unlike)

    def with_other_demonstrations(self, episodes: Iterable[Episode], shots: int, purpose: str) -> list[Episode]:
        """Return the queries of ``episodes``, each with ``shots`` random demonstrations instead of its own.

        Raises :class:`DataError` when the training split has fewer than ``shots`` + 1 examples.
        """
        return self._sampler.with_other_demonstrations(episodes, shots, purpose)

    def random_queries(self, queries: Sequence[Episode], steps: int) -> list[Episode]:
        """Return a random one of ``queries`` for each step of a selection, prefilled as :meth:`prefetch` does."""
        chosen = self._sampler.order(queries, steps)
        self.prefetch(chosen)
        return chosen

    def mean_activations(self, episodes: Sequence[Episode], stream: str = HEADS) -> Tensor:
        """Return the mean over ``episodes`` of each head's activation at the last token, float32 [L, H, D] on the CPU.

        MTV, arXiv 2406.15334, section 3.1: ``mu_l = (1/T) sum_t z_l``. Another ``stream`` gives [L, 1, width].
        """
        return self._reader.mean(episodes, stream)

    def activations(self, episodes: Sequence[Episode], stream: str = HEADS) -> Tensor:
        """Return each head's activation at the last token of N ``episodes``, float32 [N, L, H, D] on the CPU.

        Another ``stream`` gives [N, L, 1, width].
        """
        return self._reader.each(episodes, stream, range(len(self.sites)), "Extracting activations")

    def embeddings(self) -> Tensor:
        """Return what the model makes of each training query, float32 [examples, H * D] on the CPU.

        The activations of the heads of the middle layer at the last token of the zero-shot prompt: late enough to
        have seen question and image, early enough to tell more than the first token of the answer. One prompt is run
        for each training example.
        """
        queries = [Episode(query, ()) for query in range(self.examples)]
        middle = len(self.sites) // 2
        return self._reader.each(queries, HEADS, range(middle, middle + 1), "Embedding queries").flatten(1)

    def head_contributions(self, means: Tensor, chosen: Tensor) -> Tensor:
        """Return what the ``chosen`` heads add to the hidden state of each layer where all heads have their ``means``.

        Args:
            means: the values of all heads, float32 [L, H, D].
            chosen: 1 for the heads that count, else 0, float32 [L, H].

        Returns:
            float32 [L, 1, width], on the CPU.
        """
        return self._reader.head_contributions(means, chosen)

    # The names of version 0.1, for methods of other packages.
    redrawn, asked, written = with_other_demonstrations, random_queries, head_contributions

    def answered_activations(self, episodes: Sequence[Episode], stream: str = HEADS) -> tuple[Tensor, Tensor]:
        """Return activations at the last token of each prompt, and at that of its query's target after it.

        Both are float32 [N, L, H, D] for N ``episodes``, on the CPU; (H, D) is (1, width) in a ``stream`` other than
        the heads. The target ends with what ends an answer in the prompt.
        """
        return self._reader.answered(episodes, stream)

    def losses(self, episode: Episode, edit: Edit | Edits, tokens: Tokens = "first") -> Tensor:
        """Return the cross-entropy of the query's target under each of the K edits, float32 [K], on the CPU.

        ``edit`` is of the heads, or edits by stream. ``tokens`` is ``first`` for the first target token (with the
        blanks before it, if the model writes any), or ``all`` for the mean over all of them. Replays are used for a
        kind of edit and prompts of about a length once a probe has shown that they equal full forwards; if they
        differ, this session uses full forwards and says so. In the same way it finds out whether all edits can be
        replayed in one row. Edits of all positions always take full forwards, one for each of them. Equal edits run
        once.
        """
        return self._replayer.losses(episode, edit, tokens)

    def loss_gradient(
        self, episode: Episode, value: Tensor, mask: Tensor, tokens: Tokens = "first"
    ) -> tuple[Tensor, Tensor]:
        """Return the losses of :meth:`losses` where ``mask`` replaces heads by ``value`` [L, H, D], and their gradient.

        ``mask`` is float32 [K, L, H]; an entry m makes ``x' = (1 - m) * x + m * value`` of its head, so entries between
        0 and 1 mix. Returns the losses, float32 [K], and the derivative of each with respect to its own mask, float32
        [K, L, H], both on the CPU. It reaches the mask alone: no weight takes part, whatever its ``requires_grad``.

        Raises :class:`HookError` if the model's own code turns gradients off.
        """
        return self._replayer.loss_gradient(episode, value, mask, tokens)

    def mean_losses(
        self, episodes: Sequence[Episode], edit: Edit | Edits, tokens: Tokens = "first", description: str = "Choosing"
    ) -> Tensor:
        """Return the mean over ``episodes`` of the losses of each edit, float32 [K] on the CPU."""
        self.prefetch(episodes)
        bar = self.bar(episodes, description)
        return torch.stack([self.losses(episode, edit, tokens) for episode in bar]).mean(0)

    def prefetch(self, episodes: Sequence[Episode]) -> None:
        """Have the prompts of ``episodes`` prefilled by several processes, each a share, for all of them.

        As many as there is room for; not for a model that is spread over several devices. One process alone prefills a
        prompt when its losses are asked for.
        """
        self._prefills.prefetch(episodes, self._replayer.lean)

    def answer(self, episode: Episode, tokens: Tokens = "all", stream: str | None = None) -> Answer:
        """Return what the unedited model makes of a target, with the activations of ``stream`` if one is given.

        It is worked out once, and kept as long as there is room. Raises :class:`HookError` where the model is edited:
        in what the ``loss`` of :meth:`gradients` gives.
        """
        return self._gradients.answer(episode, tokens, stream)

    def gradients(
        self,
        episodes: Sequence[Episode],
        parameters: Sequence[Tensor],
        edits: Callable[[int], Edits],
        loss: Callable[[int], Callable[[Answer], Tensor]],
        *,
        tokens: Tokens = "all",
        stream: str | None = None,
        autocast: bool = False,
        checkpointing: bool = False,
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the ``loss`` of what the edited model makes of each query's target, and the gradient of their sum.

        For the i-th of N episodes ``edits(i)`` makes edits of ``parameters``, and ``loss(i)`` a function that gives a
        number of the :class:`Answer` under them, with the activations of ``stream`` if one is given; what it needs of
        the unedited model, ``loss`` asks for before. Returns the losses, float32 [N], and the derivative of their sum
        with respect to each of the parameters, float32, all on the CPU. Weights take no gradient. Each prompt runs
        whole and alone; with ``autocast`` in bfloat16, with ``checkpointing`` keeping what goes into a block only.

        Raises :class:`NumericsError` on NaN or infinity, :class:`HookError` if the model's own code turns gradients off
        or cannot be checkpointed.
        """
        return self._gradients.gradients(episodes, parameters, edits, loss, tokens, stream, autocast, checkpointing)
