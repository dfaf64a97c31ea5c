"""Settings of methods: each says what it means, on the command line and on its page."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmms_mtv import cli, methods

PAGE = Path(__file__).parents[3] / "docs" / "settings.md"


def test_the_page_is_what_the_command_writes(capsys):
    cli.main(["methods", "--markdown"])
    assert capsys.readouterr().out == PAGE.read_text(encoding="utf-8"), "lmms-mtv methods --markdown > docs/settings.md"


@pytest.mark.parametrize("name", methods.own())
def test_each_setting_has_a_type_a_default_and_a_meaning(name):
    method = methods.get(name)
    assert [setting.name for setting in method.described()] == list(method.settings())
    for setting in method.described():
        assert setting.kind
        assert len(setting.meaning) > 10
        assert getattr(method.config, setting.name) == setting.default
    assert "arXiv" in method.summary or name == "mimic"


def test_one_method_and_its_settings(capsys):
    cli.main(["methods", "icv"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("icv  In-context vectors (Liu, Ye, Xing and Zou 2024, arXiv 2311.06668)")
    assert lines[3].split()[:4] == ["strength", "length", "of", "the"]
    assert lines[-1].endswith("(float, default 0.1)")


def test_all_methods_and_an_unknown_one(capsys):
    cli.main(["methods"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == methods.names()
    with pytest.raises(SystemExit, match=r"ArgumentError.*mtvv"):
        cli.main(["methods", "mtvv"])
