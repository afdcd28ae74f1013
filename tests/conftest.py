"""Shared by all tests: this repository first on the path, one thread per process, a fixed hypothesis profile."""

import ctypes
import gc
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # two spinning OpenMP threads on a busy machine are many times slower than one

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

HAS_TRIM = hasattr(ctypes.CDLL(None), "malloc_trim")  # glibc, on Linux

# Without a GPU the Triton kernels themselves run in Triton's interpreter; it decides when triton is first imported.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"


def _patch_the_language_once() -> None:
    """Triton's interpreter makes triton.language its own at each launch, and anew whenever a kernel calls a helper.

    That is most of what small launches take. Here nothing is compiled, so for each module of kernels once is enough.
    """
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    patch, patched = interpreter._patch_lang, set()

    def patch_once(function: Any) -> Any:
        if id(function.__globals__) not in patched:
            patch(function)
            patched.add(id(function.__globals__))
        return interpreter._LangPatchScope()  # of which nothing is restored after the launch

    interpreter._patch_lang = patch_once


if DEVICE == "cpu":
    _patch_the_language_once()

hypothesis.settings.register_profile("shiftlens", derandomize=True, deadline=None, max_examples=40)
hypothesis.settings.load_profile("shiftlens")


def pytest_collection_finish() -> None:
    """What is imported by now stays: without it in its way, a garbage collection (each run ends with one) is quick."""
    gc.collect()
    gc.freeze()


_resident = 0


def pytest_runtest_logfinish() -> None:
    """Memory that a large test leaves behind goes back: a fork takes time in proportion, and many tests fork."""
    global _resident
    if not HAS_TRIM:
        return
    if resident() > _resident + 2**27:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        _resident = resident()


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="session")
def device() -> str:
    """Where kernels are tested: `cuda`, or `cpu` with Triton's interpreter."""
    return DEVICE


@pytest.fixture(scope="session")
def goldens() -> Path:
    """Folder of reference figures made by running the original research code."""
    return ROOT / "tests" / "goldens"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data sets kept beside the repository; tests that need them skip where they are absent."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"real data not found at {folder}")
    return folder


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of 50, 47 and 39 random 32x32 images in ten classes."""
    import io
    import json

    import numpy as np
    import webdataset
    from PIL import Image

    folder = tmp_path_factory.mktemp("tiny_shards")
    generator = np.random.default_rng(0)
    sizes = {}
    for shard, count in enumerate((50, 47, 39)):
        name = f"{shard:06d}.tar"
        with webdataset.TarWriter(str(folder / name), encoder=False) as writer:
            for i in range(count):
                buffer = io.BytesIO()
                # Smooth colour fields: features of a random teacher differ between them, as between real images.
                coarse = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
                Image.fromarray(coarse).resize((32, 32), Image.Resampling.BICUBIC).save(buffer, "PNG")
                label = str(int(generator.integers(10))).encode()
                writer.write({"__key__": f"{shard}-{i}", "png": buffer.getvalue(), "cls": label})
        sizes[name] = count
    (folder / "sizes.json").write_text(json.dumps(sizes))
    return folder


@pytest.fixture(scope="session")
def tiny_vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Name of a random two-block CLIP ViT for 32x32 images, in open_clip's folder layout."""
    import json

    import open_clip
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("tiny_vit")
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32},
        "text_cfg": {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 1, "layers": 1},
    }
    torch.manual_seed(1)
    model = open_clip.CLIP(**config)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    content = {"model_cfg": config, "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    return f"local-dir:{folder}"
