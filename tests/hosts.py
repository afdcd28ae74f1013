"""Two machines for a test: Linux network namespaces with an address each, a cable between them, and disks of their own.

Each has the name and the /etc/hosts that Debian gives a machine, where its own name is 127.0.1.1.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Self

ROOT = Path(__file__).resolve().parents[1]


class TwoHosts:
    """A context that makes the two machines, number 0 and 1, and removes them with all that runs on them.

    Args:
        folder: for their files.
        hidden: a folder that only machine 0 sees: where it is, machine 1 has an empty one that cannot be written.
    """

    NAMES = ("host-a", "host-b")
    ADDRESSES = ("10.77.77.1", "10.77.77.2")

    def __init__(self, folder: Path, hidden: Path) -> None:
        self.folder, self.hidden = folder, hidden
        self._spaces = [f"shiftlens-{os.getpid()}-{name}" for name in self.NAMES]

    @staticmethod
    def missing() -> str:
        """Why they cannot be made here; "" where they can."""
        if not all(shutil.which(tool) for tool in ("ip", "nsenter", "unshare")):
            return "needs Linux with iproute2 and util-linux"
        space = f"shiftlens-{os.getpid()}-probe"
        if subprocess.run(["ip", "netns", "add", space], capture_output=True).returncode:
            return "may not make network namespaces (needs root)"
        _ip("netns", "del", space)
        return ""

    def __enter__(self) -> Self:
        first, second = self._spaces
        for space in self._spaces:
            _ip("netns", "add", space)
        _ip("-n", first, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", second)
        for space, address, name, other in zip(self._spaces, self.ADDRESSES, self.NAMES, range(1, -1, -1), strict=True):
            _ip("-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "lo", "up")
            _ip("-n", space, "link", "set", "eth0", "up")
            lines = ["127.0.0.1 localhost", f"127.0.1.1 {name}", f"{self.ADDRESSES[other]} {self.NAMES[other]}"]
            (self.folder / f"{name}.hosts").write_text("\n".join(lines) + "\n")
        self.hidden.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *exception: object) -> None:
        for host, space in enumerate(self._spaces):
            with contextlib.suppress(subprocess.CalledProcessError):
                self.kill_all(host)
                _ip("netns", "del", space)

    def start(self, host: int, command: list[str], log: Path, environment: dict[str, str]) -> subprocess.Popen:
        """Runs a command on a machine, with everything it says in `log`."""
        script = 'hostname "$1"; mount --bind "$2" /etc/hosts; shift 2; '
        script += "" if host == 0 else f'mount -t tmpfs -o ro none "{self.hidden}"; '
        arguments = [self.NAMES[host], str(self.folder / f"{self.NAMES[host]}.hosts"), *command]
        with log.open("w") as file:
            return subprocess.Popen(
                ["nsenter", f"--net=/run/netns/{self._spaces[host]}", "unshare", "--uts", "--mount"]
                + ["sh", "-ec", script + 'exec "$@"', "sh", *arguments],
                cwd=ROOT,
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def connect(self, connected: bool) -> None:
        """Plugs the cable of machine 1 in, or pulls it: nothing is told to anybody at either end of a connection."""
        _ip("-n", self._spaces[1], "link", "set", "eth0", "up" if connected else "down")

    def running(self, host: int) -> list[int]:
        """Process ids on a machine."""
        return [int(pid) for pid in _ip("netns", "pids", self._spaces[host]).split()]

    def kill_all(self, host: int) -> None:
        while pids := self.running(host):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def wait_for_line(log: Path, start: str, process: subprocess.Popen, seconds: float = 120) -> None:
    """Returns when a line of the log begins with `start`; fails where the process ends before, or after so long."""
    end = time.monotonic() + seconds
    while not any(line.startswith(start) for line in log.read_text(errors="replace").splitlines()):
        assert process.poll() is None, f"ended before {start!r}:\n{log.read_text()[-3000:]}"
        assert time.monotonic() < end, f"no {start!r} in {seconds} s:\n{log.read_text()[-3000:]}"
        time.sleep(0.05)
