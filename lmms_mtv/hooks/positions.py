"""The last real positions of a batch, for any padding."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Final, TypeGuard

import torch
from torch import Tensor, nn

from lmms_mtv.errors import HookError
from lmms_mtv.hooks.temporary import after, before
from lmms_mtv.runtime.compat import given_cache, naming

_UNKNOWN: Final = object()


def last_real(mask: Tensor | None, rows: int, length: int, tail: int | Tensor = 1) -> tuple[Tensor, Tensor]:
    """Return row and column indices of the last ``tail`` real positions of each row.

    If ``length`` is 1, the positions of all rows count as real. In a row without a real position, all positions count
    as real: nothing reads such a row.

    Args:
        mask: [rows, past + length], 1 for a real token; None if all tokens are real.
        rows: number of rows of the forward.
        length: number of positions of the forward.
        tail: one number, or an integer tensor [rows] with a number for each row.

    Returns:
        Rows and columns, int64 [N] each, ordered by row and then by column.

    Raises:
        HookError: the mask does not have the shape [rows, past + length].
    """
    if mask is not None and (mask.dim() != 2 or mask.shape[0] != rows or mask.shape[1] < length):
        raise HookError(
            f"an attention mask of shape {tuple(mask.shape)} does not tell which tokens of {rows} rows of {length} "
            "positions are real: generate with a dynamic cache (cache_implementation left unset)"
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
    """Return the number of tokens in the cache of a decoder, which is a cache object, nested tuples, or None."""
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    while isinstance(cache, list | tuple) and cache:
        cache = cache[0]
    return int(cache.shape[-2]) if isinstance(cache, Tensor) else 0


class Positions:
    """The last real positions of the running forward, computed once for all sites.

    Args:
        tail: number of last real positions, or an integer tensor [rows] with a number for each row.
        real: [rows, tokens], 1 for a real token, in place of the attention mask of a padded forward that gets no mask.
        resumed: True if a cache holds the beginning of the prompt, and the forward has the end of the prompt.
        packed: True if all tokens are real, and the mask tells which tokens each token sees.
    """

    def __init__(
        self, tail: int | Tensor = 1, real: Tensor | None = None, resumed: bool = False, packed: bool = False
    ) -> None:
        self._tail = tail
        self._real = real
        self._resumed = resumed
        self.packed = packed
        """True if the tail of each row is the whole row."""
        self._mask: Tensor | None = None
        self._outer: object = _UNKNOWN
        self._found: tuple[Tensor, Tensor] | None = None
        self._running = False
        self.continues = False
        """True if the running forward continues from tokens in a cache."""
        self.follows = False
        """True if the running forward is over tokens after a prompt, so that a cache holds the whole prompt."""
        self.prompts = 0
        """Number of forwards over prompts, from the beginning or from the position where a replay continues."""
        self.forwards = 0
        """Number of completed forwards of the decoder."""

    def of(self, activation: Tensor, first: bool = False) -> tuple[Tensor, Tensor]:
        """Return rows and columns of the last real positions.

        Args:
            activation: an activation of the running forward, [rows, length, width].
            first: True for only the first position of the tail of each row, which is the end of the prompt.

        Returns:
            Rows and columns, int64 [N] each, on the device of the activation.

        Raises:
            HookError: no forward of the decoder is running, or a mask does not fit rows and length of the activation.
        """
        if not self._running:
            raise HookError(
                "an attention site ran outside the decoder that was found, so that padding is not known: pass decoder= "
                "with the module that the model's forward calls"
            )
        if self.packed:
            # Nothing here waits for the device, so that the forward can be captured as a CUDA graph.
            rows, length = activation.shape[0], 1 if first else activation.shape[1]
            row = torch.arange(rows, device=activation.device).repeat_interleave(length)
            return row, torch.arange(length, device=activation.device).repeat(rows)
        if self._found is None:
            rows, length = activation.shape[:2]
            if self._real is not None and self._real.shape != (rows, length):
                raise HookError(
                    f"a forward of {rows} rows of {length} positions, but real= is of {tuple(self._real.shape)}: run "
                    "the batch that it describes, without a cache or virtual tokens"
                )
            self._found = last_real(self._mask if self._real is None else self._real, rows, length, self._tail)
        row, column = self._found
        if first:
            begins = torch.ones_like(row, dtype=torch.bool)
            begins[1:] = row[1:] != row[:-1]
            row, column = row[begins], column[begins]
        return row.to(activation.device), column.to(activation.device)

    @contextmanager
    def watching(self, decoder: nn.Module, model: nn.Module) -> Iterator[None]:
        """Follow every forward of the decoder inside the block.

        Some models pass masks to their decoder that are ready for the attention: a dict, or a tensor of four
        dimensions. In such masks padding cannot be told from causality. Then the mask that the model received counts.

        Args:
            decoder: the module that runs the blocks.
            model: the whole model.

        Raises:
            HookError: inside a forward, if neither mask tells which tokens are real.
        """
        given_to_decoder, given_to_model = mask_argument(decoder), mask_argument(model)
        to_decoder = naming(decoder)

        def entered(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            self._outer = given_to_model(args, kwargs)

        def left(*_: Any) -> None:
            self._outer = _UNKNOWN

        def begins(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            mask = given_to_decoder(args, kwargs)
            told = None if self.packed else mask if tells(mask) else self._outer
            if not tells(told):
                what = f"of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"of type {type(mask).__name__}"
                raise HookError(
                    f"the decoder got an attention mask {what}, and the model around it none of [rows, tokens] that "
                    "tells which tokens are real: generate with a dynamic cache (cache_implementation left unset)"
                )
            self._mask = told
            self._found = None
            self._running = True
            self.continues = cached_tokens(given_cache(to_decoder(args, kwargs))) > 0
            self.follows = self.continues and not self._resumed
            self.prompts += not self.follows

        def ends(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            self._running = False
            self.forwards += output is not None

        with ExitStack() as stack:
            stack.enter_context(before(model, entered))
            stack.enter_context(after(model, left, always_call=True))
            stack.enter_context(before(decoder, begins))
            stack.enter_context(after(decoder, ends, always_call=True))
            yield


Given = Callable[[tuple[Any, ...], Mapping[str, Any]], object]
"""Function that takes one argument of a forward from the positional and the keyword arguments."""


def mask_argument(module: nn.Module) -> Given:
    """Return a function that takes the attention mask of the tokens from the arguments of a forward.

    If the forward has a ``decoder_attention_mask``, ``attention_mask`` belongs to an encoder, and the mask is unknown.
    """
    if "decoder_attention_mask" in inspect.signature(module.forward).parameters:
        return lambda args, kwargs: _UNKNOWN
    named = naming(module)
    return lambda args, kwargs: named(args, kwargs).get("attention_mask")


def tells(mask: object) -> TypeGuard[Tensor | None]:
    """Return whether a mask tells which tokens are real: a tensor [rows, tokens], or None (all tokens are real)."""
    return mask is None or (isinstance(mask, Tensor) and mask.dim() == 2)
