"""What the pictures show, and the documents of the tasks."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from lmms_mtv.pictures import documents, names

DATA = Path(__file__).parents[3] / "tasks" / "pictures" / "data"


def test_every_picture_shows_one_thing_and_every_thing_has_a_name_of_its_own():
    things, countries = names.things(), names.countries()
    assert len(things) == 371
    assert len(countries) == 161
    assert len(names.codes()) == len(set(names.codes().values())) == 532
    assert all(each.english and each.spanish and each.german for each in things)
    assert all(each.country and each.capital and each.currency for each in countries)
    assert {each.english: each.spanish for each in things}["dog"] == "perro"
    assert {each.country: (each.capital, each.currency) for each in countries}["Japan"] == ("Tokyo", "yen")


def test_no_category_is_most_of_the_answers():
    kinds = Counter(each.category for each in names.things() if each.category)
    assert len(kinds) == 8
    assert max(kinds.values()) / kinds.total() < 0.2


def test_the_files_are_those_that_the_script_writes(tmp_path):
    documents.main([str(tmp_path)])
    written = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert written == {path.name: path.read_text() for path in DATA.iterdir()}


@pytest.mark.parametrize("group", ["things", "flags", "episodes"])
def test_no_picture_is_in_training_and_in_evaluation(group):
    def codes(split: str) -> set[str]:
        rows = [json.loads(line) for line in (DATA / f"{group}_{split}.jsonl").read_text().splitlines()]
        return {each["code"] for row in rows for each in row.get("pictures", [row])}

    assert codes("train")
    assert codes("test")
    assert not codes("train") & codes("test")


def test_an_episode_asks_for_one_of_two_labelled_things_in_another_look():
    rows = [json.loads(line) for line in (DATA / "episodes_test.jsonl").read_text().splitlines()]
    for row in rows:
        first, second, asked = (each["code"] for each in row["pictures"])
        assert first != second
        assert row["labels"][0] != row["labels"][1]
        assert row["answer"] == row["labels"][[first, second].index(asked)]
    assert Counter(row["answer"] == row["labels"][0] for row in rows) == {True: 100, False: 100}
