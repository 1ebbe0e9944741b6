"""The publishing side on real sockets: vLLM's replay protocol, slow clients, several threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import zmq

from llm_worker.kv.plane.transport import END_SEQUENCE, SNAPSHOT, EventSocket, Message
from llm_worker.kv.stats import PlaneStats
from llm_worker.kv.trtllm.publisher import ZmqKvEventPublisher
from support.waiting import until

LOCAL = "tcp://127.0.0.1:0"
TIMEOUT_MS = 10_000

Socket = zmq.Socket[bytes]


@pytest.fixture
def context() -> Iterator[zmq.Context[Socket]]:
    made: zmq.Context[Socket] = zmq.Context()
    yield made
    made.destroy(linger=0)


@pytest.fixture
def connect(context: zmq.Context[Socket]) -> Callable[..., Socket]:
    def make(kind: int, endpoint: str | None, high_water_mark: int = 1000) -> Socket:
        assert endpoint is not None
        socket = context.socket(kind)
        socket.set_hwm(high_water_mark)
        socket.setsockopt(zmq.RCVTIMEO, TIMEOUT_MS)
        if kind == zmq.SUB:
            socket.subscribe(b"")
        socket.connect(endpoint)
        return socket

    return make


def ask(dealer: Socket, start: int | bytes, *topic: bytes) -> None:
    what = start if isinstance(start, bytes) else start.to_bytes(8, "big")
    dealer.send_multipart([b"", what, *topic])


def answer(dealer: Socket) -> list[tuple[bytes, int, bytes]]:
    """As vLLM's examples read it: until the end marker."""
    found: list[tuple[bytes, int, bytes]] = []
    while True:
        empty, topic, sequence, payload = dealer.recv_multipart()
        assert empty == b""
        if sequence == END_SEQUENCE:
            assert (topic, payload) == (b"", b"")
            return found
        found.append((topic, int.from_bytes(sequence, "big"), payload))


def subscribe(connect: Callable[..., Socket], events: EventSocket, **more: int) -> Socket:
    """A subscriber that is known to the publisher; what it was sent to find out is read."""
    sub = connect(zmq.SUB, events.endpoint, **more)
    sub.setsockopt(zmq.RCVTIMEO, 20)

    def heard() -> bool:
        events.publish(b"?", b"probe")
        try:
            return bool(sub.recv_multipart())
        except zmq.Again:
            return False

    until("the first event", heard)
    sub.setsockopt(zmq.RCVTIMEO, TIMEOUT_MS)
    return sub


def test_replay_is_answered_by_vllms_protocol(
    context: zmq.Context[Socket], connect: Callable[..., Socket]
) -> None:
    """From the number asked for; beyond the last one, only the end."""
    with EventSocket(LOCAL, LOCAL, context=context) as events:
        for number in range(5):
            events.publish(b"%d" % number, b"kv")
        dealer = connect(zmq.DEALER, events.replay_endpoint)
        ask(dealer, 3)
        assert answer(dealer) == [(b"kv", 3, b"3"), (b"kv", 4, b"4")]
        ask(dealer, 5)
        assert answer(dealer) == []
        until("two replays", lambda: events.stats.replays_served == 2)


def test_what_aged_out_is_not_replayed(
    context: zmq.Context[Socket], connect: Callable[..., Socket]
) -> None:
    """The answer begins with the oldest that is left, as vLLM's does: the client sees the rest."""
    with EventSocket(LOCAL, LOCAL, buffer_batches=3, context=context) as events:
        for number in range(10):
            events.publish(b"%d" % number)
        dealer = connect(zmq.DEALER, events.replay_endpoint)
        ask(dealer, 2)
        assert [sequence for _, sequence, _ in answer(dealer)] == [7, 8, 9]


def test_topics_are_replayed_by_prefix(
    context: zmq.Context[Socket], connect: Callable[..., Socket]
) -> None:
    """A third frame, which vLLM does not know, restricts the answer."""
    with EventSocket(LOCAL, LOCAL, context=context) as events:
        events.publish(b"x", b"kv@a@0")
        events.publish(b"y", b"kv@b@0")
        dealer = connect(zmq.DEALER, events.replay_endpoint)
        ask(dealer, 0, b"kv@b@")
        assert answer(dealer) == [(b"kv@b@0", 0, b"y")]


def test_a_long_answer_waits_for_a_client_that_reads_slowly(
    context: zmq.Context[Socket], connect: Callable[..., Socket]
) -> None:
    """vLLM's leaves out what exceeds the high-water mark; and meanwhile others are answered."""
    with EventSocket(LOCAL, LOCAL, buffer_batches=6000, context=context) as events:
        payload = b"." * 2000
        for _ in range(6000):
            events.publish(payload)
        slow = connect(zmq.DEALER, events.replay_endpoint, high_water_mark=5)
        ask(slow, 0)
        until("an answer", lambda: slow.poll(100))
        time.sleep(0.3)
        other = connect(zmq.DEALER, events.replay_endpoint)
        ask(other, 5990)
        assert len(answer(other)) == 10
        assert events.stats.replays_served == 1, "the slow one has not everything yet"
        assert [sequence for _, sequence, _ in answer(slow)] == list(range(6000))


