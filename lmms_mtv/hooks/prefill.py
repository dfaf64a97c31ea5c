"""Prefills: a prompt runs once, and then only its last token is replayed, for many edits at a time.

An edit changes nothing before the prompt's last token, so the keys and values of the tokens before are the same for
every mask. They are recorded from the model's own forward, with the model's preprocessing and position ids. Keys and
values of other things than the prompt's tokens, such as images, never change.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lmms_mtv.errors import HookError
from lmms_mtv.hooks.caches import copied, expanded, filled, host_copy, moved, tensors_in, window, without_last
from lmms_mtv.hooks.edit import applied
from lmms_mtv.hooks.sites import Sites, text_config
from lmms_mtv.hooks.temporary import after, before
from lmms_mtv.runtime.compat import cache_name, naming, of_the_prompt, returned_cache, uncompiled
from lmms_mtv.vectors import Edit, Edits, by_stream, rows_of, taken

_MASKED = ("eager", "sdpa", None)
"""Attention implementations that take a mask for each token; None: the model does not name its implementation."""

_PER_TOKEN = ("token_type_ids", "mm_token_type_ids")


class ReplayError(HookError):
    """A replay is impossible, as with a cache that cannot be cut and repeated: losses need full forwards."""


@dataclass(frozen=True)
class Prefill:
    """One prompt of n tokens as the model ran it, on the model's devices. The first tokens may be padding.

    Attributes:
        inputs: arguments of the model's forward.
        position_ids: position of the last token, [..., 1, 1]; None if the model computes positions itself.
        cache: keys and values of the first n - 1 tokens; None if the prompt can only run whole.
        tokens_only: True if the inputs are only enough for replays, and the prompt cannot run whole.
    """

    inputs: Mapping[str, Any]
    position_ids: Tensor | None
    cache: Any | None
    tokens_only: bool = False

    @property
    def length(self) -> int:
        """Number of tokens of the prompt, with padding."""
        return int(self.inputs["input_ids"].shape[1])

    @property
    def last_position(self) -> Tensor:
        """Position of the last token, int64 [..., 1, 1]; without position ids the number of tokens before it."""
        if self.position_ids is not None:
            return self.position_ids
        ids: Tensor = self.inputs["input_ids"]
        return ids.new_full((1, 1), self.length - 1)

    def halfway(self) -> Prefill:
        """Return the prompt with its last token at half its position: another prompt for a model with positions."""
        return dataclasses.replace(self, position_ids=self.last_position // 2)

    @property
    def bytes(self) -> int:
        """Bytes of the cache."""
        tensors = (t for layer in filled(self.cache) for t in (layer.keys, layer.values)) if self.cache else ()
        return sum(t.numel() * t.element_size() for t in tensors)

    @property
    def held(self) -> int:
        """Bytes of the cache and of the inputs."""
        return self.bytes + sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(self.inputs))

    def to(self, device: torch.device) -> Prefill:
        """Return the prefill with all tensors on ``device``. The host does not wait for a copy to a GPU."""
        return self._moved(lambda tensor: tensor.to(device, non_blocking=device.type == "cuda"))

    def on_host(self) -> Prefill:
        """Return a copy in the memory of the host, only to be moved back by :meth:`to`; see :func:`host_copy`."""
        return self._moved(host_copy)

    def _moved(self, move: Callable[[Tensor], Tensor]) -> Prefill:
        inputs = moved(self.inputs, move)
        positions = None if self.position_ids is None else move(self.position_ids)
        cache = None if self.cache is None else copied(self.cache)
        for layer in filled(cache) if cache else ():
            layer.keys, layer.values = move(layer.keys), move(layer.values)
        return dataclasses.replace(self, inputs=inputs, position_ids=positions, cache=cache)

    def without_cache(self) -> Prefill:
        """Return the prefill without its cache, for full forwards only."""
        return dataclasses.replace(self, cache=None)

    def without_media(self) -> Prefill:
        """Return the prefill for replays only: its inputs are the tokens and the masks of the tokens."""
        of_tokens = {name: self.inputs[name] for name in ("input_ids", "attention_mask") if name in self.inputs}
        return dataclasses.replace(self, inputs=of_tokens | self.views(), tokens_only=True)

    def replay(self, model: nn.Module, sites: Sites, edit: Edit | Edits, target: Sequence[int]) -> Tensor:
        """Return logits, float32 [K, len(target), vocabulary], that predict ``target`` after the cached prompt.

        The edits are applied at the prompt's last token and at every target token before the last, as in generation.

        Args:
            model: the model that ran the prompt.
            sites: the attention sites of the model.
            edit: a batch of K edits, of heads or by stream; K is 1 for an edit without a batch.
            target: token ids.

        Raises:
            ReplayError: the prompt has no cache, or an edit is everywhere.
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
            cache_name(model): expanded(self.cache, rows),
            "use_cache": True,
        }
        for name, view in self.views().items():
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
        """Return whether :meth:`replay_in_one_row` may run, for ``rows`` edits if given, else for the K of ``edit``.

        The result is False if the prompt has no cache, the attention implementation may not take a mask for each token,
        the tokens do not fit the window of attention, an edit has a gate (which needs the attention of each row) or is
        everywhere, or padding makes the position of the last token unclear. Other arguments: as in :meth:`replay`.
        """
        edits = by_stream(edit)
        tokens = self.length - 1 + (rows or rows_of(edits) or 1) * len(target)
        return (
            self.cache is not None
            and getattr(text_config(model), "_attn_implementation", None) in _MASKED
            and tokens <= window(model, self.cache)
            and not any(each.gate is not None or each.everywhere for each in edits.values())
            and (self.position_ids is not None or self._is_unpadded)
        )

    def replay_in_one_row(self, model: nn.Module, sites: Sites, edit: Edit | Edits, target: Sequence[int]) -> Tensor:
        """Return the logits of :meth:`replay`, for the same arguments, with the K edits side by side in one row.

        An attention mask lets the tokens of an edit see only the prompt and each other, so the cache is neither copied
        nor read K times. Only a comparison can tell if a model takes such a mask and repeated position ids.

        Raises:
            ReplayError: :meth:`fits_one_row` returns False.
        """
        edits = by_stream(edit)
        if not self.fits_one_row(model, edits, target):
            raise ReplayError("this prompt cannot be replayed with these edits side by side")
        inputs = self.one_row(rows_of(edits) or 1, target)
        return run_one_row(model, sites, edits, inputs, self.cache, len(target))

    def one_row(self, rows: int, target: Sequence[int], keys: int | None = None) -> dict[str, Tensor]:
        """Return the arguments of :func:`run_one_row` for this prompt. Nothing here waits for the device.

        Args:
            rows: the number of edits.
            target: token ids.
            keys: the number of keys in the cache, if keys that no token sees stand before the keys of the prompt.
        """
        steps, last = len(target), self.last_position
        positions = last + torch.arange(steps, device=last.device)
        inputs = {
            "input_ids": self._followed_by(target)[:, self.length - 1 :].repeat(1, rows),
            "attention_mask": self._side_by_side(rows, steps, keys or self.length - 1),
            "position_ids": positions.repeat(*[1] * (positions.dim() - 1), rows),
        }
        for name, view in self.views().items():
            inputs[name] = view[:, -1:].expand(1, rows * steps, *view.shape[2:])
        return inputs

    def forward(self, model: nn.Module, sites: Sites, edit: Edit | Edits, target: Sequence[int]) -> Tensor:
        """Return the logits of :meth:`replay`, for the same arguments, from a full forward for each edit."""
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
        for name, view in self.views().items():
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
        following = torch.tensor([target[:-1]], dtype=ids.dtype)
        return torch.cat([ids, following.to(ids.device, non_blocking=True)], 1) if len(target) > 1 else ids

    def _real(self, more: int) -> Tensor:
        """Return the attention mask [1, n + more] of the prompt and of ``more`` tokens that follow it."""
        mask: Tensor = self.inputs.get("attention_mask", torch.ones_like(self.inputs["input_ids"]))
        return torch.cat([mask, mask.new_ones(1, more)], 1)

    @cached_property
    def _is_unpadded(self) -> bool:
        """True if all tokens are real. The answer waits for the device."""
        return bool(self._real(0).all())

    def _side_by_side(self, rows: int, steps: int, keys: int) -> Tensor:
        """Return the term added to the scores, [1, 1, rows * steps, keys + rows * steps]: 0 where a position sees."""
        # A position sees the prompt's real tokens before the last, and its own row up to itself.
        dtype = filled(self.cache)[0].keys.dtype
        real = functional.pad(self._real(0)[:, :-1].bool(), (keys - self.length + 1, 0))
        before = real.expand(rows * steps, -1)
        causal = torch.ones(steps, steps, dtype=torch.bool, device=before.device).tril()
        same_edit = torch.kron(torch.eye(rows, dtype=torch.bool, device=before.device), causal)
        seen = torch.cat([before, same_edit], 1)
        hidden = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)
        return hidden[None, None]

    def views(self) -> dict[str, Tensor]:
        """Return masks [1, n, ...] of what else tokens see, as images. New tokens see the same as the last token."""
        shape = self.inputs["input_ids"].shape
        return {
            name: mask
            for name, mask in self.inputs.items()
            # A mask [1, n] may belong to something else of equal length: the text of another tokenizer, or sound.
            if name.endswith("mask") and isinstance(mask, Tensor) and mask.dim() > 2 and mask.shape[:2] == shape
        }


