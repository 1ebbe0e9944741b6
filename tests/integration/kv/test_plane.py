"""Workers' ZMQ planes and the fleet index over them, on real sockets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import httpx
import pytest
import zmq

from llm_worker.fleet.__main__ import Service
from llm_worker.fleet.fleet import Fleet, Limits
from llm_worker.kv.index.index import Index
from llm_worker.kv.pipeline import Pipeline
from llm_worker.kv.plane.zmq_plane import ZmqPlane
from llm_worker.kv.records import AllBlocksCleared
from llm_worker.kv.trtllm.publisher import ZmqKvEventPublisher
from llm_worker.kv.wire import Decoder
from llm_worker.settings import endpoint
from llm_worker.settings.fleet import FleetConfig
from support.kv_fleet import Worker, same
from support.waiting import until
from support.worker_process import free_ports

pytestmark = pytest.mark.timeout(150)
T = TypeVar("T")
END = b"\xff" * 8


HURRY = Limits(round_seconds=0.2, patience_seconds=1.5)  # a matter of seconds in a fleet


def bound(make: Callable[[], T]) -> T:
    """Make it once its ports are free: libzmq lets go of a closed socket's a moment later."""

    def attempt() -> T | None:
        try:
            return make()
        except zmq.ZMQError as error:
            if error.errno != zmq.EADDRINUSE:
                raise
        return None

    return until("the ports to be free", attempt)


def plane(
    worker: Worker, ports: tuple[int, int] = (0, 0), host: str = "127.0.0.1", **options: Any
) -> ZmqPlane:
    """The worker's plane, on free ports unless told."""
    made = bound(
        lambda: ZmqPlane(
            f"tcp://{host}:{ports[0]}",
            f"tcp://{host}:{ports[1]}",
            sources=worker.index.sources,
            on_index_thread=worker.on_index_thread,
            **options,
        )
    )
    worker.plane = made
    return made


def source(made: ZmqPlane) -> str:
    """A plane as a fleet's ``--source``."""
    assert made.replay_endpoint is not None
    _, port = made.endpoint.rsplit(":", 1)
    return f"zmq://127.0.0.1:{port},replay={made.replay_endpoint.rsplit(':', 1)[1]}"


@pytest.fixture
def workers() -> Iterator[Callable[..., Worker]]:
    """Makes workers whose planes close with the test."""
    made: list[Worker] = []

    def make(name: str, **options: Any) -> Worker:
        made.append(Worker(name))
        plane(made[-1], **options)
        return made[-1]

    yield make
    for worker in made:
        if worker.plane is not None:
            worker.plane.close()


@pytest.fixture
def fleets() -> Iterator[Callable[..., Fleet]]:
    """Makes fleets that end with the test."""
    made: list[Fleet] = []

    def make(*sources: str, **options: Any) -> Fleet:
        made.append(Fleet([endpoint.source(each) for each in sources], limits=HURRY, **options))
        made[-1].start()
        return made[-1]

    yield make
    for fleet in made:
        fleet.close()


@contextmanager
def publisher(endpoint: str, replay_endpoint: str) -> Iterator[ZmqKvEventPublisher]:
    """Events in vLLM's format, as an engine publishes them."""
    made = bound(lambda: ZmqKvEventPublisher(endpoint, 16, replay_endpoint=replay_endpoint))
    try:
        yield made
    finally:
        made.shutdown()


def asked(made: ZmqPlane, *request: bytes) -> list[list[bytes]]:
    """The whole answer to a request, without its end."""
    assert made.replay_endpoint is not None
    dealer: Any = zmq.Context.instance().socket(zmq.DEALER)
    try:
        dealer.connect(made.replay_endpoint)
        dealer.send_multipart((b"", *request))
        frames: list[list[bytes]] = []
        while dealer.poll(5000):
            frames.append(dealer.recv_multipart())
            if frames[-1][2] == END:
                return frames[:-1]
        raise AssertionError("no end")
    finally:
        dealer.close(linger=0)


