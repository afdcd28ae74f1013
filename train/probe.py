"""How well does a linear map tell classes apart by a frozen encoder's features? Trains it, a whole grid at once.

Features are computed once and kept (data/features.py); then one head for every combination of learning rate, weight
decay, normalisation, bias and label smoothing is trained in the same passes over them (train/heads.py), each exactly as
it would be trained alone. The best on a held-out part of the training data is saved; no test set is touched.

    accelerate launch train/probe.py                                       built-in demo, after train/distill.py: the
                                                                           newest student and the teacher, 30 s
    accelerate launch train/probe.py --encoder local-dir:runs/rn50/export \\
        --data '/data/imagenet/train/{000000..001281}.tar' --out runs/probe          one GPU
    accelerate launch --config_file train/launch/gpu_2x8_bf16.yaml --machine_rank N --main_process_ip HOST \\
        train/probe.py --config train/recipes/probe_distilled.yaml --encoder NAME --data URL --cache /shared/features

`--single true` is the published protocol (Feature Contamination, ICML 2024): one head, all data, 10 epochs of AdamW.
`--solver lbfgs` solves multinomial logistic regression to its optimum, for a grid of penalties. `--reference` probes a
second encoder in the same way, such as the teacher of a student. Heads may start from a given one (`--init`, say of
train/zero_shot.py), stand behind trained layers (`--mlp_layers`), or behind a random reversible transform of the
features that is never trained (`--nonlinear_blocks`; models/featurisers.py).

Cost: one encoder forward per image, once. ImageNet at 1024 features takes 2.6 GB of cache in fp16 and 5.2 TFLOP for a
head and an epoch. The processes share the encoder's work by parts of the data, then the heads: a head needs no
gradient from another process, so its numbers do not depend on how many there are.

Writes into --out: config.yaml, env.json, metrics.jsonl (a row for each head and epoch), grid.csv, grid.png, grid.svg,
head.safetensors (with class names), results.jsonl; the same of --reference into OUT/reference. A run that was stopped
keeps the features it had; heads start anew.
"""

from __future__ import annotations

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import contextlib
import dataclasses
import datetime
import gc
import itertools
import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from data import DataError
from data.rows import append_row, commit
from models import ModelError
from train.common import ConfigError, RunFolder, option, run_script
from train.launching import Agreement, StopSignals, build_demo, start_run

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from data.stream import Pass
    from train import probing
    from train.heads import Point

# What an empty list stands for: the values of a grid, and those of the published protocol (linear probe on CLIP).
GRID: dict[str, list[Any]] = {
    "lr": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1],
    "weight_decay": [1e-3, 0.1],
    "penalty": [1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2],
    "normalize": [False, True],
    "bias": [True],
    "label_smoothing": [0.0],
}
PUBLISHED: dict[str, list[Any]] = {
    "lr": [1e-3],
    "weight_decay": [0.1],
    "normalize": [False],
    "bias": [True],
    "label_smoothing": [0.0],
}
# Settings that a run may be started again with other values of: no result depends on them.
FREE = ("cache", "workers", "max_logit_bytes", "kernel")
log = logging.getLogger("shiftlens")


