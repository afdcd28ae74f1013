"""Kills training at random moments, many times, and looks at everything that is left after each kill.

    python tests/soak.py --kills 200 --ranks 1,2,4 --seed 0

Each run is a distillation of a few hundred steps that saves every third. It is killed while it starts, steps, writes a
checkpoint, puts it in place, removes an old one, or exports its weights; by SIGKILL to one rank or to all, or by
SIGTERM to one; and started again on another number of processes, with other --workers and --accumulate. After each:

- no process is left, and ranks that lost another end by themselves, with one line;
- whatever can be loaded is whole, and it holds the weights that an unbroken run had at that step;
- the next start continues from the newest of these, and no more is lost than what was being saved and done;
- every rank trained on exactly the rows that were planned for it.

A run that reaches its end must have the losses of the unbroken one, step by step, and another is begun until all kills
are spent. Prints a line for each kill and a summary as JSON; ends with exit code 1 at the first violation, and keeps
the folder. 200 kills take about a quarter of an hour on two cores.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests import elastic

if TYPE_CHECKING:
    from torch import Tensor

    from models.checkpoints import Checkpoint

SAVE_EVERY = 3
BATCH = 12  # divisible by 1 to 4 processes, by 6, and by these times 2 pieces
MOMENTS = ["starting", "stepping", "writing", "renaming", "ending"]
VICTIMS = ["one", "one", "all", "all", "term"]
ENDS_WITHIN = 30.0  # seconds that the other ranks get once one is gone; they take less than one
DONE_WITHIN = 120.0


class Violation(Exception):
    """Something that must never happen did."""


class Soak:
    """Runs that are killed, on `worlds` numbers of processes, in `folder`; data and teacher as for train/distill.py."""

    def __init__(
        self, folder: Path, data: str, teacher: str, worlds: Sequence[int], seed: int = 0, steps: int = 300
    ) -> None:
        self.folder, self.worlds, self.steps = folder, list(worlds), steps
        self.random = random.Random(seed)
        self.settings: dict[str, Any] = {"data": data, "teacher": teacher, "batch_size": BATCH, "steps": steps}
        self.settings |= {"warmup_steps": 5, "log_every": 1, "save_every": SAVE_EVERY, "keep": 2}
        self.planned = elastic.planned_keys(data, BATCH, steps)
        self.counts: collections.Counter[str] = collections.Counter()
        self.resumed: list[int] = []
        self.kills = 0
        self.moments: list[str] = []
        self.worst = {"loss": 0.0, "weight": 0.0, "steps_lost": 0.0, "seconds_until_all_ended": 0.0}

    def run(self, kills: int, say: Callable[[str], None] = print) -> dict[str, Any]:
        """Spends the kills on as many runs as it takes; the summary. Raises Violation."""
        began = time.monotonic()
        # It saves every step, as SIGTERM may save any.
        elastic.run(self.folder / "unbroken", {**self.settings, "workers": 0, "save_every": 1, "keep": self.steps}, 1)
        self.losses = elastic.losses(self.folder / "unbroken")
        runs = 0
        while self.kills < kills:
            runs += 1
            self._whole_run(self.folder / f"run{runs}", kills, say)
        return {
            "kills": self.kills,
            "runs": runs,
            "kinds": dict(sorted(self.counts.items())),
            "resumed_from_0": self.resumed.count(0),
            "resumed_from_mean": round(sum(self.resumed) / max(len(self.resumed), 1), 1),
            "worst": {name: float(f"{value:.3g}") for name, value in self.worst.items()},
            "seconds": round(time.monotonic() - began, 1),
        }

    # --- One run --------------------------------------------------------------------------------------------------

    def _whole_run(self, folder: Path, kills: int, say: Callable[[str], None]) -> None:
        newest, completed = 0, False
        while not completed:
            victim = self.random.choice(VICTIMS) if self.kills < kills else ""
            self.moments = self.moments or self.random.sample(MOMENTS, len(MOMENTS))
            moment = self.moments.pop()
            world = self.random.choice(self.worlds)
            options = {"workers": self.random.choice([0, 1, 2]), "accumulate": self.random.choice([1, 1, 2])}
            if world == 4:
                options["accumulate"] = 1
            with elastic.Launch(folder, self.settings | options, world) as launch:
                killed = victim != "" and self._kill(launch, moment, victim)
                codes = self._end(launch, victim if killed else "")
                if left := launch.left_over(5):
                    raise Violation(f"{folder}, start {launch.start}: processes left: {left}")
            if not killed and codes != [0] * world:
                raise Violation(f"{folder}, start {launch.start}: exit codes {codes} though nothing was done to it")
            first, last = self._check_log(launch, newest)
            newest = self._check_checkpoints(folder, newest, last if last is not None else first)
            if killed and victim == "term" and codes == [143] * world and last is not None and newest != last:
                raise Violation(f"{folder}, start {launch.start}: stopped before step {last}, but saved at {newest}")
            completed = codes == [0] * world
            if killed:
                self.kills += 1
                self.counts[f"{moment}/{victim}"] += 1
                say(
                    f"{self.kills:4d}  {folder.name} start {launch.start:3d} on {world}  {moment:8s} {victim:4s}  "
                    f"steps {first} to {'-' if last is None else last}  saved {newest}  codes {codes}"
                )
        self._check_whole(folder)
        shutil.rmtree(folder)

    def _kill(self, launch: elastic.Launch, moment: str, victim: str) -> bool:
        """Waits for the moment and strikes; False where the run came to its end before."""
        checkpoints = launch.folder / "out" / "checkpoints"
        before = {(path.name, path.stat().st_ino) for path in checkpoints.glob("*step_*")}  # also of a killed save
        pause = {"starting": 1.2, "stepping": 0.1, "writing": 0.02, "renaming": 0.005, "ending": 2.0}[moment]
        some = self.random.randint(1, 12) * launch.world

        def reached() -> bool:
            if moment == "starting":
                return True
            if moment == "stepping":
                return len(launch.trained()) >= some
            if moment == "ending":  # or, far from it, soon after the start
                rows = launch.trained()
                return bool(rows) and (rows[-1].step + 1 == self.steps or rows[0].step + 60 < self.steps)
            for path in checkpoints.glob(".tmp-step_*" if moment == "writing" else "step_*"):
                with contextlib.suppress(FileNotFoundError):  # put in place meanwhile
                    if (path.name, path.stat().st_ino) not in before:
                        return True
            return False

        end = time.monotonic() + DONE_WITHIN
        while not reached():
            codes = launch.wait(0)
            if None not in codes:
                return False
            if time.monotonic() > end or any(codes):
                raise Violation(f"{launch.folder}, start {launch.start}: exit codes {codes} before anything was done")
            time.sleep(0.001)
        time.sleep(self.random.uniform(0, pause))
        rank = None if victim == "all" else self.random.randrange(launch.world)
        if launch.wait(0)[0 if rank is None else rank] is not None:
            return False  # a rank that has nothing more to do ends before rank 0 does
        launch.send(signal.SIGTERM if victim == "term" else signal.SIGKILL, rank)
        return True

    def _end(self, launch: elastic.Launch, victim: str) -> list[int | None]:
        """Exit codes, after looking at how the ranks ended."""
        struck = time.monotonic()
        where = f"{launch.folder}, start {launch.start}"
        begun = {row.rank for row in launch.trained()} == set(range(launch.world))
        if victim in ("one", "term") and not begun:
            # Ranks that have not met yet wait for the lost one for minutes; a launcher ends them.
            launch.wait(1)
            if victim == "one" or any(launch.wait(0)):
                launch.send(signal.SIGKILL)
        codes = launch.wait(ENDS_WITHIN if victim else DONE_WITHIN)
        if None in codes:
            raise Violation(f"{where}: exit codes {codes} after {time.monotonic() - struck:.0f} s")
        if victim:
            self.worst["seconds_until_all_ended"] = max(
                self.worst["seconds_until_all_ended"], time.monotonic() - struck
            )
        # 1: lost another; 2: before they had met; 0: had come to its end; 143: stopped; -15: with nothing to save yet.
        allowed = {"": {0}, "one": {0, 1, -9}, "all": {0, -9}, "term": {0, 1, 143, -15, -9}}[victim]
        if victim and not begun:
            allowed = allowed | {2}
        if not set(codes) <= allowed:
            raise Violation(f"{where}: exit codes {codes} after {victim or 'nothing'}:\n{launch.said()}")
        said = launch.said()
        if "Traceback" in said:
            raise Violation(f"{where}: a traceback:\n{said}")
        if begun and victim == "one" and said.count("error: ") > codes.count(1):
            raise Violation(f"{where}: more than one line about the end:\n{said}")
        return codes

    # --- What is left ---------------------------------------------------------------------------------------------

    def _check_log(self, launch: elastic.Launch, newest: int) -> tuple[int, int | None]:
        """The step that the start continued from, and the one after the last that all ranks did (None: no step)."""
        rows = launch.trained()
        if wrong := elastic.deviations(rows, self.planned):
            raise Violation(f"{launch.folder}, start {launch.start}: {wrong[:3]}")
        if not rows:
            return newest, None
        first = rows[0].step
        if first != newest:
            raise Violation(f"{launch.folder}, start {launch.start}: began at step {first}, not at {newest}")
        self.resumed.append(first)
        done = collections.Counter(row.step for row in rows)
        return first, max((step + 1 for step, ranks in done.items() if ranks == launch.world), default=first)

    def _check_checkpoints(self, folder: Path, before: int, last: int) -> int:
        """The newest checkpoint's step (0: none), after a look into all that can be loaded."""
        from models import ModelError
        from models.checkpoints import load_checkpoint

        checkpoints = folder / "out" / "checkpoints"
        newest = 0
        for path in sorted(checkpoints.glob("*step_*")):
            if path.name.startswith(".tmp-"):
                continue
            try:
                found = load_checkpoint(path)
            except ModelError:  # an old one that was being removed
                continue
            newest = max(newest, found.step)
            expected = load_checkpoint(self.folder / "unbroken" / "out" / "checkpoints" / path.name)
            for group, tensors in expected.tensors.items():
                if found.tensors[group].keys() != tensors.keys():
                    raise Violation(f"{path}: {group} holds other tensors than it should")
            # Adam makes a whole step of a gradient that is 0 but for rounding, so single weights may differ by more.
            weights, right = (self._weights(checkpoint) for checkpoint in (found, expected))
            difference = float((weights - right).norm() / right.norm())
            self.worst["weight"] = max(self.worst["weight"], difference)
            if not difference < 1e-3:
                raise Violation(f"{path}: not the weights of step {found.step}, by {difference:.1e}")
        if newest < before:
            raise Violation(f"{folder}: step {before} was saved, and step {newest} is the newest now")
        # The last save may have been under way, and then the one before it is whole.
        self.worst["steps_lost"] = max(self.worst["steps_lost"], float(last - newest))
        if last - newest > 2 * SAVE_EVERY:
            raise Violation(f"{folder}: step {last} was reached, and step {newest} is the newest saved")
        if len(left := [path.name for path in checkpoints.glob(".tmp-*")]) > 1:
            raise Violation(f"{checkpoints}: leftovers of several saves: {left}")
        return newest

    @staticmethod
    def _weights(checkpoint: Checkpoint) -> Tensor:
        import torch

        return torch.cat([tensor.flatten() for tensor in checkpoint.tensors["model"].values()])

    def _check_whole(self, folder: Path) -> None:
        """A run that reached its end: history, losses, no leftovers."""
        if elastic.history_of(elastic.trained(folder)) != self.planned:
            raise Violation(f"{folder}: batches were left out or repeated")
        found = elastic.losses(folder)
        if len(found) != self.steps:
            raise Violation(f"{folder}: {len(found)} rows of metrics for {self.steps} steps")
        difference = max(abs(a - b) / b for a, b in zip(found, self.losses, strict=True))
        self.worst["loss"] = max(self.worst["loss"], difference)
        if difference > 1e-5:
            raise Violation(f"{folder}: losses differ from those of an unbroken run by {difference:.1e}")
        if left := [str(path) for path in (folder / "out").rglob(".tmp-*")]:
            raise Violation(f"{folder}: leftovers {left}")
        names = sorted(path.name for path in (folder / "out" / "checkpoints").iterdir())
        if len(names) != 2 or not all(name.startswith("step_") for name in names):
            raise Violation(f"{folder}: checkpoints {names}, of which two are to be kept")
        results = (folder / "out" / "results.jsonl").read_text().splitlines()
        if len(results) != 1:
            raise Violation(f"{folder}: {len(results)} results of one run")


