"""Reports of results: figures against independent ones, text, pictures and the page."""

from __future__ import annotations

import dataclasses
import re
import shutil
import statistics
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from PIL import Image

from lmms_mtv import cli
from lmms_mtv.errors import ArgumentError, DataError, ResultsError
from lmms_mtv.experiments import cell as cells
from lmms_mtv.experiments.report import bootstrap, marks, results, summary, tables
from lmms_mtv.experiments.report.page import page
from lmms_mtv.experiments.report.plots import line, plots
from support import grids, matrix, processes

SMALL = {"tasks": ["a_en", "b_en"], "arms": {name: grids.ARMS[name] for name in ("zero-shot", "2-shot", "MTV")}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return grids.write(tmp_path_factory.mktemp("results") / "grid", grids.plan(**SMALL))


@pytest.fixture(scope="module")
def found(folder):
    return results.read(folder)


@pytest.fixture(scope="module")
def drawn(found):
    return plots(found)


@pytest.fixture(scope="module")
def html(found):
    return page([found])


def scores(found, arm, task):
    return {cell.seed: cell.score for cell in found.cells if (cell.arm, cell.task) == (arm, task)}


def test_means_and_spreads(found):
    for arm in found.arms:
        for task in found.tasks:
            values = list(scores(found, arm, task).values())
            mean = summary.score(found, arm, task)
            assert mean.value == pytest.approx(sum(values) / len(values))
            assert len(values) == (1 if arm == "zero-shot" else 3)
            assert mean.spread == (None if len(values) == 1 else pytest.approx(np.std(values, ddof=1)))
    by_seed = [(scores(found, "MTV", "a_en")[seed] + scores(found, "MTV", "b_en")[seed]) / 2 for seed in range(3)]
    mean = summary.mean_score(found, "MTV")
    assert mean.value == pytest.approx(statistics.mean(by_seed))
    assert mean.spread == pytest.approx(statistics.stdev(by_seed))


def test_the_bootstrap_agrees_with_another_one_and_with_theory(found):
    differences = bootstrap.differences(found)
    random = np.random.default_rng(1)
    tasks = {}
    for task in found.tasks:
        (base,) = (cell for cell in found.cells if (cell.arm, cell.task) == ("zero-shot", task))
        rows = [cell.samples["scores"] for cell in found.cells if (cell.arm, cell.task) == ("MTV", task)]
        tasks[task] = np.mean(rows, axis=0) - np.array(base.samples["scores"])
    for task, values in [*tasks.items(), (None, None)]:
        parts = [values] if task else list(tasks.values())
        drawn = np.mean([random.choice(part, (10_000, len(part))).mean(axis=1) for part in parts], axis=0)
        difference = differences["MTV", task]
        assert difference.mean == pytest.approx(np.mean([part.mean() for part in parts]))
        assert difference.low == pytest.approx(np.quantile(drawn, 0.025), abs=0.01)
        assert difference.high == pytest.approx(np.quantile(drawn, 0.975), abs=0.01)
        error = np.sqrt(sum(part.var() / len(part) for part in parts)) / len(parts)
        assert difference.high - difference.low == pytest.approx(2 * 1.96 * error, rel=0.08)
    assert differences == bootstrap.differences(found)
    assert differences != bootstrap.differences(found, seed=1)


def test_the_same_difference_in_every_seed_is_no_more_evidence(tmp_path):
    """Seeds share documents: five copies of one seed give the interval of one."""
    arms = {"zero-shot": {"method": "none"}, "MTV": {"method": "mtv"}}

    def copied(key, cell):
        first = grids.cell(planned, key._replace(seed=0))
        return dataclasses.replace(first, seed=key.seed)

    widths = []
    for name, seeds in (("one", [0]), ("five", [0, 1, 2, 3, 4])):
        planned = grids.plan(tasks=["a_en"], arms=arms, seeds=seeds)
        found = results.read(grids.write(tmp_path / name, planned, copied))
        widths.append(bootstrap.differences(found)["MTV", "a_en"])
    assert widths[0] == widths[1]


def test_pairs_need_the_same_documents(tmp_path):
    def other(key, cell):
        if key.arm != "MTV" or key.task != "a_en":
            return cell
        return dataclasses.replace(cell, samples={**cell.samples, "documents": [100 + i for i in range(cell.n)]})

    folder = grids.write(tmp_path / "grid", grids.plan(**SMALL), other)
    with pytest.raises(ResultsError, match="do not belong in one table"):
        results.read(folder)
    found = results.Results(folder, grids.plan(**SMALL), cells.read_all(folder), 0)
    differences = bootstrap.differences(found)
    assert ("MTV", "b_en") in differences
    assert ("MTV", "a_en") not in differences
    assert ("MTV", None) not in differences
    (row,) = (row for row in tables.compared(found, differences).rows if row[0] == "MTV")
    assert row[1] == row[3] == "missing"


def test_the_order_of_documents_does_not_matter(tmp_path, found):
    def turned(key, cell):
        if key.arm != "MTV":
            return cell
        return dataclasses.replace(cell, samples={key: list(value)[::-1] for key, value in cell.samples.items()})

    other = results.read(grids.write(tmp_path / "grid", grids.plan(**SMALL), turned))
    assert bootstrap.differences(other) == bootstrap.differences(found)


GOLDEN = """\
| arm | mean of 2 tasks | worst task | difference to zero-shot [95 %] | tokens per prompt | fit, s |
|---|---|---|---|---|---|
| zero-shot | 0.250 ± - | 0.000 | - | 13 (31 %) | - |
| MTV | 0.750 ± 0.354 | 0.500 | +0.500 [+0.500, +0.500] | 13 (31 %) | 5.0 |

exact_match; 2 documents a task. Mean ± standard deviation over seeds 0, 1. No seed changes zero-shot: one seed, no \
spread (-). Difference to zero-shot: paired document by document and seed by seed, 95 % interval of a bootstrap over \
documents (10,000 resamples). Tokens: mean of a prompt, in brackets the share of image tokens. x86_64, 2 cores, cpu, \
1 process; lmms-eval 0.7.3, lmms-mtv 0.1.0, torch 2.15.0, transformers 5.23.0."""

GOLDEN_TASKS = """\
| task | zero-shot | MTV |
|---|---|---|
| a_en | 0.000 ± - | 0.500 ± 0.707 |
| b_en | 0.500 ± - | 1.000 ± 0.000 |

exact_match; 2 documents a task. Mean ± standard deviation over seeds 0, 1. No seed changes zero-shot: one seed, no \
spread (-)."""


@pytest.fixture
def plain(tmp_path):
    """Two tasks, two documents, whose differences are the same for every document."""
    arms = {name: grids.ARMS[name] for name in ("zero-shot", "MTV")}
    right = {("a_en", "zero-shot", 0): 0.0, ("b_en", "zero-shot", 0): 0.5, ("a_en", "MTV", 0): 0.0}
    right |= {("a_en", "MTV", 1): 1.0, ("b_en", "MTV", 0): 1.0, ("b_en", "MTV", 1): 1.0}

    def set_scores(key, cell):
        value = right[key]
        seconds = {"fit": 5.0 if cell.vector else None, "evaluation": 1.0}
        samples = {**cell.samples, "scores": [value] * 2}
        return dataclasses.replace(cell, score=value, samples=samples, seconds=seconds)

    planned = grids.plan(tasks=["a_en", "b_en"], arms=arms, seeds=[0, 1])
    return grids.write(tmp_path / "plain", planned, set_scores, n=2)


def test_golden_markdown(plain, tmp_path, capsys):
    text = (
        "# Read\n\n<!-- lmms-mtv report plain -->\n<!-- /lmms-mtv report -->\n\n<!-- lmms-mtv report plain tasks -->\n"
    )
    text += "old\n<!-- /lmms-mtv report -->\n<!-- lmms-mtv report elsewhere -->\nkept\n<!-- /lmms-mtv report -->\n"
    path = tmp_path / "README.md"
    path.write_text(text, encoding="utf-8")
    cli.main(["report", str(plain), "--insert", str(path)])
    once = path.read_text(encoding="utf-8")
    assert once == (
        f"# Read\n\n<!-- lmms-mtv report plain -->\n{GOLDEN}\n<!-- /lmms-mtv report -->\n\n"
        f"<!-- lmms-mtv report plain tasks -->\n{GOLDEN_TASKS}\n<!-- /lmms-mtv report -->\n"
        "<!-- lmms-mtv report elsewhere -->\nkept\n<!-- /lmms-mtv report -->\n"
    )
    assert marks.inserted(once, tmp_path, [results.read(plain)]) == once
    capsys.readouterr()
    cli.main(["report", str(plain)])
    assert GOLDEN in capsys.readouterr().out


def test_marks_that_cannot_be_filled(plain, tmp_path):
    found = [results.read(plain)]
    with pytest.raises(DataError, match="has no end"):
        marks.inserted("<!-- lmms-mtv report plain -->\n", tmp_path, found)
    with pytest.raises(DataError, match="has no end"):
        marks.inserted("<!-- lmms-mtv report plain -->\n" * 2 + "<!-- /lmms-mtv report -->", tmp_path, found)
    with pytest.raises(ArgumentError, match="summary, tasks"):
        marks.inserted("<!-- lmms-mtv report plain task -->\n<!-- /lmms-mtv report -->", tmp_path, found)
    path = tmp_path / "other.md"
    path.write_text("nothing")
    with pytest.raises(SystemExit, match="has no mark"):
        cli.main(["report", str(plain), "--insert", str(path)])
    with pytest.raises(SystemExit, match="no plan at"):
        cli.main(["report", str(tmp_path / "nowhere")])


def test_missing_cells_are_said(tmp_path):
    def without(key, cell):
        gone = key in {("a_en", "MTV", 1)} or (key.task, key.arm) == ("b_en", "2-shot")
        return None if gone else cell

    found = results.read(grids.write(tmp_path / "grid", grids.plan(**SMALL), without))
    table = {row[0]: row for row in tables.scores([found]).rows}
    assert table["MTV"][1].endswith("(2 of 3 seeds)")
    assert table["MTV"][3].endswith("(2 of 3 seeds)")
    assert table["2-shot"][2] == table["2-shot"][3] == "missing"
    assert "the folder lacks are missing" in tables.scores([found]).markdown()


def test_cells_of_another_plan_are_left_out_and_counted(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "grid")
    grids.plan(**SMALL | {"seeds": [0, 1]}).write(tmp_path / "grid")
    found = results.read(tmp_path / "grid")
    assert {cell.seed for cell in found.cells} == {0, 1}
    assert "Left out: 4 cells" in tables.scores([found]).markdown()


def test_what_a_mean_over_tasks_mixes_is_said(tmp_path):
    def changed(change):
        def of(key, cell):
            return dataclasses.replace(cell, **change) if key.task == "b_en" else cell

        path = grids.write(tmp_path / "-".join(change), grids.plan(**SMALL), of)
        return tables.overview(results.read(path))

    assert "over different metrics" in changed({"metric": "f1"}).markdown()
    assert "every task once" in changed({"n": 17}).markdown()
    lower = changed({"higher_is_better": False})
    assert "No mean over tasks" in lower.markdown()
    assert all(row[1] == "-" for row in lower.rows)
    assert "is not their mean" in changed({"score": 0.123}).markdown()


def test_the_papers_number_stands_under_its_arm(tmp_path):
    planned = grids.plan(**SMALL | {"tasks": ["vizwiz", "a_en"], "paper": "Idefics2-8B"})
    found = results.read(grids.write(tmp_path / "grid", planned))
    rows = [list(row) for row in tables.scores([found]).rows]
    names = [row[0] for row in rows]
    assert names == ["zero-shot", "zero-shot, reported", "2-shot", "MTV", "MTV, reported"]
    assert rows[-1][1:] == ["0.525", "-", "-"]
    assert "arXiv 2406.15334" in tables.scores([found]).markdown()
    wrong = results.read(grids.write(tmp_path / "wrong", grids.plan(**SMALL | {"paper": "Idefics9"})))
    with pytest.raises(ArgumentError, match="Idefics2-8B"):
        tables.scores([wrong])


def test_several_folders_stand_in_one_table(found, plain):
    table = tables.scores([found, results.read(plain)])
    assert list(table.header) == ["results", "arm", "a_en", "b_en"]
    assert len(table.rows) == 5


def test_tokens_that_cannot_be_told_apart_and_costs(tmp_path):
    def unknown(key, cell):
        tokens = {"prompt": 13.0, "image": None, "text": None}
        return dataclasses.replace(cell, tokens=tokens, memory={"fit": None, "evaluation": None})

    found = results.read(grids.write(tmp_path / "grid", grids.plan(**SMALL), unknown))
    assert tables.costs(found).rows[0][1:4] == ["13.0", "-", "-"]
    assert not {"tokens", "memory"} & {plot.name for plot in plots(found)}


@pytest.mark.slow
def test_plots_are_files_and_leave_matplotlib_alone(found, drawn, tmp_path):
    assert [plot.name for plot in drawn] == ["score", "runtime", "memory", "tokens", "heads", "loss"]
    before = dict(matplotlib.rcParams)
    for plot in drawn:
        png, svg = plot.save(tmp_path)
        with Image.open(png) as image:
            assert image.width > 600
            assert len(image.convert("RGB").getcolors(1 << 20)) > 20
        assert ElementTree.parse(svg).getroot().tag.endswith("svg")
        assert plot.svg() == plot.svg()
        assert plot.table.rows
        for axes in plot.figure.axes:
            if axes.get_label() != "<colorbar>":
                assert axes.get_title()
    assert [plot.svg() for plot in plots(found)] == [plot.svg() for plot in drawn]
    assert dict(matplotlib.rcParams) == before
    for plot in drawn[:4]:
        (axes,) = plot.figure.axes
        assert axes.get_xlabel()
        assert axes.get_ylabel()


def test_a_head_map_says_probability_and_choice(found, drawn):
    (plot,) = (plot for plot in drawn if plot.name == "heads")
    vectors = [cell.vector for cell in found.cells if (cell.arm, cell.task) == ("MTV", "a_en")]
    (row,) = (row for row in plot.table.rows if row[:2] == ["a_en", "2"])
    mean = np.mean([vector["probabilities"][2 * 8 + 5] for vector in vectors])
    chosen = sum([2, 5] in vector["heads"] for vector in vectors)
    assert row[2 + 5] == f"{mean:.2f} ({chosen}/3)"


def test_a_plan_says_what_a_curve_is_against(tmp_path):
    arms = {f"MTV {n}": {"method": "mtv", "iterations": n} for n in (1, 10, 100)}
    axis = {"axis": "prompts averaged", "values": {f"MTV {n}": n for n in (1, 10, 100)}}
    plain = grids.plan(tasks=["a_en"], arms={"zero-shot": {"method": "none"}, **arms})
    path = grids.write(tmp_path / "grid", plain)
    text = (path / "plan.yaml").read_text() + f"x: {axis}\n"
    (path / "plan.yaml").write_text(text)
    (plot, *_) = plots(results.read(path))
    (axes,) = plot.figure.axes
    assert axes.get_xscale() == "log"
    assert axes.get_xlabel() == "prompts averaged"
    assert [row[2] for row in plot.table.rows] == ["1", "10", "100", "-"]


def test_positions_are_whole_numbers_and_bands_stay_within_the_metric(tmp_path):
    """A fit of one task may use other examples than a fit of another; and no share is below 0 or above 1."""

    def uneven(key, cell):
        if cell.vector is None:
            return cell
        used = 336 if key.task == "a_en" else 337
        return dataclasses.replace(cell, vector={**cell.vector, "used": used})

    arms = {name: grids.ARMS[name] for name in ("zero-shot", "1-shot", "2-shot", "8-shot", "MTV", "random heads")}
    found = results.read(grids.write(tmp_path / "grid", grids.plan(tasks=["a_en", "b_en"], arms=arms), uneven))
    (plot,) = (plot for plot in plots(found) if plot.name == "score")
    assert {row[2] for row in plot.table.rows} == {"1", "2", "8", "336", "-"}
    (axes,) = plot.figure.axes
    mean = summary.Mean(0.95, 0.2, 3, 3)
    points = [line.Point(x, dataclasses.replace(mean, value=y), "arm") for x, y in ((0.0, 0.95), (1.0, 0.05))]
    axes.clear()
    line.draw(axes, {"line": points, "alone": points[:1]}, (0.0, 1.0))
    band, bar = (collection.get_paths() for collection in axes.collections)
    for path in (*band, *bar):
        assert path.vertices[:, 1].min() >= 0
        assert path.vertices[:, 1].max() == 1


@pytest.mark.parametrize("count", matrix.members([2, 24], 2))
def test_axes_keep_their_height_above_a_legend_of_any_length(count):
    """The legend stands below the axes, inside the figure."""
    arms = {f"MTV, {number} examples": {"method": "mtv"} for number in range(count)}
    planned = grids.plan(tasks=["a_en"], seeds=[0], arms={"4-shot": {"method": "none", "shots": 4}, **arms})
    stored = []
    for key in planned.cell_keys():
        cell = grids.cell(planned, key)
        own = cell.vector and {**cell.vector, "id": key.arm}
        stored.append(dataclasses.replace(cell, vector=own))
    with_legend = {
        plot.name: plot.figure for plot in plots(results.Results(Path(), planned, stored)) if plot.figure.legends
    }
    assert with_legend.keys() == {"score", "runtime", "memory", "tokens", "loss"}
    for name, figure in with_legend.items():
        axes, legend = figure.axes[0], figure.legends[0].get_window_extent()
        assert axes.get_position().height * figure.get_figheight() > (0.7 if name in ("loss", "tokens") else 1.8), name
        assert figure.bbox.y0 <= legend.y0 < legend.y1 <= axes.get_tightbbox().y0, name
        assert figure.bbox.x0 <= legend.x0 < legend.x1 <= figure.bbox.x1, name


class Parsed(HTMLParser):
    VOID = frozenset({"meta", "br", "hr", "img", "link", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None], tuple[str, ...]]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs), tuple(self.open)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs), tuple(self.open)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag


