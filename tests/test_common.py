"""Command line, schedule, run folder and launch guards of the training scripts."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from train.common import (
    RECIPES,
    ROOT,
    ConfigError,
    RunFolder,
    cosine_lr,
    parse_config,
    step_seed,
)
from train.distill import Config


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
    assert parse("--data=demo", "--lr", "0.5") == dataclasses.replace(parse(), lr=0.5)
    assert parse("--data", "shards").teacher == "open_clip:RN50/openai"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--lrr", "1"], "lrr"),
        (["--dat", "x"], "dat"),
        (["--lr", "fast"], "lr"),
        (["--lr", "-1", "--data", "x"], "--lr must be"),
        (["--lr", "nan", "--data", "x"], "lr"),
        (["--lr", "inf", "--data", "x"], "lr"),
        (["--batch_size", "0", "--data", "x"], "--batch_size must be at least 1"),
        (["--kind", "l7"], "kind"),
        (["--steps", "-3", "--data", "x"], "--steps must not be negative"),
        (["--max_bad_fraction", "2", "--data", "x"], "max_bad_fraction"),
        (["--feature_weight", "0", "--data", "x"], "all loss weights"),
        (["--epochs", "0", "--data", "x"], "give --epochs or --steps"),
        (["--gram_weight", "1", "--gram_blocks", "[]", "--data", "x"], "--gram_blocks names no block"),
        (["--config", "/no/such/file.yaml"], "No such file"),
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
        ("compute_environment: LOCAL_MACHINE\n", "accelerate launch --config_file FILE"),
        ("data: x\nlr: 1\nlr: 2\n", "key given twice: lr"),
        ("data: x\nlr: [1]\n", "lr"),
        ("data: x\nbatch_size: many\n", "batch_size"),
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
        (
            [],
            {
                "WORLD_SIZE": "2",
                "RANK": "1",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": "1",
                "SHIFTLENS_RENDEZVOUS_SECONDS": "1",
            },
            "no main process at 127.0.0.1:1",
        ),
        (
            [],
            {"WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1", "SHIFTLENS_RENDEZVOUS_SECONDS": "soon"},
            "SHIFTLENS_RENDEZVOUS_SECONDS must be",
        ),
        ([], {"ACCELERATE_MIXED_PRECISION": "fp16"}, "fp16 has no effect on a CPU"),
        ([], {"ACCELERATE_MIXED_PRECISION": "fp8"}, "fp8 is not supported"),
        ([], {"ACCELERATE_USE_FSDP": "true"}, "FSDP is not supported"),
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


@pytest.mark.parametrize(
    ("name", "processes", "machines", "precision"),
    [
        ("accelerate_config.yaml", 1, 1, "no"),
        ("train/launch/cpu_2_processes.yaml", 2, 1, "no"),
        ("train/launch/gpu_1_bf16.yaml", 1, 1, "bf16"),
        ("train/launch/gpu_8_bf16.yaml", 8, 1, "bf16"),
        ("train/launch/gpu_2x8_bf16.yaml", 16, 2, "bf16"),
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


def test_ranks_that_see_other_files_end_together(tmp_path: Path) -> None:
    """The first meeting agrees; at the second rank 1 sees something else: it says so, rank 0 only ends."""
    code = (
        "import sys, torch.distributed as dist\n"
        "from data import DataError\n"
        "from train.launching import Agreement, PeerError\n"
        "rank = int(sys.argv[1])\n"
        "dist.init_process_group('gloo', init_method='file://' + sys.argv[2], rank=rank, world_size=2)\n"
        "agreement = Agreement(rank, 2)\n"
        "agreement.same(['a', 1], 'shards')\n"
        "try:\n"
        "    agreement.same(['a', rank], 'shards')\n"
        "except (DataError, PeerError) as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    command = [sys.executable, "-c", code]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    said = [process.communicate(timeout=120)[0].strip() for process in ranks]
    assert said == ["PeerError", "DataError shards here are not those of rank 0; give all machines the same files"]


@pytest.mark.parametrize(
    ("rank_1", "patience", "expected"),
    [
        ("os._exit(1)", 600, r"another process ended without a word \(.*\); look for its last lines"),
        ("os.kill(os.getpid(), 9)", 600, r"another process ended without a word \(.*\)"),
        ("time.sleep(8)", 2, r"another process gave no sign of life in time \(Timed out waiting 2000ms .*\)"),
        ("time.sleep(3)", 600, "all here"),
    ],
)
def test_a_lost_rank_is_noticed_and_a_slow_one_waited_for(
    rank_1: str, patience: int, expected: str, tmp_path: Path
) -> None:
    """A process that dies is noticed at once, whatever the patience; one that works on, only when it runs out."""
    code = (
        "import datetime, os, sys, time, torch.distributed as dist\n"
        "from train.launching import Agreement, PeerError\n"
        "rank = int(sys.argv[1])\n"
        "dist.init_process_group('gloo', init_method='file://' + sys.argv[2], rank=rank, world_size=2)\n"
        f"agreement = Agreement(rank, 2, datetime.timedelta(seconds={patience}))\n"
        "agreement.settle(None)\n"
        "start = time.monotonic()\n"
        "if rank == 1:\n"
        f"    {rank_1}\n"
        "try:\n"
        "    agreement.settle(None)\n"
        "    print(0, 'all here', flush=True)\n"
        "except PeerError as error:\n"
        "    print(round(time.monotonic() - start, 1), error, flush=True)\n"
        "os._exit(0)\n"  # the store file's owner need not wait for the other process
    )
    command = [sys.executable, "-c", code]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    said = [process.communicate(timeout=120)[0].strip() for process in ranks]
    seconds, _, line = said[0].partition(" ")
    assert re.fullmatch(expected + ".*", line), said
    assert float(seconds) < 7
