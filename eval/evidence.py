"""What eval/report.py tells is made from: rows of results, predictions, and the images behind them.

Rows: of several about the same number the newest counts. Predictions have a line for each image and model; which
mistakes are shown depends on them alone. Images are cut out of the shards by number of the record, and only where these
are the very data that was scored (fingerprint of data/tar.py) and lie on this machine: a page is no reason to run a
command or to fetch from a bucket.
"""

from __future__ import annotations

import array
import base64
import contextlib
import csv
import datetime
import io
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data import DataError
from data.images import open_rgb
from data.shifts import SUITES, ShiftSet
from data.tar import ShardReader, find_shards
from data.urls import scheme
from eval.robustness import MEAN, Tally

FIELDS: dict[str, Any] = {"metric": str, "value": (int, float), "set": str, "suite": str, "model": str, "date": str}
COLUMNS = ["model", "set", "index", "key", "label", "predicted", "correct", "confidence"]
SIDE = 144  # pixels of a thumbnail: larger images are reduced, smaller ones stay as they are


# ---------------------------------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A result: `fields` as eval/shifts.py wrote them, and where they stand (file, number of the line from 1)."""

    file: Path
    line: int
    fields: dict[str, Any]

    @property
    def value(self) -> float:
        """The number; of an accuracy, a share in [0, 1]."""
        return float(self.fields["value"])

    @property
    def which(self) -> tuple[str, str, str, str]:
        """What the number is about: suite, model, set, metric."""
        return tuple(self.fields[name] for name in ("suite", "model", "set", "metric"))  # type: ignore[return-value]

    @property
    def alpha(self) -> float | None:
        """Place between two sets of weights, in [0, 1], of rows of eval/interpolate.py."""
        return self.fields.get("alpha")

    @property
    def weights(self) -> tuple[Any, Any]:
        """SHA-256 of encoder and head."""
        return self.fields.get("encoder_sha256"), self.fields.get("head_sha256")

    @property
    def tally(self) -> Tally:
        """Of a top-1 row: right answers and images."""
        return Tally(self.fields["correct"], self.fields["n"])


