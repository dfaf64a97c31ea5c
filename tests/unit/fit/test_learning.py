"""Learning edits from gradients: the gradients themselves, the schedule, and the formulas of the methods that do it."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch.nn import functional

from lmms_mtv import applied, methods, record
from lmms_mtv.errors import ArgumentError, DataError, HookError
from lmms_mtv.fit import learning
from lmms_mtv.fit.examples import Episode
from lmms_mtv.fit.learning import Distillation, TrainingQuery
from lmms_mtv.hooks import checkpointed, find_sites, shape
from lmms_mtv.methods import i2cl, live, m2iv, mimic
from lmms_mtv.vectors import ATTENTION, HEADS, MLP, RESIDUAL, Edit
from support import matrix, zoo
from support.sessions import TokenExamples, session

BOTH = [zoo.llama, zoo.idefics3]
SHORT = {"examples": 4, "epochs": 2, "accumulation": 2, "judges": 2}


def everywhere(value: torch.Tensor) -> Edit:
    ones = torch.ones(value.shape[:2])
    return Edit(value, ones, ones, everywhere=True)


def by_hand(tiny: zoo.Tiny, tokens: list[int], edits: dict[str, Edit] | None = None) -> torch.Tensor:
    """Logits of a plain forward, [tokens, vocabulary]."""
    with applied(tiny.model, edits or {}):
        return tiny.model(**tiny.inputs([tokens])).logits[0]


def whole(prompt) -> list[int]:
    return [*prompt.text, *prompt.target[:-1]]


@pytest.mark.parametrize("architecture", matrix.members(BOTH, zoo.idefics3))
@pytest.mark.parametrize("tokens", ["first", "all"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_finite_differences_and_reach_no_weight(architecture, tokens, checkpointing):
    tiny = zoo.build(architecture)
    used = session(tiny, examples=TokenExamples(answer=2))
    before, training = zoo.hooks(tiny.model), [module.training for module in tiny.model.modules()]
    wanted = [weight.requires_grad for weight in tiny.model.parameters()]
    episodes = [Episode(3, ()), Episode(5, (1,)), Episode(3, ())]
    generator = torch.Generator().manual_seed(0)
    value = (0.1 * torch.randn(shape(used.sites, MLP), generator=generator)).requires_grad_()
    unused = torch.ones(2, requires_grad=True)

    def loss(index):
        return lambda answer: (index + 1) * functional.cross_entropy(answer.logits, answer.target)

    losses, (gradient, nothing) = used.gradients(
        episodes, [value, unused], lambda _: {MLP: everywhere(value)}, loss, tokens=tokens, checkpointing=checkpointing
    )
    assert torch.equal(nothing, torch.zeros(2))
    assert value.grad is None
    assert all(weight.grad is None for weight in tiny.model.parameters())
    assert wanted == [weight.requires_grad for weight in tiny.model.parameters()]
    assert (before, training) == (zoo.hooks(tiny.model), [module.training for module in tiny.model.modules()])

    def expected(moved: torch.Tensor) -> torch.Tensor:
        found = []
        for index, episode in enumerate(episodes):
            prompt = TokenExamples(answer=2).prompt(episode)
            target = prompt.target[:1] if tokens == "first" else prompt.target
            logits = by_hand(tiny, [*prompt.text, *target[:-1]], {MLP: everywhere(moved)})
            found.append((index + 1) * functional.cross_entropy(logits[-len(target) :], torch.tensor(target)))
        return torch.stack(found)

    with torch.no_grad():
        torch.testing.assert_close(losses, expected(value), rtol=1e-4, atol=1e-4)
        direction = gradient / gradient.norm()
        step = 0.02 * direction
        slope = (expected(value + step).sum() - expected(value - step).sum()) / (2 * step.norm())
    assert slope.item() == pytest.approx(gradient.norm().item(), rel=0.02)


def test_checkpointing_runs_blocks_again_and_changes_no_number():
    tiny = zoo.build(zoo.llama)
    used, value = session(tiny), torch.zeros(shape(find_sites(tiny.model), ATTENTION), requires_grad=True)
    runs: list[int] = []
    layer = used.sites[0].block[1]
    handle = layer.mlp.register_forward_pre_hook(lambda *_: runs.append(1))

    def gradients(checkpointing: bool):
        return used.gradients(
            [Episode(3, ())],
            [value],
            lambda _: {ATTENTION: everywhere(value)},
            lambda _: lambda answer: answer.logits.square().sum(),
            checkpointing=checkpointing,
        )

    gradients(False)
    found = []
    for checkpointing in (False, True):
        runs.clear()
        found.append(gradients(checkpointing))
        assert len(runs) == 1 + checkpointing
    handle.remove()
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1][0], found[1][1][0])


def test_what_cannot_be_checkpointed_is_told():
    sites = find_sites(zoo.build(zoo.llama).model)
    block = sites[1].block[1]
    block.dropout = 0.1
    with pytest.raises(HookError, match=r"dropout of its own.*leave out checkpointing"), checkpointed(sites):
        pass
    assert all("training" in vars(site.block[1]) and not site.block[1].training for site in sites)


def test_autocast_computes_in_bfloat16():
    tiny = zoo.build(zoo.llama)
    value = torch.zeros(shape(find_sites(tiny.model), ATTENTION), requires_grad=True)

    def gradient(autocast):
        return session(tiny).gradients(
            [Episode(3, ())],
            [value],
            lambda _: {ATTENTION: everywhere(value)},
            lambda _: lambda answer: functional.cross_entropy(answer.logits, answer.target),
            autocast=autocast,
        )

    (loss, (exact,)), (coarse, (near,)) = gradient(False), gradient(True)
    assert not torch.equal(loss, coarse)
    assert coarse.item() == pytest.approx(loss.item(), abs=0.05)
    assert functional.cosine_similarity(exact.flatten(), near.flatten(), dim=0) > 0.98


@pytest.mark.parametrize("architecture", matrix.members(BOTH, zoo.idefics3))
def test_an_answer_has_the_logits_and_states_of_a_plain_forward(architecture):
    tiny, examples = zoo.build(architecture), TokenExamples(answer=3)
    used, episode = session(tiny, examples=examples), Episode(3, (5, 6))
    prompt = examples.prompt(episode)
    with torch.no_grad(), record(used.sites, RESIDUAL, tail=3) as recording:
        logits = by_hand(tiny, whole(prompt))[-3:]
    for settled in (False, True):
        if settled:
            used.losses(episode, {}, "all")
            used = session(tiny, examples=examples)
            used.losses(Episode(4, ()), {}, "all")
            assert used.replays
        found = used.answer(episode, "all", RESIDUAL)
        torch.testing.assert_close(found.logits, logits, rtol=1e-4, atol=1e-4)
        assert found.target.tolist() == list(prompt.target)
        torch.testing.assert_close(found.states, recording.last(), rtol=1e-4, atol=1e-4)
        forwards = used.forwards
        assert used.answer(episode, "all", RESIDUAL) is found
        assert used.forwards == forwards


def test_steps_go_through_all_queries_in_a_new_order_and_teachers_take_turns():
    used = session(zoo.build(zoo.llama))
    settings = Distillation(examples=5, epochs=3, accumulation=2, fit_shots=2, teachers=2)
    asked = used.episodes(5, 0, "learning")
    steps = learning._steps(used, settings, asked)
    assert [len(step) for step in steps] == [2, 2, 1] * 3
    epochs = [[query for step in steps for query in step if query.epoch == epoch] for epoch in range(3)]
    assert all(sorted(query.episode for query in epoch) == sorted(asked) for epoch in epochs)
    assert len({tuple(query.episode for query in epoch) for epoch in epochs}) == 3

    seen: list[Episode] = []
    answered = used.answer
    used.answer = lambda episode, *rest: seen.append(episode) or answered(episode, *rest)
    for epoch in range(3):
        learning.teacher_answer(used, settings, TrainingQuery(epoch, 0, asked[0]))
    assert seen[0] == seen[2] != seen[1]
    assert all(episode.query == asked[0].query and len(episode.demonstrations) == 2 for episode in seen)
    assert all(asked[0].query not in episode.demonstrations for episode in seen)


def test_answers_of_different_targets_are_not_compared():
    answers = [learning.Answer(torch.zeros(1, 5), torch.tensor([token]), torch.ones(1, 1, 1, 2)) for token in (1, 2)]
    for compared in (learning.divergence, mimic.distance):
        with pytest.raises(DataError, match=r"tokens \[1\], and after demonstrations of \[2\]"):
            compared(*answers)


def test_teachers_are_never_edited():
    """Whenever an answer is asked for, it is the model's own; where it would not be, that is an error."""
    used = session(zoo.build(zoo.llama))
    value = torch.ones(shape(used.sites, MLP), requires_grad=True)
    own = session(zoo.build(zoo.llama)).answer(Episode(3, (5, 6)))
    seen = []

    def early(_):
        seen.append(used.answer(Episode(3, (5, 6))))
        return lambda answer: answer.logits.sum()

    def late(_):
        return lambda answer: (answer.logits - used.answer(Episode(4, (5, 6))).logits).sum()

    used.gradients([Episode(3, ())], [value], lambda _: {MLP: everywhere(value)}, early)
    assert torch.equal(seen[0].logits, own.logits)
    with pytest.raises(HookError, match="edited now: ask for its own answers in loss"):
        used.gradients([Episode(3, ())], [value], lambda _: {MLP: everywhere(value)}, late)
    assert used.answer(Episode(3, (5, 6))) is seen[0]


