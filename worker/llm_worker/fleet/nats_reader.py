"""The receiving side of the NATS plane: JetStream streams of many workers into one index.

Finds the workers' streams, takes a snapshot from each worker, and reads on from there. It keeps its
own place in each stream, so after an outage of the server it goes on where it was;
the planes' sequence numbers prove that nothing is missing, and what is missing is healed by another
snapshot, or marked. The accounting is `stream.Stream`'s, as for ZMQ.

Runs an asyncio loop in a thread of its own. The index is written on the pipeline's thread only:
every touch of a `Stream` goes through ``call``, which is also what holds back a fast server.
Long: one connection, and what is asked, read and waited for over it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

import msgspec
import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy

from llm_worker.kv.follow.recovery import ReplayRequest
from llm_worker.kv.follow.stream import Stream
from llm_worker.kv.index.index import Index
from llm_worker.kv.plane import nats_plane, topics
from llm_worker.kv.plane.nats_connection import TROUBLE, cancelled, stay_connected
from llm_worker.kv.stats import ListenerStats

log = logging.getLogger(__name__)

REQUEST_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Timings:
    """How often is asked, and how long is waited. In seconds but for the first."""

    fetch_messages: int = 512
    discover_seconds: float = 2.0  # between two looks for workers
    status_seconds: float = 2.0  # between two questions how far a worker is
    fetch_seconds: float = 0.5
    heartbeat_seconds: float = 2.0  # of a consumer that has nothing to deliver
    snapshot_seconds: float = 15.0  # without a piece of it
    late_seconds: float = 1.0  # for what was stored out of order
    tail_seconds: float = 6.0  # behind what the worker has sent, without progress
    snapshot_pause_seconds: float = 5.0


class _Piece(NamedTuple):
    """One message of an answer."""

    worker: str
    rank: int
    sequence: int
    position: int
    instance: str
    payload: bytes


class _LostPlaceError(Exception):
    """The server has no such consumer any more. Handled by `_Follower`: make another one."""


class NatsReader:
    """Every worker on one NATS server, as sources of an index."""

    def __init__(
        self,
        url: str,
        *,
        index: Index,
        call: topics.OnIndexThread,
        timings: Timings = Timings(),
    ) -> None:
        """Prepare; `start` connects.

        ``call`` runs a callable on the thread that writes the index and waits for it.
        """
        self.url = url
        self.index = index
        self.call = call
        self.timings = timings
        self.connected = False
        self.last_seen: dict[str, float] = {}  # worker -> monotonic
        self.instances: dict[str, set[str]] = {}  # worker -> who answered for it last
        self._followers: dict[str, _Follower] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._complaints: set[str] = set()  # logged since it connected
        self._main: asyncio.Task[None] | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="kv-nats-source", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Connect, and go on trying as long as it takes."""
        self._thread.start()

    def close(self) -> None:
        """Disconnect and end the thread."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._cancel)
            self._thread.join(timeout=5)

    def listeners(self) -> list[ListenerStats]:
        """The accounts of all streams."""
        return [
            stream.stats
            for follower in list(self._followers.values())
            for stream in list(follower.streams.values())
        ]

    def forget(self, worker: str) -> None:
        """Follow this worker no more, until it answers again. Any thread."""
        self._loop.call_soon_threadsafe(self._forget, worker)

    def complain(self, what: str, error: BaseException) -> None:
        """Log each kind of trouble once for a connection."""
        complaint = f"{what}: {type(error).__name__}: {error}"
        if complaint not in self._complaints:
            self._complaints.add(complaint)
            log.warning("reading KV events from NATS: %s", complaint)

    def _cancel(self) -> None:
        if self._main is not None:
            self._main.cancel()

    def _forget(self, worker: str) -> None:
        self._followers.pop(worker, None)
        self.last_seen.pop(worker, None)
        self.instances.pop(worker, None)
        task = self._tasks.pop(worker, None)
        if task is not None:
            task.cancel()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._main = self._loop.create_task(self._stay(), name="kv-nats-source")
        with contextlib.suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._main)
        self._loop.close()

    async def _stay(self) -> None:
        await stay_connected(
            self.url,
            "llm-worker-kv-source",
            self._live,
            failed=lambda error: self.complain("connection", error),
            ended=self._ended,
        )

    async def _ended(self, error: Exception) -> None:
        if isinstance(error, TROUBLE):
            self.complain("connection", error)
        else:  # a bug of ours, or of the client's
            log.exception("reading KV events from NATS broke; it starts again")
        marks = (follower.disconnected() for follower in self._followers.values())
        # Where the index's thread is busy for too long they come all the same, only later.
        await asyncio.gather(*marks, return_exceptions=True)

    async def _live(self, client: Client) -> None:
        """Follow all workers over one connection."""
        self.connected = True
        self._complaints.clear()
        try:
            while True:
                try:
                    await self._discover(client)
                except TROUBLE as error:
                    if client.is_closed:
                        raise
                    self.complain("looking for streams", error)
                await asyncio.sleep(self.timings.discover_seconds)
        finally:
            self.connected = False
            tasks, self._tasks = self._tasks, {}
            await cancelled(tasks.values())

    async def _discover(self, client: Client) -> None:
        """Follow workers that have a stream and answer."""
        stream = client.jetstream(timeout=REQUEST_SECONDS)
        offset = 0
        while page := await stream.streams_info(offset):
            offset += len(page)
            for found in page:
                name = found.config.name or ""
                if not name.startswith(nats_plane.STREAM_PREFIX):
                    continue
                worker = topics.from_token(name.removeprefix(nats_plane.STREAM_PREFIX))
                if worker is None:  # somebody else's
                    continue
                task = self._tasks.get(worker)
                if task is None and await request(client, worker, b"status"):
                    follower = self._followers.get(worker)
                    if follower is None:
                        follower = self._followers[worker] = _Follower(self, worker)
                    self._tasks[worker] = asyncio.create_task(follower.follow(client), name=worker)
                elif task is not None and task.done():
                    error = None if task.cancelled() else task.exception()
                    log.error("following %s ended: %r", worker, error)
                    self._forget(worker)
            if len(page) < 256:  # the server's page
                break


async def request(
    client: Client, worker: str, what: bytes, *, quiet_seconds: float = REQUEST_SECONDS
) -> list[_Piece] | None:
    """All pieces of the answer to ``snapshot`` or ``status``; None: nobody answers to the end.

    Of a snapshot only the pieces of the first who answers: two that share a name both do.
    """
    inbox = client.new_inbox()
    subscription = await client.subscribe(inbox)
    pieces: list[_Piece] = []
    ended = False
    try:
        await client.publish(nats_plane.request_subject(worker), what, reply=inbox)
        while True:
            try:
                message = await subscription.next_msg(0.1 if ended else quiet_seconds)
            except nats.errors.TimeoutError:
                return pieces if ended else None
            headers = message.headers or {}
            if headers.get("Status"):  # no responders
                return None
            instance = headers.get(nats_plane.INSTANCE_HEADER, "")
            if what == b"snapshot" and pieces and instance != pieces[0].instance:
                continue
            end = headers.get(nats_plane.END_HEADER)
            if end == "failed":
                return None
            if end:
                if what == b"snapshot":
                    return pieces
                ended = True  # of one; another may follow
                continue
            name = topics.parse_topic(headers.get(nats_plane.TOPIC_HEADER, "").encode())
            sequence = _number(headers.get(nats_plane.SEQUENCE_HEADER))
            position = _number(headers.get(nats_plane.POSITION_HEADER, "0"))
            if name is not None and sequence is not None and position is not None:
                pieces.append(_Piece(*name, sequence, position, instance, message.data))
    finally:
        with contextlib.suppress(*TROUBLE):  # the connection is gone: nothing comes any more
            await subscription.unsubscribe()


class _Follower:
    """One worker's stream, read in order; over one connection after the other."""

    _client: Client  # the present connection's

    def __init__(self, owner: NatsReader, worker: str) -> None:
        self.streams: dict[int, Stream] = {}
        self._owner = owner
        self._timings = owner.timings
        self._worker = worker
        self._synchronised = False  # it has begun: from here on the place counts
        self._place = 0  # of the last message read
        self._alone = False  # the worker answers, and is one
        self._created: datetime | None = None  # the stream
        # rank -> the number that it waits for though it was sent, and since when (monotonic)
        self._behind: dict[int, tuple[int | None, float]] = {}
        self._delivered = 0  # messages, by the present consumer
        self._heard = 0.0  # monotonic
        self._checked = 0.0
        self._snapshot_after = 0.0
        self._waiting: dict[int, tuple[ReplayRequest, float]] = {}  # rank -> for what is late, when

    async def follow(self, client: Client) -> None:
        """Read as long as the connection lasts, from where the last one's reading ended."""
        self._client = client
        self._checked = 0.0
        self._alone = False
        self._behind.clear()
        self._waiting.clear()
        for each in self.streams.values():
            each.stats.reconnects += 1
        stream = client.jetstream(timeout=REQUEST_SECONDS)
        while not client.is_closed:
            try:
                if not self._synchronised:
                    begun = any(each.request is not None for each in self.streams.values())
                    if begun or not await self._take_snapshot():
                        await self._from_the_beginning(stream)
                    self._synchronised = True
                await self._read(stream)
            except (_LostPlaceError, *TROUBLE) as error:
                if not (client.is_closed or isinstance(error, _LostPlaceError)):
                    self._owner.complain(f"worker {self._worker}", error)
                await asyncio.sleep(0.2)

    async def disconnected(self) -> None:
        """The server is gone; what the worker does meanwhile is not known."""

        def mark() -> None:
            for stream in self.streams.values():
                stream.answers(False)

        await self._call(mark)

    async def _call(self, ask: Callable[[], None]) -> None:
        await asyncio.to_thread(self._owner.call, ask)

    def _stream(self, rank: int) -> Stream:
        """On the index's thread: making one marks its source."""
        stream = self.streams.get(rank)
        if stream is None:
            stats = ListenerStats(self._worker, rank)
            source = self._owner.index.source(self._worker, rank)
            stream = self.streams[rank] = Stream(source, stats, epochs=True)
            stats.connected = True
        return stream

    # --- where to begin ---------------------------------------------------------------------------

    async def _take_snapshot(self) -> bool:
        """Have all ranks as the worker has them now; whether it told."""
        pieces = await request(
            self._client, self._worker, b"snapshot", quiet_seconds=self._timings.snapshot_seconds
        )
        if not pieces:
            return False

        def take() -> None:
            for rank in dict.fromkeys(piece.rank for piece in pieces):
                stream = self._stream(rank)
                if stream.request is None:
                    stream.check_stale()
                if stream.request is None or stream.request.start is not None:
                    continue  # true as it is, or waiting for something else
                try:
                    for piece in pieces:
                        if piece.rank == rank:
                            stream.replayed(piece.sequence, piece.payload)
                    stream.replay_ended()
                except Exception:
                    _broke(stream)
                    _give_up(stream)

        await self._call(take)
        if not self._place:
            self._place = pieces[0].position
        return True

    async def _from_the_beginning(self, stream: JetStreamContext) -> None:
        """Have what the server still has: the stream from its first message on."""
        state = (await stream.stream_info(nats_plane.stream_name(self._worker), ">")).state

        def begin() -> None:
            for name in state.subjects or {}:
                rank = _number(name.rpartition(".")[2])
                if rank is not None:
                    self._stream(rank).connected()

        await self._call(begin)
        self._place = 0
        async with self._consumer(stream) as consumer:
            while self._place < state.last_seq:
                await self._feed(await self._fetch(consumer), replayed=True)

        def end() -> None:
            for each in self.streams.values():
                each.replay_ended()

        await self._call(end)

    # --- reading on -------------------------------------------------------------------------------

    async def _read(self, stream: JetStreamContext) -> None:
        async with self._consumer(stream) as consumer:
            while True:
                await self._feed(await self._fetch(consumer))
                now = time.monotonic()
                await self._answer_asks(now)
                if now - self._checked > self._timings.status_seconds:
                    self._checked = now
                    await self._check_status()

    @asynccontextmanager
    async def _consumer(self, stream: JetStreamContext) -> AsyncIterator[Subscription]:
        """What the server pushes from right behind our place. It forgets us by itself."""
        name = nats_plane.stream_name(self._worker)
        found = await stream.stream_info(name)
        if self._created not in (None, found.created) or found.state.last_seq < self._place:
            self._place = 0  # another stream than the one we knew; the sequences will tell
        self._created = found.created
        inbox = self._client.new_inbox()
        subscription = await self._client.subscribe(inbox)
        try:
            await stream.add_consumer(
                name,
                ConsumerConfig(
                    deliver_subject=inbox,
                    deliver_policy=DeliverPolicy.BY_START_SEQUENCE,
                    opt_start_seq=self._place + 1,
                    ack_policy=AckPolicy.NONE,
                    flow_control=True,
                    idle_heartbeat=self._timings.heartbeat_seconds,
                    mem_storage=True,
                    num_replicas=1,
                ),
            )
            self._delivered = 0
            self._heard = time.monotonic()
            yield subscription
        finally:
            with contextlib.suppress(*TROUBLE):
                await subscription.unsubscribe()

    async def _fetch(self, consumer: Subscription) -> list[Msg]:
        """Messages in order: all that are here, or none for a while.

        Raises:
            _LostPlaceError: one is missing, or the consumer is gone.
        """
        messages: list[Msg] = []
        while not messages or (
            consumer.pending_msgs and len(messages) < self._timings.fetch_messages
        ):
            try:
                message = await consumer.next_msg(self._timings.fetch_seconds)
            except TimeoutError:
                if time.monotonic() - self._heard > 3 * self._timings.heartbeat_seconds:
                    raise _LostPlaceError from None
                break
            self._heard = time.monotonic()
            headers = message.headers or {}
            if headers.get("Status"):  # a heartbeat, or the server asks whether we keep up
                reply = message.reply or headers.get("Nats-Consumer-Stalled")
                if reply:
                    await self._client.publish(reply)
                last = _number(headers.get("Nats-Last-Consumer"))
                if last is not None and last != self._delivered:
                    raise _LostPlaceError
                continue
            place = message.metadata.sequence
            if place.consumer != self._delivered + 1:
                raise _LostPlaceError
            self._delivered = place.consumer
            messages.append(message)
        return messages

    async def _feed(self, messages: list[Msg], *, replayed: bool = False) -> None:
        batches: dict[int, list[tuple[bytes, bytes]]] = {}
        for message in messages:
            self._place = message.metadata.sequence.stream
            sequence = _number((message.headers or {}).get("Nats-Msg-Id", "").rpartition("/")[2])
            rank = _number(message.subject.rpartition(".")[2])
            if sequence is not None and rank is not None:
                pair = (sequence.to_bytes(8, "big"), message.data)
                batches.setdefault(rank, []).append(pair)

        def feed() -> None:
            for rank, pairs in batches.items():
                _feed(self._stream(rank), pairs, replayed=replayed)

        if batches:
            await self._call(feed)

    async def _answer_asks(self, now: float) -> None:
        """Something is missing: it comes late, or a snapshot has it, or it is lost."""
        overdue: list[Stream] = []
        for rank, stream in list(self.streams.items()):
            request = stream.request
            if request is None:
                self._waiting.pop(rank, None)
                continue
            known = self._waiting.setdefault(rank, (request, now))
            if now - known[1] >= self._timings.late_seconds:
                del self._waiting[rank]
                overdue.append(stream)

        def give_up() -> None:
            for stream in overdue:
                _give_up(stream)

        if overdue:
            await self._call(give_up)
        if not self._alone or now < self._snapshot_after:
            return

        def doubt() -> None:
            for stream in self.streams.values():
                if stream.request is None:
                    stream.check_stale()

        if any(stream.source.stale for stream in self.streams.values()):
            await self._call(doubt)
        if any(stream.request and stream.request.start is None for stream in self.streams.values()):
            self._snapshot_after = now + self._timings.snapshot_pause_seconds
            await self._take_snapshot()

    async def _check_status(self) -> None:
        """Whether the worker is there, one, and trusts its own index."""
        owner = self._owner
        answer = await request(self._client, self._worker, b"status")
        statuses: dict[int, topics.Status] = {}
        sequences: dict[int, int] = {}
        instances = set()
        for piece in answer or ():
            try:
                status = topics.decode_status(piece.payload)
            except msgspec.DecodeError as error:
                owner.complain(f"status of {self._worker}", error)
                continue
            statuses[piece.rank] = status
            sequences[piece.rank] = piece.sequence
            instances.add(status.instance)
        self._alone = len(instances) == 1
        if answer is not None:
            owner.last_seen[self._worker] = time.monotonic()
            owner.instances[self._worker] = instances

        def mark() -> None:
            for rank in statuses:
                self._stream(rank)
            for rank, stream in self.streams.items():
                stream.answers(answer is not None)
                if len(instances) > 1:  # until a snapshot of one
                    stream.source.trust.name_shared()
                if answer is not None:
                    told = statuses.get(rank)
                    stream.source.trust.doubted_upstream(told is None or bool(told.stale))
                    self._check_tail(stream, rank, sequences.get(rank))

        await self._call(mark)

    def _check_tail(self, stream: Stream, rank: int, sequence: int | None) -> None:
        """What was sent last and the server lost, or is too full for: a snapshot has it."""
        waits = stream.next
        if sequence is None or stream.request is not None or not _is_behind(stream, sequence):
            self._behind.pop(rank, None)
            return
        now = time.monotonic()
        known, since = self._behind.get(rank, (None, now))
        if known != waits or rank not in self._behind:
            self._behind[rank] = (waits, now)
        elif now - since > self._timings.tail_seconds:
            del self._behind[rank]
            stream.source.trust.gap_opened()


def _feed(stream: Stream, pairs: Sequence[tuple[bytes, bytes]], *, replayed: bool) -> None:
    """Give batches to the stream; what breaks one costs that one."""
    while pairs:
        try:
            if not replayed:
                stream.live(pairs, time.time())
                return
            (frame, payload), pairs = pairs[0], pairs[1:]
            stream.replayed(int.from_bytes(frame, "big"), payload)
        except Exception:
            skipped = _broke(stream)
            if not replayed:
                done = stream.next or 0
                left = [pair for pair in pairs if int.from_bytes(pair[0], "big") >= done]
                pairs = left if skipped else []  # those will be missed


def _broke(stream: Stream) -> bool:
    """Count what broke the index or the account, and leave out its batch, if there was one."""
    stream.stats.crashes += 1
    # Every one of a stream that always breaks would fill the disk.
    if stream.stats.crashes & (stream.stats.crashes - 1) == 0:
        log.exception("KV events of %s broke their reader; it goes on", stream.stats.worker)
    skipped = stream.skip()
    stream.source.trust.not_understood()
    return skipped


def _give_up(stream: Stream) -> None:
    """End what the stream waits for, and what it waits for then: nobody else can be asked."""
    try:
        while (request := stream.request) is not None:
            stream.give_up("unavailable" if request.start is None else "aged_out")
    except Exception:
        _broke(stream)


def _is_behind(stream: Stream, sequence: int) -> bool:
    """Whether the worker has sent more than was read."""
    if stream.next is None:
        return sequence & topics.COUNTER_MASK != topics.COUNTER_MASK  # just before its first
    return sequence >= stream.next


def _number(text: str | None) -> int | None:
    """What others wrote, if it is an unsigned number of 64 bits."""
    if not text or len(text) > 20 or not (text.isascii() and text.isdecimal()):
        return None
    number = int(text)
    return number if number < 1 << 64 else None
