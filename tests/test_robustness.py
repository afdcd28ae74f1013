"""Effective robustness: the published lines, robustness of published models, bad tables, and intervals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from data import DataError
from data.shifts import SETS, SUITES
from eval.robustness import (
    MEAN,
    Baseline,
    Fit,
    Scored,
    Tally,
    _least_squares,
    baseline,
    effective_robustness,
    estimate_robustness,
    fit_line,
    read_table,
    wilson,
)

Array = NDArray[np.float64]
SHIFTS = SUITES["imagenet"].shifts
# fmt: off
LINES = [  # set, in distribution, scale, models, slope, intercept, R^2, prediction at 76.13 %; to the last digit given
    ("imagenet_v2",     "imagenet",                      "logit",  85,  .9232,  -.4977, .996, 63.9),
    ("imagenet_r",      "imagenet",                      "logit",  80,  .9116, -1.5999, .877, 36.8),
    ("objectnet",       "imagenet",                      "logit",  85, 1.1993, -2.0243, .941, 34.7),
    ("imagenet_sketch", "imagenet",                      "logit",  85, 1.0709, -2.3701, .869, 24.5),
    ("imagenet_a",      "imagenet",                      "logit",  84, 3.0516, -6.2917, .773,  6.0),
    ("imagenet_v2",     "imagenet",                      "probit", 85,  .9617,  -.3247, .996, None),
    ("imagenet_r",      "imagenet",                      "probit", 80,  .9424, -1.0033, .873, None),
    ("objectnet",       "imagenet",                      "probit", 85, 1.2215, -1.2549, .937, None),
    ("imagenet_sketch", "imagenet",                      "probit", 85, 1.0435, -1.4259, .865, None),
    ("imagenet_a",      "imagenet",                      "probit", 84, 2.4775, -3.2671, .727, None),
    ("imagenet_r",      "imagenet_on_r_classes",         "logit",  80,  .6368, -2.1077, .889, None),
    ("objectnet",       "imagenet_on_objectnet_classes", "logit",  85,  .9809, -1.9283, .953, None),
    ("imagenet_a",      "imagenet_on_a_classes",         "logit",  84, 1.9900, -7.6325, .828, None),
]
CLIP = {  # zero-shot top-1 % on ImageNet, V2, R, ObjectNet, Sketch, A; the line's mean; mean effective robustness
    "RN50":         (59.82, 52.84, 60.73, 41.41, 35.44, 23.27, 20.0, 22.8),
    "RN101":        (62.28, 56.12, 68.17, 45.15, 41.06, 29.44, 21.5, 26.5),
    "RN50x4":       (66.27, 59.44, 72.74, 51.41, 44.68, 41.45, 24.2, 29.8),
    "RN50x16":      (70.72, 64.20, 79.33, 60.71, 50.63, 57.24, 27.7, 34.7),
    "ViT-B/32":     (63.32, 55.92, 69.33, 44.31, 42.29, 31.55, 22.1, 26.5),
    "ViT-B/16":     (68.34, 61.88, 77.70, 55.31, 48.24, 49.95, 25.7, 32.9),
    "ViT-L/14":     (75.54, 69.83, 87.84, 68.89, 59.59, 70.75, 32.5, 38.9),
    "ViT-L/14@336": (76.56, 70.89, 89.05, 71.83, 61.00, 77.48, 33.7, 40.4),
}
# fmt: on


# ---------------------------------------------------------------------------------------------------------------------
# Published figures
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "against", "scale", "n", "slope", "intercept", "r_squared", "at_resnet50"), LINES)
def test_published_lines(
    name: str,
    against: str,
    scale: str,
    n: int,
    slope: float,
    intercept: float,
    r_squared: float,
    at_resnet50: float | None,
) -> None:
    found = baseline(name, against, scale=scale)
    fit = found.fit
    assert (fit.n, fit.scale, len(found.models)) == (n, scale, n)
    assert (fit.slope, fit.intercept) == pytest.approx((slope, intercept), abs=6e-5)
    assert fit.r_squared == pytest.approx(r_squared, abs=6e-4)
    if at_resnet50 is not None:
        assert 100 * fit.predict(0.7613) == pytest.approx(at_resnet50, abs=0.06)


@pytest.mark.parametrize("model", CLIP)
def test_effective_robustness_of_clip(model: str) -> None:
    in_distribution, *shifted, line, robustness = CLIP[model]
    fits = [baseline(name).fit for name in SHIFTS]
    found = [
        effective_robustness(in_distribution / 100, accuracy / 100, fit)
        for accuracy, fit in zip(shifted, fits, strict=True)
    ]
    assert 100 * np.mean(found) == pytest.approx(robustness, abs=0.1)
    assert 100 * np.mean([fit.predict(in_distribution / 100) for fit in fits]) == pytest.approx(line, abs=0.1)


@pytest.mark.parametrize(("accuracy", "expected"), [(0.70, 27.1), (0.73, 29.8), (0.7613, 33.2), (0.80, 38.4)])
def test_mean_of_the_published_lines(accuracy: float, expected: float) -> None:
    assert 100 * np.mean([baseline(name).fit.predict(accuracy) for name in SHIFTS]) == pytest.approx(expected, abs=0.06)


def test_published_table() -> None:
    table = read_table()
    assert len(table.models) == 228
    assert table.standard.sum() == 85
    assert set(table.accuracy) == {name for name in SETS if not name.startswith("imagenet_v2_")}
    resnet50 = {name: 100 * values[table.models.index("resnet50")] for name, values in table.accuracy.items()}
    anchors = {
        "imagenet": 76.13,
        "imagenet_v2": 63.21,
        "imagenet_r": 36.17,
        "objectnet": 35.75,
        "imagenet_sketch": 24.09,
    }
    assert {name: round(resnet50[name], 2) for name in anchors} == anchors
    assert resnet50["imagenet_a"] == 0
    assert math.isnan(table.accuracy["imagenet_r"][table.models.index("resnet50-vtab")])
    assert "resnet50" in baseline("objectnet").models
    assert "resnet50" not in baseline("imagenet_a").models
    assert not {"resnet50_aws_baseline", "resnet50_trained_on_SIN"} & set(baseline("imagenet_v2").models)


@pytest.mark.parametrize("name", ["imagenet_on_r_classes", "imagenet_on_objectnet_classes", "imagenet_on_a_classes"])
def test_published_controls_are_shares_of_our_number_of_images(name: str) -> None:
    """Accuracy times images is a whole number of correct answers: the table's controls hold what ours do."""
    table, images = read_table(), SETS[name].num_images
    assert images is not None
    correct = table.accuracy[name] * images
    assert np.abs(correct - np.round(correct))[np.isfinite(correct)].max() < 0.01


