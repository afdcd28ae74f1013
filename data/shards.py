"""Write shards from image folders, archives and arrays; check them; look into them.

    python data/shards.py pack  SOURCE OUT [--split train] [--resize 256] [--workers 8]    see `pack --help` for layouts
    python data/shards.py verify DATA [--workers 8]          counts, labels, keys and pixels; exit code 1 on any problem
    python data/shards.py info   DATA [--write]              what is there; --write adds missing sizes.json, _info.json
    python data/shards.py order  DATA --global_batch 256     the order in which training sees the samples

DATA is whatever `--data` of the training scripts takes: folders, globs, brace lists, URLs. Without re-encoding, packing
one core writes thousands of images a second; `--resize` costs a decode, a resize and an encode, a few milliseconds.
"""

from __future__ import annotations

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import bisect
import contextlib
import logging
import os
import signal
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from jsonargparse.typing import NonNegativeInt, PositiveInt, restricted_number_type

from data import DataError
from data.command import Parser
from data.pack import index_files, pack, write_json
from data.parallel import Count, Progress, run_tasks
from data.sources import LAYOUTS
from data.tar import Record, Shard, ShardReader, ShardSet, find_shards, parse_label

__all__ = ["info", "main", "order", "pack", "verify"]


# ---------------------------------------------------------------------------------------------------------------------
# verify
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class ShardCheck:
    """What is wrong with one shard (reason -> keys, or no keys for the shard itself), and what it holds."""

    problems: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    notes: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    labels: Counter[int] = field(default_factory=Counter)


def verify(data: Sequence[str], *, decode: bool = True, workers: int = 1, allow_pipe: bool = False) -> list[str]:
    """Read every sample of the shards and print what is wrong, a line each; return those lines.

    Checked: counts against sizes.json, truncation, records without or with two images or labels, labels, keys that
    occur twice, and, with `decode`, that every image decodes in full. Raises DataError when there is nothing to check.
    """
    if decode:
        from data import transforms  # noqa: F401  imports torch; workers inherit it from the process that forks them

    shards = find_shards(data, allow_pipe=allow_pipe)
    problems: list[str] = []
    labels: Counter[int] = Counter()
    place_of: dict[str, int] = {}
    repeated: dict[tuple[int, int], list[str]] = defaultdict(list)

    def say(kind: str, line: str) -> None:
        print(f"{kind}: {line}", flush=True)
        if kind == "problem":
            problems.append(line)

    task = partial(_check_shard, shards, decode, allow_pipe)
    numbers = range(len(shards.shards))
    with (
        contextlib.closing(Progress("verify", shards.num_samples)) as progress,
        contextlib.closing(run_tasks(task, numbers, workers=workers, count=progress.add)) as checks,
    ):
        for number, check in checks:
            url = shards.shards[number].url
            for reason, keys in check.problems.items():
                say("problem", f"{url}: {reason}" + (f": {_first(keys)}" if keys else ""))
            for note in check.notes:
                say("note", f"{url}: {note}")
            labels += check.labels
            for key in check.keys:
                if place_of.setdefault(key, number) != number:
                    repeated[place_of[key], number].append(key)
    for (one, other), keys in sorted(repeated.items()):
        say("problem", f"{shards.shards[one].url} and {shards.shards[other].url} share keys: {_first(keys)}")
    for kind, line in _label_findings(labels, shards.num_classes):
        say(kind, line)
    if labels:
        each = f"{min(labels.values()):,} to {max(labels.values()):,} images each"
        held = f"labels {min(labels)} to {max(labels)}, {len(labels)} classes with {each}"
        print(f"{labels.total():,} good labels in {len(shards.shards)} shards: {held}; {len(problems)} problems")
    return problems


def _check_shard(shards: ShardSet, decode: bool, allow_pipe: bool, number: int, count: Count) -> ShardCheck:
    shard, check = shards.shards[number], ShardCheck()
    reader = ShardReader(shard.url, allow_pipe=allow_pipe)
    try:
        for record in reader.read():
            count(1)
            check.keys.append(record.key)
            if record.problem:
                check.problems[record.problem].append(record.key)
            try:
                check.labels[parse_label(record.label, shards.num_classes)] += 1
            except DataError as error:
                if record.problem != "no label":
                    check.problems[str(error)].append(record.key)
            if decode and record.image is not None:
                from data.transforms import ImageError
                from data.transforms import decode as decode_image

                try:
                    decode_image(record.image)
                except ImageError as error:
                    check.problems[str(error)].append(record.key)
    except DataError as error:
        check.problems[str(error)] = []
        return check
    if reader.truncated:
        check.problems[f"truncated: {reader.truncated}"] = []
    if reader.count != shard.count:
        check.problems[f"holds {reader.count} samples, its count says {shard.count}"] = []
    check.notes = reader.notes
    return check


