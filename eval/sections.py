"""What eval/report.py shows of a suite: tables, figures, mistakes, and the line that each number comes from.

Published models, top-1 in percent on the six ImageNet sets:

    data/clip_zero_shot_top1.csv   zero-shot classification with OpenAI's CLIP, from docs/openclip_results.csv of
                                   github.com/mlfoundations/open_clip (commit 89fb801f; MIT licence, Copyright (c)
                                   2012-2021 Gabriel Ilharco, Mitchell Wortsman, Nicholas Carlini, Rohan Taori, Achal
                                   Dave, Vaishaal Shankar, John Miller, Hongseok Namkoong, Hannaneh Hajishirzi, Ali
                                   Farhadi, Ludwig Schmidt)
    data/testbed_top1.csv          supervised models (source in data/shifts.py); the ResNets of torchvision are shown
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data import DataError
from data.shifts import ShiftSet, Suite
from eval.evidence import Row, Said, choose, disagreements, place_of, read_predictions, thumbnails
from eval.figures import Anchors, Drop, Picture, draw_curves, draw_drops, draw_line
from eval.robustness import MEAN, TABLE, Baseline, ModelTable, Tally, baseline, effective_robustness, read_table

CLIP_TABLE = TABLE.with_name("clip_zero_shot_top1.csv")
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
NOTHING = "\u2013"  # where there is no number
CLASSES_SHOWN = 10  # with the largest drop, for each set and model

DETAILS: dict[str, dict[str, Any]] = {  # metrics of a set in the order shown, and how a cell shows them
    "official_top1": {},
    "plain_top1": {},
    "official_top5": {},
    "official_class_mean": {},
    "effective_robustness": {"sign": "+"},
    "calibration_error": {},
    "loss": {"percent": False},
}
# Rows that agree in these and in their file stand together where they come from.
ALIKE = ["model", "set", "n", "encoder", "encoder_sha256", "head", "head_sha256", "data_fingerprint"]
ALIKE += ["class_map_sha256", "table", "preprocessing", "precision", "device", "commit"]


class Origins:
    """Where the numbers on the page come from: collects the rows that are shown, in groups that stem from one run."""

    def __init__(self, suite: str) -> None:
        self._suite = suite
        self.groups: dict[tuple[str, ...], dict[str, Any]] = {}

    def link(self, row: Row) -> str:
        """The id of the group on the page."""
        identity = str(row.file), *(str(row.fields.get(name)) for name in ALIKE)
        if identity not in self.groups:
            about = {name: row.fields.get(name) for name in (*ALIKE, "date")}
            about["file"] = row.file
            self.groups[identity] = {**about, "id": f"{self._suite}-origin-{len(self.groups) + 1}", "rows": {}}
        group = self.groups[identity]
        group["rows"][row.fields["metric"]] = row
        return group["id"]


def cell(row: Row | None, origins: Origins, *, percent: bool = True, sign: str = "") -> dict[str, str]:
    """A number as text, with its interval, and where it comes from; empty without a row."""
    if row is None:
        return {"text": NOTHING, "interval": "", "link": ""}
    scale, digits = (100.0, 1) if percent else (1.0, 3)
    interval = row.fields.get("interval")
    ends = "" if interval is None else "\u2026".join(f"{scale * end:{sign}.{digits}f}" for end in interval)
    star = "*" if row.fields.get("partial") else ""
    text = f"{scale * row.value:{sign}.{2 if percent else 3}f}{star}"
    return {"text": text, "interval": ends, "link": origins.link(row)}


@dataclass(frozen=True)
class Published:
    """What the suite's models are compared with; all empty where nothing is published."""

    table: ModelTable | None = None
    lines: Mapping[str, Baseline] = dataclasses.field(default_factory=dict)
    anchors: Sequence[Anchors] = ()

    @classmethod
    def of(cls, suite: Suite) -> Published:
        """Published models are known for ImageNet's sets only. Raises DataError for tables that are damaged."""
        if suite.name != "imagenet":
            return cls()
        table, clip = read_table(), read_table(CLIP_TABLE)
        lines = {name: baseline(name, suite.in_distribution, table=table) for name in suite.shifts}
        places = [table.models.index(model) for model in RESNETS]
        resnets = {name: values[places] for name, values in table.accuracy.items()}
        titles = ("published: zero-shot CLIP", "published: supervised ResNets")
        return cls(table, lines, (Anchors(titles[0], clip.models, clip.accuracy), Anchors(titles[1], RESNETS, resnets)))


