"""A sample's line: what each type's samples are called, and how names, labels and values are spelt.

Owns what the two formats, the Prometheus text format and OpenMetrics, say about a single sample.
What samples have to do with each other is `page`'s. Never imports prometheus_client; no I/O, no
clock, no logging.

Source: the specifications of OpenMetrics 1.0 and of the Prometheus text format 0.0.4.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

# A family's samples are its name and one of these (OpenMetrics 1.0, "MetricFamily").
SUFFIXES: Mapping[str, tuple[str, ...]] = {
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
TEXT_TYPES: Mapping[str, tuple[str, str]] = {
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

# What a sample's value has to satisfy. Plain numbers: they are compared for every sample.
ANY, BUCKET, COUNT, SUM, TOTAL, ONE, FLAG, QUANTILE = range(8)
_KINDS: Mapping[tuple[str, str], int] = {
    ("counter", "_total"): TOTAL,
    ("histogram", "_bucket"): BUCKET,
    ("histogram", "_count"): COUNT,
    ("histogram", "_sum"): SUM,
    ("gaugehistogram", "_bucket"): BUCKET,
    ("gaugehistogram", "_gcount"): COUNT,
    ("gaugehistogram", "_gsum"): SUM,
    ("info", "_info"): ONE,
    ("stateset", ""): FLAG,
    ("summary", ""): QUANTILE,
    ("summary", "_count"): COUNT,
    ("summary", "_sum"): SUM,
}

NOT_FINITE: Mapping[str, str] = {"inf": "+Inf", "-inf": "-Inf", "nan": "NaN"}

_NOT_OF_A_METRIC = re.compile(r"^[0-9]|[^a-zA-Z0-9_:]")
_NOT_OF_A_LABEL = re.compile(r"^[0-9]|[^a-zA-Z0-9_]")
_EXEMPLAR_CHARACTERS = 128  # of all label names and values together (OpenMetrics 1.0, "Exemplars")


class InvalidFamilyError(ValueError):
    """A source emitted what no format can express. Handled by `exposition`: left out, counted."""


class Naming(NamedTuple):
    """What a family is called on the page and at its source."""

    name: str
    original: str
    type: str
    labels: Mapping[str, str]  # to add where they are missing


class Layout(NamedTuple):
    """All of a sample's line but the value: the same on every page, so it is worked out once."""

    series: str  # name{labels} and a space
    group: str  # what the labels are without le, quantile, or the state; compared by identity
    kind: int  # ANY to QUANTILE
    late: str  # one of _LATE, or ""
    bound: float  # a bucket's; NaN for the rest


Layouts = dict[tuple[str, ...], Layout]  # by the sample's name, label names, label values


def names_of(family: str, type_: str) -> set[str]:
    """The family's name and those its samples may have."""
    return {family, *[family + suffix for suffix in SUFFIXES[type_]]}


def layout(naming: Naming, sample: str, labels: Mapping[str, str]) -> Layout:
    """How a sample's line begins and what it belongs to.

    Raises:
        InvalidFamilyError: a family of this type has no such sample, or it lacks the label that
            tells it apart, or two of its labels become one.
        ValueError, TypeError, AttributeError: labels are not text, or a bound is no number.
    """
    name, original, type_, injected = naming
    suffix = sample.removeprefix(original)
    if not sample.startswith(original) or suffix not in SUFFIXES[type_]:
        raise InvalidFamilyError(f"sample {sample!r} does not belong to a {type_}")
    kind = _KINDS.get((type_, suffix), ANY)
    pairs: dict[str, str] = {}
    for label, value in labels.items():
        is_state = type_ == "stateset" and label == original  # whose label is the family's name
        shown = name if is_state else _escaped_label(label)
        if shown in pairs:
            raise InvalidFamilyError(f"two labels become {shown!r}")
        pairs[shown] = encodable(value)
    for label, value in injected.items():
        pairs.setdefault(label, value)

    special = {BUCKET: "le", QUANTILE: "quantile", FLAG: name}.get(kind)
    bound = math.nan
    if special is not None:
        if special not in pairs:
            raise InvalidFamilyError(f"sample {sample!r} has no label {special!r}")
        if kind != FLAG:
            bound = float(pairs[special])
            if math.isnan(bound) or (kind == QUANTILE and not 0 <= bound <= 1):
                raise InvalidFamilyError(f"{special}={pairs[special]!r}")
            if math.isinf(bound):
                pairs[special] = NOT_FINITE[str(bound)]
    ordered = sorted(pairs.items())
    line = ",".join([f'{label}="{escaped(value)}"' for label, value in ordered])
    # An empty label and none are the same to Prometheus.
    belongs = [pair for pair in ordered if pair[0] != special and pair[1]]
    return Layout(
        f"{name}{suffix}{{{line}}} " if line else f"{name}{suffix} ",
        sys.intern(repr(belongs)),
        kind,
        suffix if suffix in _LATE else "",
        bound,
    )


def escaped_name(name: str) -> str:
    """The metric name with ``_`` for what the formats cannot spell.

    Raises:
        InvalidFamilyError: it is empty.
    """
    if not name:
        raise InvalidFamilyError("a family without a name")
    return _NOT_OF_A_METRIC.sub("_", name)


def _escaped_label(name: str) -> str:
    if not name or name.startswith("__"):
        raise InvalidFamilyError(f"label name {name!r}")
    return _NOT_OF_A_LABEL.sub("_", name)


def escaped(text: str) -> str:
    """A label's value, or a help text in OpenMetrics, as it stands between quotes."""
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def encodable(text: str) -> str:
    """Without lone surrogates, one of which would cost the whole page."""
    return text if text.isascii() else text.encode(errors="replace").decode()


def time_suffix(timestamp: Any, *, openmetrics: bool) -> str:
    """A sample's time, given in seconds, as its line ends: milliseconds in the text format.

    Raises:
        InvalidFamilyError: it is not finite.
    """
    seconds = float(timestamp)
    if not math.isfinite(seconds):
        raise InvalidFamilyError(f"a sample of the time {timestamp}")
    return f" {timestamp}" if openmetrics else f" {int(seconds * 1000)}"


def number(value: Any) -> str:
    """A value as both formats spell it."""
    text = repr(value if type(value) is float else float(value))
    return text if text[-1] <= "9" else NOT_FINITE[text]


def exemplar_suffix(exemplar: Any) -> str:
    """An exemplar as an OpenMetrics line ends; nothing if it is too long for the format.

    Raises:
        InvalidFamilyError: a label or the time cannot be shown.
    """
    labels = sorted((_escaped_label(name), value) for name, value in exemplar.labels.items())
    if sum(len(name) + len(value) for name, value in labels) > _EXEMPLAR_CHARACTERS:
        return ""
    inside = ",".join([f'{name}="{escaped(encodable(value))}"' for name, value in labels])
    at = exemplar.timestamp
    time = "" if at is None else time_suffix(at, openmetrics=True)
    return f" # {{{inside}}} {number(exemplar.value)}{time}"
