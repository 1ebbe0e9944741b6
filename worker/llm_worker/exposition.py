"""Every source's metrics on one page: collect, filter, prefix, labels, text.

A source is anything with prometheus_client's ``collect()``: vLLM's registry, ours, another
engine's, the files of several processes. Each family is on the page once, over all sources, in the
Prometheus text format 0.0.4 or OpenMetrics 1.0, whichever the scraper asks for. A source that fails
costs its own families and no others, and the same page says so.

Never imports prometheus_client or the engine, reads no environment, starts no thread. Rendering is
synchronous and safe to call from several threads; keep it off the serving loop.

What a strict reader would not take is left out and counted, never passed on:

* a group of samples that is not what its family's type says (a histogram without ``+Inf``, buckets
  that fall, a counter's sample in a gauge) or whose names no escaping can save. These are the
  source's fault: `exporter_source_up` is 0;
* in OpenMetrics only, what that format alone forbids: a negative or NaN counter, and the sum and
  count of a histogram that observed something negative or NaN.
"""

from __future__ import annotations

import gzip
import logging
import math
import re
import sys
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from prometheus_client import Counter, Gauge, Histogram, Metric

    from llm_worker.multiprocess import MultiprocessDirectory

logger = logging.getLogger(__name__)

TEXT = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
DROP_REASONS = ("duplicate", "invalid", "type_conflict")

_METRIC_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_LABEL_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
_SERIES_LABELS = {"le": "a histogram's buckets", "quantile": "a summary's quantiles"}

# A family's samples are its name and one of these (OpenMetrics 1.0, "MetricFamily").
_SUFFIXES: Mapping[str, tuple[str, ...]] = {
    "counter": ("_total", "_created"),
    "gauge": ("",),
    "gaugehistogram": ("_bucket", "_gcount", "_gsum"),
    "histogram": ("_bucket", "_count", "_sum", "_created"),
    "info": ("_info",),
    "stateset": ("",),
    "summary": ("", "_count", "_sum", "_created"),
    "unknown": ("",),
}
# What the text format, which is older, calls them: name suffix, type.
_TEXT_TYPES: Mapping[str, tuple[str, str]] = {
    "counter": ("_total", "counter"),
    "gauge": ("", "gauge"),
    "gaugehistogram": ("", "histogram"),
    "histogram": ("", "histogram"),
    "info": ("_info", "gauge"),
    "stateset": ("", "gauge"),
    "summary": ("", "summary"),
    "unknown": ("", "untyped"),
}
# Samples the text format does not know: shown there as gauges of their own.
_LATE = frozenset({"_created", "_gcount", "_gsum"})

# What a sample's value has to satisfy.
_ANY, _BUCKET, _COUNT, _SUM, _TOTAL, _ONE, _FLAG, _QUANTILE = range(8)
_KINDS: Mapping[tuple[str, str], int] = {
    ("counter", "_total"): _TOTAL,
    ("histogram", "_bucket"): _BUCKET,
    ("histogram", "_count"): _COUNT,
    ("histogram", "_sum"): _SUM,
    ("gaugehistogram", "_bucket"): _BUCKET,
    ("gaugehistogram", "_gcount"): _COUNT,
    ("gaugehistogram", "_gsum"): _SUM,
    ("info", "_info"): _ONE,
    ("stateset", ""): _FLAG,
    ("summary", ""): _QUANTILE,
    ("summary", "_count"): _COUNT,
    ("summary", "_sum"): _SUM,
}


class Collectable(Protocol):
    """A prometheus_client registry or collector."""

    def collect(self) -> Iterable[Metric]:
        """Families as they are now."""


class ExporterMetrics(Protocol):
    """What the page says about itself; `metrics.Metrics` has it."""

    exporter_source_up: Gauge
    exporter_source_errors_total: Counter
    exporter_families_dropped_total: Counter
    exporter_render_seconds: Histogram


class InvalidFamilyError(ValueError):
    """A source emitted what no format can express. Handled by `Exposition`: left out, counted."""


class Rendered(NamedTuple):
    """One page, ready to send."""

    body: bytes
    content_type: str
    content_encoding: str | None  # "gzip" or None


class _Naming(NamedTuple):
    """What a family is called here and at its source."""

    name: str
    original: str
    type: str
    labels: Mapping[str, str]  # to add


