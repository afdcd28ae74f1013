"""Where the files of an unpacked or archived data set are: folders, tar archives, and arrays in idx or CIFAR files.

Each of Folder, Archive and Arrays has `path` (for messages), `names` and `read(name) -> (bytes, extension)`, and can be
sent to worker processes. Nothing is ever extracted under a member's name, so a hostile archive cannot choose paths.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import posixpath
import re
import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data import DataError

OPENERS: dict[str, Callable[..., Any]] = {
    ".xz": lzma.open,
    ".gz": gzip.open,
    ".tgz": gzip.open,
    ".bz2": bz2.open,
}
CIFAR_DOWNLOADS = {
    "cifar10": "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    "cifar100": "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
}


@dataclass(frozen=True)
class Folder:
    """All files under a folder; names are relative to it, with `/`, sorted."""

    path: str
    names: Sequence[str]

    def read(self, name: str) -> tuple[bytes, str]:
        """Return a file's bytes and lower-case extension; raises DataError naming it when it cannot be read."""
        try:
            return Path(self.path, name).read_bytes(), _extension(name)
        except OSError as error:
            raise DataError(f"cannot read {self.path}/{name}: {error.strerror}") from None


@dataclass(frozen=True)
class Archive:
    """The regular files of a tar, read in any order by offset; names are sorted."""

    path: str
    names: Sequence[str]
    tar: str  # uncompressed: `path` itself, or a copy of it
    places: dict[str, tuple[int, int]]  # name -> (offset, size)

    def read(self, name: str) -> tuple[bytes, str]:
        """Return a member's bytes and lower-case extension; raises DataError when the archive ends before it does."""
        offset, size = self.places[name]
        try:
            with open(
                self.tar, "rb"
            ) as file:  # anew for each member: forked workers would share an open one's position
                file.seek(offset)
                data = file.read(size)
        except OSError as error:
            raise DataError(f"cannot read {self.path}: {error.strerror}") from None
        if len(data) < size:
            raise DataError(f"{self.path} is cut off inside {name}: {len(data)} of {size} bytes")
        return data, _extension(name)


@dataclass(frozen=True)
class Arrays:
    """Images held in memory, uint8 [N, H, W] or [N, H, W, 3], with labels; read as PNG."""

    path: str
    names: Sequence[str]
    images: NDArray[np.uint8]
    labels: Sequence[int]
    classes: tuple[str, ...]

    def read(self, name: str) -> tuple[bytes, str]:
        """Return an image as lossless PNG bytes and the extension png; names end in the image's number."""
        from PIL import Image

        buffer = io.BytesIO()
        Image.fromarray(self.images[int(name.rpartition("/")[2])]).save(buffer, "PNG")
        return buffer.getvalue(), "png"


def open_files(source: str, scratch: Path) -> Folder | Archive:
    """List a folder, or a tar archive; a compressed one is first unpacked to the file `scratch`.

    Raises DataError for a path that is neither, for a damaged archive, and for members that cannot be told apart.
    """
    if os.path.isdir(source):
        return Folder(source, sorted(_walk(source)))
    if not os.path.isfile(source):
        raise DataError(f"{source}: no such folder or archive")
    suffix = os.path.splitext(source)[1].lower()
    tar = source
    try:
        if suffix in OPENERS:
            tar = str(scratch)
            with OPENERS[suffix](source) as packed, open(tar, "wb") as unpacked:
                shutil.copyfileobj(packed, unpacked, 1 << 20)
        places = _members(source, tar)
        return Archive(source, sorted(places), tar, places)
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        raise DataError(f"{source} is no readable tar archive: {error}") from None


def _walk(folder: str) -> Iterator[str]:
    def refuse(error: OSError) -> None:
        raise DataError(f"cannot list {error.filename}: {error.strerror}")

    for place, _, files in os.walk(folder, followlinks=True, onerror=refuse):
        inside = os.path.relpath(place, folder).replace(os.sep, "/")
        for file in files:
            yield file if inside == "." else f"{inside}/{file}"


def _members(source: str, tar: str) -> dict[str, tuple[int, int]]:
    places: dict[str, tuple[int, int]] = {}
    with tarfile.open(tar, "r:") as archive:
        for member in archive:
            name = posixpath.normpath(member.name)
            if member.islnk() or member.issym():
                raise DataError(f"{source}: {name} is a link; unpack the archive and pack the folder instead")
            if not member.isreg():
                continue
            if name in places:
                raise DataError(f"{source} holds {name} twice")
            places[name] = (member.offset_data, member.size)
        end = archive.offset
    # tarfile takes a file that is cut off at or inside a header for a complete one, so the closing block must be there.
    with open(tar, "rb") as file:
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise DataError(
                f"{source} is no readable tar archive: it ends without a closing block after {len(places)} files"
            )
    return places


# ---------------------------------------------------------------------------------------------------------------------
# MNIST (idx files, http://yann.lecun.com/exdb/mnist) and CIFAR (binary version, https://www.cs.toronto.edu/~kriz/cifar.html)
# ---------------------------------------------------------------------------------------------------------------------


