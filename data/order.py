"""The order of an epoch of training (canonical streams) and of a pass, as pure arithmetic on sample numbers.

With n samples, global batch B and S streams, an epoch has n // B steps. The shards, permuted by (seed, epoch), form a
circle that is entered at a random sample, so that each epoch drops another remainder. The first steps * B samples are
cut into S equal runs. Each run is shuffled by its own small buffer, and the global batch of a step takes the same
number of samples from every run, run after run. So the order depends on (shards, B, S, seed, epoch) and on nothing
else: ranks and workers only divide the runs among themselves.

A pass for evaluation takes the samples as they stand, each once, and its last batch may be smaller.

Only raw 64-bit draws of PCG64 are used: numpy promises those never to change, unlike its `permutation` and `integers`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from data import DataError
from data.tar import ShardSet

BUFFERED = 4096  # samples that the shuffle buffers of all streams hold together

_SHARDS, _ENTRY, _BUFFER = range(3)  # what a random sequence is for


@dataclass(frozen=True)
class Segment:
    """Neighbouring records of one shard: `length` from record `first`, the run's positions from `position`."""

    shard: int
    first: int
    length: int
    position: int


class Order(Protocol):
    """What a reader asks of an order. Positions count along the segments of a stream, which are its reading order."""

    def rows(self, stream: int) -> int:
        """Samples that the stream gives to each step; the last step may get fewer."""

    def run(self, stream: int) -> np.ndarray:
        """The stream's positions in the order in which it emits them, int64."""

    def numbers(self, stream: int, positions: np.ndarray) -> np.ndarray:
        """Global sample numbers at positions of the stream."""

    def segments(self, stream: int) -> Iterator[Segment]:
        """Where the stream reads, shard by shard."""