def test_the_page_is_whole_and_asks_for_nothing(html, drawn):
    parsed = Parsed(html)
    assert parsed.open == []
    ids = [attrs["id"] for _, attrs, _ in parsed.tags if "id" in attrs]
    assert len(ids) == len(set(ids)) > 100
    for tag, attrs, _ in parsed.tags:
        assert tag not in {"script", "link", "iframe", "img", "object"}
        for name in ("src", "href", "xlink:href"):
            value = attrs.get(name)
            assert value is None or value.startswith("data:image/png;base64,") or value[1:] in ids, value[:60]
    used = re.findall(r"url\(([^)]*)\)", html)
    assert used
    assert all(target[1:] in ids for target in used)
    assert "@import" not in html
    assert "://" not in html
    assert any(attrs.get("name") == "viewport" for tag, attrs, _ in parsed.tags if tag == "meta")
    figures = [index for index, (tag, _, _) in enumerate(parsed.tags) if tag == "figure"]
    assert len(figures) == len(drawn)
    for begin, end in zip(figures, [*figures[1:], len(parsed.tags)], strict=True):
        inside = parsed.tags[begin:end]
        (svg,) = (attrs for tag, attrs, _ in inside if tag == "svg")
        assert svg["role"] == "img"
        assert re.search(r"\d", svg["aria-label"])
        assert sum(tag == "figcaption" for tag, _, _ in inside) == 1
        assert any(tag == "table" and "details" in path for tag, _, path in inside)
    for tag, _, path in parsed.tags:
        assert tag != "table" or path[-1] == "div"


