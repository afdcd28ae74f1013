"""Feature cache: keys, exact round trips, damage of every kind, killed writers, memory of random access."""

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data import DataError, features
from data.features import FeatureCache, Features, Identity, open_features

SAMPLES, WIDTH = 3000, 24


def identity(**changes: Any) -> Identity:
    values: dict[str, Any] = {
        "encoder": {"weights_sha256": "0" * 64, "mean": [0.5]},
        "preprocessing": "EvalTransform(size=32)",
        "data": "f" * 64,
        "samples": SAMPLES,
        "classes": ("cat", "dog", "emu"),
        "width": WIDTH,
        "dtype": "fp16",
        "precision": "no",
    }
    return Identity(**{**values, **changes})


def part_content(cache: FeatureCache, part: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    n, parts = cache.identity.samples, cache.parts
    index = torch.arange(n * part // parts, n * (part + 1) // parts)
    generator = torch.Generator().manual_seed(1000 * seed + part)
    return torch.randn(len(index), cache.identity.width, generator=generator), index % 3, index


def fill(root: Path, identity: Identity, parts: Sequence[int] | None = None) -> FeatureCache:
    cache = FeatureCache(root, identity)
    cache.check_space()
    for part in cache.missing(range(cache.parts)) if parts is None else parts:
        cache.write(part, *part_content(cache, part))
    return cache


def whole(features: Features) -> Tensor:
    return features.take(torch.arange(features.rows))


# The key.


@pytest.mark.parametrize(
    "change",
    [
        {"encoder": {"weights_sha256": "1" * 64, "mean": [0.5]}},
        {"encoder": {"weights_sha256": "0" * 64, "mean": [0.4]}},
        {"preprocessing": "EvalTransform(size=33)"},
        {"data": "e" * 64},
        {"samples": SAMPLES + 1},
        {"classes": ("dog", "cat", "emu")},
        {"width": WIDTH + 1},
        {"dtype": "bf16"},
        {"precision": "bf16"},
    ],
)
def test_whatever_changes_features_changes_the_folder(change: dict[str, Any], tmp_path: Path) -> None:
    assert identity().key == identity().key
    assert FeatureCache(tmp_path, identity(**change)).folder != FeatureCache(tmp_path, identity()).folder


def test_a_new_version_of_the_code_changes_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = fill(tmp_path, identity())
    old.finish()
    monkeypatch.setattr(features, "VERSION", features.VERSION + 1)
    assert FeatureCache(tmp_path, identity()).folder != old.folder
    with pytest.raises(DataError, match="this version"):
        open_features(old.folder)


def test_parts_follow_from_the_number_of_samples() -> None:
    expected = {1: 1, 1024: 1, 1025: 2, 50_000: 49, 1_281_167: 64, 2**22: 64, 2**22 + 1: 65, 10**8: 1526}
    assert {n: identity(samples=n).parts for n in expected} == expected
    imagenet = identity(samples=1_281_167, width=1024)
    assert imagenet.bytes == pytest.approx(2.62e9, rel=0.002)


# Reading.


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_rows_come_back_in_any_order(dtype: str, tmp_path: Path) -> None:
    cache = fill(tmp_path, identity(dtype=dtype))
    assert cache.parts == 3
    contents = [part_content(cache, part) for part in range(cache.parts)]
    expected = torch.cat([content[0] for content in contents]).to(features.TYPES[dtype])
    for found in (cache.finish(), open_features(cache.folder), cache.finish().gathered(torch.device("cpu"))):
        assert (found.rows, found.width, found.identity) == (SAMPLES, WIDTH, cache.identity)
        assert torch.equal(found.index, torch.arange(SAMPLES))
        assert torch.equal(found.labels, torch.arange(SAMPLES) % 3)
        order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(7)).repeat(2)
        batches = list(found.batches(order, 700))
        assert [len(labels) for _, labels in batches] == [700] * 8 + [400]
        assert torch.equal(torch.cat([rows for rows, _ in batches]), expected[order])
        assert torch.equal(torch.cat([labels for _, labels in batches]), order % 3)
        assert found.take(torch.empty(0, dtype=torch.int64)).shape == (0, WIDTH)


def test_unusable_samples_are_missing_rows(tmp_path: Path) -> None:
    cache = fill(tmp_path, identity(), parts=[0, 1])
    rows, labels, index = part_content(cache, 2)
    keep = torch.arange(len(index)) % 5 > 0
    cache.write(2, rows[keep], labels[keep], index[keep])
    found = cache.finish()
    assert found.rows == SAMPLES - 200
    assert torch.equal(found.index[2000:], index[keep])
    assert torch.equal(whole(found)[2000:], rows[keep].half())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the process's memory from /proc")
def test_random_access_keeps_nothing_in_memory(tmp_path: Path) -> None:
    """An epoch in random order over 61 MiB of features: what the process owns grows by less than a tenth of it."""

    def anonymous() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("RssAnon:")[2].split()[0]) * 1024

    big = identity(samples=31_250, width=1024)
    found = fill(tmp_path, big).finish()
    order = torch.randperm(found.rows, generator=torch.Generator().manual_seed(0))
    for rows, _ in found.batches(order[:1000], 250):
        assert rows.shape == (250, 1024)
    before, total = anonymous(), 0.0
    for rows, _ in found.batches(order, 250):
        total += rows.float().abs().mean().item() / 125
    assert total == pytest.approx(0.798, abs=0.002)  # of a normal distribution
    assert anonymous() - before < big.bytes / 10


