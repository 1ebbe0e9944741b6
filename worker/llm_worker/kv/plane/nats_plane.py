"""The event plane on NATS JetStream: for more than one machine, and for receivers that come later.

One JetStream stream per worker, one subject per rank, the payloads and sequences those of the ZMQ
plane. A message's id is ``worker/rank/sequence``, so what is sent again after an outage is stored
once. The stream is bounded in age and bytes; what falls out of it, and what does not fit into the
buffer during an outage, receivers see as a hole in the numbers. Beside the stream, a request on
``kv-request.<worker>`` gets the worker's blocks or its status.

Runs an asyncio loop in a thread of its own. `publish` only appends to a bounded buffer.
Long: a buffer, an outage and a request are about the same stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import nats.errors
import nats.js.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import DiscardPolicy, RetentionPolicy, StorageType, StreamConfig, StreamInfo

from llm_worker.kv.plane import topics
from llm_worker.kv.plane.nats_connection import RETRY_SECONDS, TROUBLE, stay_connected, wait
from llm_worker.kv.records import Event
from llm_worker.kv.stats import PlaneStats

if TYPE_CHECKING:
    from llm_worker.kv.index.source import BlockSink, Source

log = logging.getLogger(__name__)

SUBJECTS = "kv.*.*"
STREAM_PREFIX = "KV_"
# Headers of an answer to a request.
TOPIC_HEADER = "Kv-Topic"
SEQUENCE_HEADER = "Kv-Sequence"
POSITION_HEADER = "Kv-Position"  # the stream's last message that is surely in the snapshot
INSTANCE_HEADER = "Kv-Instance"
END_HEADER = "Kv-End"  # complete, or failed

_WINDOW_BATCHES = 512  # on their way at once
_ACKNOWLEDGE_SECONDS = 5.0
_DUPLICATES_SECONDS = 120.0  # how long the server remembers message ids
_HEADERS_BYTES = 512
_FREEZE_SECONDS = 10.0
_SHOW_UP_SECONDS = 1.0  # between two looks for new sources while nothing is published


class _Item(NamedTuple):
    worker: str
    subject: str
    id: str
    payload: bytes


def stream_name(worker: str) -> str:
    """The JetStream stream of a worker."""
    return STREAM_PREFIX + topics.token(worker)


def subject(worker: str, rank: int | str) -> str:
    """Where a rank's batches go; ``*`` for all of them."""
    return f"kv.{topics.token(worker)}.{rank}"


def request_subject(worker: str) -> str:
    """Where a worker is asked for ``snapshot`` or ``status``."""
    return f"kv-request.{topics.token(worker)}"


def without_credentials(url: str) -> str:
    """The URL as it may be shown."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}:{parts.port or 4222}"


class _Connection:
    """One client that is connected, and what holds for as long as it is."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.stream: JetStreamContext = client.jetstream(
            timeout=_ACKNOWLEDGE_SECONDS, publish_async_max_pending=4000
        )
        self.streams: set[str] = set()  # workers whose stream is there
        self.served: set[str] = set()  # workers whose requests are answered


