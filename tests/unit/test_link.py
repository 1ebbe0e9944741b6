"""The board and the control channel: what serving and observer say to each other."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from llm_worker.link.board import Board
from llm_worker.link.control import Control, ControlError, ControlServer
from llm_worker.link.status import KvFacts, Status, Supervision


def test_a_section_has_what_was_last_written_for_every_process_that_maps_it() -> None:
    """Number and time come with it; a reader that saw it sees the same object again."""
    board = Board.create()
    here, there = board["serving"], Board(os.dup(board.descriptor))["serving"]
    assert there.read() is None
    for number, text in enumerate((b"one", b"two", b""), 1):
        here.write(text)
        written = there.read()
        assert written is not None
        assert written.number == number
        assert written.payload == text
        assert written.age_seconds < 5
    assert there.read() is there.read()


def test_a_writer_that_takes_over_goes_on_with_the_numbers() -> None:
    """A process that is started again must not look older than what is there."""
    board = Board.create()
    board["counters"].write(b"old")
    Board(os.dup(board.descriptor))["counters"].write(b"new")
    written = board["counters"].read()
    assert written is not None
    assert (written.payload, written.number) == (b"new", 2)


def test_a_write_that_was_cut_off_leaves_the_one_before() -> None:
    """Killed between payload and header, or in the midst of either."""
    board = Board.create()
    section = board["serving"]
    section.write(b"whole")
    section.write(b"broken")
    offset = section._offsets[section._number % 2] + 24
    board._memory[offset : offset + 3] = b"xxx"
    fresh = Board(os.dup(board.descriptor))["serving"].read()
    assert fresh is not None
    assert fresh.payload == b"whole"


def test_what_does_not_fit_is_refused_and_what_was_there_stays() -> None:
    """A page that grew too large costs that page."""
    section = Board.create()["serving"]
    section.write(b"here")
    with pytest.raises(ValueError, match="do not fit"):
        section.write(bytes(2 << 20))
    written = section.read()
    assert written is not None
    assert written.payload == b"here"


WRITER = """
import os, sys
from llm_worker.link.board import Board
section = Board(int(sys.argv[1]))["page"]
number = 0
while True:
    number += 1
    section.write(bytes([number % 251]) * (1 + number * 7919 % 200_000))
"""


@pytest.mark.slow
def test_a_reader_never_sees_half_of_anything_while_another_process_writes_and_is_killed() -> None:
    """Every content is of one byte: a mixture would show."""
    board = Board.create()
    for _ in range(3):
        os.set_inheritable(board.descriptor, True)
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(board.descriptor)], pass_fds=[board.descriptor]
        )
        seen: set[int] = set()
        until = time.monotonic() + 20
        while len(seen) < 200 and time.monotonic() < until:
            written = board["page"].read()
            if written is not None:
                assert written.payload == written.payload[:1] * len(written.payload)
                seen.add(written.number)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        assert len(seen) == 200
        written = Board(os.dup(board.descriptor))["page"].read()
        assert written is not None
        assert written.payload == written.payload[:1] * len(written.payload)


def test_pulses_are_unknown_until_they_beat_and_forgotten_when_told() -> None:
    """A process that begins to serve does not inherit its predecessor's heart."""
    board = Board.create()
    assert board.loop_age_seconds is None
    assert board.thread_age_seconds is None
    board.beat_loop()
    board.beat_thread()
    assert (board.loop_age_seconds or 0) < 5
    assert (board.thread_age_seconds or 0) < 5
    board.still()
    assert board.loop_age_seconds is None


def test_status_and_supervision_are_what_was_written() -> None:
    """Through JSON and back, with and without facts."""
    board = Board.create()
    assert Status.read(board["serving"]) is None
    assert Supervision.read(board["supervisor"]) == Supervision()
    kv = KvFacts(sources=[[0, "tcp://127.0.0.1:1", None, ""]], block_size=16, max_tokens=4096)
    status = Status(pid=7, state="ready", since=1.5, engine_pids=[8], segments=["/x"], kv=kv)
    status.write(board["serving"])
    assert Status.read(board["serving"]) == status
    told = Supervision(observer_restarts=2, last_exit={"reason": "stopped", "timestamp": 1.0})
    told.write(board["supervisor"])
    assert Supervision.read(board["supervisor"]) == told


