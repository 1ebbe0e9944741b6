"""The thread that owns the KV events: what breaks in it, and how it stops."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import zmq

from llm_worker.kv.follow.listener import Listener
from llm_worker.kv.index.index import Index
from llm_worker.kv.index.source import BlockSink, Source
from llm_worker.kv.index.trust import Trust
from llm_worker.kv.pipeline import Pipeline, SecondWriterError
from llm_worker.kv.plane.transport import EventSocket
from llm_worker.kv.records import BlockStored, Event, Hash
from llm_worker.kv.stats import PlaneStats
from llm_worker.kv.wire import encode
from support.waiting import until


def held(listener: Listener) -> set[Hash]:
    """The hashes that the index has of this rank."""
    assert isinstance(listener.source, Source)
    return listener.source.hashes()


@pytest.fixture
def socket() -> Iterator[EventSocket]:
    with EventSocket("tcp://127.0.0.1:0", "tcp://127.0.0.1:0") as open_socket:
        yield open_socket


@pytest.fixture
def pipeline() -> Iterator[Pipeline]:
    made = Pipeline(Index())
    yield made
    made.close()


def listen(pipeline: Pipeline, socket: EventSocket) -> Listener:
    return pipeline.listen(socket.endpoint, socket.replay_endpoint, worker="w", rank=0)


def publish(socket: EventSocket, *hashes: int) -> None:
    socket.publish(encode(time.time(), [BlockStored(hashes=list(hashes), block_size=16)], 0))


class Outlet:
    def __init__(self) -> None:
        self.stats = PlaneStats("zmq")
        self.got: list[Sequence[Event]] = []
        self.closed = 0

    def publish(
        self, source: BlockSink, payload: bytes, events: Sequence[Event], timestamp: float
    ) -> None:
        self.got.append(events)

    def close(self) -> None:
        self.closed += 1


def break_once(monkeypatch: pytest.MonkeyPatch, owner: type, method: str) -> None:
    """Have the next call of a method raise, and those after it do what they did."""
    original = getattr(owner, method)
    broken: list[bool] = []

    def breaks(self: Any) -> Any:
        if not broken:
            broken.append(True)
            raise RuntimeError("a bug")
        return original(self)

    monkeypatch.setattr(owner, method, breaks)


def test_a_thread_that_breaks_is_started_again_and_misses_nothing(
    pipeline: Pipeline, socket: EventSocket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted; the sockets are made anew and what was published meanwhile is replayed."""
    pipeline.start()
    listener = listen(pipeline, socket)
    publish(socket, 1)
    until("the index to hold {1}", lambda: held(listener) == {1})
    break_once(monkeypatch, Pipeline, "_patience_ms")
    publish(socket, 2)
    until("the crash", lambda: pipeline.crashes == 1)
    publish(socket, 3)
    until(
        "the index to hold {1, 2, 3}, trusted",
        lambda: held(listener) == {1, 2, 3} and not listener.source.stale,
    )
    assert pipeline.alive
    assert listener.stats.batches_lost == 0


