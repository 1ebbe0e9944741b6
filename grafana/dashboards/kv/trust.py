"""The row about each rank: is its part of the index true, and if not, why?"""

from __future__ import annotations

from .. import units
from ..boards import Section
from ..panels import (
    GREEN,
    ORANGE,
    RED,
    Column,
    Reading,
    query,
    state_timeline,
    table,
    value_mapping,
)
from ..promql import aggregate, quantile, rate, series
from .names import BY_RANK, NO_EVENTS, PREFIX, RANK, RANK_LEGEND

LOST = series(f"{PREFIX}batches_total", 'outcome="lost"', scope=RANK)

trust = Section(
    "Which ranks can be trusted?",
    [
        state_timeline(
            "Trust, by rank",
            Reading(
                "Whether the index believes what it holds of a rank.",
                "When it began, and whether it healed by itself.",
                "trusted; stale for a moment after a restart or a reconnect.",
                "Stale for minutes: its reason is in the table beside this.",
            ),
            [
                query(
                    aggregate("max", f"{PREFIX}source_stale", by=BY_RANK, scope=RANK),
                    RANK_LEGEND,
                )
            ],
            value_mapping({"0": ("trusted", GREEN), "1": ("stale", ORANGE)}),
            size=(14, 7),
            no_value=NO_EVENTS,
        ),
        table(
            "Stale ranks, and why",
            Reading(
                "One row for each reason that a rank cannot be trusted now.",
                "Each reason has another remedy.",
                "Empty. unsynchronised stands for a rank that was never heard: it may be idle.",
                "gap, missed_first: runbook KvGapNotHealed. disconnected: KvListenerDown or "
                "KvFleetWorkerDisconnected. upstream: look at the worker's own index and its "
                "plane. The others: KvSourceStale.",
            ),
            [*BY_RANK, "reason"],
            [
                Column(
                    "Stale",
                    aggregate("max", f"{PREFIX}source_stale", by=(*BY_RANK, "reason"), scope=RANK)
                    + " == 1",
                    units.SHORT,
                )
            ],
            size=(10, 7),
            no_value="every rank is trusted",
        ),
        table(
            "Ranks, side by side",
            Reading(
                "One row per rank and index: connection, position in its stream, size, rate, lag, "
                "losses.",
                "A broken rank looks like the others in every sum.",
                "Rows that resemble each other; a worker's row and the fleet's with the same "
                "sequence for plain vLLM servers.",
                "Last batch long ago, and others' not: the worker is idle or cut off.",
            ),
            list(BY_RANK),
            [
                Column(
                    "Connected",
                    aggregate("min", f"{PREFIX}listener_up", by=BY_RANK, scope=RANK),
                    units.SHORT,
                    ((RED, None), (GREEN, 1)),
                    colored=True,
                ),
                Column(
                    "Stale",
                    aggregate("max", f"{PREFIX}source_stale", by=BY_RANK, scope=RANK),
                    units.SHORT,
                    ((GREEN, None), (ORANGE, 1)),
                    colored=True,
                ),
                Column(
                    "Sequence",
                    aggregate("max", f"{PREFIX}sequence", by=BY_RANK, scope=RANK),
                    units.NONE,
                ),
                Column(
                    "Last batch",
                    "1000 * "
                    + aggregate(
                        "max", f"{PREFIX}last_batch_timestamp_seconds", by=BY_RANK, scope=RANK
                    ),
                    units.TIME_AGO,
                ),
                Column(
                    "Blocks",
                    aggregate("sum", f"{PREFIX}index_blocks", by=BY_RANK, scope=RANK),
                    units.SHORT,
                ),
                Column(
                    "Batches",
                    rate(f"{PREFIX}batches_total", by=BY_RANK, scope=RANK),
                    units.BATCHES_PER_SECOND,
                ),
                Column(
                    "Lag p99",
                    quantile(0.99, f"{PREFIX}lag_seconds", by=BY_RANK, scope=RANK),
                    units.SECONDS,
                ),
                Column(
                    "Lost, in range",
                    f"sum by ({', '.join(BY_RANK)}) (increase({LOST}[$__range]))",
                    units.SHORT,
                    ((GREEN, None), (RED, 1)),
                    colored=True,
                ),
            ],
            no_value=NO_EVENTS,
        ),
    ],
)
