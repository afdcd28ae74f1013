"""Trains the demo's teacher: a small CLIP-style open_clip model that has seen digits in all the styles of the demo.

Its image tower plays the part that OpenAI's CLIP plays on ImageNet: features learned from captions of many kinds of
pictures, which hold under the shifts. Only the train digits are drawn for it, none of val or of a shift set. The result
ships with the project (data/demo_teacher), so this is run only when the demo's drawing changes:

    python train/demo_teacher.py                      about five minutes on one CPU core
    python train/demo_teacher.py --out runs/teacher   leaves the shipped one alone

Writes an open_clip "local-dir": open_clip_config.json, open_clip_model.safetensors (stored as float16, computed with as
float32) and README.md with the accuracy by nearest class caption on every demo set, measured on the stored weights.
"""

from __future__ import annotations

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.command import Parser

if TYPE_CHECKING:
    import torch

    from data.demo import Drawn

SHIPPED = Path(__file__).resolve().parents[1] / "data" / "demo_teacher"

MODEL: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 12, "head_width": 64},
    "text_cfg": {"context_length": 32, "vocab_size": 128, "width": 48, "heads": 4, "layers": 1},
}
PREPROCESS: dict[str, Any] = {
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}
# Renderings of every train digit in each epoch; more of what the student will see, and of what is hardest.
RENDERINGS = {"photo": 5, "turned": 3, "outline": 2, "mosaic": 2, "stencil": 2, "painting": 2, "neon": 1, "sketch": 2}


@dataclass(frozen=True)
class Config:
    """What the command line sets; see --help."""

    out: str = str(SHIPPED)
    epochs: int = 12
    batch_size: int = 256
    learning_rate: float = 3e-3
    seed: int = 0


