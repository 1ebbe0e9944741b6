"""The rows about the process: its state, and whether its numbers can be trusted."""

from __future__ import annotations

from .. import units
from ..boards import Section
from ..panels import (
    BAD_ABOVE_ZERO,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    RED,
    YELLOW,
    Column,
    Reading,
    bar_gauge,
    query,
    stat,
    state_timeline,
    table,
    time_series,
    value_mapping,
)
from ..promql import (
    ENGINE_JOBS,
    TARGET,
    aggregate,
    or_zero,
    or_zero_named,
    quantile,
    rate,
    series,
)
from .names import BY_INSTANCE, NO_WORKER, PREFIX

# The worker's states, in the order in which a life goes through them; the number is only a code.
STATES: dict[str, tuple[int, str]] = {
    "starting": (1, BLUE),
    "warming": (2, YELLOW),
    "ready": (3, GREEN),
    "draining": (4, ORANGE),
    "sleeping": (5, GREY),
    "waking": (6, YELLOW),
    "checkpointing": (7, "purple"),
    "restoring": (8, "purple"),
    "dead": (9, RED),
}

UNREACHABLE = 0


def state_code() -> str:
    """Return one number per worker: its state's code, or 0 while it cannot be scraped."""
    states = []
    for name, (code, _) in STATES.items():
        selected = series(f"{PREFIX}state", f'state="{name}"', scope=TARGET)
        states.append(f"({selected} == 1) * {code}")
    up = series("up", 'job="worker"', scope=TARGET)
    down = f"({up} == 0) * {UNREACHABLE}"
    return f"max by (instance) ({' or '.join([*states, down])})"


def with_build(expr: str) -> str:
    """Return a number per instance with the labels of what runs there."""
    build = aggregate(
        "max", f"{PREFIX}build_info", by=("instance", "version", "vllm_version"), scope=TARGET
    )
    return f"{expr} * on (instance) group_left (version, vllm_version) {build}"


def process_metric(metric: str) -> str:
    """Return a metric of the worker's process, by instance."""
    return aggregate("max", metric, ENGINE_JOBS, by=BY_INSTANCE, scope=TARGET)


state = Section(
    "What state is the worker in?",
    [
        state_timeline(
            "Worker state",
            Reading(
                "The worker's own state machine; unreachable means that Prometheus cannot scrape "
                "it.",
                "Tells dead from hung from asleep from loading, which a bare server cannot.",
                "ready.",
                "dead or unreachable: see the previous process below. Long in starting or warming: "
                "see start-up phases.",
            ),
            [query(state_code(), "{{instance}}")],
            value_mapping(
                {str(UNREACHABLE): ("unreachable", RED)}
                | {str(code): (name, color) for name, (code, color) in STATES.items()}
            ),
            size=(16, 6),
            no_value=NO_WORKER,
        ),
        bar_gauge(
            "Start-up phases",
            Reading(
                "How long each phase of the last start took.",
                "A restart costs this much availability.",
                "Model load is most of it; the rest is seconds.",
                "Engine or warm-up dominates: look at compilation caches. Model load: at the disk.",
            ),
            [
                query(
                    aggregate(
                        "max",
                        f"{PREFIX}startup_phase_seconds",
                        'phase!="total"',
                        by=("phase",),
                        scope=TARGET,
                    ),
                    "{{phase}}",
                )
            ],
            units.SECONDS,
            size=(8, 6),
            no_value=NO_WORKER,
        ),
        table(
            "Workers",
            Reading(
                "One row per worker: versions, age, how long its start took.",
                "Different versions behind one name explain different behaviour.",
                "One version everywhere.",
                "Finish the roll-out, or roll back.",
            ),
            ["instance", "version", "vllm_version"],
            [
                Column(
                    "Uptime",
                    with_build(f"(time() - {process_metric('process_start_time_seconds')})"),
                    units.SECONDS,
                ),
                Column(
                    "Start-up",
                    with_build(
                        aggregate(
                            "max",
                            f"{PREFIX}startup_phase_seconds",
                            'phase="total"',
                            by=BY_INSTANCE,
                            scope=TARGET,
                        )
                    ),
                    units.SECONDS,
                ),
                Column(
                    "Memory",
                    with_build(process_metric("process_resident_memory_bytes")),
                    units.BYTES,
                ),
            ],
            size=(12, 6),
            no_value=NO_WORKER,
        ),
        table(
            "Previous process",
            Reading(
                "When the process before this one ended, and why, from the worker's state "
                "directory.",
                "After a restart this is all that is left of the reason.",
                "Empty, or stopped at the time of your last deployment.",
                "engine_dead or unclean: read that process's log at that time.",
            ),
            ["instance", "reason"],
            [
                Column(
                    "Ended",
                    "1000 * "
                    + aggregate(
                        "max",
                        f"{PREFIX}last_exit_timestamp_seconds",
                        by=("instance", "reason"),
                        scope=TARGET,
                    ),
                    units.TIME_AGO,
                )
            ],
            size=(12, 6),
            no_value="no previous process known",
        ),
    ],
)

