"""Randomised smoothing: what a classifier says most often under Gaussian noise, and how far that is certain.

    g(x) = argmax_c P(f(x + σε) = c), ε standard normal       (Cohen et al., arXiv:1902.02918)

`certify` draws n0 noisy copies of an image and selects their most frequent class A, then draws n others and counts the
votes for A. With pA the lower Clopper-Pearson bound of P(f(x + σε) = A) at confidence 1 - α, g says A within an L2 ball
of radius σ Φ⁻¹(pA) around x, unless pA < 1/2: then it abstains. `predict` only gives the most frequent class, unless a
two-sided binomial test between the first two classes has a p-value above α. Both are wrong about an image, at any
radius, with a probability of at most α.

This file counts votes; attacks/votes.py says what follows from them.

Noise is drawn on the images' device, for each image and stage from a generator of its own, in blocks of BLOCK copies.
So the noise that an image gets depends on nothing but the seed, the image's number and the kind of device: not on batch
sizes, on what other images are there or on the number of processes. (Logits can still differ in their last digits
between batch sizes, where a library's convolutions do.) Nothing waits for the device between batches.

σ and radii are for pixels in [0, 1]. Noisy pixels leave that range and are not clipped, as the theory demands.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from attacks.pgd import Network, Precision, check_batch, under_attack
from attacks.votes import ABSTAIN, BLOCK, Floats, Integers, certify_counts, check_settings, predict_counts

Stage = Literal["selection", "estimation", "prediction"]
# Fills a tensor [BLOCK, ...] with standard normal numbers: the next copies of an image, given by its place, in a stage.
Noise = Callable[[Stage, int, Tensor], None]


@contextlib.contextmanager
def smoothing(
    model: nn.Module, device: torch.device, *, precision: Precision = "fp32", compile: bool = False
) -> Iterator[Network]:
    """The model as a function of noisy images, for the functions below: `under_attack` without gradients.

    compile: by torch.compile, which takes some seconds to minutes at the first batch; docs/performance.md has what it
        saves.
    """
    with under_attack(model, device, precision=precision) as network, torch.inference_mode():
        yield _Compiled(network) if compile else network


class _Compiled:
    """A compiled network. Each size of a batch is compiled anew, so smaller ones are filled up to one that is known."""

    def __init__(self, network: Network) -> None:
        self._network: Network = torch.compile(network, dynamic=False)
        self._sizes: set[int] = set()

    def __call__(self, images: Tensor) -> Tensor:
        count = len(images)
        size = min((known for known in self._sizes if known >= count), default=count)
        self._sizes.add(size)
        if size == count:
            return self._network(images)
        layout = torch.channels_last if images.ndim == 4 else torch.contiguous_format
        filled = torch.zeros(size, *images.shape[1:], dtype=images.dtype, device=images.device)
        filled = filled.contiguous(memory_format=layout)
        filled[:count] = images
        return self._network(filled)[:count]


class GaussianNoise:
    """Noise of images that have these numbers in their data set, on `device`."""

    def __init__(self, seed: int, numbers: Sequence[int], device: torch.device) -> None:
        self._seed, self._numbers, self._device = seed, numbers, device
        self._generators: dict[tuple[Stage, int], torch.Generator] = {}

    def __call__(self, stage: Stage, image: int, out: Tensor) -> None:
        """See `Noise`."""
        generator = self._generators.get((stage, image))
        if generator is None:
            words = f"smoothing/{self._seed}/{self._numbers[image]}/{stage}"
            generator = torch.Generator(self._device)
            generator.manual_seed(int.from_bytes(hashlib.sha256(words.encode()).digest()[:8]) >> 1)
            self._generators[stage, image] = generator
        out.normal_(generator=generator)


def default_batch_size(images: Tensor) -> int:
    """Noisy copies of images [B, ...] for one forward pass: as many as are fast, by the size of an image.

    About 0.3 MB of pixels on a CPU, whose caches then hold the maps of a small network, at least one block; 150 MB on a
    GPU, at most 2,000 copies.
    """
    pixels = 4 * max(images[0].numel(), 1)
    copies = min(150_000_000 // pixels, 2000) if images.is_cuda else min(312_500 // pixels, 500)
    return max(copies // BLOCK, 1) * BLOCK


def count_votes(
    network: Network,
    images: Tensor,
    copies: int,
    sigma: float,
    draw: Callable[[int, Tensor], None],
    *,
    batch_size: int = 0,
) -> Integers:
    """Votes int64 [B, K]: how often `network` says each class about `copies` noisy copies of each image.

    Args:
        network: what `smoothing` gives, inside of it: images [N, ...] → logits [N, K]. What it raises ends the count.
        images: [B, ...] floating point, on the device.
        draw: fills [BLOCK, ...] with standard normal numbers for the image at a place; the last block of an image may
            be used in part.
        batch_size: copies of one forward pass, of one image after the other; 0: `default_batch_size`.

    Raises:
        ValueError: no images, less than one copy, batches of less than BLOCK copies, logits that are not finite.
    """
    if not len(images) or copies < 1:
        raise ValueError(f"{len(images)} images and {copies} copies: there is nothing to count")
    batch_size = batch_size or default_batch_size(images)
    if batch_size < BLOCK:
        raise ValueError(f"batch size {batch_size} is below the {BLOCK} copies that are drawn at once")
    shape = images.shape[1:]
    noise = torch.empty(BLOCK, *shape, dtype=images.dtype, device=images.device)
    layout = torch.channels_last if images.ndim == 4 else torch.contiguous_format
    inputs = torch.empty(batch_size, *shape, dtype=images.dtype, device=images.device, memory_format=layout)
    ones = torch.ones(batch_size, dtype=torch.int64, device=images.device)
    counts: Tensor | None = None
    finite: Tensor | None = None
    parts: list[tuple[int, int]] = []  # of the batch that is being filled: the place of an image, its copies
    filled = 0

    def vote() -> None:
        nonlocal counts, finite, filled
        logits = network(inputs[:filled])
        if counts is None:
            counts = torch.zeros(len(images), logits.shape[1], dtype=torch.int64, device=images.device)
        ended = torch.isfinite(logits).all()
        finite = ended if finite is None else finite & ended
        votes = logits.argmax(dim=1)
        for place, number in parts:
            counts[place].index_add_(0, votes[:number], ones[:number])
            votes = votes[number:]
        parts.clear()
        filled = 0

    for place in range(len(images)):
        for first in range(0, copies, BLOCK):
            number = min(BLOCK, copies - first)
            if filled + number > batch_size:
                vote()
            draw(place, noise)
            torch.add(images[place], noise[:number], alpha=sigma, out=inputs[filled : filled + number])
            filled += number
            if parts and parts[-1][0] == place:
                parts[-1] = place, parts[-1][1] + number
            else:
                parts.append((place, number))
    vote()
    assert counts is not None and finite is not None  # noqa: PT018
    if not finite:  # the first wait for the device
        raise ValueError("the classifier's logits are not finite under noise")
    return counts.cpu().numpy()


@dataclass(frozen=True)
class Certificates:
    """What is certain about images [B].

    classes: int64, ABSTAIN where none is. radii: float64, L2 for pixels in [0, 1]. selected: the class in question,
    int64. counts0, counts: votes int64 [B, K] of both stages; all 0 in `counts` where an image was left out.
    """

    classes: Integers
    radii: Floats
    selected: Integers
    counts0: Integers
    counts: Integers


def certify(
    network: Network,
    images: Tensor,
    noise: Noise,
    *,
    sigma: float,
    n0: int = 100,
    n: int = 100_000,
    alpha: float = 0.001,
    labels: ArrayLike | None = None,
    batch_size: int = 0,
) -> Certificates:
    """Certificates of images [B, ...] in [0, 1], each wrong with a probability of at most alpha.

    Args:
        network, batch_size: see `count_votes`.
        noise: `GaussianNoise`.
        sigma: of the noise, for pixels in [0, 1]. n0, n: copies that select the class, and that count its votes.
        labels: [B]; with them only images whose selected class is right are counted further. The others' certificates
            are abstentions, which changes neither certified accuracy nor average radius, and saves their n copies.

    Raises:
        ValueError: what `check_settings` and `count_votes` refuse, and images outside [0, 1].
    """
    check_settings("certify", sigma, n0, n, alpha)
    check_batch(images, images, look=True)
    counts0 = count_votes(network, images, n0, sigma, partial(noise, "selection"), batch_size=batch_size)
    selected = counts0.argmax(axis=1)
    kept = np.arange(len(images)) if labels is None else np.flatnonzero(selected == np.asarray(labels))
    counts, classes, radii = np.zeros_like(counts0), np.full(len(images), ABSTAIN), np.zeros(len(images))
    if len(kept):
        some = images if len(kept) == len(images) else images[torch.from_numpy(kept).to(images.device)]

        def draw(place: int, out: Tensor) -> None:
            noise("estimation", int(kept[place]), out)

        counts[kept] = count_votes(network, some, n, sigma, draw, batch_size=batch_size)
        classes[kept], radii[kept] = certify_counts(counts0[kept], counts[kept], alpha, sigma)
    return Certificates(classes, radii, selected, counts0, counts)


def predict(
    network: Network,
    images: Tensor,
    noise: Noise,
    *,
    sigma: float,
    n: int = 100_000,
    alpha: float = 0.001,
    batch_size: int = 0,
) -> tuple[Integers, Floats, Integers]:
    """Classes int64 [B] or ABSTAIN, p-values [B] and votes [B, K] of images; arguments and errors as of `certify`."""
    check_settings("predict", sigma, 1, n, alpha)
    check_batch(images, images, look=True)
    draw = partial(noise, "prediction")
    counts = count_votes(network, images, n, sigma, draw, batch_size=batch_size)
    return *predict_counts(counts, alpha), counts
