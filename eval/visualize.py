"""What excites the channels of a network? Images found by optimisation, and how far their colours lie toward one.

    accelerate launch eval/visualize.py                              the net of train/adversarial.py's demo: 2 minutes
    accelerate launch eval/visualize.py --model torchvision:resnet50/IMAGENET1K_V2 --layer layer4.2.conv3 \\
        --channels 0-63                                              one GPU
    accelerate launch eval/visualize.py --model local-dir:runs/resnet32_padded/export \\
        --compare local-dir:runs/resnet32_unpadded/export --color 150,50,50      did the padding enter the features?
    accelerate launch --config_file train/launch/gpu_8_bf16.yaml eval/visualize.py --model ...   eight GPUs

--model takes every name of models/classifiers.py, and open_clip:, timm: and hf-hub: ones of models/encoders.py. --layer
is any module of it, `output` being its logits, so that `--layer output --channels 3,5` draws classes 3 and 5; a name
that is not there is answered with those that are. Presets are explained in eval/activation.py: `robust`, and
`published`, which repeats the released code of Feature Contamination step by step, save that its PNG has red and blue
in their places. The published images leave [0, 1] and are shown as they were, all scaled by one minimum and maximum.

With --color the shift of the channels' colours toward it is reported; with --compare, the difference between two
networks and its interval, which eval/colours.py defines. Both networks then start from the same noise.

Images depend on --seed and not on the number of processes, to which batches of --batch_size channels are dealt out;
another batch size changes roundings only. Cost: steps x channels x starts, forward and backward up to the layer, in
float32. Memory is that of a batch: ResNet-50 at 224 px needs about 0.1 GB for each of its images.

Writes into --out: config.yaml, env.json, results.jsonl, images.safetensors (images [starts, channels, C, S, S],
activations [starts, channels, 2] at the start and at the end, channels) and channels.png, of the first start; with
--compare the same as compare_images.safetensors and compare_channels.png; with --color, colours.png.
"""

from __future__ import annotations

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import contextlib
import dataclasses
import logging
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from data.rows import append_row
from eval.common import DEMO_CLASSIFIER, check_demo, print_table
from models import ModelError
from train.common import ConfigError, Progress, RunFolder, StopRequested, check_numbers, memory_mib, option, run_script
from train.launching import StopSignals, start_run

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from eval.activation import Layer

SECONDS_BETWEEN_LINES = 10.0
STEPS_BETWEEN_VOTES = 10
MOST_ON_A_SHEET = 1024  # images; 224 pixels a side make 7,400 pixels of it
log = logging.getLogger("shiftlens")


@dataclass(frozen=True)
class Config:
    """Settings."""

    model: str = option(DEMO_CLASSIFIER, "network: local-dir:FOLDER, cifar_resnet32/FILE, ...")
    compare: str = option("", "second network, whose colours are compared with the first one's; needs --color")
    layer: str = option("", "module to visualise; empty = the last convolution before the classifier")
    channels: str = option("all", "channels of the layer: all, or numbers and ranges such as 0-31,40")
    preset: Literal["robust", "published"] = option("robust", "search, see eval/activation.py")
    steps: int = option(0, "steps of Adam (published: of a round); 0 = the preset's")
    starts: int = option(0, "images of each channel, from starts of their own; 0 = 3 with --color, else 1")
    color: str = option("", "R,G,B in 0..255: report how far colours lie toward it; empty = do not")
    batch_size: int = option(64, "images that are searched for at once, per process")
    seed: int = option(0, "of starts, shifts and resamples")
    name: str = option("", "what rows and figures call the first network; empty = --model")
    compare_name: str = option("", "the same of the second; empty = --compare")
    out: str = option("runs/visualize", "run folder")

    def __post_init__(self) -> None:
        check_numbers(self, at_least_1=("batch_size",), not_negative=("steps", "starts", "seed"))
        if self.compare and not self.color:
            raise ConfigError("--compare compares colours: give --color, such as the padding's 150,50,50")
        if self.compare and self.titles[0] == self.titles[1]:
            raise ConfigError("--model and --compare have the same name; give --name or --compare_name")
        if self.color:
            from eval.colours import chroma_of

            try:
                chroma_of(self.rgb)
            except ValueError as error:
                raise ConfigError(f"--color {self.color}: {error}") from None
        if self.channels != "all" and not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", self.channels):
            raise ConfigError(f"--channels {self.channels}: expected all, or numbers and ranges such as 0-31,40")

    @property
    def rgb(self) -> tuple[int, ...]:
        """--color as integers; empty without it. Raises ConfigError."""
        try:
            return tuple(int(value) for value in self.color.split(",") if self.color)
        except ValueError:
            raise ConfigError(f"--color {self.color}: expected R,G,B, three integers in 0..255") from None

    @property
    def titles(self) -> tuple[str, str]:
        """Names of the networks."""
        return self.name or self.model, self.compare_name or self.compare


