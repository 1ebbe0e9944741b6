"""The page: every source once, valid in both formats, whatever the sources do."""

from __future__ import annotations

import gzip
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Enum,
    Gauge,
    Histogram,
    Info,
    Metric,
    Summary,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as _parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Exemplar, Sample

from llm_worker.exposition.exposition import Exposition, Rendered
from llm_worker.exposition.negotiation import OPENMETRICS, TEXT
from llm_worker.metrics import Metrics
from support.waiting import until

ACCEPT_OPENMETRICS = "application/openmetrics-text; version=1.0.0"
# What Prometheus 3.5 sends.
PROMETHEUS_ACCEPT = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "application/openmetrics-text;version=0.0.1;q=0.5,"
    "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)
FORMATS = pytest.mark.parametrize("accept", [None, ACCEPT_OPENMETRICS], ids=["text", "openmetrics"])

type_of_labels = tuple[tuple[str, str], ...]


def parse_openmetrics(text: str) -> Iterable[Metric]:
    found: Iterable[Metric] = _parse_openmetrics(text)  # type: ignore[no-untyped-call]
    return found


class Families:
    """A source that shows what it is told to, and then perhaps fails."""

    def __init__(self, *families: Metric, error: Exception | None = None) -> None:
        self.families = families
        self.error = error

    def collect(self) -> Iterator[Metric]:
        yield from self.families
        if self.error is not None:
            raise self.error


def family(
    name: str, type_: str, samples: Iterable[Sequence[object]] = (), documentation: str = "What."
) -> Metric:
    made = Metric(name, documentation, type_)
    made.samples = [Sample(*sample) for sample in samples]  # type: ignore[arg-type]
    return made


class Own:
    """The four metrics an exposition writes, without the rest of ours."""

    def __init__(self) -> None:
        name = "llm_worker_exporter_"
        dropped = f"{name}families_dropped"
        self.exporter_source_up = Gauge(f"{name}source_up", "U.", ["source"], registry=None)
        self.exporter_source_errors_total = Counter(
            f"{name}source_errors", "E.", ["source"], registry=None
        )
        self.exporter_families_dropped_total = Counter(
            dropped, "D.", ["source", "reason"], registry=None
        )
        self.exporter_render_seconds = Histogram(f"{name}render_seconds", "R.", registry=None)


def exposition(**labels: str) -> Exposition:
    return Exposition(Own(), labels)


def parsed(page: Rendered) -> dict[str, Metric]:
    """The page's families by name; fails where a strict parser does, or one comes twice."""
    text = page.body.decode()
    strict = page.content_type == OPENMETRICS
    parse = parse_openmetrics if strict else text_string_to_metric_families
    families: dict[str, Metric] = {}
    for found in parse(text):
        assert found.name not in families, f"{found.name} is there twice"
        families[found.name] = found
    return families


def values(page: Rendered) -> dict[tuple[str, type_of_labels], float]:
    """Every series of the page and its value; fails on a series that comes twice."""
    found: dict[tuple[str, type_of_labels], float] = {}
    for shown in parsed(page).values():
        for sample in shown.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            assert key not in found, f"{key} is there twice"
            found[key] = sample.value
    return found


def value(page: Rendered, name: str, **labels: str) -> float:
    return values(page)[name, tuple(sorted(labels.items()))]


def dropped(page: Rendered, source: str, reason: str) -> float:
    return value(page, "llm_worker_exporter_families_dropped_total", source=source, reason=reason)


def up(page: Rendered, source: str) -> float:
    return value(page, "llm_worker_exporter_source_up", source=source)


def errors(page: Rendered, source: str) -> float:
    return value(page, "llm_worker_exporter_source_errors_total", source=source)


# --- sources ------------------------------------------------------------------------------------


@FORMATS
def test_include_and_exclude_prefixes_choose_the_families(accept: str | None) -> None:
    """Without include everything; exclude wins; a counter is known by its shown name, too."""
    registry = CollectorRegistry()
    Gauge("vllm:a", "A.", registry=registry)
    Gauge("vllm:b_secret", "B.", registry=registry)
    Counter("lmcache:hits", "C.", registry=registry)
    Gauge("python_x", "D.", registry=registry)
    page = exposition()
    page.register("all", registry, include=("vllm:", "lmcache:hits_total"), exclude=("vllm:b",))
    shown = {name for name in parsed(page.render(accept)) if not name.startswith("llm_worker")}
    shown = {name.removesuffix("_created") for name in shown}
    assert shown == {"vllm:a", "lmcache:hits"}


