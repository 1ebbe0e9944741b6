"""The worker's dashboard: what only our worker knows (``llm_worker_*``).

Empty for a plain vLLM server, by design: the overview is for those.
"""

from __future__ import annotations

from grafanalib import core

from ..boards import TAG_ENGINE, board, worker_variables
from .engine import batch, kv, steps
from .life import exporter, state
from .requests import book, goodput

UID = "vllm-worker"


def build() -> core.Dashboard:
    """Return the dashboard."""
    return board(
        UID,
        "vLLM worker",
        "What only our worker knows: capacity in tokens, steps, batches, goodput, and an honest "
        "ledger of requests. Empty for a plain vLLM server.",
        tag=TAG_ENGINE,
        variables=worker_variables(),
        sections=[state, steps, kv, batch, goodput, book, exporter],
    )
