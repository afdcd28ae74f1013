"""A step of projected gradient ascent: published runs, formulas in float64, and the kernels against both."""

import logging
import re
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from kernels import pgd_step as module
from kernels.dct import flip
from kernels.pgd_step import pgd_step
from models.small import SMALL_NETS

NORMS = ("linf", "l2", "l1")
ORDERS = ("box_then_ball", "ball_then_box")
MODES = [*product(NORMS, ORDERS), ("linf", "nearest"), ("l2", "nearest")]
EPS = {"linf": 8 / 255, "l2": 0.5, "l1": 2.0}
# Half the distance between neighbours below 1: what rounding adv' to its type costs each pixel at most.
HALF_ULP = {torch.float32: 2.0**-25, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12, torch.float64: 2.0**-54}
LONG = module.LONGEST_ROW + 3  # five chunks, the last one ragged
# Every norm and order that has kernels at a size: long samples have none for l1 and for the nearest point.
SIZES = [(*mode, 40) for mode in MODES] + [("l2", order, LONG) for order in ORDERS]


def shaped(images: Tensor, form: str) -> Tensor:
    """The same values in another memory format: plain, channels_last, strided (every other column) or expanded."""
    if form == "channels_last" and images.ndim > 2:
        return images.movedim(1, -1).contiguous().movedim(-1, 1)
    if form == "strided":
        return images.repeat_interleave(2, -1)[..., ::2]
    return images.contiguous()


def example_images(
    shape: tuple[int, ...], norm: str, dtype: torch.dtype, device: str, scale: float = 1e-3
) -> tuple[Tensor, Tensor, Tensor]:
    """adv within the ball, a gradient and clean images with many pixels on the faces of the box."""
    clean = (torch.rand(shape) * 1.4 - 0.2).clamp(0, 1).to(dtype)
    values = max(clean[:1].numel(), 1)
    noise = torch.randn(shape) * EPS[norm] / {"linf": 2, "l2": values**0.5, "l1": values}[norm]
    adv = (clean.float() + noise).clamp(0, 1).to(dtype)
    return adv.to(device), (torch.randn(shape) * scale).to(dtype).to(device), clean.to(device)


def projected_l1(delta: np.ndarray, eps: float) -> np.ndarray:
    """Nearest point of the L1 ball to one vector: the threshold by bisection."""
    magnitude = np.abs(delta)
    if magnitude.sum() <= eps:
        return delta
    low, high = 0.0, magnitude.max()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(magnitude - middle, 0).sum() > eps else (low, middle)
    return np.sign(delta) * np.maximum(magnitude - high, 0)


def nearest_point(moved: np.ndarray, clean: np.ndarray, eps: float) -> np.ndarray:
    """u(t) = clip((moved + t·clean)/(1 + t), 0, 1) with the smallest t >= 0 that lies in the ball: s = 1/(1 + t)."""

    def u(s: float) -> np.ndarray:
        return np.clip(clean + s * (moved - clean), 0, 1)

    low, high = 0.0, 1.0
    if np.linalg.norm(u(high) - clean) <= eps:
        return np.clip(moved, 0, 1)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.linalg.norm(u(middle) - clean) <= eps else (low, middle)
    return u(low)


def formula(adv: Tensor, grad: Tensor, clean: Tensor, step_size: Any, eps: Any, norm: str, order: str) -> Tensor:
    """The step sample by sample in float64, written as the published codes do."""
    samples = []
    for i in range(adv.shape[0]):
        x, g, c = (tensor[i].detach().double().cpu().numpy() for tensor in (adv, grad, clean))
        step, bound = (float(value[i]) if isinstance(value, Tensor) else value for value in (step_size, eps))
        length = np.linalg.norm(g.ravel(), {"linf": np.inf, "l2": 2, "l1": 1}[norm])
        if norm == "linf":
            direction = np.sign(g)
        elif norm == "l2" and order == "ball_then_box":
            direction = g / (length + 1e-10)
        else:
            direction = g / length if length > 0 else 0 * g
        moved = x + step * direction
        delta = (np.clip(moved, 0, 1) if order == "box_then_ball" else moved) - c
        if norm == "linf":
            delta = np.clip(delta, -bound, bound)
        elif order == "nearest":
            delta = nearest_point(moved.ravel(), c.ravel(), bound).reshape(delta.shape) - c
        elif norm == "l2":
            length = np.linalg.norm(delta.ravel())
            if length > bound:
                delta = delta * bound / (length + (1e-7 if order == "box_then_ball" else 0))
        else:
            delta = projected_l1(delta.ravel(), bound).reshape(delta.shape)
        samples.append(c + delta if order == "box_then_ball" else np.clip(c + delta, 0, 1))
    return torch.from_numpy(np.stack(samples)) if samples else torch.empty(adv.shape, dtype=torch.float64)


def assert_in_ball_and_box(adv: Tensor, clean: Tensor, eps: Any, norm: str) -> None:
    delta = (adv.double() - clean.double()).flatten(1) if adv.ndim > 1 else (adv.double() - clean.double())[:, None]
    size = torch.linalg.vector_norm(delta, {"linf": float("inf"), "l2": 2, "l1": 1}[norm], 1)
    values = delta.shape[1]
    rounding = HALF_ULP[adv.dtype] * {"linf": 1, "l2": values**0.5, "l1": values}[norm]
    bound = eps.double() if isinstance(eps, Tensor) else torch.full_like(size, eps)
    assert bool((size <= bound.to(size.device) * (1 + 1e-6) + rounding).all())
    assert bool(((adv >= 0) & (adv <= 1)).all())


