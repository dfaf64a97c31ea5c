"""The models that can answer, by the name in ``base=``."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from typing import Any, Final

from lmms_eval.models import list_available_models
from loguru import logger

from lmms_mtv.errors import ArgumentError, unknown
from lmms_mtv.harness.arguments import Arguments, SplitArguments, field_names, split_arguments, validate
from lmms_mtv.harness.hf_config import HfConfig
from lmms_mtv.harness.lmms.bases import wrapped
from lmms_mtv.harness.lmms.bases.base import Base
from lmms_mtv.harness.lmms.bases.harness_model import HarnessModel, WrappedConfig
from lmms_mtv.harness.lmms.bases.hf import HfBase
from lmms_mtv.harness.lmms.bases.loaded import LoadedBase
from lmms_mtv.harness.lmms.bases.wrapped import WrapperBase
from lmms_mtv.harness.lmms.bases.wrapper_class import wrapper_class
from lmms_mtv.runtime.devices import check_cuda, check_device

__all__ = ["OWN", "Base", "LoadedBase", "build", "check", "known", "load", "names_of", "survey"]

OWN: Final = Arguments.base
"""Name of the base of this package; all other bases are models of lmms-eval."""


def known(name: str, force_simple: bool = False) -> tuple[str, ...]:
    """Return the names of the arguments of the base ``name``.

    Args:
        name: the name of the base.
        force_simple: True takes the simple wrapper of a model that has a chat wrapper too.

    Raises:
        ArgumentError: there is no such base, or the base does not import.
    """
    if name == OWN:
        return field_names(HfConfig)
    others = set(list_available_models(include_aliases=True)) - {"mtv"}
    if name not in others:
        raise unknown("base", name, {OWN, *others})
    return wrapped.known(name, force_simple)


def survey() -> dict[str, str | None]:
    """Return every base with the reason why it cannot be used, or None for a base that imports.

    All model classes of lmms-eval are imported, which takes about a minute. Their output is dropped.
    """
    names = sorted(set(list_available_models()) - {"mtv"})
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        # Handlers of the harness's logger keep their first streams.
        logger.disable("lmms_eval")
        try:
            return {OWN: None} | {name: _obstacle(name) for name in names}
        finally:
            logger.enable("lmms_eval")


def _obstacle(name: str) -> str | None:
    """Return the reason why a model of lmms-eval cannot be a base, or None if it can."""
    try:
        wrapper_class(name)
    except ArgumentError as error:
        return str(error).removeprefix(f"base={name} ")
    return None


def build(name: str, arguments: Mapping[str, Any], decoder: str | None = None) -> Base:
    """Load the base ``name`` and find its sites.

    Args:
        name: the name of the base.
        arguments: the arguments of the base, by name.
        decoder: see :func:`~lmms_mtv.hooks.find_sites`.

    Raises:
        ArgumentError: the base cannot be loaded, or has no torch module to edit.
        DiscoveryError: the heads of the model are not found.
    """
    if name == OWN:
        return HfBase(HfConfig(**arguments), decoder)
    own = {key: arguments[key] for key in wrapped.OWN if key in arguments}
    others = {key: value for key, value in arguments.items() if key not in own}
    return WrapperBase(HarnessModel(WrappedConfig(name, arguments=others, **own), decoder))


def load(model_args: Mapping[str, Any]) -> LoadedBase:
    """Load the base that model arguments describe, and return it. All arguments are checked before a model is loaded.

    Raises:
        ArgumentError: an argument is unknown or wrong, or the base cannot be loaded.
        VectorFileError: ``vector=`` or ``heads=`` names a file that is no vector.
    """
    arguments, names = check(model_args)
    name = arguments.plugin.base
    return LoadedBase(build(name, arguments.base, arguments.plugin.decoder), names, model_args)


def names_of(model_args: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the arguments of the base that model arguments name.

    Raises:
        ArgumentError: there is no such base, or the base does not import.
    """
    return known(model_args.get("base", OWN), bool(model_args.get("force_simple", False)))


def check(model_args: Mapping[str, Any]) -> tuple[SplitArguments, tuple[str, ...]]:
    """Return model arguments by owner, and the names of the arguments of the base. No model is loaded.

    Raises:
        ArgumentError: an argument is unknown or wrong.
        VectorFileError: ``vector=`` or ``heads=`` names a file that is no vector.
    """
    names = names_of(model_args)
    arguments = split_arguments(model_args, names)
    validate(arguments.plugin)
    if arguments.plugin.base == OWN:
        HfConfig(**arguments.base)
        check_device(arguments.base.get("device"))
    else:
        check_cuda(arguments.base.get("device"))
    return arguments, names
