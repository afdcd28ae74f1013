"""DDN on a batch: the shortest L2 perturbation that fools a model, by decoupled direction and norm.

Rony et al. 2019 (arXiv:1811.09600), in the form of the SmoothAdv code (Salman et al., arXiv:1906.04584). From δ = 0,
for i = 0 … steps - 1, with W = ‖max(x, 1 - x)‖ (no perturbation is longer) and radius r = init_norm:

    look at model(x + δ + noise): if it is fooled and ‖δ‖ < best (at first W), δ is kept
    δ ← δ + α_i·g/‖g‖                     g = ∇ loss, α_i = 0.01 + 0.99·(1 + cos(π(i + 1)/steps))/2
    r ← min(r·(1 - γ if fooled else 1 + γ), W);    δ ← δ·r/‖δ‖
    x + δ rounded to 8 bits if `quantise`, clipped to [0, 1]

and at the end the δ that was kept, none if there is none. With m noisy copies of each image (see attacks/pgd.py) the
loss is that of their mean probability, and the model is fooled if the majority of copies is (ties: the lowest class).

    variant      differs
    published    with max_norm δ is at last scaled to it and then rounded to k/255: longer than max_norm by up to 7 % at
                 0.25, and no 8-bit image unless x is one. The last iterate is never looked at
    foolbox      α_i with i for i + 1, and ≤ for < where δ is kept; quantise=False and no max_norm make foolbox's DDN
    corrected    the last iterate is looked at, too, and ≤ decides; what max_norm shortens is rounded towards x, an
                 8-bit image, so that it is no longer than max_norm

In all of them an image that is wrong already comes back as it is, and so does one that no step has fooled.

The steps do not go through the fused step of kernels/pgd_step.py: that one pulls δ back into a ball, and this one sets
its length, outwards too, to a radius that the same pass over the model decides. They take less than 1 % of the time of
a pass over a ResNet-20 (128 images, one CPU thread). The host waits once, before the loop, to look at the images.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from attacks.losses import cross_entropy
from attacks.losses import targeted as opposite
from attacks.pgd import Precision, ZeroGradient, check_batch, drawn_like, evaluate, noisy, prepared, under_attack
from kernels.pgd_step import Number

Variant = Literal["published", "foolbox", "corrected"]

LEVELS = 255  # an 8-bit image is a whole number of them


def ddn(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    steps: int,
    init_norm: Number = 1.0,
    gamma: float = 0.05,
    max_norm: Number | None = None,
    quantise: bool = True,
    targeted: bool = False,
    noise: Tensor | None = None,
    variant: Variant = "published",
    zero_gradient: ZeroGradient = "rest",
    generator: torch.Generator | None = None,
    precision: Precision = "fp32",
    eval_mode: bool = True,
    fold: bool = True,
    check_images: bool = True,
) -> Tensor:
    """Images like `images` that fool the model, each as near as was found; those that none was found for as they are.

    Args:
        model, images: as in `attacks.pgd.pgd`.
        labels: classes [B] int64 that the images are to leave, or with `targeted` to reach.
        steps: number of steps, each one forward and one backward pass; 0 gives the images.
        init_norm: first radius, for pixels in [0, 1]; a number or one for each image, [B] float32.
        gamma: by what share the radius changes in a step, in (0, 1).
        max_norm: no perturbation is to be longer (it may then no longer fool the model; see the variants); like
            init_norm; 0 gives the images. Adversarial training with DDN sets both to eps.
        quantise: perturb 8-bit images to 8-bit images.
        noise: [m·B, ...], added to what the model sees; row i·m + j is copy j of image i.
        variant: see the top of the file.
        zero_gradient: an image whose gradient is exactly zero keeps its direction ("rest") or gets one drawn by
            `generator` ("randn"), as the published code does.
        precision, eval_mode, fold, check_images: as in `attacks.pgd.pgd`.

    Returns:
        A new tensor without a graph, in the images' memory format.

    Raises:
        ValueError: what `check_batch`, `prepared` and `under_attack` refuse, labels that are not classes [B], steps
            negative, a norm or gamma out of range, an unknown variant.
    """
    if steps < 0:
        raise ValueError(f"steps must be at least 0, not {steps}")
    if not 0 < gamma < 1:
        raise ValueError(f"gamma must be in (0, 1), not {gamma}")
    for name, value, positive in (("init_norm", init_norm, True), ("max_norm", max_norm, False)):
        if isinstance(value, Tensor):
            if value.shape != images.shape[:1]:
                raise ValueError(f"{name} {tuple(value.shape)} must be a number or [{len(images)}], one for each image")
        elif value is not None and not (value > 0 if positive else value >= 0):
            raise ValueError(f"{name} must be {'above' if positive else 'at least'} 0, not {value}")
    if variant not in ("published", "foolbox", "corrected"):
        raise ValueError(f"variant must be 'published', 'foolbox' or 'corrected', not {variant!r}")
    if zero_gradient not in ("rest", "randn"):
        raise ValueError(f"zero_gradient must be 'rest' or 'randn', not {zero_gradient!r}")
    check_batch(images, labels, look=check_images)
    if labels.ndim != 1:
        raise ValueError(f"labels {tuple(labels.shape)} must be classes [{len(images)}]")
    with under_attack(model, images.device, precision=precision, eval_mode=eval_mode, fold=fold) as network:
        if steps == 0 or not images.numel() or (not isinstance(max_norm, Tensor) and max_norm == 0):
            return images.detach().clone()
        clean, labels, noise = prepared(images, labels, noise)
        loss = opposite(cross_entropy) if targeted else cross_entropy
        delta, best = torch.zeros_like(clean), torch.zeros_like(clean)
        furthest = _length(torch.maximum(clean, 1 - clean))
        shortest, radius = furthest, _each(init_norm, clean).expand_as(furthest)
        for step in range(steps):
            logits, _, gradient = evaluate(network, noisy(clean + delta, noise), labels, loss)
            fooled = ((vote(logits, len(clean)) == labels) == targeted).reshape(furthest.shape)
            best, shortest = _nearer(best, shortest, delta, fooled, variant)
            direction = _unit(gradient.unflatten(0, (len(clean), -1)).sum(1))
            if zero_gradient == "randn":
                direction = torch.where(_length(direction) == 0, drawn_like(clean, generator), direction)
            anneal = (step if variant == "foolbox" else step + 1) / steps
            delta = delta + (0.01 + 0.99 * (1 + math.cos(math.pi * anneal)) / 2) * direction
            radius = torch.minimum(radius * torch.where(fooled, 1 - gamma, 1 + gamma), furthest)
            length = _length(delta)
            delta = delta * (radius / length.masked_fill(length == 0, 1))
            moved = clean + delta
            if quantise:
                moved = moved.mul_(LEVELS).round_().div_(LEVELS)
            delta = moved.clamp_(0, 1).sub_(clean)
        if variant == "corrected":
            with torch.no_grad():
                logits = network(noisy(clean + delta, noise))
            fooled = ((vote(logits, len(clean)) == labels) == targeted).reshape(furthest.shape)
            best, _ = _nearer(best, shortest, delta, fooled, variant)
    if max_norm is not None:
        best = _within(best, clean, _each(max_norm, clean), quantise, variant)
    return clean.add_(best).clamp_(0, 1)


def vote(logits: Tensor, samples: int) -> Tensor:
    """The class [B] that most of each image's copies are given, logits [m·B, C]; the lowest one where several are."""
    classes = torch.arange(logits.shape[1], device=logits.device)
    given = logits.argmax(1).unflatten(0, (samples, -1))
    return (given[:, :, None] == classes).sum(1).argmax(1)


