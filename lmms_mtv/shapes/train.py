"""Train the tiny model from scratch: ``python -m lmms_mtv.shapes.train --output FOLDER``.

The training has two phases on sampled scenes outside the splits of the benchmark. In the first phase, the model learns
to see: a sequence has one image and a question that names the attribute and the language. In the second phase, the
model learns from demonstrations: in most batches the question names neither, and the model must infer every answer
from the examples before.

Batch ``i`` depends only on the seed and on ``i``. So an interrupted run continues with the same arguments and ends with
the same model.
"""

from __future__ import annotations

import argparse
import logging
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm
from transformers import Idefics3ForConditionalGeneration, Idefics3Processor

from lmms_mtv.runtime.training import log_to, run_steps
from lmms_mtv.shapes import questions, scenes, tiny, words
from lmms_mtv.shapes.questions import Answer
from lmms_mtv.shapes.scenes import Scene

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run.

    Attributes:
        seed: seed of the weights, the scenes and the batches.
        seeing_steps: steps of the first phase, with single images.
        seeing_batch: sequences in a batch of single images.
        steps: steps of the second phase.
        batch: sequences in a batch with demonstrations.
        seeing_share: share of the batches of the second phase that have single images.
        labels_share: share of the sequences with demonstrations whose answers are made-up words, bound to the values by
            a new permutation for each sequence.
        most_demonstrations: largest number of demonstrations.
        scenes: number of different scenes for training.
        learning_rate: highest learning rate of AdamW.
        betas: betas of AdamW.
        weight_decay: weight decay of AdamW.
        decay_share: share of all steps in which the learning rate falls.
        log_every: steps between two log lines.
        evaluate_every: steps between two evaluations, each of which saves the state.
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
        """Number of steps of both phases."""
        return self.seeing_steps + self.steps

    def rate(self, step: int) -> float:
        """Return the learning rate of a step: 100 steps of warm-up, then constant, then a cosine to 0."""
        decay = max(1, round(self.total * self.decay_share))
        left = min(1.0, (self.total - step) / decay)
        return self.learning_rate * min(1.0, (step + 1) / 100) * (1 - math.cos(math.pi * left)) / 2


@dataclass(frozen=True)
class Bank:
    """Scenes with their pixels from the processor; ``pixels`` is float32 [scenes, 3, 32, 32]."""

    scenes: Sequence[Scene]
    pixels: Tensor

    @classmethod
    def drawn(cls, processor: Idefics3Processor, sample: Sequence[Scene]) -> Bank:
        """Return the bank of ``sample`` with every scene drawn and processed."""
        chunks = [
            processor.image_processor([[scenes.draw(s)] for s in sample[i : i + 500]], return_tensors="pt")
            for i in tqdm(range(0, len(sample), 500), desc="Drawing scenes", unit="x500")
        ]
        return cls(sample, torch.cat([chunk["pixel_values"][:, 0] for chunk in chunks]))


@dataclass(frozen=True)
class Batch:
    """Model inputs and labels, int64 [sequences, tokens] for token ids, mask and labels.

    ``labels`` is -100 outside the answers and their terminators.
    """

    input_ids: Tensor
    attention_mask: Tensor
    pixel_values: Tensor
    labels: Tensor


Item = tuple[int, str, str]
"""Index of a scene in the bank, question, answer."""


