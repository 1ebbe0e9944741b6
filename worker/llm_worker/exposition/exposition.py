"""Every source's metrics on one page: who is on it, one reading for all who ask, what failed.

A source is anything with prometheus_client's ``collect()``: vLLM's registry, ours, another
engine's, the files of several processes. A source that fails costs its own families and no others,
and the same page says so: `exporter_source_up` is 0. What is left out of the page is counted.

Owns the sources, the page's layouts from one rendering to the next, and the exporter's metrics.
What may stand on a page is `page`'s business. One process may read families for the page of
another: `Exposition.publish` there, `Exposition.register_published` here. Never imports
prometheus_client or the engine, reads no environment, starts no thread. Rendering is synchronous
and safe to call from several threads; keep it off the serving loop.
"""

from __future__ import annotations

import gzip
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from llm_worker.exposition.continuity import Continued, Total
from llm_worker.exposition.direct import Family, NotDirectError, collectors
from llm_worker.exposition.negotiation import OPENMETRICS, accepts_gzip, choose_format
from llm_worker.exposition.page import DROP_REASONS, Block, Page
from llm_worker.exposition.series import InvalidFamilyError, Layouts
from llm_worker.exposition.source import Collectable, Source, checked_labels

if TYPE_CHECKING:
    from prometheus_client import Counter, Gauge, Histogram, Metric

    from llm_worker.exposition.multiprocess import MultiprocessDirectory

log = logging.getLogger(__name__)

_Request = tuple[str, bool, frozenset[str]]  # format, compressed, names


class ExporterMetrics(Protocol):
    """What the page says about itself; `metrics.Metrics` has it."""

    exporter_source_up: Gauge
    exporter_source_errors_total: Counter
    exporter_families_dropped_total: Counter
    exporter_render_seconds: Histogram


class Published(NamedTuple):
    """What one process has read, for another's page."""

    text: Sequence[Block]
    openmetrics: Sequence[Block]
    exporter: Sequence[Total]  # of its own sources; the other's page shows them with its own


class Rendered(NamedTuple):
    """One page, ready to send."""

    body: bytes
    content_type: str
    content_encoding: str | None  # "gzip" or None


