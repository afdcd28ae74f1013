"""Effective robustness: accuracy under shift beyond what accuracy in distribution predicts.

Models trained on ImageNet alone lie near a line when both accuracies are put on the logit scale, z(p) = ln(p/(1 - p)):

    z(accuracy under shift) = slope * z(accuracy in distribution) + intercept

The line is fitted by least squares to published models, and a model's effective robustness is its accuracy under shift
minus the line's at its accuracy in distribution (Taori et al. 2020, Measuring robustness to natural distribution shifts
in image classification). Published models are those of data/testbed_top1.csv with standard training, 85 of its 228; for
other data give a table with columns of its own. Miller et al. 2021 (Accuracy on the line) use the probit scale.

Accuracies are shares in [0, 1] everywhere but in the tables, which hold percent. A share of exactly 0 or 1 has no place
on these scales: such a model is left out of the fit (ResNet-50 on ImageNet-A, 0 by the construction of that set), and
for an accuracy in distribution of 0 or 1 the line gives its limit. ImageNet-A's line is a poor summary: accuracies bend
upwards at the ResNet-50 against which its images were chosen.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from scipy import special

from data import DataError

Array = NDArray[np.float64]
TABLE = Path(__file__).resolve().parents[1] / "data" / "testbed_top1.csv"
NOT_STANDARD = ("aws", "batch64", "subsample")  # further ResNet-50s that the published fit leaves out, by name
SCALES = {"logit": (special.logit, special.expit), "probit": (special.ndtri, special.ndtr)}


# ---------------------------------------------------------------------------------------------------------------------
# The line
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """A line on the scale "logit" or "probit" through n models; r_squared: share of the variance that it explains."""

    slope: float
    intercept: float
    r_squared: float
    n: int
    scale: str = "logit"

    def predict(self, accuracy: float) -> float:
        """The accuracy under shift, in [0, 1], that the line gives for an accuracy in distribution in [0, 1]."""
        return float(_predict(self.slope, self.intercept, accuracy, self.scale))


def fit_line(accuracy_id: Sequence[float] | Array, accuracy_ood: Sequence[float] | Array, scale: str = "logit") -> Fit:
    """Fit a line to the accuracies, shares in [0, 1], of models in distribution and under shift.

    Models with a share of exactly 0 or 1, or with a missing one (NaN), are left out. Raises DataError where fewer than
    three are left, or all have the same accuracy in distribution.
    """
    x, y = _on_scale(accuracy_id, scale), _on_scale(accuracy_ood, scale)
    usable = np.isfinite(x) & np.isfinite(y)
    x, y = x[usable], y[usable]
    if len(x) < 3 or np.ptp(x) == 0:
        raise DataError(f"a line needs three models of unlike accuracy strictly between 0 and 100 %, found {len(x)}")
    slope, intercept = _least_squares(x, y, np.ones((1, len(x))))
    residual = y - slope * x - intercept
    r_squared = 1 - float(residual @ residual) / float(((y - y.mean()) ** 2).sum()) if np.ptp(y) else 1.0
    return Fit(float(slope[0]), float(intercept[0]), r_squared, len(x), scale)


def effective_robustness(accuracy_id: float, accuracy_ood: float, fit: Fit) -> float:
    """Accuracy under shift minus the line's, in [-1, 1], of a model with these accuracies (shares in [0, 1])."""
    return accuracy_ood - fit.predict(accuracy_id)


def _on_scale(accuracy: Sequence[float] | Array, scale: str) -> Array:
    shares = np.asarray(accuracy, dtype=np.float64)
    if ((shares < 0) | (shares > 1)).any():
        raise ValueError("accuracies must be shares in [0, 1], not percent")
    return SCALES[scale][0](shares)


def _predict(slope: float | Array, intercept: float | Array, accuracy: float | Array, scale: str) -> Array:
    to_scale, from_scale = SCALES[scale]
    return from_scale(slope * to_scale(accuracy) + intercept)


