"""The index files beside shards: how many samples each holds, and which classes the labels mean.

`sizes.json` is open_clip's, {"000.tar": 1000}; `_info.json` is timm's, to which our writer adds `num_classes` and
`classes` (folder names in label order); `nshards.txt` is CLIP_benchmark's, a single number.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from data import DataError
from data.urls import read_whole


@dataclass
class FolderIndex:
    """What the files beside the shards of one folder say."""

    counts: dict[str, int]
    num_shards: int | None = None
    num_classes: int | None = None
    classes: tuple[str, ...] | None = None


def read_index(folder: str, indexes: dict[str, FolderIndex]) -> FolderIndex:
    """Read the index files of a folder (its name ends with the separator), once per `indexes`.

    Raises DataError for files that cannot be read, are malformed, or contradict each other.
    """
    if folder in indexes:
        return indexes[folder]
    index = indexes[folder] = FolderIndex({})
    for name in ("_info.json", "sizes.json"):
        data = read_whole(folder + name)
        if data is None:
            continue
        place = folder + name
        try:
            content = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place} is not valid JSON: {error}") from error
        if not isinstance(content, dict):
            raise DataError(f"{place} must hold a JSON object")
        counts = _info_counts(content, place, index) if name == "_info.json" else content
        for shard, count in counts.items():
            if not isinstance(count, int) or isinstance(count, bool) or count < 0:
                raise DataError(f"{place}: count of {shard} is {count!r}; it must be a whole number from 0")
            if index.counts.setdefault(shard, count) != count:
                raise DataError(
                    f"{folder}: sizes.json says {count} samples in {shard}, _info.json {index.counts[shard]}"
                )
    number = read_whole(folder + "nshards.txt")
    if number is not None:
        if not number.strip().isdigit():
            raise DataError(f"{folder}nshards.txt must hold a whole number")
        index.num_shards = int(number)
    return index


def _info_counts(content: dict, place: str, index: FolderIndex) -> dict[str, object]:
    """Counts of all splits of a timm `_info.json`; the class fields that our writer adds go to the index."""
    num_classes, classes = content.get("num_classes"), content.get("classes")
    if num_classes is not None:
        if not isinstance(num_classes, int) or isinstance(num_classes, bool) or num_classes < 1:
            raise DataError(f"{place}: num_classes is {num_classes!r}; it must be a whole number from 1")
        index.num_classes = num_classes
    if classes is not None:
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise DataError(f"{place}: classes must be a list of names")
        if num_classes != len(classes):
            raise DataError(f"{place}: num_classes is {num_classes}, but {len(classes)} classes are named")
        index.classes = tuple(classes)
    counts: dict[str, object] = {}
    try:
        for split in content.get("splits", {}).values():
            counts.update(zip(split["filenames"], split["shard_lengths"], strict=True))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{place}: each split needs filenames and as many shard_lengths") from error
    return counts
