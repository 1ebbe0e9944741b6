"""What a stream is missing, and what it asks its publisher for: states, events, one table.

Theory of operation
-------------------

A stream either *follows*: every batch has the next number and is applied at once. Or it waits for
the answer to a question that it put to the publisher, and then the state says what the question
was. There is one question at a time. Three things lead away from FOLLOWING:

- **Who is it?** With each new connection another process may be at the other end, which numbers
  its batches as the last one did. Where nothing is known yet, all is asked for from the start
  (INITIAL). Otherwise the last batch that was applied is asked for again (RESUME): who has another
  one under its number, or none, is another process. What arrives meanwhile is put aside. The first
  reply tells who it is, and the rest of the answer is what was missed (CATCH_UP).
- **A hole.** A batch came whose predecessors did not (GAP), or another process publishes and its
  first batches did not come (RESTART), or nothing came for a while and the last batch may be lost
  (TAIL). What is missing is asked for; what came behind it is held back. Where numbers do not tell
  who answers, the last batch that was applied is asked for with it, as in RESUME: a successor may
  answer while the old connection is still half open.
- **A mark.** The index of a plane is stale for a reason that a complete state would end: a
  snapshot is asked for (SNAPSHOT). Its pieces replace all blocks.

Every question ends: the answer is complete, or what was missing came by itself, or it is given up
after some attempts, and then the index is marked. A lost connection takes the question back and
leaves the state: the next connection begins anew. `Recovery.on` is the only place where the state
changes. An event that the table does not have in a state is a bug, which it raises. A picture of
the table is in docs/kv-stream.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final


class State(Enum):
    """What the stream waits for."""

    FOLLOWING = "nothing: every batch is applied as it comes"
    INITIAL = "everything that the publisher has, about which nothing is known"
    RESUME = "the last batch once more, to see whether it is the same process"
    CATCH_UP = "the rest of the answer of a publisher that is known by now"
    GAP = "batches that are missing in between"
    RESTART = "the first batches of another process"
    TAIL = "batches that may be missing at the end"
    SNAPSHOT = "the pieces of a snapshot"


class Event(Enum):
    """What happens to it."""

    UNKNOWN = "nothing is known of the process at the other end"
    DOUBT = "it may be another process than before"
    REPLACED = "another process publishes, its first batches are missing"
    RESTARTED = "another process publishes, its first batch is here"
    HOLE = "a batch came whose predecessors did not"
    QUIET = "nothing came for a while"
    MARKED = "a snapshot would end a doubt"
    IDENTIFIED = "the first reply tells who it is"
    HEALED = "what was missing came by itself"
    COMPLETE = "the answer is complete"
    GIVEN_UP = "nobody has it"


# What may happen in any state.
ALWAYS: Final = {
    Event.UNKNOWN: State.INITIAL,
    Event.DOUBT: State.RESUME,
    Event.REPLACED: State.RESTART,
    Event.RESTARTED: State.FOLLOWING,
}
TRANSITIONS: Final = {
    **{(state, event): target for state in State for event, target in ALWAYS.items()},
    (State.FOLLOWING, Event.HOLE): State.GAP,
    (State.FOLLOWING, Event.QUIET): State.TAIL,
    (State.FOLLOWING, Event.MARKED): State.SNAPSHOT,
    (State.INITIAL, Event.IDENTIFIED): State.CATCH_UP,
    (State.INITIAL, Event.COMPLETE): State.FOLLOWING,  # it had published nothing
    (State.INITIAL, Event.GIVEN_UP): State.FOLLOWING,
    (State.RESUME, Event.IDENTIFIED): State.CATCH_UP,
    (State.RESUME, Event.GIVEN_UP): State.FOLLOWING,
    (State.CATCH_UP, Event.COMPLETE): State.FOLLOWING,
    (State.CATCH_UP, Event.GIVEN_UP): State.FOLLOWING,
    (State.GAP, Event.HEALED): State.FOLLOWING,
    (State.GAP, Event.COMPLETE): State.FOLLOWING,
    (State.GAP, Event.GIVEN_UP): State.FOLLOWING,
    (State.RESTART, Event.COMPLETE): State.FOLLOWING,
    (State.RESTART, Event.GIVEN_UP): State.FOLLOWING,
    (State.TAIL, Event.HOLE): State.GAP,
    (State.TAIL, Event.COMPLETE): State.FOLLOWING,
    (State.TAIL, Event.GIVEN_UP): State.FOLLOWING,
    (State.SNAPSHOT, Event.COMPLETE): State.FOLLOWING,
    (State.SNAPSHOT, Event.GIVEN_UP): State.FOLLOWING,
}
UNIDENTIFIED: Final = (State.INITIAL, State.RESUME)  # whose batches arrive is not known

ATTEMPTS = 3  # without progress, before what is missing counts as lost
BACKOFF_SECONDS = (0.0, 0.5, 2.0, 5.0, 15.0, 30.0)


@dataclass(frozen=True, slots=True)
class ReplayRequest:
    """What the listener shall ask the publisher for."""

    number: int  # counts a stream's questions: another number is another question
    start: int | None  # the first sequence wanted; None: a snapshot
    delay_seconds: float  # wait this long first


class Recovery:
    """The state, the present question, and how far asking got."""

    __slots__ = (
        "_asked", "applied", "attempts", "outcome", "reachable", "replies", "request",
        "snapshot_at", "snapshot_understood", "state", "witnessed",
    )  # fmt: skip

    def __init__(self) -> None:
        self.state = State.FOLLOWING
        self.request: ReplayRequest | None = None
        self.reachable = True  # there is a connection: without one nobody is asked
        self.attempts = 0  # in a row, without progress
        self.replies = 0  # to the present question, that bring something new
        self.applied = 0  # of those
        self.witnessed = False  # the last batch that was applied came again, from the same process
        self.outcome = "complete"  # of stats.REPLAY_OUTCOMES
        self.snapshot_at: int | None = None  # the number at which the snapshot's pieces are true
        self.snapshot_understood = True  # no piece of it was dropped
        self._asked = 0

    def on(self, event: Event) -> None:
        """Go where the table says.

        Raises:
            KeyError: it does not: a bug of the stream's.
        """
        self.state = TRANSITIONS[self.state, event]

    def begin(self, event: Event, start: int | None) -> None:
        """Go into a state that waits, and put its question; ``start`` as in `ReplayRequest`."""
        self.on(event)
        self.attempts = 0
        self.outcome = "complete"
        self.ask(start)

    def ask(self, start: int | None, delay_seconds: float = 0.0) -> None:
        """Put a question, or put it again."""
        self.replies = self.applied = 0
        self.witnessed = False
        self.snapshot_at, self.snapshot_understood = None, True
        self._asked += 1
        self.request = ReplayRequest(self._asked, start, delay_seconds) if self.reachable else None

    def end(self, event: Event) -> None:
        """Go into the state that waits for nothing."""
        self.on(event)
        self.request = None

    def disconnected(self) -> None:
        """Nobody can be asked until there is another connection."""
        self.reachable = False
        self.request = None

    def backoff_seconds(self) -> float:
        """Return how long to wait after as many attempts."""
        return BACKOFF_SECONDS[min(self.attempts, len(BACKOFF_SECONDS) - 1)]
