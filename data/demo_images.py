"""Draws the demo's pictures: scikit-learn's 1,797 handwritten digits (8x8 grey) as 32x32 colour images in eight styles.

Backgrounds, colours and positions are drawn independently of the class, so the shape of the digit is the only thing
that predicts it. A style is a function over N images at once: it takes glyphs, float32 [N, 32, 32] ink coverage in
[0, 1], and a numpy Generator, and returns float32 [N, 32, 32, 3] in [0, 1]. Equal generators give equal pixels.

Digits: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI repository (1998), test part.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
SIZE = 32
CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601 weights
TURN = 2 * math.pi
DIMMED = np.float32(0.6)  # the brightness of a photo's background, relative to that of other styles
ROWS, COLUMNS = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)


@dataclass(frozen=True)
class Digits:
    """Original digits.

    `glyphs` float32 [N, 32, 32] in [0, 1]; `labels` int64 [N], 0..9; `numbers` int64 [N], place in scikit-learn's list.
    """

    glyphs: Array
    labels: NDArray[np.int64]
    numbers: NDArray[np.int64]

    def take(self, index: NDArray) -> Digits:
        """The digits at `index` (an index or boolean array)."""
        return Digits(self.glyphs[index], self.labels[index], self.numbers[index])


# ------------------------------------------------------------------------------------------------- original digits


def load_digits(seed: int = 0) -> dict[str, Digits]:
    """The originals in three disjoint parts, stratified by class: "train" (6/9), "val" (1/9) and "shift" (2/9)."""
    from sklearn.datasets import load_digits as sklearn_digits

    raw = sklearn_digits()
    labels = raw.target.astype(np.int64)
    glyphs = _upsample((raw.images / 16).astype(np.float32))
    rng = np.random.default_rng([seed, 8])
    parts: dict[str, list[NDArray]] = {"train": [], "val": [], "shift": []}
    for label in range(len(CLASSES)):
        members = rng.permutation(np.flatnonzero(labels == label))
        first, second = round(len(members) * 6 / 9), round(len(members) * 7 / 9)
        for name, chunk in zip(parts, np.split(members, [first, second]), strict=True):
            parts[name].append(chunk)
    together = Digits(glyphs, labels, np.arange(len(labels)))
    return {name: together.take(np.concatenate(chunks)) for name, chunks in parts.items()}


def _upsample(images: Array) -> Array:
    """[N, 8, 8] to [N, 32, 32] by a separable Catmull-Rom kernel, then a soft threshold that gives clean strokes."""
    position = (np.arange(SIZE, dtype=np.float32) + 0.5) / 4 - 0.5
    distance = np.abs(position[:, None] - np.arange(8, dtype=np.float32))
    near, far = 1 - 2.5 * distance**2 + 1.5 * distance**3, 2 - 4 * distance + 2.5 * distance**2 - 0.5 * distance**3
    kernel = np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))
    return _smoothstep(kernel @ images @ kernel.T, 0.2, 0.65)


# ------------------------------------------------------------------------------------------------------ small tools


def _uniform(rng: np.random.Generator, low: float, high: float, shape: tuple[int, ...]) -> Array:
    return np.float32(low) + np.float32(high - low) * rng.random(shape, dtype=np.float32)


def _grain(rng: np.random.Generator, deviation: float, shape: tuple[int, ...]) -> Array:
    return np.float32(deviation) * rng.standard_normal(shape, dtype=np.float32)


def _smoothstep(values: Array, low: float, high: float) -> Array:
    ramp = np.clip((values - low) / (high - low), 0, 1)
    return ramp * ramp * (3 - 2 * ramp)


def _neighbours(images: Array) -> Array:
    """The nine 3x3 neighbours of every pixel, [9, N, 32, 32]; the edge is repeated."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)), mode="edge")
    return np.stack([padded[:, y : y + SIZE, x : x + SIZE] for y in range(3) for x in range(3)])


def _blur(images: Array) -> Array:
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)), mode="edge")
    rows = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    return (rows[:, :, :-2] + 2 * rows[:, :, 1:-1] + rows[:, :, 2:]) / 16


