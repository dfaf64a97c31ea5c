"""Several processes: each does a share, all get what one process alone gets, and none waits for one that failed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import distributed

from lmms_mtv import Edit, Episode, find_sites, methods
from lmms_mtv.errors import MtvError
from lmms_mtv.runtime.distributed import Ranks, current
from support import processes, sessions, threads, zoo

PARTS = ("value", "keep", "gain")
SHORT = "iterations=7,fit_shots=2,steps=12,samples=5,examples=6,candidate_examples=4,candidates=3,reuse=False"


def work(rank: int, count: int, folder: str) -> None:
    """One process: a fit on a tiny model, and a step at which one rank fails; what came out goes to a file."""
    torch.set_num_threads(1)
    rendezvous = Path(folder, "rendezvous").as_uri()
    distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=count)
    assert current() == Ranks(rank, count)
    try:
        torch.save(fitted(current()) | {"failure": failed(current())}, Path(folder, f"{rank}.pt"))
    finally:
        distributed.destroy_process_group()


def failed(ranks: Ranks) -> str:
    """What a rank raises at a step at which the last one fails."""
    try:
        with ranks.raise_together():
            if ranks.rank == ranks.count - 1:
                raise ValueError("only here")
    except (ValueError, MtvError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def fitted(ranks: Ranks, tiny: zoo.Tiny | None = None) -> dict:
    tiny = tiny or zoo.build(zoo.llama)
    session = sessions.session(tiny, ranks=ranks, batch_size=2)
    method = methods.get("mtv")
    config = method.configure(
        {"iterations": 7, "fit_shots": 2, "steps": 6, "samples": 5, "examples": 3, "candidate_examples": 2}
    )
    edit = method.fit(session, config).edits["heads"]
    sites = find_sites(tiny.model)
    masks = torch.rand(2, *sites.shape[:2], generator=torch.Generator().manual_seed(1)) < 0.5
    losses = session.losses(Episode(0, (1,)), Edit.replace(edit.value, masks), "all")
    alone = session.losses(Episode(0, (1,)), edit)
    gradient = session.loss_gradient(Episode(0, (1,)), edit.value, masks.float(), "all")[1]
    method = methods.get("gradient_mask")
    config = method.configure(
        {"iterations": 2, "examples": 3, "candidate_examples": 2, "diverse": 9, "steps": 6, "samples": 5}
    )
    other = method.fit(sessions.session(tiny, ranks=ranks), config).edits["heads"]
    learned = {}
    for name in ("m2iv", "stv"):
        method = methods.get(name)
        given = {
            "examples": 3,
            "epochs": 2,
            "accumulation": 2,
            "judges": 2,
            "fit_shots": 2,
            "iterations": 4,
            "steps": 3,
        }
        # Shares of the samples of a step differ in the last bits of losses over several tokens, and three steps of a
        # search among centroids can turn on them.
        given |= {"candidate_examples": 2, "samples": 5, "loss": "first"}
        config = method.configure({key: value for key, value in given.items() if key in method.settings()})
        edits = method.fit(sessions.session(tiny, ranks=ranks), config).edits
        learned |= {f"{name} {stream} {part}": getattr(edit, part) for stream, edit in edits.items() for part in PARTS}
    return {
        "learned": learned,
        "gradient": gradient,
        "other": other.value,
        "other_heads": other.heads,
        "value": edit.value,
        "heads": edit.heads,
        "losses": losses,
        "alone": alone.cpu(),
    }


def assert_same(found: dict, expected: dict, rank: int, count: int) -> None:
    torch.testing.assert_close(found["value"], expected["value"], rtol=1e-6, atol=1e-7)
    assert found["heads"] == expected["heads"]
    torch.testing.assert_close(found["other"], expected["other"], rtol=1e-6, atol=1e-7)
    assert found["other_heads"] == expected["other_heads"]
    for name, part in expected["learned"].items():
        assert torch.equal(found["learned"][name], part), name
    assert (found["gradient"] - expected["gradient"]).abs().max() < 1e-5
    assert (found["losses"] - expected["losses"]).abs().max() < 1e-5
    assert (found["alone"] - expected["alone"]).abs().max() < 1e-5
    last = "ValueError: only here" if rank == count - 1 else f"MtvError: 1 of {count} processes failed"
    assert found["failure"].startswith(last)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_a_fit_is_the_same_and_a_failure_is_everyones(count, tmp_path):
    """Seven prompts, five masks and then two: shares are uneven, and with three processes one gets none."""
    expected = fitted(Ranks())
    processes.in_ranks(work, count, count, str(tmp_path))
    for rank in range(count):
        assert_same(torch.load(tmp_path / f"{rank}.pt", weights_only=False), expected, rank, count)


def test_ranks_that_are_threads_fit_the_same_too():
    """The same shares, without the start of processes."""
    expected = fitted(Ranks())
    models = [zoo.build(zoo.llama) for _ in range(2)]
    found = threads.in_threads(lambda ranks: fitted(ranks, models[ranks.rank]) | {"failure": failed(ranks)}, 2)
    for rank, each in enumerate(found):
        assert_same(each, expected, rank, 2)


def settled(ranks: Ranks, tiny: zoo.Tiny) -> tuple[list[float], tuple]:
    """The mean losses of the steps of a fit that ends early, and its heads."""
    method = methods.get("mtv")
    settings = {"iterations": 4, "fit_shots": 2, "steps": 80, "samples": 5, "examples": 6, "candidate_examples": 3}
    examples = sessions.TokenExamples(answer=1)
    fit = method.fit(
        sessions.session(tiny, ranks=ranks, examples=examples), method.configure(settings | {"settle": 0.99})
    )
    return fit.losses["policy"], fit.edits["heads"].heads


def test_all_ranks_end_a_selection_at_one_step():
    alone = settled(Ranks(), zoo.build(zoo.llama))
    models = [zoo.build(zoo.llama) for _ in range(2)]
    first, second = threads.in_threads(lambda ranks: settled(ranks, models[ranks.rank]), 2)
    assert first == second
    assert len(first[0]) == len(alone[0]) < 80
    assert first[1] == alone[1]


def test_ranks_whose_hosts_hold_different_numbers_of_prompts_fit_the_same():
    models = [zoo.build(zoo.llama) for _ in range(2)]

    def losses(ranks: Ranks) -> list[torch.Tensor]:
        used = sessions.session(models[ranks.rank], ranks=ranks, memory=1, host_memory=ranks.rank << 30)
        queries = used.random_queries([Episode(query, (9,)) for query in range(4)], 8)
        masks = torch.rand(4, *used.shape[:2], generator=torch.Generator().manual_seed(1)) < 0.5
        return [used.losses(query, Edit.replace(torch.ones(used.shape), masks), "all") for query in queries]

    alone, (first, second) = losses(Ranks()), threads.in_threads(losses, 2)
    for expected, here, there in zip(alone, first, second, strict=True):
        assert torch.equal(here, there)
        torch.testing.assert_close(here, expected, rtol=1e-5, atol=1e-5)


def prefetching(rank: int, count: int, folder: str) -> None:
    torch.set_num_threads(1)
    rendezvous = Path(folder, "rendezvous").as_uri()
    distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=count)
    try:
        torch.save(prefetched(current()), Path(folder, f"{rank}.pt"))
    finally:
        distributed.destroy_process_group()


def prefetched(ranks: Ranks) -> dict:
    """Losses after prefilling ahead, and the forwards that it and they took."""
    tiny = zoo.build(zoo.idefics3)
    episodes = [Episode(query, (7, 8)) for query in (0, 1, 2, 3, 1)]
    masks = torch.rand(4, *find_sites(tiny.model).shape[:2], generator=torch.Generator().manual_seed(1)) < 0.5
    session = sessions.session(tiny, ranks=ranks)
    edit = Edit.replace(torch.ones(session.shape), masks)
    session.losses(Episode(9, (7, 8)), edit)
    before = session.forwards
    session.prefetch(episodes)
    ahead = session.forwards - before
    losses = torch.stack([session.losses(episode, edit, "all") for episode in episodes])
    tight = sessions.session(tiny, ranks=ranks, memory=1)
    tight.prefetch(episodes)
    return {
        "losses": losses,
        "ahead": ahead,
        "after": session.forwards - before - ahead,
        "tight": tight.prefilled_bytes,
    }


@pytest.mark.slow
def test_prompts_are_prefilled_in_shares_and_passed_on(tmp_path):
    expected = prefetched(Ranks())
    assert (expected["ahead"], expected["after"]) == (0, 4 + 5)
    processes.in_ranks(prefetching, 2, 2, str(tmp_path))
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert (found["ahead"], found["after"], found["tight"]) == (2, 5, 0)
        assert (found["losses"] - expected["losses"]).abs().max() < 1e-5


def test_one_process_talks_to_nobody():
    ranks = current()
    assert ranks == Ranks(0, 1)
    assert ranks.shard([1, 2, 3]) == [1, 2, 3]
    assert torch.equal(ranks.all_reduce(torch.ones(2)), torch.ones(2))
    with pytest.raises(KeyError), ranks.raise_together():
        raise KeyError("own")


def test_shares_cover_everything_once():
    for count in (1, 2, 3, 5):
        shares = [Ranks(rank, count).shard(list(range(7))) for rank in range(count)]
        assert sorted(index for share in shares for index in share) == list(range(7))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def launched(count: int, output: Path, limit: int, arguments: str = SHORT) -> tuple[dict, dict]:
    """The harness's command, in one process or started by accelerate; the record and the results."""
    # Its imports take seconds, and each worker of a test imports this module.
    from support import evaluations

    evaluations.command(
        *("--model", "mtv", "--model_args", f"pretrained=tiny,{arguments}"),
        *("--tasks", "shapes_color_en,shapes_phrase_en", "--limit", str(limit), "--output_path", str(output)),
        folder=output.parent,
        processes=count,
    )
    (record,) = output.rglob("*_mtv.json")
    (results,) = output.rglob("*_results.json")
    return json.loads(record.read_text())["tasks"], json.loads(results.read_text())["results"]


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "limit"), [(2, 9), (3, 4)])
def test_the_command_gives_the_same_with_several_processes(processes, limit, tmp_path):
    one, one_results = launched(1, tmp_path / "one", limit)
    several, several_results = launched(processes, tmp_path / "several", limit)
    assert len(list((tmp_path / "several").rglob("vector.safetensors"))) == 2
    for task in one:
        for key in ("vector", "heads", "settings", "split"):
            assert several[task][key] == one[task][key], key
        assert several_results[task]["exact_match,none"] == one_results[task]["exact_match,none"]


@pytest.mark.slow
def test_an_error_in_several_processes_ends_them_all(tmp_path):
    with pytest.raises(AssertionError, match="fit_shots"):
        launched(2, tmp_path / "out", 4, "fit_shots=5000")