def _least_squares(x: Array, y: Array, weights: Array) -> tuple[Array, Array]:
    """Slopes and intercepts [B] of weighted fits, weights [B, M]; NaN where the weights leave a single x."""
    x0, y0 = x.mean(), y.mean()
    x, y = x - x0, y - y0
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = weights / weights.sum(axis=1, keepdims=True)
        mean_x, mean_y = shares @ x, shares @ y
        variance = shares @ x**2 - mean_x**2
        slope = np.where(variance > 1e-12 * x.var(), (shares @ (x * y) - mean_x * mean_y) / variance, np.nan)
    return slope, mean_y + y0 - slope * (mean_x + x0)


# ---------------------------------------------------------------------------------------------------------------------
# Published models
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelTable:
    """Top-1 accuracies of models, a row each.

    types: kind of training ("standard", "more_data", ...). accuracy: by data set (its name in data/shifts.py), shares
    in [0, 1], float64 [M], NaN where unknown.
    """

    path: Path
    models: tuple[str, ...]
    types: tuple[str, ...]
    accuracy: dict[str, Array]

    @property
    def standard(self) -> NDArray[np.bool_]:
        """The models that lines are fitted to, [M]: type "standard", none of NOT_STANDARD in their name."""
        pairs = zip(self.models, self.types, strict=True)
        return np.array(
            [kind == "standard" and not any(word in model for word in NOT_STANDARD) for model, kind in pairs]
        )


def read_table(path: str | Path = TABLE) -> ModelTable:
    """Read a CSV with columns model, type and one for each data set: top-1 in percent, empty where unknown.

    Raises DataError for a file that cannot be read as such, naming the line: a column or value missing, a model twice,
    something that is no percentage, or shares instead of percent.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = list(csv.reader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"cannot read the table of models {path}: {error}") from None
    header = lines[0] if lines else []
    rows = [(number, row) for number, row in enumerate(lines[1:], 2) if row]
    if not {"model", "type"} < set(header) or len(set(header)) < len(header):
        raise DataError(f"{path}: the first line must name the columns model, type and, once each, data sets")
    if not rows:
        raise DataError(f"{path} has no models below its first line")
    for number, row in rows:
        if len(row) != len(header):
            raise DataError(f"{path}, line {number}: {len(row)} values for {len(header)} columns")
    columns = {name: [row[place] for _, row in rows] for place, name in enumerate(header)}
    models = columns.pop("model")
    types = columns.pop("type")
    for (number, _), model in zip(rows, models, strict=True):
        if models.count(model) > 1:
            raise DataError(f"{path}, line {number}: model {model!r} is there twice")
    accuracy = {
        name: np.array(
            [_percent(text, f"{path}, line {number}, {name}") for (number, _), text in zip(rows, texts, strict=True)]
        )
        for name, texts in columns.items()
    }
    if all(not (values > 0.01).any() for values in accuracy.values()):
        raise DataError(f"{path}: no accuracy is above 1: give percent, not shares")
    return ModelTable(Path(path), tuple(models), tuple(types), accuracy)


def _percent(text: str, where: str) -> float:
    """A share from a percentage; NaN from nothing."""
    if not text.strip():
        return math.nan
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 100:
        raise DataError(f"{where}: {text!r} is no percentage")
    return value / 100


@dataclass(frozen=True)
class Baseline:
    """The models behind a line: names, accuracies in distribution and under shift (shares in (0, 1), [n]), the line.

    in_distribution: the column of the table that was taken for the accuracy in distribution.
    """

    set_name: str
    in_distribution: str
    models: tuple[str, ...]
    accuracy_id: Array
    accuracy_ood: Array
    fit: Fit


def baseline(
    set_name: str, in_distribution: str = "imagenet", *, table: ModelTable | None = None, scale: str = "logit"
) -> Baseline:
    """Fit the line of a shift set to the standard models of a table (None: the published one).

    in_distribution: "imagenet" for all of ImageNet's validation set, the name of the set's control
    (`Suite.control_of`) for the same classes. Raises DataError for a column that the table lacks, or too few models.
    """
    table = table or read_table()
    for name in (in_distribution, set_name):
        if name not in table.accuracy:
            raise DataError(f"{table.path} has no column {name!r}; it has {', '.join(table.accuracy)}")
    x, y = table.accuracy[in_distribution], table.accuracy[set_name]
    usable = table.standard & (x > 0) & (x < 1) & (y > 0) & (y < 1)
    try:
        fit = fit_line(x[usable], y[usable], scale)
    except DataError as error:
        raise DataError(f"{table.path}, {in_distribution} against {set_name}, type standard: {error}") from None
    models = tuple(model for model, used in zip(table.models, usable, strict=True) if used)
    return Baseline(set_name, in_distribution, models, x[usable], y[usable], fit)


# ---------------------------------------------------------------------------------------------------------------------
# Intervals
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tally:
    """Correct answers out of n images."""

    correct: int
    n: int

    def __post_init__(self) -> None:
        if not 0 <= self.correct <= self.n or self.n == 0:
            raise ValueError(f"{self.correct} correct of {self.n} images is impossible")

    @property
    def accuracy(self) -> float:
        """Share in [0, 1]."""
        return self.correct / self.n


@dataclass(frozen=True)
class Scored:
    """A model's answers in distribution (on the images of `baseline.in_distribution`) and on a shift set."""

    in_distribution: Tally
    shifted: Tally
    baseline: Baseline


