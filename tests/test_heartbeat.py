"""A lost rank ends the others within seconds, whatever they wait for; a slow, hung or finished one does not."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from models.checkpoints import CheckpointWriter, newest_checkpoint
from tests.elastic import free_port
from train import heartbeat
from train.common import LaunchError, StopRequested
from train.heartbeat import choose_interface, start_heartbeat
from train.launching import PeerLost, _start_process_group

pytestmark = pytest.mark.timeout(120)


class Ranks:
    """Forked processes that each run `body(rank, heartbeat)` inside their heartbeat; a context that ends them."""

    def __init__(
        self, folder: Path, world: int, body: Callable[[int, heartbeat.Heartbeat], None], *, patience: float = 60
    ) -> None:
        self.folder, port, context = folder, free_port(), multiprocessing.get_context("fork")
        self.processes = [
            context.Process(target=self._run, args=(n, world, port, patience, body)) for n in range(world)
        ]
        for process in self.processes:
            process.start()

    def _run(self, rank: int, world: int, port: int, patience: float, body: Callable) -> None:
        error_file = os.open(self.folder / f"{rank}.err", os.O_CREAT | os.O_WRONLY)
        os.dup2(error_file, 2)
        os.environ |= {
            "RANK": str(rank),
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        heartbeat.GRACE_SECONDS = 0.3
        try:
            with start_heartbeat(patience=patience) as beating:
                (self.folder / f"{rank}.ready").touch()
                body(rank, beating)
        except StopRequested as stop:
            os._exit(stop.code)
        except LaunchError as error:
            os.write(2, str(error).encode())
            os._exit(2)
        except PeerLost as error:
            os.write(2, str(error).encode())
            os._exit(1)

    def all_ready(self) -> None:
        while not all((self.folder / f"{rank}.ready").exists() for rank in range(len(self.processes))):
            time.sleep(0.01)

    def said(self, rank: int) -> str:
        return (self.folder / f"{rank}.err").read_text()

    def codes(self, seconds: float = 60) -> list[int | None]:
        """Exit codes, None for a process that still runs after so long."""
        for process in self.processes:
            process.join(seconds)
        return [process.exitcode for process in self.processes]

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def sleep_for_ever(rank: int, beating: heartbeat.Heartbeat) -> None:
    """What a rank does that waits for something that does not come, such as a collective on its GPU."""
    time.sleep(600)


def test_a_killed_rank_ends_all_others_wherever_they_are(tmp_path: Path) -> None:
    """Rank 0 sees it and tells the rest, so that each machine's log has the cause."""
    with Ranks(tmp_path, 3, sleep_for_ever) as ranks:
        ranks.all_ready()
        ranks.processes[2].kill()
        assert ranks.codes() == [1, 1, -signal.SIGKILL]
        for rank in (0, 1):
            line = (
                rf"\[rank {rank}\] error: rank 2 on {socket.gethostname()} ended; look for its last lines; "
                r"the same command continues from the last checkpoint\n"
            )
            assert re.fullmatch(line, ranks.said(rank))


def test_the_end_of_rank_0_ends_all_others(tmp_path: Path) -> None:
    with Ranks(tmp_path, 3, sleep_for_ever) as ranks:
        ranks.all_ready()
        ranks.processes[0].kill()
        assert ranks.codes() == [-signal.SIGKILL, 1, 1]
        assert "rank 0 on" in ranks.said(1)


def test_a_rank_that_fails_says_why_itself_and_ends_the_others(tmp_path: Path) -> None:
    def fail(rank: int, beating: heartbeat.Heartbeat) -> None:
        if rank == 1:
            raise LaunchError("no room on this GPU")
        time.sleep(600)

    with Ranks(tmp_path, 2, fail) as ranks:
        assert ranks.codes() == [1, 2]
        assert ranks.said(1) == "no room on this GPU"
        assert "rank 1 on" in ranks.said(0)


