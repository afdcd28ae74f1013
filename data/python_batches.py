"""CIFAR's Python batches, which are pickles, read without running what a pickle may say.

An unpickler that knows four names, those that numpy's arrays are made of, and refuses every other: a batch is a
dictionary of an array, lists of numbers and text, and nothing in it can be called.
"""

from __future__ import annotations

import io
import pickle
import posixpath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data import DataError
from data.containers import Archive, Arrays, Folder

_CORE = ("numpy.core.multiarray", "numpy._core.multiarray")  # before and since numpy 2
_BATCHES = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}


class _RefusedError(Exception):
    """The pickle names something else."""


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if module in _CORE and name == "_reconstruct":
            return np.empty(0).__reduce__()[0]  # numpy's own, wherever it keeps it
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes for Python 2
            return _latin_bytes
        raise _RefusedError(f"it names {module}.{name}")


def _latin_bytes(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise _RefusedError(f"it names the encoding {encoding}")
    return text.encode("latin1")


def python_arrays(content: Folder | Archive, split: str, classes: tuple[str, ...]) -> Arrays | None:
    """Read a split of CIFAR-10's Python version; None when no file is called like a batch of it.

    split: "train" or "test". classes: the ten names. Raises DataError for missing batches, and for one that is damaged
    or holds anything but arrays.
    """
    by_name = {posixpath.basename(name): name for name in content.names}
    if not any(name in by_name for names in _BATCHES.values() for name in names):
        return None
    missing = [name for name in _BATCHES[split] if name not in by_name]
    if missing:
        raise DataError(f"{content.path} lacks {', '.join(missing)}")
    pixels, labels = [], []
    for name in _BATCHES[split]:
        rows, own = _read(content, by_name[name], len(classes))
        pixels.append(rows)
        labels += own
    images = np.concatenate(pixels).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return Arrays(content.path, [f"{split}/{number:05d}" for number in range(len(images))], images, labels, classes)


def _read(content: Folder | Archive, name: str, num_classes: int) -> tuple[NDArray[np.uint8], list[int]]:
    place = f"{content.path}/{name}"
    try:
        batch = _ArraysOnly(io.BytesIO(content.read(name)[0]), encoding="bytes").load()
    except DataError:
        raise
    except _RefusedError as error:
        raise DataError(f"{place} is refused, nothing in it was run: {error}") from None
    # Damaged bytes make the unpickler and numpy raise nearly anything: EOFError, ValueError, KeyError, MemoryError...
    except Exception as error:
        raise DataError(f"{place} is no readable batch: {type(error).__name__}: {error}") from None
    named = batch if isinstance(batch, dict) else {}
    rows, labels = (named.get(key.encode(), named.get(key)) for key in ("data", "labels"))
    if not (isinstance(rows, np.ndarray) and rows.dtype == np.uint8 and rows.ndim == 2 and rows.shape[1] == 3072):
        raise DataError(f"{place} holds no array of uint8 rows of 3072 pixels")
    if not (isinstance(labels, list) and len(labels) == len(rows) and all(type(label) is int for label in labels)):
        raise DataError(f"{place} holds no list of a label for each of its {len(rows)} images")
    if not all(0 <= label < num_classes for label in labels):
        raise DataError(f"{place} holds labels outside 0 to {num_classes - 1}")
    return rows, labels
