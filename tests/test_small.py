"""Data sets in memory: what is found where, downloads, draws, and the order of training batches."""

import functools
import gzip
import hashlib
import http.server
import io
import json
import pickle
import re
import struct
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from data import DataError, published, small
from data.small import ImageSet, fingerprint, load_images, open_batches

pytestmark = pytest.mark.timeout(120)
RANDOM = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No data set of this machine, no network."""
    monkeypatch.setenv("SHIFTLENS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SHIFTLENS_DATA", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(published, "_PACKAGED", tmp_path / "packaged")


def idx(values: np.ndarray) -> bytes:
    return bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def write_idx(folder: Path, count: int = 20, classes: int = 10, packed: bool = True) -> dict[str, np.ndarray]:
    """A train and a test split in MNIST's format; returns the pixels of each."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images = RANDOM.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % classes).astype(np.uint8)
        for name, values in ((f"{prefix}-images-idx3-ubyte", images), (f"{prefix}-labels-idx1-ubyte", labels)):
            if packed:
                (folder / f"{name}.gz").write_bytes(gzip.compress(idx(values)))
            else:
                (folder / name).write_bytes(idx(values))
        found[split] = images
    return found


def python_batch(rows: np.ndarray, labels: list[int]) -> bytes:
    """As Python 2 wrote CIFAR's: protocol 2, byte strings for keys."""
    return pickle.dumps({b"batch_label": b"a batch", b"labels": labels, b"data": rows, b"filenames": []}, protocol=2)


def write_cifar(folder: Path, *, binary: bool) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    for name in [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]:
        rows = RANDOM.integers(0, 256, (4, 3072), dtype=np.uint8)
        labels = [0, 9, 3, 1]
        if binary:
            content = np.concatenate([np.array(labels, np.uint8)[:, None], rows], axis=1).tobytes()
        else:
            content = python_batch(rows, labels)
        (folder / (f"{name}.bin" if binary else name)).write_bytes(content)
        found["test" if name == "test_batch" else "train"].append(rows)
    return {split: np.concatenate(parts).reshape(-1, 3, 32, 32) for split, parts in found.items()}


def write_folders(folder: Path, split: str, size: tuple[int, int] = (8, 8), per_class: int = 3) -> None:
    for label, name in enumerate(("cat", "dog")):
        place = folder / split / name
        place.mkdir(parents=True)
        for number in range(per_class):
            Image.new("RGB", size, (100 * label, number, 7)).save(place / f"{number}.png")


def image_set(count: int = 50, seed: int = 0) -> ImageSet:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, 4, 4), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (count,), generator=generator)
    classes = tuple("abcdefghij")
    return ImageSet(images, labels, classes, "random", fingerprint(images, labels, classes))


