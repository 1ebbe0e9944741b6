"""The dashboards, as Grafana will read them: schema, meaning, PromQL, and the committed files.

Grafana itself is not run here. What can be known without it is: the schema in
grafana/dashboard.schema.json is stricter than Grafana's, and every rule below comes from a way in
which a dashboard breaks without an error.
"""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from grafanalib._gen import DashboardEncoder

from dashboards import catalog, needs, normalize, overview, panels, promql, queries, units
from support.places import FIXTURES, ROOT

Json = dict[str, Any]

GRAFANA = ROOT / "grafana"
SCHEMA = json.loads((GRAFANA / "dashboard.schema.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
DASHBOARDS: dict[str, Json] = {
    uid: normalize.normalize(build()) for uid, build in catalog.BUILDERS.items()
}

# The user's nine panels, by the names that their README gives them.
SEED_PANELS = {
    "请求队列状态": "Request queue",
    "GPU缓存使用率": "KV-cache use",
    "Token处理速率": "Token rates",
    "请求成功率": "Finished requests, by reason",
    "首Token响应时间分布": "TTFT",
    "GPU前缀缓存性能": "Prefix cache",
    "内存使用情况": "Memory",
    "请求抢占情况": "Preemptions",
    "Python进程指标": "CPU",
}

# Names that vLLM has dropped or never had; a query on one is empty for ever, without an error.
DEAD = (
    "vllm:gpu_cache_usage_perc",
    "vllm:cpu_cache_usage_perc",
    "vllm:gpu_prefix_cache_hits_total",
    "vllm:gpu_prefix_cache_queries_total",
    "vllm:gpu_prefix_cache_hit_rate",
    "vllm:num_requests_swapped",
    "vllm:time_per_output_token_seconds",
    "vllm:request_failure_counter",
    "vllm:gpu_memory_usage_bytes",
    "vllm_request_queue_size",
)


def all_panels() -> Iterator[tuple[str, Json]]:
    for uid, dashboard in DASHBOARDS.items():
        for panel in queries.panels(dashboard):
            yield uid, panel


def all_expressions() -> Iterator[tuple[str, str, str]]:
    """Yield (dashboard, panel, expression), with Grafana's variables, annotations too."""
    for uid, panel in all_panels():
        for target in panel["targets"]:
            yield uid, panel["title"], target["expr"]
    for uid, dashboard in DASHBOARDS.items():
        for annotation in dashboard["annotations"]["list"]:
            if "expr" in annotation:
                yield uid, f"annotation: {annotation['name']}", annotation["expr"]


EXPRESSIONS = list(all_expressions())
SELECTOR = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)\{([^{}]*)\}(\[[^\]]*\])?")


def selectors(expr: str) -> Iterator[re.Match[str]]:
    yield from SELECTOR.finditer(expr)


# --- the model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("uid", DASHBOARDS)
def test_a_dashboard_fits_the_schema(uid: str) -> None:
    """Every key is one that Grafana 12 and 13 know, with a value that they take."""
    problems = [
        f"{'/'.join(map(str, error.absolute_path))}: {error.message}"
        for error in VALIDATOR.iter_errors(DASHBOARDS[uid])
    ]
    assert problems == []


def test_the_schema_refuses_what_grafanalib_emits_by_itself() -> None:
    """The schema is a gate: without the normalize step no dashboard passes it."""
    raw = json.loads(json.dumps(overview.build(), cls=DashboardEncoder))
    assert not VALIDATOR.is_valid(raw)
    # Nor does a panel alone: null refIds and Graphite keys are in there.
    shell = DASHBOARDS[overview.UID] | {"panels": raw["panels"]}
    assert not VALIDATOR.is_valid(shell)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("editable",), True),
        (("schemaVersion",), 12),
        (("id",), 7),
        (("__inputs",), []),
        (("panels", 1, "type"), "graph"),
        (("panels", 1, "description"), ""),
        (("panels", 1, "datasource"), "Prometheus"),
        (("panels", 1, "fieldConfig", "defaults", "thresholds", "steps", 0, "value"), "null"),
        (("panels", 1, "targets", 0, "refId"), ""),
        (("templating", "list", 1, "allValue"), None),
        (("templating", "list", 1, "refresh"), 1),
    ],
)
def test_the_schema_refuses_a_known_mistake(path: tuple[str | int, ...], value: object) -> None:
    """Each of these was shipped by somebody, and Grafana said nothing."""
    dashboard: Any = json.loads(json.dumps(DASHBOARDS[overview.UID]))
    at = dashboard
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    assert not VALIDATOR.is_valid(dashboard)