def test_a_part_may_be_without_a_usable_sample(tmp_path: Path) -> None:
    cache = fill(tmp_path, identity(), parts=[0, 2])
    nothing = torch.empty(0, dtype=torch.int64)
    cache.write(1, torch.empty(0, WIDTH), nothing, nothing)
    found = cache.finish()
    assert found.index.tolist() == [*range(1000), *range(2000, 3000)]
    assert torch.equal(found.take(torch.tensor([1500, 999])), whole(found)[[1500, 999]])


# What may not be kept.


def test_features_that_a_type_cannot_hold_are_refused(tmp_path: Path) -> None:
    for dtype, value, refused in (
        ("fp16", 1e5, True),
        ("bf16", 1e5, False),
        ("fp32", float("nan"), True),
        ("bf16", float("inf"), True),
    ):
        cache = FeatureCache(tmp_path, identity(dtype=dtype))
        cache.check_space()
        rows, labels, index = part_content(cache, 1)
        rows[10, 3] = value
        if refused:
            with pytest.raises(DataError, match=f"{dtype} cannot hold .* first sample 1010;") as caught:
                cache.write(1, rows, labels, index)
            assert "\n" not in str(caught.value)
        else:
            cache.write(1, rows, labels, index)


def test_rows_that_do_not_belong_to_a_part_are_refused(tmp_path: Path) -> None:
    cache = fill(tmp_path, identity(), parts=[])
    rows, labels, index = part_content(cache, 1)
    for wrong in (
        (rows, labels, index + 1),
        (rows, labels, index.flip(0)),
        (rows, labels + 1, index),
        (rows, labels - 1, index),
        (rows[:, 1:], labels, index),
        (rows[1:], labels, index),
    ):
        with pytest.raises(ValueError, match=r"samples|labels"):
            cache.write(1, *wrong)
    assert cache.missing(range(3)) == [0, 1, 2]


def test_impossible_identities_are_one_line() -> None:
    for change in ({"dtype": "int8"}, {"samples": 0}, {"width": 0}):
        with pytest.raises(DataError) as caught:
            identity(**change)
        assert "\n" not in str(caught.value)


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be made"):
        FeatureCache(tmp_path / "file", identity()).check_space()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    cache = FeatureCache(tmp_path, identity())
    with pytest.raises(DataError, match="0 MiB needed, 0 MiB free; use another --cache"):
        cache.check_space()
    shutil.rmtree(cache.folder)
    with pytest.raises(DataError, match="cannot write"):
        cache.write(0, *part_content(cache, 0))


# Damage.


