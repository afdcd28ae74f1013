"""A whole step of distillation timed beside the published one: what `eval/throughput.py step` runs.

Apart from the script, which only reads the command line and has other measurements.
"""

from __future__ import annotations

import copy
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data import DataError
from eval.common import Spread, check_outputs, spread
from eval.operations import device
from eval.stepping_report import PART_COLOURS, draw, report

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from data.stream import Stream
    from models.encoders import Encoder

LR, WEIGHT_DECAY, CLIP = 1e-5, 0.05, 1.0  # steps so small that both ways stay together
# (must, stretch) on a GPU: share of the measured rate of matrix products, and speed against the published step. A
# ResNet's step is bound by the bandwidth of activations and batch norm, hence the lower share.
TARGETS: dict[str, dict[str, tuple[float, float | None]]] = {
    "MFU, %": {"open_clip:RN50": (25.0, 30.0), "open_clip:ViT-B-16": (42.0, 52.0)},
    "ours / published": {"open_clip:RN50": (2.0, None), "open_clip:ViT-B-16": (1.5, None)},
    "streamed / synthetic": {"": (0.95, None)},
    "waiting for data, %": {"": (3.0, None)},
    "training waits, % of writing at once": {"": (5.0, None)},
}
ON_ANY_DEVICE = {"training waits, % of writing at once"}  # the others are targets for a GPU


@dataclass(frozen=True)
class Config:
    """What to measure; `eval/throughput.py step --help` says it in words."""

    teacher: str = "open_clip:RN50"
    student: str = ""
    data: str = ""
    device: str = "cuda"
    precision: str = "bf16"
    compile: bool = False
    batch_size: int = 256
    workers: int = 2
    steps: int = 20
    rounds: int = 5
    rows: str = "runs/benchmarks.jsonl"
    figure: str = ""


@dataclass(frozen=True)
class Figure:
    """One number: of one way to step (`subject`), on synthetic or streamed images (`images`), or of a part."""

    metric: str
    value: Spread
    subject: str = "ours"
    images: str = "synthetic"

    def targets(self, config: Config) -> tuple[float | None, float | None]:
        """(must, stretch), None where nothing is asked."""
        if config.device != "cuda" and self.metric not in ON_ANY_DEVICE:
            return None, None
        asked = TARGETS.get(self.metric, {})
        return asked.get(config.teacher, asked.get("", (None, None)))


def main(config: Config) -> list[dict[str, Any]]:
    """Runs the measurement, prints it, writes rows and figure, and returns the rows.

    Raises DataError without the device, for paths that cannot be written, data that cannot be read, and where the two
    ways to step do not have the same losses; ModelError for unknown encoders.
    """
    import torch

    from data.rows import append_row

    if config.device == "cuda" and not torch.cuda.is_available():
        raise DataError("no CUDA device here; --device cpu measures one thread")
    check_outputs(config.rows, config.figure)
    if config.device == "cpu":
        torch.set_num_threads(1)
    figures = measure(config)
    about = {**device(config.device), "config": asdict(config)}
    rows = []
    for figure in figures:
        must, stretch = figure.targets(config)
        fields: dict[str, Any] = {"subject": figure.subject, "images": figure.images, "must": must, "stretch": stretch}
        rows.append(append_row(Path(config.rows), metric=figure.metric, **fields, **figure.value.fields(), **about))
    report(rows)
    if config.figure:
        draw(rows, config.figure)
    return rows


# ------------------------------------------------------------------------------------------------------ ways to step


class Ours:
    """A step as train/distill.py takes it: the same module, optimiser and guard, in the precision asked for."""

    def __init__(self, teacher: Encoder, student: Encoder, config: Config, *, precision: str | None = None) -> None:
        import torch
        from accelerate import Accelerator

        from models.distiller import Distiller
        from train.loop import GuardedStep, trained_parameters

        self.accelerator = Accelerator(
            mixed_precision=precision or config.precision, cpu=True if config.device == "cpu" else None
        )
        place = self.accelerator.device
        self.teacher = teacher.eval().requires_grad_(False).to(place).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.distiller = Distiller(student, teacher).train().to(place).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        parameters = list(trained_parameters(self.distiller).values())
        optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=WEIGHT_DECAY, fused=True)
        if config.compile:
            self.teacher.compile()
        self.guarded = GuardedStep(self.accelerator, self.distiller, optimizer, CLIP, None, compiled=config.compile)

    def step(self, images: Tensor, *, exchange: bool = True) -> Tensor:
        """Loss of one optimiser step on uint8 images, on the device; waits for nothing.

        exchange: whether processes exchange gradients; without, each goes its own way.
        """
        from data.transforms import unit_interval
        from models.distiller import distillation_terms

        self.guarded.begin(LR)
        with self.guarded.piece(last=exchange):
            values = distillation_terms(
                self.guarded.model, self.distiller, self.teacher, unit_interval(images), self.accelerator.autocast
            )
            self.accelerator.backward(values["loss"])
        self.guarded.finish()
        return values["loss"].detach()

    def parts(self, images: Tensor, clock: Callable[[], float]) -> dict[str, float]:
        """Seconds of the parts of one step, each ended by waiting for the device."""
        import torch

        from data.transforms import unit_interval

        marks = [clock()]
        self.guarded.begin(LR)
        pixels = unit_interval(images)
        with torch.no_grad(), self.accelerator.autocast():
            target = self.teacher.intermediates(pixels)
        marks.append(clock())
        loss = self.guarded.model(pixels, target)["loss"]
        marks.append(clock())
        self.accelerator.backward(loss)
        marks.append(clock())
        self.guarded.finish()
        marks.append(clock())
        return {name: marks[i + 1] - marks[i] for i, name in enumerate(PART_COLOURS)}


