"""vLLM's own KV-event publisher, and our listener, as processes that a test can stop and kill."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

from support.worker_process import free_ports

# Imports vLLM once, for all processes that it forks.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["vllm.distributed.kv_events"])

Change = tuple[str, Sequence[int]]  # "store", "remove" or "clear", and hashes
START_SECONDS = 60.0


def _publish(connection: Connection, options: dict[str, Any]) -> None:
    """The publisher's process: batches in, how many it has published out."""
    from vllm.distributed.kv_events import (
        AllBlocksCleared,
        BlockRemoved,
        BlockStored,
        KVEventBatch,
        ZmqEventPublisher,
    )

    publisher = ZmqEventPublisher(**options)

    def event(kind: str, hashes: Sequence[int], tokens: int) -> Any:
        if kind == "store":
            return BlockStored(
                block_hashes=list(hashes),
                parent_block_hash=None,
                token_ids=[1] * tokens,
                block_size=16,
                lora_id=None,
                medium="GPU",
                lora_name=None,
            )
        return BlockRemoved(list(hashes), "GPU") if kind == "remove" else AllBlocksCleared()

    connection.send("ready")
    count = 0
    while True:
        batches, tokens = connection.recv()
        for changes in batches:
            events = [event(kind, hashes, tokens) for kind, hashes in changes]
            publisher.publish(KVEventBatch(ts=time.time(), events=events))
            count += 1
        while not publisher._event_queue.empty():
            time.sleep(0.001)
        connection.send(count)


def _listen(connection: Connection, endpoint: str, replay_endpoint: str | None) -> None:
    """The listener's process: a question in, its state out."""
    from llm_worker.kv.index.index import Index
    from llm_worker.kv.pipeline import Pipeline

    index = Index()
    pipeline = Pipeline(index)
    pipeline.start()
    listener = pipeline.listen(endpoint, replay_endpoint, worker="w", rank=0)
    connection.send("ready")
    while True:
        connection.recv()
        connection.send((listener.stats, set(listener.source.stale), index.source("w", 0).hashes()))


class Process:
    """One of the above."""

    def __init__(self, target: Any, *arguments: Any) -> None:
        self.connection, theirs = _context.Pipe()
        self._process = _context.Process(target=target, args=(theirs, *arguments), daemon=True)
        self._process.start()
        assert self.connection.poll(START_SECONDS), "it did not start"
        assert self.connection.recv() == "ready"

    def ask(self, question: Any = None) -> Any:
        self.connection.send(question)
        assert self.connection.poll(START_SECONDS), "it does not answer"
        return self.connection.recv()

    def signal(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.signal(signal.SIGKILL)
        self._process.join(10)


class Publisher:
    """vLLM's publisher of one rank, with ports that survive it, and the truth about its blocks."""

    def __init__(self, rank: int = 0, *, replay: bool = True, **options: Any) -> None:
        events, answers = free_ports(2)
        self.endpoint = f"tcp://127.0.0.1:{events}"
        self.replay_endpoint = f"tcp://127.0.0.1:{answers}"
        self._options = {
            # It adds the rank to the port.
            "data_parallel_rank": rank,
            "endpoint": f"tcp://*:{events - rank}",
            "replay_endpoint": f"tcp://*:{answers - rank}" if replay else None,
            **options,
        }
        self.blocks: set[int] = set()
        self._process = Process(_publish, self._options)

    def publish(self, *batches: Iterable[Change], tokens: int = 0) -> int:
        """Publish batches; how many it has published so far."""
        lists = [list(changes) for changes in batches]
        for kind, hashes in (change for changes in lists for change in changes):
            if kind == "store":
                self.blocks |= set(hashes)
            elif kind == "remove":
                self.blocks -= set(hashes)
            else:
                self.blocks.clear()
        count: int = self._process.ask((lists, tokens))
        return count

    def store(self, first: int, batches: int, *, tokens: int = 0) -> int:
        """Publish this many batches of one new block each."""
        return self.publish(
            *([("store", [number])] for number in range(first, first + batches)), tokens=tokens
        )

    def kill(self) -> None:
        self._process.kill()

    def restart(self) -> None:
        """Another process on the same ports, which holds nothing."""
        self.kill()
        self.blocks.clear()
        self._process = Process(_publish, self._options)


class ListenerProcess(Process):
    """Our listener, so that it can be stopped."""

    def __init__(self, publisher: Publisher) -> None:
        super().__init__(_listen, publisher.endpoint, publisher.replay_endpoint)


@contextlib.contextmanager
def ending(*processes: Publisher | Process) -> Iterator[None]:
    """None of them outlives the test."""
    try:
        yield
    finally:
        for process in processes:
            process.kill()
