"""The process that starts, watches and ends the two others, and whose exit code is the worker's.

    supervisor ── serving ── engine cores ── their workers
               └─ observer

Nothing in it waits for either: it sleeps until a signal comes or a child ends. It holds what must
outlive a crash of the others: the system server's listening socket, the board, the broker (see
`link`). It is fit to be process 1 of a container: it reaps whatever it inherits.

* Serving ends: so does everything, with serving's exit code, or 70 where a signal ended it.
* The observer ends: it is started again, sooner or later, for ever; no request is touched.
* Asked to stop (SIGTERM, SIGINT): a serving that is up drains; one that is starting has nothing to
  lose and is ended. Asked once more: serving is told to hurry.
* The supervisor is killed: the kernel ends both others, and the engine with them.

Both are process groups of their own, so that a terminal's Ctrl-C and a signal to our process group
arrive here alone. Standard library only, and no thread: there is nothing in it that can crash.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from llm_worker.errors import (
    EXIT_CONFIG,
    EXIT_ENGINE_DIED,
    EXIT_INTERNAL,
    EXIT_START_FAILED,
    EXIT_STOPPED,
    ConfigError,
)
from llm_worker.exit_record import ExitRecord
from llm_worker.lifecycle import State
from llm_worker.link.board import Board
from llm_worker.link.status import HURRY, Status, Supervision
from llm_worker.listening import listen
from llm_worker.processes import (
    adopt_orphans,
    end_descendants,
    mapped_segments,
    remove_segments,
)
from llm_worker.settings.worker import Config

log = logging.getLogger(__name__)

# With lame-duck period and drain all of this stays under compose's stop_grace_period; a test adds
# it up. What serving needs on its way out beside the drain: `serving.app` has the parts.
WAY_OUT_SECONDS = 20.0
GRACE_SECONDS = 2.0  # for what serving left behind, before it is killed; and after
OBSERVER_CLOSE_SECONDS = 5.0  # for the last answers and the KV plane's flush
BACKOFF_SECONDS, BACKOFF_MAX_SECONDS = 0.1, 10.0
STEADY_SECONDS = 30.0  # an observer that ran this long starts again at once

_UP = frozenset({State.READY, State.DRAINING, State.SLEEPING, State.WAKING, State.DEAD})
# Serving's exit code → how the run ended.
_REASONS = {
    EXIT_STOPPED: "stopped",
    EXIT_START_FAILED: "start_failed",
    EXIT_ENGINE_DIED: "engine_dead",
    EXIT_CONFIG: "start_failed",
}


class Supervisor:
    """One worker, from its first process to its exit code."""

    def __init__(
        self, config: Config, arguments: Sequence[str], asked: Callable[[], bool] = lambda: False
    ) -> None:
        """Take the system server's port; start nothing yet.

        ``arguments`` are the command line, which both others read once more. ``asked`` says whether
        a signal to stop came before `run`.

        Raises:
            ConfigError: the port cannot be bound.
        """
        self._config = config
        self._arguments = list(arguments)
        self._asked_before = asked
        try:
            self._listener = listen(config.system_host, config.system_port)
        except OSError as error:
            raise ConfigError(
                [
                    f"the system server cannot listen on {config.system_host}:"
                    f"{config.system_port} ({error.strerror or error}): "
                    "choose another --worker-system-port, or stop what holds it"
                ]
            ) from error
        self._port: int = self._listener.getsockname()[1]
        self._board = Board.create()
        self._broker, self._brokers_other_end = socket.socketpair()
        # Closed by the kernel whatever becomes of us; the observer ends when it is.
        self._lifeline, self._lifelines_other_end = socket.socketpair()
        self._record = ExitRecord(config.state_dir, str(self._port)) if config.state_dir else None
        self._supervision = Supervision()
        self._serving: subprocess.Popen[bytes] | None = None
        self._observer: subprocess.Popen[bytes] | None = None
        self._observer_began = 0.0
        self._observer_due: float | None = None  # time.monotonic() at which it starts again
        self._backoff = BACKOFF_SECONDS
        self._asked = 0
        self._deadline: float | None = None  # time.monotonic() at which serving is ended by force
        self._code: int | None = None  # once it is known how this ends
        self._reason = "internal"

    def run(self) -> int:
        """The life itself: until serving ends, or was asked to."""
        adopt_orphans()
        last = self._record.begin() if self._record is not None else None
        self._supervise(
            last_exit=None if last is None else {"reason": last.reason, "timestamp": last.timestamp}
        )
        log.info("system server on http://%s:%d", self._config.system_host, self._port)
        try:
            with _wakened() as wakened, selectors.DefaultSelector() as selector:
                selector.register(wakened, selectors.EVENT_READ)
                if self._asked_before():
                    self._stop()
                else:
                    self._start_observer()
                    self._start_serving()
                while self._code is None:
                    selector.select(self._patience())
                    self._obey(wakened)
                    self._reap()
                    self._look_at_the_clock()
        finally:
            self._clean_up()
        log.info(
            "exit %d: %s",
            self._code,
            self._reason,
            extra={"exit_code": self._code, "reason": self._reason},
        )
        return self._code

    # -- what can happen -----------------------------------------------------------------------

    def _obey(self, wakened: socket.socket) -> None:
        """React to the signals that came."""
        with contextlib.suppress(BlockingIOError):
            for number in wakened.recv(4096):
                if number in (signal.SIGTERM, signal.SIGINT):
                    self._stop()

    def _stop(self) -> None:
        self._asked += 1
        self._supervise(asked_to_stop=True)
        status = self._status()
        if self._serving is None or status is None or status.state not in _UP:
            log.info("asked to stop during the start")
            self._end(EXIT_STOPPED, "stopped")
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._serving.pid, signal.SIGTERM if self._asked == 1 else HURRY)
        if self._deadline is None:
            seconds = self._config.drain_seconds + self._config.lame_duck_seconds
            self._deadline = time.monotonic() + seconds + WAY_OUT_SECONDS

    def _reap(self) -> None:
        """Take every ended child off the table, and react to our two."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            code = os.waitstatus_to_exitcode(status)
            if self._serving is not None and pid == self._serving.pid:
                self._serving.returncode = code
                self._serving_ended(code)
            elif self._observer is not None and pid == self._observer.pid:
                self._observer.returncode = code
                self._observer_ended(code)

    def _serving_ended(self, code: int) -> None:
        if code >= 0:
            self._end(code, _REASONS.get(code, "internal"))
            return
        name = signal.Signals(-code).name
        status = self._status()
        if self._asked and code == -signal.SIGTERM:
            self._end(EXIT_STOPPED, "stopped")
        elif status is None or status.state not in _UP:
            log.error("serving was ended by %s while it started", name)
            self._end(EXIT_START_FAILED, "start_failed")
        else:
            log.error("serving was ended by %s", name)
            self._end(EXIT_ENGINE_DIED, "serving_died")

    def _observer_ended(self, code: int) -> None:
        self._observer = None
        how = f"exit code {code}" if code >= 0 else f"by {signal.Signals(-code).name}"
        if code == EXIT_CONFIG and not self._supervision.observer_restarts:
            self._end(EXIT_CONFIG, "start_failed")
            return
        ran = time.monotonic() - self._observer_began
        self._backoff = (
            BACKOFF_SECONDS if ran > STEADY_SECONDS else min(2 * self._backoff, BACKOFF_MAX_SECONDS)
        )
        wait = (
            0.0
            if ran > STEADY_SECONDS or not self._supervision.observer_restarts
            else (self._backoff)
        )
        self._observer_due = time.monotonic() + wait
        log.error("the observer ended (%s); it starts again, serving goes on", how)

    def _look_at_the_clock(self) -> None:
        now = time.monotonic()
        if self._observer_due is not None and now >= self._observer_due and self._code is None:
            self._supervise(observer_restarts=self._supervision.observer_restarts + 1)
            self._start_observer()
        if self._deadline is not None and now >= self._deadline and self._code is None:
            log.critical("the way out hangs; ending by force", extra={"exit_code": EXIT_INTERNAL})
            self._end(EXIT_INTERNAL, "internal")

    def _end(self, code: int, reason: str) -> None:
        """How this ends is known; the first to say so is right."""
        if self._code is None:
            self._code, self._reason = code, reason

    # -- what is done --------------------------------------------------------------------------

    def _start_serving(self) -> None:
        descriptors = [self._board.descriptor, self._brokers_other_end.fileno()]
        self._serving = self._start("serving", descriptors)

    def _start_observer(self) -> None:
        self._observer_due = None
        self._observer_began = time.monotonic()
        descriptors = [
            self._board.descriptor,
            self._broker.fileno(),
            self._lifelines_other_end.fileno(),
            self._listener.fileno(),
        ]
        try:
            self._observer = self._start("observer", descriptors)
        except OSError as error:  # no process to be had now: serving goes on without
            self._observer_due = self._observer_began + BACKOFF_MAX_SECONDS
            log.error("the observer cannot be started: %s", error)  # noqa: TRY400

    def _start(self, program: str, descriptors: list[int]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [
                sys.executable, "-m", f"llm_worker.{program}", str(os.getpid()),
                *map(str, descriptors), "--", *self._arguments,
            ],
            stdin=subprocess.DEVNULL,
            pass_fds=descriptors,
            # Not a session: Linux schedules each as one, and an engine whose processes spin would
            # starve the thread of its own that sends tokens, for seconds.
            process_group=0,
        )  # fmt: skip

    def _clean_up(self) -> None:
        """Leave no process, no shared memory and no doubt about why this run ended."""
        segments = mapped_segments()
        status = self._status()
        if status is not None:
            segments.update(Path(path) for path in status.segments)
        if self._serving is not None and self._serving.returncode is None and self._asked:
            # It is starting, or it hangs: in neither case is there anything to wait for.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._serving.pid, signal.SIGKILL)
        observer = [] if self._observer is None else [self._observer.pid]
        end_descendants(GRACE_SECONDS, spare=observer)
        remove_segments(segments)
        if self._record is not None:
            self._record.end(self._reason)
        self._lifeline.close()
        if self._observer is not None:
            try:
                self._observer.wait(OBSERVER_CLOSE_SECONDS)
            except subprocess.TimeoutExpired:
                self._observer.kill()
        end_descendants(GRACE_SECONDS)

    def _supervise(self, **changes: object) -> None:
        self._supervision = replace(self._supervision, **changes)  # type: ignore[arg-type]
        self._supervision.write(self._board["supervisor"])

    def _status(self) -> Status | None:
        return Status.read(self._board["serving"])

    def _patience(self) -> float | None:
        """Seconds until something is due; None: only a signal can wake us."""
        moments = [moment for moment in (self._deadline, self._observer_due) if moment is not None]
        return max(0.0, min(moments) - time.monotonic()) if moments else None


@contextlib.contextmanager
def _wakened() -> Iterator[socket.socket]:
    """A socket that has a byte for every signal that came."""
    here, there = socket.socketpair()
    with here, there:
        for end in (here, there):
            end.setblocking(False)
        before = signal.set_wakeup_fd(there.fileno(), warn_on_full_buffer=False)
        handlers = {
            number: signal.signal(number, _nothing)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)
        }
        try:
            yield here
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(before)


def _nothing(_number: int, _frame: object) -> None:
    """The byte in the socket says it all."""
