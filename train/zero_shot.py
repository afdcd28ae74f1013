"""Makes a classifier out of captions: a linear head from a CLIP's text tower, without a single training image.

Each class is the mean direction of its captions' embeddings ("a photo of a {}.", "a drawing of a {}.", ...). What such
heads reach under shifts is the robustness that distilled students are measured against.

    python train/zero_shot.py                                            built-in demo, a few seconds
    python train/zero_shot.py --encoder open_clip:RN50/openai --suite imagenet --templates openai \\
        --out heads/zero_shot.safetensors                                one process, on a GPU if there is one
    python train/zero_shot.py --encoder local-dir:runs/demo/export --check demo     a student, and its accuracy

Writes one head (models/heads.py): class names in the suite's order, no bias, for features divided by their norm; in the
header the encoder, both towers' SHA-256 and the templates. eval/shifts.py scores it.

Cost: a text forward for each class and template; for ImageNet 80,000 with OpenAI's 80 templates, 7,000 with the 7. On
two CPU cores RN50's text tower does about 25 a second.
"""

from __future__ import annotations

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import dataclasses
import datetime
import json
import os
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from data import DataError
from data.command import Parser
from data.rows import commit
from models import ModelError
from train.common import ConfigError, option

if TYPE_CHECKING:
    import torch

    from data.tar import ShardSet
    from models.encoders import Encoder

# A text tower with so many tokens reads ASCII codes: the demo teacher's, and that of students distilled from it.
ASCII_TOKENS = 128


@dataclass(frozen=True)
class Config:
    """Settings; the defaults are the demo's."""

    encoder: str = option(
        "demo", "CLIP with a text tower: open_clip:RN50/openai, open_clip:ARCH/FILE, local-dir:FOLDER, hf-hub:ORG/NAME"
    )
    suite: Literal["demo", "imagenet", "none"] = option(
        "demo", "classes and their order; none = those of --class_names"
    )
    templates: str = option(
        "auto",
        "openai = 80, simple = 7, demo = 16 captions a class, or a FILE of templates with {} for the class: one a "
        "line, or a JSON list; auto = demo for the demo's classes, else openai",
    )
    class_names: str = option(
        "",
        "FILE of words for the captions: one class a line or a JSON list, in class order, or a JSON object from class "
        "to words; empty = the suite's own (imagenet: OpenAI's)",
    )
    batch_size: int = option(256, "captions, and images of --check, at a time")
    check: str = option(
        "", "shards of labelled images, demo = the demo's val set: print the head's accuracy on them; empty = do not"
    )
    out: str = option("runs/zero_shot/head.safetensors", "head to write")

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"--batch_size must be at least 1, not {self.batch_size}")
        if self.suite == "none" and not self.class_names:
            raise ConfigError("--suite none takes its classes from --class_names FILE, which is missing")
        if Path(self.out).suffix != ".safetensors":
            raise ConfigError(f"--out {self.out}: must end in .safetensors")


# ----------------------------------------------------------------------------------------------------------------------
# Captions
# ----------------------------------------------------------------------------------------------------------------------


def read_templates(templates: str) -> list[str]:
    """Templates by name or from a file, each with one {}.

    Raises DataError: no such file, or a template without {} or with several.
    """
    import open_clip

    from data.demo import STYLE_TEMPLATES

    if templates == "demo":
        return [template for own in STYLE_TEMPLATES.values() for template in own]
    if templates in ("openai", "simple"):
        openai = templates == "openai"
        makers = open_clip.OPENAI_IMAGENET_TEMPLATES if openai else open_clip.SIMPLE_IMAGENET_TEMPLATES
        return [make("{}") for make in makers]
    found = _read_words(templates, "--templates")
    if isinstance(found, dict):
        raise DataError(f"--templates {templates}: a JSON object; expected a list, or one template a line")
    wrong = next((template for template in found if template.count("{}") != 1), None)
    if wrong is not None:
        raise DataError(f"--templates {templates}: {wrong!r} must hold {{}} once, where the class goes")
    return found


def read_classes(suite: str, class_names: str) -> tuple[list[str], list[str]]:
    """The classes in the head's order, and the words for each in captions.

    Raises DataError: unreadable file, a number of words or classes other than the suite's, a class named twice.
    """
    import open_clip

    from data.shifts import SUITES

    if not class_names:
        classes = list(SUITES[suite].classes)
        return classes, classes if suite == "demo" else list(open_clip.IMAGENET_CLASSNAMES)
    words = _read_words(class_names, "--class_names")
    where = f"--class_names {class_names}"
    if suite == "none":
        classes = sorted(words) if isinstance(words, dict) else words
        if repeated := next((name for name in classes if classes.count(name) > 1), None):
            raise DataError(f"{where}: {repeated!r} twice; a JSON object from class to words tells such classes apart")
    else:
        classes = list(SUITES[suite].classes)
    if isinstance(words, dict):
        if differing := sorted(set(words) ^ set(classes)):
            raise DataError(
                f"{where}: {len(words)} classes, {suite} has {len(classes)}; first that only one has: {differing[0]!r}"
            )
        return classes, [words[name] for name in classes]
    if len(words) != len(classes):
        raise DataError(f"{where}: words for {len(words)} classes, {suite} has {len(classes)}")
    return classes, words


