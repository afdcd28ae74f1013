"""Ranks that agree: votes and messages reach all of many ranks, along the sides of a grid."""

import datetime
import os
import signal
import socket
import sys
import threading
import time
import types

import pytest
import torch
from torch.multiprocessing import start_processes

from data import DataError
from train.common import StopRequested
from train.launching import FLAT, SIDE, Agreement, PeerError, PeerLost, StopSignals, grid


@pytest.mark.parametrize("world", [1, 2, 8, 15, 16, 17, 18, 24, 31, 32, 48, 64, 100, 128, 131, 512, 1000])
def test_a_grid_holds_all_ranks_and_has_short_sides_where_it_can(world: int) -> None:
    sides = grid(world)
    product = 1
    for side in sides:
        product *= side
    assert product == world
    if world <= FLAT:
        assert sides == [world]
    if world in (24, 32, 48, 64, 128, 512):
        assert max(sides) <= SIDE
    assert sum(grid(512)) == 24


def vote(rank: int, world: int, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(world)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    agreement = Agreement(rank, world, datetime.timedelta(seconds=100))
    assert agreement.share({"from": rank}) == {"from": 0}
    assert agreement.settle(None) == 0
    for signalled in (0, 5, world - 1):
        assert agreement.settle(None, 15 if rank == signalled else 0) == 15
    # Two ranks fail: the lower one says why, and all others end.
    failure = DataError(f"of {rank}") if rank in (world - 1, 7) else None
    with pytest.raises(DataError if rank == 7 else PeerError, match="of 7" if rank == 7 else ""):
        agreement.settle(failure)
    torch.distributed.destroy_process_group()


@pytest.mark.timeout(120)
def test_votes_reach_every_rank_of_a_grid() -> None:
    """24 ranks: sides of 8 and 3."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start_processes(vote, (24, port), nprocs=24, start_method="fork")


def meet_nobody(rank: int, world: int, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(world)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    if rank == 0:
        time.sleep(0.5)  # the other one waits for this rank's address meanwhile
        os._exit(0)
    with pytest.raises(PeerLost, match="ended"):
        Agreement(rank, world, datetime.timedelta(seconds=30))
    os._exit(0)


@pytest.mark.timeout(60)
def test_a_rank_that_ends_before_the_ranks_have_met_is_a_lost_peer() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start_processes(meet_nobody, (2, port), nprocs=2, start_method="fork")


def read_what(rank: int, signals: StopSignals, agreement: Agreement) -> None:
    with agreement.reading(signals):
        if rank == 1:
            raise DataError("of 1")


def read_slowly(rank: int, signals: StopSignals, agreement: Agreement, begun: list[int]) -> None:
    with agreement.reading(signals):
        begun.append(rank)
        if rank == 1:
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
            time.sleep(100)
        # rank 0 hears of the other's signal where it votes


def read_for_minutes(rank: int, world: int, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(world)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    agreement = Agreement(rank, world, datetime.timedelta(seconds=30))
    with StopSignals() as signals:
        with agreement.reading(signals):
            read = rank
        assert read == rank
        with pytest.raises(DataError if rank == 1 else PeerError):
            read_what(rank, signals, agreement)
        begun: list[int] = []
        start = time.monotonic()
        with pytest.raises(StopRequested) as stopped:
            read_slowly(rank, signals, agreement, begun)
        assert stopped.value.code == 128 + signal.SIGTERM
        assert time.monotonic() - start < 60
        with pytest.raises(StopRequested):  # a run that is to stop does not begin to read
            read_slowly(rank, signals, agreement, begun)
        assert begun == [rank]
    with StopSignals() as signals:
        if rank == 1:  # the signal comes while this rank waits for the other's vote, before it would begin
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        else:
            time.sleep(1)
        with pytest.raises(StopRequested):
            read_slowly(rank, signals, agreement, begun)
    assert begun == ([0, 0] if rank == 0 else [1])
    os._exit(0)


@pytest.mark.timeout(60)
def test_a_signal_to_one_rank_ends_its_reading_at_once_and_stops_all_ranks() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start_processes(read_for_minutes, (2, port), nprocs=2, start_method="fork")


def test_a_signal_at_any_moment_of_reading_is_a_stop_and_nothing_else() -> None:
    """It comes at each call and return of the block, its entry and its exit in turn."""

    def read(signals: StopSignals, moment: int) -> int:
        """Events until the block is through; the signal comes at that number of them."""
        events = 0

        def count(frame: types.FrameType, *_: object) -> None:
            nonlocal events
            events += 1
            if events == moment:
                signals._handle(signal.SIGTERM, frame)  # as Python does; raise_signal would come in this function

        agreement = Agreement(0, 1)
        sys.setprofile(count)
        try:
            with agreement.reading(signals):
                sum(map(abs, range(3)))
        finally:
            sys.setprofile(None)
        return events

    with StopSignals() as signals:
        total = read(signals, 0)
    assert total > 20
    stopped = 0
    for moment in range(1, total + 1):
        with StopSignals() as signals:
            try:
                read(signals, moment)
            except StopRequested:
                stopped += 1
            assert signals.received == signal.SIGTERM  # whoever asks next hears of it
    assert stopped > total / 2