def test_a_client_that_reads_nothing_loses_its_answers(
    context: zmq.Context[Socket], connect: Callable[..., Socket]
) -> None:
    """It cannot hold the memory of the ring for ever; when it asks again, it is answered."""
    with EventSocket(
        LOCAL, LOCAL, buffer_batches=3000, stall_seconds=0.2, context=context
    ) as events:
        for _ in range(3000):
            events.publish(b"." * 5000)
        dealer = connect(zmq.DEALER, events.replay_endpoint, high_water_mark=5)
        ask(dealer, 0)
        time.sleep(1)
        dealer.setsockopt(zmq.RCVTIMEO, 500)
        got = 0
        with pytest.raises(zmq.Again):
            while dealer.recv_multipart()[2] != END_SEQUENCE:
                got += 1
        assert 0 < got < 3000
        assert events.stats.replays_served == 0
        assert events.stats.requests_refused == {"stalled": 1}
        ask(dealer, 2999)
        assert len(answer(dealer)) == 1


@pytest.mark.parametrize(
    "frames",
    [
        [b""],
        [b"", b"short"],
        [b"x", b"\0" * 8],
        [b"", b"\0" * 8, b"", b""],
        [b"", SNAPSHOT],
        [b"a"],
    ],
)
def test_what_is_no_request_is_refused_and_counted(
    context: zmq.Context[Socket], connect: Callable[..., Socket], frames: list[bytes]
) -> None:
    """And the next one is answered. A snapshot is none where nobody can give it."""
    with EventSocket(LOCAL, LOCAL, context=context) as events:
        dealer = connect(zmq.DEALER, events.replay_endpoint)
        dealer.send_multipart(frames)
        until(
            "refusals to be {'malformed': 1}",
            lambda: events.stats.requests_refused == {"malformed": 1},
        )
        ask(dealer, 0)
        assert answer(dealer) == []


def test_too_many_requests_of_one_client_are_refused(
    context: zmq.Context[Socket], connect: Callable[..., Socket]
) -> None:
    """Each would hold the whole ring."""
    with EventSocket(LOCAL, LOCAL, buffer_batches=3000, context=context) as events:
        for _ in range(3000):
            events.publish(b"." * 5000)
        dealer = connect(zmq.DEALER, events.replay_endpoint, high_water_mark=5)
        for _ in range(20):
            ask(dealer, 0)
        until(
            "refusals to be {'too_many': 12}",
            lambda: events.stats.requests_refused == {"too_many": 12},
        )


def test_a_snapshot_is_given_as_it_is_read_and_a_broken_one_has_no_end(
    context: zmq.Context[Socket], connect: Callable[..., Socket]
) -> None:
    """Who gets no end asks again; the thread that answers outlives whatever the snapshot does."""
    broken = True

    def snapshot(topic: bytes) -> Iterator[Message]:
        yield Message(topic, 41, b"clear")
        if broken:
            raise LookupError
        yield Message(topic, 41, b"blocks")

    with EventSocket(LOCAL, LOCAL, snapshot=snapshot, context=context) as events:
        dealer = connect(zmq.DEALER, events.replay_endpoint)
        ask(dealer, SNAPSHOT, b"kv")
        assert dealer.recv_multipart()[2:] == [(41).to_bytes(8, "big"), b"clear"]
        assert not dealer.poll(300)
        assert events.stats.requests_refused == {"failed": 1}
        broken = False
        ask(dealer, SNAPSHOT, b"kv")
        assert answer(dealer) == [(b"kv", 41, b"clear"), (b"kv", 41, b"blocks")]
        until("the snapshot", lambda: events.stats.snapshots_served == 1)


def test_a_subscriber_that_is_full_is_counted_and_costs_nobody_else(
    context: zmq.Context[Socket], connect: Callable[..., Socket]
) -> None:
    """It misses batches, which the numbers say, and the replay still has them."""
    with EventSocket(
        LOCAL, LOCAL, buffer_batches=5000, high_water_mark_batches=500, context=context
    ) as events:
        stuck = subscribe(connect, events, high_water_mark=10)
        stats = events.stats
        assert stats.dropped["subscriber_full"] == 0
        reader = subscribe(connect, events, high_water_mark=10_000)
        got: list[int] = []

        def read() -> None:
            while True:
                topic, sequence, _ = reader.recv_multipart()
                if topic == b"kv":
                    got.append(int.from_bytes(sequence, "big"))
                if topic == b"end":
                    return

        thread = threading.Thread(target=read)
        thread.start()
        for number in range(5000):
            events.publish(b"." * 5000, b"kv")
            if number % 50 == 0:
                until("the subscriber to keep up", lambda number=number: len(got) >= number - 50)  # type: ignore[misc]
        events.publish(b"", b"end")
        thread.join(10)
        assert got == list(range(5000))
        assert stats.dropped["subscriber_full"] >= 1
        missed = []
        stuck.setsockopt(zmq.RCVTIMEO, 300)
        with pytest.raises(zmq.Again):
            while True:
                topic, sequence, _ = stuck.recv_multipart()
                if topic == b"kv":
                    missed.append(int.from_bytes(sequence, "big"))
        assert missed == list(range(len(missed)))
        assert len(missed) < 5000
        dealer = connect(zmq.DEALER, events.replay_endpoint)
        ask(dealer, len(missed), b"kv")
        assert [sequence for _, sequence, _ in answer(dealer)] == list(range(len(missed), 5000))