class NatsPlane:
    """An outlet of the pipeline on NATS JetStream. `publish` is for one thread.

    Overflow: the oldest batch that is not on its way is dropped, so that the newest one, which
    shows receivers the hole, is never missing.
    """

    def __init__(
        self,
        url: str,
        *,
        sources: Callable[[], Sequence[Source]],
        on_index_thread: topics.OnIndexThread,
        epoch: int | None = None,
        buffer_batches: int = 20_000,
        buffer_bytes: int = 64 << 20,
        max_age_seconds: float = 3600.0,
        max_bytes: int = 64 << 20,
        stats: PlaneStats | None = None,
    ) -> None:
        """Connect in the background, and go on trying as long as it takes.

        ``sources`` and ``on_index_thread`` are as for `plane.ZmqPlane`. ``max_age_seconds`` and
        ``max_bytes`` bound each worker's stream on the server.
        """
        self.stats = stats if stats is not None else PlaneStats("nats")
        self.stats.buffer_capacity_batches = buffer_batches
        self.instance = secrets.token_hex(8)
        self._url = url
        self._sources = sources
        self._on_index_thread = on_index_thread
        self._first = topics.first_sequence(epoch)
        self._buffer_batches = buffer_batches
        self._buffer_bytes = buffer_bytes
        self._max_age_seconds = max_age_seconds
        self._max_bytes = max_bytes
        self._next: dict[tuple[str, int], int] = {}
        self._subjects: dict[tuple[str, int], str] = {}
        self._lock = threading.Lock()  # of the buffer
        self._buffer: deque[_Item] = deque()
        self._bytes = 0
        self._on_the_way = 0
        self._positions: dict[str, int] = {}  # worker -> of the last message stored
        self._complaints: set[str] = set()  # logged since it was up
        self._closing = False
        self._window: list[_Item] = []  # on the way
        self._connections = 0
        self._main: asyncio.Task[None] | None = None
        self._loop = asyncio.new_event_loop()
        self._wake = asyncio.Event()
        self._idle = threading.Event()
        self._idle.set()
        self._thread = threading.Thread(target=self._run, name="kv-nats", daemon=True)
        self._thread.start()

    def publish(
        self, source: BlockSink, payload: bytes, events: Sequence[Event], timestamp: float
    ) -> None:
        """Number one batch, which ``source`` has taken in already, and put it into the buffer."""
        key = (source.worker, source.rank)
        sequence = self._next.get(key, self._first)
        self._next[key] = sequence + 1
        name = self._subjects.get(key)
        if name is None:
            name = self._subjects[key] = subject(*key)
        item = _Item(key[0], name, f"{key[0]}/{key[1]}/{sequence}", payload)
        with self._lock:
            if self._closing:
                return
            self._idle.clear()
            self._buffer.append(item)
            self._bytes += len(payload)
            self._bound()
            first = len(self._buffer) == 1
        self.stats.sequence = sequence
        if first:
            self._loop.call_soon_threadsafe(self._wake.set)

    def close(self, flush_seconds: float = 2.0) -> None:
        """Wait so long until everything is stored, then disconnect; what is left is counted."""
        if self.stats.up:
            self._idle.wait(flush_seconds)
        with self._lock:
            if self._closing:
                return
            self._closing = True
        self._loop.call_soon_threadsafe(self._cancel)
        self._thread.join(timeout=5)
        if not self._thread.is_alive():
            self._loop.close()
        with self._lock:
            left = len(self._buffer) + self._on_the_way
            self._buffer.clear()
        if left:
            self.stats.dropped["failed"] += left
            log.warning("%d KV batches were not stored by NATS before the end", left)
        self.stats.buffered_batches = 0
        self.stats.up = False

    def _bound(self) -> None:
        """Drop what does not fit, oldest first; the lock is held."""
        buffer = self._buffer
        while len(buffer) > 1 and (
            len(buffer) + self._on_the_way > self._buffer_batches
            or self._bytes > self._buffer_bytes
        ):
            self._bytes -= len(buffer.popleft().payload)
            self.stats.dropped["buffer_full"] += 1
        self.stats.buffered_batches = len(buffer) + self._on_the_way

    def _take(self) -> list[_Item]:
        """The oldest of the buffer, a window full."""
        with self._lock:
            taken = [self._buffer.popleft() for _ in range(min(_WINDOW_BATCHES, len(self._buffer)))]
            self._bytes -= sum(len(item.payload) for item in taken)
            self._on_the_way = len(taken)
            if not taken:
                self._idle.set()
        return taken

    def _settle(self, left: int) -> None:
        """So many of the window are still to be stored."""
        with self._lock:
            self._on_the_way = left
            self.stats.buffered_batches = len(self._buffer) + left

    # --- the plane's own thread -------------------------------------------------------------------

    def _cancel(self) -> None:
        if self._main is not None:
            self._main.cancel()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._main = self._loop.create_task(self._stay(), name="kv-nats")
        with contextlib.suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._main)

    async def _stay(self) -> None:
        await stay_connected(
            self._url,
            "llm-worker-kv-plane",
            self._live,
            failed=lambda error: self._complain("connection", error),
            ended=self._ended,
        )

    async def _ended(self, error: Exception) -> None:
        if isinstance(error, TROUBLE):
            self._complain("connection", error)
        else:  # a bug of ours, or of the client's: what is buffered still has to go
            self.stats.up = False
            log.exception("the NATS plane broke; it starts again")

    async def _live(self, client: Client) -> None:
        """Answer and send over one connection."""
        connection = _Connection(client)
        self._connections += 1
        self.stats.reconnects = self._connections - 1
        for source in self._sources():
            await self._serve(connection, source.worker)
        await self._send_forever(connection)

    async def _send_forever(self, connection: _Connection) -> None:
        shortest, longest = RETRY_SECONDS
        pause = shortest
        while True:
            self._wake.clear()
            fresh = not self._window
            if fresh:
                self._window = self._take()
            if not self._window:
                await self._show_up(connection)
                await wait(self._wake, _SHOW_UP_SECONDS)
                continue
            # Anew each time: another connection may carry less.
            limit = connection.client.max_payload - _HEADERS_BYTES
            self._window = self._without_too_large(self._window, limit)
            self._settle(len(self._window))
            if fresh:
                self.stats.published_batches += len(self._window)
            sent = len(self._window)
            self._window = await self._store(connection, self._window)
            self._settle(len(self._window))
            if len(self._window) < sent:
                pause = shortest
            if self._window:
                await asyncio.sleep(pause * random.uniform(0.5, 1.5))  # noqa: S311
                pause = min(pause * 2, longest)

    async def _show_up(self, connection: _Connection) -> None:
        """Have the streams of all workers that are known, before their first batch."""
        if not self.stats.up:  # whether the trouble is over, only looking tells
            connection.streams.clear()
        for worker in {source.worker for source in self._sources()}:
            await self._prepare(connection, worker)

    def _without_too_large(self, window: list[_Item], limit: int) -> list[_Item]:
        fitting = [item for item in window if len(item.payload) <= limit]
        self.stats.dropped["too_large"] += len(window) - len(fitting)
        return fitting

    async def _store(self, connection: _Connection, window: list[_Item]) -> list[_Item]:
        """Publish all, in order, and return what was not acknowledged."""
        for worker in {item.worker for item in window}:
            if not await self._prepare(connection, worker):
                return window
        waiting: list[tuple[_Item, asyncio.Future[Any]]] = []
        try:
            for item in window:
                future = await connection.stream.publish_async(
                    item.subject,
                    item.payload,
                    wait_stall=_ACKNOWLEDGE_SECONDS,
                    headers={"Nats-Msg-Id": item.id},
                )
                waiting.append((item, future))
        except (nats.errors.Error, OSError) as error:
            self._complain("publish", error)
        if waiting:
            futures = [future for _, future in waiting]
            await asyncio.wait(futures, timeout=_ACKNOWLEDGE_SECONDS)
        stored = set()
        for item, future in waiting:
            if not future.done() or future.cancelled():
                future.cancel()
                self._complain("acknowledgement", TimeoutError("none in time"))
            elif refusal := future.exception():
                self._complain("publish", refusal)
                if isinstance(refusal, nats.js.errors.NoStreamResponseError):
                    connection.streams.discard(item.worker)
            else:
                stored.add(item)
                position = future.result().seq
                self._positions[item.worker] = max(position, self._positions.get(item.worker, 0))
        self.stats.acknowledged_batches += len(stored)
        if len(stored) == len(window):
            self._be_up()
        return [item for item in window if item not in stored]

    async def _prepare(self, connection: _Connection, worker: str) -> bool:
        """Have the worker's stream and answer requests for it; whether that is so."""
        if worker in connection.streams:
            return True
        config = StreamConfig(
            name=stream_name(worker),
            description="KV-cache events of one worker",
            subjects=[subject(worker, "*")],
            retention=RetentionPolicy.LIMITS,
            storage=StorageType.FILE,
            discard=DiscardPolicy.OLD,
            max_age=self._max_age_seconds,
            max_bytes=self._max_bytes,
            duplicate_window=min(_DUPLICATES_SECONDS, self._max_age_seconds),
            metadata={"worker": worker},
        )
        try:
            await self._serve(connection, worker)
            state = (await _have_stream(connection.stream, config)).state
        except TROUBLE as error:
            self._complain("stream", error)
            return False
        self._positions[worker] = state.last_seq
        connection.streams.add(worker)
        self._be_up()
        return True

    def _be_up(self) -> None:
        if not self.stats.up:
            self.stats.up = True
            self._complaints.clear()
            log.info("KV events go to %s", without_credentials(self._url))

    def _complain(self, what: str, error: BaseException) -> None:
        """Once for each new kind of trouble."""
        self.stats.up = False
        complaint = f"{what}: {type(error).__name__}: {error}"
        if complaint not in self._complaints:
            self._complaints.add(complaint)
            log.warning("the NATS plane has trouble: %s", complaint)

    # --- requests ---------------------------------------------------------------------------------

    async def _serve(self, connection: _Connection, worker: str) -> None:
        if worker in connection.served:
            return
        client = connection.client

        async def asked(message: Msg) -> None:
            how = "complete"
            try:
                await self._answer(client, worker, message)
            except Exception as error:  # the index's thread is busy, or broke; or the server went
                log.warning("a request for KV blocks was not answered: %r", error)
                self.stats.requests_refused["failed"] += 1
                how = "failed"
            end = {END_HEADER: how, INSTANCE_HEADER: self.instance}
            await client.publish(message.reply, b"", headers=end)

        await client.subscribe(request_subject(worker), cb=asked)
        connection.served.add(worker)

    async def _answer(self, client: Client, worker: str, message: Msg) -> None:
        if message.data == b"status":
            # While nothing is stored, readers miss the news and their numbers look well.
            doubts = () if self.stats.up else ("plane_down",)
            for status in topics.statuses(self._of(worker), self.instance, *doubts):
                await client.publish(
                    message.reply,
                    topics.encode_status(status),
                    headers={
                        TOPIC_HEADER: topics.topic(status.worker, status.rank).decode(),
                        SEQUENCE_HEADER: str(self._sequence(status.worker, status.rank)),
                        INSTANCE_HEADER: self.instance,
                    },
                )
        elif message.data == b"snapshot":
            frozen, position = await asyncio.wait_for(
                asyncio.to_thread(self._on_index_thread, lambda: self._freeze(worker)),
                _FREEZE_SECONDS,
            )
            for stream in frozen:
                headers = {
                    TOPIC_HEADER: topics.topic(stream.worker, stream.rank).decode(),
                    SEQUENCE_HEADER: str(stream.sequence),
                    POSITION_HEADER: str(position),
                    INSTANCE_HEADER: self.instance,
                }
                for payload in topics.batches(stream):
                    await client.publish(message.reply, payload, headers=headers)
                    await client.flush()  # what the socket takes, not what memory holds
            self.stats.snapshots_served += 1

    def _freeze(self, worker: str) -> tuple[list[topics.Frozen], int]:
        """At rest: the worker's blocks, and a place in the stream after which all news come."""
        return topics.freeze(self._of(worker), self._sequence), self._positions.get(worker, 0)

    def _of(self, worker: str) -> list[Source]:
        return [source for source in self._sources() if source.worker == worker]

    def _sequence(self, worker: str, rank: int) -> int:
        return self._next.get((worker, rank), self._first) - 1


async def _have_stream(stream: JetStreamContext, config: StreamConfig) -> StreamInfo:
    """The stream, with these limits. Added only where it is not: a full server refuses that."""
    assert config.name is not None
    try:
        found = await stream.stream_info(config.name)
    except nats.js.errors.NotFoundError:
        return await stream.add_stream(config)
    have = found.config
    if (have.max_age, have.max_bytes) != (config.max_age, config.max_bytes):
        return await stream.update_stream(config)
    return found
