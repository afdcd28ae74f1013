"""Whole PGD attacks timed beside the published loops: what `eval/throughput.py attack` runs.

Apart from the script, which only reads the command line and has other measurements. Each case is a model and an attack:

    linf        L∞, from a random start          against torchattacks' PGD
    l2          L2, ball then box, the same      against torchattacks' PGDL2
    smoothadv   L2, box then ball, from clean    against SmoothAdv's PGD_L2: its parameters frozen, as its own scripts
                                                 have them, and not: `loss.backward()` then computes their gradients

These take part, by turns within each round, with the same labels, starts and settings:

    the published loop                     written out here operation by operation, so that no package is needed (the
                                           tests compare it with the package where there is one)
    ours                                   attacks/pgd.py as it comes: float32, batch norms folded (and channels-last on
                                           a CPU; see attacks/folding.py), the fused step where that can run
    ours, not folded                       the same without
    ours, reference step                   with the step in plain PyTorch; on a GPU, where that is not `ours` itself
    ours, channels-last                    the model in that memory format; on a GPU
    ours, bf16 channels-last               and bf16 autocast: what a GPU should run
    ours, bf16 channels-last, compiled     and torch.compile of the frozen model, in the place of folding
    ours, bf16 channels-last, graphed      and its mode reduce-overhead, CUDA graphs of both passes; on a GPU

Before a case is timed all must have made the same attack: float32 with the same convolutions the same adversarial
images, the others such as raise the float32 model's loss as far and fool it on the same images. Roundings must not
decide that, so the radii are small and residual branches damped as a trained network's are. Weights are random, labels
the model's own answers: speed depends on shapes, not on values (denormal numbers are flushed on a CPU). All loops run
in evaluation mode. float32 on a GPU is what PyTorch makes of it by default: TF32 in convolutions, for everybody.

The step's share of an attack is the time of as many steps without the model, over the attack's in the same round.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data import DataError
from eval.attacking_report import (
    BF16,
    CHANNELS_LAST,
    COMPILED,
    FROZEN,
    GRAPHED,
    NOT_FOLDED,
    NOT_FROZEN,
    OURS,
    REFERENCE,
    TORCHATTACKS,
    draw,
    report,
)
from eval.common import Spread, check_outputs, spread
from eval.operations import device
from eval.turns import ratio, take_turns

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

# Pixels a side and images of a batch. On a CPU as many as the whole command has minutes for (3 on a free core).
SIZES = {
    "cuda": {"cifar_resnet20": (32, 256), "cifar_resnet18": (32, 256), "resnet50": (224, 128)},
    "cpu": {"cifar_resnet20": (32, 64), "cifar_resnet18": (32, 2), "resnet50": (64, 2)},
}
ATTACKS = ("linf", "l2", "smoothadv")
REPEATS = {"cuda": 5, "cpu": 1}  # attacks of one timing

DISTANCE = 0.05  # median over images, in lengths of the perturbation: kinks of a network enlarge roundings
GAIN = 0.05  # by how much the loss that an attack gains may differ from what the published loop gains
FOOLED = 0.1  # share of images that may be fooled by one and not by the other (one image in any case)
GPU_MUST = {"cifar_resnet20": 2.0, "cifar_resnet18": 2.0, "resnet50": 1.3}
# Lower bounds (must, stretch) of a published loop's time over ours, by device, model, competitor and loop. On a CPU
# bf16 is asked for what it gave where the processor multiplies it.
TARGETS: dict[tuple[str, str, str, str], tuple[float, float | None]] = {
    **{("cuda", name, BF16, TORCHATTACKS): (must, None) for name, must in GPU_MUST.items()},
    **{("cuda", name, BF16, FROZEN): (must, None) for name, must in GPU_MUST.items()},
    **{
        ("cuda", name, GRAPHED, loop): (must, None)
        for name, must in GPU_MUST.items()
        for loop in (TORCHATTACKS, FROZEN)
    },
    **{("cuda", name, OURS, loop): (0.97, None) for name in GPU_MUST for loop in (TORCHATTACKS, FROZEN)},
    **{("cpu", "cifar_resnet20", BF16, loop): (2.1, 2.5) for loop in (TORCHATTACKS, FROZEN)},
    **{("cpu", name, OURS, loop): (1.1, None) for name in GPU_MUST for loop in (TORCHATTACKS, FROZEN)},
    **{("cpu", name, OURS, NOT_FROZEN): (1.4, None) for name in GPU_MUST},
}


@dataclass(frozen=True)
class Config:
    """What to measure; `eval/throughput.py attack --help` says it in words."""

    device: str = "cuda"
    models: tuple[str, ...] = ("cifar_resnet20", "resnet50")
    attacks: tuple[str, ...] = ATTACKS
    steps: int = 10
    batch_size: int = 0
    bf16: str = "auto"
    compile: str = "auto"
    rounds: int = 3
    rows: str = "runs/benchmarks.jsonl"
    figure: str = ""


@dataclass(frozen=True)
class Case:
    """One model under one attack on one batch."""

    model: str
    attack: str
    side: int
    batch_size: int


@dataclass(frozen=True)
class Figure:
    """One number of one case."""

    case: Case
    metric: str
    value: Spread
    competitor: str
    against: str = ""
    must: float | None = None
    stretch: float | None = None

    def row(self) -> dict[str, Any]:
        """Its fields, without provenance."""
        found = {"metric": self.metric, **self.value.fields(), **asdict(self.case)}
        found |= {"competitor": self.competitor, "against": self.against}
        if self.must is not None:
            reached = "must" if self.value.median >= self.must else "missed"
            if self.stretch is not None and self.value.median >= self.stretch:
                reached = "stretch"
            found |= {"must": self.must, "stretch": self.stretch, "verdict": reached}
        return found


def main(config: Config) -> list[dict[str, Any]]:
    """Runs the measurement, prints it, writes rows and figure, and returns the rows.

    Raises DataError without the device, for unknown models and attacks, for paths that cannot be written, and where
    the loops do not make the same attack.
    """
    import torch

    from data.parallel import Progress
    from data.rows import append_row

    if config.device == "cuda" and not torch.cuda.is_available():
        raise DataError("no CUDA device here; --device cpu measures one thread on small batches")
    for kind, asked, known in (("model", config.models, SIZES["cuda"]), ("attack", config.attacks, ATTACKS)):
        if unknown := [name for name in asked if name not in known]:
            raise DataError(f"--{kind}s: no {kind} {unknown[0]}; known are {', '.join(known)}")
    check_outputs(config.rows, config.figure)
    if config.device == "cpu":
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)
        keep_memory()
    cases = [
        Case(model, attack, side, config.batch_size or batch_size)
        for model, (side, batch_size) in SIZES[config.device].items()
        if model in config.models
        for attack in config.attacks
    ]
    about = {**device(config.device), "config": asdict(config)}
    rows = []
    progress = Progress("attacks", sum(case.batch_size for case in cases) * (config.rounds + 1))
    try:
        for case in cases:
            for figure in measure(case, config, progress.add):
                rows.append(append_row(Path(config.rows), **figure.row(), **about))
    finally:  # what was measured until Ctrl-C, or a case that failed, is told too
        progress.close()
        torch.set_flush_denormal(False)  # numpy complains of it when the figure is drawn
        if rows:
            report(rows)
    if config.figure:
        draw(rows, config.figure)
    return rows


# ------------------------------------------------------------------------------------------------------------- inputs


def settings(case: Case, steps: int) -> dict[str, Any]:
    """Keywords of `pgd` for a case."""
    found: dict[str, Any] = {"steps": steps, "random_start": case.attack != "smoothadv"}
    if case.attack == "linf":
        return {**found, "norm": "linf", "order": "ball_then_box", "eps": 2 / 255, "step_size": 0.5 / 255}
    order = "ball_then_box" if case.attack == "l2" else "box_then_ball"
    return {**found, "norm": "l2", "order": order, "eps": 0.15, "step_size": 2 * 0.15 / steps}


def build(case: Case, where: torch.device) -> tuple[nn.Module, Tensor, Tensor]:
    """A model for images in [0, 1], its images [B, 3, S, S], and what it takes them for [B]."""
    import torch
    import torchvision
    from torch import nn
    from torch.nn import functional as F

    from models.small import SMALL_NETS, BasicBlock

    class Normalised(nn.Module):
        mean: Tensor
        std: Tensor

        def __init__(self, net: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
            super().__init__()
            self.net = net
            self.register_buffer("mean", torch.tensor(mean)[:, None, None])
            self.register_buffer("std", torch.tensor(std)[:, None, None])

        def forward(self, images: Tensor) -> Tensor:
            return self.net((images - self.mean) / self.std)

    torch.manual_seed(0)
    if case.model in SMALL_NETS:
        small = SMALL_NETS[case.model]
        model = Normalised(small.build(10), small.mean, small.std)
    else:
        net = torchvision.models.get_model(case.model, weights=None)
        model = Normalised(net, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    for part in model.modules():
        if isinstance(part, (BasicBlock, torchvision.models.resnet.Bottleneck)):
            nn.init.constant_((part.bn2 if isinstance(part, BasicBlock) else part.bn3).weight, 0.1)
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = 1.0  # statistics of the one batch
    # Fields of colour with a little noise: photographs have such spectra.
    shape = (case.batch_size, 3, case.side, case.side)
    images = F.interpolate(torch.rand(case.batch_size, 3, 4, 4), size=case.side, mode="bicubic")
    images = (images + 0.05 * torch.randn(shape)).clamp(0, 1).to(where)
    model.to(where)
    with torch.no_grad():
        model.train()(images)
        return model.eval(), images, model(images).argmax(1)


# ---------------------------------------------------------------------------------------------------- published loops


def torchattacks(model: nn.Module, images: Tensor, labels: Tensor, start: Tensor, attack: dict[str, Any]) -> Tensor:
    """PGD (linf) or PGDL2 of version 3.5.1, from after its checks of the images and its draw of a start."""
    import torch

    step = torchattacks_step(attack)
    loss = torch.nn.CrossEntropyLoss()
    adv = start
    for _ in range(attack["steps"]):
        adv.requires_grad = True
        cost = loss(model(adv), labels)
        gradient = torch.autograd.grad(cost, adv, retain_graph=False, create_graph=False)[0]
        adv = step(adv, gradient, images)
    return adv


def torchattacks_step(attack: dict[str, Any]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """(adv, gradient, clean) → adv' by the operations of its PGD or PGDL2."""
    import torch

    eps, alpha = attack["eps"], attack["step_size"]

    def linf(adv: Tensor, gradient: Tensor, clean: Tensor) -> Tensor:
        adv = adv.detach() + alpha * gradient.sign()
        delta = torch.clamp(adv - clean, min=-eps, max=eps)
        return torch.clamp(clean + delta, min=0, max=1).detach()

    def l2(adv: Tensor, gradient: Tensor, clean: Tensor) -> Tensor:
        norms = torch.norm(gradient.view(len(gradient), -1), p=2, dim=1) + 1e-10
        adv = adv.detach() + alpha * (gradient / norms.view(-1, 1, 1, 1))
        delta = adv - clean
        norms = torch.norm(delta.view(len(delta), -1), p=2, dim=1)
        factor = torch.min(eps / norms, torch.ones_like(norms))
        return torch.clamp(clean + delta * factor.view(-1, 1, 1, 1), min=0, max=1).detach()

    return linf if attack["norm"] == "linf" else l2


