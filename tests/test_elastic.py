"""Training on any number of processes is one training; it goes on after kills; and whatever stalls or dies is named.

Most of it runs on forked ranks that log the rows of every step (tests/elastic.py); tests/soak.py does more of the same.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from models.checkpoints import newest_checkpoint
from tests import elastic
from tests.elastic import Launch
from tests.soak import Soak
from tests.test_distill import flags

ROOT = Path(__file__).resolve().parents[1]
STEPS = 50


@pytest.fixture(scope="module")
def settings(tiny_shards: Path, tiny_vit: str) -> dict[str, Any]:
    """50 steps of 12 images, over four epochs; 1, 2, 3, 4, 6 and 12 processes can share a batch."""
    common = {"data": str(tiny_shards), "teacher": tiny_vit, "batch_size": 12, "steps": STEPS, "warmup_steps": 2}
    return common | {"workers": 0, "log_every": 1, "save_every": 1000}


@pytest.fixture(scope="module")
def unbroken(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of one process that nobody disturbs, after a look at what it trained on."""
    folder = tmp_path_factory.mktemp("unbroken")
    elastic.run(folder, settings, world=1)
    check_batches(folder, settings)
    return elastic.losses(folder)


def check_batches(folder: Path, settings: dict[str, Any]) -> None:
    """Every start of a run trained on the planned rows in their order, and together they did each step once."""
    planned = elastic.planned_keys(settings["data"], settings["batch_size"], settings["steps"])
    rows = elastic.trained(folder)
    assert elastic.deviations(rows, planned) == []
    assert elastic.history_of(rows) == planned


def wait_for(launch: Launch, rows: int) -> None:
    """Returns when the ranks have done so many steps of their own together."""
    end = time.monotonic() + 60
    while len(launch.trained()) < rows:
        assert time.monotonic() < end, launch.said()
        assert launch.wait(0) == [None] * launch.world, launch.said()
        time.sleep(0.01)


def errors(launch: Launch) -> list[str]:
    """The lines of all ranks about why they ended; raises AssertionError for a traceback."""
    said = launch.said()
    assert "Traceback" not in said, said
    return [line for line in said.splitlines() if "error: " in line]


# ----------------------------------------------------------------------------------------------------------------------
# One training
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("world", "workers"), [(2, 0), (4, 1)])
def test_any_number_of_processes_is_the_same_training(
    world: int, workers: int, settings: dict[str, Any], unbroken: list[float], tmp_path: Path
) -> None:
    """The same rows in the same order in every global batch, and losses equal to 1e-5 over 50 steps."""
    elastic.run(tmp_path, settings | {"workers": workers}, world)
    check_batches(tmp_path, settings)
    assert elastic.losses(tmp_path) == pytest.approx(unbroken, rel=1e-5)
    assert {(row.world, row.rank) for row in elastic.trained(tmp_path)} == {(world, rank) for rank in range(world)}


@pytest.mark.timeout(120)
def test_a_run_that_moves_between_numbers_of_processes_is_the_same_training(
    settings: dict[str, Any], unbroken: list[float], tmp_path: Path
) -> None:
    """SIGTERM to one of the ranks, five times, each time in the middle of fetching the batch of a step.

    Workers and pieces change as well. No step is done twice: what is saved is where all ranks stopped.
    """
    starts: list[tuple[int, int, int, int, int]] = [  # processes, workers, pieces, step to stop at, rank that is told
        (2, 0, 1, 20, 1),
        (1, 1, 3, 27, 0),
        (4, 0, 1, 34, 2),
        (2, 2, 2, 41, 0),
        (3, 1, 2, 46, 1),
        (1, 0, 1, STEPS, 0),
    ]
    first = 0
    for world, workers, pieces, stop, rank in starts:
        chosen = settings | {"workers": workers, "accumulate": pieces}
        with Launch(tmp_path, chosen, world, signals={(rank, stop): signal.SIGTERM}) as launch:
            codes = launch.wait(60)
        assert codes == [143 if stop < STEPS else 0] * world, launch.said()
        assert errors(launch) == []
        assert stop == STEPS or f"stopped by signal 15: saved at step {stop} of {STEPS}" in launch.said(0)
        assert [row.step for row in launch.trained() if row.rank == 0] == list(range(first, stop))
        first = stop
    check_batches(tmp_path, settings)
    assert len(elastic.trained(tmp_path)) == 2 * 20 + 7 + 4 * 7 + 2 * 7 + 3 * 5 + 4
    assert elastic.losses(tmp_path) == pytest.approx(unbroken, rel=1e-5)


