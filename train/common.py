"""What the training scripts share and need before torch: command line, errors, run folder, learning rate, progress."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import json
import logging
import math
import os
import platform
import re
import sys
import time
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar

from data import DataError
from data.rows import provenance, read_rows, write_synced
from models import ModelError

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from models.checkpoints import Checkpoint

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "train" / "recipes"
ConfigType = TypeVar("ConfigType")
# Settings of the launch that people try to give to a script.
_LAUNCHERS = ["compute_environment", "distributed_type", "num_processes", "num_machines", "machine_rank"]
_LAUNCHERS += ["mixed_precision", "main_process_ip", "main_process_port", "use_fsdp"]
log = logging.getLogger("shiftlens")


class ConfigError(Exception):
    """A setting that cannot work: one line; the process exits with code 2 before any compute."""


class LaunchError(ConfigError):
    """A setting that this process found impossible and others may not: it reports so itself, whatever its rank."""


class StopRequested(Exception):
    """A stop signal was obeyed: the state is saved and the process exits with `code` (128 + signal number)."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.code = 128 + number


# ----------------------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------------------


def option(default: Any, help: str) -> Any:
    """A field of a script's Config: its default and the words that --help shows (unit, meaning of special values)."""
    make = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return dataclasses.field(**make, metadata={"help": help})


def check_numbers(
    config: Any,
    *,
    at_least_1: Sequence[str] = (),
    not_negative: Sequence[str] = (),
    finite: Sequence[str] = (),
    shares: Sequence[str] = (),
) -> None:
    """Raises ConfigError for the first of the named settings outside its range; finite: at least 0; shares: 0..1."""
    for name in at_least_1:
        if getattr(config, name) < 1:
            raise ConfigError(f"--{name} must be at least 1, not {getattr(config, name)}")
    for name in not_negative:
        if getattr(config, name) < 0:
            raise ConfigError(f"--{name} must not be negative, but is {getattr(config, name)}")
    for name in finite:
        if not (math.isfinite(getattr(config, name)) and getattr(config, name) >= 0):
            raise ConfigError(f"--{name} must be a finite number of at least 0, not {getattr(config, name)}")
    for name in shares:
        if not 0 <= getattr(config, name) <= 1:
            raise ConfigError(f"--{name} must lie in [0, 1], not {getattr(config, name)}")


