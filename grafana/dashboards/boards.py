"""What every dashboard of ours has: rows laid out, variables, annotations and links.

Owns the frame around the panels. A section is a question; its panels answer that one question and
flow from left to right in the order they are written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import attr
from grafanalib import core

from . import needs, promql
from .panels import DATASOURCE, MIN_INTERVAL, Json

COLUMNS = 24
TAG_ENGINE = "vllm"  # dashboards that share the engine variables
TAG_STACK = "vllm-monitoring"  # dashboards about the monitoring itself


@dataclass(frozen=True, slots=True)
class Section:
    """A row: the question it answers, and the panels that answer it."""

    question: str
    panels: Sequence[Any]
    collapsed: bool = False


def place(panels: Sequence[Any], top: int) -> tuple[list[Any], int]:
    """Return the panels with their places, left to right from row ``top``, and the next free row.

    Raises:
        ValueError: a panel is wider than the dashboard.
    """
    placed: list[Any] = []
    x = height = 0
    y = top
    for panel in panels:
        size = panel.gridPos
        if size.w > COLUMNS:
            raise ValueError(f"{panel.title}: wider than {COLUMNS} columns")
        if x + size.w > COLUMNS:
            x, y, height = 0, y + height, 0
        placed.append(attr.evolve(panel, gridPos=core.GridPos(h=size.h, w=size.w, x=x, y=y)))
        x += size.w
        height = max(height, size.h)
    return placed, y + height


def lay_out(sections: Sequence[Section]) -> list[Any]:
    """Return row panels and panels in Grafana's order; a collapsed row holds its own panels."""
    result: list[Any] = []
    y = 0
    for section in sections:
        row = core.RowPanel(
            title=section.question,
            collapsed=section.collapsed,
            gridPos=core.GridPos(h=1, w=COLUMNS, x=0, y=y),
        )
        placed, bottom = place(section.panels, y + 1)
        if section.collapsed:
            result.append(attr.evolve(row, panels=placed))
            y += 1
        else:
            result += [row, *placed]
            y = bottom
    return result


def described(uid: str, panel: Any) -> Any:
    """Return the panel with its reading as text, and with what it needs."""
    need = needs.NEEDS.get((uid, panel.title))
    return attr.evolve(panel, description=panel.description.markdown(need.text if need else None))


def datasource_variable() -> Json:
    """Return the variable that every panel's data source is."""
    return {
        "current": {},
        "hide": 0,
        "includeAll": False,
        "label": "Data source",
        "multi": False,
        "name": "datasource",
        "options": [],
        "query": "prometheus",
        "refresh": 1,
        "regex": "",
        "skipUrlSync": False,
        "type": "datasource",
    }


def query_variable(name: str, label: str, values: str) -> Json:
    """Return a multi-value variable; ``All`` is ``.+``, so that it never lists every value."""
    return {
        "allValue": ".+",
        "current": {"text": ["All"], "value": ["$__all"]},
        "datasource": DATASOURCE,
        "definition": values,
        "hide": 0,
        "includeAll": True,
        "label": label,
        "multi": True,
        "name": name,
        "options": [],
        "query": {"query": values, "refId": f"variable-{name}"},
        "refresh": 2,
        "regex": "",
        "skipUrlSync": False,
        "sort": 1,
        "type": "query",
    }


def engine_variables() -> list[Json]:
    """Return job, model, instance and engine, each narrowed by the ones before it.

    Every vLLM server has ``vllm:num_requests_running`` from its first scrape on, idle or not.
    """
    metric = "vllm:num_requests_running"
    job = 'job=~"$job"'
    model = f'{job},model_name=~"$model_name"'
    instance = f'{model},instance=~"$instance"'
    return [
        datasource_variable(),
        query_variable("job", "Job", f"label_values({metric}, job)"),
        query_variable("model_name", "Model", f"label_values({metric}{{{job}}}, model_name)"),
        query_variable("instance", "Instance", f"label_values({metric}{{{model}}}, instance)"),
        query_variable("engine", "Engine", f"label_values({metric}{{{instance}}}, engine)"),
    ]


def worker_variables() -> list[Json]:
    """Return the same variables from our worker's metrics.

    A worker has a state before it has an engine, so that job and instance come first here.
    """
    job = 'job=~"$job"'
    instance = f'{job},instance=~"$instance"'
    engine = f'{instance},model_name=~"$model_name"'
    metric = "llm_worker_kv_capacity_blocks"
    return [
        datasource_variable(),
        query_variable("job", "Job", "label_values(llm_worker_state, job)"),
        query_variable(
            "instance", "Instance", f"label_values(llm_worker_state{{{job}}}, instance)"
        ),
        query_variable("model_name", "Model", f"label_values({metric}{{{instance}}}, model_name)"),
        query_variable("engine", "Engine", f"label_values({metric}{{{engine}}}, engine)"),
    ]


