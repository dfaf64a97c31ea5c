"""Replays side by side in memory that stays where it is, with shapes that many prompts share.

A CUDA graph runs the same kernels on the same memory again, without Python. So the tensors of a replay are copied into
buffers before each run. Prompts of about the same length share buffers: keys that no token sees stand before the keys
of a prompt. Rows beyond the edits repeat an edit, tokens beyond the target repeat a token, and nobody reads their
logits.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from lmms_mtv.hooks.caches import copied, filled, window
from lmms_mtv.hooks.prefill import Prefill, run_one_row
from lmms_mtv.hooks.sites import Sites
from lmms_mtv.vectors import Edit, Edits, rows_of

ROWS: Final = 32
"""Numbers of rows are multiples of this number. A GPU reads the weights once for all rows, which takes longest."""

_KEYS: Final = 64
"""Numbers of keys are multiples of at least this number."""


@dataclass(frozen=True)
class StaticShape:
    """The shape of a replay side by side: all replays of one shape run the same operations.

    Attributes:
        rows: number of edits, with rows that only fill the shape.
        steps: number of tokens of each edit, with tokens that only fill the shape.
        keys: number of keys before these tokens, at least one of which no token sees.
        layout: what else the operations depend on: kinds of edits, of arguments of the forward, and of layers of keys.
    """

    rows: int
    steps: int
    keys: int
    layout: tuple[Any, ...]

    @classmethod
    def of(cls, prefill: Prefill, edits: Edits, target: Sequence[int], rows: int | None = None) -> StaticShape:
        """Return the shape of a replay of ``edits``, or of ``rows`` edits like them, before ``target``."""
        layout = (
            *((name, edit.once, edit.renormed, *_kinds(edit)) for name, edit in sorted(edits.items())),
            *((name, view.shape[2:], view.dtype) for name, view in sorted(prefill.views().items())),
            prefill.last_position.shape,
            *(_kind(layer) for layer in (prefill.cache.layers if prefill.cache else ())),
        )
        full = math.ceil((rows or rows_of(edits) or 1) / ROWS) * ROWS
        # The prompt has one token more than keys.
        return cls(full, _rounded(len(target), 1, 2), _rounded(prefill.length, _KEYS, 4), layout)

    @property
    def tokens(self) -> int:
        """Number of tokens side by side."""
        return self.rows * self.steps

    def fits(self, model: nn.Module, prefill: Prefill) -> bool:
        """Return whether this many keys may stand before this many tokens, for a prompt with a cache."""
        # A layer of another length has keys of an image, which no mask of tokens hides.
        alike = all(layer.keys.shape[-2] == prefill.length - 1 for layer in filled(prefill.cache))
        return alike and self.keys + self.tokens <= window(model, prefill.cache)


class StaticReplay:
    """A replay side by side whose tensors stay where they are.

    Args:
        model: the model that ran the prompts.
        sites: the attention sites of the model.
        shape: the shape of the replays.
        device: the device of the buffers.
        prefill, edits, target: the first replay of this shape, which is loaded.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sites,
        shape: StaticShape,
        device: torch.device,
        prefill: Prefill,
        edits: Edits,
        target: Sequence[int],
    ) -> None:
        self._model = model
        self._sites = sites
        self._shape = shape
        self._edits = {name: _widened(edit, shape.rows, device) for name, edit in edits.items()}
        first = self._arguments(prefill, target)
        self._inputs = {name: torch.empty_like(tensor, device=device) for name, tensor in first.items()}
        self._cache = _padded(prefill.cache, shape.keys, device)
        self.load(prefill, edits, target)

    @property
    def bytes(self) -> int:
        """Bytes of the buffers."""
        tensors: list[Tensor] = [tensor for layer in filled(self._cache) for tensor in (layer.keys, layer.values)]
        tensors += [tensor for edit in self._edits.values() for tensor in _tensors(edit).values()]
        tensors += self._inputs.values()
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def load(self, prefill: Prefill, edits: Edits, target: Sequence[int]) -> None:
        """Copy a replay of this shape into the buffers. Nothing here waits for the device."""
        for name, edit in edits.items():
            buffers = _tensors(self._edits[name])
            for field, tensor in _tensors(edit).items():
                _fill(buffers[field], tensor)
        for name, tensor in self._arguments(prefill, target).items():
            self._inputs[name].copy_(tensor, non_blocking=True)
        for wide, layer in zip(filled(self._cache), filled(prefill.cache), strict=True):
            for buffer, tensor in ((wide.keys, layer.keys), (wide.values, layer.values)):
                buffer[..., buffer.shape[-2] - tensor.shape[-2] :, :].copy_(tensor, non_blocking=True)

    def run(self) -> Tensor:
        """Return the logits of the replay in the buffers, float32 [rows, steps, vocabulary]."""
        return run_one_row(self._model, self._sites, self._edits, self._inputs, self._cache, self._shape.steps)

    def _arguments(self, prefill: Prefill, target: Sequence[int]) -> dict[str, Tensor]:
        """Return the arguments of the forward, except the cache, with tokens that fill the shape."""
        filling = [target[-1]] * (self._shape.steps - len(target))
        return prefill.one_row(self._shape.rows, [*target, *filling], self._shape.keys)


