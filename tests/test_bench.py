"""The benchmark of the fused operations: its table, its arithmetic, its clocks, and that nothing wrong is timed."""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data import DataError
from eval import operations
from kernels import bench, bench_competitors
from kernels.bench import CpuClock, CudaClock, Measurement, Options, Rates
from kernels.bench_cases import CASES, CPU_CASES, OPERATIONS, Case, Target, Work
from kernels.bench_competitors import Trial, Way

CPU = torch.device("cpu")
H200 = Rates(4.3e12, {"autocast": 788e12, "bfloat16": 788e12, "float32": 50e12})


# --------------------------------------------------------------------------------------------------------------- cases

# (operation, option, sizes, precision) → (measure, phase, against, clock) → (must, stretch)
MSE, COSINE = ("distill_loss", "mse"), ("distill_loss", "cosine")
LINF, L2 = ("pgd_step", "linf"), ("pgd_step", "l2 ball_then_box")
COMPILE, EAGER = ("speed-up", "both", "compile", "gpu"), ("speed-up", "both", "eager", "gpu")
EAGER_WALL, EXTRA = ("speed-up", "both", "eager", "wall"), ("extra MB", "both", "", "gpu")
FORWARD, FORWARD_EAGER = ("speed-up", "forward", "compile", "gpu"), ("speed-up", "forward", "eager", "gpu")
RATE, MEMORY = ("TFLOP/s", "both", "", "gpu"), ("memory ratio", "both", "eager", "gpu")
STEP, ATTACKS = ("speed-up", "step", "compile", "gpu"), ("speed-up", "step", "torchattacks", "gpu")
STEP_WALL, ATTACKS_WALL = ("speed-up", "step", "compile", "wall"), ("speed-up", "step", "torchattacks", "wall")
COPY, PRODUCTS = ("copy share", "step", "", "gpu"), ("product share", "both", "", "gpu")
ONE_BY_ONE = ("speed-up", "both", "one by one", "wall")
LARGE = {FORWARD: (1.1, 1.3), RATE: (550, 650), EXTRA: (40, None)}
WIDE, WIDER = (50432, 768, 768, 768), (65536, 1024, 1024, 1024)
SMALL_LINF = {STEP: (0.97, 1.0), ATTACKS: (4, 8)}
LARGE_LINF = {STEP: (0.97, 1.0), ATTACKS: (3.8, 4.2), COPY: (0.85, 0.92)}
WALL = {ATTACKS_WALL: (3, None), STEP_WALL: (1.5, None)}
PHOTOS = {STEP: (1.1, 1.6), ATTACKS: (2.3, 4)}
ASKED: dict[Any, dict[Any, Any]] = {
    (*MSE, (256, 1024, 1024, 1024), "autocast"): {COMPILE: (1.15, 1.6), EAGER_WALL: (2, 4)},
    (*MSE, (256, 1024, 1024, 1024), "bfloat16"): {COMPILE: (1.15, 1.6)},
    (*MSE, (1024, 1024, 1024, 1024), "autocast"): {COMPILE: (1.15, 1.6), EAGER_WALL: (2, 4)},
    (*MSE, (1024, 1024, 1024, 1024), "bfloat16"): {COMPILE: (1.15, 1.6)},
    (*MSE, (4096, 1024, 1024, 1024), "autocast"): {COMPILE: (1.1, 1.25), EAGER: (1.6, 2.2)},
    (*MSE, (4096, 1024, 1024, 1024), "bfloat16"): {COMPILE: (1.1, 1.25)},
    (*MSE, WIDE, "autocast"): {
        **LARGE,
        COMPILE: (1.15, 1.35),
        EAGER: (2.0, 2.7),
        FORWARD_EAGER: (1.5, 3),
        MEMORY: (4, None),
    },
    (*MSE, WIDE, "bfloat16"): {**LARGE, COMPILE: (1.15, 1.35), MEMORY: (4, None)},
    (*MSE, WIDER, "autocast"): {
        **LARGE,
        COMPILE: (1.15, 1.28),
        EAGER: (1.8, 2.3),
        FORWARD_EAGER: (1.5, 3),
        MEMORY: (25, None),
    },
    (*MSE, WIDER, "bfloat16"): {**LARGE, COMPILE: (1.15, 1.28), MEMORY: (4, None)},
    (*COSINE, WIDE, "autocast"): {COMPILE: (1.05, 1.2), EAGER: (2.0, 2.6), EXTRA: (40, None)},
    (*COSINE, WIDE, "bfloat16"): {COMPILE: (1.05, 1.2), EXTRA: (40, None)},
    (*COSINE, WIDER, "autocast"): {COMPILE: (1.05, 1.2), EAGER: (2.0, 2.6), EXTRA: (40, None)},
    ("distill_loss", "kl logits", (50432, 768, 1000, 1000), "autocast"): {},
    ("distill_loss", "kl head", (8192, 1024, 21841, 1024), "autocast"): {},
    ("distill_loss", "smooth_l1", WIDE, "autocast"): {},
    (*LINF, (128, 3, 32, 32), "float32"): {**SMALL_LINF, **WALL},
    (*LINF, (512, 3, 32, 32), "float32"): SMALL_LINF,
    (*LINF, (8192, 3, 32, 32), "float32"): LARGE_LINF,
    (*LINF, (64, 3, 224, 224), "float32"): LARGE_LINF,
    (*LINF, (256, 3, 224, 224), "float32"): LARGE_LINF,
    (*LINF, (512, 3, 224, 224), "float32"): LARGE_LINF,
    (*L2, (128, 3, 32, 32), "float32"): {STEP: (1.0, 1.3), ATTACKS: (4, 8), **WALL},
    (*L2, (512, 3, 32, 32), "float32"): {STEP: (1.0, 1.3), ATTACKS: (4, 8)},
    (*L2, (8192, 3, 32, 32), "float32"): {STEP: (1.0, 1.2), ATTACKS: (4, 4.7)},
    (*L2, (64, 3, 224, 224), "float32"): PHOTOS,
    (*L2, (256, 3, 224, 224), "float32"): PHOTOS,
    (*L2, (512, 3, 224, 224), "float32"): PHOTOS,
    ("pgd_step", "l2 box_then_ball", (128, 3, 32, 32), "float32"): {},
    ("pgd_step", "l2 box_then_ball", (256, 3, 224, 224), "float32"): {},
    ("pgd_step", "l2 nearest", (1024, 3, 32, 32), "float32"): {},
    ("pgd_step", "l1 ball_then_box", (1024, 3, 32, 32), "float32"): {},
    ("pgd_step", "linf model_input", (256, 3, 224, 224), "float32"): {},
    ("probe_loss", "", (8, 1024, 1024, 1000), "autocast"): {ONE_BY_ONE: (3, None)},
    ("probe_loss", "", (52, 1024, 3072, 1000), "autocast"): {ONE_BY_ONE: (2, None)},
    ("probe_loss", "", (8, 4096, 1024, 1000), "autocast"): {PRODUCTS: (0.5, None)},
    ("probe_loss", "", (64, 4096, 1024, 1000), "autocast"): {PRODUCTS: (0.5, None)},
}


