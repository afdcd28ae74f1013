"""Projection + distillation loss: how far a student's features are from a teacher's.

    p = features · weightᵀ + bias            (skipped when weight is None)
    mse     mean over all elements of (p - target)²          the published loss (Feature Contamination, ICML 2024)
    cosine  mean over rows of 1 - p·t / (max(‖p‖, 1e-8) · max(‖t‖, 1e-8))      torch's epsilon rule

Shapes: features [..., D_s], weight [D_t, D_s], bias [D_t], target [..., D_t] with equal leading shapes; every leading
index is a row. The projection is computed in the features' type (under autocast, in autocast's); the distance and
Gram matrices in float32 whatever the inputs are (float64 stays float64), also under autocast: a bf16 student and a bf16
teacher are compared without a second rounding, and squares of fp16 features cannot overflow.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Kind = Literal["mse", "cosine"]


def projected_distill_loss(
    features: Tensor, weight: Tensor | None, bias: Tensor | None, target: Tensor, kind: Kind = "mse"
) -> Tensor:
    """Scalar loss (float32, or float64 for float64 features) between projected features and a teacher's target.

    Args:
        features: student features [..., D_s], any floating type.
        weight: projection [D_t, D_s], or None when D_s = D_t and nothing is projected.
        bias: [D_t] or None; only together with ``weight``.
        target: teacher features [..., D_t]; no gradient flows into it.
        kind: ``mse`` or ``cosine``.

    Raises:
        ValueError: shapes that do not fit, or an unknown kind.
    """
    if weight is None and bias is not None:
        raise ValueError("a bias needs a weight")
    if weight is not None:
        if weight.shape != (target.shape[-1], features.shape[-1]):
            raise ValueError(
                f"weight {tuple(weight.shape)} does not map features {tuple(features.shape)} "
                f"to target {tuple(target.shape)}"
            )
        features = F.linear(features, weight.to(features.dtype), None if bias is None else bias.to(features.dtype))
    if features.shape != target.shape:
        raise ValueError(f"features {tuple(features.shape)} and target {tuple(target.shape)} differ in shape")
    compute = torch.float64 if features.dtype == torch.float64 else torch.float32
    features, target = features.to(compute), target.detach().to(compute)
    with torch.autocast(features.device.type, enabled=False):
        if kind == "mse":
            return F.mse_loss(features, target)
        if kind == "cosine":
            return (1 - F.cosine_similarity(features, target, dim=-1, eps=1e-8)).mean()
    raise ValueError(f"kind must be 'mse' or 'cosine', not {kind!r}")


def token_gram(tokens: Tensor) -> Tensor:
    """Gram matrix X Xᵀ / √E of tokens [N, T, E] → [N, T, T] float32 (float64 for float64).

    What the published code distils as "attention weights" (its attention map is overwritten by this product of the
    layer-normalised tokens): no query, key, head or softmax is involved.
    """
    with torch.autocast(tokens.device.type, enabled=False):
        tokens = (tokens if tokens.dtype == torch.float64 else tokens.float()) * tokens.shape[-1] ** -0.25
        return tokens @ tokens.transpose(1, 2)
