"""The dashboard of the monitoring itself: is everything scraped, judged, delivered and kept?

When this one is not well, nothing on the others can be believed.
"""

from __future__ import annotations

from grafanalib import core

from . import units
from .boards import TAG_STACK, Section, board, target_variables
from .panels import (
    BAD_ABOVE_ZERO,
    GREEN,
    RED,
    YELLOW,
    Reading,
    color_override,
    query,
    stat,
    state_timeline,
    time_series,
    value_mapping,
)
from .promql import TARGET, aggregate, or_zero, or_zero_named, rate, ratio, series

UID = "vllm-monitoring-self"
BY_TARGET = ("job", "instance")
NO_PROMETHEUS = "Prometheus is not scraped"
NO_ALERTMANAGER = "Alertmanager is not scraped"


def gauge(metric: str, *matchers: str, how: str = "max", by: tuple[str, ...] = ()) -> str:
    """Return a gauge of a target that is part of the monitoring."""
    return aggregate(how, metric, *matchers, by=by, scope=TARGET)


def counter(metric: str, *matchers: str, by: tuple[str, ...] = ()) -> str:
    """Return a counter's rate, of a target that is part of the monitoring."""
    return rate(metric, *matchers, by=by, scope=TARGET)


scraping = Section(
    "Is everything scraped?",
    [
        stat(
            "Targets up",
            Reading(
                "Targets that answered the last scrape.",
                "The number of things that are watched at all.",
                "What you run.",
                "Fewer than expected: see the timeline; a profile that is off has no targets.",
            ),
            or_zero(f"count({series('up', scope=TARGET)} == 1)"),
            units.SHORT,
            size=(4, 5),
            steps=((RED, None), (GREEN, 1)),
            no_value="none",
        ),
        stat(
            "Not answering",
            Reading(
                "Targets that Prometheus knows and that did not answer.",
                "Nothing else is known of them.",
                "0.",
                "Open Prometheus' page of targets: it shows the error.",
            ),
            or_zero(f"count({series('up', scope=TARGET)} == 0)"),
            units.SHORT,
            size=(4, 5),
            steps=BAD_ABOVE_ZERO,
            no_value="0",
        ),
        state_timeline(
            "Targets",
            Reading(
                "Each target's scrapes: answered or not.",
                "When it went, and what went with it.",
                "Green throughout.",
                "Red: look at the target; a gap: Prometheus itself was not running.",
            ),
            [query(gauge("up", by=BY_TARGET), "{{job}} {{instance}}")],
            value_mapping({"0": ("down", RED), "1": ("up", GREEN)}),
            size=(16, 10),
        ),
        stat(
            "Watchdog",
            Reading(
                "An alert that always fires, so that a silent chain of alerts can be told from a "
                "healthy one.",
                "If it stops, no alert can be trusted to arrive.",
                "firing.",
                "Not firing: the rules are not loaded; look at the row of rules below.",
            ),
            or_zero('count(ALERTS{alertname="Watchdog",alertstate="firing"})'),
            units.SHORT,
            size=(4, 5),
            steps=((RED, None), (GREEN, 1)),
            mappings=value_mapping({"0": ("silent", RED), "1": ("firing", GREEN)}),
            no_value="silent",
        ),
        stat(
            "Configuration loaded",
            Reading(
                "Whether the last reload of Prometheus and of Alertmanager succeeded.",
                "After a failed reload the old configuration stays in force, quietly.",
                "yes.",
                "Run `./scripts/check` and read the log.",
            ),
            "min ("
            + series("prometheus_config_last_reload_successful", scope=TARGET)
            + " or "
            + series("alertmanager_config_last_reload_successful", scope=TARGET)
            + ")",
            units.SHORT,
            size=(4, 5),
            steps=((RED, None), (GREEN, 1)),
            mappings=value_mapping({"0": ("no", RED), "1": ("yes", GREEN)}),
            no_value=NO_PROMETHEUS,
        ),
        time_series(
            "Scrape duration, by target",
            Reading(
                "How long each target takes to answer.",
                "At the time-out of 8 s a scrape is lost.",
                "Below 1 s.",
                "Close to 8 s: too many series, or the target's loop is blocked.",
            ),
            [query(gauge("scrape_duration_seconds", by=BY_TARGET), "{{job}} {{instance}}")],
            units.SECONDS,
            steps=((GREEN, None), (YELLOW, 1), (RED, 6.4)),
        ),
        time_series(
            "Samples per scrape",
            Reading(
                "Samples that each target exposes, after relabelling.",
                "Above `sample_limit` the whole scrape is thrown away.",
                "About 500 per engine; steady.",
                "Grows without end: a label has too many values; LoRA names and per-request labels "
                "are the usual ones.",
            ),
            [
                query(
                    gauge("scrape_samples_post_metric_relabeling", by=BY_TARGET),
                    "{{job}} {{instance}}",
                )
            ],
            units.SHORT,
        ),
        time_series(
            "New series per scrape",
            Reading(
                "Series that were not there in the scrape before.",
                "Churn costs memory even where the number of series is steady.",
                "0 but for restarts.",
                "Steady: find the label that changes all the time.",
            ),
            [query(gauge("scrape_series_added", by=BY_TARGET), "{{job}} {{instance}}")],
            units.SHORT,
        ),
    ],
)

