"""Linear heads on encoder features, stored with the class names of their rows.

Weights trained on another class order give plausible nonsense, so the order travels with the weights and is compared on
loading.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from models import ModelError
from models.weights import read_weights, write_safetensors


@dataclass(frozen=True)
class Head:
    """Logits = features @ weight.T + bias, of features divided by their L2 norm where `normalize`.

    weight: [C, D] float32; bias: [C] float32; classes: C names in the order of the rows; metadata: whatever was saved
    beside them.
    """

    weight: Tensor
    bias: Tensor
    classes: tuple[str, ...]
    normalize: bool
    metadata: dict[str, Any]


def save_head(
    path: Path,
    weight: Tensor,
    bias: Tensor | None,
    classes: Sequence[str],
    *,
    normalize: bool = False,
    metadata: Mapping[str, object] | None = None,
) -> None:
    """Write a head to the safetensors file `path`, atomically.

    bias None means zeros; metadata: JSON values, such as the encoder's hash.

    Raises ValueError where shapes and classes do not agree, ModelError where the file cannot be written.
    """
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    if weight.ndim != 2 or bias.shape != (len(weight),) or len(set(classes)) != len(weight):
        shapes = f"weight {list(weight.shape)}, bias {list(bias.shape)}"
        raise ValueError(f"{shapes} and {len(set(classes))} distinct classes do not agree")
    header = {**(metadata or {}), "classes": list(classes), "normalize": normalize}
    write_safetensors(path, {"weight": weight.float(), "bias": bias.float()}, header)


def load_head(path: str | Path, classes: Sequence[str] | None = None, feature_dim: int | None = None) -> Head:
    """Read a head; `classes` (in the order of the caller's labels) and the encoder's `feature_dim` are compared if set.

    Raises ModelError: no head file, other classes or another order (naming the first difference), another feature
    dimension.
    """
    loaded = read_weights(path)
    names = loaded.metadata.get("classes")
    if set(loaded.state) != {"weight", "bias"} or not isinstance(names, list):
        raise ModelError(
            f"{path} is no head of this project; expected tensors weight and bias and the class names in the header"
        )
    weight, bias = loaded.state["weight"], loaded.state["bias"]
    if weight.ndim != 2 or bias.shape != (len(weight),) or len(names) != len(weight):
        raise ModelError(
            f"{path}: weight {list(weight.shape)}, bias {list(bias.shape)} and {len(names)} class names do not agree"
        )
    if feature_dim is not None and weight.shape[1] != feature_dim:
        raise ModelError(
            f"{path} takes {weight.shape[1]} features, the encoder gives {feature_dim}; is it another encoder's?"
        )
    if classes is not None and list(classes) != names:
        if len(classes) != len(names):
            raise ModelError(
                f"{path} has {len(names)} classes, the data {len(classes)}; they must be the same in the same order"
            )
        row = next(row for row, (ours, theirs) in enumerate(zip(classes, names, strict=True)) if ours != theirs)
        reason = "the same classes in another order" if set(classes) == set(names) else "other classes"
        raise ModelError(
            f"{path} has {reason} than the data: row {row} is {names[row]!r}, label {row} is {classes[row]!r}"
        )
    rest = {key: value for key, value in loaded.metadata.items() if key not in ("classes", "normalize")}
    return Head(weight, bias, tuple(names), bool(loaded.metadata.get("normalize", False)), rest)
