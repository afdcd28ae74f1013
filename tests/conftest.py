"""Shared by all tests: the repository's packages come first on the path, one thread per process, a fixed hypothesis profile."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two spinning OpenMP threads on a busy machine are many times slower than one

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import hypothesis  # noqa: E402
import pytest  # noqa: E402

hypothesis.settings.register_profile("shiftlens", derandomize=True, deadline=None, max_examples=40)
hypothesis.settings.load_profile("shiftlens")


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
