"""Which panels may be empty, and why: the feature, flag or event without which there is no series.

Every other query returns data from an engine under load; the tests hold that. Short on purpose: a
query that can return 0 instead of nothing does.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Need:
    """Why a panel may be empty."""

    text: str  # for the panel's description
    recorded: str | None = None  # the fixture in which it is on, if one can be recorded on a CPU


_SPECULATION = "speculative decoding (`--speculative-config`)."
_LORA = "`--enable-lora`, and a request to an adapter."
_CONNECTOR = "a KV connector (`--kv-transfer-config`)."

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
}

# Annotations are queries, too; their "panel" is "annotation: NAME". These need an event.
ANNOTATIONS: dict[str, Need] = {"Firing alerts": Need("an alert that fires.")}

# Families that carry neither job nor instance, and the reason why a selector may leave them out.
UNSCOPED: dict[str, str] = {
    "ALERTS": "made by Prometheus' rules; what an alert is about differs from rule to rule",
}

# Panels that read a counter without a rate, and the reason.
RAW_COUNTERS: dict[tuple[str, str], str] = {
    ("vllm-worker", "Ledger balance"): "the identity holds for the counters themselves",
}
