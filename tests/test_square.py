"""The Square attack: its schedule and patterns, every question it asks, and the authors' code."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attacks.apgd import apgd
from attacks.ensemble import right
from attacks.square import margin, pattern, pyramid, share, square
from tests.test_pgd import example, smooth_net

pytestmark = pytest.mark.timeout(300)
RADII: dict[Any, float] = {"l2": 0.45, "linf": 9 / 255}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Box(nn.Module):
    """A black box: it refuses to be differentiated, and keeps what it was asked."""

    def __init__(self, channels: int, classes: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(channels, 6, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.head = nn.Linear(24, classes)
        self.asked: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        self.asked.append(images.clone())
        return self.head(self.net(images * 4 - 2))


def answered(net: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return net(images).argmax(1)


# --- Parts ------------------------------------------------------------------------------------------------------------


def published(query: int) -> float:
    """The divisor of p_init at a query of 10,000."""
    for last, divisor in ((10, 1), (50, 2), (200, 4), (500, 8), (1000, 16), (2000, 32), (4000, 64), (6000, 128)):
        if query <= last:
            return divisor
    return 256 if query <= 8000 else 512


def test_the_window_shrinks_as_published_whatever_the_number_of_queries() -> None:
    assert all(share(query, 10_000, 0.8) == 0.8 / published(query) for query in range(10_000))
    assert all(share(query, 500, 0.1) == 0.1 / published(20 * query) for query in range(500))
    assert share(0, 1, 0.8) == 0.8


def test_the_pattern_of_the_paper() -> None:
    quarter, whole = 1 / 4, 1 + 1 / 4
    assert torch.equal(
        pyramid(3, 3),
        torch.tensor([[quarter] * 3, [quarter, whole, quarter], [quarter] * 3], dtype=torch.float64),
    )
    for side in (1, 3, 5, 6, 29):
        eta = pattern(side)
        assert eta.shape == (side, side)
        assert eta.norm().item() == pytest.approx(1)
        assert (eta[side // 2 :] < 0).all()
        assert (eta[: side // 2] > 0).all()


def test_the_margin_by_hand() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, 4.0, 1.0]])
    assert margin(logits, torch.tensor([0, 2])).tolist() == [1.0, -3.0]


# --- Every question ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 7, 12), (2, 5, 4)])
def test_all_questions_lie_in_ball_and_box_and_are_about_images_that_stand(norm: Any, shape: tuple[int, ...]) -> None:
    torch.manual_seed(2)
    # Images whose pixels lie far from those of the others, so that each question can be told to be about one of them.
    images = (torch.rand(8, *shape) * 1.2 - 0.1).clamp(0, 1)
    box = Box(shape[0])
    labels, eps, queries = answered(box, images), RADII[norm], 60
    labels[0] = (labels[0] + 1) % 4
    box.asked.clear()
    found = square(box, images, labels, norm=norm, eps=eps, queries=queries, generator=generator())
    assert torch.equal(box.asked.pop(0), images)
    assert torch.equal(found.images[0], images[0])
    order = math.inf if norm == "linf" else 2
    counts = [0] * 8
    for asked in box.asked:
        assert asked.min() >= 0
        assert asked.max() <= 1
        distances = torch.linalg.vector_norm((asked[:, None] - images).flatten(2), ord=order, dim=2)
        assert (distances.min(1).values <= eps * (1 + 1e-5)).all()
        for row in distances.argmin(1).tolist():
            counts[row] += 1
    stands = ~found.fooled
    assert counts[0] == 0
    assert all(count == queries + 1 for count, stand in zip(counts, stands.tolist(), strict=True) if stand)
    assert all(1 <= count <= queries + 1 for count in counts[1:])
    # What is found is among what was asked, of the lowest margin, and fools where it is said to.
    assert found.fooled.tolist() == (answered(box, found.images) != labels).tolist()
    with torch.no_grad():
        margins = margin(box(found.images), labels)
    assert (found.losses + margins).abs().max() <= 1e-6
    everything = torch.cat(box.asked)
    assert all((everything - image).flatten(1).abs().amax(1).min() <= 1e-6 for image in found.images[1:])


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_no_weaker_than_the_authors_code(norm: Any) -> None:
    """Mean over three seeds; windows at all places, one for each image, make it a little stronger on small images."""
    theirs = pytest.importorskip("pyautoattack.square", reason="pyautoattack, an oracle of Square, is not installed")
    net = smooth_net()
    images = example(32)[0]
    labels, eps, name = answered(net, images), RADII[norm], {"l2": "L2", "linf": "Linf"}[norm]
    ours_stand, theirs_stand = 0, 0
    for seed in range(3):
        attack = theirs.SquareAttack(
            net, norm=name, n_queries=200, eps=eps, p_init=0.8, seed=seed, device="cpu", resc_schedule=True
        )
        attack.init_hyperparam(images)
        torch.manual_seed(seed)
        _, best = attack.attack_single_run(images, labels)
        theirs_stand += int(right(net, best, labels).sum())
        found = square(net, images, labels, norm=norm, eps=eps, queries=200, generator=generator(seed))
        ours_stand += int((~found.fooled).sum())
    assert 0 < ours_stand <= theirs_stand + 3
    assert ours_stand >= theirs_stand / 2


def test_torchattacks_stands_where_we_do() -> None:
    torchattacks = pytest.importorskip("torchattacks", reason="torchattacks, an oracle of Square, is not installed")
    net = smooth_net()
    images = example(32)[0]
    labels, eps = answered(net, images), RADII["linf"]
    theirs = torchattacks.Square(net, norm="Linf", eps=eps, n_queries=200, p_init=0.8, seed=0)(images, labels)
    found = square(net, images, labels, norm="linf", eps=eps, queries=200, generator=generator())
    assert (found.fooled == ~right(net, theirs, labels)).float().mean() >= 0.75


class Stairs(nn.Module):
    """Smooth inside, but its answers come in steps: gradients are zero everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.net = smooth_net()

    def forward(self, images: Tensor) -> Tensor:
        logits = self.net(images)
        return (logits * 200).round() / 200 + 0 * images.sum()


