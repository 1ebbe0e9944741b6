"""TensorRT-LLM's KV events as its serialiser makes them; written by hand, for it needs a GPU.

Sources, all of NVIDIA/TensorRT-LLM: ``KVCacheEventSerializer`` in tensorrt_llm/_utils.py (keys and
nesting); tests/unittest/llmapi/test_llm_kv_cache_events.py (ids from 0, ``created`` first, blocks
that are not full, ``{}`` among the events); the unit tests of KV-cache manager V2's event manager
(``layer_group_id``, hexadecimal hashes, ``priority`` None, the oldest events dropped).
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any

from llm_worker.kv.index.source import Source
from llm_worker.kv.records import Hash

BLOCK_SIZE = 4

Contents = dict[tuple[str, str | None], dict[Hash, Hash | None]]  # medium, adapter: block, parent


def event(event_id: int, data: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"event_id": event_id, "data": data, "window_size": 128} | more


def created(event_id: int = 0, **more: Any) -> dict[str, Any]:
    return event(event_id, {"type": "created", "num_blocks_per_cache_level": [64, 16]}, **more)


def block(
    block_hash: int | str, tokens: int = BLOCK_SIZE, level: int = 0, **more: Any
) -> dict[str, Any]:
    first = block_hash if isinstance(block_hash, int) else 0
    return {
        "type": "stored_block",
        "block_hash": block_hash,
        "tokens": [
            {"type": "unique_token", "token_id": (first + n) % 1000, "token_extra_id": 0}
            for n in range(tokens)
        ],
        "cache_level": level,
        "priority": 35,
    } | more


def stored(
    event_id: int, *blocks: dict[str, Any], parent: int | str | None = None, **more: Any
) -> dict[str, Any]:
    return event(
        event_id, {"type": "stored", "parent_hash": parent, "blocks": list(blocks)}, **more
    )


def removed(event_id: int, *hashes: int | str, **more: Any) -> dict[str, Any]:
    return event(event_id, {"type": "removed", "block_hashes": list(hashes)}, **more)


def updated(
    event_id: int, block_hash: int | str, old: int | None, new: int | None, **more: Any
) -> dict[str, Any]:
    level = None if new is None else {"type": "event_diff", "new_value": new, "old_value": old}
    data = {"type": "updated", "block_hash": block_hash, "cache_level": level, "priority": None}
    return event(event_id, data, **more)


class Engine:
    """Answers like ``tensorrt_llm.LLM``: what was put in, then nothing until there is more."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.stats: list[Any] = []
        self.errors: list[Exception] = []  # raised by the next questions, of either kind
        self.timeouts: list[float | None] = []

    def happen(self, events: Iterable[Any]) -> None:
        self.events.extend(events)

    async def get_kv_cache_events_async(
        self,
        timeout: float | None,  # noqa: ASYNC109
    ) -> AsyncIterator[Any]:
        self.timeouts.append(timeout)
        while self.events:
            yield self.events.pop(0)
        if self.errors:
            raise self.errors.pop(0)

    async def get_stats_async(
        self,
        timeout: float | None,  # noqa: ASYNC109
    ) -> AsyncIterator[Any]:
        while self.stats:
            yield self.stats.pop(0)


class Truth:
    """An engine with attention DP that stores, moves and evicts at random, and what it holds.

    Two attention windows, blocks that are not full, one LoRA adapter; hashes signed.
    """

    def __init__(self, seed: int, ranks: int) -> None:
        self.random = random.Random(seed)
        self.ranks = ranks
        self.ids = [0] * ranks
        self.held: list[dict[int, tuple[str, str | None, int | None]]] = [{} for _ in range(ranks)]
        self.partial: list[list[int]] = [[] for _ in range(ranks)]

    def start(self) -> Iterator[dict[str, Any]]:
        for rank in range(self.ranks):
            yield created(self._id(rank), attention_dp_rank=rank, window_size=32)
            yield created(self._id(rank), attention_dp_rank=rank)

    def step(self) -> Iterator[dict[str, Any]]:
        rank = self.random.randrange(self.ranks)
        held = self.held[rank]
        here = {"attention_dp_rank": rank}
        what = self.random.random()
        if what < 0.5 or not held:
            parent = self.random.choice([None, *held])
            adapter = self.random.choice([None, "a"]) if parent is None else held[parent][1]
            more: dict[str, Any] = {"lora_name": adapter} if adapter else {}
            chain = [self._hash() for _ in range(self.random.randrange(1, 5))]
            blocks = [block(value, **more) for value in chain]
            before = parent
            for value in chain:
                held[value] = ("gpu", adapter, before)
                before = value
            if self.random.random() < 0.3:
                self.partial[rank].append(self._hash())
                blocks.append(block(self.partial[rank][-1], tokens=2, **more))
            yield stored(self._id(rank), *blocks, parent=parent, **here)
            yield stored(self._id(rank), *blocks, parent=parent, window_size=32, **here)
        elif what < 0.7:
            value = self.random.choice([*held])
            medium, adapter, parent = held[value]
            held[value] = ("cpu" if medium == "gpu" else "gpu", adapter, parent)
            new = 1 if medium == "gpu" else 0
            yield updated(self._id(rank), value, 1 - new, new, **here)
        else:
            gone = self.random.sample([*held], min(len(held), self.random.randrange(1, 6)))
            for value in gone:
                del held[value]
            if self.partial[rank]:
                gone.append(self.partial[rank].pop())
            yield removed(self._id(rank), *gone, **here)
            yield removed(self._id(rank), *gone, window_size=32, **here)

    def nothing(self, rank: int) -> Iterator[dict[str, Any]]:
        """An event that changes no block."""
        yield updated(self._id(rank), 1, None, None, attention_dp_rank=rank)

    def expected(self, rank: int) -> Contents:
        found: Contents = {}
        for value, (medium, adapter, parent) in self.held[rank].items():
            lane = found.setdefault((medium, adapter), {})
            lane[value % (1 << 64)] = None if parent is None else parent % (1 << 64)
        return found

    def _id(self, rank: int) -> int:
        self.ids[rank] += 1
        return self.ids[rank] - 1

    def _hash(self) -> int:
        return self.random.randrange(-(1 << 63), 1 << 63)


def contents(source: Source) -> Contents:
    return {
        (lane.medium, lane.adapter): dict(lane.parents) for lane in source.lanes() if lane.parents
    }
