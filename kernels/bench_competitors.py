"""Who takes part in the benchmark: ours, eager PyTorch, torch.compile, and what others would run.

`eager` is the operation's own plain PyTorch reference, `compile` is torch.compile of it or, where a step was published,
of the published one: the reference first divides gradients by their largest entry, one more pass. `ours` are the Triton
kernels (on a CPU what the dispatch chooses there, the reference: the interpreter is never timed). `products` runs only
the matrix products of the operation, by the vendor's library. Peers, called as their users call them:
    liger         Liger-Kernel's chunked losses. They want the teacher's head: `cosine` gets an identity (one product
                  more than ours), `kl head` is its Jensen-Shannon loss with beta 0, the same divergence. It has no MSE.
                  Its backward waits for the device. For many heads: its cross-entropy on batched logits.
    torchattacks  the tensor operations of one step of its PGD and PGDL2
    robustness    those of MadryLab/robustness' LinfStep and L2Step
    smoothadv     those of smoothing-adversarial's SGD step and renorm, in place; waits for the device
    one by one    every head a torch.nn.functional.linear and cross_entropy of its own, one after the other
    einsum        all heads in one einsum, then cross_entropy
The upstream gradient is 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.bench_cases import Case
from kernels.distill_loss import projected_distill_loss
from kernels.pgd_step import ORDERS, pgd_step
from kernels.probe_loss import multi_head_cross_entropy

# Name → what makes a competitor of a function: torch.compile in one of its modes.
Compilers = Mapping[str, Callable[[Any], Any]]


@dataclass
class Way:
    """One competitor on one case's inputs.

    Args:
        phases: phase → a call that runs it and returns its results; `recorded` is a forward that records gradients.
        graph: whether it can be captured in a CUDA graph: False for what waits for the device.
        outcome: results of the whole phase → what is compared with the float64 reference; None: nothing is.
        note: what differs from ours.
    """

    phases: dict[str, Callable[[], list[Tensor]]]
    graph: bool = True
    outcome: Callable[[list[Tensor]], list[Tensor]] | None = lambda results: results
    note: str = ""


@dataclass
class Trial:
    """A case with its inputs: the competitors by name, or the reason why one is missing, and the float64 results."""

    ways: dict[str, Way | str]
    exact: Callable[[], list[Tensor]]


def training(parts: Sequence[tuple[Callable[[], Tensor], Sequence[Tensor]]], **about: Any) -> Way:
    """Losses as training runs them, one after the other; each comes with the tensors that get gradients."""

    def losses() -> list[Tensor]:
        return [loss() for loss, _ in parts]

    def both() -> list[Tensor]:
        results = []
        for loss, leaves in parts:
            value = loss()
            results += [value.detach(), *torch.autograd.grad(value, leaves, torch.ones_like(value))]
        return results

    return Way({"forward": torch.no_grad()(losses), "recorded": losses, "both": both}, **about)


def _precision(case: Case, device: torch.device, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    if case.precision != "autocast":
        return function(*arguments)
    with torch.autocast(device.type, torch.bfloat16):
        return function(*arguments)


def _ours(device: torch.device) -> Literal["auto", "triton"]:
    return "triton" if device.type == "cuda" else "auto"


def _types(case: Case) -> tuple[torch.dtype, torch.dtype]:
    """Types of activations and of weights."""
    low = torch.float32 if case.precision == "float32" else torch.bfloat16
    return low, torch.bfloat16 if case.precision == "bfloat16" else torch.float32


def distill_trial(case: Case, compilers: Compilers, device: torch.device) -> Trial:
    """Features, a projection and a teacher's output, normally distributed."""
    rows, width, outputs, teacher = case.sizes
    low, full = _types(case)
    draw = partial(torch.randn, device=device, generator=torch.Generator(device).manual_seed(0))
    features = draw(rows, width).to(low).requires_grad_()
    weight = draw(outputs, width).mul_(width**-0.5).to(full).requires_grad_()
    bias = draw(outputs).mul_(0.1).to(full).requires_grad_()
    target = draw(rows, teacher).to(low)
    leaves = (features, weight, bias)
    named: dict[str, Any] = {"kind": case.option.split()[0]}
    if case.option == "kl logits":
        named["temperature"] = 2.0
    if case.option == "kl head":
        named["target_weight"] = draw(outputs, teacher).mul_(teacher**-0.5).to(full)
    reference: Callable[..., Tensor] = partial(projected_distill_loss, **named, kernel="reference")

    def way(function: Callable[..., Tensor], **about: Any) -> Way:
        return training([(lambda: _precision(case, device, function, *leaves, target), leaves)], **about)

    def exact() -> list[Tensor]:
        inputs = [tensor.detach().double().requires_grad_() for tensor in leaves]
        head = {"target_weight": named["target_weight"].double()} if "target_weight" in named else {}
        loss = reference(*inputs, target.double(), **head)
        return [loss.detach(), *torch.autograd.grad(loss, inputs)]

    ways: dict[str, Way | str] = {
        "ours": way(partial(projected_distill_loss, **named, kernel=_ours(device))),
        "eager": way(reference),
        **{name: way(make(reference)) for name, make in compilers.items()},
        "products": _products(features.detach(), weight.detach().to(low), True, target, named.get("target_weight")),
    }
    if case.option in ("cosine", "kl head"):
        ways["liger"] = _liger_distill(case, compilers, device, target, named.get("target_weight"), way)
    return Trial(ways, exact)


