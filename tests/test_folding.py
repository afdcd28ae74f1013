"""Batch norms folded for the time of an attack: the same function and attack, the model untouched, and where not."""

import copy
import gc
import random
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from attacks.folding import _plans, fold
from attacks.pgd import cross_entropy, evaluate, pgd, under_attack
from models.classifiers import load_classifier
from models.small import SMALL_NETS
from tests.test_pgd import L2, LINF, Normalised, example, smooth_net


class Plain(nn.Module):
    """Convolution, batch norm, activation; `after` says what forward does with them."""

    def __init__(self, after: Callable[[Any, Tensor], Tensor] | None = None, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 6, 3, **{"padding": 1, "bias": False, **options})
        self.norm = nn.BatchNorm2d(6)
        self.after = after
        self.flag = True
        for values in (self.norm.weight, self.norm.bias, self.norm.running_mean):
            nn.init.normal_(values)  # type: ignore[arg-type]
        nn.init.uniform_(self.norm.running_var, 0.5, 2)  # type: ignore[arg-type]
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        if self.after is not None:
            return self.after(self, images)
        return torch.tanh(self.norm(self.conv(images))).mean((2, 3))


def norms_run(model: nn.Module, images: Tensor) -> int:
    """How many batch norms one pass computes."""
    from tests.test_pgd import Seen

    with torch.no_grad(), Seen() as seen:
        model(images)
    return seen.counts.get("native_batch_norm", 0) + seen.counts.get("_native_batch_norm_legit_no_training", 0)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def count_norms(model: nn.Module) -> int:
    return sum(isinstance(part, nn.BatchNorm2d) for part in model.modules())


# --- The same function ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("cifar_resnet20", 0),
        ("vgg19_bn", 0),
        ("mnist_resnet18", 0),
        ("densenet121", 62),  # those whose input is no convolution's output alone
        ("torchvision:resnet18", 0),
    ],
)
def test_classifiers_are_folded_and_stay_the_same_function(name: str, left: int) -> None:
    """Logits and gradients, up to what roundings and the kinks they move do in float32; with the frequency flip too."""
    torch.manual_seed(0)
    model = load_classifier(name, weights=False, num_classes=10)
    size = model.image_size = min(model.image_size, 64)
    images, labels = torch.rand(2, model.channels, size, size), torch.tensor([3, 1])
    model.train()
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = 0.5
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias)
    with torch.no_grad():
        model(torch.rand_like(images))
    model.eval()
    for flip in (False, True) if name == "cifar_resnet20" else (False,):
        model.flip = flip
        folded = fold(model)
        assert folded is not model
        assert norms_run(folded, images) == left
        found, expected = (evaluate(network, images, labels, cross_entropy) for network in (folded, model))
        assert relative(found[0], expected[0]) <= 1e-5
        assert relative(found[2], expected[2]) <= 1e-2


@pytest.mark.parametrize(
    "options",
    [
        {"bias": True},
        {"groups": 3},
        {"stride": 2, "dilation": 2},
        {"padding": 2, "padding_mode": "reflect"},
        {"padding": "same"},
    ],
)
def test_every_form_of_convolution(options: dict[str, Any]) -> None:
    model, images = Plain(**options).double(), example()[0].double()
    folded = fold(model)
    assert norms_run(folded, images) == 0
    assert relative(folded(images), model(images)) <= 1e-14
    model.norm = nn.BatchNorm2d(6, affine=False, eps=0.1).double().eval()
    folded = fold(model)
    assert norms_run(folded, images) == 0
    assert relative(folded(images), model(images)) <= 1e-14


