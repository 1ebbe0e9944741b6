"""The rows about the engine: steps, cache, batches."""

from __future__ import annotations

from .. import units
from ..boards import Section
from ..panels import (
    GREEN,
    NO_TRAFFIC,
    RED,
    YELLOW,
    Column,
    Reading,
    heatmap,
    query,
    table,
    time_series,
)
from ..promql import (
    BY_ENGINE,
    TARGET,
    aggregate,
    buckets,
    mean,
    quantile,
    rate,
    ratio,
    series,
)
from .names import NO_WORKER, PREFIX

STEP_INTERVAL = f"{PREFIX}engine_step_interval_seconds"

STEPS = f"{PREFIX}engine_steps_total"


def per_step(metric: str, limit: str) -> str:
    """Return what a step holds on average, as a share of the engine's limit."""
    held = ratio(rate(f"{PREFIX}{metric}_sum", by=BY_ENGINE), rate(STEPS, by=BY_ENGINE))
    return f"{held} / {aggregate('max', f'{PREFIX}{limit}', by=BY_ENGINE)}"


steps = Section(
    "Is the engine stepping?",
    [
        time_series(
            "Step interval",
            Reading(
                "Time between two consecutive step outputs while requests were running.",
                "Every stream waits at least this long for its next token.",
                "p99 below 100 ms.",
                "p99 far above p50: long prefills, or something stops the process; compare with "
                "the loop's lag.",
            ),
            [
                query(quantile(0.5, STEP_INTERVAL), "p50"),
                query(quantile(0.99, STEP_INTERVAL), "p99"),
                query(mean(STEP_INTERVAL), "mean"),
            ],
            units.SECONDS,
            no_value=NO_TRAFFIC,
        ),
        heatmap(
            "Step interval, distribution",
            Reading(
                "Steps per second in each bucket of the step interval.",
                "Decode steps and prefill steps are two bands; a third is a stall.",
                "One or two bands.",
                "A band above one second: the engine hangs now and then.",
            ),
            buckets(STEP_INTERVAL),
            units.SECONDS,
            cell_unit=units.STEPS_PER_SECOND,
        ),
        time_series(
            "Silence while requests run",
            Reading(
                "Time since the last step output, and 0 while the engine has nothing to do.",
                "The surest sign of a hang: requests running, and nothing comes.",
                "Below one scrape interval.",
                "Above a minute: the engine hangs; take a stack dump, then restart it.",
            ),
            [
                query(
                    "(time() - "
                    + aggregate("max", f"{PREFIX}engine_last_step_timestamp_seconds", by=BY_ENGINE)
                    + ") * ("
                    + aggregate("max", "vllm:num_requests_running", by=BY_ENGINE)
                    + " > bool 0)",
                    "{{instance}} {{engine}}",
                )
            ],
            units.SECONDS,
            no_value=NO_WORKER,
        ),
        time_series(
            "Engine steps per second",
            Reading(
                "Steps with requests in them, counted once each.",
                "The engine's pulse, exact also with several API servers.",
                "Tens to hundreds under load, 0 when idle.",
                "0 with requests running: see silence.",
            ),
            [query(rate(STEPS, by=BY_ENGINE), "{{instance}} {{engine}}")],
            units.STEPS_PER_SECOND,
            no_value=NO_WORKER,
        ),
        time_series(
            "Step execution time",
            Reading(
                "What one step took inside the engine.",
                "Interval minus execution is what the host costs.",
                "Nearly the interval.",
                "Far below the interval: the host is the bottleneck; look at CPU and at the loop's "
                "lag.",
            ),
            [
                query(quantile(0.5, f"{PREFIX}engine_step_execution_seconds"), "p50"),
                query(quantile(0.99, f"{PREFIX}engine_step_execution_seconds"), "p99"),
            ],
            units.SECONDS,
            no_value="iteration details are off",
        ),
        time_series(
            "Serving loop lag",
            Reading(
                "How late the serving loop runs what it should run now.",
                "All streams are delayed by it at once.",
                "p99 below 10 ms.",
                "Above 100 ms: something blocks the loop, such as garbage collection or a huge "
                "request.",
            ),
            [
                query(quantile(0.5, f"{PREFIX}serving_loop_lag_seconds", scope=TARGET), "p50"),
                query(quantile(0.99, f"{PREFIX}serving_loop_lag_seconds", scope=TARGET), "p99"),
                query(
                    "time() - "
                    + aggregate(
                        "min",
                        f"{PREFIX}serving_loop_heartbeat_timestamp_seconds",
                        scope=TARGET,
                    ),
                    "since the oldest heartbeat",
                ),
            ],
            units.SECONDS,
            no_value=NO_WORKER,
        ),
        time_series(
            "Who watches: age of serving's page, observer restarts",
            Reading(
                "How old the serving process's part of the metrics page is, and how often the "
                "process behind the page was started again in the range shown.",
                "A page that is older than 5 s is left out: its panels have a gap, not a line.",
                "Around 1 s; no restarts.",
                "Age grows: serving is stopped or its interpreter is held; `/health` says which. "
                "Restarts: the runbook ObserverRestarting.",
            ),
            [
                query(
                    aggregate("max", f"{PREFIX}serving_page_age_seconds", scope=TARGET),
                    "oldest page",
                ),
                query(
                    "sum (increase("
                    + series(f"{PREFIX}observer_restarts_total", scope=TARGET)
                    + "[$__range]))",
                    "restarts in this range",
                ),
            ],
            units.SECONDS,
            no_value=NO_WORKER,
        ),
    ],
)

