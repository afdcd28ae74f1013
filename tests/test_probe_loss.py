"""Cross-entropy of many heads: reference against formulas in float64, kernels against the reference in float64."""

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import probe_loss
from kernels.dispatch import HAS_TRITON
from kernels.probe_loss import extra_bytes, multi_head_cross_entropy, multi_head_gradients

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
NAMES = ("losses", "features", "weight", "bias")
LOW = (torch.bfloat16, torch.float16)
Inputs = tuple[Tensor, Tensor, Tensor | None, Tensor]


def example(
    rows: int,
    width: int,
    heads: int,
    classes: int,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features of a type; float32 weight and bias; labels."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(rows, width, generator=generator).to(device, dtype)
    weight = torch.randn(heads, classes, width, generator=generator).to(device)
    bias = torch.randn(heads, classes, generator=generator).to(device)
    return features, weight, bias, torch.randint(classes, (rows,), generator=generator).to(device)


def results(
    inputs: Inputs,
    upstream: Tensor | None = None,
    needed: tuple[bool, bool, bool] = (False, True, True),
    **options: Any,
) -> dict[str, Tensor]:
    """Losses and the needed gradients, by name, of fresh leaves."""
    leaves = [None if x is None else x.detach().requires_grad_(n) for x, n in zip(inputs[:3], needed, strict=True)]
    features, weight, bias = leaves
    assert features is not None
    assert weight is not None
    losses = multi_head_cross_entropy(features, weight, bias, inputs[3], **options)
    upstream = torch.ones_like(losses) if upstream is None else upstream.to(losses)
    if any(needed):
        losses.backward(upstream)
    grads = {name: x.grad for name, x in zip(NAMES[1:], leaves, strict=True) if x is not None and x.requires_grad}
    return {"losses": losses.detach()} | {name: grad for name, grad in grads.items() if grad is not None}


def double(inputs: Inputs) -> tuple[Tensor, Tensor, Any, Tensor]:
    features, weight, bias, labels = inputs
    return features.double(), weight.double(), None if bias is None else bias.double(), labels


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


def assert_as_good_as_torch(
    inputs: Inputs, upstream: Tensor, needed: tuple[bool, bool, bool], dtype: torch.dtype, **options: Any
) -> None:
    """Errors of the kernels at most twice those of the plain PyTorch reference, both against float64."""
    limit = options.pop("max_logit_bytes", 2**28)
    smoothing = options.get("label_smoothing", 0.0)
    exact_options = {"label_smoothing": smoothing.double() if isinstance(smoothing, Tensor) else smoothing}
    ours = results(inputs, upstream, needed, kernel="triton", max_logit_bytes=limit, **options)
    plain = results(inputs, upstream, needed, kernel="reference", **options)
    exact = results(double(inputs), upstream, needed, kernel="reference", **exact_options)
    assert ours.keys() == plain.keys() == exact.keys()
    for name, value in exact.items():
        assert ours[name].shape == value.shape, name
        assert ours[name].dtype == plain[name].dtype, name
        # An ulp of the value and what an ulp of the logits changes; more for a few numbers, exact in torch by luck.
        scale = (1.0 if name == "losses" else rms(upstream)) / max(len(inputs[0]), 1) ** 0.5
        floor = torch.finfo(dtype).eps * (rms(value) + scale / 2) * max(1, 4 / max(value.numel(), 1) ** 0.5)
        error, allowed = rms(ours[name] - value), 2 * rms(plain[name] - value) + floor
        assert error <= allowed, f"{name}: error {error}, allowed {allowed}"


# The reference.


@pytest.mark.parametrize("smoothing", [None, 0.1, "per head"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_reference_is_torchs_cross_entropy_of_every_head(smoothing: Any, with_bias: bool) -> None:
    features, weight, bias, labels = double(example(7, 5, 3, 4))
    per_head = torch.tensor([0.0, 0.3, 1.0]) if smoothing == "per head" else torch.full((3,), smoothing or 0.0)
    option = per_head if smoothing == "per head" else (smoothing or 0.0)
    inputs = (features, weight, bias if with_bias else None, labels)
    upstream = torch.tensor([1.5, -2.0, 0.25])
    needed = (True, True, with_bias)
    found = results(inputs, upstream, needed, label_smoothing=option)
    leaves = [x.clone().requires_grad_() for x in (features, weight, bias)]
    losses = [
        F.cross_entropy(
            leaves[0] @ leaves[1][h].T + (leaves[2][h] if with_bias else 0), labels, label_smoothing=per_head[h].item()
        )
        for h in range(3)
    ]
    (torch.stack(losses) @ upstream.double()).backward()
    assert torch.allclose(found["losses"], torch.stack(losses).detach(), rtol=1e-6, atol=0)
    for name, leaf in zip(NAMES[1:], leaves, strict=True):
        if name in found:
            assert leaf.grad is not None
            assert torch.allclose(found[name], leaf.grad, rtol=1e-6, atol=1e-8), name


def test_reference_gradcheck() -> None:
    features, weight, bias, labels = double(example(5, 3, 2, 4))
    smoothing = torch.tensor([0.0, 0.2], dtype=torch.float64)

    def losses(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return multi_head_cross_entropy(features, weight, bias, labels, label_smoothing=smoothing)

    leaves = [x.requires_grad_() for x in (features, weight, bias)]
    assert torch.autograd.gradcheck(losses, leaves)
    assert torch.autograd.gradgradcheck(losses, leaves)


def test_reference_refuses_labels_outside_the_classes() -> None:
    features, weight, bias, labels = example(5, 3, 2, 4)
    for wrong in (-1, 4, -100):
        labels[2] = wrong
        with pytest.raises(ValueError, match=f"{wrong}.* for 4 classes"):
            multi_head_cross_entropy(features, weight, bias, labels, kernel="reference")


@pytest.mark.parametrize("kernel", ["reference", pytest.param("triton", marks=needs_triton)])
def test_bad_input(kernel: Any, device: str) -> None:
    x, w, b, y = example(5, 3, 2, 4, device)
    cases: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((x[0], w, b, y), {}, r"features \(3,\).*weight \(2, 4, 3\)"),
        ((x, w[0], b, y), {}, r"features \(5, 3\).*weight \(4, 3\)"),
        ((x[:, :2], w, b, y), {}, r"features \(5, 2\).*weight \(2, 4, 3\)"),
        ((x, w[:, :0], b[:, :0], y), {}, r"at least one class.*\(2, 0, 3\)"),
        ((x, w, b[:1], y), {}, r"bias \(1, 4\)"),
        ((x, w, b, y[:4]), {}, r"labels \(4,\)"),
        ((x, w, b, y.int()), {}, r"int64 labels:.*labels \(5,\) torch.int32"),
        ((x.long(), w, b, y), {}, r"floating-point features.*features \(5, 3\) torch.int64"),
        ((x, w, b, y), {"label_smoothing": 1.5}, "1.5"),
        ((x, w, b, y), {"label_smoothing": float("nan")}, "nan"),
        ((x, w, b, y), {"label_smoothing": torch.zeros(3, device=device)}, r"label_smoothing \(3,\)"),
        ((x, w, b, y), {"max_logit_bytes": 0}, "max_logit_bytes"),
        ((x, w.to("meta"), b, y), {}, "several devices"),
    ]
    if device == "cpu":
        cases.append(((x, w, b, y), {"label_smoothing": torch.tensor([0.1, -0.1])}, "-0.1"))
    for inputs, options, message in cases:
        with pytest.raises(ValueError, match=message):
            multi_head_cross_entropy(*inputs, **{"kernel": kernel} | options)
    with pytest.raises(ValueError, match="kernel"):
        multi_head_cross_entropy(x, w, b, y, kernel="fast")  # type: ignore[arg-type]


@needs_triton
def test_float64_has_no_kernel(device: str) -> None:
    inputs = double(example(5, 3, 2, 4, device))
    assert multi_head_cross_entropy(*inputs).dtype == torch.float64
    with pytest.raises(ValueError, match="float64"):
        multi_head_cross_entropy(*inputs, kernel="triton")


# The kernels.


@needs_triton
@given(
    rows=st.sampled_from([1, 2, 7, 37, 67]),
    width=st.sampled_from([1, 3, 8, 17]),
    heads=st.sampled_from([1, 2, 3, 5]),
    classes=st.sampled_from([1, 2, 3, 10, 16, 33, 100, 131]),
    dtype=st.sampled_from([torch.float32, *LOW]),
    weight_dtype=st.sampled_from([torch.float32, torch.float32, *LOW]),
    smoothing=st.sampled_from(["none", "number", "per head"]),
    needed=st.sampled_from([(False, True, True), (True, True, True), (False, False, True), (True, False, False)]),
    with_bias=st.booleans(),
    limit=st.sampled_from([1, 3_000, 100_000, 2**28]),
    seed=st.integers(0, 100),
)
def test_kernels_are_as_exact_as_torch(
    device: str, rows: int, width: int, heads: int, classes: int, dtype: torch.dtype, weight_dtype: torch.dtype,
    smoothing: str, needed: tuple[bool, bool, bool], with_bias: bool, limit: int, seed: int,
) -> None:  # fmt: skip
    features, weight, bias, labels = example(rows, width, heads, classes, device, dtype, seed)
    inputs = features, weight.to(weight_dtype), bias.to(weight_dtype) if with_bias else None, labels
    generator = torch.Generator().manual_seed(seed)
    upstream = torch.randn(heads, generator=generator).to(device)
    options = {"none": 0.0, "number": 0.1, "per head": torch.rand(heads, generator=generator).to(device)}
    needed = (needed[0], needed[1], needed[2] and with_bias)
    assert_as_good_as_torch(
        inputs, upstream, needed, dtype, label_smoothing=options[smoothing], max_logit_bytes=limit
    )  # fmt: skip


@needs_triton
@pytest.mark.parametrize("classes", [8192, 8193, 9000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("needed", [(False, True, True), (True, True, True)])
def test_many_classes(device: str, classes: int, dtype: torch.dtype, needed: tuple[bool, bool, bool]) -> None:
    inputs = example(5, 3, 2, classes, device, dtype)
    smoothing = torch.tensor([0.0, 0.2], device=device)
    upstream = torch.tensor([0.5, -3.0], device=device)
    assert_as_good_as_torch(inputs, upstream, needed, dtype, label_smoothing=smoothing)


@needs_triton
@pytest.mark.parametrize("kernel", ["reference", "triton"])
@pytest.mark.parametrize("shape", [(0, 3, 2, 4), (3, 3, 0, 4), (0, 3, 0, 4)])
@pytest.mark.parametrize("needed", [(False, True, True), (True, True, True)])
def test_nothing(device: str, kernel: Any, shape: tuple[int, int, int, int], needed: tuple[bool, bool, bool]) -> None:
    inputs = example(*shape, device=device)
    found = results(inputs, None, needed, kernel=kernel, label_smoothing=torch.full((shape[2],), 0.1, device=device))
    for name, like in zip(NAMES, (inputs[1][:, 0, 0], *inputs[:3]), strict=True):
        if name in found:
            assert torch.equal(found[name], torch.zeros_like(like)), name


@needs_triton
@pytest.mark.parametrize("needed", [(False, True, True), (True, True, True)])
def test_non_contiguous_and_expanded_inputs(device: str, needed: tuple[bool, bool, bool]) -> None:
    features, weight, bias, labels = example(12, 10, 4, 14, device)
    strided = features[::2, ::2], weight.transpose(1, 2)[::2, ::2, :10].transpose(1, 2)[:, ::2], bias[::2, :10:2]
    expanded = features[:1].expand(6, 10)[:, :5], weight[:1, :5, :5].expand(3, 5, 5), bias[:1, :1].expand(3, 5)
    for x, w, b in (strided, expanded):
        for limit in (2**28, 1):
            inputs = (x, w, b, (labels % 5)[::2])
            assert not any(t.is_contiguous() for t in inputs)
            copies = x.contiguous(), w.contiguous(), b.contiguous(), inputs[3].contiguous()
            options = {"kernel": "triton", "max_logit_bytes": limit}
            found, expected = results(inputs, None, needed, **options), results(copies, None, needed, **options)
            assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)
            assert torch.allclose(found["losses"], results(copies, None, needed)["losses"], atol=1e-5)


@needs_triton
@pytest.mark.parametrize("classes", [6, 8200])
@pytest.mark.parametrize("needed", [(False, True, True), (True, True, True)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_logits_give_what_the_reference_gives(
    device: str, classes: int, needed: tuple[bool, bool, bool], bad: float
) -> None:
    """One head has a bad bias, the other does not; then a bad feature makes both heads bad."""
    features, weight, bias, labels = example(3, 3, 2, classes, device)
    labels[:] = torch.tensor([0, 1, 2])
    bias[0, 3] = bad
    spoilt = features.clone()
    spoilt[1, 0] = bad
    for inputs in ((features, weight, bias, labels), (spoilt, weight, bias, labels)):
        ours, plain = (results(inputs, None, needed, kernel=kernel) for kernel in ("triton", "reference"))
        for name in plain:
            assert torch.allclose(ours[name], plain[name], atol=1e-5, equal_nan=True), name


@needs_triton
@pytest.mark.parametrize("classes", [6, 8200])
def test_masked_classes(device: str, classes: int) -> None:
    """A bias of -inf takes classes out; all of the first block's among them. With smoothing the loss is infinite."""
    features, weight, bias, labels = example(4, 3, 2, classes, device)
    bias[0, : classes - 2] = -torch.inf
    labels[:] = classes - 1
    for smoothing in (0.0, torch.tensor([0.1, 0.0], device=device)):
        ours, plain = (
            results((features, weight, bias, labels), kernel=kernel, label_smoothing=smoothing)
            for kernel in ("triton", "reference")
        )
        assert torch.isfinite(plain["losses"]).tolist() == [isinstance(smoothing, float), True]
        for name in plain:
            assert torch.allclose(ours[name], plain[name], atol=1e-6, equal_nan=True), name


@needs_triton
@pytest.mark.parametrize("classes", [5, 8200])
@pytest.mark.parametrize("wrong", [-1, -100, 5, 2**32])
def test_labels_outside_the_classes_make_all_losses_nan(device: str, classes: int, wrong: int) -> None:
    inputs = example(4, 3, 2, classes, device)
    inputs[3][1] = wrong if wrong != 5 else classes
    for needed in ((False, False, False), (False, True, True), (True, True, True)):
        found = results(inputs, None, needed, kernel="triton")
        assert all(value.isnan().all() for name, value in found.items() if name in ("losses", "weight", "bias"))


@needs_triton
@pytest.mark.parametrize("classes", [40, 8200])
@pytest.mark.parametrize("needed", [(False, True, True), (True, True, True)])
def test_large_magnitudes(device: str, classes: int, needed: tuple[bool, bool, bool]) -> None:
    """Logits of about 1e5, where the difference of log-sum-exp and logit has no digits left."""
    features, weight, bias, labels = example(6, 3, 2, classes, device)
    inputs = features * 100, weight * 1000, bias, labels
    assert_as_good_as_torch(inputs, torch.tensor([2.0, -1.0], device=device), needed, torch.float32)
    shifted = features, weight, bias + 1e5, labels
    exact = results(double(shifted), None, needed)["losses"]
    losses = [results(shifted, None, needed, kernel=kernel)["losses"] for kernel in ("triton", "reference")]
    assert rms(losses[0] - exact) <= 2 * rms(losses[1] - exact)


@needs_triton
@pytest.mark.parametrize("needed", [(False, True, True), (True, True, True)])
def test_fp16_gradients_do_not_underflow(device: str, needed: tuple[bool, bool, bool]) -> None:
    """Divided by 1000 rows, many gradients lie below fp16's smallest number, where a loss scale finds nothing."""
    features, weight, bias, labels = example(1000, 4, 2, 3, device, torch.float16)
    inputs = features * 3, weight, bias, labels
    for scale in (1.0, 65536.0, 2.0**24):
        upstream = torch.tensor([scale, scale / 1000], device=device)
        ours = results(inputs, upstream, (needed[0] and scale < 1e6, True, True), kernel="triton")
        exact = results(double(inputs), upstream, needed)
        for name in ("weight", "bias"):
            for head in range(2):
                error = rms(ours[name][head] - exact[name][head]) / rms(exact[name][head])
                assert error < 2e-3, f"{name} of head {head}, scale {scale}: {error}"
    assert_as_good_as_torch(inputs, torch.full((2,), 65536.0, device=device), needed, torch.float16)


@needs_triton
def test_gradients_are_repeatable_to_the_bit_and_inputs_stay(device: str) -> None:
    inputs = example(150, 9, 5, 37, device, torch.bfloat16)
    copies = [x.clone() for x in inputs]
    for needed in ((False, True, True), (True, True, True)):
        runs = [results(inputs, torch.arange(5.0), needed, kernel="triton", label_smoothing=0.1) for _ in range(2)]
        assert all(torch.equal(runs[1][name], runs[0][name]) for name in runs[0])
    assert all(torch.equal(x, copy) for x, copy in zip(inputs, copies, strict=True))


@needs_triton
@pytest.mark.parametrize("needed", [(False, True, True), (True, True, True)])
def test_blocks_do_not_matter(device: str, needed: tuple[bool, bool, bool]) -> None:
    """One head and 64 rows at a time; two heads, and one at the end."""
    inputs = example(150, 5, 5, 7, device)
    upstream = torch.linspace(-1, 2, 5)
    whole = results(inputs, upstream, needed, kernel="triton")
    assert [probe_loss._blocks(150, 5, 5, 7, 4, True, limit)[:2] for limit in (1, 12_000)] == [(1, 64), (2, 150)]
    for limit in (1, 12_000):
        parts = results(inputs, upstream, needed, kernel="triton", max_logit_bytes=limit)
        for name in whole:
            assert torch.allclose(parts[name], whole[name], rtol=1e-5, atol=1e-6), name


@needs_triton
def test_a_second_backward_pass_is_refused_or_right(device: str) -> None:
    features, weight, bias, labels = example(6, 3, 2, 4, device)
    weight.requires_grad_()
    losses = multi_head_cross_entropy(features, weight, bias, labels, kernel="triton")
    losses.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.sum().backward()
    losses = multi_head_cross_entropy(features.requires_grad_(), weight, bias, labels, kernel="triton")
    first, second = (
        torch.autograd.grad(losses, (features, weight), torch.tensor(u, device=device), retain_graph=True)
        for u in ([1.0, 2.0], [2.0, 4.0])
    )
    assert all(torch.allclose(2 * a, b) for a, b in zip(first, second, strict=True))
    for x in (features, features.detach()):
        losses = multi_head_cross_entropy(x, weight, bias, labels, kernel="triton")
        with pytest.raises(RuntimeError, match="twice differentiable"):
            torch.autograd.grad(losses.sum(), weight, create_graph=True)


@needs_triton
def test_the_gradient_of_the_weight_is_handed_over_not_copied(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    features, weight, bias, labels = example(6, 3, 2, 4, device)
    kept: list[int] = []
    run = probe_loss._run

    def spy(*inputs: Any) -> Any:
        found = run(*inputs)
        kept.extend(x.data_ptr() for x in found)
        return found

    monkeypatch.setattr(probe_loss, "_run", spy)
    multi_head_cross_entropy(features, weight.requires_grad_(), bias, labels, kernel="triton").sum().backward()
    assert weight.grad is not None
    assert weight.grad.data_ptr() in kept


@needs_triton
def test_no_gradient_computes_none(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = example(6, 3, 2, 4, device)
    for x in inputs[:3]:
        x.requires_grad_()
    monkeypatch.setattr(probe_loss, "_add_product", pytest.fail)
    with torch.no_grad():
        losses = multi_head_cross_entropy(*inputs, kernel="triton")
    assert torch.allclose(losses, multi_head_cross_entropy(*inputs, kernel="reference"), atol=1e-6)


@needs_triton
@pytest.mark.parametrize("needed", [(False, True, True), (True, True, True)])
@pytest.mark.parametrize("dtype", LOW)
def test_autocast(device: str, needed: tuple[bool, bool, bool], dtype: torch.dtype) -> None:
    """Float32 features, weight and bias under autocast: what low-precision features give, gradients in float32."""
    features, weight, bias, labels = example(20, 8, 3, 10, device)
    low = results((features.to(dtype), weight, bias, labels), None, needed, kernel="triton")
    for kernel in ("triton", "reference"):
        with torch.autocast(device, dtype):
            losses = results((features, weight, bias, labels), None, needed, kernel=kernel)
        for name in low:
            assert losses[name].dtype == torch.float32, name
            assert torch.allclose(losses[name], low[name].float(), rtol=0.02, atol=0.02), name
            assert kernel == "reference" or name == "features" or torch.equal(losses[name], low[name]), name


# PyTorch's machinery around them.


@needs_triton
@pytest.mark.parametrize("wanted", [[False, True, True], [False, False, True], [False, False, False]])
def test_opcheck(device: str, wanted: list[bool]) -> None:
    features, weight, bias, labels = example(5, 3, 2, 4, device)
    features.requires_grad_(not any(wanted))
    smoothing = torch.tensor([0.0, 0.1], device=device)
    tensors = features, weight.requires_grad_(), bias.requires_grad_(), labels
    torch.library.opcheck(probe_loss._operation, (*tensors, smoothing, None, 100, wanted))
    upstream = torch.tensor([1.0, 2.0], device=device)
    torch.library.opcheck(
        probe_loss._operation, (*(t.detach() for t in tensors), None, upstream, 2**20, [True, *wanted[1:]])
    )
    torch.library.opcheck(probe_loss._scale_heads, (torch.randn(2, 3, device=device), upstream))


@needs_triton
@pytest.mark.parametrize(
    ("backend", "needed"),
    [("aot_eager", (False, True, True)), ("aot_eager", (True, True, True)), ("inductor", (False, True, True))],
)
def test_compile(device: str, backend: str, needed: tuple[bool, bool, bool]) -> None:
    torch._dynamo.reset()
    smoothing = torch.tensor([0.0, 0.1, 0.5], device=device)

    def total(features: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, kernel: Any) -> Tensor:
        losses = multi_head_cross_entropy(features * 2, weight, bias, labels, label_smoothing=smoothing, kernel=kernel)
        return losses @ torch.arange(1.0, 4.0, device=losses.device)

    kernels = ["triton"] if backend == "inductor" else ["triton", "reference"]
    for kernel in kernels:
        for rows in (6, 9) if backend == "aot_eager" else (6,):
            found = []
            for function in (total, torch.compile(total, fullgraph=True, backend=backend)):
                features, weight, bias, labels = example(rows, 3, 3, 4, device)
                leaves = [t.requires_grad_(n) for t, n in zip((features, weight, bias), needed, strict=True)]
                loss = function(features, weight, bias, labels, kernel)
                loss.backward()
                found.append([loss.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)])
            assert len(found[0]) == len(found[1]) == 1 + sum(needed)
            assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-6) for a, b in zip(*found, strict=True))


class Probes(torch.nn.Module):
    """Heads of zeros: every rank has the same."""

    def __init__(self, heads: int, classes: int, width: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(heads, classes, width))
        self.bias = torch.nn.Parameter(torch.zeros(heads, classes))

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        return multi_head_cross_entropy(features, self.weight, self.bias, labels, kernel="triton")


def train_on_rank(rank: int, world: int, store: str, device: str, out: str) -> None:
    """Three steps on every world-th row; rank 0 saves the parameters."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    features, _, _, labels = example(32, 5, 3, 4, device)
    module = Probes(3, 4, 5).to(device)
    model = torch.nn.parallel.DistributedDataParallel(module)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(features[rank::world], labels[rank::world]).sum().backward()
        optimizer.step()
    if rank == 0:
        torch.save(module.state_dict(), out)
    torch.distributed.destroy_process_group()


@needs_triton
def test_two_ranks_equal_one_process(device: str, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")  # neither CUDA nor autograd's threads survive a fork
    out = tmp_path / "probes.pt"
    ranks = [
        context.Process(target=train_on_rank, args=(rank, 2, str(tmp_path / "store"), device, str(out)))
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    features, _, _, labels = example(32, 5, 3, 4, device)
    module = Probes(3, 4, 5).to(device)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        module(features, labels).sum().backward()
        optimizer.step()
    for process in ranks:
        process.join(120)
        assert process.exitcode == 0
    for name, value in torch.load(out, weights_only=True).items():
        assert torch.allclose(value, module.state_dict()[name], rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("kernel", ["reference", pytest.param("triton", marks=needs_triton)])
def test_every_head_is_the_head_trained_alone(device: str, kernel: Any) -> None:
    """20 steps of SGD with momentum at three learning rates, with mini-batches, against separate layers."""
    features, weight, bias, labels = example(96, 12, 3, 7, device)
    rates = (0.01, 0.1, 1.0)
    together = Probes(3, 7, 12).to(device)
    together.load_state_dict({"weight": weight / 4, "bias": bias})
    velocity = [torch.zeros_like(p) for p in together.parameters()]
    alone = [torch.nn.Linear(12, 7).to(device) for _ in rates]
    for head, layer in enumerate(alone):
        layer.load_state_dict({"weight": weight[head] / 4, "bias": bias[head]})
    optimizers = [torch.optim.SGD(x.parameters(), lr, momentum=0.9) for x, lr in zip(alone, rates, strict=True)]
    for step in range(20):
        part = slice(step % 3 * 32, step % 3 * 32 + 32)
        losses = multi_head_cross_entropy(
            features[part], together.weight, together.bias, labels[part], label_smoothing=0.1, kernel=kernel
        )
        gradients = torch.autograd.grad(losses.sum(), list(together.parameters()))
        with torch.no_grad():
            for parameter, speed, gradient in zip(together.parameters(), velocity, gradients, strict=True):
                speed.mul_(0.9).add_(gradient)
                parameter.sub_(speed * torch.tensor(rates, device=device).view(-1, *[1] * (speed.dim() - 1)))
        for head, (layer, optimizer) in enumerate(zip(alone, optimizers, strict=True)):
            loss = F.cross_entropy(layer(features[part]), labels[part], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            assert abs(losses[head].item() - loss.item()) <= 1e-5 * max(1, loss.item()), (step, head)
    for head, layer in enumerate(alone):
        assert torch.allclose(together.weight[head], layer.weight, rtol=1e-5, atol=1e-5), head
        assert torch.allclose(together.bias[head], layer.bias, rtol=1e-5, atol=1e-5), head


# Memory.


class LiveBytes(TorchDispatchMode):
    """Peak of the bytes in storages that appear inside the block, besides those of the inputs."""

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self.live: dict[StorageWeakRef, int] = {}
        self.known = {StorageWeakRef(x.untyped_storage()) for x in inputs}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.live[StorageWeakRef(storage)] = storage.nbytes()
        self.live = {x: size for x, size in self.live.items() if x not in self.known and not x.expired()}
        self.peak = max(self.peak, sum(self.live.values()))
        return out


@contextlib.contextmanager
def kernels_replaced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Allocations of the kernels' path on tensors without data: nothing is launched or multiplied."""

    class Nothing:
        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda *args, **kwargs: None

    with monkeypatch.context() as patch:
        for name in ("_tile_kernel", "_row_kernel"):
            patch.setattr(probe_loss, name, Nothing())
        patch.setattr(probe_loss, "_add_product", lambda *args: None)
        patch.setattr(probe_loss, "processors", lambda device: 132)
        patch.setattr(torch.cuda, "device_of", lambda tensor: contextlib.nullcontext())
        yield


# Gradients without autograd.


@pytest.mark.parametrize("kernel", ["reference", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize(  # each pair of values once
    ("smoothing", "limit", "dtype"),
    [
        (smoothing, limit, (torch.float32, *LOW)[(i + k) % 3])
        for i, smoothing in enumerate((0.0, 0.1, "per head"))
        for k, limit in enumerate((1, 3000, 2**28))
    ],
)
def test_gradients_without_autograd(device: str, kernel: Any, smoothing: Any, limit: int, dtype: torch.dtype) -> None:
    """As exact as autograd's, in blocks of heads, in chunks of rows and at once; what the tensors held is gone."""
    inputs = example(150, 12, 5, 7, device, dtype)
    option = torch.tensor([0.0, 0.3, 1.0, 0.2, 0.0], device=device) if smoothing == "per head" else smoothing
    exact_option = option.double() if isinstance(option, Tensor) else option
    exact = results(double(inputs), kernel="reference", label_smoothing=exact_option)
    plain = results(inputs, kernel="reference", label_smoothing=option)
    found = {"weight": torch.full_like(inputs[1], 3.0), "bias": torch.full_like(inputs[2], float("nan"))}
    into = found["weight"], found["bias"]
    found["losses"] = multi_head_gradients(*inputs, *into, label_smoothing=option, max_logit_bytes=limit, kernel=kernel)
    for name, value in exact.items():
        scale = torch.finfo(dtype).eps * (rms(value) + 0.5 / 150**0.5)
        assert rms(found[name] - value) <= 2 * rms(plain[name] - value) + scale, name
        assert found[name].dtype == torch.float32, name


@pytest.mark.parametrize("kernel", ["reference", pytest.param("triton", marks=needs_triton)])
def test_gradients_without_autograd_at_the_edges(device: str, kernel: Any) -> None:
    features, weight, bias, labels = example(0, 4, 2, 3, device)
    by_weight, by_bias = torch.ones_like(weight), torch.ones_like(bias)
    assert not multi_head_gradients(features, weight, bias, labels, by_weight, by_bias, kernel=kernel).any()
    assert not by_weight.any()
    assert not by_bias.any()
    # A class that is masked away takes no part; a logit that is not finite spoils its own head alone.
    features, weight, bias, labels = example(9, 4, 3, 5, device)
    bias[0, 2], weight[1, 0, 0] = -float("inf"), float("nan")
    labels[labels == 2] = 1
    by_weight, by_bias = torch.ones_like(weight), torch.ones_like(bias)
    losses = multi_head_gradients(features, weight, bias, labels, by_weight, by_bias, kernel=kernel)
    expected = results((features, weight, bias, labels), kernel="reference")
    assert torch.allclose(by_weight, expected["weight"], atol=1e-6, equal_nan=True)
    assert torch.allclose(by_bias, expected["bias"], atol=1e-6, equal_nan=True)
    assert torch.allclose(losses, expected["losses"], atol=1e-6, equal_nan=True)
    assert losses.isnan().tolist() == [False, True, False]
    with pytest.raises(ValueError, match="by_bias must be contiguous float32"):
        multi_head_gradients(features, weight, bias, labels, by_weight, by_bias.double(), kernel=kernel)


def test_gradients_without_autograd_refuse_labels_outside_the_classes() -> None:
    features, weight, bias, labels = example(9, 4, 3, 5)
    with pytest.raises(ValueError, match="labels from"):
        multi_head_gradients(features, weight, bias, labels + 1, torch.ones_like(weight), torch.ones_like(bias))


@pytest.mark.parametrize("limit", [2**24, 2**28])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("wanted", [[False, True, True], [True, True, True], [False, False, False]])
@pytest.mark.parametrize("shape", [(4096, 1024, 52, 1000), (4096, 768, 8, 21841), (50_000, 512, 64, 10)])
def test_extra_memory_is_bounded(
    monkeypatch: pytest.MonkeyPatch,
    limit: int,
    dtype: torch.dtype,
    wanted: list[bool],
    shape: tuple[int, int, int, int],
) -> None:
    """At sizes of real sweeps, on tensors without data; against the reference's, forward and backward."""
    rows, width, heads, classes = shape
    features = torch.empty(rows, width, device="meta", dtype=dtype)
    weight, bias = torch.empty(heads, classes, width, device="meta"), torch.empty(heads, classes, device="meta")
    labels = torch.empty(rows, device="meta", dtype=torch.int64)
    upstream = torch.ones(heads, device="meta") if wanted[0] else None
    with kernels_replaced(monkeypatch), LiveBytes(features, weight, bias, labels) as ours:
        results = probe_loss._run(features, weight, bias, labels, None, upstream, limit, wanted)
    given = sum(x.nbytes for x in results)
    computed = extra_bytes(*shape, dtype, features_gradient=wanted[0], max_logit_bytes=limit)
    assert ours.peak - given <= computed
    one_head = classes * (width * dtype.itemsize + 64 * (dtype.itemsize + 1) + 64)
    small = 4 * heads * (rows + classes + 128) + (4 * rows * width if wanted[0] else 0)
    assert computed <= max(limit, one_head) + small


def test_blocks_are_equal_and_aligned() -> None:
    """52 heads that fit in three blocks; rows of logits are multiples of 16 bytes for odd numbers of classes too."""
    for classes, expected in ((1000, 18), (1001, 16), (1004, 18)):
        assert probe_loss._blocks(4096, 1024, 52, classes, 2, True, 2**28)[:2] == (expected, 4096), classes
    assert probe_loss._blocks(100_000, 1024, 4, 1000, 2, True, 2**27)[:2] == (1, 52_864)
    assert probe_loss._blocks(1000, 1024, 4, 1000, 2, True, 1)[:2] == (1, 64)


def test_extra_memory_is_a_small_part_of_eager() -> None:
    """52 heads of 1000 classes, 4096 rows in bf16: forward and backward against eager's forward pass alone."""
    shape = rows, width, heads, classes = 4096, 1024, 52, 1000
    with FakeTensorMode():
        features = torch.empty(rows, width, device="cuda", dtype=torch.bfloat16)
        weight = torch.empty(heads, classes, width, device="cuda", requires_grad=True)
        labels = torch.empty(rows, device="cuda", dtype=torch.int64)
        with LiveBytes(features, weight, labels) as eager:
            multi_head_cross_entropy(features, weight, None, labels, kernel="reference")
    assert extra_bytes(*shape) <= eager.peak / 8
    if torch.cuda.is_available():
        features, weight, bias, labels = example(*shape, device="cuda", dtype=torch.bfloat16)
        weight.requires_grad_()
        features[:8] @ features[:8].T  # the vendor library's workspace, which stays
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        multi_head_cross_entropy(features, weight, bias, labels, kernel="triton").sum().backward()
        assert weight.grad is not None
        assert torch.cuda.max_memory_allocated() - before - weight.nbytes <= extra_bytes(*shape) + 2**24
