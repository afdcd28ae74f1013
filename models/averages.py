"""Averages of the weights of two networks that differ in nothing else, such as before and after fine-tuning.

Source: Wortsman et al. 2022, Robust fine-tuning of zero-shot models (WiSE-FT). Networks whose tensors merely have the
same shapes may still compute different functions (GELU for QuickGELU, another number of attention heads), so modules
and their settings are compared too.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from models.encoders import Encoder


def average(start: Tensor, end: Tensor, alpha: float) -> Tensor:
    """(1 - alpha) * start + alpha * end, computed in float64 and rounded to their type; alpha in [0, 1].

    Of integers, those of the nearer end, at 0.5 of `end`. At 0 and 1 bit for bit the end itself, which a sum with 0 is
    not: it turns -0.0 into 0.0. The result is on the CPU whatever the device, so that its hash is the same everywhere.
    """
    start, end = start.detach().cpu(), end.detach().cpu()
    if alpha in (0, 1) or not start.is_floating_point():
        return (start if alpha < 0.5 else end).clone()
    return ((1 - alpha) * start.double() + alpha * end.double()).to(start.dtype)


def average_states(start: Mapping[str, Tensor], end: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """`average` of each tensor of two state dicts with the same names and shapes.

    Running statistics of batch norm are averaged like weights; its count of batches is an integer.
    """
    return {name: average(tensor, end[name], alpha) for name, tensor in start.items()}


def first_difference(one: Encoder, other: Encoder) -> str:
    """What differs between two encoders besides their weights, in words; empty where nothing does."""
    for what, ours, theirs in (
        ("images are of", f"{one.image_size} px", f"{other.image_size} px"),
        ("the mean of pixels is", _digits(one.mean), _digits(other.mean)),
        ("the standard deviation of pixels is", _digits(one.std), _digits(other.std)),
    ):
        if ours != theirs:
            return f"{what} {ours} in the first, {theirs} in the second"
    modules = itertools.zip_longest(one.tower.named_modules(), other.tower.named_modules(), fillvalue=("", None))
    for (name, module), (other_name, other_module) in modules:
        if name != other_name or type(module) is not type(other_module):
            kinds = [_called(n, m) for n, m in ((name, module), (other_name, other_module))]
            return f"where the first has {kinds[0]}, the second has {kinds[1]}"
        here, there = _settings(module), _settings(other_module)
        for key in sorted({*here, *there}):
            if here.get(key) != there.get(key):
                values = f"{here.get(key)} in the first, {there.get(key)} in the second"
                return f"{key} of {_called(name, module)} is {values}"
    states = one.state_dict(), other.state_dict()
    for name in [*states[0], *(name for name in states[1] if name not in states[0])]:
        shapes = [list(state[name].shape) if name in state else "absent" for state in states]
        if shapes[0] != shapes[1]:
            return f"{name} is {shapes[0]} in the first, {shapes[1]} in the second"
    return ""


def _digits(values: Tensor) -> list[float]:
    return [round(value, 6) for value in values.flatten().tolist()]


def _called(name: str, module: nn.Module | None) -> str:
    return "nothing" if module is None else f"{name or 'the tower'} ({type(module).__name__})"


def _settings(module: nn.Module | None) -> dict[str, Any]:
    """Plain public attributes: strides, numbers of attention heads, epsilons, and so on, which tensors do not show."""
    return {
        key: value
        for key, value in ({} if module is None else vars(module)).items()
        if not key.startswith("_") and key != "training" and isinstance(value, (bool, int, float, str, tuple))
    }
