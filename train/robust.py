"""Parts of train/adversarial.py: data, batches, the random numbers of a step, the attack, the result.

Apart from the script, which they would make twice as long as a script may be; `config` is its Config.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn import functional as F

from attacks.ensemble import right, search
from attacks.pgd import Norm, draw_from_ball, pgd
from data import DataError
from data.augment import SampleDraws, mirror, pixel_statistics, random_crop
from data.demo import demo_shards, located
from data.order import count_streams
from data.small import ImageSet, MemoryStream, draw_images, load_images, open_batches
from data.tar import ShardSet, find_shards
from data.transforms import unit_interval
from eval.robustness import wilson
from models import ModelError
from models.classifiers import Classifier, load_classifier
from models.weights import state_sha256
from train.common import ConfigError, step_seed
from train.launching import Agreement

IN_MEMORY = 64  # pixels: data for nets that take larger images are streamed from shards
log = logging.getLogger("shiftlens")


class TrainingModule(nn.Module):
    """A classifier that gives its loss, for DistributedDataParallel; its parameters are those of `classifier`.

    The classifier inside stays callable by itself: an attack on it passes neither DDP nor accelerate's autocast.
    """

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor, labels: Tensor, weights: Tensor | None) -> dict[str, Tensor]:
        """Images [N, C, S, S], labels int64 [N] and their weights [N] (None: 1) → scalars `loss`, `accuracy`.

        The loss, the mean of weight times cross-entropy in nats, carries the gradient; the accuracy does not.
        """
        logits = self.classifier(images)
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits.float()
            losses = F.cross_entropy(logits, labels, reduction="none")
            loss = losses.mean() if weights is None else (weights * losses).mean()
        return {"loss": loss, "accuracy": (logits.detach().argmax(dim=1) == labels).float().mean()}


def make_optimizer(parameters: list[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.SGD:
    """SGD with momentum 0.9, which all published recipes have, in the form that a GuardedStep can skip."""
    optimizer = torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=weight_decay, fused=True)
    # Torch would take the first step without a momentum, and leave it unset where that step is skipped. From zeros the
    # first step is the same.
    for parameter in parameters:
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


# ----------------------------------------------------------------------------------------------------------------------
# Data and classifier
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """What is trained and tested on.

    Attributes:
        train: in memory, the extra images after the others; or shards, to be streamed.
        classes: names in the order of the labels.
        weights: of the training images in memory [N]; None where all are 1.
        test: None where nothing is to be tested.
    """

    train: ImageSet | ShardSet
    classes: tuple[str, ...]
    weights: Tensor | None
    test: ImageSet | None


def find_data(config: Any, size: int, channels: int, device: torch.device) -> Data:
    """The images that a net for [channels, size, size] is to be trained and tested on.

    Raises ConfigError, DataError, ModelError for what is wrong with them.
    """
    source, held_out = located(config.data), located(config.test_data or config.data)
    if config.norm == "l2" and config.radius > (largest := math.sqrt(channels * size * size)):
        raise ConfigError(
            f"--eps {config.eps}: no two images of {channels} x {size} x {size} values in [0, 1] are more than "
            f"{largest:.4g} apart in L2; if it counts pixels from 0 to 255, write {config.radius:g}/255"
        )
    if size > IN_MEMORY:
        if config.pad or config.low_pass or config.extra:
            raise ConfigError(
                f"--pad, --low_pass and --extra are for images in memory, up to {IN_MEMORY} px; {size} px here"
            )
        if not config.test_data and config.eval_count and config.data != "demo":
            raise ConfigError("--test_data is missing: shards to stream have no test split; or --eval_count 0")
        shards = find_shards(demo_shards("train") if config.data == "demo" else source)
        if shards.classes is None:
            raise DataError(f"{source}: the shards do not name their classes; pack them with data/pack.py")
        test = (
            load_images(held_out, "test", count=config.eval_count, seed=config.seed, size=size, channels=channels)
            if config.eval_count
            else None
        )
        found = Data(shards, shards.classes, None, test)
    else:
        train = load_images(source, "train", size=size, channels=channels)
        found = Data(train, train.classes, None, _held_out(config, held_out, train))
        if config.extra:
            found = _with_extra(config, found, size, channels, device)
    if found.test is not None and found.test.classes != found.classes:
        raise DataError(f"{config.test_data or config.data}: its classes are not those of the training images")
    return found


def _held_out(config: Any, name: str, train: ImageSet) -> ImageSet | None:
    """The test images to `train`; None where there are none and none are asked for."""
    reason = f"{config.data} is not divided into train and test"
    try:
        test = load_images(name, "test", size=train.images.shape[-1], channels=train.images.shape[1])
    except DataError as error:
        if config.test_data or config.eval_count:
            raise
        reason = str(error)
    else:
        if config.test_data or test.fingerprint != train.fingerprint:
            return test
    if config.eval_count:
        raise ConfigError(f"--test_data is missing: {reason}; or --eval_count 0")
    log.warning("test     nothing is measured at the end: %s", reason)
    return None


def _with_extra(config: Any, found: Data, size: int, channels: int, device: torch.device) -> Data:
    """The training images and, after them, --extra, with labels of its own or those that --extra_labels gives."""
    assert isinstance(found.train, ImageSet)
    train, extra = found.train, load_images(located(config.extra), "train", size=size, channels=channels)
    labels, labelled_by = extra.labels, ""
    if config.extra_labels:
        labeller = load_classifier(config.extra_labels, num_classes=len(found.classes))
        if labeller.classes not in (None, found.classes):
            raise ConfigError(
                f"--extra_labels {config.extra_labels}: its classes are not those of --data in their order"
            )
        labelled_by = state_sha256(labeller.state_dict())
        labels = predicted(labeller.to(device), extra.images, device)
    elif extra.classes != found.classes:
        raise DataError(f"--extra {config.extra}: other classes than --data; --extra_labels labels images anew")
    weights = torch.ones(len(train) + len(extra))
    weights[len(train) :] = config.extra_weight
    images, labels = torch.cat([train.images, extra.images]), torch.cat([train.labels, labels])
    digest = hashlib.sha256(f"{train.fingerprint} {extra.fingerprint} {labelled_by}".encode()).hexdigest()
    both = ImageSet(images, labels, train.classes, f"{train.name} and {extra.name}", digest)
    return dataclasses.replace(found, train=both, weights=weights)


def predicted(classifier: Classifier, images: Tensor, device: torch.device) -> Tensor:
    """The classifier's answers int64 [N] to images uint8 [N, C, S, S], on the CPU."""
    with torch.inference_mode():
        return torch.cat([classifier(unit_interval(part.to(device))).argmax(dim=1).cpu() for part in images.split(500)])