def test_names_are_text_in_the_page(tmp_path):
    arms = {"zero-shot": {"method": "none"}, "<b>&|": {"method": "mtv"}}
    found = results.read(grids.write(tmp_path / "grid", grids.plan(tasks=["a_en"], arms=arms)))
    text = page([found])
    assert Parsed(text).open == []
    assert "<b>" not in text
    assert "&lt;b&gt;&amp;|" in text
    assert "<b>&\\|" in tables.scores([found]).markdown()


@pytest.mark.slow
def test_the_command_writes_what_it_is_asked_for(folder, tmp_path, capsys):
    html, markdown = tmp_path / "new" / "page.html", tmp_path / "report.md"
    cli.main(["report", str(folder), "--html", str(html), "--markdown", str(markdown), "--plots", str(tmp_path / "p")])
    assert html.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert markdown.read_text(encoding="utf-8").startswith("# grid")
    assert len(list((tmp_path / "p").iterdir())) == 12
    assert str(html) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--html", "FILE/x.html"], "the report cannot be written to .*x.html .*: choose another --html"),
        (["--html", "."], "the report cannot be written to .* .a folder of this name exists.: choose another --html"),
        (["--markdown", "FILE/x.md"], "the report cannot be written to .*x.md .*: choose another --markdown"),
        (["--plots", "FILE"], "plots cannot be written to .*FILE .*: choose another --plots"),
        (["--insert", "none.md"], "there is no file .*none.md with marks: choose another --insert"),
    ],
)
def test_a_place_that_takes_no_file_is_told_before_anything_is_written(folder, tmp_path, flags, said):
    (tmp_path / "FILE").write_text("")
    option, place = flags
    with pytest.raises(SystemExit, match=rf"^lmms-mtv: ArgumentError: {said}$"):
        cli.main(["report", str(folder), "--markdown", str(tmp_path / "report.md"), option, str(tmp_path / place)])
    assert [path.name for path in tmp_path.iterdir()] == ["FILE"]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no Chromium on this machine")
