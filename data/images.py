"""Bytes to RGB pixels by one rule, with Pillow alone: what packing and both decoders of data/transforms.py share.

The rule: the first frame; grey, palette, CMYK and 1-bit images as Pillow's ``convert("RGB")``, alpha dropped; 16-bit
grey keeps its high byte (Pillow would clip it to white); EXIF is never applied: nothing is rotated.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

from data import DataError

# 67 million pixels, 200 MB decoded. Pillow itself refuses more than 179 million, whatever limit is asked for.
MAX_PIXELS = 2**26
# A named list keeps Pillow's other plug-ins away from hostile bytes; its EPS reader, for one, starts Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


class ImageError(DataError):
    """Bytes that are no image, a damaged one, or one larger than the limit."""


def open_rgb(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode one image with Pillow to mode RGB by the rule at the top of this file; raises ImageError."""
    if not data:
        raise ImageError("no bytes")
    try:
        with warnings.catch_warnings():
            # Pillow warns of large images, odd metadata, palettes with alpha; the limit and the rule decide those here.
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            check_pixels(image.height, image.width, max_pixels)
            return _high_byte(image) if image.mode.startswith(("I", "F")) else image.convert("RGB")
    except (ImageError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise ImageError(f"not an image (starts with {bytes(data[:12])!r})") from None
    except Exception as error:  # whatever the format's parser trips over: OSError, struct.error, IndexError, ...
        raise ImageError(f"damaged image: {type(error).__name__}: {first_line(error)}") from None


def check_pixels(height: int, width: int, max_pixels: int) -> None:
    """Raise ImageError for an image larger than the limit."""
    if height * width > max_pixels:
        raise ImageError(f"{width}x{height} pixels, more than the limit of {max_pixels}")


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, at most 200 characters."""
    return (str(error).splitlines() or ["no details"])[0][:200]


def _high_byte(image: Image.Image) -> Image.Image:
    """Turn 16-bit grey (Pillow's modes I;16*, or I when the file is a PGM) into RGB by its high byte."""
    values = np.asarray(image)
    if image.mode == "F" or values.size and (values.min() < 0 or values.max() > 0xFFFF):
        raise ImageError(f"pixels of mode {image.mode} outside 0..65535 or fractional: no rule to make them 8-bit")
    return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
