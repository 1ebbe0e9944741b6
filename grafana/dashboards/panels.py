"""Panels: grafanalib's, where it knows the current options, and subclasses where it does not.

Owns how a panel looks (options, legend, thresholds, size) and what must be said about it. Which
numbers it shows is the dashboards' business; places are ``boards``', ids and the last repairs
``normalize``'s.

Source: grafanalib 0.7.1; option names from grafana/grafana, packages/grafana-schema, 12.x.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from grafanalib import core

from . import units

Json = dict[str, Any]

DATASOURCE: Json = {"type": "prometheus", "uid": "${datasource}"}
# The alert list asks a data source by its name; provisioning/datasources holds the same name.
RULES_DATASOURCE_NAME = "Prometheus"

# Scrapes are 10 s apart: a shorter step would only repeat samples.
MIN_INTERVAL = "10s"
NO_TRAFFIC = "no traffic"
NO_DATA = "no data"

GREEN, YELLOW, ORANGE, RED, BLUE, GREY = "green", "yellow", "orange", "red", "blue", "#808080"

Step = tuple[str, float | None]
PLAIN: tuple[Step, ...] = ((GREEN, None),)
NEUTRAL: tuple[Step, ...] = ((BLUE, None),)
BAD_ABOVE_ZERO: tuple[Step, ...] = ((GREEN, None), (RED, 1))


@dataclass(frozen=True, slots=True)
class Reading:
    """How to read one panel; the text behind its "i"."""

    what: str  # what is drawn, from whose point of view
    why: str  # the decision it helps with
    normal: str  # the range in which nothing needs doing
    then: str  # what to do when it leaves that range

    def markdown(self, needs: str | None) -> str:
        """Return the panel's description; ``needs`` names the flag without which it is empty."""
        lines = [
            self.what,
            f"**Why:** {self.why}",
            f"**Normal:** {self.normal}",
            f"**Then:** {self.then}",
        ]
        if needs:
            lines.append(f"**Needs:** {needs}")
        return "\n\n".join(lines)


class Query(core.Target):  # type: ignore[misc]
    """A Prometheus query; grafanalib's emits Graphite's and Grafana 4's keys beside it."""

    def to_json_data(self) -> Json:
        """Return what the Prometheus query editor writes."""
        return {
            "datasource": DATASOURCE,
            "editorMode": "code",
            "expr": self.expr,
            "format": self.format,
            "instant": self.instant,
            "legendFormat": self.legendFormat or "__auto",
            "range": not self.instant,
            "refId": self.refId,
        }


def query(
    expr: str, legend: str = "", *, instant: bool = False, form: str = "time_series"
) -> Query:
    """Return a query; its refId is given by its place in the panel."""
    return Query(expr=expr, legendFormat=legend, instant=instant, format=form)


def thresholds(steps: Sequence[Step]) -> Json:
    """Return absolute thresholds; the first step's value is null, which means "from below"."""
    return {
        "mode": "absolute",
        "steps": [{"color": color, "value": value} for color, value in steps],
    }


def color_override(name: str, color: str) -> Json:
    """Return an override that draws the series ``name`` in one colour."""
    return {
        "matcher": {"id": "byName", "options": name},
        "properties": [{"id": "color", "value": {"fixedColor": color, "mode": "fixed"}}],
    }


def value_mapping(values: dict[str, tuple[str, str]]) -> list[Json]:
    """Return a mapping of values to (text, colour)."""
    return [
        {
            "type": "value",
            "options": {
                value: {"color": color, "index": index, "text": text}
                for index, (value, (text, color)) in enumerate(values.items())
            },
        }
    ]


def _legend(calcs: Sequence[str], *, show: bool = True) -> Json:
    return {
        "calcs": list(calcs),
        "displayMode": "table" if calcs else "list",
        "placement": "bottom",
        "showLegend": show,
    }


def _tooltip(mode: str = "multi") -> Json:
    return {"hideZeros": False, "mode": mode, "sort": "desc" if mode == "multi" else "none"}


