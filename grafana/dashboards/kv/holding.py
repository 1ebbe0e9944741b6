"""The rows about the index and the fleet: what they hold, how fast they answer, if it is right."""

from __future__ import annotations

from .. import units
from ..boards import Section
from ..panels import (
    GREEN,
    ORANGE,
    RED,
    YELLOW,
    Reading,
    color_override,
    query,
    stat,
    time_series,
)
from ..promql import TARGET, aggregate, quantile, rate, ratio
from .names import BY_RANK, NO_EVENTS, NO_FLEET, PREFIX, RANK, RANK_LEGEND

BY_INDEX = ("job", "instance")
INDEX_LEGEND = "{{job}} {{instance}}"
MATCH = f"{PREFIX}match_seconds"
HELD = f"{PREFIX}fleet_held_blocks"
UNIQUE = f"{PREFIX}fleet_unique_blocks"


def fleet_sum(metric: str) -> str:
    """Return a number of a fleet index, by instance: two of them see the same workers."""
    return aggregate("max", metric, by=("instance",), scope=TARGET)


holding = Section(
    "What does the index hold, and how fast does it answer?",
    [
        time_series(
            "Blocks, by medium",
            Reading(
                "Distinct blocks of each rank in the index, by where they are: GPU, CPU, storage.",
                "What can be reused, and at which cost.",
                "gpu about the engines' capacity; others only with a KV connector.",
                "gpu falls to 0: a cache was cleared, or the source was.",
            ),
            [
                query(
                    aggregate("sum", f"{PREFIX}index_blocks", by=("job", "medium"), scope=RANK),
                    "{{job}} {{medium}}",
                )
            ],
            units.SHORT,
            no_value=NO_EVENTS,
        ),
        time_series(
            "Memory of the index",
            Reading(
                "Estimated memory of each index, and of one block in it.",
                "What a larger bound would cost.",
                "Around 100 bytes a block; an empty table counts, too, so more in a small index.",
                "Grows and blocks do not: report it.",
            ),
            [
                query(
                    aggregate("max", f"{PREFIX}index_bytes", by=BY_INDEX, scope=TARGET),
                    INDEX_LEGEND,
                ),
                query(
                    aggregate("max", f"{PREFIX}index_bytes", by=BY_INDEX, scope=TARGET)
                    + " / ("
                    + aggregate("sum", f"{PREFIX}index_blocks", by=BY_INDEX, scope=TARGET)
                    + " > 0)",
                    f"{INDEX_LEGEND} per block",
                ),
            ],
            units.BYTES,
            log_scale=True,
            minimum=None,
            no_value=NO_EVENTS,
        ),
        time_series(
            "Use of the index's bound",
            Reading(
                "Blocks held, as a share of the most that the index may hold.",
                "At 100 % it refuses the newest blocks, which are the likeliest to be asked for.",
                "Below 90 %.",
                "Runbook KvIndexFull.",
            ),
            [
                query(
                    aggregate("sum", f"{PREFIX}index_blocks", by=BY_INDEX, scope=TARGET)
                    + " / "
                    + aggregate("max", f"{PREFIX}index_max_blocks", by=BY_INDEX, scope=TARGET),
                    INDEX_LEGEND,
                )
            ],
            units.RATIO,
            maximum=1,
            steps=((GREEN, None), (YELLOW, 0.8), (RED, 0.9)),
            show_thresholds=True,
            no_value="the index has no bound",
        ),
        time_series(
            "Match latency",
            Reading(
                "Time to find out who holds the beginning of a prompt, without HTTP around it.",
                "A router waits for it with every request.",
                "p99 below 1 ms for 1,000 blocks.",
                "Grows with the number of workers and the length of prompts; if it grows alone, "
                "the process has no core to itself.",
            ),
            [
                query(quantile(0.5, MATCH, by=("job",), scope=TARGET), "{{job}} p50"),
                query(quantile(0.99, MATCH, by=("job",), scope=TARGET), "{{job}} p99"),
            ],
            units.SECONDS,
            no_value="nobody asks",
        ),
        time_series(
            "Match requests, by outcome",
            Reading(
                "Questions for a prefix: somebody holds its first block (hit), nobody does (miss), "
                "or the question was refused (invalid).",
                "The hit ratio is the most that routing by the index can gain.",
                "As your prompts repeat; invalid 0.",
                "Only misses although prompts repeat: does the asker hash as the engine does? "
                "Ask with the prompt itself.",
            ),
            [
                query(
                    rate(f"{PREFIX}match_requests_total", by=("job", "outcome"), scope=TARGET),
                    "{{job}} {{outcome}}",
                )
            ],
            units.REQUESTS_PER_SECOND,
            no_value=NO_EVENTS,
        ),
        time_series(
            "Blocks, by worker",
            Reading(
                "Blocks in the index of each worker's ranks.",
                "Which worker's cache is warm.",
                "Alike for workers of one model under the same load.",
                "One far below: it restarted, gets no traffic, or its events are missing.",
            ),
            [
                query(
                    aggregate("sum", f"{PREFIX}index_blocks", by=("job", "worker"), scope=RANK),
                    "{{job}} {{worker}}",
                )
            ],
            units.SHORT,
            no_value=NO_EVENTS,
        ),
    ],
)

