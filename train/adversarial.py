"""Which features does a classifier learn when its training images are perturbed? This script trains classifiers.

Standard training; Gaussian noise (Cohen et al. 2019); adversarial training with L2 or L∞ PGD (Madry et al. 2018) or for
a smoothed classifier (SmoothAdv, Salman et al. 2019); on plain, frequency-flipped, low-passed images (Hold me tight!,
2020) or with a coloured frame (Feature Contamination, 2024). Small data sets are held in memory; shards are streamed.

    accelerate launch train/adversarial.py                                                   built-in demo: 3 min
    accelerate launch train/adversarial.py --config train/recipes/mnist_lenet.yaml           MNIST, one CPU core: 6 min
    accelerate launch --config_file train/launch/gpu_8_bf16.yaml train/adversarial.py \\
        --config train/recipes/smoothadv_025.yaml --sync_batch_norm true                     CIFAR-10, one node

Writes into --out: config.yaml, env.json, metrics.jsonl (one row each --log_every steps), loss.png and loss.svg,
checkpoints/, results.jsonl (accuracy on test images: clean, under noise, under attack) and export/, a classifier for
eval/attack.py, eval/certify.py and eval/visualize.py. The run continues by itself when the same command is started
again; Ctrl-C, SIGTERM and SIGUSR1 save first (exit code 130, 143, 138).

A step: noise is drawn; the attack, on the classifier in evaluation mode, moves each image so that the loss over its
noisy copies grows; the same copies, with the same noise, are the batch that the classifier is trained on. It costs
--attack_steps + 1 forward and backward passes of batch_size x copies images. Neither a restart nor the number of
processes changes the order, crops and mirror images. Noise and random starts come in parts of a batch, as many as its
first start chose (`robust.Noise`): restarts keep them. Dropout is each process's own, and so are batch norm's
statistics of a step: of 32 rows of only 4 images on each GPU in the last line above, were it not for --sync_batch_norm.
"""

from __future__ import annotations

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import contextlib
import dataclasses
import datetime
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from data.rows import append_row, commit
from train.common import ConfigError, Progress, check_numbers, draw_loss, option, run_script, step_seed
from train.launching import PATIENCE_BETWEEN_STEPS, StopSignals, build_demo, start_run


