"""Frequencies: the DCT, flip and filters against stored figures; projections and attacks on flipped images."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from attacks.frequency import Flipped, pgd_flipped, project_dykstra, project_exact
from attacks.pgd import pgd
from kernels.dct import cut, dct, flip, high_pass, idct, low_pass

FILTERS: dict[str, Callable[..., Tensor]] = {"low": low_pass, "high": high_pass, "cut": cut}
TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {"dct": dct, "idct": idct, "flip": flip}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


# --- Transforms and filters -------------------------------------------------------------------------------------------


def applied(name: str, images: Tensor) -> Tensor:
    """What is stored under a name such as `flip`, `low8` or `cut16_original_on_4d`."""
    match = re.fullmatch(r"(low|high|cut)(\d+)(_original_on_4d)?", name)
    if match is None:
        return TRANSFORMS[name](images)
    return FILTERS[match[1]](images, int(match[2]), published=bool(match[3]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_stored_transforms_and_filters(goldens: Path, device: str, dtype: torch.dtype) -> None:
    stored = np.load(goldens / "dct.npz")
    names = [name for name in stored.files if not name.endswith("/x")]
    assert len(names) == 36
    for name in names:
        case, _, operation = name.partition("/")
        images = torch.from_numpy(stored[f"{case}/x"]).to(device, dtype)
        before = images.clone()
        found = applied(operation, images)
        assert (found.shape, found.dtype, found.is_contiguous()) == (images.shape, dtype, True), name
        assert (found.cpu() - torch.from_numpy(stored[name])).abs().max() <= TOLERANCE[dtype], name
        assert torch.equal(images, before), name


@settings(max_examples=30)
@given(
    shape=st.lists(st.integers(1, 3), max_size=3).flatmap(
        lambda leading: st.tuples(st.integers(1, 12), st.integers(1, 12)).map(lambda size: (*leading, *size))
    ),
    bandwidth=st.integers(0, 14),
    seed=st.integers(0, 9),
)
def test_the_algebra_holds(shape: tuple[int, ...], bandwidth: int, seed: int) -> None:
    """Sizes odd, even, prime, rectangular and 1; any leading axes; bandwidths of nothing, a part, all and more."""
    torch.manual_seed(seed)
    x, y = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    axes = (-2, -1)

    def close(one: Tensor, other: Tensor) -> bool:
        return bool((one - other).abs().max() <= 1e-12)

    assert close(idct(dct(x)), x)
    assert close(flip(flip(x)), x)
    assert close((flip(x) * y).sum(), (x * flip(y)).sum())
    assert close(dct(flip(x)), dct(x).flip(axes))
    coefficients = dct(x)
    low, high = torch.zeros_like(x), torch.zeros_like(x)
    low[..., :bandwidth, :bandwidth] = coefficients[..., :bandwidth, :bandwidth]
    first = [max(size - bandwidth, 0) for size in shape[-2:]]
    high[..., first[0] :, first[1] :] = coefficients[..., first[0] :, first[1] :]
    assert close(dct(low_pass(x, bandwidth)), low)
    assert close(dct(high_pass(x, bandwidth)), high)
    assert close(dct(cut(x, bandwidth)), coefficients - low)
    assert close(high_pass(flip(x), bandwidth), flip(low_pass(x, bandwidth)))


def test_published_filters_have_a_quirk_on_batches_and_at_bandwidth_0() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 10, dtype=torch.float64)
    for name, function in FILTERS.items():
        # One image at a time the published filter is the right one.
        for image in (x[0], x[0, 0]):
            assert torch.equal(function(image, 5, published=True), function(image, 5)), name
        assert (function(x, 5, published=True) - function(x, 5)).abs().max() > 0.1, name
    assert torch.allclose(high_pass(x, 0, published=True), x)
    assert torch.allclose(high_pass(x[0], 0, published=True), x[0])
    assert torch.equal(high_pass(x, 0), 0 * x)
    assert torch.equal(low_pass(x, 0), 0 * x)
    # Fewer channels than the bandwidth: only vertical frequencies are filtered.
    vertical = dct(low_pass(x, 5, published=True))
    assert torch.allclose(vertical[..., :5, :], dct(x)[..., :5, :])
    assert vertical[..., 5:, :].abs().max() < 1e-12
    assert torch.equal(low_pass(x, 2, published=True)[:, 2], 0 * x[:, 2])
    assert torch.equal(high_pass(x, 2, published=True)[:, 0], 0 * x[:, 0])


def test_gradients_also_after_inference_mode_and_under_autocast() -> None:
    images = torch.rand(2, 3, 11, 7)
    with torch.inference_mode():
        flip(images)  # sizes that nothing else used: the matrices are made here
    x = images.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = flip(low_pass(x, 4))
        assert found.dtype == torch.float32
    assert torch.equal(found, flip(low_pass(images, 4)))
    weight = torch.randn_like(images)
    (found * weight).sum().backward()
    assert x.grad is not None
    assert (x.grad - low_pass(flip(weight), 4)).abs().max() <= 1e-5
    double = torch.rand(1, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: (dct(x) * idct(x)).sum(), double)
    low = flip(images.bfloat16())
    assert torch.equal(low, flip(images.bfloat16().float()).bfloat16())


def test_compiled_filters_are_the_same() -> None:
    torch._dynamo.reset()
    x = torch.rand(2, 3, 6, 9)

    def both(x: Tensor) -> Tensor:
        return flip(low_pass(x, 3)) + high_pass(x, 2, published=True)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert (compiled(x) - both(x)).abs().max() <= 1e-6


@pytest.mark.parametrize(("call", "message"), [
    (lambda: flip(torch.rand(5)), r"images \(5,\) torch.float32 must be \[..., H, W\]"),
    (lambda: dct(torch.zeros(4, 4, dtype=torch.uint8)), r"torch.uint8 must be .* floating"),
    (lambda: low_pass(torch.rand(4, 4), -1), "bandwidth must be at least 0, not -1"),
    (lambda: cut(torch.rand(1, 1, 1, 4, 4), 2, published=True), r"not \(1, 1, 1, 4, 4\)"),
])  # fmt: skip
def test_what_transforms_refuse(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_nothing_in_nothing_out() -> None:
    for shape in ((0, 3, 4, 4), (2, 0, 4)):
        images = torch.rand(shape)
        for function in (dct, flip, lambda x: low_pass(x, 2)):
            assert function(images).shape == shape


# --- Projections ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["mnist_eps2", "rand1x8x8_eps1"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
def test_stored_projections(goldens: Path, device: str, case: str, dtype: torch.dtype, tolerance: float) -> None:
    """Points 0.5 to 10 radii away. Dykstra's sweeps are stored for ratios: 30 are enough up to 3, 92 up to 10."""
    stored = np.load(goldens / "dykstra.npz")
    points, clean = (torch.from_numpy(stored[f"{case}/{name}"]).to(device, dtype) for name in ("z0", "x"))
    expected, ratio = torch.from_numpy(stored[f"{case}/proj"]), torch.from_numpy(stored[f"{case}/ratio"])
    eps = float(stored[f"{case}/eps"])
    each = torch.full((len(points),), eps, device=device)

    def distance(found: Tensor) -> Tensor:
        assert (found.dtype, found.shape) == (dtype, points.shape)
        assert bool(((found - clean).flatten(1).norm(dim=1) <= eps * (1 + 2e-6)).all())
        pixels = flip(found)
        assert pixels.min() >= -1e-5
        assert pixels.max() <= 1 + 1e-5
        return (found.cpu().double() - expected).flatten(1).norm(dim=1)

    assert distance(project_exact(points, clean, eps)).max() <= tolerance * eps
    assert distance(project_exact(points, clean, each)).max() <= tolerance * eps
    thirty = distance(project_dykstra(points, clean, eps, 30))
    assert thirty[ratio <= 3].max() <= 1e-3
    assert thirty[ratio == 10].max() > 1e-3  # it is not the exact one under another name
    assert distance(project_dykstra(points, clean, each, 92)).max() <= 1e-3
    if dtype == torch.float64:
        assert distance(project_dykstra(points, clean, eps, 400)).max() <= 1e-7
    with pytest.raises(ValueError, match="sweeps must be at least 1, not 0"):
        project_dykstra(points, clean, eps, 0)