# --- Published runs ---------------------------------------------------------------------------------------------------


def parse(tag: str) -> dict[str, Any] | None:
    """What a stored run did; None for other attacks than PGD."""
    if match := re.fullmatch(r"pgd_(noise|multi\d|nograd\d|clean|targeted_clean)_e([\d.]+)_s(\d+)", tag):
        eps, steps = float(match[2]), int(match[3])
        sign = -1 if "targeted" in match[1] else 1
        copies = int(match[1][-1]) if match[1][-1].isdigit() else int(match[1] == "noise")
        run = {"norm": "l2", "order": "box_then_ball", "eps": eps, "step_size": sign * 2 * eps / steps}
        return {**run, "steps": steps, "copies": copies, "kind": match[1].rstrip("0123456789")}
    if match := re.fullmatch(r"ta_pgd(_linf|l2)_e([\d.]+)_a([\d.]+)_s(\d+)", tag):
        unit = 255 if match[1] == "_linf" else 1
        eps, alpha, steps = float(match[2]) / unit, float(match[3]) / unit, int(match[4])
    elif match := re.fullmatch(r"fb_(linf|l2)pgd_([\d.]+)_([\d.]+)_(\d+)", tag):
        eps, steps = float(match[2]) / (255 if match[1] == "linf" else 1), int(match[4])
        alpha = float(match[3]) * eps
    else:
        return None
    run = {"norm": match[1].strip("_"), "order": "ball_then_box", "eps": eps, "step_size": alpha}
    return {**run, "steps": steps, "copies": 0, "kind": "clean"}


@pytest.fixture(scope="module")
def runs(goldens: Path) -> dict[str, Any]:
    stored = np.load(goldens / "attacks.npz")
    return {name: stored[name] for name in stored.files}


def attack(
    runs: dict[str, Any], goldens: Path, tag: str, dtype: torch.dtype, device: str, kernel: Any, few: slice = slice(8)
) -> Tensor:
    """δ of some images of a stored run, made with pgd_step in place; it also prepares what the model reads next."""
    run = parse(tag)
    assert run is not None
    net = SMALL_NETS["cifar_resnet20"].build(10)
    net.load_state_dict(load_file(goldens / "cifar_resnet20.safetensors"))
    net.to(device, dtype).eval().requires_grad_(False)
    mean, std = (torch.tensor(x).to(device, dtype)[:, None, None]
                 for x in (SMALL_NETS["cifar_resnet20"].mean, SMALL_NETS["cifar_resnet20"].std))  # fmt: skip
    clean = (torch.from_numpy(runs["images_u8"])[few].float() / 255).to(device, dtype)
    target = "target_labels" if "targeted" in run["kind"] else "labels"
    labels = torch.from_numpy(runs[target])[few].to(device)
    m = max(run["copies"], 1)
    noise = None
    if run["copies"]:
        noise = torch.from_numpy(runs[f"noise{m}"]).unflatten(0, (8, m))[few].flatten(0, 1).to(device, dtype)
    adv = clean.clone()
    seen = clean.repeat_interleave(m, 0) + (0 if noise is None else noise)
    each = labels.repeat_interleave(m)
    for _ in range(run["steps"]):
        seen.requires_grad_()
        logits = net((seen - mean) / std)
        if run["kind"] == "nograd":
            assert noise is not None
            probability = logits.softmax(1).detach().gather(1, each[:, None])[:, :, None, None]
            gradient = -probability * noise
        else:
            mixed = logits.softmax(1).unflatten(0, (-1, m)).mean(1).clamp(min=1e-20).log()
            loss = F.nll_loss(mixed, labels) if run["kind"] == "multi" else F.cross_entropy(logits, each)
            (gradient,) = torch.autograd.grad(loss, seen)
        gradient = gradient.unflatten(0, (-1, m)).sum(1)
        seen = torch.empty_like(seen).detach()
        options = {key: run[key] for key in ("norm", "order", "eps", "step_size")}
        pgd_step(adv, gradient, clean, **options, noise=noise, model_input=seen, out=adv, kernel=kernel)
        assert_in_ball_and_box(adv, clean, run["eps"], run["norm"])
    return (adv - clean).cpu()


def test_published_runs_in_float64(runs: dict[str, Any], goldens: Path) -> None:
    """Three images of each run, which does not mix them; test_pgd.py has the others."""
    few = slice(3)
    tags = [tag for tag in runs["tags"] if parse(tag)]
    assert len(tags) == 20
    for tag in tags:
        stored = runs.get(f"{tag}/delta_f64", runs[f"{tag}/delta"])[few]
        delta = attack(runs, goldens, tag, torch.float64, "cpu", "auto", few)
        assert (delta - torch.from_numpy(stored)).abs().max() <= 2e-6, tag


