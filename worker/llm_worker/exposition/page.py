"""One page: each family once, over all sources, and nothing a strict reader would refuse.

Owns the judgement of what may be shown and the text of both formats. Never reads a source, never
counts nor logs: what it leaves out it notes for `exposition`. One thread at a time.

Left out, never passed on:

* a group of samples that is not what its family's type says (a histogram without ``+Inf``, buckets
  that fall, a counter's sample in a gauge) or whose names no escaping can save. These are the
  source's fault;
* in OpenMetrics only, what that format alone forbids: a negative or NaN counter, and the sum and
  count of a histogram that observed something negative or NaN;
* what another source has shown already, and a family whose name has another type already.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from llm_worker.exposition.series import (
    BUCKET,
    COUNT,
    FLAG,
    NOT_FINITE,
    QUANTILE,
    SUFFIXES,
    SUM,
    TEXT_TYPES,
    TOTAL,
    InvalidFamilyError,
    Layout,
    Layouts,
    Naming,
    encodable,
    escaped,
    escaped_name,
    exemplar_suffix,
    layout,
    names_of,
    time_suffix,
)

if TYPE_CHECKING:
    from prometheus_client import Metric

    from llm_worker.exposition.direct import Family as Direct
    from llm_worker.exposition.source import Source

DROP_REASONS = ("duplicate", "invalid", "type_conflict")

_HISTOGRAMS = ("histogram", "gaugehistogram")


@dataclass(slots=True)
class _Group:
    """The samples that belong together: a counter and when it was created, one histogram."""

    timestamp: Any  # of all of them
    lines: dict[str, str] = field(default_factory=dict)  # series -> value, time, exemplar
    late: dict[str, str] = field(default_factory=dict)  # series -> its suffix; see series.Layout
    totals: list[str] = field(default_factory=list)  # series of the sum and the count
    unfit: list[str] = field(default_factory=list)  # series whose value OpenMetrics forbids
    below: bool = False  # has a bucket under 0
    bound: float = -math.inf  # of the last bucket
    height: float = 0.0  # of the last bucket
    count: float | None = None
    summed: bool = False
    wrong: str = ""  # not what the type says

    def judge(self, kind: int, series: str, value: float) -> None:
        """Note what is wrong with a value of this kind, which is no bucket's."""
        if kind == COUNT:
            self.count = value
            self.totals.append(series)
            if value % 1 or value < 0:
                self.wrong = f"{series}{value}: not a count"
        elif kind == SUM:
            self.summed = True
            self.totals.append(series)
            if not value >= 0:
                self.unfit.append(series)
        elif kind in (TOTAL, QUANTILE):
            if value < 0 or (kind == TOTAL and math.isnan(value)):
                self.unfit.append(series)
        elif value not in ((0, 1) if kind == FLAG else (1,)):
            self.wrong = f"{series}{value}: an info is 1, a state 0 or 1"

    def embellish(self, line: Layout, sample: Any, *, openmetrics: bool) -> None:
        """Add a sample's time and, in OpenMetrics, its exemplar to its line."""
        timestamp, exemplar = sample[3:5]
        if timestamp != self.timestamp:
            self.wrong = f"{line.series}: samples that belong together are of different times"
            return
        if timestamp is not None:
            self.lines[line.series] += time_suffix(timestamp, openmetrics=openmetrics)
        if openmetrics and exemplar is not None and line.kind in (BUCKET, TOTAL):
            self.lines[line.series] += exemplar_suffix(exemplar)

    def fault(self, type_: str) -> str:
        """Why the group is not what its family's type says; nothing if it is."""
        if self.wrong or type_ not in _HISTOGRAMS:
            return self.wrong
        if self.bound != math.inf:
            return "a histogram without a +Inf bucket"
        if self.count is not None and self.count != self.height:
            return "a histogram whose count is not its +Inf bucket"
        if (self.count is not None) != self.summed:
            return "a histogram with a sum but no count, or the reverse"
        return ""

    def forbidden(self, type_: str) -> Collection[str]:
        """The series that OpenMetrics does not allow."""
        if type_ in _HISTOGRAMS:
            return self.totals if self.unfit or (self.below and type_ == "histogram") else ()
        if type_ == "counter":  # no counter is left to say when it was created
            return list(self.lines) if self.unfit else ()
        return self.unfit


class Block(NamedTuple):
    """One family's text in one format, as one process hands it to another."""

    name: str
    type: str
    documentation: str  # not escaped
    unit: str
    body: str  # its lines, joined
    late: Mapping[str, str]  # suffix → lines that the text format shows as a gauge of their own


@dataclass(slots=True)
class _Family:
    """One family of the page; a kind of it knows its lines."""

    name: str
    type: str
    documentation: str
    unit: str
    complete: bool  # takes no groups of other sources


