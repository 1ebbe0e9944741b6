"""The profile `nats` as it is shipped: a worker's blocks reach the fleet's index over JetStream."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e.stack import Stack, start
from support.waiting import until
from support.worker_process import free_ports

SERVICES = ("worker-cpu", "kv-index", "nats")
PORTS = ("WORKER_API_PORT", "WORKER_SYSTEM_PORT", "KV_INDEX_PORT", "NATS_PORT")
NATS = "nats://nats:4222"

pytestmark = [pytest.mark.needs("docker"), pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def stack(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """What takes part of the shipped compose file, with the settings that its comments name."""
    running = start(
        repository,
        tmp_path_factory.mktemp("e2e"),
        dict(zip(PORTS, free_ports(len(PORTS)), strict=True)),
        services=SERVICES,
        settings={
            "COMPOSE_PROFILES": "demo,fleet,nats",
            "KV_PLANE": NATS,
            "KV_INDEX_SOURCES": NATS,
        },
    )
    yield running
    running.compose.stop()
    running.receiver.close()


def status(stack: Stack, port: str) -> dict[str, Any]:
    return dict(stack.client.get(stack.url(port, "/kv/status")).json())


def agreed(stack: Stack) -> bool:
    """Whether the fleet trusts the worker's blocks, and they are as many as the worker's own."""
    mine, theirs = status(stack, "WORKER_SYSTEM_PORT"), status(stack, "KV_INDEX_PORT")
    return bool(theirs["ok"] and theirs["held_blocks"] == mine["held_blocks"] > 0)


def complete(stack: Stack, prompt: str) -> None:
    answer = stack.client.post(
        stack.url("WORKER_API_PORT", "/v1/completions"),
        json={"model": "tiny", "prompt": prompt * 40, "max_tokens": 8},
    )
    answer.raise_for_status()


@pytest.mark.parametrize("service", SERVICES)
def test_every_container_is_healthy_and_locked_down(stack: Stack, service: str) -> None:
    """As in the profiles that are on by default."""
    stack.assert_locked_down(service)


def test_the_fleets_index_holds_what_the_worker_sends_by_nats(stack: Stack) -> None:
    """Found by its stream, trusted, and the same blocks; nothing was dropped on the way."""
    complete(stack, "The first story. ")
    complete(stack, "The second story. ")
    until("the same blocks in both", lambda: agreed(stack), 60)
    (plane,) = status(stack, "WORKER_SYSTEM_PORT")["planes"]
    fleet = status(stack, "KV_INDEX_PORT")

    assert (plane["plane"], plane["up"]) == ("nats", True)
    assert not any(plane["dropped_batches"].values())
    assert fleet["sources"][0]["batches"]["lost"] == 0
    (endpoint,) = fleet["endpoints"]
    assert (endpoint["source"], endpoint["answers"]) == (NATS, True)


def test_a_restart_of_the_server_costs_nothing(stack: Stack) -> None:
    """Its streams are in a volume; both sides come back by themselves."""
    stack.restart("nats")
    complete(stack, "A story from the outage. ")
    until("the same blocks in both again", lambda: agreed(stack), 90)
    (plane,) = status(stack, "WORKER_SYSTEM_PORT")["planes"]

    assert plane["reconnects"] >= 1
    assert not any(plane["dropped_batches"].values())
    assert status(stack, "KV_INDEX_PORT")["sources"][0]["batches"]["lost"] == 0
