"""The KV pipeline's families: names, labels, and what is there before anything happened."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

import pytest
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.parser import text_string_to_metric_families

from llm_worker.exposition.exposition import Exposition
from llm_worker.kv import collector as metrics
from llm_worker.kv import stats
from llm_worker.kv.collector import FAMILIES, PREFIX, KvCollector
from llm_worker.kv.index.index import Index
from llm_worker.kv.records import BlockRemoved, BlockStored
from llm_worker.kv.stats import AuditStats, ListenerStats, MergeStats, PlaneStats
from llm_worker.metrics import Metrics

# Dashboards, rules and other people's queries rely on these.
LABELS = {
    "batches_total": ("worker", "engine", "outcome"),
    "events_undecodable_total": ("worker", "engine", "reason"),
    "gaps_total": ("worker", "engine", "kind"),
    "replays_total": ("worker", "engine", "outcome"),
    "queue_batches": ("worker", "engine"),
    "queue_capacity_batches": ("worker", "engine"),
    "listener_up": ("worker", "engine"),
    "listener_reconnects_total": ("worker", "engine"),
    "listener_crashes_total": ("worker", "engine"),
    "block_size_mismatches_total": ("worker", "engine"),
    "sequence": ("worker", "engine"),
    "last_batch_timestamp_seconds": ("worker", "engine"),
    "lag_seconds": ("worker", "engine"),
    "events_total": ("worker", "engine", "type"),
    "blocks_stored_total": ("worker", "engine"),
    "blocks_removed_total": ("worker", "engine"),
    "blocks_cleared_total": ("worker", "engine"),
    "blocks_duplicate_total": ("worker", "engine"),
    "blocks_unknown_removed_total": ("worker", "engine"),
    "blocks_refused_total": ("worker", "engine"),
    "source_stale": ("worker", "engine", "reason"),
    "index_blocks": ("worker", "engine", "medium"),
    "index_bytes": (),
    "index_max_blocks": (),
    "match_requests_total": ("outcome",),
    "match_seconds": (),
    "audits_total": ("worker", "engine", "outcome"),
    "audit_drift_blocks": ("worker", "engine"),
    "audit_mended_blocks_total": ("worker", "engine", "direction"),
    "audit_last_verdict_timestamp_seconds": ("worker", "engine"),
    "plane_up": ("plane",),
    "merge_withheld_blocks_total": ("worker", "engine", "reason"),
    "pipeline_crashes_total": (),
    "plane_sequence": ("plane",),
    "plane_published_batches_total": ("plane",),
    "plane_acknowledged_batches_total": ("plane",),
    "plane_buffered_batches": ("plane",),
    "plane_buffer_capacity_batches": ("plane",),
    "plane_dropped_batches_total": ("plane", "reason"),
    "plane_replays_served_total": ("plane",),
    "plane_snapshots_served_total": ("plane",),
    "plane_requests_refused_total": ("plane", "reason"),
    "plane_reconnects_total": ("plane",),
    "fleet_unique_blocks": (),
    "fleet_held_blocks": (),
    "fleet_workers": ("health",),
    "fleet_round_failures_total": (),
}
CLOSED = {
    ("batches_total", "outcome"): "applied duplicate late replayed lost dropped",
    ("events_undecodable_total", "reason"): " ".join(stats.UNDECODABLE_REASONS),
    ("gaps_total", "kind"): "initial gap restart",
    ("replays_total", "outcome"): " ".join(stats.REPLAY_OUTCOMES),
    ("events_total", "type"): "stored removed cleared unknown",
    ("source_stale", "reason"): " ".join(stats.STALE_REASONS),
    ("index_blocks", "medium"): "gpu",
    ("match_requests_total", "outcome"): "hit miss invalid",
    ("audits_total", "outcome"): "equal drift busy failed",
    ("plane_dropped_batches_total", "reason"): " ".join(stats.PLANE_DROP_REASONS),
    ("plane_requests_refused_total", "reason"): " ".join(stats.PLANE_REFUSAL_REASONS),
    ("fleet_workers", "health"): "ok stale disconnected",
}
UNKNOWN_AT_FIRST = {
    "sequence",
    "last_batch_timestamp_seconds",
    "audit_drift_blocks",
    "audit_last_verdict_timestamp_seconds",
    "plane_sequence",
    "index_max_blocks",
    "merge_withheld_blocks",  # nothing is merged
}


class Clock:
    """A clock that stands still."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def collector(
    index: Index,
    listeners: Iterable[ListenerStats] = (),
    planes: Iterable[PlaneStats] = (),
    audits: Iterable[AuditStats] = (),
    *,
    fleet: bool = False,
    clock: Callable[[], float] | None = None,
) -> KvCollector:
    return KvCollector(
        index,
        listeners=lambda: listeners,
        planes=lambda: planes,
        audits=lambda: audits,
        fleet=fleet,
        clock=clock or Clock(),
    )


