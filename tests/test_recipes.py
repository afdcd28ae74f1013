"""The recipes: each parses; the published ones have the published numbers and build their models; some take steps."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from models.classifiers import load_classifier
from models.encoders import load_encoder
from train import adversarial
from train.common import RECIPES, ROOT, parse_config
from train.distill import Config, main

# Input pixels and embedding width of each tower (Feature Contamination, released scripts; open_clip's model table).
PUBLISHED = {
    "rn50": (224, 1024, 1e-3, 0.05, 50),
    "rn101": (224, 512, 1e-3, 0.1, 50),
    "rn50x4": (288, 640, 1e-4, 0.5, 50),
    "rn50x16": (384, 768, 1e-4, 0.5, 100),
    "vit_b_16": (224, 512, 5e-5, 0.1, 300),
}


def read(name: str, *flags: str) -> Config:
    return parse_config(Config, ["--config", str(RECIPES / f"{name}.yaml"), "--data", "x", *flags], "test", "demo.yaml")


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipe_is_the_published_one_and_builds_both_towers(name: str) -> None:
    size, width, lr, weight_decay, epochs = PUBLISHED[name]
    config = read(name)
    assert (config.lr, config.weight_decay, config.epochs) == (lr, weight_decay, epochs)
    assert (config.batch_size, config.warmup_steps, config.clip) == (256, 10_000, 1.0)
    # The teacher's weights come from a hub; its architecture, normalisation and activation do not.
    teacher = load_encoder(config.teacher, weights=False)
    student = load_encoder(config.student, weights=False)
    for encoder in (teacher, student):
        assert (encoder.image_size, encoder.feature_dim) == (size, width)
    assert teacher.mean.flatten().tolist() == pytest.approx([0.48145466, 0.4578275, 0.40821073])
    assert [p.shape for p in teacher.parameters()] == [p.shape for p in student.parameters()]
    activations = [{type(m).__name__ for m in e.modules()} for e in (teacher, student)]
    assert activations[0] == activations[1]
    if name == "vit_b_16":
        assert "QuickGELU" in activations[0]  # OpenAI's weights give other features with GELU


@pytest.mark.parametrize(("name", "architecture"), [("rn50", "RN50"), ("vit_b_16", "ViT-B-16-quickgelu")])
def test_real_towers_take_two_steps(name: str, architecture: str, tiny_shards: Path, tmp_path: Path) -> None:
    """A teacher with random weights from a file, the published recipe, hidden and Gram terms on, two steps."""
    torch.manual_seed(1)
    tower = load_encoder(f"open_clip:{architecture}", weights=False).tower
    file = tmp_path / "teacher.safetensors"
    save_file({f"visual.{k}": v.contiguous() for k, v in tower.state_dict().items()}, file)
    settings = [
        "--teacher",
        f"open_clip:{architecture}/{file}",
        "--data",
        str(tiny_shards),
        "--out",
        str(tmp_path / "run"),
    ]
    settings += ["--steps", "2", "--batch_size", "2", "--workers", "0", "--log_every", "1", "--keep", "1"]
    settings += ["--hidden_weight", "0.1", "--gram_weight", "0.1"]
    result = main(read(name, *settings))
    assert result["step"] == 1
    assert result["skipped_steps"] == 0
    assert result["feature"] > 0
    assert result["hidden"] > 0
    assert result["gram"] > 0


def script_of(recipe: str) -> str:
    """The module whose settings a recipe holds: named by the first word, or known by the model."""
    word = recipe.partition("_")[0]
    for folder in ("train", "eval"):
        if (ROOT / folder / f"{word}.py").is_file():
            return f"{folder}.{word}"
    return "train.distill" if recipe in (*PUBLISHED, "demo") else "train.adversarial"


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_every_recipe_is_one_of_its_script(recipe: str) -> None:
    config = importlib.import_module(script_of(recipe)).Config
    words = ["--config", str(RECIPES / f"{recipe}.yaml")]
    missing = {"data": "x", "head": "x", "encoder": "x", "model": "x"}
    given = (RECIPES / f"{recipe}.yaml").read_text()
    for name, value in missing.items():
        if name in config.__dataclass_fields__ and f"\n{name}:" not in given:
            words += [f"--{name}", value]
    assert parse_config(config, words, "test", "demo.yaml").out.startswith("runs/")


# Each of train/adversarial.py: net, rows of the published batch, epochs, learning rate, and its fall in epochs.
HOLD_ME_TIGHT = {"batch_size": 128, "epochs": 30, "lr": 0.21, "lr_step": 0, "weight_decay": 5e-4, "clip": 0.5}
HOLD_ME_TIGHT |= {"pad": 0, "mirror": False, "sigma": 0.0, "copies": 1}
SMOOTHADV = {"epochs": 150, "lr": 0.1, "lr_step": 50, "weight_decay": 1e-4, "clip": 0.0, "norm": "l2", "step_size": 2.0}
SMOOTHADV |= {"attack": "smoothadv", "order": "box_then_ball", "random_start": False, "eps_warmup": 10, "pad": 4}
SMOOTHADV |= {"pad_color": "0", "mirror": True, "model": "cifar_resnet110", "data": "cifar10"}
ROBUST = {"attack": "pgd", "norm": "l2", "attack_steps": 7, "step_size": 1.75, "order": "box_then_ball"}
CLASSIFIERS: dict[str, dict[str, Any]] = {
    "mnist_lenet": {**HOLD_ME_TIGHT, "model": "lenet", "attack": "none"},
    "mnist_lenet_adversarial": {**HOLD_ME_TIGHT, **ROBUST, "model": "lenet", "eps": 2.0},
    "mnist_lenet_flip": {**HOLD_ME_TIGHT, "model": "lenet", "attack": "none", "flip": True},
    "mnist_lenet_flip_adversarial": {**HOLD_ME_TIGHT, **ROBUST, "flip": True, "eps": 2.0, "order": "nearest"},
    "mnist_resnet18": {**HOLD_ME_TIGHT, "model": "mnist_resnet18", "attack": "none"},
    "cifar_resnet18": {**HOLD_ME_TIGHT, "model": "cifar_resnet18", "attack": "none"},
    "cifar_vgg19": {**HOLD_ME_TIGHT, "model": "vgg19_bn", "attack": "none"},
    "cifar_densenet121": {**HOLD_ME_TIGHT, "model": "densenet121", "attack": "none"},
    "cifar_resnet18_adversarial": {**HOLD_ME_TIGHT, **ROBUST, "eps": 1.0},
    "cifar_resnet18_flip": {**HOLD_ME_TIGHT, "attack": "none", "flip": True},
    "cifar_resnet18_flip_adversarial": {**HOLD_ME_TIGHT, **ROBUST, "flip": True, "eps": 1.0, "order": "nearest"},
    "cifar_resnet18_low_pass": {**HOLD_ME_TIGHT, "attack": "none", "low_pass": 16},
    "smoothadv_012": {**SMOOTHADV, "sigma": 0.12, "eps": "64/256", "attack_steps": 10, "copies": 4},
    "smoothadv_025": {**SMOOTHADV, "sigma": 0.25, "eps": "255/256", "attack_steps": 10, "copies": 8},
    "smoothadv_050": {**SMOOTHADV, "sigma": 0.5, "eps": "512/256", "attack_steps": 2, "copies": 8},
    "smoothadv_100": {**SMOOTHADV, "sigma": 1.0, "eps": "512/256", "attack_steps": 10, "copies": 2},
    "cohen_025": {"attack": "none", "sigma": 0.25, "batch_size": 400, "epochs": 90, "lr_step": 30, "copies": 1},
    "resnet32_padded": {"pad": 8, "pad_color": "150,50,50", "model": "cifar_resnet32", "eps": "255/256", "epochs": 250},
    "resnet32_unpadded": {"pad": 4, "pad_color": "0", "model": "cifar_resnet32", "sigma": 0.25, "attack_steps": 4},
    "imagenet_resnet50_adversarial": {"eps": 3.0, "norm": "l2", "attack_steps": 7, "batch_size": 256},
}


def read_classifier(name: str, *words: str) -> adversarial.Config:
    words = ("--config", str(RECIPES / f"{name}.yaml"), *words)
    if "--data" not in words and "imagenet" in name:
        words += ("--data", "x")
    return parse_config(adversarial.Config, list(words), "test", "adversarial_demo.yaml")


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_recipe_of_a_classifier_is_the_published_one_and_builds_its_net(name: str) -> None:
    config = read_classifier(name)
    assert {key: getattr(config, key) for key in CLASSIFIERS[name]} == CLASSIFIERS[name]
    net = load_classifier(config.model, weights=False, flip=config.flip)
    assert net.image_size == {"mnist": 28, "cifar10": 32}.get(config.data, 224)
    if name.startswith("smoothadv"):
        assert config.batch_size * config.copies == 256, "rows of a step in the released code"
    if name.startswith("resnet32"):
        assert config.batch_size * config.copies == 128
        assert config.radius == 255 / 256


def test_the_published_pair_of_resnet32_differs_in_its_padding_alone() -> None:
    one, other = vars(read_classifier("resnet32_padded")), vars(read_classifier("resnet32_unpadded"))
    assert {key for key in one if one[key] != other[key]} == {"pad", "pad_color", "out"}


def test_a_bare_command_trains_on_the_demo() -> None:
    config = parse_config(adversarial.Config, [], "test", "adversarial_demo.yaml")
    assert (config.data, config.model, config.attack) == ("demo", "cifar_resnet20", "smoothadv")
