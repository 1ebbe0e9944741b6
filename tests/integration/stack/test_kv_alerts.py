"""The alerts about KV events, drilled: real faults, real pages, a real Prometheus.

Each site is a process's worth of the KV pipeline (publisher, listener, index, plane, page) with one
fault that is made and not faked; beside them run some that are well. Prometheus scrapes their pages
with the shipped rules, in which only the patience (``for``) is shorter, and tells a real
Alertmanager with the shipped configuration.
"""

from __future__ import annotations

import http.server
import json
import re
import shutil
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from bisect import bisect_left
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest
import zmq
from prometheus_client import CollectorRegistry

from llm_worker.exposition.exposition import Exposition
from llm_worker.fleet import fleet as fleet_module
from llm_worker.kv.collector import KvCollector
from llm_worker.kv.follow.holdback import CAPACITY_BATCHES
from llm_worker.kv.index.audit import Auditor, digest
from llm_worker.kv.index.index import Index
from llm_worker.kv.pipeline import Pipeline
from llm_worker.kv.plane import topics
from llm_worker.kv.plane.nats_plane import NatsPlane
from llm_worker.kv.plane.transport import EventSocket
from llm_worker.kv.plane.zmq_plane import ZmqPlane
from llm_worker.kv.records import AllBlocksCleared, BlockStored
from llm_worker.kv.stats import AuditStats
from llm_worker.kv.wire import encode
from llm_worker.metrics import Metrics
from llm_worker.settings import endpoint
from support.places import FIXTURES, ROOT
from support.waiting import until
from support.worker_process import free_ports

RULES = ROOT / "prometheus" / "rules"
ANY_PORT = "tcp://127.0.0.1:*"
BEAT_SECONDS = 0.1

pytestmark = pytest.mark.needs("prometheus", "alertmanager")

CONFIG = """
global: {scrape_interval: 1s, scrape_timeout: 1s, evaluation_interval: 1s}
rule_files: [rules/*.yml]
alerting: {alertmanagers: [{static_configs: [{targets: ["ALERTMANAGER"]}]}]}
scrape_configs:
"""

_hashes = count(1)


def batch(*, blocks: int = 2, age_seconds: float = 0.0) -> bytes:
    """One batch of new blocks, as an engine made it so long ago."""
    event = BlockStored(hashes=[next(_hashes) for _ in range(blocks)], block_size=16)
    return encode(time.time() - age_seconds, [event], 0)


class Site:
    """One process of the KV pipeline and its page. ``beat`` goes on with what it is there for.

    From the second scrape on: Prometheus sees counters grow, not that they have grown.
    """

    job = "worker"
    fires: frozenset[str] = frozenset()  # all of these, and nothing else
    follows: frozenset[str] = frozenset()  # those that are held back, as another says it all
    # What it leads to when it lasts: whether the drill lasts that long depends on the machine.
    in_time: frozenset[str] = frozenset()

    def __init__(self, *, max_blocks: int | None = None, fleet: bool = False) -> None:
        self.closers: list[Callable[[], object]] = []
        self.scrapes = 0
        self.pipeline = Pipeline(Index(max_blocks=max_blocks))
        self.metrics = Metrics(CollectorRegistry())
        self.metrics.set_state("ready")
        self.exposition = Exposition(self.metrics)
        self.exposition.register(
            "kv",
            KvCollector(
                self.pipeline.index,
                listeners=lambda: [listener.stats for listener in self.pipeline.listeners],
                planes=lambda: [outlet.stats for outlet in self.pipeline.outlets],
                audits=self.audits,
                fleet=fleet,
                round_failures=self.round_failures,
            ),
        )
        if not fleet:
            self.exposition.register("worker", self.metrics.registry)
        site = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = site.page()
                site.scrapes += 1
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Silence."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._serving = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._serving.start()
        self.address = f"127.0.0.1:{self._server.server_port}"
        self.build()
        self.pipeline.start()

    @property
    def worker(self) -> str:
        return type(self).__name__

    def build(self) -> None:
        """Publisher, listener, plane: before the pipeline starts."""

    def beat(self) -> None:
        """What happens ten times a second."""

    def audits(self) -> list[AuditStats]:
        return []

    def round_failures(self) -> int:
        return 0

    def page(self) -> bytes:
        return self.exposition.render("text/plain").body

    def publisher(self, **bounds: int) -> EventSocket:
        """An engine's sockets: events and replay."""
        opened = EventSocket(ANY_PORT, ANY_PORT, **bounds)  # type: ignore[arg-type]
        self.closers.append(opened.close)
        return opened

    def listen(self, publisher: EventSocket, block_size: int | None = None) -> None:
        self.pipeline.listen(
            publisher.endpoint,
            publisher.replay_endpoint,
            worker=self.worker,
            rank=0,
            block_size=block_size,
        )

    def was_slow(self) -> bool:
        """Whether a batch was indexed more than a second after it was made."""
        lags = [listener.stats.lag for listener in self.pipeline.listeners]
        return any(sum(lag.counts[bisect_left(lag.bounds, 1.0) + 1 :]) for lag in lags)

    def close(self) -> None:
        self.pipeline.close()
        for close in self.closers:
            close()
        self._server.shutdown()
        self._serving.join()
        self._server.server_close()


