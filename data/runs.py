"""The samples of a few streams of an order, step by step: read, checked, decoded into rows of a batch.

A process without workers does this for all streams of its rank, in a thread; each worker process does it for a part of
them. Bad records leave their row empty and are reported with the batch; nothing is dropped in silence.
"""

from __future__ import annotations

import collections
import logging
import queue
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple, Protocol

import numpy as np
import torch

from data import DataError
from data.order import Order, Segment
from data.tar import LabelError, Record, RecordIndex, ShardReader, ShardSet, parse_label
from data.transforms import ImageError, decode, sample_random

STOP, SHARD, SAMPLE = range(3)  # fields of a reader's status: asked to stop, shard being read, sample being decoded
STALL_SECONDS = 30.0  # how long to wait for a batch between two log lines about it
STALL_LIMIT = 600.0  # seconds after which a reader that gives nothing is taken for dead
GRACE = 2.0  # seconds that a reader gets to end by itself

log = logging.getLogger(__name__)


class Transform(Protocol):
    """Bytes of an image file to uint8 [3, size, size], with all randomness from the given generator."""

    @property
    def size(self) -> int: ...

    def __call__(self, data: bytes, generator: Random) -> torch.Tensor: ...


@dataclass(frozen=True)
class Spec:
    """What all readers of a data set share."""

    shards: ShardSet
    order: Callable[[int], Order]  # of an epoch
    seed: int
    transform: Transform | None
    shape: tuple[int, int]  # height and width of every image
    strict: bool
    allow_pipe: bool
    keep_indexes: bool  # remember where records begin, for whoever enters a shard again

    def url_of(self, number: int) -> str:
        """The shard that holds a global sample number."""
        return next(shard.url for shard in reversed(self.shards.shards) if shard.start <= number and shard.count)

    def place(self, status: np.ndarray) -> str:
        """Where a reader of that status is: the shard that it reads, or the sample that it decodes."""
        _, shard, sample = status.tolist()
        if shard >= 0:
            return f" while reading {self.shards.shards[shard].url}"
        return f" at sample {sample} of {self.url_of(sample)}" if sample >= 0 else ""


class Problem(NamedTuple):
    """One record that could not be used (or several that nobody can reach)."""

    reason: str  # a short name that is counted
    detail: str
    url: str
    key: str
    records: int = 1


class Part(NamedTuple):
    """Some rows of a batch, without the pixels."""

    present: np.ndarray  # bool [n]
    labels: np.ndarray  # int64 [n]
    indexes: np.ndarray  # int64 [n], global sample numbers
    keys: list[str]  # n; "" where absent
    problems: list[Problem]
    notes: list[str]  # oddities that lose nothing


class StoppedError(Exception):
    """The reader was asked to stop in the middle of a batch."""


@dataclass(slots=True)
class _Sample:
    key: str
    image: bytes
    label: int
    problem: Problem | None


class RowReader:
    """Fills rows with the samples of the given streams; steps must be asked for in order.

    `status` is int64 [3] (STOP, SHARD, SAMPLE), which another process may read and set.
    """

    def __init__(self, spec: Spec, streams: Sequence[int], status: np.ndarray) -> None:
        self._spec = spec
        self._streams = streams
        self._status = status
        self._shared = _Shared(spec, status)
        self._epoch = -1
        self._runs: list[_Run] = []

    def fill(self, epoch: int, step: int, rows: torch.Tensor) -> Part:
        """Decode the samples of one step into `rows`, uint8 [n, H, W, 3]. Raises DataError, or StoppedError."""
        if epoch != self._epoch:
            self.close()
            order = self._spec.order(epoch)
            self._runs = [_Run(self._shared, order, stream, step) for stream in self._streams]
            self._epoch = epoch
        present = np.zeros(len(rows), dtype=np.bool_)
        labels = np.zeros(len(rows), dtype=np.int64)
        indexes = np.zeros(len(rows), dtype=np.int64)
        keys = [""] * len(rows)
        row = 0
        for run in self._runs:
            for number, sample in run.take():
                if self._status[STOP]:
                    raise StoppedError
                self._status[SAMPLE] = number
                problem = sample.problem or self._decode(epoch, number, sample, rows[row])
                if problem is None:
                    present[row], labels[row], keys[row] = True, sample.label, sample.key
                else:
                    self._shared.problems.append(problem)
                indexes[row] = number
                row += 1
        self._status[SAMPLE] = -1
        return Part(present, labels, indexes, keys, *self._shared.take_reports())

    def _decode(self, epoch: int, number: int, sample: _Sample, row: torch.Tensor) -> Problem | None:
        try:
            if self._spec.transform is None:
                image = decode(sample.image)
            else:
                image = self._spec.transform(sample.image, sample_random(self._spec.seed, epoch, number))
        except ImageError as error:
            return Problem("undecodable image", str(error), self._spec.url_of(number), sample.key)
        if image.shape != (3, *self._spec.shape):
            raise DataError(
                f"{self._spec.url_of(number)}, key {sample.key!r}: image of shape {tuple(image.shape)} in a batch"
                f" of {(3, *self._spec.shape)}; images of several sizes need a transform"
            )
        row.permute(2, 0, 1).copy_(image)
        return None

    def close(self) -> None:
        """Close the open shards."""
        for run in self._runs:
            run.close()
        self._runs = []
        self._epoch = -1


