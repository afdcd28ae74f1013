"""DDN: the published runs, foolbox's, what must hold of every result, and what the variants do otherwise."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attacks.ddn import ddn, vote
from attacks.pgd import cross_entropy
from tests.test_pgd import Seen, adv_lib, example, published, smooth_net

__all__ = ["published"]  # a fixture


def run_again(model: nn.Module, images: Tensor, stored: dict[str, Any], tag: str, few: slice = slice(0, 8)) -> Tensor:
    """The adversarial images of some images of a stored run."""
    images, labels = images[few], torch.from_numpy(stored["labels"])[few]
    if tag.startswith("fb_"):
        assert tag == "fb_ddn_1.0_0.05_10"
        return ddn(model, images, labels, steps=10, quantise=False, variant="foolbox")
    steps = int(tag.rpartition("_s")[2])
    if match := re.fullmatch(r"ddn_(noise|multi)(\d?)_e([\d.]+)_s\d+", tag):
        eps, noise = float(match[3]), torch.from_numpy(stored[f"noise{match[2] or 1}"])
        noise = noise.unflatten(0, (8, -1))[few].flatten(0, 1)
        return ddn(model, images, labels, steps=steps, init_norm=eps, max_norm=eps, noise=noise)
    return ddn(model, images, labels, steps=steps, quantise="noq" not in tag)


def test_published_runs_in_float64(published: Any) -> None:
    """8-bit images exactly; the last image is misclassified as it is and, without noise, comes back so.

    Long runs on the last three images only: a float64 convolution is slow.
    """
    model, images, stored = published(torch.float64)
    tags = [tag for tag in stored["tags"] if "ddn" in tag]
    assert len(tags) == 11
    for tag in tags:
        few = slice(0, 8) if tag.endswith("s4") else slice(5, 8)
        clean, adv = images[few], run_again(model, images, stored, tag, few)
        if f"{tag}/adv_q" in stored:
            expected = torch.from_numpy(stored.get(f"{tag}/adv_q_f64", stored[f"{tag}/adv_q"]))[few]
            assert torch.equal((255 * adv).round().short(), expected), tag
            assert (255 * adv - (255 * adv).round()).abs().max() <= 1e-4, tag
        else:
            assert (adv - clean - torch.from_numpy(stored[f"{tag}/delta"])[few]).abs().max() <= 2e-6, tag
        assert "clean" not in tag or torch.equal(adv[-1], clean[-1])
        with torch.no_grad():
            assert model.eval()(adv).argmax(1).tolist() == stored[f"{tag}/pred"][few].tolist(), tag
        model.train()


def test_published_runs_in_float32(published: Any) -> None:
    """Kinks turn single pixels by a level, folded or not, and on some processors an image's length by 3 %."""
    model, images, stored = published(torch.float32)
    distances = []
    for tag in stored["tags"]:
        if "ddn" in tag and not tag.endswith("s10"):
            adv = run_again(model, images, stored, tag)
            whole = f"{tag}/adv_q" in stored
            expected = (
                torch.from_numpy(stored[f"{tag}/adv_q"]) / 255 if whole else torch.from_numpy(stored[f"{tag}/delta"])
            )
            distance = (adv - expected - (0 if whole else images)).flatten(1).norm(dim=1)
            assert distance.max() <= 0.15, tag
            norms, others = (adv - images).flatten(1).norm(dim=1), torch.from_numpy(stored[f"{tag}/norm"])
            off = (norms - others).abs() / others.clamp(min=1e-6)
            assert off.max() <= 0.05, tag
            assert (off > 0.02).sum() <= 1, tag
            assert adv.min() >= 0
            assert adv.max() <= 1
            distances.append(distance)
    assert (torch.cat(distances) <= 1e-3).float().mean() >= 0.75


@pytest.mark.parametrize("aimed", [False, True])
def test_foolbox_agrees(aimed: bool) -> None:
    foolbox = pytest.importorskip("foolbox", reason="foolbox, an oracle of DDN, is not installed")
    net, (images, labels) = smooth_net(), example(6)
    net, images = net.double(), images.double()
    theirs = foolbox.attacks.DDNAttack(init_epsilon=0.5, steps=15, gamma=0.1)
    model = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
    kinds = foolbox.criteria
    criterion = kinds.TargetedMisclassification(labels) if aimed else kinds.Misclassification(labels)
    expected = theirs.run(model, images, criterion)
    ours = ddn(
        net, images, labels, steps=15, init_norm=0.5, gamma=0.1, quantise=False, targeted=aimed, variant="foolbox"
    )
    assert (ours - expected).abs().max() <= 1e-9
    assert (ours != images).any()