class Healthy(Site):
    """Events come, are indexed and go out again; a late reader has them replayed."""

    def build(self) -> None:
        self.engine = self.publisher()
        for _ in range(5):
            self.engine.publish(batch())
        plane = ZmqPlane(
            ANY_PORT,
            ANY_PORT,
            sources=self.pipeline.index.sources,
            on_index_thread=self.pipeline.on_index_thread,
            buffer_batches=20,  # full of what is kept for replay, and that is right
        )
        self.pipeline.add_outlet(plane)
        self.listen(self.engine)

    def beat(self) -> None:
        self.engine.publish(batch())


class Starting(Site):
    """A worker that loads its model: its engine has no publisher yet, and that is right."""

    def build(self) -> None:
        self.metrics.set_state("starting")
        self.pipeline.listen(
            f"tcp://127.0.0.1:{free_ports(1)[0]}", None, worker=self.worker, rank=0
        )


class Gap(Site):
    """A number is left out again and again, and no replay has it."""

    fires = frozenset({"KvGapNotHealed", "KvBatchesLost"})
    follows = frozenset({"KvGapNotHealed"})

    def build(self) -> None:
        self.engine = self.publisher()
        self.listen(self.engine)
        self.healed = False
        self.beats = 0

    def beat(self) -> None:
        self.beats += 1
        if self.beats % 10 == 0 and not self.healed:
            self.engine.skip()
        self.engine.publish(batch())


class Undecodable(Site):
    """Something else than batches comes over the socket."""

    fires = frozenset({"KvEventsUndecodable", "KvSourceStale"})
    follows = frozenset({"KvSourceStale"})

    def build(self) -> None:
        self.engine = self.publisher()
        self.listen(self.engine)

    def beat(self) -> None:
        self.engine.publish(b"\xc1 no MessagePack")
        self.engine.publish(batch())


class Late(Site):
    """Batches arrive three seconds after they were made."""

    fires = frozenset({"KvLagHigh"})

    def build(self) -> None:
        self.engine = self.publisher()
        self.listen(self.engine)

    def beat(self) -> None:
        for _ in range(5):
            self.engine.publish(batch(age_seconds=3.0))


class Full(Site):
    """More blocks than the index may hold."""

    fires = frozenset({"KvIndexFull", "KvSourceStale"})
    follows = frozenset({"KvSourceStale"})

    def __init__(self) -> None:
        super().__init__(max_blocks=20)

    def build(self) -> None:
        self.engine = self.publisher()
        self.listen(self.engine)

    def beat(self) -> None:
        self.engine.publish(batch())


class Unheard(Site):
    """The engine's publisher is not there although the worker is ready."""

    fires = frozenset({"KvListenerDown"})

    def build(self) -> None:
        self.pipeline.listen(
            f"tcp://127.0.0.1:{free_ports(1)[0]}", None, worker=self.worker, rank=0
        )


class OtherSize(Site):
    """Somebody publishes blocks of another size than the engine's."""

    fires = frozenset({"KvBlockSizeMismatch"})

    def build(self) -> None:
        self.engine = self.publisher()
        self.listen(self.engine, block_size=128)

    def beat(self) -> None:
        self.engine.publish(batch())


