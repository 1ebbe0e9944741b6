"""One rank's step outputs → its metrics, and the capacity read from vLLM's final configuration.

Never reads the environment and never awaits: it runs on vLLM's loop. May raise; `stat_logger`
catches.
Source: vllm/v1/metrics/stats.py, vllm/v1/engine/core_client.py, 0.32.0.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.v1.engine import FinishReason

from llm_worker.metrics import EngineMetrics, StatMetrics
from llm_worker.serving import hooks
from llm_worker.settings.worker import GoodputTargets


@dataclass(frozen=True, slots=True)
class EngineCacheInfo:
    """What the engine was given to work with, final once ``AsyncLLM`` is constructed.

    Blocks and bytes are totals over the ranks that this process serves, the null block of each
    rank included, as vLLM counts them; ``rank_blocks`` has one entry per such rank, in rank order.
    None means that the engine has not told.
    """

    model_name: str
    blocks: int | None
    block_size_tokens: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len_tokens: int
    kv_bytes: int | None
    parallel_sizes: Mapping[str, int]  # dimension -> ways; 1 is not split
    rank_blocks: Mapping[int, int]  # data-parallel rank -> blocks


@dataclass(frozen=True, slots=True)
class _Capacity:
    """Of one rank, the null block excluded. None: the engine has not told."""

    blocks: int
    block_size_tokens: int
    tokens: int | None
    bytes_: int | None


def engine_cache_info(vllm_config: Any) -> EngineCacheInfo:
    """Read blocks, limits and parallel sizes from vLLM's own configuration; no RPC.

    Call it after ``AsyncLLM`` was constructed: before that ``blocks`` is None.
    """
    ranks = _managed_ranks(vllm_config)
    rank_blocks = _rank_blocks(vllm_config, ranks)
    rank_bytes = [
        facts.kv_bytes for facts in map(_facts(vllm_config).get, ranks) if facts is not None
    ]
    known = [size for size in rank_bytes if size is not None]
    return EngineCacheInfo(
        model_name=model_name(vllm_config),
        blocks=sum(rank_blocks.values()) if rank_blocks else None,
        block_size_tokens=vllm_config.cache_config.block_size,
        max_num_seqs=vllm_config.scheduler_config.max_num_seqs,
        max_num_batched_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
        max_model_len_tokens=vllm_config.model_config.max_model_len,
        kv_bytes=sum(known) if len(known) == len(ranks) else None,
        parallel_sizes=_parallel_sizes(vllm_config),
        rank_blocks=rank_blocks,
    )


def make_recorder(
    vllm_config: Any,
    index: int,
    engine_indexes: Sequence[int],
    metrics: StatMetrics,
    targets: GoodputTargets,
) -> Recorder | NullRecorder:
    """Build the recorder of one rank and publish what is known of it before the first request.

    A pooling model has neither first tokens nor decoding nor, mostly, a KV cache: its ranks get a
    ``NullRecorder``, and only the ledger counts their requests.
    """
    if vllm_config.model_config.runner_type == "pooling":
        return NullRecorder()
    engine = metrics.engine(model_name(vllm_config), index)
    engine.set_limits(
        max_num_seqs=vllm_config.scheduler_config.max_num_seqs,
        max_num_batched_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
        max_model_len_tokens=vllm_config.model_config.max_model_len,
        parallel_sizes=_parallel_sizes(vllm_config),
    )
    capacity = _capacity(vllm_config, index, engine_indexes)
    if capacity is not None:
        engine.set_capacity(
            capacity.blocks, capacity.block_size_tokens, capacity.tokens, capacity.bytes_
        )
    return Recorder(engine, capacity, targets)


class NullRecorder:
    """A rank with nothing to say."""

    def scheduler(self, stats: Any, has_outputs: bool) -> None:
        """Ignore it."""

    def iteration(self, scheduler_stats: Any, stats: Any) -> None:
        """Ignore it."""

    def finished(self, requests: Sequence[Any]) -> None:
        """Ignore it."""

    def pause(self) -> None:
        """Ignore it."""


class Recorder:
    """One rank's step outputs → its metrics. May raise; the stat logger catches."""

    def __init__(
        self, engine: EngineMetrics, capacity: _Capacity | None, targets: GoodputTargets
    ) -> None:
        self._engine = engine
        self._blocks = 0 if capacity is None else capacity.blocks
        self._tokens_per_block = _per_block(capacity, "tokens")
        self._bytes_per_block = _per_block(capacity, "bytes_")
        self._ttft = targets.ttft_seconds
        self._tpot = targets.tpot_seconds
        self._e2e = targets.e2e_seconds
        self._previous: float | None = None  # monotonic; None while nothing was running

    def scheduler(self, stats: Any, has_outputs: bool) -> None:
        """Count the step, its interval and the cache in use.

        vLLM also sends stats without a step behind them: one after the last request has finished,
        and one per millisecond while all requests wait for remote KV. Those have neither outputs
        nor running requests. A pause (``pause_generation``) with requests held in place is not
        told to stat loggers, so the interval across one is observed; one across a sleep is not.
        """
        engine = self._engine
        now = time.monotonic()
        running = stats.num_running_reqs
        previous, self._previous = self._previous, now if running else None
        if has_outputs or running:
            engine.steps.inc()
            engine.last_step_timestamp.set(time.time())
            if previous is not None:
                engine.step_interval.observe(now - previous)
        if self._blocks:
            # usage is 1 - free / usable (BlockPool.get_usage), so this is the exact count.
            active = round(stats.kv_cache_usage * self._blocks)
            engine.active_blocks.set(active)
            if self._tokens_per_block is not None:
                engine.active_tokens.set(round(active * self._tokens_per_block))
            if self._bytes_per_block is not None:
                engine.active_bytes.set(round(active * self._bytes_per_block))
        cache = stats.prefix_cache_stats
        if cache.preempted_requests:
            engine.resumed_requests.inc(cache.preempted_requests)
            engine.recomputed_tokens.inc(cache.preempted_queries - cache.preempted_hits)

    def iteration(self, scheduler_stats: Any, stats: Any) -> None:
        """Observe what the step computed.

        The engine's own account (``iteration_details``) is exact. Without it the outputs tell: one
        inter-token latency per decoding request, one first-token latency per completed prefill,
        whose prompt tokens all count here, also those of earlier chunks. The first token of a
        prefill is sampled, not decoded, so it is in no phase's tokens.
        """
        engine = self._engine
        details = None if scheduler_stats is None else scheduler_stats.iteration_details
        if details is not None:
            if details.is_dummy:
                return
            engine.step_execution.observe(details.elapsed_ms / 1000)
            prefill_requests = details.num_ctx_requests
            prefill_tokens = details.num_ctx_tokens
            decode_requests = details.num_generation_requests
            decode_tokens = details.num_generation_tokens
        elif stats is not None:
            prefill_requests = len(stats.time_to_first_tokens_iter)
            prefill_tokens = stats.prompt_token_stats.computed
            decode_requests = len(stats.inter_token_latencies_iter)
            decode_tokens = max(0, stats.num_generation_tokens - prefill_requests)
        else:
            return
        engine.prefill_requests.observe(prefill_requests)
        engine.prefill_tokens.observe(prefill_tokens)
        engine.decode_requests.observe(decode_requests)
        engine.decode_tokens.observe(decode_tokens)

    def finished(self, requests: Sequence[Any]) -> None:
        """Judge finished requests by all three targets together.

        vLLM does not hand the first-token latency over with a finished request, so TTFT is
        ``e2e_latency - decode_time``. That is vLLM's own TTFT plus ``d(last) - d(first)``, where d
        is the time from the engine's timestamp of an output to the frontend's processing of it:
        e2e is taken between frontend times, decode between engine times. The difference is the
        change of the frontend's delay between two tokens, well under a millisecond on a loop that
        keeps up. A request of one token has no time per output token; it can't miss that target.
        """
        engine = self._engine
        for request in requests:
            engine.goodput_evaluated.inc()
            if request.finish_reason in _NEVER_GOOD:
                continue
            good = True
            if request.e2e_latency - request.decode_time > self._ttft:
                engine.goodput_missed_ttft.inc()
                good = False
            if (
                request.num_generation_tokens > 1
                and request.mean_time_per_output_token > self._tpot
            ):
                engine.goodput_missed_tpot.inc()
                good = False
            if request.e2e_latency > self._e2e:
                engine.goodput_missed_e2e.inc()
                good = False
            if good:
                engine.goodput_good.inc()

    def pause(self) -> None:
        """Start the next interval afresh."""
        self._previous = None


