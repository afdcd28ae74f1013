"""Trains the demo's teacher: a small CLIP-style open_clip model that has seen digits in every style the demo's shift sets use.

Its image tower plays the part that OpenAI's CLIP plays on ImageNet: features from image-text training on many kinds of pictures,
which hold under the shifts. It learns from the 1,198 train digits alone; no digit of val or of a shift set is drawn for it. The
result ships with the project (data/demo_teacher), so this is run only when the demo's drawing changes:

    python train/demo_teacher.py                      a few minutes on one CPU core
    python train/demo_teacher.py --out runs/teacher   leaves the shipped one alone

Writes an open_clip "local-dir": open_clip_config.json, open_clip_model.safetensors (float16 storage, float32 arithmetic) and a
README.md with the accuracy by nearest class caption on every demo set, measured on the weights as stored.
"""

from __future__ import annotations

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SHIPPED = Path(__file__).resolve().parents[1] / "data" / "demo_teacher"

MODEL: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 32, "layers": [2, 2, 2, 1], "width": 12, "head_width": 64},
    "text_cfg": {"context_length": 32, "vocab_size": 128, "width": 48, "heads": 4, "layers": 2},
}
PREPROCESS: dict[str, Any] = {
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}
# Renderings of every train digit in each epoch. Plain pictures are what the student is later given, so they come more often.
RENDERINGS = {"photo": 5, "turned": 3, "outline": 2, "mosaic": 2, "stencil": 2, "painting": 2, "neon": 1, "sketch": 2}


@dataclass(frozen=True)
class Config:
    """Trains the teacher of the built-in demo.

    Attributes:
        out: folder to write; must be the shipped one, new or empty.
        epochs: passes over the train digits; each draws all pictures anew.
        batch_size: pictures per step.
        learning_rate: AdamW's highest learning rate.
        seed: of the drawing, the initialisation and the order.
    """

    out: str = str(SHIPPED)
    epochs: int = 16
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

    torch.manual_seed(config.seed)
    rng = np.random.default_rng(config.seed)

    # ------------------------------------------------------------------------------------------------ captions
    # The candidates of the contrastive loss are all captions there are (UniCL, Yang et al. 2022): with ten classes nearly every
    # batch would hold the same caption twice, and CLIP's own loss would push equal pairs apart.
    digits = demo_images.load_digits(seed=demo.VERSION)["train"]
    captions = [t.format(c) for style in RENDERINGS for t in demo.STYLE_TEMPLATES[style] for c in demo.CLASSES]
    tokens = torch.from_numpy(demo.caption_tokens(captions))
    per_style = len(demo.CLASSES) * len(demo.STYLE_TEMPLATES["photo"])

    # --------------------------------------------------------------------------------------- model and optimiser
    model = CLIP(**MODEL).train().to(memory_format=torch.channels_last)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}])
    steps_per_epoch = len(digits.labels) * sum(RENDERINGS.values()) // config.batch_size
    total_steps = config.epochs * steps_per_epoch
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {total_steps} steps of {config.batch_size} pictures"
    )

    # ------------------------------------------------------------------------------------------------------ loop
    started = time.monotonic()
    for epoch in range(config.epochs):
        images, labels, styles = draw_epoch(digits, rng)
        order = torch.from_numpy(rng.permutation(len(images)))
        correct = 0
        for step, chosen in enumerate(order.split(config.batch_size)[:steps_per_epoch]):
            progress = (epoch * steps_per_epoch + step) / total_steps
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * min(progress / 0.05, 0.5 + 0.5 * math.cos(math.pi * progress))
            picture = functional.normalize(model.encode_image(prepare(images[chosen])), dim=-1)
            caption = functional.normalize(model.encode_text(tokens), dim=-1)
            logits = model.logit_scale.exp() * picture @ caption.T
            template = torch.randint(per_style // len(demo.CLASSES), (len(chosen),))
            own_caption = styles[chosen] * per_style + template * len(demo.CLASSES) + labels[chosen]
            # The second term asks for the class whatever the style: captions of one class are summed over.
            by_class = logits.view(len(chosen), -1, len(demo.CLASSES)).logsumexp(dim=1)
            loss = functional.cross_entropy(logits, own_caption) + functional.cross_entropy(by_class, labels[chosen])
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
    accuracy_of = measure(write(model, Path(config.out)))
    readme(Path(config.out), accuracy_of)
    return accuracy_of


def prepare(images: torch.Tensor) -> torch.Tensor:
    """uint8 [N, 3, S, S] to the tower's normalised input."""
    return (images.float() / 255 - PREPROCESS["mean"][0]) / PREPROCESS["std"][0]  # the three channels are alike


def draw_epoch(digits: Any, rng: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """New pictures of all train digits in all styles: uint8 [N, 3, 32, 32] (channels last), class [N] and style number [N]."""
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


def write(model: torch.nn.Module, out: Path) -> str:
    """Writes the open_clip folder and returns its open_clip name."""
    import torch
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    # BatchNorm's variances and the logit scale fit float16 as well; whole numbers stay whole.
    state = {k: v.half().contiguous() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    save_file(state, out / "open_clip_model.safetensors")
    settings = {"model_cfg": MODEL, "preprocess_cfg": PREPROCESS}
    (out / "open_clip_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    assert all(bool(torch.isfinite(v).all()) for v in state.values() if v.is_floating_point())
    return f"local-dir:{out}"


def measure(name: str) -> dict[str, float]:
    """Accuracy of the stored model on every demo set by the nearest class caption, averaged over all templates."""
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
        for split, drawn in demo.draw_demo().items():
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


def readme(out: Path, accuracy_of: dict[str, float]) -> None:
    """The model card."""
    table = "\n".join(f"| {split} | {100 * accuracy:.1f} |" for split, accuracy in accuracy_of.items())
    (out / "README.md").write_text(README.format(table=table))


README = """# The demo's teacher

A small CLIP-style model (open_clip; ModifiedResNet image tower for 32x32 pictures, two-layer text tower over ASCII codes), trained on
drawings of the train part of scikit-learn's handwritten digits in all the styles of the built-in demo. Made by

    python train/demo_teacher.py

Accuracy in percent by the nearest class caption (all templates averaged), classes restricted and mapped as each set asks:

| set | top-1 |
|---|---|
{table}

The weights are stored as float16 and computed with as float32. Digits: E. Alpaydin and C. Kaynak, Optical Recognition of
Handwritten Digits, UCI Machine Learning Repository, 1998 (CC BY 4.0). The weights are under the project's licence.
"""


if __name__ == "__main__":
    from jsonargparse import auto_cli

    main(auto_cli(Config, as_positional=False))
