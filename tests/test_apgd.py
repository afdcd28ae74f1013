"""APGD and the ensemble: the paper's algorithm written out, the authors' code, and what must hold of every attack."""

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from attacks.apgd import _Climb, _halve, apgd, apgd_targeted, checkpoints, targeted_dlr
from attacks.ensemble import STAGES, STANDARD, Budget, ensemble, right, search
from attacks.pgd import pgd
from models.small import SMALL_NETS
from tests.test_pgd import Normalised, adv_lib, example, smooth_net

pytestmark = pytest.mark.timeout(300)
RADII: dict[Any, float] = {"l2": 0.3, "linf": 6 / 255}
CLASSES = 5


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def answered(net: nn.Module, samples: int) -> tuple[Tensor, Tensor]:
    """Images in the type of the net, and its own answers: it gets all of them right."""
    images = example(samples)[0].to(next(net.parameters()).dtype)
    with torch.no_grad():
        return images, net(images).argmax(1)


def golden_net(goldens: Path) -> tuple[nn.Module, Tensor, Tensor]:
    """The stored ResNet-20 with those stored images that it gets right."""
    small, stored = SMALL_NETS["cifar_resnet20"], np.load(goldens / "attacks.npz")
    net = small.build(10)
    net.load_state_dict(load_file(goldens / "cifar_resnet20.safetensors"))
    mean, std = (torch.tensor(values)[:, None, None] for values in (small.mean, small.std))
    images, labels = torch.from_numpy(stored["images_u8"]).float() / 255, torch.from_numpy(stored["labels"])
    model = Normalised(net, mean, std).eval()
    correct = right(model, images, labels)
    return model, images[correct], labels[correct]


def assert_inside(found: Tensor, clean: Tensor, norm: str, eps: float) -> None:
    assert found.min() >= 0
    assert found.max() <= 1
    sizes = torch.linalg.vector_norm((found - clean).flatten(1), ord=math.inf if norm == "linf" else 2, dim=1)
    assert sizes.max() <= eps * (1 + 1e-6) + 1e-7


# --- The algorithm ----------------------------------------------------------------------------------------------------


def test_checkpoints_are_the_published_ones() -> None:
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert checkpoints(10) == [3, 5, 6, 7, 8, 9]
    assert checkpoints(1) == []