def render(items: Sequence[tuple[str, str]], chat: bool) -> tuple[str, list[tuple[int, int]]]:
    """Return the text of a sequence of (question, answer) pairs with one image each, and the spans of the answers.

    The text is the prompt of the harness for the shapes tasks, as a raw prompt or with the chat template. A span
    [start, end) has the terminator of the answer: a line break, or the end of the turn.

    Args:
        items: the pairs of question and answer.
        chat: True writes the text with the chat template.
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
    """Return the sequences as one right-padded batch; all sequences have the same number of items."""
    image = "<fake_token_around_image><global-img>" + "<image>" * tiny.IMAGE_TOKENS + "<fake_token_around_image>"
    rendered = [render([item[1:] for item in items], style) for items, style in zip(sequences, chat, strict=True)]
    grown = len(image) - len("<image>")
    texts = [text.replace("<image>", image) for text, _ in rendered]
    spans = [
        [(a + grown * (i + 1), b + grown * (i + 1)) for i, (a, b) in enumerate(answers)] for _, answers in rendered
    ]
    encoded = processor.tokenizer(
        texts, padding=True, padding_side="right", return_tensors="pt", return_offsets_mapping=True
    )
    starts = encoded["offset_mapping"][..., 0]
    answer = torch.zeros_like(starts, dtype=torch.bool)
    for row, answer_spans in enumerate(spans):
        for a, b in answer_spans:
            answer[row] |= (starts[row] >= a) & (starts[row] < b)
    answer &= encoded["attention_mask"].bool()
    scene_indices = torch.tensor([[item[0] for item in items] for items in sequences])
    return Batch(
        encoded["input_ids"],
        encoded["attention_mask"],
        bank.pixels[scene_indices],
        encoded["input_ids"].masked_fill(~answer, -100),
    )


def seeing(bank: Bank, size: int, rng: random.Random) -> list[list[Item]]:
    """Return ``size`` sequences of one image with a question that names the attribute and the language."""
    sequences = []
    for _ in range(size):
        attribute, language = rng.choice(words.ATTRIBUTES), rng.choice(tuple(words.LANGUAGES))
        index = rng.randrange(len(bank.scenes))
        answer = words.name(attribute, getattr(bank.scenes[index], attribute), language)
        sequences.append([(index, questions.named_question(attribute, language), answer)])
    return sequences


def in_context(bank: Bank, size: int, items: int, labels_share: float, rng: random.Random) -> list[list[Item]]:
    """Return ``size`` sequences of ``items`` images; the answers of a sequence are the only sign of its task."""

    def task() -> Answer:
        if rng.random() < labels_share:
            attribute = rng.choice(tuple(words.LABELS))
            return questions.labels(attribute, questions.shuffled(attribute, rng))
        return questions.TASKS[rng.choice(tuple(questions.TASKS))]

    def sequence(answer: Answer) -> list[Item]:
        indices = [rng.randrange(len(bank.scenes)) for _ in range(items)]
        return [(index, questions.QUESTION, answer(bank.scenes[index])) for index in indices]

    return [sequence(task()) for _ in range(size)]


def training_batch(config: TrainConfig, processor: Idefics3Processor, bank: Bank, step: int) -> Batch:
    """Return batch number ``step``, which depends only on ``config.seed`` and ``step``."""
    rng = random.Random(f"{config.seed}-{step}")
    if step < config.seeing_steps or rng.random() < config.seeing_share:
        sequences = seeing(bank, config.seeing_batch, rng)
    else:
        items = rng.randint(1, config.most_demonstrations + 1)
        sequences = in_context(bank, config.batch, items, config.labels_share, rng)
    return encode(processor, bank, sequences, [rng.random() < 0.5 for _ in sequences])


def loss(model: Idefics3ForConditionalGeneration, batch: Batch) -> Tensor:
    """Return the mean cross-entropy of the answer tokens."""
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
    """Return the share of queries whose whole answer is the most likely answer after ``shots`` demonstrations.

    Args:
        model: the model.
        processor: the processor of the model.
        bank: the scenes of the queries and demonstrations.
        answer: the task; None asks about single images, with a question that names the attribute.
        shots: the number of demonstrations.
        size: the number of queries.
    """
    rng = random.Random(f"accuracy-{shots}")
    if answer is None:
        sequences = seeing(bank, size, rng)
    else:
        rows = [[rng.randrange(len(bank.scenes)) for _ in range(shots + 1)] for _ in range(size)]
        sequences = [[(i, questions.QUESTION, answer(bank.scenes[i])) for i in row] for row in rows]
    batch = encode(processor, bank, sequences, [False] * size)
    predicted = _logits(model, batch)[:, :-1].argmax(-1)
    labels = batch.labels[:, 1:]
    # The answer of the query is the last run of labels in a row.
    last = labels.flip(1).ne(-100).long()
    gaps = last.diff(dim=1).eq(-1).cumsum(1)
    query = torch.cat([torch.ones_like(last[:, :1]), (gaps == 0).long()], 1).mul(last).flip(1).bool()
    return ((predicted == labels) | ~query).all(1).float().mean().item()


def evaluate(model: Idefics3ForConditionalGeneration, processor: Idefics3Processor, bank: Bank) -> dict[str, float]:
    """Return the accuracies on held-out scenes: of seeing, of the tasks by shots, and of the hard tasks at 8 shots."""
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
    """Train the tiny model and save the checkpoint in ``output``; a saved state in ``output`` continues.

    Args:
        config: the settings of the run.
        output: the folder of the checkpoint and of the state.
        until: the number of steps after which the run stops and saves the state, as an interruption would; None trains
            to the end.
    """
    output.mkdir(parents=True, exist_ok=True)
    processor = tiny.processor()
    held_out = [scene for split in scenes.splits().values() for scene in split]
    stream = scenes.distinct(random.Random(f"bank-{config.seed}"), exclude=held_out)
    bank = Bank.drawn(processor, list(islice(stream, config.scenes)))
    fresh = Bank.drawn(processor, list(islice(stream, 1000)))

    model = tiny.untrained(processor.tokenizer, config.seed).train()
    optimizer = torch.optim.AdamW(model.parameters(), betas=config.betas, weight_decay=config.weight_decay)

    def scores() -> str:
        return "accuracy " + " ".join(f"{k} {v:.3f}" for k, v in evaluate(model, processor, fresh).items())

    finished = run_steps(
        model,
        optimizer,
        lambda step: loss(model, training_batch(config, processor, bank, step)),
        scores,
        config,
        folder=output,
        until=until,
    )
    model.eval()
    if finished:
        model.save_pretrained(output)
        processor.save_pretrained(output)
    return model


def main(argv: Sequence[str] | None = None) -> None:
    """Run the training from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, required=True, help="folder of the checkpoint and of the state of the run"
    )
    parser.add_argument("--seed", type=int, default=TrainConfig.seed, help="seed of weights, scenes and batches")
    parser.add_argument("--seeing-steps", type=int, default=TrainConfig.seeing_steps, help="steps of the first phase")
    parser.add_argument("--steps", type=int, default=TrainConfig.steps, help="steps of the second phase")
    parser.add_argument(
        "--until", type=int, default=None, help="stop after this number of steps; the same command continues later"
    )
    arguments = parser.parse_args(argv)
    log_to(arguments.output)
    config = TrainConfig(seed=arguments.seed, seeing_steps=arguments.seeing_steps, steps=arguments.steps)
    logger.info("%s, torch %s, %d threads", config, torch.__version__, torch.get_num_threads())
    train(config, arguments.output, arguments.until)


if __name__ == "__main__":
    main()
