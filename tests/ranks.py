"""Runs of a script's `main` in processes of their own on the CPU.

Importing torch and open_clip takes longer than what a test runs, so one server process imports them once and forks the
others, which begin without the threads, signals and devices of the tests' own process.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_IMPORTS = ["accelerate.utils", "matplotlib.pyplot", "open_clip", "timm", "torch.distributed", "torch._dynamo"]


def start(
    main: Callable[[Any], Any], config: Any, messages: Path, environment: Mapping[str, str] | None = None
) -> BaseProcess:
    """A process that runs `main(config)`; what it says on stdout and stderr goes to the file `messages`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTS)
    process = context.Process(target=_run, args=(main, config, messages, dict(environment or {})))
    process.start()
    return process


def run_two(main: Callable[[Any], Any], config: Any, folder: Path) -> None:
    """`main(config)` by two ranks, as train/launch/cpu_2_processes.yaml makes them; `folder` keeps what they say."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world |= {"ACCELERATE_USE_CPU": "true"}
    said = [folder / f"rank_{rank}.txt" for rank in (0, 1)]
    ranks = [start(main, config, said[rank], {**world, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in (0, 1)]
    try:
        for process in ranks:
            process.join(200)
        codes = [process.exitcode for process in ranks]
        assert codes == [0, 0], [codes, *(file.read_text()[-3000:] for file in said if file.exists())]
    finally:
        for process in ranks:
            process.kill()
            process.join()


def _run(main: Callable[[Any], Any], config: Any, messages: Path, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    with open(messages, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    main(config)
