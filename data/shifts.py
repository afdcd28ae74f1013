"""ImageNet, its five shift sets and the demo's stand-ins for them: what each holds, and how it is scored.

A set is a `ShiftSet`; those that belong together are a `Suite` with one list of classes, the order of a head's logits.

    suite      in distribution   shifts                                                          further sets
    imagenet   imagenet (val)    imagenet_v2, imagenet_r, objectnet, imagenet_sketch, imagenet_a   ImageNetV2's other
                                                                                                 versions; controls
    demo       val               v2, r, objectnet, sketch, a                                     controls

Two numbers can be had from the same logits, and they are told apart by name everywhere:

    official   the published protocol: `project` reduces the logits to the set's classes, then argmax (or top-k, loss).
               ImageNet-R and -A keep 200 columns; an ObjectNet class gets the maximum over its ImageNet classes.
    plain      argmax over all 1000 logits; right where that class is one that the image's label accepts. Predictions
               outside the set's classes count as wrong.

A control is the part of ImageNet's validation set that has the classes of a shift set: the accuracy to compare with,
for 200 classes are easier than 1000. It is scored over these classes, as in the table of published accuracies that
`eval/robustness.py` fits its lines to; ObjectNet's control therefore tells its 125 ImageNet classes apart.

Pack ObjectNet without --resize: its 2 pixel border is cut off at evaluation, from images of the original size.

Class lists: data/imagenet_classes.json, from the code of the sets' authors (ImageNet-R, ImageNet-A, ObjectNet); wnids
in their official order, which is the sorted one. They are compared with their SHA-256 on import. Published accuracies:
data/testbed_top1.csv, from github.com/modestyachts/imagenet-testbed (robustness_top1s.csv; MIT licence, Copyright (c)
2020 Rohan Taori, Achal Dave, Vaishaal Shankar, Nicholas Carlini, Benjamin Recht, Ludwig Schmidt).
"""

from __future__ import annotations

import functools
import hashlib
import json
import os.path
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data import DataError
from data.demo import DEMO_SPLITS
from data.demo_images import CLASSES

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from data.tar import ShardSet

CLASS_LISTS = Path(__file__).with_name("imagenet_classes.json")


@dataclass(frozen=True)
class ShiftSet:
    """A labelled set of images and its protocol.

    source: paper and version. layout: of `data/shards.py pack`. folder: what the publishers' archive unpacks to.
    labels: how the label of an image follows from its folder. classes: C names in label order. accepts: for each label
    the logits (columns of the head) that are right. num_images: the published number, None where none is. border:
    pixels to cut from every edge before anything else (`EvalTransform.border`). part_of: of a control, the set that its
    samples are taken from.

    Raises DataError for an inconsistent class map.
    """

    name: str
    title: str
    source: str
    layout: str
    folder: str
    labels: str
    classes: tuple[str, ...]
    accepts: tuple[tuple[int, ...], ...]
    num_logits: int
    num_images: int | None = None
    border: int = 0
    part_of: str = ""

    def __post_init__(self) -> None:
        columns = [column for accepted in self.accepts for column in accepted]
        problem = ""
        if len(self.classes) != len(self.accepts) or len(set(self.classes)) != len(self.classes):
            problem = f"{len(set(self.classes))} distinct class names for {len(self.accepts)} labels"
        elif not self.accepts or not all(self.accepts):
            problem = "a class without logits"
        elif len(set(columns)) != len(columns):
            problem = "a logit that belongs to two classes"
        elif not set(columns) <= set(range(self.num_logits)):
            problem = f"logits {min(columns)} to {max(columns)} where there are 0 to {self.num_logits - 1}"
        if problem:
            raise DataError(f"the class map of {self.title} has {problem}; restore {CLASS_LISTS}")

    @property
    def num_classes(self) -> int:
        """Number of labels: [0, C)."""
        return len(self.classes)

    @property
    def has_all_classes(self) -> bool:
        """Whether labels and logits are numbered alike, so that official and plain number are the same."""
        return self.accepts == _each(range(self.num_logits))

    @property
    def projection(self) -> str:
        """How logits become the set's: "none", "subset" of the columns, or "maximum" over each label's columns."""
        if self.has_all_classes:
            return "none"
        return "subset" if all(len(accepted) == 1 for accepted in self.accepts) else "maximum"

    @property
    def sha256(self) -> str:
        """Of [class name, its logits ascending] for each label in order, as JSON without spaces."""
        pairs = [[name, sorted(accepted)] for name, accepted in zip(self.classes, self.accepts, strict=True)]
        return hashlib.sha256(json.dumps(pairs, separators=(",", ":")).encode()).hexdigest()


def _each(columns: Iterable[int]) -> tuple[tuple[int, ...], ...]:
    """Labels that accept one logit each."""
    return tuple((column,) for column in columns)


