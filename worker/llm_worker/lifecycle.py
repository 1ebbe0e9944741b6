"""The worker's state machine, and the memory of how its last run ended.

Owns which state follows which and who may know it: every change is a metric, a log line and a time.
It never acts on the engine; whoever acts, tells it first.
"""

from __future__ import annotations

import enum
import json
import logging
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from llm_worker.metrics import EXIT_REASONS, Metrics

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
    """The present state; changed on the serving loop, read from any thread."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._lock = threading.Lock()
        self._state = State.STARTING
        self._since = time.time()
        self._phase = ""
        metrics.set_state(State.STARTING.value)

    @property
    def state(self) -> State:
        """The present state."""
        return self._state

    @property
    def since(self) -> float:
        """Unix time at which the present state was entered."""
        return self._since

    @property
    def phase(self) -> str:
        """The start-up phase that is running; empty once the worker is up."""
        return self._phase

    def enter_phase(self, phase: str) -> None:
        """Name the start-up phase that begins; the empty string ends start-up."""
        self._phase = phase
        if phase:
            log.info("start-up phase %s", phase, extra={"phase": phase})

    def to(self, state: State, reason: str = "") -> None:
        """Enter ``state``; entering the present one again does nothing.

        Raises:
            InvalidTransition: ``state`` cannot follow the present one.
        """
        with self._lock:
            present = self._state
            if state is present:
                return
            if state not in FOLLOWERS[present]:
                raise InvalidTransition(present, state)
            self._state = state
            self._since = time.time()
            self._metrics.set_state(state.value)
        log.info(
            "state %s -> %s%s",
            present.value,
            state.value,
            f": {reason}" if reason else "",
            extra={"from_state": present.value, "to_state": state.value, "reason": reason},
        )


@dataclass(frozen=True, slots=True)
class LastExit:
    """How the previous run of this worker ended."""

    reason: str  # one of EXIT_REASONS; "unclean": killed before it could say
    timestamp: float  # Unix seconds; for "unclean" its last sign of life


class ExitRecord:
    """A run's end, kept in a file so that the next run can tell Prometheus about it.

    An engine that dies takes its worker along within seconds, often between two scrapes. The next
    run, a moment later, still knows. While a run lives, a marker file's modification time is its
    last sign of life: a run that was killed outright leaves it behind.

    Several workers may share the directory: the files carry the host's name and ``key``.
    """

    def __init__(self, directory: Path, key: str) -> None:
        name = f"{socket.gethostname()}-{key}"
        self._exit_file = directory / f"{name}.exit.json"
        self._alive_file = directory / f"{name}.alive"
        self._complained = False

    def begin(self) -> LastExit | None:
        """Read how the last run ended and mark this one as running; None for a first run."""
        last = self._read()
        try:
            last_sign = self._alive_file.stat().st_mtime
        except FileNotFoundError:
            pass
        else:
            last = LastExit("unclean", last_sign)
        self._alive_file.touch()
        return last

    def alive(self) -> None:
        """Give a sign of life. Where it cannot be written, serving goes on without."""
        try:
            self._alive_file.touch()
        except OSError as error:
            self._cannot_write(error)

    def end(self, reason: str) -> None:
        """Write down why this run ends, and take the marker away; if that can be."""
        record = {"reason": reason, "timestamp": time.time()}
        temporary = self._exit_file.with_suffix(".tmp")
        try:
            temporary.write_text(json.dumps(record), encoding="utf-8")
            temporary.replace(self._exit_file)
            self._alive_file.unlink(missing_ok=True)
        except OSError as error:
            self._cannot_write(error)

    def _cannot_write(self, error: OSError) -> None:
        if not self._complained:
            self._complained = True
            log.warning("the next run will not know how this one ended: %s", error)

    def _read(self) -> LastExit | None:
        try:
            record = json.loads(self._exit_file.read_text(encoding="utf-8"))
            last = LastExit(str(record["reason"]), float(record["timestamp"]))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s is unreadable and is ignored: %s", self._exit_file, error)
            return None
        return last if last.reason in EXIT_REASONS else None
