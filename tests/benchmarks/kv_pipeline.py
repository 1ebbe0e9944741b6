"""How fast are KV events indexed: our pipeline, Dynamo's standalone indexer, and the floor.

One publisher process sends the same pre-encoded streams in vLLM's format over ZMQ to each of them
in turn, round by round, so that a drifting machine drifts for all. Each consumer is a process of
its own, started empty for each run:

- ours: `llm_worker.kv.pipeline`, as the worker and the fleet service run it;
- dynamo: ``run_kv_indexer`` of ai-dynamo-runtime, in Rust (``--dynamo PYTHON`` names an
  interpreter that has it; without, it is left out and the output says so);
- floor: ZMQ receive (``recv_multipart``), msgspec decode of the hashes, one dict insert or removal
  per block;
- tuned: the same, receiving frame by frame as ours does, which is faster and has no goal: what is
  left between it and ours is what ours does more.

CPU seconds are those of the whole process, libzmq's threads included. Blocks are stored plus
removed. Memory is the growth of the resident set while the stream is sent slowly enough for nothing
to queue up. Everything runs on one machine, so use one that does nothing else.

    python tests/benchmarks/kv_pipeline.py [--dynamo PYTHON] [--rounds 5] [--streams 16x8,mix]

The exit code is 1 where a goal is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import multiprocessing
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import zmq

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "worker"))

from llm_worker.kv.index.index import Index
from llm_worker.kv.wire import Decoder

CHAIN_BLOCKS = 64  # of one prompt
PREFIX_BLOCKS = 1000  # of the prompt that is asked for
SETTLE_SECONDS = 1.0
GIVE_UP_SECONDS = 60.0
SLOW_BATCHES_PER_SECOND = 8000  # nothing queues up
FAST_BATCHES_PER_SECOND = 41_000
MEMORY_STEPS = 4  # within one doubling
GOAL_DYNAMO, GOAL_FLOOR, GOAL_MATCH_SECONDS = 1.25, 0.75, 0.001
WORK_DIFFERS = (
    "The work differs: dynamo hashes every block's token ids into hashes of its own and answers by "
    "tokens;\nours and the floors key by the engine's hash and leave token hashing to the query. "
    "Ours also accounts\nsequence numbers and counts copies, by medium, group and adapter; the "
    "floors do not."
)


class Kind(NamedTuple):
    """A stream: how blocks come."""

    tokens_per_block: int
    blocks_per_event: int
    stores_per_batch: int = 1
    keep_chains: int = 0  # the oldest prompt is removed when there are more; 0: none ever
    workers: int = 1
    hash_bytes: int = 0  # 0: integers
    blocks: int = 400_000  # of all workers


KINDS = {
    "16x8": Kind(16, 8),
    "128x1": Kind(128, 1, blocks=120_000),
    "mix": Kind(16, 8, stores_per_batch=2, keep_chains=1000, blocks=800_000),
    "4 workers": Kind(16, 8, workers=4),
    "32-byte hashes": Kind(16, 8, hash_bytes=32),
}


@dataclass
class Stream:
    """What one worker sends: encoded batches, and what is needed to know that all arrived."""

    batches: list[bytes]
    blocks: int  # stored plus removed
    held: int  # at the end
    prefix: list[int | bytes]  # hashes of a prompt of PREFIX_BLOCKS
    prefix_token_ids: list[int]
    last_token_ids: list[int]  # of the last block, which has no parent


def stream_of(kind: Kind, seed: int) -> Stream:
    """Make what one worker of a stream sends, from a seed."""
    dice = random.Random(seed)
    pool = dice.choices(range(150_000), k=1 << 18)
    encode = msgspec.msgpack.Encoder().encode
    size, per_event = kind.tokens_per_block, kind.blocks_per_event
    per_worker = kind.blocks // kind.workers
    batches: list[bytes] = []
    prefix: list[int | bytes] = []
    prefix_token_ids: list[int] = []
    chains: list[list[int | bytes]] = []
    pending: list[dict[str, Any]] = []
    blocks = held = 0

    def new_hash() -> int | bytes:
        return dice.randbytes(kind.hash_bytes) if kind.hash_bytes else dice.getrandbits(64)

    def stored(count: int, parent: int | bytes | None) -> tuple[list[int | bytes], list[int]]:
        hashes = [new_hash() for _ in range(count)]
        start = dice.randrange(len(pool) - count * size)
        token_ids = pool[start : start + count * size]
        pending.append(
            {
                "type": "BlockStored",
                "block_hashes": hashes,
                "parent_block_hash": parent,
                "token_ids": token_ids,
                "block_size": size,
                "lora_id": None,
                "medium": "GPU",
                "lora_name": None,
                "extra_keys": [None] * count,
                "group_idx": 0,
                "kv_cache_spec_kind": "full_attention",
            }
        )
        return hashes, token_ids

    def flush() -> None:
        batches.append(encode([time.time(), pending, 0]))
        pending.clear()

    while blocks < per_worker:
        length = PREFIX_BLOCKS if not prefix else CHAIN_BLOCKS
        chain: list[int | bytes] = []
        gone = chains.pop(0) if kind.keep_chains and len(chains) >= kind.keep_chains else []
        while len(chain) < length:
            hashes, token_ids = stored(per_event, chain[-1] if chain else None)
            chain += hashes
            blocks, held = blocks + per_event, held + per_event
            if len(chains) == 0 and not prefix:
                prefix_token_ids += token_ids
            for _ in range(min(per_event, len(gone))):  # vLLM: leaf first, one event per block
                pending.append(
                    {
                        "type": "BlockRemoved",
                        "block_hashes": [gone.pop()],
                        "medium": "GPU",
                        "group_idx": 0,
                    }
                )
                blocks, held = blocks + 1, held - 1
            if sum(event["type"] == "BlockStored" for event in pending) >= kind.stores_per_batch:
                flush()
        if not prefix:
            prefix = chain
        else:
            chains.append(chain)
    _, last_token_ids = stored(1, None)
    flush()
    return Stream(batches, blocks + 1, held + 1, prefix, prefix_token_ids, last_token_ids)


def streams_of(kind: Kind) -> list[Stream]:
    """What each worker of a stream sends."""
    return [stream_of(kind, seed) for seed in range(kind.workers)]


def publish(control: Connection, kind: Kind) -> None:
    """Send a stream as often as the parent asks; each time on new sockets, from sequence 0."""
    streams = streams_of(kind)
    sequences = [n.to_bytes(8, "big") for n in range(max(len(s.batches) for s in streams))]
    control.send([(s.blocks, s.held, len(s.batches), s.last_token_ids) for s in streams])
    context: zmq.Context[Any] = zmq.Context()
    while (high_water_mark := control.recv()) is not None:
        sockets = []
        for _ in streams:
            bound = context.socket(zmq.XPUB)
            bound.setsockopt(zmq.SNDHWM, high_water_mark)
            bound.setsockopt(zmq.LINGER, -1)
            bound.bind("tcp://127.0.0.1:0")
            sockets.append(bound)
        control.send([bound.getsockopt(zmq.LAST_ENDPOINT).decode() for bound in sockets])
        for bound in sockets:
            bound.recv()  # the subscription
        control.send("subscribed")
        rate = control.recv()
        started = time.perf_counter()
        sent = 0
        for number, sequence in enumerate(sequences):
            for bound, stream in zip(sockets, streams, strict=True):
                if number < len(stream.batches):
                    bound.send_multipart((b"kv", sequence, stream.batches[number]), copy=True)
                    sent += 1
            if rate and sent % 64 < len(sockets):
                early = started + sent / rate - time.perf_counter()
                if early > 0:
                    time.sleep(early)
        control.send((started, time.perf_counter()))
        control.recv()  # everything has arrived, or nobody waits for it any more
        for bound in sockets:
            bound.close(linger=0)


class Usage(NamedTuple):
    """A process: CPU seconds so far, resident bytes."""

    cpu_seconds: float
    resident_bytes: int


def usage(pid: int) -> Usage:
    """Read what a process has used: of its threads, because that is counted in nanoseconds."""
    threads = Path(f"/proc/{pid}/task").glob("*/schedstat")
    nanoseconds = sum(int(thread.read_text().split()[0]) for thread in threads)
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return Usage(nanoseconds / 1e9, pages * os.sysconf("SC_PAGE_SIZE"))


@dataclass
class Result:
    """One run of one consumer."""

    seconds: float
    cpu_seconds: float
    resident_bytes: int
    blocks: int  # that it says it has at the end; -1: cannot be asked
    lost: int  # batches


class Consumer:
    """A consumer in a process of its own, empty."""

    name = ""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.pid = 0

    def start(self, endpoints: list[str], counts: list[int], last: list[list[int]]) -> None:
        """Connect to the publishers of all workers."""
        raise NotImplementedError

    def wait(self) -> tuple[int, int]:
        """Return when everything has arrived: blocks held, batches lost."""
        raise NotImplementedError

    def stop(self) -> None:
        """End the process."""
        raise NotImplementedError


class Child(Consumer):
    """One that runs code of this module."""

    target: Any = None

    def start(self, endpoints: list[str], counts: list[int], last: list[list[int]]) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.control, other = spawn.Pipe()
        process = spawn.Process(
            target=type(self).target, args=(other, endpoints, counts, self.kind), daemon=True
        )
        process.start()
        self.process, self.pid = process, process.pid or 0
        assert self.control.recv() == "connected"

    def wait(self) -> tuple[int, int]:
        if not self.control.poll(GIVE_UP_SECONDS):
            return -1, -1
        answer: tuple[int, int] = self.control.recv()
        return answer

    def ask(self, question: object) -> Any:
        """Ask the process something, after the stream."""
        self.control.send(question)
        return self.control.recv()

    def stop(self) -> None:
        self.control.send(None)
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()


def ours(control: Connection, endpoints: list[str], counts: list[int], kind: Kind) -> None:
    """Index with the pipeline."""
    from llm_worker.kv.pipeline import Pipeline

    index = Index()
    pipeline = Pipeline(index)
    pipeline.start()
    listeners = [
        pipeline.listen(endpoint, None, worker=str(n), rank=0, topic="kv")
        for n, endpoint in enumerate(endpoints)
    ]
    control.send("connected")
    last = [count - 1 for count in counts]
    while [listener.stats.sequence for listener in listeners] != last:
        if control.poll(0.01):
            return
    stats = [listener.stats for listener in listeners]
    lost = sum(s.batches_lost + s.gaps.total() for s in stats)
    control.send((index.held_blocks(), lost))
    while (question := control.recv()) is not None:
        if question == "match":
            control.send(time_matches(index, kind))
        elif question == "http":
            control.send(serve(index))
    pipeline.close()


def time_matches(index: Index, kind: Kind) -> list[float]:
    """Seconds of each of many matches of each worker's prefix; every worker holds only its own."""
    prefixes = [stream.prefix for stream in streams_of(kind._replace(blocks=kind.workers))]
    times = []
    for n in range(3000):
        prefix = prefixes[n % len(prefixes)]
        started = time.perf_counter()
        found = index.match(prefix)
        times.append(time.perf_counter() - started)
        assert found[0].blocks == PREFIX_BLOCKS
    return times


