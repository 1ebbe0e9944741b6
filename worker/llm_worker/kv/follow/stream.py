"""One rank's stream of batches: which is next, which are missing, and whether the index is true.

Batches go in as they arrive, in any order and any number of times; they come out to the index and
to the outlets once each, in the publisher's order. What has to be asked for again is `request`, and
why the index cannot be trusted goes to the source's `trust` as facts. Owns no socket, reads no
clock: the listener tells it what arrived and what failed.

What a number says of the process behind it is `numbering`'s, what waits is `holdback`'s, and what
is missing, with the states that this goes through, is `recovery`'s: read its theory of operation
first. After every reconnect the publisher is asked for the last batch again. A wrong verdict on who
it is costs a replay from the start, never a wrong index; where nobody can tell, it is marked.
"""

from __future__ import annotations

from collections.abc import Sequence

from llm_worker.kv.follow.holdback import CAPACITY_BATCHES, Holdback
from llm_worker.kv.follow.numbering import EngineNumbers, EpochNumbers, Numbering
from llm_worker.kv.follow.recovery import (
    ATTEMPTS,
    UNIDENTIFIED,
    Event,
    Recovery,
    ReplayRequest,
    State,
)
from llm_worker.kv.follow.writer import Outlet, Writer
from llm_worker.kv.index.index import Sink
from llm_worker.kv.stats import ListenerStats


