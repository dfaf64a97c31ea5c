"""The models that can do the work, by the name given as ``base=``."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from typing import Any

from lmms_eval.models import list_available_models
from loguru import logger

from lmms_mtv.errors import ArgumentError, unknown
from lmms_mtv.harness.arguments import names
from lmms_mtv.harness.lmms.bases import wrapped
from lmms_mtv.harness.lmms.bases.hf import HfBase, HfConfig
from lmms_mtv.harness.lmms.bases.wrapped import WrappedConfig, WrapperBase
from lmms_mtv.hooks import Sites, find_sites

OWN = "hf"
"""The base of this package; all others are models of lmms-eval."""


def known(name: str, force_simple: bool = False) -> tuple[str, ...]:
    """Return the arguments of the base ``name``.

    Raises :class:`ArgumentError` if there is none, or if it does not import.
    """
    if name == OWN:
        return names(HfConfig)
    others = set(list_available_models(include_aliases=True)) - {"mtv"}
    if name not in others:
        raise unknown("base", name, {OWN, *others})
    return wrapped.known(name, force_simple)


def survey() -> dict[str, str | None]:
    """Return every base with the reason why it cannot be used, or None for a base that imports.

    All model classes of lmms-eval are imported, which takes about a minute. What they print meanwhile is dropped.
    """
    names = sorted(set(list_available_models()) - {"mtv"})
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        # Handlers of the harness's logger keep the streams that they were made with.
        logger.disable("lmms_eval")
        try:
            return {OWN: None} | {name: _lack(name) for name in names}
        finally:
            logger.enable("lmms_eval")


def _lack(name: str) -> str | None:
    """Why a model of lmms-eval cannot be a base; None if it can."""
    try:
        wrapped.wrapper_class(name)
    except ArgumentError as error:
        return str(error).removeprefix(f"base={name} ")
    return None


def build(name: str, arguments: Mapping[str, Any], decoder: str | None = None) -> tuple[HfBase | WrapperBase, Sites]:
    """Return the base ``name``, loaded, and where its heads are; ``decoder`` as in :func:`~lmms_mtv.hooks.find_sites`.

    Raises :class:`ArgumentError` if it cannot be loaded or has no torch module to edit.
    """
    if name == OWN:
        base = HfBase(HfConfig(**arguments))
        return base, find_sites(base.model, decoder)
    own = {key: arguments[key] for key in wrapped.OWN if key in arguments}
    others = {key: value for key, value in arguments.items() if key not in own}
    wrapping = WrapperBase(WrappedConfig(name, arguments=others, **own), decoder)
    return wrapping, wrapping.sites
