"""Table and figure of `eval/throughput.py attack`, made from its rows; and the names of those who take part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eval.common import Spread, print_table, save_figure

OURS = "ours"
REFERENCE = "ours, reference step"
NOT_FOLDED = "ours, not folded"
CHANNELS_LAST = "ours, channels-last"
BF16 = "ours, bf16 channels-last"
COMPILED = "ours, bf16 channels-last, compiled"
GRAPHED = "ours, bf16 channels-last, graphed"
TORCHATTACKS = "torchattacks"
FROZEN, NOT_FROZEN = "SmoothAdv, frozen", "SmoothAdv, not frozen"
COLOURS = {
    TORCHATTACKS: "#b5b5b5",
    FROZEN: "#8c8c8c",
    NOT_FROZEN: "#dddddd",
    NOT_FOLDED: "#7fa6d6",
    REFERENCE: "#b9cde5",
    OURS: "#1f5fa8",
    CHANNELS_LAST: "#3f8f8f",
    BF16: "#e08a2e",
    COMPILED: "#7a5195",
    GRAPHED: "#c2405a",
}


def title(row: dict[str, Any]) -> str:
    """Names the case of a row."""
    return f"{row['model']}, {row['batch_size']} x {row['side']} px"


def report(rows: Sequence[dict[str, Any]]) -> None:
    """Prints the rows of one run."""
    about = rows[0]
    where = about["processor"] + ", one thread" if about["device"] == "cpu" else about["device"]
    print(f"{where}, torch {about['versions']['torch']}, commit {about['commit']}")
    print(f"PGD of {about['config']['steps']} steps; random weights: speed does not depend on them")

    def value(row: dict[str, Any] | None) -> str:
        return "" if row is None else str(Spread.of(row))

    lines: list[tuple[str, ...]] = []
    shown = ""
    for rate in rows:
        if rate["metric"] != "attacked images/s":
            continue
        case = f"{title(rate)}, {rate['attack']}"
        same = ("model", "attack", "competitor")
        own = [row for row in rows if all(row[name] == rate[name] for name in same)]
        speed_ups: list[dict[str, Any] | None] = [row for row in own if row["metric"] == "speed-up"]
        speed_ups = speed_ups or [None]
        share = next((row for row in own if row["metric"] == "share of the steps, %"), None)
        gained, robust = (
            next(row["value"] for row in own if row["metric"] == name) for name in ("loss gained", "robust accuracy, %")
        )
        for speed_up in speed_ups:
            first = speed_up is speed_ups[0]
            judged = speed_up if speed_up is not None and "verdict" in speed_up else None
            lines.append(
                (
                    "" if case == shown else case,
                    rate["competitor"] if first else "",
                    value(rate) if first else "",
                    value(share) if first else "",
                    f"{gained:.3f}" if first else "",
                    f"{robust:.1f}" if first else "",
                    value(speed_up),
                    "" if speed_up is None else speed_up["against"],
                    "" if judged is None else f"{judged['must']:g}",
                    "" if judged is None or judged["stretch"] is None else f"{judged['stretch']:g}",
                    "" if judged is None else judged["verdict"],
                )
            )
            shown = case
    header = ("", "by", "images/s", "steps, %", "loss gained", "robust, %", "speed-up", "over")
    print_table((*header, "must", "stretch", "reached"), lines)


def draw(rows: Sequence[dict[str, Any]], path: str) -> None:
    """Bars of the attacked images per second, a panel for each model; raises DataError if it cannot be written."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = [row for row in rows if row["metric"] == "attacked images/s"]
    models = list(dict.fromkeys(map(title, timed)))
    names = [name for name in COLOURS if any(row["competitor"] == name for row in timed)]
    attacks = list(dict.fromkeys(row["attack"] for row in timed))
    widest = max(sum(row["attack"] == attack and title(row) == models[0] for row in timed) for attack in attacks)
    width = 0.9 / widest
    figure, axes = pyplot.subplots(
        1, len(models), figsize=(max(5, 1 + 0.62 * widest * len(attacks)) * len(models), 4.6), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis, model in zip(axes[0], models, strict=True):
        for place, attack in enumerate(attacks):
            own = [row for row in timed if title(row) == model and row["attack"] == attack]
            own.sort(key=lambda row: names.index(row["competitor"]))
            for number, row in enumerate(own):
                bars = axis.bar(
                    place + width * (number - (len(own) - 1) / 2),
                    row["value"],
                    0.92 * width,
                    yerr=[[row["value"] - row["p20"]], [row["p80"] - row["value"]]],
                    color=COLOURS[row["competitor"]],
                    hatch="//" if row["competitor"] == NOT_FROZEN else None,
                    edgecolor="white",
                    error_kw={"elinewidth": 0.8},
                    capsize=2,
                    label=row["competitor"],
                )
                axis.bar_label(bars, [f"{row['value']:,.3g}"], fontsize=8, padding=3)
        axis.set_xticks(range(len(attacks)), attacks)
        axis.set_title(model, fontsize=10)
        axis.margins(y=0.12)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("attacked images per second")
    handles = {text: handle for axis in axes[0] for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    shown = [name for name in names if name in handles]
    figure.legend(
        [handles[name] for name in shown], shown, frameon=False, fontsize=8, loc="outside lower center", ncols=4
    )
    about = rows[0]
    where = "one thread of " + about["processor"] if about["device"] == "cpu" else about["device"]
    figure.suptitle(f"PGD of {about['config']['steps']} steps on {where}", fontsize=10)
    save_figure(figure, path)
