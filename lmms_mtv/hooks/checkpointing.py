"""Gradient checkpointing: the backward pass computes activations again, and the forward does not keep them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from lmms_mtv.errors import HookError
from lmms_mtv.hooks.sites import Sites

_SWITCH = "gradient_checkpointing"


@contextmanager
def checkpointed(sites: Sites) -> Iterator[None]:
    """Checkpoint the blocks of the sites: a forward keeps only the blocks' inputs, a backward pass runs blocks again.

    The switch for checkpointing that transformers gives to blocks is turned on. transformers reads the switch in
    training mode only. Therefore the blocks are set to training mode. The modules inside the blocks are not, so that no
    dropout begins. Hooks of the forward have to be registered in the backward pass too.

    Args:
        sites: the attention sites of the model.

    Raises:
        HookError: a block has no such switch, or the code of the block itself may use dropout.
    """
    blocks = [site.block for site in sites]
    for name, block in blocks:
        if not hasattr(block, _SWITCH):
            raise HookError(f"{name} ({type(block).__name__}) cannot be checkpointed: leave out checkpointing=True")
        if dropout := _dropout(block):
            raise HookError(
                f"{name} has dropout of its own ({dropout}), which would begin: leave out checkpointing=True"
            )
    with ExitStack() as stack:
        for _, block in blocks:
            again = partial(checkpoint, use_reentrant=False)
            for attribute, value in ((_SWITCH, True), ("_gradient_checkpointing_func", again), ("training", True)):
                stack.enter_context(_set(block, attribute, value))
        yield


def _dropout(block: nn.Module) -> str | None:
    """Return the name of a probability of dropout that the block's own code may use."""
    attributes = vars(block).items()
    return next((name for name, value in attributes if "drop" in name and isinstance(value, float) and value > 0), None)


@contextmanager
def _set(block: nn.Module, attribute: str, value: Any) -> Iterator[None]:
    """Set an attribute of a module inside the block, and restore it afterwards."""
    was_set = attribute in vars(block)
    before = getattr(block, attribute, None)
    setattr(block, attribute, value)
    try:
        yield
    finally:
        if was_set:
            setattr(block, attribute, before)
        else:
            delattr(block, attribute)
