"""The state machine and the memory of the last exit."""

from __future__ import annotations

import itertools
import json
import logging
import shutil
from pathlib import Path

import pytest

from llm_worker.errors import RUN_ENDINGS
from llm_worker.exit_record import ExitRecord
from llm_worker.lifecycle import FOLLOWERS, InvalidTransition, Lifecycle, State


@pytest.fixture
def told() -> list[tuple[State, str]]:
    return []


@pytest.fixture
def lifecycle(told: list[tuple[State, str]]) -> Lifecycle:
    return Lifecycle(lambda lifecycle: told.append((lifecycle.state, lifecycle.phase)))


def test_every_state_and_phase_is_told_once(
    lifecycle: Lifecycle, told: list[tuple[State, str]]
) -> None:
    """From the first one on, and entering the present state again is nothing new."""
    lifecycle.enter_phase("engine")
    for state in (State.WARMING, State.WARMING, State.READY, State.DRAINING, State.DEAD):
        lifecycle.to(state)
    assert told == [
        (State.STARTING, ""),
        *((state, "engine") for state in (State.STARTING, State.WARMING, State.READY)),
        *((state, "engine") for state in (State.DRAINING, State.DEAD)),
    ]


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
    lifecycle: Lifecycle, told: list[tuple[State, str]]
) -> None:
    """A draining worker never becomes ready again, and nobody is told that it did."""
    lifecycle.to(State.DRAINING)
    with pytest.raises(InvalidTransition, match="draining cannot become ready"):
        lifecycle.to(State.READY)
    assert told[-1] == (State.DRAINING, "")
    assert lifecycle.state is State.DRAINING


def test_entering_the_present_state_changes_nothing(lifecycle: Lifecycle) -> None:
    """The time of entry is the first one."""
    since = lifecycle.since
    lifecycle.to(State.STARTING)
    assert lifecycle.since == since


def test_the_first_run_knows_of_no_exit(tmp_path: Path) -> None:
    """Nothing is claimed before anything was seen."""
    assert ExitRecord(tmp_path, "8081").begin() is None


@pytest.mark.parametrize("reason", [reason for reason in RUN_ENDINGS if reason != "unclean"])
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
    with caplog.at_level(logging.WARNING, logger="llm_worker.exit_record"):
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
