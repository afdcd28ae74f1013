"""The fused operations timed beside what they replace: what `eval/throughput.py kernels` runs.

kernels/bench.py measures and says what is compared, and how; here its figures become rows, tables and a drawing.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data import DataError
from eval.common import Spread, check_outputs, print_table, save_figure, spread

if TYPE_CHECKING:
    from kernels.bench import Measurement

COLOURS = {"eager": "#8c8c8c", "torchattacks": "#7a5195", "compile": "#e08a2e", "ours": "#1f5fa8"}
MARKERS = {"eager": "^", "torchattacks": "v", "compile": "s", "ours": "o"}


@dataclass(frozen=True)
class Config:
    """What to measure; `eval/throughput.py kernels --help` says it in words."""

    operation: str = "all"
    suite: str = "quick"
    device: str = "cuda"
    compile: str = "auto"
    max_autotune: bool = False
    rounds: int = 20
    minutes: float = 8.0
    rows: str = "runs/benchmarks.jsonl"
    figure: str = ""


def main(config: Config) -> list[dict[str, Any]]:
    """Runs the benchmark, prints tables, writes rows and figure, and returns the rows.

    Raises DataError without the device, for a full suite on a CPU, for paths that cannot be written, and at the end if
    ours failed somewhere.
    """
    import torch

    from data.rows import append_row
    from kernels import bench

    if config.device == "cuda" and not torch.cuda.is_available():
        raise DataError("no CUDA device here; --device cpu runs small shapes")
    check_outputs(config.rows, config.figure)
    options = bench.Options(
        operations=bench.OPERATIONS if config.operation == "all" else (config.operation,),
        suite=config.suite,
        device=config.device,
        compile=config.device == "cuda" if config.compile == "auto" else config.compile == "yes",
        max_autotune=config.max_autotune,
        rounds=config.rounds,
        minutes=config.minutes,
    )
    try:
        number = len(bench.cases(options))
    except ValueError as error:
        raise DataError(str(error)) from None
    if config.device == "cpu":
        torch.set_num_threads(1)
    about = {**device(config.device), "config": asdict(config)}
    rows: list[dict[str, Any]] = []
    begun: list[str] = []
    try:
        for measurement in bench.run(options):
            if measurement.case is not None and measurement.case.name not in begun:
                begun.append(measurement.case.name)
                print(f"{len(begun)}/{number}  {measurement.case.name}", file=sys.stderr, flush=True)
            try:
                rows.append(append_row(Path(config.rows), **row(measurement), **about))
            except OSError as error:
                raise DataError(f"cannot write {config.rows}: {error.strerror}") from None
    finally:  # what was measured until Ctrl-C, or until the disk was full, is told too
        if rows:
            report(rows)
    if config.figure:
        draw(rows, config.figure)
    failed = {found["case"] for found in rows if found["metric"] == "failed" and found["competitor"] == "ours"}
    if failed:
        raise DataError(f"ours failed in {len(failed)} of {number} cases: {', '.join(sorted(failed))}")
    return rows


def device(kind: str) -> dict[str, Any]:
    """Name of the device and, of a GPU, its driver and CUDA or ROCm version."""
    import torch

    if kind == "cpu":
        return {"device": "cpu", "threads": torch.get_num_threads()}
    found = {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "rocm": torch.version.hip}
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()
        found["driver"] = lines[0].strip() if lines else None
    return found


def row(measurement: Measurement) -> dict[str, Any]:
    """The fields of one figure, without its provenance."""
    value, case, target = spread(measurement.values), measurement.case, measurement.target
    found: dict[str, Any] = {
        "metric": measurement.metric,
        "value": value.median,
        "p20": value.p20,
        "p80": value.p80,
        "n": value.n,
    }
    if case is not None:
        found |= {"case": case.name, "operation": case.operation, "option": case.option, "shape": case.shape}
        found |= {"precision": case.precision, "phase": measurement.phase, "competitor": measurement.competitor}
    if target is not None:
        judged = "not measured" if measurement.metric == "absent" else target.verdict(value.median)
        found |= {"measure": target.measure, "must": target.must, "stretch": target.stretch, "verdict": judged}
    return {**found, **measurement.details}


# ------------------------------------------------------------------------------------------------------------- report


def slower_than_compiled(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Speed-ups of ours over torch.compile, on the device's clock, that lie below 1 in four rounds of five."""
    return [
        found
        for found in rows
        if found["metric"] == "speed-up" and found["against"].startswith("compile") and found["clock"] != "wall"
        if found["p80"] < 1
    ]