@dataclass(frozen=True)
class Config:
    """Settings; the defaults are those of SmoothAdv where it has them."""

    data: str = option(
        "", "training images: mnist, fashion_mnist, cifar10, a folder, archive or shards; demo = built in"
    )
    test_data: str = option("", "test images, as for --data; empty = the test split of --data")
    model: str = option(
        "", "lenet, cifar_resnet110, ...: random weights; NAME/FILE, local-dir:FOLDER: start from those"
    )
    attack: Literal["none", "pgd", "smoothadv", "smoothadv_gradient_free"] = option(
        "none", "what perturbs training images: pgd raises the loss of the image, smoothadv that over its noisy copies"
    )
    norm: Literal["l2", "linf"] = option("l2", "ball around each image")
    eps: float | str = option(0.0, "its radius, for pixels in [0, 1]: 0.5, 8/255 or, as SmoothAdv counts, 64/256")
    eps_warmup: int = option(0, "epochs over which the radius grows: (epoch + 1) / eps_warmup of it; 0 = none")
    attack_steps: int = option(10, "steps of the attack")
    step_size: float = option(2.0, "length of one, in units of eps / attack_steps")
    order: Literal["box_then_ball", "ball_then_box", "nearest"] = option(
        "box_then_ball", "projection after a step: one after the other, or the nearest point of ball and [0, 1]"
    )
    random_start: bool = option(False, "start attacks at a random point of the ball")
    attack_precision: Literal["fp32", "bf16"] = option(
        "fp32", "precision of the attack; the launch sets the training's"
    )
    sigma: float = option(0.0, "standard deviation of Gaussian noise on training images, for pixels in [0, 1]")
    copies: int = option(1, "noisy copies of each image, m; a published batch of B rows is --batch_size B / m")
    flip: bool = option(False, "train on images whose DCT frequencies are reversed; becomes part of the classifier")
    low_pass: int = option(0, "the classifier sees the lowest N x N DCT frequencies of an image; 0 = all")
    low_pass_published: bool = option(False, "the released filter: vertical frequencies only, not clipped to [0, 1]")
    pad: int = option(0, "pixels put around a training image before a random crop to its size")
    pad_color: str | int = option("0", "their colour, one number 0..255 per channel, or one for all")
    mirror: bool = option(False, "mirror half of the training images")
    extra: str = option("", "more training images in memory, as for --data; empty = none")
    extra_labels: str = option("", "classifier that labels them, as for --model; empty = their own labels")
    extra_weight: float = option(1.0, "weight of their loss")
    batch_size: int = option(256, "images per optimiser step over all processes; each is there --copies times")
    epochs: int = option(150, "passes over the data")
    lr: float = option(0.1, "peak learning rate of SGD with momentum 0.9")
    lr_step: int = option(50, "epochs after which it falls to a tenth, again and again; 0 = triangular, peak at 40 %")
    weight_decay: float = option(1e-4, "L2 penalty, on all parameters as published")
    clip: float = option(0.0, "largest gradient norm; 0 = any")
    sync_batch_norm: bool = option(False, "batch-norm statistics over all GPUs' images, not those of each GPU")
    seed: int = option(0, "seed of weights, order, augmentation, noise and attacks")
    workers: int = option(2, "decoding processes per training process, for streamed shards")
    eval_count: int = option(
        1000, "test images that are attacked at the end, drawn by --seed; 0 = none, and none need be there"
    )
    log_every: int = option(10, "steps between rows of metrics.jsonl")
    save_every: int = option(1000, "steps between checkpoints; one more is always saved at the end")
    out: str = option("runs/adversarial", "run folder")
    resume: str = option("auto", "auto = continue from the newest valid checkpoint; none = start; PATH = that one")

    # What train/loop.py asks of a script's settings, and nobody had to change here.
    steps: ClassVar[int] = 0
    keep: ClassVar[int] = 2
    strict: ClassVar[bool] = True
    max_bad_fraction: ClassVar[float] = 0.01
    allow_pipe: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_numbers(
            self,
            at_least_1=("copies", "batch_size", "epochs", "log_every", "save_every"),
            not_negative=("eps_warmup", "attack_steps", "low_pass", "pad", "lr_step", "seed", "workers", "eval_count"),
            finite=("step_size", "sigma", "lr", "weight_decay", "clip", "extra_weight"),
        )
        if not self.data:
            raise ConfigError(
                "--data is missing: mnist, cifar10, a folder or shards, or `demo` for the built-in digits"
            )
        if not self.model:
            raise ConfigError("--model is missing: lenet, cifar_resnet110, torchvision:resnet50, ...")
        smooth = self.attack.startswith("smoothadv")
        if self.attack != "none" and not (self.attack_steps and self.step_size):
            raise ConfigError(f"--attack {self.attack} needs --attack_steps and --step_size above 0")
        if self.attack == "pgd" and not self.radius:  # with noise, radius 0 trains on the copies: an ablation
            raise ConfigError("--attack pgd needs --eps above 0; for standard training say --attack none")
        if self.norm == "linf" and self.radius > 1:
            raise ConfigError(
                f"--eps {self.eps}: pixels lie in [0, 1], so that no L∞ radius beyond 1 has a meaning; 8/255?"
            )
        if self.sigma > 2:  # as eval/certify.py has it
            raise ConfigError(
                f"--sigma {self.sigma:g} is for pixels in [0, 1] and cannot be above 2; "
                f"if it counts pixels from 0 to 255, give {self.sigma / 255:.3g}"
            )
        if self.low_pass_published and not self.low_pass:
            raise ConfigError("--low_pass_published is a kind of --low_pass, which is 0")
        if smooth and not self.sigma:
            raise ConfigError(f"--attack {self.attack} needs --sigma, the noise of its copies")
        if self.attack == "smoothadv_gradient_free" and self.copies < 2:
            raise ConfigError(
                "--attack smoothadv_gradient_free needs --copies of at least 2: noise of one has no direction"
            )
        if self.copies > 1 and not self.sigma:
            raise ConfigError("--copies above 1 needs --sigma: without noise all copies are the same")
        if self.attack == "pgd" and self.sigma:
            raise ConfigError(
                f"--attack pgd and --sigma {self.sigma:g}: say --attack smoothadv, which attacks under noise, "
                "or --sigma 0"
            )
        if (self.extra_labels or self.extra_weight != 1) and not self.extra:
            raise ConfigError("--extra_labels and --extra_weight need --extra")
        object.__setattr__(self, "pad_color", str(self.pad_color))  # YAML makes a number of a single one
        _ = self.radius, self.colour  # raise what is wrong with them

    @property
    def radius(self) -> float:
        """--eps as a number. Raises ConfigError where it is none."""
        try:
            number, slash, unit = str(self.eps).partition("/")
            radius = float(number) / (float(unit) if slash else 1)
        except (ValueError, ZeroDivisionError):
            radius = math.nan
        if not (math.isfinite(radius) and radius >= 0):
            raise ConfigError(f"--eps {self.eps}: expected a number of at least 0, such as 0.5 or 8/255")
        return radius

    @property
    def colour(self) -> tuple[int, ...]:
        """--pad_color as numbers 0..255. Raises ConfigError where it is none."""
        values = str(self.pad_color).split(",")
        if not all(value.strip().isdecimal() and int(value) <= 255 for value in values):
            raise ConfigError(f"--pad_color {self.pad_color}: expected numbers 0..255, such as 150,50,50")
        return tuple(int(value) for value in values)


