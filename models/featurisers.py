"""What may stand between an encoder's features and a linear head: a fixed random transform, layers that are trained.

Both keep the number of features D, so that a head fits before and behind them. A `Featuriser` is the two in a row:

    transform    reversible blocks with random weights, never trained: features that hold the same information in a form
                 that a linear head may no longer read
    layers       an MLP that is trained with the head, of one kind of block:
        basic       ReLU(BN(Linear(x)))
        residual    ReLU(x + BN(Linear(ReLU(BN(Linear(x))))))
        reversible  x = (x1, x2); y1 = x1 + F(x2); y2 = x2 + G(y1); F and G are Linear(ReLU(BN(Linear(.)))) on D/2

Sources: Feature Contamination (ICML 2024), released code; reversible blocks: Gomez et al. 2017, The reversible residual
network (arXiv:1707.04585) §3. One thing differs: there, batch norm in the random transform never leaves training mode,
so that what an image becomes depends on its batch; here its statistics are measured once (`calibrate`) and fixed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import ModelError

Kind = Literal["basic", "residual", "reversible"]


def _hidden_layer(width: int, *, bias: bool = True) -> nn.Sequential:
    """No bias before batch norm, which would take it away again."""
    first, last = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=bias)
    return nn.Sequential(first, nn.BatchNorm1d(width), nn.ReLU(), last)


class BasicBlock(nn.Module):
    """Features [N, D] to [N, D], none below 0."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(width, width, bias=False), nn.BatchNorm1d(width)

    def forward(self, features: Tensor) -> Tensor:
        return F.relu(self.norm(self.linear(features)))


class ResidualBlock(nn.Module):
    """Features [N, D] to [N, D], none below 0."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.residual, self.norm = _hidden_layer(width, bias=False), nn.BatchNorm1d(width)

    def forward(self, features: Tensor) -> Tensor:
        return F.relu(features + self.norm(self.residual(features)))


class ReversibleBlock(nn.Module):
    """Features [N, D] to [N, D], and back by `inverse` where batch norm's statistics are fixed; D is even."""

    def __init__(self, width: int) -> None:
        super().__init__()
        if width % 2:
            raise ModelError(f"{width} features: reversible blocks halve them, so their number must be even")
        self.first, self.second = _hidden_layer(width // 2), _hidden_layer(width // 2)

    def forward(self, features: Tensor) -> Tensor:
        one, two = features.chunk(2, dim=1)
        one = one + self.first(two)
        return torch.cat([one, two + self.second(one)], dim=1)

    def inverse(self, features: Tensor) -> Tensor:
        """What `forward` made these features [N, D] of, to roundings."""
        one, two = features.chunk(2, dim=1)
        two = two - self.second(one)
        return torch.cat([one - self.first(two), two], dim=1)


BLOCKS: dict[str, type[nn.Module]] = {
    "basic": BasicBlock,
    "residual": ResidualBlock,
    "reversible": ReversibleBlock,
}


class Featuriser(nn.Module):
    """Features [N, D], floating, to features [N, D] of their type: a random transform, then trained layers.

    Attributes:
        width: D. transform_blocks, kind, layers: what it was built with.
        transform: reversible blocks; their parameters take no gradient, and they stay in evaluation mode.
        mlp: blocks of `kind`.

    Raises ModelError for an odd width with reversible blocks.
    """

    def __init__(self, width: int, *, transform_blocks: int = 0, kind: Kind = "basic", layers: int = 0) -> None:
        super().__init__()
        self.width, self.transform_blocks, self.kind, self.layers = width, transform_blocks, kind, layers
        self.transform = nn.Sequential(*(ReversibleBlock(width) for _ in range(transform_blocks)))
        self.transform.requires_grad_(False)
        self.mlp = nn.Sequential(*(BLOCKS[kind](width) for _ in range(layers)))
        self.train()

    def forward(self, features: Tensor) -> Tensor:
        return self.mlp(self.transform(features))

    def train(self, mode: bool = True) -> Featuriser:
        """As for any module, but for the transform."""
        super().train(mode)
        self.transform.eval()
        return self


def random_transform(width: int, blocks: int, seed: int, features: Tensor) -> Featuriser:
    """A transform of `blocks` reversible blocks for features of this width, drawn by seed, in evaluation mode.

    features: floating [N, D], N at least 2: those that batch norm's statistics are measured on, block after block. As
    published, what a block adds is then of a size of about a third, whatever the features': it bends those of CLIP
    models (standard deviation 0.05 to 0.5) a lot, and much larger ones hardly. Equal arguments give equal weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = Featuriser(width, transform_blocks=blocks)
    made.eval().requires_grad_(False)
    _calibrate(made.transform, features.float().cpu())
    return made


@torch.no_grad()
def _calibrate(transform: nn.Module, features: Tensor) -> None:
    """Sets the statistics of every batch norm to those of what it sees, in the order of computation."""
    norms = [module for module in transform.modules() if isinstance(module, nn.BatchNorm1d)]
    for norm in norms:
        norm.momentum = 1.0  # the statistics of this one batch
        norm.train()
    transform(features)
    for norm in norms:
        assert norm.running_var is not None
        norm.running_var *= (len(features) - 1) / len(features)  # as it was divided by, not its unbiased estimate
        norm.eval()


def joined(transform: Featuriser | None, layers: Featuriser | None) -> Featuriser | None:
    """What a head stands behind that was trained with these two before it, in evaluation mode; they are not copied."""
    if transform is None or layers is None:
        return transform or layers
    both = Featuriser(transform.width)
    both.transform_blocks, both.kind, both.layers = transform.transform_blocks, layers.kind, layers.layers
    both.transform, both.mlp = transform.transform, layers.mlp
    return both.eval()


# ----------------------------------------------------------------------------------------------------------------------
# In a head's file
# ----------------------------------------------------------------------------------------------------------------------


def featuriser_header(module: nn.Module) -> dict[str, Any]:
    """What `build_featuriser` needs besides the weights: JSON values."""
    assert isinstance(module, Featuriser), "heads stand behind featurisers of this file only"
    return {name: getattr(module, name) for name in ("width", "transform_blocks", "kind", "layers")}


def build_featuriser(header: Mapping[str, Any]) -> Featuriser:
    """The module that a header describes, with fresh weights, in evaluation mode. Raises ModelError for another's."""
    names = {"width": int, "transform_blocks": int, "kind": str, "layers": int}
    if set(header) != set(names) or not all(type(header[name]) is kind for name, kind in names.items()):
        raise ModelError(f"a featuriser that is described as {dict(header)} was not written by this project")
    if header["kind"] not in BLOCKS or header["width"] < 1 or min(header["transform_blocks"], header["layers"]) < 0:
        raise ModelError(f"no featuriser is described by {dict(header)}; kinds are {', '.join(BLOCKS)}")
    return Featuriser(**header).eval()
