"""The row about speed, as a user sees it."""

from __future__ import annotations

from .. import units
from ..boards import Section
from ..panels import (
    NO_TRAFFIC,
    Reading,
    heatmap,
    query,
    time_series,
)
from ..promql import (
    buckets,
    mean,
    quantile,
)
from .vllm import (
    E2E,
    ITL,
    TPOT,
    TTFT,
    percentiles,
)

latency = Section(
    "How fast is it for a user?",
    [
        time_series(
            "TTFT",
            Reading(
                "首Token响应时间分布. Time from a request's arrival to its first token, inside "
                "the server: p95 is the line to watch.",
                "What a user waits before anything happens. The network and a proxy come on top.",
                "p95 below 1 s for chat.",
                "Compare with queue time and with prefill in the phases panel. A line that stays "
                "flat at a bucket's edge is a bound, not a measurement.",
            ),
            percentiles(TTFT),
            units.SECONDS,
            no_value=NO_TRAFFIC,
        ),
        time_series(
            "Inter-token latency",
            Reading(
                "Time between two outputs of a stream. With speculative decoding one output holds "
                "several tokens.",
                "Whether the text flows or stutters.",
                "p99 below 100 ms; reading speed is about 5 tokens per second.",
                "High p99 with a good p50: long prefills block decoding; lower "
                "`--max-num-batched-tokens`.",
            ),
            percentiles(ITL),
            units.SECONDS,
            no_value=NO_TRAFFIC,
        ),
        time_series(
            "Time per output token",
            Reading(
                "Per finished request: decode time divided by its output tokens. Requests with one "
                "token count as 0.",
                "The speed of a whole answer; a hiccup inside it does not show here.",
                "Below 50 ms.",
                "Rises with the batch: more concurrency buys throughput with this.",
            ),
            percentiles(TPOT),
            units.SECONDS,
            no_value=NO_TRAFFIC,
        ),
        time_series(
            "End-to-end latency",
            Reading(
                "From a request's arrival to its last token.",
                "What callers without streaming wait for.",
                "Depends on the output's length: look at it beside output tokens per request.",
                "If it grows and lengths do not, look at the phases.",
            ),
            percentiles(E2E),
            units.SECONDS,
            no_value=NO_TRAFFIC,
        ),
        time_series(
            "Where a request's time goes",
            Reading(
                "Mean seconds per finished request in the queue, in prefill and in decode.",
                "Says which of the three to work on.",
                "Decode is by far the largest.",
                "Queue: capacity. Prefill: prefix caching, shorter prompts. Decode: batch size.",
            ),
            [
                query(mean("vllm:request_queue_time_seconds"), "queue"),
                query(mean("vllm:request_prefill_time_seconds"), "prefill"),
                query(mean("vllm:request_decode_time_seconds"), "decode"),
            ],
            units.SECONDS,
            stack=True,
            no_value=NO_TRAFFIC,
        ),
        time_series(
            "TTFT p95, by instance",
            Reading(
                "The same p95, one line per server.",
                "One slow replica hides in a common percentile.",
                "The lines lie together.",
                "One is apart: compare its queue, its KV cache and its configuration.",
            ),
            [query(quantile(0.95, TTFT, by=("instance",)), "{{instance}}")],
            units.SECONDS,
            no_value=NO_TRAFFIC,
        ),
        heatmap(
            "TTFT, distribution",
            Reading(
                "Requests per second in each of vLLM's TTFT buckets.",
                "Two groups of users (short and long prompts) show as two bands; no percentile "
                "shows that.",
                "One band, low.",
                "A second band far above: look at prompt lengths and at prefix-cache hits.",
            ),
            buckets(TTFT),
            units.SECONDS,
            cell_unit=units.REQUESTS_PER_SECOND,
        ),
        heatmap(
            "Inter-token latency, distribution",
            Reading(
                "Outputs per second in each bucket of the time between two outputs.",
                "Stalls of all streams at once show as a faint band far up.",
                "One dense band, a few milliseconds to tens of milliseconds.",
                "A band above 250 ms: prefills or garbage collection stop all streams.",
            ),
            buckets(ITL),
            units.SECONDS,
        ),
        heatmap(
            "End-to-end latency, distribution",
            Reading(
                "Finished requests per second in each latency bucket.",
                "Shows time-outs of callers as a sharp upper edge.",
                "One band, whose height follows the outputs' lengths.",
                "A growing tail: look at waiting requests and preemptions at the same time.",
            ),
            buckets(E2E),
            units.SECONDS,
            cell_unit=units.REQUESTS_PER_SECOND,
        ),
    ],
)