def fresh(*, fleet: bool = True) -> KvCollector:
    """One of everything, and nothing has happened."""
    index = Index()
    index.source("w", 0)
    listeners = [ListenerStats("w", 0)]
    return collector(index, listeners, [PlaneStats("zmq")], [AuditStats("w", 0)], fleet=fleet)


def stored(*hashes: int, medium: str = "gpu") -> BlockStored:
    return BlockStored(hashes=list(hashes), parent=None, block_size=16, medium=medium)


def value(families: Iterable[Metric], name: str, **labels: str) -> float | None:
    """The one sample of that name with those labels and no others, or None."""
    found = [
        sample.value
        for family in families
        for sample in family.samples
        if sample.name == PREFIX + name and sample.labels == labels
    ]
    assert len(found) < 2, f"{name}{labels} is there {len(found)} times"
    return found[0] if found else None


W0 = {"worker": "w", "engine": "0"}


def test_every_family_has_the_name_and_labels_that_others_rely_on() -> None:
    """A renamed label would silently empty dashboards and rules."""
    assert {family.name: family.labels for family in FAMILIES} == LABELS
    assert all(("_total" in family.name) == (family.type == "counter") for family in FAMILIES)


def test_what_is_collected_is_what_is_declared() -> None:
    """docs/metrics.md is made from the declaration; the page from the collector."""
    families = list(fresh().collect())
    suffix = {"counter": "_total", "gauge": "", "histogram": ""}
    names = [family.name.removeprefix(PREFIX) + suffix[family.type] for family in families]
    assert names == [family.name for family in FAMILIES]
    assert [family.documentation for family in families] == [f.documentation for f in FAMILIES]
    for family, declared in zip(families, FAMILIES, strict=True):
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(declared.labels), sample


def test_a_first_page_has_every_closed_label_set_at_zero() -> None:
    """rate() sees the first failure, and a panel the zero before it."""
    families = {family.name: family for family in fresh().collect()}
    for (name, label), values in CLOSED.items():
        samples = families[PREFIX + name.removesuffix("_total")].samples
        assert [sample.labels[label] for sample in samples] == values.split(), name
        if name not in {"source_stale", "fleet_workers"}:
            assert {sample.value for sample in samples} == {0}, name


def test_a_value_that_is_not_known_has_no_sample() -> None:
    """Zero would be a claim: 1970, a verdict without an audit, an index that may hold nothing."""
    empty = {family.name.removeprefix(PREFIX) for family in fresh().collect() if not family.samples}
    assert empty == UNKNOWN_AT_FIRST


def test_no_series_says_when_a_counter_was_created() -> None:
    """One sample in ten that nobody reads."""
    names = {sample.name for family in fresh().collect() for sample in family.samples}
    assert not [name for name in names if name.endswith("_created")]


def test_only_the_fleet_service_tells_of_the_fleet() -> None:
    """A worker's page has no series that would look like a fleet of one."""
    names = {family.name for family in fresh(fleet=False).collect()}
    assert names == {
        PREFIX + family.name.removesuffix("_total")
        for family in FAMILIES
        if not family.name.startswith("fleet_")
    }


def test_merging_and_crashes_are_on_the_page() -> None:
    """What merging holds back is a dropped value, and a broken thread is a lie in the making."""
    collector = KvCollector(
        Index(),
        listeners=list,
        merges=lambda: [MergeStats("w", 1, 2, 3, 4)],
        crashes=lambda: 5,
    )
    values = {
        (sample.name.removeprefix(PREFIX), sample.labels.get("reason")): sample.value
        for family in collector.collect()
        for sample in family.samples
        if sample.labels.get("worker") == "w" or "crashes" in sample.name
    }
    assert values == {
        ("merge_withheld_blocks_total", "stored_elsewhere"): 2,
        ("merge_withheld_blocks_total", "held_elsewhere"): 3,
        ("merge_withheld_blocks_total", "unknown_removed"): 4,
        ("pipeline_crashes_total", None): 5,
    }