@dataclass(slots=True)
class _Written(_Family):
    """A family whose lines are there: read directly, or by another process."""

    lines: list[str]
    late: Mapping[str, list[str]]
    direct: Direct | None = None  # where they come from, to read it once more sample by sample

    def put(self, lines: list[str], late: dict[str, list[str]] | None) -> None:
        """Add its lines; those of suffixes that are shown elsewhere go to ``late`` if it is one."""
        lines.extend(self.lines)
        if late is not None:
            late.update({suffix: list(own) for suffix, own in self.late.items()})


@dataclass(slots=True)
class _Sampled(_Family):
    """A family that was read sample by sample, perhaps from several sources."""

    groups: dict[str, _Group]  # by series.Layout.group

    def put(self, lines: list[str], late: dict[str, list[str]] | None) -> None:
        """Add its lines; those of suffixes that are shown elsewhere go to ``late`` if it is one."""
        for group in self.groups.values():
            if late is None or not group.late:
                lines.extend([series + value for series, value in group.lines.items()])
                continue
            for series, value in group.lines.items():
                own = group.late.get(series)
                (lines if own is None else late.setdefault(own, [])).append(series + value)


class Page:
    """What one rendering has gathered so far, in the order of arrival."""

    def __init__(self, *, openmetrics: bool) -> None:
        self.drops: list[tuple[str, str]] = []  # source, one of DROP_REASONS
        self._openmetrics = openmetrics
        self._families: dict[str, _Written | _Sampled] = {}
        self._names: set[str] = set()  # in use

    def add_direct(self, source: Source, direct: Direct) -> bool:
        """Put a family on the page by its text, if it is the first of its name.

        Raises:
            NotDirectError: it cannot be read this way now.
            InvalidFamilyError: it cannot be shown.
        """
        if direct.shown in self._families or not self._names.isdisjoint(direct.names):
            return False
        lines, late = direct.lines(openmetrics=self._openmetrics)
        self._names |= direct.names
        self._families[direct.shown] = _Written(
            direct.shown, direct.type, encodable(direct.documentation),
            _unit(direct.shown, direct.unit), source.complete,
            lines, {"_created": late} if late else {}, direct,
        )  # fmt: skip
        return True

    def add_block(self, source: str, block: Block) -> None:
        """Put a family on the page that another process has read in this page's format."""
        names = names_of(block.name, block.type)
        if not self._names.isdisjoint(names):
            self.drops.append((source, "duplicate"))
            return
        self._names |= names
        late = {suffix: [lines] for suffix, lines in block.late.items()}
        self._families[block.name] = _Written(
            block.name,
            block.type,
            block.documentation,
            block.unit,
            True,
            [block.body] if block.body else [],
            late,
        )

    def blocks(self) -> list[Block]:
        """The page's families, for another process to put on its own; empty ones, too."""
        blocks = []
        for family in self._families.values():
            lines: list[str] = []
            late: dict[str, list[str]] = {}
            family.put(lines, None if self._openmetrics else late)
            joined = {suffix: "\n".join(own) for suffix, own in late.items()}
            blocks.append(
                Block(
                    family.name, family.type, family.documentation, family.unit,
                    "\n".join(lines), joined,
                )
            )  # fmt: skip
        return blocks

    def _by_samples(self, family: _Written, direct: Direct) -> _Sampled:
        """Read a direct family once more, sample by sample: another source has the same one."""
        (metric,) = direct.metric.collect()
        groups, _ = _groups(direct.naming, metric, {}, openmetrics=self._openmetrics)
        return _Sampled(
            family.name, family.type, family.documentation, family.unit, family.complete, groups
        )

    def add(self, source: Source, metric: Metric, layouts: Layouts) -> str:
        """Put a family, or what is new of it, on the page; what of it was wrong, or nothing.

        ``layouts`` are those of this family on the source's last page; they are brought up to date.

        Raises:
            InvalidFamilyError: nothing of it can be shown.
            Exception: whatever an object raises that is not quite a family.
        """
        type_ = metric.type
        original = metric.name.removesuffix("_total") if type_ == "counter" else metric.name
        if type_ not in SUFFIXES:
            raise InvalidFamilyError(f"unknown type {type_!r}")
        name = escaped_name(source.prefix + original)
        names = names_of(name, type_)
        present = self._families.get(name)
        if present is None:
            refusal = "" if self._names.isdisjoint(names) else "type_conflict"
        elif present.type != type_:
            refusal = "type_conflict"
        else:
            refusal = "duplicate" if present.complete else ""
        if refusal:
            self.drops.append((source.name, refusal))
            return ""

        naming = Naming(name, original, type_, source.labels)
        groups, repeated = _groups(naming, metric, layouts, openmetrics=self._openmetrics)
        wrong = self._leave_out(groups, type_, source.name)
        if wrong and not groups:
            return wrong  # nothing is left of it
        if present is None:
            self._names |= names
            about = encodable(str(metric.documentation))
            unit = _unit(name, metric.unit)
            self._families[name] = _Sampled(name, type_, about, unit, source.complete, groups)
        else:
            if isinstance(present, _Written):
                assert present.direct is not None, "a block is complete"
                present = self._families[name] = self._by_samples(present, present.direct)
            for key, group in groups.items():
                if present.groups.setdefault(key, group) is not group:
                    repeated = True
        if repeated:
            self.drops.append((source.name, "duplicate"))
        return wrong

    def _leave_out(self, groups: dict[str, _Group], type_: str, source: str) -> str:
        """Take out of ``groups`` what must not be shown; what was wrong, or nothing."""
        wrong = ""
        left_out = False
        for key, group in list(groups.items()):
            if fault := group.fault(type_):
                wrong = wrong or fault
                left_out = True
                del groups[key]
            elif self._openmetrics and (forbidden := group.forbidden(type_)):
                left_out = True
                for series in forbidden:
                    del group.lines[series]
                if not group.lines:
                    del groups[key]
        if left_out:
            self.drops.append((source, "invalid"))
        return wrong

    def text(self, names: Collection[str] = ()) -> str:
        """The page in its format; with ``names``, only the families that have one of them."""
        asked = frozenset(names)
        write = _write_openmetrics if self._openmetrics else _write_text
        lines: list[str] = []
        for family in self._families.values():
            if not asked or not asked.isdisjoint(names_of(family.name, family.type)):
                write(family, lines)
        if self._openmetrics:
            lines.append("# EOF")
        lines.append("")
        return "\n".join(lines)