class Published:
    """A step as the feature-contamination code takes it: float32, channels first, the loss read at every step."""

    def __init__(self, teacher: Encoder, student: Encoder, config: Config) -> None:
        import torch

        self.device = torch.device(config.device)
        self.teacher = teacher.eval().requires_grad_(False).to(self.device)
        self.student = student.train().to(self.device)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1.0)
        self.losses: list[float] = []

    def step(self, images: Tensor) -> Tensor:
        """Loss of one optimiser step on float images in [0, 1]."""
        import torch
        import torch.nn.functional as F

        with torch.no_grad():
            target = self.teacher(images)
        loss = F.mse_loss(self.student(images), target)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), CLIP)
        self.optimizer.step()
        self.schedule.step()
        self.losses.append(loss.item())
        return loss.detach()


def make_encoders(config: Config) -> tuple[Encoder, Encoder]:
    """Teacher and student with random weights, on which speed does not depend; the student's equal width is needed."""
    import torch

    from models.encoders import load_encoder

    torch.manual_seed(0)
    teacher = load_encoder(config.teacher, weights=False)
    student = load_encoder(config.student or config.teacher, weights=False)
    if student.feature_dim != teacher.feature_dim:
        raise DataError(
            f"--student {config.student}: {student.feature_dim} features, the teacher has {teacher.feature_dim}; "
            "the published step has no projector"
        )
    return teacher, student


def flops_of_image(teacher: Encoder, student: Encoder) -> float:
    """Operations for one image: a teacher's forward pass, a student's forward and backward; 2 for a multiply-add."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    one, other = (copy.deepcopy(encoder).to("meta") for encoder in (teacher, student))
    images = torch.zeros(2, 3, teacher.image_size, teacher.image_size, device="meta")
    other.image_size = one.image_size
    with FlopCounterMode(display=False) as counter:
        with torch.no_grad():
            one(images)
        other.train()(images).sum().backward()
    return counter.get_total_flops() / len(images)


# ------------------------------------------------------------------------------------------------------------- images


def synthetic_images(config: Config, size: int) -> Tensor:
    """A batch of noise on the device, uint8 and channels last, as the stream gives it."""
    import torch

    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (config.batch_size, size, size, 3), dtype=torch.uint8, generator=generator)
    return pixels.permute(0, 3, 1, 2).to(config.device)


def open_ours(config: Config, size: int) -> Stream:
    """The training stream, without end."""
    from data.stream import open_stream
    from data.transforms import TrainTransform

    return open_stream(
        demo_or(config.data),
        global_batch=config.batch_size,
        workers=config.workers,
        transform=TrainTransform(size),
        epochs=None,
    )


def published_batches(config: Config, size: int) -> Any:
    """An endless loader as the published pipeline has it: Pillow, then torchvision's v1 transforms on the CPU."""
    import io

    import webdataset
    from PIL import Image
    from torch.utils.data import DataLoader
    from torchvision import transforms as v1

    from data.tar import IMAGE_EXTENSIONS, find_shards

    transform = v1.Compose(
        [
            v1.RandomResizedCrop(size, scale=(0.9, 1.0), interpolation=v1.InterpolationMode.BICUBIC),
            v1.RandomHorizontalFlip(),
            v1.ToTensor(),
            v1.Normalize((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),  # its cost; the encoders here normalise themselves
        ]
    )

    def decode(sample: dict[str, Any]) -> torch.Tensor:
        extension = next(name for name in sample if name in IMAGE_EXTENSIONS)
        return transform(Image.open(io.BytesIO(sample[extension])).convert("RGB"))

    urls = [shard.url for shard in find_shards(demo_or(config.data)).shards]
    if len(urls) < config.workers:
        raise DataError(f"{len(urls)} shards for {config.workers} workers: webdataset gives each at least one")
    dataset = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0).shuffle(1000).map(decode).repeat()
    pinned = config.device == "cuda"
    return DataLoader(dataset, batch_size=config.batch_size, num_workers=config.workers, pin_memory=pinned)


