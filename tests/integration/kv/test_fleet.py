"""A fleet whose addresses change, and one that is large: on real sockets."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import pytest

from llm_worker.fleet import fleet as fleet_module
from llm_worker.fleet.fleet import Fleet, Limits
from llm_worker.kv.trtllm.publisher import ZmqKvEventPublisher
from llm_worker.settings import endpoint
from support.waiting import until
from support.worker_process import free_ports

pytestmark = pytest.mark.timeout(150)


HURRY = Limits(round_seconds=0.2)


@contextmanager
def followed(*sources: str, limits: Limits = HURRY) -> Iterator[Fleet]:
    endpoints = [endpoint.source(each) for each in sources]
    made = Fleet(endpoints, resolve_seconds=0.1, limits=limits)
    made.start()
    try:
        yield made
    finally:
        made.close()


def publish(made: ZmqKvEventPublisher, *hashes: int) -> None:
    for value in hashes:
        made.publish_stored(None, [1] * 16, [16], [value])


def test_a_server_whose_name_moves_twice_is_what_the_last_one_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each address is another process: its predecessor's blocks and listeners are gone."""
    where = ["127.0.0.1"]
    monkeypatch.setattr(fleet_module, "_addresses", lambda _: (where[0],))
    events, replay = free_ports(2)
    with ExitStack() as stack, followed(f"vllm://box:{events},replay={replay},worker=w") as fleet:

        def is_held(expected: set[int]) -> bool:
            (source,) = fleet.index.sources()
            return not source.stale and source.hashes() == expected

        def listened(host: str) -> bool:
            return any(host in listener.endpoint for listener in fleet.pipeline.listeners)

        for number, host in enumerate(("127.0.0.1", "127.0.0.2", "127.0.0.3"), 1):
            engine = ZmqKvEventPublisher(
                f"tcp://{host}:{events}", 16, replay_endpoint=f"tcp://{host}:{replay}"
            )
            stack.callback(engine.shutdown)
            where[0] = host
            until("a listener there", partial(listened, host), 30)
            publish(engine, number, 10 * number)
            until("its blocks and no others", partial(is_held, {number, 10 * number}), 30)
            engine.shutdown()
            until("the end of the connection", lambda: not fleet.listeners()[0].connected, 30)
        assert len(fleet.pipeline.listeners) == 1
        assert {source.worker for source in fleet.index.sources()} == {"w"}


def test_a_fleet_of_four_hundred_servers_is_followed_in_full() -> None:
    """libzmq's default ends at 341 listeners, and with it every round did."""
    sources = [f"vllm://127.0.0.1:{port},replay={port + 1}" for port in range(30000, 30800, 2)]
    with followed(*sources) as fleet:
        until("all of them", lambda: len(fleet.pipeline.listeners) == 400, 60)
        began = time.monotonic()
        until(
            "a round after that", lambda: fleet.seconds_since_round < time.monotonic() - began, 30
        )
        assert fleet.round_failures == 0
        assert fleet.alive


def test_an_address_that_cannot_be_opened_is_counted_and_costs_no_other() -> None:
    """It is tried again a second later; rounds come to their end."""
    limits = Limits(round_seconds=0.2, max_sockets=7)  # two listeners and what libzmq keeps
    sources = (f"vllm://127.0.0.1:{port}" for port in (31000, 31010, 31020))
    with followed(*sources, limits=limits) as fleet:
        until("failures", lambda: fleet.round_failures >= 3, 30)
        assert 0 < len(fleet.pipeline.listeners) < 3
        assert fleet.seconds_since_round < 10