# --- Attacks ----------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Four classes; smooth; takes flipped images 1 x 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.drop, self.last = nn.Linear(64, 12), nn.Dropout(0.5), nn.Linear(12, 4)
        for weight in self.parameters():
            nn.init.normal_(weight, std=0.4)

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.drop(torch.tanh(self.first(images.flatten(1)))))


def flipped_images(dtype: torch.dtype = torch.float64, samples: int = 6) -> tuple[Tensor, Tensor]:
    """Flipped pictures with many pixels on the faces of the box, and labels."""
    generator = torch.Generator().manual_seed(2)
    pixels = (torch.rand(samples, 1, 8, 8, generator=generator, dtype=torch.float64) * 1.6 - 0.3).clamp(0, 1)
    return flip(pixels).to(dtype), torch.arange(samples) % 4


def literal_pgd(images: Tensor, labels: Tensor, eps: float, step: float, steps: int, sweeps: int) -> Tensor:
    """PGD one flipped image at a time, in the flipped domain, with a dense T; sweeps 0: the root by bisection."""
    side = images.shape[-1]
    n = np.arange(side)
    basis = np.cos(np.pi * (2 * n[None] + 1) * n[:, None] / (2 * side)) * np.sqrt(2 / side)
    basis[0] /= np.sqrt(2)
    axis = basis.T @ basis[::-1]
    dense = np.kron(axis, axis)
    net = Net().double().eval()
    weights = {name: weight.detach().numpy() for name, weight in net.named_parameters()}
    ends = []
    for image, label in zip(images.flatten(1).numpy(), labels.tolist(), strict=True):
        z = image.copy()
        for _ in range(steps):
            hidden = np.tanh(weights["first.weight"] @ z + weights["first.bias"])
            logits = weights["last.weight"] @ hidden + weights["last.bias"]
            errors = np.exp(logits - logits.max())
            errors /= errors.sum()
            errors[label] -= 1
            gradient = weights["first.weight"].T @ ((1 - hidden**2) * (weights["last.weight"].T @ errors))
            z = z + step * gradient / np.linalg.norm(gradient)
            if sweeps:
                a, b = np.zeros_like(z), np.zeros_like(z)
                for _ in range(sweeps):
                    offset = z + a - image
                    v = image + offset * min(1, eps / np.linalg.norm(offset))
                    a = z + a - v
                    z = dense @ np.clip(dense @ (v + b), 0, 1)
                    b = v + b - z
                z = image + (z - image) * min(1, eps / np.linalg.norm(z - image))
            else:
                p, c = dense @ z, dense @ image
                low, high = 0.0, 1.0
                if np.linalg.norm(np.clip(p, 0, 1) - c) > eps:
                    while np.linalg.norm(np.clip((p + high * c) / (1 + high), 0, 1) - c) > eps:
                        high *= 2
                    for _ in range(100):
                        t = (low + high) / 2
                        outside = np.linalg.norm(np.clip((p + t * c) / (1 + t), 0, 1) - c) > eps
                        low, high = (t, high) if outside else (low, t)
                    z = dense @ np.clip((p + high * c) / (1 + high), 0, 1)
                else:
                    z = dense @ np.clip(p, 0, 1)
        ends.append(z)
    return torch.from_numpy(np.stack(ends)).reshape(images.shape)