@FORMATS
def test_a_prefix_goes_before_every_name_and_a_states_label_follows_it(accept: str | None) -> None:
    """Names, sample names and a state set's own label are renamed together."""
    registry = CollectorRegistry()
    Counter("requests", "R.", registry=registry).inc(3)
    Enum("phase", "P.", states=["up", "down"], registry=registry).state("up")
    page = exposition()
    page.register("trtllm", registry, add_prefix="trtllm_")
    shown = page.render(accept)
    assert value(shown, "trtllm_requests_total") == 3
    assert value(shown, "trtllm_phase", trtllm_phase="up") == 1


@FORMATS
def test_source_labels_win_over_the_registrations_which_win_over_the_exporters(
    accept: str | None,
) -> None:
    """The nearer to the measurement, the stronger; nothing is overwritten or doubled."""
    registry = CollectorRegistry()
    Gauge("g", "G.", ["a"], registry=registry).labels("source").set(1)
    page = exposition(a="exporter", b="exporter", c="exporter")
    page.register("s", registry, labels={"a": "registration", "b": "registration"})
    assert value(page.render(accept), "g", a="source", b="registration", c="exporter") == 1


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("le", "choose another name"),
        ("quantile", "choose another name"),
        ("__name__", "drop the leading __"),
        ("0a", "use letters"),
        ("a-b", "use letters"),
        ("", "use letters"),
        ("é", "use letters"),
    ],
)
def test_a_label_that_would_break_series_is_refused_with_what_to_do(name: str, advice: str) -> None:
    """Both where the exporter's labels are given and where a source's are."""
    with pytest.raises(ValueError, match=advice):
        exposition(**{name: "x"})
    with pytest.raises(ValueError, match=advice):
        exposition().register("s", CollectorRegistry(), labels={name: "x"})


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        ({"include": "vllm:"}, r"write \('vllm:',\)"),
        ({"exclude": "vllm:"}, r"write \('vllm:',\)"),
        ({"include": ("",)}, "empty prefix"),
        ({"add_prefix": "9_"}, "cannot start a metric name"),
        ({"labels": {"a": 1}}, r"write str\(1\)"),
    ],
)
def test_a_wrong_registration_is_refused_with_what_to_do(
    arguments: dict[str, object], advice: str
) -> None:
    """No argument that cannot give a valid page gets in, and nothing is registered then."""
    page = exposition()
    with pytest.raises(ValueError, match=advice):
        page.register("s", CollectorRegistry(), **arguments)  # type: ignore[arg-type]
    page.register("s", CollectorRegistry())


def test_a_source_name_is_taken_once_and_free_again_after_unregister() -> None:
    """And an unregistered source is neither on the page nor `up`."""
    page = exposition()
    page.register("s", Families(family("g", "gauge", [("g", {}, 1.0)])))
    with pytest.raises(ValueError, match="registered already"):
        page.register("s", CollectorRegistry())
    assert up(page.render(), "s") == 1
    page.unregister("s")
    shown = page.render()
    assert "g" not in parsed(shown)
    assert b"source_up{" not in shown.body
    page.register("s", CollectorRegistry())
    with pytest.raises(KeyError):
        page.unregister("other")


# --- each family once ---------------------------------------------------------------------------


@FORMATS
def test_a_family_of_two_sources_is_on_the_page_once_with_the_series_of_both(
    accept: str | None,
) -> None:
    """Same name and type: merged; a series both have is the first source's, and is counted."""
    first = family("g", "gauge", [("g", {"x": "1"}, 1.0), ("g", {"x": "2"}, 2.0)])
    second = family("g", "gauge", [("g", {"x": "2"}, 20.0), ("g", {"x": "3"}, 30.0)])
    page = exposition()
    page.register("one", Families(first))
    page.register("two", Families(second))
    shown = page.render(accept)
    assert [s.value for s in parsed(shown)["g"].samples] == [1.0, 2.0, 30.0]
    assert dropped(shown, "two", "duplicate") == 1
    assert dropped(shown, "one", "duplicate") == 0
    assert up(shown, "two") == 1
    assert dropped(page.render(accept), "two", "duplicate") == 2