@dataclass(frozen=True)
class Estimate:
    """A share with its confidence interval."""

    value: float
    low: float
    high: float


MEAN = "mean"


def estimate_robustness(
    scored: Mapping[str, Scored], *, resamples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> dict[str, Estimate]:
    """Effective robustness on each set, and under the key "mean" that on average over them, with percentile intervals.

    Two sources of error are resampled: which models the lines were fitted to (the same draw for all sets) and which
    images the model was scored on (binomially; one draw of the accuracy in distribution for all sets that share it).
    An accuracy of exactly 0 or 1 does not vary this way, and its interval is that of the line alone.
    """
    generator = np.random.default_rng(seed)
    models = sorted({model for one in scored.values() for model in one.baseline.models})
    drawn = generator.multinomial(len(models), np.full(len(models), 1 / len(models)), size=resamples)
    accuracies_id: dict[tuple[str, Tally], Array] = {}
    values, samples = [], []
    for one in scored.values():
        key = (one.baseline.in_distribution, one.in_distribution)
        if key not in accuracies_id:
            accuracies_id[key] = _resample(one.in_distribution, generator, resamples)
        fit, columns = one.baseline.fit, np.searchsorted(models, one.baseline.models)
        x, y = _on_scale(one.baseline.accuracy_id, fit.scale), _on_scale(one.baseline.accuracy_ood, fit.scale)
        slope, intercept = _least_squares(x, y, drawn[:, columns].astype(np.float64))
        line = _predict(slope, intercept, accuracies_id[key], fit.scale)
        samples.append(_resample(one.shifted, generator, resamples) - line)
        values.append(effective_robustness(one.in_distribution.accuracy, one.shifted.accuracy, fit))
    return {
        **{
            name: _estimate(value, sample, confidence)
            for name, value, sample in zip(scored, values, samples, strict=True)
        },
        MEAN: _estimate(float(np.mean(values)), np.mean(samples, axis=0), confidence),
    }


def _resample(tally: Tally, generator: np.random.Generator, resamples: int) -> Array:
    return generator.binomial(tally.n, tally.accuracy, size=resamples) / tally.n


def _estimate(value: float, sample: Array, confidence: float) -> Estimate:
    # A draw of a single model out of few has no line; it says nothing and is left out.
    low, high = np.nanquantile(sample, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(value, float(low), float(high))


def wilson(correct: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval, shares in [0, 1], of the accuracy behind `correct` of n images (Wilson 1927).

    Raises ValueError for impossible counts.
    """
    share, z = Tally(correct, n).accuracy, NormalDist().inv_cdf((1 + confidence) / 2)
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # Exact at the ends, where the difference leaves a rounding.
    return 0.0 if correct == 0 else max(0.0, centre - half), 1.0 if correct == n else min(1.0, centre + half)
