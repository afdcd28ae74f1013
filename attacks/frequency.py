"""Attacks on models of frequency-flipped images: the L2 ball around a flipped image, and the box of the pixels.

A flipped image x = T u (kernels/dct.py: `flip`) is a picture u in [0, 1], seen through an orthogonal map that is its
own inverse. A perturbation of x has to leave u a picture, so it ends in the intersection of

    B = {z: ‖z - x‖ ≤ eps}     P_B(z) = x + (z - x)·min(1, eps/‖z - x‖)
    C = {z: T z in [0, 1]}     P_C(z) = T clip(T z, 0, 1)

Projecting onto one and then the other ends inside both (x is inside both), but not at the nearest point: at the golden
`dykstra`'s points it is off by up to 0.56 at eps 2. Two ways to the nearest point:

    exact     T is orthogonal, so it is T u for the nearest point u of ball and box in pixels: a root in one unknown,
              order `nearest` of kernels/pgd_step.py. Right to rounding.
    dykstra   y = z, a = b = 0; repeat v = P_B(y + a), a += y - v, y = P_C(v + b), b += v - y. Both corrections a and b
              are what alternating projections lack. Off by 1e-3 after 30 sweeps from three radii away, 92 from ten.

"Hold me tight!" (Ortiz-Jimenez et al. 2020, arXiv:2002.06349) trains on flipped data with the second and released no
code of it: sweeps, steps and step size are unknown. Everything here runs in pixels and flips twice at the ends, which
is the same thing: T drops out of norms and inner products.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from attacks.losses import Loss, cross_entropy
from attacks.losses import targeted as opposite
from attacks.pgd import Network, Precision, check_batch, draw_from_ball, evaluate, pgd, prepared, under_attack
from kernels.dct import flip
from kernels.dispatch import Kernel
from kernels.pgd_step import Number, pgd_step

Projection = Literal["exact", "dykstra"]

# How far the pixels of flipped images may leave [0, 1], to which they are clipped: flipping in float32 is off by 1e-6,
# and half a step of an 8-bit image is 2e-3.
BOX_TOLERANCE = 1e-4


class Flipped(nn.Module):
    """What takes flipped images, as a module that takes the pictures; gradients go through the flip."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(flip(images))


def project_exact(points: Tensor, clean: Tensor, eps: Number, *, kernel: Kernel = "auto") -> Tensor:
    """The nearest point of ball ∩ box to each of `points`, all in the flipped domain.

    Args:
        points, clean: [B, ..., H, W] float32 or float64; `clean` flipped images, their pixels in [0, 1].
        eps: radius of the ball, a number or [B] float32.
        kernel: see kernels/dispatch.py.

    Raises:
        ValueError: what `flip` and `pgd_step` refuse.
    """
    return flip(_nearest(flip(points), flip(clean), eps, kernel))


def project_dykstra(points: Tensor, clean: Tensor, eps: Number, sweeps: int = 30) -> Tensor:
    """`project_exact` by Dykstra's algorithm. What is left outside the ball is then pulled towards `clean`.

    ValueError: fewer than one sweep, eps negative or NaN, and what `flip` refuses.
    """
    return flip(_dykstra(flip(points), flip(clean), eps, sweeps))