def parse_config(cls: type[ConfigType], argv: list[str], description: str, recipe: str) -> ConfigType:
    """Reads flags and `--config FILE.yaml` into the frozen dataclass `cls`; flags win over the file.

    Without `--config`, and without `--data` or with `--data demo`, the recipe of that name is read first, so that a
    bare command runs; rank 0 says so. Lists are given with commas, `--lr 1e-3,1e-2`, or as in YAML.

    Raises:
        ConfigError: unknown keys, wrong types, impossible values, an unreadable file: one line.
    """
    import jsonargparse

    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    hints = {field.name: hints[field.name] for field in fields}  # without class variables

    class Parser(jsonargparse.ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            raise ConfigError(_explained(" ".join(str(message).split()), hints))

    parser = Parser(description=description, formatter_class=jsonargparse.DefaultHelpFormatter, allow_abbrev=False)
    parser.add_argument(
        "--config", action=jsonargparse.ActionConfigFile, help="YAML file of these settings (train/recipes/)"
    )
    for field in fields:
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        parser.add_argument(f"--{field.name}", type=hints[field.name], default=default, help=field.metadata["help"])
    # As one word each, so that a value may begin with a dash, as that of `--hidden_blocks -1,-2` does.
    argv = _joined(argv, [f"--{name}" for name, kind in hints.items() if typing.get_origin(kind) is list])
    # The parser lets whatever comes later win: files are moved to the front.
    files, argv = _taken(argv, "--config")
    by_itself = not files and all(value == "demo" for value in _taken(argv, "--data")[0])
    if by_itself:
        files = [str(RECIPES / recipe)]
    for file in files:
        _refuse_duplicate_keys(Path(file))
    settings = vars(parser.parse_args([*(f"--config={file}" for file in files), *argv]))
    settings.pop("config", None)
    if empty := next((name for name in hints if settings[name] is None), None):
        raise ConfigError(f"{empty} has no value; leave it out for the default")
    if by_itself and os.environ.get("RANK", "0") == "0":
        print(f"recipe   train/recipes/{recipe}, as no --config is given; flags win", file=sys.stderr)
    return cls(**settings)


def _joined(argv: list[str], flags: list[str]) -> list[str]:
    """With values of these flags, whose type is a list, in YAML: `--lr 1e-3,1e-2` becomes `--lr=[1e-3,1e-2]`."""
    found: list[str] = []
    rest = iter(argv)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name not in flags:
            found.append(argument)
            continue
        value = (value if equals else next(rest, "")).strip()
        if not value or value.startswith("--"):  # a flag without a value, which the parser refuses
            found += [name, value] if value else [name]
        else:
            found.append(f"{name}={value if value.startswith('[') else f'[{value}]'}")
    return found


def _explained(message: str, hints: dict[str, Any]) -> str:
    """An error of the parser in the words of the settings, and what an unknown one may have been meant to be."""
    if wrong := re.match(r'Parser key "(\w+)": .*?Got value:(.*)$', message):
        return f"--{wrong[1]}{wrong[2]}: expected {_described(hints.get(wrong[1]))}"
    if unknown := re.search(r"Option '(\w+)' is not accepted|unrecognized arguments: (--\w+)", message):
        name = unknown[1] or unknown[2]
        if name.lstrip("-") in _LAUNCHERS:
            return f"{message}; that is a setting of `accelerate launch`, before the script or in its --config_file"
        dashes = "--" if unknown[2] else ""  # none in a file
        return f"{message}{_alike(name, [dashes + other for other in hints]) or '; --help lists all settings'}"
    return message


def _described(kind: Any) -> str:
    """The values of a type, for people."""
    if typing.get_origin(kind) is Literal:
        return " or ".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) is list:
        several = {int: "whole numbers", float: "numbers", bool: "true or false", str: "names"}
        return f"{several[typing.get_args(kind)[0]]}, with commas between them, in a file in brackets"
    plain = {int: "a whole number", float: "a number", bool: "true or false", str: "text, in a file in quotes"}
    return plain.get(kind, "another value")


def _alike(name: str, names: list[str]) -> str:
    """A question about the names that are most like this one; nothing where none is."""
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.7)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _taken(argv: list[str], flag: str) -> tuple[list[str], list[str]]:
    """What stands behind each `--flag VALUE` or `--flag=VALUE`, and the other arguments."""
    found, others = [], []
    rest = iter(argv)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name != flag:
            others.append(argument)
        elif equals or (value := next(rest, "")):
            found.append(value)
        else:
            others.append(argument)  # without a value, which the parser refuses
    return found, others