@FORMATS
def test_a_histogram_is_never_made_of_two_sources_buckets(accept: str | None) -> None:
    """What belongs together is taken from one source, even if the bounds differ."""
    page = exposition()
    for name, buckets in (("one", (1.0, 2.0)), ("two", (1.0, 5.0))):
        registry = CollectorRegistry()
        Histogram("h", "H.", buckets=buckets, registry=registry).observe(1.5)
        page.register(name, registry)
    shown = page.render(accept)
    bounds = [s.labels["le"] for s in parsed(shown)["h"].samples if s.name == "h_bucket"]
    assert bounds == ["1.0", "2.0", "+Inf"]
    assert dropped(shown, "two", "duplicate") == 1


@FORMATS
@pytest.mark.parametrize(
    ("first", "second"),
    [
        (family("x", "gauge", [("x", {}, 1.0)]), family("x", "counter", [("x_total", {}, 1.0)])),
        (
            family("x", "counter", [("x_total", {}, 1.0)]),
            family("x_total", "gauge", [("x_total", {}, 2.0)]),
        ),
        (
            family("x", "summary", [("x_count", {}, 1.0), ("x_sum", {}, 1.0)]),
            family("x_count", "gauge", [("x_count", {}, 2.0)]),
        ),
    ],
    ids=["same name", "a counter's sample name", "a summary's sample name"],
)
def test_of_two_types_for_one_name_the_first_stays(
    accept: str | None, first: Metric, second: Metric
) -> None:
    """Names that samples use count as names; the other family is left out and counted."""
    page = exposition()
    page.register("one", Families(first))
    page.register("two", Families(second))
    shown = page.render(accept)
    assert value(shown, first.samples[0].name) == 1.0
    assert dropped(shown, "two", "type_conflict") == 1
    assert up(shown, "two") == 1


@FORMATS
def test_samples_that_belong_together_stand_together(accept: str | None) -> None:
    """Some collectors show all sums first, then all buckets: OpenMetrics forbids it."""
    samples: list[tuple[str, dict[str, str], float]] = []
    samples += [("h_sum", {"x": x}, 1.0) for x in "ab"]
    samples += [("h_bucket", {"x": x, "le": "+Inf"}, 2.0) for x in "ab"]
    samples += [("h_count", {"x": x}, 2.0) for x in "ab"]
    page = exposition()
    page.register("files", Families(family("h", "histogram", samples)))
    shown = page.render(accept)
    assert [s.labels["x"] for s in parsed(shown)["h"].samples] == ["a"] * 3 + ["b"] * 3


def test_only_the_families_asked_for_are_shown_and_they_are_whole() -> None:
    """A bucket's name brings the histogram: parts of one are not valid OpenMetrics."""
    registry = CollectorRegistry()
    Histogram("h", "H.", registry=registry).observe(1)
    Counter("c", "C.", registry=registry).inc()
    Gauge("g", "G.", registry=registry)
    page = exposition()
    page.register("s", registry)
    shown = parsed(page.render(ACCEPT_OPENMETRICS, names=["h_bucket", "c_total"]))
    assert set(shown) == {"h", "c"}
    assert {s.name for s in shown["h"].samples} >= {"h_bucket", "h_count", "h_sum"}


# --- sources that fail --------------------------------------------------------------------------


@FORMATS
def test_a_source_that_raises_costs_nothing_but_its_own_families(accept: str | None) -> None:
    """The page that lacks them says so itself, and what came before the failure is complete."""
    whole = family("before", "histogram", [("before_bucket", {"le": "+Inf"}, 1.0)])
    good = family("good", "gauge", [("good", {}, 1.0)])
    page = exposition()
    page.register("bad", Families(whole, error=RuntimeError("gone")))
    page.register("fine", Families(good))
    shown = page.render(accept)
    assert value(shown, "good") == 1
    assert value(shown, "before_bucket", le="+Inf") == 1
    assert (up(shown, "bad"), errors(shown, "bad")) == (0, 1)
    assert (up(shown, "fine"), errors(shown, "fine")) == (1, 0)
    assert errors(page.render(accept), "bad") == 2


@FORMATS
def test_a_source_that_recovers_is_up_on_its_next_page(accept: str | None) -> None:
    """`source_up` is of this page; the error counter remembers."""
    source = Families(error=RuntimeError("gone"))
    page = exposition()
    page.register("s", source)
    assert up(page.render(accept), "s") == 0
    source.error = None
    shown = page.render(accept)
    assert (up(shown, "s"), errors(shown, "s")) == (1, 1)


def test_a_failure_is_logged_once_until_it_changes(caplog: pytest.LogCaptureFixture) -> None:
    """A scrape every ten seconds must not fill the log."""
    source = Families(error=RuntimeError("gone"))
    page = exposition()
    page.register("s", source)
    for _ in range(3):
        page.render()
    source.error = RuntimeError("otherwise")
    page.render()
    assert [r.getMessage() for r in caplog.records] == [
        "metrics source s: RuntimeError: gone",
        "metrics source s: RuntimeError: otherwise",
    ]


