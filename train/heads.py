"""Linear heads on stored features: many of them trained side by side, or one solved to its optimum.

Apart from train/probe.py because it is arithmetic that other scripts share: no files, no processes, no command line.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.features import Features
from kernels.dispatch import Kernel
from kernels.probe_loss import multi_head_cross_entropy, multi_head_gradients
from models.featurisers import Featuriser, Kind

# Heads of one product, at most: by type of device, not by what fits, because which heads share a product must not
# depend on the number of processes, or their roundings would. On a CPU, four measure best at 1000 classes.
HEADS_PER_BLOCK = {"cpu": 4, "gpu": 16}
# What plain PyTorch keeps for a logit, forward and backward, in float32: three or four tensors and passing ones.
_BYTES_PER_LOGIT = 24
# L-BFGS: iterations between looks at the distance to the optimum, and their largest number.
_ROUND, _MOST_ITERATIONS = 25, 2000


@dataclass(frozen=True)
class Point:
    """Settings of one head; lr and weight_decay belong to AdamW, penalty to L-BFGS (the other solver's are None)."""

    normalize: bool
    bias: bool
    label_smoothing: float
    lr: float | None = None
    weight_decay: float | None = None
    penalty: float | None = None

    def __str__(self) -> str:
        named = {"lr": self.lr, "weight decay": self.weight_decay, "penalty": self.penalty}
        parts = [f"{name} {value:g}" for name, value in named.items() if value is not None]
        parts += ["normalised"] * self.normalize + ["no bias"] * (not self.bias)
        return ", ".join(parts + [f"smoothing {self.label_smoothing:g}"] * (self.label_smoothing > 0))


@dataclass(frozen=True)
class Arithmetic:
    """How products are computed: on which device, in which type (float32, or autocast's), within how much memory.

    transform: a fixed one on that device, in evaluation mode, that stands before all heads.
    """

    device: torch.device
    autocast: torch.dtype | None = None
    max_logit_bytes: int = 256 * 2**20
    kernel: Kernel = "auto"
    transform: Featuriser | None = None

    def context(self) -> torch.autocast:
        enabled = self.autocast is not None
        return torch.autocast(self.device.type, self.autocast or torch.bfloat16, enabled=enabled)

    def rows(self, heads: int, classes: int, width: int) -> int:
        """How many rows at a time keep logits and features of plain PyTorch within max_logit_bytes; at least 16."""
        return max(16, self.max_logit_bytes // (_BYTES_PER_LOGIT * heads * classes + 8 * width))

    def inputs(self, features: Tensor, normalize: bool, featuriser: Featuriser | None = None) -> Tensor:
        """Stored features as the product takes them, float32 [n, D] on the device.

        They are sent through the transform, through the head's own featuriser, and divided by their L2 norm if asked;
        features that are all 0 stay 0.
        """
        inputs = features.to(self.device, torch.float32)
        if self.transform is not None:
            with torch.no_grad():
                inputs = self.transform(inputs)
        if featuriser is not None:
            with self.context():
                inputs = featuriser(inputs).float()
        return inputs / torch.linalg.vector_norm(inputs, dim=1, keepdim=True).clamp_min(1e-30) if normalize else inputs


# ----------------------------------------------------------------------------------------------------------------------
# Many heads by AdamW
# ----------------------------------------------------------------------------------------------------------------------


Initial = tuple[Tensor, Tensor]  # weight [C, D] and bias [C] that heads start from


def cut_into_blocks(points: Sequence[Point], device: torch.device) -> list[list[int]]:
    """Numbers of the points that share a product: as many as HEADS_PER_BLOCK that agree in `normalize`, in order."""
    blocks, most = [], HEADS_PER_BLOCK["cpu" if device.type == "cpu" else "gpu"]
    for normalize in (False, True):
        same = [number for number, point in enumerate(points) if point.normalize == normalize]
        blocks += [same[i : i + most] for i in range(0, len(same), most)]
    return blocks


class HeadBlock:
    """Some heads [H, C, D] that see the same batches, each trained as torch's AdamW would train it alone.

    All heads start from the same weights: those of `initial`, or drawn as torch.nn.Linear draws them, with a bias of 0;
    where a head has no bias, its gradient is masked and it stays 0. Gradients are clipped head by head.

    Attributes:
        points: settings of the heads; all agree in `normalize`.
        weight: [H, C, D] float32; bias: [H, C] float32.
    """

    def __init__(
        self,
        points: Sequence[Point],
        classes: int,
        width: int,
        *,
        seed: int,
        clip: float,
        arithmetic: Arithmetic,
        initial: Initial | None = None,
    ) -> None:
        assert len({point.normalize for point in points}) == 1, "one product takes one kind of features"
        self.points, self.clip, self.arithmetic = list(points), clip, arithmetic
        self.featurisers: list[Featuriser] = []  # none: see FeaturisedHeads
        device = arithmetic.device
        first, first_bias = initial or _drawn(classes, width, seed)
        self.weight = first.to(device).repeat(len(points), 1, 1)
        self.bias = first_bias.to(device).repeat(len(points), 1)
        self._by_weight, self._by_bias = torch.empty_like(self.weight), torch.empty_like(self.bias)
        self._has_bias = torch.tensor([[float(point.bias)] for point in points], device=device)
        smoothing = [point.label_smoothing for point in points]
        self._smoothing = torch.tensor(smoothing, device=device) if any(smoothing) else 0.0
        # Torch's own optimiser on windows of the two tensors: one pass over memory, where the formula written out in
        # tensor operations takes six. Heads of equal settings share a launch.
        windows = [(self.weight[i], self.bias[i]) for i in range(len(points))]
        for i, (weight, bias) in enumerate(windows):
            weight.grad, bias.grad = self._by_weight[i], self._by_bias[i]
        self._settings = sorted({(point.lr or 0.0, point.weight_decay or 0.0) for point in points})
        groups = [
            {
                "params": [p for point, pair in zip(points, windows, strict=True) for p in pair
                           if (point.lr or 0.0, point.weight_decay or 0.0) == setting],
                "lr": setting[0],
                "weight_decay": setting[1],
            }
            for setting in self._settings
        ]  # fmt: skip
        self._optimizer = torch.optim.AdamW(groups, fused=True)

    def step(self, features: Tensor, labels: Tensor, schedule: float) -> Tensor:
        """One step of every head on a batch; returns its losses [H] before the step, still on the device.

        Args:
            features: [n, D] as stored; labels: int64 [n] on the device.
            schedule: the step's learning rate as a share of each head's peak.
        """
        by_weight, by_bias = self._by_weight, self._by_bias
        inputs = self.arithmetic.inputs(features, self.points[0].normalize)
        with self.arithmetic.context():
            losses = multi_head_gradients(
                inputs,
                self.weight,
                self.bias,
                labels,
                by_weight,
                by_bias,
                label_smoothing=self._smoothing,
                max_logit_bytes=self.arithmetic.max_logit_bytes,
                kernel=self.arithmetic.kernel,
            )
        by_bias *= self._has_bias
        if math.isfinite(self.clip):
            norms = torch.linalg.vector_norm(by_weight, dim=(1, 2)).hypot(torch.linalg.vector_norm(by_bias, dim=1))
            factor = (self.clip / (norms + 1e-6)).clamp(max=1)  # torch.nn.utils.clip_grad_norm_'s
            by_weight *= factor[:, None, None]
            by_bias *= factor[:, None]
        for group, (lr, _) in zip(self._optimizer.param_groups, self._settings, strict=True):
            group["lr"] = lr * schedule
        self._optimizer.step()
        return losses


def _drawn(classes: int, width: int, seed: int) -> Initial:
    """Weights as torch.nn.Linear draws them, and a bias of 0."""
    bound = 1 / math.sqrt(width)
    weight = torch.empty(classes, width).uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed))
    return weight, torch.zeros(classes)


