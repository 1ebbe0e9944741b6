"""The main command with Docker: `scripts/up`, again while the stack runs, and `scripts/down`."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from e2e.stack import images
from support.waiting import until
from support.worker_process import free_ports

PORTS = ("GRAFANA_PORT", "PROMETHEUS_PORT", "ALERTMANAGER_PORT", "KV_INDEX_PORT")
PROJECT = f"llm-worker-up-{os.getpid()}"

pytestmark = [pytest.mark.needs("docker"), pytest.mark.timeout(600)]


class Commands:
    """The project's commands on a compose project of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        ports = free_ports(len(PORTS))
        files = [str(path) for path in (root / ".env", *images(root))]
        self.environment = {
            **os.environ,
            "COMPOSE_PROJECT_NAME": PROJECT,
            "COMPOSE_PROFILES": "demo,fleet",
            "COMPOSE_ENV_FILES": ",".join(files),
            "WORKER_CPU_IMAGE": "llm-worker-test/worker-cpu:e2e",
            "KV_INDEX_IMAGE": "llm-worker-test/kv-index:e2e",
            # Two workers want ranges; these are away from what a user's own stack takes.
            "WORKER_API_PORT": "28000-28009",
            "WORKER_SYSTEM_PORT": "28080-28089",
            **{name: str(port) for name, port in zip(PORTS, ports, strict=True)},
        }

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        return subprocess.run(
            [*command],
            cwd=self.root,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )

    def containers(self) -> dict[str, str]:
        """Id by name of the project's containers, running or not."""
        done = self.run(
            "docker", "ps", "--all", "--no-trunc", "--format", "{{.Names}} {{.ID}}",
            "--filter", f"label=com.docker.compose.project={PROJECT}",
        )  # fmt: skip
        return dict(line.split() for line in done.stdout.splitlines())

    def left(self) -> list[str]:
        """What is left of the project: containers, networks and volumes."""
        filters = ("--quiet", "--filter", f"label=com.docker.compose.project={PROJECT}")
        found = [self.run("docker", kind, "ls", *filters).stdout for kind in ("network", "volume")]
        return [*self.containers(), *"".join(found).split()]


@pytest.fixture
def commands(repository: Path) -> Iterator[Commands]:
    made = Commands(repository)
    yield made
    made.run("scripts/down", "--volumes")


def test_up_again_changes_nothing_and_down_leaves_nothing(commands: Commands) -> None:
    """Two workers are scraped and indexed; the second call recreates no container."""
    first = commands.run("scripts/up", "--docker", "--workers", "2", "--no-load")
    assert first.returncode == 0, first.stderr
    before = commands.containers()
    assert len(before) == 6, before  # Prometheus, Alertmanager, Grafana, two workers, the index

    again = commands.run("scripts/up", "--docker", "--workers", "2", "--no-load")
    assert again.returncode == 0, again.stderr
    assert commands.containers() == before

    prometheus = f"http://127.0.0.1:{commands.environment['PROMETHEUS_PORT']}/api/v1/query"

    def workers() -> bool:
        up = httpx.get(prometheus, params={"query": 'sum(up{job="worker"})'}).json()
        result = up["data"]["result"]
        return bool(result) and result[0]["value"][1] == "2"

    until("both workers are scraped", workers, 60)
    index = f"http://127.0.0.1:{commands.environment['KV_INDEX_PORT']}/kv/status"

    def indexed() -> bool:
        sources = json.loads(httpx.get(index).text)["sources"]
        return len(sources) == 2 and all(source["ok"] for source in sources)

    until("both workers are indexed", indexed, 60)

    down = commands.run("scripts/down", "--volumes")
    assert down.returncode == 0, down.stderr
    assert not commands.left()


def test_where_it_runs_already_it_never_goes_on_with_local_processes(
    commands: Commands,
) -> None:
    """A registry that is away is no reason to fight the running stack for its ports."""
    commands.environment["COMPOSE_PROFILES"] = "none"
    up = commands.run("scripts/up", "--docker")
    assert up.returncode == 0, up.stderr
    commands.environment["PROMETHEUS_IMAGE"] = "registry.invalid/no/such:1"
    again = commands.run("scripts/up")
    assert again.returncode == 4, again.stderr
    assert "local processes" not in again.stderr
    assert len(commands.containers()) == 3
