"""One rank's stream of batches: which is next, which are missing, and whether the index is true.

Batches go in as they arrive, in any order and any number of times; they come out to the index and
to the outlets once each, in the publisher's order. What has to be asked for again is `request`, and
why the index cannot be trusted goes to the source's `trust` as facts. Owns no socket, reads no
clock: the listener tells it what arrived and what failed.

What a number says of the process behind it is `numbering`'s, what waits is `holdback`'s, whose turn
it is `order`'s, and what is done with a batch `writer`'s. What is missing, and the states that this
goes through, is `recovery`'s: read its theory of operation first. Here are the answers.

After every reconnect the publisher is asked for the last batch again. A wrong verdict on who it is
costs a replay from the start, never a wrong index; where nobody can tell, it is marked.
"""

from __future__ import annotations

from collections.abc import Sequence

from llm_worker.kv import records
from llm_worker.kv.follow.holdback import CAPACITY_BATCHES
from llm_worker.kv.follow.order import Order
from llm_worker.kv.follow.recovery import (
    ATTEMPTS,
    UNIDENTIFIED,
    Event,
    ReplayRequest,
    State,
)
from llm_worker.kv.follow.writer import Outlet
from llm_worker.kv.index.source import BlockSink
from llm_worker.kv.stats import ListenerStats


