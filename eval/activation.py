"""Feature visualisation: for each channel of a layer an image that excites it, found by gradient ascent on pixels.

The objective of an image is the mean of its channel's map at the layer; of a layer without maps, the unit itself. All
images of a batch are searched for at once, each for a channel of its own. In evaluation mode images do not depend on
each other, and Adam works on each number alone, so a batch makes the same images as one search after the other, up to
roundings. The model runs up to the layer and no further, and no gradient of a parameter is computed.

There are two searches:

    published   as the released code of Feature Contamination (ICML 2024, its Figure 6) has it. The variable t is the
                image normalised with ImageNet's constants, which the model then normalises again with its own. 10
                rounds, each with a fresh Adam (lr 0.05) of 200 steps, 260 in the last four rounds, minimise

                    -activation(t) + 0.01 ||t - 0.5||_2

                and a 5x5 box blur (borders reflected) lies between rounds. Pixels leave [0, 1].
    robust      pixels are sigmoid(D^T (s * z) D), D the orthonormal DCT and s falling as 1 / frequency: after Olah,
                Mordvintsev and Schubert (2017, Feature Visualization), who showed that steps in such a basis prevent
                the high-frequency patterns that steps on pixels run into, and that an image which has to excite the
                channel wherever it is shifted to does so too. 256 steps of Adam (lr 0.05) on z, each on another crop of
                a picture that is a sixteenth of its side larger all around, with activation as the only term. A pixel
                that nothing pulls at stays grey. Colours are those that the model sees, in [0, 1].

                A cosine basis and not Fourier's, because its pictures do not continue at the opposite border, and what
                a net expects at borders is of interest here. Their further step, a basis in which the colours of
                photographs are uncorrelated, is left out: it makes some hues easier to reach than others, and hue is
                what is measured.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attacks.pgd import Network, under_attack
from kernels.dct import idct
from models import ModelError
from train.common import step_seed

OUTPUT = "output"  # what the layer of the model's own output is called: logits of a classifier
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Count = Callable[[], None]


# ----------------------------------------------------------------------------------------------------------------------
# Layers
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A module whose output can be an objective.

    shape: of the output for one image: [C, H, W] maps, [T, C] tokens, or [C] units.
    """

    name: str
    module: nn.Module
    shape: tuple[int, ...]

    @property
    def channels(self) -> int:
        """The number of maps or units."""
        return self.shape[-1] if len(self.shape) == 2 else self.shape[0]


def find_layers(model: nn.Module, image: tuple[int, int, int]) -> dict[str, Layer]:
    """The layers of a model for images [C, S, S] in [0, 1], by name, in the order in which they run.

    Names are those of `named_modules`, without the `net.` or `tower.` under which classifiers and encoders keep the
    network. Not listed are modules that run more than once, such as torchvision's shared ReLUs: a name would not say
    which time is meant.
    """
    found: dict[nn.Module, Layer] = {}
    times: dict[nn.Module, int] = {}

    def noticing(name: str) -> Callable[[nn.Module, object, object], None]:
        def notice(module: nn.Module, inputs: object, output: object) -> None:
            times[module] = times.get(module, 0) + 1
            if isinstance(output, Tensor) and output.is_floating_point() and 2 <= output.ndim <= 4:
                found[module] = Layer(name, module, tuple(output.shape[1:]))

        return notice

    parameter = next(model.parameters(), torch.empty(0))
    with contextlib.ExitStack() as hooks:
        for name, module in model.named_modules():
            plain = name.removeprefix("net.").removeprefix("tower.") or OUTPUT
            hooks.callback(module.register_forward_hook(noticing(plain)).remove)
        network = hooks.enter_context(under_attack(model, parameter.device, fold=False))
        with torch.no_grad():
            network(torch.full((1, *image), 0.5, device=parameter.device, dtype=parameter.dtype))
    return {layer.name: layer for module, layer in found.items() if times[module] == 1}


def choose_layer(layers: dict[str, Layer], name: str) -> Layer:
    """The layer called `name`; "": the last convolution that runs, the one before the classifier.

    Raises:
        ModelError: there is none, naming those there are, the most alike first.
    """
    if not name:
        convolutions = [layer for layer in layers.values() if isinstance(layer.module, nn.Conv2d)]
        if not convolutions:
            raise ModelError(f"no convolution to choose; name a layer: {', '.join(layers)}")
        return convolutions[-1]
    if name in layers:
        return layers[name]
    close = difflib.get_close_matches(name, layers, n=5)
    others = [other for other in layers if other not in close]
    hint = f"did you mean {' or '.join(close)}? Others: " if close else "there are "
    raise ModelError(f"no layer {name} (or it runs more than once); {hint}{', '.join(others)}")


