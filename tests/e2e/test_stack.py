"""The stack as it is shipped: up, under load, through the death of an engine and of Prometheus."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from dashboards import queries
from e2e.stack import Stack, start
from support.waiting import until, until_none_is_left
from support.worker_process import free_ports

# Recording rules that may be empty under the demo's load, and why.
EMPTY_RULES = {
    "instance:http_requests_failed:rate5m": "no request is answered with 5xx while all is well",
    "instance:llm_worker_kv_index_blocks:ratio": "neither index of the demo has a bound",
}
SERVICES = ("prometheus", "alertmanager", "grafana", "worker-cpu", "loadgen", "kv-index")
PORTS = (
    "GRAFANA_PORT", "PROMETHEUS_PORT", "ALERTMANAGER_PORT", "WORKER_API_PORT", "WORKER_SYSTEM_PORT",
    "KV_INDEX_PORT",
)  # fmt: skip

pytestmark = [pytest.mark.needs("docker"), pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def stack(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The shipped compose file with the profiles demo and fleet, started once."""
    ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
    running = start(repository, tmp_path_factory.mktemp("e2e"), ports)
    yield running
    running.compose.stop()
    running.receiver.close()


def _samples(result: list[dict[str, Any]]) -> list[float]:
    values = [float(series["value"][1]) for series in result]
    return [value for value in values if not math.isnan(value)]


@pytest.mark.parametrize("service", SERVICES)
def test_every_container_is_healthy_and_locked_down(stack: Stack, service: str) -> None:
    """Healthy, read-only, without capabilities, bounded, loopback only, with rotated logs."""
    stack.assert_locked_down(service)
    assert stack.inspect(service)["Config"]["User"] not in ("", "root", "0")


def test_the_worker_answers_a_chat(stack: Stack) -> None:
    """The published port is vLLM's own API on a real engine."""
    answer = stack.client.post(
        stack.url("WORKER_API_PORT", "/v1/chat/completions"),
        json={"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8},
    )

    assert answer.status_code == 200
    assert answer.json()["usage"]["completion_tokens"] > 0


def test_every_part_of_the_stack_is_a_target_that_is_up(stack: Stack) -> None:
    """DNS discovery finds what runs, and nothing that does not."""
    until("five jobs up", lambda: len(stack.query("up == 1")) == 5, 60)

    assert {series["metric"]["job"] for series in stack.query("up")} == {
        "worker", "prometheus", "alertmanager", "grafana", "kv-index",
    }  # fmt: skip


def test_the_fleets_index_holds_the_workers_blocks(stack: Stack) -> None:
    """Engine → worker → plane → fleet: found by DNS, trusted, and the same blocks under load."""

    def status(service: str) -> dict[str, Any]:
        return dict(stack.client.get(stack.url(service, "/kv/status")).json())

    until("a trusted worker", lambda: status("KV_INDEX_PORT")["ok"], 60)
    (mine,), (theirs,) = status("WORKER_SYSTEM_PORT")["sources"], status("KV_INDEX_PORT")["sources"]
    assert theirs["worker"] == mine["worker"]
    assert theirs["batches"]["lost"] == mine["batches"]["lost"] == 0

    def matched() -> int:
        prompt = {"prompt": "The first blocks of this prompt are the same for both. " * 40}
        stack.client.post(
            stack.url("WORKER_API_PORT", "/v1/completions"),
            json={"model": "tiny", "max_tokens": 1, **prompt},
        )
        asked = stack.client.post(stack.url("WORKER_SYSTEM_PORT", "/kv/match"), json=prompt).json()
        dump = stack.client.get(stack.url("WORKER_SYSTEM_PORT", "/kv/dump")).text
        chains = [json.loads(line) for line in dump.splitlines()]
        hashes = next(line["hashes"] for line in chains if line.get("hashes"))
        answer = stack.client.post(
            stack.url("KV_INDEX_PORT", "/kv/match"), json={"hashes": hashes[:1]}
        ).json()
        return len(asked["matches"]) and len(answer["matches"])  # the load evicts in between

    until("blocks in both", matched, 60)
    assert stack.query('llm_worker_kv_fleet_workers{health="ok"} == 1')


def test_the_load_makes_queues_and_hits_and_leavers(stack: Stack) -> None:
    """What a demonstration shows: traffic, shared prefixes, a full cache, clients who leave."""
    # Once is enough: the load's phases take turns, and a crunch comes every ten minutes only.
    for expr in (
        "rate(vllm:generation_tokens_total[1m]) > 0",
        "vllm:prefix_cache_hits_total > 0",
        "max_over_time(vllm:num_requests_waiting[10m]) > 0",
        "vllm:num_preemptions_total > 0",
        'llm_worker_requests_ended_total{outcome="disconnected"} > 0',
        'http_requests_total{status="4xx"} > 0',
    ):
        until(expr, lambda expr=expr: stack.query(expr), 150)  # type: ignore[misc]


def test_every_rule_is_loaded_and_every_recording_rule_returns_data(
    stack: Stack, repository: Path
) -> None:
    """A rule that Prometheus skips, fails to evaluate or never fills is a rule nobody has."""
    written = {
        rule.get("record") or rule["alert"]
        for path in (repository / "prometheus" / "rules").glob("*.yml")
        for group in yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]
        for rule in group["rules"]
    }
    recorded = until("all rules evaluated", lambda: _evaluated(stack, written), 60)
    empty = set(recorded)

    def unfilled() -> list[str]:
        empty.difference_update([name for name in empty if stack.query(name)])
        return sorted(empty - set(EMPTY_RULES))

    until_none_is_left("recording rules that return nothing", unfilled, 150, pause_seconds=5)


