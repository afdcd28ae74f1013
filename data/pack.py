"""Write a labelled image collection as shards: tars of KEY.jpg + KEY.cls with `sizes.json` and timm's `_info.json`.

The whole plan - which sample goes into which shard, in which order - is a function of the request and the file names,
so an interrupted pack goes on with the shards that are missing, and the same request writes the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from data import DataError
from data.parallel import Count, Progress, run_tasks
from data.sources import Source, load_source
from data.tar import ShardReader

FORMAT = 1  # raised whenever the same request would give other shards


@dataclass(frozen=True)
class Encoding:
    """What happens to an image's bytes: nothing, or a JPEG of `quality` with its short side reduced to `short_side`."""

    short_side: int | None
    quality: int

    def apply(self, data: bytes, extension: str) -> tuple[bytes, str]:
        """Return bytes and extension as stored; an image whose short side is small enough keeps its own bytes.

        Re-encoded images keep full colour resolution (4:4:4): halving it would be another change to the data, one that
        a study of colour features would see. Raises ImageError for an image that cannot be decoded.
        """
        extension = "jpg" if extension == "jpeg" else extension
        if self.short_side is None:
            return data, extension
        from PIL import Image

        from data.images import open_rgb

        image = open_rgb(data)
        short = min(image.size)
        if short <= self.short_side:
            return data, extension
        width, height = (self.short_side * side // short for side in image.size)
        buffer = io.BytesIO()
        small = image.resize((width, height), Image.Resampling.BICUBIC)
        small.save(buffer, "JPEG", quality=self.quality, subsampling=0)
        return buffer.getvalue(), "jpg"


@dataclass(frozen=True)
class Plan:
    """The shards of a pack: sample numbers of the source in the order they are written."""

    source: Source
    shards: tuple[Sequence[int], ...]
    out: Path
    encoding: Encoding
    skip_bad: bool

    def path(self, number: int) -> Path:
        """Where a shard goes."""
        return self.out / f"{number:06d}.tar"


def pack(
    source: str,
    out: str,
    *,
    layout: str = "auto",
    split: str | None = None,
    classes: str | None = None,
    val_labels: str | None = None,
    resize: int | None = None,
    quality: int = 90,
    shard_size: int = 1000,
    workers: int = 1,
    seed: int = 0,
    shuffle: bool = True,
    skip_bad: bool = False,
) -> dict[str, Any]:
    """Pack `source` into shards in the folder `out` and return a summary.

    source, layout, split, classes, val_labels: see data/sources.py. resize: short side in pixels to reduce images to
    (None: original bytes, arrays as PNG); quality: of the JPEGs this makes, 1-95. shard_size: samples a shard.
    shuffle: order the samples by `seed` instead of by class, which streaming needs. skip_bad: leave out images that
    cannot be decoded when resizing, and count them, instead of stopping.

    An `out` that holds a part of the same request is completed. Raises DataError for a source that cannot be read and
    an `out` that holds anything else or cannot be written.
    """
    if shard_size < 1 or workers < 1 or not 1 <= quality <= 95 or (resize is not None and resize < 1):
        raise ValueError(f"impossible: {shard_size=}, {workers=}, {quality=}, {resize=}")
    folder = Path(out)
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix="_unpacked-", suffix=".tmp") as scratch:
            found = load_source(
                source, layout=layout, split=split, classes=classes, val_labels=val_labels, scratch=Path(scratch, "tar")
            )
            order = list(range(len(found.names)))
            if shuffle:
                random.Random(seed).shuffle(order)
            shards = tuple(order[start : start + shard_size] for start in range(0, len(order), shard_size))
            plan = Plan(found, shards, folder, Encoding(resize, quality), skip_bad)
            request = {
                "format": FORMAT,
                "source": os.path.realpath(source),
                "resize": resize,
                "quality": quality if resize else None,
                "shard_size": shard_size,
                "seed": seed if shuffle else None,
                "skip_bad": skip_bad,
                "samples": _digest(found),
            }
            _claim(folder, request)
            counts, bad = _write_shards(plan, workers)
        names = [plan.path(number).name for number in range(len(counts))]
        indexes = index_files(
            folder,
            dict(zip(names, counts, strict=True)),
            split or folder.resolve().name,
            len(found.classes),
            found.classes,
        )
        for name, content in indexes.items():
            write_json(folder / name, content)
        for leftover in folder.glob("*.tmp"):  # of runs that were killed
            leftover.unlink() if leftover.is_file() else shutil.rmtree(leftover)
        size = sum(plan.path(number).stat().st_size for number in range(len(counts)))
    return {
        "out": out,
        "samples": sum(counts),
        "shards": len(counts),
        "classes": len(found.classes),
        "bytes": size,
        "skipped": len(order) - sum(counts),
        "dropped": found.dropped,
        "notes": found.notes + [f"left out {message}" for message in bad],
    }


