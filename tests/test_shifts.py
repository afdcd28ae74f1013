"""The five shift sets and their controls: class lists, both numbers from the same logits, and what wrong shards say."""

from __future__ import annotations

import hashlib
import io
import json
import random
import subprocess
import sys
import tarfile
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data import DataError, demo, shifts
from data.pack import pack
from data.shifts import SETS, SUITES, ShiftSet, check_labels, check_set, labels_of, project
from data.sources import LAYOUTS, read_classes
from data.tar import Shard, ShardReader, ShardSet, find_shards
from data.transforms import EvalTransform

ROOT = Path(__file__).resolve().parents[1]
IMAGENET, DEMO = SUITES["imagenet"], SUITES["demo"]
# fmt: off
TABLE = [  # name, images, classes, projection, border, control; the counts that the sets' publishers state
    ("imagenet",                      50000, 1000, "none",    0, "imagenet"),
    ("imagenet_v2",                   10000, 1000, "none",    0, "imagenet"),
    ("imagenet_r",                    30000,  200, "subset",  0, "imagenet_on_r_classes"),
    ("objectnet",                     18574,  113, "maximum", 2, "imagenet_on_objectnet_classes"),
    ("imagenet_sketch",               50889, 1000, "none",    0, "imagenet"),
    ("imagenet_a",                     7500,  200, "subset",  0, "imagenet_on_a_classes"),
    ("imagenet_v2_threshold",         10000, 1000, "none",    0, "imagenet"),
    ("imagenet_v2_top",               10000, 1000, "none",    0, "imagenet"),
    ("imagenet_on_r_classes",         10000,  200, "subset",  0, "imagenet_on_r_classes"),
    ("imagenet_on_objectnet_classes",  6250,  125, "subset",  0, "imagenet_on_objectnet_classes"),
    ("imagenet_on_a_classes",         10000,  200, "subset",  0, "imagenet_on_a_classes"),
]
# fmt: on


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "images", "classes", "projection", "border", "control"), TABLE)
def test_table(name: str, images: int, classes: int, projection: str, border: int, control: str) -> None:
    one = SETS[name]
    found = (one.name, one.num_images, one.num_classes, one.projection, one.border, IMAGENET.control_of(name).name)
    assert found == (name, images, classes, projection, border, control)
    assert one.part_of == ("imagenet" if "_on_" in name else "")
    layout = LAYOUTS[one.layout]
    assert layout.num_classes in (None, classes if not one.part_of else 1000)
    assert not layout.num_images or images in layout.num_images or one.part_of


def test_order_of_the_suite() -> None:
    assert list(SETS) == [row[0] for row in TABLE]
    assert IMAGENET.shifts == ("imagenet_v2", "imagenet_r", "objectnet", "imagenet_sketch", "imagenet_a")
    assert (IMAGENET.in_distribution, IMAGENET.classes) == ("imagenet", read_classes("imagenet"))


def test_class_lists_of_the_original_evaluation(shared_data: Path) -> None:
    facts = json.loads((shared_data.parent / "goldens" / "shift_classes.json").read_text())
    assert list(IMAGENET.classes) == facts["wnids"]
    for name in ("imagenet_r", "imagenet_a"):
        assert SETS[name].accepts == tuple((column,) for column in facts[name])
        assert SETS[name].classes == tuple(facts["wnids"][column] for column in facts[name])
    objectnet = SETS["objectnet"]
    assert list(objectnet.classes) == facts["objectnet_class_order"]
    assert dict(zip(objectnet.classes, map(list, objectnet.accepts), strict=True)) == facts["objectnet"]
    assert objectnet.border == facts["objectnet_border_crop_px"]
    assert (objectnet.folder, SETS["imagenet_sketch"].folder) == (facts["objectnet_folder"], "sketch")
    assert SETS["imagenet_on_r_classes"].num_images == len(facts["imagenet_r"]) * facts["images_per_class_val"]


