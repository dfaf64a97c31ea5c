"""Benchmarks run, in their smallest sizes, and their files say what they promise. No time is asserted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import (
    breakdown,
    exactness,
    extraction,
    fit,
    generation,
    gpu,
    images,
    loop,
    measure,
    models,
    prompts,
    scaling,
    selection,
)
from lmms_mtv import Edit, Episode, find_sites
from support import zoo

QUICK = ("--device", "cpu", "--repetitions", "2", "--quiet")


def written(benchmark, folder: Path, *arguments: str) -> dict[str, Any]:
    """What a benchmark writes, once it went well."""
    path = folder / "found" / "figures.json"
    assert benchmark.main([*QUICK, "--json", str(path), *arguments]) == 0
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["machine"]["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert found["machine"]["device"] == found["settings"]["device"] == "cpu"
    assert found["settings"]["dtype"] == "float32"
    return found


def rounds(repetitions: dict[str, list[float]], names: set[str]) -> None:
    """There are two rounds of each, and both took time."""
    assert repetitions.keys() == names
    assert all(len(taken) == 2 and min(taken) > 0 for taken in repetitions.values())


def test_selection(tmp_path, capsys):
    sizes = ("--tokens", "9", "20", "--masks", "4", "--steps", "6", "--loop", "4")
    found = written(selection, tmp_path, *sizes)
    assert [result["tokens"] for result in found["results"]] == [9, 20]
    assert found["speedup"] == min(result["speedup"] for result in found["results"])
    for result in found["results"]:
        assert result["replays"] is True
        assert result["gap"] <= result["tolerance"] == 1e-4
        rounds(result["repetitions"], {"loop", "ours", "first_step_of_an_example", "later_step"})
        assert result["checks"] > 0
    assert "tiny, 9 tokens, 4 masks: a step takes" in capsys.readouterr().out


def test_selection_fails_where_losses_differ(tmp_path, monkeypatch, capsys):
    plain = selection.full_losses
    monkeypatch.setattr(selection, "full_losses", lambda *given: plain(*given) + 2e-4)
    path = tmp_path / "figures.json"
    small = ("--tokens", "9", "--masks", "2", "--steps", "6", "--json", str(path))
    assert selection.main([*QUICK, *small]) == 1
    assert "differ" in capsys.readouterr().err
    assert 1e-4 < json.loads(path.read_text())["results"][0]["gap"] < 3e-4


def test_the_parts_of_a_fit(tmp_path, capsys):
    sizes = ("--tokens", "6", "--prompts", "2", "--steps", "3", "--masks", "4", "--rows", "9")
    parts = written(breakdown, tmp_path, *sizes)["parts"]
    assert parts.keys() == {"means", "prefills", "steps"}
    for part in parts.values():
        assert part["seconds"] > part["busy"] == 0
        assert (len(part["functions"]), part["kernels"]) == (9, [])
    assert "steps: " in capsys.readouterr().out


@pytest.mark.slow
def test_a_whole_fit_beside_the_loop(tmp_path, capsys):
    found = written(loop, tmp_path, "--scale", "50", "--tokens", "6", "--part", "4", "--shots", "2")
    assert found["forwards_of_the_loop"] == {"extraction": 2, "selection": 12 * 32, "choice": 10}
    assert found["measured_forwards_of_each_stage"] == 4
    assert found["tokens"] == {"few_shot": 18, "zero_shot": 6}
    assert found["gap"] <= found["tolerance"] == 1e-4
    for stages, whole in zip(found["stages"], found["repetitions"]["loop"], strict=True):
        assert sum(stages["loop"].values()) == pytest.approx(whole)
    rounds(found["repetitions"], {"loop", "ours", "settled"})
    assert found["steps_before_settled"] == [12, 12]
    assert "tiny: a fit takes" in capsys.readouterr().out


def test_the_loop_takes_word_pairs_with_a_packaged_model_alone(capsys):
    for wrong in (["--model", "smollm2"], ["--model", "tiny", "--pairs", "pairs.json"]):
        with pytest.raises(SystemExit):
            loop.main(wrong)
        assert "a packaged model needs --pairs" in capsys.readouterr().err


@pytest.mark.slow
def test_a_whole_fit(tmp_path, capsys):
    found = written(fit, tmp_path, "--scale", "25", "--tokens", "6")
    assert found["fit"] == {"fit_shots": 4, "samples": 32} | {
        "iterations": 4,
        "steps": 24,
        "examples": 4,
        "candidate_examples": 2,
    }
    assert found["tokens"] == {"few_shot": 30, "zero_shot": 6}
    assert found["replays"] is True
    assert found["forwards"] > 24
    assert found["stages"].keys() == {"values", "selection"}
    rounds(found["repetitions"], {"fit"})
    assert "tiny: a fit takes" in capsys.readouterr().out


@pytest.mark.parametrize("architecture", [zoo.idefics2, zoo.qwen2_5_vl])
@pytest.mark.slow
def test_prompts_have_images_that_the_model_sees(architecture):
    """Their tokens take as many features as the encoder makes, and other pixels make other logits."""
    model = zoo.build(architecture).model
    seen = images.of(model)
    examples = prompts.SyntheticExamples(6, 3, 20, image=seen.ids)
    prompt = examples.prompt(Episode(0, (1, 2)))
    assert (prompt.images, len(prompt.text)) == (3, 3 * (3 + len(seen.ids)))
    given = prompts.batch(model, [prompt], seen)
    with torch.no_grad():
        plain = model(**given).logits[0, -1]
        other = model(**given | {"pixel_values": -given["pixel_values"]}).logits[0, -1]
    assert not torch.allclose(plain, other)
    session = prompts.session(model, examples)
    mask = torch.rand(4, *session.shape[:2], generator=torch.Generator().manual_seed(0)) < 0.5
    assert session.losses(Episode(3, (1,)), Edit.replace(prompts.values(model), mask)).shape == (4,)
    assert session.replays is True
    assert session.mean_activations([Episode(4, (1, 2)), Episode(5, (0, 2))]).isfinite().all()


@pytest.mark.parametrize("wrong", [("--steps", "7"), ("--loop", "33"), ("--model", "huge")])
def test_what_cannot_be_measured_is_refused(wrong):
    with pytest.raises(SystemExit):
        selection.main([*QUICK, *wrong])


def test_the_loop_replaces_heads_at_the_last_token_alone():
    """Against the plugin's own edit, and against no edit at the tokens before."""
    model = models.build("tiny", torch.device("cpu"))
    examples, value = prompts.examples(model, 2, 7), prompts.values(model)
    prompt, sites = examples.prompt(Episode(0, ())), find_sites(model)
    mask = torch.zeros(1, *sites.shape[:2], dtype=torch.bool)
    mask[0, 1, 2] = True
    session = prompts.session(model, examples)
    projections = [site.module for site in sites]
    found = selection.full_losses(model, projections, prompt, value, mask)
    assert torch.allclose(found, session.losses(Episode(0, ()), Edit.replace(value, mask)), atol=1e-5)
    given = torch.ones(1, 3, 128)
    seen = []
    with selection.replaced(projections, value, mask[0]):
        handle = projections[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        projections[1](given)
        handle.remove()
    expected = given.clone()
    expected[0, 2, 32:48] = value[1, 2]
    assert torch.equal(seen[0], expected)
    assert not any(projection._forward_pre_hooks for projection in projections)


def test_generation(tmp_path):
    found = written(generation, tmp_path, "--tokens", "6", "--new", "3", "--batch", "1", "2", "--shots", "1")
    assert [result["batch"] for result in found["results"]] == [1, 2]
    assert found["batch"] == 2
    assert found["ratio"] == found["results"][1]["ratio"] > 0
    for result in found["results"]:
        rounds(result["repetitions"], {"plain", "edited", "1 shots"})
        assert result["tokens_per_second"].keys() == result["memory"].keys() == result["repetitions"].keys()


def test_extraction(tmp_path):
    found = written(extraction, tmp_path, "--tokens", "5", "--shots", "1", "--prompts", "3", "--batch", "1", "2")
    assert [result["tokens"] for result in found["results"]] == [30, 30]
    best = max(found["results"], key=lambda result: result["tokens_per_second"]["plain"])
    assert (found["ratio"], found["batch"]) == (best["ratio"], best["batch"])
    for result in found["results"]:
        rounds(result["repetitions"], {"plain", "ours"})


SMALL = ("--tokens", "5", "8", "--masks", "2", "3", "--layers", "1", "2", "--examples", "1", "2", "--shots", "1")


@pytest.mark.slow
def test_scaling(tmp_path):
    found = written(scaling, tmp_path, *SMALL, "--processes", "0")
    assert found["ratio"] is found["processes"] is None
    assert found["axes"].keys() == {"tokens", "masks", "layers", "examples"}
    for axis, points in found["axes"].items():
        assert [point["value"] for point in points] == found["settings"][axis]
        assert points[0]["growth"] == {"extraction": 1.0, "selection": 1.0}
        for point in points:
            rounds(point["repetitions"], {"extraction", "selection"})


@pytest.mark.slow
def test_scaling_over_processes(tmp_path):
    found = written(scaling, tmp_path, *SMALL, "--processes", "2")
    assert found["processes"]["count"] == 2
    assert found["ratio"] == found["processes"]["ratio"] > 0
    assert found["processes"]["ceiling"] > 0
    rounds(found["processes"]["repetitions"], {"one", "all", "apart"})


@pytest.mark.slow
def test_harness(tmp_path):
    from benchmarks import harness

    found = written(harness, tmp_path, "--limit", "2", "--batch", "2")
    rounds(found["repetitions"], {"alone", "none", "vector"})
    assert found["ratio"] > 0
    assert found["none_ratio"] > 0


@pytest.mark.parametrize(
    ("name", "shape", "billions"),
    [
        ("tiny", (4, 8, 16), 0.00085),
        ("half", (24, 14, 64), 0.494),
        ("idefics2-8b", (32, 32, 128), 8.40),
        ("qwen2.5-vl-7b", (28, 28, 128), 8.29),
    ],
)
def test_models_have_the_shapes_of_their_names(name, shape, billions):
    model = models.build(name, torch.device("meta"), torch.bfloat16)
    assert find_sites(model).shape == shape
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.01)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", models.NAMES)
def test_a_model_may_have_fewer_layers(name):
    assert find_sites(models.build(name, torch.device("meta"), layers=2)).shape[0] == 2


