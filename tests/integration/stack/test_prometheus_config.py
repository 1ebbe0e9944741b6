"""The shipped Prometheus configuration on a real Prometheus.

It runs on a copy of prometheus/ in which only the intervals are shorter (``sped_up``), laid out as
in the mode without Docker: .local/prometheus/*.yml beside it names what DNS names in Compose. The
targets are small HTTP servers that stand in for vLLM servers and hand out pages recorded from real
ones.
"""

from __future__ import annotations

import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.places import FIXTURES, ROOT
from support.waiting import until
from support.worker_process import free_ports

PROMETHEUS = ROOT / "prometheus"

pytestmark = pytest.mark.needs("prometheus")


def sped_up(text: str) -> str:
    """prometheus.yml with every interval of seconds at one second. Nothing else changes."""
    return re.sub(r"((?:scrape|evaluation|refresh)_(?:interval|timeout): )\d+s", r"\g<1>1s", text)


class StandIn:
    """An HTTP server on a free port that hands out one page; stands in for a vLLM server."""

    def __init__(self, page: str) -> None:
        self.page = page
        stand_in = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4")
                self.end_headers()
                self.wfile.write(stand_in.page.encode())

            def log_message(self, *_: object) -> None:
                """Silence."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        self.address = f"127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class Prometheus:
    """The real program on a copy of the shipped configuration."""

    def __init__(self, home: Path) -> None:
        self.directory = home / "prometheus"
        shutil.copytree(PROMETHEUS, self.directory)
        config = self.directory / "prometheus.yml"
        config.write_text(sped_up(config.read_text(encoding="utf-8")), encoding="utf-8")
        self.address = f"127.0.0.1:{free_ports(1)[0]}"
        self.log = home / "prometheus.log"
        self.local(home, "prometheus", self.address)
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    "prometheus",
                    f"--config.file={config}",
                    f"--storage.tsdb.path={home / 'data'}",
                    f"--web.listen-address={self.address}",
                    "--web.enable-lifecycle",
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
                # Elsewhere: relative paths must hang on the file, not on where one stands.
                cwd="/",
            )
        until("Prometheus is ready", lambda: self.get("/-/ready"))

    @staticmethod
    def local(home: Path, job: str, address: str) -> None:
        """What ``scripts/up`` writes without Docker."""
        directory = home / ".local" / "prometheus"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"{job}.yml").write_text(json.dumps([{"targets": [address]}]), "utf-8")

    def get(self, path: str, **query: str) -> str:
        url = f"http://{self.address}{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return str(answer.read().decode())

    def query(self, expr: str) -> list[dict[str, Any]]:
        result = json.loads(self.get("/api/v1/query", query=expr))["data"]["result"]
        assert isinstance(result, list)
        return result

    def value(self, expr: str) -> float | None:
        """The value of an expression that gives one series, or None where it gives none."""
        result = self.query(expr)
        assert len(result) <= 1, result
        return float(result[0]["value"][1]) if result else None

    def reload(self) -> int:
        request = urllib.request.Request(f"http://{self.address}/-/reload", method="POST")
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    def targets(self, *arguments: str) -> None:
        """scripts/targets on the copy."""
        command = [sys.executable, "-I", str(ROOT / "scripts" / "targets")]
        subprocess.run(
            [*command, "--directory", str(self.directory / "targets"), *arguments],
            check=True,
            capture_output=True,
            timeout=30,
        )

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(30)


@pytest.fixture(scope="module")
def worker() -> Iterator[StandIn]:
    pages = sorted((FIXTURES / "worker").glob("*.prom"))
    assert pages, "nothing recorded from our worker"
    stand_in = StandIn(pages[-1].read_text(encoding="utf-8"))
    yield stand_in
    stand_in.close()


@pytest.fixture(scope="module")
def vllm() -> Iterator[StandIn]:
    stand_in = StandIn((FIXTURES / "vllm-features" / "02.prom").read_text(encoding="utf-8"))
    yield stand_in
    stand_in.close()


@pytest.fixture(scope="module")
def prometheus(
    tmp_path_factory: pytest.TempPathFactory, worker: StandIn, vllm: StandIn
) -> Iterator[Prometheus]:
    """One for all tests here: ``worker`` by .local, ``vllm`` by scripts/targets."""
    home = tmp_path_factory.mktemp("home")
    Prometheus.local(home, "worker", worker.address)
    started = Prometheus(home)
    started.targets("add", vllm.address, "--environment", "prod", "--check")
    yield started
    started.close()


def promtool(*arguments: str) -> str:
    """Run promtool in prometheus/, and return what it says; it must succeed."""
    done = subprocess.run(
        ["promtool", *arguments],
        cwd=PROMETHEUS,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_promtool_accepts_the_configuration() -> None:
    """The only warnings are about the files of local mode, which Compose does not have."""
    said = promtool("check", "config", "prometheus.yml")
    warnings = [line for line in said.splitlines() if "WARNING" in line]
    assert all(".local/prometheus/" in line for line in warnings), warnings


def test_promtool_finds_no_fault_in_the_rules() -> None:
    """Duplicates and the like are errors here, not hints."""
    files = sorted(str(path) for path in (PROMETHEUS / "rules").glob("*.yml"))
    promtool("check", "rules", "--lint=all", "--lint-fatal", *files)


def test_every_rule_passes_its_promtool_tests() -> None:
    """Each alert silent, firing and silent again; each recording rule with its number."""
    files = sorted(str(path) for path in (PROMETHEUS / "tests").glob("*.test.yml"))
    assert len(files) == len(list((PROMETHEUS / "rules").glob("*.yml")))
    promtool("test", "rules", *files)


def test_an_added_target_is_discovered_scraped_and_forgotten_without_a_restart(
    prometheus: Prometheus, vllm: StandIn
) -> None:
    """scripts/targets writes, Prometheus notices: with the labels, and gone after remove."""
    up = f'up{{job="vllm",instance="{vllm.address}",environment="prod"}}'
    until("the added target is scraped", lambda: prometheus.value(up) == 1)
    other = StandIn(vllm.page)
    try:
        prometheus.targets("add", other.address, "--name", "second", "--role", "chat")
        second = 'vllm:num_requests_running{job="vllm",instance="second",role="chat"}'
        until("the second target is scraped", lambda: prometheus.query(second))
        prometheus.targets("remove", "second")
        until("the second target is forgotten", lambda: not prometheus.query(second))
    finally:
        other.close()
    assert prometheus.value(up) == 1


def test_the_example_file_is_no_target_and_local_mode_is_found(
    prometheus: Prometheus, vllm: StandIn, worker: StandIn
) -> None:
    """Exactly three targets: the added one, the worker of local mode, and Prometheus itself."""
    until("all targets are up", lambda: len(prometheus.query("up == 1")) == 3)
    found = {(s["metric"]["job"], s["metric"]["instance"]) for s in prometheus.query("up")}
    assert found == {
        ("vllm", vllm.address),
        ("worker", worker.address),
        ("prometheus", prometheus.address),
    }


def test_created_samples_are_dropped_and_everything_else_is_kept(
    prometheus: Prometheus, vllm: StandIn
) -> None:
    """They are a part of the page that nobody reads; a counter beside them stays."""
    assert "vllm:prompt_tokens_created" in vllm.page
    until("the page is stored", lambda: prometheus.query("vllm:prompt_tokens_total"))
    assert not prometheus.query('{__name__=~".+_created",job=~"worker|vllm"}')


def test_every_rule_evaluates_on_what_real_engines_say(prometheus: Prometheus) -> None:
    """No many-to-many match, no type error, with a plain vLLM and our worker side by side."""
    until("rules are evaluated on data", lambda: prometheus.query("engine:vllm_steps:rate2m"))
    groups = json.loads(prometheus.get("/api/v1/rules"))["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) > 40
    assert {r["name"]: r.get("lastError") for r in rules if r["health"] != "ok"} == {}


def test_a_page_over_the_limit_counts_as_down_and_the_others_go_on(
    prometheus: Prometheus,
) -> None:
    """sample_limit protects Prometheus from one target; the reason is at /targets."""
    page = "".join(f'vllm:flood{{n="{number}"}} 1\n' for number in range(20001))
    flood = StandIn(page)
    try:
        prometheus.targets("add", flood.address, "--name", "flood")
        until("the flood is refused", lambda: prometheus.value('up{instance="flood"}') == 0)
        active = json.loads(prometheus.get("/api/v1/targets"))["data"]["activeTargets"]
        errors = {t["labels"]["instance"]: t["lastError"] for t in active}
        assert "sample limit exceeded" in errors["flood"]
        assert not prometheus.query("vllm:flood")
        assert prometheus.value("count(up == 1)") == 3
    finally:
        prometheus.targets("remove", "flood")
        flood.close()
    until("the flood is forgotten", lambda: not prometheus.query('up{instance="flood"}'))


def test_a_reload_takes_changed_rules_and_refuses_broken_ones(prometheus: Prometheus) -> None:
    """200 and in force, or 500, the old rules kept, and the metric that the alert reads at 0."""
    added = prometheus.directory / "rules" / "added.yml"
    added.write_text("groups: [{name: added, rules: [{record: 'a:b:c', expr: vector(7)}]}]\n")
    try:
        assert prometheus.reload() == 200
        until("the new rule is evaluated", lambda: prometheus.value("a:b:c") == 7)
        added.write_text("groups: [{name: added, rules: [{record: 'a:b:c', expr: 'sum('}]}]\n")
        assert prometheus.reload() == 500
        failed = "prometheus_config_last_reload_successful == 0"
        until("the failed reload is visible", lambda: prometheus.query(failed))
        assert prometheus.value("a:b:c") == 7
    finally:
        added.unlink()
    assert prometheus.reload() == 200


def test_the_metrics_that_prometheus_tells_about_itself_have_the_names_we_ask_for(
    prometheus: Prometheus,
) -> None:
    """The names in the rules, against the page of the real program."""
    page = prometheus.get("/metrics")
    asked = set(
        re.findall(
            r"\bprometheus_[a-z_]+",
            "\n".join(
                re.sub(r"#.*", "", path.read_text(encoding="utf-8"))
                for path in (PROMETHEUS / "rules").glob("*.yml")
            ),
        )
    )
    # This one has a child per Alertmanager: test_alertmanager_routing has one.
    asked.discard("prometheus_notifications_errors_total")
    assert len(asked) > 5
    missing = {name for name in asked if not re.search(rf"^{name}[ {{]", page, re.MULTILINE)}
    assert not missing


def test_every_query_of_every_runbook_is_valid(prometheus: Prometheus) -> None:
    """Copied at three in the morning, it must at least parse: Prometheus itself reads it."""
    queries = [
        line
        for path in sorted((PROMETHEUS / "runbooks").glob("*.md"))
        for block in re.findall(r"```promql\n(.*?)```", path.read_text("utf-8"), re.DOTALL)
        for line in block.strip().splitlines()
    ]
    assert len(queries) > 30
    for query in queries:
        prometheus.query(query)