def smoothadv(model: nn.Module, images: Tensor, labels: Tensor, attack: dict[str, Any]) -> Tensor:
    """`PGD_L2._attack` of smoothing-adversarial without noise, from after its check of the images."""
    import torch
    from torch.nn import functional as F

    delta = torch.zeros_like(images, requires_grad=True)
    optimizer = torch.optim.SGD([delta], lr=attack["step_size"])
    for _ in range(attack["steps"]):
        logits = model(images + delta)
        logits.argmax(1)  # which nothing uses
        loss = -F.cross_entropy(logits, labels, reduction="sum")
        optimizer.zero_grad()
        loss.backward()
        smoothadv_step(delta, images, optimizer, attack["eps"])
    return (images + delta).detach()


def smoothadv_step(delta: Tensor, images: Tensor, optimizer: torch.optim.Optimizer, eps: float) -> None:
    """Moves delta by delta.grad, in place. Its question for zeros waits for the device."""
    import torch

    assert delta.grad is not None
    norms = delta.grad.view(len(images), -1).norm(p=2, dim=1)
    delta.grad.div_(norms.view(-1, 1, 1, 1))
    if (norms == 0).any():
        delta.grad[norms == 0] = torch.randn_like(delta.grad[norms == 0])
    optimizer.step()
    delta.data.add_(images)
    delta.data.clamp_(0, 1).sub_(images)
    delta.data.renorm_(p=2, dim=0, maxnorm=eps)