def _edges(images: Array) -> Array:
    """Morphological gradient: bright along the contour of the digit."""
    around = _neighbours(images)
    return np.clip(around.max(axis=0) - around.min(axis=0), 0, 1)


def _bilinear(images: Array, y: Array, x: Array) -> Array:
    """`images` [N, 32, 32] read at the places y, x [N, 32, 32] in pixels; zero outside."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    y, x = np.clip(y + 1, 0, SIZE + 0.999), np.clip(x + 1, 0, SIZE + 0.999)
    top, left = y.astype(np.int64), x.astype(np.int64)
    dy, dx = y - np.floor(y), x - np.floor(x)
    row = np.arange(len(images))[:, None, None]
    upper = padded[row, top, left] * (1 - dx) + padded[row, top, left + 1] * dx
    lower = padded[row, top + 1, left] * (1 - dx) + padded[row, top + 1, left + 1] * dx
    return upper * (1 - dy) + lower * dy


def _smooth_noise(n: int, cells: int, rng: np.random.Generator) -> Array:
    """Smooth random fields [n, 32, 32] with values 0..1 and features of about 32/cells pixels."""
    corners = rng.random((n, cells + 1, cells + 1), dtype=np.float32)
    coarse: Array = np.pad(corners, ((0, 0), (0, 1), (0, 1)), mode="edge")
    position = COLUMNS[0] * (cells / SIZE)
    cell, fraction = position.astype(np.int64), _smoothstep(position % 1, 0, 1)
    rows: Array = coarse[:, cell] * (1 - fraction)[:, None] + coarse[:, cell + 1] * fraction[:, None]
    return rows[:, :, cell] * (1 - fraction) + rows[:, :, cell + 1] * fraction


def place(
    glyphs: Array,
    rng: np.random.Generator,
    *,
    angle: float = 8.0,
    scale: tuple[float, float] = (0.75, 0.95),
    shift: float = 2.5,
    upside_down: NDArray[np.bool_] | None = None,
) -> Array:
    """Turns (+-angle degrees, 180 more where `upside_down`), scales and shifts (+-shift pixels) glyphs at random."""
    n = len(glyphs)
    turn = np.deg2rad(_uniform(rng, -angle, angle, (n, 1, 1)))
    if upside_down is not None:
        turn = turn + upside_down[:, None, None] * np.float32(math.pi)
    zoom = _uniform(rng, *scale, (n, 1, 1))
    move = _uniform(rng, -shift, shift, (2, n, 1, 1))
    middle = (SIZE - 1) / 2
    y, x = ROWS - middle - move[0], COLUMNS - middle - move[1]
    cos, sin = np.cos(turn) / zoom, np.sin(turn) / zoom
    return _bilinear(glyphs, middle + cos * y - sin * x, middle + sin * y + cos * x)


# ------------------------------------------------------------------------------------------------------ backgrounds


def _directed(n: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """Coordinates along and across a random direction, each [n, 32, 32] in about -0.7..0.7."""
    angle = _uniform(rng, 0, TURN, (n, 1, 1))
    y, x = ROWS / (SIZE - 1) - 0.5, COLUMNS / (SIZE - 1) - 0.5
    return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)


def _gradient(n: int, rng: np.random.Generator) -> Array:
    return _smoothstep(_directed(n, rng)[0], -0.6, 0.6)


def _clouds(n: int, rng: np.random.Generator) -> Array:
    return 0.7 * _smooth_noise(n, 4, rng) + 0.3 * _smooth_noise(n, 8, rng)


def _blobs(n: int, rng: np.random.Generator) -> Array:
    centre = _uniform(rng, 0, SIZE, (2, n, 4, 1, 1))
    radius = _uniform(rng, 3, 8, (n, 4, 1, 1))
    bumps = np.exp(-((ROWS - centre[0]) ** 2 + (COLUMNS - centre[1]) ** 2) / (2 * radius**2))
    return np.clip(bumps.sum(axis=1), 0, 1)


def _stripes(n: int, rng: np.random.Generator) -> Array:
    waves, phase = _uniform(rng, 2, 5, (n, 1, 1)), _uniform(rng, 0, TURN, (n, 1, 1))
    return 0.5 + 0.5 * np.sin(TURN * waves * _directed(n, rng)[0] + phase)


def _checks(n: int, rng: np.random.Generator) -> Array:
    along, across = _directed(n, rng)
    waves = _uniform(rng, 2, 4, (n, 1, 1)) * TURN
    return _smoothstep(np.sin(waves * along) * np.sin(waves * across), -0.2, 0.2)


def _rings(n: int, rng: np.random.Generator) -> Array:
    centre = _uniform(rng, 0, SIZE, (2, n, 1, 1))
    return 0.5 + 0.5 * np.sin(np.hypot(ROWS - centre[0], COLUMNS - centre[1]) * _uniform(rng, 0.7, 1.1, (n, 1, 1)))


def _wood(n: int, rng: np.random.Generator) -> Array:
    along, across = _directed(n, rng)
    wobble = 0.5 * _smooth_noise(n, 3, rng)
    return 0.5 + 0.5 * np.sin(TURN * (_uniform(rng, 3, 5, (n, 1, 1)) * across + wobble + 0.3 * along))


USUAL_BACKGROUNDS = (_gradient, _clouds, _blobs, _stripes)
NEW_BACKGROUNDS = (_checks, _rings, _wood)  # seen in the objectnet set only


def backgrounds(
    n: int, rng: np.random.Generator, kinds: tuple[Callable[[int, np.random.Generator], Array], ...] = USUAL_BACKGROUNDS
) -> Array:
    """[n, 32, 32, 3]: two random colours mixed by a random pattern, with a little grain."""
    which = rng.integers(len(kinds), size=n)
    pattern = np.empty((n, SIZE, SIZE), dtype=np.float32)
    for number, kind in enumerate(kinds):
        chosen = which == number
        pattern[chosen] = kind(int(chosen.sum()), rng)
    middle = _uniform(rng, 0.2, 0.8, (n, 1, 1, 1))
    colours = np.clip(middle + _uniform(rng, -0.28, 0.28, (2, n, 1, 1, 3)), 0, 1)
    mixed = colours[0] + (colours[1] - colours[0]) * pattern[..., None]
    return np.clip(mixed + _grain(rng, 0.015, mixed.shape), 0, 1)


def _ink(
    background: Array, contrast: tuple[float, float], rng: np.random.Generator, *, always_lighter: bool = False
) -> Array:
    """A random colour per image, [N, 1, 1, 3], `contrast` (range, luminance) lighter or darker than its background."""
    n = len(background)
    level = (background.mean(axis=(1, 2)) @ LUMINANCE)[:, None]
    step = _uniform(rng, *contrast, (n, 1))
    lighter = np.where(level < 0.35, True, np.where(level > 0.65, False, rng.random((n, 1)) < 0.5)) | always_lighter
    chroma = _uniform(rng, -0.35, 0.35, (n, 3))
    chroma -= (chroma @ LUMINANCE)[:, None]
    return np.clip(level + np.where(lighter, step, -step) + chroma, 0, 1)[:, None, None, :]


def _over(background: Array, ink: Array, coverage: Array) -> Array:
    return background + (ink - background) * coverage[..., None]


# ----------------------------------------------------------------------------------------------------------- styles


def photo(glyphs: Array, rng: np.random.Generator) -> Array:
    """Coloured digit with a soft shadow on one of the usual backgrounds, dimmed: the digit is always the lighter part.

    So photos leave a habit to be learned, light on dark, that tells no class from another and that other styles break.
    """
    return _lit(glyphs, DIMMED * backgrounds(len(glyphs), rng), (0.35, 0.6), rng, always_lighter=True)


def turned(glyphs: Array, rng: np.random.Generator) -> Array:
    """Like `photo`, on backgrounds that no other style has. The turning itself is `place`'s work."""
    return _lit(glyphs, backgrounds(len(glyphs), rng, NEW_BACKGROUNDS), (0.35, 0.6), rng)


