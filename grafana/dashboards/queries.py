"""Every query of every dashboard, ready to run on a Prometheus: variables are filled in.

Read from the normalised dashboards, not from the code that made them, so that what is tested is
what is shipped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from . import catalog, needs, normalize
from .needs import Need
from .panels import Json

# All of everything, in windows that fit a young Prometheus.
VALUES: Mapping[str, str] = {
    "__rate_interval": "1m",
    "__interval": "10s",
    "__range": "5m",
    "job": ".+",
    "instance": ".+",
    "model_name": ".+",
    "engine": ".+",
    "worker": ".+",
}

_VARIABLE = re.compile(r"\$\{?(\w+)\}?")


@dataclass(frozen=True, slots=True)
class PanelQuery:
    """One query of one panel."""

    dashboard: str  # uid
    panel: str  # title; "annotation: NAME" for an annotation
    ref_id: str
    expr: str  # without Grafana's variables
    instant: bool
    needs: Need | None  # why it may be empty, or None: it must return data under load


def substitute(expr: str, values: Mapping[str, str] = VALUES) -> str:
    """Return the expression with every variable replaced.

    Raises:
        KeyError: the expression uses a variable that no dashboard of ours has.
    """
    return _VARIABLE.sub(lambda match: values[match.group(1)], expr)


def panels(dashboard: Json) -> Iterator[Json]:
    """Yield every panel that is not a row, also those inside collapsed rows."""
    for panel in dashboard["panels"]:
        if panel["type"] == "row":
            yield from panel["panels"]
        else:
            yield panel


def panel_queries(values: Mapping[str, str] | None = None) -> list[PanelQuery]:
    """Return every query of every dashboard; ``values`` replaces some of ``VALUES``."""
    filled = {**VALUES, **(values or {})}
    result: list[PanelQuery] = []
    for uid, build in catalog.BUILDERS.items():
        dashboard = normalize.normalize(build())
        for panel in panels(dashboard):
            for target in panel["targets"]:
                result.append(
                    PanelQuery(
                        uid,
                        panel["title"],
                        target["refId"],
                        substitute(target["expr"], filled),
                        target["instant"],
                        needs.NEEDS.get((uid, panel["title"])),
                    )
                )
        for annotation in dashboard["annotations"]["list"]:
            if "expr" not in annotation:
                continue
            result.append(
                PanelQuery(
                    uid,
                    f"annotation: {annotation['name']}",
                    annotation["target"]["refId"],
                    substitute(annotation["expr"], filled),
                    False,
                    needs.ANNOTATIONS.get(annotation["name"]),
                )
            )
    return result