def test_a_flipped_byte_is_found_wherever_it_is(tmp_path: Path) -> None:
    cache = fill(tmp_path, identity())
    cache.finish()
    file = cache.file(1)
    good = file.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    places = [*range(0, header, 7), *range(header, len(good), len(good) // 40), len(good) - 1]
    for place in places:
        damaged = bytearray(good)
        damaged[place] ^= 1
        file.write_bytes(damaged)
        if place < header and json_equal(good[8:header], bytes(damaged[8:header])):
            continue  # white space that pads the header
        assert cache.missing(range(3)) == [1], place
        with pytest.raises(DataError, match=r"part_00001-of-00003") as caught:
            open_features(cache.folder)
        assert "\n" not in str(caught.value)
    file.write_bytes(good)
    assert cache.missing(range(3)) == []


def json_equal(a: bytes, b: bytes) -> bool:
    try:
        return json.loads(a) == json.loads(b)
    except ValueError:
        return False


@pytest.mark.parametrize("damage", ["missing", "empty", "cut by one byte", "cut in half", "longer", "of another cache"])
def test_a_damaged_part_is_named_and_computed_again(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = fill(tmp_path, identity())
    expected = whole(cache.finish()).clone()
    file = cache.file(2)
    good = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "of another cache":
        other = fill(tmp_path, identity(data="another"))
        shutil.copy(other.file(2), file)
    else:
        content = {"empty": b"", "cut by one byte": good[:-1], "cut in half": good[: len(good) // 2]}
        file.write_bytes(content.get(damage, good + b"\0"))
    for read in (lambda: open_features(cache.folder), cache.finish):
        with pytest.raises(DataError, match="part_00002-of-00003") as caught:
            read()
        assert "\n" not in str(caught.value)
    assert cache.missing(range(cache.parts)) == [2]
    assert ("computed again" in caplog.text) == (damage != "missing")
    fill(tmp_path, identity())
    assert file.read_bytes() == good
    assert torch.equal(whole(cache.finish()), expected)


def test_a_manifest_that_does_not_belong_there_is_refused(tmp_path: Path) -> None:
    cache = fill(tmp_path, identity())
    with pytest.raises(DataError, match="never finished"):
        open_features(cache.folder)
    cache.finish()
    manifest = cache.folder / features.MANIFEST
    content = json.loads(manifest.read_text())
    wrongs: list[Any] = [
        {**content, "identity": {**content["identity"], "classes": ["dog", "cat", "emu"]}},
        {**content, "version": 99},
        {**content, "rows": SAMPLES - 1},
        {"rows": SAMPLES},
        [],
    ]
    for wrong in wrongs:
        manifest.write_text(json.dumps(wrong))
        with pytest.raises(DataError) as caught:
            open_features(cache.folder)
        assert str(cache.folder) in str(caught.value)
        assert "\n" not in str(caught.value)
    manifest.write_text(json.dumps(content)[:50])
    with pytest.raises(DataError, match="unreadable"):
        open_features(cache.folder)


# Several writers, killed ones.


def write_parts(root: Path, parts: Sequence[int], pause: float = 0) -> None:
    cache = FeatureCache(root, identity(samples=20_000, width=64))
    cache.check_space()
    for part in parts:
        cache.write(part, *part_content(cache, part))
        time.sleep(pause)


def test_a_killed_writer_loses_only_the_part_it_was_at(tmp_path: Path) -> None:
    """SIGKILL at eight moments: the parts that are there are whole each time, and in the end equal an unbroken run."""
    fork = multiprocessing.get_context("fork")
    cache = FeatureCache(tmp_path / "broken", identity(samples=20_000, width=64))
    kept: list[int] = []
    for kill in range(8):
        missing = cache.missing(range(cache.parts))
        assert not set(kept) & set(missing)
        writer = fork.Process(target=write_parts, args=(tmp_path / "broken", missing, 0.002))
        writer.start()
        while writer.is_alive() and len(list(cache.folder.glob("part_*"))) <= len(kept):
            time.sleep(0.001)
        time.sleep(0.0007 * kill)
        assert writer.pid is not None
        if writer.is_alive():
            os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        kept = sorted(set(range(cache.parts)) - set(cache.missing(range(cache.parts))))
    write_parts(tmp_path / "broken", cache.missing(range(cache.parts)))
    write_parts(tmp_path / "unbroken", range(cache.parts))
    unbroken = FeatureCache(tmp_path / "unbroken", cache.identity)
    for part in range(cache.parts):
        assert cache.file(part).read_bytes() == unbroken.file(part).read_bytes()
    leftover = cache.folder / ".part_00000-of-00020.safetensors.1.tmp"
    leftover.write_bytes(b"cut off")
    os.utime(leftover, (time.time() - 7200,) * 2)
    assert torch.equal(whole(cache.finish()), whole(unbroken.finish()))
    assert not leftover.exists()


def test_two_writers_make_what_one_makes(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    one = fill(tmp_path / "one", identity(samples=20_000, width=64))
    writers = [
        fork.Process(target=write_parts, args=(tmp_path / "two", range(rank, one.parts, 2))) for rank in range(2)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    two = FeatureCache(tmp_path / "two", one.identity)
    assert two.missing(range(two.parts)) == []
    for part in range(one.parts):
        assert one.file(part).read_bytes() == two.file(part).read_bytes()
    assert dataclasses.asdict(open_finished(two).identity) == dataclasses.asdict(one.identity)


def open_finished(cache: FeatureCache) -> Features:
    cache.finish()
    return open_features(cache.folder)
