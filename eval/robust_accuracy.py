"""Robust accuracy: attacks on the images of a set, batch by batch on all processes, and what the outcomes say.

What eval/attack.py measures, apart from the script. The unit of work is a batch of one stage: an attack at one radius
on up to `images` images that stood until then. Batches are cut from what stands of the whole set, so that neither a
batch nor what is drawn for it depends on the number of processes. The outcome of each is appended to `outcomes.jsonl`
under the hash of all that it depends on; a run that finds it there does not compute it again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attacks.ensemble import STAGES, Budget, right, search
from attacks.losses import cross_entropy
from attacks.pgd import Norm, Precision, evaluate, under_attack, watched
from data.rows import append_row, read_rows, write_synced
from data.transforms import unit_interval
from eval.common import near_chance
from eval.passes import SECONDS_BETWEEN_LINES
from eval.robustness import wilson
from models import ModelError
from train.common import Progress, RunFolder, StopRequested
from train.launching import Agreement, StopSignals

if TYPE_CHECKING:
    from data.small import ImageSet
    from models.classifiers import Classifier

Numbers = NDArray[np.int64]
Columns = dict[str, list[float]]  # a value for each image
ATTACKS_VERSION = 1  # to be raised with every change of what an attack finds: kept outcomes are then computed anew
ENSEMBLE = "ensemble"
CLEAN = "clean"
# The newest row of equal NUMBER counts; one that agrees with it in RESULT too is not written again.
NUMBER = ("metric", "model", "data", "norm", "eps", "attack")
RESULT = ("value", "n", "model_sha256", "data_fingerprint", "precision", "seed")
BALL_TOLERANCE = 1e-5  # of a radius: roundings of float32 images,
PIXEL_TOLERANCE = 6e-8  # and of a single pixel, which are more of a small L∞ radius
SAMPLE = 64  # images of the checks that attack on purpose in another way
SQUARE_SHARE = 0.002  # of all images; what AutoAttack's own check allows its black box beyond its other attacks
log = logging.getLogger("shiftlens")


@dataclass(frozen=True)
class Subject:
    """A classifier (on its device, in evaluation mode), the images to attack, and how.

    images: at a time, per process. seed: of all chance.
    """

    classifier: Classifier
    classifier_sha256: str
    data: ImageSet
    norm: Norm
    budget: Budget
    precision: Precision
    images: int
    seed: int


# ----------------------------------------------------------------------------------------------------------------------
# One batch
# ----------------------------------------------------------------------------------------------------------------------


def _batch(subject: Subject, numbers: Numbers) -> tuple[Tensor, Tensor]:
    """Images [B, C, S, S] in [0, 1] and labels, on the classifier's device."""
    device = subject.classifier.mean.device
    rows = torch.from_numpy(numbers)
    return unit_interval(subject.data.images[rows].to(device)), subject.data.labels[rows].to(device)


def look_at(subject: Subject, numbers: Numbers) -> Columns:
    """Of each image as it is: right (0 or 1); whether its loss in float32, and its gradient, are exactly 0.

    Raises ModelError where one of them is not finite.
    """
    images, labels = _batch(subject, numbers)
    correct = right(subject.classifier, images, labels)
    with under_attack(subject.classifier, images.device) as network:
        _, losses, gradient = evaluate(network, images, labels, cross_entropy)
    _check_finite(subject, losses.isfinite() & gradient.flatten(1).isfinite().all(1), "has no finite loss and gradient")
    columns = {"right": correct, "saturated": losses == 0, "zero_gradient": gradient.flatten(1).abs().amax(1) == 0}
    return {name: values.int().tolist() for name, values in columns.items()}


