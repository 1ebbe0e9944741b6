"""vLLM's own metrics: their names, and how the overview reads them."""

from __future__ import annotations

from ..panels import (
    GREEN,
    RED,
    YELLOW,
    Query,
    query,
)
from ..promql import (
    ENGINE_TARGET,
    mean,
    or_zero,
    quantile,
    rate,
    ratio,
)

TTFT = "vllm:time_to_first_token_seconds"
ITL = "vllm:inter_token_latency_seconds"

TPOT = "vllm:request_time_per_output_token_seconds"
E2E = "vllm:e2e_request_latency_seconds"

QUEUE = "vllm:request_queue_time_seconds"
FINISHED = "vllm:request_success_total"

RUNNING = "vllm:num_requests_running"
WAITING = "vllm:num_requests_waiting"

KV = "vllm:kv_cache_usage_perc"
API = 'handler=~"/v1/.*"'

API_TARGET = f"{ENGINE_TARGET},{API}"

# Grey is not good news: idle, or not known.
KV_STEPS = ((GREEN, None), (YELLOW, 0.8), (RED, 0.95))


def percentiles(histogram: str) -> list[Query]:
    """Return the three percentiles and the mean of one histogram."""
    return [
        query(quantile(0.5, histogram), "p50"),
        query(quantile(0.95, histogram), "p95"),
        query(quantile(0.99, histogram), "p99"),
        query(mean(histogram), "mean"),
    ]


def http_errors() -> str:
    """Return the share of API answers that are 5xx; 0 as long as there are answers at all."""
    errors = or_zero(rate("http_requests_total", 'status=~"5.*"', scope=API_TARGET))
    return ratio(f"({errors})", rate("http_requests_total", scope=API_TARGET))
