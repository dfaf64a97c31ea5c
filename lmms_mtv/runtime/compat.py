"""The names of a forward's arguments and outputs, taken from the model that runs.

transformers 5.24 renamed the cache of a forward from ``past_key_values`` to ``cache``. Code outside transformers, such
as remote code on the hub, may keep the old name. No other file of this package spells either name, and no file checks
the version of transformers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import torch
from torch import nn

CACHE_NAMES: Final = ("cache", "past_key_values")
"""Names of the cache, in the arguments of a forward and in its output. The newest name is first."""

PER_CALL: Final = frozenset(
    (*CACHE_NAMES, "cache_position", "use_cache", "logits_to_keep", "num_logits_to_keep", "labels", "return_dict")
)
"""Arguments that belong to one forward only. Another forward of the same prompt gets other values."""


Naming = Callable[[tuple[Any, ...], Mapping[str, Any]], dict[str, Any]]
"""Function that returns the positional and the keyword arguments of one call as one mapping by name."""


def naming(module: nn.Module) -> Naming:
    """Return a function that names all arguments of a call of ``module.forward``, positional arguments included."""
    names = tuple(inspect.signature(module.forward).parameters)
    return lambda args, kwargs: dict(zip(names, args, strict=False)) | dict(kwargs)


def cache_name(module: nn.Module) -> str:
    """Return the name under which ``module.forward`` takes a cache.

    A forward that names no cache, such as ``forward(*args, **kwargs)``, passes its arguments on to a module inside
    ``module``. Then the first module inside that names a cache counts. If no module names a cache, the oldest name is
    returned, which newer versions of the libraries accept too.
    """
    for each in module.modules():
        taken = inspect.signature(each.forward).parameters
        for name in CACHE_NAMES:
            if name in taken:
                return name
    return CACHE_NAMES[-1]


def is_cache(value: object) -> bool:
    """Return whether ``value`` is a cache object of transformers."""
    return hasattr(value, "get_seq_length")


def given_cache(given: Mapping[str, Any]) -> Any | None:
    """Return the cache among the named arguments of a forward, under any name, or None."""
    named = (given[name] for name in CACHE_NAMES if given.get(name) is not None)
    return next(named, next(filter(is_cache, given.values()), None))


def returned_cache(output: Any) -> Any | None:
    """Return the cache in the output of a forward, or None."""
    # An output of transformers is a mapping. A plain dict of the output gives no warning about the older name.
    return given_cache(dict(output) if isinstance(output, Mapping) else getattr(output, "__dict__", {}))


def of_the_prompt(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the named arguments of a forward without None, caches and the arguments of :data:`PER_CALL`."""
    return {
        name: value
        for name, value in given.items()
        if value is not None and name not in PER_CALL and not is_cache(value)
    }


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside a wrapper that runs the model without calling the wrapper as a module.

    Such wrappers are PEFT models whose adapters are layers (LoRA and similar methods): ``generate`` calls the model
    inside the wrapper. The adapters are part of the model inside. A model with prompt tuning, which adds tokens, stays
    wrapped.
    """
    inner = getattr(model, "get_base_model", None)
    configs = getattr(model, "peft_config", None)
    if callable(inner) and isinstance(configs, Mapping):
        if any(getattr(config, "is_prompt_learning", False) for config in configs.values()):
            return model
        base: nn.Module = inner()
        return base
    return model


@contextmanager
def uncompiled(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Run ``modules`` without ``torch.compile`` inside the block: compiled code ignores hooks that are added later."""
    with ExitStack() as stack:
        for module in modules:
            if (compiled := getattr(module, "_compiled_call_impl", None)) is not None:
                module._compiled_call_impl = None
                stack.callback(setattr, module, "_compiled_call_impl", compiled)
            if hasattr(module, "_orig_mod"):
                stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield
