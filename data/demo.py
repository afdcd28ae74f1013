"""The built-in data set: ten classes of handwritten digits with a train, a val and five shift sets, as real shards.

    python data/demo.py                      builds it once (under half a minute), says where it is and what is in it
    python data/demo.py --figure demo.png    also draws a contact sheet: a row per set, a column per class

The default wherever no `--data` is given. The sets stand in for ImageNet and its five shifts in kind and in protocol:
folder names, class subsets, class maps and frames go through the packing and evaluation code of the real ones.

    train, val   digits over random backgrounds                          folders zero..nine
    v2           new digits, drawn anew, a little harder                 folders are label numbers, like ImageNetV2
    r            renditions: outline, mosaic, stencil, painting, neon    six of the ten classes, like ImageNet-R
    objectnet    turned, moved, on new backgrounds, in a red frame       `six_or_nine`: two classes, `empty`: none
    sketch       pencil lines on white                                   all classes, like ImageNet-Sketch
    a            what a nearest-neighbour classifier fitted on the       six classes, like ImageNet-A
                 train pixels gets wrong

No original digit is used in two of: train, val, the shift sets. The shards lie in `$SHIFTLENS_CACHE`, which defaults to
~/.cache/shiftlens.
"""

from __future__ import annotations

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import json
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data import DataError, demo_images
from data.command import Parser
from data.demo_images import CLASSES, Digits

VERSION = 2  # raise it whenever a pixel, a label or the layout changes: it names the cache folder and seeds the drawing
DEMO_TEACHER = f"local-dir:{Path(__file__).resolve().parent / 'demo_teacher'}"
NO_CLASS = -1
TURNED: dict[str, Any] = {"angle": 40, "scale": (0.55, 0.9), "shift": 5}  # how `place` moves the "turned" style


@dataclass(frozen=True)
class DemoSplit:
    """One set: folders in label order, the train classes that each label accepts, and the frame to cut off (pixels)."""

    folders: tuple[str, ...]
    accepts: tuple[tuple[int, ...], ...]
    border: int = 0

    @property
    def classes(self) -> list[int]:
        """The train classes that occur, ascending."""
        return sorted(label for labels in self.accepts for label in labels)

    def folder_of(self, label: int) -> str:
        """The folder of a train class."""
        return next(folder for folder, labels in zip(self.folders, self.accepts, strict=True) if label in labels)


def _plain(*labels: int) -> DemoSplit:
    return DemoSplit(tuple(CLASSES[label] for label in labels), tuple((label,) for label in labels))


# A six upside down is a nine. Labels follow the sorted folder names, as in the real ObjectNet protocol.
OBJECTNET_MAP: dict[str, list[int]] = dict(
    sorted({**{CLASSES[label]: [label] for label in range(10) if label not in (6, 9)}, "six_or_nine": [6, 9]}.items())
)
UNMAPPED_FOLDER = "empty"
DEMO_SPLITS: dict[str, DemoSplit] = {
    "train": _plain(*range(10)),
    "val": _plain(*range(10)),
    "v2": DemoSplit(tuple(str(label) for label in range(10)), tuple((label,) for label in range(10))),
    "r": _plain(0, 2, 3, 5, 7, 8),
    "objectnet": DemoSplit(tuple(OBJECTNET_MAP), tuple(tuple(labels) for labels in OBJECTNET_MAP.values()), border=2),
    "sketch": _plain(*range(10)),
    "a": _plain(1, 2, 4, 5, 7, 9),
}


# ---------------------------------------------------------------------------------------------------------- drawing


