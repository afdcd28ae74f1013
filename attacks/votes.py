"""What votes of noisy copies say about an image: the statistics of randomised smoothing (Cohen et al. 2019).

Numpy, float64, for any number of images at once; votes may come from wherever they like. Without torch, so that wrong
settings are refused at once. attacks/smoothing.py has the method and counts the votes.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

ABSTAIN = -1
BLOCK = 25  # noisy copies that are drawn at once; the customary 100, 1,000 and 100,000 are multiples
LARGEST_SIGMA = 2.0  # twice what has been published; beyond it somebody counts pixels from 0 to 255


def lower_confidence_bound(votes: ArrayLike, n: ArrayLike, alpha: ArrayLike) -> Floats:
    """One-sided Clopper-Pearson bound: the share that is too small to give `votes` of n with a chance above alpha.

    Numbers or arrays that broadcast. Raises ValueError for impossible counts or alpha outside (0, 1).
    """
    votes, n, alpha = np.broadcast_arrays(*(np.asarray(values, dtype=np.float64) for values in (votes, n, alpha)))
    if not ((n >= 1) & (votes >= 0) & (votes <= n)).all():
        raise ValueError("votes must be 0 to n, and n at least 1")
    if not ((alpha > 0) & (alpha < 1)).all():
        raise ValueError("alpha must lie between 0 and 1")
    return np.where(votes == 0, 0.0, special.betaincinv(np.maximum(votes, 1), n - votes + 1, alpha))


def certified_radius(bound: ArrayLike, sigma: ArrayLike) -> Floats:
    """L2 radius σ Φ⁻¹(bound), for pixels in [0, 1]; 0 where the bound of the class's probability is below 1/2."""
    bound = np.asarray(bound, dtype=np.float64)
    return np.where(bound < 0.5, 0.0, sigma * special.ndtri(bound))


def certify_counts(counts0: ArrayLike, counts: ArrayLike, alpha: float, sigma: float) -> tuple[Integers, Floats]:
    """Classes int64 [B], ABSTAIN where none is certain, and radii [B] (0 there), from votes [B, K] of both stages.

    Of equally frequent classes the first is selected. The number of copies, n, is the sum of an image's `counts`.
    """
    counts0, counts = np.asarray(counts0), np.asarray(counts)
    selected = counts0.argmax(axis=1)
    votes = np.take_along_axis(counts, selected[:, None], axis=1)[:, 0]
    bound = lower_confidence_bound(votes, counts.sum(axis=1), alpha)
    return np.where(bound < 0.5, ABSTAIN, selected), certified_radius(bound, sigma)


def predict_counts(counts: ArrayLike, alpha: float) -> tuple[Integers, Floats]:
    """Most frequent classes int64 [B], ABSTAIN where the p-value is above alpha, and p-values [B], from votes [B, K].

    The test is the two-sided binomial one, of the first class against the second at 1/2; after a tie it gives 1.
    """
    counts = np.asarray(counts)
    if counts.shape[1] < 2:
        raise ValueError("one class only: there is nothing to choose from")
    second, first = np.partition(counts, -2, axis=1)[:, -2:].T.astype(np.float64)
    p_value = np.minimum(1.0, 2 * special.betainc(first, second + 1, 0.5))  # twice P(at least `first` of both)
    return np.where(p_value > alpha, ABSTAIN, counts.argmax(axis=1)), p_value


def needed_samples(alpha: float, mode: Literal["certify", "predict"] = "certify") -> int:
    """The smallest n of which a unanimous vote is no abstention: 10 for alpha = 0.001, 11 to predict."""

    def enough(n: int) -> bool:
        if mode == "predict":
            return bool(predict_counts([[n, 0]], alpha)[0][0] != ABSTAIN)
        return bool(lower_confidence_bound(n, n, alpha) >= 0.5)

    n = max(1, math.floor(-math.log2(alpha)) - 1)
    while not enough(n):
        n += 1
    return n


def certified_accuracy(correct: ArrayLike, radii: ArrayLike, radius: float) -> float:
    """Share of images whose class is right (an abstention is not) and certain at least up to `radius`."""
    return float((np.asarray(correct, dtype=np.bool_) & (np.asarray(radii) >= radius)).mean())


def average_certified_radius(correct: ArrayLike, radii: ArrayLike) -> float:
    """Mean radius over all images, wrong classes and abstentions counting as 0."""
    return float(np.where(correct, radii, 0.0).mean())


def check_settings(mode: Literal["certify", "predict"], sigma: float, n0: int, n: int, alpha: float) -> None:
    """Raises ValueError, one line, for settings with which nothing can be certified; n0 only matters to certify."""
    if not (math.isfinite(sigma) and sigma > 0):
        raise ValueError(f"sigma must be a number above 0, not {sigma}")
    if sigma > LARGEST_SIGMA:
        raise ValueError(
            f"sigma {sigma:g} is for pixels in [0, 1] and cannot be above {LARGEST_SIGMA:g}; "
            f"if it counts pixels from 0 to 255, give {sigma / 255:.3g}"
        )
    if not 0 < alpha < 0.5:
        raise ValueError(f"alpha {alpha} must lie between 0 and 0.5: it is the chance of an error, such as 0.001")
    if mode == "certify" and n0 < 1:
        raise ValueError(f"n0 must be at least 1 copy, not {n0}")
    if n < 1:
        raise ValueError(f"n must be at least 1 copy, not {n}")
    if n < (needed := needed_samples(alpha, mode)):
        raise ValueError(
            f"n {n} is too small for alpha {alpha:g}: even a unanimous vote is an abstention; give at least {needed}"
        )
