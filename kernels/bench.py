"""Benchmark of the fused operations: what they take beside eager PyTorch, torch.compile and what others would run.

    python eval/throughput.py kernels --device cuda --suite full --figure kernels.png     about seven minutes on one GPU
    python eval/throughput.py kernels --device cuda --suite quick                         about two minutes
    python eval/throughput.py kernels --device cpu                                        small shapes; only a rehearsal

Cases and targets: kernels/bench_cases.py. Competitors: kernels/bench_competitors.py. Rows, tables and the figure that
are made from what `run` yields: eval/operations.py.

Clocks. `gpu` is a replay of a CUDA graph between two events, after 256 MiB or more were read to clear the L2 cache
(written, they would leave it full of lines that what is timed has to write back). Small cases (`cache` is warm: all
their bytes fit in half of L2) run twenty times within one graph, so that launches are not counted and data stay in the
cache; they can beat a floor made from the bandwidth of memory. What waits for the device cannot be captured and is
timed by events around plain calls (`events`), with its gaps; a ratio with such a time has that clock too and counts for
no target. `wall` is ten plain calls by the host's clock, launches included. On a CPU there is one clock, `cpu`, on one
thread.
Within a round every competitor has one turn, in random order; a ratio is formed within a round. The phase `backward` is
`both` less a forward that records gradients, in rounds of their own: an operation that forms its gradients in forward
has next to none.

Floors are computed: the larger of useful bytes over copy bandwidth and useful operations over matrix-product rate. Both
rates are measured in the same run on the same device. Useful bytes read each input once and write each result once.
Extra memory is the peak beyond what was there before and beyond the results.
Before it is timed, each competitor is compared with the float64 reference: ours may err at most twice as much as eager.
Whatever fails (out of memory, a compiler's error, a wrong result, an unexpected wait for the device) becomes a line of
its own, and the suite goes on.
"""

from __future__ import annotations

import contextlib
import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels.bench_cases import CASES, CPU_CASES, OPERATIONS, Case, Target
from kernels.bench_competitors import TRIALS, Way, first_line

FLOOR_OF_ERROR = {"autocast": 1e-3, "bfloat16": 1e-3, "float32": 1e-5}  # relative; below it, eager was merely lucky
OTHER_FUNCTION = 0.1  # a competitor with a larger relative error computes something else
WARM_REPEATS, WALL_REPEATS = 20, 10


@dataclass(frozen=True)
class Options:
    """What to measure.

    Args:
        operations: of which operations.
        suite: `full` or `quick`; a CPU has only the quick one, with small shapes.
        device: `cuda` or `cpu`.
        compile: whether torch.compile takes part (on a CPU it takes tens of seconds for each case).
        max_autotune: whether torch.compile's mode max-autotune takes part as well (half a minute for each case).
        rounds: turns of each competitor.
        minutes: no case is begun after that many.
    """

    operations: tuple[str, ...] = OPERATIONS
    suite: str = "quick"
    device: str = "cpu"
    compile: bool = False
    max_autotune: bool = False
    rounds: int = 20
    minutes: float = 8.0


def cases(options: Options) -> list[Case]:
    """The cases of a suite; ValueError for a full suite on a CPU."""
    if options.device == "cpu" and options.suite == "full":
        raise ValueError("the full suite has shapes for a GPU; a CPU runs the quick one")
    table = CPU_CASES if options.device == "cpu" else CASES
    quick = options.device == "cuda" and options.suite == "quick"
    return [case for case in table if case.operation in options.operations and (case.quick or not quick)]


def compilers(options: Options) -> dict[str, Callable[[Any], Any]]:
    """Name → what makes a competitor of a function."""
    plain = partial(torch.compile, fullgraph=True, dynamic=False)
    found: dict[str, Callable[[Any], Any]] = {"compile": plain} if options.compile else {}
    if options.max_autotune:  # without its own CUDA graphs: the clock captures one
        found["compile max-autotune"] = partial(plain, mode="max-autotune-no-cudagraphs")
    return found


# --------------------------------------------------------------------------------------------------------------- clocks