_HIDE_FROM = {"legend": False, "tooltip": False, "viz": False}
_REDUCE = {"calcs": ["lastNotNull"], "fields": "", "values": False}


class _Modern(core.Panel):  # type: ignore[misc]
    """A panel whose type and options grafanalib does not know; ``extraJson`` says the rest."""

    panel_type = ""

    def to_json_data(self) -> Json:
        """Return grafanalib's common keys with this panel's type."""
        data: Json = self.panel_json({"type": self.panel_type})
        return data


class BarGauge(_Modern):
    """grafanalib's BarGauge still writes ``fieldOptions``, gone since Grafana 7."""

    panel_type = "bargauge"


class Heatmap(_Modern):
    """grafanalib's Heatmap writes the options of Grafana 8."""

    panel_type = "heatmap"


class Table(_Modern):
    """grafanalib's Table writes ``displayMode``, now ``cellOptions``."""

    panel_type = "table"


class StateTimeline(_Modern):
    """grafanalib's StateTimeline has no ``showLegend`` and no axis placement."""

    panel_type = "state-timeline"


class AlertList(_Modern):
    """grafanalib's AlertList writes the options of Grafana's alerting before version 8."""

    panel_type = "alertlist"


class Text(_Modern):
    """grafanalib's Text has no ``code`` options."""

    panel_type = "text"


def _common(
    title: str, reading: Reading, queries: Sequence[Query], size: tuple[int, int], extra: Json
) -> Json:
    width, height = size
    return {
        "title": title,
        "description": reading,  # boards turns it into text, with what the panel needs
        "dataSource": DATASOURCE,
        "targets": list(queries),
        "interval": MIN_INTERVAL,
        "gridPos": core.GridPos(h=height, w=width, x=0, y=0),
        "extraJson": extra,
    }


def time_series(
    title: str,
    reading: Reading,
    queries: Sequence[Query],
    unit: str,
    *,
    size: tuple[int, int] = (8, 8),
    calcs: Sequence[str] = ("lastNotNull", "max"),
    stack: bool = False,
    minimum: float | None = 0,
    maximum: float | None = None,
    steps: Sequence[Step] = PLAIN,
    show_thresholds: bool = False,
    log_scale: bool = False,
    step_lines: bool = False,
    overrides: Sequence[Json] = (),
    no_value: str = NO_DATA,
) -> Any:
    """Return lines over time; ``stack`` fills and adds them, ``step_lines`` does not slope."""
    custom = {
        "axisBorderShow": False,
        "axisCenteredZero": False,
        "axisColorMode": "text",
        "axisLabel": "",
        "axisPlacement": "auto",
        "barAlignment": 0,
        "drawStyle": "line",
        "fillOpacity": 30 if stack else 8,
        "gradientMode": "none",
        "hideFrom": _HIDE_FROM,
        "insertNulls": False,
        "lineInterpolation": "stepAfter" if step_lines else "linear",
        "lineWidth": 1,
        "pointSize": 5,
        "scaleDistribution": {"log": 10, "type": "log"} if log_scale else {"type": "linear"},
        "showPoints": "never",
        "spanNulls": False,
        "stacking": {"group": "A", "mode": "normal" if stack else "none"},
        "thresholdsStyle": {"mode": "dashed" if show_thresholds else "off"},
    }
    extra = {
        "fieldConfig": {
            "defaults": {
                "color": {"mode": "palette-classic"},
                "custom": custom,
                "mappings": [],
                "max": maximum,
                "min": minimum,
                "noValue": no_value,
                "thresholds": thresholds(steps),
                "unit": unit,
            },
            "overrides": list(overrides),
        },
        "options": {"legend": _legend(calcs), "tooltip": _tooltip()},
    }
    return core.TimeSeries(**_common(title, reading, queries, size, extra))


