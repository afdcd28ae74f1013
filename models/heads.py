"""Heads on encoder features, stored with the class names of their rows: linear, or with layers before the linear map.

Weights trained on another class order give plausible nonsense, so the order travels with the weights and is compared on
loading.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models import ModelError
from models.weights import load_into, read_weights, write_safetensors

_FEATURISER = "featuriser"  # its header in a file's metadata, and before the names of its tensors
_OWN_KEYS = ("classes", "normalize", _FEATURISER)


@dataclass(frozen=True)
class Head:
    """Logits = x @ weight.T + bias; x: features, sent through `featuriser`, divided by their L2 norm where `normalize`.

    weight: [C, D] float32; bias: [C] float32; classes: C names in the order of the rows; metadata: whatever was saved
    beside them; featuriser: a `Featuriser`, as loaded in evaluation mode and without gradients; None in a linear head.
    """

    weight: Tensor
    bias: Tensor
    classes: tuple[str, ...]
    normalize: bool
    metadata: dict[str, Any]
    featuriser: nn.Module | None = None

    def logits(self, features: Tensor) -> Tensor:
        """Logits [N, C] of features [N, D], floating point, on the head's device: in float32, also under autocast."""
        with torch.autocast(features.device.type, enabled=False):
            features = features.float()
            if self.featuriser is not None:
                features = self.featuriser(features)
            if self.normalize:  # features that are all 0 stay 0
                features = features / torch.linalg.vector_norm(features, dim=1, keepdim=True).clamp_min(1e-30)
            return features @ self.weight.T + self.bias

    def to(self, device: torch.device | str) -> Head:
        """The same head on a device; the featuriser itself is moved, not copied."""
        featuriser = None if self.featuriser is None else self.featuriser.to(device)
        return dataclasses.replace(
            self, weight=self.weight.to(device), bias=self.bias.to(device), featuriser=featuriser
        )

    def state(self) -> dict[str, Tensor]:
        """All tensors, by the names that they have in a file; what a head's hash is made of."""
        return _tensors(self.weight, self.bias, self.featuriser)

    def check(self, path: str | Path, classes: Sequence[str] | None = None, feature_dim: int | None = None) -> None:
        """Compares the head, of the file `path`, with what `load_head` may be given. Raises ModelError as that does."""
        names, width = self.classes, self.weight.shape[1]
        if feature_dim is not None and width != feature_dim:  # a featuriser keeps the number of features
            raise ModelError(
                f"{path} takes {width} features, the encoder gives {feature_dim}; is it another encoder's?"
            )
        if classes is not None and tuple(classes) != names:
            if len(classes) != len(names):
                raise ModelError(
                    f"{path} has {len(names)} classes, the data {len(classes)}; they must be the same in the same order"
                )
            row = next(row for row, (ours, theirs) in enumerate(zip(classes, names, strict=True)) if ours != theirs)
            reason = "the same classes in another order" if set(classes) == set(names) else "other classes"
            raise ModelError(
                f"{path} has {reason} than the data: row {row} is {names[row]!r}, label {row} is {classes[row]!r}"
            )

    def require_linear(self, path: str | Path, user: str) -> None:
        """Raises ModelError if there is a featuriser; path: the head's file; user: what takes linear heads only."""
        if self.featuriser is not None:
            raise ModelError(
                f"{path} has layers between features and weights (a featuriser); {user} takes linear heads only: "
                "give one that train/probe.py made without a featuriser"
            )


def save_head(
    path: Path,
    weight: Tensor,
    bias: Tensor | None,
    classes: Sequence[str],
    *,
    normalize: bool = False,
    featuriser: nn.Module | None = None,
    metadata: Mapping[str, object] | None = None,
) -> None:
    """Write a head to the safetensors file `path`, atomically.

    bias None means zeros; featuriser: a `Featuriser` that stands before the weights; metadata: JSON values, such as the
    encoder's hash.

    Raises ValueError where shapes and classes do not agree, ModelError where the file cannot be written.
    """
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    if weight.ndim != 2 or bias.shape != (len(weight),) or len(set(classes)) != len(weight):
        shapes = f"weight {list(weight.shape)}, bias {list(bias.shape)}"
        raise ValueError(f"{shapes} and {len(set(classes))} distinct classes do not agree")
    header = {**(metadata or {}), "classes": list(classes), "normalize": normalize}
    if featuriser is not None:
        from models.featurisers import featuriser_header

        header[_FEATURISER] = described = featuriser_header(featuriser)
        if described["width"] != weight.shape[1]:
            raise ValueError(f"weight {list(weight.shape)} and a featuriser of width {described['width']} do not agree")
    write_safetensors(path, _tensors(weight.float(), bias.float(), featuriser), header)


def load_head(path: str | Path, classes: Sequence[str] | None = None, feature_dim: int | None = None) -> Head:
    """Read a head; `classes` (in the order of the caller's labels) and the encoder's `feature_dim` are compared if set.

    Raises ModelError: no head file, other classes or another order (naming the first difference), another feature
    dimension, a featuriser that does not fit its description.
    """
    loaded = read_weights(path)
    names, described = loaded.metadata.get("classes"), loaded.metadata.get(_FEATURISER)
    linear = {name: tensor for name, tensor in loaded.state.items() if not name.startswith(f"{_FEATURISER}.")}
    layers = {name.partition(".")[2]: tensor for name, tensor in loaded.state.items() if name not in linear}
    is_described = isinstance(described, dict) or (described is None and not layers)
    if set(linear) != {"weight", "bias"} or not isinstance(names, list) or not is_described:
        raise ModelError(
            f"{path} is no head of this project; expected tensors weight and bias and the class names in the header"
        )
    # Copies: tensors in a file are aligned as its header is long, and roundings of products depend on alignment.
    weight, bias = linear["weight"].clone(), linear["bias"].clone()
    if weight.ndim != 2 or bias.shape != (len(weight),) or len(names) != len(weight):
        raise ModelError(
            f"{path}: weight {list(weight.shape)}, bias {list(bias.shape)} and {len(names)} class names do not agree"
        )
    width = weight.shape[1]
    featuriser = None
    if described is not None:
        from models.featurisers import build_featuriser

        try:
            featuriser = build_featuriser(described)
        except ModelError as error:
            raise ModelError(f"{path}: {error}") from None
        load_into(featuriser, layers, path)
        featuriser.eval().requires_grad_(False)
        if described["width"] != width:
            raise ModelError(
                f"{path}: weight {list(weight.shape)} and a featuriser of width {described['width']} do not agree"
            )
    rest = {key: value for key, value in loaded.metadata.items() if key not in _OWN_KEYS}
    normalize = bool(loaded.metadata.get("normalize", False))
    head = Head(weight, bias, tuple(names), normalize, rest, featuriser)
    head.check(path, classes, feature_dim)
    return head


def _tensors(weight: Tensor, bias: Tensor, featuriser: nn.Module | None) -> dict[str, Tensor]:
    layers = {} if featuriser is None else featuriser.state_dict()
    return {"weight": weight, "bias": bias, **{f"{_FEATURISER}.{name}": tensor for name, tensor in layers.items()}}
