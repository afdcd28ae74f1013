"""Adversarial training: schedules, a step against one written by hand, exact resume, equal worlds, results, faults."""

import contextlib
import gzip
import importlib
import json
import math
import os
import signal
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from data import DataError
from data.demo import CLASSES
from data.small import ImageSet, load_images, open_batches
from data.transforms import unit_interval
from eval import attack as evaluation
from kernels import dct
from models import ModelError
from models.checkpoints import load_optimizer_tensors, optimizer_tensors, state_keys
from models.classifiers import Classifier, load_classifier, save_classifier
from models.weights import state_sha256
from tests import ranks
from tests.test_distill import rows, weights_after
from tests.test_probe import write_shards
from train import adversarial, loop, robust
from train.adversarial import Config, eps_at, main, step_lr, triangular_lr
from train.common import RECIPES, ConfigError, LaunchError, StopRequested, parse_config, run_script, step_seed
from train.launching import Agreement, start_accelerator

VOLATILE = ("images_per_second", "data_wait_share", "seconds_left", "memory_mib")
DRAW = adversarial.draw_loss
TRAIN, TEST = 96, 40


def write_digits(folder: Path, count: int, prefix: str, seed: int) -> None:
    """MNIST's own format: grey noise with a bright block whose place tells the class; every class occurs."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.uint8) % 10
    images = generator.integers(0, 120, (count, 28, 28), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        row, column = divmod(int(label), 4)
        image[2 + 8 * row : 8 + 8 * row, 1 + 7 * column : 6 + 7 * column] += 130
    for kind, header, content in (
        ("images-idx3", struct.pack(">IIII", 0x803, count, 28, 28), images),
        ("labels-idx1", struct.pack(">II", 0x801, count), labels),
    ):
        (folder / f"{prefix}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + content.tobytes(), mtime=0))


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder, TRAIN, "train", 0)
    write_digits(folder, TEST, "t10k", 1)
    return f"mnist:{folder}"


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> str:
    """32 and 10 images of five classes that colour tells apart, as shards: from memory for nets of 32 px."""
    folder = tmp_path_factory.mktemp("colours")
    for split, count in (("train", 32), ("test", 10)):
        write_shards(folder / split, [i % 5 for i in range(count)], list("abcde"), cuts=1)
    return str(folder)


@pytest.fixture
def settings(digits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Two epochs of 6 steps of 16 images with noise and attack, without the figure, which would take longer."""
    monkeypatch.setattr(adversarial, "draw_loss", lambda *_: None)
    return {
        "data": digits,
        "model": "lenet",
        "attack": "smoothadv",
        "eps": "64/256",
        "attack_steps": 2,
        "sigma": 0.12,
        "copies": 2,
        "batch_size": 16,
        "epochs": 2,
        "eval_count": 0,
        "log_every": 1,
        "save_every": 100,
        "out": str(tmp_path / "run"),
    }


@pytest.fixture
def with_batch_norm(settings: dict[str, Any], colours: str) -> dict[str, Any]:
    other = {"data": colours, "model": "cifar_resnet20", "attack": "pgd", "eps": 0.5, "sigma": 0.0, "copies": 1}
    return settings | other | {"pad": 4, "mirror": True, "batch_size": 8, "epochs": 1, "attack_steps": 1, "lr": 0.05}


def strip(out: str | Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in VOLATILE} for row in rows(out)]


def results(out: str | Path) -> dict[str, dict[str, Any]]:
    lines = (Path(out) / "results.jsonl").read_text().splitlines()
    found = {row["metric"]: row for row in map(json.loads, lines)}
    assert len(found) == len(lines)
    return found


def one_line(error: pytest.ExceptionInfo[Exception]) -> bool:
    return "\n" not in str(error.value)


# ----------------------------------------------------------------------------------------------------------------------
# Schedules and optimiser state
# ----------------------------------------------------------------------------------------------------------------------


