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
# The assembler spills a few registers where that lets one program more fit on a multiprocessor.
FEW = 32
PUBLISHED = ("box_then_ball", "ball_then_box")


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
    return [*_linf(plain, half, attack), *_rows(plain, half, attack), *_long(plain, attack)]


def _common(order: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compile-time values where all is in one memory format and a multiple of 16, and where nothing is."""
    box_first = order == "box_then_ball"
    # Triton compiles 1 in, and one copy is the rule; the mixed builds have any number.
    aligned = {"BOX_FIRST": box_first, "copies": 1, **SAME, "aligned": ("values",)}
    return aligned, {"BOX_FIRST": box_first, **OTHER, "each": True}


def _linf(plain: dict[str, str], half: dict[str, str], attack: dict[str, str]) -> list[Build]:
    found = []
    for order in PUBLISHED:  # `nearest` runs ball_then_box
        aligned, mixed = _common(order)
        builds = [("fp32", plain, {**aligned, "wide": True}), ("attack, mixed formats", attack, mixed)]
        if order == "ball_then_box":
            builds += [("bf16", half, {**aligned, "wide": True}), ("attack, aligned", attack, aligned)]
        for name, types, options in builds:
            found.append(_build(f"linf, {order}, {name}", pgd._linf_kernel, pgd.ELEMENTWISE_BLOCK, types, **options))
    return found


def _rows(plain: dict[str, str], half: dict[str, str], attack: dict[str, str]) -> list[Build]:
    found = []
    modes = [(norm, order) for norm in ("l2", "l1") for order in pgd.ORDERS if (norm, order) != ("l1", "nearest")]
    for block, (norm, order) in product(pgd.ROW_BLOCKS, modes):
        aligned, mixed = ({**options, "L1": norm == "l1", "NEAREST": order == "nearest"} for options in _common(order))
        if order == "nearest":
            aligned["spills"] = FEW
        if block == pgd.ROW_BLOCKS[-1]:
            # The launcher sees to it that what is read has adv's format. Still, three values of each of 32 places
            # take 96 of 128 registers: unaligned places of outputs in the other format do not fit besides.
            mixed |= {"GRAD": False, "CLEAN": False, "NOISE": False, "spills": 1024}
        most = {**attack, "zero": "fp32"} if (norm, order) == ("l2", "box_then_ball") else attack
        builds = [("fp32", plain, aligned), ("attack, mixed formats", most, mixed)]
        if (norm, order) == ("l1", "box_then_ball"):
            builds.pop()  # ball_then_box has what this has, and one clip more at the end
        if block == pgd.ROW_BLOCKS[1]:  # that of CIFAR's images
            builds += [("bf16", half, aligned)] if order == "ball_then_box" else []
            builds += [("attack, aligned", most, aligned)] if norm == "l2" else []
        for name, types, options in builds:
            found.append(_build(f"{norm}, {order}, {block[0]}, {name}", pgd._row_kernel, block, types, **options))
    return found


def _long(plain: dict[str, str], attack: dict[str, str]) -> list[Build]:
    found = []
    for order in PUBLISHED:
        aligned, mixed = _common(order)
        most = {**attack, "zero": "fp32"} if order == "box_then_ball" else attack
        builds = [("fp32", plain, aligned), ("attack, mixed formats", most, mixed)]
        if order == "ball_then_box":
            builds.append(("attack, aligned", most, aligned))
        for kind, types, options in builds:
            name = f"l2, {order}, long, {kind}"
            found.append(_build(f"{name}, sums", pgd._sums_kernel, pgd.CHUNK, types, **options))
            options = {**options, "spills": FEW}
            for parts in (8, 64) if types is plain and order == "ball_then_box" else (64,):
                found.append(_build(f"{name}, {parts}", pgd._long_kernel, pgd.CHUNK, types, PARTS=parts, **options))
            if order == "box_then_ball":
                measured = {key: kind for key, kind in types.items() if key in ("adv", "grad", "clean", "zero")}
                found.append(_build(f"{name}, box", pgd._long_kernel, pgd.CHUNK, measured, PARTS=64, **options))
    return found
