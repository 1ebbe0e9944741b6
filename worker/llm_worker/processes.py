"""Processes that descend from this one, and the shared memory they leave.

Owns finding, watching and ending them, whoever started them. Standard library only, and Linux's
/proc: where there is none, nothing is found and only direct children can be ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import re
import select
import signal
import sys
import time
from collections.abc import Collection, Iterable
from pathlib import Path

log = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where the kernel keeps them
# Python's multiprocessing names its segments so; vLLM's ring buffers are among them.
SEGMENT = re.compile(rf"{SHARED_MEMORY}/psm_[0-9a-f]+")
_PROC = Path("/proc")
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


def adopt_orphans() -> None:
    """Become the parent of whatever a dead engine process leaves behind, to be able to end it."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_with_parent(parent: int) -> None:
    """Have the kernel kill this process when ``parent``, which started it, is gone.

    The kernel means the *thread* that started this process: it has to last as long as its process.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it went before we asked
        os.kill(os.getpid(), signal.SIGKILL)


def stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat behind the name, state first; None: there is no such process."""
    try:
        # pid (comm) state ppid ...; comm may hold spaces and brackets
        return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None


def parent_of(pid: int) -> int | None:
    """Who started it, or adopted it; None: there is no such process."""
    fields = stat(pid)
    return None if fields is None else int(fields[1])


def descendants(root: int | None = None) -> list[int]:
    """Every living process below ``root`` (this process); a zombie has ended."""
    children: dict[int, list[int]] = {}
    for entry in _PROC.iterdir() if _PROC.is_dir() else ():
        if entry.name.isdecimal() and (fields := stat(int(entry.name))) is not None:
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found: list[int] = []
    queue = [os.getpid() if root is None else root]
    while queue:
        below = children.get(queue.pop(), [])
        queue += below
        found += below
    return [pid for pid in found if is_running(pid)]


def is_running(pid: int) -> bool:
    """Whether it is there and has not ended."""
    fields = stat(pid)
    return fields is not None and fields[0] not in "ZX"


def end_descendants(grace_seconds: float, spare: Collection[int] = ()) -> None:
    """End every descendant but ``spare``, killing what does not go within ``grace_seconds``."""
    left = [pid for pid in descendants() if pid not in spare and not _is_tracker(pid)]
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        left = wait_for_end(left, grace_seconds)
        if not left:
            return
    log.error("processes do not end: %s", left)


def wait_for_end(pids: Iterable[int], seconds: float) -> list[int]:
    """Those that still run after ``seconds``."""
    deadline = time.monotonic() + seconds
    left = [pid for pid in pids if is_running(pid)]
    while left and time.monotonic() < deadline:
        time.sleep(0.02)
        left = [pid for pid in left if is_running(pid)]
    return left


def mapped_segments() -> set[Path]:
    """The shared-memory segments that this process and its descendants have mapped now."""
    segments: set[Path] = set()
    for pid in (os.getpid(), *descendants()):
        with contextlib.suppress(OSError):
            maps = (_PROC / str(pid) / "maps").read_text(encoding="utf-8")
            segments.update(Path(match.group(0)) for match in SEGMENT.finditer(maps))
    return segments


def remove_segments(segments: Iterable[Path]) -> None:
    """Remove those of ``segments`` that are still there; their processes must be gone."""
    for segment in segments:
        with contextlib.suppress(FileNotFoundError):
            segment.unlink()
            log.warning("removed the shared memory that the engine left: %s", segment)


class Watch:
    """Whether a process that is not our child still runs: asked at no cost, told at once.

    By a descriptor of the process where the kernel has those, so that a pid that is used again is
    not taken for it.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._descriptor: int | None = None
        self._ended = False
        try:
            self._descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            self._ended = True
        except (AttributeError, OSError):  # an old kernel, or a sandbox without them
            self._descriptor = None

    def ended(self) -> bool:
        """Whether it has ended; any thread."""
        if not self._ended:
            # The descriptor says so when the last thread is gone, which memory may hold up; until
            # then the pid is still this process's, and its first thread a zombie.
            self._ended = self._is_readable() or not is_running(self.pid)
        return self._ended

    def _is_readable(self) -> bool:
        if self._descriptor is None:
            return False
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        return bool(poll.poll(0))

    def close(self) -> None:
        """Watch no more."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
            self._ended = True


def _is_tracker(pid: int) -> bool:
    """Python's resource tracker ends by itself, after it has cleaned up."""
    try:
        return b"resource_tracker" in (_PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return False
