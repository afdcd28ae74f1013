"""How well do an encoder and a head do in distribution, and on the five shift sets? From weights to a verdict.

    accelerate launch eval/shifts.py                                       built-in demo, after train/probe.py: 10 s
    accelerate launch eval/shifts.py --data /data/shards --head runs/probe/head.safetensors \\
        --name student                                                     one GPU
    accelerate launch --config_file train/launch/gpu_8_bf16.yaml eval/shifts.py --data /data/shards \\
        --models models.yaml --predictions runs/shifts/predictions.csv     eight GPUs

--data is a folder with a folder of shards for each set, under the names of data/shifts.py (imagenet, imagenet_v2,
imagenet_r, objectnet, imagenet_sketch, imagenet_a; imagenet_v2_threshold and imagenet_v2_top are scored where they are
there); sets elsewhere are named one by one: --sets.objectnet URL. The encoder is the one that the head's file names,
unless --encoder gives another place of the same weights. models.yaml lists several pairs, each as

    - {name: student, head: runs/probe/head.safetensors, encoder: local-dir:runs/rn50/export}      # encoder: if needed

Each set is read once for each input size of the encoders, and each encoder computes its features once for all its
heads. Batches are cut from the set as a whole, so that neither an image nor its answer depends on the number of
processes. Every image counts exactly once; a set that has not the published number of images or classes is refused,
unless --partial names it as a sample.

Two numbers come from the same logits: `official`, the published protocol, and `plain`, argmax over all classes
(data/shifts.py). A set is compared with the same classes in distribution, which the pass in distribution gives too, and
with the line of published models (eval/robustness.py). Cost: one encoder forward per image; 167,000 images in all.

Writes into --out: config.yaml, env.json, and results.jsonl, to which runs on other models add their rows; with
--predictions (the demo has it on) also what was said to every image, as CSV.
"""

from __future__ import annotations

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import contextlib
import csv
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.shifts import SUITES, Suite
from eval.common import print_table
from eval.passes import (
    ResultRows,
    SetSettings,
    find_sets,
    log_plan,
    published_lines,
    report_missing,
    score_sets,
)
from eval.robustness import MEAN, TABLE, Estimate, wilson
from train.common import ConfigError, RunFolder, option, run_script
from train.launching import StopSignals, build_demo, start_run

if TYPE_CHECKING:
    from eval.scoring import Answers, Pair, Score

# Where train/probe.py leaves the demo's heads, and what they are called.
DEMO_HEADS = {"student": "runs/demo_probe/head.safetensors", "teacher": "runs/demo_probe/reference/head.safetensors"}
log = logging.getLogger("shiftlens")


@dataclass(frozen=True)
class Config(SetSettings):
    """Settings."""

    head: str = option("", "head, a file of train/probe.py; empty in the demo suite = the heads of its demo")
    encoder: str = option(
        "", "its encoder: open_clip:RN50/openai, local-dir:PATH, `demo` = built-in; empty = the one that --head names"
    )
    name: str = option("", "what rows and tables call the two; empty = the encoder's name")
    models: str = option("", "instead of these three: YAML file, a list of {name, head, encoder}")
    predictions: str = option(
        "", "CSV file to write, a row for each image and model; a name without a folder lies in --out; empty = none"
    )
    out: str = option("runs/shifts", "run folder")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.models and (self.encoder or self.head or self.name):
            raise ConfigError("--models takes the place of --encoder, --head and --name; give one or the other")
        if not self.models and not self.head and (self.encoder or self.name or self.suite != "demo"):
            raise ConfigError("--head is missing; or give --models, with a file that lists several pairs")

    @property
    def predictions_file(self) -> Path | None:
        """Where predictions go: a recipe's bare name follows another --out, so that no run replaces another's."""
        file = Path(self.predictions)
        return (Path(self.out) / file if len(file.parts) == 1 else file) if self.predictions else None


# ----------------------------------------------------------------------------------------------------------------------
# What is to be scored
# ----------------------------------------------------------------------------------------------------------------------


