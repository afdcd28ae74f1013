"""How far around each image is a classifier's answer under Gaussian noise certain? Randomised smoothing, certified.

    accelerate launch eval/certify.py                                       built-in demo, after train/adversarial.py
    accelerate launch eval/certify.py --model local-dir:runs/cohen_025/export --data cifar10 --sigma 0.25
                                                                            as published: 500 images, 100,000 copies
    accelerate launch eval/certify.py --model local-dir:runs/cohen_025/export --data cifar10 --sigma 0.25 \\
        --n 1000 --count 100 --skip_wrong true                              a first look
    accelerate launch --config_file train/launch/gpu_8_bf16.yaml eval/certify.py --precision bf16 --skip 1 \\
        --model cifar_resnet110/checkpoint.pth.tar --data cifar10 --sigma 0.5    all 10,000 images, eight GPUs

Cohen et al. 2019 (attacks/smoothing.py has the method). --sigma, for pixels in [0, 1], should be that of the noise the
classifier was trained with. --mode certify gives a class and a radius for each image; --mode predict only the class,
from --n copies. The defaults are the published setting: n0 = 100, n = 100,000, alpha = 0.001, every 20th test image
(500 of CIFAR-10's). The original's `--skip 20 --max M` is `--skip 20 --count M/20` here; all images are --skip 1.

Images are shared out over all processes; each has its own random numbers, so that its certificate depends neither on
the other images nor on batches, processes or restarts. A run that was stopped, or is started again with a smaller
--skip or a larger --count, computes only images that are not in its folder yet; others are not even read. The
certificate is one for the network as it was run: with --precision bf16, that of the bf16 network.

Cost: n0 + n forward passes for each image. With --skip_wrong true, images whose selected class is wrong are not counted
further: certified accuracy and average radius stay the same, and a third of the time or more is saved.

Writes into --out: config.yaml, env.json, certificates/*.jsonl (a row for each image; a file for each classifier, sigma
and setting), results.jsonl (certified accuracy for each radius with Wilson's 95 % intervals, average certified radius,
accuracy of the smoothed classifier, abstention rate, seconds per image), certified_accuracy.png and .svg.
"""

from __future__ import annotations

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from attacks.votes import (
    ABSTAIN,
    BLOCK,
    average_certified_radius,
    certified_accuracy,
    certified_radius,
    check_settings,
    lower_confidence_bound,
)
from data import DataError
from data.rows import append_row
from eval.certificates import CertificateFile, Row, draw_curves, image_sha256
from eval.common import check_classes, check_demo, near_chance, print_table
from models import ModelError
from train.common import ConfigError, Progress, RunFolder, StopRequested, check_numbers, option, run_script
from train.launching import StopSignals, build_demo, start_run

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

    from attacks.pgd import Network
    from data.small import ImageSet
    from models.classifiers import Classifier

log = logging.getLogger("shiftlens")


@dataclass(frozen=True)
class Config:
    """Settings; the defaults are the published ones."""

    model: str = option("", "classifier: cifar_resnet110/FILE, torchvision:resnet50/FILE, local-dir:FOLDER, ...")
    flip: bool = option(False, "the classifier takes frequency-flipped images, which its file may also say")
    name: str = option("", "what figures call it; empty = --model")
    data: str = option("", "mnist, fashion_mnist, cifar10 (`cifar10:PATH` = files there), a folder, shards; demo")
    split: Literal["test", "train"] = option("test", "split of the data")
    skip: int = option(20, "every how many-th image, from the first; 1 = all")
    count: int = option(0, "no more images than that; 0 = no limit")
    mode: Literal["certify", "predict"] = option("certify", "class and radius, or class alone")
    sigma: float = option(0.0, "standard deviation of the noise, for pixels in [0, 1]")
    n0: int = option(100, "noisy copies of an image that select its class (certify)")
    n: int = option(100_000, "noisy copies of an image that are counted")
    alpha: float = option(0.001, "chance of a wrong certificate, for each image")
    skip_wrong: bool = option(False, "count no copies of images whose selected class is wrong (certify)")
    radii: list[float] = option([0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.25], "radii of the table")
    precision: Literal["fp32", "bf16"] = option("fp32", "of the network")
    compile: bool = option(False, "torch.compile the network: seconds to minutes at first, then a little faster")
    batch_size: int = option(0, "noisy copies at a time through the network, per process; 0 = by device and image size")
    seed: int = option(0, "of the noise")
    out: str = option("runs/certify", "run folder")

    def __post_init__(self) -> None:
        check_numbers(self, at_least_1=("skip",), not_negative=("count", "seed", "batch_size"))
        if not self.model:
            raise ConfigError("--model is missing: a classifier such as cifar_resnet110/FILE or local-dir:FOLDER")
        if not self.data:
            raise ConfigError("--data is missing: mnist, fashion_mnist, cifar10, a folder of images, shards, or demo")
        if not all(math.isfinite(radius) and radius >= 0 for radius in self.radii):
            raise ConfigError(f"--radii {self.radii}: expected numbers of at least 0")
        if self.skip_wrong and self.mode == "predict":
            raise ConfigError("--skip_wrong is for --mode certify: predict has no second count to skip")
        if 0 < self.batch_size < BLOCK:
            raise ConfigError(f"--batch_size {self.batch_size} is below the {BLOCK} copies that are drawn at once")
        try:
            check_settings(self.mode, self.sigma, self.n0, self.n, self.alpha)
        except ValueError as error:
            raise ConfigError(f"--{error}") from None


