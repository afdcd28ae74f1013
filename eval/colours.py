"""Colours of visualised channels: how far those of one network lie toward a colour, against those of another.

The question is Feature Contamination's (ICML 2024, Figure 6): a network was trained on images that were padded by a
colour P which says nothing about the label, another one on the same images without it; did P enter the features? There
the answer was to look. Here it is a number, of which these are the definitions.

Colours are compared in the chromatic plane of CIELAB (D65), (a*, b*), whose unit is about a just noticeable difference
and whose origin is every grey. So the start of a search, which is grey, and pixels that a channel does not care about
count 0, and being dark does not count as being brick red, which it would in RGB. With x_ck(p) the pixel p of the image
found for channel c from start k, and R a set of pixels:

    chroma    v_c   = mean over starts k and pixels p in R of (a*, b*)(x_ck(p))
    shift     s_c   = <v_c, u>,  u = (a*, b*)(P) / ||(a*, b*)(P)||          in units of CIELAB, positive: toward P
    angle     h_c   = angle between v_c and u                               0 to 180 degrees of hue

    colour_shift(R)       mean of s_c over the channels of the first network - the same of the second
    border_minus_centre   colour_shift(border) - colour_shift(centre): padding is seen at borders. The border is the
                          eighth of the image's side along each edge, the centre all of the rest
    nearer_in_hue         share of the pairs of a channel of the first network and one of the second in which h_c of the
                          first is smaller; 0.5 = no difference. Channels of two networks are not paired with each other

Each has a bootstrap interval of 95 % (percentiles of 2,000 resamples), for which the channels of both networks are
drawn with replacement, independently. Starts are averaged first, so they make a channel's colour more exact and do not
count as more channels; the number that each start gives by itself is reported too.

What the interval says is how far the numbers of these two networks depend on which channels they happen to have. It
says nothing about a third network trained from another seed: for that, train several of each kind, and compare two of
the same kind as a control, whose interval should hold 0.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
REGIONS = ("whole", "border", "centre")
RESAMPLES = 2000
GREY = 5.0  # chroma below which a colour has no hue to speak of, in units of CIELAB

# Linear sRGB to CIE XYZ (IEC 61966-2-1), divided by the white point, so that white is (1, 1, 1).
_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
_XYZ_OF_WHITE = _XYZ.sum(1)


def lab(rgb: NDArray[Any]) -> Array:
    """CIELAB (L*, a*, b*) [..., 3] of sRGB colours [..., 3] in [0, 1]; what lies beyond is clipped."""
    rgb = np.clip(np.asarray(rgb, dtype=np.float64), 0, 1)
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = linear @ _XYZ.T / _XYZ_OF_WHITE
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz * (29 / 6) ** 2 / 3 + 4 / 29)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)


def chroma_of(colour: Sequence[int]) -> Array:
    """(a*, b*) of a colour of three integers in 0..255. Raises ValueError for a grey, which has no direction."""
    if len(colour) != 3 or not all(0 <= value <= 255 for value in colour):
        raise ValueError(f"a colour has three values in 0..255, not {list(colour)}")
    chroma = lab(np.asarray(colour) / 255)[1:]
    if np.hypot(*chroma) < GREY:
        raise ValueError(f"the colour {list(colour)} is grey: there is no direction of hue to move in")
    return chroma


def chroma(images: NDArray[Any]) -> Array:
    """Mean (a*, b*) of images [..., 3, S, S] in [0, 1] in each of REGIONS: [..., 3, 2]."""
    size = images.shape[-1]
    edge = max(1, size // 8)
    inside = np.zeros((size, size), dtype=bool)
    inside[edge:-edge, edge:-edge] = True
    planes = lab(np.moveaxis(images, -3, -1))[..., 1:]
    return np.stack([planes[..., where, :].mean(-2) for where in (np.full_like(inside, True), ~inside, inside)], -2)


@dataclass(frozen=True)
class Number:
    """A number with its interval of 95 %; by_start: the same from each start alone."""

    metric: str
    value: float
    low: float
    high: float
    by_start: tuple[float, ...]

    def row(self) -> dict[str, Any]:
        """The fields of a result."""
        return {
            "metric": self.metric,
            "value": self.value,
            "interval": [self.low, self.high],
            "by_start": list(self.by_start),
        }


def own_shift(chromas: Array, colour: Sequence[int], seed: int) -> Number:
    """Mean shift s_c of one network's channels over the whole image; arguments as of `compare`."""
    shifts = chromas[:, :, 0] @ _toward(colour)
    weights = _resamples(np.random.default_rng(seed), shifts.shape[1])
    low, high = _interval(weights @ shifts.mean(0))
    return Number("shift", float(shifts.mean()), low, high, tuple(shifts.mean(1).tolist()))


