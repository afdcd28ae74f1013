"""Data sets that fit in memory, through one entry: MNIST, Fashion-MNIST, CIFAR-10, image folders, shards.

    images = load_images("cifar10", "test", count=1000, seed=0)     # ImageSet: uint8 [1000, 3, 32, 32] and labels
    with open_batches(images, global_batch=128, seed=0, device=device) as batches:
        for batch in batches:                                       # without end; ranks share each batch
            batch["image"]  # uint8 [128, 3, 32, 32]

| data | what is read |
|---|---|
| `mnist`, `fashion_mnist`, `cifar10` | files in $SHIFTLENS_DATA, the cache or /usr/share/datasets; else downloaded |
| `cifar10:PATH` | the files of that data set in this folder or archive, never downloaded |
| a folder or archive | idx files, CIFAR batches, or images in class folders, perhaps under train/ and test/ or val/ |
| shards | as `data.tar.find_shards` takes them; a folder may hold those of each split in a folder of its own |

The cache is $SHIFTLENS_CACHE, by default ~/.cache/shiftlens; data.published says where else files may be.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import re
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, TypedDict

import numpy as np
import torch
from torch import Tensor

from data import DataError
from data.containers import Archive, Arrays, open_files
from data.parallel import Progress
from data.published import NAMED, named_arrays, read_arrays
from data.sources import Source, load_source
from data.stream import open_pass
from data.tar import find_shards
from data.transforms import EvalTransform, decode, sample_random
from data.urls import scheme

Split = Literal["train", "test"]
MEMORY_LIMIT = 8 * 2**30  # bytes of pixels; every process of a run holds its own
_SPLIT_FOLDERS = {"train": ("train", "training"), "test": ("test", "val", "validation")}

log = logging.getLogger("shiftlens")


@dataclass(frozen=True)
class ImageSet:
    """Labelled images of one size in memory.

    images: uint8 [N, C, H, W]. labels: int64 [N]. classes: names in the order of the labels. name: for people.
    fingerprint: SHA-256 over all of it, equal where the content is. numbers: int64 [N], place of each image in the
    whole split; None: all of it, in order.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    name: str
    fingerprint: str
    numbers: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)


def load_images(
    data: str,
    split: Split,
    *,
    count: int = 0,
    seed: int = 0,
    every: int = 1,
    most: int = 0,
    size: int | None = None,
    channels: int | None = None,
) -> ImageSet:
    """Read a split of a data set into memory, or a part of it: then only that part is decoded, but for shards.

    Args:
        data: see the table at the top of this file.
        split: "train", or "test", which is also found as val/. Files that are not divided are used whole, and said so.
        count: this many images drawn without replacement by `seed`, in the order of the data; 0: all. The draw is the
            same in every process and on every machine.
        every: each how many-th image, from the first; not together with count.
        most: no more than that many of them; 0: no limit.
        size: side in pixels; images in files and shards of another size get the published evaluation transform. None:
            all have to be of one size.
        channels: 1 takes one channel of grey images that are stored with three; 3 repeats that of grey images.

    Raises DataError: nothing found and no network (with the places where files may be put), damaged files, more images
    asked for than there are, `every` below 1, images of several sizes, more than 8 GiB of pixels.
    """
    if split not in _SPLIT_FOLDERS:
        raise DataError(f"split {split!r}: choose train or test")
    if count < 0 or seed < 0:
        raise DataError(f"count {count} and seed {seed} must not be negative")
    if every < 1 or most < 0:
        raise DataError(f"every {every} must be at least 1, and most {most} not negative")
    if count and (every > 1 or most):
        raise DataError(f"count {count} is a draw: it cannot be combined with every {every} and most {most}")
    name, colon, place = data.partition(":")
    with tempfile.TemporaryDirectory(prefix="shiftlens-") as folder:
        scratch = Path(folder) / "unpacked.tar"
        if name in NAMED and (place or not colon):
            found = _from_arrays(named_arrays(name, place, split, scratch), name, split, size)
        elif _are_shards(data, split):
            found = _from_shards(data, split, size)
        else:
            found = _from_files(data, split, size, scratch)
        if count > found.total:
            raise DataError(f"{data}: {count} images asked for, there are {found.total}")
        numbers = draw_images(found.total, count, seed) if count else np.arange(0, found.total, every)[: most or None]
        images = _with_channels(torch.from_numpy(found.read(numbers)), channels, data)
    labels = torch.from_numpy(np.asarray(found.labels(), dtype=np.int64)[numbers])
    whole = len(numbers) == found.total
    if not whole:
        how = f"drawn with seed {seed}" if count else f"one of each {every}" if every > 1 else "the first"
        log.info("images   %d of the %d of %s, %s", len(numbers), found.total, found.name, how)
    return ImageSet(
        images,
        labels,
        found.classes,
        found.name,
        fingerprint(images, labels, found.classes),
        None if whole else torch.from_numpy(numbers),
    )


