"""Hooks that record and change the streams of a running model, and that are gone after the block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lmms_mtv.errors import ArgumentError, DiscoveryError, GeometryError, HookError, NumericsError
from lmms_mtv.hooks.gates import Gates
from lmms_mtv.hooks.generation import token_by_token
from lmms_mtv.hooks.positions import Positions
from lmms_mtv.hooks.sites import Sites, find_sites
from lmms_mtv.hooks.streams import Change, HookPoint, changed_at, hook_points, shape
from lmms_mtv.runtime.compat import uncompiled
from lmms_mtv.vectors import HEADS, Edit, Edits, TaskVector, by_stream


class Recording:
    """Activations at the last real positions of each row, from the forwards since the recording began."""

    def __init__(self, hook_points: Sequence[HookPoint], prompts_only: bool = False, attached: bool = False) -> None:
        self._places = hook_points
        self._prompts_only = prompts_only
        self._attached = attached
        self._seen: list[list[Tensor]] = [[] for _ in hook_points]

    def last(self) -> Tensor:
        """Return the recorded activations.

        Returns:
            float32 [rows, layers, heads, head_dim], on the device of the first layer. The rows of the forwards follow
            one another.

        Raises:
            HookError: no activation was recorded at a site.
            NumericsError: the activations of a module, which the message names, have NaN or infinity.
        """
        if not all(self._seen):
            silent = [point.name for point, seen in zip(self._places, self._seen, strict=True) if not seen]
            raise HookError(f"nothing was recorded at {', '.join(silent)}: run the model inside the block")
        first = self._seen[0][0].device
        layers = [torch.cat(seen).to(first) for seen in self._seen]
        for point, layer in zip(self._places, layers, strict=True):
            if not layer.isfinite().all():
                raise NumericsError(
                    f"NaN or infinity in the activations of {point.name}: load the model in float32 or bfloat16 "
                    "(dtype=)"
                )
        return torch.stack(layers, 1)

    def _keeping(self, index: int, positions: Positions) -> Change:
        point = self._places[index]

        def keep(x: Tensor) -> None:
            if self._prompts_only and positions.continues:
                return
            rows = x[positions.of(x)].float()
            rows = rows if self._attached else rows.detach()
            self._seen[index].append(rows.view(-1, point.heads, point.size))

        return keep


@contextmanager
def record(
    sites: Sites, stream: str = HEADS, *, prompts_only: bool = False, tail: int = 1, attached: bool = False
) -> Iterator[Recording]:
    """Record the activations of a stream inside the block, without changing anything.

    The activations contain the changes of an edit that is applied around the block.

    Args:
        sites: the attention sites of the model.
        stream: one of :data:`STREAMS`.
        prompts_only: True to leave out forwards that continue from a cache, such as forwards over generated tokens.
        tail: number of last real tokens of each row to record. They become consecutive rows of the recording.
        attached: True to keep the gradients of the activations.

    Yields:
        The recording.

    Raises:
        DiscoveryError: the model has no modules for the stream.
        HookError: inside a forward whose real tokens are not known.
    """
    points = hook_points(sites, stream)
    recording, positions = Recording(points, prompts_only, attached), Positions(tail)
    hooks = [(point, recording._keeping(index, positions)) for index, point in enumerate(points)]
    with _hooked(sites, positions, hooks):
        yield recording


@contextmanager
def _hooked(sites: Sites, positions: Positions, hooks: Sequence[tuple[HookPoint, Change]]) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(uncompiled(sites.around))
        stack.enter_context(positions.watching(sites.decoder, sites.model))
        for point, change in hooks:
            stack.enter_context(changed_at(point, change))
        yield


class Fired:
    """Numbers of runs of an edit.

    A run that leaves its forward unchanged counts too, such as the run of an edit that is ``once`` after the prompt.

    Attributes:
        by_site: number of runs at each site, for one stream after the other.
    """

    def __init__(self, sites: int) -> None:
        self.by_site = [0] * sites

    @property
    def count(self) -> int:
        """Number of forwards in which the edit ran at every site; 0 for a vector without edits."""
        return min(self.by_site, default=0)


@contextmanager
def applied(
    target: nn.Module | Sites,
    vector: TaskVector | Edits | Edit,
    *,
    tail: int | Tensor = 1,
    real: Tensor | None = None,
    resumed: bool = False,
    packed: int | None = None,
) -> Iterator[Fired]:
    """Edit every forward inside the block at the last real position of each row.

    A forward over a prompt is edited at the prompt's last token. Each further forward is edited at the token that it
    generates. Edits that are ``everywhere`` change all positions of all forwards. Edits that are ``once`` change the
    first position of the tail, and change nothing in a forward that continues from the cache of a prompt.

    The edit is out of place: activations that other modules hold do not change. All arguments are checked before a hook
    is registered. No hook is left after the block, also if the block raises. The edit acts in the thread that entered
    the block. A copy of the model that is made inside the block runs without the edit. Compiled modules run uncompiled
    inside the block. Generation has to run the whole prompt and then one token at a time (:func:`token_by_token`).

    Gradients reach the tensors of the edits. The block has to be entered again after these tensors have changed. Under
    gradient checkpointing, blocks run again in the backward pass. Then the backward pass has to be inside the block,
    and the edits have to be ``everywhere``.

    Args:
        target: a model, or its sites.
        vector: a vector, edits by stream, or one edit of heads. An edit with a leading dimension K needs batches of K
            rows. An edit with a ``gate`` needs a model that computes attention by ``scaled_dot_product_attention``.
        tail: number of last real positions to edit, or an integer tensor [rows] with a number for each row.
        real: [rows, tokens], 1 for a real token, for one padded forward that gets no attention mask.
        resumed: True if the prompt itself continues from a cache, as in a replay.
        packed: number of batch rows of ``tail`` positions each, if they follow one another in a single row, and the
            forwards inside the block have no other positions.

    Yields:
        The numbers of runs of the edits.

    Raises:
        ArgumentError: ``target`` or ``vector`` has another type.
        GeometryError: the vector does not fit the sites.
        DiscoveryError: the model has no modules for one of the streams.
        HookError: a forward cannot be edited exactly, or the model ran without the edit.
    """
    if not isinstance(target, nn.Module | Sites):
        raise ArgumentError(f"the model is {type(target).__name__}: pass a loaded model, or its sites")
    if not isinstance(vector, TaskVector | Mapping | Edit):
        raise ArgumentError(
            f"the vector is {type(vector).__name__}, expected a TaskVector, an Edit, or edits by stream: "
            "lmms_mtv.stacked([...]) gives each row of a batch a vector"
        )
    sites = target if isinstance(target, Sites) else find_sites(target)
    if isinstance(vector, TaskVector):
        vector.check(sites.geometry)
    edits = by_stream(vector.edits if isinstance(vector, TaskVector) else vector)
    if not edits:
        yield Fired(0)
        return
    for stream, edit in edits.items():
        if edit.shape != shape(sites, stream):
            raise GeometryError(
                f"an edit of {stream} of (layers, heads, size) {edit.shape} does not fit the model's "
                f"{shape(sites, stream)}"
            )
    fired, gates = Fired(len(sites) * len(edits)), Gates(sites)
    positions = Positions(tail, real, resumed, packed is not None)
    steps = [
        (point, edit, layer) for stream, edit in edits.items() for layer, point in enumerate(hook_points(sites, stream))
    ]
    hooks = [(point, _editing(edit, layer, positions, gates, fired, i)) for i, (point, edit, layer) in enumerate(steps)]
    if packed is not None:
        hooks = [(point, _of_packed(change, packed)) for point, change in hooks]
    gated = any(edit.gate is not None for edit in edits.values())
    follows = not resumed and packed is None and not all(edit.everywhere for edit in edits.values())
    with (
        token_by_token(sites, tail) if follows else nullcontext(),
        gates.watching() if gated else nullcontext(),
        _hooked(sites, positions, hooks),
    ):
        yield fired
    if fired.count < positions.forwards:
        raise HookError(
            f"the model ran {positions.forwards} forwards inside the block and the edit {fired.count} of them: it does "
            "not compute with the sites that were found; pass decoder= with the module that its forward calls"
        )


def _editing(edit: Edit, layer: int, positions: Positions, gates: Gates, fired: Fired, index: int) -> Change:
    """Return the edit of one layer: ``keep * x + shift`` over all heads at once, with ``shift = gain * value``.

    With a gate the edit is ``keep * x + mu * shift``, with a mu for each position and head.
    """
    _, heads, size = edit.shape
    batch = edit.batch
    gain, value = edit.gain[..., layer, :, None], edit.value[..., layer, :, :]
    shift = (gain * value).flatten(-2)
    keep = edit.keep[..., layer, :].repeat_interleave(size, -1)
    keeps, shifts = _cast(keep), _cast(shift)
    gate = None if edit.gate is None else _cast(edit.gate[..., layer, :, :])
    # If all rows get the same edit, the indices of the rows are not needed.
    alike = batch is None and gate is None
    # The edit changes nothing in this layer, as in most layers if one layer was chosen.
    idle = alike and not edit.renormed and not _learned(edit) and bool((keep == 1).all() and (shift == 0).all())

    def opened(x: Tensor, row: Tensor, column: Tensor) -> Tensor | None:
        """Return mu [N, heads] at the positions ``row``, ``column`` [N] of ``x``; None without a gate."""
        if gate is None:
            return None
        # In half precision a sum over many keys would lose most of its terms.
        return gates.opened(layer, gate(x.device, torch.promote_types(x.dtype, torch.float32)), x, row, column)

    def mixed(x: Tensor, row: Tensor | None = None, mu: Tensor | None = None) -> Tensor:
        """Return ``x`` [..., heads * size] edited; ``row`` [N]: batch rows of N positions, None for the same edit."""
        kept, added = (t if t.dim() == 1 else t[row] for t in (keeps(x.device, x.dtype), shifts(x.device, x.dtype)))
        if mu is not None:
            added = added * mu.to(x.dtype).repeat_interleave(size, -1)
        y = torch.addcmul(added, x, kept)
        return _rescaled(y, x, heads) if edit.renormed else y

    def change(x: Tensor) -> Tensor | None:
        fired.by_site[index] += 1
        if edit.once and positions.follows:
            if not positions.prompts:
                raise HookError(
                    "the first forward already went on from a cache, so that where the prompt ends is not known: run "
                    "prompts whole"
                )
            return None
        if idle:
            return None
        rows, length = x.shape[:2]
        if batch not in (None, rows):
            raise HookError(
                f"an edit of {batch} rows met a batch of {rows} rows: stack one vector for each row (with num_beams or "
                "num_return_sequences, each vector that many times)"
            )
        if alike and (edit.everywhere or length == 1):
            edited = mixed(x)
        elif edit.everywhere or length == 1 or (positions.packed and not edit.once):
            row = torch.arange(rows, device=x.device).repeat_interleave(length)
            column = torch.arange(length, device=x.device).repeat(rows)
            edited = mixed(x.flatten(0, 1), row, opened(x, row, column)).view_as(x)
        else:
            row, column = positions.of(x, first=edit.once)
            edited = x.clone()
            edited[row, column] = mixed(x[row, column], row, opened(x, row, column))
        return edited

    return change


def _of_packed(change: Change, rows: int) -> Change:
    """Return ``change`` for ``rows`` batch rows that follow one another in a single row."""

    def of_packed(x: Tensor) -> Tensor | None:
        changed = change(x.reshape(rows, -1, x.shape[-1]))
        return None if changed is None else changed.reshape(x.shape)

    return of_packed


def _cast(tensor: Tensor) -> Callable[[torch.device, torch.dtype], Tensor]:
    """Return a function that copies ``tensor`` to a device and a dtype, once for each pair.

    A tensor with a gradient is copied in each call: a copy belongs to the graph of the forward that made the copy.
    """
    copies: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def cast(device: torch.device, dtype: torch.dtype) -> Tensor:
        if tensor.requires_grad:
            return tensor.to(device, dtype)
        if (device, dtype) not in copies:
            copies[device, dtype] = tensor.to(device, dtype)
        return copies[device, dtype]

    return cast


def _learned(edit: Edit) -> bool:
    """Return whether gradients go to ``value``, ``keep`` or ``gain`` of the edit."""
    return any(tensor.requires_grad for tensor in (edit.value, edit.keep, edit.gain))


def _rescaled(y: Tensor, x: Tensor, heads: int) -> Tensor:
    """Return ``y`` [..., heads * size] with each head scaled in float32 to the head's norm in ``x``, in y's dtype."""
    new, old = (part.float().view(*part.shape[:-1], heads, -1) for part in (y, x))
    tiny = torch.finfo(torch.float32).tiny
    scaled: Tensor = new * (_length(old) / _length(new).clamp(min=tiny))
    return scaled.flatten(-2).to(y.dtype)


def _length(x: Tensor) -> Tensor:
    return x.square().sum(-1, keepdim=True).sqrt()


@torch.no_grad()
def verify(model: nn.Module, sites: Sites, inputs: Mapping[str, Any], stream: str = HEADS) -> None:
    """Check that the model computes a stream at the sites, and its logits from the stream.

    Every site must run exactly once in a forward. Replacing every head by its own activation must change no logit at
    all. Setting all heads to zero must change some logits.

    Args:
        model: the model.
        sites: the attention sites of the model.
        inputs: arguments of the forwards that are compared.
        stream: one of :data:`STREAMS`; streams other than the heads count as one head.

    Raises:
        DiscoveryError: one of the three conditions is not met. Pass ``decoder=`` to :func:`find_sites`.
        HookError: the model gives other logits when it runs ``inputs`` again, so that the comparison tells nothing.
    """
    with record(sites, stream) as recording:
        plain = model(**inputs).logits
    activations = recording.last()
    rows = plain.shape[0]
    if activations.shape[0] != rows:
        raise DiscoveryError(
            f"the sites of {stream} ran {activations.shape[0] / rows:g} times in one forward, expected once: pass "
            "decoder= with the module that holds the language decoder's blocks"
        )
    everywhere = torch.ones(activations.shape[1:3], device=activations.device)
    with applied(sites, {stream: Edit(activations, 1 - everywhere, everywhere)}):
        same = model(**inputs).logits
    with applied(sites, {stream: Edit.replace(torch.zeros_like(activations[0]), everywhere)}):
        other = model(**inputs).logits
    if not torch.equal(plain, same):
        _make_sure_it_repeats(model, inputs, plain)
        gap = (plain - same).abs().max().item()
        raise DiscoveryError(
            f"replacing the {stream} by their own activations changed the logits by {gap:g}, expected 0: the sites "
            f"({sites[0].name}, ...) are not what the model computes with; pass decoder="
        )
    if torch.equal(plain, other):
        raise DiscoveryError(
            f"setting the {stream} to zero changed no logit: the sites ({sites[0].name}, ...) are not on the way to "
            "the output; pass decoder="
        )


def _make_sure_it_repeats(model: nn.Module, inputs: Mapping[str, Any], plain: Tensor) -> None:
    """Raise :class:`HookError` unless ``model`` gives the logits ``plain`` for ``inputs`` again, without edits."""
    again = model(**inputs).logits
    if torch.equal(plain, again):
        return
    gap = (plain - again).abs().max().item() if plain.shape == again.shape else float("nan")
    if model.training:
        mend = "it is in training mode, where dropout is random: call model.eval() first"
    else:
        state = [name for name, value in inputs.items() if not isinstance(value, Tensor | bool | int | float | str)]
        mend = (
            "an argument holds a state that a forward changes, or the model computes at random or in an order that "
            f"varies; arguments that are no tensors: {', '.join(state) or 'none'}"
        )
    raise HookError(f"the same forward twice gave logits that differ by {gap:g}, expected 0: {mend}")