@pytest.mark.parametrize("projection", ["exact", "dykstra"])
def test_attack_is_pgd_in_the_flipped_domain(projection: Any) -> None:
    images, labels = flipped_images()
    model = Net().double().train()
    options: dict[str, Any] = {"eps": 1.2, "step_size": 0.5, "steps": 7}
    found = pgd_flipped(model, images, labels, **options, projection=projection, sweeps=9)
    expected = literal_pgd(images, labels, 1.2, 0.5, 7, 9 if projection == "dykstra" else 0)
    assert (found - expected).abs().max() <= 1e-9
    assert model.training
    assert model.drop.training
    assert all(weight.grad is None for weight in model.parameters())
    assert bool(((found - images).flatten(1).norm(dim=1) <= 1.2 + 1e-9).all())
    pixels = flip(found)
    assert -1e-12 <= pixels.min() < 1e-6
    # Published orders are feasible too, and end elsewhere.
    other = pgd(Flipped(model), flip(images).clamp(0, 1), labels, norm="l2", order="ball_then_box", **options)
    assert (flip(other) - found).flatten(1).norm(dim=1).max() > 1e-3


@pytest.mark.parametrize("projection", ["exact", "dykstra"])
def test_attack_in_float32_with_its_options(device: str, projection: Any) -> None:
    images, labels = flipped_images(torch.float32)
    images, labels, model = images.to(device), labels.to(device), Net().to(device)
    with torch.inference_mode():
        reference = pgd_flipped(model, images, labels, eps=1.2, step_size=0.5, steps=4, projection=projection)
    eps = torch.linspace(0, 1.5, 6, device=device)
    options: dict[str, Any] = {"step_size": eps / 2, "steps": 4, "projection": projection, "random_start": True}
    found = []
    for targeted in (False, False, True):
        generator = torch.Generator(device).manual_seed(5)
        end = pgd_flipped(model, images, labels, eps=eps, targeted=targeted, generator=generator, **options)
        length, pixels = (end - images).flatten(1).norm(dim=1), flip(end)
        assert bool((length <= eps * (1 + 1e-5) + 1e-5).all())
        assert pixels.min() >= -1e-5
        assert pixels.max() <= 1 + 1e-5
        found.append(end)
    assert torch.equal(found[0], found[1])
    with torch.no_grad():
        own = [model.eval()(x).log_softmax(1).gather(1, labels[:, None]).sum() for x in (found[0], images, found[2])]
    assert own[0] < own[1] < own[2]
    double = pgd_flipped(Net().to(device).double(), images.double(), labels, eps=1.2, step_size=0.5, steps=4,
                         projection=projection)  # fmt: skip
    assert (reference - double).abs().max() <= 1e-4