@pytest.mark.parametrize("options", [L2, LINF])
def test_the_same_adversarial_images(options: dict[str, Any], goldens: Path) -> None:
    """Of a trained network in float64, and of a smooth one in float32."""
    small = SMALL_NETS["cifar_resnet20"]
    net = small.build(10)
    net.load_state_dict(load_file(goldens / "cifar_resnet20.safetensors"))
    stored = np.load(goldens / "attacks.npz")
    mean, std = (torch.tensor(values)[:, None, None].double() for values in (small.mean, small.std))
    trained = Normalised(net.double(), mean, std)
    images, labels = torch.from_numpy(stored["images_u8"])[:4] / 255, torch.from_numpy(stored["labels"])[:4]
    found, expected = (pgd(trained, images.double(), labels, **options, fold=on) for on in (True, False))
    assert (found - expected).abs().max() <= 1e-9
    smooth, (images, labels) = smooth_net(), example()
    found, expected = (pgd(smooth, images, labels, **options, fold=on) for on in (True, False))
    assert (found - expected).abs().max() <= 1e-6
    assert options is LINF or not torch.equal(found, expected)  # else nothing was folded; signs hide roundings


def test_bf16_casts_each_folded_weight_once() -> None:
    """Also of a frozen model; and without autocast the same network computes in float32."""
    from tests.test_pgd import Seen

    model, (images, labels) = smooth_net().requires_grad_(False), example()
    with under_attack(model, images.device, precision="bf16") as network:
        evaluate(network, images, labels, cross_entropy)
        with Seen() as seen:
            logits = evaluate(network, images, labels, cross_entropy)[0]
        again = seen.counts["_to_copy"]
        with torch.autocast("cpu", enabled=False):
            exact = network(images)
    assert (logits - exact).abs().max() <= 0.05
    assert relative(exact, model(images)) <= 1e-6
    with under_attack(
        copy.deepcopy(model).requires_grad_(True), images.device, precision="bf16", fold=False
    ) as network:
        evaluate(network, images, labels, cross_entropy)
        with Seen() as seen:
            evaluate(network, images, labels, cross_entropy)
    # What is not folded is frozen and cast at every step: a convolution and a linear layer, with biases.
    assert again == seen.counts["_to_copy"] + 4


def test_code_that_asks_whether_it_has_a_tensor_is_traced_as_it_runs() -> None:
    def asking(self: Any, images: Tensor) -> Tensor:
        if torch.is_tensor(images):
            images = (images - 0.5) / 0.25
        maps = self.norm(self.conv(images))
        return maps.mean((2, 3)) if isinstance(maps, Tensor) else maps

    model, images = Plain(asking), example()[0]
    folded = fold(model)
    assert relative(folded(images), model(images)) <= 1e-6
    assert norms_run(folded, images) == 0


def test_a_whole_network_runs_channels_last_unless_its_code_looks_at_strides() -> None:
    formats = []

    def wanted(self: Any, images: Tensor) -> Tensor:
        return torch.tanh(self.norm(self.conv(images))).mean((2, 3))

    def strided(self: Any, images: Tensor) -> Tensor:
        maps = self.norm(self.conv(images))
        return maps.view(maps.size(0), 6, -1).mean(2)

    def branching(self: Any, images: Tensor) -> Tensor:
        if type(images) is Tensor:  # no proxy of a trace
            formats.append(images.is_contiguous())
        return self.inner(images) if images.ndim == 4 else images

    images = example()[0]
    for form, expected in ((wanted, True), (strided, False)):
        inner = Plain(form)
        folded = fold(inner)
        seen: list[Tensor] = []
        graph: Any = vars(folded)["forward"]
        graph = getattr(graph, "_network", graph)
        graph.folded_0.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(inputs[0]))
        assert relative(folded(images), inner(images)) <= 1e-6
        assert seen[0].is_contiguous(memory_format=torch.channels_last) == expected
    outer = Plain(branching)
    outer.inner = Plain(wanted)
    assert relative(fold(outer)(images), outer(images)) <= 1e-6
    assert norms_run(fold(outer), images) == 0
    assert all(formats)  # what cannot be traced gets the images as they are


# --- The model stays as it is -----------------------------------------------------------------------------------------


