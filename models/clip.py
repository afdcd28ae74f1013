"""CLIP image towers by open_clip's architecture names, local folders and hub repositories.

Only the image tower is kept, with its projection. What an export of a student needs from the text tower is read again
from the teacher's weight file then (`models.export`), not carried through a training run.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models import ModelError
from models.download import hub_file
from models.towers import Tower, is_file, require_source, stated_size, statistics, unknown
from models.weights import Weights, first_line, load_into, read_weights

log = logging.getLogger(__name__)

CONFIG_FILE = "open_clip_config.json"
WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
# State dicts of OpenAI's release carry these beside the weights, open_clip's do not.
OPENAI_MARKS = frozenset({"input_resolution", "context_length", "vocab_size"})


def open_clip_tower(name: str, architecture: str, source: str, weights: bool) -> Tower:
    """open_clip's `architecture`; `source` is a pretrained tag, a file, or empty."""
    import open_clip

    config = open_clip.get_model_config(architecture)
    if config is None:
        raise unknown(name, "open_clip has no architecture", architecture, open_clip.list_models(), "open_clip:")
    require_source(name, source, weights)
    preprocess: Mapping[str, Any] = _usual_statistics(name, architecture)
    loaded = None
    if is_file(source):
        loaded = read_weights(source)
        preprocess = {**_usual_statistics(name, architecture), **loaded.metadata}
        _settle_activation(name, config, loaded)
        if "mean" not in preprocess:
            log.info("%s: normalised as OpenAI's CLIP, the file states nothing else (a local-dir folder can)", name)
    elif source:
        preprocess = open_clip.get_pretrained_cfg(architecture, source)
        if not preprocess:
            tags = open_clip.list_pretrained_tags_by_model(architecture)
            raise unknown(
                name, f"open_clip has no weights for {architecture} tagged", source, tags, f"open_clip:{architecture}/"
            )
        # open_clip only warns where a tag's weights were trained with the other activation than the architecture's.
        if preprocess.get("quick_gelu", False):
            _set_quick_gelu(name, config, True, f"tag {source}")
        if weights:
            repository, file = os.path.split(preprocess["hf_hub"])
            loaded = read_weights(hub_file(repository, (file,) if file else WEIGHT_FILES, name))
    return clip_tower(f"open_clip:{architecture}", config, preprocess, loaded if weights else None)


def folder_tower(name: str, folder: Path, weights: bool) -> Tower:
    """A folder in open_clip's `local-dir` layout: its configuration and, where `weights`, one of `WEIGHT_FILES`."""
    config, preprocess = _read_config(folder / CONFIG_FILE)
    file = next((folder / file for file in WEIGHT_FILES if (folder / file).is_file()), None)
    if weights and file is None:
        raise ModelError(f"{name}: {folder} holds none of {', '.join(WEIGHT_FILES)}")
    return clip_tower(name, config, preprocess, read_weights(file) if weights and file else None)


def hub_tower(name: str, repository: str, weights: bool) -> Tower:
    """A repository of the Hugging Face hub in open_clip's layout."""
    config, preprocess = _read_config(hub_file(repository, (CONFIG_FILE,), name))
    return clip_tower(
        name, config, preprocess, read_weights(hub_file(repository, WEIGHT_FILES, name)) if weights else None
    )


def _read_config(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Model and preprocessing configuration of an open_clip_config.json."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"cannot read {file}: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("model_cfg"), dict):
        raise ModelError(f"{file} has no 'model_cfg' object; expected open_clip's configuration")
    preprocess = content.get("preprocess_cfg") or {}
    if not isinstance(preprocess, dict):
        raise ModelError(f"{file}: 'preprocess_cfg' is no object")
    return content["model_cfg"], preprocess


