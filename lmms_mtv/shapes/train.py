"""Train the tiny model from scratch: ``python -m lmms_mtv.shapes.train --output FOLDER``.

Two phases on freshly sampled scenes, none of which is in the benchmark's splits. First the model learns to see: one
image, and a question that names the attribute and the language. Then it learns to learn from demonstrations: in most
batches the question names nothing, and every answer of a sequence has to be inferred from the examples before it.

Everything is seeded: batch ``i`` depends on the seed and on ``i`` alone, so an interrupted run that is started again
with the same arguments continues where it was and ends with the same model.
"""

from __future__ import annotations

import argparse
import logging
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm
from transformers import Idefics3ForConditionalGeneration, Idefics3Processor

from lmms_mtv.shapes import questions, scenes, tiny, words
from lmms_mtv.shapes.questions import Answer
from lmms_mtv.shapes.scenes import Scene

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run.

    ``seeing_steps`` are spent on single images before ``steps`` of both kinds; of the latter, ``seeing_share`` stay
    like the former. ``labels_share`` of the sequences with demonstrations have made-up words for answers, bound to
    the values by a new permutation for each sequence. ``scenes`` is the number of distinct scenes drawn for training.
    """

    seed: int = 0
    seeing_steps: int = 1800
    seeing_batch: int = 64
    steps: int = 6000
    batch: int = 24
    seeing_share: float = 0.3
    labels_share: float = 0.25
    most_demonstrations: int = 8
    scenes: int = 20000
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    decay_share: float = 0.4
    log_every: int = 100
    evaluate_every: int = 600

    @property
    def total(self) -> int:
        return self.seeing_steps + self.steps

    def rate(self, step: int) -> float:
        """Learning rate of ``step``: 100 steps of warm-up, then constant, then a cosine over the last share."""
        decay = max(1, round(self.total * self.decay_share))
        left = min(1.0, (self.total - step) / decay)
        return self.learning_rate * min(1.0, (step + 1) / 100) * (1 - math.cos(math.pi * left)) / 2


@dataclass(frozen=True)
class Bank:
    """Scenes with their pixels, as the processor prepares them. ``pixels`` is float32 [scenes, 3, 32, 32]."""

    scenes: Sequence[Scene]
    pixels: Tensor

    @classmethod
    def drawn(cls, processor: Idefics3Processor, drawn: Sequence[Scene]) -> Bank:
        chunks = [
            processor.image_processor([[scenes.draw(s)] for s in drawn[i : i + 500]], return_tensors="pt")
            for i in tqdm(range(0, len(drawn), 500), desc="Drawing scenes", unit="x500")
        ]
        return cls(drawn, torch.cat([chunk["pixel_values"][:, 0] for chunk in chunks]))


@dataclass(frozen=True)
class Batch:
    """Model inputs, and the answers: ``labels`` is -100 outside the answers and their terminators."""

    input_ids: Tensor
    attention_mask: Tensor
    pixel_values: Tensor
    labels: Tensor


Item = tuple[int, str, str]
"""Index of a scene in the bank, question, answer."""


def render(items: Sequence[tuple[str, str]], chat: bool) -> tuple[str, list[tuple[int, int]]]:
    """Return text of a sequence of (question, answer) pairs about one image each, and the spans [start, end) of the
    answers.

    The text is what the harness builds for the shapes tasks, with raw prompts or with the chat template. A span
    takes in what ends the answer: a line break, or the end of the turn.
    """
    text, spans = "", []
    for question, answer in items:
        text += (
            f"<|im_start|>User:<image>{question}{tiny.END_OF_TURN}\n<|im_start|>Assistant:"
            if chat
            else (f"<image>{question}")
        )
        start = len(text) + 1
        text += f" {answer}{tiny.END_OF_TURN if chat else ''}"
        spans.append((start, len(text) if chat else len(text) + 1))
        text += "\n"
    return text, spans


def encode(
    processor: Idefics3Processor, bank: Bank, sequences: Sequence[Sequence[Item]], chat: Sequence[bool]
) -> Batch:
    """Return the sequences, all with the same number of items, as one right-padded batch."""
    image = "<fake_token_around_image><global-img>" + "<image>" * tiny.IMAGE_TOKENS + "<fake_token_around_image>"
    rendered = [render([item[1:] for item in items], style) for items, style in zip(sequences, chat, strict=True)]
    grown = len(image) - len("<image>")
    texts = [text.replace("<image>", image) for text, _ in rendered]
    spans = [[(a + grown * (i + 1), b + grown * (i + 1)) for i, (a, b) in enumerate(found)] for _, found in rendered]
    encoded = processor.tokenizer(
        texts, padding=True, padding_side="right", return_tensors="pt", return_offsets_mapping=True
    )
    starts = encoded["offset_mapping"][..., 0]
    answer = torch.zeros_like(starts, dtype=torch.bool)
    for row, found in enumerate(spans):
        for a, b in found:
            answer[row] |= (starts[row] >= a) & (starts[row] < b)
    answer &= encoded["attention_mask"].bool()
    chosen = torch.tensor([[item[0] for item in items] for items in sequences])
    return Batch(
        encoded["input_ids"],
        encoded["attention_mask"],
        bank.pixels[chosen],
        encoded["input_ids"].masked_fill(~answer, -100),
    )


def seeing(bank: Bank, size: int, rng: random.Random) -> list[list[Item]]:
    """``size`` sequences of one image and a question that says what it wants."""
    sequences = []
    for _ in range(size):
        attribute, language = rng.choice(words.ATTRIBUTES), rng.choice(tuple(words.LANGUAGES))
        index = rng.randrange(len(bank.scenes))
        answer = words.name(attribute, getattr(bank.scenes[index], attribute), language)
        sequences.append([(index, questions.named_question(attribute, language), answer)])
    return sequences


def in_context(bank: Bank, size: int, items: int, labels_share: float, rng: random.Random) -> list[list[Item]]:
    """``size`` sequences of ``items`` images each, of one task a sequence that nothing but its answers tells."""

    def task() -> Answer:
        if rng.random() < labels_share:
            attribute = rng.choice(tuple(words.LABELS))
            return questions.labels(attribute, questions.shuffled(attribute, rng))
        return questions.TASKS[rng.choice(tuple(questions.TASKS))]

    def sequence(answer: Answer) -> list[Item]:
        chosen = [rng.randrange(len(bank.scenes)) for _ in range(items)]
        return [(index, questions.QUESTION, answer(bank.scenes[index])) for index in chosen]

    return [sequence(task()) for _ in range(size)]


def training_batch(config: TrainConfig, processor: Idefics3Processor, bank: Bank, step: int) -> Batch:
    """Batch number ``step``, which depends on ``config.seed`` and ``step`` alone."""
    rng = random.Random(f"{config.seed}-{step}")
    if step < config.seeing_steps or rng.random() < config.seeing_share:
        sequences = seeing(bank, config.seeing_batch, rng)
    else:
        items = rng.randint(1, config.most_demonstrations + 1)
        sequences = in_context(bank, config.batch, items, config.labels_share, rng)
    return encode(processor, bank, sequences, [rng.random() < 0.5 for _ in sequences])


def loss(model: Idefics3ForConditionalGeneration, batch: Batch) -> Tensor:
    """Mean cross-entropy of the answer tokens."""
    logits = _logits(model, batch)[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=-100)


def _logits(model: Idefics3ForConditionalGeneration, batch: Batch) -> Tensor:
    logits: Tensor = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        pixel_values=batch.pixel_values,
        use_cache=False,
    ).logits
    return logits


@torch.no_grad()
def accuracy(
    model: Idefics3ForConditionalGeneration,
    processor: Idefics3Processor,
    bank: Bank,
    answer: Answer | None,
    shots: int,
    size: int = 100,
) -> float:
    """Return the share of queries whose whole answer is the most likely one after ``shots`` demonstrations.

    ``answer`` is the task; without one, a single question that names what it wants.
    """
    rng = random.Random(f"accuracy-{shots}")
    if answer is None:
        sequences = seeing(bank, size, rng)
    else:
        chosen = [[rng.randrange(len(bank.scenes)) for _ in range(shots + 1)] for _ in range(size)]
        sequences = [[(i, questions.QUESTION, answer(bank.scenes[i])) for i in row] for row in chosen]
    batch = encode(processor, bank, sequences, [False] * size)
    predicted = _logits(model, batch)[:, :-1].argmax(-1)
    labels = batch.labels[:, 1:]
    # The query's own answer is the last run of labels of a row.
    last = labels.flip(1).ne(-100).long()
    gaps = last.diff(dim=1).eq(-1).cumsum(1)
    query = torch.cat([torch.ones_like(last[:, :1]), (gaps == 0).long()], 1).mul(last).flip(1).bool()
    return ((predicted == labels) | ~query).all(1).float().mean().item()


def evaluate(model: Idefics3ForConditionalGeneration, processor: Idefics3Processor, bank: Bank) -> dict[str, float]:
    """Accuracies on held-out scenes: of seeing, of the nine tasks by shots, and of the hard tasks at eight shots."""
    model.eval()

    def mean(tasks: Sequence[Answer], shots: int) -> float:
        return sum(accuracy(model, processor, bank, task, shots) for task in tasks) / len(tasks)

    tasks = tuple(questions.TASKS.values())
    scores = {"named": accuracy(model, processor, bank, None, 0, 200)}
    scores |= {f"{shots}-shot": mean(tasks, shots) for shots in (0, 1, 4)}
    scores["labels 8-shot"] = mean([questions.labels(attribute) for attribute in words.LABELS], 8)
    model.train()
    return scores


def train(config: TrainConfig, output: Path, until: int | None = None) -> Idefics3ForConditionalGeneration:
    """Train with ``config``, or continue the run whose state is in ``output``, and save the checkpoint there.

    ``until`` stops after that many steps, with the state saved, as an interruption would.
    """
    output.mkdir(parents=True, exist_ok=True)
    processor = tiny.processor()
    held_out = [scene for split in scenes.splits().values() for scene in split]
    stream = scenes.distinct(random.Random(f"bank-{config.seed}"), exclude=held_out)
    bank = Bank.drawn(processor, list(islice(stream, config.scenes)))
    fresh = Bank.drawn(processor, list(islice(stream, 1000)))

    model = tiny.untrained(processor.tokenizer, config.seed).train()
    optimizer = torch.optim.AdamW(model.parameters(), betas=config.betas, weight_decay=config.weight_decay)
    state = output / "training-state.pt"
    first = 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
        logger.info("continuing at step %d", first)

    last = config.total if until is None else min(until, config.total)
    losses: list[float] = []
    began = time.perf_counter()
    for step in tqdm(range(first, last), initial=first, total=config.total, desc="Training", mininterval=5):
        for group in optimizer.param_groups:
            group["lr"] = config.rate(step)
        value = loss(model, training_batch(config, processor, bank, step))
        optimizer.zero_grad()
        torch.autograd.backward(value)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(value.item())
        done = step + 1
        if done % config.log_every == 0:
            seconds = (time.perf_counter() - began) / len(losses)
            recent = losses[-config.log_every :]
            logger.info("step %d loss %.4f seconds/step %.3f", done, sum(recent) / len(recent), seconds)
        if done % config.evaluate_every == 0 or done == last:
            scores = evaluate(model, processor, fresh)
            logger.info("step %d accuracy %s", done, " ".join(f"{k} {v:.3f}" for k, v in scores.items()))
            _save(state, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": done})
    model.eval()
    if last == config.total:
        model.save_pretrained(output)
        processor.save_pretrained(output)
    return model


def _save(path: Path, state: dict[str, object]) -> None:
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the checkpoint and of the run's state")
    parser.add_argument("--seed", type=int, default=TrainConfig.seed)
    parser.add_argument("--seeing-steps", type=int, default=TrainConfig.seeing_steps)
    parser.add_argument("--steps", type=int, default=TrainConfig.steps)
    parser.add_argument("--until", type=int, default=None, help="stop after this many steps, to be continued later")
    given = parser.parse_args(arguments)
    given.output.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(
        level=logging.INFO,
        format="%(message)s",
        handlers=[logging.StreamHandler(), logging.FileHandler(given.output / "train.log")],
    )
    config = TrainConfig(seed=given.seed, seeing_steps=given.seeing_steps, steps=given.steps)
    logger.info("%s, torch %s, %d threads", config, torch.__version__, torch.get_num_threads())
    train(config, given.output, given.until)


if __name__ == "__main__":
    main()
