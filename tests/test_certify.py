"""eval/certify.py: every image once, the same certificates however a run is divided or broken off, honest numbers."""

from __future__ import annotations

import datetime
import itertools
import json
import logging
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from attacks import smoothing
from data import DataError
from data.small import load_images
from eval.certify import Config, main
from models import ModelError
from models.classifiers import load_classifier
from tests import ranks
from train.common import RECIPES, ConfigError, parse_config

pytestmark = pytest.mark.timeout(240)
IMAGES = 23


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 23 digits of 28 x 28 pixels, as a test split in class folders."""
    from sklearn.datasets import load_digits

    folder = tmp_path_factory.mktemp("digits")
    content = load_digits()
    for label in range(10):
        (folder / "test" / str(label)).mkdir(parents=True)
    for number in range(IMAGES):
        small = Image.fromarray((content.images[number] * 15.9).astype(np.uint8))
        large = Image.new("L", (28, 28))
        large.paste(small.resize((20, 20), Image.Resampling.BICUBIC), (4, 4))
        large.save(folder / "test" / str(content.target[number]) / f"{number:03d}.png")
    return folder


@pytest.fixture
def settings(goldens: Path, digits: Path, tmp_path: Path) -> dict[str, Any]:
    model = f"lenet/{goldens / 'lenet_mnist.safetensors'}"
    return {
        **{"model": model, "data": str(digits), "out": str(tmp_path / "run"), "name": "LeNet"},
        **{"skip": 1, "sigma": 0.4, "n0": 20, "n": 80, "alpha": 0.05, "radii": [0.0, 0.2, 0.4]},
    }


def without_time(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def values(result: dict[str, Any]) -> dict[Any, float]:
    """The numbers of a run by metric and radius, but for times."""
    return {
        (row["metric"], row.get("radius")): row["value"] for row in result["rows"] if "seconds" not in row["metric"]
    }


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def unbroken(settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    return main(Config(**{**settings, "out": str(tmp_path / "unbroken")}))


def test_a_run_certifies_every_image_once_and_says_what_follows(settings: dict[str, Any], tmp_path: Path) -> None:
    result = main(Config(**settings))
    out = tmp_path / "run"
    assert {path.name for path in out.iterdir()} >= {
        *("config.yaml", "env.json", "results.jsonl", "certificates"),
        *("certified_accuracy.png", "certified_accuracy.svg"),
    }
    assert [row["image"] for row in result["images"]] == list(range(IMAGES))
    assert result["computed"] == IMAGES
    (file,) = (out / "certificates").iterdir()
    head, *written = lines(file)
    assert written == result["images"]
    assert head["settings"]["sigma"] == 0.4

    images = load_images(settings["data"], "test", channels=1)
    with smoothing.smoothing(load_classifier(settings["model"]), torch.device("cpu")) as network:
        noise = smoothing.GaussianNoise(0, range(IMAGES), torch.device("cpu"))
        found = smoothing.certify(
            network, images.images.float() / 255, noise, sigma=0.4, n0=20, n=80, alpha=0.05, batch_size=40
        )
    assert [row["radius"] for row in result["images"]] == found.radii.tolist()
    assert [-1 if row["class"] is None else row["class"] for row in result["images"]] == found.classes.tolist()
    correct = found.classes == images.labels.numpy()
    numbers = values(result)
    assert numbers["smoothed_accuracy", None] == correct.mean()
    assert 0.3 < correct.mean() < 1
    assert numbers["abstention_rate", None] == (found.classes == -1).mean() > 0
    for radius in settings["radii"]:
        assert numbers["certified_accuracy", radius] == (correct & (found.radii >= radius)).mean()
    assert numbers["certified_accuracy", 0.0] > numbers["certified_accuracy", 0.4] > 0
    assert numbers["average_certified_radius", None] == pytest.approx((correct * found.radii).mean())

    rows = lines(out / "results.jsonl")
    assert {row["metric"] for row in rows} >= {"certified_accuracy", "average_certified_radius", "seconds_per_image"}
    for row in rows:
        assert row["n"] == IMAGES
        assert row["weights_sha256"] == head["settings"]["weights_sha256"]
        assert (row["sigma"], row["copies"], row["precision"], row["data_fingerprint"]) == (
            *(0.4, 80, "fp32"),
            images.fingerprint,
        )
        if "interval" in row:
            assert row["interval"][0] <= row["value"] <= row["interval"][1]


def test_a_second_start_computes_and_writes_nothing(settings: dict[str, Any], tmp_path: Path) -> None:
    first = main(Config(**settings))
    before = [(tmp_path / "run" / name).read_bytes() for name in ("results.jsonl", "certified_accuracy.svg")]
    second = main(Config(**settings))
    assert second["computed"] == 0
    assert second["images"] == first["images"]
    assert [(tmp_path / "run" / name).read_bytes() for name in ("results.jsonl", "certified_accuracy.svg")] == before


def test_more_images_are_added_to_those_that_are_there(settings: dict[str, Any], unbroken: dict[str, Any]) -> None:
    assert main(Config(**{**settings, "skip": 4}))["computed"] == 6
    part = main(Config(**{**settings, "skip": 2, "count": 5}))
    assert [row["image"] for row in part["images"]] == [0, 2, 4, 6, 8]
    assert part["computed"] == 2
    whole = main(Config(**settings))
    assert whole["computed"] == IMAGES - 8
    assert without_time(whole["images"]) == without_time(unbroken["images"])
    assert values(whole) == values(unbroken)


def test_only_the_chosen_images_are_read(settings: dict[str, Any], digits: Path, tmp_path: Path) -> None:
    shutil.copytree(digits, tmp_path / "broken")
    files = sorted((tmp_path / "broken").rglob("*.png"))
    for number in (1, 2, 5, 22):
        files[number].write_bytes(b"no image")
    part = main(Config(**{**settings, "data": str(tmp_path / "broken"), "skip": 4, "count": 5}))
    assert [row["image"] for row in part["images"]] == [0, 4, 8, 12, 16]
    with pytest.raises(DataError, match=files[22].name):
        main(Config(**{**settings, "data": str(tmp_path / "broken"), "skip": 11, "count": 5}))


def test_certificates_are_found_again_where_the_data_have_moved(
    settings: dict[str, Any], digits: Path, tmp_path: Path
) -> None:
    first = main(Config(**{**settings, "count": 4}))
    shutil.copytree(digits, tmp_path / "elsewhere" / digits.name)
    again = main(Config(**{**settings, "data": str(tmp_path / "elsewhere" / digits.name), "count": 4}))
    assert again["computed"] == 0
    assert again["images"] == first["images"]


def change(data: Path, number: int) -> None:
    """Turns an image of the folder upside down."""
    file = sorted(data.rglob("*.png"))[number]
    with Image.open(file) as image:
        turned = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    turned.save(file)


def test_other_images_under_the_same_numbers_are_refused(
    settings: dict[str, Any], digits: Path, tmp_path: Path
) -> None:
    data = tmp_path / "changed" / digits.name
    shutil.copytree(digits, data)
    settings |= {"data": str(data)}
    main(Config(**{**settings, "count": 4}))
    change(data, 2)
    with pytest.raises(DataError, match="certificates of other images under the same numbers; use another --out") as no:
        main(Config(**{**settings, "count": 5}))
    assert "\n" not in str(no.value)
    assert main(Config(**{**settings, "skip": 3, "count": 3}))["computed"] == 1  # images 0 and 3 are what they were
    change(data, 2)
    last = sorted((data / "test" / "0").iterdir())[-1]  # now the first image of class 1, under the number that it had
    main(Config(**settings))
    last.rename(data / "test" / "1" / "000.png")
    with pytest.raises(DataError, match="certificates of other images"):
        main(Config(**settings))


def test_curves_are_of_the_same_images(settings: dict[str, Any], digits: Path, tmp_path: Path) -> None:
    data = tmp_path / "changed" / digits.name
    shutil.copytree(digits, data)
    settings |= {"data": str(data), "n": 40}

    def drawn(sigma: float, **changed: Any) -> set[str]:
        main(Config(**{**settings, "sigma": sigma, "name": f"sigma {sigma}", **changed}))
        figure = (tmp_path / "run" / "certified_accuracy.svg").read_text()
        return set(re.findall(r"<!-- (sigma [0-9.]+), ", figure))

    assert drawn(0.3, count=6) == {"sigma 0.3"}
    assert drawn(0.4, skip=2, count=3) == {"sigma 0.3", "sigma 0.4"}
    assert drawn(0.5, skip=2, count=4) == {"sigma 0.5"}  # the fourth has no certificate of the others
    change(data, 2)
    assert drawn(0.6, skip=2, count=3) == {"sigma 0.6"}
    assert drawn(0.7, skip=4, count=2) == {"sigma 0.3", "sigma 0.4", "sigma 0.5", "sigma 0.6", "sigma 0.7"}


def test_results_of_another_choice_of_images_are_written_too(settings: dict[str, Any], tmp_path: Path) -> None:
    """Though both have the same values: each has an image of every kind."""
    for skip in (1, 2, 1):
        main(Config(**{**settings, "skip": skip, "count": 3, "radii": [0.0, 1.0]}))
    rows = [row for row in lines(tmp_path / "run" / "results.jsonl") if row.get("radius") == 1.0]
    assert [(row["skip"], row["count"], row["value"]) for row in rows] == [(1, 3, 0.0), (2, 3, 0.0)]
    assert len({row["data_fingerprint"] for row in rows}) == 2


def test_a_line_cut_short_is_computed_again(settings: dict[str, Any], tmp_path: Path, unbroken: dict[str, Any]) -> None:
    main(Config(**{**settings, "count": 8}))
    (file,) = (tmp_path / "run" / "certificates").iterdir()
    # Beside the line cut short, lines that are no rows.
    file.write_bytes(file.read_bytes()[:-20] + b'\n12\n{"image": [1]}\n{"image": 7}\n\xff\xfe\n')
    with open(tmp_path / "run" / "results.jsonl", "ab") as results:
        results.write(b"5\n")
    again = main(Config(**settings))
    assert again["computed"] == IMAGES - 7
    assert without_time(again["images"]) == without_time(unbroken["images"])
    assert without_time(lines(file)[1:]) == without_time(again["images"])


def in_the_last_rank(hook: Callable[[int, Tensor], None]) -> None:
    """There `hook` sees the number of each pass through LeNet, from 1 on, and its first maps, which it may change.

    Five passes are an image, with batches of 25 copies: one selects the class, four count.
    """
    passes = itertools.count(1)

    def after(module: torch.nn.Module, inputs: Any, maps: Tensor) -> None:
        if isinstance(module, torch.nn.Conv2d) and module.in_channels == 1:
            hook(next(passes), maps)

    if int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1:
        torch.nn.modules.module.register_module_forward_hook(after)


def break_off(config: Config) -> None:
    """`main`, but the last rank fails in the middle of its second image, in the way that the variable FAILURE names."""

    def hook(number: int, maps: Tensor) -> None:
        if number == 7 and os.environ["FAILURE"] == "not finite":
            maps.fill_(torch.nan)
        elif number == 7:
            os.kill(os.getpid(), signal.Signals[os.environ["FAILURE"]])

    in_the_last_rank(hook)
    main(config)


@pytest.mark.parametrize(
    ("world", "failure", "kept"),
    [
        (1, "SIGKILL", [0]),
        (1, "SIGTERM", [0]),
        (2, "SIGKILL", [0, 4]),
        # Rank 0 finishes its second image, which is kept, and goes no further.
        (2, "SIGTERM", [0, 4, 8]),
        (2, "not finite", [0, 4, 8]),
    ],
)
def test_a_run_that_was_ended_goes_on_as_an_unbroken_one(
    settings: dict[str, Any], tmp_path: Path, world: int, failure: str, kept: list[int]
) -> None:
    settings |= {"skip": 4, "batch_size": 25}
    port, said = ranks.free_port(), [tmp_path / f"rank_{rank}.txt" for rank in range(world)]
    processes = [
        ranks.start(break_off, Config(**settings), file, {**ranks.world_of(rank, world, port), "FAILURE": failure})
        for rank, file in enumerate(said)
    ]
    try:
        for process in processes:
            process.join(100)
        assert all(process.exitcode for process in processes), [file.read_text() for file in said]
    finally:
        for process in processes:
            process.kill()
            process.join()
    if failure == "SIGTERM":
        for file in said:
            assert f"{len(kept)} of 6 images are certified; the same command goes on" in file.read_text()
    if failure == "not finite":
        assert "not finite under noise" in said[-1].read_text()
    (certificates,) = (tmp_path / "run" / "certificates").iterdir()
    assert [row["image"] for row in lines(certificates)[1:]] == kept
    rest = main(Config(**settings))
    assert rest["computed"] == 6 - len(kept)
    whole = main(Config(**{**settings, "out": str(tmp_path / "unbroken")}))
    assert without_time(rest["images"]) == without_time(whole["images"])
    assert values(rest) == values(whole)


def be_late(config: Config) -> None:
    """`main`, but messages of the default group wait for 3 s, and rank 1 takes 5 s longer for an image than rank 0."""
    make_group = torch.distributed.init_process_group

    def make_impatient_group(*arguments: Any, **options: Any) -> None:
        make_group(*arguments, **{**options, "timeout": datetime.timedelta(seconds=3)})

    torch.distributed.init_process_group = make_impatient_group
    in_the_last_rank(lambda number, maps: time.sleep(5) if number == 3 else None)
    main(config)


def test_a_rank_may_take_longer_than_messages_wait(settings: dict[str, Any], tmp_path: Path) -> None:
    """As where others use its GPU too, or with --skip_wrong on only one rank an image is counted further."""
    ranks.run_two(be_late, Config(**{**settings, "skip": 4, "batch_size": 25}), tmp_path)
    (file,) = (tmp_path / "run" / "certificates").iterdir()
    assert [row["image"] for row in lines(file)[1:]] == [0, 4, 8, 12, 16, 20]


def test_two_processes_find_what_one_finds(settings: dict[str, Any], tmp_path: Path, unbroken: dict[str, Any]) -> None:
    ranks.run_two(main, Config(**settings), tmp_path)
    (file,) = (tmp_path / "run" / "certificates").iterdir()
    rows = sorted(lines(file)[1:], key=lambda row: row["image"])
    assert without_time(rows) == without_time(unbroken["images"])
    written = {"rows": lines(tmp_path / "run" / "results.jsonl")}
    assert values(written) == values(unbroken)


def test_leaving_out_wrong_classes_changes_neither_accuracies_nor_the_average(
    settings: dict[str, Any], unbroken: dict[str, Any]
) -> None:
    part = main(Config(**{**settings, "skip_wrong": True}))
    expected = {key: value for key, value in values(unbroken).items() if key[0] != "abstention_rate"}
    assert values(part) == expected
    wrong = [row for row in part["images"] if row["selected"] != row["label"]]
    assert wrong
    assert all(row["class"] is None and row["votes"] is None for row in wrong)


def test_predictions_are_classes_without_radii(settings: dict[str, Any], tmp_path: Path) -> None:
    result = main(Config(**{**settings, "mode": "predict"}))
    numbers = values(result)
    assert {metric for metric, _ in numbers} == {"smoothed_accuracy", "abstention_rate"}
    for row in result["images"]:
        assert (row["class"] is None) == (row["p_value"] > 0.05)
        assert row["votes"][0] >= row["votes"][1]
    assert not (tmp_path / "run" / "certified_accuracy.png").exists()


def test_other_settings_have_files_of_their_own_in_the_same_folder(settings: dict[str, Any], tmp_path: Path) -> None:
    first = main(Config(**{**settings, "count": 4}))
    second = main(Config(**{**settings, "count": 4, "sigma": 0.2, "batch_size": 50}))
    assert second["computed"] == 4
    assert without_time(first["images"]) != without_time(second["images"])
    assert len(list((tmp_path / "run" / "certificates").iterdir())) == 2
    again = main(Config(**{**settings, "count": 4, "batch_size": 50}))  # which no certificate depends on
    assert again["computed"] == 0
    assert len({row["certificates"] for row in lines(tmp_path / "run" / "results.jsonl")}) == 2


def test_a_classifier_near_chance_is_warned_about(
    settings: dict[str, Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging, "basicConfig", lambda **options: None)  # which would take the capturing handler away
    with caplog.at_level(logging.INFO, logger="shiftlens"):
        main(Config(**{**settings, "sigma": 2.0}))
    assert "not shown to be above chance: was the classifier trained with such noise" in caplog.text


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"n": 4}, r"n 4 is too small for alpha 0\.05.*at least 5"),
        ({"sigma": 64.0}, "give 0.251"),
        ({"sigma": 0.0}, "sigma must be a number above 0"),
        ({"alpha": 1.5}, "alpha 1.5 must lie between"),
        ({"n0": 0}, "n0 must be at least 1"),
        ({"skip": 0}, "--skip must be at least 1"),
        ({"count": -1}, "--count must not be negative"),
        ({"batch_size": 7}, "--batch_size 7 is below the 25"),
        ({"radii": [-0.5]}, "--radii"),
        ({"model": ""}, "--model is missing"),
        ({"data": ""}, "--data is missing"),
        ({"mode": "predict", "skip_wrong": True}, "--skip_wrong is for --mode certify"),
    ],
)
def test_impossible_settings_are_one_line_before_anything_is_computed(
    settings: dict[str, Any], changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        Config(**{**settings, **changed})
    assert "\n" not in str(caught.value)
    assert not Path(settings["out"]).exists()


def test_classes_in_another_order_and_networks_that_are_broken_are_one_line(
    settings: dict[str, Any], tmp_path: Path, digits: Path
) -> None:
    from models.classifiers import save_classifier

    classifier = load_classifier(settings["model"])
    classifier.classes = (*"9123456780",)
    save_classifier(tmp_path / "shuffled", classifier, {})
    with pytest.raises(DataError, match="class 0 of .* is '9', of .* '0'"):
        main(Config(**{**settings, "model": f"local-dir:{tmp_path / 'shuffled'}"}))
    classifier.classes = None
    with torch.no_grad():
        classifier.get_parameter("net.fc3.bias").fill_(3e38)  # finite, but what it is added to is not
        classifier.get_parameter("net.fc3.weight").fill_(3e38)
    save_classifier(tmp_path / "broken", classifier, {})
    with pytest.raises(ModelError, match="not finite under noise"):
        main(Config(**{**settings, "model": f"local-dir:{tmp_path / 'broken'}"}))
    (tmp_path / "few" / "test" / "only").mkdir(parents=True)
    (tmp_path / "few" / "test" / "only" / "0.png").write_bytes(next((digits / "test").rglob("*.png")).read_bytes())
    with pytest.raises(DataError, match="has 1 classes, .* gives 10 logits"):
        main(Config(**{**settings, "data": str(tmp_path / "few")}))


def test_a_file_of_something_else_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    main(Config(**{**settings, "count": 1}))
    (file,) = (tmp_path / "run" / "certificates").iterdir()
    file.write_text("no certificates\n")
    with pytest.raises(DataError, match="not a file of certificates"):
        main(Config(**{**settings, "count": 1}))


def test_the_demos_recipe_is_read_without_settings_and_the_defaults_are_the_published_ones() -> None:
    demo = parse_config(Config, [], "certify", "certify_demo.yaml")
    assert (RECIPES / "certify_demo.yaml").is_file()
    assert demo.data == "demo"
    given = ["--data", "cifar10", "--model", "cifar_resnet110/x", "--sigma", "0.25"]
    published = parse_config(Config, given, "certify", "certify_demo.yaml")
    assert (published.n0, published.n, published.alpha, published.skip) == (100, 100_000, 0.001, 20)
