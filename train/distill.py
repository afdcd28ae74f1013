"""Does a student that fits a robust teacher's features inherit its robustness? This script makes the student.

A frozen teacher encoder (by default a CLIP image tower) is distilled into a student trained from scratch on images
alone: the student's features are pulled to the teacher's by mean squared error (Feature Contamination, ICML 2024).
Optional further terms match hidden states (tokens after chosen blocks) and token Gram matrices.

    accelerate launch train/distill.py                                     built-in demo, a minute on two CPU cores
    accelerate launch train/distill.py --config train/recipes/rn50.yaml \\
        --data '/data/imagenet/train/{000000..001281}.tar' --out runs/rn50 one GPU
    accelerate launch --config_file train/launch/gpu_2x8_bf16.yaml --machine_rank N --main_process_ip HOST \\
        train/distill.py --config train/recipes/rn50.yaml --data URL       two nodes of eight GPUs, once on each

Writes into --out: config.yaml, env.json, metrics.jsonl (one row each --log_every steps), loss.png and loss.svg,
checkpoints/, results.jsonl (mean loss of the last epoch), and export/ (the student as safetensors and as an open_clip
folder, with a model card). The run continues by itself when the same command is started again; Ctrl-C, SIGTERM and
SIGUSR1 save first (exit code 130, 143, 138).

Cost per image: one teacher forward and one student forward and backward (RN50: 49 GFLOP; ViT-B/16: 140 GFLOP).
"""

from __future__ import annotations

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import contextlib
import dataclasses
import datetime
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from data.rows import append_row, commit
from models import ModelError
from train.common import (
    ConfigError,
    Progress,
    check_numbers,
    cosine_lr,
    draw_loss,
    option,
    run_script,
    step_seed,
)
from train.launching import (
    PATIENCE_BETWEEN_STEPS,
    StopSignals,
    build_demo,
    sharding_asked_for,
    start_run,
    start_tracker,
)

if TYPE_CHECKING:
    from torch import Tensor

Tracker = Literal[
    "none", "tensorboard", "wandb", "trackio", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab"
]


