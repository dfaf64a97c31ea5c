"""The output layer, the largest matrix of many small models: left out, or multiplied in blocks of the vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lmms_mtv.hooks.temporary import after, before

LARGE: Final = 2**16
"""Smallest vocabulary for which blocks are faster than one product."""

_DTYPES: Final = (torch.float32, torch.bfloat16)
"""Precisions in which blocks were found to be faster than one product, with equal losses."""

_BLOCK: Final = 2**18
"""Logits in a block, 1 MB in float32: a block stays in the cache of a core."""


@contextmanager
def logits_unread(model: nn.Module) -> Iterator[None]:
    """Let ``model`` return logits of 0 inside the block, without the product with the weights of its output layer.

    Everything before the output layer is computed as always, to the last bit. A model that does not name its output
    layer computes its logits.

    Args:
        model: a model of transformers.
    """

    def zeros(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return inputs.new_zeros(*inputs.shape[:-1], weight.shape[0])

    with _replaced(model, zeros):
        yield


class OutputInputs:
    """The inputs of an output layer, which a model returned in place of logits; see :func:`inputs_as_logits`."""

    def __init__(self) -> None:
        self._inputs: Tensor | None = None
        self._version = 0
        self._weight = torch.empty(0)
        self._bias: Tensor | None = None

    def take(self, inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return ``inputs`` in place of the product, or the product where blocks would not be faster or not equal."""
        small = weight.shape[0] < LARGE or weight.device.type != "cpu" or weight.dtype not in _DTYPES
        if small or inputs.dtype != weight.dtype or inputs.is_inference() or torch.is_grad_enabled():
            return functional.linear(inputs, weight, bias)
        self._inputs, self._version, self._weight, self._bias = inputs, inputs._version, weight, bias
        return inputs

    @property
    def taken(self) -> bool:
        """True if the output layer did not compute its product."""
        return self._inputs is not None

    def are(self, returned: Tensor) -> bool:
        """Return whether ``returned`` has rows of the inputs as they were: nothing followed the output layer.

        Some models scale or limit their logits. Then ``returned`` is another tensor, or was changed in place. A model
        in bfloat16 has its logits converted to float32, so that ``returned`` may be a copy with the same values.

        Args:
            returned: what took the place of the logits, [K, T, width].
        """
        inputs = self._inputs
        if inputs is None or returned.shape[-1] != inputs.shape[-1] or inputs._version != self._version:
            return False
        if returned.untyped_storage().data_ptr() == inputs.untyped_storage().data_ptr():
            return True
        last = inputs.flatten(0, 1)[-returned.shape[:2].numel() :]
        return torch.equal(last.to(returned.dtype), returned.flatten(0, 1))

    def cross_entropy(self, inputs: Tensor, target: Sequence[int]) -> Tensor:
        """Return the mean cross-entropy of the T tokens of ``target``, float32 [K].

        All logits of a row are never in memory together. In float32 each block has the transposed product, which is
        faster for few rows. In bfloat16 each logit is rounded to bfloat16, as the product of all rounds it.

        Args:
            inputs: inputs of the output layer, [K, T, width].
            target: T token ids.
        """
        inputs = inputs.to(self._weight.dtype)
        rows = inputs.flatten(0, 1)
        size = max(_BLOCK // len(rows), 1)
        biases = self._weight.new_zeros(len(self._weight)) if self._bias is None else self._bias
        block_logits = _transposed_product(rows) if rows.dtype == torch.float32 else partial(functional.linear, rows)
        sums = [
            block_logits(block, bias).float().logsumexp(1)
            for block, bias in zip(torch.split(self._weight, size), torch.split(biases, size), strict=True)
        ]
        expected = torch.tensor(target, device=rows.device)
        logits = (inputs.float() * self._weight[expected].float()).sum(-1) + biases[expected].float()
        return (torch.stack(sums).logsumexp(0).view(logits.shape) - logits.to(inputs.dtype).float()).mean(1)


def _transposed_product(rows: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the product of ``rows``, [N, width], with a block of weights and its biases, as a function of these."""
    columns = rows.t().contiguous()
    return lambda block, bias: torch.addmm(bias.unsqueeze(1), block, columns).t().contiguous()


@contextmanager
def inputs_as_logits(model: nn.Module) -> Iterator[OutputInputs]:
    """Let ``model`` return the inputs of its output layer in place of logits inside the block, if blocks are faster.

    Args:
        model: a model of transformers. A model that does not name its output layer computes its logits.
    """
    inputs = OutputInputs()
    with _replaced(model, inputs.take):
        yield inputs


@contextmanager
def _replaced(model: nn.Module, product: Callable[..., Tensor]) -> Iterator[None]:
    """Call ``product`` in place of the linear product inside the output layer of ``model``, in this thread."""
    named = getattr(model, "get_output_embeddings", None)
    layer = named() if callable(named) else None
    if not isinstance(layer, nn.Module):
        yield
        return
    modes: list[Any] = []

    def entered(_: nn.Module, args: tuple[Any, ...]) -> None:
        modes.append(_Product(product))
        modes[-1].__enter__()

    def left(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        modes.pop().__exit__(None, None, None)

    with before(layer, entered, with_kwargs=False), after(layer, left, always_call=True):
        yield


class _Product(TorchFunctionMode):
    """A mode of one thread in which another function computes the product of a linear layer.

    Args:
        product: function of the arguments of :func:`torch.nn.functional.linear`.
    """

    def __init__(self, product: Callable[..., Tensor]) -> None:
        super().__init__()
        self._product = product

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if function is functional.linear:
            return self._product(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))