def attack(subject: Subject, stage: str, eps: float, budget: Budget, numbers: Numbers) -> Columns:
    """Of each image: whether it stands (0 or 1), and the norm of what the attack added to it.

    Raises ModelError if that is not finite, as what such an image says would count as fooled.
    """
    images, labels = _batch(subject, numbers)
    # Chance depends on the images alone, not on the model: two models meet the same draws.
    words = json.dumps([subject.seed, stage, eps, subject.data.fingerprint, numbers.tolist()])
    seed = int.from_bytes(hashlib.sha256(words.encode()).digest()[:8]) >> 1
    generator = torch.Generator(images.device).manual_seed(seed)
    options: dict[str, Any] = {"generator": generator, "precision": subject.precision, "check_images": False}
    found = search(stage, subject.classifier, images, labels, norm=subject.norm, eps=eps, budget=budget, **options)
    order = math.inf if subject.norm == "linf" else 2
    sizes = torch.linalg.vector_norm((found - images).double().flatten(1), ord=order, dim=1)
    _check_finite(subject, sizes.isfinite(), f"met gradients that are not finite ({stage}, radius {eps:g})")
    return {"stands": right(subject.classifier, found, labels).int().tolist(), "size": sizes.tolist()}


def _check_finite(subject: Subject, finite: Tensor, what: str) -> None:
    if bad := int((~finite).sum()):
        raise ModelError(
            f"{subject.classifier.name} {what} at {bad} of {len(finite)} images: no attack can be trusted there"
        )


# ----------------------------------------------------------------------------------------------------------------------
# All batches of a stage
# ----------------------------------------------------------------------------------------------------------------------


class _Interrupted(Exception):
    """A stop signal has come in the middle of a batch."""


