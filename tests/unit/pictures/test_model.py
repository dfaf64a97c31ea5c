"""The model of the pictures, composed of a language model and eyes."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from lmms_mtv.models.identity import identity_of
from lmms_mtv.pictures import EYES, drawings, model
from support import tiny_gemma


@pytest.fixture
def language():
    return tiny_gemma.language_model()


@pytest.fixture
def llava(language):
    return model.compose(language, tiny_gemma.tokenizer().convert_tokens_to_ids(model.IMAGE_TOKEN)).eval()


def test_the_language_model_is_not_touched(language, llava):
    before = tiny_gemma.language_model().state_dict()
    assert all(torch.equal(value, before[name]) for name, value in language.state_dict().items())
    assert llava.lm_head is language.lm_head
    assert llava.lm_head.weight is language.get_input_embeddings().weight
    ids = torch.tensor([[2, 9, 30, 11]])
    with torch.no_grad():
        assert torch.equal(llava(input_ids=ids).logits, language(input_ids=ids).logits)


def test_an_image_is_four_tokens_of_its_own_embeddings(llava):
    processor = model.processor(tiny_gemma.tokenizer())
    images = [drawings.draw("1F431", 0), drawings.draw("1F34E", 0).resize((200, 100))]
    text = f"{model.IMAGE_TOKEN}ab{model.IMAGE_TOKEN}"
    inputs = processor(text=[text], images=[images], return_tensors="pt")
    assert inputs["pixel_values"].shape == (2, 3, 64, 64)
    assert (inputs["input_ids"] == llava.config.image_token_id).sum() == 2 * model.IMAGE_TOKENS
    with torch.no_grad():
        features = torch.stack(list(llava.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output))
        embedded = llava.get_input_embeddings()(inputs["input_ids"])
        embedded[inputs["input_ids"] == llava.config.image_token_id] = features.flatten(0, 1)
        expected = llava(inputs_embeds=embedded).logits
        assert torch.equal(llava(**inputs).logits, expected)


def test_the_processor_gives_the_pixels_that_the_eyes_were_trained_with():
    processor = model.processor(tiny_gemma.tokenizer())
    image = drawings.draw("1F431", 0)
    pixels = processor(text=[model.IMAGE_TOKEN], images=[[image]], return_tensors="pt")["pixel_values"][0]
    as_trained = torch.tensor(list(image.tobytes()), dtype=torch.float32).view(64, 64, 3).permute(2, 0, 1) / 255 * 2 - 1
    assert torch.allclose(pixels, as_trained, atol=1e-6)


def test_the_trained_eyes_fit_the_model(monkeypatch):
    monkeypatch.setattr(
        model, "language_model", lambda *_: (tiny_gemma.language_model(hidden=640), tiny_gemma.tokenizer())
    )
    loaded, _ = model.load(torch.float32)
    weights = load_file(EYES / model.WEIGHTS)
    found = {
        f"{part}.{name}": value for part, eye in model.eyes(loaded).items() for name, value in eye.state_dict().items()
    }
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], value.to(found[name].dtype)) for name, value in weights.items())
    assert identity_of(loaded).name == "lmms-mtv/pictures"
    assert not loaded.training


def test_the_eyes_are_small():
    assert sum(path.stat().st_size for path in EYES.iterdir()) < 12e6
