"""Competitors timed by turns within each round, so that a busy machine slows both sides of a ratio alike."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from data import DataError
from eval.common import Spread, check_outputs, print_table, spread
from eval.operations import device

Name = TypeVar("Name")


def clock(device: str) -> float:
    """Seconds: of wall time once the GPU is done, or of this process's one thread, which other load stretches less."""
    if device == "cpu":
        return time.process_time()
    import torch

    torch.cuda.synchronize()
    return time.perf_counter()


def take_turns(
    ways: Mapping[Name, Callable[[], object]],
    rounds: int,
    device: str,
    *,
    repeats: int = 1,
    between: Callable[[], object] = lambda: None,
) -> dict[Name, list[float]]:
    """Seconds of each way in each round, in another order each time; the mean of `repeats` calls.

    between: called after each round. Caches and allocators should be warm before.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in ways}
    for turn in range(rounds):
        for name in random.Random(turn).sample(list(ways), len(ways)):
            started = clock(device)
            for _ in range(repeats):
                ways[name]()
            seconds[name].append((clock(device) - started) / repeats)
        between()
    return seconds


def ratio(slow: Sequence[float], fast: Sequence[float]) -> Spread:
    """How many times the one took of the other's seconds, within rounds."""
    return spread([a / b for a, b in zip(slow, fast, strict=True)])


def seconds_row(metric: str, seconds: Sequence[float], competitor: str) -> dict[str, Any]:
    """A row of times."""
    return {"metric": metric, **spread(seconds).fields(), "competitor": competitor, "against": ""}


def speed_up_row(value: Spread, competitor: str, against: str, must: float | None) -> dict[str, Any]:
    """A row of ratios, with its target and whether it was reached."""
    row = {"metric": "speed-up", **value.fields(), "competitor": competitor, "against": against}
    return row if must is None else {**row, "must": must, "verdict": "must" if value.median >= must else "missed"}


def run_measurement(config: Any, measure: Callable[[Any], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Runs `measure` on the config's device, a CPU's with one thread, and appends its rows, with provenance, to `rows`.

    Raises DataError without the device or for a path that cannot be written, before anything is measured.
    """
    import torch

    from data.rows import append_row

    if config.device == "cuda" and not torch.cuda.is_available():
        raise DataError("no CUDA device here; --device cpu measures one thread")
    check_outputs(config.rows, "")
    if config.device == "cpu":
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)
    try:
        found = measure(config)
    finally:
        torch.set_flush_denormal(False)
    about = {**device(config.device), "config": asdict(config)}
    return [append_row(Path(config.rows), **row, **about) for row in found]


def report(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints such rows."""
    lines = [
        [
            f"{row['metric']}, {row['competitor']}" + (f" against {row['against']}" if row["against"] else ""),
            str(Spread.of(row)),
            f"at least {row['must']:g}: {row['verdict']}" if "must" in row else "",
        ]
        for row in rows
    ]
    print_table([title, "median (p20-p80)", ""], lines)
