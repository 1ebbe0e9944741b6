"""The rows for the first look: is it up, and is one replica different?"""

from __future__ import annotations

from .. import units
from ..boards import Section
from ..panels import (
    BAD_ABOVE_ZERO,
    GREEN,
    ORANGE,
    RED,
    YELLOW,
    Column,
    Reading,
    alert_list,
    query,
    stat,
    table,
    time_series,
)
from ..promql import (
    BY_ENGINE,
    ENGINE_TARGET,
    aggregate,
    or_zero,
    quantile,
    rate,
    series,
)
from .vllm import (
    FINISHED,
    ITL,
    KV,
    KV_STEPS,
    RUNNING,
    TTFT,
    WAITING,
    http_errors,
)

now = Section(
    "Is it up, and how is it doing right now?",
    [
        stat(
            "Targets down",
            Reading(
                "vLLM servers and workers that Prometheus knows and cannot scrape.",
                "A target that does not answer serves nobody, and every other panel leaves it out.",
                "0.",
                "Open the dashboard of the monitoring itself to see which one, then its log.",
            ),
            or_zero(f"count({series('up', scope=ENGINE_TARGET)} == 0)"),
            units.SHORT,
            steps=BAD_ABOVE_ZERO,
            no_value="no target",
        ),
        stat(
            "Engines",
            Reading(
                "Engines that report: one per server, more with data parallelism.",
                "A rank that vanished takes its share of the load with it, without any error.",
                "What you started.",
                "Compare with the instance table; restart the server whose rank is missing.",
            ),
            or_zero(f"count({series(RUNNING)})"),
            units.SHORT,
            steps=((RED, None), (GREEN, 1)),
            no_value="none",
        ),
        stat(
            "Alerts firing",
            Reading(
                "Critical and warning alerts that fire now, over everything, not only the "
                "selection.",
                "The rules have looked at more than this page shows.",
                "0.",
                "Read the list below; every alert links to its runbook.",
            ),
            or_zero('count(ALERTS{alertstate="firing",severity=~"critical|warning"})'),
            units.SHORT,
            steps=BAD_ABOVE_ZERO,
            no_value="0",
        ),
        stat(
            "Finished requests",
            Reading(
                "Requests that finished per second, for whatever reason.",
                "The pulse. If it drops while requests are waiting, the engine is stuck.",
                "Follows your users' day.",
                "Zero with requests running: look at tokens per step and the worker dashboard.",
            ),
            rate(FINISHED),
            units.REQUESTS_PER_SECOND,
        ),
        stat(
            "Output tokens",
            Reading(
                "Tokens generated per second, summed over the selection.",
                "What the hardware is there for.",
                "Grows with concurrency until the batch is full, then stays.",
                "Falling at the same load: look for preemptions and longer prompts.",
            ),
            rate("vllm:generation_tokens_total"),
            units.TOKENS_PER_SECOND,
        ),
        stat(
            "TTFT p95, now",
            Reading(
                "95 of 100 requests had their first token within this time, seen by the server.",
                "The wait that a user notices first.",
                "Below 1 s for chat; your own objective counts.",
                "Look at queue time first: if it is high, capacity is short, else prefill is slow.",
            ),
            quantile(0.95, TTFT),
            units.SECONDS,
            steps=((GREEN, None), (YELLOW, 1), (RED, 5)),
            links=[{"title": "Worker", "url": "/d/vllm-worker?${__url_time_range}"}],
        ),
        stat(
            "KV cache, fullest",
            Reading(
                "Use of the KV cache on the fullest engine.",
                "Full means that requests wait or are preempted; it does not mean out of memory, "
                "the cache is allocated at the start.",
                "Below 95 %. High and nothing waiting is simply good use.",
                "Above it with requests waiting: shorter contexts, more replicas, or a larger "
                "`--gpu-memory-utilization`.",
            ),
            aggregate("max", KV),
            units.RATIO,
            steps=KV_STEPS,
            links=[{"title": "KV cache", "url": "/d/vllm-kv-cache?${__url_time_range}"}],
            no_value="no engine",
        ),
        stat(
            "5xx answers",
            Reading(
                "Share of API answers with a status of 500 or more.",
                "Errors of the server, not of its callers.",
                "0 %; 503 comes from admission limits.",
                "Look at HTTP answers by status below and at the server's log.",
            ),
            http_errors(),
            units.RATIO,
            steps=((GREEN, None), (YELLOW, 0.001), (RED, 0.05)),
        ),
        alert_list(
            "Alerts",
            Reading(
                "What Prometheus' rules say: firing first, then pending.",
                "The rules watch everything here at once, and longer than you do.",
                "Empty.",
                "Open an alert and follow its runbook; silence it in Alertmanager while you work.",
            ),
        ),
        table(
            "Models",
            Reading(
                "One row per model, over its replicas.",
                "Which model is in trouble when several are served.",
                "Nothing waiting for long; TTFT within your objective.",
                "Choose the model at the top of the page; every panel follows.",
            ),
            ["model_name"],
            [
                Column("Engines", f"count by (model_name) ({series(RUNNING)})", units.SHORT),
                Column("Running", aggregate("sum", RUNNING, by=("model_name",)), units.SHORT),
                Column(
                    "Waiting",
                    aggregate("sum", WAITING, by=("model_name",)),
                    units.SHORT,
                    ((GREEN, None), (ORANGE, 1)),
                    colored=True,
                ),
                Column(
                    "Finished",
                    rate(FINISHED, by=("model_name",)),
                    units.REQUESTS_PER_SECOND,
                ),
                Column(
                    "Output",
                    rate("vllm:generation_tokens_total", by=("model_name",)),
                    units.TOKENS_PER_SECOND,
                ),
                Column("TTFT p95", quantile(0.95, TTFT, by=("model_name",)), units.SECONDS),
                Column(
                    "KV cache",
                    aggregate("max", KV, by=("model_name",)),
                    units.RATIO,
                    KV_STEPS,
                    colored=True,
                ),
            ],
            size=(16, 8),
        ),
    ],
)

