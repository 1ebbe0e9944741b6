"""The shipped compose file as a running stack, and what the tests ask it.

Only images, ports, the secrets directory and the project's name differ from what a user starts:
all of them are variables of the compose file.
"""

from __future__ import annotations

import http.server
import json
import os
import re
import shlex
import subprocess
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import httpx
from testcontainers.compose import DockerCompose

T = TypeVar("T")
# The README's command that kills the engine.
KILL_ENGINE = re.compile(r"`docker compose exec (worker-cpu python3 -c .+)`")


class Receiver:
    """A webhook receiver: every notification that Alertmanager delivers, in order."""

    def __init__(self) -> None:
        self.received: list[dict[str, Any]] = []
        receiver = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.received.append(json.loads(body))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *args: object) -> None:
                pass

        # Reachable from the containers, so not on loopback only.
        self.server = http.server.ThreadingHTTPServer(("0.0.0.0", 0), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True, name="receiver").start()

    def alert(self, name: str, status: str) -> dict[str, Any] | None:
        """Return the first delivered alert of this name and status."""
        for notification in list(self.received):
            for alert in notification["alerts"]:
                if alert["labels"]["alertname"] == name and alert["status"] == status:
                    return dict(alert)
        return None

    def close(self) -> None:
        """Stop listening."""
        self.server.shutdown()
        self.server.server_close()


@dataclass
class Stack:
    """A running stack: its compose project, its ports on this machine, its webhook receiver."""

    compose: DockerCompose
    ports: dict[str, int]
    receiver: Receiver
    client: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=10.0))

    def url(self, service: str, path: str) -> str:
        """Return the URL of a path on a service's published port."""
        return f"http://127.0.0.1:{self.ports[service]}{path}"

    def status(self, service: str, path: str) -> int | None:
        """Return the status of a GET, None if nobody answers."""
        try:
            return self.client.get(self.url(service, path)).status_code
        except httpx.TransportError:
            return None

    def prometheus(self, path: str, **parameters: str | float) -> Any:
        """Return the data of one call to Prometheus' API; its error is an AssertionError."""
        answer = self.client.get(self.url("PROMETHEUS_PORT", f"/api/v1/{path}"), params=parameters)
        body = answer.json()
        assert body["status"] == "success", f"{parameters}: {body.get('error')}"
        return body["data"]

    def query(self, expr: str, at: float | None = None) -> list[dict[str, Any]]:
        """Return the result of an instant query, as a list of series."""
        extra = {} if at is None else {"time": at}
        data = self.prometheus("query", query=expr, **extra)
        return [] if data["resultType"] == "scalar" else list(data["result"])

    def firing(self) -> set[str]:
        """Return the names of the alerts that fire."""
        alerts = self.prometheus("alerts")["alerts"]
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}

    def inspect(self, service: str) -> dict[str, Any]:
        """Return `docker inspect` of the service's container."""
        container = self.compose.get_container(service, include_all=True).ID
        assert container is not None
        done = subprocess.run(
            ["docker", "inspect", container], capture_output=True, text=True, check=True
        )
        return dict(json.loads(done.stdout)[0])

    def assert_locked_down(self, service: str) -> None:
        """Healthy, read-only, without capabilities, bounded, loopback only, with rotated logs."""
        container = self.inspect(service)
        host = container["HostConfig"]
        published = [p for ports in (host["PortBindings"] or {}).values() for p in ports]

        assert container["State"]["Health"]["Status"] == "healthy"
        assert host["ReadonlyRootfs"] is True
        assert host["CapDrop"] == ["ALL"]
        assert not host["CapAdd"]
        assert host["SecurityOpt"] == ["no-new-privileges:true"]
        assert host["Memory"] > 0
        assert host["PidsLimit"] > 0
        assert host["RestartPolicy"]["Name"] == "unless-stopped"
        assert host["LogConfig"]["Config"]["max-size"]
        assert {binding["HostIp"] for binding in published} <= {"127.0.0.1"}

    def restart(self, service: str) -> None:
        """Restart a service's container, as `docker compose restart` does."""
        command = [*self.compose.docker_compose_command(), "restart", service]
        subprocess.run(command, cwd=self.compose.context, capture_output=True, check=True)

    def kill_engine(self) -> float:
        """SIGKILL the worker's engine process, by the README's own command; return when."""
        readme = Path(self.compose.context) / "README.md"
        (command,) = KILL_ENGINE.findall(readme.read_text(encoding="utf-8"))
        service, *program = shlex.split(command)
        self.compose.exec_in_container(program, service)
        return time.time()


def start(
    root: Path,
    scratch: Path,
    ports: dict[str, int],
    *,
    services: tuple[str, ...] = (),
    settings: Mapping[str, str] = MappingProxyType({}),
) -> Stack:
    """Build and start the stack of ``root``'s compose file with the profiles demo and fleet.

    ``services`` are those to start, without any all of them; ``settings`` override the file's.
    """
    receiver = Receiver()
    secrets = scratch / "secrets"
    secrets.mkdir()
    secrets.chmod(0o755)
    hook = secrets / "webhook_url"
    hook.write_text(f"http://host.docker.internal:{receiver.port}/\n", encoding="utf-8")
    hook.chmod(0o644)
    values = {
        "COMPOSE_PROJECT_NAME": f"llm-worker-e2e-{os.getpid()}",
        "COMPOSE_PROFILES": "demo,fleet",
        "WORKER_CPU_IMAGE": "llm-worker-test/worker-cpu:e2e",
        "KV_INDEX_IMAGE": "llm-worker-test/kv-index:e2e",
        "ALERTMANAGER_SECRETS": str(secrets),
        **{name: str(port) for name, port in ports.items()},
        **settings,
    }
    env_file = scratch / "e2e.env"
    lines = [f"{name}={value}" for name, value in values.items()]
    env_file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    env_files = [root / ".env", *images(root), env_file]
    compose = DockerCompose(
        root,
        build=True,
        quiet_build=True,
        env_file=[str(path) for path in env_files],
        services=list(services),
    )
    try:
        compose.start()
        compose.services = None  # all that is there ends, and its network
    except subprocess.CalledProcessError as error:
        logs = "\n".join(compose.get_logs())
        compose.services = None
        compose.stop()
        receiver.close()
        raise AssertionError(f"{error.stderr.decode(errors='replace')}\n{logs[-6000:]}") from error
    return Stack(compose, ports, receiver)


def images(root: Path) -> list[Path]:
    """The stand-in images' settings where no registry answers; nothing where one does."""
    stand_ins = root / ".local" / "images.env"
    if not stand_ins.exists():
        services = ("prometheus", "alertmanager", "grafana")
        pull = ["docker", "compose", "pull", "--quiet", "--policy=missing", *services]
        if subprocess.run(pull, cwd=root, capture_output=True, check=False).returncode == 0:
            return []
    # At once when nothing changed.
    done = subprocess.run(
        [root / "tests" / "images" / "build"], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"no registry, and no stand-in images: {done.stderr}"
    return [stand_ins]
