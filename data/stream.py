"""Batches from shards, for training and for evaluation, in an order that ranks, workers and restarts do not change.

    with open_stream("shards/train", global_batch=256, workers=8, transform=TrainTransform(224)) as stream:
        for batch in stream:
            batch["image"]  # uint8 [n, 3, 224, 224], channels-last

    with open_pass("shards/val", batch_size=256, workers=8, transform=EvalTransform(224)) as batches:
        ...  # every sample once, in the order of the shards; the last batch may be smaller

data.order defines the order, data.runs reads and decodes, data.workers does so in parallel. This file puts the parts
of a batch together and keeps account of every record that could not be used.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import logging
import multiprocessing
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypedDict

import numpy as np
import torch

from data import DataError
from data.order import EpochOrder, Order, PassOrder, count_streams, global_order
from data.runs import Part, Problem, ReaderThread, Spec, Transform
from data.tar import ShardReader, ShardSet, find_shards
from data.transforms import ImageError, decode

if TYPE_CHECKING:  # needs fork, so it is imported only where workers are asked for
    from data.workers import Pool

__all__ = ["Batch", "Pass", "Stream", "global_order", "open_pass", "open_stream"]

EXAMPLES = 5  # bad records kept by name, and logged, for each reason
PROBED = 100  # records tried to learn the size of images without a transform

log = logging.getLogger(__name__)


class Batch(TypedDict):
    """This rank's rows of one batch; bad records are missing, so n may be smaller than was asked for."""

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
        only: numbers of the samples to read, int64, ascending; the others are passed over undecoded. None: all.
        strict: a shard whose number of samples differs from its count is an error; otherwise a counted loss.
        max_bad_fraction: largest share of this rank's samples of an epoch that may be unusable. A local batch without
            a single usable sample is an error whatever the share.

    Raises DataError (here or while reading) for everything that is wrong with the data or impossible about the numbers.
    """
    shards = data if isinstance(data, ShardSet) else find_shards(data, allow_pipe=allow_pipe)
    _check_rank(rank, world)
    number = count_streams(global_batch, world, streams)

    def order(epoch: int) -> EpochOrder:
        return EpochOrder(shards, global_batch=global_batch, streams=number, seed=seed, epoch=epoch)

    first = order(epoch)
    steps = first.steps
    if not 0 <= start_step <= steps:
        raise DataError(f"start step {start_step} is outside the epoch of {steps} steps")
    shape = _probe(shards, allow_pipe) if transform is None else (transform.size, transform.size)
    spec = Spec(shards, order, seed, transform, shape, strict, allow_pipe, keep_indexes=True)
    epochs_left = itertools.count(epoch) if epochs is None else iter(range(epoch, epoch + epochs))
    plan = ((e, step) for e in epochs_left for step in range(start_step if e == epoch else 0, steps))
    own = range(rank * number // world, (rank + 1) * number // world)
    workers = _usable_workers(workers)
    if workers > len(own):
        log.warning("%d workers for %d streams of this rank: using %d", workers, len(own), len(own))
        workers = len(own)
    accounts = _Accounts(max_bad_fraction * shards.num_samples / world, rank, training=True)
    return Stream(spec, first, own, plan, accounts, rank=rank, workers=workers)


def open_pass(
    data: str | Sequence[str] | ShardSet,
    *,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    transform: Transform | None = None,
    start: int = 0,
    only: np.ndarray | None = None,
    strict: bool = True,
    max_bad_fraction: float = 0.0,
    allow_pipe: bool = False,
) -> Pass:
    """Open one pass over a data set: every sample once, in the order of the shards, from batch `start` of this rank on.

    Of n samples, rank r has those from n * r // world up to n * (r + 1) // world; it may have none.

    Args:
        data: shards as data.tar.find_shards takes them, or what it returned.
        batch_size: samples per batch of this rank; its last batch holds the rest.
        workers: decoding processes of this rank; 0 decodes in this process. Each passes over what the others decode:
            next to nothing for shards on disk, but over http every worker receives all bytes of the rank.
        transform: bytes to uint8 [3, size, size]; None decodes only, and needs images of one size.
        strict: a shard whose number of samples differs from its count is an error; otherwise a counted loss.
        max_bad_fraction: largest share of this rank's samples that may be unusable. Within it a bad record is missing
            from its batch (which may leave it empty) and counted in `report`; beyond it an error names the first.

    Raises DataError (here or while reading) for everything that is wrong with the data or impossible about the numbers.
    """
    shards = data if isinstance(data, ShardSet) else find_shards(data, allow_pipe=allow_pipe)
    _check_rank(rank, world)
    if batch_size < 1:
        raise DataError(f"a batch of {batch_size} samples; give at least 1")
    chosen: np.ndarray | None = None
    if only is None:
        own = range(shards.num_samples * rank // world, shards.num_samples * (rank + 1) // world)
        samples = len(own)
    else:
        if len(only) and not (only[0] >= 0 and only[-1] < shards.num_samples and (np.diff(only) > 0).all()):
            raise DataError(f"samples to read must be ascending numbers below {shards.num_samples}")
        chosen = only[len(only) * rank // world : len(only) * (rank + 1) // world]
        own = range(int(chosen[0]), int(chosen[-1]) + 1) if len(chosen) else range(0)
        samples = len(chosen)
    batch_size = max(1, min(batch_size, samples))
    workers = min(_usable_workers(workers), batch_size, samples)
    order = PassOrder(shards, own, batch_size=batch_size, streams=max(1, workers), chosen=chosen)
    if not 0 <= start <= order.steps:
        raise DataError(f"start batch {start} is outside the {order.steps} batches of rank {rank}")
    shape = _probe(shards, allow_pipe) if transform is None else (transform.size, transform.size)
    spec = Spec(shards, lambda epoch: order, 0, transform, shape, strict, allow_pipe, keep_indexes=False)
    accounts = _Accounts(max_bad_fraction * samples, rank, training=False)
    return Pass(spec, order, start, accounts, rank=rank, workers=workers)


class _Batches:
    """Batches of one rank as planned; iterate once, and close it or use it as a context manager."""

    def __init__(
        self,
        spec: Spec,
        order: Order,
        streams: range,
        plan: Iterator[tuple[int, int]],
        accounts: _Accounts,
        *,
        rank: int,
        workers: int,
    ) -> None:
        """Some streams of an order at the (epoch, step) of a plan, divided among at most as many workers."""
        self.shards = spec.shards
        self.num_samples = spec.shards.num_samples
        self._accounts = accounts
        self._plan = plan
        self._planned: collections.deque[tuple[int, int]] = collections.deque()
        self._image_shape = (sum(map(order.rows, streams)), *spec.shape, 3)
        self._pool: Pool | None = None
        self._reader: ReaderThread | None = None
        self._over = False
        if workers == 0:
            self._reader = ReaderThread(spec, streams, rank)
        else:
            from data.workers import Pool

            cuts = [len(streams) * worker // workers for worker in range(workers + 1)]
            blocks = [streams[first:last] for first, last in itertools.pairwise(cuts)]
            self._pool = Pool(spec, blocks, [sum(map(order.rows, block)) for block in blocks], rank)

    def __iter__(self) -> Self:
        if self._over:
            raise RuntimeError("exhausted or closed; open another, or ask for more epochs")
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
        with torch.inference_mode(False):  # the thread that fills them is not in the caller's inference mode
            rows = torch.from_numpy(images)
        part = self._reader.fill(*planned, rows)
        self._accounts.add(planned, part)
        return _batch(part, images if part.present.all() else images[part.present])

    def _next_from_pool(self, pool: Pool) -> Batch | None:
        while pool.has_room and (planned := next(self._plan, None)) is not None:
            pool.submit(*planned)
            self._planned.append(planned)
        if not self._planned:
            return None
        slot, parts = pool.collect()
        part = _joined(parts)
        self._accounts.add(self._planned.popleft(), part)
        return _batch(part, pool.images(slot, part.present))

    def report(self) -> dict[str, object]:
        """Samples delivered to this rank so far, bad records in all and by reason, and the first of each by name."""
        return self._accounts.report()

    def close(self) -> None:
        """End the workers and close the shards; batches that were handed out stay valid."""
        self._over = True
        if self._pool is not None:
            self._pool.close()
        if self._reader is not None:
            self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Stream(_Batches):
    """Batches for training; `streams` and `steps_per_epoch` belong in a checkpoint, beside the epoch and the step."""

    def __init__(
        self,
        spec: Spec,
        order: EpochOrder,
        streams: range,
        plan: Iterator[tuple[int, int]],
        accounts: _Accounts,
        *,
        rank: int,
        workers: int,
    ) -> None:
        super().__init__(spec, order, streams, plan, accounts, rank=rank, workers=workers)
        self.streams = order.streams
        self.steps_per_epoch = order.steps


class Pass(_Batches):
    """Batches for evaluation: every sample once.

    `own` is the range of this rank's global sample numbers, `len` the number of its batches from the start asked for.
    """

    def __init__(
        self, spec: Spec, order: PassOrder, start: int, accounts: _Accounts, *, rank: int, workers: int
    ) -> None:
        plan = ((0, step) for step in range(start, order.steps))
        super().__init__(spec, order, range(order.streams), plan, accounts, rank=rank, workers=workers)
        self.own = order.own
        self._batches = order.steps - start

    def __len__(self) -> int:
        return self._batches


class _Accounts:
    """Counts what this rank delivered and what it could not, and stops the run when that is too much."""

    def __init__(self, limit: float, rank: int, *, training: bool) -> None:
        self._limit = limit  # bad records allowed in an epoch
        self._rank = rank
        self._training = training
        self._epoch = -1
        self._bad_in_epoch = 0
        self._samples = 0
        self._reasons: collections.Counter[str] = collections.Counter()
        self._examples: dict[str, list[str]] = collections.defaultdict(list)
        self._notes: set[str] = set()

    def add(self, planned: tuple[int, int], part: Part) -> None:
        epoch, step = planned
        if epoch != self._epoch:
            self._epoch, self._bad_in_epoch = epoch, 0
        for note in part.notes:
            if note not in self._notes:
                self._notes.add(note)
                log.warning("%s", note)
        for problem in part.problems:
            self._add_problem(problem)
        self._samples += int(part.present.sum())
        reasons = ", ".join(f"{count} {reason}" for reason, count in self._reasons.most_common())
        first = next(iter(self._examples.values()), [""])[0]
        if self._training and not part.present.any():
            raise DataError(
                f"rank {self._rank}: all samples of step {step}, epoch {epoch} are bad ({reasons}); first: {first}"
            )
        if self._bad_in_epoch > self._limit:
            span = f" in epoch {epoch}" if self._training else ""
            raise DataError(
                f"rank {self._rank}: {self._bad_in_epoch} bad records{span} exceed max_bad_fraction"
                f" ({self._limit:.1f} records); so far {reasons}; first: {first}"
            )

    def _add_problem(self, problem: Problem) -> None:
        self._bad_in_epoch += problem.records
        self._reasons[problem.reason] += problem.records
        count, examples = self._reasons[problem.reason], self._examples[problem.reason]
        named = f"{problem.url}, key {problem.key!r}: {problem.detail or problem.reason}"
        if len(examples) < EXAMPLES:
            examples.append(named)
            log.warning("bad record: %s", named)
        elif count & (count - 1) == 0:  # a power of two: ever rarer
            log.warning("bad record: %s (%d by now)", named, count)

    def report(self) -> dict[str, object]:
        return {
            "samples": self._samples,
            "bad": sum(self._reasons.values()),
            "reasons": dict(self._reasons),
            "examples": {reason: list(names) for reason, names in self._examples.items()},
        }


def _joined(parts: Sequence[Part]) -> Part:
    return Part(
        present=np.concatenate([part.present for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
        indexes=np.concatenate([part.indexes for part in parts]),
        keys=[key for part in parts for key in part.keys],
        problems=[problem for part in parts for problem in part.problems],
        notes=[note for part in parts for note in part.notes],
    )


def _batch(part: Part, images: np.ndarray) -> Batch:
    """Present rows only; `images` uint8 [n, H, W, 3] already holds no others."""
    return Batch(
        image=torch.from_numpy(images).permute(0, 3, 1, 2),
        label=torch.from_numpy(part.labels[part.present]),
        key=list(itertools.compress(part.keys, part.present)),
        index=torch.from_numpy(part.indexes[part.present]),
    )


def _check_rank(rank: int, world: int) -> None:
    if not 0 <= rank < world:
        raise DataError(f"rank {rank} is not one of {world} processes")


def _usable_workers(workers: int) -> int:
    """The number of workers, or none where processes cannot be forked. Raises DataError if it is negative."""
    if workers < 0:
        raise DataError(f"{workers} workers; give 0 to decode in this process, or more")
    if workers and "fork" not in multiprocessing.get_all_start_methods():
        log.warning("this system cannot fork processes: decoding in the main process instead of %d workers", workers)
        return 0
    return workers


def _probe(shards: ShardSet, allow_pipe: bool) -> tuple[int, int]:
    """Height and width of the first image that decodes."""
    records = (record for shard in shards.shards for record in ShardReader(shard.url, allow_pipe=allow_pipe).read())
    with contextlib.closing(records):
        for record in itertools.islice(records, PROBED):
            with contextlib.suppress(ImageError):
                _, height, width = decode(record.image or b"").shape
                return height, width
    raise DataError(f"none of the first records of {shards.shards[0].url} holds an image that can be decoded")