replicas = Section(
    "Is one replica different from the others?",
    [
        table(
            "Engines, side by side",
            Reading(
                "One row per engine: load, cache, speed.",
                "A broken replica looks like the others in every sum.",
                "Rows that resemble each other.",
                "Different load with the same speed: look at the router. Different speed: compare "
                "hardware and flags.",
            ),
            ["instance", "model_name", "engine"],
            [
                Column("Running", aggregate("sum", RUNNING, by=BY_ENGINE), units.SHORT),
                Column(
                    "Waiting",
                    aggregate("sum", WAITING, by=BY_ENGINE),
                    units.SHORT,
                    ((GREEN, None), (ORANGE, 1)),
                    colored=True,
                ),
                Column(
                    "KV cache",
                    aggregate("max", KV, by=BY_ENGINE),
                    units.RATIO,
                    KV_STEPS,
                    colored=True,
                ),
                Column(
                    "Output",
                    rate("vllm:generation_tokens_total", by=BY_ENGINE),
                    units.TOKENS_PER_SECOND,
                ),
                Column("TTFT p95", quantile(0.95, TTFT, by=BY_ENGINE), units.SECONDS),
                Column("ITL p95", quantile(0.95, ITL, by=BY_ENGINE), units.SECONDS),
            ],
            size=(16, 8),
        ),
        time_series(
            "Load skew",
            Reading(
                "Running requests on the busiest engine minus those on the idlest, per model.",
                "Uneven load wastes the idle one and slows the busy one.",
                "Small against the mean; 0 with one engine.",
                "Steady and large: the router does not balance, or pins sessions.",
            ),
            [
                query(
                    f"{aggregate('max', RUNNING, by=('model_name',))}"
                    f" - {aggregate('min', RUNNING, by=('model_name',))}",
                    "{{model_name}}",
                )
            ],
            units.SHORT,
        ),
    ],
)