class _Raises:
    """A family whose samples fail halfway."""

    name = "halfway"
    documentation = "H."
    type = "gauge"
    unit = ""

    @property
    def samples(self) -> Iterator[Sample]:
        yield Sample("halfway", {}, 1.0)
        raise OSError("lost")


@FORMATS
@pytest.mark.parametrize(
    "bad",
    [
        family("b", "gauge", [("other", {}, 1.0)]),
        family("b", "counter", [("b", {}, 1.0)]),
        family("b", "gauge", [("b", {"__x": "1"}, 1.0)]),
        family("b", "gauge", [("b", {"": "1"}, 1.0)]),
        family("b", "gauge", [("b", {"a.b": "1", "a-b": "1"}, 1.0)]),
        family("b", "gauge", [("b", {"x": 1}, 1.0)]),
        family("b", "gauge", [("b", {"x": []}, 1.0)]),
        family("b", "gauge", [("b", None, 1.0)]),
        family("b", "gauge", [("b", {}, "many")]),
        family("b", "gauge", [("b", {}, None)]),
        family("b", "gauge", [("b", {}, 1.0, math.inf)]),
        family("b", "histogram", [("b_bucket", {}, 1.0)]),
        family("b", "histogram", [("b_bucket", {"le": "much"}, 1.0)]),
        family("b", "histogram", [("b_bucket", {"le": "1.0"}, 1.0)]),
        family("b", "histogram", [("b_count", {}, 1.0), ("b_sum", {}, 1.0)]),
        family("b", "histogram", [("b_bucket", {"le": "+Inf"}, 1.0), ("b_sum", {}, 1.0)]),
        family("b", "histogram", [("b_bucket", {"le": "+Inf"}, 0.5)]),
        family(
            "b",
            "histogram",
            [("b_bucket", {"le": "+Inf"}, 1.0), ("b_count", {}, 2.0), ("b_sum", {}, 1.0)],
        ),
        family(
            "b",
            "histogram",
            [("b_bucket", {"le": "1.0"}, 2.0), ("b_bucket", {"le": "+Inf"}, 1.0)],
        ),
        family(
            "b",
            "histogram",
            [("b_bucket", {"le": "+Inf"}, 1.0), ("b_bucket", {"le": "1.0"}, 1.0)],
        ),
        family("b", "summary", [("b", {"quantile": "2"}, 1.0)]),
        family("b", "summary", [("b", {}, 1.0)]),
        family("b", "info", [("b_info", {"v": "1"}, 2.0)]),
        family("b", "stateset", [("b", {"b": "on"}, 2.0)]),
        family("b", "stateset", [("b", {}, 1.0)]),
        _Raises(),
        "not a family",
        None,
    ],
)
def test_an_invalid_family_is_left_out_and_its_source_is_down(
    accept: str | None, bad: Metric
) -> None:
    """The source's other families stay, the page parses strictly, the counters tell."""
    good = family("good", "gauge", [("good", {}, 1.0)])
    page = exposition()
    page.register("s", Families(bad, good))
    shown = page.render(accept)
    assert value(shown, "good") == 1
    assert not {"b", "halfway"} & set(parsed(shown))
    assert (up(shown, "s"), errors(shown, "s")) == (0, 1)
    assert dropped(shown, "s", "invalid") == 1


@FORMATS
def test_one_wrong_histogram_does_not_take_its_family_along(accept: str | None) -> None:
    """Only the group of samples that is wrong is left out."""
    samples = [("h_bucket", {"x": x, "le": "+Inf"}, v) for x, v in (("a", 1.0), ("b", 0.5))]
    page = exposition()
    page.register("s", Families(family("h", "histogram", samples)))
    shown = page.render(accept)
    assert [s.labels["x"] for s in parsed(shown)["h"].samples] == ["a"]
    assert (up(shown, "s"), dropped(shown, "s", "invalid")) == (0, 1)


