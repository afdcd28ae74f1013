"""The figures of eval/report.py: accuracy on the line, drops of single classes, curves between two sets of weights.

Each function draws one figure from shares in [0, 1], writes it as PNG and SVG, and returns the SVG for a page. Colours
are those of Okabe and Ito (2008, Color universal design), which people with colour blindness tell apart; models differ
in the shape of their marks too. Texts that a user chose (names of models and classes) are drawn as they are, never as
mathematics, with what cannot be printed replaced.
"""

from __future__ import annotations

import base64
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

from data.shifts import Suite
from eval.robustness import Baseline, Tally, fit_line, wilson

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = NDArray[np.float64]
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKS = ("o", "s", "^", "D", "v", "P", "X")
TICKS = (0.2, 0.5, 1, 2, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 98, 99, 99.5, 99.8)  # percent
EDGE = 0.001  # shares nearer to 0 or 1 than this are drawn here: the logit scale has no end
RESAMPLES = 400  # of the models behind a line, for its band
# Text as outlines looks the same wherever the page is opened; the salt makes a second drawing equal to the first.
STYLE: dict[Any, Any] = {
    "svg.fonttype": "path",
    "svg.hashsalt": "shiftlens",
    "figure.constrained_layout.h_pad": 0.1,
    "font.size": 9,
    "axes.titlesize": 10,
}
STYLE |= {"text.parse_math": False}  # a name with two dollars is a name


@dataclass(frozen=True)
class Picture:
    """A figure that lies in a folder as NAME.png and NAME.svg.

    uri: the SVG as a data: URI. text: what there is to see, for those who do not. width: as drawn, in CSS pixels.
    """

    name: str
    uri: str
    text: str
    width: int


@dataclass(frozen=True)
class Anchors:
    """Published models to compare with, [M]: names, and accuracies by set in [0, 1], float64 [M], NaN where unknown."""

    title: str
    names: tuple[str, ...]
    accuracy: Mapping[str, Array]


@dataclass(frozen=True)
class Drop:
    """A class in distribution and under shift."""

    name: str
    before: Tally
    after: Tally

    @property
    def points(self) -> float:
        """Accuracy lost, in [-1, 1]."""
        return self.before.accuracy - self.after.accuracy


def printable(text: str, longest: int = 0) -> str:
    """The text with U+FFFD for control characters and lone surrogates; the middle cut out beyond `longest` characters.

    longest: 0 = any length.
    """
    text = "".join(character if character.isprintable() else "\ufffd" for character in text)
    if not longest or len(text) <= longest:
        return text
    return f"{text[: longest - longest // 2 - 1]}\u2026{text[-(longest // 2) :]}"


# ---------------------------------------------------------------------------------------------------------------------
# Accuracy on the line
# ---------------------------------------------------------------------------------------------------------------------


def draw_line(
    scores: Mapping[str, Mapping[str, Tally]],
    suite: Suite,
    lines: Mapping[str, Baseline],
    others: Mapping[str, Array],
    anchors: Sequence[Anchors],
    out: Path,
) -> Picture:
    """Accuracy under each shift over accuracy in distribution, both on the logit scale; bars are Wilson's, of 95 %.

    scores: by model and set; a model without one of a panel's two sets is left out of the panel. lines: by shift, none
    where no models are published, and y = x is drawn. others: accuracies of further published models, as in `Anchors`.
    """
    with _drawing():
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(2, 3, figsize=(10.5, 7.6), layout="constrained")
        *panels, last = axes.flat  # suites have five shifts; the sixth place is the legend's
        last.set_axis_off()
        keys: dict[str, Any] = {}
        for panel, name in zip(panels, suite.shifts, strict=True):
            keys |= _panel(panel, name, scores, suite, lines, others, anchors)
        if len(keys) > 12:
            _legend(figure, keys, loc="outside lower center", ncols=3)
        else:
            _legend(last, keys, loc="center")
        drawn = ", ".join(printable(model) for model in scores)
        text = f"Scatter plots, one for each shift: accuracy under shift over accuracy in distribution of {drawn}."
        return _save(figure, out, f"{suite.name}_line", text)


