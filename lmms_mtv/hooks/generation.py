"""A check of generation: an edit at the last position is exact if the whole prompt runs first, then token by token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lmms_mtv.errors import HookError
from lmms_mtv.hooks.positions import cached_tokens
from lmms_mtv.hooks.sites import Sites
from lmms_mtv.hooks.temporary import before
from lmms_mtv.runtime.compat import given_cache, naming


@contextmanager
def token_by_token(sites: Sites, tail: int | Tensor = 1) -> Iterator[None]:
    """Make sure that generation inside the block runs a whole prompt first, and then one new token at a time.

    After a prompt, a forward over several tokens that continues from a cache is refused, unless ``tail`` covers all
    these tokens. Such a forward runs a chunk of a prompt, or several proposed tokens at once (assistant model, prompt
    lookup). A forward without a cache that runs an earlier text again with more tokens is refused too. Such a forward
    computes the earlier edited tokens without their edit.

    Args:
        sites: the attention sites of the model.
        tail: number of last positions that are edited, or an integer tensor [rows] with a number for each row.

    Raises:
        HookError: inside a refused forward, before the decoder computes anything.
    """
    to_model, to_decoder = naming(sites.model), naming(sites.decoder)
    # The tokens of the last forward that was called with use_cache=False.
    uncached: list[Tensor] = []
    prompted = seen = False

    def entered(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        nonlocal seen
        given = to_model(args, kwargs)
        tokens, goes_on = _tokens(given), cached_tokens(given_cache(given)) > 0
        # Once for each prompt: the answer has to wait for a GPU.
        if goes_on and not seen and _padded_inside(given):
            raise HookError(
                "the model generates after prompts that are padded on the right, so that the first new token follows "
                "padding: pad on the left (tokenizer.padding_side='left')"
            )
        seen = goes_on
        if given.get("use_cache") is not False or tokens is None:
            uncached.clear()
            return
        if uncached and _extends(tokens, uncached.pop()):
            raise HookError(
                "the model generates without a cache and runs the whole text again for each new token, so that the "
                "edit of earlier tokens is lost: pass use_cache=True to generate"
            )
        uncached[:] = [tokens]

    def begins(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        nonlocal prompted
        given = to_decoder(args, kwargs)
        tokens, cached = _tokens(given), cached_tokens(given_cache(given))
        length = 1 if tokens is None else tokens.shape[1]
        if prompted and cached and length > 1 and int(torch.as_tensor(tail).min()) < length:
            raise HookError(
                f"a forward over {length} tokens goes on from {cached} in a cache, and the edit is at the last of them "
                "alone: generate one token at a time (no assistant_model, prompt_lookup_num_tokens or "
                "prefill_chunk_size), or run a further prompt in a block of its own"
            )
        prompted |= not cached

    with before(sites.model, entered), before(sites.decoder, begins):
        yield


def _padded_inside(inputs: Mapping[str, Any]) -> bool:
    """Return whether a row has padding between real tokens."""
    mask = inputs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return False
    return bool((mask[:, 1:] < mask[:, :-1]).any())


def _tokens(inputs: Mapping[str, Any]) -> Tensor | None:
    """Return the tokens of a forward, [rows, length], or their embeddings, [rows, length, width]; None if unknown."""
    tokens = inputs.get("input_ids")
    tokens = tokens if tokens is not None else inputs.get("inputs_embeds")
    return tokens if isinstance(tokens, Tensor) and tokens.dim() > 1 else None


def _extends(tokens: Tensor, earlier: Tensor) -> bool:
    """Return whether ``tokens`` are the tokens of ``earlier`` and more tokens after them."""
    more = tokens.shape[1] - earlier.shape[1]
    same_rows = tokens.shape[0] == earlier.shape[0] and tokens.shape[2:] == earlier.shape[2:]
    return more > 0 and same_rows and bool(torch.equal(tokens[:, : earlier.shape[1]], earlier))
