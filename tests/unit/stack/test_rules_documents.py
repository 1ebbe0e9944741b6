"""The rules, their tests and their runbooks belong together, and name only metrics that exist.

vLLM's metrics are looked up in the recorded pages of the pinned release, ours where the worker
declares them. What Prometheus and Alertmanager say about themselves is listed here; an integration
test holds that list against the real programs.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.parser import text_string_to_metric_families

from llm_worker import metrics as worker_metrics
from llm_worker.errors import RUN_ENDINGS
from llm_worker.kv import collector as kv_metrics
from llm_worker.kv import stats as kv_stats
from support.places import FIXTURES, ROOT

PROMETHEUS = ROOT / "prometheus"
RUNBOOKS = "https://github.com/vllm-monitoring/vllm-monitoring/blob/main/prometheus/runbooks"
HEADINGS = ["Meaning", "Impact", "Diagnosis", "Mitigation"]
SEVERITIES = {"critical", "warning", "info", "none"}

# Made by Prometheus for each target; not on any page.
SYNTHETIC = {
    "up",
    "scrape_duration_seconds",
    "scrape_samples_scraped",
    "scrape_samples_post_metric_relabeling",
}
# On Prometheus' and Alertmanager's own pages: see integration/stack/test_prometheus_config.py.
PLATFORM = {
    "alertmanager_config_last_reload_successful",
    # prometheus_client's own of the observer process, under a prefix
    "llm_worker_observer_process_resident_memory_bytes",
    "alertmanager_notifications_failed_total",
    "prometheus_config_last_reload_successful",
    "prometheus_notifications_alertmanagers_discovered",
    "prometheus_notifications_dropped_total",
    "prometheus_notifications_errors_total",
    "prometheus_rule_evaluation_failures_total",
    "prometheus_target_scrapes_exceeded_body_size_limit_total",
    "prometheus_target_scrapes_exceeded_sample_limit_total",
}
KEYWORDS = {"and", "or", "unless", "bool", "offset", "start", "end", "atan2"}


@dataclass(frozen=True)
class Rule:
    """One rule of a rule file, recording or alerting."""

    file: str
    body: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.body.get("alert") or self.body["record"])

    @property
    def expr(self) -> str:
        return str(self.body["expr"])

    def __str__(self) -> str:
        return self.name + "".join(
            f"-{self.body['labels'][k]}" for k in ("source",) if k in self.body.get("labels", {})
        )


def rules(kind: str) -> list[Rule]:
    """Every rule of a kind, ``alert`` or ``record``, in file order."""
    return [
        Rule(path.name, body)
        for path in sorted((PROMETHEUS / "rules").glob("*.yml"))
        for group in yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]
        for body in group["rules"]
        if kind in body
    ]


ALERTS = rules("alert")
RECORDS = rules("record")


@functools.cache
def promtool_tests() -> list[dict[str, Any]]:
    """Every test group of every promtool file."""
    return [
        group
        for path in sorted((PROMETHEUS / "tests").glob("*.test.yml"))
        for group in yaml.safe_load(path.read_text(encoding="utf-8"))["tests"]
    ]


def seconds(duration: str) -> int:
    """A Prometheus duration such as 1h5m10s, in seconds."""
    units = {"h": 3600, "m": 60, "s": 1}
    return sum(int(number) * units[unit] for number, unit in re.findall(r"(\d+)([hms])", duration))


@dataclass(frozen=True)
class Selector:
    """A metric and the label names and matchers it is asked with."""

    metric: str
    matchers: tuple[tuple[str, str, str], ...]


def selectors(expr: str) -> Iterator[Selector]:
    """The series a PromQL expression asks for. Enough of the grammar for what is written here."""
    text = re.sub(r"#.*", "", expr)
    text = re.sub(r"\[[^\]]*\]", "", text)
    text = re.sub(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", " ", text)
    text = re.sub(r"(?<![\w:])\{[^}]*\}", " ", text)  # {job="vllm"}: any metric
    pattern = r'([a-zA-Z_:][\w:]*)\s*(\{(?:[^}"]|"(?:[^"\\]|\\.)*")*\})?\s*(\()?'
    # A number such as 1e3 or 5m must not look like a name.
    for match in re.finditer(pattern, re.sub(r"\b\d[\w.]*", "0", text)):
        name, braces, call = match.groups()
        if call or name in KEYWORDS:
            continue
        matchers = re.findall(r'(\w+)\s*(=~|!~|!=|=)\s*"((?:[^"\\]|\\.)*)"', braces or "")
        yield Selector(name, tuple(matchers))


def grouping_labels(expr: str) -> set[str]:
    """Every label name in a by, without, on or group clause."""
    clauses = re.findall(r"\b(?:by|without|on|ignoring|group_\w+)\s*\(([^)]*)\)", expr)
    return {label.strip() for clause in clauses for label in clause.split(",") if label.strip()}


@functools.cache
def vllm_samples() -> dict[str, set[str]]:
    """Sample name to label names, over every page recorded from vLLM."""
    found: dict[str, set[str]] = {}
    for path in sorted(FIXTURES.glob("vllm*/*.prom")):
        for family in text_string_to_metric_families(path.read_text(encoding="utf-8")):
            for sample in family.samples:
                found.setdefault(sample.name, set()).update(sample.labels)
    assert "vllm:num_requests_running" in found, f"nothing recorded under {FIXTURES}"
    return found


@functools.cache
def worker_samples() -> dict[str, set[str]]:
    """The same for our own metrics, from their declarations."""
    registry = CollectorRegistry()
    declared = worker_metrics.Metrics(registry)
    suffixes = {
        "counter": ("_total",),
        "histogram": ("_bucket", "_sum", "_count"),
        "gauge": ("",),
    }
    families: list[tuple[str, str, Iterable[str]]] = [
        (kv_metrics.PREFIX + family.name.removesuffix("_total"), family.type, family.labels)
        for family in kv_metrics.FAMILIES
    ]
    for collector in vars(declared).values():
        if not hasattr(collector, "_labelnames"):
            continue
        described: Metric = next(iter(collector.describe()))
        families.append((described.name, described.type, collector._labelnames))
    found: dict[str, set[str]] = {}
    for name, type_, labels in families:
        for suffix in suffixes[type_]:
            found[name + suffix] = set(labels) | ({"le"} if suffix == "_bucket" else set())
    assert "llm_worker_requests_ended_total" in found
    return found


def known_metrics() -> set[str]:
    recorded = {rule.name for rule in RECORDS}
    return {*vllm_samples(), *worker_samples(), *SYNTHETIC, *PLATFORM, *recorded}


@pytest.mark.parametrize("rule", [*ALERTS, *RECORDS], ids=str)
def test_every_metric_in_a_rule_exists(rule: Rule) -> None:
    """A name that nobody exposes matches nothing and stays silent for ever."""
    asked = {selector.metric for selector in selectors(rule.expr)} - {"vector"}
    unknown = asked - known_metrics()
    assert not unknown
    assert asked or rule.name == "Watchdog", "the reader of expressions found nothing"


@pytest.mark.parametrize("rule", [*ALERTS, *RECORDS], ids=str)
def test_every_matcher_in_a_rule_can_match(rule: Rule) -> None:
    """Its label is on the metric, and its value in the closed set that the label has."""
    closed = {
        "llm_worker_state": {"state": set(worker_metrics.STATES)},
        "llm_worker_last_exit_timestamp_seconds": {"reason": set(RUN_ENDINGS)},
        "llm_worker_requests_ended_total": {
            "outcome": {outcome for outcome, _ in worker_metrics.ENDINGS},
            "reason": {reason for _, reason in worker_metrics.ENDINGS},
        },
        "vllm:request_success_total": {
            "finished_reason": {"stop", "length", "abort", "error", "repetition"}
        },
        "vllm:engine_sleep_state": {"sleep_state": {"awake", "weights_offloaded", "discard_all"}},
        "vllm:prompt_tokens_by_source_total": {
            "source": {"local_compute", "local_cache_hit", "external_kv_transfer"}
        },
        "llm_worker_kv_batches_total": {"outcome": set(kv_metrics.BATCH_OUTCOMES)},
        "llm_worker_kv_source_stale": {"reason": set(kv_stats.STALE_REASONS)},
        "llm_worker_kv_fleet_workers": {"health": set(kv_metrics.WORKER_HEALTH)},
    }
    labels = {**vllm_samples(), **worker_samples()}
    for selector in selectors(rule.expr):
        for label, operator, value in selector.matchers:
            if label in {"job", "instance"}:
                continue
            assert label in labels[selector.metric], f"{selector.metric} has no label {label}"
            allowed = closed.get(selector.metric, {}).get(label)
            if allowed is not None and operator in {"=", "=~"}:
                assert set(value.split("|")) <= allowed


def test_a_share_over_a_bound_asks_for_a_bound_that_the_histogram_has() -> None:
    """`le="2.0"` of a histogram without that bucket is empty, and its alert silent for ever."""
    bounds = {"llm_worker_kv_lag_seconds": kv_stats.LAG_SECONDS_BUCKETS}
    asked = [
        match.groups()
        for rule in (*ALERTS, *RECORDS)
        for match in re.finditer(r'([\w:]+)_bucket\{[^}]*le="([^"]+)"', rule.expr)
    ]
    assert asked
    for histogram, bound in asked:
        assert bound in {str(float(known)) for known in bounds[histogram]}, histogram


@pytest.mark.parametrize("rule", [*ALERTS, *RECORDS], ids=str)
def test_every_grouping_label_exists(rule: Rule) -> None:
    """`by (enigne)` is no error to Prometheus; it groups by nothing."""
    target_labels = {"job", "instance", "environment", "role", "team"}
    known = {"alertmanager", "state", *target_labels}
    for labels in (*vllm_samples().values(), *worker_samples().values()):
        known |= labels
    assert grouping_labels(rule.expr) <= known


@pytest.mark.parametrize("rule", [*ALERTS, *RECORDS], ids=str)
def test_rates_are_taken_of_counters_only(rule: Rule) -> None:
    """A counter without its _total is empty; the rate of a gauge is noise."""
    for name in re.findall(r"\b(?:rate|irate|increase|resets)\s*\(\s*([\w:]+)", rule.expr):
        assert name.endswith(("_total", "_count", "_sum", "_bucket")), name


@pytest.mark.parametrize("rule", ALERTS, ids=str)
def test_every_alert_says_who_acts_and_where_to_read_on(rule: Rule) -> None:
    """Severity routes it; the summary groups, so it is static; the rest is for the person."""
    labels, annotations = rule.body["labels"], rule.body["annotations"]
    assert re.fullmatch(r"[A-Z][A-Za-z0-9]+", rule.name)
    assert labels["severity"] in SEVERITIES
    assert set(annotations) == {"summary", "description", "runbook_url"}
    assert "{{" not in annotations["summary"]
    assert annotations["summary"].endswith(".")
    assert annotations["runbook_url"] == f"{RUNBOOKS}/{rule.name}.md"
    if rule.name != "Watchdog":
        assert "{{ $labels." in annotations["description"]


@pytest.mark.parametrize("rule", ALERTS, ids=str)
def test_an_alert_names_in_its_text_only_labels_it_can_have(rule: Rule) -> None:
    """Static labels of the rule itself are not in $labels: they would print as nothing."""
    used = set(re.findall(r"\$labels\.(\w+)", rule.body["annotations"]["description"]))
    assert not used & set(rule.body["labels"])


@pytest.mark.parametrize("rule", ALERTS, ids=str)
def test_every_alert_is_proven_by_promtool_to_be_silent_and_then_to_fire(rule: Rule) -> None:
    """In one test group: silent first, firing later, with the labels of this very rule."""
    proven = False
    for group in promtool_tests():
        checks = [c for c in group.get("alert_rule_test", []) if c["alertname"] == rule.name]
        firing = [
            seconds(check["eval_time"])
            for check in checks
            if any(
                alert["exp_labels"].items() >= rule.body["labels"].items()
                for alert in check["exp_alerts"]
            )
        ]
        silent = [seconds(check["eval_time"]) for check in checks if not check["exp_alerts"]]
        if firing and (rule.name == "Watchdog" or (silent and min(silent) < max(firing))):
            proven = True
    assert proven


@pytest.mark.parametrize("rule", [r for r in ALERTS if "for" in r.body], ids=str)
def test_the_patience_of_every_alert_is_tested(rule: Rule) -> None:
    """A silent check lies within `for` before a firing one: shortening `for` breaks the test."""
    patience, labels = seconds(rule.body["for"]), rule.body["labels"].items()
    for group in promtool_tests():
        checks = [c for c in group.get("alert_rule_test", []) if c["alertname"] == rule.name]
        silent = [seconds(check["eval_time"]) for check in checks if not check["exp_alerts"]]
        for check in checks:
            fires = seconds(check["eval_time"])
            ours = any(a["exp_labels"].items() >= labels for a in check["exp_alerts"])
            if ours and any(fires - patience < time < fires for time in silent):
                return
    pytest.fail(f"no test of {rule.name} is silent less than {patience} s before it fires")


@pytest.mark.parametrize("rule", RECORDS, ids=str)
def test_every_recording_rule_is_tested_with_numbers(rule: Rule) -> None:
    """A promtool expression test asks for it and expects a value."""
    assert re.fullmatch(r"[a-z_]+:[a-z0-9_]+:[a-z0-9_]+", rule.name), "level:metric:operations"
    assert any(
        rule.name in check["expr"] and check["exp_samples"]
        for group in promtool_tests()
        for check in group.get("promql_expr_test", [])
    )


@pytest.mark.parametrize("name", sorted({rule.name for rule in ALERTS}))
def test_every_alert_has_a_runbook_of_four_parts(name: str) -> None:
    """Meaning, Impact, Diagnosis, Mitigation, in this order, none of them empty."""
    text = (PROMETHEUS / "runbooks" / f"{name}.md").read_text(encoding="utf-8")
    assert text.startswith(f"# {name}\n")
    title, *parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    assert title.strip() == f"# {name}"
    assert parts[::2] == HEADINGS
    assert all(len(part.strip()) > 20 for part in parts[1::2])


def test_every_runbook_belongs_to_an_alert() -> None:
    """A runbook whose alert is gone is read by nobody and trusted by somebody."""
    found = {path.stem for path in (PROMETHEUS / "runbooks").glob("*.md")}
    assert found == {rule.name for rule in ALERTS}


@pytest.mark.parametrize(
    "path", sorted((PROMETHEUS / "runbooks").glob("*.md")), ids=lambda p: p.stem
)
def test_a_runbook_asks_only_for_metrics_that_exist_and_links_only_to_files(path: Path) -> None:
    """At three in the morning an empty query means that all is well."""
    text = path.read_text(encoding="utf-8")
    for block in re.findall(r"```promql\n(.*?)```", text, re.DOTALL):
        for query in block.strip().splitlines():
            asked = {selector.metric for selector in selectors(query)} - {"__name__"}
            assert asked <= known_metrics(), query
    for link in re.findall(r"\]\(([^)]+\.md)\)", text):
        assert (path.parent / link).exists(), link


@pytest.mark.parametrize("folder", ["rules", "tests", "runbooks"])
def test_what_was_begun_is_filled_in(folder: str) -> None:
    """scripts/new-alert leaves TODO where somebody has to write."""
    begun = [
        f"{path.name}:{number}"
        for path in sorted((PROMETHEUS / folder).iterdir())
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if "TODO" in line
    ]
    assert not begun


def test_alert_limits_follow_the_scrape_limits() -> None:
    """ScrapeSlow and CardinalityHigh warn at 0.8 of what prometheus.yml allows."""
    settings = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text(encoding="utf-8"))["global"]
    exprs = {rule.name: rule.expr for rule in ALERTS}
    timeout = seconds(settings["scrape_timeout"])
    assert f"> {0.8 * timeout:g}" in exprs["ScrapeSlow"]
    assert f"> {0.8 * settings['sample_limit']:.0f}" in exprs["CardinalityHigh"]


def test_every_job_is_watched_by_exactly_one_alert() -> None:
    """A job is serving (TargetDown), a part of the stack (ExporterDown), or Alertmanager."""
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text(encoding="utf-8"))
    jobs = {job["job_name"] for job in config["scrape_configs"]}
    exprs = {rule.name: rule.expr for rule in ALERTS}
    exporters = set(re.search(r'job=~"([^"]+)"', exprs["ExporterDown"])[1].split("|"))  # type: ignore[index]
    assert exporters | {"alertmanager", "worker", "vllm"} == jobs
    for name in ("TargetDown", "TargetGone", "TargetsMissing", "Flapping"):
        (excluded,) = set(re.findall(r'job!~"([^"]+)"', exprs[name]))
        assert set(excluded.split("|")) == exporters | {"alertmanager"}


def test_and_and_unless_say_what_they_match_on() -> None:
    """`and` between differently labelled sides matches nothing: the labels are written out."""
    for rule in ALERTS:
        for match in re.finditer(r"\b(and|unless)\b(?!\s+on\s*\()", re.sub(r"#.*", "", rule.expr)):
            pytest.fail(f"{rule.name}: {rule.expr[match.start() :][:60]!r}")
