"""Tables of results, as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from lmms_mtv.errors import ArgumentError, unknown
from lmms_mtv.experiments import published
from lmms_mtv.experiments.report import setup, summary
from lmms_mtv.experiments.report.bootstrap import LEVEL, RESAMPLES, PairedDifference, differences
from lmms_mtv.experiments.report.results import Results
from lmms_mtv.experiments.report.summary import MISSING, NONE, number
from lmms_mtv.experiments.report.table import Table

Differences = Mapping[tuple[str, str | None], PairedDifference]


def markdown(results: Sequence[Results]) -> str:
    """Return the whole report as Markdown: the tables of each folder."""
    parts = [] if len(results) == 1 else ["# Report", "## All results", scores(results).markdown()]
    for section in results:
        level = "#" if len(results) == 1 else "##"
        parts.append(f"{level} {section.title}")
        for table in report(section):
            parts += [f"{level}# {table.title}", table.markdown()]
    return "\n\n".join(parts) + "\n"


def report(results: Results) -> list[Table]:
    """Return the tables of one folder: results, costs, and what was run."""
    intervals = differences(results)
    tables = [overview(results, intervals), scores([results])]
    if intervals:
        tables.append(compared(results, intervals))
    return [*tables, costs(results), setup.run(results), setup.arms(results)]


def kind(name: str) -> Callable[[Results], Table]:
    """Return the function that makes the table of a mark: ``summary``, ``tasks`` or ``costs``.

    Raises:
        ArgumentError: ``name`` is none of these.
    """
    kinds: dict[str, Callable[[Results], Table]] = {"summary": overview, "tasks": by_task, "costs": costs}
    if name not in kinds:
        raise unknown("table", name, kinds)
    return kinds[name]


def overview(results: Results, intervals: Differences | None = None) -> Table:
    """Return one row for each arm: mean over tasks, worst task, difference to the baseline, tokens, seconds."""
    intervals = differences(results) if intervals is None else intervals
    pooled = summary.poolable(results)
    header = ["arm", _mean_column(results), "worst task"]
    if intervals:
        header.append(f"difference to {results.baseline} [95 %]")
    rows = []
    for arm in results.arms:
        cells = results.of(arm)
        row = [arm, str(summary.mean_score(results, arm)), summary.worst(results, arm)]
        if not pooled:
            row[1:] = [NONE, NONE]
        if intervals:
            row.append(_difference(results, intervals, arm, None) if pooled else NONE)
        rows.append([*row, _tokens_text(results, arm), _text(summary.fit_seconds(cells), 1, missing=not cells)])
    notes = [*_score_notes(results), *_seed_notes(results)]
    notes += [_bootstrap_note(results)] if intervals else []
    notes += ["Tokens: mean of a prompt, in brackets the share of image tokens.", *_hardware_notes(results)]
    return Table("Summary", [*header, "tokens per prompt", "fit, s"], rows, notes)


def by_task(results: Results) -> Table:
    """Return one row for each task, one column for each arm."""
    rows = [[task, *(str(summary.score(results, arm, task)) for arm in results.arms)] for task in results.tasks]
    return Table(
        "By task", ["task", *results.arms], rows, [*_score_notes(results, pooled=False), *_seed_notes(results)]
    )


def scores(results: Sequence[Results]) -> Table:
    """Return one row for each arm, and one column for each task and for the mean over tasks.

    With several folders or models, each arm has a row for each of them. Below an arm stand the numbers that the paper
    reports for the model in the plan, if there are any. A task that a folder does not have is ``-``; a cell that the
    plan has and the folder lacks is ``missing``.
    """
    tasks = list(dict.fromkeys(task for folder in results for task in folder.tasks))
    single = len(results) == 1
    several_models = len({cell.model["name"] for folder in results for cell in folder.cells}) > 1
    header = [*([] if single else ["results"]), *(["model"] if several_models else []), "arm", *tasks]
    header += [_mean_column(results[0])] if single else []
    rows: list[list[str]] = []
    has_published = False
    for folder in results:
        for arm in folder.arms:
            models = sorted({cell.model["name"] for cell in folder.of(arm)}) or [MISSING]
            lead = [*([] if single else [folder.plan.name]), *([", ".join(models)] if several_models else [])]
            row = [str(summary.score(folder, arm, task)) if task in folder.tasks else NONE for task in tasks]
            if single:
                row.append(str(summary.mean_score(folder, arm)) if summary.poolable(folder) else NONE)
            rows.append([*lead, arm, *row])
            published_row = _published_row(folder, arm, tasks)
            if any(text != NONE for text in published_row):
                has_published = True
                lead = [*([] if single else [folder.plan.name]), *([str(folder.plan.paper)] if several_models else [])]
                rows.append([*lead, f"{arm}, reported", *published_row, *([NONE] if single else [])])
    notes = [
        note
        for folder in results
        for note in (*_score_notes(folder, named=not single), *_seed_notes(folder, named=not single))
    ]
    if has_published:
        names = ", ".join(sorted({folder.plan.paper for folder in results if folder.plan.paper}))
        notes.append(
            f"Reported: what the MTV paper (arXiv {published.MTV}) gives for {names}, in its own runs, per cent "
            "divided by 100; no spread or seed is given."
        )
    return Table("Scores", header, rows, notes)


def compared(results: Results, intervals: Differences) -> Table:
    """Return one row for each arm, one column for each task: the difference to the baseline with its interval."""
    pooled = summary.poolable(results)
    rows = [
        [
            arm,
            *(_difference(results, intervals, arm, task) for task in results.tasks),
            _difference(results, intervals, arm, None) if pooled else NONE,
        ]
        for arm in results.arms
        if arm != results.baseline
    ]
    title = f"Difference to {results.baseline}"
    return Table(title, ["arm", *results.tasks, _mean_column(results)], rows, [_bootstrap_note(results)])


def costs(results: Results) -> Table:
    """Return one row for each arm: tokens, seconds, size of the vector's file, memory."""
    rows = []
    for arm in results.arms:
        cells = results.of(arm)
        missing = not cells
        rows.append(
            [
                arm,
                _text(summary.prompt_tokens(cells), 1, missing),
                _percent(summary.image_share(cells), missing),
                _text(summary.fit_seconds(cells), 1, missing),
                _text(_scaled(summary.vector_bytes(cells), 1e-3), 1, missing),
                _text(summary.evaluation_seconds(cells), 2, missing),
                _text(_scaled(summary.token_seconds(cells), 1e3), 2, missing),
                _text(summary.peak_memory(cells, "fit"), 2, missing),
                _text(summary.peak_memory(cells, "evaluation"), 2, missing),
            ]
        )
    header = ["arm", "tokens per prompt", "image tokens", "fit, s", "vector, kB", "evaluation, s per 100 prompts"]
    header += ["evaluation, ms per prompt token"]
    header += ["peak memory of fit, GB", "peak memory of evaluation, GB"]
    notes = [
        "Means over tasks and seeds; memory is the highest peak of all.",
        f"{NONE}: nothing to measure, or unknown.",
    ]
    return Table("Cost", header, rows, [*notes, *_memory_notes(results), *_hardware_notes(results)])


