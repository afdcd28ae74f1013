"""Labelled images as data sets are handed out: image folders and archives, MNIST idx files, CIFAR binary batches.

`load_source` lists what is there and decides the label, class name and key of every image, without reading pixels. The
rules for labels, in the order they are tried:

1. with a class list (`--classes`), the position of the class in the list;
2. class folders whose names are all integers (ImageNetV2) are their label, so "10" comes after "9";
3. otherwise the position of the class in the sorted list of those present (ImageNet's wnids: its official order).

Keys name the samples inside shards. They are made from the file names but hold only letters, digits, `-` and `_`.
"""

from __future__ import annotations

import csv
import hashlib
import json
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data import DataError
from data.containers import Archive, Arrays, Folder, cifar_arrays, mnist_arrays, open_files
from data.shifts import SETS
from data.tar import IMAGE_EXTENSIONS

WNID = re.compile(r"n[0-9]{8}")


@dataclass(frozen=True)
class Layout:
    """How a data set is arranged, and the numbers its publishers state (None: not fixed)."""

    explanation: str
    num_classes: int | None = None
    num_images: tuple[int, ...] = ()


LAYOUTS = {
    "auto": Layout("found out from the file names"),
    "folders": Layout("a folder per class"),
    "flat": Layout("one folder of WNID_name.JPEG files, or of any names with --val_labels"),
    "imagenet": Layout(
        "ImageNet's train/ or val/: 1000 wnid folders, or flat with --val_labels", 1000, (1281167, 50000)
    ),
    "imagenet_v2": Layout("integer folders", 1000, (10000,)),
    "imagenet_r": Layout("200 wnid folders", 200, (30000,)),
    "imagenet_a": Layout("200 wnid folders", 200, (7500,)),
    "imagenet_sketch": Layout("1000 wnid folders", 1000, (50889,)),
    "objectnet": Layout("named folders; those that --classes does not name (default: 113 classes) are left out"),
    "mnist": Layout("idx files, packed or not", 10, (60000, 10000)),
    "cifar10": Layout("binary version", 10, (50000, 10000)),
    "cifar100": Layout("binary version, fine labels", 100, (50000, 10000)),
}


@dataclass(frozen=True)
class Source:
    """N labelled images, ready to be read by number.

    names: where each comes from. labels: in [0, len(classes)). keys: unique. classes: names in label order.
    dropped: number of files left out, by reason. notes: what a person should know before trusting the set.
    """

    names: Sequence[str]
    labels: Sequence[int]
    keys: Sequence[str]
    classes: tuple[str, ...]
    content: Folder | Archive | Arrays
    dropped: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def read(self, number: int) -> tuple[bytes, str]:
        """Return the file's bytes and its extension (png for arrays); raises DataError naming an unreadable file."""
        return self.content.read(self.names[number])


def load_source(
    source: str,
    *,
    layout: str = "auto",
    split: str | None = None,
    classes: str | None = None,
    val_labels: str | None = None,
    scratch: Path,
) -> Source:
    """List a data set given as a folder or a .tar[.gz|.xz|.bz2] archive; compressed archives are unpacked to `scratch`.

    split: the folder of that name inside the source, or train | test of MNIST and CIFAR. classes: the name of a set or
    a file with a class list (see `read_classes`); by default ObjectNet's 113 for its layout, and the classes that are
    there for others. val_labels: ImageNet's LOC_val_solution.csv.
    Raises DataError when the source is not what `layout` says, or labels cannot be decided without guessing.
    """
    if layout not in LAYOUTS:
        raise DataError(f"layout {layout!r} is unknown: choose one of {', '.join(LAYOUTS)}")
    if layout == "objectnet" and not classes:
        classes = "objectnet"
    listed = read_classes(classes) if classes else None
    content = open_files(source, scratch)
    arrays = _find_arrays(content, layout, split)
    if arrays is not None:
        found = _label_arrays(arrays, listed)
    else:
        found = _label_files(content, layout, split, listed, val_labels)
    _compare_with_published(found, LAYOUTS[layout], layout)
    return found


def read_classes(classes: str) -> tuple[str, ...]:
    """Read class names in label order: of a set of `data.shifts.SETS` by its name ("imagenet", "objectnet"), or a file.

    The file holds a JSON list, one name a line, or a JSON object, whose keys count in sorted order (the way ObjectNet's
    map from folders to classes is used). Raises DataError for a file that is none of these, empty, or repeats a name.
    """
    if classes in SETS:
        return SETS[classes].classes
    try:
        text = Path(classes).read_text(encoding="utf-8")
        content = json.loads(text) if text.lstrip()[:1] in ("[", "{") else text.split("\n")
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the class list {classes}: {error}") from None
    names = sorted(content) if isinstance(content, dict) else content
    if not all(isinstance(name, str) for name in names):
        raise DataError(f"the class list {classes} must hold names, not {type(names[0]).__name__}")
    names = [name.strip() for name in names if name.strip()]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if not names or repeated:
        raise DataError(f"the class list {classes} " + (f"names {repeated[0]!r} twice" if repeated else "is empty"))
    return tuple(names)


