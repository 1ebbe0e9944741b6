"""Many workers' KV events into one index: finds the workers, follows them, forgets them.

A worker's ZMQ plane is asked once a second who it is: so ranks turn up, two workers with one name
are found out, and what a worker itself does not trust is not trusted here. A plain vLLM server says
none of that; it is listened to under the name it was given. Host names are looked up again and
again, one source for each address. A worker is heard at one place at a time: who moves is another
process, and what the last one held is forgotten with its listeners. What goes wrong at one address
is that address's: it is counted and tried again, and every other goes on.
Owns the pipeline and all of its listeners; decodes no event.
Long: addresses are asked and workers follow from the answers, round by round.
"""

from __future__ import annotations

import functools
import ipaddress
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec
import zmq

from llm_worker.errors import ConfigError
from llm_worker.kv.follow.listener import Listener
from llm_worker.kv.index.index import Index
from llm_worker.kv.pipeline import Pipeline, SecondWriterError
from llm_worker.kv.plane import topics
from llm_worker.kv.plane.transport import END_SEQUENCE, STATUS
from llm_worker.kv.stats import ListenerStats
from llm_worker.settings.endpoint import Endpoint

if TYPE_CHECKING:
    from llm_worker.fleet.nats_reader import NatsReader

log = logging.getLogger(__name__)

_MAX_STREAMS = 1024  # of one plane
_NATS = "nats"  # where a worker is that comes by NATS


