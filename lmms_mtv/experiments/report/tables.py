"""Tables of results, as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from lmms_mtv.errors import ArgumentError, unknown
from lmms_mtv.experiments import published
from lmms_mtv.experiments.report import summary
from lmms_mtv.experiments.report.bootstrap import LEVEL, RESAMPLES, PairedDifference, differences
from lmms_mtv.experiments.report.results import Results
from lmms_mtv.experiments.report.summary import MISSING, NONE, number

Differences = Mapping[tuple[str, str | None], PairedDifference]


@dataclass(frozen=True)
class Table:
    """A table of text, its first column the names of rows, and sentences that belong under it."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = field(default=())

    def markdown(self) -> str:
        """Return the table and a paragraph of its notes."""
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        text = text.replace("| --- |", "|---|").replace(" --- |", "---|")
        return "\n\n".join([text, " ".join(self.notes)]) if self.notes else text


def markdown(results: Sequence[Results]) -> str:
    """Return the whole report: for each folder its summary, scores, differences and costs."""
    parts = [] if len(results) == 1 else ["# Report", "## All results", scores(results).markdown()]
    for found in results:
        level = "#" if len(results) == 1 else "##"
        parts.append(f"{level} {found.title}")
        for table in report(found):
            parts += [f"{level}# {table.title}", table.markdown()]
    return "\n\n".join(parts) + "\n"


def report(results: Results) -> list[Table]:
    """Return the tables of one folder."""
    found = differences(results)
    tables = [overview(results, found), scores([results])]
    if found:
        tables.append(compared(results, found))
    return [*tables, costs(results)]


def kind(name: str) -> Callable[[Results], Table]:
    """Return the table that a mark in a text asks for."""
    kinds: dict[str, Callable[[Results], Table]] = {"summary": overview, "tasks": by_task, "costs": costs}
    if name not in kinds:
        raise unknown("table", name, kinds)
    return kinds[name]


def overview(results: Results, found: Differences | None = None) -> Table:
    """Return one row for each arm: mean over tasks, worst task, difference to the baseline, tokens, seconds."""
    found = differences(results) if found is None else found
    pooled = summary.poolable(results)
    header = ["arm", _over(results), "worst task"]
    if found:
        header.append(f"difference to {results.baseline} [95 %]")
    rows = []
    for arm in results.arms:
        cells = results.of(arm)
        row = [arm, str(summary.mean_score(results, arm)), summary.worst(results, arm)]
        if not pooled:
            row[1:] = [NONE, NONE]
        if found:
            row.append(_difference(results, found, arm, None) if pooled else NONE)
        rows.append([*row, _tokens(results, arm), _known(summary.fit_seconds(cells), 1, missing=not cells)])
    notes = [*_scored(results), *_seeds(results)]
    notes += [_bootstrap(results)] if found else []
    notes += ["Tokens: mean of a prompt, in brackets the share of image tokens.", *_made_with(results)]
    return Table("Summary", [*header, "tokens per prompt", "fit, s"], rows, notes)


def by_task(results: Results) -> Table:
    """Return one row for each task, one column for each arm."""
    rows = [[task, *(str(summary.score(results, arm, task)) for arm in results.arms)] for task in results.tasks]
    return Table("By task", ["task", *results.arms], rows, [*_scored(results, pooled=False), *_seeds(results)])


def scores(results: Sequence[Results]) -> Table:
    """Return one row for each arm (of each folder and model, if several), one column for each task, and their mean.

    Under an arm, the paper's numbers for the model that the plan names, where it has any. A task that a folder does not
    have at all is ``-``; a cell that its plan has and the folder lacks is ``missing``.
    """
    tasks = list(dict.fromkeys(task for found in results for task in found.tasks))
    alone = len(results) == 1
    several = len({cell.model["name"] for found in results for cell in found.cells}) > 1
    header = [*([] if alone else ["results"]), *(["model"] if several else []), "arm", *tasks]
    header += [_over(results[0])] if alone else []
    rows: list[list[str]] = []
    reported = False
    for found in results:
        for arm in found.arms:
            models = sorted({cell.model["name"] for cell in found.of(arm)}) or [MISSING]
            lead = [*([] if alone else [found.plan.name]), *([", ".join(models)] if several else [])]
            row = [str(summary.score(found, arm, task)) if task in found.tasks else NONE for task in tasks]
            if alone:
                row.append(str(summary.mean_score(found, arm)) if summary.poolable(found) else NONE)
            rows.append([*lead, arm, *row])
            printed = _reported(found, arm, tasks)
            if any(text != NONE for text in printed):
                reported = True
                lead = [*([] if alone else [found.plan.name]), *([str(found.plan.paper)] if several else [])]
                rows.append([*lead, f"{arm}, reported", *printed, *([NONE] if alone else [])])
    notes = [note for found in results for note in (*_scored(found, named=not alone), *_seeds(found, named=not alone))]
    if reported:
        names = ", ".join(sorted({found.plan.paper for found in results if found.plan.paper}))
        notes.append(
            f"Reported: what the MTV paper (arXiv {published.MTV}) gives for {names}, in its own runs, per cent "
            "divided by 100; no spread or seed is given."
        )
    return Table("Scores", header, rows, notes)


