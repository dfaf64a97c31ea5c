"""The plugin inside lmms-eval: through its command and through its Python interface."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import get_model
from lmms_eval.tasks import TaskManager
from loguru import logger
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from lmms_mtv import Edit, TaskVector
from lmms_mtv.errors import (
    ArgumentError,
    ContextLengthError,
    DataError,
    GeometryError,
    LeakageError,
    MtvError,
    NumericsError,
    VectorFileError,
)
from lmms_mtv.harness.lmms.model import LmmsEvalMtv
from lmms_mtv.harness.lmms.plugin import register_tasks
from lmms_mtv.models.identity import revision_of
from lmms_mtv.models.runner import PromptRunner
from lmms_mtv.shapes import CHECKPOINT
from lmms_mtv.vectors.library import Library
from support import matrix
from support.evaluations import task_manager
from support.shape_tasks import SHORT, Arguments, command, evaluate, records, task_file


@pytest.mark.slow
def test_the_command_fits_evaluates_and_records(tmp_path):
    """Through the installed entry points alone: no flag, no include path, nothing imported from here."""
    done = command(
        *("--model", "mtv", "--model_args", f"pretrained=tiny,{SHORT}"),
        *("--tasks", "shapes_color_en,shapes_phrase_en", "--limit", "5", "--output_path", str(tmp_path)),
    )
    assert done.returncode == 0, done.stderr
    assert "|shapes_color_en |" in done.stdout
    assert done.stdout.count("fitted mtv for shapes_") == 2
    assert "of 32 heads, loss" in done.stdout
    for bar in ("Extracting activations", "Selecting heads", "Choosing the final heads", "Evaluating shapes_color_en"):
        assert bar in done.stderr
    (results,) = tmp_path.rglob("*_results.json")
    assert json.loads(results.read_text())["results"]["shapes_phrase_en"]["exact_match,none"] >= 0
    (record,) = records(tmp_path)
    for task in ("shapes_color_en", "shapes_phrase_en"):
        used = record["tasks"][task]
        assert used["method"] == "mtv"
        assert used["settings"]["steps"] == 10
        assert used["settings"]["loss"] == "all"
        saved = TaskVector.load(results.parent / used["source"])
        assert saved.id == used["vector"]
        assert [list(head) for head in saved.heads] == used["heads"]
        assert saved.card.task == task
        assert used["fit_stages"] == saved.card.stages
        assert set(used["fit_stages"]) == {"values", "selection"}
        assert 0 < sum(used["fit_stages"].values()) < used["fit_seconds"] + 0.001
    assert record["tasks"]["shapes_color_en"]["vector"] != record["tasks"]["shapes_phrase_en"]["vector"]


@pytest.mark.slow
def test_an_error_at_the_command_line_is_one_line_and_a_status(tmp_path):
    done = command(
        *("--model", "mtv", "--model_args", "pretrained=tiny,stepz=3"),
        *("--tasks", "shapes_color_en", "--output_path", str(tmp_path)),
    )
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("lmms-mtv:")]
    assert "unknown model argument 'stepz'. Did you mean 'steps'?" in line
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
    # The harness says so after it has read its task files.
    assert "Selected Tasks" not in done.stdout + done.stderr


def test_arguments_are_checked_before_the_task_files_are_read(monkeypatch):
    register_tasks()
    monkeypatch.setattr(TaskManager, "_get_task_and_group", lambda *_: pytest.fail("it reads task files"))

    def cli_evaluate_single(args: Namespace) -> TaskManager:
        return TaskManager("ERROR", model_name=args.model)

    flags = {"model": "mtv", "batch_size": 1, "max_batch_size": None, "device": None}
    for model_args, told in (("pretrained=tiny,stepz=3", "Did you mean 'steps'"), ("seed=-1", "seed=-1.*, expected")):
        with pytest.raises(ArgumentError, match=told):
            cli_evaluate_single(Namespace(model_args=model_args, **flags))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ArgumentError, match="device=cuda: torch"):
        cli_evaluate_single(Namespace(model_args="pretrained=tiny", **flags | {"device": "cuda"}))


@pytest.mark.slow
def test_answers_of_a_vector_are_not_taken_from_a_cache_that_does_not_know_it(tmp_path):
    done = command(
        *("--model", "mtv", "--model_args", f"pretrained=tiny,{SHORT}", "--tasks", "shapes_color_en"),
        *("--use_cache", str(tmp_path / "cache"), "--limit", "2"),
    )
    assert done.returncode == 1
    assert "--use_cache knows a model by the text of its arguments" in done.stderr
    given = f"pretrained=tiny,{SHORT}"
    for model, arguments in (("mtv", given), (LmmsEvalMtv.create_from_arg_string(given), None)):
        with pytest.raises(ArgumentError, match="--use_cache knows a model"):
            simple_evaluate(
                model,
                arguments,
                tasks=["shapes_color_en"],
                task_manager=task_manager(),
                use_cache=str(tmp_path / "cache"),
                limit=2,
            )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"process_results": "fails"}, "a metric that fails"),
        ({"doc_to_text": "fails"}, "a metric that fails"),
        ({}, "Tasks were not found: absent"),
    ],
    ids=["a metric", "a prompt", "an unknown task"],
)
def test_a_failure_that_the_harness_would_pass_over_is_a_status(wrong, said, tmp_path):
    """The harness prints a traceback and exits with 0, for whatever part of an evaluation raises."""
    folder = task_file(tmp_path / "tasks", **wrong)
    with (folder / "utils.py").open("a", encoding="utf-8") as file:
        file.write("\n\ndef fails(*_):\n    raise RuntimeError('a metric that fails')\n")
    done = command(
        *("--model", "mtv", "--model_args", "pretrained=tiny,method=none", "--tasks", "custom" if wrong else "absent"),
        *("--include_path", str(folder), "--limit", "2", "--output_path", str(tmp_path / "out")),
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert said in done.stdout + done.stderr
    assert not list(tmp_path.rglob("*_results.json"))


@pytest.mark.parametrize("first", ["lmms_mtv.harness.lmms.plugin", "lmms_eval.models"])
def test_the_model_is_known_whichever_package_is_imported_first(first):
    code = f"import {first}; from lmms_eval.models import get_model; print(get_model('mtv').__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "LmmsEvalMtv"


def test_the_tasks_are_known_and_do_not_hide_the_harness_own():
    index = TaskManager("ERROR", model_name="mtv").task_index
    assert {"shapes", "shapes_hard", "shapes_color_en", "shapes_labels_shape"} <= index.keys()
    assert index["shapes"]["type"] == "group"
    assert "vizwiz_vqa_val" in index
    assert "shapes" not in TaskManager("ERROR", include_defaults=False).task_index


@pytest.mark.slow
def test_the_shapes_tasks_work_with_a_simple_model_of_the_harness(monkeypatch):
    """Any lmms-eval model can run them: context, pictures and target, without the plugin's model."""
    manager = task_manager("dummy")
    for kind in ("simple", "chat"):
        task = manager.load_task_or_group(["shapes_position_es"], task_type=kind)["shapes_position_es"]
        assert len(task.test_docs()) == 200
        assert len(task.training_docs()) == 400
        doc = task.test_docs()[0]
        (image,) = task.doc_to_visual(doc)
        assert isinstance(image, Image.Image)
        assert task.doc_to_text(doc) == "What is it? Answer:"
        assert task.doc_to_target(doc) == "arriba"
        assert task.process_results(doc, ["Arriba."]) == {"exact_match": 1.0}
        assert task.process_results(doc, ["abajo"]) == {"exact_match": 0.0}
    assert not get_model("mtv").is_simple


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """Evaluations and their records: ``recorded(model_args, tasks)`` gives tasks, ``model`` and ``results``."""
    from lmms_eval.api.task import Task

    def run(model_args: str, tasks: list[str], **options) -> dict:
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        monkeypatch.setattr(Task, "args", None, raising=False)
        results = evaluate(model_args, tasks, cli_args=Arguments(folder), **options)
        (record,) = records(folder)
        return record["tasks"] | {"model": record["model"], "results": results}

    return run