class _Layout(NamedTuple):
    """All of a sample's line but the value: the same on every page, so it is worked out once."""

    series: str  # name{labels} and a space
    group: str  # what the labels are without le, quantile, or the state
    kind: int
    late: str  # one of _LATE, or ""
    bound: float  # a bucket's; NaN for the rest


@dataclass(slots=True)
class _Group:
    """The samples that belong together: a counter and when it was created, one histogram."""

    stamp: Any
    lines: dict[str, str] = field(default_factory=dict)  # series -> value, time, exemplar
    late: dict[str, str] = field(default_factory=dict)  # series -> one of _LATE
    totals: list[str] = field(default_factory=list)  # series of the sum and the count
    unfit: list[str] = field(default_factory=list)  # series whose value OpenMetrics forbids
    below: bool = False  # has a bucket under 0
    bound: float = -math.inf  # of the last bucket
    height: float = 0.0  # of the last bucket
    count: float | None = None
    summed: bool = False
    wrong: str = ""  # not what the type says


@dataclass(slots=True)
class _Family:
    """One family of the page, perhaps from several sources."""

    name: str
    type: str
    documentation: str
    unit: str
    closed: bool  # takes no groups of other sources
    groups: dict[str, _Group]


@dataclass(slots=True)
class _Source:
    """Where families come from, and what is done to them."""

    name: str
    registry: Collectable
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    prefix: str
    labels: Mapping[str, str]
    whole: bool = False  # its families are complete: nobody may add to them
    # family and type -> sample name, label names, label values -> layout
    layouts: dict[tuple[str, str], dict[tuple[str, ...], _Layout]] = field(default_factory=dict)
    complaint: str = ""  # the last one logged

    def wants(self, metric: Metric) -> bool:
        name = metric.name + _TEXT_TYPES.get(metric.type, ("",))[0]
        if self.include and not name.startswith(self.include):
            return False
        return not name.startswith(self.exclude)


@dataclass(slots=True)
class _Page:
    """What one rendering has gathered so far."""

    openmetrics: bool
    families: dict[str, _Family] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)  # every name in use -> its family
    drops: list[tuple[str, str]] = field(default_factory=list)  # source, reason