def literal(net: nn.Module, clean: Tensor, label: Tensor, start: Tensor, norm: str, eps: float, steps: int) -> Any:
    """Algorithm 1 of the paper for one image [1, ...]: the best point, its loss, and how often a step was halved."""

    def f(x: Tensor) -> tuple[float, Tensor]:
        x = x.clone().requires_grad_()
        loss = F.cross_entropy(net(x), label)
        loss.backward()
        assert x.grad is not None
        return loss.item(), x.grad

    def project(x: Tensor) -> Tensor:
        delta = x - clean
        if norm == "linf":
            return (clean + delta.clamp(-eps, eps)).clamp(0, 1)
        return (clean + delta * min(1.0, eps / delta.norm().item())).clamp(0, 1)

    def ascend(x: Tensor, g: Tensor) -> Tensor:
        return project(x + eta * (g.sign() if norm == "linf" else g / g.norm()))

    p = [0.0, 0.22]
    while p[-1] < 1:
        p.append(p[-1] + max(p[-1] - p[-2] - 0.03, 0.06))
    ends = [math.ceil(round(share * steps, 6)) for share in p]
    eta, x = 2 * eps, start
    value, gradient = f(x)
    best, best_value, best_gradient = x, value, gradient
    values_at_checks, halved_at_last_check, grew, halvings = [best_value], False, [], 0
    before = x
    for k in range(1, steps + 1):
        z = ascend(x, gradient)
        new = z if k == 1 else project(x + 0.75 * (z - x) + 0.25 * (x - before))
        before, x = x, new
        old_value = value
        value, gradient = f(x)
        grew.append(value > old_value)
        if value > best_value:
            best, best_value, best_gradient = x, value, gradient
        if k in ends and k < steps:
            first = sum(grew) <= 0.75 * len(grew)
            second = not halved_at_last_check and best_value == values_at_checks[-1]
            if first or second:
                halvings += 1
                eta, x, value, gradient = eta / 2, best, best_value, best_gradient
            values_at_checks.append(best_value)
            halved_at_last_check, grew = first or second, []
    return best, best_value, halvings


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_the_paper_s_algorithm_step_by_step(norm: Any) -> None:
    """In float64, from the same starts."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Flatten(), nn.Linear(27, 16), nn.ReLU(), nn.Linear(16, 4)).double().eval()
    images = torch.rand(10, 3, 3, 3, dtype=torch.float64, generator=generator(1))
    labels = net(images).argmax(1)
    eps, steps, halvings = {"l2": 0.6, "linf": 0.15}[norm], 40, []
    ours = apgd(net, images, labels, norm=norm, eps=eps, steps=steps, until_fooled=False, generator=generator())
    draw = torch.rand if norm == "linf" else torch.randn
    noise = draw(images.shape, dtype=torch.float64, generator=generator())
    noise = 2 * noise - 1 if norm == "linf" else noise
    for i in range(len(images)):
        length = noise[i].abs().max() if norm == "linf" else noise[i].norm()
        start = (images[i : i + 1] + eps * noise[i : i + 1] / length).clamp(0, 1)
        best, value, halved = literal(net, images[i : i + 1], labels[i : i + 1], start, norm, eps, steps)
        halvings.append(halved)
        assert ours.losses[i].item() == pytest.approx(value, rel=1e-6)
        assert (ours.images[i] - best[0]).abs().max() <= 1e-6
    assert 0 < min(halvings) < max(halvings) <= 8


def test_the_two_conditions() -> None:
    """At a checkpoint after 8 steps: share of growth, growth of the best loss, whether the step was halved before."""
    cases = [  # growing steps, best loss grew, halved at the last checkpoint; to be halved now
        (6, True, False, True),
        (7, True, False, False),
        (7, True, True, False),
        (7, False, False, True),
        (7, False, True, False),
        (6, False, True, True),
    ]
    growing, grew, halved, expected = (torch.tensor(column) for column in zip(*cases, strict=True))
    one, images = torch.ones(6), torch.rand(4, 6, 3)
    point, gradient, best, best_gradient = images.unbind()
    climb = _Climb(
        place=torch.arange(6),
        clean=point,
        labels=torch.zeros(6, dtype=torch.int64),
        point=point,
        previous=point,
        gradient=gradient,
        loss=0.5 * one,
        best=best,
        best_gradient=best_gradient,
        best_loss=2 * one,
        best_loss_before=2 - grew.float(),
        step_size=one,
        growing=growing,
        halved=halved,
        wrong=halved,
        adversarial=point,
    )
    _halve(climb, 8)
    assert climb.halved.tolist() == expected.tolist()
    assert climb.step_size.tolist() == [0.5 if one else 1.0 for one in expected]
    assert torch.equal(climb.point, torch.where(expected[:, None], best, point))
    assert torch.equal(climb.gradient, torch.where(expected[:, None], best_gradient, gradient))
    assert climb.loss.tolist() == [2.0 if one else 0.5 for one in expected]
    assert climb.growing.tolist() == [0] * 6
    assert climb.best_loss_before.tolist() == [2.0] * 6


def test_the_targeted_ratio_by_hand() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0, -1.0, 0.5], [0.0, 4.0, 1.0, 2.0, 3.0]])
    pairs = torch.tensor([[0, 2], [1, 0]])
    expected = [(2.0 - 3.0) / (3.0 - (1.0 + 0.5) / 2), (0.0 - 4.0) / (4.0 - (2.0 + 1.0) / 2)]
    assert targeted_dlr(logits, pairs).tolist() == pytest.approx(expected)
    assert targeted_dlr(logits[:, :3], pairs).tolist() == pytest.approx([-1 / 2, -4 / 4])
    assert targeted_dlr(logits[:, :2], torch.tensor([[0, 1], [1, 0]])).tolist() == [-2.0, -4.0]


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_fewer_classes_have_fewer_targets(classes: int) -> None:
    """Each wrong class in turn, the likeliest first: told from the targets that reach the loss."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(27, classes)).eval()
    images = torch.rand(6, 3, 3, 3, generator=generator())
    logits = net(images).detach()
    labels = logits.argmax(1)
    found = apgd_targeted(net, images, labels, norm="l2", eps=100.0, steps=5, generator=generator())
    assert found.fooled.all()
    tiny = apgd_targeted(net, images, labels, norm="l2", eps=1e-6, steps=2, generator=generator())
    assert not tiny.fooled.any()
    # At so small a radius the greatest ratio is that of the likeliest wrong class.
    pairs = torch.stack([labels, logits.topk(2).indices[:, 1]], 1)
    assert (tiny.losses - targeted_dlr(logits, pairs)).abs().max() <= 1e-4


