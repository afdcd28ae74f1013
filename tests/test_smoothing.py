"""Randomised smoothing: statistics and decisions as the original code's, votes that depend on nothing but the seed."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies
from scipy import stats
from torch import Tensor, nn

from attacks import smoothing
from attacks.smoothing import GaussianNoise, Stage
from attacks.votes import (
    ABSTAIN,
    BLOCK,
    average_certified_radius,
    certified_accuracy,
    certified_radius,
    certify_counts,
    check_settings,
    lower_confidence_bound,
    needed_samples,
    predict_counts,
)
from models.classifiers import Classifier, load_classifier

CPU = torch.device("cpu")


class GoldenNoise:
    """The draws of the reference, the same for all images: the first n0 select, the next n are counted."""

    def __init__(self, unit: Tensor, n0: int) -> None:
        self.unit, self.n0 = unit, n0
        self.next: dict[tuple[Stage, int], int] = {}

    def __call__(self, stage: Stage, image: int, out: Tensor) -> None:
        first = self.next.get((stage, image), 0 if stage == "selection" else self.n0)
        part = self.unit[first : first + BLOCK]
        out[: len(part)] = part
        self.next[stage, image] = first + BLOCK


class HalfSpace(nn.Module):
    """Two classes, the second where w·x + b > 0; under noise of sigma its probability is Φ((w·x + b)/(sigma‖w‖))."""

    def __init__(self, weight: Tensor, bias: float) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), bias

    def forward(self, images: Tensor) -> Tensor:
        height = images.flatten(1) @ self.weight + self.bias
        return torch.stack([-height, height], dim=1)

    def distance(self, images: Tensor) -> np.ndarray:
        """Signed distance of each image to the border."""
        height = images.flatten(1).double() @ self.weight.detach().double() + self.bias
        return (height / self.weight.detach().double().norm()).numpy()


@pytest.fixture(scope="module")
def resnet20(goldens: Path) -> Classifier:
    return load_classifier(f"cifar_resnet20/{goldens / 'cifar_resnet20.safetensors'}")


@pytest.fixture(scope="module")
def lenet(goldens: Path) -> Classifier:
    return load_classifier(f"lenet/{goldens / 'lenet_mnist.safetensors'}")


# ----------------------------------------------------------------------------------------------------------------------
# Statistics
# ----------------------------------------------------------------------------------------------------------------------


def test_bounds_and_radii_are_the_originals(goldens: Path) -> None:
    golden = np.load(goldens / "smoothing_stats.npz")
    bound = lower_confidence_bound(golden["nA"], golden["n"], golden["alpha"])
    np.testing.assert_allclose(bound, golden["pABar"], rtol=0, atol=1e-10)
    np.testing.assert_array_equal(bound < 0.5, golden["abstain"])
    radii = certified_radius(bound, golden["sigmas"][:, None])
    np.testing.assert_allclose(radii, golden["radius"], rtol=0, atol=1e-8)


def test_certificates_from_votes_are_the_originals(goldens: Path) -> None:
    golden = np.load(goldens / "smoothing_stats.npz")
    for case in range(len(golden["cert_n"])):
        counts0, counts = golden["cert_counts0"][case], golden["cert_counts"][case]
        assert (counts0.sum(), counts.sum()) == (golden["cert_n0"][case], golden["cert_n"][case])
        alpha, sigma = float(golden["cert_alpha"][case]), float(golden["cert_sigma"][case])
        classes, radii = certify_counts([counts0], [counts], alpha, sigma)
        assert classes.tolist() == [golden["cert_class"][case]]
        assert radii[0] == pytest.approx(golden["cert_radius"][case], rel=0, abs=1e-8)


def test_predictions_from_votes_are_the_originals(goldens: Path) -> None:
    golden = np.load(goldens / "smoothing_stats.npz")
    for alpha, expected in zip(golden["predict_alphas"], golden["predict_out"], strict=True):
        classes, p_values = predict_counts(golden["predict_counts"], float(alpha))
        np.testing.assert_array_equal(classes, expected)
        np.testing.assert_allclose(p_values, golden["predict_pvalue"], rtol=0, atol=1e-12)


@hypothesis.given(
    first=strategies.integers(0, 3000), second=strategies.integers(0, 3000), others=strategies.integers(0, 50)
)
def test_p_values_are_those_of_scipys_test(first: int, second: int, others: int) -> None:
    others = min(others, first, second)
    hypothesis.assume(first + second > 0)
    p_value = predict_counts([[first, others, second]], 0.01)[1][0]
    expected = stats.binomtest(max(first, second), first + second, 0.5).pvalue
    assert p_value == pytest.approx(expected, rel=1e-9, abs=1e-300)


@hypothesis.given(
    n=strategies.integers(1, 400), share=strategies.floats(0.001, 0.999), alpha=strategies.floats(1e-4, 0.3)
)
def test_a_bound_exceeds_the_true_probability_with_a_chance_of_at_most_alpha(
    n: int, share: float, alpha: float
) -> None:
    """Exactly: over all outcomes, weighted by their probabilities."""
    votes = np.arange(n + 1)
    wrong = lower_confidence_bound(votes, n, alpha) > share
    assert stats.binom.pmf(votes[wrong], n, share).sum() <= alpha * (1 + 1e-9)


def test_a_unanimous_vote_needs_so_many_copies() -> None:
    assert needed_samples(0.001) == 10
    assert needed_samples(0.001, "predict") == 11
    for alpha in (0.4, 0.3, 0.05, 0.01, 1e-3, 1e-6, 1e-12):
        n = needed_samples(alpha)
        assert certify_counts([[n, 0]], [[n, 0]], alpha, 1.0)[0] == [0]
        assert n == 1 or certify_counts([[n, 0]], [[n - 1, 0]], alpha, 1.0)[0] == [ABSTAIN]
        n = needed_samples(alpha, "predict")
        assert predict_counts([[0, n]], alpha)[0] == [1]
        assert predict_counts([[0, n - 1]], alpha)[0] == [ABSTAIN]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"n": 9}, r"n 9 is too small for alpha 0\.001.*at least 10"),
        ({"n": 10, "mode": "predict"}, "at least 11"),
        ({"n": 0}, "n must be at least 1 copy, not 0"),
        ({"n0": 0}, "n0 must be at least 1 copy, not 0"),
        ({"sigma": 0.0}, "sigma must be a number above 0"),
        ({"sigma": math.nan}, "sigma must be a number above 0"),
        ({"sigma": 64.0}, r"pixels in \[0, 1\].*give 0\.251"),
        ({"alpha": 0.0}, "alpha 0.0 must lie between"),
        ({"alpha": 0.999}, "it is the chance of an error"),
        ({"alpha": -0.1}, "alpha -0.1 must lie between"),
    ],
)
def test_settings_with_which_nothing_can_be_certified_are_refused(changed: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = {"mode": "certify", "sigma": 0.25, "n0": 100, "n": 1000, "alpha": 0.001}
    check_settings(**settings)
    with pytest.raises(ValueError, match=message):
        check_settings(**{**settings, **changed})


def test_impossible_counts_are_refused() -> None:
    for votes, n, alpha in ((5, 4, 0.1), (-1, 4, 0.1), (0, 0, 0.1), (1, 2, 1.0)):
        with pytest.raises(ValueError, match="must"):
            lower_confidence_bound(votes, n, alpha)
    with pytest.raises(ValueError, match="one class"):
        predict_counts([[3]], 0.1)


def test_certified_accuracy_counts_right_classes_up_to_and_at_their_radius() -> None:
    correct, radii = [True, True, False, False], [0.5, 1.0, 2.0, 0.0]
    shares = [certified_accuracy(correct, radii, radius) for radius in (0.0, 0.5, 0.75, 1.0, 1.5)]
    assert shares == [0.5, 0.5, 0.25, 0.25, 0.0]
    assert average_certified_radius(correct, radii) == pytest.approx(1.5 / 4)


# ----------------------------------------------------------------------------------------------------------------------
# Sampling
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [BLOCK, 0])
def test_a_batch_norm_model_under_given_noise_gets_the_originals_certificates(
    resnet20: Classifier, goldens: Path, batch_size: int
) -> None:
    golden = np.load(goldens / "smoothing_pipeline.npz")
    images = torch.from_numpy(golden["images_u8"]).float() / 255
    unit = torch.from_numpy(golden["unit_noise_q"]).float() * float(golden["unit_noise_scale"])
    sigma, n0, n, alpha = (golden[name].item() for name in ("sigma", "n0", "n", "alpha"))
    before = {name: tensor.clone() for name, tensor in resnet20.state_dict().items()}
    resnet20.train()  # counted in evaluation mode all the same, and left as it was
    with smoothing.smoothing(resnet20, CPU) as network:
        found = smoothing.certify(
            network, images, GoldenNoise(unit, n0), sigma=sigma, n0=n0, n=n, alpha=alpha, batch_size=batch_size
        )
        classes, _, _ = smoothing.predict(
            network, images, GoldenNoise(unit, n0), sigma=sigma, n=n, alpha=alpha, batch_size=batch_size
        )
    assert all(module.training for module in resnet20.modules())
    resnet20.eval()
    np.testing.assert_array_equal(found.counts0, golden["counts0"])
    np.testing.assert_array_equal(found.counts, golden["counts"])
    np.testing.assert_array_equal(found.classes, golden["cert_class"])
    np.testing.assert_allclose(found.radii, golden["cert_radius"], rtol=0, atol=1e-8)
    np.testing.assert_array_equal(classes, golden["predict_out"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in resnet20.state_dict().items())


def test_votes_depend_neither_on_batches_nor_on_other_images(lenet: Classifier) -> None:
    images = torch.rand(5, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    settings: dict[str, Any] = {"sigma": 0.5, "n0": 30, "n": 130, "alpha": 0.01}

    def counts(places: list[int], batch_size: int, seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
        noise = GaussianNoise(seed, [1000 + place for place in places], CPU)
        with smoothing.smoothing(lenet, CPU) as network:
            found = smoothing.certify(network, images[places], noise, batch_size=batch_size, **settings)
        assert found.counts0.sum(axis=1).tolist() == [30] * len(places)
        assert found.counts.sum(axis=1).tolist() == [130] * len(places)
        return found.counts0, found.counts

    together = counts([0, 1, 2, 3, 4], 0)
    assert len(np.unique(together[1], axis=0)) > 1  # the images differ in their votes, or equality would say nothing
    for batch_size in (BLOCK, 60, 1000):
        for one, other in zip(together, counts([0, 1, 2, 3, 4], batch_size), strict=True):
            np.testing.assert_array_equal(one, other)
    for one, other in zip(together, counts([4, 1], 40), strict=True):
        np.testing.assert_array_equal(one[[4, 1]], other)
    assert not np.array_equal(together[1], counts([0, 1, 2, 3, 4], 0, seed=4)[1])


def test_noise_is_standard_normal_and_new_in_every_block_stage_image_and_seed() -> None:
    def draw(seed: int, number: int, stage: Stage, blocks: int) -> list[Tensor]:
        noise, out = GaussianNoise(seed, [number], CPU), torch.empty(BLOCK, 3, 11, 7)
        drawn = []
        for _ in range(blocks):
            noise(stage, 0, out)
            drawn.append(out.clone())
        return drawn

    first, second = draw(0, 5, "selection", 2)
    assert torch.equal(first, draw(0, 5, "selection", 1)[0])
    others = [second] + [draw(0, 5, "estimation", 1)[0], draw(0, 6, "selection", 1)[0], draw(1, 5, "selection", 1)[0]]
    for other in others:
        assert abs(float((first * other).mean())) < 5 / math.sqrt(first.numel())  # uncorrelated, to 5 deviations
    assert stats.kstest(torch.stack([first, *others]).flatten().numpy(), "norm").pvalue > 1e-3


def test_radii_stay_within_the_true_distance_to_the_border_of_a_half_space() -> None:
    """400 images whose certificates fail with a chance of at most 5 % each."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(400, 7, generator=generator)
    weight = torch.randn(7, generator=generator)
    model = HalfSpace(weight, bias=-float(weight.sum()) / 2)
    sigma, alpha = 0.3, 0.05
    with smoothing.smoothing(model, CPU) as network:
        noise = GaussianNoise(0, range(400), CPU)
        found = smoothing.certify(network, images, noise, sigma=sigma, n0=50, n=200, alpha=alpha)
    distance = model.distance(images)
    votes = np.take_along_axis(found.counts, found.selected[:, None], axis=1)[:, 0]
    bound = lower_confidence_bound(votes, 200, alpha)
    share = stats.norm.cdf(np.where(found.selected == 1, distance, -distance) / sigma)
    wrong = bound > share
    assert stats.binomtest(int(wrong.sum()), 400, alpha, alternative="greater").pvalue > 1e-3
    certain = found.classes != ABSTAIN
    assert 200 < certain.sum() < 400
    true_radius = np.where(found.classes == (distance > 0), np.abs(distance), 0.0)
    beyond = certain & (found.radii > true_radius)
    assert np.array_equal(beyond, certain & wrong)  # a radius is too large just where a bound is
    # Nothing is wasted either: far from the border, the radius that so many copies allow.
    largest = certified_radius(lower_confidence_bound(200, 200, alpha), sigma)
    assert found.radii.max() == pytest.approx(largest)


