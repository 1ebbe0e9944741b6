"""The declarations: names, labels, what is there before anything happened, and what is not."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from llm_worker import metrics as declared
from llm_worker.metrics import ENDINGS, STATES, Metrics, StatMetrics
from llm_worker.settings.worker import GoodputTargets

LABELS = {
    "kv_capacity_blocks": ("model_name", "engine"),
    "kv_capacity_tokens": ("model_name", "engine"),
    "kv_capacity_bytes": ("model_name", "engine"),
    "kv_active_blocks": ("model_name", "engine"),
    "kv_active_tokens": ("model_name", "engine"),
    "kv_active_bytes": ("model_name", "engine"),
    "kv_block_size_tokens": ("model_name", "engine"),
    "engine_max_num_seqs": ("model_name", "engine"),
    "engine_max_num_batched_tokens": ("model_name", "engine"),
    "engine_max_model_len_tokens": ("model_name", "engine"),
    "engine_parallel_size": ("model_name", "engine", "dimension"),
    "engine_steps_total": ("model_name", "engine"),
    "engine_step_interval_seconds": ("model_name", "engine"),
    "engine_step_execution_seconds": ("model_name", "engine"),
    "engine_last_step_timestamp_seconds": ("model_name", "engine"),
    "batch_requests": ("model_name", "engine", "phase"),
    "batch_tokens": ("model_name", "engine", "phase"),
    "preemption_resumed_requests_total": ("model_name", "engine"),
    "preemption_recomputed_tokens_total": ("model_name", "engine"),
    "goodput_evaluated_requests_total": ("model_name", "engine"),
    "goodput_requests_total": ("model_name", "engine"),
    "goodput_missed_requests_total": ("model_name", "engine", "objective"),
    "goodput_target_seconds": ("objective",),
    "requests_received_total": ("model_name",),
    "requests_ended_total": ("model_name", "outcome", "reason"),
    "requests_in_flight": ("model_name",),
    "startup_phase_seconds": ("phase",),
    "model_load_seconds": ("model_name",),
    "state": ("state",),
    "state_entered_total": ("state",),
    "last_exit_timestamp_seconds": ("reason",),
    "build_info": ("version", "vllm_version"),
    "serving_loop_heartbeat_timestamp_seconds": (),
    "serving_loop_lag_seconds": (),
    "stat_logger_errors_total": ("stage",),
    "exporter_source_up": ("source",),
    "exporter_source_errors_total": ("source",),
    "exporter_families_dropped_total": ("source", "reason"),
    "exporter_render_seconds": (),
    "page_publish_seconds": (),
    "page_publish_errors_total": (),
    "serving_page_age_seconds": (),
    "observer_restarts_total": (),
}


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def collectors(registry: CollectorRegistry) -> set[Any]:
    return set(registry._collector_to_names)


def samples(registry: CollectorRegistry) -> set[str]:
    """Names of all samples on the page, ``_created`` left out."""
    return {
        sample.name
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def test_every_metric_has_the_attribute_name_and_labels_that_others_rely_on(
    registry: CollectorRegistry,
) -> None:
    """Each name is an attribute without its prefix, with exactly these labels, and no other is."""
    metrics = Metrics(registry)
    found = {}
    for collector in collectors(registry):
        name = collector._name.removeprefix("llm_worker_")
        name += "_total" if isinstance(collector, Counter) else ""
        assert getattr(metrics, name) is collector
        found[name] = tuple(collector._labelnames)
    assert found == LABELS


def test_every_gauge_names_how_processes_are_combined(registry: CollectorRegistry) -> None:
    """In prometheus_client's multiprocess mode a gauge without a mode gets a label per process."""
    Metrics(registry)
    gauges = [c for c in collectors(registry) if isinstance(c, Gauge)]
    assert len(gauges) > 10
    assert {gauge._name for gauge in gauges if gauge._multiprocess_mode == "all"} == set()


def test_a_name_states_its_unit_and_no_colon_is_in_it(registry: CollectorRegistry) -> None:
    """Colons mark recording rules; vLLM removes what starts with ``vllm:``."""
    Metrics(registry)
    for collector in collectors(registry):
        assert re.fullmatch(r"llm_worker_[a-z0-9_]+", collector._name)
        assert collector._documentation.endswith(".")


def test_nothing_unknown_is_on_the_page_before_anything_happened(
    registry: CollectorRegistry,
) -> None:
    """A gauge not known yet is absent, never 0: a heartbeat of 0 would be 1970."""
    Metrics(registry)
    assert samples(registry) == {
        "llm_worker_state_entered_total",
        "llm_worker_stat_logger_errors_total",
        "llm_worker_page_publish_errors_total",
        "llm_worker_observer_restarts_total",
        *(
            f"llm_worker_{name}_{suffix}"
            for name in (
                "serving_loop_lag_seconds",
                "exporter_render_seconds",
                "page_publish_seconds",
            )
            for suffix in ("bucket", "count", "sum")
        ),
    }


def test_the_heartbeat_appears_with_its_first_beat(registry: CollectorRegistry) -> None:
    """Absent until set, then an instant."""
    metrics = Metrics(registry)
    name = "llm_worker_serving_loop_heartbeat_timestamp_seconds"
    assert registry.get_sample_value(name) is None
    metrics.serving_loop_heartbeat_timestamp_seconds.set_to_current_time()
    assert (registry.get_sample_value(name) or 0) > 1e9