def _mean_column(results: Results) -> str:
    count = len(results.tasks)
    return f"mean of {count} tasks" if count > 1 else results.tasks[0]


def _difference(results: Results, intervals: Differences, arm: str, task: str | None) -> str:
    """Return the difference of an arm to the baseline with its interval, as text."""
    if arm == results.baseline:
        return NONE
    if (arm, task) not in intervals:
        return MISSING
    entry = intervals[arm, task]
    low, high = number(entry.low, sign=True), number(entry.high, sign=True)
    return f"{number(entry.mean, sign=True)} [{low}, {high}]"


def _tokens_text(results: Results, arm: str) -> str:
    cells = results.of(arm)
    share = summary.image_share(cells)
    text = _text(summary.prompt_tokens(cells), 0, missing=not cells)
    return text if share is None else f"{text} ({_percent(share)})"


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else factor * value


def _text(value: float | None, digits: int, missing: bool = False) -> str:
    if missing:
        return MISSING
    return NONE if value is None else number(value, digits)


def _percent(value: float | None, missing: bool = False) -> str:
    if missing:
        return MISSING
    return NONE if value is None else f"{number(100 * value, 0)} %"


def _published_row(results: Results, arm: str, tasks: Sequence[str]) -> list[str]:
    """Return the published number of each task as text, on the scale of the harness, 0 to 1."""
    model = results.plan.paper
    if model is None:
        return [NONE] * len(tasks)
    if model not in published.models():
        raise ArgumentError(
            f"paper: {model} in {results.folder / 'plan.yaml'} is not a model of the paper. "
            f"Known: {', '.join(published.models())}."
        )
    numbers = [published.published_result(task, arm, model) if task in results.tasks else None for task in tasks]
    return [NONE if entry is None else number(entry.value / 100) for entry in numbers]