kv = Section(
    "How much KV cache is left?",
    [
        time_series(
            "KV cache in tokens",
            Reading(
                "Tokens that fit, and tokens held by unfinished requests.",
                "A percentage does not tell whether a long request fits; this does.",
                "Active well below capacity.",
                "Close together: requests queue or are preempted next.",
            ),
            [
                query(aggregate("sum", f"{PREFIX}kv_capacity_tokens"), "capacity"),
                query(aggregate("sum", f"{PREFIX}kv_active_tokens"), "active"),
            ],
            units.TOKENS,
            no_value=NO_WORKER,
        ),
        time_series(
            "KV cache in bytes",
            Reading(
                "The same in memory.",
                "What a smaller KV data type or a larger cache would change.",
                "Capacity is constant.",
                "Too small for your contexts: raise `--gpu-memory-utilization` or "
                "`VLLM_CPU_KVCACHE_SPACE`.",
            ),
            [
                query(aggregate("sum", f"{PREFIX}kv_capacity_bytes"), "capacity"),
                query(aggregate("sum", f"{PREFIX}kv_active_bytes"), "active"),
            ],
            units.BYTES,
            no_value=NO_WORKER,
        ),
        time_series(
            "Active share of blocks, by rank",
            Reading(
                "Blocks held by unfinished requests, as a share of the rank's capacity.",
                "One full rank makes its requests wait while others have room.",
                "Below 95 %, the lines together.",
                "One apart: the balancing between ranks is off.",
            ),
            [
                query(
                    f"{aggregate('sum', f'{PREFIX}kv_active_blocks', by=BY_ENGINE)} / "
                    f"{aggregate('sum', f'{PREFIX}kv_capacity_blocks', by=BY_ENGINE)}",
                    "{{instance}} {{engine}}",
                )
            ],
            units.RATIO,
            maximum=1,
            steps=((GREEN, None), (YELLOW, 0.8), (RED, 0.95)),
            show_thresholds=True,
            no_value=NO_WORKER,
        ),
        time_series(
            "Requests that fit",
            Reading(
                "How many requests the KV cache holds: at the model's full length, and at the "
                "length that running requests have now.",
                "The real limit of concurrency, below `--max-num-seqs` or above it.",
                "Above your peak of running requests.",
                "Below it: limit the context, or add cache.",
            ),
            [
                query(
                    f"{aggregate('sum', f'{PREFIX}kv_capacity_tokens')} / "
                    f"{aggregate('max', f'{PREFIX}engine_max_model_len_tokens')}",
                    "at full length",
                ),
                query(
                    f"{aggregate('sum', f'{PREFIX}kv_capacity_tokens')} / "
                    f"({aggregate('sum', f'{PREFIX}kv_active_tokens')} / "
                    f"({aggregate('sum', 'vllm:num_requests_running')} > 0) > 0)",
                    "at the present length",
                ),
                query(aggregate("sum", "vllm:num_requests_running"), "running"),
            ],
            units.SHORT,
            no_value=NO_WORKER,
        ),
        table(
            "Engine configuration",
            Reading(
                "What each engine was started with, as numbers.",
                "Replicas that should be equal and are not.",
                "Equal rows for one model.",
                "Different: compare the commands they were started with.",
            ),
            ["instance", "model_name", "engine"],
            [
                Column(
                    title,
                    aggregate("max", f"{PREFIX}{metric}", *matchers, by=BY_ENGINE),
                    unit,
                )
                for title, metric, matchers, unit in (
                    ("KV blocks", "kv_capacity_blocks", (), units.SHORT),
                    ("Block size", "kv_block_size_tokens", (), units.TOKENS),
                    ("Sequences", "engine_max_num_seqs", (), units.SHORT),
                    ("Batched tokens", "engine_max_num_batched_tokens", (), units.SHORT),
                    ("Model length", "engine_max_model_len_tokens", (), units.SHORT),
                    (
                        "Tensor parallel",
                        "engine_parallel_size",
                        ('dimension="tensor"',),
                        units.SHORT,
                    ),
                    ("Data parallel", "engine_parallel_size", ('dimension="data"',), units.SHORT),
                )
            ],
            size=(16, 8),
            no_value=NO_WORKER,
        ),
    ],
)