@pytest.mark.parametrize("uid", DASHBOARDS)
def test_panel_ids_titles_and_ref_ids_are_unique(uid: str) -> None:
    """A second panel with the same id is drawn over the first; links to titles need one target."""
    dashboard = DASHBOARDS[uid]
    flat = list(queries.panels(dashboard))
    rows = [panel for panel in dashboard["panels"] if panel["type"] == "row"]
    for what in ("id", "title"):
        twice = [value for value, n in Counter(p[what] for p in flat + rows).items() if n > 1]
        assert twice == []
    for panel in flat:
        ref_ids = [target["refId"] for target in panel["targets"]]
        assert len(set(ref_ids)) == len(ref_ids), panel["title"]


def test_a_panel_keeps_its_id_when_panels_before_it_change() -> None:
    """Links to a panel and to its full-screen view stay valid over versions."""
    panel = next(p for _, p in all_panels() if p["title"] == "Request queue")
    assert panel["id"] == normalize.panel_id("Request queue")


@pytest.mark.parametrize("uid", DASHBOARDS)
def test_panels_lie_inside_the_grid_and_do_not_overlap(uid: str) -> None:
    """Grafana moves overlapping panels as it likes, differently on each screen."""

    def check(siblings: list[Json]) -> None:
        cells: dict[tuple[int, int], str] = {}
        for panel in siblings:
            place = panel["gridPos"]
            assert place["x"] + place["w"] <= 24, panel["title"]
            for x in range(place["x"], place["x"] + place["w"]):
                for y in range(place["y"], place["y"] + place["h"]):
                    other = cells.setdefault((x, y), panel["title"])
                    assert other == panel["title"], f"{panel['title']} lies on {other}"

    check(DASHBOARDS[uid]["panels"])
    for panel in DASHBOARDS[uid]["panels"]:
        if panel["type"] == "row":
            assert panel["gridPos"]["w"] == 24
            assert panel["title"].endswith("?"), "one question per row"
            check(panel["panels"])


def test_every_data_source_is_the_variable() -> None:
    """A panel with a data source of its own ignores the choice at the top of the page."""
    for _, panel in all_panels():
        assert panel["datasource"] == panels.DATASOURCE
        assert all(target["datasource"] == panels.DATASOURCE for target in panel["targets"])


def test_every_unit_is_one_that_grafana_knows() -> None:
    """Grafana shows an unknown unit as a suffix, without an error."""
    used = set()
    for _, panel in all_panels():
        used.add(panel["fieldConfig"]["defaults"]["unit"])
        for override in panel["fieldConfig"]["overrides"]:
            used |= {p["value"] for p in override["properties"] if p["id"] == "unit"}
        if panel["type"] == "heatmap":
            used |= {panel["options"]["yAxis"]["unit"], panel["options"]["cellValues"]["unit"]}
    assert used <= units.KNOWN
    assert units.KNOWN - used == set(), "listed, but not in use"


def test_threshold_values_rise() -> None:
    """Grafana takes the last step that is not above the value, in the order written."""
    for _, panel in all_panels():
        steps = panel["fieldConfig"]["defaults"].get("thresholds", {}).get("steps", [])
        values = [step["value"] for step in steps[1:]]
        assert values == sorted(values), panel["title"]


def test_overrides_match_a_series_of_their_panel() -> None:
    """An override whose name was mistyped does nothing, without an error."""
    for uid, panel in all_panels():
        if panel["type"] == "table":
            continue
        static = {t["legendFormat"] for t in panel["targets"] if "{{" not in t["legendFormat"]}
        templated = any("{{" in target["legendFormat"] for target in panel["targets"])
        for override in panel["fieldConfig"]["overrides"]:
            if override["matcher"]["id"] == "byName" and not templated:
                assert override["matcher"]["options"] in static, (uid, panel["title"])


def test_table_columns_are_grouped_alike_and_named() -> None:
    """Columns are merged by their labels: one that is grouped differently makes rows of its own."""
    for uid, panel in all_panels():
        if panel["type"] != "table":
            continue
        organize = panel["transformations"][1]["options"]
        keys = [k for k in organize["indexByName"] if not k.startswith("Value")]
        columns = set(organize["renameByName"].values())
        named = {o["matcher"]["options"] for o in panel["fieldConfig"]["overrides"]}
        assert columns == named, (uid, panel["title"])
        for target in panel["targets"]:
            for key in keys:
                assert key in target["expr"], (uid, panel["title"], key)


