"""The rows about load: what waits, what gets done, what the cache saves."""

from __future__ import annotations

from .. import units
from ..boards import Section
from ..panels import (
    GREEN,
    NO_TRAFFIC,
    ORANGE,
    Reading,
    color_override,
    query,
    time_series,
)
from ..promql import (
    BY_ENGINE,
    aggregate,
    mean,
    quantile,
    rate,
    ratio,
)
from .vllm import (
    E2E,
    FINISHED,
    KV,
    KV_STEPS,
    QUEUE,
    RUNNING,
    WAITING,
    percentiles,
)

waiting = Section(
    "Do requests wait, and for what?",
    [
        time_series(
            "Request queue",
            Reading(
                "请求队列状态. Requests in the engine: running, and waiting for a place.",
                "Waiting requests are users who see nothing yet.",
                "Waiting near 0; short bursts are fine.",
                "If it grows: look at the KV cache. Full cache means capacity; a free cache means "
                "`--max-num-seqs` is the limit.",
            ),
            [
                query(aggregate("sum", RUNNING), "running"),
                query(aggregate("sum", WAITING), "waiting"),
            ],
            units.SHORT,
            overrides=[color_override("waiting", ORANGE), color_override("running", GREEN)],
            no_value="no engine",
        ),
        time_series(
            "KV-cache use",
            Reading(
                "GPU缓存使用率. Share of the KV cache's blocks that are taken: the fullest engine, "
                "the mean and the emptiest.",
                "A new request starts only if there are blocks for its prompt.",
                "Anything below 95 %; a wide gap between the lines is uneven load.",
                "Full and waiting: more replicas, shorter contexts, or a smaller KV data type.",
            ),
            [
                query(aggregate("max", KV), "fullest"),
                query(aggregate("avg", KV), "mean"),
                query(aggregate("min", KV), "emptiest"),
            ],
            units.RATIO,
            maximum=1,
            steps=KV_STEPS,
            show_thresholds=True,
            no_value="no engine",
        ),
        time_series(
            "Preemptions",
            Reading(
                "请求抢占情况. Requests per second that lost their blocks to others and are "
                "computed again later.",
                "Each one throws finished work away, and its user sees a pause.",
                "0; now and then under a peak.",
                "If steady: lower `--max-num-seqs`, or add KV cache. The worker dashboard counts "
                "the tokens that were wasted.",
            ),
            [
                query(rate("vllm:num_preemptions_total"), "preemptions"),
                query(
                    ratio(rate("vllm:num_preemptions_total"), rate(FINISHED)),
                    "per finished request",
                ),
            ],
            units.PER_SECOND,
            overrides=[
                {
                    "matcher": {"id": "byName", "options": "per finished request"},
                    "properties": [
                        {"id": "custom.axisPlacement", "value": "right"},
                        {"id": "unit", "value": units.RATIO},
                    ],
                }
            ],
            no_value=NO_TRAFFIC,
        ),
        time_series(
            "Queue time",
            Reading(
                "How long requests waited before their first step.",
                "The part of the first token's delay that more capacity removes.",
                "p95 below 100 ms.",
                "Above 2 s for minutes: users leave. Add replicas or reject early with "
                "`--max-num-queued-reqs`.",
            ),
            percentiles(QUEUE),
            units.SECONDS,
            no_value=NO_TRAFFIC,
        ),
        time_series(
            "Waiting, by reason",
            Reading(
                "Why requests wait: for capacity, or deferred (a LoRA slot, a transfer of KV, a "
                "grammar).",
                "Deferred requests do not start sooner with more memory.",
                "Near 0, and capacity above deferred.",
                "Deferred grows: look at `--max-loras`, at the KV connector, at the grammars.",
            ),
            [
                query(
                    aggregate("sum", "vllm:num_requests_waiting_by_reason", by=("reason",)),
                    "{{reason}}",
                )
            ],
            units.SHORT,
            stack=True,
        ),
        time_series(
            "Time to drain the queue",
            Reading(
                "Waiting requests divided by the rate at which requests finish.",
                "How long a request that comes now will wait, roughly.",
                "Below 5 s.",
                "Above 30 s: the queue is longer than users' patience; scale out or shed load.",
            ),
            [query(ratio(aggregate("sum", WAITING), rate(FINISHED)), "to drain")],
            units.SECONDS,
            no_value=NO_TRAFFIC,
        ),
    ],
)

