"""``lmms-mtv library``: what a person reads, what a program reads, and the exit status."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import sys
import time
from pathlib import Path

import pytest

from lmms_mtv import Library, TaskVector
from lmms_mtv.cli import main
from lmms_mtv.vectors.library import page
from support.vectors import card, vector


@pytest.fixture
def library(tmp_path, monkeypatch) -> Library:
    """A library of three vectors, which the variable names."""
    monkeypatch.setenv("LMMS_MTV_LIBRARY", str(tmp_path / "library"))
    library = Library()
    library.add(vector(losses={"unedited": [2.0], "chosen": [0.25]}))
    library.add(vector(values=1, seed=1))
    library.add(vector(task="other/task", method="random", model="owner/" + "long" * 20))
    return library


def run(*arguments: object) -> None:
    main(["library", *map(str, arguments)])


def fails(*arguments: object) -> str:
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert isinstance(caught.value.code, str)  # which Python prints, with status 1
    assert caught.value.code.startswith("lmms-mtv: ")
    return caught.value.code


def test_ls_is_a_table_with_a_line_for_each_vector(library, capsys):
    run("ls")
    heading, *lines = capsys.readouterr().out.splitlines()
    assert heading.split() == ["id", "task", "method", "shots", "seed", "date", "loss", "size", "model"]
    assert [line.split()[0] for line in lines] == [entry.id for entry in library.entries()]
    first = next(line for line in lines if line.startswith(vector().id))
    assert "2.000 -> 0.250" in first
    assert first.endswith("some/model")
    assert len({line.index(entry.card.model) for line, entry in zip(lines, library.entries(), strict=True)}) == 1


def test_ls_tells_vectors_of_one_task_apart(tmp_path, capsys):
    library = Library(tmp_path)
    tried = {"queries": 8.0, "unedited": 0.25, "edited": 0.875, "endless": 0.0}
    for number, changes in enumerate(
        (
            {"config": {"steps": 600, "lr": 0.1, "top_k": None}, "accuracy": tried},
            {"config": {"steps": 3, "lr": 0.1, "names": ["a"] * 9}},
            {"config": {"steps": 3, "lr": 0.1}, "examples": "f" * 64},
            {"method": "icv", "config": {"lam": 1}},
        )
    ):
        written = time.mktime((2001 + number, 1, 1, 12, 0, 0, 0, 0, -1))
        os.utime(library.add(vector(**changes)), (written, written))
    run("ls", "--library", tmp_path)
    heading, *lines = capsys.readouterr().out.splitlines()
    assert heading.split()[5:] == ["settings", "date", "accuracy", "size", "model"]
    assert sorted(line[heading.index("shots") : heading.rindex("size")].split() for line in lines) == [
        ["0", "0", "-", "2004-01-01", "12:00", "-"],
        [
            "0",
            "0",
            'names=["a",',
            '"a",',
            '"a",\u2026,',
            "steps=3,",
            "examples=eeeeeeeeeeeeeee\u2026",
            "2002-01-01",
            "12:00",
            "-",
        ],
        ["0", "0", "steps=3,", "examples=fffffffffffffff\u2026", "2003-01-01", "12:00", "-"],
        ["0", "0", "steps=600,", "examples=eeeeeeeeeeeeeee\u2026", *["2001-01-01", "12:00", "0.25", "->", "0.88"]],
    ]

    told = fails("show", "task/mtv", "--library", tmp_path)
    assert "They differ in settings alone: give an id (`lmms-mtv library` takes the newest with --latest)" in told
    assert "2003-01-01 12:00, steps=3, examples=fff" in told
    run("show", "task/mtv", "--library", tmp_path, "--latest", "--json")
    assert json.loads(capsys.readouterr().out)["card"]["examples"] == "f" * 64


def test_the_latest_is_the_newest_of_those_that_are_left(library, capsys):
    """Criteria come first, and vectors that were made of others last."""
    path = library.folder(card()) / "vector.safetensors"
    os.utime(path, (2e9, 2e9))
    run("combine", vector().id, vector(seed=1).id, "--task", "task")
    capsys.readouterr()
    for flags, seed in (((), 0), (("--seed", 1), 1)):
        run("show", "task/mtv", "--latest", "--json", *flags)
        assert json.loads(capsys.readouterr().out)["card"]["seed"] == seed


class TestGc:
    def test_vectors_that_no_result_names_are_listed_and_with_yes_removed(self, library, tmp_path, capsys):
        run("combine", vector().id, vector(seed=1).id, "--task", "both")
        combined, unnamed = library.resolve("both/combination"), library.resolve("other/task/random")
        for name, text in (("a.txt", unnamed.id), ("cells/b.json", json.dumps({"mtv": {"id": combined.id}}))):
            path = tmp_path / "results" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        capsys.readouterr()
        run("gc", tmp_path / "results")
        _, line, last = capsys.readouterr().out.splitlines()
        assert line.startswith(unnamed.id)
        assert last.startswith(f"1 of 4 vectors in {library.root} (")
        assert last.endswith("named by no result. Nothing is removed: pass --yes to remove them")
        assert len(library.entries()) == 4
        run("gc", tmp_path / "results", "--yes")
        assert "removed 1 of 4 vectors" in capsys.readouterr().out
        assert {entry.id for entry in library.entries()} == {combined.id, vector().id, vector(seed=1).id}
        run("gc", tmp_path / "results", "--yes")
        assert capsys.readouterr().out == f"every vector in {library.root} is named by a result\n"

    def test_folders_that_name_nothing_remove_nothing(self, library, tmp_path):
        (tmp_path / "empty").mkdir()
        assert "names a vector of this library, so nothing is removed" in fails("gc", tmp_path / "empty", "--yes")
        assert "there is no folder" in fails("gc", tmp_path / "nowhere", "--yes")
        # Part of a longer number is no id.
        (tmp_path / "empty" / "a.json").write_text(f'"{vector().id}0"')
        assert "so nothing is removed" in fails("gc", tmp_path / "empty", "--yes")
        assert len(library.entries()) == 3


def test_ls_fits_the_terminal(library, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "70")
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda _: True, raising=False)
    run("ls")
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 70
    assert any(line.endswith("\u2026") for line in lines)
    assert all(entry.id in line for entry, line in zip(library.entries(), lines[1:], strict=True))


@pytest.mark.parametrize(
    ("filters", "count"),
    [((), 3), (("--model", "some/model"), 2), (("--task", "task", "--method", "mtv"), 2), (("--method", "none"), 0)],
    ids=str,
)
def test_ls_for_programs_has_the_cards(library, capsys, filters, count):
    run("ls", "--json", *filters)
    found = json.loads(capsys.readouterr().out)
    assert len(found) == count
    wanted = {entry.id: entry for entry in library.entries()}
    for one in found:
        entry = wanted[one["id"]]
        assert (one["path"], one["bytes"]) == (str(entry.path), entry.bytes)
        assert one["card"] == json.loads(json.dumps(dataclasses.asdict(entry.card)))


def test_an_empty_library_says_where_it_is(tmp_path, capsys):
    run("ls", "--library", tmp_path / "empty")
    assert capsys.readouterr().out == f"no vector in {tmp_path / 'empty'}\n"
    run("ls", "--library", tmp_path / "empty", "--json")
    assert json.loads(capsys.readouterr().out) == []


def test_show_prints_what_is_known_of_a_vector(library, capsys):
    run("show", "task/mtv", "--seed", 1)
    said = capsys.readouterr().out
    for name, value in page.facts(library.get(card(seed=1))):
        assert f"{name}  " in said
        assert value in said
    assert "setting steps" in said
    run("show", "other/task/random", "--json")
    assert json.loads(capsys.readouterr().out)["heads"] == [[0, 0], [1, 1]]


def test_a_card_cannot_write_to_the_terminal_what_it_likes(library, capsys):
    made = vector(task="x\x1b[2J\n\u202eid", config={"a": "\x1b[31m"})
    library.add(made)
    for arguments in (("ls",), ("show", made.id), ("rm", made.id, "--yes")):
        run(*arguments)
        said = capsys.readouterr().out
        assert "\x1b" not in said
        assert "\u202e" not in said
        assert "x\ufffd[2J\ufffd\ufffdid" in said


def test_rm_asks_and_says_what_it_removed(library, capsys, monkeypatch):
    wanted = vector().id
    for answer, left in (("n\n", 3), ("\n", 3), ("y\n", 2)):
        monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
        run("rm", wanted)
        said = capsys.readouterr().out
        assert f"remove {wanted} (mtv for task of some/model) in " in said
        assert said.endswith("nothing is removed\n") == (left == 3)
        assert len(library.entries()) == left
    assert f"removed {wanted}" in said
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert "nothing is removed: pass --yes" in fails("rm", "other/task/random")
    run("rm", "other/task/random", "--yes")
    assert [entry.card.seed for entry in library.entries()] == [1]


def test_verify_has_the_status_of_what_it_finds(library, capsys):
    run("verify")
    assert capsys.readouterr().out == f"{library.root}: 3 vectors, 0 problems\n"
    path = library.folder(card()) / "vector.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(SystemExit) as caught:
        run("verify")
    assert caught.value.code == 1
    said = capsys.readouterr().out
    assert said.count(str(path)) == 1
    assert said.endswith("1 problems\n")
    with pytest.raises(SystemExit):
        run("verify", "--json")
    (problem,) = json.loads(capsys.readouterr().out)
    assert problem["path"] == str(path)
    assert "fit the vector again" in problem["problem"]


def test_combine_makes_a_vector_that_is_found(library, capsys):
    first, second = vector().id, vector(seed=1).id
    run("combine", first, "task/mtv", "--seed", 1, "--weights", 1.5, -0.5, "--task", "both")
    made = library.resolve("both/combination")
    assert made.card.parents == {first: 1.5, second: -0.5}
    assert f"combined {first}, {second} into {made.id}" in capsys.readouterr().out
    assert TaskVector.load(made.path).heads == ((0, 0), (1, 1))
    assert "sum to 2" in fails("combine", first, second, "--weights", 1, 1, "--task", "sum")
    run("combine", first, second, "--weights", 1, 1, "--any-sum", "--task", "sum")
    run("combine", first, second, "--task", "mean")
    assert set(library.resolve("mean/combination").card.parents.values()) == {0.5}


def test_errors_are_one_message_and_status_one(library, tmp_path):
    assert "no vector 'tusk/mtv'" in fails("show", "tusk/mtv")
    assert "They differ in seed: give seed or an id" in fails("show", "task/mtv")
    assert "is no repository of the hub" in fails("pull", "name")
    (tmp_path / "file").write_text("")
    assert "cannot be read" in fails("ls", "--library", tmp_path / "file")
    assert "HF_HUB_OFFLINE" in fails("push", vector().id, "owner/name")


def test_where_the_variable_points_no_test_finds_the_users_library():
    home = Path(os.path.expanduser("~"))
    assert not Library().root.is_relative_to(home / ".cache")
