"""The folded row about features that are off by default."""

from __future__ import annotations

from .. import units
from ..boards import Section
from ..panels import (
    GREEN,
    GREY,
    NO_TRAFFIC,
    YELLOW,
    Reading,
    bar_gauge,
    query,
    state_timeline,
    time_series,
    value_mapping,
)
from ..promql import (
    BY_ENGINE,
    ENGINE_TARGET,
    aggregate,
    quantile,
    rate,
    ratio,
)

SLEEP_STATE = "vllm:engine_sleep_state"


def sleep_code() -> str:
    """Return 0 awake, 1 weights offloaded, 2 everything discarded, per engine."""
    offloaded = aggregate("max", SLEEP_STATE, 'sleep_state="weights_offloaded"', by=BY_ENGINE)
    discarded = aggregate("max", SLEEP_STATE, 'sleep_state="discard_all"', by=BY_ENGINE)
    return f"{offloaded} + 2 * {discarded}"


features = Section(
    "What do optional features do?",
    [
        state_timeline(
            "Sleep state",
            Reading(
                "Whether an engine is awake or asleep, and how deeply.",
                "Requests to a sleeping engine hang without an error.",
                "awake, unless you put it to sleep.",
                "Asleep with requests coming: wake it up, or take it out of the router.",
            ),
            [query(sleep_code(), "{{instance}} {{engine}}")],
            value_mapping(
                {
                    "0": ("awake", GREEN),
                    "1": ("weights offloaded", YELLOW),
                    "2": ("all discarded", GREY),
                }
            ),
            size=(12, 6),
        ),
        time_series(
            "External cache hit ratio",
            Reading(
                "Share of prompt tokens found in a KV connector's cache (CPU, disk, another "
                "machine).",
                "Whether the connector is worth its traffic.",
                "Depends on the connector and the prompts.",
                "0 with a connector configured: look at its own log and at its capacity.",
            ),
            [
                query(
                    ratio(
                        rate("vllm:external_prefix_cache_hits_total"),
                        rate("vllm:external_prefix_cache_queries_total"),
                    ),
                    "hit ratio",
                )
            ],
            units.RATIO,
            size=(12, 6),
            maximum=1,
            no_value="no KV connector",
        ),
        time_series(
            "Speculative decoding",
            Reading(
                "Share of drafted tokens that the model accepted, and mean tokens per draft.",
                "Rejected drafts are wasted computing.",
                "Acceptance above 50 %.",
                "Below 30 %: draft fewer tokens, or switch it off.",
            ),
            [
                query(
                    ratio(
                        rate("vllm:spec_decode_num_accepted_tokens_total"),
                        rate("vllm:spec_decode_num_draft_tokens_total"),
                    ),
                    "acceptance",
                ),
                query(
                    "1 + "
                    + ratio(
                        rate("vllm:spec_decode_num_accepted_tokens_total"),
                        rate("vllm:spec_decode_num_drafts_total"),
                    ),
                    "tokens per step",
                ),
            ],
            units.RATIO,
            overrides=[
                {
                    "matcher": {"id": "byName", "options": "tokens per step"},
                    "properties": [
                        {"id": "unit", "value": units.SHORT},
                        {"id": "custom.axisPlacement", "value": "right"},
                    ],
                }
            ],
            no_value="speculative decoding is off",
        ),
        time_series(
            "Cache blocks: life and idle time",
            Reading(
                "How long a sampled block lived, and how long it was unused before it was evicted; "
                "medians.",
                "Blocks evicted soon after use mean that the cache is too small for its prompts.",
                "Idle time well above the time between a user's turns.",
                "Shorter than that: more cache, or offload it.",
            ),
            [
                query(quantile(0.5, "vllm:kv_block_lifetime_seconds"), "life"),
                query(
                    quantile(0.5, "vllm:kv_block_idle_before_evict_seconds"), "idle before eviction"
                ),
            ],
            units.SECONDS,
            no_value="block metrics are off",
        ),
        time_series(
            "Estimated work per GPU",
            Reading(
                "Floating-point operations and bytes per second that vLLM computes from the "
                "model's shape.",
                "Against the hardware's data sheet it tells how far from the limit you are.",
                "0 without `--enable-mfu-metrics`. Operations limit prefill, bytes limit decode.",
                "Far from both under load: the host is the bottleneck; look at CPU.",
            ),
            [
                query(rate("vllm:estimated_flops_per_gpu_total"), "operations"),
                query(rate("vllm:estimated_read_bytes_per_gpu_total"), "bytes read"),
                query(rate("vllm:estimated_write_bytes_per_gpu_total"), "bytes written"),
            ],
            units.PER_SECOND,
            no_value=NO_TRAFFIC,
        ),
        bar_gauge(
            "LoRA adapters in use, last seen",
            Reading(
                "Seconds since each set of adapters was last reported as running. Old sets stay "
                "until a restart.",
                "Which adapters really get traffic; their requests count as the base model's.",
                "The adapters you serve, each seen recently.",
                "One is missing: is it loaded? See `GET /v1/models`.",
            ),
            [
                query(
                    "time() - "
                    + aggregate(
                        "max",
                        "vllm:lora_requests_info",
                        by=("running_lora_adapters",),
                        scope=ENGINE_TARGET,
                    ),
                    "{{running_lora_adapters}}",
                )
            ],
            units.SECONDS,
            no_value="LoRA is off, or unused",
        ),
    ],
    collapsed=True,
)
