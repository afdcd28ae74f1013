"""Builds of kernels/probe_loss.py: every tile size, training with all options, and the loss alone with none."""

from kernels.probe_loss import SCALE, STREAMED, TILES, _row_kernel, _scale_kernel, _tile_kernel
from tests.builds import Build

SIZES = dict.fromkeys(("rows", "heads", "class_groups", "loss_stride", "tiles"), "i32") | {"share": "fp32"}
OPTIONS = dict.fromkeys(("bias", "smoothing", "scale", "column_sums"), "*fp32")
# Odd numbers of classes: a thread keeps an address for each of its logits, in at most 128 registers with 16 warps.
NARROW_SPILLS = 96


def tile(block: int, kind: str, trained: bool, vector: int = 8, one: bool = False) -> Build:
    """`one`: all sizes 1, which Triton compiles as constants."""
    rows, warps = TILES[block]
    sizes = {name: type_ for name, type_ in SIZES.items() if not one or name == "share"}
    pointers = {"logits": f"*{kind}", "labels": "*i64", "losses": "*fp32"} | (OPTIONS if trained else {})
    constants: dict[str, int | None] = {"VECTOR": vector, "BLOCK": block, "ROWS": rows, "GRADIENTS": trained}
    constants |= dict.fromkeys([] if trained else OPTIONS) | dict.fromkeys(SIZES.keys() - sizes.keys(), 1)
    name = f"tile {block} {kind} {'gradients' if trained else 'loss'}{' vector ' + str(vector) if vector < 8 else ''}"
    wide = trained and vector == 8 and not one
    spills = NARROW_SPILLS if trained and vector < 8 else 0
    return Build(name, _tile_kernel, pointers | sizes, constants, warps, wide=wide, spills=spills)


def row(kind: str, trained: bool) -> Build:
    options = {name: type_ for name, type_ in OPTIONS.items() if name != "column_sums"}
    sizes = {name: SIZES[name] for name in ("heads", "class_groups", "loss_stride", "share")}
    pointers = {"logits": f"*{kind}", "labels": "*i64", "losses": "*fp32"} | (options if trained else {})
    constants = {"VECTOR": 8, "BLOCK": STREAMED[0], "GRADIENTS": trained} | ({} if trained else dict.fromkeys(options))
    name = f"row {kind} {'gradients' if trained else 'loss'}"
    return Build(name, _row_kernel, pointers | sizes, constants, STREAMED[1], wide=trained)


def builds() -> list[Build]:
    """Rows of a multiple of 8 classes must move in 16-byte accesses."""
    scale = {"values": "*fp32", "factors": "*fp32", "length": "i32"}
    return [
        *(tile(block, kind, True) for block in TILES for kind in ("bf16", "fp32")),
        *(tile(block, "bf16", False) for block in TILES),
        *(tile(block, "fp16", True, vector=1) for block in (16, 1024, 8192)),
        tile(16, "fp32", True, vector=1, one=True),
        tile(16, "fp32", False, vector=1, one=True),
        *(row(kind, trained) for kind in ("bf16", "fp32") for trained in (True, False)),
        Build("scale", _scale_kernel, scale, {"BLOCK": SCALE[0]}, SCALE[1], aligned=("length",), wide=True),
    ]
