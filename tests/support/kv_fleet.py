"""Both ends of a plane without engines: a worker's index that publishes, a fleet's that reads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from itertools import count
from typing import Protocol, TypeVar

from llm_worker.kv.index.index import Index
from llm_worker.kv.index.source import Source
from llm_worker.kv.records import AllBlocksCleared, BlockRemoved, BlockStored, Event, Hash
from llm_worker.kv.wire import encode

T = TypeVar("T")
BLOCK_SIZE = 16
_hashes = count(1)


class Plane(Protocol):
    """What a worker publishes on."""

    def publish(
        self, source: Source, payload: bytes, events: Sequence[Event], timestamp: float
    ) -> None: ...

    def close(self) -> None: ...


class Worker:
    """One rank's index with its plane, written by the calling thread."""

    def __init__(self, name: str, rank: int = 0, index: Index | None = None) -> None:
        self.index = Index() if index is None else index
        self.source = self.index.source(name, rank)
        self.source.trust.synchronised()
        self.plane: Plane | None = None
        self._lock = threading.Lock()

    def on_index_thread(self, ask: Callable[[], T]) -> T:
        """What the pipeline offers a plane."""
        with self._lock:
            return ask()

    def do(self, *events: Event) -> None:
        """Index one batch and publish it."""
        now = time.time()
        with self._lock:
            self.source.apply(events)
            if self.plane is not None:
                payload = encode(now, events, self.source.rank)
                self.plane.publish(self.source, payload, events, now)

    def store(self, batches: int = 1, blocks: int = 8) -> list[Hash]:
        """Publish new blocks; their hashes."""
        stored: list[Hash] = []
        for _ in range(batches):
            hashes: list[Hash] = [next(_hashes) for _ in range(blocks)]
            self.do(BlockStored(hashes=hashes, block_size=BLOCK_SIZE))
            stored += hashes
        return stored

    def store_again(self, hashes: list[Hash]) -> None:
        """Publish second copies, as vLLM does of physical duplicates."""
        self.do(BlockStored(hashes=hashes, block_size=BLOCK_SIZE))

    def remove(self, hashes: list[Hash]) -> None:
        """Publish that blocks are gone."""
        self.do(BlockRemoved(hashes=hashes))

    def clear(self) -> None:
        """Publish that all are."""
        self.do(AllBlocksCleared())


def same(worker: Worker, fleet: Index) -> bool:
    """Whether the fleet's index knows what the worker's does, and says that it is sure."""
    there = {(s.worker, s.rank): s for s in fleet.sources()}
    source = there.get((worker.source.worker, worker.source.rank))
    return (
        source is not None
        and not source.stale
        and source.hashes() == worker.source.hashes()
        and copies(source) == copies(worker.source)
    )


def copies(source: Source) -> dict[Hash, int]:
    """Blocks held more than once, and how often beyond the first."""
    return {value: n for lane in source.lanes() for value, n in lane.copies.items()}