def test_cases_are_exactly_those_with_targets() -> None:
    found = {
        (case.operation, case.option, case.sizes, case.precision): {
            (target.measure, target.phase, target.against, target.clock): (target.must, target.stretch)
            for target in case.targets
        }
        for case in CASES
    }
    assert found == ASKED
    assert len(CASES) == len(ASKED) == len({case.name for case in CASES})
    assert all(len(case.targets) == len(ASKED[dataclasses.astuple(case)[:4]]) for case in CASES)


def test_targets_name_what_is_measured() -> None:
    for case in CASES:
        for target in case.targets:
            assert target.phase in case.phases
            assert target.clock == "gpu" or target.phase == case.whole  # only the whole is timed by the host's clock
            assert target.stretch is None or target.verdict(target.stretch) == "stretch"


def test_suites() -> None:
    full, quick = cases_of(device="cuda", suite="full"), cases_of(device="cuda")
    assert full == list(CASES)
    assert set(quick) < set(full)
    assert {case.operation for case in quick} == set(OPERATIONS)
    assert all(case.targets for case in quick)
    assert cases_of() == list(CPU_CASES)
    assert {case.operation for case in cases_of(operations=("pgd_step",))} == {"pgd_step"}
    assert {(case.operation, case.option) for case in CPU_CASES} >= {
        (case.operation, case.option) for case in CASES if case.option != "smooth_l1"
    }
    assert not any(case.targets for case in CPU_CASES)
    with pytest.raises(ValueError, match="full suite has shapes for a GPU"):
        cases_of(suite="full")


def cases_of(**options: Any) -> list[Case]:
    return bench.cases(Options(**options))


def case_of(operation: str, option: str, sizes: tuple[int, ...], precision: Any, *targets: Target) -> Case:
    return Case(operation, option, sizes, precision, targets)