class Backlog(Site):
    """The replay endpoint takes questions and never answers; batches pile up meanwhile.

    After some seconds the gap is given up, so the index is marked and a batch is lost.
    """

    fires = frozenset({"KvQueueBacklog", "KvQueueDropping"})
    follows = frozenset({"KvQueueBacklog"})
    in_time = frozenset({"KvGapNotHealed", "KvBatchesLost"})

    def build(self) -> None:
        mute: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        port = mute.bind_to_random_port("tcp://127.0.0.1")
        self.closers.append(lambda: mute.close(linger=0))
        self.engine = self.publisher()
        replay = f"tcp://127.0.0.1:{port}"
        self.pipeline.listen(self.engine.endpoint, replay, worker=self.worker, rank=0)

    def beat(self) -> None:
        stats = self.pipeline.listeners[0].stats
        if not stats.connected:
            return
        # Given up after some time, and then there is another hole: until somebody has seen it.
        if not stats.queue_batches:
            self.engine.skip()
        payload = batch(blocks=1)  # the same for all: making each takes the others' time
        for _ in range(1 if stats.queue_batches else CAPACITY_BATCHES + 500):
            self.engine.publish(payload)


class PlaneAway(Site):
    """The NATS server is not there."""

    fires = frozenset({"KvPlaneDown", "KvPlaneBufferFilling", "KvPlaneDropping"})
    follows = frozenset({"KvPlaneBufferFilling", "KvPlaneDropping"})

    def build(self) -> None:
        self.engine = self.publisher()
        plane = NatsPlane(
            f"nats://127.0.0.1:{free_ports(1)[0]}",
            sources=self.pipeline.index.sources,
            on_index_thread=self.pipeline.on_index_thread,
            buffer_batches=50,
        )
        self.pipeline.add_outlet(plane)
        self.listen(self.engine)

    def beat(self) -> None:
        self.engine.publish(batch())


