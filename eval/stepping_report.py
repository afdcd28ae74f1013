"""The rows of one measurement by eval/stepping.py: printed with their targets, drawn, and summed up in a sentence.

Apart from the measurement because it knows rows only: it needs neither torch nor what was measured, and a change to how
a number is shown cannot change the number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eval.common import Spread, print_table, save_figure

COLOURS = {"published": "#8c8c8c", "ours": "#1f5fa8"}
PART_COLOURS = {"teacher": "#7a5195", "student": "#1f5fa8", "backward": "#5b93d3", "optimiser": "#e08a2e"}
# Metrics whose target is an upper bound.
AT_MOST = {"waiting for data, %", "training waits, % of writing at once"}


def verdict(row: dict[str, Any]) -> str:
    """Whether a row's target is reached."""
    if row["must"] is None:
        return ""
    below = row["metric"] in AT_MOST
    reached = row["value"] <= row["must"] if below else row["value"] >= row["must"]
    return f"{'at most' if below else 'at least'} {row['must']:g}: {'yes' if reached else 'NO'}"


def bound(rows: Sequence[dict[str, Any]]) -> str:
    """What the step's time is made of, in a sentence."""
    values = {(row["metric"], row["images"]): row["value"] for row in rows if row["subject"] == "ours"}
    found = []
    ratio = values.get(("streamed / synthetic", "streamed"))
    if ratio is not None and ratio < 0.95:
        found.append(f"reading and decoding, which let it run at {100 * ratio:.0f} % of its rate on synthetic images")
    shares = {name: values[f"{name}, % of a step", "synthetic"] for name in PART_COLOURS}
    largest = max(shares, key=lambda name: shares[name])
    mfu = values["MFU, %", "synthetic"]
    found.append(
        f"the {largest} pass ({shares[largest]:.0f} % of it); products alone would take {mfu:.0f} % of its time"
    )
    return "bound by " + ", then by ".join(found)


def report(rows: Sequence[dict[str, Any]]) -> None:
    """Prints the rows of one run."""
    about = rows[0]
    config = about["config"]
    where = about["processor"] + ", one thread" if about["device"] == "cpu" else about["device"]
    print(f"{where}, torch {about['versions']['torch']}, commit {about['commit']}")
    student = config["student"] or config["teacher"]
    print(
        f"{config['teacher']} to {student}, random weights, batch {config['batch_size']}, mixed precision "
        f"{config['precision']}, {'compiled' if config['compile'] else 'eager'}"
        + (f", images of {config['data']} by {config['workers']} workers" if config["data"] else "")
    )
    lines = [
        (
            row["metric"],
            row["subject"],
            row["images"],
            str(Spread.of(row)),
            verdict(row),
        )
        for row in rows
    ]
    print_table(("", "of", "images", "median (p20-p80)", "target"), lines)
    print(bound(rows))


def draw(rows: Sequence[dict[str, Any]], path: str) -> None:
    """Rates as bars, the floor as a line, parts of a step as one bar; raises DataError if it cannot be written."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    about = rows[0]
    config = about["config"]
    values = {(row["metric"], row["subject"], row["images"]): row for row in rows}
    kinds = [kind for kind in ("synthetic", "streamed") if ("images/s", "ours", kind) in values]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 4), layout="constrained", width_ratios=(3, 2))
    for offset, (name, colour) in enumerate(COLOURS.items()):
        own = [values["images/s", name, kind] for kind in kinds]
        errors = [[row["value"] - row["p20"] for row in own], [row["p80"] - row["value"] for row in own]]
        places = [number + 0.4 * (offset - 0.5) for number in range(len(kinds))]
        bars = left.bar(places, [row["value"] for row in own], 0.38, yerr=errors, color=colour, label=name, capsize=3)
        left.bar_label(bars, [f"{row['value']:,.4g}" for row in own], fontsize=8, padding=3)
    floor = values["floor of products, ms", "ours", "synthetic"]["value"]
    ceiling = 1e3 * config["batch_size"] / floor
    highest = max(row["p80"] for row in rows if row["metric"] == "images/s")
    if ceiling < 4 * highest:
        highest = max(highest, ceiling)
        left.axhline(ceiling, color="#444444", ls=":", lw=1)
        left.text(len(kinds) - 0.6, ceiling, "products alone", fontsize=8, va="bottom", ha="right")
    left.set_xticks(range(len(kinds)), [f"{kind} images" for kind in kinds])
    left.set(ylabel="images per second", ylim=(0, 1.25 * highest))
    left.legend(frameon=False, fontsize=8, loc="upper left", ncols=2)
    bottom = 0.0
    for name, colour in PART_COLOURS.items():
        share = values[f"{name}, % of a step", "ours", "synthetic"]["value"]
        right.barh([0], [share], left=bottom, color=colour, label=f"{name} {share:.0f} %")
        bottom += share
    right.set(xlabel="% of a step of ours", yticks=[], ylim=(-0.6, 1.6), xlim=(0, 100))
    right.legend(frameon=False, fontsize=8, loc="upper center", ncols=2)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    right.spines["left"].set_visible(False)
    where = "one thread of " + about["processor"] if about["device"] == "cpu" else about["device"]
    precision = "float32" if config["precision"] == "no" else config["precision"]
    figure.suptitle(f"{config['teacher']}, batch {config['batch_size']}, {precision}, {where}", fontsize=10)
    save_figure(figure, path)
