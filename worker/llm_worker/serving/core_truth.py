"""What the engine itself holds, told by the engine core's own process.

Runs inside vLLM's engine core, put there by `startup`: a method that tells the hashes in the block
pool together with the number of the batch at which that is true, and a publisher that is not kept
waiting. vLLM 0.32 publishes a step's events at the end of the step; those of a reset (sleep, weight
update, ``/reset_prefix_cache``) stay queued until the next step that has work, and until then every
index is wrong about an idle engine. Here they go out with the reset. Its ``AllBlocksCleared`` does
not say that it is of the GPU's pool, while a connector, whose blocks are in the same stream, was
reset only if that was asked for, and says nothing of it. Here the clear says which blocks it means.
Imports nothing of vLLM: it is handed the engine core, whose modules are loaded where it runs.
Never raises out of a hook.
Source: vllm/v1/engine/core.py, vllm/v1/core/block_pool.py, vllm/v1/core/sched/scheduler.py,
vllm/distributed/kv_events.py, 0.32.0.
"""

from __future__ import annotations

import functools
import logging
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

log = logging.getLogger(__name__)

METHOD = "llm_worker_kv_truth"  # of EngineCore
_GROUP_BYTES = 4  # vLLM's key is the hash and the group, big-endian
_COUNT = "_llm_worker_published"
_GPU, _ALL = "GPU", "ALL"  # the media that a clear may be of
_CONNECTORS = ("CPU", "STORAGE")


@dataclass(frozen=True, slots=True)
class Hashing:
    """What it takes to hash a prompt as this engine does."""

    none_hash: bytes  # the first block's parent; empty: no block is hashed
    hash_block_size: int  # tokens
    block_size: int  # tokens; of the first KV-cache group, a multiple of it
    integers: bool  # events name blocks by 64 bits of the hash

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Hashing:
        """From what `held` told."""
        size = told["hash_block_size"]
        sizes = told["block_sizes"]
        block_size = sizes[0] if sizes and sizes[0] % size == 0 else size
        return cls(told["none_hash"], size, block_size, told["integers"])


def count_published(original: Callable[..., Any]) -> Any:
    """Wrap ``ZmqEventPublisher.publish``: its sequence is given by another thread, later."""

    @functools.wraps(original)
    def publish(self: Any, events: Any) -> Any:
        result = original(self, events)
        setattr(self, _COUNT, getattr(self, _COUNT, 0) + 1)
        return result

    return publish