def test_a_seed_gives_the_same_weights():
    once, again, other = (models.build("tiny", torch.device("cpu"), seed=seed) for seed in (3, 3, 4))
    first, same, changed = (next(model.parameters()) for model in (once, again, other))
    assert torch.equal(first, same)
    assert not torch.equal(first, changed)


def test_rounds_alternate_and_the_first_does_not_count():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "ab"}
    found = measure.interleaved(runs, 2, torch.device("cpu"), progress=False)
    assert "".join(order) == "ababab"
    rounds(found, {"a", "b"})
    assert measure.ratio({"a": [2.0, 9.0, 3.0], "b": [1.0, 1.0, 3.0]}, "a", "b") == 2.0


def test_exactness(tmp_path, capsys):
    found = written(exactness, tmp_path, "--steps", "10", "--tokens", "6")
    assert found["results"].keys() == {"again", "batches of 4"}
    assert found["results"]["again"] | {"common": 0, "heads": 0} == dict.fromkeys(found["results"]["again"], 0)
    for result in found["results"].values():
        assert 0 < result["common"] == result["heads"]
        assert max(result["values"], result["first_loss"]) <= found["tolerance"] == 1e-4
    assert (found["halved"], found["failed"]) == (None, [])
    assert "heads are the same" in capsys.readouterr().out