class CudaClock:
    """Seconds of one call on a GPU: by CUDA graphs and events, and by the host's clock."""

    name = "gpu"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cache = torch.cuda.get_device_properties(device).L2_cache_size
        self.scratch = torch.zeros(max(256 * 2**20, 2 * self.cache) // 4, device=device)
        self.stream = torch.cuda.Stream(device)

    def timer(self, call: Callable[[], Any], *, warm: bool, graph: bool = True) -> Callable[[], float]:
        """Warms up, captures, and returns what gives the seconds of one call; RuntimeError if it cannot be captured."""
        repeats = WARM_REPEATS if warm else 1
        replay = self._capture(call, repeats) if graph else self._plain(call, repeats)

        def once() -> float:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.scratch.sum()  # also keeps the device busy while the host queues what is timed
            start.record()
            replay()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1000 / repeats

        once()
        return once

    def _plain(self, call: Callable[[], Any], repeats: int) -> Callable[[], None]:
        for _ in range(3):
            call()

        def replay() -> None:
            for _ in range(repeats):
                call()

        return replay

    def _capture(self, call: Callable[[], Any], repeats: int) -> Callable[[], None]:
        before = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(before)
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        try:
            with torch.cuda.stream(self.stream):
                for _ in range(2):
                    call()
                # What waits for the device is found here: found by a capture, it would leave PyTorch unable to capture.
                torch.cuda.set_sync_debug_mode("error")
                try:
                    call()
                finally:
                    torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize(self.device)
            with torch.cuda.graph(graph, pool=pool, stream=self.stream):
                for _ in range(repeats):
                    call()
        except BaseException:
            # A capture that fails leaves its stream behind, as the current one, and the allocator waiting for its end.
            torch.cuda.set_stream(before)
            self.stream = torch.cuda.Stream(self.device)
            with contextlib.suppress(Exception):  # it was not waiting
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
            raise
        torch.cuda.synchronize(self.device)
        return graph.replay

    def wall(self, call: Callable[[], Any]) -> float:
        """Seconds of one call by the host's clock, launches and all."""
        torch.cuda.synchronize(self.device)
        started = time.perf_counter()
        for _ in range(WALL_REPEATS):
            call()
        torch.cuda.synchronize(self.device)
        return (time.perf_counter() - started) / WALL_REPEATS

    def extra_memory(self, call: Callable[[], Any]) -> int:
        """Peak bytes beyond what was there before and beyond the results."""
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        results = call()
        torch.cuda.synchronize(self.device)
        extra = torch.cuda.max_memory_allocated(self.device) - torch.cuda.memory_allocated(self.device)
        del results
        return extra


class CpuClock:
    """Seconds of one call on a CPU, as often as fills a millisecond."""

    name = "cpu"
    cache = 0

    def timer(self, call: Callable[[], Any], *, warm: bool, graph: bool = True) -> Callable[[], float]:
        """Warms up and returns what gives the seconds of one call."""
        call()
        started = time.perf_counter()
        call()
        repeats = max(1, round(1e-3 / (time.perf_counter() - started)))

        def once() -> float:
            started = time.perf_counter()
            for _ in range(repeats):
                call()
            return (time.perf_counter() - started) / repeats

        return once


@dataclass(frozen=True)
class Rates:
    """What the device reaches: bytes per second of a copy (read and written), operations per second of products."""

    copy: float
    products: Mapping[str, float]  # precision → rate

    def floor(self, case: Case, phase: str) -> float:
        """Seconds that the useful work of a case takes at least."""
        work = case.work(phase)
        return max(work.bytes / self.copy, work.flops / self.products[case.precision])


def measure_rates(clock: CudaClock | CpuClock, device: torch.device, precisions: Sequence[str]) -> Rates:
    """Median rates of a large copy and of a large matrix product of random numbers."""
    large = device.type == "cuda"
    source = torch.empty(2**31 if large else 2**26, dtype=torch.uint8, device=device).random_()
    destination = torch.empty_like(source)
    copy = clock.timer(lambda: destination.copy_(source), warm=False, graph=False)
    seconds = statistics.median([copy() for _ in range(10)])
    side = 8192 if large else 512
    rates: dict[torch.dtype, float] = {}
    for precision in precisions:
        dtype = torch.float32 if precision == "float32" else torch.bfloat16
        if dtype not in rates:
            left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
            product = clock.timer(partial(torch.mm, left, right), warm=False, graph=False)
            rates[dtype] = 2 * side**3 / statistics.median([product() for _ in range(10)])
    products = {name: rates[torch.float32 if name == "float32" else torch.bfloat16] for name in precisions}
    return Rates(2 * source.numel() / seconds, products)


def take_turns(timers: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Times every competitor once a round, in random order."""
    found: dict[str, list[float]] = {name: [] for name in timers}
    for turn in range(rounds):
        for name in random.Random(turn).sample(sorted(timers), len(timers)):
            found[name].append(timers[name]())
    return found


# ---------------------------------------------------------------------------------------------------------- measurement


@dataclass(frozen=True)
class Measurement:
    """One figure before it is summarised.

    Args:
        metric: `time, us`, `speed-up`, `extra memory, MB`, a target's measure, a rate of the device, or `failed` and
            `absent` with the reason as `details["error"]`.
        values: one for each round.
        case, phase, competitor: what it belongs to.
        target: what is asked of it.
        details: clock, floor, rates and whatever else is known.
    """

    metric: str
    values: tuple[float, ...]
    case: Case | None = None
    phase: str = ""
    competitor: str = ""
    target: Target | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


def run(options: Options) -> Iterator[Measurement]:
    """Measures a suite, case by case; what fails is yielded too. RuntimeError without the device."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("no CUDA device")
    device = torch.device(options.device)
    todo, started = cases(options), time.monotonic()
    clock = CudaClock(device) if device.type == "cuda" else CpuClock()
    rates = measure_rates(clock, device, sorted({case.precision for case in todo}))
    yield Measurement("copy bandwidth, GB/s", (rates.copy / 1e9,))
    for precision, rate in rates.products.items():
        yield Measurement("matrix products, TFLOP/s", (rate / 1e12,), details={"precision": precision})
    for case in todo:
        if time.monotonic() - started > 60 * options.minutes:
            yield _missing("absent", case, "ours", f"not begun after {options.minutes:g} minutes")
            continue
        try:
            _release(options, device)
            yield from measure(case, options, clock, rates, device)
        except Exception as error:  # one case must not end the suite
            yield _missing("failed", case, "ours", first_line(error))


def _release(options: Options, device: torch.device) -> None:
    """Forgets what the last case left: compiled code, which may be recompiled a few times only, and memory."""
    if compilers(options):
        torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _missing(metric: str, case: Case, competitor: str, error: str) -> Measurement:
    return Measurement(metric, (1.0,), case, case.whole, competitor, details={"error": error})


def measure(
    case: Case, options: Options, clock: CudaClock | CpuClock, rates: Rates, device: torch.device
) -> Iterator[Measurement]:
    """All figures of one case."""
    trial = TRIALS[case.operation](case, compilers(options), device)
    yield from [_missing("absent", case, name, way) for name, way in trial.ways.items() if isinstance(way, str)]
    ways = {name: way for name, way in trial.ways.items() if not isinstance(way, str)}
    errors: dict[str, float] = {}
    for name, found in check(case, ways, trial.exact).items():
        if isinstance(found, str):
            yield _missing("failed", case, name, found)
            del ways[name]
        else:
            errors[name] = found
    warm = case.work(case.whole).bytes <= clock.cache / 2

    times: dict[tuple[str, str, str], list[float]] = {}  # phase, clock, competitor → seconds by round
    clocks: dict[tuple[str, str], str] = {}  # phase, competitor → clock other than `wall`
    for phase in (*case.phases, *(() if case.whole == "step" else ("recorded",))):
        timers: dict[str, Callable[[], float]] = {}
        for name, way in list(ways.items()):
            try:
                timers[name], clocks[phase, name], obstacle = _timer(clock, way, phase, warm)
            except Exception as error:
                yield _missing("failed", case, name, f"{phase}: {first_line(error)}")
                del ways[name]
                continue
            if obstacle:
                yield _missing("failed", case, name, f"{phase}: not captured, timed with its gaps: {obstacle}")
        for name, seconds in take_turns(timers, options.rounds).items():
            times[phase, clocks[phase, name], name] = seconds
            if phase != "recorded":
                details = {
                    "clock": clocks[phase, name],
                    "cache": "warm" if warm else "cold",
                    "note": ways[name].note,
                    "relative_error": errors.get(name),
                    **_derived(case, phase, statistics.median(seconds), rates),
                }
                yield _timed(case, phase, name, seconds, details)
        del timers  # graphs hold memory
    if case.whole == "both":
        for name in ways:
            both, recorded = (times[phase, clocks[phase, name], name] for phase in ("both", "recorded"))
            seconds = [a - b for a, b in zip(both, recorded, strict=True)]
            yield _timed(case, "backward", name, seconds, {"clock": clocks["both", name]})
    memory: dict[str, float] = {}
    if isinstance(clock, CudaClock):
        walls = {name: partial(clock.wall, way.phases[case.whole]) for name, way in ways.items()}
        for name, seconds in take_turns(walls, max(1, options.rounds // 2)).items():
            times[case.whole, "wall", name] = seconds
            yield _timed(case, case.whole, name, seconds, {"clock": "wall"})
        for name, way in ways.items():
            memory[name] = clock.extra_memory(way.phases[case.whole]) / 1e6
            yield Measurement("extra memory, MB", (memory[name],), case, case.whole, name)
    yield from compare(case, times, memory, rates)


def check(case: Case, ways: Mapping[str, Way], exact: Callable[[], list[Tensor]]) -> dict[str, float | str]:
    """Competitor → the largest relative error of its results against float64, or why it must not be timed."""
    right = exact()
    found: dict[str, float | str] = {}
    for name, way in ways.items():
        try:
            results = way.phases[case.whole]()
            if way.outcome is not None:
                found[name] = relative_error(way.outcome(results), right)
        except Exception as error:
            found[name] = first_line(error)
    for name, relative in found.items():
        if isinstance(relative, float):
            allowed = OTHER_FUNCTION
            if name == "ours" and isinstance(eager := found.get("eager"), float):
                allowed = 2 * eager + FLOOR_OF_ERROR[case.precision]
            if not relative <= allowed:  # NaN is wrong too
                found[name] = f"wrong result: relative error {relative:.3g}, allowed {allowed:.3g}"
    return found


def relative_error(found: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """The largest ‖found - right‖ / ‖right‖ over the results; NaN if one holds NaN."""
    errors = []
    for a, b in zip(found, right, strict=True):
        if a.shape != b.shape:
            return math.nan
        errors.append(((a.to(b.dtype) - b).norm() / b.norm()).item())
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def _timer(clock: CudaClock | CpuClock, way: Way, phase: str, warm: bool) -> tuple[Callable[[], float], str, str]:
    """A timer, the name of its clock, and why that is not the graph's where it should have been."""
    obstacle = ""
    if way.graph or isinstance(clock, CpuClock):
        try:
            return clock.timer(way.phases[phase], warm=warm), clock.name, ""
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # what cannot be captured can still be timed; what is broken fails again
            obstacle = first_line(error)
    return clock.timer(way.phases[phase], warm=warm, graph=False), "events", obstacle


def _timed(case: Case, phase: str, name: str, seconds: Sequence[float], details: Mapping[str, Any]) -> Measurement:
    return Measurement("time, us", tuple(1e6 * value for value in seconds), case, phase, name, details=details)


def _derived(case: Case, phase: str, seconds: float, rates: Rates) -> dict[str, float]:
    """What a time means for the useful work of its phase."""
    work, floor = case.work(phase), rates.floor(case, phase)
    return {
        "bytes": work.bytes,
        "flops": work.flops,
        "floor_us": 1e6 * floor,
        "over_floor": seconds / floor,
        "gb_per_s": work.bytes / seconds / 1e9,
        "tflop_per_s": work.flops / seconds / 1e12,
    }


def compare(
    case: Case, times: Mapping[tuple[str, str, str], Sequence[float]], memory: Mapping[str, float], rates: Rates
) -> Iterator[Measurement]:
    """How much faster ours is than each competitor, and each target; one that could not be measured is `absent`."""
    for (phase, clock, name), seconds in times.items():
        own_clocks = {"gpu": ("gpu", "events"), "events": ("events", "gpu")}.get(clock, (clock,))
        own_clock = next((own for own in own_clocks if (phase, own, "ours") in times), None)
        if own_clock is None or name in ("ours", "products") or phase == "recorded":
            continue
        clock = clock if clock == own_clock else "events"
        ratios = tuple(other / own for other, own in zip(seconds, times[phase, own_clock, "ours"], strict=True))
        target = next(
            (
                target
                for target in case.targets
                if (target.measure, target.phase, target.clock, target.against) == ("speed-up", phase, clock, name)
            ),
            None,
        )
        yield Measurement("speed-up", ratios, case, phase, "ours", target, {"against": name, "clock": clock})
    for target in case.targets:
        ours = times.get((target.phase, target.clock, "ours"))
        values: tuple[float, ...] = ()
        if target.measure == "speed-up":
            if ours is not None and (target.phase, target.clock, target.against) in times:
                continue
        elif target.measure == "extra MB" and "ours" in memory:
            values = (memory["ours"],)
        elif target.measure == "memory ratio" and {"ours", target.against} <= set(memory):
            values = (memory[target.against] / max(memory["ours"], 1e-6),)
        elif ours is not None and target.measure in ("TFLOP/s", "product share", "copy share"):
            work = case.work(target.phase)
            amount = {
                "TFLOP/s": work.flops / 1e12,
                "product share": work.flops / rates.products[case.precision],
                "copy share": work.bytes / rates.copy,
            }[target.measure]
            values = tuple(amount / seconds for seconds in ours)
        details = {"against": target.against, "clock": target.clock}
        if values:
            yield Measurement(target.measure, values, case, target.phase, "ours", target, details)
        else:
            reason = {"error": f"{target.measure}: not measured", **details}
            yield Measurement("absent", (1.0,), case, target.phase, "ours", target, reason)
