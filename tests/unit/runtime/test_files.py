"""Files that are written atomically, and second names for a file."""

from __future__ import annotations

import os

import pytest

from lmms_mtv.runtime import files


@pytest.mark.parametrize("before", [None, b"another"])
def test_a_second_name_takes_no_room_and_survives_the_first(tmp_path, before):
    one, two = tmp_path / "one", tmp_path / "deep" / "two"
    files.write(one, b"content")
    if before is not None:
        files.write(two, before)
    assert files.link(one, two)
    assert os.path.samefile(one, two)
    assert files.link(one, two)
    assert os.listdir(two.parent) == ["two"]
    files.write(one, b"newer")
    assert two.read_bytes() == b"content"


def test_without_links_nothing_is_changed_and_it_is_said(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise PermissionError(1, "Operation not permitted")

    one, two = tmp_path / "one", tmp_path / "two"
    files.write(one, b"content")
    files.write(two, b"another")
    monkeypatch.setattr(os, "link", refused)
    assert not files.link(one, two)
    assert two.read_bytes() == b"another"
    assert sorted(os.listdir(tmp_path)) == ["one", "two"]
