"""Ahead-of-time compilation of every kernel for every supported GPU, on a machine that needs none.

`python -m tests.builds distill_loss` compiles what `tests/builds/distill_loss.py` lists and prints one JSON line for
each build: shared memory, registers, spills, matrix instructions. tests/test_builds.py runs it in a process of its own,
because Triton decides at import whether kernels are compiled or interpreted.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

# Architecture → shared memory in bytes that one program can have.
TARGETS = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
# The matrix instruction that a product must become there: PTX on NVIDIA, the disassembly on AMD.
MATRIX_INSTRUCTIONS = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}


@dataclass(frozen=True)
class Build:
    """One kernel with one set of compile-time values.

    Args:
        name: what it is, for messages.
        kernel: the @jit function.
        signature: argument → type: `*bf16`, `*fp32`, `i64`, `fp32`… Arguments that are not listed are constexpr.
        constants: the constexpr arguments' values; pointers that are None at run time belong here, as None.
        warps, stages: launch options.
        targets: architectures that ship this configuration.
        aligned: arguments that are multiples of 16 (pointers always are, as PyTorch allocates them).
        matrix: whether it must hold matrix instructions.
        wide: whether global loads and stores must be 16 bytes wide (checked on NVIDIA targets).
        spills: bytes of register spills allowed, with the reason beside it where it is listed.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    warps: int = 4
    stages: int = 3
    targets: tuple[str, ...] = tuple(TARGETS)
    aligned: tuple[str, ...] = ()
    matrix: bool = False
    wide: bool = False
    spills: int = 0


@dataclass(frozen=True)
class Report:
    """What came of a build; `faults` is empty for a good one."""

    name: str
    target: str
    shared: int
    registers: int
    spills: int
    matrix: bool
    faults: list[str] = field(default_factory=list)


def compile_for(build: Build, target: str) -> Report:
    """Compiles one kernel for one architecture and inspects the machine code."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = build.kernel.arg_names
    signature = {name: build.signature.get(name, "constexpr") for name in names}
    constants = {(names.index(name),): value for name, value in build.constants.items()}
    attributes = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in build.signature.items()
        if kind.startswith("*") or name in build.aligned
    }
    nvidia = target.startswith("sm_")
    gpu = GPUTarget("cuda", int(target[3:]), 32) if nvidia else GPUTarget("hip", target, 64)
    source = ASTSource(build.kernel, signature=signature, constexprs=constants, attrs=attributes)
    with knobs.nvidia.scope(), contextlib.redirect_stdout(io.StringIO()) as log:
        knobs.nvidia.dump_ptxas_log = True  # what NVIDIA's assembler says of registers and spills
        compiled = triton.compile(source, target=gpu, options={"num_warps": build.warps, "num_stages": build.stages})
    assembly = compiled.asm["ptx" if nvidia else "amdgcn"]
    registers, spills, complaints = _ptxas(log.getvalue()) if nvidia else _amdgcn(assembly)
    faults = list(complaints)
    if compiled.metadata.shared > TARGETS[target]:
        faults.append(f"shared memory {compiled.metadata.shared} above {TARGETS[target]}")
    if spills > build.spills:
        faults.append(f"{spills} bytes of spills above {build.spills}")
    matrix = MATRIX_INSTRUCTIONS[target] in assembly
    if build.matrix and not matrix:
        faults.append(f"no {MATRIX_INSTRUCTIONS[target]}")
    if (
        build.wide
        and nvidia
        and not (re.search(r"ld\.global\S*\.v4\.b32", assembly) and "st.global.v4.b32" in assembly)
    ):
        faults.append("no 16-byte loads and stores")
    return Report(build.name, target, compiled.metadata.shared, registers, spills, matrix, faults)


def _ptxas(log: str) -> tuple[int, int, list[str]]:
    """Registers, bytes of spills, and warnings such as serialised wgmma, from what NVIDIA's assembler printed."""
    registers = max(map(int, re.findall(r"Used (\d+) registers", log)))
    spills = sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", log)))
    return registers, spills, re.findall(r".*\(C75\d\d\).*", log)


def _amdgcn(assembly: str) -> tuple[int, int, list[str]]:
    """Vector registers and bytes of spills from the metadata of AMD's assembler."""
    count = {name: int(value) for name, value in re.findall(r"\.(\w+_count):\s+(\d+)", assembly)}
    return count["vgpr_count"], 4 * (count["vgpr_spill_count"] + count["sgpr_spill_count"]), []


def main(module: str) -> None:
    """Compiles everything that tests/builds/`module`.py lists."""
    for build in importlib.import_module(f"tests.builds.{module}").builds():
        for target in build.targets:
            print(json.dumps(asdict(compile_for(build, target))), flush=True)
