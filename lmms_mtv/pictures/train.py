"""Train the eyes of the picture model: ``python -m lmms_mtv.pictures.train --output FOLDER``.

The language model stays frozen; the vision encoder and the projector learn in two phases. In the first phase, the image
tokens of a picture learn to be the embeddings of its English name. In the second phase, the eyes learn through the
language model: where a picture stands in a text, the model shall go on as it does if the name stands there. The loss is
the Kullback-Leibler divergence between both.

Batch ``i`` depends only on the seed and on ``i``. So an interrupted run continues with the same arguments and ends with
the same eyes.
"""

from __future__ import annotations

import argparse
import logging
import math
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlavaForConditionalGeneration

from lmms_mtv.errors import InstallationError
from lmms_mtv.pictures import drawings, model, names
from lmms_mtv.pictures.contexts import Part, Shown, random_context
from lmms_mtv.runtime.training import log_to, run_steps

logger = logging.getLogger(__name__)

_LANGUAGES = ("fr", "it", "pt")
"""Languages of the lists of the second phase: none that a task of the benchmark asks for."""


@dataclass(frozen=True)
class EyesConfig:
    """Settings of a training run.

    Attributes:
        seed: seed of the weights, the looks and the contexts.
        naming_steps: steps of the first phase.
        naming_batch: pictures in a batch of the first phase.
        steps: steps of the second phase.
        batch: contexts in a batch of the second phase.
        most_pictures: pictures in the longest context.
        learning_rate: highest learning rate of AdamW.
        weight_decay: weight decay of AdamW.
        log_every: steps between two log lines.
        evaluate_every: steps between two evaluations, each of which saves the state.
    """

    seed: int = 0
    naming_steps: int = 1000
    naming_batch: int = 256
    steps: int = 900
    batch: int = 64
    most_pictures: int = 6
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    log_every: int = 100
    evaluate_every: int = 300

    @property
    def total(self) -> int:
        """Number of steps of both phases."""
        return self.naming_steps + self.steps

    def rate(self, step: int) -> float:
        """Return the learning rate of a step: in each phase 100 steps of warm-up, then a cosine to a hundredth."""
        first = step < self.naming_steps
        done = step if first else step - self.naming_steps
        length = self.naming_steps if first else self.steps
        share = (1 + math.cos(math.pi * done / max(1, length))) / 2
        return self.learning_rate * min(1.0, (done + 1) / 100) * max(share, 0.01)


@dataclass(frozen=True)
class PictureBank:
    """All pictures.

    Attributes:
        artworks: the emoji, uint8 [pictures, 4, 72, 72].
        shown: what each picture shows.
        embeddings: for each picture, the embeddings of the last four tokens of its name, the first of which stands
            again in the places before a shorter name; float32 [pictures, 4, hidden].
    """

    artworks: Tensor
    shown: tuple[Shown, ...]
    embeddings: Tensor

    def pixels(self, pictures: Tensor, generator: torch.Generator) -> Tensor:
        """Return pictures with random looks as the model's processor gives them, float32 [N, 3, 64, 64]."""
        looks = drawings.random_looks(len(pictures), generator).to(self.artworks.device)
        return drawings.render(self.artworks[pictures], looks) * 2 - 1


@dataclass(frozen=True)
class ContextBatch:
    """Contexts, once as text and once with pictures; ids and masks are int64 [contexts, tokens], padded on the right.

    Attributes:
        text: ids and mask of the contexts as text.
        pictured: ids and mask of the contexts with image tokens.
        text_places: row and column of each token of ``text`` after which the expectations are compared.
        pictured_places: the same places in ``pictured``.
        pictures: index of each picture, in the order of the contexts.
    """

    text: tuple[Tensor, Tensor]
    pictured: tuple[Tensor, Tensor]
    text_places: tuple[Tensor, Tensor]
    pictured_places: tuple[Tensor, Tensor]
    pictures: Tensor


def bank(language_model: Any, tokenizer: Any, device: torch.device) -> PictureBank:
    """Return all pictures with what they show and the embeddings of their names, on ``device``."""
    shown, rows = [], []
    embed = language_model.get_input_embeddings()
    countries = {each.code for each in names.countries()}
    for code, name in names.codes().items():
        shown.append(Shown(name, {} if code in countries else _other_names(code)))
        ids = tokenizer(name, add_special_tokens=False)["input_ids"][-model.IMAGE_TOKENS :]
        rows.append([ids[0]] * (model.IMAGE_TOKENS - len(ids)) + ids)
    with torch.no_grad():
        embeddings = embed(torch.tensor(rows, device=embed.weight.device)).float()
    artworks = torch.stack([drawings.artwork(code) for code in names.codes()])
    return PictureBank(artworks.to(device), tuple(shown), embeddings.to(device))


