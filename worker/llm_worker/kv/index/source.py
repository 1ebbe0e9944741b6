"""What one rank of one worker holds.

A source keeps a lane per medium, KV-cache group and adapter: a dict from a block's hash to its
parent's. One thread writes it; any thread may read, and sees what was true a moment ago. Never
parses a payload, never does I/O.
Long: what makes `Source.apply` fast (ADR 10) has to see all of it.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import Protocol

from llm_worker.kv.index.trust import Trust
from llm_worker.kv.records import ALL_MEDIA, GPU, HASH_MASK, BlockRemoved, BlockStored, Event, Hash
from llm_worker.kv.stats import SourceStats

UNBOUNDED = 1 << 62
MAX_CHAIN_TAILS = 4096  # of one lane: chains that may go on
MAX_LANES = 4096  # of one source: media times groups times adapters
MAX_NAME_CHARACTERS = 512  # of a medium or an adapter: publishers choose them, and labels show them
SWEEP_LANES = 64  # of one source: those that hold nothing are dropped from here on, now and then
SNAPSHOT_BLOCKS = 512  # of one event of a snapshot

# Why the block after the last one that is held is a miss. Closed set.
MISS_REASONS = (
    "other_medium",  # this source holds it, on another medium
    "other_adapter",  # for another adapter
    "other_group",  # in another KV-cache group
    "hole",  # not held, but a later block of the prefix is: it was evicted from the middle
    "absent",  # its parent is held: it was evicted or never computed here
    "unseen",  # nothing of the prefix is held here
)


@dataclass(slots=True)
class Budget:
    """How many blocks more all sources of an index may hold together; they count down from it."""

    max_blocks: int | None  # None: no bound
    room_blocks: int = UNBOUNDED

    def __post_init__(self) -> None:
        if self.max_blocks is not None:
            self.room_blocks = self.max_blocks


class Lane:
    """The blocks of one source on one medium, in one group, of one adapter."""

    __slots__ = (
        "adapter",
        "block_size",
        "chain_tails",
        "copies",
        "group",
        "kind",
        "locality",
        "medium",
        "parents",
        "sizes",
        "sliding_window",
    )  # fmt: skip

    def __init__(self, event: BlockStored) -> None:
        self.medium = event.medium
        self.group = event.group
        self.adapter = event.adapter
        self.block_size = event.block_size
        self.kind = event.kind
        self.sliding_window = event.sliding_window
        self.locality = event.locality
        self.parents: dict[Hash, Hash | None] = {}
        self.copies: dict[Hash, int] = {}  # beyond the first; only of blocks that have some
        self.sizes: dict[Hash, int] = {}  # only of blocks whose size is not the lane's
        # Where chains may go on: each to itself, so that a parent can be the key that it equals
        # and not a second object. Of a block per event that is a third of the memory.
        self.chain_tails: dict[Hash | None, Hash | None] = {}

    def copy(self) -> Lane:
        """Return a lane of the same blocks."""
        copied = copy.copy(self)
        copied.parents, copied.copies = self.parents.copy(), self.copies.copy()
        copied.sizes = self.sizes.copy()
        return copied

    def memory_bytes(self) -> int:
        """Return what the lane occupies, from the sizes of its tables and of a sample of hashes."""
        parents = self.parents
        sample = list(islice(parents.items(), 4096))
        tables = (parents, self.copies, self.sizes, self.chain_tails)
        total = sum(sys.getsizeof(table) for table in tables)
        if not sample:
            return total
        objects = {id(value): value for pair in sample for value in pair}
        return total + sum(map(_allocated, objects.values())) * len(parents) // len(sample)


class BlockSink(Protocol):
    """What one publisher's stream writes to: a source, or its part of one (`merge`)."""

    worker: str
    rank: int
    trust: Trust

    @property
    def stale(self) -> frozenset[str]:
        """Why it may not be what the publisher holds (STALE_REASONS)."""

    def apply(self, events: Sequence[Event]) -> bool:
        """Bring it up to date with the publisher's events, in their order.

        Returns:
            Whether a clear that names no medium took blocks that are not the GPU's.
        """

    def clear(self, medium: str | None = None) -> None:
        """Forget every block, or those of one medium."""

    def beside_gpu(self) -> bool:
        """Return whether blocks are held that are not the GPU's."""

    def has_room(self) -> bool:
        """Return whether what was refused may find room by now."""

    def lanes(self) -> list[Lane]:
        """Return what is held now."""