# A checkpoint made with other values of these cannot be continued; other settings may change between two starts.
FIXED = [
    *("model", "attack", "norm", "eps", "eps_warmup", "attack_steps", "step_size", "order", "random_start"),
    *("attack_precision", "sigma", "copies", "flip", "low_pass", "low_pass_published", "pad", "pad_color", "mirror"),
    *("extra", "extra_labels", "extra_weight", "batch_size", "seed"),
]


def step_lr(step: int, base: float, steps_per_epoch: int, epochs: int) -> float:
    """Learning rate of 0-based `step`: a tenth of it after each `epochs` epochs."""
    return float(base * 0.1 ** (step // steps_per_epoch // epochs))


def triangular_lr(step: int, peak: float, total: int) -> float:
    """Learning rate of 0-based `step`: from 0 in a line to `peak` at 40 % of `total` steps, and to 0 at the last."""
    done = (step + 1) / total
    return peak * min(done / 0.4, (1 - done) / 0.6)


def eps_at(epoch: int, eps: float, warmup: int) -> float:
    """Radius in 0-based `epoch`, growing over the first `warmup`: the first has a part of it already, as published."""
    return min(eps, (epoch + 1) * eps / warmup) if warmup else eps


# ----------------------------------------------------------------------------------------------------------------------
# The run
# ----------------------------------------------------------------------------------------------------------------------


def main(config: Config) -> dict[str, Any]:
    """Runs the training and returns its final metrics.

    Raises:
        ConfigError, DataError, ModelError: anything a user can cause, in one line. StopRequested: after a stop signal.
    """
    with StopSignals() as signals, contextlib.ExitStack() as resources:
        return train(config, signals, resources)


def train(config: Config, signals: StopSignals, resources: contextlib.ExitStack) -> dict[str, Any]:
    # --- Launch -------------------------------------------------------------------------------------------------------
    out = Path(config.out)
    accelerator, agreement = start_run(out, resources, patience=PATIENCE_BETWEEN_STEPS)
    rank, world, device = agreement.rank, agreement.world, accelerator.device
    log = logging.getLogger("shiftlens")
    if config.batch_size % world:
        raise ConfigError(f"--batch_size {config.batch_size} is not divisible by {world} processes")

    import torch

    from data.prefetch import Prefetch
    from data.small import MemoryStream
    from data.stream import Stream
    from data.tar import ShardSet
    from data.transforms import TrainTransform
    from models.classifiers import load_classifier, save_classifier
    from models.weights import load_into, state_sha256
    from train import loop, robust

    # --- Run folder and checkpoint ------------------------------------------------------------------------------------
    # Only rank 0 touches the folder: the others need not see its disk, and all continue from the same step.
    folder, checkpoint = loop.open_run(config, FIXED, agreement, resources)
    first, state = agreement.share((checkpoint.step, checkpoint.state) if checkpoint else (0, None))
    origin = checkpoint.path if checkpoint else None

    # --- Data and classifier ------------------------------------------------------------------------------------------
    build_demo(accelerator, agreement, config.data, config.test_data, config.extra)
    with agreement.reading(signals):
        form = load_classifier(config.model, weights=False)
        data = robust.find_data(config, form.image_size, form.channels, device)
        torch.manual_seed(config.seed)
        classifier, start = robust.load_model(config, data)
        if state and state["start"] != start:
            raise ConfigError(f"--model {config.model}: not the weights that the checkpoint began with")
        if len(config.colour) not in (1, classifier.channels):
            raise ConfigError(
                f"--pad_color {config.pad_color}: images of {config.data} have {classifier.channels} channels"
            )
        module = robust.TrainingModule(classifier).train()
        if checkpoint is not None:
            load_into(module, checkpoint.tensors["model"], checkpoint.path)
        if config.sync_batch_norm:
            loop.synchronise_batch_norm(module, accelerator)
    module = module.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    parameters = list(loop.trained_parameters(module).values())
    count = sum(map(torch.numel, parameters)) / 1e6
    shape = f"{classifier.channels} x {classifier.image_size} x {classifier.image_size}"
    log.info("model    %s: %s, %d classes, %.2f M parameters", config.model, shape, classifier.num_classes, count)

    # --- Optimiser ----------------------------------------------------------------------------------------------------
    optimizer = robust.make_optimizer(parameters, config.lr, config.weight_decay)
    if state is not None:
        loop.restore_on_all_ranks(module, optimizer, checkpoint, agreement)
    checkpoint = None  # its tensors are windows on files: let go of them before the files are removed
    guarded = loop.GuardedStep(
        accelerator, module, optimizer, config.clip or math.inf, state, share_statistics=config.attack != "none"
    )

    # --- Batches ------------------------------------------------------------------------------------------------------
    with agreement.together():
        stream: Stream | MemoryStream
        batches: Prefetch | MemoryStream
        if isinstance(data.train, ShardSet):
            transform = TrainTransform(classifier.image_size, scale=(0.08, 1.0), flip=0.5 if config.mirror else 0.0)
            stream, here = loop.open_training_stream(data.train, config, transform, agreement, first, state, resources)
            batches = Prefetch(stream, device)
        else:
            batches, here = robust.open_memory(data.train, config, agreement, first, state, device, resources)
            stream = batches
    test_fingerprint = data.test.fingerprint if data.test is not None else None
    agreement.same((here, start, test_fingerprint), "images or weights")
    total = loop.count_steps(config, stream.steps_per_epoch, first)
    noises = robust.Noise(config, here["streams"], agreement, device)
    row_weights = None if data.weights is None else data.weights.to(device)
    where = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    log.info("data     %s: %d images, %d steps an epoch", config.data, stream.num_samples, stream.steps_per_epoch)
    log.info("to do    %d of %d steps, batch %d x %d copies", total - first, total, config.batch_size, config.copies)
    if config.attack != "none":
        ball = f"{config.norm} {config.eps}, {config.attack_steps} steps"
        log.info("attack   %s, %s, %s, in %s", config.attack, ball, config.order, config.attack_precision)
    log.info("device   %s, mixed precision %s, %d processes", where, accelerator.mixed_precision, world)

    # With nothing left to do, a run that was continued from elsewhere still has to leave a run folder.
    elsewhere = agreement.share(folder is not None and origin is not None and not (out / "config.yaml").is_file())
    if folder is not None and (first < total or elsewhere):
        folder.begin(config, accelerator, first, origin)

    # --- Steps --------------------------------------------------------------------------------------------------------
    saver = loop.Saver(guarded, config, agreement, resources, state, lambda: {"data": here, "start": start})
    local_rows = config.batch_size // world
    final: dict[str, Any] = {}
    progress = Progress(first, total, config.batch_size, shown=rank == 0)
    resources.enter_context(contextlib.closing(progress))
    for step, batch in loop.steps(
        first, total, batches, saver, config, agreement, signals, progress, save_at_once=elsewhere
    ):
        epoch = step // stream.steps_per_epoch
        guarded.begin(
            step_lr(step, config.lr, stream.steps_per_epoch, config.lr_step)
            if config.lr_step
            else triangular_lr(step, config.lr, total)
        )
        torch.manual_seed(step_seed(config.seed, step, rank))  # for dropout, so that a checkpoint needs no random state
        images, labels, weights = batch["image"], batch["label"].to(device), None
        if isinstance(stream, MemoryStream):  # shards were cropped and mirrored when they were decoded
            images = robust.augment(images, batch["index"], config, epoch)
            weights = None if row_weights is None else row_weights[batch["index"]]
        images = robust.to_pixels(images)
        noise = noises.draw(step, images)
        if config.attack != "none":
            eps = eps_at(epoch, config.radius, config.eps_warmup)
            begin = noises.start(step, images, eps, config.norm) if config.random_start else None
            images = robust.perturb(classifier, images, labels, eps, noise, begin, config)
        # Each image weighs 1/batch_size even where unusable samples left a batch short.
        share = len(images) / local_rows
        if config.copies > 1:
            images, labels = (rows.repeat_interleave(config.copies, dim=0) for rows in (images, labels))
            weights = None if weights is None else weights.repeat_interleave(config.copies)
        with guarded.piece(last=True):
            terms = guarded.model(images if noise is None else images + noise, labels, weights)
            accelerator.backward(terms["loss"] * share)
        norm = guarded.finish()
        progress.step_done(step)
        if isinstance(batches, Prefetch):
            with progress.waiting():
                batches.fetch()

        # Log. Nothing above waits for the device.
        due = step % config.log_every == 0 or step + 1 == total
        if due:
            shares = {name: term.detach() * share for name, term in terms.items()}
            final = loop.log_row(step, stream, shares, norm, guarded, progress)
            if folder is not None:
                folder.log(final)
            progress.show(step, final)
        guarded.check(step, due, out)

    # --- End ----------------------------------------------------------------------------------------------------------
    data_reports = saver.reports(batches.report())
    facts: dict[str, Any] = {
        "source": "train/adversarial.py",
        "data": config.data,
        "data_fingerprint": here["fingerprint"],
        "steps": total,
        "seed": config.seed,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "mixed_precision": accelerator.mixed_precision,
        "config": dataclasses.asdict(config),
    }

    def export(results: dict[str, dict[str, Any]]) -> None:
        with agreement.together():
            if folder is not None:
                values = {metric: row["value"] for metric, row in results.items()}
                save_classifier(out / "export", classifier, facts | {"results": values})

    def vote() -> None:
        if stop := agreement.settle(None, signals.received):
            raise loop.stopped(stop, total, first, total, out)

    agreement.broadcast(module.state_dict().values())  # batch-norm statistics are those of rank 0, which are saved
    measured: dict[str, Any] = {
        "weights_sha256": state_sha256(classifier.state_dict()),
        "test_fingerprint": test_fingerprint,
        "eval_count": config.eval_count,
    }
    wanted = {metric: measured | facts_of_it for metric, facts_of_it in robust.metrics(config).items()}
    known = folder.results() if folder is not None else []
    known = [row for row in known if row["metric"] in wanted and wanted[row["metric"]].items() <= row.items()]
    results: dict[str, dict[str, Any]] = agreement.share({row["metric"]: row for row in known})
    known_already = results.keys() == wanted.keys()
    if data.test is not None and not known_already:
        export({})  # whatever becomes of the measurements
        results = robust.measure(classifier, data.test, config, agreement, device, vote)
    export(results)
    for metric, row in results.items():
        log.info("result   %s %.2f %% of %d images", metric, 100 * row["value"], row["n"])
    trained = guarded.trained()
    if folder is not None and trained is not None:
        logged = folder.metrics()
        if logged:
            final = final or logged[-1]  # nothing was left to do: the last start ended after its last save
            draw_loss(logged, out)
        log.info("written  %s: classifier in export/, curve in loss.png", out)
        for row in [] if known_already else results.values():
            append_row(
                out / "results.jsonl",
                **row,
                **measured,
                start_sha256=start,
                data_reports=data_reports,
                skipped_steps=guarded.skipped,
                training_precision={"step": accelerator.mixed_precision, "attack": config.attack_precision},
                **{name: facts[name] for name in ("data", "data_fingerprint", "seed", "config")},
                device=str(device),
            )
    guarded.end()
    accuracies = {metric: row["value"] for metric, row in results.items()}
    return {**final, **accuracies, "total_steps": total, "data_reports": data_reports}


if __name__ == "__main__":
    run_script(main, Config, __doc__.splitlines()[0], "adversarial_demo.yaml")
