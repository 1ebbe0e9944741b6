"""The event plane on ZMQ: what was indexed goes out again, for a fleet index to read.

The wire is vLLM's own, one topic per rank, on two ports: events, and replay of events. Beyond
vLLM's replay the second answers ``snapshot`` with all blocks that are held, and ``status``. Never
decodes an event, and never holds up the thread that publishes: what does not fit is dropped and
counted, and receivers see the hole in the numbers.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from llm_worker.kv.plane import topics
from llm_worker.kv.plane.transport import EventSocket, Message
from llm_worker.kv.records import Event
from llm_worker.kv.stats import PlaneStats

if TYPE_CHECKING:
    from llm_worker.kv.index.source import BlockSink, Source


class ZmqPlane:
    """An outlet of the pipeline on a PUB and a ROUTER socket.

    `publish` is the pipeline's thread's; everything else happens on the socket's own.
    """

    def __init__(
        self,
        endpoint: str,
        replay_endpoint: str,
        *,
        sources: Callable[[], Sequence[Source]],
        on_index_thread: topics.OnIndexThread,
        epoch: int | None = None,
        buffer_batches: int = 10_000,
        buffer_bytes: int = 256 << 20,
        stats: PlaneStats | None = None,
    ) -> None:
        """Bind both endpoints; port 0 picks a free one.

        ``sources`` are those of the index; ``on_index_thread`` runs a callable on the thread that
        writes it, and is called on the socket's thread. ``epoch`` is the Unix second of the start.

        Raises:
            zmq.ZMQError: an endpoint cannot be bound.
        """
        self.stats = stats if stats is not None else PlaneStats("zmq")
        self.instance = secrets.token_hex(8)
        self._sources = sources
        self._on_index_thread = on_index_thread
        self._first = topics.first_sequence(epoch)
        self._topics: dict[BlockSink, bytes] = {}
        self._socket = EventSocket(
            endpoint,
            replay_endpoint,
            start=self._first,
            buffer_batches=buffer_batches,
            buffer_bytes=buffer_bytes,
            snapshot=self._snapshot,
            status=self._status,
            stats=self.stats,
        )
        self.endpoint = self._socket.endpoint
        self.replay_endpoint = self._socket.replay_endpoint

    def publish(
        self, source: BlockSink, payload: bytes, events: Sequence[Event], timestamp: float
    ) -> None:
        """Send one batch, which ``source`` has taken in already, as the next of its topic."""
        topic = self._topics.get(source)
        if topic is None:
            topic = self._topics[source] = topics.topic(source.worker, source.rank)
        self._socket.publish(payload, topic)

    def close(self) -> None:
        """Let go of the ports; what is queued is sent for at most a second."""
        self._socket.close()

    def _sequence(self, worker: str, rank: int) -> int:
        """The last one given; just before the first when there is none."""
        last = self._socket.sequence(topics.topic(worker, rank))
        return self._first - 1 if last is None else last

    def _wanted(self, prefix: bytes) -> list[Source]:
        """The sources that a request with this topic asks for."""
        return [
            source
            for source in self._sources()
            if topics.topic(source.worker, source.rank).startswith(prefix)
        ]

    def _snapshot(self, prefix: bytes) -> Iterator[Message]:
        frozen = self._on_index_thread(lambda: topics.freeze(self._wanted(prefix), self._sequence))
        for stream in frozen:
            name = topics.topic(stream.worker, stream.rank)
            for payload in topics.batches(stream):
                yield Message(name, stream.sequence, payload)

    def _status(self, prefix: bytes) -> Iterable[Message]:
        return [
            Message(
                topics.topic(status.worker, status.rank),
                self._sequence(status.worker, status.rank),
                topics.encode_status(status),
            )
            for status in topics.statuses(self._wanted(prefix), self.instance)
        ]
