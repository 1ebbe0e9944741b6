"""Every metric of ours, declared once.

Owns names, labels, HELP texts and buckets. Never measures anything, never reads the environment,
and imports without vLLM. A label set that is closed is initialised when its owner is known, so that
``rate()`` sees the first failure; a gauge whose value is not known yet has no sample.
Long: a table of declarations that one reads by searching; the classes say which process has what.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.samples import Sample

from llm_worker.lifecycle import State
from llm_worker.settings.worker import GoodputTargets

PREFIX = "llm_worker_"

STATES = tuple(state.value for state in State)
OBJECTIVES = ("ttft", "tpot", "e2e")
STAGES = ("scheduler", "iteration", "finished", "ledger")
BATCH_PHASES = ("prefill", "decode")

# How a request can end: (outcome, reason). Nothing else is ever counted.
ENDINGS = (
    ("finished", "stop"),
    ("finished", "length"),
    ("finished", "abort"),
    ("finished", "error"),
    ("finished", "repetition"),
    ("disconnected", "client"),
    ("rejected", "max_num_queued_reqs"),
    ("rejected", "max_num_queued_tokens"),
    ("rejected", "invalid"),
    ("errored", "engine_dead"),
    ("errored", "drain_timeout"),
    ("errored", "internal"),
)

# Source: vllm/v1/metrics/buckets.py, 0.32.0: TIME_TO_FIRST_TOKEN_BUCKETS, and below
# ITERATION_TOKENS_BUCKETS. Steps, loop lag and rendering take the family that resolves single
# milliseconds: vLLM's inter-token family starts at 10 ms, above a whole step of a small model.
LATENCY_BUCKETS: tuple[float, ...] = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
    160.0,
    640.0,
    2560.0,
)
# Zero has a bucket of its own: "no prefill in this step" is the answer most often looked for.
TOKEN_BUCKETS: tuple[float, ...] = (
    0,
    1,
    8,
    16,
    32,
    64,
    128,
    256,
    512,
    1024,
    2048,
    4096,
    8192,
    16384,
)
REQUEST_BUCKETS: tuple[float, ...] = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)

_ENGINE = ("model_name", "engine")


class _UnknownUntilSet(Gauge):
    """A gauge without labels that has no sample until it is first set.

    A plain one says 0 from its declaration on, which for an instant means 1970. Only ``set`` and
    ``set_to_current_time`` are allowed.
    """

    def _metric_init(self) -> None:
        self._known = False

    def set(self, value: float) -> None:
        if not self._known:
            super()._metric_init()
            self._known = True
        super().set(value)

    def _child_samples(self) -> Iterable[Sample]:
        return super()._child_samples() if self._known else ()


class _Declared:
    """Metrics on one registry, each with our prefix."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry

    def _counter(self, name: str, help_: str, labels: Iterable[str] = ()) -> Counter:
        return Counter(PREFIX + name, help_, tuple(labels), registry=self.registry)

    def _gauge(self, name: str, help_: str, labels: Iterable[str], mode: Any) -> Gauge:
        return Gauge(
            PREFIX + name, help_, tuple(labels), registry=self.registry, multiprocess_mode=mode
        )

    def _unknown_gauge(self, name: str, help_: str, mode: Any) -> Gauge:
        return _UnknownUntilSet(
            PREFIX + name, help_, registry=self.registry, multiprocess_mode=mode
        )

    def _histogram(
        self, name: str, help_: str, labels: Iterable[str], buckets: tuple[float, ...]
    ) -> Histogram:
        return Histogram(
            PREFIX + name, help_, tuple(labels), registry=self.registry, buckets=buckets
        )