def _evaluated(stack: Stack, written: set[str]) -> list[str]:
    rules = [rule for group in stack.prometheus("rules")["groups"] for rule in group["rules"]]
    assert {rule["name"] for rule in rules} == written
    assert [rule["lastError"] for rule in rules if rule["health"] == "err"] == []
    if any(rule["health"] == "unknown" for rule in rules):
        return []
    return [rule["name"] for rule in rules if rule["type"] == "recording"]


def test_every_panel_query_returns_data(stack: Stack) -> None:
    """No panel says "No data" under the load, except those that name what the demo lacks."""
    asked = queries.panel_queries()
    empty = [query for query in asked if query.needs is None or query.needs.demo]

    def left() -> list[str]:
        # The demo has nobody who routes, and "Match latency" is of the last minute.
        stack.client.post(stack.url("WORKER_SYSTEM_PORT", "/kv/match"), json={"prompt": "hi" * 40})
        empty[:] = [query for query in empty if not _samples(stack.query(query.expr))]
        return [f"{query.dashboard}: {query.panel} {query.ref_id}" for query in empty]

    until_none_is_left("panels without data", left, 150, pause_seconds=5)
    for query in asked:
        stack.query(query.expr)  # valid, also where it may be empty


def test_nothing_critical_fires_while_all_is_well(stack: Stack) -> None:
    """The Watchdog fires, to prove that alerts can; a page under the demo's load would be a lie."""
    alerts = stack.prometheus("alerts")["alerts"]
    critical = [a for a in alerts if a["labels"]["severity"] == "critical"]

    assert "Watchdog" in stack.firing()
    assert [a for a in critical if a["state"] == "firing"] == []
    until(
        "the Watchdog in Alertmanager",
        lambda: (
            "Watchdog" in stack.client.get(stack.url("ALERTMANAGER_PORT", "/api/v2/alerts")).text
        ),
        30,
    )


# What it waits for adds up to more than the others' limit.
@pytest.mark.timeout(900)
def test_a_killed_engine_pages_and_recovers_while_prometheus_restarts(stack: Stack) -> None:
    """A killed engine: a page, a restarted worker, the page resolved, and no history lost.

    Prometheus is restarted while the alert fires: what it recorded before is still there, and the
    resolution is still delivered.
    """
    before = time.time()
    old = stack.query("vllm:generation_tokens_total", at=before - 15)
    killed_at = stack.kill_engine()  # as the README does

    page = until("EngineDied delivered", lambda: stack.receiver.alert("EngineDied", "firing"), 90)
    delivered_after = time.time() - killed_at
    stack.restart("prometheus")
    until("Prometheus back", lambda: stack.status("PROMETHEUS_PORT", "/-/ready") == 200, 60)
    until("worker ready", lambda: stack.status("WORKER_SYSTEM_PORT", "/ready") == 200, 120)
    ready_after = time.time() - killed_at
    resolved = until(
        "EngineDied resolved", lambda: stack.receiver.alert("EngineDied", "resolved"), 270
    )
    print(
        f"delivered {delivered_after:.0f} s, ready {ready_after:.0f} s, "
        f"resolved {time.time() - killed_at:.0f} s after the kill"
    )

    assert page["labels"]["severity"] == "critical"
    assert page["annotations"]["runbook_url"].endswith("/EngineDied.md")
    assert resolved["labels"] == page["labels"]
    assert stack.inspect("worker-cpu")["RestartCount"] == 1
    # How the last run ended survived the restart, in the container's own volume.
    ended = stack.query('llm_worker_last_exit_timestamp_seconds{reason="engine_dead"}')
    assert _samples(ended)[0] == pytest.approx(killed_at, abs=15)
    # Nothing recorded before Prometheus' restart is gone.
    assert old
    assert stack.query("vllm:generation_tokens_total", at=before - 15) == old
    # And it serves again: the load came back by itself.
    until("traffic", lambda: stack.query("rate(vllm:generation_tokens_total[1m]) > 0"), 90)
    models = httpx.get(stack.url("WORKER_API_PORT", "/v1/models"), timeout=10).json()
    assert [model["id"] for model in models["data"]] == ["tiny"]
