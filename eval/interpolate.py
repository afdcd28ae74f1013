"""What lies between an encoder before and after fine-tuning? Accuracy in distribution and under shift along the line.

WiSE-FT (Wortsman et al. 2022, Robust fine-tuning of zero-shot models): the weights of encoder and head are averaged,

    (1 - alpha) * start + alpha * end,

and every average is scored on the set in distribution and on the five shift sets, exactly as eval/shifts.py scores a
pair: at alpha 0 and 1 the numbers are that script's.

    accelerate launch eval/interpolate.py              built-in demo, after train/zero_shot.py, train/finetune.py
    accelerate launch eval/interpolate.py --data /data/shards --start_head heads/zero_shot.safetensors \\
        --end_head runs/finetune/head.safetensors --save 0.5                                         one GPU
    accelerate launch --config_file train/launch/gpu_8_bf16.yaml eval/interpolate.py --data /data/shards \\
        --start_head heads/zero_shot.safetensors --end_head runs/finetune/head.safetensors           eight GPUs

Heads name their encoders; --start_encoder and --end_encoder give other places of the same weights. --data, --sets and
--partial are those of eval/shifts.py. Running statistics of batch norm are averaged like weights; integers are those of
the nearer end, at 0.5 of `end`.

Every set that is given is a test set. So the script reports the whole curve and chooses no alpha: 0.5 is the published
choice for when there is nothing to choose by, and is marked; the highest point of the curve is shown for what it is.

Cost: each image is read once, and goes once through each average; 11 x 167,000 forwards with the default --alphas. All
averages are in memory together: per process, for each alpha the encoder once, 4 bytes a parameter (11 of RN50: 1.7 GB,
of ViT-B/16: 3.8 GB, of ViT-L/14: 13 GB); a shorter --alphas takes less.

Writes into --out: config.yaml, env.json, results.jsonl (rows as of eval/shifts.py, with `alpha`), interpolation.png and
.svg, and for each alpha of --save a folder alpha_N with export/ and head.safetensors, a pair for eval/shifts.py.
"""

from __future__ import annotations

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import contextlib
import copy
import dataclasses
import datetime
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.rows import commit
from data.shifts import SUITES, Suite
from eval.common import print_table
from eval.passes import ResultRows, SetSettings, find_sets, log_plan, published_lines, report_missing, score_sets
from eval.robustness import MEAN, TABLE
from models import ModelError
from train.common import ConfigError, RunFolder, option, run_script
from train.launching import StopSignals, build_demo, start_run

if TYPE_CHECKING:
    from eval.scoring import Comparison, Model, Score

PUBLISHED = 0.5  # the alpha that the paper recommends where there is nothing to choose by
log = logging.getLogger("shiftlens")


@dataclass(frozen=True)
class Config(SetSettings):
    """Settings."""

    start_head: str = option("", "head before fine-tuning, a file of train/zero_shot.py or train/probe.py")
    end_head: str = option("", "head after fine-tuning, the head.safetensors of train/finetune.py")
    start_encoder: str = option(
        "", "encoder before: open_clip:ViT-B-16/openai, ...; empty = the one that its head names"
    )
    end_encoder: str = option("", "encoder after; empty = the one that its head names")
    alphas: list[float] = option([step / 10 for step in range(11)], "weights of the end, each in [0, 1]")
    save: list[float] = option([], "those of --alphas whose encoder and head are written to --out")
    name: str = option("", "what rows call the models, before their alpha; empty = the end's encoder")
    out: str = option("runs/interpolate", "run folder")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.alphas or not all(0 <= alpha <= 1 for alpha in self.alphas):
            raise ConfigError(f"--alphas {self.alphas}: one at least, and each in [0, 1]")
        if len({label(alpha) for alpha in self.alphas}) < len(self.alphas):
            raise ConfigError(f"--alphas {self.alphas}: one is there twice")
        if unknown := [alpha for alpha in self.save if alpha not in self.alphas]:
            raise ConfigError(f"--save {unknown}: not among --alphas {self.alphas}")
        if not (self.start_head and self.end_head):
            raise ConfigError("--start_head or --end_head is missing: heads before and after train/finetune.py")


def label(alpha: float) -> str:
    """As rows, tables and folders have it: two digits, more where it has more."""
    return f"{alpha:.2f}" if round(alpha, 2) == alpha else f"{alpha:g}"