def test_attack_without_radius_or_steps_gives_the_images_and_refuses_what_is_not_flipped() -> None:
    images, labels = flipped_images(torch.float32)
    model = Net()
    good: dict[str, Any] = {"eps": 1.0, "step_size": 0.5, "steps": 2}
    for projection in ("exact", "dykstra"):
        for change in ({"eps": 0}, {"steps": 0}):
            same = pgd_flipped(model, images, labels, **{**good, **change, "projection": projection})
            assert torch.equal(same, images)
            assert same.data_ptr() != images.data_ptr()
    refused: tuple[tuple[dict[str, Any], str], ...] = (
        ({"projection": "alternating"}, "projection must be"),
        ({"sweeps": 0}, "sweeps must be at least 1"),
        ({"steps": -1}, "steps at least 0, not 30 and -1"),
        ({"eps": -1.0}, "eps must be a number >= 0"),
        ({"eps": -1.0, "projection": "dykstra"}, "eps must be a number >= 0"),
    )
    for change, message in refused:
        with pytest.raises(ValueError, match=message):
            pgd_flipped(model, images, labels, **{**good, **change})
    with pytest.raises(ValueError, match="were the images flipped"):
        pgd_flipped(model, flip(images), labels, **good)
    with pytest.raises(ValueError, match="labels"):
        pgd_flipped(model, images, labels[:2], **good)
