"""One batch, whose turn it is → the index, the outlets, the counters.

Decodes it, applies what was understood of it, and tells the source's `trust` what was not. Which
batch has its turn is the stream's question, not asked here. Owns no socket, reads no clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from llm_worker.kv.follow.numbering import Numbering
from llm_worker.kv.index.source import BlockSink
from llm_worker.kv.records import ALL_MEDIA, AllBlocksCleared, Event
from llm_worker.kv.stats import ListenerStats
from llm_worker.kv.wire import Batch, Decoder, WireError, encode

LAG_MAX_SECONDS = 86_400.0  # what a publisher says beyond that is no time


class Outlet(Protocol):
    """Where batches go after they were indexed."""

    def publish(
        self, source: BlockSink, payload: bytes, events: Sequence[Event], timestamp: float
    ) -> None:
        """Take one batch; never blocks and never raises."""


class Writer:
    """The only one that writes one publisher's blocks."""

    def __init__(
        self,
        source: BlockSink,
        stats: ListenerStats,
        numbers: Numbering,
        outlets: Sequence[Outlet],
        *,
        checks_rank: bool,
    ) -> None:
        self.at: int | None = None  # the batch in hand, where one broke something
        self.timestamp = 0.0  # of the last batch applied, the publisher's; 0: there was none
        self.witness: tuple[int, float] | None = None  # number and time of the last one applied
        self.doubted = False  # something was doubted since somebody looked
        self._source = source
        self._stats = stats
        self._numbers = numbers
        self._outlets = outlets
        self._rank = source.rank if checks_rank else None
        self._decode = Decoder().decode

    def doubt(self, fact: Callable[[], None]) -> None:
        """What is held here may differ from what the publisher holds, until it tells all of it."""
        fact()
        self.doubted = True

    def in_order(self, messages: Sequence[tuple[bytes, bytes]], first: int, wall: float) -> int:
        """Apply messages as long as each is the next, from number ``first`` on. The hot path.

        Returns:
            How many there were. It stops before one that is to be looked at closely.
        """
        expected = first
        decode, source, outlets = self._decode, self._source, self._outlets
        apply = source.apply
        number = int.from_bytes
        verifies, clear_is_of_all = self._numbers.verifies, self._numbers.clear_is_of_all
        latest = self.timestamp if verifies else float("-inf")
        applied: Batch | None = None
        oldest = 0.0
        for frame, payload in messages:
            if number(frame, "big") != expected:
                break
            self.at = expected
            try:
                batch = decode(payload)
            except WireError:
                break
            # Only a part of it was understood; or it is older than its predecessor.
            if type(batch) is not Batch or batch.timestamp < latest:
                break
            if apply(batch.events) and not clear_is_of_all:
                self.doubt(source.trust.cleared_in_part)
            if expected == first:
                oldest = batch.timestamp
            expected += 1
            if verifies:
                latest = batch.timestamp
            if outlets:
                for outlet in outlets:
                    outlet.publish(source, payload, batch.events, batch.timestamp)
            applied = batch
        self.at = None
        if applied is not None:
            self._stats.batches_applied += expected - first
            self._observe_lag(wall - oldest, expected - first)
            self._note(expected - 1, applied)
        return expected - first

    def apply(self, sequence: int, payload: bytes, wall: float = 0.0) -> None:
        """Apply one batch, whatever it is. ``wall`` is the time of day, for the lag; 0: none."""
        self.at = sequence
        stats, source = self._stats, self._source
        batch = self.decoded(payload)
        if batch is None:
            stats.batches_lost += 1
            stats.sequence = sequence
            self.doubt(source.trust.not_understood)
            self.at = None
            return
        if source.stale and self._clears(batch.events):
            source.trust.emptied()  # before it is applied: it may give reason for doubt again
        if source.apply(batch.events) and not self._numbers.clear_is_of_all:
            self.doubt(source.trust.cleared_in_part)
        if type(batch) is not Batch:
            stats.undecodable.update(batch.rejected)
            stats.unknown_events += batch.unknown
            if batch.rejected:
                self.doubt(source.trust.not_understood)
            payload = encode(batch.timestamp, batch.events, batch.rank)
        if wall:
            self._observe_lag(wall - batch.timestamp)
        self._note(sequence, batch)
        self._publish(payload, batch.events, batch.timestamp)
        self.at = None

    def apply_piece(self, payload: bytes, *, first: bool) -> bool:
        """Apply a piece of a snapshot, the first one after all else was forgotten.

        Returns:
            Whether it was understood; if not, nothing was done.
        """
        batch = self.decoded(payload)
        if batch is None:
            return False
        if first:
            self._source.trust.snapshot_began()
            self.clear(batch.timestamp)
        self._source.apply(batch.events)
        self._publish(payload, batch.events, batch.timestamp)
        return True

    def clear(self, timestamp: float) -> None:
        """Forget all blocks, before their publisher says so or because it never will."""
        self._source.clear()
        if self._outlets:
            events: list[Event] = [AllBlocksCleared()]
            self._publish(encode(timestamp, events, self._source.rank), events, timestamp)

    def mend(self, events: Sequence[Event]) -> None:
        """Apply what no batch said, but the engine itself. Readers of the outlets get it, too."""
        self._source.apply(events)
        self._publish(encode(self.timestamp, events, self._source.rank), events, self.timestamp)

    def forget_process(self) -> None:
        """Another process publishes."""
        self.clear(self.timestamp)
        self.timestamp, self.witness = 0.0, None
        self.doubted = False

    def decoded(self, payload: bytes) -> Batch | None:
        """Return a batch; None: it cannot be decoded, and that is counted."""
        try:
            return self._decode(payload)
        except WireError as error:
            self._stats.undecodable[error.reason] += 1
            return None

    def made(self, payload: bytes) -> float | None:
        """When a batch was made, in its publisher's time; None: it cannot be decoded."""
        try:
            return self._decode(payload).timestamp
        except WireError:
            return None

    def is_older(self, payload: bytes) -> bool:
        """Whether a batch was made before the last one applied, which has a lower number."""
        if not self._numbers.verifies:
            return False
        made = self.made(payload)
        return made is not None and made < self.timestamp

    def _note(self, sequence: int, batch: Batch) -> None:
        """Remember the last batch applied, and see whether it is of our rank at all."""
        self._stats.sequence = sequence
        self._stats.last_batch_timestamp_seconds = batch.timestamp
        self.timestamp = batch.timestamp
        is_a_time = batch.timestamp == batch.timestamp  # NaN is none, and differs from itself
        self.witness = (sequence, batch.timestamp) if is_a_time else None
        if batch.rank != self._rank and batch.rank is not None and self._rank is not None:
            self.doubt(self._source.trust.name_shared)

    def _observe_lag(self, seconds: float, batches: int = 1) -> None:
        self._stats.lag.observe(min(max(0.0, seconds), LAG_MAX_SECONDS), batches)

    def _publish(self, payload: bytes, events: Sequence[Event], timestamp: float) -> None:
        for outlet in self._outlets:
            outlet.publish(self._source, payload, events, timestamp)

    def _clears(self, events: Iterable[Event]) -> bool:
        """Whether the publisher says that it holds nothing any more, on any medium."""
        return any(
            isinstance(event, AllBlocksCleared)
            and (event.medium == ALL_MEDIA or (event.medium is None and self._means_all()))
            for event in events
        )

    def _means_all(self) -> bool:
        """Whether a clear that names no medium is of all: the GPU has all, or a plane says so."""
        source = self._source
        return self._numbers.clear_is_of_all or not (
            source.beside_gpu() or "other_media" in source.stale
        )
