"""What can go wrong with the worker itself, who handles it and which exit code tells it.

The codes follow sysexits.h where it has a word for the case, so that a supervisor can tell a worker
that must be reconfigured (78) from one that may simply be started again (69, 70).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

EXIT_STOPPED = 0  # asked to stop, drained
EXIT_INTERNAL = 1  # a bug of ours
EXIT_START_FAILED = 69  # EX_UNAVAILABLE: the engine did not come up
EXIT_ENGINE_DIED = 70  # EX_SOFTWARE: what serves came up and died
EXIT_CONFIG = 78  # EX_CONFIG: the settings are wrong; starting again cannot help

# How a run can end: a label of a metric. unclean: killed before it could say.
RUN_ENDINGS = (
    "stopped",
    "engine_dead",
    "serving_died",
    "start_failed",
    "unclean",
    "internal",
)


class ConfigError(ValueError):
    """Settings that cannot work, all of them at once. Each process's main prints them."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = tuple(problems)


class EngineStartError(RuntimeError):
    """The engine did not come up. Handled by ``serving``: exit 69."""

    def __init__(self, phase: str, cause: str) -> None:
        super().__init__(f"the engine failed to start in phase {phase!r}: {cause}")
        self.phase = phase
        self.cause = cause


class EngineDiedError(RuntimeError):
    """The running engine died. Handled by ``serving``: fail what is in flight, exit 70."""

    def __init__(self, cause: str) -> None:
        super().__init__(f"the engine died: {cause}")
        self.cause = cause


def refuse(what: str, error: ConfigError) -> int:
    """Print every problem under ``what``; the exit code that goes with it."""
    print(f"{what}:", file=sys.stderr)
    for problem in error.problems:
        print(f"  - {problem}", file=sys.stderr)
    return EXIT_CONFIG