class _Reached(Exception):
    """The layer has run: the rest of the model need not."""

    def __init__(self, output: Tensor) -> None:
        self.output = output


class Objective:
    """Mean activation of a channel for each image, from the part of a model up to a layer."""

    def __init__(self, network: Network, layer: Layer, dtype: torch.dtype) -> None:
        """network: takes images of `dtype`, raises _Reached with the layer's output; `objective_of` makes it."""
        self.network, self.layer, self.dtype = network, layer, dtype

    def __call__(self, images: Tensor, channels: Tensor) -> Tensor:
        """Activations [B], in float32 at least, of images [B, C, S, S] at channels int64 [B]."""
        try:
            self.network(images)
        except _Reached as reached:
            output = reached.output
        else:
            raise ModelError(f"layer {self.layer.name} did not run")
        output = output if output.dtype == torch.float64 else output.float()
        maps = output.mT if output.ndim == 3 else output.reshape(*output.shape[:2], -1)  # [B, C, positions]
        return maps[torch.arange(len(images), device=images.device), channels].mean(1)


@contextlib.contextmanager
def objective_of(model: nn.Module, layer: Layer, device: torch.device, *, fold: bool) -> Iterator[Objective]:
    """The objective at a layer of a model on `device`, which is in evaluation mode meanwhile.

    fold: batch norms before the layer into their convolutions: a quarter faster, and equal up to rounding.

    The layer's `forward` ends the pass by an exception, and not a traced copy of the model (torchvision's feature
    extraction): that works with any code. For the time being it belongs to the instance, which attacks/folding.py takes
    as a reason to leave the layer and its batch norm as they are; a hook would see a folded convolution's output.
    """
    module, forward = layer.module, layer.module.forward
    own = vars(module).get("forward")
    dtype = next((weight.dtype for weight in model.parameters()), torch.float32)

    def end(*inputs: Tensor, **keywords: Tensor) -> NoReturn:
        raise _Reached(forward(*inputs, **keywords))

    try:
        module.forward = end  # type: ignore[method-assign]
        with under_attack(model, device, fold=fold) as network:
            yield Objective(network, layer, dtype)
    finally:
        del module.forward
        if own is not None:
            module.forward = own


# ----------------------------------------------------------------------------------------------------------------------
# Searches
# ----------------------------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """Images [B, C, S, S] and their activations [B] at the start and now, as the search measured them."""

    images: Tensor
    before: Tensor
    after: Tensor


@dataclass(frozen=True)
class Published:
    """The search of the released code. Defaults are its settings; see the top of the file."""

    # Adam's first steps of each round are as long for a gradient that is nearly 0 as for any other, and ReLUs have
    # kinks: roundings of a folded model moved one of the two golden images by 0.01.
    fold: ClassVar[bool] = False

    steps: int = 200  # of each round, in the later rounds 1.3 times as many
    rounds: int = 10
    lr: float = 0.05
    blur: int = 5  # pixels a side
    pull: float = 0.01  # weight of the distance to 0.5

    def steps_of(self, round_number: int) -> int:
        """Steps of a round, counted from 0: more of them after half of the rounds, of ten from number 6 on."""
        return int(self.steps * 1.3) if round_number > self.rounds / 2 else self.steps

    @property
    def total(self) -> int:
        """Steps of a search."""
        return sum(map(self.steps_of, range(self.rounds)))

    def start(self, size: tuple[int, int, int], generator: torch.Generator) -> Tensor:
        """Pixels [C, S, S] float64, of almost the same grey: uniform in [128/255, 148/255)."""
        return (torch.rand(size, generator=generator, dtype=torch.float64) * 20 + 128) / 255

    def __call__(self, objective: Objective, starts: Tensor, channels: Tensor, seed: int, count: Count) -> Found:
        """Unclipped pixels float64 [B, 3, S, S] from `starts`. Activations are those of t, normalised twice.

        ModelError: images that are not of three channels. seed: not used, nothing else is random.
        """
        if starts.shape[1] != 3:
            raise ModelError(
                "the published search normalises three colours with ImageNet's constants; use --preset robust"
            )
        mean, std = (
            torch.tensor(values, dtype=torch.float64, device=starts.device)[:, None, None]
            for values in (IMAGENET_MEAN, IMAGENET_STD)
        )
        images, first = starts.double(), None
        for number in range(self.rounds):
            if number:
                images = self._blurred(images)
            variable = ((images - mean) / std).to(objective.dtype).requires_grad_()
            optimiser = torch.optim.Adam([variable], lr=self.lr)
            for _ in range(self.steps_of(number)):
                activation = objective(variable, channels)
                first = activation.detach() if first is None else first
                distance = torch.linalg.vector_norm((variable - 0.5).flatten(1), dim=1)
                _step(optimiser, variable, self.pull * distance - activation)
                count()
            images = variable.detach().double() * std + mean
        with torch.no_grad():
            last = objective(variable, channels)
        return Found(images, last if first is None else first, last)

    def _blurred(self, images: Tensor) -> Tensor:
        edge = self.blur // 2
        return F.avg_pool2d(F.pad(images, (edge,) * 4, mode="reflect"), self.blur, stride=1)


