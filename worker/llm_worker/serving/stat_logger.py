"""vLLM's stats → our metrics.

Owns the stat logger: one `recorder.Recorder` per data-parallel rank.
Never reads the environment, never awaits in ``record``, and never lets an exception of ours out:
one would end vLLM's output handler and with it all serving.
Source: vllm/v1/metrics/loggers.py, 0.32.0.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any

from prometheus_client import REGISTRY
from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from llm_worker.metrics import StatMetrics
from llm_worker.serving import hooks, ledger
from llm_worker.serving.ledger import CaughtErrors
from llm_worker.serving.recorder import (
    NullRecorder,
    Recorder,
    engine_cache_info,
    make_recorder,
    model_name,
)
from llm_worker.settings.worker import GoodputTargets, goodput_from_env

log = logging.getLogger(__name__)

# At import, because that is the last moment: vLLM imports this module for PluginStatLogger right
# before it connects to its engine, and in a plain ``vllm serve`` the general plugin ran before the
# class was imported whose ready message has to be read.
hooks.install()


def bind(metrics: StatMetrics, targets: GoodputTargets) -> type[AggregateStatLoggerBase]:
    """Return a stat logger class that writes to ``metrics``, for ``stat_loggers=[...]``.

    vLLM constructs it as ``cls(vllm_config=, engine_indexes=[...])`` once the engine is up. From
    here on ``PluginStatLogger``, which vLLM loads wherever this package is installed, says nothing
    in this process.
    """
    global _bound  # noqa: PLW0603  one worker per process; vLLM constructs the plugin by itself
    _bound = True

    class WorkerStatLogger(StatLogger):
        """The stat logger of this worker."""

        def __init__(self, vllm_config: Any, engine_indexes: Sequence[int] = (0,)) -> None:
            super().__init__(vllm_config, engine_indexes, metrics, targets)

    return WorkerStatLogger


_bound = False


class StatLogger(AggregateStatLoggerBase):  # type: ignore[misc]
    """Routes vLLM's stats to one recorder per rank; the boundary that no exception of ours crosses.

    Aggregate, because vLLM tells sleep and admission rejections to aggregate loggers only. Each
    stage of a record stands alone: where one fails, it is counted in
    ``stat_logger_errors_total{stage}``, logged at most once a minute, and the next one runs.
    """

    def __init__(
        self,
        vllm_config: Any,
        engine_indexes: Sequence[int],
        metrics: StatMetrics,
        targets: GoodputTargets,
    ) -> None:
        self._metrics = metrics
        self._errors = CaughtErrors(metrics)
        self._vllm_config = vllm_config
        self._targets = targets
        self._recorders: dict[int, Recorder | NullRecorder] = {}
        self._engine_indexes = tuple(engine_indexes)
        try:
            metrics.set_goodput_targets(targets)
            if (seconds := hooks.model_load_seconds(vllm_config)) is not None:
                metrics.model_load_seconds.labels(model_name(vllm_config)).set(seconds)
            metrics.ledger(model_name(vllm_config))
        except Exception as error:
            self._errors.caught("scheduler", error)
        for index in self._engine_indexes:
            self._add_recorder(index)

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Count one step output. Runs on vLLM's loop: arithmetic only."""
        recorder = self._recorders.get(engine_idx)
        if recorder is None:  # elastic scale-up
            recorder = self._add_recorder(engine_idx)
        if scheduler_stats is not None:
            try:
                recorder.scheduler(scheduler_stats, iteration_stats is not None)
            except Exception as error:
                self._errors.caught("scheduler", error)
        try:
            recorder.iteration(scheduler_stats, iteration_stats)
        except Exception as error:
            self._errors.caught("iteration", error)
        if iteration_stats is not None:
            try:
                if iteration_stats.finished_requests:
                    recorder.finished(iteration_stats.finished_requests)
            except Exception as error:
                self._errors.caught("finished", error)

    def record_sleep_state(self, is_awake: int = 0, level: int = 0) -> None:
        """Forget the last step: the time asleep is no step interval."""
        try:
            for recorder in self._recorders.values():
                recorder.pause()
        except Exception as error:
            self._errors.caught("scheduler", error)

    def record_admission_rejection(self, reason: str) -> None:
        """Tell the ledger why; it counts each rejected request where it ends."""
        ledger.note_rejection(reason)

    def log_engine_initialized(self) -> None:
        """Log capacity and limits, once."""
        try:
            info = engine_cache_info(self._vllm_config)
        except Exception as error:
            self._errors.caught("scheduler", error)
            return
        log.info(
            "engine cache: %s blocks of %d tokens, %s bytes, per rank %s; at most %d sequences and "
            "%d tokens per step, %d tokens per request; parallel %s",
            info.blocks,
            info.block_size_tokens,
            info.kv_bytes,
            dict(info.rank_blocks),
            info.max_num_seqs,
            info.max_num_batched_tokens,
            info.max_model_len_tokens,
            dict(info.parallel_sizes),
            extra={"blocks": info.blocks, "kv_bytes": info.kv_bytes},
        )

    def _add_recorder(self, index: int) -> Recorder | NullRecorder:
        recorder: Recorder | NullRecorder = NullRecorder()
        try:
            recorder = make_recorder(
                self._vllm_config, index, self._engine_indexes, self._metrics, self._targets
            )
        except Exception as error:
            self._errors.caught("scheduler", error)
        self._recorders[index] = recorder
        return recorder


class PluginStatLogger(AggregateStatLoggerBase):  # type: ignore[misc]
    """The same stats from a plain ``vllm serve``: entry point ``vllm.stat_logger_plugins``.

    Declares our metrics on prometheus_client's default registry, which is the one behind vLLM's
    ``/metrics``, and installs the ledger. Where this process is our own worker it does nothing.
    With several API servers each process has one; vLLM's multiprocess directory adds them up.
    """

    def __init__(self, vllm_config: Any, engine_indexes: Sequence[int] = (0,)) -> None:
        self._inner: StatLogger | None = None
        if _bound:
            return
        try:
            self._inner = self._start(vllm_config, engine_indexes)
        except Exception:
            # Counted nowhere, as the counters are what could not be made; serving goes on.
            log.exception("llm_worker's metrics are missing from this server")

    @staticmethod
    def _start(vllm_config: Any, engine_indexes: Sequence[int]) -> StatLogger:
        metrics = _default_metrics()
        ledger.install_ledger(metrics)
        return StatLogger(vllm_config, engine_indexes, metrics, goodput_from_env())

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Count one step output."""
        if self._inner is not None:
            self._inner.record(scheduler_stats, iteration_stats, mm_cache_stats, engine_idx)

    def record_sleep_state(self, is_awake: int = 0, level: int = 0) -> None:
        """See ``StatLogger``."""
        if self._inner is not None:
            self._inner.record_sleep_state(is_awake, level)

    def record_admission_rejection(self, reason: str) -> None:
        """See ``StatLogger``."""
        if self._inner is not None:
            self._inner.record_admission_rejection(reason)

    def log_engine_initialized(self) -> None:
        """See ``StatLogger``."""
        if self._inner is not None:
            self._inner.log_engine_initialized()


@functools.cache
def _default_metrics() -> StatMetrics:
    """Our metrics on the default registry; an engine built twice in a process shares them."""
    return StatMetrics(REGISTRY)
