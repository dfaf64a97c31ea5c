"""Reading and changing the heads of a running model, through hooks that leave nothing behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lmms_mtv.errors import DiscoveryError, GeometryError, HookError, NumericsError
from lmms_mtv.hooks.positions import Positions
from lmms_mtv.hooks.sites import Site, Sites, find_sites
from lmms_mtv.vector import HEADS, Edit, TaskVector

Hook = Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...] | None]


class Recording:
    """Activations of the last real token of each row, of the forwards since the recording began."""

    def __init__(self, sites: Sites, prompts_only: bool = False) -> None:
        self._sites = sites
        self._prompts_only = prompts_only
        self._seen: list[list[Tensor]] = [[] for _ in sites]

    def last(self) -> Tensor:
        """float32 [rows, layers, heads, head_dim], on the device of the first site; rows of later forwards follow.

        Raises :class:`HookError` if nothing ran, :class:`NumericsError`, with the site's name, on NaN or infinity.
        """
        if not all(self._seen):
            silent = [site.name for site, seen in zip(self._sites, self._seen, strict=True) if not seen]
            raise HookError(f"nothing was recorded at {', '.join(silent)}: run the model inside the block")
        first = self._seen[0][0].device
        layers = [torch.cat(seen).to(first) for seen in self._seen]
        for site, layer in zip(self._sites, layers, strict=True):
            if not layer.isfinite().all():
                raise NumericsError(
                    f"NaN or infinity in the activations of {site.name}: load the model in float32 or bfloat16 (dtype=)"
                )
        return torch.stack(layers, 1)

    def _hook(self, index: int, site: Site, positions: Positions) -> Hook:
        def keep(_: nn.Module, args: tuple[Any, ...]) -> None:
            if self._prompts_only and positions.continues:
                return
            rows = args[0][positions.of(args[0])]
            self._seen[index].append(rows.detach().float().unflatten(-1, (site.heads, site.head_dim)))

        return keep


@contextmanager
def record(sites: Sites, *, prompts_only: bool = False) -> Iterator[Recording]:
    """Record, without changing anything, what the heads compute inside the block.

    ``prompts_only`` leaves out the forwards over tokens that a generation adds to a prompt.
    """
    recording, positions = Recording(sites, prompts_only), Positions()
    hooks = [(site.module, recording._hook(i, site, positions)) for i, site in enumerate(sites)]
    with ExitStack() as stack:
        stack.enter_context(positions.watching(sites.decoder, sites.model))
        for module, hook in hooks:
            stack.callback(module.register_forward_pre_hook(hook).remove)
        yield recording


class Fired:
    """How often the edit ran."""

    def __init__(self, sites: int) -> None:
        self.by_site = [0] * sites

    @property
    def count(self) -> int:
        """Number of forwards that were edited at every site; 0 for a vector without edits."""
        return min(self.by_site, default=0)


@contextmanager
def applied(
    target: nn.Module | Sites, vector: TaskVector | Edit, *, tail: int | Tensor = 1, real: Tensor | None = None
) -> Iterator[Fired]:
    """Edit every forward inside the block at the last real position of each row.

    ``target`` is a model, or its sites. A forward over a prompt is edited at the prompt's last token, each further
    forward at the token it generates. ``tail`` edits that many last real positions instead of one: a number, or an
    integer tensor with one for each row. An edit with a leading dimension K needs batches of K rows. ``real`` [rows,
    tokens], 1 for a real token, is for one padded forward that is not given an attention mask.

    Out of place: the activations that other modules hold are not touched. All is checked before anything is
    registered, and no hook is left after the block, also when it raises.

    Raises :class:`GeometryError` if the vector does not fit the sites.
    """
    sites = target if isinstance(target, Sites) else find_sites(target)
    if isinstance(vector, TaskVector):
        vector.check(sites.geometry)
        if other := sorted(vector.edits.keys() - {HEADS}):
            raise GeometryError(f"vector {vector.id} has edits of {', '.join(other)}: this version edits {HEADS!r}")
    edit = vector.edits.get(HEADS) if isinstance(vector, TaskVector) else vector
    if edit is None:
        yield Fired(0)
        return
    if edit.shape != sites.shape:
        raise GeometryError(f"an edit of (layers, heads, size) {edit.shape} does not fit the model's {sites.shape}")
    fired, positions = Fired(len(sites)), Positions(tail, real)
    hooks = [(site.module, _editing(edit, index, positions, fired)) for index, site in enumerate(sites)]
    with ExitStack() as stack:
        stack.enter_context(positions.watching(sites.decoder, sites.model))
        for module, hook in hooks:
            stack.callback(module.register_forward_pre_hook(hook).remove)
        yield fired


def _editing(edit: Edit, index: int, positions: Positions, fired: Fired) -> Hook:
    """The hook of one site: ``keep * x + shift`` over all heads at once, with ``shift = gain * value``."""
    size = edit.value.shape[-1]
    gain, value = edit.gain[..., index, :, None], edit.value[..., index, :, :]
    shift = (gain * value).flatten(-2)
    keep = edit.keep[..., index, :].repeat_interleave(size, -1)
    ready: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def prepared(like: Tensor) -> tuple[Tensor, Tensor]:
        key = (like.device, like.dtype)
        if key not in ready:
            ready[key] = keep.to(*key), shift.to(*key)
        return ready[key]

    def change(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        if edit.batch not in (None, x.shape[0]):
            raise HookError(f"an edit of {edit.batch} rows met a batch of {x.shape[0]} rows")
        keeps, shifts = prepared(x)
        if x.shape[1] == 1:
            row = torch.arange(x.shape[0], device=x.device)
            edited = _mixed(x[:, 0], row, keeps, shifts).unsqueeze(1)
        else:
            row, column = positions.of(x)
            edited = x.clone()
            edited[row, column] = _mixed(x[row, column], row, keeps, shifts)
        fired.by_site[index] += 1
        return (edited, *args[1:])

    return change


def _mixed(x: Tensor, row: Tensor, keep: Tensor, shift: Tensor) -> Tensor:
    """``keep * x + shift`` for picked positions ``x`` [N, heads * size], whose batch rows are ``row`` [N]."""
    return torch.addcmul(
        shift if shift.dim() == 1 else shift[row],
        x,
        keep if keep.dim() == 1 else keep[row],
    )


@torch.no_grad()
def verify(model: nn.Module, sites: Sites, inputs: Mapping[str, Any]) -> None:
    """Make sure that ``sites`` are where ``model`` computes its heads.

    Replacing every head by its own activation must change no logit at all, and setting all heads to zero must change
    some; every site must run exactly once a forward.

    Raises :class:`DiscoveryError` if not: pass ``decoder=`` to :func:`find_sites`.
    """
    with record(sites) as recording:
        plain = model(**inputs).logits
    own = recording.last()
    rows = plain.shape[0]
    if own.shape[0] != rows:
        raise DiscoveryError(
            f"the sites ran {own.shape[0] / rows:g} times in one forward, expected once: pass decoder= with the module "
            "that holds the language decoder's blocks"
        )
    everywhere = torch.ones(own.shape[1:3], device=own.device)
    with applied(sites, Edit(own, 1 - everywhere, everywhere)):
        same = model(**inputs).logits
    with applied(sites, Edit.replace(torch.zeros_like(own[0]), everywhere)):
        other = model(**inputs).logits
    if not torch.equal(plain, same):
        gap = (plain - same).abs().max().item()
        raise DiscoveryError(
            f"replacing heads by their own activations changed the logits by {gap:g}, expected 0: the sites "
            f"({sites[0].name}, ...) are not what the model computes with; pass decoder="
        )
    if torch.equal(plain, other):
        raise DiscoveryError(
            f"setting all heads to zero changed no logit: the sites ({sites[0].name}, ...) are not on the way to the "
            "output; pass decoder="
        )
