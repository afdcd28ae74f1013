"""Streams: one global order for all ranks, workers and restarts; accounts of bad records; worker processes that end."""

from __future__ import annotations

import gc
import hashlib
import io
import itertools
import json
import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data import DataError
from data.order import BUFFERED, EpochOrder, count_streams
from data.stream import Batch, global_order, open_stream
from data.tar import Shard, ShardSet, find_shards
from data.transforms import EvalTransform, ImageError, TrainTransform, sample_random

ROOT = Path(__file__).resolve().parents[1]
Members = list[tuple[str, bytes]]


@dataclass(frozen=True)
class Fingerprint:
    """A transform whose pixels tell which bytes it was given and what it drew."""

    size: int = 2

    def __call__(self, data: bytes, generator: Random) -> torch.Tensor:
        if data == b"bad":
            raise ImageError("not an image")
        digest = hashlib.sha256(data).digest()[:6] + generator.randbytes(6)
        return torch.frombuffer(bytearray(digest), dtype=torch.uint8).reshape(3, 2, 2)


def write_tar(path: Path, members: Members) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def samples(number: int, count: int) -> Members:
    """Members of shard `number`: image bytes and labels that name the sample."""
    names = [(f"{number}-{sample:04d}", sample % 10) for sample in range(count)]
    return [m for key, label in names for m in ((f"{key}.jpg", key.encode()), (f"{key}.cls", b"%d" % label))]


def write_set(folder: Path, counts: Iterable[int], *, num_classes: int | None = None) -> str:
    folder.mkdir(exist_ok=True)
    sizes = {f"{number:03d}.tar": count for number, count in enumerate(counts)}
    for number, (name, count) in enumerate(sizes.items()):
        write_tar(folder / name, samples(number, count))
    (folder / "sizes.json").write_text(json.dumps(sizes))
    if num_classes is not None:
        (folder / "_info.json").write_text(json.dumps({"num_classes": num_classes}))
    return str(folder)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, ...], str]:
    """Shard folders by their counts, written when first asked for."""
    base = tmp_path_factory.mktemp("sets")

    class Sets(dict[tuple[int, ...], str]):
        def __missing__(self, counts: tuple[int, ...]) -> str:
            self[counts] = write_set(base / "-".join(map(str, counts)), counts)
            return self[counts]

    return Sets()


def rows(batches: Iterable[Batch]) -> list[list[tuple[int, str, int, bytes]]]:
    """Batches as comparable rows: (index, key, label, pixels)."""
    return [
        [
            (index, key, label, image.numpy().tobytes())
            for index, key, label, image in zip(
                batch["index"].tolist(), batch["key"], batch["label"].tolist(), batch["image"], strict=True
            )
        ]
        for batch in batches
    ]


def expected(shards: ShardSet, order: Iterable[np.ndarray], seed: int, epoch: int) -> list:
    """What the rows of an epoch must be, computed from the order alone."""
    steps = []
    for numbers in order:
        step = []
        for number in numbers.tolist():
            at = max(i for i, shard in enumerate(shards.shards) if shard.start <= number and shard.count)
            record = number - shards.shards[at].start
            key = f"{at}-{record:04d}"
            image = Fingerprint()(key.encode(), sample_random(seed, epoch, number))
            step.append((number, key, record % 10, image.numpy().tobytes()))
        steps.append(step)
    return steps


def children() -> set[int]:
    return {int(pid) for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()}


@pytest.fixture(autouse=True)
def _no_child_survives() -> Iterator[None]:
    before = children()
    yield
    gc.collect()
    assert children() <= before


# ---------------------------------------------------------------------------------------------------------------------
# Order
# ---------------------------------------------------------------------------------------------------------------------


