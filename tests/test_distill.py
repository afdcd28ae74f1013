"""The main job: losses and first step against the original code, exact resume, equal worlds, faults, run folder."""

import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kernels import dispatch
from models import ModelError
from models.checkpoints import newest_checkpoint
from models.distiller import Distiller
from models.encoders import Encoder, load_encoder
from models.towers import Tower
from models.weights import state_sha256
from tests import ranks
from tests.ranks import Script
from train import distill
from train.common import ConfigError, StopRequested
from train.distill import Config, main

ROOT = Path(__file__).resolve().parents[1]
DRAW = distill.draw_loss


# ----------------------------------------------------------------------------------------------------------------------
# Against the original code
# ----------------------------------------------------------------------------------------------------------------------


def golden_encoder(goldens: Path, kind: str, scale: float = 1.0) -> Encoder:
    """The original's tiny CLIP tower; its images are normalised already, so this encoder's mean is 0 and its std 1."""
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.transformer import QuickGELU, VisionTransformer

    config = np.load(goldens / f"clip_tiny_{kind}.npz")["config"].tolist()
    module: torch.nn.Module
    if kind == "vit":
        size, patch, width, layers, heads, dim = config
        module = VisionTransformer(size, patch, width, layers, heads, 4.0, output_dim=dim, act_layer=QuickGELU)
    else:
        *layers, width, heads, size, dim = config
        module = ModifiedResNet(layers, dim, heads, size, width)
    state = load_file(goldens / f"clip_tiny_{kind}.safetensors")
    module.load_state_dict({name.removeprefix("visual."): tensor.float() for name, tensor in state.items()})
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(scale)
    return Encoder(f"golden-{kind}", Tower(module, "golden", size, dim, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)))


def step_like_main(distiller: Distiller, teacher: Encoder, images: torch.Tensor, weight_decay: float) -> dict[str, Any]:
    parameters = list(distiller.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=weight_decay, fused=True)
    with torch.no_grad():
        target = teacher.intermediates(images, distiller.hidden_blocks, distiller.gram_blocks)
    values = distiller(images, target)
    values["loss"].backward()
    values["norm"] = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    values["gradients"] = {
        n: p.grad.clone() for n, p in distiller.student.tower.named_parameters() if p.grad is not None
    }
    optimizer.step()
    return values


def check_step(golden: Any, values: dict[str, Any], tower: torch.nn.Module) -> None:
    assert values["norm"].item() == pytest.approx(float(golden["grad_norm_preclip"]), rel=1e-5)
    for key in golden.files:
        group, _, name = key.partition("/")
        name = name.removeprefix("visual.")
        expected = torch.from_numpy(golden[key]) if name else torch.empty(0)
        if group == "grad_clipped":
            found = values["gradients"][name]
            assert (found - expected).abs().max() <= 1e-4 * expected.abs().max(), key
        elif group == "adamw_step1":
            # Where a gradient is near 0 the first step is its sign: rounding decides.
            tiny = values["gradients"][name].abs() < 1e-7
            error = (tower.get_parameter(name).detach() - expected).abs()
            assert error[~tiny].max() <= 1e-5 if (~tiny).any() else True, key
            assert error.max() <= 2e-3, key


def test_vit_losses_gradients_and_first_step(goldens: Path) -> None:
    golden = np.load(goldens / "clip_tiny_vit.npz")
    teacher = golden_encoder(goldens, "vit").eval()
    student = golden_encoder(goldens, "vit", scale=0.9)
    distiller = Distiller(
        student,
        teacher,
        feature_weight=0.9,
        hidden_weight=0.1,
        hidden_blocks=[0, 1],
        gram_weight=0.1,
        gram_blocks=[0, 1],
    ).train()
    values = step_like_main(distiller, teacher, torch.from_numpy(golden["images"]), weight_decay=0.1)
    for ours, theirs, weight in (
        ("feature", "loss_feat", 0.9),
        ("hidden", "loss_layer", 0.1),
        ("gram", "loss_attn", 0.1),
    ):
        assert weight * values[ours].item() == pytest.approx(float(golden[theirs]), rel=1e-5), ours
    assert values["feature"].item() == pytest.approx(float(golden["hint_feat_raw"]), rel=1e-5)
    assert values["loss"].item() == pytest.approx(float(golden["loss_total"]), rel=1e-5)
    check_step(golden, values, student.tower)


