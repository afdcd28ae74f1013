"""Runs of train/distill.py on any number of processes that start within a second, and a log of what each trained on.

Importing torch and open_clip takes longer than the runs of a test, so one server process imports them once and forks
every rank. A rank then goes the whole way of the script, from its command line to its exit code. Two things are added:
after each optimiser step it appends the keys of its rows to a log, and it can send itself a signal at a chosen step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests import ranks  # noqa: E402
from tests.ranks import free_port  # noqa: E402

# ----------------------------------------------------------------------------------------------------------------------
# Starting ranks
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """What one rank trained on in one optimiser step."""

    start: int  # which launch of the run it was, from 0
    world: int
    rank: int
    step: int
    keys: list[str]  # of its rows, in their order


class Launch:
    """The ranks of one start of a run; a context that ends them all.

    Args:
        folder: of the run; holds out/ (the script's --out), trained.jsonl and, for each start and rank, its stderr.
        settings: flags of train/distill.py; --out is set here.
        world: number of processes; 1 is a plain `python train/distill.py`.
        signals: by (rank, step): a signal that the rank sends itself when it has fetched the batch of that step.
        constants: by (module, name): values that the ranks use instead, for limits that a test cannot wait for.
        port: of the launch; a free one by default.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        world: int,
        *,
        signals: Mapping[tuple[int, int], int] | None = None,
        constants: Mapping[tuple[str, str], Any] | None = None,
        port: int | None = None,
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.world = folder, world
        self.start = len(list(folder.glob("start*_rank0.err")))
        self.port = port or free_port()
        self._log_begin = len(_log_of(folder))
        flags = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
        flags += ["--out", str(folder / "out")]
        context = ranks.server()
        self.ranks: list[BaseProcess] = []
        for rank in range(world):
            plan = _Plan(folder, self.start, rank, world, self.port, flags, dict(signals or {}), dict(constants or {}))
            self._error_file(rank).touch()
            self.ranks.append(context.Process(target=_run_rank, args=(plan,)))
        for process in self.ranks:
            process.start()

    def _error_file(self, rank: int) -> Path:
        return self.folder / f"start{self.start}_rank{rank}.err"

    def said(self, rank: int | None = None) -> str:
        """What a rank, or all of them one after the other, wrote to stdout and stderr."""
        chosen = range(self.world) if rank is None else [rank]
        return "".join(self._error_file(number).read_text(errors="replace") for number in chosen)

    def send(self, number: int, rank: int | None = None) -> None:
        """A signal to one rank or to all of them, as far as they still run."""
        for process in self.ranks if rank is None else [self.ranks[rank]]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(_pid(process), number)

    def wait(self, seconds: float) -> list[int | None]:
        """Exit codes by rank, negative for a signal, None for a rank that still runs after so many seconds."""
        end = time.monotonic() + seconds
        for process in self.ranks:
            process.join(max(0.0, end - time.monotonic()))
        return [process.exitcode for process in self.ranks]

    def finish(self, seconds: float = 120) -> str:
        """Waits for a run that must succeed and returns what it said."""
        codes = self.wait(seconds)
        assert codes == [0] * self.world, f"exit codes {codes} of {self.folder}:\n{self.said()}"
        return self.said()

    def trained(self) -> list[Trained]:
        """What the ranks of this start have trained on so far."""
        return _rows(_log_of(self.folder, self._log_begin))

    def left_over(self, seconds: float = 0.0) -> list[str]:
        """Command lines of processes of this launch that are there after up to so many seconds: ranks or workers."""
        end = time.monotonic() + seconds
        while (found := processes_of_sessions([_pid(process) for process in self.ranks])) and time.monotonic() < end:
            time.sleep(0.05)
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.send(signal.SIGCONT)
        self.send(signal.SIGKILL)
        for process in self.ranks:
            process.join(10)


def run(folder: Path, settings: Mapping[str, Any], world: int, **options: Any) -> str:
    """A run that must succeed; what it said. Arguments as for Launch."""
    with Launch(folder, settings, world, **options) as launch:
        return launch.finish()


def _pid(process: BaseProcess) -> int:
    assert process.pid is not None
    return process.pid


def processes_of_sessions(sessions: Sequence[int]) -> list[str]:
    """Living processes whose session one of these processes opened, also after its end: each with its command line."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) in sessions and fields[0] not in "ZX":
                command = (stat.parent / "cmdline").read_text(errors="replace").replace("\0", " ")
                found.append(f"{stat.parent.name} {command[:80]}")
    return found


# ----------------------------------------------------------------------------------------------------------------------
# In a rank
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    folder: Path
    start: int
    rank: int
    world: int
    port: int
    flags: list[str]
    signals: dict[tuple[int, int], int]
    constants: dict[tuple[str, str], Any]


def _run_rank(plan: _Plan) -> None:
    """Body of a rank: what `accelerate launch` sets, then the script from its command line on."""
    os.setsid()  # a session of its own tells which workers are its
    # The server ignores Ctrl-C for itself.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    output = os.open(plan.folder / f"start{plan.start}_rank{plan.rank}.err", os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= ranks.world_of(plan.rank, plan.world, plan.port)
    ranks.use(plan.constants)
    _keep_log(plan)
    from train.common import run_script
    from train.distill import Config, main

    sys.argv = ["train/distill.py", *plan.flags]
    run_script(main, Config, "", "demo.yaml")


def _keep_log(plan: _Plan) -> None:
    """Every optimiser step that this rank takes leaves a line in trained.jsonl, written by one call once it is done."""
    from data import stream
    from train import loop

    open_stream, fetch, finish = loop.open_stream, stream.Stream.__next__, loop.GuardedStep.finish
    log = os.open(plan.folder / "trained.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    step, keys = 0, list[str]()

    def open_stream_at(*arguments: Any, **options: Any) -> stream.Stream:
        nonlocal step
        opened = open_stream(*arguments, **options)
        step = options["epoch"] * opened.steps_per_epoch + options["start_step"]
        return opened

    def fetch_and_note(self: stream.Stream) -> stream.Batch:
        nonlocal keys
        batch = fetch(self)
        keys = batch["key"]
        if number := plan.signals.get((plan.rank, step)):
            os.kill(os.getpid(), number)
        return batch

    def finish_and_log(self: loop.GuardedStep) -> Any:
        nonlocal step
        norm = finish(self)
        row = Trained(plan.start, plan.world, plan.rank, step, keys)
        os.write(log, json.dumps(dataclasses.asdict(row)).encode() + b"\n")
        step += 1
        return norm

    loop.open_stream = open_stream_at  # type: ignore[assignment]
    stream.Stream.__next__ = fetch_and_note  # type: ignore[method-assign, assignment]
    loop.GuardedStep.finish = finish_and_log  # type: ignore[method-assign]


# ----------------------------------------------------------------------------------------------------------------------
# Looking at what a run left
# ----------------------------------------------------------------------------------------------------------------------


def trained(folder: Path) -> list[Trained]:
    """The log of a run in the order of its lines; a line that is being written is left out."""
    return _rows(_log_of(folder))


def _log_of(folder: Path, begin: int = 0) -> bytes:
    path = folder / "trained.jsonl"
    if not path.exists():
        return b""
    with open(path, "rb") as file:
        file.seek(begin)
        return file.read()


def _rows(log: bytes) -> list[Trained]:
    return [Trained(**json.loads(line)) for line in log.split(b"\n")[:-1]]


def planned_keys(data: str, batch_size: int, steps: int, seed: int = 0) -> list[list[str]]:
    """Keys of the global batch of each step, from the order alone and the names in the shards."""
    from data.order import count_streams, global_order
    from data.tar import ShardReader, find_shards

    shards = find_shards(data)
    names = [record.key for shard in shards.shards for record in ShardReader(shard.url).read()]
    streams = count_streams(batch_size, 1, 64)
    planned: list[list[str]] = []
    for epoch in range(-(-steps // (shards.num_samples // batch_size))):
        order = global_order(shards, global_batch=batch_size, streams=streams, seed=seed, epoch=epoch)
        planned += [[names[number] for number in numbers] for numbers in order]
    return planned[:steps]


def deviations(rows: Sequence[Trained], planned: Sequence[Sequence[str]]) -> list[str]:
    """What is wrong with a log: rows that are not those planned, and steps of a start left out or done twice.

    A start may end anywhere, some ranks a step before others.
    """
    wrong = []
    following: dict[tuple[int, int], int] = {}
    first: dict[int, int] = {}
    for row in rows:
        share = len(planned[row.step]) // row.world
        if row.keys != list(planned[row.step][row.rank * share : (row.rank + 1) * share]):
            wrong.append(f"other rows than planned: {row}")
        expected = following.get((row.start, row.rank), first.setdefault(row.start, row.step))
        if row.step != expected:
            wrong.append(f"step {row.step} of rank {row.rank} in start {row.start} where {expected} was to come")
        following[row.start, row.rank] = row.step + 1
    return wrong


def history_of(rows: Sequence[Trained]) -> list[list[str]]:
    """Global batches as the run's final weights know them: of each step, the rows of its last execution.

    Raises AssertionError where ranks or steps are missing.
    """
    last = {row.step: row.start for row in rows}  # starts follow each other in the log
    parts = {(row.step, row.rank): row for row in rows if row.start == last[row.step]}
    history = []
    for step in range(len(last)):
        world = parts[step, 0].world
        assert all((step, rank) in parts for rank in range(world)), f"step {step} was not done by all ranks"
        history.append([key for rank in range(world) for key in parts[step, rank].keys])
    return history


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    """Losses by step; raises AssertionError unless each step is there once and in order."""
    rows = metrics(folder)
    assert [row["step"] for row in rows] == list(range(len(rows)))
    return [row["loss"] for row in rows]
