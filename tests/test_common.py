"""Command line, schedule, run folder and launch guards of the training scripts."""

import contextlib
import dataclasses
import datetime
import json
import multiprocessing
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from data import DataError
from data.rows import append_row
from train.common import (
    RECIPES,
    ROOT,
    ConfigError,
    LaunchError,
    RunFolder,
    cosine_lr,
    parse_config,
    step_seed,
)
from train.distill import Config
from train.launching import Agreement, PeerError, start_accelerator


def parse(*argv: str) -> Config:
    return parse_config(Config, list(argv), "test", "demo.yaml")


def test_packages_are_this_repository() -> None:
    """`data`, `kernels`, `eval` are names that other packages use too; run as the launcher runs a script."""
    code = (
        "import runpy, sys; sys.path[0] = 'train'; m = runpy.run_path('train/distill.py', run_name='script');"
        "import data, eval, kernels, models, train; print([p.__file__ for p in (data, eval, kernels, models, train)])"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in ("data", "eval", "kernels", "models", "train"):
        assert str(ROOT / name / "__init__.py") in shown


def test_learning_rate_is_the_published_one(goldens: Path) -> None:
    golden = np.load(goldens / "cosine_lr.npz")
    for i in range(4):
        base, warmup, total, restarts, every = golden[f"cfg{i}"].tolist()
        found = [
            cosine_lr(int(s), base, int(warmup), int(total), int(every) if restarts else 0) for s in golden[f"steps{i}"]
        ]
        np.testing.assert_allclose(found, golden[f"lr{i}"], rtol=1e-12, atol=1e-18)


def test_step_seeds_differ() -> None:
    seeds = {
        step_seed(seed, step, rank) for seed in (0, 1, 65536) for step in (0, 1, 2**31 - 1) for rank in (0, 7, 65535)
    }
    assert len(seeds) == 27
    assert all(0 <= s < 2**63 for s in seeds)


def test_flags_win_over_the_recipe_and_the_recipe_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("data: x\nlr: 1e-4\nhidden_blocks: [0, 1]\n")
    config = parse("--config", str(file), "--epochs", "7")
    assert (config.lr, config.epochs, config.hidden_blocks) == (1e-4, 7, [0, 1])
    assert config.weight_decay == 0.05
    assert parse().data == "demo"
    assert parse("--epochs", "7", "--lr=1e-5", "--config", str(file)) == dataclasses.replace(config, lr=1e-5)
    assert parse("--data=demo", "--lr", "0.5") == dataclasses.replace(parse(), lr=0.5)
    assert parse("--data", "shards").teacher == "open_clip:RN50/openai"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--lrr", "1"], "--lrr 1; did you mean --lr?"),
        (["--dat", "x"], "did you mean --data?"),
        (["--zzz", "x"], "--help lists all settings"),
        (["--num_processes", "2"], "before the script"),
        (["--mixed_precision", "bf16"], "before the script"),
        (["--lr="], "--lr: expected a number"),
        (["--config"], "--config"),
        (["--hidden_blocks", "--data", "x"], "--hidden_blocks"),
        (["--lr", "fast"], "--lr fast: expected a number"),
        (["--hidden_blocks", "-1,x", "--data", "x"], "--hidden_blocks x: expected whole numbers, with commas"),
        (["--hidden_blocks"], "--hidden_blocks"),
        (["--compile", "perhaps"], "--compile perhaps: expected true or false"),
        (["--lr", "-1", "--data", "x"], "--lr must be"),
        (["--lr", "nan", "--data", "x"], "lr"),
        (["--lr", "inf", "--data", "x"], "lr"),
        (["--batch_size", "0", "--data", "x"], "--batch_size must be at least 1"),
        (["--kind", "l7"], "--kind l7: expected mse or "),
        (["--steps", "-3", "--data", "x"], "--steps must not be negative"),
        (["--max_bad_fraction", "2", "--data", "x"], "max_bad_fraction"),
        (["--feature_weight", "0", "--data", "x"], "all loss weights"),
        (["--epochs", "0", "--data", "x"], "give --epochs or --steps"),
        (["--gram_weight", "1", "--gram_blocks", "[]", "--data", "x"], "--gram_blocks names no block"),
        (["--config", "/no/such/file.yaml"], "No such file or directory"),
        (["--config", "train/recipes/rn5.yaml"], "did you mean rn50.yaml"),
        (["--config", str(RECIPES / "rn50.yaml")], "--data is missing"),
    ],
)
def test_impossible_settings_are_one_line(argv: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(*argv)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data: x\nwarmup_step: 1\n", "did you mean warmup_steps?"),
        ("compute_environment: LOCAL_MACHINE\n", "that is a setting of `accelerate launch`"),
        ("data: x\nlr: 1\nlr: 2\n", "key given twice: lr"),
        ("data: x\nlr: [1]\n", "lr"),
        ("data: x\nbatch_size: many\n", "batch_size"),
        ("data: x\nlr:\n", "lr has no value"),
        ("data: x\nhidden_blocks: -1,0\n", "in a file in brackets"),
        ("data: 5\n", "expected text, in a file in quotes"),
        ("data: [\n", "not YAML"),
        ("\x00\xff", "not YAML"),
    ],
)
def test_wrong_recipes_are_one_line(tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        parse("--config", str(file))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_lists_are_given_with_commas() -> None:
    for argv in (["--hidden_blocks", "-1,0"], ["--hidden_blocks=-1,0"], ["--hidden_blocks", "[-1, 0]"]):
        assert parse("--data", "x", *argv).hidden_blocks == [-1, 0]
    assert parse("--data", "x", "--hidden_blocks", "-2").hidden_blocks == [-2]


def test_exponents_without_a_point_are_numbers(tmp_path: Path) -> None:
    """YAML 1.1 reads 1e-3 as a string; the recipe's author means a number."""
    file = tmp_path / "a.yaml"
    file.write_text("data: x\nlr: 1e-3\nweight_decay: '0.1'\n")
    assert parse("--config", str(file)).lr == 1e-3


def test_every_setting_is_read_somewhere() -> None:
    source = "".join((ROOT / "train" / name).read_text() for name in ("distill.py", "loop.py", "common.py"))
    for field in dataclasses.fields(Config):
        assert re.search(rf"(config|self)\.{field.name}\b", source), f"--{field.name} is never read"
    assert len(dataclasses.fields(Config)) <= 35


@pytest.mark.parametrize("name", ["rn50", "rn101", "rn50x4", "rn50x16", "vit_b_16", "demo"])
def test_recipes_hold_only_known_settings(name: str) -> None:
    settings = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    config = parse("--config", str(RECIPES / f"{name}.yaml"), "--data", "shards")
    for key, value in settings.items():
        assert key == "data" or getattr(config, key) == value


def run(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")}
    return subprocess.run(
        arguments, cwd=ROOT, env={**clean, **environment}, capture_output=True, text=True, timeout=120
    )


def test_help_answers_without_importing_torch() -> None:
    code = (
        "import sys, runpy; sys.argv = ['distill.py', '--help']\n"
        "try: runpy.run_path('train/distill.py', run_name='__main__')\n"
        "except SystemExit as e: print(e.code, 'torch' in sys.modules)"
    )
    result = run([sys.executable, "-c", code])
    assert result.stdout.endswith("0 False\n")
    assert "--batch_size" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "environment", "expected"),
    [
        ([], {"WORLD_SIZE": "2"}, "needs MASTER_ADDR and MASTER_PORT"),
        ([], {"ACCELERATE_USE_FSDP": "true"}, "FSDP version 1 is not supported"),
        (["--batch_size", "0"], {}, "--batch_size must be at least 1"),
        (["--nonsense"], {}, "nonsense"),
    ],
)
def test_wrong_launches_exit_2_with_one_line(
    arguments: list[str], environment: dict[str, str], expected: str, tmp_path: Path
) -> None:
    result = run([sys.executable, "train/distill.py", "--out", str(tmp_path / "run"), *arguments], **environment)
    assert result.returncode == 2
    line = result.stderr.strip().splitlines()[-1]
    assert expected in line
    assert "Traceback" not in result.stderr