# --- what it says --------------------------------------------------------------------------------


def test_every_description_says_what_why_normal_and_then() -> None:
    """A panel without these four is a picture, not a help."""
    for uid, panel in all_panels():
        said = panel["description"]
        for part in ("\n\n**Why:** ", "\n\n**Normal:** ", "\n\n**Then:** "):
            assert said.count(part) == 1, (uid, panel["title"], part)
        assert not said.startswith("**")


def test_every_need_belongs_to_a_panel_that_names_it() -> None:
    """The list of panels that may be empty holds no panel that is gone, and each one says why."""
    descriptions = {(uid, panel["title"]): panel["description"] for uid, panel in all_panels()}
    for where, need in needs.NEEDS.items():
        assert f"**Needs:** {need.text}" in descriptions[where]
    for where, said in descriptions.items():
        assert ("**Needs:**" in said) == (where in needs.NEEDS), where
    drawn = {
        annotation["name"]
        for dashboard in DASHBOARDS.values()
        for annotation in dashboard["annotations"]["list"]
    }
    assert needs.ANNOTATIONS.keys() <= drawn


def test_a_feature_of_the_demo_is_also_recorded() -> None:
    """What the end-to-end test asks of the demo is tested without Docker, too, and little is not.

    The others need an event, or an option that the demo is not started with.
    """
    for where, need in needs.NEEDS.items():
        assert need.recorded or not need.demo, where
        assert need.recorded is None or any((FIXTURES / need.recorded).glob("*.prom")), where
    assert len([where for where, need in needs.NEEDS.items() if not need.demo]) < 10


@pytest.mark.parametrize(("chinese", "title"), SEED_PANELS.items())
def test_the_overview_holds_the_nine_panels_of_the_first_readme(chinese: str, title: str) -> None:
    """Who knows the project from its first README finds every panel under its name."""
    found = [p for p in queries.panels(DASHBOARDS["vllm-overview"]) if p["title"] == title]
    assert len(found) == 1
    assert found[0]["description"].startswith(chinese)


def test_the_panels_of_the_first_readme_are_not_folded_away() -> None:
    """Rows are open, but for the one about features that are off by default."""
    folded = [
        panel["title"]
        for panel in DASHBOARDS["vllm-overview"]["panels"]
        if panel["type"] == "row" and panel["collapsed"]
    ]
    assert folded == ["What do optional features do?"]


def test_firing_alerts_restarts_and_links_are_on_every_dashboard() -> None:
    """Whatever page is open, an alert, a restart and the way to the others are seen."""
    for uid, dashboard in DASHBOARDS.items():
        names = [annotation["name"] for annotation in dashboard["annotations"]["list"]]
        assert names == ["Annotations & Alerts", "Restarts", "Firing alerts"], uid
        linked = {tag for link in dashboard["links"] for tag in link["tags"]}
        assert linked == {tag for board in DASHBOARDS.values() for tag in board["tags"]}, uid
    types = {panel["type"] for panel in queries.panels(DASHBOARDS["vllm-overview"])}
    assert "alertlist" in types


# --- PromQL --------------------------------------------------------------------------------------


def test_every_variable_in_use_exists() -> None:
    """An unknown variable is sent to Prometheus as it stands, and matches nothing."""
    builtin = {"__rate_interval", "__range", "__url_time_range"}
    for uid, dashboard in DASHBOARDS.items():
        known = {v["name"] for v in dashboard["templating"]["list"]} | builtin
        used = set(re.findall(r"\$\{?(\w+)", json.dumps(dashboard["panels"])))
        used |= set(re.findall(r"\$\{?(\w+)", json.dumps(dashboard["annotations"])))
        used |= set(re.findall(r"\$\{?(\w+)", json.dumps(dashboard["templating"])))
        assert used - {"__all"} <= known, uid
        unused = known - used - builtin
        assert unused == set(), f"{uid}: variables that change nothing"


def test_every_selector_follows_job_and_instance() -> None:
    """Choosing one server at the top of the page leaves no other one in any panel."""
    for uid, panel, expr in EXPRESSIONS:
        for selector in selectors(expr):
            metric, matchers = selector[1], selector[2]
            if metric in needs.UNSCOPED:
                continue
            for label in ("job", "instance"):
                assert f'{label}=~"${label}"' in matchers, (uid, panel, metric)
            # "=" with a variable breaks as soon as two values, or All, are chosen.
            assert not re.search(r'\w="\$', matchers), (uid, panel, metric)


