"""Image loading measured against the published pipeline and plain webdataset: what `eval/throughput.py data` runs.

A file of its own beside the script, which only reads the command line and will have other measurements; not shared.
What is compared, and how, is said at the top of eval/throughput.py.
"""

from __future__ import annotations

import io
import itertools
import math
import multiprocessing
import os
import random
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data import DataError
from eval.common import Spread, print_table, spread

if TYPE_CHECKING:
    import torch

    from data.stream import Stream
    from data.tar import ShardSet

BATCH = 64
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's, for `published`
TARGET_RATE = 2500  # images/s at which the main process's share of a core is stated


@dataclass(frozen=True)
class Config:
    """What to measure; `eval/throughput.py data --help` says it in words."""

    data: str = "demo"
    workers: tuple[int, ...] = (0, 1, 2)
    images: int = 1000
    rounds: int = 5
    size: int = 224
    enlarge: int = 0
    rows: str = "runs/benchmarks.jsonl"
    figure: str = ""


def main(config: Config) -> list[dict[str, Any]]:
    """Runs the comparison, prints tables, writes rows and figure, and returns the rows.

    The shards should be such as `data/shards.py verify` finds nothing wrong with: plain webdataset trips over bad ones.
    Raises DataError for shards that cannot be read, too few for the workers, paths that cannot be written, no /proc.
    """
    import torch

    from data import demo
    from data.rows import append_row
    from data.tar import find_shards
    from data.transforms import ImageError

    if not Path("/proc/self/stat").exists():
        raise DataError("this measurement reads the processes' CPU time from /proc, which only Linux has")
    for path in filter(None, (config.rows, config.figure)):
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"cannot write {path}: {error.strerror}") from None
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="throughput-") as scratch:
        shards = find_shards(demo.demo_shards("train") if config.data == "demo" else config.data)
        if config.enlarge:
            shards = find_shards(enlarged(shards, config.enlarge, config.images, Path(scratch)))
        if len(shards.shards) < max(config.workers):
            raise DataError(
                f"{len(shards.shards)} shards for {max(config.workers)} workers: webdataset gives each at least one; "
                "pack with a smaller --shard_size, or measure fewer --workers"
            )
        images = list(itertools.islice(read_images(shards), config.images))
        if not images:
            raise DataError(f"{config.data} holds no images")
        try:
            quality = psnr(images, config.size)  # first: it stops at images that cannot be decoded
        except ImageError as error:
            raise DataError(f"{config.data}: {error}; `data/shards.py verify` names such images") from error
        measured = measure_decoding(images, config) | quality | measure_reading(shards, config)
        measured |= measure_pipelines(shards, config)

    about = {
        "data": config.data,
        "fingerprint": shards.fingerprint,
        "mean_image_bytes": round(sum(map(len, images)) / len(images)),
        "config": asdict(config),
        "device": "cpu",
    }
    rows = []
    for (metric, subject, workers), value in measured.items():
        rows.append(
            append_row(
                Path(config.rows),
                metric=metric,
                value=value.median,
                subject=subject,
                workers=workers,
                n=value.n,
                p20=value.p20,
                p80=value.p80,
                **about,
            )
        )
    report(rows)
    if config.figure:
        draw(rows, config.figure)
    return rows


# What was measured (metric, subject, workers) and its spread. workers is None where no pipeline is concerned.
Measured = dict[tuple[str, str, int | None], Spread]


# ------------------------------------------------------------------------------------------------------------- inputs


def read_images(shards: ShardSet) -> Iterator[bytes]:
    """The image files of all shards, in order."""
    from data.tar import ShardReader

    for shard in shards.shards:
        for record in ShardReader(shard.url).read():
            if record.image is not None:
                yield record.image