def load_model(config: Any, data: Data) -> tuple[Classifier, str | None]:
    """The classifier to train on these data, and the hash of the weights that it starts from.

    Without weights in its name: random ones of torch's own initialisation and None. From weights for other classes, by
    their number or by their names and order, all but the last layer is taken; weights that name no classes are taken to
    have these. The low-pass filter is part of the classifier; filtered images are normalised by the statistics of the
    filtered set, as published, unless weights come with others.

    Raises ModelError for what is wrong with the name or the weights.
    """
    name, classes = config.model, data.classes
    options: dict[str, Any] = {"flip": config.flip or None}
    if config.low_pass:
        options |= {"low_pass": config.low_pass, "low_pass_published": config.low_pass_published}
    if not (name.startswith("local-dir:") or "/" in name):
        classifier = load_classifier(name, num_classes=len(classes), weights=False, **options)
        classifier.classes = classes
        if config.low_pass and isinstance(data.train, ImageSet):
            statistics = pixel_statistics(data.train.images, classifier.filtered)
            for buffer, values in zip((classifier.mean, classifier.std), statistics, strict=True):
                buffer.copy_(torch.tensor(values).reshape(-1, 1, 1))
        return classifier, None
    classifier = load_classifier(name, **options)
    start = state_sha256(classifier.state_dict())
    if classifier.num_classes != len(classes) or classifier.classes not in (None, classes):
        known = classifier.net.state_dict()
        fresh, wider = (
            load_classifier(name, num_classes=len(classes) + more, weights=False, **options) for more in (0, 1)
        )
        classifier, state = fresh, fresh.net.state_dict()
        # The last layer is what depends on the number of classes.
        anew = sorted(key for key, value in wider.net.state_dict().items() if value.shape != state[key].shape)
        if len({key.rpartition(".")[0] for key in anew}) != 1:
            raise ModelError(f"{name}: more than its last layer depends on the classes: {', '.join(anew[:3])}")
        classifier.net.load_state_dict(known | {key: state[key] for key in anew})
        log.warning("start    %s has other classes: all but its last layer is taken, which begins anew", name)
    classifier.classes = classes
    return classifier, start


