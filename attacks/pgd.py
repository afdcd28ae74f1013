"""Projected gradient ascent on a batch: adversarial images in an L2 or L∞ ball around each image, and in [0, 1].

    adv_0 = clean, or drawn from the ball      adv_{i+1} = step(adv_i, ∇ Σ loss(model(adv_i), labels), clean)

The step is kernels/pgd_step.py: both published orders of box and ball, and what happens where a gradient is zero. With
a start at the clean images and cross-entropy, order `box_then_ball` and step 2 eps / steps is SmoothAdv's PGD_L2
without noise (Salman et al., arXiv:1906.04584), `ball_then_box` is torchattacks' PGD and PGDL2 and foolbox's.

The loop is made of parts that other attacks need too:

    under_attack     the module as an attack has to see it: unwrapped, in evaluation mode, in the precision asked for
    evaluate         logits, loss of each image and gradient of each image, from one forward and one backward pass
    draw_from_ball   a random point of each ball
    Loss             (logits [m·B, C], labels [B]) → loss of each image [B], which an attack raises. A targeted one
                     gives its targets as labels and the negative of a loss; one on m noisy copies averages here.

What one pass costs: forward and the gradient of the images. No gradient of a parameter is ever computed, whether
parameters require one or not, so that nothing has to be frozen, and DistributedDataParallel notices nothing. The host
waits for the device once, before the loop, to look at the images (`check_images`).

Precision: images, gradients of images and the step in float32 (or float64, to check against); the loss in float32. Of
the model `precision` decides, whatever autocast the caller is in: "fp32" runs it in the type of its parameters (the
device's TF32 settings hold), "bf16" under autocast. There is no fp16: gradients of single images underflow in it.
Convolutions run fastest on models in `model.to(memory_format=torch.channels_last)`; results keep the images' format.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from kernels.dispatch import Kernel
from kernels.pgd_step import Number, Order, pgd_step

Norm = Literal["linf", "l2"]
Precision = Literal["fp32", "bf16"]
Network = Callable[[Tensor], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]

BOX_TOLERANCE = 1e-6  # float32 images may leave [0, 1] by so much, as resizing in floating point does


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each image [B], in nats, from logits [B, C] and classes [B] int64."""
    return F.cross_entropy(logits, labels, reduction="none")


def unwrapped(model: nn.Module) -> nn.Module:
    """The module whose forward pass an attack runs.

    Not DistributedDataParallel, which would broadcast buffers and wait for other processes. Not a model compiled by
    torch.compile whose parameters are trained: its backward pass computes all their gradients, asked for or not. One
    whose parameters are frozen stays compiled. (A module compiled in place, by `module.compile()`, stays as it is:
    right, but slower in the same way if it is trained.)
    """
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(inner, nn.Module) and (
            isinstance(inner, DistributedDataParallel) or any(weight.requires_grad for weight in inner.parameters())
        ):
            model = inner
        else:
            return model


@contextlib.contextmanager
def under_attack(
    model: nn.Module, device: torch.device, *, precision: Precision = "fp32", eval_mode: bool = True
) -> Iterator[Network]:
    """The model as a function of images, for the time of an attack on images on `device`; gradients are enabled.

    Args:
        model: takes images in [0, 1]: it has to hold its own normalisation.
        precision: see the top of the file.
        eval_mode: evaluation mode meanwhile; afterwards, also after an error, every submodule has its own mode back.
            False leaves the modes alone; batch norm in training mode then counts adversarial images in its statistics.

    Raises:
        ValueError: another precision.
    """
    if precision not in ("fp32", "bf16"):
        raise ValueError(
            f"precision must be 'fp32' or 'bf16', not {precision!r}: gradients of images underflow in fp16"
        )
    module = unwrapped(model)
    # accelerate's `prepare` puts a forward of its own on the module, whose autocast would overrule the one here.
    network: Network = vars(module).get("_original_forward", module)
    in_training = [part for part in module.modules() if part.training]
    # One autocast around all passes: the weights are cast once and not at every step.
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    try:
        if eval_mode and in_training:
            module.eval()
        with torch.inference_mode(False), autocast:  # which enables gradients, within no_grad too
            yield network
    finally:
        for part in in_training:
            part.training = True


