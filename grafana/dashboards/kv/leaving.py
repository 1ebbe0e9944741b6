"""The row about the plane: do records go out to whoever builds a fleet index?"""

from __future__ import annotations

from .. import units
from ..boards import Section
from ..panels import GREEN, RED, Reading, query, state_timeline, time_series, value_mapping
from ..promql import TARGET, aggregate, rate
from .names import NO_EVENTS, PREFIX

BY_PLANE = ("instance", "plane")
PLANE_LEGEND = "{{instance}} {{plane}}"

leaving = Section(
    "Do the records go out?",
    [
        state_timeline(
            "Plane",
            Reading(
                "Whether each worker's event plane can send.",
                "A fleet index hears nothing of a worker whose plane is down.",
                "up.",
                "Runbook KvPlaneDown.",
            ),
            [query(aggregate("min", f"{PREFIX}plane_up", by=BY_PLANE, scope=TARGET), PLANE_LEGEND)],
            value_mapping({"0": ("down", RED), "1": ("up", GREEN)}),
            size=(12, 6),
            no_value=NO_EVENTS,
        ),
        time_series(
            "Published and acknowledged",
            Reading(
                "Batches handed to the transport, and those that it says it has stored (NATS only; "
                "0 on ZMQ, which does not say).",
                "The distance is what a NATS server that ends now would lose.",
                "The two alike on NATS.",
                "Acknowledged falls behind: the server is slow or away; runbook "
                "KvPlaneBufferFilling.",
            ),
            [
                query(
                    rate(f"{PREFIX}plane_{what}_batches_total", by=BY_PLANE, scope=TARGET),
                    f"{PLANE_LEGEND} {what}",
                )
                for what in ("published", "acknowledged")
            ],
            units.BATCHES_PER_SECOND,
            size=(12, 6),
            no_value=NO_EVENTS,
        ),
        time_series(
            "Buffer of the plane",
            Reading(
                "Share of the buffer that is taken: on NATS by what is not acknowledged, on ZMQ by "
                "what is kept for replay.",
                "On NATS it says how long an outage may still last.",
                "nats near 0; zmq fills up and stays full, which is right.",
                "nats above 50 %: runbook KvPlaneBufferFilling.",
            ),
            [
                query(
                    aggregate("sum", f"{PREFIX}plane_buffered_batches", by=BY_PLANE, scope=TARGET)
                    + " / "
                    + aggregate(
                        "sum", f"{PREFIX}plane_buffer_capacity_batches", by=BY_PLANE, scope=TARGET
                    ),
                    PLANE_LEGEND,
                )
            ],
            units.RATIO,
            maximum=1,
            no_value=NO_EVENTS,
        ),
        time_series(
            "Dropped on the way out",
            Reading(
                "Batches that did not go out, or not to every reader.",
                "Readers see a gap, and need a replay or a snapshot.",
                "0.",
                "subscriber_full: find the slow reader. The others: runbook KvPlaneDropping.",
            ),
            [
                query(
                    rate(
                        f"{PREFIX}plane_dropped_batches_total",
                        by=("plane", "reason"),
                        scope=TARGET,
                    ),
                    "{{plane}} {{reason}}",
                )
            ],
            units.BATCHES_PER_SECOND,
            no_value=NO_EVENTS,
        ),
        time_series(
            "Readers that ask",
            Reading(
                "Replays and snapshots served, requests refused, and reconnects of the plane.",
                "Each snapshot is a reader that started or had lost the thread.",
                "A snapshot for each start of a fleet index; refused 0.",
                "Snapshots again and again: a reader loses batches; look at its lag and its core.",
            ),
            [
                query(
                    rate(f"{PREFIX}plane_{metric}", by=("plane",), scope=TARGET),
                    f"{{{{plane}}}} {name}",
                )
                for metric, name in (
                    ("replays_served_total", "replays"),
                    ("snapshots_served_total", "snapshots"),
                    ("requests_refused_total", "refused"),
                    ("reconnects_total", "reconnects"),
                )
            ],
            units.PER_SECOND,
            no_value=NO_EVENTS,
        ),
    ],
)