@pytest.mark.parametrize("observed", [-1.0, math.nan])
def test_what_only_openmetrics_forbids_is_missing_only_there(observed: float) -> None:
    """A negative or NaN observation takes the sum and count from that format, not the buckets."""
    registry = CollectorRegistry()
    histogram = Histogram("h", "H.", buckets=(1.0,), registry=registry)
    histogram.observe(observed)
    summary = Summary("s", "S.", registry=registry)
    summary.observe(observed)
    counter = Families(family("c", "counter", [("c_total", {}, observed)]))
    page = exposition()
    page.register("client", registry)
    page.register("custom", counter)
    text, strict = page.render(), page.render(ACCEPT_OPENMETRICS)
    assert value(text, "h_sum") == pytest.approx(observed, nan_ok=True)
    assert value(text, "c_total") == pytest.approx(observed, nan_ok=True)
    names = {name for name, _ in values(strict)}
    assert {"h_bucket", "s_count"} <= names
    assert not {"h_sum", "h_count", "s_sum", "c_total"} & names
    assert dropped(strict, "client", "invalid") == 2
    assert dropped(strict, "custom", "invalid") == 1
    assert up(strict, "client") == 1


# --- what the formats say -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        (None, TEXT),
        ("", TEXT),
        ("*/*", TEXT),
        ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", TEXT),
        ("text/plain", TEXT),
        (PROMETHEUS_ACCEPT, OPENMETRICS),
        ("application/openmetrics-text", OPENMETRICS),
        ("Application/OpenMetrics-Text; version=1.0.0; charset=utf-8", OPENMETRICS),
        ("application/openmetrics-text;version=0.0.1", TEXT),
        ("application/openmetrics-text;version=2.0.0", TEXT),
        ("application/openmetrics-text;q=0.1,text/plain;q=0.9", TEXT),
        ("text/plain;q=0.1,application/openmetrics-text;q=0.9", OPENMETRICS),
        ("text/plain,application/openmetrics-text", TEXT),
        ("application/openmetrics-text,text/plain", OPENMETRICS),
        ("application/openmetrics-text;q=0,*/*", TEXT),
        ("application/openmetrics-text;q=0.5,*/*;q=0.1", OPENMETRICS),
        ("application/openmetrics-text;q=x", TEXT),
        ("application/json", TEXT),
    ],
)
def test_the_scraper_gets_the_format_it_prefers(accept: str | None, expected: str) -> None:
    """Qualities and versions count; who asks for nothing we know gets the text format."""
    shown = exposition().render(accept)
    assert shown.content_type == expected
    assert shown.body.endswith(b"# EOF\n") == (expected == OPENMETRICS)
    parsed(shown)


@pytest.mark.parametrize(
    ("accept_encoding", "compressed"),
    [
        (None, False),
        ("identity", False),
        ("gzip", True),
        ("deflate, gzip;q=0.5", True),
        ("gzip;q=0", False),
        ("*", True),
        ("gzip;q=0,*", False),
    ],
)
def test_the_page_is_compressed_when_asked(accept_encoding: str | None, compressed: bool) -> None:
    """Never otherwise, and it is the same page."""
    page = exposition()
    page.register("s", Families(family("g", "gauge", [("g", {}, 1.0)])))
    shown = page.render(None, accept_encoding)
    assert shown.content_encoding == ("gzip" if compressed else None)
    body = gzip.decompress(shown.body) if compressed else shown.body
    assert b"\ng 1.0\n" in body


@FORMATS
def test_vllms_histogram_that_is_named_like_a_counter_stays_a_histogram(
    accept: str | None,
) -> None:
    """`vllm:iteration_tokens_total` keeps its name and its buckets in both formats."""
    registry = CollectorRegistry()
    tokens = Histogram(
        "vllm:iteration_tokens_total", "T.", ["model_name"], buckets=(1, 8), registry=registry
    )
    tokens.labels("m").observe(5)
    page = exposition()
    page.register("vllm", registry)
    shown = page.render(accept)
    assert parsed(shown)["vllm:iteration_tokens_total"].type == "histogram"
    assert value(shown, "vllm:iteration_tokens_total_bucket", model_name="m", le="8.0") == 1
    assert value(shown, "vllm:iteration_tokens_total_count", model_name="m") == 1


def client_registry() -> CollectorRegistry:
    """One of everything prometheus_client has, with text that needs escaping."""
    registry = CollectorRegistry()
    awkward = 'a "quoted" \\ and\nbroken {value="x"} # é'
    Gauge("g", awkward, ["x"], registry=registry).labels(awkward).set(-1.5)
    Gauge("plain", "P.", registry=registry).set(math.inf)
    Gauge("nan", "N.", registry=registry).set(math.nan)
    Gauge("memory", "M.", unit="bytes", registry=registry).set(123456789012)
    counter = Counter("c", "C.", ["x"], registry=registry)
    counter.labels("").inc(1e16)
    counter.labels("b").inc(0.1)
    Histogram("h", "H.", ["x"], registry=registry).labels("1").observe(0.3)
    Summary("s", "S.", registry=registry).observe(2)
    Info("i", "I.", registry=registry).info({"version": awkward})
    Enum("e", "E.", states=["a", "b"], registry=registry).state("b")
    Gauge("childless", "No samples yet.", ["x"], registry=registry)
    return registry


