"""The rows about requests: do they meet their targets, and where did each one go?"""

from __future__ import annotations

from .. import units
from ..boards import Section
from ..panels import (
    GREEN,
    NO_TRAFFIC,
    RED,
    YELLOW,
    Reading,
    bar_gauge,
    color_override,
    query,
    stat,
    time_series,
)
from ..promql import (
    TARGET,
    aggregate,
    rate,
    ratio,
)
from .names import NO_WORKER, PREFIX

RECEIVED = f"{PREFIX}requests_received_total"

ENDED = f"{PREFIX}requests_ended_total"

IN_FLIGHT = f"{PREFIX}requests_in_flight"

BY_LEDGER = ("instance", "model_name")


def ledger(metric: str, *matchers: str, by: tuple[str, ...]) -> str:
    """Return a rate from the ledger.

    Not narrowed by the model variable: a LoRA adapter has a name of its own here.
    """
    return rate(metric, *matchers, by=by, scope=TARGET)


goodput = Section(
    "Do requests meet their targets?",
    [
        stat(
            "Goodput",
            Reading(
                "Share of finished requests that met the targets for TTFT, TPOT and E2E together.",
                "The one number that users' experience follows; it cannot be had from three "
                "percentiles.",
                "Above 95 %.",
                "Look at the missed objectives beside it, then at that latency on the overview.",
            ),
            ratio(
                rate(f"{PREFIX}goodput_requests_total"),
                rate(f"{PREFIX}goodput_evaluated_requests_total"),
            ),
            units.RATIO,
            size=(4, 8),
            steps=((RED, None), (YELLOW, 0.9), (GREEN, 0.95)),
        ),
        time_series(
            "Goodput over time",
            Reading(
                "Requests per second that were judged, and that were good.",
                "Throughput that does not count is not worth much.",
                "The lines lie together.",
                "They part under load: that is your real capacity.",
            ),
            [
                query(rate(f"{PREFIX}goodput_evaluated_requests_total"), "judged"),
                query(rate(f"{PREFIX}goodput_requests_total"), "good"),
            ],
            units.REQUESTS_PER_SECOND,
            size=(8, 8),
            overrides=[color_override("good", GREEN)],
            no_value=NO_TRAFFIC,
        ),
        time_series(
            "Missed objectives",
            Reading(
                "Requests per second that missed each objective; one request can miss several.",
                "Says what to work on.",
                "0.",
                "ttft: queue or prefill. tpot: batch size. e2e: lengths.",
            ),
            [
                query(
                    rate(f"{PREFIX}goodput_missed_requests_total", by=("objective",)),
                    "{{objective}}",
                )
            ],
            units.REQUESTS_PER_SECOND,
            size=(8, 8),
            no_value=NO_TRAFFIC,
        ),
        bar_gauge(
            "Targets",
            Reading(
                "The targets that requests are judged by.",
                "Goodput means nothing without them.",
                "What you promised.",
                "Change them with `--worker-goodput` or `LLM_WORKER_GOODPUT`.",
            ),
            [
                query(
                    aggregate(
                        "max",
                        f"{PREFIX}goodput_target_seconds",
                        by=("objective",),
                        scope=TARGET,
                    ),
                    "{{objective}}",
                )
            ],
            units.SECONDS,
            size=(4, 8),
            no_value=NO_WORKER,
        ),
    ],
)

book = Section(
    "Where did every request go?",
    [
        time_series(
            "Requests ended, by outcome",
            Reading(
                "How requests ended, also those that vLLM never counts: clients that left, "
                "refusals, internal errors.",
                "The honest denominator.",
                "finished stop and length.",
                "disconnected grows: users lose patience; look at TTFT. errored: read the log.",
            ),
            [
                query(
                    ledger(ENDED, by=("outcome", "reason")),
                    "{{outcome}} {{reason}}",
                )
            ],
            units.REQUESTS_PER_SECOND,
            stack=True,
            size=(8, 8),
            no_value=NO_WORKER,
        ),
        time_series(
            "Received and in flight",
            Reading(
                "Requests received per second, by model or adapter, and those in flight now.",
                "Load by the name that callers ask for; an adapter has its own line.",
                "Follows your users' day.",
                "In flight grows and received does not: the engine slows down.",
            ),
            [
                query(ledger(RECEIVED, by=("model_name",)), "{{model_name}} received/s"),
                query(
                    aggregate("sum", IN_FLIGHT, by=("model_name",), scope=TARGET),
                    "{{model_name}} in flight",
                ),
            ],
            units.SHORT,
            no_value=NO_WORKER,
        ),
        time_series(
            "Ledger balance",
            Reading(
                "Received minus ended minus in flight, since the worker's start.",
                "Anything but 0 is a request that vanished: a bug in the worker.",
                "0; for one scrape it may be off by what moved meanwhile.",
                "Steadily not 0: report it with the worker's log.",
            ),
            [
                query(
                    f"{aggregate('sum', RECEIVED, by=BY_LEDGER, scope=TARGET)}"
                    f" - {aggregate('sum', ENDED, by=BY_LEDGER, scope=TARGET)}"
                    f" - {aggregate('sum', IN_FLIGHT, by=BY_LEDGER, scope=TARGET)}",
                    "{{instance}} {{model_name}}",
                )
            ],
            units.SHORT,
            minimum=None,
            no_value=NO_WORKER,
        ),
    ],
)
