"""Settings: flags, environment, cross-checks, and all problems at once."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llm_worker.errors import ConfigError
from llm_worker.settings import worker as config
from llm_worker.settings.worker import SETTINGS, Config, KvEvents, load


def resolved(*arguments: str, env: dict[str, str] | None = None) -> Config:
    return load(arguments, env or {}).config


def problems(*arguments: str, env: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(arguments, env or {})
    return list(caught.value.problems)


def test_vllm_arguments_pass_through_verbatim_and_in_order() -> None:
    """What is not ours reaches vLLM's parser untouched."""
    theirs = ["--max-model-len=4k", "--port", "8123", "-O3", "--override-x", '{"a": "--worker-no"}']
    assert list(resolved("--model", "m", *theirs).engine_args) == theirs


@pytest.mark.parametrize(
    "arguments", [["--model", "m"], ["--model=m"], ["m"], ["m", "--model", "m"]]
)
def test_the_model_is_found_however_it_is_given(arguments: list[str]) -> None:
    """--model, --model= and vLLM's positional model mean the same."""
    assert resolved(*arguments, "--port", "1").model == "m"
    assert list(resolved(*arguments, "--port", "1").engine_args) == ["--port", "1"]


def test_two_different_models_are_a_problem() -> None:
    """Nobody guesses which one was meant."""
    assert problems("a", "--model", "b") == ["two models: 'a' and 'b'; give one"]


def test_no_model_is_a_problem_that_names_the_tiny_one() -> None:
    """The message is the way out."""
    (problem,) = problems()
    assert "--model tiny" in problem


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_every_setting_is_read_from_flag_and_environment_and_the_flag_wins(
    setting: config.Setting, tmp_path: Path
) -> None:
    """One table, two spellings, one precedence."""
    token = tmp_path / "token"
    token.write_text("s3cret\n", encoding="utf-8")
    samples: dict[str, tuple[str, str]] = {
        "model": ("a", "b"),
        "system-host": ("0.0.0.0", "::1"),
        "system-port": ("1234", "4321"),
        "system-token-file": (str(token), str(token)),
        "namespace": ("a", "b"),
        "component": ("a", "b"),
        "kv-events-port": ("21000", "22000"),
        "kv-replay-port": ("21500", "22500"),
        "kv-plane": ("zmq://127.0.0.1:21900", "nats://broker:4222"),
        "kv-connector-events": ("127.0.0.1:57001", "connector:57001,replay=57101"),
        "kv-max-blocks": ("1000000", "2000000"),
        "id": ("worker-a", "worker-b"),
        "multiproc-dir": (str(tmp_path), "auto"),
        "log-format": ("json", "text"),
        "drain-seconds": ("5", "7"),
        "goodput": ("ttft=2", "ttft=3"),
        "state-dir": (str(tmp_path / "a"), str(tmp_path / "b")),
    }
    first, second = samples[setting.name]
    base = {"LLM_WORKER_MODEL": "m", "LLM_WORKER_KV_EVENTS_PORT": "20000"}
    by_env = resolved(env=base | {setting.env: first})
    by_flag = resolved(setting.flag, first, env=base)
    flag_wins = resolved(f"{setting.flag}={second}", env=base | {setting.env: first})
    assert by_env == by_flag
    assert flag_wins == resolved(env=base | {setting.env: second})
    if first != second:
        assert flag_wins != by_env


def test_all_problems_come_in_one_message() -> None:
    """Fixing a configuration takes one round, not one round per mistake."""
    found = problems(
        "--model", "m", "--worker-system-port", "http", "--worker-log-format=xml", "--headless",
        env={"LLM_WORKER_DRAIN_SECONDS": "-1", "LLM_WORKER_GOODPUT": "latency=1"},
    )  # fmt: skip
    assert len(found) == 5
    for expected in ("'http' is not a port", "'xml' is unknown", "--headless", "-1", "latency=1"):
        assert any(expected in problem for problem in found), expected


def test_a_misspelt_setting_is_named_with_the_one_that_was_meant() -> None:
    """A typo never becomes a silent default."""
    found = problems(
        "--model=m", "--worker-system-prot", "1", env={"LLM_WORKER_SYSTEM_HOSTS": "::"}
    )
    assert any("did you mean --worker-system-port?" in problem for problem in found)
    assert any("did you mean LLM_WORKER_SYSTEM_HOST?" in problem for problem in found)


def test_ports_that_would_collide_are_found_before_anything_starts() -> None:
    """API, system server and each rank's event and replay ports are looked at together."""
    assert "8081" in problems("--model=m", "--port", "8081")[0]
    assert "8000" in problems("--model=m", "--worker-system-port", "8000")[0]
    (clash,) = problems(
        "--model=m", "--worker-kv-events-port=20080", "--worker-kv-replay-port=20081", "-dp", "2"
    )
    assert "20081" in clash


def test_any_free_port_never_collides() -> None:
    """Port 0 may be asked for twice."""
    assert resolved("--model=m", "--port=0", "--worker-system-port=0").system_port == 0