class Passes:
    """Stages on all processes; what was computed before, in this run or one that was stopped, is looked up."""

    def __init__(
        self, subject: Subject, agreement: Agreement, signals: StopSignals, file: Path, *, shown: bool = True
    ) -> None:
        """file: outcomes.jsonl, which rank 0 reads and writes. shown: whether rank 0 says how far it is."""
        self.subject, self.computed = subject, 0
        self._agreement, self._signals, self._file = agreement, signals, file
        self._shown = shown and agreement.rank == 0
        known: dict[str, Columns] = {}
        with agreement.together():
            if agreement.rank == 0:
                rows = read_rows(file, "key", "columns")
                known = {row["key"]: row["columns"] for row in rows}
                if file.is_file():  # anew, so that what is appended does not continue a line that was cut short
                    write_synced(file, "".join(json.dumps(row) + "\n" for row in rows))
        self._known: dict[str, Columns] = agreement.share(known)

    def look(self, numbers: Numbers) -> dict[str, NDArray[np.float64]]:
        """`look_at` of these images, in their order."""
        return self._all(CLEAN, 0.0, self.subject.budget, numbers)

    def attack(
        self, stage: str, eps: float, numbers: Numbers, budget: Budget | None = None
    ) -> dict[str, NDArray[np.float64]]:
        """`attack` on these images, in their order; budget: None for the subject's."""
        return self._all(stage, eps, budget or self.subject.budget, numbers)

    def _key(self, stage: str, eps: float, budget: Budget, numbers: Numbers) -> str:
        subject = self.subject
        facts = [subject.classifier_sha256, subject.classifier.flip, subject.classifier.mean.flatten().tolist()]
        facts += [subject.classifier.low_pass, subject.classifier.low_pass_published]
        facts += [subject.classifier.std.flatten().tolist(), subject.data.fingerprint, subject.norm, subject.precision]
        facts += [subject.seed, stage, eps, spent(stage, budget), numbers.tolist()]
        facts += [subject.classifier.mean.device.type, ATTACKS_VERSION]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]

    def _all(self, stage: str, eps: float, budget: Budget, numbers: Numbers) -> dict[str, NDArray[np.float64]]:
        from accelerate.utils import gather_object

        agreement, subject = self._agreement, self.subject
        batches = [numbers[first : first + subject.images] for first in range(0, len(numbers), subject.images)]
        keys = [self._key(stage, eps, budget, batch) for batch in batches]
        missing = [place for place, key in enumerate(keys) if key not in self._known]
        rounds = -(-len(missing) // agreement.world)
        name = CLEAN if stage == CLEAN else f"{budget.title(stage)}, {subject.norm} {eps:g}"
        last_line = time.monotonic()
        if missing and self._shown and stage != CLEAN and budget == subject.budget:
            log.info("%s: %d images in %d batches", name, sum(len(batches[place]) for place in missing), len(missing))
        progress = Progress(0, rounds, subject.images * agreement.world, shown=self._shown)
        turn = asked = 0

        def before_each_pass() -> None:
            nonlocal asked, last_line
            if self._signals.received:
                raise _Interrupted
            asked += 1
            if self._shown and time.monotonic() - last_line > SECONDS_BETWEEN_LINES:
                last_line = time.monotonic()
                limit = f" of about {budget.passes(stage):,}" if stage != CLEAN else ""
                log.info("%s: batch %d of %d, pass %s%s", name, turn + 1, rounds, f"{asked:,}", limit)

        with contextlib.closing(progress):
            for turn in range(rounds):
                own: list[tuple[str, Columns]] = []
                place = turn * agreement.world + agreement.rank
                asked = 0
                with agreement.together(), contextlib.suppress(_Interrupted), watched(before_each_pass):
                    if place < len(missing):
                        batch = batches[missing[place]]
                        if stage == CLEAN:
                            columns = look_at(subject, batch)
                        else:
                            columns = attack(subject, stage, eps, budget, batch)
                        own.append((keys[missing[place]], columns))
                outcomes = gather_object(own)
                self._keep(outcomes)
                if stop := agreement.settle(None, self._signals.received):
                    raise StopRequested(stop, f"stopped by signal {stop} in {name}; batches before are kept")
                progress.step_done(turn)
                if self._shown and time.monotonic() - last_line > SECONDS_BETWEEN_LINES:
                    last_line = time.monotonic()
                    rate = progress.rates()["images_per_second"]
                    log.info("%s: batch %d of %d, %.1f images/s", name, turn + 1, rounds, rate)
        parts = [self._known[key] for key in keys]
        return {
            column: np.array([value for part in parts for value in part[column]], dtype=np.float64)
            for column in (parts[0] if parts else ("stands", "size"))
        }

    def _keep(self, outcomes: Sequence[tuple[str, Columns]]) -> None:
        with self._agreement.together():
            self._known |= dict(outcomes)
            self.computed += len(outcomes)
            if self._agreement.rank == 0:
                with open(self._file, "a", encoding="utf-8") as file:
                    for key, columns in outcomes:
                        file.write(json.dumps({"key": key, "columns": columns}) + "\n")


def spent(stage: str, budget: Budget) -> list[int]:
    """The parts of a budget that a stage depends on."""
    return {
        CLEAN: [],
        "pgd": [budget.pgd_steps],
        "apgd_ce": [budget.steps],
        "apgd_t": [budget.steps, budget.targets],
        "square": [budget.queries],
    }[stage]


# ----------------------------------------------------------------------------------------------------------------------
# Numbers
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """Robust accuracy: `correct` of n images stand against the attack called `title` at radius eps.

    name: a stage, ENSEMBLE, stages joined by "+" (the ensemble so far), or CLEAN.
    """

    name: str
    title: str
    eps: float
    correct: int
    n: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's, of 95 %."""
        return wilson(self.correct, self.n)


def measure(passes: Passes, eps: float, attacks: Sequence[str], correct: Numbers) -> tuple[list[Point], float]:
    """Points of all attacks at one radius, and the largest perturbation in units of it.

    correct: numbers of the images that the classifier gets right as they are; only they are attacked.
    """
    n, budget = len(passes.subject.data), passes.subject.budget
    points: list[Point] = []
    largest = 0.0
    for name in attacks:
        standing = correct
        for place, stage in enumerate(STAGES if name == ENSEMBLE else (name,)):
            outcome = passes.attack(stage, eps, standing)
            largest = max(largest, float(outcome["size"].max(initial=0)))
            standing = standing[outcome["stands"] == 1]
            title, so_far = budget.title(stage), stage
            if name == ENSEMBLE:
                before = STAGES[: place + 1]
                title = " + ".join(budget.title(one) for one in before)
                so_far = ENSEMBLE if place == len(STAGES) - 1 else "+".join(before)
                title = f"ensemble: {title}" if so_far == ENSEMBLE else title
            if so_far not in [point.name for point in points]:
                points.append(Point(so_far, title, eps, len(standing), n))
                log.info("%s %-8.4g %5.1f %% stand  %s", passes.subject.norm, eps, 100 * len(standing) / n, title)
    if passes.subject.norm == "linf":
        largest = max(0.0, largest - PIXEL_TOLERANCE)
    return points, largest / eps if eps else math.inf if largest else 0.0


class Rows:
    """The numbers of a run, appended to results.jsonl where the newest of an earlier run is not the same."""

    def __init__(self, folder: RunFolder, config: Any, subject: Subject) -> None:
        self.rows: list[dict[str, Any]] = []
        self._file = folder.path / "results.jsonl"
        self._newest = {_values(row, NUMBER): _values(row, RESULT) for row in folder.results()}
        self._config, self._subject = config, subject

    def add(self, point: Point) -> None:
        subject = self._subject
        row = {
            "metric": "accuracy" if point.name == CLEAN else "robust_accuracy",
            "value": point.accuracy,
            "n": point.n,
            "interval": list(point.interval),
            "attack": point.title,
            "norm": subject.norm,
            "eps": point.eps,
            "model": subject.classifier.name,
            "model_sha256": subject.classifier_sha256,
            "data": subject.data.name,
            "data_fingerprint": subject.data.fingerprint,
            "precision": "fp32" if point.name == CLEAN else f"attack {subject.precision}, verdict fp32",
            "seed": subject.seed,
            "images": subject.images,
        }
        self.rows.append(row)
        number, result = _values(row, NUMBER), _values(row, RESULT)
        if self._newest.get(number) != result:
            self._newest[number] = result
            device = str(subject.classifier.mean.device)
            append_row(self._file, **row, config=dataclasses.asdict(self._config), device=device)  # type: ignore[arg-type]


def _values(row: Mapping[str, Any], names: Sequence[str]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in names)


# ----------------------------------------------------------------------------------------------------------------------
# Checks
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """Something that has to hold of every sound evaluation, and whether it does."""

    name: str
    passed: bool
    found: str


def check_curve(points: Sequence[Point], largest: float) -> list[Check]:
    """What the numbers themselves show: perturbations in the ball, falling curves, a black box that is no stronger."""
    checks = [Check("perturbations within the ball", largest <= 1 + BALL_TOLERANCE, f"largest {largest:.6f} radii")]
    rises = []
    for name in dict.fromkeys(point.name for point in points if point.name != CLEAN):
        curve = sorted((point for point in points if point.name in (name, CLEAN)), key=lambda point: point.eps)
        for before, after in zip(curve, curve[1:], strict=False):
            if after.correct > before.correct:
                text = f"{after.title} leaves {after.correct} at {after.eps:g}, {before.correct} at {before.eps:g}"
                rises.append(text)
    checks.append(Check("accuracy falls with the radius", not rises, "; ".join(rises) or "at no radius does it rise"))
    by_place = {(point.name, point.eps): point for point in points}
    stronger, compared = [], False
    for (name, eps), point in by_place.items():
        if name == ENSEMBLE:
            others = [by_place[("+".join(STAGES[:-1]), eps)]]
        elif name == "square":
            others = [p for p in points if p.eps == eps and p.name in STAGES and p.name != name]
        else:
            continue
        if not others:
            continue
        compared, least = True, min(other.correct for other in others)
        if least - point.correct > SQUARE_SHARE * point.n:
            stronger.append(f"{least - point.correct} of {point.n} fewer stand at {eps:g}")
    if compared:
        text = "; ".join(stronger) or "the gradient attacks find what Square finds"
        checks.append(Check("no gradient masking: Square adds nothing", not stronger, text))
    return checks


def check_accuracy(correct: int, subject: Subject) -> Check:
    """That the classifier knows the images at all."""
    n, classes = len(subject.data), subject.classifier.num_classes
    text = f"{correct} of {n} images are right, in {classes} classes"
    return Check("clean accuracy is above chance", not near_chance(correct, n, classes), text)


def check_gradients(looked: Mapping[str, NDArray[np.float64]]) -> list[Check]:
    """Images that a gradient attack cannot move, among those that the classifier gets right."""
    correct = looked["right"] == 1
    zero, saturated = (int(looked[name][correct].sum()) for name in ("zero_gradient", "saturated"))
    n = int(correct.sum())
    if not n:
        return []
    return [
        Check("gradients are not zero", zero == 0, f"exactly 0 for {zero} of {n} images"),
        Check("the loss is not saturated", saturated == 0, f"exactly 0 in float32 for {saturated} of {n} images"),
    ]


def check_attack(passes: Passes, eps: float, correct: Numbers) -> list[Check]:
    """PGD on up to SAMPLE images: at radius 0, with ever more steps at radius eps, and at a radius without bounds."""
    subject, sample = passes.subject, correct[:SAMPLE]
    n, classes = len(sample), subject.classifier.num_classes
    if not n:
        return []

    def stand(radius: float, steps: int) -> int:
        outcome = passes.attack("pgd", radius, sample, dataclasses.replace(subject.budget, pgd_steps=steps))
        return int(outcome["stands"].sum())

    nothing = stand(0.0, 5)
    counts = {steps: stand(eps, steps) for steps in (5, 20, 100)}
    fewer = list(counts.values())
    # Over all images: [0, 1] has sides of 1.
    everything = stand(1.0 if subject.norm == "linf" else math.sqrt(subject.data.images[0].numel()), 20)
    steps = ", ".join(f"{count} after {number}" for number, count in counts.items())
    return [
        Check("radius 0 is clean accuracy", nothing == n, f"{nothing} of {n} images stand after 5 steps"),
        Check("accuracy falls with the steps", fewer == sorted(fewer, reverse=True), f"of {n} images stand {steps}"),
        Check(
            "a ball of everything leaves chance at most",
            everything <= n / classes + 2 * math.sqrt(n / classes),
            f"{everything} of {n} images stand in {classes} classes",
        ),
    ]


# ----------------------------------------------------------------------------------------------------------------------
# Figure
# ----------------------------------------------------------------------------------------------------------------------


def draw_curves(points: Sequence[Point], subject: Subject, out: Path) -> None:
    """robust_accuracy.png and .svg: accuracy over the radius for each attack, with 95 % intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from eval.figures import COLOURS, MARKS, STYLE, printable

    clean = [point for point in points if point.name == CLEAN]
    names = list(dict.fromkeys(point.name for point in points if point.name != CLEAN))
    with matplotlib.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(6.4, 4.8), layout="constrained")
        aside = 0.006 * max(point.eps for point in points)  # so that equal curves do not hide each other
        for place, name in enumerate(names):
            curve = sorted([*clean, *(point for point in points if point.name == name)], key=lambda point: point.eps)
            accuracy = [100 * point.accuracy for point in curve]
            sides = [
                [100 * (point.accuracy - point.interval[0]) for point in curve],
                [100 * (point.interval[1] - point.accuracy) for point in curve],
            ]
            radii = [point.eps + aside * (place - (len(names) - 1) / 2) for point in curve]
            style: dict[str, Any] = {"color": COLOURS[place % len(COLOURS)], "marker": MARKS[place % len(MARKS)]}
            label = next(point.title for point in points if point.name == name)
            axes.errorbar(radii, accuracy, sides, capsize=2, linewidth=1.2, markersize=4, label=label, **style)
        norm = "L∞" if subject.norm == "linf" else "L2"
        axes.set(xlabel=f"{norm} radius (pixels in [0, 1])", ylabel="accuracy, %", ylim=(-2, 102))
        data = "/".join(Path(subject.data.name).parts[-2:])  # of a path, the split and what holds it
        axes.set_title(printable(f"{subject.classifier.name}, {data}, n = {len(subject.data)}", 80))
        axes.grid(alpha=0.3)
        figure.legend(fontsize=7, loc="outside lower center")
        for suffix in ("png", "svg"):
            figure.savefig(
                out / f"robust_accuracy.{suffix}", dpi=150, metadata={"Date": None} if suffix == "svg" else {}
            )
        pyplot.close(figure)