@dataclass(frozen=True)
class Config:
    """Settings; the defaults are the published ones of CLIP RN50 where the paper has them."""

    data: str = option(
        "", "shards: folder, glob, brace list, `::` join, http(s) or fsspec URL; `demo` = built-in digits"
    )
    teacher: str = option(
        "open_clip:RN50/openai", "frozen teacher encoder, for example open_clip:RN50/openai, local-dir:PATH"
    )
    student: str = option("", "student architecture; empty = the teacher's; never loads weights")
    init: Literal["published", "teacher_attention"] = option(
        "published", "initialisation: the paper's, or that with the teacher's attention layers copied in"
    )
    norm_stats: Literal["own", "teacher"] = option(
        "own", "batch-norm statistics: of each batch, or the teacher's running ones, frozen"
    )
    kind: Literal["mse", "cosine", "smooth_l1"] = option("mse", "distance between features, and between hidden states")
    feature_weight: float = option(1.0, "weight of the feature term")
    hidden_weight: float = option(0.0, "weight of the hidden-state term (published: 0.1)")
    hidden_blocks: list[int] = option(
        [-1], "blocks whose output is matched, -1 = last, several with commas; ResNet: stages 0..3"
    )
    gram_weight: float = option(0.0, "weight of the token-Gram term (published: 0.1)")
    gram_blocks: list[int] = option([-1], "blocks whose token Gram matrix is matched")
    batch_size: int = option(256, "images per optimiser step over all processes")
    accumulate: int = option(1, "pieces that each process cuts its part of a batch into, one after the other")
    epochs: int = option(50, "passes over the data")
    steps: int = option(0, "optimiser steps; 0 = as many as --epochs needs")
    lr: float = option(1e-3, "peak learning rate of AdamW")
    weight_decay: float = option(0.05, "decoupled weight decay, on all parameters as published")
    warmup_steps: int = option(10_000, "steps of linear warm-up")
    restart_every: int = option(0, "steps between warm restarts of the cosine; 0 = none")
    clip: float = option(1.0, "largest gradient norm")
    seed: int = option(0, "seed of initialisation, sample order and augmentation")
    workers: int = option(2, "decoding processes per training process; 0 = decode in the training process")
    decoder: Literal["torchvision", "pil"] = option(
        "torchvision", "image decoder; pil = bit-exact reference, under half as fast"
    )
    strict: bool = option(True, "a shard with another number of samples than its count is an error; false = counted")
    max_bad_fraction: float = option(0.01, "largest tolerated share of unusable samples, 0..1")
    allow_pipe: bool = option(False, "allow `pipe:COMMAND` as a shard, which runs COMMAND in a shell")
    compile: bool = option(False, "torch.compile of teacher and student")
    kernel: Literal["auto", "triton", "reference"] = option(
        "auto", "losses by Triton kernels (on GPUs) or plain PyTorch; auto = Triton where it runs"
    )
    log_every: int = option(10, "steps between rows of metrics.jsonl")
    save_every: int = option(1000, "steps between checkpoints; one more is always saved at the end")
    keep: int = option(2, "newest checkpoints kept")
    out: str = option("runs/distill", "run folder")
    resume: str = option(
        "auto", "auto = continue from the newest valid checkpoint in --out; none = start; PATH = that one"
    )
    sync_batch_norm: bool = option(False, "batch-norm statistics over all GPUs' images, not those of each GPU")
    tracker: Tracker = option("none", "experiment tracker, through accelerate; metrics.jsonl is written in any case")

    def __post_init__(self) -> None:
        check_numbers(
            self,
            at_least_1=("batch_size", "accumulate", "log_every", "save_every", "keep"),
            not_negative=("steps", "warmup_steps", "restart_every", "workers", "seed", "epochs"),
            finite=("lr", "weight_decay", "feature_weight", "hidden_weight", "gram_weight"),
            shares=("max_bad_fraction",),
        )
        if not self.clip > 0:
            raise ConfigError(f"--clip must be above 0, not {self.clip}")
        if self.steps == 0 and self.epochs == 0:
            raise ConfigError("give --epochs or --steps")
        if not self.feature_weight + self.hidden_weight + self.gram_weight > 0:
            raise ConfigError("all loss weights are 0")
        if 0 < self.restart_every <= self.warmup_steps:
            raise ConfigError(f"--restart_every {self.restart_every} must be above --warmup_steps {self.warmup_steps}")
        for name in ("hidden", "gram"):
            if getattr(self, f"{name}_weight") and not getattr(self, f"{name}_blocks"):
                raise ConfigError(f"--{name}_weight is above 0 but --{name}_blocks names no block")
        if not self.data:
            raise ConfigError("--data is missing: shards, or `demo` for the built-in digits")


# A checkpoint made with other values of these cannot be continued; other settings may change between two starts.
FIXED = [
    *("teacher", "student", "init", "norm_stats", "kind", "feature_weight", "hidden_weight", "hidden_blocks"),
    *("gram_weight", "gram_blocks", "batch_size", "seed"),
]


# ----------------------------------------------------------------------------------------------------------------------
# The run
# ----------------------------------------------------------------------------------------------------------------------


def main(config: Config) -> dict[str, Any]:
    """Runs the distillation and returns its final metrics.

    Raises:
        ConfigError, DataError, ModelError: anything a user can cause, in one line. StopRequested: after a stop signal.
    """
    with StopSignals() as signals, contextlib.ExitStack() as resources:
        return distill(config, signals, resources)