class Source:
    """One rank of one worker."""

    def __init__(self, budget: Budget, worker: str, rank: int) -> None:
        self.worker = worker
        self.rank = rank
        self.stats = SourceStats()
        self.trust = Trust()
        # Tokens; of the GPU's only group, as the engine says it. None: it was not asked.
        self.block_size: int | None = None
        # What is kept for this source and not in it, in bytes; see `merge`.
        self.kept_beside: Callable[[], int] | None = None
        self._budget = budget
        self._lanes: dict[tuple[str, int, str | None], Lane] = {}
        # What a removal can mean: it says medium and group, not the adapter.
        self._removable: dict[tuple[str, int], list[Lane]] = {}
        self._sweep_at = SWEEP_LANES
        self._odd = False  # some blocks are not of the size that they should have

    def apply(self, events: Sequence[Event]) -> bool:  # noqa: PLR0912, PLR0915  # the hot path
        """Bring the source up to date with events of its publisher, in their order.

        Returns:
            Whether a clear that names no medium took blocks that are not the GPU's.
        """
        stats, budget = self.stats, self._budget
        room = before = budget.room_blocks
        doubtful = False
        stored = stored_events = removed_events = unknown = 0
        parents: dict[Hash, Hash | None] | None = None  # where removals of medium, group go
        lane: Lane | None = None
        medium, group = "", 0
        for event in events:
            if type(event) is BlockStored:
                stored_events += 1
                hashes = event.hashes
                count = len(hashes)
                lane = self._lanes.get((event.medium, event.group, event.adapter))
                if lane is None or event.block_size != lane.block_size or count > room:
                    new = self._store_each(lane, event, room)
                    parents = None
                else:
                    table, chain_tails, parent = lane.parents, lane.chain_tails, event.parent
                    parent = chain_tails.pop(parent, parent)
                    new = -len(table)
                    for value in hashes:  # faster than any one call of dict
                        table[value] = parent
                        parent = value
                    chain_tails[parent] = parent
                    if len(chain_tails) > MAX_CHAIN_TAILS:
                        chain_tails.clear()
                    new += len(table)
                    if new != count:
                        self._count_copies(lane, hashes, new)
                        parents = None
                stored += new
                room -= new
            elif type(event) is BlockRemoved:
                removed_events += 1
                if parents is None or event.medium is not medium or event.group != group:
                    medium, group = event.medium, event.group
                    lanes = self._removable.get((medium, group), ())
                    if len(lanes) != 1 or lanes[0].copies or lanes[0].sizes:
                        room += self._remove_each(lanes, event.hashes)
                        parents = None
                        continue
                    parents = lanes[0].parents
                for value in event.hashes:
                    try:
                        del parents[value]
                        room += 1
                    except KeyError:
                        unknown += 1
            else:
                stats.cleared_events += 1
                stats.removed_blocks += room - before + stored
                stats.stored_blocks += stored
                stored = 0
                budget.room_blocks = room
                if event.medium is None:
                    doubtful = doubtful or self.beside_gpu()
                self.clear(None if event.medium == ALL_MEDIA else event.medium)
                room = before = budget.room_blocks
                parents = None
        budget.room_blocks = room
        if self._odd:
            stats.odd_size_batches += 1
            self._odd = self._has_odd_lane()
        stats.stored_events += stored_events
        stats.stored_blocks += stored
        if removed_events:
            stats.removed_events += removed_events
            stats.removed_blocks += room - before + stored
            stats.unknown_removed_blocks += unknown
        return doubtful

    def clear(self, medium: str | None = None) -> None:
        """Forget every block, or those of one medium. At once: it does not look at the blocks."""
        kept = {} if medium is None else {k: v for k, v in self._lanes.items() if k[0] != medium}
        gone = sum(len(lane.parents) for key, lane in self._lanes.items() if key not in kept)
        self._lanes = kept
        self._removable = {k: v for k, v in self._removable.items() if k[0] != medium and kept}
        self._odd = self._odd and self._has_odd_lane()
        self.stats.cleared_blocks += gone
        self._budget.room_blocks += gone
        if medium is None:  # what was refused is gone from the engine as well
            self.trust.forgot_all()

    @property
    def stale(self) -> frozenset[str]:
        """Why what is held here may not be what the engine holds (STALE_REASONS)."""
        return self.trust.stale

    def beside_gpu(self) -> bool:
        """Return whether blocks are held that are not the GPU's."""
        return any(lane.parents and lane.medium != GPU for lane in self._lanes.values())

    @property
    def room_blocks(self) -> int:
        """How many more blocks the index takes, of whichever source."""
        return self._budget.room_blocks

    def has_room(self) -> bool:
        """Return whether what was refused may find room by now: a tenth of the index is free."""
        budget = self._budget
        lanes = sum(1 for lane in self._lanes.values() if lane.parents)
        return 10 * budget.room_blocks >= (budget.max_blocks or 0) and lanes < MAX_LANES

    def blocks(self) -> dict[str, int]:
        """Return the number of blocks by medium; without copies, of all groups and adapters."""
        counts: dict[str, int] = {}
        for lane in self.lanes():
            counts[lane.medium] = counts.get(lane.medium, 0) + len(lane.parents)
        return counts

    def lanes(self) -> list[Lane]:
        """Return the lanes as they are now."""
        return list(self._lanes.values())

    def hashes(self, group: int | None = None) -> set[Hash]:
        """Return the hashes of all blocks, or of one KV-cache group."""
        return set().union(*(s.parents for s in self.lanes() if group in (None, s.group)))

    def frozen(self) -> Source:
        """Return a copy of what is held now, for who takes time to read it.

        Costs the writer's thread about 50 ms per million blocks.
        """
        frozen = Source(self._budget, self.worker, self.rank)
        frozen.trust = self.trust
        frozen._lanes = {key: lane.copy() for key, lane in self._lanes.items()}
        return frozen

    def snapshot(self) -> Iterator[BlockStored]:
        """Yield events that bring an empty source to this one's state.

        Consecutive blocks of a chain share an event. Extra keys are not kept, so not in it.
        """
        for lane in self.lanes():
            hashes: list[Hash] = []
            first, size = None, lane.block_size
            for value, parent in list(lane.parents.items()):
                block_size = lane.sizes.get(value, lane.block_size) if lane.sizes else size
                if hashes and (
                    parent != hashes[-1] or block_size != size or len(hashes) >= SNAPSHOT_BLOCKS
                ):
                    yield _stored(lane, hashes, first, size)
                    hashes = []
                if not hashes:
                    first, size = parent, block_size
                hashes.append(value)
            if hashes:
                yield _stored(lane, hashes, first, size)
            for value, copies in list(lane.copies.items()):
                block_size = lane.sizes.get(value, lane.block_size)
                for _ in range(copies):
                    yield _stored(lane, [value], lane.parents.get(value), block_size)

    def held(self, hashes: Sequence[Hash], adapter: str | None, group: int) -> dict[str, int]:
        """Return the number of leading blocks that are held, by medium; media without are absent.

        Args:
            hashes: Unsigned.
            adapter: None is the base model.
            group: Of the KV cache.
        """
        found: dict[str, int] = {}
        if not hashes:
            return found
        first = hashes[0]
        for lane in self.lanes():
            parents = lane.parents
            if first in parents and lane.adapter == adapter and lane.group == group:
                found[lane.medium] = sum(1 for _ in takewhile(parents.__contains__, hashes))
        return found

    def why_missing(
        self, hashes: Sequence[Hash], blocks: int, medium: str, adapter: str | None, group: int
    ) -> str | None:
        """Return why block number ``blocks`` is not held (MISS_REASONS), None if there is none."""
        if blocks >= len(hashes):
            return None
        missing = hashes[blocks]
        holders = [lane for lane in self.lanes() if missing in lane.parents]
        if any(lane.adapter == adapter and lane.group == group for lane in holders):
            return "other_medium"
        if any(lane.group == group for lane in holders):
            return "other_adapter"
        if holders:
            return "other_group"
        own = self._lanes.get((medium, group, adapter))
        if own is not None and not own.parents.keys().isdisjoint(islice(hashes, blocks + 1, None)):
            return "hole"
        return "absent" if blocks else "unseen"

    def _new_lane(self, event: BlockStored) -> Lane | None:
        if len(self._lanes) >= self._sweep_at:
            self._drop_empty_lanes()
        longest = max(len(event.medium), len(event.adapter or ""))
        if len(self._lanes) >= MAX_LANES or longest > MAX_NAME_CHARACTERS:
            self.trust.refused()
            return None
        lane = Lane(event)
        self._lanes[event.medium, event.group, event.adapter] = lane
        self._removable.setdefault((event.medium, event.group), []).append(lane)
        return lane

    def _drop_empty_lanes(self) -> None:
        """Forget adapters that hold nothing: a removal looks at each, and there is a bound."""
        self._lanes = {key: lane for key, lane in self._lanes.items() if lane.parents}
        self._removable = {}
        for (medium, group, _), lane in self._lanes.items():
            self._removable.setdefault((medium, group), []).append(lane)
        self._sweep_at = min(MAX_LANES, max(SWEEP_LANES, 2 * len(self._lanes)))

    def _has_odd_lane(self) -> bool:
        """Whether a lane's own size is not what the engine says."""
        size = self.block_size
        return (
            size is not None
            and self._has_one_group()
            and any(lane.block_size != size and _is_checked(lane) for lane in self._lanes.values())
        )

    def _has_one_group(self) -> bool:
        """Whether blocks should be of one size: each group of a hybrid model may have its own."""
        return not any(lane.group for lane in self._lanes.values())

    def _count_copies(self, lane: Lane, hashes: Sequence[Hash], new: int) -> None:
        """Note which of ``hashes``, just stored, were held before; ``new`` were not."""
        fresh = set(islice(reversed(lane.parents), new))  # a dict keeps the order of insertion
        for value in hashes:
            if value in fresh:
                fresh.remove(value)
            else:
                lane.copies[value] = lane.copies.get(value, 0) + 1
                self.stats.duplicate_blocks += 1

    def _store_each(self, lane: Lane | None, event: BlockStored, room: int) -> int:
        """Store block by block: the lane is new, some are of another size, or do not fit.

        Returns:
            How many are new.
        """
        stats = self.stats
        lane = lane or self._new_lane(event)
        if lane is None:
            stats.refused_blocks += len(event.hashes)
            return 0
        parents, copies = lane.parents, lane.copies
        parent, new = event.parent, 0
        if not parents:
            lane.block_size = event.block_size
        if _is_checked(event) and event.block_size != (self.block_size or lane.block_size):
            self._odd = self._odd or self._has_one_group()
        for value in event.hashes:
            if value in parents:
                # vLLM holds some blocks more than once, and says so on store and on removal.
                copies[value] = copies.get(value, 0) + 1
                stats.duplicate_blocks += 1
            elif new < room:
                parents[value] = parent
                new += 1
                if event.block_size != lane.block_size:
                    lane.sizes[value] = event.block_size
            else:
                stats.refused_blocks += 1
                self.trust.refused()
            parent = value
        return new

    def _remove_each(self, candidates: Sequence[Lane], hashes: Sequence[Hash]) -> int:
        """Remove block by block.

        Returns:
            How many are gone: not those of which a copy is left.
        """
        stats, removed = self.stats, 0
        for value in hashes:
            for lane in candidates:
                if value not in lane.parents:
                    continue
                copies = lane.copies.get(value, 0)
                if copies > 1:
                    lane.copies[value] = copies - 1
                elif copies:
                    del lane.copies[value]
                else:
                    del lane.parents[value]
                    lane.sizes.pop(value, None)
                    removed += 1
                if copies:
                    stats.duplicate_removed_blocks += 1
                break
            else:
                stats.unknown_removed_blocks += 1
        return removed


