"""Every query of every dashboard, run on a real Prometheus that scrapes what real engines said.

The pages under fixtures/ are recorded (scripts/record_fixtures); a small server hands them out one
after the other, so that counters grow and ``rate()`` has something to say. Each recording is served
by two targets, so that an expression that only works for one instance fails here.
"""

from __future__ import annotations

import contextlib
import functools
import http.server
import json
import math
import re
import shutil
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dashboards import catalog, needs, normalize, queries
from dashboards.queries import PanelQuery
from support.places import FIXTURES
from support.waiting import until
from support.worker_process import free_ports

# Fixture directories, and their jobs here.
KINDS = ("vllm", "vllm-features", "worker", "worker-kv", "kv-index")
TARGETS_PER_KIND = 2
# Jobs that replay the recording of plain vLLM, rewritten: a server of another model, and one that
# is loading and tells no model yet.
RECORDED_MODEL, OTHER_MODEL = "tiny", "other"
REWRITTEN: dict[str, Callable[[bytes], bytes]] = {
    "vllm-other": lambda page: page.replace(
        f'model_name="{RECORDED_MODEL}"'.encode(), f'model_name="{OTHER_MODEL}"'.encode()
    ),
    "vllm-loading": lambda page: re.sub(rb"(?m)^(# \w+ )?vllm:.*\n", b"", page),
}
SCRAPES_PER_PAGE = 3

pytestmark = pytest.mark.needs("prometheus", "alertmanager")

PROMETHEUS_CONFIG = """
global: {{scrape_interval: 1s, scrape_timeout: 1s, evaluation_interval: 1s}}
rule_files: [{rules}]
alerting: {{alertmanagers: [{{static_configs: [{{targets: ["{alertmanager}"]}}]}}]}}
scrape_configs:
  - {{job_name: prometheus, static_configs: [{{targets: ["{prometheus}"]}}]}}
  - {{job_name: alertmanager, static_configs: [{{targets: ["{alertmanager}"]}}]}}
"""
RULES = """
groups:
  - name: test
    rules:
      - {alert: Watchdog, expr: vector(1), labels: {severity: none}}
      - {alert: Fault, expr: vector(1), labels: {severity: warning}}
"""
ALERTMANAGER_CONFIG = "{route: {receiver: nobody}, receivers: [{name: nobody}]}\n"