def mnist_arrays(content: Folder | Archive, split: str | None) -> Arrays | None:
    """Read MNIST (or a set in its format, such as Fashion-MNIST); None when no file is called like it.

    split: "train" or "test" (the t10k files); needed when both are there. Raises DataError where there are two such
    sets, in folders of their own or with names of their own before `train-` (EMNIST).
    """
    files: dict[tuple[str, str], str] = {}
    sets: dict[tuple[str, str], str] = {}
    for name in content.names:  # sorted, so that an unpacked file comes before its .gz and is preferred
        match = re.search(r"(train|t10k)-(images|labels)[-.]idx[13]-ubyte(\.gz)?$", name)
        if match:
            key = ("train" if match[1] == "train" else "test", match[2])
            first = sets.setdefault(key, name[: match.start()])
            if first != name[: match.start()]:
                raise DataError(f"{content.path} holds two data sets, {files[key]} and {name}: give one's own folder")
            files.setdefault(key, name)
    if not files:
        return None
    split = _choose(content.path, sorted({kind for kind, _ in files}), split)
    images = _read_idx(content, files, split, "images", 3)
    labels = _read_idx(content, files, split, "labels", 1)
    if len(images) != len(labels):
        raise DataError(f"{content.path}: {len(images)} {split} images but {len(labels)} labels")
    classes = tuple(str(label) for label in range(int(labels.max()) + 1))
    return Arrays(content.path, _numbered(split, len(images)), images, labels.tolist(), classes)


def cifar_arrays(content: Folder | Archive, split: str | None) -> Arrays | None:
    """Read the binary version of CIFAR-10 or CIFAR-100 (fine labels); None when no file is called like it.

    split: "train" or "test"; needed when both are there. The Python version is pickled, and refused.
    """
    by_name = {posixpath.basename(name): name for name in content.names}
    batches = {
        "cifar10": {"train": [f"data_batch_{number}.bin" for number in range(1, 6)], "test": ["test_batch.bin"]},
        "cifar100": {"train": ["train.bin"], "test": ["test.bin"]},
    }
    for kind, splits in batches.items():
        pickled = "data_batch_1" if kind == "cifar10" else "cifar-100-python"
        if pickled in by_name or any(pickled in posixpath.dirname(name).split("/") for name in content.names):
            download = CIFAR_DOWNLOADS[kind]
            raise DataError(f"{content.path} is the Python version, which is pickled and not read: download {download}")
        present = [name for name, files in splits.items() if any(file in by_name for file in files)]
        if not present:
            continue
        split = _choose(content.path, present, split)
        missing = [file for file in splits[split] if file not in by_name]
        if missing:
            raise DataError(f"{content.path} lacks {', '.join(missing)}")
        label_bytes = 1 if kind == "cifar10" else 2  # CIFAR-100: coarse, then fine label
        rows = np.concatenate([_read_batch(content, by_name[file], label_bytes) for file in splits[split]])
        images = rows[:, label_bytes:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        labels = rows[:, label_bytes - 1].tolist()
        count = 10 if kind == "cifar10" else 100
        if max(labels) >= count:
            raise DataError(f"{content.path} holds label {max(labels)}: not the binary version of {kind}")
        listing = "batches.meta.txt" if kind == "cifar10" else "fine_label_names.txt"
        classes = tuple(str(label) for label in range(count))
        if listing in by_name:
            classes = tuple(content.read(by_name[listing])[0].decode("ascii", "replace").split())
        if len(classes) != count:
            raise DataError(f"{content.path}: {listing} names {len(classes)} classes, not {count}")
        return Arrays(content.path, _numbered(split, len(rows)), images, labels, classes)
    return None


def _choose(path: str, present: list[str], split: str | None) -> str:
    if split is None and len(present) == 1:
        return present[0]
    if split is None:
        raise DataError(f"{path} holds {' and '.join(present)}: choose one with --split")
    if split not in present:
        raise DataError(f"{path} holds {' and '.join(present)}, but no {split} images")
    return split


def _numbered(split: str, count: int) -> list[str]:
    return [f"{split}/{number:05d}" for number in range(count)]


def _read_idx(
    content: Folder | Archive, files: dict[tuple[str, str], str], split: str, part: str, dimensions: int
) -> NDArray[np.uint8]:
    """Read one idx file of unsigned bytes: two zero bytes, type 8, number of dimensions, their sizes, the values."""
    name = files.get((split, part))
    if name is None:
        raise DataError(f"{content.path} has no {split} {part}")
    data, _ = content.read(name)
    try:
        data = gzip.decompress(data) if name.endswith(".gz") else data
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{content.path}/{name} is damaged: {error}") from None
    header = 4 + 4 * dimensions
    if data[:4] != bytes((0, 0, 8, dimensions)) or len(data) < header:
        raise DataError(f"{content.path}/{name} is no idx file of {dimensions}-dimensional bytes")
    shape = struct.unpack(f">{dimensions}I", data[4:header])
    values = np.frombuffer(data, np.uint8, offset=header)
    if values.size != np.prod(shape, dtype=np.int64) or values.size == 0:
        raise DataError(f"{content.path}/{name} holds {values.size} values, its header says {shape}")
    return values.reshape(shape)


def _read_batch(content: Folder | Archive, name: str, label_bytes: int) -> NDArray[np.uint8]:
    """Read rows of label bytes followed by 3072 pixel bytes (red, green and blue planes of 32x32)."""
    data = np.frombuffer(content.read(name)[0], np.uint8)
    if data.size == 0 or data.size % (label_bytes + 3072):
        raise DataError(
            f"{content.path}/{name}: {data.size} bytes are no whole number of {label_bytes + 3072}-byte rows"
        )
    return data.reshape(-1, label_bytes + 3072)


def _extension(name: str) -> str:
    return posixpath.splitext(name)[1][1:].lower()