throughput = Section(
    "How much work gets done?",
    [
        time_series(
            "Token rates",
            Reading(
                "Token处理速率. Tokens per second: prompts as they came, the part of them that was "
                "really computed, and generated ones.",
                "Load and output in the unit that hardware is bought in.",
                "Computed below prompt by what the prefix cache saves.",
                "Computed equals prompt although prompts repeat: look at the prefix cache.",
            ),
            [
                query(rate("vllm:prompt_tokens_total"), "prompt"),
                query(
                    rate("vllm:prompt_tokens_by_source_total", 'source="local_compute"'),
                    "prompt, computed",
                ),
                query(rate("vllm:generation_tokens_total"), "generated"),
            ],
            units.TOKENS_PER_SECOND,
            no_value=NO_TRAFFIC,
        ),
        time_series(
            "Tokens per step",
            Reading(
                "迭代Token数. How many tokens one engine step works on: mean, p50 and p99.",
                "A step costs nearly the same for few tokens as for many; small steps waste the "
                "hardware.",
                "Grows with load, up to `--max-num-batched-tokens`.",
                "Small although requests wait: the KV cache or `--max-num-seqs` is the limit.",
            ),
            [
                query(mean("vllm:iteration_tokens_total"), "mean"),
                query(quantile(0.5, "vllm:iteration_tokens_total"), "p50"),
                query(quantile(0.99, "vllm:iteration_tokens_total"), "p99"),
            ],
            units.TOKENS,
            no_value=NO_TRAFFIC,
        ),
        time_series(
            "Engine steps",
            Reading(
                "Steps per second by engine. With several API servers each counts its own part of "
                "a step, and the number is too high.",
                "The heartbeat of an engine: requests running and no steps means that it hangs.",
                "Tens to hundreds per second under load, 0 when idle.",
                "0 with requests running: the engine is stuck; see the alert EngineStalled.",
            ),
            [
                query(
                    rate("vllm:iteration_tokens_total_count", by=BY_ENGINE),
                    "{{instance}} {{engine}}",
                )
            ],
            units.STEPS_PER_SECOND,
        ),
        time_series(
            "Concurrency, counted and computed",
            Reading(
                "Requests in the engine, and what Little's law says: time spent in requests per "
                "second.",
                "The two meet in a healthy system; the gauge alone can freeze.",
                "The lines follow each other.",
                "Gauge high, computed 0: nothing finishes any more. Computed far higher: the gauge "
                "misses peaks between scrapes.",
            ),
            [
                query(
                    f"{aggregate('sum', RUNNING)} + {aggregate('sum', WAITING)}",
                    "in the engine",
                ),
                query(rate(f"{E2E}_sum"), "by Little's law"),
            ],
            units.SHORT,
        ),
        time_series(
            "Prompt tokens per request",
            Reading(
                "Length of finished requests' prompts.",
                "Longer prompts cost prefill time and KV cache; a change here explains others.",
                "What your application sends.",
                "A jump: ask who changed a template or a retrieval step.",
            ),
            percentiles("vllm:request_prompt_tokens"),
            units.TOKENS,
            no_value=NO_TRAFFIC,
        ),
        time_series(
            "Output tokens per request",
            Reading(
                "Length of finished requests' answers.",
                "Latency and cost follow it.",
                "What your application asks for.",
                "p99 at the model's limit: look at truncation below and at `max_tokens`.",
            ),
            percentiles("vllm:request_generation_tokens"),
            units.TOKENS,
            no_value=NO_TRAFFIC,
        ),
    ],
)

cache = Section(
    "Does the cache save work?",
    [
        time_series(
            "Prefix cache",
            Reading(
                "GPU前缀缓存性能. Share of looked-up prompt tokens that were in the cache, and how "
                "many are looked up.",
                "Tokens found are not computed: first tokens come sooner.",
                "Depends on your prompts: above 50 % with a shared system prompt, near 0 without.",
                "Fell from its usual level: a template changed at its beginning, the cache is too "
                "small, or a router spreads one user over replicas.",
            ),
            [
                query(
                    ratio(
                        rate("vllm:prefix_cache_hits_total"),
                        rate("vllm:prefix_cache_queries_total"),
                    ),
                    "hit ratio",
                ),
                query(rate("vllm:prefix_cache_queries_total"), "looked up"),
                query(rate("vllm:prefix_cache_hits_total"), "found"),
            ],
            units.TOKENS_PER_SECOND,
            overrides=[
                {
                    "matcher": {"id": "byName", "options": "hit ratio"},
                    "properties": [
                        {"id": "unit", "value": units.RATIO},
                        {"id": "max", "value": 1},
                        {"id": "custom.axisPlacement", "value": "right"},
                        {"id": "custom.lineWidth", "value": 2},
                    ],
                }
            ],
            no_value=NO_TRAFFIC,
        ),
        time_series(
            "Prompt tokens, by source",
            Reading(
                "Where prompt tokens came from: computed here, from this engine's cache, from "
                "another machine.",
                "The whole prompt load, split by its cost.",
                "As much cache as your prompts repeat.",
                "Only local_compute: prefix caching is off, or nothing repeats.",
            ),
            [query(rate("vllm:prompt_tokens_by_source_total", by=("source",)), "{{source}}")],
            units.TOKENS_PER_SECOND,
            stack=True,
            no_value=NO_TRAFFIC,
        ),
        time_series(
            "Prompt tokens computed per request",
            Reading(
                "Mean prompt length of finished requests, and how much of it was computed.",
                "The distance between the lines is the saving per request.",
                "Computed well below length where prompts share a beginning.",
                "No distance: see the prefix cache panel.",
            ),
            [
                query(mean("vllm:request_prompt_tokens"), "length"),
                query(mean("vllm:request_prefill_kv_computed_tokens"), "computed"),
            ],
            units.TOKENS,
            no_value=NO_TRAFFIC,
        ),
    ],
)
