"""Replays and sessions, against full forwards written here."""

from __future__ import annotations

import dataclasses
import logging
import time

import pytest
import torch
from torch.nn import functional
from transformers import LlamaForCausalLM, MiniMaxConfig, MiniMaxForCausalLM, MistralConfig, MistralForCausalLM

from lmms_mtv import Edit, Episode, applied, capture, find_sites
from lmms_mtv.errors import DataError, HookError, NumericsError
from lmms_mtv.fit.losses import Run
from lmms_mtv.hooks import Prefill, shape
from lmms_mtv.vectors import HEADS, RESIDUAL
from support import matrix, zoo
from support.sessions import TokenExamples, TokenPrompt, TokenRunner, session

MASKS = 32
WINDOWED = ("gemma2", "gemma3")
"""Tiny models whose attention reaches back 64 tokens in some blocks."""


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def edits(tiny: zoo.Tiny, count: int = MASKS) -> Edit:
    rng = torch.Generator().manual_seed(0)
    sites = find_sites(tiny.model)
    return Edit.replace(
        torch.randn(sites.shape, generator=rng), torch.rand(count, *sites.shape[:2], generator=rng) < 0.4
    )


def loop_of_full_forwards(
    tiny: zoo.Tiny, prompt: TokenPrompt, edit: Edit, tokens: int, padding: int = 0
) -> torch.Tensor:
    """The authors' procedure: one full forward of prompt and target for each mask."""
    target = prompt.target[:tokens]
    inputs = tiny.inputs([[*prompt.text, *target[:-1]]], padding=padding)
    losses = []
    for keep, gain in zip(edit.keep, edit.gain, strict=True):
        with applied(tiny.model, Edit(edit.value, keep, gain), tail=tokens):
            logits = tiny.model(**inputs, use_cache=False).logits[0, -tokens:]
        losses.append(functional.cross_entropy(logits, torch.tensor(target)))
    return torch.stack(losses)