def stat(
    title: str,
    reading: Reading,
    expr: str,
    unit: str,
    *,
    size: tuple[int, int] = (3, 4),
    legend: str = "",
    steps: Sequence[Step] = NEUTRAL,
    decimals: int | None = None,
    mappings: Sequence[Json] = (),
    instant: bool = False,
    text: str = "auto",
    links: Sequence[Json] = (),
    no_value: str = NO_TRAFFIC,
) -> Any:
    """Return one big number, with its recent course behind it unless ``instant``."""
    extra = {
        "fieldConfig": {
            "defaults": {
                "color": {"mode": "thresholds"},
                "custom": {},
                "decimals": decimals,
                "links": list(links),
                "mappings": list(mappings),
                "noValue": no_value,
                "thresholds": thresholds(steps),
                "unit": unit,
            },
            "overrides": [],
        },
        "options": {
            "colorMode": "value",
            "graphMode": "none" if instant else "area",
            "justifyMode": "auto",
            "orientation": "auto",
            "percentChangeColorMode": "standard",
            "reduceOptions": _REDUCE,
            "showPercentChange": False,
            "textMode": text,
            "wideLayout": True,
        },
    }
    queries = [query(expr, legend, instant=instant)]
    return core.Stat(**_common(title, reading, queries, size, extra))


def bar_gauge(
    title: str,
    reading: Reading,
    queries: Sequence[Query],
    unit: str,
    *,
    size: tuple[int, int] = (8, 8),
    maximum: float | None = None,
    steps: Sequence[Step] = NEUTRAL,
    no_value: str = NO_DATA,
) -> Any:
    """Return one horizontal bar per series, for the last value."""
    extra = {
        "fieldConfig": {
            "defaults": {
                "color": {"mode": "thresholds"},
                "mappings": [],
                "max": maximum,
                "min": 0,
                "noValue": no_value,
                "thresholds": thresholds(steps),
                "unit": unit,
            },
            "overrides": [],
        },
        "options": {
            "displayMode": "basic",
            "legend": _legend((), show=False),
            "maxVizHeight": 300,
            "minVizHeight": 16,
            "minVizWidth": 8,
            "namePlacement": "auto",
            "orientation": "horizontal",
            "reduceOptions": _REDUCE,
            "showUnfilled": True,
            "sizing": "auto",
            "valueMode": "color",
        },
    }
    return BarGauge(**_common(title, reading, queries, size, extra))


def heatmap(
    title: str,
    reading: Reading,
    expr: str,
    unit: str,
    *,
    cell_unit: str = units.PER_SECOND,
    size: tuple[int, int] = (8, 8),
    no_value: str = NO_TRAFFIC,
) -> Any:
    """Return a histogram's buckets over time; ``expr`` is a rate by ``le``."""
    extra = {
        "fieldConfig": {
            "defaults": {
                "custom": {"hideFrom": _HIDE_FROM, "scaleDistribution": {"type": "linear"}},
                "noValue": no_value,
                "unit": unit,
            },
            "overrides": [],
        },
        "options": {
            "calculate": False,
            "cellGap": 1,
            "cellValues": {"unit": cell_unit},
            "color": {
                "exponent": 0.5,
                "fill": "dark-orange",
                "mode": "scheme",
                "reverse": False,
                "scale": "exponential",
                "scheme": "Oranges",
                "steps": 64,
            },
            "exemplars": {"color": "rgba(255,0,255,0.7)"},
            "filterValues": {"le": 1e-9},
            "legend": {"show": True},
            "rowsFrame": {"layout": "auto"},
            "showValue": "never",
            "tooltip": {"mode": "single", "showColorScale": False, "yHistogram": True},
            "yAxis": {"axisPlacement": "left", "reverse": False, "unit": unit},
        },
    }
    queries = [query(expr, "{{le}}", form="heatmap")]
    return Heatmap(**_common(title, reading, queries, size, extra))


