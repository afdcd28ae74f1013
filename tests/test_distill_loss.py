"""The distillation loss in plain PyTorch against formulas in float64, with gradients."""

import pytest
import torch

from kernels.distill_loss import projected_distill_loss, token_gram


def double(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("kind", ["mse", "cosine"])
@pytest.mark.parametrize("projected", [True, False])
@pytest.mark.parametrize("leading", [(5,), (2, 3), (1,)])
def test_gradcheck(kind: str, projected: bool, leading: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    features = double(*leading, 7 if projected else 4)
    weight, bias = (double(4, 7), double(4)) if projected else (None, None)
    target = torch.randn(*leading, 4, dtype=torch.float64)
    inputs = [x for x in (features, weight, bias) if x is not None]

    def loss(
        features: torch.Tensor, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return projected_distill_loss(features, weight, bias, target, kind)  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(loss, inputs)


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
    with pytest.raises(ValueError, match="kind"):
        projected_distill_loss(torch.ones(3, 4), None, None, torch.ones(3, 4), "l1")  # type: ignore[arg-type]


def test_token_gram() -> None:
    tokens = torch.randn(2, 5, 9, dtype=torch.float64)
    expected = torch.einsum("nie,nje->nij", tokens, tokens) / 3
    assert torch.allclose(token_gram(tokens), expected, rtol=0, atol=1e-12)
