"""What every row of the worker's dashboard shares."""

from __future__ import annotations

NO_WORKER = "no worker"
PREFIX = "llm_worker_"
BY_INSTANCE = ("instance",)