def _unit(name: str, unit: str) -> str:
    return unit if name.endswith(f"_{unit}") else ""


def _groups(
    naming: Naming, metric: Metric, layouts: Layouts, *, openmetrics: bool
) -> tuple[dict[str, _Group], bool]:
    """The family's samples, group by group; whether some series came twice."""
    groups: dict[str, _Group] = {}
    repeated = False
    last = None
    group = _Group(None)
    count = 0
    for sample in metric.samples:  # perhaps an iterator; the rest is written for speed
        count += 1
        labels = sample[1]
        key = (sample[0], *labels, *labels.values())
        line = layouts.get(key)
        if line is None:
            line = layouts[key] = layout(naming, sample[0], labels)
        series, group_key, kind, late, bound = line
        value = sample[2]
        if type(value) is not float:  # int, bool, numpy's, a subclass
            value = float(value)
        text = repr(value)
        if text[-1] > "9":  # inf, nan
            text = NOT_FINITE[text]
        if group_key is not last:
            last = group_key
            found = groups.get(group_key)
            group = groups[group_key] = _Group(sample[3]) if found is None else found
        if series in group.lines:
            repeated = True
            continue
        if kind == BUCKET:
            if bound <= group.bound or not value >= group.height or value % 1:
                group.wrong = f"{series}{text}: buckets out of order, or not counts"
            group.below |= bound < 0
            group.bound = bound
            group.height = value
        elif kind:
            group.judge(kind, series, value)
        group.lines[series] = text
        if late:
            group.late[series] = late
        if sample[3] is not None or sample[4] is not None or group.timestamp is not None:
            group.embellish(line, sample, openmetrics=openmetrics)
    if len(layouts) > 2 * count + 64:  # series came and went: keep those that are
        layouts.clear()
    return groups, repeated


def _write_openmetrics(family: _Written | _Sampled, lines: list[str]) -> None:
    _write_head(family.name, escaped(family.documentation), family.type, lines)
    if family.unit and family.type not in ("info", "stateset"):
        lines.append(f"# UNIT {family.name} {family.unit}")
    family.put(lines, None)


def _write_text(family: _Written | _Sampled, lines: list[str]) -> None:
    suffix, type_ = TEXT_TYPES[family.type]
    about = family.documentation.replace("\\", r"\\").replace("\n", r"\n")
    _write_head(family.name + suffix, about, type_, lines)
    late: dict[str, list[str]] = {}
    family.put(lines, late)
    for own, samples in sorted(late.items()):
        _write_head(family.name + own, about, "gauge", lines)
        lines.extend(samples)


def _write_head(name: str, about: str, type_: str, lines: list[str]) -> None:
    if about:
        lines.append(f"# HELP {name} {about}")
    lines.append(f"# TYPE {name} {type_}")