def test_a_plane_speaks_vllms_wire(workers: Callable[..., Worker]) -> None:
    """Topic, an 8-byte sequence with the epoch above, vLLM's payload; replay as vLLM's ROUTER."""
    worker = workers("a", epoch=1234)
    made = worker.plane
    assert isinstance(made, ZmqPlane)
    stored = worker.store(3, blocks=2)
    frames = asked(made, ((1234 << 32) + 1).to_bytes(8, "big"))

    assert [frame[0:2] for frame in frames] == [[b"", b"kv@a@0"]] * 2
    assert [int.from_bytes(frame[2], "big") for frame in frames] == [
        (1234 << 32) + 1,
        (1234 << 32) + 2,
    ]
    batch = Decoder().decode(frames[0][3])
    assert batch.events[0].hashes == stored[2:4]  # type: ignore[union-attr]
    assert batch.rank == 0


def test_a_snapshot_is_a_clear_and_all_blocks_at_one_sequence(
    workers: Callable[..., Worker],
) -> None:
    """Also of a rank that has published nothing: then it is true just before the first number."""
    worker = workers("a", epoch=10)
    quiet = Worker("a", 1, worker.index)
    worker.store(5)
    made = worker.plane
    assert isinstance(made, ZmqPlane)
    frames = asked(made, b"snapshot")
    by_topic = {frame[1]: frame for frame in frames}
    events = [event for frame in frames for event in Decoder().decode(frame[3]).events]

    assert by_topic.keys() == {b"kv@a@0", b"kv@a@1"}
    assert int.from_bytes(by_topic[b"kv@a@0"][2], "big") == (10 << 32) + 4
    assert int.from_bytes(by_topic[b"kv@a@1"][2], "big") == (10 << 32) - 1
    assert sum(isinstance(event, AllBlocksCleared) for event in events) == 2
    assert quiet.source.hashes() == set()
    only = asked(made, b"snapshot", b"kv@a@1")
    assert {frame[1] for frame in only} == {b"kv@a@1"}


def test_a_fleet_follows_several_workers_from_the_middle(
    workers: Callable[..., Worker], fleets: Callable[..., Fleet]
) -> None:
    """Replay brings what was before, and second copies of blocks stay copies."""
    a, b = workers("a"), workers("b")
    blocks = a.store(300)
    a.store_again(blocks[:8])
    a.remove(blocks[:16])
    b.store(10)
    fleet = fleets(source(a.plane), source(b.plane))  # type: ignore[arg-type]
    until("both", lambda: same(a, fleet.index) and same(b, fleet.index))
    a.store(500)
    b.store(500)
    until("both go on", lambda: same(a, fleet.index) and same(b, fleet.index))

    assert all(stats.batches_lost == 0 for stats in fleet.listeners())
    assert fleet.status()["duplicate_workers"] == []


def test_a_snapshot_heals_what_the_replay_no_longer_has(
    workers: Callable[..., Worker], fleets: Callable[..., Fleet]
) -> None:
    """The ring is too short for who comes late; the index is true all the same."""
    worker = workers("a", buffer_batches=10)
    worker.store(200)
    made = worker.plane
    assert isinstance(made, ZmqPlane)
    fleet = fleets(source(made))
    until("the fleet to be the same", lambda: same(worker, fleet.index))
    worker.store(5)
    until("and to go on", lambda: same(worker, fleet.index))
    (listener,) = fleet.listeners()

    assert made.stats.snapshots_served == 1
    assert listener.gaps["initial"] == 1


def test_a_restarted_worker_begins_anew(
    workers: Callable[..., Worker], fleets: Callable[..., Fleet]
) -> None:
    """The new epoch tells: nothing of its predecessor stays, though it has the same port."""
    ports = free_ports(2)
    worker = workers("a", ports=(ports[0], ports[1]), epoch=1000)
    worker.store(20)
    fleet = fleets(source(worker.plane))  # type: ignore[arg-type]
    until("the fleet to be the same", lambda: same(worker, fleet.index))
    assert worker.plane is not None
    worker.plane.close()
    until("the fleet to say so", lambda: "disconnected" in fleet.index.sources()[0].stale)
    again = workers("a", ports=(ports[0], ports[1]), epoch=1001)
    again.store(3)
    until("the fleet to be the same as the new one", lambda: same(again, fleet.index))


