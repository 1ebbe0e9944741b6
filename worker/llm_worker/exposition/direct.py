"""prometheus_client's own counters, gauges and histograms, read where they keep their values.

``collect()`` builds a ``Sample`` with a dictionary of labels for every line of every page, which
costs several times what the text does, under the interpreter lock that the serving loop needs. But
a line begins with the same characters on every page, and most values are those of the last one: so
each child's text is kept here, and made again only when one of its values is another.

Owns that text, and nothing of what a page may show. Knows private attributes of prometheus_client
(0.20 to 0.26) and trusts its exact classes with values in memory only: whatever is anything else (a
subclass, a gauge with a function, values in files, an exemplar, a value that a format forbids) it
refuses, and `exposition` reads that through ``collect()``, to the same page. Like ``collect()`` it
reads values one by one. One thread at a time. Imports prometheus_client when it is first asked,
since that library decides at its import whether values are in memory.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from operator import attrgetter
from types import SimpleNamespace
from typing import Any

from llm_worker.exposition.series import Naming, escaped_name, layout, names_of, number

_VALUE = attrgetter("_value")
_EXEMPLAR = attrgetter("_exemplar")


@functools.cache
def _client() -> SimpleNamespace:
    """What is needed of prometheus_client."""
    from prometheus_client import (
        CollectorRegistry,
        Counter,
        Gauge,
        Histogram,
        metrics,
        utils,
        values,
    )

    return SimpleNamespace(
        registry=CollectorRegistry,
        classes=frozenset({Counter, Gauge, Histogram}),
        value=values.MutexValue,
        metrics=metrics,  # the module, which says whether it is told when a series was created
        bound=utils.floatToGoString,
    )


class NotDirectError(Exception):
    """A metric, or its values of now, need ``collect()``. Handled by `exposition`."""


def collectors(registry: Any) -> Iterable[Any]:
    """What a registry would collect from, one by one; anything else is its own only collector."""
    if type(registry) is not _client().registry or registry.get_target_info():
        return (registry,)
    with registry._lock:
        return list(registry._collector_to_names)


@dataclass(slots=True)
class _Child:
    """One label set, and its lines as they were when its cells held ``values``."""

    metric: Any
    labels: dict[str, str]
    cells: list[Any]  # histogram: the buckets, then the sum
    series: list[str]  # how the lines begin: counter, gauge: one; histogram: buckets, count, sum
    values: list[float] | None = None
    text: str = ""
    created: float | None = None
    late: str = ""  # the line that tells when it was created


class Family:
    """One metric of prometheus_client as it is shown."""

    def __init__(self, metric: Any, prefix: str, labels: Mapping[str, str]) -> None:
        """Of ``metric``, with ``prefix`` before its name and ``labels`` where it lacks them.

        Raises:
            NotDirectError: it is none of the classes known here.
            InvalidFamilyError: its name cannot be shown.
        """
        if type(metric) not in _client().classes:
            raise NotDirectError
        self.metric = metric
        self.type: str = metric._type
        self.name: str = metric._name  # at its source
        self.documentation = str(metric._documentation)
        self.unit: str = metric._unit
        self.shown = escaped_name(prefix + self.name)
        self.names = frozenset(names_of(self.shown, self.type))
        self.naming = Naming(self.shown, self.name, self.type, labels)
        self._children: dict[tuple[str, ...], _Child] = {}
        self._starts: set[str] = set()

    def lines(self, *, openmetrics: bool) -> tuple[list[str], list[str]]:
        """One text per child, and the lines that a page in the text format shows elsewhere.

        Raises:
            NotDirectError: a child cannot be shown from here, for now or ever.
            InvalidFamilyError: a label cannot be shown.
        """
        metric = self.metric
        living = [((), metric)]
        if metric._labelnames:
            living = list(metric._metrics.items())  # at once: another thread may add one
        if len(living) < len(self._children):
            self._children.clear()
            self._starts.clear()
        with_created = _client().metrics._use_created and self.type != "gauge"
        texts: list[str] = []
        late: list[str] = []
        for key, of in living:
            child = self._children.get(key)
            if child is None or child.metric is not of:
                child = self._children[key] = self._child(key, of, replaced=child is not None)
            if "_child_samples" in of.__dict__:  # Gauge.set_function
                raise NotDirectError
            if openmetrics and any(map(_EXEMPLAR, child.cells)):
                raise NotDirectError
            values = list(map(_VALUE, child.cells))
            if values != child.values:
                child.text = self._text(child.series, values)
                child.values = values
            texts.append(child.text)
            if with_created:
                if child.created != of._created:
                    self._note_created(child, of._created)
                (texts if openmetrics else late).append(child.late)
        return texts, late

    def _child(self, key: tuple[str, ...], of: Any, *, replaced: bool) -> _Child:
        labels = dict(zip(self.metric._labelnames, key, strict=True))
        cells = [of._value] if self.type != "histogram" else [*of._buckets, of._sum]
        bounds = of._upper_bounds if self.type == "histogram" else ()
        in_memory = _client().value
        if any(type(cell) is not in_memory for cell in cells) or (bounds and bounds[0] < 0):
            raise NotDirectError
        name = self.name
        if bounds:
            series = [
                self._start(f"{name}_bucket", {**labels, "le": _client().bound(bound)})
                for bound in bounds
            ]
            series += [self._start(f"{name}{suffix}", labels) for suffix in ("_count", "_sum")]
        else:
            series = [self._start(name + ("_total" if self.type == "counter" else ""), labels)]
        if not replaced and series[0] in self._starts:  # two label sets that are shown alike
            raise NotDirectError
        self._starts.add(series[0])
        return _Child(of, labels, cells, series)

    def _start(self, sample: str, labels: Mapping[str, str]) -> str:
        return layout(self.naming, sample, labels).series

    def _note_created(self, child: _Child, created: float) -> None:
        child.created = created
        child.late = f"{self._start(f'{self.name}_created', child.labels)}{number(created)}"

    def _text(self, series: list[str], values: list[float]) -> str:
        if self.type == "gauge":
            return series[0] + number(values[0])
        if not values[-1] >= 0:  # a counter, or the sum of a histogram
            raise NotDirectError
        if self.type == "counter":
            return series[0] + number(values[0])
        heights = list(accumulate(values[:-1], initial=0.0))[1:]
        numbers = map(number, (*heights, heights[-1], values[-1]))
        return "\n".join(map(str.__add__, series, numbers))
