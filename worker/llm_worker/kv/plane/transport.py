"""KV events out: a PUB socket with a ring of what was sent, and a ROUTER that replays it.

Payloads are bytes that others encoded; nothing here reads them. The wire is vLLM's, so that its own
clients can ask, too (ZmqEventPublisher in vllm/distributed/kv_events.py, 0.32.0)::

    PUB                           [topic, sequence, payload]
    DEALER asks ROUTER            ["", first sequence wanted]           + [topic]
                                  ["", "snapshot"]                      + [topic]
                                  ["", "status"]                        + [topic]
    ROUTER answers                ["", topic, sequence, payload]…  ["", "", ff*8, ""]

Sequences are 8 bytes, big-endian, counted for each topic on its own, so that whoever subscribed to
one topic sees no holes. The topic of a request, ours alone, is a prefix; without it all are sent.
Unlike vLLM, a long answer waits for a slow client instead of leaving out its middle.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import takewhile
from types import TracebackType
from typing import NamedTuple, Self

import zmq

from llm_worker.kv.stats import PlaneStats

log = logging.getLogger(__name__)

END_SEQUENCE = b"\xff" * 8
SNAPSHOT = b"snapshot"
STATUS = b"status"
_CLOSE_SECONDS = 5.0  # for the ROUTER's thread to notice
_LINGER_MS = 1000  # what was sent and not yet on the wire
_STALLED_POLL_MS = 10  # ROUTER says nothing when a client has room again
_CLIENTS = 256  # with an answer under way
_REQUESTS_PER_CLIENT = 8  # under way or waiting


class Message(NamedTuple):
    """One batch as it is on the wire."""

    topic: bytes
    sequence: int
    payload: bytes


SnapshotAnswer = Callable[[bytes], Iterable[Message]]  # topic prefix wanted → the messages


class EventSocket:
    """A PUB socket with a memory, and a ROUTER that tells of it.

    `publish` may be called from any thread; calls are in order. Requests are answered by a thread
    of its own, which alone touches the ROUTER: an answer never holds up a `publish` longer than it
    takes to copy a list of references.

    A batch is in the ring before it is sent, so that who got its successor can ask for it.
    """

    def __init__(
        self,
        endpoint: str,
        replay_endpoint: str | None = None,
        *,
        start: int = 0,
        buffer_batches: int = 10_000,
        buffer_bytes: int = 256 << 20,
        high_water_mark_batches: int = 100_000,
        stall_seconds: float = 5.0,
        snapshot: SnapshotAnswer | None = None,
        status: SnapshotAnswer | None = None,
        stats: PlaneStats | None = None,
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
    ) -> None:
        """Bind both; port 0 picks a free one, see `endpoint` and `replay_endpoint`.

        ``start`` is the first sequence of every topic. The two bounds of the ring hold for each
        topic. ``high_water_mark_batches`` is what PUB queues for each subscriber before it drops.
        A client that takes nothing for ``stall_seconds`` loses its answers, which are counted.
        ``snapshot`` and ``status`` are called on the ROUTER's thread and iterated as the client
        reads; where one raises, the answer has no end. ``context`` is the process's own unless
        given, and is never terminated.

        Raises:
            zmq.ZMQError: an endpoint cannot be bound.
            ValueError: a bound that is no bound.
        """
        if buffer_batches < 1 or buffer_bytes < 1 or high_water_mark_batches < 1 or start < 0:
            raise ValueError("bounds are at least 1, and the first sequence at least 0")
        self.stats = stats if stats is not None else PlaneStats("zmq")
        self.stats.buffer_capacity_batches = buffer_batches
        self._start = start
        self._buffer_batches = buffer_batches
        self._buffer_bytes = buffer_bytes
        self._streams: dict[bytes, _Stream] = {}
        self._lock = threading.Lock()  # of the PUB socket and the streams
        self._closed = False
        self._thread: threading.Thread | None = None
        context = context if context is not None else zmq.Context.instance()
        self._pub = context.socket(zmq.PUB)
        router = context.socket(zmq.ROUTER) if replay_endpoint is not None else None
        try:
            self._pub.set_hwm(high_water_mark_batches)
            self._pub.setsockopt(zmq.XPUB_NODROP, 1)
            self.endpoint = _bind(self._pub, endpoint)
            self.replay_endpoint: str | None = None
            if router is not None and replay_endpoint is not None:
                router.setsockopt(zmq.ROUTER_MANDATORY, 1)
                self.replay_endpoint = _bind(router, replay_endpoint)
        except BaseException:
            _release(self._pub, linger_ms=0)
            if router is not None:
                _release(router, linger_ms=0)
            raise
        if router is not None:
            self._waker = context.socket(zmq.PAIR)
            wakened = context.socket(zmq.PAIR)
            address = f"inproc://event-socket-{id(self):x}"
            self._waker.bind(address)
            wakened.connect(address)
            server = _Router(
                self, router, wakened, {SNAPSHOT: snapshot, STATUS: status}, stall_seconds
            )
            self._thread = threading.Thread(target=server.run, name="kv-replay", daemon=True)
            self._thread.start()
        self.stats.up = True

    def publish(self, payload: bytes, topic: bytes = b"") -> int:
        """Send one batch to whoever listens, and return its sequence. Never blocks on the network.

        A subscriber whose queue is full misses it, which is counted at the first batch only: from
        then on libzmq leaves that subscriber out without a word until it reads again. It learns
        from the sequence, and asks.

        Raises:
            RuntimeError: this socket is closed.
        """
        with self._lock:
            if self._closed:
                raise RuntimeError("the event socket is closed")
            stream = self._stream(topic)
            sequence = stream.next
            stream.next = sequence + 1
            self._keep(stream, sequence, payload)
            self._send(topic, sequence.to_bytes(8, "big"), payload)
            self.stats.sequence = sequence
        return sequence

    def skip(self, topic: bytes = b"") -> int:
        """Leave a number out, and return it: readers find that something is missing for good.

        They notice at the next batch, ask for the number, do not get it, and stop trusting what
        they hold of this topic, as with any batch that was lost.
        """
        with self._lock:
            stream = self._stream(topic)
            stream.next += 1
            return stream.next - 1

    def sequence(self, topic: bytes = b"") -> int | None:
        """The last one given on this topic."""
        with self._lock:
            stream = self._streams.get(topic)
            return stream.next - 1 if stream is not None else None

    def forget(self, topic: bytes) -> None:
        """Drop what is kept of a topic that gets no more. Its numbers go on if it does."""
        with self._lock:
            stream = self._streams.get(topic)
            if stream is not None:
                self.stats.buffered_batches -= len(stream.ring)
                stream.ring.clear()
                stream.bytes = 0

    def kept(self, first: int, topic: bytes = b"") -> list[Message]:
        """What the ring still has from ``first`` on, of all topics with this prefix."""
        with self._lock:
            return [
                Message(name, sequence, payload)
                for name, stream in self._streams.items()
                if name.startswith(topic)
                for sequence, payload in stream.since(first)
            ]

    def close(self) -> None:
        """Stop answering, send what is queued for at most a second, and let go of the ports.

        That is over soon after the return, not at it: who binds the same port at once may have to
        try again.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self.stats.up = False
            _release(self._pub)
            if self._thread is not None:
                with suppress(zmq.ZMQError):  # the context is gone, and so is the thread
                    self._waker.send(b"")
                self._waker.close(linger=_LINGER_MS)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(_CLOSE_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _stream(self, topic: bytes) -> _Stream:
        stream = self._streams.get(topic)
        if stream is None:
            stream = self._streams[topic] = _Stream(topic, self._start)
        return stream

    def _keep(self, stream: _Stream, sequence: int, payload: bytes) -> None:
        ring = stream.ring
        ring.append((sequence, payload))
        stream.bytes += len(payload)
        kept = 1
        while len(ring) > self._buffer_batches or (stream.bytes > self._buffer_bytes and ring):
            stream.bytes -= len(ring.popleft()[1])
            kept -= 1
        self.stats.buffered_batches += kept

    def _send(self, topic: bytes, sequence: bytes, payload: bytes) -> None:
        pub = self._pub
        try:
            pub.send_multipart((topic, sequence, payload), zmq.NOBLOCK)
        except zmq.Again:  # nobody got it, as one has no room
            self.stats.dropped["subscriber_full"] += 1
            pub.setsockopt(zmq.XPUB_NODROP, 0)
            try:
                pub.send_multipart((topic, sequence, payload), zmq.NOBLOCK)
            finally:
                pub.setsockopt(zmq.XPUB_NODROP, 1)
        except zmq.ZMQError as error:  # the context is gone, or the machine has no memory
            self.stats.dropped["failed"] += 1
            if self.stats.up:
                log.warning("KV events cannot be published: %s", error)
            self.stats.up = False
            return
        self.stats.published_batches += 1
        self.stats.up = True


class _Stream:
    """One topic's numbers and ring."""

    __slots__ = ("bytes", "next", "ring", "topic")

    def __init__(self, topic: bytes, start: int) -> None:
        self.topic = topic
        self.next = start
        self.ring: deque[tuple[int, bytes]] = deque()  # ascending
        self.bytes = 0

    def since(self, first: int) -> list[tuple[int, bytes]]:
        """Costs as much as it finds."""
        found = list(takewhile(lambda batch: batch[0] >= first, reversed(self.ring)))
        found.reverse()
        return found


class _Router:
    """The replay side: one thread, which owns the ROUTER socket.

    An answer is an iterator, moved on as far as its client has room; clients take turns.
    """

    def __init__(
        self,
        owner: EventSocket,
        router: zmq.Socket[bytes],
        wakened: zmq.Socket[bytes],
        answers: Mapping[bytes, SnapshotAnswer | None],
        stall_seconds: float,
    ) -> None:
        self._owner = owner
        self._router = router
        self._wakened = wakened
        self._answers = answers
        self._stall_seconds = stall_seconds
        self._clients: OrderedDict[bytes, deque[_Answer]] = OrderedDict()

    def run(self) -> None:
        """Answer until told to stop."""
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._wakened, zmq.POLLIN)
        moved = False
        try:
            while True:
                timeout = None if not self._clients else 0 if moved else _STALLED_POLL_MS
                ready = dict(poller.poll(timeout))
                if self._wakened in ready:
                    return
                if self._router in ready:
                    self._take_requests()
                moved = self._give_answers()
        except zmq.ZMQError as error:
            # The context was terminated under us. Publishing says the same, louder.
            log.warning("KV events are no longer replayed: %s", error)
        finally:
            _release(self._router)
            self._wakened.close(linger=0)

    def _take_requests(self) -> None:
        for _ in range(_CLIENTS):
            try:
                frames = self._router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            client, request = frames[0], frames[1:]
            answer = self._answer(request)
            queue = self._clients.get(client)
            full = len(self._clients) >= _CLIENTS if queue is None else (
                len(queue) >= _REQUESTS_PER_CLIENT
            )  # fmt: skip
            if answer is None or full:
                self._refuse("malformed" if answer is None else "too_many")
                continue
            if queue is None:
                queue = self._clients[client] = deque()
            queue.append(answer)

    def _answer(self, request: list[bytes]) -> _Answer | None:
        """The answer, or None: not a request."""
        if len(request) not in (2, 3) or request[0]:
            return None
        topic = request[2] if len(request) == 3 else b""
        deadline = time.monotonic() + self._stall_seconds
        if request[1] in self._answers:
            special = self._answers[request[1]]
            if special is None:
                return None
            return _Answer(_lazily(special, topic), deadline, request[1].decode())
        if len(request[1]) != 8:
            return None
        first = int.from_bytes(request[1], "big")
        return _Answer(iter(self._owner.kept(first, topic)), deadline, "replay")

    def _give_answers(self) -> bool:
        """Move every client's answer on by a piece; whether one could be."""
        moved = False
        now = time.monotonic()
        for client, queue in list(self._clients.items()):
            answer = queue[0]
            if self._give(client, answer):
                answer.deadline = now + self._stall_seconds
                moved = True
            if answer.done:
                queue.popleft()
            elif now > answer.deadline:
                self._refuse("stalled", len(queue))
                queue.clear()
            if not queue:
                del self._clients[client]
        return moved

    def _give(self, client: bytes, answer: _Answer, messages: int = 256) -> bool:
        moved = False
        for _ in range(messages):
            if answer.waiting is None:
                self._advance(answer)
                if answer.waiting is None:
                    return True  # broken off: no end, the client asks again
            try:
                self._router.send_multipart((client, b"", *answer.waiting), zmq.NOBLOCK)
            except zmq.Again:
                return moved
            except zmq.ZMQError as error:
                # Full, too, until the client has taken half of its queue; or gone.
                if error.errno == zmq.EHOSTUNREACH:
                    return moved
                raise
            moved = True
            if answer.waiting[1] == END_SEQUENCE:
                answer.done = True
                self._count(answer)
                return True
            answer.waiting = None
        return moved

    def _advance(self, answer: _Answer) -> None:
        try:
            topic, sequence, payload = next(answer.messages)
            answer.waiting = (topic, sequence.to_bytes(8, "big"), payload)
        except StopIteration:
            answer.waiting = (b"", END_SEQUENCE, b"")
        except Exception:  # the snapshot is others' code; replay has to outlive it
            log.exception("A snapshot of KV events failed")
            self._refuse("failed")
            answer.done = True

    def _refuse(self, reason: str, requests: int = 1) -> None:
        self._owner.stats.requests_refused[reason] += requests

    def _count(self, answer: _Answer) -> None:
        if answer.kind == "snapshot":
            self._owner.stats.snapshots_served += 1
        elif answer.kind == "replay":
            self._owner.stats.replays_served += 1


