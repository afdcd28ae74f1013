"""The throughput measurement on small shards: what it counts, and that its rows can be relied on."""

from __future__ import annotations

import io
import itertools
import json
import math
import multiprocessing
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data import DataError
from data.pack import pack
from data.tar import find_shards
from data.transforms import TrainTransform, sample_random
from eval import loading, operations, sweep, throughput
from eval.common import Spread, print_table, run_script, spread
from kernels import bench
from kernels.bench_cases import CASES, CPU_CASES, Target


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Four shards of 40 smooth JPEGs of about 60x80 pixels, two classes."""
    folder = tmp_path_factory.mktemp("throughput")
    rng = np.random.default_rng(0)
    for number in range(160):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        path = folder / "images" / ("a", "b")[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse.resize((80 + number % 7, 60), Image.Resampling.BICUBIC).save(path, quality=90)
    pack(str(folder / "images"), str(folder / "shards"), shard_size=40)
    return str(folder / "shards")


@pytest.mark.parametrize("count", [2, 3, 5, 12])
def test_spread_is_numpys(count: int) -> None:
    values = random.Random(count).sample(range(1000), count)
    found = spread(values)
    np.testing.assert_allclose(
        [found.median, found.p20, found.p80], [np.median(values), *np.percentile(values, [20, 80])], rtol=1e-12
    )
    assert found.n == count


def test_ratios_are_formed_within_rounds() -> None:
    """The middle round is slow for both and still gives its ratio."""
    assert loading.ratio([200, 20, 210], [100, 8, 100]) == spread([2.0, 2.5, 2.1])


def test_spread_of_one_and_its_text() -> None:
    assert spread([2.5]) == Spread(2.5, 2.5, 2.5, 1)
    assert str(Spread(1234.5, 1200.2, 1300.0, 5)) == "1,234 (1,200-1,300)"
    assert str(Spread(2.345, 2.2, 2.4, 5)) == "2.35 (2.20-2.40)"


def test_table_is_aligned(capsys: pytest.CaptureFixture) -> None:
    print_table(("name", "x"), [("a", "10"), ("long name", "7")])
    assert capsys.readouterr().out.splitlines() == ["name        x", "a          10", "long name   7"]


def test_cpu_seconds_is_the_kernels_count() -> None:
    deadline = time.process_time() + 0.2
    while time.process_time() < deadline:
        pass
    ticks = 3 / os.sysconf("SC_CLK_TCK")
    assert loading.cpu_seconds(os.getpid()) == pytest.approx(time.process_time(), abs=ticks)


def test_time_batches_counts_steady_state_only() -> None:
    """The warm-up is not counted, images are counted in whole batches, and CPU time goes to who spent it."""
    served = []

    def batches() -> Iterator[int]:
        for number in itertools.count():
            deadline = time.process_time() + 0.01
            while time.process_time() < deadline:
                pass
            served.append(number)
            yield number

    rate = loading.time_batches(batches(), workers=0, images=3 * loading.BATCH - 1)
    assert rate.images == 3 * loading.BATCH
    assert len(served) == 2 + 3
    assert 0.03 <= rate.main < 0.05  # with the warm-up it would be 0.05
    assert rate.workers == 0
    assert rate.per_cpu_second == rate.images / rate.main
    assert rate.wall >= 0.03


@pytest.mark.timeout(120)
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("pipeline", [loading.webdataset_batches, loading.our_batches])
def test_pipelines_use_the_workers_and_end_them(pipeline: object, workers: int, shards: str) -> None:
    assert callable(pipeline)
    rate = loading.time_batches(pipeline(find_shards(shards), workers, 32), workers, images=640)
    assert rate.images == 640
    assert (rate.workers > 0) == (workers > 0)
    assert multiprocessing.active_children() == []


def test_pipelines_deliver_alike_batches(shards: str) -> None:
    """Both give batches of one shape and type with the labels of the shards."""
    images, labels, keys = next(iter(loading.webdataset_batches(find_shards(shards), 0, 32)))
    with loading.our_batches(find_shards(shards), 0, 32) as ours:
        batch = next(ours)
    assert images.shape == batch["image"].shape == (loading.BATCH, 3, 32, 32)
    assert images.dtype == batch["image"].dtype
    assert set(labels.tolist()) == set(batch["label"].tolist()) == {0, 1}
    assert len(set(keys)) == loading.BATCH


@pytest.mark.timeout(200)
def test_rows_table_and_figure(shards: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = loading.Config(
        data=shards,
        workers=(0, 1, 2),
        images=128,
        rounds=2,
        size=32,
        rows=str(tmp_path / "deep" / "rows.jsonl"),
        figure=str(tmp_path / "figure.png"),
    )
    rows = loading.main(config)
    assert [json.loads(line) for line in Path(config.rows).read_text().splitlines()] == json.loads(json.dumps(rows))
    by_name = {(row["metric"], row["subject"], row["workers"]): row for row in rows}
    assert len(by_name) == len(rows)
    for row in rows:
        assert 0 < row["p20"] <= row["value"] <= row["p80"]
        assert row["fingerprint"] == find_shards(shards).fingerprint
        assert {"commit", "versions", "processor", "cores", "date", "config", "device"} <= set(row)
    for workers in (0, 1, 2):
        for metric in ("pipeline images per second", "pipeline images per CPU second"):
            assert {(metric, "ours", workers), (metric, "webdataset", workers)} <= set(by_name)
    assert ("rate over workers times the rate of one", "ours", 2) in by_name
    table = capsys.readouterr().out.splitlines()
    assert len(table) == len(rows) + 3
    with Image.open(config.figure) as figure:
        assert figure.size == (1500, 600)


def test_psnr_is_that_of_equal_crops(shards: str) -> None:
    images = list(loading.read_images(find_shards(shards)))[:3]
    found = loading.psnr(images, 32)["PSNR, dB", "ours against pil", None]
    values = []
    for number, data in enumerate(images):
        one, other = (
            TrainTransform(32, decoder=decoder)(data, sample_random(0, 0, number)).numpy().astype(np.float64)
            for decoder in ("torchvision", "pil")
        )
        values.append(20 * math.log10(255 / np.sqrt(((one - other) ** 2).mean())))
    assert found.median == pytest.approx(np.median(values), abs=1e-3)
    assert found.median > 45
    assert found.n == 3


def test_enlarged_shards(shards: str, tmp_path: Path) -> None:
    folder = loading.enlarged(find_shards(shards), 120, 40, tmp_path)
    found = find_shards(folder)
    assert found.num_samples == 40
    assert len(found.shards) == 8
    for data in loading.read_images(found):
        with Image.open(io.BytesIO(data)) as image:
            assert min(image.size) == 120
            assert image.format == "JPEG"


def test_wrong_commands_are_one_line(shards: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for arguments in (["data", "--workers", "1,x"], ["data", "--image", "3"], ["dat"], ["data", "--rounds", "0"]):
        with pytest.raises(SystemExit) as stop:
            throughput.main(arguments)
        assert stop.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1
    rows = str(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match="4 shards for 5 workers"):
        throughput.main(["data", "--data", shards, "--workers", "5", "--rows", rows])
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot write .*/file/rows.jsonl: "):
        throughput.main(["data", "--data", shards, "--rows", str(tmp_path / "file" / "rows.jsonl")])
    with pytest.raises(DataError, match="nowhere"):
        throughput.main(["data", "--data", "/nowhere/at/all", "--rows", rows])


# -------------------------------------------------------------------------------------------------------------- kernels


@pytest.mark.timeout(200)
def test_kernels_rows_table_and_figure(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows, figure = tmp_path / "deep" / "rows.jsonl", tmp_path / "figure.png"
    options = ["--device", "cpu", "--rounds", "3", "--rows", str(rows), "--figure", str(figure)]
    found = throughput.main(["kernels", *options])
    assert isinstance(found, list)
    assert [json.loads(line) for line in rows.read_text().splitlines()] == json.loads(json.dumps(found))
    assert "NaN" not in rows.read_text()
    for row in found:
        assert row["p20"] <= row["value"] <= row["p80"]
        assert {"commit", "versions", "processor", "date", "config", "device", "threads", "n"} <= set(row)
    assert [row["metric"] for row in found if "case" not in row] == ["copy bandwidth, GB/s"] + 2 * [
        "matrix products, TFLOP/s"
    ]
    assert not [row for row in found if row["metric"] == "failed"]
    timed = [row for row in found if row["metric"] == "time, us"]
    assert {row["case"] for row in timed} == {case.name for case in CPU_CASES}
    assert {(row["phase"], row["clock"], row["n"]) for row in timed} == {
        (phase, "cpu", 3) for phase in ("forward", "backward", "both", "step")
    }
    ratios = {(row["case"], row["phase"], row["against"]) for row in found if row["metric"] == "speed-up"}
    for case in CPU_CASES:
        for phase in case.phases:
            assert (case.name, phase, "eager") in ratios
    assert {against for _, _, against in ratios} >= {
        "eager",
        "torchattacks",
        "robustness",
        "smoothadv",
        "one by one",
        "einsum",
    }
    printed = capsys.readouterr()
    assert "`ours` is the reference" in printed.out
    for case in CPU_CASES:
        assert case.name in printed.out
        assert case.name in printed.err
    with Image.open(figure) as image:
        assert image.size[0] == 1350


def measured(case: Any, against: str, values: tuple[float, ...], target: Target | None = None) -> dict[str, Any]:
    details = {"against": against, "clock": "gpu"}
    found = bench.Measurement("speed-up", values, case, case.whole, "ours", target, details)
    return {**operations.row(found), "device": "a GPU", "versions": {}, "commit": "0"}


def test_kernels_verdicts(capsys: pytest.CaptureFixture) -> None:
    """Targets are judged by medians; what torch.compile does faster in most rounds is listed."""
    case = CASES[0]
    target = Target("speed-up", "both", 1.15, 1.35, "compile")
    absent = bench.Measurement("absent", (1.0,), case, "both", "ours", target, {"error": "?", "against": "eager"})
    rows = [
        measured(case, "compile", (1.0, 1.2, 9.0), target),
        measured(case, "compile", (1.4, 1.4, 1.0), target),
        measured(CASES[1], "compile", (0.9, 0.95, 0.99)),
        measured(CASES[2], "compile", (0.9, 0.95, 1.2)),
        measured(CASES[3], "eager", (0.5, 0.5, 0.5)),
        {**operations.row(absent), "clock": "gpu", "device": "a GPU"},
    ]
    assert [row.get("verdict") for row in rows] == ["must", "stretch", None, None, None, "not measured"]
    assert operations.slower_than_compiled(rows) == [rows[2]]
    operations.report(rows)
    printed = capsys.readouterr().out
    assert "must: 1 of 3" in printed
    assert "not measured: 1 of 3" in printed
    assert "not to be the default there:\n  " + CASES[1].name in printed


@pytest.mark.parametrize("path", ["out.png", "out.nothing"])
def test_kernels_figure(path: str, tmp_path: Path) -> None:
    """Every case and all three markers; a wrong extension is one line."""
    rows = []
    for number, case in enumerate(CASES):
        for place, competitor in enumerate(("ours", "compile", "eager", "products")):
            over = 1.1 + 0.3 * place + 0.01 * number
            details = {"clock": "gpu", "over_floor": over, "flops": 1, "tflop_per_s": 1.0}
            found = bench.Measurement("time, us", (9.0, 10.0, 12.0), case, case.whole, competitor, None, details)
            rows.append({**operations.row(found), "device": "a GPU"})
    if path == "out.png":
        operations.draw(rows, str(tmp_path / path))
        with Image.open(tmp_path / path) as image:
            assert image.size[1] > 1000
    else:
        with pytest.raises(DataError, match="cannot write the figure"):
            operations.draw(rows, str(tmp_path / path))
    with pytest.raises(DataError, match="nothing to draw"):
        operations.draw([], str(tmp_path / path))


def test_wrong_kernels_commands_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments in (
        ["--device", "tpu"],
        ["--operation", "softmax"],
        ["--suite", "large"],
        ["--compile", "maybe"],
        ["--rounds", "0"],
        ["--minutes", "-1"],
        ["--nothing", "1"],
    ):
        with pytest.raises(SystemExit) as stop:
            throughput.main(["kernels", *arguments])
        assert stop.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        run_script(lambda: throughput.main(["kernels", "--rows", str(tmp_path / "rows.jsonl")]))
    assert stop.value.code == 1
    assert capsys.readouterr().err == "error: no CUDA device here; --device cpu runs small shapes\n"
    with pytest.raises(DataError, match="the full suite has shapes for a GPU"):
        throughput.main(["kernels", "--device", "cpu", "--suite", "full"])
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot write .*/file/rows.jsonl: "):
        throughput.main(["kernels", "--device", "cpu", "--rows", str(tmp_path / "file" / "rows.jsonl")])


def test_kernels_fail_if_ours_did(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One case fails, the others are measured, rows and table are there, the exit code is 1."""
    monkeypatch.setattr(bench, "CPU_CASES", CPU_CASES[5:7])

    def broken(case: Any, compilers: Any, device: Any) -> Any:
        if case is CPU_CASES[5]:
            raise RuntimeError("broken")
        return trial(case, compilers, device)

    trial = bench.TRIALS["pgd_step"]
    monkeypatch.setitem(bench.TRIALS, "pgd_step", broken)
    rows = tmp_path / "rows.jsonl"
    with pytest.raises(SystemExit) as stop:
        run_script(lambda: throughput.main(["kernels", "--device", "cpu", "--rounds", "1", "--rows", str(rows)]))
    assert stop.value.code == 1
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1] == f"error: ours failed in 1 of 2 cases: {CPU_CASES[5].name}"
    assert f"failed: ours in {CPU_CASES[5].name}: RuntimeError: broken" in printed.out
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert {row["case"] for row in found if row["metric"] == "time, us"} == {CPU_CASES[6].name}


