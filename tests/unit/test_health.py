"""Verdicts: what makes a worker live, ready, and the reasons it gives."""

from __future__ import annotations

import asyncio
import time

import pytest
from prometheus_client import CollectorRegistry

from llm_worker.lifecycle import Lifecycle, State
from llm_worker.metrics import Metrics
from llm_worker.observer import health
from llm_worker.observer.health import Health, Heartbeat


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def checked(registry: CollectorRegistry) -> Health:
    metrics = Metrics(registry)
    return Health(Lifecycle(metrics), Heartbeat(metrics))


def make_ready(checked: Health) -> None:
    checked.lifecycle.to(State.WARMING)
    checked.lifecycle.to(State.READY)


def code(verdict: health.Verdict) -> str:
    return str(verdict.reasons[0]["code"]) if verdict.reasons else ""


def test_a_loading_worker_is_live_and_not_ready_and_names_the_phase(checked: Health) -> None:
    """A supervisor must not restart what is still loading."""
    checked.lifecycle.enter_phase("engine")
    assert checked.live().ok
    assert code(checked.ready()) == "state_starting"
    assert "engine" in checked.ready().reasons[0]["message"]


@pytest.mark.parametrize("state", [State.DRAINING, State.SLEEPING, State.CHECKPOINTING, State.DEAD])
def test_only_the_ready_state_is_ready(checked: Health, state: State) -> None:
    """Every other state says which one it is, and none is a reason to be killed."""
    make_ready(checked)
    assert checked.ready().ok
    checked.lifecycle.to(state)
    assert code(checked.ready()) == f"state_{state.value}"
    assert checked.live().ok


def test_a_dead_engine_is_unready_before_the_state_machine_knows(checked: Health) -> None:
    """The verdict asks the processes; it does not wait for the serving loop to notice."""
    make_ready(checked)
    checked.engine_dead = lambda: True
    assert checked.lifecycle.state is State.READY
    assert code(checked.ready()) == "engine_dead"


def test_a_late_serving_loop_is_unready_and_a_stuck_one_not_live(
    checked: Health, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two thresholds: out of rotation soon, restarted only when nothing else helps."""
    make_ready(checked)
    now = time.monotonic()
    checked.heartbeat._last = now
    for age, ready, live in ((1, True, True), (6, False, True), (61, False, False)):
        monkeypatch.setattr(time, "monotonic", lambda age=age: now + age)
        assert checked.ready().ok is ready
        assert checked.live().ok is live


def test_the_heartbeat_measures_how_late_the_loop_is(registry: CollectorRegistry) -> None:
    """A loop that was blocked for half a second shows half a second of lag."""

    async def blocked_once() -> None:
        pulse = asyncio.create_task(Heartbeat(Metrics(registry)).run())
        await asyncio.sleep(0.05)
        time.sleep(0.75)  # noqa: ASYNC251 - the loop is to be blocked
        await asyncio.sleep(0.05)
        pulse.cancel()

    asyncio.run(blocked_once())
    lag = registry.get_sample_value("llm_worker_serving_loop_lag_seconds_sum")
    assert lag is not None
    assert 0.4 < lag < 2


def test_the_report_holds_both_verdicts_and_the_state(checked: Health) -> None:
    """One document for a person with curl."""
    make_ready(checked)
    report = checked.report()
    assert (report["live"], report["ready"], report["state"]) == (True, True, "ready")
    assert report["reasons"] == []