def _panel(
    panel: Axes,
    name: str,
    scores: Mapping[str, Mapping[str, Tally]],
    suite: Suite,
    lines: Mapping[str, Baseline],
    others: Mapping[str, Array],
    anchors: Sequence[Anchors],
) -> dict[str, Any]:
    """Draws a panel and returns its marks by the text that explains them."""
    base, line = suite.in_distribution, lines.get(name)
    keys: dict[str, Any] = {}
    both = {model: (of[base], of[name]) for model, of in scores.items() if base in of and name in of}
    x = [_inside(own.accuracy) for own, _ in both.values()]
    y = [_inside(shifted.accuracy) for _, shifted in both.values()]
    # Further models may lie far from all that matters here, and are cut off where they do.
    published = [] if line is None else [(line.accuracy_id, line.accuracy_ood)]
    published += [(group.accuracy[base], group.accuracy[name]) for group in anchors]
    for tallies in both.values():
        for shares, tally in zip((x, y), tallies, strict=True):
            shares += [_inside(share) for share in wilson(tally.correct, tally.n)]
    for shares, values in ((x, 0), (y, 1)):
        for pair in published:
            shares += [_inside(share) for share in pair[values] if 0 < share < 1]
    if not x or not y:
        panel.text(0.5, 0.5, "not scored", ha="center", va="center", transform=panel.transAxes)
        panel.set(title=suite.sets[name].title, xticks=[], yticks=[])
        return keys
    x_limits, y_limits = _limits(x), _limits(y)
    if line is None:  # both on one scale, so that y = x is the diagonal
        x_limits = y_limits = _limits(x + y)
    if others:
        keys["published, other training"] = panel.scatter(
            others[base], others[name], s=7, color="#d0d0d0", linewidths=0
        )
    start, end = special.logit(x_limits)
    grid = special.expit(np.linspace(start, end, 200))
    if line is not None:
        style: dict[str, Any] = {"s": 9, "color": "#8a8a8a", "linewidths": 0, "zorder": 2}
        keys["published, standard training"] = panel.scatter(line.accuracy_id, line.accuracy_ood, **style)
        low, high = _band(line, grid)
        panel.fill_between(grid, low, high, color="#000000", alpha=0.13, linewidth=0)
        middle = special.expit(line.fit.slope * special.logit(grid) + line.fit.intercept)
        keys["line of standard training, 95 % band"] = panel.plot(grid, middle, color="#333333", linewidth=1.1)[0]
    keys["y = x: nothing lost"] = panel.plot(grid, grid, ":", color="#777777", linewidth=1)[0]
    for group, mark in zip(anchors, ("D", "s"), strict=False):
        marks: dict[str, Any] = {
            "marker": mark,
            "s": 24,
            "facecolors": "white",
            "edgecolors": "#333333",
            "linewidths": 1,
            "zorder": 3,
        }
        keys[group.title] = panel.scatter(group.accuracy[base], group.accuracy[name], **marks)
    for place, model in enumerate(scores):
        if model in both:
            keys[model] = _point(panel, *both[model], place)
    _percent_axis(panel, "x", x_limits)
    _percent_axis(panel, "y", y_limits)
    title = suite.sets[name].title
    panel.set(title=title, xlabel=f"{suite.sets[base].title}, %", ylabel=f"{title}, %")
    panel.grid(alpha=0.25)
    return keys


