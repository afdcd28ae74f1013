"""Labels, class names and keys of every layout that can be packed, and clear errors for what cannot."""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data import DataError
from data.shifts import SETS
from data.sources import LAYOUTS, Source, load_source, read_classes

GREY = io.BytesIO()
Image.new("L", (3, 3), 128).save(GREY, "JPEG")


def make(folder: Path, names: Iterable[str], content: bytes = GREY.getvalue()) -> str:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return str(folder)


def make_tar(path: Path, members: dict[str, bytes]) -> str:
    with tarfile.open(path, "w:xz" if path.suffix == ".xz" else "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return str(path)


def load(source: str, tmp_path: Path, **options: Any) -> Source:
    return load_source(source, scratch=tmp_path / "scratch", **options)


def labels(found: Source) -> dict[str, int]:
    return dict(zip(found.names, found.labels, strict=True))


WNIDS = read_classes("imagenet")


# ---------------------------------------------------------------------------------------------------------------------
# Image files
# ---------------------------------------------------------------------------------------------------------------------


def test_class_folders_are_numbered_in_sorted_order(tmp_path: Path) -> None:
    source = make(tmp_path / "in", ["dog/1.jpg", "cat/1.JPEG", "cat/2.png", "eel/1.webp"])
    found = load(source, tmp_path)
    assert found.classes == ("cat", "dog", "eel")
    assert labels(found) == {"cat/1.JPEG": 0, "cat/2.png": 0, "dog/1.jpg": 1, "eel/1.webp": 2}
    assert list(found.keys) == ["cat-1", "cat-2", "dog-1", "eel-1"]
    assert found.read(0) == (GREY.getvalue(), "jpeg")
    assert not found.dropped
    assert not found.notes


def test_integer_folders_are_their_label(tmp_path: Path) -> None:
    """ImageNetV2's folders are not zero-padded: as strings, "10" would come before "2"."""
    source = make(tmp_path / "in", [f"{label}/x{label}.jpeg" for label in range(12)])
    found = load(source, tmp_path)
    assert labels(found) == {f"{label}/x{label}.jpeg": label for label in range(12)}
    assert found.classes == tuple(str(label) for label in range(12))
    padded = load(make(tmp_path / "padded", [f"{label:03d}/x.jpg" for label in range(12)]), tmp_path)
    assert [found.labels for found in (padded,)] == [list(range(12))]


def test_integer_folders_with_class_names(tmp_path: Path) -> None:
    source = make(tmp_path / "in", ["0/a.jpg", "2/b.jpg"])
    names = tmp_path / "names.txt"
    names.write_text("zero\none\ntwo\n")
    found = load(source, tmp_path, classes=str(names))
    assert found.classes == ("zero", "one", "two")
    assert list(found.labels) == [0, 2]
    assert found.notes == ["1 of 3 classes have no images"]
    names.write_text("zero\none\n")
    with pytest.raises(DataError, match="class folder 2 has no place in a list of 2"):
        load(source, tmp_path, classes=str(names))


def test_folders_numbered_from_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="numbered 1 to 3, labels start at 0"):
        load(make(tmp_path / "in", ["1/a.jpg", "2/a.jpg", "3/a.jpg"]), tmp_path)
    with pytest.raises(DataError, match="same number"):
        load(make(tmp_path / "twice", ["0/a.jpg", "00/a.jpg"]), tmp_path)


def test_a_top_folder_is_passed_over_and_a_split_is_chosen(tmp_path: Path) -> None:
    names = ["set/train/a/1.jpg", "set/train/b/2.jpg", "set/test/a/3.jpg", "set/test/b/4.jpg"]
    source = make(tmp_path / "in", names)
    found = load(source, tmp_path, split="test")
    assert labels(found) == {"set/test/a/3.jpg": 0, "set/test/b/4.jpg": 1}
    assert list(found.keys) == ["a-3", "b-4"]
    with pytest.raises(DataError, match="class folders under set/test, set/train: name one of them"):
        load(source, tmp_path)
    with pytest.raises(DataError, match="no images under a folder 'val'"):
        load(source, tmp_path, split="val")