def compare(first: Array, second: Array, colour: Sequence[int], seed: int) -> list[Number]:
    """The numbers of two networks: colour_shift_REGION, border_minus_centre, nearer_in_hue; see the top of the file.

    Args:
        first, second: what `chroma` gives for images [starts, channels, 3, S, S]: [starts, channels, 3, 2], from as
            many starts, but of any number of channels.
        colour: P, three integers in 0..255.
        seed: of the resamples.

    Raises:
        ValueError: P is grey.
    """
    toward = _toward(colour)
    generator = np.random.default_rng(seed)
    weights = [_resamples(generator, chromas.shape[1]) for chromas in (first, second)]
    shifts = [chromas @ toward for chromas in (first, second)]
    values = {f"colour_shift_{region}": [of[..., place] for of in shifts] for place, region in enumerate(REGIONS)}
    values["border_minus_centre"] = [of[..., 1] - of[..., 2] for of in shifts]
    numbers = [
        Number(
            metric,
            float(a.mean() - b.mean()),
            *_interval(weights[0] @ a.mean(0) - weights[1] @ b.mean(0)),
            tuple((a.mean(1) - b.mean(1)).tolist()),
        )
        for metric, (a, b) in values.items()
    ]
    pairs = _pairs(first.mean(0), second.mean(0), toward)
    resampled = np.einsum("rj,rj->r", weights[0] @ pairs, weights[1])
    by_start = tuple(float(_pairs(a, b, toward).mean()) for a, b in zip(first, second, strict=True))
    return [*numbers, Number("nearer_in_hue", float(pairs.mean()), *_interval(resampled), by_start)]


def _toward(colour: Sequence[int]) -> Array:
    """u, the direction of a colour in the chromatic plane."""
    chroma = chroma_of(colour)
    return chroma / np.hypot(*chroma)


def _resamples(generator: np.random.Generator, count: int) -> Array:
    """The share that each of `count` channels has of each resample: [RESAMPLES, count]."""
    return generator.multinomial(count, np.full(count, 1 / count), RESAMPLES) / count


def _interval(values: Array) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def _pairs(first: Array, second: Array, toward: Array) -> Array:
    """[first, second], from chromas [channels, 3, 2]: 1 where the first is nearer in hue, one half where both are."""
    a, b = (_angle(chromas[:, 0], toward) for chromas in (first, second))
    return (a[:, None] < b) + 0.5 * (a[:, None] == b)


def _angle(chromas: Array, toward: Array) -> Array:
    """Degrees [...] between chromas [..., 2] and a direction; 90 for an exact grey, which has no hue."""
    length = np.hypot(chromas[..., 0], chromas[..., 1])
    cosine = np.divide(chromas @ toward, length, out=np.zeros_like(length), where=length > 0)
    return np.degrees(np.arccos(np.clip(cosine, -1, 1)))


# ----------------------------------------------------------------------------------------------------------------------
# Pictures
# ----------------------------------------------------------------------------------------------------------------------


