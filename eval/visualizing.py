"""Feature visualisation timed beside the published loop: what `eval/throughput.py visualize` runs.

Apart from the script, which only reads the command line and has other measurements. These take part, by turns within
each round, each with a number of channels of the network's last convolution:

    one by one          the released code of Feature Contamination, written out here operation by operation: one channel
                        after the other, the whole network, gradients of weights too
    ours, published     the same schedule of 2,240 steps (eval/activation.py), all channels at once
    ours, robust        the default: its 256 steps, all channels at once

after a check that the first two make the same image. What is reported is the time until the images of all channels are
there. The default's whole search is timed. The published schedule is timed in a `share`-th of its steps, and one by one
for a single channel, because a search takes three quarters of an hour in that way; all of its steps cost the same, and
so do its channels, so that the time is multiplied. Weights are random unless a file is named: speed depends on shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from data import DataError
from eval.certifying import NormalizeLayer
from eval.turns import ratio, report, run_measurement, seconds_row, speed_up_row, take_turns

if TYPE_CHECKING:
    from torch import Tensor

    from eval.activation import Layer, Published, Search
    from models.classifiers import Classifier

ONE_BY_ONE, PUBLISHED, ROBUST = "one by one", "ours, published", "ours, robust"
MUST = 10.0  # lower bound of the time one by one over ours
ALIKE = 0.01  # by how much a pixel of the image may differ after the steps of the check


@dataclass(frozen=True)
class Config:
    """What to measure; `eval/throughput.py visualize --help` says it in words."""

    device: str = "cuda"
    model: str = "cifar_resnet20"
    channels: int = 64
    share: int = 10
    steps: int = 256
    rounds: int = 3
    rows: str = "runs/benchmarks.jsonl"


class Original:
    """`FilterVisualizer` of the original code, with the arguments of its call, on the last convolution."""

    def __init__(self, classifier: Classifier, layer: Layer) -> None:
        self.normalize = NormalizeLayer(classifier.mean.flatten(), classifier.std.flatten())
        self.net, self.layer = classifier.net, layer

    def visualize(self, channel: int, start: Tensor, search: Published) -> Tensor:
        """The image float64 [3, S, S] of one channel, from pixels [3, S, S], by the schedule of `search`."""
        import torch

        from eval.activation import IMAGENET_MEAN, IMAGENET_STD

        kept: list[Tensor] = []
        hook = self.layer.module.register_forward_hook(lambda module, inputs, output: kept.append(output))
        mean, std = (
            torch.tensor(values, dtype=torch.float64, device=start.device)[:, None, None]
            for values in (IMAGENET_MEAN, IMAGENET_STD)
        )
        image = start.double()
        try:
            for number in range(search.rounds):
                variable = ((image - mean) / std).float()[None].requires_grad_()
                optimiser = torch.optim.Adam([variable], lr=search.lr)
                for _ in range(search.steps_of(number)):
                    kept.clear()
                    optimiser.zero_grad()
                    self.net(self.normalize(variable))
                    loss = -kept[0][0, channel].mean() + search.pull * torch.norm(variable - 0.5)
                    loss.backward()
                    optimiser.step()
                found = variable.detach()[0].double() * std + mean
                edge = search.blur // 2
                padded = torch.nn.functional.pad(found[None], (edge,) * 4, mode="reflect")
                image = torch.nn.functional.avg_pool2d(padded, search.blur, stride=1)[0]
        finally:
            hook.remove()
        return found


def main(config: Config) -> list[dict[str, Any]]:
    """Runs the measurement, prints it, writes rows and returns them.

    Raises DataError without the device, for a path that cannot be written, for more channels than the layer has, and
    where the images differ; ModelError for a network that cannot be had.
    """
    rows = run_measurement(config, measure)
    report(f"{config.model}, {config.channels} channels of {rows[0]['layer']}", rows)
    return rows


def check(original: Original, ours: Callable[[Search, int], Tensor], start: Tensor) -> None:
    """Raises DataError unless the published schedule, shortened, makes one image in both ways."""
    from eval.activation import Published

    short = Published(steps=2, rounds=2)
    apart = float((original.visualize(0, start, short) - ours(short, 1)[0]).abs().max())
    if not apart <= ALIKE:
        raise DataError(f"the images differ by {apart:.2g} in a pixel: not timed")


def measure(config: Config) -> list[dict[str, Any]]:
    """Times of everybody by turns, ratios within rounds: rows without provenance."""
    import torch

    from eval.activation import Published, Robust, choose_layer, draw_starts, find_layers, objective_of
    from models.classifiers import load_classifier

    where = torch.device(config.device)
    torch.manual_seed(0)
    classifier = load_classifier(config.model, weights="/" in config.model or config.model.startswith("local-dir:")).to(
        where
    )
    size = (classifier.channels, classifier.image_size, classifier.image_size)
    layer = choose_layer(find_layers(classifier, size), "")
    if config.channels > layer.channels:
        raise DataError(f"{config.channels} channels: {layer.name} of {config.model} has {layer.channels}")
    if size[0] != 3:
        raise DataError(f"{config.model} takes grey images; the published search is for colours")
    original = Original(classifier, layer)

    def ours(search: Search, channels: int) -> Tensor:
        starts = draw_starts(search, size, [(0, channel) for channel in range(channels)], 0).to(where)
        with objective_of(classifier, layer, where, fold=search.fold) as objective:
            return search(objective, starts, torch.arange(channels, device=where), 0, lambda: None).images

    published = Published()
    start = published.start(size, torch.Generator().manual_seed(0)).to(where)
    check(original, ours, draw_starts(published, size, [(0, 0)], 0)[0].to(where))
    shorter = Published(steps=max(1, published.steps // config.share))
    fewer = Published(steps=max(1, shorter.steps // 10))  # of all channels, which takes as long as a search of few
    ways: dict[str, tuple[Callable[[], object], float]] = {  # what is timed, and how often it has to be done
        ONE_BY_ONE: (partial(original.visualize, 0, start, shorter), config.channels * published.total / shorter.total),
        PUBLISHED: (partial(ours, fewer, config.channels), published.total / fewer.total),
        ROBUST: (partial(ours, Robust(steps=config.steps), config.channels), 1.0),
    }
    for way, _ in (ways[ONE_BY_ONE], ways[PUBLISHED]):  # warms caches and allocators
        way()
    seconds = take_turns({name: way for name, (way, _) in ways.items()}, config.rounds, config.device)
    seconds = {name: [once * ways[name][1] for once in found] for name, found in seconds.items()}
    common = {
        "model": config.model,
        "layer": layer.name,
        "channels": config.channels,
        "clock": "cpu" if config.device == "cpu" else "wall",
    }
    metric = "seconds for the images of all channels"
    rows = [
        {**seconds_row(metric, seconds[name], name), "multiplied": multiplied} for name, (_, multiplied) in ways.items()
    ]
    for name in (PUBLISHED, ROBUST):
        rows.append(speed_up_row(ratio(seconds[ONE_BY_ONE], seconds[name]), name, ONE_BY_ONE, MUST))
    return [{**row, **common} for row in rows]
