"""A source of metrics: where families come from, and what is asked for and added on the way.

Owns the rules a registration has to keep, each refusal with what to do instead. Never reads the
source: that is `exposition`'s.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from llm_worker.exposition.series import TEXT_TYPES, Layouts, encodable

if TYPE_CHECKING:
    from prometheus_client import Metric

    from llm_worker.exposition.direct import Family

_METRIC_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_LABEL_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
_SERIES_LABELS = {"le": "a histogram's buckets", "quantile": "a summary's quantiles"}


class Collectable(Protocol):
    """A prometheus_client registry or collector."""

    def collect(self) -> Iterable[Metric]:
        """Families as they are now."""


@dataclass(slots=True)
class Source:
    """A registry, and how its families are to be shown; see `exposition.Exposition.register`.

    Raises:
        ValueError: an argument could not give a valid page.
    """

    name: str
    registry: Collectable
    include: Collection[str] = ()
    exclude: Collection[str] = ()
    prefix: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    complete: bool = False  # nobody may add to its families
    go_on: bool = False  # its counters go on where an earlier process stopped
    # family name and type -> what is known of its samples, from the last reading
    layouts: dict[tuple[str, str], Layouts] = field(default_factory=dict)
    # collector -> how to read it without collect(); None: only by collect()
    direct: dict[Any, Family | None] = field(default_factory=dict)
    complaint: str = ""  # the last one logged

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("a source needs a name: it becomes the value of the label source")
        self.include = _checked_prefixes(self.include, "include")
        self.exclude = _checked_prefixes(self.exclude, "exclude")
        if self.prefix and not _METRIC_NAME.fullmatch(self.prefix):
            raise ValueError(
                f"add_prefix {self.prefix!r} cannot start a metric name: use letters, digits, _ "
                "and :, no digit first"
            )
        self.labels = checked_labels(self.labels, f"labels of source {self.name!r}")

    def wants(self, metric: Metric | Family) -> bool:
        """Whether the family is to be shown, by the name the registry's own page would show."""
        name = metric.name + TEXT_TYPES.get(metric.type, ("",))[0]
        if self.include and not name.startswith(tuple(self.include)):
            return False
        return not name.startswith(tuple(self.exclude))


def checked_labels(labels: Mapping[str, str], where: str) -> dict[str, str]:
    """The labels, if every sample could carry them.

    Raises:
        ValueError: one of them could not; the message says what to do.
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
    return {name: encodable(value) for name, value in labels.items()}


def _checked_prefixes(prefixes: Collection[str], argument: str) -> tuple[str, ...]:
    if isinstance(prefixes, str):
        raise ValueError(  # noqa: TRY004 - one error for every wrong registration
            f"{argument} is a collection of prefixes: write ({prefixes!r},)"
        )
    if "" in prefixes:
        raise ValueError(f"{argument} has an empty prefix, which every name starts with")
    return tuple(prefixes)
