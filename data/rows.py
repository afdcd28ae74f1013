"""Results as rows: every reported number is a line of JSON that says where it comes from."""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_PACKAGES = ("torch", "torchvision", "accelerate", "open_clip_torch", "timm", "webdataset", "triton", "numpy")


def append_row(path: Path, *, metric: str, value: float, **fields: Any) -> dict[str, Any]:
    """Appends one result to a .jsonl file and returns the row.

    Args:
        path: the file, made if missing.
        metric: name of the number, with its unit where it has one (`images_per_second`).
        value: the number.
        fields: what else is known (n, interval, data set, weights' hash, config, seed, device); JSON-serialisable.

    The row also holds commit, versions, processors and date. One write call, so that concurrent writers do not mix.
    """
    row = {"metric": metric, "value": value, **fields, **provenance()}
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(file).st_size
        # A line cut short, by a full disk or a kill, must not swallow this one.
        start = "\n" if size and os.pread(file, 1, size - 1) != b"\n" else ""
        os.write(file, f"{start}{json.dumps(row)}\n".encode())
    finally:
        os.close(file)
    return row


def read_rows(path: Path, *needed: str) -> list[dict[str, Any]]:
    """The rows of a .jsonl file that have the `needed` keys; what is no such row is left out. No file, no rows.

    A kill or a full disk cuts lines short, and people edit these files.
    """
    rows: list[dict[str, Any]] = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                row = json.loads(line)
                if isinstance(row, dict) and row.keys() >= set(needed):
                    rows.append(row)
    return rows


def write_synced(path: Path, text: str) -> None:
    """Writes a small text file so that it is on disk, whole, or the old one stays."""
    temporary = path.with_name(f".tmp-{path.name}")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def provenance() -> dict[str, Any]:
    """What a number depends on besides its settings: commit, package versions, processors, date (UTC)."""
    return {
        "commit": commit(),
        "versions": versions(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


@functools.cache
def versions() -> dict[str, str]:
    """Python and the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


@functools.cache
def commit() -> str | None:
    """The repository's commit, with "+" when tracked files differ from it; None outside a repository.

    Looked up once: what runs is the code as it was read, whatever is committed meanwhile.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


@functools.cache
def processor() -> str:
    """The processor's model name, or its architecture where the system does not tell."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
