"""Features of a data set, computed once by an encoder and kept on disk: a folder of safetensors files, read as memory.

    cache = FeatureCache(Path("runs/features"), identity)
    for part in cache.missing(range(cache.parts)):
        cache.write(part, features, labels, index)
    features = cache.finish()

    runs/features/<key>/part_00000-of-00064.safetensors, ...    features [n, D], labels [n], index [n]
                        manifest.json                           written last: identity, files, rows

The key is a hash of everything that the features depend on, the `Identity`: another encoder, preprocessing, data set
or type gives another folder, so features of one are never taken for those of the other. Each file covers a fixed range
of sample numbers, the same for any number of processes, and is either whole or absent: written under another name,
synced, renamed. It carries the key and a SHA-256 of its tensors, which is checked before use: what is damaged is
computed again, what is whole survives a killed run. Nothing is pickled.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data import DataError
from data.rows import write_synced

VERSION = 1  # raise it whenever the same identity would give other features or another layout
MANIFEST = "manifest.json"
_HEADER_FIELD = "shiftlens"
TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# Parts that a data set is cut into: enough to share among 64 processes, none below 1024 or above 2^16 samples, so that
# one in memory is 0.3 GB at most (1024 features in float32) and little is lost when a run is killed.
_MOST_SHARED, _FEWEST_SAMPLES, _MOST_SAMPLES = 64, 1024, 2**16

log = logging.getLogger("shiftlens")


@dataclass(frozen=True)
class Identity:
    """Everything that features depend on.

    Attributes:
        encoder: JSON values that tell encoders apart: hash of the weights, architecture, normalisation.
        preprocessing: how bytes become pixels, in words.
        data: fingerprint of the shards (data.tar.ShardSet).
        samples: number of samples in the shards, unusable ones included.
        classes: class names in label order; empty where the shards name none.
        width: D.
        dtype: fp16, bf16 or fp32: the type they are kept in.
        precision: the type they were computed in, as accelerate calls it (no, bf16, fp16).
    """

    encoder: Mapping[str, object]
    preprocessing: str
    data: str
    samples: int
    classes: tuple[str, ...]
    width: int
    dtype: str
    precision: str

    def __post_init__(self) -> None:
        if self.dtype not in TYPES:
            raise DataError(f"features of type {self.dtype!r}: choose one of {', '.join(TYPES)}")
        if self.samples < 1 or self.width < 1:
            raise DataError(f"{self.samples} samples of {self.width} features: there is nothing to keep")

    @property
    def key(self) -> str:
        """Hexadecimal hash of all of it and of VERSION."""
        content = json.dumps({**asdict(self), "version": VERSION}, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def parts(self) -> int:
        """Number of files: a function of the number of samples alone."""
        fewest = -(-self.samples // _MOST_SAMPLES)
        return max(fewest, min(_MOST_SHARED, -(-self.samples // _FEWEST_SAMPLES)))

    @property
    def bytes(self) -> int:
        """Size of the features, without labels and headers."""
        return self.samples * self.width * TYPES[self.dtype].itemsize


class FeatureCache:
    """The folder of one identity while it is filled. Several processes may fill it, each with parts of its own.

    part p of P holds what is usable of the samples from n * p // P up to n * (p + 1) // P: the range that
    `open_pass(..., rank=p, world=P)` reads.
    """

    def __init__(self, root: Path, identity: Identity) -> None:
        self.identity = identity
        self.folder = root / identity.key[:20]
        self.parts = identity.parts

    def file(self, part: int) -> Path:
        return self.folder / f"part_{part:05d}-of-{self.parts:05d}.safetensors"

    def missing(self, parts: Iterable[int]) -> list[int]:
        """Those of `parts` that have to be computed: not there, or damaged (which is logged)."""
        needed = []
        for part in parts:
            if not self.file(part).is_file():
                needed.append(part)
                continue
            try:
                _read(self.file(part), self.identity)
            except DataError as error:
                log.warning("features computed again: %s", error)
                needed.append(part)
        return needed

    def check_space(self) -> None:
        """Makes the folder. Raises DataError where it cannot be made or the missing parts will not fit."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            raise DataError(f"feature cache {self.folder}: cannot be made ({error.strerror or error})") from None
        absent = sum(not self.file(part).is_file() for part in range(self.parts))
        needed = self.identity.bytes * absent // self.parts
        if free < needed:
            raise DataError(
                f"feature cache {self.folder}: {needed / 2**20:.0f} MiB needed, {free / 2**20:.0f} MiB free; "
                "use another --cache, or --dtype fp16"
            )

    def write(self, part: int, features: Tensor, labels: Tensor, index: Tensor) -> None:
        """Writes one part, atomically.

        Args:
            features: [n, D], any floating type; kept in the identity's.
            labels: int64 [n], from 0 and below the number of classes.
            index: int64 [n], ascending sample numbers of the part's range; unusable samples are missing.

        Raises:
            ValueError: shapes, labels or sample numbers that do not belong here.
            DataError: a feature that is not finite, or too large for the type; no space, no permission.
        """
        first, end = (self.identity.samples * p // self.parts for p in (part, part + 1))
        if features.shape != (len(index), self.identity.width) or labels.shape != index.shape:
            raise ValueError(f"features {list(features.shape)}, {len(labels)} labels, {len(index)} sample numbers")
        if len(index) and not (first <= index[0] and index[-1] < end and bool((index.diff() > 0).all())):
            raise ValueError(f"part {part} holds samples {first} to {end - 1} in order")
        classes = len(self.identity.classes)
        if len(labels) and (labels.min() < 0 or (classes and labels.max() >= classes)):
            raise ValueError(f"labels {labels.min()} to {labels.max()} for {classes} classes")
        kept = features.detach().to("cpu", TYPES[self.identity.dtype]).contiguous()
        bad = (~torch.isfinite(kept)).any(1).nonzero().flatten()
        if len(bad):
            raise DataError(
                f"{len(bad)} samples have features that {self.identity.dtype} cannot hold (not finite, or too large), "
                f"first sample {int(index[bad[0]])}; use --dtype bf16 or fp32, or check the encoder's weights"
            )
        tensors = {"features": kept, "labels": labels.cpu().contiguous(), "index": index.cpu().contiguous()}
        file = self.file(part)
        temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
        try:
            stamp = {"key": self.identity.key, "sha256": _digest(tensors)}
            save_file(tensors, temporary, {_HEADER_FIELD: json.dumps(stamp)})  # one field: safetensors shuffles several
            temporary.chmod(0o644)  # safetensors makes files that only their owner can read
            with open(temporary, "rb+") as handle:
                os.fsync(handle.fileno())
            os.replace(temporary, file)
        except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
            full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
            reason = "no space left" if full else " ".join(str(error).split())
            raise DataError(f"cannot write {file}: {reason}; parts written before are kept") from None
        finally:
            temporary.unlink(missing_ok=True)

    def finish(self) -> Features:
        """Writes the manifest, by one process after all have written their parts, and opens the features.

        Raises DataError where a part is missing or damaged.
        """
        features = self._open()
        files = [{"file": self.file(p).name, "rows": len(t)} for p, t in enumerate(features.pieces)]
        manifest = {"identity": asdict(self.identity), "version": VERSION, "rows": features.rows, "files": files}
        write_synced(self.folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        for leftover in self.folder.glob(".part_*.tmp"):  # of killed runs; a younger one may be another run's
            if time.time() - leftover.stat().st_mtime > 3600:
                leftover.unlink(missing_ok=True)
        return features

    def _open(self) -> Features:
        parts = [_read(self.file(part), self.identity) for part in range(self.parts)]
        features, labels, index = zip(*parts, strict=True)
        return Features(self.identity, list(features), torch.cat(labels), torch.cat(index))


def open_features(folder: Path) -> Features:
    """The features in a finished cache folder, every part's SHA-256 checked (about a second per 2 GB).

    Raises DataError, naming the file: no manifest, or one of another version; a part missing, cut short or altered.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        fields = manifest["identity"]
        identity = Identity(**{**fields, "classes": tuple(fields["classes"])})
        version, rows = manifest["version"], manifest["rows"]
    except FileNotFoundError:
        raise DataError(f"{folder}: no {MANIFEST}: no feature cache, or one that was never finished") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / MANIFEST}: unreadable ({error}); delete it and extract again") from None
    if version != VERSION or not identity.key.startswith(folder.name):
        raise DataError(f"{folder / MANIFEST}: does not belong to this folder, or to this version; extract again")
    cache = FeatureCache(folder.parent, identity)
    features = cache._open()
    if features.rows != rows:
        raise DataError(f"{folder}: {features.rows} rows, the manifest says {rows}; extract again")
    return features


class Features:
    """Features of many samples in pieces that stand one behind the other, usually windows on files.

    Attributes:
        identity: what they are features of.
        pieces: tensors [n, D]; touching a row reads it from disk, and the system may forget it again.
        labels: int64 [rows], on the device of the pieces.
        index: int64 [rows] on the CPU, ascending sample numbers.
        rows, width: their number and D.
    """

    def __init__(self, identity: Identity, pieces: list[Tensor], labels: Tensor, index: Tensor) -> None:
        self.identity, self.pieces, self.labels, self.index = identity, pieces, labels, index
        self.rows, self.width = len(labels), identity.width
        self._ends = torch.tensor([len(piece) for piece in pieces]).cumsum(0)

    @property
    def device(self) -> torch.device:
        return self.pieces[0].device

    def take(self, rows: Tensor) -> Tensor:
        """The features [n, D] of `rows`, int64 [n] on `device`, in that order; nothing else is brought into memory."""
        if len(self.pieces) == 1:
            return self.pieces[0][rows]
        found = torch.empty(len(rows), self.width, dtype=self.pieces[0].dtype, device=self.device)
        # Grouped by piece: each is indexed once, however the rows are mixed.
        piece_of = torch.searchsorted(self._ends, rows, right=True)
        places = piece_of.argsort(stable=True)
        for piece, group in _runs(piece_of[places]):
            at = places[group]
            start = int(self._ends[piece]) - len(self.pieces[piece])
            found[at] = self.pieces[piece][rows[at] - start]
        return found

    def batches(self, order: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Features [n, D] and labels [n] of the rows in `order` (as `take`), `size` at a time, the last maybe fewer."""
        for rows in order.split(size):
            yield self.take(rows), self.labels[rows]

    def gathered(self, device: torch.device) -> Features:
        """The same features as a single tensor on `device`, where `identity.bytes` have to fit."""
        whole = torch.empty(self.rows, self.width, dtype=self.pieces[0].dtype, device=device)
        start = 0
        for piece in self.pieces:
            whole[start : start + len(piece)] = piece
            start += len(piece)
        return Features(self.identity, [whole], self.labels.to(device), self.index)


def _read(file: Path, identity: Identity) -> tuple[Tensor, Tensor, Tensor]:
    """Features, labels and sample numbers of a part: windows on its file. Raises DataError, naming it."""
    if not file.is_file():
        raise DataError(f"{file}: missing; if it was written on another machine, --cache must be a shared folder")
    try:
        with safe_open(file, framework="pt") as content:
            stamp = json.loads((content.metadata() or {}).get(_HEADER_FIELD, "{}"))
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118  not a dictionary
    except (OSError, ValueError, SafetensorError) as error:
        raise DataError(f"{file}: cut short or damaged ({str(error).splitlines()[0]}); delete it") from None
    if stamp.get("key") != identity.key:
        raise DataError(f"{file}: features of another encoder, data set or version, or damaged; delete it")
    if set(tensors) != {"features", "labels", "index"} or stamp.get("sha256") != _digest(tensors):
        raise DataError(f"{file}: SHA-256 differs: the file was altered or damaged; delete it")
    return tensors["features"], tensors["labels"], tensors["index"]


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _runs(values: Tensor) -> Iterator[tuple[int, slice]]:
    """Each value of a sorted tensor, and where it stands."""
    found, counts = torch.unique_consecutive(values, return_counts=True)
    start = 0
    for value, count in zip(found.tolist(), counts.tolist(), strict=True):
        yield value, slice(start, start + count)
        start += count
