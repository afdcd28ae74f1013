"""Which implementation runs, where, and what is said about it. GPUs are fake tensors here: nothing is launched."""

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels import dispatch
from kernels.dispatch import matmul_float32, use_triton

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, tuple[int, int]]]:
    """Tensors on "cuda" under `FakeTensorMode`; the capability that it is said to have can be set."""
    card = {"capability": (9, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: card["capability"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    dispatch._age.cache_clear()
    with FakeTensorMode():
        yield card
    dispatch._age.cache_clear()


def test_gpus_run_triton_by_default(gpu: dict[str, tuple[int, int]]) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert use_triton("operation", "auto", torch.empty(3, device="cuda", dtype=dtype), None)
    assert not use_triton("operation", "auto", torch.empty(3, device="cuda", dtype=torch.float64))
    assert not use_triton("operation", "reference", torch.empty(3, device="cuda"))


def test_old_gpus_run_the_reference(gpu: dict[str, tuple[int, int]]) -> None:
    gpu["capability"] = (7, 5)
    tensor = torch.empty(3, device="cuda")
    assert not use_triton("operation", "auto", tensor)
    with pytest.raises(ValueError, match=r"operation: .*Some GPU is older than compute capability 8\.0"):
        use_triton("operation", "triton", tensor)


def test_a_compiled_function_may_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    dispatch._age.cache_clear()

    def ask(x: torch.Tensor) -> torch.Tensor:
        return x - 1 if dispatch._too_old(torch.device("cuda", 0)) else x + 1

    compiled = torch.compile(ask, fullgraph=True, backend="aot_eager")
    assert compiled(torch.zeros(2)).tolist() == [1, 1]
    dispatch._age.cache_clear()


def test_cpus_never_interpret_by_themselves() -> None:
    assert not use_triton("operation", "auto", torch.zeros(3))
    if dispatch.INTERPRETED:
        assert use_triton("operation", "triton", torch.zeros(3))


def test_what_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    with pytest.raises(ValueError, match="cpu tensors without TRITON_INTERPRET=1"):
        use_triton("operation", "triton", torch.zeros(3))
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    with pytest.raises(ValueError, match="Triton is not installed"):
        use_triton("operation", "triton", torch.zeros(3))
    assert not use_triton("operation", "auto", torch.zeros(3))
    with pytest.raises(ValueError, match="several devices: cpu, meta"):
        use_triton("operation", "auto", torch.zeros(3), torch.zeros(3, device="meta"))
    with pytest.raises(ValueError, match="kernel must be .* not 'fast'"):
        use_triton("operation", "fast", torch.zeros(3))  # type: ignore[arg-type]


def test_the_choice_is_logged_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(dispatch, "_said", set())
    with caplog.at_level(logging.INFO, "shiftlens"):
        for _ in range(3):
            use_triton("operation", "reference", torch.zeros(3))
    assert caplog.messages == ["kernel   operation: reference"]


def test_products_of_low_precision_are_not_rounded_to_it() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(5, 300).bfloat16(), torch.randn(300, 4).bfloat16()
    product = matmul_float32(a, b)
    assert product.dtype == torch.float32
    assert torch.allclose(product.double(), a.double() @ b.double(), rtol=0, atol=1e-4)


def test_without_triton_the_references_run() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from kernels import bench, distill_loss, pgd_step, probe_loss\n"
        "x, w = torch.rand(2, 3), torch.rand(4, 3)\n"
        "print(distill_loss.projected_distill_loss(x, w, None, torch.rand(2, 4)).ndim)\n"
        "print(pgd_step.pgd_step(x, x, x, step_size=0.1, eps=0.1, norm='l2').shape[1])\n"
        "print(probe_loss.multi_head_cross_entropy(x, w[None], None, torch.tensor([0, 1])).shape[0])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["0", "3", "1"], done.stderr
