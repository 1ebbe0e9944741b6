"""What a publisher sends and keeps. Nobody listens here: sockets are bound within the process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_worker.kv.plane.transport import EventSocket
from llm_worker.kv.records import ALL_MEDIA, AllBlocksCleared, BlockRemoved, BlockStored
from llm_worker.kv.trtllm.publisher import ZmqKvEventPublisher, offset_port, unsigned
from llm_worker.kv.wire import Batch, Decoder

SIZE = 4


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    with zmq.Context() as context:
        yield context


@pytest.fixture
def publisher(context: zmq.Context[zmq.Socket[bytes]]) -> Iterator[ZmqKvEventPublisher]:
    made = ZmqKvEventPublisher(
        "inproc://events", SIZE, "kv", data_parallel_rank=2, clock=lambda: 5.0, context=context
    )
    yield made
    made.shutdown()


def sent(publisher: ZmqKvEventPublisher) -> list[Batch]:
    decoder = Decoder(token_ids=True)
    return [decoder.decode(message.payload) for message in publisher.socket.kept(0)]


def test_each_call_is_one_message_that_says_what_was_said(publisher: ZmqKvEventPublisher) -> None:
    """Hashes as vLLM writes them, the rank of the publisher, the time of the call."""
    publisher.publish_stored(
        1, list(range(8)), [4, 4], [-1, 7], 3, -2, lora_name="a", extra_keys=[["a"], None]
    )
    publisher.publish_removed(2, [-1], medium="CPU", group=1)
    publisher.publish_all_cleared()
    batches = sent(publisher)
    assert [(batch.timestamp, batch.rank, len(batch.events)) for batch in batches] == [
        (5.0, 2, 1)
    ] * 3
    stored, removed, cleared = (batch.events[0] for batch in batches)
    assert isinstance(stored, BlockStored)
    assert stored.hashes == [(1 << 64) - 1, 7]
    assert stored.parent == (1 << 64) - 2
    assert stored.token_ids == list(range(8))
    assert (stored.block_size, stored.medium, stored.adapter) == (4, "gpu", "a")
    assert stored.extra_keys == [["a"], None]
    assert removed == BlockRemoved(hashes=[(1 << 64) - 1], medium="cpu", group=1)
    assert cleared == AllBlocksCleared(medium=ALL_MEDIA)


def test_a_batch_is_one_message_for_each_run_of_a_rank(publisher: ZmqKvEventPublisher) -> None:
    """A message has room for one rank; the order of events is kept."""
    with publisher.batch():
        publisher.publish_removed(None, [1])
        publisher.publish_removed(None, [2])
        with publisher.batch():
            publisher.publish_removed(None, [3], attention_dp_rank=0)
        publisher.publish_all_cleared()
        assert sent(publisher) == []
    assert [(batch.rank, len(batch.events)) for batch in sent(publisher)] == [
        (2, 2),
        (0, 1),
        (2, 1),
    ]
    with publisher.batch():
        pass
    assert len(sent(publisher)) == 3, "an empty batch is no message"


def test_what_was_said_before_an_exception_in_a_batch_is_sent(
    publisher: ZmqKvEventPublisher,
) -> None:
    """It has happened, whatever happens after."""
    with pytest.raises(KeyError), publisher.batch():
        publisher.publish_removed(None, [1])
        raise KeyError
    assert len(sent(publisher)) == 1
    publisher.publish_removed(None, [2])
    assert len(sent(publisher)) == 2


def test_a_loss_is_a_clear_and_a_hole_in_the_numbers(publisher: ZmqKvEventPublisher) -> None:
    """Readers forget, and know that what they get from now on is not all; at once."""
    with publisher.batch():
        publisher.publish_removed(None, [1])
        publisher.publish_lost()
        publisher.publish_removed(None, [2])
    messages = publisher.socket.kept(0)
    assert [message.sequence for message in messages] == [0, 1, 3, 4]
    assert [batch.events for batch in sent(publisher)] == [
        [BlockRemoved(hashes=[1])],
        [AllBlocksCleared(medium=ALL_MEDIA)],
        [],
        [BlockRemoved(hashes=[2])],
    ]


@pytest.mark.parametrize(
    ("tokens", "sizes", "hashes"),
    [
        ([1, 2, 3], [3], [1]),  # partial
        ([1, 2, 3, 4, 5], [5], [1]),
        ([1, 2, 3, 4], [4], [1, 2]),
        ([1, 2, 3], [4], [1]),
        ([1, 2, 3, 4], [4], [1 << 64]),
        ([1, 2, 3, 4], [4], [-(1 << 63) - 1]),
    ],
)
def test_contradictions_are_refused_before_anything_is_sent(
    publisher: ZmqKvEventPublisher, tokens: list[int], sizes: list[int], hashes: list[int]
) -> None:
    """A reader could only guess what was meant."""
    with pytest.raises(ValueError):
        publisher.publish_stored(1, tokens, sizes, hashes)
    assert sent(publisher) == []


def test_blocks_that_only_moved_have_no_tokens(publisher: ZmqKvEventPublisher) -> None:
    """Their tokens were told when they were stored."""
    publisher.publish_stored(1, (), [4], [7], 0, medium="CPU")
    (batch,) = sent(publisher)
    assert isinstance(stored := batch.events[0], BlockStored)
    assert (stored.hashes, stored.medium, stored.adapter) == ([7], "cpu", None)


def test_nothing_is_published_after_the_shutdown(publisher: ZmqKvEventPublisher) -> None:
    """It would be lost without a word. A second shutdown is none."""
    publisher.shutdown()
    publisher.shutdown()
    with pytest.raises(RuntimeError):
        publisher.publish_all_cleared()
    assert not publisher.stats.up


def test_hashes_are_unsigned_or_bytes() -> None:
    """vLLM's integers are unsigned; TensorRT-LLM's and the peer's may be signed."""
    assert unsigned(-1) == (1 << 64) - 1
    assert unsigned(-(1 << 63)) == 1 << 63
    assert unsigned((1 << 64) - 1) == (1 << 64) - 1
    assert unsigned(b"\x01" * 32) == b"\x01" * 32


