"""Benchmarks of the whole step, of several processes, and the model of many GPUs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from data import DataError
from eval import forecast, scaling, stepping
from eval.throughput import main, parse
from models.encoders import load_encoder

SMALL: dict[str, Any] = {"teacher": "cifar_resnet20", "device": "cpu", "precision": "no", "batch_size": 4, "steps": 1}


def values(rows: list[dict[str, Any]]) -> dict[tuple[str, ...], float]:
    return {(row["metric"], row["subject"], row["images"]): row["value"] for row in rows}


# ----------------------------------------------------------------------------------------------------------- the step


@pytest.mark.timeout(200)
def test_a_step_is_measured_on_synthetic_and_streamed_images(tmp_path: Path) -> None:
    config = stepping.Config(
        **SMALL,
        data="demo",
        workers=1,
        rounds=2,
        rows=str(tmp_path / "rows.jsonl"),
        figure=str(tmp_path / "step.png"),
    )
    rows = stepping.main(config)
    assert [json.loads(line) for line in Path(config.rows).read_text().splitlines()] == rows
    found = values(rows)
    for way in (("ours", "synthetic"), ("published", "synthetic"), ("ours", "streamed"), ("published", "streamed")):
        assert found["images/s", *way] > 0
    parts = sum(found[f"{name}, % of a step", "ours", "synthetic"] for name in stepping.PART_COLOURS)
    assert parts == pytest.approx(100, abs=15)  # medians of shares
    assert 0 <= found["waiting for data, %", "ours", "streamed"] <= 100
    # A rate, operations for an image and the rate of products make the share of the latter.
    rate, flops = found["images/s", "ours", "synthetic"], found["GFLOP per image", "ours", "synthetic"]
    products = found["measured matrix products, TFLOP/s", "ours", "synthetic"]
    assert found["MFU, %", "ours", "synthetic"] == pytest.approx(100 * rate * flops / products / 1e3, rel=1e-6)
    assert found["checkpoint, MB", "ours", "synthetic"] == pytest.approx(12 * 0.27, rel=0.1)  # weights and two moments
    assert all(row["commit"] and row["config"]["teacher"] == "cifar_resnet20" for row in rows)
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".checkpoints-*"))


@pytest.mark.parametrize(("name", "gflop"), [("open_clip:RN50", 48.87), ("open_clip:ViT-B-16", 140.3)])
def test_operations_are_the_known_ones(name: str, gflop: float) -> None:
    """A teacher's forward pass and a student's forward and backward pass: counted elsewhere, on the meta device too."""
    with torch.device("meta"):
        encoder = load_encoder(name, weights=False)
    assert stepping.flops_of_image(encoder, encoder) / 1e9 == pytest.approx(gflop, rel=0.01)


def test_two_ways_with_other_losses_are_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The published step on images that are a little darker."""
    step = stepping.Published.step
    monkeypatch.setattr(stepping.Published, "step", lambda self, images: step(self, images * 0.97))
    with pytest.raises(DataError, match="losses of step 0 differ: ours .* published .* nothing was timed"):
        stepping.main(stepping.Config(**SMALL, rounds=1, rows=str(tmp_path / "rows.jsonl")))
    assert not (tmp_path / "rows.jsonl").exists()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--student", "lenet"], "84 features, the teacher has 64"),
        (["--figure", "step.txt"], "must end in .png"),
        (["--teacher", "resnet2"], "did you mean"),
        (["--data", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_measured_is_one_line(flags: list[str], expected: str, tmp_path: Path) -> None:
    from models import ModelError

    rows = ["--rows", str(tmp_path / "rows.jsonl"), "--rounds", "1", "--steps", "1", "--batch_size", "2"]
    with pytest.raises((DataError, ModelError), match=expected):
        main(["step", "--device", "cpu", "--precision", "no", "--teacher", "cifar_resnet20", *rows, *flags])


def test_targets_belong_to_their_device_and_model() -> None:
    def targets(metric: str, **changes: Any) -> tuple[float | None, float | None]:
        return stepping.Figure(metric, stepping.spread([1.0])).targets(stepping.Config(**changes))

    assert targets("MFU, %") == (25.0, 30.0)
    assert targets("MFU, %", teacher="open_clip:ViT-B-16") == (42.0, 52.0)
    assert targets("MFU, %", teacher="cifar_resnet20") == (None, None)
    assert targets("MFU, %", device="cpu") == (None, None)
    assert targets("streamed / synthetic", teacher="cifar_resnet20") == (0.95, None)
    assert targets("training waits, % of writing at once", device="cpu") == (5.0, None)


# ------------------------------------------------------------------------------------------------- several processes


@pytest.mark.launch
@pytest.mark.timeout(250)
def test_several_processes_are_measured(tmp_path: Path) -> None:
    import os

    if (os.cpu_count() or 1) < 2:
        pytest.skip("one core")
    config = scaling.Config(
        **SMALL, processes=(1, 2), rounds=1, rows=str(tmp_path / "rows.jsonl"), figure=str(tmp_path / "scaling.svg")
    )
    rows = scaling.main(config)
    found = {(row["metric"], row["processes"]): row["value"] for row in rows}
    assert found["efficiency, %", 1] == pytest.approx(100)
    assert found["efficiency, %", 2] == pytest.approx(50 * found["images/s", 2] / found["images/s", 1])
    assert found["vote, ms", 2] > found["vote, ms", 1] >= 0
    assert found["exchange alone, ms", 2] > 0
    assert ("exchange alone, ms", 1) not in found
    assert (tmp_path / "scaling.svg").read_text().startswith("<?xml")


def test_more_processes_than_devices_are_refused() -> None:
    with pytest.raises(DataError, match="100000 processes for"):
        scaling.main(scaling.Config(**SMALL, processes=(1, 100_000)))
    with pytest.raises(DataError, match="must include 1"):
        main(["scaling", "--device", "cpu", "--processes", "2"])


def test_figures_of_several_processes() -> None:
    """Two processes: 20 MB in 4 ms, of which a step of 100 ms hides 3."""
    run = {"step": 0.100, "step without exchange": 0.099, "exchange": 0.004, "vote": 0.001}
    one = {**run, "gradient bytes": 2e7, "images": 64.0}
    found = scaling.metrics([{**one, "images": 128.0}], [{**one, "step": 0.090}], 2)
    assert found["images/s"] == [1280]
    assert found["efficiency, %"] == pytest.approx([90])
    assert found["exchange of gradients, % of a step"] == pytest.approx([1])
    assert found["exchange alone, GB/s"] == pytest.approx([5])


# ------------------------------------------------------------------------------------------------------ the forecast


def test_forecast_by_hand() -> None:
    config = forecast.Config(
        images_per_second=1000,
        batch_size=100,
        parameters=25e6,
        nvlink_gb=100,
        network_gb=10,
        message_ms=0.5,
        image_kb=100,
        decoded_per_core=250,
        disk_mb=100,
        save_every=100,
        gpu_hours_per_failure=64_000,
        restart_minutes=1,
        store_gb=1,
        shards=1000,
    )
    found = forecast.forecast(config, 64)
    assert found.step == pytest.approx(100)
    assert found.cores == 4
    assert found.partial == pytest.approx(3.2)
    assert found.store == pytest.approx(6.4 * 1.032)
    # 100 MB: 7/4 of it at 100 GB/s inside of a machine, 7/4 of it at 10 GB/s between the eight.
    assert found.exchange == pytest.approx(1.75 + 17.5)
    assert found.messages == 28  # a grid of 8 by 8
    assert found.vote == pytest.approx(14)
    assert found.flat_vote == pytest.approx(63)
    assert found.writing == pytest.approx(30)  # 300 MB in 3 s, every 10 s
    assert found.lost == pytest.approx(100 * (5 + 60) / 3_600_000)
    assert found.bounds == ("the store: 7 of 1 GB/s",)


def test_what_does_not_fit_is_named_worst_first() -> None:
    config = forecast.Config(decoded_per_core=100, store_gb=1e9)
    assert forecast.forecast(config, 8).bounds == ("decoding: 45.0 of 16 cores a GPU",)
    slow = forecast.Config(message_ms=20, disk_mb=1, store_gb=1e9)
    assert [bound.partition(":")[0] for bound in forecast.forecast(slow, 512).bounds] == ["vote", "checkpoints"]


def test_gpus_must_fill_their_machines() -> None:
    with pytest.raises(DataError, match="12 GPUs do not fill nodes of 8"):
        main(["forecast", "--gpus", "8,12"])


@pytest.mark.parametrize("flags", ["step --steps 0", "scaling --processes 0", "forecast --gpus ,"])
def test_impossible_numbers_exit_with_2(flags: str) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(flags.split())
    assert ended.value.code == 2


def test_the_published_forecast_is_the_models() -> None:
    """The table of docs/multi_node.md, line by line."""
    page = (Path(__file__).resolve().parents[1] / "docs" / "multi_node.md").read_text()
    for cells in forecast.table(forecast.Config()):
        assert f"| {' | '.join(cells)} |" in page
