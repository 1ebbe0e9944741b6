"""Every dashboard of ours, and the files they become."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from grafanalib import core

from . import kv, monitoring_self, normalize, overview, worker

GENERATED = Path(__file__).resolve().parent.parent / "generated"
HOME = overview.UID

BUILDERS: dict[str, Callable[[], core.Dashboard]] = {
    overview.UID: overview.build,
    worker.UID: worker.build,
    kv.UID: kv.build,
    monitoring_self.UID: monitoring_self.build,
}


def files() -> dict[str, str]:
    """Return every generated file's name and text."""
    return {f"{uid}.json": normalize.text(build()) for uid, build in BUILDERS.items()}
