"""Training runs that are logged, and that continue after an interruption."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

logger = logging.getLogger(__name__)


class Steps(Protocol):
    """The part of a training's settings that :func:`run_steps` reads."""

    @property
    def total(self) -> int:
        """The number of steps of the whole run."""

    @property
    def log_every(self) -> int:
        """Steps between two log lines."""

    @property
    def evaluate_every(self) -> int:
        """Steps between two evaluations, each of which saves the state."""

    def rate(self, step: int) -> float:
        """Return the learning rate of a step."""


def log_to(folder: Path) -> None:
    """Make the folder of a run, and let the log go to its file ``train.log`` and to the terminal."""
    folder.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(
        level=logging.INFO,
        format="%(message)s",
        handlers=[logging.StreamHandler(), logging.FileHandler(folder / "train.log")],
    )


def run_steps(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[int], Tensor],
    evaluate: Callable[[], str],
    schedule: Steps,
    *,
    folder: Path,
    until: int | None,
) -> bool:
    """Run the steps of a training; a saved state in ``folder`` continues.

    Args:
        model: the module to train, on its device.
        optimizer: the optimizer of its parameters.
        loss: function of the number of a step that returns its loss.
        evaluate: function that evaluates the model, and returns the scores as a text for the log.
        schedule: the number of steps, their learning rates, and how often the run logs and evaluates.
        folder: the folder of the state.
        until: the number of steps after which the run stops and saves the state, as an interruption would; None runs
            to the end.

    Returns:
        True if all steps are done.
    """
    state, first = folder / "training-state.pt", 0
    if state.exists():
        saved = torch.load(state, weights_only=True, map_location=next(model.parameters()).device)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
        logger.info("continuing at step %d", first)

    total = schedule.total
    last = total if until is None else min(until, total)
    losses: list[float] = []
    began = time.perf_counter()
    for step in tqdm(range(first, last), initial=first, total=total, desc="Training", mininterval=5):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        value = loss(step)
        optimizer.zero_grad()
        torch.autograd.backward(value)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(value.item())
        done = step + 1
        if done % schedule.log_every == 0:
            seconds = (time.perf_counter() - began) / len(losses)
            recent = losses[-schedule.log_every :]
            logger.info("step %d loss %.4f seconds/step %.3f", done, sum(recent) / len(recent), seconds)
        if done % schedule.evaluate_every == 0 or done == last:
            logger.info("step %d %s", done, evaluate())
            _save(state, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": done})
    return last == total


def _save(path: Path, state: dict[str, object]) -> None:
    """Save the state of a training atomically."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)
