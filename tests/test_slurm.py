"""Jobs of batch systems. SLURM's, told of its time limit, saves and is queued again; an error, or the end, is not.

SLURM's script runs here as it is, with small stand-ins for SLURM's commands and for the launcher. They do what the
real ones were seen to do (SLURM 22.05, accelerate 1.15): a signal to a job step reaches the process group of each task,
and not the training processes, which the launcher gives sessions of their own; the launcher dies of SIGUSR1, and kills
what has not ended in time after a SIGTERM.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

from models.checkpoints import newest_checkpoint
from tests.hosts import ROOT, wait_for_line
from train.common import parse_config
from train.distill import Config

JOB = "train/launch/slurm_2x8.sbatch"
pytestmark = pytest.mark.timeout(120)

# A task for each node, each in a session of its own; when one fails all are ended, as --kill-on-bad-exit does.
SRUN = """
import os, signal, subprocess, sys, time
command = sys.argv[1:]
assert command[:2] == ["--cpus-per-task=4", "--kill-on-bad-exit=1"], command
tasks = [
    subprocess.Popen(command[2:], start_new_session=True, env=os.environ | {"SLURM_NODEID": str(node)})
    for node in range(int(os.environ["SLURM_NNODES"]))
]
open(os.environ["STATE"] + "/step", "w").write(" ".join(str(task.pid) for task in tasks))
while any(task.poll() is None for task in tasks):
    if any(task.poll() for task in tasks):
        time.sleep(0.5)
        for task in tasks:
            task.poll() is None and os.killpg(task.pid, signal.SIGKILL)
    time.sleep(0.02)
sys.exit(max(task.returncode if task.returncode >= 0 else 128 - task.returncode for task in tasks))
"""

SCANCEL = """
import os, signal, sys
assert sys.argv[1:] == ["--signal=USR1", "4711.0"], sys.argv
for task in open(os.environ["STATE"] + "/step").read().split():
    os.killpg(int(task), signal.SIGUSR1)
"""

SCONTROL = """
import os, sys
if sys.argv[1:3] == ["show", "hostnames"]:
    print("node-1\\nnode-2")
else:
    assert sys.argv[1:] == ["requeue", "4711"], sys.argv
    if os.environ.get("MAY_REQUEUE") == "no":
        sys.exit("scontrol: error: Requested operation is presently disabled")
    open(os.environ["STATE"] + "/requeued", "a").write("x")
"""

# A launcher with one training process, which takes a second to save and exits with 138, or does what PLAN says.
ACCELERATE = """
import os, signal, subprocess, sys
open(f"{os.environ['STATE']}/launched{os.environ['SLURM_NODEID']}", "w").write(" ".join(sys.argv[1:]))
def stop(number, frame):
    process.send_signal(number)
    try:
        process.wait(0.3)
    except subprocess.TimeoutExpired:
        process.kill()
    sys.exit(1)