# ----------------------------------------------------------------------------------------------------------------------
# Certificates of single images
# ----------------------------------------------------------------------------------------------------------------------


def read_images(config: Config, classifier: Classifier) -> ImageSet:
    """The chosen images. Raises DataError for what is wrong with them, or labels that are not the classifier's."""
    from data.demo import located
    from data.small import load_images

    images = load_images(
        *(located(config.data), config.split),
        every=config.skip,
        most=config.count,
        size=classifier.image_size,
        channels=classifier.channels,
    )
    if not len(images):
        raise DataError(f"{images.name} has no images")
    check_classes(classifier, images)
    return images


def numbers_of(images: ImageSet) -> list[int]:
    """The number of each image in the data, by its place."""
    return list(range(len(images))) if images.numbers is None else images.numbers.tolist()


def identity(config: Config, classifier: Classifier, sha256: str, images: ImageSet, device_type: str) -> Row:
    """All that the certificate of an image depends on but the image: neither it nor those beside it are among that."""
    settings: Row = {
        name: getattr(config, name) for name in ("mode", "sigma", "n", "alpha", "precision", "compile", "seed")
    }
    if config.mode == "certify":
        settings |= {"n0": config.n0, "skip_wrong": config.skip_wrong}
    return settings | {
        "architecture": classifier.architecture,
        "weights_sha256": sha256,
        "mean": classifier.mean.flatten().tolist(),
        "std": classifier.std.flatten().tolist(),
        "flip": classifier.flip,
        "low_pass": classifier.low_pass,
        "low_pass_published": classifier.low_pass_published,
        "images": "/".join(Path(images.name).parts[-2:]),  # wherever they lie
        "classes": list(images.classes),
        "noise": f"{device_type}, version 1",
    }


class Interrupted(Exception):
    """A stop signal has come in the middle of an image."""


def answer(
    network: Network, images: ImageSet, places: Sequence[int], config: Config, accelerator: Accelerator
) -> list[Row]:
    """The rows of the images at these places: what is certain about each. Raises ModelError."""
    import torch

    from attacks.smoothing import GaussianNoise, certify, predict
    from data.transforms import unit_interval

    device, start = accelerator.device, time.perf_counter()
    of_all, rows = numbers_of(images), torch.as_tensor(places)
    numbers = [of_all[place] for place in places]
    batch, labels = unit_interval(images.images[rows].to(device)), images.labels[rows].numpy()
    noise = GaussianNoise(config.seed, numbers, device)
    options: Any = {"sigma": config.sigma, "n": config.n, "alpha": config.alpha, "batch_size": config.batch_size}
    try:
        if config.mode == "certify":
            kept = labels if config.skip_wrong else None
            found = certify(network, batch, noise, n0=config.n0, labels=kept, **options)
            classes = found.classes
            details = [
                {"radius": radius, "selected": selected, "votes0": counts0[selected], "votes": counts[selected]}
                for radius, selected, counts0, counts in zip(
                    *(part.tolist() for part in (found.radii, found.selected, found.counts0, found.counts)), strict=True
                )
            ]
            if config.skip_wrong:
                for detail, label in zip(details, labels.tolist(), strict=True):
                    detail["votes"] = detail["votes"] if detail["selected"] == label else None
        else:
            classes, p_values, counts = predict(network, batch, noise, **options)
            details = [
                {"p_value": p_value, "votes": sorted(votes)[:-3:-1]}
                for p_value, votes in zip(p_values.tolist(), counts.tolist(), strict=True)
            ]
    except ValueError as error:
        raise ModelError(f"{config.model}: {error}") from None
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"--compile: {config.model} cannot be compiled here ({reason}); leave it out") from None
    seconds = round((time.perf_counter() - start) / len(numbers), 4)
    return [
        {"image": number, "label": label, "class": None if said == ABSTAIN else said, "correct": said == label}
        | detail
        | {"seconds": seconds, "image_sha256": image_sha256(images, place)}
        for place, number, label, said, detail in zip(
            places, numbers, labels.tolist(), classes.tolist(), details, strict=True
        )
    ]


