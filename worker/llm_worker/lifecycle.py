"""The worker's state machine.

Owns which state follows which: every change is told on, a log line and a time. It never acts on the
engine; whoever acts, tells it first. Standard library only.
"""

from __future__ import annotations

import enum
import logging
import threading
import time
from collections.abc import Callable

log = logging.getLogger(__name__)


class State(enum.StrEnum):
    """What the worker is doing, in one word."""

    STARTING = "starting"  # the model loads
    WARMING = "warming"  # the engine is up, the API is being built
    READY = "ready"
    DRAINING = "draining"  # asked to stop: finishes what is in flight, takes nothing new
    SLEEPING = "sleeping"
    WAKING = "waking"
    CHECKPOINTING = "checkpointing"
    RESTORING = "restoring"
    DEAD = "dead"  # the engine is gone; this process follows


# A worker that is asked to stop drains, and an engine can die, from anywhere but the end.
FOLLOWERS: dict[State, frozenset[State]] = {
    State.STARTING: frozenset({State.WARMING, State.RESTORING, State.DRAINING, State.DEAD}),
    State.WARMING: frozenset({State.READY, State.DRAINING, State.DEAD}),
    State.READY: frozenset({State.SLEEPING, State.CHECKPOINTING, State.DRAINING, State.DEAD}),
    State.SLEEPING: frozenset({State.WAKING, State.CHECKPOINTING, State.DRAINING, State.DEAD}),
    State.WAKING: frozenset({State.READY, State.SLEEPING, State.DRAINING, State.DEAD}),
    State.CHECKPOINTING: frozenset(
        {State.RESTORING, State.READY, State.SLEEPING, State.DRAINING, State.DEAD}
    ),
    State.RESTORING: frozenset({State.WAKING, State.READY, State.DRAINING, State.DEAD}),
    State.DRAINING: frozenset({State.DEAD}),
    State.DEAD: frozenset(),
}


class InvalidTransition(RuntimeError):  # noqa: N818 - named for what happened
    """A state was asked for that cannot follow the present one. Handled by whoever asked."""

    def __init__(self, present: State, asked: State) -> None:
        super().__init__(f"a worker that is {present.value} cannot become {asked.value}")
        self.present = present
        self.asked = asked


class Lifecycle:
    """The present state of serving; changed on its loop, read from any thread."""

    def __init__(self, on_change: Callable[[Lifecycle], None]) -> None:
        """``on_change`` is called with every state and phase, this first one included."""
        self._on_change = on_change
        self._lock = threading.Lock()
        self.state = State.STARTING
        self.since = time.time()  # Unix seconds at which the present state was entered
        self.phase = ""  # of the start; empty once the worker is up
        self.reason = ""  # why the present state was entered
        on_change(self)

    def enter_phase(self, phase: str) -> None:
        """Name the start-up phase that begins; the empty string ends start-up."""
        self.phase = phase
        self._on_change(self)
        if phase:
            log.info("start-up phase %s", phase, extra={"phase": phase})

    def to(self, state: State, reason: str = "") -> None:
        """Enter ``state``; entering the present one again does nothing.

        Raises:
            InvalidTransition: ``state`` cannot follow the present one.
        """
        with self._lock:
            present = self.state
            if state is present:
                return
            if state not in FOLLOWERS[present]:
                raise InvalidTransition(present, state)
            self.state, self.since, self.reason = state, time.time(), reason
            self._on_change(self)
        log.info(
            "state %s -> %s%s",
            present.value,
            state.value,
            f": {reason}" if reason else "",
            extra={"from_state": present.value, "to_state": state.value, "reason": reason},
        )
