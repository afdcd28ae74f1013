"""Classifiers by name: reference logits, files of the original research code, exports, and wrong names and files."""

import copy
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data.augment import low_pass
from kernels.dct import flip
from models import ModelError
from models.classifiers import Classifier, load_classifier, save_classifier
from models.encoders import load_encoder
from models.weights import state_sha256, write_safetensors

pytestmark = pytest.mark.timeout(300)


def pixels(classifier: Classifier, count: int = 2, seed: int = 0) -> Tensor:
    shape = count, classifier.channels, classifier.image_size, classifier.image_size
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def scrambled(classifier: Classifier) -> Classifier:
    """Every tensor other than it was made, running statistics too, so that no two could be exchanged unseen."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in classifier.net.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.rand(tensor.shape, generator=generator)
            tensor.copy_(0.5 + noise if name.endswith("running_var") else tensor + 0.1 * (noise - 0.5))
    return classifier


@torch.no_grad()
def logits(classifier: Classifier, images: Tensor) -> Tensor:
    return classifier(images)


# --- Reference figures ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("net", "weights", "reference"),
    [
        ("lenet", "lenet_mnist", "margins_mnist"),
        ("cifar_resnet20", "cifar_resnet20", "margins_cifar"),
        ("cifar_resnet20", "cifar_resnet20", "attacks"),
    ],
)
def test_logits_are_those_of_the_original_code(goldens: Path, net: str, weights: str, reference: str) -> None:
    classifier, golden = (
        load_classifier(f"{net}/{goldens / weights}.safetensors"),
        np.load(goldens / f"{reference}.npz"),
    )
    images = torch.from_numpy(golden["images_u8"]).float() / 255
    images = images.reshape(-1, classifier.channels, classifier.image_size, classifier.image_size)
    expected = torch.from_numpy(golden["logits"])
    assert (logits(classifier, images) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert not classifier.training
    assert all(parameter.requires_grad for parameter in classifier.parameters())


def test_a_flipped_classifier_sees_flipped_data_normalised_as_published() -> None:
    """Published: images are flipped first, then the flipped mean is subtracted; the std stays."""
    classifier = load_classifier("lenet", weights=False, flip=True)
    images = pixels(classifier, 5)
    mean = flip(classifier.mean.expand(1, 28, 28))
    expected = classifier.net((flip(images) - mean) / classifier.std)
    assert torch.allclose(classifier(images), expected, atol=1e-5)
    plain = copy.deepcopy(classifier)
    plain.flip = False
    assert not torch.allclose(plain(images), expected, atol=1e-3)


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("flipped", [False, True])
def test_a_low_pass_classifier_sees_what_the_data_transform_makes(published: bool, flipped: bool) -> None:
    classifier = load_classifier(
        "cifar_resnet20", weights=False, low_pass=5, low_pass_published=published, flip=flipped
    )
    images = pixels(classifier, 4).round()  # in black and white, so that filtering leaves [0, 1]
    plain = load_classifier("cifar_resnet20", weights=False, flip=flipped)
    plain.net = classifier.net
    seen = low_pass(images, 5, published=published)
    assert (seen.min() < 0) == published
    assert torch.equal(logits(classifier, images), logits(plain, seen))
    other = load_classifier("cifar_resnet20", weights=False, low_pass=5, low_pass_published=not published, flip=flipped)
    other.net = classifier.net
    assert not torch.allclose(logits(other, images), logits(classifier, images), atol=1e-3)


# --- The original research code's files -------------------------------------------------------------------------------


def shortcut_names(name: str) -> str:
    return re.sub(r"^fc\.", "linear.", name).replace("downsample", "shortcut")


def dense_names(name: str) -> str:
    """dense.0-5 are dense1.0-5, dense.6 is trans1, and so on."""
    name = re.sub(r"^classifier\.", "linear.", re.sub(r"^stem\.", "conv1.", name))
    found = re.match(r"dense\.(\d+)\.(.*)", name)
    if not found:
        return name
    place = int(found[1])
    for block, layers in enumerate((6, 12, 24, 16), start=1):
        if place < layers:
            return f"dense{block}.{place}.{found[2]}"
        if place == layers:
            return f"trans{block}.{found[2]}"
        place -= layers + 1
    raise AssertionError(name)


def after(prefix: str) -> Callable[[str], str]:
    return lambda name: prefix + name


def saved(state: dict[str, Tensor]) -> dict[str, Any]:
    """What SmoothAdv's and Cohen's training writes."""
    optimizer = {"state": {0: {"momentum_buffer": torch.zeros(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    return {"epoch": 90, "arch": "cifar_resnet110", "state_dict": state, "optimizer": optimizer}


ORIGINALS: list[tuple[str, Callable[[str], str], Callable[[dict[str, Tensor]], dict[str, Any]], str, bool]] = [
    ("lenet", after(""), dict, "model.t7", True),
    ("mnist_resnet18", after(""), dict, "model.t7", True),
    ("cifar_resnet18", shortcut_names, dict, "model.t7", True),
    (
        "cifar_resnet18",
        lambda name: f"module.{shortcut_names(name)}",
        lambda s: {"net": s, "acc": 93.5},
        "ckpt.pth",
        True,
    ),
    ("vgg19", after(""), dict, "model.t7", False),
    ("vgg19_bn", after(""), dict, "model.t7", True),
    ("densenet121", dense_names, dict, "model.t7", True),
    ("cifar_resnet20", after("1."), saved, "checkpoint.pth.tar", False),
    ("cifar_resnet110", after("1."), saved, "checkpoint.pth.tar", True),
    ("cifar_resnet110", after("1.module."), saved, "checkpoint.pth.tar", True),
    ("torchvision:resnet18", after("1.module."), saved, "checkpoint.pth.tar", True),
]


@pytest.mark.parametrize(("name", "rename", "wrap", "file", "zipped"), ORIGINALS)
def test_files_of_the_original_code_load(
    name: str,
    rename: Callable[[str], str],
    wrap: Callable[[dict[str, Tensor]], Any],
    file: str,
    zipped: bool,
    tmp_path: Path,
) -> None:
    ours = scrambled(load_classifier(name, weights=False))
    state = {rename(key): tensor for key, tensor in ours.net.state_dict().items()}
    assert len(state) == len(ours.net.state_dict())
    torch.save(wrap(state), tmp_path / file, _use_new_zipfile_serialization=zipped)
    loaded = load_classifier(f"{name}/{tmp_path / file}", num_classes=10)
    assert state_sha256(loaded.net.state_dict()) == state_sha256(ours.net.state_dict())
    images = pixels(ours)
    assert torch.equal(logits(loaded, images), logits(ours, images))


def test_encoders_take_the_same_files(tmp_path: Path) -> None:
    ours = scrambled(load_classifier("cifar_resnet18", weights=False))
    torch.save({shortcut_names(key): tensor for key, tensor in ours.net.state_dict().items()}, tmp_path / "model.t7")
    encoder, images = load_encoder(f"cifar_resnet18/{tmp_path / 'model.t7'}").eval(), pixels(ours)
    with torch.no_grad():
        assert torch.allclose(ours.net.fc(encoder(images)), ours(images), atol=1e-5)  # type: ignore[operator]


def test_checkpoints_of_the_package_robustness_bring_their_normalisation(tmp_path: Path) -> None:
    ours = scrambled(load_classifier("torchvision:resnet18", weights=False))
    state = {f"module.model.{key}": tensor for key, tensor in ours.net.state_dict().items()}
    state |= {f"module.attacker.model.{key}": torch.zeros(()) for key in ours.net.state_dict()}
    numbers = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    for owner in ("module.normalizer", "module.attacker.normalize"):
        state |= {f"{owner}.new_{key}": torch.tensor(v)[:, None, None] for key, v in numbers.items()}
    torch.save({"model": state, "epoch": 150}, tmp_path / "imagenet_l2_3_0.pt")
    loaded = load_classifier(f"torchvision:resnet18/{tmp_path / 'imagenet_l2_3_0.pt'}")
    assert state_sha256(loaded.net.state_dict()) == state_sha256(ours.net.state_dict())
    assert loaded.mean.flatten().tolist() == pytest.approx(numbers["mean"])
    assert loaded.std.flatten().tolist() == pytest.approx(numbers["std"])


def test_mnist_resnet18_is_torchvisions_with_another_stem() -> None:
    from torchvision.models import resnet18

    torch.manual_seed(0)
    theirs = resnet18(num_classes=10)
    theirs.conv1 = nn.Conv2d(1, 64, kernel_size=(7, 7), stride=(2, 2), padding=(3, 3), bias=False)
    ours = load_classifier("mnist_resnet18", weights=False)
    ours.net.load_state_dict(theirs.state_dict())
    images = pixels(ours)
    assert torch.equal(ours(images), theirs.eval()((images - 0.1307) / 0.3081))


@pytest.mark.parametrize("name", ["vgg19", "vgg19_bn", "cifar_resnet20"])
def test_networks_start_as_in_the_original_code(name: str) -> None:
    """Convolutions from a normal distribution of variance 2 / (k * k * channels out); two images stay apart."""
    torch.manual_seed(0)
    classifier = load_classifier(name, weights=False)
    layers = [module for module in classifier.net.modules() if isinstance(module, nn.Conv2d)]
    for layer in layers:
        assert layer.weight.std().item() * (layer.kernel_size[0] ** 2 * layer.out_channels / 2) ** 0.5 == pytest.approx(
            1, abs=5 / (2 * layer.weight.numel()) ** 0.5
        )
        assert layer.bias is None or not layer.bias.any()
    if name == "vgg19":
        features = classifier.net.get_submodule("features")(torch.randn(2, 3, 32, 32))
        assert 1e-3 < (features[0] - features[1]).std().item() < 20  # with torch's own initialisation 4e-8


def test_published_files_that_need_other_statistics_get_them(goldens: Path) -> None:
    """SmoothAdv's first release centred its images only; low-pass data had their own mean and std."""
    name = f"cifar_resnet20/{goldens / 'cifar_resnet20.safetensors'}"
    centred = load_classifier(name, std=(1.0, 1.0, 1.0))
    images = pixels(centred)
    with torch.no_grad():
        assert torch.equal(centred(images), centred.net(images - centred.mean))
        assert not torch.allclose(centred(images), load_classifier(name)(images), atol=1e-2)
    with pytest.raises(ModelError, match="std is .* expected positive numbers"):
        load_classifier(name, std=(1.0, 0.0, 1.0))
    with pytest.raises(ModelError, match="mean is .* expected 3 numbers"):
        load_classifier(name, mean=(0.5,))


