"""Checkpoints: whole or not there, whatever interrupts the writing; nothing pickled; damage is named."""

import json
import multiprocessing
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch

from models import ModelError
from models.checkpoints import (
    CheckpointWriter,
    checkpoint_name,
    load_checkpoint,
    load_optimizer_tensors,
    newest_checkpoint,
    optimizer_tensors,
    save_checkpoint,
    set_aside_after,
)


def tensors(value: float = 1.0) -> dict[str, dict[str, torch.Tensor]]:
    return {"model": {"w": torch.full((64, 3), value)}, "optimizer": {"w/step": torch.tensor(3.0)}}


def test_round_trip_keeps_tensors_and_state(tmp_path: Path) -> None:
    channels_last = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    path = save_checkpoint(tmp_path, 12, {"model": {"w": channels_last}}, {"data": {"streams": 4}})
    found = load_checkpoint(path)
    assert path.name == "step_00000012"
    assert found.step == 12
    assert found.state["data"] == {"streams": 4}
    assert torch.equal(found.tensors["model"]["w"], channels_last)
    assert sorted(p.suffix for p in path.iterdir()) == [".json", ".json", ".safetensors"]


def test_only_the_newest_are_kept_and_leftovers_go(tmp_path: Path) -> None:
    (tmp_path / ".tmp-step_00000001").mkdir()
    for step in (1, 2, 3, 10):
        save_checkpoint(tmp_path, step, tensors(), {}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [checkpoint_name(3), checkpoint_name(10)]


def test_pruning_never_touches_what_was_just_saved(tmp_path: Path) -> None:
    for step in (4, 8):
        save_checkpoint(tmp_path, step, tensors(), {})
    saved = save_checkpoint(tmp_path, 2, tensors(), {}, keep=1)
    assert load_checkpoint(saved).step == 2
    moved = set_aside_after(tmp_path, 2, saved)
    assert [p.name for p in moved] == ["abandoned_step_00000004", "abandoned_step_00000008"]
    assert [p.name for p in tmp_path.glob("step_*")] == [checkpoint_name(2)]


@pytest.mark.parametrize("damage", ["flip", "cut", "no manifest", "bad manifest", "missing file", "path in manifest"])
def test_damage_is_named_and_the_older_one_is_taken(tmp_path: Path, damage: str) -> None:
    save_checkpoint(tmp_path, 1, tensors(1.0), {})
    newest = save_checkpoint(tmp_path, 2, tensors(2.0), {})
    weights = newest / "model.safetensors"
    if damage == "flip":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-4])
    elif damage == "no manifest":
        (newest / "manifest.json").unlink()
    elif damage == "bad manifest":
        (newest / "manifest.json").write_text("[1, 2")
    elif damage == "missing file":
        weights.unlink()
    else:
        manifest = json.loads((newest / "manifest.json").read_text())
        manifest["files"]["../../etc/passwd"] = {"bytes": 1, "sha256": ""}
        (newest / "manifest.json").write_text(json.dumps(manifest))
    found, skipped = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1
    assert len(skipped) == 1
    assert str(newest) in skipped[0]
    assert "\n" not in skipped[0]
    with pytest.raises(ModelError):
        load_checkpoint(newest)


def test_non_finite_tensors_are_not_saved(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, tensors(), {})
    with pytest.raises(ModelError, match="model tensor w is not finite"):
        save_checkpoint(tmp_path, 2, tensors(float("nan")), {})
    found, skipped = newest_checkpoint(tmp_path)
    assert found is not None
    assert (found.step, skipped) == (1, [])


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="mounting a small file system needs root")
def test_full_disk_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("this machine does not allow mounting a tmpfs")
    try:
        save_checkpoint(disk / "checkpoints", 1, tensors(), {})
        with pytest.raises(ModelError, match="no space left"):
            save_checkpoint(disk / "checkpoints", 2, {"model": {"w": torch.ones(2**20)}}, {})
        # A disk that fills up during the writing, behind the check of free space.
        usage = shutil.disk_usage
        shutil.disk_usage = lambda path: type(usage(path))(2**40, 0, 2**40)  # type: ignore[assignment]
        try:
            with pytest.raises(ModelError, match="no space left"):
                save_checkpoint(disk / "checkpoints", 3, {"model": {"w": torch.ones(2**20)}}, {})
        finally:
            shutil.disk_usage = usage
        assert [p.name for p in (disk / "checkpoints").iterdir()] == [checkpoint_name(1)]
        assert load_checkpoint(disk / "checkpoints" / checkpoint_name(1)).step == 1
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def save_until_killed(folder: Path, report: int) -> None:
    """Checkpoints of every step, each told on the descriptor `report` when it is saved."""
    for step in range(1, 10_000):
        save_checkpoint(folder, step, {"model": {f"w{i}": torch.full((20_000,), float(step)) for i in range(8)}}, {})
        os.write(report, b"%d\n" % step)