def state_timeline(
    title: str,
    reading: Reading,
    queries: Sequence[Query],
    mappings: Sequence[Json],
    *,
    size: tuple[int, int] = (24, 6),
    no_value: str = NO_DATA,
) -> Any:
    """Return one coloured band per series; ``mappings`` name the values."""
    extra = {
        "fieldConfig": {
            "defaults": {
                "color": {"mode": "thresholds"},
                "custom": {
                    "axisPlacement": "auto",
                    "fillOpacity": 80,
                    "hideFrom": _HIDE_FROM,
                    "insertNulls": False,
                    "lineWidth": 0,
                    "spanNulls": False,
                },
                "mappings": list(mappings),
                "noValue": no_value,
                "thresholds": thresholds(((GREY, None),)),
                "unit": units.NONE,
            },
            "overrides": [],
        },
        "options": {
            "alignValue": "left",
            "legend": _legend(()),
            "mergeValues": True,
            "rowHeight": 0.85,
            "showValue": "auto",
            "tooltip": _tooltip("single"),
        },
    }
    return StateTimeline(**_common(title, reading, queries, size, extra))


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table of instant queries."""

    title: str
    expr: str
    unit: str
    steps: tuple[Step, ...] = PLAIN
    colored: bool = False


def table(
    title: str,
    reading: Reading,
    keys: Sequence[str],
    columns: Sequence[Column],
    *,
    size: tuple[int, int] = (24, 8),
    no_value: str = NO_DATA,
) -> Any:
    """Return one row per combination of ``keys``, which every column's query is grouped by."""
    letters = [chr(ord("A") + index) for index in range(len(columns))]
    # With one query there is nothing to merge, and the column is called "Value".
    names = [f"Value #{letter}" for letter in letters] if len(columns) > 1 else ["Value"]
    overrides = [
        {
            "matcher": {"id": "byName", "options": column.title},
            "properties": [
                {"id": "unit", "value": column.unit},
                {"id": "thresholds", "value": thresholds(column.steps)},
                {
                    "id": "custom.cellOptions",
                    "value": {"type": "color-text" if column.colored else "auto"},
                },
            ],
        }
        for column in columns
    ]
    order = [*keys, *names]
    extra = {
        "fieldConfig": {
            "defaults": {
                "color": {"mode": "thresholds"},
                "custom": {"align": "auto", "cellOptions": {"type": "auto"}, "inspect": False},
                "mappings": [],
                "noValue": no_value,
                "thresholds": thresholds(PLAIN),
                "unit": units.SHORT,
            },
            "overrides": overrides,
        },
        "options": {"cellHeight": "sm", "showHeader": True, "sortBy": []},
        "transformations": [
            {"id": "merge", "options": {}},
            {
                "id": "organize",
                "options": {
                    "excludeByName": {"Time": True},
                    "includeByName": {},
                    "indexByName": {name: index for index, name in enumerate(order)},
                    "renameByName": {
                        name: column.title for name, column in zip(names, columns, strict=True)
                    },
                },
            },
        ],
    }
    queries = [query(column.expr, instant=True, form="table") for column in columns]
    return Table(**_common(title, reading, queries, size, extra))


def alert_list(title: str, reading: Reading, *, size: tuple[int, int] = (8, 8)) -> Any:
    """Return what Prometheus' own rules say is firing or pending, except the Watchdog."""
    extra = {
        "fieldConfig": {
            "defaults": {"noValue": "nothing is firing", "unit": units.NONE},
            "overrides": [],
        },
        "options": {
            "alertInstanceLabelFilter": '{severity=~"critical|warning|info"}',
            "alertName": "",
            "dashboardAlerts": False,
            "datasource": RULES_DATASOURCE_NAME,
            "groupBy": [],
            "groupMode": "default",
            "maxItems": 20,
            "showInactiveAlerts": False,
            "showInstances": True,
            "sortOrder": 3,
            "stateFilter": {
                "error": True,
                "firing": True,
                "noData": False,
                "normal": False,
                "pending": True,
                "recovering": True,
            },
            "viewMode": "list",
        },
    }
    return AlertList(**_common(title, reading, [], size, extra))
