"""The rows about events on their way in: do they arrive, is one missing, how late are they?"""

from __future__ import annotations

from .. import units
from ..boards import Section
from ..panels import (
    BAD_ABOVE_ZERO,
    GREEN,
    NO_TRAFFIC,
    RED,
    YELLOW,
    Reading,
    heatmap,
    query,
    stat,
    time_series,
)
from ..promql import aggregate, buckets, quantile, rate, ratio, series
from .names import BY_RANK, NO_EVENTS, PREFIX, RANK, RANK_LEGEND

BATCHES = f"{PREFIX}batches_total"
LAG = f"{PREFIX}lag_seconds"


def in_range(metric: str, *matchers: str) -> str:
    """Return how much a counter grew in the chosen time range."""
    return f"sum (increase({series(metric, *matchers, scope=RANK)}[$__range]))"


arrival = Section(
    "Do KV events arrive?",
    [
        stat(
            "Listeners down",
            Reading(
                "Ranks whose publisher of KV events is not connected.",
                "What such a rank does to its cache is not seen.",
                "0; an engine that loads has no publisher yet.",
                "See which one in the table of ranks; runbook KvListenerDown.",
            ),
            f"count({series(f'{PREFIX}listener_up', scope=RANK)})"
            f" - sum({series(f'{PREFIX}listener_up', scope=RANK)})",
            units.SHORT,
            size=(4, 4),
            steps=BAD_ABOVE_ZERO,
            no_value=NO_EVENTS,
        ),
        stat(
            "Stale ranks",
            Reading(
                "Ranks whose blocks in the index cannot be trusted, for whatever reason.",
                "A router that believes them sends requests to the wrong worker.",
                "0; a rank that was never heard counts until its first events.",
                "The reason is in the table of stale ranks, and each has a runbook.",
            ),
            f"sum({aggregate('max', f'{PREFIX}source_stale', by=BY_RANK, scope=RANK)})",
            units.SHORT,
            size=(4, 4),
            steps=BAD_ABOVE_ZERO,
            no_value=NO_EVENTS,
        ),
        stat(
            "Batches lost, in range",
            Reading(
                "Batches of events that were neither received nor replayed, in the chosen range.",
                "Each leaves the index wrong until the rank clears its cache or is read anew.",
                "0.",
                "How the replays ended, below, says why; runbook KvGapNotHealed.",
            ),
            in_range(BATCHES, 'outcome="lost"'),
            units.SHORT,
            size=(4, 4),
            steps=BAD_ABOVE_ZERO,
            instant=True,
            decimals=0,
            no_value=NO_EVENTS,
        ),
        stat(
            "Undecodable, in range",
            Reading(
                "Messages, batches and events that could not be read, in the chosen range.",
                "A vLLM release whose events look different starts like this.",
                "0.",
                "By reason below; runbook KvEventsUndecodable.",
            ),
            in_range(f"{PREFIX}events_undecodable_total"),
            units.SHORT,
            size=(4, 4),
            steps=BAD_ABOVE_ZERO,
            instant=True,
            decimals=0,
            no_value=NO_EVENTS,
        ),
        stat(
            "Lag p99, now",
            Reading(
                "99 of 100 batches were indexed within this time of being made.",
                "How old the index's picture is.",
                "Below 50 ms in a worker, and below 1 s in a fleet index.",
                "Above 1 s: runbook KvLagHigh.",
            ),
            quantile(0.99, LAG, by=("job",), scope=RANK),
            units.SECONDS,
            size=(4, 4),
            legend="{{job}}",
            steps=((GREEN, None), (YELLOW, 0.25), (RED, 1)),
            no_value=NO_TRAFFIC,
        ),
        stat(
            "Blocks indexed",
            Reading(
                "Blocks in the index, over all ranks and media, of workers and of the fleet index.",
                "The size of what is known.",
                "About the engines' capacity once they are warm.",
                "Far below under load: blocks are not full, or events are missing.",
            ),
            aggregate("sum", f"{PREFIX}index_blocks", by=("job",), scope=RANK),
            units.SHORT,
            size=(4, 4),
            legend="{{job}}",
            no_value=NO_EVENTS,
        ),
        time_series(
            "Events, by type",
            Reading(
                "Blocks stored, removed, all cleared, and events of a type that we do not know.",
                "What the engines' caches do.",
                "Stored and removed follow the load; cleared is rare; unknown is 0.",
                "Nothing under load: runbook KvEventsSilent. Cleared again and again: who resets "
                "the cache?",
            ),
            [
                query(
                    rate(f"{PREFIX}events_total", by=("job", "type"), scope=RANK),
                    "{{job}} {{type}}",
                )
            ],
            units.EVENTS_PER_SECOND,
            no_value=NO_EVENTS,
        ),
        time_series(
            "Batches, by outcome",
            Reading(
                "What became of each batch: applied in order, late or replayed and applied, "
                "duplicate, dropped and asked for again, lost.",
                "A batch is a step of an engine; all others than applied are work or damage.",
                "applied alone. duplicate is harmless.",
                "replayed grows: the reader falls behind. dropped: runbook KvQueueDropping. lost: "
                "runbook KvBatchesLost.",
            ),
            [query(rate(BATCHES, by=("job", "outcome"), scope=RANK), "{{job}} {{outcome}}")],
            units.BATCHES_PER_SECOND,
            no_value=NO_EVENTS,
        ),
        time_series(
            "Blocks stored, removed and cleared",
            Reading(
                "Blocks that came into the index and that left it.",
                "Their difference is how the index grows.",
                "The two alike once the caches are full.",
                "cleared in heaps: a worker restarted, slept or reset its cache.",
            ),
            [
                query(
                    rate(f"{PREFIX}blocks_{what}_total", by=("job",), scope=RANK),
                    f"{{{{job}}}} {what}",
                )
                for what in ("stored", "removed", "cleared")
            ],
            units.BLOCKS_PER_SECOND,
            no_value=NO_EVENTS,
        ),
    ],
)