def pgd_flipped(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: Number,
    step_size: Number,
    steps: int,
    projection: Projection = "exact",
    sweeps: int = 30,
    loss: Loss = cross_entropy,
    targeted: bool = False,
    random_start: bool = False,
    generator: torch.Generator | None = None,
    precision: Precision = "fp32",
    eval_mode: bool = True,
    fold: bool = True,
    check_images: bool = True,
    kernel: Kernel = "auto",
) -> Tensor:
    """L2 PGD on a model that takes flipped images: unit gradient, step, nearest point of ball and box.

    Args:
        model: flipped images → logits [B, C]. One with the flip inside takes pixels: use `pgd`, with order `nearest`.
        images: flipped images [B, ..., H, W], float32, or float64 with a model of that type.
        eps, step_size: lengths in L2, the same in both domains; numbers or [B] float32.
        projection, sweeps: see the top of the file; sweeps are those of `dykstra`.
        labels, steps, loss, targeted, random_start, generator, precision, eval_mode, fold, kernel: see `pgd`.
        check_images: False if the images' pixels are known to lie in [0, 1]: saves the one wait for the device.

    Returns:
        Flipped images, contiguous, a new tensor without a graph; the images themselves if steps or the number eps is 0.

    Raises:
        ValueError: another projection, pixels outside [0, 1] by more than BOX_TOLERANCE (within it they are clipped),
            steps negative, fewer than one sweep, and what `pgd`, `pgd_step` and `flip` refuse.
    """
    if projection not in ("exact", "dykstra"):
        raise ValueError(f"projection must be 'exact' or 'dykstra', not {projection!r}")
    if sweeps < 1 or steps < 0:
        raise ValueError(f"sweeps must be at least 1 and steps at least 0, not {sweeps} and {steps}")
    check_batch(images, labels, look=False)
    clean = flip(images.detach())
    if check_images and images.numel():
        low, high = torch.stack(torch.aminmax(clean)).tolist()
        if not (low >= -BOX_TOLERANCE and high <= 1 + BOX_TOLERANCE):
            raise ValueError(
                f"the pixels of flipped images {tuple(images.shape)} reach from {low:g} to {high:g}, beyond [0, 1]: "
                "were the images flipped?"
            )
    if steps == 0 or not images.numel() or (not isinstance(eps, Tensor) and eps == 0):
        return images.detach().clone(memory_format=torch.contiguous_format)
    clean, labels, _ = prepared(clean, labels, None)
    with under_attack(model, images.device, precision=precision, eval_mode=eval_mode, fold=fold) as network:
        flipped = Flipped(network)
        if projection == "exact":
            adv = pgd(
                flipped, clean, labels, norm="l2", order="nearest", eps=eps, step_size=step_size, steps=steps,
                loss=loss, targeted=targeted, random_start=random_start, generator=generator, precision=precision,
                eval_mode=eval_mode, fold=False, check_images=False, kernel=kernel,
            )  # fmt: skip
            return flip(adv)
        objective = opposite(loss) if targeted else loss
        adv = draw_from_ball(clean, eps, "l2", generator) if random_start else clean.clone()
        for _ in range(steps):
            gradient = evaluate(flipped, adv, labels, objective)[2]
            adv = _dykstra(adv + _each(step_size, adv) * _unit(gradient), clean, eps, sweeps)
    return flip(adv)


def _nearest(points: Tensor, clean: Tensor, eps: Number, kernel: Kernel) -> Tensor:
    """A step of length 0; its gradient may be anything."""
    return pgd_step(points, clean, clean, step_size=0, eps=eps, norm="l2", order="nearest", kernel=kernel)


def _dykstra(points: Tensor, clean: Tensor, eps: Number, sweeps: int) -> Tensor:
    """`project_dykstra` in pixels, where P_C is a clip."""
    if sweeps < 1:
        raise ValueError(f"sweeps must be at least 1, not {sweeps}")
    if not isinstance(eps, Tensor) and not eps >= 0:
        raise ValueError(f"eps must be a number >= 0, not {eps}")
    found = points
    ball, box = torch.zeros_like(points), torch.zeros_like(points)
    for _ in range(sweeps):
        found = found + ball
        inside = _into_ball(found, clean, eps)
        ball = found - inside
        inside = inside + box
        found = inside.clamp(0, 1)
        box = inside - found
    return _into_ball(found, clean, eps)  # on the way to a point of the box nothing leaves it


def _into_ball(points: Tensor, clean: Tensor, eps: Number) -> Tensor:
    delta = points - clean
    length = torch.linalg.vector_norm(delta.flatten(1), dim=1).reshape(-1, *[1] * (delta.ndim - 1))
    bound = _each(eps, points)
    return clean + delta * torch.where(length <= bound, 1.0, bound / length)


def _unit(gradient: Tensor) -> Tensor:
    """Each gradient [B, ...] over its length; 0 stays 0. Over its largest entry first: squares of small ones vanish."""
    rows = gradient.flatten(1)
    rows = rows / rows.abs().amax(1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
    length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return (rows / length.masked_fill(length == 0, 1)).reshape(gradient.shape)


def _each(value: Number, images: Tensor) -> Number:
    """A number, or one for each image [B] as [B, 1, ...] of the images' type."""
    return value.to(images.dtype).reshape(-1, *[1] * (images.ndim - 1)) if isinstance(value, Tensor) else value