def _read_words(file: str, flag: str) -> list[str] | dict[str, str]:
    """Texts one a line, or, in a file that ends in .json, a list or an object of them."""
    try:
        text = Path(file).expanduser().read_text(encoding="utf-8")
        content = json.loads(text) if file.endswith(".json") else [line for line in text.splitlines() if line.strip()]
    except OSError as error:
        raise DataError(f"{flag} {file}: {error.strerror or error} (working folder {Path.cwd()})") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{flag} {file}: cannot be read ({error})") from None
    values = content.values() if isinstance(content, dict) else content if isinstance(content, list) else []
    if not values or not all(isinstance(value, str) and value.strip() for value in values):
        raise DataError(f"{flag} {file}: must hold texts, one at least and none empty")
    return content


# ----------------------------------------------------------------------------------------------------------------------
# The head
# ----------------------------------------------------------------------------------------------------------------------


def main(config: Config) -> dict[str, Any]:
    """Writes the head and returns what its header holds, with "accuracy" and "accuracy_n" where it was checked.

    Raises ConfigError, DataError, ModelError: anything a user can cause, in one line.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError("this script is one process: start it with python, not with accelerate launch")

    import torch
    from tqdm import tqdm

    from data import demo
    from data.tar import find_shards
    from models.encoders import load_encoder
    from models.heads import save_head
    from models.weights import state_sha256
    from models.zero_shot import load_text_encoder, zero_shot_head

    # --- Captions and images ------------------------------------------------------------------------------------------
    classes, words = read_classes(config.suite, config.class_names)
    templates = config.templates
    if templates == "auto":
        templates = "demo" if config.suite == "demo" else "openai"
    texts = read_templates(templates)
    captions = [[template.replace("{}", word) for template in texts] for word in words]
    shards = None
    if config.check:
        shards = find_shards(demo.demo_shards("val") if config.check == "demo" else config.check)
        if shards.classes and list(shards.classes) != classes:
            raise DataError(f"--check {config.check}: has other classes than the head, or another order")

    # --- Encoder ------------------------------------------------------------------------------------------------------
    def ascii_tokens(captions: list[str]) -> torch.Tensor:
        return torch.from_numpy(demo.caption_tokens(captions))

    encoder = load_encoder(demo.DEMO_TEACHER if config.encoder == "demo" else config.encoder)
    encoder.eval().requires_grad_(False)
    text_config = (encoder.clip_config or {}).get("text_cfg") or {}
    reads_ascii = text_config.get("vocab_size") == ASCII_TOKENS
    text_encoder = load_text_encoder(encoder, ascii_tokens if reads_ascii else None)
    hashes = {
        "encoder_sha256": state_sha256(encoder.state_dict()),
        "text_sha256": state_sha256(text_encoder.tower.state_dict()),
    }
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    # --- Head ---------------------------------------------------------------------------------------------------------
    number = len(classes) * len(texts)
    print(f"captions {number:,}: {len(classes)} classes x {len(texts)} templates, on {device.type}", flush=True)
    with tqdm(total=number, unit="caption", dynamic_ncols=True, disable=None) as bar:  # None: only on a terminal
        weight = zero_shot_head(text_encoder.to(device), captions, batch_size=config.batch_size, advance=bar.update)
    facts: dict[str, Any] = {
        "source": "zero-shot: mean of normalised caption embeddings, normalised, times exp(logit_scale)",
        "encoder": config.encoder,
        **hashes,
        "suite": config.suite,
        "templates": texts,
        "words": words,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }
    out = Path(config.out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(f"--out {out}: cannot be written ({error.strerror or error})") from None
    save_head(out, weight, None, classes, normalize=True, metadata=facts)
    print(f"written  {out}: {len(classes)} classes x {weight.shape[1]} features, of {encoder.name}")

    # --- Check --------------------------------------------------------------------------------------------------------
    if shards is not None:
        correct, n = count_correct(encoder.to(device), weight.to(device), shards, config.batch_size)
        print(f"check    top-1 {100 * correct / n:.2f} % ({correct} of {n} images, --check {config.check})")
        facts |= {"accuracy": correct / n, "accuracy_n": n}
    return facts


def count_correct(encoder: Encoder, weight: torch.Tensor, shards: ShardSet, batch_size: int) -> tuple[int, int]:
    """How many images the head [C, D] gets right, and how many there are.

    Raises DataError for unusable images and for a label outside [0, C).
    """
    import torch

    from data.stream import open_pass
    from data.transforms import EvalTransform, unit_interval

    correct = n = 0
    transform = EvalTransform(encoder.image_size)
    with torch.inference_mode(), open_pass(shards, batch_size=batch_size, transform=transform) as batches:
        for batch in batches:
            labels = batch["label"]
            if int(labels.max()) >= len(weight):
                raise DataError(f"--check: the images have label {int(labels.max())}, the head {len(weight)} classes")
            # The norm of the features does not change which logit is the largest, so it is left out here.
            logits = encoder(unit_interval(batch["image"].to(weight.device))) @ weight.T
            correct += int((logits.argmax(dim=1).cpu() == labels).sum())
            n += len(labels)
    return correct, n


def run(arguments: Sequence[str] | None = None) -> int:
    """Reads the command line, makes the head, and returns the exit code: 0 done, 1 data or model, 2 wrong setting."""
    parser = Parser(prog="train/zero_shot.py", description=__doc__.splitlines()[0])
    hints = typing.get_type_hints(Config)
    for field in dataclasses.fields(Config):
        parser.add_argument(
            f"--{field.name}", type=hints[field.name], default=field.default, help=field.metadata["help"]
        )
    settings = parser.parse_args(arguments).as_dict()
    try:
        main(Config(**settings))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (DataError, ModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the head is either whole or not written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(run())
