"""Passes for evaluation: every sample once, in order, for all numbers of ranks and workers; nothing lost in silence."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import random
import shutil
import signal
import tarfile
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data import DataError
from data.order import PassOrder
from data.stream import open_pass
from data.tar import Shard, ShardSet, find_shards
from data.transforms import EvalTransform
from tests.test_stream import Fingerprint, Slow, children, jpeg, make_set, rows, samples, write_set, write_tar

Row = tuple[int, str, int, bytes]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, ...], str]:
    """Shard folders by their counts, written when first asked for."""
    base = tmp_path_factory.mktemp("sets")

    class Sets(dict[tuple[int, ...], str]):
        def __missing__(self, counts: tuple[int, ...]) -> str:
            self[counts] = write_set(base / "-".join(map(str, counts)), counts)
            return self[counts]

    return Sets()


@pytest.fixture(autouse=True)
def _no_child_survives() -> Iterator[None]:
    before = children()
    yield
    gc.collect()
    assert children() <= before


@dataclass(frozen=True)
class Plain(Fingerprint):
    """Pixels that tell the bytes alone, as an evaluation transform draws nothing."""

    def __call__(self, data: bytes, generator: Random) -> torch.Tensor:
        return super().__call__(data, random.Random(0))


def whole_set(counts: tuple[int, ...]) -> list[Row]:
    """What a pass over `write_set(counts)` must give, from the counts alone."""
    names = [(f"{shard}-{record:04d}", record % 10) for shard, count in enumerate(counts) for record in range(count)]
    pixels = [Plain()(key.encode(), Random()).numpy().tobytes() for key, _ in names]
    return [(number, key, label, pixels[number]) for number, (key, label) in enumerate(names)]


# ---------------------------------------------------------------------------------------------------------------------
# What comes out
# ---------------------------------------------------------------------------------------------------------------------


@given(st.data())
def test_every_sample_once_however_it_is_divided(sets: dict[tuple[int, ...], str], draw: st.DataObject) -> None:
    """Ranks joined are the set in order; the batches of a rank depend neither on workers nor on where it began."""
    counts = draw.draw(st.sampled_from([(40,), (7, 1, 0, 12), (0, 3, 3, 3, 3, 3, 0), (1, 30, 2), (9, 8), (2,)]))
    world = draw.draw(st.sampled_from([1, 2, 3, 5]))
    workers = draw.draw(st.sampled_from([0, 0, 0, 1, 2]))  # each rank starts its own
    batch_size = draw.draw(st.integers(1, sum(counts) + 3))
    starts = draw.draw(st.lists(st.integers(0, 40), min_size=world, max_size=world))
    shards = find_shards(sets[counts])
    everything = whole_set(counts)

    end = 0
    for rank, drawn in enumerate(starts):
        own = range(end, (rank + 1) * len(everything) // world)
        end = own.stop
        batches = [everything[first : min(first + batch_size, end)] for first in range(own.start, end, batch_size)]
        start = min(drawn, len(batches))
        with open_pass(
            shards, batch_size=batch_size, rank=rank, world=world, workers=workers, transform=Plain(), start=start
        ) as evaluation:
            assert evaluation.own == own
            assert evaluation.num_samples == len(everything)
            assert len(evaluation) == len(batches) - start
            # A list holds more batches than the workers have room for.
            assert rows(list(evaluation)) == batches[start:]
            assert evaluation.report() == {
                "samples": sum(map(len, batches[start:])), "bad": 0, "reasons": {}, "examples": {}
            }  # fmt: skip
    assert end == len(everything)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=6), st.integers(1, 40), st.integers(1, 40), st.data())
def test_order_of_a_pass(counts: list[int], batch_size: int, streams: int, draw: st.DataObject) -> None:
    """The arithmetic alone, on many more shapes: streams divide every batch, segments lead to the very records."""
    shards = make_set(*counts)
    first = draw.draw(st.integers(0, sum(counts)))
    own = range(first, draw.draw(st.integers(first, sum(counts))))
    order = PassOrder(shards, own, batch_size=batch_size, streams=streams)
    assert order.steps == len(range(0, len(own), batch_size))
    assert sum(map(order.rows, range(streams))) == batch_size
    assert max(map(order.rows, range(streams))) - min(map(order.rows, range(streams))) <= 1
    runs = [order.numbers(stream, order.run(stream)).tolist() for stream in range(streams)]
    emitted = []
    for step in range(order.steps):
        for stream, run in enumerate(runs):
            emitted += run[step * order.rows(stream) : (step + 1) * order.rows(stream)]
    assert emitted == list(own)
    segments = list(order.segments(0))
    assert [s.position for s in segments] == [0, *itertools.accumulate(s.length for s in segments)][:-1]
    walked = [shards.shards[s.shard].start + s.first + record for s in segments for record in range(s.length)]
    assert walked == list(own)


@given(st.data())
def test_chosen_samples_alone_are_read(sets: dict[tuple[int, ...], str], draw: st.DataObject) -> None:
    counts = draw.draw(st.sampled_from([(40,), (7, 1, 0, 12), (9, 8)]))
    everything = whole_set(counts)
    only = sorted(draw.draw(st.sets(st.integers(0, len(everything) - 1), max_size=12)))
    world, workers = draw.draw(st.sampled_from([(1, 0), (1, 2), (3, 0)]))
    batch_size, decoded = draw.draw(st.integers(1, 9)), []

    @dataclass(frozen=True)
    class Counting(Plain):
        def __call__(self, data: bytes, generator: Random) -> torch.Tensor:
            decoded.append(data.decode())
            return super().__call__(data, generator)

    found: list[Row] = []
    for rank in range(world):
        options: dict[str, Any] = {"rank": rank, "world": world, "workers": workers, "transform": Counting()}
        with open_pass(sets[counts], batch_size=batch_size, only=np.array(only, dtype=np.int64), **options) as chosen:
            batches = rows(list(chosen))
            assert all(len(batch) == min(batch_size, len(only)) for batch in batches[:-1])
            found += itertools.chain(*batches)
    assert found == [everything[number] for number in only]
    if not workers:
        assert decoded == [everything[number][1] for number in only]


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_without_samples(sets: dict[tuple[int, ...], str], workers: int) -> None:
    before, seen = children(), []
    for rank in range(7):
        with open_pass(sets[2,], batch_size=4, rank=rank, world=7, workers=workers, transform=Plain()) as evaluation:
            if not evaluation.own:
                assert children() == before
                assert len(evaluation) == 0
            seen += [index for batch in evaluation for index in batch["index"].tolist()]
            assert evaluation.report()["samples"] == len(evaluation.own)
    assert seen == [0, 1]


def test_ranks_and_restarts_read_nothing_else(sets: dict[tuple[int, ...], str], tmp_path: Path) -> None:
    """Neither the shards of other ranks nor those before the start are opened, nor are their samples decoded."""
    decoded = []
    shards = find_shards(shutil.copytree(sets[9, 8], tmp_path / "set").as_posix())
    (tmp_path / "set" / "000.tar").unlink()

    @dataclass(frozen=True)
    class Counting(Plain):
        def __call__(self, data: bytes, generator: Random) -> torch.Tensor:
            decoded.append(data.decode())
            return super().__call__(data, generator)

    for rank, world, start, first in ((1, 2, 1, 2), (0, 1, 3, 0)):
        decoded.clear()
        list(open_pass(shards, batch_size=3, rank=rank, world=world, transform=Counting(), start=start))
        assert decoded == [f"1-{record:04d}" for record in range(first, 8)]


@pytest.mark.parametrize("workers", [0, 1])
def test_images_without_a_transform(tmp_path: Path, workers: int) -> None:
    members = [m for n in range(6) for m in ((f"{n}.jpg", jpeg((5, 3), 40 * n)), (f"{n}.cls", b"0"))]
    write_tar(tmp_path / "a.tar", members)
    first, last = open_pass(str(tmp_path / "a.tar"), batch_size=4, workers=workers)
    for batch, levels in ((first, [0.0, 40.0, 80.0, 120.0]), (last, [160.0, 200.0])):
        assert batch["image"].shape == (len(levels), 3, 3, 5)
        assert batch["image"].dtype == torch.uint8
        assert batch["image"].is_contiguous(memory_format=torch.channels_last)
        assert (batch["label"].dtype, batch["index"].dtype) == (torch.int64, torch.int64)
        assert batch["image"].float().mean((1, 2, 3)).round().tolist() == levels


def test_real_photographs(shared_data: Path, tmp_path: Path) -> None:
    """The pixels of the transform itself, at the sample's place; labels and keys beside them."""
    with tarfile.open(shared_data / "imagenet_sample_500.tar") as archive:
        images = [archive.extractfile(m).read() for m in archive.getmembers()[:50] if m.isfile()]  # type: ignore[union-attr]
    transform = EvalTransform(48, border=2)
    direct = [transform(image, Random()) for image in images]
    for shard, numbers in enumerate((range(20), range(20, len(images)))):
        members = [(f"{n}.{e}", c) for n in numbers for e, c in (("jpg", images[n]), ("cls", b"%d" % n))]
        write_tar(tmp_path / f"{shard}.tar", members)
    for world, workers in ((1, 2), (3, 0)):
        seen = 0
        for rank in range(world):
            evaluation = open_pass(
                str(tmp_path), batch_size=7, rank=rank, world=world, workers=workers, transform=transform
            )
            for batch in evaluation:
                numbers = range(seen, seen + len(batch["index"]))
                assert batch["index"].tolist() == batch["label"].tolist() == list(map(int, batch["key"])) == [*numbers]
                assert torch.equal(batch["image"], torch.stack([direct[number] for number in numbers]))
                seen += len(numbers)
        assert seen == len(images)


