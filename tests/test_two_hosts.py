"""Launches on two machines that are two network namespaces: what a user types, on both, and what goes wrong between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.elastic import free_port
from tests.hosts import TwoHosts, wait_for_line
from train.distill import Config, main

BIN = Path(sys.executable).parent
CPU = {
    "ACCELERATE_USE_CPU": "true",
    "OMP_NUM_THREADS": "1",
    "PATH": f"{BIN}:{os.environ['PATH']}",
    "SHIFTLENS_LOST_SECONDS": "4",
}


@pytest.fixture
def settings(tiny_shards: Path, tiny_vit: str) -> dict[str, Any]:
    return {
        "data": str(tiny_shards),
        "teacher": tiny_vit,
        "batch_size": 16,
        "steps": 160,
        "warmup_steps": 2,
        "workers": 1,
        "log_every": 1,
        "save_every": 10,
        "max_bad_fraction": 0.0,
    }


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def errors(log: Path) -> list[str]:
    return [line for line in log.read_text().splitlines() if "error: " in line and "] error: " in line]


@pytest.mark.launch
@pytest.mark.timeout(600)
def test_a_run_on_two_hosts_survives_a_cut_cable_a_power_failure_and_another_launcher(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """Five starts of one run on one or two machines; its losses are those of an unbroken run in one process.

    Machine 1 has the shards but not the run folder. Each machine's own name leads to 127.0.1.1, and machine 0 is known
    by its name alone: gloo must be told the interface.
    """
    if reason := TwoHosts.missing():
        pytest.skip(reason)
    out = tmp_path / "runs" / "run"
    flags = [part for key, value in settings.items() for part in (f"--{key}", str(value))] + ["--out", str(out)]
    port, logs = str(free_port()), [tmp_path / "host-a.log", tmp_path / "host-b.log"]

    with TwoHosts(tmp_path, hidden=out.parent) as hosts:

        def start(*more: str) -> list[subprocess.Popen]:
            launcher = [
                "train/launch/node.sh",
                "--config_file",
                "train/launch/gpu_2x8_bf16.yaml",
                "--num_processes",
                "2",
            ]
            launcher += ["--mixed_precision", "no", "--main_process_ip", "host-a", "--main_process_port", port]
            launcher += ["--rdzv_conf", "timeout=120", *more]
            return [
                hosts.start(n, [*launcher, "--machine_rank", str(n), "train/distill.py", *flags], logs[n], CPU)
                for n in (0, 1)
            ]

        # 1. The cable is pulled: both ends find out by themselves, and say so once.
        both = start()
        wait_for_line(logs[0], "step 25/", both[0])
        hosts.connect(False)
        assert [process.wait(60) for process in both] == [1, 1]
        hosts.connect(True)
        for log, lost in zip(logs, ("rank 1 on host-b", "rank 0 on host-a"), strict=True):
            assert len(errors(log)) == 1, log.read_text()
            assert f"error: {lost} is lost (" in errors(log)[0]
            assert "the same command continues from the last checkpoint" in errors(log)[0]
        assert hosts.running(0) == hosts.running(1) == []

        # 2. torchrun on one machine goes on, with two processes, until it is told to stop.
        torchrun = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2", "train/distill.py", *flags]
        single = hosts.start(0, torchrun, logs[0], CPU)
        wait_for_line(logs[0], "step 45/", single)
        single.send_signal(signal.SIGTERM)
        assert single.wait(60) != 0
        assert "continuing from" in logs[0].read_text()
        assert "stopped by signal 15: saved at step" in logs[0].read_text()

        # 3. Two again, until the power of machine 1 fails.
        both = start()
        wait_for_line(logs[0], "step 75/", both[0])
        hosts.kill_all(1)
        assert both[0].wait(60) == 1
        assert len(errors(logs[0])) == 1, logs[0].read_text()
        assert hosts.running(0) == []

        # 4. Two to the end, though a process dies: launchers may restart theirs, here once.
        both = start("--max_restarts", "1")
        wait_for_line(logs[0], "step 105/", both[0])
        (launcher,) = children(both[1].pid)
        (rank,) = children(launcher)
        os.kill(rank, signal.SIGKILL)
        assert [process.wait(240) for process in both] == [0, 0], logs[0].read_text()[-3000:]
        assert logs[0].read_text().count("continuing from") == 2

    assert [start["world"] for start in json.loads((out / "env.json").read_text())] == [2] * 5
    whole = tmp_path / "whole"
    main(Config(**settings | {"out": str(whole), "workers": 0}))
    assert len(rows(whole)) == len(rows(out)) == settings["steps"]
    for a, b in zip(rows(whole), rows(out), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5), a["step"]