@dataclass(frozen=True)
class Shown:
    """The rows of a suite that count, by model, set and metric; models: in the order given, without those between."""

    suite: Suite
    rows: Mapping[tuple[str, str, str], Row]
    models: tuple[str, ...]

    @classmethod
    def of(cls, suite: Suite, rows: Sequence[Row]) -> Shown:
        """Rows of this suite, one for each number."""
        models = dict.fromkeys(row.fields["model"] for row in rows if row.alpha in (None, 0, 1))
        return cls(suite, {row.which[1:]: row for row in rows}, tuple(models))

    def tally(self, model: str, name: str) -> Tally | None:
        """Right answers under the official protocol, None where the set was not scored."""
        row = self.rows.get((model, name, "official_top1"))
        return row.tally if row else None

    @property
    def names(self) -> list[str]:
        """The set in distribution and the shifts, in the suite's order."""
        return [self.suite.in_distribution, *self.suite.shifts]


def short(shift_set: ShiftSet) -> str:
    """A set's title where the suite is known."""
    return shift_set.title.removeprefix("demo ").removeprefix("ImageNet-")


def main_table(shown: Shown, published: Published, origins: Origins) -> list[dict[str, Any]]:
    """Groups of models, each with a line of cells for each: sets, mean over the shifts, mean effective robustness."""
    scored = []
    for model in shown.models:
        cells = [cell(shown.rows.get((model, name, "official_top1")), origins) for name in (*shown.names, MEAN)]
        gain = shown.rows.get((model, MEAN, "effective_robustness"))
        scored.append({"model": model, "cells": [*cells, cell(gain, origins, sign="+")]})
    groups = [{"title": "scored here", "models": scored}]
    for place, group in enumerate(published.anchors):
        lines, link = [], f"{shown.suite.name}-published-{place + 1}"
        for i, model in enumerate(group.names):
            values = [float(group.accuracy[name][i]) for name in shown.names]
            fits = [published.lines[name].fit for name in shown.suite.shifts]
            gains = [effective_robustness(values[0], value, fit) for value, fit in zip(values[1:], fits, strict=True)]
            texts = [f"{100 * value:.2f}" for value in (*values, sum(values[1:]) / len(fits))]
            texts.append(f"{100 * sum(gains) / len(gains):+.2f}")
            lines.append({"model": model, "cells": [{"text": text, "interval": "", "link": link} for text in texts]})
        groups.append({"title": group.title, "models": lines})
    return groups


def details(shown: Shown, origins: Origins) -> list[dict[str, Any]]:
    """A line for each set and model with all that is known of it, sets and controls in the suite's order."""
    lines = []
    for one in shown.suite.sets.values():
        for model in shown.models:
            found = {metric: shown.rows.get((model, one.name, metric)) for metric in DETAILS}
            if not any(found.values()):
                continue
            control = shown.suite.control_of(one.name).name if one.name in shown.suite.shifts else ""
            cells = [cell(found[metric], origins, **options) for metric, options in DETAILS.items()]
            same = cell(shown.rows.get((model, control, "official_top1")), origins)
            n = next(row.fields.get("n") for row in found.values() if row)
            lines.append({"set": one.title, "model": model, "n": n, "cells": [*cells[:4], same, *cells[4:]]})
    return lines


