"""grafanalib's output → what Grafana 12 and 13 load without migrating it.

Deterministic: the same dashboard gives the same bytes. Keeps a fixed set of keys and drops every
other one (``rows``, ``style``, ``gnetId``, ``__inputs``, ``step``, ``intervalFactor`` …), so that
a new legacy key of grafanalib cannot slip through. Panel ids come from titles, so that a link to a
panel survives the panels before it.
"""

from __future__ import annotations

import json
import zlib
from typing import Any

from grafanalib import core
from grafanalib._gen import DashboardEncoder

from .panels import Json

# 42 is the newest that 12.x knows; 41 is what all of 12.x and 13.x take as it is.
SCHEMA_VERSION = 41

PANEL_KEYS = (
    "datasource",
    "description",
    "fieldConfig",
    "gridPos",
    "interval",
    "links",
    "options",
    "targets",
    "title",
    "transformations",
    "type",
)


def without_nulls(value: Any) -> Any:
    """Return the value without keys that hold null; a threshold's null value means something."""
    if isinstance(value, dict):
        if value.keys() == {"color", "value"}:
            return value
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def panel_id(title: str) -> int:
    """Return an id for a title: positive, and small enough for JavaScript and Grafana's database.

    Two titles that meet are found by a test, and one of them is changed.
    """
    return zlib.crc32(title.encode()) % 1_000_000 + 1


def ref_id(index: int) -> str:
    """Return the query's letter by its place in the panel."""
    return chr(ord("A") + index)


def panel(raw: Json) -> Json:
    """Return one panel or row."""
    if raw["type"] == "row":
        return {
            "collapsed": raw["collapsed"],
            "gridPos": raw["gridPos"],
            "id": panel_id(f"row: {raw['title']}"),
            "panels": [panel(child) for child in raw["panels"]],
            "title": raw["title"],
            "type": "row",
        }
    kept = {key: raw[key] for key in PANEL_KEYS if raw.get(key) is not None}
    kept["id"] = panel_id(raw["title"])
    kept["fieldConfig"] = without_nulls(raw["fieldConfig"])
    defaults = kept["fieldConfig"]["defaults"]
    if not defaults.get("thresholds", {}).get("steps"):
        defaults.pop("thresholds", None)  # grafanalib writes them empty where there are none
    kept["targets"] = [
        target | {"refId": ref_id(index)} for index, target in enumerate(raw["targets"])
    ]
    return kept


def normalize(dashboard: core.Dashboard) -> Json:
    """Return the dashboard as Grafana's classic model."""
    raw = json.loads(json.dumps(dashboard, cls=DashboardEncoder))
    return {
        "annotations": raw["annotations"],
        "description": raw["description"],
        "editable": raw["editable"],
        "fiscalYearStartMonth": 0,
        "graphTooltip": raw["graphTooltip"],
        "id": None,
        "links": raw["links"],
        "panels": [panel(child) for child in raw["panels"]],
        "refresh": raw["refresh"],
        "schemaVersion": SCHEMA_VERSION,
        "tags": raw["tags"],
        "templating": raw["templating"],
        "time": raw["time"],
        "timepicker": {},
        "timezone": raw["timezone"],
        "title": raw["title"],
        "uid": raw["uid"],
        "version": 1,
        "weekStart": "",
    }


def text(dashboard: core.Dashboard) -> str:
    """Return the file: sorted keys, two spaces, one newline at the end."""
    return json.dumps(normalize(dashboard), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