# ----------------------------------------------------------------------------------------------------------------------
# Averages
# ----------------------------------------------------------------------------------------------------------------------


def interpolate(start: Model, end: Model, alpha: float, name: str) -> Model:
    """The pair at `alpha`, called `name`, on the device of `start`; at 0 and 1 `start` and `end` themselves."""
    from eval.scoring import Pair
    from models.averages import average_states
    from models.weights import state_sha256

    if alpha in (0, 1):
        point = end if alpha else start
        return dataclasses.replace(point, pair=dataclasses.replace(point.pair, name=name))

    encoder = copy.deepcopy(start.encoder)
    encoder.load_state_dict(average_states(start.encoder.state_dict(), end.encoder.state_dict(), alpha))
    encoder.name, encoder.weights_file = f"between {start.encoder.name} and {end.encoder.name}", None
    tensors = average_states(start.head.state(), end.head.state(), alpha)
    head = dataclasses.replace(start.head, weight=tensors["weight"], bias=tensors["bias"], metadata={})
    return dataclasses.replace(
        start,
        pair=Pair(name, encoder.name, f"between {start.pair.head} and {end.pair.head}"),
        encoder=encoder,
        head=head.to(start.head.weight.device),
        encoder_sha256=state_sha256(encoder.state_dict()),
        head_sha256=state_sha256(tensors),
    )


def check_alike(start: Model, end: Model) -> None:
    """Raises ModelError, naming the first difference, for pairs that are not the same network with other weights.

    That their classes are alike is known: both are the suite's.
    """
    from models.averages import first_difference

    for model in (start, end):
        model.head.require_linear(model.pair.head, "eval/interpolate.py")
    difference = first_difference(start.encoder, end.encoder)
    if not difference and start.head.normalize != end.head.normalize:
        values = f"{start.head.normalize} in the first, {end.head.normalize} in the second"
        difference = f"`normalize` of the head is {values}"
    if difference:
        raise ModelError(
            f"{start.pair.head} and {end.pair.head} cannot be averaged: {difference}; give a pair of encoder and head, "
            "and what train/finetune.py made of it"
        )


# ----------------------------------------------------------------------------------------------------------------------
# What is told
# ----------------------------------------------------------------------------------------------------------------------


def save_pair(model: Model, start: Model, folder: Path, facts: Mapping[str, Any]) -> None:
    """export/ and head.safetensors in `folder`, a pair that names its own encoder. Raises ModelError if it cannot be.

    start: where the text tower comes from, if there is one. facts: JSON values for the model card and the head.
    """
    from models.export import export_student
    from models.heads import save_head

    export = folder / "export"
    for reason in export_student(model.encoder, export, card=facts, source=start.encoder, origin="interpolated"):
        log.info("export   no open_clip folder: %s", reason)
    metadata = {"encoder": f"local-dir:{export}", "encoder_sha256": model.encoder_sha256, **facts}
    head = model.head
    save_head(
        folder / "head.safetensors", head.weight, head.bias, head.classes, normalize=head.normalize, metadata=metadata
    )
    log.info("saved    %s: export/, head.safetensors", folder)


def show(
    alphas: Sequence[float], scores: Sequence[Mapping[str, Score]], found: Sequence[Comparison], suite: Suite
) -> None:
    """Prints official top-1 in percent, a line for each alpha."""
    names = [name for name in (suite.in_distribution, *suite.shifts) if name in scores[0]]
    columns = [suite.sets[name].title for name in names]
    lines = [[f"{100 * of[name].correct / of[name].n:.2f}" for name in names] for of in scores]
    for title, values in (
        (f"mean of {len(suite.shifts)} shifts", [one.mean for one in found]),
        ("effective robustness", [one.robustness[MEAN].value if MEAN in one.robustness else None for one in found]),
    ):
        if None not in values:
            columns.append(title)
            sign = "+" if title.startswith("effective") else ""
            lines = [[*line, f"{100 * (value or 0):{sign}.2f}"] for line, value in zip(lines, values, strict=True)]
    first = [label(alpha) + (" (published choice)" if alpha == PUBLISHED else "") for alpha in alphas]
    print()
    print_table(["alpha", *columns], [[text, *line] for text, line in zip(first, lines, strict=True)])


