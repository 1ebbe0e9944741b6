"""Verdicts: what makes a worker live, ready, and the reasons it gives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from llm_worker.lifecycle import State
from llm_worker.link.board import Board
from llm_worker.link.status import Status
from llm_worker.observer.health import Health, Verdict


class Serving:
    """A process that could serve, and what it has written on the board."""

    def __init__(self) -> None:
        self.board = Board.create()
        self.health = Health(self.board)
        self.processes: list[subprocess.Popen[bytes]] = []
        self.status = Status(pid=self.process(), state="starting", since=time.time())

    def process(self) -> int:
        sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
        self.processes.append(subprocess.Popen(sleeper))
        return self.processes[-1].pid

    def say(self, **changes: object) -> None:
        self.status = replace(self.status, **changes)  # type: ignore[arg-type]
        self.status.write(self.board["serving"])

    def beat(self, loop: float = 0.0, thread: float = 0.0) -> None:
        """The pulses, this many seconds ago."""
        for beat, ago in ((self.board.beat_loop, loop), (self.board.beat_thread, thread)):
            with pytest.MonkeyPatch.context() as patch:
                moment = time.monotonic() - ago
                patch.setattr(time, "monotonic", lambda moment=moment: moment)
                beat()


@pytest.fixture
def serving() -> Iterator[Serving]:
    made = Serving()
    yield made
    for process in made.processes:
        process.kill()
        process.wait()


def code(verdict: Verdict) -> str:
    return str(verdict.reasons[0]["code"]) if verdict.reasons else ""


def test_a_loading_worker_is_live_and_not_ready_and_names_the_phase(serving: Serving) -> None:
    """A supervisor must not restart what is still loading, nor what has not said a word yet."""
    assert serving.health.live().ok
    assert code(serving.health.ready()) == "state_starting"
    serving.say(phase="engine")
    assert serving.health.live().ok
    assert code(serving.health.ready()) == "state_starting"
    assert "engine" in serving.health.ready().reasons[0]["message"]


@pytest.mark.parametrize("state", [State.DRAINING, State.SLEEPING, State.CHECKPOINTING, State.DEAD])
def test_only_the_ready_state_is_ready(serving: Serving, state: State) -> None:
    """Every other state says which one it is, and none is a reason to be killed."""
    serving.say(state="ready")
    serving.beat()
    assert serving.health.ready().ok
    serving.say(state=state.value)
    assert code(serving.health.ready()) == f"state_{state.value}"
    assert serving.health.live().ok


def test_a_dead_engine_is_unready_before_serving_knows(serving: Serving) -> None:
    """The verdict asks the kernel about the engine's processes; it waits for nobody to notice."""
    serving.say(state="ready", engine_pids=[serving.process()])
    serving.beat()
    assert serving.health.ready().ok
    serving.processes[-1].kill()
    serving.processes[-1].wait()
    assert code(serving.health.ready()) == "engine_dead"


def test_a_dead_serving_is_unready_at_once_and_its_state_is_dead(serving: Serving) -> None:
    """Whatever it said last."""
    serving.say(state="ready")
    serving.beat()
    assert serving.health.state()[0] is State.READY
    serving.processes[0].kill()
    serving.processes[0].wait()
    assert code(serving.health.ready()) == "serving_dead"
    assert serving.health.state()[0] is State.DEAD
    assert serving.health.live().ok, "the worker ends itself: nobody has to"


def test_an_ordinary_stop_is_no_death(serving: Serving) -> None:
    """A worker that drains goes on to say so when its process has ended."""
    serving.say(state="draining")
    serving.processes[0].kill()
    serving.processes[0].wait()
    assert code(serving.health.ready()) == "state_draining"


def test_a_late_serving_loop_is_unready_and_a_stuck_one_not_live(serving: Serving) -> None:
    """Two thresholds: out of rotation soon, restarted only when nothing else helps."""
    serving.say(state="ready")
    for age, ready, live in ((1, True, True), (6, False, True), (61, False, False)):
        serving.beat(loop=age)
        assert serving.health.ready().ok is ready
        assert serving.health.live().ok is live


@pytest.mark.parametrize(
    ("thread", "stopped", "said"),
    [
        (0, False, "serving_loop_late"),
        (30, False, "serving_interpreter_held"),
        (30, True, "serving_stopped"),
    ],
)
def test_a_silent_serving_is_told_apart(
    serving: Serving, thread: float, stopped: bool, said: str
) -> None:
    """Its loop is blocked, its interpreter lock is held, or it was stopped by a signal."""
    serving.say(state="ready")
    serving.beat(loop=30, thread=thread)
    if stopped:
        os.kill(serving.status.pid, signal.SIGSTOP)
        os.waitpid(serving.status.pid, os.WUNTRACED)
    assert code(serving.health.ready()) == said


def test_a_stopped_serving_is_unready_long_before_it_is_late(serving: Serving) -> None:
    """A second without a beat is enough to ask the kernel."""
    serving.say(state="ready")
    os.kill(serving.status.pid, signal.SIGSTOP)
    os.waitpid(serving.status.pid, os.WUNTRACED)
    serving.beat(loop=1.5, thread=1.5)
    assert code(serving.health.ready()) == "serving_stopped"


def test_the_report_holds_both_verdicts_and_the_state(serving: Serving) -> None:
    """One document for a person with curl."""
    serving.say(state="ready")
    serving.beat()
    report = serving.health.report()
    assert (report["live"], report["ready"], report["state"]) == (True, True, "ready")
    assert report["reasons"] == []