def read_rows(path: Path) -> tuple[list[Row], list[str]]:
    """The results of a file, and what is to be said about it: rows of other scripts, a last line that was cut short.

    Raises DataError, naming the line, for a file that cannot be read, or holds none, or a damaged one.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    lines, rows, notes, foreign = text.split("\n"), [], [], 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError):
            if number == len(lines):  # without the line break that ends whole ones
                notes.append(f"{path}: its last line was cut short, as by a kill, and is left out")
                continue
            raise DataError(
                f"{path}, line {number}: no JSON; remove the line, or score again into a new folder"
            ) from None
        if not isinstance(fields, dict) or not {"suite", "model", "set"} <= set(fields):
            foreign += 1
            continue
        if problem := _problem(fields):
            raise DataError(f"{path}, line {number}: {problem}; these are no results of eval/shifts.py of this version")
        rows.append(Row(path, number, fields))
    if not rows:
        raise DataError(f"{path}: holds no results of eval/shifts.py (rows with suite, model and set); name its --out")
    if foreign:
        notes.append(f"{path}: {foreign} rows of other scripts are left out")
    return rows, notes


def _problem(fields: dict[str, Any]) -> str:
    """What is wrong with a row that names a suite, a model and a set; "" if nothing is."""
    for name, kind in FIELDS.items():
        if not isinstance(fields.get(name), kind) or isinstance(fields[name], bool):
            return f"{name} is {fields.get(name)!r}"
    suite = SUITES.get(fields["suite"])
    if suite is None:
        return f"suite {fields['suite']!r} is not one of {', '.join(SUITES)}"
    one = suite.sets.get(fields["set"])
    if one is None and fields["set"] != MEAN:
        return f"the suite {suite.name} has no set {fields['set']!r}"
    if not math.isfinite(fields["value"]):
        return f"value is {fields['value']}"
    try:
        if datetime.datetime.fromisoformat(fields["date"]).tzinfo is None:
            return f"date {fields['date']!r} has no time zone"
    except ValueError:
        return f"date is {fields['date']!r}"
    alpha, interval = fields.get("alpha"), fields.get("interval")
    if alpha is not None and not (isinstance(alpha, int | float) and 0 <= alpha <= 1):
        return f"alpha is {alpha!r}"
    if interval is not None and not (
        isinstance(interval, list) and len(interval) == 2 and all(isinstance(end, int | float) for end in interval)
    ):
        return f"interval is {interval!r}"
    if one is not None and fields["metric"] in ("official_top1", "plain_top1"):
        correct, n = fields.get("correct"), fields.get("n")
        if not (isinstance(correct, int) and isinstance(n, int) and 0 <= correct <= n and n > 0):
            return f"{correct!r} of {n!r} images are correct"
        if abs(fields["value"] - correct / n) > 1e-9:
            return f"value is {fields['value']} where {correct} of {n} images are correct"
    if one is not None and fields["metric"] == "official_class_mean":
        for name in ("class_correct", "class_n"):
            counts = fields.get(name)
            if not (isinstance(counts, list) and all(isinstance(count, int) and count >= 0 for count in counts)):
                return f"{name} is no list of counts"
        if not all(right <= n for right, n in zip(fields["class_correct"], fields["class_n"], strict=False)):
            return "a class has more correct answers than images"
    return ""


def newest(rows: Sequence[Row]) -> dict[tuple[str, str, str, str], Row]:
    """The row of each number that counts: the latest, of equally late ones the last; models in the order given.

    Raises DataError for a row that counts and was made with another class map than this version has.
    """
    found: dict[tuple[str, str, str, str], Row] = {}
    for row in sorted(rows, key=lambda row: datetime.datetime.fromisoformat(row.fields["date"])):  # a stable sort
        found[row.which] = row
    for row in found.values():
        one = SUITES[row.fields["suite"]].sets.get(row.fields["set"])
        own = one.sha256 if one is not None else None
        counts = row.fields.get("class_n")
        if row.fields.get("class_map_sha256", own) != own or (counts and one and len(counts) != one.num_classes):
            raise DataError(
                f"{row.file}, line {row.line}: {row.fields['set']} was scored with another class map than this version "
                "has; score it again"
            )
    return {row.which: found[row.which] for row in rows}


def disagreements(found: Sequence[Row]) -> list[str]:
    """What makes the rows of a suite hard to compare: one model name for several weights, a set of unlike images."""
    notes = []
    for model in dict.fromkeys(row.fields["model"] for row in found):
        weights: dict[tuple[Any, Any], list[str]] = {}
        for row in found:
            if row.fields["model"] == model:
                weights.setdefault(row.weights, []).append(row.fields["set"])
        if len(weights) > 1:
            parts = [
                f"{str(of[0])[:8]}/{str(of[1])[:8]}: {', '.join(dict.fromkeys(sets))}" for of, sets in weights.items()
            ]
            notes.append(f"{model} stands for {len(weights)} different weights (encoder/head {'; '.join(parts)})")
    for name in dict.fromkeys(row.fields["set"] for row in found):
        data: dict[Any, list[str]] = {}
        for row in found:
            if row.fields["set"] == name and row.fields.get("data_fingerprint"):
                data.setdefault(row.fields["data_fingerprint"], []).append(row.fields["model"])
        if len(data) > 1:
            parts = [f"{str(of)[:8]}: {', '.join(dict.fromkeys(models))}" for of, models in data.items()]
            notes.append(f"{name} was not the same data for all models (fingerprint {'; '.join(parts)})")
    return notes


# ---------------------------------------------------------------------------------------------------------------------
# Predictions
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Said:
    """What a model said to n images of a set; arrays [n], as in the file.

    index: sample numbers. label, predicted: of the set's own classes. confidence: softmax of `predicted`, in [0, 1].
    """

    index: NDArray[np.int64]
    label: NDArray[np.int64]
    predicted: NDArray[np.int64]
    confidence: NDArray[np.float64]
    keys: tuple[str, ...]

    @property
    def correct(self) -> int:
        """Number of right answers."""
        return int((self.label == self.predicted).sum())


@dataclass(frozen=True)
class Mistake:
    """An image that some model gets wrong. answers: (predicted, confidence) by model."""

    index: int
    key: str
    label: int
    answers: dict[str, tuple[int, float]]


def read_predictions(path: Path) -> dict[tuple[str, str], Said]:
    """The predictions of a file by model and set.

    Raises DataError, naming the line, for a file that cannot be read or is no predictions file of eval/shifts.py.
    """
    columns: dict[tuple[str, str], tuple[array.array, array.array, array.array, array.array, list[str]]] = {}
    number = 1
    try:
        with open(path, newline="", encoding="utf-8") as file:
            lines = csv.reader(file)
            if next(lines, None) != COLUMNS:
                raise DataError(f"{path}: no predictions of eval/shifts.py; its first line is {','.join(COLUMNS)}")
            for line in lines:
                number = lines.line_num
                model, set_name, index, key, label, predicted, correct, confidence = line
                integers, sure = (int(index), int(label), int(predicted)), float(confidence)
                if min(integers) < 0 or not 0 <= sure <= 1 or correct != str(int(integers[1] == integers[2])):
                    raise ValueError("values that contradict each other")
                if (model, set_name) not in columns:
                    columns[model, set_name] = (
                        array.array("q"),
                        array.array("q"),
                        array.array("q"),
                        array.array("d"),
                        [],
                    )
                # The keys of a set are the same for all models: one string for each, not millions.
                for column, value in zip(columns[model, set_name], (*integers, sure, sys.intern(key)), strict=True):
                    column.append(value)  # type: ignore[arg-type]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, OverflowError, csv.Error) as error:  # a line cut short has too few values
        raise DataError(f"{path}, line {number}: no prediction ({error}); write the file again") from None
    if not columns:
        raise DataError(f"{path}: holds no predictions below its first line; score with --predictions again")
    found = {}
    for which, (indices, labels, answers, shares, keys) in columns.items():
        found[which] = Said(np.array(indices), np.array(labels), np.array(answers), np.array(shares), tuple(keys))
    return found


def choose(said: Mapping[str, Said], shift_set: ShiftSet, count: int) -> list[Mistake]:
    """At most `count` mistakes on a set, those first that say most, by what one or several models said to it.

    First images that one model gets right and another wrong, then those that all get wrong; each in descending order of
    the highest confidence in a wrong answer, then by number. A true class comes back only when every other class has
    been shown as often or has no more such images.

    Raises DataError for labels that the set has not, and for models that were asked about other images.
    """
    first = next(iter(said.values()))
    for model, of in said.items():
        if max(of.label.max(), of.predicted.max()) >= shift_set.num_classes:
            raise DataError(f"predictions of {model} name classes that {shift_set.title} does not have")
        if not (np.array_equal(of.index, first.index) and np.array_equal(of.label, first.label)):
            raise DataError(f"predictions of {model} are about other images of {shift_set.title} than the others'")
    confidence = np.stack([of.confidence for of in said.values()])
    wrong = np.stack([of.predicted != of.label for of in said.values()])
    surest = np.where(wrong, confidence, 0).max(axis=0)
    everyone, anyone = np.asarray(wrong.all(axis=0)), np.asarray(wrong.any(axis=0))
    order = np.lexsort((first.index, -surest, everyone))
    turns: dict[tuple[bool, int], int] = {}
    ranked: list[tuple[bool, int, int, int]] = []
    for place in order[anyone[order]].tolist():
        group = bool(everyone[place]), int(first.label[place])
        turns[group] = turns.get(group, 0) + 1
        ranked.append((group[0], turns[group], len(ranked), place))
    chosen = [place for *_, place in sorted(ranked)[:count]]
    return [
        Mistake(
            int(first.index[place]),
            first.keys[place],
            int(first.label[place]),
            {model: (int(of.predicted[place]), float(of.confidence[place])) for model, of in said.items()},
        )
        for place in chosen
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------


def place_of(name: str, config: Any, data: str) -> str:
    """Where the shards of a set should be: in the folder `data`, or, if that is "", where a row's `config` had them.

    Raises DataError where the row does not say, and for URLs and commands.
    """
    from data.demo import demo_shards

    if data:
        return f"{data.rstrip('/')}/{name}"
    config = config if isinstance(config, dict) else {}
    root, sets = config.get("data"), config.get("sets")
    place = sets.get(name) if isinstance(sets, dict) else None
    if place is None and root == "demo":
        return demo_shards(name)
    if place is None and isinstance(root, str) and root:
        place = f"{root.rstrip('/')}/{name}"
    if not isinstance(place, str):
        raise DataError("its rows do not say where its shards were")
    if any(scheme(part) for part in place.split("::")):
        raise DataError(f"its shards are not on this machine ({place}); give --data with a folder of copies")
    return place


def thumbnails(place: str, fingerprint: str, shift_set: ShiftSet, mistakes: Sequence[Mistake]) -> dict[int, str]:
    """The images of mistakes as data: URIs by sample number: the centre square, without the set's border.

    Raises DataError: no shards there, others than those of the fingerprint, a record with another key, or no image.
    """
    shards = find_shards(place)
    if shards.fingerprint != fingerprint:
        raise DataError(f"the shards in {place} are not those that were scored (another fingerprint)")
    found = {}
    for shard in shards.shards:
        wanted = {one.index - shard.start: one for one in mistakes if 0 <= one.index - shard.start < shard.count}
        if not wanted:
            continue
        with contextlib.closing(ShardReader(shard.url).read(wanted.__contains__)) as records:
            for record in records:
                mistake = wanted.pop(record.number)
                if record.key != mistake.key or record.problem or record.image is None:
                    what = record.problem or f"key {record.key!r}, {mistake.key!r} in the predictions"
                    raise DataError(f"{shard.url}: record {record.number} has {what}")
                found[mistake.index] = _thumbnail(open_rgb(record.image), shift_set.border)
                if not wanted:
                    break
        if wanted:
            raise DataError(f"{shard.url}: ends before record {min(wanted)}")
    if len(found) < len(mistakes):
        raise DataError(f"the shards in {place} have {shards.num_samples} images, fewer than the predictions")
    return found


def _thumbnail(image: Image.Image, border: int) -> str:
    image = image.crop((border, border, image.width - border, image.height - border))
    side = min(image.size)
    if side < 1:
        raise DataError(f"an image that is nothing but a border of {border} pixels")
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    # JPEG would smear what has only a few pixels, and saves nothing there.
    kind = "JPEG" if side > SIDE else "PNG"
    if side > SIDE:
        image = image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=85)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