def test_ranks_that_finish_or_obey_a_signal_are_no_loss(tmp_path: Path) -> None:
    """The others go on for several times the grace."""

    def finish(rank: int, beating: heartbeat.Heartbeat) -> None:
        if rank == 1:
            return
        if rank == 2:
            raise StopRequested(signal.SIGTERM, "saved")
        time.sleep(2)

    with Ranks(tmp_path, 4, finish) as ranks:
        assert ranks.codes() == [0, 0, 128 + signal.SIGTERM, 0]
        assert [ranks.said(rank) for rank in range(4)] == [""] * 4


def test_rank_0_may_finish_first(tmp_path: Path) -> None:
    with Ranks(tmp_path, 3, lambda rank, beating: time.sleep(rank)) as ranks:
        assert ranks.codes() == [0, 0, 0]


def test_a_rank_that_hangs_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped for longer than a lost machine is given: its kernel answers, and nobody takes it for lost."""
    monkeypatch.setenv("SHIFTLENS_LOST_SECONDS", "3")
    with Ranks(tmp_path, 2, lambda rank, beating: time.sleep(6)) as ranks:
        ranks.all_ready()
        pid = ranks.processes[1].pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        time.sleep(5)
        assert ranks.processes[0].exitcode is None
        os.kill(pid, signal.SIGCONT)
        assert ranks.codes() == [0, 0]


def test_workers_of_a_killed_rank_do_not_speak_for_it(tmp_path: Path) -> None:
    """A forked decoding process outlives its rank for a moment; it must not hold the connection open."""

    def fork_and_sleep(rank: int, beating: heartbeat.Heartbeat) -> None:
        if rank == 1 and os.fork() == 0:
            (tmp_path / "worker").write_text(str(os.getpid()))
            time.sleep(60)
            os._exit(0)
        time.sleep(600)

    with Ranks(tmp_path, 2, fork_and_sleep) as ranks:
        while not (tmp_path / "worker").exists() or not (tmp_path / "worker").read_text():
            time.sleep(0.01)
        ranks.processes[1].kill()
        ranks.processes[0].join(30)
        os.kill(int((tmp_path / "worker").read_text()), signal.SIGKILL)  # it was there all the time
        assert ranks.codes() == [1, -signal.SIGKILL]


def test_a_checkpoint_that_is_being_written_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from models import checkpoints

    write = checkpoints.save_checkpoint

    def write_slowly(*arguments: object, **options: object) -> None:
        time.sleep(2)  # several times the grace
        write(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoints, "save_checkpoint", write_slowly)

    def save(rank: int, beating: heartbeat.Heartbeat) -> None:
        if rank == 1:
            os._exit(7)
        writer = CheckpointWriter(tmp_path / "checkpoints")
        writer.save(5, {"model": {"w": torch.ones(3)}, "optimizer": {"m": torch.ones(3)}}, {"config": {}})
        time.sleep(600)

    with Ranks(tmp_path, 2, save) as ranks:
        assert ranks.codes() == [1, 7]
    found, skipped = newest_checkpoint(tmp_path / "checkpoints")
    assert found is not None
    assert found.step == 5
    assert skipped == []


def test_a_rank_that_does_not_come_is_one_line_in_time(tmp_path: Path) -> None:

    def meet(rank: int, beating: heartbeat.Heartbeat) -> None:
        raise AssertionError("they cannot meet")

    with Ranks(tmp_path, 3, meet, patience=2) as ranks:
        ranks.processes[2].kill()
        assert ranks.codes() == [2, 2, -signal.SIGKILL]
        last = [ranks.said(rank).splitlines()[-1] for rank in (0, 1)]  # torch may warn before
        assert re.fullmatch(r"not all of 3 processes came within 2 s \(.+\)", last[0])
        gone = r"(rank 0|the main process) .+ (ended before all|cannot be reached).+"
        assert re.fullmatch(rf"not all of 3 .+|{gone}", last[1])


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_ends_before_the_process_group_is_one_line(victim: int, tmp_path: Path) -> None:
    """All have come, then one ends. Rank 0 takes the store along, and the others fail; another one is only missed."""

    def meet(rank: int, beating: heartbeat.Heartbeat) -> None:
        if rank == victim:
            os._exit(7)
        _start_process_group("gloo", beating.store)

    with Ranks(tmp_path, 3, meet) as ranks:
        assert ranks.codes() == [7 if rank == victim else 1 for rank in range(3)]
        for rank in {0, 1, 2} - {victim}:
            # torch's own warnings about its store come before
            *_, line = ranks.said(rank).splitlines()
            lost = rf"(\[rank {rank}\] error: )?rank {victim} (on \S+ )?ended.*; look for its last lines.*"
            assert re.fullmatch(lost, line), line
            assert "Traceback" not in ranks.said(rank)


def test_a_port_of_something_else_is_not_said_to_be_a_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """A web server, say, at the address of the main process."""

    def answer(server: socket.socket) -> None:
        while True:
            peer, _ = server.accept()
            with peer, contextlib.suppress(OSError):
                peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                peer.recv(1000)

    with socket.create_server(("127.0.0.1", 0)) as server:
        other = multiprocessing.get_context("fork").Process(target=answer, args=(server,))
        other.start()
        try:
            environment = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
            for name, value in {**environment, "MASTER_PORT": str(server.getsockname()[1])}.items():
                monkeypatch.setenv(name, value)
            with pytest.raises(LaunchError, match=r"^the processes could not meet \(Ping failed, invalid value .+\)$"):
                start_heartbeat(patience=1)  # torch tries again for so long
        finally:
            other.kill()
            other.join()


def test_strangers_are_turned_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Port scanners and other jobs: nonsense, a wrong secret, an empty connection; then the real rank comes."""
    port = free_port()
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    environment = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # as under a launcher, which has the store

    def rank(number: int) -> None:
        os.environ |= environment | {"RANK": str(number)}
        with start_heartbeat(patience=30):
            pass

    context = multiprocessing.get_context("fork")
    first, second = (context.Process(target=rank, args=(number,)) for number in (0, 1))
    first.start()
    try:
        secret, _, address, heard_at = store.get("shiftlens/heartbeat/0").decode().split()
        for said in (b"GET / HTTP/1.0\r\n\r\n", b"\xff\xfe 1 x", f"{secret[::-1]} 1 x".encode(), b"", b"\xc3\xa4 1 x"):
            with socket.create_connection((address, int(heard_at)), timeout=10) as stranger:
                stranger.sendall(said)
                stranger.shutdown(socket.SHUT_WR)
                with contextlib.suppress(ConnectionResetError):
                    assert stranger.recv(1) == b""
        second.start()
        for process in (first, second):
            process.join(30)
        assert (first.exitcode, second.exitcode) == (0, 0)
    finally:
        first.kill()
        if second.pid is not None:
            second.kill()