def write_inputs(folder: Path) -> tuple[str, str]:
    """Shards and a teacher for a run of milliseconds per step: what `data` and `teacher` of train/distill.py take."""
    import io
    import tarfile

    import numpy as np
    import open_clip
    import torch
    from PIL import Image
    from safetensors.torch import save_file

    data, teacher = folder / "shards", folder / "teacher"
    data.mkdir()
    teacher.mkdir()
    generator = np.random.default_rng(0)
    counts = {"000000.tar": 50, "000001.tar": 47, "000002.tar": 39}
    for name, count in counts.items():
        with tarfile.open(data / name, "w") as archive:
            for number in range(count):
                buffer = io.BytesIO()
                coarse = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
                Image.fromarray(coarse).resize((32, 32), Image.Resampling.BICUBIC).save(buffer, "PNG")
                for suffix, content in (("png", buffer.getvalue()), ("cls", b"0")):
                    member = tarfile.TarInfo(f"{name[5]}-{number}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    (data / "sizes.json").write_text(json.dumps(counts))
    config: dict[str, Any] = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32},
        "text_cfg": {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 1, "layers": 1},
    }
    torch.manual_seed(1)
    model = open_clip.CLIP(**config)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, teacher / "open_clip_model.safetensors")
    description = {"model_cfg": config, "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}}
    (teacher / "open_clip_config.json").write_text(json.dumps(description))
    return str(data), f"local-dir:{teacher}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--ranks", default="1,2,4", help="numbers of processes, of which each start takes one")
    parser.add_argument("--steps", type=int, default=300, help="optimiser steps of a run")
    parser.add_argument("--seed", type=int, default=0, help="seed of moments and victims")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak_"))
    data, teacher = write_inputs(folder)
    worlds = [int(number) for number in arguments.ranks.split(",")]
    soak = Soak(folder, data, teacher, worlds, arguments.seed, arguments.steps)
    try:
        summary = soak.run(arguments.kills, lambda line: print(line, flush=True))
    except Violation as violation:
        print(f"VIOLATION after {soak.kills} kills: {violation}", file=sys.stderr)
        return 1
    print(json.dumps(summary))
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