@pytest.mark.parametrize(
    ("endpoint", "rank", "expected"),
    [
        ("tcp://*:20080", 0, "tcp://*:20080"),
        ("tcp://*:20080", 3, "tcp://*:20083"),
        ("tcp://[::1]:5557", 1, "tcp://[::1]:5558"),
        ("tcp://*:0", 3, "tcp://*:0"),
        ("inproc://kv", 0, "inproc://kv"),
        ("inproc://kv", 1, "inproc://kv_dp1"),
    ],
)
def test_ranks_have_vllms_endpoints(endpoint: str, rank: int, expected: str) -> None:
    """Port plus rank; port 0 is anyone's."""
    assert offset_port(endpoint, rank) == expected


def test_each_topic_counts_for_itself(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    """Who subscribed to one of them sees no holes; requests for a prefix find all of it."""
    with EventSocket("inproc://events", start=100, context=context) as socket:
        assert socket.sequence(b"a1") is None
        assert [socket.publish(b"x", b"a1"), socket.publish(b"y", b"b")] == [100, 100]
        assert [socket.publish(b"z", b"a1"), socket.publish(b"", b"a2")] == [101, 100]
        assert socket.sequence(b"a1") == 101
        assert [(m.topic, m.sequence, m.payload) for m in socket.kept(0, b"a")] == [
            (b"a1", 100, b"x"),
            (b"a1", 101, b"z"),
            (b"a2", 100, b""),
        ]
        assert len(socket.kept(0)) == 4
        socket.forget(b"a1")
        assert socket.stats.buffered_batches == 2
        assert socket.publish(b"", b"a1") == 102, "forgotten, but not begun again"


def test_what_is_bound_twice_is_refused(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    """And lets go of the endpoint that it had already."""
    with (
        EventSocket("inproc://taken", context=context),
        pytest.raises(zmq.ZMQError, match="in use"),
    ):
        EventSocket("inproc://free", "inproc://taken", context=context)
    EventSocket("inproc://free", context=context).close()


@settings(deadline=None)
@given(
    st.lists(st.one_of(st.integers(0, 40), st.just("skip")), max_size=60),
    st.integers(1, 8),
    st.integers(1, 100),
    st.integers(0, 70),
)
def test_the_ring_keeps_the_last_batches_within_both_bounds(
    history: list[int | str], batches: int, size: int, first: int
) -> None:
    """A suffix of what was sent: no longer than the bounds, and no shorter than it has to be."""
    with (
        zmq.Context() as context,
        EventSocket(
            "inproc://events", buffer_batches=batches, buffer_bytes=size, context=context
        ) as socket,
    ):
        everything: list[tuple[int, int]] = []
        for number, what in enumerate(history):
            if isinstance(what, int):
                assert socket.publish(b"." * what) == number
                everything.append((number, what))
            else:
                assert socket.skip() == number
        kept = [(message.sequence, len(message.payload)) for message in socket.kept(0)]
        count = len(kept)
        assert kept == everything[len(everything) - count :]
        assert count <= batches
        assert sum(length for _, length in kept) <= size
        if count < min(len(everything), batches):
            assert sum(length for _, length in everything[-count - 1 :]) > size
        assert socket.stats.buffered_batches == count
        assert socket.kept(first) == [m for m in socket.kept(0) if m.sequence >= first]
