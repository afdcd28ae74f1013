"""The same step on 1, 2, … processes of one machine: what `eval/throughput.py scaling` runs.

Apart from the script, which only reads the command line and has other measurements.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data import DataError
from eval.common import Spread, check_outputs, print_table, save_figure, spread
from eval.operations import device

VOTES = 50  # timed for their median

Seconds = dict[str, float]  # of the parts of a start, and what they were spent on


@dataclass(frozen=True)
class Config:
    """What to measure; `eval/throughput.py scaling --help` says it in words."""

    processes: tuple[int, ...] = (1, 2)
    teacher: str = "open_clip:RN50"
    device: str = "cuda"
    precision: str = "bf16"
    batch_size: int = 256
    steps: int = 20
    rounds: int = 3
    rows: str = "runs/benchmarks.jsonl"
    figure: str = ""


def main(config: Config) -> list[dict[str, Any]]:
    """Runs the measurement, prints it, writes rows and figure, and returns the rows.

    Every round starts each number of processes once; a process has its GPU, or one thread, and its own batch of
    synthetic images, so that the ideal is a rate that grows as their number.

    Raises DataError for fewer devices than processes, paths that cannot be written, or processes that fail.
    """
    import torch

    from data.rows import append_row

    there = torch.cuda.device_count() if config.device == "cuda" else os.cpu_count() or 1
    if max(config.processes) > there:
        what = "GPUs" if config.device == "cuda" else "cores"
        raise DataError(
            f"{max(config.processes)} processes for {there} {what}: they would measure each other's waiting"
        )
    if 1 not in config.processes:
        raise DataError("--processes must include 1, which the others are compared with")
    check_outputs(config.rows, config.figure)
    runs: dict[int, list[Seconds]] = {number: [] for number in config.processes}
    for turn in range(config.rounds):
        for number in config.processes if turn % 2 == 0 else reversed(config.processes):
            runs[number].append(start(number, config))
    about = {**device(config.device), "config": asdict(config)}
    rows = []
    for number, found in runs.items():
        for metric, values in metrics(found, runs[1], number).items():
            value = spread(values)
            fields = {"processes": number, "n": value.n, "p20": value.p20, "p80": value.p80}
            rows.append(append_row(Path(config.rows), metric=metric, value=value.median, **fields, **about))
    report(rows)
    if config.figure:
        draw(rows, config.figure)
    return rows


# -------------------------------------------------------------------------------------------------------- measurement


def start(number: int, config: Config) -> Seconds:
    """Seconds that `number` new processes took for their parts of a step; raises DataError if one fails."""
    from torch.multiprocessing.spawn import ProcessException, start_processes

    with socket.socket() as free, tempfile.TemporaryDirectory(prefix="throughput-") as scratch:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        answer = Path(scratch) / "seconds.json"
        try:
            # Spawned: a process that has used a GPU cannot be forked, and each must read its own environment.
            start_processes(rank, (number, port, config, answer), nprocs=number, start_method="spawn")
        except ProcessException as error:
            reason = str(error).strip().splitlines()[-1]
            raise DataError(f"{number} processes: one failed ({reason})") from error
        return json.loads(answer.read_text())


def rank(local: int, world: int, port: int, config: Config, answer: Path) -> None:
    """One process: steps with and without the exchange of gradients, the exchange alone, votes; rank 0 answers."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"WORLD_SIZE": str(world), "RANK": str(local), "LOCAL_RANK": str(local)}
    if config.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    import torch

    if config.device == "cpu":
        torch.set_num_threads(1)
    from eval import stepping
    from train.launching import Agreement

    settings = stepping.Config(
        teacher=config.teacher, device=config.device, precision=config.precision, batch_size=config.batch_size
    )
    teacher, student = stepping.make_encoders(settings)
    images = stepping.synthetic_images(settings, teacher.image_size)
    ours = stepping.Ours(teacher, student, settings)
    agreement = Agreement(local, world)
    size = sum(p.numel() for p in ours.distiller.parameters() if p.requires_grad)
    gradients = torch.zeros(size, device=ours.accelerator.device)

    def exchange() -> None:
        if world > 1:
            torch.distributed.all_reduce(gradients)

    seconds = {
        "step": timed(lambda: ours.step(images), config.steps, ours),
        "step without exchange": timed(lambda: ours.step(images, exchange=False), config.steps, ours),
        "exchange": timed(exchange, config.steps, ours),
        "vote": timed(lambda: agreement.settle(None), VOTES, ours),
    }
    if local == 0:
        answer.write_text(json.dumps({**seconds, "gradient bytes": 4.0 * size, "images": config.batch_size * world}))
    ours.guarded.end()


