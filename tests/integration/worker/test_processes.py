"""Supervisor, serving and observer on the real engine: none of them hurts another."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from support.waiting import until
from support.worker_process import WorkerProcess, free_ports

pytestmark = pytest.mark.needs("vllm")

STREAMS = 64
# In serving: one signal blocks its loop, another holds its interpreter's lock.
SABOTAGE = """
import ctypes, signal, time
if b"llm_worker.serving" in open("/proc/self/cmdline", "rb").read():
    signal.signal(signal.SIGUSR1, lambda *_: time.sleep(8))
    signal.signal(signal.SIGRTMIN, lambda *_: ctypes.PyDLL(None).sleep(20))
"""


@dataclass
class Stream:
    """One streamed completion as its client saw it."""

    arrivals: list[float] = field(default_factory=list)  # time.monotonic() of each chunk
    finish: str | None = None


def start(directory: Path, *arguments: str) -> WorkerProcess:
    (directory / "sitecustomize.py").write_text(SABOTAGE, encoding="utf-8")
    worker = WorkerProcess(directory / "worker.log", arguments, {"PYTHONPATH": str(directory)})
    worker.wait_until_ready()
    return worker


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    """One worker that indexes its KV blocks, for faults that it survives."""
    (events,) = free_ports(1)
    running = start(
        tmp_path_factory.mktemp("processes"),
        "--worker-kv-events-port", str(events), "--worker-kv-plane", "zmq://127.0.0.1:0",
    )  # fmt: skip
    yield running
    running.close()


async def stream(client: httpx.AsyncClient, url: str, number: int, tokens: int) -> Stream:
    seen = Stream()
    body = {
        "model": "tiny", "prompt": f"{number} " * 40, "max_tokens": tokens,
        "ignore_eos": True, "stream": True,
    }  # fmt: skip
    async with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                seen.arrivals.append(time.monotonic())
                if '"finish_reason":"' in line:
                    seen.finish = line.split('"finish_reason":"')[1].split('"')[0]
    return seen


def streams(url: str, tokens: int) -> list[Stream]:
    """All of them at once, to their ends."""

    async def gather() -> list[Stream]:
        limits = httpx.Limits(max_connections=STREAMS)
        async with httpx.AsyncClient(timeout=240, limits=limits) as client:
            return list(
                await asyncio.gather(*(stream(client, url, n, tokens) for n in range(STREAMS)))
            )

    return asyncio.run(gather())


def longest_pause(seen: list[Stream], begin: float, end: float) -> float:
    """The longest that one of them waited for a chunk between two moments."""
    pauses = [
        later - earlier
        for each in seen
        for earlier, later in zip(each.arrivals, each.arrivals[1:], strict=False)
        if later > begin and earlier < end
    ]
    return max(pauses, default=0.0)


def held(worker: WorkerProcess) -> dict[str, Any]:
    """The one rank of the KV index."""
    (source,) = worker.get("/kv/status").json()["sources"]
    return dict(source)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT])
def test_an_observer_that_dies_under_64_streams_costs_no_request_anything(
    worker: WorkerProcess, number: signal.Signals
) -> None:
    """All streams end as asked, none pauses; 8081 answers again, and its counters go on."""
    worker.complete(prompt="before " * 300, max_tokens=1)
    until("the first batch", lambda: held(worker)["batches"]["applied"] > 0)
    before = worker.samples()
    with ThreadPoolExecutor() as pool:
        running = pool.submit(streams, worker.api, 300)
        in_flight = 'llm_worker_requests_in_flight{model_name="tiny"}'
        until("all streams to be in flight", lambda: worker.samples()[in_flight] == STREAMS, 60)
        killed = time.monotonic()
        worker.part("observer").send_signal(number)
        answered = _answers_again(worker)
        # Counters of serving and of the observer, some seconds apart, over the death and after it.
        after = worker.samples()
        seen = running.result(timeout=240)
    assert [each.finish for each in seen] == ["length"] * STREAMS
    usual = longest_pause(seen, 0.0, killed)
    assert longest_pause(seen, killed, killed + 3) < max(1.0, 3 * usual)
    assert answered - killed < 2.0 or os.getloadavg()[0] > 8, f"{answered - killed:.2f} s"
    restarts = "llm_worker_observer_restarts_total"
    assert after[restarts] == before[restarts] + 1
    fallen = {
        series: (value, after.get(series))
        for series, value in before.items()
        if series.partition("{")[0].endswith(("_total", "_count", "_bucket"))
        and not series.startswith("llm_worker_observer_process")
        and after.get(series, 0.0) < value
    }
    assert not fallen
    # Everything it had heard it asks for once more, and the engine agrees block by block.
    worker.complete(prompt="after " * 300, max_tokens=1)
    until(
        "the index to be trusted and audited", lambda: held(worker)["ok"] and _audited(worker), 120
    )


def _answers_again(worker: WorkerProcess) -> float:
    """The moment at which ``/ready`` says yes from a new process."""
    old = {child.pid for child in psutil.Process(worker.process.pid).children()}
    while True:
        answer = httpx.get(f"{worker.system}/ready", timeout=10)
        moment = time.monotonic()
        if answer.status_code == 200 and worker.part("observer").pid not in old:
            return moment
        if worker.part("observer").pid not in old or answer.status_code != 200:
            time.sleep(0.01)


def _audited(worker: WorkerProcess) -> bool:
    answer = httpx.post(f"{worker.system}/kv/audit", timeout=60).json()
    return bool(answer["audits"]) and bool(answer["ok"])


def _stop(worker: WorkerProcess) -> None:
    worker.part("serving").suspend()


def _block(worker: WorkerProcess) -> None:
    worker.part("serving").send_signal(signal.SIGUSR1)


def _hold(worker: WorkerProcess) -> None:
    worker.part("serving").send_signal(signal.SIGRTMIN)


@pytest.mark.parametrize(
    ("hurt", "code"),
    [
        (_stop, "serving_stopped"),
        (_block, "serving_loop_late"),
        (_hold, "serving_interpreter_held"),
    ],
)
def test_a_serving_that_hangs_is_told_apart_while_8081_answers_in_milliseconds(
    worker: WorkerProcess, hurt: Callable[[WorkerProcess], None], code: str
) -> None:
    """Stopped, its loop blocked, its interpreter lock held: each has its name, and passes."""
    took: list[float] = []

    def said() -> str:
        began = time.monotonic()
        answer = worker.get("/ready")
        took.append(time.monotonic() - began)
        reasons = answer.json()["reasons"]
        assert answer.status_code == (503 if reasons else 200)
        return str(reasons[0]["code"]) if reasons else ""

    until("the worker to be healthy", lambda: said() == "", 60)
    hurt(worker)
    try:
        until("the verdict", lambda: said() == code, 15)
        assert worker.get("/live").status_code == 200, "nobody is killed for a few seconds"
        assert worker.get("/metrics").status_code == 200
        if code != "serving_loop_late":  # its metrics are not of now: absent, not frozen
            until(
                "serving's old page to be left out",
                lambda: "vllm:" not in worker.get("/metrics").text,
                15,
            )
    finally:
        worker.part("serving").resume()
    until("the worker to be healthy", lambda: said() == "", 60)
    assert sorted(took)[len(took) // 2] < 0.1
    until("serving's page", lambda: "vllm:" in worker.get("/metrics").text, 15)


def test_a_service_managers_sigterm_to_every_process_is_an_ordinary_stop(
    worker: WorkerProcess,
) -> None:
    """As systemd's default does it: what is in flight is finished, exit 0, "stopped"."""
    children = worker.descendants()
    assert len(children) >= 4, "observer, serving, engine core and its worker"
    with ThreadPoolExecutor() as pool:
        chunks: list[dict[str, Any]] = []
        reading = pool.submit(lambda: chunks.extend(worker.stream(max_tokens=2500)))
        until("the first chunk", lambda: bool(chunks), 60)
        for process in (psutil.Process(worker.process.pid), *children):
            process.terminate()
        reading.result(timeout=120)
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert worker.wait() == 0, worker.log()[-4000:]
    assert "exit 0: stopped" in worker.log()
    assert not _running(children)