def count_streams(global_batch: int, world: int, limit: int) -> int:
    """The largest number of streams up to `limit` that divides the global batch and is a multiple of `world`."""
    if global_batch < 1 or world < 1 or global_batch % world:
        raise DataError(f"a global batch of {global_batch} cannot be divided among {world} processes")
    for streams in range(min(limit, global_batch) // world * world, 0, -world):
        if global_batch % streams == 0:
            return streams
    raise DataError(f"up to {limit} streams: none divides the global batch of {global_batch} among {world} processes")


class EpochOrder:
    """The order of one epoch. Positions count within a run; numbers are global sample numbers."""

    def __init__(self, shards: ShardSet, *, global_batch: int, streams: int, seed: int, epoch: int) -> None:
        self.steps = shards.num_samples // global_batch
        if self.steps == 0:
            raise DataError(
                f"a global batch of {global_batch} is larger than the data set ({shards.num_samples} samples)"
            )
        if seed < 0 or epoch < 0:
            raise DataError(f"seed {seed} and epoch {epoch} must not be negative")
        self.streams = streams
        self._rows = global_batch // streams
        self.run_length = self.steps * self._rows
        self._seed = (seed, epoch)
        self._buffer = max(1, BUFFERED // streams)
        counts = np.array([shard.count for shard in shards.shards], dtype=np.int64)
        starts = np.array([shard.start for shard in shards.shards], dtype=np.int64)
        self._permuted = np.argsort(self._draws(_SHARDS, 0, len(counts)), kind="stable")
        self._counts = counts[self._permuted]
        self._starts = starts[self._permuted]
        self._ends = np.cumsum(self._counts)
        self._total = shards.num_samples
        self._entry = int(self._draws(_ENTRY, 0, 1)[0] % np.uint64(self._total))

    def _draws(self, purpose: int, stream: int, count: int) -> np.ndarray:
        """`count` raw uint64 draws that belong to one purpose of one stream."""
        sequence = np.random.SeedSequence([*self._seed, purpose, stream])
        return np.random.PCG64(sequence).random_raw(count)

    def rows(self, stream: int) -> int:
        """Samples that a stream gives to each step, the same for all."""
        return self._rows

    def run(self, stream: int) -> np.ndarray:
        """Positions in the order in which the stream emits them: int64 [steps * rows].

        A buffer is filled in reading order; a random one of its samples leaves and the next sample takes its place.
        """
        length = self.run_length
        filled = np.minimum(self._buffer, length - np.arange(length)).astype(np.uint64)
        picks = (self._draws(_BUFFER, stream, length) % filled).tolist()
        buffer = list(range(min(self._buffer, length)))
        following = len(buffer)
        emitted = []
        for pick in picks:
            emitted.append(buffer[pick])
            if following < length:
                buffer[pick] = following
                following += 1
            else:
                buffer[pick] = buffer[-1]
                buffer.pop()
        return np.array(emitted, dtype=np.int64)

    def numbers(self, stream: int, positions: np.ndarray) -> np.ndarray:
        """Global sample numbers at positions of a run."""
        absolute = (positions + stream * self.run_length + self._entry) % self._total
        place = np.searchsorted(self._ends, absolute, side="right")
        return self._starts[place] + absolute - (self._ends[place] - self._counts[place])

    def segments(self, stream: int) -> Iterator[Segment]:
        """The run of a stream in reading order, shard by shard."""
        position = 0
        while position < self.run_length:
            absolute = (position + stream * self.run_length + self._entry) % self._total
            place = int(np.searchsorted(self._ends, absolute, side="right"))
            left = int(self._ends[place]) - absolute
            length = min(left, self.run_length - position)
            yield Segment(int(self._permuted[place]), int(self._counts[place]) - left, length, position)
            position += length


class PassOrder:
    """Sample numbers as they stand, in batches; a stream gives a block of neighbouring rows of every batch.

    Positions are those in `own`, for every stream: each walks through all of the shards and reads its samples only.
    """

    def __init__(
        self, shards: ShardSet, own: range, *, batch_size: int, streams: int, chosen: np.ndarray | None = None
    ) -> None:
        """chosen: which numbers of `own`, ascending; None for all."""
        self.own = own
        self.streams = streams
        self._positions = np.arange(len(own), dtype=np.int64) if chosen is None else chosen - own.start
        self.steps = -(-len(self._positions) // batch_size)
        self._shards = shards
        self._cuts = [batch_size * stream // streams for stream in range(streams + 1)]

    def rows(self, stream: int) -> int:
        """Rows of the stream's block; the incomplete last batch fills the first blocks."""
        return self._cuts[stream + 1] - self._cuts[stream]

    def run(self, stream: int) -> np.ndarray:
        """Positions of the stream's samples, ascending: int64, `rows` for each step, fewer for the last."""
        row = np.arange(len(self._positions)) % self._cuts[-1]
        return self._positions[(self._cuts[stream] <= row) & (row < self._cuts[stream + 1])]

    def numbers(self, stream: int, positions: np.ndarray) -> np.ndarray:
        """Global sample numbers at positions."""
        return positions + self.own.start

    def segments(self, stream: int) -> Iterator[Segment]:
        """The shards of `own`, the first and the last of them in part."""
        for number, shard in enumerate(self._shards.shards):
            first, last = max(self.own.start, shard.start), min(self.own.stop, shard.start + shard.count)
            if first < last:
                yield Segment(number, first - shard.start, last - first, first - self.own.start)


def global_order(
    shards: ShardSet, *, global_batch: int, streams: int, seed: int, epoch: int, start_step: int = 0
) -> Iterator[np.ndarray]:
    """Global sample numbers, int64 [global_batch], of each step from `start_step`; needs no data.

    `streams` is the number really used (`Stream.streams`); raises DataError if it does not divide the global batch.
    """
    if streams < 1 or global_batch % streams:
        raise DataError(f"{streams} streams do not divide the global batch of {global_batch}")
    order = EpochOrder(shards, global_batch=global_batch, streams=streams, seed=seed, epoch=epoch)
    runs = [order.numbers(stream, order.run(stream)).reshape(order.steps, -1) for stream in range(streams)]
    for step in range(start_step, order.steps):
        yield np.concatenate([run[step] for run in runs])
