"""Stages of train/probe.py: features by all processes, rows to train on, heads by either solver, table and figure.

Apart from the script, which they would make twice as long as a script may be; train/heads.py has the arithmetic.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from data import DataError
from data.features import TYPES, FeatureCache, Features
from data.prefetch import Prefetch
from data.stream import Pass
from data.transforms import unit_interval
from models import ModelError
from models.encoders import Encoder
from models.featurisers import Featuriser, Kind, random_transform
from train.common import Progress, StopRequested, cosine_lr, memory_mib, step_seed
from train.heads import (
    Arithmetic,
    FeaturisedHeads,
    HeadBlock,
    Initial,
    Point,
    cut_into_blocks,
    few_shots,
    held_out,
    score,
    solve,
)
from train.launching import Agreement, StopSignals

# A block of heads takes some batches before the next block takes them: its weights and moments stay in a CPU's cache.
_GROUP_BYTES, _GROUP_BATCHES = 2**24, 16
_MEASURED = 2**15  # rows: 128 MiB of 1024 features
log = logging.getLogger("shiftlens")


@dataclass
class Fit:
    """A trained head [C, D], its bias [C], correct answers among `n` rows, mean loss there, what else is known.

    number: its place among the points that were fitted together. featuriser: its own trained layers, if it has any.
    """

    number: int
    weight: Tensor
    bias: Tensor
    correct: int
    n: int
    loss: float
    details: dict[str, float]
    featuriser: Featuriser | None = None

    @property
    def summary(self) -> dict[str, Any]:
        """All but the tensors."""
        numbers = {"accuracy": self.correct / max(self.n, 1), "correct": self.correct, "n": self.n, "loss": self.loss}
        return {"head": self.number, **numbers, **self.details}


@dataclass(frozen=True)
class Rows:
    """What heads learn from: rows of the features, and the other rows that they are measured on (maybe none)."""

    data: Features
    train: Tensor
    held_out: Tensor
    classes: tuple[str, ...]

    @property
    def measured(self) -> Tensor:
        """The rows held out, or where there are none those of the training."""
        return self.held_out if len(self.held_out) else self.train

    def all_trained(self) -> Rows:
        """The same with nothing held out."""
        train = torch.cat([self.train, self.held_out]).sort().values
        return dataclasses.replace(self, train=train, held_out=train[:0])


# ----------------------------------------------------------------------------------------------------------------------
# Features and rows
# ----------------------------------------------------------------------------------------------------------------------


def extract(
    cache: FeatureCache,
    encoder: Encoder,
    open_part: Callable[[int], Pass],
    images: int,
    accelerator: Accelerator,
    agreement: Agreement,
    signals: StopSignals,
) -> None:
    """Computes the parts that the cache lacks, each by one process; `open_part` gives its images, `images` at a time.

    Raises StopRequested after a stop signal, and on all processes what goes wrong on one.
    """
    rank, world, device = agreement.rank, agreement.world, accelerator.device
    with agreement.together():
        own = cache.missing(range(cache.parts)[rank::world])
        cache.check_space()
    missing = sorted(gather_object(own))
    if not missing:
        log.info("features found in %s", cache.folder)
        return
    log.info("features %d of %d parts to compute, into %s", len(missing), cache.parts, cache.folder)
    encoder = encoder.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    batches_of_part = math.ceil(cache.identity.samples / cache.parts / images)
    progress = Progress(0, len(missing[rank::world]) * batches_of_part, images * world, shown=rank == 0)
    counter = itertools.count()

    def compute(part: int) -> None:
        nothing = torch.empty(0, dtype=torch.int64)  # a part may be without a usable sample
        found = {"features": [torch.empty(0, cache.identity.width)], "labels": [nothing], "index": [nothing]}
        with open_part(part) as stream:
            batches = Prefetch(stream, device)
            for batch in batches:
                if signals.received:
                    return
                progress.step_done(next(counter))
                if not len(batch["label"]):
                    continue
                with torch.no_grad(), accelerator.autocast():
                    features = encoder(unit_interval(batch["image"]))
                batches.fetch()  # the next line waits for the device
                found["features"].append(features.to("cpu", TYPES[cache.identity.dtype]))
                found["labels"].append(batch["label"])
                found["index"].append(batch["index"])
        cache.write(part, **{name: torch.cat(pieces) for name, pieces in found.items()})

    with contextlib.closing(progress):
        # Each process takes a part, then all agree: a failure or a signal ends all within the time of a part.
        for first in range(0, len(missing), world):
            failure: Exception | None = None
            try:
                if first + rank < len(missing):
                    compute(missing[first + rank])
            except (DataError, ModelError, OSError) as error:
                failure = error
            if stop := agreement.settle(failure, signals.received):
                raise StopRequested(stop, f"stopped by signal {stop}: what {cache.folder} holds is kept")
            if not progress.bar:
                rates, done = progress.rates(), min(first + world, len(missing))
                log.info("features %d of %d parts, %.0f images/s", done, len(missing), rates["images_per_second"])


def choose_rows(features: Features, holdout: float, shots: int, seed: int) -> Rows:
    """Which rows to train on and which to hold out (a share `holdout`); `shots` per class, 0 for all.

    Raises DataError where a class would have nothing to learn from, or nothing is held out.
    """
    names = features.identity.classes
    labels = features.labels.cpu()
    if not names:
        names = tuple(map(str, range(int(labels.max()) + 1)))
        log.warning("the shards name no classes: those of the head are called 0 to %s", names[-1])
    if len(names) < 2:
        raise DataError(f"all {features.rows} images are of one class ({names[0]}); a probe needs two")
    out = held_out(features.index, holdout)
    if holdout and not out.any():
        raise DataError(f"--holdout {holdout} holds out none of {features.rows} samples; raise it")
    counts = torch.bincount(labels[~out], minlength=len(names))
    if absent := [name for name, count in zip(names, counts.tolist(), strict=True) if not count]:
        shown = ", ".join(absent[:5]) + (", ..." if len(absent) > 5 else "")
        where = "the shards hold" if (labels.bincount(minlength=len(names)) == 0).any() else "--holdout leaves"
        raise DataError(f"{where} no image of {len(absent)} of {len(names)} classes ({shown}) to train on")
    smallest = int(counts.argmin())
    if shots > counts[smallest]:
        raise DataError(f"--shots {shots}: class {names[smallest]} has only {counts[smallest]} images to train on")
    train = (~out).nonzero().flatten()
    if shots:
        train = train[few_shots(features.index[train], labels[train], shots, seed)]
    device = features.device
    return Rows(features, train.to(device), out.nonzero().flatten().to(device), names)


def draw_transform(rows: Rows, blocks: int, seed: int) -> Featuriser:
    """A random reversible transform, its batch norm measured on up to _MEASURED of the rows to train on, evenly spread.

    Raises ModelError for an odd number of features.
    """
    chosen = rows.train[:: -(-len(rows.train) // _MEASURED)]
    return random_transform(rows.data.width, blocks, seed, rows.data.take(chosen))


# ----------------------------------------------------------------------------------------------------------------------
# Heads
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """Steps of AdamW: rows per step, passes, steps of warm-up, largest gradient norm of a head, seed."""

    batch_size: int
    epochs: int
    warmup_steps: int
    clip: float
    seed: int


@dataclass(frozen=True)
class Form:
    """What every head is: layers of a kind of block before it (0 = a linear head), and where it starts from."""

    mlp_kind: Kind = "basic"
    mlp_layers: int = 0
    initial: Initial | None = None


def fit_by_adamw(
    points: Sequence[Point],
    rows: Rows,
    schedule: Schedule,
    form: Form,
    arithmetic: Arithmetic,
    agreement: Agreement,
    signals: StopSignals,
    record: Callable[[dict[str, Any]], None],
) -> list[Fit]:
    """Trains a head for each point; this process's share of them is returned.

    Blocks of heads are dealt out to the processes, and all see the same batches: a permutation of the rows for each
    epoch, drawn by seed, the last batch maybe smaller. `record` takes a dictionary for each head and epoch.
    """
    numbers = cut_into_blocks(points, arithmetic.device)[agreement.rank :: agreement.world]

    def make(points: list[Point]) -> HeadBlock | FeaturisedHeads:
        size = len(rows.classes), rows.data.width
        shared: dict[str, Any] = {"seed": schedule.seed, "clip": schedule.clip, "arithmetic": arithmetic}
        if form.mlp_layers:
            return FeaturisedHeads(points, *size, kind=form.mlp_kind, layers=form.mlp_layers, **shared)
        return HeadBlock(points, *size, initial=form.initial, **shared)

    blocks = [make([points[number] for number in block]) for block in numbers]
    steps_per_epoch = math.ceil(len(rows.train) / schedule.batch_size)
    total = schedule.epochs * steps_per_epoch
    log.info("heads    %d, %d steps of %d rows", len(points), total, min(schedule.batch_size, len(rows.train)))
    if schedule.warmup_steps >= total:
        log.warning(
            "warm-up  %d steps of %d: no head reaches its learning rate; lower --warmup_steps or raise --epochs",
            schedule.warmup_steps,
            total,
        )
    at_a_time = batches_at_a_time(rows.data, schedule.batch_size)
    fits: list[Fit] = []
    losses = [torch.full((len(block),), math.nan, device=arithmetic.device) for block in numbers]
    progress = Progress(0, total, schedule.batch_size, shown=agreement.rank == 0)
    with contextlib.closing(progress):
        for epoch in range(schedule.epochs + 1):
            last = epoch == schedule.epochs
            if last or len(rows.held_out):
                fits = []
                for block, heads, mean in zip(numbers, blocks, losses, strict=True):
                    weight, bias = heads.weight.detach(), heads.bias.detach()
                    fits += _measured(block, weight, bias, heads.featurisers, rows, points, arithmetic)
                    for fit, value in zip(fits[-len(block) :], mean.tolist(), strict=True):
                        fit.details["train_loss"] = value
                _report(fits, epoch * steps_per_epoch, epoch, points, progress, arithmetic, record)
            if last:
                break
            order = torch.randperm(
                len(rows.train), generator=torch.Generator().manual_seed(step_seed(schedule.seed, epoch, 0))
            )
            losses = [torch.zeros_like(mean) for mean in losses]
            batches = rows.data.batches(rows.train[order.to(rows.train.device)], schedule.batch_size)
            for group in grouped(enumerate(batches, epoch * steps_per_epoch), at_a_time):
                if signals.received:
                    break
                for heads, mean in zip(blocks, losses, strict=True):
                    for step, (features, labels) in group:
                        share = cosine_lr(step, 1.0, schedule.warmup_steps, total)
                        found = heads.step(features, labels.to(arithmetic.device), share)
                        mean += found * (len(labels) / len(rows.train))
                for step, _ in group:
                    progress.step_done(step)
            if stop := agreement.settle(None, signals.received):
                raise StopRequested(
                    stop, f"stopped by signal {stop} in epoch {epoch}: the features are kept, heads are not"
                )
    return fits


Numbered = tuple[int, tuple[Tensor, Tensor]]


def batches_at_a_time(data: Features, batch_size: int) -> int:
    """How many batches a block of heads takes before the next one does: few megabytes of features, at least one."""
    return max(1, min(_GROUP_BATCHES, _GROUP_BYTES // (batch_size * data.width * data.pieces[0].element_size())))


def grouped(batches: Iterator[Numbered], size: int) -> Iterator[list[Numbered]]:
    """`size` at a time, the last group maybe fewer."""
    while group := list(itertools.islice(batches, size)):
        yield group


def fit_by_lbfgs(
    points: Sequence[Point],
    rows: Rows,
    arithmetic: Arithmetic,
    agreement: Agreement,
    signals: StopSignals,
    record: Callable[[dict[str, Any]], None],
) -> list[Fit]:
    """Solves logistic regression for each point; this process's share of them is returned. `record` as above."""
    log.info("heads    %d, by L-BFGS over %d rows", len(points), len(rows.train))
    fits: list[Fit] = []
    progress = Progress(0, math.ceil(len(points) / agreement.world), len(rows.train), shown=agreement.rank == 0)
    with contextlib.closing(progress):
        for first in range(0, len(points), agreement.world):
            number = first + agreement.rank
            new: list[Fit] = []
            if number < len(points):
                found = solve(
                    points[number], rows.data, rows.train, len(rows.classes), arithmetic,
                    stopped=lambda: bool(signals.received),
                )  # fmt: skip
                new = _measured([number], found.weight[None], found.bias[None], [], rows, points, arithmetic)
                new[0].details |= {"objective": found.objective, "gap": found.gap, "iterations": found.iterations}
                progress.step_done(first // agreement.world)
                if found.gap > 1e-4:
                    log.warning("%s: not at its optimum (objective at most %.1e above)", points[number], found.gap)
            if stop := agreement.settle(None, signals.received):
                raise StopRequested(stop, f"stopped by signal {stop}: the features are kept, heads are not")
            _report(new, first, 0, points, progress, arithmetic, record)
            fits += new
    return fits


def _measured(
    numbers: Sequence[int],
    weight: Tensor,
    bias: Tensor,
    featurisers: Sequence[Featuriser],
    rows: Rows,
    points: Sequence[Point],
    arithmetic: Arithmetic,
) -> list[Fit]:
    """Heads [H, C, D] of the points with these numbers, scored on the rows that are for it.

    featurisers: one for each head, or none.
    """
    if featurisers:  # each head has inputs of its own
        each = zip(numbers, weight.split(1), bias.split(1), featurisers, strict=True)
        fits = []
        for number, w, b, featuriser in each:
            correct, loss = score(w, b, points[number].normalize, rows.data, rows.measured, arithmetic, featuriser)
            fits.append(Fit(number, w[0], b[0], int(correct), len(rows.measured), loss.item(), {}, featuriser))
        return fits
    correct, loss = score(weight, bias, points[numbers[0]].normalize, rows.data, rows.measured, arithmetic)
    values = zip(numbers, weight, bias, correct.tolist(), loss.tolist(), strict=True)
    return [Fit(number, w, b, right, len(rows.measured), mean, {}) for number, w, b, right, mean in values]


def _report(
    fits: list[Fit],
    step: int,
    epoch: int,
    points: Sequence[Point],
    progress: Progress,
    arithmetic: Arithmetic,
    record: Callable[[dict[str, Any]], None],
) -> None:
    """Rows of all processes to `record`, and a line about the best."""
    summaries = sorted(gather_object([fit.summary for fit in fits]), key=lambda row: row["head"])
    for summary in summaries:
        record({"step": step, "epoch": epoch, **summary})
    if not progress.bar:
        best = max(summaries, key=lambda row: row["correct"])
        log.info(
            "epoch %d  step %d  best %.2f %% (%s)  %.0f rows/s  %.0f MiB",
            epoch, step, 100 * best["accuracy"], points[best["head"]], progress.rates()["images_per_second"],
            memory_mib(arithmetic.device),
        )  # fmt: skip


def best_of(table: Sequence[dict[str, Any]]) -> int:
    """Number of the head with most correct answers, then least loss, then first. Raises ModelError: none is finite."""
    usable = [row for row in table if math.isfinite(row["loss"])]
    if not usable:
        raise ModelError(f"none of {len(table)} heads has a finite loss; lower --lr, or check the features")
    return max(usable, key=lambda row: (row["correct"], -row["loss"], -row["head"]))["head"]


# ----------------------------------------------------------------------------------------------------------------------
# Table and figure
# ----------------------------------------------------------------------------------------------------------------------


def write_grid(points: Sequence[Point], table: Sequence[dict[str, Any]], best: int, file: Path) -> None:
    """A line for each head: its settings, how it did, and whether it was chosen."""
    with open(file, "w", newline="", encoding="utf-8") as handle:
        settings = [name for name, value in dataclasses.asdict(points[0]).items() if value is not None]
        writer = csv.DictWriter(handle, ["head", *settings, *(key for key in table[0] if key != "head"), "chosen"])
        writer.writeheader()
        for row in table:
            values = {name: getattr(points[row["head"]], name) for name in settings}
            writer.writerow({**values, **row, "chosen": int(row["head"] == best)})


def draw_grid(
    points: Sequence[Point],
    table: Sequence[dict[str, Any]],
    curves: Sequence[dict[str, Any]],
    best: int,
    scored_on: str,
    out: Path,
) -> None:
    """grid.png and grid.svg: accuracy over learning rate or penalty, and over epochs where there are several."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    axis = "lr" if points[0].penalty is None else "penalty"
    epochs = sorted({row["epoch"] for row in curves})
    figure, panels = plt.subplots(
        1, 2 if len(epochs) > 1 else 1, figsize=(10, 4.2), layout="constrained", squeeze=False
    )
    left = panels[0, 0]
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in table:
        point = points[row["head"]]
        others = dataclasses.replace(point, **{axis: None})
        lines.setdefault(str(others) or "features as they are", []).append(
            (getattr(point, axis), 100 * row["accuracy"])
        )
    for name, line in lines.items():
        # Curves often lie on each other: the dashes of later ones let the earlier show.
        dashes = ("-", "--", ":", "-.")[list(lines).index(name) % 4]
        left.plot(*zip(*sorted(line), strict=True), dashes, marker="o", markersize=3, linewidth=1.4, label=name)
    left.plot(
        getattr(points[best], axis), 100 * table[best]["accuracy"], "*", color="black", markersize=11, label="chosen"
    )
    left.set(xlabel="learning rate" if axis == "lr" else axis, xscale="log", ylabel=f"accuracy on {scored_on}, %")
    left.legend(fontsize=7)
    if len(epochs) > 1:
        for head in range(len(points)):
            curve = [(row["epoch"], 100 * row["accuracy"]) for row in curves if row["head"] == head]
            style = (
                {"color": "black", "linewidth": 2.0, "zorder": 3} if head == best else {"linewidth": 0.7, "alpha": 0.6}
            )
            panels[0, 1].plot(*zip(*curve, strict=True), **style)
        panels[0, 1].set(xlabel="epoch (a line for each head, the chosen one black)", ylabel="accuracy, %")
    for panel in panels.flat:
        panel.grid(alpha=0.3)
    for suffix in ("png", "svg"):
        figure.savefig(out / f"grid.{suffix}", dpi=150)
    plt.close(figure)
