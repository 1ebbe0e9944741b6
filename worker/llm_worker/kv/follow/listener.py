"""One rank's sockets: events in over SUB, what was missed over a DEALER to the publisher's ROUTER.

Receives in bursts, asks for what the `Stream` wants, and tells it what arrived, what failed, and
when the connection came and went. Reconnecting is libzmq's, for ever and with jitter; that it
happened is seen on the SUB socket's monitor. Never parses a payload. All of it runs on one thread.

Bounds: SUB queues `SUB_HIGH_WATER_MARK` messages (libzmq drops what comes beyond, which shows as a
gap), the DEALER as many; one message has at most `MAX_MESSAGE_BYTES`, or libzmq drops the
connection. Behind a gap the stream holds a bounded number of batches and bytes.
Source: vllm/distributed/kv_events.py, ZmqEventPublisher, 0.9.0 to 0.32.0.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from llm_worker.kv.follow.recovery import ReplayRequest
from llm_worker.kv.follow.stream import Stream
from llm_worker.kv.follow.writer import Outlet
from llm_worker.kv.index.source import BlockSink
from llm_worker.kv.plane.transport import END_SEQUENCE, SNAPSHOT
from llm_worker.kv.stats import ListenerStats

log = logging.getLogger(__name__)

SUB_HIGH_WATER_MARK = 100_000  # messages, as vLLM's own side has
MAX_MESSAGE_BYTES = 64 << 20
BURST_MESSAGES = 256
ANSWER_SECONDS = 3.0  # between a question and its answer, the connecting included
SILENCE_SECONDS = 1.0  # between two replies: what comes no more was left out
LATE_SECONDS = 0.3  # how long a gap may heal by itself where nobody can be asked
QUIET_SECONDS = 1.0  # without a batch: ask whether the last one was the last
QUIET_AGAIN_SECONDS = 5.0
STALE_RETRY_SECONDS = 30.0
RECONNECT_MS, RECONNECT_MAX_MS = 100, 5000
HEARTBEAT_MS, HEARTBEAT_TIMEOUT_MS = 10_000, 30_000

_UP = zmq.Event.HANDSHAKE_SUCCEEDED
_DOWN = zmq.Event.DISCONNECTED
_never = float("inf")

Socket = Any  # zmq.Socket, whose type parameter says nothing here


class Listener:
    """One rank of one publisher.

    `open` and everything after it belong to the thread that calls it. `turn` is called when one of
    its sockets is readable, and at `deadline` at the latest.
    """

    def __init__(
        self,
        endpoint: str,
        replay_endpoint: str | None,
        *,
        worker: str,
        rank: int,
        source: BlockSink,
        stats: ListenerStats,
        topic: str = "",
        epochs: bool = False,
        outlets: Sequence[Outlet] = (),
        checks_rank: bool = True,
        context: zmq.Context[Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Both endpoints are connected to; ``*`` in one means this machine.

        ``topic`` is subscribed to as a prefix, and then has to be equal unless it is empty.
        """
        self.endpoint = connectable(endpoint)
        self.replay_endpoint = replay_endpoint and connectable(replay_endpoint)
        self.worker = worker
        self.rank = rank
        self.source = source
        self.stats = stats
        self.stream = Stream(
            source,
            stats,
            replayable=replay_endpoint is not None,
            epochs=epochs,
            outlets=outlets,
            checks_rank=checks_rank,
        )
        self.deadline = 0.0  # monotonic
        self._topic = topic.encode()
        self._epochs = epochs
        self._context = context if context is not None else zmq.Context.instance()
        self._clock = clock
        self._poller: zmq.Poller | None = None
        self._sub: Socket = None
        self._monitor: Socket = None
        self._dealer: Socket = None
        self._asked: ReplayRequest | None = None  # that the DEALER has put, or is about to
        self._answer_by = _never  # answer or ask again by
        self._last_live = _never
        self._stale_retry = _never
        self._careful = False  # this publisher's messages have not always three frames
        self._connections = 0

    def open(self, poller: zmq.Poller) -> None:
        """Make the sockets and connect; never waits.

        Raises:
            zmq.ZMQError: there are no more sockets or file descriptors, or the address is none.
                Nothing is open then.
        """
        self._poller = poller
        sub = self._context.socket(zmq.SUB)
        try:
            sub.setsockopt(zmq.RCVHWM, SUB_HIGH_WATER_MARK)
            _prepare(sub)
            sub.subscribe(self._topic)
            self._monitor = sub.get_monitor_socket(_UP | _DOWN)
            sub.connect(self.endpoint)
        except zmq.ZMQError:
            if self._monitor is not None:
                sub.disable_monitor()
                self._monitor.close(linger=0)
                self._monitor = None
            sub.close(linger=0)
            raise
        self._sub = sub
        poller.register(self._monitor, zmq.POLLIN)
        poller.register(sub, zmq.POLLIN)
        self._stale_retry = self._clock() + STALE_RETRY_SECONDS

    def close(self) -> None:
        """Let go of the sockets; what was not read is lost."""
        self._close_dealer()
        if self._sub is not None:
            # First: once nobody is at the monitor's other end, an event makes libzmq's thread wait
            # there for ever, with the lock that this takes.
            self._sub.disable_monitor()
        for socket in (self._monitor, self._sub):
            if socket is None:
                continue
            if self._poller is not None:
                self._poller.unregister(socket)
            socket.close(linger=0)
        self._sub = self._monitor = None
        if self.stats.connected:
            self.stream.disconnected()

    def turn(self, ready: Mapping[Socket, int]) -> None:
        """Do what there is to do; never waits."""
        if self._sub in ready or self._monitor in ready:
            messages = self._receive()
            # After the receiving: whatever came over a new connection is seen with its event.
            self._watch()
            if messages:
                self._last_live = self._clock()
                self.stream.live(messages, time.time())
        if self._dealer is not None and self._dealer in ready:
            self._read_answer()
        now = self._clock()
        if now >= self.deadline or self.stream.request is not self._asked:
            self._keep_time(now)

    def _receive(self) -> list[tuple[bytes, bytes]]:
        """Up to a burst of sequences and payloads."""
        if self._careful:
            return self._receive_carefully()
        messages: list[tuple[bytes, bytes]] = []
        append, recv, wanted = messages.append, self._sub.recv, self._topic
        now = zmq.NOBLOCK
        for _ in range(BURST_MESSAGES):
            try:
                topic = recv(now)
            except zmq.Again:
                return messages
            try:
                sequence, payload = recv(now), recv(now)
            except zmq.Again:
                break
            if len(sequence) != 8:
                break
            if not wanted or topic == wanted:
                append((sequence, payload))
        else:
            return messages
        # Asking libzmq after each frame whether it is the last costs more than receiving it. So
        # that is done only for a publisher that gave reason; what is lost here is asked for again.
        self._careful = True
        self._malformed()
        while self._sub.get(zmq.RCVMORE):
            recv(now)
        return messages

    def _receive_carefully(self) -> list[tuple[bytes, bytes]]:
        messages: list[tuple[bytes, bytes]] = []
        for _ in range(BURST_MESSAGES):
            try:
                frames = self._sub.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            if len(frames) != 3 or len(frames[1]) != 8:
                self._malformed()
            elif not self._topic or frames[0] == self._topic:
                messages.append((frames[1], frames[2]))
        return messages

    def _malformed(self) -> None:
        self.stats.undecodable["frames"] += 1
        log.warning(
            "%s: a message that is not [topic, sequence, payload]",
            self.endpoint,
            extra={"worker": self.worker, "rank": self.rank},
        )

    def _watch(self) -> None:
        """What the monitor says of the connection."""
        while True:
            try:
                frames = self._monitor.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            event = parse_monitor_message(frames)["event"]
            if event == _UP:
                self._connections += 1
                self.stats.reconnects = self._connections - 1
                log.info("listening to KV events of rank %d at %s", self.rank, self.endpoint)
                self._last_live = self._clock()
                self.stream.connected()
            elif event == _DOWN:
                log.warning("lost the KV events of rank %d at %s", self.rank, self.endpoint)
                self.stream.disconnected()

    # Questions and answers. Each question has a DEALER of its own, so that a late answer to an
    # earlier one cannot be taken for it.

    def _keep_time(self, now: float) -> None:
        request = self.stream.request
        if request is not self._asked:
            self._close_dealer()
            self._asked = request
            if request is not None:
                # Where nobody can be asked a gap gets a moment to heal by itself.
                wait = request.delay_seconds * random.uniform(0.8, 1.2)  # noqa: S311 - jitter
                self._answer_by = now + (wait if self.replay_endpoint else LATE_SECONDS)
        elif request is not None and now >= self._answer_by:
            self._answer_is_due(now)
        if self.stream.request is None:
            self._ask_by_ourselves(now)
        self._set_deadline()

    def _answer_is_due(self, now: float) -> None:
        if self._dealer is None and self.replay_endpoint is not None:
            self._open_dealer()
            self._answer_by = now + ANSWER_SECONDS
            return
        self._last_live = now + QUIET_AGAIN_SECONDS
        self.stream.replay_failed("timeout" if self.replay_endpoint else "unavailable")

    def _ask_by_ourselves(self, now: float) -> None:
        if now >= self._stale_retry:
            self._stale_retry = now + STALE_RETRY_SECONDS * random.uniform(0.8, 1.2)  # noqa: S311
            self.stream.check_stale()
        if self.stats.connected and now >= self._last_live + QUIET_SECONDS:
            self._last_live = _never
            self.stream.check_tail()

    def _set_deadline(self) -> None:
        if self.stream.request is not self._asked:
            self.deadline = 0.0
        elif self._asked is not None:
            self.deadline = self._answer_by
        else:
            self.deadline = min(self._last_live + QUIET_SECONDS, self._stale_retry)

    def _open_dealer(self) -> None:
        """Put the question; libzmq keeps it until it is connected.

        Never with the option IMMEDIATE. With it libzmq 4.3.5 gives up a connection that breaks
        while a message is half read, and then aborts the process: a publisher that was killed
        would take every listener with it.
        """
        assert self.replay_endpoint is not None
        assert self._poller is not None
        assert self._asked is not None
        dealer = self._context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.RCVHWM, SUB_HIGH_WATER_MARK)
        _prepare(dealer)
        dealer.connect(self.replay_endpoint)
        start = self._asked.start
        frames = [b"", SNAPSHOT if start is None else start.to_bytes(8, "big")]
        if self._epochs and self._topic:
            frames.append(self._topic)  # one of ours: it knows what a topic is
        dealer.send_multipart(frames, zmq.NOBLOCK)
        self._dealer = dealer
        self._poller.register(dealer, zmq.POLLIN)

    def _close_dealer(self) -> None:
        if self._dealer is not None:
            if self._poller is not None:
                self._poller.unregister(self._dealer)
            self._dealer.close(linger=0)
            self._dealer = None
        self._answer_by = _never

    def _read_answer(self) -> None:
        """A burst of replies: ``["", topic, sequence, payload]``, before 0.26 without a topic."""
        asked = self._asked
        for _ in range(BURST_MESSAGES):
            try:
                frames = self._dealer.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._answer_by = self._clock() + SILENCE_SECONDS
            if len(frames) not in (3, 4) or frames[0] or len(frames[-2]) != 8:
                self._malformed()
            elif frames[-2] == END_SEQUENCE:
                self.stream.replay_ended()
            elif not self._topic or len(frames) == 3 or frames[1] == self._topic:
                self.stream.replayed(int.from_bytes(frames[-2], "big"), frames[-1])
            if self.stream.request is not asked:
                return  # answered, or another question by now: the rest is of no use


def connectable(endpoint: str) -> str:
    """An address to connect to from one that was bound: ``*`` is this machine."""
    return (
        endpoint.replace("//*:", "//127.0.0.1:")
        .replace("//0.0.0.0:", "//127.0.0.1:")
        .replace("//[::]:", "//[::1]:")
    )


def _prepare(socket: Socket) -> None:
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.IPV6, 1)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    # libzmq adds jitter: up to one interval.
    socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS)
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
