"""One task a shard, over several processes: used to write shards and to check them.

Shards are dealt out in turn, so no queue is needed: worker w of k takes every k-th number. A worker that dies is an
error at once, and no worker outlives its parent for long.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import sys
import time
import traceback
from collections.abc import Callable, Generator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from tqdm import tqdm

from data import DataError

Result = TypeVar("Result")
Count = Callable[[int], None]
LINE_SECONDS = 10.0  # between two progress lines where there is no terminal
REPORT_SECONDS = 0.2  # between two reports of a worker


def signal_when_parent_dies(number: int) -> None:
    """This process gets signal `number` when the thread that started it ends, on Linux; 0: none from now on."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG


class Progress:
    """A bar of samples on stderr; a line each ten seconds when that is no terminal. Nothing for work done at once."""

    def __init__(self, description: str, total: int, done: int = 0) -> None:
        self._description, self._total, self._done = description, total, done
        self._start = self._said = time.monotonic()
        self._at_start = done
        self._bar = tqdm(
            desc=description, total=total, initial=done, unit=" images", delay=1, disable=not sys.stderr.isatty()
        )

    def add(self, count: int) -> None:
        """Count samples as done."""
        self._bar.update(count)
        self._done += count
        now = time.monotonic()
        if self._bar.disable and now - self._said >= LINE_SECONDS:
            self._said = now
            rate = (self._done - self._at_start) / (now - self._start)
            left = (self._total - self._done) / rate if rate else float("inf")
            numbers = f"{self._done:,} of {self._total:,} images, {rate:,.0f} images/s, {left:,.0f} s left"
            print(f"{self._description}: {numbers}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the bar."""
        self._bar.close()


def run_tasks(
    task: Callable[[int, Count], Result], numbers: Sequence[int], *, workers: int, count: Count
) -> Generator[tuple[int, Result], None, None]:
    """Yield (number, task(number, count)) as they are finished, in any order.

    The task calls the `count` it is given with the samples it has done; they arrive at `count` here. With one worker
    the tasks run in this process. A DataError of a task is raised here; closing the iterator ends the workers.
    """
    if workers == 1 or len(numbers) <= 1:
        for number in numbers:
            yield number, task(number, count)
        return
    processes: dict[Connection, Any] = {}
    try:
        for worker in range(min(workers, len(numbers))):
            receiving, sending = multiprocessing.Pipe(duplex=False)
            process = multiprocessing.Process(
                target=_serve, args=(sending, task, numbers[worker::workers]), daemon=True
            )
            process.start()
            sending.close()
            processes[receiving] = process
        while processes:
            for connection in wait(list(processes)):
                assert isinstance(connection, Connection)
                try:
                    kind, *content = connection.recv()
                except EOFError:  # the worker is gone without a word
                    processes[connection].join()
                    raise DataError(f"a worker process died ({_cause(processes[connection].exitcode)})") from None
                if kind == "count":
                    count(content[0])
                elif kind == "result":
                    yield content[0], content[1]
                elif kind == "bad data":
                    raise DataError(content[0])
                elif kind == "crash":
                    raise RuntimeError(f"a worker process failed:\n{content[0]}")
                else:  # "end"
                    processes.pop(connection).join()
    finally:
        for process in processes.values():
            process.terminate()
            process.join()


def _serve(connection: Connection, task: Callable, numbers: Sequence[int]) -> None:
    """Run a worker's share of the tasks and report through the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent decides
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # unwinds, so that a half-written shard is removed
    waiting, said = 0, time.monotonic()

    def count(done: int) -> None:
        nonlocal waiting, said
        waiting += done
        if time.monotonic() - said >= REPORT_SECONDS:
            parent = multiprocessing.parent_process()
            if parent is None or not parent.is_alive():
                sys.exit(1)
            connection.send(("count", waiting))
            waiting, said = 0, time.monotonic()

    with contextlib.suppress(BrokenPipeError):
        try:
            for number in numbers:
                connection.send(("result", number, task(number, count)))
                connection.send(("count", waiting))
                waiting = 0
            connection.send(("end",))
        except DataError as error:
            connection.send(("bad data", str(error)))
        except Exception:
            connection.send(("crash", traceback.format_exc()))


def _cause(code: int | None) -> str:
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}; short of memory?"
    return f"exit code {code}"
