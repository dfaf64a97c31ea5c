"""The models that can do the work, by the name given as ``base=``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmms_eval.models import list_available_models
from torch import nn

from lmms_mtv.errors import ArgumentError, unknown
from lmms_mtv.harness.hf import Hf, HfConfig

CONFIGS: Mapping[str, type[Any]] = {"hf": HfConfig}


def config(name: str) -> type[Any]:
    """The configuration class of the base ``name``. Raises :class:`ArgumentError` if there is no such base."""
    if name in CONFIGS:
        return CONFIGS[name]
    others = set(list_available_models(include_aliases=True)) - {"mtv"}
    if name in others:
        raise ArgumentError(
            f"base={name} is a model of lmms-eval whose torch module this version does not reach, so that its heads "
            f"cannot be edited: use one of {', '.join(CONFIGS)}"
        )
    raise unknown("base", name, CONFIGS)


def build(name: str, arguments: Mapping[str, Any]) -> Hf:
    """The base ``name``, loaded. Raises :class:`ArgumentError` if it has no torch module to edit."""
    base = Hf(config(name)(**arguments))
    if not isinstance(getattr(base, "model", None), nn.Module):
        raise ArgumentError(f"base={name} has no torch module, so that its heads cannot be edited: use base=hf")
    return base
