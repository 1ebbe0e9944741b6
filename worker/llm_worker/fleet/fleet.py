"""Many workers' KV events into one index: finds the workers, follows them, forgets them.

A worker's ZMQ plane is asked once a second who it is: so ranks turn up, two workers with one name
are found out, and what a worker itself does not trust is not trusted here. A plain vLLM server says
none of that; it is listened to under the name it was given. Host names are looked up again and
again, one source for each address. Owns the pipeline and all of its listeners; decodes no event.
"""

from __future__ import annotations

import ipaddress
import logging
import socket
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec
import zmq

from llm_worker.errors import ConfigError
from llm_worker.kv.follow.listener import Listener
from llm_worker.kv.index.index import Index
from llm_worker.kv.pipeline import Pipeline
from llm_worker.kv.plane import topics
from llm_worker.kv.plane.transport import END_SEQUENCE, STATUS
from llm_worker.kv.stats import ListenerStats
from llm_worker.settings.endpoint import Endpoint

if TYPE_CHECKING:
    from llm_worker.fleet.nats_reader import NatsSource

log = logging.getLogger(__name__)

ROUND_SECONDS = 1.0
_PATIENCE_SECONDS = 5.0  # with an answer, before it is asked for again or done without
_MAX_STREAMS = 1024  # of one plane
_NATS = "nats"  # who owns a worker that comes by NATS


