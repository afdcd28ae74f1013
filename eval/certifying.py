"""Certification timed beside the published loop: what `eval/throughput.py certify` runs.

Apart from the script, which only reads the command line and has other measurements. One image is certified, n0 copies
and then n, by turns within each round, by

    original, batch B              `Smooth.certify` of locuslab/smoothing (Cohen et al. 2019) and its normalising layer,
                                   written out here operation by operation, with each batch size B; its best one counts
    ours                           attacks/smoothing.py as it comes, float32
    ours, compiled                 by torch.compile, whose own time is not in it
    ours, bf16; bf16, compiled     and in bfloat16, where the processor or the GPU multiplies it

after a check that both networks say the same about the same noisy copies. Weights are random, batch norm's statistics
those of one noisy batch: speed depends on shapes, not on values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from data import DataError
from eval.attacking import multiplies_bf16
from eval.common import spread
from eval.turns import ratio, report, run_measurement, seconds_row, speed_up_row, take_turns

if TYPE_CHECKING:
    from torch import Tensor, nn

    from attacks.pgd import Network, Precision
    from models.classifiers import Classifier

OURS, COMPILED, BF16, BF16_COMPILED = "ours", "ours, compiled", "ours, bf16", "ours, bf16, compiled"
SIGMA, ALPHA = 0.25, 0.001
AGREE = {"fp32": 0.97, "bf16": 0.7}  # share of noisy copies that both networks have to say the same about
# Lower bound of the original's time at its best batch size over ours.
TARGETS = {("cpu", "cifar_resnet20", OURS): 1.5, ("cpu", "cifar_resnet20", COMPILED): 1.5}


@dataclass(frozen=True)
class Config:
    """What to measure; `eval/throughput.py certify --help` says it in words."""

    device: str = "cuda"
    model: str = "cifar_resnet20"
    n0: int = 100
    n: int = 1000
    batch_sizes: tuple[int, ...] = (25, 50, 100)
    bf16: str = "auto"
    compile: bool = True
    rounds: int = 5
    rows: str = "runs/benchmarks.jsonl"


class NormalizeLayer:
    """The original's: mean and standard deviation laid out anew for each batch."""

    def __init__(self, means: Tensor, sds: Tensor) -> None:
        self.means, self.sds = means, sds

    def __call__(self, images: Tensor) -> Tensor:
        count, _, height, width = images.shape
        means = self.means.repeat((count, height, width, 1)).permute(0, 3, 1, 2)
        sds = self.sds.repeat((count, height, width, 1)).permute(0, 3, 1, 2)
        return (images - means) / sds


class Original:
    """`Smooth` of the original code, without its Clopper-Pearson bound: class and votes of one image [C, H, W]."""

    def __init__(self, classifier: Classifier) -> None:
        self.normalize = NormalizeLayer(classifier.mean.flatten(), classifier.std.flatten())
        self.net: nn.Module = classifier.net
        self.num_classes = classifier.num_classes

    def base_classifier(self, images: Tensor) -> Tensor:
        """Logits of noisy images."""
        return self.net(self.normalize(images))

    def certify(self, image: Tensor, n0: int, n: int, batch_size: int) -> tuple[int, int]:
        """The class and its votes."""
        self.net.eval()
        counts0 = self._sample_noise(image, n0, batch_size)
        selected = counts0.argmax().item()
        counts = self._sample_noise(image, n, batch_size)
        return selected, counts[selected].item()

    def _sample_noise(self, image: Tensor, num: int, batch_size: int) -> Any:
        import numpy as np
        import torch

        with torch.no_grad():
            counts = np.zeros(self.num_classes, dtype=int)
            for _ in range(math.ceil(num / batch_size)):
                this_batch_size = min(batch_size, num)
                num -= this_batch_size
                batch = image.repeat((this_batch_size, 1, 1, 1))
                noise = torch.randn_like(batch) * SIGMA
                predictions = self.base_classifier(batch + noise).argmax(1)
                for predicted in predictions.cpu().numpy():
                    counts[predicted] += 1
            return counts