# ----------------------------------------------------------------------------------------------------------------------
# What they say together
# ----------------------------------------------------------------------------------------------------------------------


def results(rows: Sequence[Row], config: Config) -> list[Row]:
    """The numbers of a run, from the rows of its images."""
    import numpy as np

    from eval.robustness import wilson

    n = len(rows)
    correct = np.array([row["correct"] for row in rows])

    def share(metric: str, count: int, **fields: Any) -> Row:
        interval = {"interval": wilson(count, n), "interval_kind": "95 % Wilson"}
        return {"metric": metric, "value": count / n, "correct": count, "n": n, **interval, **fields}

    found = [share("smoothed_accuracy", int(correct.sum()))]
    if not config.skip_wrong:
        found.append(share("abstention_rate", sum(row["class"] is None for row in rows)))
    if config.mode == "certify":
        radii = np.array([row["radius"] for row in rows])
        found += [
            share("certified_accuracy", round(certified_accuracy(correct, radii, radius) * n), radius=radius)
            for radius in config.radii
        ]
        mean = average_certified_radius(correct, radii)
        row: Row = {"metric": "average_certified_radius", "value": mean, "n": n}
        if n > 1:
            half = 1.959964 * float(np.where(correct, radii, 0.0).std(ddof=1)) / math.sqrt(n)
            row |= {"interval": (max(0.0, mean - half), mean + half), "interval_kind": "95 % normal"}
        found.append(row)
    seconds = sum(row["seconds"] for row in rows) / n
    return [*found, {"metric": "seconds_per_image", "value": seconds, "n": n}]


def write_results(found: Sequence[Row], facts: Row, folder: RunFolder) -> list[Row]:
    """Appends rows to results.jsonl where they are not there yet, and returns all with their facts."""
    plain = [{**row, **facts} for row in found]
    same = ("metric", "radius", "value", "n", "certificates", "skip", "count")
    known = {tuple(row.get(key) for key in same) for row in folder.results()}
    for row in plain:
        if tuple(row.get(key) for key in same) not in known:
            append_row(folder.path / "results.jsonl", **row)
    return plain


def show(found: Sequence[Row]) -> None:
    """Prints the numbers: percent, with 95 % intervals."""
    lines = []
    for row in found:
        low, high = row.get("interval", (None, None))
        name = row["metric"].replace("_", " ") + (f" at {row['radius']:g}" if "radius" in row else "")
        if "correct" in row:
            lines.append([name, f"{100 * row['value']:.1f} %", f"({100 * low:.1f}..{100 * high:.1f})"])
        else:
            interval = "" if low is None else f"({low:.3f}..{high:.3f})"
            lines.append([name, f"{row['value']:.3f}", interval])
    print()
    print_table([f"n = {found[0]['n']}", "", ""], lines)


# ----------------------------------------------------------------------------------------------------------------------
# The run
# ----------------------------------------------------------------------------------------------------------------------


def main(config: Config) -> dict[str, Any]:
    """Certifies the images; returns results and the rows of images (on rank 0), and how many were computed now.

    Raises:
        ConfigError, DataError, ModelError: anything a user can cause, in one line.
        StopRequested: after a stop signal; certificates that were ready are kept.
    """
    with StopSignals() as signals, contextlib.ExitStack() as resources:
        return evaluate(config, signals, resources)


