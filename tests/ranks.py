"""Runs of a script, from its `main` or from its command line on, in processes of their own on the CPU.

Importing torch and open_clip takes longer than what a test runs, so one server process imports them once and forks the
others, which begin without the threads, signals and devices of the tests' own process.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[1]
Constants = Mapping[tuple[str, str], Any]

# What a run imports, so that no rank has to. One list for all tests: there is one server, and the first starts it.
_IMPORTS = ["accelerate.utils", "jsonargparse", "matplotlib.pyplot", "open_clip", "timm", "torch.distributed"]
_IMPORTS += ["torch._dynamo", "data.demo", "data.transforms", "data.workers", "models.convert", "models.distiller"]
_IMPORTS += ["models.encoders", "models.export", "models.initialise", "train.distill", "train.loop", "tests.elastic"]


def server() -> multiprocessing.context.ForkServerContext:
    """The context whose processes are forks of the server."""
    context = multiprocessing.get_context("forkserver")
    with _importable():
        context.set_forkserver_preload(_IMPORTS)
        multiprocessing.forkserver.ensure_running()
    return context


@contextlib.contextmanager
def _importable() -> Iterator[None]:
    """The repository is on the path of the server, which has no other way to hear of it in Python 3.11."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *([before] if before else [])])
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    yield
    del os.environ["PYTHONPATH"]
    if before is not None:
        os.environ["PYTHONPATH"] = before


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def world_of(rank: int, world: int, port: int) -> dict[str, str]:
    """What train/launch/cpu_2_processes.yaml makes the launcher set, for any number of processes."""
    environment = {"ACCELERATE_USE_CPU": "true"}
    if world > 1:
        environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        environment |= {"LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return environment


# ----------------------------------------------------------------------------------------------------------------------
# From `main` on
# ----------------------------------------------------------------------------------------------------------------------


def start(
    main: Callable[[Any], Any],
    config: Any,
    messages: Path,
    environment: Mapping[str, str] | None = None,
    constants: Constants | None = None,
) -> BaseProcess:
    """A process that runs `main(config)`; what it says on stdout and stderr goes to the file `messages`."""
    process = server().Process(
        target=_run, args=(main, config, messages, dict(environment or {}), dict(constants or {}))
    )
    process.start()
    return process


def run_two(main: Callable[[Any], Any], config: Any, folder: Path, constants: Constants | None = None) -> None:
    """`main(config)` by two ranks, as train/launch/cpu_2_processes.yaml makes them; `folder` keeps what they say."""
    port = free_port()
    said = [folder / f"rank_{rank}.txt" for rank in (0, 1)]
    ranks = [start(main, config, said[rank], world_of(rank, 2, port), constants) for rank in (0, 1)]
    try:
        for process in ranks:
            process.join(200)
        codes = [process.exitcode for process in ranks]
        assert codes == [0, 0], [codes, *(file.read_text()[-3000:] for file in said if file.exists())]
    finally:
        for process in ranks:
            process.kill()
            process.join()


def _run(
    main: Callable[[Any], Any],
    config: Any,
    messages: Path,
    environment: dict[str, str],
    constants: dict[tuple[str, str], Any],
) -> None:
    os.environ.update(environment)
    _say_to(messages)
    use(constants)
    main(config)


def use(constants: Constants) -> None:
    """Gives this process other values for constants of modules, by (module, name)."""
    for (module, name), value in constants.items():
        assert hasattr(importlib.import_module(module), name)
        setattr(importlib.import_module(module), name, value)


def _say_to(messages: Path) -> None:
    with open(messages, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


# ----------------------------------------------------------------------------------------------------------------------
# From the command line on
# ----------------------------------------------------------------------------------------------------------------------


class Script:
    """`python SCRIPT FLAGS`, or the ranks of a launch of it, without a launcher; a context that ends them all.

    Args:
        script: its file, from the repository's root.
        settings: its flags.
        folder: keeps what each rank says on stdout and stderr.
        world: number of processes.
        environment: variables beside those that a launcher sets.
        constants: by (module, name): values that the ranks use instead, for sizes that a test need not have.
    """

    def __init__(
        self,
        script: str,
        settings: Mapping[str, Any],
        folder: Path,
        *,
        world: int = 1,
        environment: Mapping[str, str] | None = None,
        constants: Constants | None = None,
    ) -> None:
        folder.mkdir(exist_ok=True)
        flags = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
        port = free_port()
        self._files = [folder / f"said_by_rank_{rank}.txt" for rank in range(world)]
        self.processes: list[BaseProcess] = []
        for rank, file in enumerate(self._files):
            file.write_text("")
            variables = {**world_of(rank, world, port), **(environment or {})}
            arguments = script, flags, file, variables, dict(constants or {})
            self.processes.append(server().Process(target=_run_script, args=arguments))
        for process in self.processes:
            process.start()

    def said(self) -> str:
        """What all ranks said, one rank after the other."""
        return "".join(file.read_text(errors="replace") for file in self._files)

    def wait_for(self, text: str, seconds: float = 60) -> None:
        """Returns when a rank has said that; fails when one has ended before."""
        end = time.monotonic() + seconds
        while text not in self.said():
            assert all(process.is_alive() for process in self.processes), self.said()
            assert time.monotonic() < end, self.said()
            time.sleep(0.01)

    def send(self, number: int) -> None:
        """A signal to all ranks, as a launcher passes it on."""
        for process in self.processes:
            assert process.pid is not None
            os.kill(process.pid, number)

    def wait(self, seconds: float = 60) -> list[int | None]:
        """Exit codes by rank, None for a rank that still runs after so many seconds."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        return [process.exitcode for process in self.processes]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def _run_script(
    script: str,
    flags: list[str],
    messages: Path,
    environment: dict[str, str],
    constants: dict[tuple[str, str], Any],
) -> None:
    import runpy

    signal.signal(signal.SIGINT, signal.default_int_handler)  # which the server ignores for itself
    os.environ.update(environment)
    _say_to(messages)
    use(constants)
    os.chdir(ROOT)
    sys.argv = [script, *flags]
    runpy.run_path(script, run_name="__main__")
