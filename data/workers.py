"""A pool of processes that decode into shared memory.

The batches of a rank live in a ring of slots in anonymous shared memory. Every worker decodes its rows of a batch
straight into the slot and answers with labels and keys only, so the main process never touches a pixel: what it hands
out is a view of the slot, which returns to the ring when the last reference to it dies.

Workers are forked (shards, transform and ring are inherited, nothing is pickled but small messages), run one thread
each, ignore the signals that a launcher sends to the whole group, and end when their parent does.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import mmap
import multiprocessing
import os
import signal
import struct
import time
import traceback
import weakref
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from multiprocessing.util import Finalize
from typing import NoReturn

import numpy as np
import torch

from data import DataError
from data.parallel import signal_when_parent_dies
from data.runs import GRACE, STALL_LIMIT, STALL_SECONDS, STOP, Part, RowReader, Spec, StoppedError

SLOTS = 4  # the consumer holds one batch while it asks for the next, and workers stay up to two ahead
PARENT_CHECK = 0.5  # seconds between two looks whether the parent still lives and wants us

_TASK = struct.Struct("<qqq")  # epoch, step, slot
_QUIET = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

log = logging.getLogger(__name__)


class Pool:
    """Workers for one rank. `submit` hands out steps in order, `collect` gives their parts in the same order."""

    def __init__(self, spec: Spec, blocks: Sequence[Sequence[int]], rows: Sequence[int], rank: int) -> None:
        """Fork a worker for each block of stream numbers; `rows` says how many rows of a batch each of them fills.

        Raises DataError if the memory for batches is refused.
        """
        self._spec = spec
        self._rank = rank
        bounds = np.cumsum([0, *rows])
        shape = (SLOTS, int(bounds[-1]), *spec.shape, 3)
        try:
            memory = mmap.mmap(-1, int(np.prod(shape)))
        except OSError as error:
            raise DataError(
                f"cannot reserve {np.prod(shape) / 2**30:.1f} GiB for batches ({error}); use a smaller batch"
            ) from error
        self._ring = np.frombuffer(memory, dtype=np.uint8).reshape(shape)
        self._status = np.frombuffer(mmap.mmap(-1, len(blocks) * 3 * 8), dtype=np.int64).reshape(len(blocks), 3)
        self._status[:] = (0, -1, -1)
        self._free = collections.deque(range(SLOTS))  # finalizers append from any thread
        self._submitted: collections.deque[int] = collections.deque()
        self._answers: list[collections.deque[Part]] = [collections.deque() for _ in blocks]

        context = multiprocessing.get_context("fork")
        pipes = [context.Pipe() for _ in blocks]
        self._connections = [ours for ours, _ in pipes]
        self._processes: list[ForkProcess] = []
        # A signal between the fork and the moment a worker ignores it would print a traceback: hold it back.
        masked = signal.pthread_sigmask(signal.SIG_BLOCK, _QUIET)
        try:
            for worker, block in enumerate(blocks):
                own = self._ring[:, bounds[worker] : bounds[worker + 1]]
                inherited = [end for pipe in pipes for end in pipe if end is not pipes[worker][1]]
                arguments = (spec, block, own, self._status[worker], pipes[worker][1], inherited, os.getpid())
                process = context.Process(target=_work, args=arguments, daemon=True, name=f"shiftlens data {worker}")
                process.start()
                self._processes.append(process)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, masked)
            for _, theirs in pipes:
                theirs.close()
        # multiprocessing sends SIGTERM at exit and then waits; our workers ignore it, so this has to come first.
        self.close = Finalize(self, _end, (self._processes, self._connections, self._status), exitpriority=10)

    @property
    def has_room(self) -> bool:
        """Whether a slot is free for another step."""
        return bool(self._free)

    def submit(self, epoch: int, step: int) -> None:
        """Give a step to all workers; there must be room."""
        slot = self._free.popleft()
        for worker, connection in enumerate(self._connections):
            # Plain bytes, and no exception kept as a context: a BrokenPipeError of `send` holds a pickle buffer in its
            # traceback, and CPython 3.12.1 crashes when it collects such a buffer in a cycle.
            try:
                connection.send_bytes(_TASK.pack(epoch, step, slot))
                ended = False
            except OSError:
                ended = True
            if ended:
                self._fail(worker)
        self._submitted.append(slot)

    def collect(self) -> tuple[int, list[Part]]:
        """Wait for the oldest submitted step: its slot, and the parts of all workers in row order.

        Raises DataError if a worker met one, died, or gave nothing for STALL_LIMIT seconds, RuntimeError if it failed
        otherwise.
        """
        started = time.monotonic()
        while missing := [worker for worker, answers in enumerate(self._answers) if not answers]:
            ends = [self._connections[worker] for worker in missing]
            ready = wait([*ends, *(self._processes[worker].sentinel for worker in missing)], timeout=STALL_SECONDS)
            if not ready:
                seconds = time.monotonic() - started
                if seconds > STALL_LIMIT:
                    where = self._place(missing[0])
                    raise DataError(
                        f"rank {self._rank}: data worker {missing[0]} gave nothing for {seconds:.0f} s{where}"
                    )
                self._report_stall(missing, seconds)
            for worker, end in zip(missing, ends, strict=True):
                if end in ready:
                    self._receive(worker)
                elif self._processes[worker].sentinel in ready and not end.poll():
                    self._fail(worker)
        return self._submitted.popleft(), [answers.popleft() for answers in self._answers]

    def images(self, slot: int, present: np.ndarray) -> np.ndarray:
        """The present rows of a slot, uint8 [n, H, W, 3]: a view where the ring can spare the slot, else a copy."""
        if not present.all():
            images = self._ring[slot][present]
        elif len(self._free) + len(self._submitted) < 2:  # the consumer keeps batches: leave workers their slots
            images = self._ring[slot].copy()
        else:
            images = self._ring[slot]
            weakref.finalize(images, self._free.append, slot).atexit = False
            return images
        self._free.append(slot)
        return images

    def _receive(self, worker: int) -> None:
        try:
            answer = self._connections[worker].recv()
        except (EOFError, OSError):
            self._fail(worker)
        if isinstance(answer, Part):
            self._answers[worker].append(answer)
        elif isinstance(answer, DataError):
            raise answer
        else:
            raise RuntimeError(f"data worker {worker} of rank {self._rank} failed{self._place(worker)}:\n{answer}")

    def _fail(self, worker: int) -> NoReturn:
        # A worker that met an error said so before it ended: its reason is better than its end.
        with contextlib.suppress(EOFError, OSError):
            while self._connections[worker].poll():
                if isinstance(answer := self._connections[worker].recv(), DataError):
                    raise answer
        process = self._processes[worker]
        process.join(1)
        code = process.exitcode
        if code is not None and code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
            how += " (out of memory?)" if code == -signal.SIGKILL else ""
        else:
            how = f"ended with exit code {code}"
        raise DataError(f"data worker {worker} of rank {self._rank} {how}{self._place(worker)}")

    def _place(self, worker: int) -> str:
        return self._spec.place(self._status[worker])

    def _report_stall(self, workers: Sequence[int], seconds: float) -> None:
        for worker in workers:
            log.warning("rank %d waits %.0f s for data worker %d%s", self._rank, seconds, worker, self._place(worker))


def _end(processes: Sequence[ForkProcess], connections: Sequence[Connection], status: np.ndarray) -> None:
    """End all workers: ask, wait a little, then kill."""
    status[:, STOP] = 1
    for connection in connections:
        connection.close()
    deadline = time.monotonic() + GRACE
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()


def _work(
    spec: Spec,
    streams: Sequence[int],
    rows: np.ndarray,
    status: np.ndarray,
    connection: Connection,
    inherited: Sequence[Connection],
    parent: int,
) -> None:
    """Body of a worker process: fill rows of the asked slots until told to stop."""
    for number in _QUIET:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _QUIET)
    signal_when_parent_dies(signal.SIGKILL)  # a worker that hangs in a read cannot look whether its parent lives
    for end in inherited:
        end.close()  # or the death of the parent would never show as the end of our pipe
    torch.set_num_threads(1)
    reader = RowReader(spec, streams, status)
    ring = torch.from_numpy(rows)
    # A broken pipe means that the parent closed the stream or is gone: nobody is left to tell.
    with contextlib.closing(reader), contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        answer: Part | DataError | str | None = None
        while answer is None or isinstance(answer, Part):
            while not connection.poll(PARENT_CHECK):
                # The end of our pipe may stay open in the workers of a pool that was forked later.
                if os.getppid() != parent or status[STOP]:
                    return
            epoch, step, slot = _TASK.unpack(connection.recv_bytes())
            answer = _answer(reader, epoch, step, ring[slot])
            connection.send(answer)


def _answer(reader: RowReader, epoch: int, step: int, rows: torch.Tensor) -> Part | DataError | str:
    """Fill a step's rows; a failure comes back as DataError, or as the text of another traceback."""
    try:
        return reader.fill(epoch, step, rows)
    except StoppedError as error:
        raise BrokenPipeError from error
    except DataError as error:
        return DataError(str(error))  # a plain one: subclasses may not survive being pickled
    except Exception:
        return traceback.format_exc()
