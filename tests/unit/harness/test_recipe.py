"""What a vector's id stands for: settings that change what a model sees or computes change it, and no others do."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from lmms_eval.tasks import get_task_dict
from PIL import Image as Picture

from lmms_mtv import TaskVector
from lmms_mtv.errors import ArgumentError, DataError
from lmms_mtv.harness.lm import model as lm
from lmms_mtv.harness.lm.evaluation import Evaluation, Tasks
from lmms_mtv.harness.lm.task import LmPrompts
from lmms_mtv.harness.lmms.model import LmmsEvalMtv
from lmms_mtv.harness.training import Training
from lmms_mtv.models.identity import LOCAL, name_of, revision_of, text_files_of
from lmms_mtv.vectors.library import Library
from support import processes
from support.evaluations import own_tasks
from support.shape_tasks import SHORT, task_file
from support.text_tasks import task_file as lm_task_file

QUICK = dict(pair.split("=") for pair in SHORT.split(","))
QUICK = {name: int(value) for name, value in QUICK.items() if name != "reuse"}


@pytest.fixture(scope="module")
def adapter(text_model, tmp_path_factory) -> dict[int, Path]:
    """Two adapters with other weights."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    found = {}
    for seed in (1, 2):
        model = AutoModelForCausalLM.from_pretrained(text_model)
        torch.manual_seed(seed)
        lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        found[seed] = tmp_path_factory.mktemp("adapters") / f"adapter{seed}"
        get_peft_model(model, lora).save_pretrained(found[seed])
    return found


class Lmms:
    """The recipe that ``lmms-eval --model mtv`` gives a vector."""

    def __init__(self, folder: Path) -> None:
        task_file(folder, doc_to_visual=None)
        self._manager = own_tasks(folder)

    def id(self, **given: Any) -> str:
        model = LmmsEvalMtv(**{"batch_size": 2, "device": "cpu", "method": "mtv"} | QUICK | given)
        task = get_task_dict(["custom"], self._manager, "chat")["custom"]
        task.set_config(key="num_fewshot", value=0)
        prompts = model._prompts_of(task)
        return model._provider.recipe(prompts, 0).id


