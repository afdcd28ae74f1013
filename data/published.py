"""MNIST, Fashion-MNIST and CIFAR-10 by name: where their files are on this machine, or from where they come.

They are looked for in $SHIFTLENS_DATA, in the cache ($SHIFTLENS_CACHE, by default ~/.cache/shiftlens) and where
Debian's packages put theirs, and downloaded from torchvision's mirrors otherwise, unless HF_HUB_OFFLINE=1 forbids that.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import tarfile
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from data import DataError
from data.containers import Archive, Arrays, Folder, cifar_arrays, mnist_arrays, open_files
from data.images import first_line
from data.python_batches import python_arrays

PROBE_SECONDS = 4.0
_PACKAGED = Path("/usr/share/datasets")  # where Debian's packages put theirs

log = logging.getLogger("shiftlens")


@dataclass(frozen=True)
class Published:
    """A published data set.

    classes: in the order of its labels. places: folders and archives below a root where its files may be. torchvision:
    its class there, which knows mirrors and hashes. files: what to look for, for people. first: how the name of each
    split's first file begins. counts: images of train and test.
    """

    classes: tuple[str, ...]
    places: tuple[str, ...]
    torchvision: str
    files: str
    first: dict[str, str]
    counts: tuple[int, int] = (60000, 10000)


_DIGITS = tuple(str(digit) for digit in range(10))
_CLOTHES = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot"
_CIFAR10 = "airplane,automobile,bird,cat,deer,dog,frog,horse,ship,truck"
_IDX_FIRST = {"train": "train-images", "test": "t10k-images"}
_IDX = "{train,t10k}-{images-idx3,labels-idx1}-ubyte[.gz]"
NAMED = {
    "mnist": Published(_DIGITS, ("mnist", "MNIST/raw", "MNIST"), "MNIST", _IDX, _IDX_FIRST),
    "fashion_mnist": Published(
        tuple(_CLOTHES.split(",")),
        ("fashion_mnist", "fashion-mnist", "FashionMNIST/raw", "FashionMNIST"),
        "FashionMNIST",
        _IDX,
        _IDX_FIRST,
    ),
    "cifar10": Published(
        tuple(_CIFAR10.split(",")),
        (
            *("cifar10", "cifar-10-batches-py", "cifar-10-batches-bin", "cifar10/cifar-10-batches-py"),
            *("cifar-10-python.tar.gz", "cifar-10-binary.tar.gz"),
        ),
        "CIFAR10",
        "{data_batch_1..5,test_batch}[.bin]",
        {"train": "data_batch_1", "test": "test_batch"},
        (50000, 10000),
    ),
}


def read_arrays(content: Folder | Archive, split: str, classes: tuple[str, ...]) -> Arrays | None:
    """The split of idx files or CIFAR batches; None where there are none."""
    arrays = python_arrays(content, split, classes)
    if arrays is None:
        arrays = mnist_arrays(content, split)
    return cifar_arrays(content, split) if arrays is None else arrays


def cache_folder() -> Path:
    """Where downloads are kept: $SHIFTLENS_CACHE, by default ~/.cache/shiftlens."""
    return Path(os.environ.get("SHIFTLENS_CACHE") or "~/.cache/shiftlens").expanduser()


def named_arrays(name: str, place: str, split: str, scratch: Path) -> Arrays:
    """A split of the data set `name` of NAMED, from the folder or archive `place`; empty: wherever it is.

    A packed archive is unpacked to `scratch`. Raises DataError: not there and no network, damaged, or another data set.
    """
    published = NAMED[name]
    arrays = _find(name, place, split, scratch)
    if arrays is None and not place:
        _download(name)
        arrays = _find(name, place, split, scratch)
    if arrays is None:
        other = f" (a folder of images is named by its path alone, {place})" if os.path.isdir(place) else ""
        raise DataError(f"{place or cache_folder()} holds no {split} files of {name}: {published.files}{other}")
    if len(arrays.classes) > len(published.classes):
        raise DataError(f"{arrays.path} has labels up to {len(arrays.classes) - 1}: it is not {name}")
    usual = published.counts[split == "test"]
    if len(arrays.names) != usual:
        log.warning("%s: %d images where the %s split of %s has %d", arrays.path, len(arrays.names), split, name, usual)
    return Arrays(arrays.path, arrays.names, arrays.images, arrays.labels, published.classes)


def _find(name: str, place: str, split: str, scratch: Path) -> Arrays | None:
    """The first place that holds the split's files."""
    published = NAMED[name]
    if place:
        root = Path(place).expanduser()
        if not root.exists():
            raise DataError(f"{name}:{place}: no such folder or archive")
        candidates = [root, *(root / below for below in published.places), root / "raw"]
    else:
        given = os.environ.get("SHIFTLENS_DATA")
        roots = [Path(given).expanduser()] if given else []
        candidates = [
            root / below for root in [*roots, cache_folder() / "datasets", _PACKAGED] for below in published.places
        ]
    for candidate in candidates:
        if candidate.is_dir():
            # Only what lies in the folder itself: below it there may be another data set with the same file names.
            files = sorted(entry.name for entry in os.scandir(candidate) if entry.is_file())
            content: Folder | Archive = Folder(str(candidate), files)
        elif candidate.is_file():
            content = open_files(str(candidate), scratch)
        else:
            continue
        if any(entry.rpartition("/")[2].startswith(published.first[split]) for entry in content.names):
            return read_arrays(content, split, published.classes)
    return None