@pytest.mark.parametrize(
    ("case", "phase", "microseconds"),
    [
        # 6·65536·1024² and 2·65536·1024² operations at 788 TFLOP/s
        (case_of("distill_loss", "mse", WIDER, "bfloat16"), "both", 523.3),
        (case_of("distill_loss", "mse", WIDER, "autocast"), "forward", 174.4),
        (case_of("distill_loss", "cosine", WIDE, "bfloat16"), "both", 226.5),
        # 3·256·1024 activations and 2·1024·1025 parameters take 1.34 us at 4.3 TB/s, 6·256·1024² operations longer
        (case_of("distill_loss", "mse", (256, 1024, 1024, 1024), "bfloat16"), "both", 2.044),
        # 2·256·1024 activations and 1024·1025 parameters of two bytes
        (case_of("distill_loss", "mse", (256, 1024, 1024, 1024), "bfloat16"), "forward", 0.7321),
        # 4 · 512·3·224·224 float32 values, and so on: the table of floors of a step
        (case_of("pgd_step", "linf", (512, 3, 224, 224), "float32"), "step", 286.8),
        (case_of("pgd_step", "l2 ball_then_box", (8192, 3, 32, 32), "float32"), "step", 93.6),
        (case_of("pgd_step", "linf", (128, 3, 32, 32), "float32"), "step", 1.463),
        # 16 + 4 (noise) + 2 (bf16) bytes for each of 256·150528 values
        (case_of("pgd_step", "linf model_input", (256, 3, 224, 224), "float32"), "step", 197.2),
        # 4·1024·1024·64000 operations
        (case_of("probe_loss", "", (64, 1024, 1024, 1000), "autocast"), "both", 340.7),
    ],
)
def test_floors_are_those_computed_by_hand(case: Case, phase: str, microseconds: float) -> None:
    assert 1e6 * H200.floor(case, phase) == pytest.approx(microseconds, rel=1e-3)


def test_work_counts_each_input_and_result_once() -> None:
    head = case_of("distill_loss", "kl head", (10, 4, 7, 3), "autocast")
    assert head.work("forward") == Work(10 * 4 * 2 + 10 * 3 * 2 + (7 * 4 + 7) * 4 + 7 * 3 * 4, 2 * 10 * 7 * (4 + 3))
    assert head.work("both") == Work(
        2 * 10 * 4 * 2 + 10 * 3 * 2 + 2 * (7 * 4 + 7) * 4 + 7 * 3 * 4, 6 * 10 * 7 * 4 + 2 * 10 * 7 * 3
    )
    probe = case_of("probe_loss", "", (3, 10, 4, 7), "bfloat16")
    assert probe.work("forward") == Work(10 * 4 * 2 + 10 * 8 + 3 * 7 * 5 * 2, 2 * 10 * 4 * 21)
    assert probe.work("both") == Work(10 * 4 * 2 + 10 * 8 + 2 * 3 * 7 * 5 * 2, 4 * 10 * 4 * 21)


def test_verdicts() -> None:
    speed = Target("speed-up", "both", 1.15, 1.6, "compile")
    assert [speed.verdict(value) for value in (1.14, 1.15, 1.59, 1.6, math.nan)] == [
        "missed",
        "must",
        "must",
        "stretch",
        "missed",
    ]
    assert Target("product share", "both", 0.5).verdict(9) == "must"
    extra = Target("extra MB", "both", 40, 20)
    assert [extra.verdict(value) for value in (41, 40, 20)] == ["missed", "must", "stretch"]


# --------------------------------------------------------------------------------------------------------- competitors


@pytest.mark.parametrize("case", CPU_CASES, ids=lambda case: case.name)
def test_all_competitors_compute_the_same(case: Case) -> None:
    trial = bench.TRIALS[case.operation](case, {}, CPU)
    ways = {name: way for name, way in trial.ways.items() if isinstance(way, Way)}
    found = bench.check(case, ways, trial.exact)
    expected = {"ours", "eager"}
    if case.option in ("linf", "linf model_input", "l2 ball_then_box"):
        expected |= {"torchattacks", "robustness"}
    if case.option == "l2 box_then_ball":
        expected |= {"smoothadv"}
    if case.operation == "probe_loss":
        expected |= {"one by one", "einsum"}
    assert set(found) - {"liger"} == expected
    rounded = case.precision != "float32" or "model_input" in case.option
    for name, error in found.items():
        assert isinstance(error, float), f"{name}: {error}"
        assert error < (1e-2 if rounded else 5e-6), name