@dataclass
class _Address:
    """One address of an endpoint."""

    endpoint: Endpoint
    host: str
    listed: bool = True  # the name still leads there
    dealer: Any = None
    asked: float = float("-inf")  # monotonic
    answered: float = float("-inf")
    answer: list[topics.Status] = field(default_factory=list)  # the last complete one
    pieces: list[topics.Status] = field(default_factory=list)
    name: str = ""  # vllm: the worker's

    @property
    def key(self) -> str:
        """Tells it apart from others, and may be shown."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.endpoint.port}"

    def tcp(self, port: int) -> str:
        """As ZMQ connects to it."""
        return f"tcp://[{self.host}]:{port}" if ":" in self.host else f"tcp://{self.host}:{port}"


class Fleet:
    """The index of many workers. `status`, `listeners` and the index are for any thread."""

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        *,
        max_blocks: int | None = None,
        gone_seconds: float = 300.0,
        resolve_seconds: float = 10.0,
    ) -> None:
        """``gone_seconds``: how long a worker may be away before its blocks are forgotten.

        Raises:
            ConfigError: there is a NATS endpoint and no NATS client.
        """
        self.index = Index(max_blocks=max_blocks)
        self.pipeline = Pipeline(self.index)
        self.rounds = 0
        self._endpoints = endpoints
        self._gone_seconds = gone_seconds
        self._resolve_seconds = resolve_seconds
        urls = [each.url for each in endpoints if each.kind == "nats"]
        self._nats = [_nats_source(url, self.index, self.pipeline) for url in urls]
        self._hosts: dict[Endpoint, tuple[str, ...]] = {}
        self._unresolved: dict[Endpoint, str] = {}
        self._addresses: dict[tuple[Endpoint, str], _Address] = {}
        self._listeners: dict[tuple[str, str, int], Listener] = {}  # address, worker, rank
        self._owners: dict[str, str] = {}  # worker -> address that it is listened to at
        self._seen: dict[str, float] = {}  # worker -> monotonic
        self._duplicates: set[str] = set()
        self._stop = threading.Event()
        self._poller = zmq.Poller()
        self._threads = [
            threading.Thread(target=self._run, name="kv-fleet", daemon=True),
            threading.Thread(target=self._resolve, name="kv-resolve", daemon=True),
        ]

    def start(self) -> None:
        """Look for workers from now on."""
        self.pipeline.start()
        for source in self._nats:
            source.start()
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Let go of everything."""
        self._stop.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(timeout=5)
        for source in self._nats:
            source.close()
        self.pipeline.close()

    @property
    def alive(self) -> bool:
        """Whether all that has to run does."""
        indexing = self.pipeline.alive and all(source.alive for source in self._nats)
        return indexing and self._threads[0].is_alive()

    def listeners(self) -> list[ListenerStats]:
        """The accounts of all streams."""
        found = [listener.stats for listener in self.pipeline.listeners]
        for source in self._nats:
            found += source.listeners()
        return found

    def status(self) -> dict[str, Any]:
        """What `/kv/status` says beside the sources."""
        now = time.monotonic()
        endpoints = [
            {
                "source": str(address.endpoint),
                "address": address.key,
                "answers": self._answers(address, now),
                "workers": sorted({status.worker for status in address.answer})
                or [name for name in (address.name,) if name],
            }
            for address in list(self._addresses.values())
        ]
        endpoints += [
            {
                "source": str(endpoint),
                "address": None,
                "answers": False,
                "workers": [],
                "problem": problem,
            }
            for endpoint, problem in list(self._unresolved.items())
        ]
        nats = [each for each in self._endpoints if each.kind == "nats"]
        endpoints += [
            {
                "source": str(endpoint),
                "address": None,
                "answers": source.connected,
                "workers": sorted(source.last_seen),
            }
            for endpoint, source in zip(nats, self._nats, strict=True)
        ]
        return {"endpoints": endpoints, "duplicate_workers": sorted(self._duplicates)}

    def _answers(self, address: _Address, now: float) -> bool:
        if address.endpoint.kind == "zmq":
            return now - address.answered <= _PATIENCE_SECONDS
        return any(
            listener.stats.connected
            for (key, _, _), listener in list(self._listeners.items())
            if key == address.key
        )

    # --- names ------------------------------------------------------------------------------------

    def _resolve(self) -> None:
        wanted = [each for each in self._endpoints if each.kind != "nats"]
        while True:
            for endpoint in wanted:
                try:
                    self._hosts[endpoint] = _addresses(endpoint.host)
                    self._unresolved.pop(endpoint, None)
                except OSError as error:
                    # What it led to before may still be there.
                    if endpoint not in self._unresolved:
                        log.warning("%s: cannot be looked up: %s", endpoint, error)
                    self._unresolved[endpoint] = str(error)
            if self._stop.wait(self._resolve_seconds):
                return

    def _update_addresses(self) -> None:
        for endpoint, hosts in list(self._hosts.items()):
            for host in hosts:
                address = self._addresses.get((endpoint, host))
                if address is None:
                    self._addresses[endpoint, host] = address = _Address(endpoint, host)
                    self._open(address)
            for (other, host), address in list(self._addresses.items()):
                if other == endpoint:
                    address.listed = host in hosts
                    if not address.listed and not self._answers(address, time.monotonic()):
                        self._close(address)

    def _open(self, address: _Address) -> None:
        endpoint = address.endpoint
        if endpoint.kind == "vllm":
            taken = {other.name for other in self._addresses.values() if other is not address}
            alone = endpoint.worker not in taken
            address.name = endpoint.worker if alone else f"{endpoint.worker}@{address.host}"
            self._seen[address.name] = time.monotonic()
            self._listen_to_vllm(address)
            return
        dealer: Any = zmq.Context.instance().socket(zmq.DEALER)
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.setsockopt(zmq.IPV6, 1)
        dealer.setsockopt(zmq.IMMEDIATE, 1)  # a question is for who is there
        dealer.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
        assert endpoint.replay_port is not None
        dealer.connect(address.tcp(endpoint.replay_port))
        address.dealer = dealer
        self._poller.register(dealer, zmq.POLLIN)

    def _close(self, address: _Address) -> None:
        """No name leads there, and nobody answers there. Its workers' blocks stay for a while."""
        del self._addresses[address.endpoint, address.host]
        if address.dealer is not None:
            self._poller.unregister(address.dealer)
            address.dealer.close()

    # --- rounds -----------------------------------------------------------------------------------

    def _run(self) -> None:
        failures = 0
        while not self._stop.is_set():
            try:
                began = time.monotonic()
                self._update_addresses()
                self._ask()
                self._collect(began + ROUND_SECONDS)
                self._reconcile(time.monotonic())
                self.rounds += 1
            except Exception:
                failures += 1
                if failures & (failures - 1) == 0:  # not a log full of the same
                    log.exception("a round through the fleet failed")
            self._stop.wait(max(0.0, began + ROUND_SECONDS - time.monotonic()))
        for address in list(self._addresses.values()):
            self._close(address)

    def _ask(self) -> None:
        now = time.monotonic()
        for address in self._addresses.values():
            waiting = address.asked > address.answered and now - address.asked < _PATIENCE_SECONDS
            if address.dealer is None or waiting:
                continue
            try:
                address.dealer.send_multipart((b"", STATUS), zmq.NOBLOCK)
            except zmq.Again:
                continue  # not connected
            address.asked = now
            address.pieces = []

    def _collect(self, until: float) -> None:
        """Take answers until all who were asked have given theirs."""
        by_dealer = {each.dealer: each for each in self._addresses.values() if each.dealer}
        while not self._stop.is_set():
            missing = any(each.asked > each.answered for each in by_dealer.values())
            left = until - time.monotonic()
            if not missing or left <= 0:
                return
            for dealer, _ in self._poller.poll(int(min(left, 0.2) * 1000) + 1):
                while True:
                    try:
                        frames = dealer.recv_multipart(zmq.NOBLOCK)
                    except zmq.Again:
                        break
                    self._take(by_dealer[dealer], frames)

    def _take(self, address: _Address, frames: list[bytes]) -> None:
        if len(frames) != 4:
            return
        if frames[2] == END_SEQUENCE:
            address.answer, address.pieces = address.pieces, []
            address.answered = time.monotonic()
            return
        if len(address.pieces) >= _MAX_STREAMS:
            return
        try:
            address.pieces.append(topics.decode_status(frames[3]))
        except msgspec.DecodeError as error:
            log.warning("%s: no status: %s", address.key, error)

    def _reconcile(self, now: float) -> None:
        """Listen to who is there, mark who cannot be trusted, forget who is gone."""
        found: dict[str, dict[str, _Address]] = {}  # worker -> instance -> where
        for address in self._addresses.values():
            if now - address.answered > _PATIENCE_SECONDS:
                continue
            for status in address.answer:
                self._seen[status.worker] = max(self._seen.get(status.worker, 0), address.answered)
                there = found.setdefault(status.worker, {})
                if self._owners.get(status.worker) == address.key or status.instance not in there:
                    there[status.instance] = address
        instances = {worker: set(there) for worker, there in found.items()}
        for source in self._nats:
            for worker, seen in list(source.last_seen.items()):
                self._seen[worker] = max(seen, self._seen.get(worker, 0))
                self._owners[worker] = _NATS
                if now - seen <= _PATIENCE_SECONDS:
                    instances.setdefault(worker, set()).update(source.instances.get(worker, ()))
        self._duplicates = {worker for worker, names in instances.items() if len(names) > 1}
        for worker, there in found.items():
            self._listen_to(worker, there)
        self._watch_vllm(now)
        self.pipeline.on_index_thread(lambda: self._mark(found))
        for worker, seen in list(self._seen.items()):
            if now - seen > self._gone_seconds:
                self._forget(worker)

    def _listen_to(self, worker: str, there: dict[str, _Address]) -> None:
        """Have a listener for each rank, at one address only."""
        keys = sorted(address.key for address in there.values())
        owner = self._owners.get(worker)
        if owner == _NATS:
            return
        if owner not in keys:
            if owner is not None:
                # It answers elsewhere: another process, whose blocks are not the last one's.
                self._remove(worker)
            owner = self._owners[worker] = keys[0]
        for address in there.values():
            if address.key != owner:
                continue
            for status in address.answer:
                key = (owner, worker, status.rank)
                if status.worker == worker and key not in self._listeners:
                    log.info("following rank %d of %s at %s", status.rank, worker, owner)
                    assert address.endpoint.replay_port is not None
                    self._listeners[key] = self.pipeline.listen(
                        address.tcp(address.endpoint.port),
                        address.tcp(address.endpoint.replay_port),
                        worker=worker,
                        rank=status.rank,
                        topic=topics.topic(worker, status.rank).decode(),
                        epochs=True,
                    )

    def _listen_to_vllm(self, address: _Address) -> None:
        endpoint = address.endpoint
        replay = endpoint.replay_port
        for rank in range(endpoint.ranks):
            if (address.key, address.name, rank) in self._listeners:
                continue  # the name led there before, and does again
            self._listeners[address.key, address.name, rank] = self.pipeline.listen(
                address.tcp(endpoint.port + rank),
                None if replay is None else address.tcp(replay + rank),
                worker=address.name,
                rank=rank,
                topic=endpoint.topic,
                # One alone may be any rank of a larger deployment, under a name of its own.
                checks_rank=endpoint.ranks > 1,
            )

    def _watch_vllm(self, now: float) -> None:
        """A vLLM server is there as long as one of its ranks is."""
        for address in self._addresses.values():
            if address.endpoint.kind == "vllm" and self._answers(address, now):
                self._seen[address.name] = now

    def _mark(self, found: dict[str, dict[str, _Address]]) -> None:
        """On the index's thread: what the rounds found out goes on the sources."""
        doubted = {
            (status.worker, status.rank): bool(status.stale)
            for there in found.values()
            for address in there.values()
            for status in address.answer
            if self._owners.get(status.worker) == address.key
        }
        for source in self.index.sources():
            if source.worker in self._duplicates:
                source.trust.name_shared()
            doubt = doubted.get((source.worker, source.rank))
            if doubt is not None:
                source.trust.doubted_upstream(doubt)
        answered = {address.key for there in found.values() for address in there.values()}
        for (key, worker, rank), listener in self._listeners.items():
            if key in answered and worker not in self._duplicates:
                listener.source.trust.elsewhere((worker, rank) not in doubted)
            if worker not in self._duplicates and "duplicate_worker" in listener.source.stale:
                listener.stream.check_stale()  # which of the two it was, a snapshot tells

    def _forget(self, worker: str) -> None:
        """It was away for too long."""
        log.info("%s is gone for %.0f s: its blocks are forgotten", worker, self._gone_seconds)
        self._remove(worker)
        self._seen.pop(worker, None)
        self._owners.pop(worker, None)
        for source in self._nats:
            source.forget(worker)
        for address in self._addresses.values():
            if address.name == worker:  # somebody configured it: it may come back
                self._seen[worker] = time.monotonic()
                self._listen_to_vllm(address)

    def _remove(self, worker: str) -> None:
        """Its listeners and its blocks."""
        for key in [key for key in self._listeners if key[1] == worker]:
            self.pipeline.forget(self._listeners.pop(key))
        self.pipeline.on_index_thread(lambda: self.index.remove_worker(worker))


def _nats_source(url: str, index: Index, pipeline: Pipeline) -> NatsSource:
    try:
        from llm_worker.fleet.nats_reader import NatsSource
    except ModuleNotFoundError as error:
        raise ConfigError(["NATS needs its client: pip install 'llm-worker[nats]'"]) from error
    return NatsSource(url, index=index, call=pipeline.on_index_thread)


def _addresses(host: str) -> tuple[str, ...]:
    """What a name leads to.

    Raises:
        OSError: nothing.
    """
    try:
        ipaddress.ip_address(host)
    except ValueError:
        found: Iterable[Any] = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        return tuple(sorted({str(address[4][0]) for address in found}))
    return (host,)
