"""Compile tier: every kernel in every shipped configuration becomes good machine code for four architectures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(path.stem for path in (ROOT / "tests/builds").glob("[a-z]*.py"))

pytest.importorskip("triton")


def test_every_kernel_file_has_builds() -> None:
    with_kernels = [path.stem for path in (ROOT / "kernels").glob("*.py") if "\n@jit" in path.read_text()]
    assert sorted(with_kernels) == MODULES


@pytest.mark.timeout(900)
@pytest.mark.parametrize("module", MODULES)
def test_builds(module: str, tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.builds", module]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert {report["target"] for report in reports} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert not [report for report in reports if report["faults"]]
