"""The middleware that puts what vLLM's API refuses into the ledger."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from llm_worker.metrics import StatMetrics

pytestmark = pytest.mark.needs("vllm")


def visit(
    status: int,
    *,
    reaches: bool,
    path: str = "/v1/completions",
    rejection: str | None = None,
    engine_dead: bool = False,
) -> dict[str, float]:
    """Send one POST through the middleware; return what the ledger counted."""
    from llm_worker.serving import ledger

    registry = CollectorRegistry()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if reaches:
            mark = ledger._visit.get()
            assert mark is not None
            mark.reached_engine = True
        if rejection is not None:
            ledger.note_rejection(rejection)
        await send({"type": "http.response.start", "status": status})
        await send({"type": "http.response.body", "body": b""})

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    middleware = ledger.Refusals(app, StatMetrics(registry), "m", lambda: engine_dead)
    scope = {"type": "http", "method": "POST", "path": path}
    asyncio.run(middleware(scope, None, send))  # type: ignore[arg-type]
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    return {
        ",".join(sample.labels.get(key, "") for key in ("outcome", "reason")): sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.value and not sample.name.endswith("_created")
    }


RECEIVED = {",": 1.0}


@pytest.mark.parametrize("status", [400, 404, 413, 422])
def test_a_refused_request_was_received_and_rejected(status: int) -> None:
    """A client error that the engine never saw still has a place in the ledger."""
    assert visit(status, reaches=False) == RECEIVED | {"rejected,invalid": 1.0}


def test_an_error_of_the_api_itself_is_internal() -> None:
    """A 500 before the engine is the server's fault, not the client's."""
    assert visit(500, reaches=False) == RECEIVED | {"errored,internal": 1.0}


@pytest.mark.parametrize("reason", ["max_num_queued_reqs", "max_num_queued_tokens"])
def test_a_full_queue_is_a_rejection_and_no_error(reason: str) -> None:
    """vLLM's API asks for room before it hands a request over, and answers 503 without it."""
    counted = visit(503, reaches=False, rejection=reason)
    assert counted == RECEIVED | {f"rejected,{reason}": 1.0}


def test_a_reason_of_a_newer_vllm_is_no_new_ending() -> None:
    """The endings are a closed set."""
    assert visit(503, reaches=False, rejection="new") == RECEIVED | {"errored,internal": 1.0}


def test_a_request_to_a_dead_engine_says_so() -> None:
    """vLLM's API answers it before the engine is asked."""
    assert visit(500, reaches=False, engine_dead=True) == RECEIVED | {"errored,engine_dead": 1.0}


def test_outside_of_a_request_a_rejection_is_nobodys() -> None:
    """An engine that is used in-process rejects, too; `generate` counts those."""
    from llm_worker.serving import ledger

    ledger.note_rejection("max_num_queued_reqs")


@pytest.mark.parametrize("status", [400, 500, 503, 200])
def test_what_reached_the_engine_is_counted_there_and_not_twice(status: int) -> None:
    """One request, one entry."""
    assert visit(status, reaches=True) == {}


@pytest.mark.parametrize("status", [401, 403])
def test_a_stranger_is_nobodys_request(status: int) -> None:
    """Whoever has no key does not dilute the error ratio."""
    assert visit(status, reaches=False) == {}


def test_other_routes_are_left_alone() -> None:
    """Tokenising or listing models is not a request for the model."""
    assert visit(404, reaches=False, path="/tokenize") == {}