# ------------------------------------------------------------------------------------------------------- measurement


def keep_memory() -> None:
    """Makes glibc's malloc keep what was freed, for everybody alike.

    By default it gives large blocks back to the system, or not, by the layout of its heap, and new ones then cost page
    faults: up to 5 % of an attack's time on one loop and none on another, the other way round in the next process.
    """
    with contextlib.suppress(OSError, AttributeError):  # another libc
        libc = ctypes.CDLL(None)
        for option, value in ((-1, 2**31 - 1), (-4, 0)):  # M_TRIM_THRESHOLD, M_MMAP_MAX
            libc.mallopt(option, value)


def multiplies_bf16() -> bool:
    """Whether this processor says that it has products of bf16; without them they cost several times float32's."""
    try:
        return bool(re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", Path("/proc/cpuinfo").read_text()))
    except OSError:
        return False


def competitors(
    case: Case, model: nn.Module, images: Tensor, labels: Tensor, config: Config
) -> dict[str, Callable[[], Tensor]]:
    """Name → an attack on the whole batch; the first is the published loop that the others are compared with."""
    import torch

    from attacks.pgd import draw_from_ball, pgd

    attack = settings(case, config.steps)
    gpu = config.device == "cuda"

    def generator() -> torch.Generator:
        return torch.Generator(config.device).manual_seed(0)

    def published() -> Tensor:
        start = draw_from_ball(images, attack["eps"], attack["norm"], generator())
        return torchattacks(model, images, labels, start, attack)

    def ours(model: nn.Module, **options: Any) -> Tensor:
        return pgd(model, images, labels, **attack, generator=generator(), **options)

    found: dict[str, Callable[[], Tensor]] = {}
    if case.attack == "smoothadv":
        found[FROZEN] = partial(smoothadv, copy.deepcopy(model).requires_grad_(False), images, labels, attack)
        found[NOT_FROZEN] = partial(smoothadv, copy.deepcopy(model), images, labels, attack)
    else:
        found[TORCHATTACKS] = published
    if gpu:
        found[REFERENCE] = partial(ours, model, kernel="reference")
    found[NOT_FOLDED] = partial(ours, model, fold=False)
    found[OURS] = partial(ours, model)
    by_channels = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if gpu:
        found[CHANNELS_LAST] = partial(ours, by_channels)
    if config.bf16 == "yes" or (config.bf16 == "auto" and (gpu or multiplies_bf16())):
        found[BF16] = partial(ours, by_channels, precision="bf16")
        if config.compile == "yes" or (config.compile == "auto" and gpu):
            compiled: Any = torch.compile(copy.deepcopy(by_channels).requires_grad_(False))
            found[COMPILED] = partial(ours, compiled, precision="bf16")
        if config.compile != "no" and gpu:
            graphed: Any = torch.compile(copy.deepcopy(by_channels).requires_grad_(False), mode="reduce-overhead")
            found[GRAPHED] = partial(ours, graphed, precision="bf16")
    return found


def steps_alone(case: Case, model: nn.Module, images: Tensor, labels: Tensor, config: Config) -> dict[str, Any]:
    """Name → as many steps as an attack has, without the model: the published loop's and ours."""
    import torch

    from attacks.pgd import cross_entropy, evaluate, under_attack
    from kernels.pgd_step import pgd_step

    attack = settings(case, config.steps)
    with under_attack(model, images.device) as network:
        gradient = evaluate(network, images, labels, cross_entropy)[2]
    delta = torch.zeros_like(images, requires_grad=True)
    optimizer = torch.optim.SGD([delta], lr=attack["step_size"], maximize=True)
    step = torchattacks_step(attack)

    def torchattacks_steps() -> None:
        adv = images
        for _ in range(config.steps):
            adv = step(adv, gradient, images)

    def smoothadv_steps() -> None:
        for _ in range(config.steps):
            delta.grad = gradient.clone()  # the step destroys it
            smoothadv_step(delta, images, optimizer, attack["eps"])

    def our_steps() -> None:
        adv = images.clone()
        for _ in range(config.steps):
            options = {name: attack[name] for name in ("norm", "order", "eps", "step_size")}
            pgd_step(adv, gradient, images, **options, out=adv)

    published = {FROZEN: smoothadv_steps} if case.attack == "smoothadv" else {TORCHATTACKS: torchattacks_steps}
    return {**published, OURS: our_steps}


def measure(case: Case, config: Config, count: Callable[[int], None]) -> list[Figure]:
    """Times of everybody by turns, and ratios within rounds. Raises DataError where the attacks differ."""
    import torch

    model, images, labels = build(case, torch.device(config.device))
    ways = competitors(case, model, images, labels, config)
    figures = check(case, model, images, labels, ways)
    parts = steps_alone(case, model, images, labels, config)
    calls: dict[tuple[str, str], Callable[[], Any]] = {("attack", name): way for name, way in ways.items()}
    calls |= {("step", name): part for name, part in parts.items()}
    for part in parts.values():
        part()  # caches and allocators are warm now, as the check has run the attacks
    count(case.batch_size)
    repeats, between = REPEATS[config.device], partial(count, case.batch_size)
    seconds = take_turns(calls, config.rounds, config.device, repeats=repeats, between=between)

    for name in ways:
        rates = [case.batch_size / found for found in seconds["attack", name]]
        figures.append(Figure(case, "attacked images/s", spread(rates), name))
    published = [name for name in ways if not name.startswith(OURS)]
    for against in published:
        for name in ways:
            if name in published:
                continue
            gain = ratio(seconds["attack", against], seconds["attack", name])
            must, stretch = TARGETS.get((config.device, case.model, name, against), (None, None))
            figures.append(Figure(case, "speed-up", gain, name, against, must, stretch))
    for name in parts:
        percent = [100 * a / b for a, b in zip(seconds["step", name], seconds["attack", name], strict=True)]
        figures.append(Figure(case, "share of the steps, %", spread(percent), name))
    return figures


def check(
    case: Case, model: nn.Module, images: Tensor, labels: Tensor, ways: dict[str, Callable[[], Tensor]]
) -> list[Figure]:
    """What each attack achieves, by the float32 model. Raises DataError unless they are the same attack."""
    import torch

    from attacks.pgd import cross_entropy

    figures: list[Figure] = []
    expected = torch.empty(0)
    first = next(iter(ways))
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        with torch.no_grad():
            clean = cross_entropy(model(images), labels)
        for name, way in ways.items():
            adv = way()
            with torch.no_grad():
                logits = model(adv)
            gained = float((cross_entropy(logits, labels) - clean).mean())
            withstood = logits.argmax(1) == labels
            if name == first:
                expected, by_first, goal = adv, withstood, gained
                length = (expected - images).flatten(1).norm(dim=1)
            distance = float(((adv - expected).flatten(1).norm(dim=1) / length).median())
            others = int((withstood != by_first).sum())
            same = name in (REFERENCE, NOT_FOLDED) or not name.startswith(OURS)
            if (
                not goal > 0
                or not abs(gained - goal) <= GAIN * goal
                or others > max(1, FOOLED * len(images))
                or (same and not distance <= DISTANCE)
            ):
                raise DataError(
                    f"{case.model}, {case.attack}: {name} is not the attack of {first}: the loss grows by {gained:.4g} "
                    f"instead of {goal:.4g}, {others} of {len(images)} images end otherwise, the images differ by "
                    f"{100 * distance:.2g} % of the perturbation: not timed"
                )
            for metric, value in (
                ("loss gained", gained),
                ("robust accuracy, %", 100 * float(withstood.float().mean())),
                ("same outcome as the published loop's, %", 100 - 100 * others / len(images)),
                ("distance from the published loop's, % of the perturbation", 100 * distance),
            ):
                figures.append(Figure(case, metric, spread([value]), name, "" if name == first else first))
    return figures
