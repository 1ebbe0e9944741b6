"""What this tier promises: no engine, no daemon, under a second a test, or marked `slow`.

Sockets on loopback, threads and short-lived children are allowed: a unit here is a promise of the
code, not the absence of an operating system. What it does not promise is held by the fixture below
while a test runs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Programs that stay until they are told to go, and take seconds to come.
DAEMONS = frozenset(
    {"prometheus", "prometheus-alertmanager", "alertmanager", "nats-server", "dockerd", "vllm"}
)
# A worker that only answers and ends starts no engine.
_ENDS_BY_ITSELF = frozenset({"--help", "--check-config"})


class Promised:
    """Whether a unit test runs, and which program it may not start."""

    running = False

    def __call__(self, event: str, arguments: tuple[object, ...]) -> None:
        """An audit hook: Python calls it with everything that it does."""
        if not self.running or event != "subprocess.Popen":
            return
        command = arguments[1]
        words = (
            [os.fsdecode(word) for word in command if isinstance(word, (str, bytes, Path))]
            if isinstance(command, (list, tuple))
            else [str(command)]
        )
        daemon = Path(words[0]).name in DAEMONS
        worker = words[1:3] in (["-m", "llm_worker"], ["-m", "llm_worker.serving"])
        if daemon or (worker and not _ENDS_BY_ITSELF & set(words)):
            raise AssertionError(
                f"a unit test starts no engine and no daemon: {' '.join(words[:3])} "
                "(tests/integration may)"
            )


_PROMISED = Promised()
sys.addaudithook(_PROMISED)  # for the life of the process: Python cannot take one back


@pytest.fixture(autouse=True)
def _no_engine_and_no_daemon() -> Iterator[None]:
    _PROMISED.running = True
    yield
    _PROMISED.running = False
