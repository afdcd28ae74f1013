"""What do the results say side by side? From rows of eval/shifts.py to one page that needs nothing but itself.

    python eval/report.py                                     built-in demo, after eval/shifts.py: a few seconds
    python eval/report.py --results runs/shifts runs/interpolate --out runs/report

The page, report.html, holds pictures and styles within itself, no script, and no address of anything elsewhere: it can
be mailed, archived, and opened without a network. It shows top-1 on every set beside published models, accuracy on the
line (eval/robustness.py), the curve of eval/interpolate.py, the classes that lose most, mistakes with their images, and
for every number the line of results.jsonl that it comes from. Figures also lie beside it as PNG and SVG.

Of several rows about the same number (suite, model, set, metric) the newest counts. One model name for several weights,
or sets whose images differ between models, are said on the page and on stderr. Mistakes need a predictions.csv
beside results.jsonl, or --predictions, and the shards that were scored, on this machine.
"""

from __future__ import annotations

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import dataclasses
import os
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data import DataError
from data.command import Parser
from data.rows import provenance, write_synced
from data.shifts import SUITES
from eval.common import print_table
from eval.evidence import Row, newest, read_rows
from eval.figures import printable
from eval.sections import Shown, match_predictions, section
from train.common import ConfigError, option

DEMO_RESULTS = "runs/demo_shifts"  # where eval/shifts.py leaves the demo's
PAGE = "report.html"
MARK = '<meta name="generator" content="shiftlens eval/report.py">'  # tells our page from somebody's own


@dataclass(frozen=True)
class Config:
    """Settings; the defaults are the demo's."""

    results: list[str] = option([DEMO_RESULTS], "run folders of eval/shifts.py or eval/interpolate.py, or .jsonl files")
    predictions: list[str] = option([], "CSV files of eval/shifts.py; none = predictions.csv beside each of --results")
    data: str = option("", "folder with a folder of shards for each set, for images; empty = where they were scored")
    examples: int = option(8, "mistakes shown for each set; 0 = none")
    out: str = option("", "folder to write; empty = runs/demo_report for the demo's results, else runs/report")

    def __post_init__(self) -> None:
        if self.examples < 0:
            raise ConfigError(f"--examples {self.examples}: must not be negative")


# ----------------------------------------------------------------------------------------------------------------------
# The run
# ----------------------------------------------------------------------------------------------------------------------


def find_files(config: Config) -> tuple[list[Path], list[Path]]:
    """Files of results, each once, and of predictions. Raises ConfigError for a place that is named and not there."""
    results: dict[str, Path] = {}
    for name in config.results:
        path = Path(name).expanduser()
        path = path / "results.jsonl" if path.is_dir() else path
        if not path.is_file():
            hint = "run eval/shifts.py first, or name its run folder" if name == DEMO_RESULTS else "name a run folder"
            raise ConfigError(f"--results {name}: no {path} here (working folder {Path.cwd()}); {hint}")
        results.setdefault(os.path.realpath(path), path)
    predictions = [Path(name).expanduser() for name in config.predictions]
    if missing := [path for path in predictions if not path.is_file()]:
        raise ConfigError(f"--predictions {missing[0]}: no such file (working folder {Path.cwd()})")
    beside = [path.with_name("predictions.csv") for path in results.values()]
    return [*results.values()], predictions or [path for path in dict.fromkeys(beside) if path.is_file()]


def open_folder(config: Config) -> Path:
    """The folder to write to. Raises ConfigError where it cannot be made, or has a page of that name from elsewhere."""
    out = Path(config.out or ("runs/demo_report" if config.results == [DEMO_RESULTS] else "runs/report")).expanduser()
    try:
        out.mkdir(parents=True, exist_ok=True)
        page = out / PAGE
        if page.exists() and MARK not in page.read_text(encoding="utf-8", errors="replace"):
            raise ConfigError(
                f"--out {out}: its {PAGE} is no page of this script; name another folder, or move it away"
            )
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written ({error.strerror or error})") from None
    return out


def main(config: Config) -> dict[str, Any]:
    """Writes page and figures; returns "page" (its path), "sections" as the template has them, "notes" about files.

    Raises ConfigError, DataError: anything a user can cause, in one line.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError("this script is one process: start it with python, not with accelerate launch")

    import jinja2

    files, predictions = find_files(config)
    rows: list[Row] = []
    notes: list[str] = []
    for file in files:
        of_file, about = read_rows(file)
        rows += of_file
        notes += about
    found = [*newest(rows).values()]
    shown = [
        Shown.of(suite, of)
        for suite in SUITES.values()
        if (of := [r for r in found if r.fields["suite"] == suite.name])
    ]
    said = match_predictions(predictions, shown, notes) if config.examples else {}
    out = open_folder(config)
    sections = [section(one, said, config.examples, config.data, out) for one in shown]

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html").render(
        mark=MARK,
        sections=sections,
        notes=notes,
        rows=len(rows),
        files=files,
        predictions=predictions,
        examples=config.examples,
        made=provenance(),
    )
    # Names from a file may hold halves of a character, which no encoding has.
    write_synced(out / PAGE, page.encode("utf-8", "replace").decode())
    written = {
        picture.name for of in sections for picture in (of["line"], of["curve"], *dict(of["drops"]).values()) if picture
    }
    for suite in SUITES:  # of an earlier report, which had more to draw
        for old in (*out.glob(f"{suite}_line.*"), *out.glob(f"{suite}_curves.*"), *out.glob(f"{suite}_drops_*.*")):
            if old.stem not in written and old.suffix in (".png", ".svg"):
                old.unlink()

    for one_section in sections:
        show(one_section)
    for note in (*notes, *(note for of in sections for note in of["notes"])):
        print(f"note     {printable(note)}", file=sys.stderr)
    print(f"report   {out / PAGE}")
    return {"page": out / PAGE, "sections": sections, "notes": notes}


def show(of: Mapping[str, Any]) -> None:
    """Prints the table of the models that were scored."""
    header = [f"top-1, % ({of['suite'].name})", *of["names"], "mean of shifts", "effective robustness"]
    lines = [
        [printable(line["model"], 48), *(one["text"] for one in line["cells"])] for line in of["groups"][0]["models"]
    ]
    if not of["robust"]:
        header, lines = header[:-1], [line[:-1] for line in lines]
    print_table(header, lines)
    if of["sample"]:
        print("* measured on a sample of the set")


def run(arguments: Sequence[str] | None = None) -> int:
    """Reads the command line, writes the report, and returns the exit code: 0 done, 1 wrong data, 2 wrong setting."""
    parser = Parser(prog="eval/report.py", description=__doc__.splitlines()[0])
    for field in dataclasses.fields(Config):
        many = field.default_factory is not dataclasses.MISSING
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        kind = {"nargs": "+", "type": str} if many else {"type": typing.get_type_hints(Config)[field.name]}
        parser.add_argument(f"--{field.name}", default=default, help=field.metadata["help"], **kind)
    settings = parser.parse_args(arguments).as_dict()
    code, line = 0, ""
    try:
        main(Config(**settings))
    except ConfigError as error:
        code, line = 2, f"error: {error}"
    except DataError as error:
        code, line = 1, f"error: {error}"
    except OSError as error:  # a full disk
        code, line = 1, f"error: {error.strerror or error}{f': {error.filename}' if error.filename else ''}"
    except KeyboardInterrupt:
        code, line = 130, "interrupted; the page is the old one, or whole"
    if line:
        print(printable(line), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(run())
