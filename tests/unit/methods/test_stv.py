"""STV: heads by sensitivity, a bank of centroids, and the choice among them."""

from __future__ import annotations

import itertools

import pytest
import torch

from lmms_mtv import applied, record
from lmms_mtv.errors import ArgumentError, NumericsError
from lmms_mtv.fit.policy import Categorical, improved
from lmms_mtv.methods import stv
from lmms_mtv.vectors import HEADS
from support import matrix, zoo
from support.sessions import TokenExamples, session

SHORT = {
    "iterations": 8,
    "fit_shots": 3,
    "clusters": 3,
    "steps": 6,
    "samples": 4,
    "examples": 5,
    "candidate_examples": 4,
}


def fitted(tiny: zoo.Tiny, seed: int = 0, batch_size: int = 1, shots: int = 0, **changes):
    used = session(tiny, seed=seed, batch_size=batch_size, shots=shots)
    return stv.fit(used, stv.Config(**SHORT | changes)), used


def activations(used, episode) -> torch.Tensor:
    """Of each head at the last token, by a forward of its own, [L, H, D]."""
    with torch.no_grad(), record(used.sites) as recording:
        used.runner.run([used.prompts.prompt(episode)])
    return recording.last()[0]


@pytest.mark.parametrize("shots", [0, 1])
@pytest.mark.parametrize("architecture", matrix.members([zoo.llama, zoo.idefics3], zoo.llama))
def test_the_most_sensitive_heads_are_edited(architecture, shots):
    found, used = fitted(zoo.build(architecture), top=5, shots=shots)
    moved = []
    for episode in used.episodes(8, 3, "values"):
        bare = episode._replace(demonstrations=episode.demonstrations[:shots])
        moved.append((activations(used, episode) - activations(used, bare)).pow(2).sum(-1).sqrt())
    expected = torch.stack(moved).mean(0)
    measured = torch.tensor(found.losses["sensitivity"])
    torch.testing.assert_close(measured, expected.flatten(), rtol=1e-4, atol=1e-5)
    mask = found.edits[HEADS].gain.flatten()
    assert mask.sum() == 5
    assert measured[mask == 1].min() >= measured[mask == 0].max()
    assert torch.equal(found.edits[HEADS].keep, 1 - found.edits[HEADS].gain)
    assert found.losses["top"] == [5]


def test_centroids_are_means_of_their_members_and_one_of_them_is_inserted():
    tiny = zoo.build(zoo.idefics3)
    found, used = fitted(tiny, top=4)
    edit = found.edits[HEADS]
    mask = edit.gain.bool()
    contexts = used.activations(used.episodes(8, 3, "values"))[:, mask]
    bank = stv._bank(used, stv.Config(**SHORT), contexts)
    assert bank.shape == (4, 3, used.shape[2])
    for head, centroids in enumerate(bank):
        members = torch.cdist(contexts[:, head], centroids).argmin(1)
        assert set(members.tolist()) == {0, 1, 2}
        for index, centroid in enumerate(centroids):
            torch.testing.assert_close(centroid, contexts[members == index, head].mean(0), rtol=1e-4, atol=1e-5)
        gap = (edit.value[mask][head] - centroids).abs().amax(1)
        assert gap.min() < 1e-6 < gap.max()
    assert not edit.value[~mask].any()
    assert stv._bank(used, stv.Config(**SHORT | {"clusters": 99}), contexts).shape[1] == 8


def test_reinforce_recovers_planted_options():
    planted = torch.randint(6, (10,), generator=torch.Generator().manual_seed(3))
    policy, history = improved(
        Categorical(torch.zeros(10, 6)),
        lambda step, options: (options != planted).float().sum(1),
        steps=range(400),
        samples=32,
        lr=0.1,
        generator=torch.Generator().manual_seed(0),
    )
    assert torch.equal(policy.best, planted)
    assert policy.probabilities.amax(1).min() > 0.9
    assert history[0] > 7 > 1 > history[-1]


def test_one_step_is_the_published_formula():
    """d log p / d logit = [option chosen] - p for a categorical variable; one step of Adam on the logits."""
    start = Categorical(0.5 * torch.randn(2, 3, generator=torch.Generator().manual_seed(2)))
    losses = torch.rand(12, generator=torch.Generator().manual_seed(1)) * 5
    seen = []
    policy, history = improved(
        start,
        lambda step, options: seen.append(options) or losses,
        steps=range(1),
        samples=12,
        lr=0.1,
        generator=torch.Generator().manual_seed(0),
    )
    assert seen[0].shape == (12, 2)
    advantage = (losses - losses.mean()) / (losses.std() + 1e-3)
    chosen = torch.nn.functional.one_hot(seen[0], 3).float()
    assert ((chosen.sum(0) > 0) & (chosen.sum(0) < 12)).all(), "no gradient otherwise"
    gradient = (advantage[:, None, None] * (chosen - start.probabilities)).sum(0)
    torch.testing.assert_close(policy.logits, start.logits - 0.1 * gradient / (gradient.abs() + 1e-8))
    assert history == [pytest.approx(losses.mean().item())]
    with pytest.raises(NumericsError, match="step 0"):
        improved(
            start,
            lambda step, options: losses * torch.nan,
            steps=range(1),
            samples=12,
            lr=0.1,
            generator=torch.Generator(),
        )