def main(config: Config) -> list[dict[str, Any]]:
    """Runs the measurement, prints it, writes rows and returns them.

    Raises DataError without the device, for a path that cannot be written, and where the networks differ.
    """
    rows = run_measurement(config, measure)
    report(f"{config.model}, n0 {config.n0}, n {config.n}", rows)
    return rows


def build(name: str, kind: str) -> tuple[Classifier, Tensor]:
    """A classifier on the device, and an image [C, S, S]."""
    import torch
    from torch import nn

    from models.classifiers import load_classifier

    torch.manual_seed(0)
    classifier = load_classifier(name, weights=False).to(kind)
    image = torch.rand(classifier.channels, classifier.image_size, classifier.image_size, device=kind)
    for part in classifier.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = 1.0
    with torch.no_grad():
        classifier.train()(image + SIGMA * torch.randn(100, *image.shape, device=kind))
    return classifier.eval(), image


def check(original: Original, network: Network, image: Tensor, least: float) -> None:
    """Raises DataError unless both networks say the same about the same noisy copies."""
    import torch

    from attacks.smoothing import default_batch_size

    noisy = image + SIGMA * torch.randn(100, *image.shape, device=image.device)
    parts = noisy.split(default_batch_size(image[None]))  # a size that is compiled anyway
    answers = torch.cat([network(part).argmax(1) for part in parts])
    same = float((answers == original.base_classifier(noisy).argmax(1)).float().mean())
    if same < least:
        raise DataError(f"the networks agree on {100 * same:.0f} % of the noisy copies: not timed")


def measure(config: Config) -> list[dict[str, Any]]:
    """Times of everybody by turns, ratios within rounds: rows without provenance."""
    from attacks.smoothing import GaussianNoise, certify, smoothing

    classifier, image = build(config.model, config.device)
    original = Original(classifier)
    competing: dict[str, tuple[Precision, bool]] = {OURS: ("fp32", False), COMPILED: ("fp32", True)}
    if config.bf16 == "yes" or (config.bf16 == "auto" and (config.device == "cuda" or multiplies_bf16())):
        competing |= {BF16: ("bf16", False), BF16_COMPILED: ("bf16", True)}
    competing = {name: kind for name, kind in competing.items() if config.compile or not kind[1]}
    ways: dict[str, Callable[[], object]] = {
        f"original, batch {size}": partial(original.certify, image, config.n0, config.n, size)
        for size in config.batch_sizes
    }

    kept: dict[str, Network] = {}  # compiled once, as in a run over many images
    for name, (precision, compiled) in competing.items():
        with smoothing(classifier, image.device, precision=precision, compile=compiled) as network:
            check(original, network, image, AGREE[precision])
            if compiled:
                kept[name] = network

    def ours(name: str) -> None:
        with smoothing(classifier, image.device, precision=competing[name][0]) as fresh:
            noise = GaussianNoise(0, [0], image.device)
            network = kept.get(name, fresh)
            certify(network, image[None], noise, sigma=SIGMA, n0=config.n0, n=config.n, alpha=ALPHA)

    ways |= {name: partial(ours, name) for name in competing}
    for way in ways.values():
        way()  # warms caches and allocators
    seconds = take_turns(ways, config.rounds, config.device)
    common = {
        "model": config.model,
        "n0": config.n0,
        "n_copies": config.n,
        "clock": "cpu" if config.device == "cpu" else "wall",
    }
    rows = [seconds_row("seconds for each certified image", seconds[name], name) for name in ways]
    best = min((name for name in ways if name not in competing), key=lambda name: spread(seconds[name]).median)
    for name in competing:
        must = TARGETS.get((config.device, config.model, name))
        rows.append(speed_up_row(ratio(seconds[best], seconds[name]), name, best, must))
    return [{**row, **common} for row in rows]
