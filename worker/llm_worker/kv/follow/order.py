"""In which order batches are applied, and whose they are.

Takes batches as they arrive, in any order and any number of times, and writes each once, in its
publisher's order. One whose predecessors are missing is held back, and one that another process
sent begins a new count. What it finds missing, or whom it does not know, it puts as a question to
`recovery`; the answers are the stream's, which knows this module and not the other way round.
"""

from __future__ import annotations

from collections.abc import Sequence

from llm_worker.kv.follow.holdback import Holdback
from llm_worker.kv.follow.numbering import EngineNumbers, EpochNumbers, Numbering
from llm_worker.kv.follow.recovery import UNIDENTIFIED, Event, Recovery, State
from llm_worker.kv.follow.writer import Outlet, Writer
from llm_worker.kv.index.source import BlockSink
from llm_worker.kv.stats import ListenerStats


class Order:
    """The count of one publisher's batches. The arguments are those of `stream.Stream`."""

    def __init__(
        self,
        source: BlockSink,
        stats: ListenerStats,
        *,
        replayable: bool,
        epochs: bool,
        capacity_batches: int,
        outlets: Sequence[Outlet],
        checks_rank: bool,
    ) -> None:
        self.next: int | None = None  # the sequence expected; None: not known yet
        self.connections = 0
        self.doubtful = False  # reconnected, and nobody could be asked who it is
        self.numbers: Numbering = EpochNumbers() if epochs else EngineNumbers(replayable=replayable)
        self.writer = Writer(source, stats, self.numbers, outlets, checks_rank=checks_rank)
        self.holdback = Holdback(stats, capacity_batches)
        self.recovery = Recovery()
        self._source = source
        self._stats = stats
        self._replayable = replayable

    def connected(self) -> None:
        """There is another connection: forget what waits, and ask who is there."""
        self.connections += 1
        # It is an old process's or in the present one's memory: which, cannot be told.
        self.forget_waiting()
        self.holdback.take_dropped()
        self.doubtful = False
        if self.next is not None and self.next == self.numbers.first_of(self.next):
            self.next = None  # it had published nothing
        self.ask_who()

    # What arrives.

    def arrived(self, sequence: int, payload: bytes, wall: float) -> None:
        """Take a batch as it was received. ``wall``: as of `Writer.apply`."""
        state, expected = self.recovery.state, self.next
        if not self.numbers.is_possible(sequence):
            self._stats.undecodable["frames"] += 1
        elif state in UNIDENTIFIED or (expected is None and state is State.SNAPSHOT):
            self.holdback.set_aside(sequence, payload)
        elif expected is None:
            self._first(sequence, payload, wall)
        elif sequence < expected or not self.numbers.may_be_one_process(sequence, expected):
            self._out_of_line(sequence, payload)
        elif sequence == expected and state is not State.SNAPSHOT:
            self._in_turn(sequence, payload, wall)
        else:
            self._ahead(sequence, payload)

    def _first(self, sequence: int, payload: bytes, wall: float) -> None:
        """The first batch of a publisher that could not be asked for what was before it."""
        if self._replayable and self.connections > 1 and not self.doubtful:
            # It had published nothing when it was asked, so this may be a dead process's batch that
            # was still queued here. Asking for it tells.
            self.ask_who()
            self.holdback.set_aside(sequence, payload)
            return
        self.next = sequence
        self._count_missed_start()
        self._source.trust.synchronised()
        self.write(sequence, payload, wall)
        self._stats.batches_applied += 1
        self._settle_doubt()

    def _in_turn(self, sequence: int, payload: bytes, wall: float) -> None:
        """The very next number; whether it is the publisher's is another question."""
        if self.writer.is_older(payload):
            self._stats.batches_duplicate += 1
            return
        if self.is_unheard():
            self.holdback.hold(sequence, payload)
            if self.recovery.state is State.FOLLOWING:
                self.recovery.begin(Event.HOLE, sequence)
            return
        self.write(sequence, payload, wall)
        self._stats.batches_applied += 1
        self._settle_doubt()
        if self.holdback.held:
            self.drain()
            self._heal()

    def _ahead(self, sequence: int, payload: bytes) -> None:
        """A batch whose predecessors are missing: it waits for them."""
        self._settle_doubt()
        self.holdback.hold(sequence, payload)
        if self.recovery.state is State.FOLLOWING:
            self.miss()
        elif self.recovery.state is State.TAIL:
            self._stats.gaps["gap"] += 1
            self.recovery.on(Event.HOLE)

    def _out_of_line(self, sequence: int, payload: bytes) -> None:
        """A number that is not to come now: a late duplicate's, or another process's."""
        assert self.next is not None
        writer, numbers = self.writer, self.numbers
        batch = writer.decoded(payload)
        one_process = numbers.may_be_one_process(sequence, self.next)
        if batch is None and one_process:
            writer.doubt(self._source.trust.not_understood)
            return
        newer = batch is not None and batch.timestamp > writer.timestamp
        if numbers.is_restart(sequence, self.next, newer=newer, doubtful=self.doubtful):
            self._restarted(sequence, payload)
            return
        self._stats.batches_duplicate += 1
        if not one_process and (batch is None or batch.timestamp >= writer.timestamp):
            # Its predecessor still speaks on the same connection: two that share a name.
            writer.doubt(self._source.trust.name_shared)

    def is_unheard(self) -> bool:
        """Whether the process had published nothing when it was asked, and another one had before.

        What comes as its first batch may be the other's, still queued here; asking for it tells.
        """
        return self.writer.timestamp == 0.0 and self.connections > 1 and self.numbers.verifies

    def write(self, sequence: int, payload: bytes, wall: float = 0.0) -> None:
        """Apply the next batch; one that was given up is left out so."""
        self.next = sequence + 1
        self.writer.apply(sequence, payload, wall)

    def drain(self) -> None:
        """Apply what was held back and has its turn now."""
        while self.next is not None and (payload := self.holdback.take(self.next)) is not None:
            if self.writer.is_older(payload):
                self._stats.batches_duplicate += 1
                return
            self.write(self.next, payload)
            self._stats.batches_late += 1

    # What is missing.

    def miss(self) -> None:
        """Batches from the next one on are missing."""
        self._stats.gaps["gap"] += 1
        self.recovery.begin(Event.HOLE, self.next)

    def give_up_until(self, sequence: int) -> None:
        """What is missing before ``sequence`` cannot be had."""
        assert self.next is not None
        before = sorted(number for number in self.holdback.held if number < sequence)
        for number in [*before, sequence]:
            payload = self.holdback.take(number) if number < sequence else None
            if payload is not None and self.writer.is_older(payload):
                self._stats.batches_duplicate += 1  # left over from another process
                continue
            if number > self.next:
                self._stats.batches_lost += number - self.next
                at_start = self.next == self.numbers.first_of(self.next)
                trust = self._source.trust
                self.writer.doubt(trust.missed_first if at_start else trust.lost)
                self.next = number
            if payload is not None:
                if self.is_unheard():  # and the publisher has forgotten what it was asked for
                    self._doubt_identity()
                self.write(number, payload)
                self._stats.batches_late += 1

    def _heal(self) -> None:
        """What was missing was only late."""
        if self.recovery.state is State.GAP and not self.holdback.held:
            self.recovery.end(Event.HEALED)
            self._source.trust.gap_closed()
            self.ask_for_dropped()

    def ask_for_dropped(self) -> None:
        """Ask for what there was no room for, if it has not come since."""
        dropped = self.holdback.take_dropped()
        if self.recovery.state is State.FOLLOWING and self.is_to_come(dropped):
            self.miss()

    def is_to_come(self, sequence: int | None) -> bool:
        """Whether a batch that was seen is not applied yet."""
        return sequence is not None and self.next is not None and sequence >= self.next

    def take_unverified(self) -> None:
        """The publisher is known, or never will be: what was put aside has its turn."""
        for sequence, payload in self.holdback.take_unverified():
            self.arrived(sequence, payload, 0.0)

    def forget_waiting(self) -> None:
        """Drop what waits."""
        self.holdback.clear()
        self.holdback.count()

    # Who publishes.

    def ask_who(self) -> None:
        """Ask for the last batch once more, or for everything where there is none."""
        if self.next is None:
            self.recovery.begin(Event.UNKNOWN, 0)
        else:
            self.recovery.begin(Event.DOUBT, self.next - 1)

    def is_other_process(self, sequence: int, payload: bytes) -> bool:
        """Whether a reply is another process's than the batches so far."""
        if self.next is None:
            return False  # there were none
        if not self.numbers.may_be_one_process(sequence, self.next):
            return True
        if (
            self.recovery.state is not State.RESUME
            or sequence != self.next - 1
            or self.numbers.tell_process
        ):
            return False
        made = self.writer.made(payload)
        # None: as undecodable as it was then.
        return made is not None and made != self._stats.last_batch_timestamp_seconds

    def identified(self, sequence: int) -> None:
        """The first reply is here, and of the process that we know if we know any."""
        if self.next is None:
            self.next = sequence
            self._count_missed_start()
        elif sequence >= self.next and not self.numbers.tell_process:
            # It does not have the batch that would tell.
            self.recovery.outcome = "aged_out"
            self.writer.doubt(self._source.trust.lost)
        self.recovery.on(Event.IDENTIFIED)

    def _settle_doubt(self) -> None:
        """A batch came after a reconnect, and nobody told whose it is.

        After it was applied: if it was the dead process's, a clear in it proves nothing.
        """
        if self.doubtful:
            self.doubtful = False
            self._doubt_identity()
            self._source.trust.reached()

    def _doubt_identity(self) -> None:
        # A plane's number tells it, but for a batch of the dead process that was still queued.
        if self._replayable or not self.numbers.tell_process:
            self.writer.doubt(self._source.trust.lost)

    def _count_missed_start(self) -> None:
        """Count and mark it when the next batch is not its publisher's first."""
        assert self.next is not None
        missed = self.next - self.numbers.first_of(self.next)
        if missed:
            self._stats.gaps["initial"] += 1
            self._stats.batches_lost += missed
            self.writer.doubt(self._source.trust.missed_first)

    def replaced(self) -> None:
        """By its answer another process publishes: all of its batches are asked for."""
        self._forget_process()
        self.next = self.numbers.first
        self._source.trust.restarted(from_its_first=False)
        self.recovery.begin(Event.UNKNOWN if self.next is None else Event.REPLACED, 0)

    def _restarted(self, sequence: int, payload: bytes) -> None:
        """By this batch another process publishes."""
        self._forget_process()
        first = self.next = self.numbers.first_of(sequence)
        self._source.trust.restarted(from_its_first=sequence == first)
        if sequence == first:
            self.recovery.end(Event.RESTARTED)
        else:
            self.recovery.begin(Event.REPLACED, first)
        self.arrived(sequence, payload, 0.0)

    def _forget_process(self) -> None:
        """Nothing of the last process's is held any more."""
        self._stats.gaps["restart"] += 1
        self.forget_waiting()
        self.doubtful = False
        self.writer.forget_process()
