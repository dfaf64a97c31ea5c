"""The shapes benchmark: its scenes, its splits, its tasks, the tiny model and its training."""

from __future__ import annotations

import json
import random
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, Idefics3ForConditionalGeneration

from lmms_mtv import find_sites
from lmms_mtv.harness.lmms.plugin import tasks_folder
from lmms_mtv.shapes import CHECKPOINT, questions, scenes, tiny, train, words

DATA = tasks_folder() / "shapes" / "data"


def lines(split: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_stored_splits_are_those_of_the_seed_and_disjoint():
    stored = {split: [scenes.from_mapping(line) for line in lines(split)] for split in scenes.SPLITS}
    assert stored == scenes.splits()
    assert {split: len(found) for split, found in stored.items()} == {"train": 400, "test": 200}
    assert not set(stored["train"]) & set(stored["test"])
    assert [line["id"] for line in lines("test")][:2] == ["test-000", "test-001"]


def test_no_word_names_two_things():
    names = [words.name(a, v, lang) for a in words.ATTRIBUTES for v in words.values(a) for lang in words.LANGUAGES]
    names += [label for attribute in words.LABELS for label in words.LABELS[attribute]]
    assert len(set(names)) == len(names)


def test_a_scene_is_drawn_as_it_is_described():
    scene = scenes.Scene("red", "square", "teal", "left", 0, 0, 20)
    image = scenes.draw(scene)
    assert image.size == (scenes.SIDE, scenes.SIDE)
    assert image.mode == "RGB"
    assert image.getpixel((28, 64)) == (220, 30, 30)
    assert image.getpixel((100, 64)) == (20, 165, 165)
    drawn = {image.tobytes() for image in map(scenes.draw, islice(scenes.distinct(random.Random(0)), 200))}
    assert len(drawn) == 200, "different scenes look different"


def test_every_value_can_be_drawn():
    for shape in words.values("shape"):
        image = scenes.draw(scenes.Scene("blue", shape, "white", "center", 0, 0, 24))
        inked = sum(count for count, color in image.getcolors() if color == (40, 60, 220))
        assert 300 < inked < 2500


def test_answers_of_the_nine_tasks():
    scene = scenes.Scene("red", "circle", "gray", "top", 0, 0, 20)
    answers = {name: answer(scene) for name, answer in questions.TASKS.items()}
    assert answers == {
        "color_en": "red",
        "color_es": "rojo",
        "shape_en": "circle",
        "shape_es": "círculo",
        "background_en": "gray",
        "background_es": "gris",
        "position_en": "top",
        "position_es": "arriba",
        "phrase_en": "red circle",
    }


@pytest.mark.parametrize("attribute", ["position", "shape"])
def test_labels_are_a_permutation_that_never_changes(attribute):
    answer = questions.labels(attribute)
    found = {scene.__getattribute__(attribute): answer(scene) for scene in scenes.splits()["train"]}
    assert sorted(found.values()) == sorted(words.LABELS[attribute])
    again = questions.labels(attribute)
    assert all(answer(scene) == again(scene) for scene in scenes.splits()["test"])


def test_the_bundled_checkpoint_is_a_genuine_one():
    size = sum(path.stat().st_size for path in CHECKPOINT.iterdir())
    assert size < 8e6
    model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT)
    assert isinstance(model, Idefics3ForConditionalGeneration)
    assert find_sites(model).shape == (4, 8, 16)
    assert sum(parameter.numel() for parameter in model.parameters()) < 1.5e6
    assert any(path.suffix == ".log" for path in CHECKPOINT.iterdir())


@pytest.mark.parametrize("chat", [False, True], ids=["raw", "chat"])
def test_training_sees_what_the_harness_will_show(chat):
    """Token ids and pixels of a training sequence equal those of the processor on the same prompt."""
    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    shown = list(islice(scenes.distinct(random.Random(0)), 3))
    bank = train.Bank.drawn(processor, shown)
    answer = questions.TASKS["phrase_en"]
    items = [(index, questions.QUESTION, answer(scene)) for index, scene in enumerate(shown)]
    batch = train.encode(processor, bank, [items], [chat])

    from lmms_mtv.harness.lmms.bases.hf import HfBase, HfConfig
    from lmms_mtv.models.prompts import Demonstration, Prompt

    def asked(scene: scenes.Scene) -> list[dict]:
        content = [{"type": "image", "url": scenes.draw(scene)}, {"type": "text", "text": questions.QUESTION}]
        return [{"role": "user", "content": content}]

    base = HfBase(HfConfig(pretrained="tiny", prompt_style="chat" if chat else "raw"))
    prompt = Prompt(
        asked(shown[2]),
        [Demonstration(asked(scene), answer(scene)) for scene in shown[:2]],
        answer(shown[2]),
        fewshot_delimiter="\n",
    )
    inputs = base._inputs([prompt], 0)
    target = base.target_ids(prompt)
    length = inputs["input_ids"].shape[1]
    assert batch.input_ids[0, : length + len(target)].tolist() == inputs["input_ids"][0].tolist() + target
    torch.testing.assert_close(batch.pixel_values[0], inputs["pixel_values"][0])
    assert batch.labels[0][batch.labels[0] != -100][-len(target) :].tolist() == target
    first, second, end = base._tokenizer.convert_ids_to_tokens(target)
    assert (first, second) == tuple(answer(shown[2]).split())
    assert end == (tiny.END_OF_TURN if chat else "\n")


@pytest.mark.slow
def test_training_never_sees_the_benchmark_and_continues_where_it_stopped(tmp_path):
    config = train.TrainConfig(
        seed=3, seeing_steps=3, steps=4, seeing_batch=4, batch=2, scenes=40, evaluate_every=100, log_every=100
    )
    whole = train.train(config, tmp_path / "whole")
    train.train(config, tmp_path / "parts", until=4)
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    resumed = train.train(config, tmp_path / "parts")
    for (name, one), (_, other) in zip(whole.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert torch.equal(one, other), name
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "parts")
    assert torch.equal(loaded.lm_head.weight, whole.lm_head.weight)

    held_out = {scene for split in scenes.splits().values() for scene in split}
    stream = scenes.distinct(random.Random(0), exclude=held_out)
    assert not held_out & set(islice(stream, 3000))


def test_the_log_of_the_run_is_of_this_architecture():
    log = (CHECKPOINT / "train.log").read_text(encoding="utf-8")
    assert "TrainConfig(" in log
    assert f"step {train.TrainConfig().total} accuracy" in log


def test_training_data_folder_has_nothing_else():
    assert sorted(path.name for path in Path(DATA).iterdir()) == ["test.jsonl", "train.jsonl"]