def _other_names(code: str) -> dict[str, str]:
    """Return the names of an emoji in the languages of the second phase."""
    try:
        from emoji import EMOJI_DATA, config
    except ImportError as error:
        raise InstallationError(
            "the training needs the package emoji: python -m pip install 'lmms-mtv[pictures]'"
        ) from error
    emoji = "".join(chr(int(point, 16)) for point in code.split("-"))
    known = EMOJI_DATA.get(emoji) or EMOJI_DATA.get(f"{emoji}\ufe0f") or {}
    for language in _LANGUAGES:
        config.load_language(language)
    return {each: known[each].strip(":").replace("_", " ") for each in _LANGUAGES if each in known}


def encode(
    contexts: Sequence[Sequence[Part]], tokenizer: Any, image_token_id: int, device: torch.device
) -> ContextBatch:
    """Return contexts as text and with pictures, with the places whose expectations are compared."""
    rows: tuple[list[list[int]], list[list[int]]] = ([], [])
    places: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
    for row, context in enumerate(contexts):
        texts: tuple[list[int], list[int]] = ([tokenizer.bos_token_id], [tokenizer.bos_token_id])
        for part in context:
            ids = tokenizer(part.text, add_special_tokens=False)["input_ids"]
            shown = ids if part.picture is None else [image_token_id] * model.IMAGE_TOKENS
            for tokens, more, compared in zip(texts, (ids, shown), places, strict=True):
                if part.counts:
                    compared += [(row, len(tokens) - 1 + i) for i in range(len(more) + 1)]
                tokens += more
        for each, tokens in zip(rows, texts, strict=True):
            each.append(tokens)
    text, pictured = (_padded(each, tokenizer.pad_token_id, device) for each in rows)
    first, second = (_columns(each, device) for each in places)
    pictures = [part.picture for context in contexts for part in context if part.picture is not None]
    return ContextBatch(text, pictured, first, second, torch.tensor(pictures, device=device))


