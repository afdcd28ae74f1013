"""Every kernel of kernels/distill_loss.py in every configuration that it ships."""

from kernels.distill_loss import (
    GROUP,
    KINDS,
    SCALE_BLOCK,
    TILES,
    _project_kernel,
    _rows_kernel,
    _scale_kernel,
    row_blocks,
)
from tests.builds import Build


def builds() -> list[Build]:
    return [*projections(), *rows(), *scalings()]


def projections() -> list[Build]:
    found = []
    integers = ("rows", "width", "inner", "features_stride", "weight_stride", "target_stride")
    for target, tiles in TILES.items():
        for tile in tiles:
            for smooth, gradients, element in ((False, True, "bf16"), (False, False, "bf16"), (True, True, "fp16")):
                signature = {
                    "features": f"tensordesc<{element}[{tile.m}, {tile.k}]>" if tile.tma else f"*{element}",
                    "weight": f"tensordesc<{element}[{tile.n}, {tile.k}]>" if tile.tma else f"*{element}",
                    **dict.fromkeys(("bias", "target"), f"*{element}"),
                    **dict.fromkeys(("row_scale", "losses"), "*fp32"),
                    **dict.fromkeys(integers, "i32"),
                    **dict.fromkeys(("loss_scale", "gradient_scale", "beta"), "fp32"),
                }
                pointers = {"gradient": f"*{element}", "bias_gradient": "*fp32"}
                constants = {
                    **{"SMOOTH": smooth, "TMA": tile.tma, "UPCAST": False, "GROUP": GROUP, "HALVES": tile.halves},
                    **{"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k},
                    **({} if gradients else dict.fromkeys(pointers)),
                }
                found.append(
                    Build(
                        f"project {tile.m}x{tile.n} {element}"
                        + " smooth_l1" * smooth + " losses only" * (not gradients),
                        _project_kernel,
                        signature | (pointers if gradients else {}),
                        constants,
                        warps=tile.warps,
                        stages=tile.stages,
                        targets=(target,),
                        aligned=integers[1:],
                        matrix=True,
                        wide=gradients,
                    )
                )  # fmt: skip
    return found


def rows() -> list[Build]:
    found = []
    for kind, element, width, gradients in (
        *((kind, element, 768, True) for kind in KINDS for element in ("bf16", "fp32")),
        *((kind, "fp32" if kind == "kl" else "bf16", 5000, True) for kind in KINDS),
        ("mse", "bf16", 104, True),
        ("cosine", "bf16", 2048, False),
        ("kl", "bf16", 1000, False),
        ("kl", "bf16", 1000, True),
    ):
        per_program, block, blocks = row_blocks(width)
        pointers = {"gradient": f"*{element}"} if gradients else {}
        signature = {
            **dict.fromkeys(("prediction", "target"), f"*{element}"),
            **dict.fromkeys(("row_scale", "losses"), "*fp32"),
            "rows": "i32",
            **dict.fromkeys(("loss_scale", "gradient_scale", "parameter"), "fp32"),
        }
        constants = {"KIND": KINDS.index(kind), "ROWS": per_program, "BLOCK": block, "BLOCKS": blocks, "width": width}
        constants |= dict.fromkeys(("prediction_stride", "target_stride", "gradient_stride"), width)
        found.append(
            Build(
                f"rows {kind} {element} {width}" + " losses only" * (not gradients),
                _rows_kernel,
                signature | pointers,
                constants | ({} if gradients else {"gradient": None}),
                warps=8,
                wide=gradients,
            )
        )
    return found


def scalings() -> list[Build]:
    return [
        Build(
            f"scale {element}",
            _scale_kernel,
            {
                "features_gradient": f"*{element}",
                **dict.fromkeys(("weight_gradient", "bias_gradient", "factor"), "*fp32"),
                **dict.fromkeys(("weight_result", "bias_result"), f"*{element}"),
                **dict.fromkeys(("features_count", "weight_count", "bias_count"), "i32"),
            },
            {"BLOCK": SCALE_BLOCK},
            warps=8,
            aligned=("features_count", "weight_count", "bias_count"),
            wide=True,
        )
        for element in ("bf16", "fp32")
    ]