def fingerprint(images: Tensor, labels: Tensor, classes: Sequence[str]) -> str:
    """SHA-256 over shape, classes, labels and pixels."""
    digest = hashlib.sha256(repr((list(images.shape), list(classes))).encode())
    digest.update(labels.cpu().numpy().tobytes())
    digest.update(images.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def draw_images(total: int, count: int, seed: int) -> np.ndarray:
    """Which `count` of `total` images to take: int64, ascending; all scripts take the same by the same seed.

    Only raw draws, which numpy promises never to change.
    """
    draws = np.random.PCG64(np.random.SeedSequence([seed, total])).random_raw(total)
    return np.sort(np.argsort(draws, kind="stable")[:count])


def _with_channels(images: Tensor, channels: int | None, data: str) -> Tensor:
    if channels in (None, images.shape[1]):
        return images
    if channels == 3 and images.shape[1] == 1:
        return images.expand(-1, 3, -1, -1).contiguous()
    if channels == 1 and images.shape[1] == 3:
        if not (torch.equal(images[:, 0], images[:, 1]) and torch.equal(images[:, 0], images[:, 2])):
            raise DataError(f"{data}: colour images, the model takes one grey channel")
        return images[:, :1].contiguous()
    raise DataError(f"{data}: images of {images.shape[1]} channels, not {channels}")


# ---------------------------------------------------------------------------------------------------------------------
# What is read, and how
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    """A split that was found but not yet read.

    read: numbers, ascending, to uint8 [n, C, H, W]. labels: of all, to be asked for after `read`.
    """

    name: str
    total: int
    classes: tuple[str, ...]
    read: Callable[[np.ndarray], np.ndarray]
    labels: Callable[[], Sequence[int] | np.ndarray]


def _check_memory(name: str, shape: tuple[int, ...]) -> None:
    needed = int(np.prod(shape, dtype=np.int64))
    if needed > MEMORY_LIMIT:
        sizes = f"{shape[0]:,} images of {shape[2]}x{shape[3]} take {needed / 2**30:.1f} GiB of memory"
        limit = f"{MEMORY_LIMIT // 2**30} GiB"
        raise DataError(f"{name}: {sizes}, more than {limit}: take some of them, or ask for a smaller size")


def _from_arrays(arrays: Arrays, name: str, split: str, size: int | None) -> _Found:
    side = arrays.images.shape[1:3]
    if size is not None and side != (size, size):
        raise DataError(f"{name}: images of {side[0]}x{side[1]} pixels, the model takes {size}x{size}")

    def read(numbers: np.ndarray) -> np.ndarray:
        images = arrays.images[numbers]
        return np.ascontiguousarray(images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2))

    return _Found(f"{name}/{split}", len(arrays.names), arrays.classes, read, lambda: arrays.labels)


def _from_files(data: str, split: str, size: int | None, scratch: Path) -> _Found:
    path = os.path.expanduser(data)
    if not os.path.exists(path):
        known = ", ".join(NAMED)
        raise DataError(f"{data}: no such folder or archive, and no data set of that name ({known})")
    content = open_files(path, scratch)
    arrays = read_arrays(content, split, NAMED["cifar10"].classes)
    if arrays is not None:
        return _from_arrays(arrays, data, split, size)
    # The folder around a file is its class, which may well be called train.
    folders = {part for name in content.names for part in name.split("/")[:-2]}
    inside = next((folder for folder in _SPLIT_FOLDERS[split] if folder in folders), None)
    if inside is None:
        others = [folder for names in _SPLIT_FOLDERS.values() for folder in names if folder in folders]
        if others:
            raise DataError(f"{data} has a folder {others[0]}/ but none for the split {split!r}")
        _say_undivided(data, split)
    opened = content.tar if isinstance(content, Archive) else path  # a packed archive is not unpacked a second time
    try:
        source = load_source(opened, split=inside, scratch=scratch)
    except DataError as error:
        raise DataError(str(error).replace(opened, data)) from None

    def read(numbers: np.ndarray) -> np.ndarray:
        return _decoded(source, numbers, data, size)

    return _Found(f"{data}/{inside or 'all'}", len(source.names), source.classes, read, lambda: source.labels)