@dataclass(frozen=True)
class Drawn:
    """Pictures uint8 [N, S, S, 3]; train class and scikit-learn's number of the digit, int64 [N] (-1: no digit)."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    numbers: NDArray[np.int64]

    def take(self, index: NDArray) -> Drawn:
        """The pictures at `index`."""
        return Drawn(self.images[index], self.labels[index], self.numbers[index])


def draw_demo() -> dict[str, Drawn]:
    """Draws all seven sets in memory, in some ten seconds. The same VERSION gives the same pixels."""
    digits = demo_images.load_digits(seed=VERSION)
    train, val, held_out = digits["train"], digits["val"], digits["shift"]
    rng = {name: np.random.default_rng([VERSION, number]) for number, name in enumerate(DEMO_SPLITS)}
    renditions = ("outline", "mosaic", "stencil", "painting", "neon")
    harder: dict[str, Any] = {"angle": 14, "scale": (0.65, 0.95), "shift": 4}

    drawn = {
        "train": draw(train, ("photo",) * 5, rng["train"]),
        "val": draw(val, ("photo",) * 5, rng["val"]),
        "v2": draw(held_out, ("photo",) * 3, rng["v2"], **harder),
        "r": draw(_of_classes(held_out, DEMO_SPLITS["r"].classes), renditions, rng["r"]),
        "sketch": draw(held_out, ("sketch",) * 3, rng["sketch"]),
    }

    upside_down = rng["objectnet"].random(len(held_out.labels)) < 0.25
    turned = draw(held_out, ("turned",) * 3, rng["objectnet"], upside_down=upside_down, **TURNED)
    empty = demo_images.to_uint8(demo_images.backgrounds(120, rng["objectnet"], demo_images.NEW_BACKGROUNDS))
    nothing = np.full(len(empty), NO_CLASS)
    framed = np.concatenate([_red_frame(turned.images), _red_frame(empty)])
    drawn["objectnet"] = Drawn(framed, np.append(turned.labels, nothing), np.append(turned.numbers, nothing))

    candidates = draw(_of_classes(held_out, DEMO_SPLITS["a"].classes), ("photo",) * 16, rng["a"], **harder)
    wrong = nearest_neighbour(drawn["train"], candidates.images) != candidates.labels
    drawn["a"] = candidates.take(wrong)
    return {name: drawn[name] for name in DEMO_SPLITS}


def draw(
    digits: Digits, styles: Iterable[str], rng: np.random.Generator, *, upside_down: Any = None, **placing: Any
) -> Drawn:
    """Draws every digit once per entry of `styles`; `placing` goes to demo_images.place."""
    styles, step = tuple(styles), 400  # pictures at a time: float32 temporaries of tens of MB
    images = []
    for style in styles:
        for start in range(0, len(digits.labels), step):
            part = slice(start, start + step)
            flipped = None if upside_down is None else upside_down[part]
            placed = demo_images.place(digits.glyphs[part], rng, upside_down=flipped, **placing)
            images.append(demo_images.to_uint8(demo_images.STYLES[style](placed, rng)))
    return Drawn(np.concatenate(images), np.tile(digits.labels, len(styles)), np.tile(digits.numbers, len(styles)))


def _of_classes(digits: Digits, classes: list[int]) -> Digits:
    return digits.take(np.isin(digits.labels, classes))


def _red_frame(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    framed = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    for edge in (np.s_[:, :2], np.s_[:, -2:], np.s_[:, :, :2], np.s_[:, :, -2:]):
        framed[edge] = (255, 0, 0)
    return framed


def nearest_neighbour(train: Drawn, images: NDArray[np.uint8]) -> NDArray[np.int64]:
    """The class of the nearest train picture, by the difference from the rim's median grey in 2x2 cells.

    The features are whole numbers far below 2**53, so distances are exact and equal pixels give equal choices anywhere.
    """
    from sklearn.neighbors import KNeighborsClassifier

    def features(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
        grey = pixels.astype(np.int64) @ np.array([299, 587, 114]) // 1000
        rim = np.concatenate([grey[:, 0], grey[:, -1], grey[:, :, 0], grey[:, :, -1]], axis=1)
        difference = np.abs(grey - np.median(rim, axis=1).astype(np.int64)[:, None, None])
        return difference.reshape(len(grey), 16, 2, 16, 2).sum(axis=(2, 4)).reshape(len(grey), -1).astype(np.float64)

    classifier = KNeighborsClassifier(n_neighbors=1, algorithm="brute").fit(features(train.images), train.labels)
    return classifier.predict(features(images))


# --------------------------------------------------------------------------------------------------------- captions

STYLE_TEMPLATES = {
    "photo": ("a photo of a {}", "a photo of the digit {}"),
    "turned": ("a turned photo of a {}", "a {} on an odd ground"),
    "outline": ("an outline of a {}", "the contour of a {}"),
    "mosaic": ("a mosaic of a {}", "a {} made of tiles"),
    "stencil": ("a stencil of a {}", "a {} cut out of a sheet"),
    "painting": ("a painting of a {}", "a {} in brush strokes"),
    "neon": ("a neon sign of a {}", "a glowing {}"),
    "sketch": ("a sketch of a {}", "a pencil drawing of a {}"),
}


def caption_tokens(captions: Iterable[str], context_length: int = 32) -> NDArray[np.int64]:
    """Tokens [N, context_length] for the demo teacher's text tower: ASCII codes, then 127 as end of text, then zeros.

    127 is the largest code, so open_clip's "argmax" pooling finds it. A caption that does not fit raises ValueError.
    """
    rows = []
    for caption in captions:
        codes = caption.encode("ascii")
        if len(codes) >= context_length or 127 in codes:
            raise ValueError(f"caption {caption!r} does not fit into {context_length - 1} printable ASCII characters")
        rows.append([*codes, 127] + [0] * (context_length - 1 - len(codes)))
    return np.array(rows, dtype=np.int64)


# ----------------------------------------------------------------------------------------------------------- shards


def demo_shards(split: str) -> str:
    """The folder of one set's shards; the first call on a machine builds all sets (under half a minute).

    Raises DataError for a set that does not exist and for a cache folder that cannot be written.
    """
    if split not in DEMO_SPLITS:
        raise DataError(f"the demo has no set {split!r}: choose one of {', '.join(DEMO_SPLITS)}")
    try:
        cache = Path(os.environ.get("SHIFTLENS_CACHE") or Path.home() / ".cache" / "shiftlens").absolute()
    except RuntimeError:  # a user without a home, as containers have
        raise DataError("this user has no home folder: set SHIFTLENS_CACHE to the folder for the demo") from None
    folder = cache / f"demo-v{VERSION}"
    if not folder.is_dir():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache, prefix=f"{folder.name}-", suffix=".tmp") as scratch:
                _build(Path(scratch))
                _publish(Path(scratch, "shards"), folder)
        except OSError as error:
            place = error.filename or cache
            raise DataError(
                f"cannot build the demo in {place}: {error.strerror or error}; set SHIFTLENS_CACHE to another folder"
            ) from None
    return str(folder / split)


def located(data: str) -> str:
    """Where data are: for `demo` the folder of the built-in ones, which has a folder for each split."""
    return str(Path(demo_shards("train")).parent) if data == "demo" else data


def demo_student(runs: str = "runs") -> str:
    """Name, for `load_encoder`, of the newest student that train/distill.py has exported from the demo, in RUNS/*.

    Raises DataError where there is none.
    """
    import yaml

    found = []
    for settings in Path(runs).glob("*/config.yaml"):
        student = settings.parent / "export" / "student.safetensors"
        if student.is_file():
            config = yaml.safe_load(settings.read_text(encoding="utf-8"))
            if isinstance(config, dict) and config.get("data") == "demo" and "teacher" in config:
                found.append((student.stat().st_mtime, str(student.parent)))
    if not found:
        raise DataError(
            f"no student of the demo in {Path(runs).absolute()}/*/export: run `accelerate launch train/distill.py` "
            "first, or name an encoder (--encoder demo is the demo's teacher)"
        )
    return f"local-dir:{max(found)[1]}"


