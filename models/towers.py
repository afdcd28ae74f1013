"""Towers: networks that end before the classifier, from torchvision, timm, `models.small` (CLIP's: `models.clip`)."""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from models import ModelError
from models.download import hub_file, torchvision_file
from models.original_weights import with_own_names
from models.small import SMALL_NETS, SmallNet
from models.weights import SUFFIXES, Weights, first_line, load_into, read_weights

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tower:
    """A network from normalised images [N, C, S, S] to features [N, feature_dim], and what is needed to use it.

    Attributes:
        architecture: the name that builds it again without weights.
        image_size: S in pixels.
        mean, std: of pixels in [0, 1], one value per channel.
        clip_config: open_clip's model configuration, None for other libraries.
        weights_file: where its weights were read, None for random ones.
    """

    module: nn.Module
    architecture: str
    image_size: int
    feature_dim: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    clip_config: dict[str, Any] | None = field(default=None, repr=False)
    weights_file: Path | None = None


@dataclass(frozen=True)
class TorchvisionNetwork:
    """A classification network of torchvision with random weights, and what its name says about it.

    module: with `num_classes` outputs. classifier: name of its last layer. loaded: the weights that are named, with
    their classifier. image_size, mean, std: of the preprocessing that belongs to the tag, or to the default one.
    """

    module: nn.Module
    classifier: str
    loaded: Weights | None
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def torchvision_network(
    name: str, architecture: str, source: str, weights: bool, *, num_classes: int | None = None
) -> TorchvisionNetwork:
    """torchvision's `architecture`; `source` is one of its weight tags, a file, or empty.

    num_classes: of the network; None for as many as the weights have, or 1000.
    """
    from torchvision import models

    known = models.list_models(module=models)
    if architecture not in known:
        raise unknown(name, "torchvision has no classification network", architecture, known, "torchvision:")
    require_source(name, source, weights)
    tags = models.get_model_weights(architecture)
    tag = tags.DEFAULT  # its preprocessing stands for the architecture's where the weights are not torchvision's own
    loaded = None
    if is_file(source):
        loaded = with_own_names(read_weights(source), architecture)
    elif source:
        if source not in tags.__members__:
            raise unknown(
                name, f"{architecture} has no weights", source, tags.__members__, f"torchvision:{architecture}/"
            )
        tag = tags[source]
        loaded = read_weights(torchvision_file(tag.url, name)) if weights else None

    module = models.get_model(architecture, weights=None)
    classifier = next(
        (path for path, part in reversed(list(module.named_modules())) if isinstance(part, nn.Linear)), None
    )
    if classifier is None or getattr(module, "aux_logits", False):
        raise ModelError(f"{name}: not supported, its features are not the input of one last linear layer")
    if num_classes is None and loaded is not None:
        num_classes = outputs(loaded, classifier)
    if num_classes not in (None, 1000):
        parent, _, attribute = classifier.rpartition(".")
        last = module.get_submodule(classifier)
        assert isinstance(last, nn.Linear)
        layer = nn.Linear(last.in_features, num_classes, bias=last.bias is not None)
        setattr(module.get_submodule(parent), attribute, layer)
    preprocess = tag.transforms()
    size, mean, std = preprocess.crop_size[0], tuple(preprocess.mean), tuple(preprocess.std)
    return TorchvisionNetwork(module, classifier, loaded, size, mean, std)


def torchvision_tower(name: str, architecture: str, source: str, weights: bool) -> Tower:
    """`torchvision_network` without its classifier."""
    network = torchvision_network(name, architecture, source, weights)
    parent, _, attribute = network.classifier.rpartition(".")
    last = network.module.get_submodule(network.classifier)
    assert isinstance(last, nn.Linear)
    setattr(network.module.get_submodule(parent), attribute, nn.Identity())
    tower = Tower(
        network.module,
        f"torchvision:{architecture}",
        image_size=network.image_size,
        feature_dim=last.in_features,
        mean=network.mean,
        std=network.std,
    )
    return with_weights(tower, name, network.loaded, weights, [network.classifier])


def outputs(loaded: Weights, classifier: str) -> int | None:
    """How many classes the last layer `classifier` of some weights has; None where they have no such layer."""
    weight = loaded.state.get(f"{classifier}.weight")
    return None if weight is None or weight.ndim != 2 else len(weight)


def timm_tower(name: str, architecture: str, source: str, weights: bool) -> Tower:
    """timm's model `architecture` (`.tag` may follow); `source` is `pretrained`, a file, or empty."""
    import timm

    if not timm.is_model(architecture.partition(".")[0]):
        raise unknown(name, "timm has no model", architecture, timm.list_models(), "timm:")
    require_source(name, source, weights)
    if source not in ("", "pretrained") and not is_file(source):
        raise ModelError(
            f"{name}: expected timm:{architecture}/pretrained or timm:{architecture}/FILE ({', '.join(SUFFIXES)})"
        )
    loaded = read_weights(source) if is_file(source) else None
    published = _timm_hub_file(name, architecture) if source == "pretrained" and weights else None
    if published:
        read_weights(published)  # only to refuse a damaged or hostile file in our words
    try:
        # Published files are read by timm itself, which knows the conversions that they need.
        module: Any = timm.create_model(
            architecture,
            num_classes=0,
            pretrained=published is not None,
            pretrained_cfg_overlay={"file": str(published)} if published else None,
        )
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        raise ModelError(f"{name}: timm cannot build it ({first_line(error)})") from None
    config = module.pretrained_cfg
    channels, height, width = config["input_size"]
    if channels != 3 or height != width:
        raise ModelError(
            f"{name}: takes images of {channels}x{height}x{width}; only square ones of 3 channels are supported"
        )
    classifier = config["classifier"] or ()
    tower = Tower(
        module,
        f"timm:{architecture}",
        image_size=height,
        feature_dim=module.head_hidden_size,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        weights_file=published,
    )
    return with_weights(tower, name, loaded, weights, [classifier] if isinstance(classifier, str) else classifier)