agreement = Section(
    "Does the index agree with the engine?",
    [
        time_series(
            "Audits, by outcome",
            Reading(
                "Comparisons of the index with what the engine says it holds.",
                "The only proof that the index is right and not only complete.",
                "equal, now and then: only an engine that stands still can be compared.",
                "busy alone: ask for one in a quiet moment (`POST /kv/audit`). failed: the "
                "engine cannot be asked; see the worker's log.",
            ),
            [
                query(
                    rate(f"{PREFIX}audits_total", by=("worker", "engine", "outcome"), scope=RANK),
                    "{{worker}} {{engine}} {{outcome}}",
                )
            ],
            units.PER_SECOND,
            size=(12, 7),
            no_value=NO_EVENTS,
        ),
        time_series(
            "Drift",
            Reading(
                "Blocks that the index had too many or too few, at the last verdict.",
                "Anything but 0 is a bug, ours or vLLM's.",
                "0.",
                "Runbook KvAuditDrift.",
            ),
            [
                query(
                    aggregate("max", f"{PREFIX}audit_drift_blocks", by=BY_RANK, scope=RANK),
                    RANK_LEGEND,
                )
            ],
            units.SHORT,
            size=(12, 7),
            steps=((GREEN, None), (RED, 1)),
            show_thresholds=True,
            step_lines=True,
            no_value="no verdict yet",
        ),
    ],
)

fleet = Section(
    "What does the fleet hold?",
    [
        time_series(
            "Blocks of the fleet",
            Reading(
                "Distinct blocks over all workers, blocks with every copy counted, and the "
                "difference: what is held more than once.",
                "Copies are cache that holds nothing new; a few of them spread the load.",
                "unique grows with the number of workers.",
                "duplicated near held: every worker caches the same; route by prefix.",
            ),
            [
                query(fleet_sum(UNIQUE), "{{instance}} unique"),
                query(fleet_sum(HELD), "{{instance}} held"),
                query(f"{fleet_sum(HELD)} - {fleet_sum(UNIQUE)}", "{{instance}} duplicated"),
            ],
            units.SHORT,
            size=(10, 8),
            no_value=NO_FLEET,
        ),
        stat(
            "Share of duplicates",
            Reading(
                "Duplicated blocks as a share of all that are held.",
                "What routing by prefix could free.",
                "Below 30 % with a router that knows the cache.",
                "High: look at the router; every worker computes the same prefixes.",
            ),
            ratio(f"({fleet_sum(HELD)} - {fleet_sum(UNIQUE)})", fleet_sum(HELD)),
            units.RATIO,
            size=(4, 8),
            legend="{{instance}}",
            steps=((GREEN, None), (YELLOW, 0.5)),
            no_value=NO_FLEET,
        ),
        time_series(
            "Workers, by health",
            Reading(
                "Workers that the fleet index hears and believes, hears and does not believe, or "
                "does not hear.",
                "Only ok counts for routing.",
                "All ok.",
                "disconnected: runbook KvFleetWorkerDisconnected. stale: the table of stale ranks.",
            ),
            [
                query(
                    aggregate("max", f"{PREFIX}fleet_workers", by=("health",), scope=TARGET),
                    "{{health}}",
                )
            ],
            units.SHORT,
            size=(10, 8),
            stack=True,
            step_lines=True,
            overrides=[
                color_override("ok", GREEN),
                color_override("stale", ORANGE),
                color_override("disconnected", RED),
            ],
            no_value=NO_FLEET,
        ),
    ],
)