@pytest.mark.parametrize("case", CPU_CASES, ids=lambda case: case.name)
def test_the_kernels_pass_the_check(case: Case, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, or interpreted, `ours` is called as on a GPU and is as accurate as the check demands."""
    monkeypatch.setattr(bench_competitors, "_ours", lambda device: "triton")
    trial = bench.TRIALS[case.operation](case, {}, torch.device(device))
    ways = {name: way for name, way in trial.ways.items() if isinstance(way, Way) and name in ("ours", "eager")}
    found = bench.check(case, ways, trial.exact)
    assert all(isinstance(error, float) for error in found.values()), found


@pytest.mark.parametrize("case", CPU_CASES, ids=lambda case: case.name)
def test_phases_return_losses_and_gradients(case: Case) -> None:
    trial = bench.TRIALS[case.operation](case, {}, CPU)
    for name, way in trial.ways.items():
        if not isinstance(way, Way) or name == "products":
            continue
        results = way.phases[case.whole]()
        if case.whole == "step":
            assert results[0].shape == case.sizes, name
            assert not any(result.requires_grad for result in results)
            continue
        assert all(not loss.requires_grad for loss in way.phases["forward"]()), name
        assert all(loss.requires_grad for loss in way.phases["recorded"]()), name
        assert way.outcome is not None
        assert [result.shape for result in way.outcome(results)] == [result.shape for result in trial.exact()]


def test_gradient_is_large_enough_for_every_projection() -> None:
    """The cases exercise ball and box: a step without projection would leave them."""
    for case in CPU_CASES:
        if case.operation == "pgd_step":
            trial = bench.TRIALS["pgd_step"](case, {}, CPU)
            ours = trial.ways["ours"]
            assert isinstance(ours, Way)
            adv = ours.phases["step"]()[0]
            assert 0 == adv.min() < adv.max() == 1
            change = trial.exact()[0].flatten(1)
            norm, eps = {"linf": (math.inf, 8 / 255), "l2": (2, 0.5), "l1": (1, 12.0)}[case.option.split()[0]]
            length = torch.linalg.vector_norm(change, norm, 1)
            assert (length <= eps * (1 + 1e-6)).all()
            assert (length > 0.8 * eps).all(), case.name


@pytest.fixture
def fake_liger(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Liger-Kernel's two losses with its signatures, in plain PyTorch; returns the settings they were made with."""
    made: list[dict[str, Any]] = []

    class Loss:
        def __init__(self, *, weight_hard_loss: float, weight_soft_loss: float, beta: float, compiled: bool) -> None:
            assert (weight_hard_loss, weight_soft_loss) == (0, 1)
            made.append({"beta": beta, "compiled": compiled})

        def __call__(
            self,
            student_input: Tensor,
            student_weight: Tensor,
            teacher_input: Tensor,
            teacher_weight: Tensor,
            true_labels: Tensor,
            student_bias: Tensor,
        ) -> Tensor:
            assert true_labels.shape == student_input.shape[:1]
            student = F.linear(student_input, student_weight, student_bias)
            return self.loss(student, F.linear(teacher_input, teacher_weight))

        def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
            raise NotImplementedError

    class Cosine(Loss):
        def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
            return (1 - F.cosine_similarity(student, teacher)).mean()

    class Jsd(Loss):
        def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
            student, teacher = student.log_softmax(-1), teacher.log_softmax(-1)
            return F.kl_div(student, teacher, reduction="batchmean", log_target=True)

    package: Any = types.ModuleType("liger_kernel")
    package.chunked_loss = types.ModuleType("liger_kernel.chunked_loss")
    package.chunked_loss.LigerFusedLinearCosineSimilarityLoss = Cosine
    package.chunked_loss.LigerFusedLinearJSDLoss = Jsd
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.chunked_loss", package.chunked_loss)
    return made


@pytest.mark.parametrize("option", ["cosine", "kl head"])
def test_liger_is_called_for_the_same_function(option: str, fake_liger: list[dict[str, Any]]) -> None:
    case = next(case for case in CPU_CASES if case.option == option)
    trial = bench.TRIALS["distill_loss"](case, {}, CPU)
    way = trial.ways["liger"]
    assert isinstance(way, Way)
    assert not way.graph
    assert way.note
    assert fake_liger == [{"beta": 1.0 if option == "cosine" else 0.0, "compiled": False}]
    error = bench.check(case, {"liger": way}, trial.exact)["liger"]
    assert isinstance(error, float)
    assert error < 5e-6


def test_missing_peers_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "liger_kernel"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    case = next(case for case in CPU_CASES if case.option == "cosine")
    trial = bench.TRIALS["distill_loss"](case, {}, CPU)
    assert str(trial.ways["liger"]).startswith("liger-kernel: ModuleNotFoundError: ")
    absent = [found for found in run_case(case) if found.metric == "absent"]
    assert [(found.competitor, found.details["error"]) for found in absent] == [("liger", trial.ways["liger"])]


@pytest.mark.timeout(240)
def test_torch_compile_takes_part() -> None:
    case = case_of("pgd_step", "linf", (2, 3, 4, 4), "float32")
    found = run_case(case, compile=True)
    assert not [one for one in found if one.metric == "failed"]
    assert {one.competitor for one in found if one.metric == "time, us"} >= {"ours", "eager", "compile"}
    assert set(bench.compilers(Options(max_autotune=True))) == {"compile max-autotune"}


@pytest.mark.parametrize("case", [case for case in CPU_CASES if case.operation == "pgd_step"], ids=lambda c: c.name)
def test_published_steps_are_what_is_compiled(case: Case) -> None:
    """Where there is one; all compute the same."""
    compiled: list[Any] = []

    def compiler(function: Any) -> Any:
        compiled.append(function)
        return function

    trial = bench.TRIALS["pgd_step"](case, {"compile": compiler}, CPU)
    assert isinstance(compiled[0], functools.partial) == case.option.startswith(("l1", "l2 nearest"))
    way = trial.ways["compile"]
    assert isinstance(way, Way)
    error = bench.check(case, {"compile": way}, trial.exact)["compile"]
    assert isinstance(error, float)
    assert error < (1e-2 if "model_input" in case.option else 5e-6)


def test_compiled_code_is_forgotten_between_cases(two_cases: list[Case], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of its modes takes part: the number of recompilations is limited."""
    resets: list[int] = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(1))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    for number, options in enumerate((Options(), Options(compile=True), Options(max_autotune=True))):
        assert not [one for one in bench.run(dataclasses.replace(options, rounds=1)) if one.metric == "failed"]
        assert len(resets) == 2 * number


# -------------------------------------------------------------------------------------------------------------- clocks


def run_case(case: Case, clock: Any = None, device: torch.device = CPU, **options: Any) -> list[Measurement]:
    return list(bench.measure(case, Options(rounds=3, **options), clock or CpuClock(), H200, device))


def test_everyone_has_one_turn_a_round() -> None:
    order: list[str] = []

    def timer(name: str) -> Callable[[], float]:
        def once() -> float:
            order.append(name)
            return float(len(order))

        return once

    names = ["a", "b", "c", "d"]
    found = bench.take_turns({name: timer(name) for name in names}, 8)
    rounds = [order[start : start + 4] for start in range(0, 32, 4)]
    assert all(sorted(turn) == names for turn in rounds)
    assert len({tuple(turn) for turn in rounds}) > 4
    assert found == {name: [4.0 * turn + order.index(name) + 1 for turn, order in enumerate(rounds)] for name in names}
    assert bench.take_turns({"a": lambda: 1.0}, 2) == {"a": [1.0, 1.0]}


def test_cpu_clock() -> None:
    calls = []

    def call() -> None:
        calls.append(1)
        time.sleep(0.002)

    once = CpuClock().timer(call, warm=True)
    assert len(calls) == 2  # one warms up, one tells how often a millisecond is filled
    assert 0.002 <= once() < 1
    assert len(calls) == 3


@pytest.fixture
def clock(device: str, monkeypatch: pytest.MonkeyPatch) -> CudaClock:
    """A GPU's clock; without a GPU one whose events read the host's clock and whose graphs repeat their calls."""
    if device == "cpu":
        stub_cuda(monkeypatch)
    found = CudaClock(torch.device(device))
    found.log = getattr(torch.cuda, "log", [])  # type: ignore[attr-defined]
    return found


def stub_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("record")
            self.at = time.perf_counter()

        def synchronize(self) -> None:
            log.append("wait")

        def elapsed_time(self, end: Any) -> float:
            return 1000 * (end.at - self.at)

    class Stream:
        def __init__(self, device: Any = None) -> None:
            pass

        def wait_stream(self, other: Any) -> None:
            pass

    class Inside:
        """A context that records calls made within it, as a capture does."""

        def __init__(self, *_: Any, **__: Any) -> None:
            log.append("begin")

        def __enter__(self) -> None:
            pass

        def __exit__(self, *_: Any) -> None:
            log.append("end")

    class Graph:
        def replay(self) -> None:
            log.append("replay")
            time.sleep(1e-4)

    class Scratch:
        def sum(self) -> None:
            log.append("clear")

    properties = types.SimpleNamespace(L2_cache_size=2**16)
    for name, value in {
        "Event": Event,
        "Stream": Stream,
        "stream": Inside,
        "graph": Inside,
        "CUDAGraph": Graph,
        "log": log,
        "current_stream": lambda device: "before",
        "graph_pool_handle": lambda: (0, 1),
        "set_sync_debug_mode": lambda mode: log.append(f"waits: {mode}"),
        "set_stream": lambda stream: log.append(f"stream {stream}"),
        "synchronize": lambda device: None,
        "get_device_properties": lambda device: properties,
        "reset_peak_memory_stats": lambda device: None,
        "max_memory_allocated": lambda device: 9_000_000,
        "memory_allocated": lambda device: 4_000_000,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value, raising=False)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *a, **k: Scratch() if a == (64 * 2**20,) else zeros(*a, **k))


def test_graphs_are_captured_after_warming_up(clock: CudaClock, device: str) -> None:
    if device != "cpu":
        pytest.skip("the order of calls is read off stand-ins")
    log = clock.log  # type: ignore[attr-defined]
    once = clock.timer(lambda: log.append("call"), warm=True)
    warm_up = ["begin", "call", "call", "waits: error", "call", "waits: default", "end"]
    capture = [*warm_up, "begin", *["call"] * bench.WARM_REPEATS, "end"]
    timed = ["clear", "record", "replay", "record", "wait"]
    assert log == capture + timed
    assert 1e-4 / bench.WARM_REPEATS <= once() < 0.1
    assert log == capture + timed + timed

    log.clear()
    once = clock.timer(lambda: log.append("call"), warm=False, graph=False)
    assert log == ["call"] * 3 + ["clear", "record", "call", "record", "wait"]


def test_what_cannot_be_captured_is_timed_by_events(clock: CudaClock, device: str) -> None:
    """A call that waits for the device cannot be captured, the next call can."""
    value = torch.ones(1, device=device)
    captures: list[int] = []

    def call() -> list[Tensor]:
        captures.append(1)
        if device == "cpu" and len(captures) == 4:  # three warm up
            raise RuntimeError("operation not permitted when stream is capturing")
        return [value * value.item()]

    once, name, obstacle = bench._timer(clock, Way({"step": call}), "step", warm=False)
    assert name == "events"
    assert obstacle.startswith("RuntimeError: ")
    assert ("capturing" if device == "cpu" else "synchronizing") in obstacle
    assert once() > 0
    if device == "cpu":
        assert "stream before" in clock.log  # type: ignore[attr-defined]
    once, name, obstacle = bench._timer(clock, Way({"step": lambda: [value + value]}), "step", warm=False)
    assert (name, obstacle) == ("gpu", "")
    assert once() > 0


@pytest.mark.parametrize("waiting", ["ours", "eager"])
def test_a_wait_is_told_and_counts_for_no_target(
    waiting: str, clock: CudaClock, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a graph's replay, a time with gaps in it would flatter the other side."""
    right = torch.ones(2, 3, 4, 4, device=device)
    capturing = [False]
    capture = CudaClock._capture

    def noted(self: CudaClock, *arguments: Any) -> Any:
        capturing[0] = True
        try:
            return capture(self, *arguments)
        finally:
            capturing[0] = False

    def call() -> list[Tensor]:
        if capturing[0]:
            raise RuntimeError("operation not permitted when stream is capturing")
        return [right.clone()]

    monkeypatch.setattr(CudaClock, "_capture", noted)
    ways: dict[str, Way | str] = {name: Way({"step": lambda: [right.clone()]}) for name in ("ours", "eager")}
    ways[waiting] = Way({"step": call})
    monkeypatch.setitem(bench.TRIALS, "pgd_step", lambda *_: Trial(ways, lambda: [right.double()]))
    target = Target("speed-up", "step", 1, None, "eager")
    found = run_case(case_of("pgd_step", "linf", (2, 3, 4, 4), "float32", target), clock, torch.device(device))
    told = [(one.competitor, one.details["error"]) for one in found if one.metric == "failed"]
    assert [name for name, _ in told] == [waiting]
    assert told[0][1].startswith("step: not captured, timed with its gaps: RuntimeError: operation not permitted")
    ratios = [(one.details["clock"], one.target) for one in found if one.metric == "speed-up"]
    assert ratios == [("events", None), ("wall", None)]
    assert [one.metric for one in found if one.target is not None] == ["absent"]


@pytest.mark.parametrize(
    "case", [case for case in CPU_CASES if case.option not in ("linf", "kl logits")], ids=lambda case: case.name
)
def test_gpu_figures(case: Case, clock: CudaClock, device: str) -> None:
    """All that is measured on a GPU, there or with stand-ins: clocks, memory, targets."""
    targets = [Target("speed-up", case.whole, 0.1, 1e9, "eager"), Target("speed-up", case.whole, 1, None, "nobody")]
    targets += [Target("speed-up", case.whole, 1, None, "eager", "wall"), Target("copy share", case.whole, 2)]
    targets += [Target("extra MB", case.whole, 1e9, 0), Target("memory ratio", case.whole, 1e-9, None, "eager")]
    found = run_case(dataclasses.replace(case, targets=tuple(targets)), clock, torch.device(device))
    assert not [one for one in found if one.metric == "failed"]
    clocks = {one.details["clock"] for one in found if one.metric == "time, us" and one.competitor == "ours"}
    assert clocks == {"gpu", "wall"}
    waits = {one.competitor for one in found if one.metric == "time, us" and one.details["clock"] == "events"}
    assert waits <= {"smoothadv", "liger"}
    judged = {(one.target.measure, one.target.against, one.metric) for one in found if one.target is not None}
    assert judged == {
        ("speed-up", "eager", "speed-up"),
        ("speed-up", "nobody", "absent"),
        ("copy share", "", "copy share"),
        ("extra MB", "", "extra MB"),
        ("memory ratio", "eager", "memory ratio"),
    }
    if device == "cpu":
        assert {one.values for one in found if one.metric == "extra memory, MB"} == {(5.0,)}
        assert {one.values for one in found if one.metric == "memory ratio"} == {(1.0,)}
    ours = [
        one for one in found if one.metric == "time, us" and one.competitor == "ours" and "over_floor" in one.details
    ]
    for one in ours:
        seconds = sorted(one.values)[1] / 1e6
        work = case.work(one.phase)
        assert one.details["gb_per_s"] == pytest.approx(work.bytes / seconds / 1e9)
        assert one.details["tflop_per_s"] == pytest.approx(work.flops / seconds / 1e12)
        assert one.details["over_floor"] == pytest.approx(seconds / H200.floor(case, one.phase))
        assert one.details["cache"] == ("warm" if work.bytes <= clock.cache / 2 else "cold") or one.phase != case.whole


def test_rates_are_positive_and_shared_by_type() -> None:
    rates = bench.measure_rates(CpuClock(), CPU, ["autocast", "bfloat16", "float32"])
    assert rates.copy > 1e8
    assert rates.products["autocast"] == rates.products["bfloat16"] > 0 < rates.products["float32"]


# ---------------------------------------------------------------------------------------------------------- measurement


def test_ratios_are_formed_within_rounds_and_targets_are_judged() -> None:
    targets = (
        Target("speed-up", "both", 2, 3, "eager"),
        Target("speed-up", "both", 2, 3, "compile"),
        Target("TFLOP/s", "both", 1),
        Target("product share", "both", 0.5),
        Target("copy share", "both", 0.5),
        Target("extra MB", "both", 40),
        Target("memory ratio", "both", 4, None, "eager"),
    )
    case = case_of("probe_loss", "", (2, 5, 3, 7), "float32", *targets)
    work = case.work("both")
    rates = Rates(1000.0, {"float32": 10_000.0})
    times = {
        ("both", "gpu", "ours"): [1.0, 4.0, 2.0],
        ("both", "gpu", "eager"): [2.0, 12.0, 3.0],
        ("both", "gpu", "products"): [1.0, 1.0, 1.0],
        ("recorded", "gpu", "ours"): [0.5, 0.5, 0.5],
    }
    found = list(bench.compare(case, times, {"ours": 8.0, "eager": 40.0}, rates))
    values = {(one.metric, one.details.get("against")): one.values for one in found}
    assert values == {
        ("speed-up", "eager"): (2.0, 3.0, 1.5),
        ("absent", "compile"): (1.0,),
        ("TFLOP/s", ""): tuple(work.flops / 1e12 / seconds for seconds in (1, 4, 2)),
        ("product share", ""): tuple(work.flops / 10_000 / seconds for seconds in (1, 4, 2)),
        ("copy share", ""): tuple(work.bytes / 1000 / seconds for seconds in (1, 4, 2)),
        ("extra MB", ""): (8.0,),
        ("memory ratio", "eager"): (5.0,),
    }
    assert [one.target for one in found] == [targets[0], targets[1], *targets[2:]]
    unmeasured = list(bench.compare(case, {}, {}, rates))
    assert [one.metric for one in unmeasured] == ["absent"] * len(targets)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("ours", lambda found: found * 1.001, "wrong result: relative error 0.001, allowed 1e-05"),
        ("ours", lambda found: found * math.nan, "wrong result: relative error nan"),
        ("ours", lambda found: found[:1], "wrong result: relative error nan"),
        ("eager", lambda found: found * 1.2, "wrong result: relative error 0.2, allowed 0.1"),
        ("ours", lambda found: found.nothing, "AttributeError: "),
    ],
)
def test_wrong_results_are_not_timed(name: str, change: Callable[[Any], Any], message: str) -> None:
    right = torch.arange(1.0, 7.0, dtype=torch.float64).view(3, 2)
    ways = {other: Way({"step": lambda: [right.float()]}) for other in ("ours", "eager", "peer")}
    ways[name] = Way({"step": lambda: [change(right.float())]})
    case = case_of("pgd_step", "linf", (3, 1, 1, 2), "float32")
    found = bench.check(case, ways, lambda: [right])
    assert str(found[name]).startswith(message)
    assert all(isinstance(found[other], float) for other in ways if other != name)


