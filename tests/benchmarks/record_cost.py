"""What one record() costs: our stat logger against vLLM's own Prometheus logger.

Both get the same step outputs, built from vLLM's own classes in the shape of a decoding engine: 64
running requests, one token each per step, and every 16th step one of them finishes and a new one is
prefilled. Rounds alternate between the two loggers in one run, so that both meet the same noise.
Also prints what the ledger adds to one streamed output.

Run: ``python tests/benchmarks/record_cost.py [--rounds N] [--steps N]``.
Goal: a ratio of at most 1; the exit code is 1 above it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import io
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

RUNNING = 64
FINISH_EVERY = 16
OUTPUTS = 512


def configuration(directory: Path) -> Any:
    """vLLM's real configuration of the tiny model, as it is once the engine is up."""
    from vllm.engine.arg_utils import EngineArgs

    from llm_worker.serving import tiny

    model = tiny.make(directory / "tiny")
    config = EngineArgs(
        model=str(model), load_format="dummy", enforce_eager=True, max_model_len=2048
    ).create_engine_config()
    config.cache_config.num_gpu_blocks = 16384
    config.cache_config.kv_cache_size_tokens = 16384 * config.cache_config.block_size
    return config


def step_outputs(count: int) -> list[tuple[Any, Any]]:
    """``count`` consecutive outputs: (SchedulerStats, IterationStats)."""
    from vllm.v1.engine import FinishReason
    from vllm.v1.metrics.stats import (
        FinishedRequestStats,
        IterationStats,
        PrefillStats,
        PrefixCacheStats,
        SchedulerStats,
    )

    outputs = []
    for step in range(count):
        cache = PrefixCacheStats()
        iteration = IterationStats()
        iteration.num_generation_tokens = RUNNING
        decoding = RUNNING
        if step % FINISH_EVERY == 0:
            decoding -= 1
            cache.record(num_tokens=256, num_hits=128, preempted=False)
            prefill = PrefillStats()
            prefill.set(256, 128, 0)
            iteration.prompt_token_stats.update_from_output(prefill)
            iteration.time_to_first_tokens_iter.append(0.035)
            iteration.max_num_generation_tokens_iter.append(200)
            iteration.n_params_iter.append(1)
            iteration.finished_requests.append(
                FinishedRequestStats(
                    finish_reason=FinishReason.LENGTH,
                    request_id=f"request-{step}",
                    e2e_latency=4.2,
                    num_prompt_tokens=256,
                    num_generation_tokens=200,
                    max_tokens_param=200,
                    queued_time=0.01,
                    prefill_time=0.02,
                    inference_time=4.15,
                    decode_time=4.1,
                    mean_time_per_output_token=4.1 / 199,
                    num_cached_tokens=128,
                )
            )
        iteration.inter_token_latencies_iter = [0.018 + 0.0001 * i for i in range(decoding)]
        scheduler = SchedulerStats(
            num_running_reqs=RUNNING,
            kv_cache_usage=0.3 + 0.001 * (step % 100),
            prefix_cache_stats=cache,
        )
        outputs.append((scheduler, iteration))
    return outputs


def time_round(logger: Any, outputs: list[tuple[Any, Any]]) -> float:
    """Microseconds per record()."""
    started = time.perf_counter()
    for scheduler, iteration in outputs:
        logger.record(scheduler, iteration, None, 0)
    return (time.perf_counter() - started) / len(outputs) * 1e6


def compare(directory: Path, rounds: int, steps: int) -> tuple[list[float], list[float]]:
    """Microseconds per step of each round: ours, vLLM's."""
    from prometheus_client import CollectorRegistry
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    from llm_worker.metrics import Metrics
    from llm_worker.serving import stat_logger as stats
    from llm_worker.settings.worker import GoodputTargets

    config = configuration(directory)
    ours = stats.bind(Metrics(CollectorRegistry()), GoodputTargets())(
        vllm_config=config, engine_indexes=[0]
    )
    theirs = PrometheusStatLogger(config, [0])
    outputs = step_outputs(steps)
    for logger in (ours, theirs):  # warm up
        time_round(logger, outputs)
    gc.collect()
    gc.freeze()
    ours_us: list[float] = []
    theirs_us: list[float] = []
    for number in range(rounds):
        pairs = [(ours, ours_us), (theirs, theirs_us)]
        for logger, times in pairs if number % 2 else reversed(pairs):
            times.append(time_round(logger, outputs))
    return ours_us, theirs_us


class _Output:
    finished = False
    outputs: tuple[Any, ...] = ()


async def _plain(self: Any, count: int) -> AsyncGenerator[_Output, None]:
    """As AsyncLLM.generate with its outputs waiting: yields without suspending."""
    output = _Output()
    for _ in range(count):
        yield output


def ledger_cost(rounds: int) -> float:
    """Microseconds the ledger's wrapper adds to one streamed output (median)."""
    from prometheus_client import CollectorRegistry

    from llm_worker.metrics import Metrics
    from llm_worker.serving import ledger

    ledger.install_ledger(Metrics(CollectorRegistry()))
    counted = ledger._counted(_plain)
    engine = SimpleNamespace(model_config=SimpleNamespace(served_model_name="tiny"))

    async def drain(method: Callable[..., Any]) -> float:
        started = time.perf_counter()
        async for _ in method(engine, OUTPUTS):
            pass
        return (time.perf_counter() - started) / OUTPUTS * 1e6

    async def run() -> float:
        added = []
        for _ in range(rounds):
            bare = await drain(_plain)
            added.append(await drain(counted) - bare)
        return statistics.median(added)

    return asyncio.run(run())


def main() -> int:
    """Measure and print; 1 where ours costs more than vLLM's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--steps", type=int, default=480)
    arguments = parser.parse_args()
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stderr(io.StringIO()):
        ours, theirs = compare(Path(directory), arguments.rounds, arguments.steps)
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    print(f"record() per step, {RUNNING} running requests, {arguments.rounds} alternating rounds")
    for name, times in (("llm_worker", ours), ("vllm PrometheusStatLogger", theirs)):
        print(
            f"  {name:26} median {statistics.median(times):7.1f} us"
            f"   min {min(times):7.1f}   max {max(times):7.1f}"
        )
    print(f"  ratio ours/vLLM's          median {ratio:7.2f}   (goal: at most 1.00)")
    print(f"ledger per streamed output   median {ledger_cost(200):7.2f} us")
    return 0 if ratio <= 1 else 1


if __name__ == "__main__":
    sys.exit(main())
