"""Losses of edits, by replays of the last token of a prompt wherever the replay is exact."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

from lmms_mtv.fit.calibration import Calibration, Replay, ReplayCase
from lmms_mtv.fit.context import Context, counted
from lmms_mtv.fit.examples import Episode, Tokens
from lmms_mtv.fit.graphs import GraphReplays
from lmms_mtv.fit.losses import MAX_PACKED, LossRunner, Run
from lmms_mtv.fit.prefill_cache import PrefillCache
from lmms_mtv.hooks import Prefill
from lmms_mtv.runtime.batches import single_row
from lmms_mtv.vectors import Edit, Edits, by_stream, distinct, first_equal, rows_of, taken

P = TypeVar("P")


class Replayer(Generic[P]):
    """A runner of prompts with edits, which runs each case of edits in the fastest way that is exact.

    Args:
        context: the model, the examples and the processes of the fit.
        prefills: the prefilled prompts.
        memory: the limit in bytes of the copies of one prompt's cache in a replay; graphs take a quarter as much.
        way: the way to take without a probe, for comparisons; None lets probes decide.
        graphs: whether replays run as CUDA graphs, see :class:`GraphReplays`.
    """

    def __init__(
        self, context: Context[P], prefills: PrefillCache[P], memory: int, way: Replay | None, graphs: bool | None
    ) -> None:
        self._context = context
        self._prefills = prefills
        self._memory = memory
        self._runner = LossRunner(context)
        self._graphs = GraphReplays(context, self._runner, memory // 4, graphs)
        self._calibration = Calibration(context, self._runner, self._graphs, way)

    @property
    def replays(self) -> bool | None:
        """True if losses come from replays, except for prompts without a cache; None before the first loss."""
        return self._calibration.replays

    @property
    def way(self) -> Replay | None:
        """Slowest way of all cases; None before the first loss."""
        return self._calibration.way

    @property
    def graphs(self) -> int:
        """Number of shapes whose replays run as CUDA graphs."""
        return self._graphs.count

    def lean(self, prefill: Prefill) -> bool:
        """Return whether a prompt needs only the inputs of its replays."""
        return self._calibration.lean(prefill)

    @torch.no_grad()
    @counted
    def losses(self, episode: Episode, edit: Edit | Edits, tokens: Tokens, wait: bool = True) -> Tensor:
        """Return the loss of each of K edits.

        Replays serve a kind of edit, and prompts of about the same length, once a probe has shown that replays equal
        full forwards. If replays differ, the session uses full forwards and logs a warning. A probe also shows whether
        all edits can be replayed in one row. Edits of all positions always take full forwards, one forward for each
        edit. Equal edits have equal losses; they run once, except in a CUDA graph.

        Args:
            episode: the query and its demonstrations.
            edit: K edits of the heads, or K edits by stream.
            tokens: the tokens of the target that count.
            wait: False returns losses that the device may still compute, and that may be NaN or infinite.

        Returns:
            float32 [K], on the CPU; with ``wait=False`` on the device of the edits.

        Raises:
            NumericsError: a loss is not finite.
        """
        edits = by_stream(edit)
        whole = any(each.everywhere for each in edits.values())
        prefill, target, case = self._calibrated(episode, edits, tokens, whole)
        rows = rows_of(edits)
        alike: Tensor | list[int] | None = None
        as_graph = not whole and self._runs_as_graph(case, prefill, edits, target)
        if as_graph:
            alike = first_equal(edits)
        elif rows is not None:
            edits, alike = distinct(edits)
        # The way is that of all edits together, so that the way does not depend on the number of ranks.
        run, limit = self._way_of(case, prefill, edits, target, whole)
        if as_graph:
            run, limit = self._graphs.way(prefill), sys.maxsize

        def losses_of(shard: Edits) -> Tensor:
            if not wait:
                return self._runner.losses(run, shard, target, limit)
            return self._runner.finite_losses(prefill, run, shard, target, limit).cpu()

        losses = losses_of(edits) if rows is None else self._of_ranks(edits, losses_of)
        losses = losses.cpu() if wait else losses.to(next(iter(edits.values())).gain.device)
        return losses if alike is None else losses[torch.as_tensor(alike, device=losses.device)]

    def _of_ranks(self, edits: Edits, losses_of: Callable[[Edits], Tensor]) -> Tensor:
        """Return the losses of edits, of which each process computes a share."""
        ranks = self._context.ranks
        if ranks.count == 1:
            return losses_of(edits)
        losses = torch.zeros(rows_of(edits) or 1)
        with ranks.raise_together():
            if len(losses) > ranks.rank:
                losses[ranks.shard_slice] = losses_of(taken(edits, ranks.shard_slice)).cpu()
        return ranks.all_reduce(losses)

    @counted
    def loss_gradient(self, episode: Episode, value: Tensor, mask: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Return the losses of masks of the heads, and the derivative of each loss by its mask.

        An entry m of a mask makes ``x' = (1 - m) * x + m * value`` of its head, so that entries between 0 and 1 mix.
        Gradients reach the mask alone: no weight takes part, whatever its ``requires_grad``.

        Args:
            episode: the query and its demonstrations.
            value: the activations to insert, float32 [L, H, D].
            mask: K masks, float32 [K, L, H].
            tokens: the tokens of the target that count.

        Returns:
            The losses, float32 [K], and the derivative of each loss by its own mask, float32 [K, L, H], both on the
            CPU.

        Raises:
            HookError: the model's own code turns gradients off.
        """
        context, mask = self._context, mask.detach()
        edits = by_stream(Edit.replace(value, mask))
        with torch.no_grad():
            prefill, target, case = self._calibrated(episode, edits, tokens, whole=False)
        way = self._way_of(case, prefill, edits, target, learning=True)
        losses, gradient = torch.zeros(len(mask)), torch.zeros(mask.shape)
        with context.ranks.raise_together():
            if shard := range(len(mask))[context.ranks.shard_slice]:
                losses[shard], gradient[shard] = self._runner.gradients(value, mask[shard], target, *way)
        return context.ranks.all_reduce(losses), context.ranks.all_reduce(gradient)

    def unedited(self, prefill: Prefill, target: list[int]) -> Run:
        """Return the way to run a whole prompt without edits: a replay if replays are exact, else a full forward."""
        return prefill.replay if self._calibration.replays_unedited(prefill, target) else prefill.forward

    def _calibrated(
        self, episode: Episode, edits: Edits, tokens: Tokens, whole: bool
    ) -> tuple[Prefill, list[int], ReplayCase]:
        """Return the prefill of ``episode``, the tokens that count, and the calibrated case of ``edits``."""
        context, calibration = self._context, self._calibration
        with context.ranks.raise_together(), single_row():
            lean = None if whole or not context.verified.issuperset(edits) else self.lean
            prefill, prompted = self._prefills.get(episode, lean)
            target = prompted.counting(tokens)
            case = ReplayCase.of(edits, prefill)
            if prefill.tokens_only and not whole and not calibration.is_settled(case, prefill, edits, target):
                prefill, _ = self._prefills.get(episode, lean=None)
            context.verify(prefill, edits)
        if not whole:
            calibration.calibrate(case, prefill, edits, target)
        return prefill, target, case

    def _runs_as_graph(self, case: ReplayCase, prefill: Prefill, edits: Edits, target: list[int]) -> bool:
        """Return whether all edits together run as a CUDA graph."""
        calibration = self._calibration
        exact = calibration.replays_case(case, prefill) and calibration.packs_case(case)
        several = (rows_of(edits) or 1) > 1
        return exact and several and calibration.graphs_case(case) and self._graphs.fits(prefill, edits, target)

    def _way_of(
        self,
        case: ReplayCase,
        prefill: Prefill,
        edits: Edits,
        target: list[int],
        whole: bool = False,
        learning: bool = False,
    ) -> tuple[Run, int]:
        """Return the way to run a prompt with edits, and the most edits in a forward; ``learning`` keeps gradients."""
        calibration = self._calibration
        if whole or not calibration.replays_case(case, prefill):
            # With gradients, a whole prompt keeps all intermediate results in memory.
            return prefill.forward, 1 if learning else sys.maxsize
        rows = rows_of(edits) or 1
        # With gradients, keys are kept for each query head; many models have eight query heads for one key head.
        fits = rows * len(target) <= MAX_PACKED and (not learning or 8 * prefill.bytes <= self._memory)
        may_pack = rows > 1 and fits and calibration.packs_case(case)
        if may_pack and prefill.fits_one_row(self._context.model, edits, target):
            return prefill.replay_in_one_row, sys.maxsize
        # A replay copies the cache for each of its rows; gradients take at most as much memory again.
        return prefill.replay, self._memory // max(prefill.bytes * (2 if learning else 1), 1)
