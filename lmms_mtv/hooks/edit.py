"""Reading and changing the streams of a running model, through hooks that leave nothing behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lmms_mtv.errors import DiscoveryError, GeometryError, HookError, NumericsError
from lmms_mtv.hooks.gates import Gates
from lmms_mtv.hooks.generation import token_by_token
from lmms_mtv.hooks.positions import Positions
from lmms_mtv.hooks.sites import Sites, find_sites
from lmms_mtv.hooks.streams import Change, HookPoint, changed_at, hook_points, shape
from lmms_mtv.runtime.compat import uncompiled
from lmms_mtv.vectors import HEADS, Edit, Edits, TaskVector, by_stream


class Recording:
    """Activations of the last real token of each row, of the forwards since the recording began."""

    def __init__(self, hook_points: Sequence[HookPoint], prompts_only: bool = False, attached: bool = False) -> None:
        self._places = hook_points
        self._prompts_only = prompts_only
        self._attached = attached
        self._seen: list[list[Tensor]] = [[] for _ in hook_points]

    def last(self) -> Tensor:
        """float32 [rows, layers, heads, head_dim], on the device of the first; rows of later forwards follow.

        Raises :class:`HookError` if nothing ran, :class:`NumericsError`, with the module's name, on NaN or infinity.
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
    """Record, without changing anything, what runs through ``stream`` inside the block: the heads, or another one.

    ``prompts_only`` leaves out the forwards over tokens that a generation adds to a prompt. ``tail`` records that many
    last real tokens of each row instead of one, one after the other. What is ``attached`` keeps its gradients. An edit
    that is applied around the block is seen.
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
    """How often the edit ran at each site, of one stream after the other, be it to let a token after a prompt pass."""

    def __init__(self, sites: int) -> None:
        self.by_site = [0] * sites

    @property
    def count(self) -> int:
        """Number of forwards that were edited at every site; 0 for a vector without edits."""
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

    ``target`` is a model, or its sites; ``vector`` may also be edits by stream, or one edit of heads. A forward over a
    prompt is edited at the prompt's last token, each further forward at the token it generates. ``tail`` edits that
    many last real positions instead of one: a number, or an integer tensor with one for each row. Edits that are
    ``everywhere`` are at all positions of all forwards; those that are ``once`` let the forwards pass that go on from
    the cache of a prompt, and of the tail take the first position. An edit with a leading dimension K needs batches of
    K rows. ``real`` [rows, tokens], 1 for a real token, is for one padded forward that is not given an attention mask.
    ``resumed`` says that the prompt itself goes on from a cache, as in a replay. ``packed`` rows of ``tail`` positions
    each stand one after the other in one row, which is all that the forwards inside the block have.

    Out of place: the activations that other modules hold are not touched. All is checked before anything is
    registered, and no hook is left after the block, also when it raises. The edit acts in the thread that entered the
    block, and a copy of the model made inside does not have it. Compiled modules run uncompiled inside the block.
    Generation has to run the whole prompt and then one token at a time; any other is refused with the reason
    (:func:`token_by_token`), as is a model that ran without the edit. An edit with a ``gate`` needs a model that
    computes attention by ``scaled_dot_product_attention``; a forward of another raises :class:`HookError`.

    Gradients reach the tensors of the edits; the block is entered again when these have changed. Under gradient
    checkpointing, where blocks run again in the backward pass, that pass has to be inside the block, and edits be
    ``everywhere``.

    Raises :class:`GeometryError` if the vector does not fit the sites, :class:`DiscoveryError` if the model has no
    modules for one of its streams, :class:`HookError` if a forward cannot be edited exactly.
    """
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

    A gate makes that ``keep * x + mu * shift``, with a mu for each position and head.
    """
    _, heads, size = edit.shape
    batch = edit.batch
    gain, value = edit.gain[..., layer, :, None], edit.value[..., layer, :, :]
    shift = (gain * value).flatten(-2)
    keep = edit.keep[..., layer, :].repeat_interleave(size, -1)
    keeps, shifts = _cast(keep), _cast(shift)
    gate = None if edit.gate is None else _cast(edit.gate[..., layer, :, :])
    # All rows alike are edited without asking which is which.
    alike = batch is None and gate is None
    # A layer that has nothing to change, as most have where one layer was chosen.
    idle = alike and not edit.renormed and not _learned(edit) and bool((keep == 1).all() and (shift == 0).all())

    def opened(x: Tensor, row: Tensor, column: Tensor) -> Tensor | None:
        """mu [N, heads] at the positions ``row``, ``column`` [N] of ``x``; None without a gate."""
        if gate is None:
            return None
        # In half precision a sum over many keys would lose most of them.
        return gates.opened(layer, gate(x.device, torch.promote_types(x.dtype, torch.float32)), x, row, column)

    def mixed(x: Tensor, row: Tensor | None = None, mu: Tensor | None = None) -> Tensor:
        """Return positions ``x`` [..., heads * size]: N picked ones, whose batch rows are ``row`` [N], or of alike
        rows.
        """
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
            raise HookError(f"an edit of {batch} rows met a batch of {rows} rows")
        if alike and (edit.everywhere or length == 1):
            edited = mixed(x)
        elif edit.everywhere or length == 1:
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
    """``change`` for ``rows`` rows that stand one after the other in one."""

    def of_packed(x: Tensor) -> Tensor | None:
        changed = change(x.reshape(rows, -1, x.shape[-1]))
        return None if changed is None else changed.reshape(x.shape)

    return of_packed


def _cast(tensor: Tensor) -> Callable[[torch.device, torch.dtype], Tensor]:
    """Return a function that gives ``tensor`` on a device and in a dtype, copied once for each.

    With a gradient each call copies: a copy belongs to the graph of the forward that made the copy.
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
    """Return whether gradients go to the edit."""
    return any(tensor.requires_grad for tensor in (edit.value, edit.keep, edit.gain))


def _rescaled(y: Tensor, x: Tensor, heads: int) -> Tensor:
    """``y`` [..., heads * size], each head scaled to the norm that it has in ``x``; in float32, then in its dtype."""
    new, old = (part.float().view(*part.shape[:-1], heads, -1) for part in (y, x))
    tiny = torch.finfo(torch.float32).tiny
    scaled: Tensor = new * (_length(old) / _length(new).clamp(min=tiny))
    return scaled.flatten(-2).to(y.dtype)


def _length(x: Tensor) -> Tensor:
    return x.square().sum(-1, keepdim=True).sqrt()


@torch.no_grad()
def verify(model: nn.Module, sites: Sites, inputs: Mapping[str, Any], stream: str = HEADS) -> None:
    """Make sure that ``sites`` are where ``model`` computes its heads, or ``stream`` where it computes that.

    Replacing every head by its own activation must change no logit at all, and setting all heads to zero must change
    some; every site must run exactly once a forward.

    Raises :class:`DiscoveryError` if not: pass ``decoder=`` to :func:`find_sites`. Raises :class:`HookError` if the
    model does not give the same logits when it runs ``inputs`` again, so that nothing can be told from such runs.
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
    """Raise :class:`HookError` unless ``model`` gives the logits ``plain`` for ``inputs`` once more, without edits."""
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
