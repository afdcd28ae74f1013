"""Probes: heads against torch and scikit-learn, the script's runs, resumption, equal worlds, faults in one line."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data import DataError, features
from data.features import open_features
from models import ModelError
from models.encoders import Encoder, load_encoder
from models.heads import load_head
from tests.ranks import Script, run_two
from tests.test_heads import CPU, OneProcess, objective, problem, sklearn_optimum, stored, trained_alone
from train import probing
from train.common import RECIPES, ConfigError, StopRequested, parse_config
from train.heads import HeadBlock, Point, held_out, score
from train.probe import Config, main

ROOT = Path(__file__).resolve().parents[1]
DRAW = probing.draw_grid


# ----------------------------------------------------------------------------------------------------------------------
# The script
# ----------------------------------------------------------------------------------------------------------------------


def write_shards(folder: Path, labels: Sequence[int], classes: Sequence[str] | None = None, cuts: int = 2) -> Path:
    """Small PNGs whose colour tells the class."""
    import webdataset
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    sizes = {}
    for shard, part in enumerate(np.array_split(np.arange(len(labels)), cuts)):
        name = f"{shard:06d}.tar"
        with webdataset.TarWriter(str(folder / name), encoder=False) as writer:
            for i in part:
                pixels = generator.integers(0, 100, (8, 8, 3)) + 60 * np.array([labels[i] % 3, labels[i] // 3, 1])
                buffer = io.BytesIO()
                Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
                writer.write({"__key__": f"{i:05d}", "png": buffer.getvalue(), "cls": str(labels[i]).encode()})
        sizes[name] = len(part)
    if classes is None:
        (folder / "sizes.json").write_text(json.dumps(sizes))
    else:
        split = {"filenames": list(sizes), "shard_lengths": list(sizes.values())}
        info = {"splits": {"train": split}, "num_classes": len(classes), "classes": list(classes)}
        (folder / "_info.json").write_text(json.dumps(info))
    return folder


NAMES = ["ant", "bee", "cow", "dog", "eel"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """301 samples of five classes, in two shards of 151 and 150."""
    return write_shards(tmp_path_factory.mktemp("probe") / "shards", [i * i % 5 and i % 5 for i in range(301)], NAMES)


@pytest.fixture
def settings(shards: Path, tiny_vit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Ten heads in four blocks; half a second in this process, without the figure, which would take as long again."""
    monkeypatch.setattr(probing, "draw_grid", lambda *_: None)
    return {
        "data": str(shards),
        "encoder": tiny_vit,
        "lr": [1e-3, 3e-3, 1e-2, 3e-2, 1e-1],
        "weight_decay": [1e-3],
        "batch_size": 64,
        "epochs": 5,
        "warmup_steps": 3,
        "workers": 0,
        "cache": str(tmp_path / "cache"),
        "out": str(tmp_path / "run"),
    }


def table(out: str | Path) -> list[dict[str, str]]:
    with open(Path(out) / "grid.csv", newline="") as file:
        return list(csv.DictReader(file))


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_run_finds_the_classes_and_leaves_what_it_promises(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probing, "draw_grid", DRAW)
    result = main(Config(**settings))
    out = Path(settings["out"])
    assert result["accuracy"] > 0.8
    for name in ("config.yaml", "env.json", "metrics.jsonl", "grid.csv", "grid.png", "grid.svg", "head.safetensors"):
        assert (out / name).stat().st_size > 0, name
    rows = table(out)
    assert len(rows) == 10
    (chosen,) = (row for row in rows if row["chosen"] == "1")
    assert int(chosen["correct"]) == max(int(row["correct"]) for row in rows)
    assert float(chosen["accuracy"]) == result["accuracy"] == int(chosen["correct"]) / int(chosen["n"])
    logged = lines(out / "metrics.jsonl")
    assert len(logged) == 10 * 6
    assert {row["epoch"] for row in logged} == set(range(6))
    assert [row["correct"] for row in logged[-10:]] == [int(row["correct"]) for row in rows]
    (row,) = lines(out / "results.jsonl")
    assert row["metric"] == "probe_holdout_accuracy"
    assert {"commit", "versions", "date", "config", "seed", "data_fingerprint", "n", "point"} <= row.keys()

    head = load_head(out / "head.safetensors", NAMES, 24)
    assert head.normalize == result["point"]["normalize"]
    assert head.metadata["encoder_sha256"] == row["weights_sha256"]
    assert head.metadata["point"] == row["point"] == result["point"]
    # the saved head, on the cached rows that were held out, scores what was reported
    cache = next(Path(settings["cache"]).iterdir())
    kept = open_features(cache)
    assert (kept.rows, kept.identity.classes) == (301, tuple(NAMES))
    out_rows = held_out(kept.index, 0.1).nonzero().flatten()
    correct, _ = score(head.weight[None], head.bias[None], head.normalize, kept, out_rows, CPU)
    assert (correct.item(), len(out_rows)) == (row["correct"], row["n"])


