"""Where a job of many GPUs is bound, from what one machine measured: what `eval/throughput.py forecast` runs.

A model, not a measurement: docs/multi_node.md says what it leaves out. Apart from the script, which only reads the
command line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from data import DataError
from eval.common import print_table
from train.launching import grid


@dataclass(frozen=True)
class Config:
    """One machine's rates and the job; `eval/throughput.py forecast --help` says it in words."""

    gpus: tuple[int, ...] = (8, 64, 512)
    gpus_per_node: int = 8
    images_per_second: float = 4500.0
    batch_size: int = 256
    parameters: float = 38.3e6
    cores: int = 16
    decoded_per_core: float = 696.0
    image_kb: float = 109.6
    images: int = 1_281_167
    shards: int = 1282
    store_gb: float = 10.0
    nvlink_gb: float = 300.0
    network_gb: float = 40.0
    message_ms: float = 0.43
    disk_mb: float = 200.0
    save_every: int = 1000
    gpu_hours_per_failure: float = 50_000.0
    restart_minutes: float = 5.0


@dataclass(frozen=True)
class Forecast:
    """What one number of GPUs needs and where it waits.

    Attributes:
        gpus, global_batch, steps_per_epoch: the job.
        cores: decoding cores that each GPU needs.
        store: GB/s that the store of shards must give, in all.
        partial: bytes read in vain, in % of those needed: what lies before a stream's first sample in its shard.
        exchange: ms of a gradient all-reduce that nothing hides, which the backward pass can.
        vote, messages: ms of the vote before a step, and how many messages in a row it takes.
        flat_vote: ms of the same vote in one ring, which it is not.
        writing: share of the time in which a checkpoint is being written, %.
        lost: share of the time that failures cost, %: half a save interval and a restart each.
        step: ms.
        bounds: what of this does not fit, worst first; empty where all of it does.
    """

    gpus: int
    global_batch: int
    steps_per_epoch: float
    step: float
    cores: float
    store: float
    partial: float
    exchange: float
    vote: float
    messages: int
    flat_vote: float
    writing: float
    lost: float
    bounds: tuple[str, ...]


def messages_in_a_row(sides: Sequence[int]) -> int:
    """Of a vote that goes around a ring along each side: n - 1 to collect and n - 1 to tell."""
    return sum(2 * (side - 1) for side in sides)


def forecast(config: Config, gpus: int) -> Forecast:
    """The model for one number of GPUs."""
    step = config.batch_size / config.images_per_second  # seconds
    nodes = max(1, gpus // config.gpus_per_node)
    local = min(gpus, config.gpus_per_node)
    gradients = 4 * config.parameters
    exchange = 2 * (local - 1) / local * gradients / (config.nvlink_gb * 1e9)
    exchange += 2 * (nodes - 1) / nodes * gradients / (config.network_gb * 1e9)
    messages = messages_in_a_row(grid(gpus))
    vote = messages * config.message_ms / 1e3
    cores = config.images_per_second / config.decoded_per_core
    partial = max(64, gpus) * 0.5 / config.shards  # each stream begins, on average, in the middle of a shard
    store = gpus * config.images_per_second * config.image_kb * 1e3 / 1e9 * (1 + partial)
    written = 12 * config.parameters / (config.disk_mb * 1e6)
    between_saves = config.save_every * step
    hours = config.gpu_hours_per_failure / gpus
    lost = (between_saves / 2 + 60 * config.restart_minutes) / (3600 * hours)
    pressures = {
        f"the store: {store:,.0f} of {config.store_gb:,.0f} GB/s": store / config.store_gb,
        f"decoding: {cores:.1f} of {config.cores} cores a GPU": cores / config.cores,
        # The backward pass, half of a step of student and teacher, hides the exchange; the step hides the vote.
        f"exchange: {1e3 * exchange:.0f} of {500 * step:.0f} ms": exchange / (step / 2),
        f"vote: {1e3 * vote:.0f} of {1e3 * step:.0f} ms": vote / step,
        "checkpoints: written slower than they are due": written / between_saves,
    }
    bounds = sorted((name for name, pressure in pressures.items() if pressure > 1), key=lambda n: -pressures[n])
    return Forecast(
        gpus=gpus,
        global_batch=config.batch_size * gpus,
        steps_per_epoch=config.images / (config.batch_size * gpus),
        step=1e3 * step,
        cores=cores,
        store=store,
        partial=100 * partial,
        exchange=1e3 * exchange,
        vote=1e3 * vote,
        messages=messages,
        flat_vote=messages_in_a_row([gpus]) * config.message_ms,
        writing=100 * written / between_saves,
        lost=100 * lost,
        bounds=tuple(bounds),
    )


LINES = {
    "global batch": "{0.global_batch:,}",
    "steps an epoch": "{0.steps_per_epoch:,.0f}",
    "step, ms": "{0.step:.0f}",
    "decoding cores a GPU": "{0.cores:.1f}",
    "shards read, GB/s in all": "{0.store:,.1f}",
    "bytes read in vain, %": "{0.partial:.1f}",
    "exchange of gradients, ms": "{0.exchange:.1f}",
    "vote before a step, ms": "{0.vote:.1f}",
    "the same in one ring, ms": "{0.flat_vote:.1f}",
    "time with a checkpoint being written, %": "{0.writing:.1f}",
    "time lost to failures, %": "{0.lost:.2f}",
}


def table(config: Config) -> list[list[str]]:
    """Header and rows, a column for each number of GPUs."""
    found = [forecast(config, gpus) for gpus in config.gpus]
    rows = [["", *(f"{f.gpus} GPUs" for f in found)]]
    return rows + [[name, *(text.format(f) for f in found)] for name, text in LINES.items()]


def main(config: Config) -> list[Forecast]:
    """Prints the table and what breaks first; returns the forecasts.

    Raises DataError for numbers of GPUs that do not fill their nodes.
    """
    for gpus in config.gpus:
        if gpus > config.gpus_per_node and gpus % config.gpus_per_node:
            raise DataError(f"{gpus} GPUs do not fill nodes of {config.gpus_per_node}")
    header, *rows = table(config)
    print("a model from the rates of one machine, not a measurement")
    print_table(header, rows)
    found = [forecast(config, gpus) for gpus in config.gpus]
    for each in found:
        print(f"{each.gpus} GPUs: " + ("; ".join(each.bounds) if each.bounds else "nothing beyond its limit"))
    return found
