"""The rows about the cache itself: how full it is, and what it saves. Any vLLM server has these."""

from __future__ import annotations

from .. import units
from ..boards import Section
from ..panels import GREEN, NO_TRAFFIC, RED, YELLOW, Reading, query, time_series
from ..promql import BY_ENGINE, aggregate, rate, ratio
from .names import PREFIX, RANK

NO_WORKER = "no worker"

cache = Section(
    "How full is the KV cache?",
    [
        time_series(
            "Use, by rank",
            Reading(
                "Share of each rank's blocks that are taken by requests.",
                "A request starts only if there are blocks for its prompt.",
                "Below 95 %, the lines together. High with nothing waiting is good use.",
                "Full with requests waiting: more replicas, shorter contexts, a smaller KV data "
                "type. One line apart: look at the router.",
            ),
            [
                query(
                    aggregate("max", "vllm:kv_cache_usage_perc", by=BY_ENGINE),
                    "{{instance}} {{engine}}",
                )
            ],
            units.RATIO,
            maximum=1,
            steps=((GREEN, None), (YELLOW, 0.9), (RED, 0.95)),
            show_thresholds=True,
            no_value="no engine",
        ),
        time_series(
            "Tokens: capacity and active",
            Reading(
                "Tokens that fit into the cache, and tokens held by unfinished requests.",
                "Says whether one more long request fits; a percentage does not.",
                "Active well below capacity.",
                "Close together: requests queue or are preempted next.",
            ),
            [
                query(aggregate("sum", f"{PREFIX}capacity_tokens"), "capacity"),
                query(aggregate("sum", f"{PREFIX}active_tokens"), "active"),
            ],
            units.TOKENS,
            no_value=NO_WORKER,
        ),
        time_series(
            "Blocks: capacity, active and reusable",
            Reading(
                "Blocks that fit, blocks held by unfinished requests, and blocks on the GPU that "
                "the worker's index knows: what a new request with the same beginning can reuse.",
                "The distance from active to reusable is the cache that waits for a second use.",
                "Reusable grows to the capacity and stays there.",
                "Reusable far below capacity under load: blocks are not full (short prompts), or "
                "events are missing; see the rows below.",
            ),
            [
                query(aggregate("sum", f"{PREFIX}capacity_blocks"), "capacity"),
                query(aggregate("sum", f"{PREFIX}active_blocks"), "active"),
                query(
                    aggregate(
                        "sum", f"{PREFIX}index_blocks", 'medium="gpu"', by=("job",), scope=RANK
                    ),
                    "reusable, by {{job}}",
                ),
            ],
            units.SHORT,
            no_value=NO_WORKER,
        ),
    ],
)

saving = Section(
    "Does the cache save work?",
    [
        time_series(
            "Prefix hit ratio, by rank",
            Reading(
                "Share of looked-up prompt tokens that a rank found in its own cache.",
                "Found tokens are not computed: first tokens come sooner.",
                "Depends on the prompts; the ranks of one model resemble each other.",
                "One rank far below: the router spreads one user over ranks. All fell: a template "
                "changed at its beginning, or the cache is too small.",
            ),
            [
                query(
                    ratio(
                        rate("vllm:prefix_cache_hits_total", by=BY_ENGINE),
                        rate("vllm:prefix_cache_queries_total", by=BY_ENGINE),
                    ),
                    "{{instance}} {{engine}}",
                )
            ],
            units.RATIO,
            maximum=1,
            no_value=NO_TRAFFIC,
        ),
        time_series(
            "Prompt tokens, by where they came from",
            Reading(
                "Prompt tokens computed here, found in this engine's cache, or had from elsewhere "
                "by a KV connector.",
                "The whole prompt load, split by what it cost.",
                "As much cache as the prompts repeat.",
                "Only local_compute: prefix caching is off, or nothing repeats.",
            ),
            [query(rate("vllm:prompt_tokens_by_source_total", by=("source",)), "{{source}}")],
            units.TOKENS_PER_SECOND,
            stack=True,
            no_value=NO_TRAFFIC,
        ),
        time_series(
            "Life of a block",
            Reading(
                "Blocks removed per block stored, over the index: 1 is a full cache in balance.",
                "Near 1 each new block pushes out an old one, which may be needed again.",
                "0 while the cache fills, then 1.",
                "1 with a low hit ratio: blocks are pushed out before their second use; more "
                "cache, or offload to CPU.",
            ),
            [
                query(
                    ratio(
                        rate(f"{PREFIX}blocks_removed_total", by=("job",), scope=RANK),
                        rate(f"{PREFIX}blocks_stored_total", by=("job",), scope=RANK),
                    ),
                    "{{job}}",
                )
            ],
            units.RATIO,
            no_value=NO_TRAFFIC,
        ),
    ],
)
