"""Counters that go on where an earlier process of the same worker stopped.

A counter that falls is a reset to Prometheus, which then counts everything since zero anew; and a
count that was lost with a process is lost from every total. So a process that may be started again
keeps what it has *shown*, and its successor adds that to what it counts itself.

Owns the sums. Never stores anything: whoever uses it does, before a page is handed out.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prometheus_client import Metric

_GROWING = frozenset({"counter", "histogram", "gaugehistogram", "summary"})

# family, sample, its labels, what was shown
Total = tuple[str, str, dict[str, str], float]


class Continued:
    """Adds what was shown before to families that only grow. One thread at a time."""

    def __init__(self, before: Iterable[Total] = ()) -> None:
        """``before`` is what the earlier process had in `shown`."""
        self._before: dict[str, dict[Any, Total]] = {}
        for total in before:
            family, sample, labels, _ = total
            self._before.setdefault(family, {})[_key(sample, labels)] = total
        # Of families that were not read yet nothing may be forgotten, either.
        self._shown: dict[str, list[Total]] = {
            family: list(totals.values()) for family, totals in self._before.items()
        }

    def add(self, metric: Metric) -> Metric:
        """The family with what was shown before added, and with series that are not here yet."""
        if metric.type not in _GROWING:
            return metric
        before = dict(self._before.get(metric.name, {}))
        samples = []
        for sample in metric.samples:
            earlier = before.pop(_key(sample.name, sample.labels), None)
            if earlier is not None:
                created = sample.name.endswith("_created")
                value = min(sample.value, earlier[3]) if created else sample.value + earlier[3]
                sample = sample._replace(value=value)  # noqa: PLW2901 - the same, but for its value
            samples.append(sample)
        kind = type(metric.samples[0]) if metric.samples else None
        if kind is None and before:
            from prometheus_client.samples import Sample as kind  # noqa: N813
        samples += [kind(name, labels, value) for _, name, labels, value in before.values() if kind]
        self._shown[metric.name] = [
            (metric.name, sample.name, dict(sample.labels), float(sample.value))
            for sample in samples
        ]
        grown = copy.copy(metric)
        grown.samples = samples
        return grown

    def shown(self) -> list[Total]:
        """What a successor has to go on from."""
        return [total for totals in self._shown.values() for total in totals]


def _key(sample: str, labels: dict[str, str]) -> tuple[Any, ...]:
    return (sample, *sorted(labels.items()))
