"""DeepFool: the stored run, foolbox, and what must hold of every result."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attacks.deepfool import deepfool
from tests.test_pgd import example, published, smooth_net

__all__ = ["published"]  # a fixture


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 2e-6), (torch.float32, 1e-3)])
def test_the_stored_run(published: Any, dtype: torch.dtype, tolerance: float) -> None:
    model, images, stored = published(dtype)
    tag = "fb_deepfool_0_0.02_10"
    adv = deepfool(model, images, torch.from_numpy(stored["labels"]), steps=10)
    expected = torch.from_numpy(stored.get(f"{tag}/delta_f64", stored[f"{tag}/delta"]))
    assert (adv - images - expected).flatten(1).norm(dim=1).max() <= tolerance
    assert torch.equal(adv[-1], images[-1])  # the model is wrong about it as it is
    with torch.no_grad():
        assert model.eval()(adv).argmax(1).tolist() == stored[f"{tag}/pred"].tolist()
    assert all(weight.grad is None for weight in model.parameters())


def answered(net: nn.Module, samples: int) -> tuple[Tensor, Tensor]:
    """Images in the type of the net, and its own answers."""
    images = example(samples)[0].to(next(net.parameters()).dtype)
    with torch.no_grad():
        return images, net(images).argmax(1)


@pytest.mark.parametrize("candidates", [2, 4, 10])
def test_foolbox_agrees(candidates: int) -> None:
    foolbox = pytest.importorskip("foolbox", reason="foolbox, an oracle of DeepFool, is not installed")
    net = smooth_net().double()
    images, labels = answered(net, 8)
    labels[0] = (labels[0] + 1) % 5
    model = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
    theirs = foolbox.attacks.L2DeepFoolAttack(steps=6, candidates=candidates, overshoot=0.1)
    expected = theirs.run(model, images, labels)
    ours = deepfool(net, images, labels, steps=6, candidates=candidates, overshoot=0.1)
    assert (ours - expected).abs().max() <= 1e-9
    assert (ours[1:] != images[1:]).flatten(1).any(1).all()


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_results_fool_the_model_and_the_net_is_left_as_it_was(form: torch.memory_format) -> None:
    net = smooth_net()
    images, labels = answered(net, 8)
    images = images.contiguous(memory_format=form)
    before = images.clone()
    adv = deepfool(net.train(), images, labels)
    assert all(part.training for part in net.modules())
    assert torch.equal(images, before)
    assert adv.is_contiguous(memory_format=form)
    assert not adv.requires_grad
    assert 0 <= adv.min() <= adv.max() <= 1
    with torch.no_grad():
        assert (net.eval()(adv).argmax(1) != labels).all()
    one = torch.cat([deepfool(net, image[None], label[None]) for image, label in zip(images, labels, strict=True)])
    assert (one - adv).abs().max() <= 1e-5
    assert all(weight.grad is None for weight in net.parameters())


def test_no_steps_wrong_images_and_impossible_settings() -> None:
    net = smooth_net()
    images, labels = answered(net, 3)
    assert torch.equal(deepfool(net, images, labels, steps=0), images)
    assert torch.equal(deepfool(net, images, (labels + 1) % 5), images)
    assert deepfool(net, images[:0], labels[:0]).shape == images[:0].shape
    for change, said in (
        ({"steps": -1}, "at least 0"),
        ({"overshoot": -0.1}, "at least 0"),
        ({"candidates": 1}, "candidates must be at least 2"),
        ({"precision": "fp16"}, "precision"),
    ):
        with pytest.raises(ValueError, match=said):
            deepfool(net, images, labels, **change)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"beyond \[0, 1\]"):
        deepfool(net, 255 * images, labels)
    with pytest.raises(ValueError, match="must be classes"):
        deepfool(net, images, labels[:, None])