@dataclass(frozen=True)
class Robust:
    """The search in a cosine basis with shifts; see the top of the file."""

    fold: ClassVar[bool] = True

    steps: int = 256
    lr: float = 0.05
    spread: float = 0.01  # standard deviation of the coefficients z at the start

    @property
    def total(self) -> int:
        """Steps of a search."""
        return self.steps

    def start(self, size: tuple[int, int, int], generator: torch.Generator) -> Tensor:
        """Coefficients z [C, S + 2j, S + 2j] float32 of a picture around an image [C, S, S]; j: largest shift."""
        side = size[1] + 2 * self.shift(size[1])
        return torch.randn((size[0], side, side), generator=generator) * self.spread

    @staticmethod
    def shift(size: int) -> int:
        """Largest shift, in pixels, of an image with `size` of them a side."""
        return max(1, size // 16)

    def __call__(self, objective: Objective, starts: Tensor, channels: Tensor, seed: int, count: Count) -> Found:
        """Pixels in [0, 1], [B, C, S, S], from coefficients `starts`: the middle of the pictures found.

        Shifts are drawn from `seed`, the same ones for all images: none depends on what it is searched with.
        """
        side = starts.shape[-1]
        size = next(size for size in range(side, 0, -1) if size + 2 * self.shift(size) == side)
        shift = self.shift(size)
        places = torch.arange(side, dtype=torch.float64)
        frequency = (places[:, None] ** 2 + places**2).sqrt().clamp(min=1)
        # A quarter: the same for all sizes, so that a coefficient of 1 at the lowest frequency is worth about a pixel's
        # whole range, whatever the size.
        scale = (side / 4 / frequency).to(starts.device, objective.dtype)

        def picture() -> Tensor:
            return torch.sigmoid(idct(variable * scale))

        def measured() -> Found:
            with torch.no_grad():
                images = picture()[..., shift : shift + size, shift : shift + size].contiguous()
                activation = objective(images, channels)
            return Found(images, activation, activation)

        variable = starts.to(scale.dtype).requires_grad_()
        optimiser = torch.optim.Adam([variable], lr=self.lr)
        generator = torch.Generator().manual_seed(step_seed(seed, -1, 0))
        offsets = torch.randint(0, 2 * shift + 1, (self.steps, 2), generator=generator).tolist()
        before = measured().before
        for top, left in offsets:
            crop = picture()[..., top : top + size, left : left + size]
            _step(optimiser, variable, -objective(crop, channels))
            count()
        return measured()._replace(before=before)


Search = Published | Robust
PRESETS: dict[str, type[Published] | type[Robust]] = {"robust": Robust, "published": Published}


def _step(optimiser: torch.optim.Adam, variable: Tensor, losses: Tensor) -> None:
    """One step of Adam on the losses [B]; the gradient of a parameter of the model is never asked for."""
    (variable.grad,) = torch.autograd.grad(losses.sum(), variable)
    optimiser.step()


def draw_starts(search: Search, size: tuple[int, int, int], items: Sequence[tuple[int, int]], seed: int) -> Tensor:
    """Where searches begin, [B, ...], for items (start, channel) and images of `size` [C, S, S].

    A start depends on (seed, start, channel) and the preset alone: two models with the same input begin alike, and it
    does not matter what else is searched for, where, or in batches of which size.
    """
    generators = (torch.Generator().manual_seed(step_seed(seed, start, channel)) for start, channel in items)
    return torch.stack([search.start(size, generator) for generator in generators])
