"""Fitting of task vectors without an evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lmms_mtv.experiments.plan import seeded
from lmms_mtv.harness.lmms.loaded_run import load_run
from lmms_mtv.vectors import TaskVector


class TaskFit(NamedTuple):
    """The vector of one task and seed."""

    task: str
    seed: int
    vector: TaskVector


def fit_vectors(
    arguments: Mapping[str, Any],
    tasks: Sequence[str],
    seeds: Sequence[int] = (0,),
    *,
    batch_size: int | str = 1,
    library: Path | None = None,
    reuse: bool = True,
    include_path: Sequence[str] = (),
) -> Iterator[TaskFit]:
    """Yield the vector of each task and seed, fitted or from the library.

    Args:
        arguments: the model arguments by name, without the arguments below.
        tasks: names of tasks or of groups of tasks.
        seeds: the seeds; only the first seed is used if the arguments fit nothing that depends on a seed.
        batch_size: rows of a forward, or ``auto``.
        library: folder of the vector library; None is the default folder.
        reuse: True takes a vector of the same recipe from the library.
        include_path: folders of further task files.

    Raises:
        ArgumentError: a task or an argument is unknown.
        LibraryError: the library cannot be written to.
    """
    run = load_run(tasks, arguments, batch_size=batch_size, library=library, reuse=reuse, include_path=include_path)
    for seed in seeds if seeded(arguments) else seeds[:1]:
        arm = run.model.arm({"seed": seed})
        for name, task in run.tasks.items():
            if task.config.num_fewshot is None:
                task.set_config(key="num_fewshot", value=0)
            yield TaskFit(name, seed, arm.fit(task))