def test_published_runs_with_kernels(runs: dict[str, Any], goldens: Path, device: str) -> None:
    """float32 runs cross kinks of the network: the original's own differ from float64 by up to 0.02 (l2), 0.14 (linf).

    Which images do depends on how a processor rounds convolutions, one or two of a run's eight on some; an error of the
    step would be in all of them.
    """
    distances = {}
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        for tag in filter(parse, runs["tags"]):
            if device == "cpu" and re.match(r"pgd_(noise|multi|nograd).*_s10", tag):
                continue  # the interpreter is slow: every kind of run, but some only with few steps
            delta = attack(runs, goldens, tag, torch.float32, device, "triton")
            stored = torch.from_numpy(runs[f"{tag}/delta"])
            distances[tag] = (delta - stored).flatten(1).norm(dim=1)
            norms = delta.flatten(1).norm(dim=1).numpy()
            assert norms == pytest.approx(runs[f"{tag}/norm"], rel=0.02), tag
            assert distances[tag].median() <= 1e-5, tag
            assert distances[tag].max() <= (0.3 if "linf" in tag else 0.15), tag
    assert (torch.cat([*distances.values()]) <= 1e-3).float().mean() >= 0.9, distances


# --- Reference and kernels against the formulas -----------------------------------------------------------------------