class Silent(Site):
    """A worker under load, as recorded from a real one; its engine's events do not arrive."""

    fires = frozenset({"KvEventsSilent"})

    def build(self) -> None:
        self.recorded = [path.read_bytes() for path in sorted((FIXTURES / "worker").glob("*"))]
        self.listen(self.publisher())

    def page(self) -> bytes:
        """The recorded page with the pipeline's own families."""
        recorded = self.recorded[min(self.scrapes // 2, len(self.recorded) - 1)]
        lines = recorded.splitlines(keepends=True)
        others = b"".join(line for line in lines if b"exporter_" not in line)
        names = [family.name for family in self.kv().collect()]
        return others + self.exposition.render("text/plain", names=names).body

    def kv(self) -> KvCollector:
        return KvCollector(
            self.pipeline.index,
            listeners=lambda: [listener.stats for listener in self.pipeline.listeners],
        )


class Drift(Site):
    """The engine drops another block each time and never says so; the auditor mends."""

    fires = frozenset({"KvAuditDrift"})

    def build(self) -> None:
        self.engine = self.publisher()
        self.listen(self.engine)
        self.held = list(range(1 << 40, (1 << 40) + 7))
        event = BlockStored(hashes=[*self.held], block_size=16)
        self.engine.publish(encode(time.time(), [event], 0))
        self.asked = 0
        self.auditor = Auditor(
            self.truth,
            lambda: self.pipeline.listeners,
            self.pipeline.on_index_thread,
            interval_seconds=0.2,
        )
        self.closers.append(self.auditor.close)
        self.auditor.start()

    def audits(self) -> list[AuditStats]:
        return self.auditor.stats()

    def truth(self, full: bool) -> list[dict[str, object]]:
        """What an engine tells: `truth.held`."""
        self.asked += not full  # each comparison begins with that
        held = [value for value in self.held if value != self.held[self.asked % len(self.held)]]
        packed = b"".join(value.to_bytes(8, "big") for value in held)
        return [
            {
                "rank": 0,
                "sequence": self.engine.sequence(),
                "quiet": True,
                "integers": True,
                "digests": {"0": digest(held)},
                "hashes": {"0": packed} if full else {},
                "width": 8,
            }
        ]


class Unaudited(Site):
    """The engine has been idle for long, and its auditor is dead."""

    fires = frozenset({"KvAuditMissing"})

    def build(self) -> None:
        self.engine = self.publisher()
        self.listen(self.engine)
        self.engine.publish(batch(age_seconds=3000.0))

    def audits(self) -> list[AuditStats]:
        return [AuditStats(self.worker, 0)]


class Unproven(Site):
    """The engine works all the time and does not tell what it holds: our plug-in is not in it."""

    fires = frozenset({"KvAuditMissing"})

    def build(self) -> None:
        self.engine = self.publisher()
        self.listen(self.engine)
        self.auditor = Auditor(
            self.truth, lambda: self.pipeline.listeners, self.pipeline.on_index_thread
        )

    def beat(self) -> None:
        self.engine.publish(batch())
        self.auditor.audit()

    def audits(self) -> list[AuditStats]:
        return self.auditor.stats()

    def truth(self, full: bool) -> list[dict[str, object]]:
        raise RuntimeError("no such method")


class Recorded(Site):
    """A worker that is well and under load, page by page as it was recorded; its events of now."""

    kind = "worker-kv"

    def build(self) -> None:
        self.recorded = [path.read_bytes() for path in sorted((FIXTURES / self.kind).glob("*"))]

    def page(self) -> bytes:
        page = self.recorded[min(self.scrapes // 2, len(self.recorded) - 1)]
        now = rb"\g<1>%d" % time.time()
        return re.sub(rb"(?m)^(llm_worker_kv_last_batch_timestamp_seconds\S* ).*$", now, page)


class RecordedFleet(Recorded):
    """A fleet index that is well, recorded with the worker."""

    job = "kv-index"
    kind = "kv-index"


class Fleet(Site):
    """A fleet index with a worker that is gone, and one whose plane has fallen silent."""

    job = "kv-index"
    fires = frozenset({"KvFleetWorkerDisconnected", "KvFleetBehind"})

    def __init__(self, behind: Behind) -> None:
        self.behind = behind
        super().__init__(fleet=True)

    def build(self) -> None:
        self.pipeline.listen(f"tcp://127.0.0.1:{free_ports(1)[0]}", None, worker="gone", rank=0)
        plane = self.behind.plane
        self.pipeline.listen(
            plane.endpoint,
            plane.replay_endpoint,
            worker="Behind",
            rank=0,
            topic=topics.topic("Behind", 0).decode(),
            epochs=True,
        )

    def beat(self) -> None:
        if any(source.blocks() for source in self.pipeline.index.sources()):
            self.behind.cut = True


class FleetFailing(Site):
    """A fleet index that libzmq gives too few sockets for its workers."""

    job = "kv-index"
    fires = frozenset({"KvFleetRoundsFailing"})

    def __init__(self) -> None:
        super().__init__(fleet=True)

    def build(self) -> None:
        endpoints = [endpoint.source(f"vllm://127.0.0.1:{port}") for port in free_ports(3)]
        limits = fleet_module.Limits(round_seconds=0.1, max_sockets=7)
        self.fleet = fleet_module.Fleet(endpoints, limits=limits)
        self.closers.append(self.fleet.close)
        self.fleet.start()

    def round_failures(self) -> int:
        return self.fleet.round_failures


class Behind(Site):
    """A worker whose plane gets nothing any more after its first batches."""

    def build(self) -> None:
        self.cut = False
        self.engine = self.publisher()
        self.plane = ZmqPlane(
            ANY_PORT,
            ANY_PORT,
            sources=self.pipeline.index.sources,
            on_index_thread=self.pipeline.on_index_thread,
        )
        self.closers.append(self.plane.close)
        self.pipeline.add_outlet(self.plane)
        self.listen(self.engine)
        self.engine.publish(batch(age_seconds=100.0))

    def beat(self) -> None:
        if self.cut:
            self.pipeline.outlets.clear()
            self.engine.publish(batch())


class Prometheus:
    """The real program with the shipped rules, patient for a second only; and an Alertmanager."""

    def __init__(self, home: Path, sites: list[Site]) -> None:
        (home / "rules").mkdir()
        for file in RULES.glob("*.yml"):
            text, hasty = re.subn(r"for: \d+\w", "for: 1s", file.read_text(encoding="utf-8"))
            assert hasty or file.name == "recording.yml"
            (home / "rules" / file.name).write_text(text, encoding="utf-8")
        self.alertmanager = f"127.0.0.1:{free_ports(1)[0]}"
        config = CONFIG.replace("ALERTMANAGER", self.alertmanager)
        for job in {site.job for site in sites}:
            targets = json.dumps([site.address for site in sites if site.job == job])
            config += f"  - {{job_name: {job}, static_configs: [{{targets: {targets}}}]}}\n"
        (home / "prometheus.yml").write_text(config)
        self.address = f"127.0.0.1:{free_ports(1)[0]}"
        self.log = home / "prometheus.log"
        self._processes = [
            self._start(
                home / "alertmanager.log",
                shutil.which("prometheus-alertmanager") or "alertmanager",
                f"--config.file={ROOT / 'alertmanager' / 'alertmanager.yml'}",
                f"--storage.path={home / 'alertmanager'}",
                f"--web.listen-address={self.alertmanager}",
                "--cluster.listen-address=",
            ),
            self._start(
                self.log,
                "prometheus",
                f"--config.file={home / 'prometheus.yml'}",
                f"--storage.tsdb.path={home / 'data'}",
                f"--web.listen-address={self.address}",
                "--rules.alert.resend-delay=1s",
            ),
        ]

    @staticmethod
    def _start(log: Path, *command: str) -> subprocess.Popen[bytes]:
        with log.open("wb") as output:
            return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)

    def suppressed(self) -> dict[str, set[str]]:
        """The alerts that Alertmanager holds back for another about KV events, by instance.

        Not for ``TargetDown``: on a machine that is busy a scrape may fail.
        """
        url = f"http://{self.alertmanager}/api/v2/alerts"
        with urllib.request.urlopen(url, timeout=10) as answer:
            alerts = json.load(answer)
        names = {one["fingerprint"]: one["labels"]["alertname"] for one in alerts}
        found: dict[str, set[str]] = {}
        for one in alerts:
            causes = [names.get(cause, "") for cause in one["status"]["inhibitedBy"]]
            if any(cause.startswith("Kv") for cause in causes):
                labels = one["labels"]
                found.setdefault(labels["instance"], set()).add(labels["alertname"])
        return found

    def query(self, expr: str) -> list[dict[str, str]]:
        """The labels of every series of an answer."""
        url = f"http://{self.address}/api/v1/query?{urllib.parse.urlencode({'query': expr})}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return [one["metric"] for one in json.load(answer)["data"]["result"]]

    def firing(self) -> dict[str, set[str]]:
        """The alerts about KV events that fire, by instance."""
        found: dict[str, set[str]] = {}
        for labels in self.query('ALERTS{alertstate="firing",alertname=~"Kv.*"}'):
            found.setdefault(labels["instance"], set()).add(labels["alertname"])
        return found

    def close(self) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.wait(30)


class Drill:
    """All sites, what keeps them going, and the Prometheus that watches."""

    def __init__(self, home: Path) -> None:
        behind = Behind()
        self.sites: list[Site] = [
            Healthy(), Starting(), Gap(), Undecodable(), Late(), Full(), Unheard(), Backlog(),
            PlaneAway(), Silent(), Drift(), OtherSize(), Unaudited(), Unproven(), Recorded(),
            RecordedFleet(), behind, Fleet(behind), FleetFailing(),
        ]  # fmt: skip
        self.prometheus = Prometheus(home, self.sites)
        self._stop = threading.Event()
        self._beating = threading.Thread(target=self._beat)
        self._beating.start()
        self.seen: dict[str, set[str]] = {}
        self.held_back: dict[str, set[str]] = {}

    def site(self, kind: type[Site]) -> Site:
        return next(site for site in self.sites if type(site) is kind)

    def firing(self, kind: type[Site]) -> set[str]:
        """What fires now about a site; what ever did, or was held back, is kept."""
        found = self.prometheus.firing()
        for instance, names in found.items():
            self.seen.setdefault(instance, set()).update(names)
        for instance, names in self.prometheus.suppressed().items():
            self.held_back.setdefault(instance, set()).update(names)
        return found.get(self.site(kind).address, set())

    def reported(self, kind: type[Site]) -> set[str]:
        """What fires about a site, or has."""
        self.firing(kind)
        return self.seen.get(self.site(kind).address, set())

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            for site in self.sites:
                if site.scrapes > 1:
                    site.beat()

    def close(self) -> None:
        self._stop.set()
        self._beating.join()
        self.prometheus.close()
        for site in self.sites:
            site.close()


@pytest.fixture(scope="module")
def drill(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drill]:
    started = Drill(tmp_path_factory.mktemp("drill"))
    yield started
    started.close()


SICK: list[type[Site]] = [
    Gap,
    Undecodable,
    Late,
    Full,
    Unheard,
    Backlog,
    PlaneAway,
    Silent,
    Drift,
    OtherSize,
    Unaudited,
    Unproven,
    Fleet,
    FleetFailing,
]


@pytest.mark.parametrize("kind", SICK, ids=lambda kind: kind.__name__)
def test_a_fault_fires_its_alerts(drill: Drill, kind: type[Site]) -> None:
    """What is broken is what is reported, for the instance where it is broken."""
    until(
        f"{sorted(kind.fires)} fire; see {drill.prometheus.log}",
        lambda: drill.firing(kind) >= kind.fires,
    )


@pytest.mark.parametrize(
    "kind", [kind for kind in SICK if kind.follows], ids=lambda kind: kind.__name__
)
def test_what_follows_from_a_cause_is_not_told_on_top(drill: Drill, kind: type[Site]) -> None:
    """One fault is one message: Alertmanager holds the rest back, and nothing but the rest."""
    address = drill.site(kind).address
    until(
        f"{sorted(kind.follows)} are held back",
        lambda: (
            drill.reported(kind) >= kind.fires
            and drill.held_back.get(address, set()) >= kind.follows
        ),
    )
    assert drill.held_back[address] - kind.in_time == kind.follows


def test_a_gap_that_is_healed_is_reported_no_longer(drill: Drill) -> None:
    """The engine clears its cache: the index is true again, and the alert resolves."""
    gap = drill.site(Gap)
    assert isinstance(gap, Gap)
    until("the gap is reported", lambda: "KvGapNotHealed" in drill.firing(Gap))
    gap.healed = True

    def cleared() -> bool:
        gap.engine.publish(encode(time.time(), [AllBlocksCleared()], 0))
        return "KvGapNotHealed" not in drill.firing(Gap)

    until("the gap is healed", cleared, 180)


def test_nothing_else_fires(drill: Drill) -> None:
    """Neither about who is well, nor about a worker that is only starting, nor beside a fault."""
    # Gap may be healed by now; what fired once is kept.
    until(
        "every fault is reported", lambda: all(drill.reported(kind) >= kind.fires for kind in SICK)
    )
    for site in drill.sites:
        seen = drill.seen.get(site.address, set()) - site.in_time
        if site.was_slow():
            seen.discard("KvLagHigh")  # this machine was, and so it is right
        assert seen <= site.fires, type(site).__name__


def test_every_recording_rule_about_kv_events_returns_data(drill: Drill) -> None:
    """From what a worker and a fleet index were recorded to say."""
    text = (RULES / "recording.yml").read_text(encoding="utf-8")
    rules = re.findall(r"- record: (\w+:llm_worker_kv_\w+:\w+)", text)
    assert len(rules) == 4
    worker, fleet = drill.site(Recorded).address, drill.site(RecordedFleet).address
    for rule in rules:
        instance = fleet if "fleet" in rule else worker
        until(
            rule,
            lambda rule=rule, instance=instance: drill.prometheus.query(  # type: ignore[misc]
                f'{rule}{{instance="{instance}"}}'
            ),
        )


def test_every_alert_about_kv_events_is_drilled() -> None:
    """A rule without a fault here is a rule that nobody has seen fire."""
    text = (RULES / "kv.yml").read_text(encoding="utf-8")
    drilled = frozenset[str]().union(*(kind.fires for kind in SICK))
    assert set(re.findall(r"- alert: (\w+)", text)) == drilled
