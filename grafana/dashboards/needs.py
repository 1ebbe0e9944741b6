"""Which panels may be empty, and why: the feature, flag or event without which there is no series.

Every other query returns data from an engine under load; the tests hold that, and for a feature
they ask where it is on: a recording, and the demo. Short on purpose: a query that can return 0
instead of nothing does.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Need:
    """Why a panel may be empty."""

    text: str  # for the panel's description
    recorded: str | None = None  # the fixture in which it is on, if one can be recorded on a CPU
    demo: bool = False  # whether it is on in the demo with a fleet index (profiles demo, fleet)


_SPECULATION = "speculative decoding (`--speculative-config`)."
_LORA = "`--enable-lora`, and a request to an adapter."
_CONNECTOR = "a KV connector (`--kv-transfer-config`)."
_WORKER = Need("our worker.", "worker-kv", demo=True)
_KV_EVENTS = Need(
    "KV events (`--worker-kv-events-port`), in our worker or in a fleet index.",
    "worker-kv",
    demo=True,
)
_FLEET = Need("a fleet index (`python -m llm_worker.fleet`).", "kv-index", demo=True)

# (dashboard uid, panel title) -> why it may be empty.
NEEDS: dict[tuple[str, str], Need] = {
    ("vllm-overview", "External cache hit ratio"): Need(_CONNECTOR),
    ("vllm-overview", "Speculative decoding"): Need(_SPECULATION, "vllm-features"),
    ("vllm-overview", "Cache blocks: life and idle time"): Need(
        "`--kv-cache-metrics` (sampled: `--kv-cache-metrics-sample`), and evictions.",
        "vllm-features",
    ),
    ("vllm-overview", "LoRA adapters in use, last seen"): Need(_LORA, "vllm-features"),
    ("vllm-worker", "Step execution time"): Need("`--enable-logging-iteration-details`."),
    ("vllm-worker", "Previous process"): Need("a previous process, and its state directory."),
    ("vllm-kv-cache", "Tokens: capacity and active"): _WORKER,
    ("vllm-kv-cache", "Blocks: capacity, active and reusable"): _KV_EVENTS,
    ("vllm-kv-cache", "Life of a block"): _KV_EVENTS,
    ("vllm-kv-cache", "Listeners down"): _KV_EVENTS,
    ("vllm-kv-cache", "Stale ranks"): _KV_EVENTS,
    ("vllm-kv-cache", "Batches lost, in range"): _KV_EVENTS,
    ("vllm-kv-cache", "Undecodable, in range"): _KV_EVENTS,
    ("vllm-kv-cache", "Lag p99, now"): _KV_EVENTS,
    ("vllm-kv-cache", "Blocks indexed"): _KV_EVENTS,
    ("vllm-kv-cache", "Events, by type"): _KV_EVENTS,
    ("vllm-kv-cache", "Batches, by outcome"): _KV_EVENTS,
    ("vllm-kv-cache", "Blocks stored, removed and cleared"): _KV_EVENTS,
    ("vllm-kv-cache", "Trust, by rank"): _KV_EVENTS,
    ("vllm-kv-cache", "Stale ranks, and why"): Need("KV events, and a rank that is stale."),
    ("vllm-kv-cache", "Ranks, side by side"): _KV_EVENTS,
    ("vllm-kv-cache", "Gaps, by kind"): _KV_EVENTS,
    ("vllm-kv-cache", "Replays, by outcome"): _KV_EVENTS,
    ("vllm-kv-cache", "Undecodable, by reason"): _KV_EVENTS,
    ("vllm-kv-cache", "Held back behind a gap"): _KV_EVENTS,
    ("vllm-kv-cache", "Blocks that do not add up"): _KV_EVENTS,
    ("vllm-kv-cache", "Trouble in the listener"): _KV_EVENTS,
    ("vllm-kv-cache", "Lag"): _KV_EVENTS,
    ("vllm-kv-cache", "Lag, distribution"): _KV_EVENTS,
    ("vllm-kv-cache", "Since the last batch, by rank"): _KV_EVENTS,
    ("vllm-kv-cache", "Blocks, by medium"): _KV_EVENTS,
    ("vllm-kv-cache", "Memory of the index"): _KV_EVENTS,
    ("vllm-kv-cache", "Use of the index's bound"): Need(
        "KV events, and a bound (`--worker-kv-max-blocks`, or the fleet index's `--max-blocks`).",
        "worker-kv",
    ),
    ("vllm-kv-cache", "Match latency"): Need(
        "KV events, and somebody who asks.", "worker-kv", demo=True
    ),
    ("vllm-kv-cache", "Match requests, by outcome"): _KV_EVENTS,
    ("vllm-kv-cache", "Blocks, by worker"): _KV_EVENTS,
    ("vllm-kv-cache", "Audits, by outcome"): _KV_EVENTS,
    # Not in the demo: only an engine that stands still is judged, and the load hardly pauses.
    ("vllm-kv-cache", "Drift"): Need(
        "KV events in our worker, and an audit's verdict.", "worker-kv"
    ),
    ("vllm-kv-cache", "Plane"): _KV_EVENTS,
    ("vllm-kv-cache", "Published and acknowledged"): _KV_EVENTS,
    ("vllm-kv-cache", "Buffer of the plane"): _KV_EVENTS,
    ("vllm-kv-cache", "Dropped on the way out"): _KV_EVENTS,
    ("vllm-kv-cache", "Readers that ask"): _KV_EVENTS,
    ("vllm-kv-cache", "Blocks of the fleet"): _FLEET,
    ("vllm-kv-cache", "Share of duplicates"): _FLEET,
    ("vllm-kv-cache", "Workers, by health"): _FLEET,
}

# Annotations are queries, too; their "panel" is "annotation: NAME". These need an event.
ANNOTATIONS: dict[str, Need] = {"Firing alerts": Need("an alert that fires.")}

# Families that carry neither job nor instance, and the reason why a selector may leave them out.
UNSCOPED: dict[str, str] = {
    "ALERTS": "made by Prometheus' rules; what an alert is about differs from rule to rule",
}

# Families that the overview reads for every model, not only for the chosen one, and the reason.
EVERY_MODEL: dict[str, str] = {
    "up": "a target that is down tells no model, and must not be left out for that",
}

# Panels that read a counter without a rate, and the reason.
RAW_COUNTERS: dict[tuple[str, str], str] = {
    ("vllm-worker", "Ledger balance"): "the identity holds for the counters themselves",
}