# --- Other codes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("package", ["pyautoattack.autopgd_base", "torchattacks"])
def test_other_codes_agree(package: str, norm: Any) -> None:
    """From the same starts; they differ only in which steps count as growth (top of attacks/apgd.py)."""
    theirs = pytest.importorskip(package, reason=f"{package}, an oracle of APGD, is not installed")
    net, eps, name = smooth_net(), RADII[norm], {"l2": "L2", "linf": "Linf"}[norm]
    images, labels = answered(net, 12)
    options: dict[str, Any] = {"norm": name, "eps": eps, "seed": 0}
    if package == "torchattacks":
        make, make_targeted = (
            theirs.APGD(net, steps=100, **options),
            theirs.APGDT(net, steps=100, **options, n_classes=3),
        )
    else:
        make = theirs.APGDAttack(net, n_iter=100, **options, device="cpu")
        make.init_hyperparam(images)
        make_targeted = theirs.APGDAttack_targeted(net, n_iter=100, **options, n_target_classes=2, device="cpu")
    torch.manual_seed(0)
    _, stands, losses, _ = make.attack_single_run(images, labels)
    ours = apgd(net, images, labels, norm=norm, eps=eps, until_fooled=False, generator=generator())
    assert ours.fooled.tolist() == [not stand for stand in stands.tolist()]
    assert (ours.losses / losses - 1).abs().max() <= 2e-3
    found = make_targeted(images, labels) if package == "torchattacks" else make_targeted.perturb(images, labels)
    ours = apgd_targeted(net, images, labels, norm=norm, eps=eps, targets=2, generator=generator())
    assert (ours.fooled == ~right(net, found, labels)).float().mean() >= 0.95


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_adv_lib_agrees(norm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the same starts, to the greatest loss."""
    theirs = adv_lib("auto_pgd", monkeypatch)
    net, eps = smooth_net(), RADII[norm]
    images, labels = answered(net, 12)
    torch.manual_seed(0)
    order = 2 if norm == "l2" else float("inf")
    found = theirs.apgd(net, images, labels, eps, order, n_iter=100, loss_function="ce", best_loss=True)
    ours = apgd(net, images, labels, norm=norm, eps=eps, until_fooled=False, generator=generator())
    with torch.no_grad():
        losses = F.cross_entropy(net(found), labels, reduction="none")
    assert (ours.losses / losses - 1).abs().max() <= 2e-3
    assert (right(net, ours.images, labels) == right(net, found, labels)).all()


def test_the_ensemble_is_never_above_foolbox_at_its_strongest(goldens: Path) -> None:
    foolbox = pytest.importorskip("foolbox", reason="foolbox, an oracle of the ensemble, is not installed")
    model, images, labels = golden_net(goldens)
    theirs = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    attacks = foolbox.attacks
    eps = 0.25
    stands = torch.ones_like(labels, dtype=torch.bool)
    for one in (attacks.L2PGD(steps=20), attacks.DDNAttack(steps=20), attacks.L2DeepFoolAttack(steps=8, candidates=5)):
        stands &= ~one(theirs, images, labels, epsilons=eps)[2]
    _, fell_to = ensemble(model, images, labels, norm="l2", eps=eps, budget=Budget(steps=20, targets=3, queries=20))
    assert 0 < int(stands.sum()) < len(labels)
    assert int((fell_to == len(STAGES)).sum()) <= int(stands.sum())


def test_it_is_no_weaker_than_pgd_on_stored_images(goldens: Path) -> None:
    model, images, labels = golden_net(goldens)
    for norm, eps in (("l2", 0.25), ("linf", 2 / 255)):
        options: dict[str, Any] = {"norm": norm, "eps": eps}
        adversarial = pgd(model, images, labels, **options, step_size=eps / 8, steps=20, order="ball_then_box")
        found = apgd(model, images, labels, **options, steps=30, until_fooled=False, generator=generator())
        with torch.no_grad():
            losses = F.cross_entropy(model(adversarial), labels, reduction="none")
        assert (found.losses >= losses * 0.995).all()
        assert found.losses.mean() > losses.mean()
        assert_inside(found.images, images, norm, eps)


# --- What must hold of every attack -----------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_inside_ball_and_box_and_fooling(norm: Any) -> None:
    net, eps = smooth_net(), RADII[norm]
    images, labels = answered(net, 12)
    for attack in (apgd, apgd_targeted):
        found = attack(net, images, labels, norm=norm, eps=eps, steps=15, generator=generator())
        assert_inside(found.images, images, norm, eps)
        assert found.fooled.tolist() == (~right(net, found.images, labels)).tolist()
        assert 0 < int(found.fooled.sum()) < len(labels)


class Counting(nn.Module):
    """Counts the images that pass a net of two layers (nothing for attacks/folding.py, which would go around this)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.Tanh(), nn.Linear(16, 4)).double()
        self.rows = 0

    def forward(self, images: Tensor) -> Tensor:
        self.rows += len(images)
        return self.net(images)