def evaluate(config: Config, signals: StopSignals, resources: contextlib.ExitStack) -> dict[str, Any]:
    # --- Launch -------------------------------------------------------------------------------------------------------
    out = Path(config.out)
    accelerator, agreement = start_run(out, resources)
    rank, world, device = agreement.rank, agreement.world, accelerator.device

    from accelerate.utils import gather_object

    from attacks.smoothing import default_batch_size, smoothing
    from models.classifiers import load_classifier
    from models.weights import state_sha256

    # --- Classifier and images ----------------------------------------------------------------------------------------
    build_demo(accelerator, agreement, config.data)
    with agreement.reading(signals):
        check_demo(config.model)
        classifier = load_classifier(config.model, flip=config.flip or None)
        sha256 = state_sha256(classifier.state_dict())
        images = read_images(config, classifier)
        chosen = numbers_of(images)
        settings = identity(config, classifier, sha256, images, device.type)
    folder: RunFolder | None = None
    file: CertificateFile | None = None
    with agreement.together():
        if rank == 0:
            folder = RunFolder(out, fresh=False)
            resources.callback(folder.close)
            folder.write_config(config)
            folder.write_environment(accelerator)
            file = CertificateFile(out, settings, config.name or config.model)
            file.check({n: image_sha256(images, place) for place, n in enumerate(chosen) if n in file.rows})
    agreement.same((settings, images.fingerprint), "classifier, images or kinds of device")
    done = set(agreement.share(None if file is None else [*file.rows]))
    todo = [place for place, number in enumerate(chosen) if number not in done]
    # Several images at once where a batch has room for the copies that select their classes, up to ten batches in all,
    # as what is in flight is lost when a run is stopped. The same for any number of processes.
    batch_size = config.batch_size or default_batch_size(images.images[:1].to(device))
    first_copies = config.n0 if config.mode == "certify" else config.n
    at_once = max(1, min(batch_size // first_copies, 10 * batch_size // (config.n0 + config.n)))
    groups = [todo[first : first + at_once] for first in range(0, len(todo), at_once)]
    log.info("model    %s: %d px, %d classes", classifier.name, classifier.image_size, classifier.num_classes)
    log.info("images   %s: %d, %d to do", images.name, len(chosen), len(todo))
    copies = f"n0 {config.n0}, n {config.n}" if config.mode == "certify" else f"n {config.n}"
    log.info("noise    sigma %g, %s, alpha %g; %d copies at a time", config.sigma, copies, config.alpha, batch_size)
    if config.mode == "certify":
        largest = certified_radius(lower_confidence_bound(config.n, config.n, config.alpha), config.sigma)
        log.info("radii    up to %.3f: what a unanimous vote of n copies gives", largest)
    log.info("device   %s, network in %s, %d processes", device, config.precision, world)

    # --- Images: a group for each process, then what is ready is written ----------------------------------------------
    steps = -(-len(groups) // world)
    progress = Progress(0, steps, at_once * world, shown=rank == 0)
    resources.enter_context(contextlib.closing(progress))
    ready, last_line = len(chosen) - len(todo), time.monotonic()
    with smoothing(classifier.to(device), device, precision=config.precision, compile=config.compile) as whole:

        def network(noisy: Tensor) -> Tensor:
            if signals.received:
                raise Interrupted
            return whole(noisy)

        for step in range(steps):
            failure: ModelError | None = None
            rows: list[Row] = []
            try:
                if step * world + rank < len(groups):
                    rows = answer(network, images, groups[step * world + rank], config, accelerator)
            except ModelError as error:
                failure = error
            except Interrupted:
                pass  # the images of this group are lost, no others
            # The ranks meet in a vote: it waits for the slowest, for hours if need be, which other messages do not.
            stop = agreement.settle(None, signals.received)
            gathered: list[Row] = gather_object(rows)
            ready += len(gathered)
            with agreement.together():  # what others have finished is kept when this rank has failed
                if file is not None:
                    file.add(gathered)
                if failure is not None:
                    raise failure
            progress.step_done(step)
            if rank == 0 and time.monotonic() - last_line > 10 and not progress.bar:
                last_line, left = time.monotonic(), progress.rates()["seconds_left"]
                log.info("step %d/%d  %d images%s", step + 1, steps, ready, f"  {left:.0f} s left" if left else "")
            if stop:
                text = f"stopped by signal {stop}: {ready} of {len(chosen)} images are certified"
                raise StopRequested(stop, f"{text}; the same command goes on with the others")

    # --- Results ------------------------------------------------------------------------------------------------------
    found: list[Row] = []
    of_images: list[Row] = []
    with agreement.together():
        if folder is not None and file is not None:
            of_images = [file.rows[number] for number in chosen]
            facts = {
                "model": config.name or config.model,
                "data": config.data,
                "certificates": file.path.name,
                "skip": config.skip,
                "count": config.count,
                "data_fingerprint": images.fingerprint,
                **{key: value for key, value in settings.items() if key not in ("n", "n0", "images", "classes")},
                "copies": config.n,
                "config": dataclasses.asdict(config),
                "device": str(device),
            }
            found = write_results(results(of_images, config), facts, folder)
            if config.mode == "certify":
                draw_curves(out, chosen, file.path)
            show(found)
            warn(found, classifier, config)
    log.info("written  %s: results.jsonl, certificates/", out)
    accelerator.end_training()
    return {"rows": found, "images": of_images, "computed": len(todo)}


def warn(found: Sequence[Mapping[str, Any]], classifier: Classifier, config: Config) -> None:
    """A line where the smoothed classifier shows no more than chance."""
    accuracy, n = found[0]["value"], found[0]["n"]
    if near_chance(found[0]["correct"], n, classifier.num_classes):
        log.warning(
            "accuracy under noise of sigma %g is %.1f %% of %d images, not shown to be above chance: was the "
            "classifier trained with such noise, on pixels in [0, 1], and are its classes in the order of the data?",
            config.sigma,
            100 * accuracy,
            n,
        )


if __name__ == "__main__":
    run_script(main, Config, __doc__.splitlines()[0], "certify_demo.yaml")