def _padded(rows: Sequence[list[int]], padding: int, device: torch.device) -> tuple[Tensor, Tensor]:
    length = max(map(len, rows))
    ids = torch.tensor([row + [padding] * (length - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=device)
    return ids, mask


def _columns(places: Sequence[tuple[int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
    rows, columns = torch.tensor(places, device=device).T
    return rows, columns


def _image_tokens(llava: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """Return the image tokens of pictures, float32 [N, 4, hidden]."""
    return torch.stack(list(llava.get_image_features(pixel_values=pixels, return_dict=True).pooler_output)).float()


def naming_loss(llava: LlavaForConditionalGeneration, pictures: PictureBank, config: EyesConfig, step: int) -> Tensor:
    """Return how far image tokens are from the embeddings of their names, and how far these stand out of all names.

    The first is the squared distance relative to the variance of the embeddings. The second is the cross-entropy of
    choosing the name among all names, by ten times these distances.
    """
    generator = _generator(config.seed, step)
    chosen = torch.randint(len(pictures.shown), (config.naming_batch,), generator=generator)
    chosen = chosen.to(pictures.artworks.device)
    pixels = pictures.pixels(chosen, generator)
    seen = _image_tokens(llava, pixels)
    names_of = pictures.embeddings.flatten(1)
    distances = torch.cdist(seen.flatten(1), names_of).square() / names_of.shape[1] / names_of.var()
    return distances.gather(1, chosen[:, None]).mean() + functional.cross_entropy(-10 * distances, chosen)


def context_loss(
    llava: LlavaForConditionalGeneration, pictures: PictureBank, batch: ContextBatch, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return the mean divergence of both expectations, and the share of places where both expect the same token."""
    inner = llava.model
    with torch.no_grad():
        hidden = inner.language_model(input_ids=batch.text[0], attention_mask=batch.text[1]).last_hidden_state
        wanted = functional.log_softmax(llava.lm_head(hidden[batch.text_places]).float(), -1)
    pixels = pictures.pixels(batch.pictures, generator)
    hidden = inner(input_ids=batch.pictured[0], attention_mask=batch.pictured[1], pixel_values=pixels).last_hidden_state
    found = functional.log_softmax(llava.lm_head(hidden[batch.pictured_places]).float(), -1)
    same = (found.argmax(-1) == wanted.argmax(-1)).float().mean()
    return functional.kl_div(found, wanted, reduction="batchmean", log_target=True), same


def random_batch(
    config: EyesConfig, pictures: PictureBank, tokenizer: Any, image_token_id: int, key: str, device: torch.device
) -> ContextBatch:
    """Return the batch of contexts that depends on ``key``."""
    rng = random.Random(key)
    contexts = [random_context(pictures.shown, config.most_pictures, rng) for _ in range(config.batch)]
    return encode(contexts, tokenizer, image_token_id, device)


def _generator(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {step}".encode()))


@torch.no_grad()
def evaluate(
    llava: LlavaForConditionalGeneration, pictures: PictureBank, tokenizer: Any, config: EyesConfig
) -> dict[str, float]:
    """Return divergence and agreement over fixed contexts, and the share of pictures whose nearest name is theirs."""
    device = pictures.artworks.device
    token = llava.config.image_token_id
    results = [
        context_loss(
            llava,
            pictures,
            random_batch(config, pictures, tokenizer, token, f"evaluation {i}", device),
            _generator(-1, i),
        )
        for i in range(4)
    ]
    every = torch.arange(len(pictures.shown), device=device)
    pixels = pictures.pixels(every, _generator(-1, 0))
    seen = _image_tokens(llava, pixels)
    nearest = torch.cdist(seen.flatten(1), pictures.embeddings.flatten(1)).argmin(1)
    return {
        "divergence": sum(loss.item() for loss, _ in results) / len(results),
        "agreement": sum(same.item() for _, same in results) / len(results),
        "nearest name": (nearest == every).float().mean().item(),
    }


def train(
    config: EyesConfig,
    language_model: Any,
    tokenizer: Any,
    output: Path,
    device: torch.device,
    until: int | None = None,
) -> None:
    """Train the eyes and save them in ``output``; a saved state in ``output`` continues.

    Args:
        config: the settings of the run.
        language_model: the causal language model that stays frozen, in float32.
        tokenizer: its tokenizer, which has :data:`~lmms_mtv.pictures.model.IMAGE_TOKEN`.
        output: the folder of the eyes and of the state.
        device: the device of the training; on a GPU, the language model is in bfloat16 and the eyes compute in it.
        until: the number of steps after which the run stops and saves the state, as an interruption would; None trains
            to the end.
    """
    token: int = tokenizer.convert_tokens_to_ids(model.IMAGE_TOKEN)
    pictures = bank(language_model, tokenizer, device)
    if device.type == "cuda":
        language_model.to(torch.bfloat16)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        llava = model.compose(language_model, token).to(device).requires_grad_(False)
        eyes = nn.ModuleDict(model.eyes(llava)).requires_grad_(True).train()
        _start(eyes, pictures)
    optimizer = torch.optim.AdamW(eyes.parameters(), betas=(0.9, 0.98), weight_decay=config.weight_decay)
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=device.type == "cuda")

    def loss(step: int) -> Tensor:
        with autocast():
            if step < config.naming_steps:
                return naming_loss(llava, pictures, config, step)
            batch = random_batch(config, pictures, tokenizer, token, f"{config.seed} {step}", device)
            return context_loss(llava, pictures, batch, _generator(config.seed, step))[0]

    def scores() -> str:
        eyes.eval()
        with autocast():
            found = evaluate(llava, pictures, tokenizer, config)
        eyes.train()
        # The eyes can be tried while the run goes on.
        weights = {name: value.half().contiguous().cpu() for name, value in eyes.state_dict().items()}
        save_file(weights, output / model.WEIGHTS)
        return ", ".join(f"{k} {v:.3f}" for k, v in found.items())

    run_steps(eyes, optimizer, loss, scores, config, folder=output, until=until)


def _start(eyes: nn.Module, pictures: PictureBank) -> None:
    """Let image tokens begin where embeddings are: around their mean, with their spread."""
    output = eyes["multi_modal_projector"].linear_2  # type: ignore[index]
    with torch.no_grad():
        flat = pictures.embeddings.flatten(0, 1)
        output.bias.copy_(flat.mean(0))
        output.weight.normal_(0, flat.std().item() / output.in_features**0.5)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the training from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the eyes and of the state of the run")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="device")
    for name, text in (
        ("seed", "seed of weights, looks and contexts"),
        ("naming_steps", "steps of the first phase"),
        ("naming_batch", "pictures in a batch of the first phase"),
        ("steps", "steps of the second phase"),
        ("batch", "contexts in a batch of the second phase"),
    ):
        default = getattr(EyesConfig, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"{text} ({default})")
    parser.add_argument("--until", type=int, help="stop after this number of steps; the same command continues later")
    arguments = parser.parse_args(argv)
    log_to(arguments.output)
    config = EyesConfig(
        seed=arguments.seed,
        naming_steps=arguments.naming_steps,
        naming_batch=arguments.naming_batch,
        steps=arguments.steps,
        batch=arguments.batch,
    )
    logger.info("%s, torch %s, %s", config, torch.__version__, arguments.device)
    language_model, tokenizer = model.language_model(torch.float32)
    train(config, language_model, tokenizer, arguments.output, torch.device(arguments.device), arguments.until)


if __name__ == "__main__":
    main()