def demo_or(data: str) -> Any:
    """Shards of the demo's digits for `demo`, else what the name says."""
    from data import demo

    return demo.demo_shards("train") if data == "demo" else data


# -------------------------------------------------------------------------------------------------------- measurement


@dataclass(frozen=True)
class Run:
    """Seconds of some steps, and those in which the device had nothing to do between steps (a CPU: host waiting)."""

    seconds: float
    idle: float


class Timer:
    """Times steps; the gaps between them by the device's own clock where it has one."""

    def __init__(self, config: Config) -> None:
        self.cuda, self.steps = config.device == "cuda", config.steps

    def now(self) -> float:
        """Seconds, once the device is done."""
        if self.cuda:
            import torch

            torch.cuda.synchronize()
        return time.perf_counter()

    def run(self, step: Callable[[Any], object], images: Iterator[Any], fetch: Callable[[], None] | None = None) -> Run:
        """Takes two steps to warm up, then the timed ones. fetch: called when a step's work is queued."""
        import torch

        gaps: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        ended: torch.cuda.Event | None = None
        waited = started = 0.0
        for number in range(self.steps + 2):
            if number == 2:
                gaps, ended, waited = [], None, 0.0
                started = self.now()
            before = time.perf_counter()
            batch = next(images)
            waited += time.perf_counter() - before
            if self.cuda:
                begun = torch.cuda.Event(enable_timing=True)
                begun.record()
                if ended is not None:
                    gaps.append((ended, begun))
            step(batch)
            if self.cuda:
                ended = torch.cuda.Event(enable_timing=True)
                ended.record()
            before = time.perf_counter()
            if fetch is not None:
                fetch()
            waited += time.perf_counter() - before
        seconds = self.now() - started
        return Run(seconds, sum(a.elapsed_time(b) for a, b in gaps) / 1e3 if self.cuda else waited)


def measure(config: Config) -> list[Figure]:
    """Checks that both ways have the same losses, then times them by turns."""
    import itertools

    import torch

    from data.transforms import unit_interval
    from kernels.bench import CpuClock, CudaClock, measure_rates

    teacher, student = make_encoders(config)
    student.image_size = teacher.image_size
    size, place = teacher.image_size, torch.device(config.device)
    images = synthetic_images(config, size)
    pixels = unit_interval(images).contiguous()
    check(teacher, student, images, pixels, config)
    flops = flops_of_image(teacher, student)
    kind = "float32" if config.precision == "no" else "bfloat16"
    clock = CudaClock(place) if config.device == "cuda" else CpuClock()
    rate = measure_rates(clock, place, [kind]).products[kind]

    ours = Ours(copy.deepcopy(teacher), copy.deepcopy(student), config)
    published = Published(teacher, student, config)
    timer = Timer(config)
    memory = peak_memory(ours, images) if config.device == "cuda" else None

    def synthetic(step: Callable[[Any], object], batch: Tensor) -> Callable[[], Run]:
        return lambda: timer.run(step, itertools.repeat(batch))

    def ours_streamed() -> Run:
        from data.prefetch import Prefetch

        with open_ours(config, size) as stream:
            batches = Prefetch(stream, place)
            return timer.run(ours.step, (batch["image"] for batch in batches), batches.fetch)

    def published_streamed() -> Run:
        loader = iter(published_batches(config, size))
        try:
            return timer.run(lambda batch: published.step(batch.to(place)), loader)
        finally:
            if config.workers:
                loader._shutdown_workers()  # DataLoader's iterator has no public way to end its workers

    ways: dict[tuple[str, str], Callable[[], Run]] = {
        ("ours", "synthetic"): synthetic(ours.step, images),
        ("published", "synthetic"): synthetic(published.step, pixels),
    }
    if config.data:
        ways |= {("ours", "streamed"): ours_streamed, ("published", "streamed"): published_streamed}
    runs: dict[tuple[str, str], list[Run]] = {way: [] for way in ways}
    parts: list[dict[str, float]] = []
    for turn in range(config.rounds):
        for way in random.Random(turn).sample(list(ways), len(ways)):
            runs[way].append(ways[way]())
        ours.parts(images, timer.now)  # warms up
        parts.append(ours.parts(images, timer.now))
    return summary(config, runs, parts, flops, rate, memory) + checkpoints(ours, config)