def _download(name: str) -> None:
    """Fetch a data set into the cache, whole or not at all; only one process of those that share it does so.

    Raises DataError where there is no network, with the ways to do without.
    """
    from torchvision import datasets
    from torchvision.datasets.utils import download_url

    published = NAMED[name]
    final = cache_folder() / "datasets" / name
    ways = (
        f"put {published.files} into $SHIFTLENS_DATA/{name}/ or {final}/, or name their folder or archive: {name}:PATH"
    )
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        raise DataError(f"{name} is not on this machine, and HF_HUB_OFFLINE is set; {ways}")
    source: Any = getattr(datasets, published.torchvision)
    if name == "cifar10":
        mirrors, files = [source.url.rpartition("/")[0] + "/"], [(source.filename, source.tgz_md5)]
    else:
        mirrors, files = list(source.mirrors), list(source.resources)
    mirrors = [mirror for mirror in mirrors if _answers(mirror)]
    if not mirrors:
        raise DataError(f"{name} is not on this machine, and there is no network to fetch it; {ways}")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with open(final.parent / f".{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if final.is_dir():  # another process was here first
                return
            temporary = final.parent / f".{name}.partial"
            shutil.rmtree(temporary, ignore_errors=True)
            log.info("download %s into %s", name, final)
            failures = []
            for mirror in mirrors:
                try:
                    for file, md5 in files:
                        download_url(mirror + file, temporary, file, md5)
                    break
                except (OSError, RuntimeError) as error:  # RuntimeError: another hash
                    failures.append(f"{mirror}: {first_line(error)}")
            else:
                raise DataError(f"{name} cannot be downloaded ({'; '.join(failures)}); {ways}")
            if name == "cifar10":
                with tarfile.open(temporary / files[0][0]) as archive:
                    archive.extractall(temporary, filter="data")
                (temporary / files[0][0]).unlink()
            os.rename(temporary, final)
    except OSError as error:
        raise DataError(f"{name} cannot be kept in {final.parent}: {error.strerror or error}; {ways}") from None


def _answers(url: str) -> bool:
    """Whether the host of a URL answers, through a proxy if one is set; a dead network costs seconds, not minutes."""
    host = urlsplit(url)
    try:
        request = urllib.request.Request(f"{host.scheme}://{host.netloc}/", method="HEAD")
        urllib.request.urlopen(request, timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True
