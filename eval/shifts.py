"""How well do an encoder and a head do in distribution, and on the five shift sets? From weights to a verdict.

    accelerate launch eval/shifts.py                                       built-in demo after train/probe.py: 10 s
    accelerate launch eval/shifts.py --data /data/shards --encoder local-dir:runs/rn50/export \\
        --head runs/probe/head.safetensors --name student                  one GPU
    accelerate launch --config_file train/launch/gpu_8_bf16.yaml eval/shifts.py --data /data/shards \\
        --models models.yaml --predictions runs/shifts/predictions.csv     eight GPUs

--data is a folder with a folder of shards for each set, under the names of data/shifts.py (imagenet, imagenet_v2,
imagenet_r, objectnet, imagenet_sketch, imagenet_a; imagenet_v2_threshold and imagenet_v2_top are scored where they are
there); sets elsewhere are named one by one: --sets.objectnet URL. models.yaml lists several pairs, each as

    - {name: student, encoder: local-dir:runs/rn50/export, head: runs/probe/head.safetensors}

Each set is read once for each input size of the encoders, and each encoder computes its features once for all its
heads. Batches are cut from the set as a whole, so that neither an image nor its answer depends on the number of
processes. Every image counts exactly once; a set that has not the published number of images or classes is refused,
unless --partial names it as a sample.

Two numbers come from the same logits: `official`, the published protocol, and `plain`, argmax over all classes
(data/shifts.py). A set is compared with the same classes in distribution, which the pass in distribution gives too, and
with the line of published models (eval/robustness.py). Cost: one encoder forward per image; 167,000 images in all.

Writes into --out: config.yaml, env.json, and results.jsonl, to which runs on other models add their rows.
"""

from __future__ import annotations

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import collections
import contextlib
import csv
import dataclasses
import itertools
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from data import DataError
from data.rows import append_row
from data.shifts import SUITES, ShiftSet, Suite, check_set
from data.urls import scheme
from eval.common import print_table
from eval.robustness import MEAN, TABLE, Baseline, Estimate, baseline, read_table, wilson
from models import ModelError
from train.common import ConfigError, Progress, RunFolder, StopRequested, memory_mib, option, run_script
from train.launching import Agreement, StopSignals, start_accelerator

if TYPE_CHECKING:
    import torch

    from data.tar import ShardSet
    from eval.scoring import Answers, Pair, Score, Which

SECONDS_BETWEEN_LINES = 10
DEMO_HEAD = "runs/demo_probe/head.safetensors"  # where train/probe.py leaves the demo's
# A row that agrees in these with one of an earlier run is the same result.
IDENTITY = ("metric", "value", "set", "model", "encoder_sha256", "head_sha256", "data_fingerprint", "precision")
log = logging.getLogger("shiftlens")


@dataclass(frozen=True)
class Config:
    """Settings."""

    suite: Literal["imagenet", "demo"] = option("imagenet", "sets that belong together, and the classes of the heads")
    data: str = option(
        "", "folder that holds a folder of shards for each set (URLs: --sets, one by one); `demo` = built-in digits"
    )
    sets: dict[str, str] = dataclasses.field(
        default_factory=dict,
        metadata={"help": "shards of sets that are elsewhere, by name, as `--sets.imagenet_a SHARDS`"},
    )
    partial: list[str] = option([], "sets that are samples, e.g. [imagenet]: any number of images, no robustness")
    allow_missing: bool = option(False, "end with 0 where sets are missing, the others having been scored")
    encoder: str = option(
        "", "encoder, for example open_clip:RN50/openai, local-dir:PATH; `demo` = built-in, empty in the demo suite"
    )
    head: str = option("", f"head of that encoder, a file of train/probe.py; empty in the demo suite = {DEMO_HEAD}")
    name: str = option("", "what rows and tables call the two; empty = the encoder's name")
    models: str = option("", "instead of these three: YAML file, a list of {name, encoder, head}")
    table: str = option("", "CSV of models that the line is fitted to, in percent; empty = the published one")
    predictions: str = option("", "CSV file to write, a row for each image and model; empty = none")
    images: int = option(256, "images at a time through an encoder, per process")
    workers: int = option(2, "decoding processes per process; 0 = decode in the process itself")
    decoder: Literal["torchvision", "pil"] = option(
        "torchvision", "image decoder; pil = bit-exact reference, under half as fast"
    )
    allow_pipe: bool = option(False, "allow `pipe:COMMAND` as a shard, which runs COMMAND in a shell")
    out: str = option("runs/shifts", "run folder")

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
        if self.models and (self.encoder or self.head or self.name):
            raise ConfigError("--models takes the place of --encoder, --head and --name; give one or the other")
        if not self.models and not (self.encoder and self.head) and self.suite != "demo":
            raise ConfigError("give --encoder and --head, or --models with a file that lists several")


