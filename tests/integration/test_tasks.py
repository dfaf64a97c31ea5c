"""The paper's tasks: their prompts, their scores, and whole runs on small data in the official layout."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import get_task_dict
from loguru import logger

from lmms_mtv import TaskVector, cli, data
from lmms_mtv.errors import DataError
from lmms_mtv.fit.examples import Episode
from lmms_mtv.harness.lmms.bases.hf import HfBase, HfConfig
from lmms_mtv.harness.lmms.task import TaskPrompts
from lmms_mtv.harness.paths import LM_EVAL, tasks_folder
from support import checkpoints, golden, official_files, processes
from support.evaluations import task_manager

TASKS = (*official_files.TASKS, "english_spanish_colon", "antonyms_colon")
IMAGES = ("vizwiz", "okvqa", "flowers", "cub", "dtd")
SPLITS = {"vizwiz": "val", "okvqa": "val2014"}
SHORT = "iterations=4,fit_shots=2,steps=4,samples=4,examples=4,candidate_examples=2,candidates=2,reuse=False"


@pytest.fixture(autouse=True)
def small_data(prepared_data, monkeypatch):
    monkeypatch.setenv(data.FOLDER, str(prepared_data))


def prompts(task: str) -> TaskPrompts:
    return TaskPrompts(get_task_dict([task], task_manager(), "chat")[task], None)


def utils(folder: str):
    spec = importlib.util.spec_from_file_location(f"utils_of_{folder}", tasks_folder() / folder / "utils.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TestPrompts:
    @pytest.fixture(scope="class")
    def bases(self) -> dict[str, HfBase]:
        configs = {
            "raw": HfConfig(pretrained="tiny"),
            "chat": HfConfig(pretrained="tiny", prompt_style="chat"),
            "chat, demonstrations inline": HfConfig(pretrained="tiny", prompt_style="chat", fewshot_as_multiturn=False),
        }
        return {name: HfBase(config) for name, config in configs.items()}

    @pytest.mark.parametrize("task", TASKS)
    def test_golden(self, task, bases, request):
        """What the processor gets, for a zero-shot, a two-shot and a fitting prompt."""
        made = prompts(task)
        split = SPLITS.get(task, "test")
        shown = []
        for shots in (0, 2):
            prompt = made.evaluation(0, split, shots, seed=0)
            for style, base in bases.items():
                if shots or "inline" not in style:
                    shown.append((f"{shots}-shot, {style}, {len(prompt.images())} images", base.rendered(prompt)))
        prompt = made.prompt(Episode(0, (1, 2)))
        shown.append(("fitting, 2-shot, raw", bases["raw"].rendered(prompt)))
        shown.append(("its target", prompt.target_delimiter + prompt.target + prompt.fewshot_delimiter))
        text = "".join(f"=== {title}\n{body}⏎\n" for title, body in shown)
        golden.check(f"{task}.txt", text, request.config.getoption("--update-snapshots"))

    @pytest.mark.parametrize("shots", [0, 2])
    def test_the_authors_vizwiz_prompt(self, shots):
        made = prompts("vizwiz")
        prompt = made.prompt(Episode(5, tuple(range(shots))))
        rows = data.documents("vizwiz", "train")
        expected = (
            "First carefully understand the given examples. \n"
            "Then use the given image and answer the question in the same way as the examples. \n"
            "If the question can not be answered, respond unanswerable. "
        )
        for row in rows.select(range(shots)):
            expected += f"<image>{row['question']} Answer: {row['answer']}"
        expected += f"<image>{rows[5]['question']} Answer:"
        assert prompt.raw("<image>") == expected
        assert prompt.target == rows[5]["answer"]

    @pytest.mark.parametrize("shots", [0, 2])
    def test_the_authors_okvqa_prompt(self, shots):
        prompt = prompts("okvqa").prompt(Episode(5, tuple(range(shots))))
        rows = data.documents("okvqa", "train")
        # No space before the answer, nothing between demonstrations.
        expected = "".join(f"<image>{row['question']} Answer:{row['answer']}" for row in rows.select(range(shots)))
        assert prompt.raw("<image>") == expected + f"<image>{rows[5]['question']} Answer:"

    @pytest.mark.parametrize(("task", "noun"), [("flowers", "flower"), ("cub", "bird"), ("dtd", "texture")])
    def test_the_authors_episode(self, task, noun, prepared_data):
        stated = json.loads(next((prepared_data / "official" / task).glob("*_train.json")).read_text())
        made = prompts(task)
        seen = set()
        for number, episode in enumerate(stated):
            prompt = made.prompt(Episode(number, ()))
            swapped = prompt.target == "B"
            seen.add(swapped)
            x, y = (episode[f"{side}_label"] for side in (("neg", "pos") if swapped else ("pos", "neg")))
            asked = (
                f"<image>What is the type of {noun} in the image? A.{x} B.{y}\n"
                "Answer with the option's letter from the given choice directly. Answer:"
            )
            assert prompt.raw("<image>") == f"{asked} A\n{asked} B\n{asked}"
            order = ("neg", "pos", "query") if swapped else ("pos", "neg", "query")
            expected = [data.image(task, f"images/{Path(episode[side]).name}").tobytes() for side in order]
            assert [image.tobytes() for image in prompt.images()] == expected
        assert seen == {True, False}

    def test_the_word_pair_prompts(self):
        rows = data.documents("english_spanish", "train")
        first, second, query = (rows[i] for i in (0, 1, 5))
        prompt = prompts("english_spanish").prompt(Episode(5, (0, 1)))
        assert (
            prompt.raw("")
            == "".join(f"Q: {row['input']}\nA: {row['output']}\n\n" for row in (first, second))
            + f"Q: {query['input']}\nA:"
        )
        prompt = prompts("english_spanish_colon").prompt(Episode(5, (0, 1)))
        assert (
            prompt.raw("")
            == "".join(f"{row['input']}:{row['output']}, " for row in (first, second)) + f"{query['input']}:"
        )

    def test_other_chat_models_get_the_instruction_before_the_image(self):
        made = prompts("vizwiz")
        config = made._task.config
        (message,) = made._task.doc_to_messages(made._task.dataset["val"][0])
        assert [part["type"] for part in message["content"]] == ["text", "image", "text"]
        assert message["content"][0]["text"] == config.description

    def test_demonstrations_of_another_data_set_are_refused(self, prepared_data):
        made = prompts("dtd")
        other = TaskPrompts(made._task, f"{prepared_data / 'vizwiz'}:train")
        with pytest.raises(DataError, match="takes its demonstrations from its own data"):
            len(other)

    @pytest.mark.parametrize("task", IMAGES)
    def test_demonstrations_are_loaded_only_when_they_are_needed(self, task):
        made = prompts(task)
        made.evaluation(0, SPLITS.get(task, "test"), 0, seed=0)
        assert made._task.dataset["train"].column_names == ["data"]
        assert len(made) == 24
        assert made.training.split == "train"


# Answer, the ten annotators, and the accuracy worked out by hand from the definition: the mean over the ten subsets of
# nine annotators of min(1, matches / 3).
VQA_CASES = [
    ("cat", ["cat"] * 10, 1.0),
    ("cat", ["cat"] * 4 + ["dog"] * 6, 1.0),
    # Three agree: seven subsets keep all three (1), three keep two (2/3).
    ("cat", ["cat"] * 3 + ["dog"] * 7, (7 + 3 * 2 / 3) / 10),
    # Two agree: eight subsets with two (2/3), two with one (1/3).
    ("cat", ["cat"] * 2 + ["dog"] * 8, (8 * 2 / 3 + 2 / 3) / 10),
    ("cat", ["cat"] + ["dog"] * 9, 9 / 10 / 3),
    ("cat", ["dog"] * 10, 0.0),
    # A tie of five and five: both are right.
    ("cat", ["cat"] * 5 + ["dog"] * 5, 1.0),
    ("dog", ["cat"] * 5 + ["dog"] * 5, 1.0),
    ("Unanswerable", ["unanswerable"] * 9 + ["cat"], 1.0),
    ("unanswerable.", ["unanswerable"] * 3 + ["cat"] * 7, 0.9),
    ("The cat!", ["a cat"] * 10, 1.0),
    ("two", ["2"] * 10, 1.0),
    ("yes, it is", ["yes it is"] * 10, 1.0),
    ("dont know", ["don't know"] * 10, 1.0),
    ("", ["cat"] * 10, 0.0),
]


class TestScores:
    @pytest.mark.parametrize(("answer", "annotators", "expected"), VQA_CASES)
    def test_vqa_accuracy(self, answer, annotators, expected):
        assert utils("vqa").vqa_accuracy(answer, annotators) == pytest.approx(expected, abs=1e-12)

    def test_the_answer_ends_at_a_full_stop_or_line_break(self):
        score = utils("vqa").score
        doc = {"answers": ["cat"] * 10}
        for text, expected in ((" cat. It sits", 1.0), ("cat\ndog", 1.0), ("dog. cat", 0.0), ("", 0.0), ("\ncat", 0.0)):
            assert score(doc, [text]) == {"vqa_accuracy": expected}

    def test_raw_and_stemmed_answers_are_two_scores_and_the_document_stays_as_it_is(self):
        doc = {"answers": ["racing"] * 10, "answers_stemmed": ["race"] * 10}
        before = json.dumps(doc)
        scores = utils("vqa").scores
        assert scores(doc, ["Racing"]) == {"vqa_accuracy_raw": 1.0, "vqa_accuracy_stemmed": 0.0}
        assert scores(doc, ["race."]) == {"vqa_accuracy_raw": 0.0, "vqa_accuracy_stemmed": 1.0}
        assert json.dumps(doc) == before

    def test_vqa_accuracy_is_lmms_evals(self):
        from lmms_eval.tasks.ok_vqa.utils import ok_vqa_process_results

        for answer, annotators, _ in VQA_CASES:
            theirs = ok_vqa_process_results({"answers": list(annotators), "question_id": 0}, [answer])["exact_match"]
            assert utils("vqa").vqa_accuracy(answer, annotators) == pytest.approx(theirs, abs=1e-12)

    def test_letters_and_words(self):
        episode, word = utils("episodes").score, utils("words").score
        for text, expected in (("B", 1.0), (" b.", 1.0), ("B\nA", 1.0), ("A", 0.0), ("Both", 0.0), ("", 0.0)):
            assert episode({"answer": "B"}, [text]) == {"exact_match": expected}
        for text, expected in ((" Perra", 1.0), ("perra \n\nQ: cat\nA: gata", 1.0), ("la perra", 0.0), ("", 0.0)):
            assert word({"output": "perra"}, [text]) == {"exact_match": expected}
        assert utils("words").score_cased({"output": "Perra"}, [" Perra\nQ:"]) == {"exact_match": 1.0}
        assert utils("words").score_cased({"output": "Perra"}, ["perra"]) == {"exact_match": 0.0}
        assert utils("words").score_colon({"output": "perra"}, ["perra, cat:gata"]) == {"exact_match": 1.0}
        assert utils("words").score_colon({"output": "perra"}, ["gata, perra"]) == {"exact_match": 0.0}

    def test_a_missing_image_ends_a_command_even_inside_a_wrapper_that_swallows_errors(self, monkeypatch):
        doc = {"data": "vizwiz", "image": "images/none.jpg", "images": ["images/none.jpg"], "question": "?"}
        doc |= {"a": "x", "b": "y"}
        for folder, name in (("vqa", "visual"), ("vqa", "vizwiz_messages"), ("episodes", "bird_messages")):
            with pytest.raises(DataError, match=r"none\.jpg"):
                getattr(utils(folder), name)(doc)
        monkeypatch.setitem(sys.modules, "lmms_eval.__main__", sys)
        for folder, name in (("vqa", "visual"), ("vqa", "vizwiz_messages"), ("episodes", "bird_messages")):
            with pytest.raises(SystemExit, match=r"lmms-mtv: DocumentError: .*none\.jpg"):
                getattr(utils(folder), name)(doc)


def run(model: str, arguments: str, tasks: tuple[str, ...], output: Path, *more: str) -> dict[str, dict]:
    """The harness's own command in a process of its own; the results of each task."""
    done = processes.run(
        [
            *(sys.executable, "-m", "lmms_eval", "--model", model, "--model_args", arguments),
            *("--tasks", ",".join(tasks), "--output_path", str(output), *more),
        ],
        cwd=output.parent,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = output.rglob("*_results.json")
    results = json.loads(path.read_text())["results"]
    assert set(tasks) <= results.keys()
    for task in tasks:
        scores = {key: value for key, value in results[task].items() if key.endswith(",none") and "stderr" not in key}
        assert scores
        assert all(0 <= value <= 1 for value in scores.values())
    return results


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [SHORT, "method=none,shots=2"], ids=["mtv", "2-shot"])
def test_every_task_runs_with_the_plugins_model(arguments, tmp_path):
    results = run("mtv", f"pretrained=tiny,batch_size=4,{arguments}", TASKS, tmp_path / "out")
    assert {"vqa_accuracy_raw,none", "vqa_accuracy_stemmed,none"} <= results["okvqa"].keys()
    (record,) = (tmp_path / "out").rglob("*_mtv.json")
    found = json.loads(record.read_text())["tasks"]
    assert found.keys() == set(TASKS)
    # Answers came out, whatever they are worth.
    assert all(entry["evaluation"]["output_tokens"] > 1 for entry in found.values())
    if arguments == SHORT:
        assert all(entry["heads"] and entry["split"] == "train" for entry in found.values())


