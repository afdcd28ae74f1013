"""Which implementation of an operation runs: its Triton kernels or its plain PyTorch reference; and Triton itself.

    auto       Triton for float32, bfloat16 and float16 tensors on ROCm and CUDA devices (compute capability 8.0 or
               higher), the reference for all others
    triton     Triton, or ValueError where it cannot run; on CPU tensors only under TRITON_INTERPRET=1 (slow: for tests)
    reference  the reference

The choice is logged once for each operation. Kernel files take `triton`, `tl` and `jit` from here, so that they can be
imported where Triton does not exist (macOS, Windows).
"""

from __future__ import annotations

import functools
import logging
from typing import Any, Literal

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
    # Decided when Triton is imported: its own functions are then interpreted too.
    INTERPRETED = bool(triton.knobs.runtime.interpret)
    jit = triton.jit
except ImportError:
    triton: Any = None  # type: ignore[no-redef]
    tl: Any = None  # type: ignore[no-redef]
    HAS_TRITON = INTERPRETED = False

    def jit(function: Any) -> Any:
        return function


Kernel = Literal["auto", "triton", "reference"]
KERNEL_TYPES = (torch.float32, torch.bfloat16, torch.float16)

_log = logging.getLogger("shiftlens")
_said: set[tuple[str, str]] = set()


def use_triton(operation: str, kernel: Kernel, *tensors: Tensor | None) -> bool:
    """True if Triton kernels are to run for these tensors.

    Args:
        operation: its name, for messages.
        kernel: what the caller asked for.
        tensors: the operation's floating-point tensors; None are passed over.

    Raises:
        ValueError: an unknown `kernel`, tensors on different devices, or `triton` where it cannot run.
    """
    present = [tensor for tensor in tensors if tensor is not None]
    devices = {tensor.device for tensor in present}
    if len(devices) != 1:
        raise ValueError(f"{operation}: tensors on several devices: {', '.join(sorted(map(str, devices)))}")
    if kernel not in ("auto", "triton", "reference"):
        raise ValueError(f"kernel must be 'auto', 'triton' or 'reference', not {kernel!r}")
    if kernel == "reference":
        _say_once(operation, "reference")
        return False
    obstacle = _obstacle(present)
    if kernel == "triton" and obstacle:
        raise ValueError(f"{operation}: kernel='triton' cannot run: {obstacle}")
    # An interpreted kernel is slower than the reference by orders of magnitude: never chosen by itself.
    chosen = not obstacle and (kernel == "triton" or present[0].device.type == "cuda")
    _say_once(operation, "Triton" if chosen else f"reference ({obstacle or 'CPU'})")
    return chosen


def _obstacle(tensors: list[Tensor]) -> str:
    """Why Triton cannot run for these tensors; empty if it can."""
    if not HAS_TRITON:
        return "Triton is not installed"
    other = next((tensor.dtype for tensor in tensors if tensor.dtype not in KERNEL_TYPES), None)
    if other is not None:
        return f"{other} tensors"
    device = tensors[0].device
    if device.type == "cuda":
        return _too_old(device)
    if device.type == "cpu":
        return "" if INTERPRETED else "cpu tensors without TRITON_INTERPRET=1"
    return f"{device.type} tensors"


@torch.compiler.assume_constant_result
def _too_old(device: torch.device) -> str:
    """Names an NVIDIA GPU before Ampere: it has no bfloat16 products, and no kernel was ever compiled for it."""
    return _age(device)


@functools.cache
def _age(device: torch.device) -> str:
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0):
        return ""
    return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"


def _say_once(operation: str, choice: str) -> None:
    if not torch.compiler.is_compiling() and (operation, choice) not in _said:
        _said.add((operation, choice))
        _log.info("kernel   %s: %s", operation, choice)


def matmul_float32(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] @ b [K, N] of one type → [M, N] float32: low-precision inputs, not a low-precision result.

    On CUDA the vendor's product with float32 output; elsewhere the inputs are converted first, to the same effect.
    """
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda and torch.version.hip is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 4 for the interpreter, so that persistent kernels loop in tests too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
