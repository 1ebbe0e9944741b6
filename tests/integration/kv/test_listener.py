"""The KV pipeline against vLLM's own publisher on real ZMQ, on its bad days.

After each the index is the publisher's truth or marked stale, and the counters say what happened.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from llm_worker.kv.follow.listener import Listener
from llm_worker.kv.index.index import Index
from llm_worker.kv.index.source import Source
from llm_worker.kv.pipeline import Pipeline
from llm_worker.kv.records import BlockStored, Hash
from llm_worker.kv.wire import MAX_PAYLOAD_BYTES, encode
from support.kv_publisher import ListenerProcess, Publisher, ending
from support.waiting import until

pytestmark = pytest.mark.needs("vllm")

Start = Callable[..., Publisher]


def held(listener: Listener) -> set[Hash]:
    """The hashes that the index has of this rank."""
    assert isinstance(listener.source, Source)
    return listener.source.hashes()


@pytest.fixture
def publisher() -> Iterator[Start]:
    """Starts publishers that end with the test."""
    started: list[Publisher] = []

    def start(*arguments: Any, **options: Any) -> Publisher:
        started.append(Publisher(*arguments, **options))
        return started[-1]

    yield start
    for each in started:
        each.kill()


@pytest.fixture
def pipeline() -> Iterator[Pipeline]:
    running = Pipeline(Index())
    running.start()
    yield running
    assert running.alive
    assert running.crashes == 0
    running.close()
    assert not running.alive


def listen(pipeline: Pipeline, publisher: Publisher, rank: int = 0) -> Listener:
    return pipeline.listen(publisher.endpoint, publisher.replay_endpoint, worker="w", rank=rank)


def is_true(listener: Listener, publisher: Publisher) -> bool:
    return not listener.source.stale and held(listener) == publisher.blocks


def test_a_listener_that_starts_late_has_everything(publisher: Start, pipeline: Pipeline) -> None:
    """More batches than 0.32's replay socket has room for: it leaves out what does not fit."""
    one = publisher()
    one.store(0, 5000)
    listener = listen(pipeline, one)
    assert listener.source.stale == {"unsynchronised"}
    one.store(5000, 10)
    until("the index to hold what the engine does, trusted", lambda: is_true(listener, one))
    assert listener.stats.batches_replayed + listener.stats.batches_late >= 5000
    assert listener.stats.batches_lost == 0
    assert listener.stats.sequence == 5009


def test_an_idle_publisher_is_known_as_such(publisher: Start, pipeline: Pipeline) -> None:
    """It never sends a word by itself."""
    one = publisher()
    listener = listen(pipeline, one)
    until("the index to hold what the engine does, trusted", lambda: is_true(listener, one))
    assert listener.stats.connected
    assert listener.stats.sequence is None


def test_a_listener_that_is_there_first_connects_when_the_publisher_comes(
    publisher: Start, pipeline: Pipeline
) -> None:
    """And again after each time that it went; a restart is noticed and its blocks are the truth."""
    one = publisher()
    one.kill()
    listener = listen(pipeline, one)
    one.restart()
    one.store(0, 3)
    until("the index to hold what the engine does, trusted", lambda: is_true(listener, one))
    one.kill()
    until("the index to be marked as disconnected", lambda: "disconnected" in listener.source.stale)
    assert not listener.stats.connected
    one.restart()
    one.store(100, 10)  # further than the one before it
    until("the index to hold what the engine does, trusted", lambda: is_true(listener, one))
    one.restart()
    one.store(200, 1)
    until("the index to hold what the engine does, trusted", lambda: is_true(listener, one))
    assert listener.stats.gaps["restart"] == 2
    assert listener.stats.reconnects == 2
    assert listener.stats.batches_lost == 0


