"""Arguments of the arms of a comparison, and errors that show before a harness or a model is loaded."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from lmms_mtv import cli
from lmms_mtv.errors import ArgumentError
from lmms_mtv.harness import arms
from lmms_mtv.harness.arguments import Arguments, field_names
from lmms_mtv.harness.hf_config import HfConfig

BASE = field_names(HfConfig)
ARMS = {
    "zero-shot": {"method": "none"},
    "MTV": {"method": "mtv", "steps": 3},
    "default": {},
    "ICV": {"method": "icv"},
    "a vector": {"vector": "0123"},
}


class TestSettingsForAllArms:
    def test_they_apply_where_the_method_has_them(self):
        found = arms.arm_arguments({"pretrained": "tiny", "shots": 2, "steps": 9, "lr": 0.5}, ARMS, BASE)
        assert found.shared == {"pretrained": "tiny", "shots": 2}
        assert found.arms == {
            "zero-shot": {"method": "none"},
            "MTV": {"method": "mtv", "steps": 3, "lr": 0.5},
            "default": {"steps": 9, "lr": 0.5},
            "ICV": {"method": "icv"},
            "a vector": {"vector": "0123"},
        }
        assert found.left_out == {name: ["zero-shot", "ICV", "a vector"] for name in ("steps", "lr")}

    def test_a_method_for_all_arms_is_for_those_that_name_none(self):
        found = arms.arm_arguments({"method": "icv", "heads": "0123"}, {"a": {}, "b": {"method": "mtv"}}, BASE)
        assert found.arms == {"a": {"method": "icv"}, "b": {"method": "mtv", "heads": "0123"}}
        assert found.left_out == {"heads": ["a"]}

    @pytest.mark.parametrize(
        ("common", "own", "told"),
        [
            ({"stepps": 9}, {}, r"^unknown model argument 'stepps'\. Did you mean 'steps'\? .* of any arm \(a, MTV\)"),
            ({"steps": "many"}, {"method": "none"}, r"^arm 'MTV': steps='many' of method mtv: expected int"),
            ({}, {"stepps": 9}, r"^arm 'a': unknown model argument 'stepps'\. Did you mean 'steps'\?"),
            ({}, {"method": "mtvv"}, r"^arm 'a': unknown method 'mtvv'\. Did you mean 'mtv'\?"),
            ({}, {"dtype": "float16"}, r"^arm 'a': dtype: one model is loaded for all arms"),
            ({"optimizer": "gradient"}, {}, r"^arm 'a': method mtv has no setting optimizer= any more"),
        ],
    )
    def test_an_error_names_the_arm(self, common, own, told):
        with pytest.raises(ArgumentError, match=told):
            arms.arm_arguments(common, {"a": own, "MTV": {"method": "mtv"}}, BASE)


class TestDevices:
    def test_a_gpu_that_is_not_there(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        for device in ("cuda", "cuda:1"):
            with pytest.raises(ArgumentError, match=f"^device={device}: torch .*: pass device=cpu"):
                arms.check_early({"pretrained": "tiny", "device": device}, {})
        arms.check_early({"pretrained": "tiny", "device": "cpu"}, {})

    def test_a_gpu_of_a_number_that_is_not_there(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        arms.check_early({"device": "cuda:1"}, {})
        with pytest.raises(ArgumentError, match="this machine has 2 GPUs"):
            arms.check_early({"device": "cuda:2"}, {})

    def test_a_device_that_torch_does_not_know(self):
        with pytest.raises(ArgumentError, match="device=gpu is no device of torch"):
            arms.check_early({"device": "gpu"}, {})


@pytest.mark.parametrize("seed", [-1, 0.5, "a"])
def test_a_seed_is_an_integer_of_0_or_more(seed):
    with pytest.raises(ArgumentError, match=rf"seed={seed!r}, expected an integer, 0 or more"):
        Arguments(seed=seed)


@pytest.mark.parametrize("name", ["seed", "shots"])
def test_a_negative_number_is_told_as_it_was_written(name):
    """A harness makes the number -1.0 of the text -1."""
    with pytest.raises(ArgumentError, match=f"^{name}=-1, expected an integer, 0 or more$"):
        Arguments(**{name: -1.0})


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["fit", "--model_args", "stepps=3", "--tasks", "t"], "'stepps'. Did you mean 'steps'"),
        (["fit", "--model_args", "dtype=int8", "--tasks", "t"], "unknown dtype 'int8'"),
        (["fit", "--model_args", "pretrained=tiny", "--tasks", "t", "--seeds", "-1"], "different integers, 0 or more"),
        (["compare", "--arm", "a:stepps=3", "--tasks", "t"], "arm 'a': unknown model argument 'stepps'"),
        (["compare", "--seeds", "-1", "--tasks", "t"], r"\[-1\], expected different integers, 0 or more"),
    ],
)
def test_a_wrong_argument_is_told_before_anything_is_loaded(arguments, told, monkeypatch, tmp_path):
    # An import of one of these modules fails.
    for module in ("loaded_run", "plan_runner", "fitting"):
        monkeypatch.setitem(sys.modules, f"lmms_mtv.harness.lmms.{module}", None)
    output = ["--output", str(tmp_path)] if arguments[0] == "compare" else []
    with pytest.raises(SystemExit, match=told):
        cli.main([*arguments, *output])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_no_harness_is_imported_for_the_check():
    script = (
        "import sys; from lmms_mtv.harness.arms import check_early; check_early({'steps': 3}, {'a': {}});"
        "print(sorted({'lmms_eval', 'lm_eval', 'transformers', 'datasets'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_results_that_cannot_be_written_are_told_before_anything_is_loaded(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(SystemExit, match=r"results cannot be written to .*file/out .*: choose another --output"):
        cli.main(["compare", "--tasks", "t", "--output", str(tmp_path / "file" / "out")])