TWO_PROCESSES = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (TWO_PROCESSES | {"SHIFTLENS_RENDEZVOUS_SECONDS": "1"}, "no main process at 127.0.0.1:1"),
        (TWO_PROCESSES | {"SHIFTLENS_RENDEZVOUS_SECONDS": "soon"}, "SHIFTLENS_RENDEZVOUS_SECONDS must be"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "fp16 has no effect on a CPU"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "fp8 is not supported"),
    ],
)
def test_launches_that_cannot_work_are_refused(
    environment: dict[str, str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"ACCELERATE_USE_CPU": "true", **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError, match=expected) as caught, contextlib.ExitStack() as resources:
        start_accelerator(None, tmp_path, resources)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "processes", "machines", "precision"),
    [
        ("accelerate_config.yaml", 1, 1, "no"),
        ("train/launch/cpu_2_processes.yaml", 2, 1, "no"),
        ("train/launch/gpu_1_bf16.yaml", 1, 1, "bf16"),
        ("train/launch/gpu_8_bf16.yaml", 8, 1, "bf16"),
        ("train/launch/gpu_2x8_bf16.yaml", 16, 2, "bf16"),
        ("train/launch/fsdp2_2x8_bf16.yaml", 16, 2, "bf16"),
    ],
)
def test_launch_files_are_what_they_say(name: str, processes: int, machines: int, precision: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    settings = load_config_from_file(str(ROOT / name))  # raises for unknown keys
    assert (settings.num_processes, settings.num_machines, settings.mixed_precision) == (processes, machines, precision)


@pytest.mark.launch
def test_accelerates_default_file_is_looked_at_too(tmp_path: Path) -> None:
    """MULTI_CPU with two processes in the user's default file: accelerate starts one."""
    (tmp_path / "accelerate").mkdir()
    settings = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_CPU", "num_processes": 2}
    settings |= {"num_machines": 1, "machine_rank": 0, "mixed_precision": "no", "use_cpu": True}
    (tmp_path / "accelerate" / "default_config.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "train/distill.py"]
    result = run([*command, "--out", str(tmp_path / "x")], HF_HOME=str(tmp_path))
    assert result.returncode != 0
    assert "2 processes were asked for but 1 runs" in result.stderr


@pytest.mark.launch
def test_launchers_that_start_one_process_for_two_are_caught(tmp_path: Path) -> None:
    accelerate = str(Path(sys.executable).with_name("accelerate"))
    result = run(
        [
            accelerate,
            "launch",
            "--quiet",
            "--cpu",
            "--num_processes",
            "2",
            "train/distill.py",
            "--out",
            str(tmp_path / "x"),
        ]
    )
    assert result.returncode != 0
    assert "2 processes were asked for but 1 runs" in result.stderr
    assert "train/launch/cpu_2_processes.yaml" in result.stderr
    assert "Traceback" not in result.stderr


def test_run_folder_refuses_what_it_must_not_touch(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for place in (file, file / "below", Path("/proc/run")):
        with pytest.raises(ConfigError, match="cannot be written"):
            RunFolder(place, fresh=False)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").touch()
    with pytest.raises(ConfigError, match=r"not a run folder \(holds thesis.tex\)"):
        RunFolder(other, fresh=False)
    assert [p.name for p in other.iterdir()] == ["thesis.tex"]
    mine = RunFolder(tmp_path / "mine", fresh=False)
    with pytest.raises(ConfigError, match="another run is using"):
        RunFolder(tmp_path / "mine", fresh=False)
    mine.write_config(Config(data="x"))
    mine.close()
    with pytest.raises(ConfigError, match="holds a run already"):
        RunFolder(tmp_path / "mine", fresh=True)
    RunFolder(tmp_path / "mine", fresh=False).close()
    unused = RunFolder(tmp_path / "unused", fresh=True)
    unused.close()
    assert not (tmp_path / "unused").exists()
    (tmp_path / "prepared").mkdir()  # by the user
    RunFolder(tmp_path / "prepared", fresh=True).close()
    assert (tmp_path / "prepared").is_dir()
    assert (tmp_path / "mine" / "config.yaml").is_file()


def test_a_result_is_not_lost_behind_a_line_cut_short(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, fresh=False)
    (tmp_path / "results.jsonl").write_text('{"metric": "top-1", "val')
    for value in (0.25, 0.5):
        append_row(tmp_path / "results.jsonl", metric="top-1", value=value)
    assert [row["value"] for row in folder.results()] == [0.25, 0.5]


def test_metrics_rows_survive_a_cut_line_and_are_forgotten_after_the_checkpoint(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, fresh=False)
    for step in range(4):
        folder.log({"step": step, "loss": float("nan") if step == 1 else 0.5})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    folder.forget_after(3)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert rows[1]["loss"] is None


def say(act: Callable[[int], str], rank: int, store: Path, told: Connection) -> None:
    """One of the processes of `said_by_two_ranks`."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    told.send(act(rank))
    os._exit(0)  # the store file's owner need not wait for the other process


def said_by_two_ranks(act: Callable[[int], str], store: Path) -> list[str]:
    """What `act(rank)` returns in two processes that are a process group; "" for one that ended without a word."""
    fork = multiprocessing.get_context("fork")
    pipes = [fork.Pipe(duplex=False) for _ in range(2)]
    ranks = [fork.Process(target=say, args=(act, rank, store, pipes[rank][1])) for rank in range(2)]
    for process in ranks:
        process.start()
    said = []
    try:
        for process, (read, write) in zip(ranks, pipes, strict=True):
            write.close()
            process.join(60)
            try:
                said.append(read.recv() if read.poll() else "still running")
            except EOFError:
                said.append("")
    finally:
        for process in ranks:
            process.kill()
            process.join()
    return said


def test_ranks_that_see_other_files_end_together(tmp_path: Path) -> None:
    """The first meeting agrees; at the second rank 1 sees something else: it says so, rank 0 only ends."""

    def meet_twice(rank: int) -> str:
        agreement = Agreement(rank, 2)
        agreement.same(["a", 1], "shards")
        try:
            agreement.same(["a", rank], "shards")
        except (DataError, PeerError) as error:
            return f"{type(error).__name__} {error}".strip()
        return "agreed"

    said = said_by_two_ranks(meet_twice, tmp_path / "store")
    assert said == ["PeerError", "DataError shards here are not those of rank 0; give all machines the same files"]


@pytest.mark.parametrize(
    ("delay", "patience", "expected"),
    [
        (lambda: os._exit(1), 600, r"another process ended without a word \(.*\); look for its last lines"),
        (lambda: os.kill(os.getpid(), 9), 600, r"another process ended without a word \(.*\)"),
        (lambda: time.sleep(8), 2, r"another process gave no sign of life in time \(Timed out waiting 2000ms .*\)"),
        (lambda: time.sleep(3), 600, "all here"),
    ],
    ids=["ends", "is killed", "too slow", "slow"],
)
def test_a_lost_rank_is_noticed_and_a_slow_one_waited_for(
    delay: Callable[[], None], patience: int, expected: str, tmp_path: Path
) -> None:
    """A process that dies is noticed at once, whatever the patience; one that works on, only when it runs out."""

    def settle_twice(rank: int) -> str:
        agreement = Agreement(rank, 2, datetime.timedelta(seconds=patience))
        agreement.settle(None)
        start = time.monotonic()
        if rank == 1:
            delay()
        try:
            agreement.settle(None)
        except PeerError as error:
            return f"{time.monotonic() - start:.1f} {error}"
        return "0 all here"

    seconds, _, line = said_by_two_ranks(settle_twice, tmp_path / "store")[0].partition(" ")
    assert re.fullmatch(expected + ".*", line), line
    assert float(seconds) < 7