class StatMetrics(_Declared):
    """What the stat logger and the request ledger write: all that a plain ``vllm serve`` can tell.

    Safe to declare on vLLM's own registry: vLLM removes only collectors whose name starts with
    ``vllm:``. Raises ValueError (from prometheus_client) where the names are already registered.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__(registry)
        self._declare_kv()
        self._declare_limits()
        self._declare_steps()
        self._declare_goodput()
        self._declare_ledger()
        self._ledgers: dict[str, LedgerMetrics] = {}

    def engine(self, model_name: str, engine: int | str) -> EngineMetrics:
        """Bind the engine-scoped metrics of one data-parallel rank."""
        return EngineMetrics(self, model_name, str(engine))

    def ledger(self, model_name: str) -> LedgerMetrics:
        """Return the ledger of one model or adapter, its closed label set initialised."""
        ledger = self._ledgers.get(model_name)
        if ledger is None:
            ledger = self._ledgers[model_name] = LedgerMetrics(self, model_name)
        return ledger

    def set_goodput_targets(self, targets: GoodputTargets) -> None:
        """Publish the targets that the goodput counters are judged by."""
        for objective in OBJECTIVES:
            seconds = getattr(targets, f"{objective}_seconds")
            self.goodput_target_seconds.labels(objective).set(seconds)

    def _declare_kv(self) -> None:
        self.kv_capacity_blocks = self._gauge(
            "kv_capacity_blocks",
            "KV-cache blocks this rank can give to requests; the null block is not among them.",
            _ENGINE,
            "mostrecent",
        )
        self.kv_capacity_tokens = self._gauge(
            "kv_capacity_tokens",
            "Tokens that fit into the capacity blocks of this rank; for models with several "
            "KV-cache groups as vLLM computes it for requests of the maximum length.",
            _ENGINE,
            "mostrecent",
        )
        self.kv_capacity_bytes = self._gauge(
            "kv_capacity_bytes",
            "Memory of the capacity blocks, summed over the devices of this rank. "
            "Absent while the engine has not told.",
            _ENGINE,
            "mostrecent",
        )
        self.kv_active_blocks = self._gauge(
            "kv_active_blocks",
            "KV-cache blocks held by unfinished requests after the last step "
            "(cached blocks that nobody holds are free).",
            _ENGINE,
            "mostrecent",
        )
        self.kv_active_tokens = self._gauge(
            "kv_active_tokens",
            "Token slots of the active blocks; a block counts whole, also when partly filled.",
            _ENGINE,
            "mostrecent",
        )
        self.kv_active_bytes = self._gauge(
            "kv_active_bytes",
            "Memory of the active blocks, summed over the devices of this rank.",
            _ENGINE,
            "mostrecent",
        )
        self.kv_block_size_tokens = self._gauge(
            "kv_block_size_tokens",
            "Tokens per KV-cache block (the smallest group's where there are several).",
            _ENGINE,
            "mostrecent",
        )

    def _declare_limits(self) -> None:
        self.engine_max_num_seqs = self._gauge(
            "engine_max_num_seqs",
            "Most requests this rank runs in one step.",
            _ENGINE,
            "mostrecent",
        )
        self.engine_max_num_batched_tokens = self._gauge(
            "engine_max_num_batched_tokens",
            "Most tokens this rank computes in one step.",
            _ENGINE,
            "mostrecent",
        )
        self.engine_max_model_len_tokens = self._gauge(
            "engine_max_model_len_tokens",
            "Longest prompt and output together, in tokens.",
            _ENGINE,
            "mostrecent",
        )
        self.engine_parallel_size = self._gauge(
            "engine_parallel_size",
            "How many ways the engine is split along one dimension; 1 is not split.",
            (*_ENGINE, "dimension"),
            "mostrecent",
        )
        self.model_load_seconds = self._gauge(
            "model_load_seconds",
            "Building the model and loading its weights, in the slowest worker process. "
            "Absent while unknown.",
            ("model_name",),
            "mostrecent",
        )

    def _declare_steps(self) -> None:
        self.engine_steps_total = self._counter(
            "engine_steps",
            "Engine steps that had requests to run: one per step output with scheduler stats.",
            _ENGINE,
        )
        self.engine_step_interval_seconds = self._histogram(
            "engine_step_interval_seconds",
            "Between two consecutive step outputs while requests were running, as the API process "
            "sees it; never across an idle gap. One observation per step but the first after idle.",
            _ENGINE,
            LATENCY_BUCKETS,
        )
        self.engine_step_execution_seconds = self._histogram(
            "engine_step_execution_seconds",
            "The engine's wait for one step's model output, measured in the engine. "
            "Only with --enable-logging-iteration-details.",
            _ENGINE,
            LATENCY_BUCKETS,
        )
        self.engine_last_step_timestamp_seconds = self._gauge(
            "engine_last_step_timestamp_seconds",
            "When the last step output arrived (Unix time). Absent before the first step.",
            _ENGINE,
            "max",
        )
        self.batch_requests = self._histogram(
            "batch_requests",
            "Requests of one phase in one step. Without --enable-logging-iteration-details a "
            "prefill counts in the step that completes it.",
            (*_ENGINE, "phase"),
            REQUEST_BUCKETS,
        )
        self.batch_tokens = self._histogram(
            "batch_tokens",
            "Tokens computed for one phase in one step. Without --enable-logging-iteration-details "
            "a prompt's tokens count in the step that completes its prefill.",
            (*_ENGINE, "phase"),
            TOKEN_BUCKETS,
        )
        self.preemption_resumed_requests_total = self._counter(
            "preemption_resumed_requests",
            "Preempted requests that were scheduled again. Counted only with prefix caching on.",
            _ENGINE,
        )
        self.preemption_recomputed_tokens_total = self._counter(
            "preemption_recomputed_tokens",
            "Tokens of resumed requests that were no longer in the cache and are computed once "
            "more. Counted only with prefix caching on.",
            _ENGINE,
        )
        self.stat_logger_errors_total = self._counter(
            "stat_logger_errors",
            "Exceptions caught in our stat logger or request ledger; what one was about to count "
            "is missing from that stage's metrics.",
            ("stage",),
        )
        for stage in STAGES:
            self.stat_logger_errors_total.labels(stage)

    def _declare_goodput(self) -> None:
        self.goodput_evaluated_requests_total = self._counter(
            "goodput_evaluated_requests",
            "Finished requests that were judged by the targets. With n > 1 each completion is one.",
            _ENGINE,
        )
        self.goodput_requests_total = self._counter(
            "goodput_requests",
            "Finished requests that met TTFT, TPOT and E2E targets together. "
            "One that ended by error or abort is never good.",
            _ENGINE,
        )
        self.goodput_missed_requests_total = self._counter(
            "goodput_missed_requests",
            "Finished requests that missed this objective; one request can miss several.",
            (*_ENGINE, "objective"),
        )
        self.goodput_target_seconds = self._gauge(
            "goodput_target_seconds",
            "The target a request has to keep to be good.",
            ("objective",),
            "mostrecent",
        )

    def _declare_ledger(self) -> None:
        self.requests_received_total = self._counter(
            "requests_received",
            "Requests handed to the engine, and in our own worker those the API refused before it. "
            "received = sum(requests_ended) + requests_in_flight.",
            ("model_name",),
        )
        self.requests_ended_total = self._counter(
            "requests_ended",
            "Requests that ended, each exactly once, by how.",
            ("model_name", "outcome", "reason"),
        )
        self.requests_in_flight = self._gauge(
            "requests_in_flight",
            "Requests received and not ended.",
            ("model_name",),
            "livesum",
        )


class ExporterMetrics(_Declared):
    """What a page says about itself; see `exposition.exposition`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__(registry)
        self._declare_exporter()

    def _declare_exporter(self) -> None:
        self.exporter_source_up = self._gauge(
            "exporter_source_up",
            "1 if this source was collected for this page, 0 if it failed.",
            ("source",),
            "mostrecent",
        )
        self.exporter_source_errors_total = self._counter(
            "exporter_source_errors",
            "Collections of this source that failed; its families are missing from that page.",
            ("source",),
        )
        self.exporter_families_dropped_total = self._counter(
            "exporter_families_dropped",
            "Families left out of a page, by why. Counted per page.",
            ("source", "reason"),
        )
        self.exporter_render_seconds = self._histogram(
            "exporter_render_seconds",
            "Collecting and rendering one page of metrics.",
            (),
            LATENCY_BUCKETS,
        )