@dataclass(frozen=True)
class Found:
    """A set and its shards; partial: a sample of the set was announced."""

    shift_set: ShiftSet
    shards: ShardSet
    partial: bool


# ----------------------------------------------------------------------------------------------------------------------
# What is to be scored
# ----------------------------------------------------------------------------------------------------------------------


def read_pairs(config: Config) -> list[Pair]:
    """The pairs that the settings name. Raises ConfigError for a file of models that is not one."""
    from eval.scoring import Pair

    if not config.models:
        encoder = config.encoder or "demo"  # only the demo suite may do without
        if not config.head and not Path(DEMO_HEAD).is_file():
            raise ConfigError(f"no {DEMO_HEAD} here yet: run train/probe.py, without --data, or give --head")
        return [Pair(config.name or encoder, encoder, config.head or DEMO_HEAD)]
    import yaml

    try:
        content = yaml.safe_load(Path(config.models).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"--models {config.models}: cannot be read ({' '.join(str(error).split())})") from None
    names = {field.name for field in dataclasses.fields(Pair)}
    entries = content if isinstance(content, list) else []
    for entry in entries:
        if not (isinstance(entry, dict) and set(entry) == names and all(isinstance(v, str) for v in entry.values())):
            raise ConfigError(f"--models {config.models}: an entry has name, encoder and head, all text, not {entry}")
    pairs = [Pair(**entry) for entry in entries]
    if not pairs or len({pair.name for pair in pairs}) < len(pairs):
        raise ConfigError(f"--models {config.models}: expected a list of {{name, encoder, head}}, names being distinct")
    return pairs


def find_sets(config: Config, suite: Suite) -> tuple[list[Found], dict[str, str]]:
    """The sets that are there, checked against the table, and where each missing one was looked for.

    Raises DataError for shards that are not the set, for a place in --sets that has none, and if no set is there.
    """
    from data.demo import demo_shards
    from data.tar import find_shards

    root = os.path.dirname(demo_shards(suite.in_distribution)) if config.data == "demo" else config.data.rstrip("/")
    found, missing = [], {}
    for name, shift_set in suite.sets.items():
        place = config.sets.get(name, f"{root}/{name}")
        if shift_set.part_of:
            continue
        if name not in config.sets and not scheme(root) and not os.path.isdir(os.path.expanduser(place)):
            if name in (suite.in_distribution, *suite.shifts):
                missing[name] = place
            continue
        shards = find_shards(place, allow_pipe=config.allow_pipe)
        partial = name in config.partial
        check_set(shards, dataclasses.replace(shift_set, num_images=None) if partial else shift_set)
        found.append(Found(shift_set, shards, partial))
    if not found:
        raise DataError(f"{root} holds none of the sets {', '.join(missing)}; each is a folder of shards of that name")
    return found, missing


def published_lines(config: Config, suite: Suite) -> dict[str, Baseline]:
    """The line of each shift of the suite, from --table or the published table; none for the demo without a table.

    Raises DataError for a table that lacks a set, or cannot be read.
    """
    if not config.table and suite.name == "demo":
        return {}
    table = read_table(config.table or TABLE)
    return {name: baseline(name, suite.in_distribution, table=table) for name in suite.shifts}


# ----------------------------------------------------------------------------------------------------------------------
# What is told
# ----------------------------------------------------------------------------------------------------------------------


def show(
    name: str,
    scores: dict[str, Score],
    suite: Suite,
    mean: float | None,
    robustness: dict[str, Estimate],
    partial: set[str],
) -> None:
    """Prints the table of one model: percent, with 95 % intervals. mean: of the official top-1 over the shifts."""

    def percent(value: float, interval: Sequence[float] | None = None, sign: str = "") -> str:
        text = f"{100 * value:{sign}.2f}"
        return f"{text} ({100 * interval[0]:{sign}.1f}..{100 * interval[1]:{sign}.1f})" if interval else text

    lines = []
    for one in (suite.sets[name] for name in scores):
        if one.part_of:
            continue
        score, control = scores[one.name], suite.control_of(one.name).name
        known = one.name != suite.in_distribution and control in scores
        estimate = robustness.get(one.name)
        lines.append(
            [
                one.title + (" (sample)" if one.name in partial else ""),
                f"{score.n:,}",
                percent(score.correct / score.n, wilson(score.correct, score.n)),
                percent(score.plain_correct / score.n),
                percent(scores[control].correct / scores[control].n) if known else "",
                percent(estimate.value, (estimate.low, estimate.high), "+") if estimate else "",
            ]
        )
    if mean is not None:
        estimate = robustness.get(MEAN)
        gain = percent(estimate.value, (estimate.low, estimate.high), "+") if estimate else ""
        lines.append([f"mean of {len(suite.shifts)} shifts", "", percent(mean), "", "", gain])
    in_distribution = f"{suite.sets[suite.in_distribution].title}, same classes"
    columns = ["images", "official top-1", "plain top-1", in_distribution, "effective robustness"]
    if not robustness:
        columns, lines = columns[:-1], [line[:-1] for line in lines]
    print()
    print_table([name, *columns], lines)


