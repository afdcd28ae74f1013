"""Auto-PGD (Croce & Hein 2020, arXiv:2003.01690): projected gradient ascent without a step size to choose, batched.

    z       = P(x_k + η ∇f(x_k))                            P: onto the ball, then clipped to [0, 1]
    x_{k+1} = P(x_k + a (z - x_k) + (1 - a)(x_k - x_{k-1}))          a = 0.75, in the first step 1

Each image has its own step η, 2 eps at first. After steps w_1 < w_2 < ... (`checkpoints`) the step of an image is
halved, and the image goes back to the best point it has seen, with the gradient there, if

    1. its loss grew in at most 75 % of the steps since the last checkpoint, or
    2. its step was not halved at the last checkpoint, and its greatest loss has not grown since.

The start is drawn from the surface of the ball (L2: a Gaussian direction; L∞: uniform in the cube, stretched until one
pixel touches a face) and clipped to [0, 1], as in the authors' code. Two of AutoAttack's standard attacks are here:

    apgd            cross-entropy (APGD-CE), or any other loss of attacks/losses.py's kind
    apgd_targeted   APGD-T: (z_t - z_y) / (z_(1) - (z_(3) + z_(4))/2) for the 9 likeliest wrong classes t in turn, each
                    on the images that still stand; z_(i): the i-th largest logit. With three classes z_(1) - z_(3)
                    stands below, with two nothing: the ratio would be constant. Fewer classes, fewer targets.

Where paper and authors' code differ: "at most" 75 % is the code's, the paper writes "less than". Checkpoints are the
paper's ⌈p_j N⌉; the code's rounding gives the same for N = 100, but of N = 20 every step from the 9th on is one. The
first step of a window is compared with the loss where it began, as in the paper (the code compares the first step of
all with 0, and a step after a return with the loss before the return). Condition 2 can hold at the first checkpoint, as
in the paper; in the code it cannot.

Cost: N + 1 forward and backward passes, one forward pass of the clean images, and with `until_fooled` fewer: an image
that fools the model leaves the batch at the next checkpoint. Only then does the host wait for the device. Nothing of
this changes another image's way: in evaluation mode images do not depend on each other, up to roundings of the model.
Steps run through kernels/pgd_step.py, with one step size for each image; parameters never get gradients.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from attacks.losses import Loss, cross_entropy
from attacks.pgd import (
    Network,
    Norm,
    Precision,
    check_batch,
    evaluate,
    last_word,
    misclassified,
    prepared,
    under_attack,
)
from kernels.dispatch import Kernel
from kernels.pgd_step import pgd_step

MOMENTUM = 0.75  # a
GROWING = 0.75  # share of steps in which the loss has to grow


@dataclass(frozen=True)
class Found:
    """What an attack found around each image.

    images: like the images given: one that the model gets wrong where there is one, else the one of the greatest loss.
    fooled: bool [B]; an image that the model gets wrong as it is counts, and comes back as it is.
    losses: [B], the greatest loss that was met; of images that come back as they are, theirs.
    """

    images: Tensor
    fooled: Tensor
    losses: Tensor


def check_settings(norm: str, eps: float, steps: int) -> None:
    """Raises ValueError for another norm, eps negative or not finite, steps (or queries) below 1."""
    if norm not in ("linf", "l2"):
        raise ValueError(f"norm must be 'linf' or 'l2', not {norm!r}")
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps must be a finite number of at least 0, not {eps}")
    if steps < 1:
        raise ValueError(f"steps and queries must be at least 1, not {steps}")


def look(network: Network, images: Tensor) -> Tensor:
    """Logits [B, C], whatever the attack's precision; see `last_word`."""
    with last_word(images.device):
        return network(images)


