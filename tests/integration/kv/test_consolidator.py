"""Two real sources merged: vLLM's KV-cache manager and its CPU offloading manager, both evicting.

The offloading connector runs on CUDA only. What decides which blocks are where, and tells of it,
is the scheduler's half of it, which needs no GPU; only the copying is left out.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from llm_worker.kv.follow.consolidator import Consolidator
from llm_worker.kv.follow.stream import Stream
from llm_worker.kv.index.index import Index
from llm_worker.kv.index.source import Source
from llm_worker.kv.records import Hash
from llm_worker.kv.stats import ListenerStats
from llm_worker.kv.wire import Decoder
from llm_worker.serving import core_truth as truth

pytestmark = pytest.mark.needs("vllm")

BLOCK_SIZE = 16
GPU_BLOCKS = 40
CPU_BLOCKS = 24


class Engine:
    """Requests go through vLLM's KV-cache manager; what they computed is offloaded."""

    def __init__(self, seed: int) -> None:
        import torch
        from vllm.distributed.kv_transfer.kv_connector.v1.offloading.events import (
            OffloadingEventsTracker,
            get_offloading_event_group_spec,
        )
        from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import (
            GroupOffloadConfig,
        )
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_manager import KVCacheManager
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.kv_offload.base import OffloadingKVEventsConfig
        from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager

        init_none_hash(sha256)
        self.random = random.Random(seed)
        self.hasher = get_request_block_hasher(BLOCK_SIZE, sha256)
        spec = FullAttentionSpec(
            block_size=BLOCK_SIZE, num_kv_heads=1, head_size=8, dtype=torch.float32
        )
        group = KVCacheGroupSpec(["layer"], spec)
        self.gpu = KVCacheManager(
            KVCacheConfig(num_blocks=GPU_BLOCKS, kv_cache_tensors=[], kv_cache_groups=[group]),
            max_model_len=1024,
            scheduler_block_size=BLOCK_SIZE,
            hash_block_size=BLOCK_SIZE,
            enable_kv_cache_events=True,
        )
        self.cpu = CPUOffloadingManager(CPU_BLOCKS, enable_events=True)
        self.tracker = OffloadingEventsTracker(
            OffloadingKVEventsConfig(enable_kv_cache_events=True, self_describing_kv_events=True)
        )
        self.group = GroupOffloadConfig(
            group_idx=0,
            tokens_per_block=BLOCK_SIZE,
            tokens_per_chunk=BLOCK_SIZE,
            hashes_per_chunk=1,
            kv_event_group_spec=get_offloading_event_group_spec(group),
            sliding_window_size_in_chunks=None,
            kv_cache_spec=spec,
            manager_cls=FullAttentionManager,
        )
        self.prefixes = [self._tokens(3) for _ in range(4)]
        self.served = 0

    def serve(self) -> None:
        """One request: half of the time its beginning was seen before."""
        from vllm.sampling_params import SamplingParams
        from vllm.v1.kv_offload.base import ReqContext, make_offload_key
        from vllm.v1.request import Request

        self.served += 1
        prefix = self.random.choice(self.prefixes) if self.random.random() < 0.5 else []
        request = Request(
            f"r{self.served}",
            prefix + self._tokens(self.random.randrange(1, 6)) + [7],
            SamplingParams(max_tokens=1),
            None,
            block_hasher=self.hasher,
        )
        computed, count, *_ = self.gpu.get_computed_blocks(request)
        slots = self.gpu.allocate_slots(request, request.num_tokens - count, count, computed)
        assert slots is not None
        context = ReqContext(request.request_id)
        self.cpu.on_new_request(context)
        keys = [make_offload_key(value, 0) for value in request.block_hashes]
        stored = self.cpu.prepare_store(keys, context)
        if stored is not None:
            for chunk, key in enumerate(keys):
                if key in stored.keys_to_store:
                    self.tracker.record_store(request, self.group, chunk, key)
            self.cpu.complete_store(stored.keys_to_store, context)
        self.gpu.free(request)

    def reset(self) -> None:
        """The GPU's prefix cache only, as ``reset_prefix_cache`` does without its option."""
        assert self.gpu.reset_prefix_cache()

    def gpu_events(self) -> bytes:
        return encode(self.gpu.take_events())

    def cpu_events(self) -> bytes:
        return encode(self.tracker.take_events(self.cpu.take_events()))

    def truth(self) -> dict[str, set[Hash]]:
        """What both managers hold, by medium, with the hashes as vLLM publishes them."""
        from vllm.v1.core.kv_cache_utils import get_block_hash, maybe_convert_block_hash
        from vllm.v1.kv_offload.base import get_offload_block_hash

        pool = self.gpu.block_pool
        gpu = {
            maybe_convert_block_hash(get_block_hash(block.block_hash))
            for block in pool.blocks
            if block.block_hash is not None
        }
        policy: Any = self.cpu._policy
        cpu = {maybe_convert_block_hash(get_offload_block_hash(key)) for key in policy.chunks}
        return {medium: held for medium, held in (("gpu", gpu), ("cpu", cpu)) if held}

    def _tokens(self, blocks: int) -> list[int]:
        return [self.random.randrange(1000) for _ in range(blocks * BLOCK_SIZE)]


def encode(events: Iterable[Any]) -> bytes:
    from vllm.distributed.kv_events import KVEventBatch

    return msgspec.msgpack.encode(KVEventBatch(0.0, list(events), 0))