def test_images_that_are_fooled_leave_and_change_nothing_for_the_others() -> None:
    counting = Counting()
    images, labels = answered(counting, 12)
    options: dict[str, Any] = {"norm": "l2", "eps": 0.6, "steps": 40}
    counting.rows = 0
    all_steps = apgd(counting, images, labels, **options, until_fooled=False, generator=generator())
    assert counting.rows == 12 * 42  # the clean images, the starts, 40 steps
    counting.rows = 0
    until = apgd(counting, images, labels, **options, generator=generator())
    assert until.fooled.tolist() == all_steps.fooled.tolist()
    stands = ~until.fooled
    assert 0 < int(stands.sum()) < 12
    assert (until.images[stands] - all_steps.images[stands]).abs().max() <= 1e-9
    # 40 steps for those that stand; the others leave at a checkpoint, after 9 steps or later.
    assert 12 * 11 + 31 * int(stands.sum()) <= counting.rows < 12 * 42


def test_wrong_images_and_radius_0_come_back_as_they_are() -> None:
    net = smooth_net()
    images, labels = answered(net, 6)
    wrong = labels.clone()
    wrong[:2] = (wrong[:2] + 1) % CLASSES
    for attack in (apgd, apgd_targeted):
        found = attack(net, images, wrong, norm="l2", eps=0.01, steps=3, generator=generator())
        assert torch.equal(found.images[:2], images[:2])
        assert found.fooled[:2].all()
        nothing = attack(net, images, wrong, norm="l2", eps=0, steps=3)
        assert torch.equal(nothing.images, images)
        assert nothing.images is not images
        assert nothing.fooled.tolist() == [True, True, False, False, False, False]
        empty = attack(net, images[:0], labels[:0], norm="l2", eps=1.0)
        assert empty.images.shape == images[:0].shape


