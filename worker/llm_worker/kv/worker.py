"""A worker's own KV pipeline, put together: its engine's ranks → index → plane, and the auditor.

Owns the order in which they start and stop. Knows no engine: it is handed endpoints and callables.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import zmq

from llm_worker.errors import ConfigError
from llm_worker.kv.collector import KvCollector
from llm_worker.kv.follow.merge import ENGINE
from llm_worker.kv.index.audit import Auditor, Truth
from llm_worker.kv.index.index import Index
from llm_worker.kv.pipeline import Outlet, Pipeline
from llm_worker.kv.routes import HashBlocks, KvHandlers
from llm_worker.kv.stats import AuditStats, ListenerStats, PlaneStats
from llm_worker.settings.endpoint import Endpoint

log = logging.getLogger(__name__)

CONNECTOR = "connector"


@dataclass(frozen=True, slots=True)
class EventSource:
    """Where one rank of the engine publishes."""

    rank: int
    endpoint: str
    replay_endpoint: str | None
    topic: str


class WorkerKv:
    """Index, plane and auditor of one worker. Everything can be asked before it is started."""

    def __init__(
        self,
        worker: str,
        *,
        plane: Endpoint | None,
        max_blocks: int | None,
        connector: Endpoint | None = None,
    ) -> None:
        """``plane``: where indexed events go on to. ``connector``: rank 0's own events of an
        offloading connector; the other ranks' ports come behind.

        Raises:
            ConfigError: the plane's ports are taken.
        """
        self.worker = worker
        self.index = Index(max_blocks=max_blocks)
        self.pipeline = Pipeline(self.index)
        self._connector = connector
        self._auditor: Auditor | None = None
        self._hash_blocks: HashBlocks | None = None
        self._max_tokens: int | None = None
        if plane is not None:
            self.pipeline.add_outlet(self._open(plane))

    def start(
        self,
        sources: Iterable[EventSource],
        *,
        block_size: int | None,
        truth: Callable[[bool], Sequence[Truth]],
        hash_blocks: HashBlocks | None,
        max_tokens: int | None = None,
    ) -> None:
        """Listen to the engine, which is up. ``truth`` and ``hash_blocks`` may block.

        ``block_size`` is that of its first KV-cache group, in tokens, ``max_tokens`` what a request
        may have.
        """
        self._hash_blocks = hash_blocks
        self._max_tokens = max_tokens
        self.pipeline.start()
        for source in sources:
            self._listen(source, block_size, part=ENGINE if self._connector else None)
        engine = self.pipeline.listeners
        if not engine:
            log.warning("the engine publishes no KV events: the KV index stays empty")
            return
        for source in self._connector_sources(len(engine)):
            self._listen(source, None, part=CONNECTOR)  # its blocks may be of another size
        # The engine can be asked what it holds, a connector cannot.
        self._auditor = Auditor(truth, lambda: engine, self.pipeline.on_index_thread)
        self._auditor.start()

    def _connector_sources(self, ranks: int) -> Iterator[EventSource]:
        if self._connector is not None:
            for rank in range(ranks):
                at = self._connector
                yield EventSource(rank, at.tcp(rank), at.replay_tcp(rank), at.topic)

    def _listen(self, source: EventSource, block_size: int | None, part: str | None) -> None:
        self.pipeline.listen(
            source.endpoint,
            source.replay_endpoint,
            worker=self.worker,
            rank=source.rank,
            topic=source.topic,
            block_size=block_size,
            part=part,
        )

    def close(self) -> None:
        """Listen no more, flush the plane, and let go of the ports. Safe to call again."""
        if self._auditor is not None:
            self._auditor.close()
        self.pipeline.close()

    def collector(self) -> KvCollector:
        """What all of it counts, for the exposition."""
        return KvCollector(
            self.index,
            listeners=self._listeners,
            planes=self._planes,
            audits=self._audits,
            merges=self.pipeline.merges,
            crashes=lambda: self.pipeline.crashes,
        )

    def handlers(self) -> KvHandlers:
        """What the routes call."""
        return KvHandlers(
            index=self.index,
            listeners=self._listeners,
            planes=self._planes,
            hash_blocks=self._hash,
            max_tokens=lambda: self._max_tokens,
            audit=self._audit,
        )

    def _open(self, plane: Endpoint) -> Outlet:
        def sources() -> list[Any]:
            return self.index.sources()

        if plane.kind == "nats":
            try:
                from llm_worker.kv.plane.nats_plane import NatsPlane
            except ModuleNotFoundError as error:
                fix = "pip install 'llm-worker[nats]', or choose another --worker-kv-plane"
                raise ConfigError([f"NATS needs its client: {fix}"]) from error

            return NatsPlane(
                plane.url, sources=sources, on_index_thread=self.pipeline.on_index_thread
            )
        from llm_worker.kv.plane.zmq_plane import ZmqPlane

        replay = plane.replay_tcp()
        assert replay is not None  # a plane of ours always answers
        try:
            return ZmqPlane(
                plane.tcp(),
                replay,
                sources=sources,
                on_index_thread=self.pipeline.on_index_thread,
            )
        except zmq.ZMQError as error:
            raise ConfigError(
                [
                    f"the KV plane cannot be opened on {plane} and port {plane.replay_port} "
                    f"({error}): choose another --worker-kv-plane, or stop what holds it"
                ]
            ) from error

    def _listeners(self) -> list[ListenerStats]:
        return [listener.stats for listener in self.pipeline.listeners]

    def _planes(self) -> list[PlaneStats]:
        return [outlet.stats for outlet in self.pipeline.outlets]

    def _audits(self) -> list[AuditStats]:
        return [] if self._auditor is None else self._auditor.stats()

    def _audit(self) -> dict[str, Any]:
        return {"ok": False, "audits": []} if self._auditor is None else self._auditor.audit()

    def _hash(
        self, asked: str | Sequence[int], adapter: str | None, cache_salt: str | None
    ) -> Sequence[Any]:
        if self._hash_blocks is None:
            raise ValueError("the engine is not up yet; see /health")
        return self._hash_blocks(asked, adapter, cache_salt)