def test_same_values_as_the_collected_table(shared_data: Path) -> None:
    theirs, ours = read_table(shared_data.parent / "facts" / "testbed_top1.csv"), read_table()
    assert (ours.models, ours.types) == (theirs.models, theirs.types)
    for name, values in ours.accuracy.items():
        np.testing.assert_array_equal(values, theirs.accuracy[name])


# ---------------------------------------------------------------------------------------------------------------------
# The line
# ---------------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 10**6), st.integers(3, 40))
def test_fit_against_scipy(seed: int, n: int) -> None:
    generator = np.random.default_rng(seed)
    x, y = generator.uniform(0.01, 0.99, (2, n))
    fit = fit_line(x, y)
    expected = stats.linregress(np.log(x / (1 - x)), np.log(y / (1 - y)))
    assert (fit.slope, fit.intercept, fit.r_squared) == pytest.approx(
        (expected.slope, expected.intercept, expected.rvalue**2), rel=1e-7, abs=1e-9
    )


def test_models_at_zero_one_or_unknown_are_left_out() -> None:
    x, y = [0.2, 0.5, 0.7, 0.9, 0.4, 1.0, 0.6], [0.1, 0.3, 0.4, 0.8, 0.0, 0.9, math.nan]
    assert fit_line(x, y) == fit_line(x[:4], y[:4])
    assert fit_line(x, y).n == 4


def test_limits_of_the_line() -> None:
    fit = Fit(2.0, -1.0, 1.0, 9)
    assert fit.predict(0.5) == pytest.approx(1 / (1 + math.e))
    assert (fit.predict(0.0), fit.predict(1.0)) == (0.0, 1.0)
    assert effective_robustness(0.0, 0.25, fit) == 0.25
    assert effective_robustness(0.5, 0.0, fit) == -fit.predict(0.5)
    assert Fit(2.0, -1.0, 1.0, 9, "probit").predict(0.5) == pytest.approx(0.15865525393145707)  # of the normal below -1


@pytest.mark.parametrize(
    ("x", "y"), [([0.5, 0.6], [0.4, 0.5]), ([0.5, 0.5, 0.5], [0.4, 0.5, 0.6]), ([0.5, 0.6, 0.7], [0, 0.5, 0.6])]
)
def test_too_few_models_for_a_line(x: list[float], y: list[float]) -> None:
    with pytest.raises(DataError, match="needs three models of unlike accuracy"):
        fit_line(x, y)