def test_ctrl_c_is_an_ordinary_stop_and_twice_hurries(tmp_path: Path) -> None:
    """SIGINT goes to the whole process group of a terminal; the second gives up what is left."""
    worker = start(tmp_path, "--worker-drain-seconds", "120")
    try:
        stream = worker.stream(max_tokens=4000)
        next(stream)
        os.killpg(worker.process.pid, signal.SIGINT)
        until("the worker to drain", lambda: (worker.health() or {}).get("state") == "draining", 10)
        assert worker.process.poll() is None
        began = time.monotonic()
        os.killpg(worker.process.pid, signal.SIGINT)
        assert worker.wait() == 0, worker.log()[-4000:]
        assert time.monotonic() - began < 60
        assert "exit 0: stopped" in worker.log()
    finally:
        worker.close()


def test_a_killed_serving_is_unready_at_once_and_leaves_nothing(tmp_path: Path) -> None:
    """Within 100 ms; exit 70; no process, no shared memory, and the record says what it was."""
    state = tmp_path / "state"
    worker = start(tmp_path, "--worker-state-dir", str(state))
    try:
        children, segments = worker.descendants(), worker.segments()
        assert segments, "the engine maps no shared memory: this test would prove nothing"
        serving = worker.part("serving")
        with httpx.Client() as probe:
            assert probe.get(f"{worker.system}/ready").status_code == 200
            serving.kill()
            while serving.is_running() and serving.status() != psutil.STATUS_ZOMBIE:
                pass
            # By when it was asked: a busy machine's probe may take longer than the verdict.
            died = asked = told_ready = time.monotonic()
            while probe.get(f"{worker.system}/ready").status_code == 200:
                assert time.monotonic() - died < 5
                told_ready, asked = asked, time.monotonic()
            assert told_ready - died < 0.1
        assert worker.wait() == 70, worker.log()[-4000:]
        assert not _running(children)
        assert not [segment for segment in segments if segment.exists()]
        (record,) = state.glob("*.exit.json")
        assert '"serving_died"' in record.read_text(encoding="utf-8")
    finally:
        worker.close()


def _running(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [p for p in psutil.wait_procs(processes, timeout=5)[1] if p.status() != "zombie"]