def kv_variables() -> list[Json]:
    """Return job, instance, model, worker and engine of everything that knows of a KV cache.

    The fleet index has jobs and instances of its own, and no model; a plain vLLM server no worker.
    """
    job = 'job=~"$job"'
    instance = f'{job},instance=~"$instance"'
    either = '__name__=~"vllm:kv_cache_usage_perc|llm_worker_kv_index_bytes"'
    usage, up = "vllm:kv_cache_usage_perc", "llm_worker_kv_listener_up"
    ranks = f'__name__=~"{usage}|{up}",{instance}'
    return [
        datasource_variable(),
        query_variable("job", "Job", f"label_values({{{either}}}, job)"),
        query_variable("instance", "Instance", f"label_values({{{either},{job}}}, instance)"),
        query_variable("model_name", "Model", f"label_values({usage}{{{instance}}}, model_name)"),
        query_variable("worker", "Worker", f"label_values({up}{{{instance}}}, worker)"),
        query_variable("engine", "Engine", f"label_values({{{ranks}}}, engine)"),
    ]


def target_variables() -> list[Json]:
    """Return job and instance of everything that is scraped."""
    return [
        datasource_variable(),
        query_variable("job", "Job", "label_values(up, job)"),
        query_variable("instance", "Instance", 'label_values(up{job=~"$job"}, instance)'),
    ]


def _annotation(name: str, expr: str, *, color: str, title: str, text: str, tags: str) -> Json:
    return {
        "datasource": DATASOURCE,
        "enable": True,
        "expr": expr,
        "hide": False,
        "iconColor": color,
        "name": name,
        "step": MIN_INTERVAL,
        "tagKeys": tags,
        "target": {"expr": expr, "interval": MIN_INTERVAL, "refId": "Anno"},
        "textFormat": text,
        "titleFormat": title,
        "useValueForTime": False,
    }


def shared_annotations(*, of_engines: bool) -> list[Json]:
    """Return Grafana's own annotations, restarts, and firing alerts.

    A restart is drawn where the new process started: the value is the time, in milliseconds.
    """
    scope = promql.ENGINE_TARGET if of_engines else promql.TARGET
    started = promql.aggregate(
        "max", "process_start_time_seconds", by=("job", "instance"), scope=scope
    )
    firing = 'ALERTS{alertstate="firing",severity=~"critical|warning"}'
    builtin = {
        "builtIn": 1,
        "datasource": {"type": "grafana", "uid": "-- Grafana --"},
        "enable": True,
        "hide": True,
        "iconColor": "rgba(0, 211, 255, 1)",
        "name": "Annotations & Alerts",
        "type": "dashboard",
    }
    restarts = _annotation(
        "Restarts",
        f"{started} * 1000",
        color="orange",
        title="Process started",
        text="{{job}} {{instance}}",
        tags="job,instance",
    )
    alerts = _annotation(
        "Firing alerts",
        firing,
        color="red",
        title="{{alertname}}",
        text="{{instance}} {{model_name}}",
        tags="severity",
    )
    return [builtin, restarts | {"useValueForTime": True}, alerts]


def links() -> list[Any]:
    """Return the links at the top: the engine dashboards keep the variables, the others do not."""
    return [
        core.DashboardLink(
            title="vLLM", tags=[TAG_ENGINE], type="dashboards", includeVars=True, keepTime=True
        ),
        core.DashboardLink(title="Monitoring", tags=[TAG_STACK], type="dashboards", keepTime=True),
    ]


def board(
    uid: str,
    title: str,
    description: str,
    *,
    tag: str,
    variables: Sequence[Json],
    sections: Sequence[Section],
) -> core.Dashboard:
    """Return a dashboard of ours; ``normalize`` makes it Grafana's."""
    said = [
        Section(s.question, [described(uid, panel) for panel in s.panels], s.collapsed)
        for s in sections
    ]
    return core.Dashboard(
        title=title,
        uid=uid,
        description=description,
        tags=[tag],
        editable=False,
        graphTooltip=core.GRAPH_TOOLTIP_MODE_SHARED_CROSSHAIR,
        refresh="30s",
        timezone="browser",
        time=core.Time("now-1h", "now"),
        templating=core.Templating(list=list(variables)),
        annotations=core.Annotations(list=shared_annotations(of_engines=tag == TAG_ENGINE)),
        links=links(),
        panels=lay_out(said),
    )