class FeaturisedHeads:
    """Some heads [H, C, D], each behind trained layers of its own; attributes and `step` as of `HeadBlock`.

    The heads have nothing in common to multiply with, so they are trained one after the other on each batch. Batch
    norm sees the whole batch, which is therefore not cut: memory is that of one head's activations and logits.

    Attributes:
        featurisers: one for each head, all starting from the same weights.
    """

    def __init__(
        self,
        points: Sequence[Point],
        classes: int,
        width: int,
        *,
        kind: Kind,
        layers: int,
        seed: int,
        clip: float,
        arithmetic: Arithmetic,
    ) -> None:
        self.points, self.clip, self.arithmetic = list(points), clip, arithmetic
        self.featurisers = []
        for _ in points:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.featurisers.append(Featuriser(width, kind=kind, layers=layers).to(arithmetic.device))
        first, first_bias = _drawn(classes, width, seed)
        self._heads = [
            (first.clone().to(arithmetic.device).requires_grad_(), first_bias.clone().to(arithmetic.device))
            for _ in points
        ]
        for point, (_, bias) in zip(points, self._heads, strict=True):
            bias.requires_grad_(point.bias)
        self._parameters = [
            [*featuriser.parameters(), *(part for part in head if part.requires_grad)]
            for featuriser, head in zip(self.featurisers, self._heads, strict=True)
        ]
        groups = [
            {"params": own, "lr": point.lr, "weight_decay": point.weight_decay}
            for own, point in zip(self._parameters, points, strict=True)
        ]
        self._optimizer = torch.optim.AdamW(groups, fused=True)

    @property
    def weight(self) -> Tensor:
        return torch.stack([weight for weight, _ in self._heads])

    @property
    def bias(self) -> Tensor:
        return torch.stack([bias for _, bias in self._heads])

    def step(self, features: Tensor, labels: Tensor, schedule: float) -> Tensor:
        """One step of every head on a batch; returns its losses [H] before the step.

        Of a single row batch norm has no statistics: it then takes the running ones.
        """
        losses = []
        for point, featuriser, (weight, bias), parameters in zip(
            self.points, self.featurisers, self._heads, self._parameters, strict=True
        ):
            inputs = self.arithmetic.inputs(features, point.normalize, featuriser.train(len(features) > 1))
            with self.arithmetic.context():
                logits = F.linear(inputs, weight, bias)
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=point.label_smoothing)
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter.grad = gradient
            if math.isfinite(self.clip):
                torch.nn.utils.clip_grad_norm_(parameters, self.clip)
            losses.append(loss.detach())
        for group, point in zip(self._optimizer.param_groups, self.points, strict=True):
            group["lr"] = (point.lr or 0.0) * schedule
        self._optimizer.step()
        return torch.stack(losses)


