"""Shards: finding and counting them, reading their records whatever is wrong with the tar, labels."""

from __future__ import annotations

import contextlib
import gzip
import http.server
import io
import json
import logging
import multiprocessing
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from data import DataError, urls
from data.archive import plain_header
from data.tar import LabelError, Record, RecordIndex, ShardReader, find_shards, parse_label
from data.urls import open_source

Member = tuple[str, bytes]


def tar_bytes(members: list[Member], *, format: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def samples(count: int, *, size: int = 700) -> list[Member]:
    """Members of `count` samples whose image bytes tell them apart; sizes straddle block edges."""
    members: list[Member] = []
    for number in range(count):
        members.append((f"{number:04d}.jpg", bytes([number % 256]) * (size + number)))
        members.append((f"{number:04d}.cls", str(number % 7).encode()))
    return members


def write_shards(folder: Path, counts: list[int], *, index: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, count in enumerate(counts):
        (folder / f"{number:03d}.tar").write_bytes(tar_bytes(samples(count)))
    if index:
        (folder / "sizes.json").write_text(json.dumps({f"{n:03d}.tar": count for n, count in enumerate(counts)}))
    return folder


def read(path: Path, members: list[Member] | bytes) -> tuple[ShardReader, list[Record]]:
    path.write_bytes(members if isinstance(members, bytes) else tar_bytes(members))
    reader = ShardReader(str(path))
    return reader, list(reader.read())


# ---------------------------------------------------------------------------------------------------------------------
# Records
# ---------------------------------------------------------------------------------------------------------------------


def test_reads_samples_in_order(tmp_path: Path) -> None:
    reader, records = read(tmp_path / "a.tar", samples(5))
    assert [(r.number, r.key, r.extension, r.label, r.problem) for r in records] == [
        (n, f"{n:04d}", "jpg", str(n).encode(), None) for n in range(5)
    ]
    assert [r.image for r in records] == [bytes([n]) * (700 + n) for n in range(5)]
    assert (reader.count, reader.truncated, reader.notes) == (5, None, [])


def test_passes_over_what_is_not_wanted(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_bytes(samples(6)))
    reader = ShardReader(str(tmp_path / "a.tar"), start=2)
    assert [r.number for r in reader.read(lambda number: number % 2 == 0)] == [2, 4]
    assert reader.count == 6


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_index_jumps_to_where_a_walk_would_come(tmp_path: Path, format: int) -> None:
    """Long names before headers, a folder, a key that comes back: a jump sees what a walk from the start sees."""
    long = "n" * (90 if format == tarfile.USTAR_FORMAT else 150)
    members = [
        (f"{long}{key}.{extension}", b"1" * size) for key in "abcadeb" for extension, size in (("jpg", 600), ("cls", 1))
    ]
    path = tmp_path / "a.tar"
    path.write_bytes(tar_bytes(members, format=format))
    walked = list(ShardReader(str(path)).read())
    assert [record.problem for record in walked] == [None, None, None, "duplicate key", None, None, "duplicate key"]
    index = RecordIndex()
    for start in (2, 1, 5, 0, 6, 3, 7, 9):
        reader = ShardReader(str(path), start=start, index=index)
        assert list(reader.read()) == walked[start:]
        assert reader.count == 7


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_links_folders_and_long_names(tmp_path: Path, format: int) -> None:
    long = "folder/" + "n" * 80 if format == tarfile.USTAR_FORMAT else "folder/" + "ü" * 300
    with tarfile.open(tmp_path / "a.tar", "w", format=format) as archive:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for extension, content in ((".cls", b"3"), (".JPG", b"image")):  # label first, upper case
            info = tarfile.TarInfo(long + extension)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
            link = tarfile.TarInfo("elsewhere.jpg")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(link)
    reader = ShardReader(str(tmp_path / "a.tar"))
    (record,) = reader.read()
    assert (record.key, record.extension, record.image, record.label) == (long, "jpg", b"image", b"3")
    assert reader.truncated is None


@pytest.mark.parametrize("name", ["../../etc/x", "/abs/y", "emoji 🦊", "a\nb", "n" * 4000])
def test_names_are_only_keys(tmp_path: Path, name: str) -> None:
    _, (record,) = read(tmp_path / "a.tar", tar_bytes([(name + ".jpg", b"1")] * 1 + [(name + ".cls", b"1")], format=2))
    assert record.key == name
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


@pytest.mark.parametrize(
    ("names", "problems"),
    [
        (["a.jpg", "b.jpg", "b.cls"], ["no label", None]),
        (["a.cls", "b.jpg", "b.cls"], ["no image", None]),
        (["a.jpg", "a.png", "a.cls"], ["two images"]),
        (["a.jpg", "a.cls", "a.cls"], ["two labels"]),
        (["a.cls", "a.CLS", "a.jpg"], ["two labels"]),
        (["a.jpg", "a.cls", "a.json", "a.txt"], [None]),
        (["a.jpg", "a.cls", "a.jpg", "a.cls"], [None, "duplicate key"]),
        (["a.cls", "a.jpg", "a.cls", "a.jpg"], [None, "duplicate key"]),
        (["a.jpg", "a.cls", "b.jpg", "b.cls", "a.jpg", "a.cls"], [None, None, "duplicate key"]),
        (["a.v1.jpg", "a.cls"], ["no image"]),  # the extension begins at the first dot
        (["README", ".hidden", "a.jpg", "a.cls"], ["no image", "no image", None]),
        (["__info__", "__meta__/x", "a.jpg", "a.cls"], [None]),
    ],
)
def test_every_file_belongs_to_a_record(tmp_path: Path, names: list[str], problems: list[str | None]) -> None:
    reader, records = read(tmp_path / "a.tar", [(name, b"1") for name in names])
    assert [record.problem for record in records] == problems
    assert reader.count == len(problems)


def test_interleaved_members_are_named(tmp_path: Path) -> None:
    reader, records = read(tmp_path / "a.tar", [(n, b"1") for n in ("a.jpg", "b.jpg", "a.cls", "b.cls")])
    assert [r.problem for r in records] == ["no label", "no label", "duplicate key", "duplicate key"]
    assert "2 keys come back later" in reader.notes[0]


# ---------------------------------------------------------------------------------------------------------------------
# Damage
# ---------------------------------------------------------------------------------------------------------------------


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    """Cut at all block edges, one byte before and behind: an error, a truncation, or a smaller count; never silence."""
    whole = tar_bytes(samples(4))
    end = sum(512 + -(-len(content) // 512) * 512 for _, content in samples(4))
    cuts = {edge + step for edge in range(0, end + 1024, 512) for step in (-1, 0, 1)} | {end - 600, end - 1500}
    for cut in sorted(cut for cut in cuts if 0 <= cut < end + 1024):
        for wanted in (None, lambda number: False):
            path = tmp_path / "a.tar"
            path.write_bytes(whole[:cut])
            reader = ShardReader(str(path))
            if cut < 512:
                with pytest.raises(DataError, match="empty|not a tar"):
                    list(reader.read(wanted))
                continue
            records = list(reader.read(wanted))
            if cut < end:
                assert reader.count < 4 or reader.truncated, cut
            elif cut < end + 512:
                assert reader.count == 4
                assert reader.notes or reader.truncated
            assert all(record.problem is None for record in records)
            assert wanted is not None or len(records) == reader.count
            if reader.truncated:
                assert f"at byte {cut}" in reader.truncated


@given(st.data())
def test_byte_flips_never_escape(tmp_path_factory: pytest.TempPathFactory, draw: st.DataObject) -> None:
    content = bytearray(tar_bytes(samples(3, size=40)))
    for _ in range(draw.draw(st.integers(1, 4))):
        content[draw.draw(st.integers(0, len(content) // 2))] = draw.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("flips") / "a.tar"
    path.write_bytes(content)
    reader = ShardReader(str(path))
    with contextlib.suppress(DataError):
        assert len(list(reader.read())) == reader.count


@given(st.binary(max_size=120), st.integers(0, 2**40), st.integers(0, 511), st.integers(0, 255), st.booleans())
def test_fast_header_agrees_with_tarfile(name: bytes, size: int, place: int, byte: int, repair: bool) -> None:
    """On intact and damaged headers, also where the damage has a right checksum.

    Mode, owners, time and device are not looked at: tarfile refuses nonsense there, we do not.
    """
    assume(not any(first <= place < last for first, last in ((100, 124), (136, 148), (329, 345))))
    info = tarfile.TarInfo(name.decode("utf-8", "backslashreplace") or "x")
    info.size = size
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT)[-512:])
    header[place] = byte
    if repair:
        header[148:156] = b"%06o\0 " % (sum(header) - sum(header[148:156]) + 256)
    plain = plain_header(bytes(header))
    if plain is not None:
        slow = tarfile.TarInfo.frombuf(bytes(header), "utf-8", "backslashreplace")
        assert (plain.name, plain.size, plain.isreg()) == (slow.name, slow.size, slow.isreg())
    else:
        assert not (place >= 346 and repair), "an intact header must take the fast way"


def test_end_of_archive_oddities(tmp_path: Path) -> None:
    whole = tar_bytes(samples(2))
    end = sum(512 + -(-len(content) // 512) * 512 for _, content in samples(2))
    for content, note in (
        (whole[:end], "no end-of-archive"),
        (whole[: end + 512], "a single end-of-archive"),
        (whole + whole, "more data behind"),
    ):
        reader, records = read(tmp_path / "a.tar", content)
        assert len(records) == 2
        assert reader.truncated is None
        assert note in reader.notes[0]


def test_header_that_claims_more_than_memory(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.jpg")
    info.size = 2**50
    reader, records = read(tmp_path / "a.tar", info.tobuf(tarfile.GNU_FORMAT) + b"x" * 1024)
    assert records == []
    assert reader.truncated == "cut off at byte 1536 in the content of 'a.jpg'"


@pytest.mark.parametrize(
    ("content", "looks"),
    [
        (b"", "empty"),
        (gzip.compress(tar_bytes(samples(1))), "gzip"),
        (b"\n<!doctype html><html>404</html>", "HTML"),
        (bytes(range(256)) * 9, "no tar"),
        (b"short", "no tar"),
        (b"\xff\xd8\xff\xe0", "JPEG"),
    ],
)
def test_other_files_named_tar(tmp_path: Path, content: bytes, looks: str) -> None:
    with pytest.raises(DataError, match=f"a.tar is .*{looks}"):
        read(tmp_path / "a.tar", content)


# ---------------------------------------------------------------------------------------------------------------------
# Labels
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "label"), [(b"0", 0), (b" 7\n", 7), (b"007", 7), (b"999", 999)])
def test_labels(text: bytes, label: int) -> None:
    assert parse_label(text, 1000) == label


@pytest.mark.parametrize(
    "text", [None, b"", b" ", b"xx", b"-3", b"7.0", b"1 2", b"1001", b"9" * 5000, "٣".encode(), b"+1"]
)
def test_bad_labels(text: bytes | None) -> None:
    with pytest.raises(LabelError):
        parse_label(text, 1000)


def test_labels_that_start_at_one() -> None:
    with pytest.raises(DataError, match="1-based") as caught:
        parse_label(b"1000", 1000)
    assert not isinstance(caught.value, LabelError)
    assert parse_label(b"1000", None) == 1000


# ---------------------------------------------------------------------------------------------------------------------
# Finding shards
# ---------------------------------------------------------------------------------------------------------------------


def test_all_ways_to_name_shards_agree(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "set", [3, 0, 2])
    expected = [(str(folder / "000.tar"), 3, 0), (str(folder / "001.tar"), 0, 3), (str(folder / "002.tar"), 2, 3)]
    joined = f"{folder}/000.tar::{folder}/{{001..002}}.tar"
    for named in (str(folder), f"{folder}/*.tar", f"{folder}/{{000..002}}.tar", joined, [joined]):
        found = find_shards(named)
        assert [(shard.url, shard.count, shard.start) for shard in found.shards] == expected
        assert found.num_samples == 5
    reverse = find_shards(f"{folder}/00{{2,1,0}}.tar")
    assert [shard.count for shard in reverse.shards] == [2, 0, 3]
    assert reverse.fingerprint != find_shards(str(folder)).fingerprint


def test_shell_and_glob_characters_in_a_local_name(tmp_path: Path) -> None:
    for name in ("a; touch x.tar", "$(touch x).tar", "{1..3}.tar", "[a].tar", "*.tar", "a::b.tar"):
        (tmp_path / name).write_bytes(tar_bytes(samples(2)))
        found = find_shards(str(tmp_path / name))
        assert [shard.url for shard in found.shards] == [str(tmp_path / name)]
    assert not Path("x").exists()


def test_counts_are_walked_where_no_index_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_shards(tmp_path, [3, 2], index=False)
    with caplog.at_level(logging.INFO):
        assert [shard.count for shard in find_shards(str(folder)).shards] == [3, 2]
    assert sum("counting" in message for message in caplog.messages) == 1
    (folder / "001.tar").write_bytes(tar_bytes(samples(2))[:1300])
    with pytest.raises(DataError, match="001.tar: cut off at byte 1300"):
        find_shards(str(folder))


def test_timm_index_gives_counts_and_classes(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, [3, 2], index=False)
    split = {"name": "train", "num_samples": 5, "filenames": ["000.tar", "001.tar"], "shard_lengths": [3, 2]}
    info = {"name": "x", "splits": {"train": split}, "num_classes": 2, "classes": ["cat", "dog"]}
    (folder / "_info.json").write_text(json.dumps(info))
    found = find_shards(str(folder))
    assert (found.num_samples, found.num_classes, found.classes) == (5, 2, ("cat", "dog"))
    (folder / "sizes.json").write_text(json.dumps({"000.tar": 3, "001.tar": 4}))
    with pytest.raises(DataError, match="4 samples in 001.tar, _info.json 2"):
        find_shards(str(folder))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("sizes.json", {"000.tar": 3}, "no count for 001.tar"),
        ("sizes.json", {"000.tar": 3, "001.tar": -2}, "count of 001.tar is -2"),
        ("sizes.json", {"000.tar": 3, "001.tar": "2"}, "count of 001.tar is '2'"),
        ("sizes.json", {"000.tar": 3, "001.tar": True}, "count of 001.tar is True"),
        (
            "sizes.json",
            {"000.tar": 3, "001.tar": 2, "002.tar": 1, "003.tar": 1},
            "2 of 4 shards are missing: .*002.*003",
        ),
        ("sizes.json", [1], "must hold a JSON object"),
        ("sizes.json", {"000.tar": 0, "001.tar": 0}, "hold no samples"),
        ("_info.json", {"splits": {"train": {"filenames": ["000.tar"], "shard_lengths": []}}}, "each split needs"),
        ("_info.json", {"splits": [1]}, "each split needs"),
        ("_info.json", {"num_classes": 0}, "num_classes is 0"),
        ("_info.json", {"num_classes": 3, "classes": ["a"]}, "1 classes are named"),
        ("nshards.txt", 3, "nshards.txt says 3 shards, 2 are there"),
        ("nshards.txt", "x", "nshards.txt must hold"),
    ],
)
def test_contradicting_indexes(tmp_path: Path, name: str, content: object, message: str) -> None:
    write_shards(tmp_path, [3, 2], index=False)
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(DataError, match=message) as caught:
        find_shards(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_joined_sets_must_share_classes(tmp_path: Path) -> None:
    for name, number in (("a", 2), ("b", 3)):
        folder = write_shards(tmp_path / name, [1])
        (folder / "_info.json").write_text(json.dumps({"num_classes": number}))
    with pytest.raises(DataError, match="differ in their number of classes: 2 in .*3 in"):
        find_shards(f"{tmp_path}/a::{tmp_path}/b")


def test_missing_shards_are_listed_at_once(tmp_path: Path) -> None:
    write_shards(tmp_path, [1, 1, 1, 1])
    (tmp_path / "001.tar").unlink()
    (tmp_path / "003.tar").unlink()
    for named in (f"{tmp_path}/{{000..003}}.tar", str(tmp_path)):
        with pytest.raises(DataError, match=r"2 of 4 shards are missing: \S*001.tar, \S*003.tar"):
            find_shards(named)


@pytest.mark.parametrize("data", ["", "{tmp}/*.tar", "{tmp}", "{tmp}/a::", [], "bogus://x/a.tar"])
def test_nothing_found(tmp_path: Path, data: str | list[str]) -> None:
    with pytest.raises(DataError) as caught:
        find_shards(data.replace("{tmp}", str(tmp_path)) if isinstance(data, str) else data)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# Commands and remote files
# ---------------------------------------------------------------------------------------------------------------------


def test_pipes(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, [3, 2])
    url = f"pipe:cat {folder}/{{000..001}}.tar"
    with pytest.raises(DataError, match="--allow_pipe"):
        find_shards(url)
    with pytest.raises(DataError, match="--allow_pipe"):
        list(ShardReader(url).read())
    found = find_shards(url, allow_pipe=True)
    assert [shard.count for shard in found.shards] == [3, 2]
    records = list(ShardReader(found.shards[0].url, allow_pipe=True).read(lambda number: number > 0))
    assert [record.key for record in records] == ["0001", "0002"]


@pytest.mark.parametrize("command", ["exit 3", "cat {tmp}/000.tar; exit 3", "head -c 1024 {tmp}/000.tar; exit 3"])
def test_failing_pipe(tmp_path: Path, command: str) -> None:
    write_shards(tmp_path, [3])
    with pytest.raises(DataError, match="exit code 3"):
        list(ShardReader("pipe:" + command.format(tmp=tmp_path), allow_pipe=True).read())


def test_truncating_pipe(tmp_path: Path) -> None:
    write_shards(tmp_path, [3])
    for wanted in (None, lambda number: False):
        reader = ShardReader(f"pipe:head -c 2600 {tmp_path}/000.tar", allow_pipe=True)
        list(reader.read(wanted))
        assert (reader.count, reader.truncated) == (1, "cut off at byte 2600 in a header")


def test_a_command_ends_with_its_reader(tmp_path: Path) -> None:
    """With all its children: by `close` while it stalls, and when the process that reads is killed."""

    def running() -> int:
        commands = (path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists())
        return sum(str(tmp_path).encode() in command for command in commands)

    def wait_for(processes: bool) -> None:
        end = time.monotonic() + 20
        while bool(running()) != processes:
            assert time.monotonic() < end
            time.sleep(0.01)

    def read() -> None:
        open_source(url, allow_pipe=True).read(10)

    url = f"pipe:tail -f {tmp_path}/never | cat; cat {tmp_path}/never"
    (tmp_path / "never").touch()
    source = open_source(url, allow_pipe=True)
    wait_for(True)
    source.close()
    wait_for(False)
    reader = multiprocessing.get_context("fork").Process(target=read)
    reader.start()
    wait_for(True)
    reader.kill()
    reader.join()
    wait_for(False)


def test_fsspec(tmp_path: Path) -> None:
    import fsspec

    write_shards(tmp_path, [3, 2])
    memory = fsspec.filesystem("memory")
    for path in tmp_path.iterdir():
        memory.pipe(f"/bucket/{path.name}", path.read_bytes())
    try:
        for named in ("memory://bucket/{000..001}.tar", "memory://bucket/*.tar", "memory://bucket/"):
            found = find_shards(named)
            assert [shard.count for shard in found.shards] == [3, 2]
            records = [r for shard in found.shards for r in ShardReader(shard.url).read(lambda number: number != 1)]
            assert [record.key for record in records] == ["0000", "0002", "0000"]
        with pytest.raises(DataError, match="no count for 007"):
            find_shards("memory://bucket/007.tar")
        memory.rm("/bucket/sizes.json")
        with pytest.raises(DataError, match="no sizes.json"):
            find_shards("memory://bucket/000.tar")
        with pytest.raises(DataError, match="no such file: memory://bucket/007.tar"):
            list(ShardReader("memory://bucket/007.tar").read())
    finally:
        memory.rm("/bucket", recursive=True)


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `files`, drops the connection after `drop` bytes of each answer, knows Range if `ranges` is set."""

    files: dict[str, bytes]
    drop: int | None
    ranges: bool
    exchange: bool
    fail: int
    requests: list[str]

    def do_GET(self) -> None:
        self.requests.append(f"{self.path} {self.headers.get('Range', '')}")
        content = self.files.get(self.path)
        if type(self).fail:
            type(self).fail -= 1
            return self.send_error(503)
        if content is None:
            return self.send_error(404)
        start = 0
        if self.ranges and "Range" in self.headers:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("ETag", f'"{len(self.requests) if self.exchange else 0}"')
        self.end_headers()
        end = (
            len(content)
            if self.drop is None
            else (start if self.ranges else self.drop * len(self.requests)) + self.drop
        )
        self.wfile.write(content[start:end])
        return None

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, type[Handler]]]:
    monkeypatch.setattr(urls, "FIRST_PAUSE", 0.001)
    monkeypatch.setenv("no_proxy", "*")
    handler = type(
        "H", (Handler,), {"files": {}, "drop": None, "ranges": True, "exchange": False, "fail": 0, "requests": []}
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", handler
        running.shutdown()


@pytest.mark.parametrize("ranges", [True, False])
def test_http_goes_on_where_it_was_dropped(server: tuple[str, type[Handler]], ranges: bool) -> None:
    address, handler = server
    handler.files = {"/a.tar": tar_bytes(samples(9)), "/sizes.json": b'{"a.tar": 9}'}
    (shard,) = find_shards(address + "/a.tar").shards
    handler.requests.clear()
    handler.drop, handler.ranges = 3001, ranges
    reader = ShardReader(shard.url)
    assert [record.image for record in reader.read()] == [bytes([n]) * (700 + n) for n in range(9)]
    assert (reader.count, reader.truncated) == (9, None)
    assert len(handler.requests) > 3
    assert all("bytes=" in request for request in handler.requests[1:])


def test_http_passes_over_by_range(server: tuple[str, type[Handler]]) -> None:
    address, handler = server
    big = [(f"{n}.{e}", c) for n in range(3) for e, c in (("jpg", bytes(2**21)), ("cls", b"1"))]
    handler.files = {"/a.tar": tar_bytes(big)}
    records = list(ShardReader(address + "/a.tar").read(lambda number: number == 2))
    assert [(record.key, len(record.image or b"")) for record in records] == [("2", 2**21)]
    assert len(handler.requests) == 3


def test_http_failures(server: tuple[str, type[Handler]]) -> None:
    address, handler = server
    handler.files = {"/a.tar": tar_bytes(samples(9)), "/page.tar": b"<html>"}
    handler.fail = 2
    assert len(list(ShardReader(address + "/a.tar").read())) == 9
    handler.fail = 99
    with pytest.raises(DataError, match="HTTP 503 .5 attempts"):
        list(ShardReader(address + "/a.tar").read())
    handler.fail = 0
    with pytest.raises(DataError, match="HTTP 404"):
        list(ShardReader(address + "/none.tar").read())
    with pytest.raises(DataError, match="HTML"):
        list(ShardReader(address + "/page.tar").read())
    with pytest.raises(DataError, match="no sizes.json"):
        find_shards(address + "/a.tar")
    handler.drop, handler.exchange = 3001, True
    with pytest.raises(DataError, match="changed while it was read"):
        list(ShardReader(address + "/a.tar").read())
