"""A self-contained HTML page of results, without scripts and without requests."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from typing import Final

from lmms_mtv.experiments.report import tables
from lmms_mtv.experiments.report.plots import Plot, plots
from lmms_mtv.experiments.report.plots.style import COLOURS, GRID, INK
from lmms_mtv.experiments.report.results import Results
from lmms_mtv.experiments.report.table import Table

# The colours of the series on a dark background: the same hues, lighter.
_DARK: Final = ("#4ba3e3", "#f28a4b", "#35c79a", "#e3a0c6", "#f0b93a", "#8fd0f5", "#a8a8a8")

_LONG: Final = ' class="long"'
_WORDS: Final = ' class="words"'
_LONGEST: Final = 44
"""The number of characters of a cell above which its text is broken into lines."""

_STYLE: Final = """
:root { color-scheme: light dark; --ink: #1a1a1a; --ground: #ffffff; --soft: #5a5a5a; --line: #d9d9d9;
  --shade: #00000059; LIGHT }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ececec; --ground: #16181b; --soft: #b4b4b4; --line: #3c4046; --shade: #ffffff59; DARK }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; background: var(--ground); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.3rem; margin-top: 2.5rem; } h3 { font-size: 1.1rem; }
/* A table that is wider than the screen has a shadow at the side to which it scrolls. */
.scroll { overflow-x: auto; background: linear-gradient(to right, var(--ground) 1.5rem, transparent) left / 3rem 100%,
  linear-gradient(to left, var(--ground) 1.5rem, transparent) right / 3rem 100%,
  linear-gradient(to right, var(--shade), transparent) left / 0.9rem 100%,
  linear-gradient(to left, var(--shade), transparent) right / 0.9rem 100%; background-repeat: no-repeat;
  background-attachment: local, local, scroll, scroll; }
.scroll:focus-visible, summary:focus-visible { outline: 2px solid var(--s0); outline-offset: 2px; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
td.long { text-align: left; white-space: normal; min-width: 18rem; overflow-wrap: anywhere; }
table.words th, table.words td { text-align: left; white-space: normal; min-width: 0; overflow-wrap: break-word; }
table.words tbody th { white-space: nowrap; }
thead th { vertical-align: bottom; white-space: normal; } th:first-child { text-align: left; }
p.notes, figcaption { color: var(--soft); font-size: 0.85rem; overflow-wrap: anywhere; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 2rem;
  align-items: start; }
figure { margin: 0; min-width: 0; } figure svg { width: 100%; max-width: 34rem; height: auto; display: block; }
summary { cursor: pointer; font-size: 0.85rem; padding: 0.4rem 0; }
""".strip()


def page(results: Sequence[Results]) -> str:
    """Return the page of one or several results folders: the tables, and each plot with a caption and a table."""
    title = results[0].title if len(results) == 1 else "Report"
    body = [f"<h1>{escape(title)}</h1>"]
    if len(results) > 1:
        body += ["<section>", "<h2>All results</h2>", _table(tables.scores(results)), "</section>"]
    for index, section in enumerate(results):
        heading = [f"<h2>{escape(section.title)}</h2>"] if len(results) > 1 else []
        level = 3 if heading else 2
        body += ["<section>", *heading]
        for table in tables.report(section):
            body += [f"<h{level}>{escape(table.title)}</h{level}>", _table(table)]
        figures = [_figure(plot, f"r{index}-{plot.name}") for plot in plots(section)]
        if figures:
            body += [f"<h{level}>Plots</h{level}>", '<div class="plots">', *figures, "</div>"]
        body.append("</section>")
    head = [
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        # This policy makes the browser refuse every request of the page.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        'img-src data:">',
        f"<title>{escape(title)}</title>",
        f"<style>\n{_style()}\n</style>",
    ]
    parts = ["<!doctype html>", '<html lang="en">', "<head>", *head, "</head>", "<body>", "<main>", *body]
    return "\n".join([*parts, "</main>", "</body>", "</html>"]) + "\n"


def _style() -> str:
    """Return the style sheet with the colours of the series for light and dark backgrounds."""
    light, dark = (" ".join(f"--s{i}: {colour};" for i, colour in enumerate(palette)) for palette in (COLOURS, _DARK))
    return _STYLE.replace("LIGHT", light).replace("DARK", dark)


def _table(table: Table) -> str:
    """Return the table in a container that scrolls, followed by the notes."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.header)
    rows = "\n".join(
        "<tr>"
        + f'<th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td{_LONG if len(cell) > _LONGEST else ''}>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in table.rows
    )
    notes = f'\n<p class="notes">{escape(" ".join(table.notes))}</p>' if table.notes else ""
    aligned = _WORDS if table.words else ""
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(table.title)}">\n<table{aligned}>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>\n</div>{notes}"
    )


def _figure(plot: Plot, prefix: str) -> str:
    """Return the plot with its caption and, folded away, the table of its data."""
    caption = f"<strong>{escape(plot.title)}.</strong> {escape(plot.caption)}"
    return (
        f"<figure>\n{_inline(plot, prefix)}\n<figcaption>{caption}</figcaption>\n"
        f"<details>\n<summary>The figures as a table</summary>\n{_table(plot.table)}\n</details>\n</figure>"
    )


def _inline(plot: Plot, prefix: str) -> str:
    """Return the SVG of the plot as an element of the page.

    The ids start with ``prefix``, and the colours follow the style sheet of the page.
    """
    svg = plot.svg()
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    svg = svg.replace(INK, "var(--ink)").replace(GRID, "var(--line)")
    for index, colour in enumerate(COLOURS):
        svg = svg.replace(colour, f"var(--s{index})")
    label = escape(f"{plot.title}. {plot.alternative}")
    return re.sub(r"^<svg", f'<svg role="img" aria-label="{label}"', svg, count=1)