@pytest.mark.parametrize("seconds", ["2", "soon", "-5", "1e3"])
def test_impossible_limits_are_one_line(seconds: str) -> None:
    environment = {"RANK": "0", "WORLD_SIZE": "2", "SHIFTLENS_LOST_SECONDS": seconds}
    with pytest.raises(LaunchError, match="SHIFTLENS_LOST_SECONDS must be a whole number"):
        start_heartbeat(environment, patience=1)


def test_the_interface_is_the_one_towards_the_main_process() -> None:
    environment = {"MASTER_ADDR": "localhost", "MASTER_PORT": "1", "WORLD_SIZE": "2"}
    assert choose_interface(environment) in ("127.0.0.1", "::1")
    assert environment["GLOO_SOCKET_IFNAME"].startswith("lo")
    asked = {**environment, "GLOO_SOCKET_IFNAME": "no-such"}
    with pytest.raises(LaunchError, match=r"GLOO_SOCKET_IFNAME=no-such: no such interface with an address; here: .*lo"):
        choose_interface(asked)
    nowhere = {"MASTER_ADDR": "no-such-machine.invalid", "MASTER_PORT": "1", "WORLD_SIZE": "2"}
    with pytest.raises(LaunchError, match="no way to a main process at no-such-machine.invalid"):
        choose_interface(nowhere)
