"""Waiting for what another thread or process brings about."""

from __future__ import annotations

import contextlib
import time
import urllib.error
from collections.abc import Callable

# What a server that is not there yet answers with.
UNREACHABLE = (urllib.error.URLError, ConnectionError, TimeoutError)


def until(
    question: Callable[[], object],
    what: str = "it came",
    seconds: float = 20.0,
    *,
    pause_seconds: float = 0.02,
    ignoring: tuple[type[Exception], ...] = (),
) -> None:
    """Ask until the answer is true; an error of ``ignoring`` is a no.

    Raises:
        AssertionError: it was not, in time.
    """
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(*ignoring):
            if question():
                return
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(pause_seconds)
