"""Classifiers: whole networks by name that take pixels in [0, 1] and give logits, for attacks, certification, margins.

| name | what is loaded |
|---|---|
| `lenet/FILE`, `cifar_resnet20/FILE`, `vgg19_bn/FILE`, ... | the small nets of `models.small` |
| `torchvision:resnet50/IMAGENET1K_V2`, `torchvision:resnet50/FILE` | torchvision's classification networks |
| `local-dir:FOLDER` | what `save_classifier` wrote |

FILE holds a state dict of this project or of the original research code (`models.original_weights`); an absolute one
follows a double slash (`lenet//data/model.t7`). Without FILE a name is an architecture only, for
`load_classifier(name, weights=False)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kernels import dct
from models import ModelError
from models.small import SMALL_NETS
from models.towers import outputs, small_net, stated_size, statistics, torchvision_network
from models.weights import Weights, load_into, misfit, read_weights, write_safetensors

CLASSIFIER_FILE = "classifier.safetensors"


class Classifier(nn.Module):
    """Images in [0, 1] to logits: with `low_pass` a filter, normalisation, with `flip` the frequency flip, the network.

    With `low_pass` B the network sees the lowest B frequencies of both axes, clipped to [0, 1]; with
    `low_pass_published` as in "Hold me tight!": its filter, which cuts vertical frequencies only, and no clipping
    (`kernels.dct.low_pass`). Attacks go through the filter, and move plain pixels.

    With `flip` the network sees T((x - mean) / std), T the reversal of all DCT frequencies (`kernels.dct.flip`), which
    is what "Hold me tight!" calls training on flipped data. T keeps lengths, so an attack on this module, within a ball
    and the box of plain pixels, is one on the flipped data.

    Attributes:
        name: as given to `load_classifier`.
        architecture: the name that builds the network again without weights.
        net: the network itself, from normalised images [N, C, S, S] to logits [N, num_classes].
        image_size (S), channels (C), num_classes: of its input and output.
        classes: names of the classes in the order of the logits, None where nobody has said.
        mean, std: buffers [C, 1, 1], outside the state dict.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        architecture: str,
        net: nn.Module,
        *,
        image_size: int,
        num_classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        classes: Sequence[str] | None = None,
        flip: bool = False,
        low_pass: int = 0,
        low_pass_published: bool = False,
    ) -> None:
        super().__init__()
        self.name = name
        self.architecture = architecture
        self.net = net
        self.image_size = image_size
        self.channels = len(mean)
        self.num_classes = num_classes
        self.classes = None if classes is None else tuple(classes)
        self.flip = flip
        self.low_pass = low_pass
        self.low_pass_published = low_pass_published
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).reshape(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).reshape(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, C, S, S], floating point in [0, 1].

        Raises:
            ModelError: another type or shape; values are not looked at, that would wait for the device.
        """
        size = self.image_size
        if not images.is_floating_point():
            raise ModelError(
                f"{self.name}: images of type {images.dtype}; expected floating point in [0, 1] (uint8: divide by 255)"
            )
        if images.ndim != 4 or images.shape[1:] != (self.channels, size, size):
            expected = f"[N, {self.channels}, {size}, {size}]"
            raise ModelError(f"{self.name}: images of shape {list(images.shape)}; expected {expected}")
        images = (self.filtered(images) - self.mean) / self.std
        return self.net(dct.flip(images) if self.flip else images)

    def filtered(self, images: Tensor) -> Tensor:
        """Images [N, C, S, S] in [0, 1] as they are before normalisation: low-passed, or themselves."""
        if not self.low_pass:
            return images
        images = dct.low_pass(images, self.low_pass, published=self.low_pass_published)
        return images if self.low_pass_published else images.clamp(0, 1)


def load_classifier(
    name: str,
    *,
    num_classes: int | None = None,
    weights: bool = True,
    flip: bool | None = None,
    low_pass: int | None = None,
    low_pass_published: bool | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Classifier:
    """The classifier called `name`, on the CPU in float32, in evaluation mode and with gradients on.

    Args:
        name: see the table above.
        num_classes: of its logits; None for as many as the weights have, or 10 without weights.
        weights: False gives the same architecture, normalisation and classes with the library's random initialisation.
        flip, low_pass, low_pass_published: of the classifier; None for what its file says, which only `save_classifier`
            does, or False and 0.
        mean, std: of pixels in [0, 1]; None for what the file says, or those of `models.small`. The original code has
            files that need others: low-pass CIFAR-10 its own, SmoothAdv's first release a std of 1.

    Raises:
        ModelError: unknown name (with close matches), weights missing, unreadable, unfit or with another number of
            classes than asked for.
    """
    library, colon, rest = name.partition(":")
    if not colon:
        library, rest = "", name
    if library == "local-dir":
        classifier = _from_folder(name, Path(rest).expanduser(), num_classes, weights)
    elif library in ("", "torchvision"):
        architecture, _, source = rest.partition("/")
        build = _torchvision if library else _small
        classifier = build(name, architecture, source, num_classes, weights)
    else:
        raise ModelError(
            f"{name}: no classifiers are called {library!r}; expected torchvision:, local-dir: or one of "
            f"{', '.join(SMALL_NETS)}"
        )
    given = {"flip": flip, "low_pass": low_pass, "low_pass_published": low_pass_published}
    _transform(classifier, {key: value for key, value in given.items() if value is not None}, name)
    _normalise(classifier, {"mean": mean, "std": std}, name)
    return classifier.eval()


def save_classifier(folder: Path, classifier: Classifier, metadata: Mapping[str, object]) -> Path:
    """Write `classifier` to `folder`/classifier.safetensors, which `local-dir:FOLDER` names; returns that file.

    metadata: JSON values kept in its header beside what `load_classifier` needs: data, recipe, commit, ...

    The file keeps its old content or holds all of the new. Raises ModelError where it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(f"cannot write to {folder}: {error.strerror or error}") from None
    header = {
        "architecture": classifier.architecture,
        "num_classes": classifier.num_classes,
        "classes": None if classifier.classes is None else list(classifier.classes),
        "image_size": classifier.image_size,
        "mean": classifier.mean.flatten().tolist(),
        "std": classifier.std.flatten().tolist(),
        "flip": classifier.flip,
        "low_pass": classifier.low_pass,
        "low_pass_published": classifier.low_pass_published,
        "metadata": dict(metadata),
    }
    file = folder / CLASSIFIER_FILE
    write_safetensors(file, classifier.net.state_dict(), header)
    return file