_NEVER_GOOD = frozenset({FinishReason.ABORT, FinishReason.ERROR})


def model_name(vllm_config: Any) -> str:
    """The name under which vLLM serves and labels the model."""
    return str(vllm_config.model_config.served_model_name)


def _parallel_sizes(vllm_config: Any) -> dict[str, int]:
    parallel = vllm_config.parallel_config
    return {
        "tensor": parallel.tensor_parallel_size,
        "pipeline": parallel.pipeline_parallel_size,
        "data": parallel.data_parallel_size,
        "prefill_context": parallel.prefill_context_parallel_size,
        "decode_context": parallel.decode_context_parallel_size,
    }


def _facts(vllm_config: Any) -> Mapping[int, hooks.RankFacts]:
    return hooks.ranks(vllm_config)


def _managed_ranks(vllm_config: Any) -> list[int]:
    """Which ranks this process talks to. Source: vllm/v1/engine/core_client.py, MPClient."""
    parallel = vllm_config.parallel_config
    first = parallel.data_parallel_index
    if parallel.data_parallel_rank_local is not None:
        return [first]
    size = (
        parallel.data_parallel_size_local
        if parallel.local_engines_only
        else parallel.data_parallel_size
    )
    return list(range(first, first + size))


def _rank_blocks(vllm_config: Any, ranks: Sequence[int]) -> dict[int, int]:
    """Return each rank's blocks, the null block included; empty where the engine has not told.

    vLLM adds the ranks' blocks up in ``cache_config.num_gpu_blocks``. What each rank reported when
    it got ready is exact also where they differ; without that (the package is not in the engine's
    processes, or ``VLLM_PLUGINS`` leaves it out) the sum is shared evenly.
    """
    facts = _facts(vllm_config)
    if ranks and all(rank in facts for rank in ranks):
        blocks = {rank: facts[rank].blocks for rank in ranks}
    else:
        total = vllm_config.cache_config.num_gpu_blocks or 0
        blocks = {rank: total // len(ranks) for rank in ranks}
    return blocks if all(blocks.values()) else {}


def _capacity(vllm_config: Any, index: int, engine_indexes: Sequence[int]) -> _Capacity | None:
    """Return one rank's usable capacity, or None without a KV cache.

    Tokens: blocks times the block size where there is one KV-cache group, context parallelism
    included. With several groups a request takes blocks of each, and vLLM's own figure
    (``kv_cache_size_tokens``, for requests of the maximum length) is scaled to the usable blocks.
    Bytes: what the rank's workers allocated, scaled likewise; None where they have not told.
    """
    cache = vllm_config.cache_config
    total = _rank_blocks(vllm_config, engine_indexes).get(index, 0)
    if total < 2:
        return None
    usable = total - 1  # BlockPool keeps one null block
    facts = _facts(vllm_config).get(index)
    tokens: int | None = None
    if facts is not None and facts.kv_groups == 1:
        tokens = usable * (cache.effective_attention_block_size or cache.block_size)
    elif cache.kv_cache_size_tokens:
        tokens = cache.kv_cache_size_tokens * usable // total
    bytes_ = None
    if facts is not None and facts.kv_bytes:
        bytes_ = facts.kv_bytes * usable // total
    return _Capacity(usable, cache.block_size, tokens, bytes_)


def _per_block(capacity: _Capacity | None, unit: str) -> float | None:
    if capacity is None:
        return None
    value = getattr(capacity, unit)
    return None if value is None else value / capacity.blocks
