"""A whole fit: extraction, selection and final choice, compared with a loop of one full forward for each mask.

*loop* is the procedure of the authors' code, with plain torch hooks and batches of one prompt: a forward of each
few-shot prompt for the mean activations; in each step a forward of the whole query for each mask; and a forward for
each candidate mask and validation query. *ours* is ``method=mtv`` with the same numbers and all steps
(``settle=None``), whole, with all checks, and once more with the default of ``settle``. Losses are those of the first
token of the target, as in the authors' code.

``--pairs FILE`` fits real word pairs, a JSON list of ``{"input", "output"}``, with a packaged model (``--model
smollm2``). Without it, the models have random weights and real shapes, and the prompts have ``--tokens`` random tokens;
``--layers`` takes fewer blocks than the shape has. ``--scale`` divides the numbers of prompts, steps and queries.

The loop is too slow to measure completely. All forwards of a stage do the same work, so each round times ``--part``
forwards of each stage, half of them before our fit and half after it, and multiplies their mean to the number of
forwards. Both sides compute the logits of the last token only, and the authors' code does not; this favours the loop.
REINFORCE and the hooks' own work between the forwards are not counted for the loop, and are counted for ours.

The losses of both sides must agree within 1e-4 in float32, within 5 % in lower precision. Else the exit status is 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import measure, models, prompts
from benchmarks.selection import replaced
from lmms_mtv import Edit, Episode, FitSession, methods
from lmms_mtv.hooks import find_sites
from lmms_mtv.methods import Fitted
from lmms_mtv.models import gguf
from lmms_mtv.models.examples import ExampleList
from lmms_mtv.models.runner import PromptRunner

SCALED: Final = ("iterations", "steps", "examples", "candidate_examples")
"""The settings that ``--scale`` divides."""

STAGES: Final = ("extraction", "selection", "choice")


class FitSource(Protocol):
    """A model with its training examples."""

    @property
    def model(self) -> nn.Module: ...

    def session(self, seed: int, batch_size: int) -> FitSession[Any]:
        """Return a new fit session."""
        ...

    def inputs(self, episode: Episode) -> tuple[dict[str, Tensor], int]:
        """Return the arguments of a plain forward of a prompt, and the first token of its target."""
        ...


@dataclass(frozen=True)
class RandomTokens:
    """A model of random weights, and examples of random tokens."""

    model: nn.Module
    examples: prompts.SyntheticExamples

    def session(self, seed: int, batch_size: int) -> FitSession[Any]:
        """Return a new fit session."""
        return prompts.session(self.model, self.examples, seed=seed, batch_size=batch_size)

    def inputs(self, episode: Episode) -> tuple[dict[str, Tensor], int]:
        """Return the arguments of a plain forward of a prompt, and the first token of its target."""
        prompt = self.examples.prompt(episode)
        return prompts.batch(self.model, [prompt]), prompt.target[0]


@dataclass(frozen=True)
class WordPairs:
    """A real language model, and word pairs in the prompts of the function vectors repository."""

    runner: PromptRunner
    tokenizer: Any
    examples: ExampleList

    @classmethod
    def of(cls, name: str, file: Path, dtype: torch.dtype) -> WordPairs:
        """Return the packaged model ``name`` and the pairs of ``file``."""
        source, gguf_file = gguf.located(name, None)
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf_file)
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf_file, dtype=dtype).eval()
        pairs = json.loads(file.read_text(encoding="utf-8"))
        rows = [(f"Q: {pair['input']}\nA:", pair["output"]) for pair in pairs]
        return cls(PromptRunner(model, tokenizer, name), tokenizer, ExampleList(rows))

    @property
    def model(self) -> nn.Module:
        return self.runner.model

    def session(self, seed: int, batch_size: int) -> FitSession[Any]:
        """Return a new fit session."""
        sites = self.runner.sites
        return FitSession(self.runner, sites, self.examples, seed=seed, batch_size=batch_size, progress=False)

    def inputs(self, episode: Episode) -> tuple[dict[str, Tensor], int]:
        """Return the arguments of a plain forward of a prompt, and the first token of its target."""
        prompt = self.examples.prompt(episode)
        inputs = self.tokenizer(self.runner.rendered(prompt), return_token_type_ids=False, return_tensors="pt")
        if self.runner.lead_ids(prompt):
            raise ValueError("the tokenizer of this model writes a blank token before an answer: choose another model")
        return dict(inputs), self.runner.target_ids(prompt)[0]


class Loop:
    """The authors' procedure, one forward after the other."""

    def __init__(self, source: FitSource) -> None:
        self._source = source
        self._projections = [site.module for site in find_sites(source.model)]

    @torch.no_grad()
    def activations(self, episode: Episode) -> Tensor:
        """Return the activations of all heads at the last token of a prompt, [layers, heads * size]."""
        inputs, _ = self._source.inputs(episode)
        found: list[Tensor] = []
        hooks = [
            projection.register_forward_pre_hook(lambda _, args: found.append(args[0][0, -1].float().cpu()))
            for projection in self._projections
        ]
        try:
            self._source.model(**inputs, use_cache=False, logits_to_keep=1)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack(found)

    @torch.no_grad()
    def loss(self, episode: Episode, value: Tensor, mask: Tensor) -> float:
        """Return the loss of the first token of a query's target with the masked heads replaced."""
        inputs, target = self._source.inputs(episode)
        with replaced(self._projections, value, mask):
            logits = self._source.model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1].float().cpu()
        return functional.cross_entropy(logits, torch.tensor([target])).item()


