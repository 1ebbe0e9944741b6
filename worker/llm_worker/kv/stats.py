"""What the KV-event pipeline counts, as plain numbers.

Each object has one writer thread and is read by whoever renders a page; a read may be one event
behind, never torn. Plain integers, because a step of the pipeline costs microseconds and a
prometheus_client counter costs half of one. ``kv/metrics.py`` turns them into families.
Imports nothing of ours.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field

# Event time → indexed: milliseconds on a healthy engine, seconds behind a backlog.
LAG_SECONDS_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
MATCH_SECONDS_BUCKETS = (
    0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25,
)  # fmt: skip

# Why a source's blocks cannot be trusted. Closed sets: metric labels.
STALE_REASONS = (
    "unsynchronised",  # nothing was received yet: what the engine holds is unknown
    "missed_first",  # the first batch seen was not the engine's first, and replay did not have it
    "gap",  # batches in between are gone, and replay did not have them
    "undecodable",  # a batch or event was dropped that may have changed blocks
    "index_full",  # the index's bound was reached and stores were refused
    "duplicate_worker",  # two publishers claim to be this worker, or another rank's does
    "disconnected",  # no publisher at the other end
    "audit",  # the auditor found drift
    "other_media",  # a clear did not say whether it meant more than the GPU's blocks
    "upstream",  # the plane says that the worker's own index, or what it sends, cannot be trusted
)
UNDECODABLE_REASONS = (
    "frames",  # not [topic, 8-byte sequence, payload]
    "msgpack",  # the payload is not MessagePack, or truncated
    "batch",  # MessagePack, but not [timestamp, events, rank?]
    "event",  # one event is no array or map with a known shape
    "hash",  # a block hash is neither integer nor bytes
    "too_large",  # beyond the size that is accepted
)
GAP_KINDS = ("initial", "gap", "restart")
REPLAY_OUTCOMES = ("complete", "truncated", "aged_out", "timeout", "unavailable")

PLANE_DROP_REASONS = (
    "buffer_full",  # the plane was away for longer than the buffer lasts
    "too_large",  # beyond what the plane carries
    "subscriber_full",  # ZMQ: a subscriber's queue ran full; only its first batch is counted
    "failed",  # the transport refused it
)
PLANE_REFUSAL_REASONS = (
    "malformed",  # no request
    "too_many",  # at once
    "stalled",  # the receiver took nothing of the answer for seconds
    "failed",  # the answer could not be made, or not to its end
)


class Histogram:
    """Observations by upper bound; ``counts[-1]`` is +Inf. Not cumulative."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Add ``count`` observations of ``value``."""
        self.counts[bisect_left(self.bounds, value)] += count
        self.total += value * count


@dataclass(slots=True)
class ListenerStats:
    """One listener, which is one rank of one worker."""

    worker: str
    rank: int
    batches_applied: int = 0
    batches_duplicate: int = 0  # seen before: dropped, nothing is lost
    batches_late: int = 0  # arrived out of order: held until their turn, then applied
    batches_replayed: int = 0  # got by replay and applied
    batches_lost: int = 0  # sequence numbers that were never applied
    batches_dropped: int = 0  # received and not kept: in the next replay
    queue_batches: int = 0  # held back behind a gap
    queue_capacity_batches: int = 0
    undecodable: Counter[str] = field(default_factory=Counter)  # by UNDECODABLE_REASONS
    unknown_events: int = 0  # of a type that this release does not know
    gaps: Counter[str] = field(default_factory=Counter)  # by GAP_KINDS
    replays: Counter[str] = field(default_factory=Counter)  # by REPLAY_OUTCOMES
    connected: bool = False
    reconnects: int = 0
    sequence: int | None = None  # the last one applied
    last_batch_timestamp_seconds: float | None = None  # the engine's clock
    lag: Histogram = field(default_factory=lambda: Histogram(LAG_SECONDS_BUCKETS))
    crashes: int = 0  # batches or sockets that broke the listener, which went on
    part: str | None = None  # which publisher of the rank, beside its engine's; see `merge`


@dataclass(slots=True)
class SourceStats:
    """What one rank of one worker did to the index."""

    stored_events: int = 0
    stored_blocks: int = 0
    removed_events: int = 0
    removed_blocks: int = 0
    cleared_events: int = 0
    duplicate_blocks: int = 0  # stored while held: counted, not stored twice
    unknown_removed_blocks: int = 0  # removed without being held
    refused_blocks: int = 0  # not stored: the index's bound was reached, or a name is too long
    duplicate_removed_blocks: int = 0  # removed while another copy was held: still held
    cleared_blocks: int = 0  # held when a clear came; held = stored - removed - cleared
    odd_size_batches: int = 0  # taken while blocks had another size than the engine says


@dataclass(slots=True)
class MatchStats:
    """Queries of the index."""

    requests: Counter[str] = field(default_factory=Counter)  # by outcome: hit, miss, invalid
    seconds: Histogram = field(default_factory=lambda: Histogram(MATCH_SECONDS_BUCKETS))


MENDED = ("missing", "surplus")


@dataclass(slots=True)
class AuditStats:
    """Comparisons of one rank's index with its engine."""

    worker: str
    rank: int
    # by outcome: equal, drift, busy (the engine was not quiet: no verdict), failed
    audits: Counter[str] = field(default_factory=Counter)
    drift_blocks: int | None = None  # of the last verdict: missing + surplus
    mended_blocks: Counter[str] = field(default_factory=Counter)  # by MENDED: of what there was
    last_verdict_timestamp_seconds: float | None = None


@dataclass(slots=True)
class MergeStats:
    """What merging several publishers of one rank kept back. In blocks."""

    worker: str = ""
    rank: int = 0
    stored_elsewhere_blocks: int = 0  # not told: another source, or this one, has it already
    held_elsewhere_blocks: int = 0  # removal not told: another source, or a copy, is left
    unknown_removed_blocks: int = 0  # removed by a source that never stored it
    refused_blocks: int = 0  # not taken in: the index has no room for more


@dataclass(slots=True)
class PlaneStats:
    """One plane that records go out on."""

    plane: str  # zmq, nats
    published_batches: int = 0  # handed to the transport
    acknowledged_batches: int = 0  # stored by the other side; NATS only
    dropped: Counter[str] = field(default_factory=Counter)  # by PLANE_DROP_REASONS
    buffered_batches: int = 0
    buffer_capacity_batches: int = 0
    sequence: int | None = None  # the last one given
    replays_served: int = 0
    snapshots_served: int = 0
    # Without an answer, or without its end; by PLANE_REFUSAL_REASONS
    requests_refused: Counter[str] = field(default_factory=Counter)
    reconnects: int = 0
    up: bool = False
