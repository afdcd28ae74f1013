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

import numpy as np
import pytest
from PIL import Image

from data import DataError
from data.pack import pack
from data.tar import find_shards
from data.transforms import TrainTransform, sample_random
from eval import loading, throughput
from eval.common import Spread, print_table, spread


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
