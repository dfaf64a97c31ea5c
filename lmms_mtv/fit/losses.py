"""Losses of edits of one prompt and their gradients, with as many edits in a forward as memory allows."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from lmms_mtv.errors import HookError, NumericsError
from lmms_mtv.fit.context import Context, frozen
from lmms_mtv.hooks import Prefill, Sites, inputs_as_logits, record
from lmms_mtv.runtime.batches import BatchSize
from lmms_mtv.vectors import Edit, Edits, by_stream, rows_of, taken

MAX_PACKED: Final = 1024
"""Largest number of positions side by side: the size of the attention mask grows with its square."""

Run = Callable[[nn.Module, Sites, Edits, Sequence[int]], Tensor]
"""A way to run a prompt with K edits: returns the logits of T target tokens, float32 [K, T, vocabulary]."""


class LossRunner:
    """The computation of losses of K edits of one prompt.

    The number of edits in a forward is halved each time the memory runs out, and stays halved. The number changes only
    the time.
    """

    def __init__(self, context: Context[Any]) -> None:
        self._context = context
        self._rows = BatchSize(sys.maxsize, automatic=True)
        # False once the model was found to change the product of its output layer.
        self._may_block = True

    def losses(
        self, run: Run, edits: Edits, target: Sequence[int], limit: int = sys.maxsize, in_blocks: bool = True
    ) -> Tensor:
        """Return the loss of each edit.

        Args:
            run: the way to run the prompt.
            edits: K edits by stream, or edits without a batch dimension, which count as one edit.
            target: the token ids that count.
            limit: the largest number of edits in a forward.
            in_blocks: True lets a large output layer be multiplied in blocks; False always computes all logits.

        Returns:
            float32 [K].
        """

        def losses_of(rows: Sequence[int]) -> Tensor:
            part = taken(edits, slice(rows[0], rows[-1] + 1))
            losses = self._losses_in_blocks(run, part, target) if in_blocks and self._may_block else None
            if losses is not None:
                return losses
            return cross_entropy(run(self._context.model, self._context.sites, part, target), target)

        batches = self._rows.run_batches(range(rows_of(edits) or 1), losses_of, limit)
        return torch.cat([losses for _, losses in batches])

    def _losses_in_blocks(self, run: Run, edits: Edits, target: Sequence[int]) -> Tensor | None:
        """Return the loss of each edit, or None if the model changes the product of its output layer."""
        with inputs_as_logits(self._context.model) as inputs:
            returned = run(self._context.model, self._context.sites, edits, target)
        if not inputs.taken:
            return cross_entropy(returned, target)
        if inputs.are(returned):
            return inputs.cross_entropy(returned, target)
        self._may_block = False
        return None

    def finite_losses(self, prefill: Prefill, run: Run, edits: Edits, target: Sequence[int], limit: int) -> Tensor:
        """Return the losses of :meth:`losses`, all of them finite.

        Args:
            prefill: the prefilled prompt.
            run: the way to run the prompt.
            edits: K edits by stream.
            target: the token ids that count.
            limit: the largest number of edits in a forward.

        Raises:
            NumericsError: a loss is not finite. The message names the layer of the first such number, if there is one.
        """
        try:
            # Full forwards have one row each, so that blocks would not be faster.
            return _finite(self.losses(run, edits, target, limit, in_blocks=run != prefill.forward))
        except NumericsError:
            # The edits run once more, one by one, to name the layer if a layer is the cause.
            again = prefill.forward if run == prefill.forward else prefill.replay
            with record(self._context.sites) as recording:
                for row in range(rows_of(edits) or 1):
                    again(self._context.model, self._context.sites, taken(edits, row), target)
            recording.last()
            raise

    def gradients(
        self, value: Tensor, mask: Tensor, target: Sequence[int], run: Run, limit: int
    ) -> tuple[Tensor, Tensor]:
        """Return the losses of masks of the heads, and the gradients of the losses by the masks.

        Args:
            value: the activations to insert, float32 [L, H, D].
            mask: K masks that mix ``value`` in, float32 [K, L, H].
            target: the token ids that count.
            run: the way to run the prompt.
            limit: the largest number of masks in a forward.

        Returns:
            The losses, float32 [K], and the derivative of each loss by its own mask, float32 [K, L, H], both on the
            CPU.

        Raises:
            HookError: the model's own code turns gradients off.
            NumericsError: a loss is not finite.
        """
        model, sites = self._context.model, self._context.sites

        def gradients_of(rows: Sequence[int]) -> tuple[Tensor, Tensor]:
            part = mask[rows[0] : rows[-1] + 1].clone().requires_grad_()
            with torch.enable_grad(), frozen(model):
                logits = run(model, sites, by_stream(Edit.replace(value, part)), target)
                losses = _finite(cross_entropy(logits, target))
                if not losses.requires_grad:
                    raise HookError(
                        "the code of this model turns gradients off: use a method without gradients, such as method=mtv"
                    )
                (gradient,) = torch.autograd.grad(losses.sum(), part)
            return losses.detach().cpu(), gradient

        parts = [part for _, part in self._rows.run_batches(range(len(mask)), gradients_of, limit)]
        losses, gradients = zip(*parts, strict=True)
        return torch.cat(losses), torch.cat(gradients)


def cross_entropy(logits: Tensor, target: Sequence[int]) -> Tensor:
    """Return the mean cross-entropy of the T tokens of ``target`` under ``logits`` [K, T, V], float32 [K]."""
    # The copy to a GPU does not wait for the GPU.
    expected = torch.tensor(target).to(logits.device, non_blocking=True).repeat(logits.shape[0])
    # The last dimension is contiguous: on a CPU the sum over it is ten times as fast as over another dimension.
    losses = functional.cross_entropy(logits.flatten(0, 1), expected, reduction="none")
    return losses.view(logits.shape[:2]).mean(1)


def within_precision(model: nn.Module, losses: Tensor, gap: float) -> bool:
    """Return whether a difference of ``gap`` from ``losses`` is within the precision of ``model``."""
    tolerance = 1e-3 if next(model.parameters()).dtype == torch.float32 else 5e-2
    return gap <= tolerance * (1 + losses.abs().max().item())


def _finite(losses: Tensor) -> Tensor:
    """Return ``losses``.

    Raises:
        NumericsError: a loss is NaN or infinite.
    """
    if not losses.isfinite().all():
        raise NumericsError("NaN or infinity in the logits of an edited forward: use dtype=float32 or bfloat16")
    return losses
