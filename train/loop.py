"""What the training loops must do alike: go on from a checkpoint, step safely, save, log.

Apart from train/common.py because it imports torch, which the command line and the launch checks there must not wait
for. What a step does stands in the scripts, where it is read and changed; `steps` has what comes between two of them.
`config` is a script's Config: flags of one name mean the same in all of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from data import DataError
from data.rows import versions
from data.runs import Transform
from data.stream import Stream, open_stream
from data.tar import ShardSet
from models import ModelError
from models.checkpoints import Checkpoint, CheckpointWriter, load_optimizer_tensors, optimizer_tensors, state_keys
from train.common import ConfigError, Progress, RunFolder, StopRequested, checkpoint_to_continue, memory_mib
from train.launching import Agreement, Sharding, StopSignals

# A gradient that is not finite skips the step; this many in a row end the run (fp16 needs some to find its scale).
MAX_NONFINITE_STEPS = 25
log = logging.getLogger("shiftlens")


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that take a gradient, by name, in the order in which an optimiser gets and keeps them."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


# ----------------------------------------------------------------------------------------------------------------------
# Start, or go on
# ----------------------------------------------------------------------------------------------------------------------


def open_run(
    config: Any, fixed: Sequence[str], agreement: Agreement, resources: contextlib.ExitStack
) -> tuple[RunFolder | None, Checkpoint | None]:
    """The run folder, and the checkpoint to continue if there is one: on rank 0; on the others None and None.

    fixed: settings that must be those of the checkpoint. `resources` gives the folder back.

    Raises ConfigError, ModelError on all ranks: see RunFolder and checkpoint_to_continue.
    """
    folder = checkpoint = None
    with agreement.together():
        if agreement.rank == 0:
            folder = RunFolder(Path(config.out), fresh=config.resume == "none")
            resources.callback(folder.close)
            checkpoint = checkpoint_to_continue(config, Path(config.out), fixed)
    return folder, checkpoint


def synchronise_batch_norm(module: nn.Module, accelerator: Accelerator) -> None:
    """Makes batch norm use the statistics of all GPUs' images in training, in place; names of weights stay.

    Raises ConfigError on a CPU, for which torch has none.
    """
    if accelerator.device.type != "cuda":
        raise ConfigError("--sync_batch_norm needs GPUs: torch has no synchronised batch norm for a CPU")
    if accelerator.num_processes > 1:
        nn.SyncBatchNorm.convert_sync_batchnorm(module)


def restore_on_all_ranks(
    module: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Checkpoint | None, agreement: Agreement
) -> None:
    """Gives all processes rank 0's weights, and the optimiser state of the checkpoint, which only rank 0 has.

    Args:
        module: where it will train; rank 0 has loaded the checkpoint's weights into it.
        optimizer: one that `state_keys` knows, over `trained_parameters(module)`, before accelerator.prepare.
        checkpoint: None on all ranks but 0.

    Raises ModelError on all ranks for optimiser state that does not fit.
    """
    trained = trained_parameters(module)
    with agreement.together():
        # Other ranks only need the right shapes: rank 0's values are sent to them.
        template = {
            f"{name}/{key}": torch.tensor(0.0) if key == "step" else parameter.detach().cpu()
            for name, parameter in trained.items()
            for key in state_keys(optimizer)
        }
        load_optimizer_tensors(optimizer, list(trained), checkpoint.tensors["optimizer"] if checkpoint else template)
    agreement.broadcast([*module.state_dict().values(), *optimizer_tensors(optimizer, list(trained)).values()])


def open_training_stream(
    data: str | ShardSet,
    config: Any,
    transform: Transform,
    agreement: Agreement,
    first: int,
    state: Mapping[str, Any] | None,
    resources: contextlib.ExitStack,
) -> tuple[Stream, dict[str, Any]]:
    """This rank's batches from step `first` on, without end, and what a checkpoint keeps of them as its "data".

    state: that of the checkpoint to continue, None for a new run. `resources` closes the stream.

    Raises ConfigError where the data are not those of the checkpoint, or the processes cannot share its streams;
    DataError for everything that is wrong with the data.
    """
    saved = state["data"] if state else {}
    epoch, start_step = divmod(first, saved["steps_per_epoch"]) if saved else (0, 0)
    stream = open_stream(
        data,
        global_batch=config.batch_size,
        rank=agreement.rank,
        world=agreement.world,
        workers=config.workers,
        streams=saved.get("streams", max(64, agreement.world)),
        seed=config.seed,
        epoch=epoch,
        start_step=start_step,
        epochs=None,
        transform=transform,
        strict=config.strict,
        max_bad_fraction=config.max_bad_fraction,
        allow_pipe=config.allow_pipe,
    )
    resources.enter_context(stream)
    here = {
        "fingerprint": stream.shards.fingerprint,
        "streams": stream.streams,
        "steps_per_epoch": stream.steps_per_epoch,
    }
    if saved and saved["fingerprint"] != here["fingerprint"]:
        raise ConfigError(f"--data {config.data}: not the data of the checkpoint (other shards, counts or content)")
    if saved and saved != here:
        raise ConfigError(
            f"{agreement.world} processes cannot continue a run of {saved['streams']} streams; "
            "use a number that divides it"
        )
    return stream, here


def count_steps(config: Any, steps_per_epoch: int, first: int) -> int:
    """How many optimiser steps the whole run has. Raises ConfigError where step `first` is beyond them."""
    total = config.steps or config.epochs * steps_per_epoch
    if first > total:
        raise ConfigError(f"{config.out} is at step {first}, beyond the {total} steps asked for")
    return total


def announce(config: Any, stream: Stream, accelerator: Accelerator, first: int, total: int) -> None:
    """Says what is to be done, on what, and where."""
    world, device = accelerator.num_processes, accelerator.device
    split = f"{world} processes x {config.batch_size // world // config.accumulate} x {config.accumulate} pieces"
    counts = stream.num_samples, len(stream.shards.shards), stream.steps_per_epoch
    log.info("data     %d images in %d shards, %d steps an epoch", *counts)
    where = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    log.info("to do    %d of %d steps, batch %d = %s", total - first, total, config.batch_size, split)
    log.info("device   %s, mixed precision %s", where, accelerator.mixed_precision)
    if first == total:
        log.info("         all steps are done already; for another run choose another --out")
    if config.warmup_steps >= total:
        log.info("warm-up  %d steps, as long as the run: the peak learning rate is not reached", config.warmup_steps)


# ----------------------------------------------------------------------------------------------------------------------
# A step
# ----------------------------------------------------------------------------------------------------------------------


class BatchStatistics:
    """Batch-norm running statistics of a module, which a forward pass changes before anybody knows whether it is good.

    Works on the device, without a host synchronisation: a concatenation before; another, a selection and a copy after.
    """

    def __init__(self, module: nn.Module) -> None:
        self._buffers = [
            buffer for name, buffer in module.named_buffers() if name.endswith(("running_mean", "running_var"))
        ]

    def snapshot(self) -> None:
        if self._buffers:
            self._before = torch.cat([buffer.flatten() for buffer in self._buffers])

    def settle(self, bad: Tensor, accelerator: Accelerator | None = None) -> None:
        """After the step's forward passes.

        bad: scalar, nonzero where the step since `snapshot` must leave no trace. accelerator: given, all ranks get the
        mean of their statistics; else each keeps its own.
        """
        if self._buffers:
            now = torch.cat([buffer.flatten() for buffer in self._buffers])
            if accelerator is not None:
                now = accelerator.reduce(now, "mean")  # type: ignore[assignment]
            kept = torch.where(bad > 0, self._before, now).split([buffer.numel() for buffer in self._buffers])
            torch._foreach_copy_(self._buffers, [part.view_as(b) for part, b in zip(kept, self._buffers, strict=True)])


class GuardedStep:
    """Optimiser steps of which those with a gradient that is not finite leave no trace, but are counted.

    Weights, moments and batch-norm statistics are then what they were. All of it is decided on the device: only
    `skipped`, and `check` where it is due, wait for it.

        guarded.begin(lr)
        for each piece of the batch:
            with guarded.piece(last=...):
                accelerator.backward(guarded.model(...) * share)
        norm = guarded.finish()

    Args:
        module: what is trained, and saved: whole, on its device and equal on all ranks.
        optimizer: over its trained parameters, fused: the only form that can skip a step on the device.
        clip: largest gradient norm.
        state: that of the checkpoint to continue, None for a new run.
        sharding: how to spread module and optimiser over the ranks; None for a copy of both on each of them.
        compiled: compile the module.
        share_statistics: all ranks go on with the mean of their batch-norm statistics, for a training that uses the
            module in evaluation mode between its steps: what one rank alone holds would be lost with every restart.

    Attributes:
        model: `module` as it is to be called in training; each call and its backward pass belong into one `piece`.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        clip: float,
        state: Mapping[str, Any] | None,
        *,
        sharding: Sharding | None = None,
        compiled: bool = False,
        share_statistics: bool = False,
    ) -> None:
        self.accelerator, self.module, self.sharding = accelerator, module, sharding
        self.lr = 0.0
        # Only module and optimiser are prepared: a prepared loader loses samples, a prepared scheduler steps once per
        # process.
        if sharding is None:
            if compiled:
                module.compile()
            self.model, self.optimizer = accelerator.prepare(module, optimizer)
        else:
            from train.sharding import shard, shell  # a second's import that few runs need

            self._shell = shell(module) if accelerator.is_main_process else None
            self.optimizer = accelerator.prepare(optimizer)
            self.model = accelerator.prepare_model(module, evaluation_mode=True)  # mixed precision, not DDP
            shard(module, optimizer, sharding, compiled=compiled)
        self._clip, self._parameters = clip, list(trained_parameters(module).values())
        self._statistics = BatchStatistics(module)
        self._sharing = accelerator if share_statistics and accelerator.num_processes > 1 else None
        self._nonfinite = torch.zeros((), device=accelerator.device)
        self._nonfinite_in_a_row = torch.zeros((), device=accelerator.device)
        self._skipped_before = state["skipped_steps"] if state else 0  # by the run's earlier starts
        self._reported = 0
        if accelerator.scaler is not None and state and state["scaler"]:
            accelerator.scaler.load_state_dict(state["scaler"])

    def begin(self, lr: float) -> None:
        """Before the step's first forward pass."""
        self.lr = lr
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self._statistics.snapshot()

    @contextlib.contextmanager
    def piece(self, *, last: bool) -> Iterator[None]:
        """Around forward and backward pass of a piece of the batch: ranks exchange gradients in the last one only."""
        if self.sharding is not None:
            from train.sharding import synchronise_gradients

            synchronise_gradients(self.model, last)
            yield
        elif last:
            yield
        else:
            with self.accelerator.no_sync(self.model):
                yield

    def finish(self) -> Tensor:
        """After the step's last backward pass. Returns the gradient's norm before clipping, a scalar on the device."""
        norm = self.accelerator.clip_grad_norm_(self._parameters, self._clip)
        assert norm is not None
        if self.sharding is not None:
            from train.sharding import gathered

            norm = gathered(norm)
        bad = (~torch.isfinite(norm)).float()
        if self.accelerator.scaler is None:  # which has its own way of skipping
            self.optimizer.optimizer.found_inf = bad  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._statistics.settle(bad, self._sharing)
        self._nonfinite += bad
        self._nonfinite_in_a_row = (self._nonfinite_in_a_row + 1) * bad
        return norm

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """State of module and optimiser, whole: the module's own, or copies on rank 0. All ranks must call it."""
        names = list(trained_parameters(self.module))
        groups = {
            "model": self.module.state_dict(),
            "optimizer": optimizer_tensors(self.optimizer.optimizer, names),
        }
        if self.sharding is None:
            return groups
        from train.sharding import whole

        keep = self.accelerator.is_main_process
        return {group: {name: whole(t, keep) for name, t in entries.items()} for group, entries in groups.items()}

    def trained(self) -> nn.Module | None:
        """After the last step: the module, whole, on the CPU; None on ranks that do not have it. All must call it."""
        if self.sharding is None:
            return self.module.cpu()
        state = self.tensors()["model"]
        if self._shell is not None:
            self._shell.load_state_dict(state)
        return self._shell

    def end(self) -> None:
        """After everything else, ends the run's trackers and its process group; `model` is gone then.

        The wrapper around the module goes first. If it outlived the group, its destructor would end the group, with
        Python's lock held, for which a thread of gloo that lets go of its last tensors may just be waiting: a rank
        would hang there for good (seen with torch 2.11).
        """
        del self.model
        self.accelerator.free_memory()
        gc.collect()  # of what forms cycles with it
        self.accelerator.end_training()

    @property
    def skipped(self) -> int:
        """Steps skipped since the run began, over all its starts."""
        return self._skipped_before + int(self._nonfinite)

    def check(self, step: int, due: bool, out: Path) -> None:
        """Where `due`, and now and then, looks at what `finish` counted; warns of new skipped steps.

        Raises ModelError after MAX_NONFINITE_STEPS in a row: on all ranks, as all have the same gradient.
        """
        if due and (skipped := self.skipped) > self._reported:
            self._reported = skipped
            log.warning("%d steps skipped so far: gradient not finite", skipped)
        if due or (step + 1) % MAX_NONFINITE_STEPS == 0:
            in_a_row = int(self._nonfinite_in_a_row)
            if in_a_row >= MAX_NONFINITE_STEPS:
                raise ModelError(
                    f"gradient not finite in {in_a_row} steps in a row up to step {step}; "
                    f"the checkpoints in {out}/checkpoints are kept"
                )