class Predictions:
    """A CSV file with a row for each image and model, which is there when all sets are through."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError where the file cannot be written."""
        self._path, self._temporary = path, path.with_name(f".tmp-{path.name}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._temporary, "w", newline="", encoding="utf-8")  # noqa: SIM115  closed below
        except OSError as error:
            raise ConfigError(f"--predictions {path}: cannot be written ({error.strerror or error})") from None
        self._writer = csv.writer(self._file)
        self._writer.writerow(["model", "set", "index", "key", "label", "predicted", "correct", "confidence"])

    def add(self, model: str, set_name: str, keys: Sequence[str], answers: Answers) -> None:
        """Rows of a set; keys: of its images in order."""
        columns = answers.index, answers.label, answers.predicted, answers.rank == 0, answers.confidence
        for key, row in zip(keys, zip(*(column.tolist() for column in columns), strict=True), strict=True):
            index, label, predicted, correct, confidence = row
            self._writer.writerow([model, set_name, index, key, label, predicted, int(correct), f"{confidence:.6f}"])

    def finish(self) -> None:
        """Gives the file its name."""
        self._file.close()
        os.replace(self._temporary, self._path)

    def discard(self) -> None:
        """Removes what was not finished."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)


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
# The run
# ----------------------------------------------------------------------------------------------------------------------


def main(config: Config) -> dict[str, Any]:
    """Scores the models and returns the results (on rank 0) and the missing sets.

    Raises:
        ConfigError, DataError, ModelError: anything a user can cause, in one line; missing sets only at the end.
        StopRequested: after a stop signal.
    """
    with StopSignals() as signals, contextlib.ExitStack() as resources:
        return evaluate(config, signals, resources)


def evaluate(config: Config, signals: StopSignals, resources: contextlib.ExitStack) -> dict[str, Any]:
    # --- Launch -------------------------------------------------------------------------------------------------------
    out, suite, pairs = Path(config.out), SUITES[config.suite], read_pairs(config)
    accelerator = start_accelerator(None, out)
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    agreement = Agreement(rank, world)
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(message)s", force=True)

    import torch
    from accelerate.utils import gather_object

    from data import demo
    from data.stream import open_pass
    from data.transforms import EvalTransform
    from eval.scoring import Answers, answer_batch, compare, load_models, mean_of_shifts, rows_of, summarise

    # --- Models and sets ----------------------------------------------------------------------------------------------
    with agreement.together():  # one process of each machine builds the demo, the others then find it
        if config.data == "demo" and accelerator.is_local_main_process:
            demo.demo_shards(suite.in_distribution)
    folder: RunFolder | None = None
    predictions: Predictions | None = None
    with agreement.together():
        models = load_models(pairs, suite, device)
        found, missing = find_sets(config, suite)
        published = published_lines(config, suite)
        if rank == 0:
            folder = RunFolder(out, fresh=False)
            resources.callback(folder.close)
            if config.predictions:
                predictions = Predictions(Path(config.predictions))
                resources.callback(predictions.discard)
            folder.write_config(config)
            folder.write_environment(accelerator)
    agreement.same(
        (
            [(model.encoder_sha256, model.head_sha256) for model in models],
            [(one.shift_set.name, one.shards.fingerprint) for one in found],
            missing,
        ),
        "models or sets",
    )
    partial = {one.shift_set.name for one in found if one.partial}
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
    where = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    log.info("device   %s, mixed precision %s", where, accelerator.mixed_precision)

    def write(place: int, fields: dict[str, Any]) -> None:
        model = models[place]
        row = {
            **fields,
            "suite": suite.name,
            "model": model.pair.name,
            "encoder": model.encoder.name,
            "encoder_sha256": model.encoder_sha256,
            "head": model.pair.head,
            "head_sha256": model.head_sha256,
            "preprocessing": f"short side to {model.encoder.image_size} px (bicubic), centre square; {config.decoder}",
            "precision": accelerator.mixed_precision,
        }
        rows.append(row)
        if folder is not None and not any(all(old.get(k) == row.get(k) for k in IDENTITY) for old in earlier):
            append_row(out / "results.jsonl", **row, config=dataclasses.asdict(config), device=str(device))

    # --- Passes: every set once for each size -------------------------------------------------------------------------
    rows: list[dict[str, Any]] = []
    earlier = folder.results() if folder is not None else []
    scores: list[dict[str, Score]] = [{} for _ in models]
    sizes = sorted({model.encoder.image_size for model in models})
    batches_of = {one.shift_set.name: -(-one.shards.num_samples // config.images) for one in found}
    steps = sum(-(-batches // world) for batches in batches_of.values()) * len(sizes)
    progress = Progress(0, steps, config.images * world, shown=rank == 0)
    resources.enter_context(contextlib.closing(progress))
    done, last_line = 0, time.monotonic()
    for one in found:
        set_name, batches = one.shift_set.name, batches_of[one.shift_set.name]
        protocols = [one.shift_set, *(other for other in suite.sets.values() if other.part_of == set_name)]
        own = range(batches * rank // world, batches * (rank + 1) // world)
        parts: dict[Which, list[Answers]] = collections.defaultdict(list)
        keys: list[str] = []
        for size in sizes:
            transform = EvalTransform(size, border=one.shift_set.border, decoder=config.decoder)
            with contextlib.ExitStack() as opened:
                with agreement.together():
                    # Batches of the whole set, of which a process takes neighbouring ones: any number of processes has
                    # the same batches, and with them the same roundings.
                    stream = opened.enter_context(
                        open_pass(
                            one.shards,
                            batch_size=config.images,
                            workers=config.workers,
                            transform=transform,
                            start=own.start,
                            allow_pipe=config.allow_pipe,
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
                            if config.predictions and size == sizes[0]:
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
        with agreement.together():
            for place, protocol in itertools.product(range(len(models)) if rank == 0 else [], protocols):
                which = place, protocol.name
                answers = Answers.joined([of_rank[which] for of_rank in gathered if which in of_rank])
                if protocol is one.shift_set:
                    if not np.array_equal(answers.index, np.arange(one.shards.num_samples)):
                        raise DataError(f"{set_name}: not one answer to each image; did its shards change meanwhile?")
                    if predictions is not None:
                        predictions.add(models[place].pair.name, set_name, all_keys, answers)
                if len(answers.index):  # a sample may have no image of a control's classes
                    scores[place][protocol.name] = score = summarise(answers, protocol)
                    of_set = {"partial": one.partial, "data_fingerprint": one.shards.fingerprint}
                    for row in rows_of(score, protocol):
                        write(place, {**row, **of_set})
        say(progress, f"scored   {set_name}", device)

    # --- Comparison ---------------------------------------------------------------------------------------------------
    complete = {one.shift_set.name for one in found} - partial
    with agreement.together():
        for place, model in enumerate(models if rank == 0 else []):
            robustness = compare(scores[place], suite, published, complete)
            for set_name, estimate in robustness.items():
                about = {"metric": "effective_robustness", "set": set_name, "value": estimate.value}
                if set_name != MEAN:
                    about |= {"n": scores[place][set_name].n, "line": dataclasses.asdict(published[set_name].fit)}
                about |= {"interval": [estimate.low, estimate.high], "in_distribution": suite.in_distribution}
                write(place, {**about, "table": config.table or TABLE.name})
            mean = mean_of_shifts(scores[place], suite)
            if mean is not None:
                of_set = {"set": MEAN, "over": [*suite.shifts], "partial": not {*suite.shifts} <= complete}
                write(place, {"metric": "official_top1", "value": mean, **of_set})
            show(model.pair.name, scores[place], suite, mean, robustness, partial)
        if predictions is not None:
            predictions.finish()
    log.info("written  %s: results.jsonl%s", out, f"; {config.predictions}" if config.predictions else "")

    # --- End ----------------------------------------------------------------------------------------------------------
    if missing and not config.allow_missing:
        absent = DataError(
            f"missing: {', '.join(missing)}; the other sets are scored. Put shards at {next(iter(missing.values()))}, "
            "name places with --sets.NAME, or give --allow_missing true"
        )
        agreement.settle(absent if rank == 0 else None)
    accelerator.end_training()
    return {"rows": rows, "missing": [*missing]}


if __name__ == "__main__":
    run_script(main, Config, __doc__.splitlines()[0], "shifts_demo.yaml")