# --- Exports ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lenet", "cifar_resnet20", "torchvision:resnet18"])
def test_what_is_saved_is_loaded_again(name: str, tmp_path: Path) -> None:
    classifier = scrambled(load_classifier(name, num_classes=3, weights=False, flip=True))
    classifier.classes = ("cat", "dog", "ship")
    classifier.mean += 0.01
    classifier.low_pass, classifier.low_pass_published = 9, True
    file = save_classifier(tmp_path / "deep" / "export", classifier, {"recipe": "none", "steps": 7})
    assert file == tmp_path / "deep" / "export" / "classifier.safetensors"
    again = load_classifier(f"local-dir:{file.parent}")
    assert (again.classes, again.num_classes, again.flip) == (("cat", "dog", "ship"), 3, True)
    assert (again.low_pass, again.low_pass_published) == (9, True)
    assert (again.name, again.architecture) == (f"local-dir:{file.parent}", name)
    assert torch.equal(again.mean, classifier.mean)
    images = pixels(classifier)
    assert torch.equal(logits(again, images), logits(classifier, images))
    by_file = load_classifier(f"{name}/{file}")
    assert (by_file.flip, by_file.low_pass, by_file.low_pass_published) == (True, 9, True)
    assert torch.equal(logits(by_file, images), logits(classifier, images))
    anew = load_classifier(f"local-dir:{file.parent}", num_classes=5, weights=False)
    assert (anew.num_classes, anew.classes, anew.flip, anew.low_pass) == (5, None, True, 9)
    assert load_classifier(f"local-dir:{file.parent}", low_pass=0, flip=False).low_pass == 0
    assert anew(images).shape == (2, 5)
    copied = tmp_path / "copied"
    assert save_classifier(copied, classifier, {"recipe": "none", "steps": 7}).read_bytes() == file.read_bytes()