def _rounded(number: int, least: int, parts: int) -> int:
    """Return the next multiple of a part, ``parts`` to a power of two, and at least ``least``, that is not smaller."""
    part = max((1 << number.bit_length() - 1) // parts, least)
    return math.ceil(number / part) * part


def _kinds(edit: Edit) -> tuple[Any, ...]:
    """Return the number of dimensions and the dtype of each tensor of an edit; other sizes are those of the model."""
    return tuple((tensor.dim(), tensor.dtype) for tensor in _tensors(edit).values())


def _kind(layer: Any) -> tuple[Any, ...]:
    """Return the dtype of the keys of a cache's layer, and their sizes except their number; () without keys."""
    keys = layer.keys
    return () if keys is None else (keys.dtype, *keys.shape[:-2], keys.shape[-1], layer.values.shape[-1])


def _tensors(edit: Edit) -> dict[str, Tensor]:
    """Return the tensors of an edit without a gate, by name."""
    return {"value": edit.value, "keep": edit.keep, "gain": edit.gain}


def _widened(edit: Edit, rows: int, device: torch.device) -> Edit:
    """Return an edit of ``rows`` rows on ``device``, whose numbers do not count, like an edit of fewer rows."""
    of_rows = {id(tensor) for tensor in edit.of_rows}
    wide = {
        name: tensor.new_empty((rows, *tensor.shape[1:]) if id(tensor) in of_rows else tensor.shape, device=device)
        for name, tensor in _tensors(edit).items()
    }
    return dataclasses.replace(edit, value=wide["value"], keep=wide["keep"], gain=wide["gain"])


def _padded(cache: Any, keys: int, device: torch.device) -> Any:
    """Return a cache of zeros on ``device``, with ``keys`` keys in each layer that has keys in ``cache``."""
    padded = copied(cache)
    for layer in filled(padded):
        for name in ("keys", "values"):
            tensor = getattr(layer, name)
            shape = (*tensor.shape[:-2], keys, tensor.shape[-1])
            setattr(layer, name, tensor.new_zeros(shape, device=device))
        if isinstance(getattr(layer, "cumulative_length", None), int):
            # The layers of a sliding window count their tokens.
            layer.cumulative_length = keys
    return padded


def _fill(buffer: Tensor, tensor: Tensor) -> None:
    """Copy a tensor into a buffer that may have more rows. Further rows repeat the first row."""
    if buffer.shape == tensor.shape:
        buffer.copy_(tensor, non_blocking=True)
        return
    buffer[: len(tensor)].copy_(tensor, non_blocking=True)
    buffer[len(tensor) :].copy_(buffer[:1])
