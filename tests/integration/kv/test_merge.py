"""An engine and an offloading connector that publish on their own, over real ZMQ, as one rank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from llm_worker.kv.index.source import Source
from llm_worker.kv.routes import reading
from llm_worker.kv.trtllm.publisher import ZmqKvEventPublisher
from llm_worker.kv.worker import EventSource, WorkerKv
from llm_worker.settings.endpoint import Endpoint
from support.waiting import until

LOCAL = "tcp://127.0.0.1:0"
SIZE = 16


def publisher() -> ZmqKvEventPublisher:
    return ZmqKvEventPublisher(LOCAL, SIZE, replay_endpoint=LOCAL)


def store(where: ZmqKvEventPublisher, *hashes: int, medium: str = "GPU") -> None:
    where.publish_stored(
        None, [0] * SIZE * len(hashes), [SIZE] * len(hashes), hashes, medium=medium
    )


def port(endpoint: str | None) -> int:
    assert endpoint is not None
    return int(endpoint.rpartition(":")[2])


class Rank:
    """One rank with both publishers, followed as a worker does."""

    def __init__(self) -> None:
        self.engine, self.connector = publisher(), publisher()
        theirs = self.connector.socket
        ports = port(theirs.endpoint), port(theirs.replay_endpoint)
        self.kv = WorkerKv(
            "w",
            plane=None,
            max_blocks=None,
            connector=Endpoint("vllm", "127.0.0.1", *ports),
        )
        engine = self.engine.socket
        self.kv.start(
            [EventSource(0, engine.endpoint, engine.replay_endpoint, "")],
            block_size=SIZE,
            truth=lambda full: [],
            hash_blocks=None,
        )

    @property
    def source(self) -> Source:
        return self.kv.index.source("w", 0)

    def status(self) -> dict[str, Any]:
        app = Starlette(routes=reading(self.kv.handlers()))
        body: dict[str, Any] = TestClient(app).get("/kv/status").json()
        return body

    def close(self) -> None:
        self.kv.close()
        self.engine.shutdown()
        self.connector.shutdown()


@pytest.fixture
def rank() -> Iterator[Rank]:
    made = Rank()
    yield made
    made.close()


def test_the_index_has_what_either_holds_and_each_is_accounted_for(rank: Rank) -> None:
    """Stored by the first, gone with the last; counted under each one's own name."""
    until("the index to be trusted", lambda: not rank.source.stale)
    store(rank.engine, 1, 2)
    store(rank.connector, 2, 3)
    store(rank.connector, 1, medium="CPU")
    until(
        "blocks by medium to be {'gpu': 3, 'cpu': 1}",
        lambda: rank.source.blocks() == {"gpu": 3, "cpu": 1},
    )
    rank.engine.publish_removed(None, [1, 2])
    until(
        "blocks by medium to be {'gpu': 2, 'cpu': 1}",
        lambda: rank.source.blocks() == {"gpu": 2, "cpu": 1},
    )
    assert rank.source.hashes() == {1, 2, 3}
    page = {
        (sample.name, sample.labels.get("worker"), sample.labels.get("reason")): sample.value
        for family in rank.kv.collector().collect()
        for sample in family.samples
        if sample.labels.get("outcome", "applied") == "applied"
    }
    assert page["llm_worker_kv_batches_total", "w", None] == 2
    assert page["llm_worker_kv_batches_total", "w/connector", None] == 2
    (source,) = rank.status()["sources"]
    assert (source["sequence"], source["parts"]["connector"]["sequence"]) == (1, 1)
    assert page["llm_worker_kv_merge_withheld_blocks_total", "w", "stored_elsewhere"] == 1
    assert page["llm_worker_kv_merge_withheld_blocks_total", "w", "held_elsewhere"] == 1


def test_a_reset_of_the_engine_leaves_what_the_connector_keeps(rank: Rank) -> None:
    """Made true at once, before any event of the engine's."""
    until("the index to be trusted", lambda: not rank.source.stale)
    store(rank.engine, 1, 2)
    store(rank.connector, 1, medium="CPU")
    until(
        "blocks by medium to be {'gpu': 2, 'cpu': 1}",
        lambda: rank.source.blocks() == {"gpu": 2, "cpu": 1},
    )
    rank.kv.pipeline.clear("w", 0)
    assert rank.source.blocks().get("gpu", 0) == 0
    assert rank.source.blocks()["cpu"] == 1


def test_a_connector_that_goes_away_makes_the_rank_doubtful(rank: Rank) -> None:
    """Its blocks may be gone with it; the engine's are still followed."""
    until("the index to be trusted", lambda: not rank.source.stale)
    store(rank.connector, 7, medium="CPU")
    until("blocks by medium to be {'cpu': 1}", lambda: rank.source.blocks() == {"cpu": 1})
    rank.connector.shutdown()
    until("the index to be marked as disconnected", lambda: "disconnected" in rank.source.stale)
    store(rank.engine, 8)
    until(
        "blocks by medium to be {'gpu': 1, 'cpu': 1}",
        lambda: rank.source.blocks() == {"gpu": 1, "cpu": 1},
    )
