"""Forwards whose logits no one reads: the output layer, the largest matrix of many small models, is left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lmms_mtv.hooks.temporary import after, before


@contextmanager
def logits_unread(model: nn.Module) -> Iterator[None]:
    """Let ``model`` return logits of 0 inside the block, without the product with the weights of its output layer.

    Everything before the output layer is computed as always, to the last bit. A model that does not name its output
    layer computes its logits.

    Args:
        model: a model of transformers.
    """
    named = getattr(model, "get_output_embeddings", None)
    layer = named() if callable(named) else None
    if not isinstance(layer, nn.Module):
        yield
        return
    modes: list[Any] = []

    def entered(_: nn.Module, args: tuple[Any, ...]) -> None:
        modes.append(_Zeros())
        modes[-1].__enter__()

    def left(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        modes.pop().__exit__(None, None, None)

    with before(layer, entered, with_kwargs=False), after(layer, left, always_call=True):
        yield


class _Zeros(TorchFunctionMode):
    """A mode of this thread in which the product of a linear layer is 0."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if function is functional.linear and not kwargs:
            inputs, weight = args[:2]
            return inputs.new_zeros(*inputs.shape[:-1], weight.shape[0])
        return function(*args, **(kwargs or {}))