def test_a_browser_opens_the_page_without_complaint(html, tmp_path: Path):
    path = tmp_path / "page.html"
    path.write_text(html, encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}"]
    flags += ["--enable-logging=stderr", "--dump-dom"]
    done = processes.run(["chromium", *flags, path.as_uri()], timeout=120)
    assert done.stdout.count("<figure>") == 6
    assert "CONSOLE" not in done.stderr


def test_the_report_says_what_was_run_and_how_the_arms_differ(tmp_path):
    """Model, data and versions; of each arm the settings that are not the defaults, and what differs between tasks."""
    arms = {"zero-shot": {"method": "none"}, "long": {"method": "mtv", "steps": 60, "shots": 1, "wrong": 0.25}}

    def with_settings(key, cell):
        settings = {"iterations": 100, "steps": 60, "lr": 0.1 if key.task == "a_en" else 0.2, "heads": None}
        return dataclasses.replace(cell, settings=settings) if cell.vector else cell

    planned = grids.plan(tasks=["a_en", "b_en"], arms=arms, seeds=[0, 1])
    found = results.read(grids.write(tmp_path / "grid", planned, with_settings))
    for text in (tables.markdown([found]), page([found])):
        for said in ("tiny, revision sha256:0, float32", "a_en, b_en: 40 documents", "lmms-eval 0.7.3", "0, 1"):
            assert said in text, said
    table = tables.report(found)[-1]
    # The cells are of a version without settle=, and of the fits that this version makes with None.
    settings = "steps=60, settle=None, wrong=0.25, lr=0.2"
    assert table.rows == [["zero-shot", "none", "0", "-"], ["long", "mtv", "1", settings]]


