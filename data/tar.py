"""Tar shards: find them, know their counts, read their records in order.

A shard is a tar of adjacent members `KEY.jpg` (or another image extension) and `KEY.cls` (an ASCII integer). How many
samples it holds stands in `sizes.json` beside it, {"000.tar": 1000}, or in timm's `_info.json`; the count is the truth
against which a reader is checked, because a tar that was cut off can look complete.

Nothing that a shard holds vanishes: every regular file belongs to a record, and a record that cannot be used says why.
Member names are keys and are never used as paths.
"""

from __future__ import annotations

import array
import contextlib
import glob
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

from data import DataError
from data.archive import Walker
from data.index import FolderIndex, read_index
from data.urls import check_pipe, open_source, scheme

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"})

log = logging.getLogger(__name__)


class LabelError(DataError):
    """The label of one record cannot be used; other records may be fine."""


@dataclass(frozen=True)
class Shard:
    """One tar: where it is, how many samples it holds, and the global number of its first sample."""

    url: str
    count: int
    start: int


@dataclass(frozen=True)
class ShardSet:
    """The shards of a data set in order, with what their indexes say about classes."""

    shards: tuple[Shard, ...]
    num_samples: int
    num_classes: int | None
    classes: tuple[str, ...] | None
    fingerprint: str  # over names and counts in order, classes, the first shard's beginning: tells data sets apart


@dataclass(frozen=True)
class Record:
    """Adjacent members with the same key. With a `problem` it must not be used as a sample."""

    number: int  # position in the shard, from 0
    key: str
    image: bytes | None
    extension: str  # of the image, lower case; "" without one
    label: bytes | None
    problem: str | None  # "duplicate key", "no image", "two images", "no label", "two labels"


def parse_label(data: bytes | None, num_classes: int | None) -> int:
    """A class number from the content of a `.cls` member: ASCII digits, white space around them allowed.

    Raises LabelError for anything but 0 <= label < num_classes (the upper bound only where it is known), and DataError
    for label == num_classes, which no single bad record explains: labels that start at 1 do.
    """
    if data is None:
        raise LabelError("no label")
    text = data.strip(b" \t\r\n")
    if not re.fullmatch(rb"-?[0-9]{1,18}", text):
        shown = text[:20].decode("ascii", "backslashreplace")
        raise LabelError(f"label is not an integer: {shown!r}" if text else "empty label")
    label = int(text)
    if label < 0:
        raise LabelError(f"negative label: {label}")
    if num_classes is not None and label == num_classes:
        raise DataError(f"label {label} with {num_classes} classes: labels must start at 0, these look 1-based; repack")
    if num_classes is not None and label > num_classes:
        raise LabelError(f"label {label} with {num_classes} classes")
    return label


# ---------------------------------------------------------------------------------------------------------------------
# Reading one shard
# ---------------------------------------------------------------------------------------------------------------------


class ShardReader:
    """Reads the records of one shard in order, from any URL that data.urls opens.

    After `read` is exhausted: `count` records were found, `truncated` says what was cut off and at which byte (or is
    None), `notes` lists oddities that lose nothing. Records before `start` are passed over unread; an `index` that was
    given to an earlier reader of the same shard saves walking through them.
    """

    def __init__(self, url: str, *, allow_pipe: bool = False, start: int = 0, index: RecordIndex | None = None) -> None:
        self.url = url
        self.count = 0
        self.truncated: str | None = None
        self.notes: list[str] = []
        self._allow_pipe = allow_pipe
        self._start = start
        self._index = RecordIndex() if index is None else index

    def read(self, wanted: Callable[[int], bool] | None = None) -> Generator[Record, None, None]:
        """Yield the records whose number is `wanted` (default: all); the data of the others is passed over.

        Raises DataError when the file cannot be read or is no tar. A record that was cut off is neither yielded nor
        counted.
        """
        index = self._index
        self.count = index.nearest(self._start)
        seen = set(index.keys[: self.count])
        returned = 0
        group: _Group | None = None
        with contextlib.closing(open_source(self.url, allow_pipe=self._allow_pipe)) as source:
            walker = Walker(self.url, source, index.offsets[self.count] if self.count else 0)
            for name in walker.members():
                key, extension = _split_name(name)
                if group is None or not group.takes(key, extension):
                    if group is not None and group.wanted:
                        yield group.record()
                    repeated = hash(key) in seen
                    returned += repeated and (group is None or key != group.key)
                    use = self.count >= self._start and (wanted is None or wanted(self.count))
                    group = _Group(self.count, key, extension, use, repeated)
                    seen.add(hash(key))
                    index.note(self.count, walker.begin, hash(key))
                    self.count += 1
                group.add(extension, walker)
            if group is not None and group.incomplete and not walker.closed and walker.truncated is None:
                # A cut exactly between two members leaves no other trace than this.
                walker.truncated = f"ends at byte {walker.position} within record {group.key!r}"
            if group is not None and walker.truncated is not None and (group.incomplete or walker.lost_data):
                self.count -= 1
            elif group is not None and group.wanted:
                yield group.record()
            source.finish()
        self.truncated, self.notes = walker.truncated, walker.notes
        if returned:
            self.notes.append(f"{returned} keys come back later in the shard; the members of a sample must be adjacent")