def check(teacher: Encoder, student: Encoder, images: Tensor, pixels: Tensor, config: Config) -> None:
    """Raises DataError unless both ways have the same losses in float32, at the first step and after two more."""
    plain = Config(**{**asdict(config), "compile": False})
    ours = Ours(copy.deepcopy(teacher), copy.deepcopy(student), plain, precision="no")
    published = Published(copy.deepcopy(teacher), copy.deepcopy(student), plain)
    losses = [(float(ours.step(images)), float(published.step(pixels))) for _ in range(3)]
    for number, (one, other) in enumerate(losses):
        # A GPU's convolutions round to TF32, and Adam's first steps have the size of the learning rate everywhere.
        tolerance = 1e-2 if number or config.device == "cuda" else 1e-4
        if not abs(one - other) <= tolerance * abs(other):
            raise DataError(f"losses of step {number} differ: ours {one:.6g}, published {other:.6g}; nothing was timed")


def peak_memory(ours: Ours, images: Tensor) -> float:
    """MiB that are allocated at most during a step."""
    import torch

    ours.step(images)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    ours.step(images)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**20


def checkpoints(ours: Ours, config: Config) -> list[Figure]:
    """What a checkpoint of weights and moments costs training: written at once, and in the background."""
    from models.checkpoints import CheckpointWriter, save_checkpoint

    tensors = ours.guarded.tensors()
    size = sum(tensor.nbytes for group in tensors.values() for tensor in group.values())
    at_once, stalls, written = [], [], []
    beside = Path(config.rows).parent  # the disk that results go to
    with tempfile.TemporaryDirectory(prefix=".checkpoints-", dir=beside) as scratch:
        writer = CheckpointWriter(Path(scratch) / "background", keep=1)
        for turn in range(config.rounds + 1):
            started = time.perf_counter()
            save_checkpoint(Path(scratch) / "at_once", turn, tensors, {}, keep=1)
            between = time.perf_counter()
            writer.save(turn, tensors, {})
            ended = time.perf_counter()
            writer.wait()
            if turn:  # the first one allocates the copies
                at_once.append(between - started)
                stalls.append(ended - between)
                written.append(time.perf_counter() - between)
    shares = [100 * stall / whole for stall, whole in zip(stalls, at_once, strict=True)]
    return [
        Figure("checkpoint, MB", spread([size / 1e6])),
        Figure("checkpoint written at once, s", spread(at_once)),
        Figure("checkpoint written in the background, s", spread(written)),
        Figure("training waits for the background, s", spread(stalls)),
        Figure("training waits, % of writing at once", spread(shares)),
    ]


def summary(
    config: Config,
    runs: dict[tuple[str, str], list[Run]],
    parts: Sequence[dict[str, float]],
    flops: float,
    rate: float,
    memory: float | None,
) -> list[Figure]:
    """Figures from runs and parts; ratios are formed within a round."""
    images = config.batch_size * config.steps
    rates = {way: [images / run.seconds for run in found] for way, found in runs.items()}
    figures = [Figure("images/s", spread(values), *way) for way, values in rates.items()]
    for kind in dict.fromkeys(kind for _, kind in runs):
        pairs = zip(rates["ours", kind], rates["published", kind], strict=True)
        figures.append(Figure("ours / published", spread([a / b for a, b in pairs]), images=kind))
    idle = {way: spread([100 * run.idle / run.seconds for run in found]) for way, found in runs.items()}
    if config.device == "cuda":  # between steps on images that are there: what launching costs
        figures.append(Figure("idle between steps, %", idle["ours", "synthetic"]))
    if ("ours", "streamed") in idle:
        figures.append(Figure("waiting for data, %", idle["ours", "streamed"], images="streamed"))
    if ("ours", "streamed") in rates:
        pairs = zip(rates["ours", "streamed"], rates["ours", "synthetic"], strict=True)
        figures.append(Figure("streamed / synthetic", spread([a / b for a, b in pairs]), images="streamed"))
    for name in PART_COLOURS:
        share = spread([100 * part[name] / sum(part.values()) for part in parts])
        figures.append(Figure(f"{name}, % of a step", share))
    floor = config.batch_size * flops / rate
    figures += [
        Figure("step, ms", spread([1e3 * run.seconds / config.steps for run in runs["ours", "synthetic"]])),
        Figure("floor of products, ms", spread([1e3 * floor])),
        Figure("MFU, %", spread([100 * value * flops / rate for value in rates["ours", "synthetic"]])),
        Figure("GFLOP per image", spread([flops / 1e9])),
        Figure("measured matrix products, TFLOP/s", spread([rate / 1e12])),
    ]
    if memory is not None:
        figures.append(Figure("peak memory, MiB", spread([memory])))
    return figures
