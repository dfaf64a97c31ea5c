"""Prefill a prompt once, then run only its last token, for many edits at a time.

The edit touches nothing before the last token of the prompt, so the keys and values of everything before it are the
same for every mask. They are recorded from the model's own forward, with its preprocessing and its position ids.
Keys and values that are not of the prompt's tokens, as where blocks attend to images, are the same to the end.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import sys
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lmms_mtv.errors import HookError
from lmms_mtv.hooks.edit import applied
from lmms_mtv.hooks.sites import Sites, text_config
from lmms_mtv.hooks.temporary import after, before
from lmms_mtv.runtime.compat import cache_name, naming, of_the_prompt, returned_cache, uncompiled
from lmms_mtv.vectors import Edit, Edits, by_stream, rows_of, taken

_MASKED = ("eager", "sdpa", None)
"""Attention to which a mask says what each token sees; None is that of models which do not say what they have."""

_WINDOWS = ("sliding_window", "attention_chunk_size", "window_size", "attention_window")
_PER_TOKEN = ("token_type_ids", "mm_token_type_ids")


class ReplayError(HookError):
    """The model's cache cannot be cut and repeated: losses need full forwards."""


@dataclass(frozen=True)
class Prefill:
    """One prompt of n tokens, as the model ran it; some at its beginning may be padding.

    ``inputs`` are the arguments of the model's forward, ``cache`` the keys and values of the first n - 1 tokens
    (None if they could not be had), ``position_ids`` those of the last token, [..., 1, 1], or None if the model works
    them out itself. All are on the model's devices. ``tokens_only``: the inputs are those of replays, and the prompt
    cannot run whole.
    """

    inputs: Mapping[str, Any]
    position_ids: Tensor | None
    cache: Any | None
    tokens_only: bool = False

    @property
    def length(self) -> int:
        """Number of tokens of the prompt, padding among them."""
        return int(self.inputs["input_ids"].shape[1])

    @property
    def last_position(self) -> Tensor:
        """The position of the last token, int64 [..., 1, 1]; a decoder that was given none counts its cache."""
        if self.position_ids is not None:
            return self.position_ids
        ids: Tensor = self.inputs["input_ids"]
        return ids.new_full((1, 1), self.length - 1)

    def halfway(self) -> Prefill:
        """Return the same with the last token at half of its position: another prompt to a model that goes by
        positions.
        """
        return dataclasses.replace(self, position_ids=self.last_position // 2)

    @property
    def bytes(self) -> int:
        """Memory of the cache."""
        tensors = (t for layer in _filled(self.cache) for t in (layer.keys, layer.values)) if self.cache else ()
        return sum(t.numel() * t.element_size() for t in tensors)

    @property
    def held(self) -> int:
        """Memory of the cache and of the inputs."""
        return self.bytes + sum(tensor.numel() * tensor.element_size() for tensor in _tensors(self.inputs))

    def to(self, device: torch.device) -> Prefill:
        """Return the same with all tensors on ``device``."""
        moved = _moved(self.inputs, device)
        positions = None if self.position_ids is None else self.position_ids.to(device)
        cache = None if self.cache is None else _copied(self.cache)
        for layer in _filled(cache) if cache else ():
            layer.keys, layer.values = layer.keys.to(device), layer.values.to(device)
        return dataclasses.replace(self, inputs=moved, position_ids=positions, cache=cache)

    def without_cache(self) -> Prefill:
        """Return the same for full forwards alone."""
        return dataclasses.replace(self, cache=None)

    def without_media(self) -> Prefill:
        """Return the prompt for replays alone: of the inputs, the tokens and the masks that belong to them are kept."""
        of_tokens = {name: self.inputs[name] for name in ("input_ids", "attention_mask") if name in self.inputs}
        return dataclasses.replace(self, inputs=of_tokens | self._views(), tokens_only=True)

    def replay(self, model: nn.Module, sites: Sites, edit: Edit | Edits, target: Sequence[int]) -> Tensor:
        """Return logits that predict ``target`` after this prompt, for each of the K edits in ``edit``, from the cache.

        Returns float32 [K, len(target), vocabulary]. The edit is applied at the prompt's last token and at every
        target token before the last, as in generation. Raises :class:`ReplayError` without a cache, and for an edit
        that is everywhere.
        """
        edits = by_stream(edit)
        if self.cache is None:
            raise ReplayError("this prompt has no cache to replay from")
        if any(each.everywhere for each in edits.values()):
            raise ReplayError("an edit of all positions changes what the cache holds: it needs full forwards")
        rows = rows_of(edits) or 1
        ids = self._followed_by(target)[:, self.length - 1 :]
        inputs: dict[str, Any] = {
            "input_ids": ids.expand(rows, -1),
            "attention_mask": self._real(len(target) - 1).expand(rows, -1),
            cache_name(model): _expanded(self.cache, rows),
            "use_cache": True,
        }
        for name, view in self._views().items():
            inputs[name] = view[:, -1:].expand(rows, len(target), *view.shape[2:])
        if self.position_ids is not None:
            steps = torch.arange(len(target), device=self.position_ids.device)
            inputs["position_ids"] = (self.position_ids + steps).expand(
                *self.position_ids.shape[:-2], rows, len(target)
            )
        with applied(sites, edits, tail=len(target), resumed=True):
            logits: Tensor = model(**inputs).logits
        return logits[:, -len(target) :].float()

    def fits_one_row(
        self, model: nn.Module, edit: Edit | Edits, target: Sequence[int], rows: int | None = None
    ) -> bool:
        """Return whether :meth:`replay_in_one_row` may take this prompt with ``rows`` such edits.

        Not where attention is computed by code that makes something else of a mask for each token, or reaches back no
        further than a window that they would not fit; where a gate looks at the attention of each row; and where
        padding leaves open which position the last token has. ``rows`` are those of ``edit`` if not given.
        """
        edits = by_stream(edit)
        tokens = self.length - 1 + (rows or rows_of(edits) or 1) * len(target)
        return (
            self.cache is not None
            and getattr(text_config(model), "_attn_implementation", None) in _MASKED
            and tokens <= _window(model, self.cache)
            and not any(each.gate is not None or each.everywhere for each in edits.values())
            and (self.position_ids is not None or bool(self._real(0).all()))
        )

    def replay_in_one_row(self, model: nn.Module, sites: Sites, edit: Edit | Edits, target: Sequence[int]) -> Tensor:
        """Return the same logits as :meth:`replay`, with the K edits side by side in one row.

        Each sees the prompt and itself alone, by an attention mask of its own, so that the cache is neither copied nor
        read K times. Whether a model takes such a mask, and position ids that repeat, has to be found out by comparing.
        Raises :class:`ReplayError` where :meth:`fits_one_row` says no.
        """
        edits = by_stream(edit)
        if not self.fits_one_row(model, edits, target):
            raise ReplayError("this prompt cannot be replayed with these edits side by side")
        rows, steps = rows_of(edits) or 1, len(target)
        ids = self._followed_by(target)[:, self.length - 1 :]
        last = self.last_position
        positions = last + torch.arange(steps, device=last.device)
        inputs: dict[str, Any] = {
            "input_ids": ids.repeat(1, rows),
            "attention_mask": self._side_by_side(rows, steps),
            "position_ids": positions.repeat(*[1] * (positions.dim() - 1), rows),
            cache_name(model): _copied(self.cache),
            "use_cache": True,
        }
        for name, view in self._views().items():
            inputs[name] = view[:, -1:].expand(1, rows * steps, *view.shape[2:])
        with applied(sites, edits, tail=steps, resumed=True, packed=rows):
            logits: Tensor = model(**inputs).logits
        return logits[:, -rows * steps :].view(rows, steps, -1).float()

    def forward(self, model: nn.Module, sites: Sites, edit: Edit | Edits, target: Sequence[int]) -> Tensor:
        """Return the same logits as :meth:`replay`, from a full forward of the prompt for each edit."""
        edits, logits, inputs = by_stream(edit), [], self.whole(model, target)
        for row in range(rows_of(edits) or 1):
            with applied(sites, taken(edits, row), tail=len(target)):
                logits.append(model(**inputs).logits[:, -len(target) :].float())
        return torch.cat(logits)

    def whole(self, model: nn.Module, target: Sequence[int]) -> dict[str, Any]:
        """Return the arguments of one forward of ``model`` over the prompt and ``target`` without its last token."""
        more = len(target) - 1
        inputs = dict(self.inputs) | {"input_ids": self._followed_by(target), "use_cache": False}
        if isinstance(positions := inputs.get("position_ids"), Tensor):
            steps = torch.arange(1, more + 1, device=positions.device)
            inputs["position_ids"] = torch.cat([positions, positions[..., -1:] + steps], -1)
        if "attention_mask" in inputs:
            inputs["attention_mask"] = self._real(more)
        for name, view in self._views().items():
            inputs[name] = torch.cat([view, view[:, -1:].expand(1, more, *view.shape[2:])], 1)
        for name in _PER_TOKEN:
            if isinstance(kinds := inputs.get(name), Tensor):
                inputs[name] = torch.cat([kinds, kinds.new_zeros(1, more)], 1)
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            inputs["logits_to_keep"] = len(target)
        return inputs

    def _followed_by(self, target: Sequence[int]) -> Tensor:
        """Return token ids [1, n + len(target) - 1] of the prompt and of the target without its last token."""
        ids: Tensor = self.inputs["input_ids"]
        return torch.cat([ids, ids.new_tensor([list(target[:-1])])], 1) if len(target) > 1 else ids

    def _real(self, more: int) -> Tensor:
        """Return the attention mask [1, n + more] of the prompt and of ``more`` tokens that follow it."""
        mask: Tensor = self.inputs.get("attention_mask", torch.ones_like(self.inputs["input_ids"]))
        return torch.cat([mask, mask.new_ones(1, more)], 1)

    def _side_by_side(self, rows: int, steps: int) -> Tensor:
        """Return what is added to scores [1, 1, rows * steps, n - 1 + rows * steps]: 0 for what a position sees.

        That is the prompt before its last token, without padding, and of its own row what is not after it.
        """
        dtype = _filled(self.cache)[0].keys.dtype
        before = self._real(0)[:, :-1].bool().expand(rows * steps, -1)
        causal = torch.ones(steps, steps, dtype=torch.bool, device=before.device).tril()
        same_edit = torch.kron(torch.eye(rows, dtype=torch.bool, device=before.device), causal)
        seen = torch.cat([before, same_edit], 1)
        hidden = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)
        return hidden[None, None]

    def _views(self) -> dict[str, Tensor]:
        """Return the masks [1, n, ...] of what else each token sees, as images.

        What follows sees what the last token does.
        """
        shape = self.inputs["input_ids"].shape
        return {
            name: mask
            for name, mask in self.inputs.items()
            # A mask [1, n] may be of something else that happens to be as long: of another tokenizer's text, of sound.
            if name.endswith("mask") and isinstance(mask, Tensor) and mask.dim() > 2 and mask.shape[:2] == shape
        }


