"""Which positions of a batch are the last real ones, whatever the padding."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lmms_mtv.errors import HookError


def last_real(mask: Tensor | None, rows: int, length: int, tail: int | Tensor = 1) -> tuple[Tensor, Tensor]:
    """Row and column indices of the last ``tail`` real positions of each row.

    ``mask`` is [rows, past + length], 1 for a real token, or None when all are real; ``length`` is the number of
    positions in this forward. ``tail`` is one number, or one for each row. A row without a real position counts as
    all real: nothing reads it.

    Raises :class:`HookError` if the mask is not two-dimensional: then it does not say which tokens are real.
    """
    if mask is not None and mask.dim() != 2:
        raise HookError(
            f"the decoder got an attention mask of shape {tuple(mask.shape)}, expected [rows, tokens]: generate with "
            "a dynamic cache (cache_implementation left unset)"
        )
    if mask is None or length == 1:
        real = torch.ones(rows, length, dtype=torch.bool, device=None if mask is None else mask.device)
    else:
        real = mask[:, -length:].bool()
        real = real | ~real.any(1, keepdim=True)
    if isinstance(tail, int) and tail == 1:
        columns = length - 1 - real.flip(1).int().argmax(1)
        return torch.arange(rows, device=columns.device), columns
    if not isinstance(tail, int):
        tail = tail.to(real.device).unsqueeze(1)
    from_end = real.int().flip(1).cumsum(1).flip(1)
    row, column = (real & (from_end <= tail)).nonzero(as_tuple=True)
    return row, column


def cached_tokens(cache: Any) -> int:
    """Number of tokens in what a decoder was given as ``past_key_values``: a cache, nested tuples, or None."""
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    while isinstance(cache, list | tuple) and cache:
        cache = cache[0]
    return int(cache.shape[-2]) if isinstance(cache, Tensor) else 0


class Positions:
    """The last real positions of the forward that is running, worked out once for all sites.

    ``real`` [rows, tokens], 1 for a real token, stands in for the attention mask of a padded forward that gets none.
    """

    def __init__(self, tail: int | Tensor = 1, real: Tensor | None = None) -> None:
        self._tail = tail
        self._real = real
        self._mask: Tensor | None = None
        self._found: tuple[Tensor, Tensor] | None = None
        self._running = False
        self.continues = False
        """Whether the running forward goes on from tokens that are already in a cache."""

    def of(self, activation: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and columns in ``activation``, which is [rows, length, width], on its device."""
        if not self._running:
            raise HookError(
                "an attention site ran outside the decoder that was found, so that padding is not known: pass decoder= "
                "with the module that the model's forward calls"
            )
        if self._found is None:
            rows, length = activation.shape[:2]
            if self._real is not None and self._real.shape != (rows, length):
                raise HookError(
                    f"a forward of {rows} rows of {length} positions, but real= is of {tuple(self._real.shape)}: run "
                    "the batch that it describes, without a cache or virtual tokens"
                )
            self._found = last_real(self._mask if self._real is None else self._real, rows, length, self._tail)
        row, column = self._found
        return row.to(activation.device), column.to(activation.device)

    @contextmanager
    def watching(self, decoder: nn.Module) -> Iterator[None]:
        """Follow every forward of ``decoder`` inside the block."""
        names = tuple(inspect.signature(decoder.forward).parameters)

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            given = dict(zip(names, args, strict=False)) | dict(kwargs)
            mask = given.get("attention_mask")
            self._mask = mask if isinstance(mask, Tensor) or mask is None else _refuse(mask)
            self._found = None
            self._running = True
            self.continues = cached_tokens(given.get("past_key_values")) > 0

        def after(*_: Any) -> None:
            self._running = False

        with ExitStack() as stack:
            stack.callback(decoder.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(decoder.register_forward_hook(after, always_call=True).remove)
            yield


def _refuse(mask: object) -> Tensor:
    raise HookError(
        f"the decoder got an attention mask of type {type(mask).__name__}, expected a tensor [rows, tokens]: generate "
        "with a dynamic cache (cache_implementation left unset)"
    )