@dataclass(frozen=True)
class Suite:
    """Sets that the same heads are scored on: classes in logit order, the set in distribution, the shifts in order."""

    name: str
    classes: tuple[str, ...]
    in_distribution: str
    shifts: tuple[str, ...]
    sets: Mapping[str, ShiftSet]

    def control_of(self, name: str) -> ShiftSet:
        """What the set `name` is compared with: the set in distribution, restricted to the same classes."""
        wanted = _each(_columns_of(self.sets[name]))
        return next(
            one
            for one in self.sets.values()
            if self.in_distribution in (one.name, one.part_of) and one.accepts == wanted
        )


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------

SHA256 = {
    "imagenet": "cfe60c12fa86fb3ea7c4dba57f3ef206f7e0c78e2aba51fc76364e5368a8d7de",
    "imagenet_r": "21d3ef8a648422f45ead0205ef6011143783de2852ced2b5431e4c662907c01d",
    "objectnet": "b98d582cb6a94584d4c9e82fa622f25f30d7962e014beb13125d029ec011a888",
    "imagenet_a": "0823805e0704a06ec1bd8e5b695f37105966c70a56683c5a4bbedbddcf45fda4",
}
BY_WNID = "the position of the wnid folder in sorted order"
V2 = "Recht et al. 2019, Do ImageNet classifiers generalize to ImageNet?"


def _imagenet() -> Suite:
    lists = json.loads(CLASS_LISTS.read_text(encoding="utf-8"))
    wnids = tuple(lists["wnids"])

    def of_wnids(columns: Sequence[int] = range(1000), *, labels: str = BY_WNID, **fields: Any) -> ShiftSet:
        classes = tuple(wnids[column] for column in columns)
        return ShiftSet(classes=classes, accepts=_each(columns), labels=labels, num_logits=1000, **fields)

    imagenet = of_wnids(
        name="imagenet",
        title="ImageNet",
        source="Russakovsky et al. 2015, ImageNet large scale visual recognition challenge; validation set",
        layout="imagenet",
        folder="val",
        num_images=50000,
    )
    v2, v2_threshold, v2_top = (
        of_wnids(
            name=name,
            title=f"ImageNetV2{title}",
            source=f"{V2} Version {version}",
            layout="imagenet_v2",
            folder=f"imagenetv2-{folder}-format-val",
            labels="int(folder)",
            num_images=10000,
        )
        for name, title, version, folder in (
            ("imagenet_v2", "", "matched-frequency, b-33", "matched-frequency"),
            ("imagenet_v2_threshold", " (threshold 0.7)", "threshold-0.7, a-44", "threshold0.7"),
            ("imagenet_v2_top", " (top images)", "top-images, c-12", "top-images"),
        )
    )
    renditions = of_wnids(
        lists["imagenet_r"],
        name="imagenet_r",
        title="ImageNet-R",
        source="Hendrycks et al. 2021, The many faces of robustness",
        layout="imagenet_r",
        folder="imagenet-r",
        num_images=30000,
    )
    objectnet = ShiftSet(
        name="objectnet",
        title="ObjectNet",
        source="Barbu et al. 2019, ObjectNet; the 113 of its 313 classes that ImageNet has",
        layout="objectnet",
        folder="objectnet-1.0/images",
        labels="the position of the folder among the 113 in sorted order",
        classes=tuple(sorted(lists["objectnet"])),
        accepts=tuple(tuple(lists["objectnet"][folder]) for folder in sorted(lists["objectnet"])),
        num_logits=1000,
        num_images=18574,
        border=2,
    )
    sketch = of_wnids(
        name="imagenet_sketch",
        title="ImageNet-Sketch",
        source="Wang et al. 2019, Learning robust global representations by penalizing local predictive power",
        layout="imagenet_sketch",
        folder="sketch",
        num_images=50889,
    )
    adversarial = of_wnids(
        lists["imagenet_a"],
        name="imagenet_a",
        title="ImageNet-A",
        source="Hendrycks et al. 2021, Natural adversarial examples",
        layout="imagenet_a",
        folder="imagenet-a",
        num_images=7500,
    )
    for known in (imagenet, renditions, objectnet, adversarial):
        if known.sha256 != SHA256[known.name]:
            raise DataError(f"the class map of {known.title} is not the published one; restore {CLASS_LISTS}")
    return _suite("imagenet", imagenet, (v2, renditions, objectnet, sketch, adversarial), (v2_threshold, v2_top))


def _demo() -> Suite:
    val, *shifts = (
        ShiftSet(
            name=name,
            title=f"demo {name}",
            source="data/demo.py",
            layout="objectnet" if name == "objectnet" else "folders",
            folder=name,
            labels="int(folder)" if name == "v2" else "the position of the folder in the set's class list",
            classes=CLASSES if len(split.accepts) == len(CLASSES) else split.folders,
            accepts=split.accepts,
            num_logits=len(CLASSES),
            border=split.border,
        )
        for name, split in DEMO_SPLITS.items()
        if name != "train"
    )
    return _suite("demo", val, tuple(shifts), ())