def test_a_connectors_stream_is_shown_beside_its_engines() -> None:
    """Its gaps are its own; events of an unknown type are the rank's, whoever sent them."""
    engine, connector = ListenerStats("w", 0), ListenerStats("w", 0, part="connector")
    engine.batches_lost, connector.batches_lost = 1, 2
    engine.unknown_events, connector.unknown_events = 3, 4
    index = Index()
    index.source("w", 0)
    collector = KvCollector(index, listeners=lambda: [engine, connector])
    values = {
        (
            sample.labels["worker"],
            sample.labels.get("outcome") or sample.labels["type"],
        ): sample.value
        for family in collector.collect()
        for sample in family.samples
        if sample.labels.get("outcome") == "lost" or sample.labels.get("type") == "unknown"
    }
    assert values == {("w", "lost"): 1, ("w/connector", "lost"): 2, ("w", "unknown"): 7}


def test_every_field_of_a_listener_is_on_the_page() -> None:
    """A counter that nobody shows is not counted; each has a number of its own here."""
    listener = ListenerStats("w", 0, *range(1, 9))
    listener.undecodable["hash"] += 11
    listener.unknown_events = 12
    listener.gaps["restart"] += 13
    listener.replays["aged_out"] += 14
    listener.connected = True
    listener.reconnects = 15
    listener.sequence = 16
    listener.last_batch_timestamp_seconds = 17.5
    listener.crashes = 18
    listener.lag.observe(0.02, 3)
    listener.lag.observe(99.0)
    index = Index()
    index.source("w", 0)
    page = list(collector(index, [listener]).collect())
    for number, outcome in enumerate(metrics.BATCH_OUTCOMES, 1):
        assert value(page, "batches_total", **W0, outcome=outcome) == number
    assert value(page, "queue_batches", **W0) == 7
    assert value(page, "queue_capacity_batches", **W0) == 8
    assert value(page, "events_undecodable_total", **W0, reason="hash") == 11
    assert value(page, "events_total", **W0, type="unknown") == 12
    assert value(page, "gaps_total", **W0, kind="restart") == 13
    assert value(page, "replays_total", **W0, outcome="aged_out") == 14
    assert value(page, "listener_up", **W0) == 1
    assert value(page, "listener_reconnects_total", **W0) == 15
    assert value(page, "listener_crashes_total", **W0) == 18
    assert value(page, "sequence", **W0) == 16
    assert value(page, "last_batch_timestamp_seconds", **W0) == 17.5
    assert value(page, "lag_seconds_bucket", **W0, le="0.01") == 0
    assert value(page, "lag_seconds_bucket", **W0, le="0.025") == 3
    assert value(page, "lag_seconds_bucket", **W0, le="30.0") == 3
    assert value(page, "lag_seconds_bucket", **W0, le="+Inf") == 4
    assert value(page, "lag_seconds_count", **W0) == 4
    assert value(page, "lag_seconds_sum", **W0) == pytest.approx(99.06)


def test_what_the_index_did_is_on_the_page() -> None:
    """Events applied to the real index: blocks held = stored - removed - cleared, per medium."""
    index = Index(max_blocks=10)
    source = index.source("w", 0)
    source.trust.synchronised()
    source.apply([stored(*range(1, 9)), stored(21, 22, medium="cpu"), stored(8)])
    source.apply([stored(31), BlockRemoved(hashes=[1, 99], medium="gpu")])
    page = list(collector(index, fleet=True).collect())
    assert value(page, "events_total", **W0, type="stored") == 4
    assert value(page, "events_total", **W0, type="removed") == 1
    assert value(page, "blocks_stored_total", **W0) == 10
    assert value(page, "blocks_removed_total", **W0) == 1
    assert value(page, "blocks_duplicate_total", **W0) == 1
    assert value(page, "blocks_unknown_removed_total", **W0) == 1
    assert value(page, "blocks_refused_total", **W0) == 1
    assert value(page, "index_blocks", **W0, medium="gpu") == 7
    assert value(page, "index_blocks", **W0, medium="cpu") == 2
    assert value(page, "index_max_blocks") == 10
    assert value(page, "source_stale", **W0, reason="index_full") == 1
    assert value(page, "source_stale", **W0, reason="gap") == 0
    source.stats.odd_size_batches = 19
    source.clear()
    page = list(collector(index).collect())
    assert value(page, "block_size_mismatches_total", **W0) == 19
    assert value(page, "blocks_cleared_total", **W0) == 9
    assert value(page, "index_blocks", **W0, medium="gpu") == 0
    index.match([1, 2])
    page = list(collector(index).collect())
    assert value(page, "match_requests_total", outcome="miss") == 1
    assert value(page, "match_seconds_count") == 1