class _Answer:
    """What one client still has to get."""

    __slots__ = ("deadline", "done", "kind", "messages", "waiting")

    def __init__(self, messages: Iterator[Message], deadline: float, kind: str) -> None:
        self.messages = messages
        self.deadline = deadline  # monotonic; moves on with every piece taken
        self.kind = kind  # replay, snapshot, status
        self.waiting: tuple[bytes, bytes, bytes] | None = None  # made, and not yet taken
        self.done = False


def _lazily(snapshot: SnapshotAnswer, topic: bytes) -> Iterator[Message]:
    """Call it where its errors are caught."""
    yield from snapshot(topic)


def _bind(socket: zmq.Socket[bytes], endpoint: str) -> str:
    """Bind; the endpoint with the port that it got."""
    if "[" in endpoint or "::" in endpoint:
        socket.setsockopt(zmq.IPV6, 1)
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.LINGER, _LINGER_MS)  # connections have what it is at the bind
    socket.bind(endpoint)
    return socket.getsockopt_string(zmq.LAST_ENDPOINT)


def _release(socket: zmq.Socket[bytes], linger_ms: int = _LINGER_MS) -> None:
    """Close it. Closing alone would keep the port until what is queued has been sent."""
    with suppress(zmq.ZMQError):  # the context is gone, or it was never bound
        socket.unbind(socket.getsockopt_string(zmq.LAST_ENDPOINT))
    socket.close(linger=linger_ms)