missing = Section(
    "Is anything missing?",
    [
        time_series(
            "Gaps, by kind",
            Reading(
                "Times a stream's numbers did not go on by one: its start was missed, there was a "
                "hole, or its publisher began anew.",
                "Each is a moment at which the index could have gone wrong.",
                "restart once for each restart of an engine; else 0.",
                "gap grows: the reader is too slow, or the network breaks off.",
            ),
            [
                query(
                    rate(f"{PREFIX}gaps_total", by=("job", "kind"), scope=RANK), "{{job}} {{kind}}"
                )
            ],
            units.PER_SECOND,
            no_value=NO_EVENTS,
        ),
        time_series(
            "Replays, by outcome",
            Reading(
                "Requests to publishers for what was missed, by how they ended.",
                "Only complete heals a gap.",
                "complete alone, and rarely.",
                "aged_out: raise `buffer_steps`. timeout, unavailable: check the replay endpoint. "
                "truncated: the publisher's high-water mark is too low.",
            ),
            [
                query(
                    rate(f"{PREFIX}replays_total", by=("job", "outcome"), scope=RANK),
                    "{{job}} {{outcome}}",
                )
            ],
            units.PER_SECOND,
            no_value=NO_EVENTS,
        ),
        time_series(
            "Undecodable, by reason",
            Reading(
                "What could not be read, by the step at which it failed.",
                "Tells a strange sender (frames, msgpack) from a new vLLM (batch, event, hash).",
                "0.",
                "Runbook KvEventsUndecodable.",
            ),
            [
                query(
                    rate(f"{PREFIX}events_undecodable_total", by=("job", "reason"), scope=RANK),
                    "{{job}} {{reason}}",
                )
            ],
            units.EVENTS_PER_SECOND,
            no_value=NO_EVENTS,
        ),
        time_series(
            "Held back behind a gap",
            Reading(
                "Share of the places for batches that wait for what is missing before them.",
                "Full, it drops, and the next replay has more to bring.",
                "0.",
                "Above 50 % for minutes: runbook KvQueueBacklog.",
            ),
            [
                query(
                    f"{aggregate('sum', f'{PREFIX}queue_batches', by=BY_RANK, scope=RANK)} / "
                    + aggregate("sum", f"{PREFIX}queue_capacity_batches", by=BY_RANK, scope=RANK),
                    RANK_LEGEND,
                )
            ],
            units.RATIO,
            maximum=1,
            no_value=NO_EVENTS,
        ),
        time_series(
            "Blocks that do not add up",
            Reading(
                "Removed without having been there, stored a second time, and refused because the "
                "index is full.",
                "Unknown removals are the trace of stores that were missed.",
                "duplicate now and then: vLLM keeps some content twice. The others 0.",
                "unknown removals: ask for an audit (`POST /kv/audit`). refused: runbook "
                "KvIndexFull.",
            ),
            [
                query(
                    rate(f"{PREFIX}blocks_{what}_total", by=("job",), scope=RANK),
                    f"{{{{job}}}} {what.replace('_', ' ')}",
                )
                for what in ("unknown_removed", "duplicate", "refused")
            ],
            units.BLOCKS_PER_SECOND,
            no_value=NO_EVENTS,
        ),
        time_series(
            "Trouble in the listener",
            Reading(
                "Reconnects, batches that broke the listener, and batches whose blocks had another "
                "size than the rank's.",
                "It goes on after each; the reason should not.",
                "0, and one reconnect for each restart of an engine.",
                "crashes: the log has a traceback; report it. Another block size: a publisher of "
                "another model sits on this address.",
            ),
            [
                query(
                    rate(f"{PREFIX}{metric}", by=("job",), scope=RANK),
                    f"{{{{job}}}} {name}",
                )
                for metric, name in (
                    ("listener_reconnects_total", "reconnects"),
                    ("listener_crashes_total", "crashes"),
                    ("block_size_mismatches_total", "other block size"),
                )
            ],
            units.PER_SECOND,
            no_value=NO_EVENTS,
        ),
    ],
)

