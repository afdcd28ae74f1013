"""The module that distillation trains: a student, projectors where its widths differ from the teacher's, the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import Tensor, nn

from kernels.dispatch import Kernel
from kernels.distill_loss import projected_distill_loss, token_gram
from models import ModelError
from models.encoders import Encoder, Intermediates

Distance = Literal["mse", "cosine", "smooth_l1"]


class Distiller(nn.Module):
    """Student plus projectors; its forward returns the loss, so that DDP sees one module with one output.

        loss = feature_weight · d(features) + hidden_weight · mean over blocks d(hidden states)
               + gram_weight · mean over blocks mse(X Xᵀ/√E)

    with d = `kind`, as published (Feature Contamination, released code; the Gram term is what it calls attention).

    Args:
        student: the encoder to train, from scratch.
        teacher: only looked at for its widths; it is no part of this module and never saved with it.
        kind: distance of features and of hidden states; Gram matrices are always compared by squared error.
        hidden_blocks, gram_blocks: which blocks are matched; empty for none. Widths of hidden states may differ (a
            learned linear projector bridges them), numbers of tokens may not.
        kernel: which implementation of the losses runs, see kernels/dispatch.py.

    Raises:
        ModelError: blocks or token counts that cannot be matched, or an image size that one of the two cannot take.
    """

    def __init__(
        self,
        student: Encoder,
        teacher: Encoder,
        *,
        kind: Distance = "mse",
        feature_weight: float = 1.0,
        hidden_weight: float = 0.0,
        hidden_blocks: Sequence[int] = (),
        gram_weight: float = 0.0,
        gram_blocks: Sequence[int] = (),
        kernel: Kernel = "auto",
    ) -> None:
        super().__init__()
        self.kind: Distance = kind
        self.kernel: Kernel = kernel
        self.feature_weight, self.hidden_weight, self.gram_weight = feature_weight, hidden_weight, gram_weight
        self.hidden_blocks, self.gram_blocks = tuple(hidden_blocks), tuple(gram_blocks)
        # Both see the same images: a convolutional student takes the teacher's size, whatever its own default.
        student.image_size = teacher.image_size
        ours = self._try(student, teacher.image_size, "student")
        theirs = self._try(teacher, teacher.image_size, "teacher")
        for what, blocks, mine, other in (
            ("hidden", self.hidden_blocks, ours.hidden, theirs.hidden),
            ("gram", self.gram_blocks, ours.gram, theirs.gram),
        ):
            for block, s, t in zip(blocks, mine, other, strict=True):
                if s.shape[1] != t.shape[1]:
                    raise ModelError(
                        f"--{what}_blocks {block}: student {student.name} has {s.shape[1]} tokens there, "
                        f"teacher {teacher.name} has {t.shape[1]}"
                    )
        self.student = student
        self.projector = _projector(ours.features, theirs.features)
        self.hidden_projectors = nn.ModuleList(map(_projector, ours.hidden, theirs.hidden))

    def _try(self, encoder: Encoder, size: int, role: str) -> Intermediates:
        """One blank image through the encoder: shapes, and an early error for a size that it cannot take."""
        training, device = encoder.training, next(encoder.parameters()).device
        try:
            with torch.no_grad():
                image = torch.zeros(1, 3, size, size, device=device)
                return encoder.eval().intermediates(image, self.hidden_blocks, self.gram_blocks)
        except (RuntimeError, AssertionError, ValueError) as error:  # however a library says that a size does not fit
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ModelError(
                f"{role} {encoder.name} cannot take {size}x{size} images, the teacher's input size ({reason})"
            ) from error
        finally:
            encoder.train(training)

    def forward(self, images: Tensor, target: Intermediates) -> dict[str, Tensor]:
        """Scalars for images [N, 3, S, S] in [0, 1] and the teacher's Intermediates of the same images.

        `loss` carries the gradient; `feature`, `hidden`, `gram` (unweighted terms) and `feature_norm` (mean L2 norm of
        the student's features) are detached.
        """
        output = self.student.intermediates(images, self.hidden_blocks, self.gram_blocks)
        # Always computed, also with weight 0: every parameter then takes part in the backward pass, as DDP wants.
        terms = {"feature": self._distance(output.features, self.projector, target.features)}
        loss = self.feature_weight * terms["feature"]
        if self.hidden_blocks:
            triples = zip(output.hidden, self.hidden_projectors, target.hidden, strict=True)
            terms["hidden"] = torch.stack([self._distance(s, p, t) for s, p, t in triples]).mean()
            loss = loss + self.hidden_weight * terms["hidden"]
        if self.gram_blocks:
            pairs = zip(output.gram, target.gram, strict=True)
            each = [
                projected_distill_loss(token_gram(s), None, None, token_gram(t), kernel=self.kernel) for s, t in pairs
            ]
            terms["gram"] = torch.stack(each).mean()
            loss = loss + self.gram_weight * terms["gram"]
        norm = output.features.detach().float().norm(dim=-1).mean()
        return {"loss": loss, **{name: term.detach() for name, term in terms.items()}, "feature_norm": norm}

    def _distance(self, features: Tensor, projector: nn.Module, target: Tensor) -> Tensor:
        weight, bias = (projector.weight, projector.bias) if isinstance(projector, nn.Linear) else (None, None)
        return projected_distill_loss(features, weight, bias, target, self.kind, kernel=self.kernel)


def distillation_terms(
    model: nn.Module,
    distiller: Distiller,
    teacher: Encoder,
    images: Tensor,
    autocast: Callable[[], AbstractContextManager[object]],
) -> dict[str, Tensor]:
    """What `distiller` returns for images, with the teacher's forward pass before it, and `teacher_norm`.

    Args:
        model: `distiller` as it is to be called in training, which takes care of its own precision.
        images: [N, 3, S, S] in [0, 1].
        autocast: makes the context that the teacher runs in.
    """
    with torch.no_grad(), autocast():
        target = teacher.intermediates(images, distiller.hidden_blocks, distiller.gram_blocks)
    return {**model(images, target), "teacher_norm": target.features.float().norm(dim=-1).mean()}


def _projector(student: Tensor, teacher: Tensor) -> nn.Module:
    """Identity for equal widths (nothing to learn, nothing saved), else a linear map with torch's initialisation."""
    if student.shape[-1] == teacher.shape[-1]:
        return nn.Identity()
    return nn.Linear(student.shape[-1], teacher.shape[-1])
