"""Packing, checking and looking into shards: through the functions and through the command line as users start it."""

from __future__ import annotations

import collections
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile, get_sampling

from data import DataError
from data.pack import pack
from data.parallel import Count, run_tasks
from data.shards import main
from data.tar import ShardReader, find_shards

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = str(ROOT / "data" / "shards.py")


def jpeg(height: int = 12, width: int = 16, seed: int = 0, **options: Any) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((width, height)).save(buffer, "JPEG", **options)
    return buffer.getvalue()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three classes of 4, 5 and 6 images."""
    folder = tmp_path / "images"
    for label, name in enumerate(("cat", "dog", "eel")):
        (folder / name).mkdir(parents=True)
        for number in range(4 + label):
            (folder / name / f"{number}.jpg").write_bytes(jpeg(seed=10 * label + number))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def samples(folder: Path) -> dict[str, tuple[bytes | None, bytes | None]]:
    records = [record for shard in find_shards(str(folder)).shards for record in ShardReader(shard.url).read()]
    assert not [record.problem for record in records if record.problem]
    assert len({record.key for record in records}) == len(records)
    return {record.key: (record.image, record.label) for record in records}


def start(*arguments: str, **options: Any) -> subprocess.Popen:
    command = [sys.executable, SCRIPT, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


# ---------------------------------------------------------------------------------------------------------------------
# pack
# ---------------------------------------------------------------------------------------------------------------------


def test_pack_keeps_every_byte(images: Path, tmp_path: Path) -> None:
    summary = pack(str(images), str(tmp_path / "out"), shard_size=4)
    assert (summary["samples"], summary["shards"], summary["classes"], summary["skipped"]) == (15, 4, 3, 0)
    expected = {
        f"{folder.name}-{path.stem}": (path.read_bytes(), str(label).encode())
        for label, folder in enumerate(sorted(images.iterdir()))
        for path in folder.iterdir()
    }
    assert samples(tmp_path / "out") == expected
    shards = find_shards(str(tmp_path / "out"))
    assert [shard.count for shard in shards.shards] == [4, 4, 4, 3]
    assert (shards.num_classes, shards.classes) == (3, ("cat", "dog", "eel"))
    assert sorted(contents(tmp_path / "out")) == [
        "000000.tar",
        "000001.tar",
        "000002.tar",
        "000003.tar",
        "_info.json",
        "_pack.json",
        "sizes.json",
    ]
    # Shards sorted by class would make every batch of a stream one class.
    order = [record.label for shard in shards.shards for record in ShardReader(shard.url).read()]
    assert order != sorted(order, key=lambda label: label or b"")


def test_other_readers_read_our_shards(images: Path, tmp_path: Path) -> None:
    import webdataset
    from timm.data.readers.reader_wds import _load_info, _parse_split_info

    out = tmp_path / "train"
    pack(str(images), str(out), shard_size=4)
    split = _parse_split_info("train", _load_info(str(out)))
    assert (split.num_samples, split.shard_lengths) == (15, (4, 4, 4, 3))
    urls = [str(out / name) for name in split.filenames]
    plain = webdataset.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("jpg", "cls")
    counted = collections.Counter(label for image, label in plain if image.size == (16, 12))
    assert counted == {0: 4, 1: 5, 2: 6}


def test_the_same_request_gives_the_same_bytes(images: Path, tmp_path: Path) -> None:
    requests: dict[str, dict[str, Any]] = {
        "one": {},
        "three": {"workers": 3},
        "seed": {"seed": 1},
        "sorted": {"shuffle": False},
    }
    for name, options in requests.items():
        (tmp_path / name).mkdir()
        pack(str(images), str(tmp_path / name / "out"), shard_size=4, **options)
    one = contents(tmp_path / "one" / "out")
    assert contents(tmp_path / "three" / "out") == one
    assert contents(tmp_path / "seed" / "out")["000000.tar"] != one["000000.tar"]
    in_order = [label for _, label in samples(tmp_path / "sorted" / "out").values()]
    assert in_order == sorted(in_order)  # type: ignore[type-var]
    assert (
        samples(tmp_path / "seed" / "out") == samples(tmp_path / "sorted" / "out") == samples(tmp_path / "one" / "out")
    )


def test_a_pack_goes_on_where_it_stopped(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack(str(images), str(out), shard_size=4)
    finished = contents(out)
    for name in ("_info.json", "sizes.json", "000001.tar"):
        (out / name).unlink()
    (out / "000002.tar").write_bytes(finished["000002.tar"][:1500])  # a disk that lost its cache
    (out / "000003.tar.123.tmp").write_bytes(b"half")
    kept = (out / "000000.tar").stat().st_mtime_ns
    pack(str(images), str(out), shard_size=4)
    assert contents(out) == finished
    assert (out / "000000.tar").stat().st_mtime_ns == kept


def test_another_pack_into_the_same_folder_is_refused(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack(str(images), str(out), shard_size=4)
    finished = contents(out)
    requests: dict[str, dict[str, Any]] = {
        "seed": {"seed": 1},
        "resize, quality": {"resize": 8},
        "shard_size": {"shard_size": 5},
    }
    for name, options in requests.items():
        with pytest.raises(DataError, match=f"holds another pack .other {name}.: choose another folder"):
            pack(str(images), str(out), **{"shard_size": 4} | options)
    (images / "cat" / "new.jpg").write_bytes(jpeg())
    with pytest.raises(DataError, match="other samples"):
        pack(str(images), str(out), shard_size=4)
    assert contents(out) == finished
    (out / "_pack.json").write_text("{")
    with pytest.raises(DataError, match="is damaged"):
        pack(str(images), str(out), shard_size=4)


def test_a_folder_that_cannot_take_shards(images: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="images is not empty .it holds cat.: choose another folder"):
        pack(str(images), str(images))
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot write .*file: File exists"):
        pack(str(images), str(tmp_path / "file"))
    with pytest.raises(ValueError, match="shard_size=0"):
        pack(str(images), str(tmp_path / "out"), shard_size=0)


def test_resize(images: Path, tmp_path: Path) -> None:
    large, small = jpeg(90, 160, quality=95), jpeg(30, 30)
    (images / "cat" / "large.jpg").write_bytes(large)
    (images / "cat" / "small.jpg").write_bytes(small)
    Image.new("RGBA", (100, 51)).save(images / "dog" / "alpha.png")
    pack(str(images), str(tmp_path / "out"), resize=40, quality=92)
    stored = {key: image for key, (image, _) in samples(tmp_path / "out").items()}
    assert stored["cat-small"] == small
    reduced = Image.open(io.BytesIO(stored["cat-large"] or b""))
    assert (reduced.size, reduced.format, reduced.mode) == ((71, 40), "JPEG", "RGB")
    assert isinstance(reduced, JpegImageFile)
    assert get_sampling(reduced) == 0  # 4:4:4
    expected = Image.open(io.BytesIO(large)).resize((71, 40), Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(reduced).astype(int) - np.asarray(expected)).mean() < 3
    assert Image.open(io.BytesIO(stored["dog-alpha"] or b"")).size == (78, 40)


def test_unreadable_images(images: Path, tmp_path: Path) -> None:
    (images / "cat" / "bad.jpg").write_bytes(jpeg()[:100])
    (images / "eel" / "empty.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"(cat/bad|eel/empty).jpg: .*--skip_bad"):
        pack(str(images), str(tmp_path / "strict"), resize=8)
    assert pack(str(images), str(tmp_path / "strict"), resize=8, skip_bad=True)["samples"] == 15  # the advice works
    summary = pack(str(images), str(tmp_path / "out"), resize=8, skip_bad=True, shard_size=4)
    assert (summary["samples"], summary["skipped"]) == (15, 2)
    assert [note.split(":")[0] for note in sorted(summary["notes"])] == [
        "left out cat/bad.jpg",
        "left out eel/empty.jpg",
    ]
    assert find_shards(str(tmp_path / "out")).num_samples == len(samples(tmp_path / "out")) == 15
    finished = contents(tmp_path / "out")
    again = pack(str(images), str(tmp_path / "out"), resize=8, skip_bad=True, shard_size=4)
    assert again["skipped"] == 2
    assert contents(tmp_path / "out") == finished
    # Without re-encoding the bytes are passed on unread, and verify finds them.
    pack(str(images), str(tmp_path / "copied"))
    assert main(["verify", str(tmp_path / "copied")]) == 1


def test_a_source_file_that_cannot_be_read(images: Path, tmp_path: Path) -> None:
    (images / "cat" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    for workers in (1, 2):
        with pytest.raises(DataError, match="cannot read .*cat/gone.jpg: No such file"):
            pack(str(images), str(tmp_path / "out"), shard_size=4, workers=workers)
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_a_full_disk(images: Path, tmp_path: Path) -> None:
    """A file size limit stands in for the disk: both fail in write() with an OSError."""
    code = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    for number in range(30):
        (images / "cat" / f"more{number}.jpg").write_bytes(jpeg(100, 100))
    out = tmp_path / "out"
    for workers in ("1", "2"):
        command = [
            sys.executable,
            "-c",
            code,
            SCRIPT,
            "pack",
            str(images),
            str(out),
            "--workers",
            workers,
            "--shard_size=20",
        ]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert result.returncode == 1
        assert result.stderr.startswith("error: cannot write ")
        assert result.stderr.endswith(": File too large\n")
        assert len(result.stderr.splitlines()) == 1
        assert not list(out.glob("*.tmp"))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """Images that take a while to resize, and the files of an unbroken pack of them."""
    folder = tmp_path_factory.mktemp("interrupted")
    for name in ("a", "b"):
        (folder / "images" / name).mkdir(parents=True)
        for number in range(60):
            (folder / "images" / name / f"{number}.jpg").write_bytes(jpeg(500, 500, seed=number))
    pack(str(folder / "images"), str(folder / "out"), resize=300, shard_size=6)
    return folder / "images", contents(folder / "out")


@pytest.mark.parametrize(
    ("stop", "workers"), [(signal.SIGINT, 1), (signal.SIGINT, 2), (signal.SIGTERM, 2), (signal.SIGKILL, 2)]
)
def test_an_interrupted_command_can_be_repeated(
    tmp_path: Path, photographs: tuple[Path, dict[str, bytes]], stop: signal.Signals, workers: int
) -> None:
    source, unbroken = photographs
    out = tmp_path / "out"
    arguments = ["pack", str(source), str(out), "--resize", "300", "--shard_size", "6", "--workers", str(workers)]
    process = start(*arguments)
    while not (out / "000002.tar").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(stop)
    _, errors = process.communicate(timeout=30)
    if stop == signal.SIGINT:
        assert process.returncode == 130
        assert errors.startswith("interrupted: ")
        assert errors.endswith(" of 20 shards are finished; the same command goes on from there\n")
        assert len(errors.splitlines()) == 1
    elif stop == signal.SIGTERM:
        assert (process.returncode, errors) == (143, "")
    assert not (out / "sizes.json").exists()
    if stop != signal.SIGKILL:
        assert not list(out.glob("*.tmp"))
    assert main(arguments) == 0
    assert contents(out) == unbroken


# ---------------------------------------------------------------------------------------------------------------------
# Worker processes
# ---------------------------------------------------------------------------------------------------------------------


def square(number: int, count: Count) -> int:
    for _ in range(number):
        count(1)
    return number**2


def fail(number: int, count: Count) -> int:
    if number == 3:
        raise DataError("shard 3 is bad")
    if number == 5:
        raise KeyError("a bug")
    if number == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def linger(number: int, count: Count) -> int:
    while True:
        time.sleep(0.05)
        count(1)


@pytest.mark.parametrize("workers", [1, 2, 3, 20])
def test_tasks(workers: int) -> None:
    done: list[int] = []
    results = dict(run_tasks(square, range(10), workers=workers, count=done.append))
    assert results == {number: number**2 for number in range(10)}
    assert sum(done) == sum(range(10))
    assert list(run_tasks(square, [], workers=workers, count=done.append)) == []


@pytest.mark.timeout(60)
def test_tasks_that_fail() -> None:
    def run(*numbers: int) -> None:
        list(run_tasks(fail, numbers, workers=2, count=lambda count: None))

    with pytest.raises(DataError, match="shard 3 is bad"):
        run(0, 3, 1)
    with pytest.raises(RuntimeError, match="(?s)a worker process failed.*KeyError: 'a bug'"):
        run(0, 5)
    with pytest.raises(DataError, match="a worker process died .killed by SIGKILL"):
        run(0, 7)


@pytest.mark.timeout(60)
def test_no_worker_outlives_its_parent() -> None:
    code = (
        f"import os, sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        "import multiprocessing, threading, time\n"
        "from test_shards import linger\n"
        "from data.parallel import run_tasks\n"
        "def say():\n"
        "    while len(multiprocessing.active_children()) < 2: time.sleep(0.01)\n"
        "    print(*[child.pid for child in multiprocessing.active_children()], flush=True)\n"
        "threading.Timer(0.5, say).start()\n"
        "list(run_tasks(linger, [0, 1], workers=2, count=lambda count: None))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    children = [int(child) for child in process.stdout.readline().split()]
    assert len(children) == 2
    process.kill()
    process.wait()
    while any(_alive(child) for child in children):
        time.sleep(0.05)


def _alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ---------------------------------------------------------------------------------------------------------------------
# verify
# ---------------------------------------------------------------------------------------------------------------------


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def pairs(keys: str, label: int = 0) -> list[tuple[str, bytes]]:
    return [member for key in keys for member in ((f"{key}.cls", str(label).encode()), (f"{key}.jpg", jpeg()))]


def test_verify_finds_nothing_in_a_good_set(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pack(str(images), str(tmp_path / "out"), shard_size=4)
    for workers in ("1", "2"):
        assert main(["verify", str(tmp_path / "out"), "--workers", workers]) == 0
        line = "15 good labels in 4 shards: labels 0 to 2, 3 classes with 4 to 6 images each; 0 problems\n"
        assert capsys.readouterr().out == line


def test_verify_names_every_problem(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "set"
    write_tar(folder / "0.tar", [*pairs("ab"), ("c.jpg", jpeg()), *pairs("d"), ("e.cls", b"0"), ("a.cls", b"1")])
    write_tar(
        folder / "1.tar", [("f.cls", b"7.0"), ("f.jpg", jpeg()), ("g.cls", b"9"), ("g.jpg", jpeg()[:-2]), *pairs("d")]
    )
    write_tar(folder / "2.tar", pairs("hijk", 1))
    (folder / "2.tar").write_bytes((folder / "2.tar").read_bytes()[:4000])
    write_tar(folder / "3.tar", pairs("lm", 1))
    counts = {"0.tar": 6, "1.tar": 3, "2.tar": 4, "3.tar": 3}
    (folder / "sizes.json").write_text(json.dumps(counts))
    (folder / "_info.json").write_text(json.dumps({"num_classes": 3}))
    outputs = []
    for workers in ("1", "2"):
        assert main(["verify", str(folder), "--workers", workers]) == 1
        outputs.append(sorted(capsys.readouterr().out.replace(f"{folder}/", "").splitlines()))
    assert outputs[0] == outputs[1]
    expected = [
        "note: 1 of 3 classes have no image: 2",
        "problem: 0.tar and 1.tar share keys: d",
        "problem: 0.tar: duplicate key: a",
        "problem: 0.tar: no image: e",
        "problem: 0.tar: no label: c",
        "problem: 1.tar: damaged JPEG: Image is incomplete or truncated: g",
        "problem: 1.tar: label 9 with 3 classes: g",
        "problem: 1.tar: label is not an integer: '7.0': f",
        "problem: 2.tar: holds 1 samples, its count says 4",
        "problem: 2.tar: truncated: ",
        "problem: 3.tar: holds 2 samples, its count says 3",
    ]
    found = [line for line in outputs[0] if line.startswith(("note: 1", "problem"))]
    assert len(found) == len(expected)
    for line, start_of_line in zip(found, expected, strict=True):
        assert line.startswith(start_of_line)


def test_verify_finds_labels_that_start_at_one(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_tar(tmp_path / "set" / "0.tar", [*pairs("ab", 1), *pairs("c", 2), *pairs("de", 3)])
    assert main(["verify", str(tmp_path / "set"), "--no_decode"]) == 1
    assert "problem: labels run from 1 to 3: they must start at 0" in capsys.readouterr().out
    (tmp_path / "set" / "_info.json").write_text(json.dumps({"num_classes": 3}))
    assert main(["verify", str(tmp_path / "set"), "--no_decode"]) == 1
    line = "label 3 with 3 classes: labels must start at 0, these look 1-based; repack: d, e\n"
    assert line in capsys.readouterr().out


def test_verify_without_decoding_ignores_pixels(tmp_path: Path) -> None:
    write_tar(tmp_path / "set" / "0.tar", [("a.jpg", b"<html>"), ("a.cls", b"0")])
    assert main(["verify", str(tmp_path / "set")]) == 1
    assert main(["verify", str(tmp_path / "set"), "--no_decode"]) == 0


def test_verify_reads_what_is_no_shard(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for number, content in enumerate((b"", b"<html>" * 200, bytes(range(256)) * 8)):
        (tmp_path / f"{number}.tar").write_bytes(content)
    (tmp_path / "sizes.json").write_text(json.dumps({f"{number}.tar": 1 for number in range(3)}))
    assert main(["verify", str(tmp_path)]) == 1
    output = capsys.readouterr().out
    assert all(f"problem: {tmp_path}/{number}.tar: " in output for number in range(3))
    assert "problem: no sample has a usable label" in output


# ---------------------------------------------------------------------------------------------------------------------
# info and order
# ---------------------------------------------------------------------------------------------------------------------


def test_info(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    pack(str(images), str(out), shard_size=4)
    assert main(["info", str(out), "--write"]) == 0
    output = capsys.readouterr().out
    size = sum(path.stat().st_size for path in out.glob("*.tar"))
    for line in ("shards:           4", "samples:          15", f"bytes:            {size:,}", "3 (cat, dog, eel)"):
        assert line in output
    assert "has both _info.json and sizes.json" in output


def test_info_writes_what_is_missing(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack(str(images), str(out), shard_size=4)
    finished = contents(out)
    (out / "sizes.json").unlink()
    assert main(["info", str(out), "--write"]) == 0
    assert contents(out) == finished
    (out / "sizes.json").unlink()
    (out / "_info.json").unlink()
    assert main(["info", str(out), "--write"]) == 0
    known = {name: value for name, value in json.loads(finished["_info.json"]).items() if name != "classes"}
    assert json.loads((out / "_info.json").read_text()) == known  # folder names are not in the shards
    assert (out / "sizes.json").read_bytes() == finished["sizes.json"]
    assert main(["info", str(out / "000000.tar"), "--write"]) == 1


def test_order_is_the_order_of_training(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from data.order import count_streams, global_order

    out = tmp_path / "out"
    pack(str(images), str(out), shard_size=4)
    assert main(["order", str(out), "--global_batch", "4", "--seed", "3", "--epoch", "1", "--streams", "2"]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    shards = find_shards(str(out))
    batches = global_order(shards, global_batch=4, streams=count_streams(4, 1, 2), seed=3, epoch=1)
    expected = [(step, number) for step, batch in enumerate(batches) for number in batch.tolist()]
    assert [(int(step), int(number)) for step, number, _, _ in rows] == expected
    assert len(rows) == 12
    keys = [(shard.url, record.key) for shard in shards.shards for record in ShardReader(shard.url).read()]
    assert [(url, key) for _, _, url, key in rows] == [keys[number] for _, number in expected]
    assert main(["order", str(out), "--global_batch", "4", "--steps", "2"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 8
    assert main(["order", str(out), "--global_batch", "8", "--world", "2", "--streams", "1"]) == 1
    assert "up to 1 streams" in capsys.readouterr().err
    assert main(["order", str(out), "--global_batch", "12", "--world", "4", "--streams", "6"]) == 0
    assert capsys.readouterr().err == "4 processes use 4 streams: another order than one process's\n"
    assert main(["order", str(out), "--global_batch", "16"]) == 1
    assert capsys.readouterr().err.startswith("error: ")


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected"),
        (["unpack"], "invalid choice: 'unpack'"),
        (["pack", "in"], "required: pack.out"),
        (["pack", "in", "out", "--resize", "0"], "0 does not conform to restriction v>0"),
        (["pack", "in", "out", "--quality", "100"], "100 does not conform"),
        (["pack", "in", "out", "--seed", "-1"], "-1"),
        (["pack", "in", "out", "--layout", "imagenet_c"], "invalid choice: 'imagenet_c'"),
        (["pack", "in", "out", "--shardsize", "3"], "--shardsize"),
        (["order", "in"], "global_batch"),
        (["verify"], "data"),
    ],
)
def test_a_wrong_command_is_one_line_and_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pack", "absent", "out"], "absent: no such folder or archive"),
        (["verify", "absent"], "absent"),
        (["info", "{0..2}.tar"], "3 of 3 shards are missing: 0.tar, 1.tar, 2.tar"),
        (["verify", "pipe:cat x"], "pipe"),
    ],
)
def test_bad_data_is_one_line_and_code_1(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import runpy, sys; sys.argv = [sys.argv[1], 'pack', '--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: assert not {'torch', 'timm', 'webdataset'} & set(sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", code, SCRIPT], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "--skip_bad" in result.stdout
    for layout in ("imagenet_v2", "objectnet", "cifar100"):
        assert layout in result.stdout


def test_output_into_a_closed_pipe_is_no_error(images: Path, tmp_path: Path) -> None:
    pack(str(images), str(tmp_path / "out"))
    command = f"{sys.executable} {SCRIPT} order {tmp_path / 'out'} --global_batch 1 | head -n 1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    assert (len(result.stdout.splitlines()), result.stderr) == (1, "")


# ---------------------------------------------------------------------------------------------------------------------
# Real data
# ---------------------------------------------------------------------------------------------------------------------


def test_real_photographs(tmp_path: Path, shared_data: Path, capsys: pytest.CaptureFixture) -> None:
    source, out = str(shared_data / "imagenet_sample_500.tar"), tmp_path / "in500"
    assert main(["pack", source, str(out), "--classes", "imagenet", "--shard_size", "100"]) == 0
    assert "note: 500 of 1000 classes have no images" in capsys.readouterr().out
    stored = samples(out)
    with tarfile.open(source) as archive:
        members = [member for member in archive if member.isfile()]
        originals = {hashlib.sha256(archive.extractfile(member).read()).digest() for member in members}  # type: ignore
    assert {hashlib.sha256(image or b"").digest() for image, _ in stored.values()} == originals
    assert sorted(int(label or b"-1") for _, label in stored.values()) == list(range(0, 1000, 2))
    assert main(["verify", str(out)]) == 0
