"""Fits that are killed, that meet each other, and that find no room: what is there stays good, and nothing blocks."""

from __future__ import annotations

import random
import resource
import signal
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
import torch

from lmms_mtv import TaskVector, VectorCard, find_sites, methods
from lmms_mtv.errors import VectorFileError
from lmms_mtv.vectors import HEADS
from support import processes, sessions, zoo

SETTINGS = {"iterations": 4, "fit_shots": 1, "steps": 6, "samples": 4, "examples": 3, "candidate_examples": 2}


def fit_and_save(path: Path, seed: int = 0) -> TaskVector:
    torch.set_num_threads(1)
    tiny = zoo.build(zoo.llama)
    method = methods.get("mtv")
    fitted = method.fit(sessions.session(tiny, seed=seed), method.configure(SETTINGS))
    geometry = find_sites(tiny.model).geometry
    card = VectorCard("tiny", None, "float32", geometry, "task", "train", "", "", 0, seed, "mtv", dict(SETTINGS))
    vector = TaskVector(dict(fitted.edits), card)
    vector.save(path)
    return vector


def again_and_again(path: Path, started: Event) -> None:
    """A process that fits and saves until it is killed."""
    started.set()
    while True:
        fit_and_save(path)


def good(path: Path, expected: TaskVector) -> None:
    found = TaskVector.load(path)
    assert found.id == expected.id
    assert torch.equal(found.edits[HEADS].value, expected.edits[HEADS].value)


@pytest.mark.slow
def test_a_killed_fit_leaves_a_whole_vector_or_none_and_no_lock(tmp_path):
    expected = fit_and_save(tmp_path / "expected.safetensors")
    drawn, path = random.Random(0), tmp_path / "library" / "vector.safetensors"
    started = time.monotonic()
    fit_and_save(tmp_path / "timed.safetensors")
    fit_seconds = time.monotonic() - started
    seen = 0
    for _ in range(20):
        begun = processes.context().Event()
        process = processes.worker(again_and_again, path, begun)
        process.start()
        assert begun.wait(60)
        time.sleep(drawn.uniform(0.05, 2.5) * fit_seconds)
        process.kill()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        if path.exists():
            seen += 1
            good(path, expected)
    assert seen > 5
    fit_and_save(path)
    good(path, expected)


@pytest.mark.slow
def test_two_fits_of_one_vector_at_once_end_with_one_good_vector(tmp_path):
    expected, path = fit_and_save(tmp_path / "expected.safetensors"), tmp_path / "library" / "vector.safetensors"
    fits = [processes.worker(fit_and_save, path) for _ in range(4)]
    for process in fits:
        process.start()
    for process in fits:
        process.join(120)
        assert process.exitcode == 0
    good(path, expected)
    assert [found.name for found in path.parent.iterdir()] == [path.name]


def full_disk(path: Path, queue) -> None:
    """Saving where no byte more can be written."""
    vector = TaskVector.load(path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        vector.save(path)
    except VectorFileError as error:
        queue.put(str(error))


@pytest.mark.slow
def test_a_full_disk_is_one_error_and_the_old_vector_stays(tmp_path):
    path = tmp_path / "vector.safetensors"
    expected, queue = fit_and_save(path), processes.context().SimpleQueue()
    process = processes.worker(full_disk, path, queue)
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert f"{path} cannot be written" in queue.get()
    good(path, expected)
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    vector = fit_and_save(tmp_path / "vector.safetensors")
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(VectorFileError, match=r"file/deep/vector\.safetensors cannot be written"):
        vector.save(tmp_path / "file" / "deep" / "vector.safetensors")
