"""What does fine-tuning on one distribution do to the robustness that an encoder brings along? This script fine-tunes.

Encoder and linear head are trained together, from images and labels, by cross-entropy. They start from a head that fits
the encoder: a zero-shot one (train/zero_shot.py) or a probe's (train/probe.py, which trains heads on frozen features).

    accelerate launch train/finetune.py                                    built-in demo, after train/zero_shot.py: 30 s
    accelerate launch train/finetune.py --config train/recipes/finetune_clip.yaml \\
        --data '/data/imagenet/train/{000000..001281}.tar' --head heads/zero_shot.safetensors    one GPU
    accelerate launch --config_file train/launch/gpu_2x8_bf16.yaml --machine_rank N --main_process_ip HOST \\
        train/finetune.py --config train/recipes/finetune_clip.yaml --data URL --head HEAD       two nodes, once on each

Writes into --out: config.yaml, env.json, metrics.jsonl (one row each --log_every steps), loss.png and loss.svg,
checkpoints/, results.jsonl (mean training loss and accuracy over the images of the last epoch), export/ (the encoder,
as train/distill.py exports a student) and head.safetensors, a pair for eval/shifts.py. The run continues by itself when
the same command is started again; Ctrl-C, SIGTERM and SIGUSR1 save first (exit
code 130, 143, 138).

Cost per image: one forward and backward (RN50: 37 GFLOP; ViT-B/16: 105 GFLOP).
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

from data import DataError
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
from train.launching import PATIENCE_BETWEEN_STEPS, StopSignals, build_demo, sharding_asked_for, start_run

if TYPE_CHECKING:
    from torch import Tensor, nn

    from models.encoders import Encoder
    from models.heads import Head


@dataclass(frozen=True)
class Config:
    """Settings; the defaults are those of WiSE-FT (Wortsman et al., CVPR 2022) where it has them."""

    data: str = option("", "shards: folder, glob, brace list, `::` join, http(s) or fsspec URL; demo = built-in digits")
    encoder: str = option(
        "", "encoder with weights: open_clip:RN50/openai, local-dir:PATH, ...; demo = the demo teacher"
    )
    head: str = option("", "head to start from, made for this encoder: FILE of train/zero_shot.py or train/probe.py")
    norm_stats: Literal["own", "frozen"] = option(
        "own", "batch-norm statistics: of each batch, or the encoder's running ones, frozen"
    )
    label_smoothing: float = option(0.0, "share of the label spread over all classes, 0..1")
    flip: float = option(0.0, "probability of mirroring an image, 0..1; the random crop is the published one")
    batch_size: int = option(512, "images per optimiser step over all processes")
    accumulate: int = option(1, "pieces that each process cuts its part of a batch into, one after the other")
    epochs: int = option(10, "passes over the data")
    steps: int = option(0, "optimiser steps; 0 = as many as --epochs needs")
    lr: float = option(3e-5, "peak learning rate of AdamW")
    weight_decay: float = option(0.1, "decoupled weight decay, on all parameters as published")
    warmup_steps: int = option(500, "steps of linear warm-up, before a cosine to 0")
    clip: float = option(1.0, "largest gradient norm")
    seed: int = option(0, "seed of sample order, augmentation and dropout")
    workers: int = option(2, "decoding processes per training process; 0 = decode in the training process")
    decoder: Literal["torchvision", "pil"] = option("torchvision", "image decoder; pil = bit-exact reference, slower")
    strict: bool = option(True, "a shard with another number of samples than its count is an error; false = counted")
    max_bad_fraction: float = option(0.01, "largest tolerated share of unusable samples, 0..1")
    allow_pipe: bool = option(False, "allow `pipe:COMMAND` as a shard, which runs COMMAND in a shell")
    compile: bool = option(False, "torch.compile of encoder and head")
    log_every: int = option(10, "steps between rows of metrics.jsonl")
    save_every: int = option(1000, "steps between checkpoints; one more is always saved at the end")
    keep: int = option(2, "newest checkpoints kept")
    out: str = option("runs/finetune", "run folder")
    sync_batch_norm: bool = option(False, "batch-norm statistics over all GPUs' images, not those of each GPU")
    resume: str = option("auto", "auto = continue from the newest valid checkpoint; none = start; PATH = that one")

    def __post_init__(self) -> None:
        check_numbers(
            self,
            at_least_1=("batch_size", "accumulate", "log_every", "save_every", "keep"),
            not_negative=("steps", "warmup_steps", "workers", "seed", "epochs"),
            finite=("lr", "weight_decay"),
            shares=("label_smoothing", "flip", "max_bad_fraction"),
        )
        if not self.clip > 0:
            raise ConfigError(f"--clip must be above 0, not {self.clip}")
        if self.steps == 0 and self.epochs == 0:
            raise ConfigError("give --epochs or --steps")
        if not self.data:
            raise ConfigError("--data is missing: shards, or `demo` for the built-in digits")
        if not (self.encoder and self.head):
            raise ConfigError("--encoder or --head is missing; train/zero_shot.py and train/probe.py make heads")


# A checkpoint made with other values of these cannot be continued; other settings may change between two starts.
FIXED = ["encoder", "head", "norm_stats", "label_smoothing", "batch_size", "seed"]


def make_classifier(encoder: Encoder, head: Head, label_smoothing: float = 0.0) -> nn.Module:
    """`encoder` with a copy of `head` on it, to be trained together; one module with one output, for DDP.

    Its forward takes images [N, 3, S, S] in [0, 1] and labels int64 [N], and gives scalars: `loss`, the mean
    cross-entropy in nats, carries the gradient; `accuracy`, the share of right answers, does not. Its parameters are
    those of `encoder` (which is not copied), `weight` [C, D] and `bias` [C].
    """
    # The class is defined in here because torch is imported only once the launch is known to be right.
    import torch
    import torch.nn.functional as F

    class Classifier(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder
            self.weight = torch.nn.Parameter(head.weight.clone())
            self.bias = torch.nn.Parameter(head.bias.clone())

        def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
            features = self.encoder(images).float()
            # Float32 whatever the encoder has: a zero-shot head multiplies cosines, and roundings, by up to 100.
            with torch.autocast(features.device.type, enabled=False):
                if head.normalize:
                    features = features / torch.linalg.vector_norm(features, dim=1, keepdim=True).clamp_min(1e-30)
                logits = F.linear(features, self.weight, self.bias)
                loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
            return {"loss": loss, "accuracy": (logits.detach().argmax(dim=1) == labels).float().mean()}

    return Classifier()


# ----------------------------------------------------------------------------------------------------------------------
# The run
# ----------------------------------------------------------------------------------------------------------------------


def main(config: Config) -> dict[str, Any]:
    """Runs the fine-tuning and returns its final metrics.

    Raises:
        ConfigError, DataError, ModelError: anything a user can cause, in one line. StopRequested: after a stop signal.
    """
    with StopSignals() as signals, contextlib.ExitStack() as resources:
        return finetune(config, signals, resources)


def finetune(config: Config, signals: StopSignals, resources: contextlib.ExitStack) -> dict[str, Any]:
    # --- Launch -------------------------------------------------------------------------------------------------------
    out = Path(config.out)
    sharding = sharding_asked_for()
    accelerator, agreement = start_run(out, resources, patience=PATIENCE_BETWEEN_STEPS)
    rank, world, device = agreement.rank, agreement.world, accelerator.device
    log = logging.getLogger("shiftlens")
    if config.batch_size % (world * config.accumulate):
        raise ConfigError(
            f"--batch_size {config.batch_size} is not divisible by {world} processes x --accumulate {config.accumulate}"
        )

    import torch

    from data import demo
    from data.prefetch import Prefetch
    from data.stream import Batch
    from data.tar import find_shards
    from data.transforms import TrainTransform, unit_interval
    from models.encoders import Encoder, load_encoder
    from models.export import export_student
    from models.heads import load_head, save_head
    from models.initialise import freeze_norm_stats
    from models.weights import load_into, state_sha256
    from train import loop

    # --- Run folder and checkpoint ------------------------------------------------------------------------------------
    # Only rank 0 touches the folder: the others need not see its disk, and all continue from the same step.
    folder, checkpoint = loop.open_run(config, FIXED, agreement, resources)
    first, state = agreement.share((checkpoint.step, checkpoint.state) if checkpoint else (0, None))
    origin = checkpoint.path if checkpoint else None

    # --- Data, encoder and head ---------------------------------------------------------------------------------------
    build_demo(accelerator, agreement, config.data)
    torch.manual_seed(config.seed)
    with agreement.together():
        data = demo.demo_shards("train") if config.data == "demo" else config.data
        shards = find_shards(data, allow_pipe=config.allow_pipe)
        encoder = load_encoder(demo.DEMO_TEACHER if config.encoder == "demo" else config.encoder)
        if not Path(config.head).is_file():
            raise ModelError(f"--head {config.head}: no such file; train/zero_shot.py or train/probe.py makes one")
        head = load_head(config.head, shards.classes, encoder.feature_dim)
        head.require_linear(config.head, "train/finetune.py")
        start = {
            "encoder_sha256": state_sha256(encoder.state_dict()),
            "head_sha256": state_sha256({"weight": head.weight, "bias": head.bias}),
            "normalize": head.normalize,
        }
        if head.metadata.get("encoder_sha256", start["encoder_sha256"]) != start["encoder_sha256"]:
            made_for = head.metadata.get("encoder")
            raise ModelError(f"{config.head} was made for {made_for}, whose weights are not those of {config.encoder}")
        if state and state["start"] != start:
            raise ConfigError(f"{config.encoder}, {config.head}: not the weights that the checkpoint began with")
        classifier = make_classifier(encoder, head, config.label_smoothing).train()
        if config.norm_stats == "frozen":
            try:
                freeze_norm_stats(encoder, encoder)  # its own statistics, for good
            except ModelError as error:
                raise ConfigError(f"--norm_stats frozen: {error}; use own") from None
        if checkpoint is not None:
            load_into(classifier, checkpoint.tensors["model"], checkpoint.path)
        if config.sync_batch_norm:
            loop.synchronise_batch_norm(classifier, accelerator)
        if sharding is not None:
            from train.sharding import require_shardable

            require_shardable(classifier)
    classifier = classifier.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    parameters = list(loop.trained_parameters(classifier).values())
    size = sum(map(torch.numel, parameters)) / 1e6
    log.info("encoder  %s: %d features, %d px", encoder.name, encoder.feature_dim, encoder.image_size)
    log.info("head     %s: %d classes; %.2f M parameters with the encoder's", config.head, len(head.classes), size)
    if shards.classes is None:
        log.info("         the shards do not name their classes: label 0 is taken for %r", head.classes[0])

    # --- Optimiser ----------------------------------------------------------------------------------------------------
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, fused=True)
    if state is not None:
        loop.restore_on_all_ranks(classifier, optimizer, checkpoint, agreement)
    checkpoint = None  # its tensors are windows on files: let go of them before the files are removed
    guarded = loop.GuardedStep(
        accelerator, classifier, optimizer, config.clip, state, sharding=sharding, compiled=config.compile
    )

    # --- Batches ------------------------------------------------------------------------------------------------------
    with agreement.together():
        transform = TrainTransform(encoder.image_size, flip=config.flip, decoder=config.decoder)
        stream, here = loop.open_training_stream(shards, config, transform, agreement, first, state, resources)
    agreement.same((here, start), "shards, encoder or head")
    total = loop.count_steps(config, stream.steps_per_epoch, first)
    loop.announce(config, stream, accelerator, first, total)

    if folder is not None and first < total:
        folder.begin(config, accelerator, first, origin)

    # --- Steps --------------------------------------------------------------------------------------------------------
    epoch = loop.EpochMeans(state, agreement, device)

    def facts_of_checkpoint() -> dict[str, Any]:
        return {"data": here, "epoch_sums": epoch.sums(), "start": start}

    def check(batch: Batch) -> None:
        label = int(batch["label"].max())  # still on the CPU
        if label >= len(head.classes):  # shards without class names may state no bound
            raise DataError(f"--data {config.data}: label {label}, {config.head} has {len(head.classes)} classes")

    saver = loop.Saver(guarded, config, agreement, resources, state, facts_of_checkpoint)
    batches = Prefetch(stream, device)
    local_rows = config.batch_size // world
    final: dict[str, Any] = {}
    progress = Progress(first, total, config.batch_size, shown=rank == 0)
    resources.enter_context(contextlib.closing(progress))
    for step, batch in loop.steps(first, total, batches, saver, config, agreement, signals, progress, check=check):
        guarded.begin(cosine_lr(step, config.lr, config.warmup_steps, total))
        torch.manual_seed(step_seed(config.seed, step, rank))  # so that a checkpoint needs no random state
        images, labels = unit_interval(batch["image"]), batch["label"].to(device)
        terms: dict[str, Tensor] = {}
        count = min(config.accumulate, len(images))  # unusable samples may leave fewer rows
        pieces = list(zip(images.tensor_split(count), labels.tensor_split(count), strict=True))
        for number, (piece, answers) in enumerate(pieces, start=1):
            with guarded.piece(last=number == count):
                values = guarded.model(piece, answers)
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
            progress.show(step, final)
        guarded.check(step, due, out)

    # --- End ----------------------------------------------------------------------------------------------------------
    data_reports = saver.reports(batches.report())
    means, images_counted = epoch.means()
    last_epoch = {"last_epoch_n": images_counted, **{f"last_epoch_{name}": mean for name, mean in means.items()}}
    trained = guarded.trained()
    if folder is not None and trained is not None:
        rows = folder.metrics()
        if rows:
            final = final or rows[-1]  # nothing was left to do: the last start ended between its last save and here
            draw_loss(rows, out)
        weight, bias = trained.get_parameter("weight"), trained.get_parameter("bias")
        assert isinstance(trained.encoder, Encoder)
        encoder = trained.encoder
        encoder_hash = state_sha256(encoder.state_dict())
        facts: dict[str, Any] = {
            "source": "fine-tuned end to end on labels, encoder and head together",
            "start": {"encoder": encoder.name, "head": config.head, **start},
            "data": config.data,
            "data_fingerprint": here["fingerprint"],
            "steps": total,
            "batch_size": config.batch_size,
            "seed": config.seed,
            "commit": commit(),
            "date": datetime.date.today().isoformat(),
        }
        # The text tower, if there is one, stays that of the start.
        for reason in export_student(encoder, out / "export", card=facts, source=encoder, origin="fine-tuned"):
            log.info("export   no open_clip folder: %s", reason)
        facts = {"encoder": f"local-dir:{out / 'export'}", "encoder_sha256": encoder_hash, **facts}
        file = out / "head.safetensors"
        save_head(file, weight, bias, head.classes, normalize=head.normalize, metadata=facts)
        log.info("written  %s: encoder in export/, head.safetensors, curve in loss.png", out)
        if final and images_counted and not any(row.get("weights_sha256") == encoder_hash for row in folder.results()):
            append_row(
                out / "results.jsonl",
                metric="finetune_last_epoch_loss",
                value=means["loss"],
                n=images_counted,
                accuracy=means["accuracy"],
                weights_sha256=encoder_hash,
                head_sha256=state_sha256({"weight": weight, "bias": bias}),
                data_reports=data_reports,
                skipped_steps=final["skipped_steps"],
                **{name: facts[name] for name in ("start", "data", "data_fingerprint", "seed")},
                config=dataclasses.asdict(config),
                device=str(device),
            )
    guarded.end()
    return {**final, **last_epoch, "total_steps": total, "data_reports": data_reports}


if __name__ == "__main__":
    run_script(main, Config, __doc__.splitlines()[0], "finetune_demo.yaml")
