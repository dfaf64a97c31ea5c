"""Plans and cells: which cells a comparison has, and files that tell when they were altered."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmms_mtv.errors import ArgumentError, DataError
from lmms_mtv.experiments import cell as cells
from lmms_mtv.experiments import plan
from lmms_mtv.experiments.cell import Cell
from lmms_mtv.experiments.plan import Axis, CellKey, Plan

ARMS = {
    "zero-shot": {"method": "none"},
    "2-shot": {"method": "none", "shots": 2},
    "MTV": {"method": "mtv"},
    "another vector": {"vector": "shapes_color_en/mtv"},
}


def made(**changes) -> Plan:
    return Plan(**{"name": "p", "model": {"pretrained": "tiny"}, "tasks": ["a", "g"], "arms": ARMS} | changes)


def cell(**changes) -> Cell:
    fields = {
        "plan": "p",
        "task": "a",
        "arm": "MTV",
        "seed": 0,
        "arguments": {"method": "mtv"},
        "model": {"name": "m", "revision": None, "dtype": "float32"},
        "method": "mtv",
        "shots": 0,
        "settings": {"steps": 3},
        "metric": "exact_match",
        "score": 0.5,
        "stderr": 0.1,
        "n": 2,
        "higher_is_better": True,
        "samples": {"documents": [0, 1], "scores": [1, 0], "answers": ["é", "b"], "prompts": ["1a", "2b"]},
        "tokens": {"prompt": 4.0, "image": None, "text": None},
        "seconds": {"fit": 1.0, "evaluation": 0.1},
        "memory": {"fit": None, "evaluation": 3},
        "vector": None,
        "versions": {"torch": "2"},
        "hardware": {"cores": 2},
    }
    return Cell(**fields | changes)


class TestPlan:
    def test_cells_in_the_order_in_which_they_run(self):
        """Seeds outermost, arms before tasks; an arm that no seed changes runs once."""
        found = made(seeds=[3, 5], groups={"g": ["b", "a", "c"]}).cell_keys()
        expected = [CellKey(t, arm, 3) for arm in ARMS for t in "abc"]
        expected += [CellKey(t, arm, 5) for arm in list(ARMS)[1:] for t in "abc"]
        assert found == expected

    def test_the_baseline_is_the_arm_without_anything(self):
        assert made().compared_with == "zero-shot"
        assert made(baseline="MTV").compared_with == "MTV"
        assert made(arms={"MTV": {}}).compared_with is None

    def test_a_file_gives_back_what_was_written(self, tmp_path):
        written = made(
            limit=3, title="T", seeds=(1, 2), groups={"g": ["b"]}, x=Axis("examples", {"MTV": 4}, {"MTV": "s"})
        )
        written.write(tmp_path)
        found = plan.read(tmp_path)
        assert found.cell_keys() == written.cell_keys()
        assert (found.limit, found.title, dict(found.arms), found.x) == (3, "T", ARMS, written.x)

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"tasks": []}, "has no tasks"),
            ({"arms": {"MTV": {"seed": 3}}}, "seed= stands under arm 'MTV'"),
            ({"model": {"batch_size": 3}}, "batch_size= stands under model"),
            ({"arms": {"MTV": "method=mtv"}}, "expected model arguments"),
            ({"arms": {"a b": {}, "a-b": {}}}, "'a b' and 'a-b' .* share a file"),
            ({"baseline": "few-shot"}, "'few-shot' .* none of its arms"),
            ({"seeds": [1, 1]}, "different integers"),
            ({"name": "a/b"}, "one word"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, changes, match):
        with pytest.raises(ArgumentError, match=match):
            made(**changes)

    @pytest.mark.parametrize(
        ("text", "match"),
        [
            ("a: [", "not YAML"),
            ("- 1", "holds a list, expected a mapping"),
            ("model: {}\ntasks: [a]\narms: {b: {}}\ncolour: red", "has colour, expected only name, model"),
            ("model: {}\ntasks: [a]", "lacks arms"),
        ],
    )
    def test_a_file_that_is_no_plan(self, tmp_path, text, match):
        (tmp_path / "plan.yaml").write_text(text)
        with pytest.raises(ArgumentError, match=match):
            plan.read(tmp_path)
        with pytest.raises(ArgumentError, match="no plan at"):
            plan.read(tmp_path / "other.yaml")


class TestCells:
    def test_a_file_gives_back_what_was_written(self, tmp_path):
        written = cell()
        path = cells.write(tmp_path, written, {"results": {"a": {"exact_match,none": 0.5}}})
        assert path == tmp_path / "cells" / "a" / "MTV-seed0.json"
        assert cells.read(tmp_path, written.key) == written
        assert cells.read_all(tmp_path) == [written]
        assert json.loads(path.read_text())["results"] == {"a": {"exact_match,none": 0.5}}
        assert cells.read(tmp_path, CellKey("a", "MTV", 1)) is None
        assert [entry.name for entry in path.parent.iterdir()] == [path.name]

    def test_a_cell_at_another_place_is_refused(self, tmp_path):
        path = cells.write(tmp_path, cell(), {})
        path.rename(path.with_name("MTV-seed1.json"))
        with pytest.raises(DataError, match="is the cell of a, MTV, seed 0, expected a, MTV, seed 1"):
            cells.read(tmp_path, CellKey("a", "MTV", 1))

    def test_a_newer_schema_is_refused(self, tmp_path):
        cells.write(tmp_path, dataclasses.replace(cell(), schema=99), {})
        with pytest.raises(DataError, match="newer version"):
            cells.read_all(tmp_path)

    @given(data=st.data())
    def test_whatever_is_altered_is_told(self, tmp_path_factory, data):
        """Any byte that changes what the file says makes it refused."""
        folder = tmp_path_factory.mktemp("cells")
        path = cells.write(folder, cell(), {"results": {"a": 0.5}})
        content = path.read_bytes()
        where = data.draw(st.integers(0, len(content) - 1))
        path.write_bytes(content[:where] + bytes([data.draw(st.integers(0, 255))]) + content[where + 1 :])
        try:
            same = json.loads(path.read_text()) == json.loads(content)
        except ValueError:
            same = False
        if same:
            assert cells.read_all(folder) == [cell()]
        else:
            with pytest.raises(DataError, match=str(Path("cells") / "a" / "MTV-seed0.json")):
                cells.read_all(folder)