batch = Section(
    "What is in a batch?",
    [
        time_series(
            "Requests per step",
            Reading(
                "Mean number of requests in a step, by phase.",
                "A batch of one wastes the hardware.",
                "Decode close to the number of running requests.",
                "Far below: requests wait for the cache or for the host.",
            ),
            [query(mean(f"{PREFIX}batch_requests", by=("phase",)), "{{phase}}")],
            units.SHORT,
            stack=True,
            no_value=NO_TRAFFIC,
        ),
        time_series(
            "Tokens per step, by phase",
            Reading(
                "Mean number of tokens in a step, by phase.",
                "Prefill tokens slow the decode tokens that share their step.",
                "Mostly decode, bursts of prefill.",
                "Prefill dominates and inter-token latency suffers: lower "
                "`--max-num-batched-tokens`.",
            ),
            [query(mean(f"{PREFIX}batch_tokens", by=("phase",)), "{{phase}}")],
            units.TOKENS,
            stack=True,
            no_value=NO_TRAFFIC,
        ),
        time_series(
            "How full a step is",
            Reading(
                "Mean requests and tokens of a step, as shares of `--max-num-seqs` and "
                "`--max-num-batched-tokens`.",
                "Tells which of the two limits is in the way.",
                "Below 80 %.",
                "One at 100 % with requests waiting: raise that one.",
            ),
            [
                query(per_step("batch_requests", "engine_max_num_seqs"), "{{instance}} requests"),
                query(
                    per_step("batch_tokens", "engine_max_num_batched_tokens"),
                    "{{instance}} tokens",
                ),
            ],
            units.RATIO,
            no_value=NO_TRAFFIC,
        ),
        time_series(
            "Tokens computed twice",
            Reading(
                "Tokens per second that preempted requests had to compute again, and requests "
                "resumed.",
                "Pure waste.",
                "0.",
                "Steady: lower `--max-num-seqs` or add KV cache.",
            ),
            [
                query(rate(f"{PREFIX}preemption_recomputed_tokens_total"), "tokens"),
                query(rate(f"{PREFIX}preemption_resumed_requests_total"), "requests resumed"),
            ],
            units.PER_SECOND,
            no_value=NO_WORKER,
        ),
    ],
)