def test_every_query_of_the_overview_follows_the_model() -> None:
    """Choosing one model leaves no server of another one in any panel.

    Each selector asks for the model itself, or leaves out the servers that tell another one.
    """
    left_out = f" unless on (job, instance) {promql.OTHER_MODELS}"
    for uid, panel, expr in EXPRESSIONS:
        if uid != "vllm-overview":
            continue
        for selector in selectors(expr):
            if selector[1] in {**needs.UNSCOPED, **needs.EVERY_MODEL}:
                continue
            follows = re.search(r'model_name[=!]~"\$model_name"', selector[2]) is not None
            after = expr[selector.end() :].removeprefix(")")  # of rate()
            assert follows or after.startswith(left_out), (panel, selector[1])


BARE_WORDS = frozenset(
    re.findall(
        r"\w+",
        "sum max min avg count by on ignoring group_left group_right or and unless bool "
        "rate increase histogram_quantile label_replace vector time",
    )
)


def test_no_metric_is_read_without_a_selector() -> None:
    """A bare metric name reads every server there is."""
    for uid, panel, expr in EXPRESSIONS:
        rest = SELECTOR.sub("", expr)
        rest = re.sub(r'"[^"]*"', "", rest)
        rest = re.sub(r"\b(by|on|ignoring|group_left|group_right) ?\([^)]*\)", "", rest)
        words = set(re.findall(r"[a-zA-Z_:][\w:]*", rest))
        assert words <= BARE_WORDS, (uid, panel)


def test_counters_are_rated_and_gauges_are_not() -> None:
    """A raw counter draws its lifetime, and a rated gauge draws nonsense."""
    for uid, panel, expr in EXPRESSIONS:
        for selector in selectors(expr):
            metric, window = selector[1], selector[3]
            counter = re.search(r"_(total|bucket|sum|count)$", metric) is not None
            before = expr[: selector.start()]
            rated = before.endswith(("rate(", "increase("))
            if (uid, panel) in needs.RAW_COUNTERS:
                continue
            assert counter == rated, (uid, panel, metric)
            if rated:
                assert window in ("[$__rate_interval]", "[$__range]"), (uid, panel, metric)
                if before.endswith("rate("):
                    assert window == "[$__rate_interval]", (uid, panel, metric)


def test_quantiles_are_of_summed_buckets() -> None:
    """A quantile per series is no quantile of the whole, and without le there is none."""
    for uid, panel, expr in EXPRESSIONS:
        assert expr.count("histogram_quantile(") == len(
            re.findall(r"histogram_quantile\(0\.\d+, sum by \(le[,)]", expr)
        ), (uid, panel)


def test_no_query_reads_a_name_that_vllm_no_longer_has() -> None:
    """The names that half of the dashboards on the web still query."""
    for uid, panel, expr in EXPRESSIONS:
        names = {selector[1] for selector in selectors(expr)}
        assert names.isdisjoint(DEAD), (uid, panel)


def test_every_name_is_on_a_recorded_page() -> None:
    """A misspelt metric is an empty panel; the recordings hold what is really exported."""
    pages = [path.read_text() for path in FIXTURES.glob("*/*.prom")]
    samples, families = (
        {match[1] for page in pages for match in re.finditer(pattern, page, re.MULTILINE)}
        for pattern in (r"^([a-zA-Z_:][\w:]*)[{ ]", r"^# TYPE ([a-zA-Z_:][\w:]*) ")
    )
    # A family without a sample is announced all the same: its feature was off.
    announced = samples | {
        family + suffix for family in families for suffix in ("", "_bucket", "_sum", "_count")
    }
    asked = {
        selector[1]
        for _, _, expr in EXPRESSIONS
        for selector in selectors(expr)
        if selector[1].startswith(("vllm:", "llm_worker_", "http_", "python_"))
    }
    assert len(asked) > 50
    assert asked - announced == set()


def test_the_pages_recorded_from_plain_vllm_hold_nothing_of_ours() -> None:
    """What is shown to work without our worker was recorded without it."""
    pages = [
        path.read_text()
        for kind in ("vllm", "vllm-features")
        for path in FIXTURES.glob(f"{kind}/*")
    ]
    assert pages
    assert not [page for page in pages if "llm_worker" in page]


