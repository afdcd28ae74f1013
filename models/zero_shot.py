"""Linear heads from the text tower of a CLIP: a class is the mean direction of captions that name it.

    encoder = load_encoder("open_clip:RN50/openai")
    texts = load_text_encoder(encoder)
    weight = zero_shot_head(texts, [["a photo of a tench.", "a drawing of a tench."], ["a photo of a goldfish.", ...]])
    save_head(path, weight, None, ["tench", "goldfish"], normalize=True)

Source: Radford et al. 2021, Learning transferable visual models from natural language supervision, §3.1.4 (ensembles of
prompts over the embedding space).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import ModelError
from models.clip import OPENAI_MARKS
from models.encoders import Encoder
from models.weights import first_line, load_into, read_weights

Tokenizer = Callable[[list[str]], Tensor]


class TextEncoder(nn.Module):
    """Captions to embeddings in the space of an image tower's features, not divided by their norm.

    Attributes:
        name: the encoder's that it belongs to.
        tower: open_clip's model without its image tower; `tower.logit_scale` is the logarithm of the factor of cosines.
        tokenizer: N captions to int64 [N, context_length].
    """

    def __init__(self, name: str, tower: nn.Module, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.name, self.tower, self.tokenizer = name, tower, tokenizer

    def forward(self, captions: Sequence[str]) -> Tensor:
        """Embeddings [N, D] on the tower's device.

        open_clip's tokenizers cut captions that are too long. Raises ModelError for captions that the tokenizer refuses
        and for tokens that the tower does not have.
        """
        tower: Any = self.tower
        try:
            tokens = self.tokenizer(list(captions))
        except ValueError as error:
            raise ModelError(f"{self.name}: {first_line(error)}") from None
        if tokens.shape != (len(captions), tower.context_length):
            raise ModelError(
                f"{self.name}: takes {tower.context_length} tokens a caption, the tokenizer gives {list(tokens.shape)} "
                f"for {len(captions)} captions; is it another model's?"
            )
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < tower.vocab_size:
            raise ModelError(
                f"{self.name}: has tokens 0 to {tower.vocab_size - 1}, the tokenizer gives {int(tokens.min())} to "
                f"{int(tokens.max())}; is it another model's?"
            )
        return tower.encode_text(tokens.to(tower.logit_scale.device))


def load_text_encoder(encoder: Encoder, tokenizer: Tokenizer | None = None) -> TextEncoder:
    """The text tower trained with the image tower `encoder`: in evaluation mode, without gradients, on the CPU.

    It is read again from the encoder's weight file. `tokenizer` None takes the one that open_clip names for the model.

    Raises ModelError: not a CLIP, random weights, a file of the image tower alone, a text tower that is not open_clip's
    own (CoCa's, or one of the package transformers), a tokenizer that cannot be had.
    """
    name, config, file = encoder.name, encoder.clip_config, encoder.weights_file
    if config is None:
        raise ModelError(f"{name}: has no text tower; zero-shot heads need a CLIP (open_clip:, local-dir:, hf-hub:)")
    if file is None:
        raise ModelError(f"{name}: has random weights, a zero-shot head of it means nothing; name its weights")
    if not isinstance(config.get("text_cfg"), dict):
        raise ModelError(f"{name}: {file} is an image tower alone; use the model that it was distilled from")
    if "multimodal_cfg" in config or "hf_model_name" in config["text_cfg"]:
        raise ModelError(f"{name}: its text side is not open_clip's own text tower, which is all that is supported")
    state = {
        key: value
        for key, value in read_weights(file).state.items()
        if not key.startswith("visual.") and key not in OPENAI_MARKS
    }
    if "logit_scale" not in state:
        raise ModelError(f"{name}: {file} holds no text tower; name a file of the whole CLIP")
    tower = _build(name, config)
    load_into(tower, state, file)
    return TextEncoder(name, tower.eval().requires_grad_(False), tokenizer or _own_tokenizer(encoder))


def _build(name: str, config: dict[str, Any]) -> nn.Module:
    """open_clip's model of a configuration without the image tower."""
    import open_clip

    arguments = {key: copy.deepcopy(value) for key, value in config.items() if key != "custom_text"}
    # The public constructors build both towers: the image tower is made as small as it can be, and let go.
    arguments["vision_cfg"] = {"image_size": 1, "patch_size": 1, "width": 1, "head_width": 1, "layers": 1}
    build = open_clip.CustomTextCLIP if config.get("custom_text", False) else open_clip.CLIP
    try:
        tower = build(**arguments)
    # Whatever a configuration from outside makes the constructors raise, it is the configuration that is wrong.
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ModelError(f"{name}: open_clip cannot build the text tower of this configuration ({reason})") from None
    del tower.visual
    return tower


def _own_tokenizer(encoder: Encoder) -> Tokenizer:
    """The tokenizer that open_clip's tables, or the configuration in the model's folder, name."""
    import open_clip

    identifier = encoder.architecture.removeprefix("open_clip:")
    if identifier.startswith("local-dir:") and encoder.weights_file:
        identifier = f"local-dir:{encoder.weights_file.parent}"  # a ~ in the name is expanded there
    try:
        return open_clip.get_tokenizer(identifier)
    # Files from a hub, a package that is not installed, a configuration from outside: anything can be raised.
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ModelError(f"{encoder.name}: open_clip cannot make its tokenizer ({reason})") from None


@torch.no_grad()
def zero_shot_head(
    text_encoder: TextEncoder,
    captions: Sequence[Sequence[str]],
    *,
    batch_size: int = 256,
    advance: Callable[[int], object] = lambda done: None,
) -> Tensor:
    """Weights [C, D] (float32, CPU) of a head on features divided by their norm: logits are scaled cosines.

    Each caption's embedding is divided by its L2 norm, a class's mean of them too, and multiplied by exp(logit_scale).
    Held in memory are the embeddings of one batch and one sum for each class.

    Args:
        text_encoder: in evaluation mode.
        captions: for each of C classes one or more captions [C][T].
        batch_size: captions at a time.
        advance: called with the number of captions of each batch that is done.

    Raises ValueError for a class without captions or a batch of none, ModelError as `TextEncoder`.
    """
    if not captions or not all(captions) or batch_size < 1:
        raise ValueError(f"{batch_size} captions at a time of {len(captions)} classes; each needs one at least")
    class_of = torch.arange(len(captions)).repeat_interleave(torch.tensor([len(own) for own in captions]))
    flat = [caption for own in captions for caption in own]
    sums: Tensor | None = None
    for start in range(0, len(flat), batch_size):
        embeddings = text_encoder(flat[start : start + batch_size])
        # Summed in float64, and on the CPU in a fixed order: the batch size leaves no trace in float32.
        directions = F.normalize(embeddings.double().cpu(), dim=1)
        if sums is None:
            sums = directions.new_zeros(len(captions), directions.shape[1])
        sums.index_add_(0, class_of[start : start + batch_size], directions)
        advance(len(directions))
    assert sums is not None, "there are captions"
    tower: Any = text_encoder.tower
    return (F.normalize(sums, dim=1) * tower.logit_scale.double().cpu().exp()).float()
