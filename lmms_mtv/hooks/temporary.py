"""Hooks for the length of a block: of one thread, on one model, and on no copy of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


class Temporary:
    """A hook that acts in the thread that made it, and that a copy of its module does not have.

    PyTorch keeps hooks on the module, where every thread meets them and where ``copy.deepcopy`` takes them along. Other
    threads of Python see the module without the hook. Threads of autograd, which may run a forward again for its
    gradients, see it with the hook.
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
    """Call ``function`` before every forward of ``module`` inside the block."""
    handle = module.register_forward_pre_hook(Temporary(function), with_kwargs=with_kwargs)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def after(module: nn.Module, function: Callable[..., Any], *, always_call: bool = False) -> Iterator[None]:
    """Call ``function`` after every forward of ``module`` inside the block; ``always_call`` also if it raised."""
    handle = module.register_forward_hook(Temporary(function), always_call=always_call)
    try:
        yield
    finally:
        handle.remove()


def _inert(*_: Any, **__: Any) -> None:
    return None


def _of_autograd() -> bool:
    """Return whether this thread was not made by Python, as those of autograd are."""
    return isinstance(threading.current_thread(), threading._DummyThread)