def _each(value: Number, clean: Tensor) -> Tensor:
    """A number, or one for each image, [B] or [1] with as many axes as the images."""
    each = value.to(clean.dtype) if isinstance(value, Tensor) else torch.full((1,), value, dtype=clean.dtype)
    return each.to(clean.device).reshape(-1, *[1] * (clean.ndim - 1))


def _length(images: Tensor) -> Tensor:
    """L2 norm of each image, [B] with as many axes as the images."""
    return torch.linalg.vector_norm(images, dim=tuple(range(1, images.ndim)), keepdim=True)


def _unit(gradient: Tensor) -> Tensor:
    """Each gradient over its norm, zero for zero; divided by its largest entry first, whose square may not exist."""
    largest = gradient.abs().amax(tuple(range(1, gradient.ndim)), keepdim=True)
    still = largest == 0
    gradient = gradient / largest.masked_fill(still, 1)
    return gradient / _length(gradient).masked_fill(still, 1)


def _nearer(best: Tensor, shortest: Tensor, delta: Tensor, fooled: Tensor, variant: Variant) -> tuple[Tensor, Tensor]:
    """The perturbations kept, and their lengths, after one look."""
    length = _length(delta)
    kept = fooled & (length < shortest if variant == "published" else length <= shortest)
    return torch.where(kept, delta, best), torch.where(kept, length, shortest)


def _within(delta: Tensor, clean: Tensor, longest: Tensor, quantise: bool, variant: Variant) -> Tensor:
    """Perturbations no longer than `longest` but for the variant's rounding."""
    length = _length(delta)
    shorter = torch.where(length > longest, delta * (longest / (length + 1e-7)), delta)
    if not quantise:
        return shorter
    if variant != "corrected":
        return shorter.mul_(LEVELS).round_().div_(LEVELS)
    level = (clean + shorter) * LEVELS
    towards = torch.where(shorter > 0, level.floor(), level.ceil()) / LEVELS - clean
    return torch.where(length > longest, towards, delta)