# --- Published data sets by name --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("mnist", "data/mnist"),
        ("mnist", "data/MNIST/raw"),
        ("fashion_mnist", "data/FashionMNIST/raw"),
        ("fashion_mnist", "packaged/fashion-mnist"),
        ("mnist", "cache/datasets/mnist"),
    ],
)
def test_idx_files_are_found_where_they_usually_are(
    name: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHIFTLENS_DATA", str(tmp_path / "data"))
    pixels = write_idx(tmp_path / place)
    for split in ("train", "test"):
        found = load_images(name, split)  # type: ignore[arg-type]
        assert np.array_equal(found.images.numpy(), pixels[split][:, None])
        assert found.images.dtype == torch.uint8
        assert found.labels.tolist() == [*range(10), *range(10)]
        assert found.labels.dtype == torch.int64
        assert found.name == f"{name}/{split}"
        assert found.numbers is None
    assert found.classes[1] == ("1" if name == "mnist" else "Trouser")


@pytest.mark.parametrize("binary", [True, False])
def test_both_versions_of_cifar10_are_read(binary: bool, tmp_path: Path) -> None:
    pixels = write_cifar(tmp_path / "cifar", binary=binary)
    for split in ("train", "test"):
        found = load_images(f"cifar10:{tmp_path / 'cifar'}", split)  # type: ignore[arg-type]
        assert np.array_equal(found.images.numpy(), pixels[split])
        assert [found.classes[label] for label in found.labels[:4]] == ["airplane", "truck", "cat", "automobile"]
    assert load_images(str(tmp_path / "cifar"), "test").fingerprint == found.fingerprint or binary


def test_archives_are_read_without_being_unpacked_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = write_cifar(tmp_path / "cifar-10-batches-py", binary=False)
    (tmp_path / "data").mkdir()
    packed = tmp_path / "data" / "cifar-10-python.tar.gz"
    with tarfile.open(packed, "w:gz") as archive:
        archive.add(tmp_path / "cifar-10-batches-py", "cifar-10-batches-py")
    monkeypatch.setenv("SHIFTLENS_DATA", str(packed.parent))
    for data in ("cifar10", f"cifar10:{packed}", f"cifar10:{packed.parent}"):
        assert np.array_equal(load_images(data, "test").images.numpy(), pixels["test"])


def test_two_sets_with_the_same_file_names_are_not_mistaken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digits, clothes = write_idx(tmp_path / "MNIST" / "raw"), write_idx(tmp_path / "FashionMNIST" / "raw", packed=False)
    monkeypatch.setenv("SHIFTLENS_DATA", str(tmp_path))
    assert np.array_equal(load_images("mnist", "test").images[:, 0].numpy(), digits["test"])
    assert np.array_equal(load_images("fashion_mnist", "test").images[:, 0].numpy(), clothes["test"])
    assert np.array_equal(load_images(f"fashion_mnist:{tmp_path}", "test").images[:, 0].numpy(), clothes["test"])


def test_a_part_of_a_published_set_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_idx(tmp_path)
    load_images(f"mnist:{tmp_path}", "test")
    assert "20 images where the test split of mnist has 10000" in caplog.text


def test_the_real_mnist(shared_data: Path) -> None:
    found = load_images(f"mnist:{shared_data / 'mnist'}", "test")
    assert found.images.shape == (10000, 1, 28, 28)
    assert found.labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert found.images.float().mean().item() / 255 == pytest.approx(0.1325, abs=1e-4)


def test_the_images_behind_the_reference_figures_are_where_they_say(goldens: Path, shared_data: Path) -> None:
    golden = np.load(goldens / "margins_mnist.npz")
    found = load_images(f"mnist:{shared_data / 'mnist'}", "test")
    assert np.array_equal(found.images[golden["test_index"], 0].numpy(), golden["images_u8"])
    assert found.labels[golden["test_index"]].tolist() == golden["labels"].tolist()


# --- Downloads --------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A web server of the folder `web`, to which torchvision's names point."""
    (tmp_path / "web").mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=tmp_path / "web")
    ) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        monkeypatch.delenv("HF_HUB_OFFLINE")
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.setenv(name, "127.0.0.1")
        yield f"http://127.0.0.1:{running.server_address[1]}/"
        running.shutdown()
        thread.join()


def md5(file: Path) -> str:
    return hashlib.md5(file.read_bytes()).hexdigest()