def test_a_listener_that_breaks_reconnects_and_goes_on(
    pipeline: Pipeline, socket: EventSocket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread and the other listeners do not notice."""
    pipeline.start()
    listener = listen(pipeline, socket)
    publish(socket, 1)
    until("the index to hold {1}", lambda: held(listener) == {1})
    break_once(monkeypatch, Listener, "_receive")
    publish(socket, 2)
    until(
        "the index to hold {1, 2}, trusted",
        lambda: held(listener) == {1, 2} and not listener.source.stale,
    )
    assert listener.stats.crashes == 1
    assert pipeline.crashes == 0


def test_calls_run_between_batches_on_the_thread_and_tell_their_errors(pipeline: Pipeline) -> None:
    """Before it runs and after it ended they run where they are made."""
    assert pipeline.on_index_thread(threading.get_ident) == threading.get_ident()
    pipeline.start()
    assert pipeline.on_index_thread(threading.get_ident) != threading.get_ident()
    assert pipeline.on_index_thread(lambda: pipeline.on_index_thread(lambda: 5)) == 5
    with pytest.raises(ZeroDivisionError):
        pipeline.on_index_thread(lambda: 1 // 0)
    pipeline.close()
    assert pipeline.on_index_thread(threading.get_ident) == threading.get_ident()


def hold(pipeline: Pipeline) -> threading.Event:
    """Have its thread wait until the event that is returned is set."""
    began, release = threading.Event(), threading.Event()

    def wait() -> None:
        began.set()
        release.wait(20)

    def call() -> None:
        with contextlib.suppress(TimeoutError):
            pipeline.on_index_thread(wait)

    threading.Thread(target=call, daemon=True).start()
    assert began.wait(10)
    return release


def test_a_call_that_was_given_up_is_not_made_later(
    pipeline: Pipeline, socket: EventSocket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who asks again, as the fleet does, would otherwise have two listeners for one source."""
    pipeline.start()
    release = hold(pipeline)
    monkeypatch.setattr("llm_worker.kv.pipeline.CALL_SECONDS", 0.1)
    made: list[int] = []
    with pytest.raises(TimeoutError):
        pipeline.on_index_thread(lambda: made.append(1))
    with pytest.raises(TimeoutError):
        listen(pipeline, socket)
    monkeypatch.undo()
    assert not pipeline.index.sources()
    release.set()
    listener = listen(pipeline, socket)
    assert pipeline.listeners == [listener]
    assert not made
    publish(socket, 1)
    publish(socket, 2)
    until("the index to hold {1, 2}", lambda: held(listener) == {1, 2})
    (lane,) = listener.source.lanes()
    assert not lane.copies


def test_a_call_that_has_begun_is_waited_for(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It will have been made, so its caller must not be told that it was not."""
    pipeline.start()
    monkeypatch.setattr("llm_worker.kv.pipeline.CALL_SECONDS", 0.2)

    def slow() -> str:
        time.sleep(0.3)
        return "made"

    assert pipeline.on_index_thread(slow) == "made"


def test_a_listener_is_made_on_the_thread_that_writes_the_index(
    pipeline: Pipeline, socket: EventSocket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Making it marks its source, which the thread may be writing for another listener."""
    threads: list[str] = []
    following = Trust.following

    def marking(trust: Trust) -> None:
        threads.append(threading.current_thread().name)
        following(trust)

    monkeypatch.setattr(Trust, "following", marking)
    pipeline.start()
    listen(pipeline, socket)
    pipeline.listen(socket.endpoint, None, worker="w", rank=1, part="connector")
    assert threads
    assert set(threads) == {"kv"}


def test_a_listener_that_gets_no_sockets_is_no_listener(socket: EventSocket) -> None:
    """Who asks again, as the fleet does, would leave a dead one behind each time."""
    with zmq.Context() as context:
        context.max_sockets = 5  # three a listener
        pipeline = Pipeline(Index(), context=context)
        pipeline.start()
        first = listen(pipeline, socket)
        for _ in range(3):
            with pytest.raises(zmq.ZMQError):
                pipeline.listen(socket.endpoint, None, worker="w", rank=1)
        assert pipeline.listeners == [first]
        pipeline.forget(first)
        again = listen(pipeline, socket)
        until("the listener to be connected", lambda: again.stats.connected)
        pipeline.close()
        assert pipeline.crashes == 0


def test_a_source_has_one_writer_and_a_new_one_starts_afresh(socket: EventSocket) -> None:
    """A second publisher is refused by name; one that follows owns nothing of its predecessor's."""
    pipeline = Pipeline(Index())
    pipeline.start()
    first = listen(pipeline, socket)
    with pytest.raises(SecondWriterError, match="is followed at"):
        pipeline.listen("tcp://127.0.0.1:1", None, worker="w", rank=0)
    assert pipeline.listeners == [first]
    source = pipeline.index.source("w", 0)
    pipeline.on_index_thread(lambda: source.apply([BlockStored(hashes=[1, 2], block_size=16)]))
    pipeline.forget(first)
    assert source.hashes() == {1, 2}, "who is away may come back"
    listen(pipeline, socket)
    assert source.hashes() == set()
    pipeline.close()


def test_a_clear_goes_to_the_outlets_like_any_event(
    pipeline: Pipeline, socket: EventSocket
) -> None:
    """Who listens to the plane has to forget the blocks, too."""
    outlet = Outlet()
    pipeline.add_outlet(outlet)
    pipeline.start()
    listener = listen(pipeline, socket)
    publish(socket, 1)
    until("the index to hold {1}", lambda: held(listener) == {1})
    pipeline.clear("w", 0)
    assert not held(listener)
    assert [type(events[0]).__name__ for events in outlet.got] == [
        "BlockStored",
        "AllBlocksCleared",
    ]


def test_it_stops_listeners_first_and_outlets_last_and_only_once(
    pipeline: Pipeline, socket: EventSocket
) -> None:
    """What was indexed is flushed."""
    outlet = Outlet()
    pipeline.add_outlet(outlet)
    pipeline.start()
    listener = listen(pipeline, socket)
    until("the listener to connect", lambda: listener.stats.connected)
    pipeline.close()
    pipeline.close()
    assert not pipeline.alive
    assert not listener.stats.connected
    assert outlet.closed == 1


def test_a_listener_can_be_closed_while_its_publisher_goes(pipeline: Pipeline) -> None:
    """libzmq tells of the one from its own thread while ours does the other: neither waits."""
    pipeline.start()
    for _ in range(100):
        socket = EventSocket("tcp://127.0.0.1:0", None)
        listener = pipeline.listen(socket.endpoint, None, worker="w", rank=0)
        until("the listener to connect", lambda listener=listener: listener.stats.connected)  # type: ignore[misc]
        going = threading.Thread(target=socket.close)
        going.start()
        pipeline.forget(listener)
        going.join()
    assert pipeline.on_index_thread(lambda: True)


def test_a_listener_that_is_forgotten_hears_nothing_more(
    pipeline: Pipeline, socket: EventSocket
) -> None:
    """Its blocks stay until somebody removes the worker."""
    pipeline.start()
    listener = listen(pipeline, socket)
    publish(socket, 1)
    until("the index to hold {1}", lambda: held(listener) == {1})
    pipeline.forget(listener)
    publish(socket, 2)
    time.sleep(0.1)
    assert held(listener) == {1}
    assert listener.source.stale == {"disconnected"}
    assert not pipeline.listeners
