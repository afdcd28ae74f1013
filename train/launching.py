"""How a training script gets the world it was launched for, and how its ranks stop together.

Apart from train/common.py because all of it is about processes, not about training: it must be right before torch is
imported and before anything is computed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import logging
import os
import re
import signal
import socket
import sys
import time
import types
from collections.abc import Iterable, Iterator, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data import DataError
from data.parallel import signal_when_parent_dies
from models import ModelError
from train.common import ConfigError, LaunchError, StopRequested

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor
    from torch.distributed import Store

# ----------------------------------------------------------------------------------------------------------------------
# Launch
# ----------------------------------------------------------------------------------------------------------------------


# What accelerate's launcher can ask for beside sharding, and what must not be asked for here: variable, value, reason.
_REFUSED = [
    ("FSDP_OFFLOAD_PARAMS", "true", "--fsdp_offload_params is not supported"),
    ("FSDP_ACTIVATION_CHECKPOINTING", "true", "--fsdp_activation_checkpointing is not supported"),
    ("ACCELERATE_MIXED_PRECISION", "fp16", "FSDP with fp16 is not supported; use bf16 or no"),
]


@dataclass(frozen=True)
class Sharding:
    """How to shard.

    Attributes:
        reshard_after_forward: free a block's parameters after its forward pass and gather them again for the backward
            pass (less memory), or keep them in between (less traffic).
    """

    reshard_after_forward: bool


def sharding_asked_for(environment: MutableMapping[str, str] = os.environ) -> Sharding | None:
    """What `accelerate launch --use_fsdp` asked for, None without it; takes the request out of the environment.

    The rest of accelerate then sees a data-parallel run. To be called before `start_accelerator`, which refuses a
    request that nobody took.

    Raises LaunchError for what is asked for beside it and not supported.
    """
    if environment.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return None
    if environment.get("FSDP_VERSION", "1") != "2":
        raise LaunchError("FSDP version 1 is not supported; launch with --fsdp_version 2")
    for variable, value, reason in _REFUSED:
        if environment.get(variable, "").lower() == value:
            raise LaunchError(reason)
    if int(environment.get("WORLD_SIZE", 1)) == 1:
        raise LaunchError("--use_fsdp with one process has nothing to shard; launch without it")
    del environment["ACCELERATE_USE_FSDP"]
    # accelerate's own default, FULL_SHARD in version 1, is the same thing.
    return Sharding(environment.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false")


def start_accelerator(tracker: str | None, out: Path, resources: contextlib.ExitStack) -> Accelerator:
    """The Accelerator of this launch, after checks that the world is the one that was asked for.

    accelerate silently starts one process for `--cpu --num_processes 2`, silently trains N unconnected copies for
    `--multi_gpu` without a GPU, and silently ignores fp16 on a CPU; each is refused here with the command that works.

    `resources` then watches, to its end, whether the other ranks are still there: see train/heartbeat.py.

    Raises:
        LaunchError: one of the above, an unreachable main process, or an unsupported mode.
    """
    import torch

    environment = os.environ
    world = int(environment.get("WORLD_SIZE", 1))
    has_gpu = torch.cuda.is_available() and environment.get("ACCELERATE_USE_CPU", "false").lower() != "true"
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if environment.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise LaunchError("FSDP is for distill.py and finetune.py; launch this script without --use_fsdp")
    if environment.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise LaunchError("DeepSpeed is not supported by this script; launch without --use_deepspeed (data parallel)")
    if precision not in ("no", "bf16", "fp16"):
        raise LaunchError(f"--mixed_precision {precision} is not supported; use no, bf16 or fp16")
    if precision == "fp16" and not has_gpu:
        raise LaunchError(
            "--mixed_precision fp16 has no effect on a CPU (accelerate would train in fp32); use bf16 or no"
        )
    asked = _processes_asked_of_launcher()
    if asked is not None and asked != world:
        raise LaunchError(
            f"{asked} processes were asked for but {world} runs; on CPUs launch with `accelerate launch --config_file "
            f"train/launch/cpu_2_processes.yaml --num_processes {asked} SCRIPT`; "
            "several machines need the same --num_processes, the total over all"
        )
    if world > 1:
        patience = environment.get("SHIFTLENS_RENDEZVOUS_SECONDS", "120")
        if not patience.isdigit():
            raise LaunchError(f"SHIFTLENS_RENDEZVOUS_SECONDS must be a whole number of seconds, not {patience!r}")
        _wait_for_main_process(seconds=int(patience))
        from train.heartbeat import start_heartbeat

        heartbeat = resources.enter_context(start_heartbeat(patience=int(patience)))
        _start_process_group("nccl" if has_gpu else "gloo", heartbeat.store)

    from accelerate import Accelerator
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration

    if tracker is not None and tracker not in {str(name) for name in get_available_trackers()}:
        raise LaunchError(f"--tracker {tracker}: its package is not installed (accelerate would drop it in silence)")
    try:
        accelerator = Accelerator(
            cpu=True if world > 1 and not has_gpu else None,  # otherwise accelerate makes each rank a world of its own
            log_with=tracker,
            project_config=ProjectConfiguration(project_dir=str(out), logging_dir=str(out)),
            kwargs_handlers=[
                # Batch-norm buffers are read by nobody during training; rank 0's are saved.
                DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
            ],
        )
    except ValueError as error:  # such as bf16 on a GPU that has none
        raise LaunchError(" ".join(str(error).split())) from error
    if accelerator.num_processes != world:
        raise LaunchError(
            f"WORLD_SIZE is {world} but this process sees a world of {accelerator.num_processes}; "
            "launch with `accelerate launch` or torchrun"
        )
    return accelerator


def _start_process_group(backend: str, store: Store) -> None:
    """Joins the ranks of this start; accelerate, which would do it too, then finds them joined.

    When a launcher restarts its ranks (`--max_restarts`), the store in which they leave their addresses for each other
    is still that of the first start (seen with torch 2.11): a rank may find addresses of processes that are gone, and
    then it ends or hangs. So each start has a part of the store of its own.

    Raises LaunchError where the ranks do not meet, PeerLost where one of them has ended.
    """
    import torch.distributed as dist

    patience = datetime.timedelta(minutes=10)
    store.set_timeout(patience)
    start = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        dist.init_process_group(backend, store=start, rank=rank, world_size=world, timeout=patience)
    except RuntimeError as error:
        if explanation := _explain_lost_meeting(error):
            raise PeerLost(explanation) from None
        reason = str(error).partition("\n")[0].rstrip(".")
        raise LaunchError(f"the {backend} process group of {world} ranks did not start ({reason})") from None


def start_tracker(accelerator: Accelerator, config: Any) -> None:
    """Starts the experiment tracker with the settings as numbers and strings, which every tracker takes.

    Raises:
        LaunchError: the tracker could not start, for example for want of a network.
    """
    settings = {
        key: value if isinstance(value, (bool, int, float, str)) else str(value)
        for key, value in dataclasses.asdict(config).items()
    }
    try:
        accelerator.init_trackers("shiftlens", config=settings)
    except Exception as error:  # whatever a tracker's own package raises, the run must not start without it
        reason = " ".join(str(error).split())[:200]
        raise LaunchError(
            f"--tracker {config.tracker} did not start ({type(error).__name__}: {reason}); "
            "use --tracker none, or the tracker's offline mode (WANDB_MODE=offline)"
        ) from error


def _processes_asked_of_launcher() -> int | None:
    """--num_processes of the `accelerate launch` that is our parent process, or None when that cannot be seen."""
    try:
        arguments = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:  # no /proc (macOS, Windows) or a parent of another user
        return None
    # `accelerate launch`, `accelerate-launch` and `python -m accelerate.commands.launch` are the same program.
    starts = [i for i, argument in enumerate(arguments[:5]) if re.search(r"accelerate", Path(argument).name)]
    if not starts:
        return None
    script = [i for i, a in enumerate(arguments) if a.endswith(".py") and Path(a).name == Path(sys.argv[0]).name]
    flags = arguments[starts[0] + 1 : script[-1] if script else None]
    values: dict[str, str] = {}
    for i, argument in enumerate(flags):
        name, _, value = argument.partition("=")
        values[name.lstrip("-").replace("-", "_")] = value or (flags[i + 1] if i + 1 < len(flags) else "")
    if (count := values.get("num_processes")) and count.isdigit():
        return int(count)
    if "multi_gpu" in values or "cpu" in values:
        return None  # these make accelerate ignore the number in its file
    cache = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "huggingface"
    file = Path(values.get("config_file") or Path(cache) / "accelerate" / "default_config.yaml")
    import yaml

    with contextlib.suppress(OSError, yaml.YAMLError):
        settings = yaml.safe_load(file.read_text())
        if isinstance(settings, dict) and isinstance(settings.get("num_processes"), int):
            return settings["num_processes"]
    return None


def _wait_for_main_process(seconds: float) -> None:
    """Rank 0's port must answer before torch waits for it: torch would hang for its full timeout and name no cause."""
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not address or not port.isdigit():
        raise LaunchError(
            f"WORLD_SIZE > 1 needs MASTER_ADDR and MASTER_PORT (got {address!r}, {port!r}); "
            "use `accelerate launch` or torchrun"
        )
    if int(os.environ.get("RANK", 0)) == 0:
        return  # it opens the port itself
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((address, int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise LaunchError(
                    f"no main process at {address}:{port} for {seconds:.0f} s ({error}); "
                    "check --main_process_ip, --main_process_port and that machine 0 runs"
                ) from None
            time.sleep(0.5)


def start_run(
    out: Path,
    resources: contextlib.ExitStack,
    *,
    tracker: str | None = None,
    patience: datetime.timedelta | None = None,
) -> tuple[Accelerator, Agreement]:
    """`start_accelerator`, the agreement of its ranks, and a log to which all but rank 0 write warnings only.

    patience: see Agreement.
    """
    accelerator = start_accelerator(tracker, out, resources)
    agreement = Agreement(accelerator.process_index, accelerator.num_processes, patience or PATIENCE)
    level = logging.INFO if agreement.rank == 0 else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", force=True)
    return accelerator, agreement


def build_demo(accelerator: Accelerator, agreement: Agreement, *names: str) -> None:
    """If one of these names of data is `demo`: one process of each machine builds it, which the others then find."""
    with agreement.together():
        if "demo" in names and accelerator.is_local_main_process:
            from data.demo import demo_shards

            demo_shards("train")


# ----------------------------------------------------------------------------------------------------------------------
# Stop signals and agreement between ranks
# ----------------------------------------------------------------------------------------------------------------------


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """SIGTERM, SIGUSR1 and Ctrl-C set a flag that the loop obeys between steps; a second one later exits at once.

    SIGUSR1 is what batch systems are asked to send before a job's time is up (`sbatch --signal=USR1@180`).

    The three seconds are there because launchers forward the Ctrl-C that the terminal has already sent to each process.
    On Linux the death of the launcher counts as SIGTERM: `accelerate launch` dies of one without passing it on.
    """

    def __init__(self) -> None:
        self.received = 0
        self._first = 0.0
        self._ending = False

    @contextlib.contextmanager
    def ending(self) -> Iterator[None]:
        """A block that the first signal, if none has come yet, ends where it stands: work of minutes without steps.

        What the block has not handed out by then is lost. No collectives belong in it, nor anything that has to be
        put in order if it breaks off.
        """
        self._ending = True
        try:
            yield
            self._ending = False  # here, so that a signal just before is still caught
        except _Ended:
            pass
        finally:
            self._ending = False

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        signal_when_parent_dies(signal.SIGTERM)
        return self

    def __exit__(self, *exception: object) -> None:
        signal_when_parent_dies(0)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        if not self.received:
            self.received, self._first = number, time.monotonic()
            # Not print: a signal may arrive while a buffered write is under way.
            os.write(2, b"\nstopping after this step; a second signal in three seconds or later exits at once\n")
            # In the block's own entry and exit it is only noted: out of these, the exception would escape.
            if self._ending and frame is not None and frame.f_code.co_filename not in _ENTRY_AND_EXIT:
                raise _Ended
        elif time.monotonic() - self._first > 3:
            os._exit(128 + number)


class _Ended(BaseException):
    """Ends a block of `StopSignals.ending`; nothing that catches errors may take it for one."""


_ENTRY_AND_EXIT = (StopSignals.__enter__.__code__.co_filename, contextlib.contextmanager.__code__.co_filename)


class PeerError(Exception):
    """Another rank failed and says why; this one only ends."""


class PeerLost(PeerError):
    """Another rank ended without a vote, or gave none for too long: it may be unable to say so, so this one does."""


def explain_lost_peer(error: RuntimeError) -> str:
    """What gloo's error in a collective means, in one line; "" for another error. Its own text names a source file."""
    message = str(error).partition("\n")[0]
    reason = re.sub(r"^\[\S*/gloo/\S*\] ", "", message)
    if reason == message and not reason.startswith("Application timeout"):
        return ""
    what = "gave no sign of life in time" if "imed out" in reason else "ended without a word"
    return f"another process {what} ({reason}); look for its last lines"


def _explain_lost_meeting(error: RuntimeError) -> str:
    """The same for an error where ranks meet, by way of the store that rank 0 keeps."""
    from train.heartbeat import store_is_gone

    reason = str(error).partition("\n")[0].rstrip(".")
    if store_is_gone(reason):
        return f"rank 0 ended before the ranks had met ({reason}); look for its last lines"
    return explain_lost_peer(error)


# How long a rank waits for the others' votes. Not for a process that dies: that closes its connections, which all
# notice within a second or so. What needs a limit is a machine that vanishes, or a process that hangs for good.
#
# The default suits work that is dealt out in large pieces, such as parts of a feature cache or solutions by L-BFGS: in
# the last round some ranks have no piece and wait for the whole of another's, 65 536 images or hundreds of passes over
# a data set, which takes a CPU hours. A limit that ends such work is worse than one that finds a lost machine late.
PATIENCE = datetime.timedelta(hours=24)
# A training loop votes before every step. The most that comes between is a download of weights or a save by rank 0;
# a reader that stalls for longer is taken for dead (data/workers.py names its shard every half minute before that).
PATIENCE_BETWEEN_STEPS = datetime.timedelta(hours=1)


# A vote in one group goes around a ring: its time grows as the number of ranks, to that of a whole step at 512. Beyond
# FLAT ranks the vote goes along the sides of a grid instead, at most SIDE long: 42 messages in a row at 512, not 1022.
FLAT, SIDE = 16, 8


def grid(world: int) -> list[int]:
    """Sides of the grid on which `world` ranks vote: their product is `world`; one side where it cannot be divided."""
    sides: list[int] = []
    while world > FLAT or (sides and world > 1):
        divisors = [side for side in range(2, SIDE + 1) if world % side == 0]
        if not divisors:
            break
        sides.append(divisors[-1])
        world //= divisors[-1]
    return [*sides, world] if world > 1 or not sides else sides


class Agreement:
    """Lets all ranks act on the same step, and fail together: votes and small messages over a CPU channel.

    The channel is gloo even on GPUs: a vote must not wait for the work queued on the device (0.6 ms against a drained
    queue), and it must happen before the step, or a rank without a batch would leave the others in an all-reduce.

    Votes and messages, and the making, raise PeerLost when another rank has ended, or is not heard of for `patience`.
    """

    def __init__(self, rank: int, world: int, patience: datetime.timedelta = PATIENCE) -> None:
        import torch.distributed as dist

        self.rank, self.world = rank, world
        # Groups through this rank along each side, and the first rank of each.
        self._lines: list[tuple[dist.ProcessGroup, int]] = []
        stride = 1
        for side in grid(world) if world > 1 else []:
            first = rank - rank // stride % side * stride
            ranks = [first + place * stride for place in range(side)]
            # Only the members of a group make it, else 512 ranks would make 192 groups one after the other.
            try:
                group = dist.new_group(ranks, patience, backend="gloo", use_local_synchronization=True)
            except RuntimeError as error:
                if explanation := _explain_lost_meeting(error):
                    raise PeerLost(explanation) from None
                raise
            self._lines.append((group, first))
            stride *= side

    def settle(self, error: Exception | None, signal_number: int = 0) -> int:
        """The largest signal number that any rank brings. If any brings an error, the lowest such rank raises its own.

        Raises PeerError on all other ranks then.
        """
        failing = self.world - self.rank if error is not None else 0
        first, stop = self._largest(failing, signal_number)
        if not first:
            return stop
        if error is None or first != failing:
            raise PeerError
        # Settings that only this rank found impossible (its disk, its GPU) must be reported by it, whatever its number.
        raise LaunchError(str(error)) if isinstance(error, ConfigError) else error

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A block without collectives that may fail on some ranks only: if it fails anywhere, it fails everywhere."""
        error: Exception | None = None
        try:
            yield
        except (ConfigError, DataError, ModelError, OSError) as caught:
            error = caught
        self.settle(error)

    @contextlib.contextmanager
    def reading(self, signals: StopSignals) -> Iterator[None]:
        """`together` for minutes of reading before the first step: a stop signal ends it where it stands.

        Raises StopRequested on all ranks then, and where a signal came before the block, which must not write results.
        """
        stop = self.settle(None, signals.received)
        error: Exception | None = None
        if not stop:
            if not signals.received:  # else one has come during the vote, and this rank does not begin
                with signals.ending():
                    try:
                        yield
                    except (ConfigError, DataError, ModelError, OSError) as caught:
                        error = caught
            stop = self.settle(error, signals.received)
        if stop:
            raise StopRequested(stop, f"stopped by signal {stop} before the first step")

    def share(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.world == 1:
            return value
        import torch.distributed as dist

        values = [value]
        with self._listening():
            for group, first in self._lines:  # after each side those that lie at 0 along the later ones have it
                dist.broadcast_object_list(values, src=first, group=group)
        return values[0]

    def same(self, value: Any, what: str) -> None:
        """Raises DataError on all ranks if one sees another value than rank 0, as where machines hold other files.

        Ranks that went on would wait for each other forever, or mix results in silence.
        """
        first = self.share(value)
        with self.together():
            if value != first:
                raise DataError(f"{what} here are not those of rank 0; give all machines the same files")

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Overwrites tensors, on their own device, with rank 0's."""
        if self.world == 1:
            return
        import torch.distributed as dist

        for tensor in tensors:
            contiguous = tensor.detach().contiguous()
            dist.broadcast(contiguous, src=0)
            tensor.detach().copy_(contiguous)

    def _largest(self, *values: int) -> list[int]:
        if self.world == 1:
            return list(values)
        import torch
        import torch.distributed as dist

        votes = torch.tensor(values)
        with self._listening():
            for group, _ in self._lines:
                dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=group)
        return [int(v) for v in votes]

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        """Around a collective of the channel."""
        try:
            yield
        except RuntimeError as error:
            if explanation := explain_lost_peer(error):
                raise PeerLost(explanation) from None
            raise