@pytest.mark.parametrize("name", ["imagenet_r", "imagenet_a"])
def test_class_lists_of_timm(name: str) -> None:
    text = resources.files("timm.data").joinpath(f"_info/{name}_indices.txt").read_text()
    assert SETS[name].accepts == tuple((int(column),) for column in text.split())


def test_hashes_of_the_class_maps() -> None:
    """Computed here from the file as the property's docstring says, and stated once more as literals."""
    lists = json.loads((ROOT / "data" / "imagenet_classes.json").read_text())
    wnids, objectnet = lists["wnids"], lists["objectnet"]
    pairs = {name: [[wnids[column], [column]] for column in lists[name]] for name in ("imagenet_r", "imagenet_a")}
    pairs["imagenet"] = [[wnid, [column]] for column, wnid in enumerate(wnids)]
    pairs["objectnet"] = [[folder, sorted(objectnet[folder])] for folder in sorted(objectnet)]
    for name, content in pairs.items():
        text = json.dumps(content, separators=(",", ":"))
        assert SETS[name].sha256 == hashlib.sha256(text.encode()).hexdigest() == shifts.SHA256[name]
    assert {name: digest[:16] for name, digest in shifts.SHA256.items()} == {
        "imagenet": "cfe60c12fa86fb3e",
        "imagenet_r": "21d3ef8a648422f4",
        "objectnet": "b98d582cb6a94584",
        "imagenet_a": "0823805e0704a06e",
    }
    assert SETS["imagenet_sketch"].sha256 == SETS["imagenet_v2_top"].sha256 == SETS["imagenet"].sha256


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lists: lists["imagenet_r"].pop(), "ImageNet-R is not the published one"),
        (lambda lists: lists["imagenet_a"].append(6), "ImageNet-A has 200 distinct class names for 201 labels"),
        (
            lambda lists: lists["objectnet"]["wok"].append(1000),
            "ObjectNet has logits 409 to 1000|logits .* to 1000 where",
        ),
        (lambda lists: lists["objectnet"]["wok"].append(414), "ObjectNet has a logit that belongs to two classes"),
        (lambda lists: lists["objectnet"]["wok"].clear(), "ObjectNet has a class without logits"),
        (lambda lists: lists["objectnet"].pop("wok"), "ObjectNet is not the published one"),
        (lambda lists: lists["wnids"].reverse(), "ImageNet is not the published one"),
        (lambda lists: lists["imagenet_a"].reverse(), "ImageNet-A is not the published one"),
    ],
)
def test_damaged_class_lists(change: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lists = json.loads(shifts.CLASS_LISTS.read_text())
    change(lists)
    monkeypatch.setattr(shifts, "CLASS_LISTS", tmp_path / "lists.json")
    shifts.CLASS_LISTS.write_text(json.dumps(lists))
    with pytest.raises(DataError, match=message):
        shifts._imagenet()


def test_the_table_does_not_wait_for_torch() -> None:
    code = "import sys, data.shifts; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


# ---------------------------------------------------------------------------------------------------------------------
# Logits and labels
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["imagenet", "imagenet_r", "imagenet_a", "objectnet"])
def test_golden(name: str, dtype: torch.dtype, goldens: Path) -> None:
    """Official and plain number of the original evaluation, exactly: its arithmetic only selects and compares."""
    golden = np.load(goldens / "shift_metrics.npz")
    logits = torch.from_numpy(golden[f"{name}/logits"]).to(dtype)
    labels = torch.from_numpy(golden[f"{name}/labels"])
    projected = project(logits, SETS[name])
    predictions = projected.argmax(dim=1)
    assert predictions.tolist() == golden[f"{name}/pred"].tolist()
    assert (predictions == labels).double().mean() == golden[f"{name}/top1"]
    plain = (labels_of(logits.argmax(dim=1), SETS[name]) == labels).double().mean().item()
    if name == "imagenet":
        assert plain == golden["imagenet/top1"]
    else:
        np.testing.assert_array_equal(projected.double().numpy(), golden[f"{name}/projected"].astype(np.float64))
        assert plain == golden[f"{name}/top1_without_projection"]
        assert plain < golden[f"{name}/top1"], "the golden tells the two numbers apart"