def _label_findings(labels: Counter[int], num_classes: int | None) -> list[tuple[str, str]]:
    """Judge the histogram of all labels: (problem or note, line)."""
    if not labels:
        return [("problem", "no sample has a usable label")]
    if num_classes is None and min(labels) == 1:
        return [("problem", f"labels run from 1 to {max(labels)}: they must start at 0; repack")]
    expected = num_classes if num_classes is not None else max(labels) + 1
    missing = [str(label) for label in range(expected) if label not in labels]
    return [("note", f"{len(missing)} of {expected} classes have no image: {_first(missing, 10)}")] if missing else []


def _first(names: Sequence[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


# ---------------------------------------------------------------------------------------------------------------------
# info and order
# ---------------------------------------------------------------------------------------------------------------------


def info(data: Sequence[str], *, write: bool = False, allow_pipe: bool = False) -> dict[str, Any]:
    """Print what the shards hold and return it; `write` adds sizes.json and _info.json where they are missing.

    Raises DataError for shards that cannot be found and, with `write`, for those that are not all of one local folder.
    """
    shards = find_shards(data, allow_pipe=allow_pipe)
    local = [shard.url for shard in shards.shards if os.path.isfile(shard.url)]
    sizes = [len(record.image) for record in _records(shards.shards[0], allow_pipe) if record.image is not None]
    classes = "unknown" if shards.num_classes is None else str(shards.num_classes)
    if shards.classes:
        classes += f" ({_first(shards.classes, 10)})"
    found = {
        "shards": len(shards.shards),
        "samples": shards.num_samples,
        "bytes": sum(map(os.path.getsize, local)) if len(local) == len(shards.shards) else "unknown (remote)",
        "classes": classes,
        "mean image bytes": f"{sum(sizes) / max(1, len(sizes)):.0f} (first shard)",
        "fingerprint": shards.fingerprint,
    }
    for name, value in found.items():
        print(f"{name + ':':<18}{value:,}" if isinstance(value, int) else f"{name + ':':<18}{value}")
    if write:
        _write_missing_indexes(shards)
    return found


def _records(shard: Shard, allow_pipe: bool) -> Iterator[Record]:
    return ShardReader(shard.url, allow_pipe=allow_pipe).read()


def _write_missing_indexes(shards: ShardSet) -> None:
    folders = {Path(shard.url).parent for shard in shards.shards}
    folder = folders.pop()
    if folders or {Path(shard.url) for shard in shards.shards} != set(folder.glob("*.tar")):
        raise DataError("--write needs all shards of one folder of this machine: give that folder")
    missing = [name for name in ("_info.json", "sizes.json") if not (folder / name).exists()]
    if not missing:
        print(f"{folder} has both _info.json and sizes.json")
        return
    num_classes = shards.num_classes
    if num_classes is None:
        labels = [parse_label(record.label, None) for shard in shards.shards for record in _records(shard, False)]
        num_classes = max(labels) + 1
    counts = {os.path.basename(shard.url): shard.count for shard in shards.shards}
    contents = index_files(folder, counts, folder.resolve().name, num_classes, shards.classes)
    for name in missing:
        write_json(folder / name, contents[name])
        print(f"wrote {folder / name}")


def order(
    data: Sequence[str],
    *,
    global_batch: int,
    seed: int = 0,
    epoch: int = 0,
    streams: int = 64,
    world: int = 1,
    steps: int | None = None,
    allow_pipe: bool = False,
) -> None:
    """Print step, global sample number, shard and key of every sample of an epoch, tab-separated, in training order.

    `world` matters only where it changes the number of streams, and that is said on stderr.
    """
    from data.order import count_streams, global_order

    shards = find_shards(data, allow_pipe=allow_pipe)
    used = count_streams(global_batch, world, streams)
    if used != count_streams(global_batch, 1, streams):
        print(f"{world} processes use {used} streams: another order than one process's", file=sys.stderr)
    keys: dict[int, list[str]] = {}
    batches = global_order(shards, global_batch=global_batch, streams=used, seed=seed, epoch=epoch)
    for step, batch in enumerate(batches):
        if step == steps:
            break
        for number in batch.tolist():
            index = _shard_of(shards, number)
            shard = shards.shards[index]
            if index not in keys:
                keys[index] = [record.key for record in _records(shard, allow_pipe)]
            if number - shard.start >= len(keys[index]):
                raise DataError(f"{shard.url} holds {len(keys[index])} samples, its count says {shard.count}")
            print(step, number, shard.url, keys[index][number - shard.start], sep="\t")


def _shard_of(shards: ShardSet, number: int) -> int:
    return bisect.bisect_right(shards.shards, number, key=lambda shard: shard.start) - 1


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


Quality = restricted_number_type("Quality", int, [(">=", 1), ("<=", 95)], join="and", docstring="JPEG quality, 1-95")


def _parser() -> Parser:
    parser = Parser(prog="data/shards.py", description="Write, check and look into shards.")
    commands = parser.add_subcommands()

    command = Parser(description="Write a labelled image collection as shards. An interrupted pack goes on.")
    command.add_argument("source", type=str, help="image folder, .tar[.gz|.xz|.bz2] archive, MNIST or CIFAR folder")
    command.add_argument("out", type=str, help="folder for the shards; new, empty, or of the same pack")
    layouts = "; ".join(f"{name}: {layout.explanation}" for name, layout in LAYOUTS.items())
    command.add_argument("--layout", choices=list(LAYOUTS), default="auto", help=layouts)
    command.add_argument("--split", type=str, help="folder inside the source, or train|test of MNIST and CIFAR")
    command.add_argument(
        "--classes",
        type=str,
        help="class list in label order: a set such as `imagenet` or `objectnet`, or a JSON or text file",
    )
    command.add_argument("--val_labels", type=str, help="LOC_val_solution.csv, for ImageNet's flat val folder")
    command.add_argument("--resize", type=PositiveInt, help="reduce the short side to this many pixels (as JPEG)")
    command.add_argument("--quality", type=Quality, default=90, help="JPEG quality after --resize, 1-95")
    command.add_argument("--shard_size", type=PositiveInt, default=1000, help="samples a shard")
    command.add_argument("--workers", type=PositiveInt, default=1, help="processes, each writing whole shards")
    command.add_argument("--seed", type=NonNegativeInt, default=0, help="of the order of the samples")
    command.add_argument("--shuffle", type=bool, default=True, help="false keeps samples sorted by class")
    command.add_argument("--skip_bad", action="store_true", help="leave out images that --resize cannot decode")
    commands.add_subcommand("pack", command)

    command = _data_command("Check shards: a line for each problem, exit code 1 if there is any.")
    command.add_argument("--workers", type=PositiveInt, default=1, help="processes")
    command.add_argument("--no_decode", action="store_true", help="do not decode the images")
    commands.add_subcommand("verify", command)

    command = _data_command("Say what shards hold.")
    command.add_argument("--write", action="store_true", help="add sizes.json and _info.json where missing")
    commands.add_subcommand("info", command)

    command = _data_command("Print step, sample number, shard and key in the order of training.")
    command.add_argument("--global_batch", type=PositiveInt, required=True, help="samples a step, over all processes")
    command.add_argument("--seed", type=NonNegativeInt, default=0, help="of the run")
    command.add_argument("--epoch", type=NonNegativeInt, default=0, help="counted from 0")
    command.add_argument("--streams", type=PositiveInt, default=64, help="upper limit, as in training")
    command.add_argument("--world", type=PositiveInt, default=1, help="processes of the training run")
    command.add_argument("--steps", type=PositiveInt, help="stop after this many steps (default: the whole epoch)")
    commands.add_subcommand("order", command)
    return parser


def _data_command(description: str) -> Parser:
    command = Parser(description=description)
    command.add_argument("data", type=str, nargs="+", help="folders, globs, brace lists or URLs of shards")
    command.add_argument("--allow_pipe", action="store_true", help="run `pipe:COMMAND` shards")
    return command


def _print_summary(summary: dict[str, Any]) -> None:
    for reason, count in summary["dropped"].items():
        print(f"note: left out {count:,} files {reason}")
    for note in summary["notes"]:
        print(f"note: {note}")
    if summary["skipped"]:
        print(f"note: {summary['skipped']:,} images could not be decoded and are not in the shards")
    size = f"{summary['shards']} shards, {summary['bytes'] / 1e6:,.1f} MB"
    print(f"{summary['samples']:,} samples of {summary['classes']} classes in {size}: {summary['out']}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return 0, 1 for bad data, 130 after Ctrl-C (a wrong command line exits with 2)."""
    parsed = _parser().parse_args(arguments)
    options = parsed[parsed.subcommand].as_dict()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        if parsed.subcommand == "pack":
            _print_summary(pack(**options))
        elif parsed.subcommand == "verify":
            return 1 if verify(options.pop("data"), decode=not options.pop("no_decode"), **options) else 0
        elif parsed.subcommand == "info":
            info(**options)
        else:
            order(**options)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        print(f"interrupted: {interrupt}" if interrupt.args else "interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that temporary files and workers go
    sys.exit(main())
