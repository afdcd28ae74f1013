"""How much of a classifier's accuracy is left when its images may be changed within a ball? With checks on the answer.

    accelerate launch eval/attack.py --model cifar_resnet20/weights.safetensors --data cifar10 --norm l2 \\
        --eps 0.25,0.5,1.0 --count 1000                                    one GPU
    accelerate launch eval/attack.py --model local-dir:runs/adversarial/export --data cifar10 --norm linf \\
        --eps 2/255,4/255,8/255 --attacks pgd                              PGD-20 alone: minutes on a laptop
    accelerate launch --config_file train/launch/gpu_8_bf16.yaml eval/attack.py --data /data/imagenet/val --norm l2 \\
        --model torchvision:resnet50/IMAGENET1K_V2 --eps 3 --count 5000    eight GPUs

--attacks names one or several, with commas: pgd, apgd_ce, apgd_t and square, each by itself on all images that the
classifier gets right, and `ensemble`: PGD-20, then APGD-CE, APGD-T and Square, each on what the ones before have left
standing (attacks/ensemble.py). Nothing of the ensemble is to be chosen, and it bears its name only with the standard
numbers of steps and queries. It has no FAB, which AutoAttack's standard set has, and may lie above AutoAttack's number.

An image counts as robust if the classifier gets it right as it is, and still does, in float32, on what the attack
returns; all images count, each once. Batches are cut from the set as a whole, so that results do not depend on the
number of processes; chance depends on --seed, --images, the images and the kind of device. For smoothed classifiers:
eval/certify.py.

Cost, passes an image that stands, forward and backward: 20 (PGD-20), 101 (APGD-CE), 909 (APGD-T), and 5,001 forward
alone (Square), for each radius. A run that was stopped, or is started again with more radii, computes only what is not
in its folder yet: a batch of one attack at one radius at a time.

Writes into --out: config.yaml, env.json, results.jsonl (clean accuracy; robust accuracy for each radius and attack,
with Wilson's 95 % intervals), outcomes.jsonl (each image's), checks.json, and robust_accuracy.png and .svg, the curve.
"""

from __future__ import annotations

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import contextlib
import dataclasses
import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from data.rows import write_synced
from eval.common import check_classes, print_table
from train.common import ConfigError, RunFolder, check_numbers, option, run_script
from train.launching import StopSignals, build_demo, start_run

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eval.robust_accuracy import Check, Point

ATTACKS = ("pgd", "apgd_ce", "apgd_t", "square", "ensemble")
log = logging.getLogger("shiftlens")


@dataclass(frozen=True)
class Config:
    """Settings."""

    model: str = option("", "classifier: cifar_resnet20/FILE, torchvision:resnet50/FILE, local-dir:FOLDER, ...")
    flip: bool = option(False, "the classifier takes frequency-flipped images, which its file may also say")
    data: str = option("", "mnist, fashion_mnist or cifar10 (`cifar10:PATH` = files there), a folder, shards; demo")
    split: Literal["test", "train"] = option("test", "split of the data")
    count: int = option(0, "images, drawn by --seed; 0 = all")
    norm: Literal["l2", "linf"] = option("l2", "norm of the balls")
    eps: str = option("", "radii for pixels in [0, 1], with commas: 0.25,0.5 or 4/255,8/255")
    attacks: str = option("ensemble", "pgd, apgd_ce, apgd_t, square, ensemble; several with commas")
    steps: int = option(100, "of each run of APGD; 100 is the standard")
    queries: int = option(5000, "of Square; 5000 is the standard")
    checks: bool = option(True, "also attack 64 images with other steps and radii, as a check")
    precision: Literal["fp32", "bf16"] = option("fp32", "of the attacks; whether an image stands is asked in float32")
    images: int = option(0, "images at a time through the classifier, per process; 0 = 250 on a GPU, 32 on a CPU")
    seed: int = option(0, "of all chance")
    out: str = option("runs/attack", "run folder")

    def __post_init__(self) -> None:
        check_numbers(self, at_least_1=("steps", "queries"), not_negative=("count", "seed", "images"))
        if not self.model:
            raise ConfigError(
                "--model is missing: a classifier such as cifar_resnet20/FILE, torchvision:resnet50/IMAGENET1K_V2 or "
                "local-dir:FOLDER"
            )
        if not self.data:
            raise ConfigError("--data is missing: mnist, fashion_mnist, cifar10, a folder of images, or shards")
        if unknown := sorted(set(self.names) - set(ATTACKS)):
            raise ConfigError(f"--attacks names {', '.join(unknown)}; there are {', '.join(ATTACKS)}")
        _ = self.radii

    @property
    def names(self) -> list[str]:
        """The attacks, each once."""
        return list(dict.fromkeys(name.strip() for name in self.attacks.split(",")))

    @property
    def radii(self) -> list[float]:
        """The radii in ascending order, each once. Raises ConfigError for what is none."""
        found = set()
        for text in self.eps.split(","):
            numerator, slash, denominator = text.partition("/")
            try:
                radius = float(numerator) / (float(denominator) if slash else 1)
            except (ValueError, ZeroDivisionError):
                radius = math.nan
            if not (math.isfinite(radius) and radius >= 0):
                example = "0.25,0.5,1" if self.norm == "l2" else "2/255,4/255,8/255"
                raise ConfigError(f"--eps {self.eps!r}: expected radii for pixels in [0, 1], such as {example}")
            found.add(radius)
        if self.norm == "linf" and max(found) > 1:
            raise ConfigError(
                f"--eps {self.eps}: pixels lie in [0, 1], so that no L∞ radius beyond 1 has a meaning; 8/255?"
            )
        return sorted(found)