def test_schedules_are_the_published_ones() -> None:
    """Hold me tight's numpy.interp, called after each batch as there; torch's StepLR; the ramp of SmoothAdv's code."""
    epochs, per_epoch, peak = 30, 7, 0.21
    for step in range(epochs * per_epoch):
        epoch, batch = divmod(step, per_epoch)
        published = np.interp(epoch + (batch + 1) / per_epoch, [0, epochs * 2 // 5, epochs], [0, peak, 0])
        assert triangular_lr(step, peak, epochs * per_epoch) == pytest.approx(published, abs=1e-12)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=50, gamma=0.1)
    for epoch in range(160):
        for step in (epoch * per_epoch, epoch * per_epoch + per_epoch - 1):
            assert step_lr(step, 0.1, per_epoch, 50) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        scheduler.step()
    for epoch in range(20):
        assert eps_at(epoch, 0.25, 10) == pytest.approx(np.min([0.25, (epoch + 1) * 0.25 / 10]))
        assert eps_at(epoch, 0.25, 0) == 0.25


@pytest.mark.parametrize(
    ("recipe", "base", "differences"),
    [
        ("cifar_vgg19_flip", "cifar_resnet18_flip", {"model": "vgg19_bn"}),
        ("cifar_densenet121_flip", "cifar_resnet18_flip", {"model": "densenet121"}),
        ("cifar_vgg19_flip_adversarial", "cifar_resnet18_flip_adversarial", {"model": "vgg19_bn"}),
        ("cifar_densenet121_flip_adversarial", "cifar_resnet18_flip_adversarial", {"model": "densenet121"}),
        ("cifar_resnet18_low_pass", "cifar_resnet18", {"low_pass": 16, "low_pass_published": True, "eps": 0.0}),
        (
            "smoothadv_012_pretrained",
            "smoothadv_012",
            {"model": "x", "epochs": 30, "lr": 1e-3, "copies": 2, "batch_size": 128},
        ),
        ("smoothadv_025_self_training", "smoothadv_025", {"extra": "tiny_images", "extra_weight": 0.1}),
    ],
)
def test_recipes_of_one_paper_differ_in_what_is_published_alone(
    recipe: str, base: str, differences: dict[str, Any]
) -> None:
    def read(name: str) -> dict[str, Any]:
        text = (RECIPES / f"{name}.yaml").read_text()
        words = ["--config", str(RECIPES / f"{name}.yaml"), *([] if "\nmodel:" in text else ["--model", "x"])]
        return vars(parse_config(Config, words, "test", "adversarial_demo.yaml"))

    one, other = read(recipe), read(base)
    assert {key: value for key, value in one.items() if value != other[key]} == differences | {"out": f"runs/{recipe}"}


@pytest.mark.parametrize(("given", "radius"), [(0.5, 0.5), ("0.5", 0.5), ("64/256", 0.25), ("8/255", 8 / 255), (0, 0)])
def test_radius_in_any_unit(given: float | str, radius: float) -> None:
    assert Config(data="x", model="lenet", eps=given).radius == radius


def test_the_optimiser_is_plain_sgd_and_a_skipped_first_step_leaves_it_as_it_was() -> None:
    torch.manual_seed(0)
    ours, plain = (torch.nn.Parameter(torch.linspace(-1, 1, 12).reshape(3, 4)) for _ in range(2))
    guarded = robust.make_optimizer([ours], 0.1, 0.01)
    oracle = torch.optim.SGD([plain], 0.1, momentum=0.9, weight_decay=0.01, fused=False, foreach=False)
    for step in range(6):
        gradient = torch.randn(3, 4)
        bad = step in (0, 3)
        guarded.found_inf = torch.tensor(float(bad))  # type: ignore[attr-defined]
        ours.grad = gradient * float("nan") if bad else gradient
        guarded.step()
        if not bad:
            plain.grad = gradient
            oracle.step()
        assert torch.allclose(ours, plain, atol=1e-6), step


def test_state_of_sgd_goes_into_a_checkpoint_and_back() -> None:
    torch.manual_seed(0)
    first, second = (
        torch.nn.Parameter(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)) for _ in range(2)
    )
    one, other = robust.make_optimizer([first], 0.1, 0.01), robust.make_optimizer([second], 0.1, 0.01)
    assert state_keys(one) == ("momentum_buffer",)
    first.grad = torch.randn_like(first)
    one.step()
    saved = {name: tensor.contiguous() for name, tensor in optimizer_tensors(one, ["w"]).items()}
    assert list(saved) == ["w/momentum_buffer"]
    load_optimizer_tensors(other, ["w"], saved)
    momentum = other.state[second]["momentum_buffer"]
    assert torch.equal(momentum, one.state[first]["momentum_buffer"])
    assert momentum.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(ModelError, match="lacks the optimiser state w/momentum_buffer"):
        load_optimizer_tensors(other, ["w"], {})
    with pytest.raises(ValueError, match="AdamW and of SGD with momentum"):
        state_keys(torch.optim.SGD([first], 0.1))


# ----------------------------------------------------------------------------------------------------------------------
# What a step does
# ----------------------------------------------------------------------------------------------------------------------


def normalised(gradient: torch.Tensor) -> torch.Tensor:
    return gradient / gradient.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)


def smoothadv_by_hand(
    net: Classifier, images: torch.Tensor, labels: torch.Tensor, noise: torch.Tensor, eps: float, steps: int
) -> torch.Tensor:
    """Salman et al.'s PGD_L2 on m noises [n, m, ...], literally: box, then ball, from the image itself."""
    delta = torch.zeros_like(images)
    for _ in range(steps):
        delta.requires_grad_()
        seen = ((images + delta)[:, None] + noise).flatten(0, 1)
        likelihood = net(seen).softmax(dim=1).unflatten(0, noise.shape[:2]).mean(dim=1).clamp_min(1e-20)
        loss = torch.nn.functional.nll_loss(likelihood.log(), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, delta)
        delta = delta.detach() + 2 * eps / steps * normalised(gradient)
        delta = (images + delta).clamp(0, 1) - images
        length = delta.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
        delta = torch.where(length > eps, delta * eps / (length + 1e-7), delta)
    return images + delta