def enlarged(shards: ShardSet, short_side: int, limit: int, scratch: Path) -> str:
    """Shards of the first images re-encoded at `short_side` pixels, JPEG quality 95, 4:4:4.

    Stands in for original photographs where only small copies are at hand: ImageNet's have a median size of 500x375.
    """
    from PIL import Image

    from data.pack import pack
    from data.transforms import open_rgb

    (scratch / "images" / "all").mkdir(parents=True)
    for number, data in enumerate(itertools.islice(read_images(shards), limit)):
        image = open_rgb(data)
        factor = short_side / min(image.size)
        image = image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)
        image.save(scratch / "images" / "all" / f"{number:06d}.jpg", "JPEG", quality=95, subsampling=0)
    size = math.ceil(limit / max(8, len(shards.shards)))
    pack(str(scratch / "images"), str(scratch / "shards"), layout="folders", shard_size=size)
    return str(scratch / "shards")


# ----------------------------------------------------------------------------------------------- decoding and reading


def measure_decoding(images: Sequence[bytes], config: Config) -> Measured:
    """Images per CPU second of one core for the three ways to decode and augment, and ours against the published."""
    from PIL import Image
    from torchvision import transforms as v1

    from data.transforms import TrainTransform, sample_random

    published = v1.Compose(
        [
            v1.RandomResizedCrop(config.size, scale=(0.9, 1.0), interpolation=v1.InterpolationMode.BICUBIC),
            v1.RandomHorizontalFlip(),
            v1.ToTensor(),
            v1.Normalize(MEAN, STD),
        ]
    )
    reference, ours = TrainTransform(config.size, decoder="pil"), TrainTransform(config.size)
    ways: dict[str, Callable[[int, bytes], Any]] = {
        "published": lambda number, data: published(Image.open(io.BytesIO(data)).convert("RGB")),
        "pil": lambda number, data: reference(data, sample_random(0, 0, number)),
        "ours": lambda number, data: ours(data, sample_random(0, 0, number)),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(config.rounds + 1):
        for name, way in ways.items():
            started = time.process_time()
            for number, data in enumerate(images):
                way(number, data)
            if turn > 0:  # the first round warms caches and allocators
                rates[name].append(len(images) / (time.process_time() - started))
    measured: Measured = {("decoded images per CPU second", name, None): spread(found) for name, found in rates.items()}
    measured["ratio of decoding rates", "ours / published", None] = ratio(rates["ours"], rates["published"])
    measured["ratio of decoding rates", "pil / published", None] = ratio(rates["pil"], rates["published"])
    return measured


def measure_reading(shards: ShardSet, config: Config) -> Measured:
    """Samples per CPU second read from shards on disk (page cache) without decoding."""
    import webdataset

    urls = [shard.url for shard in shards.shards]
    ways: dict[str, Callable[[], Iterable[Any]]] = {
        "webdataset": lambda: webdataset.WebDataset(urls, shardshuffle=False),
        "ours": lambda: read_images(shards),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(config.rounds + 1):
        for name, way in ways.items():
            started = time.process_time()
            count = sum(1 for _ in itertools.islice(way(), 5 * config.images))
            if turn > 0:
                rates[name].append(count / (time.process_time() - started))
    measured: Measured = {("read samples per CPU second", name, None): spread(found) for name, found in rates.items()}
    measured["ratio of reading rates", "ours / webdataset", None] = ratio(rates["ours"], rates["webdataset"])
    return measured


def psnr(images: Sequence[bytes], size: int) -> Measured:
    """PSNR in dB over images of the default decoder and resampler against Pillow's, with equal crops and flips.

    Equal images count as 99 dB. The percentiles are over images here, not over rounds.
    """
    from data.transforms import TrainTransform, sample_random

    values = []
    for number, data in enumerate(images):
        one, other = (
            TrainTransform(size, decoder=decoder)(data, sample_random(0, 0, number)).float()
            for decoder in ("torchvision", "pil")
        )
        error = (one - other).square().mean().item()
        values.append(10 * math.log10(255**2 / error) if error else 99.0)
    return {("PSNR, dB", "ours against pil", None): spread(values)}


def ratio(ours: Sequence[float], baseline: Sequence[float]) -> Spread:
    """Quotients of the measurements of the same round."""
    return spread([a / b for a, b in zip(ours, baseline, strict=True)])


# --------------------------------------------------------------------------------------------------- whole pipelines


@dataclass(frozen=True)
class Rate:
    """One run of a pipeline: images, seconds of wall time, CPU seconds of the main process and of its workers."""

    images: int
    wall: float
    main: float
    workers: float

    @property
    def per_second(self) -> float:
        return self.images / self.wall

    @property
    def per_cpu_second(self) -> float:
        return self.images / (self.main + self.workers)


def measure_pipelines(shards: ShardSet, config: Config) -> Measured:
    """Plain webdataset and our stream for each number of workers, in turn."""
    from data.parallel import Progress

    ways: dict[str, Callable[[ShardSet, int, int], Any]] = {"webdataset": webdataset_batches, "ours": our_batches}
    runs: dict[tuple[str, int], list[Rate]] = {(name, workers): [] for workers in config.workers for name in ways}
    progress = Progress("pipelines", config.rounds * len(runs) * config.images)
    for turn in range(config.rounds):
        for name, workers in random.Random(turn).sample(sorted(runs), len(runs)):
            runs[name, workers].append(time_batches(ways[name](shards, workers, config.size), workers, config.images))
            progress.add(config.images)
    progress.close()

    measured: Measured = {}
    wall = {key: [run.per_second for run in found] for key, found in runs.items()}
    cpu = {key: [run.per_cpu_second for run in found] for key, found in runs.items()}
    for (name, workers), found in runs.items():
        measured["pipeline images per second", name, workers] = spread(wall[name, workers])
        measured["pipeline images per CPU second", name, workers] = spread(cpu[name, workers])
        if workers:
            share = [100 * TARGET_RATE * run.main / run.images for run in found]
            measured[f"main process, % of a core at {TARGET_RATE} images/s", name, workers] = spread(share)
    for workers in config.workers:
        pair = "ours / webdataset"
        measured["ratio of pipeline rates", pair, workers] = ratio(wall["ours", workers], wall["webdataset", workers])
        measured["ratio of pipeline rates per CPU second", pair, workers] = ratio(
            cpu["ours", workers], cpu["webdataset", workers]
        )
        if workers > 1 and 1 in config.workers:
            scaling = [k / one / workers for k, one in zip(wall["ours", workers], wall["ours", 1], strict=True)]
            measured["rate over workers times the rate of one", "ours", workers] = spread(scaling)
            # The same without what other processes on the machine took away.
            measured["rate per CPU second over that of one worker", "ours", workers] = ratio(
                cpu["ours", workers], cpu["ours", 1]
            )
    return measured


def webdataset_batches(shards: ShardSet, workers: int, size: int) -> Iterable[Any]:
    """What users of webdataset write: shards, shuffle buffer, decode, DataLoader."""
    import webdataset
    from torch.utils.data import DataLoader

    from data.tar import IMAGE_EXTENSIONS
    from data.transforms import TrainTransform, sample_random

    transform = TrainTransform(size)

    def decode(sample: dict[str, Any]) -> tuple[torch.Tensor, int, str]:
        extension = next(name for name in sample if name in IMAGE_EXTENSIONS)
        generator = sample_random(0, 0, zlib.crc32(sample["__key__"].encode()))
        return transform(sample[extension], generator), int(sample["cls"]), sample["__key__"]

    urls = [shard.url for shard in shards.shards]
    dataset = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0).shuffle(1000).map(decode).repeat()
    return DataLoader(dataset, batch_size=BATCH, num_workers=workers)


def our_batches(shards: ShardSet, workers: int, size: int) -> Stream:
    """Our stream with the same decoding."""
    from data.stream import open_stream
    from data.transforms import TrainTransform

    return open_stream(shards, global_batch=BATCH, workers=workers, transform=TrainTransform(size), epochs=None)


def time_batches(batches: Iterable[Any], workers: int, images: int) -> Rate:
    """Times at least `images` images of an endless pipeline in its steady state, then closes it.

    The first batches start workers and fill buffers and are not counted. Nothing pauses before the clock starts, so
    the queues between the processes hold as little then as at the end: no image decoded before it is counted for free.
    """
    iterator = iter(batches)
    for _ in range(2 + 2 * workers):
        next(iterator)
    pids = [process.pid for process in multiprocessing.active_children() if process.pid]
    if len(pids) != workers:
        raise RuntimeError(f"{len(pids)} processes run for {workers} workers: a pipeline did not end")
    before, main, started = [cpu_seconds(pid) for pid in pids], time.process_time(), time.monotonic()
    steps = math.ceil(images / BATCH)
    for _ in range(steps):
        next(iterator)
    wall, main = time.monotonic() - started, time.process_time() - main
    used = sum(map(cpu_seconds, pids)) - sum(before)
    close = getattr(iterator, "close", None) or getattr(iterator, "_shutdown_workers", None)
    if close is not None:  # DataLoader's iterator has no public way to end its workers
        close()
    return Rate(steps * BATCH, wall, main, used)


def cpu_seconds(pid: int) -> float:
    """User and system time of a process, in seconds, to the clock tick."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# ------------------------------------------------------------------------------------------------------------- report


def report(rows: Sequence[dict[str, Any]]) -> None:
    """Prints the rows of one run as a table."""
    about = rows[0]
    kilobytes = about["mean_image_bytes"] / 1000
    print(f"{about['data']}: images of {kilobytes:.1f} kB on average, to {about['config']['size']} pixels")
    print(f"{about['processor']}, {about['cores']} cores, torch {about['versions']['torch']}, commit {about['commit']}")
    lines = []
    for row in rows:
        value = Spread.of(row)
        workers = "" if row["workers"] is None else str(row["workers"])
        lines.append((row["metric"], row["subject"], workers, str(value), str(row["n"])))
    print_table(("", "of", "workers", "median (p20-p80)", "n"), lines)


def draw(rows: Sequence[dict[str, Any]], path: str) -> None:
    """Draws decoding rates and pipeline rates of one run; raises DataError if the file cannot be written."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = {"published": "#8c8c8c", "pil": "#b9cde5", "webdataset": "#8c8c8c", "ours": "#1f5fa8"}
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")

    def whiskers(found: Sequence[dict[str, Any]]) -> list[list[float]]:
        return [[row["value"] - row["p20"] for row in found], [row["p80"] - row["value"] for row in found]]

    found = [row for row in rows if row["metric"] == "decoded images per CPU second"]
    values = [row["value"] for row in found]
    names = [row["subject"] for row in found]
    times = {row["subject"]: f"{row['value']:.2f}x" for row in rows if row["metric"] == "ratio of decoding rates"}
    bars = left.bar(names, values, yerr=whiskers(found), color=[colours[name] for name in names], capsize=4)
    labels = [f"{row['value']:,.0f}\n{times.get(row['subject'] + ' / published', '')}" for row in found]
    left.bar_label(bars, labels, padding=4)
    left.set(title="decode and augment, one core", ylabel="images per CPU second", ylim=(0, 1.25 * max(values)))

    for name, marker in (("webdataset", "s"), ("ours", "o")):
        found = [row for row in rows if row["metric"] == "pipeline images per second" and row["subject"] == name]
        found.sort(key=lambda row: row["workers"])
        workers, values = [row["workers"] for row in found], [row["value"] for row in found]
        right.errorbar(workers, values, yerr=whiskers(found), label=name, color=colours[name], marker=marker, capsize=4)
        if name == "ours" and 1 in workers and max(workers) > 1:
            one = values[workers.index(1)]
            ends = [1, max(workers)]
            right.plot(
                ends, [one * end for end in ends], color=colours[name], ls=":", label="one worker's rate x workers"
            )
    right.set(title="from shards to batches", xlabel="workers", ylabel="images per second", ylim=(0, None))
    right.set_xticks(sorted({row["workers"] for row in rows if row["workers"] is not None}))
    right.legend(frameon=False)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    about = rows[0]
    figure.suptitle(
        f"images of {about['mean_image_bytes'] / 1000:.0f} kB to {about['config']['size']} px"
        f" on {about['cores']} cores of {about['processor']}",
        fontsize=10,
    )
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:  # ValueError: an extension that matplotlib does not write
        raise DataError(f"cannot write the figure {path}: {error}") from None
    pyplot.close(figure)