def test_images_of_a_wrong_class_may_be_left_out(lenet: Classifier) -> None:
    images = torch.rand(6, 1, 28, 28, generator=torch.Generator().manual_seed(2))
    settings: dict[str, Any] = {"sigma": 0.3, "n0": 20, "n": 60, "alpha": 0.05}
    with smoothing.smoothing(lenet, CPU) as network:
        whole = smoothing.certify(network, images, GaussianNoise(0, range(6), CPU), **settings)
        labels = whole.selected.copy()
        labels[[0, 3]] = (labels[[0, 3]] + 1) % 10
        part = smoothing.certify(network, images, GaussianNoise(0, range(6), CPU), labels=labels, **settings)
        none = smoothing.certify(
            network, images, GaussianNoise(0, range(6), CPU), labels=(whole.selected + 1) % 10, **settings
        )
    kept = [1, 2, 4, 5]
    np.testing.assert_array_equal(part.selected, whole.selected)
    np.testing.assert_array_equal(part.counts[kept], whole.counts[kept])
    np.testing.assert_array_equal(part.radii[kept], whole.radii[kept])
    assert part.classes[[0, 3]].tolist() == [ABSTAIN, ABSTAIN]
    assert part.counts[[0, 3]].sum() == 0
    assert none.classes.tolist() == [ABSTAIN] * 6
    for radius in (0.0, 0.1, 0.3):
        correct = [found.classes == labels for found in (whole, part)]
        shares = [
            certified_accuracy(one, found.radii, radius) for one, found in zip(correct, (whole, part), strict=True)
        ]
        assert shares[0] == shares[1]