class Stream:
    """The account of one rank's sequence numbers.

    Args:
        source: The index's side of this rank; written here only.
        replayable: Whether there is anybody to ask.
        epochs: Whether the numbers are our planes'.
        capacity_batches: How many batches are held back; see `Holdback`.
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
        self.next: int | None = None  # the sequence expected; None: not known yet
        self._replayable = replayable
        self._numbers: Numbering = (
            EpochNumbers() if epochs else EngineNumbers(replayable=replayable)
        )
        self._writer = Writer(source, stats, self._numbers, outlets)
        self._holdback = Holdback(stats, capacity_batches)
        self._recovery = Recovery()
        self._connections = 0
        self._denied_at: int | None = None  # what was `next` when it last had nothing from there on
        self._doubtful = False  # reconnected, and nobody could be asked who it is
        source.trust.following()

    @property
    def request(self) -> ReplayRequest | None:
        """What the listener shall ask for now; another object is another question."""
        return self._recovery.request

    # What the listener tells.

    def connected(self) -> None:
        """There is a publisher: ask it where it stands."""
        self.stats.connected = self._recovery.reachable = True
        self._connections += 1
        self.source.trust.connected()
        # What waits is an old process's or in the present one's memory: which, cannot be told.
        self._forget_waiting()
        self._holdback.take_dropped()
        self._doubtful = False
        if self.next is not None and self.next == self._numbers.first_of(self.next):
            self.next = None  # it had published nothing
        self._ask_who()

    def disconnected(self) -> None:
        """The publisher is gone, and with it perhaps the engine."""
        self.stats.connected = False
        self.source.trust.disconnected()
        self._recovery.disconnected()

    def answers(self, whether: bool) -> None:
        """Say whether the publisher is there, where a server keeps and numbers what it publishes.

        Nothing is missed by its absence alone, so nothing is asked.
        """
        self.stats.connected = whether
        if whether:
            self.source.trust.connected()
            self.source.trust.reached()
        else:
            self.source.trust.disconnected()

    def check_tail(self) -> None:
        """Nothing came for a while: ask whether that is all, as the last batches may be lost."""
        if self._recovery.state is not State.FOLLOWING or not self._replayable:
            return
        if self.next is None or self._doubtful:
            self._ask_who()
        else:
            self._recovery.begin(Event.QUIET, self.next)

    def check_stale(self) -> None:
        """Try again to make a stale index true; nothing to do for an engine's own stream."""
        if self.stats.connected:
            self._writer.doubted = True
            self._want_snapshot()

    def live(self, messages: Sequence[tuple[bytes, bytes]], wall: float) -> None:
        """Take batches as they were received: pairs of the 8-byte sequence and the payload.

        ``wall`` is the time of day, for the lag.
        """
        done = 0
        if (
            self._recovery.state is State.FOLLOWING
            and self.next is not None
            and not self.source.stale
            and not self._doubtful
            and not self._is_unheard()
        ):
            done = self._writer.in_order(messages, self.next, wall)
            self.next += done
            if done == len(messages):
                return
        for frame, payload in messages[done:]:
            self._arrived(int.from_bytes(frame, "big"), payload, wall)
        self._want_snapshot()
        self._holdback.count()

    def replayed(self, sequence: int, payload: bytes) -> None:
        """Take one batch of the answer to the present question."""
        recovery = self._recovery
        if recovery.state is State.FOLLOWING:
            return
        recovery.replies += 1
        if recovery.state is State.SNAPSHOT:
            self._snapshot_piece(sequence, payload)
        elif self._is_other_process(sequence, payload):
            self._replaced()
        else:
            if recovery.state in UNIDENTIFIED:
                self._identified(sequence)
            self._take_reply(sequence, payload)
        self._holdback.count()

    def replay_ended(self) -> None:
        """The answer is complete, says the publisher."""
        match self._recovery.state:
            case State.FOLLOWING:
                return
            case State.SNAPSHOT:
                self._snapshot_ended()
            case State.INITIAL:
                self._had_published_nothing()
            case State.RESUME:
                # It does not have the last batch that we have: it is not the process that sent it.
                self._replaced()
            case _:
                self._answered()
        self._holdback.count()

    def replay_failed(self, outcome: str) -> None:
        """No answer, or its end is missing: ``timeout`` or ``unavailable``."""
        if self._recovery.state is not State.FOLLOWING:
            self._retry("truncated" if self._recovery.applied else outcome)
        self._holdback.count()

    def give_up(self, outcome: str) -> None:
        """Nobody has what is asked for, and asking again is of no use: go on without it.

        It may be that something else is missing behind that, which is asked for then.
        """
        if self._recovery.state is not State.FOLLOWING:
            self._count_failure(outcome)
            self._go_on_without()
        self._holdback.count()

    def clear(self, timestamp: float) -> None:
        """The publisher's blocks are gone, and it will say so only later."""
        self._writer.clear(timestamp)

    def audited_equal(self) -> None:
        """The engine's GPU holds exactly what is held of it here."""
        # If that is all, there is no reason left for doubt.
        everything = not (self.source.beside_gpu() or "other_media" in self.source.stale)
        self.source.trust.audited_equal(everything=everything)

    def skip(self) -> bool:
        """Go on behind the batch in hand, which broke something; whether there was one."""
        sequence, self._writer.at = self._writer.at, None
        if sequence is None:
            return False
        self.stats.batches_lost += 1
        self._writer.doubt(self.source.trust.not_understood)
        if self.next is not None and sequence >= self.next:
            self.next = sequence + 1
        return True

    # One batch, in any state.

    def _arrived(self, sequence: int, payload: bytes, wall: float) -> None:
        state, expected = self._recovery.state, self.next
        if not self._numbers.is_possible(sequence):
            self.stats.undecodable["frames"] += 1
        elif state in UNIDENTIFIED or (expected is None and state is State.SNAPSHOT):
            self._holdback.set_aside(sequence, payload)
        elif expected is None:
            self._first(sequence, payload, wall)
        elif sequence < expected or not self._numbers.may_be_one_process(sequence, expected):
            self._out_of_line(sequence, payload)
        elif sequence == expected and state is not State.SNAPSHOT:
            self._in_turn(sequence, payload, wall)
        else:
            self._ahead(sequence, payload)

    def _first(self, sequence: int, payload: bytes, wall: float) -> None:
        """The first batch of a publisher that could not be asked for what was before it."""
        if self._replayable and self._connections > 1 and not self._doubtful:
            # It had published nothing when it was asked, so this may be a dead process's batch that
            # was still queued here. Asking for it tells.
            self._ask_who()
            self._holdback.set_aside(sequence, payload)
            return
        self.next = sequence
        self._count_missed_start()
        self.source.trust.synchronised()
        self._write(sequence, payload, wall)
        self.stats.batches_applied += 1
        self._settle_doubt()

    def _in_turn(self, sequence: int, payload: bytes, wall: float) -> None:
        """The very next number; whether it is the publisher's is another question."""
        if self._writer.is_older(payload):
            self.stats.batches_duplicate += 1
            return
        if self._is_unheard():
            self._holdback.hold(sequence, payload)
            if self._recovery.state is State.FOLLOWING:
                self._recovery.begin(Event.HOLE, sequence)
            return
        self._write(sequence, payload, wall)
        self.stats.batches_applied += 1
        self._settle_doubt()
        if self._holdback.held:
            self._drain()
            self._heal()

    def _ahead(self, sequence: int, payload: bytes) -> None:
        """A batch whose predecessors are missing: it waits for them."""
        self._settle_doubt()
        self._holdback.hold(sequence, payload)
        if self._recovery.state is State.FOLLOWING:
            self._miss()
        elif self._recovery.state is State.TAIL:
            self.stats.gaps["gap"] += 1
            self._recovery.on(Event.HOLE)

    def _out_of_line(self, sequence: int, payload: bytes) -> None:
        """A number that is not to come now: a late duplicate's, or another process's."""
        assert self.next is not None
        writer, numbers = self._writer, self._numbers
        batch = writer.decoded(payload)
        one_process = numbers.may_be_one_process(sequence, self.next)
        if batch is None and one_process:
            writer.doubt(self.source.trust.not_understood)
            return
        newer = batch is not None and batch.timestamp > writer.timestamp
        if numbers.is_restart(sequence, self.next, newer=newer, doubtful=self._doubtful):
            self._restarted(sequence, payload)
            return
        self.stats.batches_duplicate += 1
        if not one_process and (batch is None or batch.timestamp >= writer.timestamp):
            # Its predecessor still speaks on the same connection: two that share a name.
            self._writer.doubt(self.source.trust.name_shared)

    def _is_unheard(self) -> bool:
        """Whether the process had published nothing when it was asked, and another one had before.

        What comes as its first batch may be the other's, still queued here; asking for it tells.
        """
        return self._writer.timestamp == 0.0 and self._connections > 1 and self._numbers.verifies

    def _drain(self) -> None:
        """Apply what was held back and has its turn now."""
        while self.next is not None and (payload := self._holdback.take(self.next)) is not None:
            if self._writer.is_older(payload):
                self.stats.batches_duplicate += 1
                return
            self._write(self.next, payload)
            self.stats.batches_late += 1

    def _write(self, sequence: int, payload: bytes, wall: float = 0.0) -> None:
        self.next = sequence + 1
        self._writer.apply(sequence, payload, wall)

    # Who it is.

    def _ask_who(self) -> None:
        """Ask for the last batch once more, or for everything where there is none."""
        if self.next is None:
            self._recovery.begin(Event.UNKNOWN, 0)
        else:
            self._recovery.begin(Event.DOUBT, self.next - 1)

    def _is_other_process(self, sequence: int, payload: bytes) -> bool:
        """Whether a reply is another process's than the batches so far."""
        if self.next is None:
            return False  # there were none
        if not self._numbers.may_be_one_process(sequence, self.next):
            return True
        if (
            self._recovery.state is not State.RESUME
            or sequence != self.next - 1
            or self._numbers.tell_process
        ):
            return False
        made = self._writer.made(payload)
        # None: as undecodable as it was then.
        return made is not None and made != self.stats.last_batch_timestamp_seconds

    def _identified(self, sequence: int) -> None:
        """The first reply is here, and of the process that we know if we know any."""
        if self.next is None:
            self.next = sequence
            self._count_missed_start()
        elif sequence >= self.next and not self._numbers.tell_process:
            # It does not have the batch that would tell.
            self._recovery.outcome = "aged_out"
            self._writer.doubt(self.source.trust.lost)
        self._recovery.on(Event.IDENTIFIED)

    def _settle_doubt(self) -> None:
        """A batch came after a reconnect, and nobody told whose it is.

        After it was applied: if it was the dead process's, a clear in it proves nothing.
        """
        if self._doubtful:
            self._doubtful = False
            self._doubt_identity()
            self.source.trust.reached()

    def _doubt_identity(self) -> None:
        # A plane's number tells it, but for a batch of the dead process that was still queued.
        if self._replayable or not self._numbers.tell_process:
            self._writer.doubt(self.source.trust.lost)

    def _count_missed_start(self) -> None:
        """Count and mark it when the next batch is not its publisher's first."""
        assert self.next is not None
        missed = self.next - self._numbers.first_of(self.next)
        if missed:
            self.stats.gaps["initial"] += 1
            self.stats.batches_lost += missed
            self._writer.doubt(self.source.trust.missed_first)

    def _replaced(self) -> None:
        """By its answer another process publishes: all of its batches are asked for."""
        self._forget_process()
        self.next = self._numbers.first
        self.source.trust.restarted(from_its_first=False)
        self._recovery.begin(Event.UNKNOWN if self.next is None else Event.REPLACED, 0)

    def _restarted(self, sequence: int, payload: bytes) -> None:
        """By this batch another process publishes."""
        self._forget_process()
        first = self.next = self._numbers.first_of(sequence)
        self.source.trust.restarted(from_its_first=sequence == first)
        if sequence == first:
            self._recovery.end(Event.RESTARTED)
        else:
            self._recovery.begin(Event.REPLACED, first)
        self._arrived(sequence, payload, 0.0)

    def _forget_process(self) -> None:
        """Nothing of the last process's is held any more."""
        self.stats.gaps["restart"] += 1
        self._forget_waiting()
        self._doubtful = False
        self._writer.forget_process()

    def _forget_waiting(self) -> None:
        self._holdback.clear()
        self._holdback.count()

    def _had_published_nothing(self) -> None:
        """The publisher had published nothing when it was asked."""
        self._recovery.end(Event.COMPLETE)
        self.next = self._numbers.first
        self.source.trust.synchronised()
        if len(self._holdback):
            # They came since, or are left from before: ask for them.
            self._forget_waiting()
            if self.next is None:
                self._ask_who()
            else:
                self._recovery.begin(Event.QUIET, self.next)

    # What is missing.

    def _miss(self) -> None:
        """Batches from the next one on are missing."""
        self.stats.gaps["gap"] += 1
        self._recovery.begin(Event.HOLE, self.next)

    def _take_reply(self, sequence: int, payload: bytes) -> None:
        assert self.next is not None
        recovery = self._recovery
        if sequence < self.next:
            return
        if sequence > self.next:
            if recovery.applied or recovery.replies > 1:
                # A hole in the answer: 0.32 leaves out its middle.
                self._holdback.hold(sequence, payload)
                return
            # The publisher's memory begins here.
            recovery.outcome = "aged_out"
            self._give_up_until(sequence)
        if recovery.state is State.TAIL:
            self.stats.gaps["gap"] += 1
            recovery.on(Event.HOLE)
        recovery.applied += 1
        self._holdback.take(sequence)
        self._write(sequence, payload)
        self.stats.batches_replayed += 1
        self._drain()

    def _answered(self) -> None:
        """The answer is at its end. Is what was missing there?"""
        recovery, asked = self._recovery, self._recovery.request
        self._take_unverified()
        if recovery.request is not asked:
            return  # among them was another process's
        if self._holdback.held and (recovery.replies or not recovery.attempts):
            self._retry("truncated" if recovery.applied else "aged_out")
            return
        if self._holdback.held:
            self._drop_left_overs()
        if self._holdback.held:
            self.stats.replays["aged_out"] += 1
            self._go_on_without()
        else:
            self._complete()

    def _drop_left_overs(self) -> None:
        """The publisher says twice that it has nothing that far: drop what is not its own.

        That is an old process's, still queued here when it went. Such batches are older than any of
        its successor's. Where the successor has published nothing to compare them with, they are
        taken for its own only when it is denied again.
        """
        again, self._denied_at = self._denied_at == self.next, self.next
        comparable = self._writer.timestamp > 0 or self._numbers.tell_process
        unknown = not (comparable or again or self._connections < 2)
        for sequence, payload in list(self._holdback.held.items()):
            if unknown or self._writer.is_older(payload):
                self._holdback.take(sequence)
                self.stats.batches_duplicate += 1

    def _complete(self) -> None:
        if self._recovery.state is not State.TAIL:
            self.stats.replays[self._recovery.outcome] += 1
        self._recovery.end(Event.COMPLETE)
        self.source.trust.caught_up()
        self._want_snapshot()
        self._ask_for_dropped()

    def _heal(self) -> None:
        """What was missing was only late."""
        if self._recovery.state is State.GAP and not self._holdback.held:
            self._recovery.end(Event.HEALED)
            self.source.trust.gap_closed()
            self._ask_for_dropped()

    def _ask_for_dropped(self) -> None:
        dropped = self._holdback.take_dropped()
        if self._recovery.state is State.FOLLOWING and self._is_to_come(dropped):
            self._miss()

    def _is_to_come(self, sequence: int | None) -> bool:
        """Whether a batch that was seen is not applied yet."""
        return sequence is not None and self.next is not None and sequence >= self.next

    def _retry(self, outcome: str) -> None:
        """The answer did not do: ask again, or go on without."""
        recovery = self._recovery
        self._count_failure(outcome)
        recovery.attempts = 0 if outcome == "truncated" else recovery.attempts + 1
        exhausted = recovery.attempts >= (ATTEMPTS if self._replayable else 1)
        waiting = len(self._holdback) or recovery.state is State.SNAPSHOT or not self._replayable
        if recovery.state is State.TAIL:
            recovery.end(Event.GIVEN_UP)
        elif exhausted and waiting:
            self._go_on_without()
        elif recovery.state is State.SNAPSHOT:
            recovery.ask(None, recovery.backoff_seconds())
        elif recovery.state is State.INITIAL or self.next is None:
            recovery.ask(0, recovery.backoff_seconds())
        else:
            last = recovery.state is State.RESUME
            recovery.ask(self.next - last, recovery.backoff_seconds())

    def _count_failure(self, outcome: str) -> None:
        if self._recovery.state is not State.TAIL:
            self.stats.replays[outcome] += 1
        if self._recovery.state in (State.GAP, State.RESTART):
            self._writer.doubt(self.source.trust.gap_opened)

    def _go_on_without(self) -> None:
        """Nobody has what is missing. What came since is applied, and the index is marked."""
        recovery, state = self._recovery, self._recovery.state
        recovery.end(Event.GIVEN_UP)
        again = self._replayable and self._connections > 1
        self._doubtful = state is State.RESUME or (state is State.INITIAL and again)
        waiting = len(self._holdback)
        self._take_unverified()
        if self._holdback.held and recovery.state is State.FOLLOWING:
            self._give_up_until(min(self._holdback.held))
            self._drain()
        is_whole = recovery.state is State.FOLLOWING
        if is_whole and self._holdback.held:  # and another hole
            self._miss()
        elif is_whole and self._is_to_come(self._holdback.take_dropped()):
            self._writer.doubt(self.source.trust.gap_opened)
        if self.next is None:  # heard of, and not heard: what it holds is as unknown as before
            self.source.trust.reached()
        elif waiting and is_whole and state in (State.CATCH_UP, State.GAP, State.RESTART):
            self.source.trust.synchronised()

    def _give_up_until(self, sequence: int) -> None:
        """What is missing before ``sequence`` cannot be had."""
        assert self.next is not None
        before = sorted(number for number in self._holdback.held if number < sequence)
        for number in [*before, sequence]:
            payload = self._holdback.take(number) if number < sequence else None
            if payload is not None and self._writer.is_older(payload):
                self.stats.batches_duplicate += 1  # left over from another process
                continue
            if number > self.next:
                self.stats.batches_lost += number - self.next
                at_start = self.next == self._numbers.first_of(self.next)
                trust = self.source.trust
                self._writer.doubt(trust.missed_first if at_start else trust.lost)
                self.next = number
            if payload is not None:
                if self._is_unheard():  # and the publisher has forgotten what it was asked for
                    self._doubt_identity()
                self._write(number, payload)
                self.stats.batches_late += 1

    def _take_unverified(self) -> None:
        """The publisher is known, or never will be: what was put aside has its turn."""
        for sequence, payload in self._holdback.take_unverified():
            self._arrived(sequence, payload, 0.0)

    # Snapshots: our planes only.

    def _want_snapshot(self) -> None:
        """Ask for all blocks where that ends a doubt."""
        if self._writer.doubted and self._recovery.state is State.FOLLOWING:
            self._writer.doubted = False
            trust = self.source.trust
            helps = trust.curable or (trust.refused_blocks and self.source.has_room())
            if helps and self._numbers.has_snapshots and self._replayable:
                self._recovery.begin(Event.MARKED, None)

    def _snapshot_piece(self, sequence: int, payload: bytes) -> None:
        """One piece; all have the number at which the snapshot is true."""
        recovery = self._recovery
        if not self._writer.apply_piece(payload, first=recovery.snapshot_at is None):
            recovery.snapshot_understood = False
        elif recovery.snapshot_at is None:
            recovery.snapshot_at = sequence

    def _snapshot_ended(self) -> None:
        recovery = self._recovery
        if recovery.snapshot_at is None:
            self._retry("unavailable")
            return
        recovery.end(Event.COMPLETE)
        self.stats.replays["complete"] += 1
        self.source.trust.snapshot_ended(understood=recovery.snapshot_understood)
        self._writer.doubted = False
        self.next = recovery.snapshot_at + 1
        self.stats.sequence = recovery.snapshot_at
        for sequence in sorted(self._holdback.held):
            if sequence < self.next:
                self._holdback.take(sequence)
        self._take_unverified()
        self._drain()
        if self._holdback.held and recovery.state is State.FOLLOWING:
            self._miss()