class Exposition:
    """The page and its sources. All methods may be called from any thread.

    Sources are read in the order of their registration, those of several processes first: where
    two show the same series, the first wins.
    """

    def __init__(
        self, metrics: ExporterMetrics, constant_labels: Mapping[str, str] | None = None
    ) -> None:
        """``constant_labels`` go on every series that does not carry the label already."""
        self._metrics = metrics
        self._constant_labels = _checked_labels(constant_labels or {}, "constant_labels")
        self._sources: dict[str, _Source] = {}
        self._own = _Source("exporter", _OwnMetrics(metrics), (), (), "", self._constant_labels)
        self._own_names = frozenset(family.name for family in self._own.registry.collect())
        self._lock = threading.Lock()  # of _sources and _flights
        self._rendering = threading.Lock()  # of the layouts
        self._flights: dict[tuple[str, bool, frozenset[str]], Future[Rendered]] = {}

    def register(
        self,
        name: str,
        registry: Collectable,
        *,
        include: Collection[str] = (),
        exclude: Collection[str] = (),
        add_prefix: str = "",
        labels: Mapping[str, str] | None = None,
    ) -> None:
        """Show the families of ``registry``.

        Parameters
        ----------
        name
            The value of the label ``source`` in the exporter's metrics; unique.
        include, exclude
            Prefixes of family names as the registry's own page would show them. Without
            ``include`` all are shown; what ``exclude`` names is not, even if included.
        add_prefix
            Put before every name, such as ``trtllm_``.
        labels
            Put on every series that lacks them; they win over the exporter's constant labels.

        Raises
        ------
        ValueError
            The name is taken, or an argument could not give a valid page.
        """
        source = self._source(
            name, registry, include=include, exclude=exclude, add_prefix=add_prefix, labels=labels
        )
        with self._lock:
            self._add(source, first=False)

    def register_multiprocess(
        self,
        directory: MultiprocessDirectory,
        name: str = "multiprocess",
        *,
        include: Collection[str] = (),
        exclude: Collection[str] = (),
        labels: Mapping[str, str] | None = None,
    ) -> None:
        """Show what all processes wrote to ``directory``, before any other source.

        A process's own registry shows the same families with its own share only. The files hold
        everyone's, so their families are complete: what other sources have of them is left out
        and counted as ``duplicate``. Exclude them there to keep that counter still.

        Raises
        ------
        ValueError
            As for `register`.
        """
        source = self._source(
            name, directory, include=include, exclude=exclude, add_prefix="", labels=labels
        )
        source.whole = True
        with self._lock:
            self._add(source, first=True)

    def unregister(self, name: str) -> None:
        """Show the source no longer. Its counters stay, its ``source_up`` goes.

        Raises
        ------
        KeyError
            There is no such source.
        """
        with self._lock:
            del self._sources[name]
            self._metrics.exporter_source_up.remove(name)

    def render(
        self,
        accept: str | None = None,
        accept_encoding: str | None = None,
        names: Collection[str] = (),
    ) -> Rendered:
        """The page as it is now.

        Whoever asks for the same page while it is being made gets that one.

        Parameters
        ----------
        accept, accept_encoding
            The request's headers. Without a format we know, it is the Prometheus text format.
        names
            Only the families with one of these names, or a series of such a name. Whole families:
            parts of a histogram are no histogram.
        """
        format_ = _format(accept)
        key = (format_, _gzip_accepted(accept_encoding), frozenset(names))
        with self._lock:
            flight = self._flights.get(key)
            leading = flight is None
            if flight is None:
                flight = self._flights[key] = Future()
        if not leading:
            return flight.result()
        try:
            page = self._render(*key)
        except BaseException as error:
            self._land(key)
            flight.set_exception(error)
            raise
        self._land(key)
        flight.set_result(page)
        return page

    def _land(self, key: tuple[str, bool, frozenset[str]]) -> None:
        with self._lock:
            del self._flights[key]

    def _source(
        self,
        name: str,
        registry: Collectable,
        *,
        include: Collection[str],
        exclude: Collection[str],
        add_prefix: str,
        labels: Mapping[str, str] | None,
    ) -> _Source:
        if not name:
            raise ValueError("a source needs a name: it becomes the value of the label source")
        for argument, prefixes in (("include", include), ("exclude", exclude)):
            if isinstance(prefixes, str):
                raise ValueError(  # noqa: TRY004 - one error for every wrong registration
                    f"{argument} is a collection of prefixes: write ({prefixes!r},)"
                )
            if "" in prefixes:
                raise ValueError(f"{argument} has an empty prefix, which every name starts with")
        if add_prefix and not _METRIC_NAME.fullmatch(add_prefix):
            raise ValueError(
                f"add_prefix {add_prefix!r} cannot start a metric name: use letters, digits, _ "
                "and :, no digit first"
            )
        own = _checked_labels(labels or {}, f"labels of source {name!r}")
        return _Source(
            name,
            registry,
            tuple(include),
            tuple(exclude),
            add_prefix,
            {**self._constant_labels, **own},
        )

    def _add(self, source: _Source, *, first: bool) -> None:
        name = source.name
        if name in self._sources:
            raise ValueError(f"source {name!r} is registered already: unregister it, or rename one")
        added = {name: source}
        self._sources = added | self._sources if first else self._sources | added
        # From the start, so that rate() sees the first failure, and so that nothing has to be made
        # in a multiprocess directory when it is gone.
        self._metrics.exporter_source_up.labels(source=name)
        self._metrics.exporter_source_errors_total.labels(source=name).inc(0)
        for reason in DROP_REASONS:
            self._metrics.exporter_families_dropped_total.labels(source=name, reason=reason).inc(0)

    def _render(self, format_: str, compressed: bool, names: frozenset[str]) -> Rendered:
        started = time.perf_counter()
        with self._lock:
            sources = list(self._sources.values())
        with self._rendering:
            page = _Page(openmetrics=format_ == OPENMETRICS)
            for source in sources:
                fault = self._read(source, page)
                self._note(source, fault)
            for name, reason in page.drops:
                self._metrics.exporter_families_dropped_total.labels(
                    source=name, reason=reason
                ).inc()
            page.drops.clear()
            self._read(self._own, page)  # last: it tells of this very page
            body = _text(page, names).encode()
        if compressed:
            body = gzip.compress(body, compresslevel=1, mtime=0)
        self._metrics.exporter_render_seconds.observe(time.perf_counter() - started)
        return Rendered(body, format_, "gzip" if compressed else None)

    def _read(self, source: _Source, page: _Page) -> str:
        """Put the source's families on the page; what was wrong with them, or nothing."""
        fault = ""
        seen: dict[tuple[str, str], dict[tuple[str, ...], _Layout]] = {}
        families: Iterator[Metric] | None = None
        while True:
            metric = None
            collected = False
            try:
                if families is None:
                    families = iter(source.registry.collect())
                metric = next(families)
                collected = True
                if not source.wants(metric):
                    continue
                if metric.name in self._own_names and source is not self._own:
                    continue
                wrong = _add_family(source, metric, page, seen)
            except StopIteration:
                break
            except Exception as error:  # the source is others' code, and may raise anything
                wrong = f"{type(error).__name__}: {error}"
                if not collected:
                    fault = fault or wrong
                    break
                page.drops.append((source.name, "invalid"))
            if wrong:
                fault = fault or f"family {getattr(metric, 'name', metric)!r}: {wrong}"
        source.layouts = seen
        return fault

    def _note(self, source: _Source, fault: str) -> None:
        """Say how the source did; in the log, only what is new."""
        with self._lock:
            if self._sources.get(source.name) is not source:
                return  # unregistered meanwhile
            self._metrics.exporter_source_up.labels(source=source.name).set(0 if fault else 1)
        if fault:
            self._metrics.exporter_source_errors_total.labels(source=source.name).inc()
            if fault != source.complaint:
                logger.warning(
                    "metrics source %s: %s", source.name, fault, extra={"source": source.name}
                )
        source.complaint = fault


