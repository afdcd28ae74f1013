"""Frequencies of images: the orthonormal DCT over the last two axes, its inverse, the frequency flip and filters.

    dct   X[k, l] = a_k a_l Σ_mn x[m, n] cos(π(2m+1)k/2H) cos(π(2n+1)l/2W),  a_0 = √(1/N), else √(2/N): X = D_H x D_Wᵀ
    idct  its transpose (DCT-III), which is its inverse, as D is orthogonal
    flip  T x = F_H x F_W with F = Dᵀ J D: J puts the coefficients of an axis in reverse order, so that low frequencies
          become high ones. T is symmetric and orthogonal, T(T x) = x: perturbations keep their L2 norm, but flipped
          images leave the box [0, 1]
    low_pass   keeps the coefficients [:b, :b]      P_H x P_W with P = D[:b]ᵀ D[:b]
    high_pass  keeps the coefficients [-b:, -b:]    the same with D[-b:]
    cut        removes [:b, :b]                     x - low_pass(x); high_pass is less: it removes the other corners too

Each is one pair of matrix products (2·values·(H + W) operations) with matrices that are made once for each size, type
and device, in float64. None of it is a Triton kernel: the vendor's products are as good. The file lives here, on the
lowest floor, because attacks, data and models, which do not import each other, all need the same map.

Source: Ortiz-Jimenez et al. 2020, "Hold me tight!" (arXiv:2002.06349); goldens `dct`. The released filters count the
mask's two axes from the front, so on a batch [N, C, H, W] they filter channels and vertical frequencies, and keep all
horizontal ones; that is how the published low-pass CIFAR-10 was made. `published=True` repeats it, and that a high-pass
of bandwidth 0 is the identity there (the slice -0:). Otherwise bandwidth 0 keeps nothing and one beyond the size all.

Any leading axes; differentiable; the input is never changed, the result is contiguous. Products are in float32, also
under autocast, or float64 (bfloat16 and float16 are converted, and rounded once to their own type). On a GPU they obey
`torch.backends.cuda.matmul.allow_tf32`, which PyTorch leaves off: with it on, T(T x) = x holds to about 1e-3 only.
"""

from __future__ import annotations

import functools
import math
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["dct", "flip", "low", "high", "all"]


def dct(images: Tensor) -> Tensor:
    """Coefficients [..., H, W] of images [..., H, W]; frequency 0 first. ValueError: see `low_pass`."""
    height, width = _matrices(images, "dct")
    return _product(height, images, width.mT)


def idct(coefficients: Tensor) -> Tensor:
    """Images [..., H, W] with these coefficients [..., H, W]. ValueError: see `low_pass`."""
    height, width = _matrices(coefficients, "dct")
    return _product(height.mT, coefficients, width)


def flip(images: Tensor) -> Tensor:
    """Images [..., H, W] with the frequencies of both axes in reverse order; its own inverse and its own transpose.

    ValueError: see `low_pass`.
    """
    height, width = _matrices(images, "flip")
    return _product(height, images, width)


def low_pass(images: Tensor, bandwidth: int, *, published: bool = False) -> Tensor:
    """What images [..., H, W] have in their lowest `bandwidth` frequencies of both axes.

    Args:
        images: of any floating type.
        bandwidth: 0 keeps nothing, H and W or more everything.
        published: the released code's filter; see above. It differs on batches [N, C, H, W], and knows no more axes.

    Raises:
        ValueError: fewer than two axes, no floating type, a negative bandwidth, published with more than four axes.
    """
    return _filter(images, "low", bandwidth, published)


def high_pass(images: Tensor, bandwidth: int, *, published: bool = False) -> Tensor:
    """What images [..., H, W] have in their highest `bandwidth` frequencies of both axes; see `low_pass`."""
    if published and bandwidth == 0:
        bandwidth = max(images.shape)
    return _filter(images, "high", bandwidth, published)


def cut(images: Tensor, bandwidth: int, *, published: bool = False) -> Tensor:
    """Images [..., H, W] without what `low_pass` keeps."""
    return images - _filter(images, "low", bandwidth, published)


def _filter(images: Tensor, kind: Kind, bandwidth: int, published: bool) -> Tensor:
    if bandwidth < 0:
        raise ValueError(f"bandwidth must be at least 0, not {bandwidth}")
    if published and images.ndim > 4:
        raise ValueError(f"published filters take [H, W], [C, H, W] or [N, C, H, W], not {tuple(images.shape)}")
    height, width = _matrices(images, kind, bandwidth)
    if not (published and images.ndim == 4):
        return _product(height, images, width)
    filtered = _product(height, images, _matrices(images, "all")[1])
    channel = torch.arange(images.shape[1], device=images.device)
    kept = channel < bandwidth if kind == "low" else channel >= images.shape[1] - bandwidth
    return filtered * kept[:, None, None]


def _matrices(images: Tensor, kind: Kind, bandwidth: int = 0) -> tuple[Tensor, Tensor]:
    """[H, H] and [W, W] for images [..., H, W], in the type of the products."""
    if images.ndim < 2 or not images.is_floating_point():
        raise ValueError(f"images {tuple(images.shape)} {images.dtype} must be [..., H, W] of a floating type")
    compute = torch.float64 if images.dtype == torch.float64 else torch.float32
    make = _matrix if torch.compiler.is_compiling() else _kept  # compiled code makes its own: compilers see no cache
    height, width = (make(kind, size, min(bandwidth, size), compute, images.device) for size in images.shape[-2:])
    return height, width


def _product(left: Tensor, images: Tensor, right: Tensor) -> Tensor:
    with torch.autocast(images.device.type, enabled=False):
        return torch.matmul(left, images.to(left.dtype) @ right).to(images.dtype)


def _matrix(kind: Kind, size: int, bandwidth: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A matrix of the formulas above [size, size]; `all` is the identity."""
    count = max(size, 1)
    frequency = torch.arange(size, device=device if torch.compiler.is_compiling() else "cpu")
    angle = (2 * frequency + 1) * frequency[:, None] % (4 * count)  # whole turns taken off before anything is rounded
    basis = torch.cos(angle.double() * (math.pi / (2 * count))) * math.sqrt(2 / count)
    basis = torch.cat([basis[:1] * math.sqrt(0.5), basis[1:]])
    if kind == "flip":
        basis = basis.mT @ basis.flip(0)
    elif kind in ("low", "high"):
        kept = basis[:bandwidth] if kind == "low" else basis[size - bandwidth :]
        basis = kept.mT @ kept
    elif kind == "all":
        basis = torch.eye(size)
    return basis.to(device, dtype)


@functools.lru_cache(maxsize=256)
def _kept(kind: Kind, size: int, bandwidth: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():  # one made in inference mode could not serve autograd later
        return _matrix(kind, size, bandwidth, dtype, device)