def test_remote_and_piped_shards_give_the_same(sets: dict[tuple[int, ...], str]) -> None:
    import fsspec

    folder = Path(sets[9, 8])
    expected = whole_set((9, 8))[5:]
    piped = f"pipe:cat {folder}/{{000..001}}.tar"
    for workers in (0, 2):
        evaluation = open_pass(piped, batch_size=5, workers=workers, transform=Plain(), start=1, allow_pipe=True)
        assert list(itertools.chain(*rows(evaluation))) == expected
    with pytest.raises(DataError, match="--allow_pipe"):
        open_pass(piped, batch_size=5, transform=Plain())
    memory = fsspec.filesystem("memory")
    try:
        for path in folder.iterdir():
            memory.pipe(f"/bucket/{path.name}", path.read_bytes())
        evaluation = open_pass("memory://bucket/", batch_size=5, workers=2, transform=Plain(), start=1)
        assert list(itertools.chain(*rows(evaluation))) == expected
    finally:
        memory.rm("/bucket", recursive=True)


# ---------------------------------------------------------------------------------------------------------------------
# Bad data
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_records(tmp_path: Path, workers: int) -> None:
    """None is tolerated unless asked for; then each is missing from its batch, which may be left empty, and counted."""
    folder = write_set(tmp_path, [40], num_classes=10)
    members = dict(samples(0, 40))
    members |= {"0-0003.jpg": b"bad", "0-0004.cls": b"7.0", "0-0039.jpg": b"bad"}
    del members["0-0006.cls"]
    write_tar(tmp_path / "000.tar", list(members.items()))
    options: dict[str, Any] = {"batch_size": 13, "workers": workers, "transform": Plain()}
    with pytest.raises(
        DataError,
        match=r"rank 0: 3 bad records exceed max_bad_fraction \(0.0 records\); .*; first: .*/000.tar, key '0-000[346]'",
    ):
        list(open_pass(folder, **options))
    with open_pass(folder, max_bad_fraction=0.1, **options) as evaluation:
        batches = rows(evaluation)
        report = evaluation.report()
    everything = whole_set((40,))
    good = [row for row in everything if row[0] not in {3, 4, 6, 39}]
    assert batches == [good[:10], good[10:23], good[23:], []]
    reasons = {"undecodable image": 2, "bad label": 1, "no label": 1}
    assert (report["samples"], report["bad"], report["reasons"]) == (36, 4, reasons)
    assert report["examples"]["undecodable image"] == [  # type: ignore[index]
        f"{folder}/000.tar, key '0-0003': not an image", f"{folder}/000.tar, key '0-0039': not an image"
    ]  # fmt: skip
    with pytest.raises(DataError, match=r"rank 0: 4 bad records exceed max_bad_fraction \(3.6 records\)"):
        list(open_pass(folder, max_bad_fraction=0.09, **options))
    # The share is of the rank's own samples, and a bad record is the business of its rank alone.
    with pytest.raises(DataError, match=r"rank 0: 3 bad records exceed max_bad_fraction \(1.3 records\)"):
        list(open_pass(folder, rank=0, world=3, max_bad_fraction=0.1, **options))
    assert len(list(open_pass(folder, rank=1, world=3, **options))) == 1
    with pytest.raises(DataError, match=r"rank 2: 1 bad records exceed .*; first: .*'0-0039': not an image"):
        list(open_pass(folder, rank=2, world=3, **options))