@dataclass(frozen=True)
class Subject:
    """A network, and what is to be visualised of it."""

    title: str
    model: nn.Module
    sha256: str
    size: tuple[int, int, int]
    layer: Layer
    channels: list[int]


@dataclass
class Images:
    """What was found: images [starts, channels, C, S, S], activations [starts, channels, 2] at start and end."""

    images: Tensor
    activations: Tensor


# ----------------------------------------------------------------------------------------------------------------------
# What is to be visualised
# ----------------------------------------------------------------------------------------------------------------------


def load(name: str, title: str, config: Config, device: Any) -> Subject:
    """The network called `name`. Raises ModelError: it cannot be loaded, or has no such layer or channels."""
    import torch

    from eval.activation import choose_layer, find_layers
    from models.classifiers import CLASSIFIER_FILE, load_classifier
    from models.encoders import load_encoder
    from models.weights import state_sha256

    check_demo(name)
    library, _, rest = name.partition(":")
    folder = Path(rest).expanduser()
    exported = library == "local-dir" and folder.is_dir() and not (folder / CLASSIFIER_FILE).is_file()
    if library in ("open_clip", "timm", "hf-hub") or exported:
        model: Any = load_encoder(name)
    else:
        model = load_classifier(name)
    sha256 = state_sha256(model.state_dict())
    model = model.eval().to(device, memory_format=torch.channels_last)
    size = (len(model.mean), model.image_size, model.image_size)
    layer = choose_layer(find_layers(model, size), config.layer)
    return Subject(title, model, sha256, size, layer, read_channels(config.channels, layer))


def read_channels(text: str, layer: Layer) -> list[int]:
    """The channels of a layer that --channels names, in order. Raises ModelError for one that is not there."""
    if text == "all":
        return list(range(layer.channels))
    wanted: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        if int(last or first) >= layer.channels or int(last or first) < int(first):
            raise ModelError(f"--channels {part}: layer {layer.name} has channels 0-{layer.channels - 1}")
        wanted.update(range(int(first), int(last or first) + 1))
    return sorted(wanted)


# ----------------------------------------------------------------------------------------------------------------------
# The run
# ----------------------------------------------------------------------------------------------------------------------


def main(config: Config) -> dict[str, Any]:
    """Visualises and returns {"rows": results (on rank 0), "images": [Images of each network]}.

    Raises:
        ConfigError, ModelError: anything a user can cause, in one line.
        StopRequested: after a stop signal; nothing is written then.
    """
    with StopSignals() as signals, contextlib.ExitStack() as resources:
        return visualize(config, signals, resources)


