"""eval/attack.py: counts against attacks by hand, equal worlds, runs that are taken up again, checks that warn."""

import dataclasses
import json
import logging
import os
import shutil
import signal
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attacks.apgd import apgd
from attacks.ensemble import STAGES, Budget, ensemble, right, search
from attacks.pgd import watched
from data import DataError
from data.small import ImageSet, load_images
from data.transforms import unit_interval
from eval.attack import Config, main
from eval.common import check_classes
from eval.robust_accuracy import (
    CLEAN,
    ENSEMBLE,
    Passes,
    Point,
    Subject,
    check_accuracy,
    check_attack,
    check_curve,
    check_gradients,
    measure,
)
from eval.robustness import wilson
from models import ModelError
from models.classifiers import Classifier, load_classifier
from tests.ranks import run_two
from train.common import ConfigError, StopRequested, parse_config
from train.launching import Agreement, StopSignals

pytestmark = pytest.mark.timeout(300)
BUDGET = Budget(steps=4, queries=6)


@pytest.fixture(scope="module")
def mnist(tmp_path_factory: pytest.TempPathFactory, goldens: Path) -> str:
    """Sixteen digits as idx files."""
    folder = tmp_path_factory.mktemp("mnist")
    stored = np.load(goldens / "margins_mnist.npz")
    images, labels = stored["images_u8"].reshape(-1, 28, 28), stored["labels"].astype(np.uint8)
    for split in ("t10k", "train"):
        header = struct.pack(">4BIII", 0, 0, 8, 3, *images.shape)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        header = struct.pack(">4BI", 0, 0, 8, 1, len(labels))
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
    return f"mnist:{folder}"


@pytest.fixture
def config(mnist: str, goldens: Path, tmp_path: Path) -> Config:
    """Batches of 6, 6 and 4 images; an attack takes a second."""
    return Config(
        model=f"lenet/{goldens / 'lenet_mnist.safetensors'}",
        data=mnist,
        norm="l2",
        eps="1,2.5",
        attacks="ensemble,apgd_ce",
        steps=BUDGET.steps,
        queries=BUDGET.queries,
        checks=False,
        images=6,
        out=str(tmp_path / "run"),
    )


