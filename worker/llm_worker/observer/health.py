"""Is the worker alive, would it serve a request now, and if not, why.

Owns the verdicts behind ``/live``, ``/ready`` and ``/health``. It asks the state machine, the
serving loop's heartbeat and the engine's processes; it never imports the engine and never sends it
anything, so a verdict costs microseconds and is right while the serving loop is stuck.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from llm_worker.lifecycle import Lifecycle, State
from llm_worker.metrics import Metrics

HEARTBEAT_SECONDS = 0.25
# A loop this late would not serve a request now ...
UNREADY_AFTER_SECONDS = 5.0
# ... and one this late never will: restarting is better than waiting.
DEAD_AFTER_SECONDS = 60.0


class Heartbeat:
    """The serving loop's pulse, and how late each beat came."""

    def __init__(self, metrics: Metrics) -> None:
        self._lag = metrics.serving_loop_lag_seconds
        self._timestamp = metrics.serving_loop_heartbeat_timestamp_seconds
        self._last: float | None = None  # time.monotonic(); None before the loop runs

    @property
    def age(self) -> float | None:
        """Seconds since the last beat; None before the first."""
        last = self._last
        return None if last is None else time.monotonic() - last

    async def run(self) -> None:
        """Beat until cancelled. A timer is the point here: it measures how late the loop is."""
        while True:
            due = time.monotonic() + HEARTBEAT_SECONDS
            self._last = time.monotonic()
            self._timestamp.set_to_current_time()
            await asyncio.sleep(HEARTBEAT_SECONDS)
            self._lag.observe(max(0.0, time.monotonic() - due))


@dataclass(frozen=True, slots=True)
class Verdict:
    """An answer and its reasons."""

    ok: bool
    reasons: tuple[Any, ...] = ()  # the worker's: {"code": ..., "message": ...}; empty when ok


@dataclass(slots=True)
class Health:
    """Everything a probe may ask; callable from any thread."""

    lifecycle: Lifecycle
    heartbeat: Heartbeat
    engine_dead: Callable[[], bool] = field(default=lambda: False)  # set once there is an engine

    def live(self) -> Verdict:
        """Does the process breathe? Loading, draining and a dead engine are all alive.

        A dead engine is not a reason to be killed: the worker is already ending itself, tidily.
        """
        age = self.heartbeat.age
        if age is not None and age > DEAD_AFTER_SECONDS:
            return _no("serving_loop_stuck", f"the serving loop last answered {age:.0f} s ago")
        return Verdict(ok=True)

    def ready(self) -> Verdict:
        """Would it serve a request now?"""
        state = self.lifecycle.state
        if self.engine_dead():
            return _no("engine_dead", "the engine died; this worker will exit and start again")
        if state is not State.READY:
            phase = self.lifecycle.phase
            detail = f" (phase {phase})" if phase else ""
            return _no(f"state_{state.value}", f"the worker is {state.value}{detail}")
        age = self.heartbeat.age
        if age is not None and age > UNREADY_AFTER_SECONDS:
            return _no("serving_loop_late", f"the serving loop last answered {age:.1f} s ago")
        return Verdict(ok=True)

    def report(self) -> dict[str, Any]:
        """Both verdicts with the state, as JSON-ready values."""
        live, ready = self.live(), self.ready()
        return {
            "live": live.ok,
            "ready": ready.ok,
            "state": self.lifecycle.state.value,
            "state_seconds": round(max(0.0, time.time() - self.lifecycle.since), 3),
            "startup_phase": self.lifecycle.phase or None,
            "reasons": [*live.reasons, *ready.reasons],
        }


def _no(code: str, message: str) -> Verdict:
    return Verdict(ok=False, reasons=({"code": code, "message": message},))
