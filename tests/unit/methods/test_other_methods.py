"""The methods other than MTV: their formulas, recomputed."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional

from lmms_mtv import applied, methods, record
from lmms_mtv.errors import ArgumentError
from lmms_mtv.fit.examples import Episode
from lmms_mtv.methods import function_vector, icv, task_vector
from lmms_mtv.vectors import MLP, RESIDUAL
from support import matrix, zoo
from support.sessions import TokenExamples, session

SHORT = {
    "function_vector": {"iterations": 4, "fit_shots": 3, "effect_examples": 2, "top": 3, "examples": 3},
    "task_vector": {"iterations": 1, "fit_shots": 3, "examples": 3},
    "icv": {"iterations": 4},
}
BOTH = [zoo.llama, zoo.idefics3]


def fitted(name: str, tiny: zoo.Tiny, seed: int = 0, **changes):
    method = methods.get(name)
    return method.fit(session(tiny, seed=seed), method.configure(SHORT[name] | changes))


STAGES = {
    "mtv": ["values", "selection"],
    "function_vector": ["values", "effects", "layer"],
    "task_vector": ["values", "layer"],
    "icv": ["values"],
    "m2iv": ["judging", "learning"],
    "i2cl": ["values", "judging", "learning"],
}


@pytest.mark.parametrize("name", STAGES)
def test_a_fit_tells_how_long_its_parts_took(name):
    used = session(zoo.build(zoo.llama))
    method = methods.get(name)
    short = {"iterations": 2, "steps": 2, "examples": 2, "candidate_examples": 2, "epochs": 1, "fit_shots": 2}
    short = {key: value for key, value in short.items() if key in method.settings()}
    method.fit(used, method.configure(SHORT.get(name, short)))
    assert list(used.stages) == STAGES[name]
    assert all(seconds > 0 for seconds in used.stages.values())


def activations(used, episode, stream="heads"):
    """At the last token of a prompt, by a forward of its own, [L, H, D]."""
    prompt = used.prompts.prompt(episode)
    with torch.no_grad(), record(used.sites, stream) as recording:
        used.runner.run([prompt])
    return recording.last()[0]


def likelihood(used, tiny, episode, edit=None) -> float:
    """Of the first answer token, from a full forward."""
    prompt = used.prompts.prompt(episode)
    with torch.no_grad(), applied(used.sites, {"heads": edit} if edit else {}):
        logits = tiny.model(**tiny.inputs([list(prompt.text)])).logits[0, -1]
    return functional.softmax(logits, -1)[prompt.target[0]].item()


@pytest.mark.parametrize("corrupted", ["shuffled", "bare"])
@pytest.mark.parametrize("architecture", matrix.members([*BOTH, zoo.gpt2], zoo.llama))
def test_a_function_vector_is_the_sum_of_projected_means_of_the_most_effective_heads(architecture, corrupted):
    tiny = zoo.build(architecture)
    found = fitted("function_vector", tiny, corrupted=corrupted)
    used = session(tiny)
    means = torch.stack([activations(used, e) for e in used.episodes(4, 3, "values")]).mean(0)
    prompts = function_vector._corrupted(used, function_vector.Config(**SHORT["function_vector"], corrupted=corrupted))
    layers, heads, size = used.shape
    effects = torch.zeros(layers, heads)
    for layer in range(layers):
        for head in range(heads):
            mask = torch.zeros(layers, heads)
            mask[layer, head] = 1
            edit = function_vector.Edit.replace(means, mask)
            gains = [likelihood(used, tiny, e, edit) - likelihood(used, tiny, e) for e in prompts]
            effects[layer, head] = sum(gains) / len(gains)
    torch.testing.assert_close(torch.tensor(found.losses["effects"]), effects.flatten(), rtol=1e-3, atol=1e-5)
    expected = torch.zeros(used.sites.width)
    for index in effects.flatten().argsort(descending=True)[:3].tolist():
        layer, head = divmod(index, heads)
        module = used.sites[layer].module
        weight = module.weight.T if hasattr(module, "nf") else module.weight
        expected += (weight[:, head * size : (head + 1) * size] @ means[layer, head]).detach()
    edit = found.edits[RESIDUAL]
    ((layer, _),) = edit.heads
    torch.testing.assert_close(edit.value[layer, 0], expected, rtol=1e-3, atol=1e-4)
    assert (edit.keep[layer, 0], edit.gain[layer, 0]) == (1, 1)
    assert found.losses["layers"][layer] == min(found.losses["layers"])


def test_shuffled_answers_are_those_of_the_same_demonstrations():
    used = session(zoo.build(zoo.llama))
    config = function_vector.Config(effect_examples=8, fit_shots=6)
    prompts = function_vector._corrupted(used, config)
    assert all(sorted(episode.answers) == sorted(episode.demonstrations) for episode in prompts)
    assert all(episode.answers != episode.demonstrations for episode in prompts)
    plain, shuffled = (used.prompts.prompt(e).text for e in (prompts[0]._replace(answers=None), prompts[0]))
    assert plain != shuffled
    assert sorted(plain) == sorted(shuffled)
    bare = function_vector._corrupted(used, dataclasses.replace(config, corrupted="bare"))
    assert [(episode.demonstrations, episode.answers) for episode in bare] == [((), None)] * 8


@pytest.mark.parametrize("architecture", matrix.members(BOTH, zoo.llama))
def test_a_task_vector_is_the_recorded_state_of_a_few_shot_prompt(architecture):
    tiny = zoo.build(architecture)
    found = fitted("task_vector", tiny, loss="first")
    used = session(tiny)
    (prompt,) = used.episodes(1, 3, "values")
    edit = found.edits[RESIDUAL]
    ((layer, _),) = edit.heads
    torch.testing.assert_close(edit.value[layer, 0], activations(used, prompt, RESIDUAL)[layer, 0])
    assert (edit.keep[layer, 0], edit.gain[layer, 0]) == (0, 1)
    # The layers' losses, by full forwards of the held-out queries with the state written in by hand.
    queries = used.episodes(3, 0, "selection", unlike=[prompt])
    assert not {q.query for q in queries} & {prompt.query, *prompt.demonstrations}
    value = activations(used, prompt, RESIDUAL)
    losses = []
    for index, site in enumerate(used.sites):

        def write(_, args, output, index=index):
            state = output[0] if isinstance(output, tuple) else output
            state = torch.cat([state[:, :-1], value[index].expand(state.shape[0], 1, -1)], 1)
            return (state, *output[1:]) if isinstance(output, tuple) else state

        handle = site.block[1].register_forward_hook(write)
        losses.append(sum(-torch.tensor(likelihood(used, tiny, q)).log().item() for q in queries) / 3)
        handle.remove()
    assert found.losses["layers"] == pytest.approx(losses, abs=1e-4)
    assert layer == losses.index(min(losses))


def test_in_context_vectors_are_first_principal_components():
    """Of hidden states; they are added behind each MLP, as the authors' code does."""
    tiny = zoo.build(zoo.llama)
    found = fitted("icv", tiny, strength=0.3).edits[MLP]
    used = session(tiny)
    prompts = used.episodes(4, 0, "values")
    before, after, outputs = [], [], []
    for episode in prompts:
        prompt = used.prompts.prompt(episode)
        with torch.no_grad(), record(used.sites, MLP) as recording:
            tiny.model(**tiny.inputs([list(prompt.text)]))
        outputs.append(recording.last()[0, :, 0])
        for states, text in ((before, prompt.text), (after, (*prompt.text, *prompt.target))):
            with torch.no_grad(), record(used.sites, RESIDUAL) as recording:
                tiny.model(**tiny.inputs([list(text)]))
            states.append(recording.last()[0, :, 0])
    first, second = torch.stack(before), torch.stack(after)
    assert found.everywhere
    assert found.renormed
    for layer in range(zoo.LAYERS):
        differences = (second - first)[:, layer]
        values, vectors = torch.linalg.eigh(differences.T @ differences)
        direction = found.value[layer, 0] / found.value[layer, 0].norm()
        assert abs(direction @ vectors[:, values.argmax()]).item() == pytest.approx(1, abs=1e-4)
        assert direction @ differences.mean(0) > 0
        norms = torch.stack(outputs)[:, layer].norm(dim=-1)
        torch.testing.assert_close(found.value[layer, 0].norm(), norms.mean())
    assert torch.equal(found.gain, torch.full((zoo.LAYERS, 1), 0.3))


def test_queries_unlike_others_are_fresh_where_enough_are_left():
    used = session(zoo.build(zoo.llama), examples=TokenExamples(10))
    seen = [Episode(0, (1, 2)), Episode(3, ())]
    assert {e.query for e in used.episodes(6, 1, "x", unlike=seen)} == {4, 5, 6, 7, 8, 9}
    assert {e.query for e in used.episodes(7, 1, "x", unlike=seen)} & {0, 1, 2, 3}
    assert used.episodes(5, 1, "x") == used.episodes(5, 1, "x", unlike=[])


def test_settings_that_cannot_work_are_refused():
    for config, changes, message in (
        (function_vector.Config, {"fit_shots": 1}, "corrupted=bare"),
        (function_vector.Config, {"top": 0}, "top=0"),
        (task_vector.Config, {"examples": 0}, "examples=0"),
        (icv.Config, {"iterations": 0}, "iterations=0"),
    ):
        with pytest.raises(ArgumentError, match=message):
            config(**changes)
    with pytest.raises(ArgumentError, match=r"corrupted='none'.*one of shuffled, bare"):
        methods.get("function_vector").configure({"corrupted": "none"})
    assert function_vector.Config(fit_shots=1, corrupted="bare").top == 10
