"""Addresses of KV events: what is one, and what each of its parts says."""

from __future__ import annotations

import pytest

from llm_worker.settings.endpoint import Endpoint, connector, plane, source


def test_sources_of_every_kind_are_understood() -> None:
    """Planes, plain vLLM servers and NATS, with their options."""
    assert source("zmq://worker.:20280") == Endpoint("zmq", "worker.", 20280, 20380)
    assert source("zmq://[::1]:5,replay=6") == Endpoint("zmq", "::1", 5, 6)
    assert source("vllm://gpu:5557,replay=5558,worker=box,ranks=2,topic=kv") == Endpoint(
        "vllm", "gpu", 5557, 5558, "box", 2, "kv"
    )
    assert source("vllm://gpu:5557") == Endpoint("vllm", "gpu", 5557, None, "gpu:5557", 1)
    assert source("nats://user:secret@hub:4222").url == "nats://user:secret@hub:4222"


def test_the_planes_of_a_worker_are_understood() -> None:
    """Bound, sent to, or none; the replay stands a hundred above."""
    assert plane("off") is None
    assert plane("zmq://*:20280") == Endpoint("zmq", "*", 20280, 20380)
    assert plane("zmq://127.0.0.1:0") == Endpoint("zmq", "127.0.0.1", 0, 0)
    assert plane("tls://user:secret@hub:4222") == Endpoint(
        "nats", "hub", 4222, url="tls://user:secret@hub:4222"
    )


def test_the_publishers_of_connectors_are_understood() -> None:
    """Those of other ranks are the next ports; who gives no replay port cannot be asked."""
    found = connector("[::1]:57001,replay=57101")
    assert (found.tcp(), found.tcp(2)) == ("tcp://[::1]:57001", "tcp://[::1]:57003")
    assert found.replay_tcp(2) == "tcp://[::1]:57103"
    assert connector("here:57001").replay_tcp() is None


@pytest.mark.parametrize(
    "text",
    ["", "here", "here:1", "zmq://here", "zmq://:1", "zmq://here:1/x", "zmq://he re:1",
     "zmq://here:65436", "nats://here:0", "vllm://here:1", "zmq://here:1,replay=2"],
)  # fmt: skip
def test_what_is_no_plane_is_refused_with_what_is_one(text: str) -> None:
    """The message shows how to write it."""
    with pytest.raises(ValueError, match=r"write zmq://|choose a lower one"):
        plane(text)


@pytest.mark.parametrize(
    "text",
    ["here", ":1", "here:0", "here:70000", "zmq://here:1", "here:1,replay", "here:1,replay=0",
     "here:1,ranks=2", "he re:1", "user@here:1"],
)  # fmt: skip
def test_what_is_no_connectors_publisher_is_refused_with_what_is_one(text: str) -> None:
    """The message shows how to write it."""
    with pytest.raises(ValueError, match=r"write HOST:PORT|is not a"):
        connector(text)


@pytest.mark.parametrize(
    "text",
    [
        "", "worker:20280", "http://worker:80", "zmq://worker", "zmq://:5", "zmq://w:0",
        "zmq://w:70000", "zmq://w:5/path", "zmq://w:5,replay", "zmq://w:5,replay=x",
        "zmq://w:5,ranks=2", "vllm://w:65535,ranks=2", "vllm://w:5,ranks=0", "nats://w:5,replay=3",
    ],
)  # fmt: skip
def test_what_is_no_source_is_refused_with_what_is_one(text: str) -> None:
    """The message shows how to write it."""
    with pytest.raises(ValueError, match=r"write zmq://|is not a|would be beyond"):
        source(text)