def test_legends_have_the_names_of_the_tables(tmp_path):
    arms = {"zero-shot": {"method": "none"}, "4-shot": {"method": "none", "shots": 4}}
    arms |= {"MTV, mine": {"method": "mtv"}, "MTV, mine + 1-shot": {"method": "mtv", "shots": 1}}
    arms |= {"function vector": {"method": "function_vector"}}
    found = results.read(grids.write(tmp_path / "grid", grids.plan(tasks=["a_en"], arms=arms, seeds=[0])))
    drawn = {plot.name: plot.figure for plot in plots(found)}
    for name in ("score", "runtime", "memory"):
        (legend,) = drawn[name].legends
        shown = {text.get_text() for text in legend.get_texts()}
        assert shown <= {"in the prompt", *arms}, name
        assert {"MTV, mine", "function vector"} <= shown, name


def test_a_map_of_heads_drawn_at_random_has_the_colours_of_the_draw(tmp_path):
    """MTV's probabilities say nothing of them."""
    arms = {"random heads": {"method": "random"}, "MTV": {"method": "mtv"}}

    def apart(key, cell):
        policy = np.random.default_rng(key.seed).random(32).tolist()
        return dataclasses.replace(cell, vector={**cell.vector, "id": key.arm, "probabilities": policy})

    found = results.read(grids.write(tmp_path / "grid", grids.plan(tasks=["a_en"], arms=arms), apart))
    drawn = {plot.title.split(", ", 1)[1]: plot for plot in plots(found) if plot.name.startswith("heads")}
    for arm, plot in drawn.items():
        (image,) = plot.figure.axes[0].get_images()
        vectors = [cell.vector for cell in found.of(arm)]
        mean = np.mean([vector["probabilities"] for vector in vectors], axis=0).reshape(4, 8)
        share = np.zeros((4, 8))
        for vector in vectors:
            for head in vector["heads"]:
                share[tuple(head)] += 1 / len(vectors)
        shown = share if arm == "random heads" else mean
        np.testing.assert_allclose(image.get_array(), shown)
        figures = [[float(text.split()[0]) for text in row[2:]] for row in plot.table.rows]
        np.testing.assert_allclose(figures, shown, atol=0.0051)
        assert ("drew it / seeds" in plot.table.title) == (arm == "random heads")
    assert "drew the head at random" in drawn["random heads"].caption
    assert "after REINFORCE" in drawn["MTV"].caption


