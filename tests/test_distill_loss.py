"""The distillation loss against formulas in float64: the reference with its gradients, and the kernels beside it.

Without a GPU the kernels run in Triton's interpreter. Errors are root mean squares over a tensor; the kernels' may be
twice what the reference makes in the same types, plus a unit in the last place of the features' type and four of
float32, in which a few numbers of the reference can be right by luck. Where large terms cancel, those four are of the
terms: of 1 in 1 - cosine, of what the gradients of cosine and kl are with their normalisers held constant.
"""

import contextlib
import itertools
import multiprocessing
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import distill_loss
from kernels.distill_loss import extra_bytes, projected_distill_loss, token_gram

KINDS = ("mse", "smooth_l1", "cosine", "kl")
NAMES = ("loss", "features", "weight", "bias")

# NumPy's remarks on infinities that kernels compute on purpose.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


# ----------------------------------------------------------------------------------------------------------------------
# Reference
# ----------------------------------------------------------------------------------------------------------------------


def double(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def exact_rows(
    p: Tensor, t: Tensor, kind: str, temperature: float = 1.0, beta: float = 1.0, held: bool = False
) -> Tensor:
    """Losses of rows as a textbook writes them; `held`: norms and partition functions count as constants."""
    d = p - t
    if kind == "mse":
        return (d**2).mean(-1)
    if kind == "smooth_l1":
        return torch.where(d.abs() < beta, d**2 / (2 * beta), d.abs() - beta / 2).mean(-1)
    if kind == "cosine":
        norm = p.norm(dim=-1).clamp_min(1e-8)
        return 1 - (p * t).sum(-1) / ((norm.detach() if held else norm) * t.norm(dim=-1).clamp_min(1e-8))
    p, t = p / temperature, t / temperature
    total = p.logsumexp(-1, keepdim=True)
    p, t = p - (total.detach() if held else total), t - t.logsumexp(-1, keepdim=True)
    return temperature**2 * (t.exp() * (t - p)).sum(-1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("projected", [True, False])
@pytest.mark.parametrize("leading", [(5,), (2, 3), (1,), ()])
def test_gradcheck(kind: str, projected: bool, leading: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    features = double(*leading, 7 if projected else 4)
    weight, bias = (double(4, 7), double(4)) if projected else (None, None)
    target = torch.randn(*leading, 4, dtype=torch.float64)
    inputs = [x for x in (features, weight, bias) if x is not None]
    for reduction, row_weight in (("mean", None), ("mean", torch.rand(leading)), ("none", torch.rand(leading))):

        def loss(features: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
            options: dict[str, Any] = {"kind": kind, "reduction": reduction, "row_weight": row_weight}  # noqa: B023
            return projected_distill_loss(features, weight, bias, target, **options, temperature=2.0, beta=0.5)

        assert torch.autograd.gradcheck(loss, inputs)
        assert torch.autograd.gradgradcheck(loss, inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_reference_against_formulas(kind: str) -> None:
    torch.manual_seed(0)
    features, weight, bias = double(2, 5, 7), double(4, 7), double(4)
    target, row_weight = torch.randn(2, 5, 3, dtype=torch.float64), torch.rand(2, 5)
    head = {"target_weight": double(4, 3), "target_bias": double(4)} if kind == "kl" else {}
    if not head:
        target = torch.randn(2, 5, 4, dtype=torch.float64)
    teacher = target @ head["target_weight"].T + head["target_bias"] if head else target
    rows = exact_rows(features @ weight.T + bias, teacher, kind, 3.0, 0.25)
    options: dict[str, Any] = {"kind": kind, "temperature": 3.0, "beta": 0.25, **head}
    run = lambda **more: projected_distill_loss(features, weight, bias, target, **options, **more)  # noqa: E731
    torch.testing.assert_close(run(), rows.mean())
    torch.testing.assert_close(run(reduction="none"), rows)
    torch.testing.assert_close(run(reduction="none", row_weight=row_weight), row_weight * rows)
    mean = (row_weight * rows).sum() / row_weight.sum()
    torch.testing.assert_close(run(row_weight=row_weight), mean)
    torch.testing.assert_close(run(row_weight=row_weight > 0.5), rows[row_weight > 0.5].mean())
    run().backward()
    assert features.grad is not None
    assert all(x.grad is None for x in head.values())


def test_plain_mse_is_that_of_torch_bit_for_bit() -> None:
    features, target = torch.randn(7, 5), torch.randn(7, 5)
    expected = torch.nn.functional.mse_loss(features, target)
    assert torch.equal(projected_distill_loss(features, None, None, target), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_compared_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    features, target = torch.randn(64, 32).to(dtype), torch.randn(64, 32).to(dtype)
    expected = (features.double() - target.double()).square().mean()
    loss = projected_distill_loss(features, None, None, target)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_lower_the_precision_of_distances(dtype: torch.dtype) -> None:
    """2048 channels of value 8: their product 131072 is beyond fp16, the Gram entry 2896 is not."""
    tokens = torch.full((1, 2, 2048), 8.0)
    features, target = torch.randn(8, 32), torch.randn(8, 32)
    with torch.autocast("cpu", dtype):
        gram = token_gram(tokens.to(dtype))
        losses = [projected_distill_loss(features, None, None, target, kind) for kind in ("mse", "cosine")]
    assert gram.dtype == torch.float32
    assert gram[0, 0, 1].item() == pytest.approx(64 * 2048**0.5, rel=1e-5)
    for kind, loss in zip(("mse", "cosine"), losses, strict=True):
        assert loss.item() == projected_distill_loss(features, None, None, target, kind).item()  # type: ignore[arg-type]


def test_no_gradient_reaches_the_target() -> None:
    features, target = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    projected_distill_loss(features, None, None, target).backward()
    assert features.grad is not None
    assert target.grad is None


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"\(3, 4\).*\(3, 5\)"):
        projected_distill_loss(torch.ones(3, 4), None, None, torch.ones(3, 5))
    with pytest.raises(ValueError, match=r"weight \(5, 3\)"):
        projected_distill_loss(torch.ones(3, 4), torch.ones(5, 3), None, torch.ones(3, 5))
    with pytest.raises(ValueError, match="bias needs a weight"):
        projected_distill_loss(torch.ones(3, 4), None, torch.ones(4), torch.ones(3, 4))
    run: Any = projected_distill_loss
    ok = (torch.ones(3, 4), torch.ones(5, 4), torch.ones(5), torch.ones(3, 5))
    with pytest.raises(ValueError, match=r"bias \(4,\).*weight \(5, 4\)"):
        run(*ok[:2], torch.ones(4), ok[3])
    with pytest.raises(ValueError, match=r"row_weight \(4,\).*\(3, 4\)"):
        run(*ok, row_weight=torch.ones(4))
    with pytest.raises(ValueError, match="row_weight on meta, features on cpu"):
        run(*ok, row_weight=torch.ones(3, device="meta"))
    with pytest.raises(ValueError, match=r"\(0,\).*at least 1"):
        run(torch.ones(0), None, None, torch.ones(0))
    with pytest.raises(ValueError, match=r"target_weight \(5, 7\)"):
        run(*ok, "kl", target_weight=torch.ones(5, 7))
    with pytest.raises(ValueError, match="target_bias needs a target_weight"):
        run(*ok, "kl", target_bias=torch.ones(5))
    with pytest.raises(ValueError, match=r"weight \(5, 4\).*\(3, 6\)"):
        run(*ok[:3], torch.ones(3, 6), "kl", target_weight=torch.ones(7, 6))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"kind": "l1"}, "kind must be one of"),
        ({"reduction": "sum"}, "reduction must be"),
        ({"kind": "kl", "temperature": 0.0}, "temperature must be positive"),
        ({"kind": "smooth_l1", "beta": float("nan")}, "beta must be positive"),
        ({"target_weight": torch.ones(4, 4)}, "target_weight is for kind 'kl'"),
        ({"kernel": "cuda"}, "kernel must be"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        projected_distill_loss(torch.ones(3, 4), None, None, torch.ones(3, 4), **options)


def test_kernels_refuse_float64() -> None:
    with pytest.raises(ValueError, match="float64"):
        projected_distill_loss(double(3, 4), None, None, torch.ones(3, 4), kernel="triton")


def test_token_gram() -> None:
    tokens = torch.randn(2, 5, 9, dtype=torch.float64)
    expected = torch.einsum("nie,nje->nij", tokens, tokens) / 3
    assert torch.allclose(token_gram(tokens), expected, rtol=0, atol=1e-12)


# ----------------------------------------------------------------------------------------------------------------------
# Kernels
# ----------------------------------------------------------------------------------------------------------------------


def make(
    rows: tuple[int, ...], inner: int, width: int, dtype: torch.dtype, device: str, *, projected: bool = True,
    seed: int = 0, magnitude: float = 1.0,
) -> list[Any]:  # fmt: skip
    """Features, weight, bias and target."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    features, target = magnitude * draw(*rows, inner), magnitude * draw(*rows, width)
    weight, bias = (draw(width, inner) * inner**-0.5, draw(width)) if projected else (None, None)
    return [None if x is None else x.to(device, dtype) for x in (features, weight, bias, target)]


def gradients(tensors: list[Any], upstream: Tensor | float = 1.0, **options: Any) -> dict[str, Tensor]:
    """Loss and the gradients of what has one, by name."""
    *inputs, target = tensors
    inputs = [None if x is None else x.detach().requires_grad_() for x in inputs]
    features, weight, bias = inputs
    loss = projected_distill_loss(features, weight, bias, target, **options)
    present = [x for x in inputs if x is not None]
    found = torch.autograd.grad(loss, present, torch.as_tensor(upstream, device=loss.device).to(loss).expand_as(loss))
    return {"loss": loss.detach(), **dict(zip(NAMES[1 : 1 + len(found)], found, strict=True))}


def exact_gradients(
    tensors: list[Any], upstream: Tensor | float = 1.0, held: bool = False, **options: Any
) -> dict[str, Tensor]:
    """The same from the textbook in float64."""
    doubled = [None if x is None else x.detach().double().requires_grad_() for x in tensors]
    features, weight, bias, target = doubled
    assert features is not None
    assert target is not None
    projected = features if weight is None else features @ weight.T
    projected = projected if bias is None else projected + bias
    if (head := options.get("target_weight")) is not None:
        target = target @ head.double().T
        target = target if options.get("target_bias") is None else target + options["target_bias"].double()
    rows = exact_rows(
        projected, target, options["kind"], options.get("temperature", 1.0), options.get("beta", 1.0), held
    )
    row_weight = options.get("row_weight")
    w = torch.ones_like(rows) if row_weight is None else row_weight.double()
    loss = rows * w if options.get("reduction") == "none" else (rows * w).sum() / (w.sum() if w.sum() > 0 else 1)
    present = [x for x in doubled[:3] if x is not None]
    found = torch.autograd.grad(loss, present, torch.as_tensor(upstream, device=loss.device).to(loss).expand_as(loss))
    return {"loss": loss.detach(), **dict(zip(NAMES[1 : 1 + len(found)], found, strict=True))}


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


def check(tensors: list[Any], upstream: Tensor | float = 1.0, **options: Any) -> dict[str, Tensor]:
    """Kernels against the textbook, with the reference's error as the measure."""
    before = [None if x is None else x.clone() for x in tensors]
    ours = gradients(tensors, upstream, kernel="triton", **options)
    theirs = gradients(tensors, upstream, kernel="reference", **options)
    exact = exact_gradients(tensors, upstream, **options)
    held = exact_gradients(tensors, upstream, held=True, **options)
    eps = torch.finfo(tensors[0].dtype).eps
    for name, expected in exact.items():
        found, other = ours[name], theirs[name]
        assert found.dtype == other.dtype, name
        assert found.shape == expected.shape, name
        error, allowed = rms(found - expected), rms(other - expected)
        unit = float(options["kind"] in ("cosine", "kl")) if name == "loss" else rms(held[name])
        floor = eps * rms(expected) + 4 * torch.finfo(torch.float32).eps * max(unit, rms(expected))
        assert error <= 2 * allowed + floor, f"{name}: {error:.2e}, reference {allowed:.2e}, floor {floor:.2e}"
    for x, y in zip(tensors, before, strict=True):
        assert x is None or y is None or torch.equal(x, y), "an input was modified"
    return ours


def layout(x: Tensor, how: str) -> Tensor:
    """The same values in another place."""
    if how == "strided rows":
        return torch.cat([x, x], -1)[..., : x.shape[-1]]
    if how == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if how == "unaligned":
        return torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)
    return x[:1].expand(x.shape) if how == "expanded" else x


@settings(max_examples=60)
@given(
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    rows=st.sampled_from([(1,), (3,), (67,), (2, 5), (3, 1, 4), ()]),
    inner=st.sampled_from([7, 16, 48, 131]),
    width=st.sampled_from([5, 13, 16, 80, 101]),
    projection=st.sampled_from(["none", "weight", "both"]),
    weights=st.sampled_from([None, "mask", "weights"]),
    reduction=st.sampled_from(["mean", "none"]),
    how=st.sampled_from(["contiguous", "strided rows", "transposed", "unaligned", "expanded"]),
    seed=st.integers(0, 3),
)
def test_kernels_against_formulas(
    device: str, kind: str, dtype: torch.dtype, rows: tuple[int, ...], inner: int, width: int, projection: str,
    weights: str | None, reduction: str, how: str, seed: int,
) -> None:  # fmt: skip
    projected = projection != "none"
    tensors = make(rows, inner if projected else width, width, dtype, device, projected=projected, seed=seed)
    if projection == "weight":
        tensors[2] = None
    # A weight of equal rows would make exact zeros of sums: nothing to measure an error by.
    ways = (how, "contiguous" if how == "expanded" else how, "contiguous", how)
    tensors = [x if x is None or x.dim() < 2 else layout(x, way) for x, way in zip(tensors, ways, strict=True)]
    row_weight = torch.rand(rows, generator=torch.Generator().manual_seed(seed)).to(device) if weights else None
    if weights == "mask" and row_weight is not None:
        row_weight = row_weight > 0.3
    upstream = torch.randn(rows, generator=torch.Generator().manual_seed(seed)) if reduction == "none" else 1.7
    options = {"kind": kind, "row_weight": row_weight, "reduction": reduction, "temperature": 2.0, "beta": 0.5}
    check(tensors, upstream.to(device) if isinstance(upstream, Tensor) else upstream, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_large_tiles_and_rows_of_several_blocks(device: str, kind: str, dtype: torch.dtype) -> None:
    check(make((300,), 80, 272, dtype, device), 3.0, kind=kind)
    if device == "cuda":  # enough for the large tiles of a real chip
        check(make((20_000,), 80, 272, dtype, device), 3.0, kind=kind)
    check(make((3,), 5003, 5003, dtype, device, projected=False), kind=kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_change_nothing(device: str, kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = make((300,), 32, 48, dtype, device)
    row_weight = torch.rand(300, generator=torch.Generator().manual_seed(0)).to(device)
    for reduction, weights in (("mean", None), ("mean", row_weight), ("none", row_weight)):
        options = {"kind": kind, "reduction": reduction, "row_weight": weights}
        whole = check(tensors, 0.7, **options)
        monkeypatch.setattr(distill_loss, "CHUNK_BYTES", 130 * 48 * dtype.itemsize)
        monkeypatch.setattr(distill_loss, "CHUNK_ROWS", 1)
        pieces = check(tensors, 0.7, **options)
        monkeypatch.undo()
        torch.testing.assert_close(pieces["loss"], whole["loss"])
        assert torch.equal(pieces["features"], whole["features"]) or device == "cuda"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_vectors_may_have_gaps(device: str, kind: str, dtype: torch.dtype) -> None:
    tensors = make((20,), 16, 32, dtype, device)
    row_weight = torch.rand(40, generator=torch.Generator().manual_seed(0)).to(device)
    for gaps in (lambda x: x.repeat_interleave(2)[::2], lambda x: x[:1].expand(x.shape)):
        tensors[2] = gaps(tensors[2])
        for reduction in ("mean", "none"):
            check(tensors, 0.7, kind=kind, row_weight=gaps(row_weight)[:20], reduction=reduction)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("projected", [True, False])
def test_teacher_with_its_own_head(device: str, dtype: torch.dtype, projected: bool) -> None:
    tensors = make((2, 9), 16 if projected else 37, 37, dtype, device, projected=projected)
    tensors[3] = make((2, 9), 16, 37, dtype, device, seed=1)[0]
    _, head, bias, _ = make((1,), 16, 37, dtype, device, seed=2)
    for target_bias in (None, bias):
        check(tensors, kind="kl", temperature=4.0, target_weight=head, target_bias=target_bias)
    with torch.autocast(device, torch.bfloat16):
        check(tensors, kind="kl", temperature=4.0, target_weight=head, target_bias=bias)


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_types(device: str, kind: str) -> None:
    """bf16 features, float32 parameters and target: the product is bf16's, gradients have their tensors' types."""
    features, weight, bias, target = make((33,), 16, 32, torch.float32, device)
    assert features is not None
    found = check([features.bfloat16(), weight, bias, target], kind=kind)
    assert [x.dtype for x in found.values()] == [torch.float32, torch.bfloat16, torch.float32, torch.float32]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_lowers_the_projection_alone(device: str, kind: str, dtype: torch.dtype) -> None:
    tensors = make((33,), 16, 32, torch.float32, device)
    lowered = [None if x is None else x.to(dtype) for x in tensors[:3]] + tensors[3:]
    plain = gradients(lowered, kind=kind, kernel="triton")
    exact = exact_gradients(tensors, kind=kind)
    with torch.autocast(device, dtype):
        ours = gradients(tensors, kind=kind, kernel="triton")
        theirs = gradients(tensors, kind=kind, kernel="reference")
        bare = gradients([*lowered[3:], None, None, *tensors[3:]], kind=kind, kernel="triton")
    assert torch.equal(ours["loss"], plain["loss"])
    assert bare["features"].dtype == torch.float32
    for name in NAMES:
        assert ours[name].dtype == torch.float32, name
        error, allowed = rms(ours[name] - exact[name]), rms(theirs[name] - exact[name])
        assert error <= 2 * allowed + torch.finfo(dtype).eps / 2 * rms(exact[name]), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("projected", [True, False])
def test_rows_that_are_not_finite_behave_as_in_the_reference(device: str, kind: str, projected: bool) -> None:
    tensors = make((9,), 16, 16, torch.bfloat16, device, projected=projected)
    for tensor in (tensors[0], tensors[3]):
        for row, value in ((1, "nan"), (3, "inf"), (5, "-inf")):
            tensor[row + (tensor is tensors[3]), 2] = float(value)
    for reduction in ("none", "mean"):
        ours = gradients(tensors, kind=kind, reduction=reduction, kernel="triton")
        theirs = gradients(tensors, kind=kind, reduction=reduction, kernel="reference")
        for name, x in theirs.items():
            if reduction == "none" or name != "loss":
                assert torch.equal(ours[name].isnan(), x.isnan()), f"{name}, {reduction}"
            assert torch.equal(ours[name].isfinite(), x.isfinite()), f"{name}, {reduction}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_large_magnitudes(device: str, kind: str, dtype: torch.dtype) -> None:
    for projected in (True, False):
        check(make((17,), 16, 16, dtype, device, projected=projected, magnitude=3000.0), 1e-3, kind=kind)


def test_cosine_of_rows_without_a_direction(device: str) -> None:
    """Norms below torch's epsilon, and no norm at all."""
    zero, tiny, unit = torch.zeros(3), torch.tensor([1e-9, 0.0, 2e-9]), torch.tensor([1.0, -2.0, 1.0])
    pairs = list(itertools.product((zero, tiny, unit), repeat=2))
    tensors = [torch.stack([p for p, _ in pairs]), None, None, torch.stack([t for _, t in pairs])]
    tensors = [None if x is None else x.to(device) for x in tensors]
    ours, theirs = (
        gradients(tensors, kind="cosine", reduction="none", kernel=kernel) for kernel in ("triton", "reference")
    )
    for name, x in theirs.items():
        torch.testing.assert_close(ours[name], x, rtol=1e-5, atol=1e-5, msg=name)


def test_classes_that_are_masked_out(device: str) -> None:
    """Logits of minus infinity, also for a whole block: no loss, no gradient."""
    tensors = make((4,), 4500, 4500, torch.float32, device, projected=False)
    features, target = tensors[0], tensors[3]
    assert features is not None
    assert target is not None
    for tensor in (features, target):
        tensor[:2, :4200] = -torch.inf
    target[2:, 7] = -torch.inf
    ours = gradients(tensors, kind="kl", kernel="triton")
    theirs = gradients(tensors, kind="kl", kernel="reference")
    assert ours["features"].isfinite().all()
    for name, x in theirs.items():
        torch.testing.assert_close(ours[name], x, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("kernel", ["reference", "triton"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_mean_over_nothing_is_zero(device: str, kind: str, kernel: str) -> None:
    for dtype, projected in itertools.product((torch.float32, torch.bfloat16, torch.float16), (True, False)):
        none = make((0, 3), 16, 16, dtype, device, projected=projected)
        some = make((5,), 16, 16, dtype, device, projected=projected)
        assert gradients(none, kind=kind, reduction="none", kernel=kernel)["loss"].shape == (0, 3)
        for found in (
            gradients(none, kind=kind, kernel=kernel),
            gradients(none, kind=kind, kernel=kernel, row_weight=torch.ones(0, 3, device=device)),
            gradients(some, kind=kind, kernel=kernel, row_weight=torch.zeros(5, device=device)),
        ):
            assert all(not x.any() for x in found.values()), found
            assert found["loss"].shape == ()


@pytest.mark.parametrize("projected", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_fp16_gradients_survive_until_a_grad_scaler_lifts_them(device: str, projected: bool, weighted: bool) -> None:
    """1 / (N D_t) = 1e-6 times differences of 1e-3 is nothing in fp16; 65536 times that is not."""
    if projected:
        tensors = make((1040,), 16, 1024, torch.float16, device)
    else:
        tensors = make((260,), 4096, 4096, torch.float16, device, projected=False)
        tensors[3] = tensors[0] + 1e-3 * tensors[3]
    rows = len(tensors[0])
    row_weight = torch.rand(rows, generator=torch.Generator().manual_seed(0)).to(device) if weighted else None
    found = check(tensors, 65536.0, kind="mse", row_weight=row_weight)
    different = tensors[0] != tensors[3] if not projected else torch.ones_like(tensors[0], dtype=torch.bool)
    assert (found["features"] != 0)[different].double().mean() > 0.98


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_results_repeat_bit_by_bit(device: str, kind: str, reduction: str) -> None:
    tensors = make((150,), 48, 80, torch.bfloat16, device)
    first, second = (gradients(tensors, 0.3, kind=kind, reduction=reduction, kernel="triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in NAMES)


def test_only_what_learns_gets_a_gradient(device: str) -> None:
    for learns in itertools.product((True, False), repeat=3):
        tensors = make((5,), 16, 16, torch.bfloat16, device)
        for x, wanted in zip(tensors, learns, strict=False):
            assert x is not None
            x.requires_grad_(wanted)
        target, row_weight = tensors[3], torch.rand(5, device=device, requires_grad=True)
        assert target is not None
        head = torch.randn(16, 16, device=device, dtype=torch.bfloat16, requires_grad=True)
        for options in ({"kind": "mse"}, {"kind": "kl", "target_weight": head}, {"kind": "cosine"}):
            for reduction in ("mean", "none"):
                more: Any = {**options, "row_weight": row_weight, "reduction": reduction, "kernel": "triton"}
                loss = projected_distill_loss(tensors[0], tensors[1], tensors[2], target.requires_grad_(), **more).sum()
                assert loss.requires_grad == any(learns)
                if any(learns):
                    loss.backward()
        assert [x is not None and x.grad is not None for x in tensors[:3]] == list(learns)
        assert target.grad is row_weight.grad is head.grad is None


def test_a_second_backward_and_a_second_derivative_are_errors(device: str) -> None:
    features, weight, bias, target = make((5,), 16, 16, torch.float32, device)
    assert features is not None
    assert target is not None
    features.requires_grad_()
    loss = projected_distill_loss(features, weight, bias, target, kernel="triton")
    (2 * loss).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (2 * loss).backward()
    for reduction in ("mean", "none"):
        loss = projected_distill_loss(features, weight, bias, target, reduction=reduction, kernel="triton").sum()  # type: ignore[arg-type]
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(loss, features, create_graph=True)


def test_opcheck(device: str) -> None:
    features, weight, bias, target = (
        None if x is None else x.requires_grad_() for x in make((5,), 16, 32, torch.bfloat16, device)
    )
    assert target is not None
    inputs = (features, weight, bias, target.detach())
    row_weight = torch.rand(5, device=device)
    # Gradients are results here, and the backward pass changes them: the one check that minds is left to torch.compile
    # below, around the public function, where nobody sees them.
    most = ("test_schema", "test_autograd_registration", "test_faketensor")
    for kind, lowered in (("mse", None), ("kl", torch.float16)):
        rest = (row_weight, None, None, kind, 1.0, lowered)
        torch.library.opcheck(distill_loss._loss, (*inputs, *rest, True, True, True, True), test_utils=most)
        torch.library.opcheck(distill_loss._loss, (*inputs, *rest, False, False, False, False))
    gradient, weights, biases = (torch.randn(*s, device=device) for s in ((5, 16), (32, 16), (32,)))
    factor = torch.tensor(2.0, device=device)
    torch.library.opcheck(distill_loss._scale, (gradient, weights, biases, factor, torch.bfloat16, torch.float32))


@pytest.mark.parametrize(
    ("kind", "reduction", "backend"),
    [*itertools.product(KINDS, ("mean", "none"), ("aot_eager",)), ("mse", "mean", "inductor")],
)
def test_compiles_in_one_graph(device: str, kind: str, reduction: str, backend: str) -> None:
    if backend == "inductor" and device == "cpu" and not shutil.which("g++"):
        pytest.skip("torch.compile needs a C++ compiler on a CPU")
    torch._dynamo.reset()
    tensors = make((2, 5), 16, 32, torch.bfloat16, device)
    options: Any = {"kind": kind, "reduction": reduction, "kernel": "triton"}

    def step(features: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
        # Nothing beside the loss for inductor: its own kernels are not what is tested, and compiling them takes long.
        loss = projected_distill_loss(features, weight, bias, target, **options)
        return loss if backend == "inductor" else (loss * 3).sum()

    found = []
    for run in (step, torch.compile(step, fullgraph=True, backend=backend)):
        inputs = [x.detach().requires_grad_() for x in tensors[:3]]
        loss = run(inputs[0], inputs[1], inputs[2], tensors[3])
        found.append([loss.detach(), *torch.autograd.grad(loss, inputs, torch.full_like(loss, 0.3))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_one_graph_serves_every_number_of_rows(device: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run = torch.compile(projected_distill_loss, fullgraph=True, backend="aot_eager")
    for rows in (6, 9, 14):
        features, weight, bias, target = make((rows,), 16, 32, torch.bfloat16, device)
        features.requires_grad_()
        torch._dynamo.mark_dynamic(features, 0)  # an error if anything depends on it
        torch._dynamo.mark_dynamic(target, 0)
        loss = run(features, weight, bias, target, kernel="triton")
        expected = projected_distill_loss(features, weight, bias, target, kernel="triton")
        (found,) = torch.autograd.grad(loss, features)
        assert torch.equal(found, *torch.autograd.grad(expected, features))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def train(rank: int, ranks: int, folder: str, device: str) -> None:
    """Three steps of a projector under DDP, called by `test_two_ranks_learn_what_one_does` in processes of its own."""
    store = torch.distributed.FileStore(f"{folder}/store{ranks}", ranks)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    torch.manual_seed(0)
    body, projector = torch.nn.Linear(12, 16, device=device), torch.nn.Linear(16, 32, device=device)

    class Student(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.projector = body, projector

        def forward(self, images: Tensor, target: Tensor) -> Tensor:
            p = self.projector
            return projected_distill_loss(self.body(images), p.weight, p.bias, target, kernel="triton")

    student = torch.nn.parallel.DistributedDataParallel(Student())
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    for _ in range(3):
        images, target = torch.randn(8, 12, device=device), torch.randn(8, 32, device=device)
        optimizer.zero_grad()
        student(images[rank::ranks], target[rank::ranks]).backward()
        optimizer.step()
    torch.save([*body.parameters(), *projector.parameters()], f"{folder}/{rank}_of_{ranks}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_learn_what_one_does(device: str, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")  # neither CUDA nor autograd's threads survive a fork
    ranks = [context.Process(target=train, args=(rank, 2, str(tmp_path), device)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        assert process.exitcode == 0
    train(0, 1, str(tmp_path), device)
    alone, first, second = (torch.load(tmp_path / name) for name in ("0_of_1.pt", "0_of_2.pt", "1_of_2.pt"))
    for a, b, c in zip(alone, first, second, strict=True):
        assert torch.equal(b, c)
        torch.testing.assert_close(a, b)


# ----------------------------------------------------------------------------------------------------------------------
# Memory
# ----------------------------------------------------------------------------------------------------------------------


class Live(TorchDispatchMode):
    """Most bytes that tensors made under it held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {id_of(x) for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in torch.utils._pytree.tree_leaves(result):
            if isinstance(x, Tensor) and id_of(x) not in given:
                storage = x.untyped_storage()
                self.storages[id_of(x)] = StorageWeakRef(storage), storage.nbytes()
        self.storages = {key: value for key, value in self.storages.items() if not value[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.storages.values()))
        return result


def id_of(x: Tensor) -> int:
    return x.untyped_storage()._cdata


class NoLaunch:
    """In place of a kernel: what it computes takes no memory, and an interpreter would take minutes."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: None


@pytest.fixture
def shapes_alone(device: str) -> Iterator[None]:
    """Without a GPU tensors have no values: bytes are counted by shapes, products at full size would take minutes."""
    with contextlib.nullcontext() if device == "cuda" else FakeTensorMode():
        yield


@pytest.mark.usefixtures("shapes_alone")
@pytest.mark.parametrize("kind", ["mse", "kl"])
def test_memory_is_at_most_a_quarter_of_eager(device: str, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, width = 50432, 768
    features, weight, bias, target = (
        torch.zeros(*shape, dtype=torch.bfloat16, device=device)
        for shape in ((rows, width), (width, width), (width,), (rows, width))
    )
    inputs = [features.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    returned = sum(x.nbytes for x in inputs)
    promised = extra_bytes(rows, width, width, torch.bfloat16, kind)

    def public(kernel: Any) -> None:
        loss = projected_distill_loss(inputs[0], inputs[1], inputs[2], target, kind, kernel=kernel)
        torch.autograd.grad(loss, inputs)

    if device == "cuda":
        measured = []
        for kernel in ("triton", "reference"):
            public(kernel)
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            public(kernel)
            measured.append(torch.cuda.max_memory_allocated() - before - returned)
        ours, eager = measured
    else:
        for name in ("_project_kernel", "_rows_kernel", "_scale_kernel"):
            monkeypatch.setattr(distill_loss, name, NoLaunch())
        monkeypatch.setattr(distill_loss, "_aligned", lambda matrix: True)  # there is no address to look at
        # As on a GPU, where no operand is converted to float32.
        monkeypatch.setattr(distill_loss, "matmul_float32", lambda a, b: torch.zeros(len(a), b.shape[1]))
        rest = (None, None, None, kind, 1.0, None, True, True, True, True)
        with torch.no_grad(), Live() as live:
            _, *found, _ = distill_loss._loss._init_fn(*inputs, target, *rest)
            distill_loss._scale._init_fn(*found, torch.ones(()), torch.bfloat16, torch.bfloat16)
        ours = live.peak - returned
        with Live() as live:
            public("reference")
        eager = live.peak - returned
    print(f"{kind}: {ours / 2**20:.1f} MiB, promised {promised / 2**20:.1f}, eager {eager / 2**20:.1f}")
    assert ours <= promised + 2**20 * (device == "cuda")
    assert promised <= 40 * 2**20
    assert 4 * ours <= eager