# ---------------------------------------------------------------------------------------------------------------------
# Image files
# ---------------------------------------------------------------------------------------------------------------------


def _label_files(
    content: Folder | Archive, layout: str, split: str | None, listed: tuple[str, ...] | None, val_labels: str | None
) -> Source:
    images, dropped = _images(content.names)
    inside = _select_split(images, split)
    if not inside:
        raise DataError(f"{content.path} holds no images" + (f" under a folder {split!r}" if split else ""))
    paths = list(inside)
    if val_labels:
        tokens = _tokens_from_csv(paths, val_labels)
    elif layout == "flat" or (layout in ("auto", "imagenet") and _is_flat_wnid(paths)):
        tokens = [_leading_wnid(path) for path in paths]
        paths = [posixpath.basename(path) for path in paths]  # the folder says nothing, so keys leave it out
    else:
        tokens = _class_folders(paths, content.path)

    classes, label_of = _number_classes(tokens, listed, drop_unlisted=layout == "objectnet")
    keep = [index for index, token in enumerate(tokens) if token in label_of]
    unlisted = Counter(token for token in tokens if token not in label_of)
    if not keep:
        raise DataError(f"none of the {len(unlisted)} class folders of {content.path} is in the class list")
    if unlisted:
        dropped[f"in {len(unlisted)} folders that the class list does not name"] = unlisted.total()
    names = list(inside.values())
    empty = len(classes) - len({label_of[token] for token in tokens if token in label_of})
    return Source(
        names=[names[index] for index in keep],
        labels=[label_of[tokens[index]] for index in keep],
        keys=_keys(paths, keep),
        classes=classes,
        content=content,
        dropped=dropped,
        notes=[f"{empty} of {len(classes)} classes have no images"] if empty else [],
    )


def _images(names: Iterable[str]) -> tuple[list[str], dict[str, int]]:
    """Split file names into images and a count of the rest by kind."""
    images: list[str] = []
    others: Counter[str] = Counter()
    for name in names:
        extension = posixpath.splitext(name)[1][1:].lower()
        # macOS leaves a ._x.jpg beside every x.jpg, notebooks a folder .ipynb_checkpoints
        if any(part.startswith(".") and part not in (".", "..") for part in name.split("/")):
            others["hidden"] += 1
        elif extension in IMAGE_EXTENSIONS:
            images.append(name)
        else:
            others[f"not images (.{extension})"] += 1
    return images, dict(others)


def _select_split(images: list[str], split: str | None) -> dict[str, str]:
    """Map the path inside the split to the full name, in sorted order."""
    if split is None:
        return {name: name for name in images}
    selected: dict[str, str] = {}
    for name in images:
        parts = name.split("/")
        if split in parts[:-1]:
            selected["/".join(parts[parts.index(split) + 1 :])] = name
    return selected


def _class_folders(paths: Iterable[str], source: str) -> list[str]:
    """Return the folder of every image; all class folders must lie in one place."""
    parents = [posixpath.dirname(path) for path in paths]
    above = sorted({posixpath.dirname(parent) or "the top" for parent in set(parents)})
    if "" in parents:
        raise DataError(
            f"{source} holds images outside class folders: give --val_labels, or --layout flat for WNID_ names"
        )
    if len(above) > 1:
        raise DataError(f"{source} holds class folders under {', '.join(above[:5])}: name one of them (pack: --split)")
    return [posixpath.basename(parent) for parent in parents]


def _is_flat_wnid(paths: Iterable[str]) -> bool:
    """Whether all images are called WNID_something and lie in one folder that is no class folder itself."""
    folders = {posixpath.basename(posixpath.dirname(path)) for path in paths}
    if len(folders) != 1 or WNID.fullmatch(folders.pop()):
        return False
    return all(re.match(r"n[0-9]{8}_", posixpath.basename(path)) for path in paths)


def _leading_wnid(path: str) -> str:
    match = re.match(r"(n[0-9]{8})_", posixpath.basename(path))
    if match is None:
        raise DataError(f"{path} is not called WNID_name: its label is unknown; give --val_labels")
    return match[1]