def in_order(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows by operation, option, precision and shape; the cases' own order is that of their importance."""

    def key(found: dict[str, Any]) -> tuple[Any, ...]:
        names = [found.get(name, "") for name in ("operation", "option", "precision")]
        return (*names, [int(number) for number in re.findall(r"\d+", found.get("shape", ""))])

    return sorted(rows, key=key)


def report(rows: Sequence[dict[str, Any]]) -> None:
    """Prints the rows of one run: times, targets, where torch.compile is faster, what is missing."""
    about, rows = rows[0], in_order(rows)
    cpu = about["device"] == "cpu"
    print(f"{about['device']}, {about['versions'].get('torch')}, commit {about['commit']}")
    for found in rows:
        if "case" not in found:
            print(f"{' '.join(filter(None, (found['metric'], found.get('precision'))))}: {found['value']:,.1f}")
    if cpu:
        print(
            "On a CPU `ours` is the reference, as the dispatch chooses there: no figure here says anything of a kernel."
        )
    print()
    header = ("", "phase", "clock", "ours, us", "over floor", "rate", "products", "extra MB", "speed-up over")
    print_table(header, times(rows))
    targets = [found for found in rows if "verdict" in found]
    if targets:
        print()
        lines = []
        for found in targets:
            what = found["measure"] + (f" over {found['against']}" if found["against"] else "")
            what += " (wall)" if found["clock"] == "wall" else ""
            value = "" if found["metric"] == "absent" else f"{found['value']:,.2f}"
            stretch = "" if found["stretch"] is None else f"{found['stretch']:g}"
            lines.append((found["case"], found["phase"], what, value, f"{found['must']:g}", stretch, found["verdict"]))
        print_table(("", "phase", "target", "measured", "must", "stretch", "reached"), lines)
        for verdict in ("stretch", "must", "missed", "not measured"):
            print(f"{verdict}: {sum(found['verdict'] == verdict for found in targets)} of {len(targets)}")
    if any(found["metric"] == "speed-up" and found["against"] == "compile" for found in rows) and not cpu:
        slower = slower_than_compiled(rows)
        print("\nSlower than torch.compile, so not to be the default there:" + ("" if slower else " none"))
        for found in slower:
            ratio = Spread.of(found)
            print(f"  {found['case']} {found['phase']}: {ratio} times as fast as {found['against']}")
    missing = [found for found in rows if found["metric"] in ("failed", "absent") and "verdict" not in found]
    for found in missing:
        print(f"{found['metric']}: {found['competitor']} in {found['case']}: {found['error']}")


def times(rows: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """A line for each time of ours: over its floor, as a rate beside that of the products alone, over the others."""
    lines: list[tuple[str, ...]] = []
    for found in rows:
        if found["metric"] != "time, us" or found["competitor"] != "ours":
            continue
        beside = [one for one in rows if (one.get("case"), one.get("phase")) == (found["case"], found["phase"])]
        wall = found["clock"] == "wall"
        ratios = [
            f"{one['against']} {one['value']:.2f}" + " (events)" * (one["clock"] == "events")
            for one in beside
            if one["metric"] == "speed-up" and (one["clock"] == "wall") == wall
        ]
        floor = rate = products = memory = ""
        if "over_floor" in found:
            floor, rate = f"{found['over_floor']:.2f}", speed(found)
            products = "".join(speed(one) for one in beside if one["competitor"] == "products" and "over_floor" in one)
            extra = (one for one in beside if one["metric"] == "extra memory, MB" and one["competitor"] == "ours")
            memory = "".join(f"{one['value']:,.1f}" for one in extra)
        value = Spread.of(found)
        place = (found["case"], found["phase"], found["clock"])
        lines.append((*place, str(value), floor, rate, products, memory, ", ".join(ratios)))
    return lines


def speed(found: dict[str, Any]) -> str:
    """The rate of the useful work: operations where there are any, bytes elsewhere."""
    value, unit = (found["tflop_per_s"], "TFLOP/s") if found["flops"] else (found["gb_per_s"], "GB/s")
    return (f"{value:,.0f}" if value >= 100 else f"{value:.3g}") + f" {unit}"


def draw(rows: Sequence[dict[str, Any]], path: str) -> None:
    """Draws how far ours, torch.compile and eager are from the floor; raises DataError if it cannot be written."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    timed = [one for one in in_order(rows) if one["metric"] == "time, us"]
    found = [one for one in timed if one["phase"] in ("both", "step") and "over_floor" in one]
    operations = list(dict.fromkeys(one["operation"] for one in found))
    cases = {name: list(dict.fromkeys(one["case"] for one in found if one["operation"] == name)) for name in operations}
    if not found:
        raise DataError("no case was measured: there is nothing to draw")
    figure, panels = pyplot.subplots(
        len(operations),
        1,
        figsize=(9, 1.6 + 0.28 * sum(map(len, cases.values())) + 0.5 * len(operations)),
        height_ratios=[len(cases[name]) + 1 for name in operations],
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for panel, operation in zip(panels[:, 0], operations, strict=True):
        names = cases[operation]
        for competitor in MARKERS:
            own = [one for one in found if one["operation"] == operation and one["competitor"] == competitor]
            if not own:
                continue
            scale = [one["over_floor"] / one["value"] for one in own]
            panel.errorbar(
                [one["over_floor"] for one in own],
                [names.index(one["case"]) for one in own],
                xerr=[
                    [(one["value"] - one["p20"]) * factor for one, factor in zip(own, scale, strict=True)],
                    [(one["p80"] - one["value"]) * factor for one, factor in zip(own, scale, strict=True)],
                ],
                fmt=MARKERS[competitor],
                color=COLOURS[competitor],
                label=competitor,
                markersize=6,
                capsize=2,
                linewidth=1,
            )
        panel.axvline(1, color="#444444", linewidth=0.8)
        panel.set_yticks(range(len(names)), [name.removeprefix(operation + " ") for name in names], fontsize=8)
        panel.set(ylim=(len(names) - 0.5, -0.5), xscale="log")
        panel.set_title(operation, loc="left", fontsize=10)
        panel.grid(axis="x", which="both", color="#eeeeee", linewidth=0.6)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        panel.xaxis.set_minor_formatter(NullFormatter())
    handles, labels = max((panel.get_legend_handles_labels() for panel in panels[:, 0]), key=lambda pair: len(pair[1]))
    figure.legend(handles, labels, frameon=False, fontsize=8, loc="outside lower right", ncols=len(labels))
    panels[-1, 0].set_xlabel("time over the computed floor (1: the device's own limit)")
    note = " (ours: the reference)" if rows[0]["device"] == "cpu" else ""
    figure.suptitle(f"whole operations on {rows[0]['device']}{note}", fontsize=10)
    save_figure(figure, path)
