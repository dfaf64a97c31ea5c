"""Exceptions at the harness's command line: one line and a status, or as they were raised."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from lmms_mtv.errors import ArgumentError
from lmms_mtv.harness.lmms.failure import COMMAND_LINE, VERBOSITY, fail_with_status


@fail_with_status
def fails(error: Exception) -> None:
    raise error


@pytest.fixture
def _command_line(monkeypatch):
    """A process that the harness's command line started."""
    monkeypatch.setitem(sys.modules, COMMAND_LINE, ModuleType(COMMAND_LINE))
    monkeypatch.delenv(VERBOSITY, raising=False)


@pytest.mark.usefixtures("_command_line")
class TestAtTheCommandLine:
    @pytest.mark.parametrize("verbosity", [None, "INFO", "NODEBUG"])
    def test_an_error_of_ours_is_one_line(self, monkeypatch, verbosity, capsys):
        if verbosity is not None:
            monkeypatch.setenv(VERBOSITY, verbosity)
        with pytest.raises(SystemExit, match=r"^lmms-mtv: ArgumentError: shots=-1$"):
            fails(ArgumentError("shots=-1"))
        assert "Traceback" not in capsys.readouterr().err

    def test_another_error_keeps_its_traceback(self, capsys):
        with pytest.raises(SystemExit, match=r"^lmms-mtv: RuntimeError: broken$"):
            fails(RuntimeError("broken"))
        assert "Traceback" in capsys.readouterr().err

    def test_other_arguments_that_contain_the_word_change_nothing(self, monkeypatch):
        arguments = ["--model_args", "pretrained=/models/DEBUG", "--output_path", "DEBUG"]
        monkeypatch.setattr(sys, "argv", ["lmms_eval", *arguments])
        with pytest.raises(SystemExit):
            fails(ArgumentError("shots=-1"))

    def test_with_verbosity_debug_it_is_raised_as_it_is(self, monkeypatch):
        monkeypatch.setenv(VERBOSITY, "DEBUG")
        with pytest.raises(ArgumentError, match="shots=-1"):
            fails(ArgumentError("shots=-1"))


def test_called_from_python_it_is_raised_as_it_is(monkeypatch):
    monkeypatch.delitem(sys.modules, COMMAND_LINE, raising=False)
    with pytest.raises(ArgumentError, match="shots=-1"):
        fails(ArgumentError("shots=-1"))