def _refuse_duplicate_keys(path: Path) -> None:
    """YAML keeps the last of two equal keys in silence, which hides a typing error in a recipe."""
    import yaml

    try:
        node = yaml.compose(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        alike = "" if path.exists() else _alike(path.name, sorted(file.name for file in RECIPES.glob("*.yaml")))
        raise ConfigError(f"--config {path}: {reason}{alike}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path}: not YAML: {' '.join(str(error).split())}") from None
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise ConfigError(f"--config {path}: key given twice: {', '.join(twice)}")


def run_script(main: Callable[[ConfigType], Any], cls: type[ConfigType], description: str, recipe: str) -> NoReturn:
    """Parses, runs, and turns every error a user can cause into one line and an exit code.

    Exit codes: 0 done; 1 data, model, checkpoint or disk error; 2 wrong setting or launch; 130, 143 or 138 stopped by
    Ctrl-C, SIGTERM or SIGUSR1, after saving where there was something to save.
    """
    from train.launching import PeerError, explain_lost_peer

    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    code, line = 0, ""
    try:
        main(parse_config(cls, sys.argv[1:], description, recipe))
    except ConfigError as error:
        # All ranks read the same settings: a line each would be noise.
        code, line = 2, f"error: {error}" if rank == 0 or isinstance(error, LaunchError) else ""
    except (DataError, ModelError) as error:
        code, line = 1, f"error: {error}"
    except OSError as error:  # a full or vanished disk; anything else that the system refuses
        code, line = 1, f"error: {error.strerror or error}{f': {error.filename}' if error.filename else ''}"
    except PeerError as error:
        code, line = 1, f"error: {error}" if str(error) else ""  # empty: the rank that failed says why
    except StopRequested as stop:
        code, line = stop.code, str(stop) if rank == 0 else ""
    except KeyboardInterrupt:
        code, line = 130, "stopped before the run began" if rank == 0 else ""
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's; not imported here, so that --help stays fast
            code, line = 1, f"error: {str(error).splitlines()[0]}{_less_memory(cls)}"
        elif explanation := explain_lost_peer(error):  # in the middle of a step
            code, line = 1, f"error: {explanation}"
        else:
            raise
    if line:
        print(f"[rank {rank}] {line}" if world > 1 and code in (1, 2) else line, file=sys.stderr, flush=True)
    _leave_process_group()
    sys.exit(code)


def _less_memory(cls: type[Any]) -> str:
    """What a script's own settings offer against a full memory: a sentence, or nothing."""
    ways = {
        "batch_size": "a smaller --batch_size",
        "images": "fewer --images",
        "accumulate": "more --accumulate pieces",
        "precision": "--precision bf16",
        "workers": "--mixed_precision bf16 in the launch",  # scripts that stream images run in the launch's precision
    }
    names = {field.name for field in dataclasses.fields(cls)}
    offered = [way for name, way in ways.items() if name in names]
    return f" Use {' or '.join(offered)}." if offered else ""


def _leave_process_group() -> None:
    if "torch.distributed" in sys.modules:
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            # A peer that already died must not turn our exit code into a traceback.
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()


# ----------------------------------------------------------------------------------------------------------------------
# Run folder
# ----------------------------------------------------------------------------------------------------------------------


class RunFolder:
    """Holds `config.yaml`, `env.json`, `metrics.jsonl`, `results.jsonl`, `checkpoints/`, figures; one run at a time.

    Only rank 0 makes one. Raises ConfigError when the folder cannot be written, is in use, or holds something else.
    """

    def __init__(self, path: Path, fresh: bool) -> None:
        import filelock

        self.path, self._made = path, not path.exists()
        try:
            path.mkdir(parents=True, exist_ok=True)
            others = sorted(p.name for p in path.iterdir() if not p.name.startswith((".lock", ".tmp-")))
        except OSError as error:
            raise ConfigError(f"--out {path}: cannot be written ({error.strerror or error})") from None
        if others and not (path / "config.yaml").is_file():
            raise ConfigError(
                f"--out {path}: not empty and not a run folder (holds {', '.join(others[:3])}); choose another"
            )
        if others and fresh:
            raise ConfigError(
                f"--out {path}: holds a run already; continue it with --resume auto, or choose another folder"
            )
        self._lock = filelock.FileLock(path / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            raise ConfigError(f"--out {path}: another run is using this folder") from None
        except OSError as error:
            raise ConfigError(f"--out {path}: cannot be written ({error.strerror or error})") from None

    def close(self) -> None:
        """Lets others use the folder; one that was made here for a run that never began goes away."""
        with contextlib.suppress(OSError):  # the folder is gone, or somebody has just put something there
            if self._made and all(path.name == ".lock" for path in self.path.iterdir()):
                (self.path / ".lock").unlink()
                self.path.rmdir()
        self._lock.release()

    def begin(self, config: Any, accelerator: Accelerator, first: int, origin: Path | None) -> None:
        """Before a run's next step, `first`: notes this start, and sets aside what an abandoned future has left.

        origin: the checkpoint that is continued, None for a new run.
        """
        from models.checkpoints import set_aside_after

        self.write_config(config)
        self.write_environment(accelerator)
        for path in set_aside_after(self.path / "checkpoints", first, origin):
            log.warning("checkpoint set aside: %s", path)
        self.forget_after(first)

    def write_config(self, config: Any) -> None:
        import yaml

        write_synced(self.path / "config.yaml", yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))

    def write_environment(self, accelerator: Accelerator) -> None:
        """Adds an entry to env.json, a list with one for each start of the run."""
        import torch

        environment = {
            "argv": sys.argv,
            **provenance(),
            "world": accelerator.num_processes,
            "mixed_precision": accelerator.mixed_precision,
            "device": torch.cuda.get_device_name() if accelerator.device.type == "cuda" else str(accelerator.device),
            "threads": torch.get_num_threads(),
            "platform": platform.platform(),
        }
        starts = json.loads(file.read_text()) if (file := self.path / "env.json").is_file() else []
        write_synced(file, json.dumps([*starts, environment], indent=1) + "\n")

    def log(self, row: dict[str, Any]) -> None:
        """Appends a row to metrics.jsonl; numbers that are not finite become null, which JSON has."""
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The logged rows; a line cut short by a kill is left out."""
        return read_rows(self.path / "metrics.jsonl", "step")

    def results(self) -> list[dict[str, Any]]:
        """The results reported so far."""
        return read_rows(self.path / "results.jsonl", "metric", "value")

    def forget_after(self, step: int) -> None:
        """Drops rows of steps that a resumed run will do again, so that the curve has each step once."""
        kept = [row for row in self.metrics() if row["step"] < step]
        write_synced(self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept))


def checkpoint_to_continue(config: Any, out: Path, fixed: Sequence[str]) -> Checkpoint | None:
    """The checkpoint that `config.resume` names, or None to start from scratch.

    1. `--resume PATH`: that one, valid or an error; 2. `auto`: the newest valid one of the run folder, newer invalid
    ones being named; 3. `none`, or an empty folder: from scratch. Changed settings are listed; a change of one in
    `fixed` is an error.

    Raises:
        ConfigError: a setting that the checkpoint depends on has changed.
        ModelError: --resume PATH is not valid, or none of the checkpoints that are there is.
    """
    from models.checkpoints import load_checkpoint, newest_checkpoint

    checkpoint = None
    if config.resume == "auto":
        checkpoint, skipped = newest_checkpoint(out / "checkpoints")
        if checkpoint is None and skipped:
            raise ModelError(
                f"{out}: none of {len(skipped)} checkpoints is valid; use another --out (newest: {skipped[0]})"
            )
        for reason in skipped:
            log.warning("checkpoint passed over: %s", reason)
    elif config.resume != "none":
        try:
            checkpoint = load_checkpoint(Path(config.resume))
        except ModelError as error:
            raise ModelError(f"--resume {config.resume}: {error}") from None
    if checkpoint is None:
        return None
    saved, now = checkpoint.state["config"], dataclasses.asdict(config)
    changes = {key: f"{key} {saved.get(key)!r} -> {now[key]!r}" for key in now if saved.get(key) != now[key]}
    if broken := [changes[key] for key in fixed if key in changes]:
        raise ConfigError(f"{checkpoint.path} was made with other settings ({', '.join(broken)}); use another --out")
    for change in changes.values():
        log.info("setting changed since the checkpoint: %s", change)
    log.info("continuing from %s", checkpoint.path)
    return checkpoint


# ----------------------------------------------------------------------------------------------------------------------
# Schedule and progress
# ----------------------------------------------------------------------------------------------------------------------


def cosine_lr(step: int, base: float, warmup: int, total: int, restart_every: int = 0) -> float:
    """Learning rate of 0-based `step`: linear warm-up over `warmup` steps, then a cosine to 0 at `total`.

    With restart_every > 0 the cosine starts anew each that many steps, without a new warm-up (the published rule:
    the first cycle is shortened by the warm-up, later ones are not).
    """
    if step < warmup:
        return base * (step + 1) / warmup
    if not restart_every:
        phase = (step - warmup) / (total - warmup)
    elif step <= restart_every:
        phase = (step - warmup) / (restart_every - warmup)
    else:
        phase = (step % restart_every) / restart_every
    return base * 0.5 * (1 + math.cos(math.pi * phase))


class Progress:
    """Rates and time left without the first steps (compilation, caches); a bar on a terminal, else lines."""

    WARMUP_STEPS = 10

    def __init__(self, first: int, total: int, images_per_step: int, shown: bool) -> None:
        from tqdm import tqdm

        self.total, self.images_per_step, self.shown = total, images_per_step, shown
        self.bar = (
            tqdm(total=total, initial=first, unit="step", dynamic_ncols=True) if shown and sys.stderr.isatty() else None
        )
        self._start = self._warm = (first, time.perf_counter())
        self._done = first
        self._window = time.perf_counter()
        self._waited = 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent in here counts as waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def step_done(self, step: int) -> None:
        self._done = step + 1
        if self._done == self._start[0] + self.WARMUP_STEPS:
            self._warm = (self._done, time.perf_counter())
        if self.bar:
            self.bar.update(1)

    def rates(self) -> dict[str, float | None]:
        """images_per_second (mean since warm-up), data_wait_share of the time since the last call, seconds_left."""
        now = time.perf_counter()
        first, since = self._warm if self._done > self._warm[0] else self._start
        seconds_per_step = (now - since) / max(self._done - first, 1)
        share = self._waited / max(now - self._window, 1e-9)
        self._window, self._waited = now, 0.0
        settled = self._done > self._warm[0] > self._start[0]  # the first steps say nothing about the others
        return {
            "images_per_second": round(self.images_per_step / seconds_per_step, 2),
            "data_wait_share": round(share, 4),
            "seconds_left": round(seconds_per_step * (self.total - self._done), 1) if settled else None,
        }

    def show(self, step: int, row: dict[str, Any]) -> None:
        text = (
            f"loss {row['loss']:.5f}  lr {row['lr']:.2e}  gradient {row['gradient_norm']:.2f}  "
            f"{row['images_per_second']:.0f} images/s  data wait {row['data_wait_share']:.0%}  "
            f"{row['memory_mib']:.0f} MiB"
        )
        if self.bar:
            self.bar.set_postfix_str(text)
        elif self.shown:
            left = f"  {row['seconds_left']:.0f} s left" if row["seconds_left"] is not None else ""
            print(f"step {step + 1}/{self.total}  {text}{left}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar:
            self.bar.close()


def step_seed(seed: int, step: int, rank: int) -> int:
    """63 bits for torch.manual_seed that differ between (seed, step, rank), up to the chance of a hash collision."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()[:8]) >> 1


def memory_mib(device: torch.device) -> float:
    """MiB in use: the peak of tensors on a GPU, else what the process holds now."""
    import psutil
    import torch

    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    return round(psutil.Process().memory_info().rss / 2**20, 1)


def draw_loss(rows: list[dict[str, Any]], out: Path) -> None:
    """loss.png and loss.svg from the rows of metrics.jsonl: loss terms (logarithmic), the learning rate below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 5), sharex=True, height_ratios=[3, 1], layout="constrained")
    for term in ("loss", "feature", "hidden", "gram"):
        points = [(row["step"], row[term]) for row in rows if row.get(term)]
        if points and not (term == "feature" and all(row.get("loss") == row.get("feature") for row in rows)):
            top.plot(*zip(*points, strict=True), label=term, linewidth=1.2)
    top.set(ylabel="loss", yscale="log")
    top.grid(alpha=0.3, which="both")
    top.legend()
    bottom.plot([row["step"] for row in rows], [row["lr"] for row in rows], color="tab:gray", linewidth=1.2)
    bottom.set(xlabel="optimiser step", ylabel="learning rate", ylim=(0, None))
    bottom.grid(alpha=0.3)
    for suffix in ("png", "svg"):
        figure.savefig(out / f"loss.{suffix}", dpi=150)
    plt.close(figure)