class RecordIndex:
    """Where the records of a shard begin, as far as it has been read: 16 bytes a record.

    Keys are kept as Python's 64-bit hashes, enough to notice that one comes back, and valid in this process only.
    """

    def __init__(self) -> None:
        self.offsets = array.array("q")
        self.keys = array.array("q")

    def nearest(self, number: int) -> int:
        """The last known record that is not behind record `number`."""
        return max(0, min(number, len(self.offsets) - 1))

    def note(self, number: int, offset: int, key: int) -> None:
        if number == len(self.offsets):
            self.offsets.append(offset)
            self.keys.append(key)


@dataclass
class _Group:
    """A record whose members are still coming."""

    number: int
    key: str
    first: str  # extension of its first member
    wanted: bool
    repeated: bool  # the key was there before
    images: int = 0
    labels: int = 0
    image: bytes | None = None
    extension: str = ""
    label: bytes | None = None

    @property
    def incomplete(self) -> bool:
        return not (self.images and self.labels)

    def takes(self, key: str, extension: str) -> bool:
        """Whether a member belongs here: the same key, unless a whole record of that key begins anew."""
        return key == self.key and (self.incomplete or extension != self.first)

    def add(self, extension: str, walker: Walker) -> None:
        if extension == "cls":
            self.labels += 1
            if self.wanted and self.labels == 1:
                self.label = walker.data()
        elif extension in IMAGE_EXTENSIONS:
            self.images += 1
            if self.wanted and self.images == 1:
                self.image, self.extension = walker.data(), extension

    def record(self) -> Record:
        problems = {
            "duplicate key": self.repeated,
            "no image": not self.images,
            "two images": self.images > 1,
            "no label": not self.labels,
            "two labels": self.labels > 1,
        }
        problem = next((name for name, present in problems.items() if present), None)
        return Record(self.number, self.key, self.image, self.extension, self.label, problem)


def _split_name(name: str) -> tuple[str, str]:
    """Key and lower-case extension: the extension begins at the first dot of the base name (webdataset's rule)."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    if not stem:  # a hidden file is its own record, so that it is seen and counted
        return name, ""
    return folder + slash + stem, extension.lower()


# ---------------------------------------------------------------------------------------------------------------------
# Finding shards and their counts
# ---------------------------------------------------------------------------------------------------------------------


def find_shards(data: str | Sequence[str], *, allow_pipe: bool = False) -> ShardSet:
    """Resolve what a user named into shards with counts.

    `data` is a folder (its *.tar in sorted order), a file, a glob, a brace list such as `{000..127}.tar`, an http(s) or
    fsspec URL, a `pipe:COMMAND` if allowed, several of these joined by `::`, or a sequence of them. Counts come from
    `sizes.json` or timm's `_info.json` beside the shards; where a folder of this machine has neither, the headers are
    walked. Raises DataError for anything missing, listing all missing shards at once, and for counts that contradict.
    """
    indexes: dict[str, FolderIndex] = {}
    urls: list[str] = []
    for entry in [data] if isinstance(data, str) else data:
        whole = bool(not scheme(entry) and os.path.exists(entry))
        for part in [entry] if whole else entry.split("::"):
            urls += _expand(part, indexes, allow_pipe)
    if not urls:
        raise DataError("no shards named; give a folder, a brace list or a glob of .tar files")
    missing = [url for url in urls if not scheme(url) and not os.path.exists(url)]
    if missing:
        raise DataError(f"{len(missing)} of {len(urls)} shards are missing: {_listing(missing)}")

    counts = [_indexed_count(url, indexes) for url in urls]
    uncounted = [url for url, count in zip(urls, counts, strict=True) if count is None]
    remote = [url for url in uncounted if scheme(url) not in ("", "pipe")]
    if remote:
        raise DataError(f"no sizes.json or _info.json gives the number of samples in {_listing(remote)}; put one there")
    if uncounted:
        log.info("no sizes.json for %s: counting by walking through them", _listing(uncounted))
    shards: list[Shard] = []
    start = 0
    for url, indexed in zip(urls, counts, strict=True):
        count = _walked_count(url, allow_pipe) if indexed is None else indexed
        shards.append(Shard(url, count, start))
        start += count
    if start == 0:
        raise DataError(f"the shards hold no samples: {_listing(urls)}")
    num_classes, classes = _common_classes(indexes)
    identity = [(_base_name(shard.url), shard.count) for shard in shards], classes, _beginning(urls[0], allow_pipe)
    fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    return ShardSet(tuple(shards), start, num_classes, classes, fingerprint)


def _beginning(url: str, allow_pipe: bool) -> str:
    """Digest of a shard's first 4 KiB: two data sets may well agree in names and counts of their shards."""
    with contextlib.closing(open_source(url, allow_pipe=allow_pipe)) as source:
        return hashlib.sha256(source.read(4096)).hexdigest()