def test_the_pace_rises_in_a_line_and_falls_with_a_cosine():
    found = [learning.pace(step, 100, 0.1) for step in range(100)]
    assert found[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert found[10:] == pytest.approx([0.5 * (1 + math.cos(math.pi * (step - 10) / 90)) for step in range(10, 100)])
    assert all(0 < share <= 1 for share in found)
    assert learning.pace(0, 1, 0) == 1


def test_divergence_is_that_of_the_answers_from_the_teachers():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 5, generator=generator)
    target = torch.tensor([0, 1, 2])
    answer, teacher = (learning.Answer(each, target) for each in logits)
    p, q = logits[1].softmax(-1), logits[0].softmax(-1)
    assert learning.divergence(answer, teacher).item() == pytest.approx((p * (p / q).log()).sum(-1).mean().item())
    assert learning.divergence(teacher, teacher).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", matrix.members(["m2iv", "live", "i2cl", "mimic"], "m2iv"))
def test_learning_lowers_the_loss_of_queries_it_was_not_on(name):
    tiny = zoo.build(zoo.llama)

    # All targets are the same: what is learned of some queries holds for all.
    class Same(TokenExamples):
        def _target(self, index: int) -> tuple[int, ...]:
            return 50, 60

    method = methods.get(name)
    given = {"examples": 6, "epochs": 10, "accumulation": 2, "judges": 4, "fit_shots": 3, "iterations": 4}
    config = method.configure({key: value for key, value in given.items() if key in method.settings()})
    found = method.fit(session(tiny, examples=Same()), config)
    assert found.losses["chosen"][0] < found.losses["unedited"][0] - 0.1
    assert len(found.losses["learning"]) == 30
    assert all(not edit.value.requires_grad and edit.everywhere for edit in found.edits.values())


