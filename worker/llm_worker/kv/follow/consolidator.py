"""Several publishers of one worker's KV events → one stream of what any of them holds.

An engine and an offloading connector may both tell of the same blocks. The merged stream stores a
block when the first source has it and removes it when the last one drops it, for each rank, medium,
KV-cache group and adapter on its own; a source that clears takes nothing from the others. Applied
to an index it gives the union of the sources, each block once.
Pure: no I/O, no clock, no logging, one thread.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from typing import TypeAlias

from msgspec.structs import replace

from llm_worker.kv.records import GPU, AllBlocksCleared, BlockRemoved, BlockStored, Event, Hash
from llm_worker.kv.stats import MergeStats

_Place: TypeAlias = tuple[str, int]  # medium and group: all that a removal says
_Lane: TypeAlias = tuple[str, int, str | None]  # and the adapter
_REMOVED_BLOCKS = 512  # in one event, when a source clears
UNBOUNDED = 1 << 62


class Consolidator:
    """Feed it each source's events, in their order; it returns the merged stream's.

    A source is known by its name from its first event on. Sources may interleave as they like: what
    is told depends on the order only in which one of them tells of a block.
    """

    def __init__(
        self,
        stats: MergeStats | None = None,
        *,
        max_lanes: int = UNBOUNDED,
        max_name_characters: int = UNBOUNDED,
    ) -> None:
        """``max_lanes``: of a rank, that hold something: media times groups times adapters.

        ``max_name_characters``: of a medium or an adapter.
        """
        self.stats = MergeStats() if stats is None else stats
        self._bounds = (max_lanes, max_name_characters)
        self._ranks: dict[int, _Rank] = {}

    def feed(
        self, source: str, rank: int, events: Iterable[Event], room: int = UNBOUNDED
    ) -> list[Event]:
        """Take in what a source says of a rank, and return what that changes for the worker.

        ``room`` is how many more blocks the reader takes. What is beyond it is neither told nor
        remembered, and counted as refused.
        """
        merged = self._ranks.get(rank)
        if merged is None:
            merged = self._ranks[rank] = _Rank(self.stats, *self._bounds)
        merged.room = room
        out: list[Event] = []
        for event in events:
            if isinstance(event, BlockStored):
                merged.store(source, event, out)
            elif isinstance(event, BlockRemoved):
                merged.remove(source, event, out)
            else:
                merged.clear(source, event.medium, out)
        return out

    def drop(self, source: str, rank: int | None = None) -> dict[int, list[Event]]:
        """Forget what a source said, as if it had cleared: it is gone. By rank, what that changes.

        The others' blocks stay; ranks where nothing changes are left out.
        """
        changes: dict[int, list[Event]] = {}
        for each, merged in self._ranks.items():
            if rank in (None, each) and source in merged.sources:
                out: list[Event] = []
                merged.clear(source, None, out)
                del merged.sources[source]
                if out:
                    changes[each] = out
        return changes

    def beside_gpu(self, source: str, rank: int) -> bool:
        """Whether a source holds blocks of a rank that are not the GPU's."""
        merged = self._ranks.get(rank)
        lanes = {} if merged is None else merged.sources.get(source, {})
        return any(key[0] != GPU and lane for key, lane in lanes.items())

    def memory_bytes(self) -> int:
        """What is remembered, in bytes: tables, and hashes that are not the reader's own objects.

        Any thread may ask.
        """
        total = 0
        for merged in list(self._ranks.values()):
            holders = list(merged.holders.values())
            told = [
                lane for lanes in list(merged.sources.values()) for lane in list(lanes.values())
            ]
            again = sum(map(len, told)) - sum(map(len, holders))  # told of by a second source
            total += sum(map(sys.getsizeof, (*holders, *told)))
            sample = list(islice(chain(*told), 1024))
            if sample:
                size = sum((sys.getsizeof(value) + 15) & ~15 for value in sample)
                total += max(0, again) * size // len(sample)
        return total

    def sources(self) -> dict[str, dict[int, int]]:
        """How many blocks each source holds, by its ranks."""
        found: dict[str, dict[int, int]] = {}
        for rank, merged in self._ranks.items():
            for name, lanes in merged.sources.items():
                found.setdefault(name, {})[rank] = sum(len(lane) for lane in lanes.values())
        return found


