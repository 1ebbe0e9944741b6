"""What kv/truth.py and engine.py take for granted of vLLM's block pool and events, at the pin."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

pytestmark = pytest.mark.needs("vllm")


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_the_block_pool_keys_its_blocks_by_hash_and_group() -> None:
    """What the engine core tells is read from there."""
    from vllm.v1.core.block_pool import BlockHashToBlockMap, BlockPool
    from vllm.v1.core.kv_cache_utils import get_group_id, make_block_hash_with_group_id

    key = make_block_hash_with_group_id(bytes(range(32)), 7)
    assert key == bytes(range(32)) + b"\0\0\0\7"
    assert get_group_id(key) == 7
    assert BlockHashToBlockMap()._cache == {}
    pool = BlockPool(2, enable_caching=True, hash_block_size=16, enable_kv_cache_events=True)
    assert isinstance(pool.cached_block_hash_to_block, BlockHashToBlockMap)
    assert pool.hash_block_size == 16
    assert pool.reset_prefix_cache()
    assert len(pool.take_events()) == 1


def test_events_name_a_block_by_the_low_64_bits_of_its_hash() -> None:
    """So do we, of the engine's hashes and of prompts."""
    from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

    value = bytes(range(100, 132))
    assert maybe_convert_block_hash(value) == int.from_bytes(value[-8:], "big")


def test_the_functions_that_hash_a_prompt_are_called_as_they_expect() -> None:
    """`engine.hash_blocks` hands them what a request would."""
    from vllm.v1.core import kv_cache_utils

    assert parameters(kv_cache_utils.hash_block_tokens) == [
        "hash_function", "parent_block_hash", "curr_block_token_ids", "extra_keys",
    ]  # fmt: skip
    assert parameters(kv_cache_utils.generate_block_hash_extra_keys) == [
        "request", "start_token_idx", "end_token_idx", "start_mm_idx",
    ]  # fmt: skip


def test_a_publisher_has_a_queue_and_a_batch_is_made_of_time_and_events() -> None:
    """That is how a flush publishes, and how a publisher is told from none."""
    from vllm.distributed.kv_events import (
        AllBlocksCleared,
        KVEventBatch,
        NullEventPublisher,
        ZmqEventPublisher,
    )

    assert not hasattr(NullEventPublisher(), "_event_queue")
    assert "_event_queue" in inspect.getsource(ZmqEventPublisher.__init__)
    assert parameters(ZmqEventPublisher.publish)[1:] == ["events"]
    assert KVEventBatch(ts=1.0, events=[AllBlocksCleared()]).data_parallel_rank is None


def test_utility_calls_reach_any_method_of_the_engine_core_on_every_rank() -> None:
    """The truth is asked for that way."""
    from vllm.v1.engine.core import EngineCoreProc
    from vllm.v1.engine.core_client import AsyncMPClient

    assert parameters(AsyncMPClient.call_utility_all_async)[:3] == ["self", "method", "args"]
    assert "getattr(self, method_name)" in inspect.getsource(EngineCoreProc._handle_client_request)
