"""Projected gradient ascent on a batch: adversarial images in an L2 or L∞ ball around each image, and in [0, 1].

    adv_0 = clean, or drawn from the ball
    adv_{i+1} = step(adv_i, ∇ Σ loss(model(adv_i + noise), labels), clean)

The step is kernels/pgd_step.py: both published orders of box and ball, and what happens where a gradient is zero. With
a start at the clean images and cross-entropy, order `box_then_ball` and step 2 eps / steps is SmoothAdv's PGD_L2
(Salman et al., arXiv:1906.04584; `smoothadv` has its settings), `ball_then_box` is torchattacks' PGD and PGDL2 and
foolbox's.

Noise, m copies of each image, is what SmoothAdv attacks the smoothed classifier with: the same draws in every step,
rows i·m … i·m + m - 1 for image i, and attacks/losses.py says what is raised. A training step that is to see the same
noise ("gradient reuse") draws it, gives it here and uses it again. `gradient_free` is SmoothAdv's variant without
gradients of the model, for which noise is all that there is: g = mean_j(-p_j[label]·noise_j), p_j of copy j.

The loop is made of parts that other attacks need too:

    under_attack     the module as an attack has to see it: unwrapped, in evaluation mode, in the precision asked for,
                     its batch norms folded
    evaluate         logits, loss of each image and gradient of each image, from one forward and one backward pass
    draw_from_ball   a random point of each ball
    Loss             (logits [m·B, C], labels [B]) → loss of each image [B], which an attack raises; see losses.py

What one pass costs: forward and the gradient of the images. No gradient of a parameter is ever computed, whether
parameters require one or not, so that nothing has to be frozen, and DistributedDataParallel notices nothing. The host
waits for the device once, before the loop, to look at the images (`check_images`).

Precision: images, gradients of images and the step in float32 (or float64, to check against); the loss in float32. Of
the model `precision` decides, whatever autocast the caller is in: "fp32" runs it in the type of its parameters (the
device's TF32 settings hold), "bf16" under autocast. There is no fp16: gradients of single images underflow in it.
Convolutions run fastest channels-last: folded models do so by themselves on CPUs and in bf16 (attacks/folding.py),
others in `model.to(memory_format=torch.channels_last)`; results keep the images' format.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from attacks.folding import fold as folded
from attacks.losses import Loss, cross_entropy, mean_log_probabilities
from attacks.losses import targeted as opposite
from kernels.dispatch import Kernel
from kernels.pgd_step import Number, Order, pgd_step

Norm = Literal["linf", "l2"]
Precision = Literal["fp32", "bf16"]
ZeroGradient = Literal["rest", "randn"]
Network = Callable[[Tensor], Tensor]

BOX_TOLERANCE = 1e-6  # float32 images may leave [0, 1] by so much, as resizing in floating point does
_watcher: ContextVar[Callable[[], None] | None] = ContextVar("watcher", default=None)


@contextlib.contextmanager
def watched(before_each_pass: Callable[[], None]) -> Iterator[None]:
    """Within it, attacks call `before_each_pass` whenever they ask the model; what it raises ends the attack.

    For attacks that take minutes: to count passes, and to stop between two of them.
    """
    token = _watcher.set(before_each_pass)
    try:
        yield
    finally:
        _watcher.reset(token)


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
    model: nn.Module,
    device: torch.device,
    *,
    precision: Precision = "fp32",
    eval_mode: bool = True,
    fold: bool = True,
) -> Iterator[Network]:
    """The model as a function of images, for the time of an attack on images on `device`; gradients are enabled.

    Args:
        model: takes images in [0, 1]: it has to hold its own normalisation.
        precision: see the top of the file.
        eval_mode: evaluation mode meanwhile; afterwards, also after an error, every submodule has its own mode back.
            False leaves the modes alone; batch norm in training mode then counts adversarial images in its statistics.
        fold: run a folded twin of the model where attacks/folding.py can make one: the same up to rounding, and faster.
            Weights must not change meanwhile.

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
            twin = folded(module) if fold else module
            yield _counted(network if twin is module else twin)
    finally:
        for part in in_training:
            part.training = True


def _counted(network: Network) -> Network:
    """The network, calling whoever watches before it runs."""
    watcher = _watcher.get()
    if watcher is None:
        return network

    def watched_network(images: Tensor) -> Tensor:
        watcher()
        return network(images)

    return watched_network


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
    if gradient.stride() != images.stride():  # that of a network that runs channels-last
        gradient = torch.empty_like(images, requires_grad=False).copy_(gradient)
    return logits.detach(), losses.detach(), gradient