@FORMATS
def test_the_page_says_what_prometheus_clients_own_would(accept: str | None) -> None:
    """Same families, types, texts and samples as its encoder gives, for every type it has."""
    registry = client_registry()
    page = exposition()
    page.register("client", registry)
    shown = parsed(page.render(accept))
    if accept is None:
        theirs = {
            f.name: f for f in text_string_to_metric_families(generate_latest(registry).decode())
        }
    else:
        from prometheus_client.openmetrics.exposition import generate_latest as encode

        text = encode(registry).decode()  # type: ignore[no-untyped-call]
        theirs = {f.name: f for f in parse_openmetrics(text)}
    assert set(theirs) == {name for name in shown if not name.startswith("llm_worker")}
    for name, expected in theirs.items():
        found = shown[name]
        assert (found.type, found.documentation, found.unit) == (
            expected.type,
            expected.documentation,
            expected.unit,
        )
        assert [str(s) for s in found.samples] == [str(s) for s in expected.samples]


def test_times_are_seconds_in_openmetrics_and_milliseconds_in_text() -> None:
    """And samples that belong together must be of one time."""
    timed = GaugeMetricFamily("g", "G.", labels=["x"])
    timed.add_metric(["a"], 1.0, timestamp=1700000000.5)
    mixed = family("h", "histogram", [("h_bucket", {"le": "+Inf"}, 1.0, 5.0)])
    mixed.samples.append(Sample("h_created", {}, 1.0))
    page = exposition()
    page.register("s", Families(timed, mixed))
    assert b'g{x="a"} 1.0 1700000000500\n' in page.render().body
    strict = page.render(ACCEPT_OPENMETRICS)
    assert b'g{x="a"} 1.0 1700000000.5\n' in strict.body
    assert "h" not in parsed(strict)
    assert up(strict, "s") == 0


def test_exemplars_are_shown_in_openmetrics_only() -> None:
    """One that is too long for the format is left out; its sample stays."""
    made = CounterMetricFamily("c", "C.", labels=["x"])
    for label, trace in (("a", "abc"), ("b", "z" * 200)):
        made.add_metric([label], 1.0)
        made.samples[-1] = made.samples[-1]._replace(exemplar=Exemplar({"trace": trace}, 1.0))
    page = exposition()
    page.register("s", Families(made))
    assert b'c_total{x="a"} 1.0\n' in page.render().body
    strict = page.render(ACCEPT_OPENMETRICS)
    first, second = parsed(strict)["c"].samples
    assert first.exemplar == Exemplar({"trace": "abc"}, 1.0)
    assert second.exemplar is None


@FORMATS
def test_names_the_formats_cannot_spell_are_escaped(accept: str | None) -> None:
    """Dots become underscores, as a scraper without UTF-8 names would ask for."""
    made = family("my.metric", "counter", [("my.metric_total", {"a.b": "x"}, 1.0)])
    page = exposition()
    page.register("s", Families(made))
    assert value(page.render(accept), "my_metric_total", a_b="x") == 1


@FORMATS
def test_text_that_is_no_unicode_costs_a_character_and_not_the_page(accept: str | None) -> None:
    """A lone surrogate, as from a file name in another encoding, cannot be encoded."""
    made = family("g", "gauge", [("g", {"file": "a\udc80b"}, 1.0)], documentation="\udc80")
    page = exposition(host="h\udc81")
    page.register("s", Families(made))
    assert value(page.render(accept), "g", file="a?b", host="h?") == 1


@FORMATS
def test_series_that_come_and_go_are_shown_as_they_are(accept: str | None) -> None:
    """What is remembered from page to page never shows, and does not grow without end."""
    source = Families()
    page = exposition()
    page.register("s", source)
    for round_ in range(300):
        source.families = (
            family("g", "gauge", [("g", {"x": str(round_)}, float(round_))]),
            family("h", "gauge" if round_ % 2 else "counter", []),
        )
        shown = parsed(page.render(accept))
        assert [(s.labels["x"], s.value) for s in shown["g"].samples] == [
            (str(round_), float(round_))
        ]
    remembered = page._sources["s"].layouts
    assert sum(len(layouts) for layouts in remembered.values()) < 100
    assert len(remembered) == 2


