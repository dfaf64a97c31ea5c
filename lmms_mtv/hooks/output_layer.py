"""The output layer, the largest matrix of many small models: left out, or multiplied in blocks of the vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lmms_mtv.hooks.temporary import after, before

LARGE: Final = 2**16
"""Smallest vocabulary for which blocks are faster than one product."""

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
        small = weight.shape[0] < LARGE or weight.device.type != "cpu" or weight.dtype != torch.float32
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

        Some models scale or limit their logits. Then ``returned`` is another tensor, or was changed in place.
        """
        inputs = self._inputs
        return (
            inputs is not None
            and returned.shape[-1] == inputs.shape[-1]
            and returned.untyped_storage().data_ptr() == inputs.untyped_storage().data_ptr()
            and inputs._version == self._version
        )

    def cross_entropy(self, inputs: Tensor, target: Sequence[int]) -> Tensor:
        """Return the mean cross-entropy of the T tokens of ``target``, float32 [K].

        All logits of a row are never in memory together. Each block has the transposed product, which is faster for few
        rows.

        Args:
            inputs: inputs of the output layer, [K, T, width].
            target: T token ids.
        """
        rows = inputs.flatten(0, 1)
        columns, size = rows.t().contiguous(), max(_BLOCK // len(rows), 1)
        biases = self._weight.new_zeros(len(self._weight)) if self._bias is None else self._bias
        sums = [
            torch.addmm(bias.unsqueeze(1), block, columns).t().contiguous().logsumexp(1)
            for block, bias in zip(torch.split(self._weight, size), torch.split(biases, size), strict=True)
        ]
        expected = torch.tensor(target, device=rows.device)
        logits = (inputs * self._weight[expected]).sum(-1) + biases[expected]
        return (torch.stack(sums).logsumexp(0).view(logits.shape) - logits).mean(1)


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
