"""The fit session: the access of a method to a model and a training split."""

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
    """One fit: a model, the training examples of one task, and a seed.

    Random draws depend only on ``seed`` and on the purpose of the draw, not on the order of calls, ``batch_size`` or
    ``ranks``. Shapes: L layers, H heads, D numbers a head; a ``stream`` other than the heads has H = 1, D = width.

    Args:
        runner, sites, examples: the model with its preprocessing, its hook points, and the training examples.
        seed: the seed of all random draws.
        shots: demonstrations in the prompts that the vector will be used with; methods take losses of such prompts.
        batch_size: prompts in one forward that extracts activations.
        memory: limit in bytes of the prefilled prompts that are kept, and of the copies of one prompt in a replay.
        progress: True shows progress bars.
        ranks: processes that share the work, each with its own session; all processes get the same results.
        replay: the way to compute losses of edits; None takes the fastest way that a probe finds exact.
        graphs: False replays without CUDA graphs; None takes graphs on a GPU, if a probe finds them exact.
        ahead: True prepares prompts while others run; None does so on a GPU; see :meth:`Context.prepared_ahead`.
        host_memory: limit in bytes of prefilled prompts beyond ``memory``, on the host; see :class:`PromptStore`.
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
        graphs: bool | None = None,
        host_memory: int | None = None,
        ahead: bool | None = None,
    ) -> None:
        self.sites = sites
        self.seed = seed
        self.shots = shots
        self.stages: dict[str, float] = {}
        rows = BatchSize(batch_size) if isinstance(batch_size, int) else batch_size.copy()
        self._context = Context(runner, sites, examples, ranks or Ranks(), progress, ahead)
        self._sampler = EpisodeSampler(len(examples), seed)
        self._prefills = PrefillCache(self._context, memory, host_memory)
        self._reader = ActivationReader(self._context, self._prefills, rows)
        self._replayer = Replayer(self._context, self._prefills, memory, replay, graphs)
        self._gradients = GradientRunner(self._context, self._prefills, self._replayer, memory // 2)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Numbers of layers and of heads, and size of a head."""
        return self.sites.shape

    @property
    def examples(self) -> int:
        """Number of training examples."""
        return len(self._context.examples)

    @property
    def forwards(self) -> int:
        """Number of completed forwards of the model in this session's calls, with the forwards of checks and probes."""
        return self._context.counter.count

    @property
    def used(self) -> int:
        """Number of different training examples that were drawn so far, as queries or as demonstrations."""
        return len(self._sampler.used)

    @property
    def remarks(self) -> list[str]:
        """A line for each repeated use of training examples that a larger training split would have avoided."""
        return self._sampler.remarks

    @property
    def replays(self) -> bool | None:
        """True if losses come from replays; None before the first loss."""
        return self._replayer.replays

    @property
    def replay(self) -> Replay | None:
        """Slowest way that losses of several edits are computed, see :data:`Replay`; None before the first loss."""
        return self._replayer.way

    @property
    def graphs(self) -> int:
        """Number of shapes whose replays run as CUDA graphs."""
        return self._replayer.graphs

    @property
    def device(self) -> torch.device:
        """Device for the choices of a method, so that steps do not wait for a GPU; see :attr:`Context.device`."""
        return self._context.device

    @property
    def prefilled_bytes(self) -> int:
        """Memory of the prefilled prompts that are kept on the model's device, in bytes."""
        return self._prefills.bytes

    def random(self, purpose: str) -> Random:
        """Return a generator of random numbers for ``purpose``, independent of the generators for other purposes."""
        return self._sampler.random(purpose)

    def generator(self, purpose: str) -> torch.Generator:
        """Return a torch generator for ``purpose``, on the CPU."""
        return self._sampler.generator(purpose)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the wall-clock seconds of the block, a part of the fit, to ``stages[name]``."""
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
        """Return ``count`` random queries, each with ``shots`` random demonstrations that never include the query.

        Args:
            count, shots, purpose: two numbers, and the draw's name; a query comes again only after all other queries.
            pool: indices of the training examples that may be demonstrations; None allows all examples.
            unlike: episodes whose examples are not drawn as queries, if ``count`` other examples are left.

        Raises:
            DataError: the split has fewer than ``shots`` + 1 examples, or ``pool`` fewer than ``shots`` beside a query.
        """
        return self._sampler.episodes(count, shots, purpose, pool, unlike)

    def with_other_demonstrations(self, episodes: Iterable[Episode], shots: int, purpose: str) -> list[Episode]:
        """Return the queries of ``episodes``, each with ``shots`` random demonstrations; see :meth:`episodes`."""
        return self._sampler.with_other_demonstrations(episodes, shots, purpose)

    def random_queries(self, queries: Sequence[Episode], steps: int) -> list[Episode]:
        """Return a random query out of ``queries`` for each step of a selection, prefilled by :meth:`prefetch`."""
        self.prefetch(chosen := self._sampler.order(queries, steps))
        return chosen

    def mean_activations(self, episodes: Sequence[Episode], stream: str = HEADS) -> Tensor:
        """Return the mean over ``episodes`` of a stream's activation at the last token, float32 [L, H, D] on the CPU.

        For heads see MTV, arXiv 2406.15334, section 3.1: ``mu_l = (1/T) sum_t z_l``.
        """
        return self._reader.mean(episodes, stream)

    def activations(self, episodes: Sequence[Episode], stream: str = HEADS) -> Tensor:
        """Return the activations of a stream at the last token of N ``episodes``, float32 [N, L, H, D] on the CPU."""
        return self._reader.each(episodes, stream, range(len(self.sites)), "Extracting activations")

    def embeddings(self) -> Tensor:
        """Return an embedding of each training query, float32 [examples, H * D] on the CPU, by one prompt for each.

        It holds the activations of the middle layer's heads at the last token of the zero-shot prompt: early layers
        have not seen question and image, late layers tell little more than the first token of the answer.
        """
        queries = [Episode(query, ()) for query in range(self.examples)]
        self._sampler.used |= set(range(self.examples))
        middle = len(self.sites) // 2
        return self._reader.each(queries, HEADS, range(middle, middle + 1), "Embedding queries").flatten(1)

    def head_contributions(self, means: Tensor, chosen: Tensor) -> Tensor:
        """Return the part of hidden states that heads add; see :meth:`ActivationReader.head_contributions`."""
        return self._reader.head_contributions(means, chosen)

    # Names of version 0.1, which methods of other packages may use.
    redrawn, asked, written = with_other_demonstrations, random_queries, head_contributions

    def answered_activations(self, episodes: Sequence[Episode], stream: str = HEADS) -> tuple[Tensor, Tensor]:
        """Return activations at the last token of N prompts and of their targets, float32 [N, L, H, D] each on the CPU.

        A target ends with the tokens that end an answer.
        """
        return self._reader.answered(episodes, stream)

    def losses(self, episode: Episode, edit: Edit | Edits, tokens: Tokens = "first", wait: bool = True) -> Tensor:
        """Return the cross-entropy of the query's target under each of K edits, float32 [K] on the CPU.

        Args:
            episode: the query and its demonstrations.
            edit: K edits of the heads, or K edits by stream; see :meth:`Replayer.losses` for how the edits run.
            tokens: ``first`` is the mean over the tokens up to the first one that is not blank, ``all`` over all.
            wait: False returns losses on the device of ``edit`` that may not be ready yet, nor finite.
        """
        return self._replayer.losses(episode, edit, tokens, wait)

    def loss_gradient(
        self, episode: Episode, value: Tensor, mask: Tensor, tokens: Tokens = "first"
    ) -> tuple[Tensor, Tensor]:
        """Return K losses, float32 [K], and the derivative of each loss by its mask, float32 [K, L, H], on the CPU.

        An entry m of ``mask`` [K, L, H] makes ``x' = (1 - m) * x + m * value``; see :meth:`Replayer.loss_gradient`.
        """
        return self._replayer.loss_gradient(episode, value, mask, tokens)

    def mean_losses(
        self, episodes: Sequence[Episode], edit: Edit | Edits, tokens: Tokens = "first", description: str = "Choosing"
    ) -> Tensor:
        """Return the mean over ``episodes`` of the losses of each of K edits, float32 [K] on the CPU."""
        self.prefetch(episodes)
        return torch.stack([self.losses(e, edit, tokens) for e in self.bar(episodes, description)]).mean(0)

    def prefetch(self, episodes: Sequence[Episode]) -> None:
        """Prefill prompts for all processes, a share in each; see :meth:`PrefillCache.prefetch`."""
        self._prefills.prefetch(episodes, self._replayer.lean)

    def answer(self, episode: Episode, tokens: Tokens = "all", stream: str | None = None) -> Answer:
        """Return the unedited model's answer: logits of the target's tokens, and the states of ``stream`` if given.

        Raises HookError if an edit is applied now, as in the function that ``loss`` of :meth:`gradients` returns.
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
        """Return the losses of the edited model's answers, float32 [N], and the gradient of the sum of the losses.

        Args:
            episodes: N episodes; each prompt runs whole and alone.
            parameters: tensors to differentiate by; each has a gradient of its shape, float32 on the CPU.
            edits: function of an episode's index that makes the edits from ``parameters``.
            loss: function of an episode's index that returns the loss, a function of the edited :class:`Answer`.
            tokens, stream: as in :meth:`answer`.
            autocast, checkpointing: True computes in bfloat16; True keeps the inputs of blocks only, to save memory.

        Raises:
            NumericsError: a loss or a gradient is NaN or infinite.
            HookError: the model's own code turns gradients off, or the model cannot be checkpointed.
        """
        return self._gradients.gradients(episodes, parameters, edits, loss, tokens, stream, autocast, checkpointing)
