"""One step of projected gradient ascent for a whole batch: direction, step, ball and box in as few passes as it takes.

    box_then_ball   a = clip(adv + s·u, 0, 1);  δ = project(a - clean);            adv' = clean + δ
    ball_then_box   a = adv + s·u;              δ = project(a - clean);            adv' = clip(clean + δ, 0, 1)
    nearest         a = adv + s·u;              adv' = the point of ball and box nearest to a

Shapes: adv, grad, clean [B, ...] with one sample per row; s (step) and eps are numbers or [B]. Per sample:

    norm   direction u                                       project(δ)
    linf   sign(g), sign(0) = 0                              clip(δ, -eps, eps)
    l2     g/‖g‖, or g/(‖g‖ + 1e-10) (ball first)            δ·eps/(‖δ‖ + 1e-7) (box first), δ·eps/‖δ‖, where ‖δ‖ > eps
    l1     g/‖g‖₁                                            nearest point of the L1 ball: soft threshold (Duchi 2008)

The l2 row has the published ones: box_then_ball is SmoothAdv's PGD_L2 (Salman et al., arXiv:1906.04584), ball_then_box
torchattacks' PGDL2. A zero gradient moves nothing, unless `zero_direction` is given (SmoothAdv draws randn, not
normalised). Gradients are divided by their largest entry before they are squared, so that neither 1e-30 nor 1e30 is
lost. With clean in [0, 1] every order ends inside ball and box: projections only shrink |δᵢ|. The published ones do not
end at the nearest point of the intersection, except for linf, where all three are the same function. For l2 that point
is clip((a + t·clean)/(1 + t), 0, 1) with t = 0 or, if that is outside the ball, the t that puts it on the sphere (the
conditions of Karush, Kuhn and Tucker). Newton's method finds s = 1/(1 + t), exactly and within few steps. l1 has no
`nearest`.

Not differentiable: inputs are detached. Two more things are written on the way if asked for: `out` (may be adv itself)
and `model_input`, what the model reads next: adv' + noise in its own type and memory format, m copies of each sample.

Precision: arithmetic in float32, rounded once to adv's type, which may leave the ball by half an ulp a pixel, never the
box. Reference and kernels differ by roundings only (linf: not at all). bfloat16 has 8 bits: at step 0.25/255 three
quarters of the pixels move by more than 25 % too much or too little, at 0.8/255 0.4 % do, and l2 steps (about 1e-3 a
pixel) drown. Keep adv in float32 and let `model_input` be the bfloat16 copy; it is made from adv' as stored. A sample
whose gradient holds NaN or infinity becomes NaN (linf: only pixels whose gradient is NaN).

Bytes, in units of N = one batch in adv's type (computed; all tensors of that type, no model_input):

    linf; l2 and l1 up to 16,384 values a sample   1 kernel   4 N: read adv, grad, clean, write adv'
    l2 above, ball_then_box                        2 kernels  7 N: 3 N for <g,g>, <g,δ>, <δ,δ>, then 4 N; ‖δ + s·u‖
                                                   follows from the three without another pass
    l2 above, box_then_ball                        3 kernels  8 N: ‖g‖ (1 N), ‖δ‖ after the box (3 N), 4 N

against 17 N to 20 N (7 to 14 kernels) in the published codes and 4 N or 8 N under torch.compile. With float32 adv and
clean, a bfloat16 gradient and a bfloat16 model_input a value costs 16 bytes in the first case, cast and change of
memory format included. Each later pass runs through the batch in the opposite direction, so that it finds the end of
the one before in the L2 cache. Between passes there are four float32 sums for each 4,096 values, nothing larger.

The reference runs on CPU, for float64, and for l1 and l2 nearest above 16,384 values (logged). Memory formats: each
tensor contiguous or channels-last on its own, by index arithmetic; 16-byte accesses need it to be adv's. Copied first
are inputs with other strides, a zero_direction in another format than adv and, for l2 and l1 of 4,097 to 16,384 values,
whatever is read in another format: registers are full. No atomics: results repeat bit for bit; nothing waits for the
device.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (kernels' arguments have types of Triton's)

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from kernels.dispatch import HAS_TRITON, INTERPRETED, Kernel, jit, tl, triton, use_triton

Norm = Literal["linf", "l2", "l1"]
Order = Literal["box_then_ball", "ball_then_box", "nearest"]
Number = float | Tensor
ORDERS: tuple[str, ...] = get_args(Order)

# (values, warps) of one program. A row program holds its sample in registers: the first entry that is long enough.
ROW_BLOCKS = ((1024, 4), (4096, 8), (16384, 16))
ELEMENTWISE_BLOCK = (1024, 4)
CHUNK = (4096, 8)
LONGEST_ROW = ROW_BLOCKS[-1][0]
NEWTON_STEPS = 32  # of the reference: more than enough, as what is missing times the slope falls fourfold in each

_INTERPRETED: Any = tl.constexpr(INTERPRETED) if HAS_TRITON else INTERPRETED


def _reference(
    images: tuple[Tensor, Tensor, Tensor], step: Number, eps: Number, norm: Norm, order: Order, zero: Tensor | None
) -> Tensor:
    """adv, grad, clean → adv', in float32 (float64 if any is): the formulas above, literally, in place once copied."""
    compute = torch.float64 if any(image.dtype == torch.float64 for image in images) else torch.float32
    x, g, c = (image.to(compute).reshape(image.shape[0], -1) for image in images)
    step, eps = (value.to(compute)[:, None] if isinstance(value, Tensor) else value for value in (step, eps))
    box_first = order == "box_then_ball"
    if norm == "linf":
        direction = torch.maximum(g.sign(), g.clamp(max=-1))  # sign alone makes 0 of NaN
    else:
        largest = g.abs().amax(1, keepdim=True)
        still = largest == 0
        scale = largest.masked_fill(still, 1)
        direction = g / scale
        length = torch.linalg.vector_norm(direction, 1 if norm == "l1" else 2, 1, keepdim=True)
        if norm == "l2" and order == "ball_then_box":
            length += 1e-10 / scale
        direction /= length.masked_fill_(still, 1)
        if zero is not None:
            direction = torch.where(still, zero.to(compute).reshape(x.shape), direction)
    moved = direction.mul_(step).add_(x)
    delta = (moved.clamp_(0, 1) if box_first else moved).sub_(c)
    if norm == "linf":
        delta.clamp_(-eps, eps)  # type: ignore[arg-type]
    elif norm == "l1":
        delta = _project_l1(delta, eps)
    elif order == "nearest":
        delta *= _nearest_share(delta, c, eps)
    else:
        length = torch.linalg.vector_norm(delta, dim=1, keepdim=True)
        delta *= torch.where(length <= eps, 1.0, eps / (length + 1e-7 if box_first else length))
    moved = delta.add_(c)
    return (moved if box_first else moved.clamp_(0, 1)).reshape(images[0].shape)