def main(config: Config) -> dict[str, float]:
    """Trains, writes the folder, and returns the accuracy on each demo set."""
    import numpy as np
    import torch
    from open_clip.model import CLIP
    from torch.nn import functional

    from data import demo, demo_images
    from models.weights import write_text

    torch.manual_seed(config.seed)
    rng = np.random.default_rng(config.seed)

    # ------------------------------------------------------------------------------------------------ captions
    # All captions there are, ordered by style, template and class, are the candidates of the contrastive loss: with ten
    # classes a batch holds captions twice, and CLIP's loss over the batch would push equal pairs apart.
    digits = demo_images.load_digits(seed=demo.VERSION)["train"]
    num_styles, num_templates, num_classes = len(RENDERINGS), 2, len(demo.CLASSES)
    captions = [t.format(c) for style in RENDERINGS for t in demo.STYLE_TEMPLATES[style] for c in demo.CLASSES]
    tokens = torch.from_numpy(demo.caption_tokens(captions))
    style_of = torch.arange(num_styles).repeat_interleave(num_templates * num_classes)
    class_of = torch.arange(num_classes).repeat(num_styles * num_templates)

    # --------------------------------------------------------------------------------------- model and optimiser
    model = CLIP(**MODEL).train().to(memory_format=torch.channels_last)
    image_side = list(model.visual.parameters())
    text_side = [p for name, p in model.named_parameters() if not name.startswith("visual.")]
    optimizer = torch.optim.AdamW([{"params": image_side}, {"params": text_side}], weight_decay=0.05)
    steps_per_epoch = len(digits.labels) * sum(RENDERINGS.values()) // config.batch_size
    total_steps = config.epochs * steps_per_epoch
    size = sum(p.numel() for p in model.parameters())
    print(f"{size:,} parameters, {total_steps} steps of {config.batch_size} pictures")

    # --------------------------------------------------------------------------------------------- text tower first
    # A fresh text tower embeds captions that differ in one word almost alike (cosine 0.94), and then the image tower
    # learns nothing for epochs. So the text tower first learns to tell classes and styles apart, without pictures.
    text_optimizer = torch.optim.AdamW(text_side, lr=2e-3)
    for _ in range(60):
        caption = functional.normalize(model.encode_text(tokens), dim=-1)
        by_class, by_style = (_means(caption, groups) for groups in (class_of, style_of))
        loss = functional.cross_entropy(20 * caption @ by_class.T, class_of)
        loss = loss + functional.cross_entropy(20 * caption @ by_style.T, style_of)
        text_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        text_optimizer.step()

    # ------------------------------------------------------------------------------------------------------ loop
    started = time.monotonic()
    for epoch in range(config.epochs):
        images, labels, styles = draw_epoch(digits, rng)
        order = torch.from_numpy(rng.permutation(len(images)))
        correct = 0
        for step, chosen in enumerate(order.split(config.batch_size)[:steps_per_epoch]):
            progress = (epoch * steps_per_epoch + step) / total_steps
            rate = config.learning_rate * min(progress / 0.05, 0.5 + 0.5 * math.cos(math.pi * progress))
            # The text tower is nearly done and only has to follow.
            optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = rate, 0.1 * rate
            picture = functional.normalize(model.encode_image(prepare(images[chosen])), dim=-1)
            caption = functional.normalize(model.encode_text(tokens), dim=-1)
            scale = model.logit_scale.exp()
            # The class by its mean caption, as in `measure`; the very caption with less weight, for style is easy and
            # drowns the class.
            by_class = scale * picture @ _means(caption, class_of).T
            template = torch.randint(num_templates, (len(chosen),))
            own_caption = (styles[chosen] * num_templates + template) * num_classes + labels[chosen]
            loss = functional.cross_entropy(by_class, labels[chosen])
            loss = loss + 0.1 * functional.cross_entropy(scale * picture @ caption.T, own_caption)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, math.log(100))  # as CLIP does
            correct += int((by_class.argmax(dim=1) == labels[chosen]).sum())
        seconds = time.monotonic() - started
        accuracy = correct / (steps_per_epoch * config.batch_size)
        print(
            f"epoch {epoch + 1}/{config.epochs}: loss {loss.item():.3f}, train accuracy {accuracy:.3f}, {seconds:.0f} s"
        )

    # ------------------------------------------------------------------------------------------ write, then measure
    out = Path(config.out)
    write(model, out)
    accuracy_of = measure(f"local-dir:{out}", demo.draw_demo())
    table = "\n".join(f"| {split} | {100 * accuracy:.1f} |" for split, accuracy in accuracy_of.items())
    write_text(out / "README.md", README.format(table=table))
    return accuracy_of