def visualize(config: Config, signals: StopSignals, resources: contextlib.ExitStack) -> dict[str, Any]:
    # --- Launch -------------------------------------------------------------------------------------------------------
    out = Path(config.out)
    accelerator, agreement = start_run(out, resources)
    rank, world, device = agreement.rank, agreement.world, accelerator.device

    import torch

    from eval.activation import PRESETS, draw_starts, objective_of

    # --- Networks -----------------------------------------------------------------------------------------------------
    search = PRESETS[config.preset](**({"steps": config.steps} if config.steps else {}))
    starts = config.starts or (3 if config.color else 1)
    with agreement.together():
        names = [name for name in (config.model, config.compare) if name]
        subjects = [load(name, title, config, device) for name, title in zip(names, config.titles, strict=False)]
        if config.color and any(subject.size[0] != 3 for subject in subjects):
            grey = next(subject.title for subject in subjects if subject.size[0] != 3)
            raise ConfigError(f"--color: {grey} takes grey images, which have no hue")
        if config.preset == "published" and any(subject.size[0] != 3 for subject in subjects):
            raise ConfigError("--preset published normalises three colours; grey images need --preset robust")
        folder = None
        if rank == 0:
            folder = RunFolder(out, fresh=False)
            resources.callback(folder.close)
            folder.write_config(config)
            folder.write_environment(accelerator)
    agreement.same([subject.sha256 for subject in subjects], "models")
    for subject in subjects:
        maps = "x".join(map(str, subject.layer.shape))
        log.info(
            "network  %s: layer %s (%s), %d channels", subject.title, subject.layer.name, maps, len(subject.channels)
        )
    log.info("search   %s, %d steps, %d starts, %s", config.preset, search.total, starts, device)

    # --- Searches: batches of the networks' (start, channel), dealt out in turn ---------------------------------------
    found = [
        Images(
            torch.zeros(starts * len(subject.channels), *subject.size, device=device),
            torch.zeros(starts * len(subject.channels), 2, device=device),
        )
        for subject in subjects
    ]
    tasks = [
        (place, range(first, min(first + config.batch_size, len(images.images))))
        for place, images in enumerate(found)
        for first in range(0, len(images.images), config.batch_size)
    ]
    rounds = -(-len(tasks) // world)
    done, last_line = 0, time.monotonic()
    with contextlib.closing(Progress(0, rounds * search.total, config.batch_size * world, shown=rank == 0)) as progress:

        def count() -> None:
            """After each step: of all processes, also of those without a batch in the last round."""
            nonlocal done, last_line
            progress.step_done(done)
            done += 1
            if done % STEPS_BETWEEN_VOTES == 0 and (stop := agreement.settle(None, signals.received)):
                raise StopRequested(stop, f"stopped by signal {stop}; nothing is written")
            if time.monotonic() - last_line > SECONDS_BETWEEN_LINES:
                last_line = time.monotonic()
                left = progress.rates()["seconds_left"]
                text = f"step {done}/{progress.total}  {memory_mib(device):.0f} MiB"
                log.info("%s%s", text, f"  {left:.0f} s left" if left else "")

        for number in range(rank, rounds * world, world):
            if number >= len(tasks):
                for _ in range(search.total):
                    count()
                continue
            place, rows = tasks[number]
            subject, images = subjects[place], found[place]
            items = [(row // len(subject.channels), subject.channels[row % len(subject.channels)]) for row in rows]
            begin = draw_starts(search, subject.size, items, config.seed).to(device)
            channels = torch.tensor([channel for _, channel in items], device=device)
            with objective_of(subject.model, subject.layer, device, fold=search.fold) as objective:
                result = search(objective, begin, channels, config.seed, count)
            images.images[rows.start : rows.stop] = result.images
            images.activations[rows.start : rows.stop] = torch.stack([result.before, result.after], 1)
    # A vote, which waits for the slowest process as long as it takes; the sums below would not.
    if stop := agreement.settle(None, signals.received):
        raise StopRequested(stop, f"stopped by signal {stop}; nothing is written")
    for subject, images in zip(subjects, found, strict=True):
        shape = (starts, len(subject.channels))
        # Each row is one process's, and 0 on the others: the sum is exact.
        images.images = accelerator.reduce(images.images, "sum").unflatten(0, shape).cpu()  # type: ignore[union-attr]
        images.activations = accelerator.reduce(images.activations, "sum").unflatten(0, shape).cpu()  # type: ignore[union-attr]

    # --- Results ------------------------------------------------------------------------------------------------------
    rows_of: list[dict[str, Any]] = []
    with agreement.together():
        check(subjects, found)
        if folder is not None:
            rows_of = report(config, subjects, found, search.total, out, str(device))
    log.info("written  %s: results.jsonl, images.safetensors, channels.png", out)
    accelerator.end_training()
    return {"rows": rows_of, "images": found}


# ----------------------------------------------------------------------------------------------------------------------
# What is told
# ----------------------------------------------------------------------------------------------------------------------


def check(subjects: list[Subject], found: list[Images]) -> None:
    """Says which channels nothing excites. Raises ModelError: activations or images that are not finite."""
    for subject, images in zip(subjects, found, strict=True):
        bad = ~(images.images.flatten(2).isfinite().all(2) & images.activations.isfinite().all(2)).all(0)
        if bad.any():
            channel = subject.channels[int(bad.nonzero()[0])]
            raise ModelError(f"{subject.title}: images or activations of channel {channel} are not finite")
        before, after = images.activations.unbind(-1)
        if dead := [channel for channel, same in zip(subject.channels, (before == after).all(0), strict=True) if same]:
            log.warning("%s: nothing excites channels %s; their images are the start", subject.title, dead)


def shown(images: Images, config: Config) -> NDArray[np.float32]:
    """Images [starts, channels, C, S, S] as they are looked at: in [0, 1]."""
    pixels: NDArray[np.float32] = images.images.numpy()
    if config.preset == "published":
        low, high = float(pixels.min()), float(pixels.max())
        return (pixels - low) / max(high - low, 1e-12)
    return pixels


def report(
    config: Config, subjects: list[Subject], found: list[Images], steps: int, out: Path, device: str
) -> list[dict[str, Any]]:
    """Writes images, sheets, rows and the figure, prints the numbers, and returns the rows without provenance."""
    import torch

    from eval.colours import chroma, compare, draw_colours, draw_sheet, own_shift
    from models.weights import write_safetensors

    about = [
        {
            "model": subject.title,
            "model_name": name,
            "model_sha256": subject.sha256,
            "layer": subject.layer.name,
            "n": len(subject.channels),
            "starts": len(images.images),
            "preset": config.preset,
            "steps": steps,
            "seed": config.seed,
            "config": dataclasses.asdict(config),
            "device": device,
        }
        for subject, images, name in zip(subjects, found, (config.model, config.compare), strict=False)
    ]
    rows: list[dict[str, Any]] = []
    chromas: dict[str, Any] = {}
    for subject, images, fields, prefix in zip(subjects, found, about, ("", "compare_"), strict=False):
        tensors = {
            "images": images.images,
            "activations": images.activations,
            "channels": torch.tensor(subject.channels),
        }
        write_safetensors(out / f"{prefix}images.safetensors", tensors, fields)
        pixels = shown(images, config)
        title = f"{subject.title}, {subject.layer.name}, {config.preset}"
        some = subject.channels[:MOST_ON_A_SHEET]
        draw_sheet(out / f"{prefix}channels.png", pixels[0, : len(some)], some, title, config.rgb or None)
        gain = images.activations.double().mean((0, 1))
        rows.append({"metric": "activation", "value": float(gain[1]), "at_start": float(gain[0]), **fields})
        if config.rgb:
            chromas[subject.title] = chroma(pixels)
            number = own_shift(chromas[subject.title], config.rgb, config.seed)
            rows.append({**number.row(), "color": list(config.rgb), **fields})
    if config.rgb:
        draw_colours(out / "colours.png", chromas, config.rgb)
    if config.compare:
        second = {f"compare_{key}": about[1][key] for key in ("model", "model_name", "model_sha256", "layer", "n")}
        first, other = chromas.values()
        for number in compare(first, other, config.rgb, config.seed):
            rows.append({**number.row(), "color": list(config.rgb), **about[0], **second})
    for row in rows:
        append_row(out / "results.jsonl", **row)
    lines = [
        [row["metric"], row["model"] + (f" - {row['compare_model']}" if "compare_model" in row else "")]
        + [f"{row['value']:.3f}", "{:.3f}..{:.3f}".format(*row["interval"]) if "interval" in row else ""]
        for row in rows
    ]
    print_table(["number", "of", "value", "95 %"], lines)
    return rows


if __name__ == "__main__":
    run_script(main, Config, __doc__.splitlines()[0], "visualize_demo.yaml")