def _nearest_share(delta: Tensor, clean: Tensor, eps: Number) -> Tensor:
    """The s [B, 1] with which clip(clean + s·delta, 0, 1) is the point of ball and box nearest to clean + delta.

    Newton's method as in the kernel. The number of its steps is fixed so that nothing waits for the device.
    """
    size = delta.abs()
    room = torch.where(delta > 0, 1 - clean, clean)
    squares, faces = size.square(), room.square()
    total = torch.minimum(squares, faces).sum(1, keepdim=True)
    bound = eps * eps
    share = torch.zeros_like(total)
    free = room > 0
    for _ in range(NEWTON_STEPS):
        slope = torch.where(free, squares, 0).sum(1, keepdim=True)
        kept = torch.where(free, 0, faces).sum(1, keepdim=True)
        slope.masked_fill_(slope == 0, float("inf"))
        share = torch.maximum(share, ((bound - kept).clamp(min=0) / slope).sqrt())
        was, free = free, share * size < room
        if clean.device.type == "cpu" and not torch.compiler.is_compiling() and bool((was == free).all()):
            break
    return torch.where(total <= bound, 1.0, torch.where(total == total, share, total))


def _project_l1(delta: Tensor, eps: Number) -> Tensor:
    """Nearest point of the L1 ball of radius eps to each row of delta [B, D] (Duchi et al. 2008, by sorting)."""
    magnitude = delta.abs()
    descending = magnitude.sort(1, descending=True).values
    excess = descending.cumsum(1) - eps
    rank = torch.arange(1, delta.shape[1] + 1, device=delta.device)
    kept = (descending * rank > excess).sum(1, keepdim=True).clamp(min=1)
    threshold = excess.gather(1, kept - 1) / kept
    projected = delta.sign() * (magnitude - threshold).clamp(min=0)
    return torch.where(magnitude.sum(1, keepdim=True) <= eps, delta, projected)


