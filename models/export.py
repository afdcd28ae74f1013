"""Publish a student: a plain weight file, and open_clip's folder layout where the student can speak the teacher's language.

A distilled CLIP student lives in its teacher's embedding space, so with the teacher's text tower and temperature it is a whole
CLIP again: zero-shot works, and `open_clip.create_model_and_transforms("local-dir:FOLDER")` loads it. The text tower comes
from the teacher's weight file; nobody carries it through a training run.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models import ModelError
from models.clip import CONFIG_FILE, WEIGHT_FILES
from models.encoders import STUDENT_FILE, Encoder
from models.weights import read_weights, state_sha256, write_safetensors, write_text


def export_student(encoder: Encoder, folder: Path, *, card: Mapping[str, object], source: Encoder | None) -> list[str]:
    """Write `encoder` to `folder`: student.safetensors, README.md and, where possible, open_clip's configuration and weights.

    card: what README.md lists, in this order, for example teacher, data, losses, steps, hashes, commit. source: the teacher.
    `load_encoder("local-dir:FOLDER")` reads the folder in either case. Each file is replaced as a whole; a configuration left by
    an earlier export is removed first, so the folder never joins old and new weights.
    Returns the reasons why open_clip's files were not written, empty where they were. Raises ModelError where nothing can be written.
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
    write_text(folder / "README.md", _model_card(encoder, state, card, reasons))
    return reasons


def _header(encoder: Encoder) -> dict[str, object]:
    """What `load_encoder` needs to build the student again."""
    header: dict[str, object] = {
        "name": encoder.architecture,
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


def _write_open_clip(encoder: Encoder, state: Mapping[str, Tensor], folder: Path, source: Encoder | None) -> list[str]:
    """Write open_clip's two files, or say why not."""
    reasons = _obstacles(encoder, source)
    if reasons:
        return reasons
    assert source is not None and source.clip_config is not None and encoder.clip_config is not None
    assert source.weights_file is not None
    text = {name: tensor for name, tensor in read_weights(source.weights_file).state.items() if not name.startswith("visual.")}
    config = copy.deepcopy(source.clip_config)
    config["vision_cfg"] = encoder.clip_config["vision_cfg"]
    whole = {**{f"visual.{name}": tensor for name, tensor in state.items()}, **text}
    misfit = _misfit(config, whole)
    if misfit:
        return [f"the text tower in {source.weights_file.name} does not fit the teacher's configuration: {misfit}"]

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


def _obstacles(encoder: Encoder, source: Encoder | None) -> list[str]:
    """Why the student and the teacher's text tower make no CLIP; empty where they do."""
    if encoder.clip_config is None:
        return [f"the student {encoder.architecture} is not an open_clip tower"]
    if source is None or source.clip_config is None:
        return ["the teacher is not an open_clip model, so there is no text tower"]
    reasons = []
    if source.weights_file is None:
        reasons.append("the teacher has random weights, so its text tower means nothing")
    if encoder.feature_dim != source.feature_dim:
        reasons.append(f"the student's embedding has {encoder.feature_dim} dimensions, the teacher's {source.feature_dim}")
    if "multimodal_cfg" in source.clip_config:
        reasons.append("the teacher is a CoCa model, whose captioner belongs to its own image tower")
    # open_clip has one activation for both towers. A ResNet tower uses neither, so it takes the teacher's.
    own, theirs = (bool(config.get("quick_gelu", False)) for config in (encoder.clip_config, source.clip_config))
    if isinstance(encoder.clip_config["vision_cfg"].get("layers"), int) and own != theirs:
        reasons.append(f"quick_gelu is {own} for the student and {theirs} for the teacher's text tower; open_clip has one for both")
    return reasons


def _misfit(config: dict[str, Any], whole: Mapping[str, Tensor]) -> str:
    """First difference between the tensors of a whole CLIP and those its configuration asks for; empty where there is none."""
    import open_clip

    plain = {key: value for key, value in config.items() if key != "custom_text"}
    custom = config.get("custom_text", False) or "hf_model_name" in config["text_cfg"]
    with torch.device("meta"):  # shapes only: no memory, no random numbers
        model = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**copy.deepcopy(plain))
    ...


def _model_card(encoder: Encoder, state: Mapping[str, Tensor], card: Mapping[str, object], reasons: list[str]) -> str:
    parameters = sum(parameter.numel() for parameter in encoder.parameters())
    rows = {
        **card,
        "architecture": encoder.architecture,
        "images": f"RGB in [0, 1], {encoder.image_size} x {encoder.image_size} pixels, resized by the short side (bicubic) and cropped",
        "features": encoder.feature_dim,
        "parameters": parameters,
        "sha256 of the image tower's tensors": state_sha256(state),
    }
    ...
