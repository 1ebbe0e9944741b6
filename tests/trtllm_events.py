"""TensorRT-LLM's KV events as its serialiser makes them; written by hand, for it needs a GPU.

Sources, all of NVIDIA/TensorRT-LLM: ``KVCacheEventSerializer`` in tensorrt_llm/_utils.py (keys and
nesting); tests/unittest/llmapi/test_llm_kv_cache_events.py (ids from 0, ``created`` first, blocks
that are not full, ``{}`` among the events); the unit tests of KV-cache manager V2's event manager
(``layer_group_id``, hexadecimal hashes, ``priority`` None, the oldest events dropped).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import Any

BLOCK_SIZE = 4


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
