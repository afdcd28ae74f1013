"""Stream batches from shards in an order that ranks, workers and restarts do not change.

    with open_stream("shards/train", global_batch=256, workers=8, transform=TrainTransform(224)) as stream:
        for batch in stream:
            batch["image"]  # uint8 [n, 3, 224, 224], channels-last

data.order defines the order, data.runs reads and decodes, data.workers does so in parallel. This file puts the parts
of a batch together and keeps account of every record that could not be used.
"""

from __future__ import annotations

import collections
import itertools
import logging
import multiprocessing
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TypedDict

import numpy as np
import torch

from data import DataError
from data.order import EpochOrder, count_streams, global_order
from data.runs import Part, Problem, RowReader, Spec, Transform
from data.tar import ShardReader, ShardSet, find_shards
from data.transforms import ImageError, decode
from data.workers import Pool

__all__ = ["Batch", "Stream", "global_order", "open_stream"]

EXAMPLES = 5  # records kept by name for each reason

log = logging.getLogger(__name__)


class Batch(TypedDict):
    """This rank's rows of one global batch; bad records are missing, so n may be smaller than global_batch / world."""

    image: torch.Tensor  # uint8 [n, 3, H, W], channels-last memory
    label: torch.Tensor  # int64 [n]
    key: list[str]
    index: torch.Tensor  # int64 [n], global sample numbers


def open_stream(
    data: str | Sequence[str] | ShardSet,
    *,
    global_batch: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    streams: int = 64,
    seed: int = 0,
    epoch: int = 0,
    start_step: int = 0,
    transform: Transform | None = None,
    strict: bool = True,
    epochs: int | None = 1,
    max_bad_fraction: float = 0.01,
    allow_pipe: bool = False,
) -> Stream:
    """Open the batches of `epochs` epochs (None: without end), from step `start_step` of epoch `epoch` on.

    Args:
        data: shards as data.tar.find_shards takes them, or what it returned.
        global_batch: samples per step over all ranks.
        workers: decoding processes of this rank; 0 decodes in this process.
        streams: upper limit for the number of canonical streams (Stream.streams says how many there are).
        transform: bytes to uint8 [3, size, size]; None decodes only, and needs images of one size.
        strict: a shard whose number of samples differs from its count is an error; otherwise a counted loss.
        max_bad_fraction: largest share of this rank's samples of an epoch that may be unusable.

    Raises DataError (here or while reading) for everything that is wrong with the data or impossible about the numbers.
    """
    shards = data if isinstance(data, ShardSet) else find_shards(data, allow_pipe=allow_pipe)
    if not 0 <= rank < world:
        raise DataError(f"rank {rank} is not one of {world} processes")
    number = count_streams(global_batch, world, streams)
    steps = EpochOrder(shards, global_batch=global_batch, streams=number, seed=seed, epoch=epoch).steps
    if not 0 <= start_step <= steps:
        raise DataError(f"start step {start_step} is outside the epoch of {steps} steps")
    shape = _probe(shards, allow_pipe) if transform is None else (transform.size, transform.size)
    spec = Spec(shards, global_batch, number, seed, transform, shape, strict, allow_pipe)
    epochs_left = itertools.count(epoch) if epochs is None else iter(range(epoch, epoch + epochs))
    plan = ((e, step) for e in epochs_left for step in range(start_step if e == epoch else 0, steps))
    return Stream(spec, plan, steps, rank, world, _usable_workers(workers, number // world), max_bad_fraction)


class Stream:
    """One pass over batches; iterate once, and close it or use it as a context manager."""

    def __init__(
        self,
        spec: Spec,
        plan: Iterator[tuple[int, int]],
        steps: int,
        rank: int,
        world: int,
        workers: int,
        max_bad_fraction: float,
    ) -> None:
        self.shards = spec.shards
        self.num_samples = spec.shards.num_samples
        self.streams = spec.streams
        self.steps_per_epoch = steps
        rows_per_stream = spec.global_batch // spec.streams
        own = range(rank * spec.streams // world, (rank + 1) * spec.streams // world)
        self._accounts = _Accounts(max_bad_fraction * spec.shards.num_samples / world, rank)
        self._plan = plan
        self._planned: collections.deque[tuple[int, int]] = collections.deque()
        self._image_shape = (len(own) * rows_per_stream, *spec.shape, 3)
        self._pool: Pool | None = None
        self._reader: RowReader | None = None
        self._over = False
        if workers == 0:
            self._reader = RowReader(spec, own, np.full(3, 0, dtype=np.int64))
        else:
            cuts = [len(own) * worker // workers for worker in range(workers + 1)]
            blocks = [own[first:last] for first, last in itertools.pairwise(cuts)]
            self._pool = Pool(spec, blocks, rows_per_stream, rank)

    def __iter__(self) -> Stream:
        if self._over:
            raise RuntimeError("this stream is exhausted or closed; open another, or give it more epochs")
        return self

    def __next__(self) -> Batch:
        if self._over:
            raise StopIteration
        try:
            batch = self._next_from_reader() if self._pool is None else self._next_from_pool(self._pool)
        except BaseException:
            self.close()
            raise
        if batch is None:
            self.close()
            raise StopIteration
        return batch

    def _next_from_reader(self) -> Batch | None:
        planned = next(self._plan, None)
        if planned is None or self._reader is None:
            return None
        images = np.empty(self._image_shape, dtype=np.uint8)
        part = self._reader.fill(*planned, torch.from_numpy(images))
        self._accounts.add(planned, part)
        return _batch(part, images if part.present.all() else images[part.present])

    def _next_from_pool(self, pool: Pool) -> Batch | None:
        while self._planned or (planned := next(self._plan, None)) is not None:
            if not self._planned:
                self._planned.append(planned)
        return None

    def report(self) -> dict[str, object]:
        """What was delivered and what was not: see _Accounts.report."""
        return self._accounts.report()

    def close(self) -> None:
        """End the workers and close the shards; batches that were handed out stay valid."""
        self._over = True
        if self._pool is not None:
            self._pool.close()
        if self._reader is not None:
            self._reader.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