@pytest.mark.parametrize("workers", [0, 2])
def test_labels_from_one_are_an_error(tmp_path: Path, workers: int) -> None:
    folder = write_set(tmp_path, [20], num_classes=9)
    with pytest.raises(DataError, match=r"000.tar, key '0-0009': label 9 with 9 classes: .* 1-based"):
        list(open_pass(folder, batch_size=10, workers=workers, transform=Plain(), max_bad_fraction=1))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2])
def test_shards_shorter_or_longer_than_their_count(tmp_path: Path, workers: int, world: int) -> None:
    """An exact error in strict mode; else the very samples that are there, and every other one counted."""
    folder = write_set(tmp_path, [6, 10])
    options: dict[str, Any] = {"batch_size": 3, "world": world, "workers": workers, "transform": Plain()}
    tolerant: dict[str, Any] = {"strict": False, "max_bad_fraction": 0.9, **options}

    def read(**options: Any) -> tuple[list[Row], dict[str, int]]:
        seen: list[Row] = []
        lost: dict[str, int] = {}
        for rank in range(world):
            with open_pass(folder, rank=rank, **options) as evaluation:
                seen += itertools.chain(*rows(evaluation))
                for reason, count in evaluation.report()["reasons"].items():  # type: ignore[attr-defined]
                    lost[reason] = lost.get(reason, 0) + count
        return seen, lost

    whole = (tmp_path / "001.tar").read_bytes()
    for cut, note in (
        (6 * 2048, "no end-of-archive blocks"),
        (6 * 2048 + 515, "cut off at byte 12803 in the content"),
    ):
        (tmp_path / "001.tar").write_bytes(whole[:cut])
        with pytest.raises(DataError, match=f"001.tar holds 6 samples, its index says 10 .{note}"):
            read(**options)
        with pytest.raises(DataError, match="exceed max_bad_fraction"):
            read(strict=False, **options)
        assert read(**tolerant) == (whole_set((6, 10))[:12], {"truncated": 4})
    write_tar(tmp_path / "001.tar", samples(1, 13))
    with pytest.raises(DataError, match="001.tar holds 13 samples, its index says 10"):
        read(**options)
    assert read(**tolerant) == (whole_set((6, 10)), {"beyond the count": 3})


