"""What every row about KV events shares."""

from __future__ import annotations

from ..promql import TARGET

PREFIX = "llm_worker_kv_"
NO_EVENTS = "KV events are off"
NO_FLEET = "no fleet index"

# Labels of everything that is about one rank's blocks.
RANK = f'{TARGET},worker=~"$worker",engine=~"$engine"'
BY_RANK = ("job", "instance", "worker", "engine")
RANK_LEGEND = "{{job}} {{worker}} {{engine}}"
