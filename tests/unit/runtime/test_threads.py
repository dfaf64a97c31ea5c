"""A small model computes with one thread, unless the user has chosen."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lmms_mtv.runtime.threads import limit_threads


@pytest.fixture(autouse=True)
def two_threads(monkeypatch):
    before = torch.get_num_threads()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_a_small_model_has_one_thread_and_says_so_once():
    model = nn.Linear(1000, 1000)
    line = limit_threads(model)
    assert line is not None
    assert "1.0 million parameters" in line
    assert "OMP_NUM_THREADS" in line
    assert torch.get_num_threads() == 1
    assert limit_threads(model) is None


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_the_users_number_wins(name, monkeypatch):
    monkeypatch.setenv(name, "2")
    assert limit_threads(nn.Linear(10, 10)) is None
    assert torch.get_num_threads() == 2


def test_a_larger_model_and_one_on_another_device_keep_their_threads():
    with torch.device("meta"):
        larger, elsewhere = nn.Linear(5000, 5000), nn.Linear(10, 10)
    assert limit_threads(larger) is None
    assert limit_threads(elsewhere) is None
    assert limit_threads(nn.Linear(3200, 3200)) is None
    assert torch.get_num_threads() == 2
