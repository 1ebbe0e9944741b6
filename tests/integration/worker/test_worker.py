"""The worker on the real engine: it serves, tells its state, and ends well whatever happens."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics

from support.waiting import until
from support.worker_process import WorkerProcess, free_ports

pytestmark = pytest.mark.needs("vllm")

Start = Callable[..., WorkerProcess]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts workers that end with the test."""
    workers: list[WorkerProcess] = []

    def begin(*arguments: str, **fields: Any) -> WorkerProcess:
        log = tmp_path / f"worker-{len(workers)}.log"
        workers.append(WorkerProcess(log, arguments, **fields))
        return workers[-1]

    yield begin
    for each in workers:
        each.close()


@pytest.fixture(scope="module")
def start_up() -> list[dict[str, Any]]:
    """What ``/health`` said while the shared worker started; filled by ``worker``."""
    return []


@pytest.fixture(scope="module")
def worker(
    tmp_path_factory: pytest.TempPathFactory, start_up: list[dict[str, Any]]
) -> Iterator[WorkerProcess]:
    """One ready worker for the tests that only look."""
    log = tmp_path_factory.mktemp("worker") / "log"
    running = WorkerProcess(
        log,
        ("--worker-namespace", "team-a", "--worker-component", "chat"),
        {"LLM_WORKER_GOODPUT": "ttft=60,tpot=60,e2e=0.000001"},
    )
    try:
        running.wait_until_listening()
        while not start_up or not start_up[-1]["ready"]:
            said = running.health()
            assert said is not None, running.log()[-4000:]
            start_up.append(said)
            time.sleep(0.05)
        yield running
    finally:
        running.close()


def test_the_system_server_tells_the_phases_before_the_model_is_loaded(
    worker: WorkerProcess, start_up: list[dict[str, Any]]
) -> None:
    """From the first second on, one can see what start-up is doing."""
    phases = list(dict.fromkeys(said["startup_phase"] for said in start_up))
    assert phases[0] == "import"
    assert "engine" in phases
    assert phases[-1] is None
    assert start_up[0]["reasons"][0]["code"] == "state_starting"
    assert all(said["live"] for said in start_up)


def test_it_serves_every_kind_of_vllm_request(worker: WorkerProcess) -> None:
    """Completions, chat, streams, models and tokenisation are vLLM's own routes."""
    assert worker.complete(prompt="hello", max_tokens=5).json()["usage"]["completion_tokens"] <= 5
    chat = httpx.post(
        f"{worker.api}/v1/chat/completions",
        json={
            "model": "tiny",
            "messages": [{"role": "user", "content": "hello"}],
            "max_tokens": 4,
            "ignore_eos": True,
        },
        timeout=60,
    ).json()
    assert chat["choices"][0]["finish_reason"] == "length"
    assert [*worker.stream(max_tokens=7)][-1]["choices"][0]["finish_reason"] == "length"
    assert httpx.get(f"{worker.api}/v1/models").json()["data"][0]["id"] == "tiny"
    assert httpx.get(f"{worker.api}/health").status_code == 200
    assert httpx.post(f"{worker.api}/tokenize", json={"model": "tiny", "prompt": "a"}).json()


def test_both_formats_carry_vllms_metrics_and_ours_with_the_constant_labels(
    worker: WorkerProcess,
) -> None:
    """One page: vLLM's families, ours and the process's, in the format that was asked for."""
    plain = worker.get("/metrics")
    assert plain.headers["content-type"].startswith("text/plain; version=0.0.4")
    names = {name.split("{")[0] for name in worker.samples()}
    assert {
        "vllm:num_requests_running",
        "llm_worker_kv_capacity_blocks",
        "process_resident_memory_bytes",
    } <= names
    asked = {"accept": "application/openmetrics-text; version=1.0.0"}
    open_page = worker.get("/metrics", headers=asked)
    assert open_page.headers["content-type"].startswith("application/openmetrics-text")
    families = {f.name: f for f in openmetrics(open_page.text)}  # type: ignore[no-untyped-call]
    (sample,) = families["vllm:num_requests_running"].samples
    assert sample.labels["llm_namespace"] == "team-a"
    assert sample.labels["llm_component"] == "chat"
    assert worker.samples()[
        'llm_worker_exporter_source_up{llm_component="chat",llm_namespace="team-a",source="vllm"}'
    ]


