"""A grid of probes timed beside the same heads trained one after the other: what `eval/throughput.py probe` runs.

Apart from the script, which only reads the command line and has other measurements.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data import DataError
from eval.common import Spread, check_outputs, print_table, save_figure, spread
from eval.operations import device
from eval.turns import ratio, take_turns

if TYPE_CHECKING:
    import torch

    from data.features import Features, Identity
    from train.heads import Arithmetic, Point

# The grid's time against the best loop, and against the loop as most people write it. On a GPU single heads are bound
# by launches; on a CPU the products are all there is, and the grid only must not lose.
TARGETS = {("cuda", 8): 3.0, ("cuda", 52): 2.0}
LOOPS = {"one by one": False, "one by one, fused AdamW": True}  # and whether AdamW is the fused one
COLOURS = {"one by one": "#b5b5b5", "one by one, fused AdamW": "#7a7a7a", "ours": "#1f5fa8"}
AGREEMENT = 1e-5  # between weights of float32 heads trained in a grid and alone


@dataclass(frozen=True)
class Config:
    """What to measure; `eval/throughput.py probe --help` says it in words."""

    device: str = "cuda"
    heads: tuple[int, ...] = (8, 52)
    precision: tuple[str, ...] = ("fp32", "bf16")
    classes: int = 1000
    width: int = 1024
    batch_size: int = 256
    steps: int = 32
    rounds: int = 5
    cache_samples: int = 128_117
    rows: str = "runs/benchmarks.jsonl"
    figure: str = ""


@dataclass(frozen=True)
class Figure:
    """One number of one case; what is not of a case has no heads."""

    metric: str
    value: Spread
    heads: int | None = None
    precision: str = ""
    competitor: str = ""
    target: float | None = None


def main(config: Config) -> list[dict[str, Any]]:
    """Runs the measurement, prints it, writes rows and figure, and returns the rows.

    Raises DataError without the device, for paths that cannot be written, and where the two ways do not give the same
    heads.
    """
    import torch

    from data.rows import append_row

    if config.device == "cuda" and not torch.cuda.is_available():
        raise DataError("no CUDA device here; --device cpu measures one thread")
    check_outputs(config.rows, config.figure)
    if config.steps < 2:
        raise DataError("--steps must be at least 2: the first one allocates what the others use")
    if config.device == "cpu":
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)  # as train/probe.py does
    torch.backends.cuda.matmul.allow_tf32 = False
    figures: list[Figure] = []
    try:
        with tempfile.TemporaryDirectory(prefix="throughput-") as scratch:
            data = synthetic_features(Path(scratch), config).gathered(torch.device(config.device))
            for heads, precision in itertools.product(config.heads, config.precision):
                figures += measure_grid(data, heads, precision, config)
            del data
            if config.cache_samples:
                figures += measure_cache(Path(scratch), config)
    finally:
        torch.set_flush_denormal(False)  # numpy complains of it when the figure is drawn
    about = {**device(config.device), "config": asdict(config)}
    rows = []
    for figure in figures:
        fields = {name: value for name, value in asdict(figure).items() if name not in ("metric", "value")}
        rows.append(append_row(Path(config.rows), metric=figure.metric, **fields, **figure.value.fields(), **about))
    report(rows)
    if config.figure:
        draw(rows, config.figure)
    return rows


# ------------------------------------------------------------------------------------------------------------- inputs


def identity(samples: int, config: Config) -> Identity:
    """Of features that no encoder has computed, in fp16, with as many parts as such a data set gets."""
    from data.features import Identity

    names = tuple(map(str, range(config.classes)))
    return Identity({"weights_sha256": "synthetic"}, "none", "none", samples, names, config.width, "fp16", "no")


def fill(folder: Path, samples: int, config: Config) -> tuple[Features, float]:
    """A finished cache of gaussian clouds around a centre for each class, and the seconds of writing it."""
    import torch

    from data.features import FeatureCache

    cache = FeatureCache(folder, identity(samples, config))
    cache.check_space()
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(config.classes, config.width, generator=generator)
    seconds = 0.0
    for part in range(cache.parts):
        index = torch.arange(samples * part // cache.parts, samples * (part + 1) // cache.parts)
        labels = index * 7919 % config.classes
        rows = (centres[labels] + torch.randn(len(index), config.width, generator=generator)).half()
        started = time.perf_counter()
        cache.write(part, rows, labels, index)
        seconds += time.perf_counter() - started
    started = time.perf_counter()
    features = cache.finish()
    return features, seconds + time.perf_counter() - started


def synthetic_features(scratch: Path, config: Config) -> Features:
    """Enough rows for all steps, from a cache on disk."""
    return fill(scratch / "grid", config.steps * config.batch_size, config)[0]


def grid(heads: int) -> list[Point]:
    """As many points, of as many learning rates as it takes and two weight decays."""
    from train.heads import Point

    rates = [10 ** (-4 + 3 * i / max(1, heads // 2)) for i in range(math.ceil(heads / 2))]
    return [Point(False, True, 0.0, lr=lr, weight_decay=decay) for lr in rates for decay in (1e-3, 0.1)][:heads]


# --------------------------------------------------------------------------------------------------------- the grid


def one_by_one(data: Features, points: Sequence[Point], arithmetic: Arithmetic, fused: bool, config: Config) -> Any:
    """Every head trained alone on all batches, as PyTorch is commonly used; returns their weights.

    The default of torch.optim.AdamW is fused=None: a loop over parameters on a CPU, foreach on a GPU.
    """
    import torch
    import torch.nn.functional as F

    weights = []
    for point in points:
        torch.manual_seed(0)
        head = torch.nn.Linear(config.width, config.classes)
        torch.nn.init.zeros_(head.bias)
        head.to(arithmetic.device)
        assert point.lr is not None
        assert point.weight_decay is not None
        optimizer = torch.optim.AdamW(
            head.parameters(), lr=point.lr, weight_decay=point.weight_decay, fused=True if fused else None
        )
        for step, (features, labels) in enumerate(batches(data, config)):
            with arithmetic.context():
                loss = F.cross_entropy(head(features.float()), labels)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = point.lr * share(step, config)
            optimizer.step()
        weights.append(head.weight.detach())
    return torch.stack(weights)


def ours(data: Features, points: Sequence[Point], arithmetic: Arithmetic, config: Config) -> Any:
    """All heads at once, by the classes and in the order of train/probe.py; returns their weights."""
    import torch

    from train.heads import HeadBlock, cut_into_blocks
    from train.probing import batches_at_a_time, grouped

    numbers = cut_into_blocks(points, arithmetic.device)
    blocks = [
        HeadBlock([points[n] for n in block], config.classes, config.width, seed=0, clip=1.0, arithmetic=arithmetic)
        for block in numbers
    ]
    for group in grouped(enumerate(batches(data, config)), batches_at_a_time(data, config.batch_size)):
        for heads in blocks:
            for step, (features, labels) in group:
                heads.step(features, labels, share(step, config))
    return torch.cat([heads.weight for heads in blocks])[torch.tensor(list(itertools.chain(*numbers))).argsort()]


def batches(data: Features, config: Config) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The same ones for everybody."""
    import torch

    order = torch.randperm(data.rows, generator=torch.Generator().manual_seed(1)).to(data.device)
    return itertools.islice(data.batches(order, config.batch_size), config.steps)