def read_pairs(config: Config) -> list[Pair]:
    """The pairs that the settings name, else those of the demo that are there. Raises ConfigError if there is none."""
    from eval.scoring import Pair

    if config.head:
        return [Pair(config.name, config.encoder, config.head)]
    if not config.models:
        pairs = [Pair(name, "", head) for name, head in DEMO_HEADS.items() if Path(head).is_file()]
        if not pairs:
            missing = " or ".join(DEMO_HEADS.values())
            raise ConfigError(
                f"no {missing} here yet: run `accelerate launch train/distill.py`, then `accelerate launch "
                "train/probe.py`, or give --head"
            )
        return pairs
    import yaml

    try:
        content = yaml.safe_load(Path(config.models).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"--models {config.models}: cannot be read ({' '.join(str(error).split())})") from None
    entries = content if isinstance(content, list) else []
    for entry in entries:
        known = isinstance(entry, dict) and {"name", "head"} <= set(entry) <= {"name", "head", "encoder"}
        if not (known and all(isinstance(value, str) and value for value in entry.values())):
            raise ConfigError(
                f"--models {config.models}: an entry has name, head and, if needed, encoder, all text, not {entry}"
            )
    pairs = [Pair(**{"encoder": "", **entry}) for entry in entries]
    if not pairs or len({pair.name for pair in pairs}) < len(pairs):
        raise ConfigError(f"--models {config.models}: expected a list of {{name, head, encoder}}, names being distinct")
    return pairs


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
    accelerator, agreement = start_run(out, resources)
    rank, device = agreement.rank, accelerator.device

    from eval.scoring import compare_sets, load_models, rows_of, summarise

    # --- Models and sets ----------------------------------------------------------------------------------------------
    build_demo(accelerator, agreement, config.data)
    results: ResultRows | None = None
    predictions: Predictions | None = None
    with agreement.together():
        models = load_models(pairs, suite, device)
        found, missing = find_sets(config, suite)
        published = published_lines(config, suite)
        if rank == 0:
            folder = RunFolder(out, fresh=False)
            resources.callback(folder.close)
            if config.predictions_file is not None:
                predictions = Predictions(config.predictions_file)
                resources.callback(predictions.discard)
            folder.write_config(config)
            folder.write_environment(accelerator)
            results = ResultRows(folder, config, accelerator)
    agreement.same(
        (
            [(model.encoder_sha256, model.head_sha256) for model in models],
            [(one.shift_set.name, one.shards.fingerprint) for one in found],
            missing,
        ),
        "models or sets",
    )
    log_plan(models, found, missing, published, suite, accelerator)

    # --- Passes: every set once for each size -------------------------------------------------------------------------
    scores: list[dict[str, Score]] = [{} for _ in models]
    passes = score_sets(
        models, found, suite, config, accelerator, agreement, signals, keep_keys=bool(config.predictions)
    )
    for scored in passes:
        of_set = {"partial": scored.found.partial, "data_fingerprint": scored.found.shards.fingerprint}
        with agreement.together():
            for (place, set_name), answers in scored.answers.items():
                protocol, model = suite.sets[set_name], models[place]
                if predictions is not None and not protocol.part_of:
                    predictions.add(model.pair.name, set_name, scored.keys, answers)
                scores[place][set_name] = score = summarise(answers, protocol)
                if results is not None:
                    for row in rows_of(score, protocol):
                        results.add(model, {**row, **of_set})

    # --- Comparison ---------------------------------------------------------------------------------------------------
    partial = {one.shift_set.name for one in found if one.partial}
    complete = {one.shift_set.name for one in found} - partial
    with agreement.together():
        for place, model in enumerate(models):
            if results is not None:
                comparison = compare_sets(scores[place], suite, published, complete, config.table or TABLE.name)
                for row in comparison.rows:
                    results.add(model, row)
                show(model.pair.name, scores[place], suite, comparison.mean, comparison.robustness, partial)
        if predictions is not None:
            predictions.finish()
    log.info("written  %s: results.jsonl%s", out, f"; {config.predictions_file}" if config.predictions else "")

    # --- End ----------------------------------------------------------------------------------------------------------
    if not config.allow_missing:
        report_missing(missing, agreement)
    accelerator.end_training()
    return {"rows": results.rows if results is not None else [], "missing": [*missing]}


if __name__ == "__main__":
    run_script(main, Config, __doc__.splitlines()[0], "shifts_demo.yaml")