def serve(index: Index) -> int:
    """Answer over HTTP as the worker does; return the port."""
    import uvicorn
    from starlette.applications import Starlette

    from llm_worker.kv.routes import KvHandlers, reading

    app = Starlette(routes=reading(KvHandlers(index, list, list)))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    config = uvicorn.Config(app, port=port, log_level="error", access_log=False)
    threading.Thread(target=uvicorn.Server(config).run, daemon=True).start()
    return port


class _Stored(msgspec.Struct, tag_field="type", tag="BlockStored", gc=False):
    block_hashes: list[int | bytes]


class _Removed(msgspec.Struct, tag_field="type", tag="BlockRemoved", gc=False):
    block_hashes: list[int | bytes]


class _Batch(msgspec.Struct, array_like=True, gc=False):
    timestamp: float
    events: list[_Stored | _Removed]


def floor(control: Connection, endpoints: list[str], counts: list[int], kind: Kind) -> None:
    """Receive, decode, insert: the least that a consumer does."""
    least(control, endpoints, counts, lambda subscriber: subscriber.recv_multipart(zmq.NOBLOCK)[2])


def tuned(control: Connection, endpoints: list[str], counts: list[int], kind: Kind) -> None:
    """The same, receiving as ours does."""

    def receive(subscriber: Any) -> bytes:
        recv, now = subscriber.recv, zmq.NOBLOCK
        recv(now)
        recv(now)
        payload: bytes = recv(now)
        return payload

    least(control, endpoints, counts, receive)