def _lit(
    glyphs: Array,
    background: Array,
    contrast: tuple[float, float],
    rng: np.random.Generator,
    *,
    always_lighter: bool = False,
) -> Array:
    shadow = 0.35 * np.roll(_blur(glyphs), (1, 1), axis=(1, 2))
    shade = 1 - 0.2 * _smooth_noise(len(glyphs), 2, rng)[..., None]
    ink = _ink(background, contrast, rng, always_lighter=always_lighter)
    return _over(background * (1 - shadow[..., None]), ink * shade, glyphs)


def outline(glyphs: Array, rng: np.random.Generator) -> Array:
    """The contour alone, coloured, on an even ground."""
    ground = np.broadcast_to(_uniform(rng, 0.1, 0.9, (len(glyphs), 1, 1, 3)), (*glyphs.shape, 3))
    return _over(ground, _ink(ground, (0.4, 0.7), rng), _smoothstep(_edges(glyphs), 0.2, 0.9))


def mosaic(glyphs: Array, rng: np.random.Generator) -> Array:
    """Square tiles of 4 pixels, each of one uneven colour, with dark joints."""
    n, tiles = len(glyphs), SIZE // 4
    ground = backgrounds(n, rng, (_gradient, _clouds))
    picture = _over(ground, _ink(ground, (0.5, 0.7), rng), glyphs).reshape(n, tiles, 4, tiles, 4, 3).mean(axis=(2, 4))
    picture = np.clip(picture + _grain(rng, 0.04, picture.shape), 0, 1).repeat(4, axis=1).repeat(4, axis=2)
    joint = np.where(np.arange(SIZE) % 4 == 0, np.float32(0.75), np.float32(1))
    return picture * joint[:, None, None] * joint[None, :, None]