def test_objectnet_by_hand() -> None:
    """Bicycle is ImageNet's 444 and 671, banana 954; tench (0) is no class of ObjectNet."""
    objectnet = SETS["objectnet"]
    bicycle, banana = objectnet.classes.index("bicycle"), objectnet.classes.index("banana")
    logits = torch.full((2, 1000), -9.0)
    logits[0, [444, 671, 954, 0]] = torch.tensor([2.0, 1.0, 1.5, 7.0])  # a sum or a mean over 444 and 671 changes it
    logits[1, [444, 671, 954]] = torch.tensor([1.0, 1.0, 1.5])
    projected = project(logits, objectnet)
    assert projected.argmax(dim=1).tolist() == [bicycle, banana]
    assert projected[:, bicycle].tolist() == [2.0, 1.0]
    assert labels_of(logits.argmax(dim=1), objectnet).tolist() == [-1, banana]


def test_objectnet_maximum_is_the_rule_of_the_published_table() -> None:
    """imagenet-testbed takes argmax over the 125 ImageNet classes and asks whether it is one of the label's."""
    objectnet, control = SETS["objectnet"], SETS["imagenet_on_objectnet_classes"]
    logits = torch.randn(500, 1000, generator=torch.Generator().manual_seed(0))
    columns = torch.tensor(control.accepts).flatten()
    theirs = columns[logits[:, columns].argmax(dim=1)]
    ours = project(logits, objectnet).argmax(dim=1)
    assert all(int(column) in objectnet.accepts[label] for column, label in zip(theirs, ours.tolist(), strict=True))


