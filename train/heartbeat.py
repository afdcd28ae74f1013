"""Several machines: which network interface they talk through, and how a rank that is gone is noticed within seconds.

A process that dies closes its connections, and ranks that vote notice at once. Two losses they would not notice. A
machine that vanishes (power, cable) closes nothing, and gloo never asks whether the other end is still there: a vote
waits a quarter of an hour, until TCP gives up. And a rank that waits for its GPU, inside a collective, takes no vote.

So each rank keeps an idle TCP connection to rank 0 on which the two kernels ask each other for signs of life
(keep-alive), and a thread that sleeps until that breaks. A kernel answers for its process however long a step, a save
or a download takes: what breaks the connection is the end of the process, of the machine or of the network.

Apart from train/launching.py because that asks what was launched, and this watches it.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable, MutableMapping
from types import TracebackType
from typing import TYPE_CHECKING

from train.common import LaunchError, StopRequested

if TYPE_CHECKING:
    from torch.distributed import Store

# Without a sign of life for so long, a machine is lost: long enough for a switch to fail over, short for a person.
# SHIFTLENS_LOST_SECONDS is another number.
LOST_SECONDS = 30
# How long a rank that knows of a loss may take to end by itself: in a vote it notices too, and ends in better order.
GRACE_SECONDS = 5.0
WELCOME = b"."  # when all ranks have come
DONE = "done"


# ----------------------------------------------------------------------------------------------------------------------
# Interface
# ----------------------------------------------------------------------------------------------------------------------


def choose_interface(environment: MutableMapping[str, str] = os.environ) -> str:
    """This machine's address on the network of the job; sets GLOO_SOCKET_IFNAME to its interface unless it is set.

    gloo alone would take the address that the machine's own name stands for, and many an /etc/hosts says 127.0.1.1.

    Args:
        environment: with MASTER_ADDR, MASTER_PORT, WORLD_SIZE, and LOCAL_WORLD_SIZE where there are several machines.

    Raises LaunchError where GLOO_SOCKET_IFNAME names no interface, or the choice between several is left to a person.
    """
    import psutil

    interfaces = {  # IPv4 first; link-local IPv6 addresses mean nothing to another machine
        name: [a.address for a in sorted(found, key=lambda a: a.family) if _is_address(a.family, a.address)]
        for name, found in psutil.net_if_addrs().items()
    }
    usable = {name: addresses for name, addresses in interfaces.items() if addresses}
    if asked := environment.get("GLOO_SOCKET_IFNAME", "").partition(",")[0]:
        if asked not in usable:
            raise LaunchError(
                f"GLOO_SOCKET_IFNAME={asked}: no such interface with an address; here: {', '.join(usable)}"
            )
        return usable[asked][0]
    main = environment["MASTER_ADDR"]
    address = _address_towards(main)
    if address is None:
        raise LaunchError(f"no way to a main process at {main}; check --main_process_ip")
    one_machine = environment.get("LOCAL_WORLD_SIZE", environment["WORLD_SIZE"]) == environment["WORLD_SIZE"]
    if _is_loopback(address) and not one_machine:  # rank 0's machine, whose name leads back to itself
        others = [found[0] for found in usable.values() if not _is_loopback(found[0])]
        default = _address_towards("192.0.2.1")  # an address of no machine: out by the default route, if there is one
        if default not in others and len(others) != 1:
            raise LaunchError(
                f"{main} is {address} here, which other machines cannot reach: give --main_process_ip the address that "
                f"they can, or set GLOO_SOCKET_IFNAME to its interface ({', '.join(usable)})"
            )
        address = default if default in others else others[0]
    for name, addresses in usable.items():
        if address in addresses:
            environment["GLOO_SOCKET_IFNAME"] = name
    assert address is not None
    return address


def _is_address(family: int, address: str) -> bool:
    return family == socket.AF_INET or (family == socket.AF_INET6 and "%" not in address)


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def _address_towards(host: str) -> str | None:
    """The address from which this machine would send to `host`; None where there is no way."""
    with contextlib.suppress(OSError):
        family, kind, protocol, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)  # of a datagram socket: sends nothing
            return str(probe.getsockname()[0])
    return None


# ----------------------------------------------------------------------------------------------------------------------
# Heartbeat
# ----------------------------------------------------------------------------------------------------------------------


class Heartbeat:
    """Ends this process with exit code 1 and one line when rank 0, or for rank 0 any other rank, is lost.

    A checkpoint that is being written is finished first. A context: a rank that leaves it without an error, or obeying
    a stop signal, says so to the others, and its end is no loss. After another error the thread stays, without words,
    to end a process that hangs on its way out.

    Args:
        rank: of this process.
        peers: the connections, with the name of what is at the other end: on rank 0 one for each other rank, on others
            that to rank 0.
        store: of the launch, with which the process group is to be made, too: another one would be opened at the port
            that this one leaves, while other ranks are still connected.
        speaks: whether this process says what was lost: one of each machine does.
    """

    def __init__(self, rank: int, peers: dict[socket.socket, str], store: Store, speaks: bool) -> None:
        self.store = store
        self._rank, self._peers, self._speaks = rank, peers, speaks
        self._left = False
        # A forked worker would hold the connections open after this process was killed.
        os.register_at_fork(after_in_child=self._close)
        threading.Thread(target=self._watch, name="heartbeat", daemon=True).start()

    def __enter__(self) -> Heartbeat:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if kind is not None and not issubclass(kind, StopRequested):
            self._speaks = False  # the error has the word
            return
        self._left = True
        for peer in self._peers:
            with contextlib.suppress(OSError):
                peer.sendall(DONE.encode())
                peer.shutdown(socket.SHUT_RDWR)  # wakes the thread, too

    def _close(self) -> None:
        for peer in self._peers:
            peer.close()

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for peer, name in self._peers.items():
                selector.register(peer, selectors.EVENT_READ, (peer, name))
            while selector.get_map():
                for key, _ in selector.select():
                    peer, name = key.data
                    try:
                        said = peer.recv(1024).decode(errors="replace")  # one small message, or the end
                        lost = not said
                        said = said or f"{name} ended; look for its last lines"
                    except OSError as error:
                        lost, said = True, f"{name} is lost ({error.strerror}): its machine, or the network between"
                    if self._left:
                        return
                    if said != DONE:
                        # Rank 0 cannot speak for its machine if it is what was lost.
                        self._speaks = self._speaks or (lost and self._rank == 1)
                        self._end(said)
                        return
                    selector.unregister(peer)

    def _end(self, loss: str) -> None:
        if self._rank == 0:
            for peer in self._peers:
                with contextlib.suppress(OSError):
                    peer.sendall(loss.encode()[:1000])
        # Those who speak go first: a launcher ends the other processes of its machine as soon as one has ended.
        time.sleep(GRACE_SECONDS if self._speaks else GRACE_SECONDS + 1)
        for thread in threading.enumerate():
            if thread.name == "checkpoint":  # of models.checkpoints.CheckpointWriter
                thread.join()
        if self._left:
            return
        if self._speaks:
            line = f"[rank {self._rank}] error: {loss}; the same command continues from the last checkpoint\n"
            os.write(2, line.encode())
        os._exit(1)  # whatever the main thread waits for


def start_heartbeat(environment: MutableMapping[str, str] = os.environ, *, patience: float) -> Heartbeat:
    """Connects all ranks with rank 0, through the store of the launch; to be called before the process group is made.

    Args:
        environment: what launchers set: RANK, WORLD_SIZE (above 1), MASTER_ADDR, MASTER_PORT, ...
        patience: seconds in which all ranks must have come.

    Raises LaunchError where they have not.
    """
    import torch.distributed as dist

    rank, world = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    seconds = environment.get("SHIFTLENS_LOST_SECONDS", str(LOST_SECONDS))
    if not seconds.isdigit() or int(seconds) < 3:
        raise LaunchError(f"SHIFTLENS_LOST_SECONDS must be a whole number of seconds from 3 on, not {seconds!r}")
    address = choose_interface(environment)
    # After a restart by the launcher (--max_restarts) the store is still that of the first start.
    key = f"shiftlens/heartbeat/{environment.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    end = time.monotonic() + patience
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=datetime.timedelta(seconds=patience)))
        if rank == 0:
            peers = _accept(address, world, lambda where: store.set(key, where), end)
        else:
            peers = _connect(store.get(key).decode(), rank, end)
    except RuntimeError as error:  # torch's DistError
        reason = str(error).partition("\n")[0].rstrip(".")
        if "EADDRINUSE" in reason:
            port = environment["MASTER_PORT"]
            raise LaunchError(
                f"port {port} of this machine is in use, perhaps by another launch; give another --main_process_port"
            ) from None
        if store_is_gone(reason):
            main = f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
            raise LaunchError(
                f"the main process at {main} ended before all had come, or is none ({reason}); look for its last lines"
            ) from None
        if re.search(r"timed? ?out", reason, re.IGNORECASE):
            raise LaunchError(f"not all of {world} processes came within {patience:.0f} s ({reason})") from None
        raise LaunchError(f"the processes could not meet ({reason})") from None
    for peer in peers:
        _keep_alive(peer, int(seconds))
    return Heartbeat(rank, peers, store, speaks=rank == 0 or environment.get("LOCAL_RANK", "0") == "0")


def store_is_gone(reason: str) -> bool:
    """Whether that line, of an error of torch's store, means that the process that kept the store has ended."""
    return re.search(r"connection was likely closed|connection reset|broken pipe", reason, re.IGNORECASE) is not None