@torch.no_grad()
def score(
    weight: Tensor,
    bias: Tensor,
    normalize: bool,
    data: Features,
    rows: Tensor,
    arithmetic: Arithmetic,
    featuriser: Featuriser | None = None,
) -> tuple[Tensor, Tensor]:
    """Correct answers (int64 [H]) and mean cross-entropy without smoothing (float64 [H]) of heads on some rows.

    weight: [H, C, D]; bias: [H, C]; rows: as `Features.take` wants them; featuriser: stands before all of these heads.
    Where a logit is NaN no answer is correct.
    """
    heads, classes, width = weight.shape
    if featuriser is not None:
        featuriser.eval()
    correct = torch.zeros(heads, dtype=torch.int64, device=weight.device)
    loss = torch.zeros(heads, dtype=torch.float64)
    for features, labels in data.batches(rows, arithmetic.rows(heads, classes, width)):
        inputs, labels = arithmetic.inputs(features, normalize, featuriser), labels.to(weight.device)
        with arithmetic.context():
            logits = F.linear(inputs, weight.flatten(0, 1), bias.flatten())
        logits = logits.float().view(len(labels), heads, classes)
        picked = logits.gather(2, labels[:, None, None].expand(-1, heads, 1)).squeeze(2)
        # argmax gives a NaN's place, which may be that of the label
        correct += ((logits.argmax(2) == labels[:, None]) & picked.isfinite()).sum(0)
        loss += (logits.logsumexp(2) - picked).sum(0).cpu()
    return correct.cpu(), loss / max(len(rows), 1)


# ----------------------------------------------------------------------------------------------------------------------
# One head by L-BFGS
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Solution:
    """An optimum: weight [C, D] and bias [C] float32, the objective, iterations, and how far it can be from the best.

    gap: (norm of the gradient)² / (2 · penalty), an upper bound on objective minus optimum by strong convexity; with a
    bias, which is not penalised, an estimate.
    """

    weight: Tensor
    bias: Tensor
    objective: float
    gap: float
    iterations: int


