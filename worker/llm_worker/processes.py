"""The processes that descend from this one, and the shared memory they leave.

Owns finding and ending them, whoever started them. Imports neither vLLM nor anything slow, so that
it works in the middle of a start-up that is called off.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import re
import sys
from pathlib import Path

import psutil

log = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where the kernel keeps them
# Python's multiprocessing names its segments so; vLLM's ring buffers are among them.
SEGMENT = re.compile(rf"{SHARED_MEMORY}/psm_[0-9a-f]+")
PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Become the parent of whatever a dead engine process leaves behind, to be able to end it."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_descendants(grace_seconds: float) -> None:
    """End every descendant, killing what does not go by itself within ``grace_seconds``."""
    left = [child for child in psutil.Process().children(recursive=True) if not _is_tracker(child)]
    for child in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.terminate()
    _, stubborn = psutil.wait_procs(left, timeout=grace_seconds)
    for child in stubborn:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(stubborn, timeout=grace_seconds)


def mapped_segments() -> set[Path]:
    """The shared-memory segments that this process and its descendants have mapped now."""
    segments: set[Path] = set()
    this = psutil.Process()
    for process in (this, *this.children(recursive=True)):
        with contextlib.suppress(OSError):
            maps = Path(f"/proc/{process.pid}/maps").read_text(encoding="utf-8")
            segments.update(Path(match.group(0)) for match in SEGMENT.finditer(maps))
    return segments


def remove_segments(segments: set[Path]) -> None:
    """Remove those of ``segments`` that are still there; their processes must be gone."""
    for segment in segments:
        with contextlib.suppress(FileNotFoundError):
            segment.unlink()
            log.warning("removed the shared memory that the engine left: %s", segment)


def _is_tracker(process: psutil.Process) -> bool:
    """Python's resource tracker ends by itself, after it has cleaned up."""
    try:
        return "resource_tracker" in " ".join(process.cmdline())
    except psutil.Error:
        return False
