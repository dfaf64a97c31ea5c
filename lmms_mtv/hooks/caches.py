"""Caches of a forward: their layers, copies, and the cache of a prompt without its last token."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from lmms_mtv.hooks.sites import text_config

_WINDOWS: Final = ("sliding_window", "attention_chunk_size", "window_size", "attention_window")


def window(model: nn.Module, cache: Any) -> int:
    """Return the smallest window of attention in tokens, as far as configuration and cache tell."""
    config = text_config(model)
    told = [getattr(config, name, None) for name in _WINDOWS]
    told += [getattr(layer, "sliding_window", None) for layer in cache.layers]
    return min((size for size in told if isinstance(size, int)), default=sys.maxsize)


def copied(cache: Any) -> Any:
    """Return a copy of the cache with the same tensors. An update of the copy does not change the original."""
    copy_of_cache = copy.copy(cache)
    copy_of_cache.layers = [copy.copy(layer) for layer in cache.layers]
    return copy_of_cache


def filled(cache: Any) -> list[Any]:
    """Return the layers with keys and values: blocks that attend to images have none without an image."""
    return [layer for layer in cache.layers if layer.keys is not None]


def without_last(cache: Any, length: int, others: Container[int]) -> Any | None:
    """Return the cache of a prompt of ``length`` tokens without the last token, or None if this is impossible.

    ``others`` are the blocks without self-attention over the tokens. Their layers stay whole.
    """
    # A cache may have a state beside its layers, and layers without keys, where blocks have linear attention.
    layers = getattr(cache, "layers", None)
    if not layers or not getattr(cache, "is_croppable", True):
        return None
    if not all(getattr(layer, "is_croppable", False) and _known(layer) for layer in layers):
        return None
    cut = copied(cache)
    for index, layer in enumerate(cut.layers):
        if layer.keys is None:
            continue
        if (layer.get_seq_length() == length) == (index in others):
            # Other layers than expected hold the tokens, or an image happens to have as many keys as the prompt.
            return None
        if index not in others:
            try:
                layer.crop(-1)
            except (RuntimeError, ValueError):
                # A full sliding window has dropped a token that would have to come back.
                return None
    return cut


def _known(layer: Any) -> bool:
    """Return whether a layer holds its own keys, or nothing at all."""
    if not hasattr(layer, "keys"):
        return False
    if layer.keys is None:
        # The layer has no keys yet, or is a placeholder for a block without keys.
        return not getattr(layer, "is_initialized", True) or next(tensors_in(vars(layer)), None) is None
    # Cropping a static layer changes a length that its copies share: cutting a copy would cut the original.
    return isinstance(layer.keys, Tensor) and not getattr(layer, "is_compileable", False)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield all tensors in ``value``: a tensor, or mappings, lists and tuples of tensors, such as encoder outputs."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(part)


def host_copy(tensor: Tensor) -> Tensor:
    """Return a copy of ``tensor`` in the memory of the host, ready once the device has done its work so far.

    The copy of a tensor on a GPU is pinned: neither this copy nor a later copy back makes the host wait.
    """
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda).copy_(tensor, non_blocking=True)


def moved(value: Any, move: Callable[[Tensor], Tensor]) -> Any:
    """Return a copy of ``value`` in which ``move`` has moved the tensors that :func:`tensors_in` finds."""
    if isinstance(value, Tensor):
        return move(value)
    if isinstance(value, Mapping):
        # A copy keeps the class: outputs of transformers are mappings of special classes.
        mapping: Any = copy.copy(value)
        for name, part in value.items():
            mapping[name] = moved(part, move)
        return mapping
    if isinstance(value, list | tuple):
        parts = [moved(part, move) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def expanded(cache: Any, rows: int) -> Any:
    """Return the cache of one row for ``rows`` rows, as views. The model copies them when it appends a token."""
    repeated = copied(cache)
    for layer in filled(repeated):
        layer.keys = layer.keys.expand(rows, *layer.keys.shape[1:])
        layer.values = layer.values.expand(rows, *layer.values.shape[1:])
    return repeated