def test_two_workers_with_one_name_are_found_out(
    workers: Callable[..., Worker], fleets: Callable[..., Fleet]
) -> None:
    """Neither is trusted until one is left; and then that one is, whichever it is."""
    a, b = workers("same"), workers("same")
    a.store(5)
    b.store(7)
    fleet = fleets(source(a.plane), source(b.plane))  # type: ignore[arg-type]
    until("found out", lambda: fleet.status()["duplicate_workers"] == ["same"])
    until("marked", lambda: "duplicate_worker" in fleet.index.sources()[0].stale)
    assert len(fleet.listeners()) == 1  # they never write one source together
    first = a if fleet.index.sources()[0].hashes() == a.source.hashes() else b
    assert first.plane is not None
    first.plane.close()
    left = b if first is a else a
    until("the one that is left to be trusted", lambda: same(left, fleet.index))


def test_a_worker_that_is_gone_for_long_is_forgotten(
    workers: Callable[..., Worker], fleets: Callable[..., Fleet]
) -> None:
    """Its blocks would send requests to nobody; until then it is stale."""
    worker, other = workers("gone"), workers("there")
    worker.store(5)
    other.store(5)
    # Longer than a busy machine lets the fleet's threads wait: to them, all are gone meanwhile.
    fleet = fleets(source(worker.plane), source(other.plane), gone_seconds=6)  # type: ignore[arg-type]
    until("both", lambda: same(worker, fleet.index) and same(other, fleet.index))
    (kept,) = (each for each in fleet.index.sources() if each.worker == "there")
    assert worker.plane is not None
    worker.plane.close()
    until("stale", lambda: any("disconnected" in s.stale for s in fleet.index.sources()))
    until("forgotten", lambda: [s.worker for s in fleet.index.sources()] == ["there"])

    assert len(fleet.listeners()) == 1
    assert fleet.index.sources() == [kept]
    until("the other to be the same", lambda: same(other, fleet.index))


def test_what_a_worker_does_not_trust_is_not_trusted_by_the_fleet(
    workers: Callable[..., Worker], fleets: Callable[..., Fleet]
) -> None:
    """A gap between engine and worker cannot be seen in the plane's numbers."""
    worker = workers("a")
    worker.store(5)
    fleet = fleets(source(worker.plane))  # type: ignore[arg-type]
    until("the fleet to be the same", lambda: same(worker, fleet.index))
    worker.source.trust.gap_opened()
    until("the doubt to arrive", lambda: fleet.index.sources()[0].stale == {"upstream"})
    worker.source.trust.gap_closed()
    until("and to go", lambda: same(worker, fleet.index))


def test_two_pipelines_compose_from_an_engines_events_to_the_fleet(
    fleets: Callable[..., Fleet],
) -> None:
    """Engine's publisher → worker's pipeline → its plane → the fleet's pipeline."""
    with publisher("tcp://127.0.0.1:*", "tcp://127.0.0.1:*") as engine:
        index = Index()
        pipeline = Pipeline(index)
        made = ZmqPlane(
            "tcp://127.0.0.1:0",
            "tcp://127.0.0.1:0",
            sources=index.sources,
            on_index_thread=pipeline.on_index_thread,
        )
        pipeline.add_outlet(made)
        pipeline.start()
        try:
            pipeline.listen(
                engine.socket.endpoint, engine.socket.replay_endpoint, worker="w", rank=0
            )
            fleet = fleets(source(made))
            for start in range(0, 3200, 8):
                hashes = list(range(start, start + 8))
                engine.publish_stored(None, [1] * 128, [16] * 8, hashes)
            engine.publish_removed(None, list(range(100)))

            def arrived() -> bool:
                return [s.hashes() for s in fleet.index.sources() if not s.stale] == [
                    set(range(100, 3200))
                ]

            until("the engine's blocks in the fleet", arrived)
            # A reset that went through the worker: made true at once, and told on.
            pipeline.clear("w", 0)
            until("the clear", lambda: not fleet.index.sources()[0].hashes())
        finally:
            pipeline.close()