# ----------------------------------------------------------------------------------------------------------------------
# Batches
# ----------------------------------------------------------------------------------------------------------------------


def open_memory(
    images: ImageSet,
    config: Any,
    agreement: Agreement,
    first: int,
    state: Mapping[str, Any] | None,
    device: torch.device,
    resources: contextlib.ExitStack,
) -> tuple[MemoryStream, dict[str, Any]]:
    """For images in memory what `loop.open_training_stream` is for shards.

    "streams" are here the parts of a batch that have noise of their own, see `Noise`.
    """
    saved = state["data"] if state else {}
    here = {
        "fingerprint": images.fingerprint,
        "streams": saved.get("streams") or count_streams(config.batch_size, agreement.world, max(16, agreement.world)),
        "steps_per_epoch": len(images) // config.batch_size,
    }
    if saved and saved["fingerprint"] != here["fingerprint"]:
        raise ConfigError(f"--data {config.data}: not the images of the checkpoint; use another --out")
    if here["streams"] % agreement.world:
        raise ConfigError(
            f"{agreement.world} processes cannot continue a run whose batches have {here['streams']} parts; "
            "use a number that divides it"
        )
    epoch, start_step = divmod(first, max(here["steps_per_epoch"], 1))
    stream = open_batches(
        images,
        global_batch=config.batch_size,
        rank=agreement.rank,
        world=agreement.world,
        seed=config.seed,
        epoch=epoch,
        start_step=start_step,
        device=device,
    )
    return resources.enter_context(stream), here


class Noise:
    """Gaussian noise and starts of attacks, step by step.

    The rows of a batch are cut into `parts`, a multiple of the number of processes; each part of each step has a
    generator of its own, of (seed, step, part). The number of parts is kept in checkpoints: a run has the same noise
    however often it is restarted, on any number of processes that divides the parts. Two runs have the same noise where
    their parts are as many: 16 (64 for streamed shards), but for batches or processes that 16 does not suit, and for
    more processes. A CPU and a GPU draw different numbers.
    """

    def __init__(self, config: Any, parts: int, agreement: Agreement, device: torch.device) -> None:
        self._sigma, self._copies, self._seed = config.sigma, config.copies, config.seed
        rank, world = agreement.rank, agreement.world
        self._rows, self._parts = config.batch_size // parts, range(parts * rank // world, parts * (rank + 1) // world)
        self._device, self._generator = device, torch.Generator(device)

    def draw(self, step: int, images: Tensor) -> Tensor | None:
        """For images [n, C, S, S], the first n rows of this rank: [n * copies, C, S, S], copies of one side by side.

        None where sigma is 0.
        """
        if not self._sigma:
            return None
        rows = self._rows * len(self._parts)  # of a whole batch: a row has its noise whether or not others were lost
        noise = torch.empty(rows, self._copies, *images.shape[1:], device=self._device)
        for part, piece in zip(self._parts, noise.split(self._rows), strict=True):
            # Negative, as the model's own numbers (dropout) come from (seed, step, rank).
            self._generator.manual_seed(step_seed(self._seed, step, -1 - part))
            piece.normal_(0, self._sigma, generator=self._generator)
        return noise[: len(images)].flatten(0, 1)

    def start(self, step: int, images: Tensor, eps: float, norm: Norm) -> Tensor:
        """Points like images [n, C, S, S], drawn from the balls around them."""
        starts = []
        pieces = images.split(self._rows)  # fewer than parts where rows were lost
        for part, piece in zip(self._parts, pieces, strict=False):
            self._generator.manual_seed(step_seed(self._seed, step, -1 - (1 << 32) - part))
            starts.append(draw_from_ball(piece, eps, norm, self._generator))
        return torch.cat(starts)


def augment(images: Tensor, index: Tensor, config: Any, epoch: int) -> Tensor:
    """Images uint8 [n, C, S, S] from memory, cropped and mirrored as the settings say, by (seed, epoch, sample)."""
    if config.pad or config.mirror:
        draws = SampleDraws(config.seed, epoch, index)
        images = random_crop(images, draws, pad=config.pad, fill=config.colour)
        images = mirror(images, draws) if config.mirror else images
    return images


def to_pixels(images: Tensor) -> Tensor:
    """Images uint8 [n, C, S, S] → float32 in [0, 1], channels-last."""
    return unit_interval(images).contiguous(memory_format=torch.channels_last)


# ----------------------------------------------------------------------------------------------------------------------
# Attack
# ----------------------------------------------------------------------------------------------------------------------


