"""Several publishers of one rank → one source of the index and one stream to the planes.

An engine says what its own cache holds; an offloading connector with a publisher of its own says
what it keeps elsewhere. Each has its own numbers, gaps and doubts, so each is followed by a stream
of its own, which writes to a `Part` here instead of to the index. The union goes to the index. The
source is doubted as long as one of its parts is, and each part for reasons of its own. What the
index has no room for is refused here already, and not remembered. All of it runs on the pipeline's
thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from llm_worker.kv.follow.consolidator import Consolidator
from llm_worker.kv.follow.writer import Outlet
from llm_worker.kv.index.source import MAX_LANES, MAX_NAME_CHARACTERS, Lane, Source
from llm_worker.kv.records import ALL_MEDIA, AllBlocksCleared, Event
from llm_worker.kv.stats import MergeStats
from llm_worker.kv.wire import encode

ENGINE = "engine"  # the part that every rank has


class MergedRank:
    """One rank's parts, and what they hold together."""

    def __init__(
        self,
        source: Source,
        outlets: Sequence[Outlet] = (),
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.source = source
        self.consolidator = Consolidator(
            MergeStats(source.worker, source.rank),
            max_lanes=MAX_LANES,
            max_name_characters=MAX_NAME_CHARACTERS,
        )
        source.kept_beside = self.consolidator.memory_bytes
        self._outlets = outlets
        self._clock = clock
        self._parts: dict[str, Part] = {}

    def part(self, name: str) -> Part:
        """Return the part of that name, made when it is not there yet."""
        part = self._parts.get(name)
        if part is None:
            part = self._parts[name] = Part(self, name)
        return part

    def feed(self, name: str, events: Sequence[Event]) -> None:
        """Take in what a part says; the index and the planes get what it changes."""
        source, stats = self.source, self.consolidator.stats
        before = stats.refused_blocks
        changes = self.consolidator.feed(name, source.rank, events, source.room_blocks)
        if stats.refused_blocks > before:
            source.stats.refused_blocks += stats.refused_blocks - before
            self._parts[name].trust.refused()
        if not changes:
            return
        self.source.apply(changes)
        if self._outlets:
            now = self._clock()
            payload = encode(now, changes, self.source.rank)
            for outlet in self._outlets:
                outlet.publish(self.source, payload, changes, now)


class Part:
    """What one publisher's stream writes to; see `stream.BlockSink`."""

    def __init__(self, whole: MergedRank, name: str) -> None:
        self.worker = whole.source.worker
        self.rank = whole.source.rank
        self.trust = whole.source.trust.part()
        self._whole = whole
        self._name = name

    def apply(self, events: Sequence[Event]) -> bool:
        """Bring the part up to date with its publisher's events, in their order.

        Returns:
            Whether a clear that names no medium took blocks that are not the GPU's.
        """
        doubtful = False
        pending: list[Event] = []
        for event in events:
            if isinstance(event, AllBlocksCleared) and event.medium in (None, ALL_MEDIA):
                self._whole.feed(self._name, pending)
                doubtful = doubtful or (event.medium is None and self.beside_gpu())
                self.trust.forgot_all()
                pending = [AllBlocksCleared()]
            else:
                pending.append(event)
        self._whole.feed(self._name, pending)
        return doubtful

    @property
    def stale(self) -> frozenset[str]:
        """Why this part may not be what its publisher holds."""
        return self.trust.stale

    def beside_gpu(self) -> bool:
        """Return whether this part holds blocks that are not the GPU's."""
        return self._whole.consolidator.beside_gpu(self._name, self.rank)

    def has_room(self) -> bool:
        """Return whether what was refused may find room by now."""
        return self._whole.source.has_room()

    def clear(self, medium: str | None = None) -> None:
        """Forget what this part holds; what another one holds, too, stays."""
        self._whole.feed(self._name, [AllBlocksCleared(medium=medium)])
        if medium is None:
            self.trust.forgot_all()

    def lanes(self) -> list[Lane]:
        """Return the lanes of the whole."""
        return self._whole.source.lanes()