def test_a_plain_vllm_server_is_a_source_too(fleets: Callable[..., Fleet]) -> None:
    """Under the name it was given; forgotten when it is gone for long, and found again."""
    ports = free_ports(2)
    endpoints = [f"tcp://127.0.0.1:{port}" for port in ports]
    source_of = f"vllm://127.0.0.1:{ports[0]},replay={ports[1]},worker=box"
    with publisher(*endpoints) as engine:
        engine.publish_stored(None, [1] * 32, [16] * 2, [1, 2])
        fleet = fleets(source_of, gone_seconds=4)
        # They are there before the answer that they are in has ended.
        until("its blocks, trusted", lambda: [s for s in fleet.index.sources() if not s.stale])
        (held,) = fleet.index.match([1, 2, 3])
    until("forgotten", lambda: not fleet.index.held_blocks())
    until(
        "waited for",
        lambda: [(s.worker, bool(s.stale)) for s in fleet.index.sources()] == [("box", True)],
    )
    with publisher(*endpoints) as engine:
        engine.publish_stored(None, [1] * 16, [16], [5])
        until("found again", lambda: [each for each in fleet.index.match([5]) if not each.stale])

    assert (held.worker, held.rank, held.medium, held.blocks, held.miss) == (
        "box", 0, "gpu", 2, "absent",
    )  # fmt: skip
    assert not held.stale
    assert len(fleet.listeners()) == 1


def test_a_name_that_leads_to_several_workers_is_one_source_for_each(
    workers: Callable[..., Worker], fleets: Callable[..., Fleet], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with `--scale`: replicas are found as they come, without a restart."""
    port, replay = free_ports(2)
    leads_to = ["127.0.0.2"]

    def lookup(host: str, *_: object, **__: object) -> list[Any]:
        assert host == "replicas"
        return [(2, 1, 6, "", (address, 0)) for address in leads_to]

    monkeypatch.setattr("llm_worker.fleet.fleet.socket.getaddrinfo", lookup)
    first = workers("a", ports=(port, replay), host="127.0.0.2")
    first.store(3)
    fleet = fleets(f"zmq://replicas:{port},replay={replay}", resolve_seconds=0.2)
    until("the first", lambda: same(first, fleet.index))
    second = workers("b", ports=(port, replay), host="127.0.0.3")
    second.store(3)
    leads_to.append("127.0.0.3")
    until("the second", lambda: same(second, fleet.index))
    leads_to.remove("127.0.0.2")  # still there, but no longer in the name
    first.store(1)
    until("the first all the same", lambda: same(first, fleet.index))

    assert {each["address"] for each in fleet.status()["endpoints"]} == {
        f"127.0.0.2:{port}",
        f"127.0.0.3:{port}",
    }


def test_the_service_answers_over_http(workers: Callable[..., Worker]) -> None:
    """Probes, status, match, dump and metrics of a fleet of one."""
    worker = workers("a")
    blocks = worker.store(4)
    made = worker.plane
    assert isinstance(made, ZmqPlane)
    service = Service(
        FleetConfig(
            (endpoint.source(source(made)),), "127.0.0.1", 0, None, 300.0, 10.0, "text", "info"
        )
    )
    service.start()
    try:
        url = f"http://127.0.0.1:{service.server.port}"
        until("ready", lambda: httpx.get(f"{url}/ready").status_code == 200)
        until("the fleet to be the same", lambda: same(worker, service.fleet.index))
        status = httpx.get(f"{url}/kv/status").json()
        match = httpx.post(f"{url}/kv/match", json={"hashes": [*blocks, 1 << 63]}).json()
        dump = httpx.get(f"{url}/kv/dump").text.splitlines()
        page = httpx.get(f"{url}/metrics").text
        assert "\nprocess_cpu_seconds_total " in page
        assert "\nllm_worker_kv_pipeline_crashes_total 0" in page
        assert httpx.get(f"{url}/live").status_code == 200
        assert httpx.post(f"{url}/kv/audit").status_code == 501
    finally:
        service.close()

    assert status["ok"] is True
    assert status["sources"][0]["blocks"] == {"gpu": 32}
    assert status["endpoints"][0]["workers"] == ["a"]
    (held,) = match["matches"]
    assert (held["worker"], held["medium"], held["blocks"], held["miss"], held["stale"]) == (
        "a", "gpu", 32, "absent", [],
    )  # fmt: skip
    assert len(dump) == 5
    assert 'llm_worker_kv_fleet_workers{health="ok"} 1.0' in page
    assert "llm_worker_kv_fleet_unique_blocks" in page
