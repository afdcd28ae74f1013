"""Batched transforms: what they do to pixels, and random numbers that no division into batches changes."""

import itertools

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor
from torch.nn.functional import pad as padded_by_torch

from data.augment import SampleDraws, low_pass, mirror, pad_and_crop, pixel_statistics, random_crop
from kernels import dct

pytestmark = pytest.mark.timeout(120)
GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8, generator=GENERATOR)
GREY = torch.randint(0, 256, (40, 1, 28, 28), dtype=torch.uint8, generator=GENERATOR)


def draws(count: int = 40, seed: int = 0, epoch: int = 0) -> SampleDraws:
    return SampleDraws(seed, epoch, torch.arange(count))


def chance(counts: Tensor) -> float:
    """How likely counts of equally likely outcomes are as uneven as these, by Pearson's chi-squared test."""
    return float(scipy.stats.chisquare(counts.double().flatten().numpy()).pvalue)


# --- Random numbers ---------------------------------------------------------------------------------------------------


def splitmix64(state: int) -> int:
    """Steele, Lea and Flood 2014, in plain Python."""
    word = (state + 0x9E3779B97F4A7C15) % 2**64
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB % 2**64
    return word ^ (word >> 31)


def test_numbers_are_splitmix64_on_every_device(device: str) -> None:
    index = torch.tensor([0, 1, 2, 49_999, 2**40, 2**62], device=device)
    for seed, epoch, purpose, bound in ((0, 0, 0, 9), (7, 3, 1, 17), (2**62, 249, 2, 2), (1, 0, 0, 2**31)):
        key = splitmix64(splitmix64(splitmix64(seed) ^ epoch) ^ purpose)
        words = [splitmix64((key + (sample - 1) * 0x9E3779B97F4A7C15) % 2**64) for sample in index.tolist()]
        expected = [(word >> 32) * bound >> 32 for word in words]
        assert SampleDraws(seed, epoch, index).integers(bound, purpose).tolist() == expected


def test_the_generator_is_the_published_one() -> None:
    """First outputs of splitmix64 from state 1234567, as its authors' C code gives them."""
    state, found = 1234567, []
    for _ in range(3):
        found.append(splitmix64(state))
        state = (state + 0x9E3779B97F4A7C15) % 2**64
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("bound", [2, 9, 17])
def test_numbers_are_uniform_and_independent(bound: int) -> None:
    """Chi-squared tests of single numbers, and of pairs over purposes, epochs, seeds and neighbours."""
    count = 60_000
    one = draws(count).integers(bound, 0)
    others = [
        draws(count).integers(bound, 1),
        draws(count, epoch=1).integers(bound, 0),
        draws(count, seed=1).integers(bound, 0),
        one.roll(1),
    ]
    assert one.min() == 0
    assert one.max() == bound - 1
    assert chance(torch.bincount(one)) > 1e-4
    for other in others:
        assert chance(torch.bincount(one * bound + other, minlength=bound * bound)) > 1e-4


def test_seed_and_epoch_are_not_interchangeable() -> None:
    found = {
        tuple(SampleDraws(seed, epoch, torch.arange(20)).integers(2**31, 0).tolist())
        for seed, epoch in itertools.product(range(5), range(5))
    }
    assert len(found) == 25


@pytest.mark.parametrize(("seed", "epoch"), [(-1, 0), (0, -1), (2**63, 0)])
def test_numbers_out_of_range_are_refused(seed: int, epoch: int) -> None:
    with pytest.raises(ValueError, match="must be numbers from 0"):
        SampleDraws(seed, epoch, torch.arange(2))


def test_a_sample_gets_the_same_transform_in_any_batch() -> None:
    def transformed(index: Tensor) -> Tensor:
        own = SampleDraws(4, 2, index)
        return mirror(pad_and_crop(IMAGES[index], own), own)

    order = torch.randperm(40, generator=GENERATOR)
    whole = transformed(torch.arange(40))
    assert torch.equal(transformed(order), whole[order])
    assert torch.equal(torch.cat([transformed(part) for part in torch.arange(40).split(7)]), whole)


