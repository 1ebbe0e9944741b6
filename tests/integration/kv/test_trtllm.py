"""TensorRT-LLM's events over the wire: engine → poller → ZMQ → our pipeline → index."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress

import pytest
import zmq

from llm_worker.kv.follow.listener import Listener
from llm_worker.kv.index.index import Index
from llm_worker.kv.index.source import Source
from llm_worker.kv.pipeline import Pipeline
from llm_worker.kv.trtllm.poller import BATCH_EVENTS, Poller
from llm_worker.kv.trtllm.publisher import ZmqKvEventPublisher
from llm_worker.kv.trtllm.translator import Translator
from support.trtllm_events import (
    BLOCK_SIZE,
    Engine,
    Truth,
    block,
    contents,
    created,
    removed,
    stored,
)
from support.waiting import until_async

LOCAL = "tcp://127.0.0.1:0"


class Worker:
    """A TensorRT-LLM worker with the poller beside it, and its readers."""

    def __init__(self, buffer_batches: int = 10_000) -> None:
        self.engine = Engine()
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.publishers: dict[int, ZmqKvEventPublisher] = {}
        self.poller = Poller(self.engine, self._publisher, Translator(BLOCK_SIZE), ranks=2)
        self.pipeline = Pipeline(Index(), context=self.context)
        self.listeners: dict[int, Listener] = {}
        self._buffer_batches = buffer_batches
        self.pipeline.start()

    def _publisher(self, rank: int) -> ZmqKvEventPublisher:
        self.publishers[rank] = ZmqKvEventPublisher(
            LOCAL,
            BLOCK_SIZE,
            "kv",
            replay_endpoint=LOCAL,
            data_parallel_rank=rank,
            buffer_batches=self._buffer_batches,
            context=self.context,
        )
        return self.publishers[rank]

    def listen(self, rank: int = 0) -> Source:
        socket = self.publishers[rank].socket
        self.listeners[rank] = self.pipeline.listen(
            socket.endpoint,
            socket.replay_endpoint,
            worker="trtllm",
            rank=rank,
            topic="kv",
            block_size=BLOCK_SIZE,
        )
        return self.pipeline.index.source("trtllm", rank)

    def settled(self) -> bool:
        """Everything that was published is indexed."""
        return not self.engine.events and all(
            listener.stats.sequence == self.publishers[rank].socket.sequence(b"kv")
            for rank, listener in self.listeners.items()
        )


@asynccontextmanager
async def running(worker: Worker) -> AsyncIterator[None]:
    task = asyncio.create_task(worker.poller.run())
    try:
        await until_async("the second rank", lambda: 1 in worker.publishers)
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


@pytest.fixture
def worker() -> Iterator[Worker]:
    made = Worker()
    yield made
    made.pipeline.close()
    made.context.destroy(linger=0)


@pytest.mark.parametrize("seed", [1, 2])
def test_the_index_holds_what_the_engine_holds(worker: Worker, seed: int) -> None:
    """After thousands of events of two ranks: by medium and adapter, with parents; not stale."""

    async def scenario() -> None:
        truth = Truth(seed, ranks=2)
        async with running(worker):
            worker.engine.happen(truth.start())
            sources = [worker.listen(0), worker.listen(1)]
            for _ in range(40):
                for _ in range(50):
                    worker.engine.happen(truth.step())
                await asyncio.sleep(0.001)
            await until_async("the index to be as the engine, trusted", worker.settled)
            for rank, source in enumerate(sources):
                assert contents(source) == truth.expected(rank)
                assert source.stale == frozenset()
                assert source.stats.duplicate_blocks == 0
                assert source.stats.unknown_removed_blocks == 0
        stats = worker.poller.translator.stats
        assert stats.gaps == 0
        assert stats.losses == {}
        assert min(stats.filtered_blocks["window"], stats.filtered_blocks["partial"]) > 10

    asyncio.run(scenario())


def test_a_burst_is_split_into_messages_of_a_bounded_size(worker: Worker) -> None:
    """And is indexed whole, by a reader that comes after it."""

    async def scenario() -> None:
        async with running(worker):
            count = 5 * BATCH_EVENTS
            worker.engine.happen([created(), *(stored(n, block(n)) for n in range(1, count))])
            await until_async("the engine's events to be fetched", lambda: not worker.engine.events)
            source = worker.listen()
            await until_async("the index to be as the engine, trusted", worker.settled)
            await until_async("no doubt left", lambda: not source.stale)
            assert source.blocks() == {"gpu": count - 1}
            assert worker.publishers[0].stats.published_batches == 5

    asyncio.run(scenario())


def test_lost_events_leave_the_index_empty_and_stale_until_the_engine_starts_again(
    worker: Worker,
) -> None:
    """No block is claimed that may be gone, and nobody takes the rest for everything.

    TensorRT-LLM drops its oldest events when nobody asks in time, and cannot be asked what it
    holds. A restart makes the index true again.
    """

    async def scenario() -> None:
        async with running(worker):
            source = worker.listen()
            worker.engine.happen([created(), stored(1, block(1), block(2))])
            await until_async("the index to be as the engine, trusted", worker.settled)
            await until_async("the index to be trusted", lambda: not source.stale)
            worker.engine.happen([stored(7, block(8))])  # 2 to 6 are gone
            await until_async("the index to be marked as gap", lambda: "gap" in source.stale)
            await until_async("the index to be as the engine, trusted", worker.settled)
            assert source.hashes() == {8}
            assert worker.poller.translator.stats.missed_events == 5
            worker.engine.happen([removed(8, 1), removed(9, 8)])
            await until_async("the index to hold nothing", lambda: source.hashes() == set())
            assert "gap" in source.stale
            assert source.stats.unknown_removed_blocks == 0

            worker.engine.happen([created(), stored(1, block(3))])
            await until_async("the index to hold {3}", lambda: source.hashes() == {3})
            await until_async("the index to be trusted", lambda: not source.stale)

    asyncio.run(scenario())


def test_a_reader_that_comes_late_learns_of_a_loss_from_the_replay(worker: Worker) -> None:
    """The hole in the numbers is in the replay as well."""

    async def scenario() -> None:
        async with running(worker):
            worker.engine.happen(
                [created(), stored(1, block(1)), removed(5, 9), stored(6, block(2))]
            )
            await until_async("the engine's events to be fetched", lambda: not worker.engine.events)
            await asyncio.sleep(0.1)
            source = worker.listen()
            await until_async("the index to be as the engine, trusted", worker.settled)
            await until_async("the index to be marked as gap", lambda: "gap" in source.stale)
            assert source.hashes() == {2}

    asyncio.run(scenario())


def test_a_reader_that_comes_too_late_knows_it(worker: Worker) -> None:
    """The ring has aged: what was before its oldest batch is not known."""
    worker._buffer_batches = 2

    async def scenario() -> None:
        async with running(worker):
            seen = worker.poller.translator.stats.events
            for number in range(6):
                worker.engine.happen([stored(number, block(number)) if number else created()])
                await until_async(
                    "the block to be published",
                    lambda number=number: seen["stored"] == number,  # type: ignore[misc]
                )
            source = worker.listen()
            await until_async("the index to be as the engine, trusted", worker.settled)
            assert source.hashes() == {4, 5}
            await until_async(
                "the index to be marked as missed_first", lambda: "missed_first" in source.stale
            )

    asyncio.run(scenario())
