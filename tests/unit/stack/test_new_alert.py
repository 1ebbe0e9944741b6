"""scripts/new-alert on a copy of the repository: what it begins, and when it is done."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support.places import ROOT

COPIED = (
    "docs", "prometheus", "scripts/new-alert", "tests/conftest.py", "tests/support",
    "tests/integration/fixtures", "tests/unit/stack/test_rules_documents.py", "worker/llm_worker",
)  # fmt: skip
FILLED = {
    "TODO{": "llm_worker_last_exit_timestamp_seconds{",
    "TODO > 0": "llm_worker_last_exit_timestamp_seconds > 0",
    "TODO": "It is so",
}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """What an alert and its tests consist of."""
    (tmp_path / "pyproject.toml").write_text(
        '[tool.pytest.ini_options]\naddopts = "--import-mode=importlib"\n'
        'pythonpath = ["worker", "tests"]\nmarkers = ["needs", "slow"]\n',
        encoding="utf-8",
    )
    for name in COPIED:
        target = tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, target)
    return tmp_path


def begin(copy: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, copy / "scripts/new-alert", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def failed(copy: Path) -> set[str]:
    """The documents' tests that fail there."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/unit/stack", "-q", "-p", "no:cacheprovider"],
        cwd=copy,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return {
        line.split("::")[1].split("[")[0]
        for line in done.stdout.splitlines()
        if line.startswith("FAILED ")
    }


@pytest.mark.slow
@pytest.mark.parametrize("rules", ["engine", "kv.yml"])
def test_an_alert_that_was_begun_fails_its_tests_until_it_is_filled_in(
    copy: Path, rules: str
) -> None:
    """Nothing but the words and the expression is left to write."""
    done = begin(copy, "SomethingWrong", "--rules", rules)
    assert done.returncode == 0, done.stderr
    named = [line.strip() for line in done.stdout.splitlines() if line.startswith("  ")]
    assert failed(copy) == {
        "test_every_metric_in_a_rule_exists",
        "test_a_runbook_asks_only_for_metrics_that_exist_and_links_only_to_files",
        "test_what_was_begun_is_filled_in",
    }

    for name in named:
        text = (copy / name).read_text(encoding="utf-8")
        for begun, written in FILLED.items():
            text = text.replace(begun, written)
        (copy / name).write_text(text, encoding="utf-8")
    assert failed(copy) == set()


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["EngineDied"], "there already: availability.yml"),
        (["engine-died"], "an alert's name is like"),
        (["SomethingWrong", "--rules", "recording"], "choose from availability, engine"),
    ],
)
def test_what_cannot_be_begun_is_refused_and_nothing_is_written(
    copy: Path, arguments: list[str], why: str
) -> None:
    """A second alert of one name would be tested by the first one's test."""
    before = {path: path.read_bytes() for path in (copy / "prometheus").rglob("*.*")}
    done = begin(copy, *arguments)
    assert done.returncode == 1
    assert why in done.stderr
    assert {path: path.read_bytes() for path in (copy / "prometheus").rglob("*.*")} == before
