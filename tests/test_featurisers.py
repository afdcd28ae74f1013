"""What stands between features and a head: reversible, drawn by seed, with fixed statistics, kept in the file."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import ModelError
from models.featurisers import (
    BasicBlock,
    Featuriser,
    ResidualBlock,
    ReversibleBlock,
    build_featuriser,
    featuriser_header,
    joined,
    random_transform,
)
from models.heads import load_head, save_head


def clouds(n: int = 200, width: int = 12, scale: float = 0.05) -> Tensor:
    return scale * torch.randn(n, width, generator=torch.Generator().manual_seed(0)) + 0.3 * scale


def test_blocks_are_their_formulas() -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 6)

    def norm(values: Tensor) -> Tensor:
        return (values - values.mean(0)) / (values.var(0, unbiased=False) + 1e-5).sqrt()

    basic = BasicBlock(6)
    assert torch.allclose(basic(x), norm(x @ basic.linear.weight.T).relu(), atol=1e-5)

    def hidden(layer: nn.Sequential, values: Tensor) -> Tensor:
        one, two = layer[0], layer[3]
        assert isinstance(one, nn.Linear)
        assert isinstance(two, nn.Linear)
        return norm(values @ one.weight.T).relu() @ two.weight.T + (0 if two.bias is None else two.bias)

    residual = ResidualBlock(6)
    assert torch.allclose(residual(x), (x + norm(hidden(residual.residual, x))).relu(), atol=1e-5)
    reversible = ReversibleBlock(6)
    first = x[:, :3] + hidden(reversible.first, x[:, 3:])
    second = x[:, 3:] + hidden(reversible.second, first)
    assert torch.allclose(reversible(x), torch.cat([first, second], 1), atol=1e-5)


@pytest.mark.parametrize("scale", [0.02, 0.5])
def test_a_transform_is_reversible_and_not_linear(scale: float) -> None:
    features = clouds(scale=scale)
    transform = random_transform(12, 3, seed=4, features=features).double()
    out = back = transform(features.double())
    for block in reversed(list(transform.transform)):
        assert isinstance(block, ReversibleBlock)
        back = block.inverse(back)
    assert torch.allclose(back, features.double(), rtol=0, atol=1e-10)
    # What it makes of a mean is not the mean of what it makes.
    middle = (features[:100] + features[100:]).double() / 2
    gap = (transform(middle) - (out[:100] + out[100:]) / 2).std()
    assert gap > 0.2 * out.std()


def test_a_transform_depends_on_seed_and_features_alone() -> None:
    features = clouds()
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    one = random_transform(12, 2, seed=0, features=features)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    two, other = (random_transform(12, 2, seed=seed, features=features) for seed in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    assert not torch.allclose(one(features), other(features))
    # Each sample by itself, in whatever batch it comes, also where the module is told to train.
    assert torch.allclose(one.train()(features)[7], one(features[7:8])[0], atol=1e-6)
    assert not any(parameter.requires_grad for parameter in one.parameters())


def test_batch_norm_of_a_transform_has_the_statistics_of_what_it_sees() -> None:
    features = clouds()
    transform = random_transform(12, 2, seed=0, features=features)
    seen: dict[Any, Tensor] = {}
    for module in transform.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.register_forward_hook(lambda norm, inputs, output: seen.update({norm: inputs[0]}))
    transform(features)
    assert len(seen) == 4
    for norm, values in seen.items():
        assert torch.allclose(norm.running_mean, values.mean(0), atol=1e-6)
        assert torch.allclose(norm.running_var, values.var(0, unbiased=False), rtol=1e-4)


@pytest.mark.parametrize("kind", ["basic", "residual", "reversible"])
def test_a_file_keeps_transform_and_layers(kind: Any, tmp_path: Path) -> None:
    features = clouds(width=8)
    transform = random_transform(8, 2, seed=0, features=features)
    torch.manual_seed(0)
    layers = Featuriser(8, kind=kind, layers=2)
    layers(features)  # moves batch norm's statistics
    weight, bias = torch.randn(3, 8), torch.randn(3)
    expected = F.normalize(layers.eval()(transform(features))) @ weight.T + bias
    both = joined(transform, layers)
    assert both is not None
    save_head(tmp_path / "h.safetensors", weight, bias, ["a", "b", "c"], normalize=True, featuriser=both)
    head = load_head(tmp_path / "h.safetensors", ["a", "b", "c"], 8)
    assert torch.allclose(head.logits(features), expected, atol=1e-5)
    assert featuriser_header(both) == {"width": 8, "transform_blocks": 2, "kind": kind, "layers": 2}
    with pytest.raises(ModelError, match="takes linear heads only"):
        head.require_linear("h.safetensors", "this")
    with pytest.raises(ModelError, match="takes 8 features, the encoder gives 6"):
        load_head(tmp_path / "h.safetensors", None, 6)


def test_joining_one_or_none() -> None:
    layers = Featuriser(4, layers=1)
    assert joined(None, None) is None
    assert joined(None, layers) is layers


@pytest.mark.parametrize(
    "change",
    [{"kind": "deep"}, {"layers": -1}, {"layers": True}, {"width": 0}, {"width": "8"}, {"more": 1}],
)
def test_foreign_headers_are_one_line(change: dict[str, Any]) -> None:
    header = {"width": 8, "transform_blocks": 1, "kind": "basic", "layers": 1, **change}
    with pytest.raises(ModelError) as caught:
        build_featuriser(header)
    assert "\n" not in str(caught.value)


def test_odd_widths_have_no_reversible_blocks() -> None:
    with pytest.raises(ModelError, match="7 features: reversible blocks halve them"):
        random_transform(7, 1, 0, clouds(width=7))