def test_the_model_is_left_as_it_was() -> None:
    net = smooth_net().train()
    net.fc.eval()
    before, modes = copy.deepcopy(net.state_dict()), [part.training for part in net.modules()]
    images, labels = example(4)
    state = torch.random.get_rng_state()
    for precision in ("fp32", "bf16"):
        with torch.no_grad():
            ensemble(
                net,
                images,
                labels,
                norm="l2",
                eps=0.1,
                budget=Budget(2, 3, 2, 4),
                generator=generator(),
                precision=precision,  # type: ignore[arg-type]
            )
    assert [part.training for part in net.modules()] == modes
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(weight.grad is None and weight.requires_grad for weight in net.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_memory_format_changes_nothing_and_is_kept() -> None:
    net = smooth_net()
    images, labels = answered(net, 4)
    options: dict[str, Any] = {"norm": "linf", "eps": 0.02, "steps": 4}
    plain = apgd(net, images, labels, **options, generator=generator())
    other = apgd(net, images.to(memory_format=torch.channels_last), labels, **options, generator=generator())
    assert other.images.is_contiguous(memory_format=torch.channels_last)
    assert (plain.images - other.images).abs().max() <= 1e-5


class Rounding(nn.Module):
    """One pixel, whose sign decides, given away by autocast: under bfloat16 every answer is class 1."""

    def forward(self, images: Tensor) -> Tensor:
        value = images.flatten(1).mean(1, keepdim=True) * 1e-3
        bias = 1.0 if torch.is_autocast_enabled(images.device.type) else 0.0
        return torch.cat([1 - value, value + bias], 1)


def test_what_fools_only_bfloat16_does_not_count() -> None:
    images, labels = torch.rand(4, 3, 4, 4), torch.zeros(4, dtype=torch.int64)
    for attack in (apgd, apgd_targeted):
        found = attack(Rounding(), images, labels, norm="l2", eps=0.1, steps=5, precision="bf16", generator=generator())
        assert not found.fooled.any()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"images": torch.zeros(4, 3, 8, 8, dtype=torch.uint8)}, "uint8"),
        ({"images": torch.full((4, 3, 8, 8), 1.5)}, "beyond"),
        ({"images": torch.full((4, 3, 8, 8), torch.nan)}, "beyond"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "do not fit"),
        ({"norm": "l7"}, "'l7'"),
        ({"eps": -0.1}, "-0.1"),
        ({"eps": math.inf}, "inf"),
        ({"steps": 0}, "at least 1"),
        ({"precision": "fp16"}, "fp16"),
    ],
)
def test_refused(changes: dict[str, Any], words: str) -> None:
    images, labels = example(4)
    options = {"images": images, "labels": labels, "norm": "l2", "eps": 0.1, "steps": 2, **changes}
    for attack in (apgd, apgd_targeted):
        with pytest.raises(ValueError, match=words):
            attack(smooth_net(), **options)


# --- The ensemble -----------------------------------------------------------------------------------------------------


def test_each_attack_takes_what_the_ones_before_left() -> None:
    net = smooth_net()
    images, labels = answered(net, 16)
    labels[0] = (labels[0] + 1) % CLASSES
    budget = Budget(steps=20, targets=4, queries=40)
    found, fell_to = ensemble(net, images, labels, norm="l2", eps=0.3, budget=budget, generator=generator())
    stands = fell_to == len(STAGES)
    assert fell_to[0] == -1
    assert torch.equal(found[0], images[0])
    assert torch.equal(found[stands], images[stands])
    assert right(net, found, labels).tolist() == stands.tolist()
    assert_inside(found, images, "l2", 0.3)
    after_pgd = search("pgd", net, images, labels, norm="l2", eps=0.3)
    assert (fell_to == 0).tolist() == (right(net, images, labels) & ~right(net, after_pgd, labels)).tolist()
    assert (fell_to > 0).any()
    with pytest.raises(ValueError, match="stage must be one of pgd, apgd_ce"):
        search("fab", net, images, labels, norm="l2", eps=0.3)


def test_only_the_standard_bears_its_name() -> None:
    assert [STANDARD.title(stage) for stage in STAGES] == ["PGD-20", "APGD-CE", "APGD-T", "Square"]
    assert Budget(steps=10).title("apgd_ce") == "APGD-CE (10 steps)"
    assert Budget(steps=10, targets=3).title("apgd_t") == "APGD-T (10 steps, 3 targets)"
    assert Budget(queries=100).title("square") == "Square (100 queries)"
