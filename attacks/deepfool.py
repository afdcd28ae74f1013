"""DeepFool on a batch: a short L2 perturbation that fools a model, by stepping over linearised decision boundaries.

Moosavi-Dezfooli et al. 2016 (arXiv:1511.04599), as foolbox has it. With c the class of the clean image, z the logits at
the current point and k another of the likeliest classes of the clean image, in each step and for each image

    w_k = ∇(z_k - z_c),   d_k = |z_k - z_c| / (‖w_k‖ + 1e-8),   the k of the smallest d_k
    r  ← r + (d_k + 1e-4)·w_k / (‖w_k‖ + 1e-8)
    x' ← clip(x + (1 + overshoot)·r, 0, 1)

until the model says something else than the label. Gradients are taken at x', overshot and clipped. An image that is
wrong already comes back as it is; one that no step has fooled, at its last point.

Cost of a step: one forward pass and a backward pass for each class k, on the images that still stand.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attacks.pgd import Precision, check_batch, misclassified, prepared, under_attack


def deepfool(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    steps: int = 50,
    candidates: int = 10,
    overshoot: float = 0.02,
    precision: Precision = "fp32",
    eval_mode: bool = True,
    fold: bool = True,
    check_images: bool = True,
) -> Tensor:
    """Images like `images`, each as near as DeepFool finds one that the model gives another class.

    Args:
        model, images: as in `attacks.pgd.pgd`.
        labels: classes [B] int64 that the images are to leave.
        steps: largest number of steps; 0 gives the images.
        candidates: how many of the likeliest classes of each clean image take part, its own among them.
        overshoot: by what share of its length the perturbation is longer than to the linearised boundary.
        precision, eval_mode, fold, check_images: as in `attacks.pgd.pgd`.

    Returns:
        A new tensor without a graph, in the images' memory format.

    Raises:
        ValueError: what `check_batch`, `prepared` and `under_attack` refuse, labels that are not classes [B], steps or
            overshoot negative, less than two candidates or classes.
    """
    if steps < 0 or overshoot < 0:
        raise ValueError(f"steps and overshoot must be at least 0, not {steps} and {overshoot}")
    if candidates < 2:
        raise ValueError(f"candidates must be at least 2, not {candidates}")
    check_batch(images, labels, look=check_images)
    if labels.ndim != 1:
        raise ValueError(f"labels {tuple(labels.shape)} must be classes [{len(images)}]")
    with under_attack(model, images.device, precision=precision, eval_mode=eval_mode, fold=fold) as network:
        if steps == 0 or not images.numel():
            return images.detach().clone()
        clean, labels, _ = prepared(images, labels, None)
        found = clean.clone()
        with torch.no_grad():
            logits = network(clean)
        if logits.shape[1] < 2:
            raise ValueError("the model has one class only: there is none to go to")
        classes = logits.topk(min(candidates, logits.shape[1]), dim=1).indices
        place, point, total = torch.arange(len(clean), device=clean.device), clean, torch.zeros_like(clean)
        for _ in range(steps):
            point = point.detach().requires_grad_()
            logits = network(point)
            logits = logits if logits.dtype == torch.float64 else logits.float()
            stands = ~misclassified(logits, labels)
            found[place] = point.detach()
            if not stands.any():
                return found
            place, classes, labels, total = (rows[stands] for rows in (place, classes, labels, total))
            total = total + _step(logits[stands], point, stands, classes)
            point = clean[place].add(total, alpha=1 + overshoot).clamp_(0, 1)
        found[place] = point
    return found


def _step(logits: Tensor, point: Tensor, stands: Tensor, classes: Tensor) -> Tensor:
    """The step of the images that stand [n, ...], whose logits [n, C] have a graph from all points [B, ...]."""
    differences = logits.gather(1, classes[:, 1:]) - logits.gather(1, classes[:, :1])
    nearest = torch.full_like(differences[:, 0], float("inf"))
    step = torch.zeros_like(point[stands])
    each = (-1, *[1] * (point.ndim - 1))
    for k in range(differences.shape[1]):
        (gradient,) = torch.autograd.grad(differences[:, k].sum(), point, retain_graph=k + 1 < differences.shape[1])
        gradient = gradient[stands]
        length = torch.linalg.vector_norm(gradient.flatten(1), dim=1) + 1e-8
        distance = differences[:, k].detach().abs().to(length.dtype) / length
        nearer = distance < nearest
        nearest = torch.where(nearer, distance, nearest)
        step = torch.where(nearer.reshape(each), gradient * ((distance + 1e-4) / length).reshape(each), step)
    return step
