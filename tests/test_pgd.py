"""Whole PGD attacks: published runs, other libraries, what must hold of every attack, and what must stay untouched."""

import copy
import importlib.util
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from attacks.losses import cross_entropy, mean_log_probabilities, targeted
from attacks.pgd import draw_from_ball, evaluate, pgd, smoothadv, under_attack, unwrapped
from models.small import SMALL_NETS
from tests.test_pgd_step import assert_in_ball_and_box, parse

NORMS = ("linf", "l2")
L2: dict[str, Any] = {"norm": "l2", "eps": 0.5, "step_size": 0.2, "steps": 3}
LINF: dict[str, Any] = {"norm": "linf", "eps": 8 / 255, "step_size": 2 / 255, "steps": 3}


class Normalised(nn.Module):
    """A net for normalised images behind their normalisation."""

    def __init__(self, net: nn.Module, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.net, self.mean, self.std = net, mean, std

    def forward(self, images: Tensor) -> Tensor:
        return self.net((images - self.mean) / self.std)


class SmoothNet(nn.Module):
    """Five classes; smooth, so that roundings do not grow at kinks; with batch norm."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.fc = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        maps = torch.tanh(self.norm(self.conv1(images - 0.5)))
        return self.fc(torch.tanh(self.conv2(maps)).mean((2, 3)))


def smooth_net(device: str = "cpu", channels: int = 3) -> SmoothNet:
    torch.manual_seed(0)
    net = SmoothNet(channels)
    for weight in net.parameters():
        nn.init.normal_(weight, std=0.5)
    with torch.no_grad():
        net(torch.rand(64, channels, 8, 8))  # running statistics
    return net.to(device).eval()


def example(samples: int = 4, device: str = "cpu", side: int = 8) -> tuple[Tensor, Tensor]:
    """Images with some pixels on the faces of the box, and labels of five classes."""
    generator = torch.Generator().manual_seed(1)
    images = (torch.rand(samples, 3, side, side, generator=generator) * 1.2 - 0.1).clamp(0, 1)
    return images.to(device), torch.arange(samples, device=device) % 5


# --- Published runs and other libraries -------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def published(goldens: Path) -> Callable[[torch.dtype], tuple[nn.Module, Tensor, dict[str, Any]]]:
    """Type → the model of the stored runs in training mode, their images and everything stored."""
    stored = dict(np.load(goldens / "attacks.npz"))
    weights = load_file(goldens / "cifar_resnet20.safetensors")

    def make(dtype: torch.dtype) -> tuple[nn.Module, Tensor, dict[str, Any]]:
        small = SMALL_NETS["cifar_resnet20"]
        net = small.build(10)
        net.load_state_dict(weights)
        # The published figures have normalisation constants rounded to float32.
        mean, std = (torch.tensor(values)[:, None, None].to(dtype) for values in (small.mean, small.std))
        images = (torch.from_numpy(stored["images_u8"]).float() / 255).to(dtype)
        return Normalised(net.to(dtype).train(), mean, std), images, stored

    return make


def run_again(model: nn.Module, images: Tensor, stored: dict[str, Any], tag: str, few: slice = slice(0, 8)) -> Tensor:
    """The perturbations of some images of a stored run of PGD."""
    run = parse(tag)
    assert run is not None
    aimed = "targeted" in run["kind"]
    images, labels = images[few], torch.from_numpy(stored["target_labels" if aimed else "labels"])[few]
    noise = None
    if run["copies"]:
        noise = torch.from_numpy(stored[f"noise{run['copies']}"]).unflatten(0, (8, -1))[few].flatten(0, 1)
    given: dict[str, Any] = {"targeted": aimed, "noise": noise, "gradient_free": run["kind"] == "nograd"}
    if run["order"] == "box_then_ball":
        return smoothadv(model, images, labels, run["eps"], run["steps"], **given) - images
    settings = {name: run[name] for name in ("norm", "order", "eps", "steps", "step_size")}
    return pgd(model, images, labels, **settings, **given) - images


def adv_lib(module: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of adv_lib.attacks. The package imports visdom for its drawings, which nothing here makes."""
    pytest.importorskip("adv_lib", reason="adv_lib, an oracle of the attacks, is not installed")
    if importlib.util.find_spec("visdom") is None:
        monkeypatch.setitem(sys.modules, "visdom", types.ModuleType("visdom"))
    return importlib.import_module(f"adv_lib.attacks.{module}")


def test_published_attacks_in_float64(published: Any) -> None:
    """Every stored run of PGD: SmoothAdv's, with one noise vector and several and without gradients; the libraries'.

    Long runs on the last five images only, of which the model misclassifies one; test_pgd_step.py has the others.
    """
    model, images, stored = published(torch.float64)
    tags = [tag for tag in stored["tags"] if parse(tag)]
    assert len(tags) == 20
    for tag in tags:
        few = slice(3, 8) if tag.endswith("10") else slice(0, 8)
        delta = run_again(model, images, stored, tag, few)
        expected = stored.get(f"{tag}/delta_f64", stored[f"{tag}/delta"])[few]
        assert (delta - torch.from_numpy(expected)).abs().max() <= 2e-6, tag
        assert all(part.training for part in model.net.modules())  # the attack has to see to evaluation mode itself
        with torch.no_grad():
            assert model.eval()(images[few] + delta).argmax(1).tolist() == stored[f"{tag}/pred"][few].tolist(), tag
        model.train()


def test_published_attacks_in_float32(published: Any) -> None:
    """Kinks enlarge roundings, folded or not: bounds and shares are those of test_pgd_step.py."""
    model, images, stored = published(torch.float32)
    distances = []
    for tag in filter(parse, stored["tags"]):
        delta = run_again(model, images, stored, tag)
        distance = (delta - torch.from_numpy(stored[f"{tag}/delta"])).flatten(1).norm(dim=1)
        run: Any = parse(tag)
        assert delta.flatten(1).norm(dim=1).numpy() == pytest.approx(stored[f"{tag}/norm"], rel=0.02), tag
        assert distance.median() <= 1e-5, tag
        assert distance.max() <= (0.3 if "linf" in tag else 0.15), tag
        assert_in_ball_and_box(images + delta, images, run["eps"], run["norm"])
        distances.append(distance)
    assert (torch.cat(distances) <= 1e-3).float().mean() >= 0.9


@pytest.mark.parametrize("aimed", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_torchattacks_agrees(norm: Any, aimed: bool) -> None:
    torchattacks = pytest.importorskip("torchattacks", reason="torchattacks, an oracle of PGD, is not installed")
    net, (images, labels) = smooth_net(), example(6)
    options: dict[str, Any] = {**(LINF if norm == "linf" else L2), "steps": 7}
    make = {"linf": torchattacks.PGD, "l2": torchattacks.PGDL2}[norm]
    theirs = make(net, options["eps"], options["step_size"], options["steps"], random_start=False)
    if aimed:
        theirs.set_mode_targeted_by_label(quiet=True)
        labels = (labels + 1) % 5
    ours = pgd(net, images, labels, **options, order="ball_then_box", targeted=aimed)
    expected = theirs(images, labels)
    assert (expected - images).abs().amax((1, 2, 3)).min() > options["eps"] / 20
    assert (ours - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("norm", NORMS)
def test_foolbox_agrees(norm: Any) -> None:
    foolbox = pytest.importorskip("foolbox", reason="foolbox, an oracle of PGD, is not installed")
    net, (images, labels) = smooth_net(), example(6)
    options: dict[str, Any] = {**(LINF if norm == "linf" else L2), "steps": 7}
    make = {"linf": foolbox.attacks.LinfPGD, "l2": foolbox.attacks.L2PGD}[norm]
    theirs = make(abs_stepsize=options["step_size"], steps=options["steps"], random_start=False)
    model = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
    expected = theirs.run(model, images, foolbox.criteria.Misclassification(labels), epsilon=options["eps"])
    ours = pgd(net, images, labels, **options, order="ball_then_box")
    assert (ours - expected).abs().max() <= 1e-6


# --- What holds of every attack ---------------------------------------------------------------------------------------


@given(
    norm=st.sampled_from(NORMS),
    order=st.sampled_from(["box_then_ball", "ball_then_box"]),
    eps=st.sampled_from([1e-3, 8 / 255, 0.5, 3.0, 1e3]),
    relative_step=st.sampled_from([0.0, 0.1, 1.0, 10.0]),
    steps=st.integers(1, 3),
    each=st.booleans(),
    random_start=st.booleans(),
    precision=st.sampled_from(["fp32", "bf16"]),
    form=st.sampled_from(["plain", "channels_last", "strided"]),
    samples=st.integers(1, 3),
    seed=st.integers(0, 5),
)
def test_ball_box_and_format(
    norm: Any,
    order: Any,
    eps: float,
    relative_step: float,
    steps: int,
    each: bool,
    random_start: bool,
    precision: Any,
    form: str,
    samples: int,
    seed: int,
) -> None:
    net, (images, labels) = smooth_net(), example(samples)
    images = {
        "plain": images,
        "channels_last": images.contiguous(memory_format=torch.channels_last),
        "strided": images.repeat_interleave(2, -1)[..., ::2],
    }[form]
    before = images.clone()
    radius: Any = eps * torch.linspace(0, 1, samples) if each else eps
    options: dict[str, Any] = {"norm": norm, "order": order, "precision": precision, "random_start": random_start}
    generator = torch.Generator().manual_seed(seed)
    adv = pgd(
        net, images, labels, eps=radius, step_size=relative_step * eps, steps=steps, generator=generator, **options
    )
    assert adv.dtype == torch.float32
    assert not adv.requires_grad
    assert adv.is_contiguous(memory_format=torch.channels_last if form == "channels_last" else torch.contiguous_format)
    assert_in_ball_and_box(adv, images, radius, norm)
    assert torch.equal(images, before)
    if each:
        assert torch.equal(adv[0], images[0])  # its radius is 0
    elif relative_step and eps < 1:
        assert (adv != images).flatten(1).any(1).all()


@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize("change", [{"eps": 0}, {"eps": 0.0}, {"steps": 0}])
def test_no_radius_or_no_steps_is_the_input(change: dict[str, Any], random_start: bool) -> None:
    net, (images, labels) = smooth_net(), example()
    images.requires_grad_()
    adv = pgd(net, images, labels, **{**L2, **change}, random_start=random_start)
    assert torch.equal(adv, images)
    assert not adv.requires_grad
    assert adv.data_ptr() != images.data_ptr()


def test_empty_batches_pass_through() -> None:
    images, labels = example(4)
    assert pgd(smooth_net(), images[:0], labels[:0], **L2, random_start=True).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("norm", NORMS)
def test_more_steps_and_larger_balls_raise_the_loss(norm: Any) -> None:
    net, (images, labels) = smooth_net(), example(40)
    unit = 8 / 255 if norm == "linf" else 0.5

    def mean_loss(eps: float, steps: int) -> float:
        adv = pgd(net, images, labels, norm=norm, eps=eps, step_size=0.1 * unit, steps=steps)
        with torch.no_grad():
            return cross_entropy(net(adv), labels).mean().item()

    by_steps = [mean_loss(unit, steps) for steps in (0, 1, 2, 5, 10)]
    by_eps = [mean_loss(factor * unit, 10) for factor in (0, 0.25, 0.5, 1)]
    assert by_steps == sorted(by_steps)
    assert by_eps == sorted(by_eps)
    assert min(by_steps[-1], by_eps[-1]) > by_steps[0] + 0.05


@pytest.mark.parametrize("norm", NORMS)
def test_images_do_not_depend_on_their_batch(norm: Any) -> None:
    net, (images, labels) = smooth_net(), example(6)
    options = LINF if norm == "linf" else L2
    whole = pgd(net, images, labels, **options)
    alone = torch.cat([pgd(net, images[i : i + 1], labels[i : i + 1], **options) for i in range(6)])
    assert (whole - alone).abs().max() <= 1e-6
    assert (whole - images).abs().max() > 1e-3


def test_other_losses_are_attacked_too() -> None:
    """A targeted attack brings its targets closer; a margin loss, unlike cross-entropy, does what it says."""
    net, (images, labels) = smooth_net(), example(40)
    targets = (labels + 2) % 5

    def margin(logits: Tensor, labels: Tensor) -> Tensor:
        own = F.one_hot(labels, 5).bool()
        return logits.masked_fill(own, -torch.inf).amax(1) - logits[own]

    options: dict[str, Any] = {**L2, "steps": 8}
    with torch.no_grad():
        near = pgd(net, images, targets, **options, targeted=True)
        assert torch.equal(near, pgd(net, images, targets, **options, loss=targeted(cross_entropy)))
        assert (cross_entropy(net(near), targets) < cross_entropy(net(images), targets)).float().mean() > 0.9
        far = pgd(net, images, labels, **options, loss=margin)
        assert (margin(net(far), labels) > margin(net(images), labels)).float().mean() > 0.9


def test_a_gradient_of_zero_moves_nothing() -> None:
    class Flat(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return (images * 0).sum((1, 2, 3))[:, None].expand(-1, 5)

    images, labels = example()
    for options in (L2, LINF):
        for order in ("box_then_ball", "ball_then_box"):
            assert torch.equal(pgd(Flat(), images, labels, **options, order=order), images)


def test_a_gradient_of_zero_moves_at_random_if_asked() -> None:
    """As in SmoothAdv's code, by a direction that is not normalised: far beyond the ball at once."""

    class Half(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            logits = torch.stack([images.mean((1, 2, 3)), 1 - images.mean((1, 2, 3))], 1)
            return torch.cat([logits[:2], 0 * logits[2:]])

    images, labels = example()
    options: dict[str, Any] = {**L2, "steps": 1, "step_size": 1e-3}
    moved = [
        pgd(Half(), images, labels % 2, **options, zero_gradient="randn", generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    assert torch.equal(moved[0], moved[1])
    assert torch.equal(moved[0][:2], moved[2][:2])
    assert not torch.equal(moved[0][2:], moved[2][2:])
    length = (moved[0] - images).flatten(1).norm(dim=1)
    assert (length[:2] <= 1.001e-3).all()
    assert (length[2:] > 5e-3).all()


def test_fused_steps_make_the_same_attack(device: str) -> None:
    net, (images, labels) = smooth_net(device), example(2, device)
    for options in (L2, LINF):
        fused, reference = (pgd(net, images, labels, **options, kernel=kernel) for kernel in ("triton", "reference"))
        assert (fused - reference).abs().max() <= 1e-6
        assert (fused - images).abs().max() > 1e-3


# --- Random starts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
def test_starts_are_uniform_in_the_ball(norm: Any) -> None:
    """In three dimensions, far from the box: shares of volume within radius r, and no preferred direction."""
    clean = torch.full((20_000, 3), 0.5, dtype=torch.float64)
    delta = draw_from_ball(clean, 0.25, norm, torch.Generator().manual_seed(0)) - clean
    size = torch.linalg.vector_norm(delta, torch.inf if norm == "linf" else 2, 1) / 0.25
    assert size.max() <= 1 + 1e-12
    assert (size**3).quantile(torch.tensor([0.1, 0.5, 0.9]).double()).tolist() == pytest.approx(
        [0.1, 0.5, 0.9], abs=0.02
    )
    assert delta.mean(0).abs().max() <= 0.005
    assert (delta > 0).double().mean(0).tolist() == pytest.approx([0.5] * 3, abs=0.02)


@pytest.mark.parametrize("norm", NORMS)
def test_starts_repeat_whatever_the_memory_format(norm: Any) -> None:
    images = example()[0]
    eps = torch.tensor([0.0, 0.1, 0.2, 0.3])
    draws = [
        draw_from_ball(images.contiguous(memory_format=form), eps, norm, torch.Generator().manual_seed(3))
        for form in (torch.contiguous_format, torch.channels_last)
    ]
    assert torch.equal(*draws)
    assert draws[1].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(draws[0][0], images[0])
    assert_in_ball_and_box(draws[0], images, eps, norm)
    assert not torch.equal(draws[0], draw_from_ball(images, eps, norm, torch.Generator().manual_seed(4)))


def test_an_attack_starts_where_its_generator_says() -> None:
    net, (images, labels) = smooth_net(), example()
    state = torch.get_rng_state()
    options: dict[str, Any] = {**LINF, "steps": 1, "step_size": 0.0, "random_start": True}
    adv = pgd(net, images, labels, **options, generator=torch.Generator().manual_seed(5))
    start = draw_from_ball(images, LINF["eps"], "linf", torch.Generator().manual_seed(5))
    assert (adv - start).abs().max() <= 1e-7
    assert torch.equal(torch.get_rng_state(), state)
    first, second = (pgd(net, images, labels, **options) for _ in range(2))
    assert not torch.equal(first, second)  # the global generator went on


def test_an_attack_goes_on_from_the_start_that_it_is_given() -> None:
    net, (images, labels) = smooth_net(), example()
    begin = draw_from_ball(images, LINF["eps"], "linf", torch.Generator().manual_seed(5))
    kept = begin.clone()
    given = pgd(net, images, labels, **LINF, start=begin)
    drawn = pgd(net, images, labels, **LINF, random_start=True, generator=torch.Generator().manual_seed(5))
    assert torch.equal(given, drawn)
    assert torch.equal(begin, kept)


# --- Noise ------------------------------------------------------------------------------------------------------------


def test_copies_with_the_same_noise_are_one() -> None:
    net, (images, labels) = smooth_net(), example()
    noise = 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(2))
    alone = smoothadv(net, images, labels, 0.5, 4, noise)
    assert (alone - smoothadv(net, images, labels, 0.5, 4)).abs().max() > 1e-3
    for form in (torch.contiguous_format, torch.channels_last):
        copies = noise.repeat_interleave(3, 0).contiguous(memory_format=form)
        assert (smoothadv(net, images, labels, 0.5, 4, copies) - alone).abs().max() <= 1e-6
    assert (
        smoothadv(net, images, labels, 0.5, 4, 0 * noise) - smoothadv(net, images, labels, 0.5, 4)
    ).abs().max() <= 1e-6


def test_noise_of_each_image_is_its_own() -> None:
    """Rows i·m … i·m + m - 1; an attack on one image with its rows is the same."""
    net, (images, labels) = smooth_net(), example()
    noise = 0.2 * torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    whole = smoothadv(net, images, labels, 0.5, 3, noise)
    for i in range(4):
        alone = smoothadv(net, images[i : i + 1], labels[i : i + 1], 0.5, 3, noise[2 * i : 2 * i + 2])
        assert (whole[i] - alone[0]).abs().max() <= 1e-6


def test_noise_of_half_precision_is_used_as_float32() -> None:
    net, (images, labels) = smooth_net(), example()
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(2)).half()
    found, expected = (smoothadv(net, images, labels, 0.5, 2, one) for one in (noise, noise.float()))
    assert torch.equal(found, expected)


def test_noise_goes_through_the_fused_step(device: str) -> None:
    net, (images, labels) = smooth_net(device), example(2, device)
    noise = 0.2 * torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2)).to(device)
    fused, reference = (
        smoothadv(net, images, labels, 0.5, 2, noise, kernel=kernel) for kernel in ("triton", "reference")
    )
    assert (fused - reference).abs().max() <= 1e-6
    assert (fused - images).abs().max() > 1e-3


def test_the_gradient_free_variant_can_be_targeted() -> None:
    """It moves against what raised a label's probability, or towards it; the published code forgets the latter."""
    net, (images, labels) = smooth_net(), example()
    noise = torch.randn(80, 3, 8, 8, generator=torch.Generator().manual_seed(2)) / 4
    one: dict[str, Any] = {
        "step_size": 1e-3,
        "norm": "l2",
        "eps": 1.0,
        "steps": 1,
        "noise": noise,
        "gradient_free": True,
    }
    middle = images.clamp(0.1, 0.9)
    away, towards = (pgd(net, middle, labels, **one, targeted=aimed) - middle for aimed in (False, True))
    assert (away + towards).abs().max() <= 1e-6
    assert away.flatten(1).norm(dim=1).tolist() == pytest.approx([1e-3] * 4, rel=1e-3)


# --- Restarts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aimed", [False, True])
def test_restarts_keep_the_worst_of_all_ends_and_the_clean_image(aimed: bool) -> None:
    net, (images, labels) = smooth_net(), example(20)
    with torch.no_grad():
        labels[:10] = net(images).argmax(1)[:10]  # half of the images are classified as labelled
    options: dict[str, Any] = {
        **L2,
        "eps": 0.1,
        "step_size": 0.05,
        "random_start": True,
        "targeted": aimed,
        "fold": False,
    }
    generator = torch.Generator().manual_seed(0)
    ends = [images, *(pgd(net, images, labels, **options, generator=generator) for _ in range(3))]
    with torch.no_grad():
        logits = torch.stack([net(end) for end in ends])
        losses = torch.stack([cross_entropy(one, labels) for one in logits]) * (-1 if aimed else 1)
        success = (logits.argmax(2) == labels) == aimed
    expected = torch.stack(ends)[(losses.double() + 1e3 * success).argmax(0), torch.arange(20)]
    found = pgd(net, images, labels, **options, generator=generator.manual_seed(0), restarts=3)
    assert (found - expected).abs().max() <= 1e-6
    assert len({int(which) for which in losses.argmax(0)}) > 1  # not always the same restart
    with torch.no_grad():
        reached = (net(found).argmax(1) == labels) == aimed
    assert not (success[0] & ~reached).any()  # no success is lost again


def test_an_image_that_is_wrong_stays_wrong_though_every_end_is_right() -> None:
    """The loss rises nowhere but at random starts; the clean image is kept where it is the only success."""

    class Wrong(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            clean = (images == 0.5).flatten(1).all(1)
            logits = torch.stack([images.mean((1, 2, 3)), 1 - images.mean((1, 2, 3))], 1)
            return torch.where(
                clean[:, None], logits.new_tensor([0.0, 0.01]), logits * 0 + logits.new_tensor([0.02, 0])
            )

    images, labels = torch.full((3, 3, 8, 8), 0.5), torch.zeros(3, dtype=torch.int64)
    options: dict[str, Any] = {**L2, "random_start": True, "generator": torch.Generator().manual_seed(0)}
    assert not torch.equal(pgd(Wrong(), images, labels, **options), images)
    assert torch.equal(pgd(Wrong(), images, labels, **options, restarts=4), images)


def test_a_target_that_is_the_true_class_is_reached() -> None:
    net, (images, _) = smooth_net(), example()
    with torch.no_grad():
        labels = net(images).argmax(1)
        near = pgd(net, images, labels, **L2, targeted=True)
        assert (cross_entropy(net(near), labels) <= cross_entropy(net(images), labels)).all()
    assert_in_ball_and_box(near, images, L2["eps"], "l2")


# --- What stays untouched ---------------------------------------------------------------------------------------------


def everything(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


@pytest.mark.parametrize("trained", [True, False])
def test_a_model_in_training_is_left_as_it_was(trained: bool) -> None:
    """Modes of single submodules, parameters, their gradients and flags, batch norm's statistics and count."""
    net, (images, labels) = smooth_net(), example()
    net.train()
    net.conv2.eval()  # someone froze a part
    net.get_parameter("conv1.bias").requires_grad_(False)
    net.fc.weight.grad = torch.full_like(net.fc.weight, 7.0)
    if not trained:
        net.requires_grad_(False)
    flags = [weight.requires_grad for weight in net.parameters()]
    before = everything(net)
    reached = []
    for weight in net.parameters():
        if weight.requires_grad:
            weight.register_post_accumulate_grad_hook(lambda weight: reached.append(weight))
    pgd(net, images, labels, **L2)
    assert {name: part.training for name, part in net.named_modules()} == {
        "": True, "conv1": True, "norm": True, "conv2": False, "fc": True
    }  # fmt: skip
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert [weight.requires_grad for weight in net.parameters()] == flags
    assert torch.equal(net.fc.weight.grad, torch.full_like(net.fc.weight, 7.0))
    assert [name for name, weight in net.named_parameters() if weight.grad is not None] == ["fc.weight"]
    assert reached == []


def test_modes_are_restored_after_an_error() -> None:
    net, (images, labels) = smooth_net(), example()
    net.train()
    net.norm.eval()

    def broken(logits: Tensor, labels: Tensor) -> Tensor:
        assert not any(part.training for part in net.modules())
        raise ZeroDivisionError

    with torch.no_grad():
        with pytest.raises(ZeroDivisionError):
            pgd(net, images, labels, **L2, loss=broken)
        assert not torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")
    assert net.training
    assert net.conv1.training
    assert not net.norm.training


def test_modes_are_left_alone_when_asked() -> None:
    net, (images, labels) = smooth_net(), example()
    net.train()
    count = int(net.get_buffer("norm.num_batches_tracked"))
    pgd(net, images, labels, **L2, eval_mode=False)
    assert net.training
    assert int(net.get_buffer("norm.num_batches_tracked")) == count + L2["steps"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_attacks_run_within_no_grad_and_inference_mode(precision: Any) -> None:
    """Evaluation loops are in one or the other, also in an autocast that has cast the weights already."""
    net, (images, labels) = smooth_net(), example()
    expected = pgd(net, images, labels, **L2, precision=precision)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), torch.autocast("cpu", torch.bfloat16):
            net(images)
            adv = pgd(net, images.clone(), labels.clone(), **L2, precision=precision)
            assert not torch.is_grad_enabled()
            assert torch.is_inference_mode_enabled() == (mode is torch.inference_mode)
        assert torch.equal(adv, expected)


class Seen(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        name = function.overloadpacket.__name__
        self.counts[name] = self.counts.get(name, 0) + 1
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("options", [L2, LINF])
def test_the_host_does_not_wait_within_the_loop(options: dict[str, Any]) -> None:
    """Nothing that reads values on the host; and each step computes the gradient of the images alone."""
    waiting = {"_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "unique", "bincount"}
    net, (images, labels) = smooth_net(), example()
    counts = []
    for steps in (1, 4):
        with Seen() as seen:
            pgd(net, images, labels, **{**options, "steps": steps}, random_start=True, check_images=False)
        counts.append(seen.counts)
        assert not waiting & set(seen.counts)
    assert counts[1]["convolution"] == 4 * counts[0]["convolution"] == 8
    with Seen() as seen:
        pgd(net, images, labels, **options)
    assert not waiting & set(seen.counts)  # the check of the images is one copy of two numbers
    assert "aminmax" in seen.counts


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, to notice every wait for it")
@pytest.mark.parametrize("options", [L2, LINF])
def test_nothing_waits_for_the_gpu(options: dict[str, Any]) -> None:
    net, (images, labels) = smooth_net("cuda"), example(4, "cuda")
    pgd(net, images, labels, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        pgd(net, images, labels, **options, check_images=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_no_gradient_of_a_weight_is_computed() -> None:
    """Convolutions are asked for the gradient of their input alone, although their weights are trained."""
    masks = []

    class Masks(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
            if function is torch.ops.aten.convolution_backward.default:
                masks.append(arguments[-1])
            return function(*arguments, **(keywords or {}))

    net, (images, labels) = smooth_net(), example()
    assert all(weight.requires_grad for weight in net.parameters())
    with Masks():
        pgd(net, images, labels, **L2)
    assert masks == [[True, False, False]] * 2 * L2["steps"]


# --- Precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precision_is_what_was_asked_for_and_nothing_else(precision: Any) -> None:
    """In a caller's fp16 autocast too; the loss is in float32, each weight is cast once for all steps."""
    net, (images, labels) = smooth_net(), example()
    types, casts = [], Seen()
    net.conv2.register_forward_hook(lambda module, inputs, output: types.append(output.dtype))

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        assert logits.dtype == torch.float32
        assert not torch.is_autocast_enabled("cpu")
        return cross_entropy(logits, labels)

    expected = pgd(net, images, labels, **L2, precision=precision)
    types.clear()
    with torch.autocast("cpu", torch.float16), casts:
        adv = pgd(net, images, labels, **L2, precision=precision, loss=loss)
    assert types == [torch.bfloat16 if precision == "bf16" else torch.float32] * L2["steps"]
    assert torch.equal(adv, expected)
    if precision == "bf16":
        weights = 6  # two convolutions and a linear layer, with biases
        activations = casts.counts["_to_copy"] - weights
        assert activations > 0
        assert activations % L2["steps"] == 0
        assert (adv - pgd(net, images, labels, **L2)).flatten(1).norm(dim=1).max() < 0.1 * L2["eps"]


def test_accelerates_own_autocast_is_passed_by() -> None:
    """`prepare` puts bf16 into forward itself; an attack in float32 is one in float32 all the same."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    net, (images, labels) = smooth_net(), example()
    # Hooks switch folding off, so it is off where there are none, too.
    expected = [pgd(net, images, labels, **L2, precision=precision, fold=False) for precision in ("fp32", "bf16")]
    states = (AcceleratorState, PartialState, GradientState)  # one for each process, whoever made it
    for state in states:
        state._reset_state()
    try:
        model = Accelerator(cpu=True, mixed_precision="bf16").prepare(net)
        types = []
        model.conv2.register_forward_hook(lambda module, inputs, output: types.append(output.dtype))
        model(images)
        assert types == [torch.bfloat16]  # else this test would show nothing
        found = [pgd(model, images, labels, **L2, precision=precision) for precision in ("fp32", "bf16")]
        assert types[1:] == [torch.float32] * 3 + [torch.bfloat16] * 3
    finally:
        for state in states:
            state._reset_state()
    assert all(map(torch.equal, found, expected))


# --- Wrappers ---------------------------------------------------------------------------------------------------------


def test_a_compiled_model_stays_compiled_only_if_it_is_frozen() -> None:
    """The compiled backward pass of a trained model would compute the gradients of all its weights."""
    torch._dynamo.reset()
    calls = []

    def backend(graph: Any, inputs: Any) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            calls.append(torch.is_grad_enabled())
            return graph(*arguments)

        return run

    net, (images, labels) = smooth_net(), example()
    expected = pgd(net, images, labels, **L2)
    compiled: Any = torch.compile(net, backend=backend)
    assert unwrapped(compiled) is net
    net.train()
    assert torch.equal(pgd(compiled, images, labels, **L2), expected)
    assert calls == []
    assert net.training
    assert compiled.training

    net.requires_grad_(False)
    assert unwrapped(compiled) is compiled
    adv = pgd(compiled, images, labels, **L2)
    assert calls == [True] * L2["steps"]
    assert (adv - expected).abs().max() <= 1e-6
    assert net.training


def attack_on_one_rank(rank: int, folder: str) -> None:
    """Ranks attack different numbers of times, then train together."""
    torch.manual_seed(rank)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    net = smooth_net().train()
    parallel = nn.parallel.DistributedDataParallel(net)
    images, labels = example(4)
    images, labels = images[2 * rank : 2 * rank + 2], labels[2 * rank : 2 * rank + 2]
    before = everything(net)
    adv = images
    for steps in range(1, 2 + 2 * rank):
        adv = pgd(parallel, images, labels, **{**L2, "steps": steps})
    assert all(weight.grad is None for weight in net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert parallel.training
    assert net.training
    adv = pgd(parallel, images, labels, **L2)
    cross_entropy(parallel(adv), labels).mean().backward()
    torch.save({"adv": adv, "grad": [weight.grad for weight in net.parameters()]}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.timeout(120)
def test_distributed_data_parallel_neither_waits_nor_sums_during_an_attack(tmp_path: Path) -> None:
    """Its gradients are those of the training step alone, the same on both ranks."""
    processes = torch.multiprocessing.start_processes(
        attack_on_one_rank, (str(tmp_path),), nprocs=2, join=False, start_method="forkserver"
    )
    assert processes is not None
    deadline = time.monotonic() + 60
    try:
        while not processes.join(timeout=1):
            assert time.monotonic() < deadline, "a rank waits for the other"
    finally:
        for process in processes.processes:
            process.kill()
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    images, labels = example(4)
    net = smooth_net()
    adv = pgd(net, images, labels, **L2)
    assert (torch.cat([one["adv"] for one in found]) - adv).abs().max() <= 1e-6
    sums = [torch.zeros_like(weight) for weight in net.parameters()]
    for rank in range(2):
        half = slice(2 * rank, 2 * rank + 2)
        one = copy.deepcopy(net).train()
        cross_entropy(one(found[rank]["adv"]), labels[half]).mean().backward()
        for total, weight in zip(sums, one.parameters(), strict=True):
            assert weight.grad is not None
            total += weight.grad / 2
    for rank in range(2):
        for grad, total in zip(found[rank]["grad"], sums, strict=True):
            assert (grad - total).abs().max() <= 1e-5


# --- Parts ------------------------------------------------------------------------------------------------------------


def test_evaluate_gives_each_images_loss_and_gradient() -> None:
    """Also of m copies of each image, whose losses a caller's loss averages."""
    net, (images, labels) = smooth_net(), example(3)
    copies = images.repeat_interleave(2, 0) + 0.01 * torch.randn(6, 3, 8, 8)

    def of_mean_probability(logits: Tensor, labels: Tensor) -> Tensor:
        return F.nll_loss(logits.softmax(1).unflatten(0, (-1, 2)).mean(1).log(), labels, reduction="none")

    with under_attack(net, images.device, fold=False) as network:
        logits, losses, gradient = evaluate(network, copies, labels, of_mean_probability)
    assert not any(value.requires_grad for value in (logits, losses, gradient))
    assert torch.equal(logits, net(copies))
    leaf = copies.clone().requires_grad_()
    expected = of_mean_probability(net(leaf), labels)
    assert torch.equal(losses, expected)
    (second,) = torch.autograd.grad(expected[1], leaf)
    assert (gradient[2:4] - second[2:4]).abs().max() <= 1e-7


def test_the_loss_of_copies_is_that_of_their_mean_probability() -> None:
    logits = torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 3, 4, 1])
    mean = logits.softmax(1).unflatten(0, (4, 3)).mean(1)
    assert (mean_log_probabilities(logits, 4).exp() - mean).abs().max() <= 1e-15
    expected = F.nll_loss(mean.log(), labels, reduction="none")
    assert (cross_entropy(logits, labels) - expected).abs().max() <= 1e-14
    assert torch.equal(targeted(cross_entropy)(logits, labels), -cross_entropy(logits, labels))
    assert torch.equal(cross_entropy(logits[:4], labels), F.cross_entropy(logits[:4], labels, reduction="none"))
    with pytest.raises(ValueError, match=r"logits \(11, 5\) are not a whole number of copies of 4 images"):
        cross_entropy(logits[:11], labels)


def test_neither_large_logits_nor_small_probabilities_are_lost() -> None:
    """p = e^-40 has its loss and gradient; below 1e-20 the loss is flat at the published floor."""
    labels = torch.zeros(1, dtype=torch.int64)
    for gap, loss, slope in ((0.0, 0.6931, 0.5), (40.0, 40.0, 1.0), (60.0, 46.0517, 0.0), (1e4, 46.0517, 0.0)):
        logits = torch.tensor([[-gap, 0.0], [-gap, 0.0]], requires_grad=True)
        found = cross_entropy(logits + 1e4 * (gap > 1e3), labels)
        (gradient,) = torch.autograd.grad(found.sum(), logits)
        assert found.item() == pytest.approx(loss, rel=1e-4)
        assert gradient.sum(0).tolist() == pytest.approx([-slope, slope], abs=1e-5)
    assert (mean_log_probabilities(torch.tensor([[1e4, -1e4], [-1e4, 1e4]]), 1) + 0.6931).abs().max() <= 1e-4


def test_refused() -> None:
    net, (images, labels) = smooth_net(), example()
    good: dict[str, Any] = {"model": net, "images": images, "labels": labels, **L2}
    broken = images.clone()
    broken[1, 0, 0, 0] = float("nan")
    for change, message in (
        ({"images": 2 * images - 1}, r"images \(4, 3, 8, 8\) reach from -1 to 1, beyond \[0, 1\]: normalisation"),
        ({"images": images + 2e-6}, "reach from .* beyond"),
        ({"images": broken}, "reach from nan to nan"),
        ({"images": (images * 255).byte()}, r"have type torch.uint8; expected float32 in \[0, 1\]"),
        ({"images": images.bfloat16()}, "have type torch.bfloat16"),
        ({"labels": labels[:3]}, r"labels \(3,\) do not fit images \(4, 3, 8, 8\)"),
        ({"labels": labels[0]}, r"labels \(\) do not fit"),
        ({"norm": "l1"}, "norm must be 'linf' or 'l2', not 'l1'"),
        ({"order": "box"}, "'l2', 'box'"),
        ({"steps": -1}, "steps must be at least 0, not -1"),
        ({"eps": -0.1}, "eps must be a number >= 0"),
        ({"step_size": float("nan")}, "step_size must be a finite number"),
        ({"precision": "fp16"}, "underflow in fp16"),
        ({"precision": "fp16", "steps": 0}, "underflow in fp16"),
        ({"loss": F.cross_entropy}, r"the loss has shape \(\): an attack needs that of each image, \[4\]"),
        ({"restarts": 0, "random_start": True}, "restarts must be 1, or more with random_start: not 0"),
        ({"restarts": 2}, "restarts must be 1, or more with random_start: not 2"),
        ({"start": images[:2]}, r"start \(2, 3, 8, 8\) must be like images \(4, 3, 8, 8\), without random_start"),
        ({"start": images, "random_start": True}, "without random_start"),
        ({"restarts": 2, "random_start": True, "labels": labels[:, None]}, r"labels \(4, 1\) must be classes \[4\]"),
        ({"noise": images[:3]}, r"noise \(3, 3, 8, 8\) does not fit images \(4, 3, 8, 8\): expected m copies"),
        ({"noise": images.repeat(2, 1, 1, 1)[:7]}, r"noise \(7, 3, 8, 8\) does not fit"),
        ({"noise": images[:, :1]}, r"noise \(4, 1, 8, 8\) does not fit"),
        ({"gradient_free": True}, "gradient_free needs noise"),
        ({"gradient_free": True, "noise": images, "loss": targeted(cross_entropy)}, "no loss but cross_entropy"),
        ({"zero_gradient": "random"}, "zero_gradient must be 'rest' or 'randn', not 'random'"),
        ({"zero_gradient": "randn", "order": "ball_then_box"}, "only for l2 in order box_then_ball"),
    ):
        with pytest.raises(ValueError, match=message):
            pgd(**{**good, **change})
        assert not net.training


def test_roundings_beyond_the_box_are_clipped() -> None:
    net, (images, labels) = smooth_net(), example()
    beyond = images + 5e-7 * torch.where(images > 0.5, 1, -1)
    assert beyond.min() < 0
    assert beyond.max() > 1
    assert torch.equal(pgd(net, beyond, labels, **{**L2, "eps": 0}), beyond)
    adv = pgd(net, beyond, labels, **L2)
    assert adv.min() >= 0
    assert adv.max() <= 1
    assert (adv - pgd(net, images, labels, **L2)).abs().max() <= 1e-5