def test_flat_names_carry_their_wnid(tmp_path: Path) -> None:
    source = make(tmp_path / "in", [f"all/{WNIDS[index]}_name.JPEG" for index in (5, 999, 0)])
    found = load(source, tmp_path)
    assert list(found.labels) == [0, 1, 2]
    assert found.classes == (WNIDS[0], WNIDS[5], WNIDS[999])
    assert found.keys[0] == f"{WNIDS[0]}_name"
    full = load(source, tmp_path, classes="imagenet")
    assert sorted(full.labels) == [0, 5, 999]
    assert full.notes == ["997 of 1000 classes have no images"]


def test_one_wnid_folder_is_a_class(tmp_path: Path) -> None:
    found = load(make(tmp_path / "in", [f"{WNIDS[3]}/{WNIDS[3]}_1.JPEG"]), tmp_path, classes="imagenet")
    assert list(found.labels) == [3]
    assert list(found.keys) == [f"{WNIDS[3]}_1"]


def test_files_that_are_no_images_are_counted(tmp_path: Path) -> None:
    source = make(tmp_path / "in", ["a/1.jpg", "a/._1.jpg", "b/1.jpg", "README.txt", "b/Thumbs.db"])
    assert load(source, tmp_path).dropped == {"hidden": 1, "not images (.txt)": 1, "not images (.db)": 1}
    hidden = load(make(tmp_path / "notebook", ["a/1.jpg", "b/1.jpg", ".ipynb_checkpoints/1.jpg"]), tmp_path)
    assert hidden.classes == ("a", "b")
    assert hidden.dropped == {"hidden": 1}


def test_images_outside_class_folders_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="outside class folders"):
        load(make(tmp_path / "in", ["a/1.jpg", "2.jpg"]), tmp_path)
    with pytest.raises(DataError, match="not called WNID_name"):
        load(make(tmp_path / "flat", ["2.jpg"]), tmp_path, layout="flat")
    with pytest.raises(DataError, match="holds no images"):
        load(make(tmp_path / "none", ["a.txt"]), tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        load(str(tmp_path / "absent"), tmp_path)
    with pytest.raises(DataError, match="layout 'x' is unknown"):
        load(str(tmp_path), tmp_path, layout="x")


def test_keys_are_unique_and_plain(tmp_path: Path) -> None:
    names = {
        "a/v1.x.jpg": "a-v1_x",
        "a/v1_x.jpg": "a-v1_x",
        "a/\u00fc \u00fc.jpg": "a",
        "a/\U0001f600.JPG": "a",
        "b/" + "long" * 50 + ".jpg": "b-" + ("long" * 50)[:78],
    }
    found = load(make_tar(tmp_path / "in.tar", dict.fromkeys(names, b"")), tmp_path)
    assert len(set(found.keys)) == len(found.keys)
    for name, key in zip(found.names, found.keys, strict=True):
        assert key.startswith(names[name])
        assert set(key) <= set("abcdefghijklmnopqrstuvwxyz0123456789_-")
        assert len(key) <= 93
    hostile = make_tar(tmp_path / "hostile.tar", {"../../etc/x.jpg": b"1", "../../abs/y.jpg": b"2"})
    assert list(load(hostile, tmp_path).keys) == ["abs-y", "etc-x"]


# ---------------------------------------------------------------------------------------------------------------------
# ImageNet and the five shifts
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "folders"),
    [
        ("imagenet", WNIDS),
        ("imagenet_sketch", WNIDS),
        ("imagenet_r", WNIDS[::5]),
        ("imagenet_a", WNIDS[3:203]),
        ("imagenet_v2", tuple(str(label) for label in range(1000))),
    ],
)
def test_official_layouts(tmp_path: Path, layout: str, folders: tuple[str, ...]) -> None:
    source = make_tar(tmp_path / "set.tar", {f"{layout}-official/{folder}/x.JPEG": b"x" for folder in folders})
    found = load(source, tmp_path, layout=layout)
    assert labels(found) == {f"{layout}-official/{folder}/x.JPEG": label for label, folder in enumerate(folders)}
    assert found.classes == tuple(folders)
    assert f"{len(folders):,} images where {layout} has" in found.notes[0]
    assert LAYOUTS[layout].num_classes == len(folders)


