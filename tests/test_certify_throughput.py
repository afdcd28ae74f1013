"""The throughput measurement of certification: that the loop it compares with is the published one, and its rows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from data import DataError
from eval import certifying
from models.classifiers import load_classifier


@pytest.fixture(autouse=True)
def denormals() -> Iterator[None]:
    """Left as every other test expects them."""
    yield
    torch.set_flush_denormal(False)


def test_the_originals_network_gives_the_originals_answers(goldens: Path) -> None:
    golden = np.load(goldens / "smoothing_pipeline.npz")
    original = certifying.Original(load_classifier(f"cifar_resnet20/{goldens / 'cifar_resnet20.safetensors'}"))
    image = torch.from_numpy(golden["images_u8"][3]).float() / 255
    noise = torch.from_numpy(golden["unit_noise_q"]).float() * float(golden["unit_noise_scale"])
    with torch.no_grad():
        said = original.base_classifier(image + float(golden["sigma"]) * noise).argmax(1)
    np.testing.assert_array_equal(said.numpy(), golden["base_pred"][3])


def test_the_original_counts_each_copy_once() -> None:
    classifier, image = certifying.build("lenet", "cpu")
    original = certifying.Original(classifier)
    counts = original._sample_noise(image, 70, 30)
    assert counts.sum() == 70
    selected, votes = original.certify(image, 20, 50, 30)
    assert 0 <= selected < 10
    assert 0 <= votes <= 50


def test_measurement_leaves_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    settings = {"device": "cpu", "model": "lenet", "n0": 25, "n": 50, "batch_sizes": (25, 50), "rounds": 2}
    rows = certifying.main(certifying.Config(**settings, bf16="no", compile=False, rows=str(file)))  # type: ignore[arg-type]
    assert [json.loads(line)["value"] for line in file.read_text().splitlines()] == [row["value"] for row in rows]
    competitors = ["original, batch 25", "original, batch 50", "ours"]
    assert [row["competitor"] for row in rows if row["metric"].startswith("seconds")] == competitors
    (ratio,) = (row for row in rows if row["metric"] == "speed-up")
    assert ratio["against"].startswith("original")
    assert all(row["value"] > 0 and row["n"] == 2 and row["clock"] == "cpu" for row in rows)
    assert "speed-up, ours against original" in capsys.readouterr().out


def test_networks_that_differ_are_not_timed() -> None:
    classifier, image = certifying.build("lenet", "cpu")
    with pytest.raises(DataError, match="not timed"):
        certifying.check(certifying.Original(classifier), lambda images: -classifier(images), image, 0.97)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_no_gpu_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no CUDA device"):
        certifying.main(certifying.Config(rows=str(tmp_path / "rows.jsonl")))
