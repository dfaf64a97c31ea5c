"""Gates of an edit: the factor mu of the added value, from the queries and keys of the running attention.

MimIC (CVPR 2025) adds ``mu * v`` to the output of a head, with ``mu = Z1 / (Z1 + Z2)``. ``log Z1 = w . q + b`` for the
query q of the head. Z2 is the sum over the keys of the exponentials of the head's attention scores. The output of a
head determines neither Z1 nor Z2. Queries and keys are therefore read from the arguments of the function that computes
attention, ``scaled_dot_product_attention``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from lmms_mtv.errors import HookError
from lmms_mtv.hooks.sites import Site, Sites
from lmms_mtv.hooks.temporary import after, before

_SCORES: Final = 1 << 26
"""Largest number of attention scores in memory at a time, 256 MiB in float32."""


class Attention(NamedTuple):
    """The arguments of one call of ``scaled_dot_product_attention`` that determine its scores.

    Attributes:
        query: queries, [rows, heads, queries, Q].
        key: keys, [rows, key heads, keys, Q]; the number of key heads divides the number of heads.
        mask: bool (True: the query sees the key) or a term that is added to the scores, broadcast to
            [rows, heads, queries, keys]; or None.
        causal: True if query i sees the keys up to key i only.
        scale: factor of the products of queries and keys.
    """

    query: Tensor
    key: Tensor
    mask: Tensor | None
    causal: bool
    scale: float


class Gates:
    """Queries and keys of the site whose attention is running; they are dropped when the attention has run."""

    def __init__(self, sites: Sites) -> None:
        self._sites = sites
        self._running: Site | None = None
        self._seen: list[Attention] = []
        self._watching = ExitStack()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Follow the attention of all sites inside the block, without changing anything."""
        with ExitStack() as stack:
            stack.callback(self._ends)  # an interruption runs no hooks
            for site in self._sites:
                module = site.attention[1]
                stack.enter_context(before(module, self._begins(site), with_kwargs=False))
                stack.enter_context(after(module, self._ends, always_call=True))
            yield

    def opened(self, layer: int, gate: Tensor, x: Tensor, row: Tensor, column: Tensor) -> Tensor:
        """Return mu at N positions of the input of a site's output projection.

        Args:
            layer: index of the site.
            gate: weights and biases, [H, Q + 1] or [rows, H, Q + 1], on the device of ``x``.
            x: input of the output projection, [rows, length, H * D].
            row: rows of the positions, int64 [N].
            column: columns of the positions, int64 [N].

        Returns:
            mu, [N, H], in the dtype of ``gate``.

        Raises:
            HookError: no call or several calls of ``scaled_dot_product_attention`` computed the attention of the site,
                or its queries have another shape.
        """
        site = self._sites[layer]
        rows, length = x.shape[:2]
        seen = self._attention(site)
        query_shape, shape = tuple(seen.query.shape), (rows, site.heads, length, gate.shape[-1] - 1)
        # With one position, the heads that share keys may be passed as queries of one head.
        packed = length == 1 and query_shape == (rows, query_shape[1], site.heads // query_shape[1], shape[-1])
        if query_shape != shape and not (packed and site.heads % query_shape[1] == 0):
            raise HookError(
                f"{site.attention[0]} computes attention of queries {query_shape}, the gate of the edit expects (rows, "
                f"heads, positions, size) {shape}: use a vector that was made for this model"
            )
        # Positions before the first edited position are not needed. With one position, nothing waits for the device.
        first = int(column.min()) if length > 1 else 0
        query = seen.query.reshape(shape)[:, :, first:].to(gate.dtype)
        weight, bias = gate[..., None, :-1], gate[..., None, -1]
        log_z1 = (query * weight).sum(-1) + bias
        log_z2 = _log_sums(seen, first, gate.dtype).reshape(log_z1.shape)
        return (log_z1 - log_z2).sigmoid()[row, :, column - first]

    def _attention(self, site: Site) -> Attention:
        if self._running is not site or not self._seen:
            raise HookError(
                f"{site.attention[0]} computed its heads without scaled_dot_product_attention, from which an edit with "
                "a gate has the queries and keys: load the model with attn_implementation=sdpa"
            )
        if len(self._seen) > 1:
            raise HookError(
                f"{site.attention[0]} called scaled_dot_product_attention {len(self._seen)} times, expected once: an "
                "edit with a gate cannot tell which call is that of its heads; use a vector without a gate"
            )
        return self._seen[0]

    def _begins(self, site: Site) -> Callable[..., None]:
        def begins(*_: Any) -> None:
            self._ends()
            # The mode is entered here and not once for the whole block: torch disables a mode during a backward pass
            # inside the mode, and attention may run again in a backward pass.
            self._watching.enter_context(_Watching(self._seen))
            self._running = site

        return begins

    def _ends(self, *_: Any) -> None:
        self._running = None
        self._watching.close()
        self._seen.clear()


class _Watching(TorchFunctionMode):
    """A mode that appends the arguments of each call of ``scaled_dot_product_attention`` to ``seen``."""

    def __init__(self, seen: list[Attention]) -> None:
        super().__init__()
        self._seen = seen

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention:
            self._seen.append(_attention(*args, **kwargs))
        return func(*args, **kwargs)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Attention:
    """Return the needed arguments; names and defaults are those of ``scaled_dot_product_attention``."""
    return Attention(query, key, attn_mask, is_causal, query.shape[-1] ** -0.5 if scale is None else scale)


def _log_sums(seen: Attention, first: int, dtype: torch.dtype) -> Tensor:
    """Return log Z2 of the queries from ``first`` on, [rows, heads, queries - first].

    The sums are computed part by part, and again for gradients. Forward and backward pass hold at most :data:`_SCORES`
    scores at a time, or the scores of one query of each head if these are more.
    """
    rows, heads, queries, _ = seen.query.shape
    step = max(1, _SCORES // max(1, rows * heads * seen.key.shape[2]))
    parts = [
        checkpoint(_log_sum, seen, slice(begin, begin + step), dtype, use_reentrant=False, preserve_rng_state=False)
        for begin in range(first, queries, step)
    ]
    return torch.cat(parts, -1)


def _log_sum(seen: Attention, part: slice, dtype: torch.dtype) -> Tensor:
    query, key = seen.query[:, :, part].to(dtype), seen.key.to(dtype)
    # With fewer key heads than heads, neighbouring heads share one key head.
    grouped = query.reshape(query.shape[0], key.shape[1], -1, *query.shape[2:])
    scores = (grouped @ key.unsqueeze(2).transpose(-2, -1)).flatten(1, 2) * seen.scale
    if seen.causal:
        order = torch.arange(max(seen.query.shape[2], key.shape[2]), device=scores.device)
        scores = scores.masked_fill(order[: key.shape[2]] > order[: seen.query.shape[2]][part, None], -torch.inf)
    if seen.mask is not None:
        mask = seen.mask[..., part, :] if seen.mask.shape[-2] > 1 else seen.mask
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.to(dtype)
    # A query that sees no key, such as a query of padding, gets finite numbers and gradients too.
    return torch.logsumexp(scores.clamp(min=torch.finfo(dtype).min), -1)
