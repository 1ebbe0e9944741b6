"""The life of the observer process: the system server, the KV index, and what they tell.

It can be killed and started again at any time without a request noticing. What it has to know of
serving stands on the board; what it has counted itself stands there, too, before anybody sees it.
"""

from __future__ import annotations

import gc
import logging
import os
import platform
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import msgspec
from prometheus_client import PROCESS_COLLECTOR, CollectorRegistry

from llm_worker import __version__
from llm_worker.errors import EXIT_INTERNAL, EXIT_STOPPED
from llm_worker.exit_record import ExitRecord
from llm_worker.exposition.continuity import Continued, Total
from llm_worker.exposition.exposition import Exposition, Published
from llm_worker.link.board import Board
from llm_worker.link.control import Control
from llm_worker.link.status import KvFacts, Supervision
from llm_worker.metrics import ObserverMetrics
from llm_worker.observer.health import Health
from llm_worker.observer.routes import Handlers, create_app
from llm_worker.observer.server import SystemServer
from llm_worker.settings.worker import Config

if TYPE_CHECKING:
    from prometheus_client import Metric

    from llm_worker.kv.worker import WorkerKv

log = logging.getLogger(__name__)

PAGE_AGE_SECONDS = 5.0  # a page of serving's that is older is not shown
LOOK_SECONDS = 0.1  # for the facts that the KV index starts with
CHECKPOINT_SECONDS = 2.0  # what was counted since is lost with this process
SIGN_OF_LIFE_SECONDS = 5.0
TRUTH_SECONDS = 12.0  # for the engine to tell which KV blocks it holds; serving gives up before
HASH_SECONDS = 30.0
# How long a thread may keep the interpreter while another waits; Python's default is 5 ms. Short,
# so that a probe does not wait for a batch of KV events.
SWITCH_INTERVAL_SECONDS = 0.0005


class PageTooOldError(RuntimeError):
    """Serving has not published for a while. Handled by `exposition`: its families are absent."""


