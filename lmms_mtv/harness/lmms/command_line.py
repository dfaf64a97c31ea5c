"""The model arguments of lmms-eval's command line, checked before the harness reads its task files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from lmms_eval.utils import simple_parse_args_string

from lmms_mtv.harness.arguments import with_text_restored
from lmms_mtv.harness.lmms import bases, caller
from lmms_mtv.harness.lmms.failure import fail_with_status

_FLAGS: Final = ("batch_size", "max_batch_size", "device")
"""Flags of the command line that lmms-eval passes to a model besides ``--model_args``."""


def parsed(arg_string: str, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the model arguments that the command line describes.

    Args:
        arg_string: the model arguments, ``name=value,name=value``.
        flags: further model arguments, None for a flag that was not passed; ``arg_string`` wins.
    """
    passed = {name: value for name, value in flags.items() if value is not None}
    return passed | with_text_restored(simple_parse_args_string(arg_string), arg_string)


@fail_with_status
def check_evaluation() -> None:
    """Check the model arguments of the evaluation that the command line has begun, if it has begun one.

    Raises:
        ArgumentError: an argument is unknown or wrong.
    """
    options = caller.options()
    if isinstance(arg_string := getattr(options, "model_args", None), str):
        bases.check(parsed(arg_string, {name: getattr(options, name, None) for name in _FLAGS}))