def demo_encoder(name: str) -> str:
    """The encoder that a setting names: `demo` = the demo's teacher, `demo_student` = its newest student, else itself.

    Raises DataError as `demo_student`.
    """
    return {"demo": lambda: DEMO_TEACHER, "demo_student": demo_student}.get(name, lambda: name)()


def _build(scratch: Path) -> None:
    """Writes the sets as image folders and packs each as the real one of its kind is packed."""
    from PIL import Image

    from data.pack import pack

    for split, drawn in draw_demo().items():
        source, layout = scratch / "images" / split, DEMO_SPLITS[split]
        for folder in (*layout.folders, UNMAPPED_FOLDER) if split == "objectnet" else layout.folders:
            (source / folder).mkdir(parents=True)
        for number, (image, label) in enumerate(zip(drawn.images, drawn.labels.tolist(), strict=True)):
            folder = UNMAPPED_FOLDER if label == NO_CLASS else layout.folder_of(label)
            Image.fromarray(image).save(source / folder / f"{split}{number:05d}.png", compress_level=1)
        options: dict[str, Any] = {"layout": "objectnet" if split == "objectnet" else "folders"}
        if split != "v2":  # integer folder names are labels; names need a list, for "eight" sorts before "zero"
            options["classes"] = str(scratch / f"{split}.json")
            classes = OBJECTNET_MAP if split == "objectnet" else layout.folders
            Path(options["classes"]).write_text(json.dumps(classes))
        pack(str(source), str(scratch / "shards" / split), **options)
        # It serves to go on with an interrupted pack, and names a folder that is about to vanish.
        (scratch / "shards" / split / "_pack.json").unlink()


