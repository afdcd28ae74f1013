"""FSDP2: what is spread over the ranks trains like a whole copy on each, and leaves the same checkpoints."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from models.checkpoints import newest_checkpoint
from models.encoders import load_encoder
from tests import ranks
from train import distill, finetune
from train.common import LaunchError
from train.launching import Sharding, sharding_asked_for
from train.sharding import require_shardable, units

ROOT = Path(__file__).resolve().parents[1]
ASKED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "WORLD_SIZE": "2"}


@pytest.fixture
def settings(tiny_shards: Path, tiny_vit: str, tmp_path: Path) -> dict[str, Any]:
    """Six steps of 16 images."""
    return {
        "data": str(tiny_shards),
        "teacher": tiny_vit,
        "batch_size": 16,
        "steps": 6,
        "warmup_steps": 2,
        "workers": 0,
        "log_every": 1,
        "save_every": 3,
        "out": str(tmp_path / "run"),
    }


def run(config: Any, world: int = 2, environment: dict[str, str] | None = None) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl of a run on `world` ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**(environment or {}), "ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    script, out = distill if isinstance(config, distill.Config) else finetune, Path(config.out)
    said = [out.with_name(f"{out.name}_{rank}.txt") for rank in range(world)]
    processes = [
        ranks.start(script.main, config, said[rank], {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(world)
    ]
    try:
        for process in processes:
            process.join(200)
        codes = [process.exitcode for process in processes]
        assert codes == [0] * world, [codes, *(file.read_text()[-3000:] for file in said if file.exists())]
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def saved(out: str | Path) -> dict[str, torch.Tensor]:
    checkpoint, _ = newest_checkpoint(Path(out) / "checkpoints")
    assert checkpoint is not None
    return {
        f"{group}/{name}": t.clone() for group, entries in checkpoint.tensors.items() for name, t in entries.items()
    }


def assert_same_curve(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for a, b in zip(found, expected, strict=True):
        for name in ("loss", "gradient_norm", "teacher_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-5), (a["step"], name)


def test_sharded_ranks_train_like_copies_and_save_the_same(settings: dict[str, Any], tmp_path: Path) -> None:
    """Losses, whole tensors of weights and moments, and what is exported; with pieces, and on three ranks' odd cuts."""
    plain = distill.Config(**settings | {"out": str(tmp_path / "plain"), "accumulate": 2})
    sharded = dataclasses.replace(plain, out=str(tmp_path / "sharded"))
    expected = run(plain)
    assert_same_curve(run(sharded, environment={**ASKED, "FSDP_RESHARD_AFTER_FORWARD": "false"}), expected)
    whole, parts = saved(plain.out), saved(sharded.out)
    assert whole.keys() == parts.keys()
    for name, tensor in whole.items():
        assert parts[name].shape == tensor.shape
        # The bias of a key has no gradient but rounding, which Adam turns into steps of any sign.
        parameter = name.removeprefix("model/").removeprefix("optimizer/").partition("/")[0]
        noise = whole.get(f"optimizer/{parameter}/exp_avg_sq", torch.ones(())) < 1e-12
        error = (parts[name] - tensor).abs().masked_fill(noise, 0.0)
        assert error.max() <= 1e-4 * tensor.abs().max() + 2e-6, name
        assert noise.float().mean() < 0.5, name
    one, other = (load_encoder(f"local-dir:{c.out}/export").eval() for c in (plain, sharded))
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(other(images), one(images), rtol=1e-4, atol=1e-5)
    last = json.loads((tmp_path / "sharded" / "results.jsonl").read_text().splitlines()[-1])
    losses = [row["loss"] for row in expected]  # of one epoch
    assert last["value"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_a_run_changes_between_sharded_and_whole(settings: dict[str, Any], tmp_path: Path) -> None:
    """Three steps on two sharded ranks, three in one whole process, and the other way round: the unbroken curve."""
    expected = run(distill.Config(**settings | {"out": str(tmp_path / "unbroken")}), world=1)
    for name, first, then in (("apart", (2, ASKED), (1, {})), ("together", (1, {}), (2, ASKED))):
        config = distill.Config(**settings | {"out": str(tmp_path / name)})
        run(config, first[0], first[1])
        # Back to the checkpoint in the middle, whose later rows are forgotten.
        middle = dataclasses.replace(config, resume=str(tmp_path / name / "checkpoints" / "step_00000003"))
        assert_same_curve(run(middle, then[0], then[1]), expected)


def test_fine_tuning_is_sharded_too(tiny_shards: Path, tiny_vit: str, tmp_path: Path) -> None:
    from models.heads import save_head

    save_head(
        tmp_path / "head.safetensors",
        torch.randn(10, 24, generator=torch.Generator().manual_seed(0)) / 10,
        torch.zeros(10),
        [str(number) for number in range(10)],
        normalize=False,
        metadata={},
    )
    settings: dict[str, Any] = {
        "data": str(tiny_shards),
        "encoder": tiny_vit,
        "head": str(tmp_path / "head.safetensors"),
        "batch_size": 16,
        "steps": 4,
        "warmup_steps": 1,
        "workers": 0,
        "log_every": 1,
    }
    plain = finetune.Config(**settings, out=str(tmp_path / "plain"))
    sharded = finetune.Config(**settings, out=str(tmp_path / "sharded"))
    for a, b in zip(run(sharded, environment=ASKED), run(plain), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    one, other = (load_encoder(f"local-dir:{c.out}/export").eval() for c in (plain, sharded))
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(other(images), one(images), rtol=1e-4, atol=1e-5)


def test_units_are_blocks_wherever_they_lie(tiny_vit: str) -> None:
    """Parts that are only called as modules: nothing inside an attention layer, whose weights are used directly."""
    vit = load_encoder(tiny_vit)
    assert [type(unit).__name__ for unit in units(vit)] == ["ResidualAttentionBlock"] * 2
    resnet = load_encoder("open_clip:RN50", weights=False)
    assert [type(unit).__name__ for unit in units(resnet)] == ["Bottleneck"] * 16


def test_scalars_cannot_be_sharded() -> None:
    module = nn.Linear(2, 2)
    module.scale = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(Exception, match="--use_fsdp: scale is a scalar"):
        require_shardable(module)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"FSDP_VERSION": "1"}, "--fsdp_version 2"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "offload"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "activation"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "fp16"),
        ({"WORLD_SIZE": "1"}, "nothing to shard"),
    ],
)
def test_what_cannot_be_sharded_is_refused(environment: dict[str, str], expected: str) -> None:
    with pytest.raises(LaunchError, match=expected):
        sharding_asked_for({**ASKED, **environment})


def test_the_request_is_taken_once() -> None:
    environment = {**ASKED, "FSDP_RESHARD_AFTER_FORWARD": "false"}
    assert sharding_asked_for(environment) == Sharding(reshard_after_forward=False)
    assert sharding_asked_for(environment) is None
    assert sharding_asked_for({**ASKED}) == Sharding(reshard_after_forward=True)


def test_scripts_that_cannot_shard_refuse(tmp_path: Path) -> None:
    command = [sys.executable, "train/probe.py", "--data", "demo", "--out", str(tmp_path / "out")]
    environment = {**os.environ, "ACCELERATE_USE_FSDP": "true"}
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert found.returncode == 2
    assert found.stderr.strip().splitlines()[-1].startswith("error: FSDP is for distill.py and finetune.py")


def test_synchronised_batch_norm_is_refused_on_a_cpu(settings: dict[str, Any]) -> None:
    """torch has it for GPUs only."""
    from train.common import ConfigError

    with pytest.raises(ConfigError, match="--sync_batch_norm needs GPUs"):
        distill.main(distill.Config(**settings, sync_batch_norm=True))