training = '''
import os, signal, sys, time
def save(number, frame):
    time.sleep(1)
    print("saved", flush=True)
    os._exit(138)
signal.signal(signal.SIGUSR1, save)
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
exec(os.environ["PLAN"])
'''
process = subprocess.Popen([sys.executable, "-c", training], start_new_session=True)
signal.signal(signal.SIGTERM, stop)
sys.exit(1 if process.wait() else 0)
"""


class Job:
    """The batch script, run as SLURM runs it, in a folder with the stand-ins."""

    def __init__(self, folder: Path, plan: str, root: Path = ROOT, **environment: str) -> None:
        self.folder, self.log = folder, folder / "slurm.out"
        commands = folder / "bin"
        commands.mkdir()
        scripts = {"srun": SRUN, "scancel": SCANCEL, "scontrol": SCONTROL, "accelerate": ACCELERATE}
        for name, text in scripts.items():
            (commands / name).write_text(f"#!{sys.executable}{text}")
            (commands / name).chmod(0o755)
        variables = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node-[1-2]", "SLURM_NNODES": "2"}
        variables |= {"SLURM_CPUS_PER_TASK": "4", "SLURM_GPUS_ON_NODE": "8", "STATE": str(folder), "PLAN": plan}
        variables |= {"PATH": f"{commands}:{os.environ['PATH']}"}
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                ["bash", str(ROOT / JOB), "train/distill.py", "--data", "a folder/{000..123}.tar"],
                cwd=root,
                env=os.environ | variables | environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def ready(self) -> None:
        while self.log.read_text().count("ready") < 2:
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.02)

    def warn_of_the_time_limit(self) -> None:
        """As `--signal=B:USR1@180` has it done: to the batch script alone."""
        self.process.send_signal(signal.SIGUSR1)

    def end(self) -> int:
        return self.process.wait(30)

    @property
    def requeued(self) -> bool:
        return (self.folder / "requeued").exists()


def test_at_the_time_limit_all_save_and_the_job_is_queued_again(tmp_path: Path) -> None:
    job = Job(tmp_path, "time.sleep(60)")
    job.ready()
    job.warn_of_the_time_limit()
    assert job.end() == 0
    assert job.log.read_text().count("saved") == 2
    assert job.requeued


def test_each_node_is_launched_with_what_was_asked_for(tmp_path: Path) -> None:
    job = Job(tmp_path, "pass")
    assert job.end() == 0
    for node in (0, 1):
        arguments = (tmp_path / f"launched{node}").read_text()
        assert arguments == (
            f"launch --machine_rank {node} --config_file train/launch/gpu_2x8_bf16.yaml --num_machines 2 "
            "--num_processes 16 --main_process_ip node-1 --main_process_port 19711 --rdzv_conf timeout=300 "
            "train/distill.py --data a folder/{000..123}.tar"
        )
    assert not job.requeued


def test_an_error_ends_the_job_with_its_code_and_is_not_repeated(tmp_path: Path) -> None:
    job = Job(tmp_path, "sys.exit(1)")
    assert job.end() == 1
    assert not job.requeued


def test_a_run_that_ends_while_it_is_told_to_stop_is_done(tmp_path: Path) -> None:
    job = Job(tmp_path, "signal.signal(signal.SIGUSR1, lambda *_: os._exit(0)); time.sleep(60)")
    job.ready()
    job.warn_of_the_time_limit()
    assert job.end() == 0
    assert not job.requeued


def test_a_cluster_that_does_not_requeue_leaves_a_failed_job(tmp_path: Path) -> None:
    job = Job(tmp_path, "time.sleep(60)", MAY_REQUEUE="no")
    job.ready()
    job.warn_of_the_time_limit()
    assert job.end() == 1
    assert job.log.read_text().count("saved") == 2
    assert "error: Requested operation" in job.log.read_text()


def test_a_job_from_another_folder_says_so(tmp_path: Path) -> None:
    job = Job(tmp_path, "pass", root=tmp_path)
    assert job.end() == 2
    assert job.log.read_text() == "error: submit from the root of the repository, or with sbatch --chdir=ROOT\n"


@pytest.mark.launch
def test_sigterm_to_a_node_saves_and_gives_the_launchers_exit_code(
    tiny_shards: Path, tiny_vit: str, tmp_path: Path
) -> None:
    """The real launcher with two processes, as in a container that is to end."""
    out, log = tmp_path / "run", tmp_path / "log"
    settings = {"data": tiny_shards, "teacher": tiny_vit, "batch_size": 16, "steps": 5000, "warmup_steps": 2}
    settings |= {"workers": 0, "log_every": 1, "save_every": 5000, "max_bad_fraction": 1.0, "out": out}
    flags = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    launcher = ["train/launch/node.sh", "--config_file", "train/launch/cpu_2_processes.yaml"]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with log.open("w") as file:
        command = [*launcher, "train/distill.py", *flags]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)
    wait_for_line(log, "step 5/", process)
    process.terminate()
    assert process.wait(60) == 1
    found, _ = newest_checkpoint(out / "checkpoints")
    assert found is not None, log.read_text()
    assert f"stopped by signal 10: saved at step {found.step} of 5000" in log.read_text()


def test_the_kubernetes_job_starts_what_it_should() -> None:
    """Its command is one that the launcher and the script take; its pods find each other by the service's name."""
    service, job = yaml.safe_load_all((ROOT / "train/launch/kubernetes_2x8.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    node, *arguments = container["command"]
    assert os.access(ROOT / node, os.X_OK)
    asked = launch_command_parser().parse_args([a.replace("$(JOB_COMPLETION_INDEX)", "1") for a in arguments])
    assert load_config_from_file(str(ROOT / asked.config_file)).main_process_port == service["spec"]["ports"][0]["port"]
    assert (asked.num_machines, asked.machine_rank, asked.training_script) == (2, 1, "train/distill.py")
    assert asked.num_processes == asked.num_machines * container["resources"]["limits"]["nvidia.com/gpu"]
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == asked.num_machines
    name = job["metadata"]["name"]
    assert asked.main_process_ip == f"{name}-0.{pod['subdomain']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": name}
    config = parse_config(Config, asked.training_script_args, "", "demo.yaml")
    assert config.out.startswith(container["volumeMounts"][0]["mountPath"])