rules = Section(
    "Are the rules evaluated?",
    [
        time_series(
            "Rule groups: duration against interval",
            Reading(
                "How much of its interval each group of rules needs.",
                "At 100 % evaluations are skipped and alerts come late.",
                "Below 10 %.",
                "Split the group, or use recording rules.",
            ),
            [
                query(
                    f"{gauge('prometheus_rule_group_last_duration_seconds', by=('rule_group',))}"
                    " / "
                    f"{gauge('prometheus_rule_group_interval_seconds', by=('rule_group',))}",
                    "{{rule_group}}",
                )
            ],
            units.RATIO,
            no_value="no rules",
        ),
        time_series(
            "Rule failures and misses",
            Reading(
                "Evaluations per second that failed, and that were skipped.",
                "A rule that fails never fires.",
                "0.",
                "The page of rules in Prometheus shows the error.",
            ),
            [
                query(counter("prometheus_rule_evaluation_failures_total"), "failed"),
                query(counter("prometheus_rule_group_iterations_missed_total"), "missed"),
            ],
            units.PER_SECOND,
            overrides=[color_override("failed", RED)],
            no_value="no rules",
        ),
        time_series(
            "Alerts, by state",
            Reading(
                "Alerts that fire or wait for their time, without the Watchdog.",
                "Many at once are usually one cause.",
                "None.",
                "Begin with the oldest.",
            ),
            [
                query(
                    or_zero_named(
                        'count by (alertstate) (ALERTS{alertname!="Watchdog"})',
                        "alertstate",
                        "firing",
                    ),
                    "{{alertstate}}",
                )
            ],
            units.SHORT,
            step_lines=True,
            overrides=[color_override("firing", RED), color_override("pending", YELLOW)],
        ),
    ],
)

delivery = Section(
    "Are alerts delivered?",
    [
        time_series(
            "Prometheus to Alertmanager",
            Reading(
                "Alerts per second sent to Alertmanager, failed and dropped.",
                "The first half of the way.",
                "Failed and dropped 0; sent above 0, the Watchdog sees to that.",
                "Is Alertmanager up? The log of Prometheus names the error.",
            ),
            [
                query(counter("prometheus_notifications_sent_total"), "sent"),
                query(counter("prometheus_notifications_errors_total"), "failed"),
                query(counter("prometheus_notifications_dropped_total"), "dropped"),
            ],
            units.PER_SECOND,
            overrides=[color_override("failed", RED), color_override("dropped", RED)],
            no_value=NO_PROMETHEUS,
        ),
        time_series(
            "Alertmanager to people",
            Reading(
                "Notifications per second that Alertmanager attempted, and that failed.",
                "The second half of the way.",
                "Failed 0. Sent 0 as long as no receiver has a secret.",
                "Failed: the log of Alertmanager names the receiver and the error.",
            ),
            [
                query(counter("alertmanager_notifications_total"), "sent"),
                query(counter("alertmanager_notifications_failed_total"), "failed"),
            ],
            units.PER_SECOND,
            overrides=[color_override("failed", RED)],
            no_value=NO_ALERTMANAGER,
        ),
        time_series(
            "Alerts in Alertmanager",
            Reading(
                "Alerts that Alertmanager holds, active or suppressed, and active silences.",
                "A silence that was forgotten hides the next outage.",
                "Active: the Watchdog. Silences: those of today.",
                "Look at old silences in Alertmanager and end them.",
            ),
            [
                query(gauge("alertmanager_alerts", how="sum", by=("state",)), "alerts {{state}}"),
                query(gauge("alertmanager_silences", 'state="active"', how="sum"), "silences"),
            ],
            units.SHORT,
            step_lines=True,
            no_value=NO_ALERTMANAGER,
        ),
    ],
)