class Captured:
    """What the first forward inside a :func:`capture` block was given and left behind."""

    def __init__(self) -> None:
        self._inputs: dict[str, Any] | None = None
        self._position_ids: Tensor | None = None
        self._cache: Any | None = None
        self._done = False

    def prefill(self) -> Prefill:
        """Return the prompt that ran.

        Raises :class:`HookError` if none did, or several in one batch, or one that does not end in a real token.
        """
        if self._inputs is None or not isinstance(self._inputs.get("input_ids"), Tensor):
            raise HookError("no forward with input_ids ran inside the capture block")
        ids, mask = self._inputs["input_ids"], self._inputs.get("attention_mask")
        if ids.shape[0] != 1:
            raise HookError(f"a prefill needs one prompt, found a batch of {ids.shape[0]}: run prompts one by one")
        if mask is not None and not (isinstance(mask, Tensor) and mask.shape == ids.shape):
            what = f"of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"of type {type(mask).__name__}"
            raise HookError(
                f"a prefill needs an attention mask of shape {tuple(ids.shape)}, 1 for a real token, or none, found "
                f"one {what}: generate with a dynamic cache (cache_implementation left unset)"
            )
        if mask is not None and not bool(mask[0, -1]):
            raise HookError("a prefill needs a prompt whose last token is real, found padding there: pad on the left")
        positions = None if self._position_ids is None else self._position_ids[..., -1:]
        return Prefill(self._inputs, positions, self._cache)


