"""One thread for all KV events of a process: listeners → index → outlets.

Owns the thread "kv", everything that runs on it, and the order in which it stops. What breaks one
batch costs that batch, what breaks a listener costs it a reconnect, and what breaks the thread has
it started again: each is counted and logged, and none reaches who serves. Other threads hand over
callables and never touch a listener.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

import zmq

from llm_worker.kv.follow.listener import Listener
from llm_worker.kv.follow.merge import ENGINE, MergedRank
from llm_worker.kv.follow.writer import Outlet as StreamOutlet
from llm_worker.kv.index.index import Index
from llm_worker.kv.index.source import Source
from llm_worker.kv.stats import ListenerStats, MergeStats, PlaneStats

log = logging.getLogger(__name__)

T = TypeVar("T")

CLOSE_SECONDS = 5.0
CALL_SECONDS = 10.0
BACKOFF_SECONDS, BACKOFF_MAX_SECONDS = 0.1, 5.0
IDLE_SECONDS = 1.0  # at the latest the thread looks whether it is still wanted
# When batches come faster than this, they are let come together: a turn for two of them costs five
# times as much as two in a turn for fifty.
BUSY_SECONDS = 0.0005
GATHER_SECONDS = 0.001


class Outlet(StreamOutlet, Protocol):
    """A plane: where records go after they were indexed."""

    stats: PlaneStats

    def close(self) -> None:
        """Flush what is buffered, within a bound, and let go."""


class SecondWriterError(RuntimeError):
    """Two publishers would write one source. Handled by whoever listens: forget the first, or name
    the second otherwise.
    """

    def __init__(self, worker: str, rank: int, first: str, second: str) -> None:
        super().__init__(
            f"rank {rank} of {worker!r} is followed at {first} already, and not at {second}: "
            "forget that one, or give this one another name"
        )
        self.worker = worker
        self.rank = rank


class Pipeline:
    """Listeners of one process, the index that they write, and the outlets behind it."""

    def __init__(self, index: Index, *, context: zmq.Context[Any] | None = None) -> None:
        self.index = index
        self.listeners: list[Listener] = []
        self.outlets: list[Outlet] = []
        self.merged: dict[tuple[str, int], MergedRank] = {}  # by worker and rank
        self.crashes = 0  # of the thread
        self._context = context if context is not None else zmq.Context.instance()
        self._commands: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = (
            queue.SimpleQueue()
        )
        self._wakened, self._waker = socket.socketpair()
        self._wakened.setblocking(False)
        self._waker.setblocking(False)
        self._poller = zmq.Poller()
        self._stopping = False
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="kv", daemon=True)

    def add_outlet(self, outlet: Outlet) -> None:
        """Send what is indexed there, too; before `start`."""
        self.outlets.append(outlet)

    def listen(
        self,
        endpoint: str,
        replay_endpoint: str | None,
        *,
        worker: str,
        rank: int,
        topic: str = "",
        epochs: bool = False,
        block_size: int | None = None,
        part: str | None = None,
        checks_rank: bool = True,
    ) -> Listener:
        """Index what this publisher says; any thread, at any time.

        With ``part``, the name of this one, several publishers may speak of one rank, and the index
        has what any of them holds; see `merge`. The account of any but the engine's goes by
        ``worker/part``. ``block_size`` is what the engine says a block is, in tokens. With
        ``checks_rank`` batches of another rank mark the source.

        Raises:
            SecondWriterError: somebody is listened to for that already.
            TimeoutError: as of `on_index_thread`; it is not listened to.
            zmq.ZMQError: as of `Listener.open`; it is not listened to.
        """

        def make() -> Listener:
            whole = self.index.source(worker, rank)
            stats = ListenerStats(worker, rank, part=None if part == ENGINE else part)
            for other in self.listeners:
                if (other.worker, other.rank, other.stats.part) == (worker, rank, stats.part):
                    raise SecondWriterError(worker, rank, other.endpoint, endpoint)
            if part is None and whole.blocks():
                whole.clear()  # what another publisher has said before is not this one's
            if block_size is not None:
                whole.block_size = block_size
            listener = Listener(
                endpoint,
                replay_endpoint,
                worker=worker,
                rank=rank,
                source=whole if part is None else self._merged(whole).part(part),
                stats=stats,
                topic=topic,
                epochs=epochs,
                outlets=self.outlets if part is None else (),
                checks_rank=checks_rank and part in (None, ENGINE),
                context=self._context,
            )
            self._add(listener)
            return listener

        # All of it there: making it already marks the source.
        return self.on_index_thread(make)

    def forget(self, listener: Listener) -> None:
        """Listen there no more; its source stays in the index."""
        self.on_index_thread(lambda: self._remove(listener))

    def start(self) -> None:
        """Listen from now on."""
        self._thread.start()

    def close(self) -> None:
        """End the thread, then flush and close the outlets. Safe to call again."""
        if self._closed:
            return
        self._closed = self._stopping = True
        self._wake()
        if self._thread.is_alive():
            self._thread.join(CLOSE_SECONDS)
            if self._thread.is_alive():
                log.error("the KV thread does not end; it is left behind")
                return
        for listener in self.listeners:
            listener.close()
        for outlet in self.outlets:
            try:
                outlet.close()
            except Exception:
                log.exception("a KV plane could not be closed")
        self._wakened.close()
        self._waker.close()

    def merges(self) -> list[MergeStats]:
        """What merging several publishers of one rank kept back."""
        return [merged.consolidator.stats for merged in self.merged.values()]

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def on_index_thread(self, ask: Callable[[], T], /) -> T:
        """Run ``ask`` on the thread that writes the index, between two batches.

        Raises:
            Exception: what ``ask`` raises.
            TimeoutError: the thread did not get to it, and it will not run; or it began, and did
                not come to an end in as long again.
        """
        if not self._thread.is_alive() or threading.current_thread() is self._thread:
            return ask()
        answer: Future[T] = Future()
        self._commands.put((ask, answer))
        self._wake()
        try:
            return answer.result(CALL_SECONDS)
        except TimeoutError:
            if answer.cancel():
                raise
            return answer.result(CALL_SECONDS)

    def clear(self, worker: str, rank: int) -> None:
        """Forget at once what a rank holds: its engine dropped it and will say so later."""

        def clear() -> None:
            for listener in self.listeners:
                if (listener.worker, listener.rank) == (worker, rank):
                    listener.stream.clear(time.time())
                    return
            self.index.source(worker, rank).clear()

        self.on_index_thread(clear)

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # full, so the thread wakes anyway; or closed
            self._waker.send(b"\0")

    def _merged(self, whole: Source) -> MergedRank:
        key = (whole.worker, whole.rank)
        merged = self.merged.get(key)
        if merged is None:
            merged = MergedRank(whole, self.outlets)
            self.merged = {**self.merged, key: merged}
        return merged

    def _add(self, listener: Listener) -> None:
        if self._thread.is_alive():
            listener.open(self._poller)
        # Not before: one that cannot open its sockets would stay here, dead.
        self.listeners = [*self.listeners, listener]

    def _remove(self, listener: Listener) -> None:
        if listener in self.listeners:
            self.listeners = [other for other in self.listeners if other is not listener]
            listener.close()

    def _run(self) -> None:
        backoff = BACKOFF_SECONDS
        while not self._stopping:
            began = time.monotonic()
            try:
                self._loop()
            except Exception:
                self.crashes += 1
                log.exception(
                    "the KV thread broke; it starts again", extra={"crashes": self.crashes}
                )
                self._close_all()
                if time.monotonic() - began > BACKOFF_MAX_SECONDS:
                    backoff = BACKOFF_SECONDS
                time.sleep(backoff)
                backoff = min(2 * backoff, BACKOFF_MAX_SECONDS)
        self._close_all()
        self._obey()

    def _close_all(self) -> None:
        for listener in self.listeners:
            try:
                listener.close()
            except Exception:
                log.exception("a KV listener could not be closed")

    def _loop(self) -> None:
        poller = self._poller = zmq.Poller()
        poller.register(self._wakened.fileno(), zmq.POLLIN)
        for listener in self.listeners:
            listener.open(poller)
        last = 0.0
        while not self._stopping:
            ready: dict[Any, int] = dict(poller.poll(self._patience_ms()))
            if self._wakened.fileno() in ready:
                self._obey()
            for listener in self.listeners:
                self._turn(listener, ready)
            if ready:
                now = time.monotonic()
                if now - last < BUSY_SECONDS:
                    time.sleep(GATHER_SECONDS)
                    now += GATHER_SECONDS
                last = now

    def _patience_ms(self) -> int:
        deadline = min((listener.deadline for listener in self.listeners), default=float("inf"))
        seconds = min(max(0.0, deadline - time.monotonic()), IDLE_SECONDS)
        return int(1000 * seconds + 0.999)

    def _turn(self, listener: Listener, ready: dict[Any, int]) -> None:
        try:
            listener.turn(ready)
        except Exception:
            listener.stats.crashes += 1
            # Every one of a stream that always breaks would fill the disk.
            if listener.stats.crashes & (listener.stats.crashes - 1) == 0:
                log.exception("KV listener of rank %d broke and goes on", listener.rank)
            if not listener.stream.skip():
                listener.close()
                listener.open(self._poller)

    def _obey(self) -> None:
        """Run what other threads asked for."""
        with contextlib.suppress(OSError):
            while self._wakened.recv(4096):
                pass
        while not self._commands.empty():
            ask, answer = self._commands.get()
            if not answer.set_running_or_notify_cancel():
                continue  # who asked does not wait any more
            try:
                answer.set_result(ask())
            except BaseException as error:
                answer.set_exception(error)
