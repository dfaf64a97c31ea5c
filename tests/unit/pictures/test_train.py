"""The training of the eyes."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from lmms_mtv.pictures import model, train
from lmms_mtv.pictures.contexts import Part, Shown, random_context, relations
from support import tiny_gemma

CPU = torch.device("cpu")
SHORT = train.EyesConfig(naming_steps=2, naming_batch=3, steps=2, batch=2, most_pictures=2, evaluate_every=9)
SHOWN = (Shown("cat", {"fr": "chat"}), Shown("Japan", {}), Shown("apple", {"fr": "pomme", "it": "mela"}))


def run(folder, config=SHORT, until=None):
    folder.mkdir(exist_ok=True)
    train.train(config, tiny_gemma.language_model(), tiny_gemma.tokenizer(), folder, CPU, until)
    return load_file(folder / model.WEIGHTS)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return run(tmp_path_factory.mktemp("eyes"))


def test_the_same_seed_gives_the_same_eyes(trained, tmp_path):
    torch.manual_seed(99)
    again = run(tmp_path)
    assert again.keys() == trained.keys()
    assert all(torch.equal(value, again[name]) for name, value in trained.items())


def test_an_interrupted_run_ends_with_the_same_eyes(trained, tmp_path):
    run(tmp_path, until=1)
    run(tmp_path, until=3)
    again = run(tmp_path)
    assert all(torch.equal(value, again[name]) for name, value in trained.items())


def test_another_seed_gives_other_eyes(trained, tmp_path):
    other = run(tmp_path, dataclasses.replace(SHORT, seed=1))
    assert any(not torch.equal(value, other[name]) for name, value in trained.items())


def test_a_context_as_text_and_with_pictures_is_compared_at_the_same_words():
    tokenizer = tiny_gemma.tokenizer()
    token = tokenizer.convert_tokens_to_ids(model.IMAGE_TOKEN)
    context = [Part("cat", 0), Part(" ="), Part(" chat", counts=True), Part("\n"), Part("Q:"), Part(" Japan", 1)]
    batch = train.encode([context, context[:3]], tokenizer, token, CPU)
    assert batch.pictures.tolist() == [0, 1, 0]
    for (ids, mask), (rows, columns) in (
        (batch.text, batch.text_places),
        (batch.pictured, batch.pictured_places),
    ):
        assert (ids[:, 0] == tokenizer.bos_token_id).all()
        assert "".join(tokenizer.convert_ids_to_tokens(ids[rows, columns])) == "= chat" * 2
        assert torch.equal(mask.bool(), ids != tokenizer.pad_token_id)
    assert "".join(tokenizer.convert_ids_to_tokens(batch.text[0][0, 1:])) == "cat = chat\nQ: Japan"
    assert (batch.pictured[0] == token).sum(1).tolist() == [8, 4]


def test_the_loss_is_the_divergence_of_what_the_model_expects():
    llava = model.compose(tiny_gemma.language_model(), 4).eval()
    tokenizer = tiny_gemma.tokenizer()
    pictures = train.bank(tiny_gemma.language_model(), tokenizer, CPU)
    batch = train.encode([[Part("cat", 5), Part(" is", counts=True)]], tokenizer, 4, CPU)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        found, same = train.context_loss(llava, pictures, batch, generator)
        pixels = pictures.pixels(torch.tensor([5]), torch.Generator().manual_seed(3))
        text = functional.log_softmax(llava(input_ids=batch.text[0]).logits[0, 3:], -1)
        seen = functional.log_softmax(llava(input_ids=batch.pictured[0], pixel_values=pixels).logits[0, 4:], -1)
    expected = (text.exp() * (text - seen)).sum(-1).mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    assert same.item() == pytest.approx((text.argmax(-1) == seen.argmax(-1)).float().mean().item())


def test_no_relation_of_the_training_is_a_task():
    known = relations(SHOWN)
    assert {"fr", "it"} <= known.keys()
    assert not {"es", "de"} & {*known, *train._LANGUAGES}
    assert known["fr"](SHOWN[0]) == "chat"
    assert known["fr"](SHOWN[1]) is None
    assert known["capital letters"](SHOWN[1]) == "JAPAN"


def test_contexts_show_different_pictures_and_count_something():
    rng = random.Random(0)
    shown = [Shown(f"thing {i}", {}) for i in range(9)]
    for _ in range(200):
        context = random_context(shown, 4, rng)
        pictures = [part.picture for part in context if part.picture is not None]
        assert 1 <= len(pictures) <= 4
        assert len(set(pictures)) == len(pictures)
        assert any(part.counts for part in context)
        assert all(part.text.strip() == f"thing {part.picture}" for part in context if part.picture is not None)


def test_the_rate_rises_then_falls_in_each_phase():
    config = train.EyesConfig(naming_steps=1000, steps=500)
    rates = [config.rate(step) for step in range(config.total)]
    for phase in (rates[:1000], rates[1000:]):
        assert phase[0] == pytest.approx(config.learning_rate / 100, rel=0.01)
        assert max(phase) > 0.9 * config.learning_rate
        assert phase[-1] == pytest.approx(config.learning_rate / 100, rel=0.05)