@pytest.mark.parametrize("remembered", [10_000, 20])
def test_a_listener_that_is_stopped_until_the_high_water_mark_overflows(
    publisher: Start, remembered: int
) -> None:
    """What the publisher dropped is replayed; where it forgot it, the index is marked."""
    one = publisher(hwm=100, buffer_steps=remembered)
    ear = ListenerProcess(one)
    with ending(ear):
        one.store(0, 5)
        until("batch 4", lambda: ear.ask()[0].sequence == 4)
        ear.signal(signal.SIGSTOP)
        # 128 MB: more than the queue of 100 and the kernel's buffers take
        one.store(100, 1000, tokens=128_000)
        ear.signal(signal.SIGCONT)
        until(
            "the queue to be empty",
            lambda: ear.ask()[0].sequence is not None and ear.ask()[0].queue_batches == 0,
        )
        one.publish([("store", [5000])])
        until("batch 1005", lambda: ear.ask()[0].sequence == 1005)
        stats, stale, hashes = ear.ask()
    assert stats.gaps["gap"] + stats.gaps["restart"] + stats.reconnects >= 1
    if remembered == 20:
        assert stale == {"gap"}
        assert stats.batches_lost > 0
        assert hashes < one.blocks
    else:
        assert stale == set()
        assert stats.batches_lost == 0
        assert stats.batches_replayed > 0
        assert hashes == one.blocks


def test_a_publisher_whose_memory_is_too_short_for_a_late_listener_marks_it(
    publisher: Start, pipeline: Pipeline
) -> None:
    """Until it clears all blocks: from then on nothing is missing."""
    one = publisher(buffer_steps=50)
    one.store(0, 200)
    listener = listen(pipeline, one)
    until("batch 199", lambda: listener.stats.sequence == 199)
    assert listener.source.stale == {"missed_first"}
    assert listener.stats.batches_lost == 150
    one.publish([("clear", [])], [("store", [7])])
    until("the index to hold what the engine does, trusted", lambda: is_true(listener, one))


@pytest.mark.parametrize("given", [True, False])
def test_without_a_replay_endpoint_a_late_listener_is_marked_and_goes_on(
    publisher: Start, pipeline: Pipeline, given: bool
) -> None:
    """Whether none is known, or nobody listens at the one that is."""
    one = publisher(replay=False)
    one.store(0, 3)
    replay_endpoint = one.replay_endpoint if given else None
    listener = pipeline.listen(one.endpoint, replay_endpoint, worker="w", rank=0)
    until("the listener to connect", lambda: listener.stats.connected)

    def publish() -> bool:
        one.publish([("store", [1000 + len(one.blocks)])])
        time.sleep(0.1)
        return listener.stats.sequence is not None

    until("a publisher that is heard", publish)
    assert listener.source.stale == {"missed_first"}
    one.publish([("clear", [])], [("store", [7])])
    until("the index to hold what the engine does, trusted", lambda: is_true(listener, one))
    assert listener.stats.replays["timeout" if given else "unavailable"] >= 1


def test_one_rank_of_two_dies_and_comes_back(publisher: Start, pipeline: Pipeline) -> None:
    """The other one's index stays true all along."""
    ranks = [publisher(rank) for rank in (0, 1)]
    listeners = [listen(pipeline, one, rank) for rank, one in enumerate(ranks)]
    for number, one in enumerate(ranks):
        one.store(100 * number, 5)
    until("both ranks' indexes to be true", lambda: all(map(is_true, listeners, ranks)))
    ranks[1].kill()
    until(
        "the killed rank alone to be marked", lambda: listeners[1].source.stale == {"disconnected"}
    )
    ranks[0].store(50, 5)
    until("the first rank's index to go on", lambda: is_true(listeners[0], ranks[0]))
    ranks[1].restart()
    ranks[1].store(300, 2)
    until("both ranks' indexes to be true", lambda: all(map(is_true, listeners, ranks)))
    assert listeners[0].stats.reconnects == 0
    assert listeners[1].stats.gaps["restart"] == 1


def test_a_clear_of_ours_empties_the_index_at_once(publisher: Start, pipeline: Pipeline) -> None:
    """From any thread, and the engine's own word that comes later changes nothing."""
    one = publisher()
    listener = listen(pipeline, one)
    one.store(0, 5)
    until("the index to hold what the engine does, trusted", lambda: is_true(listener, one))
    pipeline.clear("w", 0)
    assert held(listener) == set()
    one.publish([("clear", []), ("store", [9])])
    until("the index to hold what the engine does, trusted", lambda: is_true(listener, one))