def test_bf16_counts_as_many_copies_and_repeats_itself(resnet20: Classifier, goldens: Path) -> None:
    images = torch.from_numpy(np.load(goldens / "smoothing_pipeline.npz")["images_u8"][:1]).float() / 255
    found = []
    for _ in range(2):
        with smoothing.smoothing(resnet20, CPU, precision="bf16") as network:
            assert network(images).dtype == torch.bfloat16
            noise = GaussianNoise(0, [0], CPU)
            found.append(smoothing.certify(network, images, noise, sigma=0.12, n0=10, n=30, alpha=0.05))
    np.testing.assert_array_equal(found[0].counts, found[1].counts)
    assert found[0].counts.sum() == 30


def test_nothing_to_count_and_logits_that_are_not_finite_are_refused(lenet: Classifier) -> None:
    noise = GaussianNoise(0, [0], CPU)
    options: dict[str, Any] = {"sigma": 0.5, "n0": 10, "n": 20, "alpha": 0.05}
    with smoothing.smoothing(lenet, CPU) as network:
        with pytest.raises(ValueError, match="0 images and 10 copies"):
            smoothing.certify(network, torch.empty(0, 1, 28, 28), noise, **options)
        with pytest.raises(ValueError, match="batch size 10 is below the 25"):
            smoothing.certify(network, torch.zeros(1, 1, 28, 28), noise, batch_size=10, **options)
        for pixels in (torch.full((1, 1, 28, 28), math.nan), 255 * torch.ones(1, 1, 28, 28)):
            with pytest.raises(ValueError, match=r"beyond \[0, 1\]"):
                smoothing.certify(network, pixels, noise, **options)
            with pytest.raises(ValueError, match=r"beyond \[0, 1\]"):
                smoothing.predict(network, pixels, noise, sigma=0.5, n=20, alpha=0.05)
        with pytest.raises(ValueError, match=r"type torch.uint8"):
            smoothing.certify(network, torch.zeros(1, 1, 28, 28, dtype=torch.uint8), noise, **options)
        with pytest.raises(ValueError, match="logits are not finite under noise"):
            smoothing.certify(lambda images: network(images) * math.nan, torch.zeros(1, 1, 28, 28), noise, **options)
    with pytest.raises(ValueError, match="precision"), smoothing.smoothing(lenet, CPU, precision="fp16"):  # type: ignore[arg-type]
        pass


