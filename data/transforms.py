"""Bytes to images: decoding by one RGB rule, the published train and eval transforms, and their randomness.

Every image leaves this module as uint8 RGB [3, H, W] in channels-last memory; conversion to float happens on the device
(`unit_interval`) and normalisation inside the model, so a batch crosses to the device at one byte a value.

Two decoders, chosen by name, each with its own resampler:

* ``pil``: Pillow decodes and resizes, bit for bit as in the published pipeline (Pillow and torchvision's transforms).
* ``torchvision`` (default): libjpeg-turbo through torchvision, then one antialiased bicubic resize of the uint8 crop.
  The decoded pixels equal Pillow's; the resize differs by one grey level here and there (16-bit weights).

What becomes of grey, transparent, 16-bit or animated images is the RGB rule of data/images.py, the same for both.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg

from data import DataError
from data.images import MAX_PIXELS, ImageError, check_pixels, first_line, open_rgb

__all__ = [
    "DECODERS",
    "MAX_PIXELS",
    "EvalTransform",
    "ImageError",
    "TrainTransform",
    "decode",
    "random_crop",
    "sample_random",
    "unit_interval",
]

DECODERS = ("torchvision", "pil")
# Beyond this aspect ratio the eval transform would resize a strip hundreds of times larger than the crop it keeps.
MAX_ASPECT = 16


def sample_random(seed: int, epoch: int, index: int) -> random.Random:
    """Return the generator of all augmentation of one sample in one epoch.

    The three numbers fill one integer of six 32-bit words without overlap, so two different triples start different
    generators. Raises ValueError unless 0 <= seed < 2**64, 0 <= epoch < 2**32 and 0 <= index < 2**64.
    """
    if not (0 <= seed < 2**64 and 0 <= epoch < 2**32 and 0 <= index < 2**64):
        raise ValueError(f"need 0 <= seed, index < 2**64 and 0 <= epoch < 2**32, got {seed}, {index} and {epoch}")
    # The leading 1 keeps the number of words fixed. Python's seeding repeats short keys and adds each word's position:
    # without the 1, (0, 0, 1) and (0, 2**32 - 1, 1) would start the same generator.
    return random.Random(1 << 160 | seed << 96 | epoch << 64 | index)


def decode(data: bytes, *, decoder: str = "torchvision", max_pixels: int = MAX_PIXELS) -> torch.Tensor:
    """Decode one image to uint8 RGB [3, H, W], channels-last, by the rule of data/images.py.

    Both decoders give the same pixels. The size is read from the header and checked before any pixel is decoded.
    Raises ImageError for anything that is not a complete image of at most `max_pixels` pixels.
    """
    jpeg = _jpeg_header(data) if decoder == "torchvision" else None
    if jpeg is None:
        pixels = torch.from_numpy(np.array(open_rgb(data, max_pixels)))
        return pixels.permute(2, 0, 1)
    check_pixels(*jpeg, max_pixels)
    try:
        # bytearray: torch warns about read-only buffers, and the copy takes 3 microseconds.
        return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
    except RuntimeError as error:
        raise ImageError(f"damaged JPEG: {first_line(error)}") from None


@dataclass(frozen=True)
class TrainTransform:
    """The published training transform: a random crop resized to a square (bicubic), then a random mirror image.

    size: side of the result in pixels. scale: range of the crop's share of the image area. ratio: range of its
    width / height. flip: probability of mirroring. Raises DataError for impossible settings.
    """

    size: int
    scale: tuple[float, float] = (0.9, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    decoder: str = "torchvision"
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        _check_settings(self.size, self.decoder, self.max_pixels)
        if not 0 < self.scale[0] <= self.scale[1] <= 1 or not 0 < self.ratio[0] <= self.ratio[1]:
            raise DataError(
                f"crop scale {self.scale} and ratio {self.ratio}: need 0 < low <= high, and scale at most 1"
            )
        if not 0 <= self.flip <= 1:
            raise DataError(f"flip {self.flip}: a probability lies between 0 and 1")

    def __call__(self, data: bytes, generator: random.Random) -> torch.Tensor:
        """Return uint8 [3, size, size] in channels-last memory; every draw comes from `generator`."""
        image = decode(data, decoder=self.decoder, max_pixels=self.max_pixels)
        top, left, height, width = random_crop(image.shape[1], image.shape[2], self.scale, self.ratio, generator)
        image = _resize(image[:, top : top + height, left : left + width], self.size, self.size, self.decoder)
        if generator.random() < self.flip:
            image = image.flip(2)
        return _channels_last(image)


@dataclass(frozen=True)
class EvalTransform:
    """The published evaluation transform: resize the short side to `size` (bicubic), keep the centre square.

    border: pixels cut from every edge first (ObjectNet's photographs carry a 2 px red frame). An image longer than 16:1
    is first cut to its central 16:1 part. Raises DataError for impossible settings.
    """

    size: int
    border: int = 0
    decoder: str = "torchvision"
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        _check_settings(self.size, self.decoder, self.max_pixels)
        if self.border < 0:
            raise DataError(f"border {self.border}: the number of pixels to cut must not be negative")

    def __call__(self, data: bytes, generator: random.Random) -> torch.Tensor:
        """Return uint8 [3, size, size] in channels-last memory; `generator` is not used, nothing here is random."""
        image = decode(data, decoder=self.decoder, max_pixels=self.max_pixels)
        height, width = image.shape[1] - 2 * self.border, image.shape[2] - 2 * self.border
        if height < 1 or width < 1:
            raise ImageError(f"{image.shape[2]}x{image.shape[1]} pixels leave nothing inside a border of {self.border}")
        image = image[:, self.border : self.border + height, self.border : self.border + width]
        short = min(height, width)
        image = _centre(image, min(height, MAX_ASPECT * short), min(width, MAX_ASPECT * short))
        height, width = image.shape[1:]
        # The long side rounds down, as in torchvision's Resize.
        image = _resize(image, int(self.size * height / short), int(self.size * width / short), self.decoder)
        return _channels_last(_centre(image, self.size, self.size))


def unit_interval(images: torch.Tensor) -> torch.Tensor:
    """Turn uint8 images [N, 3, H, W] into float32 in [0, 1] on their device and in their memory format."""
    if images.dtype != torch.uint8:
        raise TypeError(f"unit_interval takes uint8 images, got {images.dtype}")
    return images.to(torch.float32).div_(255)


def random_crop(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], generator: random.Random
) -> tuple[int, int, int, int]:
    """Draw (top, left, height, width) of a crop by the algorithm of torchvision's RandomResizedCrop.

    Area uniform in `scale`, aspect ratio log-uniform in `ratio`; ten tries to fit inside the image, then the largest
    central crop whose ratio is in range. Never empty.
    """
    for _ in range(10):
        area = height * width * generator.uniform(*scale)
        aspect = math.exp(generator.uniform(math.log(ratio[0]), math.log(ratio[1])))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top, left = generator.randint(0, height - crop_height), generator.randint(0, width - crop_width)
            return top, left, crop_height, crop_width
    crop_height, crop_width = height, width
    if width / height < ratio[0]:
        crop_height = max(1, round(width / ratio[0]))
    elif width / height > ratio[1]:
        crop_width = max(1, round(height * ratio[1]))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def _resize(image: torch.Tensor, height: int, width: int, decoder: str) -> torch.Tensor:
    """Resize uint8 [3, H, W] with an antialiased bicubic filter, by Pillow or by torch."""
    if image.shape[1:] == (height, width):
        return image
    if decoder == "pil":
        pixels = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
        resized = pixels.resize((width, height), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1)
    # The copy of the crop costs 0.02 ms and lets torch take its vectorised channels-last kernel, twice as fast.
    batch = image.unsqueeze(0).contiguous(memory_format=torch.channels_last)
    return F.interpolate(batch, size=(height, width), mode="bicubic", antialias=True).squeeze(0)


def _centre(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    # Half pixels round to even, as in torchvision's CenterCrop.
    top, left = round((image.shape[1] - height) / 2), round((image.shape[2] - width) / 2)
    return image[:, top : top + height, left : left + width]


def _channels_last(image: torch.Tensor) -> torch.Tensor:
    return image.permute(1, 2, 0).contiguous().permute(2, 0, 1)


def _jpeg_header(data: bytes) -> tuple[int, int] | None:
    """Return (height, width) of an 8-bit Huffman-coded JPEG with 1 or 3 components; None for all other bytes.

    Walks the marker segments up to the start of frame (ITU-T T.81, annex B); embedded thumbnails are inside segments.
    """
    if data[:3] != b"\xff\xd8\xff":
        return None
    position = 2
    while position + 10 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker in (0xC0, 0xC1, 0xC2):  # start of a baseline, extended or progressive frame
            height = int.from_bytes(data[position + 5 : position + 7])
            width = int.from_bytes(data[position + 7 : position + 9])
            plain = data[position + 4] == 8 and data[position + 9] in (1, 3) and height * width > 0
            return (height, width) if plain else None
        if marker == 0xFF:  # fill byte
            position += 1
        elif marker in (0xC4, 0xDB, 0xDD, 0xFE) or 0xE0 <= marker <= 0xEF:  # tables, comments, application data
            position += 2 + int.from_bytes(data[position + 2 : position + 4])
        else:
            return None
    return None


def _check_settings(size: int, decoder: str, max_pixels: int) -> None:
    if size < 1 or max_pixels < 1:
        raise DataError(f"size {size} and max_pixels {max_pixels} must be at least 1")
    if decoder not in DECODERS:
        raise DataError(f"decoder {decoder!r} is unknown: choose one of {', '.join(DECODERS)}")
