"""Projection + distillation loss: how far a student's features are from a teacher's.

    p = features · weightᵀ + bias            (skipped when weight is None)         δ = ∂row/∂p
    mse        row = mean over D_t of (p - t)²                                     2 (p - t) / D_t
    smooth_l1  row = mean over D_t of d²/2β where |d| < β, else |d| - β/2          clamp(d / β, -1, 1) / D_t
    cosine     row = 1 - p·t / (a b), a = max(‖p‖, 1e-8), b = max(‖t‖, 1e-8)       (cos · p / ‖p‖ - t / b) / a
    kl         row = T² KL(softmax(t / T) ‖ softmax(p / T))                        T (softmax(p / T) - softmax(t / T))

    loss = Σ w_r row_r / Σ w_r  dp = δ w_r / Σ w_r  dfeatures = dp · weight  dweight = dpᵀ · features  dbias = Σ_r dp

mse over all elements is the published loss (Feature Contamination, ICML 2024); cosine follows torch's epsilon rule; kl
is Hinton et al. 2015, whose T² keeps gradients of one size at every T. A mean over nothing is 0 with zero gradients.

Shapes: features [..., D_s], weight [D_t, D_s], bias [D_t], target [..., D_t] with equal leading shapes; every leading
index is one of N rows. The projection is computed in the features' type (under autocast, in autocast's); the distance
and Gram matrices in float32 whatever the inputs are (float64 stays float64), also under autocast: a bf16 student and a
bf16 teacher are compared without a second rounding, and squares of fp16 features cannot overflow.

The Triton path (the reference runs for float64 and off the GPU) never holds p or dp for all rows. Chunks of at most
24 MiB (or 1024 rows, if that is more) stay in the L2 cache between

    bf16, fp16 with weight, mse, smooth_l1, aligned rows:  one kernel: product, distance, dp; p is never written
    all others:  p by the vendor's product, then one kernel that turns p into dp in place; teacher logits likewise
    dfeatures and dweight by the vendor's products (float32 sums), dbias from partial sums in a fixed order

Gradients of a mean are computed in the forward pass, where 1 / Σ w is known; the backward pass multiplies them by the
upstream gradient, read on the device, and leaves the features' gradient untouched where that is 1. It does so in place:
a second backward through one graph is an error, and so is a second derivative (a compiled backward pass copies first).
reduction="none" saves the inputs and computes in the backward pass. fp16 gradients of size 1 / (N D_t) would vanish
before a GradScaler could lift them: there dp keeps the size of p - t, and a float32 factor waits for the upstream one.

Launches of a fused mean of one chunk: kernel, loss, dfeatures, dweight, dbias; one in the backward pass; one each to
round a float32 weight and bias. Computed traffic for many rows of D_s = D_t = D and U = 2 N D bytes: 7 U, of which 3 U
leave the L2 cache (12 U where p and dp are whole and apart); space: `extra_bytes`. No atomics, no host synchronisation;
results repeat bit by bit on one device. float32 products obey torch's own precision setting.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dispatch import INTERPRETED, Kernel, jit, matmul_float32, processors, tl, triton, use_triton

Kind = Literal["mse", "cosine", "smooth_l1", "kl"]
Reduction = Literal["mean", "none"]
KINDS = ("mse", "smooth_l1", "cosine", "kl")  # the kernels know them by index

CHUNK_BYTES = 24 * 2**20
CHUNK_ROWS = 1024  # fewer would spend more time on adding up dweight than on the products themselves
EPSILON = 1e-8


# ----------------------------------------------------------------------------------------------------------------------
# Reference
# ----------------------------------------------------------------------------------------------------------------------


def projected_distill_loss_reference(
    features: Tensor, weight: Tensor | None, bias: Tensor | None, target: Tensor, kind: Kind,
    row_weight: Tensor | None, reduction: Reduction, temperature: float, target_weight: Tensor | None,
    target_bias: Tensor | None, beta: float,
) -> Tensor:  # fmt: skip
    """`projected_distill_loss` in plain PyTorch, for any device; differentiable twice."""
    prediction = _linear(features, weight, bias)
    target = _linear(target, target_weight, target_bias).detach()
    compute = torch.float64 if prediction.dtype == torch.float64 else torch.float32
    prediction, target = prediction.to(compute), target.to(compute)
    with torch.autocast(prediction.device.type, enabled=False):
        plain = row_weight is None and reduction == "mean" and prediction.numel() > 0
        if kind == "mse":
            if plain:
                return F.mse_loss(prediction, target)
            losses = (prediction - target).square().mean(-1)
        elif kind == "smooth_l1":
            losses = F.smooth_l1_loss(prediction, target, reduction="none", beta=beta).mean(-1)
        elif kind == "cosine":
            losses = 1 - F.cosine_similarity(prediction, target, dim=-1, eps=EPSILON)
        else:
            student, teacher = (F.log_softmax(x / temperature, dim=-1) for x in (prediction, target))
            share = teacher.exp()
            # Classes that the teacher excludes cost nothing: 0 log 0 = 0.
            terms = torch.where(share == 0, 0.0, share * (teacher - student))
            losses = temperature**2 * terms.sum(-1)
        if plain:
            return losses.mean()
        weights = torch.ones_like(losses) if row_weight is None else row_weight.detach().to(compute)
        if reduction == "none":
            return losses * weights
        total = weights.sum()
        return (losses * weights).sum() / torch.where(total == 0, 1.0, total)


def _linear(rows: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is None:
        return rows
    return F.linear(rows, weight.to(rows.dtype), None if bias is None else bias.to(rows.dtype))


# ----------------------------------------------------------------------------------------------------------------------
# Kernels
# ----------------------------------------------------------------------------------------------------------------------


@jit
def _distance(difference, beta, SMOOTH: tl.constexpr):
    """Loss of each element and its derivative, both without the mean's 1 / D_t."""
    if SMOOTH:
        slope = tl.clamp(difference / beta, -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
        loss = slope * (difference - 0.5 * beta * slope)
    else:
        loss = difference * difference
        slope = 2.0 * difference
    return loss, slope


@jit
def _project_kernel(
    features,  # [rows, inner]; with TMA a descriptor of it
    weight,  # [width, inner]; with TMA a descriptor of it
    bias,  # [width] or None
    target,  # [rows, width]
    row_scale,  # [rows] float32, or None for ones
    gradient,  # [rows, width], of the features' type, or None: losses only
    losses,  # [rows, column tiles] float32
    bias_gradient,  # [row tiles, width] float32, or None
    rows, width, inner, features_stride, weight_stride, target_stride, loss_scale, gradient_scale, beta,
    SMOOTH: tl.constexpr,
    TMA: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HALVES: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of S Wᵀ, compared with the teacher before it leaves the registers."""
    row_tiles, column_tiles = tl.cdiv(rows, BLOCK_M), tl.cdiv(width, BLOCK_N)
    # GROUP row tiles share their columns of the weight while those are in the cache.
    program, together = tl.program_id(0), GROUP * column_tiles
    first = program // together * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    row_tile, column_tile = first + program % together % height, program % together // height
    row = row_tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, inner, BLOCK_K):
        if TMA:
            left = features.load([row_tile * BLOCK_M, start])
            right = weight.load([column_tile * BLOCK_N, start])
        else:
            k = start + tl.arange(0, BLOCK_K)[None, :]
            left_mask, right_mask = (row < rows)[:, None] & (k < inner), (column < width)[:, None] & (k < inner)
            left = tl.load(features + row[:, None] * features_stride + k, mask=left_mask, other=0.0)
            right = tl.load(weight + column[:, None].to(tl.int64) * weight_stride + k, mask=right_mask, other=0.0)
        if UPCAST:
            left, right = left.to(tl.float32), right.to(tl.float32)
        product = tl.dot(left, right.T, product)
    if HALVES == 2:  # the teacher's tile of 256 columns would not fit into the registers beside the product
        pieces = tl.split(tl.permute(tl.reshape(product, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
    else:
        pieces = (product,)
    for half in tl.static_range(HALVES):
        piece = column_tile * HALVES + half
        column = piece * (BLOCK_N // HALVES) + tl.arange(0, BLOCK_N // HALVES)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        student = pieces[half]
        if bias is not None:
            student += tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
        teacher = tl.load(target + row[:, None] * target_stride + column[None, :], mask=inside, other=0.0)
        loss, slope = _distance(tl.where(inside, student - teacher.to(tl.float32), 0.0), beta, SMOOTH)
        loss = tl.sum(loss, 1) * loss_scale
        if row_scale is not None:
            scale = tl.load(row_scale + row, mask=row < rows, other=0.0)
            loss *= scale
            slope *= scale[:, None]
        tl.store(losses + row * (column_tiles * HALVES) + piece, loss, mask=row < rows)
        if gradient is not None:
            slope *= gradient_scale
            place = gradient + row[:, None] * width + column[None, :]
            tl.store(place, slope.to(gradient.dtype.element_ty), mask=inside)
            if bias_gradient is not None:
                sums = bias_gradient + row_tile.to(tl.int64) * width + column
                tl.store(sums, tl.sum(slope, 0), mask=column < width)


@jit
def _load_pair(prediction, target, start, width: tl.constexpr, valid, other, BLOCK: tl.constexpr):
    """One block of columns of both, float32, `other` outside; the offsets and the mask that it was read with."""
    column = start + tl.arange(0, BLOCK)[None, :]
    mask = valid[:, None] & (column < width)
    p = tl.load(prediction + column, mask=mask, other=other).to(tl.float32)
    t = tl.load(target + column, mask=mask, other=other).to(tl.float32)
    return p, t, column, mask


@jit
def _log_sum_exp(x, largest, total):
    """Running maximum [rows, 1] and sum of exp(x - maximum) after one more block."""
    new = tl.maximum(largest, tl.max(x, 1, keep_dims=True))
    shift = tl.where(new == float("-inf"), 0.0, new)  # so far only classes that are masked out
    return new, total * tl.exp(largest - shift) + tl.sum(tl.exp(x - shift), 1, keep_dims=True)


@jit
def _rows_kernel(
    prediction,  # [rows, width]
    target,  # [rows, width]
    row_scale,  # [rows] float32, or None for ones
    gradient,  # [rows, width], may be `prediction` itself; None: losses only
    losses,  # [rows] float32
    rows, loss_scale, gradient_scale, parameter,
    width: tl.constexpr,  # constants, as are the strides: what they are multiples of decides how wide loads can be
    prediction_stride: tl.constexpr,
    target_stride: tl.constexpr,
    gradient_stride: tl.constexpr,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """Loss and gradient of ROWS rows. With BLOCKS = 1 the compiler reads a row once and keeps it in registers."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    prediction += row[:, None] * prediction_stride
    target += row[:, None] * target_stride
    if gradient is not None:
        gradient += row[:, None] * gradient_stride
    scale = tl.full((ROWS,), 1.0, tl.float32)
    if row_scale is not None:
        scale = tl.load(row_scale + row, mask=valid, other=0.0)
    slope_scale = (scale * gradient_scale)[:, None]
    loss = tl.zeros((ROWS, 1), tl.float32)

    if KIND == 2:  # cosine: norms first
        pp, tt, pt = loss, loss, loss
        for start in range(0, BLOCK * BLOCKS, BLOCK):
            p, t, column, mask = _load_pair(prediction, target, start, width, valid, 0.0, BLOCK)
            pp += tl.sum(p * p, 1, keep_dims=True)
            tt += tl.sum(t * t, 1, keep_dims=True)
            pt += tl.sum(p * t, 1, keep_dims=True)
        norm = tl.sqrt_rn(pp)
        a = tl.maximum(norm, 1e-8, propagate_nan=tl.PropagateNan.ALL)
        b = tl.maximum(tl.sqrt_rn(tt), 1e-8, propagate_nan=tl.PropagateNan.ALL)
        cosine = tl.div_rn(tl.div_rn(pt, a), b)
        loss = 1.0 - cosine
        pull = slope_scale / a / b
        shrink = tl.where(norm == 0.0, 0.0, slope_scale * cosine / norm / a)
    if KIND == 3:  # kl: maxima and sums of exponentials first
        outside = float("-inf")
        p_max, t_max = loss + outside, loss + outside
        p_sum, t_sum = loss, loss
        for start in range(0, BLOCK * BLOCKS, BLOCK):
            p, t, column, mask = _load_pair(prediction, target, start, width, valid, outside, BLOCK)
            p_max, p_sum = _log_sum_exp(p * parameter, p_max, p_sum)
            t_max, t_sum = _log_sum_exp(t * parameter, t_max, t_sum)
        p_log, t_log = tl.log(p_sum), tl.log(t_sum)

    if KIND != 2 or gradient is not None:
        for start in range(0, BLOCK * BLOCKS, BLOCK):
            if KIND == 3:
                p, t, column, mask = _load_pair(prediction, target, start, width, valid, float("-inf"), BLOCK)
                p_share = (p * parameter - p_max) - p_log
                t_share = (t * parameter - t_max) - t_log
                difference = t_share - p_share
                p_share, t_share = tl.exp(p_share), tl.exp(t_share)
                loss += tl.sum(tl.where(mask & (t_share != 0.0), t_share * difference, 0.0), 1, keep_dims=True)
                slope = (p_share - t_share) * slope_scale
            else:
                p, t, column, mask = _load_pair(prediction, target, start, width, valid, 0.0, BLOCK)
                if KIND == 2:
                    slope = p * shrink - t * pull
                else:
                    terms, slope = _distance(p - t, parameter, KIND == 1)
                    loss += tl.sum(terms, 1, keep_dims=True)
                    slope *= slope_scale
            if gradient is not None:
                tl.store(gradient + column, slope.to(gradient.dtype.element_ty), mask=mask)
    tl.store(losses + row, tl.sum(loss, 1) * scale * loss_scale, mask=valid)


@jit
def _scale_block(source, destination, factor, count, block, BLOCK: tl.constexpr):
    index = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < count
    value = tl.load(source + index, mask=mask).to(tl.float32) * factor
    tl.store(destination + index, value.to(destination.dtype.element_ty), mask=mask)


@jit
def _scale_kernel(
    features_gradient, weight_gradient, bias_gradient, weight_result, bias_result, factor,
    features_count, weight_count, bias_count, BLOCK: tl.constexpr,
):  # fmt: skip
    """Times the upstream gradient: the features' in place, the float32 sums into tensors of their parameters' types."""
    program, scale = tl.program_id(0), tl.load(factor)
    features_blocks, weight_blocks = tl.cdiv(features_count, BLOCK), tl.cdiv(weight_count, BLOCK)
    if program < features_blocks:
        if scale != 1.0:
            _scale_block(features_gradient, features_gradient, scale, features_count, program, BLOCK)
    elif program < features_blocks + weight_blocks:
        _scale_block(weight_gradient, weight_result, scale, weight_count, program - features_blocks, BLOCK)
    else:
        block = program - features_blocks - weight_blocks
        _scale_block(bias_gradient, bias_result, scale, bias_count, block, BLOCK)


# ----------------------------------------------------------------------------------------------------------------------
# Launchers
# ----------------------------------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """Of the fused product: m x n outputs, compared in `halves` pieces, k inputs at a time; tma where rows allow it."""

    m: int
    n: int
    k: int
    halves: int
    warps: int
    stages: int
    tma: bool = False


# Architecture → a small tile where programs must be many, and a large one that reuses more of what it reads.
# Descriptors only for the latter: they cost the host more than they save a small product.
TILES = {
    "sm_80": (Tile(64, 64, 64, 1, 4, 4), Tile(128, 128, 64, 1, 8, 4)),
    "sm_90": (Tile(64, 64, 128, 1, 4, 4), Tile(128, 256, 64, 2, 8, 4, tma=True)),
    "sm_100": (Tile(64, 64, 128, 1, 4, 4), Tile(128, 256, 64, 2, 8, 4, tma=True)),
    "gfx942": (Tile(64, 64, 64, 1, 4, 2), Tile(128, 128, 64, 1, 8, 2)),
}
GROUP = 8
SCALE_BLOCK = 8192


def _tile(rows: int, width: int, device: torch.device) -> Tile:
    """The large tile if it keeps half of the chip busy. AMD's fit the 100 KiB of consumer GPUs, too."""
    architecture = "sm_90" if device.type == "cpu" else "gfx942"
    if device.type == "cuda" and torch.version.hip is None:
        known = {(8, 0): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100"}
        architecture = known.get(torch.cuda.get_device_capability(device), architecture)
    small, large = TILES[architecture]
    programs = math.ceil(rows / large.m) * math.ceil(width / large.n)
    return large if 2 * programs >= processors(device) else small


def row_blocks(width: int) -> tuple[int, int, int]:
    """Rows of one program, columns of one block, blocks of one row."""
    block = min(triton.next_power_of_2(width), 4096)
    return max(1, 2048 // block), block, triton.cdiv(width, block)


def _launch_project(
    features: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, row_scale: Tensor | None,
    gradient: Tensor | None, losses: Tensor, bias_gradient: Tensor | None, tile: Tile,
    kind: str, parameter: float, loss_scale: float, gradient_scale: float,
) -> None:  # fmt: skip
    (rows, inner), width = features.shape, weight.shape[0]
    _project_kernel[(triton.cdiv(rows, tile.m) * triton.cdiv(width, tile.n),)](
        _descriptor(features, tile.m, tile.k) if tile.tma else features,
        _descriptor(weight, tile.n, tile.k) if tile.tma else weight,
        bias, target, row_scale, gradient, losses, bias_gradient,
        rows, width, inner, features.stride(0), weight.stride(0), target.stride(0),
        loss_scale, gradient_scale, parameter,
        kind == "smooth_l1", tile.tma, INTERPRETED, tile.m, tile.n, tile.k, tile.halves, GROUP,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _aligned(matrix: Tensor) -> bool:
    """Whether rows can be read 16 bytes at a time, in whole blocks of 16 elements, and by descriptor."""
    stride = matrix.stride(0)
    whole = matrix.shape[1] % 16 == 0 and stride % 16 == 0 and stride >= matrix.shape[1]
    return whole and matrix.data_ptr() % 16 == 0


def _descriptor(matrix: Tensor, rows: int, columns: int) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])


def _launch_rows(
    prediction: Tensor, target: Tensor, row_scale: Tensor | None, gradient: Tensor | None, losses: Tensor,
    kind: str, parameter: float, loss_scale: float, gradient_scale: float,
) -> None:  # fmt: skip
    rows, width = prediction.shape
    per_program, block, blocks = row_blocks(width)
    _rows_kernel[(triton.cdiv(rows, per_program),)](
        prediction, target, row_scale, gradient, losses, rows, loss_scale, gradient_scale, parameter,
        width, prediction.stride(0), target.stride(0), 0 if gradient is None else gradient.stride(0),
        KINDS.index(kind), per_program, block, blocks, num_warps=8,
    )  # fmt: skip


def chunk_rows(rows: int, row_bytes: int) -> int:
    """Rows of one chunk: all of them where they fit, else equal chunks of whole tiles (so that slices stay aligned)."""
    most = max(CHUNK_BYTES // row_bytes, CHUNK_ROWS) // 128 * 128
    return rows if rows <= most else 128 * math.ceil(rows / math.ceil(rows / most) / 128)


def extra_bytes(
    rows: int,
    student_width: int,
    target_width: int,
    dtype: torch.dtype,
    kind: Kind = "mse",
    *,
    projected: bool = True,
    teacher_head: bool = False,
) -> int:
    """Most bytes that a mean with all gradients holds at once on a GPU, beyond inputs and the gradients it returns."""
    chunk = chunk_rows(rows, target_width * dtype.itemsize) if projected or teacher_head else 0
    whole = chunk * target_width * dtype.itemsize * (projected + teacher_head)
    tiles = math.ceil(target_width / 64) if dtype != torch.float32 and kind in ("mse", "smooth_l1") else 1
    sums = 4 * rows * (tiles if projected else 1)
    if projected:  # dweight in float32, of one chunk and of all so far; the parameters in the features' type
        sums += (2 * 4 + dtype.itemsize) * target_width * (student_width + 1) + 4 * math.ceil(rows / 64) * target_width
    return whole + sums


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    if bias is None:
        return torch.mm(rows, weight.t(), out=out)
    return torch.addmm(bias, rows, weight.t(), out=out)


def _run(
    features: Tensor, weight: Tensor | None, bias: Tensor | None, target: Tensor, row_scale: Tensor | None,
    target_weight: Tensor | None, target_bias: Tensor | None, kind: str, parameter: float, lowered: torch.dtype | None,
    loss_scale: float, gradient_scale: float, want: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """All chunks: losses [N, pieces]; the wanted gradients of features, weight and bias (sums in float32), else empty.

    Row r counts row_scale_r (1 where None) · loss_scale in its loss, row_scale_r · gradient_scale in the gradients.
    """
    rows, dtype = features.shape[0], _product_type(features, weight, lowered)
    features, target = (x if x.stride(-1) == 1 else x.contiguous() for x in (features, target))
    row_scale = None if row_scale is None else row_scale.contiguous()
    head = lowered or target.dtype
    matrix = features.new_empty(0) if weight is None else weight.to(dtype).contiguous()
    teacher_matrix = None if target_weight is None else target_weight.to(head)
    bias = None if bias is None else bias.to(dtype).contiguous()
    target_bias = None if target_bias is None else target_bias.to(head)
    width = features.shape[1] if weight is None else matrix.shape[0]
    per_row = {"cosine": (1.0, 1.0), "kl": (parameter**2, parameter)}.get(kind, (1 / width, 1 / width))
    how = (kind, 1 / parameter if kind == "kl" else parameter, loss_scale * per_row[0], gradient_scale * per_row[1])

    whole = weight is None and target_weight is None
    step = rows if whole else chunk_rows(rows, width * max(dtype.itemsize, head.itemsize))
    fused = weight is not None and dtype != torch.float32 and kind in ("mse", "smooth_l1")
    fused = fused and all(map(_aligned, (features, matrix, target)))
    tile = _tile(step, width, features.device)

    def empty(*shape: int, dtype: torch.dtype = torch.float32, wanted: bool = True) -> Tensor:
        return features.new_empty(shape if wanted else 0, dtype=dtype)

    losses = empty(rows, math.ceil(width / tile.n) * tile.halves if fused else 1)
    d_features = empty(*features.shape, dtype=features.dtype, wanted=want[0])
    d_weight: Tensor | None = None
    d_bias: Tensor | None = None
    student = empty(step, width, dtype=dtype, wanted=weight is not None and (any(want) or not fused))
    logits = empty(step, width, dtype=head, wanted=target_weight is not None)
    partial = empty(math.ceil(rows / tile.m), width, wanted=fused and want[2])
    for start in range(0, rows, max(step, 1)):
        part = slice(start, start + step)
        source, teacher = features[part].to(dtype), target[part]
        scale, size = None if row_scale is None else row_scale[part], len(source)
        delta = student[:size] if weight is not None else d_features[part] if want[0] else None
        if teacher_matrix is not None:
            teacher = _product(teacher.to(head), teacher_matrix, target_bias, logits[:size])
        if fused:
            delta = delta if any(want) else None
            sums = partial[start // tile.m :] if want[2] else None
            _launch_project(source, matrix, bias, teacher, scale, delta, losses[part], sums, tile, *how)
        else:
            prediction = source if weight is None or delta is None else _product(source, matrix, bias, delta)
            _launch_rows(prediction, teacher, scale, delta if any(want) else None, losses[part], *how)
        if weight is None or delta is None:
            continue
        if want[0] and features.dtype == dtype:
            torch.mm(delta, matrix, out=d_features[part])
        elif want[0]:
            d_features[part] = torch.mm(delta, matrix)
        if want[1]:
            product = matmul_float32(delta.t(), source)
            d_weight = product if d_weight is None else d_weight.add_(product)
        if want[2] and not fused:
            total = delta.sum(0, dtype=torch.float32)
            d_bias = total if d_bias is None else d_bias.add_(total)
    if fused and want[2]:
        d_bias = partial.sum(0)
    nothing = features.new_zeros  # for no rows at all
    if d_weight is None:
        d_weight = nothing(matrix.shape if want[1] else 0, dtype=torch.float32)
    if d_bias is None:
        d_bias = nothing(width if want[2] else 0, dtype=torch.float32)
    return losses, d_features, d_weight, d_bias


# ----------------------------------------------------------------------------------------------------------------------
# Operators
# ----------------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("shiftlens::distill_loss", mutates_args=())
def _loss(
    features: Tensor, weight: Tensor | None, bias: Tensor | None, target: Tensor, row_weight: Tensor | None,
    target_weight: Tensor | None, target_bias: Tensor | None, kind: str, parameter: float, lowered: torch.dtype | None,
    mean: bool, want_features: bool, want_weight: bool, want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Mean or weighted losses [N]; gradients of it or of their sum; the factor that those lack (empty: none)."""
    rows, scale, rest = features.shape[0], row_weight, None
    half = mean and _product_type(features, weight, lowered) == torch.float16
    lift = _lift(features.shape[1] if weight is None else weight.shape[0]) if half else 1.0
    share = 1 / max(rows, 1) if mean and row_weight is None else 1.0
    # Autocast must change no type inside; launches go to the tensors' device.
    with torch.autocast(features.device.type, enabled=False), torch.cuda.device_of(features):
        if mean and row_weight is not None:
            total = row_weight.sum()
            unit = row_weight.amax() if half and rows else total
            scale, rest = row_weight * _inverse(unit), unit * _inverse(total)
        losses, d_features, d_weight, d_bias = _run(
            features, weight, bias, target, scale, target_weight, target_bias, kind, parameter, lowered,
            share, lift if half else share, (want_features, want_weight, want_bias),
        )  # fmt: skip
        loss = losses.sum() if mean else losses.sum(1)
        factor = losses.new_empty(0)
        if half:
            loss = loss if rest is None else loss * rest
            factor = losses.new_full((), share / lift) if rest is None else rest / lift
    return loss, d_features, d_weight, d_bias, factor


def _product_type(features: Tensor, weight: Tensor | None, lowered: torch.dtype | None) -> torch.dtype:
    return features.dtype if weight is None or lowered is None else lowered


def _inverse(x: Tensor) -> Tensor:
    return torch.where(x == 0, 0.0, 1 / x)


def _lift(width: int) -> float:
    """Power of two that brings fp16 gradients of one row, of size (p - t) / D_t, near a sixteenth of p - t."""
    return 2.0 ** min(max(math.frexp(width)[1] - 6, 0), 10)


@_loss.register_fake
def _(features: Tensor, weight: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    lowered, mean, *want = rest[-5:]
    half = mean and _product_type(features, weight, lowered) == torch.float16
    return (
        features.new_empty(() if mean else features.shape[:1], dtype=torch.float32),
        features.new_empty(features.shape if want[0] else 0),
        features.new_empty(weight.shape if weight is not None and want[1] else 0, dtype=torch.float32),
        features.new_empty(weight.shape[0] if weight is not None and want[2] else 0, dtype=torch.float32),
        features.new_empty(() if half else 0, dtype=torch.float32),
    )


@torch.library.custom_op("shiftlens::distill_loss_scale", mutates_args=("features_gradient",))
def _scale(
    features_gradient: Tensor, weight_gradient: Tensor, bias_gradient: Tensor, factor: Tensor,
    weight_type: torch.dtype, bias_type: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Multiplies by a scalar on the device: the first in place, the others into new tensors of the given types."""
    results = torch.empty_like(weight_gradient, dtype=weight_type), torch.empty_like(bias_gradient, dtype=bias_type)
    counts = [tensor.numel() for tensor in (features_gradient, weight_gradient, bias_gradient)]
    blocks = sum(triton.cdiv(count, SCALE_BLOCK) for count in counts)
    if blocks:
        with torch.cuda.device_of(factor):
            _scale_kernel[(blocks,)](
                features_gradient, weight_gradient, bias_gradient, *results, factor, *counts, SCALE_BLOCK, num_warps=8
            )
    return results


@_scale.register_fake
def _(_: Tensor, weight: Tensor, bias: Tensor, factor: Tensor, weight_type: Any, bias_type: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(weight, dtype=weight_type), torch.empty_like(bias, dtype=bias_type)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, (*ctx.options, ctx.mean) = inputs[:7], inputs[7:11]
    ctx.want, ctx.types = inputs[11:], [torch.float32 if x is None else x.dtype for x in tensors[1:3]]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*(output[1:] if ctx.mean else tensors))


def _backward(ctx: Any, upstream: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError("distill_loss: the kernels have no second derivative; use kernel='reference'")
    if ctx.mean:
        d_features, d_weight, d_bias, factor = ctx.saved_tensors
        factor = upstream * factor if factor.numel() else upstream
        gradients = d_features, *_scale(d_features, d_weight, d_bias, factor, *ctx.types)
    else:
        *inputs, row_weight, target_weight, target_bias = ctx.saved_tensors
        row_scale = upstream if row_weight is None else upstream * row_weight
        found = _loss(*inputs, row_scale, target_weight, target_bias, *ctx.options, False, *ctx.want)
        gradients = found[1], found[2].to(ctx.types[0]), found[3].to(ctx.types[1])
    return *(g if wanted else None for g, wanted in zip(gradients, ctx.want, strict=True)), *[None] * 11


_loss.register_autograd(_backward, setup_context=_setup_context)


# ----------------------------------------------------------------------------------------------------------------------
# Public
# ----------------------------------------------------------------------------------------------------------------------


def projected_distill_loss(
    features: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    target: Tensor,
    kind: Kind = "mse",
    *,
    row_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    temperature: float = 1.0,
    target_weight: Tensor | None = None,
    target_bias: Tensor | None = None,
    beta: float = 1.0,
    kernel: Kernel = "auto",
) -> Tensor:
    """Loss (float32, or float64 for float64 features) between projected features and a teacher's target.

    Args:
        features: student features [..., D_s], any floating type.
        weight: projection [D_t, D_s], or None when D_s = D_t and nothing is projected.
        bias: [D_t] or None; only together with ``weight``.
        target: teacher features [..., D_t] (for ``kl`` logits); no gradient flows into it.
        kind: ``mse``, ``cosine``, ``smooth_l1`` or ``kl``.
        row_weight: [...] of the leading shape, a mask or weights >= 0, held constant; None: all 1. It multiplies: a row
            of weight 0 whose loss is not finite still spoils a mean.
        reduction: ``mean`` over the rows' weights, a scalar, 0 if they sum to 0; ``none``: weighted losses [...].
        temperature: T > 0 of ``kl``.
        target_weight: [D_t, D_k], the teacher's own head for ``kl``; ``target`` is then its features [..., D_k], and
            its logits never exist for all rows at once.
        target_bias: [D_t] or None; only together with ``target_weight``.
        beta: width > 0 of the quadratic part of ``smooth_l1``.
        kernel: see `kernels.dispatch`.

    Raises:
        ValueError: shapes that do not fit, tensors on several devices, an option that is unknown or out of its range.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))}, not {kind!r}")
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be 'mean' or 'none', not {reduction!r}")
    for name, value in (("temperature", temperature), ("beta", beta)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, not {value}")
    if target_weight is not None and kind != "kl":
        raise ValueError(f"target_weight is for kind 'kl', not {kind!r}")
    if fault := _fault(features, weight, bias, target, row_weight, target_weight, target_bias):
        raise ValueError(fault)
    tensors = (features, weight, bias, target, target_weight, target_bias)
    if not use_triton("distill_loss", kernel, *tensors):
        return projected_distill_loss_reference(
            features, weight, bias, target, kind, row_weight, reduction, temperature, target_weight, target_bias, beta
        )
    device, leading = features.device.type, features.shape[:-1]
    rows = math.prod(leading)
    if row_weight is not None:
        row_weight = row_weight.detach().to(torch.float32).reshape(rows)
    lowered = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    want = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (features, weight, bias)]
    loss, *_ = _loss(
        features.reshape(rows, features.shape[-1]), weight, bias, target.detach().reshape(rows, target.shape[-1]),
        row_weight, *(None if x is None else x.detach() for x in (target_weight, target_bias)),
        kind, float(temperature if kind == "kl" else beta), lowered, reduction == "mean", *want,
    )  # fmt: skip
    return loss if reduction == "mean" else loss.reshape(leading)


def _fault(
    features: Tensor, weight: Tensor | None, bias: Tensor | None, target: Tensor, row_weight: Tensor | None,
    target_weight: Tensor | None, target_bias: Tensor | None,
) -> str:  # fmt: skip
    """What is wrong with the shapes, or with where the weights are; empty if nothing is."""

    def shapes() -> str:  # not before it is needed: torch.compile would fix every dimension that is printed
        return f"features {tuple(features.shape)} and target {tuple(target.shape)}"

    if not features.dim() or not target.dim() or not features.shape[-1] or not target.shape[-1]:
        return f"{shapes()} must have a last dimension of at least 1"
    widths = []
    for name, rows, matrix, vector in (("", features, weight, bias), ("target_", target, target_weight, target_bias)):
        if matrix is None and vector is not None:
            return f"a {name}bias needs a {name}weight"
        if matrix is not None and (matrix.dim() != 2 or matrix.shape[1] != rows.shape[-1]):
            return f"{name}weight {tuple(matrix.shape)} does not map {shapes()}"
        if matrix is not None and vector is not None and vector.shape != matrix.shape[:1]:
            return f"{name}bias {tuple(vector.shape)} does not fit {name}weight {tuple(matrix.shape)}"
        widths.append(rows.shape[-1] if matrix is None else matrix.shape[0])
    if widths[0] != widths[1] or features.shape[:-1] != target.shape[:-1]:
        how = "" if weight is None else f"weight {tuple(weight.shape)} does not map one to the other: "
        return f"{how}{shapes()} differ in shape"
    if row_weight is not None and row_weight.device != features.device:
        return f"row_weight on {row_weight.device}, features on {features.device}"
    if row_weight is not None and row_weight.shape != features.shape[:-1]:
        return f"row_weight {tuple(row_weight.shape)} is not of the leading shape of {shapes()}"
    return ""


def token_gram(tokens: Tensor) -> Tensor:
    """Gram matrix X Xᵀ / √E of tokens [N, T, E] → [N, T, T] float32 (float64 for float64).

    What the published code distils as "attention weights" (its attention map is overwritten by this product of the
    layer-normalised tokens): no query, key, head or softmax is involved.
    """
    with torch.autocast(tokens.device.type, enabled=False):
        tokens = (tokens if tokens.dtype == torch.float64 else tokens.float()) * tokens.shape[-1] ** -0.25
        return tokens @ tokens.transpose(1, 2)