def test_what_a_network_raises_ends_the_count(lenet: Classifier) -> None:
    calls = 0

    def stopping(images: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise InterruptedError
        return network(images)

    noise = GaussianNoise(0, [0], CPU)
    with smoothing.smoothing(lenet, CPU) as network, pytest.raises(InterruptedError):
        smoothing.predict(stopping, torch.zeros(1, 1, 28, 28), noise, sigma=0.5, n=1000, alpha=0.05, batch_size=50)
    assert calls == 3


def test_a_compiled_network_meets_few_sizes_and_says_the_same() -> None:
    sizes: list[int] = []

    def network(images: Tensor) -> Tensor:
        sizes.append(len(images))
        return images.flatten(1)[:, :2]

    compiled = smoothing._Compiled(network)
    compiled._network = network  # the sizes are in question here, not the compiler
    images = torch.rand(40, 1, 3, 3)
    for count in (10, 40, 7, 25, 40):
        assert torch.equal(compiled(images[:count]), network(images[:count]))
    assert sizes[::2] == [10, 40, 10, 40, 40]


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiling_changes_no_vote_of_a_half_space() -> None:
    images = torch.rand(3, 6, generator=torch.Generator().manual_seed(0))
    model = HalfSpace(torch.randn(6, generator=torch.Generator().manual_seed(1)), bias=0.1)
    found = []
    for compile in (False, True):
        with smoothing.smoothing(model, CPU, compile=compile) as network:
            noise = GaussianNoise(0, range(3), CPU)
            found.append(
                smoothing.certify(network, images, noise, sigma=0.3, n0=20, n=110, alpha=0.05, batch_size=50).counts
            )
    np.testing.assert_array_equal(found[0], found[1])