@given(st.data())
@settings(max_examples=60)
def test_every_division_gives_the_same_sequence(sets: dict[tuple[int, ...], str], draw: st.DataObject) -> None:
    """(world, workers) and restarts change nothing: keys, order, labels, pixels and augmentation."""
    counts = draw.draw(st.sampled_from([(40,), (7, 1, 0, 12), (3, 3, 3, 3, 3, 3, 3), (1, 30, 2), (9, 8)]))
    world = draw.draw(st.sampled_from([1, 2, 3, 4]))
    global_batch = world * draw.draw(st.integers(1, max(1, sum(counts) // world // 2)))
    limit = draw.draw(st.sampled_from([64, 4, 12]))
    if limit < world:
        limit = world
    workers = draw.draw(st.sampled_from([0] * 8 + [1, 2]))  # each rank starts its own, which takes most of the time
    seed, epoch = draw.draw(st.integers(0, 2**40)), draw.draw(st.integers(0, 300))
    shards = find_shards(sets[counts])
    streams = count_streams(global_batch, world, limit)
    order = list(global_order(shards, global_batch=global_batch, streams=streams, seed=seed, epoch=epoch))
    start = draw.draw(st.integers(0, len(order)))
    options: dict[str, Any] = {
        "seed": seed,
        "epoch": epoch,
        "streams": limit,
        "transform": Fingerprint(),
        "workers": workers,
    }

    numbers = np.concatenate(order)
    assert len(numbers) == len(set(numbers.tolist())) == shards.num_samples // global_batch * global_batch
    assert set(numbers.tolist()) <= set(range(shards.num_samples))
    ranks = []
    for rank in range(world):
        with open_stream(
            shards, global_batch=global_batch, rank=rank, world=world, start_step=start, **options
        ) as stream:
            assert stream.streams == streams
            assert stream.steps_per_epoch == len(order)
            ranks.append(rows(stream))
    together = [list(itertools.chain(*parts)) for parts in zip(*ranks, strict=True)]
    assert together == expected(shards, order[start:], seed, epoch)
    tail = global_order(shards, global_batch=global_batch, streams=streams, seed=seed, epoch=epoch, start_step=start)
    assert [batch.tolist() for batch in tail] == [batch.tolist() for batch in order[start:]]


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_follow_each_other(sets: dict[tuple[int, ...], str], workers: int) -> None:
    shards = find_shards(sets[7, 1, 0, 12])
    options: dict[str, Any] = {"global_batch": 4, "transform": Fingerprint(), "seed": 3}
    alone = [rows(open_stream(shards, epoch=epoch, **options)) for epoch in (5, 6, 7)]
    assert alone[0] != alone[1] != alone[2]
    with open_stream(shards, epoch=5, epochs=3, start_step=2, workers=workers, **options) as stream:
        assert rows(stream) == alone[0][2:] + alone[1] + alone[2]
    with open_stream(shards, epoch=5, epochs=None, start_step=5, workers=workers, **options) as stream:
        endless = iter(stream)
        assert rows(next(endless) for _ in range(10)) == alone[1] + alone[2]


def test_the_order_never_changes() -> None:
    """A literal: a checkpoint of today resumes next year."""
    order = global_order(make_set(5, 3, 8), global_batch=4, streams=2, seed=1, epoch=2)
    assert [batch.tolist() for batch in order] == [[13, 6, 4, 10], [7, 5, 9, 2], [14, 0, 11, 3], [15, 12, 1, 8]]


def make_set(*counts: int) -> ShardSet:
    starts = np.cumsum([0, *counts]).tolist()
    shards = tuple(Shard(str(n), c, s) for n, (c, s) in enumerate(zip(counts, starts, strict=False)))
    return ShardSet(shards, starts[-1], None, None, "")


def test_remainder_and_order_differ_between_epochs() -> None:
    """Even with one shard, no sample is left out for ever and none stays in place."""
    seen: set[int] = set()
    orders = set()
    for epoch in range(40):
        batches = list(global_order(make_set(10), global_batch=4, streams=4, seed=0, epoch=epoch))
        numbers = tuple(np.concatenate(batches).tolist())
        assert len(set(numbers)) == 8
        seen |= set(numbers)
        orders.add(numbers)
    assert seen == set(range(10))
    assert len(orders) > 30  # of 10 entries times the orders of four pairs


def test_shuffle_buffer_is_bounded_and_mixes() -> None:
    order = EpochOrder(make_set(*[1000] * 40), global_batch=256, streams=64, seed=0, epoch=0)
    size = BUFFERED // 64
    emitted = order.run(7)
    assert sorted(emitted.tolist()) == list(range(order.run_length))
    # Before emission t, at most positions up to t + size - 1 have been read.
    assert (emitted - np.arange(len(emitted))).max() == size - 1
    assert np.abs(emitted - np.arange(len(emitted))).mean() > size / 4
    segments = list(order.segments(7))
    assert sum(segment.length for segment in segments) == order.run_length
    walked = [1000 * s.shard + s.first + i for s in segments for i in range(s.length)]
    assert walked == order.numbers(7, np.arange(order.run_length)).tolist()


def test_resuming_decodes_only_what_is_left(sets: dict[tuple[int, ...], str]) -> None:
    decoded = []

    @dataclass(frozen=True)
    class Counting(Fingerprint):
        def __call__(self, data: bytes, generator: Random) -> torch.Tensor:
            decoded.append(data)
            return super().__call__(data, generator)

    batches = rows(open_stream(sets[40,], global_batch=4, transform=Counting(), start_step=8))
    assert [data.decode() for data in decoded] == [key for step in batches for _, key, _, _ in step]
    assert len(decoded) == 8


@pytest.mark.parametrize(
    ("global_batch", "world", "limit", "streams"),
    [
        (256, 1, 64, 64),
        (256, 8, 64, 64),
        (192, 3, 64, 48),
        (100, 1, 64, 50),
        (7, 1, 64, 7),
        (12, 4, 64, 12),
        (8, 4, 5, 4),
    ],
)
def test_number_of_streams(global_batch: int, world: int, limit: int, streams: int) -> None:
    assert count_streams(global_batch, world, limit) == streams


# ---------------------------------------------------------------------------------------------------------------------
# What comes out
# ---------------------------------------------------------------------------------------------------------------------


def jpeg(size: tuple[int, int], level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (level, level, level)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize("workers", [0, 1])
def test_images_without_a_transform(tmp_path: Path, workers: int) -> None:
    write_tar(
        tmp_path / "a.tar", [m for n in range(6) for m in ((f"{n}.jpg", jpeg((5, 3), 40 * n)), (f"{n}.cls", b"0"))]
    )
    (batch,) = open_stream(str(tmp_path / "a.tar"), global_batch=6, workers=workers)
    assert batch["image"].shape == (6, 3, 3, 5)
    assert batch["image"].dtype == torch.uint8
    assert batch["image"].is_contiguous(memory_format=torch.channels_last)
    assert (batch["label"].dtype, batch["index"].dtype) == (torch.int64, torch.int64)
    levels = batch["image"].float().mean((1, 2, 3)).round()
    assert levels.tolist() == [40.0 * index for index in batch["index"].tolist()]
    write_tar(tmp_path / "b.tar", [("x.jpg", jpeg((5, 4), 0)), ("x.cls", b"0")])
    with pytest.raises(DataError, match=r"b.tar, key 'x': image of shape \(3, 4, 5\) .* need a transform"):
        list(open_stream(str(tmp_path / "*.tar"), global_batch=7, workers=workers))


def test_collected_batches_keep_their_pixels(sets: dict[tuple[int, ...], str]) -> None:
    """list(stream) holds more batches than the ring has slots; so does a consumer that keeps one in three."""
    options: dict[str, Any] = {"global_batch": 2, "transform": Fingerprint(), "epochs": 2}
    plain = rows(open_stream(sets[40,], **options))
    assert rows(list(open_stream(sets[40,], workers=2, **options))) == plain
    kept, memory = [], set()
    with open_stream(sets[40,], workers=2, **options) as stream:
        for number, batch in enumerate(stream):
            memory.add(batch["image"].data_ptr())
            if number % 3 == 0:
                kept.append(batch["image"][:1])  # a view keeps the slot, too
    assert [image.numpy().tobytes() for image in kept] == [step[0][3] for step in plain[::3]]


def test_a_plain_loop_copies_nothing(sets: dict[tuple[int, ...], str]) -> None:
    from data.workers import SLOTS

    with open_stream(sets[40,], workers=1, global_batch=4, transform=Fingerprint(), epochs=3) as stream:
        addresses = [batch["image"].data_ptr() for batch in stream]
    assert len(addresses) == 30
    assert len(set(addresses)) <= SLOTS
    assert {b - a for a, b in itertools.pairwise(sorted(set(addresses)))} == {4 * 3 * 2 * 2}


def test_real_photographs(shared_data: Path, tmp_path: Path) -> None:
    with tarfile.open(shared_data / "imagenet_sample_500.tar") as archive:
        images = [archive.extractfile(m).read() for m in archive.getmembers()[:48] if m.isfile()]  # type: ignore[union-attr]
    for shard in range(3):
        members = [(f"{n}.{e}", c) for n in range(shard, 48, 3) for e, c in (("jpg", images[n]), ("cls", b"%d" % n))]
        write_tar(tmp_path / f"{shard}.tar", members)
    for transform in (TrainTransform(64), EvalTransform(64)):
        plain = rows(open_stream(str(tmp_path), global_batch=16, transform=transform))
        assert sorted(label for step in plain for _, _, label, _ in step) == list(range(48))
        assert all(int(key) == label for step in plain for _, key, label, _ in step)
        assert rows(open_stream(str(tmp_path), global_batch=16, transform=transform, workers=2)) == plain


def test_remote_and_piped_shards_give_the_same(sets: dict[tuple[int, ...], str]) -> None:
    import fsspec

    folder = Path(sets[9, 8])
    options: dict[str, Any] = {"global_batch": 5, "transform": Fingerprint(), "start_step": 1}
    plain = rows(open_stream(str(folder), **options))
    piped = f"pipe:cat {folder}/{{000..001}}.tar"
    assert rows(open_stream(piped, allow_pipe=True, **options)) == plain
    assert rows(open_stream(find_shards(piped, allow_pipe=True), allow_pipe=True, workers=2, **options)) == plain
    with pytest.raises(DataError, match="--allow_pipe"):
        open_stream(piped, **options)
    memory = fsspec.filesystem("memory")
    try:
        for path in folder.iterdir():
            memory.pipe(f"/bucket/{path.name}", path.read_bytes())
        assert rows(open_stream("memory://bucket/", **options)) == plain
    finally:
        memory.rm("/bucket", recursive=True)


# ---------------------------------------------------------------------------------------------------------------------
# Bad data
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_records_are_left_out_and_counted(tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_set(tmp_path, [40], num_classes=10)
    members = dict(samples(0, 40))
    members["0-0003.jpg"] = b"bad"
    members["0-0004.cls"] = b"7.0"
    members["0-0005.cls"] = b"-3"
    del members["0-0006.cls"]
    del members["0-0007.jpg"]
    write_tar(tmp_path / "000.tar", [*list(members.items())[:-2], ("0-0000.jpg", b"x"), ("0-0000.cls", b"1")])
    with open_stream(
        folder, global_batch=40, workers=workers, transform=Fingerprint(), max_bad_fraction=0.15
    ) as stream:
        (batch,) = stream
        report = stream.report()
    bad = {3, 4, 5, 6, 7, 39}
    assert set(batch["index"].tolist()) == set(range(40)) - bad
    assert len(batch["image"]) == len(batch["key"]) == len(batch["label"]) == 34
    assert all(index == int(key[2:]) for index, key in zip(batch["index"].tolist(), batch["key"], strict=True))
    reasons = {"undecodable image": 1, "bad label": 2, "no label": 1, "no image": 1, "duplicate key": 1}
    assert (report["samples"], report["bad"], report["reasons"]) == (34, 6, reasons)
    assert report["examples"]["undecodable image"] == [f"{folder}/000.tar, key '0-0003': not an image"]  # type: ignore[index]
    assert sum("bad record" in message for message in caplog.messages) == 6
    with pytest.raises(DataError, match=r"6 bad records in epoch 0 exceed max_bad_fraction \(0.4 records\)"):
        list(open_stream(folder, global_batch=40, workers=workers, transform=Fingerprint()))


def test_bad_records_of_one_epoch_do_not_burden_the_next(tmp_path: Path) -> None:
    folder = write_set(tmp_path, [20])
    write_tar(tmp_path / "000.tar", [("0-0000.jpg", b"bad"), *samples(0, 20)[1:]])
    with open_stream(folder, global_batch=10, transform=Fingerprint(), epochs=9, max_bad_fraction=0.05) as stream:
        assert len(list(stream)) == 18
        assert stream.report()["bad"] == 9


@pytest.mark.parametrize("workers", [0, 1])
def test_labels_from_one_are_an_error(tmp_path: Path, workers: int) -> None:
    folder = write_set(tmp_path, [20], num_classes=9)
    with pytest.raises(DataError, match=r"000.tar, key '0-00.9': label 9 with 9 classes: .* 1-based"):
        list(open_stream(folder, global_batch=20, workers=workers, transform=Fingerprint(), max_bad_fraction=1))


@pytest.mark.parametrize("workers", [0, 2])
def test_batch_without_a_good_record(tmp_path: Path, workers: int) -> None:
    folder = write_set(tmp_path, [8])
    write_tar(tmp_path / "000.tar", [(name, b"bad") for name, _ in samples(0, 8)])
    with pytest.raises(
        DataError, match="rank 0: all samples of step 0, epoch 0 are bad .8 bad label.; first: .*'0-000"
    ):
        list(open_stream(folder, global_batch=8, workers=workers, transform=Fingerprint(), max_bad_fraction=1))
    with pytest.raises(DataError, match="none of the first records"):
        open_stream(folder, global_batch=8)


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 0), (2, 2)])
def test_shards_shorter_or_longer_than_their_count(tmp_path: Path, workers: int, world: int) -> None:
    """Cut anywhere, or with a wrong count: exact error in strict mode, else the very samples that are there."""
    folder = write_set(tmp_path, [6, 10])
    whole = (tmp_path / "001.tar").read_bytes()
    for cut, note in (
        (6 * 2048, "no end-of-archive blocks"),
        (6 * 2048 + 515, "cut off at byte 12803 in the content"),
    ):
        (tmp_path / "001.tar").write_bytes(whole[:cut])
        options: dict[str, Any] = {"global_batch": 16, "world": world, "workers": workers, "transform": Fingerprint()}
        with pytest.raises(DataError, match=f"001.tar holds 6 samples, its index says 10 .{note}"):
            [list(open_stream(folder, rank=rank, **options)) for rank in range(world)]
        seen, lost = [], 0
        for rank in range(world):
            with open_stream(folder, rank=rank, strict=False, max_bad_fraction=0.9, **options) as stream:
                seen += [index for batch in stream for index in batch["index"].tolist()]
                lost += stream.report()["reasons"].get("truncated", 0)  # type: ignore[attr-defined]
        assert (sorted(seen), lost) == (list(range(12)), 4)
    write_tar(tmp_path / "001.tar", samples(1, 13))
    with pytest.raises(DataError, match="001.tar holds 13 samples, its index says 10"):
        [list(open_stream(folder, rank=rank, **options)) for rank in range(world)]
    extra = 0
    for rank in range(world):
        with open_stream(folder, rank=rank, strict=False, max_bad_fraction=0.9, **options) as stream:
            list(stream)
            extra += stream.report()["reasons"].get("beyond the count", 0)  # type: ignore[attr-defined]
    assert extra == 3


def test_interleaved_members_are_explained(tmp_path: Path) -> None:
    folder = write_set(tmp_path, [4])
    members = samples(0, 4)
    write_tar(tmp_path / "000.tar", members[::2] + members[1::2])
    with pytest.raises(DataError, match="holds 8 samples, its index says 4 .4 keys come back later"):
        list(open_stream(folder, global_batch=4, transform=Fingerprint()))


def test_failing_command_is_an_error(sets: dict[tuple[int, ...], str]) -> None:
    folder = sets[9, 8]
    shards = ShardSet((Shard(f"pipe:cat {folder}/000.tar; exit 3", 9, 0),), 9, None, None, "")
    for workers in (0, 1):
        with pytest.raises(DataError, match="exit code 3"):
            list(open_stream(shards, global_batch=9, workers=workers, transform=Fingerprint(), allow_pipe=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_batch": 41}, "batch of 41 is larger than the data set .40"),
        ({"global_batch": 0}, "batch of 0"),
        ({"global_batch": 9, "world": 2}, "batch of 9 cannot be divided among 2"),
        ({"global_batch": 8, "world": 4, "streams": 3}, "up to 3 streams: none divides the global batch of 8 among 4"),
        ({"rank": 1}, "rank 1 is not one of 1"),
        ({"start_step": 11}, "start step 11 is outside the epoch of 10"),
        ({"start_step": -1}, "start step -1"),
        ({"seed": -1}, "seed -1"),
        ({"workers": -1}, "-1 workers"),
    ],
)
def test_impossible_numbers(sets: dict[tuple[int, ...], str], options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_stream(sets[40,], **{"global_batch": 4, "transform": Fingerprint(), **options})


def test_a_stream_is_read_once(sets: dict[tuple[int, ...], str]) -> None:
    stream = open_stream(sets[40,], global_batch=4, transform=Fingerprint())
    assert len(list(stream)) == 10
    with pytest.raises(RuntimeError, match="exhausted"):
        iter(stream)


# ---------------------------------------------------------------------------------------------------------------------
# Worker processes
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slow:
    """A transform that takes its time, or fails in a way that is no fault of the data."""

    seconds: float
    fail: bool = False
    size: int = 2

    def __call__(self, data: bytes, generator: Random) -> torch.Tensor:
        time.sleep(self.seconds)
        if self.fail:
            raise KeyError("a bug")
        return torch.zeros(3, 2, 2, dtype=torch.uint8)


@pytest.mark.timeout(30)
def test_killed_worker_is_an_error_at_once(sets: dict[tuple[int, ...], str]) -> None:
    with open_stream(sets[40,], global_batch=4, workers=2, transform=Slow(0.2), epochs=None) as stream:
        next(stream)
        time.sleep(0.1)  # into the next sample
        victim = max(child.pid or 0 for child in multiprocessing.active_children())
        os.kill(victim, signal.SIGKILL)
        started = time.monotonic()
        with pytest.raises(
            DataError, match=r"data worker \d of rank 0 was killed by SIGKILL .* at sample \d+ of .*000.tar"
        ):
            list(stream)
        assert time.monotonic() - started < 5


@pytest.mark.timeout(30)
def test_two_pools_close_quickly(sets: dict[tuple[int, ...], str]) -> None:
    """The later pool's workers hold the earlier one's pipe open: its workers must end without it."""
    first = open_stream(sets[40,], global_batch=4, workers=1, transform=Slow(0), epochs=None)
    second = open_stream(sets[40,], global_batch=4, workers=1, transform=Slow(0), epochs=None)
    next(first), next(second)
    started = time.monotonic()
    first.close()
    assert time.monotonic() - started < 1.9, "killed after the grace period"
    next(second)
    second.close()


def slowly(stream: Iterator[Batch]) -> None:
    """Read as a trainer does: the worker has ended before it is asked for another batch."""
    for _ in range(100):
        next(stream)
        time.sleep(0.2)


@pytest.mark.timeout(60)
def test_shards_that_vanish_in_the_middle_are_named(sets: dict[tuple[int, ...], str], tmp_path: Path) -> None:
    """The worker ends with its error while the main process is busy: its reason must not be lost."""
    folder = tmp_path / "set"
    shutil.copytree(sets[40,], folder)
    with open_stream(str(folder), global_batch=4, workers=1, transform=Slow(0), epochs=None) as stream:
        next(stream)
        for shard in folder.glob("*.tar"):
            shard.unlink()
        with pytest.raises(DataError, match=r"000.tar") as caught:
            slowly(stream)
    assert "exit code" not in str(caught.value)


@pytest.mark.timeout(30)
def test_bug_in_a_worker_shows_its_traceback(sets: dict[tuple[int, ...], str]) -> None:
    with pytest.raises(
        RuntimeError, match=r"(?s)worker 0 of rank 0 failed at sample \d+ of .*000.tar.*KeyError: 'a bug'"
    ):
        list(open_stream(sets[40,], global_batch=4, workers=1, transform=Slow(0, fail=True)))


@pytest.mark.timeout(30)
@pytest.mark.parametrize("how", ["close", "with", "forget", "error"])
def test_abandoned_streams_leave_no_process(sets: dict[tuple[int, ...], str], how: str) -> None:
    """The autouse fixture checks that no child is left."""
    before = children()
    stream = open_stream(sets[40,], global_batch=4, workers=2, transform=Slow(0.05), epochs=None)
    batch = next(stream)
    assert len(children() - before) == 2
    if how == "close":
        stream.close()
    elif how == "with":
        with stream:
            pass
    elif how == "error":
        with pytest.raises(ZeroDivisionError), stream:
            1 / 0  # noqa: B018
    del stream
    gc.collect()
    assert children() == before
    assert batch["image"].sum() == 0  # batches outlive their stream


def assert_gone(pids: Iterable[int]) -> None:
    deadline = time.monotonic() + 10
    while (left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == []


def consume(folder: str, connection: Connection) -> None:
    """A main process, with a session of its own, that reads a stream for ever and tells the numbers of its workers."""
    os.setsid()
    stream = open_stream(folder, global_batch=4, workers=2, transform=Slow(0.05), epochs=None)
    next(stream)
    connection.send(list(children()))
    for _ in stream:
        time.sleep(0.1)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("ending", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_no_orphans_when_the_main_process_ends(
    sets: dict[tuple[int, ...], str], ending: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """A signal goes to the whole group, as from a terminal or a launcher; SIGKILL hits the main process only."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=consume, args=(sets[40,], theirs))
    process.start()
    workers = ours.recv()
    assert len(workers) == 2
    number = getattr(signal, ending)
    if ending == "SIGKILL":
        os.kill(process.pid or 0, number)
    else:
        os.killpg(process.pid or 0, number)
    process.join(20)
    assert process.exitcode == (1 if ending == "SIGINT" else -number)
    assert_gone(workers)
    assert capfd.readouterr().err.count("Traceback") == (ending == "SIGINT")  # of the main process alone


@pytest.mark.timeout(60)
def test_no_orphans_when_the_interpreter_exits(sets: dict[tuple[int, ...], str]) -> None:
    program = f"""
import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from test_stream import Slow, children, open_stream
stream = open_stream({sets[40,]!r}, global_batch=4, workers=2, transform=Slow(0.05), epochs=None)
next(stream)
print(*children())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    workers = [int(pid) for pid in done.stdout.split()]
    assert len(workers) == 2
    assert_gone(workers)


@pytest.mark.timeout(30)
def test_stalled_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import data.workers

    monkeypatch.setattr(data.workers, "STALL_SECONDS", 0.2)
    folder = write_set(tmp_path, [8])
    url = f"pipe:sleep 0.7; cat {folder}/000.tar"
    shards = ShardSet((Shard(url, 8, 0),), 8, None, None, "")
    list(open_stream(shards, global_batch=8, streams=1, workers=1, transform=Fingerprint(), allow_pipe=True))
    assert any("rank 0 waits 0 s for data worker 0 while reading pipe:sleep" in message for message in caplog.messages)


@pytest.mark.timeout(30)
def test_more_workers_than_streams(sets: dict[tuple[int, ...], str], caplog: pytest.LogCaptureFixture) -> None:
    options: dict[str, Any] = {"global_batch": 4, "world": 2, "rank": 1, "transform": Fingerprint()}
    with open_stream(sets[40,], workers=9, **options) as stream:
        assert rows(stream) == rows(open_stream(sets[40,], **options))
    assert "9 workers for 2 streams of this rank: using 2" in caplog.text


def test_workers_run_one_thread_and_read_clean_shards_quietly(
    sets: dict[tuple[int, ...], str], caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.DEBUG),
        open_stream(sets[40,], global_batch=4, workers=2, transform=Fingerprint()) as s,
    ):
        next(iter(s))
        statuses = [Path(f"/proc/{child.pid}/status").read_text() for child in multiprocessing.active_children()]
    assert all("Threads:\t1\n" in status for status in statuses)
    assert caplog.messages == []
