"""Settings of the fleet service."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from llm_worker.errors import ConfigError
from llm_worker.settings.endpoint import Endpoint, connector, plane, source
from llm_worker.settings.fleet import SETTINGS, help_text, load


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


def test_a_flag_wins_over_its_variable() -> None:
    """And what neither says has its default."""
    environment = {"KV_INDEX_PORT": "1000", "KV_INDEX_SOURCES": "zmq://a:5 zmq://b:5"}
    command = load(["--port=2000", "--check-config"], environment)
    config = command.config

    assert command.check_only
    assert config.port == 2000
    assert [each.host for each in config.sources] == ["a", "b"]
    assert (config.host, config.gone_seconds, config.max_blocks) == ("127.0.0.1", 300.0, None)
    only = load(["--source", "zmq://c:5"], environment).config
    assert [each.host for each in only.sources] == ["c"]


def test_all_problems_are_reported_together() -> None:
    """Nobody fixes one at a time."""
    with pytest.raises(ConfigError) as caught:
        load(
            [
                "--source", "zmq://w", "--source=vllm://a:5", "--source=vllm://a:5,replay=6",
                "--port", "x", "--gone-seconds", "0", "--max-blocks=-1", "--log-format=xml",
                "--nonsense",
            ],
            {"KV_INDEX_HOST": "a b"},
        )  # fmt: skip
    text = "\n".join(caught.value.problems)

    for part in (
        "zmq://w", "two vLLM servers are called 'a:5'", "--port (KV_INDEX_PORT)", "--gone-seconds",
        "--max-blocks", "--log-format", "--nonsense", "--host (KV_INDEX_HOST)",
    ):  # fmt: skip
        assert part in text, part


def test_what_is_wrong_in_the_environment_beside_our_settings_is_a_warning() -> None:
    """A typo is told; what Kubernetes writes for a Service called kv-index is nobody's typo."""
    service = {
        "KV_INDEX_SERVICE_HOST": "10.96.0.8",
        "KV_INDEX_SERVICE_PORT": "8082",
        "KV_INDEX_PORT_8082_TCP": "tcp://10.96.0.8:8082",
        "KV_INDEX_PORT_8082_TCP_ADDR": "10.96.0.8",
    }
    assert load(["--source=zmq://a:5"], service).warnings == ()
    found = load(
        ["--source=zmq://a:5"],
        service | {"KV_INDEX_PORT": "tcp://10.96.0.8:8082", "KV_INDEX_HOTS": "a"},
    )
    assert found.config.port == 8082
    named, typo = found.warnings
    assert "KV_INDEX_PORT=tcp://10.96.0.8:8082 was written by Kubernetes" in named
    assert "did you mean KV_INDEX_HOST?" in typo


def test_a_missing_source_is_a_problem() -> None:
    """An index of nothing is a mistake."""
    with pytest.raises(ConfigError, match="no --source"):
        load([], {})


def test_a_password_is_never_shown() -> None:
    """Neither in the configuration nor in a complaint about it."""
    config = load(["--source", "nats://user:hush@hub:4222"], {}).config
    assert "hush" not in config.to_json()
    assert str(config.sources[0]) == "nats://hub:4222"
    with pytest.raises(ConfigError) as caught:
        load(["--source", "nats://user:hush@hub"], {})
    assert "hush" not in str(caught.value)


def test_help_lists_every_setting() -> None:
    """With its default."""
    for setting in SETTINGS:
        assert setting.flag in help_text()


def test_wrong_settings_end_the_program_with_78(repository: Path) -> None:
    """All problems on standard error, without vLLM and at once."""
    done = subprocess.run(
        [sys.executable, "-m", "llm_worker.fleet", "--port", "x"],
        cwd=repository / "worker",
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )

    assert done.returncode == 78
    assert done.stderr.count("\n  - ") == 2
    assert "Traceback" not in done.stderr


def test_the_service_imports_no_vllm(repository: Path) -> None:
    """It runs beside workers, not as one."""
    code = "import sys, llm_worker.fleet.__main__; assert 'vllm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=repository / "worker", check=True, timeout=60)