def _say_undivided(data: str, split: str) -> None:
    if Path(data).name not in _SPLIT_FOLDERS[split]:  # else it is the folder of the split that was named
        log.warning("%s is not divided into train/ and test/: all of it is used as %s", data, split)


def _decoded(source: Source, numbers: np.ndarray, data: str, size: int | None) -> np.ndarray:
    transform = None if size is None else EvalTransform(size)
    images: np.ndarray | None = None
    progress = Progress(f"images of {data}", len(numbers))
    for row, number in enumerate(numbers.tolist()):
        content = source.read(number)[0]
        try:
            image = decode(content)
            if transform is not None and image.shape[1:] != (size, size):
                image = transform(content, sample_random(0, 0, number))
        except DataError as error:
            raise DataError(f"{data}, {source.names[number]}: {error}") from None
        if images is None:
            shape = (len(numbers), *image.shape)
            _check_memory(data, shape)
            images = np.empty(shape, np.uint8)
        if image.shape != images.shape[1:]:
            sizes = f"{images.shape[3]}x{images.shape[2]} and {image.shape[2]}x{image.shape[1]} pixels"
            raise DataError(f"{data} holds images of several sizes ({sizes}), the second is {source.names[number]}")
        images[row] = image.numpy()
        progress.add(1)
    progress.close()
    assert images is not None, "a source without images is refused"
    return images


def _are_shards(data: str, split: str) -> bool:
    """Whether a name means shards of this project, and not a folder or archive of image files."""
    path = Path(data).expanduser()
    if path.is_dir():
        return any(any(folder.glob("*.tar")) for folder in _split_places(path, split))
    if path.is_file():
        return path.suffix == ".tar" and _holds_labels(path)
    return bool(scheme(data)) or "::" in data or bool(re.search(r"[*?\[{]", data))


def _split_places(path: Path, split: str) -> list[Path]:
    return [*(path / folder for folder in _SPLIT_FOLDERS[split]), path]


def _holds_labels(path: Path) -> bool:
    try:
        with tarfile.open(path, "r:") as archive:
            return any(member.name.endswith(".cls") for member in itertools.islice(archive, 3))
    except (tarfile.TarError, OSError):
        return False  # whatever reads it next says what is wrong


def _from_shards(data: str, split: str, size: int | None) -> _Found:
    path = Path(data).expanduser()
    inside = path
    if path.is_dir():
        inside = next(folder for folder in _split_places(path, split) if any(folder.glob("*.tar")))
    if inside == path:
        _say_undivided(data, split)
    shards = find_shards(data if inside == path else str(inside))
    labels = np.full(shards.num_samples, -1, dtype=np.int64)

    def read(numbers: np.ndarray) -> np.ndarray:
        images: np.ndarray | None = None
        progress, row = Progress(f"images of {data}", len(numbers)), 0
        transform = None if size is None else EvalTransform(size)
        with open_pass(shards, batch_size=256, transform=transform, only=numbers) as batches:
            for batch in batches:
                if images is None:
                    shape = (len(numbers), *batch["image"].shape[1:])
                    _check_memory(data, shape)
                    images = np.empty(shape, np.uint8)
                images[row : row + len(batch["index"])] = batch["image"].numpy()
                labels[batch["index"].numpy()] = batch["label"].numpy()
                row += len(batch["index"])
                progress.add(len(batch["index"]))
        progress.close()
        assert images is not None, "shards without samples are refused"
        return images

    classes = shards.classes or tuple(str(label) for label in range(shards.num_classes or 0))
    if not classes:
        raise DataError(f"{data}: neither class names nor their number stand in _info.json; write the shards anew")
    return _Found(f"{data}/{split}", shards.num_samples, classes, read, lambda: labels)


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


class MemoryBatch(TypedDict):
    """This rank's rows of one global batch, on the device of the images."""

    image: Tensor  # uint8 [n, C, H, W]
    label: Tensor  # int64 [n]
    index: Tensor  # int64 [n], rows of the ImageSet