class Replay:
    """One recording on one port; the page turns every few scrapes and stays on the last one.

    ``rewrite`` changes each page before it is served.
    """

    def __init__(self, directory: Path, rewrite: Callable[[bytes], bytes] = bytes) -> None:
        self.pages = [rewrite(path.read_bytes()) for path in sorted(directory.glob("*.prom"))]
        self.scrapes = 0
        replay = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                page = replay.pages[min(replay.scrapes // SCRAPES_PER_PAGE, len(replay.pages) - 1)]
                replay.scrapes += 1
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
                self.end_headers()
                self.wfile.write(page)

            def log_message(self, *args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def read_through(self) -> bool:
        return self.scrapes > SCRAPES_PER_PAGE * len(self.pages)

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class Prometheus:
    """The HTTP API of a running Prometheus."""

    def __init__(self, address: str) -> None:
        self.url = f"http://{address}"

    def get(self, path: str, **parameters: str) -> Any:
        """Return the data of one API call.

        Raises:
            RuntimeError: Prometheus refused it; the message is Prometheus'.
        """
        body = urllib.parse.urlencode(parameters).encode()
        method = "GET" if "/label/" in path else "POST"
        url = f"{self.url}{path}" + (f"?{body.decode()}" if method == "GET" else "")
        request = urllib.request.Request(url, data=None if method == "GET" else body, method=method)
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return json.load(response)["data"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(error.read().decode()) from error

    def numbers(self, query: PanelQuery) -> list[float]:
        """Return every number that the panel would draw."""
        now = time.time()
        if query.instant:
            result = self.get("/api/v1/query", query=query.expr, time=str(now))["result"]
            return [float(series["value"][1]) for series in result]
        result = self.get(
            "/api/v1/query_range",
            query=query.expr,
            start=str(now - 20),
            end=str(now),
            step="1",
        )["result"]
        return [float(value) for series in result for _, value in series["values"]]

    def complaint(self, query: PanelQuery) -> str | None:
        """Return what is wrong with a query's answer, or None."""
        try:
            numbers = self.numbers(query)
        except RuntimeError as error:
            return f"fails: {error}"
        if not numbers:
            return "returns nothing"
        if not any(math.isfinite(number) for number in numbers):
            return "returns no number, only NaN or infinity"
        return None


@contextlib.contextmanager
def running(command: list[str], log: Path) -> Iterator[None]:
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout=10)


def recorded(kind: str) -> bool:
    return any((FIXTURES / kind).glob("*.prom"))


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A Prometheus that has read every recording to its end, and an Alertmanager beside it."""
    directory = tmp_path_factory.mktemp("prometheus")
    own, alertmanager, cluster = (f"127.0.0.1:{port}" for port in free_ports(3))
    replays = {
        kind: [Replay(FIXTURES / kind) for _ in range(TARGETS_PER_KIND)]
        for kind in KINDS
        if recorded(kind)
    }
    for job, rewrite in REWRITTEN.items():
        replays[job] = [Replay(FIXTURES / "vllm", rewrite)]
    rules = directory / "rules.yml"
    rules.write_text(RULES)
    config = PROMETHEUS_CONFIG.format(rules=rules, prometheus=own, alertmanager=alertmanager)
    for kind, targets in replays.items():
        addresses = json.dumps([replay.address for replay in targets])
        config += f"  - {{job_name: {kind}, static_configs: [{{targets: {addresses}}}]}}\n"
    (directory / "prometheus.yml").write_text(config)
    (directory / "alertmanager.yml").write_text(ALERTMANAGER_CONFIG)

    with contextlib.ExitStack() as stack:
        for targets in replays.values():
            for replay in targets:
                stack.callback(replay.close)
        stack.enter_context(
            running(
                [
                    shutil.which("prometheus-alertmanager") or "alertmanager",
                    f"--config.file={directory / 'alertmanager.yml'}",
                    f"--storage.path={directory / 'alertmanager'}",
                    f"--web.listen-address={alertmanager}",
                    f"--cluster.listen-address={cluster}",
                ],
                directory / "alertmanager.log",
            )
        )
        stack.enter_context(
            running(
                [
                    "prometheus",
                    f"--config.file={directory / 'prometheus.yml'}",
                    f"--storage.tsdb.path={directory / 'data'}",
                    f"--web.listen-address={own}",
                ],
                directory / "prometheus.log",
            )
        )
        server = Prometheus(own)
        until(
            f"every page scraped; see {directory}/prometheus.log",
            lambda: all(r.read_through for targets in replays.values() for r in targets),
        )
        expected = sum(map(len, replays.values())) + 2
        up = PanelQuery("", "", "A", "count(up == 1)", True, None)
        until("every target up", lambda: server.numbers(up) == [expected])
        firing = PanelQuery("", "", "A", 'count(ALERTS{alertstate="firing"})', True, None)
        until("the test's alerts fire", lambda: server.numbers(firing) == [2])
        # Two scrapes of every target that tells of itself, so that its counters have a rate.
        age = PanelQuery("", "", "A", "min(count_over_time(up[1m]))", True, None)
        until("a rate everywhere", lambda: server.numbers(age)[0] >= SCRAPES_PER_PAGE)
        yield server


@functools.cache
def all_queries(job: str) -> tuple[PanelQuery, ...]:
    return tuple(queries.panel_queries({"job": job}))


def complaints(server: Prometheus, asked: list[PanelQuery]) -> list[str]:
    assert asked, "no query was asked"
    return [
        f"{query.dashboard} / {query.panel} / {query.ref_id}: {complaint}\n    {query.expr}"
        for query in asked
        if (complaint := server.complaint(query)) is not None
    ]


def test_the_check_notices_an_empty_a_nan_and_a_failing_query(prometheus: Prometheus) -> None:
    """The tests below can fail: each kind of bad answer is a complaint."""
    for expr, expected in (
        ("no_such_metric", "nothing"),
        ("vector(0) / vector(0)", "NaN"),
        ("up * on () group_left () up", "fails"),
        ('up{job="vllm"} + on (job) up{job="vllm"}', "fails"),
    ):
        complaint = prometheus.complaint(PanelQuery("", "", "A", expr, False, None))
        assert complaint is not None
        assert expected in complaint


def test_prometheus_takes_every_query(prometheus: Prometheus) -> None:
    """No query is refused, also among those that may be empty."""
    refused = [
        complaint
        for complaint in complaints(prometheus, list(all_queries(".+")))
        if ": fails: " in complaint
    ]
    assert refused == []


def test_every_overview_query_returns_data_from_a_plain_vllm_server(
    prometheus: Prometheus,
) -> None:
    """The overview is whole for a remote `vllm serve` with default flags and without our worker."""
    asked = [
        query
        for query in all_queries("vllm")
        if query.dashboard == "vllm-overview" and query.needs is None
    ]
    assert complaints(prometheus, asked) == []


@pytest.mark.parametrize(
    "kind", sorted({need.recorded for need in needs.NEEDS.values() if need.recorded})
)
def test_every_query_that_needs_a_feature_returns_data_where_the_feature_is_on(
    prometheus: Prometheus, kind: str
) -> None:
    """A panel that says which flag it needs is not a panel that never works."""
    shown = {where for where, need in needs.NEEDS.items() if need.recorded == kind}
    asked = [query for query in all_queries(kind) if (query.dashboard, query.panel) in shown]
    assert complaints(prometheus, asked) == []


@pytest.mark.parametrize("uid", ["vllm-overview", "vllm-kv-cache"])
def test_every_query_that_needs_a_feature_is_empty_without_it(
    prometheus: Prometheus, uid: str
) -> None:
    """The list of needs holds no panel that would work anyway."""
    without = {
        (query.dashboard, query.panel)
        for query in all_queries("vllm")
        if query.dashboard == uid
        and query.needs is not None
        and not query.panel.startswith("annotation: ")
        and prometheus.complaint(query) is None
    }
    assert without == set()


def test_every_query_about_the_cache_that_needs_nothing_returns_data_from_a_plain_vllm_server(
    prometheus: Prometheus,
) -> None:
    """The first rows of the KV-cache dashboard are not for our worker only."""
    asked = [
        query
        for query in all_queries("vllm")
        if query.dashboard == "vllm-kv-cache" and query.needs is None
    ]
    assert complaints(prometheus, asked) == []


def test_what_workers_and_the_fleet_index_both_know_is_shown_for_the_fleet_index_too(
    prometheus: Prometheus,
) -> None:
    """Who chooses the job of the fleet index sees how its streams do."""
    rows = ("Ranks, side by side", "Trust, by rank", "Batches, by outcome", "Lag")
    shared = {("vllm-kv-cache", title) for title in (*rows, "Blocks, by worker", "Gaps, by kind")}
    asked = [query for query in all_queries("kv-index") if (query.dashboard, query.panel) in shared]
    assert {query.panel for query in asked} == {title for _, title in shared}
    assert complaints(prometheus, asked) == []


def test_every_query_about_the_monitoring_itself_returns_data(prometheus: Prometheus) -> None:
    """Prometheus and Alertmanager tell everything that their dashboard asks."""
    asked = [
        query
        for query in all_queries(".+")
        if query.dashboard == "vllm-monitoring-self" and query.needs is None
    ]
    assert complaints(prometheus, asked) == []


def drawn_jobs(server: Prometheus, panel: str, model_name: str) -> set[str]:
    """Return the jobs whose servers a panel of the overview draws for a model."""
    job = "|".join(["vllm", *REWRITTEN])
    asked = [
        query
        for query in queries.panel_queries({"job": job, "model_name": model_name})
        if query.dashboard == "vllm-overview" and query.panel == panel
    ]
    assert asked
    addresses = {
        series["metric"]["instance"]
        for query in asked
        for series in server.get("/api/v1/query", query=query.expr)["result"]
    }
    known = server.get("/api/v1/query", query="up")["result"]
    return {up["metric"]["job"] for up in known if up["metric"]["instance"] in addresses}


@pytest.mark.parametrize("panel", ["Memory", "CPU", "Scrape duration", "annotation: Restarts"])
def test_choosing_a_model_leaves_out_the_servers_of_other_models(
    prometheus: Prometheus, panel: str
) -> None:
    """Families without a model follow their server's; who tells none yet is never left out."""
    assert drawn_jobs(prometheus, panel, ".+") == {"vllm", "vllm-other", "vllm-loading"}
    assert drawn_jobs(prometheus, panel, RECORDED_MODEL) == {"vllm", "vllm-loading"}
    assert drawn_jobs(prometheus, panel, OTHER_MODEL) == {"vllm-other", "vllm-loading"}


def test_every_overview_query_returns_data_for_a_model_beside_others(
    prometheus: Prometheus,
) -> None:
    """The model that is chosen is not left out with the others, in rates and quotients neither."""
    asked = [
        query
        for query in queries.panel_queries({"job": "vllm|vllm-other", "model_name": OTHER_MODEL})
        if query.dashboard == "vllm-overview" and query.needs is None
    ]
    assert complaints(prometheus, asked) == []


@pytest.mark.skipif(not recorded("worker"), reason="no recording: scripts/record_fixtures worker")
def test_every_query_returns_data_from_our_worker(prometheus: Prometheus) -> None:
    """Overview and worker dashboard are whole for our worker."""
    asked = [
        query
        for query in all_queries("worker")
        if query.dashboard in {"vllm-overview", "vllm-worker"} and query.needs is None
    ]
    assert complaints(prometheus, asked) == []


def test_the_firing_alerts_annotation_sees_a_firing_alert(prometheus: Prometheus) -> None:
    """What needs an event is shown by one."""
    asked = [query for query in all_queries(".+") if query.panel == "annotation: Firing alerts"]
    assert complaints(prometheus, asked) == []


LABEL_VALUES = re.compile(r"label_values\((?P<selector>.+), (?P<label>\w+)\)")


@pytest.mark.parametrize("uid", catalog.BUILDERS)
def test_every_variable_finds_values(prometheus: Prometheus, uid: str) -> None:
    """No drop-down at the top of a dashboard is empty."""
    if uid == "vllm-worker" and not recorded("worker"):
        pytest.skip("no recording: scripts/record_fixtures worker")
    dashboard = normalize.normalize(catalog.BUILDERS[uid]())
    for variable in dashboard["templating"]["list"]:
        if variable["type"] != "query":
            continue
        match = LABEL_VALUES.fullmatch(variable["query"]["query"])
        assert match is not None, variable["query"]
        selector = queries.substitute(match["selector"])
        values = prometheus.get(f"/api/v1/label/{match['label']}/values", **{"match[]": selector})
        assert values, f"{variable['name']}: {selector}"