def _expand(part: str, indexes: dict[str, FolderIndex], allow_pipe: bool) -> list[str]:
    """The shard URLs behind one name without `::`."""
    import braceexpand

    kind = scheme(part)
    if kind == "pipe":
        check_pipe(part, allow_pipe)
    if not part:
        raise DataError("an empty shard name; is there a :: too many?")
    if not kind:
        part = os.path.expanduser(part)
        if os.path.isfile(part):
            return [part]  # whatever characters its name holds
    try:
        names = [part] if not kind and os.path.isdir(part) else list(braceexpand.braceexpand(part))
    except ValueError as error:
        raise DataError(f"cannot expand the braces of {part!r}: {error}") from error
    urls: list[str] = []
    for name in names:
        if not kind and (os.path.isdir(name) or (glob.has_magic(name) and not os.path.exists(name))):
            urls += _list_local(name, indexes)
        elif kind not in ("", "pipe", "http", "https") and (glob.has_magic(name) or not name.endswith(".tar")):
            urls += _list_fsspec(name)
        else:
            urls.append(name)
    return urls


def _list_local(name: str, indexes: dict[str, FolderIndex]) -> list[str]:
    if not os.path.isdir(name):
        found = sorted(glob.glob(name))
        if not found:
            raise DataError(f"no file matches {name!r}")
        return found
    base_names = {entry for entry in os.listdir(name) if entry.endswith(".tar")}
    index = read_index(os.path.join(name, ""), indexes)
    base_names |= {entry for entry in index.counts if "/" not in entry}  # listed but absent: reported as missing
    if not base_names:
        raise DataError(f"no .tar shards in folder {name!r}")
    if index.num_shards not in (None, len(base_names)):
        raise DataError(f"{name}: nshards.txt says {index.num_shards} shards, {len(base_names)} are there")
    return [os.path.join(name, entry) for entry in sorted(base_names)]


def _list_fsspec(name: str) -> list[str]:
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(name)
        pattern = path if glob.has_magic(path) else path.rstrip("/") + "/*.tar"
        found = [system.unstrip_protocol(match) for match in sorted(system.glob(pattern))]
    except Exception as error:  # back ends raise classes of their own
        raise DataError(f"cannot list {name}: {error}") from error
    if not found:
        raise DataError(f"no .tar shards at {name}")
    return found


def _listing(names: Sequence[str]) -> str:
    shown = ", ".join(names[:20])
    return shown if len(names) <= 20 else f"{shown} and {len(names) - 20} more"


def _folder(url: str) -> str:
    """The folder of a shard, with its separator; "" for a bare name."""
    if not scheme(url):
        return os.path.join(os.path.dirname(url), "")
    return url.partition("?")[0].rpartition("/")[0] + "/"


def _base_name(url: str) -> str:
    kind = scheme(url)
    if kind == "pipe":
        return url
    return url.partition("?")[0].rpartition("/")[2] if kind else os.path.basename(url)


def _indexed_count(url: str, indexes: dict[str, FolderIndex]) -> int | None:
    """The count that the index beside a shard gives, or None where its folder has no index."""
    if scheme(url) == "pipe":
        return None
    folder, name = _folder(url), _base_name(url)
    index = read_index(folder, indexes)
    if name not in index.counts and index.counts:
        raise DataError(f"the index in {folder or '.'} (sizes.json, _info.json) has no count for {name}; add it")
    return index.counts.get(name)


def _walked_count(url: str, allow_pipe: bool) -> int:
    reader = ShardReader(url, allow_pipe=allow_pipe)
    for _ in reader.read(lambda number: False):
        pass
    if reader.truncated is not None:
        raise DataError(
            f"{url}: {reader.truncated}; {reader.count} whole samples, and no sizes.json says how many it had"
        )
    return reader.count


def _common_classes(indexes: dict[str, FolderIndex]) -> tuple[int | None, tuple[str, ...] | None]:
    """Class number and names of all folders; those that state them must agree."""
    numbers = {index.num_classes: folder for folder, index in indexes.items() if index.num_classes is not None}
    if len(numbers) > 1:
        stated = ", ".join(f"{number} in {folder or '.'}" for number, folder in numbers.items())
        raise DataError(f"the joined data sets differ in their number of classes: {stated}")
    names = {index.classes: folder for folder, index in indexes.items() if index.classes is not None}
    if len(names) > 1:
        raise DataError(f"the joined data sets name different classes: {_listing(list(names.values()))}")
    return next(iter(numbers), None), next(iter(names), None)