def test_nothing_of_the_model_changes() -> None:
    model = load_classifier("cifar_resnet20", weights=False).train()
    model.net.get_submodule("layer2").requires_grad_(False)
    images = torch.rand(2, 3, 32, 32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = [dict(vars(part)) for part in model.modules()]
    tensors = [{**part._parameters, **part._buffers} for part in model.modules()]
    flags = [weight.requires_grad for weight in model.parameters()]
    pgd(model, images, torch.tensor([0, 1]), **L2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(part.training for part in model.modules())
    assert [weight.requires_grad for weight in model.parameters()] == flags
    assert all(weight.grad is None for weight in model.parameters())
    for part, own, held in zip(model.modules(), attributes, tensors, strict=True):
        assert vars(part).keys() == own.keys()
        assert all(vars(part)[key] is own[key] for key in own)
        now = {**part._parameters, **part._buffers}
        assert all(now[key] is held[key] for key in held)


def test_changes_between_attacks_are_seen() -> None:
    """Weights trained, loaded or replaced; statistics; modules; flags that forward asks for."""

    def asks(self: Any, images: Tensor) -> Tensor:
        maps = self.norm(self.conv(images))
        return (maps if self.flag else maps.sigmoid()).mean((2, 3)) * self.scale

    net, images = Plain(asks), example()[0]
    model: Any = net
    model.scale = nn.Parameter(torch.tensor(2.0))
    model.register_buffer("unused", torch.zeros(1))

    def change(what: str) -> None:
        with torch.no_grad():
            if what == "trained":
                model.conv.weight.mul_(1.5)
                model.scale.add_(1)
            elif what == "loaded":
                model.load_state_dict({name: 0.5 * value for name, value in model.state_dict().items()}, assign=True)
            elif what == "replaced":
                model.conv.weight = nn.Parameter(2 * model.conv.weight)
                model.scale = nn.Parameter(torch.tensor(5.0))
            elif what == "statistics":
                model.train()(images)
                model.eval()
            elif what == "module":
                model.norm = nn.BatchNorm2d(6).eval()
            elif what == "flag":
                model.flag = False

    last = torch.empty(0)
    for what in ("nothing", "trained", "loaded", "replaced", "statistics", "module", "flag"):
        change(what)
        folded = fold(model)
        assert norms_run(folded, images) == 0
        expected = model(images)
        assert relative(folded(images), expected) <= 1e-6, what
        assert not len(last) or relative(expected, last) > 1e-3, what
        last = expected


def test_a_model_is_traced_once_and_forgotten_with_the_model() -> None:
    traced = []

    def counts(self: Any, images: Tensor) -> Tensor:
        traced.append(type(images))
        return self.norm(self.conv(images)).mean((2, 3))

    model, images = Plain(counts), example()[0]
    expected = model(images)
    for _ in range(3):
        assert relative(fold(model)(images), expected) <= 1e-6
    assert len(traced) == 2
    size = len(_plans)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    assert len(_plans) < size


# --- Where nothing is folded ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "global"])
def test_hooks_fire_because_folding_is_off(kind: str) -> None:
    model, (images, labels) = smooth_net(), example()
    fired: list[str] = []

    def hook(*_arguments: Any) -> None:
        fired.append(kind)

    if kind == "global":
        handle = nn.modules.module.register_module_forward_hook(hook)
    else:
        handle = getattr(model.norm, f"register_{kind}_hook")(hook)
    try:
        assert fold(model) is model
        pgd(model, images, labels, **L2)
    finally:
        handle.remove()
    assert len(fired) >= L2["steps"]
    assert fold(model) is not model


def test_compiled_scripted_and_patched_models_run_as_they_are() -> None:
    model, images = smooth_net(), example()[0]
    compiled: Any = torch.compile(model, backend="eager")
    assert fold(compiled) is compiled
    in_place = copy.deepcopy(model)
    in_place.compile(backend="eager")
    assert fold(in_place) is in_place
    parallel = nn.DataParallel(copy.deepcopy(model))
    assert fold(parallel) is parallel
    scripted = torch.jit.trace(copy.deepcopy(model), images)
    assert fold(scripted) is scripted
    patched = copy.deepcopy(model)
    patched.forward = lambda images: model(images) + 1  # type: ignore[method-assign]
    assert fold(patched) is patched


@pytest.mark.parametrize("what", ["training", "no statistics", "parametrised", "used twice", "shared", "norm first"])
def test_pairs_of_another_form_are_left_alone(what: str) -> None:
    def twice(self: Any, images: Tensor) -> Tensor:
        maps = self.conv(images)
        return (self.norm(maps) + maps).mean((2, 3))

    def shared(self: Any, images: Tensor) -> Tensor:
        return (self.norm(self.conv(images)) + self.conv(images.flip(3))).mean((2, 3))

    def first(self: Any, images: Tensor) -> Tensor:
        return self.conv(self.norm(images.repeat(1, 2, 1, 1))[:, :3]).mean((2, 3))

    model, images = Plain({"used twice": twice, "shared": shared, "norm first": first}.get(what)), example()[0]
    if what == "training":
        model.norm.train()
    elif what == "no statistics":
        model.norm = nn.BatchNorm2d(6, track_running_stats=False).eval()
    elif what == "parametrised":
        parametrizations.weight_norm(model.conv)
    found = fold(model)
    assert found is model
    with under_attack(model, images.device, eval_mode=False) as network:
        assert torch.equal(network(images), model(images))


TRACES: dict[str, Callable[[Any, Tensor], Tensor]] = {}


def refused(function: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    TRACES[function.__name__] = function
    return function


@refused
def random_in_python(self: Any, images: Tensor) -> Tensor:
    return self.inner(images) * random.random()


@refused
def random_in_numpy(self: Any, images: Tensor) -> Tensor:
    return self.inner(images) * float(np.random.rand())


@refused
def random_in_torch(self: Any, images: Tensor) -> Tensor:
    return self.inner(images + 0.1 * torch.randn(3, 8, 8))


@refused
def constant(self: Any, images: Tensor) -> Tensor:
    return self.inner(images) * torch.arange(6)


@refused
def without_gradient(self: Any, images: Tensor) -> Tensor:
    with torch.no_grad():
        shift = images.mean()
    return self.inner(images - shift)


@refused
def without_autocast(self: Any, images: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return self.inner(images)


@refused
def remembers(self: Any, images: Tensor) -> Tensor:
    self.flag = self.inner(images)
    return self.flag


@refused
def branches(self: Any, images: Tensor) -> Tensor:
    if images.shape[1:] != (3, 8, 8):
        raise ValueError(f"images {tuple(images.shape)}")
    return self.inner(images)


@pytest.mark.parametrize("name", list(TRACES))
def test_code_that_a_trace_would_not_repeat_runs_as_it_is(name: str) -> None:
    """What it calls is folded all the same, and it may ask for attributes of what it calls."""

    def run(network: nn.Module) -> tuple[Tensor, Tensor]:
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        values, _, gradient = evaluate(network, images, torch.zeros(len(images), dtype=torch.int64), cross_entropy)
        return values, gradient

    outer, images = Plain(TRACES[name]), example()[0]
    outer.inner = Plain(bias=True)
    expected = run(outer)
    remembered = outer.flag
    folded = fold(outer)
    assert outer.flag is remembered
    assert norms_run(folded, images) == 0
    bound = 2e-2 if name == "without_autocast" else 1e-6
    assert all(relative(*pair) <= bound for pair in zip(run(folded), expected, strict=True))
    if name == "branches":
        with pytest.raises(ValueError, match="images"):
            folded(images[..., :4])


def test_forward_may_use_attributes_of_what_is_folded() -> None:
    def peeks(self: Any, images: Tensor) -> Tensor:
        maps = self.inner(images)
        return maps * self.inner.conv.weight.mean() if maps.ndim == 2 else maps

    outer, images = Plain(peeks), example()[0]
    outer.inner = Plain()
    assert relative(fold(outer)(images), outer(images)) <= 1e-6
    assert norms_run(fold(outer), images) == 0


def test_a_net_without_batch_norm_runs_as_it_is() -> None:
    model = load_classifier("lenet", weights=False)
    assert fold(model) is model
    images = torch.rand(2, 1, 28, 28)
    with under_attack(model, images.device) as network:
        assert torch.equal(network(images), model(images))