def class_names(suite: Suite, shift_set: ShiftSet) -> list[str]:
    """Of the set's labels: OpenAI's words for the wnids of ImageNet, otherwise the names that the set gives."""
    if not set(shift_set.classes) <= set(suite.classes) or suite.name != "imagenet":
        return list(shift_set.classes)
    import open_clip

    return [open_clip.IMAGENET_CLASSNAMES[accepted[0]] for accepted in shift_set.accepts]


def class_drops(shown: Shown, model: str, name: str) -> list[Drop] | None:
    """The classes that lost accuracy, the largest drop first, at most CLASSES_SHOWN; None where it is not known.

    Before: the images of all classes in distribution that the label accepts, within the set's control.
    """
    one, control = shown.suite.sets[name], shown.suite.control_of(name)
    after, before = (shown.rows.get((model, of.name, "official_class_mean")) for of in (one, control))
    if after is None or before is None:
        return None
    label_of = {accepted[0]: label for label, accepted in enumerate(control.accepts)}
    drops = []
    for label, (accepted, title) in enumerate(zip(one.accepts, class_names(shown.suite, one), strict=True)):
        own = [label_of[column] for column in accepted]
        right, n_before = (sum(before.fields[count][k] for k in own) for count in ("class_correct", "class_n"))
        n = after.fields["class_n"][label]
        if n and n_before:
            drops.append(Drop(title, Tally(right, n_before), Tally(after.fields["class_correct"][label], n)))
    ranked = sorted((drop for drop in drops if drop.points > 0), key=lambda drop: -drop.points)
    return ranked[:CLASSES_SHOWN]