@pytest.mark.slow
def test_exactness_fails_where_a_second_fit_differs(tmp_path, monkeypatch, capsys):
    plain = exactness.difference
    monkeypatch.setattr(exactness, "difference", lambda *fits: plain(*fits) | {"values": 1e-6})
    path = tmp_path / "figures.json"
    assert exactness.main([*QUICK, "--steps", "4", "--tokens", "6", "--json", str(path)]) == 1
    assert json.loads(path.read_text())["failed"] == ["again"]
    assert "not the same: again" in capsys.readouterr().err


@pytest.mark.slow
def test_all_benchmarks_of_a_gpu_run_in_one_command(tmp_path, capsys):
    path = tmp_path / "found" / "figures.json"
    assert gpu.main(["--quick", "--device", "cpu", "--json", str(path)]) == 0
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["runs"].keys() == gpu.QUICK.keys()
    assert all(run["status"] == 0 and run["figures"]["machine"] for run in found["runs"].values())
    assert "exactness, " in capsys.readouterr().out


@pytest.mark.slow
def test_a_benchmark_that_fails_is_in_the_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "QUICK", {"selection": ("selection", "--steps", "7"), "none": ("selection", "--help")})
    path = tmp_path / "figures.json"
    assert gpu.main(["--quick", "--device", "cpu", "--json", str(path)]) == 1
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
    assert [run["status"] for run in runs.values()] == [2, 0]
    assert "expected a multiple of 6" in runs["selection"]["output"]
    assert "selection" in capsys.readouterr().out


def test_the_runs_of_a_gpu_need_one(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu", "--json", str(tmp_path / "figures.json")])
    assert "--quick" in capsys.readouterr().err
