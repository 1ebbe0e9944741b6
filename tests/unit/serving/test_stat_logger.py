"""The recorder and the ledger on vLLM's own stats classes, without an engine."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from llm_worker.metrics import STAGES, StatMetrics
from llm_worker.settings.worker import GoodputTargets

pytestmark = pytest.mark.needs("vllm")

LABELS = {"model_name": "m", "engine": "0"}
TARGETS = GoodputTargets(ttft_seconds=1.0, tpot_seconds=0.1, e2e_seconds=30.0)


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(f"llm_worker_{name}", labels)


def config(blocks: int = 11, ranks: int = 1, runner: str = "generate", **cache: Any) -> Any:
    """The parts of a VllmConfig that the stat logger reads; the contract tests hold the names."""
    return SimpleNamespace(
        instance_id=f"unit-{blocks}-{ranks}-{id(cache)}",
        model_config=SimpleNamespace(served_model_name="m", max_model_len=2048, runner_type=runner),
        cache_config=SimpleNamespace(
            **{
                "num_gpu_blocks": blocks,
                "block_size": 16,
                "kv_cache_size_tokens": blocks // ranks * 16,
                "effective_attention_block_size": 16,
            }
            | cache
        ),
        scheduler_config=SimpleNamespace(max_num_seqs=8, max_num_batched_tokens=64),
        parallel_config=SimpleNamespace(
            tensor_parallel_size=1,
            pipeline_parallel_size=1,
            data_parallel_size=ranks,
            prefill_context_parallel_size=1,
            decode_context_parallel_size=1,
            data_parallel_index=0,
            data_parallel_rank_local=None,
            data_parallel_size_local=ranks,
            local_engines_only=False,
        ),
    )


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Advances the recorder's monotonic clock, which stands still otherwise."""
    from llm_worker.serving import ledger, recorder

    now = [100.0]
    fake = SimpleNamespace(monotonic=lambda: now[0], time=lambda: 1.7e9 + now[0])
    monkeypatch.setattr(recorder, "time", fake)
    monkeypatch.setattr(ledger, "time", fake)

    def advance(seconds: float) -> None:
        now[0] += seconds

    return advance


def make_logger(registry: CollectorRegistry, vllm_config: Any, indexes: list[int]) -> Any:
    from llm_worker.serving import stat_logger as stats

    return stats.StatLogger(vllm_config, indexes, StatMetrics(registry), TARGETS)


@pytest.fixture
def logger(registry: CollectorRegistry, clock: Callable[[float], None]) -> Any:
    return make_logger(registry, config(), [0])


def scheduler(running: int = 1, usage: float = 0.0, **fields: Any) -> Any:
    from vllm.v1.metrics.stats import SchedulerStats

    return SchedulerStats(num_running_reqs=running, kv_cache_usage=usage, **fields)


def iteration(
    first_tokens: int = 0, decoding: int = 0, computed: int = 0, finished: tuple[Any, ...] = ()
) -> Any:
    from vllm.v1.metrics.stats import IterationStats

    stats = IterationStats()
    stats.time_to_first_tokens_iter = [0.1] * first_tokens
    stats.inter_token_latencies_iter = [0.01] * decoding
    stats.num_generation_tokens = first_tokens + decoding
    stats.prompt_token_stats.computed = computed
    stats.finished_requests = list(finished)
    return stats


def finished(reason: str = "LENGTH", **fields: Any) -> Any:
    from vllm.v1.engine import FinishReason
    from vllm.v1.metrics.stats import FinishedRequestStats

    # 10 tokens: the first after 0.5 s, the others within 0.45 s
    values = {
        "e2e_latency": 0.95,
        "decode_time": 0.45,
        "mean_time_per_output_token": 0.05,
        "num_generation_tokens": 10,
    } | fields
    return FinishedRequestStats(finish_reason=FinishReason[reason], **values)


# ---------------------------------------------------------------- capacity