class ReaderThread:
    """A RowReader in a thread of this process: a read that stalls can be named and given up, but not interrupted."""

    def __init__(self, spec: Spec, streams: Sequence[int], rank: int) -> None:
        self._spec = spec
        self._rank = rank
        self._status = np.array([0, -1, -1])
        self._steps: queue.SimpleQueue[tuple[int, int, torch.Tensor] | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Part | BaseException] = queue.SimpleQueue()
        reader = RowReader(spec, streams, self._status)
        thread = threading.Thread(target=_serve, args=(reader, self._steps, self._answers), name="reader", daemon=True)
        thread.start()
        self.close = weakref.finalize(self, _end, thread, self._steps, self._status)

    def fill(self, epoch: int, step: int, rows: torch.Tensor) -> Part:
        """As RowReader.fill; also raises DataError when nothing has come for STALL_LIMIT seconds."""
        self._steps.put((epoch, step, rows))
        started = time.monotonic()
        while True:
            try:
                answer = self._answers.get(timeout=STALL_SECONDS)
            except queue.Empty:
                seconds = time.monotonic() - started
                place = self._spec.place(self._status)
                if seconds > STALL_LIMIT:
                    raise DataError(f"rank {self._rank}: the reader gave nothing for {seconds:.0f} s{place}") from None
                log.warning("rank %d waits %.0f s for its reader%s", self._rank, seconds, place)
                continue
            if isinstance(answer, BaseException):
                raise answer
            return answer


def _serve(reader: RowReader, steps: queue.SimpleQueue, answers: queue.SimpleQueue) -> None:
    """Body of the thread: fill rows until there is a None instead of a step."""
    while (step := steps.get()) is not None:
        try:
            answers.put(reader.fill(*step))
        except BaseException as error:  # it is raised where the rows were asked for
            answers.put(error)
        del step  # holds rows
    reader.close()


def _end(thread: threading.Thread, steps: queue.SimpleQueue, status: np.ndarray) -> None:
    status[STOP] = 1
    steps.put(None)
    thread.join(GRACE)


class _Shared:
    """What the runs of a reader have in common: reports that wait for the next batch, and where records begin."""

    def __init__(self, spec: Spec, status: np.ndarray) -> None:
        self.spec = spec
        self.status = status
        self.problems: list[Problem] = []
        self.notes: list[str] = []
        # Kept over epochs: without it each of 64 streams would walk through the shard in which its run begins.
        self.indexes: dict[int, RecordIndex] = collections.defaultdict(RecordIndex)

    def take_reports(self) -> tuple[list[Problem], list[str]]:
        reports = self.problems, self.notes
        self.problems, self.notes = [], []
        return reports