def evaluate(network: Network, images: Tensor, labels: Tensor, loss: Loss) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [m·B, C], loss of each image [B] and the gradient of the sum of losses, like images [m·B, ...].

    In evaluation mode images do not depend on each other, so the gradient is that of each image's own loss. Raises
    ValueError for a loss that does not give [B] values. Only inside `under_attack`.
    """
    images = images.detach().requires_grad_()
    logits = network(images)
    with torch.autocast(images.device.type, enabled=False):
        logits = logits if logits.dtype == torch.float64 else logits.float()
        losses = loss(logits, labels)
    if losses.shape != labels.shape[:1]:
        raise ValueError(
            f"the loss has shape {tuple(losses.shape)}: an attack needs that of each image, [{len(labels)}]"
        )
    (gradient,) = torch.autograd.grad(losses.sum(), images)
    return logits.detach(), losses.detach(), gradient


def draw_from_ball(clean: Tensor, eps: Number, norm: Norm, generator: torch.Generator | None = None) -> Tensor:
    """A new tensor like clean [B, ...]: points drawn uniformly from the balls of radius eps, then clipped to [0, 1].

    The draw does not depend on the memory format. (torchattacks draws the radius of an L2 ball uniformly instead, which
    prefers its middle; in thousands of dimensions almost all of the volume is next to the surface.)
    """
    noise = torch.empty(clean.shape, dtype=clean.dtype, device=clean.device)
    each = (-1, *[1] * (clean.ndim - 1))
    radius = eps.to(clean.dtype).reshape(each) if isinstance(eps, Tensor) else eps
    if norm == "linf":
        noise.uniform_(-1, 1, generator=generator)
    else:
        noise.normal_(generator=generator)
        share = torch.rand(len(clean), dtype=clean.dtype, device=clean.device, generator=generator)
        share = share ** (1 / clean[0].numel())
        noise *= (share / torch.linalg.vector_norm(noise.flatten(1), dim=1)).reshape(each)
    return clean.clone().add_(noise.mul_(radius)).clamp_(0, 1)


def pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    norm: Norm,
    eps: Number,
    step_size: Number,
    steps: int,
    order: Order = "box_then_ball",
    loss: Loss = cross_entropy,
    random_start: bool = False,
    generator: torch.Generator | None = None,
    precision: Precision = "fp32",
    eval_mode: bool = True,
    check_images: bool = True,
    kernel: Kernel = "auto",
) -> Tensor:
    """Adversarial images like `images`: `steps` steps that raise each image's loss within its ball and within [0, 1].

    Args:
        model: images in [0, 1] → logits [B, C]. DistributedDataParallel and torch.compile: see `unwrapped`. Parameters
            get no gradients, and neither they nor their requires_grad change.
        images: [B, ...] float32, or float64 with a model of that type; contiguous or channels-last.
        labels: [B], or whatever else with one row for each image `loss` takes.
        norm, order: of the ball, and whether box or ball comes first; see kernels/pgd_step.py.
        eps, step_size: radius of the ball and length of a step in `norm`, for pixels in [0, 1] (8/255, not 8); numbers
            or one for each image, [B] float32.
        steps: number of steps, each one forward and one backward pass; 0, or the number 0 for eps, gives the images.
        loss: what is to grow; see the top of the file.
        random_start: start from `draw_from_ball` with `generator` (of the images' device; None: the global one).
        precision, eval_mode: see `under_attack`.
        check_images: False if the images are known to lie in [0, 1]: saves the one wait for the device.
        kernel: of the step; see kernels/dispatch.py.

    Returns:
        A new tensor without a graph, in the images' memory format: also where images are returned as they are.

    Raises:
        ValueError: images of another type or outside [0, 1] by more than BOX_TOLERANCE (within it they are clipped),
            steps negative, labels or losses that do not fit the images, and what `pgd_step` and `under_attack` refuse.
    """
    if norm not in ("linf", "l2"):
        raise ValueError(f"norm must be 'linf' or 'l2', not {norm!r}")
    if steps < 0:
        raise ValueError(f"steps must be at least 0, not {steps}")
    if images.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"images {tuple(images.shape)} have type {images.dtype}; expected float32 in [0, 1]")
    if labels.shape[:1] != images.shape[:1]:
        raise ValueError(f"labels {tuple(labels.shape)} do not fit images {tuple(images.shape)}")
    if check_images and images.numel():
        low, high = torch.stack(torch.aminmax(images.detach())).tolist()
        if not (low >= -BOX_TOLERANCE and high <= 1 + BOX_TOLERANCE):
            raise ValueError(
                f"images {tuple(images.shape)} reach from {low:g} to {high:g}, beyond [0, 1]: "
                "normalisation belongs into the model"
            )
    with under_attack(model, images.device, precision=precision, eval_mode=eval_mode) as network:
        if steps == 0 or not images.numel() or (not isinstance(eps, Tensor) and eps == 0):
            return images.detach().clone()
        if labels.is_inference():
            labels = labels.clone()  # autograd keeps none that was made in inference mode
        channels_last = images.ndim == 4 and images.is_contiguous(memory_format=torch.channels_last)
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        clean = images.detach().clamp(0, 1).contiguous(memory_format=memory_format)
        adv = draw_from_ball(clean, eps, norm, generator) if random_start else clean.clone()
        for _ in range(steps):
            gradient = evaluate(network, adv, labels, loss)[2]
            pgd_step(adv, gradient, clean, step_size=step_size, eps=eps, norm=norm, order=order, out=adv, kernel=kernel)
    return adv