class Stream:
    """The account of one rank's sequence numbers.

    Args:
        source: The index's side of this rank; written here only.
        replayable: Whether there is anybody to ask.
        epochs: Whether the numbers are our planes'.
        capacity_batches: How many batches are held back; see `Holdback`.
        checks_rank: Whether batches that say another rank than the source's mark it. Not where it
            is not known which rank publishes.
    """

    def __init__(
        self,
        source: BlockSink,
        stats: ListenerStats,
        *,
        replayable: bool = True,
        epochs: bool = False,
        capacity_batches: int = CAPACITY_BATCHES,
        outlets: Sequence[Outlet] = (),
        checks_rank: bool = True,
    ) -> None:
        self.source = source
        self.stats = stats
        self._replayable = replayable
        self._order = Order(
            source,
            stats,
            replayable=replayable,
            epochs=epochs,
            capacity_batches=capacity_batches,
            outlets=outlets,
            checks_rank=checks_rank,
        )
        self._writer = self._order.writer
        self._holdback = self._order.holdback
        self._recovery = self._order.recovery
        self._numbers = self._order.numbers
        self._denied_at: int | None = None  # what was `next` when it last had nothing from there on
        source.trust.following()

    @property
    def next(self) -> int | None:
        """The sequence that is expected; None: not known yet."""
        return self._order.next

    @property
    def request(self) -> ReplayRequest | None:
        """What the listener shall ask for now; another object is another question."""
        return self._recovery.request

    # What the listener tells.

    def connected(self) -> None:
        """There is a publisher: ask it where it stands."""
        self.stats.connected = self._recovery.reachable = True
        self.source.trust.connected()
        self._order.connected()

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
        if self.next is None or self._order.doubtful:
            self._order.ask_who()
        else:
            self._recovery.begin(Event.QUIET, self._order.start())

    def check_stale(self) -> None:
        """Try again to make a stale index true; nothing to do for an engine's own stream."""
        if self.stats.connected:
            self._writer.doubted = True
            self._want_snapshot()

    def live(self, messages: Sequence[tuple[bytes, bytes]], wall: float) -> None:
        """Take batches as they were received: pairs of the 8-byte sequence and the payload.

        ``wall`` is the time of day, for the lag.
        """
        done, expected = 0, self._order.next
        if (
            self._recovery.state is State.FOLLOWING
            and expected is not None
            and not self.source.stale
            and not self._order.doubtful
            and not self._order.is_unheard()
        ):
            done = self._writer.in_order(messages, expected, wall)
            self._order.next = expected + done
            if done == len(messages):
                return
        for frame, payload in messages[done:]:
            self._order.arrived(int.from_bytes(frame, "big"), payload, wall)
        self._want_snapshot()
        self._holdback.count()

    def replayed(self, sequence: int, payload: bytes) -> None:
        """Take one batch of the answer to the present question."""
        recovery = self._recovery
        if recovery.state is State.FOLLOWING:
            return
        if recovery.state is State.SNAPSHOT:
            self._snapshot_piece(sequence, payload)
        elif self._order.is_other_process(sequence, payload):
            self._order.replaced()
        else:
            if recovery.state in UNIDENTIFIED:
                self._order.identified(sequence)
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
                self._order.replaced()
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

    def mend(self, events: Sequence[records.Event]) -> None:
        """Take over what the engine holds, where batches that said so are not to be had."""
        self._writer.mend(events)

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
            self._order.next = sequence + 1
        return True

    # Questions and answers.

    def _had_published_nothing(self) -> None:
        """The publisher had published nothing when it was asked."""
        self._recovery.end(Event.COMPLETE)
        self._order.next = self._numbers.first
        self.source.trust.synchronised()
        if len(self._holdback):
            # They came since, or are left from before: ask for them.
            self._order.forget_waiting()
            if self.next is None:
                self._order.ask_who()
            else:
                self._recovery.begin(Event.QUIET, self.next)

    def _take_reply(self, sequence: int, payload: bytes) -> None:
        assert self.next is not None
        recovery = self._recovery
        if sequence < self.next:
            recovery.witnessed = True
            return
        recovery.replies += 1
        if sequence > self.next:
            if recovery.applied or recovery.replies > 1 or recovery.witnessed:
                # A hole in the answer: 0.32 leaves out its middle.
                self._holdback.hold(sequence, payload)
                return
            # The publisher's memory begins here, behind the batch that would show who it is.
            recovery.outcome = "aged_out"
            self._order.give_up_until(sequence)
            self._order.doubt_identity()
        if recovery.state is State.TAIL:
            self.stats.gaps["gap"] += 1
            recovery.on(Event.HOLE)
        recovery.applied += 1
        self._holdback.take(sequence)
        self._order.write(sequence, payload)
        self.stats.batches_replayed += 1
        self._order.drain()

    def _answered(self) -> None:
        """The answer is at its end. Is what was missing there?"""
        recovery, asked = self._recovery, self._recovery.request
        self._order.take_unverified()
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
        unknown = not (comparable or again or self._order.connections < 2)
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
        self._order.ask_for_dropped()

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
        elif recovery.state is State.RESUME:
            recovery.ask(min(self._order.start(), self.next - 1), recovery.backoff_seconds())
        else:
            recovery.ask(self._order.start(), recovery.backoff_seconds())

    def _count_failure(self, outcome: str) -> None:
        if self._recovery.state is not State.TAIL:
            self.stats.replays[outcome] += 1
        if self._recovery.state in (State.GAP, State.RESTART):
            self._writer.doubt(self.source.trust.gap_opened)

    def _go_on_without(self) -> None:
        """Nobody has what is missing. What came since is applied, and the index is marked."""
        recovery, state = self._recovery, self._recovery.state
        recovery.end(Event.GIVEN_UP)
        again = self._replayable and self._order.connections > 1
        self._order.doubtful = state is State.RESUME or (state is State.INITIAL and again)
        waiting = len(self._holdback)
        self._order.take_unverified()
        if self._holdback.held and recovery.state is State.FOLLOWING:
            self._order.give_up_until(min(self._holdback.held))
            self._order.drain()
        is_whole = recovery.state is State.FOLLOWING
        if is_whole and self._holdback.held:  # and another hole
            self._order.miss()
        elif is_whole and self._order.is_to_come(self._holdback.take_dropped()):
            self._writer.doubt(self.source.trust.gap_opened)
        if self.next is None:  # heard of, and not heard: what it holds is as unknown as before
            self.source.trust.reached()
        elif waiting and is_whole and state in (State.CATCH_UP, State.GAP, State.RESTART):
            self.source.trust.synchronised()

    # Snapshots: our planes only.

    def _want_snapshot(self) -> None:
        """Ask for all blocks where that ends a doubt."""
        if self._writer.doubted and self._recovery.state is State.FOLLOWING:
            self._writer.doubted = False
            trust = self.source.trust
            helps = trust.curable or (trust.has_refused and self.source.has_room())
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
        last = self.stats.sequence = recovery.snapshot_at
        self._order.next = last + 1
        for sequence in [number for number in self._holdback.held if number <= last]:
            self._holdback.take(sequence)
        self._order.take_unverified()
        self._order.drain()
        if self._holdback.held and recovery.state is State.FOLLOWING:
            self._order.miss()