@dataclass(frozen=True)
class Config:
    """Settings; schedule and batch are the published ones. A list is a grid's axis; empty = its default values."""

    data: str = option(
        "", "training shards: folder, glob, brace list, `::` join, http(s) or fsspec URL; `demo` = built-in digits"
    )
    encoder: str = option(
        "open_clip:RN50/openai",
        "frozen encoder, for example open_clip:RN50/openai, local-dir:PATH; `demo` = the demo's teacher, "
        "`demo_student` = the newest student that train/distill.py made of it in runs/",
    )
    reference: str = option("", "second encoder, probed in the same way into OUT/reference; empty = none")
    solver: Literal["adamw", "lbfgs"] = option(
        "adamw", "adamw = --epochs of steps; lbfgs = logistic regression to the optimum"
    )
    single: bool = option(False, "the published protocol: one head, trained on all data, nothing held out")
    lr: list[float] = option([], f"peak learning rates of AdamW; empty = {GRID['lr']}, with --single 1e-3")
    weight_decay: list[float] = option(
        [], f"decoupled weight decays; empty = {GRID['weight_decay']}, with --single 0.1"
    )
    penalty: list[float] = option(
        [],
        f"lbfgs: penalty/2 x |weight|^2 on the mean loss; empty = {GRID['penalty']}; scikit-learn's C is 1/(n penalty)",
    )
    normalize: list[bool] = option(
        [], "features divided by their L2 norm; empty = [false, true], with --single [false]"
    )
    bias: list[bool] = option([], "heads with a bias; empty = [true]")
    label_smoothing: list[float] = option([], "label smoothing, 0..1; empty = [0]")
    init: str = option("", "head of this encoder that all heads start from, FILE; empty = torch.nn.Linear's, by seed")
    mlp_layers: int = option(0, "layers trained with each head, before it; 0 = none: a linear head")
    mlp_kind: Literal["basic", "residual", "reversible"] = option("basic", "what these layers are")
    nonlinear_blocks: int = option(
        0, "blocks of a random reversible transform of the features, drawn by seed, not trained; 0 = none"
    )
    batch_size: int = option(256, "rows per step, seen by every head")
    epochs: int = option(10, "passes over the features")
    warmup_steps: int = option(500, "steps of linear warm-up, before a cosine to 0")
    clip: float = option(1.0, "largest gradient norm of a head; .inf = no clipping")
    holdout: float = option(0.1, "share of the samples kept from training, to choose by; not with --single")
    refit: bool = option(False, "train the chosen head anew on all samples")
    shots: int = option(0, "training images of every class, drawn by seed; 0 = all")
    seed: int = option(0, "seed of the first weights, of the order of rows and of --shots")
    dtype: Literal["fp16", "bf16", "fp32"] = option("fp16", "type in which features are kept")
    cache: str = option("runs/features", "folder of feature caches, seen by all machines; entries never mix")
    max_logit_bytes: int = option(256 * 2**20, "bound on the memory of logits, bytes")
    kernel: Literal["auto", "triton", "reference"] = option(
        "auto", "losses by Triton kernels (on GPUs) or plain PyTorch; auto = Triton where it runs"
    )
    images: int = option(256, "images at a time through the encoder, per process")
    workers: int = option(2, "decoding processes per process; 0 = decode in the process itself")
    decoder: Literal["torchvision", "pil"] = option(
        "torchvision", "image decoder; pil = bit-exact reference, under half as fast"
    )
    strict: bool = option(True, "a shard with another number of samples than its count is an error; false = counted")
    max_bad_fraction: float = option(
        0.01, "largest tolerated share of unusable samples, 0..1, in each part of the data"
    )
    allow_pipe: bool = option(False, "allow `pipe:COMMAND` as a shard, which runs COMMAND in a shell")
    out: str = option("runs/probe", "run folder")

    def __post_init__(self) -> None:
        for name in ("batch_size", "epochs", "images", "max_logit_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} must be at least 1, not {getattr(self, name)}")
        for name in ("warmup_steps", "workers", "seed", "shots", "mlp_layers", "nonlinear_blocks"):
            if getattr(self, name) < 0:
                raise ConfigError(f"--{name} must not be negative, but is {getattr(self, name)}")
        for name in ("lr", "penalty"):  # without a penalty there may be no optimum
            if not all(0 < value < math.inf for value in getattr(self, name)):
                raise ConfigError(f"--{name} {getattr(self, name)}: each must be finite and above 0")
        if not all(0 <= value < math.inf for value in self.weight_decay):
            raise ConfigError(f"--weight_decay {self.weight_decay}: each must be finite and at least 0")
        if not all(0 <= value <= 1 for value in self.label_smoothing):
            raise ConfigError(f"--label_smoothing {self.label_smoothing}: each must lie in [0, 1]")
        for name in GRID:
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ConfigError(f"--{name} {getattr(self, name)}: a value is given twice")
        for name in ("lr", "weight_decay") if self.solver == "lbfgs" else ("penalty",):
            if getattr(self, name):
                raise ConfigError(f"--{name} has no meaning with --solver {self.solver}")
        if not self.clip > 0:
            raise ConfigError(f"--clip must be above 0, not {self.clip}")
        if not (0 <= self.holdout < 1 and 0 <= self.max_bad_fraction <= 1):
            raise ConfigError(
                f"--holdout {self.holdout} must lie in [0, 1), --max_bad_fraction {self.max_bad_fraction} in [0, 1]"
            )
        if self.single and self.solver == "lbfgs":
            raise ConfigError("--single is the published protocol, which has AdamW: leave out --solver lbfgs")
        heads = math.prod(map(len, axes(self).values()))
        if self.single and (self.refit or heads > 1):
            raise ConfigError("--single is one head on all data: no --refit, and one value of each setting")
        if self.solver == "lbfgs" and (self.init or self.mlp_layers):
            raise ConfigError("--init and --mlp_layers have no meaning with --solver lbfgs: its optimum is one")
        if self.init and (self.mlp_layers or self.nonlinear_blocks or self.reference):
            raise ConfigError(
                "--init fits the features of one encoder: no --reference, no --mlp_layers, no --nonlinear_blocks"
            )
        if self.refit and self.shots:
            raise ConfigError("--refit would add the held-out images to the --shots; give one or the other")
        if not self.single and self.holdout == 0 and (self.refit or heads > 1):
            raise ConfigError(f"--holdout 0 leaves nothing to choose among {heads} heads by; hold some out")
        if not self.data:
            raise ConfigError("--data is missing: shards, or `demo` for the built-in digits")


