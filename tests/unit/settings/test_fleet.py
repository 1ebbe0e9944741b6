"""Settings of the fleet service."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from llm_worker.errors import ConfigError
from llm_worker.settings.fleet import SETTINGS, help_text, load


def test_a_flag_wins_over_its_variable() -> None:
    """And what neither says has its default."""
    environment = {"KV_INDEX_PORT": "1000", "KV_INDEX_SOURCES": "zmq://a:5 zmq://b:5 zmq://a:5"}
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
        "zmq://w", "two vLLM servers are called 'a:5'", "--port (", "--gone-seconds (",
        "--max-blocks (", "--log-format (", "unknown option --nonsense", "--host (KV_INDEX_HOST)",
    ):  # fmt: skip
        assert part in text, part
    with pytest.raises(ConfigError) as caught:
        load(["--source=zmq://w"], {})
    assert len(caught.value.problems) == 1  # not also that there is none


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
