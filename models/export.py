"""Publish a student: a plain weight file, and open_clip's folder layout where it fits the teacher's text tower.

A distilled CLIP student lives in its teacher's embedding space, so with the teacher's text tower and temperature it is
a whole CLIP again: zero-shot works, and `open_clip.create_model_and_transforms("local-dir:FOLDER")` loads it. The text
tower comes from the teacher's weight file; nobody carries it through a training run.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from models import ModelError
from models.clip import CONFIG_FILE, OPENAI_MARKS, WEIGHT_FILES
from models.encoders import STUDENT_FILE, Encoder
from models.weights import misfit, read_weights, state_sha256, write_safetensors, write_text


def export_student(
    encoder: Encoder,
    folder: Path,
    *,
    card: Mapping[str, object],
    source: Encoder | None,
    origin: Literal["distilled", "fine-tuned", "interpolated"] = "distilled",
) -> list[str]:
    """Write `encoder` to `folder`: student.safetensors, README.md and, where possible, open_clip's two files.

    card: what README.md lists, in this order, for example teacher, data, losses, steps, hashes, commit. source: the
    teacher, or what a fine-tuned or interpolated encoder started from. origin: what README.md says of it.

    `load_encoder("local-dir:FOLDER")` reads the folder in either case. Each file is replaced as a whole; a
    configuration left by an earlier export is removed first, so the folder never joins old and new weights. Returns the
    reasons why open_clip's files were not written, empty where they were. Raises ModelError where nothing can be
    written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_FILE).unlink(missing_ok=True)
        (folder / WEIGHT_FILES[0]).unlink(missing_ok=True)
    except OSError as error:
        raise ModelError(f"cannot write to {folder}: {error.strerror or error}") from None
    state = encoder.tower.state_dict()
    write_safetensors(folder / STUDENT_FILE, state, _header(encoder))
    reasons = _write_open_clip(encoder, state, folder, source)
    write_text(folder / "README.md", _model_card(encoder, state, card, reasons, origin))
    return reasons


def _header(encoder: Encoder) -> dict[str, object]:
    """What `load_encoder` needs to build the student again."""
    header: dict[str, object] = {
        "name": _public_name(encoder),
        "mean": encoder.mean.flatten().tolist(),
        "std": encoder.std.flatten().tolist(),
        "image_size": encoder.image_size,
        "feature_dim": encoder.feature_dim,
    }
    if encoder.clip_config is not None:
        config = encoder.clip_config
        header["quick_gelu"] = bool(config.get("quick_gelu", False))
        header["clip_config"] = {key: config[key] for key in ("embed_dim", "vision_cfg", "quick_gelu") if key in config}
    return header


def _public_name(encoder: Encoder) -> str:
    """The architecture; of a folder on this machine only the library, since its path means nothing elsewhere."""
    return "open_clip" if encoder.architecture.startswith("local-dir:") else encoder.architecture


def _write_open_clip(encoder: Encoder, state: Mapping[str, Tensor], folder: Path, source: Encoder | None) -> list[str]:
    """Write open_clip's two files, or say why not."""
    own = encoder.clip_config
    if own is None:
        return [f"the student {encoder.architecture} is not an open_clip tower"]
    if source is None or source.clip_config is None:
        return ["the teacher is not an open_clip model, so there is no text tower"]
    if source.weights_file is None:
        return ["the teacher has random weights, so its text tower means nothing"]
    reasons = _obstacles(encoder.feature_dim, own, source.feature_dim, source.clip_config)
    if reasons:
        return reasons

    config = {**source.clip_config, "vision_cfg": {**own["vision_cfg"], "image_size": encoder.image_size}}
    whole = {f"visual.{name}": tensor for name, tensor in state.items()}
    for name, tensor in read_weights(source.weights_file).state.items():
        if not name.startswith("visual.") and name not in OPENAI_MARKS:
            whole[name] = tensor
    if len(whole) == len(state):
        return [f"the teacher's file {source.weights_file.name} holds no text tower"]
    problem = misfit(_skeleton(config), whole)
    if problem:
        return [f"image tower and the text tower of {source.weights_file.name} make no whole model: {problem}"]
    preprocess = {
        "size": encoder.image_size,
        "mode": "RGB",
        "mean": encoder.mean.flatten().tolist(),
        "std": encoder.std.flatten().tolist(),
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    write_safetensors(folder / WEIGHT_FILES[0], whole, {})
    write_text(folder / CONFIG_FILE, json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=2) + "\n")
    return []