def show(points: Sequence[Point], checks: Sequence[Check], norm: str) -> None:
    """Prints the table of accuracies, a column for each radius, and what the checks found."""
    from eval.robust_accuracy import CLEAN

    radii = sorted({point.eps for point in points if point.name != CLEAN})
    lines: dict[str, dict[float, str]] = {}
    for point in points:
        low, high = point.interval
        text = f"{100 * point.accuracy:.1f} ({100 * low:.1f}..{100 * high:.1f})"
        lines.setdefault(point.title, {})[point.eps] = text
    clean = next(point for point in points if point.name == CLEAN)
    print()
    print(f"clean accuracy {lines.pop(clean.title)[0.0]} %, n = {clean.n}; robust accuracy by {norm} radius, %:")
    print_table(
        ["attack", *(f"{radius:.4g}" for radius in radii)],
        [[title, *(line.get(radius, "") for radius in radii)] for title, line in lines.items()],
    )
    print()
    for check in checks:
        print(f"{'ok     ' if check.passed else 'WARNING'}  {check.name}: {check.found}")


def main(config: Config) -> dict[str, Any]:
    """Attacks the classifier and returns the rows (on rank 0) and the checks.

    Raises:
        ConfigError, DataError, ModelError: anything a user can cause, in one line.
        StopRequested: after a stop signal.
    """
    with StopSignals() as signals, contextlib.ExitStack() as resources:
        return evaluate(config, signals, resources)


def evaluate(config: Config, signals: StopSignals, resources: contextlib.ExitStack) -> dict[str, Any]:
    # --- Launch -------------------------------------------------------------------------------------------------------
    out = Path(config.out)
    accelerator, agreement = start_run(out, resources)
    rank, device = agreement.rank, accelerator.device

    import numpy as np

    from attacks.ensemble import Budget
    from data.demo import located
    from data.small import load_images
    from eval import robust_accuracy
    from eval.robust_accuracy import CLEAN, Passes, Point, Rows, Subject
    from models.classifiers import load_classifier
    from models.weights import state_sha256

    # --- Classifier and images ----------------------------------------------------------------------------------------
    build_demo(accelerator, agreement, config.data)
    with agreement.reading(signals):
        classifier = load_classifier(config.model, flip=config.flip or None)
        sha256 = state_sha256(classifier.state_dict())
        size, channels = classifier.image_size, classifier.channels
        options: Any = {"count": config.count, "seed": config.seed, "size": size, "channels": channels}
        data = load_images(located(config.data), config.split, **options)
        check_classes(classifier, data)
        diagonal = math.sqrt(channels * size * size)
        if config.norm == "l2" and config.radii[-1] > diagonal:
            raise ConfigError(
                f"--eps {config.eps}: an L2 ball of radius above {diagonal:.4g} holds every image of "
                f"{channels}x{size}x{size} pixels in [0, 1]; {config.radii[-1]:g}/255?"
            )
        budget = Budget(steps=config.steps, queries=config.queries)
        at_once = config.images or (250 if device.type == "cuda" else 32)
        subject = Subject(
            classifier.to(device), sha256, data, config.norm, budget, config.precision, at_once, config.seed
        )
    rows: Rows | None = None
    with agreement.together():
        if rank == 0:
            folder = RunFolder(out, fresh=False)
            resources.callback(folder.close)
            folder.write_config(config)
            folder.write_environment(accelerator)
            rows = Rows(folder, config, subject)
    agreement.same((sha256, data.fingerprint), "classifier or images")
    log.info("model    %s: %d px, %d classes", classifier.name, size, classifier.num_classes)
    log.info("images   %s: %d, %d at a time", data.name, len(data), at_once)
    log.info("device   %s, attacks in %s", device, config.precision)

    # --- Attacks ------------------------------------------------------------------------------------------------------
    passes = Passes(subject, agreement, signals, out / "outcomes.jsonl")
    looked = passes.look(np.arange(len(data)))
    correct = np.flatnonzero(looked["right"])
    points = [Point(CLEAN, "clean", 0.0, len(correct), len(data))]
    largest = 0.0
    for radius in config.radii:
        found, size_in_radii = robust_accuracy.measure(passes, radius, config.names, correct)
        points += found
        largest = max(largest, size_in_radii)
    checks = [robust_accuracy.check_accuracy(len(correct), subject), *robust_accuracy.check_gradients(looked)]
    checks += robust_accuracy.check_curve(points, largest)
    if config.checks:
        checks += robust_accuracy.check_attack(passes, config.radii[len(config.radii) // 2], correct)

    # --- Results ------------------------------------------------------------------------------------------------------
    with agreement.together():
        if rows is not None:
            for point in points:
                rows.add(point)
            write_synced(
                out / "checks.json", json.dumps([dataclasses.asdict(check) for check in checks], indent=1) + "\n"
            )
            robust_accuracy.draw_curves(points, subject, out)
            show(points, checks, config.norm)
    log.info("written  %s: results.jsonl, checks.json, robust_accuracy.png", out)
    accelerator.end_training()
    return {"rows": rows.rows if rows is not None else [], "checks": checks, "computed": passes.computed}


if __name__ == "__main__":
    run_script(main, Config, __doc__.splitlines()[0], "attack_cifar10.yaml")