@dataclass(frozen=True, slots=True)
class Limits:
    """How often the fleet is asked, how long is waited, and how many sockets there may be."""

    round_seconds: float = 1.0
    patience_seconds: float = 5.0  # with an answer, before it is asked for again or done without
    # libzmq's own bound is 1,023 for a context: 341 listeners, which take three each.
    max_sockets: int = 1 << 15


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
    opened: bool = False

    @property
    def key(self) -> str:
        """Tells it apart from others, and may be shown."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.endpoint.port}"

    def tcp(self, port: int) -> str:
        """As ZMQ connects to it."""
        return f"tcp://[{self.host}]:{port}" if ":" in self.host else f"tcp://{self.host}:{port}"


@dataclass
class _Worker:
    """One worker, as long as it is there or not long gone."""

    name: str
    seen: float  # monotonic
    place: str | None = None  # key of the address where it is heard, or `_NATS`; None: nowhere yet
    listeners: dict[int, Listener] = field(default_factory=dict)  # by rank; all at `place`


class Fleet:
    """The index of many workers. `status`, `listeners` and the index are for any thread."""

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        *,
        max_blocks: int | None = None,
        gone_seconds: float = 300.0,
        resolve_seconds: float = 10.0,
        limits: Limits = Limits(),
    ) -> None:
        """``gone_seconds``: how long a worker may be away before its blocks are forgotten.

        Raises:
            ConfigError: there is a NATS endpoint and no NATS client.
        """
        self.index = Index(max_blocks=max_blocks)
        self._context = zmq.Context()
        self._context.max_sockets = limits.max_sockets
        self.pipeline = Pipeline(self.index, context=self._context)
        self.round_failures = 0  # rounds, and addresses within one, that broke
        self._last_round = float("-inf")  # monotonic; the last one that came to its end
        self._endpoints = endpoints
        self._gone_seconds = gone_seconds
        self._limits = limits
        self._resolve_seconds = resolve_seconds
        urls = [each.url for each in endpoints if each.kind == "nats"]
        self._nats = [_nats_reader(url, self.index, self.pipeline) for url in urls]
        self._hosts: dict[Endpoint, tuple[str, ...]] = {}
        self._unresolved: dict[Endpoint, str] = {}
        self._addresses: dict[tuple[Endpoint, str], _Address] = {}
        self._workers: dict[str, _Worker] = {}
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
        if not self.pipeline.alive:
            self._context.destroy(linger=0)

    @property
    def seconds_since_round(self) -> float:
        """Since the fleet was last asked to an end; infinite before the first time."""
        return time.monotonic() - self._last_round

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
            return now - address.answered <= self._limits.patience_seconds
        worker = self._workers.get(address.name)
        return (
            worker is not None
            and worker.place == address.key
            and any(listener.stats.connected for listener in list(worker.listeners.values()))
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
            # First who is gone: its name is free then.
            for (other, host), address in list(self._addresses.items()):
                if other == endpoint:
                    address.listed = host in hosts
                    if not address.listed and not self._answers(address, time.monotonic()):
                        self._close(address)
            for host in hosts:
                address = self._addresses.setdefault((endpoint, host), _Address(endpoint, host))
                if not address.opened:
                    self._at(address, self._open)

    def _at(self, address: _Address, do: Callable[[_Address], None]) -> None:
        """Do something at one address; what goes wrong there costs no other."""
        try:
            do(address)
        except (zmq.ZMQError, OSError, TimeoutError, SecondWriterError) as error:
            self._note_failure("%s: %s; it is tried again", address.key, error)

    def _note_failure(self, message: str, *arguments: object) -> None:
        self.round_failures += 1
        if self.round_failures & (self.round_failures - 1) == 0:  # not a log full of the same
            log.error(message, *arguments)

    def _open(self, address: _Address) -> None:
        endpoint = address.endpoint
        if endpoint.kind == "vllm":
            taken = {other.name for other in self._addresses.values() if other is not address}
            alone = endpoint.worker not in taken
            address.name = endpoint.worker if alone else f"{endpoint.worker}@{address.host}"
            self._worker(address.name).seen = time.monotonic()
            self._listen_to_vllm(address)
            address.opened = True
            return
        dealer: Any = self._context.socket(zmq.DEALER)
        try:
            dealer.setsockopt(zmq.LINGER, 0)
            dealer.setsockopt(zmq.IPV6, 1)
            dealer.setsockopt(zmq.SNDHWM, 1)  # one question waits for who is not there, no more
            dealer.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
            assert endpoint.replay_port is not None
            dealer.connect(address.tcp(endpoint.replay_port))
            self._poller.register(dealer, zmq.POLLIN)
        except BaseException:
            dealer.close()
            raise
        address.dealer = dealer
        address.opened = True

    def _close(self, address: _Address) -> None:
        """No name leads there, and nobody answers there. Its workers' blocks stay for a while."""
        del self._addresses[address.endpoint, address.host]
        if address.dealer is not None:
            self._poller.unregister(address.dealer)
            address.dealer.close()

    # --- rounds -----------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stop.is_set():
            began = time.monotonic()
            try:
                self._update_addresses()
                self._ask()
                self._collect(began + self._limits.round_seconds)
                self._reconcile(time.monotonic())
                self._last_round = time.monotonic()
            except Exception as error:  # the thread is supervised here: the next round may work
                self._note_failure("a round through the fleet failed: %r", error)
            self._stop.wait(max(0.0, began + self._limits.round_seconds - time.monotonic()))
        for address in list(self._addresses.values()):
            self._close(address)

    def _ask(self) -> None:
        now = time.monotonic()
        for address in self._addresses.values():
            waiting = (
                address.asked > address.answered
                and now - address.asked < self._limits.patience_seconds
            )
            if address.dealer is None or waiting:
                continue
            try:
                address.dealer.send_multipart((b"", STATUS), zmq.NOBLOCK)
            except zmq.Again:
                continue  # not connected, and one question waits already
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
            if now - address.answered > self._limits.patience_seconds:
                continue
            for status in address.answer:
                worker = self._worker(status.worker)
                worker.seen = max(worker.seen, address.answered)
                there = found.setdefault(status.worker, {})
                if worker.place == address.key or status.instance not in there:
                    there[status.instance] = address
        instances = {name: set(there) for name, there in found.items()}
        for source in self._nats:
            for name, seen in list(source.last_seen.items()):
                worker = self._worker(name)
                worker.seen = max(seen, worker.seen)
                self._move(worker, _NATS)
                if now - seen <= self._limits.patience_seconds:
                    instances.setdefault(name, set()).update(source.instances.get(name, ()))
        self._duplicates = {name for name, names in instances.items() if len(names) > 1}
        for name, there in found.items():
            self._settle(self._worker(name), there)
        self._watch_vllm(now)
        self.pipeline.on_index_thread(lambda: self._mark(found))
        for worker in list(self._workers.values()):
            if now - worker.seen > self._gone_seconds:
                self._forget(worker)

    def _worker(self, name: str) -> _Worker:
        worker = self._workers.get(name)
        if worker is None:
            # Seen by whoever asks for it, in a moment.
            worker = self._workers[name] = _Worker(name, seen=float("-inf"))
        return worker

    def _move(self, worker: _Worker, place: str) -> None:
        """Have it heard there, and nowhere else: another place is another process."""
        if worker.place == place:
            return
        if worker.place is not None:
            log.info("%s is heard at %s now, and not at %s", worker.name, place, worker.place)
            self._empty(worker, blocks=place != _NATS)
        worker.place = place

    def _settle(self, worker: _Worker, there: dict[str, _Address]) -> None:
        """Have a listener for each rank, at one address only."""
        if worker.place == _NATS:
            return
        by_key = {address.key: address for address in there.values()}
        if worker.place not in by_key:
            self._move(worker, min(by_key))
        address = by_key[str(worker.place)]
        for status in address.answer:
            if status.worker == worker.name and status.rank not in worker.listeners:
                self._at(address, functools.partial(self._follow, worker, status.rank))

    def _follow(self, worker: _Worker, rank: int, address: _Address) -> None:
        log.info("following rank %d of %s at %s", rank, worker.name, address.key)
        assert address.endpoint.replay_port is not None
        worker.listeners[rank] = self.pipeline.listen(
            address.tcp(address.endpoint.port),
            address.tcp(address.endpoint.replay_port),
            worker=worker.name,
            rank=rank,
            topic=topics.topic(worker.name, rank).decode(),
            epochs=True,
        )

    def _listen_to_vllm(self, address: _Address) -> None:
        worker, endpoint = self._worker(address.name), address.endpoint
        self._move(worker, address.key)
        replay = endpoint.replay_port
        for rank in range(endpoint.ranks):
            if rank in worker.listeners:
                continue  # the name led there before, and does again
            worker.listeners[rank] = self.pipeline.listen(
                address.tcp(endpoint.port + rank),
                None if replay is None else address.tcp(replay + rank),
                worker=worker.name,
                rank=rank,
                topic=endpoint.topic,
                # One alone may be any rank of a larger deployment, under a name of its own.
                checks_rank=endpoint.ranks > 1,
            )

    def _watch_vllm(self, now: float) -> None:
        """A vLLM server is there as long as one of its ranks is."""
        for address in self._addresses.values():
            if address.endpoint.kind == "vllm" and self._answers(address, now):
                self._worker(address.name).seen = now

    def _mark(self, found: dict[str, dict[str, _Address]]) -> None:
        """On the index's thread: what the rounds found out goes on the sources."""
        doubted = {
            (status.worker, status.rank): bool(status.stale)
            for there in found.values()
            for address in there.values()
            for status in address.answer
            if self._workers[status.worker].place == address.key
        }
        for source in self.index.sources():
            if source.worker in self._duplicates:
                source.trust.name_shared()
            doubt = doubted.get((source.worker, source.rank))
            if doubt is not None:
                source.trust.doubted_upstream(doubt)
        answered = {address.key for there in found.values() for address in there.values()}
        for worker in self._workers.values():
            for rank, listener in worker.listeners.items():
                if worker.name in self._duplicates:
                    continue
                if worker.place in answered:
                    listener.source.trust.elsewhere((worker.name, rank) not in doubted)
                if "duplicate_worker" in listener.source.stale:
                    listener.stream.check_stale()  # which of the two it was, a snapshot tells

    def _forget(self, worker: _Worker) -> None:
        """It was away for too long."""
        log.info("%s is gone for %.0f s: its blocks are forgotten", worker.name, self._gone_seconds)
        self._empty(worker)
        del self._workers[worker.name]
        for source in self._nats:
            source.forget(worker.name)
        for address in self._addresses.values():
            if address.name == worker.name:  # somebody configured it: it may come back
                self._worker(worker.name).seen = time.monotonic()
                self._at(address, self._listen_to_vllm)

    def _empty(self, worker: _Worker, *, blocks: bool = True) -> None:
        """Its listeners go, and its blocks."""
        while worker.listeners:
            self.pipeline.forget(worker.listeners.popitem()[1])
        if blocks:
            self.pipeline.on_index_thread(lambda: self.index.remove_worker(worker.name))


def _nats_reader(url: str, index: Index, pipeline: Pipeline) -> NatsReader:
    try:
        from llm_worker.fleet.nats_reader import NatsReader
    except ModuleNotFoundError as error:
        raise ConfigError(["NATS needs its client: pip install 'llm-worker[nats]'"]) from error
    return NatsReader(url, index=index, call=pipeline.on_index_thread)


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