class Observer:
    """Everything that is told about one worker."""

    def __init__(
        self, config: Config, board: int, broker: int, lifeline: int, listener: int
    ) -> None:
        """All but ``config`` are descriptors from the supervisor; see `link`.

        Raises:
            ConfigError: the KV plane's ports are taken, or its client is not installed.
        """
        self._config = config
        self._board = Board(board)
        self._lifeline = lifeline
        sockets = [socket.socket(fileno=descriptor) for descriptor in (broker, listener)]
        for each in sockets:
            each.set_inheritable(False)
        broker_socket, self._listener = sockets
        self._control = Control(broker_socket)
        self._health = Health(self._board)
        self._metrics = ObserverMetrics(CollectorRegistry())
        self._continued = Continued(self._shown_before())
        self._page = (0, Published((), (), ()))  # number on the board, and what it was
        self._complained = False
        self._exposition = Exposition(
            self._metrics,
            config.constant_labels,
            continued=self._continued,
            on_page=self._checkpoint,
        )
        self._exposition.register_published("serving", self._served)
        self._exposition.register("observer", _Fresh(self))
        self._exposition.register(
            "observer_process",
            PROCESS_COLLECTOR,
            add_prefix="llm_worker_observer_",
        )
        port = self._listener.getsockname()[1]
        self._kv = self._make_kv(config, port)
        self._kv_started = self._kv is None
        handlers = Handlers(
            health=self._health,
            exposition=self._exposition,
            version=self._versions,
            engine_info=self._engine_info,
            drain=lambda: os.kill(os.getppid(), signal.SIGTERM),
            kv=None if self._kv is None else self._kv.handlers(),
        )
        self._server = SystemServer(
            create_app(handlers, token=config.token(), open_to_others=config.open_to_others),
            self._listener,
        )
        self._record = ExitRecord(config.state_dir, str(port)) if config.state_dir else None

    def run(self) -> int:
        """Tell until the supervisor lets go of the lifeline; return the exit code."""
        sys.setswitchinterval(SWITCH_INTERVAL_SECONDS)
        self._server.start()
        if self._record is not None:
            threading.Thread(target=self._give_signs, name="signs-of-life", daemon=True).start()
        gc.collect()
        gc.freeze()  # what is here now stays: no full collection looks at it again
        checkpoint = 0.0
        try:
            while not self._let_go(CHECKPOINT_SECONDS if self._kv_started else LOOK_SECONDS):
                if self._server.ended.done():
                    log.error("the system server ended by itself")
                    return EXIT_INTERNAL
                self._start_kv()
                if time.monotonic() >= checkpoint:
                    checkpoint = time.monotonic() + CHECKPOINT_SECONDS
                    self._exposition.render()
        finally:
            if self._kv is not None:
                self._kv.close()
            self._server.close()
            self._control.close()
        return EXIT_STOPPED

    def _let_go(self, seconds: float) -> bool:
        ready, _, _ = select.select([self._lifeline], [], [], seconds)
        return bool(ready)

    # -- KV ------------------------------------------------------------------------------------

    def _make_kv(self, config: Config, port: int) -> WorkerKv | None:
        if config.kv_index is None:
            return None
        from llm_worker.kv.worker import WorkerKv

        kv = WorkerKv(
            config.worker_id or f"{socket.gethostname()}:{port}",
            plane=config.kv_index.plane,
            max_blocks=config.kv_index.max_blocks,
            connector=config.kv_index.connector,
        )
        self._exposition.register("kv", kv.collector(), go_on=True)
        return kv

    def _start_kv(self) -> None:
        """Index the engine's KV blocks once serving has said where they are told."""
        status = self._health.status()
        if self._kv is None or self._kv_started or status is None or status.kv is None:
            return
        from llm_worker.kv.worker import EventSource

        self._kv_started = True
        facts: KvFacts = status.kv
        self._kv.start(
            [EventSource(*source) for source in facts.sources],
            block_size=facts.block_size,
            truth=lambda full: self._control.call("kv_truth", full, seconds=TRUTH_SECONDS),
            hash_blocks=lambda asked, adapter, salt: self._control.call(
                "hash_blocks", asked, adapter, salt, seconds=HASH_SECONDS
            ),
            max_tokens=facts.max_tokens,
        )

    # -- what is told --------------------------------------------------------------------------

    def _served(self) -> Published | None:
        """Serving's families, if they are of now.

        Raises:
            PageTooOldError: they are not.
        """
        written = self._board["page"].read()
        if written is None:
            return None
        if written.age_seconds > PAGE_AGE_SECONDS:
            raise PageTooOldError(f"serving last published {written.age_seconds:.1f} s ago")
        if written.number != self._page[0]:
            self._page = (written.number, _decode_page(written.payload))
        return self._page[1]

    def refresh(self) -> None:
        """Bring the gauges that are read from the board up to date."""
        metrics = self._metrics
        metrics.set_state(self._health.state()[0].value)
        status = self._health.status()
        if status is not None and status.vllm_version:
            metrics.set_build(__version__, status.vllm_version)
        loop_age = self._board.loop_age_seconds
        if loop_age is not None:
            metrics.serving_loop_heartbeat_timestamp_seconds.set(time.time() - loop_age)
        written = self._board["page"].read()
        if written is not None:
            metrics.serving_page_age_seconds.set(written.age_seconds)

    def registry(self) -> CollectorRegistry:
        """Its own metrics."""
        return self._metrics.registry

    def supervision(self) -> Supervision:
        """What the supervisor has done."""
        return Supervision.read(self._board["supervisor"])

    def _shown_before(self) -> list[Total]:
        written = self._board["counters"].read()
        return [] if written is None else _decode_totals(written.payload)

    def _checkpoint(self) -> None:
        """Before a page is handed out: what it shows, a successor goes on from."""
        try:
            self._board["counters"].write(msgspec.msgpack.encode(self._continued.shown()))
        except (
            ValueError
        ) as error:  # more series than it has room for: the page is right all the same
            if not self._complained:
                log.warning("counters will start anew with the next observer: %s", error)
            self._complained = True

    def _versions(self) -> dict[str, Any]:
        status = self._health.status()
        return {
            "llm_worker": __version__,
            "vllm": None if status is None else status.vllm_version or None,
            "python": platform.python_version(),
        }

    def _engine_info(self) -> dict[str, Any] | None:
        status = self._health.status()
        return None if status is None else status.engine

    def _give_signs(self) -> None:
        """Tell the next run until when this one lived. On a thread: a disk may hang."""
        while self._record is not None:
            self._record.alive()
            time.sleep(SIGN_OF_LIFE_SECONDS)


class _Fresh:
    """The observer's own metrics as a source: read from the board at every page."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        metrics = observer._metrics
        last = observer.supervision().last_exit
        if last is not None:
            metrics.last_exit_timestamp_seconds.labels(last["reason"]).set(last["timestamp"])
        metrics.observer_restarts_total.inc(observer.supervision().observer_restarts)

    def collect(self) -> Iterator[Metric]:
        self._observer.refresh()
        yield from self._observer.registry().collect()


_decode_page = msgspec.msgpack.Decoder(Published).decode
_decode_totals = msgspec.msgpack.Decoder(list[Total]).decode
