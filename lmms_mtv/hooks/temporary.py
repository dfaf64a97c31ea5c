"""Hooks for the length of a block. They act in one thread, on one model, and on no copy of the model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


class Temporary:
    """A hook that acts in the thread that made the hook, and that does nothing in a copy of its module.

    PyTorch keeps hooks on the module. There every thread runs them, and ``copy.deepcopy`` copies them. Other threads of
    Python run the module without the effect of this hook. Threads of autograd, which may run a forward again for its
    gradients, run the module with the hook.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._thread = threading.get_ident()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != self._thread and not _of_autograd():
            return None
        return self._function(*args, **kwargs)

    def __deepcopy__(self, _: object) -> Callable[..., None]:
        return _inert


@contextmanager
def before(module: nn.Module, function: Callable[..., Any], *, with_kwargs: bool = True) -> Iterator[None]:
    """Call a function before every forward of a module inside the block.

    Args:
        module: the module.
        function: a forward pre-hook of torch.
        with_kwargs: True if the function takes the keyword arguments of the forward too.
    """
    handle = module.register_forward_pre_hook(Temporary(function), with_kwargs=with_kwargs)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def after(module: nn.Module, function: Callable[..., Any], *, always_call: bool = False) -> Iterator[None]:
    """Call a function after every forward of a module inside the block.

    Args:
        module: the module.
        function: a forward hook of torch.
        always_call: True to call the function also if the forward raised.
    """
    handle = module.register_forward_hook(Temporary(function), always_call=always_call)
    try:
        yield
    finally:
        handle.remove()


def _inert(*_: Any, **__: Any) -> None:
    return None


def _of_autograd() -> bool:
    """Return whether Python did not start this thread, as with the threads of autograd."""
    return isinstance(threading.current_thread(), threading._DummyThread)