def axes(config: Config) -> dict[str, list[Any]]:
    """The values of each setting whose combinations make the grid."""
    names = ["normalize", "bias", "label_smoothing"]
    names += ["penalty"] if config.solver == "lbfgs" else ["lr", "weight_decay"]
    return {name: getattr(config, name) or (PUBLISHED if config.single else GRID)[name] for name in names}


# ----------------------------------------------------------------------------------------------------------------------
# The run
# ----------------------------------------------------------------------------------------------------------------------


def main(config: Config) -> dict[str, Any]:
    """Runs the probe and returns what it found.

    Raises:
        ConfigError, DataError, ModelError: anything a user can cause, in one line. StopRequested: after a stop signal.
    """
    with StopSignals() as signals, contextlib.ExitStack() as resources:
        accelerator, agreement = start_run(Path(config.out), resources)
        found = probe(dataclasses.replace(config, reference=""), accelerator, agreement, signals, resources)
        if config.reference:
            log.info("")
            second = str(Path(config.out) / "reference")
            other = dataclasses.replace(config, encoder=config.reference, reference="", out=second)
            found["reference"] = probe(other, accelerator, agreement, signals, resources)
        accelerator.end_training()
        return found


def probe(
    config: Config,
    accelerator: Accelerator,
    agreement: Agreement,
    signals: StopSignals,
    resources: contextlib.ExitStack,
) -> dict[str, Any]:
    """Probes config.encoder; returns what is known of the best head, and the table of all."""
    import torch
    from accelerate.utils import gather_object

    from data import demo
    from data.features import FeatureCache, Identity, open_features
    from data.stream import open_pass
    from data.tar import find_shards
    from data.transforms import EvalTransform
    from kernels.dispatch import use_triton
    from models.encoders import load_encoder
    from models.featurisers import joined
    from models.heads import load_head, save_head
    from models.weights import state_sha256
    from train import probing
    from train.heads import Arithmetic, Point

    out, rank, device = Path(config.out), agreement.rank, accelerator.device
    # Gradients of heads that are sure of themselves are denormal numbers, which slow a CPU's products down threefold
    # and more. Before the first product: threads take the setting over when they start.
    torch.set_flush_denormal(True)
    resources.callback(torch.set_flush_denormal, False)

    folder: RunFolder | None = None
    with agreement.together():
        if rank == 0:
            folder = RunFolder(out, fresh=False)
            resources.callback(folder.close)
            _refuse_another_run(config, out)

    # --- Encoder and data ---------------------------------------------------------------------------------------------
    build_demo(accelerator, agreement, config.data)
    with agreement.together():
        encoder = load_encoder(demo.demo_encoder(config.encoder))
        encoder.eval().requires_grad_(False)
        encoder_hash = state_sha256(encoder.state_dict())
        data = demo.demo_shards("train") if config.data == "demo" else config.data
        shards = find_shards(data, allow_pipe=config.allow_pipe)
        transform = EvalTransform(encoder.image_size, decoder=config.decoder)
        identity = Identity(
            encoder={
                "weights_sha256": encoder_hash,
                "architecture": encoder.architecture,
                "clip_config": encoder.clip_config,
                "mean": encoder.mean.flatten().tolist(),
                "std": encoder.std.flatten().tolist(),
            },
            preprocessing=repr(transform),
            data=shards.fingerprint,
            samples=shards.num_samples,
            classes=shards.classes or tuple(map(str, range(shards.num_classes or 0))),
            width=encoder.feature_dim,
            dtype=config.dtype,
            precision=accelerator.mixed_precision,
        )
        cache = FeatureCache(Path(config.cache), identity)
    agreement.same(identity.key, "encoder or shards")
    log.info("encoder  %s: %d features, %d px", encoder.name, encoder.feature_dim, encoder.image_size)
    log.info("data     %d images in %d shards", shards.num_samples, len(shards.shards))
    where = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    log.info("device   %s, mixed precision %s", where, accelerator.mixed_precision)

    # --- Features -----------------------------------------------------------------------------------------------------
    def open_part(part: int) -> Pass:
        return open_pass(
            shards,
            batch_size=config.images,
            rank=part,
            world=cache.parts,
            workers=config.workers,
            transform=transform,
            strict=config.strict,
            max_bad_fraction=config.max_bad_fraction,
            allow_pipe=config.allow_pipe,
        )

    probing.extract(cache, encoder, open_part, config.images, accelerator, agreement, signals)
    encoder_name = encoder.name
    del encoder
    gc.collect()  # its hooks refer to it: the last reference does not free its memory
    if device.type == "cuda":
        torch.cuda.empty_cache()
    with agreement.together():
        finished = cache.finish() if rank == 0 else None
    with agreement.together():
        features = finished or open_features(cache.folder)
        unusable = shards.num_samples - features.rows
        if unusable > config.max_bad_fraction * shards.num_samples:
            raise DataError(f"{cache.folder}: lacks {unusable} unusable samples, more than --max_bad_fraction allows")
        if identity.bytes < _free_memory(device) / 2:
            features = features.gathered(device)
        rows = probing.choose_rows(features, 0.0 if config.single else config.holdout, config.shots, config.seed)
    if folder is not None:
        folder.write_config(config)
        folder.write_environment(accelerator)
        folder.forget_after(0)
    held_out = len(rows.held_out)
    log.info("rows     %d to train on, %d held out, %d classes", len(rows.train), held_out, len(rows.classes))

    # --- Heads --------------------------------------------------------------------------------------------------------
    precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    if config.mlp_layers and precision is torch.float16:
        raise ConfigError("--mlp_layers in fp16: small gradients underflow; launch with --mixed_precision bf16 or no")
    values = axes(config)
    with agreement.together():
        transform_of_features = None
        if config.nonlinear_blocks:
            transform_of_features = probing.draw_transform(rows, config.nonlinear_blocks, config.seed).to(device)
        initial = None
        if config.init:
            start = load_head(config.init, rows.classes, features.width)
            start.require_linear(config.init, "--init")
            if start.metadata.get("encoder_sha256", encoder_hash) != encoder_hash:
                raise ModelError(
                    f"--init {config.init} is a head of {start.metadata.get('encoder')}, not of this encoder"
                )
            if config.normalize not in ([], [start.normalize]) or (start.bias.any() and False in values["bias"]):
                kind = "normalised features" if start.normalize else "features as they are"
                raise ConfigError(f"--init {config.init} takes {kind}; leave out --normalize and --bias")
            values["normalize"], initial = [start.normalize], (start.weight, start.bias)
    form = probing.Form(config.mlp_kind, config.mlp_layers, initial)
    arithmetic = Arithmetic(device, precision, config.max_logit_bytes, config.kernel, transform_of_features)
    try:
        use_triton("multi_head_cross_entropy", config.kernel, torch.empty(0, device=device))
    except ValueError as error:
        raise ConfigError(f"--kernel {config.kernel}: {error}") from None
    schedule = probing.Schedule(config.batch_size, config.epochs, config.warmup_steps, config.clip, config.seed)
    points = [Point(**dict(zip(values, point, strict=True))) for point in itertools.product(*values.values())]

    def fit(points: list[Point], rows: probing.Rows, stage: str) -> list[probing.Fit]:
        def record(row: dict[str, Any]) -> None:
            if folder is not None:
                folder.log({"stage": stage, **row})

        shared = arithmetic, agreement, signals, record
        if config.solver == "lbfgs":
            return probing.fit_by_lbfgs(points, rows, *shared)
        return probing.fit_by_adamw(points, rows, schedule, form, *shared)

    fits = fit(points, rows, "grid")
    table = sorted(gather_object([each.summary for each in fits]), key=lambda row: row["head"])
    best = probing.best_of(table)
    kind = "held-out rows" if held_out else "training rows: nothing was held out"
    log.info("best     %s: %.2f %% of %d %s", points[best], 100 * table[best]["accuracy"], table[best]["n"], kind)
    if config.refit:
        rows = rows.all_trained()
        kept = fit([points[best]], rows, "refit")
    else:
        kept = [each for each in fits if each.number == best]
    ((weight, bias, layers),) = gather_object(
        [(each.weight.cpu(), each.bias.cpu(), each.featuriser and each.featuriser.cpu()) for each in kept]
    )
    featuriser = joined(transform_of_features and transform_of_features.cpu(), layers)

    # --- End ----------------------------------------------------------------------------------------------------------
    torch.set_flush_denormal(False)  # numpy complains of it when the figure is drawn
    facts: dict[str, Any] = {
        "encoder": encoder_name,
        "encoder_sha256": encoder_hash,
        "features": identity.key,
        "data": config.data,
        "data_fingerprint": shards.fingerprint,
        "solver": config.solver,
        "point": {name: value for name, value in dataclasses.asdict(points[best]).items() if value is not None},
        "trained_on": len(rows.train),
        "accuracy": table[best]["accuracy"],
        "accuracy_n": table[best]["n"],
        "accuracy_on": "holdout" if held_out else "train",
    }
    if folder is not None:
        probing.write_grid(points, table, best, out / "grid.csv")
        curves = [row for row in folder.metrics() if row["stage"] == "grid"]
        probing.draw_grid(points, table, curves, best, f"{table[best]['n']} {kind.partition(':')[0]}", out)
        stamped = {**facts, "commit": commit(), "date": datetime.date.today().isoformat()}
        head = out / "head.safetensors"
        normalize = points[best].normalize
        save_head(head, weight, bias, rows.classes, normalize=normalize, featuriser=featuriser, metadata=stamped)
        head_hash = state_sha256(load_head(head).state())
        if not any(row.get("head_sha256") == head_hash for row in folder.results()):
            append_row(
                out / "results.jsonl",
                metric=f"probe_{facts['accuracy_on']}_accuracy",
                value=facts["accuracy"],
                n=facts["accuracy_n"],
                correct=table[best]["correct"],
                weights_sha256=encoder_hash,
                head_sha256=head_hash,
                unusable_samples=unusable,
                **{name: facts[name] for name in ("encoder", "features", "data", "data_fingerprint", "point")},
                config=dataclasses.asdict(config),
                seed=config.seed,
                device=str(device),
            )
        log.info("written  %s: head.safetensors, grid.csv, grid.png", out)
    return {**facts, "best": best, "table": table}


def _refuse_another_run(config: Config, out: Path) -> None:
    """A folder with a finished run may be used again for the same run only."""
    import yaml

    if not (out / "results.jsonl").is_file():
        return
    saved, now = yaml.safe_load((out / "config.yaml").read_text()), dataclasses.asdict(config)
    changes = [f"{key} {saved.get(key)!r} -> {now[key]!r}" for key in now if saved.get(key) != now[key]]
    changes = [change for change in changes if change.split()[0] not in FREE]
    if changes:
        raise ConfigError(f"--out {out}: holds a run with other settings ({', '.join(changes)}); choose another folder")


def _free_memory(device: torch.device) -> float:
    """Bytes that this process may count on."""
    import psutil
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


if __name__ == "__main__":
    run_script(main, Config, __doc__.splitlines()[0], "probe_demo.yaml")
