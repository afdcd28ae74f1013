"""What a student starts from: the published random initialisation, and two things it may take over from its teacher.

"Published" means what the feature-contamination code does to a student of the teacher's architecture, found by running
it: every layer's own `reset_parameters`, and OpenAI's scales for the tensors that belong to no layer. CLIP's own
initialisation (zero bn3 scales, smaller attention projections) is *not* applied there, so neither is it here.
"""

from __future__ import annotations

from typing import cast

import torch
from open_clip.modified_resnet import AttentionPool2d
from open_clip.transformer import Attention, VisionTransformer
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from models import ModelError
from models.encoders import Encoder

_BY_HAND = (nn.MultiheadAttention, VisionTransformer, AttentionPool2d)


def reset_parameters(module: nn.Module) -> None:
    """Draw every parameter of `module` anew from torch's global generator, children before parents.

    | layer | values |
    |---|---|
    | convolution, linear | weight and bias U(-b, b), b = 1/sqrt(fan_in) |
    | layer norm, batch norm | scale 1, shift 0, fresh running statistics |
    | multi-head attention | in_proj Xavier-uniform, its bias and out_proj's 0, out_proj's weight as a linear layer's |
    | CLIP ViT of width w | class embedding, positions and projection N(0, 1)/sqrt(w) |
    | attention pooling over C channels | positions N(0, 1)/sqrt(C) |

    Raises:
        ModelError: a parameter of a module that no row covers; nothing has been changed then.
    """
    owners = [
        (path, part)
        for path, part in reversed(list(module.named_modules()))  # named_modules lists parents first
        if next(part.parameters(recurse=False), None) is not None
    ]
    for path, part in owners:
        if not isinstance(part, _BY_HAND) and not hasattr(part, "reset_parameters"):
            names = ", ".join(f"{path}.{name}".lstrip(".") for name, _ in part.named_parameters(recurse=False))
            raise ModelError(
                f"no published initialisation for {names} ({type(part).__name__}); "
                "a model built with weights=False already has its library's own"
            )
    with torch.no_grad():
        for _, part in owners:
            _reset(part)


def _reset(part: nn.Module) -> None:
    """Reset the parameters that `part` itself owns; those of its children have been reset before."""
    if isinstance(part, nn.MultiheadAttention):
        nn.init.xavier_uniform_(part.in_proj_weight)
        nn.init.zeros_(part.in_proj_bias)
        nn.init.zeros_(part.out_proj.bias)
    elif isinstance(part, VisionTransformer):
        scale = part.conv1.out_channels**-0.5
        for parameter in (part.class_embedding, part.positional_embedding, part.proj):
            if parameter.requires_grad:  # fixed sine-cosine positions are no parameter to draw
                nn.init.normal_(parameter, std=scale)
    elif isinstance(part, AttentionPool2d):
        nn.init.normal_(part.positional_embedding, std=part.positional_embedding.shape[1] ** -0.5)
    else:
        part.reset_parameters()  # type: ignore[operator]


def copy_attention(student: Encoder, teacher: Encoder) -> list[str]:
    """Copy the teacher's attention into the student: each attention layer of a ViT, a CLIP ResNet's attention pooling.

    Returns the paths of the layers copied. Raises ModelError where there is none, or the two differ in paths or shapes.
    """
    pairs = _pairs(student, teacher, (nn.MultiheadAttention, Attention, AttentionPool2d), "attention layers")
    for _, own, source in pairs:
        own.load_state_dict(source.state_dict())
    return [path for path, _, _ in pairs]


class _StoredStatistics(_BatchNorm):
    """Batch norm by the running statistics, in training mode too, which leaves them alone; scale and shift train."""

    def train(self, mode: bool = True) -> _StoredStatistics:
        return super().train(False)


def freeze_norm_stats(student: Encoder, teacher: Encoder) -> list[str]:
    """Give the student's batch norms the teacher's running statistics, for good: `.train()` does not unfreeze them.

    Parameters keep their identity, so this may come before or after an optimiser is made, but not before a conversion
    to SyncBatchNorm. Returns the paths of the layers. Raises ModelError where there is none, or the two differ in paths
    or widths.
    """
    pairs = _pairs(student, teacher, (_BatchNorm,), "batch norms")
    for _, own, source in pairs:
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            cast(torch.Tensor, getattr(own, name)).copy_(getattr(source, name))
        # The layer's own class stays in front of the change, so timm's batch norms keep their activation.
        own.__class__ = type(f"Stored{type(own).__name__}", (_StoredStatistics, type(own)), {})
        own.train()
    return [path for path, _, _ in pairs]


def _pairs(
    student: Encoder, teacher: Encoder, types: tuple[type[nn.Module], ...], what: str
) -> list[tuple[str, nn.Module, nn.Module]]:
    """The layers of these types in both towers, by path. Raises ModelError where they do not correspond."""
    own, source = (
        {path: part for path, part in encoder.tower.named_modules() if isinstance(part, types)}
        for encoder in (student, teacher)
    )
    if not source:
        raise ModelError(f"{teacher.name} has no {what} to take over")
    different = [
        path
        for path in {**source, **own}
        if path not in own or path not in source or _shapes(own[path]) != _shapes(source[path])
    ]
    if different:
        raise ModelError(
            f"the {what} of student {student.name} and teacher {teacher.name} differ, first at {different[0]} "
            f"({len(different)} in all); they can be taken over only between equal architectures"
        )
    return [(path, own[path], source[path]) for path in source]


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}
