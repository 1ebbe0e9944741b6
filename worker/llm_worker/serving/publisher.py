"""What serving says of itself, put on the board: metrics, state and a pulse.

Owns the thread "publisher". It beats four times a second, so that who looks from outside can tell a
loop that is stuck (the thread still beats) from an interpreter whose lock is held (it does not),
and renders the metrics about once a second. Whatever goes wrong here is counted and logged, and
reaches nobody who serves.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import replace
from typing import Any

import msgspec

from llm_worker.exposition.exposition import Exposition
from llm_worker.lifecycle import Lifecycle
from llm_worker.link.board import Board
from llm_worker.link.status import Status
from llm_worker.metrics import ServingMetrics

log = logging.getLogger(__name__)

BEAT_SECONDS = 0.25
PAGE_SECONDS = 1.0


class Publisher:
    """Writes to the board until it is closed."""

    def __init__(self, board: Board, pid: int, metrics: ServingMetrics) -> None:
        self._board = board
        self._metrics = metrics
        self._status = Status(pid=pid, state="", since=0.0)  # until `note` says the first one
        self._writing = threading.Lock()
        self._exposition: Exposition | None = None
        self._closing = threading.Event()
        self._complained = False
        self._thread = threading.Thread(target=self._run, name="publisher", daemon=True)
        board.still()

    def start(self, exposition: Exposition) -> None:
        """Beat and publish these metrics from now on."""
        self._exposition = exposition
        self._thread.start()

    def close(self) -> None:
        """Publish once more, what has been counted to the end, and stop."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(BEAT_SECONDS * 4)
        self.publish()

    def note(self, lifecycle: Lifecycle) -> None:
        """Say which state and phase it is; any thread."""
        if lifecycle.state.value != self._status.state:
            self._metrics.state_entered_total.labels(lifecycle.state.value).inc()
        self.say(
            state=lifecycle.state.value,
            since=lifecycle.since,
            phase=lifecycle.phase,
            reason=lifecycle.reason,
        )

    def say(self, **facts: Any) -> None:
        """Change these fields of `link.status.Status`; any thread."""
        with self._writing:
            self._status = replace(self._status, **facts)
            self._status.write(self._board["serving"])

    def publish(self) -> None:
        """Render the metrics and write them to the board."""
        if self._exposition is None:
            return
        began = time.thread_time()
        try:
            payload = msgspec.msgpack.encode(self._exposition.publish())
            with self._writing:
                self._board["page"].write(payload)
        except Exception as error:  # other people's collectors; serving does not depend on them
            self._metrics.page_publish_errors_total.inc()
            if not self._complained:
                log.warning("the metrics of this process cannot be published", exc_info=error)
            self._complained = True
        else:
            self._complained = False
        self._metrics.page_publish_seconds.observe(time.thread_time() - began)

    def _run(self) -> None:
        due = 0.0
        while not self._closing.wait(BEAT_SECONDS):
            self._board.beat_thread()
            if time.monotonic() >= due:
                due = time.monotonic() + PAGE_SECONDS
                self.publish()
