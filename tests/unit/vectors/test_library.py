"""The vector library: what is added is found again, and nothing leaves its root or is half there."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import pickle
import random
import shlex
import shutil
import signal
import struct
import sys
import threading
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lmms_mtv import Library, TaskVector, VectorCard
from lmms_mtv.errors import ArgumentError, GeometryError, LibraryError, MtvError, VectorFileError
from lmms_mtv.runtime import files, tensor_files
from lmms_mtv.vectors.library import page
from lmms_mtv.vectors.library.place import FILE, PAGE, folder_name
from support import processes
from support.vectors import card, rewritten, vector

NAMES = st.one_of(
    st.text(max_size=300),
    st.text(alphabet="ab-./~\\ \x00A", max_size=12),
    st.sampled_from(
        ["..", "../../etc", "/etc/passwd", "C:\\x", "a" * 5000, "", ".", "a/b", "a--b", "a-/b", "a/-b", "\ud800"]
    ),
)


@pytest.fixture
def library(tmp_path) -> Library:
    return Library(tmp_path / "library")


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# Adding and finding


def test_what_is_added_is_found_by_its_recipe(library):
    made = vector()
    path = library.add(made)
    assert path == library.root / "some--model" / "task" / f"mtv-{made.id}" / FILE
    assert sorted(os.listdir(path.parent)) == [PAGE, FILE]
    found = library.get(card(seconds=99.0))
    assert found.card == made.card
    assert torch.equal(found.edits["heads"].value, made.edits["heads"].value)
    assert library.get(card(seed=1)) is None
    (entry,) = library.entries()
    assert (entry.path, entry.card, entry.bytes) == (path, made.card, path.stat().st_size)


def test_the_root_is_the_argument_the_variable_or_the_cache(tmp_path, monkeypatch):
    assert Library(tmp_path / "a").root == tmp_path / "a"
    monkeypatch.setenv("LMMS_MTV_LIBRARY", str(tmp_path / "b"))
    assert Library().root == tmp_path / "b"
    monkeypatch.setenv("LMMS_MTV_LIBRARY", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "c"))
    monkeypatch.setattr(sys, "platform", "linux")
    assert Library().root == tmp_path / "c" / "lmms-mtv" / "library"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sys, "platform", "darwin")
    assert Library().root == tmp_path / "home" / "Library" / "Caches" / "lmms-mtv" / "library"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert Library().root == tmp_path / "local" / "lmms-mtv" / "library"


def test_no_library_yet_is_an_empty_one(library):
    assert library.entries() == []
    assert library.verify() == []
    assert library.get(card()) is None
    assert not library.root.exists()


def test_an_equal_vector_is_left_alone_and_another_outcome_replaces_it(library):
    path = library.add(vector())
    before = path.stat()
    assert library.add(vector(seconds=9.0)) == path
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    library.add(vector(values=1))
    assert torch.equal(library.get(card()).edits["heads"].value, vector(values=1).edits["heads"].value)
    assert library.verify() == []
    assert sorted(os.listdir(path.parent)) == [PAGE, FILE]


def test_a_damaged_vector_is_a_warning_and_replaced(library, caplog):
    path = library.add(vector())
    path.write_bytes(path.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING):
        assert library.get(card()) is None
    assert f"{path} is damaged" in caplog.text
    assert "fit the vector again" in caplog.text
    assert [problem.path for problem in library.verify()] == [path]
    library.add(vector())
    assert library.get(card()) is not None
    assert library.verify() == []


def test_entries_are_sorted_and_read_without_tensors(library, monkeypatch, caplog):
    for task in ("b", "a"):
        for seed in (10, 9):
            library.add(vector(task=task, seed=seed))
    broken = library.add(vector(task="c"))
    broken.write_bytes(b"\0" * 7)
    monkeypatch.setattr(tensor_files, "parsed", None)
    with caplog.at_level(logging.WARNING):
        found = [(entry.card.task, entry.card.seed) for entry in library.entries()]
    assert found == [("a", 9), ("a", 10), ("b", 9), ("b", 10)]
    assert "library verify" in caplog.text


def test_permissions_are_those_of_any_file(library):
    mask = os.umask(0o022)
    try:
        path = library.add(vector())
    finally:
        os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o644
    assert path.parent.stat().st_mode & 0o777 == 0o755


def test_a_field_that_this_version_does_not_know_is_a_warning_and_a_missing_one_an_error(library, caplog):
    path = rewritten(library.add(vector()), lambda fields: fields.update(colour="red"))
    with caplog.at_level(logging.WARNING):
        assert library.get(card()).card == card()
    assert "colour" in caplog.text
    assert library.verify() == []
    rewritten(path, lambda fields: fields.pop("seed"))
    assert "lacks seed" in library.verify()[0].what
    with pytest.raises(VectorFileError, match="lacks seed"):
        library.resolve(str(path))


def test_removing_takes_the_vector_and_what_is_empty_then(library, tmp_path):
    library.add(vector(seed=1))
    library.add(vector())
    first, second = library.entries()
    library.remove(first)
    assert library.entries() == [second]
    (second.path.parent / "notes.txt").write_text("mine")
    library.remove(second)
    assert everything(library.root) & {FILE, PAGE} == set()
    assert (second.path.parent / "notes.txt").exists()
    outside = vector().save(tmp_path / "elsewhere" / FILE)
    with pytest.raises(LibraryError, match="not in the library"):
        library.remove(library.entry(outside))
    assert outside.exists()


def test_removing_the_last_vector_leaves_nothing(library):
    library.add(vector())
    library.remove(library.entries()[0])
    assert everything(library.root) == set()


# References


@pytest.fixture
def filled(library) -> Library:
    for changes in (
        {"seed": 0},
        {"seed": 1},
        {"seed": 0, "shots": 1},
        {"seed": 0, "model": "other/model"},
        {"task": "family/task", "method": "random"},
        {"seed": 0, "task": "settings", "config": {"steps": 1}},
        {"seed": 0, "task": "settings", "config": {"steps": 2}},
    ):
        library.add(vector(**changes))
    return library


def test_a_reference_is_a_path_an_id_or_a_task_and_method(filled, tmp_path):
    wanted = vector(task="family/task", method="random")
    path = filled.folder(wanted.card) / FILE
    for reference in (str(path), str(path.parent), wanted.id, wanted.id[:8].upper(), "family/task/random"):
        assert filled.resolve(reference).path == path
    outside = vector(task="outside").save(tmp_path / "outside" / FILE)
    assert filled.resolve(str(outside)).card.task == "outside"
    assert filled.resolve(str(outside.parent)).path == outside


def test_several_vectors_are_narrowed_in_order(filled):
    found = filled.resolve("task/mtv", model="some/model", seed=1)
    assert (found.card.model, found.card.seed) == ("some/model", 1)
    assert filled.resolve("task/mtv", model="some/model", seed=0, shots=1).card.shots == 1
    assert filled.resolve("task/mtv", model="other/model", seed=7, shots=7).card.model == "other/model"


def test_a_criterion_that_leaves_nothing_is_an_error_that_says_so(filled):
    with pytest.raises(ArgumentError, match=r"'task/mtv' is 3 vectors, none of them with seed 5"):
        filled.resolve("task/mtv", model="some/model", seed=5, shots=1)


def test_an_ambiguous_reference_lists_what_tells_them_apart(filled):
    with pytest.raises(ArgumentError, match=r"4 vectors. They differ in model, shots, seed") as caught:
        filled.resolve("task/mtv")
    for entry in (entry for entry in filled.entries() if entry.card.task == "task"):
        line = f"{entry.id}: model {entry.card.model}, task task, method mtv, shots {entry.card.shots}"
        assert f"{line}, seed {entry.card.seed}" in str(caught.value)
    with pytest.raises(ArgumentError, match=r"2 vectors. They differ in seed: give seed or an id"):
        filled.resolve("task/mtv", model="some/model", shots=0)
    with pytest.raises(ArgumentError, match="They differ in settings alone: give an id"):
        filled.resolve("settings/mtv")


def test_an_unknown_reference_names_what_is_near(filled):
    for reference, near in (("tasks/mtv", "task/mtv"), ("family/task", "family/task/random")):
        with pytest.raises(ArgumentError, match=rf"no vector '{reference}'.*Near it: {near}.*lmms-mtv library ls"):
            filled.resolve(reference)
    with pytest.raises(VectorFileError, match="no vector file at"):
        filled.resolve("./nowhere")
    with pytest.raises(ArgumentError, match="no vector 'abc'"):
        filled.resolve("abc")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(reference=NAMES.filter(lambda name: not name.startswith("hub:")))
@example("~nobody-of-this-name/x")
@example("./\0")
@example("/" + "a" * 5000)
@example("../" * 20 + "etc/passwd")
def test_no_reference_finds_what_is_not_a_vector(filled, reference):
    with pytest.raises(MtvError):
        filled.resolve(reference)


def test_a_reference_does_not_lead_out_of_the_root(filled, tmp_path, monkeypatch):
    """What is beside the library is found by its path from the working folder, never by one from the root."""
    vector(task="outside").save(tmp_path / "outside" / FILE)
    monkeypatch.chdir(filled.root)
    assert filled.resolve("../outside").card.task == "outside"
    (tmp_path / "here" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "deep")
    for reference in ("../outside", "some--model/../../outside", "task/../../../outside", "outside", "./outside"):
        with pytest.raises(MtvError, match=r"no vector"):
            filled.resolve(reference)


# Names


@given(model=NAMES, task=NAMES, method=NAMES)
def test_any_card_has_a_folder_inside_the_root(model, task, method):
    library = Library(Path("/some/root"))
    folder = library.folder(card(model=model, task=task, method=method))
    assert Path(os.path.normpath(folder)) == folder
    parts = folder.relative_to(library.root).parts
    assert len(parts) == 3
    for part in parts:
        assert part.isascii()
        assert part.isprintable()
        assert not part.startswith(".")
        assert not set(part) & set('/\\:*?"<>|')
        assert len(part) <= 128


@given(first=NAMES, second=NAMES)
@example("a/b", "a--b")
@example("a-/b", "a/-b")
@example("a" * 200, "a" * 201)
@example("", ".")
def test_different_names_have_different_folders(first, second):
    assert (folder_name(first) == folder_name(second)) == (first == second)


def test_usual_names_stay_readable():
    assert folder_name("HuggingFaceM4/idefics2-8b") == "HuggingFaceM4--idefics2-8b"
    assert folder_name("shapes_color_en") == "shapes_color_en"
    assert folder_name("../../etc").startswith("etc~")


# What is refused


def header(path: Path, claim: int, content: bytes = b"{}") -> Path:
    path.write_bytes(struct.pack("<Q", claim) + content)
    return path


def test_a_claim_of_ten_gigabytes_is_refused_without_reading_them(library, tmp_path):
    path = header(tmp_path / FILE, 10 * 2**30)
    for read in (TaskVector.load, VectorCard.load):
        with pytest.raises(VectorFileError, match=r"a header of 10,737,418,240 bytes in a file of 10"):
            read(path)
    with path.open("r+b") as file:
        file.truncate(2 * tensor_files.HEADER_LIMIT)
    header_of = 8 + tensor_files.HEADER_LIMIT + 1
    with path.open("r+b") as file:
        file.write(struct.pack("<Q", header_of))
    for read in (TaskVector.load, VectorCard.load):
        with pytest.raises(VectorFileError, match="a vector's has at most"):
            read(path)
    with path.open("r+b") as file:
        file.truncate(tensor_files.LIMIT + 1)
    for read in (TaskVector.load, VectorCard.load):
        with pytest.raises(VectorFileError, match="a vector has at most 1,073,741,824"):
            read(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[" * 100_000, b"[]", b'{"__metadata__": []}', b'{"__metadata__": {"card": 1}}', b"\xff\xfe"],
    ids=["empty", "cut", "deep", "list", "list-metadata", "number", "no-text"],
)
def test_headers_that_are_no_description_are_refused(tmp_path, content):
    path = header(tmp_path / FILE, len(content), content)
    for read in (TaskVector.load, VectorCard.load):
        with pytest.raises(VectorFileError):
            read(path)


def test_a_pickle_is_not_opened(library, tmp_path):
    class Malicious:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "opened",))

    path = library.add(vector())
    path.write_bytes(pickle.dumps(Malicious()))
    assert library.get(card()) is None
    assert library.entries() == []
    assert len(library.verify()) == 1
    with pytest.raises(VectorFileError, match="damaged or no safetensors"):
        library.resolve(str(path))
    assert not (tmp_path / "opened").exists()


def test_pipes_folders_and_other_dtypes_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    for name in ("pipe", "folder", "missing"):
        with pytest.raises(VectorFileError, match="no vector file"):
            TaskVector.load(tmp_path / f"{name}.safetensors")
    halves = tensor_files.safetensors_bytes(
        {"heads.value": torch.zeros(1, dtype=torch.bfloat16)}, {"format": "lmms-mtv", "card": "{}"}
    )
    (tmp_path / FILE).write_bytes(halves)
    with pytest.raises(VectorFileError, match="not float32"):
        TaskVector.load(tmp_path / FILE)


@pytest.mark.parametrize("field", ["model", "task", "method"])
@pytest.mark.parametrize("name", ["../../../outside", "/outside", "..", "a/../../../b"])
def test_a_card_with_a_path_stays_inside(library, tmp_path, field, name):
    before = everything(tmp_path)
    path = library.add(vector(**{field: name}))
    assert path.resolve().is_relative_to(library.root)
    assert {written.split("/")[0] for written in everything(tmp_path) - before} == {"library"}
    assert getattr(library.get(card(**{field: name})).card, field) == name
    assert library.verify() == []


@pytest.mark.parametrize(
    "change",
    [
        {"task": None},
        {"model": 5},
        {"shots": float("inf")},
        {"geometry": [[float("inf"), "a", 2, 4]]},
        {"parents": {"a": "heavy"}},
        {"losses": {"a": 1}},
        {"seconds": "long"},
        {"stages": {"values": "long"}},
        {"method": ["mtv"]},
        {"versions": {"deep": functools.reduce(lambda inner, _: [inner], range(400), 0)}},
    ],
    ids=lambda change: str(change)[:40],
)
def test_a_card_with_a_field_of_a_wrong_type_is_refused(library, change):
    path = rewritten(library.add(vector()), lambda fields: fields.update(change))
    for read in (TaskVector.load, VectorCard.load):
        with pytest.raises(VectorFileError, match="wrong type"):
            read(path)
    assert library.entries() == []
    assert len(library.verify()) == 1


def test_a_card_that_is_no_json_and_a_vector_with_nan_are_found(library):
    good = library.add(vector(seed=1))
    text = library.add(vector(seed=2))
    raw = tensor_files.safetensors_bytes({}, {"format": "lmms-mtv", "card": "not json", "checksum": ""})
    text.write_bytes(raw)
    numbers = library.add(vector(seed=3))
    made = vector(seed=3)
    raw = numbers.read_bytes()
    value = made.edits["heads"].value.numpy().tobytes()
    assert value in raw
    numbers.write_bytes(raw.replace(value, b"\xff" * len(value)))
    rewritten(numbers, lambda fields: None)
    found = {problem.path: problem.what for problem in library.verify()}
    assert found.keys() == {text, numbers}
    assert "is not JSON" in found[text]
    assert "NaN or infinity" in found[numbers]
    assert library.get(card(seed=3)) is None
    assert library.get(card(seed=1)) is not None
    assert good.exists()


def test_links_are_not_followed(library, tmp_path):
    outside = tmp_path / "outside"
    stored = vector().save(outside / FILE)
    with pytest.raises(VectorFileError, match="is a link"):
        link = tmp_path / "link.safetensors"
        link.symlink_to(stored)
        TaskVector.load(link)

    for depth in range(4):
        root = tmp_path / str(depth)
        library = Library(root)
        place = library.folder(card()) / FILE
        linked = (place.parents[2], place.parents[1], place.parents[0], place)[depth]
        linked.parent.mkdir(parents=True)
        shutil.copytree(outside, tmp_path / f"target{depth}", dirs_exist_ok=True)
        target = tmp_path / f"target{depth}"
        linked.symlink_to(target / FILE if linked == place else target)
        before = everything(target)
        assert library.entries() == []
        assert next(problem.path for problem in library.verify() if "is a link" in problem.what) == linked
        if linked != place:
            with pytest.raises(LibraryError, match="is a link"):
                library.get(card())
            with pytest.raises(LibraryError, match="is a link"):
                library.add(vector(values=1))
        else:
            assert library.get(card()) is None
            library.add(vector(values=1))
            assert not place.is_symlink()
        assert everything(target) == before
        assert torch.equal(TaskVector.load(stored).edits["heads"].value, vector().edits["heads"].value)


def test_a_vector_in_another_place_is_a_problem(library):
    path = library.add(vector())
    moved = path.parent.with_name("mtv-0123456789abcdef")
    path.parent.rename(moved)
    (problem,) = library.verify()
    assert problem.path == moved / FILE
    assert str(library.folder(card())) in problem.what
    assert library.get(card()) is None


def test_what_an_interrupted_write_left_is_ignored_and_told(library):
    path = library.add(vector())
    left = files.temporary(path.parent)
    shutil.copytree(path.parent, left)
    partial = files.temporary(path)
    partial.write_bytes(b"half")
    assert [entry.path for entry in library.entries()] == [path]
    assert {problem.path for problem in library.verify()} == {left, partial}
    assert all("interrupted" in problem.what for problem in library.verify())
    (library.root / ".git" / "objects" / "00").mkdir(parents=True)
    assert len(library.verify()) == 2
    empty = path.parent.with_name("mtv-0000000000000000")
    empty.mkdir()
    assert [problem.path for problem in library.verify() if "has no vector" in problem.what] == [empty]


def test_names_of_any_characters_come_back(library):
    for name in ("tâche", "任务", "\ud800", "a\0b", "\u202e"):
        library.add(vector(task=name))
        assert library.get(card(task=name)).card.task == name
    assert library.verify() == []


def test_edits_that_are_not_of_the_geometry_of_their_card_are_neither_written_nor_read(library):
    path = rewritten(library.add(vector()), lambda fields: fields["geometry"].pop())
    with pytest.raises(VectorFileError, match="does not fit its own card"):
        TaskVector.load(path)
    assert "does not fit its own card" in library.verify()[0].what
    for geometry in ((), card().geometry[:1]):
        with pytest.raises(GeometryError):
            library.add(vector(geometry=geometry))


# The page


def test_the_page_says_what_the_vector_is_and_quotes_what_is_copied(library):
    hostile = "x; touch /tmp/x\n```\n| a |"
    text = (library.add(vector(task=hostile)).parent / PAGE).read_text()
    assert f"--tasks {shlex.quote(hostile.replace(chr(10), chr(0xFFFD)))}\n" in text
    blocks = ["```bash", "```", "```python", "```", "```json", "```"]
    assert [line for line in text.splitlines() if line.startswith("```")] == blocks
    for said in ("2 of 4 (layer 0: 0; layer 2: 1)", "pretrained=some/model,vector=", "licences", "torch 2"):
        assert said in text
    assert yaml.safe_load(text.split("---")[1])["base_model"] == "some/model"
    assert "base_model" not in page.of(vector(model="/a/local/folder"))


def test_the_page_has_the_prompt_as_text_and_no_ends_of_unordered_lists():
    parts = ("Q: warm\nA: cold\n\nQ: ```up```\nA:", " ", "down", "\n\n")
    losses = {"candidates": [3.0, 1.0, 2.0], "unedited": [4.0], "chosen": [1.0]}
    made = vector()
    card = dataclasses.replace(made.card, prompt_text=parts, losses=losses)
    text = page.of(TaskVector(made.edits, card))
    assert "````text\nQ: warm\nA: cold\n\nQ: ```up```\nA: down\n\n\n````" in text
    assert '[" ", "down", "\\n\\n"]' in text
    assert "| loss, unedited | 4.0000 |" in text
    assert "candidates" not in text
    assert card.id == made.card.id, "what is for readers does not count"
    assert VectorCard.from_json(card.to_json(), "a card") == card
    with pytest.raises(VectorFileError, match="prompt_text has something that is not text"):
        VectorCard.from_json(card.to_json().replace('"down"', "3"), "a card")


# Full, forbidden, shared and interrupted

FULL = """
import json, subprocess, sys
from pathlib import Path
from support.vectors import vector
from lmms_mtv import Library
from lmms_mtv.errors import LibraryError