def curves(shown: Shown, origins: Origins) -> tuple[dict[str, list[tuple[float, float, float]]], list[dict[str, Any]]]:
    """Accuracy in distribution and mean over the shifts of rows with an alpha, by curve; and a table of the same."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    lines = []
    between = {model: row.alpha for (model, *_), row in shown.rows.items() if row.alpha is not None}
    for model, alpha in sorted(between.items(), key=lambda item: item[1] or 0):
        own, mean = (shown.rows.get((model, name, "official_top1")) for name in (shown.suite.in_distribution, MEAN))
        if own and mean:
            found.setdefault(model.rpartition(" alpha ")[0] or "interpolated", []).append(
                (alpha or 0, own.value, mean.value)
            )
            lines.append({"model": model, "cells": [cell(own, origins), cell(mean, origins)]})
    return {title: points for title, points in found.items() if len(points) > 1}, lines


def match_predictions(files: Sequence[Path], shown: Sequence[Shown], notes: list[str]) -> dict[tuple[str, str], Said]:
    """Predictions by model and set, where they give the number of right answers that the row has; notes the others.

    Raises DataError for damaged files.
    """
    found: dict[tuple[str, str], Said] = {}
    for file in files:
        unmatched: dict[str, list[str]] = {}
        for (model, name), said in read_predictions(file).items():
            tallies = [tally for one in shown if (tally := one.tally(model, name)) is not None]
            if any((tally.correct, tally.n) == (said.correct, len(said.index)) for tally in tallies):
                found[model, name] = said
            else:
                unmatched.setdefault(model, []).append(name)
        for model, names in unmatched.items():
            notes.append(f"{file}: predictions of {model} on {', '.join(names)} are not those of the rows; left out")
    return found


def mistakes(
    shown: Shown, said: Mapping[tuple[str, str], Said], count: int, data: str, notes: list[str]
) -> list[dict[str, Any]]:
    """For each set with predictions at most `count` mistakes: image, true class and answers.

    Only of models that were asked about the same images as the first; a set without its images has a note as well.
    data: where the shards are, as in `place_of`.
    """
    sets = []
    for name in shown.names:
        one = shown.suite.sets[name]
        rows = {model: shown.rows[model, name, "official_top1"] for model in shown.models if (model, name) in said}
        if not rows or not count:
            continue
        first = next(iter(rows.values()))
        fingerprint = first.fields.get("data_fingerprint")
        asked = {m: said[m, name] for m, row in rows.items() if row.fields.get("data_fingerprint") == fingerprint}
        view: dict[str, Any] = {"title": one.title, "note": "", "cards": []}
        sets.append(view)
        images: dict[int, str] = {}
        try:
            chosen = choose(asked, one, count)
            names = class_names(shown.suite, one)
            view["cards"] = [
                {
                    "place": f"{mistake.index}: {mistake.key}",
                    "index": mistake.index,
                    "true": names[mistake.label],
                    "answers": [
                        {"model": model, "class": names[predicted], "sure": sure, "right": predicted == mistake.label}
                        for model, (predicted, sure) in mistake.answers.items()
                    ],
                }
                for mistake in chosen
            ]
            if chosen:
                place = place_of(name, first.fields.get("config"), data)
                images = thumbnails(place, str(fingerprint), one, chosen)
        except DataError as error:
            view["note"] = f"no images: {error}"
        for card in view["cards"]:
            card["image"] = images.get(card.pop("index"), "")
    if unseen := [view for view in sets if view["note"]]:
        titles = ", ".join(view["title"] for view in unseen)
        notes.append(f"mistakes on {titles}: {unseen[0]['note']}")
    return sets


def draw(shown: Shown, published: Published, out: Path) -> tuple[Picture, list[tuple[str, Picture]]]:
    """Accuracy on the line, and drops of classes for each shift where they are known."""
    suite, others = shown.suite, published.table.accuracy if published.table else {}
    scores = {
        model: {name: tally for name in shown.names if (tally := shown.tally(model, name)) is not None}
        for model in shown.models
    }
    line = draw_line(scores, suite, published.lines, others, published.anchors, out)
    drops = []
    for name in suite.shifts:
        of = {model: lost for model in shown.models if (lost := class_drops(shown, model, name)) is not None}
        if of:
            title = suite.sets[name].title
            drops.append((title, draw_drops(of, title, f"{suite.name}_drops_{name}", out)))
    return line, drops


def remarks(shown: Shown) -> list[str]:
    """What to know before comparing the numbers: `disagreements`, and which of them do not go together."""
    notes = disagreements([*shown.rows.values()])
    for model in shown.models:
        mean = shown.rows.get((model, MEAN, "official_top1"))
        tallies = [tally for name in shown.suite.shifts if (tally := shown.tally(model, name)) is not None]
        if mean and abs(mean.value - sum(one.accuracy for one in tallies) / max(len(tallies), 1)) > 1e-9:
            notes.append(f"{model}: the mean over the shifts is of other rows than those of the single sets")
        gain = shown.rows.get((model, MEAN, "effective_robustness"))
        if gain and gain.fields.get("table") != TABLE.name:
            notes.append(f"{model}: effective robustness is against the line of {gain.fields.get('table')}")
    return notes


def section(shown: Shown, said: Mapping[tuple[str, str], Said], count: int, data: str, out: Path) -> dict[str, Any]:
    """What the template shows of a suite; figures are written to `out`. count, data: as of `mistakes`."""
    suite, published, origins = shown.suite, Published.of(shown.suite), Origins(shown.suite.name)
    notes = remarks(shown)
    line, drops = draw(shown, published, out)
    found, points = curves(shown, origins)
    titles = suite.sets[suite.in_distribution].title, f"mean of {len(suite.shifts)} shifts"
    groups, lines = main_table(shown, published, origins), details(shown, origins)
    examples = mistakes(shown, said, count, data, notes)
    return {
        "suite": suite,
        "names": [short(suite.sets[name]) for name in shown.names],
        "groups": groups,
        "sample": any(row.fields.get("partial") for row in shown.rows.values()),
        "details": lines,
        "line": line,
        "published": published,
        "robust": any(metric == "effective_robustness" for *_, metric in shown.rows) or bool(published.lines),
        "drops": drops,
        "curve": draw_curves(found, titles, f"{suite.name}_curves", out) if found else None,
        "points": points,
        "mistakes": examples,
        "origins": [*origins.groups.values()],
        "notes": notes,
    }
