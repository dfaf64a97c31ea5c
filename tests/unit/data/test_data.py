"""The data of the paper's tasks: official files in, rows and images out, and everything that can be wrong with them."""

from __future__ import annotations

import dataclasses
import http.server
import json
import os
import shutil
import sys
import tarfile
import threading
import zipfile
from collections import Counter
from pathlib import Path

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmms_mtv import cli, data
from lmms_mtv.data import episodes, hub, vqa, words
from lmms_mtv.data.official import checksum
from lmms_mtv.errors import ArgumentError, DataError
from support import official_files, processes

EPISODES = {known.task: known for known in episodes.SETS}


def prepared(task: str, source: Path, output: Path, **options) -> dict[str, int]:
    options = {"partial": True, "progress": False} | options
    return data.prepare(data.source(task), data.Official(task, source, output / task, **options))


@pytest.fixture
def files(tmp_path):
    """Small official files of a task."""
    return lambda task: official_files.build(task, tmp_path / "official" / task)


@pytest.fixture
def used(monkeypatch, tmp_path):
    """A prepared folder that the tasks use."""
    monkeypatch.setenv(data.FOLDER, str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.mark.parametrize("task", official_files.TASKS)
def test_official_files_become_rows_and_images(task, files, used):
    counts = prepared(task, files(task), used)
    assert counts.keys() == data.source(task).rows.keys()
    for split, count in counts.items():
        rows = data.documents(task, split)
        assert len(rows) == count
        for row in rows:
            for reference in row.get("images") or filter(None, [row.get("image")]):
                assert data.image(task, reference).size == (32, 32)
                assert (used / task / reference).read_bytes() == official_files.picture(reference)


def test_answers_are_those_of_the_annotators(files, used):
    prepared("vizwiz", files("vizwiz"), used)
    prepared("okvqa", files("okvqa"), used)
    with zipfile.ZipFile(files("vizwiz") / "Annotations.zip") as archive:
        items = json.loads(archive.read("Annotations/val.json"))
    for row, item in zip(data.documents("vizwiz", "val"), items, strict=True):
        assert row["question"] == item["question"]
        assert row["answers"] == [given["answer"] for given in item["answers"]]
        assert row["question_id"] + ".jpg" == item["image"] == Path(row["image"]).name
    for row in data.documents("okvqa", "train"):
        # The stemmed answers are the paper's, the others what people typed.
        assert [f"{answer}ing" for answer in row["answers_stemmed"]] == row["answers"]
        assert row["answer"] == Counter(row["answers_stemmed"]).most_common(1)[0][0]


def test_the_modal_answer_is_the_first_of_the_most_frequent():
    assert vqa.modal(["b", "a", "a", "b", "c"]) == "b"
    assert vqa.modal(["c", "a", "b", "a"]) == "a"


@pytest.mark.parametrize("task", official_files.TASKS)
def test_unpacked_files_do_as_well_as_archives(task, files, used, tmp_path):
    packed, unpacked = files(task), tmp_path / "unpacked"
    unpacked.mkdir()
    for path in packed.iterdir():
        if zipfile.is_zipfile(path):
            zipfile.ZipFile(path).extractall(unpacked)
        elif tarfile.is_tarfile(path):
            with tarfile.open(path) as archive:
                archive.extractall(unpacked, filter="data")
        else:
            shutil.copy(path, unpacked)
    prepared(task, packed, used)
    prepared(task, unpacked, tmp_path / "other")
    first, second = (
        {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file() and p.name != "manifest.json"}
        for root in (used, tmp_path / "other")
    )
    assert first == second


def test_an_interrupted_run_goes_on(files, used):
    """A run that fails at a damaged archive leaves no manifest; the next keeps the images that are there."""
    folder = files("vizwiz")
    whole = (folder / "val.zip").read_bytes()
    with zipfile.ZipFile(folder / "val.zip") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    official_files.zipped(folder / "val.zip", dict(list(members.items())[:-2]))
    with pytest.raises(DataError, match=r"val\.zip lacks 2 of the 5 files .*VizWiz_val_00000003\.jpg.*same command"):
        prepared("vizwiz", folder, used)
    images = used / "vizwiz" / "images"
    before = {path: path.stat().st_mtime_ns for path in images.iterdir()}
    assert len(before) == 24 + 3
    assert not (used / "vizwiz" / "manifest.json").exists()
    with pytest.raises(DataError, match=r"manifest\.json is missing.*lmms-mtv prepare vizwiz"):
        data.documents("vizwiz", "val")

    (folder / "val.zip").write_bytes(whole)
    prepared("vizwiz", folder, used)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(list(images.iterdir())) == 29
    assert not list(used.rglob(".*"))


@pytest.mark.parametrize("task", sorted(EPISODES))
class TestEpisodes:
    def test_order_and_letter_are_fixed_and_right(self, task, files, used):
        folder = files(task)
        prepared(task, folder, used)
        stated = json.loads(next(folder.glob("*_train.json")).read_text())
        rows = data.documents(task, "train")
        assert set(rows["answer"]) == {"A", "B"}
        for episode, row in zip(stated, rows, strict=True):
            first, second, query = (Path(reference).name for reference in row["images"])
            right = row["answer"] == "A"
            assert query == Path(episode["query"]).name
            assert (first if right else second) == Path(episode["pos"]).name
            assert (second if right else first) == Path(episode["neg"]).name
            assert (row["a"] if right else row["b"]) == episode["pos_label"]
            assert (row["b"] if right else row["a"]) == episode["neg_label"]
        # Of the names alone: neither the place of an episode in its file nor where the images are matters.
        names = {Path(episode[key]).name: "elsewhere" for episode in stated for key in ("pos", "neg", "query")}
        assert [episodes.row(e, names)["answer"] for e in stated] == rows["answer"]

    def test_regenerated_episodes_are_the_seeds_and_never_mix_classes(self, task, files, used, tmp_path):
        folder = files(task)
        for path in folder.glob("*_t*.json"):
            path.unlink()
        with pytest.raises(DataError, match=r"has no \w+_train\.json.*--regenerate"):
            prepared(task, folder, used)
        for root, seed in ((used, 0), (tmp_path / "again", 0), (tmp_path / "other", 1)):
            prepared(task, folder, root, regenerate=True, seed=seed)
        texts = [(root / task / "train.jsonl").read_text() for root in (used, tmp_path / "again", tmp_path / "other")]
        assert texts[0] == texts[1] != texts[2]
        train, test = data.documents(task, "train"), data.documents(task, "test")
        shown = [{row[option] for row in rows for option in "ab"} for rows in (train, test)]
        assert not shown[0] & shown[1]
        known = EPISODES[task]
        assert len(shown[0]) == known.fitted
        for row in (*train, *test):
            assert row["a"] != row["b"]
            assert len(set(row["images"])) == 3
        queries = Counter(row["images"][2] for row in train)
        assert set(queries.values()) == {known.repeats["train"]}

    def test_counts_are_the_published_ones(self, task):
        published = {
            "flowers": {"train": (290, 29, 97), "test": (5076, 73, 102)},
            "cub": {"train": (870, 29, 29), "test": (5023, 171, 171)},
            "dtd": {"train": (4000, 10, 10), "test": (3000, 37, 37)},
        }
        assert EPISODES[task].counts == published[task]
        with pytest.raises(DataError, match=r"\(1, 1, 1\) episodes, positive and negative classes, expected"):
            one = dict.fromkeys(("pos", "neg", "query", "pos_label", "neg_label"), "x")
            episodes.validated([one], EPISODES[task], "train", "a file")
        with pytest.raises(DataError, match="not a list of episodes with pos, neg"):
            episodes.validated([{"pos": "x"}], EPISODES[task], "train", "a file", counted=False)


def test_the_drawn_order_never_changes():
    """The letters of eight made-up episodes, as they came out first: a reported score depends on them."""
    keys = ("pos", "neg", "query", "pos_label", "neg_label")
    names = [[f"{key}_{number}.jpg" for key in keys[:3]] for number in range(8)]
    rows = [episodes.row(dict(zip(keys, [*n, "x", "y"], strict=True)), {k: k for k in n}) for n in names]
    assert "".join(row["answer"] for row in rows) == "BABBBBBA"


PAIRS = st.lists(
    st.tuples(st.text("abcD ", min_size=1, max_size=3), st.text("abcD ", min_size=1, max_size=3)), max_size=60
)


@given(PAIRS, st.integers(0, 5), st.randoms())
def test_a_pair_and_its_reverse_stay_on_one_side(drawn, seed, rng):
    pairs = [{"input": a, "output": b} for a, b in drawn]
    pairs += [{"input": pair["output"].upper(), "output": pair["input"]} for pair in pairs[::2]]
    rng.shuffle(pairs)
    made = words.split(pairs, seed)
    assert sorted(map(str, pairs)) == sorted(str(pair) for part in made.values() for pair in part)
    side = {}
    for name, part in made.items():
        for pair in part:
            key = frozenset(pair[end].strip().lower() for end in ("input", "output"))
            assert side.setdefault(key, name) == name


def test_the_split_of_words_is_the_seeds_and_of_the_authors_sizes():
    pairs = [{"input": f"w{i}", "output": f"o{i}"} for i in range(5199)]
    made = words.split(pairs, 0)
    assert made == words.split(pairs, 0) != words.split(pairs, 1)
    assert {name: len(part) for name, part in made.items()} == data.source("english_spanish").rows


PUBLISHED = os.environ.get("LMMS_MTV_PUBLISHED")


@pytest.mark.skipif(not PUBLISHED, reason="LMMS_MTV_PUBLISHED names no folder with the published JSON files")
def test_the_published_files_are_what_the_tasks_say(tmp_path):
    """On the real word pairs and episodes, which are not in this repository."""
    for task, known in (("english_spanish", words), ("antonyms", words)):
        path = data.Official(task, Path(PUBLISHED), tmp_path, progress=False).find(known._FILES[task])
        pairs = json.loads(path.read_text())
        made = words.split(pairs, words.SEED)
        assert {name: len(part) for name, part in made.items()} == data.source(task).rows
        side = {(pair["input"], pair["output"]): name for name, part in made.items() for pair in part}
        assert not [key for key, name in side.items() if side.get(key[::-1], name) != name]
    for known in episodes.SETS:
        official = data.Official(known.task, Path(PUBLISHED), tmp_path, progress=False)
        for split, file in known.files.items():
            stated = json.loads(official.find(file).read_text())
            assert len(episodes.validated(stated, known, split, file.name)) == known.counts[split][0]


def test_characters_that_look_like_line_breaks_stay_inside_their_row(files, used):
    folder = files("english_spanish")
    pairs = [{"input": f"a\u2028b\x85c\u2029{i}", "output": f"\u00e9\x0c{i}"} for i in range(20)]
    (folder / "english-spanish.json").write_text(json.dumps(pairs))
    prepared("english_spanish", folder, used)
    found = [row for split in ("train", "validation", "test") for row in data.documents("english_spanish", split)]
    assert sorted(map(str, found)) == sorted(map(str, pairs))


class TestBadData:
    def test_a_damaged_image_of_the_right_size_is_mended_by_the_command_it_names(self, files, used):
        folder = files("vizwiz")
        prepared("vizwiz", folder, used)
        path = used / "vizwiz" / "images" / "VizWiz_val_00000001.jpg"
        whole = path.read_bytes()
        path.write_bytes(bytes(len(whole)))
        with pytest.raises(DataError, match=r"does not open.*lmms-mtv prepare vizwiz"):
            data.image("vizwiz", "images/VizWiz_val_00000001.jpg")
        prepared("vizwiz", folder, used)
        assert path.read_bytes() == whole

    def test_two_archives_of_one_name_are_not_guessed_between(self, files, used, tmp_path):
        source = tmp_path / "downloads"
        shutil.copytree(files("vizwiz"), source / "vizwiz")
        (source / "coco").mkdir()
        official_files.zipped(source / "coco" / "train.zip", {"other.jpg": b""})
        with pytest.raises(DataError, match=r"more than one train\.zip .*pass --source"):
            prepared("vizwiz", source, used)
        prepared("vizwiz", source / "vizwiz", used)

    def test_linked_folders_are_followed(self, files, used, tmp_path):
        with tarfile.open(files("dtd") / "dtd-r1.0.1.tar.gz") as archive:
            archive.extractall(tmp_path / "far", filter="data")
        source = tmp_path / "source"
        (source / "dtd").mkdir(parents=True)
        (source / "dtd" / "images").symlink_to(tmp_path / "far" / "dtd" / "images")
        for path in files("dtd").glob("*.json"):
            shutil.copy(path, source)
        assert prepared("dtd", source, used) == {"train": 24, "test": 5}

    def test_a_missing_archive(self, files, used):
        folder = files("vizwiz")
        (folder / "train.zip").unlink()
        with pytest.raises(
            DataError, match=r"has no train\.zip, nor train: download https://\S+/images/train\.zip into"
        ):
            prepared("vizwiz", folder, used)
        assert not used.exists()

    def test_a_wrong_checksum(self, files, used):
        with pytest.raises(DataError, match=r"dtd-r1\.0\.1\.tar\.gz has md5 \w{32}, expected fff7\w+.*--partial"):
            prepared("dtd", files("dtd"), used, partial=False, regenerate=True)
        with pytest.raises(DataError, match=r"antonym\.json has sha256 \w{64}, expected ba66\w+"):
            prepared("antonyms", files("antonyms"), used, partial=False)
        assert not used.exists()

    def test_a_count_that_differs_is_found_before_anything_is_written(self, files, used):
        with pytest.raises(DataError, match=r"split train of task vizwiz has 24 rows.*expected 20,523.*--partial"):
            prepared("vizwiz", files("vizwiz"), used, partial=False)
        assert not used.exists()

    def test_no_archive_at_all(self, files, used):
        folder = files("vizwiz")
        (folder / "val.zip").write_bytes(b"<html>404</html>")
        with pytest.raises(DataError, match=r"val\.zip is not an intact archive"):
            prepared("vizwiz", folder, used)

    def test_json_that_is_none_or_of_another_form(self, files, used):
        folder = files("english_spanish")
        (folder / "english-spanish.json").write_text("{")
        with pytest.raises(DataError, match=r"english-spanish\.json is not valid JSON"):
            prepared("english_spanish", folder, used)
        (folder / "english-spanish.json").write_text('[{"in": "a"}]')
        with pytest.raises(DataError, match="not in the form they were published in"):
            prepared("english_spanish", folder, used)

    def test_only_episodes_are_regenerated(self, files, used):
        with pytest.raises(ArgumentError, match="--regenerate draws episodes"):
            prepared("okvqa", files("okvqa"), used, regenerate=True)

    def test_a_folder_without_the_task(self, used):
        with pytest.raises(DataError, match=r"has no data of task dtd .*lmms-mtv prepare dtd .*LMMS_MTV_DATA"):
            data.documents("dtd", "train")

    def test_a_changed_file(self, files, used):
        prepared("antonyms", files("antonyms"), used)
        path = used / "antonyms" / "test.jsonl"
        path.write_text(path.read_text().replace("a", "e"))
        with pytest.raises(DataError, match=r"test\.jsonl is not what .* wrote .*lmms-mtv prepare antonyms"):
            data.documents("antonyms", "test")

    def test_an_image_that_vanished_or_is_damaged(self, files, used):
        prepared("vizwiz", files("vizwiz"), used)
        reference = data.documents("vizwiz", "val")[0]["image"]
        (used / "vizwiz" / reference).write_bytes(b"no image")
        with pytest.raises(DataError, match=r"VizWiz_val_00000000\.jpg of task vizwiz does not open.*prepare vizwiz"):
            data.image("vizwiz", reference)
        (used / "vizwiz" / reference).unlink()
        with pytest.raises(DataError, match=r"VizWiz_val_00000000\.jpg .*lmms-mtv prepare vizwiz"):
            data.image("vizwiz", reference)

    def test_partial_data_says_so(self, files, used, caplog):
        prepared("antonyms", files("antonyms"), used)
        data.documents("antonyms", "test")
        assert "a part of the official data" in caplog.text

    @pytest.mark.parametrize("task", official_files.TASKS)
    def test_a_hub_that_cannot_be_reached(self, task, monkeypatch):
        monkeypatch.delenv(data.FOLDER, raising=False)
        with pytest.raises(DataError, match=rf"cannot be .*lmms-mtv prepare {task} "):
            data.documents(task, "train")

    @pytest.mark.slow
    @pytest.mark.parametrize(("status", "code", "said"), [(403, "GatedRepo", "gated"), (404, "RepoNotFound", "exist")])
    def test_a_gated_or_vanished_copy(self, status, code, said):
        """Against a hub of our own that refuses, in a process that may use the network."""

        class Refusing(http.server.BaseHTTPRequestHandler):
            def refuse(self):
                self.send_response(status)
                self.send_header("X-Error-Code", code)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_GET = do_HEAD = refuse  # noqa: N815

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            environment = {k: v for k, v in os.environ.items() if k not in (data.FOLDER, "HF_HUB_OFFLINE")}
            environment["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_address[1]}"
            done = processes.run(
                [sys.executable, "-c", "from lmms_mtv import data; data.documents('vizwiz', 'val')"],
                env=environment,
                timeout=120,
            )
        finally:
            server.shutdown()
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("lmms_mtv.errors.DataError: lmms-lab-encoder/VizWiz-VQA on the hub (split val")
        assert "lmms-mtv prepare vizwiz" in last
        assert said in last


class TestHub:
    """Copies in the hub's own layout, in local folders: parquet files, images as bytes with a name."""

    @pytest.fixture
    def copied(self, tmp_path):
        """Make a copy of a split in the hub's layout; gives its folder."""

        def make(name: str, split: str, **columns) -> str:
            folder = tmp_path / "copies" / name
            images = [{"bytes": official_files.picture(image), "path": image} for image in columns.pop("image")]
            table = datasets.Dataset.from_dict({"image": images, "caption": ["never read"] * len(images), **columns})
            (folder / "data").mkdir(parents=True, exist_ok=True)
            table = table.cast_column("image", datasets.Image())
            table.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
            return str(folder)

        return make

    def test_the_hub_gives_what_official_files_give(self, copied, files, used, monkeypatch):
        """Same rows in the same order, whatever the order of the copy; only the references to images differ."""
        expected, folders = {}, {}
        for task, splits in (("vizwiz", ("train", "val")), ("okvqa", ("train", "val2014"))):
            prepared(task, files(task), used)
            for split in splits:
                expected[task, split] = rows = data.documents(task, split).to_list()
                mixed = sorted(rows, key=lambda row: row["answer"])
                names = [Path(row["image"]).name for row in mixed]
                columns = {"question": [row["question"] for row in mixed], "image": names}
                if task == "vizwiz":
                    columns |= {"question_id": [row["question_id"] for row in mixed], "filename": names}
                else:
                    columns["question_id"] = [int(row["question_id"]) for row in mixed]
                    columns["answers_original"] = [
                        [
                            {"answer": a, "raw_answer": b, "answer_id": 0, "answer_confidence": "yes"}
                            for a, b in zip(row["answers_stemmed"], row["answers"], strict=True)
                        ]
                        for row in mixed
                    ]
                columns["answers"] = [row["answers"] for row in mixed]
                folders[task, split] = copied(f"{task}-{split}", split, **columns)
        monkeypatch.delenv(data.FOLDER)
        for (task, split), folder in folders.items():
            copy = dataclasses.replace(vqa.COPIES[f"{task}/{split}"], path=folder, revision="")
            monkeypatch.setitem(vqa.COPIES, f"{task}/{split}", copy)
        annotations = files("okvqa") / "mscoco_val2014_annotations.json.zip"
        monkeypatch.setattr(hub, "downloaded", lambda file, task: annotations)
        for (task, split), rows in expected.items():
            known = dataclasses.replace(data.source(task), rows={split: len(rows)})
            monkeypatch.setitem(data.SOURCES, task, known)
            found = data.documents(task, split)
            without = [{key: value for key, value in row.items() if key != "image"} for row in rows]
            assert found.remove_columns("image").to_list() == without
            for row, official in zip(found, rows, strict=True):
                assert data.image(task, row["image"]) == data.image(task, str(used / task / official["image"]))
            assert "caption" not in hub.table(vqa.COPIES[f"{task}/{split}"]).column_names

    def test_episodes_find_their_images_by_official_names(self, copied, files, used, monkeypatch):
        folder = files("dtd")
        prepared("dtd", folder, used)
        (known,) = (one for one in episodes.SETS if one.task == "dtd")
        every = official_files.members(folder / "dtd-r1.0.1.tar.gz", ".jpg")
        path = copied("dtd", "train", image=sorted(Path(name).name for name in every))
        local = {s: dataclasses.replace(known.files[s], url=str(folder / f"dtd_{s}.json")) for s in known.files}
        stated = {s: json.loads((folder / f"dtd_{s}.json").read_text()) for s in local}
        counts = {s: (len(e), *(len({x[k] for x in e}) for k in ("pos_label", "neg_label"))) for s, e in stated.items()}
        copy = dataclasses.replace(known.copies[0], path=path)
        changed = dataclasses.replace(known, files=local, counts=counts, copies=(copy,))
        monkeypatch.setattr(episodes, "SETS", (changed,))
        for split in ("train", "test"):
            found, expected = episodes._fetch(changed, split), data.documents("dtd", split).to_list()
            for row, official in zip(found, expected, strict=True):
                assert {k: row[k] for k in ("a", "b", "answer")} == {k: official[k] for k in ("a", "b", "answer")}
                for reference, name in zip(row["images"], official["images"], strict=True):
                    assert hub.image(copy, int(reference.rpartition(":")[2])) == official_files.picture(name)
                    assert data.image("dtd", reference) == data.image("dtd", name)
        stated["train"][0]["query"] = "./dtd/images/else/else_0000.jpg"
        (folder / "dtd_train.json").write_text(json.dumps(stated["train"]))
        with pytest.raises(DataError, match=r"lacks 1 of the .* such as else_0000\.jpg: .*lmms-mtv prepare dtd"):
            episodes._fetch(changed, "train")

    def test_word_pairs_come_from_the_published_file_and_are_kept(self, files, monkeypatch, tmp_path):
        path = files("antonyms") / "antonym.json"
        file = dataclasses.replace(words._FILES["antonyms"], url=str(path), sha256=checksum(path, "sha256"))
        found = [pair for split in ("train", "validation", "test") for pair in words._fetch("antonyms", file, split)]
        assert sorted(map(str, found)) == sorted(map(str, json.loads(path.read_text())))
        with pytest.raises(DataError, match=r"has sha256 \w{64}, expected ba66"):
            words._fetch("antonyms", dataclasses.replace(file, sha256=words._FILES["antonyms"].sha256), "test")

    def test_a_copy_that_is_not_what_it_was(self, copied, monkeypatch):
        folder = copied("other", "val", question_id=["1"], question=["?"], answers=[[]], image=["x.jpg"])
        copy = dataclasses.replace(vqa.COPIES["vizwiz/val"], path=folder)
        monkeypatch.setitem(vqa.COPIES, "vizwiz/val", copy)
        monkeypatch.delenv(data.FOLDER, raising=False)
        with pytest.raises(DataError, match=r"has changed its form .*lmms-mtv prepare vizwiz"):
            data.documents("vizwiz", "val")
        monkeypatch.setitem(vqa.COPIES, "vizwiz/val", dataclasses.replace(copy, columns=("image", "text")))
        with pytest.raises(DataError, match=r"cannot be loaded.*lmms-mtv prepare vizwiz"):
            data.documents("vizwiz", "val")


class TestCommand:
    def test_it_prepares_and_says_how_to_use_it(self, files, used, capsys):
        cli.main(["prepare", "dtd", "--source", str(files("dtd")), "--output", str(used), "--partial"])
        said = capsys.readouterr().out
        assert "24 train, 5 test" in said
        assert f"LMMS_MTV_DATA={used}" in said
        assert "note: a part of the official data" in said
        assert len(data.documents("dtd", "test")) == 5

    def test_an_error_is_one_line(self, used, tmp_path):
        with pytest.raises(SystemExit, match=r"^lmms-mtv: DataError: .*dtd-r1\.0\.1\.tar\.gz"):
            cli.main(["prepare", "dtd", "--source", str(tmp_path), "--output", str(used), "--regenerate"])
        with pytest.raises(SystemExit, match="Did you mean 'flowers'"):
            cli.main(["prepare", "flower", "--source", str(tmp_path), "--output", str(used)])
