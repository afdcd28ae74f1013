"""Passes over the sets of a suite: where the sets are, each streamed once for all models, every image answered once.

What the scripts that score models on shift sets share, apart from the numbers themselves (eval/scoring.py): this is
about settings, files and processes, and imports torch only once a launch is known to be right.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from data import DataError
from data.rows import append_row
from data.shifts import SUITES, ShiftSet, Suite, check_set
from data.urls import scheme
from eval.robustness import TABLE, Baseline, baseline, read_table
from models import ModelError
from train.common import ConfigError, Progress, RunFolder, StopRequested, memory_mib, option
from train.launching import Agreement, StopSignals

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from data.tar import ShardSet
    from eval.scoring import Answers, Model, Which

SECONDS_BETWEEN_LINES = 10
# The newest row of equal NUMBER is what counts; one that agrees with it in RESULT too is not written again.
NUMBER = ("metric", "set", "model", "alpha")
RESULT = ("value", "encoder_sha256", "head_sha256", "data_fingerprint", "precision")
log = logging.getLogger("shiftlens")


# ----------------------------------------------------------------------------------------------------------------------
# Settings, and the sets that they name
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SetSettings:
    """Where the sets are and how they are read."""

    suite: Literal["imagenet", "demo"] = option("imagenet", "sets that belong together, and the classes of the heads")
    data: str = option(
        "", "folder that holds a folder of shards for each set (URLs: --sets, one by one); `demo` = built-in digits"
    )
    sets: dict[str, str] = dataclasses.field(
        default_factory=dict,
        metadata={"help": "shards of sets that are elsewhere, by name, as `--sets.imagenet_a SHARDS`"},
    )
    partial: list[str] = option([], "sets that are samples, such as imagenet: any number of images, no robustness")
    allow_missing: bool = option(False, "end with 0 where sets are missing, the others having been scored")
    table: str = option("", "CSV of models that the line is fitted to, in percent; empty = the published one")
    images: int = option(256, "images at a time through an encoder, per process")
    workers: int = option(2, "decoding processes per process; 0 = decode in the process itself")
    decoder: Literal["torchvision", "pil"] = option(
        "torchvision", "image decoder; pil = bit-exact reference, under half as fast"
    )
    allow_pipe: bool = option(False, "allow `pipe:COMMAND` as a shard, which runs COMMAND in a shell")

    def __post_init__(self) -> None:
        if self.images < 1 or self.workers < 0:
            raise ConfigError(f"--images {self.images} must be at least 1, --workers {self.workers} not negative")
        if not self.data:
            raise ConfigError("--data is missing: a folder with a folder of shards for each set, or `demo`")
        if self.data == "demo" and self.suite != "demo":
            raise ConfigError(f"--data demo has the sets of --suite demo, not of {self.suite}; give --data FOLDER")
        own = [one.name for one in SUITES[self.suite].sets.values() if not one.part_of]
        for flag, names in (("sets", [*self.sets]), ("partial", self.partial)):
            if unknown := sorted(set(names) - set(own)):
                raise ConfigError(f"--{flag} names {', '.join(unknown)}; the sets are {', '.join(own)}")


@dataclass(frozen=True)
class Found:
    """A set and its shards; partial: a sample of the set was announced."""

    shift_set: ShiftSet
    shards: ShardSet
    partial: bool


def find_sets(settings: SetSettings, suite: Suite) -> tuple[list[Found], dict[str, str]]:
    """The sets that are there, checked against the table, and where each missing one was looked for.

    Raises DataError for shards that are not the set, for a place in --sets that has none, and if no set is there.
    """
    from data.demo import demo_shards
    from data.tar import find_shards

    root = os.path.dirname(demo_shards(suite.in_distribution)) if settings.data == "demo" else settings.data.rstrip("/")
    found, missing = [], {}
    for name, shift_set in suite.sets.items():
        place = settings.sets.get(name, f"{root}/{name}")
        if shift_set.part_of:
            continue
        if name not in settings.sets and not scheme(root) and not os.path.isdir(os.path.expanduser(place)):
            if name in (suite.in_distribution, *suite.shifts):
                missing[name] = place
            continue
        shards = find_shards(place, allow_pipe=settings.allow_pipe)
        partial = name in settings.partial
        check_set(shards, dataclasses.replace(shift_set, num_images=None) if partial else shift_set)
        found.append(Found(shift_set, shards, partial))
    if not found:
        raise DataError(f"{root} holds none of the sets {', '.join(missing)}; each is a folder of shards of that name")
    return found, missing


def published_lines(settings: SetSettings, suite: Suite) -> dict[str, Baseline]:
    """The line of each shift of the suite, from --table or the published table; none for the demo without a table.

    Raises DataError for a table that lacks a set, or cannot be read.
    """
    if not settings.table and suite.name == "demo":
        return {}
    table = read_table(settings.table or TABLE)
    return {name: baseline(name, suite.in_distribution, table=table) for name in suite.shifts}


def report_missing(missing: Mapping[str, str], agreement: Agreement) -> None:
    """Ends all processes with DataError, which one of them words, if a set was missing: only after the others' passes.

    missing: where each was looked for.
    """
    if missing:
        absent = DataError(
            f"missing: {', '.join(missing)}; the other sets are scored. Put shards at {next(iter(missing.values()))}, "
            "name places with --sets.NAME, or give --allow_missing true"
        )
        agreement.settle(absent if agreement.rank == 0 else None)


# ----------------------------------------------------------------------------------------------------------------------
# What is told
# ----------------------------------------------------------------------------------------------------------------------


def log_plan(
    models: Sequence[Model],
    found: Sequence[Found],
    missing: Mapping[str, str],
    published: Mapping[str, Baseline],
    suite: Suite,
    accelerator: Accelerator,
) -> None:
    """Lines about what will be scored on what."""
    import torch

    for model in models:
        facts = model.encoder.name, model.encoder.feature_dim, model.encoder.image_size
        log.info("model    %s: %s, %d features, %d px", model.pair.name, *facts)
    for one in found:
        sample = ", a sample" if one.partial else ""
        log.info("set      %s: %d images%s", one.shift_set.name, one.shards.num_samples, sample)
    for name, looked in missing.items():
        log.warning("set      %s: missing, no folder %s", name, looked)
    if not published:
        log.info("line     none is published for the sets of the %s suite: no effective robustness", suite.name)
    where = torch.cuda.get_device_name() if accelerator.device.type == "cuda" else accelerator.device.type
    log.info("device   %s, mixed precision %s", where, accelerator.mixed_precision)


class ResultRows:
    """The rows of a run, appended to results.jsonl where the newest of an earlier run is not the same.

    Attributes:
        rows: all that were added, without provenance.
    """

    def __init__(self, folder: RunFolder, settings: SetSettings, accelerator: Accelerator) -> None:
        """Only rank 0, which has the folder, makes one."""
        self.rows: list[dict[str, Any]] = []
        self._file: Path = folder.path / "results.jsonl"
        self._newest = {_values(row, NUMBER): _values(row, RESULT) for row in folder.results()}
        self._settings, self._accelerator = settings, accelerator

    def add(self, model: Model, fields: Mapping[str, Any]) -> None:
        """A number of a model: what `rows_of` and `compare_sets` give, and whatever else is known of it."""
        settings, size = self._settings, model.encoder.image_size
        row = {
            **fields,
            "suite": settings.suite,
            "model": model.pair.name,
            "encoder": model.encoder.name,
            "encoder_sha256": model.encoder_sha256,
            "head": model.pair.head,
            "head_sha256": model.head_sha256,
            "preprocessing": f"short side to {size} px (bicubic), centre square; {settings.decoder}",
            "precision": self._accelerator.mixed_precision,
        }
        self.rows.append(row)
        number, result = _values(row, NUMBER), _values(row, RESULT)
        if self._newest.get(number) != result:
            self._newest[number] = result
            config, device = dataclasses.asdict(settings), str(self._accelerator.device)
            append_row(self._file, **row, config=config, device=device)


def _values(row: Mapping[str, Any], names: Sequence[str]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in names)


def say(progress: Progress, text: str, device: torch.device) -> None:
    """A line about how fast it goes, on rank 0."""
    rates = progress.rates()
    text += f"  {rates['images_per_second']:.0f} images/s  data wait {rates['data_wait_share']:.0%}"
    text += f"  {memory_mib(device):.0f} MiB"
    if rates["seconds_left"]:
        text += f"  {rates['seconds_left']:.0f} s left"
    if progress.bar:
        progress.bar.set_postfix_str(text)
    else:
        log.info("%s", text)


# ----------------------------------------------------------------------------------------------------------------------
# Passes
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scored:
    """A set that is through.

    protocols: the set itself, then the controls that are part of it. answers: on rank 0, by the place of a model and
    the name of a protocol, in the order of the images; a control of which no image is in a sample is left out; empty on
    other ranks. keys: of the images in order, if asked for.
    """

    found: Found
    protocols: list[ShiftSet]
    answers: dict[Which, Answers]
    keys: list[str]


def score_sets(
    models: Sequence[Model],
    found: Sequence[Found],
    suite: Suite,
    settings: SetSettings,
    accelerator: Accelerator,
    agreement: Agreement,
    signals: StopSignals,
    *,
    keep_keys: bool = False,
) -> Iterator[Scored]:
    """Reads every set once for each input size of the encoders, and yields what all models say to it; on all ranks.

    Batches are cut from the set as a whole, of which a process takes neighbouring ones: any number of processes has the
    same batches, and with them the same roundings.

    Raises:
        DataError, ModelError: unusable data, a label outside the set, logits that are not finite, or not exactly one
            answer to each image.
        StopRequested: after a stop signal; sets before are through.
    """
    from accelerate.utils import gather_object

    from data.stream import open_pass
    from data.transforms import EvalTransform
    from eval.scoring import Answers, answer_batch

    rank, world, device = agreement.rank, agreement.world, accelerator.device
    sizes = sorted({model.encoder.image_size for model in models})
    batches_of = {one.shift_set.name: -(-one.shards.num_samples // settings.images) for one in found}
    steps = sum(-(-batches // world) for batches in batches_of.values()) * len(sizes)
    done, last_line = 0, time.monotonic()
    with contextlib.closing(Progress(0, steps, settings.images * world, shown=rank == 0)) as progress:
        for one in found:
            set_name, batches = one.shift_set.name, batches_of[one.shift_set.name]
            protocols = [one.shift_set, *(other for other in suite.sets.values() if other.part_of == set_name)]
            own = range(batches * rank // world, batches * (rank + 1) // world)
            parts: dict[Which, list[Answers]] = collections.defaultdict(list)
            keys: list[str] = []
            for size in sizes:
                transform = EvalTransform(size, border=one.shift_set.border, decoder=settings.decoder)
                with contextlib.ExitStack() as opened:
                    with agreement.together():
                        stream = opened.enter_context(
                            open_pass(
                                one.shards,
                                batch_size=settings.images,
                                workers=settings.workers,
                                transform=transform,
                                start=own.start,
                                allow_pipe=settings.allow_pipe,
                            )
                        )
                    for step in range(-(-batches // world)):
                        failure: Exception | None = None
                        try:
                            if step < len(own):
                                with progress.waiting():
                                    batch = next(stream)
                                for which, answers in answer_batch(models, size, batch, protocols, accelerator):
                                    parts[which].append(answers)
                                if keep_keys and size == sizes[0]:
                                    keys += batch["key"]
                        except (DataError, ModelError) as error:
                            failure = error
                        if stop := agreement.settle(failure, signals.received):
                            raise StopRequested(
                                stop, f"stopped by signal {stop} in {set_name}; results of sets before it are kept"
                            )
                        progress.step_done(done)
                        done += 1
                        if time.monotonic() - last_line > SECONDS_BETWEEN_LINES:
                            last_line = time.monotonic()
                            say(progress, f"step {done}/{steps}  {set_name}", device)
            gathered = gather_object([{which: Answers.joined(some) for which, some in parts.items()}])
            all_keys = gather_object(keys)
            whole: dict[Which, Answers] = {}
            with agreement.together():
                for which in itertools.product(range(len(models)), [p.name for p in protocols]) if rank == 0 else ():
                    answers = Answers.joined([of_rank[which] for of_rank in gathered if which in of_rank])
                    if which[1] == set_name and not np.array_equal(answers.index, np.arange(one.shards.num_samples)):
                        raise DataError(f"{set_name}: not one answer to each image; did its shards change meanwhile?")
                    if len(answers.index):
                        whole[which] = answers
            yield Scored(one, protocols, whole, all_keys)
            say(progress, f"scored   {set_name}", device)