def test_mnist_is_downloaded_once_and_from_any_mirror(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = write_idx(tmp_path / "web" / "good")
    files = [(file.name, md5(file)) for file in sorted((tmp_path / "web" / "good").iterdir())]
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources", files)
    mirrors = ["http://127.0.0.1:1/", f"{server}bad/", f"{server}good/"]  # the first does not answer, one has nothing
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", mirrors)
    assert np.array_equal(load_images("mnist", "train").images[:, 0].numpy(), pixels["train"])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert np.array_equal(load_images("mnist", "test").images[:, 0].numpy(), pixels["test"])
    left = {path.name for path in (tmp_path / "cache" / "datasets").iterdir()}
    assert left == {"mnist", ".mnist.lock"}


def test_cifar10_is_downloaded_and_unpacked(tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = write_cifar(tmp_path / "cifar-10-batches-py", binary=False)
    packed = tmp_path / "web" / "cifar-10-python.tar.gz"
    with tarfile.open(packed, "w:gz") as archive:
        archive.add(tmp_path / "cifar-10-batches-py", "cifar-10-batches-py")
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", f"{server}{packed.name}")
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "tgz_md5", md5(packed))
    assert np.array_equal(load_images("cifar10", "train").images.numpy(), pixels["train"])


def test_processes_that_start_together_download_once(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_idx(tmp_path / "web")
    files = [(file.name, md5(file)) for file in sorted((tmp_path / "web").iterdir())]
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources", files)
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [server])
    caplog.set_level("INFO", logger="shiftlens")
    found: list[str] = []  # each thread opens the lock file anew, so it waits as a process would
    threads = [
        threading.Thread(target=lambda: found.append(load_images("mnist", "test").fingerprint)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1
    assert sum(record.message.startswith("download") for record in caplog.records) == 1


def test_a_damaged_download_is_not_kept(tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_idx(tmp_path / "web")
    files = [(file.name, "0" * 32) for file in sorted((tmp_path / "web").iterdir())]
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources", files)
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [server])
    with pytest.raises(DataError, match=r"mnist cannot be downloaded \(http://.*not found or corrupted.*; put "):
        load_images("mnist", "test")
    assert not (tmp_path / "cache" / "datasets" / "mnist").exists()


def test_without_a_network_one_line_says_where_files_may_be_put(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("mnist", "fashion_mnist", "cifar10"):
        with pytest.raises(DataError) as caught:
            load_images(name, "test")
        assert f"$SHIFTLENS_DATA/{name}/" in str(caught.value)
        assert f"{name}:PATH" in str(caught.value)
        assert "\n" not in str(caught.value)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", ["http://127.0.0.1:1/"])
    with pytest.raises(DataError, match="there is no network to fetch it; put "):
        load_images("mnist", "test")


# --- Python batches are pickles ---------------------------------------------------------------------------------------


class Touch:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def test_a_batch_that_holds_code_is_refused_and_nothing_runs(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    write_cifar(tmp_path / "cifar", binary=False)
    (tmp_path / "cifar" / "test_batch").write_bytes(pickle.dumps({b"data": Touch(mark)}, protocol=2))
    with pytest.raises(DataError, match=r"test_batch is refused, nothing in it was run: it names .*getattr"):
        load_images(f"cifar10:{tmp_path / 'cifar'}", "test")
    assert not mark.exists()


ROWS = np.zeros((2, 3072), np.uint8)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is no readable batch: EOFError"),
        (python_batch(ROWS, [0, 1])[:-2000], "is no readable batch"),
        (pickle.dumps([1, 2]), "holds no array of uint8 rows"),
        (python_batch(ROWS[:, :5], [0, 1]), "holds no array of uint8 rows"),
        (python_batch(ROWS.astype(np.int64), [0, 1]), "holds no array of uint8 rows"),
        (python_batch(ROWS, [0]), "holds no list of a label for each of its 2 images"),
        (python_batch(ROWS, [0, 10]), "holds labels outside 0 to 9"),
        (pickle.dumps({"data": np.array([print, 1], dtype=object)}, protocol=2), "is refused, nothing in it was run"),
    ],
)
def test_damaged_batches_are_one_line(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "test_batch").write_bytes(content)
    with pytest.raises(DataError, match=re.escape(said)):
        load_images(f"cifar10:{tmp_path}", "test")


def test_missing_batches_are_named(tmp_path: Path) -> None:
    write_cifar(tmp_path, binary=False)
    (tmp_path / "data_batch_3").unlink()
    with pytest.raises(DataError, match="lacks data_batch_3"):
        load_images(f"cifar10:{tmp_path}", "train")


def test_a_folder_of_images_given_as_published_files_is_told(tmp_path: Path) -> None:
    (tmp_path / "train" / "cat").mkdir(parents=True)
    with pytest.raises(DataError, match=rf"no train files of cifar10: .*by its path alone, {tmp_path}\)"):
        load_images(f"cifar10:{tmp_path}", "train")


# --- Folders, archives, shards ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["test", "val"])
def test_image_folders_with_splits(folder: str, tmp_path: Path) -> None:
    write_folders(tmp_path, "train", per_class=4)
    write_folders(tmp_path, folder)
    test, train = load_images(str(tmp_path), "test"), load_images(str(tmp_path), "train")
    assert (len(test), len(train)) == (6, 8)
    assert test.classes == ("cat", "dog")
    assert test.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert test.images[4, :, 0, 0].tolist() == [100, 1, 7]


def test_a_folder_without_splits_is_used_whole_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_folders(tmp_path, "images")
    found = load_images(str(tmp_path / "images"), "test")
    assert len(found) == 6
    assert "is not divided into train/ and test/: all of it is used as test" in caplog.text
    caplog.clear()
    write_folders(tmp_path, "test")
    assert len(load_images(str(tmp_path / "test"), "test")) == 6
    assert not caplog.text
    with pytest.raises(DataError, match="has a folder test/ but none for the split 'train'"):
        load_images(str(tmp_path), "train")


def test_a_class_called_train_is_no_split(tmp_path: Path) -> None:
    for place, folder in enumerate(("bus", "train")):
        (tmp_path / folder).mkdir()
        Image.fromarray(np.full((4, 4, 3), 40 * place, np.uint8)).save(tmp_path / folder / "0.png")
    found = load_images(str(tmp_path), "train")
    assert (found.classes, found.labels.tolist()) == (("bus", "train"), [0, 1])


def test_an_archive_is_read_like_the_folder(tmp_path: Path) -> None:
    write_folders(tmp_path / "set", "test")
    with tarfile.open(tmp_path / "set.tar.xz", "w:xz") as archive:
        archive.add(tmp_path / "set", "set")
    packed, unpacked = load_images(str(tmp_path / "set.tar.xz"), "test"), load_images(str(tmp_path / "set"), "test")
    assert packed.fingerprint == unpacked.fingerprint
    assert packed.name != unpacked.name


def test_images_of_several_sizes_need_one(tmp_path: Path) -> None:
    write_folders(tmp_path, "test")
    Image.new("RGB", (20, 10), (1, 2, 3)).save(tmp_path / "test" / "dog" / "9.png")
    with pytest.raises(DataError, match=r"several sizes \(8x8 and 20x10 pixels\), the second is test/dog/9.png"):
        load_images(str(tmp_path), "test")
    found = load_images(str(tmp_path), "test", size=8)
    assert found.images.shape == (7, 3, 8, 8)
    assert found.images[6, :, 4, 4].tolist() == [1, 2, 3]
    assert found.images[4, :, 0, 0].tolist() == [100, 1, 7]  # those of the size stay as they are


def test_channels_are_repeated_or_taken_from_grey_images_only(tmp_path: Path) -> None:
    pixels = write_idx(tmp_path / "idx")
    colour = load_images(f"mnist:{tmp_path / 'idx'}", "test", channels=3)
    assert np.array_equal(colour.images.numpy(), np.repeat(pixels["test"][:, None], 3, axis=1))
    (tmp_path / "grey" / "a").mkdir(parents=True)
    Image.fromarray(pixels["test"][0]).save(tmp_path / "grey" / "a" / "0.png")
    grey = load_images(str(tmp_path / "grey"), "test", channels=1)
    assert np.array_equal(grey.images[0, 0].numpy(), pixels["test"][0])
    write_folders(tmp_path / "colour", "test")
    with pytest.raises(DataError, match="colour images, the model takes one grey channel"):
        load_images(str(tmp_path / "colour"), "test", channels=1)


def test_shards_are_read_in_their_order(tiny_shards: Path, tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    for file in tiny_shards.iterdir():
        (tmp_path / "test" / file.name).write_bytes(file.read_bytes())
    sizes = json.loads((tiny_shards / "sizes.json").read_text())
    info = {"shard_lengths": list(sizes.values()), "filenames": list(sizes), "num_classes": 10}
    (tmp_path / "test" / "_info.json").write_text(json.dumps(info))
    found = load_images(str(tmp_path), "test")
    assert found.images.shape == (136, 3, 32, 32)
    with tarfile.open(tiny_shards / "000001.tar") as archive:  # its second image is number 51
        content = {member.name: archive.extractfile(member) for member in archive}
        image, label = content["1-1.png"], content["1-1.cls"]
        assert image is not None
        assert label is not None
        expected = np.asarray(Image.open(io.BytesIO(image.read())))
        assert np.array_equal(found.images[51].numpy().transpose(1, 2, 0), expected)
        assert found.labels[51] == int(label.read())
    drawn = load_images(str(tmp_path), "test", count=30, seed=2)
    assert drawn.numbers is not None
    assert torch.equal(drawn.images, found.images[drawn.numbers])
    assert torch.equal(drawn.labels, found.labels[drawn.numbers])
    part = load_images(str(tmp_path), "test", every=20)
    assert part.numbers is not None
    assert part.numbers.tolist() == [0, 20, 40, 60, 80, 100, 120]
    assert torch.equal(part.images, found.images[::20])
    assert torch.equal(part.labels, found.labels[::20])
    assert load_images(str(tmp_path / "test" / "000001.tar"), "test").images.shape == (47, 3, 32, 32)
    assert load_images(str(tmp_path), "test", size=16).images.shape == (136, 3, 16, 16)


def test_shards_that_do_not_say_how_many_classes_there_are_are_refused(tiny_shards: Path) -> None:
    with pytest.raises(DataError, match="neither class names nor their number stand in _info.json"):
        load_images(str(tiny_shards), "test")


def test_more_than_fits_into_memory_is_refused_before_it_is_decoded(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folders(tmp_path, "test", size=(64, 64))
    monkeypatch.setattr(small, "MEMORY_LIMIT", 5 * 3 * 64 * 64)
    with pytest.raises(DataError, match="6 images of 64x64 take .* GiB of memory, more than"):
        load_images(str(tmp_path), "test")
    assert len(load_images(str(tmp_path), "test", count=5)) == 5
    assert len(load_images(str(tmp_path), "test", most=5)) == 5
    assert len(load_images(str(tmp_path), "test", size=32)) == 6


@pytest.mark.parametrize(
    ("data", "options", "said"),
    [
        ("cifar1O", {}, "no such folder or archive, and no data set of that name (mnist, fashion_mnist, cifar10)"),
        ("mnist:/nowhere", {}, "mnist:/nowhere: no such folder or archive"),
        ("mnist:{folder}", {"count": 21}, "21 images asked for, there are 20"),
        ("mnist:{folder}", {"count": -1}, "must not be negative"),
        ("mnist:{folder}", {"every": 0}, "every 0 must be at least 1"),
        ("mnist:{folder}", {"most": -1}, "most -1 not negative"),
        ("mnist:{folder}", {"count": 2, "every": 2}, "it cannot be combined with every 2 and most 0"),
        ("mnist:{folder}", {"size": 32}, "images of 28x28 pixels, the model takes 32x32"),
        ("cifar10:{folder}", {}, "holds no test files of cifar10"),
        ("{folder}/{{0..3}}.tar", {}, "4 of 4 shards are missing"),
    ],
)
def test_wrong_names_and_numbers_are_one_line(data: str, options: dict[str, Any], said: str, tmp_path: Path) -> None:
    write_idx(tmp_path)
    with pytest.raises(DataError) as caught:
        load_images(data.format(folder=tmp_path), "test", **options)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


# --- Draws ------------------------------------------------------------------------------------------------------------


def test_a_draw_depends_on_the_seed_alone_and_takes_no_image_twice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_idx(tmp_path, count=200)
    whole = load_images(f"mnist:{tmp_path}", "test")
    caplog.set_level("INFO", logger="shiftlens")
    drawn = [load_images(f"mnist:{tmp_path}", "test", count=50, seed=seed) for seed in (0, 0, 1)]
    assert "50 of the 200 of mnist/test, drawn with seed 0" in caplog.text
    assert drawn[0].fingerprint == drawn[1].fingerprint != drawn[2].fingerprint
    for part in drawn:
        assert part.numbers is not None
        numbers = part.numbers.tolist()
        assert numbers == sorted(set(numbers))
        assert torch.equal(part.images, whole.images[part.numbers])
        assert torch.equal(part.labels, whole.labels[part.numbers])
    assert load_images(f"mnist:{tmp_path}", "test", count=200).fingerprint == whole.fingerprint


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ({"every": 6}, [0, 6, 12, 18]),
        ({"every": 6, "most": 2}, [0, 6]),
        ({"every": 6, "most": 200}, [0, 6, 12, 18]),
        ({"most": 3}, [0, 1, 2]),
        ({"every": 100}, [0]),
    ],
)
def test_a_part_is_named_by_its_numbers_and_is_all_that_is_decoded(
    part: dict[str, int], expected: list[int], tmp_path: Path
) -> None:
    write_idx(tmp_path / "idx")
    write_folders(tmp_path / "folders", "test", per_class=10)
    wholes = {data: load_images(data, "test") for data in (f"mnist:{tmp_path / 'idx'}", str(tmp_path / "folders"))}
    files = sorted((tmp_path / "folders").rglob("*.png"))
    for number in set(range(20)) - set(expected):
        files[number].write_bytes(b"no image")
    for data, whole in wholes.items():
        found = load_images(data, "test", **part)  # type: ignore[arg-type]
        assert found.numbers is not None
        assert found.numbers.tolist() == expected
        assert torch.equal(found.images, whole.images[expected])
        assert torch.equal(found.labels, whole.labels[expected])
        assert found.fingerprint == fingerprint(found.images, found.labels, found.classes)
    with pytest.raises(DataError, match=r"\.png"):
        load_images(str(tmp_path / "folders"), "test")


def test_a_draw_is_the_same_in_every_release() -> None:
    """Published figures name their images by it."""
    assert small.draw_images(10000, 5, 0).tolist() == [1606, 3187, 7134, 7212, 7500]
    assert small.epoch_permutation(1000, 0, 1)[:5].tolist() == [7, 720, 259, 289, 130]


# --- Training batches -------------------------------------------------------------------------------------------------


def indexes(images: ImageSet, steps: int, **options: Any) -> list[list[int]]:
    with open_batches(images, **options) as batches:
        return [next(batches)["index"].tolist() for _ in range(steps)]


def test_an_epoch_takes_every_image_once_but_for_another_remainder_each_time() -> None:
    images = image_set(50)
    with open_batches(images, global_batch=8, seed=3) as batches:
        assert (batches.steps_per_epoch, batches.num_samples, batches.streams) == (6, 50, 1)
        assert batches.shards.fingerprint == images.fingerprint
        left = []
        for epoch in range(3):
            found = []
            for _ in range(6):
                batch = next(batches)
                assert torch.equal(batch["image"], images.images[batch["index"]])
                assert torch.equal(batch["label"], images.labels[batch["index"]])
                found += batch["index"].tolist()
                assert batches.epoch == epoch
            assert len(set(found)) == 48
            left.append(set(range(50)) - set(found))
        assert len(set(map(frozenset, left))) == 3
        assert batches.report() == {"samples": 144, "bad": 0, "reasons": {}, "examples": {}}


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_each_global_batch(world: int) -> None:
    images = image_set()
    alone = indexes(images, 15, global_batch=12, seed=1)
    ranks = [indexes(images, 15, global_batch=12, seed=1, rank=rank, world=world) for rank in range(world)]
    assert [sum(parts, []) for parts in zip(*ranks, strict=True)] == alone


def test_a_stream_goes_on_exactly_where_it_was_left() -> None:
    images = image_set()
    whole = indexes(images, 20, global_batch=8, seed=5)
    for done in (0, 3, 6, 7, 13):
        epoch, step = divmod(done, 6)
        assert indexes(images, 20 - done, global_batch=8, seed=5, epoch=epoch, start_step=step) == whole[done:]
    assert indexes(images, 8, global_batch=8, seed=5, epoch=1, start_step=6) == whole[12:]  # the end of an epoch
    assert indexes(images, 20, global_batch=8, seed=6) != whole


def test_orders_are_uniform() -> None:
    """Where sample 0 of 6 stands, over 3,000 epochs: 500 each, standard deviation 20."""
    places = np.array([np.flatnonzero(small.epoch_permutation(6, 0, epoch) == 0)[0] for epoch in range(3000)])
    assert np.abs(np.bincount(places, minlength=6) - 500).max() < 100


def test_a_closed_stream_says_so_and_its_batches_stay() -> None:
    batches = open_batches(image_set(), global_batch=8)
    batch = next(batches)
    batches.close()
    assert batch["image"].shape == (8, 3, 4, 4)
    with pytest.raises(RuntimeError, match="closed; open another"):
        next(batches)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"global_batch": 51}, "larger than the data set (50 samples)"),
        ({"global_batch": 0}, "cannot be divided"),
        ({"global_batch": 8, "world": 3}, "a global batch of 8 cannot be divided among 3 processes"),
        ({"global_batch": 8, "rank": 2, "world": 2}, "rank 2 is not one of 2 processes"),
        ({"global_batch": 8, "start_step": 7}, "start step 7 is outside the epoch of 6 steps"),
        ({"global_batch": 8, "seed": -1}, "must not be negative"),
    ],
)
def test_impossible_numbers_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=re.escape(said)):
        open_batches(image_set(), **options)