@contextmanager
def capture(model: nn.Module, sites: Sites) -> Iterator[Captured]:
    """Record the prefill of the prompt that ``model`` runs inside the block, by a forward or by ``generate``."""
    captured = Captured()
    named = naming(model)

    def begins(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if captured._inputs is None:
            captured._inputs = of_the_prompt(named(args, kwargs))
            kwargs = kwargs | {"use_cache": True}
        return args, kwargs

    def inside(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if captured._position_ids is None and not captured._done:
            captured._position_ids = kwargs.get("position_ids")

    def ends(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not captured._done:
            ids = (captured._inputs or {}).get("input_ids")
            if isinstance(ids, Tensor):
                captured._cache = _without_last(returned_cache(output), ids.shape[1], sites.skipped)
            captured._done = True

    with ExitStack() as stack:
        stack.enter_context(uncompiled(sites.around))
        stack.enter_context(before(model, begins))
        stack.enter_context(before(sites.decoder, inside))
        stack.enter_context(after(model, ends))
        yield captured


def _window(model: nn.Module, cache: Any) -> int:
    """Return how many tokens back attention reaches in every block, as far as configuration and cache tell."""
    config = text_config(model)
    told = [getattr(config, name, None) for name in _WINDOWS]
    told += [getattr(layer, "sliding_window", None) for layer in cache.layers]
    return min((size for size in told if isinstance(size, int)), default=sys.maxsize)


def _copied(cache: Any) -> Any:
    """Return a cache of its own over the same tensors: updating it leaves the original as it is."""
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    return copied


def _filled(cache: Any) -> list[Any]:
    """Return the layers that hold keys and values: blocks that attend to images have none without an image."""
    return [layer for layer in cache.layers if layer.keys is not None]


def _without_last(cache: Any, length: int, others: Container[int]) -> Any | None:
    """Return the cache of a prompt of ``length`` tokens without the last, or None if it cannot be had.

    ``others`` are the blocks without self-attention over the tokens, whose layers stay whole.
    """
    # A cache may have a state beside its layers, and layers without keys, where blocks have linear attention.
    layers = getattr(cache, "layers", None)
    if not layers or not getattr(cache, "is_croppable", True):
        return None
    if not all(getattr(layer, "is_croppable", False) and _known(layer) for layer in layers):
        return None
    cut = _copied(cache)
    for index, layer in enumerate(cut.layers):
        if layer.keys is None:
            continue
        if (layer.get_seq_length() == length) == (index in others):
            # Other layers than those expected are of the tokens, or an image has by chance as many keys as the prompt.
            return None
        if index not in others:
            try:
                layer.crop(-1)
            except (RuntimeError, ValueError):
                # A sliding window that is full has already forgotten what would have to come back.
                return None
    return cut


def _known(layer: Any) -> bool:
    """Return whether a layer holds keys of its own, or nothing at all."""
    if not hasattr(layer, "keys"):
        return False
    if layer.keys is None:
        # A layer whose keys are not yet there, or which stands in for a block that keeps none.
        return not getattr(layer, "is_initialized", True) or next(_tensors(vars(layer)), None) is None
    # A static layer is cropped in place, by a length that its copies share: cutting a copy would cut the original.
    return isinstance(layer.keys, Tensor) and not getattr(layer, "is_compileable", False)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Return all tensors in ``value``: a tensor, or mappings, lists and tuples of tensors, as of encoder outputs."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(part)


def _moved(value: Any, device: torch.device) -> Any:
    """Return a copy of ``value`` whose tensors, as :func:`_tensors` finds them, are on ``device``."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        # A copy, since an output of transformers is a mapping of a class of its own.
        moved: Any = copy.copy(value)
        for name, part in value.items():
            moved[name] = _moved(part, device)
        return moved
    if isinstance(value, list | tuple):
        parts = [_moved(part, device) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def _expanded(cache: Any, rows: int) -> Any:
    """Return the cache of one row as that of ``rows`` rows.

    Views; the model's update copies them when it appends a token.
    """
    expanded = _copied(cache)
    for layer in _filled(expanded):
        layer.keys = layer.keys.expand(rows, *layer.keys.shape[1:])
        layer.values = layer.values.expand(rows, *layer.values.shape[1:])
    return expanded
