"""Activations of heads and other streams at the last token of prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from lmms_mtv.errors import HookError
from lmms_mtv.fit.context import Context, counted
from lmms_mtv.fit.examples import Episode
from lmms_mtv.fit.prefill_cache import PrefillCache
from lmms_mtv.hooks import attention_outputs, receivers, record, shape
from lmms_mtv.runtime.batches import BatchSize, single_row
from lmms_mtv.vectors import HEADS

P = TypeVar("P")


class ActivationReader(Generic[P]):
    """A reader of activations, ``batch_size`` prompts in a forward. The processes share the prompts."""

    def __init__(self, context: Context[P], prefills: PrefillCache[P], batch_size: BatchSize) -> None:
        self._context = context
        self._prefills = prefills
        self._batch_size = batch_size

    @torch.no_grad()
    @counted
    def mean(self, episodes: Sequence[Episode], stream: str) -> Tensor:
        """Return the mean activation over ``episodes``, float32 [L, H, D]; see :meth:`FitSession.mean_activations`."""
        context = self._context
        total = torch.zeros(shape(context.sites, stream), dtype=torch.float64)

        def add(_: Sequence[int], rows: Tensor) -> None:
            total.add_(rows.double().sum(0))

        shard, layers = context.ranks.shard(episodes), range(len(context.sites))
        self._run_batches(shard, stream, layers, "Extracting activations", add)
        return (context.ranks.all_reduce(total) / len(episodes)).float()

    @torch.no_grad()
    @counted
    def each(self, episodes: Sequence[Episode], stream: str, layers: range, description: str) -> Tensor:
        """Return the activations of each of N prompts.

        Args:
            episodes: N queries with their demonstrations.
            stream: the stream to read.
            layers: the layers to return.
            description: the text of the progress bar.

        Returns:
            float32 [N, layers, H, D], on the CPU.
        """
        context = self._context
        _, heads, size = shape(context.sites, stream)
        activations = torch.zeros(len(episodes), len(layers), heads, size)
        shard = context.ranks.shard(range(len(episodes)))

        def keep(batch: Sequence[int], rows: Tensor) -> None:
            activations[[shard[position] for position in batch]] = rows

        self._run_batches(context.ranks.shard(episodes), stream, layers, description, keep)
        return context.ranks.all_reduce(activations)

    @counted
    def head_contributions(self, means: Tensor, chosen: Tensor) -> Tensor:
        """Return the part of each hidden state that the ``chosen`` heads add.

        All heads have the values ``means``: a norm after attention depends on the output of all heads of a layer.

        Args:
            means: the values of all heads, float32 [L, H, D].
            chosen: 1 for the heads that count, else 0, float32 [L, H].

        Returns:
            float32 [L, 1, width], on the CPU.
        """
        context = self._context
        with receivers(context.sites) as norms:
            # One prompt runs, to find the modules that receive the output of attention.
            self._of(1, context.prepared([Episode(0, ())]), HEADS)
        return attention_outputs(context.sites, means * chosen.unsqueeze(-1), means, norms)

    @torch.no_grad()
    @counted
    def answered(self, episodes: Sequence[Episode], stream: str) -> tuple[Tensor, Tensor]:
        """Return the activations before and after the target of each query.

        Args:
            episodes: N queries with their demonstrations.
            stream: the stream to read.

        Returns:
            The activations at the last token of each prompt, and the activations at the last token of the target that
            follows the prompt, both float32 [N, L, H, D] on the CPU. The target ends with the tokens that end an answer
            in the prompt. In a stream other than the heads, H is 1 and D is the model's width.
        """
        context = self._context
        before_and_after = torch.zeros(2, len(episodes), *shape(context.sites, stream))
        with context.ranks.raise_together(), single_row():
            for index in context.bar(context.ranks.shard(range(len(episodes))), "Extracting activations"):
                prefill, target = self._prefills.get(episodes[index], lean=None)
                context.verify(prefill, [stream])
                # A forward runs the target without the last token, so that the whole target needs one more token.
                for side, following in enumerate((target.ids[:1], [*target.ids, target.ids[-1]])):
                    with record(context.sites, stream) as recording:
                        prefill.forward(context.model, context.sites, {}, following)
                    before_and_after[side, index] = recording.last()[0].cpu()
        before, after = context.ranks.all_reduce(before_and_after)
        return before, after

    def _run_batches(
        self,
        shard: Sequence[Episode],
        stream: str,
        layers: range,
        description: str,
        use: Callable[[Sequence[int], Tensor], None],
    ) -> None:
        """Run the prompts of this process.

        Args:
            shard: the episodes.
            stream: the stream to read.
            layers: the layers to read.
            description: the text of the progress bar.
            use: function of the positions of a batch in ``shard``, and of the activations at the last tokens of its
                prompts, [batch, layers, H, D] on the CPU.
        """
        context, options = self._context, self._context.bar_options(description)
        with (
            context.ranks.raise_together(),
            tqdm(total=len(shard), **options) as bar,
            context.prepared_ahead(shard) as prepared,
        ):

            def activations_of(batch: Sequence[int]) -> Tensor:
                return self._of(len(batch), prepared(batch), stream)[:, layers.start : layers.stop].cpu()

            for batch, rows in self._batch_size.run_batches(range(len(shard)), activations_of):
                use(batch, rows)
                bar.update(len(batch))

    def _of(self, count: int, run: Callable[[], None], stream: str) -> Tensor:
        """Return the activations at the last tokens of the ``count`` prompts that ``run`` runs, [count, L, H, D]."""
        with record(self._context.sites, stream, prompts_only=True) as recording:
            run()
        rows = recording.last()
        if rows.shape[0] != count:
            raise HookError(f"{count} prompts gave activations of {rows.shape[0]} rows, expected one each")
        return rows
