"""The plot of the shares of image tokens and text tokens in the prompts of each arm."""

from __future__ import annotations

from lmms_mtv.experiments.report import summary
from lmms_mtv.experiments.report.plots import layout
from lmms_mtv.experiments.report.plots.plot import Plot
from lmms_mtv.experiments.report.plots.style import COLOURS
from lmms_mtv.experiments.report.results import Results
from lmms_mtv.experiments.report.summary import MISSING, number
from lmms_mtv.experiments.report.table import Table


def tokens(results: Results) -> Plot | None:
    """Return the plot of the shares of image and text tokens of each arm, or None without image tokens."""
    shares = {arm: share for arm in results.arms if (share := summary.image_share(results.of(arm))) is not None}
    if not shares or not any(shares.values()):
        return None
    lengths = {arm: summary.prompt_tokens(results.of(arm)) for arm in shares}
    figure, axes = layout.single("Share of image tokens", height=1.0 + 0.32 * len(shares))
    bars = range(len(shares))
    image = [100 * share for share in shares.values()]
    text = [100 - share for share in image]
    axes.barh(bars, image, color=COLOURS[0], label="image", height=0.7)
    axes.barh(bars, text, left=image, color="none", edgecolor=COLOURS[4], hatch="///", label="text", height=0.7)
    labels = [f"{arm}\n({_rounded(lengths[arm], 0)} tokens)" for arm in shares]
    axes.set_yticks(list(bars), labels, fontsize=7.5)
    axes.set_ylim(len(shares) - 0.4, -0.6)
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of the tokens of a prompt, %")
    axes.set_ylabel("arm")
    axes.grid(False, axis="y")
    layout.legend(figure, axes)
    rows = [[arm, _rounded(lengths[arm], 1), _rounded(100 * share, 1)] for arm, share in shares.items()]
    words = "; ".join(f"{arm} {share} % of {length}" for arm, length, share in rows)
    return Plot(
        "tokens",
        "Share of image tokens",
        "Share of image tokens among the tokens of a prompt, over all tasks and seeds; in brackets the mean length.",
        f"Stacked bars. Image tokens: {words} tokens.",
        Table("Share of image tokens", ["arm", "tokens per prompt", "image tokens, %"], rows),
        figure,
    )


def _rounded(value: float | None, digits: int) -> str:
    return MISSING if value is None else number(value, digits)
