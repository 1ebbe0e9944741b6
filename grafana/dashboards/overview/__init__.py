"""The home dashboard: one vLLM server or fifty, local or remote, with or without our worker.

Reads only what every vLLM 0.32 server exports by itself. Holds the nine panels that the project
began with (their Chinese names stand in the descriptions), and what one asks after looking at them.
"""

from __future__ import annotations

from grafanalib import core

from ..boards import TAG_ENGINE, board, engine_variables
from .failures import errors, process
from .features import features
from .latency import latency
from .load import cache, throughput, waiting
from .now import now, replicas

UID = "vllm-overview"


def build() -> core.Dashboard:
    """Return the dashboard."""
    return board(
        UID,
        "vLLM overview",
        "Everything a vLLM server tells by itself, one question per row. Works with any vLLM "
        "server; what only our worker knows is on the worker dashboard.",
        tag=TAG_ENGINE,
        variables=engine_variables(),
        sections=[now, waiting, latency, throughput, cache, errors, replicas, process, features],
    )