def test_percent_instead_of_shares() -> None:
    with pytest.raises(ValueError, match="not percent"):
        fit_line([60.0, 70.0, 80.0], [0.4, 0.5, 0.6])


# ---------------------------------------------------------------------------------------------------------------------
# Tables of the user's
# ---------------------------------------------------------------------------------------------------------------------

HEADER = "model,type,val,r\n"
ROWS = "a,standard,50,40\nb,standard,60,45\nc,standard,70,60\n"


def test_a_table_of_other_sets(tmp_path: Path) -> None:
    """Any sets by name; a byte order mark, carriage returns and empty lines do not matter, nor columns in any order."""
    path = tmp_path / "own.csv"
    text = (
        "type,r,model,val\nstandard,40,a,50\nstandard,,empty,55\n\nstandard,45,b,60\nother,1,d,99\nstandard,60,c,70\n"
    )
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    found = baseline("r", "val", table=read_table(path))
    assert found.models == ("a", "b", "c")
    assert found.fit == fit_line([0.5, 0.6, 0.7], [0.4, 0.45, 0.6])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the first line must name the columns model, type"),
        ("model,type\na,standard\n", "the first line must name the columns"),
        ("model,type,val,val\na,standard,1,2\n", "the first line must name the columns"),
        (HEADER + "a,standard,50\n", "line 2: 3 values for 4 columns"),
        (HEADER + ROWS + "a,standard,50,60\n", "line 2: model 'a' is there twice"),
        (HEADER + ROWS + "\nd,standard,x,60\n", "line 6, val: 'x' is no percentage"),
        (HEADER + "a,standard,50,101\n", "line 2, r: '101' is no percentage"),
        (HEADER + "a,standard,50,-1\n", "'-1' is no percentage"),
        (HEADER + "a,standard,nan,50\n", "'nan' is no percentage"),
        (HEADER + "a,standard,0.5,0.4\nb,standard,0.6,1\n", "give percent, not shares"),
        (HEADER, "has no models below its first line"),
        (HEADER + ROWS.replace("c,standard", "c,other"), "val against r, type standard: a line needs three models"),
        (HEADER.replace(",r", ",q") + ROWS, "has no column 'r'; it has val, q"),
        (HEADER.replace("val", "imagenet") + ROWS, "has no column 'val'"),
        (b"\xff\xfe\x00", "cannot read the table of models"),
        ('model,type,val,r\n"a,standard,50,40\n' + "x" * 140000, "cannot read the table of models"),
    ],
)
def test_bad_tables(text: str | bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=message) as caught:
        baseline("r", "val", table=read_table(path))
    assert "own.csv" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_table(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read the table of models"):
        read_table(tmp_path / "absent.csv")


# ---------------------------------------------------------------------------------------------------------------------
# Intervals
# ---------------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 60000), st.floats(0, 1), st.sampled_from([0.8, 0.95, 0.995]))
def test_wilson_against_scipy(n: int, share: float, confidence: float) -> None:
    correct = round(share * n)
    low, high = wilson(correct, n, confidence)
    expected = stats.binomtest(correct, n).proportion_ci(confidence, method="wilson")
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert 0 <= low <= correct / n <= high <= 1 or math.isclose(high, 1) or math.isclose(low, 0, abs_tol=1e-12)


@pytest.mark.parametrize(("correct", "n"), [(-1, 5), (6, 5), (0, 0)])
def test_impossible_counts(correct: int, n: int) -> None:
    with pytest.raises(ValueError, match="is impossible"):
        wilson(correct, n)


def made_baseline(x: Array, y: Array, in_distribution: str = "val") -> Baseline:
    return Baseline("r", in_distribution, tuple(f"m{i}" for i in range(len(x))), x, y, fit_line(x, y))


def line_of_models(n: int, noise: float) -> tuple[Array, Array]:
    generator = np.random.default_rng(1)
    x = np.linspace(0.5, 0.9, n)
    z = 0.9 * np.log(x / (1 - x)) - 1 + noise * generator.standard_normal(n)
    return x, 1 / (1 + np.exp(-z))


def test_only_the_images_vary_when_the_models_lie_on_the_line() -> None:
    """Against the delta method: variance p(1-p)/n of both accuracies, the line's derivative between them."""
    model = made_baseline(*line_of_models(30, noise=0.0))
    one = Scored(Tally(1400, 2000), Tally(500, 1000), model)
    found = estimate_robustness({"r": one}, resamples=8000)["r"]
    line, p = model.fit.predict(0.7), 0.7
    derivative = model.fit.slope * line * (1 - line) / (p * (1 - p))
    deviation = math.sqrt(0.25 / 1000 + derivative**2 * p * (1 - p) / 2000)
    assert found.value == pytest.approx(0.5 - line)
    assert (found.low, found.high) == pytest.approx(
        (found.value - 1.96 * deviation, found.value + 1.96 * deviation), abs=2e-3
    )


def test_only_the_models_vary_on_very_many_images() -> None:
    """Against a bootstrap written out: draw models, fit with numpy, predict."""
    x, y = line_of_models(40, noise=0.3)
    one = Scored(Tally(7 * 10**11, 10**12), Tally(5 * 10**11, 10**12), made_baseline(x, y))
    found = estimate_robustness({"r": one}, resamples=8000)["r"]
    generator = np.random.default_rng(7)
    robustness = []
    for _ in range(4000):
        drawn = generator.integers(40, size=40)
        slope, intercept = np.polyfit(np.log(x / (1 - x))[drawn], np.log(y / (1 - y))[drawn], 1)
        robustness.append(0.5 - 1 / (1 + np.exp(-slope * np.log(7 / 3) - intercept)))
    assert (found.low, found.high) == pytest.approx(np.quantile(robustness, [0.025, 0.975]), abs=2e-3)
    assert 0.02 < found.high - found.low < 0.08


def test_sets_share_models_and_accuracy_in_distribution() -> None:
    """Twice the same set is no second measurement: the interval stays; other images in distribution shrink it."""
    x, y = line_of_models(40, noise=0.3)
    many = Tally(5 * 10**11, 10**12)
    twice = {name: Scored(Tally(70, 100), many, made_baseline(x, y)) for name in ("r", "s")}
    found = estimate_robustness(twice)
    for name in ("s", MEAN):
        assert (found[name].low, found[name].high) == pytest.approx((found["r"].low, found["r"].high), abs=1e-5)
    apart = {"r": twice["r"], "s": Scored(Tally(70, 100), many, made_baseline(x, y, "val_on_s_classes"))}
    narrower = estimate_robustness(apart)[MEAN]
    assert narrower.high - narrower.low < 0.85 * (found[MEAN].high - found[MEAN].low)


def test_published_model_with_intervals() -> None:
    images = {name: SETS[name].num_images or 0 for name in SHIFTS}
    shares = dict(zip(SHIFTS, CLIP["RN50"][1:6], strict=True))
    scored = {
        name: Scored(Tally(29910, 50000), Tally(round(shares[name] / 100 * n), n), baseline(name))
        for name, n in images.items()
    }
    found = estimate_robustness(scored)
    assert list(found) == [*SHIFTS, MEAN]
    assert 100 * found[MEAN].value == pytest.approx(22.8, abs=0.1)
    assert found[MEAN].value == pytest.approx(np.mean([found[name].value for name in SHIFTS]))
    for one in found.values():
        assert one.low < one.value < one.high < one.low + 0.06
    assert found == estimate_robustness(scored)
    other = estimate_robustness(scored, seed=1)
    assert other[MEAN] != found[MEAN]
    assert other[MEAN].low == pytest.approx(found[MEAN].low, abs=2e-3)
    wider = estimate_robustness(scored, confidence=0.99)[MEAN]
    assert wider.low < found[MEAN].low < found[MEAN].high < wider.high


def test_accuracies_of_zero_and_one() -> None:
    x, y = line_of_models(20, noise=0.1)
    scored: dict[str, Any] = {"r": Scored(Tally(10, 10), Tally(0, 10), made_baseline(x, y))}
    found = estimate_robustness(scored)["r"]
    assert (found.value, found.low, found.high) == (-1.0, -1.0, -1.0)


def test_three_models_are_enough_for_an_interval() -> None:
    """A ninth of the draws is one model three times, through which there is no line: they are left out."""
    x, y = line_of_models(3, 0.1)
    slopes, intercepts = _least_squares(x, y, np.array([[0.0, 3.0, 0.0], [2.0, 0.0, 1.0], [0.0, 0.0, 0.0]]))
    assert np.isnan(slopes).tolist() == np.isnan(intercepts).tolist() == [True, False, True]
    assert slopes[1] == pytest.approx((y[2] - y[0]) / (x[2] - x[0]))
    assert slopes[1] * x[0] + intercepts[1] == pytest.approx(y[0])
    tied = np.array([[first, second, 0.0] for first in range(1, 9) for second in range(1, 9)])
    assert np.isnan(_least_squares(np.array([0.3, 0.3, 0.9]), y, tied)[0]).all()
    found = estimate_robustness({"r": Scored(Tally(70, 100), Tally(50, 100), made_baseline(x, y))})
    assert all(math.isfinite(value) for value in (found["r"].low, found["r"].high))