def test_every_field_of_audits_and_planes_is_on_the_page() -> None:
    """As for listeners."""
    audit = AuditStats("w", 0, drift_blocks=0, last_verdict_timestamp_seconds=12.5)
    audit.audits["busy"] += 5
    plane = PlaneStats("nats", 1, 2, sequence=(1_800_000_000 << 32) + 7, up=True)
    plane.dropped["failed"] += 3
    plane.buffered_batches, plane.buffer_capacity_batches = 4, 5
    plane.replays_served, plane.snapshots_served = 6, 7
    plane.requests_refused["stalled"] += 8
    plane.reconnects = 9
    page = list(collector(Index(), (), [plane], [audit]).collect())
    assert value(page, "audits_total", **W0, outcome="busy") == 5
    assert value(page, "audit_drift_blocks", **W0) == 0
    assert value(page, "audit_last_verdict_timestamp_seconds", **W0) == 12.5
    numbers = {
        "published_batches_total": 1,
        "acknowledged_batches_total": 2,
        "buffered_batches": 4,
        "buffer_capacity_batches": 5,
        "replays_served_total": 6,
        "snapshots_served_total": 7,
        "reconnects_total": 9,
        "up": 1,
        "sequence": 7,  # without the epoch, which a float could not carry
    }
    for name, number in numbers.items():
        assert value(page, f"plane_{name}", plane="nats") == number, name
    assert value(page, "plane_dropped_batches_total", plane="nats", reason="failed") == 3
    assert value(page, "plane_requests_refused_total", plane="nats", reason="stalled") == 8


def test_a_sequence_with_an_epoch_is_shown_without_it_and_an_engines_as_it_is() -> None:
    """Two of our numbers in a row would be one float."""
    ours, engines = ListenerStats("ours", 0), ListenerStats("engines", 0)
    ours.sequence = (1_800_000_000 << 32) + 41
    engines.sequence = 10 * (1 << 32)  # three years at 500 batches/s
    page = list(collector(Index(), [ours, engines]).collect())
    assert value(page, "sequence", worker="ours", engine="0") == 41
    assert value(page, "sequence", worker="engines", engine="0") == 10 * (1 << 32)


def test_listeners_of_one_rank_are_one_series() -> None:
    """Two that claim one worker id must not cost the page: counts add up, both must be up."""
    one, other = (
        ListenerStats("w", 0, batches_applied=3, connected=True, sequence=5),
        ListenerStats("w", 0, batches_applied=4, connected=False, sequence=9),
    )
    one.gaps["gap"], other.gaps["gap"] = 1, 2
    one.lag.observe(0.5)
    other.lag.observe(0.5)
    page = list(collector(Index(), [one, other]).collect())
    assert value(page, "batches_total", **W0, outcome="applied") == 7
    assert value(page, "gaps_total", **W0, kind="gap") == 3
    assert value(page, "listener_up", **W0) == 0
    assert value(page, "sequence", **W0) == 9
    assert value(page, "lag_seconds_bucket", **W0, le="0.5") == 2
    assert value(page, "lag_seconds_count", **W0) == 2


def test_a_worker_that_was_removed_is_gone_from_the_page() -> None:
    """Yesterday's workers must not look like today's."""
    index = Index()
    listeners = [ListenerStats("w", 0), ListenerStats("x", 0)]
    index.source("w", 0)
    index.source("x", 0)
    kv = collector(index, listeners, fleet=True)
    assert value(kv.collect(), "fleet_workers", health="disconnected") == 2
    index.remove_worker("w")
    del listeners[0]
    page = list(kv.collect())
    assert value(page, "fleet_workers", health="disconnected") == 1
    assert not [s for family in page for s in family.samples if s.labels.get("worker") == "w"]


def test_a_workers_health_is_its_worst_ranks() -> None:
    """Each worker counts once; unheard is not healthy."""
    index = Index()
    stale: dict[str, tuple[str, str]] = {
        "fine": ("", ""),
        "half": ("", "gap"),
        "gone": ("gap", "disconnected"),
        "lost": ("disconnected", "gap"),
        "cut": ("", ""),
    }
    for worker, reasons in stale.items():
        for rank, reason in enumerate(reasons):
            source = index.source(worker, rank)
            source.trust.synchronised()
            if reason:
                {"gap": source.trust.lost, "disconnected": source.trust.disconnected}[reason]()
    listeners = [
        ListenerStats(worker, rank, connected=(worker, rank) != ("cut", 1))
        for worker in ("fine", "half", "gone", "lost", "cut")
        for rank in (0, 1)
    ]
    listeners.append(ListenerStats("new", 0, connected=True))
    assert metrics.worker_health(index.sources(), listeners) == {
        "fine": "ok",
        "half": "stale",
        "gone": "disconnected",
        "lost": "disconnected",
        "cut": "disconnected",
        "new": "stale",
    }
    page = list(collector(index, listeners, fleet=True).collect())
    counts = [value(page, "fleet_workers", health=health) for health in metrics.WORKER_HEALTH]
    assert counts == [1, 2, 3]