@pytest.mark.parametrize("architecture", matrix.members(BOTH, zoo.idefics3))
def test_m2iv_is_the_formula_and_with_zero_weights_changes_nothing(architecture):
    tiny = zoo.build(architecture)
    inputs = tiny.inputs([[5, 6, 7], [8, 9]])
    found = methods.get("m2iv").fit(session(tiny), m2iv.Config(**SHORT, fit_shots=2))
    assert set(found.edits) == {ATTENTION, MLP}
    assert all((edit.gain != 0).all() and (edit.keep == 1).all() for edit in found.edits.values())
    handles = []
    for layer, site in enumerate(find_sites(tiny.model)):
        for stream, module in ((ATTENTION, site.attention[1]), (MLP, site.block[1].mlp)):
            edit = found.edits[stream]
            shift = edit.gain[layer, 0] * edit.value[layer, 0]

            def add(_, args, output, shift=shift):
                return (output[0] + shift, *output[1:]) if isinstance(output, tuple) else output + shift

            handles.append(module.register_forward_hook(add))
    with torch.no_grad():
        expected = tiny.model(**inputs).logits
        for handle in handles:
            handle.remove()
        with applied(tiny.model, found.edits):
            torch.testing.assert_close(tiny.model(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
        plain = tiny.model(**inputs).logits
        nothing = {
            name: Edit(edit.value, edit.keep, torch.zeros_like(edit.gain), everywhere=True)
            for name, edit in found.edits.items()
        }
        with applied(tiny.model, nothing):
            assert torch.equal(tiny.model(**inputs).logits, plain)


def test_the_synergy_is_the_published_sum():
    generator = torch.Generator().manual_seed(0)
    attention, mlp = torch.randn(2, 3, 7, generator=generator)
    expected = 0.0
    for i in range(3):
        for j in range(3):
            cosine = functional.cosine_similarity(attention[i], mlp[j], dim=0).item()
            expected += (cosine - 1) ** 2 if i == j else 1e-3 * cosine**2
    assert m2iv.synergy(attention, mlp).item() == pytest.approx(expected, rel=1e-5)


def test_live_keeps_norms():
    tiny = zoo.build(zoo.llama)
    found = methods.get("live").fit(session(tiny), live.Config(**SHORT, fit_shots=2))
    inputs, sites = tiny.inputs([[5, 6, 7]]), find_sites(tiny.model)
    edit = found.edits[RESIDUAL]
    assert edit.renormed
    assert edit.everywhere
    last = sites[-1].block[1]
    seen: list[torch.Tensor] = []
    with torch.no_grad():
        handle = last.register_forward_hook(lambda *args: seen.append(args[2]))
        with applied(sites, found.edits):
            last.register_forward_hook(lambda *args: seen.append(args[2]))
            tiny.model(**inputs)
        handle.remove()
    before, after = (output[0] if isinstance(output, tuple) else output for output in seen)
    torch.testing.assert_close(before.norm(dim=-1), after.norm(dim=-1))
    turned = before + edit.gain[-1, 0] * edit.value[-1, 0]
    torch.testing.assert_close(functional.cosine_similarity(after, turned, dim=-1), torch.ones(after.shape[:2]))


def test_i2cl_has_the_means_of_answered_demonstrations_and_begins_as_published():
    tiny, examples = zoo.build(zoo.llama), TokenExamples()
    used = session(tiny, examples=examples)
    config = i2cl.Config(examples=2, epochs=1, accumulation=2, judges=1, iterations=3, weight_lr=1e-9, weight_decay=0.0)
    found = methods.get("i2cl").fit(used, config)
    for stream in (ATTENTION, MLP):
        last = []
        for episode in used.episodes(3, 0, "values"):
            prompt = examples.prompt(episode)
            with torch.no_grad(), record(used.sites, stream) as recording:
                by_hand(tiny, [*prompt.text, *prompt.target])
            last.append(recording.last()[0])
        edit = found.edits[stream]
        torch.testing.assert_close(edit.value, torch.stack(last).mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(edit.gain, torch.full_like(edit.gain, 0.1))
        torch.testing.assert_close(edit.keep, torch.ones_like(edit.keep))
    inputs = tiny.inputs([[5, 6, 7]])
    unmixed = {name: Edit(edit.value, edit.keep * 0 + 1, edit.gain * 0, True) for name, edit in found.edits.items()}
    with torch.no_grad():
        plain = tiny.model(**inputs).logits
        with applied(tiny.model, unmixed):
            assert torch.equal(tiny.model(**inputs).logits, plain)


def test_noise_is_a_share_of_each_vector_and_of_its_moment():
    value = torch.randn(3, 1, 8, generator=torch.Generator().manual_seed(1))
    noisy = [i2cl._noisy(value, 0.01, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    for found in noisy:
        torch.testing.assert_close((found - value).norm(dim=-1), 0.01 * value.norm(dim=-1), rtol=1e-3, atol=1e-6)
    assert torch.equal(noisy[0], noisy[1])
    assert not torch.equal(noisy[0], noisy[2])


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("m2iv", {"epochs": 0}),
        ("m2iv", {"teachers": 0}),
        ("live", {"warmup": 1.0}),
        ("i2cl", {"noise": -1.0}),
        ("live", {"accumulation": 0}),
    ],
)
def test_settings_that_cannot_work_are_refused(name, wrong):
    with pytest.raises(ArgumentError, match=f"{next(iter(wrong))}="):
        methods.get(name).configure(wrong)


def test_a_learning_rate_has_to_be_positive():
    with pytest.raises(ArgumentError, match="learning rate of 0"):
        methods.get("live").fit(session(zoo.build(zoo.llama)), live.Config(**SHORT, fit_shots=2, vector_lr=0.0))


def test_an_edit_of_heads_can_be_learned_too():
    tiny = zoo.build(zoo.llama)
    used = session(tiny)
    value = torch.zeros(used.shape, requires_grad=True)
    ones = torch.ones(used.shape[:2])
    _, (gradient,) = used.gradients(
        [Episode(3, ())],
        [value],
        lambda _: {HEADS: Edit(value, 1 - ones, ones)},
        lambda _: lambda answer: functional.cross_entropy(answer.logits, answer.target),
        tokens="first",
    )
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("architecture", matrix.members(BOTH, zoo.idefics3))
def test_mimic_learns_a_vector_and_a_gate_for_every_head(architecture):
    tiny = zoo.build(architecture)
    used = session(tiny)
    found = methods.get("mimic").fit(used, mimic.Config(**SHORT, fit_shots=2))
    edit = found.edits[HEADS]
    assert edit.everywhere
    assert edit.gate.shape == (*used.shape[:2], used.shape[2] + 1)
    assert torch.equal(edit.keep, torch.ones(used.shape[:2]))
    inputs = tiny.inputs([[5, 6, 7]])
    shut = dataclasses.replace(edit, gate=torch.cat([0 * edit.gate[..., :-1], 0 * edit.gate[..., -1:] - 1e4], -1))
    with torch.no_grad():
        plain = tiny.model(**inputs).logits
        with applied(tiny.model, {HEADS: shut}):
            assert torch.equal(tiny.model(**inputs).logits, plain)
        with applied(tiny.model, found.edits):
            assert not torch.equal(tiny.model(**inputs).logits, plain)


def test_the_distance_is_a_share_of_the_teachers_states():
    states = torch.tensor([[[[3.0, 4.0]]], [[[0.0, 2.0]]]])
    logits, target = torch.zeros(2, 3), torch.tensor([0, 1])
    teacher = learning.Answer(logits, target, states)
    moved = learning.Answer(logits, target, states + torch.tensor([0.0, 1.0]))
    assert mimic.distance(moved, teacher).item() == pytest.approx((1 / 5 + 1 / 2) / 2)
    same = learning.Answer(logits, target, states.clone().requires_grad_())
    mimic.distance(same, teacher).backward()
    assert same.states.grad.isfinite().all()