def test_a_publisher_that_is_killed_while_it_answers_costs_its_answer_only() -> None:
    """Not the listener's process, which libzmq would abort if the socket that asks were told to
    drop its connection at once.
    """
    program = Path(__file__).resolve().parents[2] / "support/kv_killed_answer.py"
    done = subprocess.run(
        [sys.executable, str(program), "25"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    rounds = done.stdout.split()
    assert done.returncode == 0, (len(rounds), done.returncode, done.stderr[-500:])
    assert len(rounds) == 25


class Hostile:
    """A publisher that sends whatever it is told to."""

    def __init__(self) -> None:
        self._pub: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.XPUB)
        port: int = self._pub.bind_to_random_port("tcp://127.0.0.1")
        self.endpoint = f"tcp://127.0.0.1:{port}"
        self.next = 0

    def wait_for_a_subscriber(self) -> None:
        assert self._pub.poll(10_000)
        self._pub.recv()

    def send(self, *frames: bytes) -> None:
        self._pub.send_multipart(frames)

    def batch(self, payload: bytes) -> None:
        self.send(b"", self.next.to_bytes(8, "big"), payload)
        self.next += 1

    def valid(self, number: int) -> None:
        self.batch(encode(time.time(), [BlockStored(hashes=[number], block_size=16)], 0))

    def close(self) -> None:
        self._pub.close(linger=0)


PAYLOADS: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "msgpack"),
    "no msgpack": (b"\xc1\xc1\xc1", "msgpack"),
    "truncated": (encode(1.0, [BlockStored(hashes=[1], block_size=16)], 0)[:-20], "msgpack"),
    "nested 100,000 deep": (b"\x91" * 100_000, "batch"),
    "a list of two thousand million entries": (b"\xdd\x7f\xff\xff\xff", "msgpack"),
    "a number": (b"\x01", "batch"),
    "events that are none": (b"\x92\xcb\x3f\xf0\x00\x00\x00\x00\x00\x00\x91\x01", "event"),
    "larger than a batch can be": (b"\xc6" + bytes(MAX_PAYLOAD_BYTES), "too_large"),
}


@pytest.mark.parametrize("name", PAYLOADS)
def test_a_payload_that_is_none_costs_itself_only(name: str, pipeline: Pipeline) -> None:
    """It is counted by reason, the index is marked, and the next batch is indexed."""
    payload, reason = PAYLOADS[name]
    hostile = Hostile()
    try:
        listener = pipeline.listen(hostile.endpoint, None, worker="w", rank=0)
        hostile.wait_for_a_subscriber()
        hostile.valid(1)
        until("batch 0", lambda: listener.stats.sequence == 0)
        hostile.batch(payload)
        hostile.valid(2)
        until("batch 2", lambda: listener.stats.sequence == 2)
        assert held(listener) == {1, 2}
        assert listener.source.stale == {"undecodable"}
        assert sum(listener.stats.undecodable.values()) == 1
        assert listener.stats.undecodable[reason] == 1
        assert listener.stats.crashes == 0
    finally:
        hostile.close()


def test_messages_that_are_no_three_frames_are_counted_and_do_not_shift_the_others(
    pipeline: Pipeline,
) -> None:
    """One, two and four frames, a short number; some before and some behind whole messages."""
    hostile = Hostile()
    try:
        listener = pipeline.listen(hostile.endpoint, None, worker="w", rank=0)
        hostile.wait_for_a_subscriber()
        for number in range(20):
            hostile.valid(number)
            hostile.send(b"")
            hostile.send(b"", (1000).to_bytes(8, "big"))
            hostile.send(b"", b"\0\0\0", b"payload")
            hostile.send(b"", (1001).to_bytes(8, "big"), b"payload", b"more")
        until("60 undecodable batches", lambda: listener.stats.undecodable["frames"] >= 60)
        hostile.batch(
            b"\x92\xcb\x40\x59\x00\x00\x00\x00\x00\x00\x91\x81\xa4type\xb0AllBlocksCleared"
        )
        hostile.valid(500)
        until("the index to hold {500}", lambda: held(listener) == {500})
        until("the index to be trusted", lambda: not listener.source.stale)
        # None of them was taken for a batch: the numbers are the publisher's.
        assert listener.stats.sequence == 21
    finally:
        hostile.close()
