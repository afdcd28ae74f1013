"""Encoders: image towers by name, each with its own normalisation, and hidden states and Gram tokens on request.

| name | what is loaded |
|---|---|
| `open_clip:RN50/openai` | open_clip's architecture and pretrained tag |
| `open_clip:ViT-B-16/FILE` | weights of open_clip, of OpenAI or of the feature-contamination code |
| `local-dir:FOLDER` | open_clip's folder layout, or the folder of an exported student |
| `hf-hub:ORG/NAME` | a hub repository in open_clip's layout |
| `torchvision:resnet50/IMAGENET1K_V2`, `torchvision:resnet50/FILE` | torchvision's classification networks |
| `timm:NAME/pretrained`, `timm:NAME/FILE` | timm's models |
| `lenet/FILE`, `cifar_resnet20/FILE`, ... | the small nets of `models.small` |

FILE is a path with an ending of `models.weights.SUFFIXES`; an absolute one follows a double slash
(`timm:resnet18//data/w.safetensors`). Without tag or file a name is an architecture only, for `load_encoder(name,
weights=False)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models import ModelError
from models.clip import CONFIG_FILE, clip_tower, folder_tower, hub_tower, open_clip_tower
from models.towers import Tower, small_tower, timm_tower, torchvision_tower, with_weights
from models.weights import read_weights

STUDENT_FILE = "student.safetensors"
_LIBRARIES = {"open_clip": open_clip_tower, "torchvision": torchvision_tower, "timm": timm_tower, "": small_tower}


class Intermediates(NamedTuple):
    """features [N, D]; hidden and gram: one tensor of tokens [N, T, E] per block asked for, in the order asked."""

    features: Tensor
    hidden: tuple[Tensor, ...]
    gram: tuple[Tensor, ...]


class Encoder(nn.Module):
    """Images in [0, 1] to features: normalisation, then a tower that ends before the classifier.

    A CLIP tower gives its projected embedding, not divided by its norm.

    Attributes:
        name: as given to `load_encoder`.
        tower: the network itself.
        mean, std: buffers [C, 1, 1], outside the state dict.
        num_blocks: how many blocks `intermediates` can name: residual blocks of an open_clip ViT, stages (`layer1`,
            `layer2`, ...) of a ResNet, 0 for others.
        architecture, image_size (S), feature_dim (D), clip_config, weights_file: see `models.towers.Tower`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, tower: Tower) -> None:
        super().__init__()
        self.name = name
        self.architecture = tower.architecture
        self.feature_dim = tower.feature_dim
        self.image_size = tower.image_size
        self.clip_config = tower.clip_config
        self.weights_file = tower.weights_file
        self.tower = tower.module
        self.register_buffer("mean", torch.tensor(tower.mean).reshape(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(tower.std).reshape(-1, 1, 1), persistent=False)

        # Hooks stay for good and keep a tensor only while `intermediates` runs: hooks set per call would break the
        # graph of torch.compile. `partial` of a bound method, not a closure, so that a deep copy of the encoder fills
        # its own `_kept`.
        self._kept: dict[tuple[str, int], Tensor | None] = {}
        blocks, gram_sources = _blocks(self.tower)
        self.num_blocks = len(blocks)
        for kind, modules in (("hidden", blocks), ("gram", gram_sources)):
            for index, module in enumerate(modules):
                module.register_forward_hook(partial(self._keep, (kind, index)))

    def forward(self, images: Tensor) -> Tensor:
        """Features [N, D] of images [N, 3, S, S], floating point in [0, 1].

        S is `image_size`, also for towers that could take another: weights and statistics belong to one size. A tower
        of one channel (LeNet) averages the three, which leaves grey images as they are, or takes [N, 1, S, S].

        Raises:
            ModelError: another type or shape; values are not looked at, that would wait for the device.
        """
        if not images.is_floating_point():
            raise ModelError(
                f"{self.name}: images of type {images.dtype}; expected floating point in [0, 1] (uint8: divide by 255)"
            )
        channels, size = len(self.mean), self.image_size
        if images.ndim != 4 or images.shape[1] not in (3, channels) or images.shape[2:] != (size, size):
            raise ModelError(f"{self.name}: images of shape {list(images.shape)}; expected [N, 3, {size}, {size}]")
        if images.shape[1] != channels:
            images = images.mean(dim=1, keepdim=True)
        return self.tower((images - self.mean) / self.std)

    def intermediates(self, images: Tensor, hidden: Sequence[int] = (), gram: Sequence[int] = ()) -> Intermediates:
        """Features together with tokens of some blocks, numbered from 0 or, negative, from the end.

        Args:
            images: as `forward` takes them.
            hidden: blocks whose outputs are returned: the residual stream [N, T, E] of a ViT, class token first; the
                maps of a ResNet stage as tokens [N, H*W, C].
            gram: blocks of which the tokens X are returned whose Gram matrix X X^T / sqrt(E) is matched. Of a ViT, what
                the block's first layer norm gives to its attention: the "attention map" of the feature-contamination
                code is this matrix, not a softmax. Of a ResNet, the same as hidden.

        Raises:
            ModelError: a block that the tower does not have, or as `forward`.
        """
        named = [("hidden", index) for index in hidden] + [("gram", index) for index in gram]
        wanted = [(kind, self._block_number(index)) for kind, index in named]
        self._kept = dict.fromkeys(wanted)
        try:
            features = self(images)
            tokens = [_as_tokens(self._kept[key]) for key in wanted]
        finally:
            self._kept = {}
        return Intermediates(features, tuple(tokens[: len(hidden)]), tuple(tokens[len(hidden) :]))

    def _keep(self, key: tuple[str, int], module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if key in self._kept:
            self._kept[key] = output

    def _block_number(self, index: int) -> int:
        if not self.num_blocks:
            raise ModelError(
                f"{self.name}: has no numbered blocks; hidden and Gram terms need an open_clip ViT or a ResNet"
            )
        if not -self.num_blocks <= index < self.num_blocks:
            raise ModelError(
                f"{self.name}: no block {index}; there are {self.num_blocks}, numbered from 0 or, backwards, from -1"
            )
        return index % self.num_blocks


def _blocks(tower: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """Modules whose outputs are the hidden states, and those whose outputs are the Gram tokens, block by block."""
    from open_clip.transformer import VisionTransformer

    if isinstance(tower, VisionTransformer):
        blocks = list(tower.transformer.resblocks)  # batch first in every version supported: [N, T, E] as it is
        return blocks, [block.get_submodule("ln_1") for block in blocks]
    stages: list[nn.Module] = []
    while isinstance(stage := getattr(tower, f"layer{len(stages) + 1}", None), nn.Module):
        stages.append(stage)
    return stages, stages


def _as_tokens(output: Tensor | None) -> Tensor:
    assert output is not None, "a block was not run"
    return output.flatten(2).transpose(1, 2) if output.ndim == 4 else output


def load_encoder(name: str, *, weights: bool = True) -> Encoder:
    """The encoder called `name`, on the CPU in float32, in training mode and with gradients on.

    Args:
        name: see the table above.
        weights: False gives the same architecture with its library's random initialisation. A weight file in the name
            is still opened, for the activation and normalisation it states; nothing is downloaded but the configuration
            of an `hf-hub:` name.

    Raises:
        ModelError: unknown name (with close matches), weights missing, unreadable, unfit or unreachable.
    """
    library, colon, rest = name.partition(":")
    if not colon:
        library, rest = "", name
    if library == "local-dir":
        tower = _local_tower(name, Path(rest).expanduser(), weights)
    elif library == "hf-hub":
        tower = hub_tower(name, rest, weights)
    elif library in _LIBRARIES:
        architecture, _, source = rest.partition("/")
        tower = _LIBRARIES[library](name, architecture, source, weights)
    else:
        known = ", ".join(f"{library}:" for library in [*filter(None, _LIBRARIES), "local-dir", "hf-hub"])
        raise ModelError(f"{name}: no library is called {library!r}; expected {known} or a small net's bare name")
    return Encoder(name, tower)


def _local_tower(name: str, folder: Path, weights: bool) -> Tower:
    if not folder.is_dir():
        raise ModelError(f"{name}: no folder at {folder} (working folder {Path.cwd()})")
    if (folder / CONFIG_FILE).is_file():
        return folder_tower(name, folder, weights)
    if not (folder / STUDENT_FILE).is_file():
        raise ModelError(f"{name}: {folder} holds neither {CONFIG_FILE} nor {STUDENT_FILE}")
    loaded = read_weights(folder / STUDENT_FILE)
    config, architecture = loaded.metadata.get("clip_config"), loaded.metadata.get("name")
    if isinstance(config, dict):
        return clip_tower(name, config, loaded.metadata, loaded if weights else None)
    library, _, architecture = str(architecture or "?:").rpartition(":")
    if library not in _LIBRARIES:
        raise ModelError(f"{loaded.file}: its header names no architecture; is it an exported student?")
    return with_weights(_LIBRARIES[library](name, architecture, "", False), name, loaded, weights)
