"""The model arguments of ``mtv`` in lm-eval: arguments of the plugin, of the method, and of lm-eval's model ``hf``."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Final

from lm_eval.models.huggingface import HFLM

from lmms_mtv.errors import ArgumentError
from lmms_mtv.harness.arguments import Arguments, SplitArguments, field_names, split_arguments

_ELSEWHERE: Final = {
    "shots": "demonstrations in the prompts are the harness's own here: pass --num_fewshot",
    "wrong": "lm-eval writes the demonstrations of its prompts itself: leave it out",
    "base": "the base is lm-eval's model hf: leave it out",
}
_PLUGIN: Final = tuple(name for name in field_names(Arguments) if name not in _ELSEWHERE)
# HFLM passes unknown arguments to from_pretrained; these arguments are in use.
_LOADING: Final = (
    "attn_implementation",
    "device_map",
    "load_in_4bit",
    "load_in_8bit",
    "bnb_4bit_compute_dtype",
    "bnb_4bit_quant_type",
)
BASE: Final = (
    *(name for name, p in inspect.signature(HFLM).parameters.items() if p.kind is not inspect.Parameter.VAR_KEYWORD),
    *_LOADING,
)
"""Names of the arguments of lm-eval's model ``hf``."""


def split_lm_eval_arguments(model_args: Mapping[str, Any]) -> SplitArguments:
    """Return model arguments by owner; see :func:`~lmms_mtv.harness.arguments.split_arguments`.

    Raises:
        ArgumentError: an argument is unknown or belongs to lm-eval, or there is no model.
    """
    refuse_foreign(model_args)
    parts = split_arguments(model_args, BASE, _PLUGIN)
    if "pretrained" not in model_args:
        raise ArgumentError("pretrained= is missing: give the name of a model on the hub, or a folder")
    return parts


def refuse_foreign(model_args: Mapping[str, Any]) -> None:
    """Refuse the arguments of ``mtv`` that are not arguments in lm-eval.

    Raises:
        ArgumentError: there is one; the message says what to do instead.
    """
    for name, instead in _ELSEWHERE.items():
        if name in model_args:
            raise ArgumentError(f"{name}={model_args[name]} is no argument of mtv in lm-eval; {instead}")