delay = Section(
    "How late is the index?",
    [
        time_series(
            "Lag",
            Reading(
                "From the making of a batch, by the engine's clock, to its being indexed; of those "
                "that came in order.",
                "The index tells of a past this old.",
                "p99 below 50 ms in a worker, below 1 s in a fleet index.",
                "Constant, and in the fleet index only: clocks differ. Growing: the reader is at "
                "the limit of its core. Runbook KvLagHigh.",
            ),
            [
                query(quantile(0.5, LAG, by=("job",), scope=RANK), "{{job}} p50"),
                query(quantile(0.99, LAG, by=("job",), scope=RANK), "{{job}} p99"),
                query(
                    ratio(
                        rate(f"{LAG}_sum", by=("job",), scope=RANK),
                        rate(f"{LAG}_count", by=("job",), scope=RANK),
                    ),
                    "{{job}} mean",
                ),
            ],
            units.SECONDS,
            no_value=NO_TRAFFIC,
        ),
        heatmap(
            "Lag, distribution",
            Reading(
                "Batches per second in each bucket of the lag.",
                "A band far above the others is one rank, or one moment, that a quantile hides.",
                "One band of milliseconds.",
                "Choose a worker at the top of the page to see whose band it is.",
            ),
            buckets(LAG, scope=RANK),
            units.SECONDS,
            cell_unit=units.BATCHES_PER_SECOND,
        ),
        time_series(
            "Since the last batch, by rank",
            Reading(
                "How long ago the last batch that was indexed was made.",
                "A rank that is silent while its neighbours talk is cut off or idle.",
                "Below seconds under load; grows on an idle rank.",
                "Grows under load: runbook KvEventsSilent; in the fleet index only: KvFleetBehind.",
            ),
            [
                query(
                    "time() - "
                    + aggregate(
                        "max", f"{PREFIX}last_batch_timestamp_seconds", by=BY_RANK, scope=RANK
                    ),
                    RANK_LEGEND,
                )
            ],
            units.SECONDS,
            no_value=NO_EVENTS,
        ),
    ],
)
