"""Arguments of ``lmms-mtv fit`` that the command refuses before it loads anything."""

from __future__ import annotations

import pytest

from lmms_mtv import cli


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--model_args", "pretrained=tiny,seed=3"), "--model_args has seed=: pass --seeds"),
        (("--model_args", "pretrained=tiny,batch_size=3"), "--model_args has batch_size=: pass --batch_size"),
        (("--model_args", "pretrained=tiny", "--seeds", "1", "1"), "--seeds 1 1: expected different integers"),
    ],
)
def test_arguments_that_the_command_has_flags_for(flags, told):
    with pytest.raises(SystemExit, match=told):
        cli.main(["fit", "--tasks", "shapes_color_en", *flags])
