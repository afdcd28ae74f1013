"""Weight files of the research code that the small nets come from: their names of tensors, and this project's.

| code | file | its names |
|---|---|---|
| SmoothAdv (Salman et al. 2019), Cohen et al. 2019 | `checkpoint.pth.tar` | after `1.` or `1.module.` those used here |
| Hold me tight! (Ortiz-Jimenez et al. 2020) | `model.t7` | `shortcut.0`, `linear`; DenseNet: `dense2.3`, `trans1` |
| the package robustness (Engstrom et al. 2019) | `.pt` | `model.`; its copy of the net for attacks is left out |

The normalisations of the first two are in their code, not in their files: `models.small` has them for each net. The
package's is in its file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate

from torch import Tensor

from models.weights import Weights

# Layers before each block of DenseNet-121 in the one sequence that holds them and the transitions here.
_DENSE_STARTS = list(accumulate((6 + 1, 12 + 1, 24 + 1), initial=0))


def with_own_names(loaded: Weights, architecture: str) -> Weights:
    """`loaded` with the tensor names of the network `architecture`; what has them already stays as it is.

    architecture: as in `models.small`, or torchvision's (then only wrappers are taken off). Where the package
    robustness wrote the file, the mean and std in it are stated in `metadata`. Names that belong to no net here are
    left for `models.weights.load_into` to refuse.
    """
    state = loaded.state
    metadata = loaded.metadata
    if any(name.startswith("attacker.") for name in state):
        statistics = {key: state.get(f"normalizer.new_{key}") for key in ("mean", "std")}
        stated = {key: tensor.flatten().tolist() for key, tensor in statistics.items() if tensor is not None}
        metadata = {**metadata, **stated}
        state = {
            name.removeprefix("model."): tensor
            for name, tensor in state.items()
            if not name.startswith(("attacker.", "normalizer."))
        }
    for prefix in ("1.", "module."):
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return replace(loaded, state=_renamed(state, architecture), metadata=metadata)


def _renamed(state: Mapping[str, Tensor], architecture: str) -> dict[str, Tensor]:
    if architecture == "cifar_resnet18":
        return {re.sub(r"^linear\.", "fc.", k).replace(".shortcut.", ".downsample."): v for k, v in state.items()}
    if architecture == "densenet121":
        return {_dense_name(name): tensor for name, tensor in state.items()}
    return dict(state)


def _dense_name(name: str) -> str:
    """`dense2.3.bn1.weight` is layer 3 of the second block; `trans1` follows the first block."""
    if block := re.match(r"dense([1-4])\.(\d+)\.", name):
        return f"dense.{_DENSE_STARTS[int(block[1]) - 1] + int(block[2])}.{name[block.end() :]}"
    if transition := re.match(r"trans([1-3])\.", name):
        return f"dense.{_DENSE_STARTS[int(transition[1])] - 1}.{name[transition.end() :]}"
    return re.sub(r"^conv1\.", "stem.", re.sub(r"^linear\.", "classifier.", name))