@contextlib.contextmanager
def last_word(device: torch.device) -> Iterator[None]:
    """Where it is decided what a model says: without gradients, and in the type of its parameters.

    That is without autocast, and without the TF32 that a GPU's convolutions use by default for float32.
    """
    with contextlib.ExitStack() as settings:
        settings.enter_context(torch.no_grad())
        settings.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cuda":
            cudnn = torch.backends.cudnn
            kept = {"enabled": cudnn.enabled, "benchmark": cudnn.benchmark, "deterministic": cudnn.deterministic}
            settings.enter_context(cudnn.flags(**kept, allow_tf32=False))
        yield


def misclassified(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether logits [B, C] give another class than labels [B], bool [B]. Logits that are not finite say nothing."""
    return (logits.argmax(1) != labels) & logits.isfinite().all(1)


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


def check_batch(images: Tensor, labels: Tensor, *, look: bool) -> None:
    """Raises ValueError for images and labels that no attack here takes.

    Those are images of another type than float32 and float64, or (look: waits for the device) outside [0, 1] by more
    than BOX_TOLERANCE or not finite, and labels that are not one row for each image.
    """
    if images.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"images {tuple(images.shape)} have type {images.dtype}; expected float32 in [0, 1]")
    if labels.shape[:1] != images.shape[:1]:
        raise ValueError(f"labels {tuple(labels.shape)} do not fit images {tuple(images.shape)}")
    if look and images.numel():
        low, high = torch.stack(torch.aminmax(images.detach())).tolist()
        if not (low >= -BOX_TOLERANCE and high <= 1 + BOX_TOLERANCE):
            raise ValueError(
                f"images {tuple(images.shape)} reach from {low:g} to {high:g}, beyond [0, 1]: "
                "normalisation belongs into the model"
            )


def prepared(images: Tensor, labels: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Images in [0, 1], contiguous or channels-last as they were, labels that autograd can keep, noise of their type.

    Raises ValueError for noise that is not a whole number m > 0 of copies of each image.
    """
    shape = tuple(images.shape)
    copies = 1 if noise is None else len(noise) // max(len(images), 1)
    if noise is not None and (not copies or noise.shape != (copies * shape[0], *shape[1:])):
        raise ValueError(
            f"noise {tuple(noise.shape)} does not fit images {shape}: expected m copies, one after another"
        )
    if labels.is_inference():
        labels = labels.clone()  # autograd keeps none that was made in inference mode
    channels_last = images.ndim == 4 and images.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    clean = images.detach().clamp(0, 1).contiguous(memory_format=memory_format)
    return clean, labels, None if noise is None else noise.detach().to(clean.dtype)


def noisy(images: Tensor, noise: Tensor | None) -> Tensor:
    """What the model sees of images [B, ...] with noise [m·B, ...], like the noise; without it they themselves."""
    return images if noise is None else images.repeat_interleave(len(noise) // len(images), 0).add_(noise)


def drawn_like(images: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal numbers like the images, contiguous: the same whatever the images' memory format."""
    return torch.randn(images.shape, dtype=images.dtype, device=images.device, generator=generator)


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
    targeted: bool = False,
    noise: Tensor | None = None,
    gradient_free: bool = False,
    start: Tensor | None = None,
    random_start: bool = False,
    restarts: int = 1,
    zero_gradient: ZeroGradient = "rest",
    generator: torch.Generator | None = None,
    precision: Precision = "fp32",
    eval_mode: bool = True,
    fold: bool = True,
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
        loss: what is to grow; see attacks/losses.py.
        targeted: labels are targets: the loss is to shrink.
        noise: [m·B, ...], added to what the model sees (pixels then leave [0, 1]); row i·m + j is copy j of image i.
        gradient_free: see the top of the file; for `cross_entropy`, with noise.
        start: the first iterate, like images; None for the images themselves.
        random_start: start from `draw_from_ball` with `generator` (of the images' device; None: the global one).
        restarts: how many attacks, each from its own random start. With more than one, each image comes back at its
            worst: of all ends and the clean image itself those that the model gets wrong (targeted: takes for the
            target), and among these the one of the greatest loss. Costs one forward pass more for each, and one; needs
            classes as labels. One attack gives its last iterate, whatever came before.
        zero_gradient: what an image does whose gradient is exactly zero. "rest": nothing. "randn": a step in a
            direction drawn by `generator` and not normalised, √values times too long, as SmoothAdv's code does (l2 in
            order box_then_ball only).
        precision, eval_mode, fold: see `under_attack`.
        check_images: False if the images are known to lie in [0, 1]: saves the one wait for the device.
        kernel: of the step; see kernels/dispatch.py.

    Returns:
        A new tensor without a graph, in the images' memory format: also where images are returned as they are. An image
        whose gradient was not finite in some step is NaN.

    Raises:
        ValueError: what `check_batch`, `prepared`, `pgd_step` and `under_attack` refuse; steps negative, losses that do
            not fit the images, several restarts without a random start, one beside `start` or in no ball,
            gradient_free without noise or with a loss.
    """
    if norm not in ("linf", "l2"):
        raise ValueError(f"norm must be 'linf' or 'l2', not {norm!r}")
    if steps < 0:
        raise ValueError(f"steps must be at least 0, not {steps}")
    if restarts < 1 or (restarts > 1 and not random_start):
        raise ValueError(f"restarts must be 1, or more with random_start: not {restarts}")
    if random_start and not isinstance(eps, Tensor) and eps == float("inf"):
        raise ValueError("random_start needs a ball: eps is infinite")
    if start is not None and (random_start or start.shape != images.shape):
        raise ValueError(f"start {tuple(start.shape)} must be like images {tuple(images.shape)}, without random_start")
    if zero_gradient not in ("rest", "randn"):
        raise ValueError(f"zero_gradient must be 'rest' or 'randn', not {zero_gradient!r}")
    if gradient_free and (noise is None or loss is not cross_entropy):
        raise ValueError("gradient_free needs noise, and knows no loss but cross_entropy")
    if (gradient_free or restarts > 1) and labels.ndim != 1:
        raise ValueError(f"labels {tuple(labels.shape)} must be classes [{len(images)}]")
    check_batch(images, labels, look=check_images)
    with under_attack(model, images.device, precision=precision, eval_mode=eval_mode, fold=fold) as network:
        if steps == 0 or not images.numel() or (not isinstance(eps, Tensor) and eps == 0):
            return images.detach().clone()
        clean, labels, noise = prepared(images, labels, noise)
        objective = opposite(loss) if targeted else loss

        def attack() -> tuple[Tensor, Tensor]:
            """The last iterate, and what the model sees of it."""
            adv = draw_from_ball(clean, eps, norm, generator) if random_start else clean.clone()
            if start is not None:
                adv.copy_(start)
            seen = noisy(adv, noise)
            for _ in range(steps):
                if gradient_free:
                    assert noise is not None
                    gradient = _from_noise(network, seen, noise, labels)
                    gradient = -gradient if targeted else gradient
                else:
                    gradient = evaluate(network, seen, labels, objective)[2]
                    if len(seen) > len(adv):
                        gradient = gradient.unflatten(0, (len(adv), -1)).sum(1)
                zero = drawn_like(clean, generator) if zero_gradient == "randn" else None
                pgd_step(
                    adv, gradient, clean, step_size=step_size, eps=eps, norm=norm, order=order, out=adv, noise=noise,
                    model_input=None if noise is None else seen, zero_direction=zero, kernel=kernel,
                )  # fmt: skip
            return adv, seen

        if restarts == 1:
            return attack()[0]
        worst = clean
        success, height = _judge(network, noisy(clean, noise), labels, objective, targeted)
        for _ in range(restarts):
            adv, seen = attack()
            succeeded, reached = _judge(network, seen, labels, objective, targeted)
            better = (succeeded & ~success) | ((succeeded == success) & (reached > height))
            worst = torch.where(better.reshape(-1, *[1] * (clean.ndim - 1)), adv, worst)
            success, height = success | succeeded, torch.where(better, reached, height)
    return worst


def smoothadv(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: Number,
    steps: int,
    noise: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """SmoothAdv's PGD_L2 as published: `pgd` in L2, box before ball, steps of length 2 eps / steps, from the images.

    Args:
        noise: [m·B, ...] or None; see `pgd`. With m > 1 copies the loss is that of their mean probability.
        options: others of `pgd`, such as targeted and gradient_free. zero_gradient="randn" is the published one too.
    """
    step_size = 2 * eps / max(steps, 1)
    return pgd(
        model, images, labels, norm="l2", order="box_then_ball", eps=eps, step_size=step_size, steps=steps, noise=noise,
        **options,
    )  # fmt: skip


@torch.no_grad()
def _from_noise(network: Network, seen: Tensor, noise: Tensor, labels: Tensor) -> Tensor:
    """mean_j(-p_j[label]·noise_j), like the images [B, ...]: where noise that made a label unlikely points to."""
    logits = network(seen)
    copies = len(seen) // len(labels)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    own = logits.softmax(1).gather(1, labels.repeat_interleave(copies)[:, None])
    weighted = noise * own.to(noise.dtype).reshape(-1, *[1] * (noise.ndim - 1))
    return -weighted.unflatten(0, (len(labels), copies)).mean(1)


@torch.no_grad()
def _judge(network: Network, seen: Tensor, labels: Tensor, objective: Loss, targeted: bool) -> tuple[Tensor, Tensor]:
    """Whether the attack has succeeded on each image, bool [B], by its mean probabilities; and its loss [B]."""
    logits = network(seen)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    with torch.autocast(seen.device.type, enabled=False):
        losses = objective(logits, labels)
    hit = mean_log_probabilities(logits, len(labels)).argmax(1) == labels
    return hit if targeted else ~hit, losses
