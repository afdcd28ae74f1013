"""The published recipes: each parses and builds both towers with the published sizes; both kinds take real steps."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models.encoders import load_encoder
from train.common import RECIPES, parse_config
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
    settings += ["--steps", "2", "--batch_size", "4", "--workers", "0", "--log_every", "1", "--keep", "1"]
    settings += ["--hidden_weight", "0.1", "--gram_weight", "0.1"]
    result = main(read(name, *settings))
    assert result["step"] == 1
    assert result["skipped_steps"] == 0
    assert result["feature"] > 0
    assert result["hidden"] > 0
    assert result["gram"] > 0