def _timm_hub_file(name: str, architecture: str) -> Path:
    import timm

    config = timm.get_pretrained_cfg(architecture)
    if config is None or not config.hf_hub_id:
        raise ModelError(f"{name}: timm publishes no weights for {architecture}")
    files = (config.hf_hub_filename,) if config.hf_hub_filename else ("model.safetensors", "pytorch_model.bin")
    return hub_file(config.hf_hub_id, files, name)


def small_net(name: str, architecture: str, source: str, weights: bool) -> tuple[SmallNet, Weights | None]:
    """This project's small net `architecture` and the weights in the file `source`, which may be empty."""
    if architecture not in SMALL_NETS:
        elsewhere = [
            f"{library}:{architecture}" for library, known in _library_models().items() if architecture in known
        ]
        if elsewhere:
            raise ModelError(f"{name}: no small net of this project; did you mean {' or '.join(elsewhere)}?")
        raise unknown(name, "no model is called", architecture, SMALL_NETS, "")
    require_source(name, source, weights)
    if source and not is_file(source):
        raise ModelError(f"{name}: expected {architecture}/FILE ({', '.join(SUFFIXES)})")
    return SMALL_NETS[architecture], with_own_names(read_weights(source), architecture) if source else None


def small_tower(name: str, architecture: str, source: str, weights: bool) -> Tower:
    """This project's small net `architecture` without its classifier; `source` is a file, or empty."""
    net, loaded = small_net(name, architecture, source, weights)
    tower = Tower(
        net.build(0),
        architecture,
        image_size=net.image_size,
        feature_dim=net.feature_dim,
        mean=net.mean,
        std=net.std,
    )
    return with_weights(tower, name, loaded, weights, [net.classifier])


def _library_models() -> dict[str, list[str]]:
    import open_clip
    import timm
    from torchvision import models

    return {
        "torchvision": models.list_models(module=models),
        "timm": timm.list_models(),
        "open_clip": open_clip.list_models(),
    }


def with_weights(
    tower: Tower, name: str, loaded: Weights | None, weights: bool, classifiers: Sequence[str] = ()
) -> Tower:
    """`tower` with the normalisation that the file `loaded` states and, where `weights`, its tensors."""
    if loaded is None:
        return tower
    if weights:
        prefixes = tuple(f"{classifier}." for classifier in classifiers)
        state = {key: value for key, value in loaded.state.items() if not key.startswith(prefixes)}
        if len(state) < len(loaded.state):
            log.info("%s: classifier (%s) left out, an encoder ends before it", name, ", ".join(classifiers))
        load_into(tower.module, state, loaded.file)
    return replace(
        tower,
        image_size=stated_size(loaded.metadata, tower.image_size, loaded.file),
        mean=statistics(loaded.metadata, "mean", tower.mean, loaded.file),
        std=statistics(loaded.metadata, "std", tower.std, loaded.file),
        weights_file=loaded.file if weights else None,
    )


def stated_size(values: Mapping[str, Any], default: int, where: str | Path) -> int:
    """The input size that a header states: a convolutional student keeps the size it was trained at."""
    size = values.get("image_size", default)
    if not isinstance(size, int) or size < 1:
        raise ModelError(f"{where}: image_size is {size!r}; expected a positive number of pixels")
    return size


def statistics(values: Mapping[str, Any], key: str, default: Sequence[float], where: str | Path) -> tuple[float, ...]:
    """Normalisation constants `key` ("mean" or "std") from a header or configuration, `default` where it has none."""
    found = values.get(key)
    if found is None:
        return tuple(default)
    numbers = found if isinstance(found, (list, tuple)) else [found] * len(default)
    if len(numbers) != len(default) or not all(
        isinstance(number, (int, float)) and math.isfinite(number) for number in numbers
    ):
        raise ModelError(f"{where}: {key} is {found!r}; expected {len(default)} numbers for pixels in [0, 1]")
    if key == "std" and min(numbers) <= 0:
        raise ModelError(f"{where}: std is {found!r}; expected positive numbers")
    return tuple(float(number) for number in numbers)


def is_file(source: str) -> bool:
    """Whether the part of a name after the architecture is meant as a file, not as a tag."""
    return "/" in source or source.endswith(SUFFIXES)


def require_source(name: str, source: str, weights: bool) -> None:
    """Raise ModelError where weights are wanted but `name` says none."""
    if weights and not source:
        raise ModelError(
            f"{name}: an architecture without weights; append /FILE ({', '.join(SUFFIXES)}; absolute: //...) "
            "or a tag of its library"
        )


def unknown(name: str, problem: str, wanted: str, known: Iterable[str], prefix: str) -> ModelError:
    """The error for an unknown name: one line with the closest names known."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    close = [by_lower[match] for match in difflib.get_close_matches(wanted.lower(), by_lower, n=4, cutoff=0.5)]
    hint = (
        f"did you mean {' or '.join(prefix + match for match in close)}?"
        if close
        else "see models/encoders.py for the names"
    )
    return ModelError(f"{name}: {problem} {wanted!r}; {hint}")
