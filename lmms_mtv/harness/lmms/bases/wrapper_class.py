"""The wrapper class of a model of lmms-eval: the search for the class, and its arguments."""

from __future__ import annotations

import dis
import importlib.util
import inspect
from typing import Final

from lmms_eval.api.model import lmms
from lmms_eval.models import MODEL_REGISTRY_V2
from torch import nn

from lmms_mtv.errors import ArgumentError
from lmms_mtv.models.text import one_line

EXTRA: Final = {"decord": "decord", "qwen_vl_utils": "qwen-vl-utils"}
"""Modules, and the packages of ``lmms-mtv[bases]`` that have them."""

_MODEL_ATTRIBUTES: Final = ("model", "_model")


def wrapper_class(name: str, force_simple: bool = False) -> type[lmms]:
    """Return the wrapper class of lmms-eval's model ``name``.

    Args:
        name: the name of the model.
        force_simple: True takes the simple wrapper of a model that has a chat wrapper too.

    Raises:
        ArgumentError: the class does not import (the message has the missing package), or never has a model in this
            process, like the classes of servers and APIs.
    """
    try:
        wrapper: type[lmms] = MODEL_REGISTRY_V2.get_model_class(name, force_simple=force_simple)
    except ImportError as error:
        missing = (error.name or "").split(".")[0]
        mend = ""
        if missing in EXTRA:
            mend = (
                f": install {EXTRA[missing]}, or what lmms-eval's models often need, with pip install lmms-mtv[bases]"
            )
        elif isinstance(error, ModuleNotFoundError) and missing:
            installed = importlib.util.find_spec(missing) is not None
            mend = f": the installed {missing} lacks it" if installed else f": install the package that has {missing}"
        raise ArgumentError(f"base={name} does not import: {one_line(error)}{mend}") from error
    except Exception as error:
        raise ArgumentError(f"base={name} does not import: {type(error).__name__}: {one_line(error)}") from error
    if not _sets_a_model(wrapper):
        raise _no_module(name)
    return wrapper


def parameters(wrapper: type[lmms]) -> dict[str, inspect.Parameter]:
    """Return the keyword arguments of a wrapper, with arguments that its ``**kwargs`` pass to its parent classes."""
    known: dict[str, inspect.Parameter] = {}
    for parent in wrapper.__mro__:
        if "__init__" not in vars(parent):
            continue
        own = list(inspect.signature(parent.__init__).parameters.values())[1:]  # type: ignore[misc]
        named = (one for one in own if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL))
        known = {one.name: one for one in named} | known
        if not any(one.kind is one.VAR_KEYWORD for one in own):
            break
    return known


def module_of(wrapper: lmms, name: str) -> nn.Module:
    """Return the torch module of a constructed wrapper.

    Args:
        wrapper: the wrapper.
        name: the name of the base, for the error message.

    Raises:
        ArgumentError: the wrapper has no torch module.
    """
    for attribute in _MODEL_ATTRIBUTES:
        module = getattr(wrapper, attribute, None)
        if isinstance(module, nn.Module):
            return module
    raise _no_module(name)


def _sets_a_model(wrapper: type[lmms]) -> bool:
    """Return whether the code of a class sets an attribute ``model`` or ``_model``."""
    for parent in wrapper.__mro__[: wrapper.__mro__.index(lmms)]:
        if isinstance(vars(parent).get("model"), property):
            return True
        code = getattr(vars(parent).get("__init__"), "__code__", None)
        if code is not None and any(
            step.opname == "STORE_ATTR" and step.argval in _MODEL_ATTRIBUTES for step in dis.get_instructions(code)
        ):
            return True
    return False


def _no_module(name: str) -> ArgumentError:
    return ArgumentError(
        f"base={name} has no torch module in this process, so that its heads cannot be edited: an API, a server or an "
        "engine of its own runs it. Use base=hf, or a model of lmms-eval that runs in transformers"
    )