def _products(
    features: Tensor, weight: Tensor, for_features: bool, target: Tensor | None = None, head: Tensor | None = None
) -> Way:
    """The matrix products alone: features·weightᵀ, the teacher's where it has a head, and those of the gradients."""
    teacher = [] if head is None or target is None else [(target, head.to(target.dtype).T)]

    def forward() -> list[Tensor]:
        return [a @ b for a, b in ((features, weight.T), *teacher)]

    def both() -> list[Tensor]:
        product = forward()[0]
        return [product.T @ features] + ([product @ weight] if for_features else [])

    return Way({"forward": forward, "recorded": forward, "both": both}, outcome=None)


def _liger_distill(
    case: Case, compilers: Compilers, device: torch.device, target: Tensor, head: Tensor | None, way: Callable[..., Way]
) -> Way | str:
    try:
        from liger_kernel import chunked_loss
    except Exception as error:  # a version that does not fit this PyTorch fails in its own ways
        return f"liger-kernel: {first_line(error)}"
    settings = {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0, "compiled": "compile" in compilers}
    labels = torch.zeros(len(target), dtype=torch.int64, device=device)
    if head is None:
        loss = chunked_loss.LigerFusedLinearCosineSimilarityLoss(beta=1.0, **settings)
        head, note = torch.eye(case.sizes[2], device=device, dtype=target.dtype), "an identity as the teacher's head"
    else:
        loss, note = chunked_loss.LigerFusedLinearJSDLoss(beta=0.0, **settings), "Jensen-Shannon loss with beta 0"

    def call(features: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
        return loss(features, weight, target, head, labels, bias)

    return way(call, graph=False, note=note)


def pgd_trial(case: Case, compilers: Compilers, device: torch.device) -> Trial:
    """Images in [0, 1], a perturbation within the ball and the box, a gradient of usual size."""
    norm, _, rest = case.option.partition(" ")
    order = rest if rest in ORDERS else "ball_then_box"
    values = math.prod(case.sizes[1:])
    # Usual settings: 8/255 per pixel; 0.5 on CIFAR and 3 on ImageNet in L2; 12 on CIFAR in L1.
    eps = {"linf": 8 / 255, "l2": 0.5 if values < 10_000 else 3.0, "l1": 12.0}[norm]
    step = eps / 4
    generator = torch.Generator(device).manual_seed(0)
    clean = torch.rand(case.sizes, device=device, generator=generator)
    grad = torch.randn(case.sizes, device=device, generator=generator).mul_(1e-3)
    change = torch.rand(case.sizes, device=device, generator=generator).sub_(0.5)
    length = {"linf": 0.5, "l2": (values / 12) ** 0.5, "l1": values / 4}[norm]  # what such a change has on average
    adv = (clean + change.mul_(0.95 * eps / length)).clamp_(0, 1)
    named: dict[str, Any] = {"step_size": step, "eps": eps, "norm": norm, "order": order}
    if rest == "model_input":
        shaped = partial(torch.empty, case.sizes, dtype=torch.bfloat16, memory_format=torch.channels_last)
        named["noise"] = torch.randn(case.sizes, device=device, generator=generator).mul_(0.1)
        named["model_input"] = shaped(device=device)
    reference = partial(pgd_step, **named, kernel="reference")
    destination = torch.empty_like(adv)

    def changes(results: list[Tensor]) -> list[Tensor]:
        """Relative to the clean images: beside them an error in the perturbation would not show."""
        return [results[0] - clean.to(results[0].dtype), *results[1:]]

    def way(function: Callable[..., Tensor | list[Tensor]]) -> Way:
        def call() -> list[Tensor]:
            found = function(adv, grad, clean)
            written = [named["model_input"]] if "model_input" in named else []
            return found if isinstance(found, list) else [found, *written]

        return Way({"step": call}, outcome=changes)

    def published(function: Callable[..., Tensor]) -> Callable[..., list[Tensor]]:
        """One of the published steps, and the model's input as its users form it."""

        def images(adv: Tensor, grad: Tensor, clean: Tensor) -> list[Tensor]:
            found = function(adv, grad, clean, step, eps)
            if "noise" not in named:
                return [found]
            return [found, (found + named["noise"]).to(torch.bfloat16, memory_format=torch.channels_last)]

        return images

    def exact() -> list[Tensor]:
        settings = {name: value for name, value in named.items() if name not in ("noise", "model_input")}
        found = pgd_step(adv.double(), grad.double(), clean.double(), **settings, kernel="reference")
        more = [found + named["noise"].double()] if "noise" in named else []
        return [found - clean.double(), *more]

    plain = {("linf", "ball_then_box"): _torchattacks_linf, ("l2", "ball_then_box"): _torchattacks_l2}
    plain["l2", "box_then_ball"] = _smoothadv_l2
    compiled = published(plain[norm, order]) if (norm, order) in plain else reference
    ways: dict[str, Way | str] = {
        "ours": way(partial(pgd_step, **named, kernel=_ours(device), out=destination)),
        "eager": way(reference),
        **{name: way(make(compiled)) for name, make in compilers.items()},
    }
    if order == "ball_then_box" and norm in ("linf", "l2"):
        ways["torchattacks"] = way(published(plain[norm, order]))
        ways["robustness"] = way(published({"linf": _robustness_linf, "l2": _robustness_l2}[norm]))
    if order == "box_then_ball" and norm == "l2":
        ways["smoothadv"] = _smoothadv(adv, grad, clean, step, eps)
    return Trial(ways, exact)


# Sequences of tensor operations of the published steps, on [B, C, H, W].


def _torchattacks_linf(adv: Tensor, grad: Tensor, clean: Tensor, step: float, eps: float) -> Tensor:
    adv = adv.detach() + step * grad.sign()
    delta = torch.clamp(adv - clean, min=-eps, max=eps)
    return torch.clamp(clean + delta, min=0, max=1).detach()


def _torchattacks_l2(adv: Tensor, grad: Tensor, clean: Tensor, step: float, eps: float) -> Tensor:
    norms = torch.norm(grad.view(len(grad), -1), p=2, dim=1) + 1e-10
    adv = adv.detach() + step * (grad / norms.view(-1, 1, 1, 1))
    delta = adv - clean
    factor = torch.min(eps / torch.norm(delta.view(len(grad), -1), p=2, dim=1), torch.ones_like(norms))
    return torch.clamp(clean + delta * factor.view(-1, 1, 1, 1), min=0, max=1).detach()


def _robustness_linf(adv: Tensor, grad: Tensor, clean: Tensor, step: float, eps: float) -> Tensor:
    moved = adv + torch.sign(grad) * step
    return torch.clamp(torch.clamp(moved - clean, -eps, eps) + clean, 0, 1)


def _robustness_l2(adv: Tensor, grad: Tensor, clean: Tensor, step: float, eps: float) -> Tensor:
    norms = torch.norm(grad.view(len(grad), -1), dim=1).view(-1, 1, 1, 1)
    moved = adv + grad / (norms + 1e-10) * step
    return torch.clamp(clean + (moved - clean).renorm(p=2, dim=0, maxnorm=eps), 0, 1)


def _smoothadv_l2(adv: Tensor, grad: Tensor, clean: Tensor, step: float, eps: float) -> Tensor:
    """For torch.compile: without the test for zero gradients, which waits for the device."""
    norms = torch.norm(grad.view(len(grad), -1), p=2, dim=1).view(-1, 1, 1, 1)
    return clean + (torch.clamp(adv + step * (grad / norms), 0, 1) - clean).renorm(p=2, dim=0, maxnorm=eps)


def _smoothadv(adv: Tensor, grad: Tensor, clean: Tensor, step: float, eps: float) -> Way:
    """In place on the perturbation, as published; it goes on from where the last call left it."""
    delta = (adv - clean).requires_grad_()
    delta.grad = -grad  # the published loss is negated for an ascent
    optimizer = torch.optim.SGD([delta], lr=step)

    def call() -> list[Tensor]:
        assert delta.grad is not None
        norms = delta.grad.view(len(clean), -1).norm(p=2, dim=1)
        delta.grad.div_(norms.view(-1, 1, 1, 1))
        if (norms == 0).any():
            delta.grad[norms == 0] = torch.randn_like(delta.grad[norms == 0])
        optimizer.step()
        delta.data.add_(clean)
        delta.data.clamp_(0, 1).sub_(clean)
        delta.data.renorm_(p=2, dim=0, maxnorm=eps)
        return [delta.detach()]

    return Way({"step": call}, graph=False, outcome=lambda results: results)


def probe_trial(case: Case, compilers: Compilers, device: torch.device) -> Trial:
    """Cached features and random heads; the features get no gradient."""
    heads, rows, width, classes = case.sizes
    low, full = _types(case)
    generator = torch.Generator(device).manual_seed(0)
    draw = partial(torch.randn, device=device, generator=generator)
    features = draw(rows, width).to(low)
    weight = draw(heads, classes, width).mul_(width**-0.5).to(full).requires_grad_()
    bias = draw(heads, classes).mul_(0.1).to(full).requires_grad_()
    labels = torch.randint(classes, (rows,), device=device, generator=generator)
    reference: Callable[..., Tensor] = partial(multi_head_cross_entropy, kernel="reference")

    def way(function: Callable[..., Tensor], **about: Any) -> Way:
        arguments = (features, weight, bias, labels)
        return training([(lambda: _precision(case, device, function, *arguments), (weight, bias))], **about)

    def exact() -> list[Tensor]:
        inputs = [tensor.detach().double().requires_grad_() for tensor in (weight, bias)]
        losses = reference(features.double(), *inputs, labels)
        return [losses.detach(), *torch.autograd.grad(losses.sum(), inputs)]

    def einsum(features: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
        logits = torch.einsum("bd,hcd->bhc", features, weight) + bias
        losses = F.cross_entropy(logits.flatten(0, 1), labels.repeat_interleave(heads), reduction="none")
        return losses.view(rows, heads).mean(0)

    def head(weight: Tensor, bias: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(features, weight, bias), labels)

    def part(*leaves: Tensor) -> tuple[Callable[[], Tensor], Sequence[Tensor]]:
        return lambda: _precision(case, device, head, *leaves), leaves

    def separate() -> list[tuple[Callable[[], Tensor], Sequence[Tensor]]]:
        pairs = zip(weight.detach().unbind(), bias.detach().unbind(), strict=True)
        return [part(w.clone().requires_grad_(), b.clone().requires_grad_()) for w, b in pairs]

    return Trial(
        {
            "ours": way(partial(multi_head_cross_entropy, kernel=_ours(device))),
            "eager": way(reference),
            **{name: way(make(reference)) for name, make in compilers.items()},
            "products": _products(features, weight.detach().to(low).flatten(0, 1), False),
            "one by one": training(
                separate(), outcome=lambda results: [torch.stack(results[place::3]) for place in range(3)]
            ),
            "einsum": way(einsum),
            "liger": _liger_cross_entropy(device, way),
        },
        exact,
    )


def _liger_cross_entropy(device: torch.device, way: Callable[..., Way]) -> Way | str:
    if device.type != "cuda":
        return "liger-kernel: its cross-entropy is a Triton kernel for a GPU"
    try:
        from liger_kernel.transformers import LigerCrossEntropyLoss
    except Exception as error:
        return f"liger-kernel: {first_line(error)}"
    loss = LigerCrossEntropyLoss(reduction="none")

    def call(features: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
        heads, classes, _ = weight.shape
        logits = F.linear(features, weight.flatten(0, 1), bias.flatten()).view(-1, classes)
        return loss(logits, labels.repeat_interleave(heads)).view(-1, heads).mean(0)

    return way(call, graph=False, note="cross-entropy on batched logits")


TRIALS = {"distill_loss": distill_trial, "pgd_step": pgd_trial, "probe_loss": probe_trial}


def first_line(error: BaseException) -> str:
    """Kind and first line of an exception."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