def test_it_finds_what_gradients_hide() -> None:
    net = Stairs()
    images = example(12)[0]
    labels = answered(net, images)
    blind = apgd(net, images, labels, norm="linf", eps=0.05, steps=10, generator=generator())
    found = square(net, images, labels, norm="linf", eps=0.05, queries=150, generator=generator())
    assert int(found.fooled.sum()) >= int(blind.fooled.sum()) + 3


# --- What must hold of every attack -----------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_it_repeats_and_leaves_all_else_alone(norm: Any) -> None:
    net = smooth_net().train()
    before, state = copy.deepcopy(net.state_dict()), torch.random.get_rng_state()
    images, labels = example(6)
    options: dict[str, Any] = {"norm": norm, "eps": 0.2, "queries": 20}
    one, two = (square(net, images, labels, **options, generator=generator()) for _ in range(2))
    assert torch.equal(one.images, two.images)
    other = square(net, images, labels, **options, generator=generator(1))
    assert not torch.equal(one.images, other.images)
    assert net.training
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(weight.grad is None for weight in net.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(square(net, images, labels, norm=norm, eps=0).images, images)
    assert square(net, images[:0], labels[:0], norm=norm, eps=1.0).images.shape == images[:0].shape


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"images": torch.zeros(4, 3, 8, 8, dtype=torch.uint8)}, "uint8"),
        ({"images": torch.full((4, 3, 8, 8), -0.5)}, "beyond"),
        ({"images": torch.full((4, 3, 8, 8), torch.nan)}, "beyond"),
        ({"images": torch.rand(4, 192)}, "expected"),
        ({"labels": torch.zeros(4, 2, dtype=torch.int64)}, "expected"),
        ({"norm": "l1"}, "'l1'"),
        ({"eps": math.nan}, "nan"),
        ({"queries": 0}, "at least 1"),
        ({"p_init": 0.0}, "p_init"),
        ({"precision": "fp16"}, "fp16"),
    ],
)
def test_refused(changes: dict[str, Any], words: str) -> None:
    images, labels = example(4)
    options = {"images": images, "labels": labels, "norm": "l2", "eps": 0.1, "queries": 2, **changes}
    with pytest.raises(ValueError, match=words):
        square(smooth_net(), **options)
