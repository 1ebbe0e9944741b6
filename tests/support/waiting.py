"""Waiting for what another thread, task or process brings about: one way, for every tier.

A limit is there so that a broken test ends, not to measure: it may be far too long. What a test
says about time it asserts by itself, from times that it took.
"""

from __future__ import annotations

import asyncio
import subprocess
import time
import urllib.error
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

import httpx

T = TypeVar("T")
SECONDS = 60.0  # a busy machine with two cores
PAUSE_SECONDS = 0.1
# What a server that is not there yet answers with.
UNREACHABLE = (urllib.error.URLError, ConnectionError, TimeoutError, httpx.TransportError)
_LOG_CHARACTERS = 5000  # of its end, in a failure


def until(
    what: str,
    ask: Callable[[], T | None],
    seconds: float = SECONDS,
    *,
    process: subprocess.Popen[Any] | None = None,
    log: Path | None = None,
) -> T:
    """Ask until the answer is true, and return it; that nobody answers yet is a no.

    Args:
        what: what is waited for, as the failure says it.
        ask: the question.
        seconds: after which it is in vain.
        process: who is to bring it about; once that has ended, it is in vain.
        log: what the process wrote; its end is shown in the failure.

    Raises:
        AssertionError: in vain; carries the last answer.
    """
    wait = _Wait(what, seconds, process, log)
    while not (answer := wait.ask(ask)):
        wait.check()
        time.sleep(wait.pause())
    return answer


async def until_async(what: str, ask: Callable[[], T | None], seconds: float = SECONDS) -> T:
    """As `until`, where it comes about on the loop that waits."""
    wait = _Wait(what, seconds)
    while not (answer := wait.ask(ask)):
        wait.check()
        await asyncio.sleep(wait.pause())
    return answer


def until_none_is_left(
    what: str,
    left: Callable[[], Collection[object]],
    seconds: float = SECONDS,
    *,
    pause_seconds: float = PAUSE_SECONDS,
) -> None:
    """As `until`, for many at once: the failure names those that are left.

    Args:
        what: what they are.
        left: those that it has not come about for.
        seconds: after which it is in vain.
        pause_seconds: at most, between two questions.
    """
    wait = _Wait(what, seconds)
    while (answer := wait.ask(left)) is None or answer:
        wait.check()
        time.sleep(wait.pause(pause_seconds))


class _Wait:
    """How long already, the last answer, and whether it is in vain."""

    def __init__(
        self,
        what: str,
        seconds: float,
        process: subprocess.Popen[Any] | None = None,
        log: Path | None = None,
    ) -> None:
        self._what, self._seconds, self._process, self._log = what, seconds, process, log
        self._began = time.monotonic()
        self._last: object = None
        self._ended: int | None = None  # the process, before the last question

    def ask(self, question: Callable[[], T | None]) -> T | None:
        """The answer; None if nobody gave one."""
        if self._process is not None:
            self._ended = self._process.poll()
        try:
            answer = question()
        except UNREACHABLE as error:
            self._last = error
            return None
        self._last = answer
        return answer

    def check(self) -> None:
        """Raise if it is in vain."""
        waited = time.monotonic() - self._began
        if self._ended is None and waited <= self._seconds:
            return
        problem = f"not within {waited:.1f} s: {self._what}; the last answer was {self._last!r}"
        if self._ended is not None:
            problem += f"; the process ended with {self._ended}"
        if self._log is not None:
            text = self._log.read_text(encoding="utf-8", errors="replace")
            problem += "\n" + text[-_LOG_CHARACTERS:]
        raise AssertionError(problem)

    def pause(self, longest_seconds: float = PAUSE_SECONDS) -> float:
        """Short at first; never so long that a state which passes goes unseen."""
        return min(max((time.monotonic() - self._began) / 20, 0.002), longest_seconds)