@pytest.mark.parametrize("aimed", [False, True])
def test_adv_lib_agrees(aimed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its step sizes are foolbox's, it rounds as the published code does, and starts from 8-bit images."""
    theirs = adv_lib("decoupled_direction_norm", monkeypatch)
    net, images, labels = correct(6)
    labels = (labels + 1) % 5 if aimed else labels
    net, images = net.double(), images.double()
    expected = theirs.ddn(net, images, labels, targeted=aimed, steps=15, γ=0.1, init_norm=0.5, levels=256)
    ours = ddn(net, images, labels, steps=15, init_norm=0.5, gamma=0.1, targeted=aimed, variant="foolbox")
    assert (255 * (ours - expected)).abs().max() <= 1e-9
    assert (ours != images).any()


def correct(samples: int = 8) -> tuple[nn.Module, Tensor, Tensor]:
    """A net, 8-bit images and what it takes them for."""
    net, (images, _) = smooth_net(), example(samples)
    images = (255 * images).round() / 255
    with torch.no_grad():
        return net, images, net(images).argmax(1)


@pytest.mark.parametrize("form", ["plain", "channels_last"])
@pytest.mark.parametrize("variant", ["published", "foolbox", "corrected"])
@pytest.mark.parametrize("aimed", [False, True])
def test_results_fool_the_model_or_are_the_input(aimed: bool, variant: Any, form: str) -> None:
    net, images, labels = correct()
    labels = (labels + 1) % 5 if aimed else labels
    memory_format = torch.channels_last if form == "channels_last" else torch.contiguous_format
    images = images.contiguous(memory_format=memory_format)
    before = images.clone()
    adv = ddn(net.train(), images, labels, steps=30, targeted=aimed, variant=variant)
    assert all(part.training for part in net.modules())
    assert torch.equal(images, before)
    assert adv.is_contiguous(memory_format=memory_format)
    assert not adv.requires_grad
    with torch.no_grad():
        fooled = (net.eval()(adv).argmax(1) == labels) == aimed
    same = (adv == images).flatten(1).all(1)
    assert bool((fooled | same).all())
    assert fooled.sum() >= 4
    levels = 255 * adv
    assert (levels - levels.round()).abs().max() <= 1e-4
    assert all(weight.grad is None for weight in net.parameters())


def test_more_steps_find_nearer_images() -> None:
    net, images, labels = correct(20)
    lengths = []
    for steps in (10, 40, 160):
        adv = ddn(net, images, labels, steps=steps, quantise=False)
        length = (adv - images).flatten(1).norm(dim=1)
        lengths.append(torch.where(length > 0, length, torch.inf).median())
    assert lengths[2] <= lengths[1] <= lengths[0]
    assert lengths[2] < 0.98 * lengths[0]


def test_only_the_corrected_variant_keeps_max_norm_after_rounding() -> None:
    net, images, labels = correct(20)
    longest: dict[str, float] = {}
    for variant in ("published", "corrected"):
        adv = ddn(net, images, labels, steps=20, init_norm=0.08, max_norm=0.08, variant=variant)  # type: ignore[arg-type]
        longest[variant] = float((adv - images).flatten(1).norm(dim=1).max())
        levels = 255 * adv
        assert (levels - levels.round()).abs().max() <= 1e-4
    assert longest["published"] > 0.0801
    assert 0 < longest["corrected"] <= 0.08 * (1 + 1e-6)
    free = ddn(net, images, labels, steps=20, init_norm=0.08, max_norm=0.05, quantise=False)
    assert (free - images).flatten(1).norm(dim=1).max() <= 0.05 * (1 + 1e-6)


def test_only_the_corrected_variant_looks_at_the_last_iterate() -> None:
    """One step that fools the model: the published code sees the clean image alone."""
    net, images, labels = correct()
    options: dict[str, Any] = {"steps": 1, "init_norm": 4.0}
    assert torch.equal(ddn(net, images, labels, **options), images)
    adv = ddn(net, images, labels, **options, variant="corrected")
    with torch.no_grad():
        assert (net(adv).argmax(1) != labels).any()
    assert not torch.equal(adv, images)


def test_copies_vote_and_ties_go_to_the_lowest_class() -> None:
    given = torch.tensor([[2, 1, 2], [2, 1, 0], [4, 4, 3], [3, 1, 3]])
    logits = nn.functional.one_hot(given.flatten(), 5).float()
    assert vote(logits, 4).tolist() == [2, 0, 4, 3]
    assert vote(logits, 12).tolist() == given.flatten().tolist()


def test_a_radius_and_a_bound_for_each_image() -> None:
    net, images, labels = correct(3)
    norms = torch.tensor([0.2, 0.5, 1.0])
    whole = ddn(net, images, labels, steps=8, init_norm=norms, max_norm=norms)
    for i, norm in enumerate(norms.tolist()):
        alone = ddn(net, images[i : i + 1], labels[i : i + 1], steps=8, init_norm=norm, max_norm=norm)
        assert (whole[i] - alone[0]).abs().max() <= 1e-6


def test_a_gradient_of_zero_stays_or_is_drawn() -> None:
    class Flat(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            far = (images - 0.5).flatten(1).norm(dim=1) > 0.9
            return (images * 0).sum((1, 2, 3))[:, None] + nn.functional.one_hot(far.long(), 5)

    images, labels = torch.full((2, 3, 8, 8), 0.5), torch.zeros(2, dtype=torch.int64)
    options: dict[str, Any] = {"steps": 6, "quantise": False}
    assert torch.equal(ddn(Flat(), images, labels, **options), images)
    adv = ddn(Flat(), images, labels, **options, zero_gradient="randn", generator=torch.Generator().manual_seed(0))
    assert ((adv - images).flatten(1).norm(dim=1) > 0.9).all()
    assert not torch.equal(adv[0], adv[1])


def test_no_steps_no_norm_and_no_images() -> None:
    net, images, labels = correct()
    for change in ({"steps": 0}, {"steps": 3, "max_norm": 0.0}):
        adv = ddn(net, images, labels, **change)  # type: ignore[arg-type]
        assert torch.equal(adv, images)
        assert adv.data_ptr() != images.data_ptr()
    assert ddn(net, images[:0], labels[:0], steps=3).shape == (0, 3, 8, 8)


def test_the_host_does_not_wait_within_the_loop() -> None:
    net, images, labels = correct()
    noise = 0.1 * torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for variant in ("published", "corrected"):
        with Seen() as seen:
            ddn(net, images, labels, steps=4, max_norm=0.5, noise=noise, check_images=False, variant=variant)  # type: ignore[arg-type]
        assert not {"_local_scalar_dense", "is_nonzero", "nonzero", "equal"} & set(seen.counts)


def test_refused() -> None:
    net, images, labels = correct(4)
    good: dict[str, Any] = {"model": net, "images": images, "labels": labels, "steps": 3}
    for change, message in (
        ({"images": 2 * images - 1}, "beyond \\[0, 1\\]: normalisation"),
        ({"images": (255 * images).byte()}, "have type torch.uint8"),
        ({"images": images * float("nan")}, "reach from nan to nan"),
        ({"labels": labels[:3]}, "do not fit"),
        ({"labels": labels[:, None]}, "must be classes \\[4\\]"),
        ({"steps": -1}, "steps must be at least 0, not -1"),
        ({"gamma": 1.0}, "gamma must be in \\(0, 1\\), not 1.0"),
        ({"init_norm": 0.0}, "init_norm must be above 0, not 0.0"),
        ({"max_norm": -1.0}, "max_norm must be at least 0, not -1.0"),
        ({"max_norm": torch.ones(3)}, "max_norm \\(3,\\) must be a number or \\[4\\]"),
        ({"noise": images[:3]}, "noise \\(3, 3, 8, 8\\) does not fit"),
        ({"variant": "original"}, "variant must be 'published', 'foolbox' or 'corrected', not 'original'"),
        ({"zero_gradient": "draw"}, "zero_gradient must be 'rest' or 'randn', not 'draw'"),
        ({"precision": "fp16"}, "underflow in fp16"),
    ):
        with pytest.raises(ValueError, match=message):
            ddn(**{**good, **change})


def test_the_loss_is_raised_by_its_direction() -> None:
    """The radius grows until the model is fooled: then the loss is above log 2, unless no class had the majority."""
    net, images, labels = correct()
    adv = ddn(net, images, labels, steps=40, quantise=False)
    moved = (adv != images).flatten(1).any(1)
    assert moved.any()
    with torch.no_grad():
        assert (cross_entropy(net(adv), labels) > cross_entropy(net(images), labels))[moved].all()
