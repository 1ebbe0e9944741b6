"""The stack without Docker: `scripts/up --local` and `scripts/down`, in a copy of the project."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from support.waiting import until
from support.worker_process import free_ports

PORTS = ("PROMETHEUS_PORT", "ALERTMANAGER_PORT", "WORKER_API_PORT", "WORKER_SYSTEM_PORT")
NEEDED = ("docker-compose.yml", ".env", "prometheus", "alertmanager", "scripts", "worker")

pytestmark = [
    pytest.mark.needs("vllm", "prometheus", "alertmanager"),
    pytest.mark.timeout(400),
]


@dataclass(frozen=True)
class Project:
    """A copy of the project with ports of its own."""

    root: Path
    environment: dict[str, str]

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run one of the project's commands to its end."""
        return subprocess.run(
            [str(self.root / command[0]), *command[1:]],
            cwd=self.root,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    def up(self, *options: str) -> subprocess.CompletedProcess[str]:
        """`scripts/up --local` on this Python."""
        return self.run("scripts/up", "--local", "--python", sys.executable, *options)

    def url(self, setting: str, path: str) -> str:
        """Return a URL on one of the copy's ports."""
        return f"http://127.0.0.1:{self.environment[setting]}{path}"

    def query(self, expr: str) -> list[object]:
        """Return the result of a query on the copy's Prometheus."""
        url = self.url("PROMETHEUS_PORT", "/api/v1/query")
        return list(httpx.get(url, params={"query": expr}).json()["data"]["result"])

    def parts(self) -> set[tuple[str, str]]:
        """Return what the supervisor noted about itself and the parts that it runs."""
        return {(path.name, path.read_text()) for path in self.root.glob(".local/run/*.pid")}

    def processes(self) -> list[psutil.Process]:
        """Every process that runs in this copy, or that one of those started."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.cwd() == str(self.root) or str(self.root) in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return found


@pytest.fixture
def project(repository: Path, tmp_path: Path) -> Iterator[Project]:
    """A copy, stopped at the end whatever happened."""
    root = tmp_path / "a copy"
    root.mkdir()
    for name in NEEDED:
        source = repository / name
        if source.is_dir():
            shutil.copytree(source, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, root / name)
    ports = {name: str(port) for name, port in zip(PORTS, free_ports(len(PORTS)), strict=True)}
    # A project of its own for Docker Compose too: `scripts/down` stops containers as well.
    copy = Project(root, {**os.environ, **ports, "COMPOSE_PROJECT_NAME": "llm-worker-e2e-local"})
    yield copy
    copy.run("scripts/down")
    for process in copy.processes():
        process.kill()


def test_up_serves_and_scrapes_and_down_leaves_nothing(project: Project) -> None:
    """The main job without Docker: a real worker under load, scraped, and then gone."""
    up = project.up()
    assert up.returncode == 0, up.stdout + up.stderr
    assert "Grafana is not started" in up.stdout

    metrics = httpx.get(project.url("WORKER_SYSTEM_PORT", "/metrics")).text
    assert "llm_worker_build_info" in metrics
    assert "vllm:num_requests_running" in metrics
    until("the worker scraped", lambda: project.query('up{job="worker"} == 1'), 60)
    until("the load", lambda: project.query("rate(vllm:generation_tokens_total[1m]) > 0"), 90)
    until(
        "the Watchdog delivered",
        lambda: (
            "Watchdog"
            in json.dumps(httpx.get(project.url("ALERTMANAGER_PORT", "/api/v2/alerts")).json())
        ),
        60,
    )

    # Running it again is safe and starts nothing.
    parts = project.parts()
    assert {name for name, _ in parts} == {
        "stack.pid", "worker.pid", "loadgen.pid", "prometheus.pid", "alertmanager.pid",
    }  # fmt: skip
    again = project.up()
    assert again.returncode == 0
    assert "already running" in again.stdout
    restarted = {name for name, _ in parts - project.parts()}
    assert restarted <= {"alertmanager.pid"}, "read again with the notification channels"

    started = time.monotonic()
    down = project.run("scripts/down")
    assert down.returncode == 0, down.stdout + down.stderr
    assert project.processes() == []
    print(f"down took {time.monotonic() - started:.0f} s")
    # The data stays; the addresses don't, or a later Prometheus would look for dead targets.
    assert (project.root / ".local" / "data" / "prometheus" / "wal").is_dir()
    assert not (project.root / ".local" / "prometheus").exists()


def test_a_taken_port_is_named_with_the_setting_that_moves_it(project: Project) -> None:
    """Nothing starts, exit code 5, and the message says what to do."""
    port = project.environment["ALERTMANAGER_PORT"]
    server = subprocess.Popen(
        [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", port],
        stderr=subprocess.DEVNULL,
    )
    try:
        until("the port taken", lambda: httpx.get(f"http://127.0.0.1:{port}/").status_code, 20)
        up = project.up()
    finally:
        server.kill()
        server.wait()

    assert up.returncode == 5
    assert f"port {port} is taken" in up.stderr
    assert "ALERTMANAGER_PORT" in up.stderr
    assert project.processes() == []