class Answering:
    """Serving's end, on a loop in a thread."""

    def __init__(self) -> None:
        self.broker, self._theirs = socket.socketpair()
        self.loop = asyncio.new_event_loop()
        self.server = ControlServer(
            self._theirs,
            {"echo": self._echo, "fail": self._fail, "refuse": self._refuse, "wait": self._wait},
        )
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.loop.call_soon_threadsafe(self.server.start)

    def block(self, seconds: float) -> None:
        """Keep the loop busy."""
        self.loop.call_soon_threadsafe(time.sleep, seconds)

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self.server.close(), self.loop).result(10)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(5)

    @staticmethod
    async def _echo(*values: Any) -> Any:
        return list(values)

    @staticmethod
    async def _fail() -> None:
        raise KeyError("nothing there")

    @staticmethod
    async def _refuse() -> None:
        raise ValueError("write a number")

    @staticmethod
    async def _wait(seconds: float) -> str:
        await asyncio.sleep(seconds)
        return "late"


@contextmanager
def answering() -> Iterator[tuple[Answering, Control]]:
    serving = Answering()
    control = Control(serving.broker)
    try:
        yield serving, control
    finally:
        control.close()
        serving.close()


@pytest.mark.slow
def test_calls_are_answered_each_with_its_own_result_in_any_order() -> None:
    """Bytes, large integers and nothing come back as they went; a slow call holds up no other."""
    with answering() as (_, control):
        slow: list[Any] = []
        waiting = threading.Thread(
            target=lambda: slow.append(control.call("wait", 1.0, seconds=10))
        )
        waiting.start()
        values = [b"\x00\xff", (1 << 64) - 1, None, "text", True, [1, 2]]
        assert control.call("echo", *values, seconds=10) == values
        assert not slow
        waiting.join(10)
        assert slow == ["late"]


def test_who_asks_wrongly_is_told_and_other_failures_are_errors_of_the_call() -> None:
    """A ValueError is the asker's; all else is serving's."""
    with answering() as (_, control):
        with pytest.raises(ValueError, match="write a number"):
            control.call("refuse", seconds=10)
        with pytest.raises(ControlError, match="nothing there"):
            control.call("fail", seconds=10)
        with pytest.raises(ControlError, match="no method"):
            control.call("nonsense", seconds=10)
        assert control.call("echo", 1, seconds=10) == [1]


@pytest.mark.slow
def test_a_blocked_loop_costs_the_deadline_and_the_next_call_is_answered() -> None:
    """Also when megabytes were being sent: a frame that was begun is finished."""
    with answering() as (serving, control):
        serving.block(3.0)
        began = time.monotonic()
        with pytest.raises(ControlError, match="did not answer"):
            control.call("echo", "x" * (8 << 20), seconds=0.2)
        assert time.monotonic() - began < 2.8, "it waited for the loop, not for its deadline"
        assert control.call("echo", "next", seconds=20) == ["next"]


def test_an_observer_that_comes_back_is_answered_and_one_whose_serving_went_is_told() -> None:
    """A connection per life; the end of the other side ends every call at once."""
    with answering() as (serving, control):
        assert control.call("echo", 1, seconds=10) == [1]
        control.close()
        again = Control(serving.broker)
        assert again.call("echo", 2, seconds=10) == [2]
        ended: list[BaseException] = []

        def ask() -> None:
            try:
                again.call("wait", 60, seconds=60)
            except ControlError as error:
                ended.append(error)

        waiting = threading.Thread(target=ask)
        waiting.start()
        time.sleep(0.2)
        asyncio.run_coroutine_threadsafe(serving.server.close(), serving.loop).result(10)
        waiting.join(10)
        assert [str(error) for error in ended] == ["call 2: serving is gone"]
        with pytest.raises(ControlError, match="gone"):
            again.call("echo", 3, seconds=1)
