"""The NATS plane on a real nats-server with JetStream."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from kv_fleet import Worker, same, until
from llm_worker.kv import nats_source
from llm_worker.kv.index import Index
from llm_worker.kv.nats_plane import NatsPlane
from llm_worker.kv.nats_source import NatsSource
from nats_process import NatsServer
from worker_process import free_ports

pytestmark = [pytest.mark.needs("nats"), pytest.mark.timeout(90)]
T = TypeVar("T")


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is a matter of seconds in a fleet."""
    monkeypatch.setattr(nats_source, "DISCOVER_SECONDS", 0.3)
    monkeypatch.setattr(nats_source, "STATUS_SECONDS", 0.5)
    monkeypatch.setattr(nats_source, "_SNAPSHOT_PAUSE_SECONDS", 0.5)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[NatsServer]:
    """A server of this test's own."""
    running = NatsServer(tmp_path / "nats", free_ports(1)[0])
    running.start()
    yield running
    running.kill()


class Fleet:
    """An index fed from NATS."""

    def __init__(self, url: str) -> None:
        self.index = Index()
        self._lock = threading.Lock()
        self.hold = threading.Event()  # while cleared, nothing is indexed
        self.hold.set()
        self.source = NatsSource(url, index=self.index, call=self.call)
        self.source.start()

    def call(self, ask: Callable[[], T]) -> T:
        self.hold.wait()
        with self._lock:
            return ask()

    def close(self) -> None:
        self.hold.set()
        self.source.close()


@pytest.fixture
def worker(server: NatsServer) -> Iterator[Worker]:
    """A worker that publishes on NATS."""
    made = Worker("host.example:8081")
    yield made
    if made.plane is not None:
        made.plane.close()


@pytest.fixture
def fleets(server: NatsServer) -> Iterator[Callable[[], Fleet]]:
    """Makes fleets that end with the test."""
    made: list[Fleet] = []

    def make() -> Fleet:
        made.append(Fleet(server.url))
        return made[-1]

    yield make
    for fleet in made:
        fleet.close()


def plane(worker: Worker, url: str, **options: float) -> NatsPlane:
    made = NatsPlane(
        url,
        sources=worker.index.sources,
        at_rest=worker.at_rest,
        **options,  # type: ignore[arg-type]
    )
    worker.plane = made
    return made


def test_a_fleet_that_comes_late_holds_what_the_worker_holds(
    server: NatsServer, worker: Worker, fleets: Callable[[], Fleet]
) -> None:
    """Blocks from before it came, second copies of blocks, and everything since."""
    mine = plane(worker, server.url)
    first = worker.store(50)
    worker.store_again(first[:4])
    worker.remove(first[:10])
    fleet = fleets()
    until("the fleet to be the same", lambda: same(worker, fleet.index))
    worker.remove(first[10:20])
    worker.store(600)
    until("the fleet to follow", lambda: same(worker, fleet.index))
    until(
        "all acknowledged", lambda: mine.stats.acknowledged_batches == mine.stats.published_batches
    )

    assert mine.stats.acknowledged_batches == 653
    assert mine.stats.snapshots_served == 1
    assert not +mine.stats.dropped


def test_a_killed_server_costs_nothing_that_fits_into_the_buffer(
    server: NatsServer, worker: Worker, fleets: Callable[[], Fleet]
) -> None:
    """SIGKILL while batches are on their way: all arrive, once, and no snapshot is needed."""
    mine = plane(worker, server.url)
    fleet = fleets()
    worker.store(20)
    until("the fleet to be the same", lambda: same(worker, fleet.index))
    served = mine.stats.snapshots_served
    stop = threading.Event()

    def publish() -> None:
        while not stop.wait(0.0005):
            worker.store()

    traffic = threading.Thread(target=publish)
    traffic.start()
    try:
        server.kill()
        until("the plane to notice", lambda: not mine.stats.up)
        until("the fleet to say so", lambda: fleet.index.sources()[0].stale)
        server.start()
        until("the plane to be back", lambda: mine.stats.up)
    finally:
        stop.set()
        traffic.join()
    until("the fleet to be the same again", lambda: same(worker, fleet.index))
    (listener,) = fleet.source.listeners()

    assert mine.stats.reconnects >= 1
    assert mine.stats.acknowledged_batches == mine.stats.published_batches
    assert not +mine.stats.dropped
    assert mine.stats.snapshots_served == served
    assert listener.batches_lost == 0
    assert fleet.index.sources()[0].stats.duplicate_blocks == 0


def test_an_outage_longer_than_the_buffer_is_counted_and_healed_by_a_snapshot(
    server: NatsServer, worker: Worker, fleets: Callable[[], Fleet]
) -> None:
    """Receivers see the hole in the numbers, whatever else is dropped."""
    mine = plane(worker, server.url, buffer_batches=100)
    fleet = fleets()
    worker.store(20)
    until("the fleet to be the same", lambda: same(worker, fleet.index))
    server.kill()
    until("the plane to notice", lambda: not mine.stats.up)
    worker.store(1000)
    dropped = mine.stats.dropped["buffer_full"]
    assert mine.stats.buffered_batches in (100, 101)  # the newest one is kept always
    assert dropped + mine.stats.buffered_batches == 1000
    server.start()
    until("the fleet to be the same again", lambda: same(worker, fleet.index))
    (listener,) = fleet.source.listeners()

    assert listener.gaps["gap"] >= 1
    assert 0 < listener.batches_lost <= dropped
    assert mine.stats.snapshots_served == 2