@pytest.mark.slow
def test_every_task_runs_with_a_chat_model_of_lmms_eval(tmp_path):
    pytest.importorskip("decord", reason="their wrapper imports it, and it has no wheel for this machine")
    folder = checkpoints.qwen2_5_vl(tmp_path / "model")
    arguments = f"pretrained={folder},device=cpu,device_map=cpu,min_pixels=64,max_pixels=1024"
    run("qwen2_5_vl", arguments, official_files.TASKS, tmp_path / "out", "--log_samples")
    for path in (tmp_path / "out").rglob("*_samples_*.jsonl"):
        answers = [str(json.loads(line)["filtered_resps"]) for line in path.read_text().splitlines()]
        assert all(answers), path.name
        # The tiny model knows none of the made-up words, but it does see.
        text = path.name.endswith(("_english_spanish.jsonl", "_antonyms.jsonl", "_words_capitalize.jsonl"))
        assert text or len(set(answers)) > 1, path.name


@pytest.mark.slow
def test_every_task_with_images_runs_with_a_simple_model_of_lmms_eval(tmp_path):
    folder = checkpoints.idefics2(tmp_path / "model")
    arguments = f"pretrained={folder},device=cpu,device_map=cpu,dtype=float32"
    run("idefics2", arguments, IMAGES, tmp_path / "out", "--log_samples")
    (samples,) = (tmp_path / "out").rglob("*_samples_vizwiz.jsonl")
    first = json.loads(samples.read_text().splitlines()[0])
    assert first["input"].startswith("First carefully understand the given examples. \nThen use")
    question = data.documents("vizwiz", "val")[first["doc_id"]]["question"]
    assert first["input"].endswith(f"respond unanswerable. {question} Answer:")