class Exposition:
    """The page and its sources. All methods may be called from any thread.

    Sources are read in the order of their registration, those of several processes first: where
    two show the same series, the first wins.
    """

    def __init__(
        self,
        metrics: ExporterMetrics,
        constant_labels: Mapping[str, str] | None = None,
        *,
        continued: Continued | None = None,
        on_page: Callable[[], None] = lambda: None,
    ) -> None:
        """``constant_labels`` go on every series that does not carry the label already.

        ``continued`` has the counters of sources registered with ``go_on`` go on where an earlier
        process stopped; ``on_page`` is called when a page was read and before it is handed out.

        Raises:
            ValueError: one of the labels could not be on every series.
        """
        self._metrics = metrics
        self._continued = continued
        self._on_page = on_page
        self._constant_labels = checked_labels(constant_labels or {}, "constant_labels")
        self._sources: dict[str, Source] = {}
        self._published: dict[str, Callable[[], Published | None]] = {}
        self._exporter = _OwnMetrics(metrics, continued)
        self._own = Source("exporter", self._exporter, labels=self._constant_labels)
        self._own_names = frozenset(family.name for family in self._own.registry.collect())
        self._lock = threading.Lock()  # of _sources and _flights
        self._rendering = threading.Lock()  # of the layouts
        self._flights: dict[_Request, Future[Rendered]] = {}

    def register(
        self,
        name: str,
        registry: Collectable,
        *,
        include: Collection[str] = (),
        exclude: Collection[str] = (),
        add_prefix: str = "",
        labels: Mapping[str, str] | None = None,
        go_on: bool = False,
    ) -> None:
        """Show the families of ``registry``.

        ``name``, which is unique, is the value of the label ``source`` in the exporter's metrics.
        ``include`` and ``exclude`` are prefixes of family names as the registry's own page would
        show them: without ``include`` all are shown; what ``exclude`` names is not, even if
        included. ``add_prefix``, such as ``trtllm_``, goes before every name. ``labels`` go on
        every series that lacks them; they win over the exporter's constant labels. With ``go_on``
        its counters go on where those of an earlier process stopped.

        Raises:
            ValueError: the name is taken, or an argument could not give a valid page.
        """
        self._add(Source(name, registry, include, exclude, add_prefix, labels or {}, go_on=go_on))

    def register_published(self, name: str, read: Callable[[], Published | None]) -> None:
        """Show what another process published, before all sources of this one.

        ``read`` returns None where nothing was published yet, and raises where what was published
        must not be shown any more: that is a failure of the source ``name``.
        """
        self._published[name] = read
        self._metrics.exporter_source_errors_total.labels(source=name).inc(0)

    def publish(self) -> Published:
        """Read all sources, in both formats, for another process's page."""
        pages = []
        for openmetrics in (False, True):
            with self._lock:
                sources = list(self._sources.values())
            with self._rendering:
                page = Page(openmetrics=openmetrics)
                faults = [self._read(source, page) for source in sources]
                pages.append(page)
        for source, fault in zip(sources, faults, strict=True):
            self._note(source, fault)
        self._count_drops(pages[0])
        exporter = [
            (family.name, sample.name, dict(sample.labels), sample.value)
            for family in self._exporter.families()
            for sample in family.samples
        ]
        return Published(pages[0].blocks(), pages[1].blocks(), exporter)

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

        Raises:
            ValueError: as for `register`.
        """
        self._add(Source(name, directory, include, exclude, labels=labels or {}, complete=True))

    def unregister(self, name: str) -> None:
        """Show the source no longer. Its counters stay, its ``source_up`` goes.

        Raises:
            KeyError: there is no such source.
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

        ``accept`` and ``accept_encoding`` are the request's headers; without a format we know, it
        is the Prometheus text format. ``names`` restricts the page to the families that have one
        of these names, or a series of such a name. Whole families: parts of a histogram are no
        histogram. Whoever asks for the same page while it is being made gets that one.
        """
        request = (choose_format(accept), accepts_gzip(accept_encoding), frozenset(names))
        with self._lock:
            other = self._flights.get(request)
            if other is None:
                flight = self._flights[request] = Future()
        if other is not None:
            return other.result()
        try:
            page = self._render(*request)
        except BaseException as error:
            self._land(request)
            flight.set_exception(error)
            raise
        self._land(request)
        flight.set_result(page)
        return page

    def _land(self, request: _Request) -> None:
        """Before the page is handed out: who asks after having seen it gets a new one."""
        with self._lock:
            del self._flights[request]

    def _add(self, source: Source) -> None:
        name = source.name
        source.labels = {**self._constant_labels, **source.labels}
        with self._lock:
            if name in self._sources:
                raise ValueError(
                    f"source {name!r} is registered already: unregister it, or rename one"
                )
            added = {name: source}
            self._sources = added | self._sources if source.complete else self._sources | added
            # From the start, so that rate() sees the first failure, and so that nothing has to be
            # made in a multiprocess directory when it is gone.
            self._metrics.exporter_source_up.labels(source=name)
            self._metrics.exporter_source_errors_total.labels(source=name).inc(0)
            for reason in DROP_REASONS:
                self._metrics.exporter_families_dropped_total.labels(
                    source=name, reason=reason
                ).inc(0)

    def _render(self, format_: str, compressed: bool, names: frozenset[str]) -> Rendered:
        started = time.perf_counter()
        with self._lock:
            sources = list(self._sources.values())
        with self._rendering:
            page = Page(openmetrics=format_ == OPENMETRICS)
            self._exporter.others = []
            for name, read in self._published.items():
                self._put_published(name, read, page, openmetrics=format_ == OPENMETRICS)
            for source in sources:
                fault = self._read(source, page)
                self._note(source, fault)
            self._count_drops(page)
            self._read(self._own, page)  # last: it tells of this very page
            self._on_page()
            body = page.text(names).encode()
        if compressed:
            body = gzip.compress(body, compresslevel=1, mtime=0)
        self._metrics.exporter_render_seconds.observe(time.perf_counter() - started)
        return Rendered(body, format_, "gzip" if compressed else None)

    def _count_drops(self, page: Page) -> None:
        for name, reason in page.drops:
            self._metrics.exporter_families_dropped_total.labels(source=name, reason=reason).inc()

    def _put_published(
        self, name: str, read: Callable[[], Published | None], page: Page, *, openmetrics: bool
    ) -> None:
        fault = ""
        try:
            published = read()
        except Exception as error:  # whatever it is: the rest of the page is in order
            published, fault = None, f"{error}"
        if published is None and not fault:
            return  # not yet: neither up nor down
        if published is not None:
            for block in published.openmetrics if openmetrics else published.text:
                page.add_block(name, block)
            self._exporter.others += published.exporter
        self._metrics.exporter_source_up.labels(source=name).set(0 if fault else 1)
        if fault:
            self._metrics.exporter_source_errors_total.labels(source=name).inc()

    def _read(self, source: Source, page: Page) -> str:
        """Put the source's families on the page; what was wrong with them first, or nothing."""
        fault = ""
        # What is known of families that are gone, goes.
        layouts: dict[tuple[str, str], Layouts] = {}
        direct: dict[Any, Family | None] = {}
        try:
            for collector in collectors(source.registry):
                if not source.go_on and self._put_direct(source, collector, page, direct):
                    continue
                for metric in collector.collect():
                    if source.go_on and self._continued is not None:
                        metric = self._continued.add(metric)  # noqa: PLW2901
                    wrong = self._put(source, metric, page, layouts)
                    if wrong and not fault:
                        fault = f"family {getattr(metric, 'name', metric)!r}: {wrong}"
        except Exception as error:  # the source is others' code, and may raise anything
            fault = fault or f"{type(error).__name__}: {error}"
        source.layouts = layouts
        source.direct = direct
        return fault

    def _put_direct(
        self, source: Source, collector: Any, page: Page, known: dict[Any, Family | None]
    ) -> bool:
        """Put the collector's family on the page without ``collect()``, if that can be."""
        try:
            if collector in source.direct:
                family = source.direct[collector]
            else:
                family = Family(collector, source.prefix, source.labels)
            known[collector] = family
            if family is None:
                return False
            hidden = family.name in self._own_names and source is not self._own
            return hidden or not source.wants(family) or page.add_direct(source, family)
        except (NotDirectError, InvalidFamilyError, TypeError):  # TypeError: not hashable
            return False
        except (AttributeError, ValueError):  # another prometheus_client: the slow way, for good
            known[collector] = None
            return False

    def _put(
        self,
        source: Source,
        metric: Metric,
        page: Page,
        layouts: dict[tuple[str, str], Layouts],
    ) -> str:
        """Put a family on the page if it belongs there; what was wrong with it, or nothing."""
        try:
            if not source.wants(metric):
                return ""
            if metric.name in self._own_names and source is not self._own:
                return ""
            key = (metric.name, metric.type)
            known = layouts.setdefault(key, source.layouts.get(key, {}))
            return page.add(source, metric, known)
        except Exception as error:  # others' code, too: its next family may be in order
            page.drops.append((source.name, "invalid"))
            return f"{type(error).__name__}: {error}"

    def _note(self, source: Source, fault: str) -> None:
        """Say how the source did; in the log, only what is new."""
        with self._lock:
            if self._sources.get(source.name) is not source:
                return  # unregistered meanwhile
            self._metrics.exporter_source_up.labels(source=source.name).set(0 if fault else 1)
        if fault:
            self._metrics.exporter_source_errors_total.labels(source=source.name).inc()
            if fault != source.complaint:
                log.warning(
                    "metrics source %s: %s", source.name, fault, extra={"source": source.name}
                )
        source.complaint = fault


class _OwnMetrics:
    """The exporter's metrics as a source, with those of processes that publish here."""

    def __init__(self, metrics: ExporterMetrics, continued: Continued | None) -> None:
        self._metrics = metrics
        self._continued = continued
        self.others: list[Total] = []  # of processes that go on by themselves

    def families(self) -> Iterator[Metric]:
        """What each source did, of this process."""
        yield from self._metrics.exporter_source_up.collect()
        yield from self._metrics.exporter_source_errors_total.collect()
        yield from self._metrics.exporter_families_dropped_total.collect()

    def collect(self) -> Iterator[Metric]:
        for own in self.families():
            family = own if self._continued is None else self._continued.add(own)
            for name, sample, labels, value in self.others:
                if name == family.name:
                    family.add_sample(sample, labels, value)
            yield family
        for own in self._metrics.exporter_render_seconds.collect():
            yield own if self._continued is None else self._continued.add(own)
