"""The NATS plane on a real nats-server with JetStream."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import httpx
import nats.js.errors
import pytest

from llm_worker.fleet import nats_reader
from llm_worker.fleet.nats_reader import NatsReader, Timings
from llm_worker.kv.index.index import Index
from llm_worker.kv.index.source import Source
from llm_worker.kv.plane import nats_plane
from llm_worker.kv.plane.nats_plane import NatsPlane, stream_name
from llm_worker.kv.records import BlockStored, Event, Hash
from support.kv_fleet import BLOCK_SIZE, Worker, same
from support.nats_process import NatsServer, Proxy
from support.waiting import until
from support.worker_process import WorkerProcess, free_ports

pytestmark = [pytest.mark.needs("nats"), pytest.mark.timeout(150)]
T = TypeVar("T")


# What is a matter of seconds in a fleet.
HURRY = Timings(discover_seconds=0.3, status_seconds=0.5, snapshot_pause_seconds=0.5)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[NatsServer]:
    """A server of this test's own."""
    running = NatsServer(tmp_path / "nats", free_ports(1)[0])
    running.start()
    yield running
    running.kill()


@pytest.fixture
def proxy(server: NatsServer) -> Iterator[Proxy]:
    """Another way to the server, on which it can be made to report an error."""
    made = Proxy(server)
    yield made
    made.close()


class Fleet:
    """An index fed from NATS."""

    def __init__(self, url: str, timings: Timings) -> None:
        self.index = Index()
        self._lock = threading.Lock()
        self.hold = threading.Event()  # while cleared, nothing is indexed
        self.hold.set()
        self.source = NatsReader(url, index=self.index, call=self.call, timings=timings)
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
def fleets(server: NatsServer) -> Iterator[Callable[..., Fleet]]:
    """Makes fleets that end with the test."""
    made: list[Fleet] = []

    def make(url: str = server.url, **timings: Any) -> Fleet:
        made.append(Fleet(url, replace(HURRY, **timings)))
        return made[-1]

    yield make
    for fleet in made:
        fleet.close()


def plane(worker: Worker, url: str, **options: float) -> NatsPlane:
    made = NatsPlane(
        url,
        sources=worker.index.sources,
        on_index_thread=worker.on_index_thread,
        **options,  # type: ignore[arg-type]
    )
    worker.plane = made
    return made


def followed(worker: Worker, fleets: Callable[..., Fleet], **timings: float) -> Fleet:
    """A fleet that was there before the worker's first 20 batches and holds what they say."""
    fleet = fleets(**timings)
    worker.store(20)
    until("the fleet to be the same", lambda: same(worker, fleet.index))
    return fleet