class _Rank:
    """One rank: what each source holds, and how many sources hold each block.

    ``sources`` has, by source and lane, how many copies of a block it holds: vLLM tells of each
    physical copy. ``holders`` has, by lane, how many sources hold a block: what the reader of the
    merged stream has is exactly its keys.
    """

    def __init__(self, stats: MergeStats, max_lanes: int, max_name_characters: int) -> None:
        self.stats = stats
        self.max_lanes = max_lanes
        self.max_name_characters = max_name_characters
        self.room = UNBOUNDED  # of the reader, for blocks
        self.sources: dict[str, dict[_Lane, dict[Hash, int]]] = {}
        self.holders: dict[_Lane, dict[Hash, int]] = {}
        self.adapters: dict[_Place, dict[str | None, int]] = {}  # of holders; their block sizes

    def store(self, source: str, event: BlockStored, out: list[Event]) -> None:
        key = (event.medium or GPU, event.group or 0, event.adapter)
        holders = self.holders.get(key)
        longest = max(len(key[0]), len(event.adapter or ""))
        if holders is None and (
            len(self.holders) >= self.max_lanes or longest > self.max_name_characters
        ):
            self.stats.refused_blocks += len(event.hashes)
            return
        lanes = self.sources.setdefault(source, {})
        copies = lanes.setdefault(key, {})
        if holders is None:
            holders = self.holders[key] = {}
            self.adapters.setdefault(key[:2], {})[event.adapter] = event.block_size
        hashes = event.hashes
        new: list[bool] = []
        refused = 0
        for value in hashes:
            held = copies.get(value, 0)
            others = holders.get(value, 0)
            if not others and self.room <= 0:
                refused += 1
                new.append(False)
                continue
            copies[value] = held + 1
            if held:
                new.append(False)
                continue
            holders[value] = others + 1
            self.room -= not others
            new.append(not others)
        self.stats.refused_blocks += refused
        if all(new):
            out.append(event)
        else:
            self.stats.stored_elsewhere_blocks += new.count(False) - refused
            out.extend(_runs(event, new))
        if not copies:
            del lanes[key]
        if not holders:
            del self.holders[key], self.adapters[key[:2]][event.adapter]

    def remove(self, source: str, event: BlockRemoved, out: list[Event]) -> None:
        place = (event.medium or GPU, event.group or 0)
        lanes = self.sources.get(source, {})
        gone: list[tuple[_Lane, Hash]] = []
        for value in event.hashes:
            # The lane that an index of this source alone would take: its first that has the block.
            key = next((k for k in lanes if k[:2] == place and value in lanes[k]), None)
            if key is None:
                self.stats.unknown_removed_blocks += 1
            elif lanes[key][value] > 1:
                lanes[key][value] -= 1
                self.stats.held_elsewhere_blocks += 1
            else:
                del lanes[key][value]
                if not lanes[key]:
                    del lanes[key]
                if self._release(key, value):
                    gone.append((key, value))
        self._gone(place, gone, event, out)

    def clear(self, source: str, medium: str | None, out: list[Event]) -> None:
        lanes = self.sources.setdefault(source, {})
        gone: dict[_Place, list[tuple[_Lane, Hash]]] = {}
        for key in [key for key in lanes if medium in (None, key[0])]:
            released = [(key, value) for value in lanes.pop(key) if self._release(key, value)]
            gone.setdefault(key[:2], []).extend(released)
        if not self.holders:
            # Not only shorter: it is the one event that ends a reader's doubt about what it missed.
            out.append(AllBlocksCleared())
            return
        for place, blocks in gone.items():
            for start in range(0, len(blocks), _REMOVED_BLOCKS):
                event = BlockRemoved(hashes=[], medium=place[0], group=place[1])
                self._gone(place, blocks[start : start + _REMOVED_BLOCKS], event, out)

    def _release(self, key: _Lane, value: Hash) -> bool:
        """One source less holds the block; whether it was the last."""
        left = self.holders[key][value] - 1
        if left:
            self.holders[key][value] = left
            self.stats.held_elsewhere_blocks += 1
            return False
        del self.holders[key][value]
        self.room += 1
        if not self.holders[key]:
            del self.holders[key], self.adapters[key[:2]][key[2]]
        return True

    def _gone(
        self,
        place: _Place,
        gone: Sequence[tuple[_Lane, Hash]],
        event: BlockRemoved,
        out: list[Event],
    ) -> None:
        """Tell of removals. They cannot say of which adapter: a hash has only one, if it is sound.

        Where it has two, the reader would drop the block of either. So both go, and what is left
        comes back, though without its parent.
        """
        if not gone:
            return
        hashes = [value for _, value in gone]
        back: list[Event] = []
        adapters = self.adapters[place]
        for adapter, size in adapters.items():
            left = self.holders[*place, adapter].keys() & set(hashes[: len(gone)])
            hashes.extend(left)
            back.extend(
                BlockStored(
                    hashes=[value],
                    block_size=size,
                    medium=place[0],
                    group=place[1],
                    adapter=adapter,
                )
                for value in left
            )
        out.append(replace(event, hashes=hashes))
        out.extend(back)


def _runs(event: BlockStored, new: Sequence[bool]) -> list[Event]:
    """The new blocks of an event: an event for each run of them, with the run's own parent."""
    runs: list[Event] = []
    hashes = event.hashes
    tokens = event.token_ids
    start = 0
    while start < len(hashes):
        if not new[start]:
            start += 1
            continue
        end = start + 1
        while end < len(hashes) and new[end]:
            end += 1
        size = event.block_size
        runs.append(
            replace(
                event,
                hashes=hashes[start:end],
                parent=hashes[start - 1] if start else event.parent,
                extra_keys=event.extra_keys and event.extra_keys[start:end],
                token_ids=tokens[start * size : end * size] if tokens else tokens,
            )
        )
        start = end
    return runs