PROBE = ["probe", "--device", "cpu", "--heads", "3,5", "--classes", "4", "--width", "6", "--batch_size", "8"]


def test_probe_rows_table_and_figure(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Every figure of a small grid and a small cache; they are made from the rows."""
    file, figure = tmp_path / "rows.jsonl", tmp_path / "probe.png"
    sizes = ["--steps", "3", "--rounds", "2", "--cache_samples", "2500"]
    throughput.main([*PROBE, *sizes, "--rows", str(file), "--figure", str(figure)])
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    times = [row for row in rows if row["metric"] == "time per head and step, ms"]
    cases = {(row["heads"], row["precision"], row["competitor"]) for row in times}
    assert cases == set(itertools.product((3, 5), ("fp32", "bf16"), sweep.COLOURS))
    ratios = [row for row in rows if row["metric"] == "loop / ours"]
    assert len(ratios) == 8
    assert all(row["target"] == 1.0 and row["value"] > 0 for row in ratios)
    cache = {row["metric"]: row["value"] for row in rows if row["heads"] is None}
    assert 2500 * 6 * 2 / 1e6 < cache["cache, MB"] < 0.1  # features, and 16 bytes a sample of labels and numbers
    assert cache["planned for ImageNet, MB"] == pytest.approx(1_281_167 * 6 * 2 / 1e6)
    assert cache["planned for ImageNet, files"] == 64
    assert all(row["commit"] and row["versions"]["torch"] for row in rows)
    out = capsys.readouterr().out
    assert "5 heads, bf16" in out
    assert "cache of 2,500 samples" in out
    with Image.open(figure) as image:
        assert image.size[0] > 500


def test_probe_does_not_time_other_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from train.heads import HeadBlock

    step = HeadBlock.step
    monkeypatch.setattr(
        HeadBlock, "step", lambda self, features, labels, share: step(self, features, labels, 0.9 * share)
    )
    with pytest.raises(DataError, match="differ from those trained alone by .*: nothing was timed"):
        throughput.main([*PROBE, "--rows", str(tmp_path / "rows.jsonl")])
    assert not (tmp_path / "rows.jsonl").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--heads", "0"], "heads"),
        (["--heads", "8;52"], "heads"),
        (["--precision", "fp8"], "precision"),
        (["--figure", "probe.txt"], "must end in .png"),
        (["--steps", "1"], "--steps must be at least 2"),
        (["--device", "cuda"], "no CUDA device"),
    ],
)
def test_wrong_probe_commands_are_one_line(
    flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        run_script(lambda: throughput.main([*PROBE, *flags]))
    assert end.value.code in (1, 2)
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert said in message