@pytest.mark.slow
def test_same_seed_same_vector_whatever_the_batch_size(recorded):
    runs = [
        recorded(f"pretrained=tiny,seed=1,{SHORT},batch_size={size}", ["shapes_shape_es"])["shapes_shape_es"]
        for size in (1, 3, 8)
    ]
    assert len({run["vector"] for run in runs}) == 1
    assert runs[0]["heads"] == runs[1]["heads"] == runs[2]["heads"]
    other = recorded(f"pretrained=tiny,seed=2,{SHORT}", ["shapes_shape_es"])["shapes_shape_es"]
    assert other["vector"] != runs[0]["vector"]


@contextmanager
def logged() -> Iterator[list[str]]:
    """The warnings of the harness's log inside the block."""
    said: list[str] = []
    sink = logger.add(lambda message: said.append(message.record["message"]), level="WARNING")
    try:
        yield said
    finally:
        logger.remove(sink)


def test_a_vector_under_other_prompts_is_a_warning(recorded, tmp_path):
    """Also where geometry, model and task are the same: a vector of raw prompts does not fit a chat."""
    short = SHORT.replace("steps=10", "steps=1").replace("iterations=8", "iterations=2")
    recorded(f"pretrained=tiny,{short}", ["shapes_color_en"], limit=1)
    (path,) = tmp_path.rglob("vector.safetensors")
    card = TaskVector.load(path).card
    assert card.prompt_text[1:] == (" ", card.prompt_text[2], "\n")
    assert card.prompt_text[0].endswith("<image>What is it? Answer:")
    with logged() as same:
        recorded(f"pretrained=tiny,vector={path}", ["shapes_color_en"], limit=1)
    with logged() as other:
        recorded(f"pretrained=tiny,vector={path},prompt_style=chat", ["shapes_color_en"], limit=1)
    assert not [line for line in same if "with prompts of another form" in line]
    (line,) = [line for line in other if "with prompts of another form" in line]
    assert card.id in line
    assert "prompt_style" in line
    # Other examples have other words, which is no other form.
    fitted = TaskVector.load(path)
    for ending, told in (("\n", False), ("<end_of_turn>", True)):
        text = (*card.prompt_text[:3], ending)
        elsewhere = dataclasses.replace(card, examples="e" * 64, prompt="p" * 64, prompt_text=text)
        moved = TaskVector(fitted.edits, elsewhere).save(tmp_path / "moved.safetensors")
        with logged() as said:
            recorded(f"pretrained=tiny,vector={moved}", ["shapes_color_en"], limit=1)
        assert any("prompts of another form" in line for line in said) == told


