"""A check of torch's attention on a GPU: in some versions the memory-efficient kernel is wrong for some shapes.

On an H200 with torch 2.11, the kernel gives wrong numbers, without an error, where one key-value head serves all query
heads (Gemma 3 270M and 1B), a mask is given, and the number of keys is 1 more than a multiple of 32
(https://github.com/pytorch/pytorch/issues/191937). A padded batch of 97 tokens then gets wrong answers in every row.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

logger = logging.getLogger(__name__)

LENGTHS: Final = (*range(31, 36), *range(63, 68), *range(95, 100))
"""Tried numbers of keys: numbers around multiples of 32, since the kernels read 32 keys at once."""

# The float32 tolerance is larger than the error of TensorFloat-32, which a user may have allowed.
_TOLERANCE: Final = {torch.float32: 5e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}

Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def check_attention(model: nn.Module) -> None:
    """Turn torch's memory-efficient attention off in this process if attention is wrong for this model on its GPU.

    A warning is logged then. Nothing happens on other devices than a GPU, and for models that do not compute attention
    by ``scaled_dot_product_attention``.
    """
    parameter = next(model.parameters(), None)
    shape = _shape(model)
    if parameter is None or parameter.device.type != "cuda" or shape is None or parameter.dtype not in _TOLERANCE:
        return
    wrong = wrong_lengths(*shape, parameter.dtype, parameter.device)
    if not wrong:
        return
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    still = wrong_lengths(*shape, parameter.dtype, parameter.device)
    logger.warning(
        "torch %s computes wrong attention for this model on %s (with %s keys): its memory-efficient kernel is off in "
        "this process%s",
        torch.__version__,
        torch.cuda.get_device_name(parameter.device),
        ", ".join(map(str, wrong)),
        ", which does not help: pass attn_implementation=eager" if still else "",
    )


def wrong_lengths(
    heads: int,
    key_value_heads: int,
    size: int,
    dtype: torch.dtype,
    device: torch.device,
    lengths: Iterable[int] = LENGTHS,
    attention: Attention | None = None,
) -> list[int]:
    """Return the numbers of keys for which ``attention`` differs from plain matrix products.

    Args:
        heads: number of query heads.
        key_value_heads: number of key-value heads.
        size: dimensions of a head.
        dtype: precision of queries, keys and values.
        device: device of the tensors.
        lengths: numbers of keys to try, each with one query and with a query for each key.
        attention: function of queries, keys, values and a mask; by default the kernel that torch chooses.
    """
    generator = torch.Generator(device).manual_seed(0)

    def random(rows: int, length: int) -> Tensor:
        return torch.randn(2, rows, length, size, generator=generator, device=device, dtype=dtype)

    wrong = []
    for length in lengths:
        keys, values = (_repeated(random(key_value_heads, length), heads) for _ in range(2))
        for queries in (1, length):
            # The second row is padded on the left.
            mask = torch.stack([_seen(length, queries, padding, device) for padding in (0, length // 3)])[:, None]
            asked = random(heads, queries)
            found = (attention or _attention)(asked, keys, values, mask)
            with sdpa_kernel([SDPBackend.MATH]):
                expected = _attention(asked, keys, values, mask)
            if not (found - expected).abs().max().item() <= _TOLERANCE[dtype]:
                wrong.append(length)
                break
    return wrong


def _seen(length: int, queries: int, padding: int, device: torch.device) -> Tensor:
    """Return the keys, of ``length`` keys, that each of the last ``queries`` tokens sees, bool [queries, length].

    The first ``padding`` tokens are padding. Tokens other than padding do not see padding.
    """
    keys = torch.arange(length, device=device)
    tokens = keys[length - queries :, None]
    return (keys <= tokens) & ((keys >= padding) | (tokens < padding))


def _attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)


def _repeated(heads: Tensor, count: int) -> Tensor:
    """Return key-value heads repeated for ``count`` query heads, in the layout that transformers uses."""
    rows, own, length, size = heads.shape
    return heads[:, :, None].expand(rows, own, count // own, length, size).reshape(rows, count, length, size)


def _shape(model: nn.Module) -> tuple[int, int, int] | None:
    """Return query heads, key-value heads and head size of a decoder, None if unknown or without sdpa."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        return None
    text = config.get_text_config()
    if getattr(text, "_attn_implementation", None) != "sdpa":
        return None
    heads = getattr(text, "num_attention_heads", None)
    own = getattr(text, "num_key_value_heads", None) or heads
    size = getattr(text, "head_dim", None) or (getattr(text, "hidden_size", 0) // heads if heads else 0)
    if not (isinstance(heads, int) and isinstance(own, int) and heads and size and heads % own == 0):
        return None
    return heads, own, int(size)