def timed(call: Callable[[], object], repeats: int, ours: Any) -> float:
    """Median seconds of a call, each ended by waiting for the device, after all processes have come so far."""
    import torch

    for _ in range(2):
        call()
    ours.accelerator.wait_for_everyone()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        if ours.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def metrics(found: Sequence[Seconds], alone: Sequence[Seconds], number: int) -> dict[str, list[float]]:
    """Figures of each round; efficiency against the one process of the same round."""
    rates = [run["images"] / run["step"] for run in found]
    measured = {
        "images/s": rates,
        "efficiency, %": [
            100 * rate / number / (run["images"] / run["step"]) for rate, run in zip(rates, alone, strict=True)
        ],
        "step, ms": [1e3 * run["step"] for run in found],
        "vote, ms": [1e3 * run["vote"] for run in found],
    }
    if number > 1:
        measured |= {
            # What of the exchange is not hidden behind the backward pass.
            "exchange of gradients, % of a step": [
                100 * (run["step"] - run["step without exchange"]) / run["step"] for run in found
            ],
            "exchange alone, ms": [1e3 * run["exchange"] for run in found],
            # Each process sends and receives 2 (n - 1) / n of the gradients in a ring.
            "exchange alone, GB/s": [
                2 * (number - 1) / number * run["gradient bytes"] / run["exchange"] / 1e9 for run in found
            ],
        }
    return measured


# ------------------------------------------------------------------------------------------------------------- report


def report(rows: Sequence[dict[str, Any]]) -> None:
    """Prints the rows of one run."""
    about = rows[0]
    config = about["config"]
    where = about["processor"] + ", one thread each" if about["device"] == "cpu" else about["device"]
    print(f"{where}, torch {about['versions']['torch']}, commit {about['commit']}")
    print(
        f"{config['teacher']}, random weights, {config['batch_size']} images a process, mixed precision "
        f"{config['precision']}, {config['rounds']} starts of each"
    )
    lines = [
        (row["metric"], str(row["processes"]), str(Spread.of(row)))
        for row in sorted(rows, key=lambda row: row["metric"])
    ]
    print_table(("", "processes", "median (p20-p80)"), lines)


def draw(rows: Sequence[dict[str, Any]], path: str) -> None:
    """Rate over processes beside the ideal; raises DataError if the file cannot be written."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = sorted((row for row in rows if row["metric"] == "images/s"), key=lambda row: row["processes"])
    numbers, values = [row["processes"] for row in found], [row["value"] for row in found]
    figure, axis = pyplot.subplots(figsize=(5, 4), layout="constrained")
    errors = [[row["value"] - row["p20"] for row in found], [row["p80"] - row["value"] for row in found]]
    axis.errorbar(numbers, values, yerr=errors, color="#1f5fa8", marker="o", capsize=4, label="measured")
    axis.plot(numbers, [values[0] * number for number in numbers], color="#1f5fa8", ls=":", label="ideal")
    shares = {row["processes"]: row["value"] for row in rows if row["metric"] == "efficiency, %"}
    for number, value in zip(numbers, values, strict=True):
        axis.annotate(f"{shares[number]:.0f} %", (number, value), (6, -12), textcoords="offset points", fontsize=8)
    about = rows[0]
    where = "one thread each of " + about["processor"] if about["device"] == "cpu" else about["device"]
    axis.set(xlabel="processes", ylabel="images per second", ylim=(0, None), xticks=numbers)
    axis.set_title(f"{about['config']['teacher']}, {where}", fontsize=9)
    axis.legend(frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)