@pytest.mark.slow
def test_the_base_answers_as_lmms_evals_own_idefics2_does(tmp_path):
    """Same checkpoint, same prompts, same answers, one by one."""
    folder = checkpoints.idefics2(tmp_path / "model")
    arguments = {
        "idefics2": f"pretrained={folder},device=cpu,device_map=cpu,dtype=float32",
        "mtv": f"pretrained={folder},method=none,prompt_style=chat,batch_size=3",
    }
    tasks = ["shapes_color_en", "shapes_phrase_en", "shapes_position_es"]
    answers: dict[str, list[str]] = {}
    for model, given in arguments.items():
        manager = task_manager(model)
        samples = simple_evaluate(model, given, tasks=tasks, task_manager=manager, limit=12)["samples"]
        answers[model] = [
            sample["filtered_resps"][0]
            for task in tasks
            for sample in sorted(samples[task], key=lambda sample: sample["doc_id"])
        ]
    # Their wrapper does not stop at the task's "until".
    theirs = [answer.split("\n")[0].strip() for answer in answers["idefics2"]]
    assert [answer.strip() for answer in answers["mtv"]] == theirs
    assert len(set(theirs)) > 3
    assert sum(mine.strip() == other.strip() for mine, other in zip(*answers.values(), strict=True)) > 6