def distill(config: Config, signals: StopSignals, resources: contextlib.ExitStack) -> dict[str, Any]:
    # --- Launch -------------------------------------------------------------------------------------------------------
    out = Path(config.out)
    sharding = sharding_asked_for()
    accelerator, agreement = start_run(
        out, resources, tracker=None if config.tracker == "none" else config.tracker, patience=PATIENCE_BETWEEN_STEPS
    )
    rank, world, device = agreement.rank, agreement.world, accelerator.device
    log = logging.getLogger("shiftlens")
    if config.batch_size % (world * config.accumulate):
        raise ConfigError(
            f"--batch_size {config.batch_size} is not divisible by {world} processes x --accumulate {config.accumulate}"
        )

    import torch

    from data import demo
    from data.prefetch import Prefetch
    from data.transforms import TrainTransform, unit_interval
    from kernels.dispatch import use_triton
    from models.distiller import Distiller, distillation_terms
    from models.encoders import load_encoder
    from models.export import export_student
    from models.initialise import copy_attention, freeze_norm_stats, reset_parameters
    from models.weights import load_into, state_sha256, write_safetensors
    from train import loop

    # --- Run folder and checkpoint ------------------------------------------------------------------------------------
    # Only rank 0 touches the folder: the others need not see its disk, and all continue from the same step.
    folder, checkpoint = loop.open_run(config, FIXED, agreement, resources)
    first, state = agreement.share((checkpoint.step, checkpoint.state) if checkpoint else (0, None))
    origin = checkpoint.path if checkpoint else None

    # --- Models -------------------------------------------------------------------------------------------------------
    teacher_name = demo.DEMO_TEACHER if config.teacher == "demo" else config.teacher
    torch.manual_seed(config.seed)
    with agreement.together():
        teacher = load_encoder(teacher_name).eval().requires_grad_(False)
        student = load_encoder(config.student or teacher_name, weights=False)
        teacher_hash = state_sha256(teacher.state_dict())
        if state and state["teacher_sha256"] != teacher_hash:
            raise ConfigError(
                f"--teacher {config.teacher}: its weights are not those that the checkpoint was made with"
            )
        try:
            reset_parameters(student)
        except ModelError as error:
            log.warning("student  keeps its library's own initialisation: %s", error)
        if config.init == "teacher_attention":
            copy_attention(student, teacher)
        distiller = Distiller(
            student,
            teacher,
            kind=config.kind,
            feature_weight=config.feature_weight,
            hidden_weight=config.hidden_weight,
            hidden_blocks=config.hidden_blocks if config.hidden_weight else [],  # weight 0: not computed at all
            gram_weight=config.gram_weight,
            gram_blocks=config.gram_blocks if config.gram_weight else [],
            kernel=config.kernel,
        ).train()
        if config.norm_stats == "teacher":
            freeze_norm_stats(student, teacher)
        if checkpoint is not None:
            load_into(distiller, checkpoint.tensors["model"], checkpoint.path)
        if config.sync_batch_norm:
            loop.synchronise_batch_norm(distiller, accelerator)
        if sharding is not None:
            from train.sharding import require_shardable

            require_shardable(distiller)
    teacher = teacher.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    distiller = distiller.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    parameters = list(loop.trained_parameters(distiller).values())
    size = sum(map(torch.numel, parameters)) / 1e6
    log.info("teacher  %s: %d features, %d px", teacher.name, teacher.feature_dim, teacher.image_size)
    log.info("student  %s: %d features, %.2f M parameters", student.name, student.feature_dim, size)

    # --- Optimiser ----------------------------------------------------------------------------------------------------
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, fused=True)
    if state is not None:
        loop.restore_on_all_ranks(distiller, optimizer, checkpoint, agreement)
    checkpoint = None  # its tensors are windows on files: let go of them before the files are removed
    if config.compile:
        teacher.compile()
    guarded = loop.GuardedStep(
        accelerator, distiller, optimizer, config.clip, state, sharding=sharding, compiled=config.compile
    )

    # --- Data ---------------------------------------------------------------------------------------------------------
    build_demo(accelerator, agreement, config.data)
    with agreement.together():
        data = demo.demo_shards("train") if config.data == "demo" else config.data
        transform = TrainTransform(teacher.image_size, decoder=config.decoder)
        stream, here = loop.open_training_stream(data, config, transform, agreement, first, state, resources)
    agreement.same((here, teacher_hash), "shards or teacher weights")
    total = loop.count_steps(config, stream.steps_per_epoch, first)
    loop.announce(config, stream, accelerator, first, total)
    try:
        use_triton("distill_loss", config.kernel, torch.empty(0, device=device))  # now, as a compiled step cannot log
    except ValueError as error:
        raise ConfigError(f"--kernel {config.kernel}: {error}") from None

    if folder is not None and first < total:
        folder.begin(config, accelerator, first, origin)
    if config.tracker != "none":
        with agreement.together():
            start_tracker(accelerator, config)

    # --- Steps --------------------------------------------------------------------------------------------------------
    epoch = loop.EpochMeans(state, agreement, device)

    def facts_of_checkpoint() -> dict[str, Any]:
        return {"data": here, "epoch_sums": epoch.sums(), "teacher_sha256": teacher_hash}

    saver = loop.Saver(guarded, config, agreement, resources, state, facts_of_checkpoint)
    batches = Prefetch(stream, device)
    local_rows = config.batch_size // world
    final: dict[str, Any] = {}
    progress = Progress(first, total, config.batch_size, shown=rank == 0)
    resources.enter_context(contextlib.closing(progress))
    for step, batch in loop.steps(first, total, batches, saver, config, agreement, signals, progress):
        guarded.begin(cosine_lr(step, config.lr, config.warmup_steps, total, config.restart_every))
        torch.manual_seed(step_seed(config.seed, step, rank))  # so that a checkpoint needs no random state
        images = unit_interval(batch["image"])
        terms: dict[str, Tensor] = {}
        pieces = images.tensor_split(min(config.accumulate, len(images)))  # unusable samples may leave fewer rows
        for number, piece in enumerate(pieces, start=1):
            with guarded.piece(last=number == len(pieces)):
                values = distillation_terms(guarded.model, distiller, teacher, piece, accelerator.autocast)
                # Each row weighs 1/batch_size even where unusable samples left a batch short.
                share = len(piece) / local_rows
                accelerator.backward(values["loss"] * share)
            for key, value in values.items():
                terms[key] = terms.get(key, 0) + value.detach() * share
        norm = guarded.finish()
        epoch.add(terms, local_rows, len(images), norm, begins_epoch=step % stream.steps_per_epoch == 0)
        progress.step_done(step)
        with progress.waiting():
            batches.fetch()

        # Log. Nothing above waits for the device.
        due = step % config.log_every == 0 or step + 1 == total
        if due:
            final = loop.log_row(step, stream, terms, norm, guarded, progress)
            if folder is not None:
                folder.log(final)
            if config.tracker != "none":
                accelerator.log({k: v for k, v in final.items() if k != "step"}, step=step)
            progress.show(step, final)
        guarded.check(step, due, out)

    # --- End ----------------------------------------------------------------------------------------------------------
    data_reports = saver.reports(batches.report())
    means, images_counted = epoch.means()
    last_epoch = {"last_epoch_n": images_counted, **{f"last_epoch_{name}": mean for name, mean in means.items()}}
    trained = guarded.trained()
    if folder is not None and trained is not None:
        assert isinstance(trained, Distiller)
        if state_sha256(teacher.cpu().state_dict()) != teacher_hash:
            raise ModelError("the teacher's weights changed during the run; its results are not to be used")
        rows = folder.metrics()
        if rows:
            final = final or rows[-1]  # nothing was left to do: the last start ended between its last save and here
            draw_loss(rows, out)
        card: dict[str, Any] = {
            "teacher": teacher.name,
            "teacher_sha256": teacher_hash,
            "data": config.data,
            "data_fingerprint": here["fingerprint"],
            "steps": total,
            "batch_size": config.batch_size,
            "seed": config.seed,
            "commit": commit(),
            "date": datetime.date.today().isoformat(),
            **last_epoch,
        }
        for reason in export_student(trained.student, out / "export", card=card, source=teacher):
            log.info("export   no open_clip folder: %s", reason)
        if isinstance(trained.projector, torch.nn.Linear):
            # The student's features times this are the teacher's; the student alone is what is published.
            projector = dict(trained.projector.state_dict())
            write_safetensors(out / "export" / "projector.safetensors", projector, {"teacher": teacher.name})
        log.info("written  %s: weights in export/, curve in loss.png", out)
        weights_hash = state_sha256(trained.student.tower.state_dict())
        if final and images_counted and not any(row.get("weights_sha256") == weights_hash for row in folder.results()):
            append_row(
                out / "results.jsonl",
                metric="distillation_last_epoch_loss",
                value=means["loss"],
                n=images_counted,
                data=config.data,
                data_fingerprint=here["fingerprint"],
                data_reports=data_reports,
                skipped_steps=final["skipped_steps"],
                weights_sha256=weights_hash,
                config=dataclasses.asdict(config),
                seed=config.seed,
                device=str(device),
            )
    guarded.end()
    return {**final, **last_epoch, "total_steps": total, "data_reports": data_reports}


if __name__ == "__main__":
    run_script(main, Config, __doc__.splitlines()[0], "demo.yaml")