def least(
    control: Connection,
    endpoints: list[str],
    counts: list[int],
    receive: Callable[[Any], bytes],
) -> None:
    """Receive, decode, insert."""
    context: zmq.Context[Any] = zmq.Context()
    poller = zmq.Poller()
    indexes: dict[Any, dict[int | bytes, None]] = {}
    for endpoint in endpoints:
        subscriber = context.socket(zmq.SUB)
        subscriber.setsockopt(zmq.RCVHWM, 100_000)
        subscriber.subscribe(b"kv")
        subscriber.connect(endpoint)
        poller.register(subscriber, zmq.POLLIN)
        indexes[subscriber] = {}
    control.send("connected")
    left = sum(counts)
    decode = msgspec.msgpack.Decoder(_Batch).decode
    while left:
        ready = poller.poll()
        time.sleep(0.001)  # as ours does: many in one turn cost less than one in each of many
        for subscriber, _ in ready:
            index = indexes[subscriber]
            while True:
                try:
                    payload = receive(subscriber)
                except zmq.Again:
                    break
                left -= 1
                for event in decode(payload).events:
                    if type(event) is _Stored:
                        for value in event.block_hashes:
                            index[value] = None
                    else:
                        for value in event.block_hashes:
                            index.pop(value, None)
    control.send((sum(map(len, indexes.values())), 0))
    control.recv()


