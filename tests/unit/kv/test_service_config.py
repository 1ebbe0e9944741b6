"""Settings of the fleet service."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from llm_worker.errors import ConfigError
from llm_worker.settings.fleet import SETTINGS, Endpoint, endpoint, help_text, load


def test_sources_of_every_kind_are_understood() -> None:
    """Planes, plain vLLM servers and NATS, with their options."""
    assert endpoint("zmq://worker.:20280") == Endpoint("zmq", "worker.", 20280, 20380)
    assert endpoint("zmq://[::1]:5,replay=6") == Endpoint("zmq", "::1", 5, 6)
    assert endpoint("vllm://gpu:5557,replay=5558,worker=box,ranks=2,topic=kv") == Endpoint(
        "vllm", "gpu", 5557, 5558, "box", 2, "kv"
    )
    assert endpoint("vllm://gpu:5557") == Endpoint("vllm", "gpu", 5557, None, "gpu:5557", 1)
    assert endpoint("nats://user:secret@hub:4222").url == "nats://user:secret@hub:4222"


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
        endpoint(text)


def test_a_flag_wins_over_its_variable() -> None:
    """And what neither says has its default."""
    environment = {"KV_INDEX_PORT": "1000", "KV_INDEX_SOURCES": "zmq://a:5 zmq://b:5"}
    config, check_only = load(["--port=2000", "--check-config"], environment)

    assert check_only
    assert config.port == 2000
    assert [source.host for source in config.sources] == ["a", "b"]
    assert (config.host, config.gone_seconds, config.max_blocks) == ("127.0.0.1", 300.0, None)
    only, _ = load(["--source", "zmq://c:5"], environment)
    assert [source.host for source in only.sources] == ["c"]


def test_all_problems_are_reported_together() -> None:
    """Nobody fixes one at a time."""
    with pytest.raises(ConfigError) as caught:
        load(
            [
                "--source", "zmq://w", "--source=vllm://a:5", "--source=vllm://a:5,replay=6",
                "--port", "x", "--gone-seconds", "0", "--max-blocks=-1", "--log-format=xml",
                "--nonsense",
            ],
            {"KV_INDEX_HOTS": "a", "KV_INDEX_HOST": "a b"},
        )  # fmt: skip
    text = "\n".join(caught.value.problems)

    for part in (
        "zmq://w", "two vLLM servers are called 'a:5'", "--port (KV_INDEX_PORT)", "--gone-seconds",
        "--max-blocks", "--log-format", "--nonsense", "KV_INDEX_HOTS", "--host (KV_INDEX_HOST)",
    ):  # fmt: skip
        assert part in text, part


def test_a_missing_source_is_a_problem() -> None:
    """An index of nothing is a mistake."""
    with pytest.raises(ConfigError, match="no --source"):
        load([], {})


def test_a_password_is_never_shown() -> None:
    """Neither in the configuration nor in a complaint about it."""
    config, _ = load(["--source", "nats://user:hush@hub:4222"], {})
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