def test_kv_replay_defaults_to_a_hundred_above_the_events() -> None:
    """The documented default."""
    found = resolved("--model=m", "--worker-kv-events-port", "20080").kv_events
    assert found == KvEvents(20080, 20180)


def test_our_kv_ports_and_vllms_kv_config_exclude_each_other() -> None:
    """Two sources for one setting are a problem, not a precedence puzzle."""
    found = problems("--model=m", "--worker-kv-events-port=1024", "--kv-events-config={}")
    assert "keep one" in found[0]


def test_there_is_an_index_when_the_engine_publishes_whoever_asked_it_to() -> None:
    """Our port or vLLM's own option switch it on; nothing else does."""
    assert resolved("--model=m").kv_index is None
    ours = resolved("--model=m", "--worker-kv-events-port=1024").kv_index
    assert ours == resolved("--model=m", "--kv-events-config={}").kv_index
    assert ours == config.KvIndex("zmq://127.0.0.1:20280", None)
    off = resolved("--model=m", "--worker-kv-events-port=1024", "--worker-kv-plane=off").kv_index
    assert off == config.KvIndex(None, None)


def test_settings_of_the_kv_index_that_make_no_sense_are_named_together() -> None:
    """A plane that is none, a bound that is none, and a name with spaces."""
    found = problems(
        "--model=m", "--worker-kv-events-port=1024", "--worker-kv-plane=kafka://here:1",
        "--worker-kv-max-blocks=0", "--worker-id", "my worker",
        "--worker-kv-connector-events=somewhere",
    )  # fmt: skip
    assert [problem.split(" ")[0] for problem in found] == [
        "--worker-kv-plane",
        "--worker-kv-max-blocks",
        "--worker-kv-connector-events",
        "--worker-id",
    ]
    (without,) = problems("--model=m", "--worker-kv-max-blocks=5")
    assert "--worker-kv-events-port" in without


def test_the_ports_of_the_plane_collide_with_no_others() -> None:
    """Its events and, a hundred above, their replay."""
    (clash,) = problems("--model=m", "--worker-kv-events-port=20380")
    assert "20380" in clash


def test_several_api_servers_are_refused() -> None:
    """The worker is one process; vLLM's option for several would silently do nothing."""
    assert "one API server" in problems("--model=m", "--api_server_count=2")[0]


def test_an_empty_token_file_is_refused(tmp_path: Path) -> None:
    """An empty token would let everybody in."""
    (tmp_path / "token").touch()
    found = problems("--model=m", "--worker-system-token-file", str(tmp_path / "token"))
    assert "is empty" in found[0]


def test_a_directory_set_for_prometheus_client_is_used(tmp_path: Path) -> None:
    """PROMETHEUS_MULTIPROC_DIR in the environment is prometheus_client's own convention."""
    found = resolved("--model=m", env={"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)})
    assert found.multiproc_dir == str(tmp_path)
    (problem,) = problems("--model=m", env={"PROMETHEUS_MULTIPROC_DIR": "/not/there"})
    assert "/not/there is not a directory: create it" in problem


def test_the_dump_holds_no_token(tmp_path: Path) -> None:
    """A dumped configuration can be attached to a bug report."""
    (tmp_path / "token").write_text("s3cret", encoding="utf-8")
    dump = resolved("--model=m", "--worker-system-token-file", str(tmp_path / "token")).to_json()
    assert "s3cret" not in dump
    assert json.loads(dump)["model"] == "m"


def test_check_config_needs_no_vllm_and_exits_78_when_something_is_wrong(
    repository: Path, tmp_path: Path
) -> None:
    """The check runs anywhere: vLLM is never imported."""
    block = tmp_path / "vllm.py"
    block.write_text("raise ImportError('vllm was imported')\n", encoding="utf-8")
    dump = tmp_path / "dump.json"
    for arguments, code in (
        (["--check-config", "--model", "tiny", "--dump-config-to", str(dump)], 0),
        (["--check-config", "--model", "tiny", "--worker-log-format", "xml"], 78),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "llm_worker", *arguments],
            env={"PYTHONPATH": f"{tmp_path}:{repository / 'worker'}", "PATH": ""},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == code, done.stderr
    assert json.loads(dump.read_text(encoding="utf-8"))["model"] == "tiny"
    assert "--worker-log-format" in done.stderr


def test_a_disk_that_fails_later_is_no_matter_of_configuration(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A supervisor may leave a worker down that exits 78: only wrong settings do."""
    from llm_worker import __main__ as program

    def full(*_: Any) -> Any:
        raise OSError("no space left on device")

    monkeypatch.setattr(program, "Supervisor", full)
    monkeypatch.setattr(program, "configure_logging", lambda *_: None)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["llm_worker", "--model", "m"])
    assert program.main() == 1
    monkeypatch.setattr(
        sys, "argv", ["llm_worker", "--model", "m", "--dump-config-to", "/nowhere/f"]
    )
    assert program.main() == 78
    assert "--dump-config-to" in capsys.readouterr().err


def test_help_lists_every_setting() -> None:
    """The table of the code is the table of the help."""
    text = config.help_text()
    for setting in SETTINGS:
        assert re.search(rf"{re.escape(setting.flag)}\s", text), setting.flag