def held(source: Source) -> dict[str, set[Hash]]:
    return {lane.medium: set(lane.parents) for lane in source.lanes() if lane.parents}


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_merged_stream_of_two_real_managers_is_what_both_hold(seed: int) -> None:
    """Through hundreds of evictions on both sides, and resets of one of them."""
    engine = Engine(seed)
    decode = Decoder().decode
    merge = Consolidator()
    merged = Index().source("merged", 0)
    resets = 0
    for turn in range(150):
        for _ in range(engine.random.randrange(1, 4)):
            engine.serve()
        if turn % 50 == 30:
            engine.reset()
            resets += 1
        payloads = [("engine", engine.gpu_events()), ("connector", engine.cpu_events())]
        engine.random.shuffle(payloads)
        for source, payload in payloads:
            batch = decode(payload)
            assert not batch.rejected
            merged.apply(merge.feed(source, 0, batch.events))
        assert held(merged) == engine.truth()
    assert merged.stats.removed_blocks > 500, "no pressure"
    assert merged.stats.unknown_removed_blocks == merged.stats.duplicate_blocks == 0
    assert resets == 3
    assert merged.stats.cleared_events == 0, "the connector held on to its blocks"


def test_what_two_publishers_tell_of_is_told_once() -> None:
    """vLLM puts a connector's events into its own stream, and the connector may publish them, too.

    Its own stream's clear is then of the connector's blocks as well, for all that can be read from
    it; the connector's own word for them is what keeps them.
    """
    engine = Engine(7)
    decode = Decoder().decode
    merge = Consolidator()
    merged = Index().source("merged", 0)
    late: list[bytes] = []
    for turn in range(100):
        engine.serve()
        if turn == 60:
            engine.reset()
        offloaded = engine.cpu_events()
        late.append(offloaded)
        for payload in (engine.gpu_events(), offloaded):
            merged.apply(merge.feed("engine", 0, decode(payload).events))
        if engine.random.random() < 0.3:  # its own publisher is behind
            for payload in late:
                merged.apply(merge.feed("connector", 0, decode(payload).events))
            late.clear()
            assert held(merged) == engine.truth()
    assert merge.stats.stored_elsewhere_blocks > 100
    assert merged.stats.duplicate_blocks == 0


class Core:
    """vLLM's own reset of both managers, hooked as in the engine core; one stream for both."""

    def __init__(self, engine: Engine, *, hooked: bool) -> None:
        from vllm.v1.core.sched.scheduler import Scheduler

        self.engine = engine
        self.sequence = 0
        self.source = Index().source("w", 0)
        self.stream = Stream(self.source, ListenerStats("w", 0))
        self.stream.connected()
        self.stream.replay_ended()
        self.scheduler: Any = SimpleNamespace(
            kv_cache_manager=engine.gpu,
            kv_event_publisher=SimpleNamespace(_event_queue=None, publish=self._publish),
            connector=SimpleNamespace(take_events=self._cpu_events, reset_cache=self._reset_cpu),
            running=[],
            log_stats=False,
            aux_output_connector=None,
            reset_connector_cache=lambda: Scheduler.reset_connector_cache(self.scheduler),
        )

        def reset(core: Core, running: bool = False, connector: bool = False) -> Any:
            return Scheduler.reset_prefix_cache(core.scheduler, running, connector)

        self.reset = truth.announce_reset(reset) if hooked else reset

    def step(self) -> None:
        """The end of `Scheduler.update_from_output`."""
        from vllm.distributed.kv_events import KVEventBatch

        events = [*self.engine.gpu.take_events(), *self._cpu_events()]
        if events:
            self._publish(KVEventBatch(ts=time.time(), events=events))

    def _cpu_events(self) -> Iterable[Any]:
        yield from self.engine.tracker.take_events(self.engine.cpu.take_events())

    def _reset_cpu(self) -> bool:
        self.engine.cpu.reset_cache()
        return True

    def _publish(self, batch: Any) -> None:
        message = (self.sequence.to_bytes(8, "big"), msgspec.msgpack.encode(batch))
        self.stream.live([message], 0.0)
        self.sequence += 1


@pytest.mark.parametrize("connector_too", [False, True])
def test_a_reset_of_the_gpus_cache_leaves_a_connectors_blocks_in_the_index(
    connector_too: bool,
) -> None:
    """vLLM's stream says of neither reset which blocks are gone; the hook in the core does."""
    core = Core(Engine(4), hooked=True)
    for turn in range(60):
        core.engine.serve()
        if turn % 20 == 10:
            # What the connector has to tell of this request is not told yet.
            assert core.reset(core, False, connector_too)
            assert held(core.source).get("gpu", set()) == set()
        core.step()
        assert held(core.source) == core.engine.truth()
        assert not core.source.stale
    assert core.source.stats.cleared_events == 3
    assert core.source.stats.unknown_removed_blocks == 0


def test_without_the_hook_a_reset_marks_an_index_that_has_a_connectors_blocks() -> None:
    """They may be there or not: none is claimed, and that is not called the truth."""
    core = Core(Engine(5), hooked=False)
    for _ in range(20):
        core.engine.serve()
        core.step()
    assert not core.source.stale
    assert core.reset(core, False, False)
    core.engine.serve()
    core.step()
    assert core.source.stale == {"other_media"}
    found, truth_now = held(core.source), core.engine.truth()
    assert found["gpu"] == truth_now["gpu"]
    assert found.get("cpu", set()) < truth_now["cpu"]