def checkpoints(steps: int) -> list[int]:
    """The steps, counted from 1, after which step sizes may change: ⌈p_j·steps⌉ for p = 22, 41, 57, 70, ... 99 %."""
    percent, width, found = 0, 22, []
    while (percent := percent + width) < 100:
        found.append(-(-percent * steps // 100))
        width = max(width - 3, 6)
    return sorted({step for step in found if step < steps})


def targeted_dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Targeted difference of logits ratio [B] of logits [B, C], to be raised; labels [B, 2]: true class and target."""
    largest = logits.topk(min(4, logits.shape[1]), dim=1).values
    difference = logits.gather(1, labels[:, 1:]) - logits.gather(1, labels[:, :1])
    if largest.shape[1] == 2:
        return difference[:, 0]
    return difference[:, 0] / (largest[:, 0] - largest[:, 2:].mean(1) + 1e-12)


@dataclass
class _Climb:
    """Images on their way, one row each; place: of the row in the batch that was given."""

    place: Tensor
    clean: Tensor
    labels: Tensor
    point: Tensor
    previous: Tensor
    gradient: Tensor
    loss: Tensor
    best: Tensor
    best_gradient: Tensor
    best_loss: Tensor
    best_loss_before: Tensor  # at the last checkpoint
    step_size: Tensor
    growing: Tensor  # steps since the last checkpoint in which the loss grew
    halved: Tensor  # at the last checkpoint
    wrong: Tensor  # the model got a point wrong,
    adversarial: Tensor  # the last such point, else the start

    def rows(self, chosen: Tensor) -> _Climb:
        """Those at the places `chosen`."""
        return _Climb(**{field.name: getattr(self, field.name)[chosen] for field in dataclasses.fields(self)})


def apgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    norm: Norm,
    eps: float,
    steps: int = 100,
    loss: Loss = cross_entropy,
    until_fooled: bool = True,
    generator: torch.Generator | None = None,
    precision: Precision = "fp32",
    check_images: bool = True,
    kernel: Kernel = "auto",
) -> Found:
    """APGD with one start. For APGD-T see `apgd_targeted`.

    Args:
        model: images in [0, 1] → logits [B, C], as in `attacks.pgd.pgd`; attacked in evaluation mode.
        images: [B, ...] float32, or float64 with a model of that type; contiguous or channels-last.
        labels: true classes [B] int64; or [B, n] for a loss that needs more, the true class being the first column.
        norm, eps: of the ball, for pixels in [0, 1]; 0 gives the images.
        steps: N.
        until_fooled: images leave the batch once the model gets them wrong, see the top of the file. False: all take
            all steps, what is found of each is the point of the greatest loss, and the host never waits.
        generator: of the images' device, for the start; None: the global one.
        precision: see `under_attack`; whether a point fools the model is decided without autocast in either case.
        check_images, kernel: as in `attacks.pgd.pgd`.

    Raises:
        ValueError: what `attacks.pgd.pgd` refuses of these, and steps below 1.
    """
    check_settings(norm, eps, steps)
    check_batch(images, labels, look=check_images)
    with under_attack(model, images.device, precision=precision) as network:
        if not images.numel():
            return Found(images.detach().clone(), labels.new_zeros(0, dtype=torch.bool), images.new_zeros(0))
        clean, labels, _ = prepared(images, labels, None)
        logits = look(network, clean)
        found = Found(images.detach().clone(), _wrong(logits, labels), loss(logits, labels))
        if eps == 0:
            return found
        start = _start(clean, eps, norm, generator)
        climb = _begin(network, clean, start, labels, loss, eps)
        if until_fooled:
            climb = climb.rows((~found.fooled).nonzero()[:, 0])
        ends = checkpoints(steps)
        last = 0
        for step in range(1, steps + 1):
            if not len(climb.place):
                return found
            _advance(climb, eps, norm, momentum=MOMENTUM if step > 1 else 1.0, kernel=kernel)
            logits, losses, gradient = evaluate(network, climb.point, climb.labels, loss)
            _take_in(climb, logits, losses, gradient)
            if step in ends:
                _halve(climb, step - last)
                last = step
            if step in ends or step == steps:
                climb = _record(climb, found, network, until_fooled)
    return found


def apgd_targeted(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    norm: Norm,
    eps: float,
    steps: int = 100,
    targets: int = 9,
    generator: torch.Generator | None = None,
    precision: Precision = "fp32",
    check_images: bool = True,
    kernel: Kernel = "auto",
) -> Found:
    """APGD-T: `apgd` on `targeted_dlr`, one run for each of the `targets` likeliest wrong classes of the clean image.

    A run takes the images that no run before has got the model to misclassify. With fewer than targets + 1 classes, all
    wrong ones are targets. Arguments, result and errors are those of `apgd`; labels are [B].
    """
    check_settings(norm, eps, steps)
    check_batch(images, labels, look=check_images)
    if labels.ndim != 1 or targets < 1:
        raise ValueError(f"labels {tuple(labels.shape)} must be [{len(images)}], and targets at least 1, not {targets}")
    with under_attack(model, images.device, precision=precision) as network:
        logits = look(network, images.detach().clamp(0, 1))
    others = logits.scatter(1, labels[:, None], float("-inf"))
    ranked = others.topk(min(targets, logits.shape[1] - 1), dim=1).indices
    found = Found(images.detach().clone(), _wrong(logits, labels), torch.full_like(logits[:, 0], float("-inf")))
    for rank in range(ranked.shape[1]):
        standing = (~found.fooled).nonzero()[:, 0]
        if not len(standing):
            break
        run = apgd(
            model,
            images[standing],
            torch.stack([labels, ranked[:, rank]], dim=1)[standing],
            norm=norm,
            eps=eps,
            steps=steps,
            loss=targeted_dlr,
            generator=generator,
            precision=precision,
            check_images=False,
            kernel=kernel,
        )
        better = run.fooled | (run.losses > found.losses[standing])
        found.images[standing[better]] = run.images[better]
        found.fooled[standing] = run.fooled
        found.losses[standing] = torch.maximum(run.losses, found.losses[standing])
    return found


def _wrong(logits: Tensor, labels: Tensor) -> Tensor:
    return misclassified(logits, labels if labels.ndim == 1 else labels[:, 0])


def _where(chosen: Tensor, ours: Tensor, others: Tensor) -> Tensor:
    """`ours` in the rows `chosen` [B], `others` elsewhere."""
    return torch.where(chosen.reshape(-1, *[1] * (ours.ndim - 1)), ours, others)


def _start(clean: Tensor, eps: float, norm: Norm, generator: torch.Generator | None) -> Tensor:
    """A random point on the surface of each ball, clipped to [0, 1]; the draw does not depend on the memory format."""
    if norm == "linf":
        noise = 2 * torch.rand(clean.shape, dtype=clean.dtype, device=clean.device, generator=generator) - 1
        length = noise.flatten(1).abs().amax(1)
    else:
        noise = torch.randn(clean.shape, dtype=clean.dtype, device=clean.device, generator=generator)
        length = torch.linalg.vector_norm(noise.flatten(1), dim=1)
    noise *= (eps / length).reshape(-1, *[1] * (clean.ndim - 1))
    return clean.clone().add_(noise).clamp_(0, 1)


def _begin(network: Network, clean: Tensor, start: Tensor, labels: Tensor, loss: Loss, eps: float) -> _Climb:
    logits, losses, gradient = evaluate(network, start, labels, loss)
    no = torch.zeros(len(clean), dtype=torch.bool, device=clean.device)
    return _Climb(
        place=torch.arange(len(clean), device=clean.device),
        clean=clean,
        labels=labels,
        point=start,
        previous=start,
        gradient=gradient,
        loss=losses,
        best=start,
        best_gradient=gradient,
        best_loss=losses,
        best_loss_before=losses,
        step_size=torch.full((len(clean),), 2 * eps, device=clean.device),
        growing=torch.zeros(len(clean), dtype=torch.int64, device=clean.device),
        halved=no,
        wrong=_wrong(logits, labels),
        adversarial=start,
    )


def _advance(climb: _Climb, eps: float, norm: Norm, momentum: float, kernel: Kernel) -> None:
    """One step with momentum; both projections are those of the fused step."""
    move = partial(pgd_step, eps=eps, norm=norm, order="ball_then_box", kernel=kernel)
    point = move(climb.point, climb.gradient, climb.clean, step_size=climb.step_size)
    if momentum < 1:
        point = climb.point.lerp(point, momentum).add_(climb.point - climb.previous, alpha=1 - momentum)
        move(point, climb.gradient, climb.clean, step_size=0.0, out=point)  # only projects
    climb.previous, climb.point = climb.point, point


def _take_in(climb: _Climb, logits: Tensor, losses: Tensor, gradient: Tensor) -> None:
    """Notes what the model says at the new points."""
    wrong = _wrong(logits, climb.labels)
    climb.wrong = climb.wrong | wrong
    climb.adversarial = _where(wrong, climb.point, climb.adversarial)
    climb.growing = climb.growing + (losses > climb.loss)
    better = losses > climb.best_loss
    climb.best = _where(better, climb.point, climb.best)
    climb.best_gradient = _where(better, gradient, climb.best_gradient)
    climb.best_loss = torch.where(better, losses, climb.best_loss)
    climb.loss, climb.gradient = losses, gradient


def _halve(climb: _Climb, length: int) -> None:
    """A checkpoint, `length` steps after the last one."""
    stuck = ~climb.halved & (climb.best_loss <= climb.best_loss_before)
    halve = (climb.growing <= GROWING * length) | stuck
    climb.step_size = torch.where(halve, climb.step_size / 2, climb.step_size)
    climb.point = _where(halve, climb.best, climb.point)
    climb.gradient = _where(halve, climb.best_gradient, climb.gradient)
    climb.loss = torch.where(halve, climb.best_loss, climb.loss)
    climb.halved, climb.best_loss_before = halve, climb.best_loss
    climb.growing = torch.zeros_like(climb.growing)


def _record(climb: _Climb, found: Found, network: Network, until_fooled: bool) -> _Climb:
    """Writes what is known into `found`; the rows that are to go on."""
    if torch.is_autocast_enabled(climb.point.device.type):
        # A point that fools the model in bfloat16 alone is none.
        climb.wrong = climb.wrong & _wrong(look(network, climb.adversarial), climb.labels)
    images = _where(climb.wrong, climb.adversarial, climb.best) if until_fooled else climb.best
    found.images[climb.place] = images
    found.losses[climb.place] = climb.best_loss
    found.fooled[climb.place] = climb.wrong | found.fooled[climb.place]
    return climb.rows((~climb.wrong).nonzero()[:, 0]) if until_fooled else climb