class LmEval:
    """The recipe that ``lmms-mtv lm-eval --model mtv`` gives a vector."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        lm_task_file(folder, "arc")

    def id(self, **given: Any) -> str:
        tasks = Tasks(include_path=str(self._folder), include_defaults=False)
        tasks.load(["own_arc"])
        evaluation = Evaluation(tasks.of)
        model = lm.LmEvalMtv(evaluation, **{"device": "cpu", "method": "mtv"} | QUICK | given)
        prompts = LmPrompts(tasks.of("own_arc"), None, evaluation, model)
        return model._provider.recipe(prompts, 0).id


@pytest.fixture(scope="module")
def lmms(tmp_path_factory) -> Lmms:
    return Lmms(tmp_path_factory.mktemp("lmms"))


@pytest.fixture(scope="module")
def lm_eval(tmp_path_factory) -> LmEval:
    return LmEval(tmp_path_factory.mktemp("lm_eval"))


def changed(folder: Path, to: Path, file: str, **entries: Any) -> str:
    """A copy of a checkpoint with other entries in one of its JSON files."""
    shutil.copytree(folder, to)
    path = to / file
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | entries), encoding="utf-8")
    return str(to)


class TestOfLmmsEval:
    @pytest.mark.parametrize(
        "given",
        [
            {"dtype": "bfloat16"},
            {"attn_implementation": "eager"},
            {"prompt_style": "chat"},
            {"seed": 1},
            {"steps": 11},
            {"wrong": 0.5},
            {"method": "random"},
        ],
        ids=str,
    )
    def test_what_computes_otherwise_has_another_id(self, lmms, text_model, given):
        assert lmms.id(pretrained=str(text_model), **given) != lmms.id(pretrained=str(text_model))

    @pytest.mark.parametrize(
        "given",
        [
            {"batch_size": 1},
            {"batch_size": "auto"},
            {"device": None},
            {"dtype": "float32"},
            {"attn_implementation": "sdpa"},
            {"trust_remote_code": True},
            {"do_image_splitting": None},
            {"cache_gb": 1.0},
            {"reuse": False},
            {"fewshot_as_multiturn": False},
        ],
        ids=str,
    )
    def test_what_computes_the_same_has_the_same_id(self, lmms, text_model, given):
        assert lmms.id(pretrained=str(text_model), **given) == lmms.id(pretrained=str(text_model))

    def test_images_cut_otherwise_are_other_inputs(self, tmp_path):
        shown = Lmms(tmp_path / "shown")
        task_file(tmp_path / "shown")
        assert shown.id(pretrained="tiny", do_image_splitting=True) != shown.id(pretrained="tiny")

    def test_an_adapter_counts_by_its_content(self, lmms, text_model, adapter, tmp_path):
        ids = {seed: lmms.id(pretrained=str(text_model), peft=str(folder)) for seed, folder in adapter.items()}
        assert len({*ids.values(), lmms.id(pretrained=str(text_model))}) == 3
        shutil.copytree(adapter[1], tmp_path / "moved")
        assert lmms.id(pretrained=str(text_model), peft=str(tmp_path / "moved")) == ids[1]

    def test_tokenizer_and_code_of_a_folder_count_and_how_they_are_written_does_not(self, lmms, text_model, tmp_path):
        own = lmms.id(pretrained=str(text_model))
        written = changed(text_model, tmp_path / "written", "tokenizer_config.json", transformers_version="1.0")
        other = changed(text_model, tmp_path / "other", "tokenizer_config.json", add_prefix_space=True)
        assert lmms.id(pretrained=written) == own
        assert lmms.id(pretrained=other) != own

    @pytest.mark.slow
    def test_a_folder_is_itself_wherever_it_is_and_however_it_is_written(self, lmms, text_model, tmp_path, monkeypatch):
        own = lmms.id(pretrained=str(text_model))
        shutil.copytree(text_model, tmp_path / "moved")
        (tmp_path / "link").symlink_to(text_model)
        monkeypatch.chdir(tmp_path)
        for path in (f"{text_model}/", f"{text_model}/.", "moved", "./link", str(tmp_path / "link")):
            assert lmms.id(pretrained=path) == own, path


class TestOfLmEval:
    @pytest.mark.parametrize(
        "given",
        [
            {"dtype": "bfloat16"},
            {"mixed_precision_dtype": "bfloat16"},
            {"attn_implementation": "eager"},
            {"add_bos_token": True},
            {"max_length": 100},
            {"prefix_token_id": 7},
            {"seed": 1},
            {"steps": 11},
        ],
        ids=str,
    )
    def test_what_computes_otherwise_has_another_id(self, lm_eval, text_model, given):
        assert lm_eval.id(pretrained=str(text_model), **given) != lm_eval.id(pretrained=str(text_model))

    @pytest.mark.parametrize(
        "given",
        [
            {"batch_size": 3},
            {"max_batch_size": 2},
            {"logits_cache": False},
            {"softmax_dtype": "float32"},
            {"trust_remote_code": True},
            {"attn_implementation": "sdpa"},
            {"truncation": True},
            {"dtype": "float32"},
            {"add_bos_token": None},
            {"cache_gb": 1.0},
            {"reuse": False},
        ],
        ids=str,
    )
    def test_what_computes_the_same_has_the_same_id(self, lm_eval, text_model, given):
        assert lm_eval.id(pretrained=str(text_model), **given) == lm_eval.id(pretrained=str(text_model))

    def test_adapters_and_tokenizers_count_by_their_content(self, lm_eval, text_model, adapter, tmp_path):
        own = lm_eval.id(pretrained=str(text_model))
        ids = {seed: lm_eval.id(pretrained=str(text_model), peft=str(folder)) for seed, folder in adapter.items()}
        assert len({*ids.values(), own}) == 3
        shutil.copytree(adapter[1], tmp_path / "moved")
        assert lm_eval.id(pretrained=f"{text_model}/", peft=str(tmp_path / "moved")) == ids[1]
        other = changed(text_model, tmp_path / "other", "tokenizer_config.json", add_prefix_space=True)
        assert lm_eval.id(pretrained=str(text_model), tokenizer=other) != own


def test_both_harnesses_know_a_folder_by_the_same_name(text_model, tmp_path):
    revision = revision_of(str(text_model), None)
    assert name_of(str(text_model), revision) == LOCAL + revision.removeprefix("sha256:")
    assert name_of("owner/model", "abc") == "owner/model"
    assert text_files_of("owner/model") is None
    base = LmmsEvalMtv(pretrained=f"{text_model}/", method="none").base
    assert base.name == name_of(str(text_model), revision)


class TestOldVectors:
    """Vectors of 0.1.0 named a folder by its path, and had less in their recipes."""

    @pytest.fixture
    def old(self, text_model, lmms, tmp_path) -> TaskVector:
        model = LmmsEvalMtv(pretrained=str(text_model), method="mtv", library=str(tmp_path / "library"), **QUICK)
        task = get_task_dict(["custom"], lmms._manager, "chat")["custom"]
        task.set_config(key="num_fewshot", value=0)
        vector = model.fit(task)
        # The fields of a card of 0.1.0, and the name that it gave the model.
        fields = {"accuracy", "replay"}
        card = dataclasses.replace(vector.card, model=str(text_model), prompt="0" * 64, replay=None, accuracy={})
        shutil.rmtree(tmp_path / "library")
        old = TaskVector(vector.edits, card)
        assert fields & json.loads(card.to_json()).keys() == fields
        return old

    def test_they_keep_their_ids_and_are_used_by_name_and_not_instead_of_a_fit(self, old, text_model, lmms, tmp_path):
        library = Library(tmp_path / "library")
        path = library.add(old)
        assert TaskVector.load(path).id == old.id
        options = {"pretrained": f"{text_model}/", "library": str(tmp_path / "library")}
        task = get_task_dict(["custom"], lmms._manager, "chat")["custom"]
        task.set_config(key="num_fewshot", value=0)
        used = LmmsEvalMtv(vector=str(path), **options).fit(task)
        assert used.id == old.id
        fitted = LmmsEvalMtv(method="mtv", **options, **QUICK).fit(task)
        assert fitted.id != old.id
        assert fitted.card.model.startswith(LOCAL)


def examples(color: str, text: str = "w1", path: str | None = None) -> Dataset:
    """Examples with a picture inside a struct inside a list, as of chats."""
    buffer = io.BytesIO()
    Picture.new("RGB", (64, 64), color).save(buffer, "BMP")
    turn = {"picture": {"bytes": buffer.getvalue(), "path": path}, "text": text}
    features = Features({"turns": List({"picture": Image(), "text": Value("string")}), "answer": Value("string")})
    return Dataset.from_list([{"turns": [turn], "answer": "w2"}] * 3, features=features)


def training(documents: Any) -> Training:
    config = SimpleNamespace(task="own", test_split="test", validation_split=None, metadata=None)
    config.training_split, config.dataset_path = "train", "own"
    config.doc_to_target, config.doc_to_choice = "answer", None
    task = SimpleNamespace(config=config, dataset={"train": documents}, doc_to_target=lambda doc: doc["answer"])
    return Training(task, None, None)


class TestExamples:
    def test_pictures_count_by_their_pixels_wherever_they_are_in_a_column(self):
        red = training(examples("red")).digest()
        assert training(examples("red", path="elsewhere.bmp")).digest() == red
        assert training(examples("blue")).digest() != red
        assert training(examples("red", text="w9")).digest() != red

    def test_pictures_that_begin_alike_are_told_apart(self):
        def half(color: str) -> Dataset:
            picture = Picture.new("RGB", (64, 64), "white")
            # A BMP begins with its last rows.
            picture.paste(Picture.new("RGB", (64, 8), color), (0, 0))
            buffer = io.BytesIO()
            picture.save(buffer, "BMP")
            return Dataset.from_list(
                [{"image": {"bytes": buffer.getvalue(), "path": None}, "answer": "a"}],
                features=Features({"image": Image(), "answer": Value("string")}),
            )

        assert training(half("red")).digest() != training(half("blue")).digest()

    @pytest.mark.slow
    def test_the_digest_is_the_same_in_another_process(self):
        program = (
            "from test_recipe import examples, training\n"
            "print(training(examples('red')).digest())\n"
            "print(training([{'image': examples('red')[0]['turns'][0]['picture'], 'answer': 'a'}]).digest())"
        )
        folders = (str(Path(__file__).parent), str(Path(__file__).parents[2]))
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders)}
        command = [sys.executable, "-c", program]
        runs = [processes.run(command, env=environment, timeout=240).stdout for _ in range(2)]
        assert runs[0] == runs[1]
        assert runs[0].split()[0] == training(examples("red")).digest()

    @pytest.mark.parametrize("answer", [None, "None"])
    def test_a_null_answer_is_not_the_word_none(self, answer):
        found = training([])
        doc = {"answer": answer, "other": "a"}
        if answer is None:
            with pytest.raises(DataError, match=r"no answer \(null\).*process_docs"):
                found.target(doc)
        else:
            assert found.target(doc) == "None"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("vector=0012,seed=3", {"vector": "0012", "seed": 3}),
        ("heads=12e4", {"heads": "12e4"}),
        ("library=2024,pretrained=tiny", {"library": "2024", "pretrained": "tiny"}),
    ],
)
def test_a_reference_of_digits_stays_a_text(text, expected):
    from lmms_eval.utils import simple_parse_args_string

    from lmms_mtv.harness.arguments import Arguments, with_text_restored

    assert with_text_restored(simple_parse_args_string(text), text) == expected
    with pytest.raises(ArgumentError, match="expected text: put it in quotes"):
        Arguments(vector=12)