class EpochMeans:
    """Means of a step's terms over the images of the epoch so far, over all ranks: the result of a training.

    As training saw them: weights of each step, dropout, augmentation. Sums stay on the device until they are asked for,
    and go into checkpoints; rank 0 goes on from what all ranks had then. A run whose --steps end within an epoch has
    means over that part of it.
    """

    def __init__(self, state: Mapping[str, Any] | None, agreement: Agreement, device: torch.device) -> None:
        """state: of the checkpoint to continue, with "epoch_sums" among its facts; None for a new run.

        Raises ConfigError, on all ranks, for a checkpoint of an earlier version.
        """
        if state and not isinstance(state.get("epoch_sums"), dict):
            raise ConfigError(
                "the checkpoint is of an earlier version, which kept no sums of the epoch; use another --out"
            )
        before: dict[str, float] = state["epoch_sums"] if state and agreement.rank == 0 else {}
        self._type = torch.float32 if device.type == "mps" else torch.float64
        self._names = list(before)
        self._sums = torch.tensor(list(before.values()), device=device, dtype=self._type)

    def add(self, terms: Mapping[str, Tensor], rows: int, images: int, norm: Tensor, *, begins_epoch: bool) -> None:
        """After a step.

        terms: scalars on the device, sums over this rank's images divided by `rows`, the same in every step. images:
        their number. norm: of the gradient, not finite where the step was skipped: its images then do not count.
        """
        amounts = [*(term * rows for term in terms.values()), norm.new_full((), images)]
        of_step = torch.stack(amounts).to(self._type).where(torch.isfinite(norm), 0)
        self._sums = of_step if begins_epoch or not self._names else self._sums + of_step
        self._names = [*terms, "images"]

    def sums(self) -> dict[str, float]:
        """Over all ranks, for a checkpoint. All ranks must call it."""
        found: dict[str, float] = {}
        for part in gather_object([dict(zip(self._names, self._sums.tolist(), strict=True))]):
            for name, amount in part.items():
                found[name] = found.get(name, 0.0) + amount
        return found

    def means(self) -> tuple[dict[str, float], int]:
        """Means of the terms, and the number of images that they are over; no means of none. All ranks must call it."""
        sums = self.sums()
        images = round(sums.pop("images", 0))
        return {name: amount / images for name, amount in sums.items()} if images else {}, images