def test_official_layouts_with_a_class_missing_are_refused(tmp_path: Path) -> None:
    members = {f"imagenet-r/{wnid}/x.jpg": b"" for wnid in WNIDS[:199]}
    with pytest.raises(DataError, match="imagenet_r has 200 classes, found 199"):
        load(make_tar(tmp_path / "r.tar", members), tmp_path, layout="imagenet_r")


def test_flat_val_folder_with_its_solution_file(tmp_path: Path) -> None:
    names = [f"ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, 4)]
    source = make(tmp_path / "in", [*names, "ILSVRC/Data/CLS-LOC/test/ILSVRC2012_test_00000001.JPEG"])
    solution = tmp_path / "LOC_val_solution.csv"
    rows = "".join(f"ILSVRC2012_val_{n:08d},{WNIDS[900 - n]} 1 2 3 4 {WNIDS[0]} 1 2 3 4 \n" for n in range(1, 4))
    solution.write_text("ImageId,PredictionString\n" + rows)
    found = load(source, tmp_path, split="val", val_labels=str(solution), classes="imagenet")
    assert list(found.labels) == [899, 898, 897]
    assert found.classes == WNIDS
    solution.write_text("ImageId,PredictionString\n")
    with pytest.raises(DataError, match="no label for 3 of 3 images, the first 'ILSVRC2012_val_00000001'"):
        load(source, tmp_path, split="val", val_labels=str(solution))
    with pytest.raises(DataError, match="cannot read .*absent"):
        load(source, tmp_path, split="val", val_labels="absent")


def test_objectnet_keeps_the_listed_folders_and_counts_the_rest(tmp_path: Path) -> None:
    names = ["chair/1.png", "banana/1.png", "banana/2.png", "zip_tie/1.png", "zip_tie/2.png", "axe/1.png"]
    source = make(tmp_path / "objectnet-1.0", [f"images/{name}" for name in names])
    mapping = tmp_path / "map.json"
    mapping.write_text(json.dumps({"chair": [423, 559], "banana": [954], "drill": [740]}))
    found = load(source, tmp_path, layout="objectnet", classes=str(mapping))
    assert found.classes == ("banana", "chair", "drill")
    assert labels(found) == {"images/banana/1.png": 0, "images/banana/2.png": 0, "images/chair/1.png": 1}
    assert found.dropped == {"in 2 folders that the class list does not name": 3}
    assert found.notes == ["1 of 3 classes have no images"]
    mapping.write_text(json.dumps(["chair", "banana"]))
    assert list(load(source, tmp_path, layout="objectnet", classes=str(mapping)).labels) == [1, 1, 0]
    with pytest.raises(DataError, match="2 classes are not in the class list: axe, zip_tie"):
        load(source, tmp_path, classes=str(mapping))
    found = load(source, tmp_path, layout="objectnet")
    assert found.classes == SETS["objectnet"].classes
    assert found.dropped == {"in 2 folders that the class list does not name": 3}


def test_objectnet_map_of_the_evaluation_protocol(tmp_path: Path, shared_data: Path) -> None:
    facts = json.loads((shared_data.parent / "goldens" / "shift_classes.json").read_text())
    mapping = tmp_path / "map.json"
    mapping.write_text(json.dumps(facts["objectnet"]))
    members = {f"objectnet-1.0/images/{folder}/x.png": b"" for folder in facts["objectnet_all_folders"]}
    found = load(make_tar(tmp_path / "o.tar", members), tmp_path, layout="objectnet", classes=str(mapping))
    assert list(found.classes) == facts["objectnet_class_order"]
    assert list(found.labels) == list(range(113))
    assert list(found.dropped.values()) == [200]
    assert facts["wnids"] == list(WNIDS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("a\nb\na\n", "names 'a' twice"),
        ("[1, 2]", "must hold names, not int"),
        ('["a"', "cannot read"),
        ("[]", "is empty"),
    ],
)
def test_bad_class_lists(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "classes").write_text(content)
    with pytest.raises(DataError, match=message):
        read_classes(str(tmp_path / "classes"))
    with pytest.raises(DataError, match="cannot read"):
        read_classes(str(tmp_path / "absent"))


