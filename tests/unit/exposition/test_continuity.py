"""Counters that go on where an earlier process stopped."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.parser import text_string_to_metric_families

from llm_worker.exposition.continuity import Continued, Total
from llm_worker.exposition.exposition import Exposition
from llm_worker.metrics import ExporterMetrics


class Life:
    """One process's life: its metrics, and its page."""

    def __init__(self, before: list[Total] | None = None) -> None:
        registry = CollectorRegistry()
        self.batches = Counter("batches", "Batches.", ["rank"], registry=registry)
        self.lag = Histogram("lag_seconds", "Lag.", buckets=(1, 10), registry=registry)
        self.held = Gauge("held", "Held.", registry=registry)
        self.continued = Continued(before or [])
        self.checkpoints: list[list[Total]] = []
        self.exposition = Exposition(
            ExporterMetrics(CollectorRegistry()),
            {"llm_namespace": "n"},
            continued=self.continued,
            on_page=lambda: self.checkpoints.append(self.continued.shown()),
        )
        self.exposition.register("mine", registry, go_on=True)

    def page(self, accept: str | None = None) -> dict[tuple[str, str], float]:
        body = self.exposition.render(accept).body.decode()
        return {
            (sample.name, sample.labels.get("rank", sample.labels.get("le", ""))): sample.value
            for family in text_string_to_metric_families(body)
            for sample in family.samples
        }


def sources(life: Life, what: str) -> dict[str, float]:
    """What the page says of each source."""
    return {
        sample.labels["source"]: sample.value
        for family in text_string_to_metric_families(life.exposition.render().body.decode())
        for sample in family.samples
        if sample.name == f"llm_worker_exporter_source_{what}"
    }


def test_counters_and_histograms_go_on_and_gauges_do_not() -> None:
    """A process that is started again adds to what the one before has shown."""
    first = Life()
    first.batches.labels("0").inc(5)
    first.lag.observe(0.5)
    first.lag.observe(5)
    first.held.set(7)
    first.page()
    second = Life(first.checkpoints[-1])
    second.batches.labels("0").inc(2)
    second.lag.observe(50)
    second.page()
    page = second.page()
    assert page["batches_total", "0"] == 7
    assert [page["lag_seconds_bucket", bound] for bound in ("1.0", "10.0", "+Inf")] == [1, 2, 3]
    assert page["lag_seconds_count", ""] == 3
    assert page["lag_seconds_sum", ""] == 55.5
    assert page["held", ""] == 0
    assert page["llm_worker_exporter_render_seconds_count", ""] >= 1


def test_a_series_that_the_new_process_has_not_met_yet_does_not_vanish() -> None:
    """And it goes on when it is met, over any number of lives."""
    first = Life()
    first.batches.labels("1").inc(3)
    first.page()
    second = Life(first.checkpoints[-1])
    assert second.page()["batches_total", "1"] == 3
    third = Life(second.checkpoints[-1])
    third.batches.labels("1").inc()
    assert third.page()["batches_total", "1"] == 4


def test_what_was_counted_and_never_read_is_kept_from_the_start() -> None:
    """A process that dies before its first page hands on what it was given."""
    before: list[Total] = [("batches", "batches_total", {"rank": "0"}, 9.0)]
    assert [total for total in Life(before).continued.shown() if total[0] == "batches"] == before


def test_no_page_ever_shows_less_than_one_before_it() -> None:
    """The checkpoint is made before the page is handed out, in both formats."""
    before: list[Total] = []
    last: dict[tuple[str, str], float] = {}
    for life in range(6):
        process = Life(before)
        for step in range(4):
            process.batches.labels(str(step % 2)).inc(life + 1)
            process.lag.observe(step)
            page = process.page("application/openmetrics-text" if step % 2 else None)
            for key, value in last.items():
                if key[0].endswith(("_total", "_bucket", "_count")):
                    assert page.get(key, 0) >= value, key
            last = page
        before = process.checkpoints[-1]
        process.batches.labels("0").inc(100)  # never shown: lost with the process
    assert last["batches_total", "0"] + last["batches_total", "1"] == 4 * sum(range(1, 7))


def test_what_other_processes_published_is_not_added_twice() -> None:
    """Serving's own counters go on by themselves: only ours are continued."""
    serving = Exposition(ExporterMetrics(CollectorRegistry()))
    registry = CollectorRegistry()
    Counter("served", "Served.", registry=registry).inc(4)
    serving.register("vllm", registry)
    published = serving.publish()
    before: list[Total] = []
    for _ in range(3):
        life = Life(before)
        life.exposition.register_published("serving", lambda: published)
        page: dict[Any, float] = life.page()
        before = life.checkpoints[-1]
    assert page["served_total", ""] == 4
    assert sources(life, "up") == {"mine": 1, "serving": 1, "vllm": 1}
    body = life.exposition.render().body.decode()
    assert body.count("# TYPE llm_worker_exporter_source_up gauge") == 1


def test_a_family_without_a_sample_is_announced_all_the_same() -> None:
    """Whoever looks for a metric whose feature is off finds its name and what it would say."""
    serving = Exposition(ExporterMetrics(CollectorRegistry()))
    registry = CollectorRegistry()
    Counter("unused", "Nobody counts here.", ["kind"], registry=registry)
    serving.register("vllm", registry)
    life = Life()
    life.exposition.register_published("serving", serving.publish)
    for accept in (None, "application/openmetrics-text; version=1.0.0"):
        body = life.exposition.render(accept).body.decode()
        assert "# HELP unused" in body
        assert "Nobody counts here." in body


def test_a_publisher_that_fell_silent_costs_its_families_and_is_told() -> None:
    """Absent, not frozen; and before it has said a word, it is neither up nor down."""
    life = Life()
    answers: list[Any] = [None, RuntimeError("serving last published 9 s ago")]

    def read() -> Any:
        if isinstance(answers[0], Exception):
            raise answers[0]
        return answers[0]

    life.exposition.register_published("serving", read)
    assert "serving" not in sources(life, "up")
    answers.pop(0)
    assert sources(life, "up")["serving"] == 0
    assert sources(life, "errors_total")["serving"] == 2