def test_an_idle_rank_shows_its_capacity_before_the_first_step(
    registry: CollectorRegistry, logger: Any
) -> None:
    """Blocks without the null block, tokens, limits and an idle cache; bytes unknown, so absent."""
    assert value(registry, "kv_capacity_blocks", **LABELS) == 10
    assert value(registry, "kv_capacity_tokens", **LABELS) == 160
    assert value(registry, "kv_active_blocks", **LABELS) == 0
    assert value(registry, "kv_block_size_tokens", **LABELS) == 16
    assert value(registry, "engine_max_num_seqs", **LABELS) == 8
    assert value(registry, "engine_parallel_size", dimension="data", **LABELS) == 1
    assert value(registry, "kv_capacity_bytes", **LABELS) is None


def test_ranks_that_have_not_told_share_the_sum_evenly(registry: CollectorRegistry) -> None:
    """vLLM's num_gpu_blocks is the sum over ranks; a null block is taken off each."""
    make_logger(registry, config(blocks=22, ranks=2), [0, 1])
    for engine in ("0", "1"):
        assert value(registry, "kv_capacity_blocks", model_name="m", engine=engine) == 10
        assert value(registry, "kv_capacity_tokens", model_name="m", engine=engine) == 160


def test_ranks_that_differ_show_what_each_of_them_reported(
    registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the ready messages say wins over an even share, in blocks, tokens and bytes."""
    from llm_worker.serving import hooks as startup
    from llm_worker.serving import recorder

    vllm_config = config(blocks=32, ranks=2)
    facts = {
        0: startup.RankFacts(blocks=11, kv_groups=1, kv_bytes=1100, load_seconds=2.0),
        1: startup.RankFacts(blocks=21, kv_groups=1, kv_bytes=2100, load_seconds=3.0),
    }
    monkeypatch.setitem(startup._reported, vllm_config.instance_id, facts)
    make_logger(registry, vllm_config, [0, 1])
    for engine, blocks in (("0", 10), ("1", 20)):
        labels = {"model_name": "m", "engine": engine}
        assert value(registry, "kv_capacity_blocks", **labels) == blocks
        assert value(registry, "kv_capacity_tokens", **labels) == blocks * 16
        assert value(registry, "kv_capacity_bytes", **labels) == blocks * 100
    assert value(registry, "model_load_seconds", model_name="m") == 3.0
    info = recorder.engine_cache_info(vllm_config)
    assert (info.blocks, info.kv_bytes, info.rank_blocks) == (32, 3200, {0: 11, 1: 21})


def test_tokens_of_a_hybrid_model_are_vllms_own_figure_without_the_null_block(
    registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks times block size would count tokens that need a block in every group several times."""
    from llm_worker.serving import hooks as startup

    vllm_config = config(blocks=11, kv_cache_size_tokens=55)
    facts = startup.RankFacts(blocks=11, kv_groups=3, kv_bytes=None, load_seconds=None)
    monkeypatch.setitem(startup._reported, vllm_config.instance_id, {0: facts})
    make_logger(registry, vllm_config, [0])
    assert value(registry, "kv_capacity_tokens", **LABELS) == 50


def test_an_engine_without_a_kv_cache_has_limits_but_no_capacity(
    registry: CollectorRegistry,
) -> None:
    """Ray's data-parallel engines and attention-free models report none."""
    make_logger(registry, config(blocks=0), [0])
    assert value(registry, "kv_capacity_blocks", **LABELS) is None
    assert value(registry, "engine_max_num_seqs", **LABELS) == 8


def test_a_pooling_model_has_nothing_to_say(registry: CollectorRegistry) -> None:
    """Its ranks record nothing at all, and nothing fails."""
    logger = make_logger(registry, config(runner="pooling"), [0])
    logger.record(scheduler(), iteration(first_tokens=1, finished=(finished(),)), None, 0)
    logger.record_sleep_state(1, 1)
    assert value(registry, "engine_steps_total", **LABELS) is None
    assert value(registry, "stat_logger_errors_total", stage="scheduler") == 0


# ---------------------------------------------------------------- steps


def test_active_blocks_are_exact_for_every_number_of_them(
    registry: CollectorRegistry, logger: Any
) -> None:
    """vLLM tells a ratio; counting back gives every whole number of blocks, tokens and all."""
    for active in range(11):
        logger.record(scheduler(usage=1.0 - (10 - active) / 10), None, None, 0)
        assert value(registry, "kv_active_blocks", **LABELS) == active
        assert value(registry, "kv_active_tokens", **LABELS) == active * 16


def test_an_interval_never_spans_an_idle_gap(
    registry: CollectorRegistry, logger: Any, clock: Callable[[float], None]
) -> None:
    """Two bursts of three steps, a minute apart: four intervals, none of them long."""
    for _ in range(2):
        for running in (2, 2, 0):  # the last step finishes everything
            logger.record(scheduler(running), iteration(decoding=2), None, 0)
            clock(0.02)
        logger.record(scheduler(0), None, None, 0)  # vLLM's last call of a burst: no step
        clock(60.0)
    assert value(registry, "engine_steps_total", **LABELS) == 6
    assert value(registry, "engine_step_interval_seconds_count", **LABELS) == 4
    assert value(registry, "engine_step_interval_seconds_sum", **LABELS) == pytest.approx(0.08)


def test_a_step_that_only_computed_part_of_a_prompt_is_a_step(
    registry: CollectorRegistry, logger: Any, clock: Callable[[float], None]
) -> None:
    """A chunk of a prefill has no output; the running request says that it ran."""
    logger.record(scheduler(1), None, None, 0)
    clock(0.5)
    logger.record(scheduler(1), None, None, 0)
    assert value(registry, "engine_steps_total", **LABELS) == 2
    assert value(registry, "engine_step_interval_seconds_sum", **LABELS) == 0.5


def test_stats_without_a_step_move_no_counter_and_no_timestamp(
    registry: CollectorRegistry, logger: Any
) -> None:
    """While all requests wait for remote KV vLLM sends stats every millisecond; nothing ran."""
    logger.record(scheduler(0, num_waiting_reqs=3), None, None, 0)
    assert value(registry, "engine_steps_total", **LABELS) == 0
    assert value(registry, "engine_last_step_timestamp_seconds", **LABELS) is None


def test_the_time_asleep_is_no_step_interval(
    registry: CollectorRegistry, logger: Any, clock: Callable[[float], None]
) -> None:
    """Sleep freezes running requests; the first step after waking starts afresh."""
    logger.record(scheduler(1), iteration(decoding=1), None, 0)
    logger.record_sleep_state(1, 1)
    clock(600.0)
    logger.record_sleep_state(0, 0)
    logger.record(scheduler(1), iteration(decoding=1), None, 0)
    assert value(registry, "engine_step_interval_seconds_count", **LABELS) == 0


def test_batch_composition_is_read_from_the_outputs(
    registry: CollectorRegistry, logger: Any
) -> None:
    """Two prefills of 30 computed tokens and five decodes: seven requests, 35 tokens."""
    logger.record(scheduler(7), iteration(first_tokens=2, decoding=5, computed=30), None, 0)
    got = {
        (unit, phase): value(registry, f"batch_{unit}_sum", phase=phase, **LABELS)
        for unit in ("requests", "tokens")
        for phase in ("prefill", "decode")
    }
    assert got == {
        ("requests", "prefill"): 2,
        ("requests", "decode"): 5,
        ("tokens", "prefill"): 30,
        ("tokens", "decode"): 5,
    }
    assert value(registry, "engine_step_execution_seconds_count", **LABELS) is None


def test_the_engines_own_account_of_a_step_wins(registry: CollectorRegistry, logger: Any) -> None:
    """With iteration details the batch is exact and the execution time is the engine's."""
    from vllm.v1.metrics.stats import SchedulerIterationDetails

    details = SchedulerIterationDetails(
        iteration_index=1,
        num_ctx_requests=3,
        num_ctx_tokens=48,
        num_generation_requests=4,
        num_generation_tokens=8,
        elapsed_ms=12.5,
    )
    logger.record(scheduler(7, iteration_details=details), iteration(decoding=4), None, 0)
    assert value(registry, "batch_requests_sum", phase="prefill", **LABELS) == 3
    assert value(registry, "batch_tokens_sum", phase="prefill", **LABELS) == 48
    assert value(registry, "batch_tokens_sum", phase="decode", **LABELS) == 8
    assert value(registry, "engine_step_execution_seconds_sum", **LABELS) == 0.0125


def test_a_dummy_iteration_is_no_batch(registry: CollectorRegistry, logger: Any) -> None:
    """An idle data-parallel rank runs along with empty batches while others work."""
    from vllm.v1.metrics.stats import SchedulerIterationDetails

    details = SchedulerIterationDetails(1, 0, 0, 0, 0, 3.0, is_dummy=True)
    logger.record(scheduler(0, iteration_details=details), None, None, 0)
    assert value(registry, "engine_steps_total", **LABELS) == 0
    assert value(registry, "batch_tokens_count", phase="decode", **LABELS) == 0
    assert value(registry, "engine_step_execution_seconds_count", **LABELS) is None


def test_recomputed_tokens_are_those_a_resumed_request_no_longer_finds_in_the_cache(
    registry: CollectorRegistry, logger: Any
) -> None:
    """Of 300 tokens of a preempted request 128 were still cached: 172 are computed again."""
    from vllm.v1.metrics.stats import PrefixCacheStats

    cache = PrefixCacheStats()
    cache.record(num_tokens=300, num_hits=128, preempted=True)
    cache.record(num_tokens=50, num_hits=0, preempted=False)  # a new request wastes nothing
    logger.record(scheduler(2, prefix_cache_stats=cache), None, None, 0)
    assert value(registry, "preemption_resumed_requests_total", **LABELS) == 1
    assert value(registry, "preemption_recomputed_tokens_total", **LABELS) == 172


# ---------------------------------------------------------------- goodput


@pytest.mark.parametrize(
    ("fields", "good", "missed"),
    [
        ({}, 1, set()),
        # the first token after 1.05 s
        ({"e2e_latency": 1.5, "decode_time": 0.45}, 0, {"ttft"}),
        ({"mean_time_per_output_token": 0.11}, 0, {"tpot"}),
        ({"e2e_latency": 31.0, "decode_time": 30.5}, 0, {"e2e"}),
        (
            {"e2e_latency": 40.0, "decode_time": 30.0, "mean_time_per_output_token": 3.0},
            0,
            {"ttft", "tpot", "e2e"},
        ),
        # one token: no time per output token, whatever the field says
        ({"num_generation_tokens": 1, "mean_time_per_output_token": 9.9}, 1, set()),
        # exactly on target is met
        ({"mean_time_per_output_token": 0.1}, 1, set()),
        ({"reason": "ABORT"}, 0, set()),
        ({"reason": "ERROR"}, 0, set()),
        ({"reason": "STOP"}, 1, set()),
    ],
)
def test_a_request_is_good_when_it_meets_all_targets_together(
    registry: CollectorRegistry, logger: Any, fields: dict[str, Any], good: int, missed: set[str]
) -> None:
    """Every finished request is evaluated once; what it missed is told per objective."""
    logger.record(scheduler(), iteration(finished=(finished(**fields),)), None, 0)
    assert value(registry, "goodput_evaluated_requests_total", **LABELS) == 1
    assert value(registry, "goodput_requests_total", **LABELS) == good
    for objective in ("ttft", "tpot", "e2e"):
        counted = value(registry, "goodput_missed_requests_total", objective=objective, **LABELS)
        assert counted == (objective in missed)


def test_ttft_of_a_finished_request_is_vllms_own_when_the_frontend_keeps_up() -> None:
    """e2e - decode equals the first-token latency vLLM measured, given one output delay."""
    from vllm.v1.engine import FinishReason
    from vllm.v1.metrics.stats import IterationStats, RequestStateStats

    state = RequestStateStats(arrival_time=1000.0, num_generation_tokens=10)
    delay = 0.003  # engine's timestamp to frontend's iteration, the same for both outputs
    state.first_token_ts, state.last_token_ts = 50.0, 52.0
    first, last = IterationStats(), IterationStats()
    first.iteration_timestamp, last.iteration_timestamp = 1000.4 + delay, 1002.4 + delay
    last.update_from_finished_request(FinishReason.STOP, "r", 5, 10, state)
    (request,) = last.finished_requests
    ttft = first.iteration_timestamp - state.arrival_time
    assert request.e2e_latency - request.decode_time == pytest.approx(ttft)


# ---------------------------------------------------------------- never raising


class Poison:
    """Every attribute fails, as after a vLLM that renamed its fields."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"no field {name}")

    def __bool__(self) -> bool:
        raise RuntimeError("not even true or false")


@pytest.mark.parametrize("stage", ["scheduler", "iteration", "finished"])
def test_a_stage_that_fails_is_counted_and_the_others_are_recorded(
    registry: CollectorRegistry, logger: Any, stage: str
) -> None:
    """An exception out of record() would end vLLM's output handler; none leaves, none is silent."""
    scheduler_stats = scheduler(2, usage=0.5)
    stats = iteration(decoding=2, finished=(finished(),))
    if stage == "scheduler":
        scheduler_stats.prefix_cache_stats = Poison()
    elif stage == "iteration":
        stats.prompt_token_stats = Poison()
    else:
        stats.finished_requests = [finished(), Poison()]
    logger.record(scheduler_stats, stats, None, 0)
    for name in STAGES:
        errors = value(registry, "stat_logger_errors_total", stage=name)
        assert errors == (1 if name == stage else 0)
    assert value(registry, "kv_active_blocks", **LABELS) == 5
    assert value(registry, "goodput_requests_total", **LABELS) == 1
    batches = value(registry, "batch_requests_count", phase="decode", **LABELS)
    assert batches == (0 if stage == "iteration" else 1)


def test_stats_that_are_poison_altogether_raise_nowhere(
    registry: CollectorRegistry, logger: Any
) -> None:
    """All three stages fail, all three are counted, and the next step is recorded again."""
    logger.record(Poison(), Poison(), Poison(), 0)
    for stage in ("scheduler", "iteration", "finished"):
        assert value(registry, "stat_logger_errors_total", stage=stage) == 1
    logger.record(scheduler(1), iteration(decoding=1), None, 0)
    assert value(registry, "engine_steps_total", **LABELS) == 1


def test_a_failing_stage_warns_once_a_minute(
    logger: Any, clock: Callable[[float], None], caplog: pytest.LogCaptureFixture
) -> None:
    """A fault that repeats every step is one line and a counter, not a flood."""
    with caplog.at_level(logging.WARNING, logger="llm_worker.serving.ledger"):
        for _ in range(50):
            logger.record(Poison(), None, None, 0)
        assert [getattr(record, "stage", None) for record in caplog.records] == [
            "scheduler",
            "iteration",
        ]
        clock(61.0)
        logger.record(Poison(), None, None, 0)
    assert len(caplog.records) == 4


def test_a_configuration_that_vllm_renamed_leaves_a_logger_that_says_nothing(
    registry: CollectorRegistry,
) -> None:
    """The engine is up by then; its start is not undone because we cannot read something."""
    broken = config()
    del broken.scheduler_config.max_num_seqs
    logger = make_logger(registry, broken, [0])
    logger.log_engine_initialized()
    logger.record(scheduler(), iteration(decoding=1), None, 0)
    assert (value(registry, "stat_logger_errors_total", stage="scheduler") or 0) >= 1


def test_a_rank_that_joins_later_is_recorded(registry: CollectorRegistry, logger: Any) -> None:
    """Elastic scale-up brings an engine index that was not there at the start."""
    logger.record(scheduler(1), iteration(decoding=1), None, 3)
    assert value(registry, "engine_steps_total", model_name="m", engine="3") == 1


def test_bind_gives_vllm_a_class_it_treats_as_aggregate(registry: CollectorRegistry) -> None:
    """Only aggregate loggers are told of sleep; vLLM decides by issubclass."""
    from vllm.v1.metrics.loggers import AggregateStatLoggerBase

    from llm_worker.serving import stat_logger as stats

    cls = stats.bind(StatMetrics(registry), TARGETS)
    assert issubclass(cls, AggregateStatLoggerBase)
    cls(vllm_config=config(), engine_indexes=[0])
    assert value(registry, "kv_capacity_blocks", **LABELS) == 10


def test_the_plugin_says_nothing_where_our_own_worker_runs() -> None:
    """vLLM loads installed plugins always; counting twice would be worse than nothing."""
    from prometheus_client import REGISTRY

    from llm_worker.serving import stat_logger as stats

    stats.bind(StatMetrics(CollectorRegistry()), TARGETS)
    plugin = stats.PluginStatLogger(vllm_config=config(), engine_indexes=[0])
    plugin.record(scheduler(), iteration(decoding=1), None, 0)
    plugin.record_sleep_state(1, 1)
    plugin.log_engine_initialized()
    assert REGISTRY.get_sample_value("llm_worker_engine_steps_total", LABELS) is None


# ---------------------------------------------------------------- ledger


class Engine:
    """Stands where AsyncLLM stands for the wrapper: a name and the original generator."""

    model_config = SimpleNamespace(served_model_name="m")
    closed = 0

    def __init__(self) -> None:
        self.streams: list[Any] = []  # kept, so that none is closed only by garbage collection


def output(done: bool = False, *reasons: str | None) -> Any:
    completions = [SimpleNamespace(finish_reason=reason) for reason in reasons]
    return SimpleNamespace(finished=done, outputs=completions)


def counted(
    registry: CollectorRegistry, script: list[Any], engine: Engine, name: str = "generate"
) -> Callable[..., AsyncGenerator[Any, None]]:
    from llm_worker.serving import ledger

    async def stream() -> AsyncGenerator[Any, None]:
        try:
            for item in script:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            engine.closed += 1

    def original(self: Any, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        self.streams.append(stream())
        outputs: AsyncGenerator[Any, None] = self.streams[-1]
        return outputs

    original.__name__ = name
    ledger._ledger = ledger._Ledger(StatMetrics(registry))
    wrapped = ledger._counted(original)
    return lambda *args, **kwargs: wrapped(engine, *args, **kwargs)


def endings(registry: CollectorRegistry, model: str = "m") -> dict[tuple[str, str], float]:
    found = {}
    for family in registry.collect():
        for sample in family.samples:
            if sample.name == "llm_worker_requests_ended_total" and sample.value:
                labels = sample.labels
                assert labels["model_name"] == model
                found[labels["outcome"], labels["reason"]] = sample.value
    return found


def assert_balanced(registry: CollectorRegistry, received: int, model: str = "m") -> None:
    ended = sum(endings(registry, model).values())
    in_flight = value(registry, "requests_in_flight", model_name=model)
    assert value(registry, "requests_received_total", model_name=model) == received
    assert received == ended + (in_flight or 0)


def failures() -> list[tuple[BaseException, tuple[str, str]]]:
    from vllm.exceptions import MaxQueuedTokensError, QueueOverflowError, VLLMValidationError
    from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

    return [
        (QueueOverflowError(), ("rejected", "max_num_queued_reqs")),
        (MaxQueuedTokensError(), ("rejected", "max_num_queued_tokens")),
        (VLLMValidationError("no"), ("rejected", "invalid")),
        (EngineDeadError(), ("errored", "engine_dead")),
        (EngineGenerateError(), ("errored", "internal")),
        (ValueError("from an input stream"), ("errored", "internal")),
        (asyncio.CancelledError(), ("disconnected", "client")),
    ]


@pytest.mark.parametrize("number", range(7))
def test_every_way_to_fail_is_one_ending_and_reaches_the_caller(
    registry: CollectorRegistry, number: int
) -> None:
    """The exception passes through unchanged, and the request is no longer in flight."""
    error, ending = failures()[number]
    engine = Engine()
    generate = counted(registry, [output(), error], engine)

    async def run() -> None:
        with pytest.raises(type(error)) as caught:
            async for _ in generate():
                assert value(registry, "requests_in_flight", model_name="m") == 1
        assert caught.value is error

    asyncio.run(run())
    assert endings(registry) == {ending: 1}
    assert_balanced(registry, received=1)
    assert engine.closed == 1


@pytest.mark.parametrize("reason", ["stop", "length", "abort", "error", "repetition"])
def test_a_served_request_ends_with_its_finish_reason(
    registry: CollectorRegistry, reason: str
) -> None:
    """The reason of the last output, one ending, nothing in flight."""
    generate = counted(registry, [output(), output(True, reason)], Engine())

    async def run() -> None:
        assert len([_ async for _ in generate()]) == 2

    asyncio.run(run())
    assert endings(registry) == {("finished", reason): 1}
    assert_balanced(registry, received=1)


def test_several_completions_are_one_request(registry: CollectorRegistry) -> None:
    """With n > 1 the last completion that says so gives the reason."""
    script = [output(False, "stop", None), output(True, "stop", "length")]
    generate = counted(registry, script, Engine())

    async def run() -> None:
        async for _ in generate():
            pass

    asyncio.run(run())
    assert endings(registry) == {("finished", "length"): 1}


def test_a_stream_that_is_dropped_is_a_disconnect_and_the_engine_hears_of_it(
    registry: CollectorRegistry,
) -> None:
    """Closing our generator closes vLLM's, where it aborts the request."""
    engine = Engine()
    generate = counted(registry, [output(), output(), output(True, "stop")], engine)

    async def run() -> None:
        outputs = generate()
        await anext(outputs)
        await outputs.aclose()

    asyncio.run(run())
    assert endings(registry) == {("disconnected", "client"): 1}
    assert engine.closed == 1


def test_a_stream_that_is_only_forgotten_is_a_disconnect_too(registry: CollectorRegistry) -> None:
    """Garbage collection closes both generators through the loop."""
    engine = Engine()
    generate = counted(registry, [output(), output()], engine)

    async def run() -> None:
        outputs = generate()
        await anext(outputs)
        del outputs
        for _ in range(5):
            await asyncio.sleep(0)
        assert endings(registry) == {("disconnected", "client"): 1}
        assert engine.closed == 1

    asyncio.run(run())


def test_a_consumer_that_stops_after_the_last_output_was_served(
    registry: CollectorRegistry,
) -> None:
    """``break`` on ``finished`` closes the generator early; that is no disconnect."""
    generate = counted(registry, [output(), output(True, "stop")], Engine())

    async def run() -> None:
        outputs = generate()
        async for item in outputs:
            if item.finished:
                break
        await outputs.aclose()

    asyncio.run(run())
    assert endings(registry) == {("finished", "stop"): 1}


def test_a_generator_that_nobody_advances_was_never_received(registry: CollectorRegistry) -> None:
    """vLLM starts nothing either before the first output is asked for."""
    generate = counted(registry, [output()], Engine())

    async def run() -> None:
        await generate().aclose()

    asyncio.run(run())
    assert value(registry, "requests_received_total", model_name="m") is None


@pytest.mark.parametrize("name", ["generate", "encode"])
def test_an_adapters_requests_are_counted_under_its_name(
    registry: CollectorRegistry, name: str
) -> None:
    """Also where encode() takes it as its fourth positional argument."""
    lora = SimpleNamespace(lora_name="adapter")
    call = counted(registry, [output(True)], Engine(), name)

    async def run() -> None:
        async for _ in (
            call("prompt", None, "id", lora)
            if name == "encode"
            else call("prompt", None, "id", lora_request=lora)
        ):
            pass

    asyncio.run(run())
    assert endings(registry, "adapter") == {("finished", "stop"): 1}
    assert_balanced(registry, 1, "adapter")


def test_a_finish_reason_of_a_newer_vllm_is_counted_as_an_error(
    registry: CollectorRegistry,
) -> None:
    """The label set stays closed and the identity holds."""
    generate = counted(registry, [output(True, "telepathy")], Engine())

    async def run() -> None:
        async for _ in generate():
            pass

    asyncio.run(run())
    assert endings(registry) == {("finished", "error"): 1}


def test_a_ledger_that_fails_serves_on(registry: CollectorRegistry) -> None:
    """A request whose name cannot be read is served uncounted, and the failure is counted."""
    engine = Engine()
    engine.model_config = SimpleNamespace()
    generate = counted(registry, [output(), output(True, "stop")], engine)

    async def run() -> None:
        assert len([_ async for _ in generate()]) == 2

    asyncio.run(run())
    assert value(registry, "stat_logger_errors_total", stage="ledger") == 1
    assert endings(registry) == {}


def test_installing_twice_wraps_once_and_counts_to_the_newest() -> None:
    """Idempotent per process; the second call only redirects."""
    from vllm.v1.engine.async_llm import AsyncLLM

    from llm_worker.serving import ledger

    first, second = StatMetrics(CollectorRegistry()), StatMetrics(CollectorRegistry())
    ledger.install_ledger(first)
    generate, encode = AsyncLLM.generate, AsyncLLM.encode
    ledger.install_ledger(second)
    assert (AsyncLLM.generate, AsyncLLM.encode) == (generate, encode)
    assert not hasattr(generate._llm_worker_original, "_llm_worker_original")
    assert ledger._ledger._metrics is second