@pytest.mark.timeout(60)
def test_a_number_of_processes_that_does_not_divide_the_streams_is_refused(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """One process cuts batches of 90 into 45 streams; two processes can share the batch but not the streams."""
    settings = settings | {"batch_size": 90, "steps": 3}
    with Launch(tmp_path, settings, 1, signals={(0, 1): signal.SIGTERM}) as launch:
        assert launch.wait(60) == [143]
    with Launch(tmp_path, settings, 2) as launch:
        assert launch.wait(60) == [2, 1]  # the rank that says why, and one that only ends
        (line,) = errors(launch)
    expected = "2 processes cannot continue a run of 45 streams; use a number that divides it"
    assert line == f"[rank 0] error: {expected}"
    with Launch(tmp_path, settings, 3) as launch:
        launch.finish()
    check_batches(tmp_path, settings)


# ----------------------------------------------------------------------------------------------------------------------
# Kills
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(120)
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_other_and_a_restart_goes_on(
    victim: int, settings: dict[str, Any], unbroken: list[float], tmp_path: Path
) -> None:
    """Its workers go with it. A rank 0 that is killed may leave a save unfinished; what was saved before counts."""
    settings = settings | {"workers": 1, "save_every": 6}
    with Launch(tmp_path, settings, 2, signals={(victim, 15): signal.SIGKILL}) as launch:
        started = time.monotonic()
        codes = launch.wait(60)
        assert time.monotonic() - started < 40, "limits for ranks that hang are minutes"
        assert codes[victim] == -signal.SIGKILL
        assert codes[1 - victim] == 1
        (line,) = errors(launch)
        assert line.startswith(f"[rank {1 - victim}] error: ")
        assert re.search(r"another process ended without a word|ended; look for its last lines", line)
        assert launch.left_over(10) == []
    found, skipped = newest_checkpoint(tmp_path / "out" / "checkpoints")
    assert skipped == []
    saved = found.step if found is not None else 0
    assert saved == 12 or (victim == 0 and saved in (0, 6))
    with Launch(tmp_path, settings, 2) as launch:
        launch.finish()
        assert launch.trained()[0].step == saved
    check_batches(tmp_path, settings)
    assert elastic.losses(tmp_path) == pytest.approx(unbroken, rel=1e-5)


@pytest.mark.launch
@pytest.mark.timeout(300)
def test_the_launcher_restarts_a_run_whose_ranks_were_killed(
    settings: dict[str, Any], unbroken: list[float], tmp_path: Path
) -> None:
    """`--max_restarts`: rank 1 is killed between saves, then rank 0 while it writes a checkpoint; nobody helps."""
    settings = settings | {"workers": 1, "save_every": 4, "out": str(tmp_path / "out")}
    accelerate = str(Path(sys.executable).with_name("accelerate"))
    command = [accelerate, "launch", "--quiet", "--config_file", "train/launch/cpu_2_processes.yaml"]
    command += ["--max_restarts", "2", "train/distill.py", *flags(settings)]
    marker = f"SHIFTLENS_TEST={tmp_path}"
    environment = {**os.environ, "SHIFTLENS_TEST": str(tmp_path)}
    checkpoints = tmp_path / "out" / "checkpoints"
    with open(tmp_path / "said", "w") as said:
        launcher = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=said, stderr=said)
    try:
        wait_until(lambda: elastic_rows(tmp_path) >= 10, launcher)
        rank_process(launcher, 1).kill()
        wait_until(lambda: (tmp_path / "said").read_text().count("continuing from") == 1, launcher)
        rank_0 = rank_process(launcher, 0)
        before = {path.name for path in checkpoints.iterdir()}
        wait_until(lambda: bool({path.name for path in checkpoints.glob(".tmp-step_*")} - before), launcher)
        rank_0.kill()
        assert launcher.wait(timeout=120) == 0, (tmp_path / "said").read_text()
    finally:
        launcher.kill()
        for process in marked_processes(marker):
            process.kill()
    text = (tmp_path / "said").read_text()
    assert text.count("continuing from") == 2
    assert elastic.losses(tmp_path) == pytest.approx(unbroken, rel=1e-5)
    starts = json.loads((tmp_path / "out" / "env.json").read_text())
    assert [start["world"] for start in starts] == [2, 2, 2]
    wait_until(lambda: marked_processes(marker) == [])
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_00000048", "step_00000050"]