def share(step: int, config: Config) -> float:
    """Of the peak learning rate: a linear decay, which costs everybody the same."""
    return 1 - step / config.steps


def measure_grid(data: Features, heads: int, precision: str, config: Config) -> list[Figure]:
    """Times of the loops and of the grid, by turns, and ratios within rounds. Raises DataError for other weights."""
    import torch

    from train.heads import Arithmetic

    points = grid(heads)
    arithmetic = Arithmetic(torch.device(config.device), {"bf16": torch.bfloat16, "fp32": None}[precision])
    ways: dict[str, Callable[[], Any]] = {
        name: partial(one_by_one, data, points, arithmetic, fused, config) for name, fused in LOOPS.items()
    }
    ways["ours"] = partial(ours, data, points, arithmetic, config)
    check(data, points, dataclasses.replace(arithmetic, autocast=None), config)
    for way in ways.values():
        way()  # warms caches and allocators
    seconds = take_turns(ways, config.rounds, config.device)
    about: dict[str, Any] = {"heads": heads, "precision": precision}
    steps = heads * config.steps
    figures = [
        Figure("time per head and step, ms", spread([1e3 * s / steps for s in found]), competitor=name, **about)
        for name, found in seconds.items()
    ]
    for name in LOOPS:
        ratios = ratio(seconds[name], seconds["ours"])
        target = TARGETS.get((config.device, heads), 1.0 if config.device == "cpu" else None)
        figures.append(Figure("loop / ours", ratios, competitor=name, target=target, **about))
    work = 4 * config.batch_size * config.width * config.classes * heads * config.steps
    figures.append(Figure("TFLOP/s", spread([work / s / 1e12 for s in seconds["ours"]]), competitor="ours", **about))
    return figures


