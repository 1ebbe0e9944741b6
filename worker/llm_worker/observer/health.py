"""Is the worker alive, would it serve a request now, and if not, why.

Owns the verdicts behind ``/live``, ``/ready`` and ``/health``. It looks from outside: at the board,
at the processes themselves and at the kernel's word on them. It asks serving nothing, so a verdict
costs microseconds and is right while serving is stuck, stopped or gone.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Any

from llm_worker.lifecycle import State
from llm_worker.link.board import Board
from llm_worker.link.status import Status
from llm_worker.processes import Watch, stat

# A loop this late would not serve a request now ...
UNREADY_AFTER_SECONDS = 5.0
# ... and one this late never will: restarting is better than waiting.
DEAD_AFTER_SECONDS = 60.0
# Serving's threads beat four times a second. When none has for this long, the kernel is asked why.
MISSED_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """An answer and its reasons."""

    ok: bool
    reasons: tuple[Any, ...] = ()  # the worker's: {"code": ..., "message": ...}; empty when ok


class Health:
    """Everything a probe may ask; callable from any thread."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._began = time.time()
        self._number = 0  # of what was last read from the board
        self._status: Status | None = None
        self._serving: Watch | None = None
        self._engine: list[Watch] = []
        self._lock = threading.Lock()

    def status(self) -> Status | None:
        """What serving last said; None before it said anything."""
        written = self._board["serving"].read()
        with self._lock:
            if written is not None and written.number != self._number:
                status = Status.parse(written.payload)
                self._watch(status)
                self._number, self._status = written.number, status
            return self._status

    def state(self) -> tuple[State, float]:
        """What the worker is doing, and since when (Unix seconds)."""
        status = self.status()
        if status is None:
            return State.STARTING, self._began
        state = State(status.state)
        if self._ended(self._serving) and state is not State.DRAINING:
            state = State.DEAD
        return state, status.since

    def live(self) -> Verdict:
        """Does the process breathe? Loading, draining and a dead engine are all alive.

        What has ended is not a reason to be killed: the worker is already ending itself, tidily.
        """
        age = self._board.loop_age_seconds
        status = self.status()
        if status is None or age is None or age <= DEAD_AFTER_SECONDS:
            return Verdict(ok=True)
        if self._ended(self._serving):
            return Verdict(ok=True)
        return self._silent(status, age, "serving_loop_stuck")

    def ready(self) -> Verdict:
        """Would it serve a request now?"""
        status = self.status()
        state, _ = self.state()
        if status is None:
            return _no("state_starting", "the worker is starting (phase process)")
        if state is State.DEAD and status.state != State.DEAD:
            return _no("serving_dead", "the serving process ended; this worker will exit")
        if state is not State.READY:
            detail = f" (phase {status.phase})" if status.phase else ""
            return _no(f"state_{state.value}", f"the worker is {state.value}{detail}")
        if any(self._ended(process) for process in self._engine):
            return _no("engine_dead", "the engine died; this worker will exit and start again")
        age = self._board.loop_age_seconds
        if age is not None and age > MISSED_SECONDS:
            stopped = (fields := stat(status.pid)) is not None and fields[0] in "Tt"
            if stopped or age > UNREADY_AFTER_SECONDS:
                return self._silent(status, age, "serving_loop_late")
        return Verdict(ok=True)

    def report(self) -> dict[str, Any]:
        """Both verdicts with the state, as JSON-ready values."""
        live, ready = self.live(), self.ready()
        state, since = self.state()
        status = self.status()
        return {
            "live": live.ok,
            "ready": ready.ok,
            "state": state.value,
            "state_seconds": round(max(0.0, time.time() - since), 3),
            "startup_phase": "process" if status is None else status.phase or None,
            "reasons": [*live.reasons, *ready.reasons],
        }

    def _silent(self, status: Status, age: float, code: str) -> Verdict:
        """Why the serving loop has not run for ``age`` seconds."""
        fields = stat(status.pid)
        if fields is not None and fields[0] in "Tt":
            return _no("serving_stopped", f"the serving process is stopped, for {age:.1f} s now")
        thread_age = self._board.thread_age_seconds
        if thread_age is not None and thread_age > MISSED_SECONDS:
            return _no(
                "serving_interpreter_held",
                f"the serving process's interpreter lock is held, for {thread_age:.1f} s now",
            )
        return _no(code, f"the serving loop is blocked; it last answered {age:.1f} s ago")

    def _watch(self, status: Status) -> None:
        if self._serving is None or self._serving.pid != status.pid:
            if self._serving is not None:
                self._serving.close()
            self._serving = Watch(status.pid)
        if [process.pid for process in self._engine] != list(status.engine_pids):
            for process in self._engine:
                process.close()
            self._engine = [Watch(pid) for pid in status.engine_pids]

    @staticmethod
    def _ended(process: Watch | None) -> bool:
        return process is not None and process.ended()


def _no(code: str, message: str) -> Verdict:
    return Verdict(ok=False, reasons=({"code": code, "message": message},))
