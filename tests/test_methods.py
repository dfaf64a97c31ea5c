"""The methods: REINFORCE, MTV, the random control, and the registry."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import zoo
from sessions import TokenExamples, session

from lmms_mtv import methods
from lmms_mtv.errors import ArgumentError, NumericsError
from lmms_mtv.methods import mtv, none
from lmms_mtv.methods import random as control
from lmms_mtv.policy import EDGE, Policy, reinforce
from lmms_mtv.vector import HEADS

SHORT = {"iterations": 6, "steps": 12, "samples": 4, "examples": 5, "candidates": 3, "candidate_examples": 4}


def test_reinforce_recovers_a_planted_mask():
    planted = torch.rand(4, 8, generator=torch.Generator().manual_seed(3)) < 0.3
    policy, history = reinforce(
        lambda step, masks: (masks != planted).flatten(1).float().sum(1),
        (4, 8),
        steps=range(600),
        samples=32,
        lr=0.1,
        initial_logit=-1.0,
        generator=torch.Generator().manual_seed(0),
    )
    assert torch.equal(policy.probabilities > 0.5, planted)
    assert (policy.probabilities - planted.float()).abs().max() < 0.1
    assert history[0] > 5 > 1 > history[-1]


def test_one_step_of_reinforce_is_the_published_formula():
    """Sum over samples of log p(mask) (loss - mean) / (std + 1e-3), one step of Adam on the logits."""
    shape, samples, lr = (2, 2), 12, 0.1
    masks = torch.rand(samples, *shape, generator=torch.Generator().manual_seed(0)) < torch.tensor(-1.0).sigmoid()
    assert all(0 < chosen < samples for chosen in masks.sum(0).flatten()), "no gradient otherwise"
    losses = torch.rand(samples, generator=torch.Generator().manual_seed(1)) * 5
    advantage = (losses - losses.mean()) / (losses.std() + 1e-3)
    probability = torch.tensor(-1.0).sigmoid()
    # d log p / d logit = mask - p for a Bernoulli variable.
    gradient = (advantage[:, None, None] * (masks.float() - probability)).sum(0)
    expected = -1.0 - lr * gradient / (gradient.abs() + 1e-8)  # the first step of Adam

    seen = []
    policy, history = reinforce(
        lambda step, found: seen.append(found) or losses,
        shape,
        steps=range(1),
        samples=samples,
        lr=lr,
        initial_logit=-1.0,
        generator=torch.Generator().manual_seed(0),
    )
    assert torch.equal(seen[0], masks)
    torch.testing.assert_close(policy.logits, expected)
    assert history == [pytest.approx(losses.mean().item())]


def test_policy_is_clamped_and_respects_its_floor():
    policy = Policy(torch.tensor([[-100.0, 100.0, 0.0]]))
    assert policy.probabilities.tolist() == [[pytest.approx(EDGE), pytest.approx(1 - EDGE), 0.5]]
    drawn = policy.sample(4000, torch.Generator().manual_seed(0), floor=0.8)
    assert drawn.shape == (4000, 1, 3)
    assert drawn[:, 0, 0].sum() == drawn[:, 0, 2].sum() == 0
    assert drawn[:, 0, 1].float().mean() > 0.99


def test_a_loss_that_is_not_finite_stops_the_selection():
    with pytest.raises(NumericsError, match="step 0"):
        reinforce(
            lambda step, masks: torch.full((2,), torch.nan),
            (1, 1),
            steps=range(3),
            samples=2,
            lr=0.1,
            initial_logit=-1.0,
            generator=torch.Generator(),
        )


@pytest.mark.parametrize("loss", ["first", "all"])
def test_mtv_replaces_the_chosen_heads_by_the_means(loss):
    tiny = zoo.build(zoo.idefics3)
    config = mtv.Config(**SHORT, fit_shots=3, loss=loss)
    before = zoo.hooks(tiny.model)
    fitted = mtv.fit(session(tiny), config)
    assert zoo.hooks(tiny.model) == before
    edit = fitted.edits[HEADS]
    means = session(tiny).mean_activations(session(tiny).episodes(6, 3, "values"))
    assert torch.equal(edit.value, means)
    assert torch.equal(edit.keep, 1 - edit.gain)
    assert set(edit.gain.unique().tolist()) <= {0.0, 1.0}
    assert len(fitted.losses["policy"]) == 12
    assert fitted.losses["chosen"][0] == min(fitted.losses["candidates"])

    again = mtv.fit(session(tiny), config).edits[HEADS]
    assert torch.equal(again.value, edit.value)
    assert torch.equal(again.gain, edit.gain)
    other = mtv.fit(session(tiny, seed=1), config).edits[HEADS]
    assert not torch.equal(other.value, edit.value)


def test_selection_lowers_the_loss():
    tiny = zoo.build(zoo.llama)
    config = mtv.Config(**SHORT | {"steps": 300, "samples": 32, "examples": 20}, fit_shots=4)
    losses = mtv.fit(session(tiny, examples=TokenExamples(30, 1)), config).losses["policy"]
    assert sum(losses[-60:]) < 0.97 * sum(losses[:60])


def test_the_queries_that_judge_are_not_those_of_the_policy():
    tiny = zoo.build(zoo.llama)
    asked = []
    watched = session(tiny)
    original = watched.losses
    watched.losses = lambda episode, edit, tokens="first": (
        asked.append((episode, edit.batch)) or original(episode, edit, tokens)
    )
    mtv.fit(watched, mtv.Config(**SHORT))
    policy = {episode.query for episode, batch in asked[:12]}
    judges = {episode.query for episode, batch in asked[12:]}
    assert len(judges) == 4
    assert not policy & judges


def test_random_heads_match_mtv_layer_by_layer():
    tiny = zoo.build(zoo.llama)
    chosen = mtv.fit(session(tiny), mtv.Config(**SHORT)).edits[HEADS]
    drawn = control.fit(session(tiny), control.Config(**SHORT)).edits[HEADS]
    assert torch.equal(drawn.value, chosen.value)
    assert torch.equal(drawn.gain.sum(1), chosen.gain.sum(1))
    again = control.fit(session(tiny), control.Config(**SHORT)).edits[HEADS]
    assert torch.equal(drawn.gain, again.gain)
    different = [
        not torch.equal(
            *(
                method.fit(session(tiny, seed=seed), method.Config(**SHORT)).edits[HEADS].gain
                for method in (mtv, control)
            )
        )
        for seed in range(4)
    ]
    assert any(different)


def test_none_edits_nothing():
    assert none.fit(session(zoo.build(zoo.llama)), none.Config()).edits == {}


def test_defaults_are_those_of_the_authors_code():
    config = mtv.Config()
    assert (config.iterations, config.fit_shots, config.steps, config.samples) == (100, 4, 600, 32)
    assert (config.lr, config.initial_logit, config.examples, config.loss) == (0.1, -1.0, 100, "first")
    assert (config.candidates, config.candidate_examples) == (10, 50)


def test_every_method_is_one_file_found_by_name():
    assert methods.names()[:3] == ["none", "mtv", "random"]
    for name in methods.names():
        method = methods.get(name)
        assert dataclasses.is_dataclass(method.config)
        assert method.config.__dataclass_params__.frozen
        assert method.fit.__doc__


def test_wrong_names_and_values_are_told_apart():
    with pytest.raises(ArgumentError, match="Did you mean 'random'"):
        methods.get("randon")
    method = methods.get("mtv")
    with pytest.raises(ArgumentError, match="Did you mean 'steps'"):
        method.configure({"step": 3})
    with pytest.raises(ArgumentError, match=r"loss='last'.*one of first, all"):
        method.configure({"loss": "last"})
    with pytest.raises(ArgumentError, match=r"steps='many'.*int"):
        method.configure({"steps": "many"})
    with pytest.raises(ArgumentError, match="iterations=0"):
        method.configure({"iterations": 0})
    with pytest.raises(ArgumentError, match="steps=True"):
        method.configure({"steps": True})
    assert method.configure({"lr": 1}).lr == 1