# ---------------------------------------------------------------------------------------------------------------------
# Archives
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".tar", ".tar.xz"])
def test_archives_read_like_folders(tmp_path: Path, suffix: str) -> None:
    members = {f"train/{folder}/{number}.jpg": f"{folder}{number}".encode() for folder in "ba" for number in range(3)}
    source = make_tar(tmp_path / f"in{suffix}", members)
    found = load(source, tmp_path, split="train")
    assert found.classes == ("a", "b")
    assert {name: found.read(index)[0] for index, name in enumerate(found.names)} == members


@pytest.mark.parametrize("length", [0, 5, 512, 5000, 2 * 2560, 2 * 2560 + 100, 20 * 2560])
def test_archives_cut_off_anywhere_are_refused(tmp_path: Path, length: int) -> None:
    """Each member takes 2560 bytes: a header and 2000 bytes in four blocks. Python's tarfile accepts the last three."""
    whole = Path(make_tar(tmp_path / "in.tar", {f"a/{number}.jpg": bytes(2000) for number in range(20)})).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:length])
    with pytest.raises(DataError, match="cut.tar is no readable tar archive"):
        load(str(tmp_path / "cut.tar"), tmp_path)


def test_damaged_archives(tmp_path: Path) -> None:
    members = {f"a/{number}.jpg": bytes(2000) for number in range(20)}
    packed = Path(make_tar(tmp_path / "in.tar.xz", members)).read_bytes()
    (tmp_path / "cut.tar.xz").write_bytes(packed[: len(packed) // 2])
    (tmp_path / "html.tar").write_bytes(b"<html>" * 1000)
    (tmp_path / "html.tar.gz").write_bytes(b"<html>" * 1000)
    for name in ("cut.tar.xz", "html.tar", "html.tar.gz"):
        with pytest.raises(DataError, match=f"{name} is no readable tar archive"):
            load(str(tmp_path / name), tmp_path)


def test_archives_with_links_or_repeated_names_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "link.tar", "w") as archive:
        link = tarfile.TarInfo("a/1.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    with pytest.raises(DataError, match="a/1.jpg is a link"):
        load(str(tmp_path / "link.tar"), tmp_path)
    with tarfile.open(tmp_path / "twice.tar", "w") as archive:
        for _ in range(2):
            archive.addfile(tarfile.TarInfo("a/1.jpg"))
    with pytest.raises(DataError, match="holds a/1.jpg twice"):
        load(str(tmp_path / "twice.tar"), tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# MNIST and CIFAR
# ---------------------------------------------------------------------------------------------------------------------


def idx(array: np.ndarray) -> bytes:
    return (
        bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(np.uint8).tobytes()
    )


def read_png(found: Source, index: int) -> np.ndarray:
    data, extension = found.read(index)
    assert extension == "png"
    return np.asarray(Image.open(io.BytesIO(data)))


def test_mnist(tmp_path: Path) -> None:
    images, numbers = np.arange(20 * 28 * 28).reshape(20, 28, 28) % 251, np.arange(20) % 10
    folder = tmp_path / "mnist"
    make(folder, ["train-images-idx3-ubyte.gz"], gzip.compress(idx(images)))
    make(folder, ["train-labels-idx1-ubyte.gz"], gzip.compress(idx(numbers)))
    found = load(str(folder), tmp_path)
    assert list(found.labels) == numbers.tolist()
    assert found.classes == tuple("0123456789")
    assert found.keys[7] == "train-00007"
    np.testing.assert_array_equal(read_png(found, 7), images[7])

    make(folder, ["t10k-images.idx3-ubyte"], idx(images[:3]))
    make(folder, ["t10k-labels.idx1-ubyte"], idx(numbers[:4]))
    with pytest.raises(DataError, match="holds test and train: choose one with --split"):
        load(str(folder), tmp_path)
    with pytest.raises(DataError, match="holds test and train, but no val images"):
        load(str(folder), tmp_path, split="val")
    with pytest.raises(DataError, match="3 test images but 4 labels"):
        load(str(folder), tmp_path, split="test")
    assert "where mnist has" in load(str(folder), tmp_path, split="train", layout="mnist").notes[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no idx file"),
        (idx(np.zeros((2, 2))), "no idx file of 3"),
        (idx(np.zeros((5, 28, 28)))[:-1], "holds 3919 values, its header says"),
    ],
)
def test_damaged_idx_files(tmp_path: Path, content: bytes, message: str) -> None:
    folder = tmp_path / "mnist"
    make(folder, ["train-images-idx3-ubyte"], content)
    with pytest.raises(DataError, match=message):
        load(str(folder), tmp_path)
    make(folder, ["train-images-idx3-ubyte"], idx(np.zeros((5, 28, 28))))
    with pytest.raises(DataError, match="has no train labels"):
        load(str(folder), tmp_path)
    make(folder, ["train-labels-idx1-ubyte.gz"], gzip.compress(idx(np.zeros(5)))[:-6])
    with pytest.raises(DataError, match="train-labels-idx1-ubyte.gz is damaged"):
        load(str(folder), tmp_path)


@pytest.mark.parametrize("places", [("MNIST/raw/", "FashionMNIST/raw/"), ("emnist-digits-", "emnist-letters-")])
def test_two_sets_of_idx_files_in_one_folder_are_refused(places: tuple[str, str], tmp_path: Path) -> None:
    """None is the one that was meant; the same set packed and unpacked is one."""
    images, numbers = np.zeros((20, 28, 28)), np.arange(20) % 10
    for count, place in enumerate(places):
        assert count == 0 or len(load(str(tmp_path / "root"), tmp_path).names) == 20
        for part, content in (("images-idx3", images), ("labels-idx1", numbers)):
            make(tmp_path / "root", [f"{place}train-{part}-ubyte.gz"], gzip.compress(idx(content)))
            make(tmp_path / "root", [f"{place}train-{part}-ubyte"], idx(content))
    with pytest.raises(DataError, match="holds two data sets, .*train-.* and .*train-") as caught:
        load(str(tmp_path / "root"), tmp_path)
    assert all(place in str(caught.value) for place in places)


def damaged(content: bytes) -> bytes:
    """Packed, with bytes in the middle that make no sense to the unpacker itself."""
    packed = bytearray(gzip.compress(content))
    packed[200:300] = b"\xff" * 100
    with pytest.raises(zlib.error):
        gzip.decompress(packed)
    return bytes(packed)


def test_bytes_damaged_inside_a_packed_file_are_one_line(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 60, (20, 28, 28))
    folder = tmp_path / "mnist"
    make(folder, ["train-images-idx3-ubyte.gz"], damaged(idx(pixels)))
    make(folder, ["train-labels-idx1-ubyte.gz"], gzip.compress(idx(np.arange(20) % 10)))
    with pytest.raises(DataError, match="train-images-idx3-ubyte.gz is damaged"):
        load(str(folder), tmp_path)
    tar = make_tar(tmp_path / "set.tar", {f"cat/{n}.jpg": pixels[n].astype(np.uint8).tobytes() for n in range(20)})
    (tmp_path / "set.tar.gz").write_bytes(damaged(Path(tar).read_bytes()))
    with pytest.raises(DataError, match=r"set.tar.gz is no readable tar archive"):
        load(str(tmp_path / "set.tar.gz"), tmp_path)


def cifar_rows(label_bytes: int, count: int, classes: int) -> tuple[bytes, np.ndarray, list[int]]:
    generator = np.random.default_rng(0)
    planes = generator.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
    numbers = [number % classes for number in range(count)]
    rows = b"".join(bytes([5] * (label_bytes - 1) + [n]) + p.tobytes() for n, p in zip(numbers, planes, strict=True))
    return rows, planes.transpose(0, 2, 3, 1), numbers


def test_cifar10(tmp_path: Path) -> None:
    rows, images, numbers = cifar_rows(1, 12, 10)
    folder = tmp_path / "cifar"
    make(folder, [f"cifar-10-batches-bin/data_batch_{batch}.bin" for batch in range(1, 6)], rows)
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    make(folder, ["cifar-10-batches-bin/batches.meta.txt"], ("\n".join(names) + "\n\n").encode())
    found = load(str(folder), tmp_path)
    assert list(found.labels) == numbers * 5
    assert found.classes == tuple(names)
    np.testing.assert_array_equal(read_png(found, 13), images[1])
    (folder / "cifar-10-batches-bin/data_batch_3.bin").unlink()
    with pytest.raises(DataError, match="lacks data_batch_3.bin"):
        load(str(folder), tmp_path)
    make(folder, ["cifar-10-batches-bin/data_batch_3.bin"], rows[:-1])
    with pytest.raises(DataError, match="no whole number of 3073-byte rows"):
        load(str(folder), tmp_path)


def test_cifar100_takes_the_fine_label(tmp_path: Path) -> None:
    rows, images, numbers = cifar_rows(2, 7, 100)
    found = load(make_tar(tmp_path / "c.tar", {"cifar-100-binary/train.bin": rows}), tmp_path, layout="cifar100")
    assert list(found.labels) == numbers
    assert len(found.classes) == 100
    np.testing.assert_array_equal(read_png(found, 6), images[6])


@pytest.mark.parametrize(
    ("names", "download"),
    [
        (["cifar-10-batches-py/data_batch_1", "cifar-10-batches-py/batches.meta"], "cifar-10-binary.tar.gz"),
        (["cifar-100-python/train", "cifar-100-python/meta"], "cifar-100-binary.tar.gz"),
    ],
)
def test_pickled_cifar_is_refused(tmp_path: Path, names: list[str], download: str) -> None:
    with pytest.raises(DataError, match=f"pickled and not read: download .*{download}"):
        load(make(tmp_path / "in", names, b"\x80\x02"), tmp_path)


def test_layouts_that_are_not_there(tmp_path: Path) -> None:
    source = make(tmp_path / "in", ["a/1.jpg"])
    with pytest.raises(DataError, match="holds no MNIST"):
        load(source, tmp_path, layout="mnist")
    with pytest.raises(DataError, match="holds no CIFAR"):
        load(source, tmp_path, layout="cifar10")


def test_real_sets(tmp_path: Path, shared_data: Path) -> None:
    mnist = load(str(shared_data / "mnist"), tmp_path, split="test")
    assert len(mnist.labels) == 10000
    assert not mnist.notes
    assert np.bincount(mnist.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    photographs = load(str(shared_data / "imagenet_sample_500.tar"), tmp_path, classes="imagenet")
    assert list(photographs.labels) == list(range(0, 1000, 2))