def _score_notes(results: Results, pooled: bool = True, named: bool = False) -> list[str]:
    """Return notes on the metrics and the numbers of documents, and on differences between tasks in a mean."""
    metrics, counts = _tasks_by(results, "metric"), _tasks_by(results, "n")
    prefix = f"{results.plan.name}: " if named else ""
    documents = f"{_only(counts)} documents a task" if len(counts) == 1 else f"documents: {_with_tasks(counts)}"
    scored = _only(metrics) if len(metrics) == 1 else f"Metrics: {_with_tasks(metrics)}"
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


def _tasks_by(results: Results, name: str) -> dict[str, list[str]]:
    """Return the tasks by the value of a field of their cells."""
    tasks_by_value: dict[str, list[str]] = {}
    for task in results.tasks:
        values = sorted({getattr(cell, name) for cell in results.cells if cell.task == task})
        tasks_by_value.setdefault(" or ".join(map(str, values)), []).append(task)
    return tasks_by_value


def _only(values: Mapping[str, object]) -> str:
    """Return the only key of a mapping."""
    return next(iter(values))


def _with_tasks(values: Mapping[str, Sequence[str]]) -> str:
    """Return the values, each with its tasks in brackets."""
    return ", ".join(f"{value} ({', '.join(tasks)})" for value, tasks in values.items())


def _seed_notes(results: Results, named: bool = False) -> list[str]:
    prefix = f"{results.plan.name}: mean" if named else "Mean"
    seeds = ", ".join(map(str, results.plan.seeds))
    if len(results.plan.seeds) == 1:
        return [f"{'One' if not named else prefix[:-4] + 'one'} seed, {seeds}: no spread ({NONE})."]
    notes = [f"{prefix} ± standard deviation over seeds {seeds}."]
    seedless = [arm for arm in results.arms if results.seedless(arm)]
    fewer: dict[tuple[int, ...], list[str]] = {}
    for arm in results.arms:
        if arm in results.plan.seeds_of and arm not in seedless:
            fewer.setdefault(tuple(results.expected(arm)), []).append(arm)
    if seedless:
        notes.append(f"No seed changes {', '.join(seedless)}: one seed, no spread ({NONE}).")
    notes += [
        f"{', '.join(arms)}: seed{'s' if len(own) > 1 else ''} {', '.join(map(str, own))} alone."
        for own, arms in fewer.items()
    ]
    if any(len(results.of(arm, task)) < len(results.expected(arm)) for arm in results.arms for task in results.tasks):
        notes.append("Cells that the plan has and the folder lacks are missing, or counted in brackets.")
    if results.others:
        notes.append(f"Left out: {results.others} cells of the folder that are none of the plan's.")
    return notes


def _bootstrap_note(results: Results) -> str:
    note = (
        f"Difference to {results.baseline}: paired document by document and seed by seed, {100 * LEVEL:.0f} % interval "
        f"of a bootstrap over documents ({RESAMPLES:,} resamples)."
    )
    other = sorted({cell.task for cell in results.cells if abs(cell.score - fmean(cell.samples["scores"])) > 1e-6})
    if other:
        note += f" It is of the documents' scores; the score of {', '.join(other)} is not their mean."
    return note


def _memory_notes(results: Results) -> list[str]:
    devices, notes = set(results.devices()), []
    if "cpu" in devices:
        notes.append("Memory on a CPU: resident memory of the process, weights and libraries included.")
    if devices - {"cpu"}:
        notes.append("Memory on a GPU: what torch had allocated.")
    return [*notes, "GB: 1e9 bytes."]


def _hardware_notes(results: Results) -> list[str]:
    """Return notes on the hardware and the versions: all of them if cells differ, and the arms that each device ran."""
    notes = [f"{setup.machines(results)}; {setup.versions(results)}."]
    arms: dict[str, list[str]] = {}
    for arm in results.arms:
        if results.of(arm):
            arms.setdefault(" and ".join(results.devices(arm)), []).append(arm)
    if len(arms) > 1:
        listed = "; ".join(f"{devices}: {', '.join(names)}" for devices, names in arms.items())
        notes.append(f"Seconds and memory of different devices do not compare. {listed}.")
    return notes