def check(data: Features, points: Sequence[Point], arithmetic: Arithmetic, config: Config) -> None:
    """Raises DataError unless some float32 heads of the grid are those trained alone."""
    first = points[:: max(1, len(points) // 3)][:3]
    error = float(
        (one_by_one(data, first, arithmetic, True, config) - ours(data, first, arithmetic, config)).abs().max()
    )
    if not error <= AGREEMENT:
        raise DataError(f"heads of the grid differ from those trained alone by {error:.1e}: nothing was timed")


# ---------------------------------------------------------------------------------------------------------- the cache


def measure_cache(scratch: Path, config: Config) -> list[Figure]:
    """What a cache of `cache_samples` costs on this disk, and what all of ImageNet is planned to take."""
    import torch

    from data.features import open_features

    folder = scratch / "cache"
    features, written = fill(folder, config.cache_samples, config)
    (place,) = folder.iterdir()
    size = sum(file.stat().st_size for file in place.iterdir())
    started = time.perf_counter()
    features = open_features(place)
    opened = time.perf_counter() - started
    order = torch.randperm(features.rows, generator=torch.Generator().manual_seed(0))

    def epoch(features: Features) -> float:
        started = time.perf_counter()
        rows = sum(len(labels) for _, labels in features.batches(order, config.batch_size))
        assert rows == features.rows
        return time.perf_counter() - started

    from_files = [epoch(features) for _ in range(3)]
    in_memory = features.gathered(torch.device("cpu"))
    from_memory = [epoch(in_memory) for _ in range(3)]
    planned = identity(1_281_167, config)
    found: dict[str, list[float]] = {
        "cache, MB": [size / 1e6],
        "cache written, s": [written],
        "cache opened with SHA-256 checked, s": [opened],
        "epoch in random order from files, s": from_files,
        "epoch in random order from memory, s": from_memory,
        "planned for ImageNet, MB": [planned.bytes / 1e6],
        "planned for ImageNet, files": [planned.parts],
    }
    return [Figure(metric, spread(values)) for metric, values in found.items()]


# ------------------------------------------------------------------------------------------------------------- report


def report(rows: Sequence[dict[str, Any]]) -> None:
    """Prints the rows of one run."""
    about = rows[0]
    config = about["config"]
    where = about["processor"] + ", one thread" if about["device"] == "cpu" else about["device"]
    print(f"{where}, torch {about['versions']['torch']}, commit {about['commit']}")
    print(f"{config['width']} features, {config['classes']} classes, batches of {config['batch_size']}")
    lines, others = [], []
    for row in rows:
        value = str(Spread.of(row))
        if row["heads"] is None:
            others.append((row["metric"], value, str(row["n"])))
            continue
        target = "" if row["target"] is None else f"{row['target']:g}"
        reached = "" if row["target"] is None else ("yes" if row["value"] >= row["target"] else "NO")
        lines.append(
            (f"{row['heads']} heads, {row['precision']}", row["competitor"], row["metric"], value, target, reached)
        )
    print_table(("", "of", "", "median (p20-p80)", "target", "reached"), lines)
    if others:
        print()
        print_table((f"cache of {config['cache_samples']:,} samples", "median (p20-p80)", "n"), others)


def draw(rows: Sequence[dict[str, Any]], path: str) -> None:
    """Bars of the time per head and step; raises DataError if the file cannot be written."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = [row for row in rows if row["metric"] == "time per head and step, ms"]
    cases = list(dict.fromkeys((row["heads"], row["precision"]) for row in timed))
    figure, axis = pyplot.subplots(figsize=(2 + 1.7 * len(cases), 4), layout="constrained")
    for offset, (name, colour) in enumerate(COLOURS.items()):
        own = [next(row for row in timed if row["competitor"] == name and (row["heads"], row["precision"]) == case)
               for case in cases]  # fmt: skip
        places = [number + 0.27 * (offset - 1) for number in range(len(cases))]
        errors = [[r["value"] - r["p20"] for r in own], [r["p80"] - r["value"] for r in own]]
        bars = axis.bar(places, [r["value"] for r in own], 0.25, yerr=errors, color=colour, label=name, capsize=3)
        axis.bar_label(bars, [f"{r['value']:.3g}" for r in own], fontsize=8, padding=3)
    axis.set_xticks(range(len(cases)), [f"{heads} heads\n{precision}" for heads, precision in cases])
    where = "one thread of " + rows[0]["processor"] if rows[0]["device"] == "cpu" else rows[0]["device"]
    axis.set(ylabel="ms per head and step", title=where)
    axis.margins(y=0.15)
    axis.legend(frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)