def first_batch(data: str, batch_size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    with open_batches(load_images(data, "train"), global_batch=batch_size, seed=seed) as batches:
        batch = next(batches)
    return unit_interval(batch["image"]), batch["label"]


def noise_by_hand(rows_of_part: int, parts: int, shape: tuple[int, ...], sigma: float, step: int = 0) -> torch.Tensor:
    drawn = []
    for part in range(parts):
        generator = torch.Generator().manual_seed(step_seed(0, step, -1 - part))
        drawn.append(torch.empty(rows_of_part, *shape).normal_(0, sigma, generator=generator))
    return torch.cat(drawn)


def check_first_step(
    settings: dict[str, Any], net: Classifier, images: torch.Tensor, labels: torch.Tensor, tolerance: float = 1e-4
) -> None:
    """The weights after one step of the run are those of `net` after one plain SGD step on these images.

    tolerance: of the change of all weights, relative to its length.
    """
    result = main(Config(**settings))
    found = weights_after(settings["out"])
    loss = torch.nn.functional.cross_entropy(net(images), labels)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), settings.get("clip") or math.inf)
    assert rows(settings["out"])[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert rows(settings["out"])[0]["gradient_norm"] == pytest.approx(norm.item(), rel=10 * tolerance)
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    torch.optim.SGD(net.parameters(), settings["lr"], momentum=0.9, weight_decay=1e-4, foreach=False).step()
    moves, differences = [], []
    for name, parameter in net.named_parameters():
        moves.append((parameter.detach() - before[name]).flatten())
        differences.append((found[f"model/classifier.{name}"] - parameter.detach()).flatten())
        assert moves[-1].abs().max() > 0, f"{name} has to move"
    assert torch.cat(differences).norm() <= tolerance * torch.cat(moves).norm()
    for name, buffer in net.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            assert torch.allclose(found[f"model/classifier.{name}"], buffer, atol=1e-5), name
    assert result["total_steps"] == 1


def initial(name: str, classes: int = 10, **options: Any) -> Classifier:
    torch.manual_seed(0)
    return load_classifier(name, num_classes=classes, weights=False, **options)


def test_a_smoothadv_step_is_the_published_one(settings: dict[str, Any]) -> None:
    """The same noise in the attack and in the update, all copies trained on, radius of the first epoch of the ramp."""
    batch, sigma, copies, steps = TRAIN, 0.12, 3, 4
    settings |= {"batch_size": batch, "copies": copies, "attack_steps": steps, "eps_warmup": 2, "epochs": 1, "lr": 0.02}
    net = initial("lenet")
    images, labels = first_batch(settings["data"], batch)
    noise = noise_by_hand(batch // 16, 16, (copies, 1, 28, 28), sigma)
    moved = smoothadv_by_hand(net.eval(), images, labels, noise, 0.25 / 2, steps)
    assert (moved - images).flatten(1).norm(dim=1) == pytest.approx(torch.full((batch,), 0.125), rel=1e-3)
    seen = (moved[:, None] + noise).flatten(0, 1)
    check_first_step(settings, net.train(), seen, labels.repeat_interleave(copies))


def test_an_attack_leaves_batch_norm_alone_and_the_step_counts_its_images_once(with_batch_norm: dict[str, Any]) -> None:
    """By hand: attack in evaluation mode, one forward pass of the moved images in training mode."""
    settings = with_batch_norm | {"batch_size": 32, "pad": 0, "mirror": False, "clip": 0.5, "lr": 0.02}
    net = initial("cifar_resnet20", 5)
    data = load_images(settings["data"], "train", size=32, channels=3)
    with open_batches(data, global_batch=32) as batches:
        batch = next(batches)
    images, labels = unit_interval(batch["image"]), batch["label"]
    moved = smoothadv_by_hand(net.eval(), images, labels, torch.zeros(32, 1, 1, 1, 1), 0.5, 1)
    check_first_step(settings, net.train(), moved, labels, tolerance=0.01)  # roundings of the attack pass many kinks


def test_perturbing_restores_the_mode_and_gives_no_gradient_to_weights() -> None:
    config = Config(data="x", model="cifar_resnet20", attack="pgd", eps=0.5, attack_steps=2)
    net = initial("cifar_resnet20").train()
    net.net.get_submodule("layer3").eval()  # a part that is frozen stays so
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    moved = robust.perturb(net, images, torch.arange(4), 0.5, None, None, config)
    assert (moved - images).flatten(1).norm(dim=1) == pytest.approx(torch.full((4,), 0.5), rel=1e-3)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())
    assert [module.training for module in net.modules()] == modes


def test_flipped_training_sees_flipped_images(settings: dict[str, Any]) -> None:
    """Standard training with --flip is training of the bare net on T((x - mean) / std); the export says so."""
    plain = {"attack": "none", "sigma": 0.0, "copies": 1, "batch_size": TRAIN, "epochs": 1, "lr": 0.05}
    settings |= plain | {"flip": True, "eps": 0}
    net = initial("lenet")
    images, labels = first_batch(settings["data"], TRAIN)
    flipped = dct.flip((images - 0.1307) / 0.3081) * 0.3081 + 0.1307  # the unflipped net normalises once more
    check_first_step(settings, net.train(), flipped, labels)
    assert load_classifier(f"local-dir:{settings['out']}/export").flip


def test_nearest_in_plain_pixels_is_the_constrained_attack_on_flipped_data() -> None:
    """The point that an attack with order `nearest` reaches, flipped, is in ball and box of flipped data: Dykstra's."""
    config = Config(data="x", model="lenet", attack="pgd", eps=2.0, attack_steps=1, order="nearest", flip=True)
    net = initial("lenet", flip=True).eval()
    images = torch.rand(6, 1, 28, 28, generator=torch.Generator().manual_seed(0)).round()  # on the edge of the box
    labels = torch.arange(6)
    moved = robust.perturb(net, images, labels, 2.0, None, None, config)
    # By hand, in the flipped domain: a gradient step, then Dykstra's algorithm between the ball and the flipped box.
    bare = initial("lenet").eval()
    start = dct.flip((images - 0.1307) / 0.3081).double()
    variable = start.float().requires_grad_()
    loss = torch.nn.functional.cross_entropy(bare.net(variable), labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, variable)
    eps = 2.0 / 0.3081
    point, p, q = start + 2 * eps * normalised(gradient.double()), torch.zeros(()), torch.zeros(())
    for _ in range(300):
        toward = point + p - start
        length = toward.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
        in_ball = start + toward * (eps / length).clamp(max=1)
        p = point + p - in_ball
        pixels = (dct.flip(in_ball + q) * 0.3081 + 0.1307).clamp(0, 1)
        point = dct.flip((pixels - 0.1307) / 0.3081)
        q = in_ball + q - point
    assert (dct.flip((moved.double() - 0.1307) / 0.3081) - point).abs().max() < 1e-3


def test_extra_images_have_their_weight_and_the_labels_of_a_model(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "extra"
    write_digits(folder, 32, "train", 5)
    labeller = initial("lenet")
    save_classifier(tmp_path / "labeller", labeller, {})
    plain = {"attack": "none", "sigma": 0.0, "copies": 1, "batch_size": TRAIN + 32, "epochs": 1, "lr": 0.02, "eps": 0}
    settings |= plain | {"extra": f"mnist:{folder}", "extra_weight": 0.25}
    settings |= {"extra_labels": f"local-dir:{tmp_path}/labeller"}
    main(Config(**settings))
    net = initial("lenet").train()
    own, extra = load_images(settings["data"], "train"), load_images(f"mnist:{folder}", "train")
    with torch.no_grad():
        answers = labeller(unit_interval(extra.images)).argmax(dim=1)
    assert not torch.equal(answers, extra.labels)
    losses = [
        torch.nn.functional.cross_entropy(net(unit_interval(images)), labels, reduction="sum")
        for images, labels in ((own.images, own.labels), (extra.images, answers))
    ]
    loss = (losses[0] + 0.25 * losses[1]) / (TRAIN + 32)
    assert rows(settings["out"])[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    loss.backward()
    torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4).step()
    found = weights_after(settings["out"])
    for name, parameter in net.named_parameters():
        assert torch.allclose(found[f"model/classifier.{name}"], parameter, atol=2e-6), name
    save_classifier(tmp_path / "labeller", initial("lenet", flip=True), {"other": True})
    main(Config(**settings))  # the same weights: continues, and has nothing to do
    torch.manual_seed(1)
    save_classifier(tmp_path / "labeller", load_classifier("lenet", weights=False), {})
    with pytest.raises(ConfigError, match="not the images of the checkpoint"):
        main(Config(**settings))


def test_weights_of_other_classes_start_a_new_last_layer(settings: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(7)
    source = load_classifier("lenet", num_classes=1000, weights=False)
    save_classifier(tmp_path / "source", source, {})
    settings |= {"model": f"local-dir:{tmp_path}/source", "lr": 0.0, "weight_decay": 0.0, "epochs": 1}
    main(Config(**settings))
    trained = load_classifier(f"local-dir:{settings['out']}/export")
    assert trained.classes == tuple("0123456789")
    for name, tensor in source.net.state_dict().items():
        if not name.startswith("fc3."):
            assert torch.equal(trained.net.state_dict()[name], tensor), name
    assert results(settings["out"])["test_accuracy"]["start_sha256"] == state_sha256(source.state_dict())
    save_classifier(tmp_path / "source", load_classifier("lenet", num_classes=1000, weights=False), {})
    with pytest.raises(ConfigError, match="not the weights that the checkpoint began with"):
        main(Config(**{**settings, "epochs": 2}))


@pytest.mark.parametrize("published", [False, True])
def test_low_passed_images_are_filtered_once_and_normalised_by_their_own_statistics(
    published: bool, settings: dict[str, Any]
) -> None:
    """Standard training with --low_pass is training of the bare net on filtered images; the export holds the filter."""
    plain = {"attack": "none", "sigma": 0.0, "copies": 1, "batch_size": TRAIN, "epochs": 1, "lr": 0.02, "eps": 0}
    settings |= plain | {"low_pass": 7, "low_pass_published": published}
    images, labels = first_batch(settings["data"], TRAIN)
    filtered = dct.low_pass(images, 7, published=published)
    filtered = filtered if published else filtered.clamp(0, 1)
    assert (filtered.min() < 0) == published, "these images put clipping to the test"
    mean, std = filtered.double().mean().item(), filtered.double().std().item()
    check_first_step(settings, initial("lenet", mean=(mean,), std=(std,)).train(), filtered, labels)
    net = load_classifier(f"local-dir:{settings['out']}/export")
    assert (net.low_pass, net.low_pass_published) == (7, published)
    assert net.mean.item() == pytest.approx(mean, rel=1e-5)
    assert net.std.item() == pytest.approx(std, rel=1e-4)
    test = load_images(settings["data"], "test")
    right = int((net(unit_interval(test.images)).argmax(dim=1) == test.labels).sum())
    assert results(settings["out"])["test_accuracy"]["correct"] == right
    other = {"model": f"local-dir:{settings['out']}/export", "low_pass": 0, "low_pass_published": False}
    main(Config(**{**settings, **other, "out": settings["out"] + "2"}))
    assert load_classifier(f"local-dir:{settings['out']}2/export").low_pass == 7, "a start keeps its filter"


def test_an_attack_goes_through_the_low_pass_filter_and_moves_plain_pixels() -> None:
    config = Config(data="x", model="lenet", attack="pgd", eps=1.0, attack_steps=1, low_pass=7, order="ball_then_box")
    net = initial("lenet", low_pass=7)
    images = torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.25
    variable, labels = images.clone().requires_grad_(), torch.arange(4)
    bare = initial("lenet")
    loss = torch.nn.functional.cross_entropy(bare(dct.low_pass(variable, 7).clamp(0, 1)), labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, variable)
    moved = robust.perturb(net, images, labels, 1.0, None, None, config)
    assert torch.allclose(moved, (images + normalised(gradient)).clamp(0, 1), atol=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# What a run leaves
# ----------------------------------------------------------------------------------------------------------------------


def test_run_learns_and_its_results_are_those_of_its_export(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adversarial, "draw_loss", DRAW)
    settings |= {"epochs": 25, "lr": 0.05, "eval_count": 30, "batch_size": 32, "lr_step": 0, "eps": 0.5, "log_every": 5}
    result = main(Config(**settings))
    out, logged = Path(settings["out"]), rows(settings["out"])
    assert logged[-1]["loss"] < 0.5 * logged[0]["loss"]
    assert {"lr", "accuracy", "gradient_norm", "epoch", "data_wait_share", "memory_mib"} <= logged[0].keys()
    for name in ("config.yaml", "env.json", "loss.png", "loss.svg", "export/classifier.safetensors"):
        assert (out / name).stat().st_size > 0, name
    net = load_classifier(f"local-dir:{out / 'export'}")
    assert net.classes == tuple("0123456789")
    found = results(out)
    assert list(found) == ["test_accuracy", "test_accuracy_under_noise", "test_robust_accuracy"]
    test = load_images(settings["data"], "test")
    right = net(unit_interval(test.images)).argmax(dim=1) == test.labels
    assert found["test_accuracy"]["correct"] == int(right.sum())
    assert found["test_accuracy"]["value"] == result["test_accuracy"] > 0.5
    assert [found[metric]["n"] for metric in found] == [TEST, TEST, 30]
    assert found["test_accuracy_under_noise"]["sigma"] == 0.12
    robust_row = found["test_robust_accuracy"]
    assert (robust_row["attack"], robust_row["norm"], robust_row["eps"]) == ("PGD-20", "l2", 0.5)
    assert robust_row["correct"] <= int(right.sum())
    attack = {"model": f"local-dir:{out / 'export'}", "data": settings["data"], "count": 30, "eps": "0.5"}
    measured = evaluation.main(evaluation.Config(**attack, attacks="pgd", checks=False, out=f"{out}-attack"))["rows"]
    assert [row["value"] for row in measured if row["attack"] == "PGD-20"] == [robust_row["value"]]
    for row in found.values():
        interval = stats.binomtest(row["correct"], row["n"]).proportion_ci(method="wilson")
        assert row["interval"] == pytest.approx([interval.low, interval.high], abs=1e-9)
        assert row["weights_sha256"] == state_sha256(net.state_dict())
        assert row["training_precision"] == {"step": "no", "attack": "fp32"}
        assert {"commit", "versions", "date", "config", "seed", "data_fingerprint", "data_reports"} <= row.keys()
    again = main(Config(**settings))  # all is done: nothing is measured or written a second time
    assert again["test_robust_accuracy"] == result["test_robust_accuracy"]
    assert results(out) == found


def all_rows(out: str) -> list[tuple[str, int]]:
    lines = (Path(out) / "results.jsonl").read_text().splitlines()
    return [(row["metric"], row["n"]) for row in map(json.loads, lines)]


def test_other_test_images_or_another_number_of_them_are_measured_anew(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    plain = {"attack": "none", "sigma": 0.0, "copies": 1, "epochs": 1, "eps": 0.5, "eval_count": 0}
    settings |= plain
    assert "test_robust_accuracy" not in main(Config(**settings))
    assert "test_robust_accuracy" in main(Config(**{**settings, "eval_count": 20}))
    write_digits(tmp_path / "other", 30, "t10k", 9)
    other = {**settings, "eval_count": 20, "test_data": f"mnist:{tmp_path}/other"}
    found = main(Config(**other))
    assert main(Config(**other))["test_robust_accuracy"] == found["test_robust_accuracy"]
    first, second, third = [("test_accuracy", TEST)], [("test_robust_accuracy", 20)], [("test_accuracy", 30)]
    assert all_rows(settings["out"]) == first + first + second + third + second
    file = Path(settings["out"]) / "results.jsonl"
    file.write_text(file.read_text().replace("PGD-20", "PGD-10"))  # results of another attack do not count
    main(Config(**other))
    assert all_rows(settings["out"])[5:] == third + second


def test_what_is_measured_does_not_hang_on_the_size_of_the_batch() -> None:
    net = initial("lenet").eval()
    sizes: list[int] = []
    net.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    count = 250
    images = torch.randint(0, 256, (count, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = net(unit_interval(images)).argmax(dim=1)
    sizes.clear()
    test = ImageSet(images, labels, tuple("0123456789"), "random", "")
    numbers = []
    for batch_size in (250, 4000):
        config = Config(data="x", model="lenet", sigma=0.5, eps=0.1, batch_size=batch_size, eval_count=120)
        rows = robust.measure(net, test, config, Agreement(0, 1), torch.device("cpu"), lambda: None)
        assert max(sizes) == 100
        assert [row["n"] for row in rows.values()] == [count, count, 120]
        numbers.append([row["correct"] for row in rows.values()])
    assert numbers[0] == numbers[1]
    assert numbers[0][0] == count


def test_a_run_that_ends_while_it_measures_leaves_its_classifier(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = robust.measure

    def measure(*arguments: Any) -> dict[str, dict[str, Any]]:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(robust, "measure", measure)
        with pytest.raises(StopRequested):
            main(Config(**settings))
    state = load_classifier(f"local-dir:{settings['out']}/export").net.state_dict()
    assert not (Path(settings["out"]) / "results.jsonl").exists()
    assert main(Config(**settings))["test_accuracy"] >= 0
    after = load_classifier(f"local-dir:{settings['out']}/export").net.state_dict()
    assert all(torch.equal(state[name], after[name]) for name in state)


def test_a_finished_run_goes_on_into_another_folder(settings: dict[str, Any]) -> None:
    first = main(Config(**{**settings, "eval_count": 10}))
    checkpoint = next((Path(settings["out"]) / "checkpoints").iterdir())
    other = {**settings, "eval_count": 10, "out": settings["out"] + "2"}
    moved = main(Config(**{**other, "resume": str(checkpoint)}))
    again = main(Config(**other))  # finds a checkpoint of its own there, and does not train from scratch
    for result in (moved, again):
        assert result["test_robust_accuracy"] == first["test_robust_accuracy"]
        assert result["total_steps"] == first["total_steps"]
    assert not rows(other["out"])
    assert results(other["out"])["test_accuracy"]["skipped_steps"] == 0
    weights = [weights_after(out) for out in (settings["out"], other["out"])]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_gradient_free_attack_stays_in_the_ball_and_finds_less_than_the_gradient(settings: dict[str, Any]) -> None:
    config = Config(**{**settings, "attack": "smoothadv_gradient_free", "copies": 4})
    images = torch.rand(6, 1, 28, 28, generator=torch.Generator().manual_seed(0)).round()  # on the edge of the box
    noise = noise_by_hand(6, 1, (4, 1, 28, 28), 0.12).flatten(0, 1)
    moved = robust.perturb(initial("lenet"), images, torch.arange(6), 0.25, noise, None, config)
    lengths = (moved - images).flatten(1).norm(dim=1)
    assert lengths.min() > 0.01
    assert lengths.max() <= 0.25 * (1 + 1e-5)
    assert moved.min() >= 0
    assert moved.max() <= 1
    settings |= {"attack": "smoothadv_gradient_free", "copies": 4, "epochs": 1}
    main(Config(**settings))
    free = rows(settings["out"])
    main(Config(**{**settings, "attack": "smoothadv", "out": settings["out"] + "2"}))
    assert all(math.isfinite(row["loss"]) for row in free)
    # From the same weights on the same images with the same noise the gradient finds more.
    assert free[0]["loss"] < rows(settings["out"] + "2")[0]["loss"]


# ----------------------------------------------------------------------------------------------------------------------
# Resume, signals, several processes
# ----------------------------------------------------------------------------------------------------------------------


def stop_after(settings: dict[str, Any], steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs until `steps` steps are done: a SIGTERM arrives in the middle of the last one."""
    original = adversarial.step_lr

    def lr_and_signal(step: int, *rest: Any) -> float:
        if step == steps - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(adversarial, "step_lr", lr_and_signal)
        with pytest.raises(StopRequested) as stopped:
            main(Config(**settings))
    assert stopped.value.code == 143
    assert f"saved at step {steps} of" in str(stopped.value)


@pytest.mark.parametrize("kind", ["smoothadv", "batch norm"])
def test_resume_is_bit_for_bit(
    kind: str,
    settings: dict[str, Any],
    with_batch_norm: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Over the end of an epoch and a step of the ramp; with random starts, crops and mirror images."""
    if kind == "smoothadv":
        settings |= {"eps_warmup": 3, "random_start": True, "eval_count": 10}
    else:
        settings = with_batch_norm | {"epochs": 2}  # of 4 steps
    whole, halves = settings | {"out": str(tmp_path / "whole")}, settings | {"out": str(tmp_path / "halves")}
    unbroken = main(Config(**whole))
    stop_after(halves, 5, monkeypatch)
    broken = main(Config(**halves))
    trained = unbroken["total_steps"] * settings["batch_size"]
    for result, starts in ((unbroken, 1), (broken, 2)):
        samples = [report["samples"] for report in result["data_reports"]]
        assert (len(samples), sum(samples)) == (starts, trained), "images that were trained on, and no others"
    first, second = weights_after(whole["out"]), weights_after(halves["out"])
    assert first.keys() == second.keys()
    assert any(name.endswith("/momentum_buffer") for name in first)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert strip(whole["out"]) == strip(halves["out"])
    assert unbroken["test_accuracy"] == broken["test_accuracy"]


@pytest.mark.timeout(200)
def test_a_signal_to_one_rank_stops_both_at_one_step_and_one_process_goes_on(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    with ranks.Script("train/adversarial.py", {**settings, "epochs": 1000}, tmp_path / "said", world=2) as script:
        script.wait_for("step 3/6000", seconds=100)
        os.kill(script.processes[1].pid or 0, signal.SIGTERM)
        assert script.wait() == [143, 143], script.said()
    (saved,) = (Path(settings["out"]) / "checkpoints").iterdir()
    step = int(saved.name.removeprefix("step_"))
    assert f"saved at step {step} of 6000" in script.said()
    assert "Traceback" not in script.said()
    settings |= {"epochs": step // 6 + 1}
    main(Config(**settings))
    whole = settings | {"out": str(tmp_path / "whole")}
    main(Config(**whole))
    for a, b in zip(rows(whole["out"]), rows(settings["out"]), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3), a["step"]


@pytest.mark.timeout(200)
def test_processes_with_other_test_images_say_so(settings: dict[str, Any], tmp_path: Path) -> None:
    """They would wait for each other for good: one has fewer batches to measure than the other."""
    port, config = ranks.free_port(), Config(**{**settings, "data": "mnist", "epochs": 1})
    processes = []
    for rank, count in ((0, 40), (1, 120)):
        folder = tmp_path / str(rank) / "mnist"
        write_digits(folder, TRAIN, "train", 0)
        write_digits(folder, count, "t10k", 1)
        environment = ranks.world_of(rank, 2, port) | {"SHIFTLENS_DATA": str(folder.parent)}
        processes.append(ranks.start(main, config, tmp_path / f"said_{rank}", environment))
    try:
        for process in processes:
            process.join(100)
        assert [process.exitcode for process in processes] == [1, 1]
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert "DataError: images or weights here are not those of rank 0" in (tmp_path / "said_1").read_text()
    assert not (Path(settings["out"]) / "metrics.jsonl").exists(), "before the first step"


@pytest.mark.timeout(200)
def test_two_processes_equal_one(settings: dict[str, Any], tmp_path: Path) -> None:
    """Noise, random starts, crops, mirror images, weights of extra images, evaluation: as with one process."""
    folder = tmp_path / "extra"
    write_digits(folder, 32, "train", 5)
    settings |= {"pad": 2, "mirror": True, "extra": f"mnist:{folder}", "extra_weight": 0.5, "eval_count": 24}
    settings |= {"random_start": True}
    one, two = settings | {"out": str(tmp_path / "one")}, settings | {"out": str(tmp_path / "two")}
    main(Config(**one))
    ranks.run_two(main, Config(**two), tmp_path)
    assert json.loads((tmp_path / "two" / "env.json").read_text())[-1]["world"] == 2
    first, second = rows(one["out"]), rows(two["out"])
    assert len(first) == len(second) == 16
    for a, b in zip(first, second, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5), a["step"]
        assert a["accuracy"] == pytest.approx(b["accuracy"]), a["step"]
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-4), a["step"]
    for metric, row in results(one["out"]).items():
        assert (row["correct"], row["n"]) == (results(two["out"])[metric]["correct"], row["n"]), metric


def take_three_steps(folder: Path) -> None:
    """On each of two ranks: three steps of a batch norm on other numbers, of which the second is not finite."""
    with contextlib.ExitStack() as resources:
        accelerator = start_accelerator(None, folder, resources)
        norm = torch.nn.BatchNorm1d(3)
        module = torch.nn.Sequential(norm, torch.nn.Linear(3, 1))
        optimizer = robust.make_optimizer(list(module.parameters()), 0.1, 0.0)
        guarded = loop.GuardedStep(accelerator, module, optimizer, math.inf, None, share_statistics=True)
        kept = []
        for step in range(3):
            guarded.begin(0.1)
            numbers = 1.0 + step + 10 * accelerator.process_index + torch.arange(12.0).reshape(4, 3)
            numbers[0, 0] *= float("nan") if step == 1 else 1
            with guarded.piece(last=True):
                accelerator.backward(guarded.model(numbers).square().mean())
            guarded.finish()
            kept.append([norm.running_mean.tolist(), norm.running_var.tolist()])  # type: ignore[union-attr, operator]
        (folder / f"rank_{accelerator.process_index}.json").write_text(json.dumps(kept))
        guarded.end()


@pytest.mark.timeout(200)
def test_ranks_go_on_with_the_mean_of_their_batch_norm_statistics(tmp_path: Path) -> None:
    """An attack looks at them between steps; a checkpoint has one set, so that a restart must not change them."""
    ranks.run_two(take_three_steps, tmp_path, tmp_path)
    one, two = (json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in (0, 1))
    assert one == two
    assert one[0] == one[1], "a step that is skipped leaves no trace"
    expected = [torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3)]
    for found, step in ((one[0], 0), (one[2], 2)):
        for rank, norm in enumerate(expected):
            norm(1.0 + step + 10 * rank + torch.arange(12.0).reshape(4, 3))
        for name, values in zip(("running_mean", "running_var"), found, strict=True):
            mean = sum(getattr(norm, name) for norm in expected) / 2
            assert values == pytest.approx(mean.tolist(), rel=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Precision, shards, faults
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(120)
def test_bf16_steps_and_attacks_are_near_those_of_float32_and_said(settings: dict[str, Any], tmp_path: Path) -> None:
    settings |= {"epochs": 1, "attack_precision": "bf16", "out": str(tmp_path / "bf16")}
    environment = {"ACCELERATE_MIXED_PRECISION": "bf16"}
    process = ranks.start(main, Config(**settings), tmp_path / "said.txt", environment)
    process.join(100)
    assert process.exitcode == 0, (tmp_path / "said.txt").read_text()[-2000:]
    main(Config(**{**settings, "attack_precision": "fp32", "out": str(tmp_path / "fp32")}))
    rounded, exact = rows(tmp_path / "bf16"), rows(tmp_path / "fp32")
    assert exact[0]["loss"] != rounded[0]["loss"]
    for a, b in zip(exact, rounded, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.02), a["step"]
    precisions = results(tmp_path / "bf16")["test_accuracy"]["training_precision"]
    assert precisions == {"step": "bf16", "attack": "bf16"}


def test_fp16_on_a_cpu_is_refused(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(LaunchError, match="fp16 has no effect on a CPU") as caught:
        main(Config(**settings))
    assert one_line(caught)


def test_nets_for_large_images_are_trained_from_a_stream(settings: dict[str, Any], tmp_path: Path) -> None:
    shards = str(write_shards(tmp_path / "shards", [i % 5 for i in range(8)], list("abcde"), cuts=1))
    settings |= {"data": shards, "test_data": shards, "model": "torchvision:resnet18", "attack": "pgd", "sigma": 0.0}
    settings |= {"copies": 1, "attack_steps": 1, "batch_size": 8, "workers": 0, "eval_count": 1, "mirror": True}
    settings |= {"eps": 3.0, "order": "ball_then_box", "lr": 0.01}
    result = main(Config(**settings))
    assert result["total_steps"] == 2
    assert result["data_reports"][0]["samples"] == 16
    found = results(settings["out"])
    assert {metric: row["n"] for metric, row in found.items()} == {"test_accuracy": 1, "test_robust_accuracy": 1}
    with pytest.raises(ConfigError, match="--test_data is missing"):
        main(Config(**{**settings, "test_data": "", "out": settings["out"] + "2"}))
    with pytest.raises(ConfigError, match="are for images in memory"):
        main(Config(**{**settings, "pad": 4, "out": settings["out"] + "2"}))


def test_a_non_finite_step_is_skipped_and_leaves_no_trace(
    with_batch_norm: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the first of all, which has no momentum yet."""
    original, calls = robust.TrainingModule.forward, [0]

    def overflow(self: robust.TrainingModule, images: torch.Tensor, *rest: Any) -> dict[str, torch.Tensor]:
        calls[0] += 1
        return original(self, images * float("inf") if calls[0] in (1, 3) else images, *rest)

    monkeypatch.setattr(robust.TrainingModule, "forward", overflow)
    assert main(Config(**with_batch_norm))["skipped_steps"] == 2
    assert sum(row["loss"] is None for row in rows(with_batch_norm["out"])) == 2
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights_after(with_batch_norm["out"]).values())


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"eps": "8/"}, "--eps 8/: expected a number"),
        ({"eps": "8/", "attack": "none", "copies": 1}, "--eps 8/: expected a number"),
        ({"eps": "1/0"}, "--eps 1/0: expected a number"),
        ({"eps": -1.0}, "--eps -1.0: expected a number"),
        ({"eps": 0, "attack": "pgd", "sigma": 0.0, "copies": 1}, "--attack pgd needs --eps above 0"),
        ({"attack_steps": 0}, "--attack smoothadv needs --attack_steps and --step_size above 0"),
        ({"step_size": 0.0}, "--attack smoothadv needs --attack_steps and --step_size above 0"),
        ({"norm": "linf", "eps": 8.0}, "--eps 8.0: .* no L∞ radius beyond 1 has a meaning; 8/255"),
        ({"sigma": 25.0}, "--sigma 25 is for pixels .* cannot be above 2; .* give 0.098"),
        ({"low_pass_published": True}, "--low_pass_published is a kind of --low_pass"),
        ({"sigma": 0.0}, "needs --sigma"),
        ({"attack": "smoothadv_gradient_free", "copies": 1}, "needs --copies of at least 2"),
        ({"attack": "none", "sigma": 0.0}, "--copies above 1 needs --sigma"),
        ({"attack": "pgd"}, "say --attack smoothadv"),
        ({"copies": 0}, "--copies must be at least 1"),
        ({"lr": float("nan")}, "--lr must be"),
        ({"pad_color": "1,2,red"}, "--pad_color 1,2,red: expected numbers"),
        ({"pad_color": "256"}, "--pad_color 256: expected numbers"),
        ({"pad_color": "²"}, "--pad_color ²: expected numbers"),
        ({"extra_weight": 0.5}, "need --extra"),
        ({"data": ""}, "--data is missing"),
        ({"model": ""}, "--model is missing"),
    ],
)
def test_impossible_settings_are_refused_at_once(
    change: dict[str, Any], expected: str, settings: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        Config(**{**settings, **change})
    assert one_line(caught)


@pytest.mark.parametrize(
    ("change", "error", "expected"),
    [
        ({"data": "/no/such/folder"}, DataError, "/no/such/folder"),
        ({"model": "lenett"}, ModelError, "lenet"),
        ({"model": "lenet//no/such/file"}, ModelError, "/no/such/file"),
        ({"model": "cifar_resnet20"}, DataError, "32"),
        ({"batch_size": 1000}, DataError, "larger than the data set"),
        ({"eps": "64"}, ConfigError, "--eps 64: no two images of 1 x 28 x 28 .* 28 apart in L2; .* write 64/255"),
        ({"sync_batch_norm": True}, ConfigError, "--sync_batch_norm needs GPUs"),
        ({"pad": 2, "pad_color": "1,2,3"}, ConfigError, "--pad_color 1,2,3: .* 1 channels"),
        ({"norm": "linf", "order": "box_then_ball", "resume": "/no/checkpoint"}, ModelError, "/no/checkpoint"),
    ],
)
def test_what_cannot_work_is_one_line(
    change: dict[str, Any], error: type[Exception], expected: str, settings: dict[str, Any]
) -> None:
    with pytest.raises(error, match=expected) as caught:
        main(Config(**{**settings, **change}))
    assert one_line(caught)


def test_noise_copies_without_an_attack_are_the_ablation_of_radius_0(settings: dict[str, Any]) -> None:
    main(Config(**{**settings, "eps": 0}))
    main(Config(**{**settings, "attack": "none", "eps": 0, "out": settings["out"] + "2"}))
    assert strip(settings["out"]) == strip(settings["out"] + "2")


def test_a_color_in_yaml_is_that_of_the_flag(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("data: x\nmodel: lenet\npad_color: 0\n")
    flags = ["--data", "x", "--model", "lenet", "--pad_color", "0"]
    given = [["--config", str(tmp_path / "recipe.yaml")], flags]
    configs = [parse_config(Config, words, "test", "adversarial_demo.yaml") for words in given]
    assert configs[0] == configs[1]
    assert configs[0].colour == (0,)


@pytest.fixture
def undivided(tmp_path: Path) -> Path:
    """Class folders zero..nine with two images of 28 px each, not divided into train and test."""
    generator = np.random.default_rng(0)
    for number, name in enumerate(CLASSES):
        (tmp_path / "undivided" / name).mkdir(parents=True)
        for image in range(2):
            pixels = generator.integers(0, 200, (28, 28), dtype=np.uint8) + number
            Image.fromarray(pixels).save(tmp_path / "undivided" / name / f"{image}.png")
    return tmp_path / "undivided"


def test_training_images_are_not_tested_on(settings: dict[str, Any], undivided: Path) -> None:
    settings |= {"data": str(undivided), "epochs": 1}
    with pytest.raises(ConfigError, match="--test_data is missing: .* not divided .* or --eval_count 0") as caught:
        main(Config(**{**settings, "eval_count": 5}))
    assert one_line(caught)
    assert "test_accuracy" not in main(Config(**settings))
    assert not (Path(settings["out"]) / "results.jsonl").exists()
    assert load_classifier(f"local-dir:{settings['out']}/export").classes == tuple(sorted(CLASSES))


@pytest.mark.parametrize("kind", ["mnist:", ""])
def test_training_files_alone_are_enough_where_nothing_is_measured(
    kind: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    write_digits(tmp_path / "train_only", TRAIN, "train", 0)
    settings |= {"data": f"{kind}{tmp_path}/train_only", "epochs": 1}
    with pytest.raises(DataError, match="no test") as caught:
        main(Config(**{**settings, "eval_count": 5}))
    assert one_line(caught)
    assert "--split" not in str(caught.value)
    assert "test_accuracy" not in main(Config(**settings))


@pytest.mark.timeout(120)
def test_the_demo_serves_as_extra_and_as_test_images(undivided: Path) -> None:
    demo: dict[str, Any] = {"data": "demo", "test_data": "demo", "model": "torchvision:resnet18", "eval_count": 3}
    found = robust.find_data(Config(**demo), 96, 3, torch.device("cpu"))
    assert found.test is not None
    assert (len(found.test), found.test.classes) == (3, found.classes)
    extra = Config(data=str(undivided), extra="demo", model="cifar_resnet20", eval_count=0)
    with pytest.raises(DataError, match="--extra demo: other classes than --data"):  # found, but sorted otherwise
        robust.find_data(extra, 32, 3, torch.device("cpu"))


def test_a_labeller_or_a_start_with_its_classes_in_another_order_is_not_taken_as_it_is(
    settings: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_digits(tmp_path / "extra", 32, "train", 5)
    source = initial("lenet")
    source.classes = tuple("9876543210")
    save_classifier(tmp_path / "source", source, {})
    plain = {"attack": "none", "sigma": 0.0, "copies": 1, "eps": 0, "epochs": 1, "lr": 0.0, "weight_decay": 0.0}
    settings |= plain | {"model": "lenet"}
    labelled = {"extra": f"mnist:{tmp_path}/extra", "extra_labels": f"local-dir:{tmp_path}/source"}
    with pytest.raises(ConfigError, match="its classes are not those of --data in their order") as caught:
        main(Config(**{**settings, **labelled}))
    assert one_line(caught)
    main(Config(**{**settings, "model": f"local-dir:{tmp_path}/source", "seed": 1, "out": settings["out"] + "2"}))
    assert "has other classes: all but its last layer is taken" in capfd.readouterr().err
    trained = load_classifier(f"local-dir:{settings['out']}2/export")
    assert trained.classes == tuple("0123456789")
    for name, tensor in source.net.state_dict().items():
        assert torch.equal(trained.net.state_dict()[name], tensor) != name.startswith("fc3."), name


@pytest.mark.parametrize(
    ("script", "flags", "advice"),
    [
        ("train.adversarial", "--data demo", "Use a smaller --batch_size or --mixed_precision bf16 in the launch."),
        (
            "train.distill",
            "--data demo",
            "a smaller --batch_size or more --accumulate pieces or --mixed_precision bf16 in the launch.",
        ),
        ("eval.attack", "--data mnist --model lenet --eps 0.5", "Use fewer --images or --precision bf16."),
        ("eval.visualize", "--preset published", "Use a smaller --batch_size."),
    ],
)
def test_a_full_memory_names_flags_that_the_script_has(
    script: str, flags: str, advice: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(config: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore lines")

    monkeypatch.setattr("sys.argv", [script, *flags.split()])
    recipe = {"train.distill": "demo", "train.adversarial": "adversarial_demo", "eval.attack": "attack_cifar10"}
    with pytest.raises(SystemExit) as ended:
        run_script(full, importlib.import_module(script).Config, "test", f"{recipe.get(script, 'visualize_demo')}.yaml")
    assert ended.value.code == 1
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith("error: CUDA out of memory. Use ")
    assert line.endswith(advice)


def test_test_images_of_other_classes_are_refused(settings: dict[str, Any], colours: str) -> None:
    changed = {"data": colours, "test_data": settings["data"], "model": "cifar_resnet20"}
    with pytest.raises(DataError) as caught:
        main(Config(**{**settings, **changed}))
    assert one_line(caught)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"sigma": 0.25}, "sigma 0.12 -> 0.25"),
        ({"low_pass": 5}, "low_pass 0 -> 5"),
        ({"eps": "64/255"}, "eps '64/256' -> '64/255'"),
        ({"epochs": 1}, "beyond the 6 steps"),
        ({"resume": "none"}, "holds a run already"),
    ],
)
def test_resume_with_breaking_changes_is_refused(
    change: dict[str, Any], expected: str, settings: dict[str, Any]
) -> None:
    main(Config(**settings))
    with pytest.raises(ConfigError, match=expected) as caught:
        main(Config(**{**settings, **change}))
    assert one_line(caught)
