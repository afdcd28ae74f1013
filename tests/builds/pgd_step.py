"""Builds of kernels/pgd_step.py: every kernel, block size, norm and order; types, memory formats and extras in turn."""

from __future__ import annotations

from itertools import product
from typing import Any

from kernels import pgd_step as pgd
from tests.builds import Build

IMAGES = ("adv", "grad", "clean", "zero", "out", "model_input", "noise")
SIZES = {"values": "i32", "inner": "i32", "copies": "i32", "chunks": "i32"}
SAME = {"GRAD": False, "CLEAN": False, "OUT": False, "MODEL": False, "NOISE": False}
OTHER = dict.fromkeys(SAME, True)


def _build(name: str, kernel: Any, block: tuple[int, int], types: dict[str, str], **options: Any) -> Build:
    """`types`: image → element type, absent ones are None; `options`: compile-time values, and Build's own."""
    extra = {key: options.pop(key) for key in ("aligned", "wide", "spills") if key in options}
    arguments = kernel.arg_names
    each = options.pop("each", False)
    signature = {name: f"*{types[name]}" for name in IMAGES if name in arguments and name in types}
    signature |= {name: kind for name, kind in SIZES.items() if name in arguments and name not in options}
    absent = [name for name in IMAGES if name in arguments and name not in types]
    if "partials" in arguments:
        signature["partials"] = "*fp32"
    if "step_size" in arguments:
        signature |= {"step_size": "fp32", "eps": "fp32"}
        if each:
            signature |= {"step_sizes": "*fp32", "eps_each": "*fp32"}
        else:
            absent += ["step_sizes", "eps_each"]
    constants = {"BLOCK": block[0], **dict.fromkeys(absent), **options}
    constants = {name: value for name, value in constants.items() if name in arguments}
    return Build(name, kernel, signature, constants, warps=block[1], **extra)


def builds() -> list[Build]:
    """What pgd_step launches."""
    plain = dict.fromkeys(("adv", "grad", "clean", "out"), "fp32")
    half = dict.fromkeys(plain, "bf16")
    # float32 state, bfloat16 gradient, and the next input of the model with noise: what an attack in bfloat16 runs.
    attack = {**plain, "grad": "bf16", "model_input": "bf16", "noise": "fp32"}
    found = []
    for box_first in (True, False):
        order = "box_then_ball" if box_first else "ball_then_box"
        # Triton compiles 1 in, and one copy is the rule; the mixed builds have any number.
        common = {"BOX_FIRST": box_first, "copies": 1, **SAME}
        mixed = {"BOX_FIRST": box_first, **OTHER, "each": True}
        start = {"zero": "fp32"} if box_first else {}
        aligned = {**common, "aligned": ("values",)}
        block = pgd.ELEMENTWISE_BLOCK
        wide = {"aligned": ("values",), "wide": True}
        kernel = pgd._linf_kernel
        found += [
            _build(f"linf, {order}, fp32", kernel, block, plain, **common, **wide),
            _build(f"linf, {order}, bf16", kernel, block, half, **common, **wide),
            _build(f"linf, {order}, attack, aligned", kernel, block, attack, **common, aligned=("values",)),
            _build(f"linf, {order}, attack, mixed formats", kernel, block, attack, **mixed),
        ]
        for block, l1 in product(pgd.ROW_BLOCKS, (False, True)):
            name = f"{'l1' if l1 else 'l2'}, {order}, {block[0]}"
            row = {**common, "L1": l1}
            formats: dict[str, Any] = {**mixed, "L1": l1}
            if block == pgd.ROW_BLOCKS[-1]:
                # The launcher sees to it that what is read has adv's format. Still, three values of each of 32 places
                # take 96 of 128 registers: unaligned places of outputs in the other format do not fit besides.
                formats |= {"GRAD": False, "CLEAN": False, "NOISE": False, "spills": 1024}
            extra = attack if l1 else {**attack, **start}
            kernel = pgd._row_kernel
            found += [
                _build(f"{name}, fp32", kernel, block, plain, **row, aligned=("values",)),
                _build(f"{name}, attack, mixed formats", kernel, block, extra, **formats),
            ]
            if block == pgd.ROW_BLOCKS[1]:
                found += [
                    _build(f"{name}, bf16", kernel, block, half, **row, aligned=("values",)),
                    _build(f"{name}, attack, aligned", kernel, block, extra, **row, aligned=("values",)),
                ]
        for kind, types, options in (
            ("fp32", plain, aligned),
            ("attack, aligned", {**attack, **start}, aligned),
            ("attack, mixed formats", {**attack, **start}, mixed),
        ):
            name = f"l2, {order}, long, {kind}"
            found.append(_build(f"{name}, sums", pgd._sums_kernel, pgd.CHUNK, types, **options))
            # The assembler spills two registers where that lets one program more fit on a multiprocessor.
            options = {**options, "spills": 16}
            for parts in (8, 64) if types is plain else (64,):
                found.append(_build(f"{name}, {parts}", pgd._long_kernel, pgd.CHUNK, types, PARTS=parts, **options))
            if box_first:
                measured = {key: kind for key, kind in types.items() if key in ("adv", "grad", "clean", "zero")}
                found.append(_build(f"{name}, box", pgd._long_kernel, pgd.CHUNK, measured, PARTS=64, **options))
    return found
