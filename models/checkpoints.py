"""Checkpoints: folders of safetensors and JSON that are either whole or not there.

A checkpoint `step_00000012/` is written as `.tmp-step_00000012/`, every file synced, `manifest.json` (size and SHA-256
of each other file) last, and only then renamed: a process killed at any moment leaves the previous checkpoint valid and
a temporary folder that the next save removes. Nothing is pickled, so reading one runs no code.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from models import ModelError

log = logging.getLogger("shiftlens")
MANIFEST = "manifest.json"
_STATE = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and found whole: named groups of tensors and a JSON state."""

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def checkpoint_name(step: int) -> str:
    return f"step_{step:08d}"


def save_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], *, keep: int = 2
) -> Path:
    """Writes `folder/step_XXXXXXXX` atomically and then removes all but the newest `keep` up to this step.

    Checkpoints of later steps are left alone; a run that goes back behind them calls `set_aside_after` first.

    Args:
        folder: the run's checkpoint folder, made if missing.
        step: number of optimiser steps done.
        tensors: {file stem: {name: tensor}}; each group becomes one safetensors file.
        state: JSON-serialisable state (step counters, data cursor, configuration, versions).
        keep: how many checkpoints stay, at least 1.

    Raises:
        ModelError: no space, no permission, or a tensor that is not finite. Older checkpoints are untouched then.
    """
    for group, entries in tensors.items():
        for name, tensor in entries.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise ModelError(
                    f"checkpoint at step {step} not written: {group} tensor {name} is not finite; "
                    f"older checkpoints are kept in {folder}"
                )
    final, temporary = folder / checkpoint_name(step), folder / f".tmp-{checkpoint_name(step)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".tmp-step_*"):
            shutil.rmtree(leftover)
        needed = sum(t.numel() * t.element_size() for entries in tensors.values() for t in entries.values()) + 2**16
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise OSError(errno.ENOSPC, f"{needed / 2**20:.0f} MiB needed, {free / 2**20:.0f} MiB free")
        temporary.mkdir()
        for group, entries in tensors.items():
            # clone() would double memory; contiguous() copies only channels-last tensors, which the format cannot hold
            file = temporary / f"{group}.safetensors"
            save_file({k: v.detach().cpu().contiguous() for k, v in entries.items()}, file)
            file.chmod(0o644)  # safetensors makes files that only their owner can read
        (temporary / _STATE).write_text(json.dumps({**state, "step": step}, indent=1) + "\n")
        files = {p.name: {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in sorted(temporary.iterdir())}
        for name in files:
            _sync(temporary / name)
        (temporary / MANIFEST).write_text(json.dumps({"step": step, "files": files}, indent=1) + "\n")
        _sync(temporary / MANIFEST)
        _sync(temporary)
        os.rename(temporary, final)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        # safetensors reports a full disk as its own error with the system's text in it
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        what = "no space left" if full else "cannot write"
        raise ModelError(
            f"checkpoint at step {step}: {what} in {folder} ({error}); older checkpoints are kept"
        ) from error
    for old in sorted(path for path in folder.glob("step_*") if path.name <= final.name)[: -max(keep, 1)]:
        try:
            shutil.rmtree(old)
        except OSError as error:  # a network file system keeps a file that somebody still has open
            log.warning("old checkpoint %s could not be removed: %s", old, error)
    return final


class CheckpointWriter:
    """Saves checkpoints while training goes on: `save` only copies, a thread checks, writes and syncs.

    What a checkpoint is does not change: whole or not there, and one at a time. The copies, on the CPU (in pinned
    memory where tensors are on a GPU), take as much memory as a checkpoint does and are kept for the next one; what is
    channels-last takes as much again while it is written.

    Args:
        folder, keep: as for `save_checkpoint`.
    """

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep
        self._copies: dict[tuple[str, str], Tensor] = {}
        self._thread: threading.Thread | None = None
        self._failure: ModelError | None = None

    def save(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Copies everything and returns while it is written; arguments as for `save_checkpoint`.

        Waits for the save before this one. Raises ModelError for what went wrong with that.
        """
        self.wait()
        copies = {g: {k: self._room(g, k, v) for k, v in entries.items()} for g, entries in tensors.items()}
        kept = [copy for entries in copies.values() for copy in entries.values()]
        with torch.no_grad():  # one call: a thousand small tensors cost more to ask for than to copy
            torch._foreach_copy_(kept, [t for entries in tensors.values() for t in entries.values()], non_blocking=True)
        if any(tensor.is_cuda for entries in tensors.values() for tensor in entries.values()):
            torch.cuda.synchronize()
        content = json.loads(json.dumps(dict(state)))  # the caller's may change
        self._thread = threading.Thread(target=self._write, args=(step, copies, content), name="checkpoint")
        self._thread.start()

    def failure(self) -> ModelError | None:
        """What went wrong with a save that is through, told once; None otherwise. Never waits."""
        failure, self._failure = self._failure, None
        return failure

    def wait(self) -> None:
        """Returns when nothing is being written. Raises ModelError for what went wrong."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if failure := self.failure():
            raise failure

    def close(self) -> None:
        """Returns when nothing is being written, and tells nothing of what went wrong."""
        if self._thread is not None:
            self._thread.join()

    def _room(self, group: str, name: str, tensor: Tensor) -> Tensor:
        """Where the copy of a tensor is kept."""
        kept = self._copies.get((group, name))
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            # As the tensor lies in memory: the thread turns what is channels-last into what the format holds.
            kept = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            self._copies[group, name] = kept
        return kept

    def _write(self, step: int, copies: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        try:
            save_checkpoint(self.folder, step, copies, state, keep=self.keep)
        except ModelError as error:
            self._failure = error
        except Exception as error:  # nobody sees what a thread raises
            self._failure = ModelError(f"checkpoint at step {step} not written: {type(error).__name__}: {error}")


def set_aside_after(folder: Path, step: int, chosen: Path | None = None) -> list[Path]:
    """Renames the checkpoints of later steps, and of this one unless `chosen`, so that nothing continues from them.

    A run that goes back (to an older checkpoint, or past damaged ones) leaves them behind as `abandoned_step_…`.
    """
    moved = []
    for path in sorted(folder.glob("step_*")):
        if path.name >= checkpoint_name(step) and (chosen is None or path.resolve() != chosen.resolve()):
            target = path.with_name(f"abandoned_{path.name}")
            if target.exists():
                shutil.rmtree(target)
            path.rename(target)
            moved.append(target)
    return moved


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint after checking every file's size and SHA-256 against its manifest.

    Raises:
        ModelError: anything missing, cut short, altered or unreadable, naming the file.
    """
    if not path.is_dir():
        raise ModelError(f"{path}: no such checkpoint folder")
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        step, files = int(manifest["step"]), dict(manifest["files"])
    except FileNotFoundError:
        raise ModelError(f"{path}: no {MANIFEST}: not a checkpoint, or one that was never finished") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path / MANIFEST}: unreadable ({error})") from None
    for name, entry in files.items():
        file = path / name
        if Path(name).name != name or not isinstance(entry, dict):
            raise ModelError(f"{path / MANIFEST}: bad entry {name!r}")
        if not file.is_file():
            raise ModelError(f"{file}: missing, though the manifest lists it")
        try:
            size, digest = file.stat().st_size, _sha256(file)
        except OSError as error:
            raise ModelError(f"{file}: cannot be read ({error.strerror})") from None
        if size != entry.get("bytes"):
            raise ModelError(f"{file}: {size} bytes, the manifest says {entry.get('bytes')}")
        if digest != entry.get("sha256"):
            raise ModelError(f"{file}: SHA-256 differs from the manifest: the file was altered or damaged")
    try:
        state = json.loads((path / _STATE).read_text())
        tensors = {Path(n).stem: load_file(path / n) for n in files if n.endswith(".safetensors")}
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"{path}: unreadable ({error})") from None
    return Checkpoint(path, step, tensors, state)


def newest_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest valid checkpoint below `folder` (None if there is none) and why newer ones were passed over."""
    skipped: list[str] = []
    for path in sorted(folder.glob("step_*"), reverse=True):
        try:
            return load_checkpoint(path), skipped
        except ModelError as error:
            skipped.append(str(error))
    return None, skipped


def state_keys(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """What an optimiser keeps of each parameter: like the parameter in shape, except `step`, a number.

    Raises ValueError for an optimiser other than AdamW and SGD with momentum.
    """
    if isinstance(optimizer, torch.optim.AdamW):
        return "step", "exp_avg", "exp_avg_sq"
    if isinstance(optimizer, torch.optim.SGD) and optimizer.defaults["momentum"]:
        return ("momentum_buffer",)
    raise ValueError(f"checkpoints keep the state of AdamW and of SGD with momentum, not of {optimizer}")


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> dict[str, Tensor]:
    """An optimiser's state as {"parameter/exp_avg": tensor, …}; `names` in the order of the parameters."""
    state = optimizer.state_dict()["state"]
    return {f"{names[i]}/{key}": value for i, entry in state.items() for key, value in entry.items()}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, names: Sequence[str], tensors: dict[str, Tensor]) -> None:
    """Inverse of `optimizer_tensors`; moments take each parameter's memory format, which fused kernels rely on."""
    parameters, keys = optimizer.param_groups[0]["params"], state_keys(optimizer)
    state: dict[int, dict[str, Tensor]] = {}
    for i, (name, parameter) in enumerate(zip(names, parameters, strict=True)):
        for key in keys:
            value = tensors.get(f"{name}/{key}")
            if value is None:
                raise ModelError(f"checkpoint lacks the optimiser state {name}/{key}")
            shape = parameter if key != "step" else value
            if value.shape != shape.shape:
                raise ModelError(f"checkpoint: optimiser state {name}/{key} has shape {list(value.shape)}")
            # A copy: the loaded tensor is a window on the file, which would stay open for the whole run.
            state.setdefault(i, {})[key] = torch.empty_like(shape, dtype=value.dtype, device="cpu").copy_(value)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows cannot open a folder
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