def test_counters_of_a_rank_exist_before_its_first_step_and_gauges_do_not(
    registry: CollectorRegistry,
) -> None:
    """rate() sees the first miss; capacity that nobody told stays absent."""
    metrics = StatMetrics(registry)
    metrics.engine("m", 1)
    labels = {"model_name": "m", "engine": "1"}
    for objective in ("ttft", "tpot", "e2e"):
        missed = {**labels, "objective": objective}
        name = "llm_worker_goodput_missed_requests_total"
        assert registry.get_sample_value(name, missed) == 0
    assert registry.get_sample_value("llm_worker_engine_steps_total", labels) == 0
    assert registry.get_sample_value("llm_worker_kv_capacity_blocks", labels) is None
    assert (
        registry.get_sample_value("llm_worker_engine_last_step_timestamp_seconds", labels) is None
    )
    assert "llm_worker_engine_step_execution_seconds_count" not in samples(registry)


def test_capacity_that_is_unknown_in_one_unit_is_absent_in_that_unit_only(
    registry: CollectorRegistry,
) -> None:
    """Bytes the engine did not tell are not guessed, nor is their use."""
    metrics = StatMetrics(registry)
    metrics.engine("m", 0).set_capacity(blocks=9, block_size_tokens=16, tokens=144, bytes_=None)
    labels = {"model_name": "m", "engine": "0"}
    assert registry.get_sample_value("llm_worker_kv_capacity_blocks", labels) == 9
    assert registry.get_sample_value("llm_worker_kv_capacity_tokens", labels) == 144
    assert registry.get_sample_value("llm_worker_kv_active_tokens", labels) == 0
    assert registry.get_sample_value("llm_worker_kv_capacity_bytes", labels) is None
    assert registry.get_sample_value("llm_worker_kv_active_bytes", labels) is None


def test_a_model_seen_for_the_first_time_has_every_ending_at_zero(
    registry: CollectorRegistry,
) -> None:
    """The closed set of endings is there before the first request ends."""
    metrics = StatMetrics(registry)
    metrics.ledger("m")
    for outcome, reason in ENDINGS:
        labels = {"model_name": "m", "outcome": outcome, "reason": reason}
        assert registry.get_sample_value("llm_worker_requests_ended_total", labels) == 0


def test_an_ending_outside_the_closed_set_is_refused(registry: CollectorRegistry) -> None:
    """A label value nobody documented cannot appear, and the request stays in flight."""
    ledger = StatMetrics(registry).ledger("m")
    ledger.receive()
    with pytest.raises(KeyError):
        ledger.end("finished", "because")
    assert registry.get_sample_value("llm_worker_requests_in_flight", {"model_name": "m"}) == 1


def test_exactly_one_state_is_set(registry: CollectorRegistry) -> None:
    """The state set always sums to 1."""
    metrics = Metrics(registry)
    for state in ("starting", "ready", "ready", "draining"):
        metrics.set_state(state)
        values = {
            name: registry.get_sample_value("llm_worker_state", {"state": name}) for name in STATES
        }
        assert values == {name: float(name == state) for name in STATES}
    with pytest.raises(ValueError, match="unknown worker state 'asleep'"):
        metrics.set_state("asleep")


def test_targets_are_published_in_seconds(registry: CollectorRegistry) -> None:
    """What goodput is judged by can be drawn beside it."""
    StatMetrics(registry).set_goodput_targets(GoodputTargets(0.5, 0.05, 10.0))
    for objective, seconds in (("ttft", 0.5), ("tpot", 0.05), ("e2e", 10.0)):
        name = "llm_worker_goodput_target_seconds"
        assert registry.get_sample_value(name, {"objective": objective}) == seconds


def test_declaring_twice_on_one_registry_fails_at_once(registry: CollectorRegistry) -> None:
    """Two sets of the same names would make the page invalid."""
    Metrics(registry)
    with pytest.raises(ValueError, match="Duplicated timeseries"):
        Metrics(registry)


def test_the_page_is_valid_openmetrics(registry: CollectorRegistry) -> None:
    """All families, with every label set in use, go through the strict parser."""
    from prometheus_client.openmetrics import exposition, parser

    render: Any = exposition.generate_latest
    parse: Any = parser.text_string_to_metric_families  # the strict one

    metrics = Metrics(registry)
    metrics.set_state("ready")
    metrics.set_build("1", "0.32.0")
    metrics.exporter_source_errors_total.labels("vllm").inc(0)
    metrics.ledger("m")
    metrics.engine("m", 0).set_capacity(9, 16, 144, 4096)
    assert len(list(parse(render(registry).decode()))) == len(LABELS)


def test_metrics_are_declared_without_vllm() -> None:
    """The system server has its metrics before vLLM is imported, and where it is not installed."""
    code = "import sys; sys.modules['vllm'] = None; import llm_worker.metrics"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_endings_cover_what_vllm_calls_a_finish_reason() -> None:
    """One ending per finish reason, and the outcomes that the ledger's documentation names."""
    assert {outcome for outcome, _ in declared.ENDINGS} == {
        "finished",
        "disconnected",
        "rejected",
        "errored",
    }
    assert len(set(declared.ENDINGS)) == len(declared.ENDINGS)
