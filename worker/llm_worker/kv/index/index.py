"""Which worker, rank and medium holds which block: all sources, and what is asked of them.

One thread writes; any thread may read, and sees what was true a moment ago.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from llm_worker.kv.index.source import Budget, Source, unsigned
from llm_worker.kv.records import GPU, Hash
from llm_worker.kv.stats import MatchStats


@dataclass(frozen=True, slots=True)
class Held:
    """How much of a prefix one rank of one worker holds on one medium."""

    worker: str
    rank: int
    medium: str
    blocks: int  # leading ones
    miss: str | None  # why the next block is none of them (MISS_REASONS); None: all are held
    stale: frozenset[str]  # why the answer may be wrong (STALE_REASONS); empty: it is trustworthy


class Index:
    """All sources of a worker, or of a fleet.

    Args:
        max_blocks: How many blocks all sources hold together; more are refused. None: no bound.
    """

    def __init__(self, *, max_blocks: int | None = None) -> None:
        self._budget = Budget(max_blocks)
        self.match_stats = MatchStats()
        self._counting = threading.Lock()  # matches may be on several threads
        self._sources: dict[tuple[str, int], Source] = {}

    @property
    def max_blocks(self) -> int | None:
        """How many blocks all sources hold together; None: no bound."""
        return self._budget.max_blocks

    @property
    def room_blocks(self) -> int:
        """How many more may be held."""
        return self._budget.room_blocks

    def source(self, worker: str, rank: int) -> Source:
        """Return the source of a rank, made when it is not there yet: it is stale then."""
        source = self._sources.get((worker, rank))
        if source is None:
            source = self._sources[worker, rank] = Source(self._budget, worker, rank)
        return source

    def sources(self) -> list[Source]:
        """Return all sources, in the order in which they came."""
        return list(self._sources.values())

    def remove_worker(self, worker: str) -> int:
        """Forget a worker with all its ranks; return how many there were."""
        gone = [source for source in self.sources() if source.worker == worker]
        for source in gone:
            source.clear()
            del self._sources[source.worker, source.rank]
        return len(gone)

    def match(
        self,
        hashes: Sequence[Hash],
        *,
        adapter: str | None = None,
        group: int = 0,
        misses: bool = False,
    ) -> list[Held]:
        """Return who holds the beginning of a prefix, the longest first.

        Args:
            hashes: One per block from the first on; signed integers are understood.
            adapter: LoRA name; None is the base model.
            group: KV-cache group.
            misses: Also return sources that hold nothing of it, with why.
        """
        started = time.perf_counter()
        hashes = unsigned(hashes)
        found: list[Held] = []
        hit = False
        for source in self.sources():
            blocks_by_medium = source.held(hashes, adapter, group)
            hit = hit or bool(blocks_by_medium)
            if misses and not blocks_by_medium:
                blocks_by_medium = {GPU: 0}
            for medium, blocks in blocks_by_medium.items():
                miss = source.why_missing(hashes, blocks, medium, adapter, group)
                found.append(Held(source.worker, source.rank, medium, blocks, miss, source.stale))
        found.sort(key=_preference)
        with self._counting:
            self.match_stats.requests["hit" if hit else "miss"] += 1
            self.match_stats.seconds.observe(time.perf_counter() - started)
        return found

    def held_blocks(self) -> int:
        """Return the number of blocks of all sources; one on two workers counts twice."""
        return sum(len(lane.parents) for source in self.sources() for lane in source.lanes())

    def unique_blocks(self) -> int:
        """Return the number of different blocks, whoever holds them. Costs a copy of the index."""
        by_kind: dict[tuple[int, str | None], list[dict[Hash, Hash | None]]] = {}
        for source in self.sources():
            for lane in source.lanes():
                by_kind.setdefault((lane.group, lane.adapter), []).append(lane.parents)
        return sum(
            len(tables[0]) if len(tables) == 1 else len(set().union(*tables))
            for tables in by_kind.values()
        )

    def memory_bytes(self) -> int:
        """Return what the blocks occupy, and what merging them keeps of them."""
        total = 0
        for source in self.sources():
            total += sum(lane.memory_bytes() for lane in source.lanes())
            if source.kept_beside is not None:
                total += source.kept_beside()
        return total


def _preference(held: Held) -> tuple[int, bool, bool, str, int, str]:
    """Longest first, then trustworthy, then on the GPU."""
    return (
        -held.blocks,
        bool(held.stale),
        held.medium != "gpu",
        held.worker,
        held.rank,
        held.medium,
    )