def test_a_fleet_that_comes_late_holds_what_the_worker_holds(
    server: NatsServer, worker: Worker, fleets: Callable[..., Fleet]
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
    server: NatsServer,
    worker: Worker,
    fleets: Callable[..., Fleet],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SIGKILL while batches are on their way: all arrive, once, and no snapshot is needed."""
    # A busy machine takes its time, and a reader that waits in vain takes a snapshot.
    mine = plane(worker, server.url, buffer_batches=1_000_000)
    fleet = followed(worker, fleets, late_seconds=60.0, tail_seconds=60.0)
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
    until("the fleet to be the same again", lambda: same(worker, fleet.index), 60)
    until("all acknowledged", lambda: not mine.stats.buffered_batches)
    (listener,) = fleet.source.listeners()

    assert mine.stats.reconnects >= 1
    assert mine.stats.acknowledged_batches == mine.stats.published_batches
    assert not +mine.stats.dropped
    assert mine.stats.snapshots_served == served
    assert listener.batches_lost == 0
    assert fleet.index.sources()[0].stats.duplicate_blocks == 0


def test_an_outage_longer_than_the_buffer_is_counted_and_healed_by_a_snapshot(
    server: NatsServer, worker: Worker, fleets: Callable[..., Fleet]
) -> None:
    """Receivers see the hole in the numbers, whatever else is dropped."""
    mine = plane(worker, server.url, buffer_batches=100)
    fleet = followed(worker, fleets)
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
    assert listener.replays["aged_out"] == listener.gaps["gap"]
    assert 0 < listener.batches_lost <= dropped
    assert mine.stats.snapshots_served == 2


def test_a_server_that_comes_back_empty_is_filled_again(
    server: NatsServer, worker: Worker, fleets: Callable[..., Fleet]
) -> None:
    """Another stream under the same name: the planes' numbers say that nothing is missing."""
    plane(worker, server.url)
    fleet = followed(worker, fleets)
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
    fleets: Callable[..., Fleet],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The worker says how far it is; a fleet that stays behind takes a snapshot."""
    mine = plane(worker, server.url)
    fleet = followed(worker, fleets, tail_seconds=1.0)
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
    server: NatsServer, worker: Worker, fleets: Callable[..., Fleet]
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


def test_a_disk_that_fills_up_costs_what_does_not_fit_into_the_buffer(
    server: NatsServer,
    worker: Worker,
    fleets: Callable[..., Fleet],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever took the room: the plane says so, readers doubt, and both recover when it is free."""
    monkeypatch.setattr(nats_plane, "_ACKNOWLEDGE_SECONDS", 1.0)
    server.stop()
    server.configure(max_file_store="4MB")
    server.start()
    mine = plane(worker, server.url, buffer_batches=50, max_bytes=1 << 20)
    fleet = followed(worker, fleets)
    until("all stored", lambda: mine.stats.acknowledged_batches == 20)
    asyncio.run(fill(server.url))
    worker.store(200)
    until("the plane to say so", lambda: not mine.stats.up)
    until("the fleet to doubt", lambda: "upstream" in fleet.index.sources()[0].stale)
    dropped = mine.stats.dropped["buffer_full"]
    assert mine.stats.buffered_batches in (50, 51)  # the newest one is kept always
    assert dropped + mine.stats.buffered_batches == 200
    assert mine.stats.acknowledged_batches == 20
    asyncio.run(empty(server.url))
    until("the plane to be up", lambda: mine.stats.up)
    until("the fleet to be the same again", lambda: same(worker, fleet.index))
    until("all acknowledged", lambda: not mine.stats.buffered_batches)

    assert mine.stats.acknowledged_batches == mine.stats.published_batches == 220 - dropped
    assert mine.stats.dropped["buffer_full"] == dropped
    assert mine.stats.snapshots_served > 1


async def fill(url: str) -> None:
    """Store somebody else's messages until the server takes no more."""
    client = await nats.connect(url)
    stream = client.jetstream()
    await stream.add_stream(name="OTHER", subjects=["other"])
    with pytest.raises(nats.js.errors.ServiceUnavailableError):
        while True:
            await stream.publish("other", b"." * 100_000)
    await client.close()


async def empty(url: str) -> None:
    """Delete those messages."""
    client = await nats.connect(url)
    await client.jetstream().purge_stream("OTHER")
    await client.close()


def test_an_error_that_the_server_reports_costs_the_plane_a_connection(
    server: NatsServer, proxy: Proxy, worker: Worker, fleets: Callable[..., Fleet]
) -> None:
    """``-ERR`` ends a client for good: another one stores what came since, and answers requests."""
    mine = plane(worker, proxy.url)
    first = fleets()
    worker.store(20)
    until("the fleet to be the same", lambda: same(worker, first.index))
    for number in (1, 2):
        proxy.report("Maximum Connections Exceeded")
        worker.store(20)
        until("another connection", lambda number=number: mine.stats.reconnects == number)  # type: ignore[misc]
        until("the fleet to be the same again", lambda: same(worker, first.index))
    second = fleets()
    until("a new fleet to be the same", lambda: same(worker, second.index))
    until("all acknowledged", lambda: mine.stats.acknowledged_batches == 60)

    assert mine.stats.up
    assert proxy.connections == 3
    assert not +mine.stats.dropped


def test_an_error_that_the_server_reports_costs_the_fleet_a_connection(
    server: NatsServer,
    proxy: Proxy,
    worker: Worker,
    fleets: Callable[..., Fleet],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It reads on where it was over another one, even if it waited for somebody's answer."""
    mine = plane(worker, server.url)
    stuck, runs = Worker("stuck"), threading.Event()
    runs.set()
    stuck.plane = NatsPlane(
        server.url,
        sources=lambda: stuck.index.sources() if runs.wait() else [],
        on_index_thread=stuck.on_index_thread,
    )
    stuck.store()
    until("its stream", lambda: stuck.plane.stats.acknowledged_batches == 1)  # type: ignore[union-attr]
    runs.clear()
    try:
        fleet = fleets(proxy.url, tail_seconds=60.0)
        worker.store(20)
        until("the fleet to be the same", lambda: same(worker, fleet.index))
        (listener,) = fleet.source.listeners()
        for number in (1, 2, 3):
            proxy.report("Maximum Connections Exceeded")
            worker.store(20)
            until("another connection", lambda number=number: listener.reconnects == number)  # type: ignore[misc]
            until("the fleet to be the same again", lambda: same(worker, fleet.index))
    finally:
        runs.set()
        stuck.plane.close()

    assert fleet.source.alive
    assert listener.batches_lost == 0
    assert mine.stats.snapshots_served == 1


def test_a_plane_that_broke_answers_again(
    server: NatsServer,
    worker: Worker,
    fleets: Callable[..., Fleet],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What its last connection had does not count for the next one."""
    mine = plane(worker, server.url)
    worker.store(20)
    until("all stored", lambda: mine.stats.acknowledged_batches == 20)
    store = NatsPlane._store

    async def break_once(*_: object) -> list[Any]:
        monkeypatch.setattr(NatsPlane, "_store", store)
        raise LookupError("a bug")

    monkeypatch.setattr(NatsPlane, "_store", break_once)
    worker.store(20)
    until("all stored again", lambda: mine.stats.acknowledged_batches == 40)
    fleet = fleets()
    until("a new fleet to be the same", lambda: same(worker, fleet.index))

    assert mine.stats.reconnects == 1
    assert mine.stats.snapshots_served == 1
    assert not +mine.stats.dropped


def test_what_breaks_the_index_costs_a_reader_that_batch(
    server: NatsServer,
    worker: Worker,
    fleets: Callable[..., Fleet],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is counted, the same reader goes on, and a snapshot that does not break it decides."""
    plane(worker, server.url)
    fleet = followed(worker, fleets)
    (listener,) = fleet.source.listeners()
    (held,) = fleet.index.sources()
    apply, poison = Source.apply, 1 << 62

    def break_at_poison(source: Source, events: Sequence[Event]) -> None:
        if source is held and any(poison in getattr(event, "hashes", ()) for event in events):
            raise LookupError("a bug")
        apply(source, events)

    monkeypatch.setattr(Source, "apply", break_at_poison)
    fleet.hold.clear()  # so that all of these come together
    before = worker.store(2)
    worker.do(BlockStored(hashes=[poison], block_size=BLOCK_SIZE))
    behind = worker.store(2)
    applied: set[Hash] = set()
    take = nats_reader._Follower._take_snapshot

    async def look_first(follower: Any) -> bool:
        applied.update(held.hashes())
        return await take(follower)

    monkeypatch.setattr(nats_reader._Follower, "_take_snapshot", look_first)
    fleet.hold.set()
    until("a broken batch and two broken snapshots", lambda: listener.crashes >= 3)
    assert "undecodable" in held.stale
    assert applied >= {*before, *behind}
    assert listener.batches_lost == 1
    monkeypatch.setattr(Source, "apply", apply)
    until("the fleet to be the same again", lambda: same(worker, fleet.index))
    worker.store(5)
    until("and to go on", lambda: same(worker, fleet.index))

    assert fleet.source.listeners() == [listener]
    assert fleet.source.listeners()[0] is listener


def test_a_slow_consumer_that_the_stream_outran_is_healed(
    server: NatsServer, worker: Worker, fleets: Callable[..., Fleet]
) -> None:
    """The stream drops its oldest while nobody reads; the hole is seen and a snapshot fills it."""
    mine = plane(worker, server.url, max_bytes=16 << 10)
    fleet = followed(worker, fleets)
    fleet.hold.clear()

    def outran() -> bool:
        worker.store(1000)
        until("all stored", lambda: mine.stats.buffered_batches == 0)
        return asyncio.run(_outran(server.url, worker.source.worker))

    # How much the server and the sockets hold for a reader is theirs: until it is too much.
    until("the stream to drop what was not sent yet", outran)
    fleet.hold.set()
    until("the fleet to be the same again", lambda: same(worker, fleet.index))
    (listener,) = fleet.source.listeners()

    assert listener.batches_lost > 0


async def _outran(url: str, name: str) -> bool:
    """Whether the stream has dropped what it has not sent to its only reader."""
    client = await nats.connect(url)
    try:
        stream = client.jetstream()
        oldest = (await stream.stream_info(stream_name(name))).state.first_seq
        (reader,) = await stream.consumers_info(stream_name(name))
        return reader.delivered is not None and reader.delivered.stream_seq + 1 < oldest
    finally:
        await client.close()


def test_a_restarted_worker_begins_anew(
    server: NatsServer, worker: Worker, fleets: Callable[..., Fleet]
) -> None:
    """Its new epoch clears what its predecessor held, though both are in one stream."""
    plane(worker, server.url, epoch=1_000_000)
    fleet = followed(worker, fleets)
    assert worker.plane is not None
    worker.plane.close()
    until("the fleet to miss it", lambda: "disconnected" in fleet.index.sources()[0].stale)
    again = Worker("host.example:8081")
    made = plane(again, server.url, epoch=1_000_100)
    again.store(5)
    until("the fleet to be the same as the new one", lambda: same(again, fleet.index))
    made.close()


def test_two_workers_with_one_name_are_found_out(
    server: NatsServer, worker: Worker, fleets: Callable[..., Fleet]
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
    server: NatsServer, worker: Worker, fleets: Callable[..., Fleet]
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
    until("the others to be acknowledged", lambda: mine.stats.acknowledged_batches == 6)
    assert mine.stats.published_batches == 6


def test_a_worker_that_cannot_tell_its_blocks_is_read_from_the_beginning(
    server: NatsServer, worker: Worker, fleets: Callable[..., Fleet]
) -> None:
    """The stream has everything since the worker's start, and the sequence numbers prove it."""

    def busy(_: Callable[[], T]) -> T:
        raise TimeoutError

    worker.plane = mine = NatsPlane(server.url, sources=worker.index.sources, on_index_thread=busy)
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


def test_a_reading_from_the_beginning_that_is_interrupted_is_taken_up(
    server: NatsServer,
    proxy: Proxy,
    worker: Worker,
    fleets: Callable[..., Fleet],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was read before the connection broke is not read twice, and nothing waits for ever."""
    busy = threading.Event()
    busy.set()

    def on_index_thread(ask: Callable[[], T]) -> T:
        if busy.is_set():
            raise TimeoutError
        return worker.on_index_thread(ask)

    worker.plane = mine = NatsPlane(
        server.url, sources=worker.index.sources, on_index_thread=on_index_thread
    )
    worker.store(400)
    until("all stored", lambda: mine.stats.acknowledged_batches == 400)
    feed = nats_reader._Follower._feed

    async def break_off(follower: Any, messages: Any, **how: bool) -> None:
        await feed(follower, messages, **how)
        monkeypatch.setattr(nats_reader._Follower, "_feed", feed)
        busy.clear()
        proxy.report("Maximum Connections Exceeded")

    monkeypatch.setattr(nats_reader._Follower, "_feed", break_off)
    fleet = fleets(proxy.url, fetch_messages=50)
    until("the fleet to be the same", lambda: same(worker, fleet.index))
    (listener,) = fleet.source.listeners()

    assert proxy.connections == 2
    assert listener.batches_replayed == 400
    assert listener.batches_lost == 0


@pytest.mark.needs("vllm")
@pytest.mark.timeout(500)
def test_a_workers_blocks_reach_a_fleet_service(server: NatsServer, tmp_path: Path) -> None:
    """Engine → worker → NATS → fleet, each a process as it is shipped: trusted, the same blocks."""
    events, replay, port = free_ports(3)
    worker = WorkerProcess(
        tmp_path / "worker.log",
        (
            "--worker-kv-events-port", str(events), "--worker-kv-replay-port", str(replay),
            "--worker-kv-plane", server.url, "--worker-id", "one",
        ),
    )  # fmt: skip
    command = [
        sys.executable, "-m", "llm_worker.fleet", "--source", server.url,
        "--host", "127.0.0.1", "--port", str(port),
    ]  # fmt: skip
    with (tmp_path / "fleet.log").open("wb") as log:
        fleet = subprocess.Popen(command, stdout=log, stderr=log)

    def there() -> dict[str, Any]:
        assert fleet.poll() is None, (tmp_path / "fleet.log").read_text()
        return dict(httpx.get(f"http://127.0.0.1:{port}/kv/status", timeout=10).json())

    def hashes(url: str) -> set[Any]:
        lines = httpx.get(f"{url}/kv/dump", timeout=10).text.splitlines()
        return {value for line in lines for value in json.loads(line).get("hashes", ())}

    def agreed() -> bool:
        held = hashes(worker.system)
        return bool(held) and there()["ok"] and hashes(f"http://127.0.0.1:{port}") == held

    try:
        worker.wait_until_ready()
        for number in range(5):
            worker.complete(prompt=f"Story {number}. " + "Once upon a time. " * 40, max_tokens=8)
        until("the fleet to hold the worker's blocks", agreed, 60)
        status = worker.get("/kv/status").json()
        (mine,), (theirs,) = status["planes"], there()["sources"]
    finally:
        worker.close()
        fleet.terminate()
        code = fleet.wait(30)

    assert (mine["plane"], mine["up"]) == ("nats", True)
    assert mine["acknowledged_batches"] == mine["published_batches"] > 0
    assert not any(mine["dropped_batches"].values())
    assert theirs["blocks"] == status["sources"][0]["blocks"]
    assert (theirs["worker"], theirs["connected"], theirs["batches"]["lost"]) == ("one", True, 0)
    assert code == 0