def main(argv: Sequence[str] | None = None) -> int:
    parser = measure.parser(__doc__)
    for action in parser._actions:
        if action.dest == "model":
            action.choices = (*models.NAMES, *gguf.PACKAGED)
    parser.add_argument("--pairs", metavar="FILE", help="word pairs, for a packaged model")
    parser.add_argument("--tokens", type=int, default=600, help="tokens of an example (default: 600)")
    parser.add_argument("--layers", type=int, help="blocks of the model (default: as many as the shape has)")
    parser.add_argument("--shots", type=int, default=4, help="demonstrations in an extracted prompt (default: 4)")
    parser.add_argument("--scale", type=int, default=1, help="divisor of the reference settings (default: 1)")
    parser.add_argument(
        "--part", type=int, default=16, help="measured forwards of each stage of the loop (default: 16)"
    )
    parser.add_argument("--batch", type=int, default=8, help="batch size of our extraction (default: 8)")
    arguments = parser.parse_args(argv)
    if (arguments.pairs is None) == (arguments.model in gguf.PACKAGED):
        parser.error(f"--model {arguments.model}: a packaged model needs --pairs, and only a packaged model")
    device = measure.device_of(arguments)
    figures = measured(arguments, source_of(arguments, device), device)
    lines = [
        f"{arguments.model}: a fit takes {figures['medians']['loop']:.4g} s in the loop, "
        f"{figures['medians']['ours']:.4g} s here, {figures['speedup']:.1f} times less, and "
        f"{figures['medians']['settled']:.4g} s if it ends early, {figures['settled_speedup']:.1f} times less; losses "
        f"differ by {figures['gap']:.2g}"
    ]
    measure.finish(arguments, device, figures, lines)
    if figures["gap"] > figures["tolerance"]:
        sys.stderr.write("the losses of the loop and of the replays differ: the times cannot be compared\n")
        return 1
    return 0