def _small(name: str, architecture: str, source: str, num_classes: int | None, weights: bool) -> Classifier:
    small, loaded = small_net(name, architecture, source, weights)
    count = _number(name, num_classes, loaded, small.classifier, weights)
    classifier = Classifier(
        name,
        architecture,
        small.build(count),
        image_size=small.image_size,
        num_classes=count,
        mean=small.mean,
        std=small.std,
    )
    return _with_weights(classifier, loaded, weights)


def _torchvision(name: str, architecture: str, source: str, num_classes: int | None, weights: bool) -> Classifier:
    wanted = num_classes or (None if weights else 10)
    network = torchvision_network(name, architecture, source, weights, num_classes=wanted)
    classifier = Classifier(
        name,
        f"torchvision:{architecture}",
        network.module,
        image_size=network.image_size,
        num_classes=_number(name, wanted, network.loaded, network.classifier, weights),
        mean=network.mean,
        std=network.std,
    )
    return _with_weights(classifier, network.loaded, weights)


def _from_folder(name: str, folder: Path, num_classes: int | None, weights: bool) -> Classifier:
    if not folder.is_dir():
        raise ModelError(f"{name}: no folder at {folder} (working folder {Path.cwd()})")
    if not (folder / CLASSIFIER_FILE).is_file():
        raise ModelError(f"{name}: {folder} holds no {CLASSIFIER_FILE}; is it the export of a trained classifier?")
    loaded = read_weights(folder / CLASSIFIER_FILE)
    architecture, count = loaded.metadata.get("architecture"), loaded.metadata.get("num_classes")
    if not isinstance(architecture, str) or architecture.startswith("local-dir:"):
        raise ModelError(f"{loaded.file}: its header names no architecture; was it written by save_classifier?")
    if not isinstance(count, int) or count < 1:
        raise ModelError(f"{loaded.file}: num_classes is {count!r}; expected a positive number")
    if weights and num_classes not in (None, count):
        raise _wrong_number(name, num_classes, count)
    classifier = load_classifier(architecture, num_classes=num_classes or count, weights=False)
    classifier.name = name
    return _with_weights(classifier, loaded, weights)