class _Run:
    """One stream in one epoch, from step `start` on: reads ahead only as far as its shuffled order asks."""

    def __init__(self, shared: _Shared, order: Order, stream: int, start: int) -> None:
        self._shared = shared
        self._spec = shared.spec
        self._rows = order.rows(stream)
        self._next = start * self._rows
        self._emitted = order.run(stream)
        self._numbers = order.numbers(stream, self._emitted)
        self._needed = np.zeros(int(self._emitted.max(initial=-1)) + 1, dtype=np.bool_)
        self._needed[self._emitted[self._next :]] = True
        self._held: dict[int, _Sample] = {}
        self._shard = -1
        self._reader = self._read(order.segments(stream))

    def take(self) -> Iterator[tuple[int, _Sample]]:
        """The samples of the next step with their global numbers."""
        step = slice(self._next, self._next + self._rows)
        for position, number in zip(self._emitted[step].tolist(), self._numbers[step].tolist(), strict=True):
            while position not in self._held:
                self._shared.status[SHARD] = self._shard
                at, sample = next(self._reader)
                self._held[at] = sample
            self._shared.status[SHARD] = -1
            yield number, self._held.pop(position)
        self._next += self._rows

    def close(self) -> None:
        self._reader.close()

    def _read(self, segments: Iterator[Segment]) -> Generator[tuple[int, _Sample], None, None]:
        """Needed positions in reading order, each with its sample."""
        for segment in segments:
            needed = self._needed[segment.position : segment.position + segment.length]
            places = np.flatnonzero(needed)
            if len(places) == 0:
                continue
            self._shard = segment.shard
            self._shared.status[SHARD] = segment.shard
            yield from self._read_segment(segment, needed, int(places[-1]))

    def _read_segment(self, segment: Segment, needed: np.ndarray, last: int) -> Iterator[tuple[int, _Sample]]:
        """Needed samples of neighbouring records; whoever reads a shard's last record also checks its count."""
        shard = self._spec.shards.shards[segment.shard]
        start = segment.first + int(np.argmax(needed))
        index = self._shared.indexes[segment.shard] if self._spec.keep_indexes else None
        reader = ShardReader(shard.url, allow_pipe=self._spec.allow_pipe, start=start, index=index)
        held_back: tuple[int, _Sample] | None = None
        found = np.zeros(len(needed), dtype=np.bool_)
        records = reader.read(
            lambda number: number - segment.first < len(needed) and bool(needed[number - segment.first])
        )
        for record in records:
            place = record.number - segment.first
            found[place] = True
            sample = segment.position + place, self._sample(shard.url, record)
            if record.number == shard.count - 1:
                held_back = sample  # until the end of the shard has been seen
                continue
            yield sample
            if place == last:
                records.close()
                return
        self._check_end(shard.url, shard.count, reader)
        if held_back is not None:
            yield held_back
        for place in np.flatnonzero(needed & ~found).tolist():
            lost = Problem("truncated", reader.truncated or "record is not there", shard.url, "")
            yield segment.position + place, _Sample("", b"", 0, lost)

    def _check_end(self, url: str, count: int, reader: ShardReader) -> None:
        """Compare a shard that was read to its end with its count. Raises DataError in strict mode."""
        notes = [note for note in (reader.truncated, *reader.notes) if note]
        if reader.count == count and reader.truncated is None:
            self._shared.notes += [f"{url}: {note}" for note in notes]
            return
        because = f" ({'; '.join(notes)})" if notes else ""
        if self._spec.strict:
            raise DataError(
                f"{url} holds {reader.count} samples, its index says {count}{because};"
                " write the shard again, or correct sizes.json"
            )
        self._shared.notes.append(f"{url} holds {reader.count} samples, its index says {count}{because}")
        if reader.count > count:
            extra = reader.count - count
            problem = Problem("beyond the count", f"{extra} records more than {count}", url, "", extra)
            self._shared.problems.append(problem)

    def _sample(self, url: str, record: Record) -> _Sample:
        reason, detail, label = record.problem, "", 0
        if reason is None:
            try:
                label = parse_label(record.label, self._spec.shards.num_classes)
            except LabelError as error:
                reason, detail = "bad label", str(error)
            except DataError as error:
                raise DataError(f"{url}, key {record.key!r}: {error}") from error
        problem = None if reason is None else Problem(reason, detail, url, record.key)
        return _Sample(record.key, record.image or b"", label, problem)