exporter = Section(
    "Can these numbers be trusted?",
    [
        state_timeline(
            "Sources of /metrics",
            Reading(
                "Whether each source of the worker's /metrics page could be read.",
                "A source that fails leaves a gap in other panels, not an error.",
                "all up.",
                "down: read the worker's log; it names the source and the cause.",
            ),
            [
                query(
                    aggregate(
                        "min",
                        f"{PREFIX}exporter_source_up",
                        by=("instance", "source"),
                        scope=TARGET,
                    ),
                    "{{instance}} {{source}}",
                )
            ],
            value_mapping({"0": ("down", RED), "1": ("up", GREEN)}),
            size=(12, 6),
            no_value=NO_WORKER,
        ),
        stat(
            "Stat logger errors, in range",
            Reading(
                "Exceptions that the stat logger caught in the chosen time range.",
                "Each one means that some counters missed a step; serving goes on.",
                "0.",
                "Read the worker's log, and report it with the vLLM version.",
            ),
            "sum (increase("
            + series(f"{PREFIX}stat_logger_errors_total", scope=TARGET)
            + "[$__range]))",
            units.SHORT,
            size=(4, 6),
            steps=BAD_ABOVE_ZERO,
            instant=True,
            decimals=0,
            no_value=NO_WORKER,
        ),
        stat(
            "Exporter errors, in range",
            Reading(
                "Times a source of /metrics failed in the chosen time range.",
                "As above, for whole families.",
                "0.",
                "See which source on the left.",
            ),
            or_zero(
                "sum (increase("
                + series(f"{PREFIX}exporter_source_errors_total", scope=TARGET)
                + "[$__range]))"
            ),
            units.SHORT,
            size=(4, 6),
            steps=BAD_ABOVE_ZERO,
            instant=True,
            decimals=0,
            no_value=NO_WORKER,
        ),
        stat(
            "Families dropped, in range",
            Reading(
                "Metric families left out of /metrics because they were duplicate or invalid.",
                "A registered engine's metrics may be missing.",
                "0.",
                "`llm_worker_exporter_families_dropped_total` names source and reason.",
            ),
            or_zero(
                "sum (increase("
                + series(f"{PREFIX}exporter_families_dropped_total", scope=TARGET)
                + "[$__range]))"
            ),
            units.SHORT,
            size=(4, 6),
            steps=BAD_ABOVE_ZERO,
            instant=True,
            decimals=0,
            no_value=NO_WORKER,
        ),
        time_series(
            "Rendering /metrics",
            Reading(
                "Time to render one page, off the serving loop.",
                "Slow pages come from too many series.",
                "p99 below 50 ms.",
                "Above 1 s: look for a label with many values.",
            ),
            [
                query(quantile(0.5, f"{PREFIX}exporter_render_seconds", scope=TARGET), "p50"),
                query(quantile(0.99, f"{PREFIX}exporter_render_seconds", scope=TARGET), "p99"),
            ],
            units.SECONDS,
            size=(12, 8),
            no_value=NO_WORKER,
        ),
        time_series(
            "Errors, by stage and source",
            Reading(
                "The same errors over time.",
                "When it began tells what changed.",
                "0.",
                "Compare with the restarts drawn in the panels.",
            ),
            [
                query(
                    rate(f"{PREFIX}stat_logger_errors_total", by=("stage",), scope=TARGET),
                    "stat logger {{stage}}",
                ),
                query(
                    or_zero_named(
                        rate(f"{PREFIX}exporter_source_errors_total", by=("source",), scope=TARGET),
                        "source",
                        "none",
                    ),
                    "exporter {{source}}",
                ),
            ],
            units.PER_SECOND,
            size=(12, 8),
            no_value=NO_WORKER,
        ),
    ],
)