def test_a_server_that_comes_back_empty_is_filled_again(
    server: NatsServer, worker: Worker, fleets: Callable[[], Fleet]
) -> None:
    """Another stream under the same name: the planes' numbers say that nothing is missing."""
    plane(worker, server.url)
    fleet = fleets()
    worker.store(20)
    until("the fleet to be the same", lambda: same(worker, fleet.index))
    server.kill()
    server.forget()
    worker.store(20)
    server.start()
    until("the fleet to be the same again", lambda: same(worker, fleet.index))
    worker.store(5)
    until("and to go on", lambda: same(worker, fleet.index))
    (listener,) = fleet.source.listeners()

    assert listener.batches_lost == 0


def test_a_tail_that_the_server_lost_is_missed_without_another_batch(
    server: NatsServer,
    worker: Worker,
    fleets: Callable[[], Fleet],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The worker says how far it is; a fleet that stays behind takes a snapshot."""
    monkeypatch.setattr(nats_source, "_TAIL_SECONDS", 1.0)
    mine = plane(worker, server.url)
    fleet = fleets()
    worker.store(20)
    until("the fleet to be the same", lambda: same(worker, fleet.index))
    server.kill()
    until("the plane to notice", lambda: not mine.stats.up)
    worker.store(3)
    with mine._lock:  # as if it had been acknowledged and then lost
        mine._buffer.clear()
        mine._window.clear()
    server.start()
    until("the fleet to be the same again", lambda: same(worker, fleet.index))

    assert mine.stats.snapshots_served == 2


def test_a_full_disk_is_counted_and_the_fleet_recovers_when_there_is_room(
    server: NatsServer, worker: Worker, fleets: Callable[[], Fleet]
) -> None:
    """The server refuses the stream: the plane says so, keeps what fits, and counts the rest."""
    server.stop()
    server.configure(max_file_store="64KB")
    server.start()
    mine = plane(worker, server.url, buffer_batches=50, max_bytes=1 << 20)
    worker.store(200)
    until("drops", lambda: mine.stats.dropped["buffer_full"] == 150)
    assert not mine.stats.up
    assert mine.stats.acknowledged_batches == 0
    server.stop()
    server.configure(max_file_store="256MB")
    server.start()
    fleet = fleets()
    until("the fleet to be the same", lambda: same(worker, fleet.index))
    until("the plane to be up", lambda: mine.stats.up)


def test_a_slow_consumer_that_the_stream_outran_is_healed(
    server: NatsServer, worker: Worker, fleets: Callable[[], Fleet]
) -> None:
    """The stream drops its oldest while nobody reads; the hole is seen and a snapshot fills it."""
    mine = plane(worker, server.url, max_bytes=16 << 10)
    fleet = fleets()
    worker.store(20)
    until("the fleet to be the same", lambda: same(worker, fleet.index))
    fleet.hold.clear()
    worker.store(5000)
    until("all stored", lambda: mine.stats.buffered_batches == 0)
    fleet.hold.set()
    until("the fleet to be the same again", lambda: same(worker, fleet.index))
    (listener,) = fleet.source.listeners()

    assert listener.batches_lost > 0


def test_a_restarted_worker_begins_anew(
    server: NatsServer, worker: Worker, fleets: Callable[[], Fleet]
) -> None:
    """Its new epoch clears what its predecessor held, though both are in one stream."""
    plane(worker, server.url, epoch=1_000_000)
    fleet = fleets()
    worker.store(20)
    until("the fleet to be the same", lambda: same(worker, fleet.index))
    assert worker.plane is not None
    worker.plane.close()
    until("the fleet to miss it", lambda: "disconnected" in fleet.index.sources()[0].stale)
    again = Worker("host.example:8081")
    made = plane(again, server.url, epoch=1_000_100)
    again.store(5)
    until("the fleet to be the same as the new one", lambda: same(again, fleet.index))
    made.close()


def test_two_workers_with_one_name_are_found_out(
    server: NatsServer, worker: Worker, fleets: Callable[[], Fleet]
) -> None:
    """Neither can be told from the other, so neither is trusted."""
    plane(worker, server.url)
    other = Worker("host.example:8081")
    second = plane(other, server.url)
    fleet = fleets()
    worker.store(3)
    other.store(3)
    until(
        "duplicate_worker",
        lambda: any("duplicate_worker" in source.stale for source in fleet.index.sources()),
    )
    second.close()
    until("the fleet to trust the one that is left", lambda: same(worker, fleet.index))


def test_a_batch_beyond_the_servers_limit_is_counted_and_healed(
    server: NatsServer, worker: Worker, fleets: Callable[[], Fleet]
) -> None:
    """A payload of more than a megabyte cannot be sent; its blocks arrive by snapshot."""
    mine = plane(worker, server.url)
    fleet = fleets()
    worker.store(5)
    until("the fleet to be the same", lambda: same(worker, fleet.index))
    worker.store(1, blocks=300_000)
    worker.store(1)
    until("the fleet to be the same again", lambda: same(worker, fleet.index))

    assert mine.stats.dropped["too_large"] == 1


def test_a_worker_that_cannot_tell_its_blocks_is_read_from_the_beginning(
    server: NatsServer, worker: Worker, fleets: Callable[[], Fleet]
) -> None:
    """The stream has everything since the worker's start, and the sequence numbers prove it."""

    def busy(_: Callable[[], T]) -> T:
        raise TimeoutError

    worker.plane = mine = NatsPlane(server.url, sources=worker.index.sources, at_rest=busy)
    blocks = worker.store(700)
    worker.remove(blocks[:100])
    until("all stored", lambda: mine.stats.acknowledged_batches == 701)
    fleet = fleets()
    until("the fleet to be the same", lambda: same(worker, fleet.index))
    worker.store(10)
    until("the fleet to follow", lambda: same(worker, fleet.index))
    (listener,) = fleet.source.listeners()

    assert listener.batches_replayed == 701
    assert listener.batches_lost == 0