library, said = Library(Path(sys.argv[1])), {}
for count in range(100):
    try:
        library.add(vector(seed=count))
    except LibraryError as error:
        said["full"] = str(error)
        break
subprocess.run(["mount", "-o", "remount,ro", sys.argv[1]], check=True)
try:
    library.add(vector(seed=0, task="other"))
except LibraryError as error:
    said["read-only add"] = str(error)
try:
    library.remove(library.entries()[0])
except LibraryError as error:
    said["read-only remove"] = str(error)
library.add(vector(seed=0))
said["good"] = all(library.get(vector(seed=seed).card) is not None for seed in range(count))
said["count"], said["entries"], said["problems"] = count, len(library.entries()), [p.what for p in library.verify()]
print(json.dumps(said))
"""


@pytest.mark.slow
def test_a_full_and_a_read_only_library_say_so_and_lose_nothing(tmp_path):
    root = tmp_path / "library"
    root.mkdir()
    mounted = f"mount -t tmpfs -o size=64k tmpfs {root} && exec"
    try:
        probe = processes.run(["unshare", "-rm", "sh", "-c", f"{mounted} true"], timeout=60)
    except FileNotFoundError:
        pytest.skip("no unshare here")
    if probe.returncode:
        pytest.skip(f"this place lets no test mount a file system: {probe.stderr}")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = ["unshare", "-rm", "sh", "-c", f'{mounted} "$0" "$@"', sys.executable, "-c", FULL, str(root)]
    done = processes.run(command, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert "No space left on device" in said["full"]
    assert "Read-only file system" in said["read-only add"]
    for key in ("full", "read-only add"):
        assert str(root) in said[key]
        assert "--library, library= or LMMS_MTV_LIBRARY" in said[key]
    assert f"{root}/some--model/task" in said["read-only remove"]
    assert said["good"]
    assert said["count"] == said["entries"] > 0
    assert said["problems"] == []


def test_a_root_that_is_a_file_or_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("no folder")
    for root in (tmp_path / "file", tmp_path / "file" / "deep"):
        with pytest.raises(LibraryError, match=f"{root}.*--library, library= or LMMS_MTV_LIBRARY"):
            Library(root).add(vector())
        with pytest.raises(LibraryError, match=f"{root} cannot be written to .*--library"):
            Library(root).check_writable(card())
    with pytest.raises(LibraryError, match=r"cannot be read.*--library"):
        Library(tmp_path / "file").entries()
    assert (tmp_path / "file").read_text() == "no folder"


def test_a_folder_of_the_vector_that_cannot_be_made_is_told_before_a_fit(library):
    """The root may be writable. The check leaves nothing behind."""
    library.check_writable(card())
    assert not library.root.exists()
    library.root.mkdir()
    library.check_writable(card())
    assert list(library.root.iterdir()) == []
    (library.root / "some--model").write_text("no folder")
    library.check_writable()
    with pytest.raises(LibraryError, match="cannot be written to"):
        library.check_writable(card())


def again_and_again(root: Path, values: int, started: Event) -> None:
    """A process that adds, in turn, two outcomes of one recipe until it is killed."""
    started.set()
    library = Library(root)
    for turn in range(10**6):
        library.add(vector(values=values + turn % 2))


@pytest.mark.slow
def test_a_killed_process_leaves_whole_vectors(library):
    drawn = random.Random(0)
    library.add(vector())
    for _ in range(10):
        started = [processes.context().Event() for _ in range(2)]
        adding = [processes.worker(again_and_again, library.root, 2 * n, started[n]) for n in range(2)]
        for process in adding:
            process.start()
        assert all(event.wait(60) for event in started)
        time.sleep(drawn.uniform(0.02, 0.2))
        for process in adding:
            process.kill()
            process.join(60)
            assert process.exitcode == -signal.SIGKILL
        assert library.get(card()) is not None
        assert len(library.entries()) == 1
    assert all("interrupted write" in problem.what for problem in library.verify())


def test_threads_that_add_one_vector_end_with_one_good_vector(library):
    threads = [threading.Thread(target=library.add, args=(vector(values=n),)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert library.get(card()) is not None
    assert library.verify() == []