def clip_tower(
    architecture: str, config: dict[str, Any], preprocess: Mapping[str, Any], loaded: Weights | None
) -> Tower:
    """The image tower of open_clip's model configuration `config`, with the weights `loaded` where given.

    preprocess: "mean" and "std" of pixels in [0, 1]; open_clip's defaults are OpenAI's. `loaded` holds a whole CLIP
    (`visual.*`) or the tower alone. Raises ModelError where open_clip cannot build it or the weights do not fit.
    """
    import open_clip

    try:
        vision = {**config["vision_cfg"], "timm_model_pretrained": False, "output_tokens": False}
        # The public constructor builds both towers: the text tower is made as small as it can be, and let go.
        no_text = {"context_length": 1, "vocab_size": 1, "width": 1, "heads": 1, "layers": 1}
        quick_gelu = bool(config.get("quick_gelu", False))
        module = open_clip.CLIP(config["embed_dim"], vision, no_text, quick_gelu=quick_gelu).visual
    # Whatever a configuration from outside makes the constructors raise, it is the configuration that is wrong.
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ModelError(f"{architecture}: open_clip cannot build this configuration ({reason})") from None
    size = vision.get("image_size", open_clip.CLIPVisionCfg.image_size)
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise ModelError(f"{architecture}: takes images of {height}x{width} pixels; only square ones are supported")
    if loaded is not None:
        image_part = {
            key.removeprefix("visual."): value for key, value in loaded.state.items() if key.startswith("visual.")
        }
        load_into(module, image_part or loaded.state, loaded.file)
    mean = statistics(preprocess, "mean", open_clip.OPENAI_DATASET_MEAN, architecture)
    std = statistics(preprocess, "std", open_clip.OPENAI_DATASET_STD, architecture)
    file = loaded.file if loaded else None
    if loaded is not None:
        height = stated_size(loaded.metadata, height, loaded.file)
    return Tower(module, architecture, height, config["embed_dim"], mean, std, config, file)


def _usual_statistics(name: str, architecture: str) -> dict[str, Any]:
    """Mean and std that all of open_clip's published weights of an architecture share (SigLIP's are not OpenAI's)."""
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(architecture)
    stated = [open_clip.get_pretrained_cfg(architecture, tag) for tag in tags]
    pairs = {tuple(tuple(cfg.get(key) or ()) for key in ("mean", "std")) for cfg in stated}
    if len(pairs) > 1:
        log.warning("%s: published weights of this architecture differ in normalisation; taking OpenAI's", name)
    if len(pairs) != 1 or not all(next(iter(pairs))):
        return {}
    mean, std = next(iter(pairs))
    return {"mean": mean, "std": std}


def _settle_activation(name: str, config: dict[str, Any], loaded: Weights) -> None:
    """Choose GELU or QuickGELU for a bare weight file: both fit its tensors, only one gives its features."""
    if "quick_gelu" in loaded.metadata:
        _set_quick_gelu(name, config, bool(loaded.metadata["quick_gelu"]), "the file's header")
    elif loaded.research_prefix:
        _set_quick_gelu(
            name, config, True, "tensors 'model.visual.*' are of the feature-contamination code, on OpenAI's CLIP"
        )
    elif loaded.state.keys() & OPENAI_MARKS:
        _set_quick_gelu(name, config, True, f"{', '.join(sorted(OPENAI_MARKS))} beside the weights are OpenAI's format")
    elif all(key.startswith("visual.") for key in loaded.state):
        # A guess: open_clip itself never writes an image tower alone. A local-dir folder states the activation instead.
        _set_quick_gelu(
            name, config, True, "'visual.*' without a text tower is taken for OpenAI's; use local-dir to choose"
        )
    elif isinstance(config["vision_cfg"].get("layers"), int):
        log.warning(
            "%s: built with %s, as the architecture says; OpenAI's weights need its -quickgelu form, or local-dir",
            name,
            "QuickGELU" if config.get("quick_gelu", False) else "GELU",
        )


def _set_quick_gelu(name: str, config: dict[str, Any], quick_gelu: bool, reason: str) -> None:
    changed = quick_gelu != bool(config.get("quick_gelu", False))
    config["quick_gelu"] = quick_gelu
    if changed and isinstance(
        config["vision_cfg"].get("layers"), int
    ):  # ResNet towers have no GELU, there is nothing to say
        log.warning("%s: built with %s (%s)", name, "QuickGELU" if quick_gelu else "GELU", reason)
