"""One rank's stream of batches: which is next, which are missing, and whether the index is true.

Batches go in as they arrive, in any order and any number of times; they come out to the index and
to the outlets once each, in the publisher's order. It decides what has to be asked for again
(`ask`) and says why the index cannot be trusted when the answer does not help. Owns no socket,
reads no clock: the listener tells it what arrived and what failed.

Two kinds of numbers. vLLM's start at 0 with each process and nothing says which process. Our
planes' have the start of the process in the high 32 bits (``epochs``) and a counter from 0 below.

A restart and a late duplicate both have a number that was seen before. It is a restart when the
batch is *newer* than the last one applied (vLLM stamps batches when it makes them, so a duplicate
never is), or when the connection broke since and nobody could be asked. After every reconnect the
publisher is asked for the last batch again: the same number with another timestamp, or nothing, is
another process. A wrong verdict costs a replay from the start, never a wrong index. Where nobody
answers, or the publisher's memory begins behind that batch, numbers that go on tell nothing: the
index is marked.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from llm_worker.kv.index.index import Sink
from llm_worker.kv.stats import ListenerStats
from llm_worker.kv.wire import (
    ALL_MEDIA,
    AllBlocksCleared,
    Batch,
    Decoder,
    Event,
    WireError,
    encode,
)

EPOCH_BITS = 32
COUNTER_MASK = (1 << EPOCH_BITS) - 1
CAPACITY_BATCHES = 8192  # held back: about 10 MB of an engine's usual batches
CAPACITY_BYTES = 64 << 20  # of their payloads: a step that computes a long prompt makes 25 kB
ATTEMPTS = 3  # without progress, before what is missing counts as lost
BACKOFF_SECONDS = (0.0, 0.5, 2.0, 5.0, 15.0, 30.0)
# What another complete state of the publisher makes true again.
DATA_REASONS = (
    "unsynchronised", "missed_first", "gap", "undecodable", "duplicate_worker", "audit",
    "other_media",
)  # fmt: skip


class Outlet(Protocol):
    """Where batches go after they were indexed."""

    def publish(
        self, source: Sink, payload: bytes, events: Sequence[Event], timestamp: float
    ) -> None:
        """Take one batch; never blocks and never raises."""


@dataclass(frozen=True, slots=True, eq=False)
class Ask:
    """What the listener shall ask the publisher for; a new object is a new question."""

    start: int | None  # the first sequence wanted; None: a snapshot
    delay_seconds: float  # wait this long first


class _Recovery:
    """One thing that is missing, until it is there or given up."""

    __slots__ = ("applied", "attempts", "kind", "outcome", "replies", "start")

    def __init__(self, kind: str, start: int | None) -> None:
        # initial, resume: the publisher is not known yet, what it sends is put aside;
        # catch_up: it is, and what is missing comes; gap, restart, tail, snapshot.
        self.kind = kind
        self.start = start
        self.attempts = 0  # in a row, without progress
        self.replies = 0  # to the present question
        self.applied = 0  # of those
        self.outcome = "complete"


class Stream:
    """The account of one rank's sequence numbers.

    Args:
        source: The index's side of this rank; written here only.
        replayable: Whether there is anybody to ask.
        epochs: Whether the numbers are our planes'.
        capacity_batches: How many batches are held back behind a gap, and as many while the
            publisher is asked who it is; CAPACITY_BYTES in all. When it is full the newest is
            dropped and counted: it is in the next answer.
    """

    def __init__(
        self,
        source: Sink,
        stats: ListenerStats,
        *,
        replayable: bool = True,
        epochs: bool = False,
        capacity_batches: int = CAPACITY_BATCHES,
        outlets: Sequence[Outlet] = (),
    ) -> None:
        self.source = source
        self.stats = stats
        self.ask: Ask | None = None
        self.next: int | None = None  # the sequence expected; None: not known yet
        self._replayable = replayable
        # Whether a batch that is older than its predecessor is taken for another process's. It
        # is one that was still queued here when its process went, or the clock was set back: asking
        # for it tells.
        self._verifies = replayable and not epochs
        self._epochs = epochs
        self._capacity = capacity_batches
        self._outlets = outlets
        self._decode = Decoder().decode
        self._timestamp = 0.0  # of the last batch applied
        self._held: dict[int, bytes] = {}  # beyond a gap
        self._unverified: list[tuple[int, bytes]] = []  # received before the publisher is known
        self._waiting_bytes = 0  # of both
        self._dropped: int | None = None  # the greatest number for which there was no room
        self._connections = 0
        self._denied_at: int | None = None  # what was `next` when it last had nothing from there on
        self._recovery: _Recovery | None = None
        self._doubtful = False  # reconnected, and nobody could be asked what was missed
        self._lost_for_good = False  # "gap" stands for more than the present recovery
        self._snapshot_due = False
        self._at: int | None = None  # the batch in hand, for `skip`
        stats.queue_capacity_batches = capacity_batches
        source.mark_stale("unsynchronised")

    # What the listener tells.

    def connected(self) -> None:
        """There is a publisher: ask it where it stands."""
        self.stats.connected = True
        self._connections += 1
        self._forget_waiting()
        self._count_queue()
        self._doubtful, self._dropped = False, None
        if self.next is not None and self.next == self._first_of(self.next):
            self.next = None  # it had published nothing
        if self.next is None:
            self._begin("initial", 0)
        else:
            self._begin("resume", self.next - 1)

    def disconnected(self) -> None:
        """The publisher is gone, and with it perhaps the engine."""
        self.stats.connected = False
        self.source.mark_stale("disconnected")
        self.ask = None  # the next connection's first question includes it

    def check_tail(self) -> None:
        """Nothing came for a while: ask whether that is all, as the last batches may be lost."""
        if self._recovery is not None or not self._replayable:
            return
        if self.next is None:  # it had published nothing when it was asked
            self._begin("initial", 0)
        else:
            self._begin("tail", self.next)

    def live(self, messages: Sequence[tuple[bytes, bytes]], wall: float) -> None:
        """Take batches as they were received: pairs of the 8-byte sequence and the payload.

        ``wall`` is the time of day, for the lag.
        """
        done = 0
        if (
            self._recovery is None
            and self.next is not None
            and not self.source.stale
            and not self._doubtful
            and not self._is_unheard()
        ):
            done = self._in_order(messages, wall)
            if done == len(messages):
                return
        for frame, payload in messages[done:]:
            self._arrived(int.from_bytes(frame, "big"), payload, wall)
        self._want_snapshot()
        self._count_queue()

    def replayed(self, sequence: int, payload: bytes) -> None:
        """Take one batch of the answer to the present question."""
        recovery = self._recovery
        if recovery is None:
            return
        recovery.replies += 1
        if recovery.kind == "snapshot":
            self._snapshot(recovery, sequence, payload)
        elif self._known(recovery, sequence, payload):
            self._replay(recovery, sequence, payload)
        self._count_queue()

    def replay_ended(self) -> None:
        """The answer is complete, says the publisher."""
        recovery = self._recovery
        if recovery is None:
            return
        if recovery.kind == "snapshot":
            if recovery.replies:
                self._snapshot_complete(recovery)
            else:
                self._retry(recovery, "unavailable")
        elif recovery.kind == "initial":
            self._synchronised_empty()
        elif recovery.kind == "resume":
            # It does not have the last batch that we have: it is not the process that sent it.
            self._restart(0)
        else:
            self._take_unverified()
            if self._recovery is not recovery:
                pass  # among them was another process's
            elif self._held and (recovery.replies or not recovery.attempts):
                self._retry(recovery, "truncated" if recovery.applied else "aged_out")
            elif self._held and self._is_denied_its_own():
                self.stats.replays["aged_out"] += 1
                self._go_on_without(recovery)
            else:
                self._complete(recovery)
        self._count_queue()

    def replay_failed(self, outcome: str) -> None:
        """No answer, or its end is missing: ``timeout`` or ``unavailable``."""
        recovery = self._recovery
        if recovery is not None:
            self._retry(recovery, "truncated" if recovery.applied else outcome)
        self._count_queue()

    def clear(self, timestamp: float) -> None:
        """The publisher's blocks are gone, and it will say so only later."""
        self.source.clear()
        self._publish_cleared(timestamp)

    def proved(self) -> None:
        """The engine's GPU holds exactly what is held of it here.

        If that is all, there is no reason left for mistrust.
        """
        if self.source.beside_gpu() or "other_media" in self.source.stale:
            self.source.trust("audit")
            return
        self.source.trust(*DATA_REASONS, "index_full")
        self._lost_for_good = self._snapshot_due = False

    def skip(self) -> bool:
        """Go on behind the batch in hand, which broke something; whether there was one."""
        if self._at is None:
            return False
        sequence, self._at = self._at, None
        self.stats.batches_lost += 1
        self._mistrust("undecodable")
        if self.next is not None and sequence >= self.next:
            self.next = sequence + 1
        return True

    # In order: the hot path.

    def _in_order(self, messages: Sequence[tuple[bytes, bytes]], wall: float) -> int:
        """Apply messages as long as each is the next; how many there were."""
        assert self.next is not None
        first = expected = self.next
        decode, apply, source, outlets = self._decode, self.source.apply, self.source, self._outlets
        number = int.from_bytes
        latest = self._timestamp if self._verifies else float("-inf")
        applied: Batch | None = None
        oldest = 0.0
        for frame, payload in messages:
            if number(frame, "big") != expected:
                break
            self._at = expected
            try:
                batch = decode(payload)
            except WireError:
                break
            # Only a part of it was understood; or it is older than its predecessor.
            if type(batch) is not Batch or batch.timestamp < latest:
                break
            if apply(batch.events) and not self._epochs:
                self._mistrust("other_media")
            if expected == first:
                oldest = batch.timestamp
            expected += 1
            if self._verifies:
                latest = batch.timestamp
            if outlets:
                for outlet in outlets:
                    outlet.publish(source, payload, batch.events, batch.timestamp)
            applied = batch
        self._at = None
        if applied is not None:
            self.next = expected
            self.stats.batches_applied += expected - first
            self.stats.lag.observe(max(0.0, wall - oldest), expected - first)
            self._note(expected - 1, applied)
        return expected - first

    # One batch, in any state.

    def _arrived(self, sequence: int, payload: bytes, wall: float) -> None:
        recovery = self._recovery
        if sequence >> 63:
            self.stats.undecodable["frames"] += 1
        elif recovery is not None and recovery.kind in ("initial", "resume"):
            if self._has_room(len(self._unverified), payload):
                self._unverified.append((sequence, payload))
                self._waiting_bytes += len(payload)
            else:
                self._drop(sequence)
        elif self.next is None:
            self._first(sequence, payload, wall)
        elif self._epochs and sequence >> EPOCH_BITS != self.next >> EPOCH_BITS:
            self._other_epoch(sequence, payload)
        elif sequence < self.next:
            self._behind(sequence, payload)
        elif sequence == self.next and (recovery is None or recovery.kind != "snapshot"):
            self._in_turn(sequence, payload, wall)
        else:
            self._ahead(sequence, payload)

    def _in_turn(self, sequence: int, payload: bytes, wall: float) -> None:
        """The very next number; whether it is the publisher's is another question."""
        if self._is_older(payload):
            self.stats.batches_duplicate += 1
            return
        if self._is_unheard():
            self._hold(sequence, payload)
            if self._recovery is None:
                self._begin("gap", sequence)
            return
        if self._doubtful:
            self._doubtful = False
            self._mistrust_identity()
            self.source.trust("disconnected")
        self._apply(sequence, payload, wall)
        self.stats.batches_applied += 1
        if self._held:
            self._drain()
            self._healed_by_itself()

    def _is_older(self, payload: bytes) -> bool:
        """Whether a batch was made before the last one applied, which has a lower number."""
        return self._verifies and self._was_made_before(payload)

    def _is_unheard(self) -> bool:
        """Whether the process had published nothing when it was asked, and another one had before.

        What comes as its first batch may be the other's, still queued here; asking for it tells.
        """
        return self._timestamp == 0.0 and self._connections > 1 and self._verifies

    def _was_made_before(self, payload: bytes) -> bool:
        try:
            return self._decode(payload).timestamp < self._timestamp
        except WireError:
            return False

    def _first(self, sequence: int, payload: bytes, wall: float) -> None:
        """The first batch ever, and nobody could be asked for what was before it."""
        self.next = sequence
        self._missed_start()
        self.source.trust("unsynchronised", "disconnected")
        self._apply(sequence, payload, wall)
        self.stats.batches_applied += 1

    def _missed_start(self) -> None:
        """Count and mark it when the next batch is not its publisher's first."""
        assert self.next is not None
        missed = self.next - self._first_of(self.next)
        if missed:
            self.stats.gaps["initial"] += 1
            self.stats.batches_lost += missed
            self._mistrust("missed_first")

    def _mistrust(self, reason: str) -> None:
        """What is held here may differ from what the publisher holds, until it says all of it."""
        self.source.mark_stale(reason)
        self._snapshot_due = self._epochs

    def _mistrust_identity(self) -> None:
        """The numbers go on where they ended, and whether it is the same process was not told."""
        if not self._epochs:
            self._mistrust("gap")
            self._lost_for_good = True

    def _ahead(self, sequence: int, payload: bytes) -> None:
        """A batch whose predecessors are missing: it waits for them."""
        self._doubtful = False
        self._hold(sequence, payload)
        if self._recovery is None:
            self.stats.gaps["gap"] += 1
            self._begin("gap", self.next)
        elif self._recovery.kind == "tail":
            self.stats.gaps["gap"] += 1
            self._recovery.kind = "gap"

    def _hold(self, sequence: int, payload: bytes) -> None:
        if sequence in self._held:
            self.stats.batches_duplicate += 1
        elif self._has_room(len(self._held), payload):
            self._held[sequence] = payload
            self._waiting_bytes += len(payload)
        else:
            self._drop(sequence)

    def _has_room(self, batches: int, payload: bytes) -> bool:
        return batches < self._capacity and self._waiting_bytes + len(payload) <= CAPACITY_BYTES

    def _drop(self, sequence: int) -> None:
        self.stats.batches_dropped += 1
        self._dropped = sequence if self._dropped is None else max(self._dropped, sequence)

    def _had_dropped(self) -> bool:
        """Whether there was no room for a batch that has not been had since; tells it once."""
        dropped, self._dropped = self._dropped, None
        return dropped is not None and self.next is not None and dropped >= self.next

    def _take(self, sequence: int) -> bytes | None:
        """Let go of a batch that is held back."""
        payload = self._held.pop(sequence, None)
        if payload is not None:
            self._waiting_bytes -= len(payload)
        return payload

    def _behind(self, sequence: int, payload: bytes) -> None:
        """A number that was there before: a late duplicate, or another process."""
        try:
            timestamp = self._decode(payload).timestamp
        except WireError as error:
            self.stats.undecodable[error.reason] += 1
            self._mistrust("undecodable")
            return
        if not self._epochs and (self._doubtful or timestamp > self._timestamp):
            self._restart(sequence, payload)
        else:
            self.stats.batches_duplicate += 1

    def _other_epoch(self, sequence: int, payload: bytes) -> None:
        assert self.next is not None
        if self._doubtful or sequence > self.next:
            self._restart(sequence, payload)
        else:
            self.stats.batches_duplicate += 1
            if not self._was_made_before(payload):
                # Its predecessor still speaks on the same connection: two that share a name.
                self._mistrust("duplicate_worker")

    def _restart(self, sequence: int, payload: bytes | None = None) -> None:
        """Another process publishes: nothing of the last one's is held any more."""
        self.stats.gaps["restart"] += 1
        self._forget_waiting()
        self._doubtful = self._lost_for_good = False
        self.clear(self._timestamp)
        self._timestamp = 0.0
        self.source.trust(*DATA_REASONS, "disconnected")
        if payload is None and self._epochs:
            self.next = None
            self.source.mark_stale("unsynchronised")
            self._begin("initial", 0)
            return
        self.next = self._first_of(sequence)
        if payload is None or sequence != self.next:
            self.source.mark_stale("unsynchronised")
            self._begin("restart", self.next)
        if payload is not None:
            self._arrived(sequence, payload, 0.0)

    def _apply(self, sequence: int, payload: bytes, wall: float = 0.0) -> None:
        """Apply one batch, whatever it is; it is the next one."""
        self._at = sequence
        self.next = sequence + 1
        stats, source = self.stats, self.source
        try:
            batch = self._decode(payload)
        except WireError as error:
            stats.undecodable[error.reason] += 1
            stats.batches_lost += 1
            stats.sequence = sequence
            self._mistrust("undecodable")
            self._at = None
            return
        if source.stale and self._clears(batch.events):
            # Before it is applied: it may give reason for mistrust again.
            source.trust(*DATA_REASONS)
            self._lost_for_good = self._snapshot_due = False
        if source.apply(batch.events) and not self._epochs:
            self._mistrust("other_media")
        if type(batch) is not Batch:
            stats.undecodable.update(batch.rejected)
            stats.unknown_events += batch.unknown
            if batch.rejected:
                self._mistrust("undecodable")
            payload = encode(batch.timestamp, batch.events, batch.rank)
        if wall:
            stats.lag.observe(max(0.0, wall - batch.timestamp))
        self._note(sequence, batch)
        for outlet in self._outlets:
            outlet.publish(source, payload, batch.events, batch.timestamp)
        self._at = None

    def _note(self, sequence: int, batch: Batch) -> None:
        """Remember the last batch applied."""
        self.stats.sequence = sequence
        self.stats.last_batch_timestamp_seconds = batch.timestamp
        self._timestamp = batch.timestamp

    def _clears(self, events: Iterable[Event]) -> bool:
        """Whether the publisher says that it holds nothing any more, on any medium."""
        return any(
            isinstance(event, AllBlocksCleared)
            and (event.medium == ALL_MEDIA or (event.medium is None and self._means_all()))
            for event in events
        )

    def _means_all(self) -> bool:
        """Whether a clear that names no medium is of all: the GPU has all, or a plane says so."""
        return self._epochs or not (self.source.beside_gpu() or "other_media" in self.source.stale)

    def _publish_cleared(self, timestamp: float) -> None:
        if self._outlets:
            events: list[Event] = [AllBlocksCleared()]
            payload = encode(timestamp, events, self.source.rank)
            for outlet in self._outlets:
                outlet.publish(self.source, payload, events, timestamp)

    def _drain(self) -> None:
        """Apply what was held back and has its turn now."""
        while self._held and self.next is not None:
            payload = self._take(self.next)
            if payload is None:
                return
            if self._is_older(payload):
                self.stats.batches_duplicate += 1
                return
            self._apply(self.next, payload)
            self.stats.batches_late += 1

    def _healed_by_itself(self) -> None:
        """What was missing was only late."""
        if self._recovery is not None and self._recovery.kind == "gap" and not self._held:
            self._end()
            if not self._lost_for_good:
                self.source.trust("gap")
            self._ask_for_dropped()

    def _ask_for_dropped(self) -> None:
        if self._had_dropped():
            self.stats.gaps["gap"] += 1
            self._begin("gap", self.next)

    def _first_of(self, sequence: int) -> int:
        """The first number of the process that gave this one."""
        return sequence & ~COUNTER_MASK if self._epochs else 0

    # What is missing.

    def _begin(self, kind: str, start: int | None) -> None:
        self._recovery = _Recovery(kind, start)
        self.ask = Ask(start, 0.0)

    def _known(self, recovery: _Recovery, sequence: int, payload: bytes) -> bool:
        """Tell by the first reply whether the publisher is the one that we know."""
        if recovery.kind == "initial":
            recovery.kind = "catch_up"
            self.next = sequence
            self._missed_start()
            return True
        assert self.next is not None
        if self._epochs and sequence >> EPOCH_BITS != self.next >> EPOCH_BITS:
            self._restart(sequence)
            return False
        if recovery.kind == "resume":
            if sequence == self.next - 1 and self._is_other(payload):
                self._restart(0)
                return False
            if sequence >= self.next and not self._epochs:
                # It does not have the batch that would tell.
                recovery.outcome = "aged_out"
                self._mistrust_identity()
            recovery.kind = "catch_up"
        return True

    def _is_other(self, payload: bytes) -> bool:
        """Whether this is not the batch that was applied last under the same number."""
        if self._epochs:
            return False
        try:
            timestamp = self._decode(payload).timestamp
        except WireError:
            return False  # as undecodable as it was then
        return timestamp != self.stats.last_batch_timestamp_seconds

    def _replay(self, recovery: _Recovery, sequence: int, payload: bytes) -> None:
        assert self.next is not None
        if sequence < self.next:
            return
        if sequence > self.next:
            if recovery.applied or recovery.replies > 1:
                self._hold(sequence, payload)  # a hole in the answer: 0.32 leaves out its middle
                return
            # The publisher's memory begins here.
            recovery.outcome = "aged_out"
            self._give_up_until(sequence)
        if recovery.kind == "tail":
            recovery.kind = "gap"
            self.stats.gaps["gap"] += 1
        recovery.applied += 1
        self._take(sequence)
        self._apply(sequence, payload)
        self.stats.batches_replayed += 1
        self._drain()

    def _give_up_until(self, sequence: int) -> None:
        """What is missing before ``sequence`` cannot be had."""
        assert self.next is not None
        for number in [*sorted(number for number in self._held if number < sequence), sequence]:
            payload = self._take(number) if number < sequence else None
            if payload is not None and self._is_older(payload):
                self.stats.batches_duplicate += 1  # left over from another process
                continue
            if number > self.next:
                at_start = self.next == self._first_of(self.next)
                self.stats.batches_lost += number - self.next
                self._mistrust("missed_first" if at_start else "gap")
                self._lost_for_good = self._lost_for_good or not at_start
                self.next = number
            if payload is not None:
                if self._is_unheard():  # and the publisher has forgotten what it was asked for
                    self._mistrust_identity()
                self._apply(number, payload)
                self.stats.batches_late += 1

    def _retry(self, recovery: _Recovery, outcome: str) -> None:
        """The answer did not do: ask again, or go on without."""
        if recovery.kind != "tail":
            self.stats.replays[outcome] += 1
        if outcome == "truncated":
            recovery.attempts = 0
        else:
            recovery.attempts += 1
            if recovery.kind in ("gap", "restart"):
                self.source.mark_stale("gap")
        exhausted = recovery.attempts >= ATTEMPTS or (recovery.attempts and not self._replayable)
        waiting = self._held or self._unverified or recovery.kind == "snapshot"
        if recovery.kind == "tail":
            self._end()
        elif exhausted and (waiting or not self._replayable):
            self._go_on_without(recovery)
        else:
            recovery.replies = recovery.applied = 0
            if recovery.kind == "snapshot":
                recovery.start = None
            elif recovery.kind not in ("initial", "resume"):
                recovery.start = self.next
            delay = BACKOFF_SECONDS[min(recovery.attempts, len(BACKOFF_SECONDS) - 1)]
            self.ask = Ask(recovery.start, delay)

    def _is_denied_its_own(self) -> bool:
        """The publisher says twice that it has nothing that far; whether what is held is its own.

        The other possibility: an old process's, still queued here when that went. Such batches are
        older than any of its successor's, and are dropped. Where the successor has published
        nothing to compare them with, they are taken for its own only when it is denied again.
        """
        again, self._denied_at = self._denied_at == self.next, self.next
        comparable = self._timestamp > 0 or self._epochs
        for sequence, payload in list(self._held.items()):
            unknown = not (comparable or again or self._connections < 2)
            if unknown or self._is_older(payload):
                self._take(sequence)
                self.stats.batches_duplicate += 1
        return bool(self._held)

    def _go_on_without(self, recovery: _Recovery) -> None:
        """Nobody has what is missing. What came since is applied, and the index is marked."""
        self._end()
        if recovery.kind == "resume":
            self._doubtful = True
        self._take_unverified()
        if self._held and self._recovery is None:
            self._give_up_until(min(self._held))
            self._drain()
        if self._held and self._recovery is None:  # and another hole
            self.stats.gaps["gap"] += 1
            self._begin("gap", self.next)
        elif self._recovery is None and self._had_dropped():
            self._mistrust("gap")
        if self.next is None:  # heard of, and not heard: what it holds is as unknown as before
            self.source.trust("disconnected")
        elif recovery.kind != "resume":
            self.source.trust("unsynchronised", "disconnected")

    def _complete(self, recovery: _Recovery) -> None:
        if recovery.kind != "tail":
            self.stats.replays[recovery.outcome] += 1
        self._end()
        if not self._lost_for_good:
            self.source.trust("gap")
        self.source.trust("unsynchronised", "disconnected")
        self._want_snapshot()
        if self._recovery is None:
            self._ask_for_dropped()

    def _take_unverified(self) -> None:
        """The publisher is known, or never will be: what was put aside has its turn."""
        unverified, self._unverified = self._unverified, []
        self._waiting_bytes -= sum(len(payload) for _, payload in unverified)
        for sequence, payload in unverified:
            self._arrived(sequence, payload, 0.0)

    def _forget_waiting(self) -> None:
        """A new connection or process: begin anew, without what waits.

        That is an old process's or in the present one's memory: which, cannot be told.
        """
        self.stats.batches_dropped += len(self._held) + len(self._unverified)
        self._held.clear()
        self._unverified.clear()
        self._waiting_bytes = 0
        self._end()

    def _count_queue(self) -> None:
        self.stats.queue_batches = len(self._held) + len(self._unverified)

    def _synchronised_empty(self) -> None:
        """The publisher had published nothing when it was asked."""
        self._end()
        if not self._epochs:
            self.next = 0
        self.source.trust("unsynchronised", "disconnected")
        if self._unverified:
            # They came since, or are left from before: ask for them.
            self._forget_waiting()
            self._begin("tail" if self.next is not None else "initial", self.next or 0)

    def _end(self) -> None:
        self._recovery = None
        self.ask = None

    # Snapshots: our planes only.

    def _want_snapshot(self) -> None:
        """Ask for all blocks when the replay was too short."""
        if self._snapshot_due and self._replayable and self._recovery is None:
            self._snapshot_due = False
            self._begin("snapshot", None)

    def check_stale(self) -> None:
        """Try again to make a stale index true; nothing to do for an engine's own stream."""
        source = self.source
        is_due = not source.stale.isdisjoint(DATA_REASONS) or (
            "index_full" in source.stale and source.has_room()
        )
        if self.stats.connected and self._epochs and is_due:
            self._snapshot_due = True
            self._want_snapshot()

    def _snapshot(self, recovery: _Recovery, sequence: int, payload: bytes) -> None:
        """One piece; all have the number at which the snapshot is true."""
        try:
            batch = self._decode(payload)
        except WireError as error:
            self.stats.undecodable[error.reason] += 1
            recovery.outcome = "undecodable"
            return
        if recovery.start is None:
            recovery.start = sequence
            self.clear(batch.timestamp)
        self.source.apply(batch.events)
        for outlet in self._outlets:
            outlet.publish(self.source, payload, batch.events, batch.timestamp)

    def _snapshot_complete(self, recovery: _Recovery) -> None:
        assert recovery.start is not None
        self._end()
        self.stats.replays["complete"] += 1
        self._lost_for_good = False
        self.source.trust(*DATA_REASONS, "disconnected")
        if recovery.outcome == "undecodable":
            self.source.mark_stale("undecodable")
        self.next = recovery.start + 1
        self.stats.sequence = recovery.start
        for sequence in sorted(self._held):
            if sequence < self.next:
                self._take(sequence)
        self._drain()
        if self._held and self._recovery is None:
            self.stats.gaps["gap"] += 1
            self._begin("gap", self.next)
