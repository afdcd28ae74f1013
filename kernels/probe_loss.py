"""Cross-entropy of many linear heads on the same features: a sweep of linear probes in a few large products.

    z_h = X · W_hᵀ + b_h        p = softmax(z_h)        q = (1 - ε_h)·onehot(label) + ε_h / C
    L_h = mean over rows of -Σ_c q_c · log p_c          (label smoothing as in torch.nn.functional.cross_entropy)
    dZ_h = (p - q) / B          dW_h = dZ_hᵀ · X        db_h = Σ_rows dZ_h        dX = Σ_h u_h · dZ_h · W_h

Shapes: features X [B, D], weight W [H, C, D], bias b [H, C], labels [B], label smoothing ε [H], losses L [H], upstream
gradient u [H]. Logits of all heads never exist together: heads are taken in blocks, and a head's rows in chunks where
one head is too much, so that logits, low-precision weights and partial sums stay within `max_logit_bytes`.

Launches for one block of heads, and two small ones for the losses of all:
    1  W_block in the product's type         only if W is kept in another
    2  Z = X · W_blockᵀ                      vendor product
    3  losses, and Z ← p - q in place        one Triton kernel, a row's classes in registers (or streamed twice)
    4  db_block                              sum of a float32 for every 8 to 64 logits; above 8192 classes of all of Z
    5  dW_block = Zᵀ · X / B                 vendor product with float32 result
In bf16 they move 8 bytes a logit (product 2, kernel 2 + 2, product 2), eager autocast 42 (logits 2, cast to float32 6,
log-softmax 8 forward and 12 backward, gradient of the picked class 4, cast back 6, products 2, db 2): computed. Without
a gradient the kernel writes no logits. Accesses are 16 bytes wide if C is a multiple of 8, else 8, 4 or 2 bytes: rows
of an odd C are not padded, which would copy float32 weights and gradients; neighbouring threads still read neighbours.

Gradients: for features without gradient (a sweep on frozen features) computed in the forward pass and multiplied by u
in the backward pass, on the device and in place, by a kernel that returns at once for heads with u_h = 1. A second
backward pass through the same graph therefore raises torch's "modified by an inplace operation". For features with
gradient the forward pass computes losses only, the backward pass everything, from new logits. Under torch.compile the
multiplication by u is one of its own kernels, out of place. Not twice differentiable.

Precision: products in the features' type (autocast's under autocast), the weight cast to it block by block; float32
products obey torch's matmul precision setting. Bias, softmax, losses and sums in float32 (the reference: float64 for
float64). Z holds p - q without the factor 1/B, which products apply in float32: fp16 gradients do not underflow.

A label outside [0, C) makes all losses and gradients NaN; the reference raises ValueError on the CPU, where looking is
free. NaN and infinite logits give what log_softmax gives; classes masked by a bias of -inf work. B = 0: losses and
gradients are 0. No atomics: equal inputs on equal hardware give equal bits. The reference runs on the CPU, for float64,
and where the caller asks for it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dispatch import Kernel, jit, matmul_float32, processors, tl, use_triton

# Classes, padded to a power of two → rows of a tile and warps: 8 or 16 logits a thread; with 32, half as many programs
# fit on a multiprocessor.
TILES = {16: (64, 4), 32: (64, 4), 64: (32, 4), 128: (16, 4), 256: (8, 4), 512: (4, 4), 1024: (2, 4), 2048: (1, 4)}
TILES |= {4096: (1, 8), 8192: (1, 16)}
STREAMED = (4096, 8)  # above 8192 classes: classes at a time and warps
SCALE = (4096, 4)
# Rows that one program sums up for the bias gradient: few programs write few partial sums, many fill the GPU.
FEWEST_ROWS, MOST_ROWS = 8, 64
FEWEST_CHUNK_ROWS = 64


def multi_head_cross_entropy_reference(
    features: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, smoothing: Tensor | None = None
) -> Tensor:
    """The same in plain PyTorch: arguments as for `multi_head_cross_entropy`, smoothing [H] or None."""
    rows, (heads, classes, _) = len(features), weight.shape
    compiling = torch.compiler.is_compiling()
    if labels.device.type == "cpu" and not compiling and rows and not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(f"labels from {labels.min()} to {labels.max()} for {classes} classes")
    with torch.autocast(features.device.type, enabled=False):
        low = None if bias is None else bias.flatten().to(features.dtype)
        logits = F.linear(features, weight.flatten(0, 1).to(features.dtype), low).view(rows, heads, classes)
        log_p = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32).log_softmax(2)
        picked = labels.clamp(0, classes - 1)[:, None, None].expand(rows, heads, 1)
        losses = -log_p.gather(2, picked).squeeze(2)
        if smoothing is not None:
            smoothing = smoothing.to(losses.dtype)
            # A masked class has log p = -inf, which must not meet a smoothing of 0.
            losses = torch.where(smoothing == 0, losses, (1 - smoothing) * losses - smoothing * log_p.mean(2))
        valid = (labels >= 0) & (labels < classes)
        losses = losses * torch.where(valid, 1.0, float("nan")).to(losses.dtype)[:, None]
        return losses.sum(0) / max(rows, 1)


@jit
def _optional(pointer, place, mask, default):  # type: ignore[no-untyped-def]
    """What lies there in float32, or the default for a pointer that is None."""
    value = default
    if pointer is not None:
        value = tl.load(pointer + place, mask=mask).to(tl.float32)
    return value


@jit
def _target(column, label, epsilon, classes):  # type: ignore[no-untyped-def]
    """Target distribution q; 0 in the columns that pad a row."""
    q = tl.where(column == label.to(tl.int32), 1.0 - epsilon, 0.0) + epsilon / classes
    return tl.where(column < classes, q, 0.0)


@jit
def _tile_kernel(  # type: ignore[no-untyped-def]
    logits, bias, labels, smoothing, scale, losses, column_sums, rows, heads, class_groups, loss_stride, tiles, share,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, GRADIENTS: tl.constexpr,
):  # fmt: skip
    """`tiles` tiles of ROWS rows of one head, all classes at once.

    logits [rows, heads, classes], overwritten by scale · (p - q) if GRADIENTS; labels [rows]; bias [heads, classes],
    smoothing and scale [heads] or None. Sums over the program's rows, times share: losses [heads, loss_stride] float32,
    column_sums [programs, heads, classes] float32 or None. class_groups = classes / VECTOR: from their product the
    compiler sees how far rows are aligned.
    """
    program, head = tl.program_id(0), tl.program_id(1)
    classes = class_groups * VECTOR
    column = tl.arange(0, BLOCK)
    real = column < classes
    offset = _optional(bias, head * classes + column, real, tl.zeros([BLOCK], tl.float32))
    epsilon, factor = _optional(smoothing, head, None, 0.0), _optional(scale, head, None, 1.0)
    loss = 0.0
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in range(tiles):
        row = (program * tiles + tile) * ROWS + tl.arange(0, ROWS)
        inside = row < rows
        label = tl.load(labels + row, mask=inside, other=0)
        place = logits + (row.to(tl.int64)[:, None] * (heads * classes) + (head * classes + column)[None, :])
        mask = inside[:, None] & real[None, :]
        z = tl.load(place, mask=mask, other=0).to(tl.float32) + offset[None, :]
        z = tl.where(real[None, :], z, float("-inf"))
        # A NaN that this maximum passes over is still in the sum; an infinite one leaves inf - inf = NaN.
        z -= tl.max(z, 1)[:, None]
        p = tl.exp(z)
        total = tl.where((label >= 0) & (label < classes), tl.sum(p, 1), float("nan"))
        q = _target(column[None, :], label[:, None], epsilon, classes)
        # 0 · -inf of a masked class would be NaN.
        cross = tl.sum(q * tl.where(q == 0, 0.0, z), 1)
        loss += tl.sum(tl.where(inside, tl.log(total) - cross, 0.0), 0)
        if GRADIENTS:
            gradient = (p * (1 / total)[:, None] - q) * factor
            tl.store(place, gradient.to(logits.dtype.element_ty), mask=mask)
            if column_sums is not None:
                sums += tl.where(inside[:, None], gradient, 0.0)
    tl.store(losses + head * loss_stride + program, loss * share)
    if column_sums is not None:
        place = column_sums + (program.to(tl.int64) * heads + head) * classes + column
        tl.store(place, tl.sum(sums, 0) * share, mask=real)


@jit
def _row_kernel(  # type: ignore[no-untyped-def]
    logits, bias, labels, smoothing, scale, losses, heads, class_groups, loss_stride, share,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr, GRADIENTS: tl.constexpr,
):  # fmt: skip
    """One row of one head, its classes in blocks: a sweep for the loss, a second one for the gradient."""
    row, head = tl.program_id(0), tl.program_id(1)
    classes = class_groups * VECTOR
    label = tl.load(labels + row)
    epsilon, factor = _optional(smoothing, head, None, 0.0), _optional(scale, head, None, 1.0)
    place = logits + (row.to(tl.int64) * (heads * classes) + head * classes)
    maximum, shift, total, cross, seen = float("-inf"), 0.0, 0.0, 0.0, 0.0
    for first in range(0, classes, BLOCK):
        column = first + tl.arange(0, BLOCK)
        real = column < classes
        z = tl.load(place + column, mask=real, other=0).to(tl.float32)
        z += _optional(bias, head * classes + column, real, 0.0)
        z = tl.where(real, z, float("-inf"))
        q = _target(column, label, epsilon, classes)
        highest = tl.maximum(maximum, tl.max(z, 0))
        # While all classes are masked: exp(-inf - (-inf)) would be NaN.
        new_shift = tl.where(highest == float("-inf"), 0.0, highest)
        total = total * tl.exp(maximum - new_shift) + tl.sum(tl.exp(z - new_shift), 0)
        # Σ q·(z - shift) rather than Σ q·z, which would cancel against large logits.
        cross += seen * (shift - new_shift) + tl.sum(q * tl.where(q == 0, 0.0, z - new_shift), 0)
        seen += tl.sum(q, 0)
        maximum, shift = highest, new_shift
    total = tl.where((label >= 0) & (label < classes), total, float("nan"))
    tl.store(losses + head * loss_stride + row, (tl.log(total) - cross) * share)
    if GRADIENTS:
        inverse = 1 / total
        for first in range(0, classes, BLOCK):
            column = first + tl.arange(0, BLOCK)
            real = column < classes
            z = tl.load(place + column, mask=real, other=0).to(tl.float32)
            z += _optional(bias, head * classes + column, real, 0.0)
            p = tl.exp(tl.where(real, z, float("-inf")) - shift) * inverse
            gradient = (p - _target(column, label, epsilon, classes)) * factor
            tl.store(place + column, gradient.to(logits.dtype.element_ty), mask=real)


@jit
def _scale_kernel(values, factors, length, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """values [heads, length] *= factors [heads], in place; nothing is read or written for a factor of exactly 1."""
    block, head = tl.program_id(0), tl.program_id(1)
    factor = tl.load(factors + head)
    if factor != 1.0:
        column = block * BLOCK + tl.arange(0, BLOCK)
        place = values + head.to(tl.int64) * length + column
        tl.store(place, tl.load(place, mask=column < length, other=0) * factor, mask=column < length)


def _blocks(
    rows: int, width: int, heads: int, classes: int, itemsize: int, copied: bool, limit: int
) -> tuple[int, int, int]:
    """Heads of a block, rows of a chunk, and the most bytes of logits, cast weights and partial sums at one time."""
    fixed = classes * width * itemsize if copied else 0
    per_row = classes * (itemsize + 4 / FEWEST_ROWS)
    most = int(min(max(limit // (fixed + per_row * max(rows, 1)), 1), max(heads, 1)))
    block = -(-heads // -(-heads // most)) if heads else 1  # equal blocks rather than full ones and a small last one
    step = 8 // math.gcd(classes, 8)
    if block < heads and most >= step:  # rows of 16-byte multiples whatever C is: vendor products are slow on others
        block = min(-(-block // step), most // step) * step
    chunk = rows
    if most == 1 and fixed + per_row * rows > limit:
        chunk = min(max(int((limit - fixed) / per_row) // 64 * 64, FEWEST_CHUNK_ROWS), rows)
    return block, chunk, block * int(fixed + per_row * chunk + 12 * classes)


def extra_bytes(
    rows: int,
    width: int,
    heads: int,
    classes: int,
    dtype: torch.dtype = torch.bfloat16,
    weight_dtype: torch.dtype = torch.float32,
    features_gradient: bool = False,
    max_logit_bytes: int = 256 * 2**20,
) -> int:
    """Bound on the bytes that the kernels need besides inputs, losses and gradients (computed).

    Args:
        rows, width, heads, classes: B, D, H and C.
        dtype: of the products: the features' or autocast's.
        weight_dtype: of the weight and bias; gradients of low-precision ones exist in float32 first.
        features_gradient: whether features need one; it is summed over blocks in float32.
        max_logit_bytes: as in `multi_head_cross_entropy`.

    Not counted: copies of non-contiguous inputs, the vendor library's workspace and, where that library has no float32
    result for low-precision products (ROCm), their operands and result in float32.
    """
    peak = _blocks(rows, width, heads, classes, dtype.itemsize, dtype != weight_dtype, max_logit_bytes)[2]
    partial_losses = 4 * heads * (rows + 16)
    in_float32 = 4 * heads * classes * (width + 1) if weight_dtype != torch.float32 else 0
    return peak + partial_losses + in_float32 + (4 * rows * width if features_gradient else 0)


def _add_product(out: Tensor, a: Tensor, b: Tensor, factor: float, accumulate: bool) -> None:
    """out [M, N] float32 = factor · a [M, K] @ b [K, N], added to what it holds or not."""
    if a.dtype == torch.float32:
        torch.addmm(out, a, b, beta=int(accumulate), alpha=factor, out=out)
    elif a.is_cuda and torch.version.hip is None:
        torch.addmm(out, a, b, out_dtype=torch.float32, beta=int(accumulate), alpha=factor, out=out)
    elif accumulate:
        out.add_(matmul_float32(a, b), alpha=factor)
    else:
        torch.mul(matmul_float32(a, b), factor, out=out)


def _launch(
    logits: Tensor, bias: Tensor | None, labels: Tensor, smoothing: Tensor | None, scale: Tensor | None,
    losses: Tensor, share: float, gradients: bool, by_bias: Tensor | None,
) -> None:  # fmt: skip
    """Kernel of one block: logits [rows, heads · C] → losses [heads, programs], gradients in place and by the bias."""
    rows, heads = len(logits), len(losses)
    classes = logits.shape[1] // heads
    vector = math.gcd(classes, 8)
    groups, stride = classes // vector, losses.stride(0)
    if classes > max(TILES):
        block, warps = STREAMED
        with torch.cuda.device_of(logits):
            _row_kernel[rows, heads](
                logits, bias, labels, smoothing, scale, losses, heads, groups, stride, share,
                VECTOR=vector, BLOCK=block, GRADIENTS=gradients, num_warps=warps,
            )  # fmt: skip
        if by_bias is not None:
            torch.sum(logits, 0, dtype=torch.float32, out=by_bias).mul_(share)
        return
    block = max(16, 1 << (classes - 1).bit_length())
    tile_rows, warps = TILES[block]
    size = max(tile_rows, FEWEST_ROWS)
    while size < MOST_ROWS and -(-rows // (2 * size)) * heads >= 4 * processors(logits.device):
        size *= 2
    programs = -(-rows // size)
    column_sums = logits.new_empty((programs, logits.shape[1]), dtype=torch.float32) if by_bias is not None else None
    with torch.cuda.device_of(logits):
        _tile_kernel[programs, heads](
            logits, bias, labels, smoothing, scale, losses, column_sums, rows, heads, groups, stride, size // tile_rows,
            share, VECTOR=vector, BLOCK=block, ROWS=tile_rows, GRADIENTS=gradients, num_warps=warps,
        )  # fmt: skip
    if column_sums is not None:
        torch.sum(column_sums, 0, out=by_bias)


def _run(
    features: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, smoothing: Tensor | None,
    upstream: Tensor | None, max_logit_bytes: int, wanted: list[bool], into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Losses and their gradients, times upstream, by features, weight and bias: float32, empty where not wanted.

    into: contiguous tensors for the last two, or None for new ones.
    """
    rows, (heads, classes, width) = len(features), weight.shape
    shapes = (rows, width), (heads, classes, width), (heads, classes)
    gradients = [features.new_empty(s if w else 0, dtype=torch.float32) for s, w in zip(shapes, wanted, strict=True)]
    if into is not None:
        gradients[1:] = into
    by_features, by_weight, by_bias = gradients
    least_rows = FEWEST_ROWS if classes <= max(TILES) else 1  # of one program
    losses = features.new_zeros((heads, -(-rows // least_rows)), dtype=torch.float32)
    if rows == 0 or heads == 0:
        return losses.sum(1), by_features.zero_(), by_weight.zero_(), by_bias.zero_()
    bias, labels = None if bias is None else bias.contiguous(), labels.contiguous()
    copied = weight.dtype != features.dtype or not weight.is_contiguous()
    block, chunk, _ = _blocks(rows, width, heads, classes, features.element_size(), copied, max_logit_bytes)
    factor = None
    if upstream is not None and features.dtype == torch.float16:
        # In the upper part of fp16's range, whatever the upstream gradients are: GradScaler makes them 65536 and more.
        factor = 16384 / upstream.abs().nan_to_num(0, 0, 0).amax().clamp_min(1e-30)
        upstream = upstream * factor
    for first in range(0, heads, block):
        part = slice(first, min(first + block, heads))
        low = weight[part].to(features.dtype).flatten(0, 1)
        b, epsilon, scale = (None if x is None else x[part] for x in (bias, smoothing, upstream))
        for start in range(0, rows, chunk):
            x, y = features[start : start + chunk], labels[start : start + chunk]
            logits = x @ low.t()
            partial = losses[part, start // least_rows :]
            sums = by_bias[part].view(-1) if wanted[2] else None
            if sums is not None and start > 0:
                sums = torch.empty_like(sums)
            _launch(logits, b, y, epsilon, scale, partial, 1 / rows, any(wanted), sums)
            if sums is not None and start > 0:
                by_bias[part].view(-1).add_(sums)
            if wanted[1]:
                _add_product(by_weight[part].flatten(0, 1), logits.t(), x, 1 / rows, start > 0)
            if wanted[0]:
                _add_product(by_features[start : start + chunk], logits, low, 1 / rows, first > 0)
            del logits, sums  # before the next block's are allocated
        del low
    if factor is not None:
        for gradient in gradients:
            gradient /= factor
    return losses.sum(1), by_features, by_weight, by_bias


@torch.library.custom_op("shiftlens::multi_head_cross_entropy", mutates_args=())
def _operation(
    features: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, smoothing: Tensor | None,
    upstream: Tensor | None, max_logit_bytes: int, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    with torch.autocast(features.device.type, enabled=False):
        return _run(features, weight, bias, labels, smoothing, upstream, max_logit_bytes, wanted)


@_operation.register_fake
def _(features, weight, bias, labels, smoothing, upstream, max_logit_bytes, wanted):  # type: ignore[no-untyped-def]
    shapes = features.shape, weight.shape, weight.shape[:2]
    by_input = (features.new_empty(s if w else 0, dtype=torch.float32) for s, w in zip(shapes, wanted, strict=True))
    return features.new_empty(weight.shape[:1], dtype=torch.float32), *by_input


@torch.library.custom_op("shiftlens::scale_heads_", mutates_args=("values",))
def _scale_heads(values: Tensor, factors: Tensor) -> None:
    """values [H, ...] *= factors [H]; declared as a mutation, so that autograd notices a second use."""
    if values.numel():
        length, (block, warps) = values[0].numel(), SCALE
        with torch.cuda.device_of(values):
            _scale_kernel[-(-length // block), len(values)](values, factors, length, BLOCK=block, num_warps=warps)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, ctx.max_logit_bytes, ctx.wanted = inputs
    ctx.ready = any(ctx.wanted)
    ctx.types = [None if tensor is None else tensor.dtype for tensor in tensors[:3]]
    ctx.save_for_backward(*(output[1:] if ctx.ready else tensors))
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():  # by create_graph=True
        raise RuntimeError("multi_head_cross_entropy is twice differentiable only with kernel='reference'")
    if upstream is None:
        return (None,) * 8
    upstream = upstream.contiguous()
    wanted = ctx.wanted if ctx.ready else ctx.needs_input_grad[:3]
    if ctx.ready:
        found = ctx.saved_tensors
        if type(found[1]) is Tensor:
            for gradient in found[1:]:
                _scale_heads(gradient, upstream)
        else:  # torch.compile traces: its graphs cannot hold a mutation of what the forward pass returned
            _, weight, bias = found
            found = None, weight * upstream[:, None, None], bias * upstream[:, None]
    else:
        found = _operation(*ctx.saved_tensors, upstream, ctx.max_logit_bytes, wanted)[1:]
    given = (g.to(kind) if want else None for g, kind, want in zip(found, ctx.types, wanted, strict=True))
    return (*given, *(None,) * 5)


_operation.register_autograd(_backward, setup_context=_save)


def _shapes(*inputs: Any) -> str:
    """The inputs in words, for messages."""
    names = "features", "weight", "bias", "labels", "label_smoothing"
    tensors = {name: x for name, x in zip(names, inputs, strict=True) if isinstance(x, Tensor)}
    return ", ".join(f"{name} {tuple(x.shape)} {x.dtype} on {x.device}" for name, x in tensors.items())


def _checked(
    features: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, label_smoothing: float | Tensor, limit: int
) -> Tensor | None:
    """Smoothing [H] or None, once shapes, types and values are found to fit. Raises ValueError."""
    inputs = features, weight, bias, labels, label_smoothing
    if features.dim() != 2 or weight.dim() != 3 or features.shape[1] != weight.shape[2] or weight.shape[1] == 0:
        raise ValueError(f"need features [B, D], weight [H, C, D] and at least one class: {_shapes(*inputs)}")
    if labels.shape != features.shape[:1] or (bias is not None and bias.shape != weight.shape[:2]):
        raise ValueError(f"need labels [B] and bias [H, C]: {_shapes(*inputs)}")
    floating = [tensor for tensor in (features, weight, bias) if tensor is not None]
    if labels.dtype != torch.int64 or not all(tensor.is_floating_point() for tensor in floating):
        raise ValueError(f"need floating-point features, weight and bias and int64 labels: {_shapes(*inputs)}")
    smoothing = None
    if isinstance(label_smoothing, Tensor):
        smoothing = label_smoothing.detach()
        if smoothing.shape != weight.shape[:1]:
            raise ValueError(f"need one label_smoothing or [H]: {_shapes(*inputs)}")
        if smoothing.device.type == "cpu" and not torch.compiler.is_compiling():
            outside = smoothing[~((smoothing >= 0) & (smoothing <= 1))]
            if len(outside):
                raise ValueError(f"label_smoothing {outside.tolist()} outside [0, 1]: {_shapes(*inputs)}")
    elif not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing {label_smoothing} outside [0, 1]: {_shapes(*inputs)}")
    elif label_smoothing:
        kind = torch.float64 if features.dtype == torch.float64 else torch.float32
        smoothing = features.new_full(weight.shape[:1], label_smoothing, dtype=kind)
    if any(tensor.device != features.device for tensor in (*floating, labels, smoothing) if tensor is not None):
        raise ValueError(f"tensors on several devices: {_shapes(*inputs)}")
    if limit < 1:
        raise ValueError(f"max_logit_bytes must be positive, not {limit}")
    return smoothing


def multi_head_cross_entropy(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    label_smoothing: float | Tensor = 0.0,
    max_logit_bytes: int = 256 * 2**20,
    kernel: Kernel = "auto",
) -> Tensor:
    """Mean cross-entropy [H] of each of H linear heads, float32 (float64 for float64 features); 0 for no rows.

    Every head's loss and gradients are those of a head trained alone with `torch.nn.functional.cross_entropy`.

    Args:
        features: [B, D], shared by all heads, any floating type; products run in it, or in autocast's type.
        weight: [H, C, D], any floating type; best a float32 master copy.
        bias: [H, C] or None.
        labels: [B] int64 in [0, C). Others: ValueError on the CPU, NaN losses on a GPU.
        label_smoothing: in [0, 1], one for all heads or a tensor [H] (no gradient; its values are checked on the CPU
            only).
        max_logit_bytes: bound on the kernels' blocks: logits, low-precision weights and partial sums. At least one
            head and 64 rows are taken at a time, whatever it says. The reference does not heed it.
        kernel: `auto`, `triton` or `reference`, see kernels/dispatch.py.

    Raises:
        ValueError: shapes, types or devices that do not fit, smoothing outside [0, 1], a kernel that cannot run here.
    """
    smoothing = _checked(features, weight, bias, labels, label_smoothing, max_logit_bytes)
    triton = use_triton("multi_head_cross_entropy", kernel, features, weight, bias)
    device = features.device.type
    if torch.is_autocast_enabled(device) and features.dtype != torch.float64:
        features = features.to(torch.get_autocast_dtype(device))
    if not triton:
        return multi_head_cross_entropy_reference(features, weight, bias, labels, smoothing)
    smoothing = None if smoothing is None else smoothing.float().contiguous()
    # Gradients by features sum over heads what has to be multiplied by the upstream gradient of each: not ready now.
    ready = torch.is_grad_enabled() and not features.requires_grad
    wanted = [False, ready and weight.requires_grad, ready and bias is not None and bias.requires_grad]
    losses: Tensor = _operation(features, weight, bias, labels, smoothing, None, max_logit_bytes, wanted)[0]
    return losses


@torch.no_grad()
def multi_head_gradients(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    by_weight: Tensor,
    by_bias: Tensor,
    *,
    label_smoothing: float | Tensor = 0.0,
    max_logit_bytes: int = 256 * 2**20,
    kernel: Kernel = "auto",
) -> Tensor:
    """The losses [H] of `multi_head_cross_entropy`, and their gradients without autograd, for frozen features.

    Args:
        by_weight, by_bias: float32 [H, C, D] and [H, C], contiguous; overwritten by each head's gradients.
        others: as in `multi_head_cross_entropy`, but that plain PyTorch heeds `max_logit_bytes` here too.

    Raises ValueError as there, and for gradients of another shape or type.
    """
    smoothing = _checked(features, weight, bias, labels, label_smoothing, max_logit_bytes)
    for name, gradient, like in (("by_weight", by_weight, weight), ("by_bias", by_bias, bias)):
        if gradient.shape != like.shape or gradient.dtype != torch.float32 or not gradient.is_contiguous():
            raise ValueError(f"{name} must be contiguous float32 {list(like.shape)}, not {list(gradient.shape)}")
    triton = use_triton("multi_head_cross_entropy", kernel, features, weight, bias)
    device = features.device.type
    if torch.is_autocast_enabled(device):
        features = features.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        if triton:
            smoothing = None if smoothing is None else smoothing.float().contiguous()
            wanted, into = [False, True, True], (by_weight, by_bias)
            return _run(features, weight, bias, labels, smoothing, None, max_logit_bytes, wanted, into)[0]
        return _plain_gradients(features, weight, bias, labels, smoothing, max_logit_bytes, by_weight, by_bias)


def _plain_gradients(
    features: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, smoothing: Tensor | None, max_logit_bytes: int,
    by_weight: Tensor, by_bias: Tensor,
) -> Tensor:  # fmt: skip
    """What `multi_head_gradients` promises, in plain PyTorch: log-softmax once, everything after it in its place."""
    rows, (heads, classes, _) = len(features), weight.shape
    losses = weight.new_zeros(heads, dtype=torch.float32)
    if rows == 0 or heads == 0:
        by_weight.zero_()
        by_bias.zero_()
        return losses
    if features.device.type == "cpu" and not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(f"labels from {labels.min()} to {labels.max()} for {classes} classes")
    valid = torch.where((labels >= 0) & (labels < classes), 1.0, float("nan"))
    # A logit exists in the product's type, in float32 twice for a moment, and as what goes into the second product.
    most = max(1, max_logit_bytes // (classes * (8 + 2 * features.element_size())))
    block, chunk = (most // rows, rows) if most >= rows else (1, max(most, min(rows, FEWEST_CHUNK_ROWS)))
    for first in range(0, heads, block):
        part = slice(first, min(first + block, heads))
        low, low_bias = (x[part].flatten(0, 1).to(features.dtype) for x in (weight, bias))
        for start in range(0, rows, chunk):
            x, y, ok = (tensor[start : start + chunk] for tensor in (features, labels, valid))
            p = F.linear(x, low, low_bias).view(len(x), -1, classes).float().log_softmax(2)
            place = y.clamp(0, classes - 1)[:, None, None].expand(-1, p.shape[1], 1)
            own = -p.gather(2, place).squeeze(2)
            if smoothing is not None:
                epsilon = smoothing[part].float()
                # A masked class has log p = -inf, which must not meet a smoothing of 0.
                own = torch.where(epsilon == 0, own, (1 - epsilon) * own - epsilon * p.mean(2))
            losses[part] += (own * ok[:, None]).sum(0)
            p.exp_()
            if smoothing is None:
                p.scatter_add_(2, place, (-1 * ok)[:, None, None].expand_as(place))
            else:
                p -= (epsilon / classes)[:, None]
                p.scatter_add_(2, place, ((epsilon - 1) * ok[:, None])[:, :, None])
            sums = p.sum(0)
            by_bias[part] = sums if start == 0 else by_bias[part] + sums
            p = p.flatten(1).to(features.dtype)
            _add_product(by_weight[part].flatten(0, 1), p.t(), x, 1 / rows, start > 0)
            del p
    by_bias /= rows
    return losses / rows
