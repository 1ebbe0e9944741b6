"""The KV pipeline's counters as metric families, for the worker and for the fleet service.

Owns names, labels and HELP texts, and how rarely the index is asked for what costs it a walk over
all blocks. Never counts anything itself: it reads the plain numbers of `stats` and the sources of
`index` while their writer goes on, so one page may be an event behind, never torn.

A closed label set is there with zeros from the first page on, so that ``rate()`` sees the first
failure; a gauge whose value is not known has no sample. No series is made for when a counter was
created.
Long: half of it is the table of families, which the other half fills in the same order.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.utils import floatToGoString

from llm_worker.kv.plane.topics import COUNTER_MASK
from llm_worker.kv.stats import (
    GAP_KINDS,
    MENDED,
    PLANE_DROP_REASONS,
    PLANE_REFUSAL_REASONS,
    REPLAY_OUTCOMES,
    STALE_REASONS,
    UNDECODABLE_REASONS,
    AuditStats,
    Histogram,
    ListenerStats,
    MergeStats,
    PlaneStats,
)

if TYPE_CHECKING:
    from llm_worker.kv.index.index import Index
    from llm_worker.kv.index.source import Source

PREFIX = "llm_worker_kv_"

BATCH_OUTCOMES = ("applied", "duplicate", "late", "replayed", "lost", "dropped")
EVENT_TYPES = ("stored", "removed", "cleared", "unknown")
MATCH_OUTCOMES = ("hit", "miss", "invalid")
AUDIT_OUTCOMES = ("equal", "drift", "busy", "failed")
WORKER_HEALTH = ("ok", "stale", "disconnected")

# A publisher chooses its media; a hostile one shall not choose how many series we have.
MAX_MEDIA = 16
OTHER_MEDIA = "other"

# What walks over all blocks is asked for this often, and never for more than 1% of the time.
WALK_SECONDS = 30.0
WALK_SHARE = 0.01

# Our planes' sequences have the start of their process in the high half: far above what a float
# tells apart, and above any number an engine reaches.
_EPOCHS_FROM = 1 << 53


class Family(NamedTuple):
    """One family: its name without prefix, with ``_total`` where it is a counter."""

    name: str
    type: str  # counter, gauge, histogram
    labels: tuple[str, ...]
    documentation: str


_RANK = ("worker", "engine")

LISTENER_FAMILIES = (
    Family(
        "batches_total",
        "counter",
        (*_RANK, "outcome"),
        "Batches of KV events, by what became of them. applied: indexed in order as they came; "
        "late: arrived out of order, held and indexed in their turn; replayed: got from the "
        "publisher's replay and indexed; duplicate: seen before, nothing is lost; "
        "dropped: received and not kept, because the queue was full or the connection is a new "
        "one, so the next replay has to bring them; "
        "lost: one per sequence number that was never indexed.",
    ),
    Family(
        "events_undecodable_total",
        "counter",
        (*_RANK, "reason"),
        "Times something that should have been KV events could not be decoded and was left out: "
        "a message, a batch or one event of a batch, as the reason says.",
    ),
    Family(
        "gaps_total",
        "counter",
        (*_RANK, "kind"),
        "Times the sequence numbers of a stream did not go on by one. initial: the first batch "
        "seen was not the publisher's first; gap: numbers missing in between; restart: the "
        "numbers began anew, and so did the index of this source.",
    ),
    Family(
        "replays_total",
        "counter",
        (*_RANK, "outcome"),
        "Requests to the publisher for batches that were missed, by how they ended. Only complete "
        "brought all of them.",
    ),
    Family(
        "queue_batches",
        "gauge",
        _RANK,
        "Batches received and held back until what is missing before them was replayed.",
    ),
    Family("queue_capacity_batches", "gauge", _RANK, "Most batches that are held back."),
    Family(
        "listener_up",
        "gauge",
        _RANK,
        "1 while the connection to the publisher stands, 0 while it does not.",
    ),
    Family(
        "listener_reconnects_total",
        "counter",
        _RANK,
        "Connections to the publisher made after the first.",
    ),
    Family(
        "listener_crashes_total",
        "counter",
        _RANK,
        "Batches, or states of a socket, that broke the listener; it left them out and went on.",
    ),
    Family(
        "sequence",
        "gauge",
        _RANK,
        "Sequence number of the last batch indexed; of one of our planes the part that counts "
        "from the start of its process. Absent before the first.",
    ),
    Family(
        "last_batch_timestamp_seconds",
        "gauge",
        _RANK,
        "When the last batch indexed was made, by the publisher's clock (Unix time). "
        "Absent before the first.",
    ),
    Family(
        "lag_seconds",
        "histogram",
        _RANK,
        "From the making of a batch, by the publisher's clock, to its being indexed. Only batches "
        "that were next in turn when they arrived; those of one burst count with its oldest's age.",
    ),
)
SOURCE_FAMILIES = (
    Family(
        "events_total",
        "counter",
        (*_RANK, "type"),
        "KV events of this rank, by type. unknown: of a type this release does not know, skipped.",
    ),
    Family(
        "blocks_stored_total",
        "counter",
        _RANK,
        "Blocks added to the index. index_blocks = stored - removed - cleared.",
    ),
    Family("blocks_removed_total", "counter", _RANK, "Blocks taken out of the index one by one."),
    Family(
        "blocks_cleared_total",
        "counter",
        _RANK,
        "Blocks that the index held when all of them, or all of a medium, were cleared.",
    ),
    Family(
        "blocks_duplicate_total",
        "counter",
        _RANK,
        "Blocks said to be stored while the rank held them already: vLLM may keep one content in "
        "several physical blocks. A block leaves the index with its last copy.",
    ),
    Family(
        "blocks_unknown_removed_total",
        "counter",
        _RANK,
        "Blocks said to be removed that the index did not have for this rank.",
    ),
    Family(
        "blocks_refused_total",
        "counter",
        _RANK,
        "Blocks said to be stored that the index did not take because its bound was reached.",
    ),
    Family(
        "block_size_mismatches_total",
        "counter",
        _RANK,
        "Batches that came while blocks of the GPU had another size than the engine says, or than "
        "those before them: look-ups by tokens miss them. Only full attention, and only where "
        "there is one KV-cache group: others' sizes may differ.",
    ),
    Family(
        "source_stale",
        "gauge",
        (*_RANK, "reason"),
        "1 while the index of this rank cannot be trusted for this reason, 0 otherwise.",
    ),
    Family(
        "index_blocks",
        "gauge",
        (*_RANK, "medium"),
        "Distinct blocks the index holds for this rank, by medium.",
    ),
)
INDEX_FAMILIES = (
    Family(
        "index_bytes",
        "gauge",
        (),
        "Memory of the index and of what merges a connector's blocks into it, estimated at most "
        "every half minute.",
    ),
    Family(
        "index_max_blocks",
        "gauge",
        (),
        "Most blocks the index holds, over all ranks and media. Absent where unbounded.",
    ),
    Family(
        "match_requests_total",
        "counter",
        ("outcome",),
        "Queries for the longest known prefix. hit: somebody holds its first block; miss: nobody "
        "does; invalid: refused.",
    ),
    Family(
        "match_seconds", "histogram", (), "Answering one such query, without the HTTP around it."
    ),
)
AUDIT_FAMILIES = (
    Family(
        "audits_total",
        "counter",
        (*_RANK, "outcome"),
        "Comparisons of the index with the engine. equal, drift: a verdict; busy: the engine did "
        "not stand still, no verdict; failed: the engine could not be asked.",
    ),
    Family(
        "audit_drift_blocks",
        "gauge",
        _RANK,
        "Blocks missing in the index plus blocks too many, at the last verdict. Absent before it.",
    ),
    Family(
        "audit_last_verdict_timestamp_seconds",
        "gauge",
        _RANK,
        "When the index was last compared with the engine and found equal or different (Unix "
        "time). Absent before.",
    ),
    Family(
        "audit_mended_blocks_total",
        "counter",
        (*_RANK, "direction"),
        "Blocks by which the index differed from an engine that stood still, and which were taken "
        "over from it: missing ones came back without parent and adapter, surplus ones went.",
    ),
)
PLANE_FAMILIES = (
    Family(
        "plane_up",
        "gauge",
        ("plane",),
        "1 while records can go out on the plane (zmq: bound; nats: connected, and what was sent "
        "last is stored), 0 otherwise.",
    ),
    Family(
        "plane_sequence",
        "gauge",
        ("plane",),
        "Sequence number of the last batch that was given to the plane, counted from the start of "
        "the process. Absent before the first.",
    ),
    Family(
        "plane_published_batches_total",
        "counter",
        ("plane",),
        "Batches handed to the plane's transport.",
    ),
    Family(
        "plane_acknowledged_batches_total",
        "counter",
        ("plane",),
        "Batches the other side says it has stored. Stays 0 on zmq, which does not say.",
    ),
    Family(
        "plane_buffered_batches",
        "gauge",
        ("plane",),
        "Batches kept. nats: not yet acknowledged, so near 0 while all is well; zmq: for replay, "
        "so full while all is well.",
    ),
    Family("plane_buffer_capacity_batches", "gauge", ("plane",), "Most batches that are kept."),
    Family(
        "plane_dropped_batches_total",
        "counter",
        ("plane", "reason"),
        "Batches that did not go out, or not to every receiver, which then sees a gap. "
        "subscriber_full: once for each time a receiver falls behind.",
    ),
    Family(
        "plane_replays_served_total",
        "counter",
        ("plane",),
        "Requests of receivers for batches they had missed.",
    ),
    Family(
        "plane_snapshots_served_total",
        "counter",
        ("plane",),
        "Requests of receivers for all blocks that the index holds.",
    ),
    Family(
        "plane_requests_refused_total",
        "counter",
        ("plane", "reason"),
        "Requests of receivers that got no answer, or not all of it. malformed: no request; "
        "too_many: at once; stalled: the receiver took nothing of the answer for seconds; failed: "
        "the answer broke.",
    ),
    Family(
        "plane_reconnects_total",
        "counter",
        ("plane",),
        "Connections of the plane made after its first.",
    ),
)
FLEET_FAMILIES = (
    Family(
        "fleet_unique_blocks",
        "gauge",
        (),
        "Distinct blocks over all workers, ranks and media; counted at most every half minute.",
    ),
    Family(
        "fleet_held_blocks",
        "gauge",
        (),
        "Blocks over all workers, ranks and media, each copy for itself; counted together with "
        "the distinct ones.",
    ),
    Family(
        "fleet_workers",
        "gauge",
        ("health",),
        "Workers by health. disconnected: a listener of the worker is not connected; stale: all "
        "are, but blocks of a rank cannot be trusted; ok: neither.",
    ),
    Family(
        "fleet_round_failures_total",
        "counter",
        (),
        "Rounds through the fleet that broke, and addresses within a round that could not be "
        "opened or followed; each is tried again a second later.",
    ),
)
MERGE_FAMILIES = (
    Family(
        "merge_withheld_blocks_total",
        "counter",
        (*_RANK, "reason"),
        "Blocks of which merging an engine's events with its connector's told nothing. "
        "stored_elsewhere: stored, and held already; held_elsewhere: removed, and still held; "
        "unknown_removed: removed by a publisher that never stored it.",
    ),
)
PIPELINE_FAMILIES = (
    Family(
        "pipeline_crashes_total",
        "counter",
        (),
        "Times the thread of the KV pipeline broke and was started again.",
    ),
)
# In the order of the page. The last group is the fleet service's only.
FAMILIES = (
    *LISTENER_FAMILIES,
    *SOURCE_FAMILIES,
    *INDEX_FAMILIES,
    *AUDIT_FAMILIES,
    *PLANE_FAMILIES,
    *MERGE_FAMILIES,
    *PIPELINE_FAMILIES,
    *FLEET_FAMILIES,
)

Key = tuple[str, str]  # worker, engine
N = TypeVar("N", int, float)


def _none() -> tuple[()]:
    return ()


class KvCollector:
    """All families of one process's KV pipeline; register it with the exposition.

    The callables are asked on every page, so that what comes and goes (a fleet's workers) does so
    on the page as well. Two listeners that claim one id are one series: counts add up, it is up
    when both are. A connector's is shown as worker ``NAME/connector``.
    """

    def __init__(
        self,
        index: Index,
        *,
        listeners: Callable[[], Iterable[ListenerStats]],
        planes: Callable[[], Iterable[PlaneStats]] = _none,
        audits: Callable[[], Iterable[AuditStats]] = _none,
        merges: Callable[[], Iterable[MergeStats]] = _none,
        crashes: Callable[[], int] = int,
        fleet: bool = False,
        round_failures: Callable[[], int] = int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``fleet`` adds what only the service tells, ``round_failures`` among it."""
        self._index = index
        self._listeners = listeners
        self._planes = planes
        self._audits = audits
        self._merges = merges
        self._crashes = crashes
        self._fleet = fleet
        self._round_failures = round_failures
        self._clock = clock
        self._walk_due = float("-inf")
        self._walked: tuple[int, int, int] = (0, 0, 0)  # bytes, unique, held

    def collect(self) -> Iterator[Metric]:
        """Every family once. From any thread, one at a time."""
        listeners = list(self._listeners())
        sources = list(self._index.sources())
        ranks = _by_rank(listeners)
        yield from _listener_families(ranks)
        yield from _source_families(sources, listeners)
        self._walk()
        yield from self._index_families()
        yield from _audit_families(self._audits())
        yield from _plane_families(self._planes())
        yield from _merge_families(self._merges())
        page = _Page(PIPELINE_FAMILIES)
        page.counter("pipeline_crashes_total", (), self._crashes())
        yield from page
        if self._fleet:
            yield from self._fleet_families(sources, listeners)

    def _walk(self) -> None:
        """Ask for what costs a walk over all blocks, if it is time."""
        began = self._clock()
        if began < self._walk_due:
            return
        unique = held = 0
        if self._fleet:
            # The writer may come in between, and duplicates must not be negative.
            unique = self._index.unique_blocks()
            held = max(unique, self._index.held_blocks())
        self._walked = (self._index.memory_bytes(), unique, held)
        ended = self._clock()
        self._walk_due = ended + max(WALK_SECONDS, (ended - began) / WALK_SHARE)

    def _index_families(self) -> Iterator[Metric]:
        page = _Page(INDEX_FAMILIES)
        page.gauge("index_bytes", (), self._walked[0])
        page.gauge("index_max_blocks", (), self._index.max_blocks)
        stats = self._index.match_stats
        page.counts("match_requests_total", (), MATCH_OUTCOMES, stats.requests)
        page.histogram("match_seconds", (), [stats.seconds])
        yield from page

    def _fleet_families(
        self, sources: Iterable[Source], listeners: Iterable[ListenerStats]
    ) -> Iterator[Metric]:
        page = _Page(FLEET_FAMILIES)
        page.gauge("fleet_unique_blocks", (), self._walked[1])
        page.gauge("fleet_held_blocks", (), self._walked[2])
        health = Counter(worker_health(sources, listeners).values())
        for name in WORKER_HEALTH:
            page.gauge("fleet_workers", (name,), health[name])
        page.counter("fleet_round_failures_total", (), self._round_failures())
        yield from page


def _merge_families(merges: Iterable[MergeStats]) -> Iterator[Metric]:
    page = _Page(MERGE_FAMILIES)
    for merge in merges:
        for reason in ("stored_elsewhere", "held_elsewhere", "unknown_removed"):
            labels = (merge.worker, str(merge.rank), reason)
            count: int = getattr(merge, f"{reason}_blocks")
            page.counter("merge_withheld_blocks_total", labels, count)
    yield from page


def worker_health(sources: Iterable[Source], listeners: Iterable[ListenerStats]) -> dict[str, str]:
    """Return each worker's health, one of ``WORKER_HEALTH``: its worst rank's."""
    health = {}
    for source in sources:
        if "disconnected" in source.stale:
            health[source.worker] = "disconnected"
        elif source.stale and health.get(source.worker) != "disconnected":
            health[source.worker] = "stale"
        else:
            health.setdefault(source.worker, "ok")
    for listener in listeners:
        if not listener.connected:
            health[listener.worker] = "disconnected"
        else:
            health.setdefault(listener.worker, "stale")  # listens, and has no blocks yet
    return health


class _Page:
    """Families in the making, in the order of their declaration."""

    def __init__(self, families: Iterable[Family]) -> None:
        self._families: dict[str, Metric] = {}
        for family in families:
            name = PREFIX + family.name.removesuffix("_total")
            make = {
                "counter": CounterMetricFamily,
                "gauge": GaugeMetricFamily,
                "histogram": HistogramMetricFamily,
            }[family.type]
            self._families[family.name] = make(name, family.documentation, labels=family.labels)

    def __iter__(self) -> Iterator[Metric]:
        return iter(self._families.values())

    def gauge(self, name: str, labels: tuple[str, ...], value: float | None) -> None:
        """Add a sample of a gauge or counter, unless its value is not known."""
        if value is not None:
            self._families[name].add_metric(labels, value)  # type: ignore[attr-defined]

    counter = gauge

    def counts(
        self,
        name: str,
        labels: tuple[str, ...],
        known: Iterable[str],
        counts: Mapping[str, float],
    ) -> None:
        """Add a sample for every known value of the last label, and for what else was counted."""
        for value, count in (dict.fromkeys(known, 0) | dict(counts)).items():
            self.counter(name, (*labels, value), count)

    def histogram(self, name: str, labels: tuple[str, ...], parts: list[Histogram]) -> None:
        """Add one histogram: the sum of those of equal bounds."""
        total = sum(part.total for part in parts)
        # They only grow: whatever the writer adds in between, this is a histogram.
        heights = accumulate(map(sum, zip(*(part.counts for part in parts), strict=True)))
        bounds = [*map(floatToGoString, parts[0].bounds), "+Inf"]
        buckets = list(zip(bounds, heights, strict=True))
        self._families[name].add_metric(labels, buckets, total)  # type: ignore[attr-defined]


def _by_rank(listeners: Iterable[ListenerStats]) -> dict[Key, list[ListenerStats]]:
    ranks: dict[Key, list[ListenerStats]] = {}
    for stats in listeners:
        # A connector's own stream has its own gaps and is shown beside its engine's.
        worker = stats.worker if stats.part is None else f"{stats.worker}/{stats.part}"
        ranks.setdefault((worker, str(stats.rank)), []).append(stats)
    return ranks


def _listener_families(ranks: Mapping[Key, list[ListenerStats]]) -> Iterator[Metric]:
    page = _Page(LISTENER_FAMILIES)
    for key, parts in ranks.items():
        batches = {
            outcome: sum(getattr(part, f"batches_{outcome}") for part in parts)
            for outcome in BATCH_OUTCOMES
        }
        page.counts("batches_total", key, BATCH_OUTCOMES, batches)
        page.counts(
            "events_undecodable_total",
            key,
            UNDECODABLE_REASONS,
            _added(part.undecodable for part in parts),
        )
        page.counts("gaps_total", key, GAP_KINDS, _added(part.gaps for part in parts))
        page.counts("replays_total", key, REPLAY_OUTCOMES, _added(part.replays for part in parts))
        page.gauge("queue_batches", key, sum(part.queue_batches for part in parts))
        page.gauge(
            "queue_capacity_batches", key, sum(part.queue_capacity_batches for part in parts)
        )
        page.gauge("listener_up", key, int(all(part.connected for part in parts)))
        page.counter("listener_reconnects_total", key, sum(part.reconnects for part in parts))
        page.counter("listener_crashes_total", key, sum(part.crashes for part in parts))
        page.gauge("sequence", key, _counter_part(_greatest(part.sequence for part in parts)))
        page.gauge(
            "last_batch_timestamp_seconds",
            key,
            _greatest(part.last_batch_timestamp_seconds for part in parts),
        )
        page.histogram("lag_seconds", key, [part.lag for part in parts])
    yield from page


def _source_families(
    sources: Iterable[Source], listeners: Iterable[ListenerStats]
) -> Iterator[Metric]:
    page = _Page(SOURCE_FAMILIES)
    unknown: Counter[tuple[str, int]] = Counter()
    for part in listeners:
        unknown[part.worker, part.rank] += part.unknown_events
    for source in sources:
        key, stats = (source.worker, str(source.rank)), source.stats
        events = {
            "stored": stats.stored_events,
            "removed": stats.removed_events,
            "cleared": stats.cleared_events,
            "unknown": unknown[source.worker, source.rank],
        }
        page.counts("events_total", key, EVENT_TYPES, events)
        page.counter("blocks_stored_total", key, stats.stored_blocks)
        page.counter("blocks_removed_total", key, stats.removed_blocks)
        page.counter("blocks_cleared_total", key, stats.cleared_blocks)
        page.counter("blocks_duplicate_total", key, stats.duplicate_blocks)
        page.counter("blocks_unknown_removed_total", key, stats.unknown_removed_blocks)
        page.counter("blocks_refused_total", key, stats.refused_blocks)
        page.counter("block_size_mismatches_total", key, stats.odd_size_batches)
        for reason in STALE_REASONS:
            page.gauge("source_stale", (*key, reason), int(reason in source.stale))
        for medium, blocks in _media(source.blocks()).items():
            page.gauge("index_blocks", (*key, medium), blocks)
    yield from page


def _audit_families(audits: Iterable[AuditStats]) -> Iterator[Metric]:
    page = _Page(AUDIT_FAMILIES)
    for stats in audits:
        key = (stats.worker, str(stats.rank))
        page.counts("audits_total", key, AUDIT_OUTCOMES, stats.audits)
        page.gauge("audit_drift_blocks", key, stats.drift_blocks)
        page.gauge(
            "audit_last_verdict_timestamp_seconds", key, stats.last_verdict_timestamp_seconds
        )
        page.counts("audit_mended_blocks_total", key, MENDED, stats.mended_blocks)
    yield from page


def _plane_families(planes: Iterable[PlaneStats]) -> Iterator[Metric]:
    page = _Page(PLANE_FAMILIES)
    for stats in planes:
        key = (stats.plane,)
        page.gauge("plane_up", key, int(stats.up))
        page.gauge("plane_sequence", key, _counter_part(stats.sequence))
        page.counter("plane_published_batches_total", key, stats.published_batches)
        page.counter("plane_acknowledged_batches_total", key, stats.acknowledged_batches)
        page.gauge("plane_buffered_batches", key, stats.buffered_batches)
        page.gauge("plane_buffer_capacity_batches", key, stats.buffer_capacity_batches)
        page.counts("plane_dropped_batches_total", key, PLANE_DROP_REASONS, stats.dropped)
        page.counter("plane_replays_served_total", key, stats.replays_served)
        page.counter("plane_snapshots_served_total", key, stats.snapshots_served)
        page.counts(
            "plane_requests_refused_total", key, PLANE_REFUSAL_REASONS, stats.requests_refused
        )
        page.counter("plane_reconnects_total", key, stats.reconnects)
    yield from page


def _added(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for part in counts:
        total.update(dict(part))
    return total


def _greatest(values: Iterable[N | None]) -> N | None:
    return max((value for value in values if value is not None), default=None)


def _counter_part(sequence: int | None) -> int | None:
    if sequence is None or sequence < _EPOCHS_FROM:
        return sequence
    return sequence & COUNTER_MASK


def _media(blocks: Mapping[str, int]) -> dict[str, int]:
    """Blocks by medium: the GPU's always, what is beyond ``MAX_MEDIA`` as ``other``."""
    media = {"gpu": 0}
    for medium, count in sorted(blocks.items()):
        shown = medium if medium in media or len(media) < MAX_MEDIA else OTHER_MEDIA
        media[shown] = media.get(shown, 0) + count
    return media