def compared(results: Results, found: Differences) -> Table:
    """Return one row for each arm, one column for each task: the difference to the baseline with its interval."""
    pooled = summary.poolable(results)
    rows = [
        [
            arm,
            *(_difference(results, found, arm, task) for task in results.tasks),
            _difference(results, found, arm, None) if pooled else NONE,
        ]
        for arm in results.arms
        if arm != results.baseline
    ]
    title = f"Difference to {results.baseline}"
    return Table(title, ["arm", *results.tasks, _over(results)], rows, [_bootstrap(results)])


def costs(results: Results) -> Table:
    """Return one row for each arm: tokens, seconds, size of the vector's file, memory."""
    rows = []
    for arm in results.arms:
        cells = results.of(arm)
        missing = not cells
        rows.append(
            [
                arm,
                _known(summary.prompt_tokens(cells), 1, missing),
                _percent(summary.image_share(cells), missing),
                _known(summary.fit_seconds(cells), 1, missing),
                _known(_times(summary.vector_bytes(cells), 1e-3), 1, missing),
                _known(summary.evaluation_seconds(cells), 2, missing),
                _known(_times(summary.token_seconds(cells), 1e3), 2, missing),
                _known(summary.peak_memory(cells, "fit"), 2, missing),
                _known(summary.peak_memory(cells, "evaluation"), 2, missing),
            ]
        )
    header = ["arm", "tokens per prompt", "image tokens", "fit, s", "vector, kB", "evaluation, s per 100 prompts"]
    header += ["evaluation, ms per prompt token"]
    header += ["peak memory of fit, GB", "peak memory of evaluation, GB"]
    notes = [
        "Means over tasks and seeds; memory is the highest peak of all.",
        f"{NONE}: nothing to measure, or unknown.",
    ]
    return Table("Cost", header, rows, [*notes, *_memory(results), *_made_with(results)])


def _over(results: Results) -> str:
    count = len(results.tasks)
    return f"mean of {count} tasks" if count > 1 else results.tasks[0]


def _difference(results: Results, found: Differences, arm: str, task: str | None) -> str:
    if arm == results.baseline:
        return NONE
    if (arm, task) not in found:
        return MISSING
    entry = found[arm, task]
    low, high = number(entry.low, sign=True), number(entry.high, sign=True)
    return f"{number(entry.mean, sign=True)} [{low}, {high}]"


def _tokens(results: Results, arm: str) -> str:
    cells = results.of(arm)
    share = summary.image_share(cells)
    text = _known(summary.prompt_tokens(cells), 0, missing=not cells)
    return text if share is None else f"{text} ({_percent(share)})"


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else factor * value


def _known(value: float | None, digits: int, missing: bool = False) -> str:
    if missing:
        return MISSING
    return NONE if value is None else number(value, digits)


def _percent(value: float | None, missing: bool = False) -> str:
    if missing:
        return MISSING
    return NONE if value is None else f"{number(100 * value, 0)} %"


def _reported(results: Results, arm: str, tasks: Sequence[str]) -> list[str]:
    """Return the paper's number for each task, on the scale of the harness's scores, 0 to 1."""
    model = results.plan.paper
    if model is None:
        return [NONE] * len(tasks)
    if model not in published.models():
        raise ArgumentError(
            f"paper: {model} in {results.folder / 'plan.yaml'} is no model of the paper. "
            f"Known: {', '.join(published.models())}."
        )
    found = [published.published_result(task, arm, model) if task in results.tasks else None for task in tasks]
    return [NONE if entry is None else number(entry.value / 100) for entry in found]