class MemoryStream:
    """Batches for training out of memory, without end; what `data.stream.Stream` is for shards. See `open_batches`.

    Attributes:
        shards: the ImageSet, whose `fingerprint` belongs in a checkpoint.
        num_samples: images of it.
        steps_per_epoch: whole global batches in it.
        streams: 1, the order of an epoch is one permutation: any number of ranks that divides the global batch may
            continue it.
        epoch: of the batch handed out last.
    """

    def __init__(
        self,
        images: ImageSet,
        *,
        global_batch: int,
        rank: int,
        world: int,
        seed: int,
        epoch: int,
        start_step: int,
        device: torch.device,
    ) -> None:
        self.shards = images
        self.num_samples = len(images)
        self.steps_per_epoch = len(images) // global_batch
        self.streams = 1
        self.epoch = epoch
        self._images, self._labels = images.images.to(device), images.labels.to(device)
        self._own = slice(rank * global_batch // world, (rank + 1) * global_batch // world)
        self._global_batch, self._seed = global_batch, seed
        self._delivered = 0
        self._batches: Iterator[MemoryBatch] | None = self._without_end(epoch, start_step)

    def _without_end(self, epoch: int, start_step: int) -> Iterator[MemoryBatch]:
        for self.epoch in itertools.count(epoch):
            steps = self.steps_per_epoch
            order = epoch_permutation(self.num_samples, self._seed, self.epoch)[: steps * self._global_batch]
            own = order.reshape(steps, self._global_batch)[:, self._own]
            rows = torch.from_numpy(np.ascontiguousarray(own)).to(self._images.device)
            for step in range(start_step, steps):
                index = rows[step]
                self._delivered += len(index)
                # index_select, not indexing: one kernel, and on a GPU no wait for the host
                yield {
                    "image": self._images.index_select(0, index),
                    "label": self._labels.index_select(0, index),
                    "index": index,
                }
            start_step = 0

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> MemoryBatch:
        if self._batches is None:
            raise RuntimeError("closed; open another")
        return next(self._batches)

    def report(self) -> dict[str, object]:
        """Samples delivered to this rank, and that none were bad; as `data.stream.Stream` reports."""
        return {"samples": self._delivered, "bad": 0, "reasons": {}, "examples": {}}

    def close(self) -> None:
        """Let go of the images; batches that were handed out stay valid."""
        self._batches = None
        self._images = self._labels = torch.empty(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_batches(
    images: ImageSet,
    *,
    global_batch: int,
    rank: int = 0,
    world: int = 1,
    seed: int = 0,
    epoch: int = 0,
    start_step: int = 0,
    device: torch.device | str = "cpu",
) -> MemoryStream:
    """Open training batches without end, from step `start_step` of epoch `epoch` on.

    An epoch is the permutation of all images by (seed, epoch) alone, cut into global batches of which each rank has an
    equal slice, rank after rank: neither ranks nor restarts change the order. What is left over at its end, fewer than
    a batch, is not used in that epoch; it is another remainder each time, as with shards.

    Pixels and labels are kept on `device`, so a batch costs one gather there.

    Raises DataError: a batch larger than the set or not divisible among the ranks, impossible numbers.
    """
    if not 0 <= rank < world:
        raise DataError(f"rank {rank} is not one of {world} processes")
    if global_batch < 1 or global_batch % world:
        raise DataError(f"a global batch of {global_batch} cannot be divided among {world} processes")
    if global_batch > len(images):
        raise DataError(f"a global batch of {global_batch} is larger than the data set ({len(images)} samples)")
    if seed < 0 or epoch < 0:
        raise DataError(f"seed {seed} and epoch {epoch} must not be negative")
    steps = len(images) // global_batch
    if not 0 <= start_step <= steps:
        raise DataError(f"start step {start_step} is outside the epoch of {steps} steps")
    return MemoryStream(
        images,
        global_batch=global_batch,
        rank=rank,
        world=world,
        seed=seed,
        epoch=epoch,
        start_step=start_step,
        device=torch.device(device),
    )


def epoch_permutation(total: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch: int64 [total]. Only raw draws, which numpy promises never to change."""
    draws = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(total)
    return np.argsort(draws, kind="stable")
