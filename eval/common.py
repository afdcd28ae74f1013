"""What the evaluation scripts share: errors in one line, checks, spread of repeated measurements, tables."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from data import DataError
from models import ModelError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from data.small import ImageSet
    from models.classifiers import Classifier


def run_script(main: Callable[[], object]) -> NoReturn:
    """Runs a script's `main` and exits: 0 done, 1 wrong data or model (one line), 130 stopped by Ctrl-C."""
    code = 0
    try:
        main()
    except (DataError, ModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)


@dataclass(frozen=True)
class Spread:
    """A repeated measurement: its median, its 20th and 80th percentile, and the number of repetitions."""

    median: float
    p20: float
    p80: float
    n: int

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Spread:
        """The one that a row of results holds."""
        return cls(row["value"], row["p20"], row["p80"], row["n"])

    def fields(self) -> dict[str, Any]:
        """As fields of a row."""
        return {"value": self.median, "p20": self.p20, "p80": self.p80, "n": self.n}

    def __str__(self) -> str:
        digits = max(0, 3 - len(f"{abs(self.median):.0f}"))  # about three significant figures
        return f"{self.median:,.{digits}f} ({self.p20:,.{digits}f}-{self.p80:,.{digits}f})"


def spread(values: Sequence[float]) -> Spread:
    """Summarises at least one repetition; percentiles are interpolated between the values, as numpy's are."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0], 1)
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return Spread(statistics.median(values), fifths[0], fifths[3], len(values))


DEMO_CLASSIFIER = "local-dir:runs/demo_adversarial/export"  # what bare commands look at


def check_demo(model: str) -> None:
    """Raises ModelError if `model` is the demo's classifier, which nobody has trained here yet."""
    folder = Path(DEMO_CLASSIFIER.partition(":")[2])
    if model == DEMO_CLASSIFIER and not folder.is_dir():
        raise ModelError(f"no {folder} here yet: run `accelerate launch train/adversarial.py` first, or give --model")


def near_chance(correct: int, n: int, classes: int) -> bool:
    """Whether right answers to n images do not show, at 95 %, that more than chance is known of `classes` classes."""
    from eval.robustness import wilson

    return wilson(correct, n)[0] <= 1 / classes


def check_classes(classifier: Classifier, data: ImageSet) -> None:
    """Raises DataError if the data have labels that are not the classifier's."""
    if len(data.classes) != classifier.num_classes or not 0 <= int(data.labels.max()) < classifier.num_classes:
        raise DataError(
            f"{data.name} has {len(data.classes)} classes, {classifier.name} gives {classifier.num_classes} logits"
        )
    for place, (ours, theirs) in enumerate(zip(classifier.classes or (), data.classes, strict=False)):
        if ours != theirs:
            raise DataError(
                f"class {place} of {classifier.name} is {ours!r}, of {data.name} {theirs!r}: accuracy would be that of "
                "another labelling"
            )


def check_outputs(rows: str, figure: str) -> None:
    """Raises DataError if results or figure ("": none) cannot be written: now, and not after minutes of measuring."""
    if figure and not figure.endswith((".png", ".pdf", ".svg")):
        raise DataError(f"cannot write the figure {figure}: its name must end in .png, .pdf or .svg")
    for path in map(Path, filter(None, (rows, figure))):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            found = path.exists()
            path.open("ab").close()
            if not found:
                path.unlink()
        except OSError as error:
            raise DataError(f"cannot write {path}: {error.strerror}") from None


def save_figure(figure: Figure, path: str) -> None:
    """Writes a drawing and lets go of it; raises DataError if it cannot be written."""
    from matplotlib import pyplot

    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:  # ValueError: an extension that matplotlib does not write
        raise DataError(f"cannot write the figure {path}: {error}") from None
    pyplot.close(figure)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints rows in aligned columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        first, *others = (
            f"{text:<{width}}" if place == 0 else f"{text:>{width}}"
            for place, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join([first, *others]).rstrip())