def test_unique_and_held_blocks_tell_what_the_fleet_holds_twice() -> None:
    """duplicated = held - unique, never negative: both are read together."""
    index = Index()
    index.source("a", 0).apply([stored(1, 2, 3)])
    index.source("b", 0).apply([stored(2, 3, 4), stored(2, medium="cpu")])
    page = list(collector(index, fleet=True).collect())
    assert value(page, "fleet_unique_blocks") == 4
    assert value(page, "fleet_held_blocks") == 7


class Counted(Index):
    """An index that knows how often it was walked over, and how long that takes."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        super().__init__()
        self.walks = 0
        self._clock = clock
        self._seconds = seconds

    def memory_bytes(self) -> int:
        self.walks += 1
        self._clock.now += self._seconds
        return 7


@pytest.mark.parametrize(("seconds", "pause"), [(0.001, 30), (2.0, 200)])
def test_the_index_is_walked_over_rarely(seconds: float, pause: float) -> None:
    """Every half minute, however often it is scraped, and never for more than 1% of the time."""
    clock = Clock()
    index = Counted(clock, seconds)
    kv = collector(index, clock=clock)
    for _ in range(3):
        assert value(kv.collect(), "index_bytes") == 7
    assert index.walks == 1
    clock.now += pause - 0.1
    list(kv.collect())
    assert index.walks == 1
    clock.now += 0.2
    list(kv.collect())
    assert index.walks == 2


def test_a_publisher_cannot_make_series_without_end() -> None:
    """Media beyond a bound are one: a hostile publisher names as many as it likes."""
    index = Index()
    index.source("w", 0).apply([stored(n, medium=f"m{n:03}") for n in range(100)])
    (family,) = [f for f in collector(index).collect() if f.name == PREFIX + "index_blocks"]
    assert len(family.samples) == metrics.MAX_MEDIA + 1
    assert family.samples[0].labels["medium"] == "gpu"
    assert family.samples[-1].labels["medium"] == metrics.OTHER_MEDIA
    assert sum(sample.value for sample in family.samples) == 100


def test_an_outcome_that_is_not_in_a_closed_set_is_shown_all_the_same() -> None:
    """A reason that somebody forgot to declare must not vanish."""
    listener = ListenerStats("w", 0)
    listener.undecodable["new"] += 1
    page = list(collector(Index(), [listener]).collect())
    assert value(page, "events_undecodable_total", **W0, reason="new") == 1


def test_the_page_is_whole_while_the_pipeline_writes() -> None:
    """The writer goes on: no exception, and no histogram whose count is not its last bucket."""
    index = Index()
    source = index.source("w", 0)
    listener = ListenerStats("w", 0)
    kv = collector(index, [listener], fleet=True)
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            source.apply([stored(number, number + 1, medium=f"m{number % 9}")])
            source.clear(f"m{number % 9}")
            source.trust.gap_opened()
            source.trust.gap_closed()
            listener.undecodable[f"r{number % 50}"] += 1
            listener.lag.observe(number % 7)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(200):
            page = list(kv.collect())
            assert value(page, "lag_seconds_count", **W0) == value(
                page, "lag_seconds_bucket", **W0, le="+Inf"
            )
    finally:
        stop.set()
        writer.join()


def test_the_exposition_shows_all_of_it() -> None:
    """Registered as the worker does it: every family is on the page, in both formats."""
    exposition = Exposition(Metrics(CollectorRegistry()))
    exposition.register("kv", fresh())
    for accept in ("text/plain", "application/openmetrics-text; version=1.0.0"):
        body = exposition.render(accept).body.decode()
        names = {f"{PREFIX}{family.name}" for family in FAMILIES}
        for name in names:
            assert f"# TYPE {name.removesuffix('_total')}" in body, name
    families = text_string_to_metric_families(exposition.render("text/plain").body.decode())
    families_of_ours = [f for f in families if f.name.startswith(PREFIX)]
    assert {family.name.removeprefix(PREFIX) for family in families_of_ours if family.samples} > {
        "lag_seconds",
        "batches",
        "source_stale",
        "fleet_workers",
    }
