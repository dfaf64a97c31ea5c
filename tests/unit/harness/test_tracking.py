"""Fits in an experiment tracker: what is logged, and when nothing is."""

from __future__ import annotations

import dataclasses
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lmms_mtv import Edit, TaskVector
from lmms_mtv.harness.lmms import caller
from lmms_mtv.harness.tracking import log_fit
from support import vectors


class Tracker(SimpleNamespace):
    """A module with the functions of wandb that a fit needs; trackio has only ``log``."""

    def __init__(self, run: object) -> None:
        super().__init__(run=run)
        self.logged: list[dict[str, Any]] = []
        self.axes: dict[str, str] = {}

    def log(self, values: dict[str, Any]) -> None:
        assert self.run is not None
        self.logged.append(values)

    def define_metric(self, name: str, step_metric: str) -> None:
        self.axes[name] = step_metric


@pytest.fixture
def fitted() -> TaskVector:
    geometry = [(index, "attn", 3, 4) for index in range(2)]
    losses = {"policy": [2.0, 1.5, 1.0], "unedited": [1.4], "chosen": [0.7]}
    card = dataclasses.replace(vectors.card(), geometry=geometry, losses=losses, seconds=12.5)
    mask = torch.tensor([[1.0, 0, 1], [0, 0, 0]])
    return TaskVector({"heads": Edit.replace(torch.zeros(2, 3, 4), mask)}, card)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_loss_heads_and_seconds_are_logged_into_the_open_run(fitted, name, monkeypatch):
    tracker = Tracker(object())
    monkeypatch.setitem(sys.modules, name, tracker)
    log_fit(name, "task", fitted)
    assert tracker.logged[:3] == [
        {"fit/task/step": step, "fit/task/loss": loss} for step, loss in ((1, 2.0), (2, 1.5), (3, 1.0))
    ]
    assert tracker.logged[3:] == [
        {"fit/task/heads": 2, "fit/task/seconds": 12.5, "fit/task/loss_unedited": 1.4, "fit/task/loss_chosen": 0.7}
    ]
    assert tracker.axes == ({"fit/task/loss": "fit/task/step"} if name == "wandb" else {})


def test_nothing_is_logged_or_imported_without_an_open_run(fitted, monkeypatch):
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    log_fit("wandb", "task", fitted)
    assert "wandb" not in sys.modules
    tracker = Tracker(None)
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    log_fit("wandb", "task", fitted)
    tracker.run = object()
    log_fit("wandb", "task", TaskVector({}, fitted.card))
    assert tracker.logged == []


def test_the_flag_is_known_from_the_command_line_alone(monkeypatch):
    assert not caller.tracks("wandb_args")
    for given in ("", "project=x"):
        monkeypatch.setattr(caller, "evaluation", lambda given=given: {"cli_args": SimpleNamespace(wandb_args=given)})
        assert caller.tracks("wandb_args") is bool(given)