def draw_sheet(
    file: Path, images: NDArray[Any], numbers: Sequence[int], title: str, colour: Sequence[int] | None = None
) -> None:
    """A contact sheet as PNG: images [K, C, S, S] in [0, 1], C 1 or 3 in the order RGB, with their channels' numbers.

    Small images are enlarged by a whole number, so that pixels stay pixels. colour: a patch of it beside the title.
    Raises OSError.
    """
    from PIL import Image, ImageDraw, ImageFont

    images = np.round(np.clip(images, 0, 1) * 255).astype(np.uint8)
    if images.shape[1] == 1:
        images = images.repeat(3, axis=1)
    zoom = max(1, 96 // images.shape[-1])
    side, gap, line = images.shape[-1] * zoom, 6, 18
    columns = min(len(images), max(4, math.ceil(math.sqrt(len(images)))))
    rows = -(-len(images) // columns)
    height = 2 * line + rows * (side + line) + gap
    sheet = Image.new("RGB", (max(gap + columns * (side + gap), 420), height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    draw.text((gap, 8), title, fill="black", font=font)
    if colour is not None:
        left = gap + round(draw.textlength(title, font=font)) + 12
        draw.rectangle((left, 8, left + 40, 8 + line), fill=tuple(colour))
    for place, (image, number) in enumerate(zip(images, numbers, strict=True)):
        row, column = divmod(place, columns)
        left, top = gap + column * (side + gap), 2 * line + row * (side + line)
        draw.text((left, top), str(number), fill="black", font=font)
        picture = Image.fromarray(np.ascontiguousarray(np.moveaxis(image, 0, -1)))
        sheet.paste(picture.resize((side, side), Image.Resampling.NEAREST), (left, top + line))
    _replace(file, lambda temporary: sheet.save(temporary, "PNG"))


def draw_colours(file: Path, networks: Mapping[str, Array], colour: Sequence[int]) -> None:
    """Channels of one or two networks in the chromatic plane as PNG, with the direction of a colour.

    networks: by name, what `chroma` gives, [starts, channels, 3, 2]; starts are averaged. Raises OSError.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context({"text.parse_math": False}):
        figure, axes = pyplot.subplots(figsize=(5.6, 5.4), layout="constrained")
        axes.axhline(0, color="#cccccc", linewidth=0.8, zorder=0)
        axes.axvline(0, color="#cccccc", linewidth=0.8, zorder=0)
        for (name, chromas), (mark, edge) in zip(networks.items(), (("o", "#D55E00"), ("s", "#0072B2")), strict=False):
            points = chromas[:, :, 0].mean(0)
            centre = points.mean(0)
            axes.scatter(
                points[:, 0],
                points[:, 1],
                s=26,
                marker=mark,
                facecolors="none",
                edgecolors=edge,
                linewidths=1,
                label=name,
            )
            axes.scatter(
                centre[0], centre[1], s=130, marker=mark, color=edge, edgecolors="black", label=f"{name}, mean"
            )
        limit = 1.1 * max(GREY, *(float(np.abs(chromas[:, :, 0].mean(0)).max()) for chromas in networks.values()))
        end = 0.9 * limit * _toward(colour)
        axes.annotate(
            "", (end[0], end[1]), (0, 0), arrowprops={"arrowstyle": "-|>", "color": np.asarray(colour) / 255, "lw": 3}
        )
        axes.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
        axes.set(xlabel="a*  (green to red)", ylabel="b*  (blue to yellow)")
        axes.set_title(f"mean colour of each channel; arrow: hue of {','.join(map(str, colour))}", fontsize=10)
        axes.legend(fontsize=8, loc="best")
        try:
            _replace(file, lambda temporary: figure.savefig(temporary, dpi=150, format="png"))
        finally:
            pyplot.close(figure)


def _replace(file: Path, write: Callable[[Path], object]) -> None:
    """The file is whole, or the old one."""
    temporary = file.with_name(f".tmp-{file.name}")
    write(temporary)
    os.replace(temporary, file)