def test_resnet_loss_gradients_first_step_and_batch_statistics(goldens: Path) -> None:
    golden = np.load(goldens / "clip_tiny_rn.npz")
    teacher = golden_encoder(goldens, "rn").eval()
    student = golden_encoder(goldens, "rn", scale=0.9)
    distiller = Distiller(student, teacher, feature_weight=0.9).train()
    values = step_like_main(distiller, teacher, torch.from_numpy(golden["images"]), weight_decay=0.05)
    assert values["loss"].item() == pytest.approx(float(golden["loss"]), rel=1e-5)
    check_step(golden, values, student.tower)
    for key in golden.files:
        if key.startswith("student_after_fwd/"):
            found = student.tower.get_buffer(key.partition("/")[2].removeprefix("visual."))
            torch.testing.assert_close(found, torch.from_numpy(golden[key]), rtol=1e-5, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Runs in this process
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def settings(tiny_shards: Path, tiny_vit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """8 steps of 16 images in this process, without the figure, which would take longer than they do."""
    monkeypatch.setattr(distill, "draw_loss", lambda *_: None)
    return {
        "data": str(tiny_shards),
        "teacher": tiny_vit,
        "batch_size": 16,
        "steps": 8,
        "warmup_steps": 2,
        "workers": 0,
        "log_every": 1,
        "save_every": 4,
        "out": str(tmp_path / "run"),
    }


def weights_after(out: str | Path) -> dict[str, torch.Tensor]:
    checkpoint, _ = newest_checkpoint(Path(out) / "checkpoints")
    assert checkpoint is not None
    return {f"{group}/{name}": t for group, entries in checkpoint.tensors.items() for name, t in entries.items()}


def rows(out: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def test_run_learns_and_leaves_what_it_promises(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill, "draw_loss", DRAW)
    settings |= {"steps": 60, "lr": 3e-3, "hidden_weight": 0.1, "gram_weight": 0.1, "log_every": 10}
    result = main(Config(**settings))
    out = Path(settings["out"])
    logged = rows(out)
    assert [row["step"] for row in logged] == [0, 10, 20, 30, 40, 50, 59]
    assert logged[-1]["loss"] < 0.5 * logged[0]["loss"]
    for row in logged:
        assert row["loss"] == pytest.approx(row["feature"] + 0.1 * row["hidden"] + 0.1 * row["gram"], rel=1e-5)
        assert {"lr", "gradient_norm", "feature_norm", "teacher_norm", "data_wait_share", "memory_mib"} <= row.keys()
    assert result["loss"] == logged[-1]["loss"]
    for name in ("config.yaml", "env.json", "results.jsonl", "loss.png", "loss.svg", "export/student.safetensors"):
        assert (out / name).stat().st_size > 0, name
    row = json.loads((out / "results.jsonl").read_text())
    student = load_encoder(f"local-dir:{out / 'export'}")
    assert row["weights_sha256"] == state_sha256(student.tower.state_dict())
    assert (row["value"], row["n"]) == (result["last_epoch_loss"], result["last_epoch_n"])
    assert {"commit", "versions", "date", "config", "seed", "data_fingerprint"} <= row.keys()


def test_resume_is_bit_for_bit(settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """8 steps = 5 + 3, with batch norm, a projector, and an epoch's end in the middle."""
    settings |= {"student": "cifar_resnet20", "batch_size": 32}
    first = main(Config(**settings))
    halves = settings | {"out": str(tmp_path / "halves")}
    stop_after(halves, 5, monkeypatch)
    second = main(Config(**halves))
    results = {name: value for name, value in first.items() if name.startswith("last_epoch_")}
    assert results == {name: second[name] for name in results}
    assert results["last_epoch_n"] == 4 * 32
    whole, broken = weights_after(settings["out"]), weights_after(halves["out"])
    assert whole.keys() == broken.keys()
    for name in whole:
        assert torch.equal(whole[name], broken[name]), name
    volatile = ("images_per_second", "data_wait_share", "seconds_left", "memory_mib")
    strip = lambda row: {k: v for k, v in row.items() if k not in volatile}  # noqa: E731
    assert [strip(row) for row in rows(settings["out"])] == [strip(row) for row in rows(halves["out"])]


def stop_after(settings: dict[str, Any], steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs until `steps` steps are done: a SIGTERM arrives in the middle of the last one."""
    original = distill.cosine_lr

    def lr_and_signal(step: int, *rest: Any) -> float:
        if step == steps - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(distill, "cosine_lr", lr_and_signal)
        with pytest.raises(StopRequested) as stopped:
            main(Config(**settings))
    assert stopped.value.code == 143
    assert f"saved at step {steps} of" in str(stopped.value)


def test_accumulation_does_not_change_the_step(settings: dict[str, Any], tmp_path: Path) -> None:
    main(Config(**settings))
    main(Config(**{**settings, "accumulate": 4, "out": str(tmp_path / "pieces")}))
    for a, b in zip(rows(settings["out"]), rows(tmp_path / "pieces"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-4)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.timeout(400)
def test_compiled_run_has_the_losses_of_the_eager_one(settings: dict[str, Any], tmp_path: Path) -> None:
    settings |= {"steps": 3, "hidden_weight": 0.1, "gram_weight": 0.1}
    main(Config(**settings))
    main(Config(**{**settings, "compile": True, "out": str(tmp_path / "compiled")}))
    for a, b in zip(rows(settings["out"]), rows(tmp_path / "compiled"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_bf16_run_has_nearly_the_losses_of_float32(settings: dict[str, Any], tmp_path: Path) -> None:
    settings |= {"hidden_weight": 0.1, "gram_weight": 0.1, "student": "", "out": str(tmp_path / "bf16")}
    bf16 = {"ACCELERATE_MIXED_PRECISION": "bf16"}
    with Script("train/distill.py", settings, tmp_path / "said", environment=bf16) as run:
        assert run.wait(120) == [0], run.said()
    assert json.loads((tmp_path / "bf16" / "env.json").read_text())[-1]["mixed_precision"] == "bf16"
    main(Config(**{**settings, "out": str(tmp_path / "float32")}))
    exact, rounded = rows(tmp_path / "float32"), rows(tmp_path / "bf16")
    assert exact[0]["loss"] != rounded[0]["loss"]
    for a, b in zip(exact, rounded, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.05), a["step"]


def test_pieces_of_a_batch_that_lost_rows(settings: dict[str, Any], tmp_path: Path) -> None:
    """16 pieces of one row each, and unusable images in the batch: the rest trains, the loss is counted."""
    import webdataset

    shards = tmp_path / "shards"
    shards.mkdir()
    with webdataset.TarWriter(str(shards / "000000.tar"), encoder=False) as writer:
        source = Path(settings["data"]) / "000000.tar"
        for i, sample in enumerate(webdataset.WebDataset(str(source), shardshuffle=False)):
            image = b"not an image" if i in (3, 20) else sample["png"]
            writer.write({"__key__": sample["__key__"], "png": image, "cls": sample["cls"]})
    (shards / "sizes.json").write_text('{"000000.tar": 50}')
    settings |= {"data": str(shards), "accumulate": 16, "steps": 3, "max_bad_fraction": 0.1}
    result = main(Config(**settings))
    assert result["skipped_steps"] == 0
    (report,) = result["data_reports"]
    assert report["bad"] == 2
    assert report["samples"] == 46


def test_initialisation_follows_the_seed(settings: dict[str, Any], tmp_path: Path) -> None:
    """Also of a student whose library's own initialisation is kept."""
    settings |= {"student": "timm:test_vit", "teacher": "timm:test_vit/" + str(tmp_path / "t.safetensors"), "steps": 1}
    from safetensors.torch import save_file

    save_file(dict(load_encoder("timm:test_vit", weights=False).tower.state_dict()), tmp_path / "t.safetensors")
    losses = [
        main(Config(**{**settings, "seed": s, "out": str(tmp_path / f"{i}")}))["loss"] for i, s in enumerate((0, 0, 5))
    ]
    assert losses[0] == losses[1] != losses[2]


def test_a_teacher_that_changed_under_the_same_name_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    weights = small_weights(tmp_path)
    settings |= {"teacher": f"cifar_resnet20/{weights}"}
    main(Config(**settings))
    small_weights(tmp_path, seed=3)
    with pytest.raises(ConfigError, match="not those that the checkpoint was made with"):
        main(Config(**{**settings, "steps": 12}))


def test_no_valid_checkpoint_is_an_error_and_not_a_fresh_start(settings: dict[str, Any]) -> None:
    main(Config(**settings))
    logged = rows(settings["out"])
    for checkpoint in (Path(settings["out"]) / "checkpoints").iterdir():
        (checkpoint / "manifest.json").unlink()
    with pytest.raises(ModelError, match="none of 2 checkpoints is valid"):
        main(Config(**settings))
    assert rows(settings["out"]) == logged


def test_going_back_to_an_older_checkpoint_leaves_the_newer_ones_behind(settings: dict[str, Any]) -> None:
    main(Config(**settings))
    whole = weights_after(settings["out"])
    checkpoints = Path(settings["out"]) / "checkpoints"
    main(Config(**{**settings, "resume": str(checkpoints / "step_00000004"), "save_every": 6}))
    assert sorted(p.name for p in checkpoints.iterdir()) == [
        "abandoned_step_00000008",
        "step_00000006",
        "step_00000008",
    ]
    assert all(torch.equal(whole[k], v) for k, v in weights_after(settings["out"]).items())
    assert [row["step"] for row in rows(settings["out"])] == list(range(8))


def test_a_tracker_that_is_not_there_is_an_error_and_not_silence(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="--tracker aim: its package is not installed"):
        main(Config(**{**settings, "tracker": "aim"}))


def test_finished_run_started_again_does_nothing(settings: dict[str, Any]) -> None:
    main(Config(**settings))
    before = weights_after(settings["out"])
    logged = rows(settings["out"])
    main(Config(**settings))
    assert all(torch.equal(before[k], v) for k, v in weights_after(settings["out"]).items())
    assert rows(settings["out"]) == logged


def test_resume_with_breaking_changes_is_refused(settings: dict[str, Any]) -> None:
    main(Config(**settings))
    changes: list[tuple[dict[str, Any], str]] = [
        ({"kind": "cosine"}, "kind 'mse' -> 'cosine'"),
        ({"batch_size": 8}, "batch_size 16 -> 8"),
        ({"seed": 5}, "seed 0 -> 5"),
        ({"steps": 4}, "beyond the 4 steps"),
        ({"resume": "none"}, "holds a run already"),
    ]
    for change, expected in changes:
        with pytest.raises(ConfigError, match=expected) as caught:
            main(Config(**{**settings, "steps": 12, **change}))
        assert "\n" not in str(caught.value)


def test_resume_may_change_the_learning_rate_and_says_so(
    settings: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    main(Config(**settings))
    main(Config(**{**settings, "steps": 10, "lr": 1e-4}))
    assert len(rows(settings["out"])) == 10
    assert "setting changed since the checkpoint: lr 0.001 -> 0.0001" in capfd.readouterr().err


def test_other_data_are_refused(settings: dict[str, Any], tmp_path: Path, tiny_shards: Path) -> None:
    main(Config(**settings))
    copy = tmp_path / "copy"
    shutil.copytree(tiny_shards, copy)
    main(Config(**{**settings, "steps": 9, "data": str(copy)}))  # the same data in another place
    shard = bytearray((copy / "000000.tar").read_bytes())
    shard[1000] ^= 1  # the same names and counts, another image
    (copy / "000000.tar").write_bytes(shard)
    for other in (copy, tiny_shards / "00000{0,1}.tar"):
        with pytest.raises(ConfigError, match="not the data of the checkpoint"):
            main(Config(**{**settings, "steps": 12, "data": str(other)}))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"hidden_weight": 0.1, "hidden_blocks": [7]}, "no block 7"),
        ({"gram_weight": 0.1, "student": "cifar_resnet20"}, "tokens"),
        ({"student": "cifar_resnet21"}, "cifar_resnet20"),
        ({"student": "timm:vit_tiny_patch16_224"}, "cannot take 32x32 images"),
        ({"teacher": "local-dir:/no/such/folder"}, "/no/such/folder"),
    ],
)
def test_models_that_do_not_fit_are_one_line(settings: dict[str, Any], change: dict[str, Any], expected: str) -> None:
    with pytest.raises(ModelError, match=expected) as caught:
        main(Config(**{**settings, **change}))
    assert "\n" not in str(caught.value)


def test_projectors_bridge_widths(settings: dict[str, Any], tmp_path: Path) -> None:
    """A student of another width, hidden states of the first stage (32x32 tokens in both) included."""
    settings |= {"teacher": "cifar_resnet20/" + str(small_weights(tmp_path)), "student": "cifar_resnet18", "steps": 2}
    settings |= {"hidden_weight": 0.1, "hidden_blocks": [0], "batch_size": 4}
    main(Config(**settings))
    names = weights_after(settings["out"])
    assert names["model/projector.weight"].shape == (64, 512)
    assert names["model/hidden_projectors.0.weight"].shape == (16, 64)


@pytest.mark.parametrize(
    ("kind", "precision"), [("mse", "no"), ("cosine", "no"), ("smooth_l1", "no"), ("cosine", "bf16")]
)
def test_kernels_train_as_the_reference_does(
    kind: str, precision: str, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Triton kernels themselves, in a run with projectors, all three terms and two pieces a step."""
    pytest.importorskip("triton")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    settings |= {"teacher": "cifar_resnet20/" + str(small_weights(tmp_path)), "student": "cifar_resnet32", "kind": kind}
    settings |= {"hidden_weight": 0.1, "hidden_blocks": [2], "steps": 2, "accumulate": 2, "norm_stats": "own"}
    settings |= {"batch_size": 4}
    if kind == "mse":  # another width, so that there is a projector
        settings |= {"student": "cifar_resnet18", "hidden_blocks": [0], "batch_size": 2}
    main(Config(**settings, kernel="reference"))
    main(Config(**{**settings, "out": str(tmp_path / "kernels")}, kernel="triton"))
    for a, b in zip(rows(settings["out"]), rows(tmp_path / "kernels"), strict=True):
        # Adam's first steps are those of signs: where a gradient is about 0, a rounding turns its step around.
        tolerance = 0.02 if precision == "bf16" else 5e-3 if a["step"] else 1e-5
        for name in ("loss", "feature", "hidden", "gradient_norm"):
            assert b[name] == pytest.approx(a[name], rel=tolerance), (name, a["step"])


def test_the_choice_of_kernels_is_said_and_checked(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dispatch, "_said", set())
    main(Config(**{**settings, "steps": 1}))
    if not torch.cuda.is_available():
        assert capfd.readouterr().err.count("kernel   distill_loss: reference (CPU)") == 1
        monkeypatch.setattr(dispatch, "INTERPRETED", False)
        with pytest.raises(ConfigError, match="--kernel triton: .*cpu tensors"):
            main(Config(**{**settings, "out": settings["out"] + "-2"}, kernel="triton"))


def small_weights(folder: Path, seed: int = 0) -> Path:
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    net = load_encoder("cifar_resnet20", weights=False)
    save_file(dict(net.tower.state_dict()), folder / "teacher.safetensors")
    return folder / "teacher.safetensors"


# ----------------------------------------------------------------------------------------------------------------------
# Faults
# ----------------------------------------------------------------------------------------------------------------------


class Poison(torch.nn.Module):
    """Teacher features become infinite in chosen calls: a teacher that overflows, not a mock of ours."""

    def __init__(self, encoder: Encoder, calls: set[int]) -> None:
        super().__init__()
        self.calls, self.count = calls, -2  # two calls are spent on shapes
        encoder.tower.register_forward_hook(self.hook)

    def hook(self, module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
        self.count += 1
        return output * float("inf") if self.count in self.calls else None


def poisoned(monkeypatch: pytest.MonkeyPatch, calls: set[int]) -> None:
    from models import encoders

    original = encoders.load_encoder

    def load(name: str, *, weights: bool = True) -> Encoder:
        encoder = original(name, weights=weights)
        if weights:
            Poison(encoder, calls)
        return encoder

    monkeypatch.setattr(encoders, "load_encoder", load)


def test_a_non_finite_step_is_skipped_and_counted(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned(monkeypatch, {3})
    result = main(Config(**settings))
    assert result["skipped_steps"] == 1
    assert all(bool(torch.isfinite(t).all()) for t in weights_after(settings["out"]).values())
    assert sum(row["loss"] is None for row in rows(settings["out"])) == 1


def test_a_skipped_step_leaves_no_trace_in_batch_norm(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The student's own forward pass overflows in one step: running statistics must survive it, and be saved."""
    from torch.nn.modules.conv import Conv2d

    original, calls = Conv2d.forward, [0]

    def overflow(self: Conv2d, images: torch.Tensor) -> torch.Tensor:
        output = original(self, images)
        calls[0] += self.training
        return output * float("inf") if self.training and calls[0] == 60 else output

    monkeypatch.setattr(Conv2d, "forward", overflow)
    result = main(Config(**{**settings, "student": "cifar_resnet20"}))
    assert calls[0] > 60
    assert result["skipped_steps"] == 1
    assert all(bool(torch.isfinite(t.float()).all()) for t in weights_after(settings["out"]).values())


def test_steps_that_stay_non_finite_end_the_run_with_the_checkpoint_kept(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch, set(range(5, 100)))
    with pytest.raises(ModelError, match="not finite in 25 steps in a row"):
        main(Config(**{**settings, "steps": 50}))
    assert all(bool(torch.isfinite(t).all()) for t in weights_after(settings["out"]).values())


def test_the_teacher_is_frozen_and_in_evaluation_mode(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from models import encoders

    loaded = []
    original = encoders.load_encoder

    def load(name: str, *, weights: bool = True) -> Encoder:
        loaded.append(original(name, weights=weights))
        return loaded[-1]

    monkeypatch.setattr(encoders, "load_encoder", load)
    main(Config(**settings))
    teacher, student = loaded
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert student.training


class NoUnpickler(pickle.Unpickler):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("something was unpickled")


def test_nothing_is_pickled(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file of a run folder is of a format that holds no code, and all are read with no unpickler reachable."""
    main(Config(**settings))
    for name in ("load", "loads"):
        monkeypatch.setattr(pickle, name, lambda *a, **k: pytest.fail("something was unpickled"))
    monkeypatch.setattr(pickle, "Unpickler", NoUnpickler)
    monkeypatch.setattr(torch.serialization.pickle, "Unpickler", NoUnpickler)
    main(Config(**{**settings, "steps": 10}))  # saving and continuing need no pickle either
    files = [p for p in Path(settings["out"]).rglob("*") if p.is_file()]
    assert len(files) >= 12
    for file in files:
        if file.suffix == ".safetensors":
            assert load_file(file)
        elif file.suffix == ".json":
            json.loads(file.read_text())
        elif file.suffix == ".jsonl":
            [json.loads(line) for line in file.read_text().splitlines()]
        elif file.suffix == ".png":
            assert file.read_bytes().startswith(b"\x89PNG")
        elif file.name == ".lock":
            assert file.stat().st_size == 0
        else:
            assert file.suffix in (".yaml", ".svg", ".md"), file
            file.read_text()
    assert weights_after(settings["out"])


# ----------------------------------------------------------------------------------------------------------------------
# Real processes
# ----------------------------------------------------------------------------------------------------------------------


def flags(settings: dict[str, Any]) -> list[str]:
    return [part for key, value in settings.items() for part in (f"--{key}", str(value))]


def test_two_processes_continue_what_one_began(settings: dict[str, Any], tmp_path: Path) -> None:
    """Only rank 0 sees the checkpoint's folder; weights, optimiser and cursor reach the other rank.

    test_elastic.py has longer runs that equal one process, by more of them, and from the first step on.
    """
    settings |= {"steps": 10, "workers": 1, "save_every": 6}
    one, two = settings | {"out": str(tmp_path / "one")}, settings | {"out": str(tmp_path / "two")}
    main(Config(**one))
    two["resume"] = str(tmp_path / "one" / "checkpoints" / "step_00000006")
    ranks.run_two(main, Config(**two), tmp_path)
    assert json.loads((tmp_path / "two" / "env.json").read_text())[-1]["world"] == 2
    first, second = rows(one["out"])[6:], rows(two["out"])
    assert [row["step"] for row in second] == list(range(6, 10))
    for a, b in zip(first, second, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5), a["step"]


def test_a_fault_on_one_rank_ends_all_with_one_line(settings: dict[str, Any], tmp_path: Path) -> None:
    """A launcher adds a traceback of its own: test_faults.py has one."""
    settings |= {"data": str(tmp_path / "nowhere"), "workers": 0}
    with Script("train/distill.py", settings, tmp_path / "said", world=2) as run:
        assert all(run.wait()), run.said()
    assert run.said().count("error: ") == 1
    assert str(tmp_path / "nowhere") in run.said()
    assert "Traceback" not in run.said()


@pytest.mark.launch
def test_sigterm_to_the_launcher_of_one_process_saves(settings: dict[str, Any]) -> None:
    """`accelerate launch` dies of SIGTERM without passing it on; the run notices that its launcher is gone."""
    settings |= {"steps": 5000, "save_every": 5000}
    accelerate = str(Path(sys.executable).with_name("accelerate"))
    command = [accelerate, "launch", "--quiet", "--num_processes", "1", "train/distill.py", *flags(settings)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step 5/"):
            break
    process.send_signal(signal.SIGTERM)
    messages = process.stderr.read()  # until the run itself has closed it
    process.wait(timeout=60)
    found, _ = newest_checkpoint(Path(settings["out"]) / "checkpoints")
    assert found is not None, messages
    assert f"saved at step {found.step} of 5000" in messages


@pytest.mark.timeout(400)
def test_kill_at_ten_random_moments_always_resumes(settings: dict[str, Any], tmp_path: Path) -> None:
    """A run that saves every 2 steps is killed with SIGKILL ten times; it ends with the weights of an unbroken run."""
    settings |= {"steps": 60, "save_every": 2, "keep": 2, "workers": 1}
    whole = settings | {"out": str(tmp_path / "whole")}
    main(Config(**whole))
    generator = random.Random(0)
    checkpoints = Path(settings["out"]) / "checkpoints"
    last = 0
    for _ in range(10):
        process = ranks.start(main, Config(**settings), tmp_path / "messages")
        # Wait for the first save of this start, so that the kill falls into stepping and saving, not into imports.
        end = time.monotonic() + 60
        while process.is_alive() and time.monotonic() < end and newest_step(checkpoints) <= last:
            time.sleep(0.01)
        time.sleep(generator.uniform(0, 0.15))
        process.kill()
        process.join()
        assert "Traceback" not in (tmp_path / "messages").read_text()
        found, skipped = newest_checkpoint(checkpoints)
        assert found is not None, "no valid checkpoint after a kill"
        assert skipped == []
        assert found.step >= last
        last = found.step
        if last >= settings["steps"]:
            break
    main(Config(**settings))
    a, b = weights_after(whole["out"]), weights_after(settings["out"])
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert [row["step"] for row in rows(settings["out"])] == list(range(60))


def newest_step(checkpoints: Path) -> int:
    return max((int(p.name.removeprefix("step_")) for p in checkpoints.glob("step_*")), default=0)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)])
def test_a_stop_signal_saves_and_exits_with_its_code(
    settings: dict[str, Any], number: int, code: int, tmp_path: Path
) -> None:
    settings |= {"steps": 5000, "save_every": 5000, "workers": 1}
    with Script("train/distill.py", settings, tmp_path / "said") as run:
        run.wait_for("step 5/5000")
        run.send(number)
        assert run.wait() == [code], run.said()
    assert "Traceback" not in run.said()
    found, _ = newest_checkpoint(Path(settings["out"]) / "checkpoints")
    assert found is not None
    assert f"saved at step {found.step} of 5000" in run.said()


def test_two_processes_stop_at_the_same_step_and_go_on_as_one(settings: dict[str, Any], tmp_path: Path) -> None:
    """SIGTERM to both: one checkpoint; one process continues it; losses are those of an unbroken run."""
    settings |= {"steps": 40, "workers": 1, "save_every": 1000, "max_bad_fraction": 0.0}
    whole = settings | {"out": str(tmp_path / "whole")}
    main(Config(**whole))
    with Script("train/distill.py", settings, tmp_path / "said", world=2) as run:
        run.wait_for("step 5/40")
        run.send(signal.SIGTERM)
        assert run.wait() == [143, 143], run.said()
    saved = sorted(p.name for p in (Path(settings["out"]) / "checkpoints").iterdir())
    assert len(saved) == 1, run.said()
    assert saved[0].startswith("step_")
    assert f"saved at step {newest_step(Path(settings['out']) / 'checkpoints')} of 40" in run.said()
    result = main(Config(**settings))
    for a, b in zip(rows(whole["out"]), rows(settings["out"]), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5), a["step"]
    assert len(result["data_reports"]) == 3
    assert sum(report["samples"] for report in result["data_reports"]) == 40 * settings["batch_size"]


def test_second_run_in_the_same_folder_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    from train.common import RunFolder

    folder = RunFolder(Path(settings["out"]), fresh=False)
    try:
        with Script("train/distill.py", settings, tmp_path / "said") as run:
            assert run.wait() == [2], run.said()
    finally:
        folder.close()
    assert "another run is using this folder" in run.said()
    assert "Traceback" not in run.said()


@pytest.mark.launch
def test_a_second_signal_after_three_seconds_exits_at_once() -> None:
    """A launcher repeats the first signal at once, which must not count; a person's second Ctrl-C must."""
    code = (
        "import time; from train.launching import StopSignals\n"
        "with StopSignals() as s:\n"
        "    print('ready', flush=True)\n"
        "    while True: time.sleep(0.1)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None
    time.sleep(2.5)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 130


def test_a_damaged_checkpoint_given_by_path_is_an_error(settings: dict[str, Any]) -> None:
    main(Config(**settings))
    checkpoint = Path(settings["out"]) / "checkpoints" / "step_00000008"
    (checkpoint / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(ModelError, match=r"model.safetensors: 100 bytes, the manifest says"):
        main(Config(**{**settings, "resume": str(checkpoint)}))
    main(Config(**settings))  # auto falls back to step 4 and repeats the rest
    assert weights_after(settings["out"])