@given(st.data())
def test_any_class_map(data: st.DataObject) -> None:
    """Against loops over the definition."""
    num_logits = data.draw(st.integers(1, 12))
    columns = data.draw(st.permutations(range(num_logits)))
    cuts = sorted(data.draw(st.sets(st.integers(1, num_logits), min_size=1)))
    accepts = tuple(tuple(columns[start:stop]) for start, stop in zip([0, *cuts], cuts, strict=False))
    names = tuple(f"c{label}" for label in range(len(accepts)))
    one = ShiftSet("x", "X", "", "folders", "", "", names, accepts, num_logits)
    logits = torch.randn(5, num_logits, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    expected = [[max(row[column] for column in accepted) for accepted in accepts] for row in logits.tolist()]
    assert project(logits, one).tolist() == expected
    for column in range(num_logits):
        label = next((label for label, accepted in enumerate(accepts) if column in accepted), -1)
        assert labels_of(torch.tensor([[column]]), one).tolist() == [[label]]


def test_gradients_pass_and_inference_mode_leaves_nothing_behind() -> None:
    with torch.inference_mode():
        project(torch.zeros(1, 1000), SETS["imagenet_r"])
    logits = torch.zeros(1, 1000, requires_grad=True)
    project(logits, SETS["imagenet_r"]).sum().backward()
    assert logits.grad is not None
    assert logits.grad.sum() == 200


@pytest.mark.parametrize("shape", [(3, 200), (1000,), (3, 1001)])
def test_logits_of_another_width(shape: tuple[int, ...]) -> None:
    for name in ("imagenet", "imagenet_r"):
        with pytest.raises(ValueError, match=r"takes logits \[N, 1000\]"):
            project(torch.zeros(shape), SETS[name])


@pytest.mark.parametrize("name", ["imagenet_on_r_classes", "imagenet_on_objectnet_classes", "imagenet_on_a_classes"])
def test_controls_take_fifty_images_of_each_class(name: str) -> None:
    control = SETS[name]
    labels = labels_of(torch.arange(1000).repeat_interleave(50), control)
    kept = labels[labels >= 0]
    assert len(kept) == control.num_images
    assert torch.bincount(kept).tolist() == [50] * control.num_classes
    wnids = [IMAGENET.classes[column] for column in range(1000) if labels[50 * column] >= 0]
    assert wnids == list(control.classes) == sorted(wnids)


def test_controls_are_scored_over_their_classes() -> None:
    control = SETS["imagenet_on_a_classes"]
    logits = torch.zeros(1, 1000)
    logits[0, [0, 11]] = torch.tensor([9.0, 5.0])  # 0 is outside the 200 classes; 11 is the second of them
    label = labels_of(torch.tensor([11]), control)
    assert label.tolist() == [1]
    assert project(logits, control).argmax(dim=1).tolist() == [1]
    assert labels_of(logits.argmax(dim=1), control).tolist() == [-1]


# ---------------------------------------------------------------------------------------------------------------------
# The demo
# ---------------------------------------------------------------------------------------------------------------------


def test_demo_suite_follows_its_splits() -> None:
    assert list(DEMO.sets) == ["val", "v2", "r", "objectnet", "sketch", "a", "val_on_r_classes", "val_on_a_classes"]
    assert (DEMO.classes, DEMO.in_distribution) == (demo.CLASSES, "val")
    assert DEMO.shifts == ("v2", "r", "objectnet", "sketch", "a")
    assert [DEMO.sets[name].projection for name in DEMO.shifts] == ["none", "subset", "maximum", "none", "subset"]
    controls = [DEMO.control_of(name).name for name in DEMO.shifts]
    assert controls == ["val", "val_on_r_classes", "val", "val", "val_on_a_classes"]
    for name in ("val", *DEMO.shifts):
        split, one = demo.DEMO_SPLITS[name], DEMO.sets[name]
        assert one.border == split.border
        for column in split.classes:
            assert split.folders[int(labels_of(torch.tensor(column), one))] == split.folder_of(column)
        check_set(shard_set(split.folders, 100), one)  # test_demo.py finds these names in the shards


def test_demo_controls() -> None:
    control = DEMO.control_of("r")
    assert labels_of(torch.arange(10), control).tolist() == [0, -1, 1, 2, -1, 3, -1, 4, 5, -1]
    assert control.classes == ("zero", "two", "three", "five", "seven", "eight")
    assert control.num_images is None


# ---------------------------------------------------------------------------------------------------------------------
# Shards that are not the set
# ---------------------------------------------------------------------------------------------------------------------


def shard_set(classes: tuple[str, ...] | None, samples: int | None, num_classes: int | None = None) -> ShardSet:
    """What the index of one shard says."""
    samples = samples or 0
    shards = (Shard("shards/here/000000.tar", samples, 0),)
    return ShardSet(shards, samples, len(classes) if classes else num_classes, classes, "")


@pytest.mark.parametrize("name", [row[0] for row in TABLE if "_on_" not in row[0]])
def test_right_shards_pass(name: str) -> None:
    one = SETS[name]
    check_set(shard_set(one.classes, one.num_images), one)
    check_set(shard_set(None, one.num_images, one.num_classes), one)
    check_set(shard_set(None, one.num_images), one)


@pytest.mark.parametrize("name", ["imagenet_v2", "imagenet", "imagenet_sketch"])
def test_folders_named_by_number_are_labels(name: str) -> None:
    check_set(shard_set(tuple(map(str, range(1000))), SETS[name].num_images), SETS[name])


SWAPPED = (*SETS["imagenet_r"].classes[:7], *SETS["imagenet_r"].classes[7:9][::-1], *SETS["imagenet_r"].classes[9:])


@pytest.mark.parametrize(
    ("name", "shards", "message"),
    [
        (
            "imagenet_v2",
            shard_set(tuple(sorted(map(str, range(1000)))), 10000),
            r"shards/here is not ImageNetV2: the same classes in another order: label 2 is '10', expected '2' "
            r"\(labels are int\(folder\)\); pack it again with --layout imagenet_v2",
        ),
        ("imagenet_r", shard_set(SWAPPED, 30000), f"the same classes in another order: label 7 is '{SWAPPED[7]}'"),
        ("imagenet_r", shard_set(SETS["imagenet_a"].classes, 7500), "other classes: label 0 is 'n01498041'"),
        ("imagenet_r", shard_set(IMAGENET.classes, 30000), "1000 classes, expected 200"),
        ("imagenet_r", shard_set(None, 30000, 1000), "1000 classes, expected 200"),
        ("imagenet_r", shard_set(tuple(map(str, range(200))), 30000), "other classes: label 0 is '0'"),
        ("imagenet", shard_set(IMAGENET.classes[::-1], 50000), "the same classes in another order: label 0"),
        ("imagenet", shard_set(IMAGENET.classes, 1281167), "1,281,167 images, the published set has 50,000"),
        ("imagenet_sketch", shard_set(IMAGENET.classes, 50000), "50,000 images, the published set has 50,889"),
        ("objectnet", shard_set(SETS["objectnet"].classes, 18514), "18,514 images, the published set has 18,574"),
        ("objectnet", shard_set(tuple(f"c{number}" for number in range(313)), 50000), "313 classes, expected 113"),
        ("objectnet", shard_set(None, 50000), "50,000 images, the published set has 18,574"),
        ("imagenet_a", shard_set(None, 7499), "7,499 images, the published set has 7,500"),
        ("imagenet_a", shard_set(None, None), "0 images, the published set has 7,500"),
    ],
)
def test_wrong_shards(name: str, shards: ShardSet, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_set(shards, SETS[name])


def test_a_control_has_no_shards() -> None:
    with pytest.raises(ValueError, match="check imagenet"):
        check_set(shard_set(None, 10000), SETS["imagenet_on_r_classes"])


def test_labels_that_are_imagenets_own() -> None:
    """Of shards without class names, these are the only sign."""
    check_labels(torch.tensor([0, 199]), SETS["imagenet_r"])
    check_labels(torch.tensor([], dtype=torch.int64), SETS["imagenet_r"])
    for wrong in (200, -1):
        with pytest.raises(DataError, match=f"ImageNet-R has labels 0 to 199, its shards hold {wrong}: labels must be"):
            check_labels(torch.tensor([5, wrong]), SETS["imagenet_r"])


def make_tar(path: Path, names: list[str], content: bytes) -> str:
    with tarfile.open(path, "w") as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return str(path)


def test_imagenet_v2_through_the_packer(tmp_path: Path) -> None:
    """Folders 0 to 999 in any order: the label is the number, and the result is recognised."""
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2)).save(buffer, "PNG")
    names = [f"{SETS['imagenet_v2'].folder}/{number}/{number}.png" for number in range(1000)]
    random.Random(0).shuffle(names)
    source = make_tar(tmp_path / "v2.tar", names, buffer.getvalue())
    pack(source, str(tmp_path / "out"), layout="imagenet_v2")
    shards = find_shards(str(tmp_path / "out"))
    one = replace(SETS["imagenet_v2"], num_images=1000)
    check_set(shards, one)
    with pytest.raises(DataError, match="1,000 images, the published set has 10,000"):
        check_set(shards, SETS["imagenet_v2"])
    records = list(ShardReader(shards.shards[0].url).read())
    assert len(records) == 1000
    for record in records:
        assert int(record.label or b"-1") == int(record.key)


def test_objectnet_border_is_cut_before_the_resize() -> None:
    """A 2 pixel red frame of a 104x84 image is gone, and no row or column beside it."""
    image = np.zeros((104, 84, 3), dtype=np.uint8)
    image[..., 0] = 255
    image[2:-2, 2:-2] = (0, 99, 0)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    transform = EvalTransform(80, border=SETS["objectnet"].border)
    pixels = transform(buffer.getvalue(), random.Random(0))
    assert pixels.amax(dim=(1, 2)).tolist() == [0, 99, 0]
    assert EvalTransform(80)(buffer.getvalue(), random.Random(0))[0].max() > 0