def test_the_overview_asks_nothing_that_only_our_worker_has() -> None:
    """A remote vLLM server without our worker fills the whole home dashboard."""
    ours = [
        (panel, expr)
        for uid, panel, expr in EXPRESSIONS
        if uid == "vllm-overview" and "llm_worker_" in expr
    ]
    assert ours == []


def test_panel_queries_has_every_query_with_its_variables_filled_in() -> None:
    """The end-to-end test runs this list; what is missing in it is not tested."""
    listed = queries.panel_queries({"job": "worker"})
    assert len(listed) == len(EXPRESSIONS)
    assert not [query for query in listed if "$" in query.expr]
    assert any('job=~"worker"' in query.expr for query in listed)
    with pytest.raises(KeyError):
        queries.substitute("rate(x[$no_such_variable])")


# --- the files -----------------------------------------------------------------------------------


def generate_stale() -> Any:
    return runpy.run_path(str(ROOT / "scripts" / "generate"))["stale"]


def test_the_committed_files_are_what_the_code_generates() -> None:
    """Grafana loads the committed JSON: it is current, by bytes and by names."""
    assert generate_stale()(catalog.files(), catalog.GENERATED) == []


def test_the_check_names_missing_changed_and_left_over_files(tmp_path: Path) -> None:
    """`scripts/generate --check` fails for each way in which the files can be stale."""
    stale = generate_stale()
    (tmp_path / "changed.json").write_text("{}")
    (tmp_path / "left-over.json").write_text("{}")
    problems = stale({"missing.json": "{}", "changed.json": "{ }"}, tmp_path)
    assert [problem.partition(":")[0] for problem in problems] == [
        "changed.json",
        "missing.json",
        "left-over.json",
    ]


def test_generating_twice_gives_the_same_bytes() -> None:
    """Also in another process, where hashes of strings differ."""
    program = "from dashboards import catalog; print(repr(sorted(catalog.files().items())))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=GRAFANA,
        env={"PYTHONHASHSEED": "4711", "PYTHONPATH": str(GRAFANA), "PYTHONIOENCODING": "utf-8"},
    )
    assert done.stdout == repr(sorted(catalog.files().items())) + "\n"


@pytest.mark.parametrize("name", catalog.files())
def test_a_generated_file_ends_with_one_newline_and_has_sorted_keys(name: str) -> None:
    """A change in a panel is a change in its lines only."""
    text = (catalog.GENERATED / name).read_text(encoding="utf-8")
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    assert "\r" not in text


# --- provisioning --------------------------------------------------------------------------------


def provisioned(path: str) -> Json:
    loaded: Json = yaml.safe_load((GRAFANA / "provisioning" / path).read_text())
    return loaded


def test_the_provisioned_data_source_is_the_one_that_the_panels_mean() -> None:
    """Name, uid and interval stand in two files; they agree."""
    sources = {s["uid"]: s for s in provisioned("datasources/prometheus.yml")["datasources"]}
    prometheus, alertmanager = sources["prometheus"], sources["alertmanager"]
    assert prometheus["name"] == panels.RULES_DATASOURCE_NAME
    assert prometheus["url"] == "${PROMETHEUS_URL}"
    assert prometheus["isDefault"] is True
    assert prometheus["jsonData"]["timeInterval"] == panels.MIN_INTERVAL
    assert prometheus["jsonData"]["httpMethod"] == "POST"
    assert prometheus["jsonData"]["manageAlerts"] is True
    assert alertmanager["type"] == "alertmanager"
    assert alertmanager["jsonData"]["implementation"] == "prometheus"
    assert all(source["editable"] is False for source in sources.values())


def test_dashboards_are_provisioned_into_one_folder_and_not_editable() -> None:
    """What is generated is not changed by hand, and titles are unique in their folder."""
    (provider,) = provisioned("dashboards/dashboards.yml")["providers"]
    assert provider["folder"] == "vLLM"
    assert provider["options"]["path"] == "/etc/grafana/dashboards"
    assert provider["allowUiUpdates"] is False
    assert provider["disableDeletion"] is True
    titles = [dashboard["title"] for dashboard in DASHBOARDS.values()]
    assert len(set(titles)) == len(titles)


def test_the_home_dashboard_is_the_overview() -> None:
    """GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH names this file."""
    assert catalog.HOME == "vllm-overview"
    assert f"{catalog.HOME}.json" in catalog.files()
