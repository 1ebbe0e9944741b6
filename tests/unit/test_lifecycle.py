"""The state machine and the memory of the last exit."""

from __future__ import annotations

import itertools
import json
import logging
import shutil
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from llm_worker.lifecycle import (
    FOLLOWERS,
    ExitRecord,
    InvalidTransition,
    Lifecycle,
    State,
)
from llm_worker.metrics import EXIT_REASONS, Metrics


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def lifecycle(registry: CollectorRegistry) -> Lifecycle:
    return Lifecycle(Metrics(registry))


def states(registry: CollectorRegistry) -> dict[str, float | None]:
    return {
        state.value: registry.get_sample_value("llm_worker_state", {"state": state.value})
        for state in State
    }


def test_exactly_one_state_is_set_at_any_time(
    lifecycle: Lifecycle, registry: CollectorRegistry
) -> None:
    """The state set adds up to one through a whole life."""
    for state in (State.WARMING, State.READY, State.DRAINING, State.DEAD):
        lifecycle.to(state)
        assert states(registry) == {name.value: float(name is state) for name in State}


def test_the_dead_do_not_return() -> None:
    """No state follows DEAD, and every other state can die."""
    assert not FOLLOWERS[State.DEAD]
    assert all(State.DEAD in FOLLOWERS[state] for state in State if state is not State.DEAD)


def test_every_state_can_be_reached_and_all_but_the_last_can_drain() -> None:
    """The table has no island, and a worker can be asked to stop at any time."""
    reached = set(itertools.chain.from_iterable(FOLLOWERS.values())) | {State.STARTING}
    assert reached == set(State)
    stoppable = {state for state in State if State.DRAINING in FOLLOWERS[state]}
    assert stoppable == set(State) - {State.DEAD, State.DRAINING}


def test_a_transition_that_makes_no_sense_is_refused(
    lifecycle: Lifecycle, registry: CollectorRegistry
) -> None:
    """A draining worker never becomes ready again, and the metric still says so."""
    lifecycle.to(State.DRAINING)
    with pytest.raises(InvalidTransition, match="draining cannot become ready"):
        lifecycle.to(State.READY)
    assert states(registry)["draining"] == 1


def test_entering_the_present_state_changes_nothing(lifecycle: Lifecycle) -> None:
    """The time of entry is the first one."""
    since = lifecycle.since
    lifecycle.to(State.STARTING)
    assert lifecycle.since == since


def test_the_first_run_knows_of_no_exit(tmp_path: Path) -> None:
    """Nothing is claimed before anything was seen."""
    assert ExitRecord(tmp_path, "8081").begin() is None


@pytest.mark.parametrize("reason", [reason for reason in EXIT_REASONS if reason != "unclean"])
def test_a_run_that_said_why_it_ended_is_remembered(tmp_path: Path, reason: str) -> None:
    """The next run reads the reason and the time."""
    run = ExitRecord(tmp_path, "8081")
    run.begin()
    run.end(reason)
    last = ExitRecord(tmp_path, "8081").begin()
    assert last is not None
    assert last.reason == reason
    assert last.timestamp > 0


def test_a_run_that_was_killed_is_unclean_at_its_last_sign_of_life(tmp_path: Path) -> None:
    """A marker left behind says that nobody had the time to say anything."""
    first = ExitRecord(tmp_path, "8081")
    first.begin()
    first.end("stopped")
    killed = ExitRecord(tmp_path, "8081")
    killed.begin()
    killed.alive()
    last = ExitRecord(tmp_path, "8081").begin()
    assert last is not None
    assert last.reason == "unclean"


def test_a_damaged_record_is_ignored(tmp_path: Path) -> None:
    """A half-written or foreign file never keeps a worker from starting."""
    run = ExitRecord(tmp_path, "8081")
    run.begin()
    run.end("stopped")
    (file,) = tmp_path.glob("*.exit.json")
    for content in ("{", "[]", json.dumps({"reason": "stopped"}), json.dumps({"reason": 1})):
        file.write_text(content, encoding="utf-8")
        assert ExitRecord(tmp_path, "8081").begin() is None
        next(tmp_path.glob("*.alive")).unlink()


def test_a_directory_that_went_away_costs_the_memory_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A full, removed or read-only disk ends no request and changes no exit code."""
    run = ExitRecord(tmp_path / "state", "8081")
    (tmp_path / "state").mkdir()
    run.begin()
    shutil.rmtree(tmp_path / "state")
    with caplog.at_level(logging.WARNING, logger="llm_worker.lifecycle"):
        run.alive()
        run.alive()
        run.end("stopped")
    assert len(caplog.records) == 1
    assert "the next run will not know" in caplog.text


def test_two_workers_share_a_directory(tmp_path: Path) -> None:
    """One worker's end is never taken for another's."""
    one = ExitRecord(tmp_path, "8081")
    one.begin()
    one.end("engine_dead")
    assert ExitRecord(tmp_path, "8082").begin() is None