def _scored(results: Results, pooled: bool = True, named: bool = False) -> list[str]:
    """Return which metric over how many documents; what a mean over tasks mixes."""
    metrics, counts = _by(results, "metric"), _by(results, "n")
    prefix = f"{results.plan.name}: " if named else ""
    documents = f"{_one(counts)} documents a task" if len(counts) == 1 else f"documents: {_listed(counts)}"
    scored = _one(metrics) if len(metrics) == 1 else f"Metrics: {_listed(metrics)}"
    notes = [f"{prefix}{scored}; {documents}."]
    if not pooled or len(results.tasks) == 1:
        return notes
    if not summary.poolable(results):
        return [*notes, "No mean over tasks: higher is better for some and worse for others."]
    if len(metrics) > 1:
        notes.append("The mean over tasks is over different metrics.")
    if len(counts) > 1:
        notes.append("The mean over tasks counts every task once, however many documents it has.")
    return notes


def _by(results: Results, name: str) -> dict[str, list[str]]:
    """Tasks by a value of their cells."""
    found: dict[str, list[str]] = {}
    for task in results.tasks:
        values = sorted({getattr(cell, name) for cell in results.cells if cell.task == task})
        found.setdefault(" or ".join(map(str, values)), []).append(task)
    return found


def _one(values: Mapping[str, object]) -> str:
    return next(iter(values))


def _listed(values: Mapping[str, Sequence[str]]) -> str:
    return ", ".join(f"{value} ({', '.join(tasks)})" for value, tasks in values.items())


def _seeds(results: Results, named: bool = False) -> list[str]:
    prefix = f"{results.plan.name}: mean" if named else "Mean"
    seeds = ", ".join(map(str, results.plan.seeds))
    if len(results.plan.seeds) == 1:
        return [f"{'One' if not named else prefix[:-4] + 'one'} seed, {seeds}: no spread ({NONE})."]
    notes = [f"{prefix} ± standard deviation over seeds {seeds}."]
    single = [arm for arm in results.arms if results.seedless(arm)]
    fewer: dict[tuple[int, ...], list[str]] = {}
    for arm in results.arms:
        if arm in results.plan.seeds_of and arm not in single:
            fewer.setdefault(tuple(results.expected(arm)), []).append(arm)
    if single:
        notes.append(f"No seed changes {', '.join(single)}: one seed, no spread ({NONE}).")
    notes += [
        f"{', '.join(arms)}: seed{'s' if len(own) > 1 else ''} {', '.join(map(str, own))} alone."
        for own, arms in fewer.items()
    ]
    if any(len(results.of(arm, task)) < len(results.expected(arm)) for arm in results.arms for task in results.tasks):
        notes.append("Cells that the plan has and the folder lacks are missing, or counted in brackets.")
    if results.others:
        notes.append(f"Left out: {results.others} cells of the folder that are none of the plan's.")
    return notes


def _bootstrap(results: Results) -> str:
    note = (
        f"Difference to {results.baseline}: paired document by document and seed by seed, {100 * LEVEL:.0f} % interval "
        f"of a bootstrap over documents ({RESAMPLES:,} resamples)."
    )
    other = sorted({cell.task for cell in results.cells if abs(cell.score - fmean(cell.samples["scores"])) > 1e-6})
    if other:
        note += f" It is of the documents' scores; the score of {', '.join(other)} is not their mean."
    return note


def _memory(results: Results) -> list[str]:
    devices = {cell.hardware["device"] for cell in results.cells}
    notes = []
    if "cpu" in devices:
        notes.append("Memory on a CPU: resident memory of the process, weights and libraries included.")
    if devices - {"cpu"}:
        notes.append("Memory on a GPU: what torch had allocated.")
    return [*notes, "GB: 1e9 bytes."]


def _made_with(results: Results) -> list[str]:
    """Hardware and versions, all of them if cells differ."""
    machines = {
        f"{cell.hardware['machine']}, {cell.hardware['cores']} cores, {cell.hardware['device']}, "
        f"{cell.hardware['processes']} process{'es' if cell.hardware['processes'] > 1 else ''}"
        for cell in results.cells
    }
    versions: dict[str, set[str]] = {}
    for cell in results.cells:
        for name, version in cell.versions.items():
            versions.setdefault(name, set()).add(version)
    written = ", ".join(f"{name} {' or '.join(sorted(found))}" for name, found in sorted(versions.items()))
    return [f"{' or '.join(sorted(machines))}; {written}."]