def test_kill_at_any_moment_leaves_a_valid_checkpoint(tmp_path: Path) -> None:
    """SIGKILL at ten moments spread over the writing: what was reported as saved is there, whole."""
    fork = multiprocessing.get_context("fork")
    for i in range(10):
        folder = tmp_path / str(i)
        reading, writing = os.pipe()
        writer = fork.Process(target=save_until_killed, args=(folder, writing))
        writer.start()
        os.close(writing)
        with open(reading) as reports:
            assert reports.readline() == "1\n"
            time.sleep(0.0037 * i)
            writer.kill()
            reported = [1, *map(int, reports.read().split())][-1]
        writer.join()
        found, skipped = newest_checkpoint(folder)
        assert found is not None
        assert skipped == []
        assert found.step in (reported, reported + 1)
        assert all(bool((t == found.step).all()) for t in found.tensors["model"].values())


def test_optimizer_state_round_trip() -> None:
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last))
    first = torch.optim.AdamW([parameter], lr=0.1, fused=True)
    parameter.grad = torch.randn_like(parameter)
    first.step()
    saved = {k: v.clone(memory_format=torch.contiguous_format) for k, v in optimizer_tensors(first, ["w"]).items()}
    copy = torch.nn.Parameter(parameter.detach().clone())
    second = torch.optim.AdamW([copy], lr=0.1, fused=True)
    load_optimizer_tensors(second, ["w"], saved)
    assert second.state[copy]["exp_avg"].stride() == copy.stride()
    copy.grad = parameter.grad.clone()
    first.step()
    second.step()
    assert torch.equal(parameter, copy)
    del saved["w/exp_avg"]
    with pytest.raises(ModelError, match="w/exp_avg"):
        load_optimizer_tensors(second, ["w"], saved)


# In the background.


def test_what_is_written_in_the_background_is_what_was_there_when_it_was_asked_for(tmp_path: Path) -> None:
    """Weights and state change at once after each save; channels-last tensors and scalars are among them."""
    weight = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    step_count, state = torch.tensor(1.0), {"data": {"streams": 4}, "seen": [1]}
    writer = CheckpointWriter(tmp_path / "background", keep=2)
    expected = {}
    for step in (1, 2, 3):
        writer.save(step, {"model": {"w": weight}, "optimizer": {"w/step": step_count}}, state)
        save_checkpoint(tmp_path / "now", step, {"model": {"w": weight}, "optimizer": {"w/step": step_count}}, state)
        expected[step] = weight.clone()
        weight.add_(1.0)
        step_count += 1
        state["seen"].append(step)  # type: ignore[attr-defined]
    writer.wait()
    assert [path.name for path in sorted((tmp_path / "background").iterdir())] == ["step_00000002", "step_00000003"]
    for step in (2, 3):
        found, plain = (load_checkpoint(tmp_path / name / checkpoint_name(step)) for name in ("background", "now"))
        assert torch.equal(found.tensors["model"]["w"], expected[step])
        assert found.state == plain.state
        assert all((found.path / file.name).read_bytes() == file.read_bytes() for file in plain.path.iterdir()), (
            "one format, whoever writes it"
        )


def test_a_save_that_fails_in_the_background_is_told_once(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path)
    writer.save(1, tensors(), {})
    writer.wait()
    writer.save(2, tensors(float("nan")), {})
    with pytest.raises(ModelError, match="step 2 not written: model tensor w is not finite"):
        writer.wait()
    assert writer.failure() is None
    writer.save(3, tensors(), {})
    writer.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == [checkpoint_name(1), checkpoint_name(3)]
    writer.save(4, tensors(float("inf")), {})
    end = time.monotonic() + 30
    while (failure := writer.failure()) is None and time.monotonic() < end:  # a loop looks, and does not wait
        time.sleep(0.01)
    assert failure is not None
    writer.save(5, tensors(), {})
    writer.close()
    assert load_checkpoint(tmp_path / checkpoint_name(5)).step == 5


def test_a_full_disk_is_noticed_in_the_background(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = CheckpointWriter(tmp_path)
    writer.save(1, tensors(), {})
    writer.wait()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    writer.save(2, tensors(), {})
    with pytest.raises(ModelError, match="no space left"):
        writer.wait()
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint_name(1)]


def test_saving_stalls_training_by_a_small_part_of_the_writing(tmp_path: Path) -> None:
    """64 MB; the first save also gets the memory for its copy. docs/performance.md has figures of an idle machine."""
    large = {"model": {f"w{i}": torch.randn(1000, 1000) for i in range(16)}}
    writer = CheckpointWriter(tmp_path / "background")
    stalls, writes = [], []
    for step in range(1, 5):
        start = time.perf_counter()
        writer.save(step, large, {})
        stalls.append(time.perf_counter() - start)
        writer.wait()
        start = time.perf_counter()
        save_checkpoint(tmp_path / "now", step, large, {})
        writes.append(time.perf_counter() - start)
    assert min(stalls[1:]) < 0.5 * min(writes)