def _obstacles(own_dim: int, own: Mapping[str, Any], teacher_dim: int, teacher: Mapping[str, Any]) -> list[str]:
    """Why a student of configuration `own` cannot take the text tower of `teacher`; empty where it can."""
    reasons = []
    if own_dim != teacher_dim:
        reasons.append(f"the student's embedding has {own_dim} dimensions, the teacher's {teacher_dim}")
    if "multimodal_cfg" in teacher or "hf_model_name" in teacher.get("text_cfg", {}):
        reasons.append("the teacher's text side is no plain open_clip text tower")
    # open_clip has one activation for both towers. A ResNet tower uses neither, so it takes the teacher's.
    activations = [bool(config.get("quick_gelu", False)) for config in (own, teacher)]
    if isinstance(own["vision_cfg"].get("layers"), int) and len(set(activations)) == 2:
        reasons.append(
            "of student and teacher's text tower one uses QuickGELU and one GELU; open_clip has one for both"
        )
    return reasons


def _skeleton(config: Mapping[str, Any]) -> nn.Module:
    """The whole CLIP of a configuration, without memory for its tensors."""
    import open_clip

    arguments = {key: copy.deepcopy(value) for key, value in config.items() if key != "custom_text"}
    with torch.device("meta"):
        return (open_clip.CustomTextCLIP if config.get("custom_text", False) else open_clip.CLIP)(**arguments)


def _model_card(
    encoder: Encoder, state: Mapping[str, Tensor], card: Mapping[str, object], reasons: list[str], origin: str
) -> str:
    source, story, learned = {
        "distilled": (
            "teacher",
            "An image encoder trained from the outputs of another one, its teacher.",
            "learned from the teacher's outputs on",
        ),
        "fine-tuned": (
            "original",
            "An image encoder trained further, together with a linear head, from another one, its original.",
            "the original's, trained further on",
        ),
        "interpolated": (
            "original",
            "The average of the weights of an image encoder, the original, and of what fine-tuning made of them.",
            "averaged from the original's and those that fine-tuning made of them on",
        ),
    }[origin]
    rows = {
        **card,
        "architecture": _public_name(encoder),
        "input": f"RGB in [0, 1], {encoder.image_size} pixels square: short side resized (bicubic), centre crop",
        "features": encoder.feature_dim,
        "parameters": sum(parameter.numel() for parameter in encoder.parameters()),
        "sha256 of the tensors": state_sha256(state),
    }
    table = "\n".join(f"| {key} | {_cell(value)} |" for key, value in rows.items())
    zero_shot = (
        "No open_clip folder was written: " + "; ".join(reasons) + "."
        if reasons
        else f"It is also a whole CLIP, with the {source}'s text tower and temperature:\n\n"
        '    model, _, preprocess = open_clip.create_model_and_transforms("local-dir:FOLDER")\n'
        "    model.eval()\n\n"
        f"Its text tower takes the tokens that the {source}'s took."
    )
    return f"""# {_public_name(encoder)}, {origin}

{story}

| | |
|---|---|
{table}

## Use

In a checkout of shiftlens:

    from models.encoders import load_encoder
    encoder = load_encoder("local-dir:FOLDER").eval()  # takes images in [0, 1], owns its normalisation

{zero_shot}

## Licence

These weights were {learned} the data named above. Read the licences of both before you
publish or sell anything made with them; this project's own licence covers its code only.
"""


def _cell(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text.replace("|", "\\|").replace("\n", " ")
