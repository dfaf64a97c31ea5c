"""Activations of heads and other streams at the last token of prompts."""

from __future__ import annotations

from collections.abc import Sequence
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
        shard = context.ranks.shard(episodes)

        def sum_of(batch: Sequence[Episode]) -> Tensor:
            return self._of(batch, stream).to("cpu", torch.float64).sum(0)

        description = context.bar_options("Extracting activations")
        with context.ranks.raise_together(), tqdm(total=len(shard), **description) as bar:
            for batch, rows in self._batch_size.run_batches(shard, sum_of):
                total += rows
                bar.update(len(batch))
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

        def activations_of(batch: Sequence[int]) -> Tensor:
            rows = self._of([episodes[index] for index in batch], stream)
            return rows[:, layers.start : layers.stop].cpu()

        with context.ranks.raise_together(), tqdm(total=len(shard), **context.bar_options(description)) as bar:
            for batch, rows in self._batch_size.run_batches(shard, activations_of):
                activations[list(batch)] = rows
                bar.update(len(batch))
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
            self._of([Episode(0, ())], HEADS)
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

    def _of(self, batch: Sequence[Episode], stream: str) -> Tensor:
        """Return the activations at the last token of each prompt, float32 [prompts, L, H, D]."""
        with record(self._context.sites, stream, prompts_only=True) as recording:
            self._context.runner.run(self._context.prompts(batch))
        rows = recording.last()
        if rows.shape[0] != len(batch):
            raise HookError(f"{len(batch)} prompts gave activations of {rows.shape[0]} rows, expected one each")
        return rows
