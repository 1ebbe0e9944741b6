"""Where a listener connects to."""

from __future__ import annotations

from llm_worker.kv.follow.listener import connectable


def test_an_endpoint_that_was_bound_is_connected_to_on_this_machine() -> None:
    """vLLM tells the address that it bound."""
    assert connectable("tcp://*:20080") == "tcp://127.0.0.1:20080"
    assert connectable("tcp://0.0.0.0:1") == "tcp://127.0.0.1:1"
    assert connectable("tcp://[::]:1") == "tcp://[::1]:1"
    assert connectable("tcp://10.0.0.1:1") == "tcp://10.0.0.1:1"
    assert connectable("ipc:///run/kv") == "ipc:///run/kv"