class ServingMetrics(StatMetrics):
    """What the serving process counts: the stat logger's, and those of the process around it."""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__(registry)
        self._declare_serving()

    def _declare_serving(self) -> None:
        self.startup_phase_seconds = self._gauge(
            "startup_phase_seconds",
            "How long this phase of the start took. Absent until measured.",
            ("phase",),
            "mostrecent",
        )
        self.state_entered_total = self._counter(
            "state_entered", "Times the worker entered this state.", ("state",)
        )
        for state in STATES:
            self.state_entered_total.labels(state)
        self.serving_loop_lag_seconds = self._histogram(
            "serving_loop_lag_seconds",
            "How much later than due the serving loop ran its heartbeat. "
            "One observation per heartbeat.",
            (),
            LATENCY_BUCKETS,
        )
        self.page_publish_seconds = self._histogram(
            "page_publish_seconds",
            "Rendering the serving process's metrics and handing them to the observer, about once "
            "a second, in CPU time of the thread that does it.",
            (),
            LATENCY_BUCKETS,
        )
        self.page_publish_errors_total = self._counter(
            "page_publish_errors",
            "Pages of the serving process that could not be handed to the observer.",
        )


class ObserverMetrics(ExporterMetrics):
    """What the observer process tells: the worker's state, and how it knows."""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__(registry)
        self._declare_observer()

    def set_state(self, state: str) -> None:
        """Show ``state``.

        Raises:
            ValueError: it is not one of ``STATES``.
        """
        if state not in STATES:
            raise ValueError(f"unknown worker state {state!r}; one of {', '.join(STATES)}")
        for name in STATES:
            self.state.labels(name).set(1 if name == state else 0)

    def set_build(self, version: str, vllm_version: str) -> None:
        """Publish what runs here."""
        self.build_info.labels(version, vllm_version).set(1)

    def _declare_observer(self) -> None:
        self.state = self._gauge(
            "state", "1 for the state the worker is in, 0 for all others.", ("state",), "mostrecent"
        )
        self.last_exit_timestamp_seconds = self._gauge(
            "last_exit_timestamp_seconds",
            "When the previous process of this worker ended, by why (Unix time). "
            "Absent when unknown.",
            ("reason",),
            "mostrecent",
        )
        self.build_info = self._gauge(
            "build_info",
            "1, labelled with the versions that run here.",
            ("version", "vllm_version"),
            "mostrecent",
        )
        self.serving_loop_heartbeat_timestamp_seconds = self._unknown_gauge(
            "serving_loop_heartbeat_timestamp_seconds",
            "When the serving loop last ran its heartbeat (Unix time). Absent before the first.",
            "max",
        )
        self.serving_page_age_seconds = self._unknown_gauge(
            "serving_page_age_seconds",
            "How old the serving process's part of this page is; it is written about once a "
            "second. One that is too old is left out. Absent before the first.",
            "max",
        )
        self.observer_restarts_total = self._counter(
            "observer_restarts",
            "Times the observer process, which serves this page, ended by itself and was started "
            "again. No request is touched by it.",
        )