class _OwnMetrics:
    """The exporter's metrics as a source."""

    def __init__(self, metrics: ExporterMetrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        yield from self._metrics.exporter_source_up.collect()
        yield from self._metrics.exporter_source_errors_total.collect()
        yield from self._metrics.exporter_families_dropped_total.collect()
        yield from self._metrics.exporter_render_seconds.collect()


# --- one family ---------------------------------------------------------------------------------


def _add_family(
    source: _Source,
    metric: Metric,
    page: _Page,
    seen: dict[tuple[str, str], dict[tuple[str, ...], _Layout]],
) -> str:
    """Put a family, or what is new of it, on the page; what of it was wrong, or nothing.

    Raises
    ------
    InvalidFamilyError
        Nothing of it can be shown.
    """
    original = metric.name
    if metric.type == "counter":
        original = original.removesuffix("_total")
    if metric.type not in _SUFFIXES:
        raise InvalidFamilyError(f"unknown type {metric.type!r}")
    name = _escaped_name(source.prefix + original)
    naming = _Naming(name, original, metric.type, source.labels)
    claims = {name + suffix for suffix in ("", *_SUFFIXES[metric.type])}
    present = page.families.get(name)
    refusal = _refusal(present, metric.type, page.names.keys() & claims)
    if refusal:
        page.drops.append((source.name, refusal))
        return ""

    key = (original, metric.type)
    layouts = seen.get(key)
    if layouts is None:
        layouts = seen[key] = source.layouts.get(key) or {}
    groups, repeated = _groups(naming, metric, layouts, page.openmetrics)
    wrong = _checked(groups, metric.type, page, source.name)
    if wrong and not groups:
        return wrong  # nothing is left of it
    if present is None:
        page.names.update(dict.fromkeys(claims, name))
        unit = metric.unit if name.endswith(f"_{metric.unit}") else ""
        page.families[name] = _Family(
            name, metric.type, _encodable(str(metric.documentation)), unit, source.whole, groups
        )
    else:
        for group, samples in groups.items():
            if present.groups.setdefault(group, samples) is not samples:
                repeated = True
    if repeated:
        page.drops.append((source.name, "duplicate"))
    return wrong


def _refusal(present: _Family | None, type_: str, taken: Collection[str]) -> str:
    """Why a family may not go on the page; nothing if it may."""
    if present is None:
        return "type_conflict" if taken else ""
    if present.type != type_:
        return "type_conflict"
    return "duplicate" if present.closed else ""


def _groups(
    naming: _Naming,
    metric: Metric,
    layouts: dict[tuple[str, ...], _Layout],
    openmetrics: bool,
) -> tuple[dict[str, _Group], bool]:
    """The family's samples, group by group; whether some series came twice."""
    groups: dict[str, _Group] = {}
    repeated = False
    last = None
    group = _Group(None)
    count = 0
    for sample in metric.samples:
        count += 1
        labels = sample[1]
        key = (sample[0], *labels, *labels.values())
        layout = layouts.get(key)
        if layout is None:
            layout = layouts[key] = _layout(naming, sample[0], labels)
        series, group_key, kind, late, bound = layout
        value = sample[2]
        text = repr(value) if type(value) is float else _number(value)
        if text[-1] > "9":  # inf, nan
            text = _special(text)
        if group_key is not last:
            last = group_key
            found = groups.get(group_key)
            group = groups[group_key] = _Group(sample[3]) if found is None else found
        if series in group.lines:
            repeated = True
            continue
        if kind == _BUCKET:
            if bound <= group.bound or not value >= group.height or value % 1:
                group.wrong = f"{series}{text}: buckets out of order, or not counts"
            if bound < 0:
                group.below = True
            group.bound = bound
            group.height = value
        elif kind:
            _judge(group, kind, series, value)
        group.lines[series] = text
        if late:
            group.late[series] = late
        if sample[3] is not None or sample[4] is not None or group.stamp is not None:
            _embellish(group, layout, sample, openmetrics)
    if len(layouts) > 2 * count + 64:  # series came and went: keep those that are
        layouts.clear()
    return groups, repeated


def _judge(group: _Group, kind: int, series: str, value: float) -> None:
    """Note what is wrong with a value of this kind."""
    if kind == _COUNT:
        group.count = value
        group.totals.append(series)
        if value % 1 or value < 0:
            group.wrong = f"{series}{value}: not a count"
    elif kind == _SUM:
        group.summed = True
        group.totals.append(series)
        if not value >= 0:
            group.unfit.append(series)
    elif kind in (_TOTAL, _QUANTILE):
        if value < 0 or (kind == _TOTAL and math.isnan(value)):
            group.unfit.append(series)
    elif value not in ((0, 1) if kind == _FLAG else (1,)):
        group.wrong = f"{series}{value}: an info is 1, a state 0 or 1"


def _checked(groups: dict[str, _Group], type_: str, page: _Page, source: str) -> str:
    """Take out of ``groups`` what must not be shown; what was wrong, or nothing."""
    wrong = ""
    left_out = False
    histogram = type_ in ("histogram", "gaugehistogram")
    for key in list(groups):
        group = groups[key]
        reason = group.wrong or (_histogram_fault(group) if histogram else "")
        if reason:
            wrong = wrong or reason
            left_out = True
            del groups[key]
        elif page.openmetrics and (group.unfit or (group.below and group.totals)):
            if type_ == "gaugehistogram" and not group.unfit:
                continue
            left_out = True
            for series in group.totals if histogram else group.unfit:
                del group.lines[series]
            if type_ == "counter" or not group.lines:
                del groups[key]
    if left_out:
        page.drops.append((source, "invalid"))
    return wrong


def _histogram_fault(group: _Group) -> str:
    if group.bound != math.inf:
        return "a histogram without a +Inf bucket"
    if group.count is not None and group.count != group.height:
        return "a histogram whose count is not its +Inf bucket"
    if (group.count is not None) != group.summed:
        return "a histogram with a sum but no count, or the reverse"
    return ""


def _embellish(group: _Group, layout: _Layout, sample: Any, openmetrics: bool) -> None:
    """Add a sample's time and, in OpenMetrics, its exemplar to its line."""
    stamp = sample[3]
    if stamp != group.stamp:
        group.wrong = f"{layout.series}: samples that belong together are of different times"
        return
    tail = "" if stamp is None else _stamp(stamp, openmetrics)
    if openmetrics and layout.kind in (_BUCKET, _TOTAL):
        tail += _exemplar(sample[4])
    group.lines[layout.series] += tail


# --- names, labels, values ----------------------------------------------------------------------


def _layout(naming: _Naming, sample: str, labels: Mapping[str, str]) -> _Layout:
    """How a sample's line begins and what it belongs to."""
    name, original, type_, injected = naming
    suffix = sample.removeprefix(original)
    if not sample.startswith(original) or suffix not in _SUFFIXES[type_]:
        raise InvalidFamilyError(f"sample {sample!r} does not belong to a {type_}")
    kind = _KINDS.get((type_, suffix), _ANY)
    pairs: dict[str, str] = {}
    for label, value in labels.items():
        is_state = type_ == "stateset" and label == original  # whose label is the family's name
        shown = name if is_state else _escaped_label(label)
        if shown in pairs:
            raise InvalidFamilyError(f"two labels become {shown!r}")
        pairs[shown] = _encodable(value)
    for label, value in injected.items():
        pairs.setdefault(label, value)

    special = {_BUCKET: "le", _QUANTILE: "quantile", _FLAG: name}.get(kind)
    bound = math.nan
    if special is not None:
        if special not in pairs:
            raise InvalidFamilyError(f"sample {sample!r} has no label {special!r}")
        if kind != _FLAG:
            bound = float(pairs[special])
            if math.isnan(bound) or (kind == _QUANTILE and not 0 <= bound <= 1):
                raise InvalidFamilyError(f"{special}={pairs[special]!r}")
            if math.isinf(bound):
                pairs[special] = "+Inf" if bound > 0 else "-Inf"
    ordered = sorted(pairs.items())
    line = ",".join([f'{label}="{_escaped_value(value)}"' for label, value in ordered])
    # An empty label and none are the same to Prometheus.
    belongs = [pair for pair in ordered if pair[0] != special and pair[1]]
    return _Layout(
        f"{name}{suffix}{{{line}}} " if line else f"{name}{suffix} ",
        sys.intern(repr(belongs)),  # compared by identity
        kind,
        suffix if suffix in _LATE else "",
        bound,
    )


def _checked_labels(labels: Mapping[str, str], where: str) -> dict[str, str]:
    """The labels, if every sample could carry them.

    Raises
    ------
    ValueError
        One of them could not; the message says what to do.
    """
    for name, value in labels.items():
        if name in _SERIES_LABELS:
            raise ValueError(
                f"{where}: {name!r} tells {_SERIES_LABELS[name]} apart: choose another name"
            )
        if not isinstance(name, str) or not _LABEL_NAME.fullmatch(name):
            raise ValueError(
                f"{where}: {name!r} is no label name: use letters, digits and _, no digit first"
            )
        if name.startswith("__"):
            raise ValueError(f"{where}: {name!r} is reserved for Prometheus: drop the leading __")
        if not isinstance(value, str):
            raise ValueError(  # noqa: TRY004 - one error for every wrong registration
                f"{where}: the value of {name!r} is not text: write str({value!r})"
            )
    return {name: _encodable(value) for name, value in labels.items()}


def _escaped_name(name: str) -> str:
    if _METRIC_NAME.fullmatch(name):
        return name
    if not name:
        raise InvalidFamilyError("a family without a name")
    return re.sub(r"^[0-9]|[^a-zA-Z0-9_:]", "_", name)


def _escaped_label(name: str) -> str:
    if not name or name.startswith("__"):
        raise InvalidFamilyError(f"label name {name!r}")
    if _LABEL_NAME.fullmatch(name):
        return name
    return re.sub(r"^[0-9]|[^a-zA-Z0-9_]", "_", name)


def _escaped_value(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _encodable(text: str) -> str:
    """Without lone surrogates, one of which would cost the whole page."""
    return text if text.isascii() else text.encode(errors="replace").decode()


def _number(value: Any) -> str:
    """A value that is not exactly a float: int, bool, numpy's, a subclass."""
    return repr(float(value))


def _special(text: str) -> str:
    return {"inf": "+Inf", "-inf": "-Inf", "nan": "NaN"}[text]


def _stamp(stamp: Any, openmetrics: bool) -> str:
    """A sample's time: seconds, or milliseconds in the text format."""
    seconds = float(stamp)
    if not math.isfinite(seconds):
        raise InvalidFamilyError(f"a sample of the time {stamp}")
    return f" {stamp}" if openmetrics else f" {int(seconds * 1000)}"


def _exemplar(exemplar: Any) -> str:
    """An exemplar as OpenMetrics writes it; nothing if the format does not allow it."""
    if exemplar is None:
        return ""
    labels = sorted((_escaped_label(name), value) for name, value in exemplar.labels.items())
    if sum(len(name) + len(value) for name, value in labels) > 128:
        return ""
    inside = ",".join([f'{name}="{_escaped_value(_encodable(value))}"' for name, value in labels])
    value = _number(exemplar.value)
    if value[-1] > "9":
        value = _special(value)
    stamp = "" if exemplar.timestamp is None else _stamp(exemplar.timestamp, True)
    return f" # {{{inside}}} {value}{stamp}"


# --- text ---------------------------------------------------------------------------------------


def _text(page: _Page, names: frozenset[str]) -> str:
    families = page.families.values()
    write = _openmetrics_family if page.openmetrics else _text_family
    lines: list[str] = []
    for family in families:
        if names and names.isdisjoint(
            {family.name + suffix for suffix in ("", *_SUFFIXES[family.type])}
        ):
            continue
        write(family, lines)
    if page.openmetrics:
        lines.append("# EOF")
    lines.append("")
    return "\n".join(lines)


def _openmetrics_family(family: _Family, lines: list[str]) -> None:
    if family.documentation:
        lines.append(f"# HELP {family.name} {_escaped_value(family.documentation)}")
    lines.append(f"# TYPE {family.name} {family.type}")
    if family.unit and family.type not in ("info", "stateset"):
        lines.append(f"# UNIT {family.name} {family.unit}")
    for group in family.groups.values():
        lines.extend([series + value for series, value in group.lines.items()])


def _text_family(family: _Family, lines: list[str]) -> None:
    suffix, type_ = _TEXT_TYPES[family.type]
    about = family.documentation.replace("\\", r"\\").replace("\n", r"\n")
    _head(family.name + suffix, about, type_, lines)
    late: dict[str, list[str]] = {}
    for group in family.groups.values():
        if not group.late:
            lines.extend([series + value for series, value in group.lines.items()])
            continue
        for series, value in group.lines.items():
            own = group.late.get(series)
            (lines if own is None else late.setdefault(own, [])).append(series + value)
    for own, samples in sorted(late.items()):
        _head(family.name + own, about, "gauge", lines)
        lines.extend(samples)


def _head(name: str, about: str, type_: str, lines: list[str]) -> None:
    if about:
        lines.append(f"# HELP {name} {about}")
    lines.append(f"# TYPE {name} {type_}")


# --- negotiation --------------------------------------------------------------------------------


def _format(accept: str | None) -> str:
    """The content type to answer with: the best the scraper takes, by RFC 9110's rules.

    For each format the most specific range that covers it decides; the format with the higher
    quality wins, then the one named earlier, then the text format.
    """
    best = (0.0, 0)
    chosen = TEXT
    for format_ in (TEXT, OPENMETRICS):
        ours = format_.split(";")[0]
        decided: tuple[int, float, int] | None = None
        for position, (range_, parameters, quality) in enumerate(_ranges(accept)):
            specificity = (range_ == ours) * 2 or (range_ == ours.split("/")[0] + "/*")
            if not specificity and range_ != "*/*":
                continue
            version = parameters.get("version", "1.0.0")
            if format_ == OPENMETRICS and not re.fullmatch(r"1(\.\d+)*", version):
                continue
            if decided is None or (int(specificity), quality) > decided[:2]:
                decided = (int(specificity), quality, -position)
        if decided is not None and decided[1] > 0 and decided[1:] > best:
            if chosen == TEXT and decided[1:] == best:
                continue
            best = decided[1:]
            chosen = format_
    return chosen


def _gzip_accepted(accept_encoding: str | None) -> bool:
    qualities = {coding: quality for coding, _, quality in _ranges(accept_encoding)}
    return qualities.get("gzip", qualities.get("*", 0.0)) > 0


def _ranges(header: str | None) -> Iterator[tuple[str, dict[str, str], float]]:
    """What a header like Accept lists: the value, its parameters, its quality."""
    for element in (header or "").split(","):
        value, *rest = (part.strip() for part in element.split(";"))
        if not value:
            continue
        parameters = dict(part.split("=", 1) for part in rest if "=" in part)
        try:
            quality = float(parameters.pop("q", "1"))
        except ValueError:
            quality = 0.0
        yield value.lower(), parameters, quality
