"""What models say to the images of a set, and the numbers that follow: what evaluations on shift sets share.

Apart from eval/shifts.py because other evaluations score models on the same sets; eval/passes.py reads the sets for
them. Answers are kept one by one until a set is through, 50 bytes an image: a sum over them does not depend on which
process computed which.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import log_softmax

from data.demo import DEMO_TEACHER
from data.shifts import ShiftSet, Suite, check_labels, labels_of, project
from data.stream import Batch
from data.transforms import unit_interval
from eval.robustness import MEAN, Baseline, Estimate, Scored, Tally, estimate_robustness, wilson
from models import ModelError
from models.encoders import Encoder, load_encoder
from models.heads import Head, load_head
from models.weights import state_sha256

BINS = 15  # of confidence, of equal width (Guo et al. 2017, On calibration of modern neural networks)
Which = tuple[int, str]  # the place of a model, and the name of a protocol


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """An encoder and a head by name and file, and what the two are called.

    Without an encoder ("") it is the one that the head's file names; without a name, the encoder's.
    """

    name: str
    encoder: str
    head: str


@dataclass(frozen=True)
class Model:
    """A pair, loaded; the hashes are those that train/probe.py notes."""

    pair: Pair
    encoder: Encoder
    head: Head
    encoder_sha256: str
    head_sha256: str

    def logits(self, features: Tensor) -> Tensor:
        """Logits [N, C], float32, of features [N, D]. Raises ModelError where one is not finite."""
        logits = self.head.logits(features)
        if not torch.isfinite(logits).all():
            raise ModelError(f"{self.pair.name}: logits that are not finite; check the weights, or use bf16, not fp16")
        return logits


def load_models(pairs: Sequence[Pair], suite: Suite, device: torch.device) -> list[Model]:
    """Encoders (each once), for evaluation, and heads, on the device; pairs come back with encoder and name filled in.

    Raises ModelError: what cannot be loaded, a head with other classes, of another encoder, or of none that is known.
    """
    encoders: dict[str, tuple[Encoder, str]] = {}
    models = []
    for pair in pairs:
        head = load_head(pair.head)
        named = pair.encoder or _encoder_of(head, pair.head)
        if named not in encoders:
            try:
                encoder = load_encoder(DEMO_TEACHER if named == "demo" else named)
            except ModelError as error:
                where = "" if pair.encoder else f"the encoder that {pair.head} names, where none is given: "
                raise ModelError(f"{where}{error}") from None
            encoder.eval().requires_grad_(False)
            encoders[named] = encoder, state_sha256(encoder.state_dict())
            encoder.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        encoder, encoder_hash = encoders[named]
        _refuse_numbered_classes(head, pair.head, suite)
        head.check(pair.head, suite.classes, encoder.feature_dim)
        trained_on = str(head.metadata.get("encoder_sha256", encoder_hash))
        if trained_on != encoder_hash:
            raise ModelError(
                f"{pair.head} was trained on features of {head.metadata.get('encoder')} with the weights "
                f"{trained_on[:12]}..., those of {named} are {encoder_hash[:12]}...; give that encoder, "
                "or a head of this one (train/probe.py)"
            )
        head_hash = state_sha256(head.state())
        pair = dataclasses.replace(pair, encoder=named, name=pair.name or named)
        models.append(Model(pair, encoder, head.to(device), encoder_hash, head_hash))
    return models


def _encoder_of(head: Head, path: str) -> str:
    named = head.metadata.get("encoder")
    if not isinstance(named, str) or not named:
        raise ModelError(f"{path} does not say which encoder it was trained on: name the encoder too")
    return named


def _refuse_numbered_classes(head: Head, path: str, suite: Suite) -> None:
    """Raises ModelError for a head of shards without class names: that their order is the suite's would be a guess."""
    if head.classes == tuple(map(str, range(len(suite.classes)))) != suite.classes:
        raise ModelError(
            f"{path} has numbers for classes, as where training shards name none, so nothing shows that their order is "
            f"the {suite.name} suite's: note `classes` and `num_classes` in the _info.json beside those shards, as "
            "`data/shards.py pack` does, and train the head again"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Answers and their sums
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answers:
    """What a model says to n images under the protocol of a set with C classes; arrays [n].

    index: sample numbers. label: right ones, in [0, C). predicted: argmax of the projected logits, the first of equals.
    rank: classes placed before the label's, from 0. plain: whether the label accepts the argmax over all logits. loss:
    cross-entropy of the projected logits in nats, float64. confidence: their softmax at `predicted`, float64.
    """

    index: NDArray[np.int64]
    label: NDArray[np.int64]
    predicted: NDArray[np.int64]
    rank: NDArray[np.int64]
    plain: NDArray[np.bool_]
    loss: NDArray[np.float64]
    confidence: NDArray[np.float64]

    @classmethod
    def joined(cls, parts: Sequence[Answers]) -> Answers:
        """At least one part, one behind the other."""
        names = [field.name for field in fields(cls)]
        return cls(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


def answer(logits: Tensor, labels: Tensor, index: Tensor, shift_set: ShiftSet) -> Answers:
    """Answers from logits, floating [n, num_logits], with int64 [n] labels and sample numbers, all on one device.

    For a control the labels are those of the set that it is part of; images of other classes are left out.
    """
    if shift_set.part_of:
        labels = labels_of(labels, shift_set)
        kept = labels >= 0
        logits, labels, index = logits[kept], labels[kept], index[kept]
    projected = project(logits, shift_set).double()
    own = projected.gather(1, labels[:, None])
    columns = torch.arange(shift_set.num_classes, device=labels.device)
    before = (projected > own) | ((projected == own) & (columns < labels[:, None]))
    log_shares = log_softmax(projected, dim=1)
    found = {
        "index": index,
        "label": labels,
        "predicted": projected.argmax(dim=1),
        "rank": before.sum(dim=1),
        "plain": labels_of(logits.argmax(dim=1), shift_set) == labels,
        "loss": -log_shares.gather(1, labels[:, None])[:, 0],
        "confidence": log_shares.amax(dim=1).exp(),
    }
    return Answers(**{name: value.cpu().numpy() for name, value in found.items()})


@dataclass(frozen=True)
class Score:
    """Counts of n images, n at least 1, and sums over them.

    correct, top5_correct (None below five classes): under the official protocol. plain_correct: without projection.
    class_correct, class_n: per label, [C]. bin_correct, bin_n, bin_confidence (a sum): per bin of confidence, [BINS];
    bin k holds (k / BINS, (k + 1) / BINS]. loss: mean, in nats.
    """

    n: int
    correct: int
    plain_correct: int
    top5_correct: int | None
    class_correct: list[int]
    class_n: list[int]
    bin_correct: list[int]
    bin_n: list[int]
    bin_confidence: list[float]
    loss: float

    @property
    def class_mean(self) -> float:
        """Mean over the classes that have images of the share of each that is correct, in [0, 1]."""
        return float(np.mean([right / n for right, n in zip(self.class_correct, self.class_n, strict=True) if n]))

    @property
    def ece(self) -> float:
        """Expected calibration error in [0, 1]: the mean of |accuracy - confidence| of the bins, weighed by images."""
        gaps = [abs(right - sure) for right, sure in zip(self.bin_correct, self.bin_confidence, strict=True)]
        return sum(gaps) / self.n


def summarise(answers: Answers, shift_set: ShiftSet) -> Score:
    """Counts and sums in the order of the answers, of which there must be one at least."""
    n, num_classes = len(answers.label), shift_set.num_classes
    correct = answers.rank == 0
    bins = np.clip(np.ceil(answers.confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)
    return Score(
        n=n,
        correct=int(correct.sum()),
        plain_correct=int(answers.plain.sum()),
        top5_correct=int((answers.rank < 5).sum()) if num_classes >= 5 else None,
        class_correct=np.bincount(answers.label[correct], minlength=num_classes).tolist(),
        class_n=np.bincount(answers.label, minlength=num_classes).tolist(),
        bin_correct=np.bincount(bins[correct], minlength=BINS).tolist(),
        bin_n=np.bincount(bins, minlength=BINS).tolist(),
        bin_confidence=np.bincount(bins, weights=answers.confidence, minlength=BINS).tolist(),
        loss=float(answers.loss.sum()) / n,
    )


def answer_batch(
    models: Sequence[Model], size: int, batch: Batch, protocols: Sequence[ShiftSet], accelerator: Accelerator
) -> Iterator[tuple[Which, Answers]]:
    """What the models that take images of `size` pixels say to a batch, under each protocol of its set.

    Raises DataError for a label outside the set (the first protocol), ModelError for logits that are not finite.
    """
    check_labels(batch["label"], protocols[0])
    images, labels, index = (batch[part].to(accelerator.device) for part in ("image", "label", "index"))
    features: dict[int, Tensor] = {}  # by encoder
    for place, model in enumerate(models):
        if model.encoder.image_size != size:
            continue
        encoder = id(model.encoder)
        if encoder not in features:
            with torch.no_grad(), accelerator.autocast():
                features[encoder] = model.encoder(unit_interval(images))
        logits = model.logits(features[encoder])
        for protocol in protocols:
            yield (place, protocol.name), answer(logits, labels, index, protocol)


# ---------------------------------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------------------------------


def rows_of(score: Score, protocol: ShiftSet) -> list[dict[str, Any]]:
    """The results of one model under one protocol; intervals are Wilson's, of 95 %."""
    rows: list[dict[str, Any]] = []
    for metric, correct in (
        ("official_top1", score.correct),
        ("plain_top1", score.plain_correct),
        ("official_top5", score.top5_correct),
    ):
        if correct is not None:
            interval = list(wilson(correct, score.n))
            rows.append({"metric": metric, "value": correct / score.n, "correct": correct, "interval": interval})
    counts = {"class_correct": score.class_correct, "class_n": score.class_n}
    rows.append({"metric": "official_class_mean", "value": score.class_mean, **counts})
    bins = {name: getattr(score, name) for name in ("bin_correct", "bin_n", "bin_confidence")}
    rows.append({"metric": "calibration_error", "value": score.ece, **bins})
    rows.append({"metric": "loss", "value": score.loss})
    shared = {
        "set": protocol.name,
        "n": score.n,
        "published_n": protocol.num_images,
        "projection": protocol.projection,
        "class_map_sha256": protocol.sha256,
    }
    return [{**row, **shared} for row in rows]


def compare(
    scores: Mapping[str, Score], suite: Suite, published: Mapping[str, Baseline], complete: set[str]
) -> dict[str, Estimate]:
    """Effective robustness of one model on each complete shift, and its mean if all are complete; empty without a line.

    published: the line of each shift. complete: the sets that were scored on all of their images.
    """
    if not published or suite.in_distribution not in complete:
        return {}
    base = scores[suite.in_distribution]
    scored = {
        name: Scored(Tally(base.correct, base.n), Tally(scores[name].correct, scores[name].n), published[name])
        for name in suite.shifts
        if name in complete
    }
    if not scored:
        return {}
    estimates = estimate_robustness(scored)
    return estimates if len(scored) == len(suite.shifts) else {name: estimates[name] for name in scored}


def mean_of_shifts(scores: Mapping[str, Score], suite: Suite) -> float | None:
    """The mean official top-1 over the suite's shifts, None unless all were scored."""
    if not set(suite.shifts) <= set(scores):
        return None
    return sum(scores[name].correct / scores[name].n for name in suite.shifts) / len(suite.shifts)


@dataclass(frozen=True)
class Comparison:
    """What the scores of one model give together.

    robustness: effective robustness by shift, and MEAN; empty without a line. mean: official top-1 over the shifts, in
    [0, 1], None unless all were scored. rows: the same as results.
    """

    robustness: dict[str, Estimate]
    mean: float | None
    rows: list[dict[str, Any]]


def compare_sets(
    scores: Mapping[str, Score], suite: Suite, published: Mapping[str, Baseline], complete: set[str], table: str
) -> Comparison:
    """Compares one model's scores with each other; arguments as of `compare`. table: where the lines come from."""
    robustness = compare(scores, suite, published, complete)
    rows: list[dict[str, Any]] = []
    for name, estimate in robustness.items():
        row = {"metric": "effective_robustness", "set": name, "value": estimate.value}
        if name != MEAN:
            row |= {"n": scores[name].n, "line": dataclasses.asdict(published[name].fit)}
        row |= {"interval": [estimate.low, estimate.high], "in_distribution": suite.in_distribution, "table": table}
        rows.append(row)
    mean = mean_of_shifts(scores, suite)
    if mean is not None:
        of_set = {"set": MEAN, "over": [*suite.shifts], "partial": not {*suite.shifts} <= complete}
        rows.append({"metric": "official_top1", "value": mean, **of_set})
    return Comparison(robustness, mean, rows)