def _means(embeddings: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Normalised mean embedding of each group: [N, D] and group numbers [N] to [groups, D]."""
    import torch

    sums = torch.zeros(int(groups.max()) + 1, embeddings.shape[1]).index_add(0, groups, embeddings)
    return torch.nn.functional.normalize(sums, dim=-1)


def prepare(images: torch.Tensor) -> torch.Tensor:
    """uint8 [N, 3, S, S] to the tower's normalised input."""
    return (images.float() / 255 - PREPROCESS["mean"][0]) / PREPROCESS["std"][0]  # the three channels are alike


def draw_epoch(digits: Any, rng: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """New pictures of all train digits: uint8 [N, 3, 32, 32] (channels last), class [N] and style number [N]."""
    import numpy as np
    import torch

    from data import demo

    images, labels, styles = [], [], []
    for number, (style, times) in enumerate(RENDERINGS.items()):
        if style == "turned":
            upside_down = rng.random(len(digits.labels)) < 0.25
            drawn = demo.draw(digits, (style,) * times, rng, upside_down=upside_down, **demo.TURNED)
            # A six upside down looks like a nine, so that is what its caption says.
            swapped = np.tile(upside_down, times) & np.isin(drawn.labels, (6, 9))
            labels.append(np.where(swapped, 15 - drawn.labels, drawn.labels))
        else:
            drawn = demo.draw(digits, (style,) * times, rng, angle=14, scale=(0.6, 0.95), shift=4)
            labels.append(drawn.labels)
        images.append(drawn.images)
        styles.append(np.full(len(drawn.images), number))
    pixels = torch.from_numpy(np.concatenate(images)).permute(0, 3, 1, 2)
    return pixels, torch.from_numpy(np.concatenate(labels)), torch.from_numpy(np.concatenate(styles))


def write(model: torch.nn.Module, out: Path) -> None:
    """Writes weights and configuration as an open_clip folder. Raises ModelError if that is impossible."""
    from models import ModelError
    from models.weights import write_safetensors, write_text

    # Batch counters stay whole numbers. Variances far from 1 might not fit, which `measure` would show.
    state = {name: value.half() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(f"cannot write {out}: {error.strerror}") from None
    write_safetensors(out / "open_clip_model.safetensors", state, {"made_by": "train/demo_teacher.py"})
    settings = {"model_cfg": MODEL, "preprocess_cfg": PREPROCESS}
    write_text(out / "open_clip_config.json", json.dumps(settings, indent=2) + "\n")


def measure(name: str, sets: dict[str, Drawn]) -> dict[str, float]:
    """Accuracy of a stored model on the drawn demo sets by the nearest class caption, averaged over all templates."""
    import open_clip
    import torch
    from torch.nn import functional

    from data import demo

    model = open_clip.create_model(name).eval()
    accuracy_of = {}
    with torch.no_grad():
        templates = [template for templates in demo.STYLE_TEMPLATES.values() for template in templates]
        captions = demo.caption_tokens([t.format(c) for t in templates for c in demo.CLASSES])
        text = functional.normalize(model.encode_text(torch.from_numpy(captions)), dim=-1)
        text = text.view(len(templates), len(demo.CLASSES), -1).mean(dim=0)
        for split, drawn in sets.items():
            border, size = demo.DEMO_SPLITS[split].border, drawn.images.shape[1]
            known = drawn.labels != demo.NO_CLASS
            inner = drawn.images[known][:, border : size - border, border : size - border]
            features = model.encode_image(prepare(torch.from_numpy(inner).permute(0, 3, 1, 2)))
            scores = features @ functional.normalize(text, dim=-1).T
            accepts = demo.DEMO_SPLITS[split].accepts
            by_label = torch.stack([scores[:, list(classes)].amax(dim=1) for classes in accepts], dim=1)
            truth = [next(i for i, c in enumerate(accepts) if label in c) for label in drawn.labels[known].tolist()]
            accuracy_of[split] = (by_label.argmax(dim=1) == torch.tensor(truth)).double().mean().item()
            print(f"{split:10} {accuracy_of[split]:.3f}  ({len(truth)} pictures)")
    return accuracy_of


README = """# The demo's teacher

A small CLIP-style model (open_clip; ModifiedResNet image tower for 32x32 pictures, one-layer text tower over ASCII
codes), trained on drawings of the train part of scikit-learn's handwritten digits in all the styles of the built-in
demo. Made by

    python train/demo_teacher.py

Top-1 accuracy in percent by the nearest class caption (all templates averaged), with each set's classes and class map:

| set | top-1 |
|---|---|
{table}

Stored as float16, computed with as float32. Digits: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten
Digits, UCI Machine Learning Repository, 1998 (CC BY 4.0). The weights are under the project's licence.
"""


def run(arguments: Sequence[str] | None = None) -> int:
    """Reads the command line, trains, and returns the exit code."""
    from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt

    from models import ModelError

    default = Config()
    parser = Parser(prog="train/demo_teacher.py", description="Trains the teacher of the built-in demo.")
    parser.add_argument("--out", type=str, default=default.out, help="folder to write")
    parser.add_argument("--epochs", type=PositiveInt, default=default.epochs, help="each draws all pictures anew")
    parser.add_argument("--batch_size", type=PositiveInt, default=default.batch_size, help="pictures a step")
    parser.add_argument(
        "--learning_rate", type=PositiveFloat, default=default.learning_rate, help="highest, of the image tower"
    )
    parser.add_argument("--seed", type=NonNegativeInt, default=default.seed, help="of drawing, weights and order")
    config = Config(**parser.parse_args(arguments).as_dict())
    try:
        main(config)
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(run())
