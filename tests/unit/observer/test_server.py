"""The system server's routes: statuses, tokens, content negotiation."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry, Counter

from llm_worker.exposition.exposition import Exposition
from llm_worker.link.board import Board
from llm_worker.link.status import Status
from llm_worker.listening import listen
from llm_worker.metrics import ExporterMetrics
from llm_worker.observer.health import Health
from llm_worker.observer.routes import Handlers, create_app
from llm_worker.observer.server import SystemServer


class Served:
    """A system server on a free port, and what its handlers were asked."""

    def __init__(self, token: str | None = None, open_to_others: bool = False) -> None:
        self.board = Board.create()
        self.drained = 0
        self.info: dict[str, Any] | None = None
        registry = CollectorRegistry()
        Counter("demo", "Demonstrations.", registry=registry).inc(3)
        exposition = Exposition(ExporterMetrics(CollectorRegistry()), {})
        exposition.register("demo", registry)
        handlers = Handlers(
            health=Health(self.board),
            exposition=exposition,
            version=lambda: {"llm_worker": "1"},
            engine_info=lambda: self.info,
            drain=self.drain,
        )
        app = create_app(handlers, token=token, open_to_others=open_to_others)
        self.server = SystemServer(app, listen("127.0.0.1", 0))
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
    Status(pid=os.getpid(), state="ready", since=time.time()).write(served.board["serving"])
    served.board.beat_loop()
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
        for scheme in ("Bearer", "bearer"):  # RFC 9110: the scheme's case says nothing
            right = {"authorization": f"{scheme} s3cret"}
            assert server.client.post("/engine/drain", headers=right).status_code == 202
        assert server.client.get("/live").status_code == 200
    finally:
        server.close()


def test_a_busy_port_is_an_error_before_anything_is_started(served: Served) -> None:
    """It is found where it can be told, not in a background thread."""
    with pytest.raises(OSError, match="in use"):
        listen("127.0.0.1", served.server.port)


@pytest.mark.parametrize("path", ["/live", "/ready", "/metrics", "/health", "/version"])
def test_head_is_get_without_a_body(served: Served, path: str) -> None:
    """Load balancers and wget --spider ask so."""
    got, head = served.client.get(path), served.client.head(path)
    assert head.status_code == got.status_code
    assert head.content == b""


def test_a_wrong_method_is_a_405_in_the_form_of_every_error(served: Served) -> None:
    """One form of error, whoever refuses."""
    answer = served.client.post("/health")
    assert answer.status_code == 405
    assert "POST" in answer.json()["error"]


def test_no_web_page_can_use_the_writing_routes(served: Served) -> None:
    """A browser says which page asks; a page whose name was pointed here says a wrong host."""
    origin = {"origin": "http://evil.example", "content-type": "text/plain"}
    assert served.client.post("/engine/drain", headers=origin).status_code == 403
    rebound = {"host": f"evil.example:{served.server.port}"}
    assert served.client.post("/engine/drain", headers=rebound).status_code == 421
    assert served.client.get("/health", headers=rebound).status_code == 421
    assert served.drained == 0
    own = {"origin": f"http://127.0.0.1:{served.server.port}"}
    assert served.client.post("/engine/drain", headers=own).status_code == 202


def test_an_unknown_route_is_a_404_that_names_it(served: Served) -> None:
    """A typo in a probe's path is visible."""
    answer = served.client.get("/redy")
    assert answer.status_code == 404
    assert "/redy" in answer.json()["error"]