def test_an_export_keeps_what_was_measured_beside_it(tmp_path: Path) -> None:
    from models.weights import read_weights

    file = save_classifier(tmp_path, load_classifier("lenet", weights=False), {"seed": 3, "results": {"clean": 0.9}})
    assert read_weights(file).metadata["metadata"] == {"seed": 3, "results": {"clean": 0.9}}


def test_an_export_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(ModelError, match="cannot write to .*taken"):
        save_classifier(tmp_path / "taken", load_classifier("lenet", weights=False), {})


# --- Names and files that are wrong -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("cifar_resnet21", "did you mean"),
        ("resnet50", "did you mean torchvision:resnet50"),
        ("torchvision:resnet5", "did you mean torchvision:resnet50"),
        ("torchvision:resnet50/IMAGENET1K_V7", "did you mean torchvision:resnet50/IMAGENET1K_V"),
        ("open_clip:RN50/openai", "no classifiers are called 'open_clip'"),
        ("lenet", "an architecture without weights"),
        ("torchvision:resnet18", "an architecture without weights"),
        ("lenet//nowhere/model.t7", "no weight file at /nowhere/model.t7"),
        ("lenet/model.tar", "expected lenet/FILE"),
        ("local-dir:/nowhere", "no folder at /nowhere"),
        ("local-dir:/", "holds no classifier.safetensors"),
    ],
)
def test_wrong_names_are_one_line(name: str, said: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_classifier(name)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_number_of_classes_than_the_data_have_is_refused(goldens: Path, tmp_path: Path) -> None:
    name = f"lenet/{goldens / 'lenet_mnist.safetensors'}"
    with pytest.raises(ModelError, match="its weights tell 10 classes apart, the data have 7"):
        load_classifier(name, num_classes=7)
    save_classifier(tmp_path, load_classifier(name), {})
    with pytest.raises(ModelError, match="its weights tell 10 classes apart, the data have 7"):
        load_classifier(f"local-dir:{tmp_path}", num_classes=7)
    assert load_classifier(name, num_classes=7, weights=False).num_classes == 7
    with pytest.raises(ModelError, match="0 classes; give at least 1"):
        load_classifier("lenet", num_classes=0, weights=False)


def test_weights_of_another_net_say_whose_they_are(goldens: Path, tmp_path: Path) -> None:
    file = goldens / "cifar_resnet20.safetensors"
    for name in ("cifar_resnet32", "lenet", "cifar_resnet18"):
        with pytest.raises(ModelError, match=f"holds the weights of cifar_resnet20, not {name}"):
            load_classifier(f"{name}/{file}")
    export = save_classifier(tmp_path, load_classifier(f"cifar_resnet20/{file}"), {})
    with pytest.raises(ModelError, match="holds cifar_resnet20, not cifar_resnet32"):
        load_classifier(f"cifar_resnet32/{export}")
    state = load_file(file)
    del state["layer3.2.bn2.bias"]
    save_file(state, tmp_path / "short.safetensors")
    with pytest.raises(ModelError, match=r"does not fit CifarResNet.*1 missing \(layer3.2.bn2.bias\)"):
        load_classifier(f"cifar_resnet20/{tmp_path / 'short.safetensors'}")


class Touch:
    """Unpickling this would make a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("file", ["model.t7", "checkpoint.pth.tar", "model.pt"])
def test_pickled_code_is_refused_and_not_run(file: str, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    content = {"state_dict": load_classifier("lenet", weights=False).net.state_dict(), "args": Touch(mark)}
    torch.save(content, tmp_path / file)
    with pytest.raises(ModelError, match="holds pickled objects .* refused, nothing was executed"):
        load_classifier(f"lenet/{tmp_path / file}")
    (tmp_path / file).write_bytes(pickle.dumps(content["args"], protocol=2))
    with pytest.raises(ModelError, match="refused, nothing was executed"):
        load_classifier(f"lenet/{tmp_path / file}")
    assert not mark.exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architecture": None}, "its header names no architecture"),
        ({"architecture": "local-dir:/x"}, "its header names no architecture"),
        ({"architecture": "lenet5"}, "did you mean lenet"),
        ({"num_classes": "ten"}, "num_classes is 'ten'"),
        ({"classes": ["a"]}, "its header names 1 classes, its network has 10"),
        ({"classes": [1] * 10}, "expected a list of names"),
        ({"std": [0.0]}, "expected positive numbers"),
        ({"image_size": -1}, "expected a positive number of pixels"),
        ({"low_pass": -1}, "low_pass is -1; expected a number of frequencies"),
        ({"low_pass": True}, "low_pass is True; expected a number of frequencies"),
        ({"low_pass": "16"}, "low_pass is '16'; expected a number of frequencies"),
    ],
)
def test_damaged_headers_are_one_line(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    header = {
        "architecture": "lenet",
        "num_classes": 10,
        "classes": None,
        "mean": [0.1],
        "std": [0.3],
        "image_size": 28,
    }
    state = load_classifier("lenet", weights=False).net.state_dict()
    write_safetensors(tmp_path / "classifier.safetensors", state, header | change)
    with pytest.raises(ModelError, match=re.escape(said)):
        load_classifier(f"local-dir:{tmp_path}")


def test_wrong_images_are_one_line() -> None:
    classifier = load_classifier("lenet", weights=False)
    with pytest.raises(ModelError, match=r"images of shape \[2, 3, 28, 28\]; expected \[N, 1, 28, 28\]"):
        classifier(torch.rand(2, 3, 28, 28))
    with pytest.raises(ModelError, match=r"images of type torch.uint8; expected floating point in \[0, 1\]"):
        classifier(torch.zeros(2, 1, 28, 28, dtype=torch.uint8))