def wait_until(condition: Any, launcher: "subprocess.Popen[bytes] | None" = None, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to it"
        assert launcher is None or launcher.poll() is None, "the launch ended before"
        time.sleep(0.001)


def elastic_rows(folder: Path) -> int:
    file = folder / "out" / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def rank_process(launcher: "subprocess.Popen[bytes]", rank: int) -> psutil.Process:
    """The training process with that rank: a child of the launcher's, and not one of its workers."""
    for child in psutil.Process(launcher.pid).children():
        if child.environ().get("RANK") == str(rank) and child.is_running():
            return child
    raise AssertionError(f"no rank {rank}")


def marked_processes(marker: str) -> list[psutil.Process]:
    """Processes that were started with this in their environment, and forks of them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if marker.encode() in path.read_bytes().split(b"\0"):
                process = psutil.Process(int(path.parent.name))
                if process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        except (OSError, psutil.NoSuchProcess):
            continue
    return found


@pytest.mark.timeout(240)
def test_six_kills_at_random_moments(settings: dict[str, Any], tmp_path: Path) -> None:
    """A small part of tests/soak.py, which says what is looked at after each of them."""
    soak = Soak(tmp_path, settings["data"], settings["teacher"], worlds=[1, 2], seed=3, steps=40)
    summary = soak.run(kills=6)
    assert summary["kills"] == sum(summary["kinds"].values()) == 6
    assert summary["worst"]["loss"] < 1e-5


# ----------------------------------------------------------------------------------------------------------------------
# What stalls or dies is named
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(90)
def test_a_killed_data_worker_ends_all_ranks_with_one_line(settings: dict[str, Any], tmp_path: Path) -> None:
    """As the kernel does when memory runs out."""
    with Launch(tmp_path, settings | {"workers": 2, "steps": 100_000}, 2) as launch:
        wait_for(launch, 8)
        workers = psutil.Process(launch.ranks[1].pid).children()
        assert len(workers) == 2
        workers[0].kill()
        assert launch.wait(30) == [1, 1]
        (line,) = errors(launch)
        assert launch.left_over(10) == []
    assert re.fullmatch(
        r"\[rank 1\] error: data worker [01] of rank 1 was killed by SIGKILL \(out of memory\?\)"
        r"( (at sample \d+ of|while reading) \S+/00000[012]\.tar)?",
        line,
    ), line


@pytest.fixture
def stalling(tiny_shards: Path, tmp_path: Path) -> tuple[dict[str, Any], Path]:
    """Settings whose shard comes through a pipe, and a file: while that is there, nothing comes for rank 1."""
    file = tmp_path / "stall"
    shard = f'pipe:while [ "$RANK" = 1 ] && [ -e {file} ]; do sleep 0.2; done; cat {tiny_shards}/000000.tar'
    return {"data": shard, "allow_pipe": True, "workers": 1, "steps": 100_000}, file


@pytest.mark.timeout(90)
def test_a_stalled_reader_of_one_rank_is_named_and_waited_for(
    settings: dict[str, Any], stalling: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    """The rank says what it waits for and how long; the other waits at its vote; when the bytes come, both go on."""
    change, stall = stalling
    seconds = {("data.workers", "STALL_SECONDS"): 0.3}
    with Launch(tmp_path / "run", settings | change, 2, constants=seconds) as launch:
        wait_for(launch, 4)
        stall.touch()  # for the next epoch, four steps long
        wait_until(lambda: launch.said(1).count("waits 1 s for data worker 0 while reading pipe:while") > 0)
        assert launch.wait(0) == [None, None]
        assert "waits" not in launch.said(0)
        stuck = len(launch.trained())
        stall.unlink()
        wait_for(launch, stuck + 8)
        launch.send(signal.SIGTERM, rank=0)
        assert launch.wait(60) == [143, 143]
        assert errors(launch) == []


@pytest.mark.timeout(90)
@pytest.mark.parametrize(("workers", "reader"), [(1, "data worker 0"), (0, "the reader")])
def test_a_reader_that_stalls_for_good_ends_all_ranks(
    workers: int, reader: str, settings: dict[str, Any], stalling: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    """One line names rank, seconds and shard; no rank, worker or command is left. The limit is three seconds here."""
    change, stall = stalling
    module = "data.workers" if workers else "data.runs"
    limits = {(module, "STALL_SECONDS"): 0.3, (module, "STALL_LIMIT"): 3.0}
    with Launch(tmp_path / "run", settings | change | {"workers": workers}, 2, constants=limits) as launch:
        wait_for(launch, 4)
        stall.touch()
        assert launch.wait(60) == [1, 1]
        (line,) = errors(launch)
        assert launch.left_over(10) == []
    said = rf"\[rank 1\] error: rank 1: {reader} gave nothing for \d s while reading pipe:while .*/000000\.tar"
    assert re.fullmatch(said, line), line
    assert "waits 1 s for" in launch.said(1)


@pytest.mark.timeout(90)
def test_workers_with_a_stalled_reader_end_with_their_rank(
    settings: dict[str, Any], stalling: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    """A worker that hangs in a read cannot look whether its rank still lives, nor can the command behind it."""
    change, stall = stalling
    with Launch(tmp_path / "run", settings | change, 2) as launch:
        wait_for(launch, 4)
        stall.touch()
        wait_until(lambda: any("sleep 0.2" in line for line in launch.left_over()))
        launch.send(signal.SIGKILL)
        assert launch.wait(10) == [-9, -9]
        assert launch.left_over(10) == []


@pytest.mark.timeout(90)
def test_a_second_launch_at_the_same_port_is_one_line_and_the_first_goes_on(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """Where rank 0 opens the port itself; the launchers of accelerate and torch open it before any rank starts.

    The second launch's rank 1 finds the first launch at the port, and is not taken in.
    """
    endless = settings | {"steps": 100_000}
    with Launch(tmp_path / "first", endless, 2) as first:
        wait_for(first, 4)
        with Launch(tmp_path / "second", endless, 2, port=first.port) as second:
            assert second.wait(30) == [2, 2], second.said()
            lines = errors(second)
        assert len(lines) == 2
        assert re.match(rf"\[rank 0\] error: .*port:? {first.port}\b.* in use", lines[0]), lines
        wait_for(first, len(first.trained()) + 4)


# ----------------------------------------------------------------------------------------------------------------------
# Size
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(60)
def test_an_epoch_of_imagenets_size_is_planned_and_resumed_within_seconds() -> None:
    """1000 shards, 1.28 million samples, cut into 64 streams that one process enters at a step in the middle.

    Names and counts only. Processor seconds and the growth of the peak memory, in a process of its own.
    """
    program = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import json, random, re, time
import numpy as np
from data.order import EpochOrder, count_streams
from data.runs import Spec, _Run, _Shared
from data.tar import Shard, ShardSet

def peak():  # getrusage would tell of the process that started this one
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

before, start = peak(), time.process_time()
shards = tuple(Shard(f"/data/imagenet/{{number:06d}}.tar", 1281, number * 1281) for number in range(1000))
shards = ShardSet(shards, 1000 * 1281, None, None, "")
number = count_streams(1024, 8, 64)
order = EpochOrder(shards, global_batch=1024, streams=number, seed=0, epoch=3)
step = random.Random(0).randrange(order.steps)
shared = _Shared(Spec(shards, lambda epoch: order, 0, None, (224, 224), True, False, True), np.zeros(3, np.int64))
runs = [_Run(shared, order, stream, step) for stream in range(number)]
print(json.dumps([time.process_time() - start, peak() - before, number, order.steps]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50, check=True)
    seconds, mebibytes, streams, steps = json.loads(done.stdout)
    print(f"{seconds:.2f} s, {mebibytes:.0f} MiB")
    assert (streams, steps) == (64, 1250)
    assert 0 < mebibytes < 200
    assert seconds < 2
