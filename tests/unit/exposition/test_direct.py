"""Reading prometheus_client's metrics without collect() gives the page that collect() gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, Summary

from llm_worker.exposition import direct
from llm_worker.exposition.exposition import Exposition
from llm_worker.metrics import Metrics

FORMATS = ("text/plain", "application/openmetrics-text")


class ByCollect:
    """A registry of which nothing but ``collect()`` is known."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry

    def collect(self) -> Iterable[Metric]:
        return self.registry.collect()


def page_of(source: Any, accept: str, **how: Any) -> str:
    exposition = Exposition(Metrics(CollectorRegistry()), {"llm_namespace": "test"})
    exposition.register("it", source, **how)
    return without_own(exposition.render(accept).body.decode())


def without_own(page: str) -> str:
    return "\n".join(line for line in page.splitlines() if "llm_worker_exporter" not in line)


def assert_same_pages(registry: CollectorRegistry, **how: Any) -> None:
    for accept in FORMATS:
        assert page_of(registry, accept, **how) == page_of(ByCollect(registry), accept, **how)


def metrics_of(registry: CollectorRegistry) -> tuple[Counter, Gauge, Histogram]:
    counter = Counter("served", 'With "quotes" and \\', ["model", "reason"], registry=registry)
    gauge = Gauge("held_bytes", "Held.\nNow.", ["model"], unit="bytes", registry=registry)
    histogram = Histogram(
        "took_seconds", "Took.", ["model"], buckets=(0.1, 1, 2.5), registry=registry
    )
    return counter, gauge, histogram


NAMES = st.sampled_from(["", "a", 'b"\\\n', "ü", "\ud800", "\udc00"])
VALUES = st.floats(allow_nan=True, allow_infinity=True)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("count"), NAMES, NAMES, st.floats(0, 1e18)),
        st.tuples(st.just("set"), NAMES, NAMES, VALUES),
        st.tuples(st.just("observe"), NAMES, NAMES, VALUES),
        st.tuples(st.just("remove"), NAMES, NAMES, VALUES),
        st.tuples(st.just("reset"), NAMES, NAMES, VALUES),
        st.tuples(st.just("render"), NAMES, NAMES, VALUES),
    ),
    max_size=30,
)


@settings(max_examples=80, deadline=None)
@given(STEPS, st.sampled_from(["", "trtllm_"]))
def test_any_history_gives_the_page_that_collect_gives(
    steps: list[tuple[str, str, str, float]], prefix: str
) -> None:
    """Values, label sets that come, go and come back, and what a format forbids."""
    registry = CollectorRegistry()
    counter, gauge, histogram = metrics_of(registry)
    expositions = []
    for source in (registry, ByCollect(registry)):
        expositions.append(Exposition(Metrics(CollectorRegistry()), {"llm_namespace": "test"}))
        expositions[-1].register("it", source, add_prefix=prefix)
    actions: dict[str, Callable[[str, str, float], object]] = {
        "count": lambda a, b, value: counter.labels(a, b).inc(value),
        "set": lambda a, b, value: gauge.labels(a).set(value),
        "observe": lambda a, b, value: histogram.labels(a).observe(value),
        "remove": lambda a, b, value: [
            metric.remove(*(a, b)[: len(metric._labelnames)])
            for metric in (counter, gauge, histogram)
        ],
        "reset": lambda a, b, value: counter.labels(a, b).reset(),
        "render": lambda a, b, value: None,
    }
    for action, first, second, value in [*steps, ("render", "", "", 0.0)]:
        actions[action](first, second, value)
        if action == "render":
            for accept in FORMATS:
                ours, theirs = (
                    without_own(exposition.render(accept).body.decode())
                    for exposition in expositions
                )
                assert ours == theirs


def test_the_common_case_never_collects(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would be right, and slow."""
    registry = CollectorRegistry()
    counter, gauge, histogram = metrics_of(registry)
    counter.labels("a", "b").inc()
    gauge.labels("a").set(1)
    histogram.labels("a").observe(0.5)
    for metric in (counter, gauge, histogram):
        monkeypatch.setattr(metric, "collect", lambda: pytest.fail("collected"))
    for accept in FORMATS:
        page = page_of(registry, accept)
        assert 'served_total{llm_namespace="test",model="a",reason="b"} 1.0' in page
        assert 'took_seconds_bucket{le="1.0",llm_namespace="test",model="a"} 1.0' in page


def test_a_gauge_with_a_function_and_exemplars_and_summaries_are_shown_too() -> None:
    """What cannot be read directly is collected, beside what can."""
    registry = CollectorRegistry()
    counter, gauge, histogram = metrics_of(registry)
    gauge.labels("plain").set(2)
    gauge.labels("asked").set_function(lambda: 7)
    counter.labels("a", "b").inc(1, exemplar={"trace_id": "x"})
    histogram.labels("a").observe(0.5, exemplar={"trace_id": "y"})
    Summary("size", "Sizes.", registry=registry).observe(3)
    Gauge("alone", "Without labels.", registry=registry).set(4)
    Histogram("below", "Negative bounds.", buckets=(-1, 1), registry=registry).observe(0)
    assert_same_pages(registry)
    assert 'held_bytes{llm_namespace="test",model="asked"} 7.0' in page_of(registry, FORMATS[0])


def test_a_function_set_after_the_first_page_is_asked() -> None:
    """A cached text must not outlive the reason for it."""
    registry = CollectorRegistry()
    gauge = Gauge("depth", "Depth.", registry=registry)
    exposition = Exposition(Metrics(CollectorRegistry()))
    exposition.register("it", registry)
    gauge.set(1)
    assert b"depth 1.0" in exposition.render().body
    gauge.set_function(lambda: 2)
    assert b"depth 2.0" in exposition.render().body


def test_two_registries_with_one_family_are_merged_as_by_collect() -> None:
    """The second source finds the first one's text, and both label sets are shown."""
    pages: list[str] = []
    for wrap in (lambda registry: registry, ByCollect):
        exposition = Exposition(Metrics(CollectorRegistry()))
        for name in ("a", "b"):
            registry = CollectorRegistry()
            gauge = Gauge("depth", "Depth.", ["queue"], registry=registry)
            gauge.labels(name).set(1)
            gauge.labels("both").set(len(pages))
            exposition.register(name, wrap(registry))
        pages.append(exposition.render().body.decode())
    assert [line for line in pages[0].splitlines() if line.startswith("depth")] == [
        'depth{queue="a"} 1.0', 'depth{queue="both"} 0.0', 'depth{queue="b"} 1.0',
    ]  # fmt: skip


def test_include_and_exclude_hold_for_what_is_read_directly() -> None:
    """The filter is by the name on the page."""
    registry = CollectorRegistry()
    counter, _, _ = metrics_of(registry)
    counter.labels("a", "b").inc()
    assert_same_pages(registry, include=("served_total",))
    assert_same_pages(registry, exclude=("served", "took"))
    assert "served" not in page_of(registry, FORMATS[0], exclude=("served",))


def test_the_private_attributes_are_where_this_release_has_them() -> None:
    """An upgrade of prometheus_client that moves them is noticed here, not as a slow page."""
    registry = CollectorRegistry()
    for metric in metrics_of(registry):
        family = direct.Family(metric, "", {})
        metric.labels(*"ab"[: len(metric._labelnames)])
        lines, _ = family.lines(openmetrics=True)
        assert lines
    assert len(list(direct.collectors(registry))) == 3