@pytest.mark.slow
def test_missing_data_ends_the_command_with_the_line_that_mends_it(tmp_path, monkeypatch):
    monkeypatch.setenv(data.FOLDER, str(tmp_path))
    done = processes.run(
        [
            *(sys.executable, "-m", "lmms_eval", "--model", "mtv", "--model_args", "pretrained=tiny,method=none"),
            *("--tasks", "dtd", "--output_path", str(tmp_path / "out")),
        ],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        timeout=300,
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("lmms-mtv: DataError: ")
    assert "lmms-mtv prepare dtd --source FOLDER --output DATA" in last
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_evaluation_that_fails_keeps_the_fitted_vector(prepared_data, tmp_path, monkeypatch):
    """An image vanishes between the preparation and the run: the error names it, the fit is not lost."""
    from lmms_eval.api.task import Task

    monkeypatch.setattr(Task, "args", None, raising=False)
    shutil.copytree(prepared_data / "vizwiz", tmp_path / "data" / "vizwiz")
    (tmp_path / "data" / "vizwiz" / "images" / "VizWiz_val_00000004.jpg").unlink()
    monkeypatch.setenv(data.FOLDER, str(tmp_path / "data"))
    given = argparse.Namespace(output_path=str(tmp_path / "out"), process_with_media=False, reasoning_tags=None)
    manager = task_manager()
    said: list[str] = []
    handler = logger.add(lambda message: said.append(message.record["message"]), level="WARNING")
    simple_evaluate("mtv", f"pretrained=tiny,{SHORT}", tasks=["vizwiz"], task_manager=manager, cli_args=given)
    logger.remove(handler)
    assert [line for line in said if "VizWiz_val_00000004.jpg of task vizwiz" in line and "lmms-mtv prepare" in line]
    (stored,) = (tmp_path / "out").rglob("*_mtv.json")
    assert json.loads(stored.read_text())["tasks"]["vizwiz"]["evaluation"]["unreadable"] == 1
    (saved,) = (tmp_path / "out").rglob("vector.safetensors")
    assert TaskVector.load(saved).card.task == "vizwiz"


class TestWords:
    """The twenty files of word pairs: one data set and one task in each harness for each of them."""

    NAMES = tuple(source.task for source in data.words.SOURCES)

    def test_each_is_a_task_of_both_harnesses_and_of_the_group(self):
        files = {path.stem for path in (tasks_folder() / "words").glob("*.yaml")} - {"words"}
        of_lm_eval = {path.stem for path in (tasks_folder() / LM_EVAL).glob("*.yaml")}
        colon = {"english_spanish_colon", "antonyms_colon"}
        assert files == of_lm_eval == {*self.NAMES, *colon}
        group = yaml.safe_load((tasks_folder() / "words" / "words.yaml").read_text())
        assert sorted(group["task"]) == sorted(self.NAMES)

    def test_each_is_prepared_and_loaded_by_its_name(self, tmp_path, monkeypatch, capsys):
        """A row that two tasks share would be the data of one of them under the name of the other."""
        source = tmp_path / "official"
        source.mkdir()
        for name, file in data.words._FILES.items():
            pairs = [{"input": f"{name} {number}", "output": f"answer {number}"} for number in range(20)]
            (source / file.name).write_text(json.dumps(pairs))
        cli.main(["prepare", "words", "--source", str(source), "--output", str(tmp_path / "data"), "--partial"])
        assert capsys.readouterr().out.count("14 train, 1 validation, 5 test") == len(self.NAMES) == 20
        monkeypatch.setenv(data.FOLDER, str(tmp_path / "data"))
        tasks = get_task_dict(list(self.NAMES), task_manager(), "chat")
        for name, task in tasks.items():
            assert all(doc["input"].startswith(f"{name} ") for doc in task.test_docs())
            assert task.config.process_results.__name__ == ("score_cased" if "capitalize" in name else "score")
            assert task.config.metadata["mtv"] == {
                "demonstrations": "train",
                "mtv": {"fit_shots": 10, "steps": 300, "samples": 16},
            }