def run_one_row(
    model: nn.Module, sites: Sites, edits: Edits, inputs: Mapping[str, Tensor], cache: Any, steps: int
) -> Tensor:
    """Return the logits of K edits side by side in one row, float32 [K, steps, vocabulary].

    Args:
        model: the model that ran the prompt.
        sites: the attention sites of the model.
        edits: K edits by stream.
        inputs: the arguments of the forward, see :meth:`Prefill.one_row`.
        cache: the keys and values of the tokens before; the cache does not change.
        steps: the number of tokens of each edit.
    """
    rows = rows_of(edits) or 1
    with applied(sites, edits, tail=steps, resumed=True, packed=rows):
        logits: Tensor = model(**inputs, **{cache_name(model): copied(cache)}, use_cache=True).logits
    return logits[:, -rows * steps :].view(rows, steps, -1).float()


class Captured:
    """The arguments and the cache of the first forward inside a :func:`capture` block."""

    def __init__(self) -> None:
        self._inputs: dict[str, Any] | None = None
        self._position_ids: Tensor | None = None
        self._cache: Any | None = None
        self._done = False

    def prefill(self) -> Prefill:
        """Return the prompt that ran.

        Raises:
            HookError: no prompt ran, several ran in one batch, or the mask or the last token of the prompt is unfit.
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
    """Record the first prompt that ``model`` runs inside the block, by a forward or by ``generate``."""
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
                captured._cache = without_last(returned_cache(output), ids.shape[1], sites.skipped)
            captured._done = True

    with ExitStack() as stack:
        stack.enter_context(uncompiled(sites.around))
        stack.enter_context(before(model, begins))
        stack.enter_context(before(sites.decoder, inside))
        stack.enter_context(after(model, ends))
        yield captured