def running(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those still there; one that ended and waits for init to notice is not."""
    return [p for p in psutil.wait_procs(processes, timeout=2)[1] if p.status() != "zombie"]


def value(worker: WorkerProcess, name: str, **labels: str) -> float:
    """The sum over the series that carry these labels."""
    wanted = [f'{key}="{text}"' for key, text in labels.items()]
    found = [
        number
        for series, number in worker.samples().items()
        if series.partition("{")[0] == name and all(pair in series for pair in wanted)
    ]
    assert found, f"no series {name} {labels}"
    return sum(found)


def test_capacity_and_limits_are_known_on_an_idle_engine(worker: WorkerProcess) -> None:
    """The first scrape of an engine that never stepped is right already, and agrees with info."""
    info = worker.get("/engine/info").json()
    blocks = value(worker, "llm_worker_kv_capacity_blocks", engine="0")
    block_size = value(worker, "llm_worker_kv_block_size_tokens", engine="0")
    assert blocks > 0
    assert value(worker, "llm_worker_kv_capacity_tokens", engine="0") == blocks * block_size
    assert block_size == info["block_size_tokens"]
    assert value(worker, "llm_worker_engine_max_model_len_tokens", engine="0") == 4096


def test_the_ledger_balances_after_a_disconnect_that_vllm_does_not_count(
    worker: WorkerProcess,
) -> None:
    """received = ended + in flight, and who hung up is counted as such."""
    before = value(worker, "llm_worker_requests_ended_total", outcome="disconnected")
    stream = worker.stream(max_tokens=3000)
    next(stream)
    worker.engine_core().suspend()  # or all of it may be served before anybody looks
    try:
        assert value(worker, "llm_worker_requests_in_flight") == 1
        stream.close()  # type: ignore[attr-defined]
        until("no request in flight", lambda: value(worker, "llm_worker_requests_in_flight") == 0)
    finally:
        worker.engine_core().resume()
    ended = value(worker, "llm_worker_requests_ended_total")
    assert value(worker, "llm_worker_requests_ended_total", outcome="disconnected") == before + 1
    assert value(worker, "llm_worker_requests_received_total") == ended


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"model": "another", "prompt": "hello"}, 404),
        ({"model": "tiny", "prompt": "hello", "max_tokens": 100_000}, 400),
        ({"model": "tiny", "prompt": "hello", "temperature": -1}, 400),
    ],
)
def test_what_the_api_refuses_is_in_the_ledger(
    worker: WorkerProcess, body: dict[str, Any], status: int
) -> None:
    """A request that never reached the engine was received, and rejected, once."""
    rejected = value(worker, "llm_worker_requests_ended_total", reason="invalid")
    answer = httpx.post(f"{worker.api}/v1/completions", json=body, timeout=30)
    assert answer.status_code == status
    assert value(worker, "llm_worker_requests_ended_total", reason="invalid") == rejected + 1
    ended = value(worker, "llm_worker_requests_ended_total")
    assert value(worker, "llm_worker_requests_received_total") == ended


def test_goodput_needs_every_target_at_once(worker: WorkerProcess) -> None:
    """With an end-to-end target that nobody can meet, nothing is goodput, and it says why."""
    worker.complete(prompt="hello", max_tokens=3)
    evaluated = value(worker, "llm_worker_goodput_evaluated_requests_total")
    assert evaluated > 0
    assert value(worker, "llm_worker_goodput_requests_total") == 0
    assert value(worker, "llm_worker_goodput_missed_requests_total", objective="e2e") == evaluated
    assert value(worker, "llm_worker_goodput_missed_requests_total", objective="ttft") == 0


def test_versions_are_told(worker: WorkerProcess) -> None:
    """Ours, vLLM's and Python's."""
    told = worker.get("/version").json()
    assert set(told) == {"llm_worker", "vllm", "python"}
    assert told["vllm"].startswith("0.32.0")


def test_an_unknown_route_says_so(worker: WorkerProcess) -> None:
    """A wrong path is a clear answer."""
    answer = worker.get("/healthz")
    assert answer.status_code == 404
    assert "/healthz" in answer.json()["error"]


REPORT_FREEZE = """
import atexit, gc, os, pathlib
name = f"{os.environ['FROZEN']}/{os.getpid()}"
atexit.register(lambda: pathlib.Path(name).write_text(str(gc.get_freeze_count())))
"""


def test_a_worker_that_shares_metrics_logs_json_and_has_a_short_queue(
    start: Start, tmp_path: Path
) -> None:
    """What one start can show of options, refusals and a frozen heap.

    Its page is whole and drops nothing; each line of ours in the log is JSON; a full queue is a
    rejection; and full garbage collections find the heap frozen.
    """
    (tmp_path / "sitecustomize.py").write_text(REPORT_FREEZE, encoding="utf-8")
    worker = start(
        "--worker-multiproc-dir", "auto", "--worker-log-format", "json",
        "--max-num-queued-reqs", "1",
        environment={"PYTHONPATH": str(tmp_path), "FROZEN": str(tmp_path)},
    )  # fmt: skip
    worker.wait_until_ready()
    stream = worker.stream(max_tokens=3900)
    next(stream)
    assert worker.complete(prompt="a", max_tokens=1).status_code == 503
    list(stream)
    answered = worker.complete(prompt="a", max_tokens=1, ignore_eos=True)
    assert answered.status_code == 200, answered.text

    assert value(worker, "llm_worker_requests_ended_total", reason="max_num_queued_reqs") == 1
    assert value(worker, "llm_worker_requests_ended_total", outcome="errored") == 0
    assert value(worker, "llm_worker_requests_ended_total", reason="length") == 3  # the warm-up's
    assert value(worker, "vllm:generation_tokens_total") == 3902
    assert value(worker, "process_resident_memory_bytes") > 0
    assert value(worker, "llm_worker_kv_capacity_blocks") > 0
    assert value(worker, "llm_worker_exporter_families_dropped_total") == 0
    up = "llm_worker_exporter_source_up"
    sources = ("multiprocess", "vllm", "serving", "observer", "observer_process")
    assert [value(worker, up, source=source) for source in sources] == [1] * 5

    serving = worker.part("serving").pid
    worker.terminate()
    assert worker.wait() == 0
    ours = [line for line in worker.log().splitlines() if '"logger": "llm_worker' in line]
    told = [json.loads(line) for line in ours]
    assert [line["message"] for line in told if line["message"].startswith("engine cache: ")]
    assert told[-1]["message"] == "exit 0: stopped"
    assert worker.log().count("engine cache: ") == 1
    assert int((tmp_path / str(serving)).read_text()) > 100_000


def test_sigterm_finishes_what_is_in_flight_and_exits_0(start: Start, tmp_path: Path) -> None:
    """A drained worker is unready at once, loses no token, leaves no process, remembers why."""
    worker = start("--worker-state-dir", str(tmp_path / "state"), "--worker-drain-seconds", "60")
    worker.wait_until_ready()
    children, segments = worker.descendants(), worker.segments()
    chunks: list[dict[str, Any]] = []
    with ThreadPoolExecutor() as pool:
        reading = pool.submit(lambda: chunks.extend(worker.stream(max_tokens=3900)))
        until("the first chunk", lambda: chunks)
        worker.terminate()
        until("the worker to drain", lambda: (worker.health() or {}).get("state") == "draining")
        assert worker.get("/ready").status_code == 503
        assert not reading.done(), "the stream ended before the drain could be seen"
        reading.result(timeout=60)
    assert worker.wait() == 0, worker.log()[-4000:]
    # With ignore_eos only the last of all 3,900 tokens ends it so; a busy server joins some chunks.
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert not running(children)
    assert not [segment for segment in segments if segment.exists()]
    (record,) = (tmp_path / "state").glob("*.exit.json")
    assert json.loads(record.read_text(encoding="utf-8"))["reason"] == "stopped"


def test_a_request_that_outlasts_the_drain_is_ended(start: Start) -> None:
    """The drain time is a promise to the supervisor, too; what it cuts off is no client's doing."""
    worker = start("--worker-drain-seconds", "0.5")
    worker.wait_until_ready()
    stream = worker.stream(max_tokens=4000)
    chunks = [next(stream)]
    endings = [value(worker, "llm_worker_requests_ended_total", reason="drain_timeout")]

    def watch() -> None:
        with contextlib.suppress(httpx.HTTPError, AssertionError):
            while True:
                endings.append(
                    value(worker, "llm_worker_requests_ended_total", reason="drain_timeout")
                )

    with ThreadPoolExecutor() as pool:
        reading = pool.submit(lambda: chunks.extend(_until_error(stream)))
        watching = pool.submit(watch)
        began = time.monotonic()
        worker.terminate()
        assert worker.wait() == 0, worker.log()[-4000:]
        took = time.monotonic() - began
        reading.result(timeout=10)
        watching.result(timeout=10)
    assert took < 20
    assert chunks[-1]["choices"][0]["finish_reason"] is None, "it was served to its end"
    assert endings[0] == 0
    assert endings[-1] == 1


def _time_of_death(pid: int) -> float:
    """time.monotonic() at which the process ended; a zombie has ended."""
    descriptor = os.pidfd_open(pid)
    try:
        select.select([descriptor], [], [])
        return time.monotonic()
    finally:
        os.close(descriptor)


def test_a_killed_worker_process_of_the_engine_takes_the_worker_along(start: Start) -> None:
    """An engine core that lost the process with the model is as dead as one that was killed."""
    worker = start()
    worker.wait_until_ready()
    children = worker.descendants()
    (process,) = (c for c in children if "VLLM::Worker" in " ".join(c.cmdline()))
    process.kill()
    assert worker.wait() == 70, worker.log()[-4000:]
    assert not running(children)


def _until_error(stream: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    try:
        yield from stream
    except httpx.HTTPError:
        return


def test_a_killed_engine_is_seen_at_once_and_takes_the_worker_along(
    start: Start, tmp_path: Path
) -> None:
    """Unready within 200 ms, requests fail clearly, nothing is left, the next run remembers."""
    state = str(tmp_path / "state")
    worker = start("--worker-state-dir", state)
    worker.wait_until_ready()
    children, segments = worker.descendants(), worker.segments()
    assert segments, "the engine maps no shared memory: this test would prove nothing"
    core = worker.engine_core()
    with ThreadPoolExecutor() as pool, httpx.Client() as probe:
        waiting = pool.submit(worker.complete, prompt="a", max_tokens=4000, ignore_eos=True)
        stream = worker.stream(max_tokens=4000)
        next(stream)
        assert probe.get(f"{worker.system}/ready").status_code == 200
        death = pool.submit(_time_of_death, core.pid)  # after the signal: memory is given back
        core.kill()
        asked = told_ready = time.monotonic()
        while probe.get(f"{worker.system}/ready").status_code == 200:
            assert not death.done() or time.monotonic() - death.result() < 5
            told_ready, asked = asked, time.monotonic()
        # By when it was asked: a busy machine's probe may take longer than the verdict.
        unready_after = told_ready - death.result()
        chunks = list(_until_error(stream))
        failed = waiting.result(timeout=30)
    assert unready_after < 0.2, f"{unready_after:.3f} s"
    assert failed.status_code == 500
    assert "EngineCore" in failed.json()["error"]["message"]
    assert chunks[-1]["error"]["code"] == 500
    assert worker.wait() == 70, worker.log()[-4000:]
    assert "EngineCore was ended by SIGKILL" in worker.log()
    assert not running(children)
    assert not [segment for segment in segments if segment.exists()]

    successor = start("--worker-state-dir", state, system_port=worker.system_port)
    successor.wait_until_listening()
    died = value(successor, "llm_worker_last_exit_timestamp_seconds", reason="engine_dead")
    assert abs(time.time() - died) < 60
    # The same process, asked to stop while the model loads, goes at once.
    successor.terminate()
    assert successor.wait(30) == 0, successor.log()[-4000:]


def test_a_model_that_is_not_there_exits_69_and_says_where_it_looked(start: Start) -> None:
    """A start that cannot succeed is told apart from a crash."""
    worker = start(model="/nowhere/to/be/found")
    assert worker.wait(120) == 69
    assert "/nowhere/to/be/found" in worker.log()
    assert "start-up failed in phase configure" in worker.log()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-model-len", "many"], "vLLM refused its arguments"),
        (["--port", "{busy}"], "choose another --port"),
        (["--worker-system-port", "{busy}"], "choose another --worker-system-port"),
    ],
)
def test_settings_that_fail_late_exit_78_with_the_fix(
    start: Start, arguments: list[str], message: str
) -> None:
    """A refused argument or a busy port is a matter of configuration, whoever finds it."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        busy = str(holder.getsockname()[1])
        worker = start(*(argument.format(busy=busy) for argument in arguments))
        assert worker.wait(120) == 78, worker.log()[-4000:]
    assert message in worker.log()


def _free_range() -> int:
    """A port that is free, as are the next one and both a hundred above."""
    while True:
        (port,) = free_ports(1)
        try:
            with contextlib.ExitStack() as stack:
                for offset in (0, 1, 100, 101):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port + offset))
            return port
        except (OSError, OverflowError):
            continue


def test_two_ranks_are_told_apart_and_leave_nothing_behind_a_killed_worker(start: Start) -> None:
    """Each has its capacity at the first scrape, its steps and its index of KV blocks.

    SIGKILL gives the worker no chance to tidy up: engines, their workers and who coordinates the
    ranks go all the same.
    """
    worker = start(
        "--data-parallel-size", "2", "--worker-kv-events-port", str(_free_range()),
        "--worker-kv-plane", "off",
    )  # fmt: skip
    worker.wait_until_ready()
    ranks = ("0", "1")
    blocks = [value(worker, "llm_worker_kv_capacity_blocks", engine=rank) for rank in ranks]
    assert blocks[0] == blocks[1] > 0
    for rank, prompts in zip(ranks, (1, 3), strict=True):
        for number in range(prompts):
            httpx.post(
                f"{worker.api}/v1/completions",
                json={"model": "tiny", "prompt": f"{rank} {number}" * 200, "max_tokens": 2},
                headers={"X-data-parallel-rank": rank},
                timeout=60,
            ).raise_for_status()
        assert value(worker, "llm_worker_engine_steps_total", engine=rank) > 0

    def held() -> list[int]:
        sources = worker.get("/kv/status").json()["sources"]
        assert [source["rank"] for source in sources] == [0, 1]
        return [source["blocks"].get("gpu", 0) if source["ok"] else 0 for source in sources]

    until("three copies of each block", lambda: held()[1] == 3 * held()[0] > 0)

    children = [c for c in worker.descendants() if "resource_tracker" not in " ".join(c.cmdline())]
    assert len(children) >= 5, "two engine cores, two workers, a coordinator"
    worker.process.kill()
    worker.wait()
    _, alive = psutil.wait_procs(children, timeout=15)
    assert not alive


def test_writing_routes_ask_for_the_token_beyond_loopback(start: Start, tmp_path: Path) -> None:
    """Whoever can scrape the worker cannot stop it."""
    (tmp_path / "token").write_text("s3cret\n", encoding="utf-8")
    (port,) = free_ports(1)
    worker = start(
        "--worker-system-host", "0.0.0.0",
        "--worker-system-token-file", str(tmp_path / "token"),
        system_port=port,
    )  # fmt: skip
    worker.wait_until_listening()
    url = f"{worker.system}/engine/drain"
    assert httpx.post(url).status_code == 401
    assert httpx.post(url, headers={"authorization": "Bearer wrong"}).status_code == 401
    assert worker.get("/metrics").status_code == 200
    assert httpx.post(url, headers={"authorization": "Bearer s3cret"}).status_code == 202
    assert worker.wait(60) == 0
