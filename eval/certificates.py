"""Certificates of images on disk, and the curves drawn from them: what eval/certify.py keeps between its starts.

Apart from the script, which they would make longer than a script should be.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data import DataError
from data.rows import read_rows, write_synced

if TYPE_CHECKING:
    from data.small import ImageSet

Row = dict[str, Any]  # of an image, or of a result
NEEDED = {"image", "image_sha256", "label", "class", "correct", "seconds"}  # else a row is damaged


def image_sha256(images: ImageSet, place: int) -> str:
    """The first 16 hex digits of SHA-256 over an image, given by its place in `images`, and its label."""
    image = images.images[place].contiguous().numpy()
    digest = hashlib.sha256(repr((image.shape, int(images.labels[place]))).encode())
    digest.update(image.data)
    return digest.hexdigest()[:16]


class CertificateFile:
    """A file of certificates, a line of JSON for each image after one that says of what; only rank 0 has one.

    Its settings do not say which images, so that others can be added; each row says it of its own.

    Attributes:
        rows: by the image's number.
    """

    def __init__(self, folder: Path, settings: Row, title: str) -> None:
        """Reads what is there; a line that was cut short is left out. Raises DataError for a file of something else."""
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
        self.path = folder / "certificates" / f"{settings['mode']}_sigma{settings['sigma']:g}_{digest}.jsonl"
        self.rows: dict[int, Row] = {}
        self.path.parent.mkdir(exist_ok=True)
        head = {"settings": settings, "title": title}
        if self.path.is_file():
            known, rows = read_certificates(self.path)
            if known["settings"] != settings:
                raise DataError(f"{self.path}: holds certificates of other settings; use another --out")
            self.rows = rows
        # Written anew, so that what is appended does not continue a line that was cut short.
        write_synced(self.path, "".join(json.dumps(line) + "\n" for line in (head, *self.rows.values())))

    def check(self, hashes: Mapping[int, str]) -> None:
        """Raises DataError if rows are not of the images whose `image_sha256` is given under their numbers."""
        if any(self.rows[number].get("image_sha256") != sha256 for number, sha256 in hashes.items()):
            others = "holds certificates of other images under the same numbers"
            raise DataError(f"{self.path}: {others}; use another --out")

    def add(self, rows: Sequence[Row]) -> None:
        """Appends rows of images."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
        self.rows |= {row["image"]: row for row in rows}


def read_certificates(path: Path) -> tuple[Row, dict[int, Row]]:
    """The first line of a file of certificates, and its rows by image. Raises DataError if it is not one."""
    lines = read_rows(path)
    if not lines or not {"settings", "title"} <= lines[0].keys():
        raise DataError(f"{path}: not a file of certificates; remove it, or use another --out")
    rows = {row["image"]: row for row in lines[1:] if row.keys() >= NEEDED and type(row["image"]) is int}
    return lines[0], rows


def draw_curves(out: Path, chosen: Sequence[int], current: Path) -> None:
    """certified_accuracy.png and .svg: whatever in the folder has certificates of the same images."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    from attacks.votes import certified_accuracy
    from eval.figures import COLOURS, STYLE
    from eval.robustness import wilson

    def certified(known: Mapping[int, Row]) -> list[str | None]:
        """Hashes of the chosen images that a file has certificates of."""
        return [known[number].get("image_sha256") for number in chosen if number in known]

    same = certified(read_certificates(current)[1])
    curves = []
    for path in sorted(current.parent.glob("certify_*.jsonl"), key=lambda path: (path != current, path.name)):
        with contextlib.suppress(DataError):  # something else under such a name is no curve
            head, known = read_certificates(path)
            if certified(known) == same:
                curves.append((head, [known[number] for number in chosen]))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
        for (head, rows), colour in zip(curves, COLOURS * len(curves), strict=False):
            correct, radii = [row["correct"] for row in rows], np.array([row["radius"] for row in rows])
            grid = np.unique(np.concatenate([[0.0], radii]))  # the curve falls just after each of these
            shares = np.array([certified_accuracy(correct, radii, radius) for radius in grid])
            low, high = np.array([wilson(round(share * len(rows)), len(rows)) for share in shares]).T
            grid, shares, low, high = (
                np.append(grid, grid[-1]),
                np.append(shares, 0),
                np.append(low, 0),
                np.append(high, 0),
            )
            label = f"{head['title']}, σ = {head['settings']['sigma']:g}, n = {head['settings']['n']:,}"
            axes.plot(grid, 100 * shares, drawstyle="steps-pre", color=colour, label=label, linewidth=1.4)
            axes.fill_between(
                grid[:-1], 100 * low[:-1], 100 * high[:-1], step="pre", color=colour, alpha=0.2, linewidth=0
            )
        axes.set(
            xlabel="L2 radius, for pixels in [0, 1]", ylabel="certified accuracy, %", ylim=(0, 100), xlim=(0, None)
        )
        axes.grid(alpha=0.3)
        axes.legend(title=f"{len(chosen)} images; band: 95 % Wilson", fontsize=8)
        for suffix in ("png", "svg"):
            figure.savefig(
                out / f"certified_accuracy.{suffix}", dpi=150, metadata={"Date": None} if suffix == "svg" else {}
            )
        plt.close(figure)