def perturb(
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    eps: float,
    noise: Tensor | None,
    start: Tensor | None,
    config: Any,
) -> Tensor:
    """The images of a step [n, C, S, S], moved by its attack; a new tensor without a graph.

    The attack runs on the plain classifier in evaluation mode: no gradient of a weight is computed or exchanged, and
    batch-norm statistics count no image twice. Where the classifier flips frequencies, order `nearest` is PGD within
    the frequencies of flipped data: the flip keeps lengths, so the nearest point of ball and [0, 1] in plain pixels is
    the flipped one of that which Dykstra's algorithm finds for flipped images.
    """
    return pgd(
        classifier,
        images,
        labels,
        norm=config.norm,
        eps=eps,
        step_size=config.step_size * eps / config.attack_steps,
        steps=config.attack_steps,
        order=config.order,
        noise=noise,
        gradient_free=config.attack == "smoothadv_gradient_free",
        start=start,
        precision=config.attack_precision,
        check_images=False,  # they come from uint8
    )


# ----------------------------------------------------------------------------------------------------------------------
# Result
# ----------------------------------------------------------------------------------------------------------------------


def metrics(config: Any) -> dict[str, dict[str, Any]]:
    """What `measure` counts, and what else says what was counted."""
    found: dict[str, dict[str, Any]] = {"test_accuracy": {}}
    if config.sigma:
        found["test_accuracy_under_noise"] = {"sigma": config.sigma}
    if config.radius and config.eval_count:
        found["test_robust_accuracy"] = {"attack": "PGD-20", "norm": config.norm, "eps": config.radius}
    return found


def measure(
    classifier: Classifier,
    test: ImageSet,
    config: Any,
    agreement: Agreement,
    device: torch.device,
    vote: Callable[[], None],
) -> dict[str, dict[str, Any]]:
    """The row of results of each metric, with right answers and images. Processes share the images.

    test_accuracy is that of all test images, test_accuracy_under_noise that with one draw of --sigma for each image,
    test_robust_accuracy, of --eval_count images, the share of those that are right as they are and after PGD-20, which
    is that of eval/attack.py, as are the images by the same --seed and --count. All in float32.

    vote: called by all processes at the same time, before each batch.
    """
    facts = metrics(config)
    attacked = torch.empty(0, dtype=torch.int64)
    if "test_robust_accuracy" in facts:
        attacked = torch.from_numpy(draw_images(len(test), config.eval_count, config.seed))
    counts = {metric: torch.zeros(2, dtype=torch.int64, device=device) for metric in facts}
    generator = torch.Generator(device)

    def count(number: int, rows: Tensor, under_attack: bool) -> None:
        images, labels = to_pixels(test.images[rows].to(device)), test.labels[rows].to(device)

        def add(metric: str, correct: Tensor) -> None:
            counts[metric] += torch.stack([correct.sum(), correct.new_tensor(len(correct), dtype=torch.int64)])

        correct = right(classifier, images, labels)
        if under_attack:
            found = search("pgd", classifier, images, labels, norm=config.norm, eps=config.radius, check_images=False)
            add("test_robust_accuracy", correct & right(classifier, found, labels))
            return
        add("test_accuracy", correct)
        if config.sigma:
            generator.manual_seed(step_seed(config.seed, number, -1))
            noise = torch.empty(images.shape, device=device).normal_(0, config.sigma, generator=generator)
            add("test_accuracy_under_noise", right(classifier, images + noise, labels))

    classifier.eval()
    # Few enough for any device that could train; not by the number of processes, on which no number may depend.
    at_once = min(config.batch_size, 100 if classifier.image_size <= IN_MEMORY else 25)
    batches = [(rows, False) for rows in torch.arange(len(test)).split(at_once)]
    batches += [(rows, True) for rows in attacked.split(at_once) if len(rows)]
    for number, (rows, under_attack) in enumerate(batches):
        if number % agreement.world == 0:
            vote()
        if number % agreement.world == agreement.rank:
            count(number, rows, under_attack)
    found = [
        sum(values)
        for values in zip(*gather_object([torch.stack(list(counts.values())).flatten().tolist()]), strict=True)
    ]
    rows = {}
    for (metric, fact), correct, n in zip(facts.items(), found[::2], found[1::2], strict=True):
        shares = {"value": correct / n, "correct": correct, "n": n, "interval": wilson(correct, n)}
        rows[metric] = {"metric": metric, **shares, "interval_kind": "95 % Wilson", **fact}
    return rows