def test_our_error_is_held_against_eagers() -> None:
    """Twice eager's error and no more; the peers may round as they like."""
    right = torch.ones(4, dtype=torch.float64)
    case = case_of("pgd_step", "linf", (4, 1, 1, 1), "float32")

    def errors(ours: float, eager: float) -> dict[str, Any]:
        ways = {"ours": Way({"step": lambda: [right + ours]}), "eager": Way({"step": lambda: [right + eager]})}
        return bench.check(case, ways, lambda: [right])

    assert errors(2e-3, 1e-3)["ours"] == pytest.approx(2e-3)
    assert "allowed 0.00201" in errors(2.1e-3, 1e-3)["ours"]
    assert errors(9e-6, 0.0)["ours"] == pytest.approx(9e-6)


@pytest.fixture
def two_cases(monkeypatch: pytest.MonkeyPatch) -> list[Case]:
    """A suite of two cases of a trial that can be broken."""
    cases = [case_of("pgd_step", "linf", (size, 1, 1, 1), "float32") for size in (1, 2)]
    monkeypatch.setattr(bench, "CPU_CASES", tuple(cases))
    return cases


def test_failures_become_figures_and_the_suite_goes_on(two_cases: list[Case], monkeypatch: pytest.MonkeyPatch) -> None:
    def trial(case: Case, compilers: Any, device: torch.device) -> Trial:
        right = torch.ones(case.sizes)
        calls: list[int] = []

        def broken() -> list[Tensor]:
            calls.append(1)
            if len(calls) > 1:
                raise torch.OutOfMemoryError("no memory\nmore lines")
            return [right]

        if case is two_cases[0]:
            raise ValueError("first case is broken")
        ways: dict[str, Way | str] = {
            "ours": Way({"step": broken}),
            "eager": Way({"step": lambda: [right]}),
            "peer": "not installed",
        }
        return Trial(ways, lambda: [right.double()])

    monkeypatch.setitem(bench.TRIALS, "pgd_step", trial)
    found = list(bench.run(Options(rounds=2)))
    told = [(one.metric, one.case, one.competitor, one.details["error"]) for one in found if "error" in one.details]
    assert told == [
        ("failed", two_cases[0], "ours", "ValueError: first case is broken"),
        ("absent", two_cases[1], "peer", "not installed"),
        ("failed", two_cases[1], "ours", "step: OutOfMemoryError: no memory"),
    ]
    assert [one.competitor for one in found if one.metric == "time, us"] == ["eager"]