@pytest.mark.parametrize("dpi", [72, 200])
def test_nothing_leaves_the_figure_at_any_resolution(drawn, dpi):
    """The layout is made once, for all files."""
    for plot in drawn:
        plot.figure.set_dpi(dpi)
        plot.figure.draw_without_rendering()
        for axes in plot.figure.axes:
            box, figure = axes.get_tightbbox(), plot.figure.bbox
            assert figure.x0 - 0.5 <= box.x0 < box.x1 <= figure.x1 + 0.5, plot.name
            assert figure.y0 - 0.5 <= box.y0 < box.y1 <= figure.y1 + 0.5, plot.name
        plot.figure.set_dpi(100)


def test_costs_far_apart_have_a_logarithmic_axis(tmp_path):
    def slow(key, cell):
        return dataclasses.replace(cell, seconds={**cell.seconds, "evaluation": 500.0}) if cell.shots == 2 else cell

    (plot,) = (
        p for p in plots(results.read(grids.write(tmp_path / "g", grids.plan(**SMALL), slow))) if p.name == "runtime"
    )
    assert plot.figure.axes[0].get_yscale() == "log"


def test_wide_tables_show_that_they_scroll(html):
    """By shadows at the sides that stay where they are, under covers that scroll with the table."""
    assert "background-attachment: local, local, scroll, scroll" in html
    assert html.count('class="scroll"') == html.count("<table")


def test_costs_of_different_devices_are_kept_apart(tmp_path, found):
    def moved(key, cell):
        device = "NVIDIA H200" if key.arm == "MTV" else cell.hardware["device"]
        return dataclasses.replace(cell, hardware={**cell.hardware, "device": device})

    mixed = results.read(grids.write(tmp_path / "grid", grids.plan(**SMALL), moved))
    warning = "Seconds and memory of different devices do not compare. cpu: zero-shot, 2-shot; NVIDIA H200: MTV."
    for made, told in ((mixed, True), (found, False)):
        for table in (tables.overview(made), tables.costs(made)):
            assert (warning in table.notes) == told
        (costs,) = (plot for plot in plots(made) if plot.name == "runtime")
        lines = {row[0] for row in costs.table.rows}
        assert lines == ({"in the prompt (cpu)", "MTV (NVIDIA H200)"} if told else {"in the prompt", "MTV"})
