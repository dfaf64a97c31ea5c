"""The methods: REINFORCE, MTV, the random control, and the registry."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import pytest
import torch

from lmms_mtv import VectorCard, methods
from lmms_mtv.errors import ArgumentError, NumericsError
from lmms_mtv.fit import facility_location
from lmms_mtv.fit.policy import EDGE, TEMPERATURE, Policy, concrete, reinforce
from lmms_mtv.fit.selection import demonstration_pool
from lmms_mtv.harness.arguments import split_arguments
from lmms_mtv.methods import gradient_mask, mtv, none
from lmms_mtv.methods import random as control
from lmms_mtv.vectors import HEADS
from support import matrix, zoo
from support.sessions import TokenExamples, session
from support.vectors import card


@dataclass(frozen=True)
class Chosen:
    """Settings with a choice and None."""

    optimizer: Literal["gradient"] | None = None


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


def test_rounding_errors_of_losses_do_not_grow():
    """Few samples often choose a head alike. Adam would step on the rounding error that such a gradient is."""

    def learned(noise: float) -> Policy:
        rounding = torch.Generator().manual_seed(7)

        def losses(step: int, masks: torch.Tensor) -> torch.Tensor:
            exact = 1 + masks.float().mul(torch.linspace(-1, 1, 32).view(4, 8)).flatten(1).sum(1).square()
            return exact * (1 + noise * torch.randn(len(masks), generator=rounding))

        options = {"steps": range(10), "samples": 4, "lr": 0.1, "initial_logit": -1.0}
        return reinforce(losses, (4, 8), **options, generator=torch.Generator().manual_seed(0))[0]

    exact = learned(0.0)
    assert (exact.logits + 1).abs().max() > 0.3
    torch.testing.assert_close(learned(1e-7).logits, exact.logits, rtol=0, atol=1e-3)


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


@pytest.mark.slow
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


def test_defaults_are_those_of_the_authors_code_but_for_the_loss():
    """Theirs is on the first token: an answer of several tokens then does not end."""
    config = mtv.Config()
    assert (config.iterations, config.fit_shots, config.steps, config.samples) == (100, 4, 600, 32)
    assert (config.lr, config.initial_logit, config.examples, config.loss) == (0.1, -1.0, 100, "all")
    assert (config.candidates, config.candidate_examples) == (10, 50)


def test_the_methods_come_in_order():
    assert methods.names()[:3] == ["none", "mtv", "random"]
    assert methods.names()[3:] == sorted(methods.names()[3:])


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


@pytest.mark.parametrize("wrong", ["reinforce", 3])
def test_a_setting_with_a_choice_and_none_is_checked(wrong):
    method = methods.Method("mtv", Chosen, mtv.fit)
    with pytest.raises(ArgumentError, match=f"optimizer={wrong!r} of method mtv: expected one of gradient$"):
        method.configure({"optimizer": wrong})
    assert method.configure({"optimizer": "gradient"}).optimizer == "gradient"
    assert method.configure({"optimizer": None}).optimizer is None


@pytest.mark.parametrize("value", ["gradient", None])
def test_settings_that_became_a_method_are_told(value):
    for name, replacement in (
        ("optimizer", "method=gradient_mask$"),
        ("gradient_steps", "method=gradient_mask with steps=$"),
        ("gradient_samples", "method=gradient_mask with samples=$"),
        ("gradient_lr", "method=gradient_mask with lr=$"),
    ):
        message = f"method mtv has no setting {name}= any more: pass {replacement}"
        with pytest.raises(ArgumentError, match=message):
            methods.get("mtv").configure({name: value})
        with pytest.raises(ArgumentError, match=message):
            split_arguments({"pretrained": "tiny", name: value}, ["pretrained"])
    # A base may have an argument of that name.
    base = split_arguments({"pretrained": "tiny", "optimizer": value}, ["pretrained", "optimizer"])[3]
    assert base == {"pretrained": "tiny", "optimizer": value}


def test_settings_that_contradict_each_other_are_told():
    for given, message in (
        ({"threshold": 0.5, "top_k": 3}, "pass one of them"),
        ({"threshold": 1.0}, "threshold=1.0"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_k": 3, "floor": 0.8}, "floor=0.8"),
        ({"lr": 0}, "lr=0"),
        ({"diverse": 4}, "diverse=4, .*5"),
    ):
        for method in (mtv, gradient_mask):
            with pytest.raises(ArgumentError, match=message):
                method.Config(**given)
    with pytest.raises(ArgumentError, match="samples=1, expected at least 2"):
        mtv.Config(samples=1)
    assert gradient_mask.Config(samples=1).samples == 1
    for name in ("samples", "steps"):
        with pytest.raises(ArgumentError, match=f"{name}=0, expected at least 1"):
            gradient_mask.Config(**{name: 0})


def test_the_authors_way_has_no_new_setting():
    """So that vectors keep their ids."""
    new = ("threshold", "top_k", "diverse")
    config = mtv.Config()
    assert [getattr(config, name) for name in new] == [None] * len(new)
    gone = ("optimizer", "gradient_steps", "gradient_samples", "gradient_lr")
    settings = dataclasses.asdict(config)
    assert card(config=settings | dict.fromkeys(gone)).id == card(config=settings).id


def test_a_card_of_a_setting_that_became_a_method_loads():
    old = card(config=dataclasses.asdict(mtv.Config()) | {"optimizer": "gradient", "gradient_steps": 30})
    assert VectorCard.from_json(old.to_json(), "old") == old


def test_a_gradient_mask_has_its_own_defaults_and_those_of_the_selection():
    own, shared = dataclasses.asdict(gradient_mask.Config()), dataclasses.asdict(mtv.Config())
    assert {name: value for name, value in own.items() if shared[name] != value} == {
        "steps": 30,
        "samples": 8,
        "lr": 1.0,
    }
    assert shared.keys() - own.keys() == {"heads", "settle"}


def test_heads_by_threshold_and_by_number():
    policy = Policy(torch.tensor([[0.0, 9.0, -2.0], [12.0, 0.0, 1.0]]))
    assert policy.above(0.7).tolist() == [[False, True, False], [True, False, True]]
    # 9 and 12 are equally likely after clamping; of the two of logit 0 the first counts.
    assert policy.top(1).tolist() == [[False, False, False], [True, False, False]]
    assert policy.top(4).tolist() == [[True, True, False], [True, False, True]]


@pytest.mark.parametrize("final", [{"threshold": 0.26}, {"top_k": 5}])
def test_final_heads_follow_the_probabilities(final):
    tiny = zoo.build(zoo.llama)
    sampled = mtv.fit(session(tiny), mtv.Config(**SHORT))
    fitted = mtv.fit(session(tiny), mtv.Config(**SHORT, **final))
    assert fitted.losses["policy"] == sampled.losses["policy"]
    assert fitted.losses["probabilities"] == sampled.losses["probabilities"]
    gain, probabilities = fitted.edits[HEADS].gain.flatten(), torch.tensor(fitted.losses["probabilities"])
    if "top_k" in final:
        assert gain.sum() == 5
        assert probabilities[gain == 1].min() > probabilities[gain == 0].max()
    else:
        assert 0 < gain.sum() < len(gain)
        assert torch.equal(gain == 1, probabilities >= 0.26)
    assert fitted.losses["candidates"] == fitted.losses["chosen"]


def test_final_heads_that_cannot_be_had_are_errors():
    tiny = zoo.build(zoo.llama)
    with pytest.raises(ArgumentError, match="top_k=99, but the model has 12 heads"):
        mtv.fit(session(tiny), mtv.Config(**SHORT, top_k=99))
    with pytest.raises(ArgumentError, match=r"threshold=0.99: no head .* pass a lower one"):
        mtv.fit(session(tiny), mtv.Config(**SHORT, threshold=0.99))


def test_concrete_masks_recover_a_planted_mask():
    planted = (torch.rand(4, 8, generator=torch.Generator().manual_seed(3)) < 0.3).float()
    seen = []

    def distance(step, masks):
        seen.append(masks)
        return (masks - planted).square().flatten(1).sum(1), 2 * (masks - planted)

    options = {"samples": 8, "lr": 1.0, "initial_logit": -1.0}
    policy, history = concrete(distance, (4, 8), steps=range(30), generator=torch.Generator().manual_seed(0), **options)
    assert torch.equal(policy.probabilities > 0.5, planted.bool())
    assert history[0] > 5 > 1 > history[-1]
    # More than one half exactly as often as a Bernoulli choice of the first logits.
    many = []
    concrete(
        lambda step, masks: many.append(masks) or (torch.zeros(len(masks)), torch.zeros_like(masks)),
        (2, 2),
        steps=range(1),
        generator=torch.Generator().manual_seed(0),
        **options | {"samples": 20000},
    )
    assert ((many[0] > 0.5).float().mean(0) - torch.tensor(-1.0).sigmoid()).abs().max() < 0.02
    with pytest.raises(NumericsError, match="step 0"):
        concrete(
            lambda step, masks: (torch.zeros(len(masks)), masks * torch.nan),
            (2, 2),
            steps=range(1),
            generator=torch.Generator(),
            **options,
        )


def test_one_concrete_step_is_the_derivative_of_the_relaxed_sample():
    """d mask / d logit = mask (1 - mask) / temperature; one step of Adam on its mean over samples."""
    gradient = torch.randn(6, 2, 3, generator=torch.Generator().manual_seed(1))
    seen = []
    policy, _ = concrete(
        lambda step, masks: seen.append(masks) or (masks.flatten(1).sum(1), gradient),
        (2, 3),
        steps=range(1),
        samples=6,
        lr=0.1,
        initial_logit=-1.0,
        generator=torch.Generator().manual_seed(0),
    )
    expected = (gradient * seen[0] * (1 - seen[0]) / TEMPERATURE).mean(0)
    torch.testing.assert_close(policy.logits, -1.0 - 0.1 * expected / (expected.abs() + 1e-8))


@pytest.mark.parametrize("architecture", matrix.members([zoo.llama, zoo.idefics3], zoo.llama))
@pytest.mark.slow
def test_gradient_masks_lower_the_loss_and_follow_the_seed(architecture):
    tiny = zoo.build(architecture)
    short = {name: SHORT[name] for name in ("iterations", "candidates", "candidate_examples")}
    # One query, so that the losses of all steps compare.
    config = gradient_mask.Config(**short, examples=1, samples=4, lr=0.3)
    hooks = zoo.hooks(tiny.model)
    fitted = gradient_mask.fit(session(tiny), config)
    assert zoo.hooks(tiny.model) == hooks
    policy = fitted.losses["policy"]
    assert len(policy) == config.steps == 30
    assert sum(policy[-10:]) < sum(policy[:10])
    again = gradient_mask.fit(session(tiny), config)
    assert torch.equal(again.edits[HEADS].gain, fitted.edits[HEADS].gain)
    assert again.losses["probabilities"] == fitted.losses["probabilities"]
    other = gradient_mask.fit(session(tiny, seed=1), config)
    assert other.losses["probabilities"] != fitted.losses["probabilities"]


def test_diverse_demonstrations_are_drawn_from_what_stands_for_all():
    tiny = zoo.build(zoo.llama)
    config = mtv.Config(**SHORT, diverse=7)
    pool = demonstration_pool(session(tiny), config)
    assert pool == sorted(facility_location.greedy(session(tiny, batch_size=4).embeddings(), 7))
    expected = session(tiny).mean_activations(session(tiny).episodes(6, 4, "values", pool))
    assert torch.equal(mtv.fit(session(tiny), config).edits[HEADS].value, expected)
    assert demonstration_pool(session(tiny), mtv.Config()) is None
    with pytest.raises(ArgumentError, match="diverse=31, but the training split has 30"):
        mtv.fit(session(tiny), mtv.Config(**SHORT, diverse=31))
