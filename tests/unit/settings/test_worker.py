"""Settings: flags, environment, cross-checks, and all problems at once."""

from __future__ import annotations

import json
import logging
import os
import re
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from llm_worker.errors import ConfigError
from llm_worker.logs import configure_logging
from llm_worker.serving import tiny
from llm_worker.settings import worker as config
from llm_worker.settings.endpoint import Endpoint
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
        "log-level": ("debug", "error"),
        "lame-duck-seconds": ("5", "7"),
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
    (problem,) = problems("--model=m", "--worker-system-prot", "1")
    assert "did you mean --worker-system-port?" in problem
    (warning,) = load(["--model=m"], {"LLM_WORKER_SYSTEM_HOSTS": "::"}).warnings
    assert "did you mean LLM_WORKER_SYSTEM_HOST?" in warning


def test_a_flag_without_a_value_takes_no_other_flag_for_it() -> None:
    """What follows keeps its meaning."""
    (problem,) = problems("--worker-log-format", "--model", "m")
    assert problem == "--worker-log-format needs a value"
    (problem,) = problems("--model", "m", "--dump-config-to")
    assert problem == "--dump-config-to needs a value"


SERVICE = {  # as Kubernetes writes it for a Service called llm-worker with a port called http
    "LLM_WORKER_SERVICE_HOST": "10.96.0.7",
    "LLM_WORKER_SERVICE_PORT": "8081",
    "LLM_WORKER_SERVICE_PORT_HTTP": "8081",
    "LLM_WORKER_PORT": "tcp://10.96.0.7:8081",
    "LLM_WORKER_PORT_8081_TCP": "tcp://10.96.0.7:8081",
    "LLM_WORKER_PORT_8081_TCP_PROTO": "tcp",
    "LLM_WORKER_PORT_8081_TCP_PORT": "8081",
    "LLM_WORKER_PORT_8081_TCP_ADDR": "10.96.0.7",
}


def test_a_kubernetes_service_of_our_name_changes_nothing() -> None:
    """Nor does one whose name only begins like ours."""
    others = {name.replace("WORKER_", "WORKER_API_", 1): value for name, value in SERVICE.items()}
    assert load(["--model=m"], SERVICE | others) == load(["--model=m"], {})


def test_a_kubernetes_service_named_like_a_setting_is_ignored_with_the_fix() -> None:
    """A Service llm-worker-system writes a URL where our port belongs; nobody else would."""
    found = load(["--model=m"], {"LLM_WORKER_SYSTEM_PORT": "tcp://10.96.0.7:8081"})
    assert found.config == resolved("--model=m")
    (warning,) = found.warnings
    assert "LLM_WORKER_SYSTEM_PORT=tcp://10.96.0.7:8081" in warning
    assert "enableServiceLinks" in warning
    # A port without a URL is no Service's: it was meant for us.
    (warning,) = load(["--model=m"], {"LLM_WORKER_PORT": "8081"}).warnings
    assert warning.startswith("unknown environment variable LLM_WORKER_PORT")


def test_the_plugin_looks_at_its_own_variable_only() -> None:
    """A plain `vllm serve` does not lose its metrics to whatever else is set."""
    wrong = SERVICE | {"LLM_WORKER_TYPO": "1", "LLM_WORKER_LOG_FORMAT": "xml"}
    assert config.goodput_from_env(wrong) == config.GoodputTargets()
    found = config.goodput_from_env(wrong | {"LLM_WORKER_GOODPUT": "ttft=2"})
    assert found == config.GoodputTargets(ttft_seconds=2)
    with pytest.raises(ConfigError, match=r"--worker-goodput \(LLM_WORKER_GOODPUT\)"):
        config.goodput_from_env({"LLM_WORKER_GOODPUT": "ttft=-2"})


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


@pytest.mark.parametrize(
    ("api", "system", "clash"),
    [
        ("127.0.0.2", "127.0.0.1", False),
        ("127.0.0.1", "127.0.0.1", True),
        ("0.0.0.0", "127.0.0.1", True),
        ("0.0.0.0", "::1", False),
        ("::", "127.0.0.1", True),
        ("[::1]", "::1", True),
        ("localhost", "127.0.0.1", True),
        ("localhost", "127.0.0.2", True),
        ("localhost", "192.0.2.1", False),
        ("here.example", "127.0.0.1", False),
        ("here.example", "0.0.0.0", True),
    ],
)
def test_two_listeners_on_one_port_collide_only_at_a_common_address(
    api: str, system: str, clash: bool
) -> None:
    """Addresses count; where a name may lead is not asked."""
    asked = ["--model=m", f"--host={api}", "--port=8081", f"--worker-system-host={system}"]
    if clash:
        assert "8081" in problems(*asked)[0]
    else:
        assert resolved(*asked).system_port == 8081