def _publish(built: Path, folder: Path) -> None:
    """Renames the finished build to its place; one that another process put there meanwhile is as good, and stays."""
    try:
        built.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


# ---------------------------------------------------------------------------------------------------- contact sheet


def contact_sheet(drawn: dict[str, Drawn], path: str) -> None:
    """Puts two pictures of every class of every set into an image file. Raises DataError if it cannot be written."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cell, gap = 36, 2
    rng = np.random.default_rng(0)
    figure, axes = pyplot.subplots(len(DEMO_SPLITS), len(CLASSES), figsize=(13, 4.6), facecolor="white")
    for row, (split, pictures) in zip(axes, drawn.items(), strict=True):
        for label, axis in enumerate(row):
            members = np.flatnonzero(pictures.labels == label)
            strip = np.full((cell, 2 * cell + gap, 3), 255, dtype=np.uint8)
            for place, number in enumerate(rng.permutation(members)[:2]):
                size, left = pictures.images.shape[1], place * (cell + gap)
                margin = (cell - size) // 2
                strip[margin : margin + size, left + margin : left + margin + size] = pictures.images[number]
            axis.imshow(strip, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        known = int((pictures.labels != NO_CLASS).sum())
        row[0].set_ylabel(f"{split}\n{known:,}", rotation=0, ha="right", va="center", fontsize=11, labelpad=8)
    for name, axis in zip(CLASSES, axes[0], strict=True):
        axis.set_title(name, fontsize=11, pad=4)
    figure.subplots_adjust(left=0.085, right=0.995, top=0.94, bottom=0.01, wspace=0.04, hspace=0.04)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:  # ValueError: an extension that matplotlib does not write
        raise DataError(f"cannot write the figure {path}: {error}") from None
    pyplot.close(figure)


# ----------------------------------------------------------------------------------------------------- command line


def main(arguments: list[str] | None = None) -> int:
    """Builds the demo if needed and prints what is in it; returns the exit code."""
    parser = Parser(prog="data/demo.py", description="Builds the built-in data set, once, and says what is in it.")
    parser.add_argument("--figure", type=str, help="image file (png, svg, pdf) to draw a contact sheet into")
    figure = parser.parse_args(arguments).figure
    try:
        print(f"{Path(demo_shards('train')).parent}")
        for split in DEMO_SPLITS:
            info = json.loads(Path(demo_shards(split), "_info.json").read_text())
            print(f"{split:10} {info['splits'][split]['num_samples']:5,} images, classes {', '.join(info['classes'])}")
        if figure:
            contact_sheet(draw_demo(), figure)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # nothing half-made is left
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