# --- the page about itself ----------------------------------------------------------------------


@FORMATS
def test_the_exporters_own_metrics_are_on_every_page_once(accept: str | None) -> None:
    """Even if their registry is a source, or none is, and with the constant labels."""
    registry = CollectorRegistry()
    page = Exposition(Metrics(registry), {"llm_namespace": "n"})
    assert "llm_worker_exporter_render_seconds" in parsed(page.render(accept))
    page.register("llm_worker", registry)
    page.register("bad", Families(error=RuntimeError("gone")))
    shown = page.render(accept)
    assert value(shown, "llm_worker_exporter_source_up", source="bad", llm_namespace="n") == 0
    assert value(shown, "llm_worker_exporter_source_up", source="llm_worker", llm_namespace="n")
    assert (
        dict(values(shown))[
            "llm_worker_exporter_families_dropped_total",
            (("llm_namespace", "n"), ("reason", "duplicate"), ("source", "llm_worker")),
        ]
        == 0
    )
    assert value(page.render(accept), "llm_worker_exporter_render_seconds_count", llm_namespace="n")


def test_counters_of_a_source_are_there_before_its_first_failure() -> None:
    """So that rate() sees it."""
    page = exposition()
    page.register("s", CollectorRegistry())
    shown = page.render()
    assert errors(shown, "s") == 0
    assert [dropped(shown, "s", r) for r in ("duplicate", "invalid", "type_conflict")] == [0, 0, 0]


# --- threads ------------------------------------------------------------------------------------


class Slow(Families):
    """A source that waits to be let go, and counts how often it was read."""

    def __init__(self) -> None:
        super().__init__(family("g", "gauge", [("g", {}, 1.0)]))
        self.reads = 0
        self.entered = threading.Event()
        self.go = threading.Event()

    def collect(self) -> Iterator[Metric]:
        self.reads += 1
        self.entered.set()
        assert self.go.wait(10)
        yield from super().collect()


def test_scrapes_that_come_while_a_page_is_made_share_it() -> None:
    """One collection serves them all; the next scrape is a new one."""
    slow = Slow()
    page = exposition()
    page.register("s", slow)
    pages: list[Rendered] = []
    threads = [threading.Thread(target=lambda: pages.append(page.render())) for _ in range(8)]
    threads[0].start()
    assert slow.entered.wait(10)
    for thread in threads[1:]:
        thread.start()
    (flight,) = page._flights.values()
    condition: Any = flight._condition
    until("seven who wait for the first's page", lambda: len(condition._waiters) == 7)
    slow.go.set()
    for thread in threads:
        thread.join(10)
    assert len(pages) == 8
    assert slow.reads == 1
    page.render()
    assert slow.reads == 2


def test_registering_while_pages_are_made_loses_nothing() -> None:
    """Pages stay valid, and no thread sees an error."""
    page = exposition()
    page.register("fixed", client_registry())
    failures: list[BaseException] = []
    done = threading.Event()

    def scrape(accept: str | None) -> None:
        try:
            while not done.is_set():
                assert "g" in parsed(page.render(accept))
        except BaseException as error:  # to report in the main thread
            failures.append(error)

    threads = [
        threading.Thread(target=scrape, args=(accept,)) for accept in (None, ACCEPT_OPENMETRICS) * 2
    ]
    for thread in threads:
        thread.start()
    for round_ in range(30):
        page.register(f"s{round_}", client_registry(), add_prefix=f"p{round_}_")
        if round_ >= 3:
            page.unregister(f"s{round_ - 3}")
    done.set()
    for thread in threads:
        thread.join(20)
    assert not failures


# --- any families at all ------------------------------------------------------------------------

Rows = list[tuple[str, dict[str, str], float]]  # name suffix, labels, value
texts = st.text('ab "\\\n\r\t{},=#_é世\x85\u2028', max_size=8)
finite = st.floats(allow_nan=False, allow_infinity=False)
positive = st.floats(min_value=0, allow_nan=False, allow_infinity=False)
label_sets = st.lists(
    st.dictionaries(st.sampled_from(["a", "b_", "C"]), texts.filter(bool), max_size=3),
    max_size=4,
    unique_by=lambda labels: tuple(sorted(labels.items())),
)