class Ours(Child):
    """Our pipeline."""

    name = "ours"
    target = staticmethod(ours)


class Floor(Child):
    """The least."""

    name = "floor"
    target = staticmethod(floor)


class Tuned(Child):
    """The least, received as ours."""

    name = "tuned"
    target = staticmethod(tuned)


class Dynamo(Consumer):
    """Dynamo's standalone indexer."""

    name = "dynamo"
    python = ""

    def start(self, endpoints: list[str], counts: list[int], last: list[list[int]]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        self.process = subprocess.Popen(
            [self.python, "-m", "dynamo.indexer", f"--port={port}", "--threads=1"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.pid, self.port, self.last = self.process.pid, port, last
        deadline = time.monotonic() + GIVE_UP_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                self.post("/health", None)
                break
            time.sleep(0.05)
        for number, endpoint in enumerate(endpoints):
            self.post(
                "/register",
                {
                    "instance_id": number,
                    "endpoint": endpoint,
                    "model_name": "m",
                    "block_size": self.kind.tokens_per_block,
                },
            )

    def post(self, path: str, body: object) -> Any:
        """Ask the indexer something."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=GIVE_UP_SECONDS) as response:
            text = response.read()
        return json.loads(text) if text else None

    def wait(self) -> tuple[int, int]:
        deadline = time.monotonic() + (5 if self.kind.hash_bytes else GIVE_UP_SECONDS)
        missing = dict(enumerate(self.last))
        while missing and time.monotonic() < deadline:
            for number, token_ids in list(missing.items()):
                with contextlib.suppress(urllib.error.HTTPError):
                    answer = self.post("/query", {"token_ids": token_ids, "model_name": "m"})
                    if str(number) in answer["scores"] or str(number) in str(answer["scores"]):
                        del missing[number]
            time.sleep(0.01)
        return -1, len(missing)

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)


class Publisher:
    """The publisher's process, and what its stream consists of."""

    def __init__(self, kind: Kind) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.kind = kind
        self.control, other = spawn.Pipe()
        self.process = spawn.Process(target=publish, args=(other, kind), daemon=True)
        self.process.start()
        meta = self.control.recv()
        self.blocks = sum(m[0] for m in meta)
        self.held = sum(m[1] for m in meta)
        self.counts = [m[2] for m in meta]
        self.last = [m[3] for m in meta]

    @contextlib.contextmanager
    def to(
        self, consumer: Consumer, rate: float = 0, high_water_mark: int = 0
    ) -> Iterator[tuple[Result, float]]:
        """Send the whole stream to a consumer; what it took, and the rate of sending."""
        self.control.send(high_water_mark)
        consumer.start(self.control.recv(), self.counts, self.last)
        try:
            assert self.control.recv() == "subscribed"
            time.sleep(SETTLE_SECONDS)
            before = usage(consumer.pid)
            self.control.send(rate)
            held, lost = consumer.wait()
            done = time.perf_counter()
            after = usage(consumer.pid)
            started, sent = self.control.recv()
            self.control.send("arrived")
            result = Result(
                done - started,
                after.cpu_seconds - before.cpu_seconds,
                after.resident_bytes - before.resident_bytes,
                held,
                lost,
            )
            yield result, sum(self.counts) / (sent - started)
        finally:
            consumer.stop()

    def close(self) -> None:
        """End the process."""
        self.control.send(None)
        self.process.join(10)


def percentile(times: list[float], share: float) -> float:
    """The value below which ``share`` of the times are."""
    return sorted(times)[int(share * (len(times) - 1))]


def compare(name: str, kind: Kind, consumers: list[type[Consumer]], rounds: int) -> list[str]:
    """Print one stream's figures; return the goals that were missed."""
    missed: list[str] = []
    publisher = Publisher(kind)
    results: dict[str, list[Result]] = {consumer.name: [] for consumer in consumers}
    for number in range(rounds):
        for consumer in consumers if number % 2 else reversed(consumers):
            with publisher.to(consumer(kind)) as (result, _):
                results[consumer.name].append(result)
    print(
        f"\n{name}: {publisher.blocks:,} blocks in {sum(publisher.counts):,} batches"
        f" of {kind.workers} worker(s), {kind.tokens_per_block} tokens per block"
    )
    rates: dict[str, float] = {}
    for consumer in consumers:
        runs = results[consumer.name]
        if any(run.lost for run in runs):
            print(f"  {consumer.name:7} did not index it all")
            if consumer is Ours:
                missed.append(f"{name}: batches lost")
            continue
        cpu = statistics.median(run.cpu_seconds for run in runs) / publisher.blocks * 1e6
        wall = publisher.blocks / statistics.median(run.seconds for run in runs)
        rates[consumer.name] = 1 / cpu
        print(
            f"  {consumer.name:7} {wall / 1e6:6.2f} M blocks/s until complete"
            f"   {cpu:6.2f} CPU s per M blocks   {1 / cpu:6.2f} M blocks per CPU s"
        )
        if consumer is not Dynamo and any(run.blocks != publisher.held for run in runs):
            missed.append(f"{name}: {consumer.name} holds {runs[0].blocks}, not {publisher.held}")
    for other, goal in (
        ("dynamo", GOAL_DYNAMO),
        ("floor", GOAL_FLOOR),
        ("tuned", 0.0),
    ):
        if "ours" not in rates or other not in rates:
            continue
        pairs = zip(results[other], results["ours"], strict=True)
        ratio = statistics.median(a.cpu_seconds / b.cpu_seconds for a, b in pairs)
        print(f"  ours / {other:7} {ratio:5.2f}" + (f"   (goal: at least {goal})" if goal else ""))
        if ratio < goal:
            missed.append(f"{name}: {ratio:.2f} of {other}")
    publisher.close()
    return missed


def compare_memory(name: str, kind: Kind, consumers: list[type[Consumer]]) -> list[str]:
    """Print what a million blocks occupy: at four sizes between one and twice the kind's.

    Either's hash table grows by doubling, and just behind that half of it is empty: at one size who
    needs less is chance.
    """
    sizes: dict[str, list[float]] = {}
    for step in range(MEMORY_STEPS):
        grown = kind._replace(blocks=int(kind.blocks * 2 ** (step / MEMORY_STEPS)))
        publisher = Publisher(grown)
        for consumer in consumers:
            with publisher.to(consumer(grown), rate=SLOW_BATCHES_PER_SECOND) as (result, _):
                if not result.lost:
                    per_block = result.resident_bytes / publisher.held
                    sizes.setdefault(consumer.name, []).append(per_block)
        publisher.close()
        text = "   ".join(f"{each} {size[-1]:4.0f}" for each, size in sizes.items())
        print(f"memory, MB per million blocks ({name}, {publisher.held:,} held): {text}")
    if "dynamo" not in sizes:
        return []
    ratio = statistics.geometric_mean(sizes["ours"]) / statistics.geometric_mean(sizes["dynamo"])
    print(f"  ours / dynamo  {ratio:5.2f}   (goal: at most 1)")
    return [f"memory on {name}: {ratio:.2f} of dynamo's"] if ratio > 1 else []


def check_drops(kind: Kind) -> list[str]:
    """Print whether anything is lost at the rate of vLLM's own publisher, with its bounds."""
    publisher = Publisher(kind)
    with publisher.to(Ours(kind), FAST_BATCHES_PER_SECOND, high_water_mark=100_000) as (run, rate):
        print(
            f"at {rate:,.0f} batches/s for {sum(publisher.counts) / rate:.1f} s: {run.lost} lost"
            f" or missing, {run.cpu_seconds / run.seconds:.0%} of one core"
        )
    publisher.close()
    missed = [f"{run.lost} lost at {rate:.0f} batches/s"] if run.lost else []
    if rate < 0.95 * FAST_BATCHES_PER_SECOND:
        missed.append(f"the publisher reached {rate:.0f} batches/s only")
    return missed


def requests(port: int, path: str, body: object, count: int = 500) -> list[float]:
    """Seconds of each of many requests over one connection."""
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.connect()
    connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
    times = []
    for _ in range(count):
        started = time.perf_counter()
        connection.request("POST", path, data, headers)
        response = connection.getresponse()
        text = response.read()
        times.append(time.perf_counter() - started)
        assert response.status == 200, text
    connection.close()
    return times


def compare_matches(kind: Kind, with_dynamo: bool) -> list[str]:
    """Print how long it takes to find who holds a prefix of PREFIX_BLOCKS."""

    def show(what: str, times: list[float]) -> float:
        p50, p99 = (percentile(times, share) * 1e3 for share in (0.5, 0.99))
        print(f"  {what:44} p50 {p50:6.3f} ms   p99 {p99:6.3f} ms")
        return p99 / 1e3

    print(
        f"\nmatch of {PREFIX_BLOCKS:,} blocks, {kind.workers} workers, {kind.blocks:,} blocks held"
    )
    prefix = stream_of(kind, 0)
    publisher = Publisher(kind)
    consumer = Ours(kind)
    with publisher.to(consumer):
        p99 = show("ours, by hash, in process", consumer.ask("match"))
        port = consumer.ask("http")
        time.sleep(SETTLE_SECONDS)
        show("ours, by hash, HTTP", requests(port, "/kv/match", {"hashes": prefix.prefix}))
    if with_dynamo:
        indexer = Dynamo(kind)
        with publisher.to(indexer):
            body: dict[str, object] = {"token_ids": prefix.prefix_token_ids, "model_name": "m"}
            show(f"dynamo, by {len(prefix.prefix_token_ids):,} token ids, HTTP",
                 requests(indexer.port, "/query", body))  # fmt: skip
            hashes = dynamo_hashes(indexer, PREFIX_BLOCKS)
            body = {"block_hashes": hashes, "model_name": "m"}
            show("dynamo, by its hashes, HTTP", requests(indexer.port, "/query_by_hash", body))
    publisher.close()
    return [f"match p99 {p99 * 1e3:.2f} ms"] if p99 >= GOAL_MATCH_SECONDS else []


def dynamo_hashes(indexer: Dynamo, length: int) -> list[int]:
    """The hashes that Dynamo gave the blocks of the longest chain, out of its dump."""
    (dump,) = indexer.post("/dump", None).values()
    local: dict[int, int] = {}
    parent: dict[int, int | None] = {}
    for entry in dump["events"]:
        stored = entry["event"]["data"].get("stored")
        if stored:
            before = stored["parent_hash"]
            for block in stored["blocks"]:
                local[block["block_hash"]] = block["tokens_hash"]
                parent[block["block_hash"]] = before
                before = block["block_hash"]
    for value in parent:
        chain: list[int] = []
        step: int | None = value
        while step is not None:
            chain.append(local[step])
            step = parent[step]
        if len(chain) == length:
            return [h - (1 << 64) if h >> 63 else h for h in reversed(chain)]
    raise AssertionError("the prefix is not in the dump")


def compare_decoders() -> None:
    """Print what decoding costs, without ZMQ and without an index."""
    try:
        import msgpack  # type: ignore[import-untyped]
    except ImportError:
        msgpack = None
    print("\ndecoding alone, microseconds per batch")
    for name in ("16x8", "128x1", "mix"):
        batches = stream_of(KINDS[name]._replace(blocks=40_000), 0).batches
        decoders = {
            "ours (msgspec, typed, no token ids)": Decoder().decode,
            "ours with token ids": Decoder(token_ids=True).decode,
            "msgspec, untyped": msgspec.msgpack.Decoder().decode,
            "floor (msgspec, hashes only)": msgspec.msgpack.Decoder(_Batch).decode,
        }
        if msgpack is not None:
            decoders["msgpack.unpackb"] = msgpack.unpackb
        costs: dict[str, list[float]] = {decoder: [] for decoder in decoders}
        for _ in range(5):
            for decoder, decode in decoders.items():
                gc.collect()
                started = time.process_time()
                for payload in batches:
                    decode(payload)
                costs[decoder].append((time.process_time() - started) / len(batches) * 1e6)
        for decoder, times in costs.items():
            print(f"  {name:6} {decoder:38} {statistics.median(times):7.2f}")


def main() -> int:
    """Measure and print; 1 where a goal is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dynamo", metavar="PYTHON", help="an interpreter with ai-dynamo-runtime")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", default=",".join(KINDS))
    parser.add_argument("--scale", type=float, default=1.0, help="of the streams' lengths")
    parser.add_argument(
        "--only",
        choices=("rates", "memory", "drops", "match", "decoders"),
        action="append",
        help="default: everything",
    )
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    wanted = arguments.only or ["decoders", "rates", "memory", "drops", "match"]
    consumers: list[type[Consumer]] = [Ours, Floor, Tuned]
    if arguments.dynamo:
        Dynamo.python = arguments.dynamo
        consumers.insert(0, Dynamo)
    else:
        print("dynamo: absent (no --dynamo)")
    kinds = {
        name: KINDS[name]._replace(blocks=int(KINDS[name].blocks * arguments.scale))
        for name in arguments.streams.split(",")
    }
    missed: list[str] = []
    print(WORK_DIFFERS)
    if "decoders" in wanted:
        compare_decoders()
    if "rates" in wanted:
        for name, kind in kinds.items():
            missed += compare(name, kind, consumers, arguments.rounds)
    if "memory" in wanted:
        print()
        for name in ("16x8", "128x1"):
            missed += compare_memory(
                name, KINDS[name], [c for c in consumers if c in (Dynamo, Ours)]
            )
    if "drops" in wanted:
        print()
        missed += check_drops(KINDS["16x8"]._replace(blocks=8 * 5 * FAST_BATCHES_PER_SECOND))
    if "match" in wanted:
        missed += compare_matches(
            KINDS["4 workers"]._replace(blocks=100_000), bool(arguments.dynamo)
        )
    print("\nmissed: " + "; ".join(missed) if missed else "\nevery goal is met")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
