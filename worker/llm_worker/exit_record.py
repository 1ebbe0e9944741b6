"""The memory of how a worker's last run ended, kept in a file between its runs.

Owns the two files and what may stand in them. Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from llm_worker.errors import RUN_ENDINGS

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LastExit:
    """How the previous run of this worker ended."""

    reason: str  # one of RUN_ENDINGS; "unclean": killed before it could say
    timestamp: float  # Unix seconds; for "unclean" its last sign of life


class ExitRecord:
    """A run's end, kept in a file so that the next run can tell Prometheus about it.

    An engine that dies takes its worker along within seconds, often between two scrapes. The next
    run, a moment later, still knows. While a run lives, a marker file's modification time is its
    last sign of life: a run that was killed outright leaves it behind.

    Several workers may share the directory: the files carry the host's name and ``key``.
    """

    def __init__(self, directory: Path, key: str) -> None:
        name = f"{socket.gethostname()}-{key}"
        self._exit_file = directory / f"{name}.exit.json"
        self._alive_file = directory / f"{name}.alive"
        self._complained = False

    def begin(self) -> LastExit | None:
        """Read how the last run ended and mark this one as running; None for a first run."""
        last = self._read()
        with contextlib.suppress(OSError):  # gone: it said itself how it ended
            last = LastExit("unclean", self._alive_file.stat().st_mtime)
        self.alive()
        return last

    def alive(self) -> None:
        """Give a sign of life. Where it cannot be written, serving goes on without."""
        try:
            self._alive_file.touch()
        except OSError as error:
            self._cannot_write(error)

    def end(self, reason: str) -> None:
        """Write down why this run ends, and take the marker away; if that can be."""
        record = {"reason": reason, "timestamp": time.time()}
        temporary = self._exit_file.with_suffix(".tmp")
        try:
            temporary.write_text(json.dumps(record), encoding="utf-8")
            temporary.replace(self._exit_file)
            self._alive_file.unlink(missing_ok=True)
        except OSError as error:
            self._cannot_write(error)

    def _cannot_write(self, error: OSError) -> None:
        if not self._complained:
            self._complained = True
            log.warning("the next run will not know how this one ended: %s", error)

    def _read(self) -> LastExit | None:
        try:
            record = json.loads(self._exit_file.read_text(encoding="utf-8"))
            last = LastExit(str(record["reason"]), float(record["timestamp"]))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s is unreadable and is ignored: %s", self._exit_file, error)
            return None
        return last if last.reason in RUN_ENDINGS else None