@jit
def _setting(number, each, row):
    """A sample's step or eps: the number, or its own from each [B] float32."""
    return tl.cast(number, tl.float32) if each is None else tl.load(each + row)


@jit
def _place(tensor, row, index, values, inner, SWAPPED: tl.constexpr):
    """Where a sample's value, counted in adv's memory order, lies in a tensor of the same or the other format."""
    if SWAPPED:
        index = index % inner * (values // inner) + index // inner
    return tensor + row * values + index


@jit
def _read(tensor, row, index, inside, values, inner, SWAPPED: tl.constexpr):
    return tl.load(_place(tensor, row, index, values, inner, SWAPPED), mask=inside, other=0.0).to(tl.float32)


@jit
def _read_images(adv, grad, clean, row, index, inside, values, inner, GRAD: tl.constexpr, CLEAN: tl.constexpr):
    x = _read(adv, row, index, inside, values, inner, False)
    g = _read(grad, row, index, inside, values, inner, GRAD)
    return x, g, _read(clean, row, index, inside, values, inner, CLEAN)


@jit
def _clip(value, low, high):
    value = tl.maximum(value, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(value, high, propagate_nan=tl.PropagateNan.ALL)


@jit
def _rounded(value, tensor):
    """float32 → the tensor's type, to nearest even."""
    if _INTERPRETED and tensor.dtype.element_ty == tl.bfloat16:  # Triton's interpreter cuts off instead of rounding
        bits = value.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        value = tl.where(value == value, nearest.to(tl.float32, bitcast=True), value)
    return value.to(tensor.dtype.element_ty)


@jit
def _write(out, model_input, noise, value, row, index, inside, values, inner, copies, BOX_FIRST: tl.constexpr,
           OUT: tl.constexpr, MODEL: tl.constexpr, NOISE: tl.constexpr):  # fmt: skip
    """adv' to out [B, ...] and, with noise, to rows row·copies … of model_input [B·copies, ...]."""
    stored = _rounded(value if BOX_FIRST else _clip(value, 0.0, 1.0), out)
    tl.store(_place(out, row, index, values, inner, OUT), stored, mask=inside)
    if model_input is not None:
        for copy in range(copies):
            seen = stored.to(tl.float32)
            if noise is not None:
                seen += _read(noise, row * copies + copy, index, inside, values, inner, NOISE)
            place = _place(model_input, row * copies + copy, index, values, inner, MODEL)
            tl.store(place, _rounded(seen, model_input), mask=inside)


@jit
def _largest(g):
    """max |g|; infinity if there is a NaN, which a GPU's maximum passes over: among zeros it is no zero gradient."""
    return tl.max(tl.where(g == g, tl.abs(g), float("inf")), 0)


@jit
def _unit(g, largest):
    """Gradient over its largest entry: its square neither vanishes nor overflows."""
    return g / tl.where(largest == 0, 1.0, largest)


@jit
def _rate(step, largest, length, EXACT: tl.constexpr):
    """What to multiply _unit(g, largest), of norm `length`, by; 0 for a zero gradient. EXACT: without the 1e-10."""
    still = largest == 0
    if not EXACT:
        length += tl.div_rn(tl.cast(1e-10, tl.float32), tl.where(still, 1.0, largest))
    return tl.where(still, 0.0, tl.div_rn(step, tl.where(still, 1.0, length)))


@jit
def _moved(x, g, zero, row, index, values, step, largest, rate, BOX_FIRST: tl.constexpr):
    """adv after the step, in the box if that comes first."""
    moved = x + rate * _unit(g, largest)
    if zero is not None:
        still = largest == 0
        needed = index < tl.where(still, values, 0)
        moved = tl.where(still, x + step * _read(zero, row, index, needed, values, 1, False), moved)
    return _clip(moved, 0.0, 1.0) if BOX_FIRST else moved


@jit
def _l2_factor(squares, bound, BOX_FIRST: tl.constexpr):
    """What brings δ with this sum of squares back to the ball; NaN for NaN."""
    length = tl.sqrt_rn(squares)
    return tl.where(length <= bound, 1.0, tl.div_rn(bound, length + 1e-7 if BOX_FIRST else length))


@jit
def _l1_threshold(magnitude, bound):
    """t with Σ max(|δ| - t, 0) = bound, by Newton's method from below: it ends when no more values fall under t."""
    total = tl.sum(magnitude, 0)
    excess = total - bound
    active = tl.sum((magnitude > 0).to(tl.float32), 0)
    threshold = excess * 0.0
    going = excess > 0
    while going:
        threshold += excess / active
        excess = tl.sum(tl.maximum(magnitude - threshold, 0.0), 0) - bound
        left = tl.sum((magnitude > threshold).to(tl.float32), 0)
        going = (left < active) & (excess > 0)
        active = left
    return tl.where(total <= bound, 0.0, tl.where(total == total, threshold, total))


@jit
def _share(delta, clean, bound):
    """The s ≤ 1 with ‖clip(clean + s·δ, 0, 1) - clean‖ = bound; 1 if that is in the ball already.

    Newton's method in s², in which the square of the norm is concave and piecewise linear: from below it never goes too
    far, and it ends when no more values reach a face of the box. Only δ and clean are held: registers are full.
    """
    change = _clip(clean + delta, 0.0, 1.0) - clean
    total = tl.sum(change * change, 0)
    share = tl.div_rn(bound, tl.sqrt_rn(tl.sum(delta * delta, 0)))
    free = delta.shape[0]
    going = total > bound * bound
    while going:
        moved = clean + share * delta
        inside = (moved > 0) & (moved < 1)
        change = tl.where(inside, share * delta, _clip(moved, 0.0, 1.0) - clean)
        still_free = tl.sum(inside.to(tl.int32), 0)
        moving = tl.sum(tl.where(inside, change * change, 0.0), 0)
        kept = tl.sum(tl.where(inside, 0.0, change * change), 0)
        going = (still_free < free) & (moving > 0)
        left = tl.maximum(bound * bound - kept, 0.0)
        share = tl.where(going, share * tl.sqrt_rn(tl.div_rn(left, moving)), share)
        free = still_free
    return tl.where(total <= bound * bound, 1.0, tl.where(total == total, share, total))


# In all kernels GRAD, CLEAN, OUT, MODEL and NOISE say whether that tensor has the other memory format than adv.


@jit
def _linf_kernel(adv, grad, clean, out, model_input, noise, step_size, step_sizes, eps, eps_each,
                 values, inner, copies, chunks, BOX_FIRST: tl.constexpr, GRAD: tl.constexpr, CLEAN: tl.constexpr,
                 OUT: tl.constexpr, MODEL: tl.constexpr, NOISE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One block of one sample."""
    row = (tl.program_id(0) // chunks).to(tl.int64)
    index = tl.program_id(0) % chunks * BLOCK + tl.arange(0, BLOCK)
    inside = index < values
    x, g, c = _read_images(adv, grad, clean, row, index, inside, values, inner, GRAD, CLEAN)
    bound = _setting(eps, eps_each, row)
    moved = x + _setting(step_size, step_sizes, row) * tl.where(g > 0, 1.0, tl.where(g < 0, -1.0, g))
    if BOX_FIRST:
        moved = _clip(moved, 0.0, 1.0)
    moved = c + _clip(moved - c, -bound, bound)
    _write(out, model_input, noise, moved, row, index, inside, values, inner, copies, BOX_FIRST, OUT, MODEL, NOISE)


@jit
def _row_kernel(adv, grad, clean, zero, out, model_input, noise, step_size, step_sizes, eps, eps_each,
                values, inner, copies, L1: tl.constexpr, BOX_FIRST: tl.constexpr, NEAREST: tl.constexpr,
                GRAD: tl.constexpr, CLEAN: tl.constexpr, OUT: tl.constexpr, MODEL: tl.constexpr, NOISE: tl.constexpr,
                BLOCK: tl.constexpr):  # fmt: skip
    """l2 or l1: one sample, held in registers."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCK)
    inside = index < values
    x, g, c = _read_images(adv, grad, clean, row, index, inside, values, inner, GRAD, CLEAN)
    step, bound = _setting(step_size, step_sizes, row), _setting(eps, eps_each, row)
    largest = _largest(g)
    unit = _unit(g, largest)
    length = tl.sum(tl.abs(unit), 0) if L1 else tl.sqrt_rn(tl.sum(unit * unit, 0))
    rate = _rate(step, largest, length, L1 or BOX_FIRST or NEAREST)
    moved = _moved(x, g, zero, row, index, values, step, largest, rate, BOX_FIRST)
    delta = tl.where(inside, moved - c, 0.0)
    if NEAREST:
        delta *= _share(delta, c, bound)
    elif L1:
        left = tl.abs(delta) - _l1_threshold(tl.abs(delta), bound)
        left = tl.maximum(left, 0.0, propagate_nan=tl.PropagateNan.ALL)
        delta = tl.where(delta < 0, -left, left) * tl.where(bound > 0, 1.0, 0.0)
    else:
        delta *= _l2_factor(tl.sum(delta * delta, 0), bound, BOX_FIRST)
    _write(out, model_input, noise, c + delta, row, index, inside, values, inner, copies, BOX_FIRST, OUT, MODEL, NOISE)


@jit
def _sums_kernel(adv, grad, clean, partials, values, inner, chunks, BOX_FIRST: tl.constexpr, GRAD: tl.constexpr,
                 CLEAN: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Long samples, first pass: max |g| and, g being divided by it, <g,g>, <g,δ>, <δ,δ> of one chunk of adv's δ.

    partials [B, 4, chunks]; with BOX_FIRST only the first two, as δ will be that after the box.
    """
    row = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    index = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = index < values
    place = partials + row * 4 * chunks + chunk
    g = _read(grad, row, index, inside, values, inner, GRAD)
    largest = _largest(g)
    unit = _unit(g, largest)
    tl.store(place, largest)
    tl.store(place + chunks, tl.sum(unit * unit, 0))
    if not BOX_FIRST:
        x = _read(adv, row, index, inside, values, inner, False)
        delta = x - _read(clean, row, index, inside, values, inner, CLEAN)
        tl.store(place + 2 * chunks, tl.sum(unit * delta, 0))
        tl.store(place + 3 * chunks, tl.sum(delta * delta, 0))


@jit
def _long_kernel(adv, grad, clean, zero, out, model_input, noise, partials, step_size, step_sizes, eps, eps_each,
                 values, inner, copies, chunks, BOX_FIRST: tl.constexpr, GRAD: tl.constexpr, CLEAN: tl.constexpr,
                 OUT: tl.constexpr, MODEL: tl.constexpr, NOISE: tl.constexpr, PARTS: tl.constexpr,
                 BLOCK: tl.constexpr):  # fmt: skip
    """Long samples (l2), later passes: one chunk's <δ,δ> after step and box (out is None), or its adv'."""
    backward = (out is None) == BOX_FIRST  # the pass before went forward: begin with what it left in the cache
    program = tl.num_programs(0) - 1 - tl.program_id(0) if backward else tl.program_id(0)
    row = (program // chunks).to(tl.int64)
    index = program % chunks * BLOCK + tl.arange(0, BLOCK)
    inside = index < values
    x, g, c = _read_images(adv, grad, clean, row, index, inside, values, inner, GRAD, CLEAN)
    step, bound = _setting(step_size, step_sizes, row), _setting(eps, eps_each, row)
    part = tl.arange(0, PARTS)
    place = partials + row * 4 * chunks + part
    most = tl.load(place, mask=part < chunks, other=0.0)
    largest = tl.max(most, 0)
    ratio = _unit(most, largest)
    squares = tl.sum(tl.load(place + chunks, mask=part < chunks, other=0.0) * ratio * ratio, 0)
    rate = _rate(step, largest, tl.sqrt_rn(squares), BOX_FIRST)
    moved = _moved(x, g, zero, row, index, values, step, largest, rate, BOX_FIRST)
    delta = moved - c
    if out is None:
        delta = tl.where(inside, delta, 0.0)
        tl.store(partials + (row * 4 + 3) * chunks + program % chunks, tl.sum(delta * delta, 0))
    else:
        distances = tl.sum(tl.load(place + 3 * chunks, mask=part < chunks, other=0.0), 0)
        if not BOX_FIRST:
            # ‖δ + s·u‖². Its roundings can make it negative, but only far inside the ball, where it is not used.
            products = tl.sum(tl.load(place + 2 * chunks, mask=part < chunks, other=0.0) * ratio, 0)
            distances += rate * (2 * products + rate * squares)
            distances = tl.maximum(distances, 0.0, propagate_nan=tl.PropagateNan.ALL)
        moved = c + delta * _l2_factor(distances, bound, BOX_FIRST)
        _write(out, model_input, noise, moved, row, index, inside, values, inner, copies, BOX_FIRST, OUT, MODEL, NOISE)


def _channels_last(tensor: Tensor) -> bool:
    return tensor.ndim > 2 and tensor.movedim(1, -1).is_contiguous()


def _dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_contiguous() or _channels_last(tensor) else tensor.contiguous()


def _ordered(tensor: Tensor, plain: bool) -> Tensor:
    """The tensor, contiguous (`plain`) or channels-last; copied if it is not."""
    if tensor.is_contiguous() if plain else _channels_last(tensor):
        return tensor
    return tensor.contiguous() if plain else tensor.movedim(1, -1).contiguous().movedim(-1, 1)


def _launch(
    out: Tensor,
    adv: Tensor | None,
    grad: Tensor,
    clean: Tensor,
    model_input: Tensor | None,
    noise: Tensor | None,
    zero: Tensor | None,
    step_size: float,
    step_sizes: Tensor | None,
    eps: float,
    eps_each: Tensor | None,
    norm: str,
    order: str,
) -> None:
    """The kernels as an operator that compilers see. adv None: `out` holds it, as an operator's inputs may not overlap.

    That is safe in the kernels: what one program writes, no other program and no later pass reads.
    """
    box_first = order == "box_then_ball"
    adv, grad, clean = _dense(out if adv is None else adv), _dense(grad), _dense(clean)
    noise = None if noise is None else _dense(noise)
    samples, values = adv.shape[0], adv.numel() // adv.shape[0]
    plain, channels = adv.is_contiguous(), adv.shape[1] if adv.ndim > 1 else 1
    zero = None if zero is None else _ordered(zero, plain)
    step_sizes, eps_each = (None if each is None else each.contiguous() for each in (step_sizes, eps_each))
    if norm != "linf" and ROW_BLOCKS[-2][0] < values <= LONGEST_ROW:
        # Registers hold three values of such a sample, but not also their places in another memory format.
        grad, clean = _ordered(grad, plain), _ordered(clean, plain)
        noise = None if noise is None else _ordered(noise, plain)
    flagged = {"GRAD": grad, "CLEAN": clean, "OUT": out, "MODEL": model_input, "NOISE": noise}
    formats = {name: x is not None and x.is_contiguous() != plain for name, x in flagged.items()}
    images = {"adv": adv, "grad": grad, "clean": clean}
    written = {"out": out, "model_input": model_input, "noise": noise}
    sizes = {"values": values, "inner": values // channels if plain else channels}
    numbers = {"step_size": step_size, "step_sizes": step_sizes, "eps": eps, "eps_each": eps_each}
    copies = 1 if model_input is None else model_input.shape[0] // samples
    common = {**images, **sizes, **numbers, **formats, "copies": copies, "BOX_FIRST": box_first}
    with torch.cuda.device_of(adv):
        if norm != "linf" and values <= LONGEST_ROW:
            block, warps = next(entry for entry in ROW_BLOCKS if values <= entry[0])
            launch = {"BLOCK": block, "num_warps": warps}
            mode = {"L1": norm == "l1", "NEAREST": order == "nearest"}
            _row_kernel[(samples,)](**common, **written, **launch, **mode, zero=zero)
            return
        block, warps = ELEMENTWISE_BLOCK if norm == "linf" else CHUNK
        chunks = -(-values // block)
        launch = {"chunks": chunks, "BLOCK": block, "num_warps": warps}
        grid = (samples * chunks,)
        if norm == "linf":
            _linf_kernel[grid](**common, **written, **launch)
            return
        partials = torch.empty(samples, 4, chunks, device=adv.device)
        read = {"GRAD": formats["GRAD"], "CLEAN": formats["CLEAN"], "BOX_FIRST": box_first}
        _sums_kernel[grid](**images, **sizes, **launch, **read, partials=partials)
        common |= {"zero": zero, "partials": partials, "PARTS": triton.next_power_of_2(chunks)}
        if box_first:
            _long_kernel[grid](**common, **launch, out=None, model_input=None, noise=None)
        _long_kernel[grid](**common, **written, **launch)


_pgd_step = torch.library.custom_op("shiftlens::pgd_step", _launch, mutates_args=("out", "model_input"))


@_pgd_step.register_fake
def _(*_arguments: Any) -> None:
    return None


def _memory(tensor: Tensor) -> tuple[int, int]:
    """First address, and the one after the last."""
    start, length = tensor.data_ptr(), tensor.numel()
    if not tensor.is_contiguous():
        length = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + length * tensor.element_size()


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same memory in the same order."""
    return one.data_ptr() == other.data_ptr() and (one.stride(), one.dtype) == (other.stride(), other.dtype)


def _check_images(adv: Tensor, others: dict[str, Tensor]) -> None:
    """Types and shapes of the tensors that belong to adv [B, ...]; model_input and noise are [m·B, ...]."""
    shape = tuple(adv.shape)
    if not shape:
        raise ValueError("adv () has no samples: it must be [B, ...]")
    for name, image in {"adv": adv, **others}.items():
        if not image.is_floating_point() or (name == "out" and image.dtype != adv.dtype):
            raise ValueError(f"{name} {tuple(image.shape)} has type {image.dtype}, adv {shape} {adv.dtype}")
        many = name in ("model_input", "noise") and image.ndim > 0
        copies = max(image.shape[0] // max(shape[0], 1), 1) if many else 1
        if image.shape != (copies * shape[0], *shape[1:]):
            raise ValueError(f"{name} {tuple(image.shape)} does not fit adv {shape}")
    seen, noise = others.get("model_input"), others.get("noise")
    if noise is not None and (seen is None or seen.shape != noise.shape):
        held = None if seen is None else tuple(seen.shape)
        raise ValueError(f"noise {tuple(noise.shape)} needs a model_input of its shape, not {held}")


def _check_written(written: dict[str, Tensor], inputs: dict[str, Tensor]) -> None:
    """Strides of the outputs, and that they share no memory with each other or with inputs."""
    for name, image in written.items():
        if not (image.is_contiguous() or _channels_last(image)):
            raise ValueError(f"{name} {tuple(image.shape)} is neither contiguous nor channels-last: {image.stride()}")
    if not written or torch.compiler.is_compiling():  # there are no addresses while compiling
        return
    taken = {name: (image, *_memory(image)) for name, image in inputs.items()}
    for name, image in written.items():
        start, end = _memory(image)
        for other, (tensor, first, last) in taken.items():
            if first < end and start < last:
                raise ValueError(f"{name} {tuple(image.shape)} overlaps {other} {tuple(tensor.shape)} in memory")
        taken[name] = image, start, end


def _check_number(name: str, value: Number, samples: int) -> None:
    if isinstance(value, Tensor):
        if value.shape != (samples,) or value.dtype != torch.float32:
            raise ValueError(f"{name} {tuple(value.shape)} {value.dtype} must be [{samples}] float32, one per sample")
    elif not (value >= 0 if name == "eps" else abs(value) < float("inf")):
        raise ValueError(f"{name} must be a {'number >= 0' if name == 'eps' else 'finite number'}, not {value}")


@torch.no_grad()
def pgd_step(
    adv: Tensor,
    grad: Tensor,
    clean: Tensor,
    *,
    step_size: Number,
    eps: Number,
    norm: Norm,
    order: Order = "box_then_ball",
    noise: Tensor | None = None,
    out: Tensor | None = None,
    model_input: Tensor | None = None,
    zero_direction: Tensor | None = None,
    kernel: Kernel = "auto",
) -> Tensor:
    """The next adversarial images, in the eps ball around `clean` and in [0, 1]. Not differentiable.

    Args:
        adv: images to move [B, ...], in [0, 1] (as `clean`; not checked here), any floating type.
        grad: gradient of what is to grow, like adv; any scale.
        clean: centres of the balls, like adv.
        step_size: length of the step in `norm`; a number (negative: descent) or [B] float32.
        eps: radius of the ball; a number >= 0 (0 returns clean, inf means no ball) or [B] float32. Values of tensors
            are not checked. torch.compile compiles numbers in: give it what changes between calls as a tensor.
        norm, order: see above.
        noise: [m·B, ...] added to what goes into `model_input`; row i·m + j is copy j of sample i.
        out: receives the result, of adv's shape and type; may be `adv`. None: a new tensor in adv's memory format.
        model_input: [m·B, ...] of any floating type; receives result + noise, rounded once.
        zero_direction: like adv; moves samples whose gradient is exactly zero, by step_size times it (l2 in order
            box_then_ball).
        kernel: see kernels/dispatch.py.

    Returns:
        `out`, or the new tensor.

    Raises:
        ValueError: shapes that do not fit, tensors that are not floating or lie on several devices, eps negative or
            NaN, a step that is not finite, an unknown norm or order, outputs that overlap inputs (other than out = adv)
            or whose strides are neither contiguous nor channels-last, kernel="triton" where the kernels cannot run.
    """
    if norm not in ("linf", "l2", "l1") or order not in ORDERS:
        raise ValueError(f"norm must be linf, l2 or l1 and order one of {', '.join(ORDERS)}: {norm!r}, {order!r}")
    if (norm, order) == ("l1", "nearest"):
        raise ValueError("order nearest is for l2 and linf: of the L1 ball and the box only the published orders exist")
    named = {"grad": grad, "clean": clean, "noise": noise, "zero_direction": zero_direction}
    inputs = {name: image for name, image in named.items() if image is not None}
    written = {name: x for name, x in (("out", out), ("model_input", model_input)) if x is not None}
    _check_images(adv, inputs | written)
    if zero_direction is not None and (norm, order) != ("l2", "box_then_ball"):
        raise ValueError(f"zero_direction {tuple(adv.shape)}: only for l2 in order box_then_ball, not {norm}, {order}")
    in_place = out is adv or (out is not None and not torch.compiler.is_compiling() and _same(out, adv))
    _check_written(written, inputs if in_place else {"adv": adv, **inputs})
    _check_number("step_size", step_size, adv.shape[0])
    _check_number("eps", eps, adv.shape[0])
    # Triton and torch know Python's numbers, not NumPy's.
    step_size, eps = (value if isinstance(value, Tensor) else float(value) for value in (step_size, eps))
    operation = "pgd_step"
    if (norm == "l1" or (norm, order) == ("l2", "nearest")) and adv[:1].numel() > LONGEST_ROW:
        operation = f"pgd_step ({norm if norm == 'l1' else order}, samples above {LONGEST_ROW} values)"
        if kernel == "triton":
            raise ValueError(f"{operation}: kernel='triton' cannot run: adv {tuple(adv.shape)}")
        kernel = "reference"
    each = [value if isinstance(value, Tensor) else None for value in (step_size, eps)]
    fused = use_triton(operation, kernel, adv, *inputs.values(), *written.values(), *each)
    if out is None:
        out = torch.empty_like(
            adv, memory_format=torch.preserve_format if _channels_last(adv) else torch.contiguous_format
        )
    if not adv.numel():
        return out
    if fused:
        step, bound = (0.0 if isinstance(value, Tensor) else value for value in (step_size, eps))
        old = None if in_place else adv
        inputs_of_kernels = (out, old, grad, clean, model_input, noise, zero_direction)
        settings = (step, each[0], bound, each[1], norm, order)
        if torch.compiler.is_compiling():
            _pgd_step(*inputs_of_kernels, *settings)
        else:  # the operator's way through torch's dispatcher takes longer than a step on a small batch
            _launch(*inputs_of_kernels, *settings)
            torch.autograd.graph.increment_version(list(written.values()))
        return out
    out.copy_(_reference((adv, grad, clean), step_size, eps, norm, order, zero_direction))
    if model_input is not None:
        seen = out.repeat_interleave(model_input.shape[0] // adv.shape[0], 0)
        seen = seen.to(torch.promote_types(out.dtype, torch.float32))
        model_input.copy_(seen if noise is None else seen + noise)
    return out