def _stored(lane: Lane, hashes: list[Hash], parent: Hash | None, block_size: int) -> BlockStored:
    return BlockStored(
        hashes=hashes,
        parent=parent,
        block_size=block_size,
        medium=lane.medium,
        adapter=lane.adapter,
        group=lane.group,
        kind=lane.kind,
        locality=lane.locality,
        sliding_window=lane.sliding_window,
    )


def _is_checked(blocks: BlockStored | Lane) -> bool:
    """Whether blocks should be of the engine's one size.

    Recurrent layers' may end in a part of a block, and a connector's may be of any size.
    """
    return (
        blocks.medium == GPU
        and not blocks.group
        and blocks.kind in (None, "full_attention")
        and blocks.block_size > 0  # 0: the publisher does not say
    )


def unsigned(hashes: Sequence[Hash]) -> Sequence[Hash]:
    """Integers as the index knows them: a publisher may send the same 64 bits with a sign."""
    try:
        if not hashes or min(hashes) >= 0:  # type: ignore[operator]
            return hashes
    except TypeError:  # bytes
        pass
    return [value & HASH_MASK if isinstance(value, int) else value for value in hashes]


def _allocated(value: Hash | None) -> int:
    """Return what an object occupies: the allocator hands out multiples of 16 bytes."""
    return 0 if value is None else (sys.getsizeof(value) + 15) & ~15