def _digest(source: Source) -> str:
    """Identify what is packed: every sample's name, key and label, and the classes."""
    digest = hashlib.sha256(json.dumps(source.classes).encode())
    for sample in zip(source.names, source.keys, source.labels, strict=True):
        digest.update(json.dumps(sample).encode())
    return digest.hexdigest()


def _claim(folder: Path, request: dict[str, Any]) -> None:
    """Reserve the folder for this request, or find that it already is."""
    place = folder / "_pack.json"
    if not place.exists():
        others = sorted(entry.name for entry in folder.iterdir() if not entry.name.endswith(".tmp"))
        if others:
            raise DataError(f"{folder} is not empty (it holds {others[0]}): choose another folder")
        write_json(place, request)
        return
    try:
        earlier = json.loads(place.read_text())
        # Finished shards stay right under another --skip_bad, which only says whether an unreadable image ends it.
        different = [name for name in request if earlier.get(name) != request[name] and name != "skip_bad"]
    except (ValueError, AttributeError):
        raise DataError(f"{place} is damaged: remove the folder and pack again") from None
    if different:
        raise DataError(f"{folder} holds another pack (other {', '.join(different)}): choose another folder")


def _write_shards(plan: Plan, workers: int) -> tuple[list[int], list[str]]:
    """Write the missing shards; return the number of samples in every one and what is wrong with skipped images."""
    import webdataset.writer  # noqa: F401  before the workers are forked, so that not each of them has to

    counts = {}
    for number, samples in enumerate(plan.shards):
        count = _finished(plan.path(number))
        if count == len(samples) or (count is not None and plan.skip_bad and count < len(samples)):
            counts[number] = count
    todo = [number for number in range(len(plan.shards)) if number not in counts]
    bad: list[str] = []
    with contextlib.closing(Progress("pack", sum(map(len, plan.shards)), sum(counts.values()))) as progress:
        results = run_tasks(partial(_write_shard, plan), todo, workers=workers, count=progress.add)
        try:
            with contextlib.closing(results):
                for number, (count, messages) in results:
                    counts[number] = count
                    bad += messages
        except KeyboardInterrupt:
            finished = f"{len(counts)} of {len(plan.shards)} shards are finished"
            raise KeyboardInterrupt(f"{finished}; the same command goes on from there") from None
    return [counts[number] for number in range(len(plan.shards))], bad


def _finished(path: Path) -> int | None:
    """Return the number of samples in a shard that an earlier run finished, None if there is none or it is damaged."""
    if not path.exists():
        return None
    reader = ShardReader(str(path))
    try:
        for _ in reader.read(lambda number: False):
            pass
    except DataError:
        return None
    return None if reader.truncated else reader.count


def _write_shard(plan: Plan, number: int, count: Count) -> tuple[int, list[str]]:
    """Write one shard under a temporary name, then rename it; return its number of samples and its skipped images."""
    from webdataset.writer import TarWriter  # here, because it imports torch

    source, path = plan.source, plan.path(number)
    bad: list[str] = []
    # A fixed time and owner make the shard's bytes a function of the request.
    with (
        write_errors(path),
        _replacing(path) as file,
        TarWriter(file, encoder=False, mtime=0, user="", group="") as writer,
    ):
        for sample in plan.shards[number]:
            data, extension = source.read(sample)
            try:
                data, extension = plan.encoding.apply(data, extension)
            except DataError as error:
                if not plan.skip_bad:
                    raise DataError(f"{source.names[sample]}: {error}; --skip_bad leaves such images out") from None
                bad.append(f"{source.names[sample]}: {error}")
            else:
                label = str(source.labels[sample]).encode()
                writer.write({"__key__": source.keys[sample], extension: data, "cls": label})
            count(1)
    return len(plan.shards[number]) - len(bad), bad


def index_files(
    folder: Path, counts: dict[str, int], split: str, num_classes: int, classes: Sequence[str] | None
) -> dict[str, dict[str, Any]]:
    """Return the content of `_info.json` (timm's fields, and the classes in label order) and `sizes.json`."""
    details = {
        "name": split,
        "num_samples": sum(counts.values()),
        "filenames": list(counts),
        "shard_lengths": list(counts.values()),
    }
    info: dict[str, Any] = {"name": folder.resolve().name, "splits": {split: details}, "num_classes": num_classes}
    if classes is not None:
        info["classes"] = list(classes)
    return {"_info.json": info, "sizes.json": counts}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file that appears at once and complete; raises DataError when it cannot be written."""
    with write_errors(path), _replacing(path) as file:
        file.write(json.dumps(content, indent=1).encode())


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that appears under its name only once it is complete and on the disk."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn errors of the file system, such as a full disk, into a DataError that names `path`."""
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from None