def test_several_threads_publish_while_others_ask(
    context: zmq.Context[Socket], connect: Callable[..., Socket]
) -> None:
    """Sockets are not thread-safe: nobody sees a frame of another, a number twice, or a hole."""
    with EventSocket(LOCAL, LOCAL, context=context) as events:
        reader = subscribe(connect, events, high_water_mark=100_000)

        def publish(name: int) -> None:
            for number in range(2000):
                events.publish(b"%d %d" % (name, number), b"kv")

        threads = [threading.Thread(target=publish, args=(name,)) for name in range(3)]
        for thread in threads:
            thread.start()
        dealer = connect(zmq.DEALER, events.replay_endpoint)
        while any(thread.is_alive() for thread in threads):
            ask(dealer, 0, b"kv")
            numbers = [sequence for _, sequence, _ in answer(dealer)]
            assert numbers == list(range(len(numbers)))
        for thread in threads:
            thread.join()
        live: list[tuple[int, bytes]] = []
        while len(live) < 6000:
            topic, sequence, payload = reader.recv_multipart()
            if topic == b"kv":
                live.append((int.from_bytes(sequence, "big"), payload))
        assert [sequence for sequence, _ in live] == list(range(6000))
        for name in range(3):
            own = [int(text.split()[1]) for _, text in live if text.startswith(b"%d " % name)]
            assert all(before < after for before, after in pairwise(own))


def test_closing_ends_the_thread_and_holds_up_nobody(connect: Callable[..., Socket]) -> None:
    """Not even with a subscriber that reads nothing, and with answers under way."""
    own: zmq.Context[Socket] = zmq.Context()
    events = EventSocket(LOCAL, LOCAL, stall_seconds=60, context=own)
    subscribe(connect, events, high_water_mark=5)
    dealer = connect(zmq.DEALER, events.replay_endpoint, high_water_mark=5)
    for _ in range(5000):
        events.publish(b"." * 5000)
    ask(dealer, 0)
    until("an answer", lambda: dealer.poll(100))
    threads = {thread.name for thread in threading.enumerate()}
    assert "kv-replay" in threads
    started = time.monotonic()
    events.close()
    own.term()  # returns when every socket is closed and what lingers is sent or given up
    # What a client that reads nothing may hold up, it does not hold up here.
    assert time.monotonic() - started < 15
    assert "kv-replay" not in {thread.name for thread in threading.enumerate()}
    assert not events.stats.up


def test_a_context_that_is_gone_is_counted_not_raised(connect: Callable[..., Socket]) -> None:
    """The thread that publishes has other things to do."""
    own: zmq.Context[Socket] = zmq.Context()
    events = EventSocket(LOCAL, LOCAL, stats=PlaneStats("zmq"), context=own)
    threading.Thread(target=own.term, daemon=True).start()

    def refused() -> bool:
        events.publish(b"x")
        return events.stats.dropped["failed"] > 0

    until("the refusal", refused)
    assert not events.stats.up
    events.close()


@pytest.mark.needs("vllm")
def test_vllms_own_decoder_reads_what_is_published(context: zmq.Context[Socket]) -> None:
    """Field for field, with the structs that vLLM itself publishes."""
    import msgspec
    from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KVEventBatch

    publisher = ZmqKvEventPublisher(LOCAL, 4, "kv", data_parallel_rank=1, context=context)
    with publisher.batch():
        publisher.publish_stored(
            9, [1, 2, 3, 4, 5, 6, 7, 8], [4, 4], [-1, b"\x07" * 32], 3, 5, lora_name="a",
            extra_keys=[["a", ("ff", 3)], None],
        )  # fmt: skip
        publisher.publish_removed(10, [-1], medium="CPU", group=2)
        publisher.publish_all_cleared()
    publisher.publish_lost()
    messages = publisher.socket.kept(0)
    publisher.shutdown()
    decode = msgspec.msgpack.Decoder(KVEventBatch).decode
    batch, cleared, empty = (decode(message.payload) for message in messages)
    assert batch.data_parallel_rank == 1
    assert batch.events == [
        BlockStored(
            block_hashes=[(1 << 64) - 1, b"\x07" * 32],
            parent_block_hash=5,
            token_ids=[1, 2, 3, 4, 5, 6, 7, 8],
            block_size=4,
            lora_id=3,
            medium="GPU",
            lora_name="a",
            extra_keys=[("a", ["ff", 3]), None],
        ),
        BlockRemoved(block_hashes=[(1 << 64) - 1], medium="CPU", group_idx=2),
        AllBlocksCleared(),
    ]
    assert (cleared.events, empty.events) == ([AllBlocksCleared()], [])