@pytest.mark.parametrize("workers", [0, 1])
def test_failing_command_is_an_error(sets: dict[tuple[int, ...], str], workers: int) -> None:
    shards = ShardSet((Shard(f"pipe:cat {sets[9, 8]}/000.tar; exit 3", 9, 0),), 9, None, None, "")
    with pytest.raises(DataError, match="exit code 3"):
        list(open_pass(shards, batch_size=4, workers=workers, transform=Plain(), allow_pipe=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "a batch of 0 samples"),
        ({"rank": 2, "world": 2}, "rank 2 is not one of 2"),
        ({"rank": -1}, "rank -1 is not one of 1"),
        ({"start": 11}, "start batch 11 is outside the 10 batches of rank 0"),
        ({"start": -1}, "start batch -1"),
        ({"workers": -1}, "-1 workers"),
        ({"only": np.array([3, 3])}, "ascending numbers below 40"),
        ({"only": np.array([3, 40])}, "ascending numbers below 40"),
    ],
)
def test_impossible_numbers(sets: dict[tuple[int, ...], str], options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_pass(sets[40,], **{"batch_size": 4, "transform": Plain(), **options})


def test_a_pass_is_read_once(sets: dict[tuple[int, ...], str]) -> None:
    evaluation = open_pass(sets[40,], batch_size=16, transform=Plain())
    assert len(list(evaluation)) == len(evaluation) == 3
    with pytest.raises(RuntimeError, match="exhausted"):
        iter(evaluation)


# ---------------------------------------------------------------------------------------------------------------------
# Processes and memory
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(30)
@pytest.mark.parametrize("how", ["close", "error", "Ctrl-C", "forget"])
def test_abandoned_passes_leave_no_process(sets: dict[tuple[int, ...], str], how: str) -> None:
    before = children()
    evaluation = open_pass(sets[40,], batch_size=4, workers=2, transform=Slow(0.1))
    batch = next(evaluation)
    assert len(children() - before) == 2
    if how == "close":
        evaluation.close()
    elif how == "error":
        with pytest.raises(ZeroDivisionError), evaluation:
            1 / 0  # noqa: B018
    elif how == "Ctrl-C":

        def interrupt(number: int, frame: FrameType | None) -> None:
            raise KeyboardInterrupt

        earlier = signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.3)  # into the wait for a later batch: no `with` is there to help
        try:
            with pytest.raises(KeyboardInterrupt):
                list(evaluation)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, earlier)
    del evaluation
    gc.collect()
    assert children() == before
    assert batch["image"].sum() == 0  # batches outlive their pass


def test_never_more_workers_than_rows(sets: dict[tuple[int, ...], str]) -> None:
    with open_pass(sets[40,], batch_size=3, workers=9, transform=Plain()) as evaluation:
        assert len(multiprocessing.active_children()) == 3
        assert list(itertools.chain(*rows(evaluation))) == whole_set((40,))


def test_a_batch_larger_than_the_set_costs_no_more(sets: dict[tuple[int, ...], str]) -> None:
    with open_pass(sets[9, 8], batch_size=10**15, workers=2, transform=Plain()) as evaluation:
        assert rows(evaluation) == [whole_set((9, 8))]


def test_memory_does_not_grow_with_what_was_read(tmp_path: Path) -> None:
    """The same place in the second and in the last of 12 shards: nothing is kept of the 4000 records between."""
    folder = write_set(tmp_path, [400] * 12)
    held = []
    tracemalloc.start()
    try:
        with open_pass(folder, batch_size=50, transform=Plain()) as evaluation:
            for number, batch in enumerate(evaluation):
                if number in (10, 90):
                    assert batch["index"][0] % 400 == 100
                    gc.collect()
                    held.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert held[1] - held[0] < 16_000  # 4 bytes a record; where records begin would take 16