def test_a_broken_device_ends_in_failed_cases(two_cases: list[Case], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(bench, "_release", broken)
    found = [one for one in bench.run(Options(rounds=1)) if one.case is not None]
    assert [(one.metric, one.case) for one in found] == [("failed", case) for case in two_cases]


def test_cases_are_not_begun_late(two_cases: list[Case]) -> None:
    found = [one for one in bench.run(Options(rounds=1, minutes=1e-9)) if one.case is not None]
    assert [(one.metric, one.case) for one in found] == [("absent", case) for case in two_cases]
    assert found[0].details["error"] == "not begun after 1e-09 minutes"


def test_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="no CUDA device"):
        next(bench.run(Options(device="cuda")))


def test_errors_are_told_by_their_first_line() -> None:
    assert bench_competitors.first_line(ValueError("one\ntwo")) == "ValueError: one"
    assert bench_competitors.first_line(KeyError()) == "KeyError: "
    assert len(bench_competitors.first_line(ValueError("x" * 1000))) == 300


# ------------------------------------------------------------------------------------------------------------- command


def test_stopped_runs_tell_what_they_measured(
    two_cases: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def stopped(case: Case, *rest: Any) -> Iterator[Measurement]:
        if case is two_cases[1]:
            raise KeyboardInterrupt
        yield from measure(case, *rest)

    measure = bench.measure
    monkeypatch.setattr(bench, "measure", stopped)
    rows = tmp_path / "rows.jsonl"
    with pytest.raises(KeyboardInterrupt):
        operations.main(operations.Config(device="cpu", rounds=1, rows=str(rows)))
    printed = capsys.readouterr().out
    assert two_cases[0].name in printed
    assert two_cases[1].name not in printed
    assert two_cases[0].name in rows.read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": "folder"}, "cannot write folder: Is a directory"),
        ({"figure": "folder.svg"}, "cannot write folder.svg: Is a directory"),
        ({"figure": "folder"}, "cannot write the figure folder: its name must end in .png, .pdf or .svg"),
        ({"figure": "file/figure.png"}, "cannot write file/figure.png: "),
        ({"figure": "figure.bmp"}, "figure.bmp: its name must end in .png, .pdf or .svg"),
    ],
)
def test_paths_are_checked_before_anything_is_measured(
    options: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "run", lambda *_: pytest.fail("measured"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.svg").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=message):
        operations.main(operations.Config(device="cpu", **{"rows": "rows.jsonl", **options}))
    assert not (tmp_path / "rows.jsonl").exists()
    assert not (tmp_path / "figure.bmp").exists()