def test_ranks_beyond_the_last_port_are_one_problem() -> None:
    """However many ranks there are."""
    (problem,) = problems(
        "--model=m", "--worker-kv-events-port=65000", "--worker-kv-replay-port=1024", "-dp=600"
    )
    assert "65599 is above 65535" in problem


def test_a_bad_port_does_not_also_collide() -> None:
    """What stands in for it was never asked for."""
    (problem,) = problems("--model=m", "--port=8081", "--worker-system-port=http")
    assert "'http' is not a port" in problem
    (problem,) = problems(
        "--model=m", "--port=20180", "--worker-kv-events-port=20080", "--worker-kv-replay-port=x"
    )
    assert "'x' is not a port" in problem
    (problem,) = problems(
        "--model=m", "--worker-kv-events-port=20280", "--worker-kv-plane=zmq://here"
    )
    assert "write zmq://HOST:PORT" in problem


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
    assert ours == config.KvIndex(Endpoint("zmq", "127.0.0.1", 20280, 20380), None)
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
        "--worker-kv-connector-events",
        "--worker-kv-max-blocks",
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


@pytest.mark.parametrize("token", ["s3crét", "two words", "two\nlines"])
def test_a_token_that_no_header_can_carry_is_refused(token: str, tmp_path: Path) -> None:
    """It would never match, without a word at the start."""
    (tmp_path / "token").write_text(token, encoding="utf-8")
    (problem,) = problems("--model=m", "--worker-system-token-file", str(tmp_path / "token"))
    assert "HTTP header" in problem
    assert token not in problem


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


def test_the_dump_holds_no_password_of_a_plane() -> None:
    """Nor does a complaint about one."""
    asked = ["--model=m", "--worker-kv-events-port=1024"]
    found = resolved(*asked, "--worker-kv-plane=tls://user:hush@hub:4222")
    assert found.kv_index
    assert found.kv_index.plane
    assert found.kv_index.plane.url == "tls://user:hush@hub:4222"
    assert json.loads(found.to_json())["kv_index"]["plane"] == "nats://hub:4222"
    assert "hush" not in found.to_json()
    assert "hush" not in problems(*asked, "--worker-kv-plane=nats://user:hush@hub")[0]


@pytest.mark.parametrize("asked", ["--help", "-h", "--help=all", "--help=ModelConfig", "--version"])
def test_a_question_about_vllm_needs_no_model(asked: str) -> None:
    """vLLM's own parser answers it."""
    found = load([asked], {})
    assert found.vllm_help
    assert found.config.engine_args == (asked,)
    assert not load(["--model=m"], {}).vllm_help


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
            env={
                "PYTHONPATH": f"{tmp_path}:{repository / 'worker'}",
                "PATH": "",
                "LLM_WORKER_TYPO": "1",
            },
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == code, done.stderr
        assert code or "LLM_WORKER_TYPO is ignored" in done.stderr
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


def test_the_temporary_cache_is_ours_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name can be guessed: what somebody else put there is never read."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made = config.cache_directory({})
    assert made.parent == tmp_path
    assert made.stat().st_mode & 0o777 == 0o700
    assert config.cache_directory({}) == made

    made.chmod(0o777)
    with pytest.raises(ConfigError, match="XDG_CACHE_HOME"):
        config.cache_directory({})
    made.chmod(0o700)
    with monkeypatch.context() as somebody:
        somebody.setattr(os, "getuid", lambda: 4321)
        (tmp_path / "llm-worker-4321").mkdir(mode=0o700)
        with pytest.raises(ConfigError, match="XDG_CACHE_HOME"):
            config.cache_directory({})
    made.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    made.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="XDG_CACHE_HOME"):
        config.cache_directory({})
    assert config.cache_directory({"HOME": str(tmp_path)}) == tmp_path / ".cache/llm-worker"


def test_another_tiny_model_lies_in_another_directory(tmp_path: Path) -> None:
    """Files that are there are kept: those of an older release must not be there."""
    changed = tmp_path / "tiny.py"
    source = Path(tiny.__file__).read_text(encoding="utf-8")
    changed.write_text(source.replace('"hidden_size": 64', '"hidden_size": 128'), encoding="utf-8")
    names = runpy.run_path(str(changed))
    assert names["CONFIG"] != tiny.CONFIG
    assert names["directory_name"]() != tiny.directory_name()


def test_the_log_level_is_that_of_our_loggers(capsys: pytest.CaptureFixture[str]) -> None:
    """Others' levels stay what they are."""
    ours, root = logging.getLogger("llm_worker"), logging.getLogger()
    before = ours.handlers, ours.level, ours.propagate, root.level
    try:
        for level, lines in (("debug", 2), ("info", 1), ("error", 0)):
            configure_logging("json", level)
            logging.getLogger("llm_worker.some").debug("small")
            logging.getLogger("llm_worker.some").info("large")
            assert capsys.readouterr().err.count("\n") == lines
        assert root.level == before[3]
    finally:
        ours.handlers, ours.level, ours.propagate = before[:3]