def announce_reset(original: Callable[..., Any]) -> Any:
    """Wrap ``EngineCore.reset_prefix_cache``."""

    @functools.wraps(original)
    def reset_prefix_cache(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        try:
            if _publishes(self):
                asked = kwargs.get("reset_connector", args[1] if len(args) > 1 else False)
                _publish(self, _after_reset(self.scheduler, bool(asked), bool(result)))
        except Exception:
            log.warning("the reset is published with the next step only", exc_info=True)
        return result

    return reset_prefix_cache


def _after_reset(scheduler: Any, connector_too: bool, succeeded: bool) -> list[Any]:
    """What is queued when a reset has been made, and of which blocks that was.

    A connector that was asked to reset, and did not refuse, counts as empty. Where the pool could
    not be reset, whether the connector refused is not known: better too few of its blocks are held
    by an index than some that are gone.
    """
    connector, kinds = scheduler.connector, sys.modules["vllm.distributed.kv_events"]
    events = list(scheduler.kv_cache_manager.take_events())
    if connector is None:
        return events  # as vLLM says it: the pool's blocks are all
    rest = [event for event in events if type(event) is not kinds.AllBlocksCleared]
    pool_too = len(rest) < len(events)
    if connector_too:
        told = _take_events(connector)
        rest += [event for event in told if type(event) is not kinds.AllBlocksCleared]
    if pool_too:
        media = [_ALL if connector_too and succeeded else _GPU]
    else:
        media = list(_CONNECTORS) if connector_too else []
    return rest + [_cleared(kinds, medium) for medium in media]


def _take_events(connector: Any) -> list[Any]:
    """What a connector would tell after the next step only, behind its clear."""
    try:
        return list(connector.take_events())
    except Exception:
        log.warning("the connector tells of its blocks after the reset only", exc_info=True)
        return []


def _cleared(kinds: Any, medium: str) -> Any:
    """vLLM's event with the medium, which it does not have; who knows none reads it as vLLM's."""
    import msgspec

    base = kinds.AllBlocksCleared
    return msgspec.defstruct(base.__name__, [("medium", str)], bases=(base,))(medium)


def add(_: Callable[..., Any]) -> Any:
    """Give ``EngineCore`` the method `METHOD`."""

    def llm_worker_kv_truth(self: Any, full: bool) -> dict[str, Any]:
        return held(self, full)

    return llm_worker_kv_truth


def flush(core: Any) -> None:
    """Publish the events that are queued; on the engine core's own thread, between two steps."""
    if _publishes(core):
        _publish(core, core.scheduler.kv_cache_manager.take_events())


def _publishes(core: Any) -> bool:
    """Whether events are on."""
    return hasattr(core.scheduler.kv_event_publisher, "_event_queue")


def _publish(core: Any, events: list[Any]) -> None:
    if events:
        batch = sys.modules["vllm.distributed.kv_events"].KVEventBatch
        core.scheduler.kv_event_publisher.publish(batch(ts=time.time(), events=events))


def held(core: Any, full: bool) -> dict[str, Any]:
    """The blocks that the engine could reuse now.

    Returns:
        ``rank``; ``sequence``: of the last batch published, -1 before the first, None where there
        is no publisher; ``quiet``: nothing runs, and without that there are no contents;
        ``digests``: group → blocks, xor and sum of the low 64 bits of their hashes; with ``full``
        also ``hashes``: group → the hashes one after the other, ``width`` bytes each; and what
        hashing prompts takes: ``none_hash`` (the first block's parent), ``hash_block_size`` and
        ``block_sizes`` (tokens; of each group).
    """
    scheduler = core.scheduler
    flush(core)
    manager = scheduler.kv_cache_manager
    pool = manager.block_pool
    utils = sys.modules["vllm.v1.core.kv_cache_utils"]
    integers = bool(utils.envs.VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES)
    publisher = scheduler.kv_event_publisher
    sequence = getattr(publisher, _COUNT, 0) - 1 if hasattr(publisher, "_event_queue") else None
    truth: dict[str, Any] = {
        "rank": core.vllm_config.parallel_config.data_parallel_index,
        "sequence": sequence,
        "quiet": not scheduler.has_unfinished_requests(),
        "integers": integers,
        "none_hash": getattr(utils, "NONE_HASH", b""),
        "hash_block_size": pool.hash_block_size,
        "block_sizes": [
            group.kv_cache_spec.block_size for group in manager.kv_cache_config.kv_cache_groups
        ],
    }
    # One that computes has moved on by the time anybody compares, and would wait for the contents.
    keys = list(pool.cached_block_hash_to_block._cache) if truth["quiet"] else []
    return truth | _contents(keys, integers, full)


def _contents(keys: list[bytes], integers: bool, full: bool) -> dict[str, Any]:
    """Digest and hashes of the keys, by group. 50 ns a block: nothing is computed meanwhile."""
    import numpy as np

    digests: dict[str, tuple[int, int, int]] = {}
    hashes: dict[str, bytes] = {}
    width = len(keys[0]) if keys else 0
    table = np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), width)
    groups = np.ascontiguousarray(table[:, width - _GROUP_BYTES :]).view(">u4").ravel()
    for group in np.unique(groups):
        rows = table[groups == group][:, : width - _GROUP_BYTES]
        low = np.ascontiguousarray(rows[:, -8:]).view(">u8").ravel().astype(np.uint64)
        xor = int(np.bitwise_xor.reduce(low))
        digests[str(group)] = (len(low), xor, int(low.sum(dtype=np.uint64)))
        if full:
            hashes[str(group)] = (
                np.ascontiguousarray(rows[:, -8:]) if integers else rows
            ).tobytes()
    return {
        "digests": digests,
        "hashes": hashes,
        "width": 8 if integers else max(0, width - _GROUP_BYTES),
    }
