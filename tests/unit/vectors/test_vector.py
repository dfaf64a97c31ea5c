"""Vectors and their files: what is written comes back, and nothing else is accepted."""

from __future__ import annotations

import dataclasses
import logging
import os
import pickle

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lmms_mtv import Edit, TaskVector, VectorCard
from lmms_mtv.errors import GeometryError, MtvError, NumericsError, VectorFileError
from support.vectors import GEOMETRY, card, rewritten, vector


def test_a_saved_vector_comes_back_whole(tmp_path):
    made = vector()
    path = made.save(tmp_path / "deep" / "vector.safetensors")
    back = TaskVector.load(path)
    assert back.card == made.card
    assert back.id == made.id
    assert back.heads == made.heads == ((0, 0), (1, 1))
    for part in ("value", "keep", "gain"):
        assert torch.equal(getattr(back.edits["heads"], part), getattr(made.edits["heads"], part))
    assert os.listdir(path.parent) == ["vector.safetensors"]


def test_a_vector_without_edits_can_be_saved_too(tmp_path):
    empty = TaskVector({}, card(method="none"))
    back = TaskVector.load(empty.save(tmp_path / "v.safetensors"))
    assert (back.edits, back.card) == ({}, empty.card)


def test_vectors_can_be_looked_up_in_lists_and_mappings():
    one, same = vector(), vector()
    assert one in [same, one]
    assert one not in [same]
    assert {one: "a", same: "b"}[one] == "a"


def test_the_id_is_the_recipe():
    assert vector().id == vector(seconds=99.0, losses={}, versions={"torch": "3"}, stages={"values": 9.0}).id
    for change in ({"seed": 1}, {"task": "other"}, {"config": {"steps": 1}}, {"revision": None}, {"shots": 1}):
        assert vector(**change).id != vector().id
    assert len(vector().id) == 16


def test_the_wrong_geometry_is_refused():
    vector().check(GEOMETRY)
    with pytest.raises(GeometryError, match=r"2 layers of 2 heads of size 4.*1 layers of 3 heads of size 4"):
        vector().check(((0, "x.o_proj", 3, 4),))


def test_edits_whose_tensors_disagree_are_refused():
    value, heads = torch.zeros(2, 3, 4), torch.zeros(2, 3)
    Edit(value, heads, heads)
    for wrong in (
        (value, heads, torch.zeros(2, 4)),
        (value, torch.zeros(5, 2, 3), torch.zeros(6, 2, 3)),
        (torch.zeros(2, 3), heads, heads),
        (value.long(), heads, heads),
    ):
        with pytest.raises(GeometryError):
            Edit(*wrong)


def test_nan_is_neither_written_nor_read(tmp_path):
    made = vector()
    made.edits["heads"].value[0, 0, 0] = torch.nan
    with pytest.raises(NumericsError, match="not saved"):
        made.save(tmp_path / "v.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = vector().save(tmp_path / "v.safetensors")
    before = path.read_bytes()

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(VectorFileError, match=r"v\.safetensors cannot be written \(No space left on device\)"):
        vector(seed=1).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_unknown_fields_of_a_card_warn_and_missing_ones_do_not_pass(tmp_path, caplog):
    path = vector().save(tmp_path / "v.safetensors")
    with caplog.at_level(logging.WARNING):
        assert TaskVector.load(rewritten(path, lambda fields: fields.update(colour="red"))).id == vector().id
    assert "colour" in caplog.text
    with pytest.raises(VectorFileError, match="lacks task"):
        TaskVector.load(rewritten(path, lambda fields: fields.pop("task")))
    path = vector().save(path)
    with pytest.raises(VectorFileError, match="newer version"):
        TaskVector.load(rewritten(path, lambda fields: fields.update(schema=99)))
    path = vector().save(path)
    with pytest.raises(VectorFileError, match="wrong type"):
        TaskVector.load(rewritten(path, lambda fields: fields.update(geometry=[1, 2])))


def test_foreign_files_are_told_by_what_they_are(tmp_path):
    with pytest.raises(VectorFileError, match="no vector file at"):
        TaskVector.load(tmp_path / "missing.safetensors")
    foreign = tmp_path / "weights.safetensors"
    save_file({"weight": torch.zeros(2)}, foreign)
    with pytest.raises(VectorFileError, match="no task vector"):
        TaskVector.load(foreign)
    pickled = tmp_path / "pickle.safetensors"
    pickled.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(VectorFileError, match="damaged or no safetensors"):
        TaskVector.load(pickled)
    with pytest.raises(VectorFileError):
        TaskVector.load(tmp_path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_is_refused_or_is_the_same_vector(tmp_path, data):
    """Truncated anywhere, or with any bit flipped: an error, or a change that means nothing."""
    path = vector().save(tmp_path / "v.safetensors")
    raw = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        raw = raw[: data.draw(st.integers(0, len(raw) - 1))]
    else:
        bit = data.draw(st.integers(0, 8 * len(raw) - 1))
        raw[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(raw))
    try:
        back = TaskVector.load(path)
    except VectorFileError:
        return
    assert back.card == vector().card
    for part in ("value", "keep", "gain"):
        assert torch.equal(getattr(back.edits["heads"], part), getattr(vector().edits["heads"], part))


@given(st.text(max_size=200))
def test_a_card_is_never_read_from_nonsense(text):
    with pytest.raises(VectorFileError):
        VectorCard.from_json(text, "here")


@given(
    seed=st.integers(0, 2**40),
    config=st.dictionaries(st.text(max_size=8), st.one_of(st.integers(), st.text(max_size=8), st.booleans())),
    losses=st.dictionaries(st.text(max_size=8), st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=3)),
)
def test_a_card_survives_its_json(seed, config, losses):
    made = card(seed=seed, config=config, losses=losses)
    back = VectorCard.from_json(made.to_json(), "here")
    assert back == made
    assert back.id == made.id


def test_errors_share_one_base():
    assert issubclass(VectorFileError, MtvError)
    assert dataclasses.is_dataclass(VectorCard)