# --- Pixels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [IMAGES, GREY, IMAGES.float() / 255])
@pytest.mark.parametrize("pad", [1, 4])
def test_a_crop_is_a_window_of_the_padded_image(images: Tensor, pad: int) -> None:
    fill = 200
    found = random_crop(images, draws(), pad=pad, fill=fill)
    assert found.dtype == images.dtype
    assert found.shape == images.shape
    value = fill / 255 if images.is_floating_point() else fill
    padded = padded_by_torch(images, [pad] * 4, value=value)
    size = images.shape[2]
    places = set()
    for crop, whole in zip(found, padded, strict=True):
        hits = [
            (top, left)
            for top, left in itertools.product(range(2 * pad + 1), repeat=2)
            if torch.equal(whole[:, top : top + size, left : left + size], crop)
        ]
        assert hits
        places.add(hits[0])
    assert len(places) > 5


def test_all_places_of_a_crop_are_equally_likely() -> None:
    """Where the white pixel lands, over 8,100 samples and 81 places: 100 each."""
    images = torch.zeros(8100, 1, 9, 9, dtype=torch.uint8)
    images[:, :, 4, 4] = 1
    crops = random_crop(images, draws(8100), pad=4)
    counts = crops.sum((0, 1))
    assert counts.sum() == 8100
    assert chance(counts) > 1e-4


def test_padding_by_a_colour_is_the_published_one() -> None:
    """Pad(8, (150, 50, 50)), then a crop of the old size: half the pixels of a corner crop have the colour."""
    images = torch.zeros(400, 3, 32, 32, dtype=torch.uint8)
    found = pad_and_crop(images, draws(400))
    colours = found[:40].permute(0, 2, 3, 1).reshape(-1, 3).unique(dim=0).tolist()
    assert colours == [[0, 0, 0], [150, 50, 50]]
    shares = (found[:, 0] == 150).float().mean((1, 2))
    assert shares.max() > 0.4  # of 1 - (24/32)**2 in a corner
    assert shares.mean().item() == pytest.approx(1 - (1 - 2 * 36 / 17 / 32) ** 2, abs=0.015)  # mean shift 72/17 px
    floats = pad_and_crop(images.float(), draws(400))
    assert torch.allclose(floats * 255, found.float())


def test_a_colour_for_other_channels_is_refused() -> None:
    with pytest.raises(ValueError, match="a padding colour of 3 numbers for images of 1 channels"):
        pad_and_crop(GREY, draws())
    assert pad_and_crop(GREY, draws(), color=150).shape == GREY.shape


def test_half_of_the_images_are_mirrored() -> None:
    found = mirror(IMAGES, draws())
    mirrored = [bool(torch.equal(a, b.flip(2))) for a, b in zip(found, IMAGES, strict=True)]
    kept = [bool(torch.equal(a, b)) for a, b in zip(found, IMAGES, strict=True)]
    assert all(a != b for a, b in zip(mirrored, kept, strict=True))
    assert 10 < sum(mirrored) < 30


def test_inputs_are_left_alone() -> None:
    before = IMAGES.clone()
    own = draws()
    mirror(pad_and_crop(random_crop(IMAGES, own), own), own)
    assert torch.equal(IMAGES, before)
    assert torch.equal(random_crop(IMAGES, own, pad=0), IMAGES)


def test_low_passed_images_stay_images() -> None:
    images = IMAGES.float() / 255
    found = low_pass(images, 3)
    assert found.min() >= 0
    assert found.max() <= 1
    assert torch.allclose(found, dct.low_pass(images, 3).clamp(0, 1))
    published = low_pass(images, 3, published=True)
    assert torch.equal(published, dct.low_pass(images, 3, published=True)), "the released code clips nothing"
    assert published.min() < 0
    assert not torch.allclose(published, found, atol=0.1)
    assert torch.allclose(low_pass(images, 8), images, atol=1e-5)


def test_statistics_are_those_of_all_pixels() -> None:
    mean, std = pixel_statistics(IMAGES)
    values = IMAGES.numpy().astype(np.float64) / 255
    assert mean == pytest.approx(values.mean((0, 2, 3)), rel=1e-6)
    assert std == pytest.approx(values.std((0, 2, 3), ddof=1), rel=1e-6)
    filtered_mean, filtered_std = pixel_statistics(IMAGES, lambda pixels: dct.low_pass(pixels, 2))
    assert filtered_mean == pytest.approx(mean, rel=1e-4)  # the constant is among the lowest frequencies
    assert all(new < old for new, old in zip(filtered_std, std, strict=True))