def _suite(name: str, base: ShiftSet, shifts: tuple[ShiftSet, ...], others: tuple[ShiftSet, ...]) -> Suite:
    """Put sets together and add the controls, `base` having all classes in equal numbers."""
    sets = {one.name: one for one in (base, *shifts, *others)}
    for shifted in shifts:
        columns = _columns_of(shifted)
        if len(columns) < base.num_logits:
            control = replace(
                base,
                name=f"{base.name}_on_{shifted.name.removeprefix('imagenet_')}_classes",
                title=f"{base.title} on the classes of {shifted.title}",
                labels="the position of the class among those kept",
                classes=tuple(base.classes[column] for column in columns),
                accepts=_each(columns),
                num_images=base.num_images and base.num_images // base.num_classes * len(columns),
                part_of=base.name,
            )
            sets[control.name] = control
    return Suite(name, base.classes, base.name, tuple(one.name for one in shifts), sets)


def _columns_of(shift_set: ShiftSet) -> list[int]:
    """All logits that some label accepts, ascending."""
    return sorted(column for accepted in shift_set.accepts for column in accepted)


SUITES = {suite.name: suite for suite in (_imagenet(), _demo())}
SETS = SUITES["imagenet"].sets


# ---------------------------------------------------------------------------------------------------------------------
# Logits and labels
# ---------------------------------------------------------------------------------------------------------------------


def project(logits: Tensor, shift_set: ShiftSet) -> Tensor:
    """Reduce logits [N, num_logits] to the set's classes, [N, C], in their own type: what the official number needs.

    Raises ValueError for logits of another width.
    """
    import torch

    if logits.ndim != 2 or logits.shape[1] != shift_set.num_logits:
        raise ValueError(f"{shift_set.title} takes logits [N, {shift_set.num_logits}], got {list(logits.shape)}")
    if shift_set.has_all_classes:
        return logits
    # Rows of columns, [C, K]: the shorter ones repeat their first column, which leaves the maximum as it is.
    longest = max(map(len, shift_set.accepts))
    columns = [accepted + accepted[:1] * (longest - len(accepted)) for accepted in shift_set.accepts]
    return logits[:, torch.tensor(columns, device=logits.device)].amax(dim=2)


def labels_of(classes: Tensor, shift_set: ShiftSet) -> Tensor:
    """Translate numbers of logits, int64 of any shape in [0, num_logits), to the set's labels; -1 where it has none.

    Of argmax over all logits: what to compare with the labels for the plain number. Of the labels of `part_of`: which
    of its samples are in the control, and under which label.
    """
    return _label_of_logit(shift_set, classes.device)[classes]


@functools.cache
def _label_of_logit(shift_set: ShiftSet, device: torch.device) -> Tensor:
    """The label of each logit, int64 [num_logits]; kept, because it takes longer to make than a batch to look up."""
    import torch

    label_of = torch.full((shift_set.num_logits,), -1)
    for label, accepted in enumerate(shift_set.accepts):
        label_of[list(accepted)] = label
    return label_of.to(device)


# ---------------------------------------------------------------------------------------------------------------------
# Checks
# ---------------------------------------------------------------------------------------------------------------------


def check_set(shards: ShardSet, shift_set: ShiftSet) -> None:
    """Compare what the shards say about themselves with the table: class names in label order, number of samples.

    A set with all classes may name them by number, as ImageNetV2's folders do. Of shards without class names only the
    numbers can be compared; `check_labels` then finds labels that are ImageNet's. For a control, check `part_of`.
    Raises DataError naming the first difference.
    """
    if shift_set.part_of:
        raise ValueError(f"{shift_set.name} has no shards of its own: check {shift_set.part_of}")
    where = f"{os.path.dirname(shards.shards[0].url) or '.'} is not {shift_set.title}"
    again = f"pack it again with --layout {shift_set.layout}"
    count = len(shards.classes) if shards.classes else shards.num_classes
    if count not in (None, shift_set.num_classes):
        raise DataError(f"{where}: {count} classes, expected {shift_set.num_classes}; {again}")
    if shards.classes:
        numbers = tuple(map(str, range(shift_set.num_classes)))
        numbered = shift_set.has_all_classes and set(shards.classes) == set(numbers)
        expected = numbers if numbered else shift_set.classes
        differing = (label for label, name in enumerate(shards.classes) if name != expected[label])
        label = next(differing, None)
        if label is not None:
            kind = "the same classes in another order" if set(shards.classes) == set(expected) else "other classes"
            raise DataError(
                f"{where}: {kind}: label {label} is {shards.classes[label]!r}, expected {expected[label]!r} "
                f"(labels are {shift_set.labels}); {again}"
            )
    if shift_set.num_images is not None and shards.num_samples != shift_set.num_images:
        raise DataError(
            f"{where}: {shards.num_samples:,} images, the published set has {shift_set.num_images:,}; "
            f"compare the download with the publishers' and {again}"
        )


def check_labels(labels: Tensor, shift_set: ShiftSet) -> None:
    """Raise DataError if a label, int64 [N], is outside [0, C): shards packed with ImageNet's numbers, say."""
    wrong = labels[(labels < 0) | (labels >= shift_set.num_classes)]
    if len(wrong):
        raise DataError(
            f"{shift_set.title} has labels 0 to {shift_set.num_classes - 1}, its shards hold {int(wrong[0])}: labels "
            f"must be {shift_set.labels}; pack it again with --layout {shift_set.layout}"
        )
