"""Which positions of a batch are the last real ones, whatever the padding."""

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

    ``mask`` is [rows, past + length], 1 for a real token, or None when all are real; ``length`` is the number of
    positions in this forward. ``tail`` is one number, or one for each row. A row without a real position counts as
    all real: nothing reads it.

    Raises :class:`HookError` if the mask is not of these rows and positions.
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
    """Return the number of tokens in the cache that a decoder was given: a cache object, nested tuples, or None."""
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
    ``resumed`` says that a cache holds the beginning of a prompt, and its end is in the forward. ``packed`` says that
    all tokens are real, and the mask tells what each of them sees.
    """

    def __init__(
        self, tail: int | Tensor = 1, real: Tensor | None = None, resumed: bool = False, packed: bool = False
    ) -> None:
        self._tail = tail
        self._real = real
        self._resumed = resumed
        self._packed = packed
        self._mask: Tensor | None = None
        self._outer: object = _UNKNOWN
        self._found: tuple[Tensor, Tensor] | None = None
        self._running = False
        self.continues = False
        """Whether the running forward goes on from tokens that are already in a cache."""
        self.follows = False
        """Whether it is over tokens that come after a prompt: it goes on from a cache that holds the whole prompt."""
        self.prompts = 0
        """How many forwards of prompts there were, from their beginning, or from where a replay takes them up."""
        self.forwards = 0
        """How many forwards of the decoder were completed."""

    def of(self, activation: Tensor, first: bool = False) -> tuple[Tensor, Tensor]:
        """Return rows and columns in ``activation``, which is [rows, length, width], on its device.

        With ``first`` of the ``tail`` of each row only its first position, which is where the prompt ends.
        """
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
        if first:
            begins = torch.ones_like(row, dtype=torch.bool)
            begins[1:] = row[1:] != row[:-1]
            row, column = row[begins], column[begins]
        return row.to(activation.device), column.to(activation.device)

    @contextmanager
    def watching(self, decoder: nn.Module, model: nn.Module) -> Iterator[None]:
        """Follow every forward of ``decoder`` inside the block.

        Some models hand their decoder masks that are ready for the attention, a dict or one of four dimensions, in
        which padding cannot be told from causality. Then what counts is the mask that ``model`` itself was given.
        """
        given_to_decoder, given_to_model = mask_argument(decoder), mask_argument(model)
        to_decoder = naming(decoder)

        def entered(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            self._outer = given_to_model(args, kwargs)

        def left(*_: Any) -> None:
            self._outer = _UNKNOWN

        def begins(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            mask = given_to_decoder(args, kwargs)
            told = None if self._packed else mask if tells(mask) else self._outer
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
"""Tells one argument of a forward from its positional and its keyword arguments."""


def mask_argument(module: nn.Module) -> Given:
    """Return the attention mask of the tokens; where an encoder has the mask of that name and the decoder another,
    nothing.
    """
    if "decoder_attention_mask" in inspect.signature(module.forward).parameters:
        return lambda args, kwargs: _UNKNOWN
    named = naming(module)
    return lambda args, kwargs: named(args, kwargs).get("attention_mask")


def tells(mask: object) -> TypeGuard[Tensor | None]:
    """Return whether a mask tells which tokens are real: [rows, tokens], or none at all."""
    return mask is None or (isinstance(mask, Tensor) and mask.dim() == 2)