# ----------------------------------------------------------------------------------------------------------------------
# Between steps
# ----------------------------------------------------------------------------------------------------------------------


class Saver:
    """Saves, on rank 0 alone, all that some optimiser steps left: weights, optimiser, counts; in the background.

    Args:
        guarded: what is trained.
        config: its --out has the checkpoints, of which --keep stay.
        agreement: of the loop.
        state: that of the checkpoint to continue, None for a new run.
        facts: gives what else the script must find again, as JSON; all ranks call it. "data" in it is what
            `open_training_stream` gave.
    """

    def __init__(
        self,
        guarded: GuardedStep,
        config: Any,
        agreement: Agreement,
        resources: contextlib.ExitStack,
        state: Mapping[str, Any] | None,
        facts: Callable[[], Mapping[str, Any]],
    ) -> None:
        self._guarded, self._config, self._agreement, self._facts = guarded, config, agreement, facts
        self._reports_before = state["data_reports"] if state else []
        self._writer: CheckpointWriter | None = None
        if agreement.rank == 0:
            self._writer = CheckpointWriter(Path(config.out) / "checkpoints", keep=config.keep)
            resources.callback(self._writer.close)  # whatever ends the run, a save that has begun is finished

    def reports(self, report: Mapping[str, object]) -> list[dict[str, object]]:
        """A report for each start of the run and rank, the earlier starts' first: samples delivered, unusable ones.

        report: this start's and rank's. All ranks must call it.
        """
        return [*self._reports_before, *gather_object([report])]

    def save(self, step: int, report: Mapping[str, object], *, wait: bool) -> None:
        """Takes a copy of everything; `wait`: returns when it is on the disk, which the last save of a run must be.

        report: what this rank has had of its data up to `step`.

        Raises ModelError on all ranks where this save or the one before could not be written; older ones are kept.
        """
        facts = {**self._facts(), "data_reports": self.reports(report)}
        tensors = self._guarded.tensors()
        with self._agreement.together():
            if self._writer is not None:
                self._writer.save(step, tensors, self._state(facts))
        if wait:
            self.wait()

    def wait(self) -> None:
        """Returns when nothing is being written. Raises ModelError on all ranks for what could not be."""
        with self._agreement.together():
            if self._writer is not None:
                self._writer.wait()

    def _state(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Everything of a checkpoint that is no tensor."""
        guarded, scaler = self._guarded, self._guarded.accelerator.scaler
        return {
            "config": dataclasses.asdict(self._config),
            **facts,
            "skipped_steps": guarded.skipped,
            # Dropout and its like draw from (seed, step, rank): there is no random state to keep.
            "random": {"seed": self._config.seed, "rule": "torch.manual_seed(step_seed(seed, step, rank))"},
            "scaler": scaler.state_dict() if scaler is not None else None,
            "versions": versions(),
            "world": guarded.accelerator.num_processes,
        }

    def failure(self) -> ModelError | None:
        """What went wrong in the background since the last call, on rank 0; costs nothing."""
        return self._writer.failure() if self._writer is not None else None


BatchType = TypeVar("BatchType", covariant=True)


class Batches(Protocol[BatchType]):
    """Where batches come from, without end."""

    def __next__(self) -> BatchType: ...

    def report(self) -> dict[str, object]:
        """Of the batches handed out so far."""
        ...


def steps(
    first: int,
    total: int,
    batches: Batches[BatchType],
    saver: Saver,
    config: Any,
    agreement: Agreement,
    signals: StopSignals,
    progress: Progress,
    *,
    check: Callable[[BatchType], None] | None = None,
    save_at_once: bool = False,
) -> Iterator[tuple[int, BatchType]]:
    """Numbers and batches of the steps that are to be done: from `first` to the one before `total`.

    Between two steps: saves where --save_every says so, and at the end; fetches; then all ranks agree, so that nobody
    enters a step that another one cannot take.

    check: raises DataError for a batch that cannot be used. save_at_once: save even if no step is to be done.

    Raises DataError, ModelError of any rank; StopRequested after a signal to any, when all is saved.
    """
    for step in range(first, total + 1):
        last = step == total
        report = batches.report()  # of the steps that are done; what is fetched next may be of none
        if (step > first and (last or step % config.save_every == 0)) or (last and save_at_once):
            saver.save(step, report, wait=last)
        if last:
            return
        failure: DataError | ModelError | None = saver.failure()
        with progress.waiting():
            try:
                batch = next(batches)
                if check is not None:
                    check(batch)
            except DataError as error:
                failure = error
        if stop := agreement.settle(failure, signals.received):
            if step > first and step % config.save_every:
                saver.save(step, report, wait=True)
            else:
                saver.wait()
            raise stopped(stop, step, first, total, Path(config.out))
        yield step, batch


def stopped(number: int, step: int, first: int, total: int, out: Path) -> StopRequested:
    """What to raise when signal `number` came before `step`, which a start from `first` saved if it is a later one."""
    if step == first:
        return StopRequested(number, f"stopped by signal {number} at step {step}, before anything new was done")
    return StopRequested(number, f"stopped by signal {number}: saved at step {step} of {total} in {out}")


class Epochs(Protocol):
    """Where batches come from, as far as a row of the log needs it."""

    @property
    def steps_per_epoch(self) -> int: ...


def log_row(
    step: int, stream: Epochs, terms: Mapping[str, Tensor], norm: Tensor, guarded: GuardedStep, progress: Progress
) -> dict[str, Any]:
    """A row for metrics.jsonl, the same on all ranks: means of their terms, rates, memory. Waits for the device.

    terms: scalars of this rank's part of the batch. norm: the gradient's, from `GuardedStep.finish`.
    """
    packed = torch.stack([*(term.float() for term in terms.values()), norm.float()])
    *means, gradient_norm = guarded.accelerator.reduce(packed, "mean").tolist()
    return {
        "step": step,
        "epoch": step / stream.steps_per_epoch,
        **dict(zip(terms, means, strict=True)),
        "lr": guarded.lr,
        "gradient_norm": gradient_norm,
        "skipped_steps": guarded.skipped,
        **progress.rates(),
        "memory_mib": memory_mib(guarded.accelerator.device),
    }