@pytest.fixture(scope="module")
def once(mnist: str, goldens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of that run."""
    folder = tmp_path_factory.mktemp("once")
    main(config.__wrapped__(mnist, goldens, folder))  # type: ignore[attr-defined]
    return folder / "run"


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def numbers(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    names = ("metric", "value", "n", "interval", "attack", "norm", "eps", "model_sha256", "data_fingerprint", "seed")
    return [tuple(str(row[name]) for name in names) for row in rows]


# --- Numbers ----------------------------------------------------------------------------------------------------------


def test_counts_are_those_of_attacks_by_hand(config: Config, once: Path) -> None:
    rows = read(once / "results.jsonl")
    classifier, data = load_classifier(config.model), load_images(config.data, "test")
    images, labels = data.images.float() / 255, data.labels
    correct = right(classifier, images, labels)
    values = {(row["attack"], row["eps"]): row["value"] for row in rows}
    assert values["clean", 0.0] == int(correct.sum()) / 16
    for eps in (1.0, 2.5):
        found = search("pgd", classifier, images, labels, norm="l2", eps=eps)
        stands = correct & right(classifier, found, labels)
        assert values["PGD-20", eps] == int(stands.sum()) / 16
        names = ["PGD-20", "APGD-CE (4 steps)", "APGD-T (4 steps)", "Square (6 queries)"]
        ensemble = [values[" + ".join(names[: i + 1]), eps] for i in range(3)]
        ensemble.append(values["ensemble: " + " + ".join(names), eps])
        assert ensemble == sorted(ensemble, reverse=True)
        assert ensemble[1] <= values["APGD-CE (4 steps)", eps] + 2 / 16
    assert len(rows) == len(values) == 1 + 2 * 5
    row = rows[-1]
    assert row["interval"] == list(wilson(round(row["value"] * 16), 16))
    assert row["config"]["eps"] == "1,2.5"
    assert {"commit", "device", "precision", "model_sha256"} <= set(row)
    outcomes = [row["columns"] for row in read(once / "outcomes.jsonl")]
    assert all(max(columns["size"], default=0) <= 2.5 * (1 + 1e-5) for columns in outcomes if "size" in columns)
    for name in ("config.yaml", "env.json", "checks.json", "robust_accuracy.png", "robust_accuracy.svg"):
        assert (once / name).stat().st_size > 0


def test_two_processes_give_the_same(config: Config, once: Path, tmp_path: Path) -> None:
    run_two(main, config, tmp_path)
    out = Path(config.out)
    assert numbers(read(out / "results.jsonl")) == numbers(read(once / "results.jsonl"))
    here, there = ({row["key"]: row["columns"] for row in read(folder / "outcomes.jsonl")} for folder in (out, once))
    assert here.keys() == there.keys()
    assert all(here[key].get("stands") == there[key].get("stands") for key in here)


def test_bfloat16_attacks_are_judged_in_float32(config: Config) -> None:
    result = main(dataclasses.replace(config, precision="bf16", eps="1", attacks="apgd_ce"))
    assert [row["precision"] for row in result["rows"]] == ["fp32", "attack bf16, verdict fp32"]
    assert 0 < result["rows"][1]["value"] < 1


def test_radii_in_linf_and_checks(config: Config) -> None:
    result = main(dataclasses.replace(config, norm="linf", eps="0, 16/255", attacks="pgd", checks=True))
    values = {(row["attack"], row["eps"]): row["value"] for row in result["rows"]}
    assert values["PGD-20", 0.0] == values["clean", 0.0] >= values["PGD-20", 16 / 255]
    names = [check.name for check in result["checks"]]
    assert "radius 0 is clean accuracy" in names
    assert len(names) == 8
    assert all(check.passed for check in result["checks"])


# --- Taken up again ---------------------------------------------------------------------------------------------------


def test_what_is_there_is_not_computed_again(config: Config, once: Path) -> None:
    out = Path(config.out)
    shutil.copytree(once, out)
    total = len(read(out / "outcomes.jsonl"))
    assert main(config)["computed"] == 0
    assert numbers(read(out / "results.jsonl")) == numbers(read(once / "results.jsonl"))
    lines = (out / "outcomes.jsonl").read_text().splitlines()
    (out / "outcomes.jsonl").write_text("\n".join([*lines[:4], lines[4][:30]]))  # as a kill leaves it
    assert main(config)["computed"] == total - 4
    assert numbers(read(out / "results.jsonl")) == numbers(read(once / "results.jsonl"))
    assert main(config)["computed"] == 0  # the line cut short has not spoilt the one after it
    for name in ("outcomes.jsonl", "results.jsonl"):
        with open(out / name, "ab") as file:
            file.write(b'12\n{"x": 1}\n\xff\xfe\n')
    assert main(config)["computed"] == 0
    more = main(dataclasses.replace(config, eps="1,2,2.5", attacks="pgd"))
    assert more["computed"] == 3
    assert main(dataclasses.replace(config, seed=1, attacks="apgd_ce", eps="1"))["computed"] == 6


def test_a_stop_signal_keeps_the_batches_before(config: Config) -> None:
    classifier, data = load_classifier(config.model), load_images(config.data, "test")
    subject = Subject(classifier, "hash", data, "l2", BUDGET, "fp32", 6, 0)
    file, signals = Path(config.out), StopSignals()
    passes = Passes(subject, Agreement(0, 1), signals, file)
    assert len(passes.look(np.arange(16))["right"]) == 16
    signals.received = 15
    with pytest.raises(StopRequested, match="PGD-20, l2 1"):
        passes.attack("pgd", 1.0, np.arange(16))
    assert len(read(file)) == 3


class Signalling(nn.Module):
    """Sends this process a signal when it is asked for the `at`-th time."""

    def __init__(self, net: nn.Module, at: int) -> None:
        super().__init__()
        self.net, self.at, self.calls = net, at, 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            os.kill(os.getpid(), signal.SIGTERM)
        return self.net(images)


def test_a_stop_signal_ends_a_batch_where_it_stands(config: Config, lenet: nn.Module, tmp_path: Path) -> None:
    net = Signalling(lenet, at=40)  # a batch of PGD-20 asks 21 times
    passes = passes_on(net, config, tmp_path, BUDGET, images=6)
    with StopSignals() as passes._signals, pytest.raises(StopRequested, match="stopped by signal 15 in PGD-20"):
        passes.attack("pgd", 0.1, np.arange(16))
    assert 40 <= net.calls <= 41
    assert len(read(tmp_path / "outcomes.jsonl")) == 1
    assert net.training is False
    passes = passes_on(net, config, tmp_path, BUDGET, images=6)
    assert len(passes.attack("pgd", 0.1, np.arange(16))["stands"]) == 16
    assert passes.computed == 2


def test_passes_are_counted_and_said(
    config: Config, lenet: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    data = load_images(config.data, "test")
    images, labels = unit_interval(data.images[:2]), data.labels[:2]
    for stage in STAGES:
        calls = [0]

        def count(calls: list[int] = calls) -> None:
            calls[0] += 1

        with watched(count):
            search(stage, lenet, images, labels, norm="l2", eps=1e-3, budget=BUDGET)
        assert BUDGET.passes(stage) <= calls[0] <= 1.5 * BUDGET.passes(stage) + 3, stage
    monkeypatch.setattr("eval.robust_accuracy.SECONDS_BETWEEN_LINES", -1)
    with caplog.at_level(logging.INFO, logger="shiftlens"):
        passes_on(lenet, config, tmp_path, BUDGET, images=8).attack("pgd", 0.1, np.arange(16))
    said = [text for text in caplog.messages if "pass" in text]
    assert said[0] == "PGD-20, linf 0.1: batch 1 of 2, pass 1 of about 20"
    assert said[-1] == "PGD-20, linf 0.1: batch 2 of 2, pass 20 of about 20"


class Gamma(nn.Module):
    """The same function, by way of a root and its square: its slope at black is infinite times 0."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        return self.net((images - images.min()).sqrt() ** 2 + images.min())


def test_gradients_that_are_not_finite_are_no_attack(config: Config, lenet: nn.Module, tmp_path: Path) -> None:
    """Images that are not numbers would count as fooled."""
    passes = passes_on(Gamma(lenet), config, tmp_path, BUDGET)
    with pytest.raises(ModelError, match="stairs has no finite loss and gradient at 16 of 16 images: no attack can"):
        passes.look(np.arange(16))
    with pytest.raises(ModelError, match=r"met gradients that are not finite \(pgd, radius 0.1\) at 16 of 16 images"):
        passes.attack("pgd", 0.1, np.arange(16))
    images, labels = unit_interval(passes.subject.data.images), passes.subject.data.labels
    clean = right(passes.subject.classifier, images, labels)
    generator = torch.Generator().manual_seed(0)
    found = apgd(passes.subject.classifier, images, labels, norm="linf", eps=0.1, steps=4, generator=generator)
    assert (found.fooled == ~clean).all()
    assert found.images.isfinite().all()
    budget = Budget(steps=3, targets=2, queries=1)
    _, fell_to = ensemble(passes.subject.classifier, images, labels, norm="linf", eps=1e-4, budget=budget)
    assert ((fell_to == -1) | (fell_to == len(STAGES))).all()


# --- Checks -----------------------------------------------------------------------------------------------------------


class Stairs(nn.Module):
    """Answers in steps: gradients are zero."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        return (self.net(images) * 4).round() / 4 + 0 * images.sum()


def passes_on(net: nn.Module, config: Config, tmp_path: Path, budget: Budget, images: int = 16) -> Passes:
    data = load_images(config.data, "test")
    classifier = Classifier("stairs", "lenet", net, image_size=28, num_classes=10, mean=[0.1307], std=[0.3081]).eval()
    subject = Subject(classifier, "hash", data, "linf", budget, "fp32", images, 0)
    return Passes(subject, Agreement(0, 1), StopSignals(), tmp_path / "outcomes.jsonl")


@pytest.fixture
def lenet(config: Config) -> nn.Module:
    return load_classifier(config.model).net


def test_hidden_gradients_are_told(config: Config, lenet: nn.Module, tmp_path: Path) -> None:
    passes = passes_on(Stairs(lenet), config, tmp_path, Budget(steps=3, queries=100))
    looked = passes.look(np.arange(16))
    correct = np.flatnonzero(looked["right"])
    zero, _ = check_gradients(looked)
    assert (zero.passed, zero.found) == (False, f"exactly 0 for {len(correct)} of {len(correct)} images")
    points, largest = measure(passes, 0.25, ["pgd", "square"], correct)
    assert points[0].correct == len(correct) > points[1].correct
    failed = [check.name for check in check_curve(points, largest) if not check.passed]
    assert failed == ["no gradient masking: Square adds nothing"]
    points, largest = measure(passes, 0.25, [ENSEMBLE], correct)
    assert [point.name for point in points] == ["pgd", "pgd+apgd_ce", "pgd+apgd_ce+apgd_t", ENSEMBLE]
    failed = [check.name for check in check_curve(points, largest) if not check.passed]
    assert failed == ["no gradient masking: Square adds nothing"]
    failed = [check.name for check in check_attack(passes, 0.25, correct) if not check.passed]
    assert failed == ["a ball of everything leaves chance at most"]


class Sure(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        return 1000 * self.net(images)


def test_a_saturated_loss_is_told(config: Config, lenet: nn.Module, tmp_path: Path) -> None:
    looked = passes_on(Sure(lenet), config, tmp_path, BUDGET).look(np.arange(16))
    assert [check.passed for check in check_gradients(looked)] == [False, False]


def test_accuracy_that_chance_explains_is_told(config: Config, lenet: nn.Module, tmp_path: Path) -> None:
    subject = passes_on(lenet, config, tmp_path, BUDGET).subject  # 16 images of 10 classes
    assert [check_accuracy(correct, subject).passed for correct in (0, 3, 4, 16)] == [False, False, True, True]


def test_curves_that_rise_and_points_outside_are_told() -> None:
    def curve(*counts: int) -> list[Point]:
        return [Point("pgd", "PGD-20", eps, count, 100) for eps, count in zip((0.5, 1.0, 2.0), counts, strict=True)]

    clean = Point(CLEAN, "clean", 0.0, 90, 100)
    assert all(check.passed for check in check_curve([clean, *curve(80, 80, 0)], 1.000001))
    ball, rise = check_curve([clean, *curve(91, 20, 30)], 1.001)
    assert not ball.passed
    assert rise.found == "PGD-20 leaves 91 at 0.5, 90 at 0; PGD-20 leaves 30 at 2, 20 at 1"


def test_nothing_is_said_about_masking_where_nothing_was_compared() -> None:
    points = [Point(CLEAN, "clean", 0.0, 90, 100), Point("square", "Square", 0.5, 20, 100)]
    assert [check.name for check in check_curve(points, 1.0)] == [
        "perturbations within the ball",
        "accuracy falls with the radius",
    ]


def test_roundings_of_pixels_are_within_small_balls(config: Config, lenet: nn.Module, tmp_path: Path) -> None:
    passes = passes_on(lenet, config, tmp_path, Budget(steps=2, queries=10))
    for eps in (0.25 / 255, 0.5 / 255, 0.0):
        points, largest = measure(passes, eps, ["pgd", "apgd_ce", "square"], np.arange(16))
        assert all(check.passed for check in check_curve(points, largest)), eps


def test_an_l2_radius_counted_from_0_to_255_is_one_line(config: Config) -> None:
    with pytest.raises(ConfigError, match=r"--eps 128: .* radius above 28 holds every image of 1x28x28.*128/255"):
        main(dataclasses.replace(config, eps="128"))


# --- Settings and data ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "--model is missing: a classifier such as"),
        (["--model", "x"], ""),
        (["--model", "x", "--data", "mnist"], "--eps '': expected radii"),
        (["--model", "x", "--eps", "0.5,-1"], "--eps '0.5,-1'"),
        (["--model", "x", "--eps", "8/0"], "--eps '8/0'"),
        (["--model", "x", "--eps", "nan"], "--eps 'nan'"),
        (["--model", "x", "--norm", "linf", "--eps", "8"], "8/255"),
        (["--model", "x", "--attacks", "pgd,fab"], "--attacks names fab; there are pgd"),
        (["--model", "x", "--steps", "0"], "--steps must be at least 1"),
        (["--model", "x", "--precision", "fp16"], "precision"),
        (["--model", "x", "--epsilon", "1"], "epsilon"),
    ],
)
def test_wrong_flags_are_one_line(flags: list[str], words: str) -> None:
    def parse() -> Config:
        return parse_config(Config, flags, "test", "attack_cifar10.yaml")

    if not words:
        assert (parse().data, parse().radii, parse().count) == ("cifar10", [0.25, 0.5, 1.0], 1000)
        return
    with pytest.raises(ConfigError) as caught:
        parse()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_radii_are_read_once_and_in_order(config: Config) -> None:
    assert dataclasses.replace(config, norm="linf", eps="8/255, 0.25,2/255,8/255").radii == [2 / 255, 8 / 255, 0.25]


def test_classifiers_and_data_that_do_not_belong_together(config: Config) -> None:
    with pytest.raises(DataError):
        main(dataclasses.replace(config, count=17))
    with pytest.raises((DataError, ModelError)):
        main(dataclasses.replace(config, model="lenet/nowhere.safetensors"))
    images = torch.zeros(2, 1, 28, 28, dtype=torch.uint8)
    classifier = load_classifier("lenet", num_classes=3, weights=False)
    four = ImageSet(images, torch.tensor([0, 3]), ("a", "b", "c", "d"), "four", "x")
    with pytest.raises(DataError, match="four has 4 classes, lenet gives 3 logits"):
        check_classes(classifier, four)
    classifier.classes = ("a", "c", "b")
    three = ImageSet(images, torch.tensor([0, 2]), ("a", "b", "c"), "three", "x")
    with pytest.raises(DataError, match="class 1 of lenet is 'c', of three 'b'"):
        check_classes(classifier, three)


def test_the_stages_are_all_attacks() -> None:
    assert Config(model="x", data="mnist", eps="1", attacks=",".join((*STAGES, ENSEMBLE))).names == [*STAGES, ENSEMBLE]
