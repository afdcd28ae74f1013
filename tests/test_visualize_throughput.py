"""The throughput measurement of feature visualisation: the loop it compares with is the published one, and its rows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from data import DataError
from eval import visualizing
from eval.activation import Published, choose_layer, find_layers
from models.classifiers import load_classifier


@pytest.fixture(autouse=True)
def denormals() -> Iterator[None]:
    """Left as every other test expects them."""
    yield
    torch.set_flush_denormal(False)


def test_the_published_loop_is_that_of_the_original(goldens: Path) -> None:
    golden = np.load(goldens / "featurevis.npz")
    _, rounds, steps, blur = golden["params"].tolist()
    classifier = load_classifier(f"cifar_resnet20/{goldens / 'cifar_resnet20.safetensors'}")
    original = visualizing.Original(classifier, choose_layer(find_layers(classifier, (3, 32, 32)), ""))
    search = Published(steps=steps, rounds=rounds, lr=float(golden["lr"]), blur=blur)
    start = torch.from_numpy(golden["init_f64"][1]).permute(2, 0, 1)
    found = original.visualize(int(golden["filters"][1]), start, search)
    assert np.abs(found.permute(1, 2, 0).numpy() - golden["output"][1]).max() < 1e-3
    assert next(classifier.net.parameters()).grad is not None  # as published


def test_measurement_leaves_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    settings = {"device": "cpu", "channels": 2, "share": 200, "steps": 4, "rounds": 2, "rows": str(file)}
    rows = visualizing.main(visualizing.Config(**settings))  # type: ignore[arg-type]
    assert [json.loads(line)["value"] for line in file.read_text().splitlines()] == [row["value"] for row in rows]
    assert [(row["metric"].split()[0], row["competitor"]) for row in rows] == [
        ("seconds", "one by one"),
        ("seconds", "ours, published"),
        ("seconds", "ours, robust"),
        ("speed-up", "ours, published"),
        ("speed-up", "ours, robust"),
    ]
    # One step for each of ten rounds, instead of 2,240; once for each channel, or for both at once.
    assert [row["multiplied"] for row in rows[:3]] == [448, 224, 1]
    assert all(row["value"] > 0 and row["n"] == 2 and row["clock"] == "cpu" for row in rows)
    assert "speed-up, ours, robust against one by one" in capsys.readouterr().out


def test_images_that_differ_are_not_timed() -> None:
    classifier = load_classifier("cifar_resnet20", weights=False)
    original = visualizing.Original(classifier, choose_layer(find_layers(classifier, (3, 32, 32)), ""))
    start = torch.full((3, 32, 32), 0.5)
    with pytest.raises(DataError, match="not timed"):
        visualizing.check(original, lambda search, channels: torch.zeros(channels, 3, 32, 32), start)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"channels": 65}, "65 channels: layer3.2.conv2 of cifar_resnet20 has 64"), ({"model": "lenet"}, "grey")],
)
def test_what_cannot_be_measured_is_one_line(settings: dict[str, object], message: str, tmp_path: Path) -> None:
    options = {"device": "cpu", "channels": 16, "rows": str(tmp_path / "rows.jsonl"), **settings}
    with pytest.raises(DataError, match=message):
        visualizing.main(visualizing.Config(**options))  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_no_gpu_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no CUDA device"):
        visualizing.main(visualizing.Config(rows=str(tmp_path / "rows.jsonl")))