def _number(name: str, wanted: int | None, loaded: Weights | None, last: str, weights: bool) -> int:
    """How many classes a classifier has: as asked for, or as its weights have, or 10."""
    if wanted is not None and wanted < 1:
        raise ModelError(f"{name}: {wanted} classes; give at least 1")
    found = outputs(loaded, last) if loaded is not None else None
    if weights and wanted is not None and found not in (None, wanted):
        raise _wrong_number(name, wanted, found)
    return wanted or found or 10


def _wrong_number(name: str, wanted: int | None, found: int | None) -> ModelError:
    return ModelError(f"{name}: its weights tell {found} classes apart, the data have {wanted}")


def _with_weights(classifier: Classifier, loaded: Weights | None, weights: bool) -> Classifier:
    """`classifier` with what the header of `loaded` states and, where `weights`, its tensors."""
    if loaded is not None:
        stated, file = loaded.metadata, loaded.file
        if stated.get("architecture", classifier.architecture) != classifier.architecture:
            raise ModelError(f"{file} holds {stated['architecture']}, not {classifier.architecture}")
        if weights:
            _load(classifier, loaded)
        _normalise(classifier, stated, file)
        classifier.image_size = stated_size(stated, classifier.image_size, file)
        classifier.classes = _classes(stated, classifier.num_classes, file, strict=weights)
        _transform(classifier, stated, file)
    return classifier


def _transform(classifier: Classifier, values: Mapping[str, Any], where: str | Path) -> None:
    """Set what `values` says of flip and low-pass filter."""
    for key in ("flip", "low_pass_published"):
        setattr(classifier, key, values.get(key, getattr(classifier, key)) is True)
    low_pass = values.get("low_pass", classifier.low_pass)
    if isinstance(low_pass, bool) or not isinstance(low_pass, int) or low_pass < 0:
        raise ModelError(f"{where}: low_pass is {low_pass!r}; expected a number of frequencies, or 0 for all")
    classifier.low_pass = low_pass


def _normalise(classifier: Classifier, values: Mapping[str, Any], where: str | Path) -> None:
    """Set the mean and std that `values` has."""
    for key in ("mean", "std"):
        buffer = classifier.get_buffer(key)
        found = statistics(values, key, buffer.flatten().tolist(), where)
        buffer.copy_(torch.tensor(found).reshape(buffer.shape))


def _load(classifier: Classifier, loaded: Weights) -> None:
    """Copy the tensors; where they do not fit, say which small net they are of."""
    if misfit(classifier.net, loaded.state):
        for architecture, small in SMALL_NETS.items():
            count = outputs(loaded, small.classifier)
            with torch.device("meta"):
                other = small.build(count) if count else None
            if other is not None and not misfit(other, loaded.state):
                raise ModelError(f"{loaded.file} holds the weights of {architecture}, not {classifier.architecture}")
    load_into(classifier.net, loaded.state, loaded.file)


def _classes(stated: Mapping[str, Any], count: int, file: Path, *, strict: bool) -> tuple[str, ...] | None:
    """The names in a header; None where it has none, or, unless `strict`, those of another number of classes."""
    classes = stated.get("classes")
    if classes is None or (not strict and isinstance(classes, list) and len(classes) != count):
        return None
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ModelError(f"{file}: classes is {str(classes)[:60]!r}; expected a list of names")
    if len(classes) != count:
        raise ModelError(f"{file}: its header names {len(classes)} classes, its network has {count}")
    return tuple(classes)