def test_features_are_those_of_the_encoder_in_evaluation_mode(settings: dict[str, Any], goldens: Path) -> None:
    from data.stream import open_pass
    from data.transforms import EvalTransform, unit_interval

    settings |= {"encoder": f"cifar_resnet20/{goldens / 'cifar_resnet20.safetensors'}", "dtype": "fp32", "epochs": 1}
    main(Config(**settings))
    kept = open_features(next(Path(settings["cache"]).iterdir()))
    encoder = load_encoder(settings["encoder"]).eval()
    with open_pass(settings["data"], batch_size=301, transform=EvalTransform(32)) as batches, torch.no_grad():
        (batch,) = batches
        expected = encoder(unit_interval(batch["image"]))
    assert torch.allclose(kept.take(torch.arange(301)), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(kept.labels, batch["label"])


def test_a_second_run_takes_the_features_that_are_there(settings: dict[str, Any], monkeypatch: Any) -> None:
    main(Config(**settings))
    head = (Path(settings["out"]) / "head.safetensors").read_bytes()
    monkeypatch.setattr(Encoder, "forward", lambda *_: pytest.fail("the encoder ran again"))
    again = main(Config(**settings))  # the same run once more: the same head, no second result
    assert load_head(Path(settings["out"]) / "head.safetensors").metadata["accuracy"] == again["accuracy"]
    assert len(head) == (Path(settings["out"]) / "head.safetensors").stat().st_size
    assert len(lines(Path(settings["out"]) / "results.jsonl")) == 1
    assert len(lines(Path(settings["out"]) / "metrics.jsonl")) == 60
    other = {"solver": "lbfgs", "lr": [], "weight_decay": [], "penalty": [1e-3], "out": settings["out"] + "2"}
    main(Config(**{**settings, **other}))
    with pytest.raises(ConfigError, match="holds a run with other settings.*epochs 5 -> 6.*choose another"):
        main(Config(**{**settings, "epochs": 6}))


@pytest.mark.parametrize("change", ["weights", "data", "preprocessing", "dtype"])
def test_other_weights_data_or_preprocessing_never_meet_the_cache(
    change: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    def weights(seed: int) -> str:
        torch.manual_seed(seed)
        state = load_encoder("cifar_resnet20", weights=False).tower.state_dict()
        save_file(dict(state), tmp_path / "w.safetensors")
        return f"cifar_resnet20/{tmp_path / 'w.safetensors'}"

    settings |= {"encoder": weights(0), "epochs": 1}
    first = main(Config(**settings))
    settings |= {"out": str(tmp_path / "second")}
    if change == "weights":
        weights(1)  # under the same name
    elif change == "data":
        settings["data"] = str(write_shards(tmp_path / "shards", [i % 5 for i in range(290)], NAMES))
    elif change == "preprocessing":
        settings["decoder"] = "pil"
    else:
        settings["dtype"] = "fp32"
    second = main(Config(**settings))
    assert first["features"] != second["features"]
    assert len(list(Path(settings["cache"]).iterdir())) == 2


def test_refit_trains_the_chosen_head_on_all_rows(settings: dict[str, Any], tmp_path: Path) -> None:
    plain = main(Config(**settings))
    refit = main(Config(**{**settings, "refit": True, "out": str(tmp_path / "refit")}))
    assert (refit["best"], refit["accuracy"]) == (plain["best"], plain["accuracy"])
    assert (plain["trained_on"], refit["trained_on"]) == (301 - plain["accuracy_n"], 301)
    point = {name: [value] for name, value in plain["point"].items()}
    everything = main(Config(**{**settings, **point, "holdout": 0.0, "out": str(tmp_path / "everything")}))
    a, b = (load_head(tmp_path / name / "head.safetensors") for name in ("refit", "everything"))
    assert torch.allclose(a.weight, b.weight, atol=1e-6)
    assert everything["accuracy_on"] == "train"


def test_single_is_the_published_protocol(settings: dict[str, Any], tmp_path: Path) -> None:
    settings |= {"single": True, "dtype": "fp32", "lr": [], "weight_decay": []}
    result = main(Config(**settings))
    assert (result["trained_on"], result["accuracy_on"], result["accuracy_n"]) == (301, "train", 301)
    kept = open_features(next(Path(settings["cache"]).iterdir()))
    point = Point(False, True, 0.0, lr=1e-3, weight_decay=0.1)
    whole = stored(kept.take(torch.arange(301)), kept.labels, 5)
    weight, bias = trained_alone(point, whole, probing.Schedule(64, 5, 3, 1.0, 0))
    head = load_head(Path(settings["out"]) / "head.safetensors")
    assert (head.weight - weight).abs().max() <= 1e-5
    assert (head.bias - bias).abs().max() <= 1e-5


@pytest.mark.parametrize(("name", "weight_decay"), [("probe_clip", 0.1), ("probe_distilled", 1e-3)])
def test_recipes_are_the_published_ones(name: str, weight_decay: float) -> None:
    argv = ["--config", str(RECIPES / f"{name}.yaml"), "--data", "x"]
    config = parse_config(Config, argv, "test", "probe_demo.yaml")
    assert config.single
    assert (config.lr, config.weight_decay, config.label_smoothing) == ([1e-3], [weight_decay], [0.0])
    assert (config.normalize, config.bias, config.clip) == ([False], [True], 1.0)
    assert (config.batch_size, config.epochs, config.warmup_steps, config.seed) == (256, 10, 500, 0)


def test_shots_take_k_images_of_each_class(settings: dict[str, Any]) -> None:
    result = main(Config(**{**settings, "shots": 4}))
    assert result["trained_on"] == 20
    assert result["accuracy_n"] == int(held_out(torch.arange(301), 0.1).sum())


@pytest.mark.parametrize("solver", ["adamw", "lbfgs"])
def test_layers_and_transform_are_in_the_heads_file(solver: str, settings: dict[str, Any]) -> None:
    """The loaded head, on the encoder's own features, gives the accuracy that the run reports."""
    settings |= {"nonlinear_blocks": 2, "dtype": "fp32"}
    if solver == "lbfgs":
        settings |= {"solver": "lbfgs", "lr": [], "weight_decay": [], "penalty": [1e-3]}
    else:
        settings |= {"mlp_layers": 1, "mlp_kind": "residual", "normalize": [True], "lr": [1e-3, 1e-2]}
    result = main(Config(**settings))
    head = load_head(Path(settings["out"]) / "head.safetensors", NAMES)
    described = {"width": 24, "transform_blocks": 2, "kind": "basic", "layers": 0}
    if solver == "adamw":
        described |= {"kind": "residual", "layers": 1}
    assert head.metadata["encoder"] == settings["encoder"]
    from models.featurisers import featuriser_header

    assert head.featuriser is not None
    assert featuriser_header(head.featuriser) == described
    found = open_features(next(Path(settings["cache"]).iterdir()))
    rows = held_out(found.index, 0.1)
    features = torch.cat(found.pieces)[rows]
    right = int((head.logits(features).argmax(1) == found.labels[rows]).sum())
    assert right == result["table"][result["best"]]["correct"]
    assert result["accuracy"] > 0.6
    assert lines(Path(settings["out"]) / "results.jsonl")[0]["head_sha256"]
    # Another seed is another transform of the same features.
    other = main(Config(**{**settings, "seed": 1, "out": settings["out"] + "2"}))
    assert len(list(Path(settings["cache"]).iterdir())) == 1
    assert other["table"] != result["table"]


def test_heads_start_from_a_zero_shot_head(settings: dict[str, Any], tmp_path: Path) -> None:
    from models.heads import save_head
    from models.weights import state_sha256

    encoder = load_encoder(settings["encoder"])
    weight = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    facts = {"encoder": settings["encoder"], "encoder_sha256": state_sha256(encoder.state_dict())}
    init = tmp_path / "zero_shot.safetensors"
    save_head(init, weight, None, NAMES, normalize=True, metadata=facts)
    settings |= {"init": str(init), "lr": [1e-3, 1e-2], "epochs": 1}
    result = main(Config(**settings))
    assert result["point"]["normalize"] is True
    assert len(result["table"]) == 2  # the start says for which features it is
    untrained = [row for row in lines(Path(settings["out"]) / "metrics.jsonl") if row["epoch"] == 0]
    found = open_features(next(Path(settings["cache"]).iterdir()))
    rows = held_out(found.index, 0.1)
    features = torch.nn.functional.normalize(torch.cat(found.pieces)[rows].float())
    assert untrained[0]["correct"] == int(((features @ weight.T).argmax(1) == found.labels[rows]).sum())
    for change, message in (
        ({"normalize": [False]}, "takes normalised features; leave out --normalize"),
        ({"init": str(tmp_path / "nothing.safetensors")}, "no weight file"),
    ):
        with pytest.raises((ConfigError, ModelError), match=message) as caught:
            main(Config(**{**settings, **change, "out": str(tmp_path / "no")}))
        assert "\n" not in str(caught.value)
    for metadata, classes, message in (
        ({**facts, "encoder_sha256": "0"}, NAMES, "is a head of .*, not of this encoder"),
        (facts, NAMES[::-1], "the same classes in another order"),
    ):
        save_head(init, weight, None, classes, normalize=True, metadata=metadata)
        with pytest.raises(ModelError, match=message):
            main(Config(**{**settings, "out": str(tmp_path / "no")}))


def test_a_reference_is_probed_in_the_same_way(settings: dict[str, Any], goldens: Path) -> None:
    teacher = f"cifar_resnet20/{goldens / 'cifar_resnet20.safetensors'}"
    settings |= {"reference": teacher, "lr": [1e-2]}
    result = main(Config(**settings))
    second = Path(settings["out"]) / "reference"
    assert load_head(second / "head.safetensors").metadata["encoder"] == teacher
    assert load_head(Path(settings["out"]) / "head.safetensors").metadata["encoder"] == settings["encoder"]
    assert result["reference"]["encoder_sha256"] != result["encoder_sha256"]
    assert len(table(second)) == len(table(settings["out"])) == 2
    # Alone it is the same.
    alone = main(Config(**{**settings, "encoder": teacher, "reference": "", "out": settings["out"] + "2"}))
    assert alone["table"] == result["reference"]["table"]


def test_lbfgs_run(settings: dict[str, Any]) -> None:
    settings |= {"solver": "lbfgs", "lr": [], "weight_decay": [], "penalty": [1e-5, 1e-3, 1e-1], "dtype": "fp32"}
    result = main(Config(**settings))
    rows = table(settings["out"])
    assert len(rows) == 6
    assert all(float(row["gap"]) <= 1e-4 for row in rows)
    kept = open_features(next(Path(settings["cache"]).iterdir()))
    train = ~held_out(kept.index, 0.1)
    data = stored(kept.take(torch.arange(301))[train], kept.labels[train], 5)
    point = Point(**result["point"])
    head = load_head(Path(settings["out"]) / "head.safetensors")
    theirs = sklearn_optimum(data, point)
    best = objective(data, point, theirs.coef_, theirs.intercept_)
    assert abs(objective(data, point, head.weight, head.bias) - best) <= 1e-4


def test_shards_without_class_names_get_numbers(settings: dict[str, Any], tiny_shards: Path) -> None:
    main(Config(**{**settings, "data": str(tiny_shards), "holdout": 0.05}))
    assert load_head(Path(settings["out"]) / "head.safetensors").classes == tuple("0123456789")


def test_unusable_images_are_counted_and_a_lenient_cache_is_not_taken_by_a_strict_run(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    folder = write_shards(tmp_path / "bad", [i % 5 for i in range(100)], NAMES)
    shard = bytearray((folder / "000000.tar").read_bytes())
    at = shard.find(b"\x89PNG", 5000)
    shard[at : at + 8] = b"notimage"
    (folder / "000000.tar").write_bytes(shard)
    settings |= {"data": str(folder), "epochs": 1}
    with pytest.raises(DataError, match="max_bad_fraction"):
        main(Config(**{**settings, "max_bad_fraction": 0.0}))
    main(Config(**{**settings, "max_bad_fraction": 0.02}))
    (row,) = lines(Path(settings["out"]) / "results.jsonl")
    assert row["unusable_samples"] == 1
    with pytest.raises(DataError, match="lacks 1 unusable samples"):
        main(Config(**{**settings, "max_bad_fraction": 0.0, "out": str(tmp_path / "strict")}))


# ----------------------------------------------------------------------------------------------------------------------
# Faults
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "classes", "change", "expected"),
    [
        ([0, 1, 2] * 30, NAMES, {}, r"the shards hold no image of 2 of 5 classes \(dog, eel\)"),
        ([0] * 60, ["ant"], {}, r"all 60 images are of one class \(ant\)"),
        ([0, 1] * 30, NAMES[:2], {"holdout": 1e-6}, "holds out none of 60 samples"),
        ([0, 1] * 30, NAMES[:2], {"shots": 60}, "--shots 60: class ant has only"),
        ([0] * 58 + [1] * 2, NAMES[:2], {"holdout": 0.97}, r"--holdout leaves no image of \d of 2 classes"),
        ([0, 5] * 30, NAMES, {}, "labels must start at 0"),
    ],
)
def test_data_that_cannot_be_probed_are_one_line(
    labels: list[int],
    classes: list[str],
    change: dict[str, Any],
    expected: str,
    settings: dict[str, Any],
    tmp_path: Path,
) -> None:
    settings |= {"data": str(write_shards(tmp_path / "shards", labels, classes)), **change}
    with pytest.raises(DataError, match=expected) as caught:
        main(Config(**settings))
    assert "\n" not in str(caught.value)


def test_a_run_that_failed_leaves_its_folder_free(settings: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="--shots 100"):
        main(Config(**{**settings, "shots": 100}))
    assert main(Config(**{**settings, "shots": 5}))["trained_on"] == 25


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"lr": [0.0]}, "--lr"),
        ({"lr": [float("nan")]}, "--lr"),
        ({"lr": [1e-3, 1e-3]}, "given twice"),
        ({"weight_decay": [-1.0]}, "--weight_decay"),
        ({"label_smoothing": [1.5]}, "--label_smoothing"),
        ({"penalty": [1e-3]}, "no meaning with --solver adamw"),
        ({"solver": "lbfgs"}, "--lr has no meaning with --solver lbfgs"),
        ({"solver": "lbfgs", "lr": [], "weight_decay": [], "penalty": [0.0]}, "--penalty"),
        ({"single": True}, "one value of each setting"),
        ({"single": True, "lr": [1e-3], "refit": True}, "no --refit"),
        ({"single": True, "lr": [], "weight_decay": [], "solver": "lbfgs"}, "leave out --solver lbfgs"),
        ({"holdout": 0.0}, "nothing to choose among 10 heads"),
        ({"holdout": 1.0}, r"\[0, 1\)"),
        ({"clip": 0.0}, "--clip"),
        ({"epochs": 0}, "--epochs"),
        ({"shots": -1}, "--shots"),
        ({"shots": 5, "refit": True}, "give one or the other"),
        ({"max_logit_bytes": 0}, "--max_logit_bytes"),
        ({"max_bad_fraction": 2.0}, "--max_bad_fraction"),
        ({"data": ""}, "--data is missing"),
        ({"mlp_layers": -1}, "--mlp_layers must not be negative"),
        ({"solver": "lbfgs", "lr": [], "weight_decay": [], "mlp_layers": 1}, "no meaning with --solver lbfgs"),
        ({"init": "head.safetensors", "nonlinear_blocks": 1}, "--init fits the features of one encoder"),
    ],
)
def test_impossible_settings_are_one_line(change: dict[str, Any], expected: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        Config(**{**settings, **change})
    assert "\n" not in str(caught.value)


def test_wrong_flags_exit_with_2_and_one_line() -> None:
    for flags, expected in ((["--lr", "fast"], "lr"), (["--learning_rate", "1"], "not accepted|unrecognized")):
        result = subprocess.run(
            [sys.executable, "train/probe.py", *flags], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        assert result.returncode == 2
        assert result.stderr.count("\n") == 1, result.stderr
        assert expected.partition("|")[0] in result.stderr or expected.partition("|")[2] in result.stderr


def test_features_that_are_not_finite_are_one_line(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    original = Encoder.forward

    def overflow(self: Encoder, images: Tensor) -> Tensor:
        return original(self, images) * 1e6

    monkeypatch.setattr(Encoder, "forward", overflow)
    with pytest.raises(DataError, match="fp16 cannot hold.*use --dtype"):
        main(Config(**settings))


# ----------------------------------------------------------------------------------------------------------------------
# Stops, kills, several processes
# ----------------------------------------------------------------------------------------------------------------------


def contents(cache: str | Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in Path(cache).glob("*/*") if file.name.startswith("part")}


def test_a_stop_while_extracting_keeps_the_parts_and_goes_on(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "_FEWEST_SAMPLES", 32)  # ten parts
    whole = main(Config(**{**settings, "cache": str(tmp_path / "whole"), "out": str(tmp_path / "a")}))
    original, calls = Encoder.forward, []

    def signal_in_the_fourth(self: Encoder, images: Tensor) -> Tensor:
        calls.append(len(images))
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, images)

    monkeypatch.setattr(Encoder, "forward", signal_in_the_fourth)
    with pytest.raises(StopRequested) as stopped:
        main(Config(**settings))
    assert stopped.value.code == 143
    assert 3 <= len(contents(settings["cache"])) <= 4
    again = main(Config(**settings))
    assert len(calls) <= 4 + 7
    assert contents(settings["cache"]) == contents(tmp_path / "whole")
    assert (again["features"], again["table"]) == (whole["features"], whole["table"])


def test_a_damaged_part_is_computed_again(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(features, "_FEWEST_SAMPLES", 100)
    first = main(Config(**settings))
    before = contents(settings["cache"])
    assert len(before) == 4
    for number, damage in enumerate((lambda b: b[:-100], lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: None)):
        file = next(Path(settings["cache"]).glob(f"*/part_0000{number}*"))
        damaged = damage(file.read_bytes())
        file.unlink()
        if damaged is not None:
            file.write_bytes(damaged)
    second = main(Config(**{**settings, "out": str(tmp_path / "second")}))
    assert contents(settings["cache"]) == before
    assert first["table"] == second["table"]


def test_a_stop_while_training_says_what_is_kept(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    original = HeadBlock.step

    def step(self: HeadBlock, *arguments: Any) -> Tensor:
        os.kill(os.getpid(), signal.SIGINT)
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(HeadBlock, "step", step)
        with pytest.raises(StopRequested, match="the features are kept") as stopped:
            main(Config(**settings))
    assert stopped.value.code == 130
    result = main(Config(**settings))
    assert len(result["table"]) == 10
    assert len(lines(Path(settings["out"]) / "metrics.jsonl")) == 60


def flags(settings: dict[str, Any]) -> list[str]:
    return [f"--{key}={json.dumps(value) if isinstance(value, list) else value}" for key, value in settings.items()]


def test_two_processes_equal_one(settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """301 samples in two parts, ten heads in four blocks: the same feature files, table and head."""
    monkeypatch.setattr(features, "_FEWEST_SAMPLES", 200)
    settings |= {"refit": True, "workers": 1}
    one = {**settings, "out": str(tmp_path / "one"), "cache": str(tmp_path / "cache one")}
    two = {**settings, "out": str(tmp_path / "two"), "cache": str(tmp_path / "cache two")}
    main(Config(**one))
    run_two(main, Config(**two), tmp_path, constants={("data.features", "_FEWEST_SAMPLES"): 200})
    assert json.loads((tmp_path / "two" / "env.json").read_text())[-1]["world"] == 2
    assert len(contents(one["cache"])) == 2
    assert contents(one["cache"]) == contents(two["cache"])
    assert table(one["out"]) == table(two["out"])
    heads = [load_head(Path(each["out"]) / "head.safetensors") for each in (one, two)]
    assert torch.equal(heads[0].weight, heads[1].weight)


@pytest.mark.parametrize("solver", ["adamw", "lbfgs"])
def test_processes_share_the_heads_and_change_no_bit(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten heads by one process, by three, and by twelve, of which some have nothing to do."""
    monkeypatch.setattr(probing, "gather_object", lambda values: values or [{"head": 0, "correct": 0, "accuracy": 0.0}])
    data = problem(n=101)
    rows = probing.Rows(data, torch.arange(20, 101), torch.arange(20), data.identity.classes)
    axis: dict[str, Any] = {"penalty": [1e-3]} if solver == "lbfgs" else {"lr": [1e-3], "weight_decay": [0.1]}
    setting = {name: values[0] for name, values in axis.items()}
    points = [Point(bool(n % 2), n % 3 > 0, 0.02 * n, **setting) for n in range(10)]

    def fit(rank: int, world: int) -> list[probing.Fit]:
        process: Any = OneProcess()
        process.rank, process.world = rank, world
        shared = CPU, process, process, lambda row: None
        if solver == "lbfgs":
            return probing.fit_by_lbfgs(points, rows, *shared)
        return probing.fit_by_adamw(points, rows, probing.Schedule(16, 2, 2, 1.0, 0), probing.Form(), *shared)

    alone = sorted(fit(0, 1), key=lambda each: each.number)
    assert [each.number for each in alone] == list(range(10))
    for world in (3, 12):
        shared = sorted((each for rank in range(world) for each in fit(rank, world)), key=lambda each: each.number)
        assert [each.summary for each in shared] == [each.summary for each in alone]
        assert all(torch.equal(a.weight, b.weight) for a, b in zip(alone, shared, strict=True))


@pytest.mark.timeout(300)
def test_a_kill_while_extracting_costs_no_finished_part(settings: dict[str, Any], tmp_path: Path) -> None:
    """SIGKILL after the second of four parts; the next start computes the others, and all is as in an unbroken run."""
    settings |= {"data": str(write_shards(tmp_path / "shards", [i % 5 for i in range(4001)], NAMES, cuts=3))}
    with Script("train/probe.py", {**settings, "images": 64}, tmp_path / "said") as run:
        end = time.monotonic() + 60
        while run.processes[0].is_alive() and time.monotonic() < end and len(contents(settings["cache"])) < 2:
            time.sleep(0.005)
        run.send(signal.SIGKILL)
    assert "Traceback" not in run.said()
    kept = contents(settings["cache"])
    assert 2 <= len(kept) < 4
    written = {file: file.stat().st_mtime_ns for file in Path(settings["cache"]).glob("*/part*")}
    broken = main(Config(**settings, images=64))
    assert all(file.stat().st_mtime_ns == when for file, when in written.items())
    unbroken = main(Config(**{**settings, "cache": str(tmp_path / "whole"), "out": str(tmp_path / "b")}, images=64))
    assert contents(settings["cache"]) == contents(tmp_path / "whole")
    assert kept.items() <= contents(tmp_path / "whole").items()
    assert broken["table"] == unbroken["table"]


def test_the_demo_is_a_bare_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `train/probe.py` does without flags, once the demo is built: the newest student of runs/, and the teacher.

    The student is one of the demo's architecture with random weights: what is shown is the way, not the accuracy.
    """
    from data import demo
    from models.export import export_student

    demo.demo_shards("train")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(probing, "draw_grid", lambda *_: None)
    argv = ["--cache", str(tmp_path / "cache"), "--workers", "0"]
    config = parse_config(Config, argv, "test", "probe_demo.yaml")
    assert (config.data, config.encoder, config.reference) == ("demo", "demo_student", "demo")
    with pytest.raises(DataError, match="run `accelerate launch train/distill.py` first") as caught:
        main(config)
    assert "\n" not in str(caught.value)
    for number, (name, settings) in enumerate(
        {
            "demo": "{data: demo, teacher: demo}",
            "other": "{data: demo, teacher: demo}",
            "tuned": "{data: demo, encoder: demo}",  # of train/finetune.py
            "real": "{data: shards, teacher: 'open_clip:RN50'}",
        }.items()
    ):
        torch.manual_seed(number)
        student = load_encoder(demo.DEMO_TEACHER, weights=False)
        export_student(student, Path("runs", name, "export"), card={}, source=None)
        Path("runs", name, "config.yaml").write_text(settings)
        os.utime(Path("runs", name, "export", "student.safetensors"), (number, number))
    start = time.process_time()
    result = main(config)
    assert time.process_time() - start < 60
    assert result["encoder"] == f"local-dir:{Path('runs', 'other', 'export')}"
    assert result["reference"]["encoder"] == demo.DEMO_TEACHER
    assert result["reference"]["accuracy"] > 0.97 > result["accuracy"]
    for folder, found in (("runs/demo_probe", result), ("runs/demo_probe/reference", result["reference"])):
        assert len(found["table"]) == 28
        head = load_head(Path(folder, "head.safetensors"))
        assert head.metadata["encoder_sha256"] == found["encoder_sha256"]
        assert len(lines(Path(folder, "results.jsonl"))) == 1
    # Another student in the same place: its head takes the place of the first one's.
    os.utime(Path("runs", "demo", "export", "student.safetensors"), (9, 9))
    assert main(config)["encoder"] == f"local-dir:{Path('runs', 'demo', 'export')}"
    assert len(lines(Path("runs/demo_probe/results.jsonl"))) == 2
    assert len(lines(Path("runs/demo_probe/reference/results.jsonl"))) == 1