@st.composite
def valid_families(draw: st.DrawFn) -> list[Metric]:
    """Families of every type with samples as the type says, names apart from each other."""
    families = []
    for index, type_ in enumerate(draw(st.lists(st.sampled_from(sorted(SAMPLES)), max_size=6))):
        name = f"f{index}_{draw(st.sampled_from(['x', 'vllm:y', 'z_total', 'q_seconds']))}"
        if type_ == "counter":
            name = name.removesuffix("_total")
        made = Metric(name, draw(texts), type_)
        for labels in draw(label_sets):
            for suffix, extra, number in draw(SAMPLES[type_](name)):
                made.samples.append(Sample(name + suffix, {**labels, **extra}, number))
        families.append(made)
    return families


def _histogram(_: str) -> st.SearchStrategy[Rows]:
    def build(counts: list[int], total: float) -> list[tuple[str, dict[str, str], float]]:
        bounds = [str(float(b)) for b in range(len(counts) - 1)] + ["+Inf"]
        heights = [float(sum(counts[: i + 1])) for i in range(len(counts))]
        rows = [("_bucket", {"le": b}, h) for b, h in zip(bounds, heights, strict=True)]
        return [*rows, ("_count", {}, heights[-1]), ("_sum", {}, total)]

    return st.builds(build, st.lists(st.integers(0, 9), min_size=1, max_size=4), positive)


SAMPLES: dict[str, Callable[[str], st.SearchStrategy[Rows]]] = {
    "gauge": lambda _: st.builds(lambda v: [("", {}, v)], finite),
    "unknown": lambda _: st.builds(lambda v: [("", {}, v)], finite),
    "counter": lambda _: st.builds(
        lambda v, c: [("_total", {}, v), ("_created", {}, c)], positive, positive
    ),
    "histogram": _histogram,
    "summary": lambda _: st.builds(
        lambda q, v, n, t: [
            ("", {"quantile": str(q)}, v),
            ("_count", {}, float(n)),
            ("_sum", {}, t),
        ],
        st.floats(0, 1),
        positive,
        st.integers(0, 9),
        positive,
    ),
    "info": lambda _: st.just([("_info", {}, 1.0)]),
    "stateset": lambda name: st.builds(
        lambda on: [("", {name: "on"}, float(on)), ("", {name: "off"}, float(not on))],
        st.booleans(),
    ),
}


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(families=valid_families(), split=st.integers(0, 6))
def test_any_families_parse_back_to_the_same_samples(families: list[Metric], split: int) -> None:
    """In both formats, from one source or two, on the first page and the next."""
    page = exposition()
    page.register("one", Families(*families[:split]))
    page.register("two", Families(*families[split:]))
    expected = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for made in families
        for sample in made.samples
    }
    for accept in (None, ACCEPT_OPENMETRICS) * 2:
        shown = page.render(accept)
        found = values(shown)
        assert {k: v for k, v in found.items() if not k[0].startswith("llm_")} == expected
        assert up(shown, "one") == up(shown, "two") == 1


junk_names = st.sampled_from(["a", "a_total", "a_count", "a_created", "a_info", "b", "b_bucket"])
junk_labels = st.dictionaries(
    st.sampled_from(["le", "quantile", "a", "b", "x.y", "x_y", "__z", ""]),
    st.one_of(st.sampled_from(["1", "+Inf", "inf", "nan", "0.5", ""]), st.text(max_size=4)),
    max_size=3,
)
junk_families = st.lists(
    st.builds(
        family,
        junk_names,
        st.sampled_from(
            ["counter", "gauge", "gaugehistogram", "histogram", "info", "stateset", "summary"]
        ),
        st.lists(
            st.tuples(
                st.builds(
                    "".join,
                    st.tuples(
                        junk_names, st.sampled_from(["", "_total", "_bucket", "_sum", "_gsum"])
                    ),
                ),
                junk_labels,
                st.one_of(st.floats(), st.integers(-1, 2), st.booleans()),
                st.one_of(st.none(), st.none(), st.floats(0, 1e9)),
            ),
            max_size=5,
        ),
        st.text(max_size=8),
    ),
    max_size=5,
)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(first=junk_families, second=junk_families)
def test_no_families_can_make_the_page_invalid(first: list[Metric], second: list[Metric]) -> None:
    """Whatever sources show, both parsers take the page and nothing is on it twice."""
    page = exposition()
    page.register("one", Families(*first))
    page.register("two", Families(*second))
    for accept in (None, ACCEPT_OPENMETRICS):
        assert up(page.render(accept), "one") in (0, 1)