class Metrics(ServingMetrics, ObserverMetrics):
    """All metrics of the worker on one registry: for their documents and for tests."""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__(registry)  # ServingMetrics; its last super().__init__ declares the rest


class EngineMetrics:
    """The children of one data-parallel rank, bound once: no label lookup in a step.

    Counters and histograms exist from the start. Gauges come with ``set_capacity`` and
    ``set_limits``, or with the first step; histograms that need an engine flag with their first
    observation.
    """

    def __init__(self, metrics: StatMetrics, model_name: str, engine: str) -> None:
        self._metrics = metrics
        labels = self._labels = (model_name, engine)
        self.steps = metrics.engine_steps_total.labels(*labels)
        self.step_interval = metrics.engine_step_interval_seconds.labels(*labels)
        self.prefill_requests = metrics.batch_requests.labels(*labels, "prefill")
        self.decode_requests = metrics.batch_requests.labels(*labels, "decode")
        self.prefill_tokens = metrics.batch_tokens.labels(*labels, "prefill")
        self.decode_tokens = metrics.batch_tokens.labels(*labels, "decode")
        self.resumed_requests = metrics.preemption_resumed_requests_total.labels(*labels)
        self.recomputed_tokens = metrics.preemption_recomputed_tokens_total.labels(*labels)
        self.goodput_evaluated = metrics.goodput_evaluated_requests_total.labels(*labels)
        self.goodput_good = metrics.goodput_requests_total.labels(*labels)
        self.goodput_missed_ttft = metrics.goodput_missed_requests_total.labels(*labels, "ttft")
        self.goodput_missed_tpot = metrics.goodput_missed_requests_total.labels(*labels, "tpot")
        self.goodput_missed_e2e = metrics.goodput_missed_requests_total.labels(*labels, "e2e")

    @cached_property
    def last_step_timestamp(self) -> Gauge:
        """Bound by the first step."""
        return self._metrics.engine_last_step_timestamp_seconds.labels(*self._labels)

    @cached_property
    def step_execution(self) -> Histogram:
        """Bound by the first step that carries the engine's own measurement."""
        return self._metrics.engine_step_execution_seconds.labels(*self._labels)

    @cached_property
    def active_blocks(self) -> Gauge:
        """Bound once the capacity is known."""
        return self._metrics.kv_active_blocks.labels(*self._labels)

    @cached_property
    def active_tokens(self) -> Gauge:
        """Bound once the capacity in tokens is known."""
        return self._metrics.kv_active_tokens.labels(*self._labels)

    @cached_property
    def active_bytes(self) -> Gauge:
        """Bound once the capacity in bytes is known."""
        return self._metrics.kv_active_bytes.labels(*self._labels)

    def set_capacity(
        self, blocks: int, block_size_tokens: int, tokens: int | None, bytes_: int | None
    ) -> None:
        """Publish the usable capacity and an idle cache. None stays absent."""
        metrics, labels = self._metrics, self._labels
        metrics.kv_capacity_blocks.labels(*labels).set(blocks)
        metrics.kv_block_size_tokens.labels(*labels).set(block_size_tokens)
        self.active_blocks.set(0)
        if tokens is not None:
            metrics.kv_capacity_tokens.labels(*labels).set(tokens)
            self.active_tokens.set(0)
        if bytes_ is not None:
            metrics.kv_capacity_bytes.labels(*labels).set(bytes_)
            self.active_bytes.set(0)

    def set_limits(
        self,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len_tokens: int,
        parallel_sizes: Mapping[str, int],
    ) -> None:
        """Publish what the engine was configured to take."""
        metrics, labels = self._metrics, self._labels
        metrics.engine_max_num_seqs.labels(*labels).set(max_num_seqs)
        metrics.engine_max_num_batched_tokens.labels(*labels).set(max_num_batched_tokens)
        metrics.engine_max_model_len_tokens.labels(*labels).set(max_model_len_tokens)
        for dimension, size in parallel_sizes.items():
            metrics.engine_parallel_size.labels(*labels, dimension).set(size)


class LedgerMetrics:
    """The ledger of one model or adapter: received = sum(ended) + in flight, at every instant."""

    def __init__(self, metrics: StatMetrics, model_name: str) -> None:
        self._received = metrics.requests_received_total.labels(model_name)
        self._in_flight = metrics.requests_in_flight.labels(model_name)
        self._ended = {
            ending: metrics.requests_ended_total.labels(model_name, *ending) for ending in ENDINGS
        }

    def receive(self) -> None:
        """Count one request in."""
        self._received.inc()
        self._in_flight.inc()

    def end(self, outcome: str, reason: str) -> None:
        """Count one request out. Raises KeyError for an ending not in ``ENDINGS``."""
        self._ended[outcome, reason].inc()
        self._in_flight.dec()
