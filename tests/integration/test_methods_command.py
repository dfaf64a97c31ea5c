"""``lmms-mtv methods`` beside a package whose method does not load."""

from __future__ import annotations

import pytest

from lmms_mtv import methods
from lmms_mtv.cli import main


@pytest.fixture
def broken_package(tmp_path, monkeypatch) -> None:
    """An installed package whose method ``broken`` raises an error when it is imported."""
    (tmp_path / "broken_method.py").write_text("raise ImportError('no such library')", encoding="utf-8")
    metadata = tmp_path / "others-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1.0\n", encoding="utf-8")
    (metadata / "entry_points.txt").write_text("[lmms_mtv.methods]\nbroken = broken_method\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)


def test_the_list_names_a_method_that_does_not_load_and_goes_on(broken_package, capsys):
    main(["methods"])
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert list(lines) == methods.names()
    assert "package others" in lines["broken"]
    assert "ImportError: no such library" in lines["broken"]
    assert list(lines)[-1] != "broken"


def test_a_method_that_does_not_load_is_an_error_by_its_name(broken_package):
    with pytest.raises(SystemExit, match=r"MethodError.*broken.*no such library"):
        main(["methods", "broken"])