def test_options_are_drawn_as_likely_as_the_policy_says():
    policy = Categorical(torch.tensor([[0.0, 0.0, 1.0], [3.0, 0.0, -3.0]]))
    drawn = policy.sample(20000, torch.Generator().manual_seed(0))
    for head in range(2):
        shares = drawn[:, head].bincount(minlength=3) / len(drawn)
        assert (shares - policy.probabilities[head]).abs().max() < 0.02
    assert policy.best.tolist() == [2, 0]
    expected = policy.probabilities[0, 1].log() + policy.probabilities[1, 0].log()
    assert policy.log_probability(torch.tensor([[1, 0]])).tolist() == [pytest.approx(expected.item())]


def test_a_fit_follows_the_seed_and_nothing_else():
    tiny = zoo.build(zoo.llama)
    hooks = zoo.hooks(tiny.model)
    found, again, batched, other = (fitted(tiny, **options)[0] for options in ({}, {}, {"batch_size": 3}, {"seed": 1}))
    assert zoo.hooks(tiny.model) == hooks
    assert all(torch.equal(getattr(found.edits[HEADS], p), getattr(again.edits[HEADS], p)) for p in ("value", "gain"))
    assert found.losses == again.losses
    assert torch.equal(batched.edits[HEADS].gain, found.edits[HEADS].gain)
    torch.testing.assert_close(batched.edits[HEADS].value, found.edits[HEADS].value, rtol=1e-4, atol=1e-5)
    assert batched.losses["policy"] == pytest.approx(found.losses["policy"], abs=1e-4)
    assert not torch.equal(other.edits[HEADS].value, found.edits[HEADS].value)


def test_the_number_of_heads_is_the_one_of_the_lowest_loss():
    tiny = zoo.build(zoo.idefics3)
    found, used = fitted(tiny, loss="first")
    layers, heads, _ = used.shape
    numbers = stv._numbers(layers * heads)
    assert len(found.losses["numbers"]) == len(numbers)
    best = found.losses["numbers"].index(min(found.losses["numbers"]))
    assert found.losses["top"] == [numbers[best]] == [len(found.edits[HEADS].heads)]
    # The losses that judge, by full forwards.
    judges = used.episodes(4, 0, "judges", unlike=used.episodes(8, 3, "values"))
    losses = []
    for episode in judges:
        prompt = used.prompts.prompt(episode)
        with torch.no_grad(), applied(used.sites, found.edits):
            logits = tiny.model(**tiny.inputs([list(prompt.text)])).logits[0, -1]
        losses.append(-logits.log_softmax(-1)[prompt.target[0]].item())
    assert found.losses["chosen"] == [pytest.approx(sum(losses) / 4, abs=1e-4)]
    assert found.losses["means"] == [pytest.approx(min(found.losses["numbers"]), abs=1e-5)]


@pytest.mark.parametrize("heads", [1, 2, 7, 32, 1024])
def test_numbers_of_heads_that_are_tried(heads):
    numbers = stv._numbers(heads)
    assert numbers[0] == 1
    assert numbers[-1] == max(heads // 2, 1)
    assert len(numbers) <= 64
    assert all(after <= max(before + 1, 1.15 * before) for before, after in itertools.pairwise(numbers))


def test_queries_that_judge_are_not_those_of_the_values_or_of_the_policy():
    tiny, asked = zoo.build(zoo.llama), []
    used = session(tiny, examples=TokenExamples(37))
    original = used.losses
    used.losses = lambda episode, edit, tokens="first": asked.append(episode.query) or original(episode, edit, tokens)
    stv.fit(used, stv.Config(**SHORT))
    numbers, policy, judges = set(asked[:4]), set(asked[4:10]), set(asked[10:])
    assert numbers == judges
    assert len(judges) == 4
    values = used.episodes(8, 3, "values")
    assert not judges & {index for episode in values for index in (episode.query, *episode.demonstrations)}
    assert not judges & policy


def test_the_search_lowers_the_loss():
    tiny = zoo.build(zoo.llama)
    options = {"top": 8, "iterations": 16, "clusters": 8, "examples": 1, "steps": 60, "samples": 16}
    losses = fitted(tiny, **options)[0].losses["policy"]
    assert sum(losses[-10:]) < sum(losses[:10]) - 0.1


def test_stages_are_timed():
    _, used = fitted(zoo.build(zoo.llama))
    assert list(used.stages) == ["locations", "bank", "search"]
    assert all(seconds > 0 for seconds in used.stages.values())


def test_settings_that_cannot_work_are_refused():
    for changes, message in (
        ({"top": 0}, "top=0"),
        ({"clusters": 0}, "clusters=0"),
        ({"fit_shots": 0}, "fit_shots=0"),
        ({"samples": 1}, "samples=1"),
        ({"steps": 0}, "steps=0, expected at least 1"),
        ({"lr": 0.0}, "lr=0"),
    ):
        with pytest.raises(ArgumentError, match=message):
            stv.Config(**SHORT | changes)
    tiny = zoo.build(zoo.llama)
    with pytest.raises(ArgumentError, match=r"top=999, but the model has \d+ heads"):
        fitted(tiny, top=999)
    with pytest.raises(ArgumentError, match=r"fit_shots=3 and shots=3: .* pass fit_shots= of at least 4"):
        fitted(tiny, shots=3)