room = Section(
    "Does Prometheus have room?",
    [
        time_series(
            "Series in memory",
            Reading(
                "Series in Prometheus' head block.",
                "Memory follows it.",
                "Some thousands per engine; steady.",
                "Grows: see samples per scrape for the target.",
            ),
            [query(gauge("prometheus_tsdb_head_series", by=("instance",)), "{{instance}}")],
            units.SHORT,
            no_value=NO_PROMETHEUS,
        ),
        time_series(
            "Samples stored",
            Reading(
                "Samples per second that are written.",
                "Disk use follows it, at 1 to 2 bytes each.",
                "Samples per scrape divided by the interval, over all targets.",
                "0: nothing is stored any more; read the log.",
            ),
            [
                query(
                    counter("prometheus_tsdb_head_samples_appended_total", by=("instance",)),
                    "{{instance}}",
                )
            ],
            units.SAMPLES_PER_SECOND,
            no_value=NO_PROMETHEUS,
        ),
        time_series(
            "Disk use",
            Reading(
                "Size of finished blocks, of the write-ahead log, and the limit by retention.",
                "When the limit is reached the oldest history goes.",
                "Below the limit. No limit line: retention by size is off.",
                "Raise the limit, or keep fewer days.",
            ),
            [
                query(gauge("prometheus_tsdb_storage_blocks_bytes"), "blocks"),
                query(gauge("prometheus_tsdb_wal_storage_size_bytes"), "write-ahead log"),
                query(
                    f"{gauge('prometheus_tsdb_retention_limit_bytes')} > 0 or vector(0)",
                    "limit",
                ),
            ],
            units.BYTES,
            no_value=NO_PROMETHEUS,
        ),
        time_series(
            "Storage errors",
            Reading(
                "Failed compactions, corruptions of the log and failed reloads of blocks, per "
                "second.",
                "Each can cost history.",
                "0.",
                "Is the disk full? Read the log of Prometheus.",
            ),
            [
                query(counter("prometheus_tsdb_compactions_failed_total"), "compactions"),
                query(counter("prometheus_tsdb_wal_corruptions_total"), "corruptions"),
                query(counter("prometheus_tsdb_reloads_failures_total"), "reloads"),
            ],
            units.PER_SECOND,
            no_value=NO_PROMETHEUS,
        ),
        time_series(
            "Query time",
            Reading(
                "Mean time of a query, by part; dashboards and rules together.",
                "Slow queries make dashboards late, and rules too.",
                "Milliseconds.",
                "Above 1 s: choose a shorter time range, or add recording rules.",
            ),
            [
                query(
                    ratio(
                        counter("prometheus_engine_query_duration_seconds_sum", by=("slice",)),
                        counter("prometheus_engine_query_duration_seconds_count", by=("slice",)),
                    ),
                    "{{slice}}",
                )
            ],
            units.SECONDS,
            no_value=NO_PROMETHEUS,
        ),
        time_series(
            "Memory, by target",
            Reading(
                "Resident memory of each process that tells it.",
                "The containers have limits; at the limit the kernel ends them.",
                "Flat.",
                "Prometheus grows: series. A worker grows: see its own dashboard.",
            ),
            [query(gauge("process_resident_memory_bytes", by=BY_TARGET), "{{job}} {{instance}}")],
            units.BYTES,
        ),
        time_series(
            "CPU, by target",
            Reading(
                "CPU in cores that each process uses.",
                "The monitoring should cost next to nothing.",
                "Prometheus below 0.2 cores.",
                "More: expensive queries; see query time.",
            ),
            [query(counter("process_cpu_seconds_total", by=BY_TARGET), "{{job}} {{instance}}")],
            units.CORES,
        ),
        time_series(
            "Uptime, by target",
            Reading(
                "Time since each process started.",
                "A saw-tooth is a crash loop.",
                "A line upwards.",
                "Read the log of the one that restarts.",
            ),
            [
                query(
                    "time() - " + gauge("process_start_time_seconds", by=BY_TARGET),
                    "{{job}} {{instance}}",
                )
            ],
            units.SECONDS,
        ),
    ],
)


def build() -> core.Dashboard:
    """Return the dashboard."""
    return board(
        UID,
        "Monitoring itself",
        "Prometheus, Alertmanager and what they scrape. When this is not well, do not believe the "
        "other dashboards.",
        tag=TAG_STACK,
        variables=target_variables(),
        sections=[scraping, rules, delivery, room],
    )
