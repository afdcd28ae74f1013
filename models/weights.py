"""Weight files: read safely, cleaned of wrappers' prefixes, checked, hashed and written atomically.

Only tensors are ever taken from a file. Safetensors is the format of this project; a `.pt`/`.pth`/`.t7`/... file is
read by `torch.load(weights_only=True)`, which refuses pickled code instead of running it. Whatever is wrong with a file
a user named raises `ModelError` with one line that names the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from models import ModelError

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".t7", ".pth.tar")
SUFFIXES = (".safetensors", *TORCH_SUFFIXES)

# Left by DataParallel/DDP, torch.compile, and the CLIP wrapper of the feature-contamination code, in any order.
_MODULE, _COMPILED, RESEARCH_PREFIX = "module.", "_orig_mod.", "model."
# Names under which training programs nest the weights beside their epoch, optimiser and so on.
_NESTED = ("state_dict", "model_state_dict", "model", "net")
# One header field for all of ours: safetensors writes several fields in random order, so equal content would not give
# equal bytes.
_HEADER_FIELD = "shiftlens"
_LOADABLE = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.bool)


@dataclass(frozen=True)
class Weights:
    """What a weight file holds.

    state: tensors by name without wrapper prefixes; floating point as float32, all finite. metadata: what this project
    noted in the header of a safetensors file (`write_safetensors`); empty for files of others. research_prefix: whether
    every name began with `model.`, as in checkpoints of the feature-contamination code. file: where it was read.
    """

    state: dict[str, Tensor]
    metadata: dict[str, Any]
    research_prefix: bool
    file: Path


def read_weights(file: str | Path) -> Weights:
    """Read, clean and check the weight file `file` (safetensors, or a torch file without pickled code), on the CPU.

    Raises ModelError: no such file, unknown ending, broken or empty file, pickled code, TorchScript, a dtype other than
    float16/32/64, bfloat16, int32/64 and bool, NaN or Inf in a tensor.
    """
    file = Path(file).expanduser()
    if not file.is_file():
        raise ModelError(f"no weight file at {file} (working folder {Path.cwd()})")
    if not file.name.endswith(SUFFIXES):
        raise ModelError(f"{file}: unknown kind of weight file; expected one of {', '.join(SUFFIXES)}")
    try:
        state, metadata = _read_safetensors(file) if file.suffix == ".safetensors" else (_read_torch(file), {})
    except OSError as error:
        raise ModelError(f"cannot read {file}: {error.strerror or error}") from None
    if not state:
        raise ModelError(f"{file} holds no tensors; is it the file of weights you meant?")

    for name, tensor in state.items():
        if tensor.dtype not in _LOADABLE:
            raise ModelError(
                f"{file}: tensor {name} has type {str(tensor.dtype)[6:]}, which is not read; save float32 or float16"
            )
        if tensor.layout != torch.strided or tensor.is_meta:
            raise ModelError(f"{file}: tensor {name} is sparse or without data, which is not read; save dense tensors")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise ModelError(
                f"{file}: tensor {name} has {bad} NaN or Inf of {tensor.numel()} values; the weights are damaged"
            )
    state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    state, research_prefix = _strip_prefixes(state, file)
    return Weights(state, metadata, research_prefix, file)


def _read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(file, framework="pt") as handle:
            state = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (no mapping, only keys())
            header = (handle.metadata() or {}).get(_HEADER_FIELD, "{}")
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:  # KeyError: a dtype torch does not know
        raise ModelError(f"{file} is not a readable safetensors file ({first_line(error)}); copy it again") from None
    try:
        metadata = json.loads(header)
    except ValueError:
        metadata = None
    if not isinstance(metadata, dict):
        raise ModelError(f"{file}: header field {_HEADER_FIELD!r} is no JSON object: {header[:60]!r}")
    return state, metadata


def _read_torch(file: Path) -> dict[str, Tensor]:
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                    raise ModelError(
                        f"{file} is a TorchScript archive, which carries code and is not loaded; for OpenAI's CLIP use "
                        "open_clip:NAME/openai, or save torch.jit.load(FILE).state_dict() as safetensors where you "
                        "trust it"
                    )
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        culprit = re.search(r"GLOBAL ([\w.]+)", str(error))
        found = f" ({culprit.group(1)})" if culprit else ""
        raise ModelError(
            f"{file} holds pickled objects{found} or is damaged: refused, nothing was executed; where you trust it, "
            "load it with the code that wrote it and save its state_dict alone"
        ) from None
    except (OSError, ModelError):
        raise
    # A damaged archive makes torch raise nearly anything: RuntimeError, EOFError, KeyError, UnicodeDecodeError...
    except Exception as error:
        raise ModelError(f"{file} is not a readable torch file ({first_line(error)}); copy it again") from None

    for key in _NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping):
        raise ModelError(f"{file} holds a {type(content).__name__}, not a dictionary of weights")
    for name, value in content.items():
        if not isinstance(value, Tensor):
            raise ModelError(
                f"{file}: entry {name!r} is a {type(value).__name__}, not a tensor; save a state_dict only"
            )
    return {str(name): tensor for name, tensor in content.items()}


def _strip_prefixes(state: dict[str, Tensor], file: Path) -> tuple[dict[str, Tensor], bool]:
    clean = {name.replace(_COMPILED, ""): tensor for name, tensor in state.items()}
    if len(clean) != len(state):
        raise ModelError(f"{file}: names are equal once '{_COMPILED}' is removed; save the uncompiled module")
    research_prefix = False
    for prefix in (_MODULE, RESEARCH_PREFIX, _MODULE):
        if all(name.startswith(prefix) for name in clean):
            clean = {name[len(prefix) :]: tensor for name, tensor in clean.items()}
            research_prefix |= prefix == RESEARCH_PREFIX
    return clean, research_prefix


def load_into(module: nn.Module, state: Mapping[str, Tensor], where: str | Path) -> None:
    """Copy `state` into `module`; names and shapes must agree exactly, as `misfit` says.

    Raises ModelError with one line: `where`, and how many tensors are missing, unexpected or of another shape, with the
    first names.
    """
    problem = misfit(module, state)
    if problem:
        raise ModelError(f"{where} does not fit {type(module).__name__}: {problem}")
    module.load_state_dict(dict(state), strict=False)


def misfit(module: nn.Module, state: Mapping[str, Tensor]) -> str:
    """How names and shapes of `state` differ from those of `module`, in one line; empty where they do not.

    BatchNorm's `num_batches_tracked` may be absent: files older than torch 0.4.1 lack it, and nothing here reads it.
    """
    own = module.state_dict()
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in own]
    misshapen = [
        f"{name} {list(state[name].shape)} instead of {list(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
    problems = [f"{len(names)} {kind} ({_first_names(names)})" for kind, names in kinds if names]
    return f"of its {len(own)} tensors {', '.join(problems)}" if problems else ""


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of all tensors, in order of name: equal weights, equal hash."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_safetensors(file: Path, state: Mapping[str, Tensor], metadata: Mapping[str, object]) -> None:
    """Write tensors and metadata (JSON values) to `file`, which either keeps its old content or holds all of the new.

    Equal arguments give equal bytes. Raises ModelError where the file cannot be written (no space, no permission).
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        if storage in seen and tensor.numel():  # tied parameters: the format has no shared memory
            tensors[name] = tensor.clone()
        seen.add(storage)

    def write(temporary: Path) -> None:
        save_file(tensors, temporary, metadata={_HEADER_FIELD: json.dumps(metadata)})
        temporary.chmod(0o644)  # safetensors makes files that only their owner can read

    _replace(file, write)


def write_text(file: Path, text: str) -> None:
    """Write `text` as UTF-8 to `file`, atomically. Raises ModelError where it cannot be written."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    _replace(file, write)


def _replace(file: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `file`, flush it to disk, and rename it over `file`."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, file)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        raise ModelError(f"cannot write {file}: {first_line(error)}") from None
    finally:
        temporary.unlink(missing_ok=True)


def _first_names(names: Sequence[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def first_line(error: BaseException) -> str:
    """What `error` says, cut to one line of at most 200 characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
