"""The dashboard of the KV cache: how full, how useful, and whether the index of it can be trusted.

The first rows work with any vLLM server; those about KV events need our worker with events on, or
the fleet index. Sums keep the label ``job``: a block is in its worker's index and in the fleet's,
and must not be counted twice.
"""

from __future__ import annotations

from grafanalib import core

from ..boards import TAG_ENGINE, board, kv_variables
from .arrival import arrival, delay, missing
from .cache import cache, saving
from .holding import agreement, fleet, holding
from .leaving import leaving
from .trust import trust

UID = "vllm-kv-cache"


def build() -> core.Dashboard:
    """Return the dashboard."""
    return board(
        UID,
        "KV cache",
        "How full the KV cache is, what it saves, and whether the index of its blocks (from KV "
        "events, in a worker or for the fleet) is complete, current and right.",
        tag=TAG_ENGINE,
        variables=kv_variables(),
        sections=[
            cache,
            saving,
            arrival,
            trust,
            missing,
            delay,
            holding,
            agreement,
            leaving,
            fleet,
        ],
    )