def draw(
    alphas: Sequence[float],
    scores: Sequence[Mapping[str, Score]],
    means: Sequence[float | None],
    suite: Suite,
    title: str,
    out: Path,
) -> None:
    """interpolation.png and .svg: mean of the shifts over accuracy in distribution if both are known; sets over alpha.

    alphas: ascending; scores, means: as many.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [name for name in (suite.in_distribution, *suite.shifts) if name in scores[0]]
    accuracy = {name: [100 * of[name].correct / of[name].n for of in scores] for name in names}
    shifted = [100 * mean for mean in means if mean is not None]
    has_curve = len(shifted) == len(alphas) and suite.in_distribution in names
    figure, panels = plt.subplots(
        1, 1 + has_curve, figsize=(5.5 * (1 + has_curve), 4.6), layout="constrained", squeeze=False
    )
    if has_curve:
        curve, across = panels[0, 0], accuracy[suite.in_distribution]
        curve.plot(across, shifted, "-o", color="tab:blue", markersize=3.5, linewidth=1.4)
        best = max(range(len(alphas)), key=lambda place: shifted[place])
        marks = [
            ("s", "tab:gray", "start (alpha 0)", 0.0),
            ("D", "tab:orange", "end (alpha 1)", 1.0),
            ("*", "tab:red", f"alpha {label(PUBLISHED)}, the published choice", PUBLISHED),
        ]
        for marker, colour, text, alpha in marks:
            if alpha in alphas:
                place = alphas.index(alpha)
                size = 13 if marker == "*" else 7
                curve.plot(across[place], shifted[place], marker, color=colour, markersize=size, label=text)
        text = f"highest mean, alpha {label(alphas[best])}: seen on these\ntest sets, so not a result"
        curve.plot(across[best], shifted[best], "o", mfc="none", mec="black", markersize=15, label=text)
        for place, alpha in enumerate(alphas):
            curve.annotate(
                f"{alpha:g}", (across[place], shifted[place]), (4, -9), textcoords="offset points", fontsize=7
            )
        titles = suite.sets[suite.in_distribution].title, f"mean of {len(suite.shifts)} shift sets"
        curve.set(xlabel=f"top-1 on {titles[0]}, %", ylabel=f"top-1, {titles[1]}, %", title=title)
        curve.margins(0.12)
        curve.legend(fontsize=7)
    over = panels[0, -1]
    for place, name in enumerate(names):
        base = name == suite.in_distribution
        style = {"color": "black", "linewidth": 2.2} if base else {"color": f"C{place}", "linewidth": 1.3}
        over.plot(alphas, accuracy[name], "-o", markersize=3, label=suite.sets[name].title, **style)
    if len(shifted) == len(alphas):
        over.plot(alphas, shifted, "--", color="tab:blue", linewidth=2.0, label=f"mean of {len(suite.shifts)} shifts")
    over.axvline(PUBLISHED, color="tab:red", linewidth=0.8, linestyle=":")
    over.set(xlabel="alpha, the weight of the fine-tuned end", ylabel="official top-1, %", title="each set")
    over.legend(fontsize=7)
    for panel in panels.flat:
        panel.grid(alpha=0.3)
    for suffix in ("png", "svg"):
        figure.savefig(out / f"interpolation.{suffix}", dpi=150)
    plt.close(figure)


# ----------------------------------------------------------------------------------------------------------------------
# The run
# ----------------------------------------------------------------------------------------------------------------------


def main(config: Config) -> dict[str, Any]:
    """Scores the averages and returns the results (on rank 0) and the missing sets.

    Raises:
        ConfigError, DataError, ModelError: anything a user can cause, in one line; missing sets only at the end.
        StopRequested: after a stop signal.
    """
    with StopSignals() as signals, contextlib.ExitStack() as resources:
        return evaluate(config, signals, resources)


def evaluate(config: Config, signals: StopSignals, resources: contextlib.ExitStack) -> dict[str, Any]:
    # --- Launch -------------------------------------------------------------------------------------------------------
    out, suite, alphas = Path(config.out), SUITES[config.suite], sorted(config.alphas)
    if absent := [head for head in (config.start_head, config.end_head) if not Path(head).is_file()]:
        raise ConfigError(
            f"no {' and no '.join(absent)} here: run first `python train/zero_shot.py`, then `accelerate launch "
            "train/finetune.py`, which starts from its head (both do the demo if nothing else is given)"
        )
    accelerator, agreement = start_run(out, resources)
    rank, device = agreement.rank, accelerator.device

    from eval.scoring import Pair, compare_sets, load_models, rows_of, summarise

    # --- Ends, averages and sets --------------------------------------------------------------------------------------
    build_demo(accelerator, agreement, config.data)
    results: ResultRows | None = None
    with agreement.together():
        pairs = [
            Pair("start", config.start_encoder, config.start_head),
            Pair("end", config.end_encoder, config.end_head),
        ]
        start, end = load_models(pairs, suite, device)
        check_alike(start, end)
        name = config.name or end.pair.encoder
        models = [interpolate(start, end, alpha, f"{name} alpha {label(alpha)}") for alpha in alphas]
        found, missing = find_sets(config, suite)
        published = published_lines(config, suite)
        if rank == 0:
            folder = RunFolder(out, fresh=False)
            resources.callback(folder.close)
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
    ends = {
        which: {
            "encoder": model.encoder.name,
            "encoder_sha256": model.encoder_sha256,
            "head": model.pair.head,
            "head_sha256": model.head_sha256,
        }
        for which, model in (("start", start), ("end", end))
    }
    log_plan([start, end], found, missing, published, suite, accelerator)
    size = sum(tensor.numel() * tensor.element_size() for tensor in start.encoder.state_dict().values())
    log.info("to do    alpha %s", ", ".join(map(label, alphas)))
    log.info("memory   %d encoders of %.1f MB", len({id(one.encoder) for one in (start, end, *models)}), size / 1e6)
    origin = end.head.metadata.get("start")
    if not isinstance(origin, dict) or origin.get("encoder_sha256") != start.encoder_sha256:
        log.warning("start    %s does not say that it was fine-tuned from these weights", config.end_head)

    with agreement.together():
        for alpha, model in zip(alphas, models, strict=True):
            if rank == 0 and alpha in config.save:
                facts = {
                    "source": "weights averaged, (1 - alpha) * start + alpha * end, encoder and head",
                    "alpha": alpha,
                    **ends,
                    "data": end.head.metadata.get("data", "unknown"),
                    "commit": commit(),
                    "date": datetime.date.today().isoformat(),
                }
                save_pair(model, start, out / f"alpha_{label(alpha)}", facts)

    # --- Passes: every set once for all averages ----------------------------------------------------------------------
    scores: list[dict[str, Score]] = [{} for _ in models]
    for scored in score_sets(models, found, suite, config, accelerator, agreement, signals):
        of_set = {"partial": scored.found.partial, "data_fingerprint": scored.found.shards.fingerprint}
        with agreement.together():
            for (place, set_name), answers in scored.answers.items():
                scores[place][set_name] = score = summarise(answers, suite.sets[set_name])
                if results is not None:
                    for row in rows_of(score, suite.sets[set_name]):
                        results.add(models[place], {**row, **of_set, "alpha": alphas[place], **ends})

    # --- Comparison ---------------------------------------------------------------------------------------------------
    complete = {one.shift_set.name for one in found if not one.partial}
    with agreement.together():
        if results is not None:
            table = config.table or TABLE.name
            comparisons = [compare_sets(of, suite, published, complete, table) for of in scores]
            for alpha, model, comparison in zip(alphas, models, comparisons, strict=True):
                for row in comparison.rows:
                    results.add(model, {**row, "alpha": alpha, **ends})
            show(alphas, scores, comparisons, suite)
            means = [comparison.mean for comparison in comparisons]
            draw(alphas, scores, means, suite, name, out)
    log.info("note     no alpha is chosen: these are test sets; %s is the published choice", label(PUBLISHED))
    log.info("written  %s: results.jsonl, interpolation.png", out)

    # --- End ----------------------------------------------------------------------------------------------------------
    if not config.allow_missing:
        report_missing(missing, agreement)
    accelerator.end_training()
    return {"rows": results.rows if results is not None else [], "missing": [*missing]}


if __name__ == "__main__":
    run_script(main, Config, __doc__.splitlines()[0], "interpolate_demo.yaml")