def answers(results: dict) -> dict:
    return {
        task: [sample["filtered_resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
        for task, samples in results["samples"].items()
    }


def test_answers_do_not_depend_on_batches_or_on_the_other_tasks(recorded):
    tasks = ["shapes_color_en", "shapes_shape_es"]
    together = recorded(f"pretrained=tiny,{SHORT},batch_size=1", tasks, limit=7)
    alone = {}
    for task in reversed(tasks):
        run = recorded(f"pretrained=tiny,{SHORT},batch_size=4", [task], limit=7)
        assert run[task]["vector"] == together[task]["vector"]
        alone |= answers(run["results"])
    assert answers(together["results"]) == alone


@pytest.mark.parametrize("sampling", [False, True])
def test_a_batch_has_prompts_of_about_one_length_unless_answers_are_random(recorded, monkeypatch, tmp_path, sampling):
    settings = {"until": ["\n"], "max_new_tokens": 4, "do_sample": sampling, "temperature": float(sampling)}
    folder = task_file(tmp_path / "task", doc_to_text="of_many_lengths", generation_kwargs=settings)
    with (folder / "utils.py").open("a") as file:
        file.write("\n\ndef of_many_lengths(doc):\n    return 'What is it? ' * (doc['dx'] % 4) + question(doc)\n")
    inputs_of, lengths = PromptRunner._inputs, []

    def measured(self, prompts, new_tokens):
        inputs = inputs_of(self, prompts, new_tokens)
        lengths.append(inputs["attention_mask"].sum(1).tolist())
        return inputs

    monkeypatch.setattr(PromptRunner, "_inputs", measured)
    base = "pretrained=tiny,method=none"
    single = recorded(f"{base},batch_size=1", ["custom"], include=folder, limit=9)
    lengths.clear()
    run = recorded(f"{base},batch_size=3", ["custom"], include=folder, limit=9)
    together = [length for batch in lengths for length in batch]
    assert [len(batch) for batch in lengths] == [3, 3, 3]
    assert len(set(together)) > 2
    assert (together == sorted(together, reverse=True)) == (not sampling)
    if not sampling:
        assert answers(run["results"]) == answers(single["results"])


@pytest.mark.parametrize("style", matrix.members(["raw", "chat"], "raw"))
def test_few_shot_prompts_tell_the_task_and_num_fewshot_is_shots(recorded, style):
    base = f"pretrained=tiny,method=none,prompt_style={style},batch_size=8"
    plain = recorded(base, ["shapes_background_es"], limit=24)
    shots = recorded(f"{base},shots=4", ["shapes_background_es"], limit=24)
    flag = recorded(base, ["shapes_background_es"], limit=24, num_fewshot=4)
    score = lambda run: run["results"]["results"]["shapes_background_es"]["exact_match,none"]  # noqa: E731
    assert score(plain) < 0.3 < 0.9 < score(shots)
    assert answers(flag["results"]) == answers(shots["results"])
    assert (
        shots["shapes_background_es"]["evaluation"]["input_tokens"]
        > 4 * plain["shapes_background_es"]["evaluation"]["input_tokens"]
    )
    # A task file may ask for demonstrations: an argument wins.
    none = recorded(f"{base},shots=0", ["shapes_background_es"], limit=24, num_fewshot=4)
    assert answers(none["results"]) == answers(plain["results"])


def test_model_arguments_win_over_the_flags_defaults():
    """The command line always passes a batch size, given or not."""
    made = get_model("mtv").create_from_arg_string("pretrained=tiny,batch_size=4", {"batch_size": 1, "device": None})
    assert made.base.batch_size.rows == 4
    assert get_model("mtv").create_from_arg_string("pretrained=tiny", {"batch_size": 3}).base.batch_size.rows == 3


@pytest.mark.slow
def test_a_saved_vector_is_used_instead_of_fitting(recorded, tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("LMMS_MTV_LIBRARY", str(tmp_path_factory.mktemp("library")))
    fitted = recorded(f"pretrained=tiny,{SHORT}", ["shapes_color_en"], limit=6)
    (path,) = tmp_path.rglob("vector.safetensors")
    # The library and the results have one file, under two names.
    assert path.samefile(Library().folder(TaskVector.load(path).card) / "vector.safetensors")
    loaded = recorded(f"pretrained=tiny,vector={path}", ["shapes_color_en"], limit=6)
    assert loaded["shapes_color_en"]["vector"] == fitted["shapes_color_en"]["vector"]
    assert loaded["shapes_color_en"]["source"] == str(path)
    assert answers(loaded["results"]) == answers(fitted["results"])


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["first", "all"])
def test_answers_that_do_not_end_are_told_with_what_mends_it(recorded, tmp_path, loss):
    """A vector that was selected on the first token alone does not learn where an answer ends."""
    recorded(f"pretrained=tiny,{SHORT}", ["shapes_color_en"], limit=6)
    (path,) = tmp_path.rglob("vector.safetensors")
    fitted = TaskVector.load(path)
    shape = fitted.edits["heads"].value.shape
    value = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    config = {**fitted.card.config, "loss": loss}
    broken = dataclasses.replace(fitted.card, config=config)
    TaskVector({"heads": Edit.replace(value, torch.ones(shape[:2]))}, broken).save(path)
    said: list[str] = []
    sink = logger.add(lambda message: said.append(message.record["message"]), level="WARNING")
    told = {
        name: recorded(given, ["shapes_color_en"], limit=6)
        for name, given in {"without": "pretrained=tiny,method=none", "with": f"pretrained=tiny,vector={path}"}.items()
    }
    logger.remove(sink)
    assert told["without"]["shapes_color_en"]["evaluation"]["cut_off"] == 0
    assert told["with"]["shapes_color_en"]["evaluation"]["cut_off"] == 6
    (line,) = (line for line in said if "reach max_new_tokens" in line)
    assert line.startswith("6 of 6 answers to task shapes_color_en")
    assert ("loss=all" in line, "fewshot_delimiter" in line) == (loss == "first", loss == "all")


def test_a_vector_of_the_same_recipe_is_reused_from_the_library(recorded, tmp_path):
    """Also by its id and by task/method, on another task too; and another setting fits another one."""
    task, root = "shapes_color_en", tmp_path / "library"
    short = f"{SHORT},library={root}".replace(",reuse=False", "")
    first = recorded(f"pretrained=tiny,{short}", [task], limit=6)
    again = recorded(f"pretrained=tiny,batch_size=4,{short}", [task], limit=6)
    anew = recorded(f"pretrained=tiny,{short},steps=11", [task], limit=6)
    assert [run[task]["reused"] for run in (first, again, anew)] == [False, True, False]
    assert again[task]["fit_seconds"] == first[task]["fit_seconds"] != anew[task]["fit_seconds"]
    assert again[task]["vector"] == first[task]["vector"] != anew[task]["vector"]
    assert answers(again["results"]) == answers(first["results"])
    assert {entry.id for entry in Library(root).entries()} == {first[task]["vector"], anew[task]["vector"]}

    by_id = recorded(f"pretrained=tiny,library={root},vector={first[task]['vector'][:8]}", [task], limit=6)
    assert answers(by_id["results"]) == answers(first["results"])
    with pytest.raises(ArgumentError, match=r"is 2 vectors. They differ in settings alone"):
        recorded(f"pretrained=tiny,library={root},vector={task}/mtv", [task], limit=6)


@pytest.mark.slow
def test_an_answer_ends_at_until_or_where_a_demonstration_would_begin(recorded, tmp_path):
    """Without a stop the tiny model goes on; at either of the two the answer is cut."""
    ends = {"until": {"fewshot_delimiter": ""}, "delimiter": {"fewshot_delimiter": "\n"}, "neither": {}}
    asked = {"until": "\n", "delimiter": "never", "neither": "never"}
    tokens, texts = {}, {}
    for name, changes in ends.items():
        settings = {"until": [asked[name]], "max_new_tokens": 5, "do_sample": False}
        changes = {"fewshot_delimiter": ""} | changes
        folder = task_file(
            tmp_path / name, name, target_delimiter=" ", generation_kwargs=settings, doc_to_text="shown", **changes
        )
        # The question ends like a prompt with demonstrations, so that all three are asked the same.
        (folder / "utils.py").write_text(
            (folder / "utils.py").read_text() + "\n\ndef shown(doc):\n    return 'What is it? red\\nWhat is it?'\n"
        )
        run = recorded("pretrained=tiny,method=none", [name], include=folder)
        tokens[name] = run[name]["evaluation"]["output_tokens"]
        texts[name] = [str(answer[0]) for answer in answers(run["results"])[name]]
    assert tokens["until"] == tokens["delimiter"] < tokens["neither"] == 5
    assert texts["until"] == texts["delimiter"]
    assert all(long.startswith(short.strip()) for long, short in zip(texts["neither"], texts["until"], strict=True))


@pytest.mark.slow
def test_a_checkpoints_own_penalties_do_not_shape_answers(recorded, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(CHECKPOINT, copy)
    path = copy / "generation_config.json"
    settings = {"repetition_penalty": 5.0, "num_beams": 3, "no_repeat_ngram_size": 1, "length_penalty": -4.0}
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    base = "method=none,shots=2,batch_size=8"
    runs = [recorded(f"pretrained={name},{base}", ["shapes_phrase_en"], limit=16) for name in ("tiny", copy)]
    assert answers(runs[0]["results"]) == answers(runs[1]["results"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.slow
def test_half_precision_runs(recorded, dtype):
    run = recorded(f"pretrained=tiny,dtype={dtype},{SHORT},batch_size=8", ["shapes_color_en"], limit=8)
    assert run["shapes_color_en"]["heads"]


@pytest.mark.slow
def test_a_text_model_on_a_text_task(recorded, text_model, tmp_path):
    folder = task_file(tmp_path / "task", doc_to_visual=None)
    for arguments in (SHORT, "method=none,shots=3"):
        run = recorded(f"pretrained={text_model},{arguments},batch_size=2", ["custom"], include=folder)
        assert run["custom"]["evaluation"]["requests"] == 3
    # Demonstrations are ours alone: the harness would add its own to the text of such a task.
    assert run["custom"]["evaluation"]["input_tokens"] == 4 * 6 + 3 * 2
    with pytest.raises(ArgumentError, match="is a text model, but the task has images"):
        evaluate(f"pretrained={text_model},method=none", ["shapes_color_en"])


@pytest.mark.slow
def test_the_record_says_which_blocks_are_left_alone(recorded, hybrid_text_model, text_model, tmp_path):
    folder = task_file(tmp_path / "task", doc_to_visual=None)
    for model, arguments, skipped in ((hybrid_text_model, SHORT, [0]), (text_model, "method=none", [])):
        run = recorded(f"pretrained={model},{arguments},batch_size=2", ["custom"], include=folder)
        assert run["model"]["skipped"] == skipped


def test_every_byte_of_a_folders_weights_is_in_its_revision(tmp_path, monkeypatch):
    def made(name: str, last: bytes, size: int, file: str = "model.safetensors") -> str:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / file).write_bytes(bytes(size - 1) + last)
        return str(folder)

    for file in ("model.safetensors", "pytorch_model.bin"):
        for size in (100, 8 << 20, (8 << 20) + 1, 9 << 20):
            one, same, other = (
                revision_of(made(f"{n}-{size}-{file}", end, size, file), None)
                for n, end in enumerate((b"a", b"a", b"b"))
            )
            assert one == same != other
    assert (
        revision_of(made("short", b"a", 9), None)
        == "sha256:" + hashlib.sha256(b"config.json 2{}" + b"model.safetensors 9" + bytes(8) + b"a").hexdigest()[:16]
    )
    assert revision_of(str(tmp_path / "short"), "abc") == "abc"
    assert revision_of("no/folder", None) is None

    said: list[str] = []
    sink = logger.add(lambda message: said.append(str(message)), level="INFO")
    try:
        revision_of(str(tmp_path / "short"), None)
        assert not said
        monkeypatch.setattr("lmms_mtv.models.identity._LONG", 10)
        revision_of(str(tmp_path / "short"), None)
    finally:
        logger.remove(sink)
    assert len(said) == 1
    assert str(tmp_path / "short") in said[0]


class TestBadInput:
    """One clear error that names the fix, and nothing half-written."""

    def refused(
        self, kind: type[MtvError], match: str, model_args: str, task: str = "shapes_color_en", **options
    ) -> None:
        with pytest.raises(kind, match=match):
            evaluate(model_args, [task], **options)

    def test_unknown_argument_lists_ours_and_the_bases(self):
        self.refused(ArgumentError, r"'pretraned'.*Did you mean 'pretrained'.*shots.*steps.*dtype", "pretraned=tiny")

    def test_unknown_method(self):
        self.refused(ArgumentError, "unknown method 'mvt'. Did you mean 'mtv'", "pretrained=tiny,method=mvt")

    def test_unknown_base(self):
        self.refused(ArgumentError, "unknown base 'hff'. Did you mean 'hf'", "pretrained=tiny,base=hff")

    def test_a_base_without_a_torch_module(self):
        self.refused(ArgumentError, "base=openai.*cannot be edited.*Use base=hf", "pretrained=tiny,base=openai")

    def test_unknown_model(self):
        self.refused(
            ArgumentError, "pretrained=no/such-model cannot be loaded: (?!Did you)", "pretrained=no/such-model"
        )
        self.refused(ArgumentError, "pretrained=tinyy cannot be loaded: Did you mean 'tiny'", "pretrained=tinyy")

    @pytest.mark.parametrize(
        ("wrong", "named"),
        [
            ("shots=-1", "shots=-1"),
            ("dtype=int8", "unknown dtype 'int8'"),
            ("prompt_style=poem", "unknown prompt_style"),
            ("batch_size=none", "batch_size='none'"),
            ("loss=last", "one of first, all"),
            ("samples=1", "samples=1, expected at least 2"),
            ("vector=somewhere,method=random,steps=3", "leave out method, steps, or vector= to fit anew"),
            ("fewshot_as_multiturn=3", "expected True or False"),
            ("max_pixels=64", "max_pixels: the image processor of tiny .* has no such setting"),
            ("decoder=nowhere", "decoder='nowhere'"),
        ],
    )
    def test_wrong_values(self, wrong, named):
        self.refused(MtvError, named, f"pretrained=tiny,{wrong}")

    @pytest.mark.slow
    def test_heads_of_a_vector_that_edits_none(self, tmp_path):
        run = tmp_path / "run"
        from lmms_eval.api.task import Task

        Task.args = None
        given = "method=task_vector,iterations=2,fit_shots=2,examples=2,reuse=False"
        evaluate(f"pretrained=tiny,{given}", ["shapes_color_en"], cli_args=Arguments(run), limit=1)
        (path,) = run.rglob("vector.safetensors")
        assert set(TaskVector.load(path).edits) == {"residual"}
        self.refused(ArgumentError, r"task_vector \(residual of 1 of 4 layers\)", f"pretrained=tiny,heads={path}")

    @pytest.fixture
    def saved(self, tmp_path) -> Path:
        evaluate_with = f"pretrained=tiny,{SHORT}"
        from lmms_eval.api.task import Task

        Task.args = None
        evaluate(evaluate_with, ["shapes_color_en"], cli_args=Arguments(tmp_path / "run"), limit=1)
        (path,) = (tmp_path / "run").rglob("vector.safetensors")
        return path

    def test_a_vector_of_another_model_or_geometry(self, saved, tmp_path):
        copy = tmp_path / "copy"
        shutil.copytree(CHECKPOINT, copy)
        with logged() as said:
            same = LmmsEvalMtv(pretrained=str(copy), vector=str(saved))
        assert not said
        assert same.base.name != "lmms-mtv/tiny"
        assert same.base.revision == TaskVector.load(saved).card.revision, "the same weights are the same model"
        changed = json.loads((copy / "config.json").read_text()) | {"initializer_range": 0.5}
        (copy / "config.json").write_text(json.dumps(changed))
        with logged() as said:
            LmmsEvalMtv(pretrained=str(copy), vector=str(saved))
        (line,) = said
        assert "was fitted for lmms-mtv/tiny" in line
        assert "its values are those of another" in line
        config = json.loads((copy / "config.json").read_text())
        config["text_config"]["num_hidden_layers"] = 2
        (copy / "config.json").write_text(json.dumps(config))
        vector = TaskVector.load(saved)
        shallow = AutoModelForImageTextToText.from_pretrained(copy)
        from lmms_mtv import applied

        with pytest.raises(GeometryError, match=r"4 layers of 8 heads.*2 layers of 8 heads"), applied(shallow, vector):
            pass

    @pytest.mark.slow
    def test_a_damaged_or_foreign_vector_file(self, saved, tmp_path):
        saved.write_bytes(saved.read_bytes()[:-7])
        self.refused(VectorFileError, "damaged", f"pretrained=tiny,vector={saved}")
        self.refused(VectorFileError, "no task vector", f"pretrained=tiny,vector={CHECKPOINT / 'model.safetensors'}")
        self.refused(VectorFileError, "no vector file at", f"pretrained=tiny,vector={tmp_path / 'none'}")

    def test_nan_in_the_activations_names_the_layer(self, tmp_path):
        model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT)
        with torch.no_grad():
            model.model.text_model.layers[2].self_attn.v_proj.weight.fill_(torch.nan)
        model.save_pretrained(tmp_path)
        AutoProcessor.from_pretrained(CHECKPOINT).save_pretrained(tmp_path)
        self.refused(NumericsError, r"layers\.2\.self_attn\.o_proj.*dtype=", f"pretrained={tmp_path},{SHORT}")

    def test_no_training_split(self, tmp_path):
        folder = task_file(tmp_path, training_split=None, fewshot_split=None, fewshot_config=None, metadata=None)
        self.refused(
            DataError, "no training split.*demonstrations=", f"pretrained=tiny,{SHORT}", "custom", include=folder
        )

    def test_fitting_on_what_is_evaluated(self, tmp_path):
        self.refused(LeakageError, "demonstrations=test is the split", f"pretrained=tiny,{SHORT},demonstrations=test")
        folder = task_file(tmp_path, training_split="test", fewshot_split=None, fewshot_config=None, metadata=None)
        self.refused(LeakageError, "choose another split", f"pretrained=tiny,{SHORT}", "custom", include=folder)
        self.refused(DataError, "no split 'dev', only", f"pretrained=tiny,{SHORT},demonstrations=dev")

    def test_too_few_examples(self, tmp_path):
        folder = task_file(tmp_path)
        train = folder / "data" / "train.jsonl"
        train.write_text("".join(train.read_text().splitlines(keepends=True)[:3]))
        self.refused(
            DataError,
            "3 examples.*at least 4.*fit_shots=",
            f"pretrained=tiny,{SHORT.replace('fit_shots=2', 'fit_shots=3')}",
            "custom",
            include=folder,
        )
        self.refused(DataError, "smaller shots=", "pretrained=tiny,method=none,shots=5", "custom", include=folder)

    def test_a_prompt_past_the_context(self):
        self.refused(ContextLengthError, "1024 tokens.*smaller shots=", "pretrained=tiny,method=none,shots=90")

    @pytest.mark.parametrize("kind", ["broken", "truncated"])
    def test_an_image_that_does_not_open(self, tmp_path, kind):
        folder = task_file(tmp_path, doc_to_visual=kind)
        self.refused(
            DataError, "an image of .*custom does not open", f"pretrained=tiny,{SHORT}", "custom", include=folder
        )

    def test_a_declaration_that_no_method_knows(self, tmp_path):
        """Settings are for a method by its name: those of one never become the defaults of another."""
        wrong = {"mtv": {"stepz": 3}, "mvt": {"steps": 3}, "steps": 3}
        for number, (name, value) in enumerate(wrong.items()):
            declared = {"version": 1.0, "mtv": {"demonstrations": "train", name: value}}
            folder = task_file(tmp_path / str(number), metadata=declared)
            told = "'stepz'. Did you mean 'steps'" if name == "mtv" else f"declares {name}.*expected a method and its"
            self.refused(ArgumentError, told, "pretrained=tiny", "custom", include=folder)

    def test_a_control_that_is_no_control(self):
        self.refused(ArgumentError, "is MTV itself, no control", "pretrained=tiny,method=degraded", "shapes_color_en")

    def test_a_target_that_names_no_column(self, tmp_path):
        """The harness would answer every demonstration with the name itself."""
        folder = task_file(tmp_path, doc_to_target=None)
        with (folder / "custom.yaml").open("a") as file:
            file.write("doc_to_target: answer\n")
        self.refused(DataError, "'answer', which is no column", f"pretrained=tiny,{SHORT}", "custom", include=folder)