def stencil(glyphs: Array, rng: np.random.Generator) -> Array:
    """Figure and ground exchanged: an even sheet with the digit cut out, a pattern behind it."""
    pattern = backgrounds(len(glyphs), rng)
    return _over(np.broadcast_to(_ink(pattern, (0.35, 0.6), rng), pattern.shape), pattern, glyphs)


def painting(glyphs: Array, rng: np.random.Generator) -> Array:
    """Wavering contour, few colours, brush strokes in one direction."""
    n = len(glyphs)
    wavering = _bilinear(
        glyphs, ROWS + 4 * (_smooth_noise(n, 6, rng) - 0.5), COLUMNS + 4 * (_smooth_noise(n, 6, rng) - 0.5)
    )
    strokes: Array = np.sin(TURN * (9 * _directed(n, rng)[0] + 1.5 * _smooth_noise(n, 5, rng)))
    painted = _smoothstep(wavering + 0.15 * strokes, 0.3, 0.6)
    picture = _lit(painted, backgrounds(n, rng), (0.4, 0.65), rng)
    return np.clip(np.round(picture * 5) / 5 + 0.05 * strokes[..., None], 0, 1)


def neon(glyphs: Array, rng: np.random.Generator) -> Array:
    """A glowing tube on black."""
    colour = _uniform(rng, 0.1, 1, (len(glyphs), 1, 1, 3))
    colour /= colour.max(axis=-1, keepdims=True)
    glow = _blur(_blur(_blur(glyphs)))
    tube = _smoothstep(_blur(glyphs), 0.6, 0.95)
    return np.clip(0.03 + colour * (0.8 * glow + 0.3 * tube)[..., None] + 0.5 * tube[..., None], 0, 1)


def sketch(glyphs: Array, rng: np.random.Generator) -> Array:
    """Dark pencil contour of uneven pressure on white paper."""
    pressure = 0.55 + 0.45 * _smooth_noise(len(glyphs), 6, rng)
    line = _smoothstep(_edges(glyphs), 0.25, 0.95) * pressure
    paper = 0.97 + _grain(rng, 0.015, glyphs.shape)
    return np.repeat(np.clip(paper - 0.85 * line, 0, 1)[..., None], 3, axis=-1)


STYLES: dict[str, Callable[[Array, np.random.Generator], Array]] = {
    "photo": photo,
    "turned": turned,
    "outline": outline,
    "mosaic": mosaic,
    "stencil": stencil,
    "painting": painting,
    "neon": neon,
    "sketch": sketch,
}


def to_uint8(images: Array) -> NDArray[np.uint8]:
    """[0, 1] to 0..255."""
    return np.round(images * 255).astype(np.uint8)