def source_of(arguments: argparse.Namespace, device: torch.device) -> FitSource:
    """Return the model and the examples of the arguments."""
    if arguments.pairs is not None:
        return WordPairs.of(arguments.model, Path(arguments.pairs), measure.dtype_of(arguments, device))
    model = measure.model_of(arguments, device, arguments.layers)
    config = methods.get("mtv").configure({})
    count = max((config.examples + config.candidate_examples) // arguments.scale, arguments.shots + 1) + 1
    return RandomTokens(model, prompts.examples(model, count, arguments.tokens, arguments.seed))


def measured(arguments: argparse.Namespace, source: FitSource, device: torch.device) -> dict[str, Any]:
    """Return the seconds of whole fits on both sides, and the largest difference of a loss."""
    method = methods.get("mtv")
    reference = method.configure({"loss": "first", "fit_shots": arguments.shots, "settle": None})
    scaled = {name: max(getattr(reference, name) // arguments.scale, 1) for name in SCALED}
    config = dataclasses.replace(reference, **scaled)
    settled = dataclasses.replace(config, settle=method.configure({}).settle)
    forwards = {
        "extraction": config.iterations,
        "selection": config.steps * config.samples,
        "choice": config.candidates * config.candidate_examples,
    }
    found: dict[str, list[Any]] = {name: [] for name in ("loop", "ours", "settled", "stages", "steps", "gaps")}
    rounds = range(arguments.repetitions)
    for number in tqdm(rounds, desc="Fits", disable=arguments.quiet, dynamic_ncols=True, leave=False):
        session = source.session(arguments.seed + number, arguments.batch)
        half = max(arguments.part // 2, 1)
        before, gap = _loop_seconds(source, session, config, half, device)
        ours, _ = _fit_seconds(session, config, device)
        after, _ = _loop_seconds(source, session, config, half, device)
        early = source.session(arguments.seed + number, arguments.batch)
        early_seconds, steps = _fit_seconds(early, settled, device)
        found["settled"].append(early_seconds)
        found["steps"].append(steps)
        each = {stage: (before[stage] + after[stage]) / 2 for stage in STAGES}
        found["loop"].append(sum(each[stage] * forwards[stage] for stage in STAGES))
        found["ours"].append(ours)
        found["stages"].append({"loop": {s: each[s] * forwards[s] for s in STAGES}, "ours": dict(session.stages)})
        found["gaps"].append(gap)
    times = {name: found[name] for name in ("loop", "ours", "settled")}
    exact = measure.dtype_of(arguments, device) == torch.float32
    few, zero = (source.inputs(session.episodes(1, shots, "lengths")[0])[0] for shots in (arguments.shots, 0))
    return {
        "speedup": measure.ratio(times, "loop", "ours"),
        "settled_speedup": measure.ratio(times, "loop", "settled"),
        "settle": settled.settle,
        "steps_before_settled": found["steps"],
        "gap": max(found["gaps"]),
        "tolerance": 1e-4 if exact else 0.05,
        "forwards_of_the_loop": forwards,
        "measured_forwards_of_each_stage": 2 * max(arguments.part // 2, 1),
        "tokens": {"few_shot": few["input_ids"].shape[1], "zero_shot": zero["input_ids"].shape[1]},
        "stages": found["stages"],
        "replay": session.replay,
        "medians": measure.medians(times),
        "repetitions": times,
    }


def _fit_seconds(session: FitSession[Any], config: Any, device: torch.device) -> tuple[float, int]:
    """Return the seconds of our fit, and the number of its steps."""
    fits: list[Fitted] = []
    seconds = measure.seconds(lambda: fits.append(methods.get("mtv").fit(session, config)), device)
    return seconds, len(fits[0].losses["policy"])


def _loop_seconds(
    source: FitSource, session: FitSession[Any], config: Any, count: int, device: torch.device
) -> tuple[Mapping[str, float], float]:
    """Return the mean seconds of a forward of each stage of the loop, and the largest difference of a loss from ours.

    Our losses are of a session of their own, so that no prompt of the measured fit is prefilled before.
    """
    loop, generator = Loop(source), torch.Generator().manual_seed(session.seed)
    shown = session.episodes(count, config.fit_shots, "values")
    queries = session.episodes(count, 0, "selection")
    layers, heads, size = session.shape
    value = torch.stack([loop.activations(episode) for episode in shown[:2]]).mean(0).view(layers, heads, size)
    masks = torch.rand(count, layers, heads, generator=generator) < 0.3
    loop.loss(queries[0], value, masks[0])
    took = {"extraction": _mean_seconds([lambda e=e: loop.activations(e) for e in shown], device)}
    losses: list[float] = []
    runs = [lambda e=e, m=m: losses.append(loop.loss(e, value, m)) for e, m in zip(queries, masks, strict=True)]
    took["selection"] = took["choice"] = _mean_seconds(runs, device)
    checked = source.session(session.seed, 1)
    ours = [checked.losses(queries[i], Edit.replace(value, masks[i : i + 1])).item() for i in range(min(count, 4))]
    return took, max(abs(a - b) for a, b in zip(ours, losses, strict=False))


def _mean_seconds(runs: Sequence[Any], device: torch.device) -> float:
    """Return the mean seconds of each of ``runs``."""
    measure.wait(device)
    began = time.perf_counter()
    for run in runs:
        run()
    measure.wait(device)
    return (time.perf_counter() - began) / len(runs)


if __name__ == "__main__":
    sys.exit(main())
