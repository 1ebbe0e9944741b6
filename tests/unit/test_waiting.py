"""The one waiter."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from support.waiting import until, until_async, until_none_is_left


def test_the_first_true_answer_is_returned_and_nobody_there_is_a_no() -> None:
    """A server that refuses connections is waited for like one that says no."""
    answers = [7, None, 0]

    def ask() -> int:
        answer = answers.pop()
        if answer is None:
            raise ConnectionRefusedError
        return answer

    assert until("seven", ask) == 7


def test_what_was_in_vain_says_what_for_and_the_last_answer() -> None:
    """The failure alone tells what was seen instead."""
    with pytest.raises(AssertionError, match=r"s: the moon; the last answer was \[\]"):
        until("the moon", list[int], 0.01)
    with pytest.raises(AssertionError, match=r"s: the moon; the last answer was \[\]"):
        asyncio.run(until_async("the moon", list[int], 0.01))
    with pytest.raises(AssertionError, match=r"s: rules; the last answer was \['a', 'b'\]"):
        until_none_is_left("rules", lambda: ["a", "b"], 0.01)


def test_a_process_that_ended_is_not_waited_for(tmp_path: Path) -> None:
    """Its code and the end of its log are in the failure, long before the limit."""
    log = tmp_path / "log"
    log.write_text("no such model", encoding="utf-8")
    with (
        subprocess.Popen([sys.executable, "-c", "exit(3)"]) as process,
        pytest.raises(AssertionError, match=r"ended with 3\nno such model"),
    ):
        until("an answer", lambda: False, 100, process=process, log=log)


def test_another_error_is_not_waited_for() -> None:
    """A question that is broken fails at once."""
    with pytest.raises(KeyError):
        until("a key", lambda: {"b": 1}["a"], 100)