def solve(
    point: Point,
    data: Features,
    rows: Tensor,
    classes: int,
    arithmetic: Arithmetic,
    *,
    gap: float = 1e-5,
    stopped: Callable[[], bool] = lambda: False,
) -> Solution:
    """Multinomial logistic regression: minimises mean cross-entropy + penalty / 2 · |weight|², the bias not penalised.

    scikit-learn's LogisticRegression(C=1 / (penalty · rows)) has this objective. L-BFGS with a strong Wolfe line search
    over all rows, chunk by chunk, in float64 throughout: an optimum is no better than its gradient. Ends when the bound
    on the gap is below `gap`, when there is no progress, when `stopped` says so, or after 2000 iterations; the bound in
    the result tells.
    """
    assert point.penalty is not None
    penalty, width, device = point.penalty, data.width, arithmetic.device
    weight = torch.zeros(1, classes, width, dtype=torch.float64, device=device, requires_grad=True)
    bias = torch.zeros(1, classes, dtype=torch.float64, device=device, requires_grad=True)
    variables = [weight, bias] if point.bias else [weight]
    chunk = arithmetic.rows(2, classes, width)  # float64 takes twice the memory

    def objective() -> Tensor:
        total = 0.5 * penalty * weight.detach().square().sum()
        weight.grad, bias.grad = penalty * weight.detach(), torch.zeros_like(bias)
        for features, labels in data.batches(rows, chunk):
            inputs = arithmetic.inputs(features, point.normalize).double()
            losses = multi_head_cross_entropy(
                inputs, weight, bias, labels.to(device), label_smoothing=point.label_smoothing, kernel="reference"
            )
            loss = losses[0] * (len(labels) / len(rows))
            loss.backward()
            total += loss.detach()
        return total

    optimizer = torch.optim.LBFGS(
        variables,
        max_iter=_ROUND,
        history_size=10,
        tolerance_grad=0,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )
    last = math.inf
    for done in itertools.count(0, _ROUND):
        found = objective().item()
        gradient = sum(variable.grad.square().sum().item() for variable in variables if variable.grad is not None)
        bound = gradient / (2 * penalty)
        stalled = not last - found > 1e-9 * abs(found)  # also for NaN
        if bound <= gap or stalled or done >= _MOST_ITERATIONS or stopped():
            return Solution(weight.detach()[0].float(), bias.detach()[0].float(), found, bound, done)
        last = found
        optimizer.step(objective)
    raise AssertionError("an endless count has ended")


# ----------------------------------------------------------------------------------------------------------------------
# Which samples
# ----------------------------------------------------------------------------------------------------------------------


def held_out(index: Tensor, fraction: float) -> Tensor:
    """Bool [n]: which samples to keep from training, a share of about `fraction`; decided by sample number alone.

    So the same samples are held out for every encoder, seed and number of processes.
    """
    return torch.from_numpy(_hash(index.numpy(), 0) < np.uint64(int(fraction * (2**64 - 1))))


def few_shots(index: Tensor, labels: Tensor, shots: int, seed: int) -> Tensor:
    """Bool [n]: `shots` samples of every class, fewer where there are fewer; k shots are among k + 1 of the same seed.

    index: int64 [n], sample numbers; labels: int64 [n]; both on the CPU.
    """
    order = np.lexsort((_hash(index.numpy(), 1 + seed), labels.numpy()))
    sorted_labels = labels.numpy()[order]
    starts = np.searchsorted(sorted_labels, sorted_labels, side="left")
    chosen = np.zeros(len(order), dtype=np.bool_)
    chosen[order[np.arange(len(order)) - starts < shots]] = True
    return torch.from_numpy(chosen)


def _hash(numbers: np.ndarray, salt: int) -> np.ndarray:
    """64 bits for each number, by splitmix64's steps (Steele, Lea and Flood, 2014) from a start that salt decides."""
    gamma, mask = 0x9E3779B97F4A7C15, 2**64 - 1
    start = np.uint64((salt + 1) * 0xD1B54A32D192ED03 & mask)
    bits = (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(gamma) ^ start
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(factor)
    return bits ^ (bits >> np.uint64(31))
