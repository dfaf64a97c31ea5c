"""Hook points of the streams of a block: heads, self-attention, MLP, and the hidden state after the block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lmms_mtv.errors import DiscoveryError, HookError
from lmms_mtv.hooks.sites import CROSS, Site, Sites
from lmms_mtv.hooks.temporary import after, before
from lmms_mtv.vectors import ATTENTION, HEADS, MLP, RESIDUAL

Change = Callable[[Tensor], Tensor | None]
"""Function of a stream [rows, tokens, heads * size] that returns its replacement, or None for no change."""


class HookPoint(NamedTuple):
    """The module at which the stream of one block is read and changed.

    Attributes:
        name: dotted name of the module.
        module: the module.
        enters: True if the stream is the input of the module. Otherwise the stream is the output of the module, or the
            first of several outputs.
        heads: number of heads; 1 for streams other than the heads.
        size: size of a head; the width of the model for streams other than the heads.
    """

    name: str
    module: nn.Module
    enters: bool
    heads: int
    size: int


def hook_points(sites: Sites, stream: str) -> tuple[HookPoint, ...]:
    """Return the hook points of a stream, one for each site.

    Args:
        sites: the attention sites of the model.
        stream: one of :data:`STREAMS`.

    Raises:
        DiscoveryError: a block has no single module for the stream, blocks share the module, or the width of the model
            is unknown.
    """
    if stream == HEADS:
        return tuple(HookPoint(site.name, site.module, True, site.heads, site.head_dim) for site in sites)
    modules = [{ATTENTION: _attention, MLP: _mlp, RESIDUAL: _block}[stream](site) for site in sites]
    points = tuple(HookPoint(name, module, False, 1, sites.width) for name, module in modules)
    if len({id(point.module) for point in points}) < len(points):
        raise DiscoveryError(
            f"blocks share the module of their {stream} ({points[0].name}, ...), whose runs cannot be told apart: "
            "choose a method that edits another stream"
        )
    return points


def shape(sites: Sites, stream: str) -> tuple[int, int, int]:
    """Return layers, heads and head size of a stream: (L, 1, width of the model) for all streams but the heads."""
    return sites.shape if stream == HEADS else (len(sites), 1, sites.width)


def _attention(site: Site) -> tuple[str, nn.Module]:
    return site.attention


def _block(site: Site) -> tuple[str, nn.Module]:
    return site.block


def _mlp(site: Site) -> tuple[str, nn.Module]:
    """Return the only child of a block, except attention, that has matrices. Norms have no matrices."""
    around, block = site.block
    candidates = [
        (f"{around}.{name}", child)
        for name, child in block.named_children()
        if _has_matrix(child) and not CROSS.search(name) and site.attention[1] not in child.modules()
    ]
    if len(candidates) != 1:
        listed = ", ".join(name for name, _ in candidates) or "none"
        raise DiscoveryError(
            f"{around} has no single module that is its MLP (candidates: {listed}): choose a method that edits another "
            "stream"
        )
    return candidates[0]


def _has_matrix(module: nn.Module) -> bool:
    return any(tensor.dim() > 1 for tensors in (module.parameters(), module.buffers()) for tensor in tensors)


@contextmanager
def changed_at(point: HookPoint, change: Change) -> Iterator[None]:
    """Call ``change`` with each tensor that runs through ``point`` inside the block.

    Args:
        point: the hook point of a stream.
        change: function of the stream that returns its replacement, or None for no change.

    Raises:
        HookError: inside a forward, if the output of the module is no tensor [rows, tokens, size].
    """

    def entering(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        changed = change(args[0])
        return None if changed is None else (changed, *args[1:])

    def leaving(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        first, *others = output if isinstance(output, tuple) else (output,)
        if not isinstance(first, Tensor) or first.dim() != 3 or first.shape[-1] != point.size:
            actual = tuple(first.shape) if isinstance(first, Tensor) else type(first).__name__
            raise HookError(
                f"{point.name} gave {actual}, expected a tensor of [rows, tokens, {point.size}]: choose a method that "
                "edits another stream"
            )
        changed = change(first)
        if changed is None:
            return None
        return (changed, *others) if isinstance(output, tuple) else changed

    hook = before(point.module, entering, with_kwargs=False) if point.enters else after(point.module, leaving)
    with hook:
        yield


@contextmanager
def receivers(sites: Sites) -> Iterator[list[list[nn.Module]]]:
    """Find the modules of each block that receive the output of attention before its addition to the hidden state.

    Gemma 2 and 3 have a norm there. Most models have no such module.

    Args:
        sites: the attention sites of the model.

    Yields:
        For each site a list of modules, in the order in which the modules run. The lists are filled when the model
        runs inside the block.
    """
    norms: list[list[nn.Module]] = [[] for _ in sites]
    with ExitStack() as stack:
        for modules, site in zip(norms, sites, strict=True):
            attention_output: list[Tensor] = []

            def leaving(_: nn.Module, __: Any, output: Any, attention_output: list[Tensor] = attention_output) -> None:
                attention_output[:] = [output[0] if isinstance(output, tuple) else output]

            def entering(
                module: nn.Module,
                args: tuple[Any, ...],
                attention_output: list[Tensor] = attention_output,
                modules: list[nn.Module] = modules,
            ) -> None:
                same = (
                    bool(args and attention_output)
                    and isinstance(args[0], Tensor)
                    and _is_same(args[0], attention_output[0])
                )
                if same and all(module is not other for other in modules):
                    modules.append(module)

            stack.enter_context(after(site.attention[1], leaving))
            for child in site.block[1].children():
                if site.attention[1] not in child.modules():
                    stack.enter_context(before(child, entering, with_kwargs=False))
        yield norms


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape


@torch.no_grad()
def attention_outputs(
    sites: Sites, heads: Tensor, among: Tensor | None = None, norms: Sequence[Sequence[nn.Module]] = ()
) -> Tensor:
    """Return the terms that heads add to the hidden state, float32 [L, 1, width] on the CPU.

    Without ``norms`` a term is the projection of the heads without the bias. With ``norms`` a term is the norm of all
    heads minus the norm of all heads except the given heads. The model's own modules compute the terms, with any layout
    and weights.

    Args:
        sites: the attention sites of the model.
        heads: values of the given heads, [L, H, D], 0 for all other heads.
        among: values of all heads, [L, H, D], which only ``norms`` need; ``heads`` by default.
        norms: the modules of each site that :func:`receivers` found.
    """
    parameter = next(tensor for tensor in sites.model.parameters() if tensor.is_floating_point())
    rows = []
    among = heads if among is None else among
    for site, own, every, modules in zip(sites, heads, among, norms or [()] * len(sites), strict=True):
        device = next((tensor.device for tensor in site.module.parameters()), parameter.device)
        if device.type == "meta":
            # The weights are offloaded. When the module runs, its weights and its input move to the device of the run.
            device = torch.device("cpu")
        whole, rest = (every, every - own) if modules else (own, torch.zeros_like(own))
        both = site.module(torch.stack([whole, rest]).flatten(1).to(device, parameter.dtype).unsqueeze(1))
        for module in modules:
            both = module(both)
        rows.append((both[0] - both[1]).float().cpu())
    return torch.stack(rows)
