"""Transforms of whole batches on their device: crops, mirror images, the low-pass of "Hold me tight!".

    draws = SampleDraws(seed, epoch, batch["index"])
    images = mirror(random_crop(batch["image"], draws, pad=4), draws)

Every random number is a function of (seed, epoch, sample, purpose) alone: a hash of integers, the same on every device
and for any division into batches, ranks and restarts. Images are [N, C, H, W], grey or colour; uint8 stays uint8.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from data.transforms import unit_interval
from kernels import dct

PADDING_COLOR = (150, 50, 50)  # the brick red of the padded CIFAR-10 of Feature Contamination (Zhang et al. 2024)

_WORD = 2**64 - 1
_STEP, _MIX = 0x9E3779B97F4A7C15, (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # splitmix64 (Steele et al. 2014)
_TOP, _LEFT, _MIRROR = range(3)  # what a number is for


class SampleDraws:
    """Random integers of some samples in one epoch.

    index: int64 [N], the samples' numbers in the data set, on the device where the draws are wanted. Raises ValueError
    for a negative seed or epoch, or beyond 2**63.
    """

    def __init__(self, seed: int, epoch: int, index: Tensor) -> None:
        if not (0 <= seed < 2**63 and 0 <= epoch < 2**63):
            raise ValueError(f"seed {seed} and epoch {epoch} must be numbers from 0 to 2**63 - 1")
        self._key = _mixed(_mixed(seed) ^ epoch)
        self._index = index.to(torch.int64)

    def integers(self, bound: int, purpose: int) -> Tensor:
        """int64 [N], uniform over 0 ... bound - 1 (to one part in 2**32 / bound), independent for each purpose."""
        key = _mixed(self._key ^ purpose)
        # Products of int64 tensors keep their lowest 64 bits, as those of splitmix64's unsigned words do.
        word = self._index * _signed(_STEP) + _signed(key)
        for shift, factor in zip((30, 27), _MIX, strict=True):
            word = (word ^ _shifted(word, shift)) * _signed(factor)
        word = word ^ _shifted(word, 31)
        return (_shifted(word, 32) * bound) >> 32


def _mixed(word: int) -> int:
    """splitmix64's output for a state, as a Python integer 0 ... 2**64 - 1."""
    word = (word + _STEP) & _WORD
    word = ((word ^ (word >> 30)) * _MIX[0]) & _WORD
    word = ((word ^ (word >> 27)) * _MIX[1]) & _WORD
    return word ^ (word >> 31)


def _signed(word: int) -> int:
    """The int64 with the bits of an unsigned word."""
    return word - 2**64 if word >= 2**63 else word


def _shifted(word: Tensor, bits: int) -> Tensor:
    """A shift to the right that fills with zeros; torch's repeats the sign."""
    return (word >> bits) & ((1 << (64 - bits)) - 1)


def random_crop(images: Tensor, draws: SampleDraws, *, pad: int = 4, fill: int | Sequence[int] = 0) -> Tensor:
    """Each image [H, W] cut at a random place out of itself with `pad` pixels of a colour on every side.

    All (2 pad + 1)^2 places are equally likely. fill: 0..255, one for all channels or one each; images in [0, 1] get
    it divided by 255. Raises ValueError for another number of channels.
    """
    colour = [fill] if isinstance(fill, int) else list(fill)
    channels, height, width = images.shape[1:]
    if len(colour) not in (1, channels):
        raise ValueError(f"a padding colour of {len(colour)} numbers for images of {channels} channels")
    if pad == 0:
        return images
    outside = torch.tensor(colour, dtype=torch.float64)
    outside = (outside / 255 if images.is_floating_point() else outside).to(images.device, images.dtype)
    padded = images.new_empty(len(images), channels, height + 2 * pad, width + 2 * pad)
    padded.copy_(outside[:, None, None])
    padded[:, :, pad:-pad, pad:-pad] = images
    # All crops as views [N, C, places down, places right, H, W]: taking one of each image copies whole rows.
    places = padded.unfold(2, height, 1).unfold(3, width, 1)
    top, left = draws.integers(2 * pad + 1, _TOP), draws.integers(2 * pad + 1, _LEFT)
    return places[torch.arange(len(images), device=images.device), :, top, left]


def pad_and_crop(
    images: Tensor, draws: SampleDraws, *, pad: int = 8, color: int | Sequence[int] = PADDING_COLOR
) -> Tensor:
    """The published way to put a colour into CIFAR-10: `random_crop` with a wide frame of it."""
    return random_crop(images, draws, pad=pad, fill=color)


def mirror(images: Tensor, draws: SampleDraws) -> Tensor:
    """Each image mirrored left to right with probability one half."""
    chosen = draws.integers(2, _MIRROR) == 1
    return torch.where(chosen[:, None, None, None], images.flip(3), images)


def low_pass(images: Tensor, bandwidth: int, *, published: bool = False) -> Tensor:
    """Images in [0, 1] with their lowest `bandwidth` frequencies of both axes, clipped to [0, 1].

    published: as in the released code, which on batches cuts vertical frequencies only (`kernels.dct`), and clips
    nothing. A classifier with `low_pass` does the same in its `forward`.
    """
    filtered = dct.low_pass(images, bandwidth, published=published)
    return filtered if published else filtered.clamp(0, 1)


def pixel_statistics(
    images: Tensor, transform: Callable[[Tensor], Tensor] | None = None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of uint8 images [N, C, H, W] in [0, 1] after `transform`.

    In float64, 1,000 images at a time. "Hold me tight!" normalises its low-pass data by those of the filtered set.
    """
    count, total, squares = 0, torch.zeros(images.shape[1]).double(), torch.zeros(images.shape[1]).double()
    for part in images.split(1000):
        pixels = unit_interval(part)
        values = (pixels if transform is None else transform(pixels)).double().cpu()
        count += values.numel() // images.shape[1]
        total += values.sum((0, 2, 3))
        squares += values.square().sum((0, 2, 3))
    mean = total / count
    variance = (squares - count * mean.square()) / (count - 1)
    return tuple(mean.tolist()), tuple(variance.clamp(min=0).sqrt().tolist())
