"""The system server's routes: statuses, tokens, content negotiation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry, Counter

from llm_worker.errors import ConfigError
from llm_worker.exposition.exposition import Exposition
from llm_worker.lifecycle import Lifecycle, State
from llm_worker.metrics import Metrics
from llm_worker.observer.health import Health, Heartbeat
from llm_worker.observer.server import Handlers, SystemServer, create_app


class Served:
    """A system server on a free port, and what its handlers were asked."""

    def __init__(self, token: str | None = None, open_to_others: bool = False) -> None:
        metrics = Metrics(CollectorRegistry())
        self.lifecycle = Lifecycle(metrics)
        self.drained = 0
        self.info: dict[str, Any] | None = None
        registry = CollectorRegistry()
        Counter("demo", "Demonstrations.", registry=registry).inc(3)
        exposition = Exposition(metrics, {})
        exposition.register("demo", registry)
        handlers = Handlers(
            health=Health(self.lifecycle, Heartbeat(metrics)),
            exposition=exposition,
            version=lambda: {"llm_worker": "1"},
            engine_info=lambda: self.info,
            drain=self.drain,
        )
        app = create_app(handlers, token=token, open_to_others=open_to_others)
        self.server = SystemServer(app, "127.0.0.1", 0)
        self.server.start()
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.server.port}")

    def drain(self) -> None:
        self.drained += 1

    def close(self) -> None:
        self.client.close()
        self.server.close()


@pytest.fixture
def served() -> Iterator[Served]:
    server = Served()
    yield server
    server.close()


def test_probes_follow_the_state(served: Served) -> None:
    """/live is 200 from the start; /ready and /health become 200 with the state."""
    statuses = [served.client.get(path).status_code for path in ("/live", "/ready", "/health")]
    assert statuses == [200, 503, 503]
    served.lifecycle.to(State.WARMING)
    served.lifecycle.to(State.READY)
    statuses = [served.client.get(path).status_code for path in ("/live", "/ready", "/health")]
    assert statuses == [200, 200, 200]


def test_engine_info_is_503_until_there_is_an_engine(served: Served) -> None:
    """Not known yet is not an empty answer."""
    assert served.client.get("/engine/info").status_code == 503
    served.info = {"blocks": 4}
    assert served.client.get("/engine/info").json() == {"blocks": 4}


def test_metrics_are_negotiated_compressed_and_filtered(served: Served) -> None:
    """Format by Accept, gzip by Accept-Encoding, families by name[]."""
    plain = served.client.get("/metrics", headers={"accept-encoding": "identity"})
    assert "demo_total 3.0" in plain.text
    assert "content-encoding" not in plain.headers
    accept = {"accept": "application/openmetrics-text;version=1.0.0"}
    assert served.client.get("/metrics", headers=accept).text.endswith("# EOF\n")
    packed = served.client.get("/metrics", headers={"accept-encoding": "gzip"})
    assert packed.headers["content-encoding"] == "gzip"
    assert "demo_total 3.0" in packed.text
    filtered = served.client.get("/metrics", params={"name[]": "demo_total"}).text
    assert "demo_total 3.0" in filtered
    assert "llm_worker" not in filtered


def test_on_loopback_writing_needs_no_token(served: Served) -> None:
    """Whoever is on the machine can send SIGTERM anyway."""
    assert served.client.post("/engine/drain").status_code == 202
    assert served.drained == 1


def test_beyond_loopback_writing_without_a_token_is_refused_with_the_fix() -> None:
    """No token configured means nobody may write, not everybody."""
    server = Served(open_to_others=True)
    try:
        answer = server.client.post("/engine/drain")
        assert answer.status_code == 403
        assert "--worker-system-token-file" in answer.json()["error"]
        assert server.drained == 0
    finally:
        server.close()


@pytest.mark.parametrize("open_to_others", [True, False])
def test_a_configured_token_is_always_asked_for(open_to_others: bool) -> None:
    """Reading stays open, writing needs the right bearer token."""
    server = Served(token="s3cret", open_to_others=open_to_others)
    try:
        for given in ({}, {"authorization": "Bearer no"}, {"authorization": "s3cret"}):
            assert server.client.post("/engine/drain", headers=given).status_code == 401
        assert server.drained == 0
        right = {"authorization": "Bearer s3cret"}
        assert server.client.post("/engine/drain", headers=right).status_code == 202
        assert server.client.get("/live").status_code == 200
    finally:
        server.close()


def test_a_busy_port_is_a_configuration_error(served: Served) -> None:
    """It is found where it can be told, not in a background thread."""
    app = create_app(
        Handlers(None, None, dict, dict, lambda: None),  # type: ignore[arg-type]
        token=None,
        open_to_others=False,
    )
    with pytest.raises(ConfigError, match="choose another --worker-system-port"):
        SystemServer(app, "127.0.0.1", served.server.port)


def test_an_unknown_route_is_a_404_that_names_it(served: Served) -> None:
    """A typo in a probe's path is visible."""
    answer = served.client.get("/redy")
    assert answer.status_code == 404
    assert "/redy" in answer.json()["error"]