@pytest.mark.parametrize(("norm", "order"), MODES)
@pytest.mark.parametrize("shape", [(3, 3, 5, 4), (2, 7), (4,), (1, 2, 3, 4, 5), (2, 1, 1, 1)])
def test_reference_is_the_formula(norm: Any, order: Any, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    adv, grad, clean = example_images(shape, norm, torch.float64, "cpu")
    for step, eps in ((0.3 * EPS[norm], EPS[norm]), (-5 * EPS[norm], 0.5 * EPS[norm]), (0.1, float("inf"))):
        new = pgd_step(adv, grad, clean, step_size=step, eps=eps, norm=norm, order=order)
        expected = formula(adv, grad, clean, step, eps, norm, order)
        assert new.dtype == torch.float64
        assert (new - expected).abs().max() <= 1e-12
        assert_in_ball_and_box(new, clean, eps, norm)


@pytest.mark.parametrize("case", ["mnist_eps2", "rand1x8x8_eps1"])
@pytest.mark.parametrize(("dtype", "kernel", "tolerance"), [(torch.float64, "reference", 1e-9),
                                                            (torch.float32, "reference", 2e-5),
                                                            (torch.float32, "triton", 2e-5)])  # fmt: skip
def test_nearest_is_the_stored_projection(
    goldens: Path, device: str, dtype: torch.dtype, kernel: Any, tolerance: float, case: str
) -> None:
    """Points up to ten radii away, in pixels; the stored ones are in the frequency-flipped domain."""
    stored = np.load(goldens / "dykstra.npz")
    point, clean, expected = (flip(torch.from_numpy(stored[f"{case}/{name}"]).double()) for name in ("z0", "x", "proj"))
    point, clean = point.to(device, dtype), clean.to(device, dtype)
    eps = float(stored[f"{case}/eps"])
    found = pgd_step(point, clean, clean, step_size=0, eps=eps, norm="l2", order="nearest", kernel=kernel)
    distance = (found.cpu() - expected).flatten(1).norm(dim=1)
    assert distance.max() <= tolerance * eps
    assert_in_ball_and_box(found, clean, eps, "l2")
    # The published orders end in ball and box too, but elsewhere.
    for order in ("box_then_ball", "ball_then_box"):
        other = pgd_step(point, clean, clean, step_size=0, eps=eps, norm="l2", order=order, kernel=kernel)
        assert (other.cpu() - expected).flatten(1).norm(dim=1).max() > 1e-3 * eps


@pytest.mark.parametrize("kernel", ["triton", "reference"])
def test_nearest_where_most_values_reach_a_face(device: str, kernel: Any) -> None:
    """Sizes over many orders of magnitude, as few values free as there can be, a ball that just holds the corner."""
    torch.manual_seed(0)
    values = 200
    clean = torch.rand(6, values, device=device)
    size = torch.logspace(-6, 4, values, device=device) * torch.randn(6, values, device=device).sign()
    size[3] = 1e4 * torch.randn(values, device=device).sign()
    size[4, 1:] = 0  # one value has to go all the way
    size[5] = -(clean[5] == clean[5]).float()  # the corner 0, at a distance of ‖clean‖
    eps = torch.tensor([0.1, 1.0, 5.0, 4.0, 0.01, 1.0], device=device)
    eps[5] = clean[5].norm()
    found = pgd_step(clean + size, clean, clean, step_size=0, eps=eps, norm="l2", order="nearest", kernel=kernel)
    expected = formula(clean + size, clean, clean, 0.0, eps, "l2", "nearest")
    distance = (found.cpu() - expected).norm(dim=1)
    assert (distance <= 2e-5 * eps.cpu()).all()
    assert_in_ball_and_box(found, clean, eps, "l2")


def test_orders_of_linf_are_one_function(device: str) -> None:
    torch.manual_seed(0)
    adv, grad, clean = example_images((4, 3, 16, 16), "linf", torch.float32, device)
    orders: tuple[Any, ...] = (*ORDERS, "nearest")
    options: dict[str, Any] = {"step_size": 0.02, "eps": 8 / 255, "norm": "linf"}
    found = [pgd_step(adv, grad, clean, **options, order=order) for order in orders]
    assert orders == module.ORDERS
    assert (found[0] - found[1]).abs().max() <= 2**-24
    assert torch.equal(found[1], found[2])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kernel", ["triton", "reference"])
def test_l1_projection_is_the_nearest_point(device: str, kernel: Any, order: Any) -> None:
    """δ = soft(step, t): t ≥ 0, kept values moved by exactly t, others at most t, and the ball is full (its KKT)."""
    torch.manual_seed(0)
    values = 301
    clean = torch.full((4, values), 0.5, device=device)
    moved = torch.randn(4, values, device=device) * 0.05
    moved[1, 7] = 0.4  # one large value
    moved[2] = 0.02  # all equal
    moved[3] *= 1e-4  # inside the ball
    eps = 1.5
    new = pgd_step(clean + moved, 0 * clean, clean, step_size=0, eps=eps, norm="l1", order=order, kernel=kernel)
    delta, start = (new - clean).double(), (clean + moved - clean).double()
    assert delta[:3].abs().sum(1).tolist() == pytest.approx([eps] * 3, rel=1e-6, abs=values * 2**-25)
    assert torch.equal(delta[3], start[3])
    removed = (start - delta).abs()
    for row in range(3):
        kept = delta[row] != 0
        threshold = removed[row][kept].mean()
        assert (removed[row][kept] - threshold).abs().max() <= 1e-6
        assert (start[row].abs()[~kept] <= threshold + 1e-6).all()
        assert (delta[row] * start[row] >= 0).all()


SHAPES = st.sampled_from([(1, 1), (2, 3), (1, 3, 5, 7), (3, 3, 6, 6), (2, 3, 19, 17), (1, 2, 3, 7, 5), (1, 1031), (5,),
                          (0, 3, 4, 4), (2, 0), (1, 4099), (2, 3, 32, 32)])  # fmt: skip
FORMS = st.sampled_from(["plain", "channels_last", "strided"])


@settings(max_examples=60)
@given(
    shape=SHAPES,
    norm=st.sampled_from(NORMS),
    order=st.sampled_from((*ORDERS, "nearest")),
    types=st.tuples(*[st.sampled_from([torch.float32, torch.bfloat16, torch.float16])] * 3),
    forms=st.tuples(FORMS, FORMS, FORMS, st.sampled_from(["plain", "channels_last"])),
    copies=st.integers(0, 3),
    noisy=st.booleans(),
    each=st.booleans(),
    steps=st.sampled_from([0.1, 1.0, -2.0, 100.0]),
    seed=st.integers(0, 100),
)
@example(shape=(2, LONG), norm="l2", order="box_then_ball", types=(torch.float32,) * 3, forms=("plain",) * 4,
         copies=2, noisy=True, each=True, steps=1.0, seed=0)  # fmt: skip
@example(shape=(2, LONG), norm="l2", order="ball_then_box", types=(torch.float32,) * 3, forms=("plain",) * 4,
         copies=2, noisy=True, each=False, steps=1.0, seed=0)  # fmt: skip
@example(shape=(1, 3, 75, 83), norm="l2", order="ball_then_box", types=(torch.float32, torch.bfloat16, torch.float16),
         forms=("channels_last", "plain", "channels_last", "plain"), copies=1, noisy=True, each=True, steps=-2.0,
         seed=0)  # fmt: skip
@example(shape=(1, 3, 75, 83), norm="l2", order="box_then_ball", types=(torch.bfloat16,) * 3,
         forms=("plain", "channels_last", "plain", "channels_last"), copies=1, noisy=False, each=False, steps=1.0,
         seed=0)  # fmt: skip
@example(shape=(1, 3, 41, 43), norm="l2", order="box_then_ball", types=(torch.float32,) * 3,
         forms=("channels_last", "plain", "strided", "plain"), copies=1, noisy=True, each=False, steps=1.0,
         seed=0)  # fmt: skip
@example(shape=(1, 3, 41, 43), norm="l2", order="nearest", types=(torch.float32, torch.bfloat16, torch.float32),
         forms=("channels_last", "plain", "strided", "plain"), copies=1, noisy=True, each=True, steps=100.0,
         seed=0)  # fmt: skip
@example(shape=(1, 3, 73, 74), norm="l1", order="ball_then_box", types=(torch.float32,) * 3,
         forms=("plain", "channels_last", "plain", "channels_last"), copies=1, noisy=True, each=False, steps=1.0,
         seed=0)  # fmt: skip
def test_kernels_are_as_good_as_the_reference(
    device: str,
    shape: tuple[int, ...],
    norm: Any,
    order: Any,
    types: tuple[torch.dtype, ...],
    forms: tuple[str, ...],
    copies: int,
    noisy: bool,
    each: bool,
    steps: float,
    seed: int,
) -> None:
    if norm == "l1" and order == "nearest":
        order = "ball_then_box"
    torch.manual_seed(seed)
    adv, grad, clean = example_images(shape, norm, torch.float32, device)
    adv, grad, clean = (x.to(kind) for x, kind in zip((adv, grad, clean), types, strict=True))
    adv, grad, clean = (shaped(x, form) for x, form in zip((adv, grad, clean), forms[:3], strict=True))
    eps: Any = EPS[norm]
    if each:
        eps = eps * torch.linspace(0, 2, shape[0], device=device)
    step = steps * eps
    options: dict[str, Any] = {"step_size": step, "eps": eps, "norm": norm, "order": order}
    before = [x.clone() for x in (adv, grad, clean)]
    expected = formula(adv, grad, clean, step, eps, norm, order)
    errors, results, seen = {}, {}, {}
    many = (copies * shape[0], *shape[1:])
    noise = shaped(torch.randn(many, device=device), forms[1]) if copies and noisy else None
    for kernel in ("triton", "reference"):
        inputs: dict[str, Any] = {"kernel": kernel}
        if copies:
            inputs["model_input"] = seen[kernel] = shaped(torch.empty(many, dtype=types[1], device=device), forms[3])
        results[kernel] = new = pgd_step(adv, grad, clean, **options, noise=noise, **inputs)
        assert (new.shape, new.dtype) == (adv.shape, adv.dtype)
        assert_in_ball_and_box(new, clean, eps, norm)
        errors[kernel] = (new.cpu().double() - expected).square().mean().sqrt().item() if new.numel() else 0.0
    # A quarter of the largest rounding of adv' itself: about its mean square for pixels spread over [0, 1].
    floor = HALF_ULP[adv.dtype] / 4
    assert errors["triton"] <= 2 * errors["reference"] + floor
    if copies:
        kept = results["triton"].float().repeat_interleave(copies, 0)
        assert torch.equal(seen["triton"], (kept if noise is None else kept + noise).to(types[1]))
        kept = results["reference"].float().repeat_interleave(copies, 0)
        assert torch.equal(seen["reference"], (kept if noise is None else kept + noise).to(types[1]))
    for name, old, tensor in zip(("adv", "grad", "clean"), before, (adv, grad, clean), strict=True):
        assert torch.equal(old, tensor), f"{name} was modified"


@pytest.mark.parametrize(("norm", "order"), MODES)
def test_linf_is_exact_and_others_agree_to_roundings(device: str, norm: Any, order: Any) -> None:
    torch.manual_seed(0)
    adv, grad, clean = example_images((4, 3, 16, 16), norm, torch.float32, device)
    both = [pgd_step(adv, grad, clean, step_size=0.3 * EPS[norm], eps=EPS[norm], norm=norm, order=order, kernel=kernel)
            for kernel in ("triton", "reference")]  # fmt: skip
    assert (both[0] - both[1]).abs().max() <= (0 if norm == "linf" else 2**-23)


@pytest.mark.parametrize("kernel", ["triton", "reference"])
@pytest.mark.parametrize(("norm", "order", "values"), SIZES)
def test_scale_of_the_gradient_is_immaterial(device: str, norm: Any, values: int, order: Any, kernel: Any) -> None:
    """Squares of 1e-30 vanish in float32, those of 1e30 overflow. (torchattacks' 1e-10 is part of its rule.)"""
    torch.manual_seed(0)
    adv, grad, clean = example_images((2, values), norm, torch.float32, device, scale=1.0)
    options: dict[str, Any] = {"step_size": EPS[norm], "eps": EPS[norm], "norm": norm, "order": order}
    expected = formula(adv, grad, clean, EPS[norm], EPS[norm], norm, order)
    scales = (1e30, 1e-36) if order != "ball_then_box" or norm != "l2" else (1e30, 1e-4)
    for scale in scales:
        new = pgd_step(adv, grad * scale, clean, **options, kernel=kernel)
        assert (new.cpu() - expected).abs().max() <= 1e-6, scale


@pytest.mark.parametrize(("norm", "order", "values"), SIZES)
def test_nan_and_infinity_stay_in_their_sample(device: str, norm: Any, values: int, order: Any) -> None:
    torch.manual_seed(0)
    adv, grad, clean = example_images((6, values), norm, torch.float32, device)
    grad[1, 3], grad[2, 4], grad[3, 5], grad[4, 5] = float("nan"), float("inf"), float("-inf"), 0
    clean[5, 1] = float("nan")
    options: dict[str, Any] = {"step_size": EPS[norm], "eps": EPS[norm], "norm": norm, "order": order}
    new, reference = (pgd_step(adv, grad, clean, **options, kernel=kernel) for kernel in ("triton", "reference"))
    assert torch.equal(new.isnan(), reference.isnan())
    expected = torch.zeros_like(new, dtype=torch.bool)
    if norm == "linf":
        expected[1, 3] = expected[5, 1] = True
    else:
        expected[1:4] = expected[5] = True
    assert torch.equal(new.isnan(), expected)
    assert torch.allclose(new, reference, rtol=0, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("kernel", ["triton", "reference"])
@pytest.mark.parametrize("values", [12, LONG])
def test_zero_gradients(device: str, values: int, kernel: Any) -> None:
    torch.manual_seed(0)
    adv, grad, clean = example_images((3, values), "l2", torch.float32, device)
    grad[1] = 0
    grad[1, 2] = -0.0
    direction = torch.randn(3, values, device=device).to(torch.bfloat16)
    orders: tuple[Any, ...] = ORDERS if values == LONG else (*ORDERS, "nearest")
    for order in orders:
        still = pgd_step(adv, grad, clean, step_size=0.1, eps=9.0, norm="l2", order=order, kernel=kernel)
        assert torch.equal(still[1], clean[1] + (adv[1] - clean[1]))
        assert not torch.equal(still[0], adv[0])
    options: dict[str, Any] = {"step_size": 0.1, "norm": "l2", "kernel": kernel}
    for eps in (1e3, 0.4):
        drawn = pgd_step(adv, grad, clean, **options, eps=eps, zero_direction=direction)
        plain = pgd_step(adv, grad, clean, **options, eps=eps)
        assert torch.equal(drawn[[0, 2]], plain[[0, 2]])
        delta = (adv[1].double() + 0.1 * direction[1].double()).clamp(0, 1) - clean[1].double()
        delta *= min(1, eps / (delta.norm() + 1e-7))
        assert (drawn[1] - clean[1] - delta).abs().max() <= 1e-6


@pytest.mark.parametrize("kernel", ["triton", "reference"])
@pytest.mark.parametrize("values", [12, LONG])
def test_nan_among_zeros_is_no_zero_gradient(device: str, values: int, kernel: Any) -> None:
    torch.manual_seed(0)
    adv, grad, clean = example_images((3, values), "l2", torch.float32, device)
    grad[:2] = 0
    grad[0, 3] = grad[1] = float("nan")
    for zero in (None, torch.randn(3, values, device=device)):
        new = pgd_step(adv, grad, clean, step_size=0.1, eps=0.5, norm="l2", zero_direction=zero, kernel=kernel)
        assert new[:2].isnan().all()
        assert new[2].isfinite().all()


@pytest.mark.parametrize("kernel", ["triton", "reference"])
@pytest.mark.parametrize(("norm", "order", "values"), SIZES)
def test_no_radius_gives_clean_and_one_radius_per_sample(
    device: str, norm: Any, values: int, order: Any, kernel: Any
) -> None:
    torch.manual_seed(0)
    adv, grad, clean = example_images((3, values), norm, torch.float32, device)
    step = torch.tensor([0.1, 0.0, -0.2], device=device)
    for eps in (0, torch.tensor([0.0, 0.3, 0.0], device=device)):
        new = pgd_step(adv, grad, clean, step_size=step, eps=eps, norm=norm, order=order, kernel=kernel)
        assert torch.equal(new[[0, 2]], clean[[0, 2]])
        # Where clean is 0 nothing absorbs what a projection leaves behind.
        black = pgd_step(adv, grad, 0 * clean, step_size=step, eps=eps, norm=norm, order=order, kernel=kernel)
        assert torch.equal(black[[0, 2]], 0 * clean[[0, 2]])
    same = pgd_step(clean, grad, clean, step_size=0.1, eps=0.0, norm=norm, order=order, kernel=kernel)
    assert torch.equal(same, clean)


# --- Where results go -------------------------------------------------------------------------------------------------

SHAPE = {"linf": (2, 3, 21, 17), "l2": (2, 3, 8, 8), "l1": (2, 3, 8, 8)}
LONG_SHAPE = (1, 3, 77, 73)
PATHS = [
    *[(*mode, SHAPE[mode[0]]) for mode in MODES if mode != ("linf", "nearest")],  # which is ball_then_box
    *[("l2", order, LONG_SHAPE) for order in ORDERS],
]


@pytest.mark.parametrize("kernel", ["triton", "reference"])
@pytest.mark.parametrize(("norm", "order", "shape"), PATHS)
def test_in_place_and_other_outputs(device: str, norm: Any, shape: tuple[int, ...], order: Any, kernel: Any) -> None:
    torch.manual_seed(0)
    adv, grad, clean = example_images(shape, norm, torch.float32, device)
    options: dict[str, Any] = {"step_size": EPS[norm], "eps": EPS[norm], "norm": norm, "order": order, "kernel": kernel}
    fresh = pgd_step(adv, grad, clean, **options)
    for form in ("plain", "channels_last"):
        out = shaped(torch.full_like(adv, 7), form)
        assert pgd_step(adv, grad, clean, **options, out=out) is out
        assert torch.equal(out, fresh)
        state = shaped(adv.clone(), form).requires_grad_()
        assert pgd_step(state, grad, clean, **options, out=state) is state
        # In the other memory format the sums over long samples are made in another order.
        assert (state - fresh).abs().max() <= (0 if form == "plain" or norm == "linf" else 2**-23)
        kept = pgd_step(shaped(adv, form), grad, clean, **options)
        assert kept.stride() == shaped(adv, form).stride()
        assert not kept.requires_grad
        alias = shaped(adv.clone(), form)
        pgd_step(alias, grad, clean, **options, out=alias.detach())
        assert torch.equal(alias, state)


@pytest.mark.parametrize(("norm", "order", "shape"), PATHS)
def test_repeats_bit_for_bit(device: str, norm: Any, shape: tuple[int, ...], order: Any) -> None:
    torch.manual_seed(0)
    adv, grad, clean = example_images(shape, norm, torch.float32, device)
    options: dict[str, Any] = {"step_size": 0.2, "eps": EPS[norm], "norm": norm, "order": order, "kernel": "triton"}
    first, second = (pgd_step(adv, grad, clean, **options) for _ in range(2))
    assert torch.equal(first, second)
    # A sample does not depend on the others in its batch.
    assert torch.equal(pgd_step(adv[:1], grad[:1], clean[:1], **options), first[:1])


@pytest.mark.parametrize(("norm", "shape"), [("linf", (2, 3, 6, 6)), ("l2", (2, 3, 6, 6))])
def test_expanded_inputs(device: str, norm: Any, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    adv, grad, clean = (x[:1].expand(shape) for x in example_images(shape, norm, torch.float32, device))
    new = pgd_step(adv, grad, clean, step_size=0.1, eps=EPS[norm], norm=norm, kernel="triton")
    full = pgd_step(*(x.contiguous() for x in (adv, grad, clean)), step_size=0.1, eps=EPS[norm], norm=norm)
    assert (new - full).abs().max() <= 2**-23


@pytest.mark.parametrize("norm", NORMS)
def test_numbers_of_any_origin(device: str, norm: Any) -> None:
    """One number for all: Python's, NumPy's, or a tensor's, expanded or every other entry of a longer one."""
    torch.manual_seed(0)
    adv, grad, clean = example_images((3, 3, 6, 6), norm, torch.float32, device)
    apart = torch.tensor([0.5, 9.0] * 3, device=device)[::2]
    for kernel in ("triton", "reference"):
        options: dict[str, Any] = {"norm": norm, "kernel": kernel}
        expected = pgd_step(adv, grad, clean, step_size=0.5, eps=0.5, **options)
        values: tuple[Any, ...] = np.float32(0.5), np.float64(0.5), apart[:1].expand(3), apart
        for value in values:
            new = pgd_step(adv, grad, clean, step_size=value, eps=value, **options)
            assert torch.equal(new, expected), value
        whole = [pgd_step(adv, grad, clean, step_size=value, eps=value, **options) for value in (1, 1.0)]
        assert torch.equal(*whole)


# --- Compilers --------------------------------------------------------------------------------------------------------


# One operation to PyTorch, whatever its norm and order: each kernel once, the long one both ways.
@pytest.mark.parametrize(
    ("norm", "order", "shape", "in_place"),
    [
        ("linf", "box_then_ball", SHAPE["linf"], True),
        ("l2", "box_then_ball", SHAPE["l2"], False),
        ("l1", "box_then_ball", SHAPE["l1"], False),
        ("l2", "nearest", SHAPE["l2"], True),
        ("l2", "box_then_ball", LONG_SHAPE, False),
        ("l2", "box_then_ball", LONG_SHAPE, True),
    ],
)
def test_opcheck(device: str, norm: str, order: str, shape: tuple[int, ...], in_place: bool) -> None:
    torch.manual_seed(0)
    adv, grad, clean = example_images(shape, norm, torch.float32, device)
    noise = torch.randn((2 * shape[0], *shape[1:]), device=device)
    each = torch.full(shape[:1], 0.1, device=device)
    arguments = (adv if in_place else torch.empty_like(adv), None if in_place else adv, grad, clean)
    for more in ((torch.empty_like(noise), noise, None, 0.1, None, 0.5, None), (None, None, None, 0, each, 0, each)):
        torch.library.opcheck(module._pgd_step, (*arguments, *more, norm, order))


def steps(adv: Tensor, clean: Tensor, weight: Tensor, out: Tensor | None, options: dict[str, Any]) -> Tensor:
    """Two steps with a gradient and ordinary operations between them."""
    new = adv
    for _ in range(2):
        new = pgd_step(new, new * weight + 0.1, clean, **options, out=out)
    return new * 2


# Each kernel, norm, order and memory format, which the compiler sees as constants of one operation.
@pytest.mark.parametrize(
    ("norm", "order", "shape", "form"),
    [
        ("linf", "box_then_ball", SHAPE["linf"], "channels_last"),
        ("l1", "ball_then_box", SHAPE["l1"], "plain"),
        ("l2", "nearest", SHAPE["l2"], "plain"),
        ("l2", "box_then_ball", LONG_SHAPE, "channels_last"),
        ("l2", "ball_then_box", LONG_SHAPE, "plain"),
    ],
)
def test_compile(device: str, norm: str, shape: tuple[int, ...], form: str, order: str) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    adv, weight, clean = (shaped(x, form) for x in example_images(shape, norm, torch.float32, device, 1.0))
    options = {"step_size": 0.1, "eps": EPS[norm], "norm": norm, "order": order, "kernel": "triton"}
    expected = steps(adv, clean, weight, None, options)
    compiled: Callable[..., Tensor] = torch.compile(steps, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(adv, clean, weight, None, options), expected)
    state = adv.clone()
    assert torch.equal(compiled(state, clean, weight, state, options), expected)
    assert torch.equal(state * 2, expected)


def test_inductor(device: str) -> None:
    """It decides by itself which outputs may be written in place."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    adv, grad, clean = example_images((2, 3, 6, 6), "l2", torch.float32, device)
    options: dict[str, Any] = {"step_size": 0.1, "eps": 0.3, "norm": "l2", "kernel": "triton"}

    def both(adv: Tensor, out: Tensor | None) -> tuple[Tensor, Tensor]:
        first = pgd_step(adv, grad, clean, **options)
        return first, pgd_step(pgd_step(adv, grad, clean, **options, out=out), grad, clean, **options)

    expected = both(adv, None)
    compiled = torch.compile(both, fullgraph=True)
    assert all(map(torch.equal, compiled(adv, None), expected))
    state = adv.clone()
    assert all(map(torch.equal, compiled(state, state), expected))
    assert torch.equal(state, expected[0])


@pytest.mark.parametrize("order", ["box_then_ball", "nearest"])
def test_compile_reference_and_model_input(device: str, order: Any) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    adv, grad, clean = example_images((2, 3, 4, 4), "l2", torch.float32, device)
    noise = torch.randn(4, 3, 4, 4, device=device)
    eps = torch.tensor([0.1, 0.2], device=device)

    def step(adv: Tensor, model_input: Tensor, kernel: Any) -> Tensor:
        pgd_step(adv, grad, clean, step_size=0.1, eps=eps, norm="l2", order=order, noise=noise, out=adv,
                 model_input=model_input, kernel=kernel)  # fmt: skip
        return model_input * 2

    for kernel in ("triton", "reference"):
        states = [adv.clone() for _ in range(2)]
        seen = [torch.zeros(4, 3, 4, 4, device=device, dtype=torch.bfloat16) for _ in range(2)]
        eager = step(states[0], seen[0], kernel)
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(states[1], seen[1], kernel)
        assert torch.equal(eager, compiled)
        assert torch.equal(*states)
        assert torch.equal(*seen)


# --- Refused ----------------------------------------------------------------------------------------------------------


def test_refused(device: str) -> None:
    x = torch.rand(2, 3, 4, 4, device=device)
    good: dict[str, Any] = {"adv": x, "grad": x.clone(), "clean": x.clone(), "step_size": 0.1, "eps": 0.3, "norm": "l2"}
    buffer = torch.rand(3, 3, 4, 4, device=device)
    six = torch.rand(6, 3, 4, 4, device=device)
    for change, message in (
        ({"grad": x[:1]}, r"grad \(1, 3, 4, 4\) does not fit adv \(2, 3, 4, 4\)"),
        ({"clean": x.flatten(1)}, r"clean \(2, 48\) does not fit adv \(2, 3, 4, 4\)"),
        ({"adv": x[0, 0, 0, 0]}, r"adv \(\) has no samples"),
        ({"adv": (x * 255).byte()}, r"adv \(2, 3, 4, 4\) has type torch.uint8"),
        ({"grad": x.long()}, r"grad \(2, 3, 4, 4\) has type torch.int64"),
        ({"out": x.to(torch.bfloat16)}, r"out \(2, 3, 4, 4\) has type torch.bfloat16"),
        ({"eps": -1e-3}, "eps must be a number >= 0, not -0.001"),
        ({"eps": float("nan")}, "eps must be a number >= 0, not nan"),
        ({"step_size": float("nan")}, "step_size must be a finite number, not nan"),
        ({"step_size": float("-inf")}, "step_size must be a finite number, not -inf"),
        ({"eps": torch.ones(3, device=device)}, r"eps \(3,\) torch.float32 must be \[2\] float32"),
        ({"step_size": torch.ones(2, device=device).long()}, r"step_size \(2,\) torch.int64 must be \[2\] float32"),
        ({"norm": "L2"}, "norm must be"),
        ({"order": "ball"}, "order"),
        ({"noise": six}, r"noise \(6, 3, 4, 4\) needs a model_input of its shape, not None"),
        ({"noise": six, "model_input": x.clone()}, r"noise \(6, 3, 4, 4\) needs .* not \(2, 3, 4, 4\)"),
        ({"model_input": buffer}, r"model_input \(3, 3, 4, 4\) does not fit adv \(2, 3, 4, 4\)"),
        ({"model_input": buffer[:0]}, r"model_input \(0, 3, 4, 4\) does not fit adv \(2, 3, 4, 4\)"),
        ({"zero_direction": x, "order": "ball_then_box"}, "zero_direction .*: only for l2 in order box_then_ball"),
        ({"zero_direction": x, "norm": "linf"}, "zero_direction .*: only for l2"),
        ({"zero_direction": x, "order": "nearest"}, "zero_direction .*: only for l2 in order box_then_ball"),
        ({"norm": "l1", "order": "nearest"}, "order nearest is for l2 and linf"),
        ({"adv": buffer[:2], "out": buffer[1:]}, r"out \(2, 3, 4, 4\) overlaps adv \(2, 3, 4, 4\) in memory"),
        ({"model_input": x}, r"model_input \(2, 3, 4, 4\) overlaps adv \(2, 3, 4, 4\)"),
        ({"out": six[:2], "model_input": six}, r"model_input \(6, 3, 4, 4\) overlaps out \(2, 3, 4, 4\)"),
        ({"out": x[:1].expand(2, 3, 4, 4)}, r"out \(2, 3, 4, 4\) is neither contiguous nor channels-last"),
        ({"model_input": six.mT}, r"model_input \(6, 3, 4, 4\) is neither contiguous nor channels-last"),
        ({"kernel": "cuda"}, "kernel must be"),
        ({"adv": x.double(), "kernel": "triton"}, "float64"),
        ({"grad": x.to("meta")}, "several devices"),
    ):
        with pytest.raises(ValueError, match=message):
            pgd_step(**{**good, **change})
    clean = good["clean"]
    with pytest.raises(ValueError, match=r"out \(2, 3, 4, 4\) overlaps clean"):
        pgd_step(**good, out=clean)
    both = {**good, "adv": clean}
    with pytest.raises(ValueError, match=r"out \(2, 3, 4, 4\) overlaps clean"):
        pgd_step(**both, out=clean)


@pytest.mark.parametrize(("norm", "order"), [("l1", "box_then_ball"), ("l2", "nearest")])
def test_long_rows_without_a_kernel_run_the_reference(
    device: str, norm: Any, order: Any, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    adv, grad, clean = example_images((2, LONG), norm, torch.float32, device)
    options: dict[str, Any] = {"step_size": 1.0, "eps": 2.0, "norm": norm, "order": order}
    with caplog.at_level(logging.INFO, "shiftlens"):
        new = pgd_step(adv, grad, clean, **options)
    assert f"{'l1' if norm == 'l1' else 'nearest'}, samples above 16384 values" in caplog.text
    assert (new.cpu() - formula(adv, grad, clean, 1.0, 2.0, norm, order)).abs().max() <= 1e-6
    with pytest.raises(ValueError, match=rf"kernel='triton' cannot run: adv \(2, {LONG}\)"):
        pgd_step(adv, grad, clean, **options, kernel="triton")