def _accept(address: str, world: int, publish: Callable[[str], None], end: float) -> dict[socket.socket, str]:
    """Rank 0: a connection with each other rank. Whoever does not know the secret is turned away."""
    secret = secrets.token_hex(16)
    peers: dict[socket.socket, str] = {}
    missing = set(range(1, world))
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, 0), family=family, backlog=world) as server:
        publish(f"{secret} {socket.gethostname()} {address} {server.getsockname()[1]}")
        while missing:
            server.settimeout(max(end - time.monotonic(), 0.001))
            try:
                peer, _ = server.accept()
            except TimeoutError:
                ranks = ", ".join(map(str, sorted(missing)[:8]))
                raise LaunchError(
                    f"ranks {ranks} have not connected to {address} in time; is a firewall there?"
                ) from None
            peer.settimeout(5)
            try:
                told, number, host = peer.recv(1024).decode().split()
            except (OSError, ValueError):  # a port scanner
                peer.close()
                continue
            if not secrets.compare_digest(told.encode(), secret.encode()) or int(number) not in missing:
                peer.close()
                continue
            missing.remove(int(number))
            peers[peer] = f"rank {number} on {host}"
    for peer in peers:
        peer.sendall(WELCOME)
    return peers


def _connect(published: str, rank: int, end: float) -> dict[socket.socket, str]:
    """Another rank: its connection with rank 0."""
    secret, host, address, port = published.split()
    try:
        peer = socket.create_connection((address, int(port)), timeout=max(end - time.monotonic(), 1))
        peer.sendall(f"{secret} {rank} {socket.gethostname()}".encode())
        peer.settimeout(max(end + 5 - time.monotonic(), 1))  # rank 0 may have begun to wait later
        welcome = peer.recv(1)
    except OSError as error:
        raise LaunchError(
            f"rank 0 on {host} cannot be reached at {address}:{port} ({error}): machines must reach each other at all "
            "ports; is a firewall there, or is GLOO_SOCKET_IFNAME on its machine the wrong interface?"
        ) from None
    if welcome != WELCOME:
        raise LaunchError(f"rank 0 on {host} ended before all ranks had come; look for its last lines")
    return {peer: f"rank 0 on {host}"}


def _keep_alive(peer: socket.socket, seconds: int) -> None:
    """After so many seconds without an answer from the other machine's kernel, reading from `peer` fails."""
    peer.settimeout(None)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {
        "TCP_KEEPIDLE": seconds // 2,
        "TCP_KEEPALIVE": seconds // 2,  # the same on macOS
        "TCP_KEEPINTVL": max(seconds // 6, 1),
        "TCP_KEEPCNT": 3,
        "TCP_USER_TIMEOUT": seconds * 1000,
    }
    for name, value in options.items():
        if hasattr(socket, name):
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