@pytest.mark.parametrize("generating", [False, True], ids=["forward", "generate"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_replay_equals_full_forwards_for_32_masks(tiny, tokens, generating):
    prompt = TokenPrompt((5, 6, 7, 8, 9, 10, 11), (41, 57, 63))
    edit, sites = edits(tiny), find_sites(tiny.model)
    expected = loop_of_full_forwards(tiny, prompt, edit, tokens)
    assert expected.std() > 1e-3, "the masks have to matter"

    before = zoo.hooks(tiny.model)
    with capture(tiny.model, sites) as captured:
        TokenRunner(tiny, generating).run([prompt])
    assert zoo.hooks(tiny.model) == before
    prefill, target = captured.prefill(), list(prompt.target[:tokens])
    assert prefill.cache is not None
    assert prefill.length == len(tiny.row(list(prompt.text)))

    targets = torch.tensor(target).expand(MASKS, -1)
    assert prefill.fits_one_row(tiny.model, edit, target) == (tiny.name not in WINDOWED or tokens == 1)
    packed = [prefill.replay_in_one_row] if prefill.fits_one_row(tiny.model, edit, target) else []
    for run in (prefill.replay, *packed, prefill.forward, prefill.replay):  # again: a replay leaves its cache as it was
        logits = run(tiny.model, sites, edit, target)
        assert logits.shape == (MASKS, tokens, zoo.VOCABULARY)
        losses = functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(1)
        assert (losses - expected).abs().max() < 1e-4
    assert zoo.hooks(tiny.model) == before


def captured_from(runner: TokenRunner, prompt: TokenPrompt) -> Prefill:
    with capture(runner.model, find_sites(runner.model)) as captured:
        runner.run([prompt])
    return captured.prefill()


def losses_of(run: Run, tiny: zoo.Tiny, edit: Edit, target: list[int]) -> torch.Tensor:
    logits = run(tiny.model, find_sites(tiny.model), edit, target)
    targets = torch.tensor(target).expand(len(logits), -1)
    return functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(1)


PROMPT = TokenPrompt((5, 6, 7, 8, 9, 10, 11), (41, 57, 63))


@pytest.mark.parametrize("generating", [False, True], ids=["forward", "generate"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_padding_before_a_prompt_changes_no_loss(tiny, tokens, generating):
    """Some wrappers pad even one prompt: its replays and its full forwards against full forwards without padding."""
    edit, padding, target = edits(tiny), 5, list(PROMPT.target[:tokens])
    expected = loop_of_full_forwards(tiny, PROMPT, edit, tokens)
    prefill = captured_from(TokenRunner(tiny, generating, padding), PROMPT)
    assert prefill.length == len(tiny.row(list(PROMPT.text))) + padding
    packed = [prefill.without_media().replay_in_one_row] if prefill.fits_one_row(tiny.model, edit, target) else []
    for run in (prefill.replay, prefill.without_media().replay, *packed, prefill.forward):
        assert (losses_of(run, tiny, edit, target) - expected).abs().max() < 1e-4


def test_a_session_replays_padded_prompts(tiny):
    edit, episode = edits(tiny, 8), Episode(3, (1, 2))
    plain = loop_of_full_forwards(tiny, TokenExamples().prompt(episode), edit, 2)
    padded = session(tiny, padding=3)
    for _ in range(2):  # once more: what is kept of a prompt knows the padding
        assert (padded.losses(episode, edit, "all") - plain).abs().max() < 1e-4
    assert padded.replays is True


@pytest.mark.parametrize("tokens", matrix.members([1, 3], 3))
@pytest.mark.parametrize(
    "generating", matrix.members([False, True], True, label={False: "forward", True: "generate"}.get)
)
@pytest.mark.slow
def test_images_that_see_each_other_both_ways_are_replayed(tokens, generating):
    """Gemma 3's tokens of an image attend to those after them, which only the prefill is told."""
    tiny = zoo.build(zoo.gemma3)
    assert tiny.kinds == "token_type_ids"
    edit = edits(tiny)
    expected = loop_of_full_forwards(tiny, PROMPT, edit, tokens)
    one_way = loop_of_full_forwards(dataclasses.replace(tiny, kinds=None), PROMPT, edit, tokens)
    assert (expected - one_way).abs().mean() > 1e-3, "both ways has to matter"
    prefill = captured_from(TokenRunner(tiny, generating), PROMPT)
    for run in (prefill.replay, prefill.without_media().replay, prefill.forward):
        assert (losses_of(run, tiny, edit, list(PROMPT.target[:tokens])) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("tokens", ["first", "all"])
def test_session_losses_equal_full_forwards_with_and_without_replay(tiny, tokens):
    edit, episode = edits(tiny, 8), Episode(3, (1, 2))
    count = {"first": 1, "all": 2}[tokens]
    expected = loop_of_full_forwards(tiny, TokenExamples().prompt(episode), edit, count)

    replaying = session(tiny)
    assert (replaying.losses(episode, edit, tokens) - expected).abs().max() < 1e-4
    assert replaying.replays is True
    assert replaying.replay == ("rows" if tiny.name in WINDOWED and tokens == "all" else "side by side")
    in_rows = session(tiny, replay="rows")
    assert (in_rows.losses(episode, edit, tokens) - expected).abs().max() < 1e-4
    assert in_rows.replay == "rows"
    fallback = session(tiny, replay="full forwards")
    assert (fallback.losses(episode, edit, tokens) - expected).abs().max() < 1e-4
    assert fallback.replays is False


def test_the_first_token_that_counts_is_the_first_that_is_not_blank():
    """With the blanks before it, which the edited model has to write; the end of a prompt is where it was."""
    tiny = zoo.build(zoo.llama)
    edit, episode, examples = edits(tiny, 8), Episode(3, (1, 2)), TokenExamples(answer=3)
    leading, plain = session(tiny, examples=examples, lead=1), session(tiny, examples=examples)
    expected = loop_of_full_forwards(tiny, examples.prompt(episode), edit, 2)
    assert (leading.losses(episode, edit) - expected).abs().max() < 1e-4
    assert torch.equal(leading.losses(episode, edit, "all"), plain.losses(episode, edit, "all"))
    assert leading.answer(episode, "first").target.tolist() == list(examples.prompt(episode).target[:2])
    for mine, others in zip(*(each.answered_activations([episode]) for each in (leading, plain)), strict=True):
        assert torch.equal(mine, others)


@pytest.mark.parametrize("tokens", matrix.members([1, 3], 3))
@pytest.mark.parametrize(
    "generating", matrix.members([False, True], True, label={False: "forward", True: "generate"}.get)
)
def test_blocks_that_attend_to_an_image_keep_its_keys_and_its_mask(tokens, generating):
    """Mllama's cache holds keys of the image beside those of the tokens; a mask of each token tells its tiles."""
    tiny = zoo.build(zoo.mllama)
    edit, target = edits(tiny), list(PROMPT.target[:tokens])
    expected = loop_of_full_forwards(tiny, PROMPT, edit, tokens)
    unmasked = loop_of_full_forwards(dataclasses.replace(tiny, tiles=0), PROMPT, edit, tokens)
    assert (expected - unmasked).abs().mean() > 1e-3, "the mask has to matter"
    prefill = captured_from(TokenRunner(tiny, generating), PROMPT)
    assert prefill.cache is not None
    assert [layer.keys.shape[2] for layer in prefill.cache.layers] == [
        prefill.length - 1,
        34,
        *[prefill.length - 1] * 2,
    ]
    for run in (prefill.replay, prefill.without_media().replay, prefill.replay_in_one_row, prefill.forward):
        assert (losses_of(run, tiny, edit, target) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("length", [33, 34, 35])
def test_an_image_with_as_many_keys_as_the_prompt_has_tokens_is_not_taken_for_them(length):
    tiny = zoo.build(zoo.mllama)
    prompt = TokenPrompt(tuple(range(3, length + 2)), (91, 92, 93))
    edit, prefill = edits(tiny, 4), captured_from(TokenRunner(tiny), prompt)
    assert prefill.length == length
    assert (prefill.cache is None) == (length == 34)
    expected = loop_of_full_forwards(tiny, prompt, edit, 3)
    for run in (prefill.forward, *([prefill.replay] if prefill.cache else [])):
        assert (losses_of(run, tiny, edit, list(prompt.target)) - expected).abs().max() < 1e-4


def test_a_fit_goes_on_where_one_prompt_of_many_cannot_be_replayed():
    """With 8 demonstrations of 4 tokens, the prompt is as long as the image; with fewer it is not."""
    tiny = zoo.build(zoo.mllama)
    examples, edit = TokenExamples(answer=3), edits(tiny, 4)
    running = session(tiny, examples=examples)
    for shots in (2, 8, 3):
        episode = Episode(20, tuple(range(shots)))
        expected = loop_of_full_forwards(tiny, examples.prompt(episode), edit, 3)
        for _ in range(2):
            assert (running.losses(episode, edit, "all") - expected).abs().max() < 1e-4
        assert running.replays is True
        assert (captured_from(TokenRunner(tiny), examples.prompt(episode)).cache is None) == (shots == 8)


def test_blocks_that_attend_to_images_are_left_out_of_a_replay_without_one():
    tiny = dataclasses.replace(zoo.build(zoo.mllama), image_tokens=0, media=None, tiles=0)
    edit = edits(tiny, 4)
    expected = loop_of_full_forwards(tiny, PROMPT, edit, 3)
    prefill = captured_from(TokenRunner(tiny), PROMPT)
    assert prefill.cache is not None
    assert prefill.bytes > 0
    for run in (prefill.replay, prefill.forward):
        assert (losses_of(run, tiny, edit, list(PROMPT.target)) - expected).abs().max() < 1e-4


def mistral(window: int) -> zoo.Tiny:
    return zoo.Tiny("mistral", MistralForCausalLM(MistralConfig(**zoo._text(sliding_window=window))))


@pytest.mark.parametrize("architecture", matrix.members([mistral, zoo.gemma2, zoo.gemma3], mistral))
def test_a_full_sliding_window_falls_back_and_says_so(architecture, caplog):
    """A window shorter than the prompt has forgotten what a replay would need."""
    tiny = zoo.build(lambda: architecture(4))
    edit, episode = edits(tiny, 4), Episode(3, (1, 2, 4))
    windowed = session(tiny)
    with caplog.at_level(logging.WARNING):
        losses = windowed.losses(episode, edit, "all")
    assert windowed.replays is False
    assert "full forwards" in caplog.text
    expected = loop_of_full_forwards(tiny, TokenExamples().prompt(episode), edit, 2)
    assert (losses - expected).abs().max() < 1e-4


def minimax() -> zoo.Tiny:
    kinds = ["linear_attention", "full_attention", "full_attention"]
    config = MiniMaxConfig(**zoo._text(layer_types=kinds, num_local_experts=2, num_experts_per_tok=1))
    return zoo.Tiny("minimax", MiniMaxForCausalLM(config))


def test_a_cache_with_a_recurrent_state_falls_back_and_says_so(caplog):
    tiny = zoo.build(minimax)
    edit, episode = edits(tiny, 4), Episode(3, (1, 2))
    hybrid = session(tiny)
    with caplog.at_level(logging.WARNING):
        losses = hybrid.losses(episode, edit, "all")
    assert hybrid.replays is False
    assert "full forwards" in caplog.text
    expected = loop_of_full_forwards(tiny, TokenExamples().prompt(episode), edit, 2)
    assert (losses - expected).abs().max() < 1e-4


@pytest.mark.parametrize("architecture", matrix.members([mistral, zoo.gemma2, zoo.gemma3], mistral))
@pytest.mark.parametrize("padding", [0, 3])
def test_a_window_as_long_as_the_prompt_is_replayed_right_or_not_at_all(architecture, padding):
    """Windows around the length of prompt and target: padding takes place in them, as it does in a full forward."""
    length = len(architecture(4).row(list(PROMPT.text))) + padding
    replays = {}
    for window in range(length - 2, length + 4):
        tiny = zoo.build(lambda window=window: architecture(window))
        edit, prefill = edits(tiny, 4), captured_from(TokenRunner(tiny, padding=padding), PROMPT)
        replays[window] = prefill.cache is not None
        if replays[window]:
            expected = loop_of_full_forwards(tiny, PROMPT, edit, 3, padding)
            assert (losses_of(prefill.replay, tiny, edit, list(PROMPT.target)) - expected).abs().max() < 1e-4
            assert not prefill.fits_one_row(tiny.model, edit, PROMPT.target)
    assert not replays[length - 2]
    assert replays[length + 3]


@pytest.mark.parametrize("architecture", matrix.members([mistral, zoo.gemma2, zoo.gemma3], mistral))
@pytest.mark.parametrize("padding", [0, 3])
def test_edits_side_by_side_fit_a_window_or_are_refused(architecture, padding):
    length = len(architecture(4).row(list(PROMPT.text))) + padding
    for spare in (-1, 0, 100):
        tiny = zoo.build(lambda spare=spare: architecture(length - 1 + 4 * 3 + spare))
        edit, prefill = edits(tiny, 4), captured_from(TokenRunner(tiny, padding=padding), PROMPT)
        packs = spare >= 0 and (prefill.position_ids is not None or not padding)
        assert prefill.fits_one_row(tiny.model, edit, PROMPT.target) == packs
        if packs:
            expected = loop_of_full_forwards(tiny, PROMPT, edit, 3, padding)
            assert (losses_of(prefill.replay_in_one_row, tiny, edit, list(PROMPT.target)) - expected).abs().max() < 1e-4
        else:
            with pytest.raises(HookError, match="side by side"):
                prefill.replay_in_one_row(tiny.model, find_sites(tiny.model), edit, PROMPT.target)


class Nearsighted(LlamaForCausalLM):
    """Takes an attention mask of its own for its cue to look at everything that came before."""

    def forward(self, *args, attention_mask=None, **kwargs):
        flat = attention_mask is None or attention_mask.dim() == 2
        return super().forward(*args, attention_mask=attention_mask if flat else None, **kwargs)


class Counting(LlamaForCausalLM):
    """Counts positions by itself."""

    def forward(self, *args, position_ids=None, **kwargs):
        return super().forward(*args, **kwargs)


class Refusing(LlamaForCausalLM):
    """Wants a mask of rows and tokens."""

    def forward(self, *args, attention_mask=None, **kwargs):
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError("attention_mask has to be of two dimensions")
        return super().forward(*args, attention_mask=attention_mask, **kwargs)


@pytest.mark.parametrize("shots", matrix.members([2, 400], 2))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", [Nearsighted, Counting, Refusing])
def test_a_model_on_which_edits_disturb_each_other_replays_them_in_rows(architecture, dtype, shots, caplog):
    """Also where the prompt is so long that neighbours hardly count."""
    llama = zoo.build(zoo.llama)
    model = architecture(llama.model.config).eval()
    model.load_state_dict(llama.model.state_dict())
    tiny = dataclasses.replace(llama, model=model.to(dtype))
    edit, episode = edits(tiny, 8), Episode(3, (1, 2) * (shots // 2))
    running = session(tiny)
    with caplog.at_level(logging.INFO):
        found = running.losses(episode, edit, "all")
    assert running.replays is True
    assert running.replay == "rows"
    assert "not side by side" in caplog.text
    in_rows = session(tiny, replay="rows")
    assert torch.equal(found, in_rows.losses(episode, edit, "all"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_session_is_calibrated_again_for_longer_prompts(dtype):
    """And a model that takes edits side by side is found to, whatever its precision and the length of the prompt."""
    tiny = zoo.build(zoo.llama)
    tiny.model.to(dtype)
    running, edit = session(tiny), edits(tiny, 4)
    forwards = []
    for query, shots in ((3, 0), (4, 0), (3, 2), (3, 4), (5, 4), (3, 400)):
        before = running.forwards
        running.losses(Episode(query, (1, 2) * (shots // 2)), edit)
        assert running.replay == "side by side"
        forwards.append(running.forwards - before)
    verified, prefill, replay = 3, 1, 1
    # The probe's activations; its four edits by full forwards and in rows; and in rows and three times side by side.
    probe = 1 + (4 + 1) + (1 + 3)
    again = prefill + probe + replay
    assert forwards == [
        *(verified + again, prefill + replay, again, again, prefill + replay, again),
    ], "1, 7, 13 and 1,201 tokens"


def test_what_is_found_does_not_depend_on_what_is_asked_first():
    """Edits that are the same would tell nothing: the probe is the session's own."""
    tiny = zoo.build(zoo.llama)
    edit = edits(tiny, 4)
    same = Edit.replace(edit.value, edit.keep[:1].repeat(4, 1, 1) < 1)
    found = []
    for order in ((same, edit), (edit, same)):
        used = session(tiny)
        losses = [used.losses(Episode(3, (1, 2)), each, "all") for each in order]
        assert used.replay == "side by side"
        found.append(losses if order[0] is same else losses[::-1])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_an_error_of_this_package_is_no_reason_for_a_slow_path(monkeypatch):
    tiny = zoo.build(zoo.llama)
    ours = {"__name__": "lmms_mtv.hooks.prefill"}
    exec("def broken(self, rows, steps, keys):\n    raise KeyError('a fault of ours')", ours)
    monkeypatch.setattr(Prefill, "_side_by_side", ours["broken"])
    with pytest.raises(KeyError, match="a fault of ours"):
        session(tiny).losses(Episode(3, (1, 2)), edits(tiny, 4), "all")


def test_attention_that_takes_no_mask_of_its_own_is_not_tried():
    tiny = zoo.build(zoo.llama)
    prefill = captured_from(TokenRunner(tiny), PROMPT)
    for implementation, packs in (("sdpa", True), ("eager", True), ("flash_attention_2", False)):
        tiny.model.config._attn_implementation_internal = implementation
        assert prefill.fits_one_row(tiny.model, edits(tiny, 4), PROMPT.target) is packs


class Forgetful(LlamaForCausalLM):
    """A model whose answer after a cache is not that of a full forward."""

    def forward(self, *args, past_key_values=None, **kwargs):
        output = super().forward(*args, past_key_values=past_key_values, **kwargs)
        if past_key_values is not None and past_key_values.get_seq_length() > output.logits.shape[1]:
            output.logits = output.logits.roll(1, -1)
        return output


def test_a_model_whose_replay_differs_falls_back_and_says_so(caplog):
    llama = zoo.build(zoo.llama)
    model = Forgetful(llama.model.config).eval()
    model.load_state_dict(llama.model.state_dict())
    tiny = dataclasses.replace(llama, model=model)
    edit, episode = edits(tiny, 4), Episode(3, (1, 2))
    forgetful = session(tiny)
    with caplog.at_level(logging.WARNING):
        losses = forgetful.losses(episode, edit)
    assert forgetful.replays is False
    assert "replays differ" in caplog.text
    assert (losses - session(llama).losses(episode, edit)).abs().max() < 1e-4


def test_prefilled_prompts_are_kept_within_the_memory_budget():
    tiny = zoo.build(zoo.llama)
    edit = edits(tiny, 4)
    episodes = [Episode(query, (20, 21)) for query in range(6)]
    roomy, tight, packed = session(tiny), session(tiny, memory=1, replay="rows"), session(tiny, memory=1)
    packed.losses(Episode(9, (20, 21)), edit)
    first = [roomy.losses(episode, edit) for episode in episodes]
    forwards = roomy.forwards
    for episode, expected in zip(episodes, first, strict=True):
        assert torch.equal(roomy.losses(episode, edit), expected)
        for _ in range(2):
            # One row at a time: the copies of a cache stay within the budget too.
            before = tight.forwards
            assert (tight.losses(episode, edit) - expected).abs().max() < 1e-5
            assert tight.forwards - before >= 4
            # Side by side there are no copies.
            before = packed.forwards
            assert (packed.losses(episode, edit) - expected).abs().max() < 1e-5
            assert packed.forwards - before <= 2
    assert roomy.forwards == forwards + len(episodes), "one replay each, no prefill"
    assert tight.prefilled_bytes == roomy.prefilled_bytes / 6


@pytest.mark.parametrize("size", [1, 3, 8])
def test_mean_activations_do_not_depend_on_the_batch(tiny, size):
    episodes = session(tiny).episodes(8, 2, "values")
    alone = torch.stack([session(tiny).mean_activations([episode]) for episode in episodes]).mean(0)
    together = session(tiny, batch_size=size).mean_activations(episodes)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_episodes_are_seeded_and_never_show_the_query():
    tiny = zoo.build(zoo.llama)
    drawn = session(tiny).episodes(65, 4, "values")
    assert drawn == session(tiny).episodes(65, 4, "values")
    assert drawn != session(tiny, seed=1).episodes(65, 4, "values")
    assert drawn != session(tiny).episodes(65, 4, "selection")
    assert all(episode.query not in episode.demonstrations for episode in drawn)
    assert all(len(set(episode.demonstrations)) == 4 for episode in drawn)
    assert all(0 <= index < 30 for episode in drawn for index in episode.demonstrations)
    queries = [episode.query for episode in drawn]
    assert len(set(queries[:30])) == 30, "every query once before any comes again"
    assert len(set(queries[30:60])) == 30


def test_too_few_examples_is_an_error_that_names_the_argument():
    small = session(zoo.build(zoo.llama), examples=TokenExamples(4))
    assert len(small.episodes(10, 3, "values")) == 10
    with pytest.raises(DataError, match=r"4 examples.*at least 5.*fit_shots="):
        small.episodes(10, 4, "values")


def test_a_target_without_tokens_is_an_error():
    with pytest.raises(DataError, match="no tokens"):
        session(zoo.build(zoo.llama), examples=TokenExamples(answer=0)).losses(
            Episode(0, ()), edits(zoo.build(zoo.llama), 2)
        )


def test_an_infinite_loss_is_an_error():
    tiny = zoo.build(zoo.llama)
    edit = edits(tiny, 2)
    running = session(tiny)
    running.losses(Episode(0, ()), edit)
    tiny.model.lm_head.weight[40:80] = torch.inf
    with pytest.raises(NumericsError, match="dtype="):
        running.losses(Episode(0, ()), edit)


def test_an_infinite_activation_in_a_replay_is_named():
    tiny = zoo.build(zoo.idefics3)
    running, edit = session(tiny), edits(tiny, 4)
    running.losses(Episode(0, ()), edit)
    assert running.replay == "side by side"
    prompts = []
    with torch.no_grad():
        broken = dataclasses.replace(edit, value=edit.value.clone())
        broken.value[1] = torch.inf
    handle = tiny.model.register_forward_pre_hook(
        lambda _, args, kwargs: prompts.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    with handle, pytest.raises(NumericsError, match=r"activations of \S*layers\.2\S*"):
        running.losses(Episode(0, ()), broken)
    assert prompts == [(1, 4), *[(1, 1)] * 4], "from the cache, which has the images; one edit after the other"


def test_a_batch_or_a_prompt_that_ends_in_padding_is_no_prefill():
    tiny = zoo.build(zoo.llama)
    square = torch.zeros(1, 1, 3, 3)
    for inputs, match in (
        (tiny.inputs([[5, 6, 7], [8, 9]]), "one prompt, found a batch of 2"),
        (tiny.inputs([[5, 6, 7]], "right", padding=2), "last token is real"),
        ({"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": square}, r"shape \(1, 3\).*\(1, 1, 3, 3\)"),
    ):
        with capture(tiny.model, find_sites(tiny.model)) as captured:
            tiny.model(**inputs)
        with pytest.raises(HookError, match=match):
            captured.prefill()
    with capture(tiny.model, find_sites(tiny.model)) as captured:
        pass
    with pytest.raises(HookError, match="no forward"):
        captured.prefill()


@pytest.mark.parametrize("replay", ["side by side", "rows", "full forwards"])
@pytest.mark.parametrize("tokens", ["first", "all"])
def test_the_gradient_of_a_mask_is_that_of_finite_differences(tokens, replay, monkeypatch):
    tiny = zoo.build(zoo.idefics3)
    tiny.model.double()
    fit, episode = session(tiny, replay=replay), Episode(3, (1, 2))
    # Activations are recorded in float32, so that putting them back is not exact in a model of float64.
    monkeypatch.setattr("lmms_mtv.fit.context.verify", lambda *_: None)
    rng = torch.Generator().manual_seed(0)
    value = torch.randn(fit.shape, generator=rng)
    mask = torch.rand(3, *fit.shape[:2], generator=rng)

    def losses(moved: torch.Tensor) -> torch.Tensor:
        return fit.losses(episode, Edit(value, 1 - moved, moved), tokens)

    with torch.no_grad():
        found, gradient = fit.loss_gradient(episode, value, mask, tokens)
    torch.testing.assert_close(found, losses(mask))
    step, expected = 1e-2, torch.zeros_like(mask)
    for layer in range(fit.shape[0]):
        for head in range(fit.shape[1]):
            moved = torch.zeros_like(mask)
            moved[:, layer, head] = step
            expected[:, layer, head] = (losses(mask + moved) - losses(mask - moved)) / (2 * step)
    assert expected.abs().max() > 1e-2, "the masks have to matter"
    assert (gradient - expected).norm() < 1e-2 * expected.norm()


def test_gradients_leave_the_model_as_it_was():
    tiny = zoo.build(zoo.idefics3)
    fit, mask = session(tiny), torch.full((3, *session(tiny).shape[:2]), 0.5)
    first = next(tiny.model.parameters())
    first.requires_grad_(False)
    learning = [parameter.requires_grad for parameter in tiny.model.parameters()]
    hooks = zoo.hooks(tiny.model)
    _, gradient = fit.loss_gradient(Episode(0, ()), torch.ones(fit.shape), mask)
    assert fit.replays is True
    assert gradient.abs().max() > 0
    assert not gradient.requires_grad
    assert [parameter.requires_grad for parameter in tiny.model.parameters()] == learning
    assert all(parameter.grad is None for parameter in tiny.model.parameters())
    assert zoo.hooks(tiny.model) == hooks

    few = session(tiny, memory=1, replay="rows")  # one row at a time
    assert (few.loss_gradient(Episode(0, ()), torch.ones(fit.shape), mask)[1] - gradient).abs().max() < 1e-5

    forward = tiny.model.forward
    tiny.model.forward = torch.no_grad()(forward)
    with pytest.raises(HookError, match="turns gradients off"):
        fit.loss_gradient(Episode(0, ()), torch.ones(fit.shape), mask)
    assert [parameter.requires_grad for parameter in tiny.model.parameters()] == learning


def test_a_training_split_that_is_too_small_is_told():
    """Queries that come twice, and those that judge but were not kept apart."""
    enough = session(zoo.build(zoo.llama))
    enough.episodes(10, 0, "judges", unlike=enough.episodes(5, 3, "values"))
    assert enough.remarks == []
    few = session(zoo.build(zoo.llama), examples=TokenExamples(6))
    first = few.episodes(4, 3, "values")
    assert few.remarks == []
    few.episodes(9, 0, "judges", unlike=first)
    assert few.remarks == [
        "the training split has 6 examples: the 9 prompts for judges ask 6 different queries",
        "the training split has 6 examples: the 9 queries for judges are not kept apart from the examples of earlier "
        "stages",
    ]


def test_embeddings_are_the_middle_layer_of_zero_shot_queries():
    tiny = zoo.build(zoo.idefics3)
    fit = session(tiny, examples=TokenExamples(5), batch_size=2)
    found = fit.embeddings()
    assert found.shape == (5, fit.shape[1] * fit.shape[2])
    for query in range(5):
        expected = fit.mean_activations([Episode(query, ())])[fit.shape[0] // 2].flatten()
        torch.testing.assert_close(found[query], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stream", [HEADS, RESIDUAL])
def test_activations_are_those_of_each_prompt_alone(stream):
    tiny = zoo.build(zoo.idefics3)
    fit = session(tiny, batch_size=2)
    episodes = fit.episodes(5, 2, "values")
    found = fit.activations(episodes, stream)
    assert found.shape == (5, *shape(fit.sites, stream))
    assert fit.forwards == 3
    for episode, of_prompt in zip(episodes, found, strict=True):
        alone = session(tiny).mean_activations([episode], stream)
        torch.testing.assert_close(of_prompt, alone, rtol=1e-4, atol=1e-5)


def test_stages_add_up_by_name_and_count_what_failed():
    fit = session(zoo.build(zoo.llama))
    assert fit.stages == {}
    for _ in range(2):
        with fit.stage("slow"):
            time.sleep(0.02)
    with pytest.raises(ValueError, match="part"), fit.stage("failed"):
        raise ValueError("part")
    assert list(fit.stages) == ["slow", "failed"]
    assert fit.stages["slow"] >= 0.04 > fit.stages["failed"] >= 0


def test_demonstrations_come_from_the_pool():
    fit, pool = session(zoo.build(zoo.llama)), [4, 9, 11, 20]
    episodes = fit.episodes(60, 3, "values", pool)
    assert {index for episode in episodes for index in episode.demonstrations} == set(pool)
    assert all(episode.query not in episode.demonstrations for episode in episodes)
    assert all(len(set(episode.demonstrations)) == 3 for episode in episodes)
    with pytest.raises(DataError, match="diverse= of at least 5"):
        fit.episodes(60, 4, "values", pool)