def _tokens_from_csv(paths: Iterable[str], val_labels: str) -> list[str]:
    """Look up the wnid of every image in Kaggle's LOC_val_solution.csv (ImageId,"WNID x1 y1 x2 y2 ...")."""
    try:
        with open(val_labels, newline="", encoding="utf-8") as file:
            rows = {row[0]: row[1].split(" ")[0] for row in csv.reader(file) if len(row) == 2}
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"cannot read {val_labels}: {error}") from None
    rows = {image: wnid for image, wnid in rows.items() if WNID.fullmatch(wnid)}
    stems = [_stem(path) for path in paths]
    unknown = [stem for stem in stems if stem not in rows]
    if unknown:
        raise DataError(
            f"{val_labels} has no label for {len(unknown)} of {len(stems)} images, the first {unknown[0]!r}"
        )
    return [rows[stem] for stem in stems]


def _number_classes(
    tokens: Sequence[str], listed: tuple[str, ...] | None, *, drop_unlisted: bool
) -> tuple[tuple[str, ...], dict[str, int]]:
    """Return the class names in label order and the label of every folder name (or wnid), by the rules of this file."""
    present = sorted(set(tokens))
    integers = all(re.fullmatch(r"[0-9]+", token) for token in present)
    if listed is not None and not (integers and set(listed).isdisjoint(present)):
        label_of = {name: label for label, name in enumerate(listed)}
        unlisted = [token for token in present if token not in label_of]
        if unlisted and not drop_unlisted:
            raise DataError(f"{len(unlisted)} classes are not in the class list: {', '.join(unlisted[:5])}")
        return listed, label_of
    if not integers:
        return tuple(present), {name: label for label, name in enumerate(present)}
    numbers = {token: int(token) for token in present}
    values = sorted(numbers.values())
    if len(set(values)) < len(values):
        raise DataError("two class folders are the same number, such as 7 and 07")
    if listed is None and values == list(range(1, len(values) + 1)):
        raise DataError(
            f"class folders are numbered 1 to {values[-1]}, labels start at 0: give --classes FILE to name them"
        )
    if listed is not None and values[-1] >= len(listed):
        raise DataError(
            f"class folder {values[-1]} has no place in a list of {len(listed)} classes (labels start at 0)"
        )
    return listed or tuple(str(label) for label in range(values[-1] + 1)), numbers


def _keys(paths: Sequence[str], keep: Sequence[int]) -> list[str]:
    """Make a unique key of the class folder and file name of every kept path."""
    keys: list[str] = []
    used: set[str] = set()
    for index in keep:
        folder, stem = posixpath.basename(posixpath.dirname(paths[index])), _stem(paths[index])
        name = stem if stem.startswith(folder) else f"{folder}-{stem}"
        key = re.sub(r"[^A-Za-z0-9_-]+", "_", name).strip("_") or "image"
        if len(key) > 80 or key in used:  # a plain tar header holds 100 bytes of name
            key = f"{key[:80]}-{hashlib.sha256(f'{index} {name}'.encode(errors='replace')).hexdigest()[:12]}"
        used.add(key)
        keys.append(key)
    return keys


def _stem(path: str) -> str:
    return posixpath.splitext(posixpath.basename(path))[0]


# ---------------------------------------------------------------------------------------------------------------------
# Arrays and checks
# ---------------------------------------------------------------------------------------------------------------------


def _find_arrays(content: Folder | Archive, layout: str, split: str | None) -> Arrays | None:
    """Read MNIST or CIFAR where the layout says so or the file names give them away."""
    if layout in ("auto", "mnist"):
        arrays = mnist_arrays(content, split)
        if arrays is not None or layout == "mnist":
            return arrays or _missing(content, "MNIST idx files such as train-images-idx3-ubyte.gz")
    if layout in ("auto", "cifar10", "cifar100"):
        arrays = cifar_arrays(content, split)
        if arrays is None and layout != "auto":
            return _missing(content, "CIFAR binary batches such as data_batch_1.bin")
        return arrays
    return None


def _missing(content: Folder | Archive, what: str) -> Arrays:
    raise DataError(f"{content.path} holds no {what}")


def _label_arrays(arrays: Arrays, listed: tuple[str, ...] | None) -> Source:
    classes = listed or arrays.classes
    if len(classes) != len(arrays.classes):
        raise DataError(f"the class list names {len(classes)} classes, the data set has {len(arrays.classes)}")
    names = arrays.names
    return Source(names, arrays.labels, [name.replace("/", "-") for name in names], classes, arrays)


def _compare_with_published(found: Source, layout: Layout, name: str) -> None:
    if layout.num_classes is not None and len(found.classes) != layout.num_classes:
        raise DataError(
            f"{name} has {layout.num_classes} classes, found {len(found.classes)}; use --layout folders for a part"
        )
    if layout.num_images and len(found.names) not in layout.num_images:
        stated = " or ".join(f"{number:,}" for number in layout.num_images)
        found.notes.append(f"{len(found.names):,} images where {name} has {stated}")