def _point(panel: Axes, own: Tally, shifted: Tally, place: int) -> Any:
    """A model's mark with its bars; `place` of the model chooses colour and shape."""
    bars = []
    for tally in (own, shifted):
        low, high = (_inside(share) for share in wilson(tally.correct, tally.n))
        middle = _inside(tally.accuracy)
        bars.append([[max(middle - low, 0)], [max(high - middle, 0)]])
    return panel.errorbar(
        _inside(own.accuracy),
        _inside(shifted.accuracy),
        xerr=bars[0],
        yerr=bars[1],
        fmt=MARKS[(place + place // len(COLOURS)) % len(MARKS)],
        color=COLOURS[place % len(COLOURS)],
        markeredgecolor="white",
        markeredgewidth=0.6,
        markersize=7,
        linewidth=1.3,
        zorder=4,
    )


def _inside(share: float) -> float:
    return min(max(float(share), EDGE), 1 - EDGE)


def _limits(shares: Sequence[float]) -> tuple[float, float]:
    """Of an axis on the logit scale, with a margin."""
    values = special.logit(shares)
    margin = max(0.08 * float(np.ptp(values)), 0.25)
    return float(special.expit(values.min() - margin)), float(special.expit(values.max() + margin))


def _band(line: Baseline, grid: Array) -> tuple[Array, Array]:
    """The middle 95 % of lines through as many models, drawn with replacement, at each point of the grid."""
    generator = np.random.default_rng(0)
    draws = []
    for chosen in generator.integers(0, line.fit.n, (RESAMPLES, line.fit.n)):
        if len(np.unique(line.accuracy_id[chosen])) > 1:  # else there is no line
            fit = fit_line(line.accuracy_id[chosen], line.accuracy_ood[chosen], line.fit.scale)
            draws.append(special.expit(fit.slope * special.logit(grid) + fit.intercept))
    low, high = np.quantile(draws, [0.025, 0.975], axis=0)
    return low, high


def _percent(share: float) -> str:
    return f"{100 * share:.1f}".removesuffix(".0")


def _percent_axis(panel: Axes, which: str, limits: tuple[float, float]) -> None:
    """Logit scale with ticks in percent that keep a distance."""
    from matplotlib.ticker import FixedLocator, NullLocator

    low, high = special.logit(limits)
    ticks: list[float] = []
    for percent in TICKS:
        place = (special.logit(percent / 100) - low) / (high - low)
        if 0 <= place <= 1 and (not ticks or place - (special.logit(ticks[-1]) - low) / (high - low) > 0.14):
            ticks.append(percent / 100)
    getattr(panel, f"set_{which}scale")("logit", nonpositive="mask")
    getattr(panel, f"set_{which}lim")(*limits)
    axis = panel.xaxis if which == "x" else panel.yaxis
    axis.set_minor_locator(NullLocator())
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(lambda share, _: f"{100 * share:.3g}")


def _legend(holder: Figure | Axes, keys: Mapping[str, Any], **options: Any) -> None:
    """Marks and what they mean. Names are set afterwards: as labels, those that begin with _ would be left out."""
    legend = holder.legend([*keys.values()], [str(place) for place in range(len(keys))], frameon=False, **options)
    for entry, text in zip(legend.get_texts(), keys, strict=True):
        entry.set_text(printable(text, 38))


# ---------------------------------------------------------------------------------------------------------------------
# Drops of single classes
# ---------------------------------------------------------------------------------------------------------------------


def draw_drops(drops: Mapping[str, Sequence[Drop]], title: str, name: str, out: Path) -> Picture:
    """A panel for each model: bars of the accuracy that its classes lost, in the order given, each with its numbers."""
    with _drawing():
        from matplotlib import pyplot

        columns = min(2, len(drops))
        rows = math.ceil(len(drops) / columns)
        tallest = max(map(len, drops.values()))
        size = (5.4 * columns, rows * (0.95 + 0.24 * max(tallest, 2)))
        figure, axes = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
        farthest = max([drop.points for of in drops.values() for drop in of], default=1.0)
        for place, (panel, (model, of)) in enumerate(zip(axes.flat, drops.items(), strict=False)):
            panel.set_title(printable(model, 48))
            if not of:
                panel.set_axis_off()
                panel.text(0.5, 0.5, "no class lost accuracy", ha="center", va="center", transform=panel.transAxes)
                continue
            lost = [100 * drop.points for drop in of]
            panel.barh(range(len(of)), lost, color=COLOURS[place % len(COLOURS)], height=0.7)
            for i, drop in enumerate(of):
                numbers = f"{_percent(drop.before.accuracy)} \u2192 {_percent(drop.after.accuracy)}"
                images = f"({drop.before.n} \u2192 {drop.after.n} images)"
                panel.text(lost[i] + 1.2 * farthest, i, f"{numbers}  {images}", va="center", fontsize=7.5)
            panel.set_yticks(range(len(of)), [printable(drop.name, 26) for drop in of])
            panel.set(xlim=(0, 100 * farthest * 1.75), ylim=(tallest - 0.4, -0.6), xlabel="accuracy lost, points")
            panel.set_xticks([tick for tick in panel.get_xticks() if tick <= 100 * farthest])
            panel.spines[["top", "right"]].set_visible(False)
            panel.grid(axis="x", alpha=0.25)
        for panel in axes.flat[len(drops) :]:
            panel.set_axis_off()
        text = f"Bars, for each model: the classes that lost most accuracy on {title}."
        return _save(figure, out, name, text)


# ---------------------------------------------------------------------------------------------------------------------
# Between two sets of weights
# ---------------------------------------------------------------------------------------------------------------------


def draw_curves(
    curves: Mapping[str, Sequence[tuple[float, float, float]]], titles: tuple[str, str], name: str, out: Path
) -> Picture:
    """Points (alpha, accuracy in distribution, mean over the shifts) of each curve, alphas ascending.

    titles: of the two accuracies.
    """
    with _drawing():
        from matplotlib import pyplot

        figure, (left, right) = pyplot.subplots(1, 2, figsize=(10.5, 4.4), layout="constrained")
        keys = {}
        for place, (title, points) in enumerate(curves.items()):
            alpha, own, shifted = np.array(points).T
            colour, mark = COLOURS[place % len(COLOURS)], MARKS[place % len(MARKS)]
            keys[f"{title}: under shift"] = right.plot(
                alpha, 100 * shifted, "-", marker=mark, color=colour, markersize=4, linewidth=1.4
            )[0]
            keys[f"{title}: in distribution"] = right.plot(
                alpha, 100 * own, "--", marker=mark, color=colour, markersize=4, linewidth=1.4, markerfacecolor="white"
            )[0]
            left.plot(100 * own, 100 * shifted, "-", marker=mark, color=colour, markersize=4, linewidth=1.4)
            for end in (0, -1):
                middle = 100 * own.mean(), 100 * shifted.mean()
                side = 1 if 100 * own[end] >= middle[0] else -1
                left.annotate(
                    f"\u03b1 = {alpha[end]:g}",
                    (100 * own[end], 100 * shifted[end]),
                    (8 * side, -3),
                    textcoords="offset points",
                    ha="left" if side > 0 else "right",
                )
        left.set(xlabel=f"{titles[0]}, %", ylabel=f"{titles[1]}, %")
        left.margins(0.18)
        right.set(xlabel="\u03b1, weight of the fine-tuned end", ylabel="top-1, %")
        for panel in (left, right):
            panel.grid(alpha=0.25)
        _legend(figure, keys, loc="outside lower center", ncols=2)
        return _save(figure, out, name, f"Curves over alpha: {titles[0]}, {titles[1]}.")


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def _drawing() -> Any:
    """Without a display, and with STYLE for as long as the context lasts."""
    import matplotlib

    matplotlib.use("Agg")
    return matplotlib.rc_context(STYLE)


def _save(figure: Figure, out: Path, name: str, text: str) -> Picture:
    """Writes the files so that each is whole or the old one, and closes the figure. Raises OSError."""
    from matplotlib import pyplot

    try:
        for path in _files(out, name):
            temporary = path.with_name(f".tmp-{path.name}")
            figure.savefig(temporary, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
            os.replace(temporary, path)
            figure.set_layout_engine("none")  # found once, it holds for both
    finally:
        pyplot.close(figure)
    encoded = base64.b64encode((out / f"{name}.svg").read_bytes()).decode()
    return Picture(name, f"data:image/svg+xml;base64,{encoded}", text, round(96 * figure.get_size_inches()[0]))


def _files(out: Path, name: str) -> Iterator[Path]:
    return (out / f"{name}.{suffix}" for suffix in ("png", "svg"))
